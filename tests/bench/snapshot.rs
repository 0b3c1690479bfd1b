//! How long `ckpt-scan --snapshot` stops a process, next to a fork(2) that the same process makes itself.
//!
//! Both are what the program feels: the time that its call took, and the longest time for which a thread of it that only
//! looks at the clock did not get to run.

use std::{
    fs,
    time::{Duration, Instant},
};

use ckpt_tests::{Target, soon};
use nix::sys::signal::Signal;

use crate::harness::{self, Peaks, ROUNDS, Tmpfs};

/// Beyond half a fork more, what reading a process's state may take.
const STATE: f64 = 0.005;

pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 3) << 20);
    let gap = dir.join("gap");
    let target = Target::start_with("memory_hog", &["-", &mib.to_string(), gap.to_str().expect("a path")]);
    let (mut forks, mut freezes, mut totals) = (vec![], vec![], vec![]);
    let mut peaks = Peaks::new();
    for round in 0..=ROUNDS {
        harness::forget(&gap);
        target.signal(Signal::SIGUSR2);
        assert!(soon(|| harness::felt(&gap).1 > Duration::ZERO), "it does not fork");
        let fork = harness::felt(&gap).1;
        harness::forget(&gap);
        let images = dir.join("img");
        let (pid, out) = (target.pid.to_string(), images.to_str().expect("a path").to_owned());
        let start = Instant::now();
        let scan = ["ckpt-scan", "--snapshot", "-t", &pid];
        harness::pipeline(&[&scan, &["ckpt-sk"], &["ckpt-write", &out]], (round == 0).then_some(&mut peaks));
        let total = start.elapsed();
        let freeze = harness::felt(&gap).0;
        fs::remove_dir_all(&images).expect("remove the images");
        eprintln!("round {round}: fork {fork:.3?}, frozen {freeze:.3?}, dump {total:.3?}");
        // The first round warms caches up that the files did not.
        if round > 0 {
            forks.push(fork.as_secs_f64());
            freezes.push(freeze.as_secs_f64());
            totals.push(total.as_secs_f64());
        }
    }
    target.passes("the target");
    println!("medians of {ROUNDS} rounds on tmpfs, each round against its own fork");
    harness::yardstick("fork", &forks);
    let beyond: Vec<f64> = freezes.iter().map(|freeze| (freeze - STATE).max(0.0)).collect();
    harness::ratio("frozen, less 5 ms", &beyond, &forks, 1.5);
    println!("{:<22}{:>9.3} s", "dump, total", harness::median(totals));
    harness::peak_rows(&peaks, 64);
}
