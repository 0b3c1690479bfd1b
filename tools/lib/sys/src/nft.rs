//! The network lock: nf_tables rules that drop the packets of given TCP connections (nft(8)).
//!
//! While one end of a connection is being read, or does not exist for a while, none of its packets may
//! pass: the kernel would acknowledge data that no image holds, or answer a peer's packet with RST.
//! Rules are made through netlink (NETLINK_NETFILTER), so no program is needed at run time:
//!
//! ```text
//! table inet NAME
//!   set v4, v6      remote address . remote port . local address . local port
//!   chain input     hook input,  priority -350: (source, destination) in set, mark not ours: drop
//!   chain output    hook output, priority -350: (destination, source) in set, mark not ours: drop
//! ```
//!
//! A set is a hash table: its cost does not grow with the number of connections. The priority is
//! before connection tracking, which so never sees what is dropped. Packets with [`INJECTED`] as mark
//! pass: they are made up by ckpt-restore to put a connection into a state that only a peer's
//! packet can bring about.
//!
//! **A lock that can't be left behind.** A table with `NFT_TABLE_F_OWNER` (Linux 5.12) belongs to a netlink
//! socket, and the kernel removes it when that is closed: whatever ends the tool ends the lock
//! ([`NetLock::hold`]). A lock that has to last, from the death of a checkpointed tree to its
//! restore, is an ordinary table with a name that the images tell ([`NetLock::leave`], [`remove`]).
//!
//! The batch format is linux/netfilter/nf_tables.h's. Of the crates that know it, rustables is under the GPL and
//! the others are bindings of libnftnl, which is C; what is needed here is four messages.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use crate::{SysError, sock};

/// `SO_MARK` of packets that pass the lock.
pub const INJECTED: u32 = 0x434b_5054;

/// Linux' limit for names of tables is far above.
const PREFIX: &str = "ckpt-";
const SETS: [(&str, bool); 2] = [("v4", false), ("v6", true)];
/// Elements in one message; attribute lengths have 16 bits.
const ELEMENTS: usize = 256;

/// A TCP connection, by the addresses that are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

impl Connection {
    /// v4-mapped addresses become v4.
    #[must_use]
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self { local: plain(local), remote: plain(remote) }
    }

    /// As the other end sees it.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { local: self.remote, remote: self.local }
    }

    /// Its key in the set.
    fn key(&self) -> Vec<u8> {
        let mut key = Vec::with_capacity(40);
        for side in [self.remote, self.local] {
            match side.ip() {
                IpAddr::V4(ip) => key.extend(ip.octets()),
                IpAddr::V6(ip) => key.extend(ip.octets()),
            }
            key.extend(side.port().to_be_bytes());
            key.extend([0; 2]);
        }
        key
    }
}

/// A lock that lasts as long as this value, and not longer than this process.
#[derive(Debug)]
pub struct NetLock {
    /// The owner of the table.
    netlink: OwnedFd,
    name: String,
}

/// A name for a table that no other has.
///
/// # Errors
/// /dev/urandom can't be read.
pub fn new_name() -> Result<String, SysError> {
    use std::io::Read;
    let mut random = [0; 8];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut random)).map_err(|e| {
        SysError::new("read", "/dev/urandom", Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
    })?;
    Ok(format!("{PREFIX}{:016x}", u64::from_ne_bytes(random)))
}

impl NetLock {
    /// Stops the packets of `connections` in this network namespace. `name` is free to choose.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN; EPROTONOSUPPORT or EOPNOTSUPP: no nf_tables in this kernel.
    pub fn hold(name: &str, connections: &BTreeSet<Connection>) -> Result<Self, SysError> {
        let netlink = open()?;
        transact(&netlink, name, &table(name, true, connections))?;
        Ok(Self { netlink, name: name.to_owned() })
    }

