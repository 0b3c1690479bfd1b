//! ckpt-restore's side.
//!
//! Order matters.
//!
//! 1. What the user hands in, then listeners ([`listen`]): a connection whose accepted end bears the name of one is made
//!    by connecting to it.
//! 2. Pairs and all others, then connections to the outside ([`outside`]), which may have to be waited
//!    for, and last the connections that nobody has accepted.
//! 3. When files of all kinds are open ([`settle`]), queues are filled ([`refill`]), through the other end while buffers are as large as need be; then come datagram sockets that send to one that
//!    does not answer to them, shutdowns, options and flags.
//! 4. A queue in which a pidfd of the tree is in flight waits, whole, until there are tasks ([`Sockets::deliver`]).
//!
//! Calls that the kernel takes note of are made by stand-ins ([`others`]).

mod listen;
mod names;
mod others;
mod outside;
mod refill;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use anyhow::{Context, bail};
use ckpt_proto::types::{FileEntry, SkCreds, SkPacketEntry, UnixSkEntry};
use ckpt_sys::{
    FileId,
    sock::{self, trim_path},
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use self::{
    listen::{Momentary, Place},
    others::Others,
    refill::{filling, kept},
};
use super::{ESTABLISHED, EXTERNAL, LISTEN, kind_name, shown};
use crate::fd::{
    Opening,
    socket::{of, shut_down},
    sockopt::{self, Class, When},
};

/// Sockets being made, by inode.
#[derive(Debug)]
pub(in crate::fd) struct Sockets {
    entries: BTreeMap<u64, Rc<UnixSkEntry>>,
    /// Those that listen: few, and looked through for each connection with a name.
    listeners: Vec<Rc<UnixSkEntry>>,
    /// Listeners, what was handed in, and what is about to be kept.
    made: HashMap<u64, OwnedFd>,
    /// Those that are kept already.
    kept: BTreeSet<u64>,
    /// Other ends that are not part of the images: to fill queues through, and to be closed then.
    far: HashMap<u64, OwnedFd>,
    /// Handed in by the user: taken as they are.
    given: BTreeSet<u64>,
    /// Files that they are bound to (O_PATH).
    handles: HashMap<u64, OwnedFd>,
    momentary: Vec<Momentary>,
    /// In whose name the listeners listen.
    listen: HashMap<Place, Option<SkCreds>>,
    /// Accepted, and not ours: somebody was quicker.
    strangers: HashMap<Place, Vec<OwnedFd>>,
    /// Datagram sockets that get another peer when all queues are filled; `None`: no peer.
    connect_later: Vec<(u64, Option<u64>)>,
    /// Messages, by their number in the image, of queues that wait for pidfds.
    late: Vec<(usize, SkPacketEntry, usize)>,
    others: Others,
}

pub(in crate::fd) fn restore(opening: &mut Opening<'_>, files: &[FileEntry]) -> anyhow::Result<()> {
    let mut sockets = Sockets {
        entries: BTreeMap::new(),
        listeners: Vec::new(),
        made: HashMap::new(),
        kept: BTreeSet::new(),
        far: HashMap::new(),
        given: BTreeSet::new(),
        handles: HashMap::new(),
        momentary: Vec::new(),
        listen: HashMap::new(),
        strangers: HashMap::new(),
        connect_later: Vec::new(),
        late: Vec::new(),
        others: Others::new(opening.options.warn),
    };
    for file in files {
        let usk = of(file, file.usk.as_ref(), "unix socket")?;
        if sockets.entries.insert(usk.ino.into(), Rc::new(usk.clone())).is_some() {
            bail!("two unix sockets have inode {}", usk.ino);
        }
    }
    let listens = |usk: &&Rc<UnixSkEntry>| usk.state == u32::from(LISTEN);
    sockets.listeners = sockets.entries.values().filter(listens).cloned().collect();
    sockets.make_all(opening)?;
    for (ino, usk) in &sockets.entries {
        if let Some(fd) = sockets.made.remove(ino) {
            opening.keep(FileId(usk.id), fd)?;
        } else if !sockets.kept.contains(ino) {
            bail!("unix socket {ino} was not made");
        }
    }
    opening.unix = Some(sockets);
    Ok(())
}

/// What is left to do when files of all kinds are open.
pub(in crate::fd) fn settle(opening: &mut Opening<'_>) -> anyhow::Result<()> {
    let Some(mut sockets) = opening.unix.take() else { return Ok(()) };
    sockets.fill_queues(opening)?;
    let wait = sockets.waiting();
    let filling = filling(opening);
    sockets.settle(filling, |ino| !wait.contains(&ino))?;
    sockets.far.retain(|ino, _| wait.contains(ino));
    for (&ino, usk) in &sockets.entries.clone() {
        let lent = kept(opening, usk)?;
        let fd = lent.as_fd();
        if !sockets.given.contains(&ino) && !wait.contains(&ino) {
            if usk.state == u32::from(LISTEN) {
                let backlog = i32::try_from(usk.backlog).unwrap_or(i32::MAX);
                sockets
                    .others
                    .listen(usk.ckpt_peer_creds.as_ref(), fd, backlog)
                    .with_context(|| what(usk))?;
            }
            finish(usk, fd).with_context(|| what(usk))?;
        }
        Opening::set_flags(fd, usk.flags)?;
    }
    let warn = opening.options.warn;
    let strangers: usize = sockets.strangers.values().map(Vec::len).sum();
    if strangers > 0 {
        warn(&format!(
            "{strangers} clients connected while the restore was under way and have to do it again"
        ));
    }
    if !sockets.late.is_empty() {
        // Their pids are those of the tasks.
        sockets.others = Others::new(warn);
        opening.unix = Some(sockets);
    }
    Ok(())
}

fn what(usk: &UnixSkEntry) -> String {
    let kind = kind_name(i32::try_from(usk.r#type).unwrap_or(0));
    let name = shown(&usk.name);
    if name.is_empty() {
        format!("unix {kind} socket {}", usk.ino)
    } else {
        format!("unix {kind} socket {} ({name})", usk.ino)
    }
}

fn kind(usk: &UnixSkEntry) -> anyhow::Result<SockType> {
    Ok(match i32::try_from(usk.r#type) {
        Ok(libc::SOCK_STREAM) => SockType::Stream,
        Ok(libc::SOCK_DGRAM) => SockType::Datagram,
        Ok(libc::SOCK_SEQPACKET) => SockType::SeqPacket,
        _ => bail!("unix socket {}: unknown type {}", usk.ino, usk.r#type),
    })
}

fn is_datagram(usk: &UnixSkEntry) -> bool {
    usk.r#type == libc::SOCK_DGRAM.unsigned_abs()
}

fn new_socket(usk: &UnixSkEntry) -> anyhow::Result<OwnedFd> {
    socket(AddressFamily::Unix, kind(usk)?, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

fn is_external(usk: &UnixSkEntry) -> bool {
    usk.ckpt_external.is_some() || usk.uflags & EXTERNAL != 0
}

impl Sockets {
    fn entry(&self, ino: u64) -> anyhow::Result<Rc<UnixSkEntry>> {
        self.entries.get(&ino).cloned().with_context(|| format!("no unix socket {ino}"))
    }

    fn make_all(&mut self, opening: &mut Opening<'_>) -> anyhow::Result<()> {
        let all: Vec<Rc<UnixSkEntry>> = self.entries.values().cloned().collect();
        for usk in &all {
            // Every connection may be handed in, but only those that lead outside are asked for.
            let key = format!("socket:[{}]", usk.ino);
            let wanted = opening.options.inherit.iter().any(|(_, name)| *name == key);
            if (is_external(usk) || wanted)
                && let Some(fd) = opening.inherited(&key)?
            {
                check_given(usk, &fd).with_context(|| format!("--inherit-fd ...:{key}"))?;
                self.made.insert(usk.ino.into(), fd);
                self.given.insert(usk.ino.into());
            }
        }
        self.check_queues(opening)?;
        for usk in all.iter().filter(|u| u.state == u32::from(LISTEN)) {
            if !self.made.contains_key(&usk.ino.into()) {
                self.listener(opening, usk).with_context(|| what(usk))?;
            }
        }
        for usk in &all {
            if is_external(usk) || self.waits_at(usk).is_some() {
                continue;
            }
            self.make(opening, usk).with_context(|| what(usk))?;
        }
        for usk in all.iter().filter(|u| is_external(u)) {
            if !self.is_made(usk.ino.into()) {
                let fd = outside::connection(self, opening, usk).with_context(|| what(usk))?;
                self.add(opening, usk, fd)?;
            }
        }
        self.fill_backlogs(opening, &all)
    }

    /// Makes a socket, and its peer with it if that is in the images too.
    fn make(&mut self, opening: &mut Opening<'_>, usk: &Rc<UnixSkEntry>) -> anyhow::Result<()> {
        let ino = u64::from(usk.ino);
        if self.is_made(ino) {
            return Ok(());
        }
        let peer = self.entries.get(&usk.peer.into()).cloned().filter(|p| usk.peer != 0 && p.ino != usk.ino);
        if let Some(peer) = &peer {
            if peer.r#type != usk.r#type {
                bail!("its peer {} is of another type", peer.ino);
            }
            // A datagram socket without a name can only have been reached by the other half of its pair.
            let was_pair = peer.name.is_empty() && !self.is_made(peer.ino.into()) && !is_external(peer);
            if peer.peer == usk.ino || (is_datagram(usk) && was_pair) {
                return self.pair(opening, usk, peer);
            }
            if !is_datagram(usk) {
                bail!("its peer {} has another peer", peer.ino);
            }
            self.connect_later.push((ino, Some(peer.ino.into())));
        }
        let itself = usk.peer == usk.ino;
        if itself {
            self.connect_later.push((ino, Some(ino)));
        }
        let connected = usk.state == u32::from(ESTABLISHED);
        if connected && usk.peer != 0 && peer.is_none() && !itself {
            bail!("its peer {} is not in the images, and it is not marked as external", usk.peer);
        }
        if connected && usk.peer == 0 {
            // The peer has closed.
            let (fd, far) = self.alone(opening, usk)?;
            self.add(opening, usk, fd)?;
            self.far.insert(ino, far);
            return Ok(());
        }
        let fd = new_socket(usk)?;
        self.bind(opening, usk, &fd)?;
        self.add(opening, usk, fd)
    }

    /// Notes a socket that was made. There may be more than this process can have open, so it is kept at once unless it is
    /// needed to make others.
    fn add(&mut self, opening: &mut Opening<'_>, usk: &UnixSkEntry, fd: OwnedFd) -> anyhow::Result<()> {
        let ino = u64::from(usk.ino);
        if usk.state == u32::from(LISTEN) {
            self.made.insert(ino, fd);
            return Ok(());
        }
        self.kept.insert(ino);
        opening.keep(FileId(usk.id), fd)
    }

    fn is_made(&self, ino: u64) -> bool {
        self.made.contains_key(&ino) || self.kept.contains(&ino)
    }

    /// A connection whose other end belongs to nobody.
    fn alone(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &Rc<UnixSkEntry>,
    ) -> anyhow::Result<(OwnedFd, OwnedFd)> {
        if !is_datagram(usk) && !trim_path(&usk.name).is_empty() {
            return self.accepted(opening, usk, None);
        }
        let (fd, far) = self.others.pair(usk.ckpt_peer_creds.as_ref(), usk.r#type.cast_signed())?;
        self.bind(opening, usk, &fd)?;
        Ok((fd, far))
    }

    fn pair(
        &mut self,
        opening: &mut Opening<'_>,
        a: &Rc<UnixSkEntry>,
        b: &Rc<UnixSkEntry>,
    ) -> anyhow::Result<()> {
        let named = |usk: &UnixSkEntry| !trim_path(&usk.name).is_empty();
        if is_datagram(a) {
            // Two that were connected by name have no credentials noted.
            if named(a) && named(b) && a.ckpt_peer_creds.is_none() && b.ckpt_peer_creds.is_none() {
                for (usk, peer) in [(a, b), (b, a)] {
                    let fd = new_socket(usk)?;
                    self.bind(opening, usk, &fd)?;
                    self.add(opening, usk, fd)?;
                    self.connect_later.push((usk.ino.into(), Some(peer.ino.into())));
                }
                return Ok(());
            }
            let creds = a.ckpt_peer_creds.as_ref().or(b.ckpt_peer_creds.as_ref());
            let (fd_a, fd_b) = self.others.pair(creds, libc::SOCK_DGRAM)?;
            self.bind(opening, a, &fd_a)?;
            self.bind(opening, b, &fd_b)?;
            self.add(opening, a, fd_a)?;
            self.add(opening, b, fd_b)?;
            if b.peer != a.ino {
                let to = Some(u64::from(b.peer)).filter(|&p| p != 0);
                self.connect_later.push((b.ino.into(), to));
            }
            return Ok(());
        }
        // One end may have been accepted from a listener; rather from one that is there. One with a name
        // whose other end has none was accepted, since nobody can connect to that.
        let mut ends = [(a, b), (b, a)];
        ends.sort_by_key(|(server, client)| {
            (self.listener_of(server).is_none(), !named(server), named(client))
        });
        let (server, client) = ends[0];
        let (fd, other) = if named(server) {
            self.accepted(opening, server, Some(client))?
        } else {
            self.others.pair(server.ckpt_peer_creds.as_ref(), server.r#type.cast_signed())?
        };
        self.add(opening, server, fd)?;
        self.add(opening, client, other)
    }
}

/// What the user hands in must fit.
fn check_given(usk: &UnixSkEntry, fd: &OwnedFd) -> anyhow::Result<()> {
    let option = |name| match sock::option(fd.as_fd(), libc::SOL_SOCKET, name) {
        Err(e) if e.errno == Errno::ENOTSOCK => bail!("the descriptor is no socket"),
        other => Ok(other?),
    };
    if option(libc::SO_DOMAIN)? != libc::AF_UNIX {
        bail!("the descriptor is no unix socket");
    }
    let given = option(libc::SO_TYPE)?;
    if given.unsigned_abs() != usk.r#type {
        let wanted = kind_name(i32::try_from(usk.r#type).unwrap_or(0));
        bail!("the descriptor is a {} socket, the checkpoint has a {wanted} socket", kind_name(given));
    }
    let listens = option(libc::SO_ACCEPTCONN)? != 0;
    let connected = sock::unix_name(fd.as_fd(), sock::Side::Peer).is_ok();
    match usk.state == u32::from(LISTEN) {
        true if !listens => bail!("the descriptor does not listen, the socket of the checkpoint does"),
        false if listens => bail!("the descriptor listens, the socket of the checkpoint does not"),
        _ if usk.state == u32::from(ESTABLISHED) && !connected => bail!("the descriptor is not connected"),
        _ => {}
    }
    Ok(())
}

/// Shutdown state and options.
fn finish(usk: &UnixSkEntry, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    shut_down(fd, usk.shutdown)?;
    let class = Class::of(libc::AF_UNIX.unsigned_abs(), usk.r#type, 0);
    let options = sockopt::Options::of(&usk.opts);
    for when in [When::BeforeBind, When::Later, When::Last] {
        sockopt::restore(fd, &what(usk), class, &options, when)?;
    }
    if let Some(offset) = usk.ckpt_peek_off {
        let offset = i32::try_from(offset).context("SO_PEEK_OFF")?;
        sock::set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
    }
    Ok(())
}
