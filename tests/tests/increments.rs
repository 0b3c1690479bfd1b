//! Tracking and incremental checkpoints: nothing that was written is ever missed.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{MmEntry, PstreeEntry},
};
use ckpt_tests::{Outcome, Pipeline, Target, process, soon, tool};
use nix::sys::signal::Signal;

/// A `ckpt-track` at work.
struct Tracker {
    child: Child,
    address: String,
}

impl Tracker {
    fn start(target: &Target) -> Self {
        let address = format!("ckpt-test-track-{}", target.pid);
        let said = File::create(target.path("track.out")).expect("make a file");
        let child = Command::new(tool("ckpt-track"))
            .args(["-t", &target.pid.to_string(), "--address", &address])
            .stdin(Stdio::null())
            .stdout(said)
            .spawn()
            .expect("start ckpt-track");
        let ready = soon(|| fs::read_to_string(target.path("track.out")).is_ok_and(|s| s.trim() == address));
        assert!(ready, "ckpt-track is not ready");
        Self { child, address }
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.end();
    }
}

/// A tracked checkpoint NAME, an increment of PARENT if that is given.
fn dump(target: &Target, address: &str, name: &str, parent: Option<&str>) -> Outcome {
    let pid = target.pid.to_string();
    let mut scan = vec!["ckpt-scan".into(), "-t".into(), pid.into(), "--track".into(), address.into()];
    let mut write = vec!["ckpt-write".into(), target.path(name).into_os_string()];
    if let Some(parent) = parent {
        for words in [&mut scan, &mut write] {
            words.extend(["--parent".into(), target.path(parent).into_os_string()]);
        }
    }
    Pipeline::new(target.dir.path()).stage(scan).stage(["ckpt-sk"]).stage(write).run()
}

fn dump_ok(target: &Target, address: &str, name: &str, parent: Option<&str>) {
    let outcome = dump(target, address, name, parent).ok("dump");
    assert!(!outcome.said.contains("warning"), "{outcome}");
}

/// Pages stored in the directory itself, and pages of the whole chain.
fn sizes(dir: &Path) -> (u64, u64) {
    let set = ImageSet::from_chain(dir).expect("read the images");
    let mut own = 0;
    let mut all = 0;
    for arg in set.args(Image::Pagemap) {
        for run in set.page_runs(Image::Pagemap, arg).expect("resolve the pages") {
            all += run.len / 4096;
            own += if run.file.level == 0 { run.len / 4096 } else { 0 };
        }
    }
    (own, all)
}

fn stop(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).expect("stop a process");
    assert!(soon(|| process::state(pid) == Some('T')), "{pid} does not stop");
}

/// Compares every page of every private mapping with the memory of the processes, which are stopped.
fn same_as_live(dir: &Path) -> (u64, u64) {
    let set = ImageSet::from_chain(dir).expect("read the images");
    set.verify_pages().expect("checksums");
    let tasks = set.all::<PstreeEntry>(Image::Pstree, 0).expect("a tree");
    let mut pages = 0;
    for task in &tasks {
        let pid = u64::from(task.pid);
        let mm = set.one::<MmEntry>(Image::Mm, pid).expect("an address space");
        let runs = set.page_runs(Image::Pagemap, pid).expect("resolve the pages");
        let live = File::open(format!("/proc/{pid}/mem")).expect("open the memory");
        // What is not in the images is what a fresh mapping has.
        let vmas = mm.vmas.iter().filter(|vma| {
            vma.status & (1 << 9 | 1 << 6) != 0 && vma.status & (1 << 2 | 1 << 3 | 1 << 12) == 0
        });
        for vma in vmas {
            let file = (vma.status & (1 << 6) != 0).then(|| {
                File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end)).expect("the file")
            });
            let mut at = vma.start;
            while at < vma.end {
                let i = runs.partition_point(|run| run.addr + run.len <= at);
                let run = runs.get(i).filter(|run| run.addr <= at);
                let mut want = vec![0; 4096];
                if let Some(run) = run {
                    let place = set.pages_in(run.file).expect("a pages file");
                    let offset = place.offset + run.offset + (at - run.addr);
                    File::from(place.file.try_clone_to_owned().expect("clone"))
                        .read_exact_at(&mut want, offset)
                        .expect("read a page");
                    pages += 1;
                } else if let Some(file) = &file {
                    let _ = file.read_at(&mut want, vma.pgoff + (at - vma.start)).expect("read the file");
                }
                let mut have = vec![0; 4096];
                match live.read_exact_at(&mut have, at) {
                    Ok(()) => {}
                    // Beyond the end of a mapped file, and the guard below a stack.
                    Err(_) if run.is_none() => {
                        at += 4096;
                        continue;
                    }
                    Err(e) => panic!("read pid {pid} at {at:#x}: {e}"),
                }
                let from = run.map(|run| run.file.level);
                assert!(
                    have == want,
                    "{}: pid {pid} page {at:#x}, from level {from:?}, area {vma:?}",
                    dir.display()
                );
                at += 4096;
            }
        }
    }
    let (own, all) = sizes(dir);
    assert!(pages <= all);
    (own, all)
}

