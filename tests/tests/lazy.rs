//! `ckpt-restore --lazy`: processes run before their pages are there, and never see anything but what was there.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ckpt_tests::{Outcome, Pipeline, Target, installed, process, skip, soon};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Page servers and guardians that were started by a restore of this target: they have its stderr.
fn helpers(target: &Target, name: &str) -> Vec<i32> {
    let ours = |pid: &i32| process::link(*pid, "fd/2").starts_with(target.dir.path());
    process::all()
        .into_iter()
        .filter(|&pid| process::text(pid, "comm").trim_end() == name && process::state(pid) != Some('Z'))
        .filter(ours)
        .collect()
}

/// Waits until all pages are in: nobody serves any more.
fn complete(target: &Target) {
    let ended = || helpers(target, "ckpt-lazy").is_empty() && helpers(target, "ckpt-guardian").is_empty();
    assert!(soon(ended), "server or guardian stay: {}", said(target));
    for pid in process::tree(target.pid) {
        let smaps = process::text(pid, "smaps");
        let watched = |line: &str| {
            line.strip_prefix("VmFlags:").is_some_and(|f| f.split(' ').any(|f| ["um", "uw"].contains(&f)))
        };
        assert!(!smaps.lines().any(watched), "pid {pid} is still watched");
    }
}

fn said(target: &Target) -> String {
    fs::read_to_string(target.path("0-ckpt-restore.err")).unwrap_or_default()
}

fn restore(target: &Target, options: &[&str], name: &str) -> Outcome {
    let words = ["ckpt-restore", "--detach", "--lazy", "-v"].iter().chain(options).map(Into::into);
    Pipeline::new(target.dir.path()).stage(words.chain([target.path(name).into_os_string()])).run()
}

/// `memory_later` with so many MiB in each of its nine areas, which begins when [`begin`] says so.
fn later(mib: u64, how: &str) -> Target {
    let flag = "flag";
    let target = Target::start_with("memory_later", &["-", &mib.to_string(), flag, how]);
    assert!(target.path(flag).is_file());
    target
}

fn begin(target: &Target, word: u8) {
    let file = OpenOptions::new().write(true).open(target.path("flag")).expect("open the flag");
    file.write_all_at(&[word], 0).expect("write the flag");
}

fn pages_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).expect("list images").flatten().map(|f| f.path());
    files.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().contains("pages-"))).collect()
}

/// Ends the target, and begins when it comes back.
fn end(target: &Target) {
    let pids = process::tree(target.pid);
    target.end();
    process::wait_free(&pids);
    begin(target, 1);
    fs::remove_file(target.path("log")).expect("remove the log");
    fs::write(target.path("log"), "").expect("make the log");
}

/// The restored program has done all it can think of to pages that had not come, and found them right.
fn check_storm(target: &Target, mib: u64) {
    target.wait_log("PASS");
    let log = target.log();
    let missing = log.lines().find_map(|l| l.strip_prefix("missing ")?.parse::<u64>().ok());
    // Half of one area of nine are holes, which are missing in any case: far more than those.
    assert!(missing.is_some_and(|n| n > mib * 256 * 5), "too little was missing: {log}");
    complete(target);
    target.passes("once all pages are in");
}

#[test]
fn a_program_does_anything_while_pages_are_missing() {
    let target = later(8, "-");
    for (name, write) in [("plain", "ckpt-write"), ("packed", "ckpt-write --compress lz4")] {
        let pid = target.pid.to_string();
        let words = write.split(' ').map(Into::into).chain([target.path(name).into_os_string()]);
        let _ = Pipeline::new(target.dir.path())
            .stage(["ckpt-scan", "-t", &pid])
            .stage(["ckpt-sk"])
            .stage(words)
            .run()
            .ok("dump");
    }
    end(&target);
    let log = fs::metadata(target.path("log")).expect("stat").len();
    assert_eq!(log, 0);
    let _ = restore(&target, &[], "packed").ok("restore");
    check_storm(&target, 8);
    end(&target);
    let _ = restore(&target, &["--no-verify"], "plain").ok("restore");
    check_storm(&target, 8);
    // Afterwards it is a process like any other.
    target.dump_ok("again");
    let pids = process::tree(target.pid);
    target.end();
    process::wait_free(&pids);
    target.restore_ok("again");
    target.passes("restored once more");
}

