//! Encodes JSON as checkpoint images.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-encode", |args: ckpt_encode::Args| {
        ckpt_encode::run(&args, ckpt_cli::stdin()?, ckpt_cli::stdout()?)
    })
}
