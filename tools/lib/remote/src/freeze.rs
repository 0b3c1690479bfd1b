//! Stopping a whole process tree.
//!
//! Every thread is seized (PTRACE_SEIZE, which by itself changes nothing) and interrupted
//! (PTRACE_INTERRUPT), and the tree is walked again until a pass finds no new task: a task that was
//! forking when it was interrupted shows its child in the next pass, and a stopped task can't fork.
//!
//! What the kernel gives for free: when the tracer dies, whatever the reason, every tracee runs on
//! (ptrace(2), "Death under ptrace"; `exit_ptrace` in kernel/ptrace.c), and a task that was in
//! group-stop is put back into it. So the guard's `Drop` is only for the orderly path.
//!
//! A parent in vfork(2) waits uninterruptibly for its child to exec or exit, and a frozen child
//! never will: such a tree can't be frozen at that instant. Then all others are let go, and it is
//! tried again when the parent, whose interrupt is still pending, has come out of vfork, until a
//! deadline. The same serves tasks in uninterruptible I/O, and those that a debugger traces for a moment. A task that never stops can't be
//! detached either (ptrace(2) wants it stopped): it is freed when this process ends.

use std::{
    collections::{BTreeMap, HashMap},
    fs, thread,
    time::{Duration, Instant},
};

use ckpt_proc::{
    maps::Mapping,
    stat::{self, Stat},
    status::{self, Status},
};
use ckpt_sys::{
    Pid, Refused, SysError, Tid,
    capability::{self, number::KILL},
    kcmp, procfs,
    ptrace::{self, Regs, Stop},
    rseq,
};
use nix::errno::Errno;

use crate::{RemoteError, borrow::Landings};

/// Why a tree could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// It can't be done, or not by us.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The root is gone.
    #[error("pid {0}: no such process")]
    NoSuchProcess(Pid),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// A stopped thread.
#[derive(Debug, Clone)]
pub struct Thread {
    /// Its id.
    pub tid: Tid,
    /// Registers as they were when it stopped; `rax` and `orig_rax` tell a system call that will be restarted.
    pub regs: Regs,
    /// Signals that it blocks.
    pub sigmask: u64,
    /// What `/proc/PID/task/TID/status` says of it.
    pub status: Status,
}

/// A process of the tree.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: Pid,
    /// What `/proc/PID/stat` says of it.
    pub stat: Stat,
    /// Dead, but not waited for; it has no threads.
    pub zombie: bool,
    /// Stopped by this signal (job control) when it was frozen.
    pub stopped_by: Option<i32>,
    /// Its threads, the leader first.
    pub threads: Vec<Thread>,
}

impl Process {
    /// Its parent: a process of the tree, but for the root.
    #[must_use]
    pub fn parent(&self) -> Pid {
        Pid(self.stat.ppid)
    }

    /// Command name for messages.
    #[must_use]
    pub fn comm(&self) -> String {
        self.stat.comm.escape_ascii().to_string()
    }

    /// Whether a thread of it was stopped outside of a system call: at work, perhaps in a page fault.
    #[must_use]
    pub fn at_work(&self) -> bool {
        self.threads.iter().any(|thread| thread.regs.orig_rax.cast_signed() < 0)
    }

    /// How messages call it.
    #[must_use]
    pub fn subject(&self) -> String {
        format!("pid {} ({})", self.pid, self.comm())
    }
}

/// A frozen tree. Dropping it lets all tasks run on.
#[derive(Debug)]
pub struct Frozen {
    /// All processes, parents before children, the root first.
    pub processes: Vec<Process>,
    pub(crate) landings: Landings,
    /// SIGSTOPs that arrived while a task worked for us, to be sent again at the end.
    pub(crate) held: Vec<(Pid, i32)>,
    stopped: Vec<Tid>,
    since: Instant,
    /// Processor time of the thread that froze it, at that moment.
    worked: Duration,
}

/// What becomes of a frozen tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// It runs on as before.
    Run,
    /// Every process is left in group-stop, as after SIGSTOP.
    Stop,
    /// It is killed.
    Kill,
}

/// What keeps a tree from being stopped, perhaps only for a moment.
#[derive(Debug, Clone, Copy)]
enum Obstacle {
    /// A thread that does not stop.
    Stuck(Tid, Pid),
    /// A thread that somebody else traces, and who.
    Traced(Tid, Pid, i32),
}