    /// Ends the lock although other processes may have copies of this value's descriptor.
    ///
    /// # Errors
    /// ENOENT: it has ended.
    pub fn release(&self) -> Result<(), SysError> {
        transact(&self.netlink, &self.name, &[message(NFT_MSG_DELTABLE, 0, &string(1, &self.name))])
    }

    /// The same, but for good: until [`remove`].
    ///
    /// # Errors
    /// As [`NetLock::hold`].
    pub fn leave(name: &str, connections: &BTreeSet<Connection>) -> Result<(), SysError> {
        transact(&open()?, name, &table(name, false, connections))
    }
}

/// Removes the table of [`NetLock::leave`]; whether it was there. A name that this module would not
/// give is nobody's.
///
/// # Errors
/// EPERM.
pub fn remove(name: &str) -> Result<bool, SysError> {
    if !name.starts_with(PREFIX) {
        return Ok(false);
    }
    let delete = vec![message(NFT_MSG_DELTABLE, 0, &string(1, name))];
    match transact(&open()?, name, &delete) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == Errno::ENOENT => Ok(false),
        Err(e) => Err(e),
    }
}

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_APPEND: u16 = 0x800;
const NFPROTO_INET: u8 = 1;

fn open() -> Result<OwnedFd, SysError> {
    socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
        .map_err(|errno| SysError::new("socket", "NETLINK_NETFILTER", errno))
}

/// Sends `messages` as one batch: all of them take effect, or none.
fn transact(netlink: &OwnedFd, name: &str, messages: &[Vec<u8>]) -> Result<(), SysError> {
    let failed = |call, errno| SysError::new(call, format!("nf_tables table {name}"), errno);
    let mut batch = header(NFNL_MSG_BATCH_BEGIN, 0, 0, NFNL_SUBSYS_NFTABLES, &[]);
    for message in messages {
        batch.extend_from_slice(message);
    }
    batch.extend(header(NFNL_MSG_BATCH_END, 0, 0, NFNL_SUBSYS_NFTABLES, &[]));
    sock::make_room(std::os::fd::AsFd::as_fd(netlink), batch.len().saturating_mul(2));
    send(netlink.as_raw_fd(), &batch, MsgFlags::empty()).map_err(|errno| failed("send", errno))?;
    // The kernel works on a batch while it is being sent: errors, and nothing else, are there by now.
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(n) => n,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(failed("recv", errno)),
        };
        if let Some(errno) = first_error(buffer.get(..n).unwrap_or_default()) {
            return Err(failed("nf_tables", errno));
        }
    }
}

