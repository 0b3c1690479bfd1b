//! Receive rings (Documentation/networking/packet_mmap.rst): frames that the kernel has put into memory which it shares with
//! the program.
//!
//! Program and kernel each count at which frame, or block of frames (`TPACKET_V3`), they are, and the kernel's count
//! is neither told nor taken. A ring whose two sides are not at the same place is as good as broken.
//!
//! **Dump.** The ring tells. Blocks are numbered as the kernel opens them; frames bear the time at which they came, so the
//! next one comes where time goes back to the oldest. Frames that the program has not handed back are stored with all their
//! bytes. A block that the kernel still fills is stored as the kernel would have handed it over when its time is up: from
//! its last packet on there is a way to a next one (`tp_next_offset`), which the kernel cuts when it closes a block.
//!
//! **Restore.** The kernel has to count up by itself, so the ring is fed. Frames come through the loopback interface to nobody
//! but this ring: a filter asks for a number that was drawn for it. They are handed back at once; then the stored frames
//! are written where they were, and the kernel goes on behind them. Ways not chosen: an interface made for
//! this would be seen by whoever watches interfaces.
//!
//! Where times do not tell, for the clock was set back or the program has written there, the kernel's memory is looked
//! into ([`ckpt_sys::kernel`]), if that is possible.

use std::{
    hash::{BuildHasher, RandomState},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use ckpt_proto::types::PacketRing;
use ckpt_sys::{ring::RingMemory, sock};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{MsgFlags, send},
};

use super::{SOL_PACKET, TPACKET_V3};

/// `TP_STATUS_USER`: the program's turn. Else it is the kernel's.
const USER: u32 = 1;
/// `TP_STATUS_BLK_TMO`: handed over because its time was up.
const TIMED_OUT: u32 = 1 << 5;
/// Local experiments (IEEE 802); what is fed is told apart by the filter.
pub(super) const ETHERTYPE: u16 = 0x88b5;
/// How long a frame may take through the loopback interface.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Payload of frames that fill blocks; the MTU of lo is 65536.
const LARGE: usize = 60_000;

/// Where things are in a block (`struct tpacket_block_desc`).
mod block {
    pub const STATUS: usize = 8;
    pub const PACKETS: usize = 12;
    pub const FIRST: usize = 16;
    pub const LENGTH: usize = 20;
    pub const NUMBER: usize = 24;
    pub const LAST_TIME: usize = 40;
    pub const HEADER: usize = 48;
}

/// Where the seconds are in the header of a frame, before the fraction: `struct tpacket_hdr`, `tpacket2_hdr`.
const FRAME_TIME: [usize; 2] = [20, 16];

/// What is in a ring.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The frame, or block, with which the kernel goes on.
    pub(super) head: u32,
    /// Frames or blocks that are the program's, by number.
    pub(super) unread: Vec<(u32, Vec<u8>)>,
}

impl Contents {
    /// Whether they are those of a ring that nothing has happened to.
    pub(super) fn is_new(&self) -> bool {
        self.head == 0 && self.unread.is_empty()
    }
}

/// A ring's memory, in slots: frames, or blocks of version 3.
struct Ring {
    memory: RingMemory,
    version: u32,
    /// Bytes of a slot.
    size: usize,
    count: usize,
    block_size: usize,
    per_block: usize,
}

/// Bytes of a ring.
pub(super) fn bytes(ring: &PacketRing) -> u64 {
    u64::from(ring.block_size) * u64::from(ring.block_nr)
}

impl Ring {
    fn map(
        fd: BorrowedFd<'_>,
        version: u32,
        rx: &PacketRing,
        tx: Option<&PacketRing>,
    ) -> anyhow::Result<Self> {
        // They are mapped together, this one first.
        let len = usize::try_from(bytes(rx) + tx.map_or(0, bytes)).context("a ring's size")?;
        let (block_size, frame_size) = (rx.block_size as usize, rx.frame_size as usize);
        let per_block =
            if version == TPACKET_V3 { 1 } else { block_size.checked_div(frame_size).unwrap_or(0) };
        let size = if version == TPACKET_V3 { block_size } else { frame_size };
        let count = per_block.saturating_mul(rx.block_nr as usize);
        ensure!(count > 0 && size >= block::HEADER, "a ring of {count} frames of {size} bytes");
        Ok(Self { memory: RingMemory::map(fd, len)?, version, size, count, block_size, per_block })
    }

    fn is_v3(&self) -> bool {
        self.version == TPACKET_V3
    }

    fn offset(&self, slot: usize) -> usize {
        slot / self.per_block * self.block_size + slot % self.per_block * self.size
    }

