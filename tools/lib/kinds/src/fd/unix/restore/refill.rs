//! Queues, at restore: what was peeked at by [`super::queue`] is sent once more, through the other end.
//!
//! Files of all kinds are open by then, for any of them may be in flight. A queue in which a pidfd of the tree is in flight
//! waits, whole, until there are tasks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{SkPacketEntry, UnixSkEntry},
};
use ckpt_sys::{
    FileId, Refused,
    sock::{self, trim_path},
    unixsock,
};
use nix::{errno::Errno, sys::socket::SockType};

use super::{LISTEN, Sockets, finish, is_datagram, is_external, kind, new_socket, outside, shown, what};
use crate::fd::{Lent, Opening, shelf::Shelf};

/// What a byte in a queue costs at most, counting the kernel's own structures for small messages.
const OVERHEAD: usize = 1024;

/// What it takes to fill queues.
#[derive(Clone, Copy)]
pub(super) struct Filling<'a> {
    /// Open files by number in FILES.
    files: &'a Shelf,
    warn: fn(&str),
}

impl<'a> Filling<'a> {
    fn kept(self, usk: &UnixSkEntry) -> anyhow::Result<Lent<'a>> {
        self.files.lend(FileId(usk.id))?.with_context(|| format!("{} was not made", what(usk)))
    }
}

