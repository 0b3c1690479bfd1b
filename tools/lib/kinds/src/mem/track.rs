//! Which pages have been written since the checkpoint before.
//!
//! Private mappings are watched by a userfaultfd of their process ([`ckpt_sys::uffd`]). One call of
//! PAGEMAP_SCAN looks at a mapping's pages and protects them again: a page that is not
//! [`Page::WRITTEN`] the next time is as it was. That a page *is in the parent* takes more:
//!
//! - Its mapping was watched before this checkpoint: a new mapping, one that mremap(2) moved, all of a
//!   forked child, all of a program after exec(2) is not (the kernel drops the watch), and is stored
//!   in full. So is one made by munmap and mmap at the same addresses: the watch is asked of the
//!   mapping (PAGE_IS_WPALLOWED, in the freeze), not remembered by address.
//! - It is watched by *our* userfaultfd: registering it again says so, or EBUSY.
//! - It is present. In a private mapping of a file, a page that was dropped (MADV_DONTNEED) leaves a marker that
//!   PAGEMAP_SCAN reports as swapped out and not written, while its contents are the file's again.
//!   Anonymous memory leaves none, so swapped-out pages are told from dropped ones there. That of hugetlbfs, which is
//!   never swapped out, does: there the markers are taken away first.
//! - It is not of a file while a thread may be in the middle of a fault. The first write to a dropped page makes it with the
//!   marker's protection, and a second fault takes that off; a thread that is stopped in the first one stands between the two, and
//!   the page is there, the file's, and not written. Only faults of user space are left half done, so this is asked
//!   of no process whose threads were all in system calls ([`Tracked::faulting`]).
//! - It is not of hugetlbfs. There a page that is read after it was dropped takes the marker's protection over, and is zeros
//!   that nobody seems to have written (Linux 6.18). Such memory is stored in full.
//! - The last protection belongs to the parent, and that is durable: `ckpt-tracking` sees to it.
//!
//! Everything else errs to the safe side. A mapping that grew has pages without protection, which count as
//! written; huge pages are protected whole and split by the first write; khugepaged leaves
//! protected pages alone; read(2) into memory and ptrace(2) are writes like others. Kernels
//! before 6.13 or so leave protection on pages that mremap moved, where later writes would go
//! unseen: what is found protected in a mapping that was not watched is protected anew by UFFDIO_WRITEPROTECT.
//!
//! Not seen is what a device writes by itself into pages pinned before; io_uring and AIO are refused at dump
//! anyway.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::Context;
use ckpt_proto::types::VmaEntry;
use ckpt_sys::{
    Pid, Refused, RemoteAddr,
    memory::{self, Page, PageRange, Scan},
    uffd,
};
use nix::errno::Errno;

use super::{dump::PAGE, is_huge, status};

/// How the writes of a process are tracked.
#[derive(Debug, Clone, Copy)]
pub struct Tracked<'a> {
    /// Its userfaultfd.
    pub uffd: BorrowedFd<'a>,
    /// The last protection belongs to the parent of this checkpoint.
    pub increment: bool,
    /// A thread of it was stopped outside of a system call, perhaps in a fault.
    pub faulting: bool,
}

/// Pages of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// They are as they were in the parent.
    pub(crate) in_parent: bool,
}

/// Private pages: written at some time, neither the file's nor the shared zero page, nor guards. Whether a page is a
/// file's is asked only where a file is mapped: for that the kernel has to look at the page itself, which is not in the
/// processor's cache, and the walk takes ten times as long.
pub(crate) fn private_pages(vma: &VmaEntry, report: Page) -> Scan {
    // Anonymous huge pages are those of a file that the kernel makes.
    let has_file = vma.status & status::FILE_PRIVATE != 0 || is_huge(vma);
    let file = if has_file { Page::FILE } else { Page::empty() };
    let none = file | Page::PFNZERO | memory::guard_category();
    Scan { inverted: none, all: none, any: Page::PRESENT | Page::SWAPPED, report }
}

