//! `--pre-dump`: memory is copied while the tree runs, and nothing of it is ever stale in the checkpoint.

use std::{
    fs,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use ckpt_tests::{Outcome, Pipeline, Random, Target, process, soon, tool};
use nix::sys::signal::Signal;

use crate::increments::{How, Tracker, dump, dump_ok, dump_so, same_as_live, sizes, stop};

/// A pre-dump NAME on PARENT, if that is given.
fn pre_dump(target: &Target, address: &str, name: &str, parent: Option<&str>) -> Outcome {
    pre_dump_so(target, address, name, parent, &[])
}

fn pre_dump_so(target: &Target, address: &str, name: &str, parent: Option<&str>, more: &[&str]) -> Outcome {
    let pid = target.pid.to_string();
    let mut scan = vec!["ckpt-scan".into(), "--pre-dump".into(), "-t".into(), pid.into()];
    scan.extend(more.iter().map(Into::into));
    scan.extend(["--track".into(), address.into()]);
    let mut write = vec!["ckpt-write".into(), target.path(name).into_os_string()];
    if let Some(parent) = parent {
        for words in [&mut scan, &mut write] {
            words.extend(["--parent".into(), target.path(parent).into_os_string()]);
        }
    }
    Pipeline::new(target.dir.path()).stage(scan).stage(write).run()
}

/// Processes change their memory in every way there is while it is copied; then every page of the checkpoint is
/// compared with theirs.
#[test]
fn what_was_copied_while_it_changed_is_never_stale() {
    copy_while_it_changes("memory_storm", How::default());
}

/// The same of what is stored once for a process and those that it forked, of which one writes and the others do not.
#[test]
fn what_was_copied_from_another_that_changed_it_is_never_stale() {
    copy_while_it_changes("memory_family", How { share: true, ..How::default() });
}

fn copy_while_it_changes(workload: &str, how: How) {
    let rounds: usize = std::env::var("CKPT_STORM_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let seed = std::env::var("CKPT_STORM_SEED").unwrap_or_else(|_| std::process::id().to_string());
    println!("CKPT_STORM_SEED={seed}");
    let target = Target::start_with(workload, &[&seed]);
    let more: &[&str] = if how.share { &["--share"] } else { &[] };
    let tracker = Tracker::start(&target);
    let storms = AtomicUsize::new(0);
    let (mut stored, mut total) = (0, 0);
    for round in 0..rounds {
        let names = ["a", "b", "full"].map(|name| format!("{name}{round}"));
        let before = (round > 0).then(|| format!("full{}", round - 1));
        let calm = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let storm = scope.spawn(|| {
                while !calm.load(Ordering::Relaxed) {
                    let number = storms.fetch_add(1, Ordering::Relaxed) + 1;
                    target.signal(Signal::SIGUSR1);
                    let line = format!("round {number}");
                    let done = soon(|| target.log().lines().any(|l| l == line));
                    assert!(done, "no {line}: {}", target.log());
                }
            });
            for (name, parent) in [(&names[0], before.as_deref()), (&names[1], Some(names[0].as_str()))] {
                let outcome = pre_dump_so(&target, &tracker.address, name, parent, more).ok("pre-dump");
                assert!(!outcome.said.contains("is full"), "{outcome}");
            }
            calm.store(true, Ordering::Relaxed);
            storm.join().expect("the storm");
        });
        let pids = process::tree(target.pid);
        pids.iter().for_each(|&pid| stop(pid));
        let outcome = dump_so(&target, &tracker.address, &names[2], Some(&names[1]), how).ok("dump");
        assert!(!outcome.said.contains("warning"), "{outcome}");
        let (own, all) = same_as_live(&target.path(&names[2]));
        stored += own;
        total += all;
        for pid in pids {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGCONT).expect("go on");
        }
    }
    let storms = storms.into_inner();
    println!("{stored} of {total} pages stored in {rounds} checkpoints, {storms} storms");
    assert!(stored * 10 < total * 9, "{stored} of {total} pages stored: pre-dumps are of no use");
    target.end();
    target.restore_ok(&format!("full{}", rounds - 1));
    target.end();
}

