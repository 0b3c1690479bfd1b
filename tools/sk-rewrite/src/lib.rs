//! Edits the sockets of a checkpoint stream on its way: a pure filter that needs neither the kernel nor
//! the target.
//!
//! What a socket is and what becomes of its connection are fields of its entry in `files.img`, so an edit
//! changes a few messages and everything else passes unchanged; pages by splice(2).
//!
//! Entries come in any order, and which sockets a rule means may take all of them to tell: a descriptor is found
//! through FDINFO and IDS, a peer is another socket. So sockets are kept back, in memory, and nothing is
//! decided before all have been seen (at BULK, or the end). Then a rule that matched nothing is an error, as is
//! one that tears a connection whose other end stays inside; the stream ends with ABORT, and no stage
//! behind takes it for a checkpoint.
//!
//! Queued bytes name their socket by the id of its entry, which may come later too. Rules that change queues
//! therefore keep these back as well, in a temporary file.

mod edit;
mod held;
mod option;
mod rule;

use std::{collections::HashMap, fs::File, ops::Range, os::fd::AsFd, path::PathBuf};

use anyhow::{Context, anyhow};
use ckpt_cli::UsageError;
use ckpt_images::{ImageError, stage};
use ckpt_proto::{
    Image, Message,
    stream::{Frame, Reader, Writer},
    types::{FdinfoEntry, FileEntry, SkPacketEntry, TaskKobjIdsEntry, TcpStreamEntry},
};
use ckpt_socket::Holder;
use ckpt_sys::Refused;
use clap::{CommandFactory, Parser};

use edit::{Effects, Socket, Sockets};
use held::Held;
use rule::value_parser;
pub use rule::{Change, Edit, Rule};

