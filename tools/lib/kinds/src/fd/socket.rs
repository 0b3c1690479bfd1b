//! Sockets of all families: what they share on their way into the images.
//!
//! ckpt-scan only notes that there is a socket ([`dump`] makes a *stub*); ckpt-sk completes the stubs
//! ([`complete`]), because that is where policy is decided: which connections lead outside, what becomes of
//! them and of what they have received. It looks at each socket through a copy of its own
//! (pidfd_getfd(2)), made anew for each look: a tree can have more sockets than one process may have files open. [`FAMILIES`] says who completes which; the families' own modules make the sockets
//! again at restore, by the rows of [`super::KINDS`].

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{FdTypes, FileEntry, SkPacketEntry, SkShutdown, SocketStub},
};
use ckpt_sys::{FileId, Pid, Refused, TargetFd, pidfd, sock};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socket},
};

use super::{Descriptor, Look, dump::comm, netlink, packet, raw, sockopt::Defaults, tcp, udp, unix};
use crate::{Sink, sink::emit};

/// What to do with what an external connection has received and not read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Queued {
    /// Refuse.
    #[default]
    Refuse,
    /// Leave it out of the checkpoint.
    Drop,
    /// Store it; whoever restores has to decide.
    Keep,
}

/// What the user allowed.
#[derive(Debug, Clone, Default)]
pub struct SkOptions {
    /// Connections that lead outside.
    pub external: Vec<unix::ExternalSocket>,
    /// Bytes waiting in these.
    pub queued: Queued,
    /// What may become of TCP connections.
    pub tcp: tcp::TcpOptions,
}

/// Where messages for the user go.
#[derive(Clone, Copy)]
pub struct Say<'a> {
    /// What they have to know.
    pub warn: &'a dyn Fn(&str),
    /// What they are told if they ask.
    pub note: &'a dyn Fn(&str),
}

/// What every family is told when its sockets are completed.
#[derive(Clone, Copy)]
pub struct Completion<'a> {
    /// The number of a process's network namespace in the images.
    pub net_ns: &'a dyn Fn(Pid) -> Option<u32>,
    /// What the user allowed.
    pub options: &'a SkOptions,
    /// Messages.
    pub say: Say<'a>,
    /// Options of new sockets.
    pub defaults: &'a Defaults,
    /// For what no call tells.
    pub look: &'a Look,
}

/// One socket of the frozen tree.
#[derive(Debug)]
pub struct Socket<'a> {
    /// Its number in FILES.
    pub file_id: u32,
    /// Where it was found.
    pub stub: &'a SocketStub,
    /// The process that it was found in.
    pub task: Rc<OwnedFd>,
    /// How messages call it: pid, command, descriptor.
    pub subject: String,
    /// Cookie of its network namespace, if that is not this process's.
    pub foreign: Option<u64>,
}

impl Socket<'_> {
    /// A copy: the same open file.
    ///
    /// # Errors
    /// Too many files are open here; the tree is not frozen.
    pub fn copy(&self) -> anyhow::Result<OwnedFd> {
        let fd = TargetFd(i32::try_from(self.stub.fd).context("a socket's descriptor")?);
        pidfd::getfd(self.task.as_fd(), fd).with_context(|| self.subject.clone())
    }

    /// Who has it open.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid(self.stub.pid.cast_signed())
    }

    /// A refusal of it; `what` is its kind and inode.
    pub fn refuse(&self, what: &str, reason: impl std::fmt::Display) -> Refused {
        Refused::new(self.subject.clone(), format!("{what}: {reason}"))
    }

    /// A refusal because of its network namespace.
    pub fn elsewhere(&self, what: &str) -> Refused {
        let advice = format!("run the tools in that of the process: nsenter -n -t {} ...", self.pid());
        self.refuse(what, "it is in another network namespace than the tools").advise(advice)
    }

    /// Something that it has received, and that can't be given to a restored one: refused, unless the user
    /// wants it left out.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn leave_out(&self, what: &str, received: &str, completion: Completion<'_>) -> Result<(), Refused> {
        if completion.options.queued == Queued::Drop {
            (completion.say.warn)(&format!("{}: {what}: {received}: left out", self.subject));
            return Ok(());
        }
        let advice = "checkpoint when it has been read, or leave it out: --queued=drop";
        Err(self.refuse(what, received).advise(advice))
    }

    /// Puts the socket's number and kind into `entry`, which holds all else, and emits it.
    ///
    /// # Errors
    /// The sink's.
    pub(super) fn emit(&self, kind: FdTypes, entry: FileEntry, sink: &mut dyn Sink) -> anyhow::Result<()> {
        let entry = FileEntry { r#type: kind.into(), id: self.file_id, ..entry };
        emit(sink, Image::Files, 0, &entry)
    }

    /// Emits a message of its queue: what is known of it, and its bytes.
    ///
    /// # Errors
    /// The sink's; [`Refused`] if the images can't hold its length.
    pub(super) fn emit_queued(
        &self,
        packet: SkPacketEntry,
        bytes: &[u8],
        sink: &mut dyn Sink,
    ) -> anyhow::Result<()> {
        let length = u32::try_from(bytes.len())
            .map_err(|_| self.refuse("a message in its queue", format!("{} bytes", bytes.len())))?;
        emit(sink, Image::SkQueues, 0, &SkPacketEntry { id_for: self.file_id, length, ..packet })?;
        sink.data(Image::SkQueues, 0, bytes)
    }

    /// Its inode, which has 32 bits in the images.
    ///
    /// # Errors
    /// [`Refused`] if it has more.
    pub fn ino(&self) -> anyhow::Result<u32> {
        let fits = u32::try_from(self.stub.ino).ok();
        Ok(fits.ok_or_else(|| self.refuse("socket", "its inode number does not fit into the images"))?)
    }
}