#[test]
fn a_pre_dump_is_no_checkpoint_but_the_parent_of_one() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let tracker = Tracker::start(&target);
    let _ = pre_dump(&target, &tracker.address, "0", None).ok("pre-dump");
    target.unchanged(&before);
    let _ = pre_dump(&target, &tracker.address, "1", Some("0")).ok("pre-dump");
    target.unchanged(&before);
    dump_ok(&target, &tracker.address, "2", Some("1"));
    let (own, all) = sizes(&target.path("2"));
    assert!(own * 20 < all, "{own} of {all} pages");
    let mut files: Vec<String> = fs::read_dir(target.path("0"))
        .expect("list")
        .map(|e| e.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    files.sort();
    let pagemap = format!("pagemap-{}.img", target.pid);
    assert_eq!(files, ["ckpt-manifest.img", "inventory.img", pagemap.as_str(), "pages-1.img", "stats-dump"]);
    // Without tracking it would be lost work, and without a writer's word the next one can't rely on it.
    let pid = target.pid.to_string();
    let line = format!("ckpt-scan -t {pid} --pre-dump --track nobody-{pid}");
    let _ =
        Pipeline::new(target.dir.path()).line(&line).stage(["cat"]).run().fails("ckpt-scan", 1, &["tracker"]);
    let line = format!("ckpt-scan -t {pid} --attach-timeout 0 --pre-dump --track {}", tracker.address);
    let to_restore = Pipeline::new(target.dir.path()).line(&line).stage(["ckpt-restore", "--detach"]).run();
    let _ = to_restore.fails("ckpt-restore", 3, &["pre-dump"]);
    let outcome = dump(&target, &tracker.address, "3", Some("2")).ok("dump");
    assert!(outcome.said.contains("is full"), "{outcome}");
    target.unchanged(&before);
    drop(tracker);
    target.end();
    for (name, stage) in [
        ("ckpt-restore", vec!["ckpt-restore".into(), "--detach".into(), target.path("1")]),
        ("ckpt-read", vec!["ckpt-read".into(), target.path("1")]),
        ("ckpt-merge", vec!["ckpt-merge".into(), target.path("1")]),
    ] {
        let outcome = Pipeline::new(target.dir.path()).stage(stage).stage(["cat"]).run();
        let _ = outcome.fails(name, 3, &["pre-dump", "increment of it"]);
    }
    let verify = ["ckpt-show".into(), "--verify".into(), target.path("1")];
    let _ = Pipeline::new(target.dir.path()).stage(verify).run().ok("verify a pre-dump");
    target.restore_ok("2");
    target.looks_like(&before);
    target.passes("the restored one");
    target.end();
    // In one directory: those before it are not needed any more.
    let merge = ["ckpt-merge".into(), "--in-place".into(), target.path("2")];
    let _ = Pipeline::new(target.dir.path()).stage(merge).run().ok("merge");
    for name in ["0", "1"] {
        fs::remove_dir_all(target.path(name)).expect("remove a pre-dump");
    }
    target.restore_ok("2");
    target.passes("the one from a merged directory");
}

fn names(target: &Target) -> Vec<String> {
    let entries = fs::read_dir(target.dir.path()).expect("list");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.contains("img"));
    names.sort();
    names
}

/// `ckpt dump --pre-dump`: rounds, and one directory in the end.
#[test]
fn rounds_end_in_one_directory() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let pid = target.pid.to_string();
    let run = |name: &str, more: &[&str]| {
        let words = ["ckpt".into(), "-x".into(), "dump".into(), "-t".into(), pid.clone().into(), "-D".into()];
        let words = words.into_iter().chain([target.path(name).into_os_string(), "--pre-dump=4".into()]);
        Pipeline::new(target.dir.path()).stage(words.chain(more.iter().map(Into::into))).run()
    };
    let outcome = run("img", &[]).ok("dump");
    assert!(outcome.said.matches("--pre-dump").count() >= 2, "{outcome}");
    assert_eq!(names(&target), ["img"]);
    let (own, all) = sizes(&target.path("img"));
    assert_eq!(own, all);
    target.unchanged(&before);
    let _ = run("packed", &["--compress", "zstd", "--share"]).ok("dump, compressed");
    let packed = fs::read_dir(target.path("packed")).expect("list").flatten().map(|file| file.file_name());
    assert!(packed.into_iter().any(|name| name == "ckpt-pages-1.img"));
    fs::rename(target.path("packed"), target.path("kept")).expect("rename");
    target.unchanged(&before);
    // The status is that of the stage that failed, and nothing is left behind.
    let _ = run("img2", &["--external", "999999"]).fails("ckpt", 1, &["999999"]);
    assert_eq!(names(&target), ["img"]);
    target.unchanged(&before);
    let _ = run("img3", &["--kill"]).ok("dump and kill");
    assert!(soon(|| process::is_free(target.pid)), "it is killed");
    assert_eq!(names(&target), ["img", "img3"]);
    for name in ["img", "kept", "img3"] {
        target.restore_ok(name);
        target.looks_like(&before);
        target.passes(name);
        target.end();
    }
}

/// Killed at any instant, the driver takes its stages with it, and what it leaves is a checkpoint or none.
#[test]
fn killed_rounds_leave_the_target() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let mut random = Random::new("killed_rounds");
    for round in 0..12 {
        let name = format!("img{round}");
        let mut child = Command::new(tool("ckpt"))
            .args(["dump", "--pre-dump", "-t", &target.pid.to_string(), "-D"])
            .arg(target.path(&name))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start ckpt");
        std::thread::sleep(Duration::from_micros(random.below(700_000)));
        let _ = child.kill();
        let _ = child.wait();
        target.unchanged(&before);
        let tracked = || process::text(target.pid, "smaps").lines().any(|l| l.ends_with(" uw"));
        assert!(soon(|| !tracked()), "the tracker does not end with the driver");
        if target.path(&name).exists() {
            let verify = ["ckpt-show".into(), "--verify".into(), target.path(&name)];
            let _ = Pipeline::new(target.dir.path()).stage(verify).run().ok("verify");
        }
        for left in names(&target) {
            let _ = fs::remove_dir_all(target.path(&left));
        }
    }
    target.passes("the target");
}
