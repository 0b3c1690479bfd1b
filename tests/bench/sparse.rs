//! A terabyte of which 10 MiB are there, far from each other in pieces of 64 KiB or page by page, next to a process that
//! has these 10 MiB in one piece.

use ckpt_tests::Target;

use crate::{
    harness::{self, Tmpfs},
    pages::round_trip,
};

pub fn run(rounds: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, 256 << 20);
    let mut figures: [Vec<[f64; 2]>; 3] = Default::default();
    let mut bytes = [0; 3];
    for round in 0..=rounds {
        let dense = Target::start_with("memory_hog", &["-", "10"]);
        let [pieces, alone] = ["16", "1"].map(|row| Target::start_with("memory_sparse", &["-", row]));
        for (index, target) in [dense, pieces, alone].iter().enumerate() {
            let trip = round_trip(target, &dir, || harness::warm_up(&dir.0, 16 << 20), None, || ());
            bytes[index] = trip.bytes;
            if round > 0 {
                figures[index].push([trip.dump.as_secs_f64(), trip.restore.as_secs_f64()]);
            }
        }
    }
    let column = |which: usize, at: usize| figures[which].iter().map(|f| f[at]).collect::<Vec<_>>();
    println!(
        "medians of {rounds} rounds on tmpfs; stored: {} KiB, {} KiB and {} KiB",
        bytes[0] >> 10,
        bytes[1] >> 10,
        bytes[2] >> 10
    );
    for (at, what) in ["dump", "restore"].iter().enumerate() {
        harness::yardstick(&format!("{what}, in one piece"), &column(0, at));
        harness::ratio(&format!("{what}, of a terabyte"), &column(1, at), &column(0, at), 1.5);
        harness::ratio(&format!("{what}, page by page"), &column(2, at), &column(0, at), 3.0);
    }
}
