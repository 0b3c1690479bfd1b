//! `--pre-dump`: memory that is copied while the tree runs, ahead of a checkpoint.
//!
//! The tree is frozen for as long as it takes to find its pages and protect them, as for an increment;
//! then it runs, and its pages are read from under it. A page that it writes meanwhile may be read old, new or half
//! of each. That does no harm: the write takes off the protection, so the next increment stores the page
//! again. The same goes for what can't be read any more ([`Plan::while_running`]); mappings that are new by then are
//! stored in full anyway.
//!
//! ```text
//! pre-dump 0          frozen: find, protect | runs: read all ...
//! pre-dump 1 on 0     frozen: find, protect | runs: read what was written since
//! checkpoint 2 on 1   frozen: everything, and the few pages written since
//! ```
//!
//! The directory that comes of it has the pagemaps and pages of an increment, and an inventory that says what it
//! is; nothing of it can be restored alone. CRIU's pre-dumps have the same files.
//!
//! Shared memory is left to the checkpoint, which stores it in full as every increment does. So is memory of huge
//! pages (hugetlbfs).
//!
//! With `--share`, a page that a process has from the one that forked it is read from that, which may write to it before.
//! Then the process that has not written has it no more in this pre-dump: for the next increment it counts as
//! written there too ([`share::distrust_changed`]). The pre-dump has the tree's pstree.img, which says who forked whom.

use std::{fs::File, time::Duration};

use anyhow::{Context, bail};
use ckpt_cli::stats;
use ckpt_hold::Holder;
use ckpt_images::recode::{self, Behind, Recode};
use ckpt_kinds::{
    mem::{
        dump::{Plan, private_vmas},
        flags::Flags,
        share,
    },
    sink::emit,
};
use ckpt_pages::{Memory, Tracking};
use ckpt_proto::{
    Image,
    stream::Writer,
    types::{InventoryEntry, PstreeEntry},
};
use ckpt_remote::{Frozen, Release};
use ckpt_sys::{Pid, transfer::Output};
use ckpt_tracking::arm;

use crate::{Args, as_refusal, blame, give_up, hello, inventory, lending, pstree, settle};

/// Writes the stream of a pre-dump.
///
/// # Errors
/// The tree runs on whatever went wrong.
pub fn run(args: &Args, output: File, plain_file: bool) -> anyhow::Result<()> {
    stats::phase("freeze");
    let holder = Holder::bind()?;
    let mut tracking = Tracking::begin(args.track.as_deref(), args.parent.as_ref())?;
    if !tracking.on() {
        bail!("a pre-dump without tracking is of no use");
    }
    let flags = Flags::prepare();
    let frozen = Frozen::freeze(args.tree, Duration::from_secs(args.freeze_timeout)).map_err(as_refusal)?;
    let found = look(args, frozen, flags, &mut tracking)?;
    stats::count("tree", "processes", found.plans.len() as u64);
    let (output, behind) = match args.compress {
        Some(codec) => recode::behind(output, Recode::Pack(codec))?,
        None => (output, Behind::default()),
    };
    let hello = hello(args, &holder, plain_file, &[]);
    let mut writer = Writer::open(lending(output, &holder), hello).context("write the stream")?;
    let holder = (!plain_file).then_some(&holder);
    stats::phase("pages");
    if let Err(error) = write(&found, &tracking, &mut writer) {
        return give_up(None, Some(writer), error).map_err(|e| blame(e, holder));
    }
    ckpt_pages::count(&writer);
    stats::phase("stages");
    drop(writer.end().context("write the stream")?);
    if let Err(error) = behind.finish() {
        return give_up(None, None, error.into()).map_err(|e| blame(e, holder));
    }
    settle(args, None, holder, &[], tracking, &Memory::default())?;
    args.stats.write()
}

/// What was found in the freeze.
struct Found {
    plans: Vec<Plan>,
    /// If pages are stored once: who forked whom, parents first.
    tree: Vec<PstreeEntry>,
}

impl Found {
    fn parent(&self, pid: Pid) -> Option<Pid> {
        let entry = self.tree.iter().find(|entry| entry.pid == pid.0.unsigned_abs())?;
        i32::try_from(entry.ppid).ok().map(Pid)
    }
}

/// Finds what is to be stored, protects it, and lets the tree run.
fn look(args: &Args, mut frozen: Frozen, flags: Flags, tracking: &mut Tracking) -> anyhow::Result<Found> {
    let (mut plans, mut tree) = (Vec::new(), Vec::new());
    for process in frozen.processes.clone().iter().filter(|p| !p.zombie) {
        let pid = process.pid;
        tracking.watch(pid, || Ok(arm(&mut frozen, process)?));
        let look = |pages_id| -> anyhow::Result<Option<Plan>> {
            let (vmas, left) = private_vmas(&flags.mappings(pid, frozen.maps(pid))?);
            let Some(tracked) = tracking.of(pid, process.at_work()) else { return Ok(None) };
            left.iter().for_each(|vma| tracked.leave(vma));
            Ok(Some(Plan::new(pid, &vmas, pages_id, Some(tracked))?.while_running(tracked)?))
        };
        let pages_id = u32::try_from(plans.len() + 1)?;
        plans.extend(look(pages_id).with_context(|| process.subject())?);
        if args.share {
            tree.push(pstree(process, args.tree)?);
        }
    }
    let mut found = Found { plans: Vec::new(), tree };
    share::share(&mut plans, &|pid| found.parent(pid))?;
    found.plans = plans;
    let held = frozen.since().elapsed();
    frozen.release(Release::Run);
    stats::seconds("frozen", held);
    ckpt_cli::note!(1, "the tree was frozen for {:.2} ms", held.as_secs_f64() * 1000.0);
    Ok(found)
}

fn write(found: &Found, tracking: &Tracking, writer: &mut Writer<Output>) -> anyhow::Result<()> {
    let inventory = InventoryEntry { ckpt_pre_dump: Some(true), ..inventory(tracking)? };
    emit(writer, Image::Inventory, 0, &inventory)?;
    for task in &found.tree {
        emit(writer, Image::Pstree, 0, task)?;
    }
    let plans = &found.plans;
    for plan in plans {
        plan.emit(writer)?;
    }
    writer.bulk().context("write the stream")?;
    let mut progress = ckpt_cli::Progress::new("pages", Some(plans.iter().map(Plan::bytes).sum()));
    plans.iter().try_for_each(|plan| plan.copy(writer, |n| progress.inc(n)))?;
    share::distrust_changed(plans, &|pid| found.parent(pid));
    Ok(())
}
