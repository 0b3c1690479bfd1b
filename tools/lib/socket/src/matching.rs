//! Choosing sockets: `[KEY=]VALUE`.
//!
//! | text | sockets |
//! | --- | --- |
//! | `48213`, `id=48213`, `unix[48213]`, `socket:[48213]` | the one with this inode |
//! | `path=/run/a.sock`, `path=@name` | unix sockets bound to it |
//! | `addr=127.0.0.1:80`, `addr=[::1]:80`, `addr=::1` | inet sockets bound to it; without a port, to any |
//! | `fd=4711/5`, `fd=4711/*` | what descriptor 5, or any, of process 4711 refers to |
//! | `peer=48214`, `peer=/run/b.sock`, `peer=10.0.0.1:80` | those whose other end is this |
//! | `peer-pid=4712` | unix connections to that process outside of the checkpoint |
//! | `kind=unix-stream`, `kind=unix`, `kind=tcp`, `kind=tcp4` | those of this kind |
//!
//! A match is often followed by `=` or `:` and something else. There `\` before a character of the match takes
//! it as it is: `path=/run/a\=b`.

use std::net::{IpAddr, SocketAddr};

use crate::{KINDS, SocketPath, View};

/// A process and a descriptor there that refers to a socket.
pub type Holder = (u32, u32);

/// Chooses sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// By inode.
    Id(u64),
    /// Bound to this path or name.
    Path(SocketPath),
    /// Bound to this address.
    Address(IpAddr, Option<u16>),
    /// A descriptor of a process, or any.
    Fd(u32, Option<u32>),
    /// The other end's inode.
    PeerId(u64),
    /// The other end's name.
    PeerPath(SocketPath),
    /// The other end's address.
    PeerAddress(IpAddr, Option<u16>),
    /// Who held the other end at dump time.
    PeerPid(u32),
    /// The kind, or a group of kinds.
    Kind(String),
}

impl std::fmt::Display for Match {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Path(path) => write!(f, "path={path}"),
            Self::Address(ip, port) => write!(f, "addr={}", shown(*ip, *port)),
            Self::Fd(pid, Some(fd)) => write!(f, "fd={pid}/{fd}"),
            Self::Fd(pid, None) => write!(f, "fd={pid}/*"),
            Self::PeerId(id) => write!(f, "peer={id}"),
            Self::PeerPath(path) => write!(f, "peer={path}"),
            Self::PeerAddress(ip, port) => write!(f, "peer={}", shown(*ip, *port)),
            Self::PeerPid(pid) => write!(f, "peer-pid={pid}"),
            Self::Kind(kind) => write!(f, "kind={kind}"),
        }
    }
}

fn shown(ip: IpAddr, port: Option<u16>) -> String {
    port.map_or_else(|| ip.to_string(), |port| SocketAddr::new(ip, port).to_string())
}

impl Match {
    /// Reads one. The text has no escapes any more ([`split`]).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("\"{}\" is no {what}", text.escape_ascii()));
        let key = KEYS.iter().find_map(|key| Some((*key, text.strip_prefix(key.as_bytes())?)));
        let Some((key, value)) = key else {
            return match id(text) {
                Some(id) => Ok(Self::Id(id)),
                None => wrong(
                    "match: expected ID, unix[ID], id=ID, path=PATH, addr=ADDRESS, fd=PID/FD, peer=ID|PATH|ADDRESS, peer-pid=PID or kind=KIND",
                ),
            };
        };
        let as_text = std::str::from_utf8(value).unwrap_or_default();
        match key {
            "id=" => id(value).map_or_else(|| wrong("socket ID"), |id| Ok(Self::Id(id))),
            "path=" => SocketPath::parse(value).map(Self::Path),
            "addr=" => address(as_text).map_or_else(
                || wrong("address: expected IP, IP:PORT or [IPv6]:PORT"),
                |(ip, port)| Ok(Self::Address(ip, port)),
            ),
            "fd=" => {
                let parsed = as_text.split_once('/').and_then(|(pid, fd)| {
                    let fd = if fd == "*" { None } else { Some(fd.parse().ok()?) };
                    Some(Self::Fd(pid.parse().ok()?, fd))
                });
                parsed.map_or_else(|| wrong("descriptor: expected PID/FD or PID/*"), Ok)
            }
            "peer-pid=" => as_text.parse().map_or_else(|_| wrong("process id"), |pid| Ok(Self::PeerPid(pid))),
            "peer=" => match (id(value), address(as_text)) {
                (Some(id), _) => Ok(Self::PeerId(id)),
                (_, Some((ip, port))) => Ok(Self::PeerAddress(ip, port)),
                _ => SocketPath::parse(value).map(Self::PeerPath),
            },
            _ => {
                let kind = as_text.to_owned();
                let known = KINDS.iter().any(|known| is_kind(known, &kind));
                if known { Ok(Self::Kind(kind)) } else { wrong(&format!("kind: {}", KINDS.join(", "))) }
            }
        }
    }

    /// Whether it chooses this socket, which these descriptors refer to. `peer` is the other end, if it is
    /// in the checkpoint too.
    #[must_use]
    pub fn is(&self, socket: &View, holders: &[Holder], peer: Option<&View>) -> bool {
        let side = |of: Option<SocketAddr>, ip: IpAddr, port: Option<u16>| {
            of.is_some_and(|a| {
                a.ip().to_canonical() == ip.to_canonical() && port.is_none_or(|port| port == a.port())
            })
        };
        match self {
            Self::Id(id) => socket.id == Some(*id),
            Self::Path(path) => socket.path == *path,
            Self::Address(ip, port) => side(socket.addresses.map(|(local, _)| local), *ip, *port),
            Self::Fd(pid, fd) => {
                holders.iter().any(|&(p, holder)| p == *pid && fd.is_none_or(|fd| fd == holder))
            }
            Self::PeerId(id) => socket.peer_id == Some(*id),
            Self::PeerPath(path) => {
                socket.peer_paths.contains(path) || peer.is_some_and(|peer| peer.path == *path)
            }
            Self::PeerAddress(ip, port) => {
                let remote = socket.addresses.map(|(_, remote)| remote).filter(|remote| remote.port() != 0);
                side(remote, *ip, *port)
            }
            Self::PeerPid(pid) => socket.peer_holder.as_ref().is_some_and(|(holder, _)| holder == pid),
            Self::Kind(kind) => is_kind(socket.kind, kind),
        }
    }
}

