//! Kernels and containers that lack a system call, one at a time: a tool does without it, or says what failed; the
//! target never notices, and nothing is left behind.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use ckpt_images::ImageSet;
use ckpt_tests::{Outcome, Pipeline, Target, process, soon, tool, workload};
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

/// Words that run `name` with `call` denied: its number, or `NUMBER:VALUE` if only with that second argument.
fn without(name: &str, call: impl ToString, errno: Errno) -> Vec<std::ffi::OsString> {
    let helper = workload::compile("without").into_os_string();
    let words = [call.to_string(), (errno as i32).to_string()].map(Into::into);
    std::iter::once(helper).chain(words).chain([tool(name).into_os_string()]).collect()
}

/// The pipeline of a dump, or that of a restore, where one stage has to do without a call.
fn pipeline(
    dir: &Path,
    stages: Vec<(&str, Vec<std::ffi::OsString>)>,
    denied: (&str, impl ToString, Errno),
) -> Outcome {
    let (poor, call, errno) = denied;
    let mut pipeline = Pipeline::new(dir);
    for (name, args) in stages {
        pipeline = if name == poor {
            pipeline.program(name, without(name, call.to_string(), errno).into_iter().chain(args))
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
        for errno in [Errno::EINVAL, Errno::EXDEV, Errno::EOPNOTSUPP, Errno::ENOSYS, Errno::EPERM] {
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

/// A dump to `img`, by ckpt-scan with `args` and one call denied.
fn scan_without(target: &Target, args: &[&str], call: impl ToString, errno: Errno) -> Outcome {
    let pid = target.pid.to_string();
    let scan = ["-t", &pid].iter().chain(args).map(Into::into).collect();
    let write = vec![target.path("img").into_os_string()];
    let stages = vec![("ckpt-scan", scan), ("ckpt-sk", vec![]), ("ckpt-write", write)];
    pipeline(target.dir.path(), stages, ("ckpt-scan", call, errno))
}

/// Who can send no signals has to do without them before the tree is stopped for long; what is to be killed dies all the same.
#[test]
fn without_kill_nothing_is_left_stopped() {
    let target = Target::start("snapshotted");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    for errno in [Errno::EPERM, Errno::ENOSYS] {
        for args in [&["--snapshot"][..], &["--kill"]] {
            let outcome = scan_without(&target, args, libc::SYS_kill, errno);
            let _ = outcome.fails("ckpt-scan", 3, &["signals can't be sent to it: kill", "seccomp"]);
            target.unchanged(&before);
        }
    }
    let sigkill = format!("{}:{}", libc::SYS_kill, libc::SIGKILL);
    let _ = scan_without(&target, &["--snapshot"], &sigkill, Errno::EPERM).ok("dump --snapshot");
    target.unchanged(&before);
    target.passes("the target");
    std::fs::remove_dir_all(target.path("img")).expect("remove the images");
    let _ = scan_without(&target, &["--kill"], &sigkill, Errno::EPERM).ok("dump --kill");
    process::wait_free(&pids);
    target.restore_ok("img");
    target.passes("the restored one");
}

#[test]
fn a_kernel_without_pagemap_scan_is_told_of_with_advice() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    let outcome = scan_without(&target, &[], format!("{}:0xc0606610", libc::SYS_ioctl), Errno::ENOTTY);
    let _ = outcome.fails(
        "ckpt-scan",
        1,
        &["ioctl(PAGEMAP_SCAN): ENOTTY", "\n  this kernel has no", "ckpt-check"],
    );
    target.unchanged(&before);
}

/// `ckpt-series -D series --every 1ms` with a call denied, and with `args`.
fn series_without(target: &Target, args: &[&str], call: i64, errno: Errno) -> std::process::Output {
    let mut words = without("ckpt-series", call, errno).into_iter();
    Command::new(words.next().expect("a program"))
        .args(words)
        .args(["--every", "1ms", "-t", &target.pid.to_string(), "-D"])
        .arg(target.path("series"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("run ckpt-series")
}

/// Where pages can't be copied by the kernel a series is pruned all the same, and keeps what is no image.
#[test]
fn series_is_pruned_without_copy_file_range() {
    let target = Target::start("counting");
    for errno in [Errno::EPERM, Errno::ENOSYS, Errno::EXDEV] {
        let args = ["--count", "5", "--keep", "2"];
        let output = series_without(&target, &args, libc::SYS_copy_file_range, errno);
        assert!(output.status.success(), "{errno}: {output:?}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        for number in said.lines().rev().take(2) {
            let dir = target.path("series").join(number);
            ImageSet::from_chain(&dir).and_then(|set| set.verify_pages()).expect("a whole checkpoint");
            assert!(dir.join("stats-dump").exists(), "{}", dir.display());
        }
    }
    target.passes("the target");
}

/// The stages of a series can't speak to each other then. That is said, and no time is lost over it.
#[test]
fn series_does_not_wait_for_a_stage_that_can_not_speak() {
    let target = Target::start("counting");
    let series = without("ckpt-series", libc::SYS_sendto, Errno::EPERM);
    let trace = target.path("waits");
    let status = Command::new("strace")
        .args(["-f", "-e", "trace=futex", "-o"])
        .arg(&trace)
        .args(series)
        .args(["--every", "1ms", "--count", "1", "-t", &target.pid.to_string(), "-D"])
        .arg(target.path("series"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(target.path("series.err")).expect("make a file"))
        .status()
        .expect("run strace");
    let said = std::fs::read_to_string(target.path("series.err")).expect("read");
    assert!(status.success() && said.contains("take the hold: Operation not permitted"), "{status} {said}");
    let waits = std::fs::read_to_string(trace).expect("read");
    assert!(!waits.contains("ETIMEDOUT"), "{waits}");
}

/// A debugger that attaches for a moment is outlasted.
#[test]
fn series_goes_on_when_a_foreign_tracer_has_left() {
    let target = Target::start("counting");
    let mut tracer = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-p", &target.pid.to_string()])
        .spawn()
        .expect("start strace");
    let traced = || !process::text(target.pid, "status").contains("TracerPid:\t0\n");
    assert!(soon(traced), "strace does not attach");
    let mut series = Command::new(tool("ckpt-series"))
        .args(["--every", "1ms", "--count", "2", "-t", &target.pid.to_string(), "-D"])
        .arg(target.path("series"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start ckpt-series");
    let pid = i32::try_from(series.id()).expect("pids are small");
    // It looks every few milliseconds, and sleeps in between.
    let sleeps = || {
        let text = process::text(pid, "status");
        let count = text.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        count.and_then(|n| n.trim().parse::<u32>().ok()).unwrap_or(0)
    };
    let _ = soon(|| series.try_wait().expect("wait").is_some() || sleeps() > 100);
    assert!(traced(), "strace has left too early");
    tracer.kill().and_then(|()| tracer.wait()).expect("end strace");
    let output = series.wait_with_output().expect("wait for ckpt-series");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "000001\n000002\n");
    target.passes("the target");
}
