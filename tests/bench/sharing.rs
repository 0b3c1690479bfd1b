//! Workers forked by a process over memory that it has filled: what all of them take together, and what their images take,
//! next to what they took before.
//!
//! Memory is the sum of each process's proportional share (`Pss` in smaps_rollup). The images are made with `--share`;
//! without, each worker's pages are stored, and are shared again by the restore all the same.

use std::time::Instant;

use ckpt_tests::{Target, process, tool};

use crate::harness::{self, Tmpfs, verdict};

const WORKERS: u64 = 50;
const TARGET: f64 = 1.1;

pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 3) << 20);
    let target =
        Target::start_with("workers", &["-", &WORKERS.to_string(), &mib.to_string(), "first page of a MiB"]);
    let pids = process::tree(target.pid);
    let before = process::pss(target.pid);
    let images = dir.join("img");
    let (pid, images_arg) = (target.pid.to_string(), images.to_str().expect("a path"));
    let start = Instant::now();
    let stages: [&[&str]; 3] =
        [&["ckpt-scan", "--share", "-t", &pid], &["ckpt-sk"], &["ckpt-write", images_arg]];
    harness::pipeline(&stages, None);
    let dump = start.elapsed().as_secs_f64();
    let dumped = process::pss(target.pid);
    target.end();
    process::wait_free(&pids);
    let start = Instant::now();
    let restore = std::process::Command::new(tool("ckpt-restore"))
        .arg("--detach")
        .arg(&images)
        .spawn()
        .expect("start ckpt-restore");
    harness::wait(vec![("ckpt-restore".to_owned(), restore)]);
    let restore = start.elapsed().as_secs_f64();
    let after = process::pss(target.pid);
    target.passes("the restored one");

    println!("{} processes, {WORKERS} of them forked over {mib} MiB", pids.len());
    let row = |name: &str, kib: u64, target: Option<f64>| {
        let of = |kib: u64| f64::from(u32::try_from(kib).unwrap_or(u32::MAX));
        let ratio = of(kib) / of(before);
        let verdict = target.map_or_else(String::new, |t| format!("<= {t} {}", verdict(ratio <= t)));
        println!("{name:<22}{:>9.1} MiB{ratio:>7.2} x{verdict:>18}", of(kib) / 1024.0);
    };
    row("memory", before, None);
    row("memory after the dump", dumped, Some(TARGET));
    row("memory when restored", after, Some(TARGET));
    row("images", harness::size(&images) >> 10, Some(TARGET));
    println!("{:<22}{dump:>9.3} s", "dump");
    println!("{:<22}{restore:>9.3} s", "restore");
}
