//! A set of images as a stream.
//!
//! All entries with their contents come first, then BULK, then the pages, which splice(2) moves straight
//! from the files. So every stage behind sees the whole checkpoint before the first page, and
//! `ckpt-restore` can place each page where it belongs as it comes. Compressed pages are given as the
//! blocks that they are stored in.
//!
//! An increment becomes a full checkpoint: its pages come from whichever directory of the chain has
//! them (see [`crate::chain`]), and come plain. What forked processes share there, they share in the stream.

use std::{collections::BTreeMap, fs::File, os::fd::AsFd};

use ckpt_proto::{
    Image, Message, Payload,
    stream::Writer,
    types::{CoreEntry, Hello, InventoryEntry, PagemapEntry, PstreeEntry, core_entry::March},
};
use nix::{
    fcntl::OFlag,
    unistd::{SysconfVar, pipe2, sysconf},
};

use crate::{
    ImageError, ImageSet, PageRun, Place, chain, recode,
    stage::{self, Check},
    sums::Verification,
};

/// Where the pages of one `pages-N.img` come from.
#[derive(Debug)]
enum Source {
    /// A file that is to be written as it is.
    Whole,
    Packed,
    /// The pages of a chain.
    Gathered(Vec<PageRun>),
}

/// By their numbers: what is shared with a parent process comes before what its children have beside it.
type Sources = BTreeMap<u64, Source>;

fn sources(set: &ImageSet) -> Result<Sources, ImageError> {
    let mut sources = Sources::new();
    sources.extend(set.args(Image::Pages).into_iter().map(|id| (id, Source::Whole)));
    sources.extend(set.args(Image::CkptPages).into_iter().map(|id| (id, Source::Packed)));
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image) {
            let mut runs = own_runs(set, image, arg)?;
            if runs.iter().any(|(run, _)| run.file.level > 0) {
                runs.retain(|(_, shared)| !shared);
                let runs = runs.into_iter().map(|(run, _)| run).collect();
                sources.insert(set.pagemap(image, arg)?.0, Source::Gathered(runs));
            }
        }
    }
    Ok(sources)
}

/// The runs of a pagemap, and whether they are those of the parent process.
fn own_runs(set: &ImageSet, image: Image, arg: u64) -> Result<Vec<(PageRun, bool)>, ImageError> {
    if set.is_increment() {
        return set.runs_with_parent(image, arg);
    }
    Ok(set.page_runs(image, arg)?.into_iter().map(|run| (run, false)).collect())
}

/// What the stream of a set begins with; says what can be said without the tree.
///
/// # Errors
/// Malformed images.
pub fn hello(set: &ImageSet) -> Result<Hello, ImageError> {
    let arch = match set.args(Image::Core).first() {
        Some(&tid) => set.one::<CoreEntry>(Image::Core, tid)?.mtype,
        None => March::X8664.into(),
    };
    let page_size = match March::try_from(arch) {
        Ok(March::X8664) => 4096,
        _ => sysconf(SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|size| u32::try_from(size).ok())
            .unwrap_or(4096),
    };
    Ok(Hello {
        page_size,
        arch: u32::try_from(arch).unwrap_or(0),
        control: None,
        lacks: Vec::new(),
        root_pid: set.all::<PstreeEntry>(Image::Pstree, 0)?.first().map(|root| root.pid),
        packed: sources(set)?.values().any(|source| matches!(source, Source::Packed)).then_some(true),
    })
}

/// Bytes of pages that [`write`] gives, unpacked.
///
/// # Errors
/// Malformed images.
pub fn bytes(set: &ImageSet) -> Result<u64, ImageError> {
    let mut sum = 0;
    for (id, source) in sources(set)? {
        sum += match source {
            Source::Whole => set.pages(id).map_or(0, |place| place.len),
            Source::Packed => set.packed(id)?.map_or(0, |packed| packed.plain_len()),
            Source::Gathered(runs) => runs.iter().map(|run| run.len).sum(),
        };
    }
    Ok(sum)
}

