//! Checksums of pages.
//!
//! The manifest has them by piece, because that is how they come in a stream: a piece is a record.
//! So a writer that stands behind the very process which read the pages takes over what that one
//! computed while it had them in the cache; any other writer reads what it has written again, on a thread of its own
//! beside the moving, and compares. Readers check piece by piece, at once and in any order, and of an older
//! checkpoint in a chain only what they need.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use ckpt_proto::{
    Image,
    stream::{Facts, StreamError, zero_pages, zero_ranges},
    types::{ManifestEntry, ManifestPiece},
};
use nix::fcntl::{FallocateFlags, fallocate};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{ImageError, recode};

/// Feeds `len` bytes of `file` from `offset` on to all `hashes`. The file's position does not move.
///
/// # Errors
/// The file's; that it is shorter is `UnexpectedEof`.
pub fn hash_range(file: impl AsFd, offset: u64, len: u64, hashes: &mut [&mut Xxh3Default]) -> io::Result<()> {
    // A duplicate of the descriptor, since reading at a place needs a File.
    let file = File::from(file.as_fd().try_clone_to_owned()?);
    in_parts(&file, offset, len, |_, bytes| {
        for hash in &mut *hashes {
            hash.update(bytes);
        }
    })
}

/// Reads `len` bytes of `file` from `offset` on; `each` gets part after part with its offset.
fn in_parts(file: &File, offset: u64, len: u64, mut each: impl FnMut(u64, &[u8])) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(1 << 18)];
    let mut done = 0;
    while done < len {
        let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..n], offset + done)?;
        each(offset + done, &buffer[..n]);
        done += n as u64;
    }
    Ok(())
}

/// A part of a pages file and its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file, bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// XXH3-64; `None` if nobody knows it.
    pub sum: Option<u64>,
}

/// The pieces of a pages file, as its manifest entry says; empty if it says nothing.
#[must_use]
pub fn pieces(entry: &ManifestEntry) -> Vec<Piece> {
    let mut offset = 0_u64;
    let piece = |p: &ManifestPiece| {
        let piece = Piece { offset, len: p.len, sum: p.xxh3 };
        offset = offset.saturating_add(p.len);
        piece
    };
    entry.pieces.iter().map(piece).collect()
}

/// The error for pages that are not what the manifest says.
pub(crate) fn changed(file: String) -> ImageError {
    ImageError::Manifest { file, what: "the contents have changed".to_owned() }
}

/// The error for pages that are not what the producer wrote.
#[must_use]
pub fn damaged(id: u64) -> StreamError {
    StreamError::Damaged { what: format!("{}: a checksum of its pages differs", Image::Pages.file_name(id)) }
}

/// Reading pages and comparing them, on a thread.
#[derive(Debug)]
pub struct Verification(JoinHandle<Result<(), ImageError>>);

impl Verification {
    /// Starts to compare each piece of a file, whose name is given for messages.
    ///
    /// # Errors
    /// There can't be one more thread.
    pub(crate) fn start(files: Vec<(File, String, Vec<Piece>)>) -> Result<Self, ImageError> {
        let work = move || {
            for (file, name, pieces) in files {
                for piece in pieces {
                    let Some(expected) = piece.sum else { continue };
                    let mut hash = Xxh3Default::new();
                    hash_range(&file, piece.offset, piece.len, &mut [&mut hash])
                        .map_err(ImageError::io(&name, "read"))?;
                    if hash.digest() != expected {
                        return Err(changed(name));
                    }
                }
            }
            Ok(())
        };
        recode::start(work).map(Self)
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// Pages differ, or can't be read.
    pub fn finish(self) -> Result<(), ImageError> {
        self.0.join().unwrap_or_else(|_| Err(panicked()))
    }
}

fn panicked() -> ImageError {
    ImageError::io("checksums", "thread")(io::Error::other("the thread has panicked"))
}

/// Least bytes of a piece that are one because they came as a record.
pub(crate) const MIN_PIECE: u64 = 256 << 10;
/// Most bytes of a piece that is made here.
const MAX_PIECE: u64 = 2 << 20;

enum Job {
    /// A record that is not looked at.
    Known { id: u64, len: u64, sum: u64 },
    /// Bytes to be read.
    Read { id: u64, file: Arc<File>, path: PathBuf, offset: u64, len: u64, facts: Facts },
}

type Sums = Result<BTreeMap<u64, Vec<ManifestPiece>>, ImageError>;

/// Gathers the checksums of pages files while they are being written.
pub(crate) struct Summer {
    jobs: Sender<Job>,
    thread: JoinHandle<Sums>,
    files: BTreeMap<u64, Arc<File>>,
}

impl Summer {
    /// Starts the thread.
    ///
    /// # Errors
    /// There can't be one more thread.
    pub(crate) fn start() -> Result<Self, ImageError> {
        let (jobs, queue) = channel();
        let thread = recode::start(move || work(&queue))?;
        Ok(Self { jobs, thread, files: BTreeMap::new() })
    }

