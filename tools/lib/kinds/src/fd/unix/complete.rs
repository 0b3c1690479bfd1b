//! ckpt-sk's side: from stubs to entries and queues.

use std::{
    collections::{BTreeMap, HashMap},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{
        ExternalSocket as ExternalEntry, FdTypes, FileEntry, FilePermsEntry, SkPacketEntry, SkShutdown,
        UnixSkEntry, external_socket::PolicyKind,
    },
};
use ckpt_sys::{
    Pid, Refused, TargetFd,
    diag::{SockDiag, UnixSocket},
    file,
    sock::{self, LentOption, trim_path},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
};

use super::{CLOSE, EXTERNAL, LISTEN, kind_name, shown};
use crate::{
    Sink,
    fd::{
        dump::{find_holders, kernel_dev, path},
        socket::{self, Completion, Queued, Say, SkOptions},
        sockopt,
    },
    sink::emit,
};

/// Bytes of a stream in one queue entry.
const STREAM_PIECE: usize = 1 << 15;

/// Who holds a socket: pid, command, descriptor.
pub(super) type Holder = (Pid, String, TargetFd);

/// All unix sockets of the system, and their holders once somebody asks.
#[derive(Debug)]
pub(super) struct World {
    pub(super) sockets: HashMap<u64, UnixSocket>,
    holders: Option<HashMap<u64, Holder>>,
}

impl World {
    pub(super) fn read() -> anyhow::Result<Self> {
        let sockets = SockDiag::here().and_then(|diag| diag.unix()).context("enumerate unix sockets")?;
        Ok(Self { sockets: sockets.into_iter().map(|s| (s.id, s)).collect(), holders: None })
    }

    /// Somebody who has the socket open. One walk over /proc for all questions.
    pub(super) fn holder(&mut self, id: u64) -> Option<&Holder> {
        let own = Pid(std::process::id().cast_signed());
        let all = self.holders.get_or_insert_with(|| {
            let mut all = HashMap::new();
            for (pid, comm, fd, link) in find_holders(|link| link.starts_with(b"socket:[")) {
                let id = std::str::from_utf8(&link).ok().and_then(sock::parse_id);
                if let Some(id) = id.filter(|_| pid != own) {
                    all.entry(id.0).or_insert((pid, comm, fd));
                }
            }
            all
        });
        all.get(&id)
    }

    /// The listener in whose backlog the far end of connection `id` waits.
    fn waits_at(&self, id: u64) -> Option<&UnixSocket> {
        self.sockets.values().find(|s| s.state == LISTEN && s.pending.contains(&id))
    }
}

/// One socket of the tree.
struct Socket<'a> {
    open: socket::Socket<'a>,
    diag: UnixSocket,
}

impl<'a> std::ops::Deref for Socket<'a> {
    type Target = socket::Socket<'a>;
    fn deref(&self) -> &Self::Target {
        &self.open
    }
}

impl Socket<'_> {
    fn what(&self) -> String {
        format!("unix {} socket {}", kind_name(self.diag.kind), self.diag.id)
    }

    fn refuse(&self, reason: impl std::fmt::Display) -> Refused {
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
    let Completion { net_ns, options, say, defaults } = completion;
    if open.is_empty() && options.external.is_empty() {
        return Ok(());
    }
    let mut world = World::read()?;
    let mut sockets = BTreeMap::new();
    for open in open {
        let ino = open.stub.ino;
        let diag = world.sockets.get(&ino).cloned();
        let diag =
            diag.with_context(|| format!("{}: the kernel does not list socket {ino}", open.subject))?;
        sockets.insert(ino, Socket { open, diag });
    }
    check_ids(options, &sockets)?;
    let mut queues = Vec::new();
    for socket in sockets.values() {
        let external = decide(socket, &sockets, &mut world, options)?;
        check_backlog(socket, &sockets, say)?;
        let is_external = external.is_some();
        let keep_queue = !is_external || keep_external_queue(socket, options.queued, say.warn)?;
        let entry = entry(socket, external, net_ns(socket.pid()), defaults)?;
        emit(sink, Image::Files, 0, &entry)?;
        if keep_queue && socket.diag.state != LISTEN {
            let messages = peek_queue(socket)?;
            if !messages.is_empty() && entry.usk.as_ref().is_some_and(|u| u.opts.so_passcred == Some(true)) {
                let reason = "unread messages carry credentials (SO_PASSCRED), which can't be made again";
                return Err(socket.refuse(reason).advise("checkpoint when they have been read").into());
            }
            if !is_external {
                if !messages.is_empty() {
                    check_can_refill(socket, &sockets)?;
                }
                check_nothing_hidden(socket, &sockets, &messages)?;
            }
            queues.push((socket.file_id, messages));
        }
    }
    for (id_for, messages) in queues {
        for message in messages {
            let length = u32::try_from(message.len()).context("message length")?;
            emit(sink, Image::SkQueues, 0, &SkPacketEntry { id_for, length, ..SkPacketEntry::default() })?;
            sink.data(Image::SkQueues, 0, &message)?;
        }
    }
    Ok(())
}

