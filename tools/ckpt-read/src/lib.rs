//! Reads an image directory, CRIU's or our own, as a checkpoint stream.
//!
//! All entries with their contents come first, then BULK, then the pages, which splice(2) moves straight
//! from the files. So every stage behind sees the whole checkpoint before the first page, and
//! `ckpt-restore` can place each page where it belongs as it comes. An increment becomes a full checkpoint:
//! its pages come from whichever directory of the chain has them (see [`ckpt_images::chain`]).

use std::{collections::BTreeMap, fs::File, os::fd::AsFd, path::PathBuf};

use anyhow::Context;
use ckpt_images::{ImageError, ImageSet, PageRun, Place, stage};
use ckpt_proto::{
    Image, Message, Payload,
    stream::Writer,
    types::{CoreEntry, Hello, InventoryEntry, PstreeEntry, core_entry::March},
};
use clap::{CommandFactory, Parser};
use nix::unistd::{SysconfVar, sysconf};

/// Reads an image directory as a checkpoint stream
///
/// The stream goes to standard output.
#[derive(Debug, Clone, Parser)]
#[command(name = "ckpt-read", version, after_help = EXAMPLES)]
pub struct Args {
    /// Directory made by ckpt-write or by CRIU
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-read checkpoint | sk-rewrite --connect 48213=/run/b.sock | ckpt-restore --detach
  ckpt-read checkpoint | zstd | ssh host 'zstd -d | ckpt-write checkpoint'";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Writes the directory's images to `output`.
///
/// # Errors
/// Then the stream has no end record.
pub fn run(args: &Args, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    stage::grow_pipe(output.as_fd());
    let set = ImageSet::from_chain(&args.dir).with_context(|| args.dir.display().to_string())?;
    // Pages of an increment are gathered from several files, whose checksums cover the whole of each.
    if set.is_increment() {
        set.verify_pages()?;
    }
    let (whole, gathered) = sources(&set)?;
    let mut out = Writer::open(output, hello(&set)?).context("write the stream")?;
    let images: Vec<_> = set.images().filter(|&(image, _)| image != Image::CkptManifest).collect();
    for &(image, arg) in images.iter().filter(|(image, _)| *image != Image::Pages) {
        if let Err(error) = write_image(&set, &mut out, image, arg) {
            let _ = out.abort(&ckpt_cli::reason("ckpt-read", &error));
            return Err(error);
        }
    }
    let empty = whole.iter().filter(|&&id| set.pages(id).is_none_or(|place| place.len == 0));
    for &id in empty.chain(gathered.iter().filter(|(_, runs)| runs.is_empty()).map(|(id, _)| id)) {
        out.data_header(Image::Pages.name(), id, 0).context("write the stream")?;
    }
    out.bulk().context("write the stream")?;
    let places: Vec<_> = whole.iter().filter_map(|&id| Some((id, set.pages(id)?))).collect();
    let total = places.iter().map(|(_, place)| place.len).sum::<u64>()
        + gathered.values().flatten().map(|run| run.len).sum::<u64>();
    let mut progress = ckpt_cli::Progress::new("reading", Some(total));
    for (id, place) in places {
        stage::write_pages(&mut out, id, place, set.pages_sum(id), |n| progress.inc(n))?;
    }
    for (&id, runs) in &gathered {
        stage::write_runs(&mut out, id, &set, runs, |n| progress.inc(n))?;
    }
    out.end().context("write the stream")?;
    Ok(())
}

/// Where pages come from: pages files to be written as they are, and those that are made of the pages of
/// a chain.
type Sources = (Vec<u64>, BTreeMap<u64, Vec<PageRun>>);

fn sources(set: &ImageSet) -> anyhow::Result<Sources> {
    let mut gathered = BTreeMap::new();
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image) {
            let runs = set.page_runs(image, arg)?;
            if runs.iter().any(|run| run.file.level > 0) {
                gathered.insert(set.pagemap(image, arg)?.0, runs);
            }
        }
    }
    let whole = set.args(Image::Pages).into_iter().filter(|id| !gathered.contains_key(id)).collect();
    Ok((whole, gathered))
}

/// Says what can be said without the tree.
fn hello(set: &ImageSet) -> anyhow::Result<Hello> {
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
    })
}

fn write_image(set: &ImageSet, out: &mut Writer<File>, image: Image, arg: u64) -> anyhow::Result<()> {
    let entries = set.entries(image, arg);
    if image.payload() == Payload::Raw {
        match set.payload(image, arg, 0) {
            Some(place) if place.len > 0 => return write_contents(out, image, arg, place),
            _ => return out.data_header(image.name(), arg, 0).context("write the stream"),
        }
    }
    if matches!(image, Image::Pagemap | Image::ShmemPagemap) && set.is_increment() {
        return write_pagemap(set, out, image, arg);
    }
    if image == Image::Inventory {
        // Whoever has this stream needs no parent.
        let mut inventory: InventoryEntry = set.one(image, arg)?;
        if inventory.ckpt_parent_id.take().is_some() {
            return out.entry(image, arg, &inventory.encode_to_vec()).context("write the stream");
        }
    }
    if entries.is_empty() {
        // The file is there all the same: contents of no length say so.
        return out.data_header(image.name(), arg, 0).context("write the stream");
    }
    for (index, entry) in entries.iter().enumerate() {
        out.entry(image, arg, entry).context("write the stream")?;
        if let Some(place) = set.payload(image, arg, index) {
            write_contents(out, image, arg, place)?;
        }
    }
    Ok(())
}

/// The pagemap of an increment, as that of a full checkpoint.
fn write_pagemap(set: &ImageSet, out: &mut Writer<File>, image: Image, arg: u64) -> anyhow::Result<()> {
    let failed = "write the stream";
    let head = set.entries(image, arg).first().with_context(|| image.file_name(arg))?;
    out.entry(image, arg, head).context(failed)?;
    let mut runs: Vec<PageRun> = Vec::new();
    for run in set.page_runs(image, arg)? {
        match runs.last_mut() {
            Some(last) if last.addr + last.len == run.addr && last.lazy == run.lazy => last.len += run.len,
            _ => runs.push(run),
        }
    }
    for run in runs {
        out.entry(image, arg, &run.pagemap_entry().encode_to_vec()).context(failed)?;
    }
    Ok(())
}

/// Contents that the stream's checksum covers, in frames of bounded size.
fn write_contents(out: &mut Writer<File>, image: Image, arg: u64, place: Place<'_>) -> anyhow::Result<()> {
    const FRAME: u64 = 1 << 20;
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < place.len {
        if done % FRAME == 0 {
            out.data_header(image.name(), arg, FRAME.min(place.len - done)).context("write the stream")?;
        }
        let left = (place.len - done).min(FRAME - done % FRAME);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let at = i64::try_from(place.offset + done)?;
        let n = nix::sys::uio::pread(place.file, &mut buffer[..want], at).map_err(|errno| {
            ImageError::Io { path: image.file_name(arg).into(), call: "pread", source: errno.into() }
        })?;
        if n == 0 {
            return Err(shrunk(&image.file_name(arg)));
        }
        out.data_bytes(&buffer[..n]).context("write the stream")?;
        done += n as u64;
    }
    Ok(())
}

fn shrunk(name: &str) -> anyhow::Error {
    let what = "the file shrank while it was being read".to_owned();
    ImageError::Stream { file: name.to_owned(), what }.into()
}
