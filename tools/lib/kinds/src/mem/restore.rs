//! Address spaces, on the way back.
//!
//! A task that is being built drops everything it inherited, maps what its image lists and reads
//! its own pages straight from the image file or from the live stream, so no byte passes through the
//! restoring process and no page is touched twice. What this module gives are the lists of calls
//! for that, in the order they are to be run:
//!
//! 1. [`AddressSpace::clear_calls`]: unmap all but the runner's region and the vdso, which moves to
//!    its recorded place (its code was compared by [`vdso`] before);
//! 2. [`AddressSpace::map_calls`]: the mappings, writable where pages are to come;
//! 3. the pages: [`AddressSpace::read_calls`] from a file, or [`AddressSpace::fills`] from a stream;
//! 4. [`AddressSpace::finish_calls`]: guard regions, recorded protection, advice, locks.
//!
//! Kernel facts relied on: MAP_FIXED_NOREPLACE (4.17) refuses to lay one mapping over another, so an image with
//! overlapping areas is an error and not a surprise; `mremap` moves `[vvar]` and `[vdso]` mappings
//! and tells the kernel's signal code where they went; a MAP_GROWSDOWN area is recorded without its
//! guard gap and is mapped as it was, it grows on from there.

use anyhow::{Context, bail, ensure};
use ckpt_images::{ImageSet, PagesFile, Place, chain};
use ckpt_proto::{
    Image,
    types::{MmEntry, PagemapEntry, VmaEntry},
};
use ckpt_remote::{Arg, Call, Done, RemoteError, build::Fill};
use ckpt_sys::{FileId, Pid, Refused, RemoteAddr, hugetlb};
use nix::errno::Errno;
use std::{
    ops::Range,
    os::fd::{AsRawFd, RawFd},
};

use super::{guard, is_huge, page, status, sysv};

pub mod inherit;
pub mod later;
pub mod vdso;

use inherit::Inherited;

/// Kinds of areas that nobody can restore: bits of `vma_entry.status`.
const UNSUPPORTED: [(u32, &str); 1] = [(1 << 13, "an aio ring")];

const PAGE: u64 = 4096;
/// First address after user space (four-level page tables; the kernel maps above only on request).
pub const USER_END: u64 = 0x7fff_ffff_f000;
/// At most so many bytes by one call: little enough that pages made by populating are still in the
/// cache when the read fills them.
const READ_MAX: u64 = 2 << 20;
/// Shortest run for which making its pages by one call beats a fault for each.
const POPULATE_MIN: u64 = 64 << 10;
const IOV_MAX: usize = 1024;
/// Unwritable areas larger than this are mapped without reserving memory while they are filled.
const RESERVE_MAX: u64 = 1 << 30;

/// A run of pages in a `pages-N.img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where it belongs: address, or offset in a shared segment.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Whether these pages are the vdso's, kept only to be compared.
    pub vdso: bool,
    /// The file that they are in.
    pub file: PagesFile,
    /// Where in it, bytes.
    pub offset: u64,
}

impl Run {
    /// Whether `next` goes on where this ends, in memory and in the file.
    fn joins(&self, next: &Self) -> bool {
        self.addr + self.len == next.addr
            && self.offset + self.len == next.offset
            && (self.file, self.vdso) == (next.file, next.vdso)
    }
}

/// What a pagemap says: its pages, in this checkpoint's directory or in an earlier one's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pages {
    /// N of this checkpoint's own file; `None` if there is no pagemap at all.
    pub id: Option<u64>,
    /// All runs in order of address, which within a file is the order of storage too.
    pub runs: Vec<Run>,
}

