//! userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst: three uses of it.
//!
//! - Tracking of writes: `UFFD_FEATURE_WP_ASYNC` (Linux 6.7) lets a write to a protected page through, and
//!   takes note by dropping the protection. `PAGEMAP_SCAN` reads it ([`crate::memory`]).
//! - Missing pages: who touches one waits until [`copy`] or [`zero`] has brought it. What the process
//!   does to its mappings meanwhile is told as an [`Event`], and goes on when that has been read.
//! - Minor faults: [`map_present`] tells which pages a file of huge pages has ([`crate::hugetlb`]).
//!
//! A userfaultfd acts on the address space of the process that made it, whoever uses the descriptor.

use std::{
    ops::Range as Span,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

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

/// Makes a userfaultfd for memory of this process, with [`USER_MODE_ONLY`].
///
/// # Errors
/// ENOSYS, EPERM (seccomp), EMFILE.
pub fn own() -> Result<OwnedFd, SysError> {
    // SAFETY: userfaultfd takes one integer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(SysError::last("userfaultfd", "user mode")),
    }
}

/// Prepares a new userfaultfd for tracking.
///
/// # Errors
/// EINVAL before Linux 6.7.
pub fn enable(uffd: BorrowedFd<'_>) -> Result<(), SysError> {
    enable_features(uffd, FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC")
}

fn enable_features(uffd: BorrowedFd<'_>, features: u64, what: &str) -> Result<(), SysError> {
    let mut api = Api { api: API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which `api` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(0x3f, size_of::<Api>()), &raw mut api) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("ioctl(UFFDIO_API)", what)) }
}

/// Puts the mappings in `[start, end)` under tracking; those that are already stay as they are.
///
/// # Errors
/// EBUSY if another userfaultfd watches one, ENOMEM if the address space is gone.
pub fn register(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    register_mode(uffd, start, end, MODE_WP)
}