#[test]
fn pages_come_from_all_checkpoints_of_a_chain() {
    let target = later(4, "-");
    let address = format!("ckpt-test-lazy-{}", target.pid);
    let mut tracker = std::process::Command::new(ckpt_tests::tool("ckpt-track"))
        .args(["-t", &target.pid.to_string(), "--address", &address])
        .stdout(fs::File::create(target.path("track.out")).expect("make a file"))
        .spawn()
        .expect("start ckpt-track");
    let ready = soon(|| fs::read_to_string(target.path("track.out")).is_ok_and(|s| s.trim() == address));
    let dump = |name: &str, parent: Option<&str>, compress: &[&str]| {
        let pid = target.pid.to_string();
        let mut scan: Vec<std::ffi::OsString> =
            ["ckpt-scan", "-t", &pid, "--track", &address].map(Into::into).to_vec();
        let mut write: Vec<std::ffi::OsString> = vec!["ckpt-write".into(), target.path(name).into()];
        write.extend(compress.iter().map(Into::into));
        for words in parent.iter().map(|parent| target.path(parent)) {
            scan.extend(["--parent".into(), words.clone().into()]);
            write.extend(["--parent".into(), words.into()]);
        }
        let _ = Pipeline::new(target.dir.path()).stage(scan).stage(["ckpt-sk"]).stage(write).run().ok("dump");
    };
    dump("1", None, &[]);
    dump("2", Some("1"), &["--compress", "zstd"]);
    dump("3", Some("2"), &[]);
    let _ = tracker.kill();
    let _ = tracker.wait();
    assert!(ready, "ckpt-track is not ready");
    end(&target);
    let _ = restore(&target, &[], "3").ok("restore");
    check_storm(&target, 4);
}

#[test]
fn whole_trees_come_back_lazily() {
    for name in [
        "memory_private",
        "memory_file",
        "memory_shared",
        "memory_growth",
        "memory_flags",
        "memory_vdso",
        "thread_state",
        "process_tree",
        "signal_handlers",
        "seccomp_filter",
        "credentials_user",
        "blocked_calls",
        "herd",
        "registers",
    ] {
        let target = Target::start(name);
        let before = target.at_rest();
        target.dump_ok("img");
        let pids = process::tree(target.pid);
        target.end();
        process::wait_free(&pids);
        let _ = restore(&target, &[], "img").ok(name);
        complete(&target);
        target.looks_like(&before);
        target.passes(name);
    }
}

