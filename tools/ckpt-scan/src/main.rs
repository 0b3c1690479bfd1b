//! Freezes a process tree and writes it as a checkpoint stream.

fn main() -> std::process::ExitCode {
    ckpt_cli::main("ckpt-scan", |args: ckpt_scan::Args| ckpt_scan::run(&args, ckpt_cli::take_stdout()?))
}
