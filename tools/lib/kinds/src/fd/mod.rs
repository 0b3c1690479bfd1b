//! What a descriptor can refer to.
//!
//! A descriptor is a number in a task's table; what it refers to is an *open file description*
//! (open(2)) with its position and flags, which several descriptors of several tasks may share. The
//! images keep them apart the same way: an FDINFO entry for each number, a FILES entry for each open
//! file, joined by an id.
//!
//! **Dump.** The tree is frozen, so nothing moves. The kernel tells of each descriptor where it leads
//! (the `/proc/PID/fd/N` link), what it is (stat) and its flags and position (`fdinfo`); what these
//! do not tell is asked of a copy made by pidfd_getfd(2), so no code has to run in the target. A copy
//! shares the open file: whatever is done to it must not change position, flags or contents.
//! Whether two descriptors share an open file is told by kcmp(2) alone. It also sorts, so files that
//! could be the same (equal device and inode) are kept in its order and found by bisection: 10,000
//! eventfds, which all have one inode, cost 14 questions each and not 10,000.
//!
//! **Restore.** One process opens everything ([`OpenFiles`]); the tasks inherit its descriptors by
//! fork and dup them to their numbers, or take copies of those that did not fit into its table ([`shelf`]). What needs the final numbers or pids (members of epoll sets,
//! F_SETOWN, file locks) is handed out by [`OpenFiles::placed`] as calls to be run inside the
//! tasks.
//!
//! [`KINDS`] lists every kind there is. To add `foofd`, add a module and a row.

pub mod dump;
pub mod epoll;
pub mod eventfd;
pub mod fown;
mod inet;
pub mod inotify;
mod late;
pub mod lock;
mod look;
pub mod memfd;
mod multicast;
mod netlink;
mod packet;
mod pidfd;
pub mod pipe;
mod raw;
pub mod reg;
pub mod restore;
mod shelf;
pub mod signalfd;
pub mod socket;
pub mod socklist;
pub mod sockopt;
pub mod tcp;
#[cfg(test)]
mod tests;
pub mod timerfd;
pub mod tty;
mod udp;
pub mod unix;

use ckpt_proto::types::{FdTypes, FileEntry};
use ckpt_sys::FileId;
use nix::sys::stat::SFlag;

pub use dump::{Descriptor, DumpOptions, External, FileTable, Shmem, ShmemSegment, Survey, comm};
pub use look::Look;
pub use restore::{OpenFiles, Opening, RestoreOptions};
pub use shelf::Lent;

use crate::Sink;

/// A kind of open file.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// As users know it.
    pub name: &'static str,
    /// Whether a descriptor is of this kind; the first row that says yes counts.
    pub recognise: fn(&Descriptor) -> bool,
    /// What can be done with it.
    pub support: Support,
}

