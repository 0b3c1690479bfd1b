//! Packet sockets (packet(7)): what a network interface sends and receives.
//!
//! sock_diag(7) tells what getsockopt(2) does not: rings and memberships. A restored socket hears
//! nothing before everything is set, its filter above all: it is made without a protocol, which
//! the kernel takes for deaf, and bound last. Packets that it has received and not read can't be given back, for
//! that would mean to send them again; a program that listens to a network has to live with losses anyway, so
//! `--queued=drop` is a fair answer.
//!
//! Rings (`PACKET_RX_RING`, `PACKET_TX_RING`) are made again with their measures; what is in a receive ring
//! is the business of [`ring`], and of [`transmit`] what is in the other. CRIU's images know of mapped rings, not of
//! what is in them.

mod ring;
mod transmit;

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{FdTypes, FileEntry, PacketMclist, PacketRing, PacketSockEntry, SkPacketEntry},
};
use ckpt_sys::{
    FileId, Pid, Refused, TargetFd,
    diag::{self, PacketSocket, SockDiag},
    pidfd, sock,
};
use nix::{
    errno::Errno,
    net::if_::{if_indextoname, if_nametoindex},
};

use super::{
    Descriptor, FileTable, Opening,
    dump::{comm, descriptors, read_link},
    socket::{self, Completion},
    sockopt::{self, Class, Options, When},
};
use crate::Sink;

const SOL_PACKET: i32 = 263;
const PACKET_ADD_MEMBERSHIP: i32 = 1;
const PACKET_RX_RING: i32 = 5;
const PACKET_COPY_THRESH: i32 = 7;
const PACKET_AUXDATA: i32 = 8;
const PACKET_ORIGDEV: i32 = 9;
const PACKET_VERSION: i32 = 10;
const PACKET_RESERVE: i32 = 12;
const PACKET_TX_RING: i32 = 13;
const PACKET_LOSS: i32 = 14;
const PACKET_VNET_HDR: i32 = 15;
const PACKET_TIMESTAMP: i32 = 17;
const PACKET_FANOUT: i32 = 18;
const TPACKET_V3: u32 = 2;
const PDI_AUXDATA: u32 = 2;
const PDI_ORIGDEV: u32 = 4;
const PDI_VNETHDR: u32 = 8;
const PDI_LOSS: u32 = 16;
/// `fanout`: none.
const NO_FANOUT: u32 = u32::MAX;
/// `PACKET_FANOUT_FLAG_UNIQUEID`, which asks for a new group.
const FANOUT_UNIQUE: u32 = 0x2000 << 16;
/// Longest hardware address.
const LONGEST: usize = 32;

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.domain() == Some(libc::AF_PACKET)
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    if !d.is_socket(libc::AF_PACKET, libc::SOCK_RAW) && !d.is_socket(libc::AF_PACKET, libc::SOCK_DGRAM) {
        return Err(d.refuse("packet sockets of type SOCK_PACKET are not supported").into());
    }
    socket::dump(d, id, FdTypes::Packetsk)
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
    let all = SockDiag::here()?.packet().context("enumerate packet sockets")?;
    let table: HashMap<u64, PacketSocket> = all.into_iter().map(|s| (s.id, s)).collect();
    for socket in &sockets {
        let ino = socket.stub.ino;
        let what = format!("packet socket {ino}");
        let diag = table
            .get(&ino)
            .with_context(|| format!("{}: the kernel does not list {what}", socket.subject))?;
        check(socket, diag, &what, completion)?;
        let mut psk = entry(socket, diag, &what, completion)?;
        let [received, to_send] = rings(socket, &psk, &what, completion)?;
        psk.ckpt_rx_head = Some(received.head).filter(|&head| head != 0);
        psk.ckpt_tx_head = Some(to_send.head).filter(|&head| head != 0);
        socket.emit(FdTypes::Packetsk, FileEntry { psk: Some(psk), ..FileEntry::default() }, sink)?;
        for (contents, ckpt_ring_transmit) in [(received, None), (to_send, Some(true))] {
            for (slot, bytes) in contents.unread {
                let ckpt_ring_slot = Some(slot);
                let packet = SkPacketEntry { ckpt_ring_slot, ckpt_ring_transmit, ..SkPacketEntry::default() };
                socket.emit_queued(packet, &bytes, sink)?;
            }
        }
    }
    Ok(())
}

