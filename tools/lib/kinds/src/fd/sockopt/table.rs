//! Every option of sockets that getsockopt(2) gives and setsockopt(2) takes back. Pure data: who reads it
//! needs no kernel.
//!
//! Numbers are those of the kernel's headers (asm-generic/socket.h, linux/in.h, in6.h, udp.h, tcp.h,
//! if_packet.h, netlink.h) on x86-64; the libc crate lacks a good part of them.
//!
//! Not here, because they are not state that a program set: what tells about a connection (`TCP_INFO`,
//! `SO_ERROR`, `SO_PEERCRED`, `IP_MTU`), what changes by itself (`TCP_QUICKACK`), and what is a second name of an
//! option that is here (`SO_BINDTOIFINDEX`). Not here, because the kernel takes it and never gives it back:
//! `SO_ATTACH_REUSEPORT_CBPF` and `_EBPF`, `TCP_MD5SIG`, `SO_BUSY_POLL_BUDGET`, `IPV6_ROUTER_ALERT`,
//! `PACKET_FANOUT_DATA`, the interface index of `IP_MULTICAST_IF`.

use super::{Field, Options, When, int, long, text};

/// Unix sockets.
pub const UNIX: u16 = 1;
/// TCP sockets.
pub const TCP: u16 = 1 << 1;
/// UDP and UDP-Lite sockets.
pub const UDP: u16 = 1 << 2;
/// Raw IP sockets.
pub const RAW: u16 = 1 << 3;
/// Ping sockets: `SOCK_DGRAM` with protocol ICMP or ICMPv6.
pub const PING: u16 = 1 << 4;
/// Packet sockets.
pub const PACKET: u16 = 1 << 5;
/// Netlink sockets.
pub const NETLINK: u16 = 1 << 6;
/// Inet sockets of IPv4.
pub const V4: u16 = 1 << 8;
/// Inet sockets of IPv6.
pub const V6: u16 = 1 << 9;
/// Inet sockets of all kinds and both families.
pub const INET: u16 = TCP | UDP | RAW | PING | V4 | V6;
/// All sockets.
pub const ALL: u16 = INET | UNIX | PACKET | NETLINK;

/// What the value of an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// An int that is 0 or 1.
    Flag,
    /// An int.
    Int,
    /// An unsigned long.
    Long,
    /// `struct timeval`.
    Time,
    /// `struct linger`.
    Linger,
    /// A string of at most so many bytes, its NUL included.
    Text(usize),
    /// Any bytes, at most so many.
    Bytes(usize),
    /// The index of an interface, an int (in network byte order if true). In the images it is the
    /// interface's name, because indices differ between machines.
    Interface(bool),
    /// A buffer's size, which the kernel doubles when it is set. There is another option that does
    /// not respect the system's limit.
    Size {
        /// That option.
        force: i32,
    },
    /// A program of classic BPF, 8 bytes for each instruction.
    Filter,
}

/// An option of sockets.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// `SOL_SOCKET`, `IPPROTO_IP` and so on.
    pub level: i32,
    /// Its number there.
    pub number: i32,
    /// Its name in C.
    pub name: &'static str,
    /// What its value is.
    pub value: Value,
    /// Sockets that have it: a set of [`UNIX`], [`TCP`], ...
    pub of: u16,
    pub(super) when: When,
    pub(super) field: Field,
}

const SOCKET: i32 = 1;
const IP: i32 = 0;
const TCP_: i32 = 6;
const UDP_: i32 = 17;
const IPV6: i32 = 41;
const ICMPV6: i32 = 58;
const UDPLITE_: i32 = 136;
const RAW_: i32 = 255;
const PACKET_: i32 = 263;
const NETLINK_: i32 = 270;

/// A number that has a field of its own.
macro_rules! number {
    ($group:ident . $field:ident) => {
        Field::Own(
            |o: &Options| o.$group.$field.map(|n| n.to_ne_bytes().to_vec()),
            |o: &mut Options, v: &[u8]| o.$group.$field = int(v),
        )
    };
}

/// The same for those that CRIU's images hold only if they are not 0.
macro_rules! nonzero {
    ($group:ident . $field:ident) => {
        Field::Own(
            |o: &Options| o.$group.$field.map(|n| n.to_ne_bytes().to_vec()),
            |o: &mut Options, v: &[u8]| o.$group.$field = int(v).filter(|&n| n != 0),
        )
    };
}