/// What can be done with files of a kind.
#[derive(Debug, Clone, Copy)]
pub enum Support {
    /// Dumped and restored.
    Full {
        /// Their type in the images.
        fd_type: FdTypes,
        /// Makes the FILES entry; `None` if it has to wait until all tasks are known.
        dump: fn(&mut FileTable, &Descriptor, FileId, &mut dyn Sink) -> anyhow::Result<Option<FileEntry>>,
        /// Opens all entries of the type.
        restore: fn(&mut Opening<'_>, &[FileEntry]) -> anyhow::Result<()>,
    },
    /// Known, and refused at dump: why.
    Refused(&'static str),
}

macro_rules! full {
    ($name:literal, $type:ident, $module:ident) => {
        full!($name, $type, $module::recognise, $module::dump, $module::restore)
    };
    ($name:literal, $type:ident, $recognise:expr, $dump:expr, $restore:expr) => {
        Kind {
            name: $name,
            recognise: $recognise,
            support: Support::Full { fd_type: FdTypes::$type, dump: $dump, restore: $restore },
        }
    };
}

macro_rules! refused {
    ($name:literal, $recognise:expr, $why:literal) => {
        Kind { name: $name, recognise: $recognise, support: Support::Refused($why) }
    };
}

/// Every kind of open file that the tools know, supported or not. Order matters twice: the first row
/// that recognises a descriptor has it, and files are opened in this order.
pub const KINDS: &[Kind] = &[
    full!("unix socket", Unixsk, unix),
    full!("TCP socket", Inetsk, tcp::recognise, inet::dump, inet::restore),
    refused!(
        "MPTCP or SCTP socket",
        |d| d.is_socket(libc::AF_INET, libc::SOCK_STREAM) || d.is_socket(libc::AF_INET6, libc::SOCK_STREAM),
        "not supported"
    ),
    full!("UDP socket", Inetsk, udp::recognise, inet::dump, inet::restore),
    full!("ping socket", Inetsk, raw::recognise_ping, inet::dump, inet::restore),
    full!("raw IP socket", Inetsk, raw::recognise, inet::dump, inet::restore),
    refused!(
        "inet socket of an unknown protocol",
        |d| matches!(d.domain(), Some(libc::AF_INET | libc::AF_INET6)),
        "not supported"
    ),
    full!("netlink socket", Netlinksk, netlink),
    full!("packet socket", Packetsk, packet),
    refused!("vsock socket", |d| d.domain() == Some(libc::AF_VSOCK), "its other end is another machine"),
    refused!("socket of an unknown family", |d| d.is(SFlag::S_IFSOCK), "not supported"),
    full!("pipe", Pipe, pipe),
    full!("FIFO", Fifo, pipe::recognise_fifo, pipe::dump_fifo, pipe::restore_fifos),
    full!("eventfd", Eventfd, eventfd),
    full!("timerfd", Timerfd, timerfd),
    full!("signalfd", Signalfd, signalfd),
    full!("memfd", Memfd, memfd),
    full!("terminal", Tty, tty),
    full!("inotify", Inotify, inotify),
    refused!("fanotify", |d| d.is_anon("[fanotify]"), "not supported yet"),
    refused!("io_uring", |d| d.is_anon("[io_uring]"), "not supported yet"),
    refused!("userfaultfd", |d| d.is_anon("[userfaultfd]"), "not supported yet"),
    refused!("perf event", |d| d.is_anon("[perf_event]"), "not supported"),
    refused!("BPF map", |d| d.is_anon("bpf-map"), "not supported yet"),
    refused!("BPF program or link", |d| d.link.starts_with(b"anon_inode:bpf"), "not supported"),
    refused!("BPF program or link", |d| d.link.starts_with(b"anon_inode:[bpf"), "not supported"),
    full!("pidfd", Pidfd, pidfd),
    refused!("seccomp notifier", |d| d.is_anon("seccomp notify"), "not supported"),
    refused!("KVM", |d| d.link.starts_with(b"anon_inode:kvm") || d.is_device(10, 232), "not supported"),
    full!("epoll set", Eventpoll, epoll),
    refused!("anonymous file", |d| d.link.starts_with(b"anon_inode:"), "not supported"),
    refused!("namespace", reg::is_namespace, "not supported yet"),
    refused!("tun/tap interface", |d| d.is_device(10, 200), "not supported yet"),
    refused!("FUSE connection", |d| d.is_device(10, 229), "its file system would lose its server"),
    refused!(
        "System V shared memory",
        |d| d.link.starts_with(b"/SYSV"),
        "supported if it is attached to, not as an open file"
    ),
    refused!("POSIX message queue", reg::is_mqueue, "not supported yet"),
    refused!("secret memory", |d| d.link.starts_with(b"/secretmem"), "not supported"),
    refused!("DMA buffer", |d| d.link.starts_with(b"/dmabuf:"), "not supported"),
    full!("file", Reg, reg),
    refused!("character device", |d| d.is(SFlag::S_IFCHR), "its driver's state can't be saved"),
    refused!("block device", |d| d.is(SFlag::S_IFBLK), "not supported"),
    refused!("unknown kind of file", |_| true, "not supported"),
];
