//! `ckpt-sk --list -t PID`: the sockets of a live tree, and what a checkpoint would do with each.
//!
//! Which sockets there are is told by the links in `/proc/PID/fd`; what they are by the kernel's tables
//! (sock_diag(7), [`ckpt_sys::diag`]), read in the network namespace of each process, a dump for
//! each family until all inodes are known, whatever their number. Raw sockets are looked up in `/proc/PID/net`
//! where the kernel has no table of them (CONFIG_INET_RAW_DIAG), ping sockets always. A socket that
//! has no address yet is in no table of its family: a copy of the descriptor (pidfd_getfd(2)) tells what
//! it is. Nothing is stopped, so what closes meanwhile is left out.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::{self, File},
    net::SocketAddr,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
};

use anyhow::Context;
use ckpt_proto::types::SocketStub;
use ckpt_socket::{CLOSE, ESTABLISHED, LISTEN, kind, shown_address, state};
use ckpt_sys::{
    Pid, SysError, TargetFd,
    diag::{InetSocket, SockDiag, UnixSocket},
    pidfd, sock,
};
use nix::errno::Errno;

use super::{
    dump::{comm, descriptors, find_holders, read_link},
    socket::{self, Queued, SkOptions},
    unix::{self, shown},
};

/// A socket, live or from a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Inode; packet sockets in images have none.
    pub id: Option<u64>,
    /// One of [`ckpt_socket::KINDS`].
    pub kind: &'static str,
    /// In words.
    pub state: String,
    /// Who of the tree has it open: pid and descriptor.
    pub holders: Vec<(Pid, TargetFd)>,
    /// The command of the first of these.
    pub comm: String,
    /// What it is bound to, for people.
    pub local: String,
    /// What the peer is bound to, for people.
    pub peer: String,
    /// Inode of the peer.
    pub peer_id: Option<u64>,
    /// Who has the peer open: pid and command.
    pub peer_holder: Option<(Pid, String)>,
    /// Whether the peer is in the tree too.
    pub peer_inside: bool,
    /// Received and not read: bytes of a stream, of datagrams those of the first message (unix) or memory;
    /// listeners: connections waiting.
    pub received: u64,
    /// Sent and not acknowledged, bytes (TCP), or memory taken by what the peer has not read; listeners:
    /// the backlog.
    pub unsent: u64,
    /// `yes`, or what would be needed; of a stream what a restore does.
    pub fate: String,
}

/// The process and its descendants, parents first.
#[must_use]
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        at += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_ascii_whitespace().filter_map(|c| c.parse().ok()).map(Pid));
        }
    }
    all
}

/// What a table says about a socket.
#[derive(Debug, Clone, Default)]
struct Row {
    domain: i32,
    kind: i32,
    protocol: i32,
    state: u32,
    local: String,
    peer: String,
    peer_id: Option<u64>,
    /// Both sides of an inet socket.
    sides: Option<(SocketAddr, SocketAddr)>,
    received: u32,
    unsent: u32,
}

impl Row {
    fn kind_name(&self) -> &'static str {
        kind(self.domain, self.kind, self.protocol)
    }

    fn unix(of: &UnixSocket) -> Self {
        Self {
            domain: libc::AF_UNIX,
            kind: of.kind,
            state: of.state.into(),
            local: shown(&of.name),
            peer_id: of.peer,
            received: of.rqueue,
            unsent: of.wqueue,
            ..Self::default()
        }
    }

    fn inet(of: &InetSocket, kind: i32, protocol: i32) -> Self {
        let remote = (of.remote.port() != 0 || !of.remote.ip().is_unspecified()).then_some(of.remote);
        Self {
            domain: if of.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 },
            kind,
            protocol,
            state: of.state.into(),
            local: shown_address(Some(of.local)),
            peer: shown_address(remote),
            sides: Some((of.local, of.remote)),
            received: of.rqueue,
            unsent: of.wqueue,
            ..Self::default()
        }
    }
}

/// The tables of one network namespace, as far as they were asked for.
struct Tables {
    /// Somebody in the namespace.
    pid: Pid,
    diag: SockDiag,
    rows: HashMap<u64, Row>,
    unix_names: HashMap<u64, String>,
    dumps: usize,
}

