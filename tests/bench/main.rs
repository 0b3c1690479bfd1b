//! What a checkpoint and a restore cost, next to `cp` of the same bytes.
//!
//!     bench [MIB]
//!
//! One process with MIB (1024) of incompressible 4 KiB pages is dumped to tmpfs and restored from it, a few times over.
//! Each round measures its own yardstick, `cp` of the pages' file within the same tmpfs, so that a machine that is busy
//! or has slow memory shows in both. Before the first round as much memory is touched and freed as all of it will need:
//! the first touch of memory that a virtual machine has not used yet costs many times a normal page fault.
//!
//! The freeze is what the program itself feels: the longest time for which a thread of it that does nothing but look at
//! the clock did not get to run. Peak memory is each tool's VmHWM, read until it ends.

#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_tests::{Target, process, tool};

const ROUNDS: usize = 5;

fn tmpfs() -> PathBuf {
    // tmpfs is what /dev/shm is everywhere that this is likely to run.
    PathBuf::from("/dev/shm").join(format!("ckpt-bench-{}", std::process::id()))
}

/// Touches `bytes` of memory as a file and gives it back.
fn warm_up(dir: &Path, bytes: u64) {
    let path = dir.join("warm-up");
    let mut file = fs::File::create(&path).expect("make a file on tmpfs");
    let block = vec![0x5a_u8; 4 << 20];
    for _ in 0..bytes / (4 << 20) {
        file.write_all(&block).expect("tmpfs has room for four times the target's memory");
    }
    drop(file);
    fs::remove_file(&path).expect("remove the warm-up file");
}

/// Waits for a pipeline, watching each stage's peak memory.
fn watch(mut stages: Vec<(&'static str, Child)>, peaks: &mut BTreeMap<&'static str, u64>) {
    let mut left = stages.len();
    let mut ended = vec![false; left];
    while left > 0 {
        for (index, (name, child)) in stages.iter_mut().enumerate() {
            if ended[index] {
                continue;
            }
            let status = process::text(i32::try_from(child.id()).expect("a pid"), "status");
            let exe_is_tool = status.starts_with(&format!("Name:\t{name}"));
            let hwm = status
                .lines()
                .find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            if let (true, Some(kib)) = (exe_is_tool, hwm) {
                let peak = peaks.entry(name).or_default();
                *peak = (*peak).max(kib);
            }
            if let Some(status) = child.try_wait().expect("wait for a stage") {
                assert!(status.success(), "{name}: {status}");
                ended[index] = true;
                left -= 1;
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn dump(pid: i32, out: &Path, peaks: &mut BTreeMap<&'static str, u64>) {
    let mut scan = Command::new(tool("ckpt-scan"))
        .args(["-t", &pid.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start ckpt-scan");
    let mut sk = Command::new(tool("ckpt-sk"))
        .stdin(scan.stdout.take().expect("a pipe"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("start ckpt-sk");
    let write = Command::new(tool("ckpt-write"))
        .arg(out)
        .stdin(sk.stdout.take().expect("a pipe"))
        .spawn()
        .expect("start ckpt-write");
    watch(vec![("ckpt-scan", scan), ("ckpt-sk", sk), ("ckpt-write", write)], peaks);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Default)]
struct Columns {
    cp: Vec<f64>,
    total: Vec<f64>,
    freeze: Vec<f64>,
    restore: Vec<f64>,
}

impl Columns {
    fn row(&self, name: &str, times: &[f64], target: f64) {
        let ratios: Vec<f64> = times.iter().zip(&self.cp).map(|(t, cp)| t / cp).collect();
        let ratio = median(ratios.clone());
        let (low, high) = ratios.iter().fold((f64::MAX, 0.0_f64), |(l, h), &r| (l.min(r), h.max(r)));
        let verdict = if ratio <= target { "met" } else { "MISSED" };
        println!(
            "{name:<22}{:>9.3} s{ratio:>9.2} x cp  ({low:.2} to {high:.2}){:>12}",
            median(times.to_vec()),
            format!("<= {target} {verdict}")
        );
    }
}

fn main() {
    let mib: u64 = std::env::args().nth(1).map_or(1024, |a| a.parse().expect("a number of MiB"));
    let dir = tmpfs();
    fs::create_dir_all(&dir).expect("make a directory on tmpfs");
    eprintln!("warming up: touching {} MiB", mib * 4);
    warm_up(&dir, (mib * 4) << 20);

    let gap = dir.join("gap");
    let target = Target::start_with("memory_hog", &["-", &mib.to_string(), gap.to_str().expect("a path")]);
    let pids = process::tree(target.pid);
    let felt = || u64::from_ne_bytes(fs::read(&gap).expect("read the gap").try_into().expect("eight bytes"));
    let forget = || {
        fs::OpenOptions::new()
            .write(true)
            .open(&gap)
            .and_then(|mut f| f.write_all(&0_u64.to_ne_bytes()))
            .expect("reset the gap")
    };

    let mut columns = Columns::default();
    let mut peaks = BTreeMap::new();
    let mut bytes = 0;
    for round in 0..=ROUNDS {
        let images = dir.join("img");
        forget();
        let start = Instant::now();
        dump(target.pid, &images, &mut peaks);
        let total = start.elapsed();
        let freeze = Duration::from_micros(felt());

        let pages = fs::read_dir(&images).expect("list images").flatten().map(|f| f.path());
        let pages: Vec<PathBuf> = pages
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pages-")))
            .collect();
        bytes = pages.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
        let copy = dir.join("copy");
        fs::create_dir(&copy).expect("make a directory");
        let start = Instant::now();
        let status = Command::new("cp").args(&pages).arg(&copy).status().expect("run cp");
        let cp = start.elapsed();
        assert!(status.success(), "cp: {status}");
        fs::remove_dir_all(&copy).expect("remove the copy");

        target.end();
        process::wait_free(&pids);
        let start = Instant::now();
        let restore = Command::new(tool("ckpt-restore"))
            .arg("--detach")
            .arg(&images)
            .stderr(Stdio::null())
            .spawn()
            .expect("start ckpt-restore");
        watch(vec![("ckpt-restore", restore)], &mut peaks);
        let restored = start.elapsed();
        target.passes("the restored one");
        fs::remove_dir_all(&images).expect("remove the images");

        // The first round warms caches up that the files did not.
        if round > 0 {
            columns.cp.push(cp.as_secs_f64());
            columns.total.push(total.as_secs_f64());
            columns.freeze.push(freeze.as_secs_f64());
            columns.restore.push(restored.as_secs_f64());
        }
        eprintln!(
            "round {round}: cp {cp:.3?}, dump {total:.3?}, frozen {freeze:.3?}, restore {restored:.3?}"
        );
    }
    target.end();
    drop(target);
    fs::remove_dir_all(&dir).expect("remove the directory");

    println!(
        "{} MiB of pages, medians of {ROUNDS} rounds on tmpfs, each round against its own cp",
        bytes >> 20
    );
    println!("{:<22}{:>9.3} s{:>9.2} x cp", "cp", median(columns.cp.clone()), 1.0);
    columns.row("dump, total", &columns.total, 1.3);
    columns.row("dump, frozen", &columns.freeze, 1.3);
    columns.row("restore", &columns.restore, 1.3);
    for (name, kib) in &peaks {
        let verdict = if *kib < 64 << 10 { "met" } else { "MISSED" };
        println!(
            "{:<22}{:>9.1} MiB{:>40}",
            format!("peak of {name}"),
            f64::from(u32::try_from(*kib).unwrap_or(u32::MAX)) / 1024.0,
            format!("< 64 {verdict}")
        );
    }
}
