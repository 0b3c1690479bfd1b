//! Transmit rings (`PACKET_TX_RING`, Documentation/networking/packet_mmap.rst): the program writes frames into shared memory, marks
//! them, and one send(2) has the kernel send all that are marked, from the frame at which it is.
//!
//! Nothing in the ring tells that frame, but the kernel's memory does ([`ckpt_sys::kernel`]). A ring that was
//! never written to needs no question.
//!
//! **Dump.** All blocks that are not zero, with what the program has prepared and not yet had sent. A frame that the
//! interface has not let go of (`TP_STATUS_SENDING`) is waited for; it would be sent twice otherwise.
//!
//! **Restore.** The kernel counts up by sending: frames of type 0x88b5 through the loopback interface, before the socket is
//! bound, as many as bring it where it was. With `PACKET_LOSS` it would skip frames that are no frames without
//! sending anything, but that can't be taken from a ring again. Then the blocks are written.

use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ckpt_proto::types::{PacketRing, PacketSockEntry};
use ckpt_sys::{ring::RingMemory, sock};
use nix::net::if_::if_nametoindex;

use super::{
    TPACKET_V3,
    ring::{Contents, ETHERTYPE, PATIENCE, bytes},
};

/// `TP_STATUS_SEND_REQUEST`.
const REQUESTED: u32 = 1;
/// `TP_STATUS_SENDING`.
const SENDING: u32 = 2;
/// A frame that every interface takes.
const SHORT: usize = 60;
const HEADER: usize = 14;
/// `struct virtio_net_hdr`, in front of a frame if the socket has `PACKET_VNET_HDR`.
const VNET: usize = 10;

struct Ring {
    memory: RingMemory,
    /// Behind the receive ring.
    start: usize,
    blocks: usize,
    block_size: usize,
    frame_size: usize,
    per_block: usize,
    version: u32,
}

impl Ring {
    fn map(
        fd: BorrowedFd<'_>,
        version: u32,
        rx: Option<&PacketRing>,
        tx: &PacketRing,
    ) -> anyhow::Result<Self> {
        let start = rx.map_or(0, bytes);
        let len = usize::try_from(start + bytes(tx)).context("a ring's size")?;
        let (block_size, frame_size) = (tx.block_size as usize, tx.frame_size as usize);
        let per_block = block_size.checked_div(frame_size).unwrap_or(0);
        ensure!(per_block > 0, "frames of {frame_size} bytes in blocks of {block_size}");
        let memory = RingMemory::map(fd, len)?;
        let (start, blocks) = (usize::try_from(start)?, tx.block_nr as usize);
        Ok(Self { memory, start, blocks, block_size, frame_size, per_block, version })
    }

    fn count(&self) -> usize {
        self.blocks * self.per_block
    }

    fn frame(&self, slot: usize) -> usize {
        self.start + slot / self.per_block * self.block_size + slot % self.per_block * self.frame_size
    }

    /// In a frame: its status, its length, its bytes (`struct tpacket_hdr`, `tpacket2_hdr`, `tpacket3_hdr`).
    fn places(&self) -> (usize, usize, usize) {
        match self.version {
            0 => (0, 8, 32),
            TPACKET_V3 => (20, 16, 48),
            _ => (0, 4, 32),
        }
    }

    fn status(&self, slot: usize) -> anyhow::Result<u32> {
        Ok(self.memory.word(self.frame(slot) + self.places().0)?)
    }