impl Obstacle {
    fn refusal(self) -> Refused {
        match self {
            Self::Stuck(tid, pid) => stuck_error((tid, pid)),
            Self::Traced(tid, pid, tracer) => {
                Refused::new(format!("pid {pid} tid {tid}"), format!("is being traced by pid {tracer}"))
                    .advise("end that debugger or tracer first, or raise --freeze-timeout")
            }
        }
    }
}

/// Seizes a thread; `Some` if somebody else traces it: who.
fn seize(tid: Tid, pid: Pid) -> Result<Option<i32>, SysError> {
    let attempt = || match ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD as u32) {
        Ok(()) => Ok(None),
        Err(error) => tracer_of(tid, pid).filter(|_| error.errno == Errno::EPERM).map(Some).ok_or(error),
    };
    // A tracer may have left between the refusal and the question who it is.
    attempt().or_else(|_| attempt())
}

/// Waits until nobody traces a thread. No event tells, and in between the tree is to run.
fn await_tracer(tid: Tid, pid: Pid, deadline: Instant) {
    while tracer_of(tid, pid).is_some() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(3));
    }
}

/// Who traces a thread.
fn tracer_of(tid: Tid, pid: Pid) -> Option<i32> {
    let text = procfs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    status::parse(&text).ok().map(|status| status.tracer_pid).filter(|&tracer| tracer > 0)
}

/// Seized tasks and where they stopped, if they did.
type Seized = BTreeMap<Tid, (Pid, Option<Stop>)>;

#[derive(Default)]
struct Attempt {
    threads: Seized,
    /// Seized in an earlier attempt and not stopped then.
    pending: Seized,
    /// The first thread that somebody else traced in this pass.
    traced: Option<Obstacle>,
    /// In the order in which they were met: parents first.
    processes: Vec<Pid>,
    zombies: Vec<Pid>,
    /// As the last pass found them: when that found nothing new, all were stopped.
    stats: HashMap<Pid, Stat>,
}

impl Frozen {
    /// Stops the tree under `root`, trying for at most `patience`.
    ///
    /// # Errors
    /// See [`FreezeError`]. Nothing is left stopped then.
    pub fn freeze(root: Pid, patience: Duration) -> Result<Self, FreezeError> {
        check_root(root)?;
        let deadline = Instant::now() + patience;
        let mut attempt = Attempt::default();
        loop {
            let (since, worked) = (Instant::now(), processor_time());
            match attempt.stop_all(root) {
                Ok(None) => {
                    let mut frozen = attempt.done(root, since, worked)?;
                    match frozen.prepare() {
                        Err(error) if Instant::now() < deadline => {
                            // Deep in its stack at this instant, or between exec and its first
                            // instruction: a moment later it stands elsewhere.
                            drop((frozen, error));
                            thread::sleep(Duration::from_millis(3));
                        }
                        // What can't be borrowed is said when it is tried.
                        _ => {
                            frozen.check_signals()?;
                            return Ok(frozen);
                        }
                    }
                }
                Ok(Some(obstacle)) => {
                    let refused = obstacle.refusal();
                    attempt.let_go();
                    if Instant::now() >= deadline {
                        attempt.abandon();
                        return Err(refused.into());
                    }
                    match obstacle {
                        Obstacle::Stuck(..) => attempt.await_pending(deadline),
                        Obstacle::Traced(tid, pid, _) => await_tracer(tid, pid, deadline),
                    }
                }
                Err(error) => {
                    attempt.let_go();
                    attempt.abandon();
                    return Err(error);
                }
            }
        }
    }

    /// Finds each process's way home, without touching it.
    fn prepare(&mut self) -> Result<(), RemoteError> {
        for process in self.processes.iter().filter(|p| !p.zombie) {
            self.landings.of(&process.threads, process.pid)?;
        }
        Ok(())
    }

