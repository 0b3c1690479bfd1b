//! Memory of huge pages set aside by the administrator (hugetlbfs, Documentation/admin-guide/mm/hugetlbpage.rst): what is
//! different in it.
//!
//! - The size of its pages is in the flags of mmap(2), memfd_create(2) and shmget(2) at the same place, as its logarithm.
//! - Its files can be read, and mapped, but not written by write(2), spliced or copied (Linux 6.18).
//! - lseek(2) with SEEK_DATA takes all of a file for data. Which pages there are is told by UFFDIO_CONTINUE
//!   (Linux 5.13): it maps a page that is there, and fails where there is none. To look by touching them would
//!   take pages from the pool.
//! - Where no page is left, touching memory is SIGBUS. fallocate(2) says ENOSPC before.

use std::{
    fs,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::{stat::fstat, uio::pread},
};

use crate::{Refused, RemoteAddr, SysError, file, uffd};

/// Type of the file system (linux/magic.h).
const MAGIC: i64 = 0x9584_58f6;
/// Bits of a size in flags, from [`libc::MAP_HUGE_SHIFT`] on.
const SIZE: u32 = libc::MAP_HUGE_MASK.cast_unsigned() << libc::MAP_HUGE_SHIFT;
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Flags of mmap(2) that make memory be of huge pages, and say of which size.
pub const MAP: u32 = libc::MAP_HUGETLB.cast_unsigned() | SIZE;
/// The flag of memfd_create(2).
pub const MEMFD: u32 = libc::MFD_HUGETLB;
/// The flag of shmget(2).
pub const SHM: u32 = libc::SHM_HUGETLB.cast_unsigned();

/// The size of pages as all these flags have it.
#[must_use]
pub fn size_flag(page: u64) -> u32 {
    page.max(1).ilog2() << libc::MAP_HUGE_SHIFT
}

/// The size of pages that flags tell; 0 if they leave it to the kernel.
#[must_use]
pub fn size_in(flags: u32) -> u64 {
    match (flags & SIZE) >> libc::MAP_HUGE_SHIFT {
        0 => 0,
        bits => 1 << bits,
    }
}

/// The size of a file's pages, if it is on a hugetlbfs.
///
/// # Errors
/// Those of fstatfs(2).
pub fn page_size(file: impl AsFd) -> Result<Option<u64>, SysError> {
    let fd = file.as_fd();
    let stat = nix::sys::statfs::fstatfs(fd)
        .map_err(|errno| SysError::new("fstatfs", format!("fd {}", fd.as_raw_fd()), errno))?;
    Ok((stat.filesystem_type().0 == MAGIC).then_some(stat.block_size().cast_unsigned()))
}

/// A refusal for want of huge pages of this size.
#[must_use]
pub fn too_few(subject: impl Into<String>, page: u64) -> Refused {
    let kib = page / 1024;
    let pool = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"));
    let number = |name: &str| fs::read_to_string(pool.join(name)).ok()?.trim().parse::<u64>().ok();
    let numbers = (number("nr_hugepages"), number("free_hugepages"), number("resv_hugepages"));
    let (Some(all), Some(free), Some(reserved)) = numbers else {
        let size = if page == 0 { "any size".to_owned() } else { format!("{kib} KiB") };
        return Refused::new(subject, format!("this kernel has no huge pages of {size}"));
    };
    let why = format!(
        "there are too few huge pages of {kib} KiB: {all} in all, {} of them neither in use nor promised",
        free.saturating_sub(reserved)
    );
    let pool = pool.join("nr_hugepages");
    let mut advice = format!("write a larger number to {}", pool.display());
    if kib == 2048 {
        advice += " (sysctl vm.nr_hugepages)";
    }
    Refused::new(subject, why).advise(advice)
}

/// Memory mapped here for a moment.
struct Mapped {
    start: usize,
    len: usize,
}

impl Mapped {
    /// Maps a part of a file, without making or promising pages.
    fn new(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<Self, SysError> {
        let what = || format!("{len} bytes of huge pages");
        let invalid = || SysError::new("mmap", what(), Errno::EOVERFLOW);
        let (size, offset) =
            (usize::try_from(len).map_err(|_| invalid())?, i64::try_from(at).map_err(|_| invalid())?);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags, fd.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(SysError::last("mmap", what()));
        }
        Ok(Self { start: start as usize, len: size })
    }