/// Edits the sockets of a checkpoint stream
///
/// From standard input to standard output. MATCH is ID (the number in socket:[ID] of
/// /proc/PID/fd at dump time), path=PATH, addr=IP[:PORT], fd=PID/FD, peer=ID|PATH|ADDRESS,
/// peer-pid=PID or kind=KIND. A PATH that begins with @ is an abstract name.
#[derive(Debug, Clone, Parser)]
#[command(name = "sk-rewrite", version, after_help = EXAMPLES)]
pub struct Args {
    /// Connect the socket to PATH on restore
    #[arg(long, value_name = "MATCH=PATH", value_parser = value_parser("connect"))]
    pub connect: Vec<Rule>,
    /// Listen on PATH (or the socket's own) on restore, and take the next connection
    #[arg(long, value_name = "MATCH[=PATH]", value_parser = value_parser("accept"))]
    pub accept: Vec<Rule>,
    /// Restore the socket from a descriptor given to ckpt-restore --inherit-fd
    #[arg(long, value_name = "MATCH", value_parser = value_parser("inherit"))]
    pub inherit: Vec<Rule>,
    /// The socket's peer is outside: connect to PATH, else to the peer's name, else inherit
    #[arg(long, value_name = "MATCH[:PATH]", value_parser = value_parser("external"))]
    pub external: Vec<Rule>,
    /// The peer is gone: what is queued can be read, then end of file
    #[arg(long, value_name = "MATCH", value_parser = value_parser("close"))]
    pub close: Vec<Rule>,
    /// Forget what the socket has received but not read
    #[arg(long, value_name = "MATCH", value_parser = value_parser("drop-queues"))]
    pub drop_queues: Vec<Rule>,
    /// Set an option, SO_KEEPALIVE=1
    #[arg(long, value_name = "MATCH:OPTION=VALUE", value_parser = value_parser("set-opt"))]
    pub set_opt: Vec<Rule>,
    /// Unix sockets: another path; with a / at the end of both, all below
    #[arg(long, value_name = "OLD=NEW", value_parser = value_parser("rename"))]
    pub rename: Vec<Rule>,
    /// TCP, UDP, raw: another IP address, or IP:PORT, at both ends
    #[arg(long, value_name = "OLD=NEW", value_parser = value_parser("addr"))]
    pub addr: Vec<Rule>,
    /// TCP, UDP: another port, at both ends
    #[arg(long, value_name = "OLD=NEW", value_parser = value_parser("port"))]
    pub port: Vec<Rule>,
    /// TCP connections that lead out of the stream may move: the other end is told elsewhere
    #[arg(long)]
    pub peers_follow: bool,
    /// Rules from a file, one a line, without the dashes
    #[arg(long, value_name = "FILE")]
    pub rules: Vec<PathBuf>,
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
  ckpt-read old | sk-rewrite --close kind=unix-stream --rename /run/a/=/run/b/ | ckpt-write new
  ckpt-read checkpoint | ckpt-sk --list             # which IDs?";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

impl Args {
    fn rules(&self) -> anyhow::Result<Vec<Rule>> {
        let options = [
            &self.connect,
            &self.accept,
            &self.inherit,
            &self.external,
            &self.close,
            &self.drop_queues,
            &self.set_opt,
            &self.rename,
            &self.addr,
            &self.port,
        ];
        let mut rules: Vec<Rule> = options.into_iter().flatten().cloned().collect();
        for path in &self.rules {
            rules.extend(rule::read_file(path)?);
        }
        check_contradictions(&rules)?;
        Ok(rules)
    }
}

/// Two rules that say different things of the same, whatever is in the stream.
fn check_contradictions(rules: &[Rule]) -> Result<(), UsageError> {
    // What each rule decides; only one rule may decide it.
    let mut decided: HashMap<String, &Rule> = HashMap::new();
    for rule in rules {
        let what = match rule {
            Rule::Sockets(what, edit) if edit.is_policy() => format!("connection of {what}"),
            Rule::Sockets(what, Edit::SetOption { name, .. }) => {
                format!("option {} of {what}", name.to_ascii_lowercase())
            }
            Rule::Sockets(..) => continue,
            Rule::All(Change::Rename(old, _)) => format!("name {old}"),
            Rule::All(Change::Address(old, _)) => format!("address {old:?}"),
            Rule::All(Change::Port(old, _)) => format!("port {old}"),
        };
        if let Some(other) = decided.insert(what, rule).filter(|other| *other != rule) {
            return Err(UsageError(format!("{other} and {rule} contradict each other")));
        }
    }
    Ok(())
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

struct Rewrite {
    rules: Vec<Rule>,
    allow_unmatched: bool,
    peers_follow: bool,
    dry_run: bool,
    sockets: Vec<Socket>,
    memory: u64,
    /// Descriptors by descriptor table and file, and the tables of processes: FDINFO, IDS.
    descriptors: Vec<(u64, u32, u32)>,
    tables: HashMap<u64, Vec<u32>>,
    /// Bytes received and not read by file.
    received: HashMap<u32, u64>,
    queues: Option<Held>,
    decided: bool,
}

impl Rewrite {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let rules = args.rules()?;
        let changes_queues = rules.iter().any(|rule| {
            matches!(rule, Rule::Sockets(_, Edit::DropQueues | Edit::Close | Edit::SetOption { .. }))
        });
        Ok(Self {
            rules,
            allow_unmatched: args.allow_unmatched,
            peers_follow: args.peers_follow,
            dry_run: args.dry_run,
            sockets: Vec::new(),
            memory: 0,
            descriptors: Vec::new(),
            tables: HashMap::new(),
            received: HashMap::new(),
            queues: if changes_queues { Some(Held::new()?) } else { None },
            decided: false,
        })
    }

    fn copy(&mut self, reader: &mut Reader<File>, writer: &mut Writer<File>) -> anyhow::Result<()> {
        while let Some(frame) = reader.next_frame()? {
            match &frame {
                Frame::Bulk => {
                    self.decide(writer)?;
                    stage::forward(reader, &frame, writer)?;
                }
                // Nothing to look for.
                _ if self.rules.is_empty() => stage::forward(reader, &frame, writer)?,
                Frame::Entry { image, arg, .. } => match Image::by_name(image) {
                    Some(image) => self.entry(image, *arg, reader, &frame, writer)?,
                    None => stage::forward(reader, &frame, writer)?,
                },
                Frame::Data { image, arg, .. } => {
                    match (Image::by_name(image).filter(|&image| is_queue(image)), &mut self.queues) {
                        (Some(image), Some(queues)) => queues.keep_data(image, *arg, reader)?,
                        _ => stage::forward(reader, &frame, writer)?,
                    }
                }
                _ => stage::forward(reader, &frame, writer)?,
            }
        }
        self.decide(writer)
    }

    fn entry(
        &mut self,
        image: Image,
        arg: u64,
        reader: &mut Reader<File>,
        frame: &Frame,
        writer: &mut Writer<File>,
    ) -> anyhow::Result<()> {
        if !matches!(image, Image::Files | Image::Fdinfo | Image::Ids) && !is_queue(image) {
            return Ok(stage::forward(reader, frame, writer)?);
        }
        let message = held::message(reader)?;
        let name = image.message().unwrap_or_default();
        ckpt_proto::check::check_message(name, &message)
            .map_err(|e| ImageError::Stream { file: image.file_name(arg), what: e.to_string() })?;
        let message = match image {
            Image::Files => {
                let file = FileEntry::decode(&message[..])?;
                match Socket::new(message, file) {
                    Ok(socket) => {
                        self.remember(image, arg, 1 << 10)?;
                        self.sockets.push(socket);
                        return Ok(());
                    }
                    Err(message) => message,
                }
            }
            Image::Fdinfo => {
                let descriptor = FdinfoEntry::decode(&message[..])?;
                self.remember(image, arg, 32)?;
                self.descriptors.push((arg, descriptor.id, descriptor.fd));
                message
            }
            Image::Ids => {
                let ids = TaskKobjIdsEntry::decode(&message[..])?;
                self.remember(image, arg, 32)?;
                self.tables.entry(u64::from(ids.files_id)).or_default().push(u32::try_from(arg)?);
                message
            }
            _ => {
                if image == Image::SkQueues {
                    let packet = SkPacketEntry::decode(&message[..])?;
                    *self.received.entry(packet.id_for).or_default() += u64::from(packet.length);
                }
                match &mut self.queues {
                    Some(queues) => return queues.keep_entry(image, arg, message),
                    None => message,
                }
            }
        };
        writer.entry(image, arg, &message).context("write the stream")
    }

    fn remember(&mut self, image: Image, arg: u64, bytes: u64) -> anyhow::Result<()> {
        self.memory += bytes;
        if self.memory > ckpt_images::MAX_MEMORY {
            let what = "too many sockets and descriptors to keep back".to_owned();
            return Err(ImageError::TooMuch { file: image.file_name(arg), what }.into());
        }
        Ok(())
    }

    /// Who has which file open. Processes that share a descriptor table count each.
    fn holders(&self) -> HashMap<u32, Vec<Holder>> {
        let mut holders: HashMap<u32, Vec<Holder>> = HashMap::new();
        for &(table, file, fd) in &self.descriptors {
            for &pid in self.tables.get(&table).into_iter().flatten() {
                holders.entry(file).or_default().push((pid, fd));
            }
        }
        holders
    }

    /// All sockets are known: apply the rules, and write what was kept back.
    fn decide(&mut self, writer: &mut Writer<File>) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.decided, true) || self.rules.is_empty() {
            return Ok(());
        }
        let holders = self.holders();
        let mut sockets = Sockets::new(std::mem::take(&mut self.sockets), holders, &self.received);
        if let Some(stub) = sockets.iter().find(|socket| socket.view.stub) {
            let reason = "what is inside sockets has not been read, so no rule can be applied";
            return Err(Refused::new(format!("socket {}", stub.describe()), reason)
                .advise("put ckpt-sk before sk-rewrite")
                .into());
        }
        let (effects, unmatched) = sockets.apply(&self.rules, self.peers_follow)?;
        if !unmatched.is_empty() {
            let text = format!("{}: matches nothing; {}", unmatched.join(" "), inventory(&sockets));
            if !self.allow_unmatched {
                return Err(anyhow!(text));
            }
            ckpt_cli::warn(&text);
        }
        for note in &effects.notes {
            if self.dry_run {
                ckpt_cli::note!(0, "would {note}");
            } else {
                ckpt_cli::note!(1, "{note}");
            }
        }
        for socket in sockets.iter() {
            writer.entry(Image::Files, 0, &socket.encode()?).context("write the stream")?;
        }
        match self.queues.take() {
            Some(queues) => queues.write(writer, |entry| queued(entry, &effects)),
            None => Ok(()),
        }
    }
}

