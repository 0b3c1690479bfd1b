//! Checkpoints and restores process trees in one command.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main_with("ckpt", |args: ckpt::Args| ckpt::run(&args))
}
