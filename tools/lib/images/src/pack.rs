//! Compressed pages: blocks that stand for themselves.
//!
//! ```text
//! ckpt-pages-N.img = block | block | ...
//! block  = header, 24 bytes | stored bytes
//! header = "CKPB" | u8 codec | 3 x 0 | u32 plain length | u32 stored length | u64 XXH3-64   (little endian)
//! ```
//!
//! The checksum covers the first 16 bytes of the header and the stored bytes, and is compared before
//! anything is unpacked. A block never says that it unpacks to more than [`MAX_PLAIN`] bytes, the unpacker is given
//! a buffer of just the length that it says, and anything but exactly that many bytes is an error: so no
//! block costs more memory than a mebibyte, whatever is in it.
//!
//! There is no index: a block says where the next one is, and a walk over the headers
//! ([`PackedFile::open`]) reads a ten-thousandth of the file. What follows from it: a stream carries the very blocks of
//! the file, and a file can be appended to and cut between any two blocks.
//!
//! Not chosen: one zstd frame per file (no part of it can be read without all before it), the seekable
//! zstd format (its index comes last, lz4 has none).

use std::{fs::File, io, os::unix::fs::FileExt, str::FromStr};

use ckpt_proto::Image;
use xxhash_rust::xxh3::Xxh3Default;

use crate::{ImageError, Place};

/// Bytes of pages that go into one block: enough for the compressor to find what repeats, little enough to
/// unpack a block for one page of it.
pub const PLAIN: usize = 256 << 10;
/// Most bytes that a block may unpack to.
pub const MAX_PLAIN: usize = 1 << 20;
/// Length of a block's header.
pub const HEADER: usize = 24;
const MAGIC: [u8; 4] = *b"CKPB";

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// zstd with its level.
    Zstd(i32),
    /// LZ4 block format.
    Lz4,
}

impl FromStr for Codec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let levels = zstd::compression_level_range();
        let (name, level) = text.split_once(':').map_or((text, None), |(name, level)| (name, Some(level)));
        match (name, level) {
            ("zstd", None) => Ok(Self::Zstd(1)),
            ("zstd", Some(level)) => level
                .parse()
                .ok()
                .filter(|level| levels.contains(level))
                .map(Self::Zstd)
                .ok_or_else(|| format!("the levels of zstd are {} to {}", levels.start(), levels.end())),
            ("lz4", None) => Ok(Self::Lz4),
            ("lz4", Some(_)) => Err("lz4 has no levels".to_owned()),
            _ => Err("expected zstd, zstd:LEVEL or lz4".to_owned()),
        }
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Lz4 => f.write_str("lz4"),
        }
    }
}

/// How the bytes of a block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Plain = 0,
    Zstd = 1,
    Lz4 = 2,
    /// All zero: nothing is stored.
    Zeros = 3,
}

/// The header of a block, checked for sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    stored: Stored,
    /// Bytes that it unpacks to, at most [`MAX_PLAIN`].
    pub plain: usize,
    /// Bytes that follow the header, at most as many.
    pub len: usize,
    sum: u64,
}