    /// A signal that comes meanwhile may have to be sent once more, and to stop the tree takes one: better
    /// refused than lost.
    fn check_signals(&self) -> Result<(), Refused> {
        for process in &self.processes {
            let refused = |reason: &str| Refused::new(process.subject(), reason);
            match nix::sys::signal::kill(process.pid.nix(), None) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(Errno::EPERM) if !capability::held(KILL) => {
                    return Err(refused("to send signals to it needs CAP_KILL")
                        .advise("run as the same user, as root, or with that capability"));
                }
                Err(errno) => {
                    return Err(refused(&format!("signals can't be sent to it: kill: {errno}")).advise(
                        "a seccomp filter or security module denies kill(2) to this tool: allow it",
                    ));
                }
            }
        }
        Ok(())
    }

    /// How long the tree has been frozen.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// How much of that time the calling thread worked, which is the one that froze it.
    #[must_use]
    pub fn worked(&self) -> Duration {
        processor_time().saturating_sub(self.worked)
    }

    /// The mappings of a process as they were when it was frozen, without flags. `None` for zombies.
    #[must_use]
    pub fn maps(&self, pid: Pid) -> Option<&[Mapping]> {
        self.landings.maps(pid)
    }

    /// Ends the freeze. With [`Release::Kill`] every task is dead when this returns.
    pub fn release(mut self, how: Release) {
        self.let_go(how);
    }

    fn let_go(&mut self, how: Release) {
        let tids = std::mem::take(&mut self.stopped);
        // Children first, so that none is reparented to somebody who reaps it. One that is gone needs no signal.
        for process in self.processes.iter().rev().filter(|p| !p.zombie) {
            match how {
                Release::Run => {}
                Release::Stop => drop(nix::sys::signal::kill(process.pid.nix(), nix::sys::signal::SIGSTOP)),
                Release::Kill => drop(ptrace::kill(process.pid.leader())),
            }
        }
        for (pid, signal) in std::mem::take(&mut self.held) {
            let _ = nix::sys::signal::kill(pid.nix(), nix::sys::signal::Signal::try_from(signal).ok());
        }
        if how == Release::Kill {
            reap(tids);
            return;
        }
        for tid in tids {
            // ESRCH: killed meanwhile by somebody else, nothing to set free.
            let _ = ptrace::detach(tid, 0);
        }
    }
}

/// Waits until all of these killed tasks have ended. A leader can't be waited for before its
/// threads, so they are taken in whatever order they come.
fn reap(mut tids: Vec<Tid>) {
    let mut pause = Duration::from_micros(50);
    while !tids.is_empty() {
        tids.retain(|&tid| match ptrace::wait(tid, true) {
            Ok(None) => true,
            Ok(Some(Stop::Exited(_) | Stop::Killed(_))) | Err(_) => false,
            // SIGKILL ends any stop; this one came first.
            Ok(Some(_)) => ptrace::resume(tid, 0, false).is_ok(),
        });
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.let_go(Release::Run);
    }
}

fn processor_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}

fn check_root(root: Pid) -> Result<(), FreezeError> {
    let subject = format!("pid {root}");
    let Ok(text) = procfs::read(format!("/proc/{root}/status")) else {
        return Err(FreezeError::NoSuchProcess(root));
    };
    let status = status::parse(&text).map_err(|e| Refused::new(subject.clone(), e.to_string()))?;
    if status.tgid != root.0 {
        let refused = Refused::new(subject, format!("is a thread of process {}", status.tgid));
        return Err(refused.advise(format!("pass the process: -t {}", status.tgid)).into());
    }
    if status.kthread == Some(true) {
        return Err(Refused::new(subject, "is a kernel thread").into());
    }
    if state_of(root.leader()) == Some(b'Z') && numbers_in(&format!("/proc/{root}/task")).len() > 1 {
        return Err(leader_gone(root).into());
    }
    if state_of(root.leader()) == Some(b'Z') {
        return Err(Refused::new(subject, "is a zombie: there is nothing left to checkpoint").into());
    }
    Ok(())
}

fn stat_of(tid: Tid) -> Option<Stat> {
    stat::parse(&procfs::read(format!("/proc/{tid}/stat")).ok()?).ok()
}

fn state_of(tid: Tid) -> Option<u8> {
    stat_of(tid).map(|s| s.state)
}

fn numbers_in(directory: &str) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

fn children_of(pid: Pid, tids: &[i32]) -> Vec<Pid> {
    let mut children = Vec::new();
    for tid in tids {
        if let Ok(text) = procfs::read_to_string(format!("/proc/{pid}/task/{tid}/children")) {
            children.extend(text.split_whitespace().filter_map(|n| n.parse().ok()).map(Pid));
        }
    }
    children
}

fn leader_gone(pid: Pid) -> Refused {
    Refused::new(
        format!("pid {pid}"),
        "its main thread has ended while other threads go on, which can't be restored",
    )
}

