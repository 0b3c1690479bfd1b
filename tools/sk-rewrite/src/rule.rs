//! What is to be done, as the command line or a file of rules says it.
//!
//! A rule is either about sockets that it chooses ([`Match`]), or about a name, address or port wherever
//! it occurs. The second form takes no match because the two ends of a connection must change together.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use anyhow::Context;
use ckpt_cli::UsageError;
use ckpt_proto::types::{ExternalSocket, UnixSkEntry, external_socket::PolicyKind};
use ckpt_socket::{Match, SocketPath, split};
use clap::builder::{OsStringValueParser, TypedValueParser};

/// What is done to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// Its connection is made again by connecting to this address.
    Connect(SocketPath),
    /// Its connection is made again by a client that connects to this address, or to its own.
    Accept(Option<SocketPath>),
    /// Its connection is handed to `ckpt-restore`.
    Inherit,
    /// Its peer is not part of the checkpoint: connected to its peer's name, or handed in if that has none.
    External,
    /// Its peer has closed the connection.
    Close,
    /// What it has received but not read is forgotten.
    DropQueues,
    /// An option gets a value.
    SetOption {
        /// As in setsockopt(2), or the name of a field.
        name: String,
        /// A number, a word for a switch, a device.
        value: String,
    },
}

impl Edit {
    /// Whether it says what becomes of the connection; a socket can have one such edit.
    #[must_use]
    pub fn is_policy(&self) -> bool {
        !matches!(self, Self::DropQueues | Self::SetOption { .. })
    }

    /// How the connection of `socket` is made again after this edit; `None` if the edit is not about that.
    #[must_use]
    pub fn policy(&self, socket: &UnixSkEntry) -> Option<ExternalSocket> {
        let before = socket.ckpt_external.clone().unwrap_or_default();
        let (policy, path) = match self {
            Self::Connect(path) => (PolicyKind::Connect, Some(path.bytes().to_vec())),
            Self::Accept(path) => (PolicyKind::Accept, path.as_ref().map(|p| p.bytes().to_vec())),
            Self::Inherit => (PolicyKind::Inherit, None),
            Self::Close => (PolicyKind::Close, None),
            // To the name that its peer had, else only a connection handed in can do.
            Self::External if before.peer_name.as_ref().is_some_and(|name| !name.is_empty()) => {
                (PolicyKind::Connect, None)
            }
            Self::External => (PolicyKind::Inherit, None),
            Self::DropQueues | Self::SetOption { .. } => return None,
        };
        Some(ExternalSocket { policy: policy.into(), path, ..before })
    }
}

/// A name, address or port that becomes another one everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A unix socket's path or name. If both end in `/`, everything below.
    Rename(SocketPath, SocketPath),
    /// An IP address, or one with a port.
    Address((IpAddr, Option<u16>), (IpAddr, Option<u16>)),
    /// A TCP or UDP port of any address.
    Port(u16, u16),
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// About some sockets.
    Sockets(Match, Edit),
    /// About all that have something.
    All(Change),
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |(ip, port): &(IpAddr, Option<u16>)| {
            port.map_or_else(|| ip.to_string(), |port| SocketAddr::new(*ip, port).to_string())
        };
        match self {
            Self::Sockets(what, edit) => match edit {
                Edit::Connect(path) => write!(f, "--connect {what}={path}"),
                Edit::Accept(Some(path)) => write!(f, "--accept {what}={path}"),
                Edit::Accept(None) => write!(f, "--accept {what}"),
                Edit::Inherit => write!(f, "--inherit {what}"),
                Edit::External => write!(f, "--external {what}"),
                Edit::Close => write!(f, "--close {what}"),
                Edit::DropQueues => write!(f, "--drop-queues {what}"),
                Edit::SetOption { name, value } => write!(f, "--set-opt {what}:{name}={value}"),
            },
            Self::All(Change::Rename(old, new)) => write!(f, "--rename {old}={new}"),
            Self::All(Change::Address(old, new)) => write!(f, "--addr {}={}", shown(old), shown(new)),
            Self::All(Change::Port(old, new)) => write!(f, "--port {old}={new}"),
        }
    }
}

type Parse = fn(&[u8]) -> Result<Rule, String>;

