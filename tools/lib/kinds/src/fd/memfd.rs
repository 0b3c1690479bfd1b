//! Shared memory without a name: memfd_create(2), and what mmap(MAP_SHARED | MAP_ANONYMOUS) makes.
//!
//! Both are files on a file system that the kernel keeps for itself; the inode is the segment's
//! identity, shared by descriptors and mappings of all tasks. The images hold a MEMFD_INODE entry for
//! the segment, a FILES entry for each way it is open, and its pages as SHMEM_PAGEMAP with the
//! inode as number (`shmid`). Anonymous memory goes by the name "/dev/zero", which is what the kernel calls it
//! in /proc/PID/maps.
//!
//! Those of huge pages (MFD_HUGETLB, MAP_HUGETLB) are on other such file systems, one for each size of pages, and
//! anonymous ones go by "/anon_hugepage". Their inodes are numbered apart, so a number may be taken. For how they are read and
//! written see [`ckpt_sys::hugetlb`].
//!
//! At restore anonymous memory is made as such, so that it has its name again; where that is
//! forbidden (opening map_files needs CAP_CHECKPOINT_RESTORE) a memfd takes its place, which differs in name only.
//! Seals are applied by ckpt-restore itself, when contents and mappings of all tasks are there. Sealed
//! against writing means that no shared mapping may write, which the kernel checks: such memory is mapped
//! through a descriptor that can't.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::CString,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::Context;
use ckpt_proto::{
    Image,
    types::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry},
};
use ckpt_sys::{FileId, Pid, Refused, SysError, file, hugetlb};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::FileStat,
    },
    unistd::{Gid, Uid, Whence, lseek64},
};

use super::{
    Descriptor, FileTable, Opening, Shmem, ShmemSegment,
    dump::{read_link, reopen, self_path},
};
use crate::{Sink, sink::emit};

const ANONYMOUS: &[u8] = b"/dev/zero";
const ANONYMOUS_HUGE: &[u8] = b"/anon_hugepage";
const DEFAULT_MODE: u32 = 0o777;
const SEAL_WRITE: u32 = libc::F_SEAL_WRITE.cast_unsigned();
const SEAL_SEAL: u32 = libc::F_SEAL_SEAL.cast_unsigned();

/// Device and inode.
type Key = (u64, u64);

/// Segments met so far.
#[derive(Debug, Default)]
pub(super) struct Memory {
    segments: BTreeMap<Key, Segment>,
    mapped: HashMap<Key, FileId>,
}

#[derive(Debug)]
struct Segment {
    inode_id: u32,
    shmid: u32,
    size: u64,
    place: PathBuf,
}

impl Memory {
    /// The number of a new segment: its inode's, unless another has that.
    fn number(&self, inode: u32) -> Option<u32> {
        let taken = |number: u32| self.segments.values().any(|segment| segment.shmid == number);
        if taken(inode) { (1..u32::MAX).rev().find(|&number| !taken(number)) } else { Some(inode) }
    }

    pub(super) fn segments(&self) -> anyhow::Result<Vec<ShmemSegment>> {
        self.segments
            .values()
            .map(|s| {
                Ok(ShmemSegment {
                    shmid: s.shmid.into(),
                    size: s.size,
                    fd: reopen(&s.place, libc::O_RDONLY)?,
                })
            })
            .collect()
    }
}

/// The device number of the kernel's own shared memory file system.
fn shared_memory_device() -> Result<u64, Errno> {
    static DEVICE: OnceLock<Result<u64, Errno>> = OnceLock::new();
    *DEVICE.get_or_init(|| device(0))
}

/// The device of memfds that are made with `flags`.
fn device(flags: u32) -> Result<u64, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::from_bits_retain(flags);
    nix::sys::stat::fstat(memfd_create(c"ckpt", flags)?).map(|s| s.st_dev)
}

/// Flags of memfd_create(2) for a file as the kernel makes it of huge pages, on a file system of its own.
fn huge_flags(stat: &FileStat) -> Option<u32> {
    let page = u64::try_from(stat.st_blksize).ok().filter(|size| size.is_power_of_two())?;
    let flags = hugetlb::MEMFD | hugetlb::size_flag(page);
    (device(flags) == Ok(stat.st_dev)).then_some(flags)
}

/// Whether shared memory can be told from files here; if not, what looks like it would be taken for a deleted file.
pub(super) fn check() -> anyhow::Result<()> {
    shared_memory_device().map(drop).context("find the device of shared memory: memfd_create")
}

