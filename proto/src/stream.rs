//! The checkpoint stream (normative text: `ckpt-stream(5)`).
//!
//! ```text
//! magic, 8 bytes | frame | frame | ... | END frame
//! frame = u32 header length | `frame` message | payload_len raw bytes
//! ```
//!
//! The reader never reads past the frame that it was asked for, so the payload of a bulk frame can
//! be moved by splice(2) straight from the same descriptor. A stream without END is an error for
//! everybody: a producer that dies leaves no half checkpoint behind.
//!
//! The checksum in END covers every byte before it except the payloads of [`Image::Pages`] frames,
//! which stages move without looking at them; those have a checksum each, in their header. Nor does it
//! cover [`Image::CkptPages`] (compressed pages), whose blocks have theirs inside.

use std::io::{self, Read, Write};

use prost::Message;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use crate::{
    Image, MAX_MESSAGE,
    types::{Frame as Header, Hello, PagemapEntry, frame::FrameKind},
};

/// First bytes of a stream; the last one is the version.
pub const MAGIC: [u8; 8] = *b"CKPTSTR\x01";
const GAVE_UP: &str = "the stage before gave up";
/// Longest frame header, bytes.
pub const MAX_HEADER: u32 = 1 << 16;

/// Why a stream could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The input failed.
    #[error("offset {offset}: read")]
    Io {
        /// Where in the stream.
        offset: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not a checkpoint stream.
    #[error("not a checkpoint stream (it begins with {found:02x?})")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// A stream of another version.
    #[error("stream version {found}, this tool reads version {}: use tools of one release in a pipeline", MAGIC[7])]
    Version {
        /// The version found.
        found: u8,
    },
    /// The input ended before the END record.
    #[error(
        "offset {offset}: the stream ends {at} without its end record: the stage before failed or was killed"
    )]
    Incomplete {
        /// Where in the stream.
        offset: u64,
        /// Inside what.
        at: &'static str,
    },
    /// The producer gave up and said why.
    #[error("{GAVE_UP}: {reason}")]
    Aborted {
        /// Its words.
        reason: String,
    },
    /// A frame that breaks the rules.
    #[error("offset {offset}: {what}")]
    Malformed {
        /// Where in the stream.
        offset: u64,
        /// Which rule.
        what: String,
    },
    /// The contents are not what the producer wrote.
    #[error("the stream was damaged on its way: {what}")]
    Damaged {
        /// What disagrees.
        what: String,
    },
}

/// A frame whose payload has not been read yet.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// First frame.
    Hello(Hello),
    /// One image message of `len` bytes.
    Entry {
        /// Catalogue name; may be unknown to this reader, which then passes it on.
        image: String,
        /// The number in the file name.
        arg: u64,
        /// Payload bytes, at most [`MAX_MESSAGE`].
        len: u64,
    },
    /// Raw contents, `len` bytes of them.
    Data {
        /// Catalogue name.
        image: String,
        /// The number in the file name.
        arg: u64,
        /// Payload bytes.
        len: u64,
        /// Of pages: XXH3-64 of the payload, if the producer gave it. It is checked by those who keep or
        /// use the pages, not by those who move them.
        sum: Option<u64>,
        /// Of pages: which are known to be all zero, see [`zero_ranges`].
        zeros: Vec<u32>,
    },
    /// From here on only DATA of PAGES.
    Bulk,
    /// Pages that lie in the writer's file already: contents of `pages-ARG.img` that are not in the stream. Only readers
    /// that have called [`Reader::takes_placed`] get it.
    Placed {
        /// The number in the file name.
        arg: u64,
        /// Where in the file, bytes.
        at: u64,
        /// How many bytes.
        len: u64,
        /// As of [`Frame::Data`].
        facts: Facts,
    },
}

/// Bytes of a page, as far as pages of zeros are told.
const ZERO_PAGE: u64 = 4096;

/// What a record's header says of its pages: checksum, and which of them are all zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// XXH3-64 of the contents.
    pub sum: Option<u64>,
    /// See [`zero_ranges`].
    pub zeros: Vec<u32>,
}

