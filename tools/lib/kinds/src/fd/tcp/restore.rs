//! ckpt-restore's part: making connections again.
//!
//! 1. The network is locked for all connections that will be made. If the checkpointed tree was killed, another
//!    lock stands already and stays until step 5.
//! 2. Listeners and other bound sockets are made: established ones may share their ports, not the
//!    other way round.
//! 3. Connections are made in repair mode, one by one: sequence numbers, bind, connect, what was negotiated, what
//!    was received, what was sent and not acknowledged, windows, options. A FIN that a peer outside of the
//!    images had sent is received again: through a raw socket, with a mark that passes the lock.
//! 4. The tasks are built.
//! 5. [`Connections::go_live`]: all sockets leave repair mode, where reads and writes fail with EPERM, and get what had
//!    not been sent yet, still locked. From then on the tasks would run if ckpt-restore died. The locks go, what
//!    waits is sent, FINs too, SYN_SENT connects. The tasks run.
//!
//! Until tasks may run, sockets that are closed say nothing to anybody: in step 5 a child holds them, which puts them
//! into repair mode again before it lets them go. So a restore may fail at any point.
//! FINs are sent in step 5 even where they had been acknowledged: a peer that has seen one acknowledges it
//! again, and both ends are in the states that they were in. Between two ends in the images this is all it takes.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{ClosedConnection, InetSkEntry, InventoryEntry, SkShutdown, TcpStreamEntry},
};
use ckpt_sys::{
    FileId, Refused, SysError, clone, file,
    nft::{self, Connection, INJECTED, NetLock},
    sock,
    tcp::{self, Negotiated, Queue, Window},
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, Shutdown, connect, send, sendto, shutdown},
};

use super::state;
use crate::fd::{Opening, inet, shelf::Shelf};

/// Bytes of a queue that are put back by one call.
const PIECE: u64 = 1 << 16;
/// How long a packet may take from one socket of this process to another.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection within this host may take.
const HANDSHAKE: Duration = Duration::from_millis(200);
const SO_RCVBUFFORCE: i32 = 33;
/// Memory that the kernel takes for a byte in a queue, at most, and for an empty queue.
const OVERHEAD: u64 = 4;
const SLACK: u64 = 1 << 18;

/// Connections that wait for the last step.
#[derive(Debug, Default)]
pub struct Connections {
    lock: Option<NetLock>,
    /// The lock that ckpt-scan has left behind.
    left: Option<String>,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    /// In FILES.
    id: u32,
    what: String,
    what_next: Next,
}

impl Waiting {
    fn socket<'a>(&self, files: &'a Shelf) -> anyhow::Result<BorrowedFd<'a>> {
        files.here(self.id).with_context(|| format!("{} was not made", self.what))
    }
}

#[derive(Debug)]
enum Next {
    Connect {
        to: SocketAddr,
        /// The one who listens is in the images too: it takes no time.
        inside: bool,
        /// What it sends then: where in which stream image, and whether that is the end.
        ino: u32,
        unsent: std::ops::Range<u64>,
        fin: bool,
    },
    Live {
        reuse: bool,
        /// Where in the contents of which stream image lies what has not been sent yet.
        ino: u32,
        unsent: std::ops::Range<u64>,
        fin: bool,
    },
}

