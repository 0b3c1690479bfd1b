//! ckpt-sk's part: reading connections.
//!
//! One connection at a time is in memory: its queues, which the kernel limits (tcp_rmem, tcp_wmem). What was
//! received is peeked at outside of repair mode; the send queue can only be read in it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use anyhow::Context;
use ckpt_proto::{
    Image,
    types::{ClosedConnection, FdTypes, FileEntry, InetSkEntry, SkShutdown, TcpStreamEntry},
};
use ckpt_sys::{
    Refused,
    diag::InetSocket,
    file,
    kernel::Unaccepted,
    nft::Connection,
    sock,
    tcp::{self, Queue, Repair},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv},
};

use super::state;
use crate::{
    Sink,
    fd::{
        Look, inet,
        socket::{self, Completion, Say},
    },
    sink::emit,
};

/// Most bytes of a queue in one record of the stream.
const PIECE: usize = 1 << 20;

/// One socket of the tree.
struct Socket<'a> {
    open: socket::Socket<'a>,
    /// Sockets that are neither bound nor connected are in no table.
    diag: Option<InetSocket>,
    what: String,
}

impl Socket<'_> {
    fn state(&self) -> u8 {
        self.diag.map_or(state::CLOSE, |d| d.state)
    }

    fn copy(&self) -> anyhow::Result<OwnedFd> {
        self.open.copy()
    }

    fn connection(&self) -> Option<Connection> {
        let diag = self.diag.filter(|d| d.remote.port() != 0)?;
        Some(Connection::new(diag.local, diag.remote))
    }

    /// Whether it is the listener of a connection, seen from the server's side.
    fn listens_for(&self, connection: &Connection) -> bool {
        self.diag.filter(|d| d.state == state::LISTEN).is_some_and(|d| {
            let here = d.local.ip().to_canonical();
            d.local.port() == connection.local.port()
                && (here.is_unspecified() || here == connection.local.ip())
        })
    }

    fn refuse(&self, reason: impl std::fmt::Display) -> Refused {
        self.open.refuse(&self.what, reason)
    }
}

/// Emits the entries of TCP sockets, and what is queued.
///
/// # Errors
/// [`Refused`] for what can't be checkpointed or needs the user's word; the sink's.
pub fn complete(
    open: Vec<socket::Socket<'_>>,
    completion: Completion<'_>,
    sink: &mut dyn Sink,
) -> anyhow::Result<()> {
    if open.is_empty() {
        return Ok(());
    }
    let (mut table, loose) = inet::table(libc::IPPROTO_TCP)?;
    let mut sockets = Vec::with_capacity(open.len());
    for open in open {
        let (diag, what) = (table.remove(&open.stub.ino), format!("TCP socket {}", open.stub.ino));
        sockets.push(Socket { open, diag, what });
    }
    let inside: BTreeMap<Connection, &Socket<'_>> =
        sockets.iter().filter_map(|s| Some((s.connection()?, s))).collect();
    // Connections that the tree's listeners have not accepted: they belong to nobody yet.
    let in_flight: BTreeSet<Connection> = loose
        .iter()
        .filter(|s| matches!(s.state, state::ESTABLISHED | state::CLOSE_WAIT | state::SYN_RECV))
        .map(|s| Connection::new(s.local, s.remote))
        .filter(|connection| sockets.iter().any(|s| s.listens_for(connection)))
        .collect();
    // What the tree had a part of and has closed, and the kernel is still ending.
    let orphans: BTreeSet<Connection> = loose
        .iter()
        .filter(|s| state::fin_sent(s.state))
        .map(|s| Connection::new(s.local, s.remote))
        .collect();
    let options = completion.options.tcp;
    let mut backlogs: HashMap<u64, Vec<Unaccepted>> = HashMap::new();
    for socket in &sockets {
        let mut isk = inet::entry(&socket.open, socket.diag.as_ref(), &socket.what, completion)?;
        let mut stream = None;
        match socket.state() {
            state::LISTEN => {
                isk.backlog = socket.diag.map_or(0, |d| d.wqueue);
                check_backlog(socket, &inside, &in_flight, options, completion.say)?;
            }
            state::SYN_SENT => {}
            state::CLOSE => stream = closed(socket, &mut isk)?,
            now if state::connected(now) => {
                check_urgent(socket)?;
                let fate = fate(socket, &inside, &in_flight, &orphans, options)?;
                if fate == Fate::Keep {
                    stream = Some(read(socket, now)?);
                } else if fate == Fate::Again {
                    isk.state = state::SYN_SENT.into();
                    if now != state::ESTABLISHED || tcp::has_sent(socket.copy()?.as_fd())? {
                        let waiting = unaccepted(socket, &sockets, &mut backlogs, completion.look)?;
                        stream = sent_again(socket, now, waiting)?;
                        isk.shutdown = state::fin_sent(now).then_some(SkShutdown::Write.into());
                    }
                } else {
                    isk.state = state::CLOSE.into();
                    isk.ckpt_closed = Some(match fate {
                        Fate::Reset => ClosedConnection::WasReset.into(),
                        _ => ClosedConnection::Ended.into(),
                    });
                    stream = received(socket)?;
                }
            }
            other => {
                let advice = "checkpoint a moment later";
                return Err(socket.refuse(format!("in state {}", state::name(other))).advise(advice).into());
            }
        }
        let ino = isk.ino;
        socket.open.emit(FdTypes::Inetsk, FileEntry { isk: Some(isk), ..FileEntry::default() }, sink)?;
        if let Some(Stream { entry, queues }) = stream {
            emit(sink, Image::TcpStream, ino.into(), &entry)?;
            for piece in queues.iter().flat_map(|queue| queue.chunks(PIECE)) {
                sink.data(Image::TcpStream, ino.into(), piece)?;
            }
        }
    }
    Ok(())
}

