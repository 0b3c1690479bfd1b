//! Mappings read ahead of a freeze.
//!
//! The kernel tells the flags of a mapping (VmFlags) in /proc/PID/smaps alone, and counts every page for that file:
//! as long as a fork takes. A snapshot is to cost a fork, not two. So smaps is read while the process
//! still runs; in the freeze /proc/PID/maps, which counts nothing, tells whether the mappings are
//! still these. If they are not, smaps is read again in the freeze.
//!
//! An increment stores few pages, and is to cost no walk over all of them either.
//!
//! Flags may change while mappings stay the same (madvise(2), mlock(2)). Locked memory is counted
//! in /proc/PID/status; all other flags that matter are inherited by the copy-on-write twin, whose
//! smaps is compared when the original runs again ([`Early::check`]). Only memory that somebody
//! outside begins to watch with a userfaultfd in just these milliseconds would be missed.
//!
//! Without a twin there is nothing to compare. Then what was read counts only if no thread has run since: each
//! waited in a system call and still waits in the same one, and was given a processor once, to be
//! stopped. A thread that comes back from its call, changes flags, makes the same call from
//! the same place and is stopped on its way into it, all between the last look and the stop, is not told from
//! that. Whoever runs has his smaps read in the freeze.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, bail};
use ckpt_proc::maps::{self, Mapping};
use ckpt_remote::{Process, Thread};
use ckpt_sys::{Pid, Tid, procfs};

/// What was read ahead. Empty: everything is read when it is asked for.
#[derive(Debug, Default)]
pub struct Early {
    known: HashMap<Pid, Known>,
    /// What was read holds only for processes that have not run since.
    at_rest: bool,
}

#[derive(Debug)]
struct Known {
    mappings: Vec<Mapping>,
    /// How its threads rested. Empty if that is not asked for.
    rests: Vec<(Tid, Rest)>,
}

/// A thread that waits in a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rest {
    /// How often it has been given a processor.
    runs: u64,
    /// Number of the call, stack pointer and instruction pointer.
    place: (u64, u64, u64),
}

impl Rest {
    /// How `tid` rests; `None` if it does not, or the kernel does not tell.
    fn of(pid: Pid, tid: Tid) -> Option<Self> {
        let runs = runs(pid, tid)?;
        let text = procfs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let [call, .., stack, instruction] = words[..] else { return None };
        let address = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        Some(Self { runs, place: (call.parse().ok()?, address(stack)?, address(instruction)?) })
    }

    /// Whether the frozen `thread` rested until it was stopped, for which alone it had to be woken.
    fn lasted(&self, pid: Pid, thread: &Thread) -> bool {
        const SYSCALL_INSTRUCTION: u64 = 2;
        let (regs, (call, stack, instruction)) = (&thread.regs, self.place);
        let same_call = regs.orig_rax == call && regs.rsp == stack;
        // Behind the instruction, or on it if the call is to be made again.
        let same_place = [regs.rip, regs.rip.wrapping_add(SYSCALL_INSTRUCTION)].contains(&instruction);
        same_call && same_place && runs(pid, thread.tid) == Some(self.runs + 1)
    }
}