/// A flag that has a field of its own.
macro_rules! flag {
    ($group:ident . $field:ident) => {
        Field::Own(
            |o: &Options| o.$group.$field.map(|f| u32::from(f).to_ne_bytes().to_vec()),
            |o: &mut Options, v: &[u8]| o.$group.$field = int(v).map(|n| n != 0),
        )
    };
}

/// The same for those that CRIU's images hold only if they are set.
macro_rules! set_flag {
    ($group:ident . $field:ident) => {
        Field::Own(
            |o: &Options| o.$group.$field.map(|f| u32::from(f).to_ne_bytes().to_vec()),
            |o: &mut Options, v: &[u8]| o.$group.$field = int(v).map(|n| n != 0).filter(|&f| f),
        )
    };
}

macro_rules! required {
    ($field:ident) => {
        Field::Own(
            |o: &Options| (o.sk.$field != 0).then(|| o.sk.$field.to_ne_bytes().to_vec()),
            |o: &mut Options, v: &[u8]| o.sk.$field = int(v).unwrap_or(0),
        )
    };
}

macro_rules! time {
    ($sec:ident, $usec:ident) => {
        Field::Own(
            |o: &Options| Some([o.sk.$sec.to_ne_bytes(), o.sk.$usec.to_ne_bytes()].concat()),
            |o: &mut Options, v: &[u8]| (o.sk.$sec, o.sk.$usec) = (long(v, 0), long(v, 8)),
        )
    };
}

const LINGER: Field = Field::Own(
    |o| o.sk.so_linger.map(|s| [1u32.to_ne_bytes(), s.to_ne_bytes()].concat()),
    |o, v| o.sk.so_linger = int(v).filter(|&on| on != 0).and_then(|_| int(v.get(4..)?)),
);

const DEVICE: Field = Field::Own(
    |o| o.sk.so_bound_dev.as_ref().map(|name| [name.as_bytes(), &[0]].concat()),
    |o, v| o.sk.so_bound_dev = Some(text(v)).filter(|name| !name.is_empty()),
);

const FILTER: Field = Field::Own(
    |o| {
        let program = o.sk.so_filter.iter().flat_map(|i| i.to_ne_bytes()).collect::<Vec<u8>>();
        (!program.is_empty()).then_some(program)
    },
    |o, v| o.sk.so_filter = v.as_chunks::<8>().0.iter().map(|i| u64::from_ne_bytes(*i)).collect(),
);

const ICMP_FILTER: Field = Field::Own(
    |o| {
        let words = &o.raw.icmpv_filter;
        (!words.is_empty()).then(|| words.iter().flat_map(|w| w.to_ne_bytes()).collect())
    },
    |o, v| o.raw.icmpv_filter = v.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w)).collect(),
);

const V6ONLY: Field = Field::Own(
    |o| o.v6only.map(|f| u32::from(f).to_ne_bytes().to_vec()),
    |o, v| o.v6only = int(v).map(|n| n != 0),
);

const fn opt(level: i32, number: i32, name: &'static str, value: Value, of: u16) -> Opt {
    Opt { level, number, name, value, of, when: When::Later, field: Field::List }
}

impl Opt {
    const fn at(mut self, when: When) -> Self {
        self.when = when;
        self
    }

    const fn in_field(mut self, field: Field) -> Self {
        self.field = field;
        self
    }

    const fn refused(mut self, why: &'static str) -> Self {
        self.field = Field::Refused(why);
        self
    }
}

use Value::{Bytes, Filter, Flag, Int, Interface, Linger, Long, Size, Text, Time};
use When::{BeforeBind, Last};