/// IDs that the user gave must exist.
fn check_ids(options: &SkOptions, sockets: &BTreeMap<u64, Socket<'_>>) -> anyhow::Result<()> {
    for external in &options.external {
        if !sockets.contains_key(&external.id.0) {
            let there: Vec<String> = sockets
                .values()
                .map(|s| format!("{} ({})", s.diag.id, s.subject.split_once(" fd").map_or("", |(p, _)| p)))
                .collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            bail!("--external {}: the tree has no such unix socket; those that it has: {there}", external.id);
        }
    }
    Ok(())
}

/// Whether a socket's connection leads outside, and may; the policy for it.
fn decide(
    socket: &Socket<'_>,
    sockets: &BTreeMap<u64, Socket<'_>>,
    world: &mut World,
    options: &SkOptions,
) -> anyhow::Result<Option<ExternalEntry>> {
    let marked = options.external.iter().find(|e| e.id.0 == socket.diag.id);
    let wrong_mark = |reason: &str| -> anyhow::Error {
        socket.refuse(format!("--external {}: {reason}", socket.diag.id)).into()
    };
    if socket.diag.state == LISTEN {
        if marked.is_some() {
            return Err(wrong_mark("it listens, it has no connection"));
        }
        return Ok(None);
    }
    let peer = match socket.diag.peer {
        None if marked.is_some() => return Err(wrong_mark("it has no peer")),
        None => return Ok(None),
        Some(peer) => peer,
    };
    if sockets.contains_key(&peer) {
        if marked.is_some() {
            return Err(wrong_mark(&format!("its peer {peer} is inside the tree")));
        }
        check_one_way(socket, sockets)?;
        return Ok(None);
    }
    // A peer without an inode has been closed, or has not been accepted; only the former shuts us down.
    let (name, holder) = if peer == 0 {
        let Some(listener) = world.waits_at(socket.diag.id).cloned() else {
            if marked.is_some() {
                return Err(wrong_mark("its peer has closed"));
            }
            return Ok(None);
        };
        if sockets.contains_key(&listener.id) {
            let server = sockets.get(&listener.id).map_or("", |s| s.subject.as_str());
            let reason =
                format!("its connection to {server} ({}) is not accepted yet", shown(&listener.name));
            return Err(socket.refuse(reason).advise("checkpoint when it has been accepted").into());
        }
        (listener.name.clone(), world.holder(listener.id).cloned())
    } else {
        let name = world.sockets.get(&peer).map(|s| s.name.clone()).unwrap_or_default();
        (name, world.holder(peer).cloned())
    };
    let Some(marked) = marked else {
        let who = holder
            .map_or_else(|| "nobody in /proc".to_owned(), |(pid, comm, _)| format!("pid {pid}, {comm}"));
        let advice =
            format!("pass --external {}[:PATH] here, or dump the peer too (ckpt-scan -t)", socket.diag.id);
        return Err(socket.refuse(format!("its peer is outside the tree ({who})")).advise(advice).into());
    };
    let peer_name = trim_path(&name).to_vec();
    let policy = if marked.path.is_some() || !peer_name.is_empty() {
        PolicyKind::Connect
    } else {
        PolicyKind::Inherit
    };
    Ok(Some(ExternalEntry {
        policy: policy.into(),
        path: marked.path.clone(),
        peer_name: (!peer_name.is_empty()).then_some(peer_name),
        peer_pid: holder.as_ref().map(|(pid, ..)| pid.0.unsigned_abs()),
        peer_comm: holder.map(|(_, comm, _)| comm.into_bytes()),
    }))
}

