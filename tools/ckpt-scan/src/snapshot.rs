//! `--snapshot`: pages are read from copy-on-write twins ([`ckpt_remote::Twin`]) while the tree runs on.
//!
//! What has to be done before the tree may run: all metadata, shared memory, and sockets, which
//! ckpt-sk reads from the live tree. So everything up to BULK goes out first; while ckpt-sk works on
//! that, the memory is forked. All twins are made in the same freeze.
//!
//! A process that can't be forked has its pages read within the freeze, as without the option, and
//! a warning says why. Others have their twins all the same.

use std::{collections::HashMap, io::Write, time::Duration};

use anyhow::Context;
use ckpt_cli::Progress;
use ckpt_hold::Holder;
use ckpt_kinds::mem::snapshot;
use ckpt_proto::stream::Writer;
use ckpt_remote::{Frozen, NoTwin, Release, RemoteError, Twin};
use ckpt_sys::{Pid, transfer::Output};

use crate::{Planned, free, succeeded};

/// The stages behind us.
pub struct Behind<'a> {
    /// `None` behind a plain file.
    pub holder: Option<&'a Holder>,
    /// Which of them work on the live tree.
    pub needs: &'a [&'a str],
    /// How long to wait for them to come.
    pub patience: Duration,
}

/// Forks the tree's memory, lets the tree run (`frozen` is `None` then), and writes the pages of `plans`.
///
/// # Errors
/// The tree runs, or is in `frozen` still.
pub fn copy(
    frozen: &mut Option<Frozen>,
    plans: &mut [Planned],
    behind: Behind<'_>,
    writer: &mut Writer<Output>,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    writer.output().flush().context("write the stream")?;
    let mut twins = match frozen {
        Some(frozen) => take(frozen, plans)?,
        None => HashMap::new(),
    };
    for p in plans.iter().filter(|p| !twins.contains_key(&p.process.pid)) {
        p.plan.copy(writer, |n| progress.inc(n))?;
    }
    writer.output().flush().context("write the stream")?;
    if let Some(holder) = behind.holder {
        let outcome = holder.passed(behind.needs, behind.patience);
        succeeded(plans.first().map_or(Pid(0), |p| p.process.pid), outcome)?;
    }
    if let Some(frozen) = frozen.take() {
        free(frozen, Release::Run);
    }
    for p in plans.iter() {
        let Some(twin) = twins.remove(&p.process.pid) else { continue };
        let copied = p.plan.copy(writer, |n| progress.inc(n));
        copied.with_context(|| {
            let what =
                "read pages of its copy-on-write snapshot (if memory is short the kernel ends it first)";
            format!("pid {} ({}): {what}", p.process.pid, p.process.comm())
        })?;
        drop(twin);
    }
    Ok(())
}

/// Makes the twins, by the pid of the original, and has the plans read from them.
fn take(frozen: &mut Frozen, plans: &mut [Planned]) -> anyhow::Result<HashMap<Pid, Twin>> {
    let mut twins = HashMap::new();
    let mut made: HashMap<Pid, Result<Twin, NoTwin>> = frozen.twins().into_iter().collect();
    for p in plans {
        let pid = p.process.pid;
        let twin = match made.remove(&pid) {
            Some(Ok(mut twin)) => snapshot::complete(&mut twin, pid, &p.vmas, &p.plan)
                .map(|()| twin)
                .map_err(|e| format!("{e:#}")),
            Some(Err(NoTwin::Remote(error @ RemoteError::Died(_)))) => return Err(error.into()),
            Some(Err(error)) => Err(error.to_string()),
            None => continue,
        };
        match twin {
            Ok(twin) => {
                p.plan.read_from(twin.pid());
                twins.insert(pid, twin);
            }
            Err(why) => ckpt_cli::warn(&format!(
                "pid {pid} ({}): no snapshot: {why}; its pages are read while it is frozen",
                p.process.comm()
            )),
        }
    }
    Ok(twins)
}
