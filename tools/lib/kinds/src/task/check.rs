//! What keeps a process from being checkpointed: state that no image can hold, or that a restore
//! could not bring back. Found before anything is written, so that no half of a checkpoint exists.

use std::{ffi::OsString, fs, io};

use anyhow::Context;
use ckpt_proc::status::{self, Status};
use ckpt_proto::types::SeccompMode;
use ckpt_sys::{Pid, Refused, Tid};

use super::{misc::comm, sched::stat_of};

/// linux/sched.h
const PF_KTHREAD: u32 = 0x0020_0000;
/// Links in /proc/PID/ns that must be ours. `pid_for_children` and `time_for_children` differ from
/// `pid` and `time` when a process has called unshare(2) and not forked yet.
const NAMESPACES: [&str; 10] =
    ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"];

pub(super) fn check(pid: Pid) -> anyhow::Result<()> {
    let name = String::from_utf8_lossy(&comm(pid, pid.leader())?).into_owned();
    let subject = format!("pid {pid} ({name})");
    let stat = stat_of(&format!("/proc/{pid}/stat"))?;
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
    let tasks = format!("/proc/{pid}/task");
    for entry in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let tid = entry.with_context(|| tasks.clone())?.file_name();
        if let Some(tid) = tid.to_str().and_then(|t| t.parse().ok()) {
            match status_of(pid, tid)? {
                Some(status) => thread(&status, &subject, tid)?,
                None if tid == pid.leader() => anyhow::bail!("{subject}: is gone"),
                None => {} // a thread that has just ended
            }
        }
    }
    Ok(())
}

/// A thread's status, `None` if it is gone.
pub(super) fn status_of(pid: Pid, tid: Tid) -> anyhow::Result<Option<Status>> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    match fs::read(&path) {
        Ok(text) => Ok(Some(status::parse(&text).context(path)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(e).context(path),
    }
}

/// Refuses by a thread's status. Also used when it is dumped: it may have changed since.
pub(super) fn thread(status: &Status, process: &str, tid: Tid) -> anyhow::Result<()> {
    let subject = if status.tgid == tid.0 { process.to_owned() } else { format!("{process} thread {tid}") };
    // The kernel names the tracing thread; ours may be any.
    if status.tracer_pid != 0 && !fs::exists(format!("/proc/self/task/{}", status.tracer_pid))? {
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
    for name in NAMESPACES {
        let path = format!("/proc/{pid}/ns/{name}");
        let theirs = link(&path)?;
        let ours = link(&format!("/proc/self/ns/{name}"))?;
        // pid_for_children dangles until the first child exists: a namespace of its own all the same.
        if theirs != ours {
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
    use ckpt_sys::{
        ptrace::{Stop, wait},
        selfcall,
    };
    use nix::{
        sched::{CloneFlags, unshare},
        sys::signal::{Signal, raise},
    };

    /// The refusal of a child that did `what` and stopped.
    fn refusal(what: impl FnOnce()) -> Option<String> {
        let pid = selfcall::spawn(|| {
            selfcall::trace_me();
            what();
            raise(Signal::SIGSTOP).unwrap();
            0
        });
        let stop = wait(pid.leader(), false).unwrap();
        let result = check(pid);
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
