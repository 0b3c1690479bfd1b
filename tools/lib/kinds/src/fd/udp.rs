//! UDP and UDP-Lite sockets (udp(7), udplite(7)).
//!
//! **Dump.** Received datagrams are read by MSG_PEEK with `SO_PEEK_OFF`, as those of unix sockets are
//! (see [`super::unix`]), senders included. What waits corked (`UDP_CORK`, `MSG_MORE`) can't be read by anybody: it
//! shows as memory that the socket has sent and that is not gone, and is refused.
//!
//! **Restore.** The kernel has no call that puts a datagram into a receive queue. So each is sent
//! again, from where it came: a raw socket sends the whole packet, whose sender may be anybody, to the
//! local address. Such a packet goes through the loopback interface, which does not ask where the sender
//! lives since the packet comes with its route (`skb_valid_dst` in `ip_rcv_finish_core`, net/ipv4/ip_input.c).
//! For that moment the socket is connected to the sender: of all sockets that share the port, the
//! kernel prefers the one that is connected to it (`compute_score`, net/ipv4/udp.c). Ways not chosen: binding a
//! second socket to the sender's address works only for senders that live here and have gone; a tun device
//! would need an interface that no one knows of.
//!
//! What a datagram loses by this: the time at which it came (`SO_TIMESTAMP`), and that it came in by another
//! interface than lo. A program that looks at the latter (`IP_PKTINFO`) would see the difference, so it is refused
//! there; so are datagrams that the socket may have got by multicast or broadcast, which must not be
//! sent again. A datagram of no bytes that is not the first shows in one peek of its life only: a second checkpoint
//! of the same queue does not see it.

use std::{
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{DatagramHeaders, FdTypes, FileEntry, InetSkEntry, SkPacketEntry},
};
use ckpt_sys::{
    Refused,
    sock::{self, LentOption},
};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendto},
};

use super::{
    Descriptor, Opening, inet, multicast,
    socket::{self, Completion},
    sockopt::{self, Class, Options, When},
};
use crate::Sink;

/// Longest payload that IPv4 can carry; also what fits through the loopback interface.
const LONGEST: usize = 65_535;
/// How long a datagram may take through the loopback interface, or a sent one to be gone.
const PATIENCE: Duration = Duration::from_millis(1500);
const SO_MEMINFO: i32 = 55;

pub(super) fn recognise(d: &Descriptor) -> bool {
    (d.is_socket(libc::AF_INET, libc::SOCK_DGRAM) || d.is_socket(libc::AF_INET6, libc::SOCK_DGRAM))
        && sock::option(d.copy.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|protocol| matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE))
}

fn what(protocol: u32, ino: u64) -> String {
    let lite = protocol == libc::IPPROTO_UDPLITE.unsigned_abs();
    format!("{} socket {ino}", if lite { "UDP-Lite" } else { "UDP" })
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
    let mut table = inet::table(libc::IPPROTO_UDP)?.0;
    if sockets.iter().any(|s| s.stub.protocol == libc::IPPROTO_UDPLITE.unsigned_abs()) {
        table.extend(inet::table(libc::IPPROTO_UDPLITE)?.0);
    }
    let groups = multicast::groups()?;
    for socket in &sockets {
        let what = what(socket.stub.protocol, socket.stub.ino);
        let diag = table.get(&socket.stub.ino);
        let isk = inet::datagram_entry(socket, diag, &what, &groups, completion)?;
        check_corked(socket, &what)?;
        let queue = queue(socket, &what, &isk, completion)?;
        socket.emit(FdTypes::Inetsk, FileEntry { isk: Some(isk), ..FileEntry::default() }, sink)?;
        for (headers, bytes) in queue {
            let packet = SkPacketEntry { ckpt_headers: Some(headers), ..SkPacketEntry::default() };
            socket.emit_queued(packet, &bytes, sink)?;
        }
    }
    Ok(())
}

