//! A stretch of addresses that is free in this process and in every task to come.
//!
//! ```text
//! runner (`ckpt_remote::build::Area`) | where the vdso waits | the vdso as recorded, from a stream
//! ```

use std::{ops::Range, os::unix::ffi::OsStrExt};

use anyhow::Context;
use ckpt_kinds::mem::restore::{AddressSpace, USER_END, vdso};
use ckpt_remote::{Arg, Call, build::Area};
use ckpt_sys::RemoteAddr;
use nix::libc;

use crate::shared::Segment;

/// Room for a vdso, twice what any kernel has.
const VDSO_ROOM: u64 = 256 << 10;
const LEN: u64 = Area::LEN + 2 * VDSO_ROOM;
/// Nothing is placed below: small addresses are kept free to catch null pointers.
const LOWEST: u64 = 1 << 20;

/// The stretch and what else all tasks share while they are built.
#[derive(Debug)]
pub struct Region {
    base: u64,
    /// This process's vdso.
    pub vdso: Option<vdso::Ours>,
    /// Shared memory whose pages are in the images.
    pub shared: Vec<Segment>,
}

impl Region {
    /// Finds a place.
    ///
    /// # Errors
    /// There is none.
    pub fn find<'a>(
        spaces: impl Iterator<Item = &'a AddressSpace>,
        vdso: Option<vdso::Ours>,
        shared: Vec<Segment>,
    ) -> anyhow::Result<Self> {
        let mut taken = own_maps()?;
        taken.extend(spaces.flat_map(AddressSpace::taken));
        taken.sort_by_key(|range| range.start);
        let mut at = LOWEST;
        for range in taken.into_iter().chain(std::iter::once(USER_END..USER_END)) {
            // A megabyte on each side keeps clear of the guard gaps below stacks.
            if range.start >= at + LEN + (2 << 20) {
                return Ok(Self { base: at + (1 << 20), vdso, shared });
            }
            at = at.max(range.end);
        }
        anyhow::bail!("no {LEN} bytes of addresses are free in all tasks")
    }

    /// Where the runner goes.
    pub fn base(&self) -> RemoteAddr {
        RemoteAddr(self.base)
    }

    /// All of it.
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + LEN
    }

    /// Where the vdso waits.
    pub fn stage(&self) -> RemoteAddr {
        RemoteAddr(self.base + Area::LEN)
    }

    /// Where the recorded vdso is put to be looked at.
    pub fn shadow(&self) -> RemoteAddr {
        self.stage().plus(VDSO_ROOM)
    }

    /// Maps memory for the recorded vdso.
    pub fn shadow_call(&self, block: &vdso::Block) -> Call {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let len = Arg::Val((block.end - block.code).min(VDSO_ROOM));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let args = [Arg::Val(self.shadow().0), len, prot.into(), flags.into(), (-1).into(), Arg::Val(0)];
        Call::new("mmap(shadow of the vdso)", libc::SYS_mmap, args)
    }
}

fn own_maps() -> anyhow::Result<Vec<Range<u64>>> {
    let text = std::fs::read_to_string("/proc/self/maps").context("/proc/self/maps")?;
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        // The stack and the heap may grow a little until the tasks are made.
        let more = if line.ends_with("[heap]") || line.ends_with("[stack]") { 64 << 20 } else { 0 };
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        Some(start.saturating_sub(more)..end.saturating_add(more))
    };
    text.lines().map(|line| range(line).with_context(|| format!("/proc/self/maps: {line}"))).collect()
}

/// Where a symbolic link in /proc leads, as bytes.
///
/// # Errors
/// The kernel's.
pub fn link(path: &str) -> anyhow::Result<Vec<u8>> {
    let target = std::fs::read_link(path).with_context(|| path.to_owned())?;
    Ok(target.as_os_str().as_bytes().to_vec())
}
