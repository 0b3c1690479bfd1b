//! Signals: handlers, the alternate stack, and what is pending.
//!
//! Handlers and the alternate stack are asked for and set by the task itself. Pending signals are read
//! by ptrace without being taken (PTRACE_PEEKSIGINFO) and put back by the task itself: only to
//! oneself may a signal be sent with the siginfo of one that the kernel made (rt_sigqueueinfo(2)).

use anyhow::{Context, ensure};
use ckpt_proto::types::{SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Tid, ptrace};

use super::answers::{Answers, u32_at, u64_at, words};

/// Bytes of a siginfo_t.
const SIGINFO: usize = 128;
const SS_ONSTACK: u32 = 1;
const SS_DISABLE: u32 = 2;

/// Signals with a handler that can be changed, in the order of the images.
fn catchable() -> impl Iterator<Item = i32> {
    (1..=64).filter(|&s| s != libc::SIGKILL && s != libc::SIGSTOP)
}

pub(super) fn ask_actions(calls: &mut Vec<Call>) {
    for signal in catchable() {
        let args = [signal.into(), Arg::Val(0), Arg::Out(32), Arg::Val(8)];
        calls.push(Call::new(format!("rt_sigaction(signal {signal})"), libc::SYS_rt_sigaction, args));
    }
}

pub(super) fn read_actions(answers: &mut Answers) -> anyhow::Result<Vec<SaEntry>> {
    catchable()
        .map(|_| {
            let act = answers.bytes()?;
            Ok(SaEntry {
                sigaction: u64_at(&act, 0),
                flags: u64_at(&act, 8),
                restorer: u64_at(&act, 16),
                mask: u64_at(&act, 24),
                compat_sigaction: Some(false),
                mask_extended: None,
            })
        })
        .collect()
}

pub(super) fn restore_actions(actions: &[SaEntry]) -> Vec<Call> {
    let set = |(signal, sa): (i32, &SaEntry)| {
        let act = words(&[sa.sigaction, sa.flags, sa.restorer, sa.mask]);
        let args = [signal.into(), Arg::In(act), Arg::Val(0), Arg::Val(8)];
        Call::new(format!("rt_sigaction(signal {signal})"), libc::SYS_rt_sigaction, args)
    };
    catchable().zip(actions).map(set).collect()
}

pub(super) fn ask_altstack(calls: &mut Vec<Call>) {
    calls.push(Call::new("sigaltstack", libc::SYS_sigaltstack, [Arg::Val(0), Arg::Out(24)]));
}

pub(super) fn read_altstack(answers: &mut Answers) -> anyhow::Result<ThreadSasEntry> {
    let stack = answers.bytes()?;
    // SS_ONSTACK would tell where the remote call ran, not where the thread was.
    let flags = u32_at(&stack, 8) & !SS_ONSTACK;
    Ok(ThreadSasEntry { ss_sp: u64_at(&stack, 0), ss_size: u64_at(&stack, 16), ss_flags: flags })
}

pub(super) fn restore_altstack(sas: &ThreadSasEntry) -> Option<Call> {
    let flags = sas.ss_flags & !SS_ONSTACK;
    (flags & SS_DISABLE == 0).then(|| {
        let stack = words(&[sas.ss_sp, u64::from(flags), sas.ss_size]);
        Call::new("sigaltstack", libc::SYS_sigaltstack, [Arg::In(stack), Arg::Val(0)])
    })
}

/// What is pending for the thread, or with `shared` for its process.
pub(super) fn dump_queue(tid: Tid, shared: bool) -> anyhow::Result<SignalQueueEntry> {
    let signals = ptrace::pending_signals(tid, shared)?;
    Ok(SignalQueueEntry {
        signals: signals.into_iter().map(|i| SiginfoEntry { siginfo: i.to_vec() }).collect(),
    })
}

/// The signal's number.
fn number(info: &SiginfoEntry) -> i32 {
    u32_at(&info.siginfo, 0).cast_signed()
}

pub(super) fn check_queue(queue: &SignalQueueEntry) -> anyhow::Result<()> {
    for info in &queue.signals {
        ensure!(
            info.siginfo.len() == SIGINFO,
            "a pending signal has {} bytes instead of {SIGINFO}",
            info.siginfo.len()
        );
        let signal = number(info);
        ensure!((1..=64).contains(&signal), "a pending signal has the number {signal}");
    }
    Ok(())
}

/// Whether SIGSTOP is among them: it can't be blocked, so it is not put back but sent at the end.
pub(super) fn holds_stop(queue: &SignalQueueEntry) -> bool {
    queue.signals.iter().any(|i| number(i) == libc::SIGSTOP)
}

/// Puts signals back; all must be blocked. SIGKILL (the task was about to die) and SIGSTOP can't wait
/// in a queue and are left out.
pub(super) fn restore_queue(queue: &SignalQueueEntry, pid: Pid, thread: Option<Tid>) -> Vec<Call> {
    let send = |info: &SiginfoEntry| {
        let signal = number(info);
        let mut bytes = info.siginfo.clone();
        bytes.resize(SIGINFO, 0);
        match thread {
            Some(tid) => {
                let args = [pid.0.into(), tid.0.into(), signal.into(), Arg::In(bytes)];
                Call::new(format!("rt_tgsigqueueinfo(signal {signal})"), libc::SYS_rt_tgsigqueueinfo, args)
            }
            None => {
                let args = [pid.0.into(), signal.into(), Arg::In(bytes)];
                Call::new(format!("rt_sigqueueinfo(signal {signal})"), libc::SYS_rt_sigqueueinfo, args)
            }
        }
    };
    let can_wait = |info: &&SiginfoEntry| ![libc::SIGKILL, libc::SIGSTOP].contains(&number(info));
    queue.signals.iter().filter(can_wait).map(send).collect()
}

/// The mask in an image entry's field, checked to be there.
pub(super) fn mask_of(mask: Option<u64>) -> anyhow::Result<u64> {
    mask.context("the thread's signal mask is missing")
}
