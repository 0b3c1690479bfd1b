//! Image files.
//!
//! ```text
//! u32 COMMON_MAGIC | u32 magic | entry | entry | ...        most images
//!                    u32 magic | entry                      inventory.img
//! raw bytes                                                 pages-N.img and other raw images
//!
//! entry = u32 length | protobuf message | payload (by the catalogue's rule, mostly empty)
//! ```
//!
//! All integers are little endian. [`Reader`] walks a file of known size without holding it in
//! memory: payloads are given as a place in the file, to be moved by the kernel.

use std::io::{self, Read, Write};

pub use crate::check::{MessageError, check_message};
use crate::{Image, MAX_MESSAGE, Payload, PayloadLen, catalogue::COMMON_MAGIC};

/// Why an image file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file could not be read at all.
    #[error("offset {offset}: read")]
    Io {
        /// Where in the file.
        offset: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file starts with the wrong word.
    #[error("offset {offset}: magic is {found:#010x}, an image of kind {kind} has {expected:#010x}")]
    Magic {
        /// Where in the file.
        offset: u64,
        /// The word found.
        found: u32,
        /// The word that belongs there.
        expected: u32,
        /// Catalogue name of the kind.
        kind: &'static str,
    },
    /// The file ends inside something.
    #[error("offset {offset}: the file ends inside {what}")]
    Truncated {
        /// Where in the file.
        offset: u64,
        /// Inside what.
        what: &'static str,
    },
    /// A length that no entry has.
    #[error("offset {offset}: an entry of {length} bytes (the limit is {MAX_MESSAGE})")]
    TooLong {
        /// Where in the file.
        offset: u64,
        /// The length found.
        length: u32,
    },
    /// A message that is not what the catalogue says.
    #[error("offset {offset}: not a {message}: {source}")]
    Decode {
        /// Where in the file.
        offset: u64,
        /// Name of the message type.
        message: &'static str,
        /// What the decoder said.
        source: MessageError,
    },
    /// More or fewer entries than the kind has.
    #[error("offset {offset}: {what}")]
    Count {
        /// Where in the file.
        offset: u64,
        /// What is wrong with the number.
        what: &'static str,
    },
}

/// One entry of an image file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The message, encoded. It has been checked: well formed, nothing required missing.
    pub message: Vec<u8>,
    /// Where in the file the payload starts.
    pub payload_offset: u64,
    /// How long it is, bytes.
    pub payload_len: u64,
}

/// Reads one image file.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    image: Image,
    offset: u64,
    size: u64,
    index: usize,
}

impl<R: Read> Reader<R> {
    /// Starts reading a file of `size` bytes that is said to be of kind `image`; checks its magic.
    ///
    /// # Errors
    /// See [`FileError`]. Raw images have no structure and are refused here.
    pub fn new(input: R, image: Image, size: u64) -> Result<Self, FileError> {
        let mut reader = Self { input, image, offset: 0, size, index: 0 };
        if image.payload() == Payload::Raw {
            return Err(FileError::Count { offset: 0, what: "a raw image has no entries" });
        }
        if image.has_common_magic() {
            reader.magic(COMMON_MAGIC)?;
        }
        reader.magic(image.magic())?;
        Ok(reader)
    }

    fn magic(&mut self, expected: u32) -> Result<(), FileError> {
        let offset = self.offset;
        let found = self.u32("the magic")?;
        if found != expected {
            return Err(FileError::Magic { offset, found, expected, kind: self.image.name() });
        }
        Ok(())
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, FileError> {
        let mut word = [0; 4];
        self.exact(&mut word, what)?;
        Ok(u32::from_le_bytes(word))
    }

    fn exact(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), FileError> {
        let offset = self.offset;
        self.input.read_exact(buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => FileError::Truncated { offset, what },
            _ => FileError::Io { offset, source },
        })?;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    /// The next entry, or `None` at a clean end. The payload is left in the input: read exactly
    /// `payload_len` bytes of it (or call [`Self::skip_payload`]) before the next call.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>, FileError> {
        if self.offset == self.size {
            if self.image.single() && self.index == 0 {
                return Err(FileError::Count { offset: self.offset, what: "the file holds no entry" });
            }
            return Ok(None);
        }
        if self.image.single() && self.index == 1 {
            return Err(FileError::Count { offset: self.offset, what: "bytes after the only entry" });
        }
        let start = self.offset;
        let length = self.u32("an entry's length")?;
        if length > MAX_MESSAGE {
            return Err(FileError::TooLong { offset: start, length });
        }
        if u64::from(length) > self.size.saturating_sub(self.offset) {
            return Err(FileError::Truncated { offset: self.size, what: "an entry" });
        }
        let mut message = vec![0; length as usize];
        self.exact(&mut message, "an entry")?;
        if let Some(name) = self.image.entry_message(self.index) {
            check_message(name, &message).map_err(|source| FileError::Decode {
                offset: start,
                message: name,
                source,
            })?;
        }
        let left = self.size.saturating_sub(self.offset);
        let payload_len = match self.image.payload_len(&message) {
            Ok(PayloadLen::Exact(n)) => n,
            Ok(PayloadLen::Rest) => left,
            Err(source) => {
                let message = self.image.message().unwrap_or("message");
                let source =
                    MessageError { message: message.to_owned(), offset: 0, what: source.to_string() };
                return Err(FileError::Decode { offset: start, message, source });
            }
        };
        if payload_len > left {
            return Err(FileError::Truncated { offset: self.size, what: "an entry's raw bytes" });
        }
        self.index += 1;
        let payload_offset = self.offset;
        self.offset += payload_len;
        Ok(Some(Entry { message, payload_offset, payload_len }))
    }

    /// Reads the payload of `entry`, the last one returned, into memory.
    ///
    /// # Errors
    /// The file ends before it.
    pub fn payload(&mut self, entry: &Entry) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(entry.payload_len).read_to_end(&mut bytes);
        match read {
            Ok(n) if n as u64 == entry.payload_len => Ok(bytes),
            Ok(_) => Err(FileError::Truncated { offset: entry.payload_offset, what: "an entry's raw bytes" }),
            Err(source) => Err(FileError::Io { offset: entry.payload_offset, source }),
        }
    }

    /// Passes over the payload of `entry`, the last one returned.
    ///
    /// # Errors
    /// The file ends before it.
    pub fn skip_payload(&mut self, entry: &Entry) -> Result<(), FileError> {
        let skipped = io::copy(&mut (&mut self.input).take(entry.payload_len), &mut io::sink());
        match skipped {
            Ok(n) if n == entry.payload_len => Ok(()),
            Ok(_) => Err(FileError::Truncated { offset: entry.payload_offset, what: "an entry's raw bytes" }),
            Err(source) => Err(FileError::Io { offset: entry.payload_offset, source }),
        }
    }
}

/// Writes the magic of a file of kind `image`; nothing for raw images.
///
/// # Errors
/// The output's.
pub fn write_header(out: &mut impl Write, image: Image) -> io::Result<()> {
    if image.payload() == Payload::Raw {
        return Ok(());
    }
    if image.has_common_magic() {
        out.write_all(&COMMON_MAGIC.to_le_bytes())?;
    }
    out.write_all(&image.magic().to_le_bytes())
}

/// Writes one entry's length and message; its payload, if any, is the caller's to add.
///
/// # Errors
/// The output's; a message over [`MAX_MESSAGE`] is `InvalidInput`.
pub fn write_entry(out: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len())
        .ok()
        .filter(|&n| n <= MAX_MESSAGE)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "image message over the size limit"))?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(message)
}
