//! What a rule does to the sockets of the stream.
//!
//! Entries are edited as the structures that the schema gives, then [`Socket::encode`] puts what has
//! changed into the message as it came, so that fields which this release does not know stay.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use anyhow::{anyhow, bail};
use ckpt_proto::{
    Message,
    types::{ClosedConnection, FileEntry, InetSkEntry, external_socket::PolicyKind},
};
use ckpt_socket::{CLOSE, ESTABLISHED, Holder, LISTEN, Match, SocketPath, View, address, words};
use prost_reflect::{DynamicMessage, ReflectMessage, Value};

use crate::{
    option::{in_stream, set_option},
    rule::{Change, Edit, Rule, renamed},
};

/// A socket of the stream, kept back until all are known.
#[derive(Debug, Clone)]
pub struct Socket {
    message: Vec<u8>,
    entry: FileEntry,
    /// As it came.
    pub view: View,
    /// Descriptors that refer to it.
    pub holders: Vec<Holder>,
    /// Bytes of messages that it has received and not read.
    pub received: u64,
}

impl Socket {
    /// The socket in a `files.img` entry; anything else comes back.
    pub fn new(message: Vec<u8>, entry: FileEntry) -> Result<Self, Vec<u8>> {
        match View::of(&entry) {
            Some(view) => Ok(Self { message, entry, view, holders: Vec::new(), received: 0 }),
            None => Err(message),
        }
    }

    /// How messages call it.
    pub fn describe(&self) -> String {
        let holder = self.holders.first().map(|(pid, fd)| format!("fd={pid}/{fd}, ")).unwrap_or_default();
        format!("{} ({holder}{})", self.view.name(), self.view.describe())
    }

    fn is_tcp(&self) -> bool {
        self.view.kind.starts_with("tcp")
    }

    /// Whether it is one end of a TCP connection.
    fn tcp_connection(&self) -> Option<&InetSkEntry> {
        self.entry.isk.as_ref().filter(|s| self.is_tcp() && s.state != CLOSE && s.state != LISTEN)
    }

    /// Its entry with what has been edited.
    pub fn encode(&self) -> anyhow::Result<Vec<u8>> {
        let edited = self.entry.encode_to_vec();
        let before = FileEntry::decode(&self.message[..])?;
        if before == self.entry {
            return Ok(self.message.clone());
        }
        let mut message = decode("file_entry", &self.message)?;
        carry(&mut message, &decode("file_entry", &edited)?);
        Ok(message.encode_to_vec())
    }
}

/// A message by its description.
pub fn decode(name: &str, bytes: &[u8]) -> anyhow::Result<DynamicMessage> {
    let descriptor = ckpt_proto::message_descriptor(name).ok_or_else(|| anyhow!("no message {name}"))?;
    Ok(DynamicMessage::decode(descriptor, bytes)?)
}

/// Gives the fields of `message` that the schema knows the values that they have in `from`.
pub fn carry(message: &mut DynamicMessage, from: &DynamicMessage) {
    for field in message.descriptor().fields() {
        if !from.has_field(&field) {
            message.clear_field(&field);
            continue;
        }
        let value = from.get_field(&field);
        match (message.get_field_mut(&field), &*value) {
            (Value::Message(into), Value::Message(from)) => carry(into, from),
            (into, value) => *into = value.clone(),
        }
    }
}

/// All sockets of a stream.
#[derive(Debug, Default)]
pub struct Sockets {
    all: Vec<Socket>,
    by_id: HashMap<u64, usize>,
}