/// What is in the receive ring of a socket, and in its transmit ring.
fn rings(
    socket: &socket::Socket<'_>,
    psk: &PacketSockEntry,
    what: &str,
    completion: Completion<'_>,
) -> anyhow::Result<[ring::Contents; 2]> {
    let copy = socket.copy()?;
    let heads = || completion.look.ask(|kernel| kernel.packet_heads(copy.as_fd()));
    let (rx, tx) = (psk.rx_ring.as_ref(), psk.tx_ring.as_ref());
    let mut contents = [ring::Contents::default(), ring::Contents::default()];
    if let Some(rx) = rx {
        let found = ring::read(copy.as_fd(), psk.version, rx, tx, &|| Ok(heads()?.0));
        let found = found.with_context(|| format!("{}: its ring", socket.subject))?;
        contents[0] = found.map_err(|why| socket.refuse(what, why))?;
    }
    if let Some(tx) = tx {
        let found = transmit::read(copy.as_fd(), psk.version, rx, tx, &|| Ok(heads()?.1));
        let found = found.with_context(|| format!("{}: its transmit ring", socket.subject))?;
        contents[1] = found.map_err(|(why, advice)| socket.refuse(what, why).advise(advice))?;
    }
    Ok(contents)
}

/// The file of a mapped ring.
///
/// # Errors
/// [`Refused`] for what can't be mapped again, or nobody has open.
pub(super) fn add_mapped(
    table: &mut FileTable,
    pid: Pid,
    id: u64,
    (offset, len): (u64, u64),
    sink: &mut dyn Sink,
) -> anyhow::Result<FileId> {
    let subject = format!("pid {pid} mapping of socket {id}");
    let refuse = |reason: &str| Refused::new(subject.clone(), reason);
    let mut pids: Vec<Pid> = table.tree.iter().copied().filter(|&other| other != pid).collect();
    pids.sort_unstable();
    let key = format!("socket:[{id}]");
    let mut found = None;
    for pid in std::iter::once(pid).chain(pids) {
        let fds = descriptors(pid)?.into_iter();
        let is_it = |fd: &TargetFd| {
            read_link(&std::path::PathBuf::from(format!("/proc/{pid}/fd/{fd}")))
                .is_ok_and(|l| l == key.as_bytes())
        };
        found = fds.into_iter().find(is_it).map(|fd| (pid, fd));
        if found.is_some() {
            break;
        }
    }
    let Some((holder, fd)) = found else {
        return Err(refuse("no process of the tree has it open any more").into());
    };
    let task = pidfd::open(holder)?;
    let (file, kind, _) = table.add_descriptor(holder, &comm(holder), task.as_fd(), fd, sink)?;
    if kind != FdTypes::Packetsk {
        return Err(refuse("memory of this kind of socket can't be checkpointed").into());
    }
    let all = SockDiag::here()?.packet().context("enumerate packet sockets")?;
    let socket =
        all.into_iter().find(|s| s.id == id).with_context(|| format!("{subject}: it is not listed"))?;
    let bytes = |of: Option<diag::PacketRing>| self::ring(of).map_or(0, |measures| ring::bytes(&measures));
    if (offset, len) != (0, bytes(socket.rx_ring) + bytes(socket.tx_ring)) {
        return Err(refuse("only a part of its rings is mapped").into());
    }
    Ok(file)
}

fn check(
    socket: &socket::Socket<'_>,
    diag: &PacketSocket,
    what: &str,
    completion: Completion<'_>,
) -> anyhow::Result<()> {
    let happened = sock::poll_now(socket.copy()?.as_fd(), libc::POLLIN)?;
    if diag.interface == u32::MAX {
        return Err(socket.refuse(what, "the interface that it was bound to is gone").into());
    }
    // What is in a ring makes it readable too.
    let readable = happened & libc::POLLIN != 0 && diag.rx_ring.is_none();
    if happened & libc::POLLERR != 0 {
        socket.leave_out(what, "an error waits to be read", completion)?;
    } else if readable || diag.rmem > 0 {
        socket.leave_out(what, "packets are received and not read", completion)?;
    }
    Ok(())
}

