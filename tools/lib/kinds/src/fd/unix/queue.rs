//! What is queued in a socket: peeked at dump, nothing is taken.
//!
//! A message is more than its bytes: descriptors in flight (SCM_RIGHTS), who sent it (SCM_CREDENTIALS, if the
//! receiver wants to know), and the sender's address. A stream has no messages, but bytes that came with
//! descriptors or from another sender are read by a call of their own, and so they are kept apart.
//!
//! Where in a stream they came is not told exactly: a peek, however short, shows the next descriptors that there
//! are, and ends behind the last byte that was sent with them (net/unix/af_unix.c: `goto again` without a look
//! at what is left of the buffer). Plain bytes in front of them come back as part of the same message. So
//! descriptors may come early, which readers expect of a stream, but never late.
//!
//! Which open file a descriptor in flight is, is for ckpt-scan to say, who knows all open files of the
//! tree; it has left their numbers in the stub, a list for each message that has some ([`super::in_flight`]).

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use anyhow::Context;
use ckpt_proto::types::SkCreds;
use ckpt_sys::{
    Refused, file,
    sock::{self, LentOption, trim_path},
    unixsock::{self, Received},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
};

use super::{CLOSE, complete::Socket};
use crate::fd::Look;

/// Bytes of a stream in one queue entry.
pub(super) const STREAM_PIECE: usize = 1 << 15;
/// What the kernel says in place of a user that was not noted.
const NOBODY: u32 = 65534;

/// A message, or a piece of a stream.
#[derive(Debug, Default, Clone)]
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    /// Numbers in FILES of the open files in flight.
    pub(super) rights: Vec<u32>,
    pub(super) creds: Option<SkCreds>,
    /// The sender's address (none: empty); absent if it is the socket's peer.
    pub(super) sender: Option<Vec<u8>>,
    /// Sent by the socket, not received by it.
    pub(super) unsent: bool,
}

/// Everything in a socket's receive queue.
pub(super) fn peek(socket: &Socket<'_>, sockets: &BTreeMap<u64, Socket<'_>>) -> anyhow::Result<Vec<Message>> {
    let copy = socket.copy()?;
    let fd = copy.as_fd();
    let stream = socket.diag.kind == libc::SOCK_STREAM;
    if stream && (socket.diag.state == CLOSE || socket.diag.rqueue == 0) {
        return Ok(Vec::new());
    }
    // Any receive call would take a waiting error from the target.
    let mut poll_fd = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut poll_fd, PollTimeout::ZERO).context("poll")?;
    if poll_fd[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR)) {
        let advice = "checkpoint when it has been read";
        return Err(socket.refuse("an error (ECONNRESET) waits to be read").advise(advice).into());
    }
    let refuse = |reason: String| socket.refuse(reason);
    let ends = socket.diag.kind == libc::SOCK_SEQPACKET && socket.diag.shutdown & 1 != 0;
    let walk = Walk { fd, kind: socket.diag.kind, ends, refuse: &refuse };
    let mut queue = Queue {
        socket,
        sockets,
        rights: socket.stub.in_flight.iter().map(|s| &s.rights[..]),
        found: Vec::new(),
    };
    walk.all(&mut |bytes, received| queue.add(bytes, &received))?;
    Ok(queue.found)
}

/// Whether nothing can come any more.
pub(super) fn is_shut(fd: BorrowedFd<'_>) -> anyhow::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    poll(&mut fds, PollTimeout::ZERO).context("poll")?;
    // nix does not know the flag, and says so when it comes.
    Ok(fds[0].any().unwrap_or(true))
}

