//! Whether sockets cost the same however many there are: unix socketpairs of the three types, two messages queued at each
//! end, listed, dumped and restored; 100, 1,000 and so on up to SIZE.
//!
//! The yardstick is the size before: what a socketpair costs may grow by no more than noise, so that what is
//! quadratic shows as a ratio of ten. 10,000 pairs are more sockets than a tool can have open where the limit on open files
//! is 20,000 and can't be raised.

use std::{
    fs,
    process::{Command, Stdio},
    time::Instant,
};

use ckpt_tests::{Target, process, tool};

use crate::harness::{self, Tmpfs};

const ROUNDS: usize = 3;

pub fn run(most: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, 256 << 20);
    let mut sizes: Vec<u64> =
        std::iter::successors(Some(100), |n| Some(n * 10)).take_while(|&n| n < most).collect();
    sizes.push(most);
    println!(
        "{:>8}{:>14}{:>14}{:>14}   microseconds for a pair, medians of {ROUNDS}",
        "pairs", "list", "dump", "restore"
    );
    let mut before: Option<[f64; 3]> = None;
    for pairs in sizes {
        let costs = measure(&dir, pairs);
        print!("{pairs:>8}");
        for (index, cost) in costs.iter().enumerate() {
            let ratio = before.map(|before| cost / before[index]);
            print!("{cost:>8.1}{:>6}", ratio.map_or_else(String::new, |r| format!("{r:.2}x")));
        }
        match before {
            Some(before) => {
                let flat = costs.iter().zip(before).all(|(now, before)| *now <= before * 1.3);
                println!("   <= 1.3x {}", harness::verdict(flat));
            }
            None => println!(),
        }
        before = Some(costs);
    }
}

/// What listing, dump and restore take, in microseconds for each pair.
fn measure(dir: &Tmpfs, pairs: u64) -> [f64; 3] {
    let target = Target::start_with("socket_crowd", &["-", &pairs.to_string()]);
    let pids = process::tree(target.pid);
    let pid = target.pid.to_string();
    let images = dir.join("img");
    let images_arg = images.to_str().expect("a path");
    let mut times = [vec![], vec![], vec![]];
    for _ in 0..ROUNDS {
        let start = Instant::now();
        harness::pipeline(&[&["ckpt-sk", "--list", "-t", &pid]], None);
        times[0].push(start.elapsed().as_secs_f64());

        let start = Instant::now();
        let stages: [&[&str]; 3] = [&["ckpt-scan", "-t", &pid], &["ckpt-sk"], &["ckpt-write", images_arg]];
        harness::pipeline(&stages, None);
        times[1].push(start.elapsed().as_secs_f64());

        target.end();
        process::wait_free(&pids);
        let start = Instant::now();
        let status = Command::new(tool("ckpt-restore"))
            .arg("--detach")
            .arg(&images)
            .stderr(Stdio::null())
            .status()
            .expect("run ckpt-restore");
        assert!(status.success(), "ckpt-restore: {status}");
        times[2].push(start.elapsed().as_secs_f64());
        target.passes("the restored one");
        fs::remove_dir_all(&images).expect("remove the images");
    }
    target.end();
    let count = f64::from(u32::try_from(pairs).expect("pairs"));
    times.map(|times| harness::median(times) * 1e6 / count)
}
