//! Pages that a task can do without until it touches them.
//!
//! userfaultfd(2) brings pages of private anonymous memory. What can't wait there:
//!
//! - memory that grows down: the stack that exec(2) made. It is small, others read arguments and environment
//!   in it by /proc/PID/cmdline, which does not wait for a page but gives up;
//! - memory that is locked: that it is there is what was asked for;
//! - memory of huge pages (hugetlbfs), which would have to come as whole ones, from a pool that may be empty by then;
//! - memory that a fork wipes (MADV_WIPEONFORK): the kernel hands a child the watch on it, and does not tell that its
//!   missing pages are to read as zeros;
//! - pages that the kernel may touch on a task's behalf where it can't wait: on its way out of the task (the word that
//!   is cleared when a thread ends, the list of robust futexes), and in calls that begin again (the futex of a lock
//!   with priority inheritance). They are found through the registers and the addresses that the kernel keeps.
//!
//! Private mappings of files are always filled: userfaultfd would have to bring the unwritten pages too.

use std::ops::Range;

use ckpt_proto::types::CoreEntry;

use super::{AddressSpace, PAGE, Run, VmaEntry, advice, grows, is_huge, status};

/// A task's pages, parted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parted {
    /// To be placed before it runs.
    pub now: Vec<Run>,
    /// Can come later.
    pub later: Vec<Run>,
    /// The mappings that those are in.
    pub areas: Vec<Range<u64>>,
}

impl AddressSpace {
    /// Parts `runs`; pages of `hot` addresses can't wait.
    #[must_use]
    pub fn part(&self, runs: &[Run], hot: &[u64]) -> Parted {
        let mut hot: Vec<u64> = hot.iter().map(|addr| addr / PAGE * PAGE).collect();
        hot.sort_unstable();
        hot.dedup();
        let mut parted = Parted::default();
        for run in runs {
            let mut at = run.addr;
            let end = run.addr + run.len;
            while at < end {
                let i = self.mm.vmas.partition_point(|vma| vma.end <= at);
                let vma = self.mm.vmas.get(i).filter(|vma| vma.start <= at);
                let until = vma.map_or(end, |vma| vma.end.min(end));
                let waits = vma.filter(|vma| can_wait(vma));
                let next = hot.get(hot.partition_point(|&page| page < at)).filter(|&&page| page < until);
                let (list, until) = match (waits, next) {
                    (None, _) => (&mut parted.now, until),
                    (Some(_), Some(&page)) if page == at => (&mut parted.now, at + PAGE),
                    (Some(_), next) => (&mut parted.later, next.copied().unwrap_or(until)),
                };
                let piece = Run { addr: at, len: until - at, offset: run.offset + (at - run.addr), ..*run };
                match list.last_mut() {
                    Some(last) if last.joins(&piece) => last.len += piece.len,
                    _ => list.push(piece),
                }
                if let (Some(vma), true) = (waits, next != Some(&at))
                    && parted.areas.last().is_none_or(|area| area.end <= at)
                {
                    parted.areas.push(vma.start..vma.end);
                }
                at = until;
            }
        }
        parted
    }
}

fn can_wait(vma: &VmaEntry) -> bool {
    vma.status & status::ANON_PRIVATE != 0
        && vma.flags & libc::MAP_LOCKED.unsigned_abs() == 0
        && !is_huge(vma)
        && !grows(vma)
        && !advice(vma).unwrap_or_default().contains(&libc::MADV_WIPEONFORK)
}

/// Addresses that a thread, or the kernel for it, may need at once, or where the kernel can't wait.
#[must_use]
pub fn hot(core: &CoreEntry) -> Vec<u64> {
    let mut hot = Vec::new();
    if let Some(thread) = &core.thread_core {
        hot.push(thread.futex_rla);
        hot.extend(thread.rseq_entry.iter().map(|rseq| rseq.rseq_abi_pointer));
    }
    if let Some(info) = &core.thread_info {
        let r = &info.gpregs;
        hot.push(info.clear_tid_addr);
        hot.extend([r.ax, r.bx, r.cx, r.dx, r.si, r.di, r.bp, r.sp, r.ip, r.fs_base, r.gs_base]);
        hot.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
        // Where a signal's frame goes.
        hot.push(r.sp.saturating_sub(PAGE));
    }
    hot
}

#[cfg(test)]
mod tests {
    use ckpt_images::PagesFile;
    use ckpt_proto::types::MmEntry;
    use ckpt_sys::Pid;

    use super::*;
    use crate::mem::restore::Pages;

    #[test]
    fn only_plain_anonymous_memory_waits_and_hot_pages_do_not() {
        let vma = |start, end, status, flags: i32| VmaEntry {
            start,
            end,
            status: status | status::REGULAR,
            flags: flags.unsigned_abs(),
            ..VmaEntry::default()
        };
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let vmas = vec![
            vma(0x1000, 0x5000, status::ANON_PRIVATE, private),
            vma(0x5000, 0x6000, status::FILE_PRIVATE, libc::MAP_PRIVATE),
            vma(0x6000, 0x7000, status::ANON_PRIVATE, private | libc::MAP_LOCKED),
            vma(0x7000, 0x8000, status::ANON_PRIVATE, private | libc::MAP_GROWSDOWN),
            VmaEntry {
                madv: Some(1 << libc::MADV_WIPEONFORK),
                ..vma(0x8000, 0x9000, status::ANON_PRIVATE, private)
            },
            vma(0x9000, 0xb000, status::ANON_PRIVATE, private),
            vma(0x20_0000, 0x40_0000, status::ANON_PRIVATE, private | libc::MAP_HUGETLB),
        ];
        let run =
            |addr, len, offset| Run { addr, len, vdso: false, file: PagesFile { level: 0, id: 1 }, offset };
        let space = AddressSpace {
            pid: Pid(1),
            mm: MmEntry { vmas, ..MmEntry::default() },
            pages: Pages::default(),
            vdso: None,
        };
        let runs = [run(0x2000, 0x8000, 0), run(0xa000, 0x1000, 0x8000), run(0x20_0000, 0x20_0000, 0x9000)];
        let parted = space.part(&runs, &[0x3fff, 0xa001]);
        assert_eq!(
            parted.now,
            [
                run(0x3000, 0x1000, 0x1000),
                run(0x5000, 0x4000, 0x3000),
                run(0xa000, 0x1000, 0x8000),
                run(0x20_0000, 0x20_0000, 0x9000)
            ]
        );
        assert_eq!(
            parted.later,
            [run(0x2000, 0x1000, 0), run(0x4000, 0x1000, 0x2000), run(0x9000, 0x1000, 0x7000),]
        );
        assert_eq!(parted.areas, [0x1000..0x5000, 0x9000..0xb000]);
    }
}
