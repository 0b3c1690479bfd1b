//! Netlink sockets (netlink(7)): a protocol, a port, groups.
//!
//! What the kernel has sent to such a socket can't be given to it again: a message from anybody but the kernel
//! bears its sender's port, and programs look at that. What the kernel keeps for a port beyond the
//! socket goes when the socket does; of that, packets that netfilter queues or logs to a port are
//! recognised and refused.

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsFd, AsRawFd},
};

use anyhow::Context;
use ckpt_proto::types::{FdTypes, FileEntry, NetlinkSkEntry};
use ckpt_sys::{
    FileId, Refused,
    diag::{NetlinkSocket, SockDiag},
    sock,
};
use nix::{
    errno::Errno,
    sys::socket::{NetlinkAddr, bind, connect},
};

use super::{
    Descriptor, FileTable, Opening,
    socket::{self, Completion},
    sockopt::{self, Class, Options, When},
};
use crate::Sink;

const CONNECTED: u32 = 1;
/// A dump is under way: answers are still to come.
const NDIAG_FLAG_CB_RUNNING: u32 = 1;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
/// More groups than any protocol has.
const GROUPS: usize = 1 << 16;

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.domain() == Some(libc::AF_NETLINK)
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    socket::dump(d, id, FdTypes::Netlinksk)
}

/// ckpt-sk's part.
pub(super) fn complete(
    sockets: Vec<socket::Socket<'_>>,
    completion: Completion<'_>,
    sink: &mut dyn Sink,
) -> anyhow::Result<()> {
    if sockets.is_empty() {
        return Ok(());
    }
    let all = SockDiag::here()?.netlink().context("enumerate netlink sockets")?;
    let table: HashMap<u64, NetlinkSocket> = all.into_iter().map(|s| (s.id, s)).collect();
    for socket in &sockets {
        let ino = socket.stub.ino;
        let what = format!("netlink socket {ino}");
        // What is not bound is not listed.
        let unbound = NetlinkSocket::default();
        let diag = table.get(&ino).unwrap_or(&unbound);
        check(socket, diag, &what, completion)?;
        let nlsk = NetlinkSkEntry {
            id: socket.file_id,
            ino: socket.ino()?,
            protocol: socket.stub.protocol,
            state: diag.state.into(),
            flags: socket.stub.flags,
            portid: diag.port,
            groups: diag.groups.clone(),
            dst_portid: diag.remote_port,
            dst_group: diag.remote_group,
            fown: socket.stub.fown,
            opts: sockopt::dump(socket, &what, completion.defaults)?.sk,
            ns_id: (completion.net_ns)(socket.pid()),
            ckpt_type: Some(socket.stub.r#type).filter(|&t| t != libc::SOCK_RAW.unsigned_abs()),
        };
        let entry = FileEntry { nlsk: Some(nlsk), ..FileEntry::default() };
        socket.emit(FdTypes::Netlinksk, entry, sink)?;
    }
    Ok(())
}

fn check(
    socket: &socket::Socket<'_>,
    diag: &NetlinkSocket,
    what: &str,
    completion: Completion<'_>,
) -> anyhow::Result<()> {
    if diag.flags & NDIAG_FLAG_CB_RUNNING != 0 {
        let reason = "the kernel has not finished its answer (a dump) to it";
        return Err(socket.refuse(what, reason).advise("checkpoint when it has been read").into());
    }
    if socket.stub.protocol == libc::NETLINK_NETFILTER.unsigned_abs()
        && let Some(file) = netfilter_sends_to(diag.port)
    {
        return Err(socket.refuse(what, format!("netfilter sends packets to it ({file})")).into());
    }
    let happened = sock::poll_now(socket.copy()?.as_fd(), libc::POLLIN)?;
    if happened & libc::POLLERR != 0 {
        socket.leave_out(what, "an error (ENOBUFS: messages were lost) waits to be read", completion)?;
    } else if happened & libc::POLLIN != 0 || diag.rmem > 0 {
        socket.leave_out(what, "messages are received and not read", completion)?;
    }
    Ok(())
}

/// The list in which the port is the one that packets are queued or logged to.
fn netfilter_sends_to(port: u32) -> Option<&'static str> {
    let files = ["/proc/net/netfilter/nfnetlink_queue", "/proc/net/netfilter/nfnetlink_log"];
    files.into_iter().find(|file| {
        // Missing where nobody queues or logs. Second column: the port.
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| line.split_whitespace().nth(1) == Some(&port.to_string()))
    })
}

/// ckpt-restore's part.
pub(super) fn restore(opening: &mut Opening<'_>, files: &[FileEntry]) -> anyhow::Result<()> {
    for file in files {
        let nlsk = socket::of(file, file.nlsk.as_ref(), "netlink socket")?;
        let what = format!("netlink socket {}", nlsk.ino);
        restore_one(opening, nlsk, &what).with_context(|| what.clone())?;
    }
    Ok(())
}

fn restore_one(opening: &mut Opening<'_>, nlsk: &NetlinkSkEntry, what: &str) -> anyhow::Result<()> {
    let kind = match nlsk.ckpt_type {
        Some(kind) if kind == libc::SOCK_DGRAM.unsigned_abs() => libc::SOCK_DGRAM,
        _ => libc::SOCK_RAW,
    };
    let protocol = i32::try_from(nlsk.protocol).context("a socket's protocol")?;
    let fd = sock::socket(libc::AF_NETLINK, kind | libc::SOCK_CLOEXEC, protocol)?;
    if nlsk.portid != 0 {
        match bind(fd.as_raw_fd(), &NetlinkAddr::new(nlsk.portid, 0)) {
            Err(Errno::EADDRINUSE) => {
                let reason = format!("its port {} is taken by another socket", nlsk.portid);
                return Err(Refused::new(what, reason).advise("end the process that has it").into());
            }
            done => done.with_context(|| format!("bind to port {}", nlsk.portid))?,
        }
    }
    let words = nlsk.groups.iter().take(GROUPS / 32).zip(0u32..);
    let groups = words.flat_map(|(word, at)| {
        (0..32).filter(move |bit| word >> bit & 1 != 0).map(move |bit| at * 32 + bit + 1)
    });
    for group in groups {
        let group = i32::try_from(group).context("a group")?;
        match sock::set_option(fd.as_fd(), libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group) {
            Err(e) if e.errno == Errno::EPERM => {
                let reason = format!("being a member of its group {group} needs CAP_NET_ADMIN");
                return Err(Refused::new(what, reason).into());
            }
            done => done.with_context(|| format!("join group {group}"))?,
        }
    }
    if nlsk.state == CONNECTED {
        // In an address, groups are a mask; a socket sends to one of them.
        let mask = match nlsk.dst_group {
            0 => 0,
            group => 1u32.checked_shl(group - 1).context("a group beyond 32")?,
        };
        connect(fd.as_raw_fd(), &NetlinkAddr::new(nlsk.dst_portid, mask)).context("connect")?;
    }
    let class = Class::of(libc::AF_NETLINK.unsigned_abs(), 0, nlsk.protocol);
    for when in [When::BeforeBind, When::Later, When::Last] {
        sockopt::restore(fd.as_fd(), what, class, &Options::of(&nlsk.opts), when)?;
    }
    Opening::set_flags(fd.as_fd(), nlsk.flags)?;
    opening.keep(FileId(nlsk.id), fd)
}
