//! What a task is besides its memory and files: registers, signals, timers, credentials, limits,
//! scheduling.
//!
//! The kernel tells most of it to anybody who may trace the task: `/proc/PID` and ptrace(2). What is
//! left (signal handlers, timers, the alternate stack, some prctl(2) settings) only the task itself can
//! ask for, and only the task itself can set nearly all of it again. So both directions are lists of
//! [`ckpt_remote::Call`]s: on dump one batch per thread, whose answers are put together with what was
//! read from outside; on restore lists that the task being built runs, see [`restore`].
//!
//! Each module holds one piece of state, dump and restore side by side.

mod answers;
mod check;
mod creds;
mod limits;
mod misc;
mod mm;
mod regs;
pub mod restore;
mod sched;
pub mod seccomp;
#[cfg(test)]
mod selfcalls;
mod signals;
#[cfg(test)]
mod tests;
mod timers;

use ckpt_proc::{stat::Stat, status::Status};
use ckpt_proto::types::{CoreEntry, MmEntry, TaskCoreEntry, ThreadCoreEntry, ThreadInfoX86, core_entry};
use ckpt_remote::{Process, Syscalls};
use ckpt_sys::{Pid, Tid, ptrace, ptrace::Regs};

use answers::Answers;

/// `task_core_entry.task_state`
const ALIVE: u32 = 1;
const DEAD: u32 = 2;
const STOPPED: u32 = 3;

/// A frozen thread that is to be dumped.
pub struct ThreadInput<'a> {
    /// Its process.
    pub pid: Pid,
    /// The thread.
    pub tid: Tid,
    /// Runs system calls in it.
    pub remote: &'a mut dyn Syscalls,
    /// Its registers as the user state stood, before any remote call; moved to the abort handler if
    /// it was inside a restartable sequence ([`ckpt_sys::rseq::abort_address`]).
    pub regs: Regs,
    /// Its signal mask, likewise.
    pub sigmask: u64,
    /// The signal of the group-stop that it was found in.
    pub stopped_by: Option<i32>,
    /// `/proc/PID/stat` of its process.
    pub stat: &'a Stat,
    /// Its own `status`.
    pub status: &'a Status,
    /// [`processors`], read once for all.
    pub processors: Option<&'a [u8]>,
}

/// The processors that are there, as a mask: what a task may use unless it was restricted.
#[must_use]
pub fn processors() -> Option<Vec<u8>> {
    sched::online()
}

/// Refuses processes whose state could not be restored: kernel threads, strict seccomp, foreign tracers, other
/// namespaces, shadow stacks, unusual exit signals. Looks at all threads.
///
/// # Errors
/// [`ckpt_sys::Refused`] that names what it is; /proc can't be read.
pub fn check(process: &Process) -> anyhow::Result<()> {
    check::check(process)
}

/// The leader's core entry, with everything that belongs to the process, and the mm entry without its mappings
/// (`vmas`, `aios`) and with `exe_file_id` 0, which the caller fills in. One remote batch.
///
/// # Errors
/// Remote calls, ptrace, /proc; [`ckpt_sys::Refused`] for state that has no place in the images.
pub fn dump_leader(input: ThreadInput<'_>) -> anyhow::Result<(CoreEntry, MmEntry)> {
    let (pid, remote) = (input.pid, &mut *input.remote);
    let posix_timers = timers::list(pid)?;
    let mut calls = Vec::new();
    signals::ask_actions(&mut calls);
    timers::ask(&posix_timers, &mut calls);
    misc::ask_process(&mut calls);
    mm::ask(&mut calls);
    ask_thread(&mut calls);
    let mut answers = Answers::run(remote, calls)?;
    let sigactions = signals::read_actions(&mut answers)?;
    let timers = timers::read(&posix_timers, &mut answers)?;
    let process = misc::read_process(&mut answers)?;
    let mm = mm::read(pid, input.stat, &mut answers)?;
    let (thread_info, thread_core) = read_thread(&input, &mut answers)?;
    let tc = TaskCoreEntry {
        task_state: if input.stopped_by.is_some() { STOPPED } else { ALIVE },
        exit_code: 0,
        personality: process.personality,
        flags: input.stat.flags,
        blk_sigset: input.sigmask,
        comm: input.status.name.clone(),
        timers: Some(timers),
        rlimits: Some(limits::dump(pid)?),
        signals_s: Some(signals::dump_queue(input.tid, true)?),
        loginuid: misc::number_if_any(&format!("/proc/{pid}/loginuid"))?,
        oom_score_adj: misc::number_if_any(&format!("/proc/{pid}/oom_score_adj"))?,
        sigactions,
        child_subreaper: Some(process.subreaper),
        stop_signo: input.stopped_by.map(i32::cast_unsigned),
        membarrier_registration_mask: process.membarrier,
        ckpt_coredump_filter: misc::coredump_filter(pid)?,
        ..Default::default()
    };
    let core = CoreEntry {
        mtype: core_entry::March::X8664.into(),
        thread_info: Some(thread_info),
        tc: Some(tc),
        ids: None,
        thread_core: Some(thread_core),
    };
    Ok((core, mm))
}

/// The core entry of a thread that is not the leader. One remote batch.
///
/// # Errors
/// As [`dump_leader`].
pub fn dump_thread(input: ThreadInput<'_>) -> anyhow::Result<CoreEntry> {
    let mut calls = Vec::new();
    ask_thread(&mut calls);
    let mut answers = Answers::run(&mut *input.remote, calls)?;
    let (thread_info, mut thread_core) = read_thread(&input, &mut answers)?;
    thread_core.blk_sigset = Some(input.sigmask);
    Ok(CoreEntry {
        mtype: core_entry::March::X8664.into(),
        thread_info: Some(thread_info),
        tc: None,
        ids: None,
        thread_core: Some(thread_core),
    })
}

fn ask_thread(calls: &mut Vec<ckpt_remote::Call>) {
    misc::ask_thread(calls);
    signals::ask_altstack(calls);
    creds::ask(calls);
    sched::ask(calls);
}

fn read_thread(
    input: &ThreadInput<'_>,
    answers: &mut Answers,
) -> anyhow::Result<(ThreadInfoX86, ThreadCoreEntry)> {
    let tid = input.tid;
    let (tid_address, pdeath_sig) = misc::read_thread(tid, answers)?;
    let (robust_list, robust_len) = ptrace::robust_list(tid)?;
    let mut core = ThreadCoreEntry {
        futex_rla: robust_list,
        futex_rla_len: u32::try_from(robust_len)?,
        sas: Some(signals::read_altstack(answers)?),
        pdeath_sig,
        signals_p: Some(signals::dump_queue(tid, false)?),
        creds: Some(creds::read(input.status, answers)?),
        comm: Some(input.status.name.clone()),
        rseq_entry: misc::rseq(tid)?,
        ..Default::default()
    };
    sched::read(tid, input.processors, answers, &mut core)?;
    Ok((regs::dump(tid, &input.regs, tid_address)?, core))
}

/// The core entry of a process that has ended and not been waited for.
#[must_use]
pub fn dump_zombie(stat: &Stat) -> CoreEntry {
    let tc = TaskCoreEntry {
        task_state: DEAD,
        exit_code: stat.exit_code.cast_unsigned(),
        flags: stat.flags,
        comm: stat.comm.clone(),
        ..Default::default()
    };
    CoreEntry { mtype: core_entry::March::X8664.into(), tc: Some(tc), ..Default::default() }
}
