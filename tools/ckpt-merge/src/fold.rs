//! A checkpoint with the pages that it had in others.
//!
//! Entries are those of the last directory. Of pages, the file is made by copy_file_range(2) from the
//! files that have them, so that a file system which can share room between files does so. The
//! checkpoint keeps its id: to those that are increments of it nothing has changed.
//!
//! What a process has stored with its parent process stays so if the result can say it: where the parent process still
//! has that page. Where it has written to it since, each child gets a page of its own.

use std::{
    fs::{self, File},
    num::NonZero,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, ensure};
use ckpt_images::{
    DirWriter, ImageError, ImageSet, PageRun, PagesFile, Place,
    chain::{self, PARENT},
    pack::{self, Codec, PackedFile},
};
use ckpt_proto::{Image, Message, Payload, types::InventoryEntry};
use ckpt_sys::Refused;

use crate::repeats::Repeats;

/// Blocks that a thread compresses before they are written.
const BLOCKS: usize = 4;

/// The checkpoint that the result is to be an increment of.
#[derive(Debug)]
pub struct Base {
    dir: PathBuf,
    /// How many links lead to it.
    level: usize,
    id: Option<Vec<u8>>,
    /// Pages that it has too, although they are stored in the younger ones.
    repeats: Repeats,
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
        Ok(Self { dir: wanted, level, id, repeats: Repeats::new() })
    }

    /// The parent of the checkpoint in `dir`, which has stored `repeats` again.
    ///
    /// # Errors
    /// It is not there.
    pub fn parent(dir: &Path, repeats: Repeats) -> anyhow::Result<Self> {
        let parent = dir.join(PARENT);
        let wanted = parent.canonicalize().with_context(|| parent.display().to_string())?;
        let id = ImageSet::id_of_dir(&wanted).with_context(|| parent.display().to_string())?;
        Ok(Self { dir: wanted, level: 1, id, repeats })
    }

    /// Whether it has the first pages of `run`, and how many these are: to which address.
    fn has(&self, image: Image, arg: u64, run: &PageRun) -> (bool, u64) {
        let end = run.addr + run.len;
        if run.is_of(self.level) {
            return (true, end);
        }
        let repeats = self.repeats.get(&(image, arg)).map_or(&[][..], Vec::as_slice);
        let next = repeats.partition_point(|range| range.end <= run.addr);
        match repeats.get(next) {
            Some(range) if range.start <= run.addr => (true, range.end.min(end)),
            Some(range) => (false, range.start.min(end)),
            None => (false, end),
        }
    }
}

/// Writes the set, all of it, to `out`, with its pages plain or compressed. `progress` is told of bytes of pages.
///
/// # Errors
/// The images', the directory's.
pub fn fold(
    set: &ImageSet,
    base: Option<&Base>,
    compress: Option<Codec>,
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
    let mut source = Pages::of(set);
    for (id, runs) in pages {
        ensure!(!out.has(Image::Pages, id), "{}: two pagemaps name it", Image::Pages.file_name(id));
        match compress {
            _ if runs.is_empty() => out.data(Image::Pages, id, &[])?,
            Some(codec) => source.pack(out, id, &runs, codec, progress)?,
            None => {
                for run in runs {
                    source.copy(out, id, &run)?;
                    progress(run.len);
                }
            }
        }
    }
    Ok(())
}

