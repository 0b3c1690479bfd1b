//! The restore side that all kinds share: opening everything in one process, keeping it out of the
//! way of the numbers that the tasks use, and what is left to do inside the tasks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{
        EventpollFileEntry, FdTypes, FdinfoEntry, FileEntry, FileLockEntry, FownEntry, FsEntry, MmEntry,
        RegFileEntry, SkPacketEntry,
    },
};
use ckpt_remote::Call;
use ckpt_sys::{FileId, Pid, Refused, SocketId, file};

use super::{KINDS, Lent, Support, epoll, fown, late, lock, memfd, reg, shelf::Shelf, tcp, tty, unix};
use crate::mem::sysv;

/// What the user wants at restore.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Descriptors of this process that stand for `socket:[ID]`, `pipe:[ID]`, `tty[RDEV:DEV]` or a path.
    pub inherit: Vec<(i32, String)>,
    /// Where external unix connections go, instead of where the images say.
    pub external_unix: Vec<(SocketId, Vec<u8>)>,
    /// How long to try to connect them.
    pub retry: Duration,
    /// How long to wait for peers that connect themselves; for ever without a limit.
    pub timeout: Option<Duration>,
    /// A signalfd(2): waiting ends when it is readable.
    pub interrupt: Option<Arc<OwnedFd>>,
    /// A changed data file is an error.
    pub files_strict: bool,
    /// TCP connections whose other end is not in the images are restored as closed.
    pub tcp_close: bool,
    /// Pids of the tree, which helpers must not take.
    pub pids: BTreeSet<i32>,
    /// Takes warnings.
    pub warn: fn(&str),
    /// Takes what users are told if they ask.
    pub note: fn(&str),
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            inherit: Vec::new(),
            external_unix: Vec::new(),
            retry: Duration::ZERO,
            timeout: None,
            interrupt: None,
            files_strict: false,
            tcp_close: false,
            pids: BTreeSet::new(),
            warn: |_| (),
            note: |_| (),
        }
    }
}

/// Something made in the file system that must not stay.
#[derive(Debug)]
struct Created {
    name: PathBuf,
    directory: bool,
}

impl Created {
    fn remove(&self) {
        // Gone already is as good; nothing else could be done about a failure either.
        let _ = if self.directory { fs::remove_dir(&self.name) } else { fs::remove_file(&self.name) };
    }
}

/// A restore under way.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The images.
    pub set: &'a ImageSet,
    /// The user's wishes.
    pub options: &'a RestoreOptions,
    pub(super) names: reg::Names,
    pub(super) memory: memfd::Restored,
    pub(super) late: late::Late,
    pub(super) terminals: Vec<tty::Restored>,
    regs: BTreeMap<u32, RegFileEntry>,
    aliases: HashSet<u32>,
    /// Files that stand behind some task's descriptor.
    described: HashSet<u32>,
    pub(super) shelf: Shelf,
    owners: HashMap<u32, (u32, FownEntry)>,
    created: Vec<Option<Created>>,
    asked: BTreeSet<String>,
    given: BTreeSet<String>,
    pub(super) connected: BTreeSet<u64>,
    /// Unix sockets that are not complete yet.
    pub(super) unix: Option<unix::Sockets>,
    /// Socket files that stay if the restore succeeds.
    sockets: Vec<PathBuf>,
    pub(super) tcp: tcp::Connections,
}

