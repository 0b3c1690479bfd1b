//! Reading the address space of a frozen process.
//!
//! Mappings come from /proc/PID/maps and their flags from where [`super::flags`] says, populated pages from
//! `ioctl(PAGEMAP_SCAN)`, contents by reading /proc/PID/mem in chunks of [`CHUNK`] that stay in the
//! processor's cache between being read and being written.
//!
//! Why not process_vm_readv(2): it pins pages, and a page that is shared copy-on-write has to be
//! copied before it may be pinned (`gup_must_unshare`, mm/internal.h, Linux 6.0). A dump of forked
//! workers would give each of them a heap of its own. Reading /proc/PID/mem is as fast, leaves
//! sharing alone and asks for no permission of the mapping.
//!
//! Into a pipe the chunks are given away (vmsplice(2)), which saves a copy. A chunk's memory is
//! used again only if the writer at the far end tells what it has taken (`Lending`): a stage that splices the pages on
//! refers to it for an unknown time. Where the writer shares its directory, pages do not go through pipes at all ([`place`]).

use std::{
    fs::File,
    io::Write,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
};

use anyhow::Context;
use ckpt_proc::maps::Mapping;
use ckpt_proto::{
    Image,
    stream::{Facts, Writer},
    types::{PagemapEntry, PagemapHead, VmaEntry},
};
use ckpt_sys::{
    Pid, Refused, RemoteAddr,
    capability::{
        self,
        number::{CHECKPOINT_RESTORE, SYS_ADMIN},
    },
    gift::{self, Gift},
    hugetlb,
    memory::{self, Page, PageRange, Scan},
    transfer::Output,
    uffd,
};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};

use super::{
    page, place, status, sysv,
    track::{Found, Tracked, private_pages},
};
use crate::{
    fd::FileTable,
    sink::{Sink, emit},
};

/// Bytes of memory that are moved at a time.
pub const CHUNK: usize = 1 << 20;

/// Bytes of pages in a record. Half of what a pipe holds, so that the stages behind work while the next ones are read.
pub(super) const RECORD: usize = 512 << 10;

pub(super) const PAGE: u64 = 4096;

/// VmFlags whose advice a restore repeats: madvise(2) number for each.
pub(super) const ADVICE: &[(&[u8; 2], i32)] = &[
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"wf", libc::MADV_WIPEONFORK),
    (b"mg", libc::MADV_MERGEABLE),
    (b"sr", libc::MADV_SEQUENTIAL),
    (b"rr", libc::MADV_RANDOM),
];

/// What the kernel calls anonymous memory of huge pages, private or shared.
const ANONYMOUS_HUGE: &[u8] = b"/anon_hugepage (deleted)";

/// Mappings that can't be restored yet, by VmFlags, and how to say so.
const REFUSED: &[(&[u8; 2], &str)] = &[
    (b"um", "memory watched by userfaultfd (missing pages)"),
    (b"uw", "memory watched by userfaultfd (write protection)"),
    (b"ui", "memory watched by userfaultfd (minor faults)"),
    (b"ss", "a shadow stack"),
    (b"sl", "sealed memory (mseal)"),
];

