//! Deleted files: their contents go into the images, with their holes, and come back without a name.

use std::{
    collections::HashMap,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image, Message,
    types::{GhostChunkEntry, GhostFileEntry, RegFileEntry, Timeval},
};
use ckpt_sys::{FileId, Refused, file, hugetlb};
use nix::{
    sys::stat::{FileStat, Mode, SFlag},
    unistd::{Whence, lseek64},
};

use super::{Found, UNNAMED, printable};
use crate::{
    Sink,
    fd::{
        Opening,
        dump::{file_type, kernel_dev, path, reopen, self_path},
    },
    sink::emit,
};

const DEFAULT_GHOST_LIMIT: u64 = 1 << 20;
/// Largest piece of a deleted file in one DATA record, bytes.
const GHOST_PIECE: u64 = 1 << 20;

/// Deleted files met so far.
#[derive(Debug, Default)]
pub(in crate::fd) struct Remaps {
    ghosts: HashMap<(u64, u64), u32>,
    files: Vec<(u32, FileStat, Option<OwnedFd>, String)>,
}

impl Remaps {
    /// Notes a deleted file; returns its number. Its contents are written by [`Self::finish`].
    pub(super) fn ghost(&mut self, found: &Found<'_>, limit: u64) -> anyhow::Result<u32> {
        let key = (found.stat.st_dev, found.stat.st_ino);
        if let Some(&id) = self.ghosts.get(&key) {
            return Ok(id);
        }
        let limit = if limit == 0 { DEFAULT_GHOST_LIMIT } else { limit };
        let stored = found.stat.st_blocks.cast_unsigned() * 512;
        let content = match file_type(found.stat) {
            SFlag::S_IFREG if stored > limit.next_multiple_of(4096) => {
                let reason = format!(
                    "{}: a deleted file of {stored} bytes; up to {limit} go into the images",
                    found.link.escape_ascii()
                );
                let advice = format!("pass --ghost-limit {stored} (ckpt-scan)");
                return Err(Refused::new(found.subject, reason).advise(advice).into());
            }
            SFlag::S_IFREG => Some(
                reopen(found.proc_path, libc::O_RDONLY | libc::O_NOATIME)
                    .or_else(|_| reopen(found.proc_path, libc::O_RDONLY))
                    .with_context(|| found.subject.to_owned())?,
            ),
            SFlag::S_IFDIR | SFlag::S_IFIFO => None,
            _ => {
                let reason = format!("{}: a deleted file of this type", found.link.escape_ascii());
                return Err(Refused::new(found.subject, reason).into());
            }
        };
        let id = u32::try_from(self.files.len()).context("too many deleted files")? + 1;
        self.ghosts.insert(key, id);
        self.files.push((id, *found.stat, content, found.subject.to_owned()));
        Ok(id)
    }

    /// Writes contents.
    pub(in crate::fd) fn finish(self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        for (id, stat, content, subject) in self.files {
            dump_ghost(id, &stat, content, sink)
                .with_context(|| format!("{subject}: contents of a deleted file"))?;
        }
        Ok(())
    }
}

fn timeval(seconds: i64, nanos: i64) -> Timeval {
    Timeval { tv_sec: seconds.cast_unsigned(), tv_usec: nanos.cast_unsigned() / 1000 }
}

fn dump_ghost(id: u32, stat: &FileStat, content: Option<OwnedFd>, sink: &mut dyn Sink) -> anyhow::Result<()> {
    let arg = u64::from(id);
    let size = stat.st_size.cast_unsigned();
    let ranges = content.as_ref().map(|fd| data_ranges(fd, size)).transpose()?.unwrap_or_default();
    let whole = size == 0 || ranges == [(0, size)];
    let regular = content.is_some();
    let entry = GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        dev: Some(kernel_dev(stat.st_dev)),
        ino: Some(stat.st_ino),
        rdev: None,
        atim: Some(timeval(stat.st_atime, stat.st_atime_nsec)),
        mtim: Some(timeval(stat.st_mtime, stat.st_mtime_nsec)),
        chunks: (regular && !whole).then_some(true),
        size: (regular && !whole).then_some(size),
        symlnk_target: None,
        ckpt_huge_page: content.as_ref().map(hugetlb::page_size).transpose()?.flatten(),
    };
    emit(sink, Image::GhostFile, arg, &entry)?;
    let Some(fd) = content else { return Ok(()) };
    for (start, end) in ranges {
        if !whole {
            let chunk = GhostChunkEntry { len: end - start, off: start }.encode_to_vec();
            let mut bytes = u32::try_from(chunk.len()).context("chunk")?.to_le_bytes().to_vec();
            bytes.extend_from_slice(&chunk);
            sink.data(Image::GhostFile, arg, &bytes)?;
        }
        let mut at = start;
        while at < end {
            let n = (end - at).min(GHOST_PIECE);
            lseek64(&fd, i64::try_from(at)?, Whence::SeekSet).context("lseek")?;
            sink.data_from(Image::GhostFile, arg, fd.as_fd(), n)?;
            at += n;
        }
    }
    Ok(())
}