/// Thousands of operations on memory between checkpoints, each of which is compared page by page.
#[test]
fn no_write_is_ever_missed() {
    let rounds: usize = std::env::var("CKPT_STORM_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(30);
    let seed = std::env::var("CKPT_STORM_SEED").unwrap_or_else(|_| std::process::id().to_string());
    println!("CKPT_STORM_SEED={seed}");
    let target = Target::start_with("memory_storm", &[&seed]);
    let tracker = Tracker::start(&target);
    let (mut stored, mut total) = (0, 0);
    for round in 1..=rounds {
        target.signal(Signal::SIGUSR1);
        target.wait_log(&format!("round {round}"));
        let pids = process::tree(target.pid);
        pids.iter().for_each(|&pid| stop(pid));
        let name = round.to_string();
        let parent = (round - 1).to_string();
        dump_ok(&target, &tracker.address, &name, (round > 1).then_some(&parent));
        let (own, all) = same_as_live(&target.path(&name));
        if round > 1 {
            stored += own;
            total += all;
        }
        for pid in pids {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGCONT).expect("go on");
        }
    }
    println!("{stored} of {total} pages stored in {} increments", rounds - 1);
    assert!(stored * 10 < total * 9, "{stored} of {total} pages stored: nothing is tracked");
    // An increment restores like any other checkpoint.
    let last = rounds.to_string();
    target.end();
    target.restore_ok(&last);
    target.end();
}

#[test]
fn an_increment_survives_like_a_full_checkpoint() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let tracker = Tracker::start(&target);
    target.unchanged(&before);
    dump_ok(&target, &tracker.address, "1", None);
    dump_ok(&target, &tracker.address, "2", Some("1"));
    dump_ok(&target, &tracker.address, "3", Some("2"));
    let (own, all) = sizes(&target.path("3"));
    assert!(own * 20 < all, "{own} of {all} pages");
    target.end();
    target.restore_ok("3");
    target.looks_like(&before);
    target.passes("the restored one");
    target.end();
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("3")])
        .stage(["ckpt-restore", "--detach"])
        .run();
    let _ = outcome.ok("restore from a stream");
    target.looks_like(&before);
    target.passes("the one restored from a stream");
}

#[test]
fn a_merged_chain_survives_without_its_ancestors() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let tracker = Tracker::start(&target);
    dump_ok(&target, &tracker.address, "1", None);
    dump_ok(&target, &tracker.address, "2", Some("1"));
    dump_ok(&target, &tracker.address, "3", Some("2"));
    drop(tracker);
    target.end();
    let merge = |words: &[&str]| {
        let paths = words.iter().map(|word| match word.strip_prefix('=') {
            Some(name) => target.path(name).into_os_string(),
            None => word.into(),
        });
        Pipeline::new(target.dir.path()).stage(std::iter::once("ckpt-merge".into()).chain(paths)).run()
    };
    let survives = |name: &str| {
        target.restore_ok(name);
        target.looks_like(&before);
        target.passes(name);
        target.end();
    };
    let _ = merge(&["=3", "=full"]).ok("merge");
    assert_eq!(sizes(&target.path("full")).0, sizes(&target.path("3")).1);
    let _ = merge(&["--onto", "=1", "=3", "=onto"]).ok("merge onto the first");
    let _ = merge(&["--dedup", "=3"]).ok("free");
    survives("3");
    survives("onto");
    let _ = merge(&["--in-place", "=3"]).ok("merge in place");
    for name in ["1", "2", "onto"] {
        fs::remove_dir_all(target.path(name)).expect("remove a checkpoint");
    }
    survives("3");
    survives("full");
}

#[test]
fn what_can_not_be_an_increment_is_full_and_says_so() {
    let target = Target::start("memory_private");
    let mut tracker = Tracker::start(&target);
    let full = |outcome: Outcome, why: &str, name: &str| {
        let outcome = outcome.ok("dump");
        assert!(outcome.said.contains(why), "{outcome}");
        let (own, all) = sizes(&target.path(name));
        assert_eq!(own, all, "{outcome}");
        assert!(!target.path(name).join("parent").exists());
    };
    dump_ok(&target, &tracker.address, "1", None);
    // It fails after the marks have been taken off: the disk is full, say.
    let failed = Pipeline::new(target.dir.path())
        .stage(
            ["ckpt-scan", "-t", &target.pid.to_string(), "--track", &tracker.address, "--parent"]
                .map(Into::into)
                .into_iter()
                .chain([target.path("1").into_os_string()]),
        )
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), target.path("1")])
        .run();
    assert_ne!(failed.code("ckpt-write"), 0, "{failed}");
    full(dump(&target, &tracker.address, "2", Some("1")), "has not become durable", "2");
    dump_ok(&target, &tracker.address, "3", Some("2"));
    full(dump(&target, &tracker.address, "4", Some("2")), "another one", "4");
    // A stream of an increment is no checkpoint by itself, nor with another parent.
    let pid = target.pid.to_string();
    for parent in [None, Some("1")] {
        let mut write = vec!["ckpt-write".into(), target.path("5").into_os_string()];
        if let Some(parent) = parent {
            write.extend(["--parent".into(), target.path(parent).into_os_string()]);
        }
        dump_ok(&target, &tracker.address, &format!("new{parent:?}"), None);
        let scan = ["ckpt-scan", "-t", &pid, "--track", &tracker.address, "--parent"].map(Into::into);
        let scan = scan.into_iter().chain([target.path(&format!("new{parent:?}")).into_os_string()]);
        let outcome = Pipeline::new(target.dir.path()).stage(scan).stage(["ckpt-sk"]).stage(write).run();
        let _ = outcome.fails("ckpt-write", 3, &["increment"]);
        assert!(!target.path("5").exists());
    }
    // Without tracking it says what to do.
    let _ = target.dump("6").fails("ckpt-scan", 3, &["userfaultfd", "--track"]);
    tracker.end();
    full(dump(&target, &tracker.address, "7", Some("3")), "no tracker", "7");
    target.passes("the target");
    let uw =
        process::text(target.pid, "smaps").lines().any(|l| l.starts_with("VmFlags") && l.contains(" uw"));
    assert!(!uw, "nothing is left of the tracking");
}
