//! Writes a checkpoint stream to an image directory, atomically and durably.
//!
//! The directory is made beside its final name and renamed into place when the stream's end record
//! has come, everything in it adds up and is on disk; only then does `ckpt-scan` hear COMMIT. Until
//! then nothing is visible, and on any failure nothing stays (see [`ckpt_images::DirWriter`]).
//!
//! What makes a stream a restorable checkpoint is checked here, since here is the last chance while the
//! target lives: nothing lacking, no socket left unread by `ckpt-sk`, all pages there that the
//! pagemaps name.
//!
//! Pages that come compressed are kept so; --compress compresses those that come plain.
//!
//! A directory that is made of a live tree gets CRIU's `stats-dump` too, as CRIU would leave it there. The times
//! in it are those known when everything else is written: how long the tree has been stopped, `ckpt-scan` is asked for.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use ckpt_cli::stats;
use ckpt_hold::{Hold, HoldError, PipeId};
use ckpt_images::{
    Cleanup, DirWriter, ImageError, ImageSet, chain,
    pack::{self, Codec},
    recode::{self, Recode},
    service, stage,
};
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Facts, Frame, Reader},
    types::{DumpStatsEntry, FileEntry, Hello, InventoryEntry, PagemapEntry, PagemapHead, StatsEntry},
};
use ckpt_sys::Refused;
use clap::{CommandFactory, Parser};

/// Writes a checkpoint stream to an image directory
///
/// The stream comes on standard input. DIR appears complete or not at all; one that
/// exists is left alone.
#[derive(Debug, Clone, Parser)]
#[command(name = "ckpt-write", version, after_help = EXAMPLES)]
pub struct Args {
    /// Directory to make
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Codec>,
    /// Directory of the checkpoint that the stream is an increment of
    #[arg(long, value_name = "DIR")]
    pub parent: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-scan -t 4711 | ckpt-write /var/tmp/checkpoint
  ssh host ckpt-read checkpoint | sk-rewrite --close 48213 | ckpt-write copy";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Writes the stream from `input` to the directory. Being told to end removes what has been begun.
///
/// # Errors
/// Then there is no directory.
pub fn run(args: &Args, input: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&input, "standard input")?;
    args.stats.begin();
    store(args, input, |cleanup| ckpt_cli::on_termination(move || cleanup.remove()).context("start a thread"))
}

/// The same as a part of a larger program, which is told how to remove what is begun.
///
/// # Errors
/// As [`run`], and those of `begun`.
pub fn store(
    args: &Args,
    input: File,
    begun: impl FnOnce(Cleanup) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    stats::phase("entries");
    stage::grow_pipe(input.as_fd());
    let pipe = PipeId::of(input.as_fd());
    let (mut reader, mut hello) = Reader::open(input)?;
    if let Some(codec) = args.compress {
        (reader, hello) = recode::before(reader, hello, Recode::Pack(codec))?;
    }
    let mut hold = take_hold(&hello);
    // What is compressed goes through a pipe of our own.
    let pipe = pipe.filter(|_| args.compress.is_none());
    match write(args, &mut reader, &hello, hold.as_mut().map(|hold| (hold, pipe)), begun) {
        Ok(()) => {
            if let Some(Err(error)) = hold.map(Hold::commit) {
                let error = ckpt_cli::describe(&error.into());
                ckpt_cli::warn(&format!("{} is written, but: {error}", args.dir.display()));
            }
            args.stats.write()
        }
        Err(error) => {
            if let Some(hold) = hold {
                hold.fail(&ckpt_cli::reason("ckpt-write", &error));
            }
            Err(error)
        }
    }
}

/// A hold on the tree behind the stream, if there still is one.
fn take_hold(hello: &Hello) -> Option<Hold> {
    match Hold::take(hello.control.as_deref()?, "write") {
        Ok(hold) => Some(hold),
        // A stream that was kept in a file has outlived its tree.
        Err(HoldError::Gone) => {
            ckpt_cli::note!(2, "the tree that this stream was made of is not held any more");
            None
        }
        Err(error) => {
            let error = ckpt_cli::describe(&error.into());
            ckpt_cli::warn(&format!("{error}; ckpt-scan will not be told when the images are safe"));
            None
        }
    }
}