fn stuck_error((tid, pid): (Tid, Pid)) -> Refused {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).unwrap_or_default();
    let (comm, wchan) = (read("comm"), read("wchan"));
    let state = state_of(tid).map_or('?', char::from);
    let tids = numbers_in(&format!("/proc/{pid}/task"));
    let in_vfork = state == 'D' && children_of(pid, &tids).iter().any(|child| shares_memory(pid, *child));
    if in_vfork {
        return Refused::new(
            format!("pid {pid} ({}) tid {tid}", comm.trim_end()),
            "can't be stopped: it waits in vfork(2) for a child that has neither exec'ed nor ended",
        )
        .advise("try again when the child has, or raise --freeze-timeout");
    }
    if wchan.contains("userfaultfd") {
        return Refused::new(
            format!("pid {pid} ({}) tid {tid}", comm.trim_end()),
            format!("can't be stopped: it waits for missing pages (in {})", wchan.trim()),
        )
        .advise("if ckpt-restore --lazy has restored it, try again when all its pages are there");
    }
    Refused::new(
        format!("pid {pid} ({}) tid {tid}", comm.trim_end()),
        format!("can't be stopped: it stays in state {state} (waiting in {})", wchan.trim()),
    )
    .advise("it is in uninterruptible I/O; try again when that is over, or raise --freeze-timeout")
}

fn shares_memory(a: Pid, b: Pid) -> bool {
    kcmp::compare(a.leader(), b.leader(), kcmp::Object::Vm).is_ok_and(std::cmp::Ordering::is_eq)
}

impl Attempt {
    /// Stops everything; `Some` if something is in the way.
    fn stop_all(&mut self, root: Pid) -> Result<Option<Obstacle>, FreezeError> {
        loop {
            let mut grown = false;
            let mut queue = vec![root];
            while let Some(pid) = queue.pop() {
                let (new, tids) = self.seize_process(pid, root)?;
                grown |= new;
                queue.extend(children_of(pid, &tids));
            }
            if let Some((tid, pid)) = self.wait_all()? {
                return Ok(Some(Obstacle::Stuck(tid, pid)));
            }
            if let Some(obstacle) = self.traced.take() {
                return Ok(Some(obstacle));
            }
            if !grown {
                return Ok(None);
            }
        }
    }

    /// Seizes and interrupts those threads of `pid` that are new. Whether there were any, and all threads.
    fn seize_process(&mut self, pid: Pid, root: Pid) -> Result<(bool, Vec<i32>), FreezeError> {
        if pid.0.unsigned_abs() == std::process::id() {
            let refused =
                Refused::new(format!("pid {root}"), "this tool is part of the tree that it should freeze");
            return Err(refused.advise("run the pipeline from outside of that tree").into());
        }
        let known = self.processes.contains(&pid);
        let stat = stat_of(pid.leader());
        let state = stat.as_ref().map(|s| s.state);
        match stat {
            Some(stat) => drop(self.stats.insert(pid, stat)),
            None => drop(self.stats.remove(&pid)),
        }
        if self.zombies.contains(&pid) {
            return Ok((false, Vec::new()));
        }
        let tids = numbers_in(&format!("/proc/{pid}/task"));
        if state == Some(b'Z') && tids.len() <= 1 {
            if known {
                self.processes.retain(|&p| p != pid);
                self.threads.retain(|_, (owner, _)| *owner != pid);
            }
            if pid == root {
                return Err(FreezeError::NoSuchProcess(root));
            }
            self.zombies.push(pid);
            return Ok((true, Vec::new()));
        }
        let mut grown = false;
        for tid in tids.iter().copied().map(Tid) {
            if self.threads.contains_key(&tid) {
                continue;
            }
            if let Some(pending) = self.pending.remove(&tid) {
                self.threads.insert(tid, pending);
                grown = true;
                continue;
            }
            match seize(tid, pid) {
                Ok(None) => {}
                Ok(Some(tracer)) => {
                    self.traced.get_or_insert(Obstacle::Traced(tid, pid, tracer));
                    continue;
                }
                Err(e) if e.vanished() => continue,
                Err(e) if e.errno == Errno::EPERM => match state_of(tid) {
                    None => continue,
                    Some(b'Z' | b'X') if tid.0 == pid.0 => {
                        if numbers_in(&format!("/proc/{pid}/task")).len() > 1 {
                            return Err(leader_gone(pid).into());
                        }
                        // It ended just now: the next pass finds a zombie, or nothing.
                        grown = true;
                        continue;
                    }
                    Some(b'Z' | b'X') => continue,
                    Some(_) => return Err(not_ours(pid, tid).into()),
                },
                Err(e) => return Err(e.into()),
            }
            self.threads.insert(tid, (pid, None));
            grown = true;
            match ptrace::interrupt(tid) {
                Err(e) if !e.vanished() => return Err(e.into()),
                _ => {}
            }
        }
        if !known && self.threads.values().any(|(owner, _)| *owner == pid) {
            self.processes.push(pid);
        } else if !known && pid == root && self.traced.is_none() {
            return Err(FreezeError::NoSuchProcess(root));
        }
        Ok((grown, tids))
    }

