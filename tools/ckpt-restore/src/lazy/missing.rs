//! Which pages of an address space have not come yet, and where they are stored. Follows the process's memory: what is
//! given up is forgotten, what moves goes along.

use std::{collections::BTreeMap, ops::Range};

use ckpt_images::PagesFile;
use ckpt_kinds::mem::restore::Run;

/// Pages that have not come, by address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing(BTreeMap<u64, Stored>);

/// Where pages are stored that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Bytes.
    pub len: u64,
    /// In which file.
    pub file: PagesFile,
    /// Where in it.
    pub offset: u64,
}

impl Stored {
    /// What is left of it `skip` bytes further on, `len` bytes at most.
    fn part(self, skip: u64, len: u64) -> Self {
        Self { len: len.min(self.len - skip), offset: self.offset + skip, ..self }
    }
}

impl Missing {
    /// All of `runs`, which don't overlap.
    pub fn new(runs: &[Run]) -> Self {
        let stored = |run: &Run| (run.addr, Stored { len: run.len, file: run.file, offset: run.offset });
        Self(runs.iter().map(stored).collect())
    }

    /// Everything has come.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes that are missing.
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|stored| stored.len).sum()
    }

    /// The lowest address that has not come.
    pub fn first(&self) -> Option<u64> {
        self.0.keys().next().copied()
    }

    /// What is stored for `addr` and on.
    pub fn at(&self, addr: u64) -> Option<Stored> {
        let (&start, &stored) = self.0.range(..=addr).next_back()?;
        (addr < start + stored.len).then(|| stored.part(addr - start, u64::MAX))
    }

    /// Forgets a range, and gives what was missing in it.
    pub fn take(&mut self, range: Range<u64>) -> Self {
        let first = self.0.range(..=range.start).next_back().map_or(range.start, |(&start, _)| start);
        let mut taken = BTreeMap::new();
        let touched: Vec<u64> = self.0.range(first..range.end.max(first)).map(|(&start, _)| start).collect();
        for start in touched {
            let Some(&stored) = self.0.get(&start) else { continue };
            let end = start + stored.len;
            let (from, to) = (start.max(range.start), end.min(range.end));
            if from >= to {
                continue;
            }
            self.0.remove(&start);
            if start < from {
                self.0.insert(start, stored.part(0, from - start));
            }
            if to < end {
                self.0.insert(to, stored.part(to - start, u64::MAX));
            }
            taken.insert(from, stored.part(from - start, to - from));
        }
        Self(taken)
    }

    /// Memory has moved, from `from..from + len` to `to`.
    pub fn shift(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.take(from..from.saturating_add(len));
        self.take(to..to.saturating_add(len));
        self.0.extend(moved.0.into_iter().map(|(addr, stored)| (addr - from + to, stored)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;

    fn run(first: u64, pages: u64, offset: u64) -> Run {
        let file = PagesFile { level: 0, id: 1 };
        Run { addr: first * PAGE, len: pages * PAGE, vdso: false, file, offset: offset * PAGE }
    }

    /// Random operations on it, and on an array with a place for each page.
    #[test]
    fn follows_memory_page_by_page() {
        let mut random = 88_172_645_463_325_252_u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        for _ in 0..200 {
            let mut model = vec![None; PAGES as usize];
            let runs = [run(1, 20, 0), run(21, 3, 50), run(30, 30, 20)];
            let mut missing = Missing::new(&runs);
            for run in runs {
                for page in 0..run.len / PAGE {
                    model[(run.addr / PAGE + page) as usize] = Some(run.offset / PAGE + page);
                }
            }
            for _ in 0..30 {
                let (from, to) = (below(PAGES), below(PAGES));
                let len = 1 + below((PAGES - from.max(to)).min(12));
                if below(2) == 0 || from.abs_diff(to) < len {
                    missing.take(from * PAGE..(from + len) * PAGE);
                    model[from as usize..(from + len) as usize].fill(None);
                } else {
                    missing.shift(from * PAGE, to * PAGE, len * PAGE);
                    for page in 0..len {
                        model[(to + page) as usize] = model[(from + page) as usize].take();
                    }
                }
                for (page, want) in (0..).zip(&model) {
                    let got = missing.at(page * PAGE);
                    assert_eq!(got.map(|stored| stored.offset / PAGE), *want, "page {page}");
                }
                let left = model.iter().flatten().count() as u64;
                assert_eq!(missing.bytes(), left * PAGE);
                let first = model.iter().position(Option::is_some);
                assert_eq!(missing.first(), first.map(|page| page as u64 * PAGE));
                assert_eq!(missing.is_empty(), left == 0);
            }
        }
    }
}
