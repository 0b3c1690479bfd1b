//! Memory that a task has from the task that forked it.
//!
//! Forked processes share pages until one of them writes. Pages that each reads for itself are
//! shared no more, and fifty workers over one heap need fifty heaps. So a parent's memory is built
//! before its children are forked, and a child keeps what it inherits: the areas that both have, but for
//! pages that it does not have or that differ, which are dropped or read.
//!
//! What is the same is told by the images where they say so (pages stored once, `ckpt-scan
//! --share`); else, as in images of CRIU, by comparing the stored pages, if a few samples
//! say that it is worth it.
//!
//! An area is kept in the range that both have of it if it is private in both, of the same file at
//! the same place if of any, and of the same kind. Areas that grow down must be the same as a whole.

use std::ops::Range;

use anyhow::Context;
use ckpt_images::ImageSet;
use ckpt_remote::{Arg, Call};

use super::{AddressSpace, PAGE, Run, VmaEntry, advice, grows, is_file, read_at, status, text, unmap};

/// Samples that are compared to learn whether all should be.
const SAMPLES: usize = 32;
/// Bytes that are compared at a time.
const CHUNK: u64 = 256 << 10;

/// What a child does with the memory that its parent's image describes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inherited {
    /// What stays mapped, in order.
    pub kept: Vec<Range<u64>>,
    /// Pages in it that the child does not have.
    pub stale: Vec<Range<u64>>,
    /// Pages that are still to come to the child.
    pub missing: Vec<Run>,
}

impl Inherited {
    /// Nothing stays.
    #[must_use]
    pub fn nothing(child: &AddressSpace) -> Self {
        let missing = child.pages.runs.iter().filter(|run| !run.vdso).copied().collect();
        Self { missing, ..Self::default() }
    }

    /// What `child` can keep of the memory of `parent`; pages that are stored twice are compared if `set` is given.
    ///
    /// # Errors
    /// Pages can't be read.
    pub fn of(parent: &AddressSpace, child: &AddressSpace, set: Option<&ImageSet>) -> anyhow::Result<Self> {
        let mut inherited = Self { kept: kept(parent, child), ..Self::default() };
        let mut compare = set.map(Comparison::new);
        for run in child.pages.runs.iter().filter(|run| !run.vdso) {
            let mut at = run.addr;
            while at < run.addr + run.len {
                let (piece, theirs) = inherited.piece(parent, run, at);
                match (theirs, &mut compare) {
                    (Some(theirs), _) if theirs.same_place(&piece) => {}
                    (Some(theirs), Some(compare)) => {
                        compare.differing(&theirs, &piece, &mut inherited.missing)?
                    }
                    _ => push(&mut inherited.missing, piece),
                }
                at += piece.len;
            }
        }
        for run in parent.pages.runs.iter().filter(|run| !run.vdso) {
            inherited.add_stale(run, &child.pages.runs);
        }
        Ok(inherited)
    }

