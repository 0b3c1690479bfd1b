//! Another process's memory: process_vm_readv(2), process_vm_writev(2), and which of its pages are
//! populated (`ioctl(PAGEMAP_SCAN)`, Documentation/admin-guide/mm/pagemap.rst, Linux 6.7).

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::OnceLock,
};

use nix::{errno::Errno, sys::uio};

use crate::{Pid, RemoteAddr, SysError};

const PAGE: u64 = 4096;

/// Reads exactly `buffer.len()` bytes at `addr` of process `pid`. PROT_NONE mappings can't be read
/// this way (EFAULT); `/proc/PID/mem` can.
///
/// # Errors
/// EFAULT with the address at which it happened, EPERM, ESRCH.
pub fn read_exact(pid: Pid, addr: RemoteAddr, buffer: &mut [u8]) -> Result<(), SysError> {
    let total = buffer.len();
    let mut done = 0;
    while done < total {
        let base = addr.plus(done as u64);
        let remote = uio::RemoteIoVec { base: as_usize(base), len: total - done };
        match uio::process_vm_readv(pid.nix(), &mut [IoSliceMut::new(&mut buffer[done..])], &[remote]) {
            Ok(0) => return Err(SysError::new("process_vm_readv", at(pid, base), Errno::EFAULT)),
            Ok(n) => done += n,
            Err(errno) => return Err(SysError::new("process_vm_readv", at(pid, base), errno)),
        }
    }
    Ok(())
}

/// Writes `bytes` at `addr` of process `pid`.
///
/// # Errors
/// EFAULT with the address at which it happened, EPERM, ESRCH.
pub fn write_all(pid: Pid, addr: RemoteAddr, bytes: &[u8]) -> Result<(), SysError> {
    let mut done = 0;
    while done < bytes.len() {
        let base = addr.plus(done as u64);
        let remote = uio::RemoteIoVec { base: as_usize(base), len: bytes.len() - done };
        match uio::process_vm_writev(pid.nix(), &[IoSlice::new(&bytes[done..])], &[remote]) {
            Ok(0) => return Err(SysError::new("process_vm_writev", at(pid, base), Errno::EFAULT)),
            Ok(n) => done += n,
            Err(errno) => return Err(SysError::new("process_vm_writev", at(pid, base), errno)),
        }
    }
    Ok(())
}

fn at(pid: Pid, addr: RemoteAddr) -> String {
    format!("pid {pid} address {addr:#x}")
}

fn as_usize(addr: RemoteAddr) -> usize {
    usize::try_from(addr.0).expect("addresses are 64 bits wide on every supported architecture")
}

bitflags::bitflags! {
    /// Page categories of PAGEMAP_SCAN (`PAGE_IS_*` in linux/fs.h).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Page: u64 {
        /// Write-protection for tracking is enabled on the mapping.
        const WPALLOWED = 1;
        /// Written since it was last protected.
        const WRITTEN = 1 << 1;
        /// Backed by a file (page cache), shared memory included.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// Swapped out.
        const SWAPPED = 1 << 4;
        /// The shared page of zeros.
        const PFNZERO = 1 << 5;
        /// Part of a huge mapping.
        const HUGE = 1 << 6;
        /// A guard region (MADV_GUARD_INSTALL, Linux 6.13; told since 6.16).
        const GUARD = 1 << 8;
    }
}

/// A run of pages with the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageRange {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `Page` bits.
    pub categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages PAGEMAP_SCAN reports.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    /// Categories whose sense is turned round.
    pub inverted: Page,
    /// All of these must be set.
    pub all: Page,
    /// At least one of these must be set.
    pub any: Page,
    /// Categories told of each range; ranges are merged when these agree.
    pub report: Page,
}

/// Scans `[start, end)` of the process whose `/proc/PID/pagemap` is `pagemap`; appends the matching
/// runs to `ranges`.
///
/// # Errors
/// ENOTTY before Linux 6.7, EPERM.
pub fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
    scan: Scan,
    ranges: &mut Vec<PageRange>,
) -> Result<(), SysError> {
    pagemap_walk(pagemap, start, end, scan, 0, ranges)
}

/// The same, and protects each page that is reported, in one step with looking at it: a page is
/// [`Page::WRITTEN`] from the next write on. Everything in the range must be under tracking
/// ([`crate::uffd::register`]).
///
/// # Errors
/// EPERM if something is not, or access is not permitted.
pub fn pagemap_protect(
    pagemap: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
    scan: Scan,
    ranges: &mut Vec<PageRange>,
) -> Result<(), SysError> {
    const PM_SCAN_WP_MATCHING: u64 = 1;
    const PM_SCAN_CHECK_WPASYNC: u64 = 2;
    pagemap_walk(pagemap, start, end, scan, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, ranges)
}