/// A connection's state and its queues, the receive queue first.
struct Stream {
    entry: TcpStreamEntry,
    queues: [Vec<u8>; 2],
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Keep,
    /// It will be made again by the client, as nothing has happened to it.
    Again,
    /// It will have been closed.
    Close,
    /// It will have been reset by its peer.
    Reset,
}

/// Whether a connection may be dumped.
fn fate(
    socket: &Socket<'_>,
    inside: &BTreeMap<Connection, &Socket<'_>>,
    in_flight: &BTreeSet<Connection>,
    orphans: &BTreeSet<Connection>,
    options: super::TcpOptions,
) -> anyhow::Result<Fate> {
    let Some(connection) = socket.connection() else { return Ok(Fate::Keep) };
    let there = connection.reversed();
    if options.close {
        return Ok(Fate::Close);
    }
    if inside.contains_key(&there) || orphans.contains(&there) {
        return Ok(Fate::Keep);
    }
    if in_flight.contains(&there) {
        return Ok(if options.skip_in_flight { Fate::Reset } else { Fate::Again });
    }
    if options.established {
        return Ok(Fate::Keep);
    }
    let reason = format!(
        "connected ({}) to {}, whose end is outside the tree",
        state::name(socket.state()),
        connection.remote
    );
    let advice = "pass --tcp-established to ckpt-sk to have it as it is, --tcp-close to have it closed, or dump the peer too";
    Err(socket.refuse(reason).advise(advice).into())
}

/// What has come over a connection that waits to be accepted, to where nobody has a descriptor to read it by; `None` if
/// it does not wait for that yet, because the backlog is full.
fn unaccepted<'b>(
    client: &Socket<'_>,
    sockets: &[Socket<'_>],
    backlogs: &'b mut HashMap<u64, Vec<Unaccepted>>,
    look: &Look,
) -> anyhow::Result<Option<&'b Unaccepted>> {
    let refuse = |why: String| {
        let reason = format!(
            "it has sent data over a connection that is not accepted yet, where nobody can read them: {why}"
        );
        let advice = "checkpoint when it has been accepted, or pass --skip-in-flight to have it reset";
        client.refuse(reason).advise(advice)
    };
    let Some(there) = client.connection().map(Connection::reversed) else { return Ok(None) };
    let Some(listener) = sockets.iter().find(|s| s.listens_for(&there)) else { return Ok(None) };
    let backlog = match backlogs.entry(listener.open.stub.ino) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(new) => {
            let copy = listener.copy()?;
            let read = look.ask(|kernel| kernel.tcp_backlog(copy.as_fd())).map_err(refuse)?;
            new.insert(read)
        }
    };
    let found = backlog.iter().find(|waiting| waiting.remote == there.remote);
    if found.is_some_and(|waiting| waiting.urgent) {
        return Err(refuse("urgent data (MSG_OOB) is among them".to_owned()).into());
    }
    Ok(found)
}

