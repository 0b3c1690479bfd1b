//! Sockets as users see and name them: kinds, states, addresses, and the words that choose some of
//! them (`path=/run/a.sock`, `kind=tcp`).
//!
//! The tools that edit and list sockets share these words, whether they read a live tree or a stream.
//! [`View::of`] reads any socket's entry of `files.img`; nothing here needs a kernel.

mod matching;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ckpt_proto::types::{
    ExternalSocket, FileEntry, InetSkEntry, NetlinkSkEntry, PacketSockEntry, SocketStub, UnixSkEntry,
    external_socket::PolicyKind,
};

pub use matching::{Holder, Match, split};

/// Longest `sun_path` (unix(7)).
pub const MAX_PATH: usize = 108;

/// A unix socket's address as in `sun_path`: a file's path, or an abstract name, which begins with NUL and is
/// shown with `@` instead.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketPath(Vec<u8>);

impl SocketPath {
    /// From what the images have: a path may be followed by a NUL there.
    #[must_use]
    pub fn from_image(name: &[u8]) -> Self {
        let end = match name.split_first() {
            None | Some((0, _)) => name.len(),
            Some(_) => name.iter().position(|&b| b == 0).unwrap_or(name.len()),
        };
        Self(name.get(..end).unwrap_or_default().to_vec())
    }

    /// From what a user writes.
    ///
    /// # Errors
    /// Empty, or too long for a socket address.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let path = match text.split_first() {
            None => return Err("the path is empty".to_owned()),
            Some((b'@', name)) => [&[0], name].concat(),
            Some(_) => text.to_vec(),
        };
        let path = Self(path);
        path.check()?;
        Ok(path)
    }

    /// Whether it fits into a socket address; one in the file system needs room for its end.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self) -> Result<(), String> {
        let limit = if self.is_abstract() { MAX_PATH } else { MAX_PATH - 1 };
        if self.0.contains(&0) && !self.is_abstract() {
            return Err("the path has a NUL in it".to_owned());
        }
        match self.0.len() {
            len if len > limit => Err(format!("the path has {len} bytes, a socket address at most {limit}")),
            _ => Ok(()),
        }
    }

    /// As in `sun_path`, without a NUL at the end of a path.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Not in the file system.
    #[must_use]
    pub fn is_abstract(&self) -> bool {
        self.0.first() == Some(&0)
    }

    /// No address at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for SocketPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.split_first() {
            Some((0, name)) => write!(f, "@{}", name.escape_ascii()),
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

/// `TCP_ESTABLISHED`, which other families use for "connected".
pub const ESTABLISHED: u32 = 1;
/// `TCP_CLOSE`: neither connected nor listening.
pub const CLOSE: u32 = 7;
/// `TCP_LISTEN`.
pub const LISTEN: u32 = 10;

/// The kind of a socket by the three numbers of socket(2).
#[must_use]
pub fn kind(domain: i32, kind: i32, protocol: i32) -> &'static str {
    match (domain, kind, protocol) {
        (libc::AF_UNIX, libc::SOCK_STREAM, _) => "unix-stream",
        (libc::AF_UNIX, libc::SOCK_DGRAM, _) => "unix-dgram",
        (libc::AF_UNIX, libc::SOCK_SEQPACKET, _) => "unix-seqpacket",
        (libc::AF_INET, libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP) => "tcp",
        (libc::AF_INET6, libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP) => "tcp6",
        (libc::AF_INET, libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP) => "udp",
        (libc::AF_INET6, libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP) => "udp6",
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE) => "udplite",
        (libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE) => "udplite6",
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP) => "icmp",
        (libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6) => "icmp6",
        (libc::AF_INET, libc::SOCK_RAW, _) => "raw",
        (libc::AF_INET6, libc::SOCK_RAW, _) => "raw6",
        (libc::AF_PACKET, ..) => "packet",
        (libc::AF_NETLINK, ..) => "netlink",
        _ => "unknown",
    }
}

/// The words that [`kind`] answers, but for the last one; `unix`, and `tcp4` and the like, are groups of them.
pub const KINDS: [&str; 15] = [
    "unix-stream",
    "unix-dgram",
    "unix-seqpacket",
    "tcp",
    "tcp6",
    "udp",
    "udp6",
    "udplite",
    "udplite6",
    "icmp",
    "icmp6",
    "raw",
    "raw6",
    "packet",
    "netlink",
];

