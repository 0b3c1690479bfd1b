//! What the tools cost, next to a yardstick that is measured in the same round.
//!
//!     bench [NAME [SIZE]]
//!
//! Without a name all benchmarks run, each with its own size. A benchmark is a module with a function and a
//! row in [`BENCHES`]; what they share (warming up, pipelines, ratios) is in `harness`. A target that is missed is
//! printed as MISSED and fails nothing: a busy machine is no error of the program.

#![allow(missing_docs)]

mod harness;
mod increment;
mod lazy;
mod pages;
mod redis;
mod rewrite;
mod scaling;
mod series;
mod sharing;
mod snapshot;
mod sockets;
mod sparse;

use std::process::ExitCode;

struct Bench {
    name: &'static str,
    /// What SIZE counts, and how many of it there are by default.
    size: (&'static str, u64),
    run: fn(u64),
}

const BENCHES: &[Bench] = &[
    Bench { name: "pages", size: ("MiB", 1024), run: pages::run },
    Bench { name: "lazy", size: ("MiB", 1024), run: lazy::run },
    Bench { name: "increment", size: ("MiB", 1024), run: increment::run },
    Bench { name: "rewrite", size: ("MiB", 1024), run: rewrite::run },
    Bench { name: "sockets", size: ("socketpairs", 10_000), run: sockets::run },
    Bench { name: "snapshot", size: ("MiB", 1024), run: snapshot::run },
    Bench { name: "scaling", size: ("MiB", 8192), run: scaling::run },
    Bench { name: "sparse", size: ("rounds", 5), run: sparse::run },
    Bench { name: "sharing", size: ("MiB", 500), run: sharing::run },
    Bench { name: "series", size: ("checkpoints", 300), run: series::run },
    Bench { name: "redis", size: ("MiB", 1024), run: redis::run },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = args.first().map(String::as_str);
    let size = args.get(1).map(|size| size.parse::<u64>());
    let chosen: Vec<&Bench> = BENCHES.iter().filter(|b| name.is_none_or(|name| name == b.name)).collect();
    if chosen.is_empty() || args.len() > 2 || matches!(size, Some(Err(_))) {
        eprintln!("usage: bench [NAME [SIZE]]");
        for bench in BENCHES {
            eprintln!("  {:<12}{} {}", bench.name, bench.size.1, bench.size.0);
        }
        return ExitCode::from(2);
    }
    for bench in chosen {
        let size = size.clone().and_then(Result::ok).unwrap_or(bench.size.1);
        println!("{}: {size} {}", bench.name, bench.size.0);
        (bench.run)(size);
        println!();
    }
    ExitCode::SUCCESS
}