/// Takes over what else lies in `dir`, such as `stats-dump`, into the directory that is to have its place.
///
/// # Errors
/// The directories'.
pub fn keep_others(dir: &Path, out: &mut DirWriter) -> anyhow::Result<()> {
    let shown = || dir.display().to_string();
    for file in fs::read_dir(dir).with_context(shown)? {
        let file = file.with_context(shown)?;
        let is_image = file.file_name().to_str().is_some_and(|name| Image::parse_file_name(name).is_some());
        if !is_image && file.file_type().with_context(shown)?.is_file() {
            out.adopt(&file.path(), None)?;
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
    for (mut rest, shared) in set.runs_with_parent(image, arg)? {
        while rest.len > 0 {
            let (further_back, end) = base.map_or((false, u64::MAX), |base| base.has(image, arg, &rest));
            let run = rest.until(end);
            let entry = match (further_back, shared) {
                (true, _) => run.parent_entry(),
                (false, true) => run.parent_process_entry(),
                (false, false) => {
                    here.push(run);
                    run.pagemap_entry()
                }
            };
            chain::add_entry(&mut entries, entry);
            rest = rest.from(run.addr + run.len);
        }
    }
    for entry in entries {
        out.entry(image, arg, &entry.encode_to_vec())?;
    }
    Ok(Some((id, here)))
}

/// Reads pages of a set, from wherever they are.
pub(crate) struct Pages<'a> {
    set: &'a ImageSet,
    /// The compressed file that was read last.
    packed: Option<(PagesFile, PackedFile)>,
}

impl<'a> Pages<'a> {
    pub(crate) fn of(set: &'a ImageSet) -> Self {
        Self { set, packed: None }
    }

    /// Writes a run as it is.
    fn copy(&mut self, out: &mut DirWriter, id: u64, run: &PageRun) -> anyhow::Result<()> {
        if let Some(whole) = self.set.pages_in(run.file) {
            let place = Place { offset: whole.offset + run.offset, len: run.len, ..whole };
            return Ok(out.pages_copied(id, place)?);
        }
        let mut buffer = Vec::new();
        let mut done = 0;
        while done < run.len {
            buffer.resize(usize::try_from((run.len - done).min(1 << 20))?, 0);
            self.read(run, done, &mut buffer)?;
            out.data(Image::Pages, id, &buffer)?;
            done += buffer.len() as u64;
        }
        Ok(())
    }

    /// Fills `buffer` with what is `skip` bytes behind the beginning of `run`.
    pub(crate) fn read(&mut self, run: &PageRun, skip: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
        let name = || Image::Pages.file_name(run.file.id);
        if let Some(whole) = self.set.pages_in(run.file) {
            let file = File::from(whole.file.try_clone_to_owned().with_context(name)?);
            return file.read_exact_at(buffer, whole.offset + run.offset + skip).with_context(name);
        }
        if self.packed.as_ref().is_none_or(|(file, _)| *file != run.file) {
            let missing = || ImageError::Missing { file: name() };
            self.packed = Some((run.file, self.set.packed_in(run.file)?.ok_or_else(missing)?));
        }
        let Some((_, file)) = &mut self.packed else { return Ok(()) };
        Ok(file.read_exact_at(buffer, run.offset + skip)?)
    }

    /// Writes runs compressed, as many blocks at a time as there are processors.
    fn pack(
        &mut self,
        out: &mut DirWriter,
        id: u64,
        runs: &[PageRun],
        codec: Codec,
        progress: &mut dyn FnMut(u64),
    ) -> anyhow::Result<()> {
        let workers = thread::available_parallelism().map_or(1, NonZero::get);
        let most = workers * BLOCKS * pack::PLAIN;
        let mut plain: Vec<u8> = Vec::with_capacity(most);
        for run in runs {
            let mut done = 0;
            while done < run.len {
                let at = plain.len();
                plain.resize(most.min(at + usize::try_from(run.len - done)?), 0);
                self.read(run, done, &mut plain[at..])?;
                done += (plain.len() - at) as u64;
                if plain.len() == most {
                    write_packed(out, id, &plain, codec)?;
                    progress(plain.len() as u64);
                    plain.clear();
                }
            }
        }
        write_packed(out, id, &plain, codec)?;
        progress(plain.len() as u64);
        Ok(())
    }
}

/// Compresses blocks, [`BLOCKS`] in each thread, and writes them in their order.
fn write_packed(out: &mut DirWriter, id: u64, plain: &[u8], codec: Codec) -> anyhow::Result<()> {
    let pack_all = |part: &[u8]| part.chunks(pack::PLAIN).map(|block| pack::pack(codec, block)).collect();
    let blocks: Vec<Vec<u8>> = thread::scope(|scope| {
        let parts = plain.chunks(BLOCKS * pack::PLAIN);
        let threads: Vec<_> =
            parts.map(|part| scope.spawn(move || -> Vec<Vec<u8>> { pack_all(part) })).collect();
        let joined = threads.into_iter().map(|thread| thread.join().ok().context("a thread has panicked"));
        joined.collect::<anyhow::Result<Vec<_>>>().map(|parts| parts.into_iter().flatten().collect())
    })?;
    blocks.iter().try_for_each(|block| Ok(out.data(Image::CkptPages, id, block)?))
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
