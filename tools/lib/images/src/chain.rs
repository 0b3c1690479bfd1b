//! Chains of incremental images: which directory holds a page.
//!
//! A pagemap marks pages that have not changed since an earlier checkpoint as PARENT, and the
//! directory has a symbolic link `parent` to that checkpoint's directory, which can be an
//! increment itself. [`ImageSet::from_chain`] follows the links, nearest first, with a list of the ranges
//! that are still looked for: each pagemap of each directory is read once, pages files that have
//! nothing any more that was not replaced later are not even opened, and the walk ends as soon as nothing is
//! missing. What comes out are [`PageRun`]s: for each range of addresses the file and the offset of
//! its pages. Nothing is copied; a reader of pages goes to where they are.
//!
//! ```text
//! addresses     0x1000    0x2000    0x3000    0x4000
//! 3             PRESENT   PARENT    PARENT    (hole)
//! 3/parent = 2            PRESENT   PARENT
//! 2/parent = 1  PRESENT   PRESENT   PRESENT   PRESENT
//! runs          3 +0      2 +0      1 +0x2000
//! ```
//!
//! A page can also be the one that the parent process has (`ckpt-scan --share`). That is said of the
//! checkpoint whose pagemap says it, and of the tree as it was then: the parent process is that of its own pstree.img. So
//! a search takes one of two steps at a time - to the same process in the directory before, or to the parent process
//! in the same directory - and both can come any number of times in any order ([`Search`]).
//!
//! The link is the only one in a directory of images that is followed: it names a directory as the
//! caller's own argument does, and only files with names of images are opened in it. That it leads to
//! the right checkpoint is told by the ids in the inventories, where our tools have put them.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use ckpt_proto::{
    Image,
    types::{InventoryEntry, PagemapEntry, PstreeEntry},
};
use ckpt_sys::Refused;
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{Mode, fstat},
};

use crate::{ImageError, ImageSet, Place, pack::PackedFile, sums::Piece};

/// Name of the link to the directory of the checkpoint before.
pub const PARENT: &str = "parent";

const PAGE: u64 = 4096;
const IN_PARENT: u32 = 1;
const LAZY: u32 = 1 << 1;
const PRESENT: u32 = 1 << 2;
/// An own addition: the pages were PRESENT, and `ckpt-merge --dedup` has freed them.
const FREED: u32 = 1 << 16;
/// An own addition: the page is the one that the parent process has at this address.
const AS_PARENT_PROCESS: u32 = 1 << 17;
/// More generations than this share no memory.
const MAX_GENERATIONS: usize = 1024;

/// A `pages-N.img` of a set or of one of its ancestors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PagesFile {
    /// How many links to follow: 0 for the directory itself.
    pub level: usize,
    /// N.
    pub id: u64,
}

/// Pages that lie together, in memory and in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Where they belong: an address, or an offset in a shared segment.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Whether they may be fetched after the restore.
    pub lazy: bool,
    /// The file that holds them.
    pub file: PagesFile,
    /// Where in that file, bytes.
    pub offset: u64,
    /// How many links lead to the first directory on the way to that file which has it as a page of the parent
    /// process: in those up to there it is the process's own.
    pub crossed: Option<usize>,
}

impl PageRun {
    /// Whether the directory that `level` links lead to, or one before it, has this run, and has it as the same process's.
    #[must_use]
    pub fn is_of(&self, level: usize) -> bool {
        self.file.level >= level && self.crossed.is_none_or(|crossed| crossed >= level)
    }

    fn end(&self) -> u64 {
        self.addr + self.len
    }

    /// Those of its pages that are before `end`.
    #[must_use]
    pub fn until(&self, end: u64) -> Self {
        Self { len: self.len.min(end - self.addr), ..*self }
    }

    /// Its pages from `addr` on.
    #[must_use]
    pub fn from(&self, addr: u64) -> Self {
        let skip = addr - self.addr;
        Self { addr, len: self.len - skip, offset: self.offset + skip, ..*self }
    }

    /// The entry that an increment has for this run, which is further back.
    #[must_use]
    pub fn parent_entry(&self) -> PagemapEntry {
        PagemapEntry { flags: Some(IN_PARENT), ..self.pagemap_entry() }
    }

    /// The entry of a process that shares this run with its parent process.
    #[must_use]
    pub fn parent_process_entry(&self) -> PagemapEntry {
        PagemapEntry {
            flags: Some(AS_PARENT_PROCESS | if self.lazy { LAZY } else { 0 }),
            ..self.pagemap_entry()
        }
    }