impl Opening<'_> {
    /// Keeps the open file of an entry.
    ///
    /// # Errors
    /// Two entries of one id; no descriptor numbers left.
    pub fn keep(&mut self, id: FileId, fd: OwnedFd) -> anyhow::Result<()> {
        if !self.shelf.insert(id, fd)? {
            bail!("{}: two entries have id {id}", Image::Files.file_name(0));
        }
        Ok(())
    }

    /// An open file kept before; `None` if there is none of this number.
    ///
    /// # Errors
    /// It can't be had from the process that keeps it.
    pub fn kept(&self, id: FileId) -> anyhow::Result<Option<Lent<'_>>> {
        self.shelf.lend(id)
    }

    /// Keeps the file of this number in this process.
    pub(super) fn hold(&mut self, id: FileId) {
        self.shelf.hold(id.0);
    }

    pub(super) fn keep_segment(&mut self, shmid: u32, fd: OwnedFd, size: u64) -> anyhow::Result<()> {
        let high = self.shelf.out_of_the_way(fd.as_fd())?;
        if self.memory.segments.insert(shmid, (high, size)).is_some() {
            bail!("{}: two entries have shmid {shmid}", Image::MemfdInode.file_name(0));
        }
        Ok(())
    }

    pub(super) fn segment(&self, shmid: u32) -> Option<BorrowedFd<'_>> {
        self.memory.segments.get(&shmid).map(|(fd, _)| fd.as_fd())
    }

    /// Sets the status flags of an entry that can be set on an open file. `O_ASYNC` waits for
    /// [`OpenFiles::placed`].
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> anyhow::Result<()> {
        let settable = (libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_DIRECT).cast_unsigned();
        let now = file::flags(fd)?;
        if (now ^ flags) & settable != 0 {
            file::set_flags(fd, (now & !settable) | (flags & settable))?;
        }
        Ok(())
    }

    /// The descriptor that the user gave for a resource.
    ///
    /// # Errors
    /// The number is not open.
    pub fn inherited(&mut self, key: &str) -> anyhow::Result<Option<OwnedFd>> {
        self.asked.insert(key.to_owned());
        let Some((number, name)) = self.options.inherit.iter().find(|(_, name)| name == key) else {
            return Ok(None);
        };
        self.given.insert(name.clone());
        file::dup_number(*number).map(Some).with_context(|| format!("--inherit-fd fd[{number}]:{key}"))
    }

    /// The entry that holds a name.
    ///
    /// # Errors
    /// There is none.
    pub fn reg(&self, id: FileId) -> anyhow::Result<&RegFileEntry> {
        self.regs.get(&id.0).with_context(|| format!("{}: no file {id}", Image::Files.file_name(0)))
    }

    pub(super) fn is_alias(&self, id: FileId) -> bool {
        self.aliases.contains(&id.0)
    }

    pub(super) fn has_descriptor(&self, id: FileId) -> bool {
        self.described.contains(&id.0)
    }

    pub(super) fn note_owner(&mut self, id: FileId, flags: u32, fown: &FownEntry) {
        self.owners.insert(id.0, (flags, *fown));
    }

    /// Notes a name that is about to be made and has to go again.
    pub(super) fn created(&mut self, name: PathBuf, directory: bool) -> usize {
        self.created.push(Some(Created { name, directory }));
        self.created.len() - 1
    }

    pub(super) fn remove_created(&mut self, token: usize) {
        if let Some(created) = self.created.get_mut(token).and_then(Option::take) {
            created.remove();
        }
    }

    /// What was noted goes only if the restore fails; its name is this now.
    pub(super) fn keep_socket(&mut self, token: usize, name: PathBuf) {
        if let Some(created) = self.created.get_mut(token) {
            *created = None;
        }
        self.sockets.push(name);
    }
}

/// Every open file of the images, opened in this process.
#[derive(Debug, Default)]
pub struct OpenFiles {
    pub(super) files: Shelf,
    memory: memfd::Restored,
    pub(super) late: late::Late,
    sysv: sysv::Restored,
    terminals: Vec<tty::Restored>,
    /// With the members that are still to be added.
    epolls: HashMap<u32, EventpollFileEntry>,
    /// Sets that some task has been given.
    epolls_met: HashSet<u32>,
    owners: HashMap<u32, (u32, FownEntry)>,
    locks: Vec<FileLockEntry>,
    created: Vec<PathBuf>,
    /// Sockets with queues that wait for pidfds.
    pub(super) unix: Option<unix::Sockets>,
    tcp: tcp::Connections,
}

impl OpenFiles {
    /// Opens all files. If that fails nothing is left in the file system.
    ///
    /// # Errors
    /// [`Refused`] for files that changed or are missing, and whatever the user has to hand in; malformed images.
    pub fn open_all(set: &ImageSet, options: &RestoreOptions) -> anyhow::Result<Self> {
        let entries: Vec<FileEntry> = set.all(Image::Files, 0)?;
        let mut described = HashSet::new();
        let mut highest = 0;
        for arg in set.args(Image::Fdinfo) {
            for entry in set.all::<FdinfoEntry>(Image::Fdinfo, arg)? {
                highest = highest.max(entry.fd);
                described.insert(entry.id);
            }
        }
        // Nor is what nobody has received yet without one.
        for packet in set.all::<SkPacketEntry>(Image::SkQueues, 0)? {
            described.extend(packet.scm.iter().flat_map(|scm| &scm.rights));
        }
        let names = reg::Names::read(set)?;
        let (base, limit) = base(highest, entries.len())?;
        let mut opening = Opening {
            set,
            options,
            regs: reg::by_id(&entries),
            aliases: aliases(&entries, &names),
            names,
            memory: memfd::Restored::default(),
            late: late::Late::default(),
            terminals: Vec::new(),
            described,
            shelf: Shelf::new(base, limit, by_number(set)?, options.pids.clone()),
            owners: HashMap::new(),
            created: Vec::new(),
            asked: BTreeSet::new(),
            given: BTreeSet::new(),
            connected: BTreeSet::new(),
            unix: None,
            sockets: Vec::new(),
            tcp: tcp::Connections::default(),
        };
        let opened = opening.open(&entries).and_then(|()| sysv::Restored::prepare(set));
        for created in opening.created.drain(..).rev().flatten() {
            created.remove();
        }
        let sysv = match opened {
            Ok(sysv) => sysv,
            Err(error) => {
                for name in &opening.sockets {
                    let _ = fs::remove_file(name);
                }
                return Err(error);
            }
        };
        let mut owners = opening.owners;
        owners.extend(entries.iter().filter_map(|e| {
            let (flags, fown) = fown::of(e)?;
            Some((e.id, (flags, *fown)))
        }));
        owners.retain(|_, (flags, fown)| {
            *flags & libc::O_ASYNC.cast_unsigned() != 0 || fown.pid != 0 || fown.signum != 0
        });
        Ok(Self {
            files: opening.shelf,
            memory: opening.memory,
            late: opening.late,
            sysv,
            terminals: opening.terminals,
            epolls: entries.iter().filter_map(|e| Some((e.id, e.epfd.clone()?))).collect(),
            epolls_met: HashSet::new(),
            owners,
            locks: set.all(Image::FileLocks, 0)?,
            created: opening.sockets,
            unix: opening.unix,
            tcp: opening.tcp,
        })
    }

