//! What a fork does not carry over: memory with MADV_DONTFORK is missing in a twin
//! ([`ckpt_remote::Twin`]), memory with MADV_WIPEONFORK is there and empty (madvise(2)). Both are copied
//! into the twin while the original is frozen, so that it has every page that is to be stored.
//!
//! They cost time in the freeze and memory, as bytes do; programs use them for little (keys, random
//! number generators) or for buffers of devices, which can't be checkpointed anyway.
//!
//! Private memory of huge pages (hugetlbfs) is what forbids a twin ([`unfit`]). A page that both have is copied when the original
//! writes to it, and for that the pool may be empty. Then the kernel takes the page away from the twin, whose memory reads as
//! zeros or not at all; or, if the original had no pages promised (MAP_NORESERVE, or itself a forked child), ends
//! the original by SIGBUS (mm/hugetlb.c, seen on 6.18). To unmap it in the twin before the original runs is too
//! late if we are killed between.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::Context;
use ckpt_proto::types::VmaEntry;
use ckpt_remote::Twin;
use ckpt_sys::Pid;

use super::{
    dump::{CHUNK, Plan},
    is_huge,
};

/// Why there can be no copy-on-write copy of `pid`, a frozen process which has the mappings `vmas`.
///
/// # Errors
/// Its page tables can't be read.
pub fn unfit(pid: Pid, vmas: &[VmaEntry]) -> anyhow::Result<Option<&'static str>> {
    let huge: Vec<VmaEntry> = vmas.iter().filter(|vma| is_huge(vma)).copied().collect();
    let shares = !huge.is_empty() && Plan::new(pid, &huge, 0, None)?.bytes() > 0;
    Ok(shares.then_some(
        "it has private memory of huge pages (hugetlbfs), too few of which may be left for copies",
    ))
}

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
