//! The kernel's tables of sockets (sock_diag(7)), and entering a network namespace to read them.
//!
//! A table comes by one netlink dump for all sockets of a family in a network namespace. The kernel
//! answers questions for one socket too, but for unix, packet and netlink sockets it walks the same table
//! for each, and for inet sockets the whole address has to be known: a dump and a map by inode are linear.
//!
//! Which namespace is asked is decided when the netlink socket is made ([`SockDiag::within`]): a
//! thread enters it for that call and ends, so this process stays where it is.
//!
//! What is not in the tables: unix sockets are all there; inet sockets without a port are in no hash
//! table, so they are found by their descriptor alone; inet sockets that nobody holds (TIME_WAIT,
//! connections that have not been accepted) are there with inode 0. Ping sockets have no table, raw
//! sockets only with CONFIG_INET_RAW_DIAG; `/proc/PID/net` lists both (`ckpt_proc::net`).
//!
//! netlink-packet-sock-diag knows unix and inet sockets, not packet and netlink ones; the records of
//! all four families share their framing, so that half would not have saved any of what follows.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use crate::SysError;

/// Runs `work` in the network namespace `net`, which a descriptor of `/proc/PID/ns/net` names, on a thread
/// of its own. Sockets made there stay there (setns(2)).
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN over the namespace; EAGAIN when there can be no thread.
pub fn in_network<T: Send>(net: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, SysError> {
    let failed = |call, errno| SysError::new(call, "a network namespace", errno);
    std::thread::scope(|scope| {
        let enter = move || {
            setns(net, CloneFlags::CLONE_NEWNET)
                .map(|()| work())
                .map_err(|errno| failed("setns(CLONE_NEWNET)", errno))
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, enter).map_err(|error| {
            failed("start a thread for", Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// One unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its inode.
    pub id: u64,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET`.
    pub kind: i32,
    /// `TCP_ESTABLISHED` 1, `TCP_CLOSE` 7, `TCP_LISTEN` 10.
    pub state: u8,
    /// Address as it was bound: a path has a trailing NUL, an abstract name a leading one.
    pub name: Vec<u8>,
    /// Inode and device (major << 20 | minor) of the socket file.
    pub file: Option<(u32, u32)>,
    /// Inode of the peer; 0 is a peer that nobody holds any more.
    pub peer: Option<u64>,
    /// Inodes of connections that wait in a listener's backlog.
    pub pending: Vec<u64>,
    /// Listener: connections waiting. Otherwise bytes to be read (datagram: of the first message).
    pub rqueue: u32,
    /// Listener: the backlog. Otherwise memory taken by what was sent and not yet read.
    pub wqueue: u32,
    /// 1: reading is shut down, 2: writing.
    pub shutdown: u8,
}

/// One TCP, UDP, UDP-Lite, raw or ping socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InetSocket {
    /// Its inode; 0 if nobody holds it: TIME_WAIT, orphans, connections not accepted yet.
    pub id: u64,
    /// `IPPROTO_TCP`, `IPPROTO_UDP`, `IPPROTO_UDPLITE`; of a raw socket the protocol that it was made for.
    pub protocol: i32,
    /// `TCP_ESTABLISHED` 1 to `TCP_CLOSING` 11 (include/net/tcp_states.h); sockets that are not TCP: 1
    /// connected, 7 not. A TCP socket that is bound and neither listens nor is connected is 7 too.
    pub state: u8,
    /// Bound to; a raw socket has its protocol as port. v4-mapped addresses stay v6.
    pub local: SocketAddr,
    /// Connected to; port 0 if it is not.
    pub remote: SocketAddr,
    /// Index of the interface that it is bound to (`SO_BINDTODEVICE`), 0 if none.
    pub interface: u32,
    /// TCP: bytes to be read, of a listener connections to be accepted. Otherwise memory taken by the queue.
    pub rqueue: u32,
    /// TCP: bytes sent or to be sent and not acknowledged, of a listener its backlog. Otherwise memory.
    pub wqueue: u32,
    /// Who made it.
    pub uid: u32,
    /// 1: reading is shut down, 2: writing. `None` where the kernel does not tell.
    pub shutdown: Option<u8>,
}

/// One packet socket (packet(7)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// Its inode.
    pub id: u64,
    /// `SOCK_RAW`, `SOCK_DGRAM`, `SOCK_PACKET`.
    pub kind: i32,
    /// Ethernet protocol (`ETH_P_*`), host byte order.
    pub protocol: u16,
    /// Interface that it is bound to, 0 for all.
    pub interface: u32,
    /// `TPACKET_V1` 0 to `TPACKET_V3` 2.
    pub version: u32,
    /// `PACKET_RESERVE`.
    pub reserve: u32,
    /// `PACKET_COPY_THRESH`.
    pub copy_thresh: u32,
    /// `PACKET_TIMESTAMP`.
    pub timestamp: u32,
    /// `PDI_RUNNING` 1, `PDI_AUXDATA` 2, `PDI_ORIGDEV` 4, `PDI_VNETHDR` 8, `PDI_LOSS` 16.
    pub flags: u32,
    /// `PACKET_ADD_MEMBERSHIP`s.
    pub memberships: Vec<PacketMembership>,
    /// `PACKET_RX_RING`.
    pub rx_ring: Option<PacketRing>,
    /// `PACKET_TX_RING`.
    pub tx_ring: Option<PacketRing>,
    /// `PACKET_FANOUT`, as it is given to setsockopt(2).
    pub fanout: Option<u32>,
    /// Memory taken by what was received and not read.
    pub rmem: u32,
    /// Memory taken by what was sent and is not gone yet.
    pub wmem: u32,
}

/// `struct packet_mreq`, with the number of times that it was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketMembership {
    /// Interface.
    pub interface: u32,
    /// Times added.
    pub count: u32,
    /// `PACKET_MR_*`.
    pub kind: u16,
    /// Hardware address.
    pub address: Vec<u8>,
}

/// `struct tpacket_req3`; the last three are 0 for versions 1 and 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PacketRing {
    pub block_size: u32,
    pub block_nr: u32,
    pub frame_size: u32,
    pub frame_nr: u32,
    pub retire_tmo: u32,
    pub sizeof_priv: u32,
    pub features: u32,
}

/// One netlink socket (netlink(7)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetlinkSocket {
    /// Its inode; 0 for those of the kernel.
    pub id: u64,
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// `NETLINK_ROUTE` and so on.
    pub protocol: i32,
    /// `NETLINK_CONNECTED` 1 or not 0.
    pub state: u8,
    /// Address; 0 if not bound.
    pub port: u32,
    /// Address that it is connected to.
    pub remote_port: u32,
    /// Groups that it is connected to.
    pub remote_group: u32,
    /// Groups that it is a member of, a bit mask of 32 bit words.
    pub groups: Vec<u32>,
    /// `NDIAG_FLAG_*`.
    pub flags: u32,
    /// Memory taken by what was received and not read.
    pub rmem: u32,
    /// Memory taken by what was sent and not read.
    pub wmem: u32,
}

/// A place to ask for tables: one network namespace.
#[derive(Debug)]
pub struct SockDiag(OwnedFd);

impl SockDiag {
    /// For the network namespace of the caller.
    ///
    /// # Errors
    /// EPROTONOSUPPORT (no CONFIG_SOCK_DIAG).
    pub fn here() -> Result<Self, SysError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkSockDiag)
            .map(Self)
            .map_err(|errno| failed("socket", errno))
    }

    /// For the network namespace `net`, a descriptor of `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// As [`in_network`] and [`SockDiag::here`].
    pub fn within(net: BorrowedFd<'_>) -> Result<Self, SysError> {
        in_network(net, Self::here)?
    }

    /// All unix sockets.
    ///
    /// # Errors
    /// ENOENT (no CONFIG_UNIX_DIAG).
    pub fn unix(&self) -> Result<Vec<UnixSocket>, SysError> {
        const SHOW: u32 = 0x1f;
        // unix_diag_req: family, protocol, pad, states, inode, show, cookie.
        let words = [u32::MAX, 0, SHOW, 0, 0];
        self.dump(&request(libc::AF_UNIX, 0, 0, &words), parse_unix)
    }

    /// All sockets of a protocol, `IPPROTO_TCP`, `IPPROTO_UDP`, `IPPROTO_UDPLITE` or `IPPROTO_RAW`, over IPv6
    /// (which includes v4-mapped addresses) or IPv4.
    ///
    /// # Errors
    /// ENOENT: this kernel has no table of them.
    pub fn inet(&self, v6: bool, protocol: i32) -> Result<Vec<InetSocket>, SysError> {
        const INET_DIAG_SHUTDOWN: u8 = 8;
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        // inet_diag_req_v2: family, protocol, extensions, pad, states, id (48 bytes, not used by a dump).
        let mut words = [0; 13];
        words[0] = u32::MAX;
        self.dump(&request(family, protocol, 1 << (INET_DIAG_SHUTDOWN - 1), &words), |body| {
            parse_inet(body, protocol)
        })
    }

    /// All packet sockets.
    ///
    /// # Errors
    /// ENOENT (no CONFIG_PACKET_DIAG).
    pub fn packet(&self) -> Result<Vec<PacketSocket>, SysError> {
        const SHOW: u32 = 0x1f;
        // packet_diag_req: family, protocol, pad, inode, show, cookie.
        self.dump(&request(libc::AF_PACKET, 0, 0, &[0, SHOW, 0, 0]), parse_packet)
    }

    /// All netlink sockets of all protocols.
    ///
    /// # Errors
    /// ENOENT (no CONFIG_NETLINK_DIAG).
    pub fn netlink(&self) -> Result<Vec<NetlinkSocket>, SysError> {
        const NDIAG_PROTO_ALL: i32 = 0xff;
        const SHOW: u32 = 1 | 2 | 8;
        // netlink_diag_req: family, protocol, pad, inode, show, cookie.
        self.dump(&request(libc::AF_NETLINK, NDIAG_PROTO_ALL, 0, &[0, SHOW, 0, 0]), parse_netlink)
    }

    /// Has the kernel forget a TCP socket that nobody holds (SOCK_DESTROY): of one in TIME_WAIT nothing but a note of its
    /// addresses. Nothing is sent to its peer then.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN, EOPNOTSUPP (no CONFIG_INET_DIAG_DESTROY, or an older kernel), ENOENT: it is gone.
    pub fn destroy(&self, of: &InetSocket) -> Result<(), SysError> {
        const SOCK_DESTROY: u16 = 21;
        const NLM_F_REQUEST_ACK: u16 = 5;
        let family = if of.local.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        // inet_diag_req_v2: family, protocol, extensions, pad, states; then ports, addresses, interface, cookie.
        let mut message = request(family, of.protocol, 0, &[u32::MAX]);
        message[4..6].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
        message[6..8].copy_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
        for side in [of.local, of.remote] {
            message.extend(side.port().to_be_bytes());
        }
        for side in [of.local, of.remote] {
            let mut address = match side.ip() {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            address.resize(16, 0);
            message.extend(address);
        }
        message.extend(of.interface.to_ne_bytes());
        // Whatever its cookie is.
        message.extend([0xff; 8]);
        let len = u32::try_from(message.len()).unwrap_or(0);
        message[..4].copy_from_slice(&len.to_ne_bytes());
        send(self.0.as_raw_fd(), &message, MsgFlags::empty()).map_err(|errno| failed("send", errno))?;
        let mut answer = [0; 256];
        let n = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())
            .map_err(|errno| failed("recv", errno))?;
        // nlmsgerr, behind the header: an errno, or 0.
        match u32_at(answer.get(..n).unwrap_or_default(), 16).map(u32::cast_signed) {
            Some(0) => Ok(()),
            Some(errno) => Err(failed("SOCK_DESTROY", Errno::from_raw(errno.saturating_neg()))),
            None => Err(failed("SOCK_DESTROY", Errno::EBADMSG)),
        }
    }

    fn dump<T>(&self, request: &[u8], parse: impl Fn(&[u8]) -> Option<T> + Copy) -> Result<Vec<T>, SysError> {
        send(self.0.as_raw_fd(), request, MsgFlags::empty()).map_err(|errno| failed("send", errno))?;
        let mut found = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match recv(self.0.as_fd().as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed("recv", errno)),
            };
            let answers = buffer.get(..n).unwrap_or_default();
            if parse_dump(answers, parse, &mut found).map_err(|errno| failed("sock_diag", errno))? {
                return Ok(found);
            }
        }
    }
}

fn failed(call: &'static str, errno: Errno) -> SysError {
    SysError::new(call, "NETLINK_SOCK_DIAG", errno)
}

/// A request for a dump. All families begin it with their number, the protocol and two bytes more.
fn request(family: i32, protocol: i32, extensions: u8, words: &[u32]) -> Vec<u8> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST_DUMP: u16 = 0x301;
    let len = 20 + size_of_val(words);
    let mut request = Vec::with_capacity(len);
    // nlmsghdr: length, type, flags, sequence, port.
    request.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // The constants passed here all fit into a byte.
    let byte = |n: i32| u8::try_from(n).unwrap_or(0);
    request.extend_from_slice(&[byte(family), byte(protocol), extensions, 0]);
    request.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    request
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_ne_bytes)
}

/// Reads one datagram of answers; true when the dump is complete.
fn parse_dump<T>(
    mut bytes: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    found: &mut Vec<T>,
) -> Result<bool, Errno> {
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    while let (Some(len), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let len = usize::try_from(len).map_err(|_| Errno::EBADMSG)?;
        let body = bytes.get(16..len).ok_or(Errno::EBADMSG)?;
        match kind {
            // A dump that fails tells so here: the handler's errno, or 0.
            NLMSG_DONE => {
                let errno = u32_at(body, 0).unwrap_or(0).cast_signed();
                return if errno < 0 { Err(Errno::from_raw(errno.saturating_neg())) } else { Ok(true) };
            }
            NLMSG_ERROR => {
                let errno = u32_at(body, 0).ok_or(Errno::EBADMSG)?.cast_signed();
                return Err(Errno::from_raw(errno.saturating_neg()));
            }
            _ => found.push(parse(body).ok_or(Errno::EBADMSG)?),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// Netlink attributes: kind and value. Ends at the first one that is cut short.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (len, kind) = (usize::from(u16_at(bytes, 0)?), u16_at(bytes, 2)?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn words(value: &[u8]) -> impl Iterator<Item = u32> {
    (0..value.len() / 4).filter_map(move |i| u32_at(value, 4 * i))
}

/// `SK_MEMINFO_RMEM_ALLOC` and `SK_MEMINFO_WMEM_ALLOC` (sock_diag.h).
fn memory(value: &[u8]) -> Option<(u32, u32)> {
    Some((u32_at(value, 0)?, u32_at(value, 8)?))
}

/// unix_diag_msg (family, type, state, pad, inode, cookie) and its attributes.
fn parse_unix(body: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        id: u64::from(u32_at(body, 4)?),
        kind: i32::from(*body.get(1)?),
        state: *body.get(2)?,
        ..UnixSocket::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            0 => socket.name = value.to_vec(),
            1 => socket.file = Some((u32_at(value, 0)?, u32_at(value, 4)?)),
            2 => socket.peer = Some(u64::from(u32_at(value, 0)?)),
            3 => socket.pending = words(value).map(u64::from).collect(),
            4 => (socket.rqueue, socket.wqueue) = (u32_at(value, 0)?, u32_at(value, 4)?),
            6 => socket.shutdown = *value.first()?,
            _ => {}
        }
    }
    Some(socket)
}

/// inet_diag_msg (family, state, timer, retrans, id, expires, rqueue, wqueue, uid, inode), attributes.
/// `id` is source and destination port (network byte order), both addresses (16 bytes), interface, cookie.
fn parse_inet(body: &[u8], protocol: i32) -> Option<InetSocket> {
    /// Bound, and nothing else; Linux 6.8 lists these under a state of their own.
    const BOUND_INACTIVE: u8 = 13;
    const CLOSE: u8 = 7;
    let v6 = i32::from(*body.first()?) == libc::AF_INET6;
    let side = |port: usize, at: usize| -> Option<SocketAddr> {
        let ip = if v6 {
            IpAddr::V6(Ipv6Addr::from(array::<16>(body, at)?))
        } else {
            IpAddr::V4(Ipv4Addr::from(array::<4>(body, at)?))
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(array(body, port)?)))
    };
    let state = *body.get(1)?;
    let mut socket = InetSocket {
        id: u64::from(u32_at(body, 68)?),
        protocol,
        state: if state == BOUND_INACTIVE { CLOSE } else { state },
        local: side(4, 8)?,
        remote: side(6, 24)?,
        interface: u32_at(body, 40)?,
        rqueue: u32_at(body, 56)?,
        wqueue: u32_at(body, 60)?,
        uid: u32_at(body, 64)?,
        shutdown: None,
    };
    for (kind, value) in attributes(body.get(72..)?) {
        // INET_DIAG_SHUTDOWN, INET_DIAG_PROTOCOL.
        match kind {
            8 => socket.shutdown = Some(*value.first()?),
            10 => socket.protocol = i32::from(*value.first()?),
            _ => {}
        }
    }
    Some(socket)
}

/// packet_diag_msg (family, type, protocol, inode, cookie) and its attributes.
fn parse_packet(body: &[u8]) -> Option<PacketSocket> {
    let mut socket = PacketSocket {
        id: u64::from(u32_at(body, 4)?),
        kind: i32::from(*body.get(1)?),
        protocol: u16_at(body, 2)?,
        ..PacketSocket::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            0 => {
                socket.interface = u32_at(value, 0)?;
                socket.version = u32_at(value, 4)?;
                socket.reserve = u32_at(value, 8)?;
                socket.copy_thresh = u32_at(value, 12)?;
                socket.timestamp = u32_at(value, 16)?;
                socket.flags = u32_at(value, 20)?;
            }
            1 => socket.memberships = value.chunks_exact(44).filter_map(membership).collect(),
            2 => socket.rx_ring = ring(value),
            3 => socket.tx_ring = ring(value),
            4 => socket.fanout = Some(u32_at(value, 0)?),
            6 => (socket.rmem, socket.wmem) = memory(value)?,
            _ => {}
        }
    }
    Some(socket)
}