const KEYS: [&str; 7] = ["id=", "path=", "addr=", "fd=", "peer=", "peer-pid=", "kind="];

/// `unix` is every unix socket, `tcp` both IP versions, `tcp4` and `tcp6` one.
fn is_kind(of: &str, wanted: &str) -> bool {
    let base = of.strip_suffix('6').unwrap_or(of);
    of == wanted
        || base == wanted
        || (base == of && !of.starts_with("unix") && wanted.strip_suffix('4') == Some(of))
        || (wanted == "unix" && of.starts_with("unix-"))
}

fn id(text: &[u8]) -> Option<u64> {
    let bare = ["unix[", "socket:["]
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix.as_bytes())?.strip_suffix(b"]"))
        .unwrap_or(text);
    // parse() would take a sign.
    let digits = bare.first().is_some_and(u8::is_ascii_digit);
    std::str::from_utf8(bare).ok().filter(|_| digits)?.parse().ok()
}

fn address(text: &str) -> Option<(IpAddr, Option<u16>)> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip(), Some(address.port())));
    }
    text.parse().ok().map(|ip| (ip, None))
}

/// Splits a text at the first `separator` that is not part of the match's key, of brackets or escaped;
/// the part before comes without escapes, the part behind as it is.
#[must_use]
pub fn split(text: &[u8], separator: u8) -> (Vec<u8>, Option<&[u8]>) {
    let key = KEYS.iter().find(|key| text.starts_with(key.as_bytes())).map_or(0, |key| key.len());
    let mut before = text.get(..key).unwrap_or_default().to_vec();
    let mut at = key;
    let mut bracket = text
        .get(key..)
        .is_some_and(|rest| [&b"unix["[..], b"socket:[", b"["].iter().any(|open| rest.starts_with(open)));
    while let Some(&byte) = text.get(at) {
        match (byte, text.get(at + 1)) {
            (b'\\', Some(&escaped)) => {
                before.push(escaped);
                at += 2;
                continue;
            }
            (b']', _) => bracket = false,
            _ if byte == separator && !bracket => return (before, text.get(at + 1..)),
            _ => {}
        }
        before.push(byte);
        at += 1;
    }
    (before, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Match {
        Match::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn all_forms_are_read_and_shown() {
        for id in ["48213", "unix[48213]", "socket:[48213]", "id=48213", "id=unix[48213]"] {
            assert_eq!(parse(id), Match::Id(48213));
        }
        for text in [
            "path=/run/a.sock",
            "path=@name",
            "addr=127.0.0.1:80",
            "addr=[::1]:80",
            "addr=::1",
            "fd=4711/5",
            "fd=4711/*",
            "peer=7",
            "peer=/run/b",
            "peer=@b",
            "peer=10.0.0.1:80",
            "peer-pid=4712",
            "kind=unix-stream",
            "kind=unix",
            "kind=tcp4",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
        assert_eq!(parse("peer=unix[7]"), Match::PeerId(7));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "", "x", "-1", "+1", "unix[1", "id=x", "path=", "addr=x", "fd=1", "fd=x/1", "kind=x", "peer=",
            "key=1",
        ] {
            assert!(Match::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn what_follows_is_split_off() {
        let split = |text: &'static str, at| {
            let (before, after) = super::split(text.as_bytes(), at);
            (String::from_utf8(before).unwrap(), after.map(|a| std::str::from_utf8(a).unwrap()))
        };
        for (text, at, before, after) in [
            ("1=/a=b", b'=', "1", Some("/a=b")),
            ("path=/a=/b", b'=', "path=/a", Some("/b")),
            (r"path=/a\=b=/c", b'=', "path=/a=b", Some("/c")),
            ("path=/a", b'=', "path=/a", None),
            ("socket:[7]:/b:c", b':', "socket:[7]", Some("/b:c")),
            ("id=socket:[7]:/b", b':', "id=socket:[7]", Some("/b")),
            (r"path=/a\:b:/c", b':', "path=/a:b", Some("/c")),
            ("addr=[::1]:80", b'=', "addr=[::1]:80", None),
        ] {
            assert_eq!(split(text, at), (before.to_owned(), after), "{text}");
        }
    }

    #[test]
    fn kinds_and_their_groups() {
        for (of, wanted, is) in [
            ("tcp", "tcp", true),
            ("tcp6", "tcp", true),
            ("tcp", "tcp4", true),
            ("tcp6", "tcp4", false),
            ("tcp", "tcp6", false),
            ("unix-stream", "unix", true),
            ("unix-stream", "unix-dgram", false),
            ("udplite", "udp", false),
            ("packet", "packet", true),
        ] {
            assert_eq!(is_kind(of, wanted), is, "{of} {wanted}");
        }
    }
}
