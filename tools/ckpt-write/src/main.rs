//! Writes a checkpoint stream to an image directory.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-write", |args: ckpt_write::Args| ckpt_write::run(&args, ckpt_cli::stdin()?))
}
