//! Edits the sockets of a checkpoint stream on its way: a pure filter that needs neither the kernel nor
//! the target.
//!
//! What a connection whose peer is not part of the checkpoint becomes is a field of the socket's entry
//! in `files.img` (`unix_sk_entry.ckpt_external`), so an edit changes one message and everything else
//! passes unchanged; pages by splice(2). Messages are edited by description, so that fields
//! which this release does not know stay in them.
//!
//! Nothing is decided before all sockets have been seen (at BULK, or the end): a rule that matched nothing
//! is an error, as is one that tears a connection whose other end stays inside. The stream then ends with
//! ABORT, and no stage behind takes it for a checkpoint.
//!
//! Queued bytes name their socket by the id of its entry, which may come later in the stream. With
//! `--drop-queues` queues are therefore kept back in a temporary file until all entries are known.

mod rule;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::AsFd,
};

use anyhow::{Context, anyhow, bail};
use ckpt_images::{ImageError, stage};
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Frame, Reader, Writer},
    types::{FileEntry, SkPacketEntry, UnixSkEntry},
};
use ckpt_sys::{Refused, SocketId};
use clap::{
    CommandFactory, Parser,
    builder::{OsStringValueParser, TypedValueParser},
};
use prost_reflect::{DynamicMessage, Value};

pub use rule::{Edit, Rule, SocketPath};

/// Edits the unix sockets of a checkpoint stream
///
/// From standard input to standard output. ID is the number in socket:[ID] of
/// /proc/PID/fd at dump time, also written unix[ID] or socket:[ID]. A PATH that
/// begins with @ is an abstract name. A rule that matches nothing is an error.
#[derive(Debug, Clone, Parser)]
#[command(name = "sk-rewrite", version, after_help = EXAMPLES)]
pub struct Args {
    /// Connect the socket to PATH on restore
    #[arg(long, value_name = "ID=PATH", value_parser = OsStringValueParser::new().try_map(rule::connect))]
    pub connect: Vec<Rule>,
    /// Restore the socket from a descriptor given to ckpt-restore --inherit-fd
    #[arg(long, value_name = "ID", value_parser = OsStringValueParser::new().try_map(rule::inherit))]
    pub inherit: Vec<Rule>,
    /// The socket's peer is outside: connect to PATH, else to the peer's name, else inherit
    #[arg(long, value_name = "ID[:PATH]", value_parser = OsStringValueParser::new().try_map(rule::external))]
    pub external: Vec<Rule>,
    /// The peer has closed: what is queued can be read, then end of file
    #[arg(long, value_name = "ID", value_parser = OsStringValueParser::new().try_map(rule::close))]
    pub close: Vec<Rule>,
    /// Forget what the socket has received but not read
    #[arg(long, value_name = "ID", value_parser = OsStringValueParser::new().try_map(rule::drop_queues))]
    pub drop_queues: Vec<Rule>,
    /// Say on standard error what would be done, write no stream
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// A rule that matches nothing is only a warning
    #[arg(long)]
    pub allow_unmatched: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-read checkpoint | sk-rewrite --connect 48213=/run/b.sock | ckpt-restore --detach
  ckpt-read old | sk-rewrite --close 48213 --drop-queues 48213 | ckpt-write new
  ckpt-show checkpoint | jq -r '.images[].entries[]?.usk?.ino // empty'   # which IDs?";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

impl Args {
    fn rules(&self) -> Vec<Rule> {
        [&self.connect, &self.inherit, &self.external, &self.close, &self.drop_queues]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }
}

/// Copies the stream from `input` to `output`, editing it.
///
/// # Errors
/// Then the output has no end record.
pub fn run(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&input, "standard input")?;
    let mut rewrite = Rewrite::new(args)?;
    stage::grow_pipe(input.as_fd());
    let (mut reader, hello) = Reader::open(input)?;
    let output = if args.dry_run {
        File::options().write(true).open("/dev/null").context("/dev/null")?
    } else {
        ckpt_cli::not_a_terminal(&output, "standard output")?;
        stage::grow_pipe(output.as_fd());
        output
    };
    let mut writer = Writer::open(output, hello).context("write the stream")?;
    match rewrite.copy(&mut reader, &mut writer) {
        Ok(()) => writer.end().context("write the stream").map(drop),
        Err(error) => {
            // In the middle of contents an ABORT would be taken for them; there the missing end says it.
            if reader.bulk_input().is_none() {
                let _ = writer.abort(&ckpt_cli::reason("sk-rewrite", &error));
            }
            Err(error)
        }
    }
}

