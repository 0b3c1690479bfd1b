//! Scheduling of a thread: policy, nice value, real-time priority, processors, timer slack, disk priority.
//!
//! The images of CRIU have fields for the first three; the others are fields of our own, and written
//! only where they differ from what a task has by default.

use ckpt_proc::stat;
use ckpt_proto::types::ThreadCoreEntry;
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    Refused, Tid,
    capability::{self, number::SYS_NICE},
    sched,
};

use super::answers::{Answers, malformed};

/// linux/sched.h
const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_DEADLINE: u32 = 6;
const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;
/// linux/prctl.h
const PR_GET_TIMERSLACK: i32 = 30;
const PR_SET_TIMERSLACK: i32 = 29;
/// Nanoseconds that a task has unless it or an ancestor changed it.
const DEFAULT_SLACK: u64 = 50_000;
/// linux/ioprio.h
const IOPRIO_WHO_PROCESS: u64 = 1;
const IOPRIO_CLASS_SHIFT: u32 = 13;
const IOPRIO_CLASS_RT: u32 = 1;
/// Bytes of a mask of 65,536 processors.
const MAX_MASK: usize = 8192;

pub(super) fn ask(calls: &mut Vec<Call>) {
    calls.push(Call::new("prctl(PR_GET_TIMERSLACK)", libc::SYS_prctl, [PR_GET_TIMERSLACK.into()]));
    let args = [Arg::Val(IOPRIO_WHO_PROCESS), Arg::Val(0)];
    calls.push(Call::new("ioprio_get", libc::SYS_ioprio_get, args).may_fail());
}

fn is_real_time(policy: u32) -> bool {
    [SCHED_FIFO, SCHED_RR].contains(&(policy & !SCHED_RESET_ON_FORK))
}

pub(super) fn read(
    tid: Tid,
    processors: Option<&[u8]>,
    answers: &mut Answers,
    entry: &mut ThreadCoreEntry,
) -> anyhow::Result<()> {
    let policy = sched::policy(tid)?;
    if policy & !SCHED_RESET_ON_FORK == SCHED_DEADLINE {
        return Err(Refused::new(format!("tid {tid}"), "deadline scheduling can't be checkpointed").into());
    }
    entry.sched_nice = Some(sched::nice(tid)?);
    entry.sched_policy = Some(policy);
    entry.sched_prio = if is_real_time(policy) { Some(sched::rt_priority(tid)?) } else { None };
    let slack = answers.value()?;
    entry.ckpt_timerslack_ns = (slack != DEFAULT_SLACK).then_some(slack);
    // Class 0: none was asked for, the nice value decides. Kernels without block devices have no such call.
    let ioprio = answers.result()?.ok().and_then(|v| u32::try_from(v).ok());
    entry.ckpt_ioprio = ioprio.filter(|v| v >> IOPRIO_CLASS_SHIFT != 0);
    let mask = sched::affinity(tid)?;
    entry.ckpt_cpu_mask = (Some(&mask[..]) != processors).then_some(mask);
    Ok(())
}

/// Processors that are there.
pub(super) fn online() -> Option<Vec<u8>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    cpu_list(&text)
}

/// `0-3,8` as a mask.
fn cpu_list(text: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for range in text.trim().split(',').filter(|r| !r.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        for cpu in first..=last.min(1 << 16) {
            if mask.len() <= cpu / 8 {
                mask.resize(cpu / 8 + 1, 0);
            }
            mask[cpu / 8] |= 1 << (cpu % 8);
        }
    }
    Some(mask)
}

/// What the calling process has, and so a task being built: policy and nice value.
fn own() -> (u32, i32) {
    let nice =
        std::fs::read("/proc/thread-self/stat").ok().and_then(|t| stat::parse(&t).ok()).map_or(0, |s| s.nice);
    (sched::policy(Tid(0)).unwrap_or(0), nice)
}

