//! Moving bytes between descriptors inside the kernel: splice(2) where one side is a pipe,
//! copy_file_range(2) between files, and a buffer where neither is possible.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SpliceFFlags, copy_file_range, fcntl, splice},
    unistd::{read, write},
};

use crate::{SysError, gift::Lending};

/// Moves up to `len` bytes from `from` to `to` (both at their file positions); returns how many
/// bytes came, which is less than `len` only if `from` ended.
///
/// # Errors
/// Of the last way tried; EPIPE if nobody reads `to`.
pub fn transfer(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: u64) -> Result<u64, SysError> {
    const CHUNK: usize = 1 << 20;
    #[derive(Clone, Copy)]
    enum Way {
        Splice,
        Range,
        Buffer,
    }
    let mut way = Way::Splice;
    let mut moved = 0;
    let mut buffer = Vec::new();
    while moved < len {
        let want = usize::try_from(len - moved).unwrap_or(usize::MAX).min(CHUNK);
        let (call, result) = match way {
            Way::Splice => ("splice", splice(from, None, to, None, want, SpliceFFlags::SPLICE_F_MOVE)),
            Way::Range => ("copy_file_range", copy_file_range(from, None, to, None, want)),
            Way::Buffer => {
                buffer.resize(want, 0);
                ("read", read(from, &mut buffer))
            }
        };
        match result {
            Ok(0) => break,
            Ok(n) => {
                if let Way::Buffer = way {
                    write_all(to, &buffer[..n])?;
                }
                moved += n as u64;
            }
            Err(Errno::EINTR) => {}
            Err(errno) if is_no_way(errno) && !matches!(way, Way::Buffer) => {
                way = if matches!(way, Way::Splice) { Way::Range } else { Way::Buffer };
            }
            Err(errno) => return Err(SysError::new(call, format!("after {moved} of {len} bytes"), errno)),
        }
    }
    Ok(moved)
}

/// Whether the kernel answers so where it can't move bytes between two files by itself: not these, not this kernel, or not
/// this process (a seccomp filter; a file that may only be appended to).
#[must_use]
pub fn is_no_way(errno: Errno) -> bool {
    use Errno::{EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EXDEV};
    matches!(errno, EINVAL | EXDEV | EOPNOTSUPP | EBADF | ENOSYS | EPERM)
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), SysError> {
    while !bytes.is_empty() {
        match write(to, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(SysError::new("write", format!("{} bytes", bytes.len()), errno)),
        }
    }
    Ok(())
}

/// Makes a pipe hold a mebibyte, so that stages run side by side instead of taking turns. Anything but a
/// pipe is left alone; a size that the user may not have (`fs.pipe-max-size`, `pipe-user-pages-soft`)
/// is halved and tried again.
pub fn grow_pipe(fd: BorrowedFd<'_>) {
    let Ok(now) = fcntl(fd, FcntlArg::F_GETPIPE_SZ) else { return };
    let mut size = 1 << 20;
    while size > now && fcntl(fd, FcntlArg::F_SETPIPE_SZ(size)).is_err() {
        size /= 2;
    }
}

/// A tool's output: small writes are gathered, large ones go straight through, and the descriptor
/// can be had for splice(2) after a flush.
#[derive(Debug)]
pub struct Output {
    file: File,
    buffer: Vec<u8>,
    lending: Option<Box<dyn Lending>>,
}

impl Output {
    /// Takes the output over, and enlarges it if it is a pipe.
    #[must_use]
    pub fn new(file: File) -> Self {
        grow_pipe(file.as_fd());
        Self { file, buffer: Vec::with_capacity(1 << 16), lending: None }
    }

    /// Where `lending` tells, memory that is given to the output is used again.
    #[must_use]
    pub fn lending(mut self, lending: impl Lending + 'static) -> Self {
        self.lending = Some(Box::new(lending));
        self
    }

    /// What tells when memory that was given to the output may be used again, if anything does.
    #[must_use]
    pub fn lent(&self) -> Option<&dyn Lending> {
        self.lending.as_deref().filter(|lending| lending.known())
    }

    /// The descriptor behind it; bytes that were not flushed are lost.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > self.buffer.capacity() {
            self.flush()?;
        }
        if bytes.len() >= self.buffer.capacity() {
            return self.file.write(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
