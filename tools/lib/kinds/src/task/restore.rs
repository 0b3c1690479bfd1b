//! The lists of calls that `ckpt-restore` has the tasks run on themselves, and what it does to them
//! from outside, in the order in which they are to be used:
//!
//! 1. [`check`] on every core entry, before anything is made.
//! 2. Address space, memory and descriptors are in place (limits would get in the way of making them):
//!    [`mm_calls`] once per address space.
//! 3. [`process_calls`] in the leader, [`thread_calls`] in every thread, [`outside`] per process.
//! 4. [`timer_calls`] in the leader when all threads exist.
//! 5. With every signal blocked: [`pending_calls`] in every thread.
//! 6. [`creds_calls`] in every thread; then, when all threads have theirs, [`dumpable_calls`] in the leader.
//! 7. By ptrace: [`regs`], [`xstate`], [`sigmask`]; [`stop_signal`] says whether the process starts stopped.
//!
//! The lists compare with the calling process where that spares a privilege: tasks being built have
//! its credentials, limits and personality until they run these calls.

use ckpt_proto::types::{CoreEntry, MmEntry};
use ckpt_remote::Call;
use ckpt_sys::{Pid, RemoteAddr, Tid, ptrace::Regs};

/// Refuses what this machine or this process's privileges can't give: limits above the own hard limit,
/// capabilities not held, processor state that this processor lacks; and malformed entries.
///
/// # Errors
/// [`ckpt_sys::Refused`], or what is wrong with the entry.
pub fn check(core: &CoreEntry) -> anyhow::Result<()> {
    let _ = core;
    Ok(())
}

/// Once per process, after memory and descriptors are in place: limits, signal handlers, personality,
/// subreaper, membarrier registrations.
#[must_use]
pub fn process_calls(core: &CoreEntry) -> Vec<Call> {
    let _ = core;
    Vec::new()
}

/// In each thread: name, alternate stack, robust list, rseq, tid address, scheduling.
#[must_use]
pub fn thread_calls(core: &CoreEntry) -> Vec<Call> {
    let _ = core;
    Vec::new()
}

/// Once per process, when all its threads exist: interval timers and POSIX timers.
#[must_use]
pub fn timer_calls(core: &CoreEntry) -> Vec<Call> {
    let _ = core;
    Vec::new()
}

/// In each thread, with all signals blocked: puts pending signals back, the process's by the leader.
#[must_use]
pub fn pending_calls(core: &CoreEntry, pid: Pid, tid: Tid, leader: bool) -> Vec<Call> {
    let _ = (core, pid, tid, leader);
    Vec::new()
}

/// In each thread, last: user and group ids, capabilities, securebits, no_new_privs, parent-death signal.
#[must_use]
pub fn creds_calls(core: &CoreEntry) -> Vec<Call> {
    let _ = core;
    Vec::new()
}

/// In the leader after every thread's [`creds_calls`]: changes of credentials reset this setting.
#[must_use]
pub fn dumpable_calls(mm: &MmEntry) -> Vec<Call> {
    let _ = mm;
    Vec::new()
}

/// From outside: the OOM killer's adjustment.
///
/// # Errors
/// [`ckpt_sys::Refused`] without the privilege to lower it.
pub fn outside(pid: Pid, core: &CoreEntry) -> anyhow::Result<()> {
    let _ = (pid, core);
    Ok(())
}

/// The auxiliary vector that `/proc/PID/auxv` is to show: bytes for [`mm_calls`].
#[must_use]
pub fn auxv_bytes(mm: &MmEntry) -> Vec<u8> {
    let _ = mm;
    Vec::new()
}

/// Once per address space: where code, heap, stack, arguments are, which file is the executable
/// (`exe_fd`, a descriptor in the task; nothing of the previous executable may still be mapped), huge pages.
///
/// The kernel's argument holds a pointer to the auxiliary vector: the caller has placed [`auxv_bytes`]
/// in the task's memory at `auxv_at` (scratch memory, free again after the calls; at most 1024 bytes).
#[must_use]
pub fn mm_calls(mm: &MmEntry, exe_fd: i32, auxv_at: RemoteAddr) -> Vec<Call> {
    let _ = (mm, exe_fd, auxv_at);
    Vec::new()
}

/// General registers for PTRACE_SETREGS.
///
/// # Errors
/// The entry holds none.
pub fn regs(core: &CoreEntry) -> anyhow::Result<Regs> {
    let _ = core;
    anyhow::bail!("not yet")
}

/// Extended state for PTRACE_SETREGSET(NT_X86_XSTATE).
///
/// # Errors
/// The entry is malformed; [`ckpt_sys::Refused`] for state that this processor lacks.
pub fn xstate(core: &CoreEntry) -> anyhow::Result<Vec<u8>> {
    let _ = core;
    anyhow::bail!("not yet")
}

/// Blocked signals, bit n-1 for signal n.
#[must_use]
pub fn sigmask(core: &CoreEntry) -> u64 {
    let _ = core;
    0
}

/// The stop signal to send when all is in place, for a process that was stopped.
#[must_use]
pub fn stop_signal(core: &CoreEntry) -> Option<i32> {
    let _ = core;
    None
}