/// What the rules mean for the images that hold what is queued.
#[derive(Debug, Default)]
pub struct Effects {
    /// By number of the file: what was received is forgotten.
    pub dropped: BTreeSet<u32>,
    /// By inode: the TCP connections among these.
    pub dropped_tcp: BTreeSet<u64>,
    /// By inode: TCP connections that are none any more.
    pub closed_tcp: BTreeSet<u64>,
    /// By inode: switches that the image of a TCP connection has too, by their fields there.
    pub tcp_options: Vec<(u64, &'static str, bool)>,
    /// What has been or would be done.
    pub notes: Vec<String>,
}

impl Sockets {
    /// From all entries, with the descriptors that refer to each file and the bytes received by it.
    pub fn new(
        mut all: Vec<Socket>,
        mut holders: HashMap<u32, Vec<Holder>>,
        received: &HashMap<u32, u64>,
    ) -> Self {
        let mut by_id = HashMap::new();
        for (index, socket) in all.iter_mut().enumerate() {
            socket.holders = holders.remove(&socket.view.file_id).unwrap_or_default();
            socket.received = received.get(&socket.view.file_id).copied().unwrap_or(0);
            if let Some(id) = socket.view.id {
                by_id.insert(id, index);
            }
        }
        Self { all, by_id }
    }

    /// In the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = &Socket> {
        self.all.iter()
    }

    fn by_id(&self, id: u64) -> Option<&Socket> {
        self.all.get(*self.by_id.get(&id)?)
    }

    fn peer(&self, socket: &Socket) -> Option<&Socket> {
        self.by_id(socket.view.peer_id?)
    }

    fn matching(&self, what: &Match) -> Vec<usize> {
        if let Match::Id(id) = what {
            return self.by_id.get(id).copied().into_iter().collect();
        }
        let is = |socket: &Socket| {
            what.is(&socket.view, &socket.holders, self.peer(socket).map(|peer| &peer.view))
        };
        self.all.iter().enumerate().filter(|(_, socket)| is(socket)).map(|(index, _)| index).collect()
    }

    /// Applies all rules. The second value is the rules that matched nothing.
    pub fn apply(&mut self, rules: &[Rule], peers_follow: bool) -> anyhow::Result<(Effects, Vec<String>)> {
        let mut effects = Effects::default();
        let mut unmatched = Vec::new();
        let mut policies: HashMap<usize, &Rule> = HashMap::new();
        for rule in rules {
            let Rule::Sockets(what, edit) = rule else { continue };
            let mut hits = self.matching(what);
            if hits.is_empty() {
                unmatched.push(rule.to_string());
            }
            // Of all sockets that a rule means, those that have a connection; if none has, the first says so.
            if edit.is_policy() && hits.iter().any(|&index| self.is_connected(index)) {
                hits.retain(|&index| self.is_connected(index));
            }
            for index in hits {
                if edit.is_policy()
                    && let Some(other) = policies.insert(index, rule)
                    && let Some(socket) = self.all.get(index)
                {
                    bail!("{other} and {rule} contradict each other: socket {}", socket.describe());
                }
                self.edit(index, rule, edit, &mut effects)?;
            }
        }
        let changes: Vec<(&Rule, &Change)> = (rules.iter())
            .filter_map(|rule| match rule {
                Rule::All(change) => Some((rule, change)),
                Rule::Sockets(..) => None,
            })
            .collect();
        if !changes.is_empty() {
            let mut used = BTreeSet::new();
            self.rename(&changes, &mut used, &mut effects)?;
            self.readdress(&changes, peers_follow, &mut used, &mut effects)?;
            let idle = changes.iter().enumerate().filter(|(index, _)| !used.contains(index));
            unmatched.extend(idle.map(|(_, (rule, _))| rule.to_string()));
        }
        self.check_no_end_is_left()?;
        for &index in policies.keys() {
            self.check_queue_fits(index)?;
        }
        Ok((effects, unmatched))
    }

    fn is_connected(&self, index: usize) -> bool {
        self.all.get(index).is_some_and(|socket| {
            let unix = socket.entry.usk.as_ref();
            socket.tcp_connection().is_some()
                || unix.is_some_and(|s| s.ckpt_external.is_some() || s.state == ESTABLISHED)
        })
    }

