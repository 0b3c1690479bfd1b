//! ckpt-scan's part: stopping the packets of a frozen tree's connections.

use std::{
    collections::{BTreeSet, HashMap},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use anyhow::Context;
use ckpt_sys::{
    Pid, TargetFd,
    nft::{self, Connection, NetLock},
    pidfd, sock, tcp,
};
use nix::errno::Errno;

use super::{
    super::{
        dump::{descriptors, read_link},
        inet,
    },
    state,
};

/// The TCP connections of a tree, and the lock on them.
#[derive(Debug)]
pub struct TreeLock {
    connections: BTreeSet<Connection>,
    /// A descriptor for each of their sockets.
    holders: Vec<(Pid, TargetFd)>,
    #[expect(dead_code, reason = "held, not used")]
    lock: Option<NetLock>,
}

impl TreeLock {
    /// Stops the packets of all TCP connections that a frozen tree has open, for as long as this
    /// value and this process live. `None` if it has none.
    ///
    /// Without CAP_NET_ADMIN nothing is locked; nor could ckpt-sk read the connections then.
    ///
    /// # Errors
    /// No nf_tables in this kernel.
    pub fn of(tree: &[Pid]) -> anyhow::Result<Option<Self>> {
        let mut places: HashMap<u64, (Pid, TargetFd)> = HashMap::new();
        for &pid in tree {
            for fd in descriptors(pid)? {
                let Ok(link) = read_link(Path::new(&format!("/proc/{pid}/fd/{fd}"))) else { continue };
                let id = std::str::from_utf8(&link)
                    .ok()
                    .filter(|l| l.starts_with("socket:["))
                    .and_then(sock::parse_id);
                if let Some(id) = id {
                    places.entry(id.0).or_insert((pid, fd));
                }
            }
        }
        if places.is_empty() {
            return Ok(None);
        }
        let (table, _) = inet::table(libc::IPPROTO_TCP)?;
        let mut connections = BTreeSet::new();
        let mut holders = Vec::new();
        for socket in table.values().filter(|s| state::connected(s.state) || s.state == state::SYN_SENT) {
            if let Some(&place) = places.get(&socket.id) {
                connections.insert(Connection::new(socket.local, socket.remote));
                holders.push(place);
            }
        }
        if connections.is_empty() {
            return Ok(None);
        }
        let lock = match NetLock::hold(&nft::new_name()?, &connections) {
            Ok(lock) => Some(lock),
            Err(e) if e.errno == Errno::EPERM => None,
            Err(e) => return Err(e).context("lock the network for the tree's TCP connections"),
        };
        Ok(Some(Self { connections, holders, lock }))
    }

    /// Copies of the sockets, so that they stay open when the tree is killed.
    ///
    /// # Errors
    /// Too many open files.
    pub fn sockets(&self) -> anyhow::Result<Vec<OwnedFd>> {
        let mut tasks: HashMap<Pid, OwnedFd> = HashMap::new();
        let mut copies = Vec::new();
        for &(pid, fd) in &self.holders {
            let task = match tasks.entry(pid) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => new.insert(pidfd::open(pid)?),
            };
            copies.push(pidfd::getfd(task.as_fd(), fd).with_context(|| format!("pid {pid} fd {fd}"))?);
        }
        Ok(copies)
    }

    /// Now that the tree is dead: leaves a lock named `name` behind, and closes the sockets without a word to
    /// their peers.
    ///
    /// # Errors
    /// Those of nf_tables. The sockets are closed silently all the same if they can be.
    pub fn leave(self, name: &str, sockets: Vec<OwnedFd>) -> anyhow::Result<()> {
        let left = NetLock::leave(name, &self.connections);
        for socket in &sockets {
            // EPERM: then it says goodbye, and the lock stops that.
            let _ = tcp::enter_repair(socket.as_fd());
        }
        drop(sockets);
        left.with_context(|| format!("leave the lock {name} on the network"))
    }
}
