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

use std::fs;

use anyhow::Context;
use ckpt_proto::types::{CoreEntry, MmEntry, TaskCoreEntry};
use ckpt_remote::Call;
use ckpt_sys::{Pid, Refused, RemoteAddr, Tid, ptrace::Regs};

use super::{DEAD, STOPPED, answers::malformed, creds, limits, misc, mm, regs, sched, signals, timers};

/// Refuses what this machine or this process's privileges can't give: limits above the own hard limit,
/// capabilities not held, processor state that this processor lacks; and malformed entries.
///
/// # Errors
/// [`ckpt_sys::Refused`], or what is wrong with the entry.
pub fn check(core: &CoreEntry) -> anyhow::Result<()> {
    if let Some(tc) = &core.tc {
        if tc.task_state == DEAD {
            return Ok(());
        }
        process(tc)?;
    }
    let thread = core.thread_core.as_ref().ok_or_else(|| malformed("no thread_core"))?;
    sched::check(thread)?;
    if let Some(creds) = &thread.creds {
        creds::check(creds)?;
    }
    if let Some(queue) = &thread.signals_p {
        signals::check_queue(queue)?;
    }
    if core.tc.is_none() {
        thread.blk_sigset.ok_or_else(|| malformed("a thread without its signal mask"))?;
    }
    regs::restore(core)?;
    regs::restore_xstate(core)?;
    Ok(())
}

fn process(tc: &TaskCoreEntry) -> anyhow::Result<()> {
    if let Some(rlimits) = &tc.rlimits {
        limits::check(rlimits)?;
    }
    if let Some(timers) = &tc.timers {
        timers::check(timers)?;
    }
    if let Some(queue) = &tc.signals_s {
        signals::check_queue(queue)?;
    }
    if tc.old_seccomp_mode.unwrap_or(0) != 0 {
        let reason = "is confined by seccomp in the way of old images, which can't be restored";
        return Err(Refused::new("the process", reason).into());
    }
    Ok(())
}

/// Once per process, after memory and descriptors are in place: limits, signal handlers, personality,
/// subreaper, membarrier registrations.
#[must_use]
pub fn process_calls(core: &CoreEntry) -> Vec<Call> {
    let Some(tc) = &core.tc else { return Vec::new() };
    let mut calls = Vec::new();
    calls.extend(tc.rlimits.iter().flat_map(limits::restore));
    calls.extend(signals::restore_actions(&tc.sigactions));
    calls.push(misc::restore_personality(tc.personality));
    calls.push(misc::restore_subreaper(tc.child_subreaper == Some(true)));
    calls.extend(misc::restore_membarrier(tc.membarrier_registration_mask.unwrap_or(0)));
    calls
}

/// In each thread: name, alternate stack, robust list, rseq, tid address, scheduling.
#[must_use]
pub fn thread_calls(core: &CoreEntry) -> Vec<Call> {
    let Some(thread) = &core.thread_core else { return Vec::new() };
    let mut calls = regs::restore_tls(core);
    let comm = thread.comm.as_ref().or(core.tc.as_ref().map(|tc| &tc.comm));
    calls.extend(comm.map(|c| misc::restore_comm(c)));
    calls.extend(thread.sas.as_ref().and_then(signals::restore_altstack));
    calls.extend(misc::restore_robust_list(thread.futex_rla));
    calls.extend(thread.rseq_entry.as_ref().and_then(misc::restore_rseq));
    calls.extend(core.thread_info.as_ref().map(|t| misc::restore_tid_address(t.clear_tid_addr)));
    calls.extend(sched::restore(thread));
    calls
}

/// Once per process, when all its threads exist: interval timers and POSIX timers.
#[must_use]
pub fn timer_calls(core: &CoreEntry) -> Vec<Call> {
    core.tc.iter().filter_map(|tc| tc.timers.as_ref()).flat_map(timers::restore).collect()
}

/// In each thread, with all signals blocked: puts pending signals back, the process's by the leader.
#[must_use]
pub fn pending_calls(core: &CoreEntry, pid: Pid, tid: Tid, leader: bool) -> Vec<Call> {
    let private = core.thread_core.as_ref().and_then(|t| t.signals_p.as_ref());
    let shared = core.tc.as_ref().and_then(|tc| tc.signals_s.as_ref()).filter(|_| leader);
    let mut calls: Vec<Call> =
        private.iter().flat_map(|q| signals::restore_queue(q, pid, Some(tid))).collect();
    calls.extend(shared.iter().flat_map(|q| signals::restore_queue(q, pid, None)));
    calls
}