/// Where a file has data, in order (lseek(2), SEEK_DATA).
fn data_ranges(fd: &OwnedFd, size: u64) -> anyhow::Result<Vec<(u64, u64)>> {
    if let Some(page) = hugetlb::page_size(fd)? {
        let parts = hugetlb::populated(fd.as_fd(), page, size)?;
        return Ok(parts.into_iter().map(|part| (part.start, part.end)).collect());
    }
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek64(fd, i64::try_from(at)?, Whence::SeekData) {
            Ok(start) => start.cast_unsigned(),
            Err(nix::errno::Errno::ENXIO) => break,
            // The file system does not tell: all is data.
            Err(nix::errno::Errno::EINVAL) => return Ok(vec![(0, size)]),
            Err(errno) => return Err(errno).context("lseek(SEEK_DATA)"),
        };
        let end = lseek64(fd, start.cast_signed(), Whence::SeekHole).context("lseek(SEEK_HOLE)")?;
        let end = end.cast_unsigned().min(size);
        ranges.push((start, end));
        at = end;
    }
    Ok(ranges)
}

#[derive(Debug)]
pub(super) struct Ghost {
    /// O_PATH.
    handle: OwnedFd,
    /// Open as the descriptor has it that made the file without a name; until that is restored.
    pub(super) unnamed: Option<OwnedFd>,
    entry: GhostFileEntry,
}

/// A ghost file, made on first use: an unnamed file again when this returns.
pub(super) fn ghost_handle(
    opening: &mut Opening<'_>,
    id: u32,
    reg: &RegFileEntry,
) -> anyhow::Result<OwnedFd> {
    if let Some(ghost) = opening.names.made.get(&id) {
        return ghost.handle.try_clone().context("dup");
    }
    let entry: GhostFileEntry = opening.set.one(Image::GhostFile, id.into())?;
    let directories = make_directories(opening, &reg.name)?;
    let made = make_ghost(opening, id, reg, &entry);
    for token in directories.into_iter().rev() {
        opening.remove_created(token);
    }
    let (handle, unnamed) = made?;
    let copy = handle.try_clone().context("dup")?;
    opening.names.made.insert(id, Ghost { handle, unnamed, entry });
    Ok(copy)
}

/// Makes, for a moment, the directories of `name` that are not there any more.
fn make_directories(opening: &mut Opening<'_>, name: &[u8]) -> anyhow::Result<Vec<usize>> {
    let parents = path(name).ancestors().skip(1);
    let missing: Vec<&Path> = parents.take_while(|p| fs::symlink_metadata(p).is_err()).collect();
    let mut tokens = Vec::new();
    for directory in missing.into_iter().rev() {
        fs::create_dir(directory).with_context(|| format!("mkdir {}", directory.display()))?;
        tokens.push(opening.created(directory.to_owned(), true));
    }
    Ok(tokens)
}

/// A new ghost file: a handle, and its open file if it was made without a name.
fn make_ghost(
    opening: &mut Opening<'_>,
    id: u32,
    reg: &RegFileEntry,
    entry: &GhostFileEntry,
) -> anyhow::Result<(OwnedFd, Option<OwnedFd>)> {
    let kind = SFlag::from_bits_truncate(entry.mode & SFlag::S_IFMT.bits());
    let born = (kind == SFlag::S_IFREG).then(|| opening.born_unnamed(id)).flatten();
    if let Some(flags) = born
        && let Some(directory) = path(&reg.name).parent()
        // Not every file system can.
        && let Ok(fd) = file::open(directory, flags, 0o600)
    {
        let handle = reopen(&self_path(fd.as_fd()), libc::O_PATH)?;
        let writable = reopen(&self_path(fd.as_fd()), libc::O_RDWR)?;
        fill_ghost(opening.set, id, reg, entry, writable.into()).context("contents of a deleted file")?;
        return Ok((handle, Some(fd)));
    }
    let name = free_name(&reg.name, id);
    let made = opening.created(name.clone(), kind == SFlag::S_IFDIR);
    match kind {
        SFlag::S_IFREG => {
            let file = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&name)
                .with_context(|| format!("create {}", name.display()))?;
            fill_ghost(opening.set, id, reg, entry, file).context("contents of a deleted file")?;
        }
        SFlag::S_IFDIR => fs::create_dir(&name).with_context(|| format!("mkdir {}", name.display()))?,
        SFlag::S_IFIFO => {
            nix::unistd::mkfifo(&name, Mode::S_IRUSR | Mode::S_IWUSR)
                .with_context(|| format!("mkfifo {}", name.display()))?;
        }
        _ => bail!("a deleted file of mode {:o}", entry.mode),
    }
    let handle = reopen(&name, libc::O_PATH | libc::O_NOFOLLOW)?;
    opening.remove_created(made);
    Ok((handle, None))
}

