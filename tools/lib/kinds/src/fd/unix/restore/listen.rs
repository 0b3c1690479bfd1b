//! Listeners, and connections that are made by way of one, at restore.
//!
//! A connection whose accepted end bears the name of a listener can only come from there. If that listener is gone, one is
//! made for a moment, *apart* from the file system ([`ckpt_sys::standin`]).

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use anyhow::Context;
use ckpt_proto::types::{SkCreds, UnixSkEntry};
use ckpt_sys::{
    sock::{self, trim_path},
    unixsock,
};

use super::{
    ESTABLISHED, LISTEN, Sockets, is_datagram, is_external,
    names::{handle_name, open_handle, remove_stale, socket_path, with_directory},
    new_socket, what,
};
use crate::fd::Opening;

/// The backlog of listeners while connections are made; it can be larger than any that they had.
const MANY: i32 = i32::MAX;

/// Who listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// A socket of the images, by inode.
    Ours(u64),
    /// A listener that is made for a moment.
    Momentary(usize),
}

/// A listener that does not stay.
#[derive(Debug)]
pub(super) struct Momentary {
    pub(super) name: Vec<u8>,
    kind: u32,
    fd: OwnedFd,
    handle: Option<OwnedFd>,
    /// Others can connect to it too.
    pub(super) in_place: bool,
}

impl Sockets {
    pub(super) fn listener(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &Rc<UnixSkEntry>,
    ) -> anyhow::Result<()> {
        let fd = new_socket(usk)?;
        self.bind(opening, usk, &fd)?;
        self.made.insert(usk.ino.into(), fd);
        self.listen_as(Place::Ours(usk.ino.into()), usk.ckpt_peer_creds.as_ref())
    }

    /// The listener of the images that bears the name of `usk`.
    pub(super) fn listener_of(&self, usk: &UnixSkEntry) -> Option<&Rc<UnixSkEntry>> {
        let name = trim_path(&usk.name);
        let bears_it = |l: &&Rc<UnixSkEntry>| l.r#type == usk.r#type && trim_path(&l.name) == name;
        if name.is_empty() {
            return None;
        }
        // There can be one whose file was deleted, and a newer one.
        let exact = self.listeners.iter().filter(bears_it).find(|l| l.deleted == usk.deleted);
        exact.or_else(|| self.listeners.iter().find(bears_it))
    }

