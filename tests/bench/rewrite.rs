//! What a filter costs a stream that is mostly pages: `ckpt-read DIR | sk-rewrite ... > /dev/null`, with a rule that edits
//! sockets and queues.
//!
//! The yardstick is `cat PAGES | cat > /dev/null`: the same file through as many processes and pipes. A single
//! `cat PAGES > /dev/null` is printed too; it copies every byte once and no pipe is in its way, so it is what reading
//! costs at least, and no pipeline can be asked to match it.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

use ckpt_tests::Target;

use crate::harness::{self, Peaks, ROUNDS, Tmpfs};

pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 3) << 20);
    let gap = dir.join("gap");
    let images = dir.join("img");
    let images_arg = images.to_str().expect("a path");
    let mut peaks = Peaks::new();
    {
        let gap = gap.to_str().expect("a path");
        let target = Target::start_with("memory_hog", &["-", &mib.to_string(), gap, "20"]);
        let pid = target.pid.to_string();
        let write = ["ckpt-write", images_arg];
        harness::pipeline(&[&["ckpt-scan", "-t", &pid], &["ckpt-sk"], &write], None);
        target.end();
    }
    let pages: PathBuf = fs::read_dir(&images)
        .expect("list images")
        .flatten()
        .map(|file| file.path())
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pages-")))
        .max_by_key(|path| path.metadata().map_or(0, |m| m.len()))
        .expect("a pages file");

    let (mut reads, mut cats, mut passes, mut edits) = (vec![], vec![], vec![], vec![]);
    for round in 0..=ROUNDS {
        let start = Instant::now();
        cat(&pages, false);
        let read = start.elapsed().as_secs_f64();
        let start = Instant::now();
        cat(&pages, true);
        let through = start.elapsed().as_secs_f64();
        let start = Instant::now();
        harness::pipeline(&[&["ckpt-read", images_arg], &["sk-rewrite"]], Some(&mut peaks));
        let pass = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let edit =
            ["sk-rewrite", "--drop-queues", "kind=unix-stream", "--set-opt", "kind=unix:SO_KEEPALIVE=on"];
        harness::pipeline(&[&["ckpt-read", images_arg], &edit], Some(&mut peaks));
        let edited = start.elapsed().as_secs_f64();
        if round > 0 {
            reads.push(read);
            cats.push(through);
            passes.push(pass);
            edits.push(edited);
        }
        eprintln!(
            "round {round}: cat {read:.3}, cat | cat {through:.3}, pass {pass:.3}, rewrite {edited:.3}"
        );
    }
    let bytes = pages.metadata().map_or(0, |m| m.len());
    println!("{} MiB of pages on tmpfs, medians of {ROUNDS} rounds", bytes >> 20);
    harness::yardstick("cat | cat", &cats);
    harness::ratio("pass through", &passes, &cats, 1.2);
    harness::ratio("rewrite", &edits, &cats, 1.2);
    println!("{:<22}{:>9.3} s", "cat alone", harness::median(reads));
    harness::peak_rows(&peaks, 64);
}

/// `cat FILE > /dev/null`, or `cat FILE | cat > /dev/null`.
fn cat(file: &PathBuf, pipe: bool) {
    let null = || File::options().write(true).open("/dev/null").expect("/dev/null");
    let output = if pipe { Stdio::piped() } else { Stdio::from(null()) };
    let mut first = Command::new("cat").arg(file).stdout(output).spawn().expect("run cat");
    if let Some(output) = first.stdout.take() {
        let status = Command::new("cat").stdin(output).stdout(null()).status().expect("run cat");
        assert!(status.success(), "cat: {status}");
    }
    let status = first.wait().expect("wait for cat");
    assert!(status.success(), "cat: {status}");
}