/// Lets peeks begin at the front of the queue, and, if `walk`, each go on where the last has ended.
fn from_front(fd: BorrowedFd<'_>, walk: bool) -> anyhow::Result<Option<LentOption<'_>>> {
    let now = sock::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    if !walk && now < 0 {
        return Ok(None);
    }
    Ok(Some(LentOption::set(fd, libc::SO_PEEK_OFF, if walk { 0 } else { -1 })?))
}

struct Queue<'q, 's, R> {
    socket: &'q Socket<'s>,
    sockets: &'q BTreeMap<u64, Socket<'s>>,
    /// What ckpt-scan has said about the messages with descriptors that are still to come.
    rights: R,
    found: Vec<Message>,
}

impl<'q, R: Iterator<Item = &'q [u32]>> Queue<'q, '_, R> {
    fn add(&mut self, bytes: &[u8], received: &Received) -> anyhow::Result<()> {
        let mut message = Message { bytes: bytes.to_vec(), ..Message::default() };
        if !received.rights.is_empty() || received.control_truncated {
            let known = self.rights.next().filter(|known| known.len() == received.rights.len());
            let Some(known) = known else {
                let reason = "descriptors (SCM_RIGHTS) have come since the tree was looked at";
                return Err(self.socket.refuse(reason).advise("checkpoint again").into());
            };
            message.rights = known.to_vec();
        }
        message.creds = received.credentials.and_then(noted);
        let sender = received.sender.as_deref().unwrap_or_default();
        message.sender = sender_of(self.socket, self.sockets, sender);
        self.found.push(message);
        Ok(())
    }
}

/// Who has sent a message, if that was noted.
pub(super) fn noted((pid, uid, gid): (u32, u32, u32)) -> Option<SkCreds> {
    ((pid, uid, gid) != (0, NOBODY, NOBODY)).then(|| SkCreds { pid, uid, gid, groups: Vec::new() })
}

/// The address `name` of a datagram's sender, if that is not the peer of its receiver.
fn sender_of(socket: &Socket<'_>, sockets: &BTreeMap<u64, Socket<'_>>, name: &[u8]) -> Option<Vec<u8>> {
    let peer = socket.diag.peer.and_then(|p| sockets.get(&p));
    // A peer that is gone has been the sender of everything.
    let by_peer = socket.diag.peer == Some(0) || peer.is_some_and(|p| trim_path(&p.diag.name) == name);
    (socket.diag.kind == libc::SOCK_DGRAM && !by_peer).then(|| name.to_vec())
}

/// What is given each message of a queue, or piece of a stream.
type Each<'e> = &'e mut dyn FnMut(&[u8], Received) -> anyhow::Result<()>;

/// A walk along a queue.
pub(super) struct Walk<'w> {
    pub(super) fd: BorrowedFd<'w>,
    /// `SOCK_STREAM`, ...
    pub(super) kind: i32,
    /// A sequenced packet socket whose other end is shut down answers a peek at nothing with end of file, which
    /// looks like a message of no bytes: there the number of bytes says when to stop.
    pub(super) ends: bool,
    pub(super) refuse: &'w dyn Fn(String) -> Refused,
}

