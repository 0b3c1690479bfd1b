//! Write tracking by userfaultfd(2): `UFFD_FEATURE_WP_ASYNC` (Linux 6.7,
//! Documentation/admin-guide/mm/userfaultfd.rst), which lets a write to a protected page through, and
//! takes note by dropping the protection. `PAGEMAP_SCAN` reads it ([`crate::memory`]).
//!
//! A userfaultfd acts on the address space of the process that made it, whoever uses the descriptor.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::{RemoteAddr, SysError};

/// Only faults of user space are handed out: what an unprivileged process may have. Asynchronous
/// tracking hands out none, and sees writes made by the kernel all the same.
pub const USER_MODE_ONLY: i32 = 1;

const API: u64 = 0xaa;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    ioctls: u64,
}

/// Numbers of linux/userfaultfd.h: `_IOWR(0xAA, nr, size)`.
const fn iowr(nr: libc::c_ulong, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as libc::c_ulong) << 16) | (0xaa << 8) | nr
}

fn span(start: RemoteAddr, end: RemoteAddr) -> String {
    format!("addresses {start:#x}-{end:#x}")
}

/// Prepares a new userfaultfd for tracking.
///
/// # Errors
/// EINVAL before Linux 6.7.
pub fn enable(uffd: BorrowedFd<'_>) -> Result<(), SysError> {
    let mut api = Api { api: API, features: FEATURE_WP_ASYNC, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which `api` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(0x3f, size_of::<Api>()), &raw mut api) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("ioctl(UFFDIO_API)", "UFFD_FEATURE_WP_ASYNC")) }
}

/// Puts the mappings in `[start, end)` under tracking; those that are already stay as they are.
///
/// # Errors
/// EBUSY if another userfaultfd watches one, ENOMEM if the address space is gone.
pub fn register(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    let range = Range { start: start.0, len: end.0 - start.0, mode: MODE_WP };
    let mut arg = Register { range, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`, which `arg` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(0, size_of::<Register>()), &raw mut arg) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("ioctl(UFFDIO_REGISTER)", span(start, end))) }
}

/// Protects all pages in `[start, end)`, which must be under tracking.
///
/// # Errors
/// ENOENT if it is not, ESRCH if the address space is gone.
pub fn protect(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    set_protection(uffd, start, end, WRITEPROTECT_WP)
}

/// Takes protection from `[start, end)`, so that its pages count as written. What is no longer mapped there, or
/// not tracked any more, is not protected anyway.
pub fn count_as_written(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) {
    let _ = set_protection(uffd, start, end, 0);
}

fn set_protection(
    uffd: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
    mode: u64,
) -> Result<(), SysError> {
    let mut arg = Range { start: start.0, len: end.0 - start.0, mode };
    // SAFETY: UFFDIO_WRITEPROTECT reads and writes one `uffdio_writeprotect`, which `arg` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(6, size_of::<Range>()), &raw mut arg) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("ioctl(UFFDIO_WRITEPROTECT)", span(start, end))) }
}

/// Whether the address space still exists: after exec(2) or the end of the process it does not.
#[must_use]
pub fn is_alive(uffd: BorrowedFd<'_>) -> bool {
    // Asked by taking protection away where hardly anything is ever mapped: the answer is ENOENT, or ESRCH.
    // If a page is there, it counts as written once more than it was.
    let nowhere = RemoteAddr(0x7fff_ffff_d000);
    !matches!(set_protection(uffd, nowhere, nowhere.plus(4096), 0), Err(error) if error.errno == Errno::ESRCH)
}
