//! All images of a directory or stream at hand.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
};

use ckpt_proto::{
    Image, MAX_MESSAGE, Message, Payload, file,
    stream::{Frame, Reader},
    types::{Hello, ManifestEntry},
};
use ckpt_sys::transfer::transfer;
use nix::{
    dir::Dir,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{
    ImageError, Order, Place,
    chain::{Chain, PARENT, PagesFile},
    pack::PackedFile,
    recode::{self, Recode},
    sums::{self, Piece, Verification, damaged, hash_range},
};

/// Most memory that the messages of one set take, bytes. A task has about 20 bytes of `pagemap` per
/// fragment of memory and about 50 per mapping: this is some ten million of them.
pub const MAX_MEMORY: u64 = 1 << 30;
/// What a message costs besides its bytes.
const OVERHEAD: u64 = 48;
/// Most bytes that are copied again because contents of several images come interleaved.
const MAX_MOVED: u64 = 64 << 20;

#[derive(Debug, Clone, Copy)]
struct Part {
    file: usize,
    offset: u64,
    len: u64,
}

#[derive(Debug, Default)]
struct Contents {
    messages: Vec<Vec<u8>>,
    /// As long as `messages`, or one for a raw image.
    payloads: Vec<Option<Part>>,
}

/// Images without their pages, from a directory or a stream.
#[derive(Debug, Default)]
pub struct ImageSet {
    hello: Option<Hello>,
    images: BTreeMap<(Image, u64), Contents>,
    pub(crate) files: Vec<File>,
    bulk: Option<Reader<File>>,
    memory: u64,
    parent: bool,
    pub(crate) chain: Chain,
}

impl ImageSet {
    /// Reads the directory at `path`. Files that are no images (`stats-dump`, `dump.log`) are passed over.
    /// If there is a manifest, everything in it must be there and unchanged, and nothing else may be
    /// there; pages are checked for their size only (see [`Self::verify_pages`]).
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn from_dir(path: &Path) -> Result<Self, ImageError> {
        Self::open_dir(path).map(|(set, _)| set)
    }

    /// Like [`Self::from_dir`], and follows `parent` links to the directories that hold pages which are
    /// not here: then [`Self::page_runs`] tells of each page where it is.
    ///
    /// # Errors
    /// See [`ImageError`]; pages that no directory of the chain has are one.
    pub fn from_chain(path: &Path) -> Result<Self, ImageError> {
        let (mut set, dir) = Self::open_dir(path)?;
        set.resolve(dir, path)?;
        Ok(set)
    }

    /// The id of the checkpoint in the directory at `path`: nothing else of it is read.
    ///
    /// # Errors
    /// There is no checkpoint.
    pub fn id_of_dir(path: &Path) -> Result<Option<Vec<u8>>, ImageError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::open(path, flags, Mode::empty())
            .map_err(ImageError::errno(path, "open the image directory"))?;
        let set = Self::read_dir(&mut dir, path, &|image, _| image == Image::Inventory)?;
        if set.images.is_empty() {
            return Err(ImageError::Missing { file: path.join("inventory.img").display().to_string() });
        }
        Ok(set.id())
    }

    fn open_dir(path: &Path) -> Result<(Self, Dir), ImageError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::open(path, flags, Mode::empty())
            .map_err(ImageError::errno(path, "open the image directory"))?;
        let set = Self::read_dir(&mut dir, path, &|_, _| true)?;
        if set.images.is_empty() {
            return Err(ImageError::Missing { file: path.join("inventory.img").display().to_string() });
        }
        Ok((set, dir))
    }

    /// Reads of a parent's directory what tells which pages it has, for the pagemaps that are `wanted`.
    pub(crate) fn read_part(
        dir: &mut Dir,
        path: &Path,
        wanted: &dyn Fn(Image, u64) -> bool,
    ) -> Result<Self, ImageError> {
        Self::read_dir(dir, path, &|image, arg| {
            matches!(image, Image::Inventory | Image::CkptManifest) || wanted(image, arg)
        })
    }

    fn read_dir(dir: &mut Dir, path: &Path, want: &dyn Fn(Image, u64) -> bool) -> Result<Self, ImageError> {
        let mut names = Vec::new();
        let mut parent = false;
        for entry in dir.iter() {
            let entry = entry.map_err(ImageError::errno(path, "read the image directory"))?;
            if let Ok(name) = entry.file_name().to_str() {
                parent |= name == PARENT;
                if let Some((image, arg)) =
                    Image::parse_file_name(name).filter(|&(image, arg)| want(image, arg))
                {
                    names.push((image, arg));
                }
            }
        }
        names.sort_unstable();
        let mut set = Self { parent, ..Self::default() };
        let mut sums = BTreeMap::new();
        for &(image, arg) in &names {
            let name = image.file_name(arg);
            let (input, len) = Self::open_image(dir, path, &name)?;
            let sum = set.read_file(image, arg, input, len)?;
            sums.insert(name, (len, sum, image));
        }
        set.verify(&sums, want)?;
        Ok(set)
    }

    /// Opens a file of a directory, and its length.
    pub(crate) fn open_image(dir: &Dir, path: &Path, name: &str) -> Result<(File, u64), ImageError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd: OwnedFd =
            openat(dir, name, flags, Mode::empty()).map_err(ImageError::errno(path.join(name), "open"))?;
        let input = File::from(fd);
        let meta = input.metadata().map_err(ImageError::io(path.join(name), "fstat"))?;
        if !meta.is_file() {
            return Err(ImageError::NotAFile { file: name.to_owned() });
        }
        Ok((input, meta.len()))
    }

    /// A set of one image, read from `input`. Without its neighbours nothing but itself is checked.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn from_file(image: Image, arg: u64, input: File) -> Result<Self, ImageError> {
        let name = image.file_name(arg);
        let meta = input.metadata().map_err(ImageError::io(&name, "fstat"))?;
        if !meta.is_file() {
            return Err(ImageError::NotAFile { file: name });
        }
        let mut set = Self::default();
        set.read_file(image, arg, input, meta.len())?;
        Ok(set)
    }

    /// Reads one file; its checksum, unless it holds pages.
    fn read_file(&mut self, image: Image, arg: u64, input: File, size: u64) -> Result<u64, ImageError> {
        let name = image.file_name(arg);
        if is_pages(image) {
            let file = self.keep(input);
            self.contents(image, arg).payloads.push(Some(Part { file, offset: 0, len: size }));
            return Ok(0);
        }
        let mut hash = Xxh3Default::new();
        let hashed = Hashed { input: &input, hash: &mut hash };
        let mut input_buffered = BufReader::with_capacity(1 << 16, hashed);
        if image.payload() == Payload::Raw {
            io::copy(&mut input_buffered, &mut io::sink()).map_err(ImageError::io(name, "read"))?;
            drop(input_buffered);
            let file = self.keep(input);
            self.contents(image, arg).payloads.push(Some(Part { file, offset: 0, len: size }));
            return Ok(hash.digest());
        }
        let failed = |source| ImageError::File { file: name.clone(), source };
        let mut reader = file::Reader::new(&mut input_buffered, image, size).map_err(failed)?;
        let mut contents = Contents::default();
        let mut needed = false;
        let file = self.files.len();
        while let Some(entry) = reader.next_entry().map_err(failed)? {
            reader.skip_payload(&entry).map_err(failed)?;
            self.account(&name, entry.message.len())?;
            let part = Part { file, offset: entry.payload_offset, len: entry.payload_len };
            needed |= entry.payload_len > 0;
            contents.payloads.push((entry.payload_len > 0).then_some(part));
            contents.messages.push(entry.message);
        }
        // What was promised is all there; anything more came while we were reading.
        let more = io::copy(&mut input_buffered, &mut io::sink()).map_err(ImageError::io(&name, "read"))?;
        if more > 0 {
            let what = "the file grew while it was being read".to_owned();
            return Err(ImageError::Stream { file: name, what });
        }
        drop(input_buffered);
        if needed {
            self.keep(input);
        }
        self.images.insert((image, arg), contents);
        Ok(hash.digest())
    }

    pub(crate) fn keep(&mut self, file: File) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    fn contents(&mut self, image: Image, arg: u64) -> &mut Contents {
        self.images.entry((image, arg)).or_default()
    }

    fn account(&mut self, file: &str, len: usize) -> Result<(), ImageError> {
        self.memory += len as u64 + OVERHEAD;
        if self.memory > MAX_MEMORY {
            let what = format!("the messages of these images take more than {MAX_MEMORY} bytes");
            return Err(ImageError::TooMuch { file: file.to_owned(), what });
        }
        Ok(())
    }

    /// `want`: which images were looked for.
    fn verify(
        &self,
        found: &BTreeMap<String, (u64, u64, Image)>,
        want: &dyn Fn(Image, u64) -> bool,
    ) -> Result<(), ImageError> {
        if !self.images.contains_key(&(Image::CkptManifest, 0)) {
            return Ok(());
        }
        let bad = |file: &str, what: String| ImageError::Manifest { file: file.to_owned(), what };
        let mut listed = BTreeMap::new();
        for entry in self.all::<ManifestEntry>(Image::CkptManifest, 0)? {
            listed.insert(entry.name.clone(), entry);
        }
        let wanted = |name: &str| Image::parse_file_name(name).is_none_or(|(image, arg)| want(image, arg));
        for (name, entry) in listed.iter().filter(|(name, _)| wanted(name)) {
            let Some((size, sum, image)) = found.get(name) else {
                return Err(bad(name, "the file is missing".to_owned()));
            };
            if *size != entry.size {
                return Err(bad(name, format!("the file has {size} bytes, it should have {}", entry.size)));
            }
            let pieces = entry.pieces.iter().fold(0, |sum: u64, piece| sum.saturating_add(piece.len));
            if !entry.pieces.is_empty() && pieces != entry.size {
                return Err(bad(name, format!("its pieces have {pieces} of {} bytes", entry.size)));
            }
            if !is_pages(*image) && entry.xxh3.is_some_and(|expected| expected != *sum) {
                return Err(bad(name, "the contents have changed".to_owned()));
            }
        }
        for (name, (_, _, image)) in found {
            if *image != Image::CkptManifest && !listed.contains_key(name) {
                return Err(bad(name, "the file does not belong to this checkpoint".to_owned()));
            }
        }
        Ok(())
    }

    /// The pieces of `pages-ID.img` and their checksums, as far as the manifest has any.
    #[must_use]
    pub fn pieces(&self, id: u64) -> Vec<Piece> {
        let name = Image::Pages.file_name(id);
        let entries = self.all::<ManifestEntry>(Image::CkptManifest, 0).unwrap_or_default();
        entries.iter().find(|entry| entry.name == name).map(sums::pieces).unwrap_or_default()
    }

    /// Reads all pages that are at hand and compares them with the checksums in the manifest, if there is
    /// one; in directories further back in a chain, those pieces that pages are needed of. Opening a set does
    /// not do this: it takes as long as copying the pages.
    ///
    /// # Errors
    /// They differ, or can't be read.
    pub fn verify_pages(&self) -> Result<(), ImageError> {
        self.verification()?.finish()
    }

    /// Starts what [`Self::verify_pages`] does on a thread.
    ///
    /// # Errors
    /// There can't be one more thread.
    pub fn verification(&self) -> Result<Verification, ImageError> {
        let own = self.args(Image::Pages).into_iter().map(|id| (PagesFile { level: 0, id }, self.pieces(id)));
        let inherited = self.chain.files.iter().map(|(&file, ancestor)| (file, self.needed(file, ancestor)));
        let mut files = Vec::new();
        for (file, mut pieces) in own.chain(inherited) {
            let Some(place) = self.pages_in(file) else { continue };
            let name = format!("{}{}", "parent/".repeat(file.level), Image::Pages.file_name(file.id));
            let open = place.file.try_clone_to_owned().map_err(ImageError::io(&name, "dup"))?;
            for piece in &mut pieces {
                piece.offset = piece.offset.saturating_add(place.offset);
            }
            files.push((File::from(open), name, pieces));
        }
        let manifest = self.all::<ManifestEntry>(Image::CkptManifest, 0)?;
        for id in self.args(Image::CkptPages) {
            let Some(place) = self.payload(Image::CkptPages, id, 0) else { continue };
            let name = Image::CkptPages.file_name(id);
            let open = place.file.try_clone_to_owned().map_err(ImageError::io(&name, "dup"))?;
            let sum = manifest.iter().find(|entry| entry.name == name).and_then(|entry| entry.xxh3);
            files.push((File::from(open), name, vec![Piece { offset: 0, len: place.len, sum }]));
        }
        Verification::start(files)
    }

    /// Reads a stream up to BULK or its end. Raw contents that come before BULK, pages included, go to
    /// temporary files without a name. Compressed pages are unpacked on the way.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn from_stream(input: File) -> Result<Self, ImageError> {
        let (mut reader, mut hello) = Reader::open(input)?;
        if hello.packed() {
            (reader, hello) = recode::before(reader, hello, Recode::Unpack)?;
        }
        let mut set = Self { hello: Some(hello), ..Self::default() };
        let mut orders: BTreeMap<(Image, u64), Order> = BTreeMap::new();
        let mut spool = Spool::default();
        loop {
            let frame = reader.next_frame()?;
            let (name, arg) = match &frame {
                Some(Frame::Entry { image, arg, .. } | Frame::Data { image, arg, .. }) => (image, *arg),
                // Pages that are elsewhere are an error already.
                Some(Frame::Hello(_) | Frame::Placed { .. }) => continue,
                Some(Frame::Bulk) => {
                    set.bulk = Some(reader);
                    break;
                }
                None => break,
            };
            let Some(image) = Image::by_name(name) else {
                let what = format!("images of kind {name:?} are unknown to this release");
                return Err(ImageError::Stream { file: "stream".to_owned(), what });
            };
            if let Some(Frame::Entry { .. }) = frame {
                let message = reader.payload(u64::from(MAX_MESSAGE))?;
                set.account(&image.file_name(arg), message.len())?;
                orders.entry((image, arg)).or_insert_with(Order::new).entry(image, arg, &message)?;
                let contents = set.contents(image, arg);
                contents.messages.push(message);
                contents.payloads.push(None);
            } else {
                let len = reader.pending();
                set.spool(&mut reader, &mut spool, &mut orders, image, arg)?;
                if let Some(Frame::Data { sum: Some(sum), .. }) = frame {
                    set.check_spooled(image, arg, len, sum)?;
                }
            }
        }
        for (&(image, arg), order) in &orders {
            order.end(image, arg)?;
        }
        Ok(set)
    }

    /// Compares the last `len` bytes that were spooled for an image with their checksum.
    fn check_spooled(&self, image: Image, arg: u64, len: u64, sum: u64) -> Result<(), ImageError> {
        let last = self.images.get(&(image, arg)).and_then(|c| c.payloads.last().copied().flatten());
        let Some((part, file)) = last.and_then(|part| Some((part, self.files.get(part.file)?))) else {
            return Ok(());
        };
        let mut hash = Xxh3Default::new();
        hash_range(file, part.offset + part.len - len, len, &mut [&mut hash])
            .map_err(ImageError::io("temporary file", "read"))?;
        if hash.digest() == sum { Ok(()) } else { Err(damaged(arg).into()) }
    }

    fn spool(
        &mut self,
        reader: &mut Reader<File>,
        spool: &mut Spool,
        orders: &mut BTreeMap<(Image, u64), Order>,
        image: Image,
        arg: u64,
    ) -> Result<(), ImageError> {
        let len = reader.pending();
        orders.entry((image, arg)).or_insert_with(Order::new).data(image, arg, len)?;
        let raw = image.payload() == Payload::Raw;
        self.account(&image.file_name(arg), 0)?;
        let contents = self.contents(image, arg);
        if raw && contents.payloads.is_empty() {
            contents.payloads.push(None);
        }
        if len == 0 && !raw {
            return Ok(());
        }
        let before = contents.payloads.last().copied().flatten();
        // What can be large has a file of its own, so that its parts lie together.
        let own = matches!(image, Image::Pages | Image::GhostFile);
        let part = spool.append(&mut self.files, before, own, reader, len)?;
        if let Some(last) = self.contents(image, arg).payloads.last_mut() {
            *last = Some(part);
        }
        Ok(())
    }

    /// The stream's HELLO; `None` for a directory.
    #[must_use]
    pub fn hello(&self) -> Option<&Hello> {
        self.hello.as_ref()
    }

    /// Which images there are, in catalogue order.
    pub fn images(&self) -> impl Iterator<Item = (Image, u64)> {
        self.images.keys().copied()
    }

    /// The numbers for which there is an image of this kind, ascending.
    #[must_use]
    pub fn args(&self, image: Image) -> Vec<u64> {
        self.images.range((image, 0)..=(image, u64::MAX)).map(|(&(_, arg), _)| arg).collect()
    }

    /// Encoded messages of an image; empty if there is no such image.
    #[must_use]
    pub fn entries(&self, image: Image, arg: u64) -> &[Vec<u8>] {
        self.images.get(&(image, arg)).map_or(&[], |contents| &contents.messages)
    }

    /// Messages of an image, decoded; empty if there is no such image. Not for pagemaps, whose first
    /// entry is of another type: see [`Self::pagemap`].
    ///
    /// # Errors
    /// One is no `M`.
    pub fn all<M: Message + Default>(&self, image: Image, arg: u64) -> Result<Vec<M>, ImageError> {
        self.entries(image, arg)
            .iter()
            .enumerate()
            .map(|(index, entry)| decode(image, arg, index, entry))
            .collect()
    }

    /// The only message of an image.
    ///
    /// # Errors
    /// There is none, or not just one, or it is no `M`.
    pub fn one<M: Message + Default>(&self, image: Image, arg: u64) -> Result<M, ImageError> {
        match self.entries(image, arg) {
            [] => Err(ImageError::Missing { file: image.file_name(arg) }),
            [entry] => decode(image, arg, 0, entry),
            more => {
                let what = format!("{} entries where one is expected", more.len());
                Err(ImageError::Stream { file: image.file_name(arg), what })
            }
        }
    }

    /// A pagemap ([`Image::Pagemap`] or [`Image::ShmemPagemap`]): its pages id and its runs of pages.
    ///
    /// # Errors
    /// There is none, or it is malformed.
    pub fn pagemap(
        &self,
        image: Image,
        arg: u64,
    ) -> Result<(u64, Vec<ckpt_proto::types::PagemapEntry>), ImageError> {
        let Some((head, runs)) = self.entries(image, arg).split_first() else {
            return Err(ImageError::Missing { file: image.file_name(arg) });
        };
        let head: ckpt_proto::types::PagemapHead = decode(image, arg, 0, head)?;
        let runs: Result<_, _> =
            runs.iter().enumerate().map(|(index, entry)| decode(image, arg, index + 1, entry)).collect();
        Ok((u64::from(head.pages_id), runs?))
    }

    /// Raw contents that follow entry `index` of an image (index 0 of a raw image is all of it).
    #[must_use]
    pub fn payload(&self, image: Image, arg: u64, index: usize) -> Option<Place<'_>> {
        let part = (*self.images.get(&(image, arg))?.payloads.get(index)?)?;
        let file = self.files.get(part.file)?;
        Some(Place { file: file.as_fd(), offset: part.offset, len: part.len })
    }

    /// The same in memory; empty if there are none.
    ///
    /// # Errors
    /// There are more than `limit` bytes, or they can't be read.
    pub fn payload_bytes(
        &self,
        image: Image,
        arg: u64,
        index: usize,
        limit: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let name = || image.file_name(arg);
        let part = self.images.get(&(image, arg)).and_then(|c| c.payloads.get(index).copied().flatten());
        let Some(part) = part else { return Ok(Vec::new()) };
        if part.len > limit {
            let what = format!("{} bytes of contents where at most {limit} can be", part.len);
            return Err(ImageError::TooMuch { file: name(), what });
        }
        let Some(file) = self.files.get(part.file) else { return Ok(Vec::new()) };
        let mut bytes = vec![0; usize::try_from(part.len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, part.offset).map_err(ImageError::io(name(), "pread"))?;
        Ok(bytes)
    }

    /// All pages of `pages-ID.img`. With a live stream they may still be to come: [`Self::take_bulk`].
    #[must_use]
    pub fn pages(&self, id: u64) -> Option<Place<'_>> {
        self.payload(Image::Pages, id, 0)
    }

    /// Whether there are compressed pages in this directory, or in one of the chain that it needs.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        !self.args(Image::CkptPages).is_empty() || self.chain.files.values().any(|file| file.packed)
    }

    /// The compressed pages of `ckpt-pages-ID.img`; `None` if there is no such file.
    ///
    /// # Errors
    /// It is no sequence of blocks, or there is a `pages-ID.img` too.
    pub fn packed(&self, id: u64) -> Result<Option<PackedFile>, ImageError> {
        let Some(place) = self.payload(Image::CkptPages, id, 0) else { return Ok(None) };
        let file = Image::CkptPages.file_name(id);
        if self.pages(id).is_some() {
            let what = format!("there is {} too", Image::Pages.file_name(id));
            return Err(ImageError::Stream { file, what });
        }
        PackedFile::open(place, &file).map(Some)
    }

    /// The rest of the stream: DATA of PAGES (arg = pages id), then END. `None` for a directory, and
    /// for a stream without BULK, whose pages are all here.
    pub fn take_bulk(&mut self) -> Option<Reader<File>> {
        self.bulk.take()
    }

    /// Whether the directory has a `parent`: the earlier images of an incremental chain.
    #[must_use]
    pub fn has_parent(&self) -> bool {
        self.parent
    }
}