    /// The entry that a full checkpoint has for this run.
    #[must_use]
    pub fn pagemap_entry(&self) -> PagemapEntry {
        PagemapEntry {
            vaddr: self.addr,
            compat_nr_pages: 0,
            in_parent: None,
            flags: Some(PRESENT | if self.lazy { LAZY } else { 0 }),
            nr_pages: Some(self.len / PAGE),
        }
    }
}

/// A pages file of an ancestor.
#[derive(Debug, Clone)]
pub(crate) struct Ancestor {
    /// Index among the set's open files.
    pub(crate) file: usize,
    pub(crate) len: u64,
    pub(crate) pieces: Vec<Piece>,
    /// Whether it is a `ckpt-pages-N.img`.
    pub(crate) packed: bool,
}

/// What following the links has found.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// Only pagemaps with pages in a parent.
    runs: BTreeMap<(Image, u64), Vec<PageRun>>,
    pub(crate) files: BTreeMap<PagesFile, Ancestor>,
    /// How many directories were opened besides the first.
    depth: usize,
}

/// A pagemap of which pages were freed.
#[derive(Debug)]
pub struct Thinned {
    /// Its entries.
    pub entries: Vec<PagemapEntry>,
    /// What is free in the pages file, bytes, ascending.
    pub freed: Vec<Range<u64>>,
    /// Whether some of it was not before.
    pub new: bool,
}

/// What a pagemap says.
#[derive(Debug, Default)]
struct Pagemap {
    id: u64,
    stored: Vec<PageRun>,
    in_parent: Vec<Range<u64>>,
    /// Length of the pages file.
    bytes: u64,
    /// Whether pages are missing that were there.
    freed: bool,
    /// Pages of the parent process.
    forked: Vec<Range<u64>>,
}

/// Pages that are looked for.
#[derive(Debug, Clone)]
struct Search {
    /// Who needs them.
    image: Image,
    arg: u64,
    /// Whose they are in the directory that is looked at.
    owner: u64,
    /// See [`PageRun::crossed`].
    crossed: Option<usize>,
    generation: usize,
    /// In order.
    ranges: Vec<Range<u64>>,
}

/// One directory of a chain, as far as it is needed.
struct Level<'a> {
    set: &'a ImageSet,
    level: usize,
    maps: BTreeMap<(Image, u64), Pagemap>,
    /// Files that something was taken from.
    used: BTreeSet<PagesFile>,
}

impl<'a> Level<'a> {
    fn new(set: &'a ImageSet, level: usize) -> Self {
        Self { set, level, maps: BTreeMap::new(), used: BTreeSet::new() }
    }

    /// Empty if there is none.
    fn map(&mut self, image: Image, arg: u64) -> Result<&Pagemap, ImageError> {
        if let Entry::Vacant(place) = self.maps.entry((image, arg)) {
            let is_there = !self.set.entries(image, arg).is_empty();
            place.insert(match is_there {
                true => Pagemap::parse(self.set, image, arg, self.level)?,
                false => Pagemap::default(),
            });
        }
        Ok(&self.maps[&(image, arg)])
    }

    /// Takes what is stored here; gives what is further back.
    fn follow(
        &mut self,
        searches: Vec<Search>,
        found: &mut BTreeMap<(Image, u64), Vec<PageRun>>,
    ) -> Result<Vec<Search>, ImageError> {
        let (mut here, mut later) = (searches, Vec::new());
        while let Some(search) = here.pop() {
            let (image, level) = (search.image, self.level);
            let bad = |what: String| ImageError::Stream { file: image.file_name(search.owner), what };
            let runs = found.entry((image, search.arg)).or_default();
            let before = runs.len();
            let map = self.map(image, search.owner)?;
            let elsewhere = take(&search, map, runs).map_err(|addr| match map.freed {
                true => ImageError::Freed { path: image.file_name(search.owner).into() },
                false => bad(format!("pages at {addr:#x} should be there and are not")),
            })?;
            self.used.extend(runs[before..].iter().map(|run| run.file));
            if !elsewhere.in_parent.is_empty() {
                later.push(Search { ranges: elsewhere.in_parent, ..search });
            }
            let Some(range) = elsewhere.forked.first() else { continue };
            let parent = self.set.parent_process(search.owner).filter(|_| image == Image::Pagemap);
            let Some(owner) = parent.filter(|_| search.generation < MAX_GENERATIONS) else {
                let what = format!("pages at {:#x} are of a parent process, which is not there", range.start);
                return Err(bad(what));
            };
            here.push(Search {
                owner,
                crossed: search.crossed.or(Some(level)),
                generation: search.generation + 1,
                ranges: elsewhere.forked,
                ..search
            });
        }
        Ok(later)
    }

