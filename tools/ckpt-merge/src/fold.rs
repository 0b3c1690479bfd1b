//! A checkpoint with the pages that it had in others.
//!
//! Entries are those of the last directory. Of pages, the file is made by copy_file_range(2) from the
//! files that have them, so that a file system which can share room between files does so. The
//! checkpoint keeps its id: to those that are increments of it nothing has changed.
//!
//! What a process has stored with its parent process stays so if the result can say it: where the parent process still
//! has that page. Where it has written to it since, each child gets a page of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use ckpt_images::{DirWriter, ImageError, ImageSet, PageRun, PagesFile, Place, chain, pack::PackedFile};
use ckpt_proto::{Image, Message, Payload, types::InventoryEntry};
use ckpt_sys::Refused;

/// The checkpoint that the result is to be an increment of.
#[derive(Debug)]
pub struct Base {
    dir: PathBuf,
    /// How many links lead to it.
    level: usize,
    id: Option<Vec<u8>>,
}

impl Base {
    /// Looks for `base` among the ancestors of `dir`.
    ///
    /// # Errors
    /// It is none of them.
    pub fn find(dir: &Path, base: &Path, set: &ImageSet) -> anyhow::Result<Self> {
        let wanted = base.canonicalize().with_context(|| base.display().to_string())?;
        let all = chain::ancestry(dir)?;
        let level = all.iter().position(|ancestor| *ancestor == wanted).filter(|&level| level > 0);
        let Some(level) = level else {
            let why = format!("is no checkpoint that {} is an increment of", dir.display());
            return Err(Refused::new(base.display().to_string(), why).into());
        };
        let id = ImageSet::id_of_dir(&wanted).with_context(|| base.display().to_string())?;
        ensure!(id.is_some() || set.parent_id().is_none(), "{}: it has no id", base.display());
        Ok(Self { dir: wanted, level, id })
    }
}

/// Writes the set, all of it, to `out`. `progress` is told of bytes of pages.
///
/// # Errors
/// The images', the directory's.
pub fn fold(
    set: &ImageSet,
    base: Option<&Base>,
    out: &mut DirWriter,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    let mut pages: Vec<(u64, Vec<PageRun>)> = Vec::new();
    for (image, arg) in set.images() {
        match image {
            Image::CkptManifest | Image::Pages | Image::CkptPages => {}
            Image::Pagemap | Image::ShmemPagemap => {
                pages.extend(pagemap(set, base, out, image, arg)?);
            }
            Image::Inventory => {
                let mut inventory: InventoryEntry = set.one(image, arg)?;
                inventory.ckpt_parent_id = base.and_then(|base| base.id.clone());
                out.entry(image, arg, &inventory.encode_to_vec())?;
            }
            _ => copy_image(set, out, image, arg)?,
        }
    }
    if let Some(base) = base {
        out.link_parent(&base.dir)?;
    }
    for (id, runs) in pages {
        ensure!(!out.has(Image::Pages, id), "{}: two pagemaps name it", Image::Pages.file_name(id));
        if runs.is_empty() {
            out.data(Image::Pages, id, &[])?;
        }
        let mut packed: Option<(PagesFile, PackedFile)> = None;
        for run in runs {
            copy_run(set, out, id, &run, &mut packed)?;
            progress(run.len);
        }
    }
    Ok(())
}

/// Writes a pagemap; the number of its pages image, and what that is to hold.
fn pagemap(
    set: &ImageSet,
    base: Option<&Base>,
    out: &mut DirWriter,
    image: Image,
    arg: u64,
) -> anyhow::Result<Option<(u64, Vec<PageRun>)>> {
    let Some(head) = set.entries(image, arg).first() else {
        out.data(image, arg, &[])?;
        return Ok(None);
    };
    out.entry(image, arg, head)?;
    let id = set.pagemap(image, arg)?.0;
    let (mut entries, mut here) = (Vec::new(), Vec::new());
    for (run, shared) in set.runs_with_parent(image, arg)? {
        let further_back = base.is_some_and(|base| run.is_of(base.level));
        let entry = match (further_back, shared) {
            (true, _) => run.parent_entry(),
            (false, true) => run.parent_process_entry(),
            (false, false) => {
                here.push(run);
                run.pagemap_entry()
            }
        };
        chain::add_entry(&mut entries, entry);
    }
    for entry in entries {
        out.entry(image, arg, &entry.encode_to_vec())?;
    }
    Ok(Some((id, here)))
}

fn copy_run(
    set: &ImageSet,
    out: &mut DirWriter,
    id: u64,
    run: &PageRun,
    packed: &mut Option<(PagesFile, PackedFile)>,
) -> anyhow::Result<()> {
    if let Some(whole) = set.pages_in(run.file) {
        let place = Place { offset: whole.offset + run.offset, len: run.len, ..whole };
        return Ok(out.pages_copied(id, place)?);
    }
    if packed.as_ref().is_none_or(|(file, _)| *file != run.file) {
        let missing = || ImageError::Missing { file: Image::Pages.file_name(run.file.id) };
        *packed = Some((run.file, set.packed_in(run.file)?.ok_or_else(missing)?));
    }
    let Some((_, file)) = packed else { return Ok(()) };
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < run.len {
        let len = (run.len - done).min(1 << 20);
        buffer.resize(usize::try_from(len)?, 0);
        file.read_exact_at(&mut buffer, run.offset + done)?;
        out.data(Image::Pages, id, &buffer)?;
        done += len;
    }
    Ok(())
}

/// An image without pages, as it is.
fn copy_image(set: &ImageSet, out: &mut DirWriter, image: Image, arg: u64) -> anyhow::Result<()> {
    let entries = set.entries(image, arg);
    if image.payload() == Payload::Raw || entries.is_empty() {
        out.data(image, arg, &[])?;
        return contents(set, out, image, arg, 0);
    }
    for (index, entry) in entries.iter().enumerate() {
        out.entry(image, arg, entry)?;
        contents(set, out, image, arg, index)?;
    }
    Ok(())
}

fn contents(set: &ImageSet, out: &mut DirWriter, image: Image, arg: u64, index: usize) -> anyhow::Result<()> {
    let Some(place) = set.payload(image, arg, index) else { return Ok(()) };
    let name = || image.file_name(arg);
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < place.len {
        let want = usize::try_from(place.len - done).unwrap_or(usize::MAX).min(buffer.len());
        let at = i64::try_from(place.offset + done).with_context(name)?;
        let n = nix::sys::uio::pread(place.file, &mut buffer[..want], at).with_context(name)?;
        ensure!(n > 0, "{}: the file shrank while it was being read", name());
        out.data(image, arg, &buffer[..n])?;
        done += n as u64;
    }
    Ok(())
}
