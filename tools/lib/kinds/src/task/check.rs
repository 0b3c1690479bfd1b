//! What keeps a process from being checkpointed: state that no image can hold, or that a restore
//! could not bring back. Found before anything is written, so that no half of a checkpoint exists.

use std::{ffi::OsString, fs, io, sync::OnceLock};

use anyhow::Context;
use ckpt_proc::status::Status;
use ckpt_proto::types::SeccompMode;
use ckpt_remote::Process;
use ckpt_sys::{Pid, Refused, Tid};

/// linux/sched.h
const PF_KTHREAD: u32 = 0x0020_0000;
/// Links in /proc/PID/ns that must be ours. `pid_for_children` and `time_for_children` differ from
/// `pid` and `time` when a process has called unshare(2) and not forked yet.
const NAMESPACES: [&str; 10] =
    ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"];

pub(super) fn check(process: &Process) -> anyhow::Result<()> {
    let (pid, stat) = (process.pid, &process.stat);
    let subject = process.subject();
    if stat.flags & PF_KTHREAD != 0 {
        return Err(Refused::new(subject, "is a kernel thread").into());
    }
    if stat.exit_signal != libc::SIGCHLD && stat.state != b'Z' {
        let reason = format!(
            "tells its parent of its end by signal {} instead of SIGCHLD, which has no place in the images",
            stat.exit_signal
        );
        return Err(Refused::new(subject, reason).into());
    }
    if stat.state != b'Z' {
        namespaces(pid, &subject)?;
    }
    process.threads.iter().try_for_each(|t| thread(&t.status, &subject, t.tid))
}

/// Refuses by a thread's status.
fn thread(status: &Status, process: &str, tid: Tid) -> anyhow::Result<()> {
    let subject = if status.tgid == tid.0 { process.to_owned() } else { format!("{process} thread {tid}") };
    // The kernel names the tracing thread; ours may be any.
    let own = nix::unistd::gettid().as_raw();
    if ![0, own].contains(&status.tracer_pid)
        && !fs::exists(format!("/proc/self/task/{}", status.tracer_pid))?
    {
        let reason = format!("is traced by pid {}", status.tracer_pid);
        return Err(Refused::new(subject, reason).advise("detach the debugger or strace first").into());
    }
    if status.seccomp == SeccompMode::Strict as u32 {
        return Err(Refused::new(subject, "is confined by seccomp in strict mode").into());
    }
    if let Some(feature) = status.thread_features.first() {
        let reason = format!("uses {feature} (x86 shadow stacks), which can't be checkpointed");
        return Err(Refused::new(subject, reason)
            .advise("start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off")
            .into());
    }
    Ok(())
}

fn namespaces(pid: Pid, subject: &str) -> anyhow::Result<()> {
    let all_of = |pid: &str| NAMESPACES.map(|name| link(&format!("/proc/{pid}/ns/{name}")));
    static OURS: OnceLock<[Option<OsString>; NAMESPACES.len()]> = OnceLock::new();
    let ours = OURS.get_or_init(|| all_of("self").map(Result::unwrap_or_default));
    for ((name, ours), theirs) in NAMESPACES.iter().zip(ours).zip(all_of(&pid.to_string())) {
        let theirs = theirs?;
        // pid_for_children dangles until the first child exists: a namespace of its own all the same.
        if theirs != *ours {
            let reason =
                format!("is in another {} namespace than this tool", name.trim_end_matches("_for_children"));
            return Err(Refused::new(subject, reason)
                .advise(format!("run the tool in that namespace (nsenter -t {pid})"))
                .into());
        }
    }
    Ok(())
}

fn link(path: &str) -> anyhow::Result<Option<OsString>> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target.into_os_string())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            Err(Refused::new(path, "may not be read").advise("run as the process's user or as root").into())
        }
        Err(e) => Err(e).context(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_proc::{stat, status};
    use ckpt_remote::Thread;
    use ckpt_sys::{
        ptrace::{self, Stop, wait},
        selfcall,
    };
    use nix::{
        sched::{CloneFlags, unshare},
        sys::signal::{Signal, raise},
    };

    fn process(pid: Pid) -> Process {
        let stat = stat::parse(&fs::read(format!("/proc/{pid}/stat")).unwrap()).unwrap();
        let status = status::parse(&fs::read(format!("/proc/{pid}/status")).unwrap()).unwrap();
        let tid = pid.leader();
        Process {
            pid,
            stat,
            zombie: false,
            stopped_by: None,
            threads: vec![Thread { tid, regs: ptrace::regs(tid).unwrap(), sigmask: 0, status }],
        }
    }

    /// The refusal of a child that did `what` and stopped.
    fn refusal(what: impl FnOnce()) -> Option<String> {
        let _forking = crate::descriptors::forking();
        let pid = selfcall::spawn(|| {
            selfcall::trace_me();
            what();
            raise(Signal::SIGSTOP).unwrap();
            0
        });
        let stop = wait(pid.leader(), false).unwrap();
        let result = check(&process(pid));
        nix::sys::signal::kill(pid.nix(), Signal::SIGKILL).unwrap();
        wait(pid.leader(), false).unwrap();
        assert_eq!(stop, Some(Stop::Signal(libc::SIGSTOP)), "the child could not do it");
        result.err().map(|e| format!("{:#}", e.downcast_ref::<Refused>().expect("a refusal")))
    }

    #[test]
    fn ordinary_process_passes() {
        assert_eq!(refusal(|| {}), None);
    }

    #[test]
    fn other_namespaces_are_named() {
        let uts = refusal(|| unshare(CloneFlags::CLONE_NEWUTS).unwrap());
        assert!(uts.as_ref().is_some_and(|r| r.contains("another uts namespace")), "{uts:?}");
        let pid = refusal(|| unshare(CloneFlags::CLONE_NEWPID).unwrap());
        assert!(pid.as_ref().is_some_and(|r| r.contains("another pid namespace")), "{pid:?}");
    }

    #[test]
    fn strangers_status_is_refused() {
        let ordinary = Status { tgid: 5, ..Default::default() };
        assert!(thread(&ordinary, "pid 5 (x)", Tid(5)).is_ok());
        let traced = Status { tracer_pid: 1, ..ordinary.clone() };
        let text = format!("{:#}", thread(&traced, "pid 5 (x)", Tid(6)).unwrap_err());
        assert_eq!(text, "pid 5 (x) thread 6: is traced by pid 1");
        let confined = Status { seccomp: 1, ..ordinary };
        assert!(thread(&confined, "pid 5 (x)", Tid(5)).is_err());
    }
}
