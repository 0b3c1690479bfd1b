//! System V shared memory (shmget(2)) that processes of the tree are attached to.
//!
//! A segment belongs to an IPC namespace. It has an id, which nobody but the kernel chooses, and
//! mostly a key; a mapping of it is a file whose inode is that id (proc_pid_maps(5) shows `/SYSV` and the key),
//! and it can be opened through /proc/PID/map_files like other shared memory. It outlives the processes, unless it
//! was removed (IPC_RMID), which takes effect when the last detaches.
//!
//! Stored are an entry for the segment and its pages, once, numbered beyond the inodes of other shared memory. Who
//! else is attached, told by the count of attachments, would be left with another memory than the restored tree or
//! see its own change under it: refused, or the segment is left alone, contents and all, if it is named by
//! `--external shm:[ID]`.
//!
//! At restore a segment that is there still, the same and with nobody attached, is taken over and its contents
//! are put back. Else it is made with the same id (`/proc/sys/kernel/shm_next_id`, CAP_CHECKPOINT_RESTORE). Tasks
//! attach by shmat(2), so that the kernel's counts are right, and a segment that was removed is removed again
//! when they have.
//!
//! What can't be seen from outside: segments that nobody is attached to, semaphores and message queues stay as they
//! are in the namespace; adjustments that SEM_UNDO promised are made when the processes are killed.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use anyhow::{Context, bail, ensure};
use ckpt_images::ImageSet;
use ckpt_proc::maps::{self, Mapping};
use ckpt_proto::{
    Image,
    types::{SysvShmEntry, VmaEntry},
};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    Pid, Refused, file, hugetlb,
    sysv::{self, Attached},
};
use nix::{errno::Errno, fcntl};

use super::{dump::huge_flags, is_huge, status};
use crate::{Sink, fd::ShmemSegment, sink::emit};

/// Numbers of their pagemaps begin here: those of other shared memory are inodes of 32 bits.
const PAGEMAPS: u64 = 1 << 32;
const PAGE: u64 = 4096;

/// Whether a mapping is of this kind.
pub(super) fn recognise(m: &Mapping) -> bool {
    m.shared && m.name.starts_with(b"/SYSV")
}

/// Segments met so far.
#[derive(Debug, Default)]
pub struct Segments(BTreeMap<i32, Met>);

#[derive(Debug)]
struct Met {
    /// A link to its memory.
    place: PathBuf,
    /// How many mappings the tree has of it.
    mappings: u64,
    /// Flags of mmap(2) that say of which huge pages it is.
    huge: u32,
    subject: String,
}

impl Segments {
    /// Notes a mapping of `pid`; gives the id of its segment.
    ///
    /// # Errors
    /// No such inode number.
    pub(super) fn add(&mut self, pid: Pid, comm: &str, m: &Mapping) -> anyhow::Result<i32> {
        let id = i32::try_from(m.inode).with_context(|| format!("inode {} of shared memory", m.inode))?;
        let met = self.0.entry(id).or_insert_with(|| Met {
            place: PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", m.start, m.end)),
            mappings: 0,
            huge: huge_flags(m),
            subject: format!("pid {pid} ({comm}) System V shared memory {id}"),
        });
        met.mappings += 1;
        Ok(id)
    }

    /// Emits the entries of all segments; gives those whose contents are to be stored. `tree`: who may be attached.
    ///
    /// # Errors
    /// [`Refused`] if others are attached and the segment is not one of `external`.
    pub(crate) fn finish(
        &self,
        tree: &[Pid],
        external: &[i32],
        sink: &mut dyn Sink,
    ) -> anyhow::Result<Vec<ShmemSegment>> {
        let mut contents = Vec::new();
        if self.0.is_empty() {
            return Ok(contents);
        }
        let path = "/proc/sysvipc/shm";
        let table = parse(&fs::read_to_string(path).context(path)?).context(path)?;
        for (&id, met) in &self.0 {
            let row = table.iter().find(|row| row.entry.id == id);
            let row = row.with_context(|| format!("{}: it is not listed in {path}", met.subject))?;
            let external = external.contains(&id);
            if !external && row.attached != met.mappings {
                others(id, tree, row.attached.saturating_sub(met.mappings), &met.subject)?;
            }
            let huge = (met.huge != 0).then(|| hugetlb::SHM | hugetlb::size_flag(hugetlb::size_in(met.huge)));
            let entry = SysvShmEntry { external: external.then_some(true), hugetlb_flag: huge, ..row.entry };
            emit(sink, Image::CkptSysvShm, 0, &entry)?;
            if !external {
                let fd = file::open(&met.place, libc::O_RDONLY.cast_unsigned(), 0)?;
                contents.push(ShmemSegment { shmid: pagemap_of(id), size: memory_size(&entry), fd });
            }
        }
        Ok(contents)
    }
}