/// A unix socket of the stream.
#[derive(Debug, Clone)]
struct Socket {
    file_id: u32,
    peer: u64,
    external: bool,
    description: String,
}

struct Rewrite {
    rules: Vec<Rule>,
    matched: BTreeSet<usize>,
    sockets: BTreeMap<u64, Socket>,
    allow_unmatched: bool,
    dry_run: bool,
    queues: Option<Queues>,
    decided: bool,
}

/// Queues kept back until all sockets are known.
struct Queues {
    file: File,
    entries: Vec<(Vec<u8>, u64)>,
    memory: usize,
}

impl Rewrite {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let rules = args.rules();
        let mut policies = BTreeMap::new();
        for rule in rules.iter().filter(|rule| rule.edit != Edit::DropQueues) {
            if let Some(other) = policies.insert(rule.id, rule) {
                return Err(ckpt_cli::UsageError(format!("{other} and {rule} contradict each other")).into());
            }
        }
        let queues = match args.drop_queues.is_empty() {
            true => None,
            false => Some(Queues {
                file: tempfile::tempfile().context("temporary file")?,
                entries: Vec::new(),
                memory: 0,
            }),
        };
        Ok(Self {
            rules,
            matched: BTreeSet::new(),
            sockets: BTreeMap::new(),
            allow_unmatched: args.allow_unmatched,
            dry_run: args.dry_run,
            queues,
            decided: false,
        })
    }

    fn copy(&mut self, reader: &mut Reader<File>, writer: &mut Writer<File>) -> anyhow::Result<()> {
        let is = |name: &str, image: Image| name == image.name();
        while let Some(frame) = reader.next_frame()? {
            match &frame {
                Frame::Entry { image, arg, .. } if is(image, Image::Files) => {
                    let message = reader.payload(u64::from(MAX_MESSAGE))?;
                    let message = self.edit(message)?;
                    writer.entry(Image::Files, *arg, &message).context("write the stream")?;
                }
                Frame::Entry { image, .. } if is(image, Image::SkQueues) && self.queues.is_some() => {
                    self.keep_entry(reader)?;
                }
                Frame::Data { image, .. } if is(image, Image::SkQueues) && self.queues.is_some() => {
                    self.keep_data(reader)?;
                }
                Frame::Bulk => {
                    self.decide(writer)?;
                    stage::forward(reader, &frame, writer)?;
                }
                _ => stage::forward(reader, &frame, writer)?,
            }
        }
        self.decide(writer)
    }

    /// A file entry, edited if there is a rule for it.
    fn edit(&mut self, message: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        ckpt_proto::check::check_message("file_entry", &message)
            .map_err(|e| ImageError::Stream { file: Image::Files.file_name(0), what: e.to_string() })?;
        let file = FileEntry::decode(&message[..])?;
        if let Some(stub) = &file.ckpt_stub
            && let Some(rule) = self.rules.iter().find(|rule| rule.id == SocketId(stub.ino))
        {
            let reason = format!("what is inside this socket has not been read, so {rule} can't be applied");
            let advice = "put ckpt-sk before sk-rewrite";
            return Err(Refused::new(format!("socket:[{}]", stub.ino), reason).advise(advice).into());
        }
        let Some(socket) = &file.usk else { return Ok(message) };
        let ino = u64::from(socket.ino);
        let mut external = socket.ckpt_external.clone();
        for (index, rule) in self.rules.iter().enumerate().filter(|(_, rule)| rule.id == SocketId(ino)) {
            self.matched.insert(index);
            if let Some(policy) = rule.edit.policy(socket) {
                can_be_external(socket, rule)?;
                external = Some(policy);
            }
            if self.dry_run {
                ckpt_cli::note!(0, "would {}", action(socket, rule));
            } else {
                ckpt_cli::note!(1, "{}", action(socket, rule));
            }
        }
        let known = Socket {
            file_id: file.id,
            peer: u64::from(socket.peer),
            external: external.is_some(),
            description: describe(socket),
        };
        self.sockets.insert(ino, known);
        match external {
            Some(external) if socket.ckpt_external.as_ref() != Some(&external) => {
                with_external(&message, &external)
            }
            _ => Ok(message),
        }
    }

    fn keep_entry(&mut self, reader: &mut Reader<File>) -> anyhow::Result<()> {
        let message = reader.payload(u64::from(MAX_MESSAGE))?;
        let Some(queues) = &mut self.queues else { return Ok(()) };
        queues.memory += message.len() + 64;
        if queues.memory as u64 > ckpt_images::MAX_MEMORY {
            let what = "too many packets to keep back".to_owned();
            return Err(ImageError::TooMuch { file: Image::SkQueues.file_name(0), what }.into());
        }
        queues.entries.push((message, 0));
        Ok(())
    }

    fn keep_data(&mut self, reader: &mut Reader<File>) -> anyhow::Result<()> {
        let Some(queues) = &mut self.queues else { return Ok(()) };
        let Some((_, len)) = queues.entries.last_mut() else {
            let what = "contents before any entry".to_owned();
            return Err(ImageError::Stream { file: Image::SkQueues.file_name(0), what }.into());
        };
        *len += reader.copy_payload(&mut queues.file)?;
        Ok(())
    }

    /// All sockets are known: do the rules fit?
    fn decide(&mut self, writer: &mut Writer<File>) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.decided, true) {
            return Ok(());
        }
        self.all_matched()?;
        for (&ino, socket) in self.sockets.iter().filter(|(_, socket)| socket.external) {
            if let Some(peer) =
                self.sockets.get(&socket.peer).filter(|peer| !peer.external && peer.peer == ino)
            {
                bail!(
                    "socket {ino}: its peer, socket {}, is in the checkpoint too and would lose its connection: \
                     give a rule for it as well ({})",
                    socket.peer,
                    peer.description
                );
            }
        }
        self.write_queues(writer)
    }

    fn all_matched(&self) -> anyhow::Result<()> {
        let unmatched: Vec<String> = (self.rules.iter().enumerate())
            .filter(|(index, _)| !self.matched.contains(index))
            .map(|(_, rule)| rule.to_string())
            .collect();
        if unmatched.is_empty() {
            return Ok(());
        }
        let there = match self.sockets.is_empty() {
            true => "the stream holds no unix socket".to_owned(),
            false => {
                let list: Vec<_> = self
                    .sockets
                    .iter()
                    .map(|(ino, socket)| format!("\n  {ino} ({})", socket.description))
                    .collect();
                format!("the stream holds these unix sockets:{}", list.concat())
            }
        };
        let text = format!("{}: matches nothing; {there}", unmatched.join(" "));
        if self.allow_unmatched {
            ckpt_cli::warn(&text);
            return Ok(());
        }
        Err(anyhow!(text))
    }

    fn write_queues(&mut self, writer: &mut Writer<File>) -> anyhow::Result<()> {
        let Some(mut queues) = self.queues.take() else { return Ok(()) };
        let dropped: BTreeSet<u32> = (self.rules.iter())
            .filter(|rule| rule.edit == Edit::DropQueues)
            .filter_map(|rule| Some(self.sockets.get(&rule.id.0)?.file_id))
            .collect();
        queues.file.seek(SeekFrom::Start(0)).context("temporary file")?;
        let mut kept_any = false;
        let seen_any = !queues.entries.is_empty();
        for (message, len) in queues.entries {
            let packet = SkPacketEntry::decode(&message[..])?;
            if dropped.contains(&packet.id_for) {
                queues.file.seek(SeekFrom::Current(i64::try_from(len)?)).context("temporary file")?;
                continue;
            }
            kept_any = true;
            writer.entry(Image::SkQueues, 0, &message).context("write the stream")?;
            if len == 0 {
                continue;
            }
            writer.data_header(Image::SkQueues.name(), 0, len).context("write the stream")?;
            let mut contents = (&mut queues.file).take(len);
            let mut buffer = vec![0; 1 << 16];
            loop {
                match contents.read(&mut buffer).context("temporary file")? {
                    0 => break,
                    n => writer.data_bytes(&buffer[..n]).context("write the stream")?,
                }
            }
        }
        if seen_any && !kept_any {
            // The image stays, without entries.
            writer.data_header(Image::SkQueues.name(), 0, 0).context("write the stream")?;
        }
        Ok(())
    }
}