impl Sockets {
    /// What was received from outside can't be given to a new connection; that is to be known
    /// before anybody waits for one.
    pub(super) fn check_queues(&self, opening: &Opening<'_>) -> anyhow::Result<()> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for packet in opening.set.all::<SkPacketEntry>(Image::SkQueues, 0)? {
            if packet.ckpt_unsent != Some(true) {
                *bytes.entry(packet.id_for).or_default() += u64::from(packet.length);
            }
        }
        for (&ino, usk) in &self.entries {
            let Some(bytes) = bytes.get(&usk.id) else { continue };
            let lost = is_external(usk) && !outside::is_closed(opening, usk);
            if lost || self.given.contains(&ino) || usk.state == u32::from(LISTEN) {
                let reason = format!(
                    "it had received {bytes} bytes from its peer outside, which can't be given to it again"
                );
                let advice =
                    format!("restore without them: ... | sk-rewrite --drop-queues {ino} | ckpt-restore");
                return Err(Refused::new(what(usk), reason).advise(advice).into());
            }
        }
        Ok(())
    }

    pub(super) fn fill_queues(&mut self, opening: &Opening<'_>) -> anyhow::Result<()> {
        let by_file: HashMap<u32, Rc<UnixSkEntry>> =
            self.entries.values().map(|u| (u.id, u.clone())).collect();
        let packets: Vec<SkPacketEntry> = opening.set.all(Image::SkQueues, 0)?;
        let mut totals: HashMap<u32, usize> = HashMap::new();
        for packet in &packets {
            let total = totals.entry(packet.id_for).or_default();
            *total = total.saturating_add(packet.length as usize).saturating_add(OVERHEAD);
        }
        let is_late = |packet: &SkPacketEntry| {
            packet.scm.iter().flat_map(|scm| &scm.rights).any(|&id| opening.late.has(id))
        };
        let late: BTreeSet<u32> = packets.iter().filter(|p| is_late(p)).map(|p| p.id_for).collect();
        for (index, packet) in packets.iter().enumerate() {
            // Queues of other kinds of sockets are their own business.
            let Some(usk) = by_file.get(&packet.id_for).cloned() else { continue };
            let unsent = packet.ckpt_unsent == Some(true);
            if unsent && outside::is_closed(opening, &usk) && !self.given.contains(&usk.ino.into()) {
                continue;
            }
            let room = totals.get(&packet.id_for).copied().unwrap_or(0);
            if late.contains(&packet.id_for) {
                self.late.push((index, packet.clone(), room));
                continue;
            }
            let bytes = opening.set.payload_bytes(Image::SkQueues, 0, index, packet.length.into())?;
            self.put(filling(opening), &usk, packet, &bytes, room).with_context(|| {
                let doing =
                    if unsent { "send what its peer has not read" } else { "put back what it has received" };
                format!("{}: {doing}", what(&usk))
            })?;
        }
        Ok(())
    }

    /// Puts one message into the queue of `usk` (or of its peer, if it is `ckpt_unsent`).
    fn put(
        &mut self,
        filling: Filling<'_>,
        usk: &UnixSkEntry,
        packet: &SkPacketEntry,
        bytes: &[u8],
        room: usize,
    ) -> anyhow::Result<()> {
        let ino = u64::from(usk.ino);
        let mut rights = Vec::new();
        for id in packet.scm.iter().flat_map(|scm| &scm.rights) {
            let file = filling.files.lend(FileId(*id))?;
            rights.push(file.with_context(|| format!("file {id}, in flight, was not made"))?);
        }
        if let Some(creds) = &packet.ckpt_creds {
            self.others.ensure(creds.pid);
        }
        let unsent = packet.ckpt_unsent == Some(true);
        let named = is_datagram(usk) && !unsent && !trim_path(&usk.name).is_empty();
        let to = if named { unixsock::address(&self.address_of(ino)?) } else { None };
        let sender = packet.ckpt_sender.as_ref().filter(|_| to.is_some());
        let known = sender.and_then(|name| self.datagram_named(name)).cloned();
        let own = match sender {
            Some(name) if known.is_none() => Some(self.stranger(usk, name)?),
            _ => None,
        };
        let lent = match known.as_ref().or_else(|| self.entries.get(&usk.peer.into())) {
            _ if own.is_some() => None,
            _ if unsent => Some(filling.kept(usk)?),
            Some(entry) => Some(filling.kept(entry)?),
            None => None,
        };
        let from = match (&own, &lent) {
            (Some(own), _) => own.as_fd(),
            (None, Some(lent)) => lent.as_fd(),
            (None, None) => self.far.get(&ino).context("nobody is there who could have sent it")?.as_fd(),
        };
        sock::make_room(from, room);
        let mut creds = packet.ckpt_creds.as_ref().map(|c| (c.pid, c.uid, c.gid));
        let mut rest = bytes;
        let mut rights: Vec<BorrowedFd<'_>> = rights.iter().map(AsFd::as_fd).collect();
        loop {
            let sent = match unixsock::send_message(from, rest, to.as_deref(), &rights, creds) {
                Err(error) if creds.is_some() && matches!(error.errno, Errno::EPERM | Errno::ESRCH) => {
                    (filling.warn)(&format!(
                        "{}: credentials of unread messages are lost: {error}",
                        what(usk)
                    ));
                    creds = None;
                    continue;
                }
                sent => sent?,
            };
            rights.clear();
            rest = rest.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(());
            }
            if kind(usk)? != SockType::Stream {
                bail!("a message of {} bytes was cut to {sent}", bytes.len());
            }
        }
    }

    /// The datagram socket of the images that bears this name.
    fn datagram_named(&self, name: &[u8]) -> Option<&Rc<UnixSkEntry>> {
        let mut datagrams = self.entries.values().filter(|u| is_datagram(u) && !name.is_empty());
        datagrams.find(|u| trim_path(&u.name) == trim_path(name))
    }

    /// A socket with the address of somebody outside, or gone, who has sent something.
    fn stranger(&mut self, usk: &UnixSkEntry, name: &[u8]) -> anyhow::Result<OwnedFd> {
        let fd = new_socket(usk)?;
        match name.first() {
            None => {}
            Some(0) => sock::bind_unix(fd.as_fd(), name)
                .with_context(|| format!("take the name of the sender {} for a moment", shown(name)))?,
            Some(_) => {
                let taken = self.others.bind_apart(fd.as_fd(), trim_path(name))?;
                taken.with_context(|| {
                    format!("it takes CAP_SYS_ADMIN to send in the name of {}", shown(name))
                })?;
            }
        }
        Ok(fd)
    }

    /// Gives a datagram socket the peer that it shall have.
    fn change_peer(
        &mut self,
        filling: Filling<'_>,
        usk: &UnixSkEntry,
        to: Option<u64>,
    ) -> anyhow::Result<()> {
        let lent = filling.kept(usk)?;
        let fd = lent.as_fd();
        let Some(to) = to else {
            return Ok(sock::disconnect(fd)?);
        };
        let name = self.address_of(to)?;
        if name.is_empty() {
            let reason = "connected one way to a socket without a name: not supported";
            return Err(Refused::new(what(usk), reason).into());
        }
        sock::connect_unix(fd, &name)?;
        // The old peer of a pair is told by an error that it did not have.
        for other in self.entries.values().filter(|o| o.peer == usk.ino) {
            let _ = sock::option(filling.kept(other)?.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR);
        }
        Ok(())
    }

    /// Sockets that can't be finished yet: a queue waits for pidfds, or is filled by them.
    pub(super) fn waiting(&self) -> BTreeSet<u64> {
        let receivers: BTreeSet<u32> = self.late.iter().map(|(_, packet, _)| packet.id_for).collect();
        let receives = |usk: &UnixSkEntry| receivers.contains(&usk.id);
        let of = |ino: u32| self.entries.get(&ino.into());
        let waits = |usk: &UnixSkEntry| receives(usk) || of(usk.peer).is_some_and(|peer| receives(peer));
        let mut all: BTreeSet<u64> =
            self.entries.iter().filter(|(_, usk)| waits(usk)).map(|(&ino, _)| ino).collect();
        // One may send to a receiver and be connected by it only.
        let peers = all.iter().filter_map(|ino| self.entries.get(ino)).map(|usk| u64::from(usk.peer));
        let peers: Vec<u64> = peers.filter(|ino| self.entries.contains_key(ino)).collect();
        all.extend(peers);
        all
    }

    /// Gives datagram sockets that are `ready` the peers that they shall have.
    pub(super) fn settle(&mut self, filling: Filling<'_>, ready: impl Fn(u64) -> bool) -> anyhow::Result<()> {
        let (now, later) =
            std::mem::take(&mut self.connect_later).into_iter().partition(|(ino, _)| ready(*ino));
        self.connect_later = later;
        let now: Vec<(u64, Option<u64>)> = now;
        for (ino, to) in now {
            let usk = self.entry(ino)?;
            self.change_peer(filling, &usk, to).with_context(|| what(&usk))?;
        }
        Ok(())
    }

    /// Fills the queues that have waited for pidfds, and finishes their sockets.
    ///
    /// # Errors
    /// The kernel's; malformed images.
    pub(in crate::fd) fn deliver(mut self, set: &ImageSet, files: &Shelf) -> anyhow::Result<()> {
        let filling = Filling { files, warn: self.others.warn };
        let wait = self.waiting();
        for (index, packet, room) in std::mem::take(&mut self.late) {
            let usk = self.entries.values().find(|usk| usk.id == packet.id_for).cloned();
            let usk = usk.context("a message for no socket")?;
            let bytes = set.payload_bytes(Image::SkQueues, 0, index, packet.length.into())?;
            self.put(filling, &usk, &packet, &bytes, room)
                .with_context(|| format!("{}: put back what it has received", what(&usk)))?;
        }
        self.settle(filling, |_| true)?;
        self.far.clear();
        for usk in wait.iter().filter_map(|ino| self.entries.get(ino)) {
            if !self.given.contains(&usk.ino.into()) {
                finish(usk, filling.kept(usk)?.as_fd()).with_context(|| what(usk))?;
            }
        }
        Ok(())
    }
}

pub(super) fn filling<'a>(opening: &'a Opening<'_>) -> Filling<'a> {
    Filling { files: &opening.shelf, warn: opening.options.warn }
}

pub(super) fn kept<'o>(opening: &'o Opening<'_>, usk: &UnixSkEntry) -> anyhow::Result<Lent<'o>> {
    filling(opening).kept(usk)
}
