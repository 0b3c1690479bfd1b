//! Completes the sockets of a checkpoint stream.
//!
//! ckpt-scan puts a stub into the stream for each socket; this stage replaces the stubs by full
//! entries and adds what is queued, looking at the frozen tree itself while it has a hold on it.
//! Everything else passes unchanged; only the stubs are kept until all are known, because a
//! socket's peer may be one of them. Their place is before BULK, or the end.
//!
//! Which connections may lead outside is the user's to say, here and nowhere else. What
//! is inside a socket is the business of its family's module in `ckpt_kinds::fd`.

mod list;

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    io::Write,
    os::{fd::AsFd, unix::ffi::OsStrExt},
};

use anyhow::{Context, bail};
use ckpt_hold::{Hold, HoldError, PipeId};
use ckpt_images::stage;
use ckpt_kinds::fd::{
    Look,
    socket::{self, Completion, Queued, Say, SkOptions},
    sockopt,
    tcp::TcpOptions,
    unix::ExternalSocket,
};
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Frame, Reader, Writer},
    types::{FileEntry, InventoryEntry, TaskKobjIdsEntry},
};
use ckpt_sys::{Pid, transfer::Output};
use clap::{
    CommandFactory, Parser, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};

pub use list::list;

const LACKS: &str = "sk";

const EXAMPLES: &str = "\
Examples:
  ckpt-scan -t 4711 | ckpt-sk --external 48213 | ckpt-write checkpoint
  ckpt-scan -t 4711 | ckpt-sk --external path=/run/b.sock | ckpt-write checkpoint
  ckpt-sk --list -t 4711                            # which IDs, and who is at the other end?";

/// Completes the sockets of a checkpoint stream
///
/// From standard input to standard output, behind ckpt-scan. ID is the number in
/// socket:[ID] of /proc/PID/fd, also written unix[ID] or socket:[ID]. A PATH that
/// begins with @ is an abstract name.
#[derive(Debug, Clone, Parser)]
#[command(name = "ckpt-sk", version, after_help = EXAMPLES)]
pub struct Args {
    /// Connections whose other end is not part of the checkpoint. On restore they are connected to
    /// PATH; else, if they were accepted, they take the next client; else connect to their peer's name
    #[arg(
        long,
        value_name = "ID[:PATH]|path=PATH|peer-pid=PID|all",
        value_parser = OsStringValueParser::new().try_map(external)
    )]
    pub external: Vec<ExternalSocket>,
    /// What sockets have received and can't be given back, or sent and the peer has not read: left
    /// out (drop), or, of unix connections, stored (keep); by default it is an error
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    pub queued: Option<KeepOrDrop>,
    /// Dump TCP connections whose other end is outside the tree; those between processes of the tree need no leave
    #[arg(long)]
    pub tcp_established: bool,
    /// Dump all TCP connections as closed
    #[arg(long, conflicts_with = "tcp_established")]
    pub tcp_close: bool,
    /// Leave out connections that a listener of the tree has not accepted yet
    #[arg(long)]
    pub skip_in_flight: bool,
    /// List the sockets of a process and its descendants, or of the stream, and what a checkpoint would do
    /// with them
    #[arg(long)]
    pub list: bool,
    /// The process whose sockets --list lists
    #[arg(short = 't', long, value_name = "PID", requires = "list")]
    pub tree: Option<i32>,
    /// The list as JSON
    #[arg(long, requires = "list")]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

/// What becomes of unread bytes from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeepOrDrop {
    /// Left out.
    Drop,
    /// Stored.
    Keep,
}

// By value as clap's parsers hand it over.
#[allow(clippy::needless_pass_by_value)]
fn external(text: OsString) -> Result<ExternalSocket, String> {
    ExternalSocket::parse(text.as_bytes())
        .ok_or_else(|| {
        "expected ID[:PATH], path=PATH, peer-pid=PID or all, ID being the number in socket:[ID] of /proc/PID/fd"
            .to_owned()
    })
}

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

impl Args {
    /// What the user allows; `kill`: the tree will be killed.
    fn options(&self, kill: bool) -> SkOptions {
        SkOptions {
            external: self.external.clone(),
            queued: match self.queued {
                None => Queued::Refuse,
                Some(KeepOrDrop::Drop) => Queued::Drop,
                Some(KeepOrDrop::Keep) => Queued::Keep,
            },
            tcp: TcpOptions {
                established: self.tcp_established,
                close: self.tcp_close,
                skip_in_flight: self.skip_in_flight,
                kill,
            },
        }
    }
}