/// A datagram socket can be connected to one that is not connected to it; that is made again by
/// connecting to the other's name, so there has to be one.
fn check_one_way(socket: &Socket<'_>, sockets: &BTreeMap<u64, Socket<'_>>) -> anyhow::Result<()> {
    let Some(peer) = socket.diag.peer.and_then(|p| sockets.get(&p)) else { return Ok(()) };
    if peer.diag.peer == Some(socket.diag.id) {
        return Ok(());
    }
    let why = if trim_path(&peer.diag.name).is_empty() {
        "which has no name"
    } else if socket_file(peer)?.2 == Some(true) {
        "whose name was deleted"
    } else {
        return Ok(());
    };
    let reason = format!("connected one way to {} ({}), {why}: not supported yet", peer.what(), peer.subject);
    Err(socket.refuse(reason).into())
}

/// What waits in a listener's backlog. The server has not seen these connections. One from outside
/// is the business of the original, which runs on and accepts it; a client that connects to the
/// restored server does so again. One from inside would be lost on both sides.
fn check_backlog(
    socket: &Socket<'_>,
    sockets: &BTreeMap<u64, Socket<'_>>,
    say: Say<'_>,
) -> anyhow::Result<()> {
    if socket.diag.state != LISTEN {
        return Ok(());
    }
    let pending = &socket.diag.pending;
    if let Some(client) = pending.iter().find_map(|id| sockets.get(id)) {
        let reason = format!("has not accepted the connection from {}", client.subject);
        return Err(socket.refuse(reason).advise("checkpoint when it has been accepted").into());
    }
    let (gone, there): (Vec<u64>, Vec<u64>) = pending.iter().copied().partition(|&id| id == 0);
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
    Ok(())
}

/// Whether what an external connection has received goes into the images.
fn keep_external_queue(socket: &Socket<'_>, queued: Queued, warn: &dyn Fn(&str)) -> anyhow::Result<bool> {
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

/// What is queued can be put back only through the other end.
fn check_can_refill(socket: &Socket<'_>, sockets: &BTreeMap<u64, Socket<'_>>) -> anyhow::Result<()> {
    let refillable = match socket.diag.peer {
        Some(0) => true,
        Some(peer) => sockets.get(&peer).is_some_and(|p| p.diag.peer == Some(socket.diag.id)),
        None => false,
    };
    if refillable {
        return Ok(());
    }
    let advice = "checkpoint when they have been read";
    Err(socket.refuse("unread messages from senders that it is not connected to").advise(advice).into())
}

/// Whether `messages` are all that there are. A message of no bytes behind others shows in one peek
/// of its life only; but it takes memory, which the sender is charged with, and the same messages
/// sent once more take the same.
fn check_nothing_hidden(
    socket: &Socket<'_>,
    sockets: &BTreeMap<u64, Socket<'_>>,
    messages: &[Vec<u8>],
) -> anyhow::Result<()> {
    let kind = match socket.diag.kind {
        libc::SOCK_DGRAM => SockType::Datagram,
        libc::SOCK_SEQPACKET => SockType::SeqPacket,
        _ => return Ok(()),
    };
    let Some(sender) = socket.diag.peer.and_then(|p| sockets.get(&p)) else { return Ok(()) };
    let charged = sock::unread_memory(sender.copy.as_fd())?;
    if charged == 0 {
        return Ok(());
    }
    let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).context("socketpair")?;
    let longest = messages.iter().map(Vec::len).max().unwrap_or(0);
    sock::make_room(a.as_fd(), longest.saturating_mul(2));
    let mut seen = 0;
    for message in messages {
        send(a.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT)
            .context("send a copy of a message to oneself")?;
        seen += sock::unread_memory(a.as_fd())?;
        recv(b.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT).context("receive a copy of a message")?;
    }
    if charged == seen {
        return Ok(());
    }
    let reason = format!(
        "unread messages of no bytes, or to others, from {}: {charged} bytes of memory, {seen} of which could be seen",
        sender.subject
    );
    Err(socket.refuse(reason).advise("checkpoint when they have been read").into())
}