/// Writes everything in the set but END. `verify`: whether pages are read and compared with the
/// manifest; else its checksums go with them as they are; `progress` is told of bytes of pages.
///
/// # Errors
/// The images', the output's. Then the stream must not get an end record.
pub fn write(
    set: &ImageSet,
    out: &mut Writer<File>,
    verify: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<(), ImageError> {
    let sources = sources(set)?;
    // Pages of an increment are gathered from pieces of files whose checksums cover the whole piece: a
    // thread looks at those meanwhile.
    let gathered = sources.values().any(|source| matches!(source, Source::Gathered(_)));
    let verification = match verify && gathered {
        true => Some(set.verification()?),
        false => None,
    };
    write_from(set, &sources, out, verify, progress)?;
    verification.map_or(Ok(()), Verification::finish)
}

fn write_from(
    set: &ImageSet,
    sources: &Sources,
    out: &mut Writer<File>,
    verify: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<(), ImageError> {
    let skipped = [Image::CkptManifest, Image::Pages, Image::CkptPages];
    for (image, arg) in set.images().filter(|(image, _)| !skipped.contains(image)) {
        write_image(set, out, image, arg)?;
    }
    let is_empty = |id, source: &Source| match source {
        Source::Whole => set.pages(id).is_none_or(|place| place.len == 0),
        Source::Packed => false,
        Source::Gathered(runs) => runs.is_empty(),
    };
    for (&id, _) in sources.iter().filter(|&(&id, source)| is_empty(id, source)) {
        out.data_header(Image::Pages.name(), id, 0).map_err(ImageError::output)?;
    }
    out.bulk().map_err(ImageError::output)?;
    for (&id, source) in sources.iter().filter(|&(&id, source)| !is_empty(id, source)) {
        match source {
            Source::Whole => {
                let Some(place) = set.pages(id) else { continue };
                let pieces = set.pieces(id);
                let check = if verify { Check::Read(&pieces) } else { Check::Trust(&pieces) };
                stage::write_pages(out, id, place, check, &mut *progress)?;
            }
            Source::Packed => {
                let Some(packed) = set.packed(id)? else { continue };
                packed.for_each_block(|block, plain| {
                    progress(plain);
                    out.data(Image::CkptPages, id, block).map_err(ImageError::output)
                })?;
            }
            Source::Gathered(runs) => stage::write_runs(out, id, set, runs, &mut *progress)?,
        }
    }
    Ok(())
}

fn write_image(set: &ImageSet, out: &mut Writer<File>, image: Image, arg: u64) -> Result<(), ImageError> {
    let entries = set.entries(image, arg);
    if image.payload() == Payload::Raw {
        match set.payload(image, arg, 0) {
            Some(place) if place.len > 0 => return write_contents(out, image, arg, place),
            _ => return out.data_header(image.name(), arg, 0).map_err(ImageError::output),
        }
    }
    if matches!(image, Image::Pagemap | Image::ShmemPagemap) && set.is_increment() {
        return write_pagemap(set, out, image, arg);
    }
    if image == Image::Inventory {
        // Whoever has this stream needs no parent.
        let mut inventory: InventoryEntry = set.one(image, arg)?;
        if inventory.ckpt_parent_id.take().is_some() {
            return out.entry(image, arg, &inventory.encode_to_vec()).map_err(ImageError::output);
        }
    }
    if entries.is_empty() {
        // The file is there all the same: contents of no length say so.
        return out.data_header(image.name(), arg, 0).map_err(ImageError::output);
    }
    for (index, entry) in entries.iter().enumerate() {
        out.entry(image, arg, entry).map_err(ImageError::output)?;
        if let Some(place) = set.payload(image, arg, index) {
            write_contents(out, image, arg, place)?;
        }
    }
    Ok(())
}

/// The pagemap of an increment, as that of a full checkpoint.
fn write_pagemap(set: &ImageSet, out: &mut Writer<File>, image: Image, arg: u64) -> Result<(), ImageError> {
    let Some(head) = set.entries(image, arg).first() else {
        return Err(ImageError::Missing { file: image.file_name(arg) });
    };
    out.entry(image, arg, head).map_err(ImageError::output)?;
    let mut entries: Vec<PagemapEntry> = Vec::new();
    for (run, shared) in own_runs(set, image, arg)? {
        chain::add_entry(&mut entries, if shared { run.parent_process_entry() } else { run.pagemap_entry() });
    }
    for entry in entries {
        out.entry(image, arg, &entry.encode_to_vec()).map_err(ImageError::output)?;
    }
    Ok(())
}

/// Contents that the stream's checksum covers, in frames of bounded size.
fn write_contents(
    out: &mut Writer<File>,
    image: Image,
    arg: u64,
    place: Place<'_>,
) -> Result<(), ImageError> {
    const FRAME: u64 = 1 << 20;
    let bad = |what: &str| ImageError::Stream { file: image.file_name(arg), what: what.to_owned() };
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < place.len {
        if done % FRAME == 0 {
            out.data_header(image.name(), arg, FRAME.min(place.len - done)).map_err(ImageError::output)?;
        }
        let left = (place.len - done).min(FRAME - done % FRAME);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let at = i64::try_from(place.offset + done).map_err(|_| bad("the offset is out of range"))?;
        let n = nix::sys::uio::pread(place.file, &mut buffer[..want], at)
            .map_err(ImageError::errno(image.file_name(arg), "pread"))?;
        if n == 0 {
            return Err(bad("the file shrank while it was being read"));
        }
        out.data_bytes(&buffer[..n]).map_err(ImageError::output)?;
        done += n as u64;
    }
    Ok(())
}

impl ImageSet {
    /// The same set with plain pages. Those of a directory with compressed ones are then still to come, from a thread
    /// that unpacks them: [`Self::take_bulk`].
    ///
    /// # Errors
    /// Malformed images; there can't be one more thread or pipe.
    pub fn unpacked(self) -> Result<Self, ImageError> {
        if !self.is_packed() {
            return Ok(self);
        }
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).map_err(ImageError::errno("pipe", "pipe2"))?;
        stage::grow_pipe(ours.as_fd());
        let hello = hello(&self)?;
        recode::start(move || -> Result<(), ImageError> {
            let mut out = Writer::open(File::from(ours), hello).map_err(ImageError::output)?;
            match write(&self, &mut out, true, &mut |_| {}) {
                Ok(()) => out.end().map(drop).map_err(ImageError::output),
                Err(error) => out.abort(&recode::reason(&error)).map_err(ImageError::output),
            }
        })?;
        Self::from_stream(File::from(theirs))
    }
}
