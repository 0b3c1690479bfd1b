//! Resource limits, in the order of their numbers.
//!
//! Read from `/proc/PID/limits`: prlimit(2) on another user's task needs CAP_SYS_RESOURCE. For the same
//! reason they are set by the task itself, and before its credentials, so that only hard limits above
//! `ckpt-restore`'s own are out of reach.

use anyhow::Context;
use ckpt_proc::limits::{self, INFINITY, RESOURCES};
use ckpt_proto::types::{RlimitEntry, TaskRlimitsEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    Pid, Refused,
    capability::{self, number::SYS_RESOURCE},
    procfs,
};

use super::answers::words;

pub(super) fn dump(pid: Pid) -> anyhow::Result<TaskRlimitsEntry> {
    let path = format!("/proc/{pid}/limits");
    let text = procfs::read(&path).with_context(|| path.clone())?;
    let limits = limits::parse(&text).context(path)?;
    Ok(TaskRlimitsEntry {
        rlimits: limits.iter().map(|l| RlimitEntry { cur: l.soft, max: l.hard }).collect(),
    })
}

pub(super) fn check(entry: &TaskRlimitsEntry) -> anyhow::Result<()> {
    if capability::held(SYS_RESOURCE) {
        return Ok(());
    }
    let text = std::fs::read("/proc/self/limits").context("/proc/self/limits")?;
    let own = limits::parse(&text)?;
    check_against(entry, &own)
}

fn check_against(entry: &TaskRlimitsEntry, own: &[limits::Limit; 16]) -> anyhow::Result<()> {
    for ((want, own), (_, name)) in entry.rlimits.iter().zip(own).zip(RESOURCES) {
        if want.max > own.hard {
            let number = |n| if n == INFINITY { "unlimited".to_owned() } else { format!("{n}") };
            let (want, own) = (number(want.max), number(own.hard));
            let reason = format!("the task's hard limit {want} is above this process's own, {own}");
            let option = name.trim_start_matches("RLIMIT_").to_lowercase();
            return Err(Refused::new(name, reason)
                .advise(format!(
                    "raise it first (prlimit --pid $$ --{option}=:{want} as root with CAP_SYS_RESOURCE), \
                     or run ckpt-restore with CAP_SYS_RESOURCE"
                ))
                .into());
        }
    }
    Ok(())
}

pub(super) fn restore(entry: &TaskRlimitsEntry) -> Vec<Call> {
    let set = |((number, (_, name)), limit): ((u64, (&str, &str)), &RlimitEntry)| {
        let args = [Arg::Val(0), Arg::Val(number), Arg::In(words(&[limit.cur, limit.max])), Arg::Val(0)];
        Call::new(format!("prlimit64({name})"), libc::SYS_prlimit64, args)
    };
    (0..).zip(RESOURCES).zip(&entry.rlimits).map(set).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::selfcall;

    #[test]
    fn limits_come_back() {
        let code = selfcall::in_child(|| {
            let pid = Pid(nix::unistd::getpid().as_raw());
            let mut want = dump(pid).unwrap();
            want.rlimits[7] = RlimitEntry { cur: 100, max: 200 };
            want.rlimits[4] = RlimitEntry { cur: 0, max: 12345 };
            check(&want).unwrap();
            Own.run(&restore(&want)).unwrap();
            assert_eq!(dump(pid).unwrap(), want);
            0
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn limit_above_our_own_is_refused_by_name() {
        let own = limits::parse(&std::fs::read("/proc/self/limits").unwrap()).unwrap();
        let mut want = dump(Pid(nix::unistd::getpid().as_raw())).unwrap();
        want.rlimits[7].max = own[7].hard + 1;
        let error = check_against(&want, &own).unwrap_err();
        let refused: &Refused = error.downcast_ref().unwrap();
        assert_eq!(refused.subject, "RLIMIT_NOFILE");
        assert!(refused.advice.as_ref().unwrap().contains("--nofile"));
    }
}
