//! Room that older checkpoints take for pages which nobody needs any more.
//!
//! Needed is what the last checkpoint of the chain has there, and what any other checkpoint has there
//! that is found beside one of the chain. The rest is marked as freed in the pagemap (an own flag that
//! CRIU passes over), so that whoever looks for such a page meets an error and not a page of zeros, and cut out of
//! the file (`fallocate(FALLOC_FL_PUNCH_HOLE)`). In this order, so that it can end at any instant:
//!
//! 1. pieces of the file that lose something are checked, and their checksums computed for what will be left;
//! 2. a directory with the new pagemap and manifest is made, all other files being links to the old
//!    ones, and exchanged with the old one;
//! 3. the holes are made. If that is cut short, the next run makes them.
//!
//! A page that a later checkpoint has again, equal or not, is freed in the earlier one. What else is equal is for
//! [`crate::equal`].
//!
//! Not chosen: writing the files anew without the pages. It costs a copy of everything to free a little.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_images::{
    DirWriter, ImageSet, PagesFile,
    chain::{self, PARENT, Thinned},
    sums::{self, Piece, hash_range},
};
use ckpt_proto::{
    Image, Message,
    types::{ManifestEntry, ManifestPiece},
};
use ckpt_sys::Refused;
use nix::fcntl::{FallocateFlags, fallocate};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{Args, family};

/// Bytes of each pages file that somebody needs.
type Needs = BTreeMap<(PathBuf, u64), Vec<Range<u64>>>;

/// Frees what can be freed in the chain of `args.dir`.
///
/// # Errors
/// Then the directories done so far have less room, and all checkpoints that could be restored still can,
/// but for the older ones of the chain.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let all = chain::ancestry(&args.dir)?;
    let mut needs = Needs::new();
    note(&all, &mut needs).with_context(|| args.dir.display().to_string())?;
    for other in family::dependents(&all)? {
        let read = chain::ancestry(&other).map_err(Into::into).and_then(|its| note(&its, &mut needs));
        match read {
            Ok(()) => ckpt_cli::note!(1, "what {} needs is kept", other.display()),
            Err(error) if args.force => {
                ckpt_cli::warn(&format!("{}: {}", other.display(), ckpt_cli::describe(&error)));
            }
            Err(error) => {
                let why = format!(
                    "leads to this chain, and what it needs of it can't be told ({})",
                    ckpt_cli::describe(&error)
                );
                return Err(Refused::new(other.display().to_string(), why)
                    .advise("remove it, or pass --force to take no notice of it")
                    .into());
            }
        }
    }
    let mut progress = ckpt_cli::Progress::new("freeing", None);
    let mut sum = 0;
    for dir in all.iter().skip(1) {
        let freed = thin(dir, &needs, !args.no_verify).with_context(|| dir.display().to_string())?;
        progress.inc(freed);
        sum += freed;
        ckpt_cli::note!(1, "{}: {freed} bytes are free", dir.display());
    }
    ckpt_cli::stats::count("bytes", "free", sum);
    ckpt_cli::stats::count("chain", "directories", all.len() as u64);
    ckpt_cli::note!(1, "{sum} bytes of pages in {} directories are free", all.len() - 1);
    Ok(())
}

/// Notes what the first directory of `chain` needs of the others.
fn note(chain: &[PathBuf], needs: &mut Needs) -> anyhow::Result<()> {
    let Some(dir) = chain.first() else { return Ok(()) };
    let set = ImageSet::from_chain(dir)?;
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image) {
            for run in set.page_runs(image, arg)? {
                let PagesFile { level, id } = run.file;
                let owner = chain.get(level).context("a chain that changes meanwhile")?;
                needs.entry((owner.clone(), id)).or_default().push(run.offset..run.offset + run.len);
            }
        }
    }
    Ok(())
}

/// In order and without overlaps.
fn united(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// Frees what nobody needs of one directory's pages; how many bytes are free now.
fn thin(dir: &Path, needs: &Needs, verify: bool) -> anyhow::Result<u64> {
    let set = ImageSet::from_dir(dir)?;
    let mut pagemaps: BTreeMap<(Image, u64), (u64, Thinned)> = BTreeMap::new();
    let mut owners: BTreeMap<u64, u32> = BTreeMap::new();
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image).into_iter().filter(|&arg| !set.entries(image, arg).is_empty()) {
            let (id, _) = set.pagemap(image, arg)?;
            *owners.entry(id).or_default() += 1;
            if set.packed(id)?.is_some() {
                let file = dir.join(Image::CkptPages.file_name(id));
                ckpt_cli::warn(&format!("{}: compressed pages are not freed", file.display()));
                continue;
            }
            let needed = united(needs.get(&(dir.to_owned(), id)).cloned().unwrap_or_default());
            pagemaps.insert((image, arg), (id, set.pagemap_without(image, arg, &needed)?));
        }
    }
    if let Some((id, _)) = owners.iter().find(|&(_, &count)| count > 1) {
        bail!("{}: two pagemaps name it", Image::Pages.file_name(*id));
    }
    pagemaps.retain(|_, (_, thinned)| !thinned.freed.is_empty());
    if pagemaps.values().any(|(_, thinned)| thinned.new) {
        replace(dir, &set, &pagemaps, verify)?;
    }
    let mut freed = 0;
    for (id, thinned) in pagemaps.values() {
        let path = dir.join(Image::Pages.file_name(*id));
        let file = File::options().write(true).open(&path).with_context(|| path.display().to_string())?;
        for range in &thinned.freed {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let (start, len) = (i64::try_from(range.start)?, i64::try_from(range.end - range.start)?);
            fallocate(&file, flags, start, len)
                .with_context(|| format!("{}: fallocate(PUNCH_HOLE)", path.display()))?;
            freed += range.end - range.start;
        }
        file.sync_all().with_context(|| path.display().to_string())?;
    }
    Ok(freed)
}