/// Makes all sockets of the images. Connections are left in repair mode, locked.
pub(in crate::fd) fn restore(opening: &mut Opening<'_>, entries: &[&InetSkEntry]) -> anyhow::Result<()> {
    let mut connections = BTreeSet::new();
    for isk in entries {
        if state::connected(state_of(isk)?) {
            connections.insert(connection(isk)?);
        }
    }
    let mut kept = BTreeSet::new();
    let closes = |isk: &InetSkEntry| -> anyhow::Result<bool> {
        Ok(opening.options.tcp_close && !connections.contains(&connection(isk)?.reversed()))
    };
    let mut planned = Vec::new();
    let mut listening = Vec::new();
    for isk in entries {
        let now = state_of(isk)?;
        let plan = match now {
            state::LISTEN => {
                listening.push(inet::source(isk)?);
                Plan::Listen
            }
            state::SYN_SENT => Plan::Connect,
            state::CLOSE => match isk.ckpt_closed.map(ClosedConnection::try_from) {
                None => Plan::Bind,
                Some(Ok(how)) => Plan::Closed(how),
                Some(Err(_)) => bail!("{}: unknown kind of closed connection", what(isk)),
            },
            now if state::connected(now) && closes(isk)? => Plan::Closed(ClosedConnection::Ended),
            now if state::connected(now) => {
                kept.insert(connection(isk)?);
                Plan::Live
            }
            now => bail!("{}: can't be in state {}", what(isk), state::name(now)),
        };
        planned.push((plan, *isk));
    }
    if !kept.is_empty() {
        opening.tcp.lock = Some(lock(&kept)?);
        let inventory: InventoryEntry = opening.set.one(Image::Inventory, 0)?;
        opening.tcp.left = inventory.ckpt_net_lock;
    }
    planned.sort_by_key(|(plan, _)| matches!(plan, Plan::Closed(_) | Plan::Live));
    for (plan, isk) in planned {
        let what = what(isk);
        let fd = match plan {
            Plan::Listen => {
                let fd = bound(isk, &what)?;
                sock::listen(fd.as_fd(), i32::try_from(isk.backlog).unwrap_or(i32::MAX))?;
                inet::finish(fd.as_fd(), isk, &what)?;
                fd
            }
            Plan::Bind => {
                let fd = bound(isk, &what)?;
                inet::finish(fd.as_fd(), isk, &what)?;
                fd
            }
            Plan::Connect => {
                let warn = opening.options.warn;
                let fd = match bound(isk, &what) {
                    // Nobody has heard of it yet.
                    Err(error) if error.is::<Refused>() => {
                        warn(&format!("{what}: it will connect from another port: {error}"));
                        let fd = inet::new_socket(isk, &what)?;
                        inet::bind(fd.as_fd(), &what, SocketAddr::new(inet::source(isk)?.ip(), 0))?;
                        fd
                    }
                    fd => fd?,
                };
                inet::finish(fd.as_fd(), isk, &what)?;
                let to = inet::destination(isk)?;
                let ip = to.ip().to_canonical();
                let inside = listening.iter().any(|l| {
                    let here = l.ip().to_canonical();
                    l.port() == to.port() && (here.is_unspecified() || here == ip)
                });
                let stream: Vec<TcpStreamEntry> = opening.set.all(Image::TcpStream, isk.ino.into())?;
                let unsent = 0..stream.first().map_or(0, |stream| stream.outq_len.into());
                let fin = isk.shutdown == Some(SkShutdown::Write.into());
                let what_next = Next::Connect { to, inside, ino: isk.ino, unsent, fin };
                opening.tcp.waiting.push(Waiting { id: isk.id, what: what.clone(), what_next });
                fd
            }
            Plan::Closed(how) => closed(opening.set, isk, &what, how)?,
            Plan::Live => {
                let peer_inside = kept.contains(&connection(isk)?.reversed());
                let (fd, what_next) = live(opening.set, isk, &what, peer_inside)?;
                opening.tcp.waiting.push(Waiting { id: isk.id, what: what.clone(), what_next });
                fd
            }
        };
        if opening.tcp.waiting.last().is_some_and(|w| w.id == isk.id) {
            opening.hold(FileId(isk.id));
        }
        Opening::set_flags(fd.as_fd(), isk.flags)?;
        opening.keep(FileId(isk.id), fd)?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Listen,
    Bind,
    Connect,
    Closed(ClosedConnection),
    Live,
}

fn what(isk: &InetSkEntry) -> String {
    format!("TCP socket {}", isk.ino)
}

fn state_of(isk: &InetSkEntry) -> anyhow::Result<u8> {
    u8::try_from(isk.state).with_context(|| format!("{}: state {}", what(isk), isk.state))
}

fn connection(isk: &InetSkEntry) -> anyhow::Result<Connection> {
    Ok(Connection::new(inet::source(isk)?, inet::destination(isk)?))
}

fn lock(connections: &BTreeSet<Connection>) -> anyhow::Result<NetLock> {
    NetLock::hold(&nft::new_name()?, connections).map_err(|e| {
        let subject = format!("{} TCP connections", connections.len());
        match e.errno {
            Errno::EPERM => {
                let reason = "making them again (TCP_REPAIR, nftables) needs CAP_NET_ADMIN";
                Refused::new(subject, reason)
                    .advise("run ckpt-restore as root, or have them closed: --tcp-close")
                    .into()
            }
            _ => anyhow::Error::from(e).context("lock the network for TCP connections"),
        }
    })
}

fn bound(isk: &InetSkEntry, what: &str) -> anyhow::Result<OwnedFd> {
    let fd = inet::new_socket(isk, what)?;
    let local = inet::source(isk)?;
    if local.port() != 0 {
        inet::bind(fd.as_fd(), what, local)?;
    }
    Ok(fd)
}

fn connect_to(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<(), Errno> {
    connect(fd.as_raw_fd(), &*inet::sockaddr(address))
}

/// Lets `fd` receive this much.
fn receive_room(fd: BorrowedFd<'_>, bytes: u64) -> anyhow::Result<()> {
    let wanted = i32::try_from(bytes * OVERHEAD + SLACK).unwrap_or(i32::MAX / 2);
    if sock::option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF)? < wanted
        && sock::set_option(fd, libc::SOL_SOCKET, SO_RCVBUFFORCE, wanted).is_err()
    {
        sock::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, wanted)?;
    }
    Ok(())
}