/// What a client that connects once more has to send then: all that it ever sent.
fn sent_again(socket: &Socket<'_>, now: u8, waiting: Option<&Unaccepted>) -> anyhow::Result<Option<Stream>> {
    let Stream { entry, queues: [_, outgoing] } = read(socket, now)?;
    let mut bytes = Vec::new();
    if let Some(waiting) = waiting {
        bytes.clone_from(&waiting.bytes);
        // Some of it may not be acknowledged yet.
        let first = entry.outq_seq.wrapping_sub(state::fin_sent(now).into()).wrapping_sub(entry.outq_len);
        let known = waiting.received.wrapping_sub(first) as usize;
        bytes.extend_from_slice(outgoing.get(known..).unwrap_or_default());
    } else {
        bytes = outgoing;
    }
    let outq_len = u32::try_from(bytes.len()).context("length of a send queue")?;
    let entry =
        TcpStreamEntry { outq_len, unsq_len: Some(outq_len), mss_clamp: 536, ..TcpStreamEntry::default() };
    Ok((outq_len > 0).then_some(Stream { entry, queues: [Vec::new(), bytes] }))
}

/// Connections from outside that wait to be accepted. The server has not seen them: one stays with the
/// original, which runs on and accepts it. If the tree is to be killed it would be lost.
fn check_backlog(
    socket: &Socket<'_>,
    inside: &BTreeMap<Connection, &Socket<'_>>,
    in_flight: &BTreeSet<Connection>,
    options: super::TcpOptions,
    say: Say<'_>,
) -> anyhow::Result<()> {
    let mut outside = 0;
    for connection in in_flight.iter().filter(|c| socket.listens_for(c)) {
        outside += usize::from(!inside.contains_key(&connection.reversed()));
    }
    if outside == 0 {
        return Ok(());
    }
    if options.kill && !options.skip_in_flight {
        let reason = format!("{outside} connections from outside the tree wait to be accepted");
        let advice = "checkpoint when they have been accepted, or pass --skip-in-flight to have them reset";
        return Err(socket.refuse(reason).advise(advice).into());
    }
    (say.note)(&format!(
        "{}: {}: {outside} connections from outside the tree, not accepted yet, are passed over",
        socket.open.subject, socket.what
    ));
    Ok(())
}

fn events(fd: BorrowedFd<'_>) -> anyhow::Result<PollFlags> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN | PollFlags::POLLPRI)];
    poll(&mut fds, PollTimeout::ZERO).context("poll")?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Urgent data, and errors that any receive call would take from the target.
fn check_urgent(socket: &Socket<'_>) -> anyhow::Result<()> {
    let advice = "checkpoint when it has been read";
    let copy = socket.copy()?;
    let events = events(copy.as_fd())?;
    if events.contains(PollFlags::POLLERR) {
        return Err(socket.refuse("an error waits to be read").advise(advice).into());
    }
    // EINVAL: there is none. EAGAIN: it is announced and has not come.
    let peek = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let oob = recv(copy.as_raw_fd(), &mut [0], peek);
    if events.contains(PollFlags::POLLPRI) || !matches!(oob, Err(Errno::EINVAL)) {
        return Err(socket.refuse("urgent data (MSG_OOB) waits to be read").advise(advice).into());
    }
    Ok(())
}

/// A copy of the receive queue.
fn peek(socket: &Socket<'_>) -> anyhow::Result<Vec<u8>> {
    let copy = socket.copy()?;
    let fd = copy.as_fd();
    let len = file::readable_bytes(fd)? as usize;
    if len == 0 {
        return Ok(Vec::new());
    }
    if sock::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).is_ok_and(|offset| offset >= 0) {
        return Err(socket.refuse("unread data and SO_PEEK_OFF are not supported together").into());
    }
    let mut bytes = vec![0; len];
    let n = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
        .with_context(|| format!("{}: {}: peek at {len} unread bytes", socket.open.subject, socket.what))?;
    if n != len {
        let reason = format!("{n} of {len} unread bytes could be copied: urgent data is in the way");
        return Err(socket.refuse(reason).advise("checkpoint when it has been read").into());
    }
    Ok(bytes)
}