/// `hold`: on the tree, if it is still held. Then the stream comes through pipes from a process on this machine that has just
/// computed the checksums. With it, the pipe that is read.
fn write(
    args: &Args,
    reader: &mut Reader<File>,
    hello: &Hello,
    hold: Option<(&mut Hold, Option<PipeId>)>,
    begun: impl FnOnce(Cleanup) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    complete(hello)?;
    let mut dir = DirWriter::create(&args.dir)?;
    begun(dir.cleanup())?;
    let mut hold = hold.map(|(hold, pipe)| {
        dir.trust_checksums();
        if let (Some(pipe), Ok(directory)) = (pipe, dir.share_directory())
            && hold.takes(pipe, directory.as_fd())
        {
            reader.takes_placed();
        }
        hold
    });
    let mut audit = Audit::default();
    let mut progress = ckpt_cli::Progress::new("writing", None);
    let mut zero = 0;
    let mut pages_since = None;
    let (mut taken, mut told, mut placed) = (0, 0, 0);
    while let Some(frame) = reader.next_frame()? {
        match frame {
            Frame::Hello(_) => {}
            Frame::Bulk => {
                stats::phase("pages");
                pages_since = Some(Instant::now());
            }
            Frame::Entry { image, arg, .. } => {
                let image = known(&image)?;
                let message = reader.payload(u64::from(MAX_MESSAGE))?;
                dir.entry(image, arg, &message)?;
                if image == Image::Inventory {
                    audit.increment = link_parent(args, &dir, &message)?;
                    audit.pre_dump = InventoryEntry::decode(&message[..])?.ckpt_pre_dump();
                }
                audit.entry(image, arg, &message)?;
            }
            Frame::Placed { arg, at, len, facts } => {
                zero += facts.zero_pages();
                dir.pages_placed(arg, at, len, &facts)?;
                taken += len;
                placed += len;
                progress.inc(len);
            }
            Frame::Data { image, arg, len, sum, zeros } => {
                let image = known(&image)?;
                if len == 0 {
                    dir.data(image, arg, &[])?;
                } else if image == Image::CkptPages {
                    let block = reader.payload((pack::HEADER + pack::MAX_PLAIN) as u64)?;
                    let plain = pack::check_block(&block, arg)?;
                    dir.data(image, arg, &block)?;
                    audit.packed(arg, plain);
                    progress.inc(plain);
                } else if let Some(input) = reader.bulk_input() {
                    let facts = Facts { sum, zeros };
                    zero += facts.zero_pages();
                    let moved = dir.pages_from(arg, input.as_fd(), len, &facts)?;
                    reader.moved(moved);
                    if moved < len {
                        return Err(reader.ended_in_bulk().into());
                    }
                    taken += moved;
                    if let (Some(hold), true) = (&mut hold, taken - told >= TELL) {
                        hold.took(taken);
                        told = taken;
                    }
                    progress.inc(moved);
                } else {
                    contents(reader, &mut dir, image, arg)?;
                }
            }
        }
    }
    audit.end(&dir, u64::from(hello.page_size))?;
    let (private, shared) = (audit.count(Image::Pagemap), audit.count(Image::ShmemPagemap));
    stats::count("pages", "written", private.here.saturating_add(shared.here));
    stats::count("pages", "zero", zero);
    stats::count("pages", "placed", placed / 4096);
    stats::count("pages", "in_parent", private.in_parent.saturating_add(shared.in_parent));
    if let Some(hold) = hold {
        let moving = pages_since.map(|since| since.elapsed()).unwrap_or_default();
        let dump = Some(dump_stats(hold, moving, private, shared));
        let entry = StatsEntry { dump, restore: None };
        dir.beside(service::DUMP, &service::contents(&entry).context(service::DUMP)?)?;
    }
    stats::count("bytes", "images", dir.size());
    stats::phase("sync");
    dir.finish()?;
    ckpt_cli::note!(1, "{} is complete", args.dir.display());
    Ok(())
}

