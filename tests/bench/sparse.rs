//! A terabyte of which 10 MiB are there, page by page and far from each other, next to a process that has these 10 MiB
//! in one piece.

use ckpt_tests::Target;

use crate::{
    harness::{self, Tmpfs},
    pages::round_trip,
};

pub fn run(rounds: u64) {
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, 256 << 20);
    let mut figures: [Vec<[f64; 2]>; 2] = Default::default();
    let mut bytes = [0; 2];
    for round in 0..=rounds {
        let dense = Target::start_with("memory_hog", &["-", "10"]);
        let sparse = Target::start("memory_sparse");
        for (index, target) in [dense, sparse].iter().enumerate() {
            let trip = round_trip(target, &dir, None, || ());
            bytes[index] = trip.bytes;
            if round > 0 {
                figures[index].push([trip.dump.as_secs_f64(), trip.restore.as_secs_f64()]);
            }
        }
    }
    let column = |which: usize, at: usize| figures[which].iter().map(|f| f[at]).collect::<Vec<_>>();
    println!(
        "medians of {rounds} rounds on tmpfs; stored: {} KiB and {} KiB",
        bytes[0] >> 10,
        bytes[1] >> 10
    );
    harness::yardstick("dump, in one piece", &column(0, 0));
    harness::ratio("dump, in a terabyte", &column(1, 0), &column(0, 0), 2.0);
    harness::yardstick("restore, in one piece", &column(0, 1));
    harness::ratio("restore, in a terabyte", &column(1, 1), &column(0, 1), 2.0);
}
