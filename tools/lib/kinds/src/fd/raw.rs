//! Raw sockets (raw(7)) and ping sockets (icmp(7)): datagrams of any protocol, of ICMP echo.
//!
//! What such a socket has received can't be given to it again. A packet of this kind goes to
//! the protocol's code in the kernel and to all other raw sockets as well: an echo request that is sent once more
//! is answered once more.

use std::{collections::HashMap, fs, os::fd::AsFd};

use anyhow::Context;
use ckpt_proto::types::{FdTypes, FileEntry, InetSkEntry};
use ckpt_sys::{diag::InetSocket, sock};

use super::{Descriptor, Opening, inet, multicast, socket};
use crate::{Sink, fd::socket::Completion};

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_socket(libc::AF_INET, libc::SOCK_RAW) || d.is_socket(libc::AF_INET6, libc::SOCK_RAW)
}

pub(super) fn recognise_ping(d: &Descriptor) -> bool {
    (d.is_socket(libc::AF_INET, libc::SOCK_DGRAM) || d.is_socket(libc::AF_INET6, libc::SOCK_DGRAM))
        && sock::option(d.copy.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|protocol| matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6))
}

fn name(kind: u32) -> &'static str {
    if kind == libc::SOCK_RAW.unsigned_abs() { "raw" } else { "ping" }
}

/// The sockets of both kinds and families, by inode. sock_diag(7) does not have them all (see
/// [`ckpt_sys::diag`]), and getpeername(2) does not tell a peer without a port.
fn table() -> anyhow::Result<HashMap<u64, InetSocket>> {
    let mut table = HashMap::new();
    for name in ["raw", "raw6", "icmp", "icmp6"] {
        let path = format!("/proc/net/{name}");
        let text = match fs::read(&path) {
            // A kernel without IPv6.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            text => text.with_context(|| format!("read {path}"))?,
        };
        for socket in ckpt_proc::net::parse(&text).with_context(|| path.clone())? {
            let ckpt_proc::net::NetSocket { local, remote, state, wqueue, rqueue, uid, inode } = socket;
            let (id, protocol, interface, shutdown) = (inode, 0, 0, None);
            table.insert(
                id,
                InetSocket { id, protocol, state, local, remote, interface, rqueue, wqueue, uid, shutdown },
            );
        }
    }
    Ok(table)
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
    let table = table()?;
    let groups = multicast::groups()?;
    for socket in &sockets {
        let what = format!("{} socket {}", name(socket.stub.r#type), socket.stub.ino);
        let diag = table.get(&socket.stub.ino);
        let isk = inet::datagram_entry(socket, diag, &what, &groups, completion)?;
        let happened = sock::poll_now(socket.copy()?.as_fd(), libc::POLLIN | libc::POLLRDHUP)?;
        if happened & libc::POLLERR != 0 {
            socket.leave_out(&what, "an error waits to be read", completion)?;
        } else if happened & (libc::POLLIN | libc::POLLRDHUP) == libc::POLLIN {
            socket.leave_out(&what, "packets are received and not read", completion)?;
        }
        socket.emit(FdTypes::Inetsk, FileEntry { isk: Some(isk), ..FileEntry::default() }, sink)?;
    }
    Ok(())
}

/// ckpt-restore's part.
pub(super) fn restore(opening: &mut Opening<'_>, entries: &[&InetSkEntry]) -> anyhow::Result<()> {
    for isk in entries {
        let what = format!("{} socket {}", name(isk.r#type), isk.ino);
        let fd = inet::new_socket(isk, &what)?;
        // A raw socket's port is its protocol, and not bound.
        let local = inet::source(isk)?;
        let bound = !local.ip().is_unspecified() || isk.r#type != libc::SOCK_RAW.unsigned_abs();
        if bound && local.port() != 0 {
            inet::bind(fd.as_fd(), &what, local)?;
        }
        inet::keep_datagram(opening, fd, isk, &what)?;
    }
    Ok(())
}