/// Registers what the mappings of `pid` map in `files`, and gives them as image entries.
/// Those that a userfaultfd tracks are listed in `watched`, if it is known to be ours.
///
/// # Errors
/// [`Refused`] for a mapping that can't be restored, naming its addresses.
pub fn dump_vmas(
    pid: Pid,
    comm: &str,
    mappings: &[Mapping],
    files: &mut FileTable,
    sink: &mut dyn Sink,
    mut watched: Option<&mut Vec<Range<u64>>>,
) -> anyhow::Result<Vec<VmaEntry>> {
    let mut entries: Vec<VmaEntry> = Vec::with_capacity(mappings.len());
    let mut before: Option<&Mapping> = None;
    for mapping in mappings {
        let ours = match &mut watched {
            Some(list) if mapping.has(b"uw") => {
                list.push(mapping.start..mapping.end);
                true
            }
            _ => false,
        };
        // The parts of a program or library lie side by side.
        let known = before.zip(entries.last()).filter(|(m, entry)| {
            let alike = |m: &Mapping| (m.dev, m.inode, m.shared);
            entry.status & status::FILE_PRIVATE != 0
                && m.end == mapping.start
                && alike(m) == alike(mapping)
                && m.name == mapping.name
        });
        let known = known.map(|(_, entry)| entry.shmid);
        before = Some(mapping);
        let entry = dump_vma(pid, comm, mapping, ours, known, files, sink)?;
        match entries.last_mut() {
            // The kernel shows the vvar area in parts, the images know it as one.
            Some(last)
                if last.status & entry.status & status::VVAR != 0
                    && last.end == entry.start
                    && last.prot == entry.prot =>
            {
                last.end = entry.end;
            }
            _ => entries.push(entry),
        }
    }
    if entries.iter().any(|entry| entry.status & status::SYSVIPC != 0) {
        let size = |id| Some(ckpt_sys::sysv::state(i32::try_from(id).ok()?).ok()??.size);
        sysv::check_whole(&format!("pid {pid} ({comm})"), &entries, size)?;
    }
    Ok(entries)
}

