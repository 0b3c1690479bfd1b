//! Tells which kernel features and privileges checkpoints can use.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-check", |args: ckpt_check::Args| ckpt_check::run(&args, ckpt_cli::stdout()?))
}