/// packet_diag_mclist: interface, count, type, length of the address, address (32 bytes).
fn membership(value: &[u8]) -> Option<PacketMembership> {
    let len = usize::from(u16_at(value, 10)?).min(32);
    Some(PacketMembership {
        interface: u32_at(value, 0)?,
        count: u32_at(value, 4)?,
        kind: u16_at(value, 8)?,
        address: value.get(12..12 + len)?.to_vec(),
    })
}

/// packet_diag_ring.
fn ring(value: &[u8]) -> Option<PacketRing> {
    Some(PacketRing {
        block_size: u32_at(value, 0)?,
        block_nr: u32_at(value, 4)?,
        frame_size: u32_at(value, 8)?,
        frame_nr: u32_at(value, 12)?,
        retire_tmo: u32_at(value, 16)?,
        sizeof_priv: u32_at(value, 20)?,
        features: u32_at(value, 24)?,
    })
}

/// netlink_diag_msg (family, type, protocol, state, port, peer's port and group, inode, cookie), attributes.
fn parse_netlink(body: &[u8]) -> Option<NetlinkSocket> {
    let mut socket = NetlinkSocket {
        id: u64::from(u32_at(body, 16)?),
        kind: i32::from(*body.get(1)?),
        protocol: i32::from(*body.get(2)?),
        state: *body.get(3)?,
        port: u32_at(body, 4)?,
        remote_port: u32_at(body, 8)?,
        remote_group: u32_at(body, 12)?,
        ..NetlinkSocket::default()
    };
    for (kind, value) in attributes(body.get(28..)?) {
        match kind {
            0 => (socket.rmem, socket.wmem) = memory(value)?,
            1 => socket.groups = words(value).collect(),
            4 => socket.flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::socketpair;
    use proptest::prelude::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn inode(fd: impl AsFd) -> u64 {
        nix::sys::stat::fstat(fd).unwrap().st_ino
    }

    #[test]
    fn dump_finds_a_pair_and_its_queue() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        nix::unistd::write(&a, b"four").unwrap();
        let all = SockDiag::here().unwrap().unix().unwrap();
        let of_b = all.iter().find(|s| s.id == inode(&b)).unwrap();
        assert_eq!((of_b.peer, of_b.rqueue, of_b.state), (Some(inode(&a)), 4, 1));
    }

    #[test]
    fn dump_finds_tcp_and_udp_sockets() {
        let diag = SockDiag::here().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        nix::unistd::write(&client, b"four").unwrap();
        let tcp = diag.inet(false, libc::IPPROTO_TCP).unwrap();
        let of = |fd: u64| tcp.iter().find(|s| s.id == fd).copied().unwrap();
        let listening = of(inode(&listener));
        assert_eq!((listening.state, listening.local), (10, address));
        let connected = of(inode(&server));
        assert_eq!((connected.state, connected.rqueue), (1, 4));
        assert_eq!((connected.local, connected.remote), (address, client.local_addr().unwrap()));
        assert_eq!(of(inode(&client)).shutdown, Some(0));

        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let all = diag.inet(true, libc::IPPROTO_UDP).unwrap();
        let found = all.iter().find(|s| s.id == inode(&udp)).unwrap();
        assert_eq!((found.state, found.local), (7, udp.local_addr().unwrap()));
    }

    #[test]
    fn bound_only_sockets_are_closed_ones() {
        let kind = (AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC);
        let fd = socket(kind.0, kind.1, kind.2, None).unwrap();
        nix::sys::socket::bind(
            fd.as_raw_fd(),
            &nix::sys::socket::SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)),
        )
        .unwrap();
        let tcp = SockDiag::here().unwrap().inet(false, libc::IPPROTO_TCP).unwrap();
        assert_eq!(tcp.iter().find(|s| s.id == inode(&fd)).map(|s| s.state), Some(7));
    }

    #[test]
    fn dump_finds_netlink_sockets() {
        let diag = SockDiag::here().unwrap();
        let all = diag.netlink().unwrap();
        let own = all.iter().find(|s| s.id == inode(&diag.0)).unwrap();
        assert_eq!((own.protocol, own.kind), (libc::NETLINK_SOCK_DIAG, libc::SOCK_RAW));
        diag.packet().unwrap();
    }

    #[test]
    fn another_namespace_has_its_own_tables() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let elsewhere = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        });
        let net = elsewhere.join().unwrap();
        let there = SockDiag::within(net.as_fd()).unwrap();
        assert!(there.inet(false, libc::IPPROTO_TCP).unwrap().is_empty());
        let here = SockDiag::here().unwrap().inet(false, libc::IPPROTO_TCP).unwrap();
        assert!(here.iter().any(|s| s.id == inode(&listener)));
    }

    #[test]
    fn damaged_answers_are_errors() {
        let mut found = Vec::new();
        let too_long = [255, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(parse_dump(&too_long, parse_unix, &mut found).is_err());
        let too_short = [20, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1];
        assert!(parse_dump(&too_short, parse_unix, &mut found).is_err());
        for body in [&[0; 71][..], &[0; 10], &[]] {
            assert_eq!(parse_inet(body, 6), None);
        }
    }

    /// Real answers of the kernel, a datagram of each table.
    fn answers() -> Vec<Vec<u8>> {
        let held = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let inet = |protocol| {
            request(libc::AF_INET, protocol, 0x80, &[u32::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        };
        let requests = [
            request(libc::AF_UNIX, 0, 0, &[u32::MAX, 0, 0x1f, 0, 0]),
            inet(libc::IPPROTO_TCP),
            inet(libc::IPPROTO_UDP),
            request(libc::AF_NETLINK, 0xff, 0, &[0, 1 | 2 | 8, 0, 0]),
        ];
        let answers = requests.iter().map(|request| {
            let diag = SockDiag::here().unwrap();
            send(diag.0.as_raw_fd(), request, MsgFlags::empty()).unwrap();
            let mut buffer = vec![0; 1 << 16];
            let n = recv(diag.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            buffer.truncate(n);
            buffer
        });
        let answers = answers.collect();
        drop(held);
        answers
    }

    static ANSWERS: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(answers);

    /// Every parser on the same bytes: no panic, and never more sockets than there is room for.
    fn parse_all(bytes: &[u8]) {
        fn one<T>(bytes: &[u8], parse: impl Fn(&[u8]) -> Option<T>) {
            let mut found = Vec::new();
            let _ = parse_dump(bytes, parse, &mut found);
            assert!(found.len() <= bytes.len() / 16);
        }
        one(bytes, parse_unix);
        one(bytes, |body| parse_inet(body, libc::IPPROTO_TCP));
        one(bytes, parse_packet);
        one(bytes, parse_netlink);
    }

    #[test]
    fn answers_are_whole() {
        let mut found = Vec::new();
        for (index, answer) in ANSWERS.iter().enumerate() {
            let parsed = match index {
                0 => parse_dump(answer, |body| parse_unix(body).map(|s| s.id), &mut found),
                1 | 2 => parse_dump(answer, |body| parse_inet(body, 0).map(|s| s.id), &mut found),
                _ => parse_dump(answer, |body| parse_netlink(body).map(|s| s.id), &mut found),
            };
            parsed.unwrap();
        }
        assert!(found.len() >= 4, "{found:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn answers_changed_in_any_way_are_parsed_or_errors(
            which in 0..4_usize,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut: Option<prop::sample::Index>,
        ) {
            let mut bytes = ANSWERS[which].clone();
            // Lengths are what matters most, and those of the first message are looked at in every case.
            let near = bytes.len().min(400);
            for (at, byte) in changes {
                let at = if byte % 4 == 0 { at.index(bytes.len()) } else { at.index(near) };
                bytes[at] = byte;
            }
            bytes.truncate(cut.map_or(bytes.len(), |cut| cut.index(bytes.len())));
            parse_all(&bytes);
        }

        #[test]
        fn bytes_of_any_kind_are_parsed_or_errors(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            parse_all(&bytes);
        }
    }
}
