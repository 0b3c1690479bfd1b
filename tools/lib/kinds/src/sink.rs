//! Where dumped entries go.

use std::{
    io::Write,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::Context;
use ckpt_proto::{Image, Message, stream};
use ckpt_sys::transfer::transfer;

/// Takes image entries and their raw contents, in stream order: an entry, then its contents, then
/// the next entry of the same image.
pub trait Sink {
    /// One image message.
    ///
    /// # Errors
    /// The output's.
    fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> anyhow::Result<()>;

    /// Raw contents of the entry given last for this image.
    ///
    /// # Errors
    /// The output's.
    fn data(&mut self, image: Image, arg: u64, bytes: &[u8]) -> anyhow::Result<()>;

    /// `len` bytes read from `from` as raw contents.
    ///
    /// # Errors
    /// The output's; `from` ending early is one.
    fn data_from(&mut self, image: Image, arg: u64, from: BorrowedFd<'_>, len: u64) -> anyhow::Result<()>;
}

/// Encodes and emits one message.
///
/// # Errors
/// The sink's.
pub fn emit(sink: &mut dyn Sink, image: Image, arg: u64, message: &impl Message) -> anyhow::Result<()> {
    sink.entry(image, arg, &message.encode_to_vec())
}

impl<W: Write + AsFd> Sink for stream::Writer<W> {
    fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> anyhow::Result<()> {
        Self::entry(self, image, arg, message).context("write the stream")
    }

    fn data(&mut self, image: Image, arg: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Self::data(self, image, arg, bytes).context("write the stream")
    }

    fn data_from(&mut self, image: Image, arg: u64, from: BorrowedFd<'_>, len: u64) -> anyhow::Result<()> {
        let short = |n: u64| anyhow::anyhow!("{}: {n} of {len} bytes could be read", image.file_name(arg));
        if image == Image::Pages {
            self.bulk_data(arg, len, stream::Facts::default()).context("write the stream")?;
            self.output().flush().context("write the stream")?;
            let moved = transfer(from, self.output().as_fd(), len).context("write the stream")?;
            return if moved == len { Ok(()) } else { Err(short(moved)) };
        }
        // The checksum covers these bytes, so they pass through memory.
        self.data_header(image.name(), arg, len).context("write the stream")?;
        let mut left = len;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            match nix::unistd::read(from, &mut buffer[..want]) {
                Ok(0) => return Err(short(len - left)),
                Ok(n) => {
                    self.data_bytes(&buffer[..n]).context("write the stream")?;
                    left -= n as u64;
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => {
                    return Err(errno).context(format!("read contents of {}", image.file_name(arg)));
                }
            }
        }
        Ok(())
    }
}