    /// Bytes that a pages file should have, by the pagemaps that were looked at.
    fn size(&self, id: u64) -> u64 {
        self.maps.values().find(|map| map.id == id).map_or(0, |map| map.bytes)
    }
}

impl Pagemap {
    /// The search for all of it.
    fn search(&self, image: Image, arg: u64) -> Search {
        let stored = self.stored.iter().map(|run| run.addr..run.end());
        let others = self.in_parent.iter().chain(&self.forked).cloned();
        let mut ranges: Vec<Range<u64>> = stored.chain(others).collect();
        ranges.sort_by_key(|range| range.start);
        Search { image, arg, owner: arg, crossed: None, generation: 0, ranges }
    }

    fn parse(set: &ImageSet, image: Image, arg: u64, level: usize) -> Result<Self, ImageError> {
        let (id, entries) = set.pagemap(image, arg)?;
        let bad = |what: String| ImageError::Stream { file: image.file_name(arg), what };
        let mut map = Self { id, ..Self::default() };
        let mut last_end = 0;
        let mut offset = 0;
        for entry in entries {
            let (pages, addr) = (pages_of(&entry), entry.vaddr);
            let len = pages.checked_mul(PAGE).filter(|_| addr.is_multiple_of(PAGE));
            let end = len.and_then(|len| addr.checked_add(len));
            let (Some(len), Some(end)) = (len, end) else {
                return Err(bad(format!("{pages} pages at {addr:#x}: no such range")));
            };
            if addr < last_end {
                return Err(bad(format!("{pages} pages at {addr:#x}: overlap with the range before")));
            }
            last_end = end;
            let flags = flags_of(&entry);
            if len == 0 {
                continue;
            }
            if flags & (PRESENT | FREED) == PRESENT | FREED {
                map.freed = true;
                offset += len;
            } else if flags & PRESENT != 0 {
                let lazy = flags & LAZY != 0;
                let file = PagesFile { level, id };
                let run = PageRun { addr, len, lazy, file, offset, crossed: None };
                push(&mut map.stored, run);
                offset += len;
            } else if flags & IN_PARENT != 0 {
                map.in_parent.push(addr..end);
            } else if flags & AS_PARENT_PROCESS != 0 {
                map.forked.push(addr..end);
            }
        }
        map.bytes = offset;
        Ok(map)
    }
}

/// Number of pages of a pagemap entry.
#[must_use]
pub fn pages_of(entry: &PagemapEntry) -> u64 {
    entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages))
}

/// Flags of a pagemap entry, those of old images too, which have none.
#[must_use]
pub fn flags_of(entry: &PagemapEntry) -> u32 {
    entry.flags.unwrap_or(if entry.in_parent() { IN_PARENT } else { PRESENT })
}

/// Adds an entry to a pagemap, to the one before if it says the same of the pages behind them.
pub fn add_entry(entries: &mut Vec<PagemapEntry>, entry: PagemapEntry) {
    match entries.last_mut() {
        Some(last) if last.flags == entry.flags && last.vaddr + pages_of(last) * PAGE == entry.vaddr => {
            last.nr_pages = Some(pages_of(last) + pages_of(&entry));
        }
        _ => entries.push(entry),
    }
}

/// Adds a run, to the one before if it goes on where that ends.
fn push(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last)
            if last.end() == run.addr
                && last.offset + last.len == run.offset
                && (last.file, last.lazy, last.crossed) == (run.file, run.lazy, run.crossed) =>
        {
            last.len += run.len;
        }
        _ => runs.push(run),
    }
}

impl ImageSet {
    /// All pages of a pagemap ([`Image::Pagemap`] or [`Image::ShmemPagemap`]), whichever directory they
    /// are in, in order of address. Empty if there is no such pagemap. Those of a stream have the offsets
    /// that they have among the contents of `pages-N.img`.
    ///
    /// # Errors
    /// The pagemap is malformed, or has pages in a parent while the set is not from [`Self::from_chain`].
    pub fn page_runs(&self, image: Image, arg: u64) -> Result<Vec<PageRun>, ImageError> {
        if let Some(runs) = self.chain.runs.get(&(image, arg)) {
            return Ok(runs.clone());
        }
        if self.entries(image, arg).is_empty() {
            return Ok(Vec::new());
        }
        let mut here = Level::new(self, 0);
        let map = here.map(image, arg)?;
        if map.in_parent.is_empty() && map.forked.is_empty() {
            return Ok(map.stored.clone());
        }
        let search = map.search(image, arg);
        let mut found = BTreeMap::new();
        if let Some(range) = here.follow(vec![search], &mut found)?.first().and_then(|s| s.ranges.first()) {
            let what = format!(
                "pages at {:#x} are in an earlier checkpoint, where nobody has looked for them",
                range.start
            );
            return Err(ImageError::Stream { file: image.file_name(arg), what });
        }
        let mut runs = found.remove(&(image, arg)).unwrap_or_default();
        runs.sort_by_key(|run| run.addr);
        Ok(runs)
    }