/// What is wrong with a block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The header makes no sense.
    #[error("not a block of compressed pages: {0}")]
    Header(String),
    /// The bytes are not those that were written.
    #[error("the checksum of a block of compressed pages differs")]
    Sum,
    /// They do not unpack to what the header says.
    #[error("a block of compressed pages does not unpack to {plain} bytes")]
    Unpack {
        /// What the header says.
        plain: usize,
    },
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// It breaks the rules.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, BlockError> {
        let bad = |what: String| BlockError::Header(what);
        let (head, sum) = bytes.split_at(16);
        let word = |at: usize| {
            head.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes) as usize
        };
        if head[..4] != MAGIC || head[5..8] != [0; 3] {
            return Err(bad(format!("it begins with {:02x?}", &head[..8])));
        }
        let stored = match head[4] {
            0 => Stored::Plain,
            1 => Stored::Zstd,
            2 => Stored::Lz4,
            3 => Stored::Zeros,
            other => return Err(bad(format!("stored in an unknown way ({other})"))),
        };
        let (plain, len) = (word(8), word(12));
        if plain == 0 || plain > MAX_PLAIN {
            return Err(bad(format!("of {plain} bytes (the limit is {MAX_PLAIN})")));
        }
        let fits = match stored {
            Stored::Plain => len == plain,
            Stored::Zstd | Stored::Lz4 => len > 0 && len < plain,
            Stored::Zeros => len == 0,
        };
        if !fits {
            return Err(bad(format!("{plain} bytes stored in {len}")));
        }
        let sum = u64::from_le_bytes(sum.try_into().unwrap_or_default());
        Ok(Self { stored, plain, len, sum })
    }

    fn head(&self) -> [u8; 16] {
        let mut head = [0; 16];
        head[..4].copy_from_slice(&MAGIC);
        head[4] = self.stored as u8;
        // Both are at most MAX_PLAIN.
        head[8..12].copy_from_slice(&u32::try_from(self.plain).unwrap_or(0).to_le_bytes());
        head[12..].copy_from_slice(&u32::try_from(self.len).unwrap_or(0).to_le_bytes());
        head
    }

    /// Whether the bytes after the header are those that were written.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self, stored: &[u8]) -> Result<(), BlockError> {
        let mut hash = Xxh3Default::new();
        hash.update(&self.head());
        hash.update(stored);
        if hash.digest() == self.sum { Ok(()) } else { Err(BlockError::Sum) }
    }

    /// Unpacks the bytes after the header, checking them first.
    ///
    /// # Errors
    /// They are damaged.
    pub fn unpack(&self, stored: &[u8]) -> Result<Vec<u8>, BlockError> {
        self.check(stored)?;
        let bad = BlockError::Unpack { plain: self.plain };
        let mut plain = vec![0; self.plain];
        let n = match self.stored {
            Stored::Zeros => self.plain,
            Stored::Plain if stored.len() == self.plain => {
                plain.copy_from_slice(stored);
                self.plain
            }
            Stored::Plain => 0,
            Stored::Zstd => zstd::bulk::decompress_to_buffer(stored, &mut plain).unwrap_or(0),
            Stored::Lz4 => lz4_flex::block::decompress_into(stored, &mut plain).unwrap_or(0),
        };
        if n == self.plain { Ok(plain) } else { Err(bad) }
    }
}

/// A block of `plain`, header and all. What does not get smaller is stored as it is.
///
/// # Panics
/// `plain` is empty or longer than [`MAX_PLAIN`]: that is a bug of the caller.
#[must_use]
pub fn pack(codec: Codec, plain: &[u8]) -> Vec<u8> {
    assert!((1..=MAX_PLAIN).contains(&plain.len()), "a block of {} bytes", plain.len());
    let mut out = vec![0; HEADER + plain.len()];
    let room = &mut out[HEADER..];
    let (mut stored, mut len) = if is_zero(plain) {
        (Stored::Zeros, 0)
    } else {
        // A buffer of the plain length: what would not fit into it is no gain, and fails.
        match codec {
            Codec::Zstd(level) => {
                (Stored::Zstd, zstd::bulk::compress_to_buffer(plain, room, level).unwrap_or(plain.len()))
            }
            Codec::Lz4 => {
                let mut wide = vec![0; lz4_flex::block::get_maximum_output_size(plain.len())];
                let n = lz4_flex::block::compress_into(plain, &mut wide).unwrap_or(plain.len());
                if n < plain.len() {
                    room[..n].copy_from_slice(&wide[..n]);
                }
                (Stored::Lz4, n)
            }
        }
    };
    if stored != Stored::Zeros && (len == 0 || len >= plain.len()) {
        room.copy_from_slice(plain);
        (stored, len) = (Stored::Plain, plain.len());
    }
    out.truncate(HEADER + len);
    let mut header = Header { stored, plain: plain.len(), len, sum: 0 };
    let mut hash = Xxh3Default::new();
    hash.update(&header.head());
    hash.update(&out[HEADER..]);
    header.sum = hash.digest();
    out[..16].copy_from_slice(&header.head());
    out[16..HEADER].copy_from_slice(&header.sum.to_le_bytes());
    out
}

/// Whether there is nothing but zeros.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole words: the compiler makes vectors of them.
    let (words, rest) = bytes.as_chunks::<32>();
    rest.iter().all(|&b| b == 0) && words.iter().all(|word| *word == [0; 32])
}