    fn edit(&mut self, index: usize, rule: &Rule, edit: &Edit, effects: &mut Effects) -> anyhow::Result<()> {
        let Some(socket) = self.all.get(index) else { return Ok(()) };
        let name = socket.describe();
        let peer_name = self.peer(socket).map(|peer| peer.view.path.clone()).filter(|path| !path.is_empty());
        let id = socket.view.id;
        let Some(socket) = self.all.get_mut(index) else { return Ok(()) };
        let cannot = |why: &str| anyhow!("{rule}: socket {name}: {why}");
        effects.notes.push(match edit {
            Edit::Connect(path) => format!("connect socket {name} to {path}"),
            Edit::Accept(Some(path)) => format!("accept the peer of socket {name} on {path}"),
            Edit::Accept(None) => format!("accept the peer of socket {name} on its own address"),
            Edit::Inherit => format!("inherit socket {name}"),
            Edit::External => format!("make socket {name} external"),
            Edit::Close => format!("close the peer of socket {name}"),
            Edit::DropQueues => format!("drop the queue of socket {name}"),
            Edit::SetOption { name: option, value } => format!("set {option} of socket {name} to {value}"),
        });
        match edit {
            Edit::DropQueues => {
                socket.received = 0;
                effects.dropped.insert(socket.view.file_id);
                if let Some(id) = id.filter(|_| socket.is_tcp()) {
                    effects.dropped_tcp.insert(id);
                }
                return Ok(());
            }
            Edit::SetOption { name: option, value } => {
                set_option(&mut socket.entry, option, value).map_err(|what| cannot(&what))?;
                if let Some(id) = id.filter(|_| socket.tcp_connection().is_some())
                    && let Some((field, on)) = in_stream(option, value)
                {
                    effects.tcp_options.push((id, field, on));
                }
                return Ok(());
            }
            Edit::Close if socket.tcp_connection().is_some() => {
                if let Some(tcp) = &mut socket.entry.isk {
                    tcp.state = CLOSE;
                    tcp.ckpt_closed = Some(ClosedConnection::Ended.into());
                }
                effects.closed_tcp.extend(id);
                return Ok(());
            }
            _ => {}
        }
        let Some(unix) = &mut socket.entry.usk else {
            return Err(cannot(match edit {
                Edit::Close => "it has no connection",
                _ => {
                    "only unix connections are made again in another way; TCP ones take --close, --addr and --port"
                }
            }));
        };
        if unix.ckpt_external.is_none() && unix.state != ESTABLISHED {
            return Err(cannot("it has no connection"));
        }
        if let Edit::Accept(path) = edit {
            if socket.view.kind == "unix-dgram" {
                return Err(cannot("a datagram socket accepts no connections"));
            }
            if path.is_none() && socket.view.path.is_empty() {
                return Err(cannot(
                    "it has no address of its own to accept on: give one, --accept MATCH=PATH",
                ));
            }
        }
        if unix.ckpt_external.is_none()
            && let Some(name) = &peer_name
        {
            let peer_name = Some(name.bytes().to_vec());
            unix.ckpt_external = Some(ckpt_proto::types::ExternalSocket { peer_name, ..Default::default() });
        }
        unix.ckpt_external = edit.policy(unix);
        Ok(())
    }

    /// A connection is made again, or closed, at both ends, or at none.
    fn check_no_end_is_left(&self) -> anyhow::Result<()> {
        let connections: HashMap<_, &Socket> = (self.all.iter())
            .filter(|socket| socket.tcp_connection().is_some())
            .filter_map(|socket| Some((canonical(socket.view.addresses?), socket)))
            .collect();
        let left = |socket: &Socket, peer: &Socket| {
            anyhow!(
                "socket {}: its peer, socket {}, is in the checkpoint too and would lose its connection: \
                 give a rule for it as well",
                socket.view.name(),
                peer.describe()
            )
        };
        for socket in &self.all {
            if let Some((local, remote)) = socket.view.addresses.map(canonical)
                && remote.port() != 0
                && socket.is_tcp()
                && socket.tcp_connection().is_none()
                && let Some(peer) = connections.get(&(remote, local))
            {
                return Err(left(socket, peer));
            }
            let is_external = |s: &Socket| s.entry.usk.as_ref().is_some_and(|s| s.ckpt_external.is_some());
            if is_external(socket)
                && let Some(peer) = self.peer(socket)
                && !is_external(peer)
                && peer.view.peer_id == socket.view.id
            {
                return Err(left(socket, peer));
            }
        }
        Ok(())
    }