impl Pages {
    /// Reads pagemap `arg` of kind `image`.
    ///
    /// # Errors
    /// Malformed images; pages kept elsewhere are [`Refused`].
    pub fn read(set: &ImageSet, image: Image, arg: u64) -> anyhow::Result<Self> {
        let file = image.file_name(arg);
        if set.entries(image, arg).is_empty() {
            return Ok(Self::default());
        }
        let (id, entries) = set.pagemap(image, arg)?;
        let left = |entry: &&PagemapEntry| {
            chain::flags_of(entry) & (page::LAZY | page::PRESENT | page::PARENT | page::AS_PARENT_PROCESS)
                == page::LAZY
        };
        if let Some(entry) = entries.iter().find(left) {
            let what = format!("pages at {:#x} were left at the source (lazy)", entry.vaddr);
            return Err(Refused::new(file, what).into());
        }
        let runs = set.page_runs(image, arg)?.into_iter().map(|run| Run {
            addr: run.addr,
            len: run.len,
            vdso: false,
            file: run.file,
            offset: run.offset,
        });
        Ok(Self { id: Some(id), runs: runs.collect() })
    }

    /// Bytes of all runs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// Bytes that lie in this process's own `pages-N.img`: what comes on a stream.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        self.own_runs().map(|run| run.len).sum()
    }

    fn own_runs(&self) -> impl Iterator<Item = &Run> {
        let own = PagesFile { level: 0, id: self.id.unwrap_or(u64::MAX) };
        self.runs.iter().filter(move |run| run.file == own)
    }

    /// Checks that the files with these pages are there, and long enough.
    ///
    /// # Errors
    /// One is missing or of another length.
    pub fn check_files(&self, set: &ImageSet) -> anyhow::Result<()> {
        let mut own = 0;
        for run in &self.runs {
            let name = || Image::Pages.file_name(run.file.id);
            let place = set.pages_in(run.file).with_context(|| format!("{} is missing", name()))?;
            let end = run.offset.checked_add(run.len).with_context(name)?;
            ensure!(end <= place.len, "{}: {} bytes, the pagemap lists {end}", name(), place.len);
            let in_own = run.file == PagesFile { level: 0, id: self.id.unwrap_or(u64::MAX) };
            own = if in_own { own.max(run.offset + run.len) } else { own };
        }
        if let Some((id, place)) = self.id.and_then(|id| Some((id, set.pages(id)?))) {
            let name = Image::Pages.file_name(id);
            ensure!(own == place.len, "{name}: {} bytes, the pagemap lists {own}", place.len);
        }
        Ok(())
    }
}

/// One address space, read from its images and checked.
#[derive(Debug, Clone)]
pub struct AddressSpace {
    /// Whose.
    pub pid: Pid,
    /// Everything but pages.
    pub mm: MmEntry,
    /// Its pages.
    pub pages: Pages,
    /// `[vvar]` start to `[vdso]` end, and where in it the code starts.
    pub vdso: Option<vdso::Block>,
}

fn text(vma: &VmaEntry) -> String {
    format!("{:#x}-{:#x}", vma.start, vma.end)
}