fn entry(
    socket: &socket::Socket<'_>,
    diag: &PacketSocket,
    what: &str,
    completion: Completion<'_>,
) -> anyhow::Result<PacketSockEntry> {
    const PACKET_FANOUT_CBPF: u32 = 6;
    const PACKET_FANOUT_EBPF: u32 = 7;
    let name = |index: u32| -> anyhow::Result<Option<Vec<u8>>> {
        if index == 0 {
            return Ok(None);
        }
        let name = if_indextoname(index).with_context(|| format!("{what}: interface {index}"))?;
        Ok(Some(name.to_bytes().to_vec()))
    };
    let mut mclist = Vec::new();
    for membership in &diag.memberships {
        let PacketSocketMembership { interface, count, kind, address } = membership;
        for _ in 0..*count {
            mclist.push(PacketMclist {
                index: *interface,
                r#type: (*kind).into(),
                addr: address.clone(),
                ckpt_ifname: name(*interface)?,
            });
        }
    }
    let fanout = match diag.fanout {
        None => NO_FANOUT,
        // sock_diag leaves the flags out.
        Some(_) => {
            sock::option(socket.copy()?.as_fd(), SOL_PACKET, PACKET_FANOUT)?.cast_unsigned() & !FANOUT_UNIQUE
        }
    };
    if fanout != NO_FANOUT && [PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF].contains(&(fanout >> 16 & 0xff)) {
        let reason = "the program that spreads packets over its fanout group can't be read back";
        return Err(socket.refuse(what, reason).into());
    }
    Ok(PacketSockEntry {
        id: socket.file_id,
        r#type: socket.stub.r#type,
        protocol: diag.protocol.to_be().into(),
        flags: socket.stub.flags,
        ifindex: diag.interface,
        fown: socket.stub.fown,
        opts: sockopt::dump(socket, what, completion.defaults)?.sk,
        version: diag.version,
        reserve: diag.reserve,
        aux_data: diag.flags & PDI_AUXDATA != 0,
        orig_dev: diag.flags & PDI_ORIGDEV != 0,
        vnet_hdr: diag.flags & PDI_VNETHDR != 0,
        loss: diag.flags & PDI_LOSS != 0,
        timestamp: diag.timestamp,
        copy_thresh: diag.copy_thresh,
        mclist,
        fanout: Some(fanout),
        rx_ring: ring(diag.rx_ring),
        tx_ring: ring(diag.tx_ring),
        ns_id: (completion.net_ns)(socket.pid()),
        ckpt_ifname: name(diag.interface)?,
        ckpt_rx_head: None,
        ckpt_tx_head: None,
    })
}

use diag::PacketMembership as PacketSocketMembership;

fn ring(ring: Option<diag::PacketRing>) -> Option<PacketRing> {
    let diag::PacketRing { block_size, block_nr, frame_size, frame_nr, retire_tmo, sizeof_priv, features } =
        ring?;
    Some(PacketRing { block_size, block_nr, frame_size, frame_nr, retire_tmo, sizeof_priv, features })
}

/// ckpt-restore's part.
pub(super) fn restore(opening: &mut Opening<'_>, files: &[FileEntry]) -> anyhow::Result<()> {
    let mut queues = socket::queues(opening.set)?;
    for file in files {
        let psk = socket::of(file, file.psk.as_ref(), "packet socket")?;
        let what = format!("packet socket of file {}", psk.id);
        let mut received = ring::Contents { head: psk.ckpt_rx_head.unwrap_or(0), unread: Vec::new() };
        let mut to_send = ring::Contents { head: psk.ckpt_tx_head.unwrap_or(0), unread: Vec::new() };
        for (index, packet) in queues.remove(&psk.id).unwrap_or_default() {
            let Some(slot) = packet.ckpt_ring_slot else { continue };
            let (ring, contents) = match packet.ckpt_ring_transmit {
                Some(true) => (&psk.tx_ring, &mut to_send),
                _ => (&psk.rx_ring, &mut received),
            };
            let limit = ring.as_ref().map_or(0, |ring| ring.block_size).into();
            let bytes = opening.set.payload_bytes(Image::SkQueues, 0, index, limit)?;
            contents.unread.push((slot, bytes));
        }
        restore_one(opening, psk, &received, &to_send, &what).with_context(|| what.clone())?;
    }
    Ok(())
}