fn name_of(link: &[u8], stat: &FileStat) -> Option<Vec<u8>> {
    let name = link.strip_suffix(b" (deleted)")?;
    let memfd = name.strip_prefix(b"/memfd:");
    if memfd.is_none() && ![ANONYMOUS, ANONYMOUS_HUGE].contains(&name) {
        return None;
    }
    let ours = Ok(stat.st_dev) == shared_memory_device() || huge_flags(stat).is_some();
    ours.then(|| memfd.unwrap_or(name).to_vec())
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    name_of(&d.link, &d.stat).is_some()
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    sink: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let name = name_of(&d.link, &d.stat).unwrap_or_default();
    let (inode_id, ..) = add_segment(table, &d.subject(), name, &d.stat, &d.proc_path(), sink)?;
    let memfd = MemfdFileEntry { id: id.0, flags: d.flags(), pos: d.info.pos, fown: d.fown()?, inode_id };
    Ok(Some(FileEntry {
        r#type: FdTypes::Memfd.into(),
        id: id.0,
        memfd: Some(memfd),
        ..FileEntry::default()
    }))
}

/// Notes a segment: its number, `shmid`, and whether it is new.
fn add_segment(
    table: &mut FileTable,
    subject: &str,
    name: Vec<u8>,
    stat: &FileStat,
    place: &Path,
    sink: &mut dyn Sink,
) -> anyhow::Result<(u32, u32, bool)> {
    let key = (stat.st_dev, stat.st_ino);
    if let Some(segment) = table.memory.segments.get(&key) {
        return Ok((segment.inode_id, segment.shmid, false));
    }
    let inode_id = u32::try_from(table.memory.segments.len()).context("too many memory segments")? + 1;
    let shmid = u32::try_from(stat.st_ino).ok().and_then(|inode| table.memory.number(inode));
    let shmid = shmid
        .ok_or_else(|| Refused::new(subject, "shared memory whose inode does not fit into the images"))?;
    let fd = reopen(place, libc::O_RDONLY).with_context(|| subject.to_owned())?;
    let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).with_context(|| format!("{subject}: F_GET_SEALS"))?;
    let mode = stat.st_mode & 0o7777;
    let entry = MemfdInodeEntry {
        name,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size.cast_unsigned(),
        shmid,
        seals: seals.cast_unsigned(),
        inode_id: inode_id.into(),
        hugetlb_flag: if Ok(stat.st_dev) == shared_memory_device() { None } else { huge_flags(stat) },
        mode: (mode != DEFAULT_MODE).then_some(mode),
    };
    emit(sink, Image::MemfdInode, 0, &entry)?;
    let segment = Segment { inode_id, shmid, size: entry.size, place: place.to_owned() };
    table.memory.segments.insert(key, segment);
    Ok((inode_id, shmid, true))
}

