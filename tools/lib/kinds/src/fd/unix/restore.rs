//! ckpt-restore's side.
//!
//! Order matters. Listeners come first: a connection whose accepted end bears the name of a listener
//! of the tree is made by connecting to that listener, since nothing else may bear its name. Then
//! pairs, connections to the outside, and all others. Queues are filled through the other end
//! while buffers are as large as need be; then come shutdowns, options and flags. What the peer's
//! credentials were (SO_PEERCRED) is not restored: the kernel notes those of whoever makes a
//! connection, which is ckpt-restore. A program that asks again sees its pid and user.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, PermissionsExt},
        },
    },
    path::PathBuf,
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{FileEntry, SkPacketEntry, SkShutdown, UnixSkEntry, external_socket::PolicyKind},
};
use ckpt_sys::{
    FileId, Refused,
    sock::{self, trim_path},
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, send, shutdown, socket, socketpair,
    },
};

use super::{ESTABLISHED, EXTERNAL, LISTEN, kind_name, shown};
use crate::fd::{
    Opening,
    dump::path,
    sockopt::{self, Class, When},
};

/// What a byte in a queue costs at most, counting the kernel's own structures for small messages.
const OVERHEAD: usize = 1024;

/// Sockets being made, by inode.
struct Sockets<'e> {
    entries: BTreeMap<u64, &'e UnixSkEntry>,
    made: HashMap<u64, OwnedFd>,
    /// Other ends that are not part of the images: to fill queues through, and to be closed then.
    far: HashMap<u64, OwnedFd>,
    /// Handed in by the user: taken as they are.
    given: BTreeSet<u64>,
}