impl Walk<'_> {
    pub(super) fn all(&self, each: Each<'_>) -> anyhow::Result<()> {
        if self.kind == libc::SOCK_STREAM { self.stream(each) } else { self.messages(each) }
    }

    fn stream(&self, each: Each<'_>) -> anyhow::Result<()> {
        let fd = self.fd;
        let waiting = file::readable_bytes(fd)? as usize;
        let mut buffer = vec![0; waiting + 1];
        {
            let _guard = from_front(fd, false)?;
            let all = unixsock::peek(fd, &mut buffer)?.unwrap_or_default();
            if all.len == waiting
                && all.rights.is_empty()
                && !all.control_truncated
                && all.credentials.is_none()
            {
                return in_pieces(&buffer[..waiting], None, each);
            }
        }
        // Piece by piece: a peek ends behind descriptors and where the sender changes.
        let _guard = from_front(fd, true)?;
        let seek = |at: usize| -> anyhow::Result<()> {
            let at = i32::try_from(at).context("SO_PEEK_OFF")?;
            Ok(sock::set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, at)?)
        };
        let mut at = 0;
        while at < waiting {
            seek(at)?;
            let piece = unixsock::peek(fd, &mut buffer[..waiting - at])?.unwrap_or_default();
            if piece.len == 0 {
                break;
            }
            at += piece.len;
            let bytes = buffer.get(..piece.len).unwrap_or_default().to_vec();
            if piece.rights.is_empty() && !piece.control_truncated {
                in_pieces(&bytes, piece.credentials, each)?;
                continue;
            }
            each(&bytes, piece)?;
        }
        if at != waiting {
            let reason = format!("{at} of {waiting} unread bytes could be copied");
            let advice = "unread out-of-band data is in the way: checkpoint when it has been read";
            return Err((self.refuse)(reason).advise(advice).into());
        }
        Ok(())
    }

    fn messages(&self, each: Each<'_>) -> anyhow::Result<()> {
        let mut left = if self.ends { file::readable_bytes(self.fd)? as usize } else { usize::MAX };
        if left == 0 {
            return Ok(());
        }
        let mut buffer = vec![0; 1 << 16];
        {
            // Most queues are empty; a look that leaves SO_PEEK_OFF alone tells.
            let _guard = from_front(self.fd, false)?;
            match peek_message(self.fd, &mut buffer)? {
                // The look at it has hidden it from those that follow.
                Some(first) if first.full_len == 0 => each(&[], first)?,
                Some(_) => {}
                None => return Ok(()),
            }
        }
        let _guard = from_front(self.fd, true)?;
        while left > 0 {
            let Some(peeked) = peek_message(self.fd, &mut buffer)? else { break };
            let len = peeked.len;
            each(buffer.get(..len).unwrap_or_default(), peeked)?;
            left = left.saturating_sub(if self.ends { len.max(1) } else { 0 });
        }
        Ok(())
    }
}

fn in_pieces(bytes: &[u8], credentials: Option<(u32, u32, u32)>, each: Each<'_>) -> anyhow::Result<()> {
    for piece in bytes.chunks(STREAM_PIECE) {
        each(piece, Received { credentials, ..Received::default() })?;
    }
    Ok(())
}