    /// `len` bytes, whose checksum is `sum`, were appended to pages file `id`. Whether this was believed: not
    /// if they are too few to be a piece of their own.
    pub(crate) fn believe(&mut self, id: u64, len: u64, sum: u64) -> bool {
        if len < MIN_PIECE {
            return false;
        }
        // The thread ends early only with an error, which `finish` gives.
        let _ = self.jobs.send(Job::Known { id, len, sum });
        true
    }

    /// `len` bytes were appended at `offset` to pages file `id`, which is at `path`; their checksum is
    /// to be the one in `facts`, and then its pages of zeros become holes. A failure is told by [`Self::finish`].
    ///
    /// # Errors
    /// The file can't be opened for reading.
    pub(crate) fn add(
        &mut self,
        id: u64,
        path: PathBuf,
        offset: u64,
        len: u64,
        facts: Facts,
    ) -> Result<(), ImageError> {
        let file = match self.files.get(&id) {
            Some(file) => Arc::clone(file),
            None => {
                let file = Arc::new(
                    File::options()
                        .read(true)
                        .write(true)
                        .open(&path)
                        .map_err(ImageError::io(&path, "open"))?,
                );
                self.files.insert(id, Arc::clone(&file));
                file
            }
        };
        let _ = self.jobs.send(Job::Read { id, file, path, offset, len, facts });
        Ok(())
    }

    /// The checksums, when all is read.
    ///
    /// # Errors
    /// A file can't be read; pages differ from what was expected.
    pub(crate) fn finish(self) -> Sums {
        drop(self.jobs);
        self.thread.join().unwrap_or_else(|_| Err(panicked()))
    }
}

/// The pieces of a file so far.
#[derive(Default)]
struct Pieces {
    done: Vec<ManifestPiece>,
    /// The last one, which may grow.
    open: Xxh3Default,
    len: u64,
}

impl Pieces {
    fn close(&mut self) {
        if self.len > 0 {
            self.done.push(ManifestPiece { len: self.len, xxh3: Some(self.open.digest()) });
            (self.open, self.len) = (Xxh3Default::new(), 0);
        }
    }

    fn push(&mut self, len: u64, sum: u64) {
        self.close();
        self.done.push(ManifestPiece { len, xxh3: Some(sum) });
    }

    /// Reads bytes into pieces; gives their own checksum.
    fn read(&mut self, file: &File, mut offset: u64, len: u64, own: bool) -> io::Result<u64> {
        let mut record = Xxh3Default::new();
        if own && len >= MIN_PIECE {
            hash_range(file, offset, len, &mut [&mut record])?;
            self.push(len, record.digest());
            return Ok(record.digest());
        }
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(MAX_PIECE - self.len);
            in_parts(file, offset, n, |at, bytes| {
                self.open.update(bytes);
                if own {
                    record.update(bytes);
                } else {
                    // Nobody has looked for zeros yet.
                    punch_zeros(file, at, bytes.len() as u64, &zero_pages(bytes));
                }
            })?;
            self.len += n;
            offset += n;
            if self.len == MAX_PIECE {
                self.close();
            }
        }
        Ok(record.digest())
    }
}

/// Makes holes of the pages of zeros among the `len` bytes at `offset`. Not every file system can, and none
/// has to.
pub(crate) fn punch_zeros(file: &File, offset: u64, len: u64, zeros: &[u32]) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for (at, n) in zero_ranges(zeros).filter(|(at, n)| at + n <= len) {
        let (Ok(at), Ok(n)) = (i64::try_from(offset + at), i64::try_from(n)) else { continue };
        let _ = fallocate(file, flags, at, n);
    }
}

fn work(queue: &Receiver<Job>) -> Sums {
    let mut files: BTreeMap<u64, Pieces> = BTreeMap::new();
    for job in queue {
        match job {
            Job::Known { id, len, sum } => files.entry(id).or_default().push(len, sum),
            Job::Read { id, file, path, offset, len, facts } => {
                let pieces = files.entry(id).or_default();
                let sum = pieces
                    .read(&file, offset, len, facts.sum.is_some())
                    .map_err(ImageError::io(&path, "read"))?;
                if facts.sum.is_some_and(|expected| expected != sum) {
                    return Err(damaged(id).into());
                }
                if facts.sum.is_some() {
                    punch_zeros(&file, offset, len, &facts.zeros);
                }
            }
        }
    }
    let mut sums = BTreeMap::new();
    for (id, mut pieces) in files {
        pieces.close();
        sums.insert(id, pieces.done);
    }
    Ok(sums)
}
