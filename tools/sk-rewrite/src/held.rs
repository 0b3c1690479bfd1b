//! Queues that are kept back, in a temporary file, until all sockets are known.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
};

use anyhow::Context;
use ckpt_images::ImageError;
use ckpt_proto::{
    Image, MAX_MESSAGE,
    stream::{Reader, Writer},
};

/// An entry and where what follows it is in the temporary file.
#[derive(Debug)]
pub struct Entry {
    /// Kind of image.
    pub image: Image,
    /// Number of the image.
    pub arg: u64,
    /// The message.
    pub message: Vec<u8>,
    /// Offset and length of the pieces of its contents.
    pieces: Vec<(u64, u64)>,
}

/// What is kept back.
#[derive(Debug)]
pub struct Held {
    file: File,
    written: u64,
    entries: Vec<Entry>,
    /// The entry that contents of an image belong to.
    current: HashMap<(Image, u64), usize>,
    memory: u64,
}

impl Held {
    /// Nothing yet.
    ///
    /// # Errors
    /// No temporary file.
    pub fn new() -> anyhow::Result<Self> {
        let file = tempfile::tempfile().context("temporary file")?;
        Ok(Self { file, written: 0, entries: Vec::new(), current: HashMap::new(), memory: 0 })
    }

    fn remember(&mut self, image: Image, arg: u64, bytes: usize) -> anyhow::Result<()> {
        // What an entry costs beyond its message.
        const EACH: u64 = 128;
        self.memory += u64::try_from(bytes)? + EACH;
        if self.memory > ckpt_images::MAX_MEMORY {
            let what = "too many packets to keep back".to_owned();
            return Err(ImageError::TooMuch { file: image.file_name(arg), what }.into());
        }
        Ok(())
    }

    /// Keeps an entry; its contents follow.
    pub fn keep_entry(&mut self, image: Image, arg: u64, message: Vec<u8>) -> anyhow::Result<()> {
        self.remember(image, arg, message.len())?;
        self.current.insert((image, arg), self.entries.len());
        self.entries.push(Entry { image, arg, message, pieces: Vec::new() });
        Ok(())
    }

    /// Keeps the contents that `reader` is at.
    pub fn keep_data(&mut self, image: Image, arg: u64, reader: &mut Reader<File>) -> anyhow::Result<()> {
        let len = reader.copy_payload(&mut self.file)?;
        let at = self.written;
        self.written += len;
        self.remember(image, arg, 0)?;
        match self.current.get(&(image, arg)).and_then(|&index| self.entries.get_mut(index)) {
            Some(entry) => entry.pieces.push((at, len)),
            // The image exists without entries; the writer of the directory wants to know.
            None if len == 0 => {
                self.entries.push(Entry { image, arg, message: Vec::new(), pieces: Vec::new() });
            }
            None => {
                let what = "contents before any entry".to_owned();
                return Err(ImageError::Stream { file: image.file_name(arg), what }.into());
            }
        }
        Ok(())
    }

    /// Writes all that was kept. `edit` gives each entry's message, and which bytes of its contents stay; `None`
    /// leaves out the entry. An image of many entries stays, though empty,
    /// when all of its entries go.
    pub fn write(
        mut self,
        writer: &mut Writer<File>,
        edit: impl Fn(&Entry) -> anyhow::Result<Option<(Vec<u8>, Range<u64>)>>,
    ) -> anyhow::Result<()> {
        let mut gone: HashMap<(Image, u64), bool> = HashMap::new();
        for entry in &self.entries {
            let (image, arg) = (entry.image, entry.arg);
            if entry.message.is_empty() {
                writer.data_header(image.name(), arg, 0).context("write the stream")?;
                continue;
            }
            let Some((message, stays)) = edit(entry)? else {
                gone.entry((image, arg)).or_insert(true);
                continue;
            };
            gone.insert((image, arg), false);
            writer.entry(image, arg, &message).context("write the stream")?;
            let mut begin = 0;
            for &(at, len) in &entry.pieces {
                let (from, to) = (stays.start.clamp(begin, begin + len), stays.end.clamp(begin, begin + len));
                copy(&mut self.file, at + (from - begin), to.saturating_sub(from), image, arg, writer)?;
                begin += len;
            }
        }
        for ((image, arg), _) in gone.into_iter().filter(|((image, _), gone)| *gone && !image.single()) {
            writer.data_header(image.name(), arg, 0).context("write the stream")?;
        }
        Ok(())
    }
}

fn copy(
    file: &mut File,
    at: u64,
    len: u64,
    image: Image,
    arg: u64,
    writer: &mut Writer<File>,
) -> anyhow::Result<()> {
    if len == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(at)).context("temporary file")?;
    writer.data_header(image.name(), arg, len).context("write the stream")?;
    let mut contents = file.take(len);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match contents.read(&mut buffer).context("temporary file")? {
            0 => return Ok(()),
            n => writer.data_bytes(buffer.get(..n).unwrap_or_default()).context("write the stream")?,
        }
    }
}

/// The message of the entry that `reader` is at.
pub fn message(reader: &mut Reader<File>) -> anyhow::Result<Vec<u8>> {
    Ok(reader.payload(u64::from(MAX_MESSAGE))?)
}