fn register_mode(
    uffd: BorrowedFd<'_>,
    start: RemoteAddr,
    end: RemoteAddr,
    mode: u64,
) -> Result<(), SysError> {
    let range = Range { start: start.0, len: end.0 - start.0, mode };
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

const MODE_MISSING: u64 = 1;
/// UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP.
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
/// UFFD_FEATURE_POISON (Linux 6.6).
const FEATURE_POISON: u64 = 1 << 14;

/// Prepares a new userfaultfd for missing pages, with all events.
///
/// # Errors
/// EPERM without CAP_SYS_PTRACE, EINVAL before Linux 6.6.
pub fn enable_missing(uffd: BorrowedFd<'_>) -> Result<(), SysError> {
    enable_features(uffd, EVENTS | FEATURE_POISON, "missing pages, events")
}

/// From here on, touching a page in `[start, end)` that is not there is a [`Event::Fault`].
///
/// # Errors
/// EBUSY if another userfaultfd watches a part of it, EINVAL for memory that can't be.
pub fn register_missing(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    register_mode(uffd, start, end, MODE_MISSING)
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `uffdio_zeropage`, `uffdio_poison` and `uffdio_continue`.
#[repr(C)]
struct Mark {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// What came of an ioctl that says in `done` how far it got: bytes, or an errno.
fn progress(ret: i32, call: &'static str, addr: RemoteAddr, len: u64, done: i64) -> Result<u64, SysError> {
    match (ret, u64::try_from(done)) {
        (0, _) => Ok(len),
        (_, Ok(done)) if done > 0 => Ok(done),
        _ => Err(SysError::last(call, span(addr, addr.plus(len)))),
    }
}

/// Makes pages (whole ones) of `bytes` at `addr` and wakes who waits for them. Gives how many bytes were placed, at least
/// a page.
///
/// # Errors
/// EEXIST: there is a page already. ENOENT: not under watch, or not all of it in one mapping. EAGAIN: an event is to be
/// read first, or its cause has not gone on yet. ESRCH: the address space is gone. ENOMEM.
pub fn copy(uffd: BorrowedFd<'_>, addr: RemoteAddr, bytes: &[u8]) -> Result<u64, SysError> {
    let len = bytes.len() as u64;
    let mut arg = Copy { dst: addr.0, src: bytes.as_ptr() as u64, len, mode: 0, copy: 0 };
    // SAFETY: UFFDIO_COPY reads and writes one `uffdio_copy`; its source is `bytes`, which are only read.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(3, size_of::<Copy>()), &raw mut arg) };
    progress(ret, "ioctl(UFFDIO_COPY)", addr, len, arg.copy)
}

/// Makes pages of zeros at `addr`, as [`copy`] does.
///
/// # Errors
/// As [`copy`].
pub fn zero(uffd: BorrowedFd<'_>, addr: RemoteAddr, len: u64) -> Result<u64, SysError> {
    let mut arg = Mark { start: addr.0, len, mode: 0, done: 0 };
    // SAFETY: UFFDIO_ZEROPAGE reads and writes one `uffdio_zeropage`, which `arg` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(4, size_of::<Mark>()), &raw mut arg) };
    progress(ret, "ioctl(UFFDIO_ZEROPAGE)", addr, len, arg.done)
}

const MODE_MINOR: u64 = 1 << 2;
/// UFFD_FEATURE_MINOR_HUGETLBFS (Linux 5.13).
const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;

/// A userfaultfd of this process for minor faults.
///
/// # Errors
/// EINVAL before Linux 5.13; EMFILE.
pub fn minor_faults() -> Result<OwnedFd, SysError> {
    // SAFETY: userfaultfd takes flags and gives a new descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    let Ok(fd @ 0..) = i32::try_from(made) else { return Err(SysError::last("userfaultfd", "minor faults")) };
    // SAFETY: the descriptor has just been made and belongs to nobody else.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    enable_features(uffd.as_fd(), FEATURE_MINOR_HUGETLBFS, "minor faults of huge pages")?;
    Ok(uffd)
}

/// Prepares `[start, end)` for [`map_present`].
///
/// # Errors
/// EPERM: the mapped file may not be written. EINVAL: it is of another kind.
pub fn register_minor(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    register_mode(uffd, start, end, MODE_MINOR)
}

/// Maps the pages that a file has from `addr` on, up to the first that it has not. Gives how many bytes that is.
///
/// # Errors
/// EFAULT: the file has no page there.
pub fn map_present(uffd: BorrowedFd<'_>, addr: RemoteAddr, len: u64) -> Result<u64, SysError> {
    let mut arg = Mark { start: addr.0, len, mode: 0, done: 0 };
    // SAFETY: UFFDIO_CONTINUE reads and writes one `uffdio_continue`, which has the layout of `arg`.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(7, size_of::<Mark>()), &raw mut arg) };
    progress(ret, "ioctl(UFFDIO_CONTINUE)", addr, len, arg.done)
}

/// Marks pages that are not there as lost, as after a memory failure: SIGBUS for who touches them, for good.
///
/// # Errors
/// As [`copy`].
pub fn poison(uffd: BorrowedFd<'_>, addr: RemoteAddr, len: u64) -> Result<u64, SysError> {
    let mut arg = Mark { start: addr.0, len, mode: 0, done: 0 };
    // SAFETY: UFFDIO_POISON reads and writes one `uffdio_poison`, which `arg` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), iowr(8, size_of::<Mark>()), &raw mut arg) };
    progress(ret, "ioctl(UFFDIO_POISON)", addr, len, arg.done)
}

/// Has those who wait for a page in the range look again.
///
/// # Errors
/// EINVAL: no such addresses.
pub fn wake(uffd: BorrowedFd<'_>, start: RemoteAddr, end: RemoteAddr) -> Result<(), SysError> {
    // _IOR(0xaa, 2, struct uffdio_range), although it is read.
    const WAKE: libc::c_ulong = (2 << 30) | (16 << 16) | (0xaa << 8) | 2;
    let mut arg = [start.0, end.0 - start.0];
    // SAFETY: UFFDIO_WAKE reads one `uffdio_range`, two words, which `arg` is.
    let ret = unsafe { libc::ioctl(uffd.as_raw_fd(), WAKE, arg.as_mut_ptr()) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("ioctl(UFFDIO_WAKE)", span(start, end))) }
}

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(RemoteAddr),
    /// The process has forked; the child's memory, which is as the parent's was, has this userfaultfd.
    Fork(OwnedFd),
    /// mremap(2) has moved `len` bytes.
    Remap {
        /// Where they were.
        from: u64,
        /// Where they are.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// The contents of these addresses are given up (madvise(2)): they read as zeros from now on.
    Remove(Span<u64>),
    /// These addresses are no longer mapped, or mapped anew.
    Unmap(Span<u64>),
}

/// Reads what there is, without waiting. Each process whose event was read goes on at once.
///
/// # Errors
/// EMFILE, if a process has forked and there is no room for a descriptor.
pub fn read(uffd: BorrowedFd<'_>, events: &mut Vec<Event>) -> Result<(), SysError> {
    /// Of `struct uffd_msg`.
    const LEN: usize = 32;
    let mut buffer = [0_u8; 32 * LEN];
    loop {
        // SAFETY: reads at most the length of the buffer into it.
        let n = unsafe { libc::read(uffd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(n) = usize::try_from(n) else {
            match Errno::last() {
                Errno::EAGAIN => return Ok(()),
                Errno::EINTR => continue,
                // It comes again, and what was read must not get lost.
                _ if !events.is_empty() => return Ok(()),
                errno => return Err(SysError::new("read", "userfaultfd", errno)),
            }
        };
        for message in buffer[..n].chunks_exact(LEN) {
            let word = |at: usize| {
                message.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
            };
            events.extend(match message[0] {
                0x12 => Some(Event::Fault(RemoteAddr(word(16)))),
                0x13 => {
                    let fd = i32::try_from(word(8) & 0xffff_ffff).unwrap_or(-1);
                    // SAFETY: the kernel has just made this descriptor for the reader of the message.
                    (fd >= 0).then(|| Event::Fork(unsafe { OwnedFd::from_raw_fd(fd) }))
                }
                0x14 => Some(Event::Remap { from: word(8), to: word(16), len: word(24) }),
                0x15 => Some(Event::Remove(word(8)..word(16))),
                0x16 => Some(Event::Unmap(word(8)..word(16))),
                _ => None,
            });
        }
        if n < buffer.len() {
            return Ok(());
        }
    }
}
