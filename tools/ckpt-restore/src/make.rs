//! Making the processes: a planned sequence of forks, then each task builds itself under our ptrace.
//!
//! All tasks are tracees with PTRACE_O_EXITKILL from their first instruction on, so however this
//! process ends before [`Family::go`], the kernel removes them; [`Family`]'s drop does the same in the
//! orderly way and waits until their pids are free. While that lasts this process is a subreaper,
//! because the parents of tasks that fail may be gone before them.
//!
//! ```text
//! R: clone3(set_tid) -> root waits in pause(2) -> PTRACE_SEIZE
//!      root: clone3(set_tid) -> child             (remote call; traced from birth)
//!      all:  setsid, setpgid, helpers end         (see `births`)
//!      each: unmap R's memory, map, pages         (see `fill`; before its children if they share pages)
//!            descriptors, threads, then the task's own settings, credentials last
//! R: registers, signal masks; then everything runs at once
//! ```

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
};

use anyhow::{Context, ensure};
use ckpt_cli::Progress;
use ckpt_images::ImageSet;
use ckpt_kinds::{
    fd::OpenFiles,
    mem::restore::{self as mem, vdso},
    task::{restore as task, seccomp},
};
use ckpt_remote::{
    Arg, Call, RemoteError, Syscalls,
    build::{Area, Built},
};
use ckpt_sys::{
    FileId, Pid, Refused, RemoteAddr, Tid,
    capability::{self, number::CHECKPOINT_RESTORE},
    clone, memory,
    ptrace::{self, Stop},
};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
};

use crate::{
    births::Step,
    fill::Builder,
    lazy,
    moves::{self, Move},
    region::Region,
    tree::{Body, Process, Thread, Tree},
};

const OPTIONS: i32 = libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK;

/// Bytes of pages from which on a second thread pays.
pub(crate) const HELP_FROM: u64 = 16 << 20;

/// The processes made so far. Dropping it removes them.
pub struct Family {
    /// Gives pids for tasks that only help.
    spare: Box<dyn FnMut() -> i32>,
    area: Area,
    /// Every thread that is being built; the leaders' keys are the pids.
    tasks: BTreeMap<i32, Built>,
    /// Every process made, helpers and zombies included.
    made: Vec<Pid>,
    /// Restartable-sequence pointers to be put back at the end: thread, address, value.
    rseq: Vec<(Tid, RemoteAddr, u64)>,
    /// Who brings pages later.
    server: Option<lazy::Handle>,
    /// Of reading pages.
    progress: Progress,
    done: bool,
}