/// The first error in a datagram of answers.
fn first_error(mut bytes: &[u8]) -> Option<Errno> {
    const NLMSG_ERROR: u16 = 2;
    let word = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    while let (Some(len), Some(kind)) = (word(bytes, 0), bytes.get(4..6)) {
        if u16::from_ne_bytes([kind[0], kind[1]]) == NLMSG_ERROR {
            match word(bytes, 16).map(u32::cast_signed) {
                Some(0) => {}
                errno => return Some(Errno::from_raw(errno.unwrap_or(-libc::EBADMSG).saturating_neg())),
            }
        }
        let len = usize::try_from(len).ok().filter(|&len| len >= 16)?;
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
    None
}

/// nlmsghdr and nfgenmsg before `attributes`.
fn header(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    let len = u32::try_from(20 + attributes.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(20 + attributes.len());
    message.extend(len.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend_from_slice(attributes);
    message
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    header((NFNL_SUBSYS_NFTABLES << 8) | kind, flags, NFPROTO_INET, 0, attributes)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut attribute = Vec::with_capacity(len.next_multiple_of(4));
    attribute.extend(u16::try_from(len).unwrap_or(u16::MAX).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend_from_slice(value);
    attribute.resize(len.next_multiple_of(4), 0);
    attribute
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    const NLA_F_NESTED: u16 = 0x8000;
    attribute(kind | NLA_F_NESTED, &parts.concat())
}

fn string(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

fn number(kind: u16, n: u32) -> Vec<u8> {
    attribute(kind, &n.to_be_bytes())
}

/// Everything that makes the table.
fn table(name: &str, owned: bool, connections: &BTreeSet<Connection>) -> Vec<Vec<u8>> {
    const NFT_TABLE_F_OWNER: u32 = 2;
    const NF_INET_LOCAL_IN: u32 = 1;
    const NF_INET_LOCAL_OUT: u32 = 3;
    const PRIORITY: i32 = -350;
    let create = NLM_F_CREATE | NLM_F_EXCL;
    let flags = if owned { NFT_TABLE_F_OWNER } else { 0 };
    let mut messages = vec![message(NFT_MSG_NEWTABLE, create, &[string(1, name), number(2, flags)].concat())];
    for (id, (set, v6)) in (1..).zip(SETS) {
        // What nft(8) shows keys as: six bits each for the types of the four parts.
        const INET_SERVICE: u32 = 13;
        let address = if v6 { 8 } else { 7 };
        let shown = [address, INET_SERVICE, address, INET_SERVICE].iter().fold(0, |all, t| (all << 6) | t);
        let attributes = [
            string(1, name),
            string(2, set),
            number(3, 0),
            number(4, shown),
            number(5, if v6 { 40 } else { 16 }),
            number(10, id),
        ];
        messages.push(message(NFT_MSG_NEWSET, create, &attributes.concat()));
        let keys: Vec<_> =
            connections.iter().filter(|c| c.local.is_ipv6() == v6).map(Connection::key).collect();
        for keys in keys.chunks(ELEMENTS) {
            let element = |key: &Vec<u8>| nested(1, &[nested(1, &[attribute(1, key)])]);
            let elements: Vec<_> = keys.iter().map(element).collect();
            let attributes = [string(1, name), string(2, set), nested(3, &elements)];
            messages.push(message(NFT_MSG_NEWSETELEM, NLM_F_CREATE, &attributes.concat()));
        }
    }
    for (chain, hook, incoming) in [("input", NF_INET_LOCAL_IN, true), ("output", NF_INET_LOCAL_OUT, false)] {
        let hook = [number(1, hook), number(2, PRIORITY.cast_unsigned())];
        let attributes = [string(1, name), string(3, chain), nested(4, &hook), string(7, "filter")];
        messages.push(message(NFT_MSG_NEWCHAIN, create, &attributes.concat()));
        for (set, v6) in SETS {
            let attributes = [string(1, name), string(2, chain), nested(4, &rule(set, v6, incoming))];
            messages.push(message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, &attributes.concat()));
        }
    }
    messages
}

/// The expressions of a rule, on registers of four bytes.
fn rule(set: &str, v6: bool, incoming: bool) -> Vec<Vec<u8>> {
    const NFT_META_MARK: u32 = 3;
    const NFT_META_NFPROTO: u32 = 15;
    const NFT_META_L4PROTO: u32 = 16;
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    const EQ: u32 = 0;
    const NEQ: u32 = 1;
    const NFT_REG32_00: u32 = 8;
    let expression = |name: &str, data: &[Vec<u8>]| nested(1, &[string(1, name), nested(2, data)]);
    let meta = |key| expression("meta", &[number(1, NFT_REG32_00), number(2, key)]);
    let compare = |op, value: &[u8]| {
        expression("cmp", &[number(1, NFT_REG32_00), number(2, op), nested(3, &[attribute(1, value)])])
    };
    let load = |register, base, offset, len| {
        let data = [number(1, register), number(2, base), number(3, offset), number(4, len)];
        expression("payload", &data)
    };
    // Offsets of source and destination, length, number of registers.
    let (source, destination, len, words) = if v6 { (8, 24, 16, 4) } else { (12, 16, 4, 1) };
    let sides = if incoming { [(source, 0), (destination, 2)] } else { [(destination, 2), (source, 0)] };
    let proto = if v6 { 10 } else { 2 };
    let mut expressions = vec![
        meta(NFT_META_NFPROTO),
        compare(EQ, &[proto]),
        meta(NFT_META_L4PROTO),
        compare(EQ, &[6]),
        meta(NFT_META_MARK),
        compare(NEQ, &INJECTED.to_ne_bytes()),
    ];
    let mut register = NFT_REG32_00;
    for (address, port) in sides {
        expressions.push(load(register, NETWORK, address, len));
        expressions.push(load(register + words, TRANSPORT, port, 2));
        register += words + 1;
    }
    expressions.push(expression("lookup", &[string(1, set), number(2, NFT_REG32_00)]));
    // Register 0 is the verdict, NF_DROP 0.
    let verdict = nested(2, &[nested(2, &[number(1, 0)])]);
    expressions.push(expression("immediate", &[number(1, 0), verdict]));
    expressions
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    /// Runs in a network namespace of its own; false where that is not allowed.
    fn in_own_network(work: impl FnOnce() + Send + 'static) -> bool {
        if !nix::unistd::geteuid().is_root() {
            return false;
        }
        let run = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.unwrap().success());
            work();
        };
        std::thread::spawn(run).join().unwrap();
        true
    }

    fn pair(address: &str) -> (TcpStream, TcpStream, BTreeSet<Connection>) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let connection = Connection::new(client.local_addr().unwrap(), client.peer_addr().unwrap());
        server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        (client, server, BTreeSet::from([connection, connection.reversed()]))
    }

    fn blocked(client: &mut TcpStream, server: &mut TcpStream) -> bool {
        client.write_all(b"x").unwrap();
        match server.read(&mut [0; 8]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == ErrorKind::WouldBlock,
        }
    }

    #[test]
    fn lock_stops_one_connection_and_ends_with_its_owner() {
        in_own_network(|| {
            for address in ["127.0.0.1:0", "[::1]:0"] {
                let (mut client, mut server, connection) = pair(address);
                let (mut other, mut other_server, _) = pair(address);
                assert!(!blocked(&mut client, &mut server));
                let lock = NetLock::hold(&new_name().unwrap(), &connection).unwrap();
                assert!(blocked(&mut client, &mut server), "{address}");
                assert!(!blocked(&mut other, &mut other_server), "{address}");
                drop(lock);
                server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                assert!(!blocked(&mut client, &mut server), "{address}: sent again, and received");
            }
        });
    }

    #[test]
    fn lock_that_is_left_behind_is_removed_by_name() {
        in_own_network(|| {
            let (mut client, mut server, connection) = pair("127.0.0.1:0");
            let name = new_name().unwrap();
            NetLock::leave(&name, &connection).unwrap();
            assert!(blocked(&mut client, &mut server));
            assert!(NetLock::leave(&name, &connection).is_err(), "the name is taken");
            assert!(remove(&name).unwrap());
            assert!(!remove(&name).unwrap());
            assert!(!remove("filter").unwrap());
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert!(!blocked(&mut client, &mut server));
        });
    }

    #[test]
    fn many_connections_fit_into_one_table() {
        in_own_network(|| {
            let remote: SocketAddr = "192.0.2.1:443".parse().unwrap();
            let all =
                (1..20_000).map(|port| Connection::new(SocketAddr::new(remote.ip(), port), remote)).collect();
            drop(NetLock::hold(&new_name().unwrap(), &all).unwrap());
        });
    }

    #[test]
    fn damaged_answers_are_no_errors_of_ours() {
        for bytes in [&[][..], &[1], &[255, 255, 255, 255, 2, 0], &[0, 0, 0, 0, 3, 0, 0, 0]] {
            assert!(first_error(bytes).is_none_or(|e| e == Errno::EBADMSG));
        }
    }
}