/// Writes a part of the contents of a stream image to `fd`.
fn put(set: &ImageSet, ino: u32, range: std::ops::Range<u64>, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    let end = range.end;
    let at = put_for(set, ino, range, fd, HANDSHAKE)?;
    ensure!(at == end, "put bytes into its queue: {}", Errno::EAGAIN);
    Ok(())
}

/// The same for as long as there is room, which is waited for; how far it came.
fn put_for(
    set: &ImageSet,
    ino: u32,
    range: std::ops::Range<u64>,
    fd: BorrowedFd<'_>,
    patience: Duration,
) -> anyhow::Result<u64> {
    if range.is_empty() {
        return Ok(range.end);
    }
    let image = || Image::TcpStream.file_name(ino.into());
    let place = set.payload(Image::TcpStream, ino.into(), 0).with_context(image)?;
    ensure!(range.end <= place.len, "{}: its contents are {} bytes, not {}", image(), place.len, range.end);
    let end = Instant::now() + patience;
    let mut at = range.start;
    while at < range.end {
        let mut buffer = vec![0; usize::try_from((range.end - at).min(PIECE)).unwrap_or(0)];
        let offset = i64::try_from(place.offset + at).context("offset in an image")?;
        let n = nix::sys::uio::pread(place.file, &mut buffer, offset).with_context(image)?;
        ensure!(n > 0, "{}: it ends early", image());
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let n = match send(fd.as_raw_fd(), rest, flags) {
                // What was sent before may be on its way to a socket of this host.
                Err(Errno::EAGAIN) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_micros(100));
                    continue;
                }
                Err(Errno::EAGAIN) => return Ok(at),
                sent => sent.context("put bytes into its queue")?,
            };
            at += n as u64;
            rest = rest.get(n..).unwrap_or_default();
        }
    }
    Ok(at)
}

