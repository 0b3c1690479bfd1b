//! `ckpt-merge --dedup`: pages that are equal share their room where the file system can do that, and nothing else changes.
//!
//! The file systems are made in files and mounted in a mount namespace of the test's own, with which they go.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::Path,
    process::Command,
};

use ckpt_tests::{Outcome, Pipeline, Target, TestDir, installed, process, skip};
use nix::{
    sched::{CloneFlags, unshare},
    sys::statvfs::statvfs,
};
use serde_json::Value;

fn run(program: &str, words: &[&str], path: &Path) -> bool {
    let output = Command::new(program).args(words).arg(path).output();
    output.is_ok_and(|output| output.status.success())
}

/// Runs `work` in a new file system of the kind that `mkfs` makes, or skips the test.
fn mounted(test: &str, mkfs: &str, work: impl FnOnce(&Path) + Send) {
    if !installed(mkfs) {
        return skip(test, &format!("no {mkfs}"));
    }
    let dir = TestDir::new("mounted");
    let (disk, place) = (dir.path().join("disk"), dir.path().join("place"));
    fs::create_dir(&place).expect("make a directory");
    File::create(&disk).and_then(|file| file.set_len(512 << 20)).expect("make a disk");
    assert!(run(mkfs, &["-q"], &disk), "{mkfs}");
    std::thread::scope(|threads| {
        let thread = threads.spawn(|| {
            // A thread that shares its working directory with others can't have mounts of its own.
            let alone = unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).is_ok()
                && run("mount", &["--make-rprivate"], Path::new("/"));
            if !alone || !run("mount", &["-o", "loop", &disk.display().to_string()], &place) {
                return skip(test, "no loop device, or the kernel lacks the file system");
            }
            work(&place);
            run("umount", &["-l"], &place);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Bytes in use, when everything is on disk.
fn used(place: &Path) -> u64 {
    run("sync", &["-f"], place);
    let stat = statvfs(place).expect("statvfs");
    (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
}

fn merge(target: &Target, dir: &Path, stats: &Path) -> Outcome {
    let words: [OsString; 5] =
        ["ckpt-merge".into(), "--dedup".into(), "--stats".into(), stats.into(), dir.into()];
    Pipeline::new(target.dir.path()).stage(words).run()
}

fn dump(target: &Target, dir: &Path) {
    let pid = target.pid.to_string();
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), dir.to_owned()])
        .run()
        .ok("dump");
}

fn shared(stats: &Path) -> u64 {
    let stats: Value = serde_json::from_slice(&fs::read(stats).expect("read the figures")).expect("JSON");
    stats.pointer("/bytes/shared").and_then(Value::as_u64).unwrap_or_else(|| panic!("{stats}"))
}

/// Five processes that have the same 4 MiB, dumped twice: in each directory all is there five times, and the two
/// are the same.
fn pages_are_shared(place: &Path) {
    const MIB: u64 = 1 << 20;
    let target = Target::start_with("workers", &["-", "4", "4"]);
    let pids = process::tree(target.pid);
    let (first, second, stats) = (place.join("1"), place.join("2"), target.path("stats"));
    dump(&target, &first);
    dump(&target, &second);
    let before = used(place);
    let said = merge(&target, &second, &stats).ok("ckpt-merge").said;
    assert!(!said.contains("stay as they are"), "{said}");
    let after = used(place);
    let bytes = shared(&stats);
    assert!(bytes > 34 * MIB, "{bytes} bytes are shared");
    // btrfs frees whole extents only.
    assert!(before - after > 18 * MIB, "{before} bytes before, {after} after");
    let _ = merge(&target, &second, &stats).ok("again");
    assert_eq!(shared(&stats), bytes);
    target.end();
    process::wait_free(&pids);
    for dir in [&first, &second] {
        let words =
            |line: &str| line.split(' ').map(Into::into).chain([dir.into()]).collect::<Vec<OsString>>();
        let _ = Pipeline::new(target.dir.path()).stage(words("ckpt-show --verify")).run().ok("verify");
        let _ = Pipeline::new(target.dir.path()).stage(words("ckpt-restore --detach")).run().ok("restore");
        target.passes("the restored one");
        target.end();
        process::wait_free(&pids);
    }
}

#[test]
fn equal_pages_share_room_on_btrfs() {
    mounted("equal_pages_share_room_on_btrfs", "mkfs.btrfs", pages_are_shared);
}

#[test]
fn equal_pages_share_room_on_xfs() {
    mounted("equal_pages_share_room_on_xfs", "mkfs.xfs", pages_are_shared);
}

/// tmpfs has no shared room: said, nothing read, nothing changed.
#[test]
fn elsewhere_equal_pages_stay_as_they_are() {
    let target = Target::start_with("workers", &["-", "1", "1"]);
    let place = tempfile::Builder::new().prefix("ckpt-equal").tempdir_in("/dev/shm").expect("a directory");
    let (first, second, stats) = (place.path().join("1"), place.path().join("2"), target.path("stats"));
    dump(&target, &first);
    dump(&target, &second);
    let pages = || fs::read(second.join("pages-1.img")).expect("read");
    let before = pages();
    let said = merge(&target, &second, &stats).ok("ckpt-merge").said;
    assert!(said.contains("equal pages stay as they are"), "{said}");
    assert_eq!(shared(&stats), 0);
    assert!(pages() == before);
}
