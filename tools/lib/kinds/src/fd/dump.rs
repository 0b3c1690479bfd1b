//! The dump side that all kinds share: walking descriptor tables, telling open files apart, paths.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsStr,
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, ffi::OsStringExt},
    },
    path::{Path, PathBuf},
};

use anyhow::Context;
use ckpt_proc::fdinfo::{self, FdInfo};
use ckpt_proto::{
    Image,
    types::{FdTypes, FdinfoEntry, FileEntry, FownEntry},
};
use ckpt_sys::{
    FileId, Pid, Refused, TargetFd, file,
    kcmp::{self, Object},
    pidfd, procfs, sock,
};
use nix::sys::stat::{FileStat, SFlag};

use super::{KINDS, Support, epoll, fown, lock, memfd, packet, pipe, reg, tty, unix};
use crate::{Sink, mem::sysv::Segments, sink::emit};

/// What the user allowed at dump time.
#[derive(Debug, Clone, Default)]
pub struct DumpOptions {
    /// Resources that lead outside the tree and shall be handed in again at restore.
    pub external: Vec<External>,
    /// Largest deleted file whose contents go into the images, bytes; 0 stands for the default (1 MiB).
    pub ghost_limit: u64,
}

/// A resource shared with processes outside the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// `pipe:[ID]`.
    Pipe(u64),
    /// `shm:[ID]`: System V shared memory.
    SysvShm(i32),
    /// `pidfd:[PID]`: pidfds of that process.
    Pidfd(i32),
}

impl std::str::FromStr for External {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> anyhow::Result<Self> {
        let resource = s.strip_suffix(']').and_then(|s| s.split_once(":["));
        let external = match resource {
            Some(("pipe", id)) => id.parse().ok().map(Self::Pipe),
            Some(("shm", id)) => id.parse().ok().map(Self::SysvShm),
            Some(("pidfd", pid)) => pid.parse().ok().map(Self::Pidfd),
            _ => None,
        };
        external.ok_or_else(|| {
            anyhow::anyhow!(
                "--external {s}: expected pipe:[ID], as /proc/PID/fd shows it, shm:[ID] (ipcs -m) or pidfd:[PID]"
            )
        })
    }
}

/// What a first look at the tree tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Some task has a socket: ckpt-sk has to follow.
    pub sockets: bool,
    /// Descriptors of each task, ascending, and where they lead.
    links: HashMap<Pid, Vec<(TargetFd, Vec<u8>)>>,
}

/// Shared memory that a mapping refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shmem {
    /// Its entry in FILES.
    pub file_id: u32,
    /// Its number in SHMEM_PAGEMAP.
    pub shmid: u32,
    /// Whether it was met for the first time.
    pub new: bool,
}

/// Contents to be stored as SHMEM_PAGEMAP and pages.
#[derive(Debug)]
pub struct ShmemSegment {
    /// Number of the SHMEM_PAGEMAP image.
    pub shmid: u64,
    /// Bytes.
    pub size: u64,
    /// The memory itself, readable.
    pub fd: OwnedFd,
}

/// One descriptor of a frozen task.
#[derive(Debug)]
pub struct Descriptor {
    /// Whose.
    pub pid: Pid,
    /// Its command, for messages.
    pub comm: String,
    /// Its number.
    pub fd: TargetFd,
    /// Where `/proc/PID/fd/N` leads.
    pub link: Vec<u8>,
    /// fstat(2) of it.
    pub stat: FileStat,
    /// `/proc/PID/fdinfo/N`.
    pub info: FdInfo,
    /// A copy: the same open file.
    pub copy: OwnedFd,
}

impl Descriptor {
    /// How messages call it.
    #[must_use]
    pub fn subject(&self) -> String {
        format!("pid {} ({}) fd {}", self.pid, self.comm, self.fd)
    }

