//! Adds page contents to a checkpoint stream.

fn main() -> std::process::ExitCode {
    ckpt_cli::main("ckpt-mem", |args: ckpt_mem::Args| {
        ckpt_mem::run(&args, ckpt_cli::stdin()?, ckpt_cli::take_stdout()?)
    })
}