/// Data that is corked counts as sent and not gone, as does what waits for a network card: for that
/// there is some patience.
fn check_corked(socket: &socket::Socket<'_>, what: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let memory = sock::unread_memory(socket.copy()?.as_fd())?;
        if memory == 0 {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            let reason = format!("unsent data waits in it (UDP_CORK or MSG_MORE; {memory} bytes of memory)");
            return Err(socket.refuse(what, reason).advise("checkpoint when it has been sent").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A datagram: what its packet said, and its payload.
type Datagram = (DatagramHeaders, Vec<u8>);

/// Everything that a socket has received and not read, as far as it can be given back.
fn queue(
    socket: &socket::Socket<'_>,
    what: &str,
    isk: &InetSkEntry,
    completion: Completion<'_>,
) -> anyhow::Result<Vec<Datagram>> {
    let happened = sock::poll_now(socket.copy()?.as_fd(), libc::POLLIN)?;
    // Any receive call would take a waiting error from the target.
    if happened & libc::POLLERR != 0 {
        socket.leave_out(what, "an error waits to be read, and what was received with it", completion)?;
        return Ok(Vec::new());
    }
    if memory(socket.copy()?.as_fd())? == 0 && happened & libc::POLLIN == 0 {
        return Ok(Vec::new());
    }
    match peek_all(socket, isk)? {
        Ok(datagrams) => Ok(datagrams),
        Err(why) => {
            socket.leave_out(what, &format!("a datagram is received and not read, {why}"), completion)?;
            Ok(Vec::new())
        }
    }
}

/// Memory taken by the receive queue.
fn memory(fd: BorrowedFd<'_>) -> anyhow::Result<u32> {
    let info = sock::option_bytes(fd, libc::SOL_SOCKET, SO_MEMINFO, 64)?;
    info.first_chunk().map(|b| u32::from_ne_bytes(*b)).context("SO_MEMINFO is too short")
}

/// All datagrams, or why one of them can't be given back.
fn peek_all(socket: &socket::Socket<'_>, isk: &InetSkEntry) -> anyhow::Result<Result<Vec<Datagram>, String>> {
    let local = inet::source(isk)?.ip();
    if let Some(why) = unreachable(local) {
        return Ok(Err(format!("at {local}: {why}")));
    }
    let copy = socket.copy()?;
    let fd = copy.as_fd();
    let lo = if_nametoindex("lo").unwrap_or(0);
    let mut all = Vec::new();
    let mut buffer = vec![0; 1 << 18];
    let _lent = LentOption::set(fd, libc::SO_PEEK_OFF, 0)?;
    loop {
        let mut control = vec![0; 1 << 12];
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let peeked = match recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Err(Errno::EAGAIN) => return Ok(Ok(all)),
            peeked => peeked.with_context(|| format!("{}: recvmsg(MSG_PEEK)", socket.subject))?,
        };
        let Some(from) = peeked.address.as_ref().and_then(inet::socket_address) else {
            return Ok(Err("whose sender the kernel does not tell".to_owned()));
        };
        if let Some(why) = unreachable(from.ip()) {
            return Ok(Err(format!("from {from}: {why}")));
        }
        let mut headers = DatagramHeaders {
            from: inet::octets(from.ip()),
            from_port: from.port().into(),
            ..DatagramHeaders::default()
        };
        for message in peeked.cmsgs().context("control messages")? {
            let (to, interface): (IpAddr, Option<u32>) = match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    let to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    (to.into(), u32::try_from(info.ipi_ifindex).ok())
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    (Ipv6Addr::from(info.ipi6_addr.s6_addr).into(), Some(info.ipi6_ifindex))
                }
                ControlMessageOwned::Ipv4OrigDstAddr(to) => {
                    (Ipv4Addr::from(to.sin_addr.s_addr.to_ne_bytes()).into(), None)
                }
                ControlMessageOwned::Ipv6OrigDstAddr(to) => {
                    (Ipv6Addr::from(to.sin6_addr.s6_addr).into(), None)
                }
                ControlMessageOwned::Ipv4Ttl(ttl) => {
                    headers.ttl = u32::try_from(ttl).ok();
                    continue;
                }
                ControlMessageOwned::Ipv6HopLimit(hops) => {
                    headers.ttl = u32::try_from(hops).ok();
                    continue;
                }
                ControlMessageOwned::Ipv4Tos(tos) => {
                    headers.tos = Some(tos.into());
                    continue;
                }
                ControlMessageOwned::Ipv6TClass(class) => {
                    headers.tos = u32::try_from(class).ok();
                    continue;
                }
                ControlMessageOwned::UdpGroSegments(_) => {
                    return Ok(Err("joined from several by UDP_GRO".to_owned()));
                }
                _ => continue,
            };
            if let Some(why) = unreachable(to) {
                return Ok(Err(format!("sent to {to}: {why}")));
            }
            if interface.is_some_and(|i| i != lo) {
                let why = "which came in by another interface than lo, as the program can see (IP_PKTINFO)";
                return Ok(Err(why.to_owned()));
            }
            headers.to = Some(inet::octets(to));
        }
        let len = peeked.bytes;
        if len > LONGEST {
            return Ok(Err(format!("of {len} bytes")));
        }
        all.push((headers, buffer.get(..len).unwrap_or_default().to_vec()));
    }
}

