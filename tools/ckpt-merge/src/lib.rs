//! Folds a chain of incremental checkpoints, or the younger part of it, into one.
//!
//! - [`fold`]: the same checkpoint with the pages that it had in others
//! - [`dedup`]: room that older checkpoints take for pages which nobody needs any more
//! - [`repeats`]: pages of increments that are as in the checkpoint before
//! - [`equal`]: pages that are equal share their room
//! - [`family`]: which directories belong to a chain, and which others lead into it
//!
//! Nothing that is there is changed in place, except that pages which nobody can see any more are cut out of
//! a file: a directory that changes is made anew beside the old one and exchanged with it in one step.

pub mod dedup;
pub mod equal;
pub mod family;
pub mod fold;
pub mod repeats;

use std::{fs::File, os::fd::AsFd, path::PathBuf};

use anyhow::Context;
use ckpt_cli::UsageError;
use ckpt_cli::stats;
use ckpt_images::{
    DirWriter, ImageSet, produce,
    recode::{self, Behind, Codec, Recode},
    stage,
};
use ckpt_proto::stream::Writer;
use clap::{CommandFactory, Parser};

/// Folds a chain of incremental checkpoints into one
///
/// DIR with all pages that it has in earlier checkpoints becomes OUT, a full checkpoint, or
/// without OUT a stream on standard output.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "ckpt-merge", version, after_help = EXAMPLES)]
pub struct Args {
    /// The last directory of the chain
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Directory to make
    #[arg(value_name = "OUT", conflicts_with_all = ["in_place", "dedup"])]
    pub out: Option<PathBuf>,
    /// Put the result in the place of DIR
    #[arg(long, conflicts_with = "dedup")]
    pub in_place: bool,
    /// Fold only what is younger than BASE: the result is an increment of it
    #[arg(long, value_name = "BASE", conflicts_with = "dedup")]
    pub onto: Option<PathBuf>,
    /// Free the pages of earlier checkpoints that neither DIR nor any other checkpoint beside
    /// them needs (the earlier ones can then not be restored themselves); equal pages share room
    #[arg(long)]
    pub dedup: bool,
    /// With --dedup: take no notice of checkpoints that lead here and can't be read
    #[arg(long, requires = "dedup")]
    pub force: bool,
    /// Compress pages of the result: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW", conflicts_with = "dedup")]
    pub compress: Option<Codec>,
    /// Do not compare pages with their checksums
    #[arg(long)]
    pub no_verify: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-merge series/000137 /var/ckpt/full             a checkpoint that needs no other
  ckpt-merge --in-place series/000100                 now those before it can be removed
  ckpt-merge --onto series/000100 series/000137 day   one increment instead of 37
  ckpt-merge series/000137 | ssh host ckpt-restore --detach
  ckpt-merge --dedup series/000137                    free what only earlier ones need";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Does what `args` say; a stream goes to `output`.
///
/// # Errors
/// Then no directory has come to be or been changed, and a stream has no end record.
pub fn run(args: &Args, output: File) -> anyhow::Result<()> {
    args.stats.begin();
    if args.dedup {
        stats::phase("compare");
        give_back(args)?;
        stats::phase("free");
        dedup::run(args)?;
        stats::phase("share");
        share(args)?;
        return args.stats.write();
    }
    stats::phase("read");
    let shown = || args.dir.display().to_string();
    let set = ImageSet::from_chain(&args.dir).with_context(shown)?;
    let base = args.onto.as_deref().map(|base| fold::Base::find(&args.dir, base, &set)).transpose()?;
    let writer = match &args.out {
        Some(out) => Some(DirWriter::create(out)?),
        None if args.in_place => Some(DirWriter::create_over(&args.dir)?),
        None => None,
    };
    let total = produce::bytes(&set)?;
    stats::phase("pages");
    stats::count("bytes", "pages", total);
    stats::count("chain", "directories", set.chain_depth() as u64 + 1);
    let mut progress = ckpt_cli::Progress::new("merging", Some(total));
    if let Some(mut writer) = writer {
        let cleanup = writer.cleanup();
        ckpt_cli::on_termination(move || cleanup.remove()).context("start a thread")?;
        let verification = if args.no_verify { None } else { Some(set.verification()?) };
        fold::fold(&set, base.as_ref(), args.compress, &mut writer, &mut |n| progress.inc(n))
            .with_context(shown)?;
        if args.in_place {
            fold::keep_others(&args.dir, &mut writer)?;
        }
        if let Some(verification) = verification {
            verification.finish().with_context(shown)?;
        }
        stats::count("bytes", "images", writer.size());
        stats::phase("sync");
        writer.finish()?;
        ckpt_cli::note!(1, "{} directories of the chain were needed", set.chain_depth() + 1);
        return args.stats.write();
    }
    if base.is_some() {
        return Err(UsageError("--onto makes a directory: name OUT, or give --in-place".to_owned()).into());
    }
    set.more_than_memory(&args.dir)?;
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    stage::grow_pipe(output.as_fd());
    let (output, behind) = match args.compress {
        Some(codec) => recode::behind(output, Recode::Pack(codec))?,
        None => (output, Behind::default()),
    };
    let mut out = Writer::open(output, produce::hello(&set)?).context("write the stream")?;
    match produce::write(&set, &mut out, !args.no_verify, &mut |n| progress.inc(n)) {
        Ok(()) => {
            drop(out.end().context("write the stream")?);
            behind.finish()?;
            args.stats.write()
        }
        Err(error) => {
            let error = error.into();
            let _ = out.abort(&ckpt_cli::reason("ckpt-merge", &error));
            Err(error)
        }
    }
}

/// Has increments of the chain, the first ones first, give back what they repeat.
fn give_back(args: &Args) -> anyhow::Result<()> {
    let mut bytes = 0;
    for dir in ckpt_images::chain::ancestry(&args.dir)?.iter().rev() {
        bytes += repeats::give_back(dir, !args.no_verify).with_context(|| dir.display().to_string())?;
    }
    stats::count("bytes", "repeated", bytes);
    ckpt_cli::note!(1, "{bytes} bytes of pages were stored again as they were");
    Ok(())
}

/// Lets equal pages share their room, in the chain and in all checkpoints beside it.
fn share(args: &Args) -> anyhow::Result<()> {
    let dirs = family::beside(&ckpt_images::chain::ancestry(&args.dir)?)?;
    let mut progress = ckpt_cli::Progress::new("comparing", None);
    let shared = equal::share(&dirs, &mut |n| progress.inc(n))?;
    drop(progress);
    stats::count("bytes", "shared", shared.bytes);
    ckpt_cli::note!(1, "{} bytes of equal pages share their room", shared.bytes);
    if shared.unsupported {
        ckpt_cli::warn(&format!(
            "{}: equal pages stay as they are: files of this file system can't share room (those of btrfs and XFS can)",
            args.dir.display()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        command().debug_assert();
        for wrong in [
            &["ckpt-merge"][..],
            &["ckpt-merge", "--in-place", "a", "b"],
            &["ckpt-merge", "--dedup", "--in-place", "a"],
            &["ckpt-merge", "--force", "a"],
            &["ckpt-merge", "--dedup", "--compress", "lz4", "a"],
        ] {
            assert!(Args::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }
}