/// See [`FileTable::add_shmem`].
pub(super) fn add_mapped(
    table: &mut FileTable,
    pid: Pid,
    link: &Path,
    sink: &mut dyn Sink,
) -> anyhow::Result<Shmem> {
    let target = read_link(link)?;
    let stat = nix::sys::stat::stat(link).with_context(|| format!("stat {}", link.display()))?;
    let subject = format!("pid {pid} mapping {}", link.file_name().unwrap_or_default().display());
    let Some(name) = name_of(&target, &stat) else {
        let why = format!("{}: shared memory of this kind: not supported", target.escape_ascii());
        return Err(Refused::new(subject, why).into());
    };
    let (inode_id, shmid, new) = add_segment(table, &subject, name, &stat, link, sink)?;
    let key = (stat.st_dev, stat.st_ino);
    if let Some(&id) = table.memory.mapped.get(&key) {
        return Ok(Shmem { file_id: id.0, shmid, new: false });
    }
    let id = table.new_id();
    table.memory.mapped.insert(key, id);
    let memfd = MemfdFileEntry { id: id.0, flags: 0, pos: 0, fown: FownEntry::default(), inode_id };
    let entry =
        FileEntry { r#type: FdTypes::Memfd.into(), id: id.0, memfd: Some(memfd), ..FileEntry::default() };
    emit(sink, Image::Files, 0, &entry)?;
    Ok(Shmem { file_id: id.0, shmid, new })
}

/// Segments made at restore.
#[derive(Debug, Default)]
pub(super) struct Restored {
    /// By `shmid`: the memory, open for reading and writing, and its size.
    pub(super) segments: HashMap<u32, (OwnedFd, u64)>,
    /// Seals still to be applied, by `shmid`.
    seals: BTreeMap<u32, i32>,
}

impl Restored {
    /// Applies the seals, once.
    pub(super) fn seal(&mut self) -> anyhow::Result<()> {
        for (shmid, seals) in std::mem::take(&mut self.seals) {
            let (fd, _) = self.segments.get(&shmid).context("a segment made before")?;
            let seals = SealFlag::from_bits_retain(seals);
            fcntl(fd, FcntlArg::F_ADD_SEALS(seals)).with_context(|| format!("seal shared memory {shmid}"))?;
        }
        Ok(())
    }
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let inodes: Vec<MemfdInodeEntry> = opening.set.all(Image::MemfdInode, 0)?;
    for inode in &inodes {
        let what = || format!("shared memory {} ({})", inode.shmid, inode.name.escape_ascii());
        let fd = make(inode).map_err(|error| explain(error, what(), inode)).with_context(what)?;
        opening.keep_segment(inode.shmid, fd, inode.size)?;
        // The only seal that is there from the start: none can be added.
        if inode.seals & !SEAL_SEAL != 0 {
            opening.memory.seals.insert(inode.shmid, inode.seals.cast_signed());
        }
    }
    for entry in entries {
        let memfd = entry.memfd.as_ref().context("a memfd without its entry")?;
        let inode = inodes
            .iter()
            .find(|i| i.inode_id == u64::from(memfd.inode_id))
            .with_context(|| format!("file {}: no memory segment {}", entry.id, memfd.inode_id))?;
        let segment = opening.segment(inode.shmid).context("a segment made above")?;
        // An entry that stands behind no descriptor serves mappings, which may write.
        let flags = if opening.has_descriptor(FileId(entry.id)) {
            memfd.flags
        } else if inode.seals & SEAL_WRITE != 0 {
            libc::O_RDONLY.cast_unsigned()
        } else {
            libc::O_RDWR.cast_unsigned()
        };
        let fd = file::open(&self_path(segment), flags & !libc::O_ASYNC.cast_unsigned(), 0)?;
        if memfd.pos != 0 {
            lseek64(&fd, memfd.pos.cast_signed(), Whence::SeekSet).context("lseek")?;
        }
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}

/// Flags of mmap(2) for the size of its pages, if they are huge.
fn map_flags(inode: &MemfdInodeEntry) -> Option<u32> {
    let flags = inode.hugetlb_flag.filter(|flags| flags & hugetlb::MEMFD != 0)?;
    Some(libc::MAP_HUGETLB.cast_unsigned() | (flags & hugetlb::MAP))
}

/// What it means that a segment can't be made.
fn explain(error: anyhow::Error, subject: String, inode: &MemfdInodeEntry) -> anyhow::Error {
    let errno = error.chain().find_map(|cause| {
        let sys = cause.downcast_ref::<SysError>().map(|error| error.errno);
        sys.or_else(|| cause.downcast_ref::<Errno>().copied())
    });
    match (map_flags(inode), errno) {
        (Some(flags), Some(Errno::ENODEV | Errno::EINVAL | Errno::ENOMEM)) => {
            hugetlb::too_few(format!("{subject}: {error:#}"), hugetlb::size_in(flags)).into()
        }
        _ => error,
    }
}

fn make(inode: &MemfdInodeEntry) -> anyhow::Result<OwnedFd> {
    let size = usize::try_from(inode.size).context("size")?;
    let huge = map_flags(inode);
    let anonymous = inode.name == if huge.is_some() { ANONYMOUS_HUGE } else { ANONYMOUS };
    if anonymous && size > 0 {
        match file::shared_anonymous(size, huge.unwrap_or(0)) {
            Ok(fd) => return Ok(fd),
            Err(e) if matches!(e.errno, nix::errno::Errno::EPERM | nix::errno::Errno::EACCES) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut flags = MFdFlags::MFD_CLOEXEC;
    flags.set(MFdFlags::MFD_ALLOW_SEALING, inode.seals != SEAL_SEAL);
    if huge.is_some() {
        flags |= MFdFlags::from_bits_retain(inode.hugetlb_flag.unwrap_or(0));
    }
    let name = CString::new(inode.name.clone()).context("a NUL in its name")?;
    let fd = memfd_create(name.as_c_str(), flags).context("memfd_create")?;
    nix::unistd::ftruncate(&fd, i64::try_from(inode.size).context("size")?).context("ftruncate")?;
    if let Some(mode) = inode.mode {
        let mode = nix::sys::stat::Mode::from_bits_truncate(mode);
        nix::sys::stat::fchmod(fd.as_fd(), mode).context("fchmod")?;
    }
    if !anonymous {
        nix::unistd::fchown(&fd, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid)))
            .context("fchown")?;
    }
    Ok(fd)
}