fn dump_vma(
    pid: Pid,
    comm: &str,
    m: &Mapping,
    tracked: bool,
    known: Option<u64>,
    files: &mut FileTable,
    sink: &mut dyn Sink,
) -> anyhow::Result<VmaEntry> {
    let refuse = |what: &str| {
        let name = m.name.escape_ascii();
        Refused::new(format!("pid {pid} ({comm}) memory {:#x}-{:#x} {name}", m.start, m.end), what.to_owned())
    };
    let bits = |pairs: &[(bool, i32)]| {
        pairs.iter().filter(|(set, _)| *set).fold(0, |bits, (_, bit)| bits | bit.unsigned_abs())
    };
    let mut entry = VmaEntry {
        start: m.start,
        end: m.end,
        pgoff: m.offset,
        shmid: 0,
        prot: bits(&[(m.read, libc::PROT_READ), (m.write, libc::PROT_WRITE), (m.exec, libc::PROT_EXEC)]),
        flags: if m.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }.unsigned_abs() | huge_flags(m),
        status: status::REGULAR,
        fd: -1,
        madv: None,
        fdflags: None,
    };
    if let Some((flag, what)) = REFUSED.iter().find(|(flag, _)| m.has(flag) && !(tracked && *flag == b"uw")) {
        let refused = refuse(&format!("{what} can't be checkpointed"));
        return Err(match *flag {
            b"um" => refused.advise("after ckpt-restore --lazy, wait until all pages have come"),
            b"uw" => refused.advise("if a ckpt-track is at work, say ckpt-scan --track ADDRESS"),
            _ => refused,
        }
        .into());
    }
    let advice =
        ADVICE.iter().filter(|(flag, _)| m.has(flag)).fold(0, |bits, (_, advice)| bits | 1_u64 << advice);
    let anonymous = bits(&[
        (true, libc::MAP_ANONYMOUS),
        (m.has(b"gd"), libc::MAP_GROWSDOWN),
        (m.has(b"lo"), libc::MAP_LOCKED),
        (m.has(b"nr"), libc::MAP_NORESERVE),
    ]);
    match m.name.as_slice() {
        b"[vsyscall]" => {
            entry.status = status::VSYSCALL | status::ANON_PRIVATE;
            entry.flags |= anonymous;
        }
        b"[vdso]" => {
            entry.status |= status::VDSO | status::ANON_PRIVATE;
            entry.flags |= anonymous;
            entry.pgoff = 0;
        }
        b"[vvar]" | b"[vvar_vclock]" => {
            entry.status |= status::VVAR | status::ANON_PRIVATE;
            entry.flags |= anonymous;
            entry.pgoff = 0;
            entry.madv = Some(1 << libc::MADV_DONTDUMP);
        }
        _ if m.has(b"io") || m.has(b"pf") => {
            return Err(refuse("memory of a device can't be checkpointed").into());
        }
        name if name.starts_with(b"/[aio]") || name.starts_with(b"[aio]") => {
            let reason =
                "an AIO ring (io_setup) can't be checkpointed: the kernel does not tell what is in flight";
            return Err(refuse(reason).advise(WITHOUT_RINGS).into());
        }
        b"anon_inode:[io_uring]" => {
            return Err(refuse("an io_uring can't be checkpointed").advise(WITHOUT_RINGS).into());
        }
        name if name.starts_with(b"anon_inode:") => {
            return Err(refuse("memory of this kind can't be checkpointed").into());
        }
        _ if sysv::recognise(m) => {
            let id = files.sysv.add(pid, comm, m)?;
            sysv::describe(&mut entry, id, m);
            entry.flags |= bits(&[(m.has(b"lo"), libc::MAP_LOCKED), (m.has(b"nr"), libc::MAP_NORESERVE)]);
            entry.madv = (advice != 0).then_some(advice);
        }
        _ if m.has(b"dp") => {
            return Err(refuse("droppable memory (MAP_DROPPABLE) can't be checkpointed yet").into());
        }
        _ if private_huge(m) => {
            entry.status |= status::ANON_PRIVATE;
            entry.flags |= anonymous;
            entry.madv = (advice != 0).then_some(advice);
        }
        _ if !m.file() => {
            entry.status |= status::ANON_PRIVATE;
            if m.name == b"[heap]" {
                entry.status |= status::HEAP;
            }
            entry.flags |= anonymous;
            entry.pgoff = 0;
            entry.madv = (advice != 0).then_some(advice);
        }
        name => {
            let link = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", m.start, m.end));
            entry.madv = (advice != 0).then_some(advice);
            entry.flags |= bits(&[(m.has(b"lo"), libc::MAP_LOCKED), (m.has(b"nr"), libc::MAP_NORESERVE)]);
            // VM_MAYWRITE tells that the descriptor which was mapped was open for writing.
            let access = if m.shared && m.has(b"mw") { libc::O_RDWR } else { libc::O_RDONLY }.unsigned_abs();
            entry.fdflags = Some(access);
            if let Some(id) = socket_id(name) {
                let ring = (m.offset, m.end - m.start);
                entry.shmid = u64::from(files.add_mapped_ring(pid, id, ring, sink)?.0);
                entry.status |= status::SOCKET;
                return Ok(entry);
            }
            if is_shmem(name) {
                let segment = files
                    .add_shmem(pid, &link, sink)
                    .map_err(|e| not_told(e, &refuse))
                    .with_context(|| refuse("mapped memory").subject)?;
                entry.shmid = u64::from(segment.file_id);
                entry.status |= status::MEMFD;
            } else if let Some(file) = known {
                entry.shmid = file;
            } else {
                let file = files
                    .add_path(pid, &link, access, sink)
                    .map_err(|e| not_told(e, &refuse))
                    .with_context(|| refuse("mapped file").subject)?;
                entry.shmid = u64::from(file);
            }
            entry.status |= if m.shared { status::FILE_SHARED } else { status::FILE_PRIVATE };
        }
    }
    Ok(entry)
}

/// What may be done about rings for asynchronous I/O.
const WITHOUT_RINGS: &str = "run the program without asynchronous I/O of the kernel: most have an option for that (MariaDB \
     --innodb-use-native-aio=0), or fall back if sysctl kernel.io_uring_disabled=2";

/// The private mappings among `mappings` that a pre-dump stores, and those that it leaves to the checkpoint: of huge pages, since
/// to read one that has gone meanwhile would take a new one from the pool. What can't be checkpointed is left out; the
/// checkpoint says so.
#[must_use]
pub fn private_vmas(mappings: &[Mapping]) -> (Vec<VmaEntry>, Vec<VmaEntry>) {
    let plain = |m: &&Mapping| {
        let known = REFUSED.iter().any(|(flag, _)| *flag != b"uw" && m.has(flag));
        let kernels = [&b"[vsyscall]"[..], b"[vdso]", b"[vvar]", b"[vvar_vclock]"].contains(&&m.name[..]);
        !m.shared && !known && !kernels && !m.has(b"io") && !m.has(b"pf")
    };
    let entry = |m: &Mapping| {
        let kind = if m.file() { status::FILE_PRIVATE } else { status::ANON_PRIVATE };
        VmaEntry { start: m.start, end: m.end, status: status::REGULAR | kind, ..VmaEntry::default() }
    };
    let (huge, stored): (Vec<&Mapping>, _) = mappings.iter().filter(plain).partition(|m| m.has(b"ht"));
    let entries = |list: Vec<&Mapping>| list.into_iter().map(entry).collect();
    (entries(stored), entries(huge))
}