impl AddressSpace {
    /// Reads and checks the address space of `pid`.
    ///
    /// # Errors
    /// Malformed images; areas that can't be restored are [`Refused`].
    pub fn read(set: &ImageSet, pid: Pid) -> anyhow::Result<Self> {
        let arg = u64::from(pid.0.unsigned_abs());
        let mm: MmEntry = set.one(Image::Mm, arg)?;
        let mut pages = Pages::read(set, Image::Pagemap, arg)?;
        let file = Image::Mm.file_name(arg);
        let mut block = vdso::Collect::default();
        let mut last_end = 0;
        for vma in &mm.vmas {
            let refuse = |why: &str| Refused::new(format!("pid {pid} area {}", text(vma)), why.to_owned());
            if vma.status & status::VSYSCALL != 0 {
                continue;
            }
            let aligned = [vma.start, vma.end].iter().all(|a| a.is_multiple_of(PAGE));
            ensure!(
                aligned && vma.start >= last_end && vma.end > vma.start && vma.end <= USER_END,
                "{file}: area {}: not above the one before, or no such addresses",
                text(vma)
            );
            last_end = vma.end;
            for (bit, what) in UNSUPPORTED {
                if vma.status & bit != 0 {
                    return Err(refuse(&format!("{what} can't be restored")).into());
                }
            }
            if vma.status & (status::VDSO | status::VVAR) != 0 {
                block.add(vma)?;
                continue;
            }
            let kinds = [
                status::FILE_PRIVATE,
                status::FILE_SHARED,
                status::ANON_PRIVATE,
                status::ANON_SHARED,
                status::SOCKET,
            ];
            if kinds.iter().filter(|&&k| vma.status & k != 0).count() != 1 {
                bail!("{file}: area {}: status {:#x} names no kind", text(vma), vma.status);
            }
            if vma.status & status::ANON_SHARED != 0 && vma.status & status::SYSVIPC == 0 {
                return Err(
                    refuse("shared memory without a memfd entry (an image of CRIU before 3.17)").into()
                );
            }
            ensure!(vma.pgoff.is_multiple_of(PAGE), "{file}: area {}: offset {:#x}", text(vma), vma.pgoff);
            ensure!(vma.prot & !7 == 0, "{file}: area {}: protection {:#x}", text(vma), vma.prot);
            advice(vma).with_context(|| file.clone())?;
        }
        if mm.vmas.iter().any(|vma| vma.status & status::SYSVIPC != 0) {
            let segments = sysv::entries(set)?;
            let size = |id| Some(segments.iter().find(|entry| u64::try_from(entry.id) == Ok(id))?.size);
            sysv::check_whole(&format!("pid {pid}"), &mm.vmas, size)?;
        }
        guard::check(&mm).with_context(|| file.clone())?;
        let vdso = block.block()?;
        pages.runs = split(&pages.runs, &mm.vmas).with_context(|| Image::Pagemap.file_name(arg))?;
        Ok(Self { pid, mm, pages, vdso })
    }

    /// All addresses that are or may come to be in use: areas that grow down are given 8 MiB more.
    #[must_use]
    pub fn taken(&self) -> Vec<Range<u64>> {
        let grow = |vma: &VmaEntry| if grows(vma) { 8 << 20 } else { 0 };
        self.areas()
            .map(|vma| vma.start.saturating_sub(grow(vma))..vma.end)
            .chain(self.vdso_range())
            .collect()
    }

    fn vdso_range(&self) -> Option<Range<u64>> {
        self.vdso.as_ref().map(|b| b.start..b.end)
    }

    /// The areas that are to be mapped.
    fn areas(&self) -> impl Iterator<Item = &VmaEntry> {
        const SPECIAL: u32 = status::VSYSCALL | status::VDSO | status::VVAR;
        self.mm.vmas.iter().filter(|vma| vma.status & SPECIAL == 0)
    }

