//! Encodes what `ckpt-show --json` printed, after whatever `jq` did to it: into a stream, a directory, or
//! one image file. The exact inverse: unchanged JSON gives the very same images.
//!
//! JSON carries no pages, and no raw contents over `ckpt-show --payload-limit`; where the document has
//! only a size (`"size": 8192`, `"payload": {"size": 5000000}`), the bytes are taken from the same image of
//! the directory given by `--pages-from`, where they must have that very size.

use std::{
    fs::File,
    io::{BufReader, Write},
    os::fd::AsFd,
    path::PathBuf,
};

use anyhow::{Context, anyhow, bail};
use ckpt_images::{
    DirWriter, ImageError, ImageSet, Place,
    pack::PackedFile,
    stage::{self, Check},
};
use ckpt_proto::{
    Image, Message, Payload, file,
    stream::{Facts, Writer},
    types::{CoreEntry, Hello, core_entry::March},
};
use ckpt_show::json::{bytes_from_json, message_from_json};
use clap::{CommandFactory, Parser};
use nix::{
    sys::uio::pread,
    unistd::{Whence, lseek},
};
use serde_json::{Map, Value};

/// Encodes JSON as checkpoint images: the inverse of ckpt-show --json
///
/// Reads the document on standard input and writes a stream on standard output.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "ckpt-encode", version, after_help = EXAMPLES)]
pub struct Args {
    /// Write an image directory instead of a stream
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "image")]
    pub dir: Option<PathBuf>,
    /// The document holds one image: write that file's bytes to standard output
    #[arg(short, long)]
    pub image: bool,
    /// Take pages, and contents that the document has only the size of, from here
    #[arg(long, value_name = "DIR")]
    pub pages_from: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-show DIR | jq '...' | ckpt-encode --pages-from DIR | ckpt-write NEW
  ckpt-show DIR/core-7.img | jq '...' | ckpt-encode --image > core-7.img
  ckpt-show DIR | jq '...' | ckpt-encode --pages-from DIR -D NEW";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Encodes the document from `input`.
///
/// # Errors
/// It is not what `ckpt-show` prints, or lacks pages. A stream then has no end record, a
/// directory does not come to be.
pub fn run(args: &Args, input: File, output: File) -> anyhow::Result<()> {
    let pages = match &args.pages_from {
        Some(dir) => Some(ImageSet::from_dir(dir).with_context(|| dir.display().to_string())?),
        None => None,
    };
    if args.dir.is_none() {
        ckpt_cli::not_a_terminal(&output, "standard output")?;
    }
    let document: Value =
        serde_json::from_reader(BufReader::new(input)).context("the document is not JSON")?;
    let document = Document::parse(&document, pages.as_ref())?;
    if args.image {
        return document.write_image(output);
    }
    if let Some(dir) = &args.dir {
        return document.write_dir(dir);
    }
    stage::grow_pipe(output.as_fd());
    let mut writer = Writer::open(output, document.hello()?).context("write the stream")?;
    match document.write_entries(&mut writer) {
        Ok(()) => {}
        Err(error) => {
            let _ = writer.abort(&ckpt_cli::reason("ckpt-encode", &error));
            return Err(error);
        }
    }
    writer.bulk().context("write the stream")?;
    for (part, place) in document.pages()? {
        if part.image == Image::CkptPages {
            let blocks = PackedFile::open(place, &part.file())?;
            blocks.for_each_block(|block, _| {
                writer.data(part.image, part.arg, block).map_err(ImageError::output)
            })?;
        } else {
            stage::write_pages(&mut writer, part.arg, place, Check::Read(&[]), |_| {})?;
        }
    }
    writer.end().context("write the stream").map(drop)
}

/// One image of the document.
#[derive(Clone, Copy)]
struct Part<'a> {
    image: Image,
    arg: u64,
    object: &'a Map<String, Value>,
}

/// Raw contents: in the document, or elsewhere.
enum Contents<'a> {
    Bytes(Vec<u8>),
    Place(Place<'a>),
}

struct Document<'a> {
    hello: Option<&'a Value>,
    parts: Vec<Part<'a>>,
    from: Option<&'a ImageSet>,
}

impl Part<'_> {
    fn is_pages(&self) -> bool {
        matches!(self.image, Image::Pages | Image::CkptPages)
    }

    fn file(&self) -> String {
        self.image.file_name(self.arg)
    }

    fn entries(&self) -> anyhow::Result<&Vec<Value>> {
        match self.object.get("entries") {
            Some(Value::Array(entries)) => Ok(entries),
            _ => bail!("{}: \"entries\" should be an array", self.file()),
        }
    }

    /// The message of entry `index`, without its payload.
    fn message(&self, index: usize, entry: &Value) -> anyhow::Result<Vec<u8>> {
        let at = format!("{} entry {index}", self.file());
        let Some(name) = self.image.entry_message(index) else {
            let message = entry.get("message").ok_or_else(|| anyhow!("{at}: \"message\" should be there"))?;
            return Ok(bytes_from_json(message, &at)?);
        };
        let descriptor = ckpt_proto::message_descriptor(name).ok_or_else(|| anyhow!("no message {name}"))?;
        match entry {
            Value::Object(object) if object.contains_key("payload") => {
                let mut object = object.clone();
                object.shift_remove("payload");
                Ok(message_from_json(&descriptor, &Value::Object(object), &at)?)
            }
            _ => Ok(message_from_json(&descriptor, entry, &at)?),
        }
    }
}