/// What CRIU would say of this dump. Pages are read and written at the same time, so both take what `moving` them took.
fn dump_stats(hold: &mut Hold, moving: Duration, private: Pages, shared: Pages) -> DumpStatsEntry {
    // A tree of which nobody knows is no reason to fail: whether it is still held is asked at the end.
    let times = hold.times().ok().flatten();
    DumpStatsEntry {
        freezing_time: times.map_or(0, |times| service::micros(times.freezing)),
        frozen_time: times.map_or(0, |times| service::micros(times.frozen)),
        memdump_time: service::micros(moving),
        memwrite_time: service::micros(moving),
        pages_scanned: private.here.saturating_add(private.in_parent),
        pages_skipped_parent: private.in_parent,
        pages_written: private.here,
        shpages_scanned: Some(shared.here.saturating_add(shared.in_parent)),
        shpages_skipped_parent: Some(shared.in_parent),
        shpages_written: Some(shared.here),
        ..DumpStatsEntry::default()
    }
}

/// Makes the link to the parent that an increment names; whether it is one.
fn link_parent(args: &Args, dir: &DirWriter, inventory: &[u8]) -> anyhow::Result<bool> {
    let Some(id) = InventoryEntry::decode(inventory)?.ckpt_parent_id else { return Ok(false) };
    let Some(parent) = &args.parent else {
        let why = "it is an increment, and useless without the checkpoint before";
        return Err(Refused::new("stream", why)
            .advise("name that one's directory: ckpt-write --parent DIR")
            .into());
    };
    let found = ImageSet::id_of_dir(parent).with_context(|| parent.display().to_string())?;
    if found.as_ref() != Some(&id) {
        let why = "is not the checkpoint that this stream is an increment of";
        return Err(Refused::new(parent.display().to_string(), why).into());
    }
    dir.link_parent(parent)?;
    Ok(true)
}

/// Refuses a stream that some stage should have completed.
fn complete(hello: &Hello) -> Result<(), Refused> {
    let Some(lack) = hello.lacks.first() else { return Ok(()) };
    let (what, advice) = match lack.as_str() {
        "mem" => {
            ("the contents of memory", "put ckpt-mem before ckpt-write, or leave out ckpt-scan --no-mem")
        }
        "sk" => ("what is inside its sockets", "put ckpt-sk before ckpt-write"),
        _ => ("a part that this release does not know", "use tools of one release in a pipeline"),
    };
    Err(Refused::new("stream", format!("it still lacks {what} ({lack:?})")).advise(advice))
}

/// After how many bytes of pages the holder is told that they have been read: few enough that it need not wait.
const TELL: u64 = 1 << 20;

fn known(name: &str) -> Result<Image, ImageError> {
    Image::by_name(name).ok_or_else(|| ImageError::Stream {
        file: "stream".to_owned(),
        what: format!("images of kind {name:?} are unknown to this release"),
    })
}

/// Contents that the stream's checksum covers: through memory, in small pieces.
fn contents(reader: &mut Reader<File>, dir: &mut DirWriter, image: Image, arg: u64) -> anyhow::Result<()> {
    struct Out<'a>(&'a mut DirWriter, Image, u64, Option<ImageError>);
    impl std::io::Write for Out<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.data(self.1, self.2, bytes).map_err(|error| {
                self.3 = Some(error);
                std::io::Error::other("directory")
            })?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut out = Out(dir, image, arg, None);
    let copied = reader.copy_payload(&mut out);
    match out.3 {
        Some(error) => Err(error.into()),
        None => copied.map(drop).map_err(Into::into),
    }
}

/// How many pages a pagemap names.
#[derive(Debug, Default, Clone, Copy)]
struct Pages {
    here: u64,
    in_parent: u64,
}

