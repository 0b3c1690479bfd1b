//! Folds a chain of incremental checkpoints into one.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-merge", |args: ckpt_merge::Args| {
        let makes_stream = args.out.is_none() && !args.in_place && !args.dedup;
        let output = if makes_stream { ckpt_cli::stdout()? } else { ckpt_cli::no_output()? };
        ckpt_merge::run(&args, output)
    })
}