    /// The runs of [`Self::page_runs`], cut where one begins or ends that the parent process has too; and whether it has.
    ///
    /// # Errors
    /// As [`Self::page_runs`].
    pub fn runs_with_parent(&self, image: Image, arg: u64) -> Result<Vec<(PageRun, bool)>, ImageError> {
        let runs = self.page_runs(image, arg)?;
        let theirs = match self.parent_process(arg).filter(|_| image == Image::Pagemap) {
            Some(parent) => self.page_runs(image, parent)?,
            None => Vec::new(),
        };
        let mut theirs = theirs.iter().peekable();
        let mut parted = Vec::new();
        for run in runs {
            let mut rest = run;
            while rest.len > 0 {
                while theirs.next_if(|theirs| theirs.end() <= rest.addr).is_some() {}
                let next = theirs.peek().filter(|theirs| theirs.addr < rest.end());
                let (until, same) = match next {
                    Some(theirs) if theirs.addr <= rest.addr => {
                        let there = theirs.from(rest.addr);
                        (theirs.end(), (there.file, there.offset) == (rest.file, rest.offset))
                    }
                    Some(theirs) => (theirs.addr, false),
                    None => (rest.end(), false),
                };
                let part = rest.until(until);
                parted.push((part, same));
                rest = rest.from(part.end());
            }
        }
        Ok(parted)
    }

    fn parent_process(&self, pid: u64) -> Option<u64> {
        let tree: Vec<PstreeEntry> = self.all(Image::Pstree, 0).ok()?;
        let entry = tree.iter().find(|entry| u64::from(entry.pid) == pid)?;
        Some(u64::from(entry.ppid))
    }