pub(in crate::fd) fn restore(opening: &mut Opening<'_>, files: &[FileEntry]) -> anyhow::Result<()> {
    let mut sockets = Sockets {
        entries: BTreeMap::new(),
        made: HashMap::new(),
        far: HashMap::new(),
        given: BTreeSet::new(),
    };
    for file in files {
        let usk = file.usk.as_ref().with_context(|| {
            let stub = if file.ckpt_stub.is_some() { " (it did not pass ckpt-sk)" } else { "" };
            format!("unix socket {} without its entry{stub}", file.id)
        })?;
        if sockets.entries.insert(usk.ino.into(), usk).is_some() {
            bail!("two unix sockets have inode {}", usk.ino);
        }
    }
    sockets.make_all(opening)?;
    sockets.fill_queues(opening)?;
    sockets.far.clear();
    let Sockets { entries, mut made, given, .. } = sockets;
    for (ino, usk) in entries {
        let fd = made.remove(&ino).with_context(|| format!("unix socket {ino} was not made"))?;
        if !given.contains(&ino) {
            finish(usk, &fd).with_context(|| what(usk))?;
        }
        opening.set_flags(fd.as_fd(), usk.flags)?;
        opening.keep(FileId(usk.id), fd)?;
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

fn new_socket(usk: &UnixSkEntry) -> anyhow::Result<OwnedFd> {
    socket(AddressFamily::Unix, kind(usk)?, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

fn new_pair(usk: &UnixSkEntry) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, kind(usk)?, None, SockFlag::SOCK_CLOEXEC).context("socketpair")
}

fn is_external(usk: &UnixSkEntry) -> bool {
    usk.ckpt_external.is_some() || usk.uflags & EXTERNAL != 0
}

impl<'e> Sockets<'e> {
    fn make_all(&mut self, opening: &mut Opening<'_>) -> anyhow::Result<()> {
        let all: Vec<&'e UnixSkEntry> = self.entries.values().copied().collect();
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
        for usk in all.iter().filter(|u| u.state == u32::from(LISTEN)) {
            if let Entry::Vacant(place) = self.made.entry(usk.ino.into()) {
                place.insert(listener(opening, usk).with_context(|| what(usk))?);
            }
        }
        for usk in &all {
            self.make(opening, usk).with_context(|| what(usk))?;
        }
        // Datagram sockets that send to one that does not answer to them.
        for usk in &all {
            let peer = self.entries.get(&usk.peer.into()).copied();
            if let Some(peer) = peer.filter(|p| p.peer != usk.ino && !is_external(usk)) {
                let fd = self.made.get(&usk.ino.into()).context("a socket made above")?;
                if peer.name.is_empty() {
                    let reason = "connected one way to a socket without a name: not supported yet";
                    return Err(Refused::new(what(usk), reason).into());
                }
                with_directory(peer, |name| Ok(sock::connect_unix(fd.as_fd(), name)?))
                    .with_context(|| what(usk))?;
            }
        }
        Ok(())
    }

    /// Makes a socket, and its peer with it if that is in the images too.
    fn make(&mut self, opening: &mut Opening<'_>, usk: &'e UnixSkEntry) -> anyhow::Result<()> {
        let ino = u64::from(usk.ino);
        if self.made.contains_key(&ino) {
            return Ok(());
        }
        if is_external(usk) {
            let fd = self.external(opening, usk)?;
            self.made.insert(ino, fd);
            return Ok(());
        }
        let peer =
            self.entries.get(&usk.peer.into()).copied().filter(|p| p.peer == usk.ino && p.ino != usk.ino);
        if let Some(peer) = peer {
            if peer.r#type != usk.r#type {
                bail!("its peer {} is of another type", peer.ino);
            }
            return self.pair(opening, usk, peer);
        }
        let connected = usk.state == u32::from(ESTABLISHED);
        if connected && usk.peer != 0 && !self.entries.contains_key(&usk.peer.into()) {
            bail!("its peer {} is not in the images, and it is not marked as external", usk.peer);
        }
        if connected && usk.peer == 0 {
            // The peer has closed.
            let accepted = self.accepted(usk, || new_socket(usk))?;
            let (fd, far) = match accepted {
                Some(both) => both,
                None => {
                    let (fd, far) = new_pair(usk)?;
                    bind(opening, usk, &fd)?;
                    (fd, far)
                }
            };
            self.made.insert(ino, fd);
            self.far.insert(ino, far);
            return Ok(());
        }
        let fd = new_socket(usk)?;
        bind(opening, usk, &fd)?;
        self.made.insert(ino, fd);
        Ok(())
    }

    /// The listener of the images that bears the name of `usk`.
    fn listener_of(&self, usk: &UnixSkEntry) -> Option<&'e UnixSkEntry> {
        let name = trim_path(&usk.name);
        let bears_it = |l: &&&UnixSkEntry| {
            l.state == u32::from(LISTEN) && l.r#type == usk.r#type && trim_path(&l.name) == name
        };
        (!name.is_empty()).then(|| self.entries.values().find(bears_it).copied()).flatten()
    }

    /// A connection whose end `server` was accepted, so that it bears the name of a listener without being
    /// bound to it, and its other end; `None` if it has no such name.
    fn accepted(
        &self,
        server: &UnixSkEntry,
        client: impl FnOnce() -> anyhow::Result<OwnedFd>,
    ) -> anyhow::Result<Option<(OwnedFd, OwnedFd)>> {
        if let Some(at) = self.listener_of(server) {
            let listening = self.made.get(&at.ino.into()).context("a listener made above")?;
            let client = client()?;
            connect_now(at, &client)?;
            return Ok(Some((sock::accept(listening.as_fd())?, client)));
        }
        // A name that is no file can be borne by several sockets if they were all accepted by one listener,
        // which is gone: it is made for a moment. (Of several files with one name the last one stays.)
        if server.name.first() == Some(&0) && kind(server)? != SockType::Datagram {
            let listening = new_socket(server)?;
            sock::bind_unix(listening.as_fd(), &server.name)?;
            sock::listen(listening.as_fd(), 1)?;
            let client = client()?;
            connect_now(server, &client)?;
            return Ok(Some((sock::accept(listening.as_fd())?, client)));
        }
        Ok(None)
    }

    fn pair(
        &mut self,
        opening: &mut Opening<'_>,
        a: &'e UnixSkEntry,
        b: &'e UnixSkEntry,
    ) -> anyhow::Result<()> {
        // One end may have been accepted from a listener; rather from one that is there.
        let mut ends = [(a, b), (b, a)];
        ends.sort_by_key(|(server, _)| self.listener_of(server).is_none());
        for (server, client) in ends {
            let make_client = || {
                let fd = new_socket(client)?;
                bind(opening, client, &fd)?;
                Ok(fd)
            };
            if let Some((fd, other)) = self.accepted(server, make_client)? {
                self.made.insert(server.ino.into(), fd);
                self.made.insert(client.ino.into(), other);
                return Ok(());
            }
        }
        let (fd_a, fd_b) = new_pair(a)?;
        bind(opening, a, &fd_a)?;
        bind(opening, b, &fd_b)?;
        self.made.insert(a.ino.into(), fd_a);
        self.made.insert(b.ino.into(), fd_b);
        Ok(())
    }

    /// A connection to the outside.
    fn external(&mut self, opening: &mut Opening<'_>, usk: &'e UnixSkEntry) -> anyhow::Result<OwnedFd> {
        let ino = u64::from(usk.ino);
        let chosen =
            opening.options.external_unix.iter().find(|(id, _)| id.0 == ino).map(|(_, path)| path.clone());
        if chosen.is_some() {
            opening.connected.insert(ino);
        }
        let external = usk.ckpt_external.as_ref();
        let policy = if chosen.is_some() {
            PolicyKind::Connect
        } else {
            external.map_or(PolicyKind::Inherit, ckpt_proto::types::ExternalSocket::policy)
        };
        let by_hand = format!("--inherit-fd fd[N]:socket:[{ino}] or --external 'unix[{ino}]:PATH'");
        match policy {
            PolicyKind::Close => {
                let (fd, far) = new_pair(usk)?;
                self.far.insert(ino, far);
                Ok(fd)
            }
            PolicyKind::Accept => {
                let reason = "waiting for its peer to connect is not supported yet";
                Err(Refused::new(what(usk), reason).advise(format!("pass {by_hand}")).into())
            }
            PolicyKind::Inherit => {
                let reason = "its peer is outside the checkpoint and has no name to connect to";
                Err(Refused::new(what(usk), reason).advise(format!("pass {by_hand}")).into())
            }
            PolicyKind::Connect => {
                let stored = external.and_then(|e| e.path.clone().or_else(|| e.peer_name.clone()));
                let Some(name) = chosen.or(stored).filter(|n| !trim_path(n).is_empty()) else {
                    let reason = "its peer is outside the checkpoint and has no name to connect to";
                    return Err(Refused::new(what(usk), reason).advise(format!("pass {by_hand}")).into());
                };
                let fd = new_socket(usk)?;
                if self.listener_of(usk).is_none() {
                    bind_if_free(opening, usk, &fd)?;
                } else {
                    // It was accepted; now it connects, and the name is the listener's.
                    let reason = "its name is that of a listener, it comes back without one";
                    (opening.options.warn)(&format!("{}: {reason}", what(usk)));
                }
                sock::connect_unix(fd.as_fd(), trim_path(&name)).with_context(|| {
                    format!("connect to {} (to change this pass {by_hand})", shown(&name))
                })?;
                Ok(fd)
            }
        }
    }

    fn fill_queues(&self, opening: &Opening<'_>) -> anyhow::Result<()> {
        let by_file: HashMap<u32, &UnixSkEntry> = self.entries.values().map(|u| (u.id, *u)).collect();
        let packets: Vec<SkPacketEntry> = opening.set.all(Image::SkQueues, 0)?;
        let mut totals: HashMap<u32, usize> = HashMap::new();
        for packet in &packets {
            let total = totals.entry(packet.id_for).or_default();
            *total = total.saturating_add(packet.length as usize).saturating_add(OVERHEAD);
        }
        for (index, packet) in packets.iter().enumerate() {
            // Queues of other kinds of sockets are their own business.
            let Some(usk) = by_file.get(&packet.id_for) else { continue };
            let ino = u64::from(usk.ino);
            let far = self.far.get(&ino).or_else(|| self.made.get(&usk.peer.into()));
            let Some(far) = far.filter(|_| !self.given.contains(&ino) && usk.state != u32::from(LISTEN))
            else {
                let reason = format!(
                    "it had received {} bytes from its peer outside, which can't be given to it again",
                    packet.length
                );
                let advice =
                    format!("restore without them: ... | sk-rewrite --drop-queues {ino} | ckpt-restore");
                return Err(Refused::new(what(usk), reason).advise(advice).into());
            };
            if let Some(&total) = totals.get(&packet.id_for) {
                sock::make_room(far.as_fd(), total);
            }
            let bytes = opening.set.payload_bytes(Image::SkQueues, 0, index, packet.length.into())?;
            put(far.as_fd(), &bytes, usk)
                .with_context(|| format!("{}: put back what it has received", what(usk)))?;
        }
        Ok(())
    }
}

