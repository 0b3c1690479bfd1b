//! Pages on demand, from any place in any pages file of a set, plain or compressed, in the directory itself or in
//! an earlier one of its chain.
//!
//! A file is read in *units*, which are what a checksum covers: the pieces of the manifest, the blocks of a compressed
//! file; a mebibyte where there is no checksum. What is given out was compared before. A few units are kept, because
//! neighbours in memory are neighbours in the file, too.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    ops::Range,
    os::fd::{AsRawFd, RawFd},
    os::unix::fs::FileExt,
};

use ckpt_proto::Image;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use crate::{
    ImageError, ImageSet, PagesFile,
    pack::PackedFile,
    sums::{Piece, changed, hash_range},
};

/// Bytes of a unit where no checksum says otherwise.
const UNIT: u64 = 1 << 20;
/// Longest piece that is a unit; of longer ones, which strange images may have, the checksum is taken once, and they are
/// then read in parts.
const MAX_UNIT: u64 = 4 << 20;
/// Units that are kept.
const KEPT: usize = 4;

/// Reads pages.
#[derive(Debug)]
pub struct Puller {
    sources: BTreeMap<PagesFile, Source>,
    verify: bool,
    /// The last used one first.
    kept: VecDeque<(PagesFile, Range<u64>, Vec<u8>)>,
}

#[derive(Debug)]
enum Source {
    Plain(Plain),
    Packed(PackedFile),
}

#[derive(Debug)]
struct Plain {
    file: File,
    name: String,
    /// Where in the file the pages begin, and how many bytes they are.
    base: u64,
    len: u64,
    pieces: Vec<Piece>,
    /// Long pieces whose checksum was compared.
    checked: Vec<usize>,
}

impl Puller {
    /// Opens `files` of `set`. Without `verify` no checksum is compared, but those of compressed blocks.
    ///
    /// # Errors
    /// One is missing, or no sequence of blocks.
    pub fn open(
        set: &ImageSet,
        files: impl IntoIterator<Item = PagesFile>,
        verify: bool,
    ) -> Result<Self, ImageError> {
        let mut sources = BTreeMap::new();
        for file in files {
            if sources.contains_key(&file) {
                continue;
            }
            let name = format!("{}{}", "parent/".repeat(file.level), Image::Pages.file_name(file.id));
            let source = if let Some(place) = set.pages_in(file) {
                let open = place.file.try_clone_to_owned().map_err(ImageError::io(&name, "dup"))?;
                let pieces = match file.level {
                    0 => set.pieces(file.id),
                    _ => set.chain.files.get(&file).map(|a| a.pieces.clone()).unwrap_or_default(),
                };
                let (base, len) = (place.offset, place.len);
                Source::Plain(Plain { file: File::from(open), name, base, len, pieces, checked: Vec::new() })
            } else {
                Source::Packed(set.packed_in(file)?.ok_or(ImageError::Missing { file: name })?)
            };
            sources.insert(file, source);
        }
        Ok(Self { sources, verify, kept: VecDeque::new() })
    }

    /// How many bytes of pages a file holds.
    #[must_use]
    pub fn len_of(&self, file: PagesFile) -> Option<u64> {
        self.sources.get(&file).map(|source| match source {
            Source::Plain(plain) => plain.len,
            Source::Packed(packed) => packed.plain_len(),
        })
    }

    /// The descriptors that it reads from.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.sources.values().map(|source| match source {
            Source::Plain(plain) => plain.file.as_raw_fd(),
            Source::Packed(packed) => packed.file().as_raw_fd(),
        })
    }

    /// Some of the pages from byte `offset` of `file` on: up to the end of the unit, at least one byte.
    ///
    /// # Errors
    /// They are damaged, or can't be read, or are not there.
    pub fn from(&mut self, file: PagesFile, offset: u64) -> Result<&[u8], ImageError> {
        let found = self.kept.iter().position(|(of, unit, _)| *of == file && unit.contains(&offset));
        if let Some(found) = found {
            self.kept.swap(0, found);
        } else {
            let mut bytes = match self.kept.len() {
                KEPT.. => self.kept.pop_back().map(|(_, _, bytes)| bytes).unwrap_or_default(),
                _ => Vec::new(),
            };
            let name = || Image::Pages.file_name(file.id);
            let source = self.sources.get_mut(&file).ok_or_else(|| ImageError::Missing { file: name() })?;
            let unit = match source {
                Source::Plain(plain) => plain.read(offset, self.verify, &mut bytes)?,
                Source::Packed(packed) => {
                    let unit = packed.block_at(offset).ok_or_else(|| packed.ends())?;
                    bytes.resize(usize::try_from(unit.end - unit.start).unwrap_or(0), 0);
                    packed.read_exact_at(&mut bytes, unit.start)?;
                    unit
                }
            };
            self.kept.push_front((file, unit, bytes));
        }
        let unit = self.kept.front().and_then(|(_, unit, bytes)| {
            bytes.get(usize::try_from(offset - unit.start).ok()?..).filter(|bytes| !bytes.is_empty())
        });
        unit.ok_or_else(|| ImageError::Missing { file: Image::Pages.file_name(file.id) })
    }

    /// Reads exactly `buffer.len()` bytes.
    ///
    /// # Errors
    /// As [`Self::from`].
    pub fn read_exact_at(
        &mut self,
        file: PagesFile,
        mut buffer: &mut [u8],
        mut offset: u64,
    ) -> Result<(), ImageError> {
        while !buffer.is_empty() {
            let bytes = self.from(file, offset)?;
            let n = bytes.len().min(buffer.len());
            buffer[..n].copy_from_slice(&bytes[..n]);
            buffer = &mut buffer[n..];
            offset += n as u64;
        }
        Ok(())
    }
}

