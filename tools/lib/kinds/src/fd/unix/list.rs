//! `ckpt-sk --list`: the unix sockets of a tree, and what a checkpoint would do with each.

use std::{collections::HashSet, fs, path::PathBuf};

use ckpt_sys::{Pid, TargetFd, sock::parse_id};

use super::{ExternalSocket, LISTEN, complete::World, kind_name, shown};
use crate::fd::dump::{comm, descriptors, read_link};

/// One descriptor that is a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Inode.
    pub id: u64,
    /// `stream`, `datagram`, `seqpacket`.
    pub kind: &'static str,
    /// `listening`, `connected`, `unconnected`, `closed by peer`.
    pub state: &'static str,
    /// Who has it open.
    pub pid: Pid,
    /// The command there.
    pub comm: String,
    /// The descriptor there.
    pub fd: TargetFd,
    /// What it is bound to, for people.
    pub local: String,
    /// What the peer is bound to, for people.
    pub peer: String,
    /// Inode of the peer.
    pub peer_id: Option<u64>,
    /// Who has the peer open: pid and command.
    pub peer_holder: Option<(Pid, String)>,
    /// Whether the peer is in the tree too.
    pub peer_inside: bool,
    /// Bytes received and not read (datagram sockets: of the first message); listeners: connections waiting.
    pub queued: u32,
    /// `yes`, or what would be needed.
    pub dump: String,
}

/// The process and its descendants, parents first.
#[must_use]
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        at += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_ascii_whitespace().filter_map(|c| c.parse().ok()).map(Pid));
        }
    }
    all
}

/// The sockets of `tree`; each once, with the first descriptor that it has.
///
/// # Errors
/// The kernel does not list its sockets, or a descriptor table can't be read.
pub fn list(tree: &[Pid], external: &[ExternalSocket]) -> anyhow::Result<Vec<Listed>> {
    let mut world = World::read()?;
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for &pid in tree {
        for fd in descriptors(pid)? {
            let link = read_link(&PathBuf::from(format!("/proc/{pid}/fd/{fd}"))).unwrap_or_default();
            let Some(id) =
                std::str::from_utf8(&link).ok().filter(|l| l.starts_with("socket:[")).and_then(parse_id)
            else {
                continue;
            };
            if world.sockets.contains_key(&id.0) && seen.insert(id.0) {
                found.push((id.0, pid, fd));
            }
        }
    }
    let mut listed = Vec::new();
    for (id, pid, fd) in found {
        let Some(socket) = world.sockets.get(&id).cloned() else { continue };
        let peer_id = socket.peer.filter(|&p| p != 0);
        let peer_inside = peer_id.is_some_and(|p| seen.contains(&p));
        let peer_holder = peer_id.and_then(|p| world.holder(p)).map(|(pid, comm, _)| (*pid, comm.clone()));
        let peer = peer_id.and_then(|p| world.sockets.get(&p)).map(|p| shown(&p.name)).unwrap_or_default();
        let state = match (socket.state, socket.peer) {
            (LISTEN, _) => "listening",
            (_, Some(0)) => "closed by peer",
            (_, Some(_)) => "connected",
            _ => "unconnected",
        };
        let marked = external.iter().any(|e| e.id.0 == id);
        let dump = if socket.pending.iter().any(|id| seen.contains(id)) {
            "no: connections from inside not accepted yet".to_owned()
        } else if peer_id.is_none() || peer_inside {
            "yes".to_owned()
        } else if marked && socket.rqueue > 0 {
            "needs --queued=drop or --queued=keep".to_owned()
        } else if marked {
            "yes, external".to_owned()
        } else {
            format!("needs --external {id}[:PATH]")
        };
        listed.push(Listed {
            id,
            kind: kind_name(socket.kind),
            state,
            pid,
            comm: comm(pid),
            fd,
            local: shown(&socket.name),
            peer,
            peer_id,
            peer_holder,
            peer_inside,
            queued: socket.rqueue,
            dump,
        });
    }
    Ok(listed)
}