    /// Files that are mapped, with whether any mapping of it is executable.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &VmaEntry)> {
        self.areas().filter(|vma| is_file(vma)).map(|vma| {
            let id = u32::try_from(vma.shmid).unwrap_or(u32::MAX);
            (FileId(id), vma)
        })
    }

    /// The bytes of the vdso as stored, if all of them were; `read` gives those of a run.
    ///
    /// # Errors
    /// What `read` meets.
    pub fn stored_vdso(
        &self,
        mut read: impl FnMut(&Run, &mut [u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(block) = &self.vdso else { return Ok(None) };
        let mut bytes = Vec::new();
        for run in self.pages.runs.iter().filter(|run| run.vdso) {
            let at = bytes.len();
            bytes.resize(at + usize::try_from(run.len).unwrap_or(0), 0);
            read(run, &mut bytes[at..])?;
        }
        Ok((bytes.len() as u64 == block.end - block.code).then_some(bytes))
    }

    /// Unmaps all but `keep` (the runner's region) and moves the vdso, which is at `ours`, by way of `stage`.
    #[must_use]
    pub fn clear_calls(&self, ours: Option<&vdso::Ours>, keep: &Range<u64>, stage: RemoteAddr) -> Vec<Call> {
        let mut kept = vec![keep.clone()];
        kept.extend(ours.map(|o| o.block.start..o.block.end));
        kept.sort_by_key(|r| r.start);
        let mut calls = Vec::new();
        let mut at = 0;
        for range in kept.into_iter().chain(std::iter::once(USER_END..USER_END)) {
            if range.start > at {
                calls.push(unmap(at..range.start));
            }
            at = range.end;
        }
        match (ours, &self.vdso) {
            (Some(ours), Some(block)) => calls.extend(ours.move_calls(stage.0, block.start)),
            (Some(ours), None) => calls.push(unmap(ours.block.start..ours.block.end)),
            _ => {}
        }
        calls
    }

    /// Maps all areas that are not inherited. `fd` gives the number that a file has in the task now.
    ///
    /// # Errors
    /// A file is missing.
    pub fn map_calls(
        &self,
        inherited: &Inherited,
        fd: &dyn Fn(FileId) -> Option<i32>,
    ) -> anyhow::Result<Vec<Call>> {
        const KEPT: i32 = libc::MAP_SHARED
            | libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_GROWSDOWN
            | libc::MAP_NORESERVE;
        let mut calls = Vec::new();
        for vma in self.areas() {
            if vma.status & status::SYSVIPC != 0 {
                calls.extend(sysv::attach_call(vma));
                continue;
            }
            let len = vma.end - vma.start;
            let mut flags =
                (vma.flags & (KEPT.unsigned_abs() | hugetlb::MAP)) | libc::MAP_FIXED_NOREPLACE.unsigned_abs();
            let prot = self.first_prot(vma);
            if prot != vma.prot && len > RESERVE_MAX && !is_huge(vma) {
                flags |= libc::MAP_NORESERVE.unsigned_abs();
            }
            let (fd, pgoff) = if is_file(vma) {
                flags &= !libc::MAP_ANONYMOUS.unsigned_abs();
                let id = u32::try_from(vma.shmid).unwrap_or(u32::MAX);
                let number = fd(FileId(id)).with_context(|| {
                    format!("pid {} area {}: file {id} is in no image", self.pid, text(vma))
                })?;
                (number, vma.pgoff)
            } else {
                flags |= libc::MAP_ANONYMOUS.unsigned_abs();
                // Huge pages are of a file of the kernel's, whose offset they show.
                (-1, if is_huge(vma) { vma.pgoff } else { 0 })
            };
            for part in inherited.anew(vma.start..vma.end) {
                let pgoff = if fd < 0 && !is_huge(vma) { 0 } else { pgoff + (part.start - vma.start) };
                let args = [
                    Arg::Val(part.start),
                    Arg::Val(part.end - part.start),
                    u64::from(prot).into(),
                    u64::from(flags).into(),
                    fd.into(),
                    pgoff.into(),
                ];
                calls.push(Call::new(mmap_name(vma), libc::SYS_mmap, args));
            }
            // Page size advice has to come before the pages.
            calls.extend(advice_calls(vma, true));
        }
        calls.extend(self.huge_page_calls(inherited));
        Ok(calls)
    }

    /// Makes the huge pages that are to be filled: that there are too few is found here, not by who fills them.
    fn huge_page_calls(&self, inherited: &Inherited) -> Vec<Call> {
        let mut calls = Vec::new();
        for vma in self.areas().filter(|vma| is_huge(vma)) {
            let first = inherited.missing.partition_point(|run| run.addr + run.len <= vma.start);
            for run in inherited.missing[first..].iter().take_while(|run| run.addr < vma.end) {
                let (start, end) = (run.addr.max(vma.start), (run.addr + run.len).min(vma.end));
                calls.push(populate(pages_name(vma), start, end - start));
            }
        }
        calls
    }

    /// What has failed, if it is for want of huge pages.
    #[must_use]
    pub fn explain(&self, error: RemoteError) -> anyhow::Error {
        let RemoteError::Call { name, errno, .. } = &error else { return error.into() };
        let ours = |vma: &&VmaEntry| is_huge(vma) && [mmap_name(vma), pages_name(vma)].contains(name);
        let Some(vma) = self.areas().find(ours) else { return error.into() };
        let subject = format!("{name}: {errno}");
        if *errno == Errno::EINVAL && is_file(vma) {
            let why = "the file there is not of huge pages";
            return Refused::new(subject, why).advise("mount the hugetlbfs that it was on").into();
        }
        hugetlb::too_few(subject, hugetlb::size_in(vma.flags)).into()
    }

    /// Protection while pages are filled in, and read again for their checksums.
    fn first_prot(&self, vma: &VmaEntry) -> u32 {
        if vma.status & status::SYSVIPC != 0 {
            return sysv::first_prot(vma);
        }
        let both = (libc::PROT_READ | libc::PROT_WRITE).unsigned_abs();
        if vma.prot & both != both && self.has_pages(vma) { vma.prot | both } else { vma.prot }
    }

    fn has_pages(&self, vma: &VmaEntry) -> bool {
        let i = self.pages.runs.partition_point(|run| run.addr + run.len <= vma.start);
        self.pages.runs.get(i).is_some_and(|run| run.addr < vma.end)
    }

    /// Reads `inherited.missing` from their files, by preadv(2) of the task's descriptors of the same
    /// numbers, in lists whose sizes [`check_reads`] expects. Long runs of anonymous memory are
    /// populated first (MADV_POPULATE_WRITE, Linux 5.14), which spares a fault per page.
    ///
    /// # Errors
    /// A file is missing or too short.
    pub fn read_calls(&self, inherited: &Inherited, set: &ImageSet) -> anyhow::Result<Vec<Call>> {
        // Descriptor, offset in the file, bytes, and where they go.
        type List = (RawFd, u64, u64, Vec<(u64, u64)>);
        self.pages.check_files(set)?;
        let mut lists: Vec<List> = Vec::new();
        for run in &inherited.missing {
            let place = set.pages_in(run.file).context("a pages file is missing")?;
            let fd = place.file.as_raw_fd();
            let mut offset = place.offset + run.offset;
            let mut addr = run.addr;
            let mut left = run.len;
            while left > 0 {
                let len = left.min(READ_MAX);
                match lists.last_mut() {
                    Some((last, start, sum, list))
                        if *last == fd
                            && *start + *sum == offset
                            && list.len() < IOV_MAX
                            && *sum + len <= READ_MAX =>
                    {
                        *sum += len;
                        list.push((addr, len));
                    }
                    _ => lists.push((fd, offset, len, vec![(addr, len)])),
                }
                offset += len;
                addr += len;
                left -= len;
            }
        }
        let mut calls = Vec::new();
        for (fd, offset, sum, list) in lists {
            for &(addr, len) in list
                .iter()
                .filter(|&&(addr, len)| len >= POPULATE_MIN && self.anonymous(addr) && !inherited.keeps(addr))
            {
                calls.push(populate("madvise(MADV_POPULATE_WRITE)".to_owned(), addr, len).may_fail());
            }
            let count = list.len() as u64;
            let iov = list.iter().flat_map(|(a, n)| [a.to_ne_bytes(), n.to_ne_bytes()].concat()).collect();
            let args = [fd.into(), Arg::In(iov), count.into(), offset.into(), Arg::Val(0)];
            calls.push(Call::new(format!("preadv({sum} bytes of pages)"), libc::SYS_preadv, args));
        }
        Ok(calls)
    }

    fn anonymous(&self, addr: u64) -> bool {
        let i = self.mm.vmas.partition_point(|vma| vma.end <= addr);
        self.mm.vmas.get(i).is_some_and(|vma| vma.status & status::ANON_PRIVATE != 0)
    }

    /// Pages of `inherited.missing` that no stream brings for this process: its parent has the same ones.
    pub fn elsewhere<'a>(&self, inherited: &'a Inherited) -> impl Iterator<Item = &'a Run> + use<'a> {
        let own = PagesFile { level: 0, id: self.pages.id.unwrap_or(u64::MAX) };
        inherited.missing.iter().filter(move |run| run.file != own)
    }

    /// Where the next pages of a stream go, from byte `from` of the pages on, `len` bytes of them;
    /// pages of the vdso go to `shadow`.
    #[must_use]
    pub fn fills(&self, from: u64, len: u64, shadow: RemoteAddr) -> Vec<Fill> {
        let mut fills = Vec::new();
        let (mut at, end) = (0, from.saturating_add(len));
        for run in self.pages.own_runs() {
            let first = from.max(at);
            let last = end.min(at + run.len);
            if first < last {
                let base = match &self.vdso {
                    Some(block) if run.vdso => shadow.0 + (run.addr - block.code),
                    _ => run.addr,
                };
                fills.push(Fill { addr: RemoteAddr(base + (first - at)), len: last - first });
            }
            at += run.len;
        }
        fills
    }

    /// What comes after the pages: guards, recorded protection, advice, locks.
    #[must_use]
    pub fn finish_calls(&self) -> Vec<Call> {
        let mut calls = guard::calls(&self.mm);
        for vma in self.areas() {
            let (start, len) = (Arg::Val(vma.start), Arg::Val(vma.end - vma.start));
            if self.first_prot(vma) != vma.prot {
                let args = [start.clone(), len.clone(), u64::from(vma.prot).into()];
                calls.push(Call::new(format!("mprotect({})", text(vma)), libc::SYS_mprotect, args));
            }
            calls.extend(advice_calls(vma, false));
            if vma.flags & libc::MAP_LOCKED.unsigned_abs() != 0 {
                // Memory that is to be locked is populated, which a guard would end. It was not populated before either.
                let flags = if guard::any_in(&self.mm, vma) { libc::MLOCK_ONFAULT } else { 0 };
                let args = [start, len, Arg::from(u64::from(flags))];
                calls.push(Call::new(format!("mlock2({})", text(vma)), libc::SYS_mlock2, args));
            }
        }
        calls
    }
}

