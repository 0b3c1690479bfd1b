//! ckpt-sk's side: from stubs to entries and queues.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_proto::types::{
    ExternalSocket as ExternalEntry, FdTypes, FileEntry, FilePermsEntry, ScmEntry, SkCreds, SkPacketEntry,
    UnixSkEntry, external_socket::PolicyKind,
};
use ckpt_sys::{
    Pid, Refused, TargetFd,
    diag::{SockDiag, UnixSocket},
    pidfd,
    sock::{self, trim_path},
    unixsock,
};

use super::{
    CLOSE, ESTABLISHED, EXTERNAL, ExternalSocket, LISTEN, Which, kind_name,
    queue::{self, Message},
    shown,
};
use crate::{
    Sink,
    fd::{
        Look,
        dump::{find_holders, kernel_dev, path},
        socket::{self, Completion, Queued, Say, SkOptions},
        sockopt,
    },
};

/// Who holds a socket: pid, command, descriptor.
pub(super) type Holder = (Pid, String, TargetFd);

/// All unix sockets of the system, and their holders once somebody asks.
#[derive(Debug)]
pub(super) struct World {
    pub(super) sockets: HashMap<u64, UnixSocket>,
    /// Listeners by the connections that wait in their backlogs.
    waiting: HashMap<u64, u64>,
    /// Addresses of listeners.
    listening: HashSet<Vec<u8>>,
    holders: Option<HashMap<u64, Vec<Holder>>>,
}

impl World {
    /// Those of this network namespace, and of the others that `open` are in.
    pub(super) fn read(open: &[socket::Socket<'_>]) -> anyhow::Result<Self> {
        let mut sockets = SockDiag::here().and_then(|diag| diag.unix()).context("enumerate unix sockets")?;
        let mut known = BTreeSet::new();
        for socket in open.iter().filter(|s| s.foreign.is_some_and(|network| known.insert(network))) {
            let copy = socket.copy()?;
            let theirs = sock::network(copy.as_fd())
                .and_then(|network| SockDiag::within(network.as_fd()))
                .and_then(|diag| diag.unix())
                .with_context(|| {
                    format!("{}: enumerate unix sockets of its network namespace", socket.subject)
                })?;
            sockets.extend(theirs);
        }
        let listeners = || sockets.iter().filter(|s| s.state == LISTEN);
        let waiting = listeners().flat_map(|l| l.pending.iter().map(|&client| (client, l.id))).collect();
        let listening = listeners().map(|l| trim_path(&l.name).to_vec()).collect();
        let sockets = sockets.into_iter().map(|s| (s.id, s)).collect();
        Ok(Self { sockets, waiting, listening, holders: None })
    }

    /// Everybody who has the socket open. One walk over /proc for all questions.
    pub(super) fn holders(&mut self, id: u64) -> &[Holder] {
        let own = Pid(std::process::id().cast_signed());
        let all = self.holders.get_or_insert_with(|| {
            let mut all: HashMap<u64, Vec<Holder>> = HashMap::new();
            for (pid, comm, fd, link) in find_holders(|link| link.starts_with(b"socket:[")) {
                let id = std::str::from_utf8(&link).ok().and_then(sock::parse_id);
                if let Some(id) = id.filter(|_| pid != own) {
                    all.entry(id.0).or_default().push((pid, comm, fd));
                }
            }
            all
        });
        all.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The first of them.
    pub(super) fn holder(&mut self, id: u64) -> Option<&Holder> {
        self.holders(id).first()
    }

    /// The listener in whose backlog the far end of connection `id` waits.
    pub(super) fn waits_at(&self, id: u64) -> Option<&UnixSocket> {
        self.waiting.get(&id).and_then(|listener| self.sockets.get(listener))
    }
}

/// One socket of the tree.
pub(super) struct Socket<'a> {
    open: socket::Socket<'a>,
    pub(super) diag: UnixSocket,
}

impl<'a> std::ops::Deref for Socket<'a> {
    type Target = socket::Socket<'a>;
    fn deref(&self) -> &Self::Target {
        &self.open
    }
}

impl Socket<'_> {
    pub(super) fn what(&self) -> String {
        format!("unix {} socket {}", kind_name(self.diag.kind), self.diag.id)
    }