/// A refusal if the error says that we may not follow links in map_files (proc_pid_map_files(5)).
fn not_told(error: anyhow::Error, refuse: &dyn Fn(&str) -> Refused) -> anyhow::Error {
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<Errno>());
    let lacks = errno.and_then(|&errno| capability::lack(errno, &[CHECKPOINT_RESTORE]));
    if lacks.is_none() || capability::held(SYS_ADMIN) {
        return error;
    }
    refuse("to look at the mapped file itself needs CAP_CHECKPOINT_RESTORE")
        .advise("run ckpt-scan as root or with that capability")
        .into()
}

/// The flags of a mapping of huge pages, with their size (mmap(2)); 0 for any other.
pub(super) fn huge_flags(m: &Mapping) -> u32 {
    let flags = || libc::MAP_HUGETLB.unsigned_abs() | hugetlb::size_flag(m.page_kib * 1024);
    if m.has(b"ht") { flags() } else { 0 }
}

/// Whether a mapping is of MAP_PRIVATE, MAP_ANONYMOUS and MAP_HUGETLB, which the kernel makes with a file of its own.
fn private_huge(m: &Mapping) -> bool {
    m.has(b"ht") && !m.shared && m.name == ANONYMOUS_HUGE
}

/// Whether a mapped file's name is that of a memfd or of shared anonymous memory.
fn is_shmem(name: &[u8]) -> bool {
    name.starts_with(b"/memfd:") || [&b"/dev/zero (deleted)"[..], ANONYMOUS_HUGE].contains(&name)
}

/// The inode of a mapped socket.
fn socket_id(name: &[u8]) -> Option<u64> {
    let id = std::str::from_utf8(name).ok().filter(|name| name.starts_with("socket:["))?;
    ckpt_sys::sock::parse_id(id).map(|id| id.0)
}

/// What will be stored of one process's memory.
#[derive(Debug)]
pub struct Plan {
    pid: Pid,
    /// The process that pages are read from: itself or a copy of it.
    source: Pid,
    /// Number of the pages image.
    pub pages_id: u32,
    /// Runs to store, in address order.
    runs: Vec<Run>,
    /// The process runs while its pages are read.
    running: Option<Running>,
}

/// What is needed to read the pages of a process that runs.
#[derive(Debug)]
struct Running {
    /// Its memory: opened while it was frozen, so that it is not that of a later program.
    memory: File,
    /// The same of what is known of its pages.
    pagemap: File,
    /// What tracks its writes.
    uffd: OwnedFd,
}

/// Pages that are stored, or marked, in the same way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) lazy: bool,
    pub(super) vdso: bool,
    /// Nothing is to be stored: the pages are in the parent.
    pub(super) in_parent: bool,
    /// Nothing is to be stored: the parent process has the same pages, and they are stored with it.
    pub(super) forked: bool,
}

impl Run {
    /// Whether `next` goes on where this ends, and is treated alike.
    pub(super) fn joins(&self, next: &Self) -> bool {
        let kind = |run: &Self| (run.lazy, run.vdso, run.in_parent, run.forked);
        self.end == next.start && kind(self) == kind(next)
    }

    fn is_stored(&self) -> bool {
        !self.in_parent && !self.forked
    }

    fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

impl Plan {
    /// Finds the pages of `pid` that are to be stored, by its mappings. Of a process that is `tracked`,
    /// those that have not been written since the parent checkpoint are only noted, and all are protected
    /// for the next.
    ///
    /// # Errors
    /// PAGEMAP_SCAN is missing or not permitted.
    pub fn new(
        pid: Pid,
        vmas: &[VmaEntry],
        pages_id: u32,
        tracked: Option<Tracked<'_>>,
    ) -> anyhow::Result<Self> {
        Self::find(pid, pid, vmas, pages_id, tracked)
    }

    /// Finds them by `source`, a process with the same memory, from which the pages will be read too.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_copy(pid: Pid, source: Pid, vmas: &[VmaEntry], pages_id: u32) -> anyhow::Result<Self> {
        Self::find(pid, source, vmas, pages_id, None)
    }

    fn find(
        pid: Pid,
        source: Pid,
        vmas: &[VmaEntry],
        pages_id: u32,
        tracked: Option<Tracked<'_>>,
    ) -> anyhow::Result<Self> {
        let path = format!("/proc/{source}/pagemap");
        let pagemap = File::open(&path).with_context(|| path.clone())?;
        let mut plan = Self { pid, source, pages_id, runs: Vec::new(), running: None };
        let mut ranges: Vec<PageRange> = Vec::new();
        for vma in vmas {
            let Some(select) = selection(vma.status) else { continue };
            let found = match (select, &tracked) {
                (Select::All, _) => vec![Found { start: vma.start, end: vma.end, in_parent: false }],
                (Select::Anonymous, Some(tracked)) => tracked.look(pid, &pagemap, vma)?,
                (Select::Anonymous, None) => {
                    ranges.clear();
                    memory::pagemap_scan(
                        pagemap.as_fd(),
                        RemoteAddr(vma.start),
                        RemoteAddr(vma.end),
                        private_pages(vma, Page::empty()),
                        &mut ranges,
                    )
                    .with_context(|| path.clone())?;
                    let found = |r: &PageRange| Found { start: r.start, end: r.end, in_parent: false };
                    ranges.iter().map(found).collect()
                }
            };
            let vdso = vma.status & status::VDSO != 0;
            let lazy = vma.status & status::ANON_PRIVATE != 0 && !vdso;
            for Found { start, end, in_parent } in found {
                let run = Run { start, end, lazy, vdso, in_parent, forked: false };
                match plan.runs.last_mut() {
                    Some(last) if last.joins(&run) => {
                        last.end = end;
                    }
                    _ => plan.runs.push(run),
                }
            }
        }
        Ok(plan)
    }

    /// The same pages, to be read from `source`, a copy of the process.
    #[must_use]
    pub fn from_copy(mut self, source: Pid) -> Self {
        self.source = source;
        self
    }

    /// The same pages, to be read when the process runs again. What it writes until then is in the next increment: it
    /// must be tracked.
    ///
    /// # Errors
    /// Its memory can't be opened.
    pub fn while_running(mut self, tracked: Tracked<'_>) -> anyhow::Result<Self> {
        let path = format!("/proc/{}/mem", self.pid);
        let memory = File::open(&path).context(path)?;
        let path = format!("/proc/{}/pagemap", self.pid);
        let pagemap = File::open(&path).context(path)?;
        let uffd = tracked.uffd.try_clone_to_owned().context("userfaultfd")?;
        self.running = Some(Running { memory, pagemap, uffd });
        Ok(self)
    }

