//! What a checkpoint and a restore cost, next to `cp` of the same bytes.
//!
//! One process with incompressible 4 KiB pages is dumped to tmpfs and restored from it, a few times over. Each round
//! measures its own yardstick, `cp` of the pages' file within the same tmpfs, so that a machine that is busy or has slow
//! memory shows in both.
//!
//! The freeze is what the program itself feels: the longest time for which a thread of it that does nothing but look at
//! the clock did not get to run. Peak memory is each tool's VmHWM, read until it ends in a round that is not timed.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_tests::{Target, process, tool};

use crate::harness::{self, Peaks, ROUNDS, Reserve, Tmpfs};

pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    let reserve = Reserve::new();

    let gap = dir.join("gap");
    let target = Target::start_with("memory_hog", &["-", &mib.to_string(), gap.to_str().expect("a path")]);
    let (mut cps, mut totals, mut freezes, mut restores) = (vec![], vec![], vec![], vec![]);
    let mut peaks = Peaks::new();
    let mut bytes = 0;
    for round in 0..=ROUNDS {
        // The first round warms caches up that the files did not. It is watched, and not timed.
        let timed = round > 0;
        harness::forget(&gap);
        let mut freeze = Duration::ZERO;
        // Read before the restore: the program has not run for that long either.
        let trip = round_trip(
            &target,
            &dir,
            || reserve.fill(),
            (!timed).then_some(&mut peaks),
            || freeze = harness::felt(&gap).0,
        );
        bytes = trip.bytes;
        if timed {
            cps.push(trip.cp.as_secs_f64());
            totals.push(trip.dump.as_secs_f64());
            freezes.push(freeze.as_secs_f64());
            restores.push(trip.restore.as_secs_f64());
        }
        let Trip { cp, dump, restore, .. } = trip;
        eprintln!("round {round}: cp {cp:.3?}, dump {dump:.3?}, frozen {freeze:.3?}, restore {restore:.3?}");
    }
    target.end();
    drop(target);

    println!(
        "{} MiB of pages, medians of {ROUNDS} rounds on tmpfs, each round against its own cp",
        bytes >> 20
    );
    harness::yardstick("cp", &cps);
    harness::ratio("dump, total", &totals, &cps, 1.1);
    harness::ratio("dump, frozen", &freezes, &cps, 1.1);
    harness::ratio("restore", &restores, &cps, 1.1);
    harness::peak_rows(&peaks, 64);
}

/// What one dump, one `cp` of what it wrote and one restore took.
pub struct Trip {
    /// Of all pages files.
    pub bytes: u64,
    pub dump: Duration,
    pub cp: Duration,
    pub restore: Duration,
}

/// Dumps `target` into `dir`, calls `dumped`, ends the target, copies the pages, restores it and has it check
/// itself. Never are there more than two of the process, its images and their copy, so large ones fit too. Leaves nothing in
/// `dir`. `before_step` sees to it that dump, copy and restore find memory that has been in use just before.
pub fn round_trip(
    target: &Target,
    dir: &Tmpfs,
    before_step: impl Fn(),
    mut peaks: Option<&mut Peaks>,
    dumped: impl FnOnce(),
) -> Trip {
    let pids = process::tree(target.pid);
    let images = dir.join("img");
    let images_arg = images.to_str().expect("a path");
    let pid = target.pid.to_string();
    before_step();
    let start = Instant::now();
    harness::pipeline(
        &[&["ckpt-scan", "-t", &pid], &["ckpt-sk"], &["ckpt-write", images_arg]],
        peaks.as_deref_mut(),
    );
    let dump = start.elapsed();
    dumped();
    target.end();
    process::wait_free(&pids);

    let pages = fs::read_dir(&images).expect("list images").flatten().map(|f| f.path());
    let pages: Vec<PathBuf> =
        pages.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pages-"))).collect();
    let bytes = pages.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
    let copy = dir.join("copy");
    fs::create_dir(&copy).expect("make a directory");
    before_step();
    let start = Instant::now();
    let status = Command::new("cp").args(&pages).arg(&copy).status().expect("run cp");
    let cp = start.elapsed();
    assert!(status.success(), "cp: {status}");
    fs::remove_dir_all(&copy).expect("remove the copy");

    before_step();
    let start = Instant::now();
    let restore = Command::new(tool("ckpt-restore"))
        .arg("--detach")
        .arg(&images)
        .stderr(Stdio::null())
        .spawn()
        .expect("start ckpt-restore");
    harness::finish(vec![("ckpt-restore".to_owned(), restore)], peaks);
    let restore = start.elapsed();
    target.passes("the restored one");
    fs::remove_dir_all(&images).expect("remove the images");
    Trip { bytes, dump, cp, restore }
}
