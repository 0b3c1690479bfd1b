//! Guard regions: `madvise(MADV_GUARD_INSTALL)` (madvise(2), Linux 6.13) makes pages of a mapping
//! fault for ever, without a mapping of their own. New C libraries guard thread stacks that way.
//!
//! The kernel keeps a marker per page and no range, so they are looked for page by page: `PAGEMAP_SCAN`
//! tells them from Linux 6.16 on (`PAGE_IS_GUARD`). One walk over all of an address space costs about
//! a millisecond per GiB of small pages. Where VmFlags has `gu` (Linux 6.19; 6.18 with patches), which says that a mapping
//! may have some, the walk is left out if no mapping has ([`super::flags::Flags::may_have_guards`]).
//!
//! They are stored as ranges in the address space's own image, not as pages: a guard is there whether memory
//! is read within the freeze, from a snapshot, or not at all, and a chain of increments needs only the last.
//! A restore puts them in when all pages are there, and before memory is locked, which they refuse.

use std::{fs::File, os::fd::AsFd};

use anyhow::{Context, ensure};
use ckpt_proto::types::{GuardRegion, MmEntry, VmaEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, RemoteAddr, memory};

use super::status;

pub(super) const MADV_GUARD_INSTALL: i32 = 102;
const PAGE: u64 = 4096;

/// Finds the guard regions of a frozen process by its mappings.
///
/// # Errors
/// PAGEMAP_SCAN is not permitted.
pub fn find(pid: Pid, vmas: &[VmaEntry]) -> anyhow::Result<Vec<GuardRegion>> {
    let mut ordinary = vmas.iter().filter(|vma| can_have(vma));
    let Some(first) = ordinary.next() else { return Ok(Vec::new()) };
    let end = ordinary.next_back().map_or(first.end, |vma| vma.end);
    let path = format!("/proc/{pid}/pagemap");
    let pagemap = File::open(&path).with_context(|| path.clone())?;
    let found = memory::guards(pagemap.as_fd(), RemoteAddr(first.start), RemoteAddr(end)).context(path)?;
    Ok(found.into_iter().map(|range| GuardRegion { start: range.start, end: range.end }).collect())
}

/// Mappings of the kernel's own have none.
fn can_have(vma: &VmaEntry) -> bool {
    vma.status & (status::VSYSCALL | status::VDSO | status::VVAR) == 0
}

/// Checks that the guards of an image are in order and within its mappings.
///
/// # Errors
/// They are not.
pub fn check(mm: &MmEntry) -> anyhow::Result<()> {
    let mut from = 0;
    for GuardRegion { start, end } in mm.ckpt_guards.iter().copied() {
        let whole = start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
        ensure!(whole && from <= start && start < end, "guard region {start:#x}-{end:#x}: no such addresses");
        from = end;
        let mut at = start;
        let first = mm.vmas.partition_point(|vma| vma.end <= start);
        for vma in mm.vmas.get(first..).unwrap_or_default() {
            if at >= end || vma.start > at || !can_have(vma) {
                break;
            }
            at = vma.end;
        }
        ensure!(at >= end, "guard region {start:#x}-{end:#x}: no area at {at:#x}");
    }
    Ok(())
}

/// Puts them in.
#[must_use]
pub fn calls(mm: &MmEntry) -> Vec<Call> {
    let install = |guard: &GuardRegion| {
        let GuardRegion { start, end } = *guard;
        let args = [Arg::Val(start), Arg::Val(end - start), MADV_GUARD_INSTALL.into()];
        let name = format!("madvise({start:#x}-{end:#x}, MADV_GUARD_INSTALL), of Linux 6.13,");
        Call::new(name, libc::SYS_madvise, args)
    };
    mm.ckpt_guards.iter().map(install).collect()
}

/// Whether there are any in `vma`.
#[must_use]
pub fn any_in(mm: &MmEntry, vma: &VmaEntry) -> bool {
    let first = mm.ckpt_guards.partition_point(|guard| guard.end <= vma.start);
    mm.ckpt_guards.get(first).is_some_and(|guard| guard.start < vma.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_have_to_be_within_areas() {
        let vma = |start, end, status| VmaEntry { start, end, status, ..VmaEntry::default() };
        let with = |guards: &[(u64, u64)]| MmEntry {
            vmas: vec![vma(0x1000, 0x3000, 1), vma(0x3000, 0x5000, 1), vma(0x6000, 0x8000, status::VDSO)],
            ckpt_guards: guards.iter().map(|&(start, end)| GuardRegion { start, end }).collect(),
            ..MmEntry::default()
        };
        assert!(check(&with(&[(0x1000, 0x2000), (0x2000, 0x5000)])).is_ok());
        for bad in [
            &[(0x4000, 0x6000)][..],
            &[(0x5000, 0x6000)],
            &[(0x6000, 0x7000)],
            &[(0x2000, 0x3000), (0x1000, 0x2000)],
            &[(0x2000, 0x2000)],
            &[(0x1800, 0x2000)],
            &[(0x1000, u64::MAX)],
        ] {
            assert!(check(&with(bad)).is_err(), "{bad:?}");
        }
    }
}
