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

pub mod restore;

use ckpt_proto::types::{CoreEntry, MmEntry, TaskKobjIdsEntry};
use ckpt_remote::Syscalls;
use ckpt_sys::{Pid, Tid, ptrace::Regs};

/// A frozen thread that is to be dumped.
pub struct ThreadInput<'a> {
    /// Its process.
    pub pid: Pid,
    /// The thread.
    pub tid: Tid,
    /// Runs system calls in it.
    pub remote: &'a mut dyn Syscalls,
    /// Its registers as the user state stood, before any remote call.
    pub regs: Regs,
    /// Its signal mask, likewise.
    pub sigmask: u64,
    /// The signal of the group-stop that it was found in.
    pub stopped_by: Option<i32>,
}

/// Refuses processes whose state could not be restored: seccomp, foreign tracers, other namespaces, ...
///
/// # Errors
/// [`ckpt_sys::Refused`] that names what it is; /proc can't be read.
pub fn check(pid: Pid) -> anyhow::Result<()> {
    let _ = pid;
    Ok(())
}

/// The leader's core entry, with everything that belongs to the process. One remote batch.
///
/// # Errors
/// Remote calls, ptrace, /proc; [`ckpt_sys::Refused`] for state that has no place in the images.
pub fn dump_leader(input: ThreadInput<'_>, ids: TaskKobjIdsEntry) -> anyhow::Result<CoreEntry> {
    let _ = (input.pid, ids);
    anyhow::bail!("not yet")
}

/// The core entry of a thread that is not the leader. One remote batch.
///
/// # Errors
/// As [`dump_leader`].
pub fn dump_thread(input: ThreadInput<'_>) -> anyhow::Result<CoreEntry> {
    let _ = input.pid;
    anyhow::bail!("not yet")
}

/// The core entry of a process that has ended and not been waited for.
///
/// # Errors
/// /proc can't be read.
pub fn dump_zombie(pid: Pid) -> anyhow::Result<CoreEntry> {
    let _ = pid;
    anyhow::bail!("not yet")
}

/// An mm entry without its mappings (`vmas`, `aios`) and with `exe_file_id` 0, which the caller fills in.
/// One remote batch in any thread of the process.
///
/// # Errors
/// Remote calls, /proc; [`ckpt_sys::Refused`] for settings that have no place in the images.
pub fn dump_mm_fields(pid: Pid, remote: &mut dyn Syscalls) -> anyhow::Result<MmEntry> {
    let _ = (pid, remote.tid());
    anyhow::bail!("not yet")
}
