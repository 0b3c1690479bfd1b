//! Edits the sockets of a checkpoint stream.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("sk-rewrite", |args: sk_rewrite::Args| {
        sk_rewrite::run(&args, ckpt_cli::stdin()?, ckpt_cli::stdout()?)
    })
}