    /// Whether it is worth building `parent` before `child` is forked: pages are stored once for both, or some of those
    /// that are stored twice are equal.
    ///
    /// # Errors
    /// Pages can't be read.
    pub fn pays(parent: &AddressSpace, child: &AddressSpace, set: Option<&ImageSet>) -> anyhow::Result<bool> {
        let probe = Self { kept: kept(parent, child), ..Self::default() };
        if probe.kept.is_empty() {
            return Ok(false);
        }
        let mut twice = Vec::new();
        for run in child.pages.runs.iter().filter(|run| !run.vdso) {
            let mut at = run.addr;
            while at < run.addr + run.len {
                let (piece, theirs) = probe.piece(parent, run, at);
                match theirs {
                    Some(theirs) if theirs.same_place(&piece) => return Ok(true),
                    Some(theirs) => twice.push((theirs, piece)),
                    None => {}
                }
                at += piece.len;
            }
        }
        let Some(set) = set else { return Ok(false) };
        let mut compare = Comparison::new(set);
        let step = twice.len().div_ceil(SAMPLES).max(1);
        for (theirs, piece) in twice.into_iter().step_by(step) {
            // One page from the middle of each.
            let skip = piece.len / 2 / PAGE * PAGE;
            let page = |run: Run| Run { addr: run.addr + skip, len: PAGE, offset: run.offset + skip, ..run };
            let mut missing = Vec::new();
            compare.differing(&page(theirs), &page(piece), &mut missing)?;
            if missing.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The part of `run` from `at` on that is kept or not as a whole, and what the parent has there if it is.
    fn piece(&self, parent: &AddressSpace, run: &Run, at: u64) -> (Run, Option<Run>) {
        let end = run.addr + run.len;
        let part = |run: &Run, end: u64| Run {
            addr: at,
            len: end - at,
            offset: run.offset + (at - run.addr),
            ..*run
        };
        let i = self.kept.partition_point(|kept| kept.end <= at);
        let Some(kept) = self.kept.get(i).filter(|kept| kept.start < end) else {
            return (part(run, end), None);
        };
        if kept.start > at {
            return (part(run, kept.start), None);
        }
        let end = end.min(kept.end);
        let theirs = &parent.pages.runs;
        let i = theirs.partition_point(|run| run.addr + run.len <= at);
        match theirs.get(i).filter(|theirs| theirs.addr < end) {
            Some(theirs) if theirs.addr <= at => {
                let end = end.min(theirs.addr + theirs.len);
                (part(run, end), Some(part(theirs, end)))
            }
            Some(theirs) => (part(run, theirs.addr), None),
            None => (part(run, end), None),
        }
    }

    /// Adds what `runs` does not cover of a run of the parent.
    fn add_stale(&mut self, theirs: &Run, runs: &[Run]) {
        let end = theirs.addr + theirs.len;
        let first = self.kept.partition_point(|kept| kept.end <= theirs.addr);
        for kept in self.kept[first..].iter().take_while(|kept| kept.start < end) {
            let (mut at, end) = (theirs.addr.max(kept.start), end.min(kept.end));
            let first = runs.partition_point(|run| run.addr + run.len <= at);
            for run in runs[first..].iter().take_while(|run| run.addr < end) {
                if run.addr > at {
                    self.stale.push(at..run.addr);
                }
                at = at.max(run.addr + run.len);
            }
            if at < end {
                self.stale.push(at..end);
            }
        }
    }

    /// Whether `addr` is in memory that stays.
    #[must_use]
    pub fn keeps(&self, addr: u64) -> bool {
        let i = self.kept.partition_point(|kept| kept.end <= addr);
        self.kept.get(i).is_some_and(|kept| kept.start <= addr)
    }

    /// The parts of `range` that are to be mapped anew.
    #[must_use]
    pub fn anew(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut at = range.start;
        let first = self.kept.partition_point(|kept| kept.end <= range.start);
        for kept in self.kept[first..].iter().take_while(|kept| kept.start < range.end) {
            if kept.start > at {
                parts.push(at..kept.start);
            }
            at = kept.end;
        }
        if at < range.end {
            parts.push(at..range.end);
        }
        parts
    }

    /// What makes the inherited memory of `parent` that of `child`, when everything else has been unmapped.
    #[must_use]
    pub fn calls(&self, parent: &AddressSpace, child: &AddressSpace) -> Vec<Call> {
        let mut calls = Vec::new();
        for kept in &self.kept {
            let find = |space: &AddressSpace| {
                let i = space.mm.vmas.partition_point(|vma| vma.end <= kept.start);
                space.mm.vmas.get(i).map(|vma| (space.first_prot(vma), text(vma)))
            };
            let (Some((before, _)), Some((now, name))) = (find(parent), find(child)) else { continue };
            if before != now {
                let args = [Arg::Val(kept.start), Arg::Val(kept.end - kept.start), u64::from(now).into()];
                calls.push(Call::new(format!("mprotect({name})"), libc::SYS_mprotect, args));
            }
        }
        for range in &self.stale {
            let args = [Arg::Val(range.start), Arg::Val(range.end - range.start), libc::MADV_DONTNEED.into()];
            let name = format!("madvise({:#x}-{:#x}, MADV_DONTNEED)", range.start, range.end);
            calls.push(Call::new(name, libc::SYS_madvise, args));
        }
        calls
    }

    /// Unmaps all but what stays, `region`, and the vdso, which has its place already.
    #[must_use]
    pub fn clear_calls(&self, child: &AddressSpace, region: &Range<u64>) -> Vec<Call> {
        let mut kept = self.kept.clone();
        kept.push(region.clone());
        kept.extend(child.vdso_range());
        kept.sort_by_key(|range| range.start);
        let mut at = 0;
        let mut calls = Vec::new();
        for range in kept.into_iter().chain(std::iter::once(super::USER_END..super::USER_END)) {
            if range.start > at {
                calls.push(unmap(at..range.start));
            }
            at = range.end;
        }
        calls
    }
}

impl Run {
    fn same_place(&self, other: &Self) -> bool {
        (self.addr, self.file, self.offset) == (other.addr, other.file, other.offset)
    }
}

fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.joins(&run) => last.len += run.len,
        _ => runs.push(run),
    }
}

/// Ranges of private memory that both have.
fn kept(parent: &AddressSpace, child: &AddressSpace) -> Vec<Range<u64>> {
    if parent.vdso != child.vdso {
        return Vec::new();
    }
    let mut kept: Vec<Range<u64>> = Vec::new();
    let mut theirs = parent.areas().peekable();
    for ours in child.areas() {
        while theirs.next_if(|vma| vma.end <= ours.start).is_some() {}
        while let Some(vma) = theirs.peek().filter(|vma| vma.start < ours.end) {
            if same_kind(vma, ours) {
                kept.push(vma.start.max(ours.start)..vma.end.min(ours.end));
            }
            if vma.end > ours.end {
                break;
            }
            theirs.next();
        }
    }
    kept
}