fn restore_one(
    opening: &mut Opening<'_>,
    psk: &PacketSockEntry,
    received: &ring::Contents,
    to_send: &ring::Contents,
    what: &str,
) -> anyhow::Result<()> {
    let kind = match i32::try_from(psk.r#type) {
        Ok(kind @ (libc::SOCK_RAW | libc::SOCK_DGRAM)) => kind,
        _ => bail!("unknown type {}", psk.r#type),
    };
    let fd = match sock::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, 0) {
        Err(e) if e.errno == Errno::EPERM => {
            return Err(Refused::new(what, "making a packet socket needs CAP_NET_RAW").into());
        }
        fd => fd?,
    };
    let fd_ref = fd.as_fd();
    // In this order: headers and reserved room are measures of a ring, which takes them as they are.
    set(fd_ref, PACKET_VERSION, psk.version)?;
    set(fd_ref, PACKET_RESERVE, psk.reserve)?;
    set(fd_ref, PACKET_VNET_HDR, psk.vnet_hdr.into())?;
    set(fd_ref, PACKET_AUXDATA, psk.aux_data.into())?;
    set(fd_ref, PACKET_ORIGDEV, psk.orig_dev.into())?;
    set(fd_ref, PACKET_LOSS, psk.loss.into())?;
    set(fd_ref, PACKET_TIMESTAMP, psk.timestamp)?;
    set(fd_ref, PACKET_COPY_THRESH, psk.copy_thresh)?;
    let class = Class::of(libc::AF_PACKET.unsigned_abs(), psk.r#type, 0);
    let options = Options::of(&psk.opts);
    for when in [When::BeforeBind, When::Later] {
        sockopt::restore(fd_ref, what, class, &options, when)?;
    }
    for (name, ring) in [(PACKET_RX_RING, &psk.rx_ring), (PACKET_TX_RING, &psk.tx_ring)] {
        if let Some(ring) = ring {
            set_ring(fd_ref, name, psk.version, ring).context("its ring")?;
        }
    }
    if let Some(rx) = psk.rx_ring.as_ref().filter(|_| !received.is_new()) {
        ring::refill(fd_ref, psk.version, rx, psk.tx_ring.as_ref(), received)
            .context("what was received into its ring")?;
        sock::detach_filter(fd_ref)?;
    }
    if let Some(tx) = psk.tx_ring.as_ref().filter(|_| !to_send.is_new()) {
        transmit::refill(fd_ref, psk, tx, to_send).context("its transmit ring")?;
    }
    sockopt::restore(fd_ref, what, class, &options, When::Last)?;
    for membership in &psk.mclist {
        join(fd_ref, membership)?;
    }
    let protocol = u16::try_from(psk.protocol).context("a protocol")?;
    if protocol != 0 || psk.ifindex != 0 {
        let index = index(psk.ckpt_ifname.as_deref(), psk.ifindex)?;
        sock::bind_to(fd_ref, &address(protocol, index)?)?;
    }
    if let Some(fanout) = psk.fanout.filter(|&f| f != NO_FANOUT) {
        sock::set_option(fd_ref, SOL_PACKET, PACKET_FANOUT, fanout.cast_signed())
            .context("its fanout group")?;
    }
    Opening::set_flags(fd_ref, psk.flags)?;
    opening.keep(FileId(psk.id), fd)
}

/// `struct sockaddr_ll`; the protocol is in network byte order already.
fn address(protocol: u16, index: u32) -> anyhow::Result<Vec<u8>> {
    let mut address = u16::try_from(libc::AF_PACKET)?.to_ne_bytes().to_vec();
    address.extend_from_slice(&protocol.to_ne_bytes());
    address.extend_from_slice(&index.to_ne_bytes());
    address.resize(20, 0);
    Ok(address)
}

/// Sets a number if it is not what the socket has.
fn set(fd: BorrowedFd<'_>, name: i32, value: u32) -> anyhow::Result<()> {
    let now = sock::option(fd, SOL_PACKET, name).unwrap_or(0);
    if now.cast_unsigned() != value {
        sock::set_option(fd, SOL_PACKET, name, value.cast_signed())?;
    }
    Ok(())
}

/// `struct tpacket_req`, or `tpacket_req3`, which is longer.
fn set_ring(fd: BorrowedFd<'_>, name: i32, version: u32, ring: &PacketRing) -> anyhow::Result<()> {
    let mut words = vec![ring.block_size, ring.block_nr, ring.frame_size, ring.frame_nr];
    if version == TPACKET_V3 {
        words.extend([ring.retire_tmo, ring.sizeof_priv, ring.features]);
    }
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    Ok(sock::set_option_bytes(fd, SOL_PACKET, name, &bytes)?)
}

/// The index of an interface whose name is known, or that has had this index.
fn index(name: Option<&[u8]>, before: u32) -> anyhow::Result<u32> {
    let Some(name) = name else { return Ok(before) };
    if_nametoindex(name).with_context(|| format!("interface {}", name.escape_ascii()))
}

/// `struct packet_mreq`.
fn join(fd: BorrowedFd<'_>, membership: &PacketMclist) -> anyhow::Result<()> {
    if membership.addr.len() > LONGEST {
        bail!("a hardware address of {} bytes", membership.addr.len());
    }
    let mut bytes = index(membership.ckpt_ifname.as_deref(), membership.index)?.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&u16::try_from(membership.r#type).context("type of a membership")?.to_ne_bytes());
    bytes.extend_from_slice(&u16::try_from(membership.addr.len())?.to_ne_bytes());
    bytes.extend_from_slice(&membership.addr);
    bytes.resize(bytes.len().max(16), 0);
    sock::set_option_bytes(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &bytes)
        .with_context(|| format!("join on interface {}", membership.index))
}