    fn wait_all(&mut self) -> Result<Option<(Tid, Pid)>, FreezeError> {
        // A running task takes the interrupt within a scheduling tick; what does not stop in this
        // time is waiting uninterruptibly, perhaps for a task that we hold.
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(200);
        let mut pause = Duration::from_micros(20);
        loop {
            let mut waiting = None;
            let mut gone = Vec::new();
            for (&tid, (pid, stop)) in &mut self.threads {
                while stop.is_none() {
                    match ptrace::wait(tid, true) {
                        Ok(None) => {
                            waiting = Some((tid, *pid));
                            break;
                        }
                        // It is delivered now; the interrupt stops the task again before any instruction runs.
                        Ok(Some(Stop::Signal(signal))) => ptrace::resume(tid, signal, false)?,
                        Ok(Some(s @ (Stop::Interrupted | Stop::Group(_)))) => *stop = Some(s),
                        Ok(Some(Stop::Exited(_) | Stop::Killed(_))) => {
                            gone.push(tid);
                            break;
                        }
                        Ok(Some(_)) => ptrace::resume(tid, 0, false)?,
                        Err(e) if e.errno == Errno::ECHILD => {
                            gone.push(tid);
                            break;
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
            }
            for tid in gone {
                self.threads.remove(&tid);
            }
            match waiting {
                None => return Ok(None),
                Some(stuck) if Instant::now() >= deadline => return Ok(Some(stuck)),
                // Most stop at once; the shortest sleep would last longer than that.
                Some(_) if begun.elapsed() < Duration::from_micros(100) => thread::yield_now(),
                Some(_) => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(1));
                }
            }
        }
    }

    /// Lets all stopped tasks run on; those that did not stop stay seized, with their interrupt pending.
    fn let_go(&mut self) {
        for (tid, (pid, stop)) in std::mem::take(&mut self.threads) {
            if stop.is_some() {
                // ESRCH: it was killed meanwhile.
                let _ = ptrace::detach(tid, 0);
            } else {
                self.pending.insert(tid, (pid, None));
            }
        }
        self.processes.clear();
        self.zombies.clear();
        self.stats.clear();
        self.traced = None;
    }

    /// Waits a while for a task that did not stop to do so after all.
    fn await_pending(&mut self, deadline: Instant) {
        let soon = (Instant::now() + Duration::from_millis(100)).min(deadline);
        let mut pause = Duration::from_micros(50);
        while Instant::now() < soon {
            let mut stopped = false;
            self.pending.retain(|&tid, (_, stop)| match ptrace::wait(tid, true) {
                Ok(None) => true,
                Ok(Some(Stop::Signal(signal))) => ptrace::resume(tid, signal, false).is_ok(),
                Ok(Some(s @ (Stop::Interrupted | Stop::Group(_)))) => {
                    *stop = Some(s);
                    stopped = true;
                    true
                }
                Ok(Some(Stop::Exited(_) | Stop::Killed(_))) | Err(_) => false,
                Ok(Some(_)) => ptrace::resume(tid, 0, false).is_ok(),
            });
            if stopped || self.pending.is_empty() {
                return;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    /// Gives up on those that did not stop: what has stopped by now is let go, the rest is freed
    /// when this process ends.
    fn abandon(&mut self) {
        for &tid in self.pending.keys() {
            let _ = ptrace::wait(tid, true);
            let _ = ptrace::detach(tid, 0);
        }
    }

    fn done(&mut self, root: Pid, since: Instant, worked: Duration) -> Result<Frozen, FreezeError> {
        let mut frozen = Frozen {
            processes: Vec::new(),
            landings: Landings::default(),
            held: Vec::new(),
            stopped: self.threads.keys().copied().collect(),
            since,
            worked,
        };
        let threads = std::mem::take(&mut self.threads);
        let zombies = std::mem::take(&mut self.zombies);
        let mut pids = std::mem::take(&mut self.processes);
        pids.extend(&zombies);
        for pid in pids {
            // Ended and waited for while the tree was being stopped: not part of it any more.
            let Some(stat) = self.stats.remove(&pid) else {
                if pid == root {
                    return Err(FreezeError::NoSuchProcess(root));
                }
                continue;
            };
            let mut process =
                Process { pid, stat, zombie: zombies.contains(&pid), stopped_by: None, threads: Vec::new() };
            for (&tid, (owner, stop)) in &threads {
                if *owner == pid {
                    if let Some(Stop::Group(signal)) = stop {
                        process.stopped_by = Some(*signal);
                    }
                    let sigmask = ptrace::sigmask(tid)?;
                    let status = status_of(pid, tid)?;
                    let mut regs = ptrace::regs(tid)?;
                    if interrupted_by_us(&regs)
                        && stop.is_some_and(|s| s == Stop::Interrupted)
                        && !has_signal(&status)
                    {
                        regs.rax = regs.orig_rax;
                        regs.rip -= 2;
                        ptrace::set_regs(tid, regs)?;
                    }
                    // Inside a restartable sequence: it would be aborted by the kernel before another
                    // instruction of it runs, but remote calls make the kernel forget that.
                    if let Some(abort) = rseq::abort_address(pid, tid, regs.rip)? {
                        regs.rip = abort;
                    }
                    let thread = Thread { tid, regs, sigmask, status };
                    process.threads.push(thread);
                }
            }
            process.threads.sort_by_key(|t| (t.tid != pid.leader(), t.tid));
            frozen.processes.push(process);
        }
        sort_parents_first(&mut frozen.processes, root);
        Ok(frozen)
    }
}

/// Whether a thread is about to see EINTR from a call that fails so after any stop (signal(7)) and
/// that waits without a timeout: then it can be made again, and the freeze goes unnoticed. With a
/// timeout it can't: a program that is checkpointed more often than its timeout would never see it.
fn interrupted_by_us(regs: &Regs) -> bool {
    let forever = match regs.orig_rax.cast_signed() {
        // The timeout is an int: only its low half counts.
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => regs.r10 & 0xffff_ffff == 0xffff_ffff,
        libc::SYS_epoll_pwait2 => regs.r10 == 0,
        libc::SYS_rt_sigtimedwait => regs.rdx == 0,
        libc::SYS_semop => true,
        _ => false,
    };
    forever && regs.rax.cast_signed() == -i64::from(libc::EINTR)
}

/// Whether a signal waits that the thread does not block: then EINTR may be that signal's.
fn has_signal(status: &Status) -> bool {
    (status.pending | status.shared_pending) & !status.blocked != 0
}

fn status_of(pid: Pid, tid: Tid) -> Result<Status, FreezeError> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    let text = procfs::read(&path).map_err(|e| {
        SysError::new("read", path.clone(), Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
    })?;
    status::parse(&text).map_err(|e| Refused::new(path, format!("can't be understood: {e}")).into())
}

fn sort_parents_first(processes: &mut Vec<Process>, root: Pid) {
    let mut sorted: Vec<Process> = Vec::with_capacity(processes.len());
    let mut rest = std::mem::take(processes);
    rest.sort_by_key(|p| p.pid);
    let mut level = vec![root];
    if let Some(at) = rest.iter().position(|p| p.pid == root) {
        sorted.push(rest.remove(at));
    }
    while !level.is_empty() {
        let (next, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|p| level.contains(&p.parent()));
        level = next.iter().map(|p| p.pid).collect();
        sorted.extend(next);
        rest = others;
    }
    // Reparented while the tree was being stopped, to somebody outside: still ours to free, and
    // told apart by their ppid.
    sorted.extend(rest);
    *processes = sorted;
}

fn not_ours(pid: Pid, tid: Tid) -> Refused {
    Refused::new(format!("pid {pid} tid {tid}"), "ptrace is not permitted (EPERM)")
        .advise("run as the same user or with CAP_SYS_PTRACE; see also /proc/sys/kernel/yama/ptrace_scope")
}
