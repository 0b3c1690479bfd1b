//! ckpt-restore's side.
//!
//! Order matters.
//!
//! 1. What the user hands in, then listeners: a connection whose accepted end bears the name of a listener
//!    of the tree is made by connecting to that listener, since nothing else may bear its name. If the listener
//!    is gone, one is made for a moment, *apart* from the file system ([`ckpt_sys::standin`]).
//! 2. Pairs and all others, then connections to the outside ([`super::outside`]), which may have to be waited
//!    for, and last the connections that nobody has accepted.
//! 3. When files of all kinds are open ([`settle`]), for any of them may be in flight: queues are filled, through
//!    the other end while buffers are as large as need be; then come datagram sockets that send to one that
//!    does not answer to them, shutdowns, options and flags.
//! 4. A queue in which a pidfd of the tree is in flight waits, whole, until there are tasks ([`Sockets::deliver`]).
//!
//! Sockets are reached through a descriptor of their file, `/proc/self/fd/N`, which works whatever has
//! become of the path. Calls that the kernel takes note of are made by stand-ins ([`super::others`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, PermissionsExt},
        },
    },
    path::PathBuf,
    rc::Rc,
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{FileEntry, SkCreds, SkPacketEntry, SkShutdown, UnixSkEntry},
};
use ckpt_sys::{
    FileId, Refused,
    sock::{self, trim_path},
    unixsock,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socket},
};

use super::{ESTABLISHED, EXTERNAL, LISTEN, kind_name, others::Others, outside, shown};
use crate::fd::{
    Lent, Opening,
    dump::path,
    shelf::Shelf,
    socket::of,
    sockopt::{self, Class, When},
};

/// What a byte in a queue costs at most, counting the kernel's own structures for small messages.
const OVERHEAD: usize = 1024;
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
    pub(super) far: HashMap<u64, OwnedFd>,
    /// Handed in by the user: taken as they are.
    given: BTreeSet<u64>,
    /// Files that they are bound to (O_PATH).
    handles: HashMap<u64, OwnedFd>,
    pub(super) momentary: Vec<Momentary>,
    /// In whose name the listeners listen.
    listen: HashMap<Place, Option<SkCreds>>,
    /// Accepted, and not ours: somebody was quicker.
    pub(super) strangers: HashMap<Place, Vec<OwnedFd>>,
    /// Datagram sockets that get another peer when all queues are filled; `None`: no peer.
    connect_later: Vec<(u64, Option<u64>)>,
    /// Messages, by their number in the image, of queues that wait for pidfds.
    late: Vec<(usize, SkPacketEntry, usize)>,
    pub(super) others: Others,
}

/// What it takes to fill queues.
#[derive(Clone, Copy)]
struct Filling<'a> {
    /// Open files by number in FILES.
    files: &'a Shelf,
    warn: fn(&str),
}

impl<'a> Filling<'a> {
    fn kept(self, usk: &UnixSkEntry) -> anyhow::Result<Lent<'a>> {
        self.files.lend(FileId(usk.id))?.with_context(|| format!("{} was not made", what(usk)))
    }
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

fn filling<'a>(opening: &'a Opening<'_>) -> Filling<'a> {
    Filling { files: &opening.shelf, warn: opening.options.warn }
}

fn kept<'o>(opening: &'o Opening<'_>, usk: &UnixSkEntry) -> anyhow::Result<Lent<'o>> {
    filling(opening).kept(usk)
}