impl Opening<'_> {
    /// The flags to make ghost file `id` with, if one of its descriptors has made it without a name.
    fn born_unnamed(&self, id: u32) -> Option<u32> {
        let of_it = |(file, ghost): (&u32, &u32)| (*ghost == id).then(|| self.reg(FileId(*file)).ok());
        let unwanted = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC).cast_unsigned();
        let mut entries = self.names.ghosts.iter().filter_map(of_it).flatten();
        entries.find(|reg| reg.flags & UNNAMED == UNNAMED).map(|reg| reg.flags & !unwanted)
    }
}

/// The old name, or one beside it if somebody has taken that since.
fn free_name(name: &[u8], id: u32) -> PathBuf {
    let wanted = path(name);
    if fs::symlink_metadata(wanted).is_err() {
        return wanted.to_owned();
    }
    let mut other = wanted.as_os_str().to_owned();
    other.push(format!(".ckpt.{}.{id}", std::process::id()));
    other.into()
}

fn fill_ghost(
    set: &ImageSet,
    id: u32,
    reg: &RegFileEntry,
    entry: &GhostFileEntry,
    file: fs::File,
) -> anyhow::Result<()> {
    let huge = hugetlb::page_size(&file)?;
    if entry.ckpt_huge_page != huge {
        let of =
            |page: Option<u64>| page.map_or("ordinary pages".to_owned(), |n| format!("pages of {n} bytes"));
        let (was, is) = (of(entry.ckpt_huge_page), of(huge));
        let why = format!("it was on a file system of {was}, and now there is one of {is}");
        return Err(Refused::new(printable(reg), why)
            .advise("mount there what was there (hugetlbfs)")
            .into());
    }
    let file = Contents { file, huge };
    let end = |size: u64| file.file.set_len(size).context("ftruncate");
    let Some(place) = set.payload(Image::GhostFile, id.into(), 0) else {
        return end(entry.size.unwrap_or(0));
    };
    let source = fs::File::from(place.file.try_clone_to_owned().context("dup")?);
    if huge.is_some() {
        // Its pages are made within its size.
        end(entry.size.unwrap_or(place.len))?;
    }
    if entry.chunks != Some(true) {
        return file.copy(&source, place.offset, place.len, 0);
    }
    let (mut at, stop) = (place.offset, place.offset.saturating_add(place.len));
    let mut take = |len: u64| {
        let from = at;
        at = at.checked_add(len).filter(|&at| at <= stop)?;
        Some(from)
    };
    let short = || anyhow::anyhow!("{}: a chunk goes beyond the end", Image::GhostFile.file_name(id.into()));
    while let Some(from) = take(4) {
        let mut word = [0; 4];
        source.read_exact_at(&mut word, from).context("read")?;
        let len = u32::from_le_bytes(word);
        if len > 64 {
            bail!("{}: a chunk header of {len} bytes", Image::GhostFile.file_name(id.into()));
        }
        let from = take(len.into()).ok_or_else(short)?;
        let mut header = vec![0; len as usize];
        source.read_exact_at(&mut header, from).context("read")?;
        let chunk = GhostChunkEntry::decode(&header[..]).context("chunk header")?;
        let from = take(chunk.len).ok_or_else(short)?;
        file.copy(&source, from, chunk.len, chunk.off)?;
    }
    end(entry.size.unwrap_or(0))
}

/// A deleted file that is being filled.
struct Contents {
    file: fs::File,
    /// The size of its pages, if it is on a hugetlbfs.
    huge: Option<u64>,
}

impl Contents {
    /// Copies part of an image without moving the position of its descriptor, which others use.
    fn copy(&self, source: &fs::File, offset: u64, len: u64, to: u64) -> anyhow::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
            let n = source.read_at(&mut buffer[..n], offset + done).context("read")?;
            if n == 0 {
                bail!("the image ends {} bytes early", len - done);
            }
            self.write(to + done, &buffer[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let Some(page) = self.huge else { return self.file.write_all_at(bytes, at).context("write") };
        match hugetlb::write(self.file.as_fd(), page, at, bytes) {
            Err(error) if error.errno == nix::errno::Errno::ENOSPC => {
                Err(hugetlb::too_few(format!("contents of a deleted file: {error}"), page).into())
            }
            written => written.context("write"),
        }
    }
}

/// Owner, mode and times last: all opens are done, so a mode without permissions is in nobody's way.
pub(super) fn finish_ghosts(opening: &mut Opening<'_>) -> anyhow::Result<()> {
    for ghost in opening.names.made.values() {
        let place = self_path(ghost.handle.as_fd());
        let what = || format!("deleted file of mode {:o}", ghost.entry.mode);
        std::os::unix::fs::chown(&place, Some(ghost.entry.uid), Some(ghost.entry.gid)).with_context(what)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(ghost.entry.mode & 0o7777);
        fs::set_permissions(&place, mode).with_context(what)?;
        if let (Some(atime), Some(mtime)) = (&ghost.entry.atim, &ghost.entry.mtim) {
            let time =
                |t: &Timeval| nix::sys::time::TimeVal::new(t.tv_sec.cast_signed(), t.tv_usec.cast_signed());
            nix::sys::stat::utimes(&place, &time(atime), &time(mtime)).with_context(what)?;
        }
    }
    Ok(())
}