    /// Waits until no frame has `status`; whether that came to be.
    fn wait(&self, status: u32) -> anyhow::Result<bool> {
        let end = Instant::now() + PATIENCE;
        for slot in 0..self.count() {
            while self.status(slot)? & status != 0 {
                if Instant::now() > end {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(true)
    }
}

/// Reads a transmit ring; `told` is the frame at which the kernel is. The inner error is why it can't be, and what to do.
///
/// # Errors
/// The kernel's.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    version: u32,
    rx: Option<&PacketRing>,
    tx: &PacketRing,
    told: &dyn Fn() -> Result<u32, String>,
) -> anyhow::Result<Result<Contents, (String, &'static str)>> {
    let ring = Ring::map(fd, version, rx, tx)?;
    if !ring.wait(SENDING)? {
        let why = "its interface has not taken all frames of its transmit ring yet (TP_STATUS_SENDING)";
        return Ok(Err((why.to_owned(), "checkpoint when they are sent")));
    }
    let mut contents = Contents::default();
    for number in 0..ring.blocks {
        let mut block = vec![0; ring.block_size];
        ring.memory.read(ring.start + number * ring.block_size, &mut block)?;
        if block.iter().any(|&b| b != 0) {
            contents.unread.push((u32::try_from(number).context("number of a block")?, block));
        }
    }
    if contents.unread.is_empty() {
        return Ok(Ok(contents));
    }
    match told() {
        Ok(head) => contents.head = head,
        Err(why) => {
            let why = format!("no call tells at which frame of its transmit ring the kernel is: {why}");
            return Ok(Err((why, "run ckpt-sk as root, or checkpoint before the ring is used")));
        }
    }
    ensure!((contents.head as usize) < ring.count(), "frame {} of {}", contents.head, ring.count());
    Ok(Ok(contents))
}

/// Brings the kernel to where it was in the ring of a new socket, and puts back what was in it.
///
/// # Errors
/// The loopback interface is down; contents that do not fit the ring.
pub(super) fn refill(
    fd: BorrowedFd<'_>,
    psk: &PacketSockEntry,
    tx: &PacketRing,
    contents: &Contents,
) -> anyhow::Result<()> {
    let ring = Ring::map(fd, psk.version, psk.rx_ring.as_ref(), tx)?;
    let head = contents.head as usize;
    ensure!(head < ring.count(), "frame {head} of a ring of {}", ring.count());
    if head > 0 {
        let (status, length, data) = ring.places();
        let mut frame = vec![0; if psk.vnet_hdr { VNET } else { 0 }];
        let bare = frame.len();
        frame.extend([0; HEADER]);
        frame[bare + 12..].copy_from_slice(&ETHERTYPE.to_be_bytes());
        frame.resize(bare + SHORT.min(ring.frame_size.saturating_sub(data + bare)).max(HEADER), 0);
        ensure!(data + frame.len() <= ring.frame_size, "frames of {} bytes", ring.frame_size);
        for slot in 0..head {
            ring.memory.write(ring.frame(slot) + data, &frame)?;
            ring.memory.set_word(ring.frame(slot) + length, u32::try_from(frame.len())?)?;
            ring.memory.set_word(ring.frame(slot) + status, REQUESTED)?;
        }
        let lo = if_nametoindex("lo").context("interface lo")?;
        let address = super::address(ETHERTYPE.to_be(), lo)?;
        let end = Instant::now() + PATIENCE;
        loop {
            sock::send_to(fd, &[], &address).context("send its frames through lo (is it up?)")?;
            if (0..head).all(|slot| ring.status(slot).is_ok_and(|status| status & (REQUESTED | SENDING) == 0))
            {
                break;
            }
            ensure!(Instant::now() < end, "frames do not go through lo");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    let empty = vec![0; ring.block_size];
    for number in 0..ring.blocks {
        let known = contents.unread.iter().find(|(known, _)| *known as usize == number);
        let bytes = known.map_or(&empty, |(_, bytes)| bytes);
        ensure!(bytes.len() <= ring.block_size, "{} bytes in block {number}", bytes.len());
        ring.memory.write(ring.start + number * ring.block_size, bytes)?;
    }
    ensure!(
        contents.unread.iter().all(|(number, _)| (*number as usize) < ring.blocks),
        "more blocks than {}",
        ring.blocks
    );
    Ok(())
}