    /// The pagemap with every page outside of `needed` (offsets in the pages file, ascending) marked as freed.
    ///
    /// # Errors
    /// It is malformed.
    pub fn pagemap_without(
        &self,
        image: Image,
        arg: u64,
        needed: &[Range<u64>],
    ) -> Result<Thinned, ImageError> {
        // For its checks.
        Pagemap::parse(self, image, arg, 0)?;
        let (mut entries, mut freed, mut new) = (Vec::new(), Vec::new(), false);
        let mut offset = 0;
        for entry in self.pagemap(image, arg)?.1 {
            let flags = flags_of(&entry);
            let len = pages_of(&entry) * PAGE;
            if flags & PRESENT == 0 || flags & FREED != 0 {
                if flags & PRESENT != 0 {
                    freed.push(offset..offset + len);
                    offset += len;
                }
                entries.push(entry);
                continue;
            }
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let next = needed.partition_point(|range| range.end <= at);
                let (keep, until) = match needed.get(next) {
                    Some(range) if range.start <= at => (true, range.end.min(end)),
                    Some(range) => (false, range.start.min(end)),
                    None => (false, end),
                };
                if !keep {
                    freed.push(at..until);
                    new = true;
                }
                entries.push(PagemapEntry {
                    vaddr: entry.vaddr + (at - offset),
                    compat_nr_pages: 0,
                    in_parent: None,
                    flags: Some(if keep { flags } else { flags | FREED }),
                    nr_pages: Some((until - at) / PAGE),
                });
                at = until;
            }
            offset = end;
        }
        Ok(Thinned { entries, freed, new })
    }

    /// A pages file that [`Self::page_runs`] names. `None` if it is missing, still to come on a stream, or
    /// compressed: then there is [`Self::packed_in`].
    #[must_use]
    pub fn pages_in(&self, file: PagesFile) -> Option<Place<'_>> {
        if file.level == 0 {
            return self.pages(file.id);
        }
        let ancestor = self.chain.files.get(&file).filter(|ancestor| !ancestor.packed)?;
        let file = self.files.get(ancestor.file)?;
        Some(Place { file: file.as_fd(), offset: 0, len: ancestor.len })
    }

    /// The same of compressed pages. `None` if there is no such file.
    ///
    /// # Errors
    /// It is no sequence of blocks.
    pub fn packed_in(&self, file: PagesFile) -> Result<Option<PackedFile>, ImageError> {
        if file.level == 0 {
            return self.packed(file.id);
        }
        let ancestor = self.chain.files.get(&file).filter(|ancestor| ancestor.packed);
        let Some((ancestor, open)) = ancestor.and_then(|a| Some((a, self.files.get(a.file)?))) else {
            return Ok(None);
        };
        let place = Place { file: open.as_fd(), offset: 0, len: ancestor.len };
        PackedFile::open(place, &Image::CkptPages.file_name(file.id)).map(Some)
    }

    /// The pieces of an ancestor's pages file that pages are needed of.
    pub(crate) fn needed(&self, file: PagesFile, ancestor: &Ancestor) -> Vec<Piece> {
        let mut used: Vec<Range<u64>> = self
            .chain
            .runs
            .values()
            .flatten()
            .filter(|run| run.file == file)
            .map(|run| run.offset..run.offset + run.len)
            .collect();
        used.sort_by_key(|range| range.start);
        let is_used = |piece: &&Piece| {
            let i = used.partition_point(|range| range.end <= piece.offset);
            used.get(i).is_some_and(|range| range.start < piece.offset.saturating_add(piece.len))
        };
        ancestor.pieces.iter().filter(is_used).copied().collect()
    }

    /// Whether some pages are in an earlier checkpoint's directory.
    #[must_use]
    pub fn is_increment(&self) -> bool {
        !self.chain.runs.is_empty()
    }

    /// How many earlier directories had to be opened to find all pages.
    #[must_use]
    pub fn chain_depth(&self) -> usize {
        self.chain.depth
    }

    /// Follows the links until all pages are found.
    pub(crate) fn resolve(&mut self, dir: Dir, path: &Path) -> Result<(), ImageError> {
        let mut found: BTreeMap<(Image, u64), Vec<PageRun>> = BTreeMap::new();
        let mut searches: Vec<Search> = Vec::new();
        let mut is_increment = false;
        let mut here = Level::new(self, 0);
        for (image, arg) in self.images().filter(|(image, _)| is_pagemap(*image)) {
            // Whoever needs a malformed pagemap meets the error again.
            let Ok(map) = here.map(image, arg) else { continue };
            if map.freed {
                return Err(ImageError::Freed { path: path.to_owned() });
            }
            is_increment |= !map.in_parent.is_empty();
            if !map.in_parent.is_empty() || !map.forked.is_empty() {
                searches.push(map.search(image, arg));
            }
        }
        if !is_increment {
            return Ok(());
        }
        let mut wanted = here.follow(searches, &mut found)?;
        let mut id = self.parent_id();
        let mut seen = BTreeSet::from([identity(&dir, path)?]);
        let start = path;
        let mut dir = dir;
        let mut level = 0;
        while !wanted.is_empty() {
            level += 1;
            let path = ancestor_name(start, level);
            dir = open_parent(&dir, &path)?;
            let bad = |what: String| ImageError::Stream { file: path.display().to_string(), what };
            let this = identity(&dir, &path)?;
            if !seen.insert(this) {
                return Err(bad("the chain of parents is a loop".to_owned()));
            }
            let part = Self::read_level(&mut dir, &path, &wanted)?;
            if let Some(id) = id.filter(|id| part.id().as_ref() != Some(id)) {
                let what = match part.id() {
                    Some(other) => format!("its id is {}", hex(&other)),
                    None => "it has no id".to_owned(),
                };
                return Err(bad(format!(
                    "is not the parent of this chain, which has the id {}: {what}",
                    hex(&id)
                )));
            }
            id = part.parent_id();
            let mut here = Level::new(&part, level);
            wanted = here.follow(wanted, &mut found).map_err(|error| match error {
                ImageError::Freed { .. } => ImageError::Freed { path: path.clone() },
                error => bad(error.to_string()),
            })?;
            for &file in &here.used {
                self.open_ancestor(&dir, &path, &part, file, here.size(file.id))?;
            }
        }
        for runs in found.values_mut() {
            runs.sort_by_key(|run| run.addr);
        }
        self.chain.runs = found;
        self.chain.depth = level;
        Ok(())
    }

    /// What is needed of a directory to go on with `searches`. Where pages are of a parent process, any can be needed.
    fn read_level(dir: &mut Dir, path: &Path, searches: &[Search]) -> Result<Self, ImageError> {
        let owners: BTreeSet<(Image, u64)> = searches.iter().map(|s| (s.image, s.owner)).collect();
        let part = Self::read_part(dir, path, &|image, arg| owners.contains(&(image, arg)))?;
        let mut maps = owners.iter().filter_map(|&(image, arg)| Some(part.pagemap(image, arg).ok()?.1));
        if !maps.any(|map| map.iter().any(|entry| flags_of(entry) & AS_PARENT_PROCESS != 0)) {
            return Ok(part);
        }
        Self::read_part(dir, path, &|image, _| is_pagemap(image) || image == Image::Pstree)
    }

    fn open_ancestor(
        &mut self,
        dir: &Dir,
        path: &Path,
        part: &Self,
        file: PagesFile,
        want: u64,
    ) -> Result<(), ImageError> {
        if self.chain.files.contains_key(&file) {
            return Ok(());
        }
        let plain = Image::Pages.file_name(file.id);
        let (name, packed, (open, len)) = match Self::open_image(dir, path, &plain) {
            Err(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let name = Image::CkptPages.file_name(file.id);
                let open = Self::open_image(dir, path, &name)?;
                (name, true, open)
            }
            open => (plain, false, open?),
        };
        let holds = if packed {
            let place = Place { file: open.as_fd(), offset: 0, len };
            PackedFile::open(place, &path.join(&name).display().to_string())?.plain_len()
        } else {
            len
        };
        if holds != want {
            let what = format!("{holds} bytes of pages, the pagemap lists {want}");
            return Err(ImageError::Stream { file: path.join(name).display().to_string(), what });
        }
        let index = self.keep(open);
        let pieces = part.pieces(file.id);
        self.chain.files.insert(file, Ancestor { file: index, len, pieces, packed });
        Ok(())
    }

    fn inventory_entry(&self) -> Option<InventoryEntry> {
        self.one(Image::Inventory, 0).ok()
    }

    /// The checkpoint's own id, if it has one: 16 bytes.
    #[must_use]
    pub fn id(&self) -> Option<Vec<u8>> {
        self.inventory_entry()?.ckpt_id
    }

    /// For those who need a whole checkpoint, called `name`.
    ///
    /// # Errors
    /// [`Refused`] if it is a pre-dump, which holds only memory.
    pub fn more_than_memory(&self, name: &Path) -> Result<(), Refused> {
        if self.inventory_entry().is_some_and(|entry| entry.ckpt_pre_dump()) {
            let why = "is a pre-dump, which holds memory and nothing else";
            return Err(Refused::new(name.display().to_string(), why)
                .advise("restore the checkpoint that was made as an increment of it"));
        }
        Ok(())
    }

    /// The id of the checkpoint that this one is an increment of.
    #[must_use]
    pub fn parent_id(&self) -> Option<Vec<u8>> {
        self.inventory_entry()?.ckpt_parent_id
    }
}

