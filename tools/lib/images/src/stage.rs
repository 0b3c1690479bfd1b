//! What the stages of a pipeline have in common: handing on what is not theirs.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
};

use ckpt_proto::{
    Image,
    stream::{self, Facts, Frame, Reader, StreamError, Writer},
};
pub use ckpt_sys::transfer::grow_pipe;
use ckpt_sys::transfer::transfer;
use nix::{
    errno::Errno,
    sys::uio::pread,
    unistd::{Whence, lseek},
};

use crate::{
    ImageError, ImageSet, PageRun, PagesFile, Place,
    pack::PackedFile,
    sums::{Piece, changed},
};

/// Hands `frame`, the last one that `reader` returned, and its contents on to `writer` unchanged.
/// Pages move inside the kernel (splice(2)), everything else through a small buffer.
///
/// # Errors
/// The input's, or the output's: nobody reading the output (EPIPE) is one, since a stream that nobody
/// reads to its end is no checkpoint.
pub fn forward<W: Write + AsFd>(
    reader: &mut Reader<File>,
    frame: &Frame,
    writer: &mut Writer<W>,
) -> Result<(), ImageError> {
    match frame {
        Frame::Data { image, arg, len, sum, zeros } if reader.bulk_input().is_some() => {
            let offset = reader.offset();
            let facts = Facts { sum: *sum, zeros: zeros.clone() };
            writer
                .bulk_named(image, *arg, *len, facts)
                .map_err(|source| StreamError::Io { offset, source })?;
            forward_pages(reader, writer)
        }
        _ => Ok(stream::forward(reader, frame, writer)?),
    }
}

/// Hands on what is left of the current contents, announced in `writer` before. Only for pages.
///
/// # Errors
/// As [`forward`].
pub fn forward_pages<W: Write + AsFd>(
    reader: &mut Reader<File>,
    writer: &mut Writer<W>,
) -> Result<(), ImageError> {
    let len = reader.pending();
    let offset = reader.offset();
    let Some(input) = reader.bulk_input() else { return Ok(()) };
    writer.output().flush().map_err(|source| StreamError::Io { offset, source })?;
    let moved = transfer(input.as_fd(), writer.output().as_fd(), len)
        .map_err(|source| ImageError::Transfer { file: "stream".to_owned(), source })?;
    reader.moved(moved);
    if moved < len { Err(reader.ended_in_bulk().into()) } else { Ok(()) }
}

/// Bytes of pages in a record.
const RECORD: u64 = 4 << 20;