/// Sockets that one module completes.
struct Family {
    wants: fn(&SocketStub) -> bool,
    /// Emits their entries, and what is queued in them. Called even if there are none, for
    /// options that name one.
    complete: fn(Vec<Socket<'_>>, Completion<'_>, &mut dyn Sink) -> anyhow::Result<()>,
}

/// Who completes which sockets; the first row that wants one has it.
const FAMILIES: &[Family] = &[
    Family { wants: |s| is(s, libc::AF_UNIX), complete: unix::complete },
    Family { wants: |s| is(s, libc::AF_NETLINK), complete: netlink::complete },
    Family { wants: |s| is(s, libc::AF_PACKET), complete: packet::complete },
    Family { wants: |s| is_inet(s, libc::SOCK_RAW), complete: raw::complete },
    Family { wants: |s| is_inet(s, libc::SOCK_STREAM), complete: tcp::complete },
    Family { wants: |s| is_inet(s, libc::SOCK_DGRAM) && is_ping(s), complete: raw::complete },
    Family { wants: |s| is_inet(s, libc::SOCK_DGRAM), complete: udp::complete },
];

/// Whether sockets of this family can be completed.
pub(super) fn is_supported(stub: &SocketStub) -> bool {
    FAMILIES.iter().any(|family| (family.wants)(stub))
}

fn is(stub: &SocketStub, domain: i32) -> bool {
    stub.domain == domain.unsigned_abs()
}

fn is_inet(stub: &SocketStub, kind: i32) -> bool {
    (is(stub, libc::AF_INET) || is(stub, libc::AF_INET6)) && stub.r#type == kind.unsigned_abs()
}

fn is_ping(stub: &SocketStub) -> bool {
    matches!(stub.protocol.cast_signed(), libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6)
}

/// What is shut down (1: reading, 2: writing), as the images have it.
pub(super) fn shutdown_entry(shut: u8) -> Option<i32> {
    match shut & 3 {
        0 => None,
        1 => Some(SkShutdown::Read.into()),
        2 => Some(SkShutdown::Write.into()),
        _ => Some(SkShutdown::Both.into()),
    }
}

/// Shuts down what was shut down.
pub(super) fn shut_down(fd: BorrowedFd<'_>, entry: Option<i32>) -> anyhow::Result<()> {
    let how = match entry.and_then(|s| SkShutdown::try_from(s).ok()) {
        Some(SkShutdown::Read) => Shutdown::Read,
        Some(SkShutdown::Write) => Shutdown::Write,
        Some(SkShutdown::Both) => Shutdown::Both,
        None | Some(SkShutdown::None) => return Ok(()),
    };
    match shutdown(fd.as_raw_fd(), how) {
        // Datagram sockets that are not connected say so, and are shut down all the same; what was closed by its peer
        // is shut down by that.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(errno).context("shutdown"),
    }
}