/// Checks that each of the calls made by [`AddressSpace::read_calls`] got everything; gives how many bytes of pages that is.
///
/// # Errors
/// A file ended early.
pub fn check_reads(calls: &[Call], done: &[Done]) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for (call, done) in calls.iter().zip(done).filter(|(call, _)| call.nr == libc::SYS_preadv) {
        let want: u64 = match call.args.get(1) {
            Some(Arg::In(iov)) => iov
                .chunks_exact(16)
                .filter_map(|pair| pair.get(8..16)?.try_into().ok().map(u64::from_ne_bytes))
                .sum(),
            _ => 0,
        };
        ensure!(done.ret.cast_unsigned() == want, "{}: {} of {want} bytes came", call.name, done.ret);
        bytes += want;
    }
    Ok(bytes)
}

/// Makes pages. Of ordinary memory a failure need not be told: the read that follows meets the same one.
fn populate(name: String, addr: u64, len: u64) -> Call {
    const MADV_POPULATE_WRITE: i32 = 23;
    let args = [Arg::Val(addr), Arg::Val(len), MADV_POPULATE_WRITE.into()];
    Call::new(name, libc::SYS_madvise, args)
}

fn mmap_name(vma: &VmaEntry) -> String {
    format!("mmap({})", text(vma))
}