fn same_kind(a: &VmaEntry, b: &VmaEntry) -> bool {
    let private = status::ANON_PRIVATE | status::FILE_PRIVATE;
    let early = |vma: &VmaEntry| -> Vec<i32> {
        let all = advice(vma).unwrap_or_default();
        all.into_iter().filter(|a| [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE].contains(a)).collect()
    };
    let flags = |vma: &VmaEntry| vma.flags & !libc::MAP_LOCKED.unsigned_abs();
    // Offset in the file of address 0, as it were.
    let place = |vma: &VmaEntry| (vma.shmid, vma.pgoff.wrapping_sub(vma.start));
    a.status & private != 0
        && a.status & private == b.status & private
        && flags(a) == flags(b)
        && early(a) == early(b)
        && (!is_file(a) || place(a) == place(b))
        && (!grows(a) || (a.start, a.end) == (b.start, b.end))
}

/// Compares stored pages.
struct Comparison<'a> {
    set: &'a ImageSet,
    buffers: [Vec<u8>; 2],
}

impl<'a> Comparison<'a> {
    fn new(set: &'a ImageSet) -> Self {
        Self { set, buffers: [Vec::new(), Vec::new()] }
    }

    /// Adds those pages of `ours` that are not as in `theirs`, which has the same addresses.
    fn differing(&mut self, theirs: &Run, ours: &Run, missing: &mut Vec<Run>) -> anyhow::Result<()> {
        let mut done = 0;
        while done < ours.len {
            let len = (ours.len - done).min(CHUNK);
            for (buffer, run) in self.buffers.iter_mut().zip([theirs, ours]) {
                let place = self.set.pages_in(run.file).context("a pages file is missing")?;
                buffer.resize(usize::try_from(len).unwrap_or(0), 0);
                read_at(&place, place.offset + run.offset + done, buffer)?;
            }
            let page = usize::try_from(PAGE).unwrap_or(1);
            let pairs = self.buffers[0].chunks(page).zip(self.buffers[1].chunks(page));
            for ((a, b), index) in pairs.zip(0..) {
                if a != b {
                    let skip = done + index * PAGE;
                    push(
                        missing,
                        Run { addr: ours.addr + skip, len: PAGE, offset: ours.offset + skip, ..*ours },
                    );
                }
            }
            done += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ckpt_images::PagesFile;
    use ckpt_proto::types::MmEntry;
    use ckpt_sys::Pid;

    use super::*;
    use crate::mem::restore::Pages;

    fn vma(start: u64, end: u64) -> VmaEntry {
        VmaEntry {
            start,
            end,
            status: status::REGULAR | status::ANON_PRIVATE,
            prot: 3,
            ..VmaEntry::default()
        }
    }

    fn space(pid: i32, vmas: &[(u64, u64)], runs: &[(u64, u64, u64, u64)]) -> AddressSpace {
        let runs = runs
            .iter()
            .map(|&(addr, len, id, offset)| Run {
                addr,
                len,
                vdso: false,
                file: PagesFile { level: 0, id },
                offset,
            })
            .collect();
        AddressSpace {
            pid: Pid(pid),
            mm: MmEntry { vmas: vmas.iter().map(|&(s, e)| vma(s, e)).collect(), ..MmEntry::default() },
            pages: Pages { id: Some(pid.unsigned_abs().into()), runs },
            vdso: None,
        }
    }

    #[test]
    fn a_child_keeps_what_is_stored_once() {
        let parent = space(1, &[(0x1000, 0x9000), (0xa000, 0xc000)], &[(0x1000, 0x6000, 1, 0)]);
        // Its area is shorter; page 0x3000 is its own, 0x5000 and 0x6000 it has not got, 0x8000 is new.
        let child = space(
            2,
            &[(0x2000, 0x9000), (0xd000, 0xe000)],
            &[
                (0x2000, 0x1000, 1, 0x1000),
                (0x3000, 0x1000, 2, 0),
                (0x4000, 0x1000, 1, 0x3000),
                (0x8000, 0x1000, 2, 0x1000),
                (0xd000, 0x1000, 2, 0x2000),
            ],
        );
        let inherited = Inherited::of(&parent, &child, None).unwrap();
        let one = |start, end| vec![Range { start, end }];
        assert_eq!(inherited.kept, one(0x2000, 0x9000));
        assert_eq!(inherited.stale, one(0x5000, 0x7000));
        let missing: Vec<u64> = inherited.missing.iter().map(|run| run.addr).collect();
        assert_eq!(missing, [0x3000, 0x8000, 0xd000]);
        assert_eq!(inherited.anew(0x1000..0xa000), [0x1000..0x2000, 0x9000..0xa000]);
        assert!(Inherited::pays(&parent, &child, None).unwrap());
    }

    #[test]
    fn nothing_is_kept_of_areas_of_another_kind() {
        let parent = space(1, &[(0x1000, 0x9000)], &[(0x1000, 0x6000, 1, 0)]);
        let mut child = space(2, &[(0x1000, 0x9000)], &[(0x1000, 0x6000, 1, 0)]);
        child.mm.vmas[0].flags |= libc::MAP_GROWSDOWN.unsigned_abs();
        let inherited = Inherited::of(&parent, &child, None).unwrap();
        assert_eq!((inherited.kept, inherited.missing.len()), (vec![], 1));
    }
}
