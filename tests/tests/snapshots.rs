//! `ckpt-scan --snapshot`: the tree runs on while its pages are read, and notices nothing.

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_tests::{Outcome, Pipeline, Random, Target, process, soon, tool};

fn snapshot(target: &Target, out: &Path) -> Pipeline {
    let pid = target.pid.to_string();
    Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "--snapshot", "-t", &pid])
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), out.to_owned()])
}

fn snapshot_ok(target: &Target, name: &str) -> Outcome {
    snapshot(target, &target.path(name)).run().ok("dump --snapshot")
}

/// No copy of the target's memory is left behind.
fn no_copies(target: &Target) -> bool {
    soon(|| {
        let copies = process::marked(target.dir.path());
        copies.iter().filter(|&&pid| process::text(pid, "comm").starts_with("ckpt-snapshot")).count() == 0
    })
}

#[test]
fn snapshot_goes_unnoticed_and_is_of_one_instant() {
    let target = Target::start("snapshotted");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    for round in 0..10 {
        let outcome = snapshot_ok(&target, &format!("img{round}"));
        assert!(!outcome.said.contains("no snapshot"), "{outcome}");
        target.unchanged(&before);
    }
    target.passes("the target");
    assert!(no_copies(&target));
    target.end();
    process::wait_free(&pids);
    for round in [0, 4, 9] {
        target.restore_ok(&format!("img{round}"));
        target.passes("the restored one");
        target.end();
        process::wait_free(&pids);
    }
}

#[test]
fn snapshot_of_a_process_tree() {
    let target = Target::start("attacked");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let outcome = snapshot_ok(&target, "img");
    assert!(!outcome.said.contains("no snapshot"), "{outcome}");
    target.unchanged(&before);
    target.passes("the target");
    target.end();
    process::wait_free(&pids);
    target.restore_ok("img");
    target.passes("the restored one");
}

/// What can't be forked unseen is dumped in the freeze, and a warning says so.
#[test]
fn snapshot_falls_back_to_a_plain_dump() {
    for (workload, how, why) in [
        ("snapshotted", "1", "can't fork: EAGAIN"),
        ("snapshotted", "2", "adopts orphans"),
        ("seccomp_filter", "0", "filtered (seccomp)"),
    ] {
        let target = Target::start_with(workload, &["-", how]);
        let pids = process::tree(target.pid);
        let before = target.at_rest();
        let outcome = snapshot_ok(&target, "img");
        assert!(outcome.said.contains(why), "no {why:?}: {outcome}");
        target.unchanged(&before);
        target.passes("the target");
        assert!(no_copies(&target));
        target.end();
        process::wait_free(&pids);
        target.restore_ok("img");
        target.passes("the restored one");
    }
}

/// While nobody reads the pages the target runs, and what it closes is closed.
#[test]
fn target_runs_and_closes_files_while_the_snapshot_lives() {
    let target = Target::start_with("snapshotted", &["-", "4"]);
    let before = target.at_rest();
    let pid = target.pid.to_string();
    let mut scan = Command::new(tool("ckpt-scan"))
        .args(["-v", "--snapshot", "-t", &pid])
        .stdout(Stdio::piped())
        .stderr(fs::File::create(target.path("scan.err")).expect("make a file"))
        .spawn()
        .expect("start ckpt-scan");
    let mut sk = Command::new(tool("ckpt-sk"))
        .stdin(scan.stdout.take().expect("a pipe"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("start ckpt-sk");
    let mut stream = sk.stdout.take().expect("a pipe");
    // Reading until the tree is free: sockets are completed by then.
    let mut head = vec![0; 4096];
    let freed = soon(|| {
        let said = fs::read_to_string(target.path("scan.err")).unwrap_or_default();
        if said.contains("frozen for") {
            return true;
        }
        let mut fds =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&stream), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut fds, 20_u16).unwrap_or(0) > 0 {
            let _ = stream.read(&mut head).expect("read the stream");
        }
        false
    });
    assert!(freed, "the target is held");
    let copies: Vec<i32> = process::marked(target.dir.path())
        .into_iter()
        .filter(|&pid| process::text(pid, "comm").starts_with("ckpt-snapshot"))
        .collect();
    assert_eq!(copies.len(), 2, "one for each process");
    for &copy in &copies {
        assert_eq!(fs::read_dir(format!("/proc/{copy}/fd")).expect("list").count(), 0, "open files");
        assert!(!process::children(target.pid).contains(&copy));
    }
    target.unchanged(&before);
    // It checks itself, then closes its end of the socket: the peer sees that now.
    target.passes("the target");
    target.wait_log("closed");
    assert!(!copies.iter().any(|&copy| process::is_free(copy)), "the copies live");
    // The copies go with their owner.
    scan.kill().expect("kill ckpt-scan");
    scan.wait().expect("wait");
    drop(stream);
    sk.wait().expect("wait");
    assert!(no_copies(&target));
    target.passes("the target");
}

#[test]
fn snapshot_and_kill_make_no_sense() {
    let dir = ckpt_tests::TestDir::new("usage");
    let outcome = Pipeline::new(dir.path()).line("ckpt-scan --snapshot --kill -t 1").run();
    let _ = outcome.fails("ckpt-scan", 2, &["--snapshot"]);
}

/// ckpt-scan killed at random instants: the target is as it was, no copy stays, no image is half.
#[test]
fn killed_snapshot_leaves_target_and_no_copy() {
    const INSTANTS: u64 = 200;
    let target = Target::start("attacked");
    let mut random = Random::new("killed_snapshot");
    let out = target.path("img");
    let mut span = Duration::ZERO;
    for _ in 0..3 {
        let start = Instant::now();
        let _ = snapshot_ok(&target, "img");
        span = span.max(start.elapsed());
        fs::remove_dir_all(&out).expect("remove the images");
    }
    let mut before = target.at_rest();
    let mut absent = 0;
    for instant in 0..INSTANTS {
        let delay = Duration::from_nanos(random.below(u64::try_from(span.as_nanos()).expect("short")));
        let mut running = snapshot(&target, &out).start();
        let end = Instant::now() + delay;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        running.kill("ckpt-scan");
        let outcome = running.wait().sane();
        if out.exists() {
            fs::remove_dir_all(&out).expect("remove the images");
        } else {
            absent += 1;
        }
        target.unchanged(&before);
        assert!(no_copies(&target), "instant {instant} after {delay:?}: a copy stays: {outcome}");
        if instant % 20 == 0 {
            target.passes("the target");
            before = target.at_rest();
        }
    }
    assert!(absent > 0, "no instant hit the dump");
    target.passes("the target after all attacks");
}