/// A `ckpt-pages-N.img`, with the places of its blocks.
#[derive(Debug)]
pub struct PackedFile {
    file: File,
    name: String,
    /// Header, where it is in the file, and which plain byte the block begins with; ascending.
    blocks: Vec<(Header, u64, u64)>,
    plain: u64,
    /// The last block read.
    last: Option<(usize, Vec<u8>)>,
}

impl PackedFile {
    /// Walks over the headers.
    ///
    /// # Errors
    /// The file can't be read, is no sequence of blocks, or has more blocks than are ever kept in memory.
    pub fn open(place: Place<'_>, name: &str) -> Result<Self, ImageError> {
        const MAX_BLOCKS: usize = 1 << 24;
        let failed = |source| ImageError::io(name, "read")(source);
        let file = File::from(place.file.try_clone_to_owned().map_err(failed)?);
        let (mut at, end) = (place.offset, place.offset.saturating_add(place.len));
        let (mut blocks, mut plain) = (Vec::new(), 0);
        while at < end {
            let header = read_header(&file, at, end - at, name)?;
            if blocks.len() >= MAX_BLOCKS {
                let what = format!("more than {MAX_BLOCKS} blocks");
                return Err(ImageError::TooMuch { file: name.to_owned(), what });
            }
            blocks.push((header, at, plain));
            at += (HEADER + header.len) as u64;
            plain += header.plain as u64;
        }
        Ok(Self { file, name: name.to_owned(), blocks, plain, last: None })
    }

    /// All blocks as they are stored, checked, in their order.
    ///
    /// # Errors
    /// One is damaged, or can't be read; or `each` has failed.
    pub fn for_each_block<E: From<ImageError>>(
        &self,
        mut each: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut block = Vec::new();
        for &(header, at, _) in &self.blocks {
            block.resize(HEADER + header.len, 0);
            self.file.read_exact_at(&mut block, at).map_err(|e| ImageError::io(&self.name, "read")(e))?;
            header.check(&block[HEADER..]).map_err(|e| block_error(&self.name, at, &e))?;
            each(&block, header.plain as u64)?;
        }
        Ok(())
    }

    /// How many bytes of pages it holds.
    #[must_use]
    pub fn plain_len(&self) -> u64 {
        self.plain
    }

    /// Which plain bytes the block with byte `offset` has.
    pub(crate) fn block_at(&self, offset: u64) -> Option<std::ops::Range<u64>> {
        let index = self.blocks.partition_point(|&(_, _, start)| start <= offset).checked_sub(1)?;
        let &(header, _, start) = self.blocks.get(index)?;
        Some(start..start + header.plain as u64).filter(|block| block.contains(&offset))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Reads pages from plain byte `offset` on, unpacking the blocks that they are in.
    ///
    /// # Errors
    /// The block is damaged, or the file ends before.
    pub fn read_exact_at(&mut self, mut buffer: &mut [u8], mut offset: u64) -> Result<(), ImageError> {
        while !buffer.is_empty() {
            let index = self.blocks.partition_point(|&(_, _, start)| start <= offset).checked_sub(1);
            let Some((index, &(header, at, start))) = index.and_then(|i| Some((i, self.blocks.get(i)?)))
            else {
                return Err(self.ends());
            };
            if self.last.as_ref().is_none_or(|(last, _)| *last != index) {
                let plain = read_block(&self.file, header, at, &self.name)?;
                self.last = Some((index, plain));
            }
            let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
            let Some(bytes) =
                self.last.as_ref().and_then(|(_, plain)| plain.get(skip..)).filter(|b| !b.is_empty())
            else {
                return Err(self.ends());
            };
            let n = bytes.len().min(buffer.len());
            buffer[..n].copy_from_slice(&bytes[..n]);
            buffer = &mut buffer[n..];
            offset += n as u64;
        }
        Ok(())
    }

    pub(crate) fn ends(&self) -> ImageError {
        ImageError::Stream {
            file: self.name.clone(),
            what: "it holds fewer pages than the pagemap lists".to_owned(),
        }
    }
}

fn block_error(name: &str, offset: u64, source: &BlockError) -> ImageError {
    ImageError::Stream { file: name.to_owned(), what: format!("offset {offset}: {source}") }
}

fn read_header(file: &File, at: u64, left: u64, name: &str) -> Result<Header, ImageError> {
    let short = || block_error(name, at, &BlockError::Header("the file ends inside it".to_owned()));
    let mut bytes = [0; HEADER];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(short()),
        Err(e) => return Err(ImageError::io(name, "read")(e)),
    }
    let header = Header::parse(&bytes).map_err(|e| block_error(name, at, &e))?;
    if (HEADER + header.len) as u64 > left {
        return Err(short());
    }
    Ok(header)
}