/// Why a packet with this address can't be sent within the machine.
fn unreachable(ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    if ip.is_multicast() || broadcast {
        return Some("multicast and broadcast are not sent again");
    }
    matches!(ip, IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80)
        .then_some("a link-local address can't be imitated")
}

/// ckpt-restore's part.
pub(super) fn restore(opening: &mut Opening<'_>, entries: &[&InetSkEntry]) -> anyhow::Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut queues = socket::queues(opening.set)?;
    let mut injector = Injector::default();
    for isk in entries {
        let what = what(isk.proto, isk.ino.into());
        let fd = inet::new_socket(isk, &what)?;
        let local = inet::source(isk)?;
        if local.port() != 0 {
            inet::bind(fd.as_fd(), &what, local)?;
        }
        let mut queue = Vec::new();
        for (index, packet) in queues.remove(&isk.id).unwrap_or_default() {
            let bytes = opening.set.payload_bytes(Image::SkQueues, 0, index, LONGEST as u64)?;
            let headers = packet.ckpt_headers.context("a datagram without its sender")?;
            queue.push((headers, bytes));
        }
        if !queue.is_empty() {
            injector.refill(fd.as_fd(), isk, &what, &queue)?;
        }
        inet::keep_datagram(opening, fd, isk, &what)?;
    }
    Ok(())
}

/// Raw sockets that send packets from anybody.
#[derive(Default)]
struct Injector {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Injector {
    /// Puts datagrams into the receive queue of a bound socket.
    fn refill(
        &mut self,
        fd: BorrowedFd<'_>,
        isk: &InetSkEntry,
        what: &str,
        queue: &[Datagram],
    ) -> anyhow::Result<()> {
        let local = inet::source(isk)?;
        let total = queue.iter().map(|(_, bytes)| bytes.len().saturating_mul(2).saturating_add(4096)).sum();
        sock::make_receive_room(fd, total);
        // What comes through the loopback interface would not come to a socket that listens on another one.
        if isk.opts.so_bound_dev.is_some() {
            sock::set_option_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"\0")
                .with_context(|| format!("{what}: SO_BINDTODEVICE"))?;
        }
        for (headers, bytes) in queue {
            let from = SocketAddr::new(
                inet::address_of(&headers.from)?,
                u16::try_from(headers.from_port).context("a sender's port")?,
            );
            let lost = || format!("{what}: give back {} bytes from {from}", bytes.len());
            self.give(fd, isk, from, local, headers, bytes, what).with_context(lost)?;
        }
        sock::disconnect(fd)?;
        // Disconnecting has undone the binding to a device, too.
        let options = Options::of_inet(isk);
        sockopt::restore(fd, what, Class::of_inet(isk), &options, When::BeforeBind)
    }