    /// Copies `bytes` to `at`. The pages must be there.
    fn fill(&mut self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at, "bytes beyond the mapping");
        let to = (self.start + at) as *mut u8;
        // SAFETY: the range is in our own writable mapping by the check above, and `bytes` can't be: no reference to it
        // is ever given out.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `new` has made this mapping, and nothing points into it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// Writes `bytes` at `at` of a file with pages of `page` bytes, which nobody else changes and which is open for reading and
/// writing.
///
/// # Errors
/// ENOSPC if there are too few pages. ENXIO beyond the end of the file, where to touch memory is SIGBUS too.
pub fn write(file: BorrowedFd<'_>, page: u64, mut at: u64, mut bytes: &[u8]) -> Result<(), SysError> {
    let error =
        |errno| SysError::new("write by mapping", format!("a file of huge pages, offset {at:#x}"), errno);
    let size = fstat(file).map_err(error)?.st_size.cast_unsigned();
    if at.checked_add(bytes.len() as u64).is_none_or(|end| end > size) {
        return Err(error(Errno::ENXIO));
    }
    while !bytes.is_empty() {
        let (start, skip) = (at / page * page, at % page);
        let error = |errno| SysError::new("fallocate", format!("a huge page at {start:#x}"), errno);
        let offset = i64::try_from(start).map_err(|_| error(Errno::EFBIG))?;
        let len = i64::try_from(page).map_err(|_| error(Errno::EFBIG))?;
        fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len).map_err(error)?;
        let n = usize::try_from(page - skip).map_or(bytes.len(), |room| room.min(bytes.len()));
        let (now, later) = bytes.split_at(n);
        Mapped::new(file, start, page)?.fill(usize::try_from(skip).map_err(|_| error(Errno::EFBIG))?, now);
        bytes = later;
        at += n as u64;
    }
    Ok(())
}

/// Which parts of a file's `size` bytes there are pages for, of `page` bytes each.
///
/// # Errors
/// It can't be read.
pub fn populated(file: BorrowedFd<'_>, page: u64, size: u64) -> Result<Vec<Range<u64>>, SysError> {
    let on = |errno| SysError::new("fstat", "a file of huge pages", errno);
    let bytes = fstat(file).map_err(on)?.st_blocks.cast_unsigned() * 512;
    match bytes {
        0 => Ok(Vec::new()),
        // Sealed, or of somebody else: then pages of zeros are taken for holes, which read the same.
        _ => probe(file, page, size, bytes).map_or_else(|| not_zero(file, page, size), Ok),
    }
}

/// Finds them by UFFDIO_CONTINUE, until there are `left` bytes; `None` if that is not possible.
fn probe(file: BorrowedFd<'_>, page: u64, size: u64, mut left: u64) -> Option<Vec<Range<u64>>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let writable: OwnedFd = file::open(&path, libc::O_RDWR.cast_unsigned(), 0).ok()?;
    let mapped = Mapped::new(writable.as_fd(), 0, size).ok()?;
    let minor = uffd::minor_faults().ok()?;
    let start = RemoteAddr(mapped.start as u64);
    uffd::register_minor(minor.as_fd(), start, start.plus(size)).ok()?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size && left > 0 {
        match uffd::map_present(minor.as_fd(), start.plus(at), size - at) {
            Ok(n) => {
                push(&mut found, at..at + n);
                left = left.saturating_sub(n);
                at += n;
            }
            Err(error) if error.errno == Errno::EFAULT => at += page,
            Err(_) => return None,
        }
    }
    Some(found)
}

/// Finds those that are not all zeros.
fn not_zero(file: BorrowedFd<'_>, page: u64, size: u64) -> Result<Vec<Range<u64>>, SysError> {
    let mut found = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        let failed = |errno| SysError::new("pread", format!("a file of huge pages, offset {at:#x}"), errno);
        let n =
            pread(file, &mut buffer, i64::try_from(at).map_err(|_| failed(Errno::EFBIG))?).map_err(failed)?;
        if n == 0 {
            break;
        }
        let start = at / page * page;
        if buffer[..n].iter().any(|&byte| byte != 0) {
            push(&mut found, start..start + page);
            at = start + page;
        } else {
            at += n as u64;
        }
    }
    Ok(found)
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn sizes_in_flags() {
        assert_eq!(size_flag(2 << 20), 21 << 26);
        assert_eq!(size_flag(1 << 30), 30 << 26);
        for page in [64 << 10, 2 << 20, 1 << 30, 16 << 30] {
            assert_eq!(size_in(size_flag(page) | MEMFD | SHM | libc::MAP_HUGETLB.cast_unsigned()), page);
        }
        assert_eq!(size_in(libc::MAP_HUGETLB.cast_unsigned()), 0);
    }

    #[test]
    fn the_kind_of_a_file_is_told() {
        for page in [2 << 20, 1 << 30] {
            let flags = MFdFlags::from_bits_retain(MEMFD | size_flag(page));
            let Ok(fd) = memfd_create(c"huge", flags) else { continue };
            assert_eq!(page_size(&fd).unwrap(), Some(page));
            assert!(populated(fd.as_fd(), page, 8 * page).unwrap().is_empty());
        }
        assert_eq!(page_size(memfd_create(c"plain", MFdFlags::empty()).unwrap()).unwrap(), None);
    }

    #[test]
    fn nothing_is_written_beyond_the_end() {
        let flags = MFdFlags::from_bits_retain(MEMFD | size_flag(2 << 20));
        let Ok(fd) = memfd_create(c"huge", flags) else { return };
        assert_eq!(write(fd.as_fd(), 2 << 20, 0, b"x").unwrap_err().errno, Errno::ENXIO);
    }

    #[test]
    fn a_shortage_says_what_to_do() {
        let refused = too_few("it", 2 << 20);
        assert!(refused.advice.unwrap().contains("vm.nr_hugepages"), "{}", refused.reason);
        assert!(too_few("it", 8 << 10).reason.contains("no huge pages of 8 KiB"));
    }
}