impl Facts {
    /// Looks at the contents of a record.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { sum: Some(xxh3_64(bytes)), zeros: zero_pages(bytes) }
    }

    /// How many pages are known to be all zero.
    #[must_use]
    pub fn zero_pages(&self) -> u64 {
        zero_ranges(&self.zeros).map(|(_, len)| len / ZERO_PAGE).sum()
    }
}

/// Which pages of `bytes` are all zero: pairs of a page's number and how many follow.
#[must_use]
pub fn zero_pages(bytes: &[u8]) -> Vec<u32> {
    let mut zeros: Vec<u32> = Vec::new();
    let (pages, _) = bytes.as_chunks::<{ ZERO_PAGE as usize }>();
    for (number, page) in (0_u32..).zip(pages) {
        // Most pages differ in their first bytes.
        let (words, _) = page.as_chunks::<64>();
        if !words.iter().all(|word| *word == [0; 64]) {
            continue;
        }
        match zeros.as_mut_slice() {
            [.., first, count] if *first + *count == number => *count += 1,
            _ => zeros.extend([number, 1]),
        }
    }
    zeros
}

/// Pages of zeros as offsets and lengths in bytes, from the pairs in a record's header.
pub fn zero_ranges(zeros: &[u32]) -> impl Iterator<Item = (u64, u64)> {
    let (pairs, _) = zeros.as_chunks::<2>();
    pairs.iter().map(|&[first, count]| (u64::from(first) * ZERO_PAGE, u64::from(count) * ZERO_PAGE))
}

/// How many pages an entry of a pagemap leaves to the parent. Its head is no entry, and leaves none.
fn parent_pages(message: &[u8]) -> u64 {
    const IN_PARENT: u32 = 1;
    let entry = PagemapEntry::decode(message).unwrap_or_default();
    let here = entry.flags.map_or(!entry.in_parent(), |flags| flags & IN_PARENT == 0);
    if here { 0 } else { entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages)) }
}

/// Reads a stream.
pub struct Reader<R> {
    input: R,
    offset: u64,
    frames: u64,
    /// Bytes of the current payload that have not been read yet.
    pending: u64,
    hashed: bool,
    bulk: bool,
    /// HELLO says that there may be compressed pages.
    packed: bool,
    hash: Xxh3Default,
    ended: bool,
    ignore_sums: bool,
    takes_placed: bool,
}

/// Whether contents of this kind move without being looked at.
fn is_bulk(image: &str) -> bool {
    image == Image::Pages.name() || image == Image::CkptPages.name()
}

impl<R> std::fmt::Debug for Reader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("offset", &self.offset)
            .field("frames", &self.frames)
            .finish_non_exhaustive()
    }
}