/// Of the calls that make the huge pages of an area.
fn pages_name(vma: &VmaEntry) -> String {
    format!("madvise({}, MADV_POPULATE_WRITE)", text(vma))
}

/// Reads pages of a plain file.
///
/// # Errors
/// It is missing, or ends early.
pub fn read_run(set: &ImageSet, run: &Run, buffer: &mut [u8]) -> anyhow::Result<()> {
    let place = set.pages_in(run.file).context("a pages file is missing")?;
    read_at(&place, place.offset + run.offset, buffer)
}

fn read_at(place: &Place<'_>, mut offset: u64, mut buffer: &mut [u8]) -> anyhow::Result<()> {
    while !buffer.is_empty() {
        let at = i64::try_from(offset).context("offset in a pages file")?;
        let n = nix::sys::uio::pread(place.file, buffer, at).context("read pages")?;
        ensure!(n > 0, "the pages file ends early");
        offset += n as u64;
        buffer = buffer.split_at_mut(n).1;
    }
    Ok(())
}

fn unmap(range: Range<u64>) -> Call {
    let name = format!("munmap({:#x}-{:#x})", range.start, range.end);
    Call::new(name, libc::SYS_munmap, [Arg::Val(range.start), Arg::Val(range.end - range.start)])
}

/// Whether the area grows down on faults below it.
fn grows(vma: &VmaEntry) -> bool {
    vma.flags & libc::MAP_GROWSDOWN.unsigned_abs() != 0
}