    /// The runs whose pages are stored.
    pub(super) fn stored(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| run.is_stored())
    }

    /// How many bytes that is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.stored().map(Run::bytes).sum()
    }

    /// Whose memory it is.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    pub(super) fn source(&self) -> Pid {
        self.source
    }

    pub(super) fn runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    pub(super) fn set_runs(&mut self, runs: Vec<Run>) {
        self.runs = runs;
    }

    /// Emits the pagemap.
    ///
    /// # Errors
    /// The sink's.
    pub fn emit(&self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        Self::emit_head(self.pid, self.pages_id, sink)?;
        self.emit_runs(sink)
    }

    /// Emits the head of the pagemap of `pid`, whose pages are to be found in `pages_id`.
    ///
    /// # Errors
    /// The sink's.
    pub fn emit_head(pid: Pid, pages_id: u32, sink: &mut dyn Sink) -> anyhow::Result<()> {
        emit(sink, Image::Pagemap, u64::from(pid.0.unsigned_abs()), &PagemapHead { pages_id })
    }

    /// Emits what comes after the head.
    ///
    /// # Errors
    /// The sink's.
    pub fn emit_runs(&self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        let arg = u64::from(self.pid.0.unsigned_abs());
        let mut merged: Vec<Run> = Vec::new();
        for run in &self.runs {
            match merged.last_mut() {
                Some(last)
                    if last.end == run.start
                        && (last.in_parent, last.forked) == (run.in_parent, run.forked)
                        && (last.lazy == run.lazy || run.in_parent) =>
                {
                    last.end = run.end;
                }
                _ => merged.push(*run),
            }
        }
        for run in merged {
            let lazy = if run.lazy { page::LAZY } else { 0 };
            let flags = match (run.in_parent, run.forked) {
                (true, _) => page::PARENT,
                (false, true) => page::AS_PARENT_PROCESS | lazy,
                (false, false) => page::PRESENT | lazy,
            };
            emit(sink, Image::Pagemap, arg, &pagemap_entry(run.start, (run.end - run.start) / PAGE, flags))?;
        }
        Ok(())
    }

    /// What pages are read from.
    pub(super) fn memory(&self) -> anyhow::Result<File> {
        let path = format!("/proc/{}/mem", self.source);
        match &self.running {
            Some(running) => running.memory.try_clone(),
            None => File::open(&path),
        }
        .context(path)
    }

    /// Of a process that runs: the parts of `range` whose pages are as they were when it was frozen. What can't be told
    /// is not among them.
    pub(super) fn unchanged(&self, range: &Range<u64>) -> Vec<PageRange> {
        let mut same = Vec::new();
        let Some(running) = &self.running else { return same };
        let all = Page::WRITTEN | Page::WPALLOWED | Page::PRESENT;
        let scan = Scan { inverted: Page::WRITTEN, all, any: Page::empty(), report: Page::empty() };
        let (start, end) = (RemoteAddr(range.start), RemoteAddr(range.end));
        match memory::pagemap_scan(running.pagemap.as_fd(), start, end, scan, &mut same) {
            Ok(()) => same,
            Err(_) => Vec::new(),
        }
    }

    /// Of a process that runs: the next increment will store these pages, as if they were written now.
    pub(super) fn count_as_written(&self, range: &Range<u64>) {
        let Some(running) = &self.running else { return };
        // One by one: some may be gone.
        for start in range.clone().step_by(4096) {
            uffd::count_as_written(running.uffd.as_fd(), RemoteAddr(start), RemoteAddr(start + PAGE));
        }
    }

    /// Reads pages. Of a process that runs some may be gone: they are zeros, and count as written from here on, so that
    /// no increment is without them.
    pub(super) fn read(&self, memory: &File, place: &mut [u8], at: u64) -> anyhow::Result<()> {
        let read = memory.read_exact_at(place, at);
        let (Err(_), Some(running)) = (&read, &self.running) else {
            return read.with_context(|| format!("/proc/{}/mem: read at {at:#x}", self.source));
        };
        if !uffd::is_alive(running.uffd.as_fd()) {
            place.fill(0);
            return Ok(());
        }
        for (page, start) in place.chunks_mut(4096).zip((at..).step_by(4096)) {
            if memory.read_exact_at(page, start).is_err() {
                page.fill(0);
                uffd::count_as_written(running.uffd.as_fd(), RemoteAddr(start), RemoteAddr(start + PAGE));
            }
        }
        Ok(())
    }

    /// Writes the pages, in the order of the pagemap. `progress` is told of each chunk's bytes.
    ///
    /// # Errors
    /// The output's, or the process died.
    pub fn copy(&self, out: &mut Writer<Output>, mut progress: impl FnMut(u64)) -> anyhow::Result<()> {
        let mut chunk = Chunk::for_output(out.output().as_fd(), self.bytes())?;
        let memory = self.memory()?;
        let mut records = Records::of(self);
        let mut may_place = matches!(chunk, Chunk::Gift(_));
        loop {
            // A writer may say so a little later.
            if let Some(directory) = may_place.then(|| out.output().lent()?.directory()).flatten() {
                match place::file(directory, self.pages_id) {
                    Ok(file) => return place::copy(self, &memory, records, &file, out, progress),
                    Err(_) => may_place = false,
                }
            }
            let Some(record) = records.next() else { return Ok(()) };
            chunk.prepare(out)?;
            let place = &mut chunk.bytes()[..record.len];
            self.read_record(&memory, &record, place)?;
            chunk.write(out, self.pages_id, record.len)?;
            progress(record.len as u64);
        }
    }

    /// Reads the pages of a record, which are as many as `place` has room for.
    pub(super) fn read_record(&self, memory: &File, record: &Record, place: &mut [u8]) -> anyhow::Result<()> {
        let mut rest = place;
        for &(start, len) in &record.parts {
            let (part, behind) = rest.split_at_mut(len);
            self.read(memory, part, start)?;
            rest = behind;
        }
        Ok(())
    }
}