impl Family {
    /// Nobody yet, of whom `bytes` of pages will be read. All signals of this process are blocked; the tasks inherit that.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(area: Area, spare: Box<dyn FnMut() -> i32>, bytes: u64) -> anyhow::Result<Self> {
        prctl::set_child_subreaper(true).context("prctl(PR_SET_CHILD_SUBREAPER)")?;
        let (tasks, made, rseq) = (BTreeMap::new(), Vec::new(), Vec::new());
        let progress = Progress::new("pages", Some(bytes));
        Ok(Self { spare, area, tasks, made, rseq, server: None, progress, done: false })
    }

    /// So many bytes of pages have come.
    pub(crate) fn came(&mut self, bytes: u64) {
        self.progress.inc(bytes);
    }

    pub(crate) fn task(&mut self, pid: i32) -> anyhow::Result<&mut Built> {
        built(&mut self.tasks, pid)
    }

    /// Makes all processes, with the memory that their children are to inherit, and ends those that only helped.
    /// `terminals`: which descriptor becomes the controlling terminal of a session, by its leader.
    ///
    /// # Errors
    /// A pid is taken; what reading memory meets; the kernel's.
    pub fn fork_all(
        &mut self,
        tree: &Tree,
        steps: &[Step],
        memory: &mut Builder<'_>,
        terminals: &BTreeMap<i32, i32>,
    ) -> anyhow::Result<()> {
        for &step in steps {
            match step {
                Step::Fork { parent: 0, child } => self.fork_root(Pid(child))?,
                Step::Fork { parent, child } => {
                    memory.before_fork(self, parent)?;
                    let shares = tree.shares(child, parent)?;
                    let new = self.task(parent)?.clone_process(Pid(child), shares);
                    let new = new.map_err(|error| name_taken(error, child))?;
                    self.made.push(Pid(child));
                    self.tasks.insert(child, new);
                    memory.after_fork(parent, child);
                }
                Step::Subreaper(pid) => {
                    let args = [libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0].map(Arg::from);
                    self.call(pid, Call::new("prctl(PR_SET_CHILD_SUBREAPER)", libc::SYS_prctl, args))?;
                }
                Step::Setsid(pid) => {
                    self.call(pid, Call::new("setsid", libc::SYS_setsid, []))?;
                    if let Some(&fd) = terminals.get(&pid) {
                        let args = [Arg::from(fd), Arg::Val(libc::TIOCSCTTY), Arg::Val(0)];
                        // One that was handed in may be another session's.
                        self.call(pid, Call::new("ioctl(TIOCSCTTY)", libc::SYS_ioctl, args).may_fail())?;
                    }
                }
                Step::Join { pid, pgid } => {
                    let args = [Arg::from(0), Arg::from(pgid)];
                    self.call(pid, Call::new(format!("setpgid({pgid})"), libc::SYS_setpgid, args))?;
                }
                Step::End { helper, parent } => {
                    let task = self.tasks.remove(&helper);
                    task.with_context(|| format!("helper {helper} has not been made"))?.exit(0)?;
                    let args = [helper.into(), Arg::Val(0), libc::__WALL.into(), Arg::Val(0)];
                    self.call(parent, Call::new(format!("wait4({helper})"), libc::SYS_wait4, args))?;
                    self.made.retain(|pid| pid.0 != helper);
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, pid: i32, call: Call) -> anyhow::Result<()> {
        self.task(pid)?.run(&[call])?;
        Ok(())
    }

    fn fork_root(&mut self, pid: Pid) -> anyhow::Result<()> {
        clone::spawn_waiting(pid).map_err(|error| match error.errno {
            Errno::EEXIST => anyhow::Error::from(error).context(taken_text(pid.0)),
            errno if capability::lack(errno, &[CHECKPOINT_RESTORE]).is_some() => {
                Refused::new(format!("pid {pid}"), "choosing the pid of a task needs CAP_CHECKPOINT_RESTORE")
                    .advise("run ckpt-restore as root or with that capability")
                    .into()
            }
            _ => error.into(),
        })?;
        self.made.push(pid);
        ptrace::seize(pid.leader(), OPTIONS.unsigned_abs())?;
        ptrace::interrupt(pid.leader())?;
        let mut root = Built::adopt(pid, pid.leader(), self.area)?;
        // The child inherits our registration, whose memory it is about to lose.
        let rseq = ptrace::rseq(root.tid())?;
        let mut calls = Vec::new();
        if rseq.abi_pointer != 0 {
            const UNREGISTER: u64 = 1;
            let args =
                [rseq.abi_pointer, rseq.abi_size.into(), UNREGISTER, rseq.signature.into()].map(Arg::Val);
            calls.push(Call::new("rseq(unregister)", libc::SYS_rseq, args));
        }
        // So is the stack for signal handlers; images don't list that there is none.
        let disabled = [0, u64::from(libc::SS_DISABLE.unsigned_abs()), 0].map(u64::to_ne_bytes).concat();
        let args = [Arg::In(disabled), Arg::Val(0)];
        calls.push(Call::new("sigaltstack(SS_DISABLE)", libc::SYS_sigaltstack, args));
        let args = [libc::PR_SET_PDEATHSIG, 0, 0, 0, 0].map(Arg::from);
        calls.push(Call::new("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, args));
        root.run(&calls)?;
        self.tasks.insert(pid.0, root);
        Ok(())
    }

    /// Ends the tasks that are dead in the images; their parents may wait for them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bury(&mut self, tree: &Tree) -> anyhow::Result<()> {
        for process in tree.processes.iter().filter(|p| p.body.is_none()) {
            let name = process.name();
            let mut task =
                self.tasks.remove(&process.pid.0).with_context(|| format!("{name} has not been made"))?;
            let tc = process.core().tc.as_ref().with_context(|| format!("{name}: no task entry"))?;
            let mut comm = tc.comm.clone();
            comm.truncate(15);
            comm.push(0);
            let args = [libc::PR_SET_NAME.into(), Arg::In(comm), Arg::Val(0), Arg::Val(0), Arg::Val(0)];
            task.run(&[Call::new("prctl(PR_SET_NAME)", libc::SYS_prctl, args)])?;
            // As wait(2) encodes it.
            match i32::try_from(tc.exit_code & 0x7f).unwrap_or(0) {
                0 => task.exit(i32::try_from(tc.exit_code >> 8 & 0xff).unwrap_or(0)),
                signal => task.die_of(signal),
            }
            .with_context(|| format!("{name}: leave its exit status"))?;
        }
        Ok(())
    }

    /// Runs `calls`, which read `bytes` of pages, in the task and in helper threads of it.
    pub(crate) fn read_pages(&mut self, pid: Pid, calls: &[Call], bytes: u64) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let helpers =
            usize::try_from(bytes / HELP_FROM).unwrap_or(usize::MAX).min(cores - 1).min(Area::HELPERS);
        let spare: Vec<i32> = (0..helpers).map(|_| (self.spare)()).collect();
        let leader = built(&mut self.tasks, pid.0)?;
        let mut workers = Vec::new();
        for (index, tid) in spare.into_iter().enumerate() {
            workers.push(leader.helper(Tid(tid), index)?);
        }
        // Equal shares: every call but the last few moves the same number of bytes.
        let share = calls.len().div_ceil(helpers + 1).max(1);
        let mut shares: Vec<&[Call]> = calls.chunks(share).collect();
        while shares.iter().any(|share| !share.is_empty()) {
            let mut started = Vec::new();
            for (worker, share) in std::iter::once(&mut *leader).chain(&mut workers).zip(&shares) {
                started.push(worker.start_run(share)?);
            }
            let mut came = 0;
            let busy = std::iter::once(&mut *leader).chain(&mut workers).zip(&mut shares).zip(started);
            for ((worker, share), started) in busy {
                let (now, later) = share.split_at(started.count());
                let done = worker.finish_run(now, started)?;
                came += mem::check_reads(now, &done)?;
                *share = later;
            }
            self.progress.inc(came);
        }
        for worker in workers {
            worker.end_thread()?;
        }
        Ok(())
    }

    /// Runs the calls of each process, which read its pages: as many processes at a time as there are processors. For
    /// those that have too few pages for helpers.
    pub(crate) fn read_side_by_side(&mut self, jobs: &[(&Process, Vec<Call>)]) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut todo = jobs.iter().map(|(process, calls)| (*process, &calls[..]));
        let mut busy = VecDeque::new();
        loop {
            while busy.len() < cores
                && let Some((process, calls)) = todo.next()
            {
                let started = self.task(process.pid.0)?.start_run(calls).with_context(|| process.name())?;
                busy.push_back((process, calls, started));
            }
            let Some((process, calls, started)) = busy.pop_front() else { return Ok(()) };
            let (now, later) = calls.split_at(started.count());
            let task = self.task(process.pid.0)?;
            let done = task.finish_run(now, started).with_context(|| process.name())?;
            let came = mem::check_reads(now, &done).with_context(|| process.name())?;
            self.progress.inc(came);
            if !later.is_empty() {
                let started = self.task(process.pid.0)?.start_run(later).with_context(|| process.name())?;
                busy.push_back((process, later, started));
            }
        }
    }

    /// Everything else, up to the point where only registers are missing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn finish(
        &mut self,
        tree: &Tree,
        set: &ImageSet,
        files: &mut OpenFiles,
        own_root: &[u8],
    ) -> anyhow::Result<()> {
        self.progress.end();
        for (process, body) in bodies(tree) {
            self.place_directories(process, body, files, own_root).with_context(|| process.name())?;
        }
        // From here on numbers have other meanings, also for those who share them.
        for (process, body) in bodies(tree).filter(|(_, body)| !body.shares.files) {
            self.place_files(process, body, files).with_context(|| process.name())?;
        }
        for (process, _) in bodies(tree) {
            for thread in process.threads.iter().skip(1) {
                let new = self.task(process.pid.0)?.clone_thread(thread.tid);
                let new =
                    new.map_err(|error| name_taken(error, thread.tid.0)).with_context(|| process.name())?;
                self.tasks.insert(thread.tid.0, new);
            }
        }
        files.open_late(set)?;
        ckpt_sys::prctl::allow_tracer(tree.root().pid);
        for (process, body) in bodies(tree) {
            let task = self.task(process.pid.0)?;
            files.fetch(task, &body.fds).with_context(|| format!("{}: fetch files", process.name()))?;
        }
        files.all_fetched();
        for (process, _) in bodies(tree) {
            self.settings(process).with_context(|| process.name())?;
        }
        // Now that every pid is there: owners of files.
        for (process, body) in bodies(tree) {
            let calls = files.placed(&body.fds, process.pid)?;
            self.task(process.pid.0)?.run(&calls).with_context(|| process.name())?;
        }
        Ok(())
    }

    /// What is found by numbers of this process's own table: executable, cwd and root.
    fn place_directories(
        &mut self,
        process: &Process,
        body: &Body,
        files: &OpenFiles,
        own_root: &[u8],
    ) -> anyhow::Result<()> {
        let mm = &body.space.mm;
        let exe = number(files, mm.exe_file_id, "the executable")?;
        let built = self.task(process.pid.0)?;
        let auxv_at = built.place(&task::auxv_bytes(mm))?;
        built.run(&task::mm_calls(mm, exe, auxv_at))?;
        if body.shares.fs {
            return Ok(());
        }
        let mut calls = Vec::new();
        let cwd = number(files, body.fs.cwd_id, "the working directory")?;
        let root = number(files, body.fs.root_id, "the root directory")?;
        let fchdir = |fd: i32| Call::new("fchdir", libc::SYS_fchdir, [Arg::from(fd)]);
        if crate::region::link(&format!("/proc/self/fd/{root}"))? != own_root {
            calls.push(fchdir(root));
            calls.push(Call::new("chroot", libc::SYS_chroot, [Arg::In(b".\0".to_vec())]));
        }
        calls.push(fchdir(cwd));
        if let Some(umask) = body.fs.umask {
            calls.push(Call::new("umask", libc::SYS_umask, [Arg::from(u64::from(umask))]));
        }
        built.run(&calls)?;
        Ok(())
    }

    /// Moves descriptors to their numbers, and closes all others.
    fn place_files(&mut self, process: &Process, body: &Body, files: &OpenFiles) -> anyhow::Result<()> {
        let mut wanted = Vec::new();
        for entry in body.fds.iter().filter(|entry| !files.is_fetched(FileId(entry.id))) {
            let to =
                i32::try_from(entry.fd).ok().with_context(|| format!("fd {}: no such number", entry.fd))?;
            wanted.push(Move {
                from: number(files, entry.id, &format!("fd {to}"))?,
                to,
                cloexec: entry.flags & 1 == 1,
            });
        }
        let mut calls = Vec::new();
        for Move { from, to, cloexec } in moves::in_order(&wanted)? {
            let flag = |flag: i32| if cloexec { flag } else { 0 };
            calls.push(if from == to {
                let args = [to, libc::F_SETFD, flag(libc::FD_CLOEXEC)].map(Arg::from);
                Call::new(format!("fcntl(fd {to}, F_SETFD)"), libc::SYS_fcntl, args)
            } else {
                let args = [from, to, flag(libc::O_CLOEXEC)].map(Arg::from);
                Call::new(format!("dup3(fd {to})"), libc::SYS_dup3, args)
            });
        }
        let mut targets: Vec<i32> = wanted.iter().map(|step| step.to).collect();
        targets.sort_unstable();
        let mut from = 0;
        for &fd in targets.iter().chain([&i32::MAX]) {
            if fd > from {
                let args = [
                    Arg::from(from),
                    if fd == i32::MAX { Arg::from(fd) } else { Arg::from(fd - 1) },
                    0.into(),
                ];
                calls.push(Call::new("close_range", libc::SYS_close_range, args));
            }
            from = fd.saturating_add(1);
        }
        self.task(process.pid.0)?.run(&calls)?;
        Ok(())
    }

    fn settings(&mut self, process: &Process) -> anyhow::Result<()> {
        self.task(process.pid.0)?.run(&task::process_calls(process.core()))?;
        for thread in &process.threads {
            let core = &thread.core;
            // Registering the area makes the kernel forget which critical section the thread is in.
            let rseq = core.thread_core.as_ref().and_then(|t| t.rseq_entry.as_ref());
            if let Some(rseq) = rseq.filter(|rseq| rseq.rseq_abi_pointer != 0) {
                let at = RemoteAddr(rseq.rseq_abi_pointer).plus(8);
                let mut word = [0; 8];
                memory::read_exact(process.pid, at, &mut word)?;
                let section = rseq.rseq_cs_pointer.unwrap_or(u64::from_ne_bytes(word));
                if section != 0 {
                    self.rseq.push((thread.tid, at, section));
                }
            }
            self.task(thread.tid.0)?.run(&task::thread_calls(core))?;
        }
        task::outside(process.pid, process.core())
    }

    /// What has to come last: pending signals, credentials, and the end of the runner; then registers.
    ///
    /// # Errors
    /// The kernel's.
    pub fn seal(&mut self, tree: &Tree, region: &Region, stop: bool) -> anyhow::Result<()> {
        // Children before parents: a child that stops sends its parent SIGCHLD, which is then drained.
        for (process, body) in bodies(tree).collect::<Vec<_>>().into_iter().rev() {
            self.drain(process, tree).with_context(|| process.name())?;
            self.task(process.pid.0)?
                .run(&task::timer_calls(process.core()))
                .with_context(|| process.name())?;
            self.confine(process, &tree.filters).with_context(|| process.name())?;
            self.seal_one(process, body, region).with_context(|| process.name())?;
            if stop || task::stop_signal(process.core()).is_some() {
                Self::stop(process).with_context(|| format!("{}: stop it", process.name()))?;
            }
        }
        for (process, _) in bodies(tree) {
            for thread in &process.threads {
                ptrace::set_sigmask(thread.tid, task::sigmask(&thread.core))?;
            }
        }
        for &(tid, at, section) in &self.rseq {
            memory::write_all(Pid(tid.0), at, &section.to_ne_bytes())?;
        }
        check_family(tree)
    }

    /// Takes away what helpers, zombies, stopped children and our own doings have left behind.
    fn drain(&mut self, process: &Process, tree: &Tree) -> anyhow::Result<()> {
        let task = self.task(process.pid.0)?;
        for (child, _) in bodies(tree).filter(|(p, _)| p.ppid == process.pid.0) {
            let flags = Arg::from(libc::WUNTRACED | libc::WNOHANG);
            let args = [child.pid.0.into(), Arg::Val(0), flags, Arg::Val(0)];
            task.run(&[Call::new("wait4", libc::SYS_wait4, args).may_fail()])?;
        }
        let any = Arg::In((!0_u64).to_ne_bytes().to_vec());
        let args = [any, Arg::Val(0), Arg::In(vec![0; 16]), Arg::Val(8)];
        let take = Call::new("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, args).may_fail();
        while ckpt_remote::run_one(task, take.clone())?.ret > 0 {}
        Ok(())
    }

    /// Installs the seccomp filters, which are suspended until [`Self::go`].
    fn confine(&mut self, process: &Process, filters: &seccomp::Table) -> anyhow::Result<()> {
        let chains =
            process.threads.iter().map(|t| filters.of(&t.core)).collect::<anyhow::Result<Vec<_>>>()?;
        let Some(longest) = chains.iter().flatten().map(|f| f.program.len()).max() else { return Ok(()) };
        for thread in &process.threads {
            let options = OPTIONS | libc::PTRACE_O_SUSPEND_SECCOMP;
            ptrace::set_options(thread.tid, options.unsigned_abs())?;
        }
        let shared = chains.windows(2).all(|pair| pair[0] == pair[1]);
        let pid = process.pid;
        let leader = self.task(pid.0)?;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let args = [
            Arg::Val(0),
            Arg::Val(longest as u64),
            protection.into(),
            flags.into(),
            (-1).into(),
            Arg::Val(0),
        ];
        let at = ckpt_remote::run_one(leader, Call::new("mmap", libc::SYS_mmap, args))?.ret;
        let at = RemoteAddr(at.cast_unsigned());
        for (thread, chain) in process.threads.iter().zip(&chains).take(if shared { 1 } else { chains.len() })
        {
            for filter in chain {
                memory::write_all(pid, at, &filter.program)?;
                let done =
                    ckpt_remote::run_one(self.task(thread.tid.0)?, seccomp::install(filter, at, shared)?)?;
                ensure!(done.ret == 0, "tid {}: its seccomp filters differ from its process's", done.ret);
            }
        }
        let args = [Arg::Val(at.0), Arg::Val(longest as u64)];
        self.call(pid.0, Call::new("munmap", libc::SYS_munmap, args))
    }

    fn seal_one(&mut self, process: &Process, body: &Body, region: &Region) -> anyhow::Result<()> {
        for thread in &process.threads {
            self.task(thread.tid.0)?.run(&task::creds_calls(&thread.core))?;
        }
        self.task(process.pid.0)?.run(&task::dumpable_calls(&body.space.mm))?;
        for Thread { tid, core } in &process.threads {
            let leader = tid.0 == process.pid.0;
            let built = self.task(tid.0)?;
            for call in task::pending_calls(core, process.pid, *tid, leader) {
                built.step(&call)?;
            }
        }
        self.task(process.pid.0)?.drop_runner(region.range().end - region.range().start)?;
        for Thread { tid, core } in &process.threads {
            let on = || format!("tid {tid}");
            ptrace::set_regs(*tid, task::regs(core).with_context(on)?)?;
            ptrace::set_regset(*tid, ptrace::NT_X86_XSTATE, &task::xstate(core).with_context(on)?)?;
        }
        Ok(())
    }

    /// Puts all threads into a group-stop, without letting them run an instruction of their own.
    ///
    /// SIGSTOP goes to the leader alone, and the leader alone is resumed to take it: sent to the process it
    /// could be taken by any thread. Then the group-stop waits for the others, who enter it as soon as they
    /// are resumed. It is SIGSTOP whatever had stopped the process, since the others have no effect in an
    /// orphaned process group; nobody can tell, the parent counts as having waited for the stop.
    fn stop(process: &Process) -> anyhow::Result<()> {
        let leader = process.pid.leader();
        ptrace::signal_thread(process.pid, leader, libc::SIGSTOP)?;
        for thread in &process.threads {
            ptrace::resume(thread.tid, 0, false)?;
            loop {
                match ptrace::wait(thread.tid, false)? {
                    Some(Stop::Group(_)) => break,
                    Some(Stop::Signal(libc::SIGSTOP)) => ptrace::resume(thread.tid, libc::SIGSTOP, false)?,
                    Some(Stop::Exited(_) | Stop::Killed(_)) => {
                        return Err(RemoteError::Died(thread.tid).into());
                    }
                    Some(_) => ptrace::resume(thread.tid, 0, false)?,
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// From here on the tasks are complete: if this process dies, they run.
    ///
    /// # Errors
    /// A task was killed from outside.
    pub fn stand_alone(&mut self) -> anyhow::Result<()> {
        prctl::set_child_subreaper(false).context("prctl(PR_SET_CHILD_SUBREAPER)")?;
        for &tid in self.tasks.keys() {
            ptrace::set_options(Tid(tid), 0)?;
        }
        Ok(())
    }

    /// Lets everything run, after [`Self::stand_alone`]. From the first detach on there is no way back.
    ///
    /// # Errors
    /// A task was killed from outside.
    pub fn go(mut self) -> anyhow::Result<()> {
        for &tid in self.tasks.keys() {
            ptrace::detach(Tid(tid), 0)?;
        }
        self.done = true;
        if let Some(server) = self.server.take() {
            server.go();
        }
        Ok(())
    }

    /// From now on pages come from `server`.
    pub fn serve(&mut self, server: Option<lazy::Handle>) {
        self.server = server;
    }
}

/// The number that a file has in this process, and in tasks whose descriptors are not in place yet.
fn number(files: &OpenFiles, id: u32, what: &str) -> anyhow::Result<i32> {
    let fd = files.fd(FileId(id)).with_context(|| format!("{what}: file {id} is in no image"))?;
    Ok(fd.as_raw_fd())
}

fn built(tasks: &mut BTreeMap<i32, Built>, pid: i32) -> anyhow::Result<&mut Built> {
    tasks.get_mut(&pid).with_context(|| format!("pid {pid} has not been made"))
}

impl Drop for Family {
    fn drop(&mut self) {
        if !self.done {
            for pid in &self.made {
                // A task that has become another user's takes CAP_KILL, or a tracer (PTRACE_KILL).
                if kill(pid.nix(), Signal::SIGKILL).is_err() {
                    let _ = nix::sys::ptrace::kill(pid.nix());
                }
            }
            // It ends because nobody is left to serve, and is waited for below.
            self.server = None;
            // Whoever it was, their parents may be gone already, and then they are ours: wait for any.
            while let Ok(Some(_)) = ptrace::wait(Tid(-1), false) {}
            let _ = prctl::set_child_subreaper(false);
        }
    }
}

pub(crate) fn bodies(tree: &Tree) -> impl Iterator<Item = (&Process, &Body)> {
    tree.processes.iter().filter_map(|process| Some((process, process.body.as_ref()?)))
}

/// Whether a task is there, and will not be killed: asked when its tracer, which may have wanted that it dies with it,
/// is gone. Its number may be another's by now, if somebody has restored the same images again: `handle` is its pidfd. What it
/// has been sent is not seen any more once it has taken note of that, and that it exits not yet: so it is given time to end.
#[must_use]
pub fn lives(pid: Pid, handle: BorrowedFd<'_>) -> bool {
    const TIME_TO_END: u16 = 50;
    if !may_live(pid) {
        return false;
    }
    let mut end = [PollFd::new(handle, PollFlags::POLLIN)];
    while poll(&mut end, PollTimeout::from(TIME_TO_END)) == Err(Errno::EINTR) {}
    !end[0].any().unwrap_or(true)
}

fn may_live(pid: Pid) -> bool {
    const PF_EXITING: u32 = 4;
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let read = |name| std::fs::read(format!("/proc/{pid}/{name}")).ok();
    let stat = read("stat").and_then(|text| ckpt_proc::stat::parse(&text).ok());
    let status = read("status").and_then(|text| ckpt_proc::status::parse(&text).ok());
    let exiting = stat.is_none_or(|s| s.flags & PF_EXITING != 0 || matches!(s.state, b'Z' | b'X'));
    !exiting && status.is_some_and(|s| (s.pending | s.shared_pending) & KILL == 0)
}

fn taken_text(pid: i32) -> String {
    format!("pid {pid} was taken in the meantime")
}

fn name_taken(error: RemoteError, pid: i32) -> anyhow::Error {
    let taken = matches!(error, RemoteError::Call { errno: Errno::EEXIST, .. });
    let error = anyhow::Error::from(error);
    if taken { error.context(taken_text(pid)) } else { error }
}

/// The relations that [`crate::births`] planned, as the kernel sees them.
fn check_family(tree: &Tree) -> anyhow::Result<()> {
    let inside = |n: i32| tree.processes.iter().any(|p| p.pid.0 == n);
    for process in &tree.processes {
        let path = format!("/proc/{}/stat", process.pid);
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let mut fields = text.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').skip(1);
        for (what, want) in
            [("parent", process.ppid), ("process group", process.pgid), ("session", process.sid)]
        {
            let got: Option<i32> = fields.next().and_then(|f| f.parse().ok());
            if inside(want) && got != Some(want) {
                let why = format!("its {what} would be {}, it was {want}", got.unwrap_or(0));
                return Err(Refused::new(process.name(), why).into());
            }
        }
    }
    Ok(())
}

/// This process's vdso, if there is one.
///
/// # Errors
/// /proc can't be read.
pub fn own_vdso() -> anyhow::Result<Option<vdso::Ours>> {
    use std::os::unix::fs::FileExt;
    let maps = std::fs::read_to_string("/proc/self/maps").context("/proc/self/maps")?;
    let memory = File::open("/proc/self/mem").context("/proc/self/mem")?;
    vdso::Ours::find(&maps, |at, buffer| memory.read_exact_at(buffer, at))
}