/// In each thread, last: user and group ids, capabilities, securebits, no_new_privs, parent-death signal.
#[must_use]
pub fn creds_calls(core: &CoreEntry) -> Vec<Call> {
    let Some(thread) = &core.thread_core else { return Vec::new() };
    let mut calls: Vec<Call> = thread.creds.iter().flat_map(creds::restore).collect();
    calls.extend(thread.pdeath_sig.map(misc::restore_pdeathsig));
    calls
}

/// In the leader after every thread's [`creds_calls`]: changes of credentials reset this setting.
#[must_use]
pub fn dumpable_calls(mm: &MmEntry) -> Vec<Call> {
    mm::restore_dumpable(mm).into_iter().collect()
}

/// From outside: what core dumps hold, the OOM killer's adjustment. The login uid stays that of `ckpt-restore`: an audit trail
/// should lead to whoever started the restored task, and a process may set none but its own.
///
/// # Errors
/// [`ckpt_sys::Refused`] without the privilege to lower it.
pub fn outside(pid: Pid, core: &CoreEntry) -> anyhow::Result<()> {
    if let Some(filter) = core.tc.as_ref().and_then(|tc| tc.ckpt_coredump_filter) {
        misc::restore_coredump_filter(pid, filter)?;
    }
    let Some(wanted) = core.tc.as_ref().and_then(|tc| tc.oom_score_adj) else { return Ok(()) };
    let path = format!("/proc/{pid}/oom_score_adj");
    if misc::number_if_any(&path)? == Some(wanted) {
        return Ok(());
    }
    match fs::write(&path, wanted.to_string()) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            let reason = format!("can't be lowered to {wanted} without CAP_SYS_RESOURCE");
            Err(Refused::new(path, reason)
                .advise(format!(
                    "start ckpt-restore with that value already (choom -n {wanted} -- ckpt-restore ...)"
                ))
                .into())
        }
        other => other.context(path),
    }
}

/// The auxiliary vector that `/proc/PID/auxv` is to show: bytes for [`mm_calls`].
#[must_use]
pub fn auxv_bytes(mm: &MmEntry) -> Vec<u8> {
    mm::auxv_bytes(mm)
}

/// Once per address space: where code, heap, stack, arguments are, which file is the executable
/// (`exe_fd`, a descriptor in the task; nothing of the previous executable may still be mapped), huge pages.
///
/// The kernel's argument holds a pointer to the auxiliary vector: the caller has placed [`auxv_bytes`]
/// in the task's memory at `auxv_at` (scratch memory, free again after the calls; at most 1024 bytes).
#[must_use]
pub fn mm_calls(mm: &MmEntry, exe_fd: i32, auxv_at: RemoteAddr) -> Vec<Call> {
    mm::restore(mm, exe_fd, auxv_at)
}

/// General registers for PTRACE_SETREGS.
///
/// # Errors
/// The entry holds none.
pub fn regs(core: &CoreEntry) -> anyhow::Result<Regs> {
    regs::restore(core)
}

/// Extended state for PTRACE_SETREGSET(NT_X86_XSTATE).
///
/// # Errors
/// The entry is malformed; [`ckpt_sys::Refused`] for state that this processor lacks.
pub fn xstate(core: &CoreEntry) -> anyhow::Result<Vec<u8>> {
    regs::restore_xstate(core)
}

/// Blocked signals, bit n-1 for signal n.
#[must_use]
pub fn sigmask(core: &CoreEntry) -> u64 {
    let process = core.tc.as_ref().map(|tc| tc.blk_sigset);
    process.or(core.thread_core.as_ref().and_then(|t| t.blk_sigset)).unwrap_or(0)
}

/// The stop signal to send when all is in place, for a process that was stopped.
#[must_use]
pub fn stop_signal(core: &CoreEntry) -> Option<i32> {
    let tc = core.tc.as_ref()?;
    if tc.task_state == STOPPED {
        return Some(tc.stop_signo.map_or(libc::SIGSTOP, u32::cast_signed));
    }
    let private = core.thread_core.as_ref().and_then(|t| t.signals_p.as_ref());
    [tc.signals_s.as_ref(), private].into_iter().flatten().any(signals::holds_stop).then_some(libc::SIGSTOP)
}
