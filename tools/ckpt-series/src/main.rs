//! A series of checkpoints of a process tree, each an increment of the one before.

fn main() -> std::process::ExitCode {
    ckpt_cli::main("ckpt-series", |args: ckpt_series::Args| {
        ckpt_series::run(&args, ckpt_cli::stdin()?, ckpt_cli::stdout()?)
    })
}
