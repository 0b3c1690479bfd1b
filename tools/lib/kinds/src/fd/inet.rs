//! What sockets of the internet families have in common (ip(7), ipv6(7)): addresses, and their entry.
//!
//! CRIU has one message for all of them, `inet_sk_entry`; what a protocol has besides is its
//! module's business ([`super::tcp`]). A v6 socket that talks v4 has v4-mapped addresses
//! everywhere: in the kernel's tables, in the images, and in bind(2) and connect(2).

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use anyhow::{Context, bail};
use ckpt_proto::types::{FdTypes, FileEntry, InetSkEntry};
use ckpt_sys::{
    FileId, Refused,
    diag::{InetSocket, SockDiag},
    sock,
};
use nix::{
    errno::Errno,
    sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage},
};

use super::{
    Descriptor, FileTable, Opening, multicast, raw,
    socket::{self, Completion},
    sockopt::{self, Class, Options, When},
    tcp, udp,
};
use crate::Sink;

/// ckpt-scan's part: a stub, which ckpt-sk completes.
pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    socket::dump(d, id, FdTypes::Inetsk)
}

/// The kernel's table of the sockets of a protocol, of both families, by inode; and those that nobody holds.
pub(super) fn table(protocol: i32) -> anyhow::Result<(HashMap<u64, InetSocket>, Vec<InetSocket>)> {
    let diag = SockDiag::here()?;
    let mut held = HashMap::new();
    let mut loose = Vec::new();
    for v6 in [false, true] {
        let all = match diag.inet(v6, protocol) {
            Ok(all) => all,
            // A kernel without IPv6 has no sockets of it either.
            Err(e) if v6 && e.errno == Errno::ENOENT => Vec::new(),
            Err(e) => return Err(e).context("enumerate inet sockets"),
        };
        for socket in all {
            match socket.id {
                0 => loose.push(socket),
                id => {
                    held.insert(id, socket);
                }
            }
        }
    }
    Ok((held, loose))
}

/// The fields that all inet sockets have. `what` is the socket's kind and inode for messages. Sockets that are in no table (they have no port) have no `diag`.
pub(super) fn entry(
    socket: &socket::Socket<'_>,
    diag: Option<&InetSocket>,
    what: &str,
    completion: Completion<'_>,
) -> anyhow::Result<InetSkEntry> {
    let copy = socket.copy()?;
    let fd = copy.as_fd();
    let stub = socket.stub;
    let v6 = is_v6(stub.domain);
    let none = unspecified(v6);
    let local = local(fd)?.unwrap_or(none);
    let remote = diag.map_or(none, |d| d.remote);
    let mut isk = InetSkEntry {
        id: socket.file_id,
        ino: socket.ino()?,
        family: stub.domain,
        r#type: stub.r#type,
        proto: stub.protocol,
        state: diag.map_or(CLOSE, |d| d.state).into(),
        src_port: local.port().into(),
        dst_port: remote.port().into(),
        flags: stub.flags,
        backlog: 0,
        src_addr: words(local.ip()),
        dst_addr: words(remote.ip()),
        fown: stub.fown,
        ifname: scope_name(local)?,
        ns_id: (completion.net_ns)(socket.pid()),
        shutdown: socket::shutdown_entry(diag.and_then(|d| d.shutdown).map_or_else(|| shut(fd), Ok)?),
        ..InetSkEntry::default()
    };
    sockopt::dump(socket, what, completion.defaults)?.store_inet(&mut isk);
    Ok(isk)
}

/// The entry of a socket that can be a member of multicast groups; `groups` are those of the network namespace.
pub(super) fn datagram_entry(
    socket: &socket::Socket<'_>,
    diag: Option<&InetSocket>,
    what: &str,
    groups: &[multicast::Joined],
    completion: Completion<'_>,
) -> anyhow::Result<InetSkEntry> {
    let mut isk = entry(socket, diag, what, completion)?;
    isk.ckpt_groups = multicast::dump(socket.copy()?.as_fd(), is_v6(isk.family), groups)?;
    Ok(isk)
}

/// `state`: connected.
pub(super) const ESTABLISHED: u8 = 1;
/// `state`: neither connected nor listening.
pub(super) const CLOSE: u8 = 7;

pub(super) fn is_v6(family: u32) -> bool {
    family == libc::AF_INET6.unsigned_abs()
}