/// TCP_ESTABLISHED, which unix sockets use too.
const ESTABLISHED: u32 = 1;

/// Only a connection can be made again.
fn can_be_external(socket: &UnixSkEntry, rule: &Rule) -> anyhow::Result<()> {
    if socket.ckpt_external.is_some() || socket.state == ESTABLISHED {
        return Ok(());
    }
    bail!("{rule}: socket {} is {}, it has no connection", socket.ino, describe(socket))
}

fn describe(socket: &UnixSkEntry) -> String {
    let kind = match socket.r#type {
        1 => "stream",
        2 => "datagram",
        5 => "seqpacket",
        _ => "unknown type",
    };
    let state = match (socket.state, socket.peer) {
        (10, _) => "listening".to_owned(),
        (ESTABLISHED, 0) => "connected".to_owned(),
        (ESTABLISHED, peer) => format!("connected to {peer}"),
        _ => "unconnected".to_owned(),
    };
    let mut text = format!("{kind}, {state}");
    if !socket.name.is_empty() {
        text.push_str(&format!(", bound to {}", SocketPath(socket.name.clone())));
    }
    if let Some(external) = &socket.ckpt_external {
        text.push_str(", external");
        if let Some(path) =
            external.path.clone().or_else(|| external.peer_name.clone()).filter(|p| !p.is_empty())
        {
            text.push_str(&format!(", peer {}", SocketPath(path)));
        }
    }
    text
}