    pub(super) fn refuse(&self, reason: impl std::fmt::Display) -> Refused {
        self.open.refuse(&self.what(), reason)
    }
}

/// Emits the entries of unix sockets, and what is queued.
///
/// # Errors
/// [`Refused`] for what can't be checkpointed or needs the user's word; the sink's.
pub fn complete(
    open: Vec<socket::Socket<'_>>,
    completion: Completion<'_>,
    sink: &mut dyn Sink,
) -> anyhow::Result<()> {
    let Completion { net_ns, options, say, defaults, look } = completion;
    if open.is_empty() && options.external.is_empty() {
        return Ok(());
    }
    let mut world = World::read(&open)?;
    let mut sockets = BTreeMap::new();
    for open in open {
        let ino = open.stub.ino;
        let diag = world.sockets.get(&ino).cloned();
        let diag =
            diag.with_context(|| format!("{}: the kernel does not list socket {ino}", open.subject))?;
        let socket = Socket { open, diag };
        // All that is lost of a connection at a path is where the kernel lists it.
        let movable = socket.diag.state == ESTABLISHED
            && socket.diag.kind != libc::SOCK_DGRAM
            && socket.diag.name.first().is_none_or(|&b| b != 0);
        if socket.foreign.is_some() && !movable {
            return Err(socket.elsewhere(&socket.what()).into());
        }
        sockets.insert(ino, socket);
    }
    check_ids(options, &sockets)?;
    let mut used = BTreeSet::new();
    let mut queues: Vec<(&Socket<'_>, Vec<Message>)> = Vec::new();
    for socket in sockets.values() {
        let external = decide(socket, &sockets, &mut world, options, &mut used)?;
        let skip = options.tcp.skip_in_flight;
        let backlog = backlog(socket, &sockets, skip, say)?;
        let mut messages = Vec::new();
        if socket.diag.state != LISTEN
            && (external.is_none() || keep_received(socket, options.queued, say.warn)?)
        {
            messages = queue::peek(socket, &sockets)?;
        }
        if external.is_some() {
            messages.extend(unsent(socket, &mut world, options.queued, say.warn, look)?);
        }
        let is_external = external.is_some();
        let mut waits_at = world.waits_at(socket.diag.id).map(|l| l.id).filter(|l| sockets.contains_key(l));
        if waits_at.is_some() && skip {
            (say.warn)(&format!(
                "{}: {}: its connection, not accepted yet, will have been closed",
                socket.subject,
                socket.what()
            ));
            waits_at = None;
        } else if waits_at.is_some() {
            messages.extend(unaccepted(socket, look)?);
        }
        let usk = entry(socket, external, waits_at, backlog, net_ns(socket.pid()), defaults)?;
        socket.emit(FdTypes::Unixsk, FileEntry { usk: Some(usk), ..FileEntry::default() }, sink)?;
        if is_external || socket.diag.state != LISTEN {
            queues.push((socket, messages));
        }
    }
    if let Some((_, unused)) =
        options.external.iter().enumerate().find(|(i, e)| !used.contains(i) && e.which != Which::All)
    {
        bail!(
            "--external {}: no connection of the tree that leads outside is meant by it; those that do: {}",
            unused.which,
            outside(&sockets, &mut world)
        );
    }
    queue::add_hidden(&mut queues, &sockets, look)?;
    for (socket, messages) in queues {
        for message in messages {
            let packet = SkPacketEntry {
                scm: (!message.rights.is_empty())
                    .then(|| ScmEntry { r#type: libc::SCM_RIGHTS.unsigned_abs(), rights: message.rights })
                    .into_iter()
                    .collect(),
                ckpt_creds: message.creds,
                ckpt_sender: message.sender,
                ckpt_unsent: message.unsent.then_some(true),
                ..SkPacketEntry::default()
            };
            socket.emit_queued(packet, &message.bytes, sink)?;
        }
    }
    Ok(())
}

/// IDs that the user gave must exist.
fn check_ids(options: &SkOptions, sockets: &BTreeMap<u64, Socket<'_>>) -> anyhow::Result<()> {
    for external in &options.external {
        if let Which::Id(id) = external.which
            && !sockets.contains_key(&id.0)
        {
            let there: Vec<String> = sockets
                .values()
                .map(|s| format!("{} ({})", s.diag.id, s.subject.split_once(" fd").map_or("", |(p, _)| p)))
                .collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            bail!("--external {id}: the tree has no such unix socket; those that it has: {there}");
        }
    }
    Ok(())
}

/// The connections that lead outside, for a message.
fn outside(sockets: &BTreeMap<u64, Socket<'_>>, world: &mut World) -> String {
    let mut all = Vec::new();
    for socket in sockets.values() {
        let at = world.waits_at(socket.diag.id).map(|l| l.id);
        let Some(peer) = socket.diag.peer.filter(|&p| p != 0).or(at).filter(|p| !sockets.contains_key(p))
        else {
            continue;
        };
        let name = world.sockets.get(&peer).map(|p| shown(&p.name)).unwrap_or_default();
        let who = world.holder(peer).map_or_else(String::new, |(pid, comm, _)| format!("pid {pid}, {comm}"));
        let words = [who, name].into_iter().filter(|w| !w.is_empty()).collect::<Vec<_>>().join(", ");
        all.push(format!("{} ({words})", socket.diag.id));
    }
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

/// Whether a socket's connection leads outside, and may; the policy for it.
fn decide(
    socket: &Socket<'_>,
    sockets: &BTreeMap<u64, Socket<'_>>,
    world: &mut World,
    options: &SkOptions,
    used: &mut BTreeSet<usize>,
) -> anyhow::Result<Option<ExternalEntry>> {
    let id = socket.diag.id;
    let by_id = options.external.iter().any(|e| matches!(e.which, Which::Id(wanted) if wanted.0 == id));
    // What is no connection to the outside can't be marked as one.
    let inside = |reason: &str| -> anyhow::Result<Option<ExternalEntry>> {
        if by_id { Err(socket.refuse(format!("--external {id}: {reason}")).into()) } else { Ok(None) }
    };
    if socket.diag.state == LISTEN {
        return inside("it listens, it has no connection");
    }
    let Some(peer) = socket.diag.peer else { return inside("it has no peer") };
    if sockets.contains_key(&peer) {
        return inside(&format!("its peer {peer} is inside the tree"));
    }
    // A peer without an inode has been closed, or has not been accepted; only the former shuts us down.
    let peer = if peer == 0 {
        match world.waits_at(id).map(|listener| listener.id) {
            None => return inside("its peer has closed"),
            Some(listener) if sockets.contains_key(&listener) => {
                return inside("its peer is inside the tree");
            }
            Some(listener) => listener,
        }
    } else {
        peer
    };
    let peer_name = world.sockets.get(&peer).map(|s| trim_path(&s.name).to_vec()).unwrap_or_default();
    let holders = world.holders(peer).to_vec();
    let pids: Vec<Pid> = holders.iter().map(|(pid, ..)| *pid).collect();
    let meant: Vec<(usize, &ExternalSocket)> = options
        .external
        .iter()
        .enumerate()
        .filter(|(_, e)| e.means(id, [&socket.diag.name, &peer_name], &pids))
        .collect();
    used.extend(meant.iter().map(|(index, _)| *index));
    // What names this socket alone counts first.
    let marked =
        meant.iter().find(|(_, e)| matches!(e.which, Which::Id(_))).or(meant.first()).map(|(_, e)| *e);
    let Some(marked) = marked else {
        let who = holders
            .first()
            .map_or_else(|| "nobody in /proc".to_owned(), |(pid, comm, _)| format!("pid {pid}, {comm}"));
        let advice = format!("pass --external {id}[:PATH] here, or dump the peer too (ckpt-scan -t)");
        return Err(socket.refuse(format!("its peer is outside the tree ({who})")).advise(advice).into());
    };
    let own_name = trim_path(&socket.diag.name);
    let accepts = socket.diag.kind != libc::SOCK_DGRAM && !own_name.is_empty();
    // Whoever was accepted bears the name of the listener. Once that is gone, it was this end that was
    // accepted if the other one has no name: nobody can connect to that.
    let policy = if marked.path.is_some() {
        PolicyKind::Connect
    } else if accepts && world.listening.contains(own_name) {
        PolicyKind::Accept
    } else if !peer_name.is_empty() {
        PolicyKind::Connect
    } else if accepts {
        PolicyKind::Accept
    } else {
        PolicyKind::Inherit
    };
    let holder = holders.into_iter().next();
    Ok(Some(ExternalEntry {
        policy: policy.into(),
        path: marked.path.clone(),
        peer_name: (!peer_name.is_empty()).then_some(peer_name),
        peer_pid: holder.as_ref().map(|(pid, ..)| pid.0.unsigned_abs()),
        peer_comm: holder.map(|(_, comm, _)| comm.into_bytes()),
    }))
}

/// What was sent over a connection that is not accepted yet. Its far end has no descriptor anywhere.
fn far_queue(socket: &Socket<'_>, look: &Look) -> Result<Vec<Message>, String> {
    let copy = socket.copy().map_err(|error| format!("{error:#}"))?;
    let queue = look.ask(|kernel| kernel.unix_peer_queue(copy.as_fd()))?;
    if queue.iter().any(|message| message.rights) {
        return Err("descriptors (SCM_RIGHTS) are among them, which can't be followed there".to_owned());
    }
    let most = if socket.diag.kind == libc::SOCK_STREAM { queue::STREAM_PIECE } else { usize::MAX };
    let messages = queue.into_iter().flat_map(|message| {
        let creds = message.credentials.and_then(queue::noted);
        let mut pieces: Vec<Vec<u8>> = message.bytes.chunks(most).map(<[u8]>::to_vec).collect();
        if pieces.is_empty() && most == usize::MAX {
            pieces.push(Vec::new());
        }
        pieces.into_iter().map(move |bytes| Message {
            bytes,
            creds: creds.clone(),
            unsent: true,
            ..Message::default()
        })
    });
    Ok(messages.collect())
}

/// The same for one inside the tree: it will be sent again.
fn unaccepted(socket: &Socket<'_>, look: &Look) -> anyhow::Result<Vec<Message>> {
    let memory = sock::unread_memory(socket.copy()?.as_fd())?;
    if memory == 0 {
        return Ok(Vec::new());
    }
    far_queue(socket, look).map_err(|why| {
        let reason = format!(
            "it has sent data ({memory} bytes of memory) over a connection that is not accepted yet, where nobody can read them: {why}"
        );
        let advice = "checkpoint when it has been accepted, or pass --skip-in-flight to have it closed";
        socket.refuse(reason).advise(advice).into()
    })
}

/// What waits in a listener's backlog: gives the connections from inside, in their order. The server has
/// not seen any of them. One from outside is the business of the original, which runs on and accepts it; a
/// client that connects to the restored server does so again.
fn backlog(
    socket: &Socket<'_>,
    sockets: &BTreeMap<u64, Socket<'_>>,
    skip: bool,
    say: Say<'_>,
) -> anyhow::Result<Vec<(u32, SkCreds)>> {
    if socket.diag.state != LISTEN {
        return Ok(Vec::new());
    }
    let (inside, pending): (Vec<u64>, Vec<u64>) =
        socket.diag.pending.iter().partition(|id| sockets.contains_key(id));
    let (gone, there): (Vec<u64>, Vec<u64>) = pending.into_iter().partition(|&id| id == 0);
    let name = shown(&socket.diag.name);
    if !there.is_empty() {
        let count = there.len();
        (say.note)(&format!(
            "{}: {} ({name}): {count} connections from outside the tree, not accepted yet, are passed over",
            socket.subject,
            socket.what(),
        ));
    }
    if !gone.is_empty() {
        let count = gone.len();
        (say.warn)(&format!(
            "{}: {} ({name}): {count} connections, not accepted yet and closed by their clients already, are left out",
            socket.subject,
            socket.what(),
        ));
    }
    let clients = inside.iter().filter(|_| !skip).filter_map(|id| sockets.get(id));
    clients.map(|client| Ok((client.ino()?, credentials_of(client.pid())?))).collect()
}

/// Effective ids and groups of a process.
fn credentials_of(pid: Pid) -> anyhow::Result<SkCreds> {
    let path = format!("/proc/{pid}/status");
    let status = ckpt_proc::status::parse(&std::fs::read(&path).with_context(|| path.clone())?)
        .with_context(|| path.clone())?;
    Ok(SkCreds {
        pid: pid.0.unsigned_abs(),
        uid: status.uid.effective,
        gid: status.gid.effective,
        groups: status.groups,
    })
}

/// Whether what an external connection has received goes into the images.
fn keep_received(socket: &Socket<'_>, queued: Queued, warn: &dyn Fn(&str)) -> anyhow::Result<bool> {
    let bytes = socket.diag.rqueue;
    if bytes == 0 {
        return Ok(false);
    }
    match queued {
        Queued::Keep => Ok(true),
        Queued::Drop => {
            warn(&format!(
                "{}: {}: {bytes} bytes received and not read are left out",
                socket.subject,
                socket.what()
            ));
            Ok(false)
        }
        Queued::Refuse => Err(socket
            .refuse(format!("{bytes} bytes from its peer outside are received and not read"))
            .advise("checkpoint when they have been read, or pass --queued=drop or --queued=keep")
            .into()),
    }
}

/// What was sent over an external connection and is not read yet. The original's peer reads it; whoever is
/// the peer after a restore would miss it. Datagrams are another matter: they have arrived where they were
/// sent, whatever becomes of the sender.
fn unsent(
    socket: &Socket<'_>,
    world: &mut World,
    queued: Queued,
    warn: &dyn Fn(&str),
    look: &Look,
) -> anyhow::Result<Vec<Message>> {
    let memory = sock::unread_memory(socket.copy()?.as_fd())?;
    if memory == 0 || socket.diag.kind == libc::SOCK_DGRAM {
        return Ok(Vec::new());
    }
    let peer = socket.diag.peer.filter(|&p| p != 0);
    let what = match peer.and_then(|p| world.sockets.get(&p)) {
        Some(peer) => {
            format!("{} bytes sent ({memory} of memory) and not read yet by its peer outside", peer.rqueue)
        }
        None => {
            format!("data sent ({memory} bytes of memory) to a listener outside that has not accepted it")
        }
    };
    match queued {
        Queued::Refuse => Err(socket
            .refuse(what)
            .advise("checkpoint when they have been read, or pass --queued=drop or --queued=keep")
            .into()),
        Queued::Drop => {
            warn(&format!("{}: {}: {what} are left out", socket.subject, socket.what()));
            Ok(Vec::new())
        }
        Queued::Keep => {
            let cannot = |why: &str| -> anyhow::Error {
                let refused = socket.refuse(format!("{what}, which can't be kept: {why}"));
                refused.advise("checkpoint when they have been read, or pass --queued=drop").into()
            };
            if peer.is_none() && world.waits_at(socket.diag.id).is_some() {
                return far_queue(socket, look).map_err(|why| cannot(&why));
            }
            if socket.diag.kind != libc::SOCK_STREAM {
                return Err(cannot("packets of somebody else's queue can't be told apart"));
            }
            let Some((pid, _, fd)) = peer.and_then(|p| world.holder(p)).cloned() else {
                return Err(cannot("nobody in /proc has the other end open"));
            };
            let copy = pidfd::open(pid).and_then(|task| pidfd::getfd(task.as_fd(), fd));
            let copy = copy.map_err(|error| cannot(&error.to_string()))?;
            let mut buffer = vec![0; ckpt_sys::file::readable_bytes(copy.as_fd())? as usize];
            let got = unixsock::peek(copy.as_fd(), &mut buffer)?.unwrap_or_default();
            if !got.rights.is_empty() || got.len != buffer.len() {
                return Err(cannot("they carry descriptors or credentials"));
            }
            let pieces = buffer.chunks(queue::STREAM_PIECE);
            Ok(pieces.map(|p| Message { bytes: p.to_vec(), unsent: true, ..Message::default() }).collect())
        }
    }
}

fn entry(
    socket: &Socket<'_>,
    external: Option<ExternalEntry>,
    waits_at: Option<u64>,
    backlog: Vec<(u32, SkCreds)>,
    ns_id: Option<u32>,
    defaults: &sockopt::Defaults,
) -> anyhow::Result<UnixSkEntry> {
    let (stub, diag) = (socket.stub, &socket.diag);
    let fits =
        |n: u64| u32::try_from(n).map_err(|_| socket.refuse("an inode that does not fit into the images"));
    let file = socket_file(socket)?;
    let copy = socket.copy()?;
    let peek_off = sock::option(copy.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    // The kernel calls a datagram socket connected too if another one has connected to it.
    let state = if diag.kind == libc::SOCK_DGRAM && diag.peer.is_none() { CLOSE } else { diag.state };
    Ok(UnixSkEntry {
        id: socket.file_id,
        ino: fits(diag.id)?,
        r#type: diag.kind.unsigned_abs(),
        state: state.into(),
        flags: stub.flags,
        uflags: if external.is_some() { EXTERNAL } else { 0 },
        backlog: diag.wqueue,
        // Of one that is not accepted yet, its listener, as CRIU has it.
        peer: fits(waits_at.or(diag.peer).unwrap_or(0))?,
        fown: stub.fown,
        opts: sockopt::dump(socket, &socket.what(), defaults)?.sk,
        name: diag.name.clone(),
        shutdown: socket::shutdown_entry(diag.shutdown),
        file_perms: file.perms,
        name_dir: file.directory,
        deleted: file.deleted,
        ckpt_file: file.moved,
        ns_id,
        mnt_id: None,
        ckpt_external: external,
        ckpt_peek_off: u32::try_from(peek_off).ok(),
        ckpt_peer_creds: unixsock::peer_credentials(copy.as_fd())?.map(|c| SkCreds {
            pid: c.pid,
            uid: c.ids.uid,
            gid: c.ids.gid,
            groups: c.ids.groups,
        }),
        ckpt_backlog: backlog.iter().map(|(ino, _)| *ino).collect(),
        ckpt_backlog_creds: backlog.into_iter().map(|(_, creds)| creds).collect(),
    })
}

/// The file of a socket that is bound to a path.
#[derive(Default)]
struct SocketFile {
    /// Owner and mode.
    perms: Option<FilePermsEntry>,
    /// Where a relative path starts.
    directory: Option<Vec<u8>>,
    /// Whether it is gone.
    deleted: Option<bool>,
    /// Where it is, if that is not where it was bound.
    moved: Option<Vec<u8>>,
}

fn socket_file(socket: &Socket<'_>) -> anyhow::Result<SocketFile> {
    let name = trim_path(&socket.diag.name);
    let Some((inode, device)) = socket.diag.file.filter(|_| name.first().is_some_and(|&b| b != 0)) else {
        return Ok(SocketFile::default());
    };
    let is_it = |m: &std::fs::Metadata| {
        m.ino() & u64::from(u32::MAX) == u64::from(inode) && kernel_dev(m.dev()) == device
    };
    let here = |file: &Path| {
        let found = std::fs::symlink_metadata(file).ok().filter(is_it)?;
        Some(FilePermsEntry { mode: found.mode(), uid: found.uid(), gid: found.gid() })
    };
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    if name.starts_with(b"/")
        && let Some(perms) = here(path(name))
    {
        return Ok(SocketFile { perms: Some(perms), ..SocketFile::default() });
    }
    let file = unixsock::bound_file(socket.copy()?.as_fd()).ok();
    let file = file.and_then(|file| std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok());
    if name.starts_with(b"/") {
        let moved = moved_file(path(name), file.as_deref(), u64::from(inode), &|file| here(file).is_some());
        let perms = moved.as_deref().and_then(here);
        let deleted = perms.is_none().then_some(true);
        return Ok(SocketFile {
            perms,
            deleted,
            moved: moved.as_deref().map(bytes),
            ..SocketFile::default()
        });
    }
    let candidates = directories(socket, name, file.as_deref());
    let found = candidates.iter().find_map(|d| Some((d, here(&d.join(path(name)))?)));
    if let Some((directory, perms)) = found {
        let directory = Some(bytes(directory));
        return Ok(SocketFile { perms: Some(perms), directory, ..SocketFile::default() });
    }
    if let Some((file, perms)) = file.and_then(|file| here(&file).map(|perms| (file, perms))) {
        // From any directory in which the name leads somewhere it can be bound again, and moved.
        let leads = |d: &&PathBuf| d.join(path(name)).parent().is_some_and(Path::is_dir);
        let Some(directory) = candidates.iter().find(leads) else {
            let name = shown(name);
            let reason = format!("bound to {} as {name}, by way of a directory that is gone", file.display());
            return Err(socket.refuse(reason).into());
        };
        let (directory, moved) = (Some(bytes(directory)), Some(bytes(&file)));
        return Ok(SocketFile { perms: Some(perms), directory, moved, deleted: None });
    }
    let directory = candidates.first().map(|directory| bytes(directory));
    Ok(SocketFile { directory, deleted: Some(true), ..SocketFile::default() })
}

/// Where a file was moved that was bound as `name`: programs that want it to appear with everything set bind elsewhere and
/// rename it, which the kernel tells (`now`), or link it to its place, which it does not: then it is looked for beside it.
fn moved_file(name: &Path, now: Option<&Path>, inode: u64, is_it: &dyn Fn(&Path) -> bool) -> Option<PathBuf> {
    if let Some(now) = now.filter(|now| is_it(now)) {
        return Some(now.to_owned());
    }
    let directories = [now, Some(name)].into_iter().filter_map(|file| file?.parent());
    let entries = directories.filter_map(|directory| std::fs::read_dir(directory).ok()).flatten().flatten();
    let same = |ino: u64| ino & u64::from(u32::MAX) == inode;
    entries.filter(|entry| same(entry.ino())).map(|entry| entry.path()).find(|file| is_it(file))
}

/// Directories that a relative name may have started from: what is in front of it in the path of the file; the current
/// one of the process; for a name like ../x, those on the way to the file, and those beside it.
fn directories(socket: &Socket<'_>, name: &[u8], file: Option<&Path>) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let full = file.map(|file| file.as_os_str().as_bytes());
    let full = full.map(|full| full.strip_suffix(b" (deleted)").unwrap_or(full));
    let front = full.and_then(|full| full.strip_suffix(name)?.strip_suffix(b"/"));
    all.extend(front.map(|front| if front.is_empty() { PathBuf::from("/") } else { path(front).to_owned() }));
    all.extend(std::fs::read_link(format!("/proc/{}/cwd", socket.stub.pid)));
    let above: Vec<&Path> = full.map(path).into_iter().flat_map(Path::ancestors).skip(1).collect();
    all.extend(above.iter().map(|&directory| directory.to_owned()));
    for beside in above.iter().take(2).filter_map(|directory| std::fs::read_dir(directory).ok()) {
        let entries = beside.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        all.extend(entries.map(|e| e.path()));
    }
    all
}
