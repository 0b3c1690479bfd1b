//! Checksums of pages.
//!
//! Pages move inside the kernel, so whoever wants their checksum reads them again, while they are
//! still in the page cache. The writer does that on a thread of its own beside the moving.

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
    thread::{self, JoinHandle},
};

use ckpt_proto::{Image, stream::StreamError};
use xxhash_rust::xxh3::Xxh3Default;

use crate::ImageError;

/// Feeds `len` bytes of `file` from `offset` on to all `hashes`. The file's position does not move.
///
/// # Errors
/// The file's; that it is shorter is `UnexpectedEof`.
pub fn hash_range(file: impl AsFd, offset: u64, len: u64, hashes: &mut [&mut Xxh3Default]) -> io::Result<()> {
    // A duplicate of the descriptor, since reading at a place needs a File.
    let file = File::from(file.as_fd().try_clone_to_owned()?);
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(1 << 18)];
    let mut done = 0;
    while done < len {
        let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..n], offset + done)?;
        for hash in &mut *hashes {
            hash.update(&buffer[..n]);
        }
        done += n as u64;
    }
    Ok(())
}

/// The error for pages that are not what the producer wrote.
#[must_use]
pub fn damaged(id: u64) -> StreamError {
    StreamError::Damaged { what: format!("{}: a checksum of its pages differs", Image::Pages.file_name(id)) }
}

struct Job {
    id: u64,
    file: Arc<File>,
    path: PathBuf,
    offset: u64,
    len: u64,
    expected: Option<u64>,
}

type Sums = Result<BTreeMap<u64, u64>, ImageError>;

/// Computes the checksums of pages files while they are being written.
#[derive(Debug)]
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
    pub(crate) fn start() -> io::Result<Self> {
        let (jobs, queue) = channel();
        let thread = thread::Builder::new().name("checksums".to_owned()).spawn(move || work(&queue))?;
        Ok(Self { jobs, thread, files: BTreeMap::new() })
    }

    /// `len` bytes were appended at `offset` to pages file `id`, which is at `path`; their checksum is
    /// to be `expected`. A failure is told by [`Self::finish`].
    ///
    /// # Errors
    /// The file can't be opened for reading.
    pub(crate) fn add(
        &mut self,
        id: u64,
        path: PathBuf,
        offset: u64,
        len: u64,
        expected: Option<u64>,
    ) -> Result<(), ImageError> {
        let file = match self.files.get(&id) {
            Some(file) => Arc::clone(file),
            None => {
                let file = Arc::new(File::open(&path).map_err(ImageError::io(&path, "open"))?);
                self.files.insert(id, Arc::clone(&file));
                file
            }
        };
        // The thread ends early only with an error, which `finish` gives.
        let _ = self.jobs.send(Job { id, file, path, offset, len, expected });
        Ok(())
    }

    /// The checksums, when all is read.
    ///
    /// # Errors
    /// A file can't be read; pages differ from what was expected.
    pub(crate) fn finish(self) -> Sums {
        drop(self.jobs);
        self.thread.join().unwrap_or_else(|_| {
            Err(ImageError::io("checksums", "thread")(io::Error::other("the thread has panicked")))
        })
    }
}

fn work(queue: &Receiver<Job>) -> Sums {
    let mut files: BTreeMap<u64, Xxh3Default> = BTreeMap::new();
    for job in queue {
        let mut frame = Xxh3Default::new();
        let whole = files.entry(job.id).or_default();
        hash_range(&*job.file, job.offset, job.len, &mut [whole, &mut frame])
            .map_err(ImageError::io(&job.path, "read"))?;
        if job.expected.is_some_and(|sum| sum != frame.digest()) {
            return Err(damaged(job.id).into());
        }
    }
    Ok(files.into_iter().map(|(id, hash)| (id, hash.digest())).collect())
}
