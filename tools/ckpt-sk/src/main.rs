//! Completes the sockets of a checkpoint stream.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-sk", |args: ckpt_sk::Args| {
        if args.list {
            return ckpt_sk::list(&args, ckpt_cli::stdin, &mut std::io::stdout().lock());
        }
        ckpt_sk::run(&args, ckpt_cli::stdin()?, ckpt_cli::take_stdout()?)
    })
}