fn unspecified(v6: bool) -> SocketAddr {
    let ip = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    SocketAddr::new(ip, 0)
}

/// getsockname(2), with the scope of a link-local address.
pub(super) fn local(fd: BorrowedFd<'_>) -> anyhow::Result<Option<SocketAddr>> {
    let name: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd()).context("getsockname")?;
    Ok(socket_address(&name))
}

/// An address that nix has read.
pub(super) fn socket_address(name: &SockaddrStorage) -> Option<SocketAddr> {
    match (name.as_sockaddr_in(), name.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::from((v4.ip(), v4.port()))),
        (_, Some(v6)) => Some(SocketAddrV6::new(v6.ip(), v6.port(), 0, v6.scope_id()).into()),
        _ => None,
    }
}

/// What is shut down (1: reading, 2: writing), as far as poll(2) tells: of a socket that can only not write it
/// does not.
fn shut(fd: BorrowedFd<'_>) -> anyhow::Result<u8> {
    let happened = sock::poll_now(fd, libc::POLLRDHUP)?;
    Ok(match (happened & libc::POLLHUP != 0, happened & libc::POLLRDHUP != 0) {
        (true, true) => 3,
        (_, true) => 1,
        _ => 0,
    })
}

/// The interface whose link a link-local address is meant on.
fn scope_name(address: SocketAddr) -> anyhow::Result<Option<String>> {
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            let name = nix::net::if_::if_indextoname(v6.scope_id()).context("if_indextoname")?;
            Ok(Some(name.to_string_lossy().into_owned()))
        }
        _ => Ok(None),
    }
}

/// An address in words of four bytes, each as it lies in memory.
fn words(ip: IpAddr) -> Vec<u32> {
    let octets = match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    octets.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
}

