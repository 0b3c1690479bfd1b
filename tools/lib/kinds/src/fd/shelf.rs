//! Open files that wait for their tasks: more than one process may have open.
//!
//! How many files a process may have open is its hard limit, which takes CAP_SYS_RESOURCE to raise; a tree can have
//! many times as many, a table full in each process. Files are kept here until the table of this process is nearly full. Then
//! a child is made, a *keeper*, which has them all by fork(2) and does nothing but live, and this process closes them. Who
//! needs one later takes a copy from the keeper (pidfd_getfd(2)): this process to finish a socket, and the tasks,
//! once they exist, to have it ([`super::OpenFiles::fetch`]). Keepers end when the tasks have their files, and with this process.
//!
//! What tasks find by the number that it has here stays here: the files of mappings, executables, directories. So do TCP
//! connections, which come to life in a last step that has to outlive this process.
//!
//! Not chosen: a unix socket as a store (SCM_RIGHTS), as what is in flight is limited by the same number, for the whole
//! user (`too_many_unix_fds`, net/core/scm.c); opening files in the tasks that have them, as a socketpair may have its ends
//! in two tasks, and all of this would be remote calls.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use anyhow::{Context, ensure};
use ckpt_proto::types::FdinfoEntry;
use ckpt_remote::{Arg, Call, Syscalls};
use ckpt_sys::{FileId, Pid, TargetFd, clone, file, ids, pidfd};

use super::OpenFiles;

/// A file of the shelf, for a moment.
#[derive(Debug)]
pub enum Lent<'a> {
    /// It is open in this process.
    Here(BorrowedFd<'a>),
    /// A copy, taken from a keeper.
    Copy(OwnedFd),
}

impl AsFd for Lent<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Here(fd) => *fd,
            Self::Copy(fd) => fd.as_fd(),
        }
    }
}

/// A process that holds files. Dropping it ends it.
#[derive(Debug)]
struct Keeper {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        while nix::sys::wait::waitpid(self.pid.nix(), None) == Err(nix::errno::Errno::EINTR) {}
    }
}

/// Open files by their numbers in the images.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    here: HashMap<u32, OwnedFd>,
    /// Which keeper has a file, and at which number.
    away: HashMap<u32, (usize, RawFd)>,
    keepers: Vec<Keeper>,
    /// What has to stay.
    stays: HashSet<u32>,
    /// Lowest number here.
    base: i32,
    /// How many may be here.
    room: usize,
    /// Pids that keepers must not take.
    taken: BTreeSet<i32>,
}

impl Shelf {
    /// Files get numbers from `base` on, which is below `limit`.
    pub(super) fn new(base: i32, limit: u64, stays: HashSet<u32>, taken: BTreeSet<i32>) -> Self {
        const SPARE: u64 = 1024;
        let above = limit.saturating_sub(base.unsigned_abs().into());
        let room = usize::try_from(above - SPARE.min(above / 4)).unwrap_or(usize::MAX);
        Self { stays, base, room, taken, ..Self::default() }
    }

    /// A duplicate of `fd`, out of the way.
    ///
    /// # Errors
    /// No numbers are left.
    pub(super) fn out_of_the_way(&self, fd: BorrowedFd<'_>) -> anyhow::Result<OwnedFd> {
        file::dup_above(fd, self.base).context("too many open files (see ulimit -n)")
    }

    /// From now on this file does not go to a keeper.
    pub(super) fn hold(&mut self, id: u32) {
        self.stays.insert(id);
    }

    /// Keeps a file; whether it is the first of this number.
    ///
    /// # Errors
    /// No numbers are left; there can be no keeper.
    pub(super) fn insert(&mut self, id: FileId, fd: OwnedFd) -> anyhow::Result<bool> {
        if self.here.len() >= self.room {
            self.give_away().context("have another process keep open files")?;
        }
        let high = self.out_of_the_way(fd.as_fd())?;
        let known = self.away.contains_key(&id.0);
        Ok(self.here.insert(id.0, high).is_none() && !known)
    }

    fn give_away(&mut self) -> anyhow::Result<()> {
        let goes: Vec<(u32, RawFd)> = self
            .here
            .iter()
            .filter(|(id, _)| !self.stays.contains(id))
            .map(|(id, fd)| (*id, fd.as_raw_fd()))
            .collect();
        ensure!(
            !goes.is_empty(),
            "all {} files have to stay; too many open files (ulimit -Hn)",
            self.here.len()
        );
        let numbers: Vec<RawFd> = goes.iter().map(|(_, number)| *number).collect();
        let pid = Pid(ids::spare_pids(self.taken.clone())());
        clone::spawn_keeper(pid, &numbers)?;
        let keeper = Keeper { pid, pidfd: pidfd::open(pid)? };
        for (id, number) in goes {
            self.away.insert(id, (self.keepers.len(), number));
            self.here.remove(&id);
        }
        self.keepers.push(keeper);
        Ok(())
    }