fn entry(
    socket: &Socket<'_>,
    external: Option<ExternalEntry>,
    ns_id: Option<u32>,
    defaults: &sockopt::Defaults,
) -> anyhow::Result<FileEntry> {
    let (stub, diag) = (socket.stub, &socket.diag);
    let fits =
        |n: u64| u32::try_from(n).map_err(|_| socket.refuse("an inode that does not fit into the images"));
    let (file_perms, name_dir, deleted) = socket_file(socket)?;
    let peek_off = sock::option(socket.copy.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    // The kernel calls a datagram socket connected too if another one has connected to it.
    let state = if diag.kind == libc::SOCK_DGRAM && diag.peer.is_none() { CLOSE } else { diag.state };
    let usk = UnixSkEntry {
        id: socket.file_id,
        ino: fits(diag.id)?,
        r#type: diag.kind.unsigned_abs(),
        state: state.into(),
        flags: stub.flags,
        uflags: if external.is_some() { EXTERNAL } else { 0 },
        backlog: diag.wqueue,
        peer: fits(diag.peer.unwrap_or(0))?,
        fown: stub.fown,
        opts: sockopt::dump(socket, &socket.what(), defaults)?.sk,
        name: diag.name.clone(),
        shutdown: match diag.shutdown {
            0 => None,
            1 => Some(SkShutdown::Read.into()),
            2 => Some(SkShutdown::Write.into()),
            _ => Some(SkShutdown::Both.into()),
        },
        file_perms,
        name_dir,
        deleted,
        ns_id,
        mnt_id: None,
        ckpt_external: external,
        ckpt_peek_off: u32::try_from(peek_off).ok(),
        ..UnixSkEntry::default()
    };
    let kind = FdTypes::Unixsk.into();
    Ok(FileEntry { r#type: kind, id: socket.file_id, usk: Some(usk), ..FileEntry::default() })
}

type SocketFile = (Option<FilePermsEntry>, Option<Vec<u8>>, Option<bool>);

/// The file of a socket that is bound to a path: owner and mode, the directory if the path is
/// relative, and whether it is gone.
fn socket_file(socket: &Socket<'_>) -> anyhow::Result<SocketFile> {
    let name = trim_path(&socket.diag.name);
    let Some((inode, device)) = socket.diag.file.filter(|_| name.first().is_some_and(|&b| b != 0)) else {
        return Ok((None, None, None));
    };
    let is_it = |m: &std::fs::Metadata| {
        m.ino() & u64::from(u32::MAX) == u64::from(inode) && kernel_dev(m.dev()) == device
    };
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", socket.stub.pid)).ok();
    let directory = cwd.filter(|_| !name.starts_with(b"/"));
    let full = directory.as_ref().map_or_else(|| path(name).to_owned(), |d| d.join(path(name)));
    let name_dir = directory.map(|d| std::os::unix::ffi::OsStringExt::into_vec(d.into_os_string()));
    match std::fs::symlink_metadata(&full) {
        Ok(m) if is_it(&m) => {
            let perms = FilePermsEntry { mode: m.mode(), uid: m.uid(), gid: m.gid() };
            Ok((Some(perms), name_dir, None))
        }
        _ if name_dir.is_some() => {
            let reason = format!("bound to the relative path {}, which is not in its directory", shown(name));
            Err(socket.refuse(reason).into())
        }
        _ => Ok((None, None, Some(true))),
    }
}

/// Lets peeks begin at the front of the queue, and, if `walk`, each go on where the last has ended.
fn peek_from_front(fd: BorrowedFd<'_>, walk: bool) -> anyhow::Result<Option<LentOption<'_>>> {
    let now = sock::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    if !walk && now < 0 {
        return Ok(None);
    }
    Ok(Some(LentOption::set(fd, libc::SO_PEEK_OFF, if walk { 0 } else { -1 })?))
}

/// Everything in a socket's receive queue: messages, or pieces of a stream.
fn peek_queue(socket: &Socket<'_>) -> anyhow::Result<Vec<Vec<u8>>> {
    let fd = socket.copy.as_fd();
    let stream = socket.diag.kind == libc::SOCK_STREAM;
    if stream && socket.diag.state == CLOSE {
        return Ok(Vec::new());
    }
    // Any receive call would take a waiting error from the target.
    let mut poll_fd = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut poll_fd, PollTimeout::ZERO).context("poll")?;
    if poll_fd[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR)) {
        let advice = "checkpoint when it has been read";
        return Err(socket.refuse("an error (ECONNRESET) waits to be read").advise(advice).into());
    }
    let rights = || {
        let advice = "checkpoint when it has been read";
        socket.refuse("an unread message carries descriptors (SCM_RIGHTS)").advise(advice)
    };
    let mut messages = Vec::new();
    if stream && socket.diag.rqueue == 0 {
        return Ok(messages);
    }
    if stream {
        let _guard = peek_from_front(fd, false)?;
        let waiting = file::readable_bytes(fd)? as usize;
        let mut buffer = vec![0; waiting + 1];
        let peeked = sock::peek(fd, &mut buffer).with_context(|| socket.subject.clone())?.unwrap_or_default();
        if peeked.rights > 0 || peeked.control_truncated {
            return Err(rights().into());
        }
        if peeked.len != waiting {
            let reason = format!("{} of {waiting} unread bytes could be copied", peeked.len);
            let advice =
                "unread out-of-band data, descriptors or credentials are in the way: checkpoint later";
            return Err(socket.refuse(reason).advise(advice).into());
        }
        messages.extend(buffer[..peeked.len].chunks(STREAM_PIECE).map(<[u8]>::to_vec));
        return Ok(messages);
    }
    // A socket of this type whose other end is shut down answers a peek at nothing with end of file,
    // which looks like a message of no bytes: there the number of bytes says when to stop.
    let ends = socket.diag.kind == libc::SOCK_SEQPACKET && socket.diag.shutdown & 1 != 0;
    let mut left = if ends { file::readable_bytes(fd)? as usize } else { usize::MAX };
    if left == 0 {
        return Ok(messages);
    }
    let mut buffer = vec![0; 1 << 16];
    {
        // Most queues are empty; a look that leaves SO_PEEK_OFF alone tells.
        let _guard = peek_from_front(fd, false)?;
        match peek_message(socket, &mut buffer)? {
            Some(first) if first.rights > 0 || first.control_truncated => return Err(rights().into()),
            // The look at it has hidden it from those that follow.
            Some(first) if first.full_len == 0 => messages.push(Vec::new()),
            Some(_) => {}
            None => return Ok(messages),
        }
    }
    let _guard = peek_from_front(fd, true)?;
    while left > 0 {
        let Some(peeked) = peek_message(socket, &mut buffer)? else { break };
        if peeked.rights > 0 || peeked.control_truncated {
            return Err(rights().into());
        }
        messages.push(buffer.get(..peeked.len).unwrap_or_default().to_vec());
        left = left.saturating_sub(if ends { peeked.len.max(1) } else { 0 });
    }
    Ok(messages)
}

/// Peeks at a message, with a buffer that is made as large as it needs to be.
fn peek_message(socket: &Socket<'_>, buffer: &mut Vec<u8>) -> anyhow::Result<Option<sock::Peeked>> {
    let fd = socket.copy.as_fd();
    let offset = sock::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    loop {
        let peeked = sock::peek(fd, buffer).with_context(|| socket.subject.clone())?;
        match peeked {
            Some(peeked) if peeked.full_len > buffer.len() => {
                buffer.resize(peeked.full_len, 0);
                sock::set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
            }
            peeked => return Ok(peeked),
        }
    }
}