    /// What was received can be put into a connection whose other end is at hand, and into no other.
    fn check_queue_fits(&self, index: usize) -> anyhow::Result<()> {
        let Some(socket) = self.all.get(index) else { return Ok(()) };
        let external = socket.entry.usk.as_ref().and_then(|s| s.ckpt_external.as_ref());
        if external.is_none_or(|e| e.policy() == PolicyKind::Close) || socket.received == 0 {
            return Ok(());
        }
        bail!(
            "socket {}: {} bytes received and not read can't be put into a new connection: \
             forget them with --drop-queues {}, or let them be read with --close",
            socket.describe(),
            socket.received,
            socket.view.name()
        );
    }

    fn rename(
        &mut self,
        changes: &[(&Rule, &Change)],
        used: &mut BTreeSet<usize>,
        effects: &mut Effects,
    ) -> anyhow::Result<()> {
        let mut apply = |path: &SocketPath| -> anyhow::Result<Option<SocketPath>> {
            for (index, (rule, change)) in changes.iter().enumerate() {
                if let Change::Rename(old, new) = change
                    && let Some(new) = renamed(path, old, new)
                {
                    new.check().map_err(|what| anyhow!("{rule}: {new}: {what}"))?;
                    used.insert(index);
                    return Ok(Some(new));
                }
            }
            Ok(None)
        };
        // New names, and which one each was before: two sockets that had two names must not end with one.
        let mut before: HashMap<SocketPath, SocketPath> = HashMap::new();
        for socket in &mut self.all {
            let name = socket.describe();
            let Some(unix) = &mut socket.entry.usk else { continue };
            let old = SocketPath::from_image(&unix.name);
            let relative = unix.name_dir.clone().filter(|_| !old.is_abstract());
            let full = match &relative {
                Some(dir) => SocketPath::from_image(&[&dir[..], b"/", old.bytes()].concat()),
                None => old.clone(),
            };
            if !full.is_empty() {
                let new = apply(&full)?;
                if let Some(new) = &new {
                    effects.notes.push(format!("rename socket {name} to {new}"));
                    // A name that the program gave relative to a directory stays so where it can.
                    let suffix = [b"/", old.bytes()].concat();
                    match new.bytes().strip_suffix(&suffix[..]).filter(|_| relative.is_some()) {
                        Some(dir) => unix.name_dir = Some(dir.to_vec()),
                        None => {
                            let nul = unix.name.ends_with(b"\0") && !new.is_abstract();
                            unix.name = [new.bytes(), if nul { b"\0" } else { b"" }].concat();
                            unix.name_dir = None;
                            if new.is_abstract() {
                                unix.file_perms = None;
                            }
                        }
                    }
                }
                let now = new.unwrap_or_else(|| full.clone());
                if let Some(other) = before.insert(now.clone(), full.clone()).filter(|other| *other != full) {
                    bail!("sockets bound to {other} and to {full} would both be bound to {now}");
                }
            }
            if let Some(file) = &mut unix.ckpt_file
                && let Some(new) = apply(&SocketPath::from_image(file))?
            {
                effects.notes.push(format!("move the file of socket {name} to {new}"));
                *file = new.bytes().to_vec();
            }
            if let Some(external) = &mut unix.ckpt_external {
                for path in [&mut external.path, &mut external.peer_name].into_iter().flatten() {
                    if let Some(new) = apply(&SocketPath::from_image(path))? {
                        effects.notes.push(format!("rename the peer of socket {name} to {new}"));
                        *path = new.bytes().to_vec();
                    }
                }
            }
        }
        Ok(())
    }