impl<'a> Document<'a> {
    fn parse(document: &'a Value, from: Option<&'a ImageSet>) -> anyhow::Result<Self> {
        let not_ours = || anyhow!("the document is not what ckpt-show --json prints");
        let object = document.as_object().ok_or_else(not_ours)?;
        match object.get("ckpt_show").and_then(Value::as_u64) {
            Some(ckpt_show::document::FORMAT) => {}
            Some(other) => {
                bail!("the document is of format {other}, this tool knows {}", ckpt_show::document::FORMAT)
            }
            None => return Err(not_ours()),
        }
        let images = object.get("images").and_then(Value::as_array).ok_or_else(not_ours)?;
        let mut parts: Vec<Part<'a>> = Vec::new();
        for (number, value) in images.iter().enumerate() {
            let bad = |what: &str| anyhow!("image {number} of the document: {what}");
            let object = value.as_object().ok_or_else(|| bad("not an object"))?;
            let name =
                object.get("image").and_then(Value::as_str).ok_or_else(|| bad("\"image\" is not there"))?;
            let image = Image::by_name(name).ok_or_else(|| bad(&format!("no image is called {name:?}")))?;
            let arg = object
                .get("arg")
                .map_or(Some(0), Value::as_u64)
                .ok_or_else(|| bad("\"arg\" is no number"))?;
            // The writer of the directory makes a new one.
            if image != Image::CkptManifest || images.len() == 1 {
                parts.push(Part { image, arg, object });
            }
        }
        Ok(Self { hello: object.get("hello"), parts, from })
    }

    fn hello(&self) -> anyhow::Result<Hello> {
        if let Some(hello) = self.hello {
            let descriptor = ckpt_proto::message_descriptor("hello").context("no message hello")?;
            return Ok(Hello::decode(&message_from_json(&descriptor, hello, "hello")?[..])?);
        }
        let packed = self.parts.iter().any(|part| part.image == Image::CkptPages).then_some(true);
        let mut arch = March::X8664.into();
        if let Some(core) = self.parts.iter().find(|part| part.image == Image::Core)
            && let Some(entry) = core.entries()?.first()
        {
            arch = CoreEntry::decode(&core.message(0, entry)?[..])?.mtype;
        }
        Ok(Hello { page_size: 4096, arch: u32::try_from(arch)?, packed, ..Hello::default() })
    }