/// Pages that are moved together.
#[derive(Debug)]
pub(super) struct Record {
    /// Where in the pages image, bytes.
    pub(super) offset: u64,
    /// At most [`RECORD`] bytes.
    pub(super) len: usize,
    /// Start and bytes of each part.
    parts: Vec<(u64, usize)>,
}

/// The records of a plan, all but the last as long as can be.
#[derive(Debug)]
pub(super) struct Records<'a> {
    runs: std::slice::Iter<'a, Run>,
    /// What is left of the run before.
    rest: Range<u64>,
    offset: u64,
}

impl<'a> Records<'a> {
    fn of(plan: &'a Plan) -> Self {
        Self { runs: plan.runs.iter(), rest: 0..0, offset: 0 }
    }
}

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let mut record = Record { offset: self.offset, len: 0, parts: Vec::new() };
        while record.len < RECORD {
            if self.rest.is_empty() {
                let Some(run) = self.runs.find(|run| run.is_stored()) else { break };
                self.rest = run.start..run.end;
            }
            let left = usize::try_from(self.rest.end - self.rest.start).unwrap_or(RECORD);
            let n = left.min(RECORD - record.len);
            record.parts.push((self.rest.start, n));
            record.len += n;
            self.rest.start += n as u64;
        }
        self.offset += record.len as u64;
        (record.len > 0).then_some(record)
    }
}

/// Memory that is moved at a time.
enum Chunk {
    /// Given to the pipe behind us.
    Gift(Gift),
    /// Copied, where the output is no pipe or it is too little to matter.
    Plain(Vec<u8>),
}

impl Chunk {
    fn for_output(out: BorrowedFd<'_>, total: u64) -> anyhow::Result<Self> {
        let kind = nix::sys::stat::fstat(out).context("standard output")?.st_mode & libc::S_IFMT;
        if kind == libc::S_IFIFO && total >= gift::SIZE as u64 {
            return Ok(Self::Gift(Gift::new()?));
        }
        Ok(Self::Plain(vec![0; usize::try_from(total).unwrap_or(CHUNK).min(CHUNK)]))
    }

    /// Before it is filled anew.
    fn prepare(&mut self, out: &mut Writer<Output>) -> anyhow::Result<()> {
        let Self::Gift(gift) = self else { return Ok(()) };
        let sent = out.counts().page_bytes;
        if let Some(lending) = out.output().lent()
            && gift.lend()
        {
            lending
                .wait((sent + RECORD as u64).saturating_sub(gift::SIZE as u64))
                .context("write the stream")?;
        }
        Ok(())
    }

    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Gift(gift) => gift.bytes(),
            Self::Plain(buffer) => buffer,
        }
    }

    /// Sends the first `len` bytes.
    fn write(&mut self, out: &mut Writer<Output>, pages_id: u32, len: usize) -> anyhow::Result<()> {
        let what = "write the stream";
        match self {
            Self::Gift(gift) => {
                let facts = Facts::of(&gift.bytes()[..len]);
                out.bulk_data(u64::from(pages_id), len as u64, facts).context(what)?;
                out.output().flush().context(what)?;
                gift.give(out.output().as_fd(), len).context(what)
            }
            Self::Plain(buffer) => out.data(Image::Pages, u64::from(pages_id), &buffer[..len]).context(what),
        }
    }
}