/// Exchanges the directory for one with the new pagemaps, and a manifest for what will be left of the pages.
fn replace(
    dir: &Path,
    set: &ImageSet,
    pagemaps: &BTreeMap<(Image, u64), (u64, Thinned)>,
    verify: bool,
) -> anyhow::Result<()> {
    let mut out = DirWriter::create_over(dir)?;
    let cleanup = out.cleanup();
    let mut manifest: BTreeMap<String, ManifestEntry> = BTreeMap::new();
    for entry in set.all::<ManifestEntry>(Image::CkptManifest, 0)? {
        manifest.insert(entry.name.clone(), entry);
    }
    let thinned: BTreeMap<u64, &Thinned> = pagemaps.values().map(|(id, thinned)| (*id, thinned)).collect();
    for file in fs::read_dir(dir)? {
        let path = file?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let meta = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
        if name == PARENT && meta.is_symlink() {
            out.link_parent(&path)?;
            continue;
        }
        if !meta.is_file() {
            bail!("{}: neither a file nor the link to the parent", path.display());
        }
        let image = Image::parse_file_name(&name);
        match image {
            Some((Image::CkptManifest, _)) => continue,
            Some(key) if pagemaps.contains_key(&key) => continue,
            _ => {}
        }
        let entry = image.map(|_| {
            let unknown =
                || ManifestEntry { name: name.clone(), size: meta.len(), ..ManifestEntry::default() };
            manifest.remove(&name).unwrap_or_else(unknown)
        });
        let entry = match (entry, image) {
            (Some(mut entry), Some((Image::Pages, id))) => {
                if let Some(thinned) = thinned.get(&id) {
                    entry.pieces = left_over(&path, &sums::pieces(&entry), &thinned.freed, verify)?;
                }
                Some(entry)
            }
            (entry, _) => entry,
        };
        out.adopt(&path, entry)?;
    }
    for (&(image, arg), (_, thinned)) in pagemaps {
        if let Some(head) = set.entries(image, arg).first() {
            out.entry(image, arg, head)?;
        }
        for entry in &thinned.entries {
            out.entry(image, arg, &entry.encode_to_vec())?;
        }
    }
    let finished = out.finish();
    cleanup.remove();
    Ok(finished?)
}

/// Pieces for what will be left when `freed` is cut out: those that lose something are read for the last
/// time and cut where the holes are; the holes have no checksum.
fn left_over(
    path: &Path,
    pieces: &[Piece],
    freed: &[Range<u64>],
    verify: bool,
) -> anyhow::Result<Vec<ManifestPiece>> {
    let shown = || path.display().to_string();
    let file = File::open(path).with_context(shown)?;
    let sum = |from: u64, to: u64| -> anyhow::Result<u64> {
        let mut hash = Xxh3Default::new();
        hash_range(&file, from, to - from, &mut [&mut hash]).with_context(shown)?;
        Ok(hash.digest())
    };
    let mut all = Vec::new();
    for piece in pieces {
        let end = piece.offset.saturating_add(piece.len);
        let first = freed.partition_point(|range| range.end <= piece.offset);
        let holes = freed[first..].iter().take_while(|range| range.start < end);
        let mut at = piece.offset;
        let mut parts = Vec::new();
        for hole in holes {
            let (from, to) = (hole.start.max(at), hole.end.min(end));
            if at < from {
                parts.push((at, from, true));
            }
            parts.push((from, to, false));
            at = to;
        }
        let (Some(expected), false) = (piece.sum, parts.is_empty()) else {
            all.push(ManifestPiece { len: piece.len, xxh3: piece.sum });
            continue;
        };
        if at < end {
            parts.push((at, end, true));
        }
        if verify && sum(piece.offset, end)? != expected {
            let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let what = "the contents have changed".to_owned();
            return Err(ckpt_images::ImageError::Manifest { file, what }.into());
        }
        for (from, to, kept) in parts {
            let xxh3 = if kept { Some(sum(from, to)?) } else { None };
            all.push(ManifestPiece { len: to - from, xxh3 });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_united() {
        assert_eq!(united(vec![5..7, 0..2, 1..3, 7..9]), [0..3, 5..9]);
    }
}