/// The words of options and of files of rules.
const WORDS: [(&str, Parse); 10] = [
    ("connect", connect),
    ("accept", accept),
    ("inherit", |text| only_match(text, Edit::Inherit)),
    ("external", external),
    ("close", |text| only_match(text, Edit::Close)),
    ("drop-queues", |text| only_match(text, Edit::DropQueues)),
    ("set-opt", set_option),
    ("rename", rename),
    ("addr", readdress),
    ("port", port),
];

/// The parser of an option's value.
pub(crate) fn value_parser(word: &'static str) -> impl TypedValueParser<Value = Rule> {
    OsStringValueParser::new().try_map(move |text: OsString| parse(word, text.as_bytes()))
}

fn parse(word: &str, value: &[u8]) -> Result<Rule, String> {
    let parse = WORDS.iter().find(|(known, _)| *known == word).map(|(_, parse)| parse);
    parse.ok_or_else(|| {
        let known: Vec<_> = WORDS.iter().map(|(word, _)| *word).collect();
        format!("\"{word}\" is no rule; rules are {}", known.join(", "))
    })?(value)
}

/// Reads a file of rules: one a line, the word of an option (dashes are optional) and its value. Empty
/// lines and those that begin with `#` say nothing.
///
/// # Errors
/// The file's, or a line that is no rule ([`UsageError`]).
pub fn read_file(path: &Path) -> anyhow::Result<Vec<Rule>> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let mut rules = Vec::new();
    for (number, line) in text.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let end = line.iter().position(|b| b.is_ascii_whitespace() || *b == b'=').unwrap_or(line.len());
        let (word, value) = line.split_at(end);
        let word = String::from_utf8_lossy(word.strip_prefix(b"--").unwrap_or(word)).into_owned();
        let value = value.strip_prefix(b"=").unwrap_or(value).trim_ascii();
        let rule = parse(&word, value)
            .map_err(|what| UsageError(format!("{}, line {}: {what}", path.display(), number + 1)))?;
        rules.push(rule);
    }
    Ok(rules)
}

/// Splits `OLD=NEW`, or `MATCH=PATH`.
fn halves<'a>(text: &'a [u8], form: &str) -> Result<(Vec<u8>, &'a [u8]), String> {
    match split(text, b'=') {
        (before, Some(after)) => Ok((before, after)),
        _ => Err(format!("it should be {form}")),
    }
}

fn connect(text: &[u8]) -> Result<Rule, String> {
    let (what, path) = halves(text, "MATCH=PATH")?;
    Ok(Rule::Sockets(Match::parse(&what)?, Edit::Connect(SocketPath::parse(path)?)))
}

fn accept(text: &[u8]) -> Result<Rule, String> {
    let (what, path) = split(text, b'=');
    let path = path.map(SocketPath::parse).transpose()?;
    Ok(Rule::Sockets(Match::parse(&what)?, Edit::Accept(path)))
}

fn external(text: &[u8]) -> Result<Rule, String> {
    let (what, path) = split(text, b':');
    let edit = match path {
        Some(path) => Edit::Connect(SocketPath::parse(path)?),
        None => Edit::External,
    };
    Ok(Rule::Sockets(Match::parse(&what)?, edit))
}

fn only_match(text: &[u8], edit: Edit) -> Result<Rule, String> {
    // No argument has a NUL, so this only takes the escapes away.
    Ok(Rule::Sockets(Match::parse(&split(text, 0).0)?, edit))
}

fn set_option(text: &[u8]) -> Result<Rule, String> {
    // Addresses have colons, names of options have none.
    let form = || "it should be MATCH:OPTION=VALUE".to_owned();
    let colon = text.iter().rposition(|&b| b == b':').ok_or_else(form)?;
    let (what, option) = (text.get(..colon).ok_or_else(form)?, text.get(colon + 1..).ok_or_else(form)?);
    let (name, value) =
        std::str::from_utf8(option).ok().and_then(|option| option.split_once('=')).ok_or_else(form)?;
    if name.is_empty() || value.is_empty() {
        return Err(form());
    }
    let edit = Edit::SetOption { name: name.to_owned(), value: value.to_owned() };
    Ok(Rule::Sockets(Match::parse(&split(what, 0).0)?, edit))
}

fn rename(text: &[u8]) -> Result<Rule, String> {
    let (old, new) = halves(text, "OLD=NEW")?;
    let (old, new) = (SocketPath::parse(&old)?, SocketPath::parse(new)?);
    if old.bytes().ends_with(b"/") != new.bytes().ends_with(b"/") {
        return Err("either both paths end in / (everything below), or none".to_owned());
    }
    Ok(Rule::All(Change::Rename(old, new)))
}