fn is_file(vma: &VmaEntry) -> bool {
    vma.status & (status::FILE_PRIVATE | status::FILE_SHARED | status::SOCKET) != 0
}

/// The madvise(2) values in `vma.madv`, which has bit n set for advice n.
fn advice(vma: &VmaEntry) -> anyhow::Result<Vec<i32>> {
    const KNOWN: [i32; 8] = [
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_DONTFORK,
        libc::MADV_MERGEABLE,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
    ];
    let bits = vma.madv.unwrap_or(0);
    let known = KNOWN.iter().fold(0, |all, advice| all | 1_u64 << advice);
    ensure!(bits & !known == 0, "area {}: unknown advice {:#x}", text(vma), bits & !known);
    Ok(KNOWN.iter().copied().filter(|advice| bits & (1 << advice) != 0).collect())
}

fn advice_calls(vma: &VmaEntry, early: bool) -> Vec<Call> {
    let early_ones = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE];
    advice(vma)
        .unwrap_or_default()
        .into_iter()
        .filter(|advice| early_ones.contains(advice) == early)
        .map(|advice| {
            let args = [Arg::Val(vma.start), Arg::Val(vma.end - vma.start), Arg::from(advice)];
            Call::new(format!("madvise({}, {advice})", text(vma)), libc::SYS_madvise, args)
        })
        .collect()
}

/// Cuts runs at the vdso's bounds and checks that every page has an area of its own kind to go to.
fn split(runs: &[Run], vmas: &[VmaEntry]) -> anyhow::Result<Vec<Run>> {
    let mut out: Vec<Run> = Vec::new();
    for run in runs {
        let (mut addr, end) = (run.addr, run.addr + run.len);
        while addr < end {
            let i = vmas.partition_point(|vma| vma.end <= addr);
            let vma = vmas.get(i).filter(|vma| vma.start <= addr);
            let Some(vma) = vma else { bail!("page at {addr:#x}: no area there") };
            let private = vma.status & (status::ANON_PRIVATE | status::FILE_PRIVATE) != 0;
            let special = vma.status & (status::VVAR | status::VSYSCALL) != 0;
            ensure!(private && !special, "page at {addr:#x}: its area {} holds no private pages", text(vma));
            let vdso = vma.status & status::VDSO != 0;
            let len = end.min(vma.end) - addr;
            let part = Run { addr, len, vdso, offset: run.offset + (addr - run.addr), ..*run };
            match out.last_mut() {
                Some(last) if last.joins(&part) => last.len += len,
                _ => out.push(part),
            }
            addr += len;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, status: u32) -> VmaEntry {
        VmaEntry { start, end, status: status | status::REGULAR, ..VmaEntry::default() }
    }

    fn run(addr: u64, len: u64, vdso: bool, offset: u64) -> Run {
        Run { addr, len, vdso, file: PagesFile { level: 0, id: 1 }, offset }
    }

    #[test]
    fn a_run_over_several_areas_is_cut_only_at_the_vdso() {
        let vmas = [
            vma(0x1000, 0x3000, status::ANON_PRIVATE),
            vma(0x3000, 0x4000, status::FILE_PRIVATE),
            vma(0x4000, 0x5000, status::ANON_PRIVATE | status::VDSO),
        ];
        let runs = split(&[run(0x2000, 0x3000, false, 0)], &vmas).unwrap();
        let expected = [run(0x2000, 0x2000, false, 0), run(0x4000, 0x1000, true, 0x2000)];
        assert_eq!(runs, expected);
    }

    #[test]
    fn pages_without_a_private_area_are_refused() {
        let vmas = [vma(0x1000, 0x2000, status::FILE_SHARED)];
        assert!(split(&[run(0x1000, 0x1000, false, 0)], &vmas).is_err());
        assert!(split(&[run(0x5000, 0x1000, false, 0)], &vmas).is_err());
    }
}