enum Select {
    All,
    Anonymous,
}

fn selection(vma_status: u32) -> Option<Select> {
    if vma_status & (status::VVAR | status::VSYSCALL) != 0 {
        None
    } else if vma_status & status::VDSO != 0 {
        Some(Select::All)
    } else {
        (vma_status & (status::ANON_PRIVATE | status::FILE_PRIVATE) != 0).then_some(Select::Anonymous)
    }
}

fn pagemap_entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
    PagemapEntry { vaddr, compat_nr_pages: 0, in_parent: None, flags: Some(flags), nr_pages: Some(pages) }
}

/// A shared memory segment: its pagemap entries are offsets in it.
#[derive(Debug)]
pub struct ShmemPlan {
    shmid: u64,
    /// Number of the pages image.
    pub pages_id: u32,
    runs: Vec<(u64, u64)>,
}

impl ShmemPlan {
    /// Finds the populated parts of segment `shmid`, whose file is `fd`, by SEEK_DATA and SEEK_HOLE, which a file of huge pages
    /// has not.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(shmid: u64, fd: BorrowedFd<'_>, size: u64, pages_id: u32) -> anyhow::Result<Self> {
        let what = || format!("shared memory segment {shmid}");
        let mut plan = Self { shmid, pages_id, runs: Vec::new() };
        if let Some(page) = hugetlb::page_size(fd).with_context(what)? {
            let parts = hugetlb::populated(fd, page, size).with_context(what)?;
            plan.runs = parts.into_iter().map(|part| (part.start, part.end)).collect();
            return Ok(plan);
        }
        let mut at = 0;
        while at < size {
            let offset = i64::try_from(at).with_context(what)?;
            let data = match lseek64(fd, offset, Whence::SeekData) {
                Ok(n) => n,
                Err(nix::errno::Errno::ENXIO) => break,
                Err(e) => return Err(e).with_context(what),
            };
            let hole = lseek64(fd, data, Whence::SeekHole).with_context(what)?;
            let start = data.cast_unsigned() & !(PAGE - 1);
            let end = hole.cast_unsigned().next_multiple_of(PAGE);
            plan.runs.push((start, end));
            at = end;
        }
        Ok(plan)
    }

    /// How many bytes are stored.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|(start, end)| end - start).sum()
    }

    /// Emits the pagemap.
    ///
    /// # Errors
    /// The sink's.
    pub fn emit(&self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        emit(sink, Image::ShmemPagemap, self.shmid, &PagemapHead { pages_id: self.pages_id })?;
        for &(start, end) in &self.runs {
            emit(
                sink,
                Image::ShmemPagemap,
                self.shmid,
                &pagemap_entry(start, (end - start) / PAGE, page::PRESENT),
            )?;
        }
        Ok(())
    }

    /// Writes the pages of the segment, whose file is `fd`. They are copied, not spliced: a pipe would hold
    /// the live pages, which the tree changes as soon as it runs on.
    ///
    /// # Errors
    /// The output's.
    pub fn copy<W: Write + AsFd>(&self, fd: BorrowedFd<'_>, out: &mut Writer<W>) -> anyhow::Result<()> {
        let file = File::from(fd.try_clone_to_owned().context("shared memory")?);
        for &(start, end) in &self.runs {
            let mut at = start;
            while at < end {
                let mut buffer = vec![0; usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK)];
                let mut filled = 0;
                // What lies beyond the end of the file is zeros.
                while filled < buffer.len() {
                    match file.read_at(&mut buffer[filled..], at + filled as u64).context("shared memory")? {
                        0 => break,
                        n => filled += n,
                    }
                }
                out.data(Image::Pages, u64::from(self.pages_id), &buffer).context("write the stream")?;
                at += buffer.len() as u64;
            }
        }
        Ok(())
    }
}