fn action(socket: &UnixSkEntry, rule: &Rule) -> String {
    let socket = format!("socket {} ({})", socket.ino, describe(socket));
    match &rule.edit {
        Edit::Connect(path) => format!("connect {socket} to {path}"),
        Edit::Inherit => format!("inherit {socket}"),
        Edit::External => format!("make {socket} external"),
        Edit::Close => format!("close the peer of {socket}"),
        Edit::DropQueues => format!("drop the queue of {socket}"),
    }
}

/// The message with `usk.ckpt_external` replaced; everything else in it stays, known or not.
fn with_external(message: &[u8], external: &impl Message) -> anyhow::Result<Vec<u8>> {
    let descriptor = |name| ckpt_proto::message_descriptor(name).ok_or_else(|| anyhow!("no message {name}"));
    let mut file = DynamicMessage::decode(descriptor("file_entry")?, message)?;
    let external = DynamicMessage::decode(descriptor("external_socket")?, &external.encode_to_vec()[..])?;
    let Some(Value::Message(socket)) = file.get_field_by_name_mut("usk") else {
        bail!("no unix socket in the entry")
    };
    socket.try_set_field_by_name("ckpt_external", Value::Message(external)).map_err(io::Error::other)?;
    Ok(file.encode_to_vec())
}