fn is_queue(image: Image) -> bool {
    matches!(image, Image::SkQueues | Image::TcpStream)
}

/// What becomes of an entry of an image of queues, and which bytes of its contents stay.
fn queued(entry: &held::Entry, effects: &Effects) -> anyhow::Result<Option<(Vec<u8>, Range<u64>)>> {
    use prost_reflect::{Value, prost::Message as _};
    let whole = || Ok(Some((entry.message.clone(), 0..u64::MAX)));
    if entry.image == Image::SkQueues {
        let packet = SkPacketEntry::decode(&entry.message[..])?;
        // What is in a ring is at places that the program knows of, and stays.
        let dropped = effects.dropped.contains(&packet.id_for) && packet.ckpt_ring_slot.is_none();
        return if dropped { Ok(None) } else { whole() };
    }
    let options: Vec<_> = effects.tcp_options.iter().filter(|(id, ..)| *id == entry.arg).collect();
    let (drop, close) = (effects.dropped_tcp.contains(&entry.arg), effects.closed_tcp.contains(&entry.arg));
    if options.is_empty() && !drop && !close {
        return whole();
    }
    let mut message = edit::decode("tcp_stream_entry", &entry.message)?;
    for (_, field, on) in options {
        message.set_field_by_name(field, Value::Bool(*on));
    }
    let stream = TcpStreamEntry::decode(&entry.message[..])?;
    let received = u64::from(stream.inq_len);
    let mut stays = 0..received + u64::from(stream.outq_len);
    if drop {
        // `inq_seq` is the number of the first byte that has not been received: it stays.
        stays.start = received;
        message.set_field_by_name("inq_len", Value::U32(0));
    }
    if close {
        // What was received can be read; nobody waits for the rest.
        stays.end = received;
        message.set_field_by_name("outq_len", Value::U32(0));
        message.set_field_by_name("unsq_len", Value::U32(0));
        if stays.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some((message.encode_to_vec(), stays)))
}

/// The sockets that there are, for people whose rule met none of them.
fn inventory(sockets: &Sockets) -> String {
    const MOST: usize = 50;
    let all: Vec<String> = sockets.iter().map(|socket| format!("\n  {}", socket.describe())).collect();
    match all.len() {
        0 => "the stream holds no socket".to_owned(),
        n if n > MOST => {
            let first = all.get(..MOST).unwrap_or_default().concat();
            format!("the stream holds {n} sockets, among them:{first}")
        }
        _ => format!("the stream holds these sockets:{}", all.concat()),
    }
}