pub(crate) fn is_pagemap(image: Image) -> bool {
    matches!(image, Image::Pagemap | Image::ShmemPagemap)
}

/// What a pagemap says of pages that it does not store.
#[derive(Debug, Default)]
struct Elsewhere {
    in_parent: Vec<Range<u64>>,
    forked: Vec<Range<u64>>,
}

/// Takes from `map` what it has of a search's ranges, in order of address; gives what is elsewhere.
/// Err: the first address that is nowhere.
fn take(search: &Search, map: &Pagemap, runs: &mut Vec<PageRun>) -> Result<Elsewhere, u64> {
    let mut elsewhere = Elsewhere::default();
    let mut stored = map.stored.iter().peekable();
    let (mut in_parent, mut forked) = (map.in_parent.iter().peekable(), map.forked.iter().peekable());
    for range in &search.ranges {
        let mut at = range.start;
        while at < range.end {
            while stored.next_if(|run| run.end() <= at).is_some() {}
            while in_parent.next_if(|range| range.end <= at).is_some() {}
            while forked.next_if(|range| range.end <= at).is_some() {}
            let back = in_parent.peek().filter(|back| back.start <= at);
            let theirs = forked.peek().filter(|theirs| theirs.start <= at);
            at = if let Some(run) = stored.peek().filter(|run| run.addr <= at) {
                let run = PageRun { crossed: search.crossed, ..run.from(at).until(range.end) };
                push(runs, run);
                run.end()
            } else if let Some(back) = back {
                add(&mut elsewhere.in_parent, at..back.end.min(range.end))
            } else if let Some(theirs) = theirs {
                add(&mut elsewhere.forked, at..theirs.end.min(range.end))
            } else {
                return Err(at);
            };
        }
    }
    Ok(elsewhere)
}

/// Adds a range, to the one before if it goes on where that ends; gives its end.
pub fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) -> u64 {
    let end = range.end;
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = end,
        _ => ranges.push(range),
    }
    end
}