impl<R: Read> Reader<R> {
    /// Reads the magic and the HELLO frame.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub fn open(input: R) -> Result<(Self, Hello), StreamError> {
        let mut reader = Self {
            input,
            offset: 0,
            frames: 0,
            pending: 0,
            hashed: true,
            bulk: false,
            packed: false,
            hash: Xxh3Default::new(),
            ended: false,
            ignore_sums: false,
            takes_placed: false,
        };
        let mut magic = [0; 8];
        reader.exact(&mut magic, "at its start")?;
        if magic[..7] != MAGIC[..7] {
            return Err(StreamError::Magic { found: magic });
        }
        if magic != MAGIC {
            return Err(StreamError::Version { found: magic[7] });
        }
        match reader.next_frame()? {
            Some(Frame::Hello(hello)) => {
                reader.packed = hello.packed();
                Ok((reader, hello))
            }
            _ => Err(reader.malformed("the first frame is not HELLO")),
        }
    }

    /// From here on records of pages are given without their checksums.
    pub fn ignore_sums(&mut self) {
        self.ignore_sums = true;
    }

    /// From here on pages that are not in the stream are no error: the caller has a hand in where they are.
    pub fn takes_placed(&mut self) {
        self.takes_placed = true;
    }

    /// Where in the stream the reader is, bytes from its start.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    fn malformed(&self, what: impl Into<String>) -> StreamError {
        StreamError::Malformed { offset: self.offset, what: what.into() }
    }

    fn exact(&mut self, buffer: &mut [u8], at: &'static str) -> Result<(), StreamError> {
        self.input.read_exact(buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::Incomplete { offset: self.offset, at },
            _ => StreamError::Io { offset: self.offset, source },
        })?;
        self.offset += buffer.len() as u64;
        if self.hashed {
            self.hash.update(buffer);
        }
        Ok(())
    }

    /// The next frame; `None` after a good END. What is left of the last frame's payload is skipped.
    ///
    /// # Errors
    /// See [`StreamError`]; ABORT is an error too.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, StreamError> {
        if self.ended {
            return Ok(None);
        }
        self.copy_payload(&mut io::sink())?;
        self.hashed = true;
        let (frames, checksum) = (self.frames, self.hash.digest());
        let mut word = [0; 4];
        self.exact(&mut word, "between two records")?;
        let length = u32::from_le_bytes(word);
        if length > MAX_HEADER {
            return Err(
                self.malformed(format!("a record header of {length} bytes (the limit is {MAX_HEADER})"))
            );
        }
        let mut header = vec![0; length as usize];
        self.exact(&mut header, "inside a record")?;
        crate::file::check_message("frame", &header)
            .map_err(|e| self.malformed(format!("not a record: {e}")))?;
        let header = Header::decode(&header[..]).map_err(|e| self.malformed(format!("not a record: {e}")))?;
        let kind = FrameKind::try_from(header.kind)
            .map_err(|_| self.malformed(format!("record of unknown kind {}", header.kind)))?;
        self.frames += 1;
        let len = header.payload_len.unwrap_or(0);
        if len > 0 && !matches!(kind, FrameKind::Entry | FrameKind::Data) {
            return Err(self.malformed("a payload on a record that has none"));
        }
        if (frames == 0) != (kind == FrameKind::Hello) && kind != FrameKind::Abort {
            return Err(self.malformed("HELLO must be the first record, once"));
        }
        if self.bulk
            && !matches!(kind, FrameKind::Data | FrameKind::Placed | FrameKind::Abort | FrameKind::End)
        {
            return Err(self.malformed("a record other than DATA after BULK"));
        }
        let (image, arg) = (header.image.unwrap_or_default(), header.arg.unwrap_or(0));
        match kind {
            FrameKind::Hello => {
                let hello = header.hello.ok_or_else(|| self.malformed("an empty HELLO"))?;
                Ok(Some(Frame::Hello(hello)))
            }
            FrameKind::Entry => {
                if len > u64::from(MAX_MESSAGE) {
                    return Err(
                        self.malformed(format!("an entry of {len} bytes (the limit is {MAX_MESSAGE})"))
                    );
                }
                self.pending = len;
                Ok(Some(Frame::Entry { image, arg, len }))
            }
            FrameKind::Data => {
                if self.bulk && !is_bulk(&image) {
                    return Err(self.malformed("DATA of another image than PAGES after BULK"));
                }
                // So that nobody takes them for plain ones who has not been told.
                if image == Image::CkptPages.name() && !self.packed {
                    return Err(self.malformed("compressed pages, of which HELLO says nothing"));
                }
                self.pending = len;
                self.hashed = !is_bulk(&image);
                let Facts { sum, zeros } = self.facts(header.payload_xxh3, header.zeros, len)?;
                Ok(Some(Frame::Data { image, arg, len, sum, zeros }))
            }
            FrameKind::Placed => {
                if !self.takes_placed {
                    return Err(self.malformed("pages that lie in the directory of another pipeline"));
                }
                let (Some(at), Some(len)) = (header.placed_at, header.placed_len) else {
                    return Err(self.malformed("pages that lie nowhere"));
                };
                let facts = self.facts(header.payload_xxh3, header.zeros, len)?;
                Ok(Some(Frame::Placed { arg, at, len, facts }))
            }
            FrameKind::Bulk => {
                self.bulk = true;
                Ok(Some(Frame::Bulk))
            }
            FrameKind::Abort => Err(StreamError::Aborted {
                reason: header.reason.unwrap_or_else(|| "no reason given".to_owned()),
            }),
            FrameKind::End => {
                if header.frames != Some(frames) {
                    let what = format!("{frames} records came, the end record counts {:?}", header.frames);
                    return Err(StreamError::Damaged { what });
                }
                if header.checksum != Some(checksum) {
                    return Err(StreamError::Damaged {
                        what: "the checksum in the end record differs".to_owned(),
                    });
                }
                self.ended = true;
                Ok(None)
            }
        }
    }

    /// What a header says of `len` bytes of pages.
    fn facts(&self, sum: Option<u64>, zeros: Vec<u32>, len: u64) -> Result<Facts, StreamError> {
        let (pairs, odd) = zeros.as_chunks::<2>();
        let ends = pairs.iter().map(|&[first, count]| u64::from(first) + u64::from(count));
        if !odd.is_empty() || ends.max().is_some_and(|end| end > len / ZERO_PAGE) {
            return Err(self.malformed("zero pages that are not in the record"));
        }
        Ok(Facts { sum: sum.filter(|_| !self.ignore_sums), zeros })
    }

    /// The rest of the current payload, in memory. Only for payloads that are small by nature: more
    /// than `limit` bytes are an error.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub fn payload(&mut self, limit: u64) -> Result<Vec<u8>, StreamError> {
        if self.pending > limit {
            return Err(
                self.malformed(format!("{} bytes of contents where at most {limit} can be", self.pending))
            );
        }
        let mut bytes = Vec::new();
        self.copy_payload(&mut bytes)?;
        Ok(bytes)
    }

    /// Copies the rest of the current payload to `out`, through a small buffer; returns its length.
    ///
    /// # Errors
    /// See [`StreamError`]; a failure of `out` is `Io` too.
    pub fn copy_payload(&mut self, out: &mut impl Write) -> Result<u64, StreamError> {
        let mut buffer = [0; 1 << 14];
        let mut copied = 0;
        while self.pending > 0 {
            let n = usize::try_from(self.pending).unwrap_or(usize::MAX).min(buffer.len());
            self.exact(&mut buffer[..n], "inside a record's contents")?;
            self.pending -= n as u64;
            copied += n as u64;
            out.write_all(&buffer[..n]).map_err(|source| StreamError::Io { offset: self.offset, source })?;
        }
        Ok(copied)
    }

    /// Reads the next bytes of the current payload.
    ///
    /// # Errors
    /// See [`StreamError`]; fewer bytes than the buffer's are left.
    pub fn read_payload(&mut self, buffer: &mut [u8]) -> Result<(), StreamError> {
        let n = buffer.len() as u64;
        let Some(left) = self.pending.checked_sub(n) else {
            return Err(self.malformed(format!("{} bytes of contents where {n} should be", self.pending)));
        };
        self.exact(buffer, "inside a record's contents")?;
        self.pending = left;
        Ok(())
    }

    /// Bytes of the current payload that have not been read.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// The input itself, to move payload bytes of [`Image::Pages`] or [`Image::CkptPages`] by other means; report them with
    /// [`Self::moved`]. `None` if the current payload is one that the checksum covers.
    pub fn bulk_input(&mut self) -> Option<&mut R> {
        (!self.hashed && self.pending > 0).then_some(&mut self.input)
    }

    /// `n` bytes of the current payload were taken from [`Self::bulk_input`].
    ///
    /// # Panics
    /// If these are more than there were: that is a bug of the caller.
    pub fn moved(&mut self, n: u64) {
        assert!(!self.hashed && n <= self.pending, "more bytes moved than the record holds");
        self.pending -= n;
        self.offset += n;
    }

    /// The error for an input that ended inside bulk contents.
    pub fn ended_in_bulk(&self) -> StreamError {
        StreamError::Incomplete { offset: self.offset, at: "inside a record's contents" }
    }
}

