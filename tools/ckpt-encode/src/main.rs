//! Encodes JSON as checkpoint images.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-encode", |args: ckpt_encode::Args| {
        let output = if args.dir.is_some() { ckpt_cli::no_output()? } else { ckpt_cli::stdout()? };
        ckpt_encode::run(&args, ckpt_cli::stdin()?, output)
    })
}