fn put(far: BorrowedFd<'_>, bytes: &[u8], usk: &UnixSkEntry) -> anyhow::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut rest = bytes;
    loop {
        let n = send(far.as_raw_fd(), rest, flags).with_context(|| format!("send {} bytes", rest.len()))?;
        rest = rest.get(n..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        if kind(usk)? != SockType::Stream {
            bail!("a message of {} bytes was cut to {n}", bytes.len());
        }
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
    let connected = sock::unix_name(fd.as_fd(), sock::Side::Peer).is_ok();
    if usk.state == u32::from(ESTABLISHED) && !connected {
        bail!("the descriptor is not connected");
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

/// Connects without waiting for room in the backlog.
fn connect_now(listener: &UnixSkEntry, fd: &OwnedFd) -> anyhow::Result<()> {
    ckpt_sys::file::set_flags(fd.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
    with_directory(listener, |name| Ok(sock::connect_unix(fd.as_fd(), name)?))?;
    Ok(ckpt_sys::file::set_flags(fd.as_fd(), 0)?)
}

/// The path of a socket file, absolute; `None` for other names.
fn socket_path(usk: &UnixSkEntry) -> Option<PathBuf> {
    let name = trim_path(&usk.name);
    name.first().filter(|&&b| b != 0)?;
    let directory = usk.name_dir.as_ref().map_or(PathBuf::new(), |d| path(trim_path(d)).to_owned());
    Some(directory.join(path(name)))
}

/// Binds a socket to its name if it has one.
fn bind(opening: &mut Opening<'_>, usk: &UnixSkEntry, fd: &OwnedFd) -> anyhow::Result<()> {
    if trim_path(&usk.name).is_empty() {
        return Ok(());
    }
    if let Some(file) = socket_path(usk) {
        remove_stale(usk, &file)?;
        with_directory(usk, |name| Ok(sock::bind_unix(fd.as_fd(), name)?))?;
        let made = if usk.deleted == Some(true) {
            Some(opening.created(file.clone(), false))
        } else {
            opening.created_socket(file.clone());
            None
        };
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
        return Ok(());
    }
    Ok(sock::bind_unix(fd.as_fd(), &usk.name)?)
}

/// Like [`bind`], for a socket that only happens to have a name: left out, and told, if somebody has it now.
fn bind_if_free(opening: &mut Opening<'_>, usk: &UnixSkEntry, fd: &OwnedFd) -> anyhow::Result<()> {
    let warn = opening.options.warn;
    let taken = || warn(&format!("{}: its name is taken, it comes back without one", what(usk)));
    if socket_path(usk).is_some_and(|file| fs::symlink_metadata(file).is_ok()) {
        taken();
        return Ok(());
    }
    match bind(opening, usk, fd) {
        Err(e) if e.downcast_ref::<ckpt_sys::SysError>().is_some_and(|e| e.errno == Errno::EADDRINUSE) => {
            taken();
            Ok(())
        }
        other => other,
    }
}

/// Removes a socket file that nobody listens at. Anything else in its place is an error.
fn remove_stale(usk: &UnixSkEntry, file: &PathBuf) -> anyhow::Result<()> {
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

fn listener(opening: &mut Opening<'_>, usk: &UnixSkEntry) -> anyhow::Result<OwnedFd> {
    let fd = new_socket(usk)?;
    bind(opening, usk, &fd)?;
    sock::listen(fd.as_fd(), i32::try_from(usk.backlog).unwrap_or(i32::MAX))?;
    Ok(fd)
}

/// Shutdown state and options.
fn finish(usk: &UnixSkEntry, fd: &OwnedFd) -> anyhow::Result<()> {
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
        sockopt::restore(fd.as_fd(), &what(usk), class, &options, when)?;
    }
    if let Some(offset) = usk.ckpt_peek_off {
        let offset = i32::try_from(offset).context("SO_PEEK_OFF")?;
        sock::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
    }
    Ok(())
}
