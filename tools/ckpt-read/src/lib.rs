//! Reads an image directory, CRIU's or our own, as a checkpoint stream (see [`ckpt_images::produce`]).

use std::{fs::File, os::fd::AsFd, path::PathBuf};

use anyhow::Context;
use ckpt_images::{
    ImageSet, produce,
    recode::{self, Behind, Recode},
    stage,
};
use ckpt_proto::stream::Writer;
use clap::{CommandFactory, Parser};

/// Reads an image directory as a checkpoint stream
///
/// The stream goes to standard output.
#[derive(Debug, Clone, Parser)]
#[command(name = "ckpt-read", version, after_help = EXAMPLES)]
pub struct Args {
    /// Directory made by ckpt-write or by CRIU
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Unpack compressed pages
    #[arg(long)]
    pub decompress: bool,
    /// Do not compare pages with their checksums; these go along for the reader to check
    #[arg(long)]
    pub no_verify: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-read checkpoint | sk-rewrite --connect 48213=/run/b.sock | ckpt-restore --detach
  ckpt-read checkpoint | zstd | ssh host 'zstd -d | ckpt-write checkpoint'";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Writes the directory's images to `output`.
///
/// # Errors
/// Then the stream has no end record.
pub fn run(args: &Args, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    stage::grow_pipe(output.as_fd());
    let set = ImageSet::from_chain(&args.dir).with_context(|| args.dir.display().to_string())?;
    set.more_than_memory(&args.dir)?;
    let hello = produce::hello(&set)?;
    let (output, behind) = if args.decompress && hello.packed() {
        recode::behind(output, Recode::Unpack)?
    } else {
        (output, Behind::default())
    };
    let mut out = Writer::open(output, hello).context("write the stream")?;
    let mut progress = ckpt_cli::Progress::new("reading", Some(produce::bytes(&set)?));
    match produce::write(&set, &mut out, !args.no_verify, &mut |n| progress.inc(n)) {
        Ok(()) => {}
        Err(error) => {
            let error = error.into();
            // In the middle of contents this is taken for some: there the missing end says it.
            let _ = out.abort(&ckpt_cli::reason("ckpt-read", &error));
            return Err(error);
        }
    }
    drop(out.end().context("write the stream")?);
    Ok(behind.finish()?)
}