/// Does it all add up?
#[derive(Debug, Default)]
struct Audit {
    /// Some pages may be in the parent.
    increment: bool,
    /// It holds memory, and nothing else that a checkpoint must have.
    pre_dump: bool,
    /// Pages id of each pagemap, and how many pages it says there are.
    pagemaps: BTreeMap<(Image, u64), (u64, Pages)>,
    /// Bytes of pages in compressed images.
    packed: BTreeMap<u64, u64>,
}

impl Audit {
    fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> anyhow::Result<()> {
        match image {
            Image::Files => {
                let file = FileEntry::decode(message)?;
                if let Some(stub) = file.ckpt_stub {
                    let subject = format!("pid {} fd {}: socket:[{}]", stub.pid, stub.fd, stub.ino);
                    return Err(Refused::new(subject, "what is inside this socket has not been read")
                        .advise("put ckpt-sk before ckpt-write")
                        .into());
                }
            }
            Image::Pagemap | Image::ShmemPagemap => match self.pagemaps.get_mut(&(image, arg)) {
                None => {
                    let id = u64::from(PagemapHead::decode(message)?.pages_id);
                    self.pagemaps.insert((image, arg), (id, Pages::default()));
                }
                Some((_, pages)) => {
                    let entry = PagemapEntry::decode(message)?;
                    let (here, in_parent) = split(&entry);
                    if in_parent && !self.increment {
                        let what = format!("pages at {:#x} are in a parent that nobody names", entry.vaddr);
                        return Err(ImageError::Stream { file: image.file_name(arg), what }.into());
                    }
                    pages.here = pages.here.saturating_add(here);
                    if in_parent {
                        pages.in_parent = pages.in_parent.saturating_add(chain::pages_of(&entry));
                    }
                }
            },
            _ => {}
        }
        Ok(())
    }

    fn packed(&mut self, id: u64, plain: u64) {
        let sum = self.packed.entry(id).or_default();
        *sum = sum.saturating_add(plain);
    }

    /// Pages of all pagemaps of one kind.
    fn count(&self, kind: Image) -> Pages {
        let of_kind = self.pagemaps.iter().filter(|((image, _), _)| *image == kind);
        of_kind.fold(Pages::default(), |sum, (_, (_, pages))| Pages {
            here: sum.here.saturating_add(pages.here),
            in_parent: sum.in_parent.saturating_add(pages.in_parent),
        })
    }

    fn end(&self, dir: &DirWriter, page_size: u64) -> Result<(), ImageError> {
        let required = [Image::Inventory, Image::Pstree];
        for image in required.into_iter().filter(|image| !(self.pre_dump && *image == Image::Pstree)) {
            if !dir.has(image, 0) {
                return Err(ImageError::Missing { file: image.file_name(0) });
            }
        }
        let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
        for &(id, pages) in self.pagemaps.values() {
            let bytes = expected.entry(id).or_default();
            *bytes = bytes.saturating_add(pages.here.saturating_mul(page_size));
        }
        for (id, bytes) in expected {
            let packed = self.packed.get(&id).copied();
            let plain = dir.pages_len(id).filter(|&len| len > 0);
            if let (Some(_), Some(plain)) = (packed, plain) {
                let what = format!("{plain} bytes of plain pages beside compressed ones");
                return Err(ImageError::Stream { file: Image::CkptPages.file_name(id), what });
            }
            let there = packed.or(plain).unwrap_or(0);
            if there != bytes {
                let what = format!("{there} bytes of pages came, the pagemaps name {bytes}");
                return Err(ImageError::Stream { file: Image::Pages.file_name(id), what });
            }
        }
        Ok(())
    }
}

/// How many pages of this run lie in the pages image, and whether others are in a parent.
fn split(run: &PagemapEntry) -> (u64, bool) {
    const PARENT: u32 = 1;
    const PRESENT: u32 = 4;
    let flags = chain::flags_of(run);
    if flags & PRESENT != 0 { (chain::pages_of(run), false) } else { (0, flags & PARENT != 0) }
}