    fn status_at(&self, slot: usize) -> usize {
        self.offset(slot) + if self.is_v3() { block::STATUS } else { 0 }
    }

    fn is_users(&self, slot: usize) -> anyhow::Result<bool> {
        Ok(self.memory.word(self.status_at(slot))? & USER != 0)
    }

    fn hand_back(&self, slot: usize) -> anyhow::Result<()> {
        Ok(self.memory.set_word(self.status_at(slot), 0)?)
    }

    fn bytes(&self, slot: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; self.size];
        self.memory.read(self.offset(slot), &mut bytes)?;
        Ok(bytes)
    }

    fn block_word(&self, slot: usize, field: usize) -> anyhow::Result<u32> {
        Ok(self.memory.word(self.offset(slot) + field)?)
    }

    fn time_at(&self, slot: usize) -> usize {
        self.offset(slot) + FRAME_TIME.get(self.version as usize).copied().unwrap_or(0)
    }

    fn time(&self, slot: usize) -> anyhow::Result<(u32, u32)> {
        let at = self.time_at(slot);
        Ok((self.memory.word(at)?, self.memory.word(at + 4)?))
    }
}

/// Reads the receive ring of a socket; the inner error is why it can't be.
///
/// # Errors
/// The kernel's.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    version: u32,
    rx: &PacketRing,
    tx: Option<&PacketRing>,
    told: &dyn Fn() -> Result<u32, String>,
) -> anyhow::Result<Result<Contents, String>> {
    let ring = Ring::map(fd, version, rx, tx)?;
    if ring.is_v3() { read_blocks(&ring).map(Ok) } else { read_frames(&ring, told) }
}

fn read_frames(
    ring: &Ring,
    told: &dyn Fn() -> Result<u32, String>,
) -> anyhow::Result<Result<Contents, String>> {
    let mut frames = Vec::with_capacity(ring.count);
    for slot in 0..ring.count {
        frames.push((ring.is_users(slot)?, ring.time(slot)?));
    }
    let head = match next_frame(&frames) {
        Some(head) => u32::try_from(head).context("number of a frame")?,
        None => match told() {
            Ok(head) if (head as usize) < ring.count => head,
            Ok(head) => bail!("the kernel goes on at frame {head} of {}", ring.count),
            Err(why) => {
                return Ok(Err(format!(
                    "the clock was set back while frames came into its ring, and the kernel does not tell where it goes on: {why}"
                )));
            }
        },
    };
    let mut unread = Vec::new();
    for (slot, _) in frames.iter().enumerate().filter(|(_, (users, _))| *users) {
        unread.push((u32::try_from(slot).context("number of a frame")?, ring.bytes(slot)?));
    }
    Ok(Ok(Contents { head, unread }))
}

/// Where the next frame will come: by the times of all, where they go back, once around; else by whose they are.
fn next_frame(frames: &[(bool, (u32, u32))]) -> Option<usize> {
    let before = |slot: usize| frames[(slot + frames.len() - 1) % frames.len()];
    let all =
        |wanted: &dyn Fn(usize) -> bool| (0..frames.len()).filter(|&slot| wanted(slot)).collect::<Vec<_>>();
    if frames.len() < 2 || frames.iter().all(|(_, time)| *time == (0, 0)) {
        return Some(0);
    }
    let older = all(&|slot| frames[slot].1 < before(slot).1);
    let behind = all(&|slot| !frames[slot].0 && before(slot).0);
    match (&older[..], &behind[..]) {
        (&[head], _) | (_, &[head]) => Some(head),
        _ => None,
    }
}

fn read_blocks(ring: &Ring) -> anyhow::Result<Contents> {
    let mut last = (0, 0);
    for slot in 0..ring.count {
        let number = ring.block_word(slot, block::NUMBER)?;
        let number = u64::from(number) | u64::from(ring.block_word(slot, block::NUMBER + 4)?) << 32;
        last = last.max((number, slot));
    }
    let last = last.1;
    let mut unread = Vec::new();
    let mut head = (last + 1) % ring.count;
    if !ring.is_users(last)? {
        match open_block(ring, last)? {
            Open::Empty => head = last,
            Open::Filled(bytes) => unread.push((u32::try_from(last).context("number of a block")?, bytes)),
            Open::Closed => {}
        }
    }
    for slot in 0..ring.count {
        if ring.is_users(slot)? && !unread.iter().any(|(known, _)| *known as usize == slot) {
            let mut bytes = ring.bytes(slot)?;
            let length = word(&bytes, block::LENGTH) as usize;
            bytes.truncate(length.max(block::HEADER));
            unread.push((u32::try_from(slot).context("number of a block")?, bytes));
        }
    }
    Ok(Contents { head: u32::try_from(head).context("number of a block")?, unread })
}

