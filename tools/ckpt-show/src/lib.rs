//! Prints checkpoints: a stream, a directory, or one image file.
//!
//! - [`document`]: everything, as JSON (`ckpt-encode` is the inverse, so `jq` can be a stage)
//! - [`model`] and [`draw`]: the process tree and who talks to whom, as text, Graphviz or SVG
//!
//! Nothing is printed of a stream before its end record has been seen.

pub mod document;
pub mod draw;
pub mod json;
pub mod model;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, IsTerminal, Read, Seek, Write},
    os::{fd::AsFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_images::{ImageSet, chain, pack};
use ckpt_proto::{Image, stream::Frame};
use ckpt_sys::transfer::transfer;
use clap::{CommandFactory, Parser};

/// Prints checkpoint images and streams
///
/// Prints a stream (from standard input or a file), an image directory or a single
/// image file: as JSON, or as a tree if standard output is a terminal.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "ckpt-show", version, after_help = EXAMPLES)]
pub struct Args {
    /// Image directory, image file or file with a stream; a stream from standard input if left out
    #[arg(value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// Everything as one JSON document
    #[arg(long, group = "as")]
    pub json: bool,
    /// The process tree, with threads and descriptors
    #[arg(long, group = "as")]
    pub tree: bool,
    /// The process tree and its connections for Graphviz
    #[arg(long, group = "as")]
    pub dot: bool,
    /// The same as a drawing
    #[arg(long, group = "as")]
    pub svg: bool,
    /// Check every file of the directory and of all that it is an increment of, pages too
    #[arg(long, group = "as", requires = "path")]
    pub verify: bool,
    /// Print raw contents up to this many bytes, of larger ones only the size
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    pub payload_limit: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-show checkpoint | jq '.images[] | select(.image == \"MM\").entries[].vmas | length'
  ckpt-show --svg checkpoint > checkpoint.svg
  ckpt-show checkpoint | jq '...' | ckpt-encode --pages-from checkpoint | ckpt-restore";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Prints what `args` say to `output`. Nobody reading it to its end is fine.
///
/// # Errors
/// The images can't be read.
pub fn run(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    match show(args, input, output) {
        Err(error) if ckpt_cli::is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

/// How a checkpoint is printed.
enum Form {
    Json,
    Tree,
    Dot,
    Svg,
}

fn show(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    if let (true, Some(path)) = (args.verify, &args.path) {
        return verify(path, output);
    }
    let source = open(args.path.as_deref(), input)?;
    let form = match (args.json, args.tree, args.dot, args.svg) {
        (true, ..) => Form::Json,
        (_, true, ..) => Form::Tree,
        (_, _, true, _) => Form::Dot,
        (.., true) => Form::Svg,
        _ if output.is_terminal() && !matches!(source, Source::Image { .. }) => Form::Tree,
        _ => Form::Json,
    };
    let (set, pages) = read(source)?;
    let mut out = BufWriter::new(output);
    match form {
        Form::Json => {
            let limits = document::Limits { payload: args.payload_limit };
            document::write(&set, &pages, limits, &mut out)?;
        }
        Form::Tree => out.write_all(draw::tree(&model::Model::new(&set)?).as_bytes())?,
        Form::Dot => out.write_all(draw::dot(&model::Model::new(&set)?).as_bytes())?,
        Form::Svg => out.write_all(draw::svg(&model::Model::new(&set)?).as_bytes())?,
    }
    out.flush()?;
    Ok(())
}

/// Reads everything in the directory and in those before it, the last first, and says of each that it is good.
fn verify(path: &Path, mut output: File) -> anyhow::Result<()> {
    if !path.is_dir() {
        let text = format!("{} is no directory: --verify looks at whole checkpoints", path.display());
        return Err(ckpt_cli::UsageError(text).into());
    }
    let chain = chain::ancestry(path)?;
    ImageSet::from_chain(path).with_context(|| path.display().to_string())?;
    for dir in chain {
        let shown = || dir.display().to_string();
        let set = ImageSet::from_dir(&dir).with_context(shown)?;
        set.verify_pages().with_context(shown)?;
        let mut pages: u64 =
            set.args(Image::Pages).iter().filter_map(|&id| set.pages(id)).map(|p| p.len).sum();
        for id in set.args(Image::CkptPages) {
            let Some(packed) = set.packed(id).with_context(shown)? else { continue };
            packed.for_each_block(|block, plain| {
                pages += plain;
                pack::unpack(block, id).map(drop)
            })?;
        }
        let files = set.images().count();
        let how = match set.entries(Image::CkptManifest, 0) {
            [] => "well-formed, and without checksums",
            _ => "good",
        };
        writeln!(output, "{}: {files} images, {pages} bytes of pages: {how}", dir.display())?;
    }
    Ok(())
}

/// What is to be shown.
enum Source {
    Directory(PathBuf),
    Image { path: PathBuf, image: Image, arg: u64, file: File },
    Stream(File),
}

fn open(path: Option<&Path>, input: File) -> anyhow::Result<Source> {
    let Some(path) = path else {
        ckpt_cli::not_a_terminal(&input, "standard input")?;
        return Ok(Source::Stream(input));
    };
    let shown = || path.display().to_string();
    if path.is_dir() {
        return Ok(Source::Directory(path.to_owned()));
    }
    let mut file = File::open(path).with_context(shown)?;
    let kind = file.metadata().with_context(shown)?.file_type();
    if kind.is_fifo() {
        return Ok(Source::Stream(file));
    }
    let mut magic = [0; 8];
    if file.read_exact(&mut magic).is_ok() && magic[..7] == ckpt_proto::stream::MAGIC[..7] {
        file.rewind().with_context(shown)?;
        return Ok(Source::Stream(file));
    }
    file.rewind().with_context(shown)?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match Image::parse_file_name(name) {
        Some((image, arg)) => Ok(Source::Image { path: path.to_owned(), image, arg, file }),
        None => bail!(ckpt_cli::UsageError(format!(
            "{}: neither a directory nor a stream, and no image has such a name",
            path.display()
        ))),
    }
}

/// Everything, and the sizes of the pages images.
fn read(source: Source) -> anyhow::Result<(ImageSet, BTreeMap<u64, u64>)> {
    let mut pages = BTreeMap::new();
    let set = match source {
        Source::Directory(path) => ImageSet::from_dir(&path).with_context(|| path.display().to_string())?,
        Source::Image { path, image, arg, file } => {
            ImageSet::from_file(image, arg, file).with_context(|| path.display().to_string())?
        }
        Source::Stream(input) => {
            ckpt_images::stage::grow_pipe(input.as_fd());
            let mut set = ImageSet::from_stream(input)?;
            if let Some(mut bulk) = set.take_bulk() {
                let null = File::options().write(true).open("/dev/null").context("/dev/null")?;
                while let Some(frame) = bulk.next_frame()? {
                    let Frame::Data { arg, len, .. } = frame else { continue };
                    let sum = pages.entry(arg).or_insert(0u64);
                    *sum = sum.saturating_add(len);
                    if let Some(input) = bulk.bulk_input() {
                        let moved = transfer(input.as_fd(), null.as_fd(), len)?;
                        bulk.moved(moved);
                        if moved < len {
                            return Err(bulk.ended_in_bulk().into());
                        }
                    }
                }
            }
            set
        }
    };
    for id in set.args(Image::Pages) {
        let sum = pages.entry(id).or_insert(0);
        *sum += set.pages(id).map_or(0, |place| place.len);
    }
    Ok((set, pages))
}