/// What a state is called (include/net/tcp_states.h).
#[must_use]
pub fn state(kind: &str, state: u32) -> &'static str {
    match (state, kind.starts_with("tcp")) {
        (ESTABLISHED, true) => "established",
        (ESTABLISHED, false) => "connected",
        (2, _) => "syn-sent",
        (3 | 12, _) => "syn-received",
        (4, _) => "fin-wait-1",
        (5, _) => "fin-wait-2",
        (6, _) => "time-wait",
        (CLOSE, true) => "closed",
        (8, _) => "close-wait",
        (9, _) => "last-ack",
        (LISTEN, _) => "listening",
        (11, _) => "closing",
        _ => "unconnected",
    }
}

/// One side of an inet socket, from address words and port of the images.
#[must_use]
pub fn address(words: &[u32], port: u32) -> Option<SocketAddr> {
    let port = u16::try_from(port).ok()?;
    let ip = match *words {
        [word] => IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes())),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (to, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// The address words of the images.
#[must_use]
pub fn words(ip: IpAddr) -> Vec<u32> {
    let word = |bytes: &[u8]| match *bytes {
        [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]),
        _ => 0,
    };
    match ip {
        IpAddr::V4(ip) => vec![word(&ip.octets())],
        IpAddr::V6(ip) => ip.octets().chunks_exact(4).map(word).collect(),
    }
}

/// An address, or nothing for a socket that has none.
#[must_use]
pub fn shown_address(address: Option<SocketAddr>) -> String {
    match address {
        Some(address) if address.port() != 0 || !address.ip().is_unspecified() => address.to_string(),
        _ => String::new(),
    }
}

/// A socket of the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Its inode, the ID of the tools' options; packet sockets have none in the images.
    pub id: Option<u64>,
    /// Number of its entry.
    pub file_id: u32,
    /// One of [`KINDS`].
    pub kind: &'static str,
    /// Its state, in words.
    pub state: &'static str,
    /// What it is bound to: a path or name, or an address; empty if nothing.
    pub local: String,
    /// What its peer is bound to.
    pub peer: String,
    /// Inode of its peer, of a unix socket.
    pub peer_id: Option<u64>,
    /// Unix: what it is bound to.
    pub path: SocketPath,
    /// Unix: the names that its peer goes by: the one it had, and the one to connect to.
    pub peer_paths: Vec<SocketPath>,
    /// Who held its peer at dump time: pid and command.
    pub peer_holder: Option<(u32, String)>,
    /// Inet: both sides.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// What a restore does about its peer, in words; empty if nothing special.
    pub policy: String,
    /// ckpt-sk has not completed it yet.
    pub stub: bool,
}

impl View {
    /// The socket in an entry of `files.img`, if it is one.
    #[must_use]
    pub fn of(file: &FileEntry) -> Option<Self> {
        if let Some(stub) = &file.ckpt_stub {
            return Some(Self::stub(stub, file.id));
        }
        if let Some(socket) = &file.usk {
            return Some(Self::unix(socket, file.id));
        }
        if let Some(socket) = &file.isk {
            return Some(Self::inet(socket, file.id));
        }
        if let Some(socket) = &file.psk {
            return Some(Self::packet(socket, file.id));
        }
        file.nlsk.as_ref().map(|socket| Self::netlink(socket, file.id))
    }

    fn empty(id: Option<u64>, file_id: u32, kind: &'static str, state: &'static str) -> Self {
        Self {
            id,
            file_id,
            kind,
            state,
            local: String::new(),
            peer: String::new(),
            peer_id: None,
            path: SocketPath(Vec::new()),
            peer_paths: Vec::new(),
            peer_holder: None,
            addresses: None,
            policy: String::new(),
            stub: false,
        }
    }