    /// A refusal of it.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> Refused {
        Refused::new(self.subject(), format!("{}: {reason}", self.link.escape_ascii()))
    }

    /// Its own path in /proc.
    #[must_use]
    pub fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", self.pid, self.fd))
    }

    /// File status flags, without the descriptor's `O_CLOEXEC`.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.info.flags & !libc::O_CLOEXEC.cast_unsigned()
    }

    /// Owner for SIGIO.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn fown(&self) -> anyhow::Result<FownEntry> {
        fown::dump(self.copy.as_fd(), self.flags()).with_context(|| self.subject())
    }

    /// Whether the file is of this type (`S_IF*`).
    #[must_use]
    pub fn is(&self, kind: SFlag) -> bool {
        file_type(&self.stat) == kind
    }

    /// Whether it is an anonymous inode of this name.
    #[must_use]
    pub fn is_anon(&self, name: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:") == Some(name.as_bytes())
    }

    /// Whether it is the character device of these numbers.
    #[must_use]
    pub fn is_device(&self, major: u64, minor: u64) -> bool {
        self.is(SFlag::S_IFCHR)
            && (nix::sys::stat::major(self.stat.st_rdev), nix::sys::stat::minor(self.stat.st_rdev))
                == (major, minor)
    }

    fn socket_option(&self, name: i32) -> Option<i32> {
        if !self.is(SFlag::S_IFSOCK) {
            return None;
        }
        sock::option(self.copy.as_fd(), libc::SOL_SOCKET, name).ok()
    }

    /// Address family, if it is a socket.
    #[must_use]
    pub fn domain(&self) -> Option<i32> {
        self.socket_option(libc::SO_DOMAIN)
    }

    /// Whether it is a socket of this family and type.
    #[must_use]
    pub fn is_socket(&self, domain: i32, kind: i32) -> bool {
        self.domain() == Some(domain) && self.socket_option(libc::SO_TYPE) == Some(kind)
    }

    /// Device and inode.
    #[must_use]
    pub fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }
}

