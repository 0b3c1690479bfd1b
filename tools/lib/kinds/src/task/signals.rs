//! Signals: handlers, the alternate stack, and what is pending.
//!
//! Handlers and the alternate stack are asked for and set by the task itself. Pending signals are read
//! by ptrace without being taken (PTRACE_PEEKSIGINFO) and put back by the task itself: only to
//! oneself may a signal be sent with the siginfo of one that the kernel made (rt_sigqueueinfo(2)).

use ckpt_proto::types::{CoreEntry, SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Tid, ptrace};

use super::answers::{Answers, malformed, u32_at, u64_at, words};

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
        if info.siginfo.len() != SIGINFO {
            return Err(malformed(format!(
                "a pending signal of {} bytes, not {SIGINFO}",
                info.siginfo.len()
            )));
        }
        let signal = number(info);
        if !(1..=64).contains(&signal) {
            return Err(malformed(format!("a pending signal with the number {signal}")));
        }
    }
    Ok(())
}

/// Whether SIGSTOP is among them: it can't be blocked, so it is not put back but sent at the end.
pub(super) fn holds_stop(queue: &SignalQueueEntry) -> bool {
    queue.signals.iter().any(|i| number(i) == libc::SIGSTOP)
}

/// Whether a signal waits in the entry's queues that the thread does not block.
pub(super) fn deliverable(core: &CoreEntry) -> bool {
    let blocked = super::restore::sigmask(core);
    let shared = core.tc.as_ref().and_then(|tc| tc.signals_s.as_ref());
    let own = core.thread_core.as_ref().and_then(|t| t.signals_p.as_ref());
    let waiting = [shared, own].into_iter().flatten().flat_map(|queue| &queue.signals).map(number);
    waiting.filter(|n| (1..=64).contains(n)).any(|n| blocked & (1 << (n - 1)) == 0)
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

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::{
        ptrace::{Stop, wait},
        selfcall,
    };
    use nix::sys::signal::{SigSet, Signal, kill, raise};

    #[test]
    fn handlers_and_alternate_stack_come_back() {
        let _forking = crate::descriptors::forking();
        let code = selfcall::in_child(|| {
            let dump = || {
                let mut calls = Vec::new();
                ask_actions(&mut calls);
                ask_altstack(&mut calls);
                let mut answers = Answers::run(&mut Own, calls).unwrap();
                (read_actions(&mut answers).unwrap(), read_altstack(&mut answers).unwrap())
            };
            let (mut want, _) = dump();
            assert_eq!(want.len(), 62);
            // SA_RESTORER | SA_SIGINFO, as glibc has it; the addresses are never jumped to.
            let handler = SaEntry {
                sigaction: 0x1234_5678_9000,
                flags: 0x0400_0004,
                restorer: 0x1000,
                mask: 0xf0,
                compat_sigaction: Some(false),
                mask_extended: None,
            };
            want[8] = handler; // SIGUSR1: entries skip SIGKILL
            want[61] = SaEntry { mask: 1 << 63, ..handler };
            want[12] = SaEntry { sigaction: 1, flags: 0, restorer: 0, mask: 0, ..handler };
            let stack = ThreadSasEntry { ss_sp: 0x7000_0000_0000, ss_size: 65536, ss_flags: 1 << 31 };
            let mut calls = restore_actions(&want);
            calls.extend(restore_altstack(&stack));
            Own.run(&calls).unwrap();
            let found = dump();
            Own.run(&restore_actions(&vec![SaEntry { sigaction: 0, flags: 0, ..handler }; 62])).unwrap();
            assert_eq!(found, (want, stack));
            0
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn entries_skip_kill_and_stop() {
        let order: Vec<i32> = catchable().collect();
        assert_eq!((order[7], order[8], order[16], order[17], order[61]), (8, 10, 18, 20, 64));
    }

    #[test]
    fn queues_come_back_in_order_with_their_origin() {
        fn siginfo(signal: i32, code: i32, value: u64) -> SiginfoEntry {
            let mut info = vec![0; SIGINFO];
            info[..4].copy_from_slice(&signal.to_le_bytes());
            info[8..12].copy_from_slice(&code.to_le_bytes());
            info[16..20].copy_from_slice(&4711_i32.to_le_bytes());
            info[24..32].copy_from_slice(&value.to_le_bytes());
            SiginfoEntry { siginfo: info }
        }
        // From a child that exited (SIGCHLD, CLD_EXITED), from sigqueue(3) twice, from kill(2).
        let shared = SignalQueueEntry {
            signals: vec![siginfo(17, 1, 0), siginfo(40, -1, 7), siginfo(40, -1, 6), siginfo(10, 0, 0)],
        };
        let private = SignalQueueEntry { signals: vec![siginfo(12, -6, 0), siginfo(11, 1, 0x1000)] };
        check_queue(&shared).unwrap();
        let (s, p) = (shared.clone(), private.clone());
        let _forking = crate::descriptors::forking();
        let pid = selfcall::spawn(move || {
            selfcall::trace_me();
            SigSet::all().thread_block().unwrap();
            let own = nix::unistd::getpid().as_raw();
            Own.run(&restore_queue(&p, Pid(own), Some(Tid(own)))).unwrap();
            Own.run(&restore_queue(&s, Pid(own), None)).unwrap();
            raise(Signal::SIGSTOP).unwrap();
            0
        });
        assert_eq!(wait(pid.leader(), false).unwrap(), Some(Stop::Signal(libc::SIGSTOP)));
        let found = (dump_queue(pid.leader(), true).unwrap(), dump_queue(pid.leader(), false).unwrap());
        kill(pid.nix(), Signal::SIGKILL).unwrap();
        wait(pid.leader(), false).unwrap();
        assert_eq!(found, (shared, private));
    }

    #[test]
    fn malformed_queues_are_errors() {
        let queue = |siginfo| SignalQueueEntry { signals: vec![SiginfoEntry { siginfo }] };
        assert!(check_queue(&queue(vec![1; 127])).is_err());
        assert!(check_queue(&queue(vec![0; 128])).is_err());
        assert!(check_queue(&queue(vec![65; 128])).is_err());
        // Neither can wait in a queue.
        let mut stop = vec![0; SIGINFO];
        stop[0] = 19;
        assert!(restore_queue(&queue(stop.clone()), Pid(1), None).is_empty() && holds_stop(&queue(stop)));
    }
}
