//! Equal parts of files that share their room: `ioctl(FIDEDUPERANGE)`, ioctl_fideduperange(2).
//!
//! The kernel compares the bytes itself, with both files locked, so nothing that anybody sees can change.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::SysError;

/// `_IOWR(0x94, 54, struct file_dedupe_range)`, whose array at the end does not count.
const FIDEDUPERANGE: libc::c_ulong = 0xc018_9436;

/// `struct file_dedupe_range` with one `struct file_dedupe_range_info`.
#[repr(C)]
#[derive(Debug, Default)]
struct Request {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
    dest_fd: i64,
    dest_offset: u64,
    bytes_deduped: u64,
    status: i32,
    reserved: u32,
}

/// Lets the `len` bytes at `to` in `dest` share the room of those at `from` in `source`. How many bytes of them do
/// now: possibly less than `len`, 0 if they are not equal.
///
/// # Errors
/// EOPNOTSUPP if the file system can't; EXDEV if the two are not on one; EINVAL if the range is not one of whole
/// blocks; EPERM if `dest` is neither writable nor the caller's.
pub fn dedupe(
    source: BorrowedFd<'_>,
    from: u64,
    len: u64,
    dest: BorrowedFd<'_>,
    to: u64,
) -> Result<u64, SysError> {
    let failed = |errno| {
        SysError::new(
            "ioctl(FIDEDUPERANGE)",
            format!("our fds {} and {}", source.as_raw_fd(), dest.as_raw_fd()),
            errno,
        )
    };
    let mut request = Request {
        src_offset: from,
        src_length: len,
        dest_count: 1,
        dest_fd: dest.as_raw_fd().into(),
        dest_offset: to,
        ..Request::default()
    };
    // SAFETY: the kernel reads and writes the header and `dest_count` infos behind it, which is what `request` is.
    let ret = unsafe { libc::ioctl(source.as_raw_fd(), FIDEDUPERANGE, &raw mut request) };
    if ret < 0 {
        return Err(failed(nix::errno::Errno::last()));
    }
    // FILE_DEDUPE_RANGE_DIFFERS is 1; below zero is an errno.
    match request.status {
        0 => Ok(request.bytes_deduped),
        1.. => Ok(0),
        errno => Err(failed(nix::errno::Errno::from_raw(errno.saturating_neg()))),
    }
}