    /// Somebody who listens with the name of `usk`.
    fn place_of(&mut self, usk: &UnixSkEntry) -> anyhow::Result<Place> {
        if let Some(listener) = self.listener_of(usk) {
            return Ok(Place::Ours(listener.ino.into()));
        }
        let name = trim_path(&usk.name);
        let known = self.momentary.iter().position(|m| m.name == name && m.kind == usk.r#type && !m.in_place);
        if let Some(index) = known {
            return Ok(Place::Momentary(index));
        }
        let fd = new_socket(usk)?;
        let mut handle = None;
        if name.first() == Some(&0) {
            sock::bind_unix(fd.as_fd(), name)?;
        } else {
            handle = self.others.bind_apart(fd.as_fd(), name)?;
            if handle.is_none() {
                let file = socket_path(usk).context("a path")?;
                remove_stale(usk, &file)?;
                with_directory(usk, |name| Ok(sock::bind_unix(fd.as_fd(), name)?))?;
                handle = Some(open_handle(&file)?);
                fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
            }
        }
        Ok(self.add_momentary(name.to_vec(), usk, fd, handle, false))
    }

    pub(super) fn add_momentary(
        &mut self,
        name: Vec<u8>,
        usk: &UnixSkEntry,
        fd: OwnedFd,
        handle: Option<OwnedFd>,
        in_place: bool,
    ) -> Place {
        self.momentary.push(Momentary { name, kind: usk.r#type, fd, handle, in_place });
        Place::Momentary(self.momentary.len() - 1)
    }

    pub(super) fn listening(&self, place: Place) -> anyhow::Result<BorrowedFd<'_>> {
        match place {
            Place::Ours(ino) => self.made.get(&ino).map(AsFd::as_fd),
            Place::Momentary(index) => self.momentary.get(index).map(|m| m.fd.as_fd()),
        }
        .context("a listener made before")
    }

    /// What to connect to, to reach it.
    fn address(&self, place: Place) -> anyhow::Result<Vec<u8>> {
        match place {
            Place::Ours(ino) => self.address_of(ino),
            Place::Momentary(index) => {
                let momentary = self.momentary.get(index).context("a listener made before")?;
                Ok(momentary.handle.as_ref().map_or_else(|| momentary.name.clone(), handle_name))
            }
        }
    }

    /// Lets it listen in the name of `creds`: that is whom its clients see.
    pub(super) fn listen_as(&mut self, place: Place, creds: Option<&SkCreds>) -> anyhow::Result<()> {
        if let Place::Ours(ino) = place
            && self.given.contains(&ino)
        {
            return Ok(());
        }
        if self.listen.get(&place).is_some_and(|now| now.as_ref() == creds) {
            return Ok(());
        }
        let fd = match place {
            Place::Ours(ino) => self.made.get(&ino).map(AsFd::as_fd),
            Place::Momentary(index) => self.momentary.get(index).map(|m| m.fd.as_fd()),
        };
        self.others.listen(creds, fd.context("a listener made before")?, MANY)?;
        self.listen.insert(place, creds.cloned());
        Ok(())
    }

    /// A connection whose end `server` was accepted from a listener of its name, and its other end, which
    /// is `client` or nobody's.
    pub(super) fn accepted(
        &mut self,
        opening: &mut Opening<'_>,
        server: &Rc<UnixSkEntry>,
        client: Option<&Rc<UnixSkEntry>>,
    ) -> anyhow::Result<(OwnedFd, OwnedFd)> {
        let place = self.place_of(server)?;
        let far = new_socket(server)?;
        if let Some(client) = client {
            self.bind(opening, client, &far)?;
        }
        self.listen_as(place, client.and_then(|c| c.ckpt_peer_creds.as_ref()))?;
        self.connect_now(place, &far, server.ckpt_peer_creds.as_ref())?;
        let pid = self.others.pid_of(server.ckpt_peer_creds.as_ref());
        loop {
            let fd = sock::accept(self.listening(place)?)?;
            if unixsock::peer_credentials(fd.as_fd())?.is_some_and(|c| c.pid == pid) {
                return Ok((fd, far));
            }
            // Somebody connected before we did.
            self.strangers.entry(place).or_default().push(fd);
        }
    }

    /// Connects without waiting for room in the backlog.
    fn connect_now(&mut self, place: Place, fd: &OwnedFd, creds: Option<&SkCreds>) -> anyhow::Result<()> {
        let name = self.address(place)?;
        ckpt_sys::file::set_flags(fd.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
        self.others.connect(creds, fd.as_fd(), &name)?;
        Ok(ckpt_sys::file::set_flags(fd.as_fd(), 0)?)
    }

    /// The listener in whose backlog a connection waits.
    pub(super) fn waits_at(&self, usk: &UnixSkEntry) -> Option<&Rc<UnixSkEntry>> {
        let connected = usk.state == u32::from(ESTABLISHED) && !is_datagram(usk) && !is_external(usk);
        self.entries.get(&usk.peer.into()).filter(|p| connected && p.state == u32::from(LISTEN))
    }

    /// Connections that wait to be accepted, in their order where it is known.
    pub(super) fn fill_backlogs(
        &mut self,
        opening: &mut Opening<'_>,
        all: &[Rc<UnixSkEntry>],
    ) -> anyhow::Result<()> {
        let mut order: HashMap<u32, (usize, SkCreds)> = HashMap::new();
        for listener in all {
            let creds = listener.ckpt_backlog_creds.iter().cloned().map(Some).chain(std::iter::repeat(None));
            for (index, (&ino, creds)) in listener.ckpt_backlog.iter().zip(creds).enumerate() {
                if let Some(creds) = creds {
                    order.insert(ino, (index, creds));
                }
            }
        }
        let mut waiting: Vec<(Rc<UnixSkEntry>, u64)> = all
            .iter()
            .filter_map(|usk| Some((usk.clone(), u64::from(self.waits_at(usk)?.ino))))
            .filter(|(usk, _)| !self.is_made(usk.ino.into()))
            .collect();
        waiting.sort_by_key(|(usk, listener)| {
            (*listener, order.get(&usk.ino).map_or(usize::MAX, |(i, _)| *i), usk.ino)
        });
        for (usk, listener) in waiting {
            let fd = new_socket(&usk)?;
            self.bind(opening, &usk, &fd).with_context(|| what(&usk))?;
            let place = Place::Ours(listener);
            self.listen_as(place, usk.ckpt_peer_creds.as_ref())?;
            self.connect_now(place, &fd, order.get(&usk.ino).map(|(_, creds)| creds))
                .with_context(|| what(&usk))?;
            self.add(opening, &usk, fd)?;
        }
        Ok(())
    }
}
