//! Contents of shared memory (shared anonymous mappings and memfds), which belong to no single task:
//! this process fills them through the descriptor before any task uses them.

use std::os::fd::BorrowedFd;

use anyhow::{Context, ensure};
use ckpt_images::{
    ImageSet,
    sums::{damaged, hash_range},
};
use ckpt_kinds::{fd::OpenFiles, mem::restore::Pages};
use ckpt_proto::Image;
use ckpt_sys::hugetlb;
use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, copy_file_range, splice},
    sys::uio::{pread, pwrite},
    unistd::{ftruncate, read},
};
use xxhash_rust::xxh3::Xxh3Default;

use crate::lazy::Lazy;

/// One segment.
#[derive(Debug)]
pub struct Segment {
    /// Its number.
    shmid: u64,
    /// What is stored of it; addresses are offsets.
    pub pages: Pages,
}

/// All segments with stored pages.
///
/// # Errors
/// Malformed images.
pub fn segments(set: &ImageSet) -> anyhow::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for arg in set.args(Image::ShmemPagemap) {
        let pages = Pages::read(set, Image::ShmemPagemap, arg)?;
        if pages.id.is_some() {
            segments.push(Segment { shmid: arg, pages });
        }
    }
    Ok(segments)
}

impl Segment {
    /// N of its `pages-N.img`.
    pub fn pages_id(&self) -> u64 {
        self.pages.id.unwrap_or(0)
    }