/// Whether an image holds pages, plain or compressed: opening a set does not read them.
fn is_pages(image: Image) -> bool {
    matches!(image, Image::Pages | Image::CkptPages)
}

fn decode<M: Message + Default>(image: Image, arg: u64, index: usize, entry: &[u8]) -> Result<M, ImageError> {
    M::decode(entry).map_err(|source| ImageError::Decode { file: image.file_name(arg), index, source })
}

/// Passes bytes through a checksum.
struct Hashed<'a> {
    input: &'a File,
    hash: &'a mut Xxh3Default,
}

impl io::Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

/// Temporary files without a name.
#[derive(Debug, Default)]
struct Spool {
    /// The file that small contents share, and its length.
    common: Option<(usize, u64)>,
    moved: u64,
}

/// In $TMPDIR if that is set, else in /var/tmp: /tmp is often in memory.
fn temporary() -> io::Result<File> {
    if std::env::var_os("TMPDIR").is_none()
        && let Ok(file) = tempfile::tempfile_in("/var/tmp")
    {
        return Ok(file);
    }
    tempfile::tempfile()
}

fn spool_failed(source: io::Error) -> ImageError {
    ImageError::Io { path: std::env::temp_dir(), call: "write a temporary file", source }
}

impl Spool {
    /// Appends the reader's pending `len` bytes to the contents that lie at `before`, if any.
    fn append(
        &mut self,
        files: &mut Vec<File>,
        before: Option<Part>,
        own: bool,
        reader: &mut Reader<File>,
        len: u64,
    ) -> Result<Part, ImageError> {
        let new_file = |files: &mut Vec<File>| {
            files.push(temporary().map_err(spool_failed)?);
            Ok::<_, ImageError>(files.len() - 1)
        };
        let mut part = match (before, own, self.common) {
            (Some(part), true, _) => part,
            (None, true, _) => Part { file: new_file(files)?, offset: 0, len: 0 },
            (Some(part), false, Some((_, end))) if part.offset + part.len == end => part,
            (before, false, common) => {
                let (file, end) = match common {
                    Some(common) => common,
                    None => (new_file(files)?, 0),
                };
                self.common = Some((file, end));
                let part = Part { file, offset: end, len: 0 };
                match before {
                    None => part,
                    Some(old) => self.relocate(files, old, part)?,
                }
            }
        };
        let Some(mut file) = files.get(part.file) else {
            return Err(spool_failed(io::Error::other("no such temporary file")));
        };
        let end = part.offset + part.len;
        file.seek(SeekFrom::Start(end)).map_err(spool_failed)?;
        let failed = |source| ImageError::Transfer { file: "temporary file".to_owned(), source };
        if let Some(input) = reader.bulk_input() {
            if len == 0 {
                return Ok(part);
            }
            let moved = transfer(input.as_fd(), file.as_fd(), len).map_err(failed)?;
            reader.moved(moved);
            if moved < len {
                return Err(reader.ended_in_bulk().into());
            }
        } else {
            // A full disk is no fault of the stream: keep the two apart.
            let mut out = Spooled { file, failed: None };
            let copied = reader.copy_payload(&mut out);
            if let Some(error) = out.failed {
                return Err(spool_failed(error));
            }
            copied?;
        }
        part.len += len;
        if let Some((common, end)) = &mut self.common
            && *common == part.file
        {
            *end = part.offset + part.len;
        }
        Ok(part)
    }