pub(super) fn what(usk: &UnixSkEntry) -> String {
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

pub(super) fn is_datagram(usk: &UnixSkEntry) -> bool {
    usk.r#type == libc::SOCK_DGRAM.unsigned_abs()
}

pub(super) fn new_socket(usk: &UnixSkEntry) -> anyhow::Result<OwnedFd> {
    socket(AddressFamily::Unix, kind(usk)?, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

pub(super) fn is_external(usk: &UnixSkEntry) -> bool {
    usk.ckpt_external.is_some() || usk.uflags & EXTERNAL != 0
}

fn handle_name(handle: &OwnedFd) -> Vec<u8> {
    format!("/proc/self/fd/{}", handle.as_raw_fd()).into_bytes()
}

impl Sockets {
    /// Sockets that can't be finished yet: a queue waits for pidfds, or is filled by them.
    fn waiting(&self) -> BTreeSet<u64> {
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
    fn settle(&mut self, filling: Filling<'_>, ready: impl Fn(u64) -> bool) -> anyhow::Result<()> {
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

    /// The listener in whose backlog a connection waits.
    fn waits_at(&self, usk: &UnixSkEntry) -> Option<&Rc<UnixSkEntry>> {
        let connected = usk.state == u32::from(ESTABLISHED) && !is_datagram(usk) && !is_external(usk);
        self.entries.get(&usk.peer.into()).filter(|p| connected && p.state == u32::from(LISTEN))
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
    pub(super) fn alone(
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

    /// The address under which socket `ino` is reached now; empty if it has none.
    fn address_of(&self, ino: u64) -> anyhow::Result<Vec<u8>> {
        if let Some(handle) = self.handles.get(&ino) {
            return Ok(handle_name(handle));
        }
        match self.made.get(&ino) {
            // Handed in.
            Some(fd) if self.given.contains(&ino) => Ok(sock::unix_name(fd.as_fd(), sock::Side::Local)?),
            _ => Ok(self.entry(ino)?.name.clone()),
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
    fn accepted(
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

    fn listener(&mut self, opening: &mut Opening<'_>, usk: &Rc<UnixSkEntry>) -> anyhow::Result<()> {
        let fd = new_socket(usk)?;
        self.bind(opening, usk, &fd)?;
        self.made.insert(usk.ino.into(), fd);
        self.listen_as(Place::Ours(usk.ino.into()), usk.ckpt_peer_creds.as_ref())
    }

    /// Connections that wait to be accepted, in their order where it is known.
    fn fill_backlogs(&mut self, opening: &mut Opening<'_>, all: &[Rc<UnixSkEntry>]) -> anyhow::Result<()> {
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
            return Ok(unixsock::disconnect(fd)?);
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

    /// What was received from outside can't be given to a new connection; that is to be known
    /// before anybody waits for one.
    fn check_queues(&self, opening: &Opening<'_>) -> anyhow::Result<()> {
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

    fn fill_queues(&mut self, opening: &Opening<'_>) -> anyhow::Result<()> {
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

    /// Binds a socket to its name if it has one.
    pub(super) fn bind(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &UnixSkEntry,
        fd: &OwnedFd,
    ) -> anyhow::Result<()> {
        let name = trim_path(&usk.name);
        if name.is_empty() {
            return Ok(());
        }
        let Some(file) = socket_path(usk) else { return Ok(sock::bind_unix(fd.as_fd(), &usk.name)?) };
        let ino = u64::from(usk.ino);
        let deleted = usk.deleted == Some(true);
        if deleted && let Some(handle) = self.others.bind_apart(fd.as_fd(), name)? {
            self.handles.insert(ino, handle);
            return Ok(());
        }
        remove_stale(usk, &file)?;
        with_directory(usk, |name| Ok(sock::bind_unix(fd.as_fd(), name)?))?;
        let made = if deleted {
            Some(opening.created(file.clone(), false))
        } else {
            opening.created_socket(file.clone());
            None
        };
        self.handles.insert(ino, open_handle(&file)?);
        if let Some(perms) = &usk.file_perms {
            let set = || -> std::io::Result<()> {
                std::os::unix::fs::chown(&file, Some(perms.uid), Some(perms.gid))?;
                fs::set_permissions(&file, fs::Permissions::from_mode(perms.mode & 0o7777))
            };
            set().with_context(|| format!("owner and mode of {}", file.display()))?;
        }
        if let Some(token) = made {
            opening.remove_created(token);
        }
        Ok(())
    }

    /// Like [`Self::bind`], for a socket that only happens to have a name: left out, and told, if somebody has
    /// it now.
    pub(super) fn bind_if_free(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &UnixSkEntry,
        fd: &OwnedFd,
    ) -> anyhow::Result<()> {
        let warn = opening.options.warn;
        let taken = || warn(&format!("{}: its name is taken, it comes back without one", what(usk)));
        if socket_path(usk).is_some_and(|file| fs::symlink_metadata(file).is_ok()) {
            taken();
            return Ok(());
        }
        match self.bind(opening, usk, fd) {
            Err(e)
                if e.downcast_ref::<ckpt_sys::SysError>().is_some_and(|e| e.errno == Errno::EADDRINUSE) =>
            {
                taken();
                Ok(())
            }
            other => other,
        }
    }
}

/// The file of a socket, to reach it by.
fn open_handle(file: &std::path::Path) -> anyhow::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    Ok(ckpt_sys::file::open(file, flags.cast_unsigned(), 0)?)
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

/// Runs `f` with the name of `usk`, in the directory that a relative one was relative to.
fn with_directory<T>(usk: &UnixSkEntry, f: impl FnOnce(&[u8]) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let name = trim_path(&usk.name);
    let Some(directory) =
        usk.name_dir.as_ref().filter(|_| name.first().is_some_and(|&b| b != 0 && b != b'/'))
    else {
        return f(name);
    };
    let before = fs::File::open(".").context("open the current directory")?;
    let directory = path(trim_path(directory));
    nix::unistd::chdir(directory).with_context(|| format!("chdir {}", directory.display()))?;
    let result = f(name);
    nix::unistd::fchdir(&before).context("fchdir")?;
    result
}

/// The path of a socket file, absolute; `None` for other names.
pub(super) fn socket_path(usk: &UnixSkEntry) -> Option<PathBuf> {
    let name = trim_path(&usk.name);
    name.first().filter(|&&b| b != 0)?;
    let directory = usk.name_dir.as_ref().map_or(PathBuf::new(), |d| path(trim_path(d)).to_owned());
    Some(directory.join(path(name)))
}

/// Removes a socket file that nobody listens at. Anything else in its place is an error.
pub(super) fn remove_stale(usk: &UnixSkEntry, file: &PathBuf) -> anyhow::Result<()> {
    let Ok(found) = fs::symlink_metadata(file) else { return Ok(()) };
    if !found.file_type().is_socket() {
        bail!("{}: a file is in the way that is no socket", file.display());
    }
    let probe = new_socket(usk)?;
    ckpt_sys::file::set_flags(probe.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
    match sock::connect_unix(probe.as_fd(), file.as_os_str().as_bytes()) {
        Err(e) if e.errno == Errno::ECONNREFUSED => {
            fs::remove_file(file).with_context(|| format!("remove the stale {}", file.display()))
        }
        Err(e) if e.errno == Errno::ENOENT => Ok(()),
        Ok(()) | Err(_) => {
            let reason = "another process has a socket there";
            Err(Refused::new(file.display().to_string(), reason).advise("end it, or move its socket").into())
        }
    }
}

/// Shutdown state and options.
fn finish(usk: &UnixSkEntry, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    let how = match usk.shutdown.and_then(|s| SkShutdown::try_from(s).ok()) {
        Some(SkShutdown::Read) => Some(Shutdown::Read),
        Some(SkShutdown::Write) => Some(Shutdown::Write),
        Some(SkShutdown::Both) => Some(Shutdown::Both),
        None | Some(SkShutdown::None) => None,
    };
    if let Some(how) = how {
        match shutdown(fd.as_raw_fd(), how) {
            // Closed by its peer, which has done it for us.
            Ok(()) | Err(Errno::ENOTCONN) => {}
            Err(errno) => return Err(errno).context("shutdown"),
        }
    }
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