/// The last block that the kernel has opened, if it is the kernel's.
enum Open {
    Empty,
    /// With packets, and closed as the kernel would close it.
    Filled(Vec<u8>),
    /// The program has had it, and the next one is not open yet.
    Closed,
}

fn open_block(ring: &Ring, slot: usize) -> anyhow::Result<Open> {
    let mut header = vec![0; block::HEADER];
    ring.memory.read(ring.offset(slot), &mut header)?;
    let packets = word(&header, block::PACKETS);
    if packets == 0 {
        return Ok(Open::Empty);
    }
    // A packet is counted before it is copied; by now it has been.
    std::thread::sleep(Duration::from_millis(1));
    let mut bytes = ring.bytes(slot)?;
    bytes[..block::HEADER].copy_from_slice(&header);
    // struct tpacket3_hdr: where the next one is, seconds, nanoseconds.
    let mut at = word(&bytes, block::FIRST) as usize;
    for _ in 1..packets {
        let next = word(&bytes, at) as usize;
        ensure!(
            next >= 12 && at + next < bytes.len(),
            "a packet at {at} in a block of its ring is followed by none"
        );
        at += next;
    }
    if word(&bytes, at) == 0 {
        return Ok(Open::Closed);
    }
    let time = [word(&bytes, at + 4), word(&bytes, at + 8)];
    put(&mut bytes, at, 0);
    put(&mut bytes, block::LAST_TIME, time[0]);
    put(&mut bytes, block::LAST_TIME + 4, time[1]);
    put(&mut bytes, block::STATUS, USER | TIMED_OUT);
    let length = word(&bytes, block::LENGTH) as usize;
    bytes.truncate(length.max(at + 12));
    Ok(Open::Filled(bytes))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_ne_bytes(*word))
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Brings the kernel to where it was in a new ring of a socket that is not bound, and puts back what was not read.
/// The socket is left with a filter that lets nothing through.
///
/// # Errors
/// The loopback interface is down, or something is in the way; contents that do not fit the ring.
pub(super) fn refill(
    fd: BorrowedFd<'_>,
    version: u32,
    rx: &PacketRing,
    tx: Option<&PacketRing>,
    contents: &Contents,
) -> anyhow::Result<()> {
    const PACKET_STATISTICS: i32 = 6;
    let ring = Ring::map(fd, version, rx, tx)?;
    let head = contents.head as usize;
    ensure!(head < ring.count, "frame {head} of a ring of {}", ring.count);
    let feeder = Feeder::new(fd)?;
    if ring.is_v3() {
        feed_blocks(&ring, &feeder, head)?;
    } else {
        for slot in 0..head {
            feeder.send(64)?;
            feeder.wait(PATIENCE, || ring.is_users(slot))?;
            ring.hand_back(slot)?;
        }
    }
    feeder.end(fd)?;
    for slot in
        (0..ring.count).filter(|slot| !contents.unread.iter().any(|(known, _)| *known as usize == *slot))
    {
        ring.hand_back(slot)?;
    }
    for (slot, bytes) in &contents.unread {
        let slot = *slot as usize;
        ensure!(
            slot < ring.count && bytes.len() <= ring.size,
            "{} bytes in frame {slot} of its ring",
            bytes.len()
        );
        let mut bytes = bytes.clone();
        if ring.is_v3() {
            // Its number is that of the new ring, so that the next checkpoint knows the last.
            for at in [block::NUMBER, block::NUMBER + 4] {
                put(&mut bytes, at, ring.block_word(slot, at)?);
            }
        }
        // The kernel looks at the status, which comes last; a block is not the kernel's meanwhile.
        let status = ring.status_at(0);
        let (head, tail) = bytes.split_at(bytes.len().min(status));
        ring.memory.write(ring.offset(slot), head)?;
        ring.memory.write(ring.status_at(slot) + 4, tail.get(4..).unwrap_or_default())?;
        ring.memory.set_word(ring.status_at(slot), word(&bytes, status))?;
    }
    if !ring.is_v3() {
        settle_times(&ring, head)?;
    }
    // Reading sets it back to 0.
    sock::option_bytes(fd, SOL_PACKET, PACKET_STATISTICS, 12)?;
    Ok(())
}

/// Closes as many blocks as come before `head`, and then all, so that numbers are those of a ring that has been around.
/// What closes the last does not fit anywhere, since no block has been handed back, and is lost; `head` will be
/// opened when it is handed back, and is empty then.
fn feed_blocks(ring: &Ring, feeder: &Feeder, head: usize) -> anyhow::Result<()> {
    for nth in 0..head + ring.count {
        let slot = nth % ring.count;
        let packets = || ring.block_word(slot, block::PACKETS);
        while !ring.is_users(slot)? {
            let before = packets()?;
            feeder.send(LARGE)?;
            feeder.wait(PATIENCE, || Ok(ring.is_users(slot)? || packets()? != before))?;
        }
        if nth < head {
            ring.hand_back(slot)?;
        }
    }
    Ok(())
}