/// In the order in which they are asked for.
const INET: [(i32, i32); 4] = [
    (libc::SOCK_STREAM, libc::IPPROTO_TCP),
    (libc::SOCK_DGRAM, libc::IPPROTO_UDP),
    (libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
    (libc::SOCK_RAW, libc::IPPROTO_RAW),
];

/// A table that this kernel does not have is as good as empty.
fn or_none<T>(table: Result<Vec<T>, SysError>) -> anyhow::Result<Option<Vec<T>>> {
    match table {
        Ok(table) => Ok(Some(table)),
        Err(e) if matches!(e.errno, Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(None),
        Err(e) => Err(e).context("enumerate sockets"),
    }
}

impl Tables {
    fn open(pid: Pid, net: &File, here: bool) -> anyhow::Result<Self> {
        let diag = if here { SockDiag::here() } else { SockDiag::within(net.as_fd()) };
        let diag = diag.with_context(|| format!("network namespace of pid {pid}"))?;
        Ok(Self { pid, diag, rows: HashMap::new(), unix_names: HashMap::new(), dumps: 0 })
    }

    /// Asks for tables until all of `wanted` are known, or there are no more.
    fn find(&mut self, wanted: &HashSet<u64>) -> anyhow::Result<()> {
        let mut left: HashSet<u64> = wanted.clone();
        let mut done = |rows: &HashMap<u64, Row>| {
            left.retain(|id| !rows.contains_key(id));
            left.is_empty()
        };
        if done(&self.rows) {
            return Ok(());
        }
        self.dumps += 1;
        for socket in or_none(self.diag.unix())?.unwrap_or_default() {
            self.unix_names.insert(socket.id, shown(&socket.name));
            self.rows.insert(socket.id, Row::unix(&socket));
        }
        for (kind, protocol) in INET {
            for v6 in [false, true] {
                if done(&self.rows) {
                    return Ok(());
                }
                self.dumps += 1;
                let table = match or_none(self.diag.inet(v6, protocol))? {
                    Some(table) => table,
                    None if kind == libc::SOCK_RAW => self.proc_table(if v6 { "raw6" } else { "raw" }),
                    None => Vec::new(),
                };
                for socket in table.iter().filter(|socket| socket.id != 0) {
                    // The port of a raw socket is its protocol.
                    let protocol = if kind == libc::SOCK_RAW { socket.local.port().into() } else { protocol };
                    self.rows.insert(socket.id, Row::inet(socket, kind, protocol));
                }
            }
        }
        for (name, protocol) in [("icmp", libc::IPPROTO_ICMP), ("icmp6", libc::IPPROTO_ICMPV6)] {
            if done(&self.rows) {
                return Ok(());
            }
            for socket in self.proc_table(name) {
                self.rows.insert(socket.id, Row::inet(&socket, libc::SOCK_DGRAM, protocol));
            }
        }
        if done(&self.rows) {
            return Ok(());
        }
        self.dumps += 1;
        for socket in or_none(self.diag.netlink())?.unwrap_or_default() {
            let port = |port: u32| if port == 0 { String::new() } else { format!("port {port}") };
            let row = Row {
                domain: libc::AF_NETLINK,
                kind: socket.kind,
                protocol: socket.protocol,
                state: if socket.remote_port != 0 || socket.remote_group != 0 { ESTABLISHED } else { CLOSE },
                local: port(socket.port),
                peer: port(socket.remote_port),
                received: socket.rmem,
                unsent: socket.wmem,
                ..Row::default()
            };
            self.rows.insert(socket.id, row);
        }
        if done(&self.rows) {
            return Ok(());
        }
        self.dumps += 1;
        for socket in or_none(self.diag.packet())?.unwrap_or_default() {
            let row = Row {
                domain: libc::AF_PACKET,
                kind: socket.kind,
                protocol: socket.protocol.into(),
                state: CLOSE,
                local: if socket.interface == 0 { String::new() } else { format!("if{}", socket.interface) },
                received: socket.rmem,
                unsent: socket.wmem,
                ..Row::default()
            };
            self.rows.insert(socket.id, row);
        }
        Ok(())
    }

    /// `/proc/PID/net/NAME`; a file that is not there (no IPv6) or can't be read is an empty table.
    fn proc_table(&self, name: &str) -> Vec<InetSocket> {
        let text = fs::read(format!("/proc/{}/net/{name}", self.pid)).unwrap_or_default();
        let sockets = ckpt_proc::net::parse(&text).unwrap_or_default();
        let as_diag = |s: ckpt_proc::net::NetSocket| InetSocket {
            id: s.inode,
            protocol: 0,
            state: s.state,
            local: s.local,
            remote: s.remote,
            interface: 0,
            rqueue: s.rqueue,
            wqueue: s.wqueue,
            uid: s.uid,
            shutdown: None,
        };
        sockets.into_iter().map(as_diag).collect()
    }
}

/// A socket that is in no table: what its descriptor tells.
fn by_descriptor(pid: Pid, fd: TargetFd, id: u64) -> Option<Row> {
    let task = pidfd::open(pid).ok()?;
    let copy = pidfd::getfd(task.as_fd(), fd).ok()?;
    if nix::sys::stat::fstat(&copy).ok()?.st_ino != id {
        return None;
    }
    let option = |name| sock::option(copy.as_fd(), libc::SOL_SOCKET, name).ok();
    Some(Row {
        domain: option(libc::SO_DOMAIN)?,
        kind: option(libc::SO_TYPE)?,
        protocol: option(libc::SO_PROTOCOL)?,
        state: CLOSE,
        ..Row::default()
    })
}

/// The sockets of `tree`, each once.
///
/// # Errors
/// A descriptor table that can't be read, a network namespace that can't be entered, no sock_diag(7).
pub fn live(tree: &[Pid], allowed: &SkOptions) -> anyhow::Result<Vec<Listed>> {
    // In the order in which they are met.
    let mut order: Vec<u64> = Vec::new();
    let mut holders: HashMap<u64, Vec<(Pid, TargetFd)>> = HashMap::new();
    let mut namespaces: HashMap<u64, (Tables, bool)> = HashMap::new();
    let mut namespace_of: HashMap<u64, u64> = HashMap::new();
    let own = fs::metadata("/proc/self/ns/net").context("/proc/self/ns/net")?.ino();
    for &pid in tree {
        let net = File::open(format!("/proc/{pid}/ns/net")).with_context(|| format!("/proc/{pid}/ns/net"))?;
        let ns = net.metadata().context("a network namespace")?.ino();
        for (fd, id) in sockets_of(pid)? {
            if let Entry::Vacant(new) = namespaces.entry(ns) {
                new.insert((Tables::open(pid, &net, ns == own)?, ns == own));
            }
            let known = holders.entry(id).or_default();
            if known.is_empty() {
                order.push(id);
                namespace_of.insert(id, ns);
            }
            known.push((pid, fd));
        }
    }
    for (ns, (tables, _)) in &mut namespaces {
        let wanted = order.iter().copied().filter(|id| namespace_of.get(id) == Some(ns)).collect();
        tables.find(&wanted)?;
    }
    let mut names: HashMap<Pid, String> = HashMap::new();
    let mut listed = Vec::new();
    for id in order {
        let Some(holders) = holders.get(&id) else { continue };
        let Some(&(pid, fd)) = holders.first() else { continue };
        let Some((tables, here)) = namespace_of.get(&id).and_then(|ns| namespaces.get(ns)) else { continue };
        let Some(row) = tables.rows.get(&id).cloned().or_else(|| by_descriptor(pid, fd, id)) else {
            continue;
        };
        let kind = row.kind_name();
        let closed_by_peer = row.domain == libc::AF_UNIX && row.peer_id == Some(0);
        let peer_id = row.peer_id.filter(|&peer| peer != 0);
        let peer = peer_id.and_then(|peer| tables.unix_names.get(&peer)).cloned().unwrap_or(row.peer.clone());
        listed.push((
            Listed {
                id: Some(id),
                kind,
                state: match closed_by_peer {
                    true => "closed by peer".to_owned(),
                    // A datagram socket is called connected too if another one has connected to it.
                    false if row.domain == libc::AF_UNIX && row.state != LISTEN && row.peer_id.is_none() => {
                        "unconnected".to_owned()
                    }
                    false => state(kind, row.state).to_owned(),
                },
                holders: holders.clone(),
                comm: names.entry(pid).or_insert_with(|| comm(pid)).clone(),
                local: row.local.clone(),
                peer,
                peer_id,
                received: row.received.into(),
                unsent: row.unsent.into(),
                ..Listed::default()
            },
            row,
            (*here, tables),
        ));
    }
    join_peers(&mut listed, &holders);
    Ok(listed
        .into_iter()
        .map(|(mut socket, row, (here, _))| {
            socket.fate = fate(&socket, &row, here, allowed);
            socket
        })
        .collect())
}

/// The sockets that a process has open.
fn sockets_of(pid: Pid) -> anyhow::Result<Vec<(TargetFd, u64)>> {
    let mut found = Vec::new();
    for fd in descriptors(pid)? {
        let link = read_link(Path::new(&format!("/proc/{pid}/fd/{fd}"))).unwrap_or_default();
        let id = std::str::from_utf8(&link).ok().filter(|link| link.starts_with("socket:["));
        if let Some(id) = id.and_then(sock::parse_id) {
            found.push((fd, id.0));
        }
    }
    Ok(found)
}

/// Finds the other ends: by inode, or by their address, which they have the other way round; and who has them.
fn join_peers(listed: &mut [(Listed, Row, (bool, &Tables))], holders: &HashMap<u64, Vec<(Pid, TargetFd)>>) {
    let mut by_sides: HashMap<(i32, SocketAddr, SocketAddr), u64> = HashMap::new();
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let mut indexed: HashSet<Pid> = HashSet::new();
    for (_, row, (_, tables)) in listed.iter() {
        if row.sides.is_none() || !indexed.insert(tables.pid) {
            continue;
        }
        for (&id, other) in &tables.rows {
            if let Some((local, remote)) = other.sides.filter(|(_, remote)| remote.port() != 0) {
                by_sides.insert((other.protocol, canonical(local), canonical(remote)), id);
            }
        }
    }
    for (socket, row, _) in listed.iter_mut() {
        if let Some((local, remote)) = row.sides.filter(|(_, remote)| remote.port() != 0) {
            let far = by_sides.get(&(row.protocol, canonical(remote), canonical(local))).copied();
            socket.peer_id = far.filter(|far| Some(*far) != socket.id);
        }
    }
    let outside: HashSet<u64> = listed
        .iter()
        .filter_map(|(socket, ..)| socket.peer_id)
        .filter(|id| !holders.contains_key(id))
        .collect();
    let others = holders_of(&outside);
    for (socket, ..) in listed.iter_mut() {
        let Some(peer) = socket.peer_id else { continue };
        let inside = holders.get(&peer).and_then(|holders| holders.first());
        socket.peer_inside = inside.is_some();
        socket.peer_holder = inside.map(|&(pid, _)| (pid, comm(pid))).or_else(|| others.get(&peer).cloned());
    }
}

/// Somebody who has each of these open. One walk over /proc for all.
fn holders_of(ids: &HashSet<u64>) -> HashMap<u64, (Pid, String)> {
    let mut found = HashMap::new();
    if ids.is_empty() {
        return found;
    }
    let own = Pid(std::process::id().cast_signed());
    let id = |link: &[u8]| {
        let text = std::str::from_utf8(link).ok().filter(|link| link.starts_with("socket:["))?;
        sock::parse_id(text).map(|id| id.0).filter(|id| ids.contains(id))
    };
    for (pid, comm, _, link) in find_holders(|link| id(link).is_some()) {
        if let Some(id) = id(&link).filter(|_| pid != own) {
            found.entry(id).or_insert((pid, comm));
        }
    }
    found
}

/// What a checkpoint would do with it.
fn fate(socket: &Listed, row: &Row, here: bool, allowed: &SkOptions) -> String {
    let stub = SocketStub {
        domain: row.domain.unsigned_abs(),
        r#type: row.kind.unsigned_abs(),
        protocol: row.protocol.unsigned_abs(),
        ..SocketStub::default()
    };
    if !socket::is_supported(&stub) {
        return "no: not supported".to_owned();
    }
    if !here {
        return "only by tools in its network namespace (nsenter -n)".to_owned();
    }
    if row.domain == libc::AF_UNIX {
        return unix_fate(socket, row, allowed);
    }
    let connected = row.protocol == libc::IPPROTO_TCP
        && row.kind == libc::SOCK_STREAM
        && !matches!(row.state, CLOSE | LISTEN);
    match (connected, allowed.tcp.close, socket.peer_inside || allowed.tcp.established) {
        (true, true, _) => "yes, closed".to_owned(),
        (true, false, false) => "needs --tcp-established or --tcp-close".to_owned(),
        _ => "yes".to_owned(),
    }
}

fn unix_fate(socket: &Listed, row: &Row, allowed: &SkOptions) -> String {
    let Some(id) = socket.id else { return "yes".to_owned() };
    let [local, peer] =
        [&socket.local, &socket.peer].map(|n| unix::parse_name(n.as_bytes()).unwrap_or_default());
    let peers: Vec<Pid> = socket.peer_holder.iter().map(|(pid, _)| *pid).collect();
    let marked = allowed.external.iter().any(|external| external.means(id, [&local, &peer], &peers));
    let unread = socket.received > 0 || (socket.unsent > 0 && row.kind != libc::SOCK_DGRAM);
    if row.state == LISTEN || socket.peer_id.is_none() || socket.peer_inside {
        "yes".to_owned()
    } else if marked && unread && allowed.queued == Queued::Refuse {
        "needs --queued=drop or --queued=keep".to_owned()
    } else if marked {
        "yes, external".to_owned()
    } else {
        format!("needs --external {id}[:PATH]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn own() -> Vec<Pid> {
        vec![Pid(std::process::id().cast_signed())]
    }

    fn id(fd: impl AsFd) -> Option<u64> {
        Some(nix::sys::stat::fstat(fd).unwrap().st_ino)
    }

    #[test]
    fn sockets_of_all_families_are_found() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
        let make = |family, kind, protocol: Option<SockProtocol>| {
            socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap()
        };
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut &client, b"four").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let bare = make(AddressFamily::Inet, SockType::Stream, None);
        let netlink = make(AddressFamily::Netlink, SockType::Raw, Some(SockProtocol::NetlinkRoute));
        let listed = live(&own(), &SkOptions::default()).unwrap();
        let find = |id: Option<u64>| listed.iter().find(|s| s.id == id).unwrap_or_else(|| panic!("{id:?}"));
        assert_eq!((find(id(&a)).kind, &find(id(&a)).state[..]), ("unix-stream", "connected"));
        let listening = find(id(&listener));
        assert_eq!(
            (listening.kind, &listening.state[..], &listening.local),
            ("tcp", "listening", &address.to_string())
        );
        let served = find(id(&server));
        assert_eq!((served.received, served.peer_id, served.peer_inside), (4, id(&client), true));
        assert_eq!((find(id(&udp)).kind, &find(id(&udp)).state[..]), ("udp6", "unconnected"));
        assert_eq!((find(id(&bare)).kind, &find(id(&bare)).state[..]), ("tcp", "closed"));
        assert_eq!(find(id(&netlink)).kind, "netlink");
        if nix::unistd::geteuid().is_root() {
            let raw = make(AddressFamily::Inet, SockType::Raw, Some(SockProtocol::Icmp));
            let packet = make(AddressFamily::Packet, SockType::Raw, None);
            let listed = live(&own(), &SkOptions::default()).unwrap();
            let kind = |wanted| listed.iter().find(|s| s.id == wanted).map(|s| s.kind);
            assert_eq!((kind(id(&raw)), kind(id(&packet))), (Some("raw"), Some("packet")));
        }
    }

    #[test]
    fn a_table_is_read_once_and_only_if_needed() {
        let net = File::open("/proc/self/ns/net").unwrap();
        let pid = own()[0];
        let pairs: Vec<_> = (0..50).map(|_| std::os::unix::net::UnixStream::pair().unwrap()).collect();
        let ids: HashSet<u64> = pairs.iter().filter_map(|(a, _)| id(a)).collect();
        let mut tables = Tables::open(pid, &net, true).unwrap();
        tables.find(&ids).unwrap();
        tables.find(&ids).unwrap();
        assert_eq!(tables.dumps, 1);
        // Unix, four protocols of two versions, netlink, packet.
        tables.find(&HashSet::from([1])).unwrap();
        assert_eq!(tables.dumps, 1 + 1 + 8 + 2);
    }
}
