//! Pages that an increment has stored though they are what the checkpoint before has at the same addresses.
//!
//! Tracking tells what was written, not what is different: programs write what is there already, count up and down
//! again, and a stack comes to look as it did. Shared memory is stored whole by every increment. Such pages are as
//! well in the parent, on any file system.
//!
//! The directory is made anew without them and takes the place of the old one in one step, as by `--in-place`: whoever needs
//! a page of it finds that in the checkpoint before. This comes first: what is given back here is needed there.

use std::{collections::BTreeMap, fs, ops::Range, path::Path};

use anyhow::Context;
use ckpt_images::{
    DirWriter, ImageError, ImageSet, PageRun,
    chain::{self, PARENT},
};
use ckpt_proto::Image;

use crate::fold::{self, Base, Pages};

/// Ranges of each pagemap.
pub type Repeats = BTreeMap<(Image, u64), Vec<Range<u64>>>;

const PAGE: u64 = 4096;
/// What is less than this part of the pages of a directory does not pay for copying the rest.
const WORTH: u64 = 16;
/// Bytes that are compared at a time.
const CHUNK: u64 = 256 << 10;

/// Gives back what the checkpoint in `dir` repeats; how many bytes.
///
/// # Errors
/// Then it is as it was.
pub fn give_back(dir: &Path, verify: bool) -> anyhow::Result<u64> {
    let parent = dir.join(PARENT);
    if fs::symlink_metadata(&parent).is_err() {
        return Ok(0);
    }
    let (Some(set), Some(before)) = (whole(dir)?, whole(&parent)?) else { return Ok(0) };
    if !set.args(Image::CkptPages).is_empty() {
        ckpt_cli::note!(1, "{}: compressed pages stay", dir.display());
        return Ok(0);
    }
    let repeats = find(&set, &before)?;
    let bytes: u64 = repeats.values().flatten().map(|range| range.end - range.start).sum();
    let stored: u64 =
        set.args(Image::Pages).iter().filter_map(|&id| set.pages(id)).map(|file| file.len).sum();
    if bytes < (stored / WORTH).max(PAGE) {
        return Ok(0);
    }
    let base = Base::parent(dir, repeats)?;
    let mut out = DirWriter::create_over(dir)?;
    let cleanup = out.cleanup();
    let made = make(dir, &set, &base, verify, &mut out).and_then(|()| Ok(out.finish()?));
    cleanup.remove();
    made.map(|()| bytes)
}

/// A checkpoint; `None` if pages of it have been freed.
fn whole(dir: &Path) -> anyhow::Result<Option<ImageSet>> {
    match ImageSet::from_chain(dir) {
        Ok(set) => Ok(Some(set)),
        Err(ImageError::Freed { .. }) => Ok(None),
        Err(error) => Err(error).with_context(|| dir.display().to_string()),
    }
}

fn make(dir: &Path, set: &ImageSet, base: &Base, verify: bool, out: &mut DirWriter) -> anyhow::Result<()> {
    let verification = if verify { Some(set.verification()?) } else { None };
    fold::fold(set, Some(base), None, out, &mut |_| ())?;
    fold::keep_others(dir, out)?;
    verification.map_or(Ok(()), |verification| Ok(verification.finish()?))
}

fn find(set: &ImageSet, before: &ImageSet) -> anyhow::Result<Repeats> {
    let (mut ours, mut theirs) = (Pages::of(set), Pages::of(before));
    let mut repeats = Repeats::new();
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image) {
            let old = before.page_runs(image, arg)?;
            let mut old = old.iter().peekable();
            let mut ranges = Vec::new();
            for (run, shared) in set.runs_with_parent(image, arg)? {
                if shared || run.file.level > 0 {
                    continue;
                }
                while old.next_if(|old| old.addr + old.len <= run.addr).is_some() {}
                for old in old.clone().take_while(|old| old.addr < run.addr + run.len) {
                    compare(&mut ours, &run, &mut theirs, old, &mut ranges)?;
                }
            }
            repeats.insert((image, arg), ranges);
        }
    }
    Ok(repeats)
}

/// Adds the pages that both have and that are equal.
fn compare(
    ours: &mut Pages<'_>,
    run: &PageRun,
    theirs: &mut Pages<'_>,
    old: &PageRun,
    equal: &mut Vec<Range<u64>>,
) -> anyhow::Result<()> {
    let mut at = run.addr.max(old.addr);
    let end = (run.addr + run.len).min(old.addr + old.len);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    while at < end {
        let len = usize::try_from((end - at).min(CHUNK))?;
        a.resize(len, 0);
        b.resize(len, 0);
        ours.read(run, at - run.addr, &mut a)?;
        theirs.read(old, at - old.addr, &mut b)?;
        for ((a, b), page) in a.chunks(4096).zip(b.chunks(4096)).zip((at..).step_by(4096)) {
            if a == b {
                chain::add(equal, page..page + PAGE);
            }
        }
        at += len as u64;
    }
    Ok(())
}