    /// Contents that were interleaved with others move to the end, so that they lie in one piece.
    fn relocate(&mut self, files: &[File], old: Part, mut new: Part) -> Result<Part, ImageError> {
        self.moved += old.len;
        if self.moved > MAX_MOVED {
            let what = "contents of several images come interleaved".to_owned();
            return Err(ImageError::TooMuch { file: "stream".to_owned(), what });
        }
        let Some(file) = files.get(old.file) else {
            return Err(spool_failed(io::Error::other("no such temporary file")));
        };
        let mut buffer = vec![0; 1 << 16];
        while new.len < old.len {
            let n = usize::try_from(old.len - new.len).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..n], old.offset + new.len).map_err(spool_failed)?;
            file.write_all_at(&buffer[..n], new.offset + new.len).map_err(spool_failed)?;
            new.len += n as u64;
        }
        self.common = Some((new.file, new.offset + new.len));
        Ok(new)
    }
}

struct Spooled<'a> {
    file: &'a File,
    failed: Option<io::Error>,
}

impl Write for Spooled<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).inspect_err(|e| {
            if e.kind() != io::ErrorKind::Interrupted {
                self.failed = Some(io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(0)));
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ckpt_proto::{
        stream::Writer,
        types::{PipeDataEntry, PstreeEntry},
    };

    use super::*;
    use crate::DirWriter;

    fn task(pid: u32) -> PstreeEntry {
        PstreeEntry { pid, ppid: 0, pgid: pid, sid: pid, threads: vec![pid] }
    }

    fn pipe(pipe_id: u32, bytes: u32) -> Vec<u8> {
        PipeDataEntry { pipe_id, bytes, size: None }.encode_to_vec()
    }

    fn hello() -> Hello {
        Hello { page_size: 4096, arch: 1, ..Hello::default() }
    }

    fn stream(fill: impl FnOnce(&mut Writer<File>) -> io::Result<()>) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::open(file, hello()).unwrap();
        fill(&mut writer).unwrap();
        let mut file = writer.end().unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn a_stream_and_a_directory_give_the_same_set() {
        let input = stream(|w| {
            w.entry(Image::Pstree, 0, &task(7).encode_to_vec())?;
            w.entry(Image::PipesData, 0, &pipe(1, 3))?;
            w.data(Image::PipesData, 0, b"abc")?;
            w.entry(Image::PipesData, 0, &pipe(2, 0))?;
            w.entry(Image::PipesData, 0, &pipe(3, 2))?;
            w.data(Image::PipesData, 0, b"de")?;
            w.data(Image::Pages, 1, &[5; 5000])?;
            w.data(Image::Pages, 1, &[6; 5000])
        });
        let from_stream = ImageSet::from_stream(input).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images");
        let mut writer = DirWriter::create(&path).unwrap();
        writer.entry(Image::Pstree, 0, &task(7).encode_to_vec()).unwrap();
        writer.entry(Image::PipesData, 0, &pipe(1, 3)).unwrap();
        writer.data(Image::PipesData, 0, b"abc").unwrap();
        writer.entry(Image::PipesData, 0, &pipe(2, 0)).unwrap();
        writer.entry(Image::PipesData, 0, &pipe(3, 2)).unwrap();
        writer.data(Image::PipesData, 0, b"de").unwrap();
        writer.data(Image::Pages, 1, &[5; 5000]).unwrap();
        writer.data(Image::Pages, 1, &[6; 5000]).unwrap();
        writer.finish().unwrap();
        let from_dir = ImageSet::from_dir(&path).unwrap();

        for set in [&from_stream, &from_dir] {
            assert_eq!(set.all::<PstreeEntry>(Image::Pstree, 0).unwrap(), [task(7)]);
            assert_eq!(set.payload_bytes(Image::PipesData, 0, 0, 10).unwrap(), b"abc");
            assert_eq!(set.payload_bytes(Image::PipesData, 0, 1, 10).unwrap(), b"");
            assert_eq!(set.payload_bytes(Image::PipesData, 0, 2, 10).unwrap(), b"de");
            assert!(set.payload_bytes(Image::PipesData, 0, 2, 1).is_err());
            let pages = set.pages(1).unwrap();
            assert_eq!(pages.len, 10_000);
            assert_eq!(set.payload_bytes(Image::Pages, 1, 0, 1 << 20).unwrap()[4999..5001], [5, 6]);
            assert_eq!(set.args(Image::Pages), [1]);
            assert!(matches!(set.one::<PstreeEntry>(Image::Core, 9), Err(ImageError::Missing { .. })));
        }
    }

    #[test]
    fn interleaved_contents_lie_in_one_piece() {
        let input = stream(|w| {
            w.entry(Image::PipesData, 0, &pipe(1, 4))?;
            w.entry(Image::FifoData, 0, &pipe(1, 4))?;
            for bytes in [b"ab", b"cd"] {
                w.data(Image::PipesData, 0, bytes)?;
                w.data(Image::FifoData, 0, bytes)?;
                w.data(Image::Pages, 3, bytes)?;
                w.data(Image::Pages, 4, bytes)?;
            }
            Ok(())
        });
        let set = ImageSet::from_stream(input).unwrap();
        for (image, arg) in
            [(Image::PipesData, 0), (Image::FifoData, 0), (Image::Pages, 3), (Image::Pages, 4)]
        {
            assert_eq!(set.payload_bytes(image, arg, 0, 99).unwrap(), b"abcd", "{}", image.name());
        }
    }

    #[test]
    fn pages_after_bulk_stay_in_the_stream() {
        let input = stream(|w| {
            w.entry(Image::Pstree, 0, &task(7).encode_to_vec())?;
            w.bulk()?;
            w.data(Image::Pages, 1, &[5; 5000])
        });
        let mut set = ImageSet::from_stream(input).unwrap();
        assert!(set.pages(1).is_none());
        let mut bulk = set.take_bulk().unwrap();
        assert!(matches!(bulk.next_frame().unwrap(), Some(Frame::Data { len: 5000, .. })));
        assert!(bulk.next_frame().unwrap().is_none());
    }

    #[test]
    fn contents_that_do_not_fit_their_entry_are_an_error() {
        type Fill = fn(&mut Writer<File>) -> io::Result<()>;
        let bad: [Fill; 4] = [
            |w| w.entry(Image::PipesData, 0, &pipe(1, 4)),
            |w| w.entry(Image::PipesData, 0, &pipe(1, 1)).and_then(|()| w.data(Image::PipesData, 0, b"ab")),
            |w| w.data(Image::PipesData, 0, b"ab"),
            |w| w.entry(Image::Pstree, 0, b"\xff\xff"),
        ];
        for fill in bad {
            let error = ImageSet::from_stream(stream(fill)).unwrap_err();
            assert!(error.is_corruption(), "{error}");
        }
    }

    #[test]
    fn a_changed_or_strange_or_missing_file_differs_from_the_manifest() {
        let dir = tempfile::tempdir().unwrap();
        for case in ["change", "truncate", "add", "remove", "link"] {
            let path = dir.path().join(case);
            let mut writer = DirWriter::create(&path).unwrap();
            writer.entry(Image::Pstree, 0, &task(7).encode_to_vec()).unwrap();
            writer.data(Image::Pages, 1, &[5; 5000]).unwrap();
            writer.finish().unwrap();
            ImageSet::from_dir(&path).unwrap();
            let pstree = path.join("pstree.img");
            match case {
                "change" => {
                    let mut bytes = fs::read(&pstree).unwrap();
                    let last = bytes.len() - 1;
                    bytes[last] ^= 1;
                    fs::write(&pstree, bytes).unwrap();
                }
                "truncate" => {
                    File::options().write(true).open(path.join("pages-1.img")).unwrap().set_len(10).unwrap()
                }
                "add" => drop(fs::copy(&pstree, path.join("fifo.img"))),
                "remove" => fs::remove_file(path.join("pages-1.img")).unwrap(),
                _ => {
                    fs::remove_file(&pstree).unwrap();
                    std::os::unix::fs::symlink("/etc/passwd", &pstree).unwrap();
                }
            }
            assert!(ImageSet::from_dir(&path).is_err(), "{case}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig {
            failure_persistence: None, ..proptest::prelude::ProptestConfig::with_cases(200)
        })]

        /// Whatever a manifest says, it is compared with what is there, or refused.
        #[test]
        fn hostile_manifests_are_errors_or_harmless(
            edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0..=255_u8), 0..4),
            cut in proptest::option::of(proptest::prelude::any::<proptest::sample::Index>()),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let mut writer = DirWriter::create(&path).unwrap();
            writer.entry(Image::Pstree, 0, &task(7).encode_to_vec()).unwrap();
            writer.data(Image::Pages, 1, &[5; 8192]).unwrap();
            writer.finish().unwrap();
            let manifest = path.join("ckpt-manifest.img");
            let good = fs::read(&manifest).unwrap();
            let mut bytes = good.clone();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(good.len()));
            }
            fs::write(&manifest, &bytes).unwrap();
            // No panic, and no allocation that a manifest could ask for.
            if let Ok(set) = ImageSet::from_chain(&path) {
                let _ = set.verify_pages();
            }
        }
    }
}
