//! Files with a name: regular files, directories, symbolic links (O_PATH), and devices that have no
//! state of their own.
//!
//! Their contents stay where they are; the images hold the name, and how the file was open. Three
//! things can be wrong with a name:
//!
//! - **The file was deleted** and no name is left. Its contents go into the images (a *ghost*), with
//!   its holes, and at restore a file is made under the old name, opened, and deleted again; so are
//!   the directories on the way if they are gone too. A file that never had a name (O_TMPFILE) is made as
//!   such, so that the program can still give it one.
//! - **The name was deleted, others are left** (hard links). The other name is looked for in the
//!   same directory and stored beside it (a *linked* remap). If it is not there the file is refused: a copy
//!   of it would no longer be the same file as the one under its other name, and to give it a name
//!   at dump time would be to change the target's files.
//! - **The file has changed since.** What was mapped as private memory (programs, libraries) must be
//!   the very same, since clean pages are read from it again: told by the build-id, an ELF note that
//!   linkers compute from the contents, else by size and modification time. Of data files a
//!   change is told, as they are expected to live on; `files_strict` makes it an error.

mod ghost;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::Path,
};

use anyhow::Context;
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{FdTypes, FileEntry, FownEntry, MmEntry, RegFileEntry, RemapFilePathEntry, RemapType, VmaEntry},
};
use ckpt_sys::{FileId, Refused, file};
use nix::{
    sys::stat::{FileStat, SFlag},
    unistd::{Whence, lseek64},
};

pub(super) use self::ghost::Remaps;
use self::ghost::{Ghost, finish_ghosts, ghost_handle};
use super::{
    Descriptor, FileTable, Opening,
    dump::{file_type, path, reopen, self_path},
    late,
};
use crate::{Sink, sink::emit};

/// `O_TMPFILE`: the file was made without a name, and may be given one by linkat(2).
const UNNAMED: u32 = libc::O_TMPFILE.cast_unsigned();
const DELETED: &[u8] = b" (deleted)";

/// Devices without state: null, zero, full, random, urandom.
const STATELESS: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.link.starts_with(b"/")
        && (d.is(SFlag::S_IFREG)
            || d.is(SFlag::S_IFDIR)
            || d.is(SFlag::S_IFLNK)
            || STATELESS.iter().any(|&(major, minor)| d.is_device(major, minor)))
}

pub(super) fn is_namespace(d: &Descriptor) -> bool {
    d.is(SFlag::S_IFREG) && !d.link.starts_with(b"/") && d.link.windows(2).any(|w| w == b":[")
}

/// The task in whose directory in /proc a file is. (Its path names the thread group, also if it was opened by way of
/// `/proc/self`; files of a thread are below that, in `task`.)
fn task_of(name: &[u8]) -> Option<i32> {
    let rest = name.strip_prefix(b"/proc/")?;
    let digits = rest.split(|&b| b == b'/').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

pub(super) fn is_mqueue(d: &Descriptor) -> bool {
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    d.is(SFlag::S_IFREG)
        && nix::sys::statfs::fstatfs(&d.copy).is_ok_and(|s| s.filesystem_type().0 == MQUEUE_MAGIC)
}

/// A file as it was found, behind a descriptor or another link in /proc.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found<'a> {
    /// How messages call it.
    pub subject: &'a str,
    /// Where the link leads.
    pub link: &'a [u8],
    pub stat: &'a FileStat,
    /// The link itself.
    pub proc_path: &'a Path,
    /// It is mapped, or the executable.
    pub mapped: bool,
}

/// What the entry says about how the file is open.
#[derive(Debug, Clone)]
pub(super) struct Fields {
    pub flags: u32,
    pub pos: u64,
    pub fown: FownEntry,
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    sink: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let fields = Fields { flags: d.flags(), pos: d.info.pos, fown: d.fown()? };
    let (subject, proc_path) = (d.subject(), d.proc_path());
    let found =
        Found { subject: &subject, link: &d.link, stat: &d.stat, proc_path: &proc_path, mapped: false };
    let Some(task) = task_of(&d.link) else {
        return dump_found(table, &found, id, fields, sink).map(Some);
    };
    if d.link.ends_with(DELETED) || !late::of_tree(table, task)? {
        let name = d.link.escape_ascii();
        let reason = format!("{name}: file in /proc of a process that is gone or outside of the tree");
        return Err(d.refuse(reason).into());
    }
    // Its inode may have been made anew since it was opened: nothing to compare.
    entry(&found, id, d.link.clone(), &fields).map(Some)
}