fn read_block(file: &File, header: Header, at: u64, name: &str) -> Result<Vec<u8>, ImageError> {
    let mut stored = vec![0; header.len];
    file.read_exact_at(&mut stored, at + HEADER as u64).map_err(ImageError::io(name, "read"))?;
    header.unpack(&stored).map_err(|e| block_error(name, at, &e))
}

/// Checks one block of compressed pages number `id`, without unpacking it; how many bytes of pages it holds.
///
/// # Errors
/// It is damaged, or not just one.
pub fn check_block(block: &[u8], id: u64) -> Result<u64, ImageError> {
    split(block)
        .and_then(|(header, stored)| header.check(stored).map(|()| header.plain as u64))
        .map_err(|e| ImageError::Stream { file: Image::CkptPages.file_name(id), what: e.to_string() })
}

/// The pages in one block of compressed pages number `id`.
///
/// # Errors
/// It is damaged, or not just one.
pub fn unpack(block: &[u8], id: u64) -> Result<Vec<u8>, ImageError> {
    split(block)
        .and_then(|(header, stored)| header.unpack(stored))
        .map_err(|e| ImageError::Stream { file: Image::CkptPages.file_name(id), what: e.to_string() })
}

/// A block's header and what it stores.
///
/// # Errors
/// It is not just one block.
pub fn split(block: &[u8]) -> Result<(Header, &[u8]), BlockError> {
    let bad = || BlockError::Header(format!("{} bytes are not just one", block.len()));
    let (header, stored) = block.split_first_chunk::<HEADER>().ok_or_else(bad)?;
    let header = Header::parse(header)?;
    if header.len == stored.len() { Ok((header, stored)) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd, sync::LazyLock};

    use proptest::prelude::*;

    use super::*;

    const CODECS: [Codec; 2] = [Codec::Zstd(1), Codec::Lz4];

    fn unpack(block: &[u8]) -> Result<Vec<u8>, BlockError> {
        let (header, stored) = block.split_at_checked(HEADER).ok_or(BlockError::Sum)?;
        let header = Header::parse(header.try_into().unwrap())?;
        header.unpack(stored)
    }

    static SAMPLES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
        let mut random = 1_u64;
        let noise = (0..PLAIN).map(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            random.to_le_bytes()[7]
        });
        vec![
            vec![0; PLAIN],
            vec![7; 4096],
            noise.collect(),
            (0..=255).cycle().take(MAX_PLAIN).collect(),
            vec![1],
        ]
    });

    #[test]
    fn blocks_come_back_and_are_never_longer_than_a_header_more() {
        for codec in CODECS {
            for plain in SAMPLES.iter() {
                let block = pack(codec, plain);
                assert!(block.len() <= plain.len() + HEADER);
                assert_eq!(unpack(&block).unwrap(), *plain);
            }
        }
    }

    #[test]
    fn zeros_take_no_room() {
        assert_eq!(pack(Codec::Lz4, &[0; PLAIN]).len(), HEADER);
    }

    #[test]
    fn a_block_that_would_unpack_to_more_than_it_says_is_an_error() {
        // A bomb: a valid checksum over a header that promises less than what the compressor put in.
        for codec in CODECS {
            let block = pack(codec, &[9; MAX_PLAIN]);
            let mut header = Header::parse(block[..HEADER].try_into().unwrap()).unwrap();
            header.plain = 65536;
            let mut hash = Xxh3Default::new();
            hash.update(&header.head());
            hash.update(&block[HEADER..]);
            header.sum = hash.digest();
            assert_eq!(header.unpack(&block[HEADER..]), Err(BlockError::Unpack { plain: 65536 }), "{codec}");
        }
    }

    #[test]
    fn parts_of_a_file_are_read_where_they_are() {
        let plain: Vec<u8> = (0..3 * PLAIN as u32 + 4096).flat_map(|n| n.to_le_bytes()).collect();
        let mut file = tempfile::tempfile().unwrap();
        for part in plain.chunks(PLAIN) {
            file.write_all(&pack(Codec::Lz4, part)).unwrap();
        }
        let len = file.metadata().unwrap().len();
        let mut packed = PackedFile::open(Place { file: file.as_fd(), offset: 0, len }, "x").unwrap();
        assert_eq!(packed.plain_len(), plain.len() as u64);
        for (from, len) in [(0, 10), (PLAIN - 5, 10), (PLAIN * 2, PLAIN * 3), (plain.len() - 1, 1)] {
            let mut buffer = vec![0; len];
            packed.read_exact_at(&mut buffer, from as u64).unwrap();
            assert_eq!(buffer, plain[from..from + len]);
        }
        assert!(packed.read_exact_at(&mut [0; 2], plain.len() as u64 - 1).is_err());
        file.set_len(len - 1).unwrap();
        assert!(PackedFile::open(Place { file: file.as_fd(), offset: 0, len: len - 1 }, "x").is_err());
    }

    #[test]
    fn codecs_by_name() {
        assert_eq!("zstd:19".parse(), Ok(Codec::Zstd(19)));
        assert_eq!("lz4".parse(), Ok(Codec::Lz4));
        for wrong in ["", "zstd:", "zstd:99", "lz4:1", "gzip"] {
            assert!(wrong.parse::<Codec>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

        /// Whatever is done to a block, it unpacks to what was packed or not at all.
        #[test]
        fn damaged_blocks_are_errors(
            seed in 0..5_usize, lz4: bool, at: prop::sample::Index, bit in 0..8_u8, cut: Option<prop::sample::Index>,
        ) {
            let plain = &SAMPLES[seed];
            let mut block = pack(CODECS[usize::from(lz4)], plain);
            match cut {
                Some(cut) => block.truncate(cut.index(block.len())),
                None => {
                    let at = at.index(block.len());
                    block[at] ^= 1 << bit;
                }
            }
            prop_assert!(unpack(&block).is_err());
        }

        /// Whatever is done to a file of blocks, it gives the pages that were packed or none.
        #[test]
        fn damaged_files_are_errors(
            lz4: bool,
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cut: Option<prop::sample::Index>,
            end in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let plain: Vec<u8> = SAMPLES[1..3].concat();
            let mut bytes: Vec<u8> = SAMPLES[1..3].iter().flat_map(|p| pack(CODECS[usize::from(lz4)], p)).collect();
            for (at, byte) in &flips {
                // Most of the second block is noise, the headers are few.
                let at = if byte % 2 == 0 { at.index(bytes.len().min(200)) } else { at.index(bytes.len()) };
                bytes[at] ^= byte;
            }
            bytes.truncate(cut.map_or(bytes.len(), |cut| cut.index(bytes.len())));
            bytes.extend(&end);
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let place = Place { file: file.as_fd(), offset: 0, len: bytes.len() as u64 };
            if let Ok(mut packed) = PackedFile::open(place, "x") {
                let mut pages = vec![0; plain.len()];
                let whole = packed.read_exact_at(&mut pages, 0).is_ok();
                prop_assert!(!whole || pages == plain);
                let mut blocks = 0;
                let sound = packed.for_each_block(|_, plain| { blocks += plain; Ok::<(), ImageError>(()) }).is_ok();
                prop_assert!(!sound || blocks == packed.plain_len());
            }
        }

        /// Bytes of any kind, with a right checksum even, never unpack to more than the header says.
        #[test]
        fn hostile_blocks_stay_within_bounds(
            stored in prop::collection::vec(any::<u8>(), 0..4096), how in 0..5_u8, plain in 0..(2_u32 << 20),
        ) {
            let mut block = MAGIC.to_vec();
            block.extend([how, 0, 0, 0]);
            block.extend(plain.to_le_bytes());
            block.extend(u32::try_from(stored.len()).unwrap().to_le_bytes());
            let mut hash = Xxh3Default::new();
            hash.update(&block);
            hash.update(&stored);
            block.extend(hash.digest().to_le_bytes());
            block.extend(&stored);
            if let Ok(bytes) = unpack(&block) {
                prop_assert!(bytes.len() == plain as usize && bytes.len() <= MAX_PLAIN);
            }
        }
    }
}
