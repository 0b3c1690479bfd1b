//! `--snapshot`: pages are read from copy-on-write twins ([`ckpt_remote::Twin`]) while the tree runs on.
//!
//! What has to be done before the tree may run: all metadata, shared memory, and sockets, which
//! ckpt-sk reads from the live tree. So all this goes out first, with the heads of the pagemaps behind
//! it, at which ckpt-sk begins; while it works, the memory is forked. All twins are made in the same
//! freeze. Which pages there are, a question that takes as long as a fork, is asked of the twins.
//! Which have been written since the parent checkpoint only the originals know: that is asked
//! in the freeze, and is quick.
//!
//! An increment is asked first, since it mostly stores so little that to read it at once is quicker than to fork. It has
//! twins if it is more than that.
//!
//! With tracking, pages are protected in the freeze in which they are forked: what is written from then on, while the
//! twin is being read, counts as written for the next checkpoint.
//!
//! A process that can't be forked has its pages read within the freeze, as without the option, and
//! a warning says why. Others have their twins all the same.

use std::{collections::HashMap, io::Write};

use anyhow::Context;
use ckpt_cli::Progress;
use ckpt_kinds::mem::{dump::Plan, snapshot};
use ckpt_proto::stream::Writer;
use ckpt_remote::{Frozen, NoTwin, RemoteError, Twin};
use ckpt_sys::{Pid, transfer::Output};

use crate::{AT_ONCE, Memory, Private, Tracking, bytes};

/// A frozen tree, as the one sees it who stores its memory.
pub trait Tree {
    /// Ends the twin when it is dropped.
    type Twin;

    /// Twins of the processes of `memory`, by the pid of the original, with their pids. Says why one has none.
    ///
    /// # Errors
    /// The tree or its tracer is lost.
    fn twins(&mut self, memory: &Memory) -> anyhow::Result<HashMap<Pid, (Pid, Self::Twin)>>;

    /// Everything has been read that the twins do not have.
    ///
    /// # Errors
    /// The checkpoint has failed elsewhere.
    fn let_go(&mut self) -> anyhow::Result<()>;
}

/// Forks the tree's memory, lets the tree go, and writes the contents of `memory`.
///
/// # Errors
/// The tree has been let go, or has not.
pub fn copy<T: Tree>(
    tree: &mut T,
    memory: &Memory,
    tracking: &Tracking,
    writer: &mut Writer<Output>,
) -> anyhow::Result<()> {
    for p in &memory.private {
        Plan::emit_head(p.pid, p.pages_id, writer)?;
    }
    writer.output().flush().context("write the stream")?;
    let mut found = None;
    if tracking.increment() {
        let mut plans = memory.plans(tracking)?;
        if bytes(&plans) <= AT_ONCE {
            memory.share(&mut plans)?;
            return memory.copy_found(&plans, true, writer, || tree.let_go());
        }
        found = Some(plans);
    }
    let mut twins = tree.twins(memory)?;
    memory.copy_shared(writer)?;
    // Without tracking the twins are asked.
    let mut plans = Vec::new();
    let mut tracked = HashMap::new();
    let mut found = found.into_iter().flatten();
    for p in &memory.private {
        let twin = twins.get(&p.pid).map(|(twin, _)| *twin);
        let plan = match found.next() {
            Some(plan) => plan,
            None if twin.is_some() && !tracking.tracks(p.pid) => continue,
            None => p.plan(tracking)?,
        };
        match twin {
            Some(twin) => drop(tracked.insert(p.pid, plan.from_copy(twin))),
            None => plans.push(plan),
        }
    }
    memory.share(&mut plans)?;
    for plan in &plans {
        plan.emit_runs(writer)?;
        plan.copy(writer, |_| ())?;
    }
    writer.output().flush().context("write the stream")?;
    tree.let_go()?;
    plans.clear();
    let with_twins: Vec<_> = memory.private.iter().filter_map(|p| Some((p, twins.remove(&p.pid)?))).collect();
    for (p, (twin, _)) in &with_twins {
        plans.push(match tracked.remove(&p.pid) {
            Some(plan) => plan,
            None => Plan::of_copy(p.pid, *twin, &p.vmas, p.pages_id).with_context(|| lost(p))?,
        });
    }
    memory.share(&mut plans)?;
    for plan in &plans {
        plan.emit_runs(writer)?;
    }
    writer.bulk().context("write the stream")?;
    let mut progress = Progress::new("pages", Some(bytes(&plans)));
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

/// Warns that a process has no twin.
pub fn warn(memory: &Memory, pid: Pid, why: &str) {
    let what = memory.private.iter().find(|p| p.pid == pid).map(Private::what).unwrap_or_default();
    ckpt_cli::warn(&format!("{what}: no snapshot: {why}; its pages are read while it is frozen"));
}

/// Makes the twins of a tree, by the pid of the original; or why there is none.
///
/// # Errors
/// A process of the tree died.
pub fn take(frozen: &mut Frozen, memory: &Memory) -> anyhow::Result<HashMap<Pid, Result<Twin, String>>> {
    let mut twins = HashMap::new();
    let mut unfit = HashMap::new();
    for p in &memory.private {
        unfit.extend(snapshot::unfit(p.pid, &p.vmas).with_context(|| p.what())?.map(|why| (p.pid, why)));
    }
    let made = frozen.twins(|pid| unfit.get(&pid).map(|&why| why.to_owned()));
    let mut made: HashMap<Pid, Result<Twin, NoTwin>> = made.into_iter().collect();
    for p in &memory.private {
        let Some(twin) = made.remove(&p.pid) else { continue };
        let twin = match twin {
            Ok(mut twin) => {
                snapshot::complete(&mut twin, p.pid, &p.vmas).map(|()| twin).map_err(|e| format!("{e:#}"))
            }
            Err(NoTwin::Remote(error @ RemoteError::Died(_))) => return Err(error.into()),
            Err(error) => Err(error.to_string()),
        };
        twins.insert(p.pid, twin);
    }
    Ok(twins)
}
