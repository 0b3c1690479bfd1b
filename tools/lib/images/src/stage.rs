//! What the stages of a pipeline have in common: handing on what is not theirs.

use std::{fs::File, io, os::fd::AsFd};

use ckpt_proto::{
    Image,
    stream::{self, Frame, Reader, StreamError, Writer},
};
pub use ckpt_sys::transfer::grow_pipe;
use ckpt_sys::transfer::transfer;
use nix::{
    errno::Errno,
    sys::uio::pread,
    unistd::{Whence, lseek},
};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{ImageError, ImageSet, PageRun, Place, sums::hash_range};

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
        Frame::Data { arg, len, sum, .. } if reader.bulk_input().is_some() => {
            let offset = reader.offset();
            writer.bulk_data(*arg, *len, *sum).map_err(|source| StreamError::Io { offset, source })?;
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

/// Writes a pages file to a stream, in records with a checksum each. `expected` is the checksum of
/// the whole; `progress` is told of each record's bytes.
///
/// # Errors
/// The file's, the output's, or the file is not what it should be: then pages have been written that must
/// not be used, so the stream must not get an end record.
pub fn write_pages(
    out: &mut Writer<File>,
    id: u64,
    place: Place<'_>,
    expected: Option<u64>,
    mut progress: impl FnMut(u64),
) -> Result<(), ImageError> {
    let mut whole = Xxh3Default::new();
    write_records(out, id, place, &mut whole, &mut progress)?;
    if expected.is_some_and(|sum| sum != whole.digest()) {
        return Err(ImageError::Manifest {
            file: Image::Pages.file_name(id),
            what: "the contents have changed".to_owned(),
        });
    }
    Ok(())
}

/// A stretch of a pages file, spliced in records with a checksum each; all of it goes into `whole`.
fn write_records(
    out: &mut Writer<File>,
    id: u64,
    place: Place<'_>,
    whole: &mut Xxh3Default,
    progress: &mut impl FnMut(u64),
) -> Result<(), ImageError> {
    const RECORD: u64 = 64 << 20;
    let name = || Image::Pages.file_name(id);
    let bad = |what: &str| ImageError::Stream { file: name(), what: what.to_owned() };
    let start = i64::try_from(place.offset).map_err(|_| bad("the offset is out of range"))?;
    lseek(place.file, start, Whence::SeekSet).map_err(ImageError::errno(name(), "lseek"))?;
    let mut left = place.len;
    while left > 0 {
        let len = left.min(RECORD);
        let mut record = Xxh3Default::new();
        hash_range(place.file, place.offset + place.len - left, len, &mut [&mut record, whole])
            .map_err(ImageError::io(name(), "read"))?;
        out.bulk_data(id, len, Some(record.digest())).map_err(ImageError::io("stream", "write"))?;
        let moved = transfer(place.file, out.output().as_fd(), len)
            .map_err(|source| ImageError::Transfer { file: name(), source })?;
        if moved < len {
            return Err(bad("the file shrank while it was being read"));
        }
        left -= len;
        progress(len);
    }
    Ok(())
}

/// Writes the pages of an incremental checkpoint to a stream, from the files that have them, as contents
/// of `pages-ID.img`. Long runs are spliced; short ones, of which a chain has many, are gathered.
///
/// # Errors
/// The files', the output's.
pub fn write_runs(
    out: &mut Writer<File>,
    id: u64,
    set: &ImageSet,
    runs: &[PageRun],
    mut progress: impl FnMut(u64),
) -> Result<(), ImageError> {
    const SHORT: u64 = 1 << 18;
    const GATHER: usize = 1 << 20;
    let mut gathered: Vec<u8> = Vec::new();
    let flush = |out: &mut Writer<File>, gathered: &mut Vec<u8>| {
        let written = if gathered.is_empty() { Ok(()) } else { out.data(Image::Pages, id, gathered) };
        gathered.clear();
        written.map_err(ImageError::io("stream", "write"))
    };
    for run in runs {
        let name = || Image::Pages.file_name(run.file.id);
        let whole = set.pages_in(run.file).ok_or_else(|| ImageError::Missing { file: name() })?;
        let place = Place { offset: whole.offset + run.offset, len: run.len, ..whole };
        if run.len >= SHORT {
            flush(out, &mut gathered)?;
            write_records(out, id, place, &mut Xxh3Default::new(), &mut progress)?;
            continue;
        }
        let at = gathered.len();
        let len = usize::try_from(run.len).unwrap_or(0);
        gathered.resize(at + len, 0);
        read_place(place, &mut gathered[at..]).map_err(ImageError::io(name(), "pread"))?;
        progress(run.len);
        if gathered.len() >= GATHER {
            flush(out, &mut gathered)?;
        }
    }
    flush(out, &mut gathered)
}

fn read_place(place: Place<'_>, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let offset = i64::try_from(place.offset + done as u64).map_err(io::Error::other)?;
        match pread(place.file, &mut bytes[done..], offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