/// The size of a segment's pages.
fn page_of(entry: &SysvShmEntry) -> u64 {
    hugetlb::size_in(entry.hugetlb_flag.unwrap_or(0)).max(PAGE)
}

/// The size of its memory: of huge pages, all that can be mapped may be used.
fn memory_size(entry: &SysvShmEntry) -> u64 {
    match entry.hugetlb_flag {
        Some(_) => entry.size.next_multiple_of(page_of(entry)),
        None => entry.size,
    }
}

fn pagemap_of(id: i32) -> u64 {
    PAGEMAPS + u64::from(id.unsigned_abs())
}

/// Refuses a segment that others are attached to, by so many mappings; copies that a snapshot makes do not count.
fn others(id: i32, tree: &[Pid], mut unknown: u64, subject: &str) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for (pid, count) in attached(id) {
        if tree.contains(&pid) {
            continue;
        }
        let comm = crate::fd::comm(pid);
        unknown = unknown.saturating_sub(count);
        if !comm.starts_with("ckpt-snapshot") {
            found.push(format!("pid {pid} ({comm})"));
        }
    }
    if unknown > 0 {
        found.push(format!("{unknown} mappings of processes that can't be seen from here"));
    }
    if found.is_empty() {
        return Ok(());
    }
    let why = format!("is attached to from outside of the tree as well: {}", found.join(", "));
    let advice = format!("dump them too, or leave the segment and its contents alone: --external shm:[{id}]");
    Err(Refused::new(subject, why).advise(advice).into())
}

/// Who is attached to segment `id`, as far as can be seen, and by how many mappings.
fn attached(id: i32) -> Vec<(Pid, u64)> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let mappings = maps::parse(&fs::read(entry.path().join("maps")).ok()?).ok()?;
        let ours = |m: &&Mapping| recognise(m) && i32::try_from(m.inode) == Ok(id);
        let count = mappings.iter().filter(ours).count();
        (count > 0).then_some((Pid(pid), count as u64))
    })
    .collect()
}

struct Row {
    entry: SysvShmEntry,
    attached: u64,
}

/// Parses /proc/sysvipc/shm (proc_sysvipc(5)): a line of names, then a segment in each line.
fn parse(text: &str) -> anyhow::Result<Vec<Row>> {
    let row = |line: &str| -> Option<Row> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |at: usize| words.get(at)?.parse::<u64>().ok();
        let small = |at: usize| words.get(at)?.parse::<u32>().ok();
        Some(Row {
            entry: SysvShmEntry {
                key: words.first()?.parse().ok()?,
                id: words.get(1)?.parse().ok()?,
                mode: u32::from_str_radix(words.get(2)?, 8).ok()?,
                size: number(3)?,
                uid: small(7)?,
                gid: small(8)?,
                cuid: small(9)?,
                cgid: small(10)?,
                external: None,
                hugetlb_flag: None,
            },
            attached: number(6)?,
        })
    };
    text.lines().skip(1).map(|line| row(line).with_context(|| format!("no segment: {line}"))).collect()
}

/// The vma entry of a mapping of segment `id`, from what all mappings have. The status is CRIU's.
pub(super) fn describe(entry: &mut VmaEntry, id: i32, m: &Mapping) {
    entry.shmid = u64::from(id.unsigned_abs());
    entry.status |= status::ANON_SHARED | status::SYSVIPC;
    entry.flags |= libc::MAP_ANONYMOUS.unsigned_abs();
    let access = if m.has(b"mw") { libc::O_RDWR } else { libc::O_RDONLY };
    entry.fdflags = Some(access.unsigned_abs());
}

/// Checks at dump, and of images, that each attachment is whole: shmat(2) makes no other.
///
/// # Errors
/// [`Refused`] for a part of a segment, naming it.
pub(super) fn check_whole(
    subject: &str,
    vmas: &[VmaEntry],
    size: impl Fn(u64) -> Option<u64>,
) -> anyhow::Result<()> {
    let mut open: Option<(u64, u64, u64)> = None; // id, where it goes on, end
    for vma in vmas {
        let ours = vma.status & status::SYSVIPC != 0;
        if let Some((id, at, end)) = open.take() {
            if ours && vma.shmid == id && vma.start == at && vma.end <= end && vma.pgoff != 0 {
                open = (vma.end < end).then_some((id, vma.end, end));
                continue;
            }
            return Err(part(subject, vma.start, id));
        }
        if ours {
            let size = size(vma.shmid).with_context(|| format!("no System V shared memory {}", vma.shmid))?;
            let page = if is_huge(vma) { hugetlb::size_in(vma.flags).max(PAGE) } else { PAGE };
            let end = vma.start.checked_add(size.next_multiple_of(page)).context("size of a segment")?;
            if vma.pgoff != 0 || vma.end > end {
                return Err(part(subject, vma.start, vma.shmid));
            }
            open = (vma.end < end).then_some((vma.shmid, vma.end, end));
        }
    }
    match open {
        Some((id, at, _)) => Err(part(subject, at, id)),
        None => Ok(()),
    }
}