/// The receive queue of a connection that will be a closed one.
fn received(socket: &Socket<'_>) -> anyhow::Result<Option<Stream>> {
    let queue = peek(socket)?;
    let inq_len = u32::try_from(queue.len()).context("length of a receive queue")?;
    let entry = TcpStreamEntry { inq_len, mss_clamp: 536, ..TcpStreamEntry::default() };
    Ok((inq_len > 0).then_some(Stream { entry, queues: [queue, Vec::new()] }))
}

/// A socket that is not connected: never was, or not any more.
fn closed(socket: &Socket<'_>, isk: &mut InetSkEntry) -> anyhow::Result<Option<Stream>> {
    let hung_up = PollFlags::POLLHUP | PollFlags::POLLIN;
    let copy = socket.copy()?;
    let events = events(copy.as_fd())?;
    let error = events.contains(PollFlags::POLLERR);
    // A new socket is hung up too, but there is nothing to be read from it, not even the end.
    if !events.contains(PollFlags::POLLIN) && !error {
        return Ok(None);
    }
    if error && !tcp::was_connected(copy.as_fd())? {
        let advice = "checkpoint when it has been read";
        return Err(socket.refuse("the error of a failed connect(2) waits to be read").advise(advice).into());
    }
    if !events.contains(hung_up) {
        return Ok(None);
    }
    isk.ckpt_closed =
        Some(if error { ClosedConnection::WasReset.into() } else { ClosedConnection::Ended.into() });
    isk.shutdown = Some(SkShutdown::Both.into());
    received(socket)
}

/// Reads a connection whose packets are locked out.
fn read(socket: &Socket<'_>, now: u8) -> anyhow::Result<Stream> {
    const TCPI_OPT_WSCALE: u8 = 4;
    let copy = socket.copy()?;
    let fd = copy.as_fd();
    let what = || format!("{}: {}", socket.open.subject, socket.what);
    let incoming = peek(socket)?;
    let info = tcp::info(fd)?;
    let (mut outq_len, mut unsq_len) = tcp::outgoing(fd)?;
    if state::fin_unacknowledged(now) {
        (outq_len, unsq_len) = (outq_len.saturating_sub(1), unsq_len.saturating_sub(1));
    }
    let mut outgoing = vec![0; outq_len as usize];
    let timestamp = tcp::timestamp(fd)?;

    let repair = match Repair::enter(fd) {
        Err(e) if e.errno == Errno::EPERM => {
            let reason = "reading a TCP connection (TCP_REPAIR) needs CAP_NET_ADMIN";
            return Err(socket.refuse(reason).advise("run ckpt-sk as root").into());
        }
        repair => repair.with_context(what)?,
    };
    let inq_seq = tcp::sequence(repair.fd(), Queue::Receive)?;
    let outq_seq = tcp::sequence(repair.fd(), Queue::Send)?;
    let copied = if outq_len == 0 {
        Ok(0)
    } else {
        recv(repair.fd().as_raw_fd(), &mut outgoing, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
    };
    let window = tcp::window(repair.fd())?;
    let mss_clamp = tcp::mss_clamp(repair.fd())?;
    repair.leave().with_context(what)?;

    let copied = copied.with_context(|| format!("{}: copy the send queue", what()))?;
    if copied != outgoing.len() {
        let reason = format!(
            "{copied} of {outq_len} unacknowledged bytes could be copied: the lock on the network leaks"
        );
        return Err(socket.refuse(reason).into());
    }
    let scaled = info.options & TCPI_OPT_WSCALE != 0;
    let entry = TcpStreamEntry {
        inq_len: u32::try_from(incoming.len()).context("length of a receive queue")?,
        inq_seq,
        outq_len,
        outq_seq,
        opt_mask: info.options.into(),
        snd_wscale: info.snd_wscale.into(),
        mss_clamp,
        rcv_wscale: scaled.then_some(info.rcv_wscale.into()),
        timestamp: Some(timestamp),
        unsq_len: Some(unsq_len),
        snd_wl1: Some(window.snd_wl1),
        snd_wnd: Some(window.snd_wnd),
        max_window: Some(window.max_window),
        rcv_wnd: Some(window.rcv_wnd),
        rcv_wup: Some(window.rcv_wup),
        ..TcpStreamEntry::default()
    };
    Ok(Stream { entry, queues: [incoming, outgoing] })
}
