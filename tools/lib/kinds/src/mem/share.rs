//! Pages that a process has from the one that forked it, found by their frame numbers.
//!
//! After fork(2) parent and child have the same pages until one of them writes. Such a page is
//! stored with the parent, and the child's pagemap says so
//! ([`page::AS_PARENT_PROCESS`](super::page::AS_PARENT_PROCESS)). /proc/PID/pagemap tells which frame,
//! or which place in the swap, is behind an address (Documentation/admin-guide/mm/pagemap.rst); equal
//! ones at the same address are the same page. The numbers are zero without CAP_SYS_ADMIN. Pages move while a tree
//! is frozen too (reclaim, compaction), and a frame that one process has left can be the other's a moment later: what
//! moved between two looks is taken for different.
//!
//! In an increment, what a process has not written since the checkpoint before is in that, with the parent process or
//! not, and stays so: only the rest is looked at, such as all of a child that was forked since. What it has
//! from its parent process may be in the checkpoint before with that ([`ckpt_images::chain`] follows both).

use std::{collections::HashMap, fs::File, ops::Range, os::unix::fs::FileExt};

use anyhow::Context;
use ckpt_sys::{Pid, Refused};

use super::dump::{PAGE, Plan, Run};

/// Frame number or place in the swap, and that it is either.
const IDENTITY: u64 = ((1 << 55) - 1) | SWAPPED | PRESENT;
const NUMBER: u64 = (1 << 55) - 1;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// Pages that are looked at at a time.
const BATCH: u64 = 8192;

/// Marks in each plan the pages that the plan of its parent process has too. `parent` gives a process's parent.
///
/// # Errors
/// [`Refused`] without CAP_SYS_ADMIN; /proc can't be read.
pub fn share(plans: &mut [Plan], parent: &dyn Fn(Pid) -> Option<Pid>) -> anyhow::Result<()> {
    let places: HashMap<Pid, usize> = plans.iter().enumerate().map(|(at, plan)| (plan.pid(), at)).collect();
    for at in 0..plans.len() {
        let Some(&theirs) = parent(plans[at].pid()).and_then(|parent| places.get(&parent)) else { continue };
        let runs = marked(&plans[at], &plans[theirs]).with_context(|| format!("pid {}", plans[at].pid()))?;
        plans[at].set_runs(runs);
    }
    Ok(())
}

/// After the pages of processes that run have been read: what a process has stored with its parent process, and that may have
/// written to before it was read, counts as written by the process itself, so that the next increment stores it.
/// `plans` have parents before children.
pub fn distrust_changed(plans: &[Plan], parent: &dyn Fn(Pid) -> Option<Pid>) {
    let mut doubtful: HashMap<Pid, Vec<Range<u64>>> = HashMap::new();
    for plan in plans {
        let theirs = parent(plan.pid()).and_then(|parent| plans.iter().find(|plan| plan.pid() == parent));
        let ranges = match theirs {
            Some(theirs) => doubts(plan, theirs, doubtful.get(&theirs.pid()).map_or(&[], Vec::as_slice)),
            None => Vec::new(),
        };
        ranges.iter().for_each(|range| plan.count_as_written(range));
        doubtful.insert(plan.pid(), ranges);
    }
}

/// What `plan` has from `parent`, whose own doubtful pages are `theirs`, that may have been read too late.
fn doubts(plan: &Plan, parent: &Plan, theirs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut doubts = Vec::new();
    let runs: Vec<&Run> = parent.runs().filter(|run| !run.vdso && !run.in_parent).collect();
    for run in plan.runs().filter(|run| run.forked) {
        let first = runs.partition_point(|theirs| theirs.end <= run.start);
        for stored in runs[first..].iter().take_while(|stored| stored.start < run.end) {
            let both = run.start.max(stored.start)..run.end.min(stored.end);
            if stored.forked {
                let common = theirs.iter().map(|range| both.start.max(range.start)..both.end.min(range.end));
                doubts.extend(common.filter(|range| !range.is_empty()));
            } else if !stored.lazy {
                // A file's: what was dropped and read again looks as if it had been left alone.
                doubts.push(both);
            } else {
                let mut at = both.start;
                for same in parent.unchanged(&both) {
                    doubts.push(at..same.start);
                    at = same.end;
                }
                doubts.push(at..both.end);
            }
        }
    }
    doubts.retain(|range| !range.is_empty());
    doubts
}

/// The runs of `plan`, cut where sharing begins and ends.
fn marked(plan: &Plan, parent: &Plan) -> anyhow::Result<Vec<Run>> {
    let open = |plan: &Plan| {
        let path = format!("/proc/{}/pagemap", plan.source());
        File::open(&path).context(path)
    };
    let (ours, theirs) = (open(plan)?, open(parent)?);
    let mut runs: Vec<Run> = Vec::new();
    let mut push = |run: Run| match runs.last_mut() {
        Some(last) if last.joins(&run) => last.end = run.end,
        _ => runs.push(run),
    };
    let mut candidates = parent.runs().filter(|run| !run.vdso).peekable();
    for run in plan.runs() {
        let mut at = run.start;
        while at < run.end {
            while candidates.next_if(|theirs| theirs.end <= at).is_some() {}
            let alone = run.vdso || run.in_parent;
            let both = match candidates.peek().filter(|theirs| theirs.start < run.end && !alone) {
                Some(theirs) if theirs.start <= at => theirs.end.min(run.end),
                other => {
                    let end = other.map_or(run.end, |theirs| theirs.start);
                    push(Run { start: at, end, ..*run });
                    at = end;
                    continue;
                }
            };
            let end = both.min(at + BATCH * PAGE);
            for (page, same) in compare(&ours, &theirs, at, end)?.into_iter().enumerate() {
                let start = at + page as u64 * PAGE;
                push(Run { start, end: start + PAGE, forked: same, ..*run });
            }
            at = end;
        }
    }
    Ok(runs)
}

/// For each page whether both have the same one.
fn compare(ours: &File, theirs: &File, start: u64, end: u64) -> anyhow::Result<Vec<bool>> {
    let [before, theirs, ours] = [ours, theirs, ours].map(|pagemap| -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from((end - start) / PAGE * 8)?];
        pagemap.read_exact_at(&mut bytes, start / PAGE * 8).context("read pagemap")?;
        Ok(bytes)
    });
    let (before, theirs, ours) = (before?, theirs?, ours?);
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes) & IDENTITY;
    let mut same = Vec::new();
    let looks = before.chunks_exact(8).zip(theirs.chunks_exact(8)).zip(ours.chunks_exact(8));
    for ((before, b), a) in looks {
        let (before, a, b) = (word(before), word(a), word(b));
        if a & PRESENT != 0 && a & NUMBER == 0 {
            let refused = Refused::new("--share", "the kernel does not tell which pages are the same");
            return Err(refused.advise("run with CAP_SYS_ADMIN, or without --share").into());
        }
        same.push(before == b && a == b && a & (PRESENT | SWAPPED) != 0);
    }
    Ok(same)
}