    /// Raw contents that follow entry `index`; `None` if there are none.
    fn contents(
        &self,
        part: &Part<'_>,
        index: usize,
        value: Option<&Value>,
    ) -> anyhow::Result<Option<Contents<'a>>> {
        let Some(value) = value else { return Ok(None) };
        let at = || format!("{} contents of entry {index}", part.file());
        match value.as_object().and_then(|object| object.get("size")) {
            Some(size) => {
                let size = size.as_u64().ok_or_else(|| anyhow!("{}: \"size\" is no number", at()))?;
                self.place(part, index, size).map(|place| place.map(Contents::Place))
            }
            None => Ok(Some(Contents::Bytes(bytes_from_json(value, &at())?))),
        }
    }

    fn place(&self, part: &Part<'_>, index: usize, size: u64) -> anyhow::Result<Option<Place<'a>>> {
        if size == 0 {
            return Ok(None);
        }
        let file = part.file();
        let Some(from) = self.from else {
            bail!(
                "{file}: the document has only the size of {size} bytes; give the directory that it was made of with --pages-from"
            );
        };
        match from.payload(part.image, part.arg, index) {
            Some(place) if place.len == size => Ok(Some(place)),
            Some(place) => bail!(
                "{file}: the document says {size} bytes, the directory of --pages-from has {}",
                place.len
            ),
            None => bail!("{file}: the directory of --pages-from has no such bytes"),
        }
    }

    /// The pages images, and where their bytes are; without the empty ones.
    fn pages(&self) -> anyhow::Result<Vec<(Part<'a>, Place<'a>)>> {
        let mut pages = Vec::new();
        for part in self.parts.iter().filter(|part| part.is_pages()) {
            let size = part.object.get("size").and_then(Value::as_u64);
            let size = size.ok_or_else(|| anyhow!("{}: \"size\" is no number", part.file()))?;
            if let Some(place) = self.place(part, 0, size)? {
                pages.push((*part, place));
            }
        }
        Ok(pages)
    }

    /// Writes everything but pages.
    fn write_entries(&self, out: &mut impl Sink) -> anyhow::Result<()> {
        self.pages()?;
        for part in &self.parts {
            if part.is_pages() {
                if part.object.get("size").and_then(Value::as_u64) == Some(0) {
                    out.data(part, &[])?;
                }
                continue;
            }
            if part.image.payload() == Payload::Raw {
                let contents = self.contents(part, 0, part.object.get("payload"))?;
                copy(part, contents.unwrap_or(Contents::Bytes(Vec::new())), out)?;
                continue;
            }
            let entries = part.entries()?;
            if entries.is_empty() {
                out.data(part, &[])?;
            }
            for (index, entry) in entries.iter().enumerate() {
                out.entry(part, &part.message(index, entry)?)?;
                if let Some(contents) = self.contents(part, index, entry.get("payload"))? {
                    copy(part, contents, out)?;
                }
            }
        }
        Ok(())
    }

    fn write_dir(&self, path: &std::path::Path) -> anyhow::Result<()> {
        let mut dir = DirWriter::create(path)?;
        let cleanup = dir.cleanup();
        ckpt_cli::on_termination(move || cleanup.remove()).context("start a thread")?;
        self.write_entries(&mut dir)?;
        for (part, place) in self.pages()? {
            if part.image == Image::CkptPages {
                let blocks = PackedFile::open(place, &part.file())?;
                blocks.for_each_block(|block, _| dir.data(part.image, part.arg, block))?;
                continue;
            }
            lseek(place.file, i64::try_from(place.offset)?, Whence::SeekSet).with_context(|| part.file())?;
            if dir.pages_from(part.arg, place.file, place.len, &Facts::default())? < place.len {
                bail!("{}: the file shrank while it was being read", part.file());
            }
        }
        dir.finish()?;
        Ok(())
    }

    fn write_image(&self, output: File) -> anyhow::Result<()> {
        let [part] = &self.parts[..] else {
            bail!(ckpt_cli::UsageError(format!("--image: the document holds {} images", self.parts.len())));
        };
        if part.is_pages() {
            bail!(ckpt_cli::UsageError("--image: JSON carries no pages".to_owned()));
        }
        let mut out = std::io::BufWriter::new(output);
        file::write_header(&mut out, part.image).context("write the image")?;
        self.write_entries(&mut OneFile(&mut out))?;
        out.flush().context("write the image")
    }
}

/// Where images go.
trait Sink {
    fn entry(&mut self, part: &Part<'_>, message: &[u8]) -> anyhow::Result<()>;
    /// Nothing at all makes an image without entries.
    fn data(&mut self, part: &Part<'_>, bytes: &[u8]) -> anyhow::Result<()>;
}

impl Sink for Writer<File> {
    fn entry(&mut self, part: &Part<'_>, message: &[u8]) -> anyhow::Result<()> {
        Self::entry(self, part.image, part.arg, message).context("write the stream")
    }

    fn data(&mut self, part: &Part<'_>, bytes: &[u8]) -> anyhow::Result<()> {
        self.data_header(part.image.name(), part.arg, bytes.len() as u64).context("write the stream")?;
        self.data_bytes(bytes).context("write the stream")
    }
}

impl Sink for DirWriter {
    fn entry(&mut self, part: &Part<'_>, message: &[u8]) -> anyhow::Result<()> {
        Ok(Self::entry(self, part.image, part.arg, message)?)
    }

    fn data(&mut self, part: &Part<'_>, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(Self::data(self, part.image, part.arg, bytes)?)
    }
}

struct OneFile<'a, W>(&'a mut W);

impl<W: Write> Sink for OneFile<'_, W> {
    fn entry(&mut self, _: &Part<'_>, message: &[u8]) -> anyhow::Result<()> {
        file::write_entry(self.0, message).context("write the image")
    }

    fn data(&mut self, _: &Part<'_>, bytes: &[u8]) -> anyhow::Result<()> {
        self.0.write_all(bytes).context("write the image")
    }
}

fn copy(part: &Part<'_>, contents: Contents<'_>, out: &mut impl Sink) -> anyhow::Result<()> {
    let place = match contents {
        Contents::Bytes(bytes) => return out.data(part, &bytes),
        Contents::Place(place) => place,
    };
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < place.len {
        let want = usize::try_from(place.len - done).unwrap_or(usize::MAX).min(buffer.len());
        match pread(place.file, &mut buffer[..want], i64::try_from(place.offset + done)?)
            .with_context(|| part.file())?
        {
            0 => bail!("{}: the file shrank while it was being read", part.file()),
            n => {
                out.data(part, &buffer[..n])?;
                done += n as u64;
            }
        }
    }
    Ok(())
}