    /// The open file of an entry, if it is open in this process.
    #[must_use]
    pub fn fd(&self, id: FileId) -> Option<BorrowedFd<'_>> {
        self.files.here(id.0)
    }

    /// A segment of shared memory, open for reading and writing, and its size: to be filled with its pages.
    #[must_use]
    pub fn shmem(&self, shmid: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let Ok(inode) = u32::try_from(shmid) else { return self.sysv.memory(shmid) };
        self.memory.segments.get(&inode).map(|(fd, size)| (fd.as_fd(), *size))
    }

    /// What has to run inside process `pid` once its descriptors `fdinfo` are in place, its memory
    /// is mapped and filled, and all processes exist. What belongs to an open file is handed out
    /// once, to the first task that has it.
    ///
    /// # Errors
    /// An epoll set whose members the task does not have.
    pub fn placed(&mut self, fdinfo: &[FdinfoEntry], pid: Pid) -> anyhow::Result<Vec<Call>> {
        self.memory.seal()?;
        self.sysv.settle()?;
        let mut calls = Vec::new();
        for entry in fdinfo {
            if let Some(set) = self.epolls.get_mut(&entry.id) {
                let first = self.epolls_met.insert(entry.id);
                calls.extend(epoll::calls(entry.fd, set, first, fdinfo, pid)?);
            }
            if let Some((flags, fown)) = self.owners.remove(&entry.id) {
                calls.extend(fown::calls(entry.fd, flags, &fown));
            }
            calls.extend(self.late.positions(entry.id, entry.fd));
            for terminal in self.terminals.iter_mut().filter(|t| t.is(entry.id)) {
                calls.extend(terminal.calls(entry.fd, pid));
            }
        }
        for lock in self.locks.iter().filter(|l| l.pid == pid.0) {
            calls.push(lock::call(lock)?);
        }
        Ok(calls)
    }

    /// The last step before the tasks run: TCP connections come to life. Until here no packet of theirs has left
    /// this host, and a restore that fails leaves everything as it was. `commit` makes the tasks run if
    /// this process dies; if it does die, `committed` is asked whether they do, in another process.
    ///
    /// # Errors
    /// The kernel's, `commit`'s.
    pub fn go_live(
        &mut self,
        set: &ImageSet,
        commit: impl FnOnce() -> anyhow::Result<()>,
        committed: impl FnOnce() -> bool,
    ) -> anyhow::Result<()> {
        std::mem::take(&mut self.tcp).go_live(&self.files, set, commit, committed)
    }

    /// Sets up the terminals for those tasks that were in their foreground. `stays`: this process stays in the
    /// foreground with them; `group_of`: the process group that the members of a recorded one are in now.
    ///
    /// # Errors
    /// Those of tcsetattr(3) and tcsetpgrp(3).
    pub fn take_terminals(
        &mut self,
        stays: bool,
        group_of: impl Fn(i32) -> Option<nix::unistd::Pid>,
    ) -> anyhow::Result<()> {
        self.terminals.iter_mut().try_for_each(|terminal| terminal.take_over(stays, &group_of))
    }

    /// Sessions that are to have a controlling terminal, by leader, and a descriptor of it: for
    /// ioctl(TIOCSCTTY) in the leader, before it forks, so that its children have it too.
    #[must_use]
    pub fn controlling_terminals(&self) -> BTreeMap<i32, BorrowedFd<'_>> {
        let found = self.terminals.iter().filter_map(tty::Restored::controls);
        found.filter_map(|(sid, file)| Some((sid, self.files.here(file)?))).collect()
    }

    /// When all tasks run: has them draw again what they show on terminals.
    pub fn redraw(&self) {
        self.terminals.iter().for_each(tty::Restored::redraw);
    }

    /// Undoes what [`Self::open_all`] left in the file system (socket files) and
    /// [`Self::take_terminals`], for a restore that fails later on.
    pub fn undo(&mut self) {
        self.terminals.iter().for_each(tty::Restored::give_back);
        self.sysv.undo();
        for name in self.created.drain(..) {
            let _ = fs::remove_file(&name);
        }
    }
}