/// Where a file can be found again.
enum Name {
    /// Under this path.
    Plain(Vec<u8>),
    /// Nowhere; it once was at this path.
    Ghost(Vec<u8>),
    /// It once was at the first path and still is at the second.
    Linked(Vec<u8>, Vec<u8>),
}

fn same(stat: &FileStat, other: &FileStat) -> bool {
    (stat.st_dev, stat.st_ino) == (other.st_dev, other.st_ino)
}

fn find_name(found: &Found<'_>) -> anyhow::Result<Name> {
    let refuse =
        |reason: &str| Refused::new(found.subject, format!("{}: {reason}", found.link.escape_ascii()));
    if found.link.starts_with(b"socket:[") {
        let reason =
            "the ring of a packet socket is mapped: at which frame of it the kernel is can't be told or set";
        return Err(refuse(reason).into());
    }
    if !found.link.starts_with(b"/") {
        return Err(refuse("its path can't be reached from here").into());
    }
    if nix::sys::stat::lstat(path(found.link)).is_ok_and(|s| same(&s, found.stat)) {
        return Ok(Name::Plain(found.link.to_vec()));
    }
    let Some(old) = found.link.strip_suffix(DELETED) else {
        return Err(refuse("another file is there now (something is mounted over it?)").into());
    };
    if found.stat.st_nlink == 0 || file_type(found.stat) == SFlag::S_IFDIR {
        return Ok(Name::Ghost(old.to_vec()));
    }
    let directory = path(old).parent().unwrap_or(Path::new("/"));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let inode = std::os::unix::fs::DirEntryExt::ino(&entry);
        if inode == found.stat.st_ino
            && entry.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (found.stat.st_dev, found.stat.st_ino))
        {
            return Ok(Name::Linked(old.to_vec(), entry.path().as_os_str().as_bytes().to_vec()));
        }
    }
    let reason = format!("this name was deleted and its other names are not in {}", directory.display());
    Err(refuse(&reason).advise("link(2) it to a name in that directory").into())
}

/// The entry of a file with a name, and what its name needs.
pub(super) fn dump_found(
    table: &mut FileTable,
    found: &Found<'_>,
    id: FileId,
    fields: Fields,
    sink: &mut dyn Sink,
) -> anyhow::Result<FileEntry> {
    let name = match find_name(found)? {
        Name::Plain(name) => name,
        Name::Ghost(name) => {
            let remap_id = table.remaps.ghost(found, table.options.ghost_limit)?;
            emit_remap(sink, id, remap_id, RemapType::Ghost)?;
            name
        }
        Name::Linked(name, other) => {
            let other_id = table.new_id();
            let entry = entry(found, other_id, other, &Fields { pos: 0, ..fields.clone() })?;
            emit(sink, Image::Files, 0, &entry)?;
            emit_remap(sink, id, other_id.0, RemapType::Linked)?;
            name
        }
    };
    entry(found, id, name, &fields)
}

fn emit_remap(sink: &mut dyn Sink, id: FileId, remap_id: u32, kind: RemapType) -> anyhow::Result<()> {
    let remap = RemapFilePathEntry { orig_id: id.0, remap_id, remap_type: Some(kind.into()) };
    emit(sink, Image::RemapFpath, 0, &remap)
}