/// How the pages of a file are told from damaged ones.
#[derive(Debug, Clone, Copy)]
pub enum Check<'a> {
    /// They are read, compared with these checksums (none, if nobody knows any), and get some in the stream.
    Read(&'a [Piece]),
    /// They are not read, and the stream gets these checksums as they are.
    Trust(&'a [Piece]),
}

/// Writes a pages file to a stream, in records with a checksum each. `progress` is told of each record's
/// bytes. A thread reads ahead for the checksums.
///
/// # Errors
/// The file's, the output's, or the file is not what it should be. Pages may have been written,
/// so the stream must not get an end record.
pub fn write_pages(
    out: &mut Writer<File>,
    id: u64,
    place: Place<'_>,
    check: Check<'_>,
    mut progress: impl FnMut(u64),
) -> Result<(), ImageError> {
    let (Check::Read(pieces) | Check::Trust(pieces)) = check;
    let records = records(pieces, place.len);
    if let Check::Trust(_) = check {
        let facts = |record: &Piece| Ok(Facts { sum: record.sum, zeros: Vec::new() });
        return write_records(out, id, place, &records, facts, &mut progress);
    }
    let name = || Image::Pages.file_name(id);
    // Not far ahead, so that what was read for the checksum is still in the processor's cache.
    let (send, ahead) = std::sync::mpsc::sync_channel::<io::Result<Facts>>(2);
    let records = &records[..];
    std::thread::scope(move |scope| {
        // Dropped with this block: then the thread, which the scope waits for, does not go on.
        let ahead = ahead;
        let read = move || {
            let mut buffer = Vec::new();
            for record in records {
                let facts = look(place, *record, &mut buffer);
                let failed = facts.is_err();
                if send.send(facts).is_err() || failed {
                    break;
                }
            }
        };
        std::thread::Builder::new()
            .name("checksums".to_owned())
            .spawn_scoped(scope, read)
            .map_err(ImageError::io(name(), "start a thread"))?;
        let facts = |record: &Piece| {
            let ended = || io::Error::other("the thread has ended");
            let facts =
                ahead.recv().unwrap_or_else(|_| Err(ended())).map_err(ImageError::io(name(), "read"))?;
            if record.sum.is_some() && record.sum != facts.sum {
                return Err(changed(name()));
            }
            Ok(facts)
        };
        write_records(out, id, place, records, facts, &mut progress)
    })
}

/// The records that a pages file of `len` bytes is written in: its pieces, if they are known.
fn records(pieces: &[Piece], len: u64) -> Vec<Piece> {
    let known = pieces.last().map_or(0, |piece| piece.offset + piece.len) == len;
    if known && pieces.iter().all(|piece| piece.len <= 4 * RECORD) {
        return pieces.to_vec();
    }
    let starts = (0..len).step_by(usize::try_from(RECORD).unwrap_or(1));
    starts.map(|offset| Piece { offset, len: (len - offset).min(RECORD), sum: None }).collect()
}

fn look(place: Place<'_>, record: Piece, buffer: &mut Vec<u8>) -> io::Result<Facts> {
    buffer.resize(usize::try_from(record.len).unwrap_or(0), 0);
    read_place(Place { offset: place.offset + record.offset, len: record.len, ..place }, buffer)?;
    Ok(Facts::of(buffer))
}

/// A stretch of a pages file, spliced in records. `facts` tells of each what its header says.
fn write_records(
    out: &mut Writer<File>,
    id: u64,
    place: Place<'_>,
    records: &[Piece],
    mut facts: impl FnMut(&Piece) -> Result<Facts, ImageError>,
    progress: &mut impl FnMut(u64),
) -> Result<(), ImageError> {
    let name = || Image::Pages.file_name(id);
    let bad = |what: &str| ImageError::Stream { file: name(), what: what.to_owned() };
    let start = i64::try_from(place.offset).map_err(|_| bad("the offset is out of range"))?;
    lseek(place.file, start, Whence::SeekSet).map_err(ImageError::errno(name(), "lseek"))?;
    for record in records {
        out.bulk_data(id, record.len, facts(record)?).map_err(ImageError::output)?;
        let moved = transfer(place.file, out.output().as_fd(), record.len)
            .map_err(|source| ImageError::Transfer { file: name(), source })?;
        if moved < record.len {
            return Err(bad("the file shrank while it was being read"));
        }
        progress(record.len);
    }
    Ok(())
}

/// Writes the pages of an incremental checkpoint to a stream, from the files that have them, as contents
/// of `pages-ID.img`. Long runs are spliced; short ones, of which a chain has many, are gathered, and so is what is
/// compressed.
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
    const GATHER: u64 = 1 << 20;
    let mut gathered: Vec<u8> = Vec::new();
    let mut packed: BTreeMap<PagesFile, PackedFile> = BTreeMap::new();
    let flush = |out: &mut Writer<File>, gathered: &mut Vec<u8>| {
        let written = if gathered.is_empty() { Ok(()) } else { out.data(Image::Pages, id, gathered) };
        gathered.clear();
        written.map_err(ImageError::output)
    };
    for run in runs {
        let name = || Image::Pages.file_name(run.file.id);
        let whole = set.pages_in(run.file);
        if let Some(whole) = whole.filter(|_| run.len >= SHORT) {
            flush(out, &mut gathered)?;
            let place = Place { offset: whole.offset + run.offset, len: run.len, ..whole };
            let mut buffer = Vec::new();
            let facts =
                |record: &Piece| look(place, *record, &mut buffer).map_err(ImageError::io(name(), "read"));
            write_records(out, id, place, &records(&[], run.len), facts, &mut progress)?;
            continue;
        }
        let mut done = 0;
        while done < run.len {
            let at = gathered.len();
            let len = (run.len - done).min(GATHER);
            gathered.resize(at + usize::try_from(len).unwrap_or(0), 0);
            let (bytes, offset) = (&mut gathered[at..], run.offset + done);
            if let Some(whole) = whole {
                let place = Place { offset: whole.offset + offset, len, ..whole };
                read_place(place, bytes).map_err(ImageError::io(name(), "pread"))?;
            } else {
                let file = match packed.entry(run.file) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(file) => file.insert(
                        set.packed_in(run.file)?.ok_or_else(|| ImageError::Missing { file: name() })?,
                    ),
                };
                file.read_exact_at(bytes, offset)?;
            }
            progress(len);
            done += len;
            if gathered.len() as u64 >= GATHER {
                flush(out, &mut gathered)?;
            }
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