#[test]
fn shared_pages_stay_shared_and_come_at_once() {
    let target = Target::start_with("workers", &["-", "5", "16"]);
    let pids = process::tree(target.pid);
    let _ = target.dumping("img", &["--share"], &[]).run().ok("dump");
    target.end();
    process::wait_free(&pids);
    let _ = restore(&target, &[], "img").ok("restore");
    let pss = |pid: i32| {
        let text = process::text(pid, "smaps_rollup");
        let line = text.lines().find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
        line.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let sum: u64 = process::tree(target.pid).into_iter().map(pss).sum();
    assert!(sum < 24 << 10, "{sum} KiB for 16 MiB that six processes share");
    target.passes("the restored one");
    complete(&target);
}

/// Stops the server in the middle of its work.
fn caught(target: &Target) -> i32 {
    let mut server = Vec::new();
    assert!(
        soon(|| {
            server = helpers(target, "ckpt-lazy");
            !server.is_empty()
        }),
        "no page server: {}",
        said(target)
    );
    let _ = kill(Pid::from_raw(server[0]), Signal::SIGSTOP);
    assert!(soon(|| process::state(server[0]) == Some('T')), "it has ended: use more memory");
    server[0]
}

#[test]
fn a_killed_server_takes_the_tree_with_it_and_nobody_reads_zeros() {
    let target = later(24, "stray");
    target.dump_ok("img");
    end(&target);
    let _ = restore(&target, &[], "img").ok("restore");
    target.wait_log("stray");
    let server = caught(&target);
    let stray =
        target.log().lines().find_map(|l| l.strip_prefix("stray ")?.parse::<i32>().ok()).expect("a pid");
    let _ = kill(Pid::from_raw(server), Signal::SIGKILL);
    assert!(soon(|| process::is_free(target.pid)), "the root lives on: {}", target.log());
    // A process that has left the family is not found, but it can't get at what is missing either.
    begin(&target, 2);
    assert!(soon(|| process::is_free(stray)), "the stray lives on: {}", target.log());
    assert!(soon(|| helpers(&target, "ckpt-guardian").is_empty()), "the guardian stays");
    let log = target.log();
    assert!(!log.contains("BROKEN") && !log.contains("PASS"), "{log}");
    assert!(said(&target).contains("the page server ended before all pages had come"), "{}", said(&target));
}

#[test]
fn a_killed_guardian_is_replaced() {
    let target = later(16, "-");
    target.dump_ok("img");
    end(&target);
    let _ = restore(&target, &[], "img").ok("restore");
    let mut first = Vec::new();
    let made = || {
        first = helpers(&target, "ckpt-guardian");
        first.len() == 1
    };
    assert!(soon(made), "no guardian: {}", said(&target));
    let server = caught(&target);
    let _ = kill(Pid::from_raw(first[0]), Signal::SIGKILL);
    let _ = kill(Pid::from_raw(server), Signal::SIGCONT);
    check_storm(&target, 16);
}

#[test]
fn a_damaged_page_ends_the_tree() {
    let target = later(16, "-");
    let img = target.dump_ok("img");
    end(&target);
    let largest = pages_files(&img).into_iter().max_by_key(|f| f.metadata().map_or(0, |m| m.len()));
    let path = largest.expect("pages");
    let file = OpenOptions::new().read(true).write(true).open(&path).expect("open the pages");
    let at = path.metadata().expect("stat").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("write");
    let _ = restore(&target, &[], "img").ok("restore");
    assert!(soon(|| process::is_free(target.pid)), "it lives on: {}", target.log());
    complete(&target);
    let log = target.log();
    assert!(!log.contains("BROKEN") && !log.contains("PASS"), "{log}");
    assert!(said(&target).contains("the contents have changed"), "{}", said(&target));
    assert!(said(&target).contains("are killed"), "{}", said(&target));
}

#[test]
fn a_dump_has_to_wait_for_the_pages() {
    let target = later(16, "-");
    target.dump_ok("img");
    end(&target);
    let _ = restore(&target, &[], "img").ok("restore");
    let server = caught(&target);
    let _ = target.dump("early").fails("ckpt-scan", 3, &["missing pages", "--lazy"]);
    assert!(!target.path("early").exists());
    let _ = kill(Pid::from_raw(server), Signal::SIGCONT);
    check_storm(&target, 16);
    target.dump_ok("late");
}

#[test]
fn the_program_may_end_before_its_pages_are_in() {
    let target = later(16, "hurry");
    target.dump_ok("img");
    end(&target);
    // In the foreground, whose status is the program's.
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-restore".into(), "--lazy".into(), target.path("img")])
        .run();
    assert_eq!(outcome.code("ckpt-restore"), 3, "{outcome}");
    complete(&target);
}

#[test]
fn nothing_stays_if_a_lazy_restore_fails_or_can_not_be() {
    let target = later(4, "-");
    target.dump_ok("img");
    end(&target);
    let _ =
        restore(&target, &["--pidfile", "/nowhere/pid"], "img").fails("ckpt-restore", 1, &["/nowhere/pid"]);
    process::wait_free(&[target.pid]);
    complete(&target);
    // Only directories: a stream can't be read out of turn.
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("img")])
        .stage(["ckpt-restore", "--detach", "--lazy"])
        .run()
        .fails("ckpt-restore", 2, &["--lazy takes an image directory"]);
    let _ = Pipeline::new(target.dir.path())
        .stage(
            ["ckpt", "restore", "--lazy", "--close", "7", "-D"]
                .map(Into::into)
                .into_iter()
                .chain([target.path("img")]),
        )
        .run()
        .fails("ckpt", 2, &["--lazy"]);
    if !installed("setpriv") {
        skip("nothing_stays_if_a_lazy_restore_fails_or_can_not_be", "setpriv is not installed");
        return;
    }
    let restore = ckpt_tests::tool("ckpt-restore").into_os_string();
    let words = ["setpriv", "--bounding-set", "-sys_ptrace"].map(Into::into).into_iter();
    let _ = Pipeline::new(target.dir.path())
        .program(
            "ckpt-restore",
            words.chain([restore, "--detach".into(), "--lazy".into(), target.path("img").into()]),
        )
        .run()
        .fails("ckpt-restore", 3, &["userfaultfd", "CAP_SYS_PTRACE"]);
    process::wait_free(&[target.pid]);
}
