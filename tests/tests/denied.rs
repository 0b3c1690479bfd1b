//! Kernels and containers that lack a system call, one at a time: a tool does without it, or says what failed; the
//! target never notices, and nothing is left behind.

use std::path::Path;

use ckpt_tests::{Outcome, Pipeline, Target, process, tool, workload};
use nix::{errno::Errno, libc};

/// Calls that the tools make beyond those without which no program starts.
const CALLS: &[(&str, i64)] = &[
    ("accept4", libc::SYS_accept4),
    ("bind", libc::SYS_bind),
    ("clone3", libc::SYS_clone3),
    ("connect", libc::SYS_connect),
    ("copy_file_range", libc::SYS_copy_file_range),
    ("fallocate", libc::SYS_fallocate),
    ("fsync", libc::SYS_fsync),
    ("ftruncate", libc::SYS_ftruncate),
    ("getdents64", libc::SYS_getdents64),
    ("getsockopt", libc::SYS_getsockopt),
    ("ioctl", libc::SYS_ioctl),
    ("kcmp", libc::SYS_kcmp),
    ("kill", libc::SYS_kill),
    ("linkat", libc::SYS_linkat),
    ("listen", libc::SYS_listen),
    ("lseek", libc::SYS_lseek),
    ("madvise", libc::SYS_madvise),
    ("memfd_create", libc::SYS_memfd_create),
    ("mkdirat", libc::SYS_mkdirat),
    ("newfstatat", libc::SYS_newfstatat),
    ("openat2", libc::SYS_openat2),
    ("pidfd_getfd", libc::SYS_pidfd_getfd),
    ("pidfd_open", libc::SYS_pidfd_open),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
    ("pipe2", libc::SYS_pipe2),
    ("prctl", libc::SYS_prctl),
    ("preadv", libc::SYS_preadv),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("ptrace", libc::SYS_ptrace),
    ("recvfrom", libc::SYS_recvfrom),
    ("recvmsg", libc::SYS_recvmsg),
    ("renameat2", libc::SYS_renameat2),
    ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo),
    ("rt_sigtimedwait", libc::SYS_rt_sigtimedwait),
    ("sched_getscheduler", libc::SYS_sched_getscheduler),
    ("sendfile", libc::SYS_sendfile),
    ("sendto", libc::SYS_sendto),
    ("signalfd4", libc::SYS_signalfd4),
    ("socket", libc::SYS_socket),
    ("splice", libc::SYS_splice),
    ("statx", libc::SYS_statx),
    ("sync_file_range", libc::SYS_sync_file_range),
    ("tee", libc::SYS_tee),
    ("timer_create", libc::SYS_timer_create),
    ("unshare", libc::SYS_unshare),
    ("vmsplice", libc::SYS_vmsplice),
    ("wait4", libc::SYS_wait4),
    ("waitid", libc::SYS_waitid),
    ("writev", libc::SYS_writev),
];

/// Words that run `name` with `call` denied.
fn without(name: &str, call: i64, errno: Errno) -> Vec<std::ffi::OsString> {
    let helper = workload::compile("without").into_os_string();
    let words = [call.to_string(), (errno as i32).to_string()].map(Into::into);
    std::iter::once(helper).chain(words).chain([tool(name).into_os_string()]).collect()
}

/// The pipeline of a dump, or that of a restore, where one stage has to do without a call.
fn pipeline(dir: &Path, stages: Vec<(&str, Vec<std::ffi::OsString>)>, denied: (&str, i64, Errno)) -> Outcome {
    let (poor, call, errno) = denied;
    let mut pipeline = Pipeline::new(dir);
    for (name, args) in stages {
        pipeline = if name == poor {
            pipeline.program(name, without(name, call, errno).into_iter().chain(args))
        } else {
            pipeline.stage(std::iter::once(name.into()).chain(args))
        };
    }
    pipeline.run()
}

/// A failure is told in words that name the call or what it was for; never by a panic or a signal.
fn is_told(outcome: &Outcome, context: &str) {
    assert!(!outcome.said.trim().is_empty(), "nobody says anything: {context} {outcome}");
    assert!(!outcome.said.contains("panicked"), "{context} {outcome}");
    for (name, status) in &outcome.stages {
        use std::os::unix::process::ExitStatusExt;
        let signal = status.signal().filter(|&s| s != libc::SIGPIPE);
        assert_eq!(signal, None, "{name} died: {context} {outcome}");
    }
}