fn entry(found: &Found<'_>, id: FileId, name: Vec<u8>, fields: &Fields) -> anyhow::Result<FileEntry> {
    let regular = file_type(found.stat) == SFlag::S_IFREG;
    // What /proc says of them means nothing.
    let lasting = regular && !name.starts_with(b"/proc/");
    let build_id = if found.mapped && regular {
        let file = fs::File::open(found.proc_path).with_context(|| format!("{}: open", found.subject))?;
        build_id(&file).unwrap_or_default()
    } else {
        Vec::new()
    };
    let reg = RegFileEntry {
        id: id.0,
        flags: fields.flags,
        pos: fields.pos,
        fown: fields.fown,
        name,
        size: lasting.then_some(found.stat.st_size.cast_unsigned()),
        mode: Some(found.stat.st_mode),
        build_id,
        ckpt_mtime_ns: lasting.then(|| mtime_ns(found.stat)),
        ..RegFileEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Reg.into(), id: id.0, reg: Some(reg), ..FileEntry::default() })
}

fn mtime_ns(stat: &FileStat) -> u64 {
    stat.st_mtime.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(stat.st_mtime_nsec.cast_unsigned())
}

/// The build-id of an ELF file in words as they lie in it; `None` if it has none or is no ELF file.
fn build_id(file: &fs::File) -> Option<Vec<u32>> {
    const PT_NOTE: u32 = 4;
    const NT_GNU_BUILD_ID: u32 = 3;
    const NOTE_LIMIT: u64 = 1 << 16;
    let word = |b: &[u8], at: usize| b.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let long = |b: &[u8], at: usize| Some(u64::from(word(b, at)?) | u64::from(word(b, at + 4)?) << 32);
    let half = |b: &[u8], at: usize| b.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    // Headers and notes lie at the front of nearly all files.
    let mut front = vec![0; 4096];
    let n = file.read_at(&mut front, 0).ok()?;
    front.truncate(n);
    let read = |at: u64, len: usize| {
        let start = usize::try_from(at).ok()?;
        match front.get(start..start.checked_add(len)?) {
            Some(bytes) => Some(bytes.to_vec()),
            None => {
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
            }
        }
    };
    let header = read(0, 64)?;
    // ELF, 64 bits, little endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (long(&header, 32)?, half(&header, 54)?, half(&header, 56)?);
    for i in 0..u64::from(count) {
        let program = read(table.checked_add(i * u64::from(size))?, 56)?;
        if word(&program, 0)? != PT_NOTE {
            continue;
        }
        let (offset, len) = (long(&program, 8)?, long(&program, 32)?.min(NOTE_LIMIT));
        let Some(notes) = read(offset, usize::try_from(len).ok()?) else { continue };
        let mut rest = &notes[..];
        while let (Some(name_len), Some(desc_len), Some(kind)) = (word(rest, 0), word(rest, 4), word(rest, 8))
        {
            let name_end = 12usize.checked_add(name_len as usize)?.checked_next_multiple_of(4)?;
            let desc_end = name_end.checked_add(desc_len as usize)?;
            let (Some(name), Some(desc)) = (rest.get(12..name_end), rest.get(name_end..desc_end)) else {
                break;
            };
            if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
                let words = desc.chunks(4).map(|c| {
                    let mut word = [0; 4];
                    word[..c.len()].copy_from_slice(c);
                    u32::from_ne_bytes(word)
                });
                return Some(words.collect());
            }
            rest = rest.get(desc_end.checked_next_multiple_of(4)?..).unwrap_or_default();
        }
    }
    None
}

/// What the restore has to know about names before files are opened.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Ghost number by file id.
    ghosts: HashMap<u32, u32>,
    /// Id of the entry with the other name, by file id.
    linked: HashMap<u32, u32>,
    /// Handles of ghost files made so far.
    made: HashMap<u32, Ghost>,
    /// Files that must be the very same as at dump time.
    vital: std::collections::HashSet<u32>,
    /// Files that are told once.
    told: std::collections::HashSet<Vec<u8>>,
}

impl Names {
    pub(super) fn read(set: &ImageSet) -> anyhow::Result<Self> {
        let mut names = Self::default();
        for remap in set.all::<RemapFilePathEntry>(Image::RemapFpath, 0)? {
            match remap.remap_type() {
                RemapType::Ghost => drop(names.ghosts.insert(remap.orig_id, remap.remap_id)),
                RemapType::Linked => drop(names.linked.insert(remap.orig_id, remap.remap_id)),
                RemapType::Procfs => {
                    let what = format!("file {}", remap.orig_id);
                    return Err(Refused::new(what, "a file in /proc of a process that is gone").into());
                }
            }
        }
        for arg in set.args(Image::Mm) {
            let mm: MmEntry = set.one(Image::Mm, arg)?;
            names.vital.insert(mm.exe_file_id);
            names.note_private(&mm.vmas);
        }
        for arg in set.args(Image::Vmas) {
            names.note_private(&set.all::<VmaEntry>(Image::Vmas, arg)?);
        }
        Ok(names)
    }

