//! Prints checkpoint images and streams.
use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main("ckpt-show", |args: ckpt_show::Args| {
        // Not needed when there is a path, so it may be closed then.
        let input =
            ckpt_cli::stdin().or_else(|_| Ok::<_, anyhow::Error>(std::fs::File::open("/dev/null")?))?;
        ckpt_show::run(&args, input, ckpt_cli::stdout()?)
    })
}
