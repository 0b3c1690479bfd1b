//! `ckpt-mem`: adds the contents of private memory to a stream that `ckpt-scan --no-mem` made.
//!
//! It reads the live tree, so it takes a hold: `ckpt-scan` keeps the tree frozen until the hold is
//! released. Address spaces pass by as MM entries; their pages are found and copied when all other
//! frames have passed, so that pages come last, as everybody behind expects.

use std::fs::File;

use anyhow::{Context, bail};
use ckpt_cli::stats;
use ckpt_hold::Hold;
use ckpt_images::recode::{self, Behind, Codec, Recode};
use ckpt_kinds::mem::dump::Plan;
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Frame, Reader, Writer, forward},
    types::{MmEntry, PagemapHead, VmaEntry},
};
use ckpt_sys::{Pid, transfer::Output};
use clap::{CommandFactory, Parser};

/// Add page contents to a checkpoint stream
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-mem",
    version,
    after_help = "\
Examples:
  ckpt-scan -t 4711 --no-mem | ckpt-mem | ckpt-sk | ckpt-write /var/ckpt/1

Reads a stream on standard input, writes it with pages to standard output."
)]
pub struct Args {
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Codec>,
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
    hello.lacks.retain(|l| l != "mem");
    let (output, behind) = match args.compress {
        Some(codec) => recode::behind(output, Recode::Pack(codec))?,
        None => (output, Behind::default()),
    };
    let mut writer = Writer::open(Output::new(output), hello).context("write the stream")?;
    match add_pages(&mut reader, &mut writer) {
        Ok(()) => {
            let counts = writer.counts();
            let written = counts.page_bytes / 4096;
            stats::count("pages", "scanned", written + counts.parent_pages);
            stats::count("pages", "written", written);
            stats::count("pages", "zero", counts.zero_pages);
            stats::count("pages", "in_parent", counts.parent_pages);
            drop(writer.end().context("write the stream")?);
            behind.finish()?;
            hold.release();
            args.stats.write()
        }
        Err(error) => {
            let reason = ckpt_cli::reason("ckpt-mem", &error);
            hold.fail(&reason);
            let _ = writer.abort(&reason);
            Err(error)
        }
    }
}

fn add_pages(reader: &mut Reader<File>, writer: &mut Writer<Output>) -> anyhow::Result<()> {
    let mut spaces: Vec<(u64, Vec<VmaEntry>)> = Vec::new();
    let mut pages_id = 0;
    while let Some(frame) = reader.next_frame().context("standard input")? {
        if let Frame::Entry { image, arg, .. } = &frame {
            let message = reader.payload(u64::from(MAX_MESSAGE)).context("standard input")?;
            if image == Image::Mm.name() {
                let mm = MmEntry::decode(&message[..]).with_context(|| Image::Mm.file_name(*arg))?;
                spaces.push((*arg, mm.vmas));
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
    stats::phase("pages");
    let mut plans = Vec::with_capacity(spaces.len());
    for (pid, vmas) in &spaces {
        pages_id += 1;
        let pid = Pid(i32::try_from(*pid).with_context(|| format!("pid {pid}"))?);
        let plan = Plan::new(pid, vmas, pages_id, None).with_context(|| format!("pid {pid}"))?;
        plan.emit(writer as &mut dyn ckpt_kinds::Sink)?;
        plans.push(plan);
    }
    writer.bulk().context("write the stream")?;
    let mut progress = ckpt_cli::Progress::new("pages", Some(plans.iter().map(Plan::bytes).sum()));
    for plan in &plans {
        plan.copy(writer, |n| progress.inc(n))?;
    }
    Ok(())
}