#[test]
fn restore_without_a_call_works_or_leaves_no_process() {
    let target = Target::start("attacked");
    let pids = process::tree(target.pid);
    target.dump_ok("img");
    target.end();
    for &(name, call) in CALLS {
        for errno in [Errno::ENOSYS, Errno::EPERM] {
            let context = format!("ckpt-restore without {name} ({errno}):");
            let args = vec!["--detach".into(), target.path("img").into_os_string()];
            let stages = vec![("ckpt-restore", args)];
            let outcome = pipeline(target.dir.path(), stages, ("ckpt-restore", call, errno));
            if outcome.code("ckpt-restore") == 0 {
                target.end();
            } else {
                is_told(&outcome, &context);
                let left = process::marked(target.dir.path());
                assert!(left.is_empty(), "{context} {left:?} is left: {outcome}");
                process::wait_free(&pids);
            }
        }
    }
    // Programs that did run were denied the same call, and said so.
    std::fs::write(target.path("log"), "").expect("empty the log");
    target.restore_ok("img");
    target.passes("the restored one");
}

/// What no call tells is refused where the kernel's memory can't be looked into.
#[test]
fn without_a_look_into_the_kernel_there_is_a_reason() {
    for (workload, words) in [
        ("unaccepted", ["not accepted yet", "nobody can read", "CAP_BPF", "--skip-in-flight"]),
        ("packet_transmit", ["packet socket", "at which frame of its transmit ring", "CAP_BPF", "as root"]),
    ] {
        let target = Target::start(workload);
        let before = target.at_rest();
        let img = target.path("img");
        let stages = vec![
            ("ckpt-scan", vec!["-t".into(), target.pid.to_string().into()]),
            ("ckpt-sk", vec![]),
            ("ckpt-write", vec![img.clone().into_os_string()]),
        ];
        let outcome = pipeline(target.dir.path(), stages, ("ckpt-sk", libc::SYS_bpf, Errno::EPERM));
        let _ = outcome.fails("ckpt-sk", 3, &words);
        assert!(!img.exists());
        target.unchanged(&before);
        target.passes("the target");
    }
}

/// What a file system or a pipe answers where it can't do such a thing: then bytes go another way.
#[test]
fn pages_go_another_way_where_a_call_is_not_supported() {
    let target = Target::start("attacked");
    let pid = target.pid.to_string();
    let calls = [("splice", libc::SYS_splice), ("copy_file_range", libc::SYS_copy_file_range)];
    for (name, call) in calls {
        for errno in [Errno::EINVAL, Errno::EXDEV, Errno::EOPNOTSUPP] {
            for stage in ["ckpt-sk", "ckpt-write"] {
                let img = target.path("img");
                let _ = std::fs::remove_dir_all(&img);
                let stages = vec![
                    ("ckpt-scan", vec!["-t".into(), pid.clone().into()]),
                    ("ckpt-sk", vec![]),
                    ("ckpt-write", vec![img.into_os_string()]),
                ];
                let outcome = pipeline(target.dir.path(), stages, (stage, call, errno));
                let _ = outcome.ok(&format!("{stage} where {name} is {errno}"));
            }
        }
    }
    target.passes("the target");
    target.end();
    target.restore_ok("img");
    target.passes("the restored one");
}

/// The same for those who read the live tree.
#[test]
fn dump_without_a_call_works_or_leaves_the_target() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    let (pid, img) = (target.pid.to_string(), target.path("img"));
    for &(name, call) in CALLS {
        for stage in ["ckpt-scan", "ckpt-sk"] {
            let stages = vec![
                ("ckpt-scan", vec!["--attach-timeout".into(), "1".into(), "-t".into(), pid.clone().into()]),
                ("ckpt-sk", vec![]),
                ("ckpt-write", vec![img.clone().into_os_string()]),
            ];
            let outcome = pipeline(target.dir.path(), stages, (stage, call, Errno::ENOSYS));
            let context = format!("{stage} without {name}:");
            if outcome.code("ckpt-write") == 0 {
                std::fs::remove_dir_all(&img).expect("remove the images");
            } else {
                is_told(&outcome, &context);
                assert!(!img.exists(), "{context} {outcome}");
            }
            target.unchanged(&before);
        }
    }
    target.passes("the target");
}