/// The third number of `schedstat` (Documentation/scheduler/sched-stats.rst).
fn runs(pid: Pid, tid: Tid) -> Option<u64> {
    let text = procfs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    text.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// Flags that a fork drops (mlock(2), userfaultfd(2)) or that say nothing that is stored.
/// Guards (`gu`) are looked for in the freeze.
const FLEETING: [&[u8; 2]; 8] = [b"lo", b"lf", b"um", b"uw", b"ui", b"sd", b"nt", b"gu"];

/// More threads than this are not asked how they rest: it would take as long as what it saves.
const MOST_THREADS: usize = 16;

impl Early {
    /// Reads the mappings of `root` and its descendants as they are now, for a snapshot, whose twins are
    /// [checked](Self::check). What can't be read is left out.
    #[must_use]
    pub fn for_twins(root: Pid) -> Self {
        Self { known: walk(root, false), at_rest: false }
    }

    /// The same for processes that are at rest, and stay so until they are frozen.
    #[must_use]
    pub fn at_rest(root: Pid) -> Self {
        Self { known: walk(root, true), at_rest: true }
    }

    /// The mappings of a frozen process, with their flags; `now` are those that it has in the freeze, without.
    ///
    /// # Errors
    /// /proc can't be read.
    pub fn mappings(&mut self, process: &Process, now: Option<&[Mapping]>) -> anyhow::Result<Vec<Mapping>> {
        let holds = |known: &Known| {
            now.is_some_and(|now| known.is_of(process, now)) && (!self.at_rest || known.rested(process))
        };
        match self.known.get(&process.pid) {
            Some(known) if holds(known) => Ok(known.mappings.clone()),
            _ => {
                // It is no use comparing a twin with it either.
                self.known.remove(&process.pid);
                smaps(process.pid)
            }
        }
    }

    /// Compares flags that were read ahead with those of `twin`, a copy of `pid` made in the freeze.
    ///
    /// # Errors
    /// They differ: what has been stored is not the state of one instant.
    pub fn check(&self, pid: Pid, twin: Pid) -> anyhow::Result<()> {
        let Some(Known { mappings: known, .. }) = self.known.get(&pid) else { return Ok(()) };
        let found = smaps(twin)?;
        let lasting = |m: &Mapping| {
            let mut flags = m.flags.clone();
            flags.retain(|flag| !FLEETING.contains(&flag) && flag != b"dc");
            flags.sort_unstable();
            flags
        };
        for mapping in known.iter().filter(|m| !m.has(b"dc") && m.name != b"[vsyscall]") {
            // It may be one with a neighbour by now, from which only the tracking kept it apart.
            let at = found.partition_point(|m| m.end <= mapping.start);
            let same = found.get(at).is_some_and(|m| {
                let within = m.start <= mapping.start && m.end >= mapping.end;
                within && lasting(m) == lasting(mapping) && !m.has(b"dc")
            });
            if !same {
                bail!(
                    "memory {:#x}-{:#x}: its advice (madvise) changed while the process was being frozen; try again",
                    mapping.start,
                    mapping.end
                );
            }
        }
        Ok(())
    }
}

impl Known {
    /// Whether the mappings are still those that the frozen process has: `now`, which have no flags.
    fn is_of(&self, process: &Process, now: &[Mapping]) -> bool {
        let same = |a: &Mapping, b: &Mapping| *b == Mapping { flags: Vec::new(), page_kib: 0, ..a.clone() };
        let locked: u64 = self.mappings.iter().filter(|m| m.has(b"lo")).map(Mapping::len).sum();
        self.mappings.len() == now.len()
            && self.mappings.iter().zip(now).all(|(a, b)| same(a, b))
            && locked == process.threads.first().map_or(0, |t| t.status.locked_kib * 1024)
    }

    fn rested(&self, process: &Process) -> bool {
        let lasted = |thread: &Thread| {
            let rest = self.rests.iter().find(|(tid, _)| *tid == thread.tid);
            rest.is_some_and(|(_, rest)| rest.lasted(process.pid, thread))
        };
        self.rests.len() == process.threads.len() && process.threads.iter().all(lasted)
    }
}

/// The mappings of a process as they are now, with their flags.
///
/// # Errors
/// /proc can't be read.
pub fn smaps(pid: Pid) -> anyhow::Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    let text = procfs::read(&path).with_context(|| path.clone())?;
    maps::parse(&text).context(path)
}

fn walk(root: Pid, at_rest: bool) -> HashMap<Pid, Known> {
    let mut known = HashMap::new();
    let mut seen = HashSet::new();
    let mut todo = vec![root];
    while let Some(pid) = todo.pop() {
        if !seen.insert(pid) {
            continue;
        }
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let tids: Vec<Tid> = tasks.filter_map(|t| t.file_name().to_str()?.parse().ok()).map(Tid).collect();
        for tid in &tids {
            let path = format!("/proc/{pid}/task/{tid}/children");
            let children = procfs::read_to_string(path).unwrap_or_default();
            todo.extend(children.split_whitespace().filter_map(|n| n.parse().ok()).map(Pid));
        }
        if let Some(one) = look(pid, if at_rest { &tids } else { &[] }) {
            known.insert(pid, one);
        }
    }
    known
}

/// Reads the mappings of `pid`, during which `resting` have to rest.
fn look(pid: Pid, resting: &[Tid]) -> Option<Known> {
    if resting.len() > MOST_THREADS {
        return None;
    }
    let rest = |&tid: &Tid| Some((tid, Rest::of(pid, tid)?));
    let rests: Vec<_> = resting.iter().map(rest).collect::<Option<_>>()?;
    let mappings = smaps(pid).ok()?;
    let still = rests.iter().all(|(tid, rest)| runs(pid, *tid) == Some(rest.runs));
    still.then_some(Known { mappings, rests })
}