    fn stub(stub: &SocketStub, file_id: u32) -> Self {
        let [domain, r#type, protocol] = [stub.domain, stub.r#type, stub.protocol].map(u32::cast_signed);
        let kind = kind(domain, r#type, protocol);
        Self { stub: true, ..Self::empty(Some(stub.ino), file_id, kind, "not read yet") }
    }

    fn unix(socket: &UnixSkEntry, file_id: u32) -> Self {
        let kind = kind(libc::AF_UNIX, socket.r#type.cast_signed(), 0);
        let external = socket.ckpt_external.as_ref();
        let state = match (socket.state, socket.peer) {
            (ESTABLISHED, 0) if external.is_none() => "closed by peer",
            (state, _) => crate::state(kind, state),
        };
        let path = SocketPath::from_image(&socket.name);
        let peer_paths: Vec<_> = (external.iter())
            .flat_map(|e| [&e.peer_name, &e.path])
            .flatten()
            .map(|name| SocketPath::from_image(name))
            .filter(|path| !path.is_empty())
            .collect();
        let holder = external.and_then(|e| {
            let comm = e.peer_comm.clone().unwrap_or_default();
            Some((e.peer_pid?, comm.escape_ascii().to_string()))
        });
        Self {
            local: path.to_string(),
            peer: peer_paths.first().map(ToString::to_string).unwrap_or_default(),
            peer_id: (socket.peer != 0).then_some(u64::from(socket.peer)),
            path,
            peer_paths,
            peer_holder: holder,
            policy: external.map(policy).unwrap_or_default(),
            ..Self::empty(Some(u64::from(socket.ino)), file_id, kind, state)
        }
    }

    fn inet(socket: &InetSkEntry, file_id: u32) -> Self {
        let [family, r#type, proto] = [socket.family, socket.r#type, socket.proto].map(u32::cast_signed);
        let kind = kind(family, r#type, proto);
        let local = address(&socket.src_addr, socket.src_port);
        let remote = address(&socket.dst_addr, socket.dst_port);
        Self {
            local: shown_address(local),
            peer: shown_address(remote),
            addresses: local.zip(remote),
            ..Self::empty(Some(u64::from(socket.ino)), file_id, kind, state(kind, socket.state))
        }
    }

    fn packet(socket: &PacketSockEntry, file_id: u32) -> Self {
        let interface = if socket.ifindex == 0 { String::new() } else { format!("if{}", socket.ifindex) };
        Self { local: interface, ..Self::empty(None, file_id, "packet", "unconnected") }
    }

    fn netlink(socket: &NetlinkSkEntry, file_id: u32) -> Self {
        let state = if socket.dst_portid != 0 || socket.dst_group != 0 { "connected" } else { "unconnected" };
        let port = |port: u32| if port == 0 { String::new() } else { format!("port {port}") };
        Self {
            local: port(socket.portid),
            peer: port(socket.dst_portid),
            ..Self::empty(Some(u64::from(socket.ino)), file_id, "netlink", state)
        }
    }

    /// One line: kind, state, addresses, policy.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("{}, {}", self.kind, self.state);
        if !self.local.is_empty() {
            text.push_str(&format!(", bound to {}", self.local));
        }
        match (self.peer_id, self.peer.as_str()) {
            (None, "") => {}
            (Some(id), "") => text.push_str(&format!(", peer {id}")),
            (None, peer) => text.push_str(&format!(", peer {peer}")),
            (Some(id), peer) => text.push_str(&format!(", peer {id} {peer}")),
        }
        if !self.policy.is_empty() {
            text.push_str(&format!(", {}", self.policy));
        }
        text
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> String {
        self.id.map_or_else(|| format!("of file {}", self.file_id), |id| id.to_string())
    }
}

/// What a restore does about a peer that is outside.
fn policy(external: &ExternalSocket) -> String {
    let path = |text: &str| {
        let path = external.path.as_ref().or(external.peer_name.as_ref()).map(|p| SocketPath::from_image(p));
        path.filter(|p| !p.is_empty()).map_or_else(|| text.to_owned(), |p| format!("{text} {p}"))
    };
    match external.policy() {
        PolicyKind::Connect => path("connects to"),
        PolicyKind::Inherit => "inherits a descriptor".to_owned(),
        PolicyKind::Accept => match &external.path {
            Some(own) => format!("accepts on {}", SocketPath::from_image(own)),
            None => "accepts on its own address".to_owned(),
        },
        PolicyKind::Close => "its peer is gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_images_and_on_command_lines() {
        assert_eq!(SocketPath::from_image(b"/run/a\0").bytes(), b"/run/a");
        assert_eq!(SocketPath::from_image(b"\0a\0b").bytes(), b"\0a\0b");
        assert_eq!(SocketPath::parse(b"@a").unwrap().bytes(), b"\0a");
        assert_eq!(SocketPath::parse(b"@a").unwrap().to_string(), "@a");
        assert!(SocketPath::parse(b"").is_err());
        assert!(SocketPath::parse(format!("/{}", "x".repeat(106)).as_bytes()).is_ok());
        assert!(SocketPath::parse(format!("/{}", "x".repeat(107)).as_bytes()).is_err());
    }

    #[test]
    fn addresses_there_and_back() {
        for text in ["127.0.0.1:80", "[::1]:443", "[::ffff:10.0.0.1]:0"] {
            let parsed: SocketAddr = text.parse().unwrap();
            assert_eq!(address(&words(parsed.ip()), parsed.port().into()), Some(parsed));
        }
        assert_eq!(address(&[1, 2], 80), None);
        assert_eq!(address(&[1], 70_000), None);
    }
}
