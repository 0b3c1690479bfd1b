//! When a restored program runs its first instruction, with and without `ckpt-restore --lazy`.
//!
//! The program says so itself: a thread of it that looks at the clock all the time notes when it does so for the first
//! time after its memory has been asked to. Both restores are of the same images, in the same round. For the lazy one,
//! it is also told when all pages are in, and that the program finds its memory as it was.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_tests::{Target, process, soon, tool};
use nix::time::{ClockId, clock_gettime};

use crate::harness::{self, Peaks, ROUNDS, Tmpfs};

pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 3) << 20);
    let gap = dir.join("gap");
    let target = Target::start_with("memory_hog", &["-", &mib.to_string(), gap.to_str().expect("a path")]);
    let images = dir.join("img");
    let (pid, out) = (target.pid.to_string(), images.to_str().expect("a path").to_owned());
    let mut peaks = Peaks::new();
    harness::pipeline(&[&["ckpt-scan", "-t", &pid], &["ckpt-sk"], &["ckpt-write", &out]], Some(&mut peaks));
    let (mut fulls, mut lazies, mut completes) = (vec![], vec![], vec![]);
    let mut peaks = Peaks::new();
    for round in 0..=ROUNDS {
        let (full, _) = restore(&target, &gap, &images, false, &mut peaks);
        let (lazy, complete) = restore(&target, &gap, &images, true, &mut peaks);
        eprintln!("round {round}: full {full:.3?}, lazy {lazy:.3?}, all pages in after {complete:.3?}");
        if round > 0 {
            fulls.push(full.as_secs_f64());
            lazies.push(lazy.as_secs_f64());
            completes.push(complete.as_secs_f64());
        }
    }
    println!(
        "time to the first instruction, medians of {ROUNDS} rounds on tmpfs, each against its own full restore"
    );
    harness::yardstick("full restore", &fulls);
    harness::ratio("--lazy", &lazies, &fulls, 0.1);
    println!("{:<22}{:>9.3} s", "--lazy, all pages in", harness::median(completes));
    harness::peak_rows(&peaks, 64);
}

/// Microseconds on the clock that the program looks at.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock");
    let (seconds, nanos) = (time.tv_sec(), time.tv_nsec());
    u64::try_from(seconds * 1_000_000 + nanos / 1000).expect("after boot")
}

/// Restores in place of the running one; time until it ran, and until all pages were in.
fn restore(
    target: &Target,
    gap: &Path,
    images: &Path,
    lazy: bool,
    peaks: &mut Peaks,
) -> (Duration, Duration) {
    let pids = process::tree(target.pid);
    target.end();
    process::wait_free(&pids);
    harness::forget(gap);
    let said = target.path("said");
    let start = Instant::now();
    let began = now();
    let child = Command::new(tool("ckpt-restore"))
        .args(["--detach", "-v"])
        .args(lazy.then_some("--lazy"))
        .arg(images)
        .stdin(Stdio::null())
        .stderr(fs::File::create(&said).expect("make a file"))
        .spawn()
        .expect("start ckpt-restore");
    harness::watch(vec![("ckpt-restore".to_owned(), child)], peaks);
    let complete = || !lazy || fs::read_to_string(&said).is_ok_and(|text| text.contains("all pages are in"));
    while !complete() {
        assert!(start.elapsed() < Duration::from_secs(60), "the pages do not come");
        std::thread::sleep(Duration::from_millis(1));
    }
    let complete = start.elapsed();
    let first = || {
        let mut word = [0; 8];
        let file = fs::File::open(gap).expect("open what the target notes");
        file.read_exact_at(&mut word, 16).expect("read what the target notes");
        u64::from_ne_bytes(word)
    };
    assert!(soon(|| first() > 0), "it does not run");
    target.passes("the restored one");
    (Duration::from_micros(first().saturating_sub(began)), complete)
}