/// Has the kernel send what waits in the queue of a socket since a lock was in the way, without waiting for a timer: what
/// setting TCP_NODELAY does besides (tcp(7)). Not if it is corked.
fn push(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    if sock::option(fd, libc::IPPROTO_TCP, libc::TCP_CORK)? == 0 {
        let before = sock::option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY)?;
        sock::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        sock::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, before)?;
    }
    Ok(())
}

/// A connection, in repair mode.
fn live(set: &ImageSet, isk: &InetSkEntry, what: &str, peer_inside: bool) -> anyhow::Result<(OwnedFd, Next)> {
    const TCPI_OPT_TIMESTAMPS: u32 = 1;
    const TCPI_OPT_SACK: u32 = 2;
    const TCPI_OPT_WSCALE: u32 = 4;
    let now = state_of(isk)?;
    let stream: TcpStreamEntry = set.one(Image::TcpStream, isk.ino.into())?;
    let (inq, outq) = (u64::from(stream.inq_len), u64::from(stream.outq_len));
    // CRIU's older images have no such field: then all counts as sent.
    let unsent = u64::from(stream.unsq_len.unwrap_or(0)).min(outq);
    let (local, remote) = (inet::source(isk)?, inet::destination(isk)?);
    let fin_sent = state::fin_sent(now);
    let fin_received = state::fin_received(now);
    let received = stream.inq_seq.wrapping_sub(fin_received.into());
    let acknowledged = stream.outq_seq.wrapping_sub(fin_sent.into()).wrapping_sub(stream.outq_len);

    let fd = inet::new_socket(isk, what)?;
    let socket = fd.as_fd();
    tcp::enter_repair(socket)?;
    tcp::set_sequence(socket, Queue::Receive, received.wrapping_sub(stream.inq_len))?;
    tcp::set_sequence(socket, Queue::Send, acknowledged)?;
    inet::bind(socket, what, local)?;
    match connect_to(socket, remote) {
        Ok(()) => {}
        Err(Errno::EADDRNOTAVAIL | Errno::EADDRINUSE) => {
            let reason = format!("the connection from {local} to {remote} exists: its original still has it");
            return Err(Refused::new(what.to_owned(), reason)
                .advise("end that (--replace does), or pass --tcp-close")
                .into());
        }
        Err(errno) => return Err(errno).with_context(|| format!("{what}: connect {local} to {remote}")),
    }
    let shift = |n: u32| {
        u8::try_from(n).ok().filter(|&n| n <= 14).with_context(|| format!("{what}: window scale {n}"))
    };
    let wscale = match stream.opt_mask & TCPI_OPT_WSCALE {
        0 => None,
        _ => Some((shift(stream.snd_wscale)?, shift(stream.rcv_wscale.unwrap_or(0))?)),
    };
    let negotiated = Negotiated {
        mss_clamp: stream.mss_clamp,
        wscale,
        sack: stream.opt_mask & TCPI_OPT_SACK != 0,
        timestamps: stream.opt_mask & TCPI_OPT_TIMESTAMPS != 0,
    };
    tcp::set_negotiated(socket, negotiated).with_context(|| what.to_owned())?;
    if let Some(timestamp) = stream.timestamp.filter(|_| negotiated.timestamps) {
        tcp::set_timestamp(socket, timestamp)?;
    }
    let queues = || format!("{what}: {inq} bytes received, {outq} bytes sent or to be sent");
    receive_room(socket, inq)?;
    tcp::select(socket, Some(Queue::Receive))?;
    put(set, isk.ino, 0..inq, socket).with_context(queues)?;
    sock::make_room(socket, usize::try_from(outq * OVERHEAD + SLACK).unwrap_or(usize::MAX));
    tcp::select(socket, Some(Queue::Send))?;
    let sent = inq + outq - unsent;
    put(set, isk.ino, inq..sent, socket).with_context(queues)?;
    if let (Some(snd_wl1), Some(snd_wnd), Some(max_window), Some(rcv_wnd), Some(rcv_wup)) =
        (stream.snd_wl1, stream.snd_wnd, stream.max_window, stream.rcv_wnd, stream.rcv_wup)
    {
        // The window's edges are told by sequence numbers, which must not be beyond what is there now.
        let rcv_wup = if fin_received && rcv_wup == stream.inq_seq { received } else { rcv_wup };
        let window = Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup };
        tcp::set_window(socket, window).with_context(|| format!("{what}: {window:?}"))?;
    }
    tcp::select(socket, None)?;
    if fin_received && !peer_inside {
        let peer = Peer { local: remote, remote: local, next: received, expects: acknowledged };
        peer.sends_fin(socket).with_context(|| format!("{what}: receive the end of what {remote} sent"))?;
    }
    inet::finish(socket, isk, what)?;
    let reuse = isk.opts.reuseaddr == Some(true);
    let next = Next::Live { reuse, ino: isk.ino, unsent: sent..inq + outq, fin: fin_sent };
    Ok((fd, next))
}