/// [`Page::GUARD`] if the kernel tells guard regions, else nothing: it takes no category that it does not know.
#[must_use]
pub fn guard_category() -> Page {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let Ok(pagemap) = File::open("/proc/self/pagemap") else { return false };
        let start = RemoteAddr(PAGE);
        guard_scan(pagemap.as_fd(), start, start.plus(PAGE)).is_ok()
    });
    if *known { Page::GUARD } else { Page::empty() }
}

/// Finds all guard regions in `[start, end)` of the process whose `/proc/PID/pagemap` is `pagemap`. None if
/// the kernel does not tell.
///
/// # Errors
/// EPERM.
pub fn guards(
    pagemap: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
) -> Result<Vec<PageRange>, SysError> {
    if guard_category().is_empty() { Ok(Vec::new()) } else { guard_scan(pagemap, start, end) }
}

fn guard_scan(
    pagemap: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
) -> Result<Vec<PageRange>, SysError> {
    let scan = Scan { inverted: Page::empty(), all: Page::GUARD, any: Page::empty(), report: Page::empty() };
    let mut found = Vec::new();
    pagemap_scan(pagemap, start, end, scan, &mut found)?;
    Ok(found)
}

fn pagemap_walk(
    pagemap: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
    scan: Scan,
    flags: u64,
    ranges: &mut Vec<PageRange>,
) -> Result<(), SysError> {
    // _IOWR('f', 16, struct pm_scan_arg)
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    let mut vec = vec![PageRange::default(); 1024];
    let mut from = start.0;
    while from < end.0 {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags,
            start: from,
            end: end.0,
            walk_end: 0,
            vec: vec.as_mut_ptr() as u64,
            vec_len: vec.len() as u64,
            max_pages: 0,
            category_inverted: scan.inverted.bits(),
            category_mask: scan.all.bits(),
            category_anyof_mask: scan.any.bits(),
            return_mask: scan.report.bits(),
        };
        // SAFETY: `arg` is a pm_scan_arg of the stated size, and its `vec` has room for `vec_len` entries.
        let ret = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let Ok(n) = usize::try_from(ret) else {
            return Err(SysError::last("ioctl(PAGEMAP_SCAN)", format!("addresses {from:#x}-{:#x}", end.0)));
        };
        for &range in &vec[..n] {
            match ranges.last_mut() {
                Some(last) if last.end == range.start && last.categories == range.categories => {
                    last.end = range.end
                }
                _ => ranges.push(range),
            }
        }
        // The kernel gathers 512 ranges at a time. If a walk of more than that comes to its end, `walk_end`
        // still says where the last but one such part ended (fs/proc/task_mmu.c, seen on 6.18). So it counts
        // only when there may have been no room for more (one range is left unused by some releases).
        if n + 1 < vec.len() {
            break;
        }
        let seen = vec[..n].last().map_or(0, |range| range.end).max(arg.walk_end);
        if seen <= from {
            break;
        }
        from = seen;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn every_page_is_told_once() {
        const PAGE: usize = 4096;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        for pages in [100, 1022, 1024, 1026, 2046, 2048, 2050, 5000] {
            let length = std::num::NonZero::new(pages * PAGE).unwrap();
            let prot = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
            let flags = nix::sys::mman::MapFlags::MAP_PRIVATE;
            // SAFETY: a new anonymous mapping, which nothing else refers to.
            let memory = unsafe { nix::sys::mman::mmap_anonymous(None, length, prot, flags) }.unwrap();
            let start = memory.as_ptr() as u64;
            for page in (0..pages).step_by(2) {
                write_all(
                    Pid(std::process::id().cast_signed()),
                    RemoteAddr(start + (page * PAGE) as u64),
                    &[1],
                )
                .unwrap();
            }
            let scan = Scan {
                inverted: Page::PFNZERO,
                all: Page::PFNZERO,
                any: Page::PRESENT | Page::SWAPPED,
                report: Page::empty(),
            };
            let mut ranges = Vec::new();
            let end = RemoteAddr(start + (pages * PAGE) as u64);
            pagemap_scan(pagemap.as_fd(), RemoteAddr(start), end, scan, &mut ranges).unwrap();
            // SAFETY: the mapping was made above with this length.
            unsafe { nix::sys::mman::munmap(memory, pages * PAGE) }.unwrap();
            assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{pages}: out of order");
            assert_eq!(ranges.len(), pages / 2, "{pages}");
        }
    }
}
