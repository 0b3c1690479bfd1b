//! Unix sockets (unix(7)).
//!
//! ckpt-sk completes them ([`complete`]; see [`super::socket`]), ckpt-restore makes them again ([`restore`]).
//!
//! **What the kernel tells.** One sock_diag(7) dump has state, names, peers and queue lengths of all
//! sockets. Options come from getsockopt(2) on a copy of the descriptor, and queues by MSG_PEEK, which
//! takes nothing. A stream is peeked as a whole, by one call. Of messages a peek shows the first one
//! only, unless `SO_PEEK_OFF` is set, and there is no other way to the second one. So it is set on the
//! target's socket for the microseconds that this takes, and a small child process of ckpt-sk puts
//! it back if ckpt-sk is killed meanwhile ([`ckpt_sys::sock::LentOption`]). The child has ckpt-sk's
//! connection to ckpt-scan open too, so that the hold ends, and the tree runs on, only after that. A
//! message of no bytes behind others can be peeked once in its life: a second checkpoint does not
//! see it, but sees that memory is taken by something, and looks into the kernel's ([`super::Look`]).
//!
//! **What it does not tell.** A connection that has not been accepted yet has a socket on its far side that
//! nobody has a descriptor of. If its client is outside the tree it is passed over: under load
//! there is always one, as clients go on connecting while the tree stands still, and the server has
//! not seen it. If its client is in the tree it is made again, and sends again what it had sent. The only call that reaches
//! that queue is accept(2), which takes the connection out of the backlog of a tree that may run on; so it is read
//! from the kernel's memory, or refused where that can't be looked into.

pub mod complete;
mod in_flight;
mod queue;
mod restore;

use ckpt_proto::types::{FdTypes, FileEntry};
use ckpt_sys::{FileId, Pid, SocketId, sock};

use super::{Descriptor, FileTable, socket};
use crate::Sink;

pub(super) use complete::complete;
pub(super) use in_flight::Pending as InFlight;
pub(super) use restore::{Sockets, restore, settle};

/// `state`: connected, or a datagram socket with a default peer.
const ESTABLISHED: u8 = 1;
/// `state`: neither connected nor listening.
const CLOSE: u8 = 7;
/// `state`: listening.
const LISTEN: u8 = 10;
/// `uflags`: the peer is outside the checkpoint.
const EXTERNAL: u32 = 1;

/// Connections that the user allowed to lead outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalSocket {
    /// Which ones.
    pub which: Which,
    /// Where it is to be connected at restore, as in `sun_path` (an abstract name begins with NUL).
    pub path: Option<Vec<u8>>,
}

/// What a connection that leads outside is called by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The end inside the tree.
    Id(SocketId),
    /// The address of either end, as in `sun_path`.
    Name(Vec<u8>),
    /// Somebody who has the other end open.
    PeerPid(Pid),
    /// All that lead outside, if any do.
    All,
}

impl std::fmt::Display for Which {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Name(name) => write!(f, "path={}", shown(name)),
            Self::PeerPid(pid) => write!(f, "peer-pid={pid}"),
            Self::All => f.write_str("all"),
        }
    }
}

impl ExternalSocket {
    /// Reads `ID[:PATH]`, `path=PATH`, `peer-pid=PID` or `all`; ID may be spelled `unix[ID]` or
    /// `socket:[ID]`, and a PATH that begins with `@` is an abstract name.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let any = |which| Some(Self { which, path: None });
        if text == b"all" {
            return any(Which::All);
        }
        if let Some(path) = text.strip_prefix(b"path=") {
            return any(Which::Name(parse_name(path)?));
        }
        if let Some(pid) = text.strip_prefix(b"peer-pid=") {
            let pid = std::str::from_utf8(pid).ok()?.parse().ok().filter(|&pid: &i32| pid > 0)?;
            return any(Which::PeerPid(Pid(pid)));
        }
        let (id, path) = match text.iter().position(|&b| b == b']') {
            Some(end) if !text.first()?.is_ascii_digit() => {
                let (id, rest) = text.split_at(end + 1);
                match rest {
                    [] => (id, None),
                    [b':', path @ ..] => (id, Some(path)),
                    _ => return None,
                }
            }
            _ => match text.iter().position(|&b| b == b':') {
                Some(colon) => (text.get(..colon)?, text.get(colon + 1..)),
                None => (text, None),
            },
        };
        let which = Which::Id(sock::parse_id(std::str::from_utf8(id).ok()?)?);
        let path = match path {
            Some(path) => Some(parse_name(path)?),
            None => None,
        };
        Some(Self { which, path })
    }

    /// Whether this means the connection of socket `id`, whose ends have these addresses and whose other end
    /// these processes have open.
    pub fn means(&self, id: u64, names: [&[u8]; 2], peers: &[Pid]) -> bool {
        match &self.which {
            Which::Id(wanted) => wanted.0 == id,
            Which::Name(name) => names.iter().any(|n| !n.is_empty() && sock::trim_path(n) == name),
            Which::PeerPid(pid) => peers.contains(pid),
            Which::All => true,
        }
    }
}

/// An address as people write it: a path, or an abstract name with `@` in front. `None` if it is empty.
#[must_use]
pub fn parse_name(text: &[u8]) -> Option<Vec<u8>> {
    match text {
        [] => None,
        [b'@', name @ ..] => Some([&[0], name].concat()),
        path => Some(path.to_vec()),
    }
}

/// The name of a type of socket.
#[must_use]
pub fn kind_name(kind: i32) -> &'static str {
    match kind {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => "unknown",
    }
}

/// A name for people: `@abstract`, a path, or nothing.
#[must_use]
pub fn shown(name: &[u8]) -> String {
    match sock::trim_path(name).split_first() {
        Some((0, rest)) => format!("@{}", rest.escape_ascii()),
        _ => sock::trim_path(name).escape_ascii().to_string(),
    }
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.domain() == Some(libc::AF_UNIX)
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    in_flight::dump(table, d, socket::dump(d, id, FdTypes::Unixsk)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_ids_in_all_spellings() {
        let parse = |text: &str| ExternalSocket::parse(text.as_bytes());
        let id = || Which::Id(SocketId(48213));
        let plain = Some(ExternalSocket { which: id(), path: None });
        assert_eq!(parse("48213"), plain);
        assert_eq!(parse("unix[48213]"), plain);
        assert_eq!(parse("socket:[48213]"), plain);
        let with = |path: &[u8]| Some(ExternalSocket { which: id(), path: Some(path.to_vec()) });
        assert_eq!(parse("48213:/run/b.sock"), with(b"/run/b.sock"));
        assert_eq!(parse("socket:[48213]:/run/b].sock"), with(b"/run/b].sock"));
        assert_eq!(parse("48213:@name"), with(b"\0name"));
        let any = |which| Some(ExternalSocket { which, path: None });
        assert_eq!(parse("path=/run/b.sock"), any(Which::Name(b"/run/b.sock".to_vec())));
        assert_eq!(parse("path=@b"), any(Which::Name(b"\0b".to_vec())));
        assert_eq!(parse("peer-pid=12"), any(Which::PeerPid(Pid(12))));
        assert_eq!(parse("all"), any(Which::All));
        for text in
            ["", "x", "48213:", "unix[48213", "unix[48213]x", ":/run", "path=", "peer-pid=0", "peer-pid="]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
