//! Keeps track of a process tree's writes between checkpoints.

fn main() -> std::process::ExitCode {
    ckpt_cli::main("ckpt-track", |args: ckpt_track::Args| ckpt_track::run(&args, ckpt_cli::take_stdout()?))
}