    /// Files mapped private: pages that were not written are read from the file again.
    fn note_private(&mut self, vmas: &[VmaEntry]) {
        let of = |flag: i32| flag.cast_unsigned();
        for vma in vmas {
            if vma.flags & of(libc::MAP_PRIVATE) != 0 && vma.flags & of(libc::MAP_ANONYMOUS) == 0 {
                self.vital.extend(u32::try_from(vma.shmid).ok());
            }
        }
    }

    /// The open file of an entry that has made its file without a name.
    fn take_unnamed(&mut self, reg: &RegFileEntry) -> Option<OwnedFd> {
        let ghost = self.ghosts.get(&reg.id).filter(|_| reg.flags & UNNAMED == UNNAMED)?;
        self.made.get_mut(ghost)?.unnamed.take()
    }

    /// Entries that only carry a name for others.
    pub(super) fn aliases(&self) -> impl Iterator<Item = u32> {
        self.linked.values().copied()
    }
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        if opening.is_alias(FileId(entry.id)) {
            continue;
        }
        let reg = entry.reg.as_ref().context("a file without its entry")?;
        let what = || format!("file {}: {}", entry.id, printable(reg));
        let given = given(opening, reg).with_context(what)?;
        if given.is_none() && task_of(&reg.name).is_some() {
            opening.late.insert(entry.id, late::Entry::InProc(reg.clone()));
            continue;
        }
        let fd = restore_one(opening, reg, given).with_context(what)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    finish_ghosts(opening)
}

/// Its name for messages.
pub(super) fn printable(reg: &RegFileEntry) -> String {
    reg.name.escape_ascii().to_string()
}

/// What was handed in for it.
fn given(opening: &mut Opening<'_>, reg: &RegFileEntry) -> anyhow::Result<Option<OwnedFd>> {
    let relative = reg.name.strip_prefix(b"/").unwrap_or(&reg.name);
    let keys = [printable(reg), relative.escape_ascii().to_string()];
    keys.iter().find_map(|key| opening.inherited(key).transpose()).transpose()
}

/// A file of a task that is there now.
pub(super) fn open_late(reg: &RegFileEntry) -> anyhow::Result<OwnedFd> {
    let fd = file::open(path(&reg.name), kept_flags(reg), 0)?;
    placed(reg, fd)
}

/// Flags for open(2): without those that make or cut a file, or are set later.
fn kept_flags(reg: &RegFileEntry) -> u32 {
    let unwanted = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_NOFOLLOW;
    (reg.flags & !unwanted.cast_unsigned()) | libc::O_NOCTTY.cast_unsigned()
}

fn restore_one(
    opening: &mut Opening<'_>,
    reg: &RegFileEntry,
    given: Option<OwnedFd>,
) -> anyhow::Result<OwnedFd> {
    let handle = match given {
        Some(given) => given,
        None => open_handle(opening, reg)?,
    };
    let stat = nix::sys::stat::fstat(&handle).context("fstat")?;
    check_type(reg, &stat)?;
    if reg.flags & libc::O_PATH.cast_unsigned() != 0 {
        return Ok(handle);
    }
    if let Some(fd) = opening.names.take_unnamed(reg) {
        return placed(reg, fd);
    }
    let mut flags = kept_flags(reg);
    let regular = file_type(&stat) == SFlag::S_IFREG;
    if regular {
        // What is left of it at a file that was made so, see `ghost_handle`.
        flags &= !UNNAMED;
    }
    // Devices and FIFOs must not keep us waiting.
    let wait = if regular { 0 } else { libc::O_NONBLOCK.cast_unsigned() };
    let fd = file::open(&self_path(handle.as_fd()), flags | wait, 0)?;
    if regular {
        check_unchanged(opening, reg, &stat, &handle)?;
    }
    placed(reg, fd)
}

