//! A buffer whose pages are given away to a pipe (vmsplice(2)).
//!
//! What was given stays as it is for whoever reads the pipe, or splices it on to another one:
//! before the buffer is used again its pages are dropped (MADV_DONTNEED), so that the next use gets
//! new ones and nobody's data change under them. A huge page makes that cheap: one fault for 2 MiB
//! instead of 512. This saves the copy into the pipe that write(2) would make.
//!
//! Where the readers say what they have done with ([`Gift::lend`]), the pages are not dropped but used again, in a circle.
//! That saves clearing new ones, a third of the work here, and in a virtual machine the far dearer first use of memory.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
};

use nix::errno::Errno;

use crate::SysError;

/// Size of the buffer, bytes: more than two pipes of a mebibyte and a reader between its words hold.
pub const SIZE: usize = 4 << 20;

/// Its alignment: a huge page of x86-64, bytes.
const ALIGN: usize = 2 << 20;

/// What tells when memory that was given to a pipe may be used again.
pub trait Lending: std::fmt::Debug + Send {
    /// Whether the far end of the pipe tells. Once it does, it always will.
    fn known(&self) -> bool;

    /// Waits until nothing refers to the first `bytes` bytes of pages any more that went into the pipe.
    ///
    /// # Errors
    /// That will never be.
    fn wait(&self, bytes: u64) -> io::Result<()>;

    /// The directory in which the far end keeps its `pages-ID.img`: who writes pages there need only tell of them.
    fn directory(&self) -> Option<OwnedFd>;
}

/// The buffer.
#[derive(Debug)]
pub struct Gift {
    /// Start of the mapping, which is longer than the aligned part by [`ALIGN`].
    mapping: NonNull<u8>,
    aligned: NonNull<u8>,
    /// Bytes at the start that the pipe refers to.
    given: usize,
    /// Pages come back.
    lent: bool,
}

impl Gift {
    /// Maps a buffer.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> Result<Self, SysError> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping wherever the kernel likes; no memory of ours is affected.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE + ALIGN, prot, flags, -1, 0) };
        let failed = || SysError::last("mmap", format!("a buffer of {SIZE} bytes"));
        let mapping = NonNull::new(at.cast::<u8>()).filter(|_| at != libc::MAP_FAILED).ok_or_else(failed)?;
        let skip = mapping.as_ptr().align_offset(ALIGN);
        // SAFETY: `skip` is less than ALIGN, by which the mapping is longer than SIZE.
        let aligned = unsafe { mapping.add(skip) };
        // SAFETY: advice for a range of the mapping made above. Without huge pages it works, only slower.
        unsafe { libc::madvise(aligned.as_ptr().cast(), SIZE, libc::MADV_HUGEPAGE) };
        Ok(Self { mapping, aligned, given: 0, lent: false })
    }

    /// From the next round on pages are used again. False if this round is not over: ask again.
    ///
    /// The bytes that [`Self::bytes`] gives out next are those which were given [`SIZE`] bytes ago; the caller
    /// must know that nobody refers to them any more. Memory is safe in any case, only the data are not.
    pub fn lend(&mut self) -> bool {
        self.lent |= self.given == 0;
        self.lent
    }

    /// The bytes that have not been given, at least one.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: SIZE bytes from `aligned` are mapped readable and writable for as long as `self`
        // lives, initialised (anonymous memory is zero), and borrowed through `&mut self` only.
        let all = unsafe { slice::from_raw_parts_mut(self.aligned.as_ptr(), SIZE) };
        &mut all[self.given..]
    }

    /// Gives the first `len` of the bytes to `pipe`. When none are left there are new ones.
    ///
    /// # Errors
    /// EPIPE if nobody reads it, EBADF if it is no pipe.
    ///
    /// # Panics
    /// If `len` is more than the buffer holds.
    pub fn give(&mut self, pipe: BorrowedFd<'_>, len: usize) -> Result<(), SysError> {
        assert!(len <= SIZE - self.given, "more bytes than the buffer holds");
        let end = self.given + len;
        while self.given < end {
            let left = end - self.given;
            // SAFETY: `given` is below SIZE.
            let base = unsafe { self.aligned.add(self.given) };
            let iov = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: left };
            // SAFETY: `iov` describes bytes of the buffer; the kernel takes references to their
            // pages. `bytes` does not give them out any more until they are dropped from the buffer.
            let n = unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const iov, 1, 0) };
            match usize::try_from(n) {
                Ok(n) => self.given += n,
                Err(_) if Errno::last() == Errno::EINTR => {}
                Err(_) => return Err(SysError::last("vmsplice", format!("{left} bytes"))),
            }
        }
        if self.given < SIZE {
            return Ok(());
        }
        self.given = 0;
        if self.lent {
            return Ok(());
        }
        // SAFETY: the range is the buffer, to which no reference exists (`&mut self`).
        let dropped = unsafe { libc::madvise(self.aligned.as_ptr().cast(), SIZE, libc::MADV_DONTNEED) };
        if dropped == 0 { Ok(()) } else { Err(SysError::last("madvise(MADV_DONTNEED)", "a buffer")) }
    }
}

impl Drop for Gift {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), SIZE + ALIGN) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;

    #[test]
    fn lent_bytes_are_used_again() {
        let (reader, writer) = nix::unistd::pipe().expect("a pipe");
        let mut gift = Gift::new().expect("a buffer");
        assert!(gift.lend());
        gift.bytes()[..4096].fill(7);
        let mut rest = SIZE;
        while rest > 0 {
            gift.give(writer.as_fd(), 4096).expect("the pipe has room");
            assert!(gift.lend());
            let mut page = [0; 4096];
            (&File::from(reader.try_clone().expect("a copy")))
                .read_exact(&mut page)
                .expect("the pipe can be read");
            rest -= 4096;
        }
        assert_eq!(gift.bytes().len(), SIZE);
        assert!(gift.bytes()[..4096].iter().all(|&b| b == 7), "not dropped");
    }

    #[test]
    fn given_bytes_stay_when_the_buffer_is_used_again() {
        let (reader, writer) = nix::unistd::pipe().expect("a pipe");
        let mut gift = Gift::new().expect("a buffer");
        gift.bytes()[..8192].fill(1);
        gift.give(writer.as_fd(), 8192).expect("the pipe has room");
        gift.bytes()[..4096].fill(2);
        gift.give(writer.as_fd(), 4096).expect("the pipe has room");
        gift.bytes().fill(3);
        drop((gift, writer));
        let mut all = Vec::new();
        File::from(reader).read_to_end(&mut all).expect("the pipe can be read");
        assert_eq!(all.len(), 12288);
        assert!(all[..8192].iter().all(|&b| b == 1) && all[8192..].iter().all(|&b| b == 2));
    }
}