/// Leaves times by which the next checkpoint finds `head`: none before the oldest unread frame.
fn settle_times(ring: &Ring, head: usize) -> anyhow::Result<()> {
    let mut last = (0, 0);
    for slot in (0..ring.count).map(|n| (head + n) % ring.count) {
        if ring.is_users(slot)? {
            last = ring.time(slot)?;
            continue;
        }
        if (slot + 1) % ring.count == head {
            last = last.max((1, 0));
        }
        ring.memory.set_word(ring.time_at(slot), last.0)?;
        ring.memory.set_word(ring.time_at(slot) + 4, last.1)?;
    }
    Ok(())
}

/// Sends frames through the loopback interface that reach only one ring.
struct Feeder {
    sender: OwnedFd,
    lo: u32,
    token: [u8; 8],
}

impl Feeder {
    /// Lets the socket with the ring hear this feeder, and nobody else.
    fn new(fd: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let lo = if_nametoindex("lo").context("interface lo")?;
        let token = RandomState::new().hash_one(std::process::id()).to_ne_bytes();
        let half =
            |at: usize| token.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_be_bytes(*b));
        // Loads are from the network header on, as both types of sockets have it.
        const SKF_NET_OFF: i32 = -0x10_0000;
        let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
            [&code.to_ne_bytes()[..], &[jt, jf], &k.to_ne_bytes()].concat()
        };
        let program = [
            instruction(0x20, 0, 0, SKF_NET_OFF.cast_unsigned()),
            instruction(0x15, 0, 3, half(0)),
            instruction(0x20, 0, 0, (SKF_NET_OFF + 4).cast_unsigned()),
            instruction(0x15, 0, 1, half(4)),
            instruction(0x06, 0, 0, u32::MAX),
            instruction(0x06, 0, 0, 0),
        ];
        sock::attach_filter(fd, &program.concat())?;
        sock::bind_to(fd, &super::address(ETHERTYPE.to_be(), lo)?)?;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let sender = sock::socket(libc::AF_PACKET, kind, 0)?;
        sock::bind_to(sender.as_fd(), &super::address(0, lo)?)?;
        Ok(Self { sender, lo, token })
    }

    fn send(&self, payload: usize) -> anyhow::Result<()> {
        let mut frame = vec![0; 12];
        frame.extend_from_slice(&ETHERTYPE.to_be_bytes());
        frame.extend_from_slice(&self.token);
        frame.resize(14 + payload, 0);
        send(self.sender.as_raw_fd(), &frame, MsgFlags::empty())
            .context("send through lo, by which its ring is filled (is it up?)")?;
        Ok(())
    }

    fn wait(&self, patience: Duration, come: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let start = Instant::now();
        while !come()? {
            if start.elapsed() > patience {
                bail!("a frame sent through lo did not come to its ring");
            }
            if start.elapsed() > Duration::from_micros(50) {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    /// Ends it: the socket hears nothing from now on.
    fn end(self, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
        Ok(sock::bind_to(fd, &super::address(0, self.lo)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::next_frame;

    #[test]
    fn the_next_frame_comes_where_time_goes_back() {
        let of = |frames: &[(u32, u32)]| {
            let frames: Vec<_> = frames.iter().map(|&(users, time)| (users != 0, (time, 0))).collect();
            next_frame(&frames)
        };
        // Whose it is, and when it came.
        assert_eq!(of(&[(0, 0), (0, 0)]), Some(0));
        assert_eq!(of(&[(0, 5), (0, 6), (0, 0), (0, 0)]), Some(2));
        assert_eq!(of(&[(0, 9), (1, 9), (0, 6), (0, 7)]), Some(2));
        assert_eq!(of(&[(0, 5), (0, 6), (0, 7), (0, 8)]), Some(0));
        // Full.
        assert_eq!(of(&[(1, 7), (1, 8), (1, 5), (1, 6)]), Some(2));
        // Handed back in another order.
        assert_eq!(of(&[(0, 7), (0, 8), (1, 5), (0, 6)]), Some(2));
        // The clock was set back, but it is seen whose they are.
        assert_eq!(of(&[(0, 7), (1, 3), (1, 4), (0, 2)]), Some(3));
        assert_eq!(of(&[(0, 7), (0, 3), (0, 4), (0, 2)]), None);
        assert_eq!(of(&[(0, 7), (0, 7)]), None);
    }
}