    /// A file, wherever it is.
    ///
    /// # Errors
    /// There is none of this number; a keeper was killed.
    pub(super) fn lend(&self, id: FileId) -> anyhow::Result<Option<Lent<'_>>> {
        if let Some(fd) = self.here(id.0) {
            return Ok(Some(Lent::Here(fd)));
        }
        let Some((keeper, number)) = self.away.get(&id.0) else { return Ok(None) };
        let keeper = self.keepers.get(*keeper).context("a keeper of open files")?;
        Ok(Some(Lent::Copy(pidfd::getfd(keeper.pidfd.as_fd(), TargetFd(*number))?)))
    }

    /// A file that is open in this process.
    pub(super) fn here(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.here.get(&id).map(AsFd::as_fd)
    }

    /// The process that keeps a file, if that is not this one, and its number there.
    pub(super) fn away(&self, id: u32) -> Option<(Pid, RawFd)> {
        let (keeper, number) = self.away.get(&id)?;
        Some((self.keepers.get(*keeper)?.pid, *number))
    }

    pub(super) fn contains(&self, id: u32) -> bool {
        self.here.contains_key(&id) || self.away.contains_key(&id)
    }

    /// Ends the keepers, and with them closes what they had.
    pub(super) fn end_keepers(&mut self) {
        self.away.clear();
        self.keepers.clear();
    }
}

impl OpenFiles {
    /// Whether tasks do not have a file by fork: it comes when all tasks are there ([`super::late`]), or another process
    /// keeps it.
    #[must_use]
    pub fn is_fetched(&self, id: FileId) -> bool {
        self.late.has(id.0) || self.files.away(id.0).is_some()
    }

    /// Gives a task with the descriptors `fdinfo`, all others of which are in place, those that it has to fetch.
    ///
    /// # Errors
    /// EPERM: the task may not look into the process that has them; EMFILE.
    pub fn fetch(&self, task: &mut impl Syscalls, fdinfo: &[FdinfoEntry]) -> anyhow::Result<()> {
        let me = Pid(std::process::id().cast_signed());
        let mut wanted: BTreeMap<Pid, BTreeMap<i32, (RawFd, bool)>> = BTreeMap::new();
        let mut numbers = BTreeSet::new();
        let mut used = BTreeSet::new();
        for entry in fdinfo {
            let number = i32::try_from(entry.fd).context("a descriptor's number")?;
            numbers.insert(number);
            if !self.is_fetched(FileId(entry.id)) {
                used.insert(number);
                continue;
            }
            let here = || Some((me, self.fd(FileId(entry.id))?.as_raw_fd()));
            let (from, source) = self.files.away(entry.id).or_else(here).context("a file to be fetched")?;
            wanted.entry(from).or_default().insert(number, (source, entry.flags & 1 == 1));
        }
        // A number that is nobody's.
        let process = (0..).find(|number| !numbers.contains(number)).context("a free number")?;
        used.insert(process);
        // Where the kernel puts a new descriptor: at the lowest free number. It only goes up.
        let mut lowest = 0;
        for (from, files) in wanted {
            let mut batch = Batch::default();
            let mut next = |used: &BTreeSet<i32>| {
                while used.contains(&lowest) {
                    lowest += 1;
                }
                lowest
            };
            // Taken by the process's own number in the first round, and later.
            used.remove(&process);
            let at = (0..).find(|number| !used.contains(number)).context("a free number")?;
            batch.open(format!("pidfd_open({from})"), libc::SYS_pidfd_open, &[from.0, 0], at);
            batch.put(at, process, true);
            used.insert(process);
            for (number, (source, cloexec)) in files {
                let at = next(&used);
                batch.open(
                    format!("pidfd_getfd({from}, {source})"),
                    libc::SYS_pidfd_getfd,
                    &[process, source, 0],
                    at,
                );
                batch.put(at, number, cloexec);
                used.insert(number);
            }
            batch.call("close", libc::SYS_close, &[process]);
            batch.run(task)?;
        }
        Ok(())
    }

    /// When all tasks have their files.
    pub fn all_fetched(&mut self) {
        self.files.end_keepers();
    }
}

/// Calls whose new descriptors are known beforehand.
#[derive(Default)]
struct Batch {
    calls: Vec<Call>,
    /// Which of them give which descriptor.
    expected: Vec<(usize, i32)>,
}

impl Batch {
    fn call(&mut self, name: impl Into<String>, number: i64, args: &[i32]) {
        self.calls.push(Call::new(name.into(), number, args.iter().map(|&arg| Arg::from(arg))));
    }

    /// A call that gives the descriptor `at`.
    fn open(&mut self, name: String, number: i64, args: &[i32], at: i32) {
        self.expected.push((self.calls.len(), at));
        self.call(name, number, args);
    }

    /// Moves a new, close-on-exec descriptor.
    fn put(&mut self, at: i32, to: i32, cloexec: bool) {
        if at == to && !cloexec {
            self.call("fcntl(F_SETFD)", libc::SYS_fcntl, &[at, libc::F_SETFD, 0]);
        } else if at != to {
            let flag = if cloexec { libc::O_CLOEXEC } else { 0 };
            self.call(format!("dup3(fd {to})"), libc::SYS_dup3, &[at, to, flag]);
            self.call("close", libc::SYS_close, &[at]);
        }
    }

    fn run(self, task: &mut impl Syscalls) -> anyhow::Result<()> {
        let done = task.run(&self.calls)?;
        for (index, at) in self.expected {
            let got = done.get(index).map(|done| done.ret);
            ensure!(got == Some(at.into()), "a new descriptor has number {got:?}, not {at}");
        }
        Ok(())
    }
}