/// What went through a [`Writer`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes of plain pages.
    pub page_bytes: u64,
    /// Pages among them that are known to be all zero.
    pub zero_pages: u64,
    /// Pages that the parent has, by the pagemaps.
    pub parent_pages: u64,
}

/// Writes a stream.
pub struct Writer<W> {
    out: W,
    frames: u64,
    counts: Counts,
    hash: Xxh3Default,
}

impl<W> std::fmt::Debug for Writer<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("frames", &self.frames).finish_non_exhaustive()
    }
}

impl<W: Write> Writer<W> {
    /// Writes the magic and HELLO.
    ///
    /// # Errors
    /// The output's.
    pub fn open(out: W, hello: Hello) -> io::Result<Self> {
        let mut writer = Self { out, frames: 0, counts: Counts::default(), hash: Xxh3Default::new() };
        writer.put(&MAGIC)?;
        writer
            .header(Header { kind: FrameKind::Hello.into(), hello: Some(hello), ..Header::default() }, &[])?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }

    /// Header and a small payload go out in one write, so that a pipe carries them as one piece.
    fn header(&mut self, header: Header, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(header.encoded_len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(4 + length as usize + payload.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        header.encode(&mut bytes).map_err(io::Error::other)?;
        bytes.extend_from_slice(payload);
        self.frames += 1;
        self.put(&bytes)
    }

    /// Writes one image message.
    ///
    /// # Errors
    /// The output's.
    pub fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> io::Result<()> {
        self.entry_named(image.name(), arg, message)
    }

    /// Like [`Self::entry`], for a kind that may not be in the catalogue.
    ///
    /// # Errors
    /// The output's.
    pub fn entry_named(&mut self, image: &str, arg: u64, message: &[u8]) -> io::Result<()> {
        if image == Image::Pagemap.name() || image == Image::ShmemPagemap.name() {
            self.counts.parent_pages += parent_pages(message);
        }
        self.payload_frame(FrameKind::Entry, image, arg, message.len() as u64, message)
    }

    /// Writes raw contents. An empty slice writes nothing.
    ///
    /// # Errors
    /// The output's.
    pub fn data(&mut self, image: Image, arg: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if is_bulk(image.name()) {
            let facts = if image == Image::Pages { Facts::of(bytes) } else { Facts::default() };
            self.bulk_named(image.name(), arg, bytes.len() as u64, facts)?;
            return self.out.write_all(bytes);
        }
        self.payload_frame(FrameKind::Data, image.name(), arg, bytes.len() as u64, bytes)
    }

    fn payload_frame(
        &mut self,
        kind: FrameKind,
        image: &str,
        arg: u64,
        len: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let header = Header {
            kind: kind.into(),
            payload_len: Some(len),
            image: Some(image.to_owned()),
            arg: Some(arg),
            ..Header::default()
        };
        self.header(header, bytes)
    }

    /// Announces `len` bytes of pages, of which `facts` are known; the caller then moves them to
    /// [`Self::output`].
    ///
    /// # Errors
    /// The output's.
    pub fn bulk_data(&mut self, arg: u64, len: u64, facts: Facts) -> io::Result<()> {
        self.bulk_named(Image::Pages.name(), arg, len, facts)
    }

    /// Like [`Self::bulk_data`], of [`Image::Pages`] or [`Image::CkptPages`].
    ///
    /// # Errors
    /// The output's.
    pub fn bulk_named(&mut self, image: &str, arg: u64, len: u64, facts: Facts) -> io::Result<()> {
        if image == Image::Pages.name() {
            self.count_pages(len, &facts);
        }
        let header = Header {
            kind: FrameKind::Data.into(),
            payload_len: Some(len),
            image: Some(image.to_owned()),
            arg: Some(arg),
            payload_xxh3: facts.sum,
            zeros: facts.zeros,
            ..Header::default()
        };
        self.header(header, &[])
    }

    /// Says that `len` bytes of pages have been written at `at` of the writer's `pages-ARG.img`.
    ///
    /// # Errors
    /// The output's.
    pub fn placed(&mut self, arg: u64, at: u64, len: u64, facts: Facts) -> io::Result<()> {
        self.count_pages(len, &facts);
        let header = Header {
            kind: FrameKind::Placed.into(),
            arg: Some(arg),
            placed_at: Some(at),
            placed_len: Some(len),
            payload_xxh3: facts.sum,
            zeros: facts.zeros,
            ..Header::default()
        };
        self.header(header, &[])
    }

    fn count_pages(&mut self, len: u64, facts: &Facts) {
        self.counts.page_bytes += len;
        self.counts.zero_pages += facts.zero_pages();
    }

    /// Announces `len` bytes of contents of another kind, to be given to [`Self::data_bytes`].
    ///
    /// # Errors
    /// The output's.
    pub fn data_header(&mut self, image: &str, arg: u64, len: u64) -> io::Result<()> {
        self.payload_frame(FrameKind::Data, image, arg, len, &[])
    }

    /// Part of the contents announced by [`Self::data_header`].
    ///
    /// # Errors
    /// The output's.
    pub fn data_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.put(bytes)
    }

    /// What went through so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The output itself, for bytes announced by [`Self::bulk_data`].
    pub fn output(&mut self) -> &mut W {
        &mut self.out
    }

    /// Promises that only pages follow.
    ///
    /// # Errors
    /// The output's.
    pub fn bulk(&mut self) -> io::Result<()> {
        self.header(Header { kind: FrameKind::Bulk.into(), ..Header::default() }, &[])
    }

    /// Tells the reader why there will be no END: the first line of `reason`. The words of a stage further
    /// up are handed on as they are, without one more "gave up" in front.
    ///
    /// # Errors
    /// The output's.
    pub fn abort(mut self, reason: &str) -> io::Result<()> {
        let reason = reason.lines().next().unwrap_or_default();
        let reason = reason.trim_start_matches(GAVE_UP).trim_start_matches(": ");
        let header =
            Header { kind: FrameKind::Abort.into(), reason: Some(reason.to_owned()), ..Header::default() };
        self.header(header, &[])?;
        self.out.flush()
    }

    /// Completes the stream and gives the output back.
    ///
    /// # Errors
    /// The output's.
    pub fn end(mut self) -> io::Result<W> {
        let header = Header {
            kind: FrameKind::End.into(),
            frames: Some(self.frames),
            checksum: Some(self.hash.digest()),
            ..Header::default()
        };
        self.header(header, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Hands `frame`, the last one `reader` returned, and its payload on to `writer` unchanged.
/// Payloads go through a small buffer; `ckpt_images::stage::forward` moves pages by splice(2).
///
/// # Errors
/// The input's, or the output's as `Io`.
pub fn forward<R: Read, W: Write>(
    reader: &mut Reader<R>,
    frame: &Frame,
    writer: &mut Writer<W>,
) -> Result<(), StreamError> {
    struct Hashed<'a, W>(&'a mut Writer<W>);
    impl<W: Write> Write for Hashed<'_, W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.data_bytes(bytes)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let failed = |offset| move |source| StreamError::Io { offset, source };
    let offset = reader.offset();
    match frame {
        Frame::Hello(_) => Ok(()),
        Frame::Entry { image, arg, .. } => {
            let message = reader.payload(u64::from(MAX_MESSAGE))?;
            writer.entry_named(image, *arg, &message).map_err(failed(offset))
        }
        Frame::Data { image, arg, len, sum, zeros } if is_bulk(image) => {
            let facts = Facts { sum: *sum, zeros: zeros.clone() };
            writer.bulk_named(image, *arg, *len, facts).map_err(failed(offset))?;
            reader.copy_payload(writer.output()).map(drop)
        }
        Frame::Data { image, arg, len, .. } => {
            writer.data_header(image, *arg, *len).map_err(failed(offset))?;
            reader.copy_payload(&mut Hashed(writer)).map(drop)
        }
        Frame::Bulk => writer.bulk().map_err(failed(offset)),
        Frame::Placed { arg, at, len, facts } => {
            writer.placed(*arg, *at, *len, facts.clone()).map_err(failed(offset))
        }
    }
}
