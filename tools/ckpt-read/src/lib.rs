//! Reads an image directory, CRIU's or our own, as a checkpoint stream.
//!
//! All entries with their contents come first, then BULK, then the pages, which splice(2) moves straight
//! from the files. So every stage behind sees the whole checkpoint before the first page, and
//! `ckpt-restore` can place each page where it belongs as it comes.

use std::{fs::File, os::fd::AsFd, path::PathBuf};

use anyhow::Context;
use ckpt_images::{ImageError, ImageSet, Place, stage};
use ckpt_proto::{
    Image, Payload,
    stream::Writer,
    types::{CoreEntry, Hello, PstreeEntry, core_entry::March},
};
use ckpt_sys::Refused;
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
    let set = ImageSet::from_dir(&args.dir).with_context(|| args.dir.display().to_string())?;
    refuse_increment(&set).with_context(|| args.dir.display().to_string())?;
    let mut out = Writer::open(output, hello(&set)?).context("write the stream")?;
    let images: Vec<_> = set.images().filter(|&(image, _)| image != Image::CkptManifest).collect();
    for &(image, arg) in images.iter().filter(|(image, _)| *image != Image::Pages) {
        if let Err(error) = write_image(&set, &mut out, image, arg) {
            let _ = out.abort(&ckpt_cli::reason("ckpt-read", &error));
            return Err(error);
        }
    }
    let pages: Vec<u64> = set.args(Image::Pages);
    for &id in pages.iter().filter(|&&id| set.pages(id).is_none_or(|place| place.len == 0)) {
        out.data_header(Image::Pages.name(), id, 0).context("write the stream")?;
    }
    out.bulk().context("write the stream")?;
    let places: Vec<_> = pages.iter().filter_map(|&id| Some((id, set.pages(id)?))).collect();
    let mut progress =
        ckpt_cli::Progress::new("reading", Some(places.iter().map(|(_, place)| place.len).sum()));
    for (id, place) in places {
        stage::write_pages(&mut out, id, place, set.pages_sum(id), |n| progress.inc(n))?;
    }
    out.end().context("write the stream")?;
    Ok(())
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

/// An increment is no checkpoint without its parents.
fn refuse_increment(set: &ImageSet) -> anyhow::Result<()> {
    for image in [Image::Pagemap, Image::ShmemPagemap] {
        for arg in set.args(image) {
            let (_, runs) = set.pagemap(image, arg)?;
            let in_parent = runs
                .iter()
                .any(|run| run.in_parent.unwrap_or(false) || run.flags.is_some_and(|flags| flags & 1 != 0));
            if in_parent {
                let reason =
                    "some pages are in the parent directory of an incremental chain, which can't be read yet";
                return Err(Refused::new(image.file_name(arg), reason).into());
            }
        }
    }
    Ok(())
}

fn write_image(set: &ImageSet, out: &mut Writer<File>, image: Image, arg: u64) -> anyhow::Result<()> {
    let entries = set.entries(image, arg);
    if image.payload() == Payload::Raw {
        match set.payload(image, arg, 0) {
            Some(place) if place.len > 0 => return write_contents(out, image, arg, place),
            _ => return out.data_header(image.name(), arg, 0).context("write the stream"),
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