fn readdress(text: &[u8]) -> Result<Rule, String> {
    let (old, new) = halves(text, "OLD=NEW")?;
    let read = |text: &[u8]| match Match::parse(&[b"addr=", text].concat()) {
        Ok(Match::Address(ip, port)) => Ok((ip.to_canonical(), port)),
        _ => Err(format!("\"{}\" is no address: expected IP, IP:PORT or [IPv6]:PORT", text.escape_ascii())),
    };
    let (old, new) = (read(&old)?, read(new)?);
    if old.0.is_ipv4() != new.0.is_ipv4() {
        return Err("one address is IPv4 and the other IPv6".to_owned());
    }
    if old.1.is_some() != new.1.is_some() {
        return Err("either both addresses have a port, or none".to_owned());
    }
    if old.1 == Some(0) || new.1 == Some(0) {
        return Err("0 is no port".to_owned());
    }
    Ok(Rule::All(Change::Address(old, new)))
}

fn port(text: &[u8]) -> Result<Rule, String> {
    let (old, new) = halves(text, "OLD=NEW")?;
    let read = |text: &[u8]| {
        let port = std::str::from_utf8(text).ok().and_then(|port| port.parse().ok());
        port.filter(|&port| port != 0).ok_or_else(|| format!("\"{}\" is no port", text.escape_ascii()))
    };
    Ok(Rule::All(Change::Port(read(&old)?, read(new)?)))
}

/// The path after a renaming, if it is one of those renamed.
#[must_use]
pub fn renamed(path: &SocketPath, old: &SocketPath, new: &SocketPath) -> Option<SocketPath> {
    if !old.bytes().ends_with(b"/") {
        return (path == old).then(|| new.clone());
    }
    let rest = path.bytes().strip_prefix(old.bytes())?;
    Some(SocketPath::from_image(&[new.bytes(), rest].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(line: &str) -> Result<Rule, String> {
        let (word, value) = line.split_once(' ').unwrap_or((line, ""));
        parse(word, value.as_bytes())
    }

    #[test]
    fn rules_are_shown_as_they_are_written() {
        for line in [
            "connect 48213=/run/b.sock",
            "connect kind=unix-stream=@name",
            "connect path=/run/a=/run/b=c",
            "accept 48213",
            "accept peer=/run/a.sock=/run/b.sock",
            "inherit fd=4711/5",
            "external 48213",
            "close addr=127.0.0.1:80",
            "drop-queues fd=4711/*",
            "set-opt addr=[::1]:80:SO_KEEPALIVE=1",
            "rename /run/a=/run/b",
            "rename /run/a/=/run/b/",
            "addr 10.0.0.1=10.0.0.2",
            "addr [::1]:80=[::2]:81",
            "port 80=8080",
        ] {
            assert_eq!(rule(line).unwrap_or_else(|e| panic!("{line}: {e}")).to_string(), format!("--{line}"));
        }
        assert_eq!(rule("external 48213:/run/b:c").unwrap().to_string(), "--connect 48213=/run/b:c");
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "connect",
            "connect 1",
            "connect 1=",
            "connect =/x",
            "connect unix[1=x",
            "external 1:",
            "external socket:[1]x",
            "inherit 1=/x",
            "set-opt 1",
            "set-opt 1:SO_X",
            "set-opt SO_X=1",
            "rename /a",
            "rename /a/=/b",
            "addr 1.1.1.1=::1",
            "addr 1.1.1.1:1=1.1.1.2",
            "port 0=1",
            "port 1=65536",
            "forget 1",
        ] {
            assert!(rule(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_directory_is_renamed_with_what_is_in_it() {
        let path = |text: &str| SocketPath::parse(text.as_bytes()).unwrap();
        let (old, new) = (path("/run/a/"), path("/srv/"));
        assert_eq!(renamed(&path("/run/a/b/c"), &old, &new), Some(path("/srv/b/c")));
        assert_eq!(renamed(&path("/run/ab"), &old, &new), None);
        assert_eq!(renamed(&path("@x"), &path("@x"), &path("/y")), Some(path("/y")));
        assert_eq!(renamed(&path("@xx"), &path("@x"), &path("/y")), None);
    }
}