/// A peer that is elsewhere, and has sent a packet long ago.
struct Peer {
    local: SocketAddr,
    remote: SocketAddr,
    /// Sequence number that it sends.
    next: u32,
    /// Sequence number that it acknowledges.
    expects: u32,
}

impl Peer {
    /// Lets `socket` receive its FIN, through a raw socket: a packet from the peer's address to an address of
    /// this host, which the kernel therefore delivers itself.
    fn sends_fin(&self, socket: BorrowedFd<'_>) -> anyhow::Result<()> {
        let (local, remote) = (self.local.ip().to_canonical(), self.remote.ip().to_canonical());
        let packet = self.fin(local, remote);
        let family = if remote.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let raw = sock::socket(family, kind, libc::IPPROTO_RAW).context("a raw socket (CAP_NET_RAW)")?;
        sock::set_option(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, INJECTED.cast_signed())?;
        let scoped = match self.remote {
            SocketAddr::V6(v6) if remote.is_ipv6() => SocketAddrV6::new(*v6.ip(), 0, 0, v6.scope_id()).into(),
            _ => SocketAddr::new(remote, 0),
        };
        let address = inet::sockaddr(scoped);
        sendto(raw.as_raw_fd(), &packet, &*address, MsgFlags::empty())
            .context("sendto through a raw socket")?;
        wait_for(socket, state::CLOSE_WAIT)
    }

    /// An IP packet (RFC 791, RFC 8200) with a TCP segment (RFC 9293).
    fn fin(&self, local: IpAddr, remote: IpAddr) -> Vec<u8> {
        const FIN_ACK: u8 = 0x11;
        const TCP: u8 = 6;
        let mut segment = Vec::with_capacity(20);
        segment.extend(self.local.port().to_be_bytes());
        segment.extend(self.remote.port().to_be_bytes());
        segment.extend(self.next.to_be_bytes());
        segment.extend(self.expects.to_be_bytes());
        // Length in words, flags, window; then checksum and urgent pointer.
        segment.extend([5 << 4, FIN_ACK, 0xff, 0xff, 0, 0, 0, 0]);
        let addresses = [inet::octets(local), inet::octets(remote)].concat();
        // The pseudo header; the fields of the one for IPv6 are longer, but add up to the same.
        let sum = inet::checksum(&[&addresses, &[0, TCP, 0, 20], &segment]);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut packet = if local.is_ipv6() {
            // Version; length of the payload, next header, hop limit.
            vec![0x60, 0, 0, 0, 0, 20, TCP, 64]
        } else {
            // Version and length of the header; total length; the kernel fills in id and checksum.
            vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0]
        };
        packet.extend(addresses);
        packet.extend(segment);
        packet
    }
}

