//! Reads an image directory as a checkpoint stream.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-read", |args: ckpt_read::Args| ckpt_read::run(&args, ckpt_cli::stdout()?))
}
