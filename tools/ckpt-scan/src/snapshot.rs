//! `--snapshot`: pages are read from copy-on-write twins ([`ckpt_remote::Twin`]) while the tree runs on.
//!
//! What has to be done before the tree may run: all metadata, shared memory, and sockets, which
//! ckpt-sk reads from the live tree. So all this goes out first, with the heads of the pagemaps behind
//! it, at which ckpt-sk begins; while it works, the memory is forked. All twins are made in the same
//! freeze. Which pages there are, a question that takes as long as a fork, is asked of the twins.
//!
//! A process that can't be forked has its pages read within the freeze, as without the option, and
//! a warning says why. Others have their twins all the same.

use std::{collections::HashMap, io::Write, time::Duration};

use anyhow::Context;
use ckpt_cli::Progress;
use ckpt_hold::Holder;
use ckpt_kinds::mem::{dump::Plan, early::Early, snapshot};
use ckpt_proto::stream::Writer;
use ckpt_remote::{Frozen, NoTwin, Release, RemoteError, Twin};
use ckpt_sys::{Pid, transfer::Output};

use crate::{Held, Memory, Private, succeeded, tracking::Tracking};

/// The stages behind us.
pub struct Behind<'a> {
    /// `None` behind a plain file.
    pub holder: Option<&'a Holder>,
    /// Which of them work on the live tree.
    pub needs: &'a [&'a str],
    /// How long to wait for them to come.
    pub patience: Duration,
}

/// Forks the tree's memory, lets the tree run (`held` is `None` then), and writes the contents of `memory`.
///
/// # Errors
/// The tree runs, or is in `held` still.
pub fn copy(
    held: &mut Option<Held>,
    memory: &Memory,
    early: &Early,
    tracking: &Tracking,
    behind: Behind<'_>,
    writer: &mut Writer<Output>,
) -> anyhow::Result<()> {
    for p in &memory.private {
        Plan::emit_head(p.process.pid, p.pages_id, writer)?;
    }
    writer.output().flush().context("write the stream")?;
    let mut twins = match held {
        Some(held) => take(&mut held.frozen, memory)?,
        None => HashMap::new(),
    };
    memory.copy_shared(writer)?;
    let plain = memory.private.iter().filter(|p| !twins.contains_key(&p.process.pid));
    let mut plans = plain.map(|p| p.plan(tracking)).collect::<anyhow::Result<Vec<_>>>()?;
    memory.share(&mut plans)?;
    for plan in &plans {
        plan.emit_runs(writer)?;
        plan.copy(writer, |_| ())?;
    }
    writer.output().flush().context("write the stream")?;
    if let Some(holder) = behind.holder {
        let outcome = holder.passed(behind.needs, behind.patience);
        succeeded(memory.private.first().map_or(Pid(0), |p| p.process.pid), outcome)?;
    }
    if let Some(held) = held.take() {
        held.free(Release::Run)?;
    }
    plans.clear();
    let with_twins: Vec<_> =
        memory.private.iter().filter_map(|p| Some((p, twins.remove(&p.process.pid)?))).collect();
    for (p, twin) in &with_twins {
        early.check(p.process.pid, twin.pid()).with_context(|| p.what())?;
        let plan = Plan::of_copy(p.process.pid, twin.pid(), &p.vmas, p.pages_id);
        plans.push(plan.with_context(|| lost(p))?);
    }
    memory.share(&mut plans)?;
    for plan in &plans {
        plan.emit_runs(writer)?;
    }
    writer.bulk().context("write the stream")?;
    let mut progress = Progress::new("pages", Some(plans.iter().map(Plan::bytes).sum()));
    for ((p, twin), plan) in with_twins.into_iter().zip(plans) {
        plan.copy(writer, |n| progress.inc(n)).with_context(|| lost(p))?;
        drop(twin);
    }
    Ok(())
}

fn lost(p: &Private) -> String {
    let what = "read its copy-on-write snapshot (if memory is short the kernel ends that first)";
    format!("{}: {what}", p.what())
}

/// Makes the twins, by the pid of the original.
fn take(frozen: &mut Frozen, memory: &Memory) -> anyhow::Result<HashMap<Pid, Twin>> {
    let mut twins = HashMap::new();
    let mut made: HashMap<Pid, Result<Twin, NoTwin>> = frozen.twins().into_iter().collect();
    for p in &memory.private {
        let pid = p.process.pid;
        let twin = match made.remove(&pid) {
            Some(Ok(mut twin)) => {
                snapshot::complete(&mut twin, pid, &p.vmas).map(|()| twin).map_err(|e| format!("{e:#}"))
            }
            Some(Err(NoTwin::Remote(error @ RemoteError::Died(_)))) => return Err(error.into()),
            Some(Err(error)) => Err(error.to_string()),
            None => continue,
        };
        match twin {
            Ok(twin) => drop(twins.insert(pid, twin)),
            Err(why) => ckpt_cli::warn(&format!(
                "{}: no snapshot: {why}; its pages are read while it is frozen",
                p.what()
            )),
        }
    }
    Ok(twins)
}
