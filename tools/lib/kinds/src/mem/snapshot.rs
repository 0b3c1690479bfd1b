//! What a fork does not carry over: memory with MADV_DONTFORK is missing in a twin
//! ([`ckpt_remote::Twin`]), memory with MADV_WIPEONFORK is there and empty (madvise(2)). Both are copied
//! into the twin while the original is frozen, so that it has every page that is to be stored.
//!
//! They cost time in the freeze and memory, as bytes do; programs use them for little (keys, random
//! number generators) or for buffers of devices, which can't be checkpointed anyway.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::Context;
use ckpt_proto::types::VmaEntry;
use ckpt_remote::Twin;
use ckpt_sys::Pid;

use super::dump::{CHUNK, Plan};

/// Makes `twin` hold all pages of `original`, which has the mappings `vmas`.
///
/// # Errors
/// The twin's memory can't be mapped or written, or the original's can't be read.
pub fn complete(twin: &mut Twin, original: Pid, vmas: &[VmaEntry]) -> anyhow::Result<()> {
    const MISSING: u64 = 1 << libc::MADV_DONTFORK;
    const EMPTY: u64 = 1 << libc::MADV_WIPEONFORK;
    let mut files = None;
    for vma in vmas.iter().filter(|vma| vma.madv.unwrap_or(0) & (MISSING | EMPTY) != 0) {
        let plan = Plan::new(original, std::slice::from_ref(vma), 0, None)?;
        if plan.bytes() == 0 {
            continue;
        }
        if vma.madv.unwrap_or(0) & MISSING != 0 {
            twin.map(vma.start, vma.end)?;
        }
        let (from, to) = match &files {
            Some(files) => files,
            None => files.insert((memory_of(original, false)?, memory_of(twin.pid(), true)?)),
        };
        let mut buffer = vec![0; CHUNK];
        for (start, end) in plan.runs().map(|run| (run.start, run.end)) {
            let mut at = start;
            while at < end {
                let n = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                // Through /proc/PID/mem, which asks for no permission of the mapping.
                let what = || format!("copy memory at {at:#x} that a fork does not carry over");
                from.read_exact_at(&mut buffer[..n], at).with_context(what)?;
                to.write_all_at(&buffer[..n], at).with_context(what)?;
                at += n as u64;
            }
        }
    }
    Ok(())
}

fn memory_of(pid: Pid, write: bool) -> anyhow::Result<File> {
    let path = format!("/proc/{pid}/mem");
    File::options().read(!write).write(write).open(&path).context(path)
}
