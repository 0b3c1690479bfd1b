//! What the stages of a pipeline have in common: handing on what is not theirs.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use ckpt_proto::stream::{self, Frame, Reader, StreamError, Writer};
use ckpt_sys::transfer::transfer;
use nix::fcntl::{FcntlArg, fcntl};

use crate::ImageError;

/// Hands `frame`, the last one that `reader` returned, and its contents on to `writer` unchanged.
/// Pages move inside the kernel (splice(2)), everything else through a small buffer.
///
/// # Errors
/// The input's, or the output's: nobody reading the output (EPIPE) is one, since a stream that nobody
/// reads to its end is no checkpoint.
pub fn forward(
    reader: &mut Reader<File>,
    frame: &Frame,
    writer: &mut Writer<File>,
) -> Result<(), ImageError> {
    match frame {
        Frame::Data { arg, len, .. } if reader.bulk_input().is_some() => {
            let offset = reader.offset();
            writer.bulk_data(*arg, *len).map_err(|source| StreamError::Io { offset, source })?;
            forward_pages(reader, writer)
        }
        _ => Ok(stream::forward(reader, frame, writer)?),
    }
}

/// Hands on what is left of the current contents, announced in `writer` before. Only for pages.
///
/// # Errors
/// As [`forward`].
pub fn forward_pages(reader: &mut Reader<File>, writer: &mut Writer<File>) -> Result<(), ImageError> {
    let len = reader.pending();
    let Some(input) = reader.bulk_input() else { return Ok(()) };
    let moved = transfer(input.as_fd(), writer.output().as_fd(), len)
        .map_err(|source| ImageError::Transfer { file: "stream".to_owned(), source })?;
    reader.moved(moved);
    if moved < len { Err(reader.ended_in_bulk().into()) } else { Ok(()) }
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