/// The other way round; port and scope are added.
fn address(isk: &InetSkEntry, words: &[u32], port: u32) -> anyhow::Result<SocketAddr> {
    let ip = match (is_v6(isk.family), words) {
        (false, &[word, ..]) => IpAddr::from(word.to_ne_bytes()),
        (true, &[a, b, c, d]) => {
            let mut octets = [0; 16];
            for (place, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip([a, b, c, d]) {
                *place = word.to_ne_bytes();
            }
            IpAddr::from(octets)
        }
        (false, []) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        (true, []) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => bail!("inet socket {}: an address of {} words", isk.ino, words.len()),
    };
    let port = u16::try_from(port).with_context(|| format!("inet socket {}: port {port}", isk.ino))?;
    Ok(match ip {
        IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80 => {
            // Connecting to such an address has bound the socket to its interface.
            let name = isk.ifname.as_ref().or(isk.opts.so_bound_dev.as_ref()).map_or("", String::as_str);
            let scope = nix::net::if_::if_nametoindex(name)
                .with_context(|| format!("inet socket {}: interface {name:?} of {v6}", isk.ino))?;
            SocketAddrV6::new(v6, port, 0, scope).into()
        }
        ip => SocketAddr::new(ip, port),
    })
}

/// Where a socket was bound to.
///
/// # Errors
/// A malformed entry.
pub(super) fn source(isk: &InetSkEntry) -> anyhow::Result<SocketAddr> {
    address(isk, &isk.src_addr, isk.src_port)
}

/// Where it was connected to.
///
/// # Errors
/// A malformed entry.
pub(super) fn destination(isk: &InetSkEntry) -> anyhow::Result<SocketAddr> {
    address(isk, &isk.dst_addr, isk.dst_port)
}

/// Makes a socket of an entry's family, type and protocol, with the options that bind(2) looks at.
pub(super) fn new_socket(isk: &InetSkEntry, what: &str) -> anyhow::Result<OwnedFd> {
    let family = if is_v6(isk.family) { libc::AF_INET6 } else { libc::AF_INET };
    let kind = match i32::try_from(isk.r#type) {
        Ok(kind @ (libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_RAW)) => kind,
        _ => bail!("inet socket {}: unknown type {}", isk.ino, isk.r#type),
    };
    let protocol = i32::try_from(isk.proto).context("a socket's protocol")?;
    let fd = match sock::socket(family, kind | libc::SOCK_CLOEXEC, protocol) {
        Err(e) if e.errno == Errno::EPERM => {
            return Err(Refused::new(what, "making it needs CAP_NET_RAW").into());
        }
        Err(e) if e.errno == Errno::EACCES => {
            let reason = "making it is allowed to the groups in net.ipv4.ping_group_range only";
            return Err(Refused::new(what, reason).into());
        }
        fd => fd?,
    };
    let class = Class::of_inet(isk);
    sockopt::restore(fd.as_fd(), what, class, &Options::of_inet(isk), When::BeforeBind)?;
    Ok(fd)
}

/// Sets all options that wait until a socket is bound, connected and filled.
pub(super) fn finish(fd: BorrowedFd<'_>, isk: &InetSkEntry, what: &str) -> anyhow::Result<()> {
    let options = Options::of_inet(isk);
    for when in [When::Later, When::Last] {
        sockopt::restore(fd, what, Class::of_inet(isk), &options, when)?;
    }
    Ok(())
}

/// Brings a datagram socket, bound and filled, into the state that it was in, and keeps it.
pub(super) fn keep_datagram(
    opening: &mut Opening<'_>,
    fd: OwnedFd,
    isk: &InetSkEntry,
    what: &str,
) -> anyhow::Result<()> {
    let name = || what.to_owned();
    if isk.state == u32::from(ESTABLISHED) {
        connect(fd.as_fd(), destination(isk)?).with_context(name)?;
    }
    multicast::restore(fd.as_fd(), isk).with_context(name)?;
    finish(fd.as_fd(), isk, what)?;
    socket::shut_down(fd.as_fd(), isk.shutdown).with_context(name)?;
    Opening::set_flags(fd.as_fd(), isk.flags)?;
    opening.keep(FileId(isk.id), fd)
}

/// The 4 or 16 bytes of an address.
pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The address of 4 or 16 bytes.
pub(super) fn address_of(bytes: &[u8]) -> anyhow::Result<IpAddr> {
    if let Some(v4) = bytes.first_chunk::<4>().filter(|_| bytes.len() == 4) {
        return Ok(IpAddr::from(*v4));
    }
    let v6: [u8; 16] = bytes.try_into().with_context(|| format!("an address of {} bytes", bytes.len()))?;
    Ok(IpAddr::from(v6))
}

/// The internet checksum (RFC 1071) over all parts, of which each but the last has an even length.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        let (pairs, odd) = part.as_chunks::<2>();
        sum += pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum::<u64>();
        sum += odd.iter().map(|&byte| u64::from(byte) << 8).sum::<u64>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// An address as bind(2) and connect(2) take it.
pub(super) fn sockaddr(address: SocketAddr) -> Box<dyn SockaddrLike> {
    match address {
        SocketAddr::V4(v4) => Box::new(SockaddrIn::from(v4)),
        SocketAddr::V6(v6) => Box::new(SockaddrIn6::from(v6)),
    }
}

/// The closed connections that the kernel remembers at a TCP port, if nobody else has that.
fn remembered(fd: BorrowedFd<'_>, address: SocketAddr) -> Vec<InetSocket> {
    const TIME_WAIT: u8 = 6;
    let tcp = sock::option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL).is_ok_and(|p| p == libc::IPPROTO_TCP);
    let here = |s: &&InetSocket| s.local.port() == address.port();
    let Some((open, loose)) = Some(()).filter(|()| tcp).and_then(|()| table(libc::IPPROTO_TCP).ok()) else {
        return Vec::new();
    };
    let all: Vec<InetSocket> = loose.iter().filter(here).copied().collect();
    let only = !open.values().any(|s| here(&s)) && all.iter().all(|s| s.state == TIME_WAIT);
    if only { all } else { Vec::new() }
}

/// Binds `fd`, and lets the kernel forget closed connections (TIME_WAIT) that are in the way. They are those of the original,
/// which had the port without SO_REUSEADDR; setting that now would be of no use, for it counts only if they had it
/// too (inet_csk_bind_conflict in net/ipv4/inet_connection_sock.c), and repair mode, which binds regardless,
/// can't be left by a listener. A late packet of theirs is answered with RST instead of with silence.
fn bind_anyway(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<(), Errno> {
    let bind = || nix::sys::socket::bind(fd.as_raw_fd(), &*sockaddr(address));
    let result = bind();
    if result != Err(Errno::EADDRINUSE) {
        return result;
    }
    let in_the_way = remembered(fd, address);
    let Some(diag) = SockDiag::here().ok().filter(|_| !in_the_way.is_empty()) else { return result };
    if in_the_way.iter().all(|socket| diag.destroy(socket).is_ok()) { bind() } else { result }
}

/// Binds `fd`. An address in use is the most likely failure of all, and says so.
pub(super) fn bind(fd: BorrowedFd<'_>, what: &str, address: SocketAddr) -> anyhow::Result<()> {
    match bind_anyway(fd, address) {
        Ok(()) => Ok(()),
        Err(Errno::EADDRINUSE) if !remembered(fd, address).is_empty() => {
            let reason = format!(
                "{address} is held by connections that its original has closed (TIME_WAIT), as it had not set SO_REUSEADDR"
            );
            let advice = "restore in a minute, or on another port: sk-rewrite --port OLD=NEW";
            Err(Refused::new(what.to_owned(), reason).advise(advice).into())
        }
        Err(Errno::EADDRINUSE) => {
            let reason = format!("{address} is in use by another process");
            Err(Refused::new(what.to_owned(), reason).advise("end it; ss -tulpn shows who it is").into())
        }
        Err(Errno::EADDRNOTAVAIL) => {
            let reason = format!("no interface here has the address {}", address.ip());
            let advice = "add it (ip address add), or rewrite it: sk-rewrite --addr OLD=NEW";
            Err(Refused::new(what.to_owned(), reason).advise(advice).into())
        }
        Err(errno) => Err(errno).with_context(|| format!("{what}: bind to {address}")),
    }
}

/// Connects `fd` (datagram sockets: notes the address, and asks for a route to it).
pub(super) fn connect(fd: BorrowedFd<'_>, address: SocketAddr) -> anyhow::Result<()> {
    nix::sys::socket::connect(fd.as_raw_fd(), &*sockaddr(address))
        .with_context(|| format!("connect to {address}"))
}

/// ckpt-restore's part: one row of [`super::KINDS`] brings the sockets of all protocols here.
pub(super) fn restore(opening: &mut Opening<'_>, files: &[FileEntry]) -> anyhow::Result<()> {
    let (mut tcp, mut udp, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for file in files {
        let isk = socket::of(file, file.isk.as_ref(), "inet socket")?;
        match (i32::try_from(isk.r#type), i32::try_from(isk.proto)) {
            (Ok(libc::SOCK_STREAM), Ok(libc::IPPROTO_TCP)) => tcp.push(isk),
            (Ok(libc::SOCK_DGRAM), Ok(libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE)) => udp.push(isk),
            (Ok(libc::SOCK_DGRAM), Ok(libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6))
            | (Ok(libc::SOCK_RAW), _) => {
                raw.push(isk);
            }
            _ => {
                let reason = format!(
                    "sockets of type {} and protocol {} can't be restored yet",
                    isk.r#type, isk.proto
                );
                return Err(Refused::new(format!("inet socket {}", isk.ino), reason).into());
            }
        }
    }
    tcp::restore(opening, &tcp)?;
    udp::restore(opening, &udp)?;
    raw::restore(opening, &raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_as_words() {
        for (text, family) in [
            ("127.0.0.1:80", libc::AF_INET),
            ("[2001:db8::7]:443", libc::AF_INET6),
            ("[::ffff:10.0.0.1]:1", libc::AF_INET6),
        ] {
            let address: SocketAddr = text.parse().unwrap();
            let isk = InetSkEntry {
                family: family.unsigned_abs(),
                src_addr: words(address.ip()),
                src_port: address.port().into(),
                ..InetSkEntry::default()
            };
            assert_eq!(source(&isk).unwrap(), address);
        }
        // As CRIU has it: 127.0.0.1 is one word, and reads 0x0100007f on a little-endian machine.
        assert_eq!(words([127, 0, 0, 1].into()), [u32::from_ne_bytes([127, 0, 0, 1])]);
        let wrong = InetSkEntry { family: 10, src_addr: vec![1, 2], ..InetSkEntry::default() };
        assert!(source(&wrong).is_err());
        assert!(source(&InetSkEntry { src_port: 1 << 16, ..InetSkEntry::default() }).is_err());
    }
}