    fn readdress(
        &mut self,
        changes: &[(&Rule, &Change)],
        peers_follow: bool,
        used: &mut BTreeSet<usize>,
        effects: &mut Effects,
    ) -> anyhow::Result<()> {
        let inside: BTreeSet<Pair> = (self.all.iter())
            .filter(|socket| socket.tcp_connection().is_some())
            .filter_map(|socket| socket.view.addresses.map(canonical))
            .collect();
        // Namespace, kind and addresses after the change, and before: what was apart must stay apart.
        let mut before: HashMap<(Option<u32>, &str, Pair), Pair> = HashMap::new();
        for socket in &mut self.all {
            let name = socket.describe();
            let connection = socket.tcp_connection().is_some();
            let ports = ["tcp", "udp"].iter().any(|kind| socket.view.kind.starts_with(kind));
            let Some(inet) = &mut socket.entry.isk else { continue };
            let sides = [address(&inet.src_addr, inet.src_port), address(&inet.dst_addr, inet.dst_port)];
            let [Some(local), Some(remote)] = sides else { continue };
            let mut to = |side: SocketAddr| changed(side, changes, ports, used);
            let new_local = to(local);
            // A socket that is not connected has an empty address there, which is nobody's.
            let new_remote =
                if remote.port() != 0 || !remote.ip().is_unspecified() { to(remote) } else { remote };
            let (old, new) = (canonical((local, remote)), canonical((new_local, new_remote)));
            if old != new {
                if connection && !peers_follow && !inside.contains(&(old.1, old.0)) {
                    let (end, was) =
                        if old.0 == new.0 { ("its own end", local) } else { ("its peer", local) };
                    bail!(
                        "socket {name}: the other end of the connection, {}, is not in the stream, and {end} would not \
                         know it any more ({was}): rewrite that checkpoint in the same way and say --peers-follow, or --close \
                         the connection",
                        old.1
                    );
                }
                let arrow = |(local, remote): Pair| match remote.port() {
                    0 => local.to_string(),
                    _ => format!("{local} - {remote}"),
                };
                effects.notes.push(format!("move socket {name} to {}", arrow(new)));
                (inet.src_addr, inet.src_port) = (words(new_local.ip()), new_local.port().into());
                (inet.dst_addr, inet.dst_port) = (words(new_remote.ip()), new_remote.port().into());
            }
            let kind = socket.view.kind.trim_end_matches('6');
            let bound = new.0.port() != 0;
            if let Some(other) = before.insert((inet.ns_id, kind, new), old).filter(|o| *o != old && bound) {
                bail!("{kind} sockets on {} and {} would both be on {}", other.0, old.0, new.0);
            }
        }
        Ok(())
    }
}

/// Both sides of a socket.
type Pair = (SocketAddr, SocketAddr);

/// With v4-mapped addresses as IPv4: a connection may look so at one end only.
fn canonical((local, remote): Pair) -> Pair {
    let of = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    (of(local), of(remote))
}

/// A side of a socket after the changes; all of them look at what was there before, so that two addresses
/// can change places.
fn changed(
    side: SocketAddr,
    changes: &[(&Rule, &Change)],
    ports: bool,
    used: &mut BTreeSet<usize>,
) -> SocketAddr {
    let mut new = side;
    let (mut moved_ip, mut moved_port) = (false, false);
    for (index, (_, change)) in changes.iter().enumerate() {
        match change {
            Change::Address((old_ip, old_port), (new_ip, new_port))
                if !moved_ip
                    && side.ip().to_canonical() == *old_ip
                    && old_port.is_none_or(|port| ports && port == side.port()) =>
            {
                new.set_ip(like(side.ip(), *new_ip));
                moved_ip = true;
                if let Some(port) = new_port {
                    new.set_port(*port);
                    moved_port = true;
                }
            }
            Change::Port(old, port) if ports && !moved_port && side.port() == *old => {
                new.set_port(*port);
                moved_port = true;
            }
            _ => continue,
        }
        used.insert(index);
    }
    new
}

/// An IPv4 address stays in the form, v4-mapped or not, in which the socket has it.
fn like(before: IpAddr, new: IpAddr) -> IpAddr {
    match (before, new) {
        (IpAddr::V6(_), IpAddr::V4(new)) => IpAddr::V6(new.to_ipv6_mapped()),
        _ => new,
    }
}
