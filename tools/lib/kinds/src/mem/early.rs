//! Mappings read ahead of a freeze.
//!
//! The kernel tells the flags of a mapping (VmFlags) in /proc/PID/smaps alone, and counts every page for that file:
//! as long as a fork takes. A snapshot is to cost a fork, not two. So smaps is read while the process
//! still runs; in the freeze /proc/PID/maps, which counts nothing, tells whether the mappings are
//! still these. If they are not, smaps is read again in the freeze.
//!
//! Flags may change while mappings stay the same (madvise(2), mlock(2)). Locked memory is counted
//! in /proc/PID/status; all other flags that matter are inherited by the copy-on-write twin, whose
//! smaps is compared when the original runs again ([`Early::check`]). Only memory that somebody
//! outside begins to watch with a userfaultfd in just these milliseconds would be missed.

use std::{collections::HashMap, fs};

use anyhow::{Context, bail};
use ckpt_proc::{
    maps::{self, Mapping},
    status,
};
use ckpt_sys::Pid;

/// What was read ahead. Empty: everything is read when it is asked for.
#[derive(Debug, Default)]
pub struct Early(HashMap<Pid, Vec<Mapping>>);

/// Flags that a fork drops (mlock(2), userfaultfd(2)) or that say nothing that is stored.
/// Guards (`gu`) are looked for in the freeze.
const FLEETING: [&[u8; 2]; 8] = [b"lo", b"lf", b"um", b"uw", b"ui", b"sd", b"nt", b"gu"];

impl Early {
    /// Reads the mappings of `root` and its descendants as they are now. What can't be read is left out.
    #[must_use]
    pub fn read(root: Pid) -> Self {
        let mut early = Self::default();
        let mut todo = vec![root];
        while let Some(pid) = todo.pop() {
            if early.0.contains_key(&pid) {
                continue;
            }
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                todo.extend(children.split_whitespace().filter_map(|n| n.parse().ok()).map(Pid));
            }
            if let Ok(mappings) = read(pid, "smaps") {
                early.0.insert(pid, mappings);
            }
        }
        early
    }

    /// The mappings of a frozen process, with their flags.
    ///
    /// # Errors
    /// /proc can't be read.
    pub fn mappings(&mut self, pid: Pid) -> anyhow::Result<Vec<Mapping>> {
        if let Some(known) = self.0.get(&pid) {
            let now = read(pid, "maps")?;
            let same =
                |a: &Mapping, b: &Mapping| *b == Mapping { flags: Vec::new(), page_kib: 0, ..a.clone() };
            let unchanged = known.len() == now.len() && known.iter().zip(&now).all(|(a, b)| same(a, b));
            let locked: u64 = known.iter().filter(|m| m.has(b"lo")).map(Mapping::len).sum();
            if unchanged && locked == locked_bytes(pid)? {
                return Ok(known.clone());
            }
            self.0.remove(&pid);
        }
        read(pid, "smaps")
    }

    /// Compares flags that were read ahead with those of `twin`, a copy of `pid` made in the freeze.
    ///
    /// # Errors
    /// They differ: what has been stored is not the state of one instant.
    pub fn check(&self, pid: Pid, twin: Pid) -> anyhow::Result<()> {
        let Some(known) = self.0.get(&pid) else { return Ok(()) };
        let found: HashMap<u64, Mapping> = read(twin, "smaps")?.into_iter().map(|m| (m.start, m)).collect();
        let lasting = |m: &Mapping| {
            let mut flags = m.flags.clone();
            flags.retain(|flag| !FLEETING.contains(&flag) && flag != b"dc");
            flags.sort_unstable();
            flags
        };
        for mapping in known.iter().filter(|m| !m.has(b"dc") && m.name != b"[vsyscall]") {
            let same = found
                .get(&mapping.start)
                .is_some_and(|m| m.end == mapping.end && lasting(m) == lasting(mapping) && !m.has(b"dc"));
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

fn read(pid: Pid, file: &str) -> anyhow::Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/{file}");
    let text = fs::read(&path).with_context(|| path.clone())?;
    maps::parse(&text).context(path)
}

fn locked_bytes(pid: Pid) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read(&path).with_context(|| path.clone())?;
    Ok(status::parse(&text).context(path)?.locked_kib * 1024)
}
