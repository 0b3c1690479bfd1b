//! `ckpt-mem`: adds the contents of private memory to a stream that `ckpt-scan --no-mem` made.
//!
//! It reads the live tree, so it takes a hold: `ckpt-scan` keeps the tree frozen until the hold is
//! released. Address spaces pass by as MM entries; their pages are found and copied when all other
//! frames have passed, so that pages come last, as everybody behind expects.
//!
//! What is stored, and when the tree may go on, is the same code as in `ckpt-scan` (`ckpt-pages`). What only the
//! tracer can do - make a userfaultfd in a new process, fork one - is asked of `ckpt-scan` over the hold.
//! That the tree runs and that its copies are done with are two things: a snapshot has a hold of its own.

use std::{cell::RefCell, collections::HashMap, fs, fs::File, path::PathBuf, rc::Rc};

use anyhow::{Context, bail};
use ckpt_cli::stats;
use ckpt_hold::Hold;
use ckpt_images::recode::{self, Behind, Codec, Recode};
use ckpt_pages::{Memory, Private, Tracking, snapshot};
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Frame, Reader, Writer, forward},
    types::{CoreEntry, InventoryEntry, MmEntry, PagemapHead, PstreeEntry},
};
use ckpt_sys::{Pid, Refused, transfer::Output};
use clap::{CommandFactory, Parser};

/// Add page contents to a checkpoint stream
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-mem",
    version,
    after_help = "\
Examples:
  ckpt-scan -t 4711 --no-mem | ckpt-mem | ckpt-sk | ckpt-write /var/ckpt/1
  ckpt-scan -t 4711 --no-mem | ckpt-mem --snapshot | ckpt-sk | ckpt-write /var/ckpt/2
  ckpt-scan -t 4711 --no-mem | ckpt-mem --track ckpt-track-4711 | ckpt-sk | ckpt-write 1

Reads a stream on standard input, writes it with pages to standard output."
)]
pub struct Args {
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Codec>,
    /// Let the tree run on as soon as its memory has been forked, and read pages from the copy
    #[arg(long)]
    pub snapshot: bool,
    /// Track writes with the ckpt-track at ADDRESS, so that the next checkpoint can be an increment
    #[arg(long, value_name = "ADDRESS")]
    pub track: Option<String>,
    /// Store only what has been written since the checkpoint in DIR
    #[arg(long, value_name = "DIR", requires = "track")]
    pub parent: Option<PathBuf>,
    /// Store pages that forked processes share once; CRIU can't restore such images
    #[arg(long)]
    pub share: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

/// The command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs the tool on `input` and `output`.
///
/// # Errors
/// A bad stream; a stream without a live tree behind it; what reading memory meets.
pub fn run(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&input, "standard input")?;
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    args.stats.begin();
    stats::phase("entries");
    let (mut reader, mut hello) = Reader::open(input).context("standard input")?;
    if !hello.lacks.iter().any(|l| l == "mem") {
        bail!("this stream has its pages already: ckpt-mem belongs behind ckpt-scan --no-mem");
    }
    let Some(control) = hello.control.clone() else {
        bail!("no live tree stands behind this stream, so its memory can't be read");
    };
    let hold = Hold::take(&control, "mem")?;
    let copies = args.snapshot.then(|| Hold::take(&control, "snapshot")).transpose()?;
    hello.lacks.retain(|l| l != "mem");
    let (output, behind) = match args.compress {
        Some(codec) => recode::behind(output, Recode::Pack(codec))?,
        None => (output, Behind::default()),
    };
    let mut writer = Writer::open(Output::new(output), hello).context("write the stream")?;
    let mut tree = Tree { hold: Some(hold), copies: copies.map(|hold| Rc::new(RefCell::new(hold))) };
    match add_pages(args, &mut reader, &mut writer, &mut tree) {
        Ok(tracking) => {
            ckpt_pages::count(&writer);
            drop(writer.end().context("write the stream")?);
            behind.finish()?;
            tree.done(tracking)?;
            args.stats.write()
        }
        Err(error) => {
            let reason = ckpt_cli::reason("ckpt-mem", &error);
            tree.fail(&reason);
            let _ = writer.abort(&reason);
            Err(error)
        }
    }
}