/// Whether a userfaultfd tracks writes to `vma`, which is a mapping or a part of one.
fn is_watched(pagemap: &File, vma: &VmaEntry) -> anyhow::Result<bool> {
    let watched = Page::WPALLOWED;
    let scan = Scan { inverted: Page::empty(), all: watched, any: Page::empty(), report: Page::empty() };
    let mut first = Vec::new();
    let start = RemoteAddr(vma.start);
    memory::pagemap_scan(pagemap.as_fd(), start, start.plus(PAGE), scan, &mut first)?;
    Ok(!first.is_empty())
}

impl Tracked<'_> {
    /// Finds the private pages of `vma` and protects them for the next time.
    ///
    /// # Errors
    /// [`Refused`] if another userfaultfd watches the mapping; the kernel's.
    pub(crate) fn look(&self, pid: Pid, pagemap: &File, vma: &VmaEntry) -> anyhow::Result<Vec<Found>> {
        let (start, end) = (RemoteAddr(vma.start), RemoteAddr(vma.end));
        let what = || format!("pid {pid} memory {:#x}-{:#x}", vma.start, vma.end);
        // Asked first: afterwards it is.
        let before = is_watched(pagemap, vma).with_context(what)?;
        match uffd::register(self.uffd, start, end) {
            Ok(()) => {}
            Err(error) if error.errno == Errno::EBUSY => {
                let why = "is tracked by somebody else (another ckpt-track, or the program itself)";
                return Err(Refused::new(what(), why).advise("one tracker per tree: end the other").into());
            }
            Err(error) => return Err(error).with_context(what),
        }
        if is_huge(vma) {
            self.take_away_markers(pagemap, vma).with_context(what)?;
        }
        let mut pages: Vec<PageRange> = Vec::new();
        let of_file = vma.status & status::FILE_PRIVATE != 0;
        let scan = private_pages(vma, Page::WRITTEN | Page::PRESENT);
        memory::pagemap_protect(pagemap.as_fd(), start, end, scan, &mut pages).with_context(what)?;
        let mut found: Vec<Found> = Vec::with_capacity(pages.len());
        for page in &pages {
            let is = Page::from_bits_retain(page.categories);
            if !before && !is.contains(Page::WRITTEN) {
                uffd::protect(self.uffd, RemoteAddr(page.start), RemoteAddr(page.end)).with_context(what)?;
            }
            let known = self.increment && before && !is.contains(Page::WRITTEN) && !is_huge(vma);
            let in_parent = known && (!of_file || is.contains(Page::PRESENT) && !self.faulting);
            match found.last_mut() {
                Some(last) if last.end == page.start && last.in_parent == in_parent => last.end = page.end,
                _ => found.push(Found { start: page.start, end: page.end, in_parent }),
            }
        }
        Ok(found)
    }

    /// Makes holes of what protection has left where there is no page. Else it would be taken for data, and to read it
    /// would take a huge page from the pool. (A page that is just being migrated looks the same, and counts as written from
    /// here on.)
    fn take_away_markers(&self, pagemap: &File, vma: &VmaEntry) -> anyhow::Result<()> {
        let swapped = Page::SWAPPED;
        let scan = Scan { inverted: Page::empty(), all: swapped, any: Page::empty(), report: Page::empty() };
        let mut markers = Vec::new();
        let (start, end) = (RemoteAddr(vma.start), RemoteAddr(vma.end));
        memory::pagemap_scan(pagemap.as_fd(), start, end, scan, &mut markers)?;
        for marker in markers {
            uffd::count_as_written(self.uffd, RemoteAddr(marker.start), RemoteAddr(marker.end));
        }
        Ok(())
    }

    /// Lets all pages of `vma` count as written, since what is being stored leaves them out.
    pub fn leave(&self, vma: &VmaEntry) {
        uffd::count_as_written(self.uffd, RemoteAddr(vma.start), RemoteAddr(vma.end));
    }
}