fn part(subject: &str, at: u64, id: u64) -> anyhow::Error {
    let why = format!(
        "a part of System V shared memory {id} has been unmapped, at {at:#x}, which can't be restored"
    );
    Refused::new(subject, why).into()
}

/// Protection of a segment's mappings as shmat(2) makes them.
pub(super) fn first_prot(vma: &VmaEntry) -> u32 {
    let write = if read_only(vma) { 0 } else { libc::PROT_WRITE };
    (libc::PROT_READ | write).unsigned_abs()
}

fn read_only(vma: &VmaEntry) -> bool {
    vma.fdflags == Some(libc::O_RDONLY.unsigned_abs())
}

/// Attaches to a segment by its first part; the others come with it.
pub(super) fn attach_call(vma: &VmaEntry) -> Option<Call> {
    if vma.pgoff != 0 {
        return None;
    }
    let flags = if read_only(vma) { libc::SHM_RDONLY } else { 0 };
    let args = [Arg::Val(vma.shmid), Arg::Val(vma.start), flags.into()];
    Some(Call::new(format!("shmat({}, {:#x})", vma.shmid, vma.start), libc::SYS_shmat, args))
}

/// The segments of a checkpoint.
///
/// # Errors
/// Malformed images.
pub(super) fn entries(set: &ImageSet) -> anyhow::Result<Vec<SysvShmEntry>> {
    let entries: Vec<SysvShmEntry> = set.all(Image::CkptSysvShm, 0)?;
    ensure!(entries.iter().all(|entry| entry.id >= 0), "{}: an id below 0", Image::CkptSysvShm.file_name(0));
    Ok(entries)
}

/// Segments at restore.
#[derive(Debug, Default)]
pub struct Restored {
    /// By the number of their pagemaps, attached to until the tasks are.
    attached: BTreeMap<u64, (Attached, u64)>,
    /// What was made, and what of that is to be removed when the tasks are attached.
    made: Vec<i32>,
    dest: Vec<i32>,
}

impl Restored {
    /// Takes over or makes all segments of a checkpoint. What was made is removed if that fails.
    ///
    /// # Errors
    /// [`Refused`] if an id or a key belongs to another segment, or somebody is attached.
    pub(crate) fn prepare(set: &ImageSet) -> anyhow::Result<Self> {
        let mut restored = Self::default();
        for entry in entries(set)? {
            if let Err(error) = restored.add(&entry) {
                restored.undo();
                return Err(error.context(format!("System V shared memory {}", entry.id)));
            }
        }
        Ok(restored)
    }