/// Copies the stream from `input` to `output`, completing its sockets.
///
/// # Errors
/// Then the output has no end record, and ckpt-scan is told through the hold.
pub fn run(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&input, "standard input")?;
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    stage::grow_pipe(input.as_fd());
    stage::grow_pipe(output.as_fd());
    let pipes = PipeId::of(input.as_fd()).zip(PipeId::of(output.as_fd()));
    let (mut reader, mut hello) = Reader::open(input)?;
    if let (Some(control), Some((from, to))) = (&hello.control, pipes) {
        ckpt_hold::passes(control, from, to);
        reader.takes_placed();
    }
    let wanted = hello.lacks.iter().any(|l| l == LACKS);
    let hold = match &hello.control {
        Some(control) if wanted => match Hold::take(control, LACKS) {
            // ckpt-scan gave up already; why stands further on in the stream.
            Err(HoldError::Gone) => None,
            hold => Some(hold.context("take a hold on the frozen tree")?),
        },
        _ => None,
    };
    hello.lacks.retain(|l| l != LACKS);
    let mut stage = Stage { args, hold, stubs: Vec::new(), net_ns: HashMap::new(), kill: false, done: false };
    // Entries are small and may be many; who waits for some gets them with the record that says so.
    let mut writer = Writer::open(Output::new(output), hello).context("write the stream")?;
    writer.output().flush().context("write the stream")?;
    match stage.copy(&mut reader, &mut writer) {
        Ok(()) => writer.end().context("write the stream").map(drop),
        Err(error) => {
            let reason = ckpt_cli::reason("ckpt-sk", &error);
            if let Some(hold) = stage.hold.take() {
                hold.fail(&reason);
            }
            // In the middle of contents an ABORT would be taken for them; there the missing end says it.
            if reader.bulk_input().is_none() {
                let _ = writer.abort(&reason);
            }
            Err(error)
        }
    }
}

fn is_pagemap(image: &str) -> bool {
    image == Image::Pagemap.name() || image == Image::ShmemPagemap.name()
}

struct Stage<'a> {
    args: &'a Args,
    hold: Option<Hold>,
    stubs: Vec<FileEntry>,
    net_ns: HashMap<Pid, u32>,
    /// The tree will be killed.
    kill: bool,
    done: bool,
}

impl Stage<'_> {
    fn copy(&mut self, reader: &mut Reader<File>, writer: &mut Writer<Output>) -> anyhow::Result<()> {
        while let Some(frame) = reader.next_frame()? {
            match &frame {
                Frame::Entry { image, arg, .. } if image == Image::Files.name() => {
                    let message = reader.payload(u64::from(MAX_MESSAGE))?;
                    match FileEntry::decode(&message[..]).ok().filter(|e| e.ckpt_stub.is_some()) {
                        Some(stub) => self.stubs.push(stub),
                        None => writer.entry_named(image, *arg, &message).context("write the stream")?,
                    }
                }
                Frame::Entry { image, arg, .. } if image == Image::Ids.name() => {
                    let message = reader.payload(u64::from(MAX_MESSAGE))?;
                    self.note_ids(*arg, &message);
                    writer.entry_named(image, *arg, &message).context("write the stream")?;
                }
                Frame::Entry { image, arg, .. } if image == Image::Inventory.name() => {
                    let message = reader.payload(u64::from(MAX_MESSAGE))?;
                    self.kill =
                        InventoryEntry::decode(&message[..]).is_ok_and(|entry| entry.ckpt_net_lock.is_some());
                    writer.entry_named(image, *arg, &message).context("write the stream")?;
                }
                // All descriptors have passed by: pagemaps come behind them (ckpt-stream(5)).
                Frame::Bulk => {
                    self.complete(writer)?;
                    stage::forward(reader, &frame, writer)?;
                    writer.output().flush().context("write the stream")?;
                }
                Frame::Entry { image, .. } if is_pagemap(image) => {
                    self.complete(writer)?;
                    stage::forward(reader, &frame, writer)?;
                }
                _ => stage::forward(reader, &frame, writer)?,
            }
        }
        self.complete(writer)
    }

    fn note_ids(&mut self, arg: u64, message: &[u8]) {
        if let (Ok(pid), Ok(ids)) = (i32::try_from(arg), TaskKobjIdsEntry::decode(message))
            && let Some(id) = ids.net_ns_id
        {
            self.net_ns.insert(Pid(pid), id);
        }
    }

    fn complete(&mut self, writer: &mut Writer<Output>) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(());
        }
        if self.hold.is_none() && !self.stubs.is_empty() {
            bail!("no frozen tree is behind the stream any more: run ckpt-sk in one pipeline with ckpt-scan");
        }
        let options = self.args.options(self.kill);
        let say = Say { warn: &ckpt_cli::warn, note: &|text| ckpt_cli::note!(1, "{text}") };
        let net_ns = |pid: Pid| self.net_ns.get(&pid).copied();
        let defaults = &sockopt::Defaults::default();
        let completion =
            Completion { net_ns: &net_ns, options: &options, say, defaults, look: &Look::default() };
        socket::complete(&self.stubs, completion, writer)?;
        ckpt_cli::note!(1, "{} sockets completed", self.stubs.len());
        if let Some(hold) = self.hold.take() {
            hold.release();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        command().debug_assert();
        let args =
            Args::try_parse_from(["ckpt-sk", "--external", "unix[7]:@x", "--external", "9", "--queued=drop"]);
        assert_eq!(args.unwrap().external.len(), 2);
        for wrong in [&["ckpt-sk", "--external", "x"][..], &["ckpt-sk", "--json"]] {
            assert!(Args::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }
}
