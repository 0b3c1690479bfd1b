//! `ckpt-track`: keeps track of a process tree's writes between checkpoints.
//!
//! The tree is frozen once, for as long as it takes to make a userfaultfd in each process and take
//! it out. From then on `ckpt-scan --track` uses and renews the tracking (`ckpt-tracking` says how); this
//! process only keeps the descriptors open. If it ends, the kernel ends the tracking with them, and the next
//! checkpoint is a full one.

use std::{fs::File, io::Write, os::fd::AsFd, time::Duration};

use anyhow::Context;
use ckpt_remote::{FreezeError, Frozen, Release};
use ckpt_sys::{Pid, pidfd};
use ckpt_tracking::{Server, Tracker, arm, start_time};
use clap::{CommandFactory, Parser};

/// Keep track of a process tree's writes between checkpoints
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-track",
    version,
    after_help = "\
Examples:
  ckpt-track -t 4711 &
  ckpt-scan -t 4711 --track ckpt-track-4711 | ckpt-sk | ckpt-write 1
  ckpt-scan -t 4711 --track ckpt-track-4711 --parent 1 | ckpt-sk | ckpt-write --parent 1 2

Prints the address when it is ready. Ends with the tree's root; see also ckpt-series(1)."
)]
pub struct Args {
    /// Root of the tree: this process and all its descendants
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = ckpt_cli::positive_pid)]
    pub tree: Pid,
    /// Name of the socket in the abstract namespace; ckpt-track-PID otherwise
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// How long to try to stop a tree that resists (vfork, uninterruptible I/O), seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub freeze_timeout: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

/// The command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs the tool until the tree's root ends; the address goes to `output`.
///
/// # Errors
/// The tree can't be tracked; it is unharmed.
pub fn run(args: &Args, mut output: File) -> anyhow::Result<()> {
    let address = args.address.clone().unwrap_or_else(|| format!("ckpt-track-{}", args.tree));
    let root = pidfd::open(args.tree)?;
    let mut server = Server::bind(&address)?;
    let mut tracker = Tracker::default();
    let patience = Duration::from_secs(args.freeze_timeout);
    let mut frozen = Frozen::freeze(args.tree, patience).map_err(|error| match error {
        FreezeError::Refused(refused) => anyhow::Error::from(refused),
        error => error.into(),
    })?;
    for process in frozen.processes.clone().iter().filter(|p| !p.zombie) {
        let what = || process.subject();
        let uffd = arm(&mut frozen, process).with_context(what)?;
        tracker.watch(process.pid, start_time(process.pid)?, uffd);
    }
    let (count, held) = (frozen.processes.len(), frozen.since().elapsed());
    frozen.release(Release::Run);
    ckpt_cli::note!(1, "{count} processes, frozen for {:.3} s", held.as_secs_f64());
    writeln!(output, "{address}").context("write the address")?;
    drop(output);
    server.serve(&mut tracker, &[root.as_fd()])?;
    ckpt_cli::note!(1, "pid {} has ended", args.tree);
    Ok(())
}