    fn add(&mut self, entry: &SysvShmEntry) -> anyhow::Result<()> {
        let there = sysv::state(entry.id)?;
        if entry.external() {
            let same = there.is_some_and(|now| now.size == entry.size && now.key == entry.key);
            ensure!(same, "it is external to the checkpoint and has to be there, with key {:#x}", entry.key);
            return Ok(());
        }
        let subject = format!("System V shared memory {} (key {:#x})", entry.id, entry.key);
        match there {
            Some(now) => {
                let same = (now.key, now.size, now.uid, now.gid)
                    == (entry.key, entry.size, entry.uid, entry.gid)
                    && (now.mode | entry.mode) & sysv::DEST == 0;
                if !same {
                    let why = format!("its id belongs to another segment, with key {:#x}", now.key);
                    return Err(Refused::new(subject, why)
                        .advise(format!("end who uses it, then ipcrm -m {}", entry.id))
                        .into());
                }
                if now.attached > 0 {
                    let who: Vec<String> = attached(entry.id)
                        .iter()
                        .map(|(pid, _)| format!("pid {pid} ({})", crate::fd::comm(*pid)))
                        .collect();
                    let why = format!("is in use by others: {}", who.join(", "));
                    return Err(Refused::new(subject, why)
                        .advise("end them first (--replace ends the originals)")
                        .into());
                }
            }
            None => {
                let huge = entry.hugetlb_flag.unwrap_or(0);
                let made = sysv::create(entry.id, entry.key, entry.size, (entry.cuid, entry.cgid), huge);
                if let Err(error) = made {
                    return Err(match error.errno {
                        Errno::ENOMEM | Errno::EINVAL if huge != 0 => {
                            hugetlb::too_few(format!("{subject}: {error}"), page_of(entry)).into()
                        }
                        Errno::EPERM if huge != 0 && error.call == "shmget" => {
                            let why = "its creator may not make segments of huge pages";
                            Refused::new(subject, why).advise("restore as root").into()
                        }
                        Errno::EEXIST => {
                            let why = "another segment has its key, or its place in the kernel's table";
                            Refused::new(subject, why)
                                .advise("ipcs -m lists segments, ipcrm -m ID removes one")
                                .into()
                        }
                        Errno::EPERM | Errno::EACCES => {
                            let why = "choosing its id takes CAP_CHECKPOINT_RESTORE";
                            Refused::new(subject, why).advise("restore as root").into()
                        }
                        _ => error.into(),
                    });
                }
                self.made.push(entry.id);
            }
        }
        let size = memory_size(entry);
        let attached = Attached::to(entry.id, size, page_of(entry))?;
        if there.is_some() {
            // What is not stored of it is zeros.
            let len = i64::try_from(size.next_multiple_of(PAGE)).context("size")?;
            let flags =
                fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fcntl::fallocate(attached.memory.as_fd(), flags, 0, len).context("fallocate(PUNCH_HOLE)")?;
        }
        sysv::set(entry.id, (entry.uid, entry.gid), entry.mode)?;
        if entry.mode & sysv::DEST != 0 {
            self.dest.push(entry.id);
        }
        if self.attached.insert(pagemap_of(entry.id), (attached, size)).is_some() {
            bail!("two entries have id {}", entry.id);
        }
        Ok(())
    }

    /// The memory of the segment whose pagemap has this number, and its size.
    pub(crate) fn memory(&self, pagemap: u64) -> Option<(BorrowedFd<'_>, u64)> {
        self.attached.get(&pagemap).map(|(attached, size)| (attached.memory.as_fd(), *size))
    }

    /// All tasks are attached. Once.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        for id in std::mem::take(&mut self.dest) {
            sysv::remove(id)?;
            self.made.retain(|&made| made != id);
        }
        self.attached.clear();
        Ok(())
    }

    /// Removes what was made, for a restore that fails. What was taken over stays, its contents changed.
    pub(crate) fn undo(&mut self) {
        for id in self.made.drain(..) {
            let _ = sysv::remove(id);
        }
        self.attached.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_the_kernel() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n\
            -559038737          9  1600                    56 28246  5354      6   101   104     0     0 1795545803 1795545803 1795545502                  4096                     0\n";
        let rows = parse(text).unwrap();
        let expected = SysvShmEntry {
            key: -559_038_737,
            id: 9,
            mode: 0o1600,
            size: 56,
            uid: 101,
            gid: 104,
            cuid: 0,
            cgid: 0,
            external: None,
            hugetlb_flag: None,
        };
        assert_eq!((rows.len(), rows[0].entry, rows[0].attached), (1, expected, 6));
        assert!(parse("names\n1 2 3\n").is_err());
    }

    #[test]
    fn attachments_have_to_be_whole() {
        let vma = |start, end, shmid, pgoff| VmaEntry {
            start,
            end,
            shmid,
            pgoff,
            status: status::REGULAR | status::SYSVIPC | status::ANON_SHARED,
            ..VmaEntry::default()
        };
        let whole = |vmas: &[VmaEntry]| check_whole("x", vmas, |id| (id == 7).then_some(0x2001)).is_ok();
        assert!(whole(&[vma(0x1000, 0x4000, 7, 0)]));
        assert!(whole(&[
            vma(0x1000, 0x2000, 7, 0),
            vma(0x2000, 0x4000, 7, 0x1000),
            vma(0x4000, 0x7000, 7, 0)
        ]));
        assert!(!whole(&[vma(0x1000, 0x3000, 7, 0)]));
        assert!(!whole(&[vma(0x2000, 0x4000, 7, 0x1000)]));
        assert!(!whole(&[vma(0x1000, 0x2000, 7, 0), vma(0x3000, 0x4000, 7, 0x2000)]));
        assert!(!whole(&[vma(0x1000, 0x5000, 7, 0)]));
        assert!(!whole(&[vma(0x1000, 0x4000, 8, 0)]));
        let flags = libc::MAP_HUGETLB.unsigned_abs() | hugetlb::size_flag(2 << 20);
        let huge = |end, pgoff| VmaEntry { flags, ..vma(2 << 20, end, 7, pgoff) };
        assert!(whole(&[huge(4 << 20, 0)]));
        assert!(!whole(&[huge(6 << 20, 0)]));
    }
}
