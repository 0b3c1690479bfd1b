//! `ckpt-restore`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_cli::main_with("ckpt-restore", |args| Ok(ckpt_restore::main(args)))
}
