//! Stores the memory of a tree: what `ckpt-scan` does by itself, and `ckpt-mem` as a stage of its own.
//!
//! - [`Memory`]: whose pages are to be stored; in full, or what is new since a parent
//! - [`Tracking`]: the part that a tracker has in it (`--track`, `--parent`)
//! - [`snapshot`]: pages read from copies while the tree runs on
//!
//! Which of the two it is makes no difference to what is stored. What only the tracer can do is asked of it:
//! `ckpt-scan` does it itself, `ckpt-mem` says it to `ckpt-scan` through the hold protocol.

pub mod snapshot;
mod tracking;

use std::{fs::File, io::Write, ops::Range, os::fd::AsFd};

use anyhow::Context;
use ckpt_cli::stats;
use ckpt_kinds::mem::{
    dump::{Plan, ShmemPlan},
    share,
};
use ckpt_proto::{stream::Writer, types::VmaEntry};
use ckpt_sys::{Pid, transfer::Output};

pub use tracking::Tracking;

/// Pages that are read before any is written, so that the tree can run on: bytes.
const AT_ONCE: u64 = 32 << 20;

/// Memory whose contents are to be stored.
#[derive(Debug, Default)]
pub struct Memory {
    /// Segments, whose pagemaps are written already.
    pub shared: Vec<(ShmemPlan, File)>,
    /// Of each process.
    pub private: Vec<Private>,
    /// Whether pages that a process and its children share are stored once.
    pub once: bool,
}

/// Private memory of one process.
#[derive(Debug)]
pub struct Private {
    /// Whose.
    pub pid: Pid,
    /// Its parent's.
    pub ppid: Pid,
    /// What it is called.
    pub comm: String,
    /// Its mappings.
    pub vmas: Vec<VmaEntry>,
    /// Those that a userfaultfd watches, as far as is known.
    pub watched: Vec<Range<u64>>,
    /// Number of its pages image.
    pub pages_id: u32,
    /// A thread of it was stopped outside of a system call.
    pub faulting: bool,
}

impl Memory {
    /// With `once`, marks what is stored once for a process and its children.
    fn share(&self, plans: &mut [Plan]) -> anyhow::Result<()> {
        let parent = |pid| self.private.iter().find(|p| p.pid == pid).map(|p| p.ppid);
        if self.once { share::share(plans, &parent) } else { Ok(()) }
    }

    /// Writes the contents of shared segments.
    ///
    /// # Errors
    /// The output's.
    pub fn copy_shared(&self, writer: &mut Writer<Output>) -> anyhow::Result<()> {
        self.shared.iter().try_for_each(|(plan, own)| plan.copy(own.as_fd(), writer))
    }

    /// Finds and writes all pages of a frozen tree. If they are few, `run_on` is called when they have been read, before
    /// they are written. `awaited`: a stage works on the tree when it has got what comes before them.
    ///
    /// # Errors
    /// The kernel's, the output's; [`Refused`](ckpt_sys::Refused) if somebody else tracks the memory.
    pub fn copy(
        &self,
        tracking: &Tracking,
        awaited: bool,
        writer: &mut Writer<Output>,
        run_on: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut plans = self.plans(tracking)?;
        self.share(&mut plans)?;
        for plan in &plans {
            Plan::emit_head(plan.pid(), plan.pages_id, writer)?;
        }
        self.copy_found(&plans, awaited, writer, run_on)
    }

    /// What to store of each process, found by looking at it.
    fn plans(&self, tracking: &Tracking) -> anyhow::Result<Vec<Plan>> {
        self.private.iter().map(|p| p.plan(tracking)).collect()
    }

    /// Writes the pages of `plans`, of whose pagemaps the heads are written; see [`Self::copy`].
    fn copy_found(
        &self,
        plans: &[Plan],
        awaited: bool,
        writer: &mut Writer<Output>,
        run_on: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let total = bytes(plans);
        let mut progress = ckpt_cli::Progress::new("pages", Some(total));
        let runs = |writer: &mut Writer<Output>| -> anyhow::Result<()> {
            plans.iter().try_for_each(|plan| plan.emit_runs(writer))?;
            writer.bulk().context("write the stream")
        };
        let few = total <= AT_ONCE;
        // What stages wait for comes at once; all else when the tree runs.
        let early = awaited || !few;
        if early {
            runs(writer)?;
        }
        self.copy_shared(writer)?;
        if !few {
            return plans.iter().try_for_each(|plan| plan.copy(writer, |n| progress.inc(n)));
        }
        if awaited {
            writer.output().flush().context("write the stream")?;
        }
        let read = plans.iter().map(Plan::stash).collect::<anyhow::Result<Vec<_>>>()?;
        run_on()?;
        if !early {
            runs(writer)?;
        }
        read.into_iter().try_for_each(|stash| stash.write(writer, |n| progress.inc(n)))
    }
}

fn bytes(plans: &[Plan]) -> u64 {
    plans.iter().map(Plan::bytes).sum()
}

impl Private {
    fn what(&self) -> String {
        format!("pid {} ({})", self.pid, self.comm)
    }

    /// What to store, found by looking at the process itself.
    fn plan(&self, tracking: &Tracking) -> anyhow::Result<Plan> {
        let tracked = tracking.of(self.pid, self.faulting);
        Plan::new(self.pid, &self.vmas, self.pages_id, tracked).with_context(|| self.what())
    }
}

/// Counts for the statistics what has gone through `writer`.
pub fn count(writer: &Writer<Output>) {
    let counts = writer.counts();
    let written = counts.page_bytes / 4096;
    stats::count("pages", "scanned", written + counts.parent_pages);
    stats::count("pages", "written", written);
    stats::count("pages", "zero", counts.zero_pages);
    stats::count("pages", "in_parent", counts.parent_pages);
}