/// The directory and all before it, nearest first, by their real paths: where the links lead, whether pages
/// are needed from there or not.
///
/// # Errors
/// A link leads nowhere, or they go round in a circle.
pub fn ancestry(dir: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let mut all = vec![dir.canonicalize().map_err(ImageError::io(dir, "realpath"))?];
    let mut seen = BTreeSet::from_iter(all.clone());
    while let Some(last) = all.last() {
        let link = last.join(PARENT);
        if std::fs::symlink_metadata(&link).is_err() {
            break;
        }
        let next = link.join(".").canonicalize().map_err(|error| no_parent(&link, &link, error))?;
        if !seen.insert(next.clone()) {
            let what = "the chain of parents is a loop".to_owned();
            return Err(ImageError::Stream { file: link.display().to_string(), what });
        }
        all.push(next);
    }
    Ok(all)
}

/// What messages call the directory that is `level` links away: names of as many parts would be as long as the chain.
fn ancestor_name(start: &Path, level: usize) -> PathBuf {
    match level {
        0 => start.to_owned(),
        1 => start.join(PARENT),
        n => start.join(format!("{PARENT} ({n} checkpoints back)")),
    }
}

fn open_parent(dir: &Dir, path: &Path) -> Result<Dir, ImageError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = openat(dir, PARENT, flags, Mode::empty()).map_err(|errno| {
        let link = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(PARENT);
        no_parent(path, &link, errno.into())
    })?;
    Dir::from_fd(fd).map_err(ImageError::errno(path, "open the parent"))
}

/// Why the link at `link`, called `name`, leads to no directory.
fn no_parent(name: &Path, link: &Path, error: std::io::Error) -> ImageError {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => "which is not there".to_owned(),
        // What is at fault is the link.
        Some(errno @ (Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG)) => {
            format!("which is no directory ({errno})")
        }
        _ => return ImageError::io(name, "open the parent")(error),
    };
    let what = match std::fs::read_link(link) {
        Ok(to) => format!("leads to {}, {why}: this increment needs it", to.display()),
        Err(_) => "there is no such link, and this increment needs it".to_owned(),
    };
    ImageError::Stream { file: name.display().to_string(), what }
}

fn identity(dir: &Dir, path: &Path) -> Result<(u64, u64), ImageError> {
    let stat = fstat(dir).map_err(ImageError::errno(path, "fstat"))?;
    Ok((stat.st_dev, stat.st_ino))
}