    #[allow(clippy::too_many_arguments)]
    fn give(
        &mut self,
        fd: BorrowedFd<'_>,
        isk: &InetSkEntry,
        from: SocketAddr,
        local: SocketAddr,
        headers: &DatagramHeaders,
        bytes: &[u8],
        what: &str,
    ) -> anyhow::Result<()> {
        let v4 = from.ip().to_canonical().is_ipv4();
        let to = match &headers.to {
            Some(to) => inet::address_of(to)?,
            None if !local.ip().to_canonical().is_unspecified() => local.ip(),
            None if v4 => Ipv4Addr::LOCALHOST.into(),
            None => Ipv6Addr::LOCALHOST.into(),
        };
        if let Some(why) = unreachable(to).or(unreachable(from.ip())) {
            bail!("from {from} to {to}: {why}");
        }
        // Where the socket could not send to, it can't be connected to. One that is bound to all addresses gets
        // a single one by being connected, perhaps not the one that is needed. Then its name alone has to do.
        if inet::connect(fd, from).is_err() || inet::local(fd)?.is_none_or(|now| now.ip() != to) {
            sock::disconnect(fd)?;
        }
        let (source, to) = (from.ip().to_canonical(), to.to_canonical());
        let protocol = u8::try_from(isk.proto).context("a socket's protocol")?;
        let ports = (from.port(), local.port());
        let packet = packet(source, to, protocol, ports, headers, bytes)?;
        let raw = self.raw(v4, what)?;
        let before = memory(fd)?;
        let destination = inet::sockaddr(SocketAddr::new(to, 0));
        sendto(raw.as_raw_fd(), &packet, &*destination, MsgFlags::empty()).context("send it once more")?;
        let start = Instant::now();
        while memory(fd)? <= before {
            if start.elapsed() > PATIENCE {
                bail!("it did not come through the loopback interface: is there a firewall rule in its way?");
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    fn raw(&mut self, v4: bool, what: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let (place, family) = if v4 { (&mut self.v4, libc::AF_INET) } else { (&mut self.v6, libc::AF_INET6) };
        if place.is_none() {
            *place = match sock::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) {
                Err(e) if e.errno == Errno::EPERM => {
                    let reason = "putting back what it has received needs CAP_NET_RAW";
                    let advice = "restore without it: ... | sk-rewrite --drop-queues ID | ckpt-restore";
                    return Err(Refused::new(what, reason).advise(advice).into());
                }
                fd => Some(fd?),
            };
        }
        Ok(place.as_ref().context("made above")?.as_fd())
    }
}

/// A whole IP packet. A raw socket of protocol `IPPROTO_RAW` takes it as it is, but for the checksum of
/// an IPv4 header, which the kernel fills in.
fn packet(
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    (source, destination): (u16, u16),
    headers: &DatagramHeaders,
    payload: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let length = u16::try_from(8 + payload.len()).context("a datagram that is too long")?;
    let ttl = u8::try_from(headers.ttl.unwrap_or(64)).context("a TTL")?;
    let tos = u8::try_from(headers.tos.unwrap_or(0)).context("a type of service")?;
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = length.checked_add(20).context("a datagram that is too long")?;
            packet.extend_from_slice(&[0x45, tos]);
            packet.extend_from_slice(&total.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, ttl, protocol, 0, 0]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend_from_slice(&[0x60 | tos >> 4, tos << 4, 0, 0]);
            packet.extend_from_slice(&length.to_be_bytes());
            packet.extend_from_slice(&[protocol, ttl]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
        }
        _ => bail!("from {from} to {to}: addresses of two families"),
    }
    let mut datagram = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    // UDP-Lite has here how many bytes the checksum is about; 0 is all of them.
    let lite = i32::from(protocol) == libc::IPPROTO_UDPLITE;
    datagram.extend_from_slice(&if lite { [0; 2] } else { length.to_be_bytes() });
    datagram.extend_from_slice(&[0; 2]);
    datagram.extend_from_slice(payload);
    let mut pseudo = [inet::octets(from), inet::octets(to)].concat();
    pseudo.extend_from_slice(&[0, protocol]);
    pseudo.extend_from_slice(&length.to_be_bytes());
    // 0 would stand for none.
    let sum = match inet::checksum(&[&pseudo, &datagram]) {
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(&datagram);
    Ok(packet)
}
