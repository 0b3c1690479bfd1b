//! The rings of packet sockets (Documentation/networking/packet_mmap.rst): memory that the kernel and whoever maps the
//! socket write at the same time.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::errno::Errno;

use crate::SysError;

/// A mapped ring. Offsets beyond its end are EFAULT.
#[derive(Debug)]
pub struct RingMemory {
    at: NonNull<u8>,
    len: usize,
}

impl RingMemory {
    /// Maps all rings of a socket, `len` bytes together.
    ///
    /// # Errors
    /// EINVAL: that is not their size. EACCES and others of mmap(2).
    pub fn map(fd: BorrowedFd<'_>, len: usize) -> Result<Self, SysError> {
        let what = || format!("{len} bytes of a packet socket's ring");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(SysError::last("mmap", what()));
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| SysError::new("mmap", what(), Errno::ENOMEM))?;
        Ok(Self { at, len })
    }

    fn place(&self, offset: usize, len: usize) -> Result<NonNull<u8>, SysError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            let what = format!("{len} bytes at {offset} of a ring of {}", self.len);
            return Err(SysError::new("access", what, Errno::EFAULT));
        }
        // SAFETY: `offset` lies in the mapping, which is one object.
        Ok(unsafe { self.at.add(offset) })
    }

    fn atomic(&self, offset: usize) -> Result<&AtomicU32, SysError> {
        let place = self.place(offset, 4)?;
        if !offset.is_multiple_of(4) {
            return Err(SysError::new("access", format!("offset {offset} of a ring"), Errno::EINVAL));
        }
        // SAFETY: `place` has seen to it that the word is in the mapping, which begins at a page and lives as long as
        // `self`; whoever else writes there, the kernel included, does so by whole words.
        Ok(unsafe { place.cast::<AtomicU32>().as_ref() })
    }

    /// A word. What was written before it by others is seen after it.
    ///
    /// # Errors
    /// EFAULT, EINVAL: beyond the end, or not aligned.
    pub fn word(&self, offset: usize) -> Result<u32, SysError> {
        Ok(self.atomic(offset)?.load(Ordering::Acquire))
    }

    /// Sets a word, after what was written before.
    ///
    /// # Errors
    /// As of [`Self::word`].
    pub fn set_word(&self, offset: usize, value: u32) -> Result<(), SysError> {
        self.atomic(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Copies bytes out. Those that the kernel writes meanwhile may be of both times.
    ///
    /// # Errors
    /// EFAULT: beyond the end.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> Result<(), SysError> {
        let place = self.place(offset, buffer.len())?;
        // SAFETY: `place` has seen to it that all of it is in the mapping, which `buffer` is no part of.
        unsafe { place.copy_to_nonoverlapping(NonNull::from(&mut *buffer).cast(), buffer.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// EFAULT: beyond the end.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), SysError> {
        let place = self.place(offset, bytes.len())?;
        // SAFETY: as in `read`.
        unsafe { place.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
        Ok(())
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: `map` made the mapping with this size, and nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}