/// Waits for a packet that is on its way within this host to have its effect.
fn wait_for(socket: BorrowedFd<'_>, wanted: u8) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = tcp::info(socket)?.state;
        if now == wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "it is in state {}, not {}; do firewall rules drop packets from this host to itself?",
            state::name(now),
            state::name(wanted)
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// A socket whose connection has ended: connected to one of our own, which sends it what is queued, and resets
/// the connection. That queue and end survive is what the kernel does in this case too.
fn closed(set: &ImageSet, isk: &InetSkEntry, what: &str, how: ClosedConnection) -> anyhow::Result<OwnedFd> {
    let stream: Vec<TcpStreamEntry> = set.all(Image::TcpStream, isk.ino.into())?;
    let inq = u64::from(stream.first().map_or(0, |s| s.inq_len));
    let v6 = isk.family == libc::AF_INET6.unsigned_abs();
    let address = if v6 {
        SocketAddr::from((Ipv6Addr::LOCALHOST, 0))
    } else {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
    };
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let listener = sock::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)?;
    inet::bind(listener.as_fd(), what, address)?;
    sock::listen(listener.as_fd(), 1)?;
    let address = inet::local(listener.as_fd())?.context("getsockname")?;
    let fd = inet::new_socket(isk, what)?;
    let socket = fd.as_fd();
    receive_room(socket, inq)?;
    connect_to(socket, address).with_context(|| format!("{what}: connect to {address}"))?;
    let far = sock::accept(listener.as_fd())?;
    sock::make_room(far.as_fd(), usize::try_from(inq * OVERHEAD + SLACK).unwrap_or(usize::MAX));
    put(set, isk.ino, 0..inq, far.as_fd()).with_context(|| format!("{what}: {inq} bytes received"))?;
    let end = Instant::now() + PATIENCE;
    while u64::from(file::readable_bytes(socket)?) < inq {
        ensure!(Instant::now() < end, "{what}: {inq} bytes do not come through the loopback device");
        std::thread::sleep(Duration::from_micros(100));
    }
    sock::set_linger(far.as_fd(), 0)?;
    drop(far);
    wait_for(socket, state::CLOSE).with_context(|| what.to_owned())?;
    if how == ClosedConnection::Ended {
        // Reading an error takes it.
        sock::option(socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    }
    inet::finish(socket, isk, what)?;
    Ok(fd)
}

/// Why connections did not come to life.
enum NotLive {
    Other(anyhow::Error),
    /// By the child that does it.
    Said(String),
}

impl From<anyhow::Error> for NotLive {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<SysError> for NotLive {
    fn from(error: SysError) -> Self {
        Self::Other(error.into())
    }
}

impl From<String> for NotLive {
    fn from(said: String) -> Self {
        Self::Said(said)
    }
}

impl Connections {
    /// See the module's text, step 5. `commit` makes the tasks run if this process dies, and `committed` tells
    /// whether they do. A process that is killed in the middle of this would leave sockets of which some
    /// talk and some don't to tasks that run on; so a child does it, and comes to its end in any case.
    pub fn go_live(
        self,
        files: &Shelf,
        set: &ImageSet,
        commit: impl FnOnce() -> anyhow::Result<()>,
        committed: impl FnOnce() -> bool,
    ) -> anyhow::Result<()> {
        if self.waiting.is_empty() {
            return commit();
        }
        let steps = clone::Steps {
            prepare: || self.prepare(files, set).map_err(|e| format!("{e:#}")),
            committed,
            work: |done: Vec<u64>, tasks_wait| {
                self.unlock_and_send(files, set, &done, tasks_wait).map_err(|e| format!("{e:#}"))
            },
            undo: || self.repair_again(files),
        };
        clone::see_through(steps, || commit().map_err(NotLive::from)).map_err(|e| match e {
            NotLive::Other(error) => error,
            NotLive::Said(said) => anyhow::anyhow!("bring TCP connections to life: {said}"),
        })
    }

    /// Sockets that programs can read from and write to, in front of locked doors. For each, where in its stream image
    /// begins what did not fit in yet.
    fn prepare(&self, files: &Shelf, set: &ImageSet) -> anyhow::Result<Vec<u64>> {
        self.bring_to_life(files, tcp::abandon_repair)?;
        let put = |w: &Waiting| match &w.what_next {
            Next::Live { ino, unsent, .. } => {
                put_for(set, *ino, unsent.clone(), w.socket(files)?, Duration::ZERO)
                    .with_context(|| w.what.clone())
            }
            Next::Connect { .. } => Ok(0),
        };
        self.waiting.iter().map(put).collect()
    }

    /// Takes sockets out of repair mode by `leave`, which takes SO_REUSEADDR from them.
    fn bring_to_life(
        &self,
        files: &Shelf,
        leave: impl Fn(BorrowedFd<'_>) -> Result<(), SysError>,
    ) -> anyhow::Result<()> {
        for w in &self.waiting {
            if let Next::Live { reuse, .. } = w.what_next {
                let fd = w.socket(files)?;
                leave(fd).with_context(|| w.what.clone())?;
                if reuse {
                    sock::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
                }
            }
        }
        Ok(())
    }

    /// So that they are closed in silence.
    fn repair_again(&self, files: &Shelf) {
        for w in &self.waiting {
            if let (Next::Live { .. }, Some(fd)) = (&w.what_next, files.here(w.id)) {
                let _ = tcp::enter_repair(fd);
            }
        }
    }

    /// `done`: what [`Self::prepare`] gave; `tasks_wait`: nobody uses the sockets yet.
    fn unlock_and_send(
        &self,
        files: &Shelf,
        set: &ImageSet,
        done: &[u64],
        tasks_wait: bool,
    ) -> anyhow::Result<()> {
        let Self { lock, left, waiting } = self;
        if let Some(name) = left {
            nft::remove(name).with_context(|| format!("remove the lock {name} from the network"))?;
        }
        if let Some(lock) = lock {
            lock.release()?;
        }
        if tasks_wait {
            // Once more, for the window probe that the lock would have swallowed.
            self.bring_to_life(files, |fd| tcp::enter_repair(fd).and_then(|()| tcp::leave_repair(fd)))?;
        }
        for (w, &done) in waiting.iter().zip(done) {
            let fd = w.socket(files)?;
            match &w.what_next {
                Next::Live { ino, unsent, fin, .. } => {
                    if !unsent.is_empty() {
                        push(fd).with_context(|| w.what.clone())?;
                    }
                    put(set, *ino, done..unsent.end, fd)
                        .with_context(|| format!("{}: send what it had to send", w.what))?;
                    if *fin {
                        shutdown(fd.as_raw_fd(), Shutdown::Write).with_context(|| w.what.clone())?;
                    }
                }
                Next::Connect { to, inside, ino, unsent, fin } => {
                    let flags = file::flags(fd)?;
                    file::set_flags(fd, flags | libc::O_NONBLOCK.cast_unsigned())?;
                    let connected = connect_to(fd, *to);
                    file::set_flags(fd, flags)?;
                    if !matches!(connected, Ok(()) | Err(Errno::EINPROGRESS)) {
                        connected.with_context(|| format!("{}: connect to {to}", w.what))?;
                    }
                    // If its backlog is full, it takes some time after all.
                    let talks = *fin || !unsent.is_empty();
                    let end = Instant::now() + if talks { PATIENCE } else { HANDSHAKE };
                    while *inside && tcp::info(fd)?.state == state::SYN_SENT && Instant::now() < end {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    put(set, *ino, unsent.clone(), fd)
                        .with_context(|| format!("{}: send again what it had sent", w.what))?;
                    if *fin {
                        shutdown(fd.as_raw_fd(), Shutdown::Write).with_context(|| w.what.clone())?;
                    }
                }
            }
        }
        Ok(())
    }
}