impl Opening<'_> {
    fn open(&mut self, entries: &[FileEntry]) -> anyhow::Result<()> {
        let mut left: BTreeMap<i32, Vec<FileEntry>> = BTreeMap::new();
        for entry in entries {
            left.entry(entry.r#type).or_default().push(entry.clone());
        }
        for kind in KINDS {
            let Support::Full { fd_type, restore, .. } = kind.support else { continue };
            if let Some(entries) = left.remove(&fd_type.into()) {
                restore(self, &entries).with_context(|| format!("restore {}s", kind.name))?;
            }
        }
        unix::settle(self).context("restore unix sockets")?;
        if let Some((kind, entries)) = left.first_key_value() {
            let name = FdTypes::try_from(*kind).map_or("unknown", |t| t.as_str_name());
            let id = entries.first().map_or(0, |e| e.id);
            let reason = format!("files of type {name} can't be restored yet");
            return Err(Refused::new(format!("file {id}"), reason).into());
        }
        if let Some(missing) =
            self.described.iter().find(|&&id| !self.shelf.contains(id) && !self.late.has(id))
        {
            bail!("a descriptor refers to file {missing}, which {} does not hold", Image::Files.file_name(0));
        }
        self.check_all_used()
    }

    /// What the user handed in must be for something.
    fn check_all_used(&self) -> anyhow::Result<()> {
        let there = |asked: Vec<&str>| if asked.is_empty() { "none".to_owned() } else { asked.join(" ") };
        for (number, name) in &self.options.inherit {
            if !self.given.contains(name) {
                let asked = self.asked.iter().map(String::as_str).filter(|a| a.contains('[')).collect();
                bail!(
                    "--inherit-fd fd[{number}]:{name}: the images hold no such resource; those that can be handed in: {}",
                    there(asked)
                );
            }
        }
        for (id, _) in &self.options.external_unix {
            if !self.connected.contains(&id.0) {
                bail!("--external unix[{id}]: the images hold no external connection of that id");
            }
        }
        Ok(())
    }
}

/// Entries that only carry a name for others: of FIFOs, terminals, deleted hard links.
fn aliases(entries: &[FileEntry], names: &reg::Names) -> HashSet<u32> {
    let mut aliases: HashSet<u32> = names.aliases().collect();
    for entry in entries {
        aliases.extend(entry.fifo.as_ref().and_then(|f| f.regf_id));
        aliases.extend(entry.tty.as_ref().and_then(|t| t.regf_id));
    }
    aliases
}

/// The lowest number for open files that are kept: far above those of all tasks if the limit on open files allows
/// it, else above them, else, since tasks may use all numbers that there are, wherever all files fit.
/// Gives that limit too.
fn base(highest: u32, files: usize) -> anyhow::Result<(i32, u64)> {
    const FAR: u64 = 100_000;
    const SPARE: u64 = 1024;
    let lowest = u64::from(highest) + 1;
    let needed = files as u64 + SPARE;
    // Tasks get the limits that their images tell, so raising ours is nobody's business.
    let limit = file::raise_limit(FAR.max(lowest) + needed);
    let fits = [FAR.max(lowest), lowest].into_iter().find(|base| base + needed <= limit);
    let base = i32::try_from(fits.unwrap_or(limit.saturating_sub(needed)))
        .context("descriptor numbers in the images are too high")?;
    Ok((base, limit))
}

/// Files that tasks find by the number that they have in this process.
fn by_number(set: &ImageSet) -> anyhow::Result<HashSet<u32>> {
    let mut ids = HashSet::new();
    for arg in set.args(Image::Mm) {
        for mm in set.all::<MmEntry>(Image::Mm, arg)? {
            ids.insert(mm.exe_file_id);
            ids.extend(mm.vmas.iter().filter_map(|vma| u32::try_from(vma.shmid).ok()));
        }
    }
    for arg in set.args(Image::Fs) {
        for fs in set.all::<FsEntry>(Image::Fs, arg)? {
            ids.extend([fs.cwd_id, fs.root_id]);
        }
    }
    Ok(ids)
}