/// Peeks at a message, with a buffer that is made as large as it needs to be.
fn peek_message(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> anyhow::Result<Option<Received>> {
    let offset = sock::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    loop {
        match unixsock::peek(fd, buffer)? {
            Some(peeked) if peeked.full_len > buffer.len() => {
                buffer.resize(peeked.full_len, 0);
                sock::set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
            }
            peeked => return Ok(peeked),
        }
    }
}

/// Adds messages that no peek has shown, read from the kernel's memory.
pub(super) fn add_hidden(
    queues: &mut [(&Socket<'_>, Vec<Message>)],
    sockets: &BTreeMap<u64, Socket<'_>>,
    look: &Look,
) -> anyhow::Result<()> {
    let Some(refused) = something_hidden(queues, sockets)? else { return Ok(()) };
    for (socket, messages) in queues.iter_mut().filter(|(s, _)| s.diag.kind != libc::SOCK_STREAM) {
        let copy = socket.copy()?;
        let there = look.ask(|kernel| kernel.unix_queue(copy.as_fd()));
        let there = there
            .map_err(|why| Refused { reason: format!("{}: {why}", refused.reason), ..refused.clone() })?;
        let mut found = std::mem::take(messages).into_iter().peekable();
        for message in there {
            if found.peek().is_some_and(|f| !f.unsent && f.bytes.len() == message.bytes.len()) {
                messages.extend(found.next());
            } else if message.bytes.is_empty() && !message.rights {
                let sender = message.sender.unwrap_or_default();
                messages.push(Message {
                    creds: message.credentials.and_then(noted),
                    sender: sender_of(socket, sockets, trim_path(&sender)),
                    ..Message::default()
                });
            } else {
                return Err(refused.into());
            }
        }
        messages.extend(found);
    }
    something_hidden(queues, sockets)?.map_or(Ok(()), |refused| Err(refused.into()))
}

/// Whether the messages found are all that there are. A message of no bytes behind others shows in one peek
/// of its life only; but it takes memory, which the sender is charged with, and the same messages sent
/// once more take the same.
fn something_hidden(
    queues: &[(&Socket<'_>, Vec<Message>)],
    sockets: &BTreeMap<u64, Socket<'_>>,
) -> anyhow::Result<Option<Refused>> {
    // By the sender's inode: memory of its messages that were found. Whose the others are is not known.
    let mut seen: HashMap<u64, u32> = HashMap::new();
    let mut unknown: HashMap<i32, u32> = HashMap::new();
    let mut receivers: HashMap<u64, &Socket<'_>> = HashMap::new();
    let mut scales: HashMap<i32, Scale> = HashMap::new();
    let by_name: HashMap<&[u8], u64> = sockets
        .values()
        .filter(|s| s.diag.kind == libc::SOCK_DGRAM)
        .map(|s| (trim_path(&s.diag.name), s.diag.id))
        .filter(|(name, _)| !name.is_empty())
        .collect();
    for (socket, messages) in queues.iter().filter(|(s, _)| s.diag.kind != libc::SOCK_STREAM) {
        let peer = socket.diag.peer.filter(|p| sockets.contains_key(p));
        if let Some(peer) = peer {
            receivers.insert(peer, socket);
        }
        for message in messages.iter().filter(|m| !m.unsent) {
            let scale = match scales.entry(socket.diag.kind) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => new.insert(Scale::new(socket.diag.kind)?),
            };
            let sender = message.sender.as_ref().map_or(peer, |name| by_name.get(name.as_slice()).copied());
            let memory = scale.weigh(&message.bytes)?;
            match sender {
                Some(sender) => *seen.entry(sender).or_default() += memory,
                None => *unknown.entry(socket.diag.kind).or_default() += memory,
            }
        }
    }
    for (sender, receiver) in receivers {
        let Some(socket) = sockets.get(&sender) else { continue };
        let charged = sock::unread_memory(socket.copy()?.as_fd())?;
        let found = seen.get(&sender).copied().unwrap_or(0);
        if charged > found + unknown.get(&socket.diag.kind).copied().unwrap_or(0) {
            return Ok(Some(hidden(receiver, socket, charged, found)));
        }
    }
    Ok(None)
}

fn hidden(receiver: &Socket<'_>, sender: &Socket<'_>, charged: u32, found: u32) -> Refused {
    let reason = format!(
        "unread messages of no bytes, or to others, from {}: {charged} bytes of memory, {found} of which could be seen",
        sender.subject
    );
    receiver.refuse(reason).advise("checkpoint when they have been read")
}

/// Tells how much memory messages take.
struct Scale {
    ends: (std::os::fd::OwnedFd, std::os::fd::OwnedFd),
    known: HashMap<usize, u32>,
}

impl Scale {
    fn new(kind: i32) -> anyhow::Result<Self> {
        let kind = if kind == libc::SOCK_DGRAM { SockType::Datagram } else { SockType::SeqPacket };
        let ends =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).context("socketpair")?;
        Ok(Self { ends, known: HashMap::new() })
    }

    fn weigh(&mut self, message: &[u8]) -> anyhow::Result<u32> {
        if let Some(&memory) = self.known.get(&message.len()) {
            return Ok(memory);
        }
        let (a, b) = &self.ends;
        sock::make_room(a.as_fd(), message.len().saturating_mul(2));
        send(a.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT)
            .context("send a copy of a message to oneself")?;
        let memory = sock::unread_memory(a.as_fd())?;
        recv(b.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT).context("receive a copy of a message")?;
        self.known.insert(message.len(), memory);
        Ok(memory)
    }
}