/// Whether it is a listening socket.
pub(super) fn listens(fd: BorrowedFd<'_>) -> anyhow::Result<bool> {
    Ok(sock::option(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0)
}

/// ckpt-scan's part: a stub, which ckpt-sk completes.
pub(super) fn dump(d: &Descriptor, id: FileId, kind: FdTypes) -> anyhow::Result<Option<FileEntry>> {
    let option = |name| -> anyhow::Result<u32> {
        let value = sock::option(d.copy.as_fd(), libc::SOL_SOCKET, name).with_context(|| d.subject())?;
        Ok(value.unsigned_abs())
    };
    let stub = SocketStub {
        pid: d.pid.0.unsigned_abs(),
        fd: d.fd.0.unsigned_abs(),
        ino: d.stat.st_ino,
        domain: option(libc::SO_DOMAIN)?,
        r#type: option(libc::SO_TYPE)?,
        protocol: option(libc::SO_PROTOCOL)?,
        flags: d.flags(),
        fown: d.fown()?,
        in_flight: Vec::new(),
    };
    Ok(Some(FileEntry { r#type: kind.into(), id: id.0, ckpt_stub: Some(stub), ..FileEntry::default() }))
}

/// What an entry of FILES has to hold of a socket of this kind.
pub(super) fn of<'f, T>(file: &'f FileEntry, held: Option<&'f T>, kind: &str) -> anyhow::Result<&'f T> {
    held.with_context(|| {
        let stub = if file.ckpt_stub.is_some() { " (it did not pass ckpt-sk)" } else { "" };
        format!("{kind} {} without its entry{stub}", file.id)
    })
}

/// What is queued in sockets, by the file that it is for; with its number in the image, by which its bytes are found.
pub(super) fn queues(set: &ImageSet) -> anyhow::Result<HashMap<u32, Vec<(usize, SkPacketEntry)>>> {
    let mut queues: HashMap<u32, Vec<_>> = HashMap::new();
    for (index, packet) in set.all::<SkPacketEntry>(Image::SkQueues, 0)?.into_iter().enumerate() {
        queues.entry(packet.id_for).or_default().push((index, packet));
    }
    Ok(queues)
}

/// Replaces `stubs` by full entries, and adds what is queued.
///
/// # Errors
/// [`Refused`] for what can't be checkpointed or needs the user's word; the sink's.
pub fn complete(stubs: &[FileEntry], completion: Completion<'_>, sink: &mut dyn Sink) -> anyhow::Result<()> {
    let mut families: Vec<Vec<Socket<'_>>> = FAMILIES.iter().map(|_| Vec::new()).collect();
    for socket in open(stubs)? {
        let row = FAMILIES.iter().position(|family| (family.wants)(socket.stub));
        let Some(family) = row.and_then(|row| families.get_mut(row)) else {
            let what = format!("socket {}", socket.stub.ino);
            return Err(socket.refuse(&what, "sockets of this family are not supported").into());
        };
        family.push(socket);
    }
    for (family, sockets) in FAMILIES.iter().zip(families) {
        (family.complete)(sockets, completion, sink)?;
    }
    Ok(())
}

/// Finds the sockets of all stubs.
fn open(stubs: &[FileEntry]) -> anyhow::Result<Vec<Socket<'_>>> {
    let mut tasks: HashMap<Pid, (Rc<OwnedFd>, String)> = HashMap::new();
    let mut sockets = Vec::new();
    let mut here = None;
    for entry in stubs {
        let Some(stub) = &entry.ckpt_stub else { continue };
        let pid = Pid(i32::try_from(stub.pid).context("a socket's pid")?);
        let (task, comm) = match tasks.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert((Rc::new(pidfd::open(pid)?), comm(pid))),
        };
        let subject = format!("pid {pid} ({comm}) fd {}", stub.fd);
        let task = Rc::clone(task);
        let mut socket = Socket { file_id: entry.id, stub, task, subject, foreign: None };
        let copy = socket.copy()?;
        let inode = nix::sys::stat::fstat(&copy).context("fstat")?.st_ino;
        if inode != stub.ino {
            let subject = &socket.subject;
            bail!("{subject}: is socket {inode} now, the stream says {}: the tree is not frozen", stub.ino);
        }
        let own = match here {
            Some(cookie) => cookie,
            None => *here.insert(own_namespace()?),
        };
        let network = sock::net_namespace(copy.as_fd())?;
        // Whose client is in another network namespace has a connection that is there, too (unix_stream_connect in
        // net/unix/af_unix.c): that of unix sockets is theirs to judge.
        if network != own && !is(socket.stub, libc::AF_UNIX) {
            return Err(socket.elsewhere(&format!("socket {inode}")).into());
        }
        socket.foreign = (network != own).then_some(network);
        sockets.push(socket);
    }
    Ok(sockets)
}

/// The cookie of this process's network namespace.
fn own_namespace() -> anyhow::Result<u64> {
    let probe =
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).context("socket")?;
    Ok(sock::net_namespace(probe.as_fd())?)
}
