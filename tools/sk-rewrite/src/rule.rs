//! What is to be done to which socket, as the command line says it.

use std::{ffi::OsString, os::unix::ffi::OsStrExt};

use ckpt_proto::types::{ExternalSocket, UnixSkEntry, external_socket::PolicyKind};
use ckpt_sys::SocketId;

/// Longest `sun_path` (unix(7)).
const MAX_PATH: usize = 108;

/// A socket address as in `sun_path`: a file's path, or a name that begins with NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketPath(pub Vec<u8>);

impl std::fmt::Display for SocketPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.split_first() {
            Some((0, name)) => write!(f, "@{}", name.escape_ascii()),
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

fn parse_path(bytes: &[u8]) -> Result<SocketPath, String> {
    let path = match bytes.split_first() {
        None => return Err("the path is empty".to_owned()),
        Some((b'@', name)) => [&[0], name].concat(),
        Some(_) => bytes.to_vec(),
    };
    // A path in the file system needs room for its end.
    let limit = if path.first() == Some(&0) { MAX_PATH } else { MAX_PATH - 1 };
    if path.len() > limit {
        return Err(format!("the path has {} bytes, a socket address at most {limit}", path.len()));
    }
    Ok(SocketPath(path))
}

/// `48213`, `unix[48213]` or `socket:[48213]`.
fn parse_id(bytes: &[u8]) -> Result<SocketId, String> {
    let bare = ["unix[", "socket:["]
        .iter()
        .find_map(|prefix| bytes.strip_prefix(prefix.as_bytes())?.strip_suffix(b"]"))
        .unwrap_or(bytes);
    std::str::from_utf8(bare).ok().and_then(|id| id.parse().ok()).ok_or_else(|| {
        format!(
            "\"{}\" is no socket ID: it is the number in socket:[ID] of /proc/PID/fd",
            bytes.escape_ascii()
        )
    })
}

/// What is done to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// Its connection is made again by connecting to this address.
    Connect(SocketPath),
    /// Its connection is handed to `ckpt-restore`.
    Inherit,
    /// Its peer is not part of the checkpoint; how to connect is decided later, or by its peer's name.
    External,
    /// Its peer has closed the connection.
    Close,
    /// What it has received but not read is forgotten.
    DropQueues,
}

/// An edit of one socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Which socket.
    pub id: SocketId,
    /// What is done to it.
    pub edit: Edit,
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id = self.id;
        match &self.edit {
            Edit::Connect(path) => write!(f, "--connect {id}={path}"),
            Edit::Inherit => write!(f, "--inherit {id}"),
            Edit::External => write!(f, "--external {id}"),
            Edit::Close => write!(f, "--close {id}"),
            Edit::DropQueues => write!(f, "--drop-queues {id}"),
        }
    }
}

/// Parses `ID=PATH`.
///
/// # Errors
/// What is wrong with it.
pub fn connect(text: OsString) -> Result<Rule, String> {
    let bytes = text.as_bytes();
    let equals = bytes.iter().position(|&b| b == b'=').ok_or("it should be ID=PATH")?;
    let id = parse_id(&bytes[..equals])?;
    Ok(Rule { id, edit: Edit::Connect(parse_path(&bytes[equals + 1..])?) })
}

/// Parses `ID[:PATH]`.
///
/// # Errors
/// What is wrong with it.
pub fn external(text: OsString) -> Result<Rule, String> {
    let bytes = text.as_bytes();
    // `socket:[ID]` has a colon of its own.
    let from = bytes.iter().position(|&b| b == b']').unwrap_or(0);
    match bytes.iter().skip(from).position(|&b| b == b':').map(|at| at + from) {
        Some(colon) => {
            let id = parse_id(&bytes[..colon])?;
            Ok(Rule { id, edit: Edit::Connect(parse_path(&bytes[colon + 1..])?) })
        }
        None => Ok(Rule { id: parse_id(bytes)?, edit: Edit::External }),
    }
}

/// Parses `ID`.
///
/// # Errors
/// What is wrong with it.
pub fn inherit(text: OsString) -> Result<Rule, String> {
    Ok(Rule { id: parse_id(text.as_bytes())?, edit: Edit::Inherit })
}

/// Parses `ID`.
///
/// # Errors
/// What is wrong with it.
pub fn close(text: OsString) -> Result<Rule, String> {
    Ok(Rule { id: parse_id(text.as_bytes())?, edit: Edit::Close })
}

/// Parses `ID`.
///
/// # Errors
/// What is wrong with it.
pub fn drop_queues(text: OsString) -> Result<Rule, String> {
    Ok(Rule { id: parse_id(text.as_bytes())?, edit: Edit::DropQueues })
}

impl Edit {
    /// How the connection of `socket` is made again after this edit; `None` if the edit is not about that.
    #[must_use]
    pub fn policy(&self, socket: &UnixSkEntry) -> Option<ExternalSocket> {
        let before = socket.ckpt_external.clone().unwrap_or_default();
        let (policy, path) = match self {
            Self::Connect(path) => (PolicyKind::Connect, Some(path.0.clone())),
            Self::Inherit => (PolicyKind::Inherit, None),
            Self::Close => (PolicyKind::Close, None),
            // To the name that its peer had, else only a connection handed in can do.
            Self::External if before.peer_name.as_ref().is_some_and(|name| !name.is_empty()) => {
                (PolicyKind::Connect, None)
            }
            Self::External => (PolicyKind::Inherit, None),
            Self::DropQueues => return None,
        };
        Some(ExternalSocket { policy: policy.into(), path, ..before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(bytes: &[u8]) -> Edit {
        Edit::Connect(SocketPath(bytes.to_vec()))
    }

    #[test]
    fn ids_in_all_spellings() {
        for id in ["48213", "unix[48213]", "socket:[48213]"] {
            assert_eq!(connect(format!("{id}=/run/b.sock").into()).unwrap().id, SocketId(48213));
            assert_eq!(external(format!("{id}:/b:c").into()).unwrap().edit, path(b"/b:c"));
            assert_eq!(external(id.into()).unwrap(), Rule { id: SocketId(48213), edit: Edit::External });
            assert_eq!(close(id.into()).unwrap().id, SocketId(48213));
        }
    }

    #[test]
    fn an_at_sign_is_an_abstract_name() {
        let rule = connect("1=@name".into()).unwrap();
        assert_eq!(rule.edit, path(b"\0name"));
        assert_eq!(rule.to_string(), "--connect 1=@name");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "x", "1", "1=", "=x", "unix[1=x", "-1=x", "1 =x"] {
            assert!(connect(text.into()).is_err(), "{text}");
        }
        assert!(connect(format!("1=/{}", "x".repeat(107)).into()).is_err());
        assert!(connect(format!("1=/{}", "x".repeat(106)).into()).is_ok());
        for text in ["", "x", "unix[1", "socket:[1]x", "1:"] {
            assert!(external(text.into()).is_err(), "{text}");
        }
    }
}