pub(super) fn check(entry: &ThreadCoreEntry) -> anyhow::Result<()> {
    let (policy, nice) = (entry.sched_policy.unwrap_or(0), entry.sched_nice.unwrap_or(0));
    if !(-20..=19).contains(&nice) {
        return Err(malformed(format!("nice value {nice}")));
    }
    if entry.ckpt_cpu_mask.as_ref().is_some_and(|mask| mask.len() > MAX_MASK) {
        return Err(malformed("a processor mask longer than any kernel's"));
    }
    if capability::held(SYS_NICE) {
        return Ok(());
    }
    let what = if is_real_time(policy) {
        format!("real-time policy {policy}")
    } else if nice < own().1 {
        format!("nice value {nice}")
    } else if entry.ckpt_ioprio.is_some_and(|v| v >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT) {
        "real-time disk priority".to_owned()
    } else {
        return Ok(());
    };
    Err(Refused::new(what, "needs CAP_SYS_NICE")
        .advise("run ckpt-restore as root or with that capability")
        .into())
}

pub(super) fn restore(entry: &ThreadCoreEntry) -> Vec<Call> {
    let mut calls = Vec::new();
    let (own_policy, own_nice) = own();
    let changed = |&policy: &u32| policy != own_policy || is_real_time(policy);
    if let Some(policy) = entry.sched_policy.filter(changed) {
        let priority = if is_real_time(policy) { entry.sched_prio.unwrap_or(1) } else { 0 };
        let args = [Arg::Val(0), Arg::Val(policy.into()), Arg::In(priority.to_le_bytes().to_vec())];
        calls.push(Call::new(
            format!("sched_setscheduler(policy {policy})"),
            libc::SYS_sched_setscheduler,
            args,
        ));
    }
    if let Some(nice) = entry.sched_nice.filter(|&n| n != own_nice) {
        let args = [Arg::Val(0), Arg::Val(0), nice.into()];
        calls.push(Call::new(format!("setpriority({nice})"), libc::SYS_setpriority, args));
    }
    if let Some(slack) = entry.ckpt_timerslack_ns {
        let args = [PR_SET_TIMERSLACK.into(), Arg::Val(slack)];
        calls.push(Call::new("prctl(PR_SET_TIMERSLACK)", libc::SYS_prctl, args));
    }
    if let Some(ioprio) = entry.ckpt_ioprio {
        let args = [Arg::Val(IOPRIO_WHO_PROCESS), Arg::Val(0), Arg::Val(ioprio.into())];
        calls.push(Call::new(format!("ioprio_set({ioprio:#x})"), libc::SYS_ioprio_set, args));
    }
    if let Some(mask) = &entry.ckpt_cpu_mask {
        // The mask is of the machine where the task was; here those processors may not exist.
        let mut mask = mask.clone();
        mask.resize(mask.len().next_multiple_of(8), 0);
        let len = u64::try_from(mask.len()).unwrap_or(0);
        let args = [Arg::Val(0), Arg::Val(len), Arg::In(mask)];
        calls.push(Call::new("sched_setaffinity", libc::SYS_sched_setaffinity, args).may_fail());
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::selfcall;

    fn dump_self() -> ThreadCoreEntry {
        let mut calls = Vec::new();
        ask(&mut calls);
        let mut answers = Answers::run(&mut Own, calls).unwrap();
        let mut entry = ThreadCoreEntry::default();
        read(Tid(nix::unistd::gettid().as_raw()), online().as_deref(), &mut answers, &mut entry).unwrap();
        entry
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-1\n"), Some(vec![3]));
        assert_eq!(cpu_list("0,2-3,15"), Some(vec![0b1101, 0x80]));
        assert_eq!(cpu_list("a-b"), None);
    }

    #[test]
    fn batch_policy_niceness_slack_and_processors_come_back() {
        let _forking = crate::descriptors::forking();
        let code = selfcall::in_child(|| {
            let want = ThreadCoreEntry {
                sched_nice: Some(7),
                sched_policy: Some(3 | SCHED_RESET_ON_FORK),
                ckpt_timerslack_ns: Some(77),
                ckpt_cpu_mask: Some(vec![1]),
                ckpt_ioprio: Some(2 << IOPRIO_CLASS_SHIFT | 6),
                ..Default::default()
            };
            Own.run(&restore(&want)).unwrap();
            assert_eq!(dump_self(), want);
            0
        });
        assert_eq!(code, Some(0));
    }
}