/// Passes everything on and adds the pages; the tracking that took part.
fn add_pages(
    args: &Args,
    reader: &mut Reader<File>,
    writer: &mut Writer<Output>,
    tree: &mut Tree,
) -> anyhow::Result<Tracking> {
    let mut memory = Memory { once: args.share, ..Memory::default() };
    let mut parents: HashMap<u32, u32> = HashMap::new();
    let mut tracking = None;
    let mut pages_id = 0;
    let mut faulting = false;
    while let Some(frame) = reader.next_frame().context("standard input")? {
        if let Frame::Entry { image, arg, .. } = &frame {
            let mut message = reader.payload(u64::from(MAX_MESSAGE)).context("standard input")?;
            if image == Image::Mm.name() {
                let mm = MmEntry::decode(&message[..]).with_context(|| Image::Mm.file_name(*arg))?;
                let pid = Pid(i32::try_from(*arg).with_context(|| format!("pid {arg}"))?);
                let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                memory.private.push(Private {
                    pid,
                    ppid: Pid(0),
                    comm: comm.trim_end().to_owned(),
                    vmas: mm.vmas,
                    watched: Vec::new(),
                    pages_id: 0,
                    faulting: std::mem::take(&mut faulting),
                });
            } else if image == Image::Core.name() {
                // Threads come before their process.
                let core = CoreEntry::decode(&message[..]).with_context(|| Image::Core.file_name(*arg))?;
                faulting |= core.thread_info.is_some_and(|info| info.gpregs.orig_ax.cast_signed() < 0);
            } else if image == Image::Inventory.name() {
                tracking = Some(begin(args, &mut message)?);
            } else if image == Image::Pstree.name() {
                let entry = PstreeEntry::decode(&message[..]).context("pstree.img")?;
                parents.insert(entry.pid, entry.ppid);
            } else if image == Image::ShmemPagemap.name()
                && let Ok(head) = PagemapHead::decode(&message[..])
            {
                pages_id = pages_id.max(head.pages_id);
            } else if image == Image::Pagemap.name() {
                bail!("{}: the stream has pages already", Image::Pagemap.file_name(*arg));
            }
            writer.entry_named(image, *arg, &message).context("write the stream")?;
        } else {
            forward(reader, &frame, writer)?;
        }
    }
    let mut tracking = tracking.context("the stream has no inventory")?;
    for p in &mut memory.private {
        pages_id += 1;
        p.pages_id = pages_id;
        let parent = parents.get(&p.pid.0.unsigned_abs()).copied().unwrap_or(0);
        p.ppid = Pid(i32::try_from(parent)?);
        tree.track(p, &mut tracking)?;
    }
    stats::phase("pages");
    if args.snapshot {
        snapshot::copy(tree, &memory, &tracking, writer)?;
    } else {
        memory.copy(&tracking, false, writer, || Ok(()))?;
    }
    Ok(tracking)
}

/// Begins the tracking of the checkpoint that this inventory names; an increment's names its parent too.
fn begin(args: &Args, message: &mut Vec<u8>) -> anyhow::Result<Tracking> {
    let mut inventory = InventoryEntry::decode(&message[..]).context("inventory.img")?;
    let id = inventory.ckpt_id.clone().and_then(|id| id.try_into().ok());
    let id = id.context("inventory.img: the checkpoint has no id")?;
    let tracking = Tracking::join(id, args.track.as_deref(), args.parent.as_ref())?;
    if let Some(parent) = tracking.parent {
        inventory.ckpt_parent_id = Some(parent.to_vec());
        *message = inventory.encode_to_vec();
    }
    Ok(tracking)
}

/// The tree behind the stream.
struct Tree {
    /// While it must not run.
    hold: Option<Hold>,
    /// While its copies are needed.
    copies: Option<Rc<RefCell<Hold>>>,
}

/// A copy of a process. It ends when this is dropped.
struct Copy {
    hold: Rc<RefCell<Hold>>,
    of: Pid,
}

impl Drop for Copy {
    fn drop(&mut self) {
        // If the holder is gone, so are its copies.
        let _ = self.hold.borrow_mut().ask(&format!("FORGET {}", self.of));
    }
}

impl Tree {
    fn hold(&mut self) -> anyhow::Result<&mut Hold> {
        self.hold.as_mut().context("the tree is held no more")
    }

    /// Sees to it that the writes of a process are tracked, if they are to be, and by us.
    fn track(&mut self, p: &Private, tracking: &mut Tracking) -> anyhow::Result<()> {
        let hold = self.hold()?;
        let answer = hold.ask(&format!("TRACKED {}", p.pid))?.map_err(anyhow::Error::msg)?;
        if answer.0 == "yes" && !tracking.on() {
            let subject = format!("pid {} ({})", p.pid, p.comm);
            let refused = Refused::new(subject, "its memory is watched by userfaultfd");
            return Err(refused.advise("if a ckpt-track is at work, say ckpt-mem --track ADDRESS").into());
        }
        tracking.watch(p.pid, || {
            let (_, uffd) = hold.ask(&format!("ARM {}", p.pid))?.map_err(anyhow::Error::msg)?;
            uffd.context("no userfaultfd came")
        });
        Ok(())
    }

    /// All is written: lets go of everything that is left, and hears what becomes of the checkpoint.
    fn done(self, tracking: Tracking) -> anyhow::Result<()> {
        if let Some(copies) = self.copies.and_then(Rc::into_inner) {
            let copies = copies.into_inner();
            if tracking.on() {
                tracking.end(copies.release_until_durable()?);
                return Ok(());
            }
            copies.release();
        }
        match self.hold {
            Some(hold) if tracking.on() => tracking.end(hold.release_until_durable()?),
            Some(hold) => hold.release(),
            None => {}
        }
        Ok(())
    }

    fn fail(self, reason: &str) {
        let copies = self.copies.and_then(Rc::into_inner).map(RefCell::into_inner);
        for hold in self.hold.into_iter().chain(copies) {
            hold.fail(reason);
        }
    }
}

impl snapshot::Tree for Tree {
    type Twin = Copy;

    fn twins(&mut self, memory: &Memory) -> anyhow::Result<HashMap<Pid, (Pid, Copy)>> {
        let mut twins = HashMap::new();
        let Some(copies) = self.copies.clone() else { return Ok(twins) };
        for p in &memory.private {
            match copies.borrow_mut().ask(&format!("TWIN {}", p.pid))? {
                Ok((twin, _)) => {
                    let twin = Pid(twin.parse().context("the pid of a copy")?);
                    twins.insert(p.pid, (twin, Copy { hold: Rc::clone(&copies), of: p.pid }));
                }
                Err(why) => snapshot::warn(memory, p.pid, &why),
            }
        }
        Ok(twins)
    }

    fn let_go(&mut self) -> anyhow::Result<()> {
        if let Some(hold) = self.hold.take() {
            hold.release();
        }
        Ok(())
    }
}