impl Plain {
    /// Reads the unit that `offset` is in, and gives its place.
    fn read(&mut self, offset: u64, verify: bool, bytes: &mut Vec<u8>) -> Result<Range<u64>, ImageError> {
        let index = self.pieces.partition_point(|piece| piece.offset.saturating_add(piece.len) <= offset);
        let piece = self.pieces.get(index).copied().filter(|piece| piece.offset <= offset);
        let whole = piece.filter(|piece| piece.len <= MAX_UNIT);
        let unit = match (whole, piece) {
            (Some(piece), _) => piece.offset..piece.offset + piece.len,
            (None, piece) => {
                let start = offset / UNIT * UNIT;
                let bounds = piece.map_or(0..self.len, |p| p.offset..p.offset.saturating_add(p.len));
                start.max(bounds.start)..(start + UNIT).min(bounds.end).min(self.len)
            }
        };
        let len = unit.end.checked_sub(unit.start).and_then(|len| usize::try_from(len).ok()).unwrap_or(0);
        bytes.resize(len, 0);
        let failed = ImageError::io(&self.name, "read");
        self.file.read_exact_at(bytes, self.base.saturating_add(unit.start)).map_err(failed)?;
        let Some(sum) = piece.and_then(|piece| piece.sum).filter(|_| verify) else { return Ok(unit) };
        if whole.is_some() {
            if xxh3_64(bytes) != sum {
                return Err(changed(self.name.clone()));
            }
        } else if let Some(piece) = piece.filter(|_| !self.checked.contains(&index)) {
            let mut hash = Xxh3Default::new();
            hash_range(&self.file, self.base.saturating_add(piece.offset), piece.len, &mut [&mut hash])
                .map_err(ImageError::io(&self.name, "read"))?;
            if hash.digest() != sum {
                return Err(changed(self.name.clone()));
            }
            self.checked.push(index);
        }
        Ok(unit)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn plain(bytes: &[u8], cuts: &[usize]) -> Puller {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before").unwrap();
        file.write_all(bytes).unwrap();
        let mut pieces = Vec::new();
        let mut from = 0;
        for &to in cuts {
            let sum = Some(xxh3_64(&bytes[from..to]));
            pieces.push(Piece { offset: from as u64, len: (to - from) as u64, sum });
            from = to;
        }
        let len = bytes.len() as u64;
        let source = Plain { file, name: "pages-1.img".into(), base: 6, len, pieces, checked: Vec::new() };
        let sources = [(PagesFile { level: 0, id: 1 }, Source::Plain(source))].into();
        Puller { sources, verify: true, kept: VecDeque::new() }
    }

    const FILE: PagesFile = PagesFile { level: 0, id: 1 };

    #[test]
    fn bytes_come_from_pieces_of_any_length_and_from_none() {
        let bytes: Vec<u8> =
            (0..6_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        for cuts in [vec![], vec![4096, 8192, 3 << 20, 6 << 20], vec![5 << 20, 6 << 20], vec![4096]] {
            let mut puller = plain(&bytes, &cuts);
            for (from, len) in [(0, 6 << 20), (4095, 2), ((5 << 20) - 1, 2), (8191, 1 << 20), (0, 1)] {
                let mut buffer = vec![0; len];
                puller.read_exact_at(FILE, &mut buffer, from as u64).unwrap();
                assert!(buffer == bytes[from..from + len], "{cuts:?} {from} {len}");
            }
            assert!(puller.from(FILE, 6 << 20).is_err());
            assert!(puller.from(PagesFile { level: 1, id: 1 }, 0).is_err());
        }
    }

    #[test]
    fn a_damaged_piece_is_not_given_out() {
        let bytes = vec![7; 6 << 20];
        for cuts in [[1 << 20, 6 << 20], [5 << 20, 6 << 20]] {
            let mut puller = plain(&bytes, &cuts);
            let Some(Source::Plain(source)) = puller.sources.get_mut(&FILE) else { unreachable!() };
            source.file.write_all_at(&[8], 6 + cuts[0] as u64 - 1).unwrap();
            assert!(puller.from(FILE, 0).is_err());
            assert!(puller.from(FILE, cuts[0] as u64).is_ok());
            puller.verify = false;
            assert!(puller.from(FILE, 0).is_ok());
        }
    }
}