    fn memory<'a>(&self, files: &'a OpenFiles) -> anyhow::Result<Memory<'a>> {
        let name = Image::ShmemPagemap.file_name(self.shmid);
        let (fd, size) = files.shmem(self.shmid).with_context(|| format!("{name}: no such shared memory"))?;
        let end = self.pages.runs.last().map_or(0, |run| run.addr + run.len);
        ensure!(end <= size.next_multiple_of(4096), "{name}: pages up to {end:#x} in memory of {size} bytes");
        Ok(Memory { fd, huge: hugetlb::page_size(fd).context(name)? })
    }

    /// Pieces of the runs that hold bytes `from..from + len` of the pages file: (offset in the segment, length).
    fn pieces(&self, from: u64, len: u64) -> Vec<(u64, u64)> {
        let (mut at, end) = (0, from.saturating_add(len));
        let mut pieces = Vec::new();
        for run in &self.pages.runs {
            let (first, last) = (from.max(at), end.min(at + run.len));
            if first < last {
                pieces.push((run.addr + (first - at), last - first));
            }
            at += run.len;
        }
        pieces
    }

    /// Whole pages are stored, so the last one has made memory longer whose size is no multiple of that.
    ///
    /// # Errors
    /// The kernel's.
    pub fn trim(&self, files: &OpenFiles) -> anyhow::Result<()> {
        let (Some((fd, size)), false) = (files.shmem(self.shmid), self.pages.runs.is_empty()) else {
            return Ok(());
        };
        ftruncate(fd, i64::try_from(size).context("size of shared memory")?)
            .context("ftruncate(shared memory)")
    }

    /// Fills it from the image directory.
    ///
    /// # Errors
    /// Images, or the kernel.
    pub fn fill_from_set(&self, set: &ImageSet, files: &OpenFiles) -> anyhow::Result<()> {
        self.pages.check_files(set)?;
        let memory = self.memory(files)?;
        for run in &self.pages.runs {
            let place = set.pages_in(run.file).context("a pages file is missing")?;
            let mut from = i64::try_from(place.offset + run.offset).context("offset of pages")?;
            let mut to = i64::try_from(run.addr).context("offset in shared memory")?;
            let mut left = run.len;
            let mut buffer = memory.buffer(1 << 20);
            while left > 0 {
                let want = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 20);
                let n = if buffer.is_empty() {
                    match copy_file_range(place.file, Some(&mut from), memory.fd, Some(&mut to), want) {
                        Ok(n) => n,
                        // Not between these two file systems.
                        Err(_) => {
                            buffer.resize(1 << 20, 0);
                            continue;
                        }
                    }
                } else {
                    let n = pread(place.file, &mut buffer[..want], from).context("read pages")?;
                    memory.write(to, &buffer[..n])?;
                    from += i64::try_from(n)?;
                    to += i64::try_from(n)?;
                    n
                };
                ensure!(n > 0, "{} ends early", Image::Pages.file_name(self.pages_id()));
                left = left.saturating_sub(n as u64);
            }
        }
        Ok(())
    }

    /// Fills it with what `lazy` reads: shared memory is complete before anybody runs.
    ///
    /// # Errors
    /// Images, or the kernel.
    pub fn fill_from(&self, lazy: &mut Lazy, files: &OpenFiles) -> anyhow::Result<()> {
        let memory = self.memory(files)?;
        for run in &self.pages.runs {
            lazy.for_each(run, |addr, bytes| {
                memory.write(i64::try_from(addr).context("offset in shared memory")?, bytes)
            })?;
        }
        Ok(())
    }

    /// Fills it with the next `len` bytes of a stream, which are bytes `from..` of its pages.
    ///
    /// # Errors
    /// More bytes than there is room for; the input's.
    pub fn fill_from_stream(
        &self,
        input: BorrowedFd<'_>,
        from: u64,
        len: u64,
        files: &OpenFiles,
    ) -> anyhow::Result<()> {
        let memory = self.memory(files)?;
        let name = Image::Pages.file_name(self.pages_id());
        let pieces = self.pieces(from, len);
        let sum: u64 = pieces.iter().map(|(_, len)| len).sum();
        ensure!(sum == len, "{name}: more pages on the stream than the pagemap lists");
        for (offset, mut left) in pieces {
            let mut to = i64::try_from(offset).context("offset in shared memory")?;
            let mut buffer = memory.buffer(1 << 16);
            while left > 0 {
                let want = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 20);
                let n = if buffer.is_empty() {
                    match splice(input, None, memory.fd, Some(&mut to), want, SpliceFFlags::empty()) {
                        Ok(n) => n,
                        Err(Errno::EINTR) => continue,
                        // The input is no pipe.
                        Err(_) => {
                            buffer.resize(1 << 16, 0);
                            continue;
                        }
                    }
                } else {
                    let want = want.min(buffer.len());
                    let n = read(input, &mut buffer[..want]).context("read the stream")?;
                    memory.write(to, &buffer[..n])?;
                    to += i64::try_from(n)?;
                    n
                };
                ensure!(n > 0, "{name}: the stream ends inside it");
                left = left.saturating_sub(n as u64);
            }
        }
        Ok(())
    }

    /// Compares bytes `from..` of its pages, `len` of them, with their checksum.
    ///
    /// # Errors
    /// They differ, or can't be read.
    pub fn check_filled(&self, from: u64, len: u64, files: &OpenFiles, expected: u64) -> anyhow::Result<()> {
        let memory = self.memory(files)?;
        let mut hash = Xxh3Default::new();
        for (offset, len) in self.pieces(from, len) {
            hash_range(memory.fd, offset, len, &mut [&mut hash]).context("read shared memory")?;
        }
        ensure!(hash.digest() == expected, damaged(self.pages_id()));
        Ok(())
    }
}

/// The memory of a segment, open for reading and writing.
#[derive(Debug, Clone, Copy)]
struct Memory<'a> {
    fd: BorrowedFd<'a>,
    /// The size of its pages, if they are huge: to be written by mapping alone.
    huge: Option<u64>,
}

impl Memory<'_> {
    /// What its contents have to pass through; empty if the kernel may be able to do without.
    fn buffer(self, size: usize) -> Vec<u8> {
        vec![0; if self.huge.is_some() { size } else { 0 }]
    }

    fn write(self, mut at: i64, mut bytes: &[u8]) -> anyhow::Result<()> {
        let what = "write shared memory";
        if let Some(page) = self.huge {
            return match hugetlb::write(self.fd, page, u64::try_from(at).context(what)?, bytes) {
                Err(error) if error.errno == Errno::ENOSPC => {
                    Err(hugetlb::too_few(format!("{what}: {error}"), page).into())
                }
                written => written.context(what),
            };
        }
        while !bytes.is_empty() {
            let n = pwrite(self.fd, bytes, at).context(what)?;
            ensure!(n > 0, "{what}: nothing was written");
            at += i64::try_from(n)?;
            bytes = &bytes[n..];
        }
        Ok(())
    }
}