/// All of them, in the order in which they are set.
pub const OPTIONS: &[Opt] = &[
    // What bind(2) and connect(2) look at, and what a queue is filled by.
    opt(SOCKET, 2, "SO_REUSEADDR", Flag, ALL).at(BeforeBind).in_field(flag!(sk.reuseaddr)),
    opt(SOCKET, 15, "SO_REUSEPORT", Flag, ALL).at(BeforeBind).in_field(flag!(sk.so_reuseport)),
    opt(SOCKET, 25, "SO_BINDTODEVICE", Text(16), ALL).at(BeforeBind).in_field(DEVICE),
    opt(SOCKET, 36, "SO_MARK", Int, ALL).at(BeforeBind).in_field(nonzero!(sk.so_mark)),
    opt(IPV6, 26, "IPV6_V6ONLY", Flag, INET & !V4).at(BeforeBind).in_field(V6ONLY),
    // Raw sockets of IPv6 have only those of their level, others share a bit.
    opt(IP, 15, "IP_FREEBIND", Flag, INET & !RAW).at(BeforeBind).in_field(set_flag!(ip.freebind)),
    opt(IP, 15, "IP_FREEBIND", Flag, RAW | V4).at(BeforeBind).in_field(set_flag!(ip.freebind)),
    opt(IP, 19, "IP_TRANSPARENT", Flag, INET & !RAW).at(BeforeBind),
    opt(IP, 19, "IP_TRANSPARENT", Flag, RAW | V4).at(BeforeBind),
    opt(IPV6, 78, "IPV6_FREEBIND", Flag, RAW | V6).at(BeforeBind).in_field(set_flag!(ip.freebind)),
    opt(IPV6, 75, "IPV6_TRANSPARENT", Flag, RAW | V6).at(BeforeBind),
    opt(IP, 24, "IP_BIND_ADDRESS_NO_PORT", Flag, INET),
    opt(IP, 51, "IP_LOCAL_PORT_RANGE", Int, INET),
    opt(IP, 50, "IP_UNICAST_IF", Interface(true), INET & !TCP & !V6).at(BeforeBind),
    opt(IPV6, 76, "IPV6_UNICAST_IF", Interface(true), INET & !TCP & !V4).at(BeforeBind),
    opt(TCP_, 2, "TCP_MAXSEG", Int, TCP | V4 | V6).at(BeforeBind),
    opt(TCP_, 30, "TCP_FASTOPEN_CONNECT", Flag, TCP | V4 | V6).at(BeforeBind),
    // What is noted with a datagram when it comes.
    opt(IP, 8, "IP_PKTINFO", Flag, INET & !V6).at(BeforeBind).in_field(set_flag!(ip.pktinfo)),
    opt(IP, 8, "IP_PKTINFO", Flag, INET & !V4).at(BeforeBind),
    opt(IPV6, 2, "IPV6_2292PKTINFO", Flag, INET & !V4).at(BeforeBind),
    opt(IPV6, 49, "IPV6_RECVPKTINFO", Flag, INET & !V4).at(BeforeBind).in_field(set_flag!(ip.pktinfo)),
    // SOL_SOCKET. SO_PRIORITY stands further down: IP_TOS changes it.
    opt(SOCKET, 1, "SO_DEBUG", Flag, ALL),
    opt(SOCKET, 18, "SO_RCVLOWAT", Int, ALL).in_field(number!(sk.so_rcvlowat)),
    opt(SOCKET, 7, "SO_SNDBUF", Size { force: 32 }, ALL).in_field(required!(so_sndbuf)),
    opt(SOCKET, 8, "SO_RCVBUF", Size { force: 33 }, ALL).in_field(required!(so_rcvbuf)),
    opt(SOCKET, 72, "SO_BUF_LOCK", Int, ALL).in_field(number!(sk.so_buf_lock)),
    opt(SOCKET, 21, "SO_SNDTIMEO", Time, ALL).in_field(time!(so_snd_tmo_sec, so_snd_tmo_usec)),
    opt(SOCKET, 20, "SO_RCVTIMEO", Time, ALL).in_field(time!(so_rcv_tmo_sec, so_rcv_tmo_usec)),
    opt(SOCKET, 16, "SO_PASSCRED", Flag, UNIX | NETLINK).in_field(flag!(sk.so_passcred)),
    opt(SOCKET, 34, "SO_PASSSEC", Flag, UNIX | NETLINK).in_field(flag!(sk.so_passsec)),
    opt(SOCKET, 5, "SO_DONTROUTE", Flag, ALL).in_field(flag!(sk.so_dontroute)),
    opt(SOCKET, 11, "SO_NO_CHECK", Flag, ALL).in_field(flag!(sk.so_no_check)),
    opt(SOCKET, 6, "SO_BROADCAST", Flag, ALL).in_field(flag!(sk.so_broadcast)),
    opt(SOCKET, 9, "SO_KEEPALIVE", Flag, ALL).in_field(flag!(sk.so_keepalive)),
    opt(SOCKET, 10, "SO_OOBINLINE", Int, ALL).in_field(number!(sk.so_oobinline)),
    opt(SOCKET, 13, "SO_LINGER", Linger, ALL).in_field(LINGER),
    // The two kinds of time stamps share a flag for their form, which the last one that is set decides.
    opt(SOCKET, 37, "SO_TIMESTAMPING", Bytes(8), ALL),
    opt(SOCKET, 65, "SO_TIMESTAMPING_NEW", Bytes(8), ALL),
    opt(SOCKET, 35, "SO_TIMESTAMPNS", Flag, ALL),
    opt(SOCKET, 29, "SO_TIMESTAMP", Flag, ALL),
    opt(SOCKET, 64, "SO_TIMESTAMPNS_NEW", Flag, ALL),
    opt(SOCKET, 63, "SO_TIMESTAMP_NEW", Flag, ALL),
    opt(SOCKET, 40, "SO_RXQ_OVFL", Flag, ALL),
    opt(SOCKET, 41, "SO_WIFI_STATUS", Flag, ALL),
    opt(SOCKET, 42, "SO_PEEK_OFF", Int, TCP | UDP | V4 | V6),
    opt(SOCKET, 43, "SO_NOFCS", Flag, ALL),
    opt(SOCKET, 45, "SO_SELECT_ERR_QUEUE", Flag, ALL),
    opt(SOCKET, 46, "SO_BUSY_POLL", Int, ALL),
    opt(SOCKET, 69, "SO_PREFER_BUSY_POLL", Flag, ALL),
    opt(SOCKET, 47, "SO_MAX_PACING_RATE", Long, ALL),
    opt(SOCKET, 60, "SO_ZEROCOPY", Flag, ALL),
    opt(SOCKET, 61, "SO_TXTIME", Bytes(8), ALL),
    opt(SOCKET, 73, "SO_RESERVE_MEM", Int, ALL),
    opt(SOCKET, 74, "SO_TXREHASH", Int, ALL),
    opt(SOCKET, 75, "SO_RCVMARK", Flag, ALL),
    opt(SOCKET, 82, "SO_RCVPRIORITY", Flag, ALL),
    opt(SOCKET, 76, "SO_PASSPIDFD", Flag, ALL),
    opt(SOCKET, 83, "SO_PASSRIGHTS", Flag, UNIX),
    // IPPROTO_IP; sockets of IPv6 have them too, for v4-mapped peers.
    opt(IP, 4, "IP_OPTIONS", Bytes(40), INET),
    opt(IP, 1, "IP_TOS", Int, INET).in_field(nonzero!(ip.tos)),
    opt(SOCKET, 12, "SO_PRIORITY", Int, ALL).in_field(number!(sk.so_priority)),
    opt(IP, 2, "IP_TTL", Int, INET).in_field(number!(ip.ttl)),
    opt(IP, 3, "IP_HDRINCL", Flag, RAW | V4).in_field(set_flag!(raw.hdrincl)),
    opt(IP, 22, "IP_NODEFRAG", Flag, RAW | V4).in_field(set_flag!(raw.nodefrag)),
    opt(IP, 23, "IP_CHECKSUM", Flag, RAW | V4).in_field(set_flag!(raw.checksum)),
    opt(IP, 23, "IP_CHECKSUM", Flag, INET & !RAW),
    opt(IP, 5, "IP_ROUTER_ALERT", Flag, RAW | V4),
    opt(IP, 6, "IP_RECVOPTS", Flag, INET),
    opt(IP, 7, "IP_RETOPTS", Flag, INET),
    opt(IP, 10, "IP_MTU_DISCOVER", Int, INET),
    opt(IP, 11, "IP_RECVERR", Flag, INET),
    opt(IP, 12, "IP_RECVTTL", Flag, INET),
    opt(IP, 13, "IP_RECVTOS", Flag, INET),
    opt(IP, 18, "IP_PASSSEC", Flag, INET),
    opt(IP, 20, "IP_RECVORIGDSTADDR", Flag, INET),
    opt(IP, 21, "IP_MINTTL", Int, INET),
    opt(IP, 25, "IP_RECVFRAGSIZE", Flag, INET),
    opt(IP, 26, "IP_RECVERR_RFC4884", Flag, INET),
    opt(IP, 32, "IP_MULTICAST_IF", Bytes(4), INET & !TCP),
    opt(IP, 33, "IP_MULTICAST_TTL", Int, INET & !TCP),
    opt(IP, 34, "IP_MULTICAST_LOOP", Flag, INET & !TCP),
    opt(IP, 49, "IP_MULTICAST_ALL", Flag, INET),
    // IPPROTO_IPV6.
    opt(IPV6, 3, "IPV6_2292HOPOPTS", Flag, INET & !V4),
    opt(IPV6, 4, "IPV6_2292DSTOPTS", Flag, INET & !V4),
    opt(IPV6, 5, "IPV6_2292RTHDR", Flag, INET & !V4),
    opt(IPV6, 7, "IPV6_CHECKSUM", Int, RAW | V6),
    opt(IPV6, 8, "IPV6_2292HOPLIMIT", Flag, INET & !V4),
    opt(IPV6, 11, "IPV6_FLOWINFO", Flag, INET & !V4),
    opt(IPV6, 16, "IPV6_UNICAST_HOPS", Int, INET & !V4),
    opt(IPV6, 17, "IPV6_MULTICAST_IF", Interface(false), INET & !V4 & !TCP),
    opt(IPV6, 18, "IPV6_MULTICAST_HOPS", Int, INET & !V4 & !TCP),
    opt(IPV6, 19, "IPV6_MULTICAST_LOOP", Flag, INET & !V4 & !TCP),
    opt(IPV6, 23, "IPV6_MTU_DISCOVER", Int, INET & !V4),
    opt(IPV6, 25, "IPV6_RECVERR", Flag, INET & !V4),
    opt(IPV6, 29, "IPV6_MULTICAST_ALL", Flag, INET & !V4),
    opt(IPV6, 30, "IPV6_ROUTER_ALERT_ISOLATE", Flag, INET & !V4),
    opt(IPV6, 31, "IPV6_RECVERR_RFC4884", Flag, INET & !V4),
    opt(IPV6, 33, "IPV6_FLOWINFO_SEND", Flag, INET & !V4),
    opt(IPV6, 36, "IPV6_HDRINCL", Flag, RAW | V6),
    opt(IPV6, 51, "IPV6_RECVHOPLIMIT", Flag, INET & !V4),
    opt(IPV6, 53, "IPV6_RECVHOPOPTS", Flag, INET & !V4),
    opt(IPV6, 54, "IPV6_HOPOPTS", Bytes(2048), INET & !V4),
    opt(IPV6, 55, "IPV6_RTHDRDSTOPTS", Bytes(2048), INET & !V4),
    opt(IPV6, 56, "IPV6_RECVRTHDR", Flag, INET & !V4),
    opt(IPV6, 57, "IPV6_RTHDR", Bytes(2048), INET & !V4),
    opt(IPV6, 58, "IPV6_RECVDSTOPTS", Flag, INET & !V4),
    opt(IPV6, 59, "IPV6_DSTOPTS", Bytes(2048), INET & !V4),
    opt(IPV6, 60, "IPV6_RECVPATHMTU", Flag, INET & !V4),
    opt(IPV6, 62, "IPV6_DONTFRAG", Flag, INET & !V4),
    opt(IPV6, 66, "IPV6_RECVTCLASS", Flag, INET & !V4),
    opt(IPV6, 67, "IPV6_TCLASS", Int, INET & !V4),
    opt(IPV6, 70, "IPV6_AUTOFLOWLABEL", Flag, INET & !V4),
    opt(IPV6, 72, "IPV6_ADDR_PREFERENCES", Int, INET & !V4),
    opt(IPV6, 73, "IPV6_MINHOPCOUNT", Int, INET & !V4),
    opt(IPV6, 74, "IPV6_RECVORIGDSTADDR", Flag, INET & !V4),
    opt(IPV6, 77, "IPV6_RECVFRAGSIZE", Flag, INET & !V4),
    // UDP.
    opt(UDP_, 1, "UDP_CORK", Flag, UDP | V4 | V6),
    opt(UDP_, 100, "UDP_ENCAP", Int, UDP | V4 | V6),
    opt(UDP_, 101, "UDP_NO_CHECK6_TX", Flag, UDP | V4 | V6),
    opt(UDP_, 102, "UDP_NO_CHECK6_RX", Flag, UDP | V4 | V6),
    opt(UDP_, 103, "UDP_SEGMENT", Int, UDP | V4 | V6),
    opt(UDP_, 104, "UDP_GRO", Flag, UDP | V4 | V6),
    opt(UDPLITE_, 10, "UDPLITE_SEND_CSCOV", Int, UDP | V4 | V6),
    opt(UDPLITE_, 11, "UDPLITE_RECV_CSCOV", Int, UDP | V4 | V6),
    // Raw sockets.
    opt(RAW_, 1, "ICMP_FILTER", Bytes(4), RAW | V4).in_field(ICMP_FILTER),
    opt(ICMPV6, 1, "ICMP6_FILTER", Bytes(32), RAW | V6).in_field(ICMP_FILTER),
    // TCP.
    opt(TCP_, 13, "TCP_CONGESTION", Text(16), TCP | V4 | V6),
    opt(TCP_, 4, "TCP_KEEPIDLE", Int, TCP | V4 | V6).in_field(number!(tcp.keepidle)),
    opt(TCP_, 5, "TCP_KEEPINTVL", Int, TCP | V4 | V6).in_field(number!(tcp.keepintvl)),
    opt(TCP_, 6, "TCP_KEEPCNT", Int, TCP | V4 | V6).in_field(number!(tcp.keepcnt)),
    opt(TCP_, 7, "TCP_SYNCNT", Int, TCP | V4 | V6),
    opt(TCP_, 8, "TCP_LINGER2", Int, TCP | V4 | V6),
    opt(TCP_, 9, "TCP_DEFER_ACCEPT", Int, TCP | V4 | V6),
    opt(TCP_, 10, "TCP_WINDOW_CLAMP", Int, TCP | V4 | V6),
    opt(TCP_, 16, "TCP_THIN_LINEAR_TIMEOUTS", Flag, TCP | V4 | V6),
    opt(TCP_, 18, "TCP_USER_TIMEOUT", Int, TCP | V4 | V6),
    opt(TCP_, 23, "TCP_FASTOPEN", Int, TCP | V4 | V6),
    opt(TCP_, 25, "TCP_NOTSENT_LOWAT", Int, TCP | V4 | V6),
    opt(TCP_, 27, "TCP_SAVE_SYN", Int, TCP | V4 | V6),
    opt(TCP_, 31, "TCP_ULP", Text(16), TCP | V4 | V6)
        .refused("what an upper layer protocol (TLS) holds can't be read"),
    opt(TCP_, 33, "TCP_FASTOPEN_KEY", Bytes(32), TCP | V4 | V6),
    opt(TCP_, 34, "TCP_FASTOPEN_NO_COOKIE", Flag, TCP | V4 | V6),
    opt(TCP_, 36, "TCP_INQ", Flag, TCP | V4 | V6),
    opt(TCP_, 37, "TCP_TX_DELAY", Int, TCP | V4 | V6),
    opt(TCP_, 44, "TCP_RTO_MAX_MS", Int, TCP | V4 | V6),
    opt(TCP_, 1, "TCP_NODELAY", Flag, TCP | V4 | V6).in_field(set_flag!(tcp.nodelay)),
    opt(TCP_, 3, "TCP_CORK", Flag, TCP | V4 | V6).in_field(set_flag!(tcp.cork)),
    // Packet sockets; the others are in packet_sock_entry.
    opt(PACKET_, 24, "PACKET_VNET_HDR_SZ", Int, PACKET).at(BeforeBind),
    opt(PACKET_, 19, "PACKET_TX_HAS_OFF", Flag, PACKET),
    opt(PACKET_, 20, "PACKET_QDISC_BYPASS", Flag, PACKET),
    opt(PACKET_, 23, "PACKET_IGNORE_OUTGOING", Flag, PACKET),
    // Netlink sockets.
    opt(NETLINK_, 3, "NETLINK_PKTINFO", Flag, NETLINK),
    opt(NETLINK_, 4, "NETLINK_BROADCAST_ERROR", Flag, NETLINK),
    opt(NETLINK_, 5, "NETLINK_NO_ENOBUFS", Flag, NETLINK),
    opt(NETLINK_, 8, "NETLINK_LISTEN_ALL_NSID", Flag, NETLINK),
    opt(NETLINK_, 10, "NETLINK_CAP_ACK", Flag, NETLINK),
    opt(NETLINK_, 11, "NETLINK_EXT_ACK", Flag, NETLINK),
    opt(NETLINK_, 12, "NETLINK_GET_STRICT_CHK", Flag, NETLINK),
    // What would be in the way of everything before it.
    opt(SOCKET, 26, "SO_ATTACH_FILTER", Filter, ALL).at(Last).in_field(FILTER),
    opt(SOCKET, 44, "SO_LOCK_FILTER", Flag, ALL).at(Last),
];