fn hex(id: &[u8]) -> String {
    id.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Seek, Write},
        os::unix::fs::symlink,
    };

    use ckpt_proto::{
        Message,
        stream::Facts,
        types::{PagemapHead, PstreeEntry},
    };

    use super::*;
    use crate::DirWriter;

    /// Flags, first page number, number of pages.
    type Entry = (u32, u64, u64);

    fn write(dir: &Path, name: &str, parent: Option<&str>, map: &[Entry], fill: u8) {
        let id = |name: &str| name.as_bytes().to_vec();
        let mut writer = DirWriter::create(&dir.join(name)).unwrap();
        let inventory = InventoryEntry {
            img_version: 2,
            ckpt_id: Some(id(name)),
            ckpt_parent_id: parent.map(id),
            ..InventoryEntry::default()
        };
        writer.entry(Image::Inventory, 0, &inventory.encode_to_vec()).unwrap();
        let task = PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7] };
        writer.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
        writer.entry(Image::Pagemap, 7, &PagemapHead { pages_id: 1 }.encode_to_vec()).unwrap();
        let mut bytes = 0;
        for &(flags, page, pages) in map {
            let entry = PagemapEntry {
                vaddr: page * PAGE,
                compat_nr_pages: 0,
                in_parent: None,
                flags: Some(flags),
                nr_pages: Some(pages),
            };
            writer.entry(Image::Pagemap, 7, &entry.encode_to_vec()).unwrap();
            bytes += if flags & PRESENT != 0 { pages * PAGE } else { 0 };
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![fill; usize::try_from(bytes).unwrap()]).unwrap();
        file.rewind().unwrap();
        writer.pages_from(1, file.as_fd(), bytes, &Facts::default()).unwrap();
        writer.finish().unwrap();
        if let Some(parent) = parent {
            symlink(format!("../{parent}"), dir.join(name).join(PARENT)).unwrap();
        }
    }

    /// Level, page number, pages, offset in pages.
    fn runs(set: &ImageSet) -> Vec<(usize, u64, u64, u64)> {
        let runs = set.page_runs(Image::Pagemap, 7).unwrap();
        runs.iter().map(|r| (r.file.level, r.addr / PAGE, r.len / PAGE, r.offset / PAGE)).collect()
    }

    #[test]
    fn each_page_is_where_it_was_written_last() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "1", None, &[(PRESENT, 1, 4), (PRESENT, 9, 2)], 1);
        write(
            dir,
            "2",
            Some("1"),
            &[(IN_PARENT, 1, 1), (PRESENT, 2, 1), (IN_PARENT, 3, 2), (IN_PARENT, 9, 1)],
            2,
        );
        write(dir, "3", Some("2"), &[(PRESENT, 1, 1), (IN_PARENT, 2, 2), (IN_PARENT, 9, 1)], 3);
        let set = ImageSet::from_chain(&dir.join("3")).unwrap();
        assert_eq!(runs(&set), [(0, 1, 1, 0), (1, 2, 1, 0), (2, 3, 1, 2), (2, 9, 1, 4)]);
        assert_eq!(set.chain_depth(), 2);
        set.verify_pages().unwrap();
        assert!(set.pages_in(PagesFile { level: 2, id: 1 }).is_some());
        // The directory alone does not tell.
        assert!(ImageSet::from_dir(&dir.join("3")).unwrap().page_runs(Image::Pagemap, 7).is_err());
        // Nothing is looked for in 1 if 2 has it all.
        write(dir, "4", Some("2"), &[(IN_PARENT, 2, 1)], 4);
        assert_eq!(ImageSet::from_chain(&dir.join("4")).unwrap().chain_depth(), 1);
    }

    #[test]
    fn a_broken_chain_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "1", None, &[(PRESENT, 1, 2)], 1);
        write(dir, "missing", Some("1"), &[(IN_PARENT, 1, 3)], 2);
        write(dir, "gone", Some("0"), &[(IN_PARENT, 1, 1)], 2);
        write(dir, "other", Some("1"), &[(IN_PARENT, 1, 1)], 2);
        std::fs::remove_file(dir.join("other").join(PARENT)).unwrap();
        symlink("../missing", dir.join("other").join(PARENT)).unwrap();
        write(dir, "loop", Some("loop"), &[(IN_PARENT, 1, 1)], 2);
        for (name, says) in [
            ("missing", "0x3000"),
            ("gone", "leads to ../0,"),
            ("other", "is not the parent"),
            ("loop", "loop"),
        ] {
            let error = ImageSet::from_chain(&dir.join(name)).unwrap_err();
            assert!(error.is_corruption() && error.to_string().contains(says), "{name}: {error}");
        }
        assert!(ancestry(&dir.join("gone")).unwrap_err().to_string().contains("leads to ../0,"));
        for to in ["../1/inventory.img", PARENT, "/dev/zero", &"long".repeat(100)] {
            std::fs::remove_file(dir.join("other").join(PARENT)).unwrap();
            symlink(to, dir.join("other").join(PARENT)).unwrap();
            for result in
                [ImageSet::from_chain(&dir.join("other")).map(drop), ancestry(&dir.join("other")).map(drop)]
            {
                let error = result.unwrap_err();
                let says = format!("leads to {to}, which is no directory");
                assert!(error.is_corruption() && error.to_string().contains(&says), "{to}: {error}");
            }
        }
        std::fs::remove_file(dir.join("gone").join(PARENT)).unwrap();
        let error = ImageSet::from_chain(&dir.join("gone")).unwrap_err().to_string();
        assert!(error.contains("there is no such link"), "{error}");
    }

    /// However long the chain is, what is said of its end is not.
    #[test]
    fn the_end_of_a_long_chain_has_a_short_name() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for n in 1..=50 {
            write(dir, &n.to_string(), Some(&(n - 1).to_string()), &[(IN_PARENT, 1, 1)], 1);
        }
        let error = ImageSet::from_chain(&dir.join("50")).unwrap_err().to_string();
        assert!(error.contains("50/parent (50 checkpoints back): leads to ../0"), "{error}");
    }

    #[test]
    fn damaged_pages_of_an_ancestor_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "1", None, &[(PRESENT, 1, 2)], 1);
        write(dir, "2", Some("1"), &[(IN_PARENT, 1, 1)], 2);
        let pages = dir.join("1/pages-1.img");
        let mut bytes = std::fs::read(&pages).unwrap();
        bytes[5] ^= 1;
        std::fs::write(&pages, &bytes).unwrap();
        assert!(ImageSet::from_chain(&dir.join("2")).unwrap().verify_pages().is_err());
        std::fs::write(&pages, &bytes[1..]).unwrap();
        assert!(ImageSet::from_chain(&dir.join("2")).is_err());
    }
}