/// The type bits of a mode.
#[must_use]
pub fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// A device number as the kernel encodes it internally and CRIU writes it: major << 20 | minor.
#[must_use]
pub fn kernel_dev(dev: u64) -> u32 {
    let (major, minor) = (nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    u32::try_from((major << 20) | (minor & 0xf_ffff)).unwrap_or(0)
}

/// The target of a link in /proc, whatever its bytes.
///
/// # Errors
/// ENOENT, ESRCH, EACCES.
pub fn read_link(path: &Path) -> anyhow::Result<Vec<u8>> {
    let target = fs::read_link(path).with_context(|| format!("readlink {}", path.display()))?;
    Ok(target.into_os_string().into_vec())
}

/// A path from bytes.
#[must_use]
pub fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// An open file that has been met.
#[derive(Debug, Clone, Copy)]
struct Known {
    pid: Pid,
    fd: TargetFd,
    id: FileId,
    kind: FdTypes,
}

/// All open files of a tree, while they are dumped.
#[derive(Debug)]
pub struct FileTable {
    pub(super) tree: HashSet<Pid>,
    pub(super) options: DumpOptions,
    pub(super) next_id: u32,
    /// Descriptor tables that have been added.
    tables: HashSet<u32>,
    /// Open files by device and inode, each list in kcmp's order.
    known: HashMap<(u64, u64), Vec<Known>>,
    /// Descriptors by file id and by task: where epoll sets look for their members.
    pub(super) holders: BTreeMap<FileId, Vec<(Pid, TargetFd)>>,
    paths: HashMap<(u64, u64, u32, Vec<u8>), u32>,
    pub(super) pipes: pipe::Pipes,
    pub(super) remaps: reg::Remaps,
    pub(super) memory: memfd::Memory,
    pub(crate) sysv: Segments,
    pub(super) terminals: tty::Terminals,
    pub(super) epolls: Vec<epoll::Pending>,
    pub(super) in_flight: Vec<unix::InFlight>,
    /// Files that are in flight and nowhere else.
    pub(super) flying: Vec<OwnedFd>,
    locks: lock::Locks,
    survey: Survey,
}

impl FileTable {
    /// A table for the frozen processes `tree`, which were surveyed in the same freeze.
    #[must_use]
    pub fn new(tree: Vec<Pid>, options: DumpOptions, survey: Survey) -> Self {
        Self {
            tree: tree.into_iter().collect(),
            options,
            next_id: 1,
            tables: HashSet::new(),
            known: HashMap::new(),
            holders: BTreeMap::new(),
            paths: HashMap::new(),
            pipes: pipe::Pipes::default(),
            remaps: reg::Remaps::default(),
            memory: memfd::Memory::default(),
            sysv: Segments::default(),
            terminals: tty::Terminals::default(),
            epolls: Vec::new(),
            in_flight: Vec::new(),
            flying: Vec::new(),
            locks: lock::Locks::default(),
            survey,
        }
    }

    /// What ckpt-scan has to know before it writes anything.
    ///
    /// # Errors
    /// A descriptor table that can't be read.
    pub fn survey(tree: &[Pid]) -> anyhow::Result<Survey> {
        memfd::check()?;
        let mut survey = Survey::default();
        for &pid in tree {
            let mut links = Vec::new();
            for fd in descriptors(pid)? {
                let link = read_link(&PathBuf::from(format!("/proc/{pid}/fd/{fd}")))?;
                survey.sockets |= link.starts_with(b"socket:[");
                links.push((fd, link));
            }
            survey.links.insert(pid, links);
        }
        Ok(survey)
    }

    /// A number for a new FILES entry.
    pub(super) fn new_id(&mut self) -> FileId {
        let id = FileId(self.next_id);
        self.next_id += 1;
        id
    }

    /// All descriptors of one descriptor table: its FDINFO entries (image number `files_id`) and the
    /// FILES entries that are new. Nothing if that table has been added for another task that shares it.
    ///
    /// # Errors
    /// [`Refused`] for what can't be checkpointed; the sink's.
    pub fn add_task(
        &mut self,
        pid: Pid,
        comm: &str,
        files_id: u32,
        sink: &mut dyn Sink,
    ) -> anyhow::Result<()> {
        if !self.tables.insert(files_id) {
            return Ok(());
        }
        let known = self.survey.links.get(&pid).map(|links| links.iter().map(|(fd, _)| *fd).collect());
        let fds = known.map_or_else(|| descriptors(pid), Ok)?;
        self.add_descriptors(pid, comm, files_id, &fds, sink)
    }

    /// The same for some of a task's descriptors.
    pub(super) fn add_descriptors(
        &mut self,
        pid: Pid,
        comm: &str,
        files_id: u32,
        fds: &[TargetFd],
        sink: &mut dyn Sink,
    ) -> anyhow::Result<()> {
        let task = pidfd::open(pid)?;
        for &fd in fds {
            let (id, kind, info) = self
                .add_descriptor(pid, comm, task.as_fd(), fd, sink)
                .with_context(|| format!("pid {pid} ({comm}) fd {fd}"))
                .map_err(drop_needless_context)?;
            let entry = FdinfoEntry {
                id: id.0,
                flags: u32::from(info.flags & libc::O_CLOEXEC.cast_unsigned() != 0),
                r#type: kind.into(),
                fd: fd.0.unsigned_abs(),
                xattr_security_selinux: None,
            };
            emit(sink, Image::Fdinfo, u64::from(files_id), &entry)?;
            self.holders.entry(id).or_default().push((pid, fd));
            self.locks.add(&self.tree, pid, comm, fd, &info)?;
        }
        Ok(())
    }

    pub(super) fn add_descriptor(
        &mut self,
        pid: Pid,
        comm: &str,
        task: BorrowedFd<'_>,
        fd: TargetFd,
        sink: &mut dyn Sink,
    ) -> anyhow::Result<(FileId, FdTypes, FdInfo)> {
        let info_path = format!("/proc/{pid}/fdinfo/{fd}");
        let text = procfs::read(&info_path).with_context(|| format!("read {info_path}"))?;
        let info = fdinfo::parse(&text).with_context(|| info_path.clone())?;
        let link_path = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
        let stat =
            nix::sys::stat::stat(&link_path).with_context(|| format!("stat {}", link_path.display()))?;
        let key = (stat.st_dev, stat.st_ino);
        let place = match self.find(key, pid, fd)? {
            Ok(known) => return Ok((known.id, known.kind, info)),
            Err(place) => place,
        };
        let surveyed = self.survey.links.get(&pid).and_then(|links| {
            let at = links.binary_search_by_key(&fd, |(fd, _)| *fd).ok()?;
            links.get(at).map(|(_, link)| link.clone())
        });
        let link = surveyed.map_or_else(|| read_link(&link_path), Ok)?;
        let copy = pidfd::getfd(task, fd)?;
        let descriptor = Descriptor { pid, comm: comm.to_owned(), fd, link, stat, info, copy };
        let kind = KINDS
            .iter()
            .find(|kind| (kind.recognise)(&descriptor))
            .ok_or_else(|| descriptor.refuse("unknown kind of file"))?;
        let (fd_type, dump) = match kind.support {
            Support::Full { fd_type, dump, .. } => (fd_type, dump),
            Support::Refused(why) => {
                return Err(descriptor.refuse(format_args!("{}: {why}", kind.name)).into());
            }
        };
        let id = self.new_id();
        let entry = dump(self, &descriptor, id, sink)?;
        if let Some(entry) = entry {
            emit(sink, Image::Files, 0, &entry)?;
        }
        self.known.entry(key).or_default().insert(place, Known { pid, fd, id, kind: fd_type });
        Ok((id, fd_type, descriptor.info))
    }

    /// The open file behind a descriptor if it has been met, else its place in the list.
    fn find(&self, key: (u64, u64), pid: Pid, fd: TargetFd) -> anyhow::Result<Result<Known, usize>> {
        let Some(list) = self.known.get(&key) else { return Ok(Err(0)) };
        let (mut low, mut high) = (0, list.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some(&known) = list.get(middle) else { break };
            match kcmp::compare(known.pid.leader(), pid.leader(), Object::File(known.fd, fd))? {
                Ordering::Equal => return Ok(Ok(known)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    /// A file reached by a link in /proc: cwd, root, exe, map_files/A-B. For mapped files `flags` say
    /// how the mapping has it open, `O_RDONLY` or `O_RDWR`. Returns the file's id.
    ///
    /// # Errors
    /// [`Refused`] for what can't be checkpointed; the sink's.
    pub fn add_path(
        &mut self,
        pid: Pid,
        link: &Path,
        flags: u32,
        sink: &mut dyn Sink,
    ) -> anyhow::Result<u32> {
        let target = read_link(link)?;
        let stat = nix::sys::stat::stat(link).with_context(|| format!("stat {}", link.display()))?;
        let directory = file_type(&stat) == SFlag::S_IFDIR;
        let key = (stat.st_dev, stat.st_ino, flags, target);
        if !directory && let Some(&id) = self.paths.get(&key) {
            return Ok(id);
        }
        let id = self.new_id();
        let found = reg::Found {
            subject: &format!("pid {pid} {}", link.file_name().unwrap_or_default().display()),
            link: &key.3,
            stat: &stat,
            proc_path: link,
            mapped: !directory,
        };
        let fields = reg::Fields { flags, pos: 0, fown: FownEntry::default() };
        let entry = reg::dump_found(self, &found, id, fields, sink)?;
        emit(sink, Image::Files, 0, &entry)?;
        if !directory {
            self.paths.insert(key, id.0);
        }
        Ok(id.0)
    }

    /// Shared anonymous memory or a memfd that is mapped. `link` is its link in map_files.
    ///
    /// # Errors
    /// [`Refused`] for what is neither; the sink's.
    pub fn add_shmem(&mut self, pid: Pid, link: &Path, sink: &mut dyn Sink) -> anyhow::Result<Shmem> {
        memfd::add_mapped(self, pid, link, sink)
    }

    /// The ring of packet socket `id`, mapped from `offset` on with `len` bytes. Gives the socket's number.
    ///
    /// # Errors
    /// [`Refused`] for what can't be mapped again; the sink's.
    pub fn add_mapped_ring(
        &mut self,
        pid: Pid,
        id: u64,
        (offset, len): (u64, u64),
        sink: &mut dyn Sink,
    ) -> anyhow::Result<FileId> {
        packet::add_mapped(self, pid, id, (offset, len), sink)
    }

    /// Memory whose contents the caller has to store; call it after the last `add_*`.
    ///
    /// # Errors
    /// Those of open(2); [`Refused`] for System V memory that others use too.
    pub fn shmem_segments(&self, sink: &mut dyn Sink) -> anyhow::Result<Vec<ShmemSegment>> {
        let mut segments = self.memory.segments()?;
        let tree: Vec<Pid> = self.tree.iter().copied().collect();
        let external = self.options.external.iter().filter_map(|external| match external {
            External::SysvShm(id) => Some(*id),
            External::Pipe(_) | External::Pidfd(_) => None,
        });
        segments.extend(self.sysv.finish(&tree, &external.collect::<Vec<_>>(), sink)?);
        Ok(segments)
    }

    /// Whether another process shares an open file with the given id: for tests and messages.
    #[must_use]
    pub fn holders_of(&self, id: FileId) -> &[(Pid, TargetFd)] {
        self.holders.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Everything that could not be written before all tasks were known: epoll sets, what is in pipes,
    /// contents of deleted files, locks. Gives the descriptors of files that are in flight alone: they have
    /// to stay open until ckpt-sk is done.
    ///
    /// # Errors
    /// [`Refused`] for pipes that lead outside; the sink's.
    pub fn finish(mut self, sink: &mut dyn Sink) -> anyhow::Result<Vec<OwnedFd>> {
        self.add_in_flight(sink)?;
        for pending in std::mem::take(&mut self.epolls) {
            let entry = epoll::complete(&self, pending)?;
            emit(sink, Image::Files, 0, &entry)?;
        }
        pipe::finish(&mut self, sink)?;
        tty::check(&self)?;
        self.locks.finish(sink)?;
        self.remaps.finish(sink)?;
        Ok(self.flying)
    }

    /// Emits an entry for a file that is not behind a descriptor of its own (the path of a FIFO).
    pub(super) fn emit_entry(&self, entry: &FileEntry, sink: &mut dyn Sink) -> anyhow::Result<()> {
        emit(sink, Image::Files, 0, entry)
    }
}

/// `fdinfo` of a descriptor as it is by now.
pub(super) fn reread(d: &Descriptor) -> anyhow::Result<FdInfo> {
    let path = format!("/proc/{}/fdinfo/{}", d.pid, d.fd);
    fdinfo::parse(&fs::read(&path).with_context(|| format!("read {path}"))?).context(path)
}

/// A refusal already says which descriptor it is about.
fn drop_needless_context(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Refused>() {
        Ok(refused) => refused.into(),
        Err(error) => error,
    }
}

/// The numbers in a process's descriptor table, ascending.
pub(super) fn descriptors(pid: Pid) -> anyhow::Result<Vec<TargetFd>> {
    let directory = format!("/proc/{pid}/fd");
    let mut all = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        let entry = entry.with_context(|| format!("read {directory}"))?;
        if let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
            all.push(TargetFd(fd));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// Who else in the system has open what `matches` says yes to, by the link of the descriptor.
/// One walk over /proc; processes that may not be looked at are passed over.
pub(super) fn find_holders(mut matches: impl FnMut(&[u8]) -> bool) -> Vec<(Pid, String, TargetFd, Vec<u8>)> {
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse().ok()).map(Pid) else { continue };
        let Ok(fds) = descriptors(pid) else { continue };
        for fd in fds {
            let Ok(link) = read_link(Path::new(&format!("/proc/{pid}/fd/{fd}"))) else { continue };
            if matches(&link) {
                found.push((pid, comm(pid), fd, link));
            }
        }
    }
    found
}

/// A process's command name, escaped for messages.
#[must_use]
pub fn comm(pid: Pid) -> String {
    let bytes = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    bytes.trim_ascii_end().escape_ascii().to_string()
}

/// Opens the file behind a link in /proc for reading, as an open file of our own.
pub(super) fn reopen(link: &Path, flags: i32) -> anyhow::Result<OwnedFd> {
    Ok(file::open(link, flags.cast_unsigned(), 0)?)
}

/// The raw number, for messages and paths in /proc/self/fd.
pub(super) fn self_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
