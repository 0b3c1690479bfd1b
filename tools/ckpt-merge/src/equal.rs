//! Pages that are equal share their room, where the file system lets files do so (btrfs, XFS, bcachefs).
//!
//! All plain pages files of the chain and of the checkpoints beside it are read, and each page is looked up by its
//! hash (XXH3, 64 bits) among those that came before. What has the same hash is given to the kernel, in runs as
//! long as both sides go on alike, and the kernel compares the bytes before it lets the two share them: a wrong guess, or
//! a file that changes at the same time, costs nothing but the comparison. The contents of no file
//! change, so there is no order to keep, nothing to sync, and it can end at any instant.
//!
//! Memory: 24 bytes for each different page and what a hash table needs beside, some 10 MiB for each GiB of pages.
//!
//! Not chosen: writing the directories anew with what is equal left out. Pages of the same address that
//! a later checkpoint has again are freed anyhow ([`crate::dedup`]), and for others the format has no
//! way to say where they are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::Context;
use ckpt_proto::Image;
use ckpt_sys::dedupe::dedupe;
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use xxhash_rust::xxh3::xxh3_64;

const PAGE: u64 = 4096;
/// Pages that are read at a time.
const CHUNK: u64 = 256;
/// Most pages of one request: file systems compare a limited number in one go.
const MOST: u64 = 2048;

/// What was found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// Bytes of pages that share the room of equal ones now, whether they did before or not.
    pub bytes: u64,
    /// Whether a file system can't do it, so that its files were not even read.
    pub unsupported: bool,
}

/// Shares the room of equal pages of all checkpoints in `dirs`. `progress` is told of bytes read.
///
/// # Errors
/// A file can't be read or may not be changed.
pub fn share(dirs: &[PathBuf], progress: &mut dyn FnMut(u64)) -> anyhow::Result<Shared> {
    // Files share room within a file system only.
    let mut places: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut known = BTreeSet::new();
    for dir in dirs {
        for path in pages_files(dir)? {
            // One that goes away meanwhile is not missed.
            if let Ok(meta) = fs::metadata(&path)
                && known.insert((meta.dev(), meta.ino()))
            {
                places.entry(meta.dev()).or_default().push(path);
            }
        }
    }
    let mut all = Shared::default();
    for files in places.into_values() {
        let mut pages = Pages { files, seen: HashMap::new(), source: None, shared: 0 };
        match pages.share(progress) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => all.unsupported = true,
            Err(error) => return Err(error),
        }
        all.bytes += pages.shared;
    }
    Ok(all)
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<Errno>());
    // EINVAL: its blocks are larger than pages.
    matches!(errno, Some(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL))
}

/// Its plain pages files, in order.
fn pages_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let what = || dir.display().to_string();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(what)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.with_context(what)?;
        let image = entry.file_name().to_str().and_then(Image::parse_file_name);
        if matches!(image, Some((Image::Pages, _))) && entry.file_type().with_context(what)?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Where a page is: which file, and its number in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spot {
    file: u32,
    page: u64,
}

impl Spot {
    const fn after(self, pages: u64) -> Self {
        Self { page: self.page + pages, ..self }
    }
}

/// Pages that probably are those at `source`.
#[derive(Debug, Clone, Copy)]
struct Run {
    source: Spot,
    at: u64,
    pages: u64,
}

/// The pages of one file system.
struct Pages {
    files: Vec<PathBuf>,
    /// Where a page with this hash is first.
    seen: HashMap<u64, Spot>,
    /// The file that was shared with last.
    source: Option<(u32, File)>,
    shared: u64,
}

impl Pages {
    fn share(&mut self, progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
        for index in 0..self.files.len() {
            let path = self.files[index].clone();
            let what = || path.display().to_string();
            let file = match File::options().read(true).write(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.with_context(what)?,
            };
            // Nothing at all: whether it can be done.
            dedupe(file.as_fd(), 0, 0, file.as_fd(), 0).with_context(what)?;
            self.file(u32::try_from(index)?, &file, progress).with_context(what)?;
        }
        Ok(())
    }

    /// Looks at one file's pages, but for those in holes.
    fn file(&mut self, number: u32, file: &File, progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
        let mut buffer = Vec::new();
        let mut run: Option<Run> = None;
        let mut next = 0;
        while let Some((start, end)) = data_behind(file, next)? {
            // Whole pages, all of them that have data.
            let (mut page, last) = (start / PAGE, end.div_ceil(PAGE));
            while page < last {
                let count = (last - page).min(CHUNK);
                buffer.resize(usize::try_from(count * PAGE)?, 0);
                match file.read_exact_at(&mut buffer, page * PAGE) {
                    // No page file of ours, or one that is being cut.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return self.flush(file, run);
                    }
                    read => read.context("read")?,
                }
                for bytes in buffer.chunks_exact(usize::try_from(PAGE)?) {
                    run = self.page(file, Spot { file: number, page }, xxh3_64(bytes), run)?;
                    page += 1;
                }
                progress(count * PAGE);
            }
            next = end;
        }
        self.flush(file, run)
    }

    /// Goes on with `run` at `spot`; gives the run that goes on.
    fn page(&mut self, file: &File, spot: Spot, hash: u64, run: Option<Run>) -> anyhow::Result<Option<Run>> {
        let Some(&source) = self.seen.get(&hash) else {
            self.seen.insert(hash, spot);
            self.flush(file, run)?;
            return Ok(None);
        };
        match run {
            Some(run)
                if run.source.after(run.pages) == source
                    && run.at + run.pages == spot.page
                    && run.pages < MOST =>
            {
                Ok(Some(Run { pages: run.pages + 1, ..run }))
            }
            run => {
                self.flush(file, run)?;
                Ok(Some(Run { source, at: spot.page, pages: 1 }))
            }
        }
    }

    /// Has the kernel compare and share a run.
    fn flush(&mut self, file: &File, run: Option<Run>) -> anyhow::Result<()> {
        let Some(run) = run else { return Ok(()) };
        if self.source.as_ref().is_none_or(|(number, _)| *number != run.source.file) {
            let path = usize::try_from(run.source.file).ok().and_then(|index| self.files.get(index));
            let Some(path) = path else { return Ok(()) };
            match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                source => {
                    self.source = Some((run.source.file, source.with_context(|| path.display().to_string())?))
                }
            }
        }
        let Some((_, source)) = &self.source else { return Ok(()) };
        let mut done = 0;
        while done < run.pages {
            let (from, to) = ((run.source.page + done) * PAGE, (run.at + done) * PAGE);
            let bytes = dedupe(source.as_fd(), from, (run.pages - done) * PAGE, file.as_fd(), to)?;
            self.shared += bytes;
            // What differs is only the page that it stopped at.
            done += (bytes / PAGE).max(1);
        }
        Ok(())
    }
}

/// The next stretch of a file that is no hole, from `offset` on. `None` behind the last one.
fn data_behind(file: &File, offset: u64) -> anyhow::Result<Option<(u64, u64)>> {
    let start = match lseek(file, i64::try_from(offset)?, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(None),
        start => start.context("lseek(SEEK_DATA)")?,
    };
    let end = lseek(file, start, Whence::SeekHole).context("lseek(SEEK_HOLE)")?;
    Ok(Some((u64::try_from(start)?, u64::try_from(end)?)))
}