/// Flags that can be set, and the position.
fn placed(reg: &RegFileEntry, fd: OwnedFd) -> anyhow::Result<OwnedFd> {
    Opening::set_flags(fd.as_fd(), reg.flags)?;
    if reg.pos != 0 {
        let pos = reg.pos.cast_signed();
        lseek64(&fd, pos, Whence::SeekSet).with_context(|| format!("lseek to {pos}"))?;
    }
    Ok(fd)
}

fn check_type(reg: &RegFileEntry, stat: &FileStat) -> anyhow::Result<()> {
    let Some(mode) = reg.mode else { return Ok(()) };
    if mode & SFlag::S_IFMT.bits() == stat.st_mode & SFlag::S_IFMT.bits() {
        return Ok(());
    }
    let reason = format!("it is of another type now (mode {:o}, at dump {mode:o})", stat.st_mode);
    Err(Refused::new(printable(reg), reason).into())
}

fn check_unchanged(
    opening: &mut Opening<'_>,
    reg: &RegFileEntry,
    stat: &FileStat,
    handle: &OwnedFd,
) -> anyhow::Result<()> {
    if opening.names.ghosts.contains_key(&reg.id) {
        return Ok(());
    }
    let size = stat.st_size.cast_unsigned();
    let changed = if !reg.build_id.is_empty() {
        let file = fs::File::open(self_path(handle.as_fd())).context("open")?;
        let now = build_id(&file).unwrap_or_default();
        (now != reg.build_id).then(|| "its build-id differs".to_owned())
    } else if let Some(old) = reg.size.filter(|&old| old != size) {
        Some(format!("it has {size} bytes now and had {old}"))
    } else {
        reg.ckpt_mtime_ns.filter(|&old| old != mtime_ns(stat)).map(|_| "it was modified".to_owned())
    };
    let Some(changed) = changed else { return Ok(()) };
    let name = printable(reg);
    if opening.names.vital.contains(&reg.id) {
        return Err(Refused::new(name, format!("it was mapped at dump and has changed since: {changed}"))
            .advise("put the file back as it was: parts of the program's memory are read from it")
            .into());
    }
    if opening.options.files_strict {
        let advice = "leave out --files strict to restore with it as it is";
        return Err(Refused::new(name, format!("it has changed since the dump: {changed}"))
            .advise(advice)
            .into());
    }
    if opening.names.told.insert(reg.name.clone()) {
        (opening.options.warn)(&format!("{name} has changed since the dump: {changed}"));
    }
    Ok(())
}

/// The file of an entry as an O_PATH descriptor, wherever it is now.
pub(super) fn open_handle(opening: &mut Opening<'_>, reg: &RegFileEntry) -> anyhow::Result<OwnedFd> {
    if let Some(&ghost) = opening.names.ghosts.get(&reg.id) {
        return ghost_handle(opening, ghost, reg);
    }
    let mut name = reg.name.clone();
    let mut made = None;
    if let Some(&other) = opening.names.linked.get(&reg.id) {
        let other = opening.reg(FileId(other))?.name.clone();
        // Opened under the deleted name, if that is free, so that /proc/PID/fd shows it.
        if fs::symlink_metadata(path(&name)).is_err() && fs::hard_link(path(&other), path(&name)).is_ok() {
            made = Some(opening.created(path(&name).to_owned(), false));
        } else {
            name = other;
        }
    }
    let is_link = reg.mode.is_some_and(|m| m & SFlag::S_IFMT.bits() == SFlag::S_IFLNK.bits());
    let flags = libc::O_PATH | if is_link { libc::O_NOFOLLOW } else { 0 };
    let handle = reopen(path(&name), flags);
    if let Some(token) = made {
        opening.remove_created(token);
    }
    handle
}

/// Files by id, for kinds that refer to a name.
pub(super) fn by_id(entries: &[FileEntry]) -> BTreeMap<u32, RegFileEntry> {
    entries.iter().filter_map(|e| Some((e.id, e.reg.clone()?))).collect()
}
