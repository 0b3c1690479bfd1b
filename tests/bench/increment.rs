//! Tracked checkpoints: how long a process is stopped for an increment, next to a full checkpoint of the same process,
//! and how many checkpoints a series makes of a small one.
//!
//! The time is what `ckpt-scan` says of its own freeze, which an observer of two processors can't disturb much.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use ckpt_tests::{Target, soon, tool};
use nix::sys::signal::Signal;

use crate::harness::{self, ROUNDS, Tmpfs, median, verdict};

pub fn run(mib: u64) {
    freeze(mib);
    series();
}

/// `ckpt-series` on `target`: lines in, numbers out, and how long each freeze took.
struct Series {
    child: std::process::Child,
    numbers: BufReader<std::process::ChildStdout>,
    errors: std::path::PathBuf,
}

impl Series {
    fn start(target: &Target, dir: &Path, args: &[&str]) -> Self {
        let errors = target.path("series.err");
        let mut child = Command::new(tool("ckpt-series"))
            .args(["-v", "-t", &target.pid.to_string(), "-D"])
            .arg(dir)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors).expect("make a file"))
            .spawn()
            .expect("start ckpt-series");
        let numbers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, numbers, errors }
    }

    fn make(&mut self) {
        self.child.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("ask for a checkpoint");
        let mut line = String::new();
        self.numbers.read_line(&mut line).expect("read a number");
        assert!(!line.is_empty(), "{}", fs::read_to_string(&self.errors).unwrap_or_default());
    }

    /// Ends it; seconds of each freeze.
    fn end(mut self) -> Vec<f64> {
        drop(self.child.stdin.take());
        let status = self.child.wait().expect("wait for ckpt-series");
        let said = fs::read_to_string(&self.errors).expect("read what it says");
        assert!(status.success(), "{said}");
        let frozen = |line: &str| line.split_once("frozen for ")?.1.strip_suffix(" ms")?.parse::<f64>().ok();
        said.lines().filter_map(frozen).map(|ms| ms / 1000.0).collect()
    }
}

fn dirty(target: &Target, round: usize) {
    target.signal(Signal::SIGUSR2);
    let line = format!("dirty {round}");
    assert!(soon(|| target.log().lines().any(|l| l == line)), "it does not write");
}

fn freeze(mib: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 4) << 20);
    let pages = (mib << 8) / 100;
    let target = Target::start_with("memory_dirt", &["-", &mib.to_string(), &pages.to_string()]);
    let (mut full, mut tracked) = (vec![], vec![]);
    for round in 0..=ROUNDS {
        let images = dir.join(&format!("series-{round}"));
        let mut series = Series::start(&target, &images, &["--no-snapshot"]);
        series.make();
        dirty(&target, round + 1);
        series.make();
        let times = series.end();
        fs::remove_dir_all(&images).expect("remove the images");
        eprintln!("round {round}: full {:.4} s, 1% dirty {:.4} s", times[0], times[1]);
        if round > 0 {
            full.push(times[0]);
            tracked.push(times[1]);
        }
    }
    target.passes("the target");
    println!("medians of {ROUNDS} rounds on tmpfs, each round against its own full checkpoint");
    harness::yardstick("frozen, full", &full);
    harness::ratio("frozen, 1% dirty", &tracked, &full, 0.05);
}

/// 16 MiB, 20 dirty pages each time.
fn series() {
    const COUNT: usize = 400;
    let dir = Tmpfs::new();
    let target = Target::start_with("memory_dirt", &["-", "16", "20"]);
    let mut series = Series::start(&target, &dir.join("series"), &[]);
    series.make();
    let start = Instant::now();
    for round in 0..COUNT {
        dirty(&target, round + 1);
        series.make();
    }
    let took = start.elapsed();
    let times = series.end();
    target.passes("the target");
    let count = f64::from(u32::try_from(COUNT).expect("a small number"));
    println!(
        "{:<22}{:>9.1} /s, as fast as it goes, 16 MiB, 20 dirty pages",
        "checkpoints",
        count / took.as_secs_f64()
    );
    let each = times.iter().skip(1).sum::<f64>() / count;
    let share = each * 20.0;
    println!(
        "{:<22}{:>9.3} ms (median {:.3})",
        "frozen, mean",
        each * 1000.0,
        median(times[1..].to_vec()) * 1000.0
    );
    println!(
        "{:<22}{:>9.1} %{:>40}",
        "stopped at 20/s",
        share * 100.0,
        format!("<= 5 {}", verdict(share <= 0.05))
    );
    let size: u64 = walk(&dir.join("series"));
    println!(
        "{:<22}{:>9.1} KiB each",
        "disk",
        f64::from(u32::try_from(size >> 10).unwrap_or(u32::MAX)) / count
    );
}

/// Bytes of all files below `dir`.
fn walk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("list").flatten();
    entries.map(|e| e.metadata().map_or(0, |m| if m.is_dir() { walk(&e.path()) } else { m.len() })).sum()
}
