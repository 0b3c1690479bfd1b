//! Folds a chain of incremental checkpoints into one.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-merge", |args: ckpt_merge::Args| ckpt_merge::run(&args, ckpt_cli::stdout()?))
}
