//! A directory in the making.
//!
//! Files are written into a staging directory beside the final one, then:
//!
//! 1. the manifest is written, every file is fsynced, then the staging directory;
//! 2. renameat2(RENAME_NOREPLACE) gives it its name: it appears whole, and never over another;
//! 3. the parent directory is fsynced, so that the name survives a power cut too.
//!
//! On any error the staging directory is removed. A writer killed with SIGKILL can't do that: it
//! leaves `.NAME.ckpt-partial-*` behind, locked by flock(2) while its writer lives, and the next
//! writer of the same name removes what nobody has locked.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink},
        },
    },
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ckpt_proto::{
    Image, Message, file,
    stream::Facts,
    types::{ManifestEntry, ManifestPiece},
};
use ckpt_sys::transfer::{is_no_way, transfer};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, copy_file_range, renameat2},
    unistd::{Whence, lseek},
};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{
    ImageError, Order, Place,
    chain::PARENT,
    sums::{MIN_PIECE, Summer, punch_zeros},
};

/// Files kept open at a time; more are closed and opened again.
const MAX_OPEN: usize = 64;

struct Output {
    order: Order,
    hash: Xxh3Default,
    size: u64,
    file: Option<BufWriter<File>>,
}

/// Writes an image directory that appears under its name complete or not at all.
pub struct DirWriter {
    target: PathBuf,
    parent: PathBuf,
    staging: PathBuf,
    cleanup: Cleanup,
    /// The staging directory, locked as long as we live.
    lock: Option<Flock<File>>,
    outputs: BTreeMap<(Image, u64), Output>,
    open: VecDeque<(Image, u64)>,
    /// Checksums of pages, from the first pages on.
    summer: Option<Summer>,
    trust: bool,
    /// Somebody else writes pages too, and may have made their file.
    shared: bool,
    /// Whether `target` is there and gives way.
    over: bool,
    /// Files of another directory that are part of this one too.
    adopted: BTreeMap<String, ManifestEntry>,
}

impl std::fmt::Debug for DirWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirWriter")
            .field("target", &self.target)
            .field("staging", &self.staging)
            .finish_non_exhaustive()
    }
}

fn partial_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    // A name may have 255 bytes, and ours is longer than the final one.
    prefix.push(OsStr::from_bytes(name.as_bytes().get(..200).unwrap_or(name.as_bytes())));
    prefix.push(".ckpt-partial-");
    prefix
}

impl DirWriter {
    /// Starts a directory that is to be `target`.
    ///
    /// # Errors
    /// `target` exists, or the staging directory can't be made.
    pub fn create(target: &Path) -> Result<Self, ImageError> {
        let target: PathBuf = target.components().collect();
        Self::begin(target, false)
    }

    /// Starts a directory that is to take the place of `target`, which is there: at the end the two are exchanged in
    /// one step, and the old one is removed.
    ///
    /// # Errors
    /// `target` is no directory, or the staging directory can't be made.
    pub fn create_over(target: &Path) -> Result<Self, ImageError> {
        // What it is, rather than a link to it.
        let target = target.canonicalize().map_err(ImageError::io(target, "realpath"))?;
        Self::begin(target, true)
    }

    fn begin(target: PathBuf, over: bool) -> Result<Self, ImageError> {
        match fs::symlink_metadata(&target) {
            Ok(meta) if over && meta.is_dir() => {}
            Ok(_) => return Err(ImageError::Exists { path: target }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ImageError::io(target, "lstat")(e)),
        }
        let Some(name) = target.file_name() else { return Err(ImageError::Exists { path: target }) };
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let prefix = partial_prefix(name);
        remove_abandoned(&parent, &prefix);
        let (staging, lock) = make_staging(&parent, &prefix)?;
        let cleanup = Cleanup { staging: staging.clone(), over: Arc::default() };
        Ok(Self {
            target,
            parent,
            staging,
            cleanup,
            lock,
            outputs: BTreeMap::new(),
            open: VecDeque::new(),
            summer: None,
            trust: false,
            shared: false,
            over,
            adopted: BTreeMap::new(),
        })
    }

    /// Removes what writers of `target` that were killed have left beside it.
    pub fn remove_abandoned(target: &Path) {
        if let (Some(parent), Some(name)) = (target.parent(), target.file_name()) {
            remove_abandoned(parent, &partial_prefix(name));
        }
    }

    /// From here on checksums of pages are taken as they are given, without reading what was written: for
    /// a stream that can't have been damaged, because it comes straight from the process that made it.
    pub fn trust_checksums(&mut self) {
        self.trust = true;
    }

    /// The staging directory, for somebody who writes pages into it and tells by [`Self::pages_placed`].
    ///
    /// # Errors
    /// It can't be opened.
    pub fn share_directory(&mut self) -> Result<OwnedFd, ImageError> {
        let directory = File::open(&self.staging).map_err(ImageError::io(&self.staging, "open"))?;
        self.shared = true;
        Ok(directory.into())
    }

    /// What removes the staging directory when the process is told to end.
    #[must_use]
    pub fn cleanup(&self) -> Cleanup {
        self.cleanup.clone()
    }

    /// The output of an image, open; made with its header if it is new.
    fn output(&mut self, image: Image, arg: u64) -> Result<&mut Output, ImageError> {
        let key = (image, arg);
        let path = self.staging.join(image.file_name(arg));
        let known = self.outputs.contains_key(&key);
        let is_open = self.outputs.get(&key).is_some_and(|output| output.file.is_some());
        if !is_open {
            while self.open.len() >= MAX_OPEN {
                if let Some((image, arg)) = self.open.pop_front() {
                    self.close(image, arg)?;
                }
            }
            let mut options = OpenOptions::new();
            options.write(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
            let may_be = self.shared && image == Image::Pages;
            options.create(!known).create_new(!known && !may_be);
            let mut file = options.open(&path).map_err(ImageError::io(&path, "open"))?;
            // Not at its end, behind which there may be pages of which we will yet be told.
            let size = self.outputs.get(&key).map_or(0, |output| output.size);
            file.seek(SeekFrom::Start(size)).map_err(ImageError::io(&path, "lseek"))?;
            let output = self.outputs.entry(key).or_insert_with(|| Output {
                order: Order::new(),
                hash: Xxh3Default::new(),
                size: 0,
                file: None,
            });
            output.file = Some(BufWriter::with_capacity(1 << 13, file));
            if !known {
                let mut header = Vec::new();
                file::write_header(&mut header, image).map_err(ImageError::io(&path, "write"))?;
                output.put(&path, &header)?;
            }
            self.open.push_back(key);
        }
        self.outputs.get_mut(&key).ok_or_else(|| ImageError::Missing { file: image.file_name(arg) })
    }

    fn close(&mut self, image: Image, arg: u64) -> Result<(), ImageError> {
        let path = self.staging.join(image.file_name(arg));
        if let Some(mut file) = self.outputs.get_mut(&(image, arg)).and_then(|output| output.file.take()) {
            file.flush().map_err(ImageError::io(path, "write"))?;
        }
        Ok(())
    }

    /// Appends an entry to an image.
    ///
    /// # Errors
    /// It does not belong there, or can't be written.
    pub fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> Result<(), ImageError> {
        let path = self.staging.join(image.file_name(arg));
        let output = self.output(image, arg)?;
        output.order.entry(image, arg, message)?;
        let len = u32::try_from(message.len()).ok().filter(|&n| n <= ckpt_proto::MAX_MESSAGE);
        let Some(len) = len else {
            let what = format!("an entry of {} bytes", message.len());
            return Err(ImageError::TooMuch { file: image.file_name(arg), what });
        };
        output.put(&path, &len.to_le_bytes())?;
        output.put(&path, message)
    }

    /// Appends raw contents to the last entry of an image. No bytes at all just make the file, for an
    /// image without entries.
    ///
    /// # Errors
    /// They do not belong there, or can't be written.
    pub fn data(&mut self, image: Image, arg: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.staging.join(image.file_name(arg));
        let output = self.output(image, arg)?;
        output.order.data(image, arg, bytes.len() as u64)?;
        output.put(&path, bytes)?;
        if image == Image::Pages && !bytes.is_empty() {
            if let Some(file) = &mut output.file {
                file.flush().map_err(ImageError::io(&path, "write"))?;
            }
            let len = bytes.len() as u64;
            let offset = output.size - len;
            self.summer()?.add(arg, path, offset, len, Facts::default())?;
        }
        Ok(())
    }

    fn summer(&mut self) -> Result<&mut Summer, ImageError> {
        if self.summer.is_none() {
            self.summer = Some(Summer::start()?);
        }
        self.summer.as_mut().ok_or_else(|| ImageError::Missing { file: "checksums".to_owned() })
    }

    /// Appends up to `len` bytes of pages from `from`, moved inside the kernel; returns how many bytes
    /// came, which is less than `len` only if `from` ended. If their checksum is not the one in `facts`,
    /// [`Self::finish`] fails. Pages of zeros become holes, where the file system has them.
    ///
    /// # Errors
    /// They can't be read or written.
    pub fn pages_from(
        &mut self,
        id: u64,
        from: BorrowedFd<'_>,
        len: u64,
        facts: &Facts,
    ) -> Result<u64, ImageError> {
        let path = self.staging.join(Image::Pages.file_name(id));
        let output = self.output(Image::Pages, id)?;
        let Some(file) = &mut output.file else { return Ok(0) };
        file.flush().map_err(ImageError::io(&path, "write"))?;
        let moved = transfer(from, file.get_ref().as_fd(), len)
            .map_err(|source| ImageError::Transfer { file: Image::Pages.file_name(id), source })?;
        self.appended(id, path, moved, moved == len, facts)?;
        Ok(moved)
    }

    /// Takes over pages that somebody has written into the shared directory, behind those that are known: `len` bytes at
    /// `at` of the file.
    ///
    /// # Errors
    /// They are not there.
    pub fn pages_placed(&mut self, id: u64, at: u64, len: u64, facts: &Facts) -> Result<(), ImageError> {
        let path = self.staging.join(Image::Pages.file_name(id));
        let output = self.output(Image::Pages, id)?;
        let Some(file) = &mut output.file else { return Ok(()) };
        let there = file.get_ref().metadata().map_err(ImageError::io(&path, "fstat"))?.len();
        let end = at.checked_add(len).filter(|&end| end <= there && at == output.size);
        let Some(end) = end else {
            let what = format!("{len} bytes of pages were to be at {at}, and are not");
            return Err(ImageError::Stream { file: Image::Pages.file_name(id), what });
        };
        file.seek(SeekFrom::Start(end)).map_err(ImageError::io(&path, "lseek"))?;
        self.appended(id, path, len, true, facts)
    }

    /// Notes that a pages file is `len` bytes longer, whose checksum is the one in `facts` if they are `whole`.
    fn appended(
        &mut self,
        id: u64,
        path: PathBuf,
        len: u64,
        whole: bool,
        facts: &Facts,
    ) -> Result<(), ImageError> {
        let trust = self.trust && whole;
        let output = self.output(Image::Pages, id)?;
        let offset = output.size;
        output.size += len;
        if let (true, Some(_), Some(file)) = (trust && len >= MIN_PIECE, facts.sum, &output.file) {
            punch_zeros(file.get_ref(), offset, len, &facts.zeros);
        }
        let summer = self.summer()?;
        if !facts.sum.is_some_and(|sum| trust && summer.believe(id, len, sum)) {
            summer.add(id, path, offset, len, facts.clone())?;
        }
        Ok(())
    }

    /// Appends the pages at `place`, which share their room with the original where the file system can.
    ///
    /// # Errors
    /// They can't be read or written, or the file ends before.
    pub fn pages_copied(&mut self, id: u64, place: Place<'_>) -> Result<(), ImageError> {
        let path = self.staging.join(Image::Pages.file_name(id));
        let name = || Image::Pages.file_name(id);
        let output = self.output(Image::Pages, id)?;
        let Some(file) = &mut output.file else { return Ok(()) };
        file.flush().map_err(ImageError::io(&path, "write"))?;
        let mut from =
            i64::try_from(place.offset).map_err(|e| ImageError::io(name(), "lseek")(io::Error::other(e)))?;
        let mut left = place.len;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
            let moved = match copy_file_range(place.file, Some(&mut from), file.get_ref(), None, want) {
                Ok(n) => n as u64,
                Err(Errno::EINTR) => continue,
                Err(errno) if is_no_way(errno) => {
                    lseek(place.file, from, Whence::SeekSet).map_err(ImageError::errno(name(), "lseek"))?;
                    transfer(place.file, file.get_ref().as_fd(), left)
                        .map_err(|source| ImageError::Transfer { file: name(), source })?
                }
                Err(errno) => return Err(ImageError::errno(&path, "copy_file_range")(errno)),
            };
            if moved == 0 {
                let what = "it is shorter than the pagemap says".to_owned();
                return Err(ImageError::Stream { file: name(), what });
            }
            left = left.saturating_sub(moved);
        }
        let offset = output.size;
        output.size += place.len;
        self.summer()?.add(id, path, offset, place.len, Facts::default())
    }

    /// Makes a file of another directory part of this one, under its own name and by a link if possible; `entry` is what
    /// the manifest says of it (nothing, for what is no image).
    ///
    /// # Errors
    /// It can't be linked.
    pub fn adopt(&mut self, from: &Path, entry: Option<ManifestEntry>) -> Result<(), ImageError> {
        let Some(name) = from.file_name() else {
            return Err(ImageError::NotAFile { file: from.display().to_string() });
        };
        let to = self.staging.join(name);
        match fs::hard_link(from, &to) {
            // Not on this file system; or there are as many as there can be.
            Err(error) if error.raw_os_error().map(Errno::from_raw).is_some_and(is_no_link) => {
                fs::copy(from, &to).map(drop).map_err(ImageError::io(from, "copy"))?;
            }
            linked => linked.map_err(ImageError::io(from, "link"))?,
        }
        File::open(&to).and_then(|file| file.sync_all()).map_err(ImageError::io(&to, "fsync"))?;
        if let Some(entry) = entry {
            self.adopted.insert(entry.name.clone(), entry);
        }
        Ok(())
    }

    /// Puts a file that is no image into the directory.
    ///
    /// # Errors
    /// It can't be written.
    pub fn beside(&mut self, name: &str, contents: &[u8]) -> Result<(), ImageError> {
        let path = self.staging.join(name);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&path).map_err(ImageError::io(&path, "open"))?;
        file.write_all(contents).map_err(ImageError::io(&path, "write"))?;
        file.sync_all().map_err(ImageError::io(&path, "fsync"))
    }

    /// Bytes written so far to `pages-ID.img`; `None` if there is no such file.
    #[must_use]
    pub fn pages_len(&self, id: u64) -> Option<u64> {
        self.outputs.get(&(Image::Pages, id)).map(|output| output.size)
    }

    /// Makes the link to the directory of the checkpoint that this one is an increment of, relative, so that
    /// both can be moved together.
    ///
    /// # Errors
    /// There is no such directory, or there is a link already.
    pub fn link_parent(&self, dir: &Path) -> Result<(), ImageError> {
        let real = |path: &Path| path.canonicalize().map_err(ImageError::io(path, "realpath"));
        let (from, to) = (real(&self.parent)?, real(dir)?);
        let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
        // One step up leads from the directory itself to its parent.
        let up = std::iter::repeat_n(Component::ParentDir, from.components().count() - common + 1);
        let link: PathBuf = up.chain(to.components().skip(common)).collect();
        let path = self.staging.join(PARENT);
        symlink(link, &path).map_err(ImageError::io(path, "symlink"))
    }

    /// Bytes of all files so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.outputs.values().map(|output| output.size).sum()
    }

    /// Whether there is such an image.
    #[must_use]
    pub fn has(&self, image: Image, arg: u64) -> bool {
        self.outputs.contains_key(&(image, arg))
    }

    /// Completes the directory, makes it durable and gives it its name.
    ///
    /// # Errors
    /// Then there is nothing under the final name (unless only the last step, making the name
    /// itself durable, has failed: the error says so).
    pub fn finish(mut self) -> Result<(), ImageError> {
        for (&(image, arg), output) in &self.outputs {
            output.order.end(image, arg)?;
        }
        let pages = self.summer.take().map_or_else(|| Ok(BTreeMap::new()), Summer::finish)?;
        self.write_manifest(&pages)?;
        let keys: Vec<_> = self.outputs.keys().copied().collect();
        for (image, arg) in keys {
            self.close(image, arg)?;
            let path = self.staging.join(image.file_name(arg));
            File::open(&path).and_then(|file| file.sync_all()).map_err(ImageError::io(&path, "fsync"))?;
        }
        let staging = self.staging.clone();
        File::open(&staging).and_then(|dir| dir.sync_all()).map_err(ImageError::io(&staging, "fsync"))?;
        // Nobody may be removing files from it while it gets its name.
        let mut over = self.cleanup.over.lock().unwrap_or_else(PoisonError::into_inner);
        if *over {
            let gone = io::Error::new(io::ErrorKind::Interrupted, "told to end");
            return Err(ImageError::io(&self.target, "finish")(gone));
        }
        self.rename(&staging)?;
        *over = true;
        drop(over);
        File::open(&self.parent).and_then(|dir| dir.sync_all()).map_err(ImageError::io(
            &self.parent,
            "fsync, after the images were put in place (complete, but a power cut may lose them)",
        ))?;
        if self.over {
            // The old one has our name now. If it stays it is taken for abandoned, as it is.
            let _ = fs::remove_dir_all(&staging);
        }
        Ok(())
    }

    fn write_manifest(&mut self, pages: &BTreeMap<u64, Vec<ManifestPiece>>) -> Result<(), ImageError> {
        if self.has(Image::CkptManifest, 0) {
            let what = "the manifest is made by the writer, it can't be part of a stream".to_owned();
            return Err(ImageError::Stream { file: Image::CkptManifest.file_name(0), what });
        }
        let adopted = std::mem::take(&mut self.adopted).into_values();
        let entries: Vec<ManifestEntry> = self
            .outputs
            .iter()
            .map(|(&(image, arg), output)| ManifestEntry {
                name: image.file_name(arg),
                size: output.size,
                xxh3: (image != Image::Pages).then(|| output.hash.digest()),
                pieces: pages.get(&arg).filter(|_| image == Image::Pages).cloned().unwrap_or_default(),
            })
            .chain(adopted)
            .collect();
        for entry in entries {
            self.entry(Image::CkptManifest, 0, &entry.encode_to_vec())?;
        }
        Ok(())
    }

    fn rename(&self, staging: &Path) -> Result<(), ImageError> {
        let exists = || ImageError::Exists { path: self.target.clone() };
        if self.over {
            return renameat2(AT_FDCWD, staging, AT_FDCWD, &self.target, RenameFlags::RENAME_EXCHANGE)
                .map_err(ImageError::errno(&self.target, "renameat2(RENAME_EXCHANGE)"));
        }
        match renameat2(AT_FDCWD, staging, AT_FDCWD, &self.target, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => Err(exists()),
            // Some file systems do not know the flag (EINVAL: renameat2(2)). A plain rename replaces
            // no file and no directory with anything in it.
            Err(Errno::EINVAL) => match fs::symlink_metadata(&self.target) {
                Ok(_) => Err(exists()),
                Err(_) => fs::rename(staging, &self.target).map_err(ImageError::io(&self.target, "rename")),
            },
            Err(errno) => Err(ImageError::errno(&self.target, "rename")(errno)),
        }
    }
}

impl Output {
    fn put(&mut self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(bytes).map_err(ImageError::io(path, "write"))?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for DirWriter {
    fn drop(&mut self) {
        // To remove it takes a descriptor, and there may be no other left.
        self.outputs.clear();
        self.lock = None;
        self.cleanup.remove();
    }
}

/// Removes the staging directory of a [`DirWriter`], from another thread too.
#[derive(Debug, Clone)]
pub struct Cleanup {
    staging: PathBuf,
    /// The directory is gone, or has its final name.
    over: Arc<Mutex<bool>>,
}

impl Cleanup {
    /// Removes the staging directory, unless it has become the final one. The writer can't finish any more.
    pub fn remove(&self) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if !*over {
            *over = true;
            // Whoever shares it may make one more file meanwhile.
            for _ in 0..100 {
                match fs::remove_dir_all(&self.staging) {
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    _ => return,
                }
            }
        }
    }
}

/// A new staging directory, locked (`None` where locks are not supported: then nobody removes what is
/// left behind, and that is all).
fn make_staging(parent: &Path, prefix: &OsStr) -> Result<(PathBuf, Option<Flock<File>>), ImageError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let last = tries > 100;
        let mut random = [0; 8];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(ImageError::io("/dev/urandom", "read"))?;
        let mut name = prefix.to_owned();
        name.push(format!("{:016x}", u64::from_ne_bytes(random)));
        let staging = parent.join(name);
        match DirBuilder::new().mode(0o700).create(&staging) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !last => continue,
            Err(e) => return Err(ImageError::io(staging, "mkdir")(e)),
        }
        // A writer of the same name that starts now may take the directory for an abandoned one as
        // long as it is not locked. Then the directory is gone, or locked and about to go: take another.
        match File::open(&staging) {
            Ok(dir) => match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if lock.metadata().is_ok_and(|meta| meta.nlink() > 0) => {
                    return Ok((staging, Some(lock)));
                }
                Ok(_) | Err((_, Errno::EWOULDBLOCK)) if !last => {}
                Ok(_) | Err(_) => return Ok((staging, None)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound && !last => {}
            Err(e) => return Err(ImageError::io(staging, "open")(e)),
        }
    }
}

/// Removes staging directories whose writer was killed. Failing to is no error: they are in nobody's way.
fn remove_abandoned(parent: &Path, prefix: &OsStr) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name
            .as_bytes()
            .strip_prefix(prefix.as_bytes())
            .is_some_and(|rest| rest.len() == 16 && rest.iter().all(u8::is_ascii_hexdigit));
        if !ours {
            continue;
        }
        let flags = nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
        let Ok(dir) = OpenOptions::new().read(true).custom_flags(flags).open(entry.path()) else { continue };
        if Flock::lock(dir, FlockArg::LockExclusiveNonblock).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether link(2) answers so where a copy does as well.
fn is_no_link(errno: Errno) -> bool {
    is_no_way(errno) || errno == Errno::EMLINK
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn task() -> Vec<u8> {
        ckpt_proto::types::PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1] }.encode_to_vec()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_appears_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut writer = DirWriter::create(&path).unwrap();
        writer.entry(Image::Pstree, 0, &task()).unwrap();
        writer.data(Image::Fdinfo, 2, &[]).unwrap();
        assert!(!path.exists());
        writer.finish().unwrap();
        assert_eq!(names(dir.path()), ["x"]);
        assert_eq!(names(&path), ["ckpt-manifest.img", "fdinfo-2.img", "pstree.img"]);
        assert_eq!(fs::read(path.join("fdinfo-2.img")).unwrap().len(), 8);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(path.join("pstree.img")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_dropped_writer_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = DirWriter::create(&dir.path().join("x")).unwrap();
        writer.entry(Image::Pstree, 0, &task()).unwrap();
        drop(writer);
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn what_exists_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(DirWriter::create(&path), Err(ImageError::Exists { .. })));
        fs::remove_file(&path).unwrap();
        // Nor if it comes to be in the meantime, not even an empty directory.
        let mut writer = DirWriter::create(&path).unwrap();
        writer.entry(Image::Pstree, 0, &task()).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(writer.finish(), Err(ImageError::Exists { .. })));
        assert_eq!(names(dir.path()), ["x"]);
        assert_eq!(names(&path), [""; 0]);
    }

    #[test]
    fn what_a_killed_writer_left_is_removed_and_a_living_writers_is_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".x.ckpt-partial-0123456789abcdef")).unwrap();
        let path = dir.path().join("x");
        let first = DirWriter::create(&path).unwrap();
        assert_eq!(names(dir.path()).len(), 1, "abandoned directory still there");
        let second = DirWriter::create(&path).unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop((first, second));
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn more_images_than_open_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut writer = DirWriter::create(&path).unwrap();
        for _ in 0..2 {
            for arg in 0..200 {
                writer.entry(Image::Fdinfo, arg, &fdinfo()).unwrap();
            }
        }
        writer.finish().unwrap();
        let set = crate::ImageSet::from_dir(&path).unwrap();
        assert!((0..200).all(|arg| set.entries(Image::Fdinfo, arg) == [fdinfo(), fdinfo()]));
    }

    #[test]
    fn pages_that_somebody_else_wrote_are_believed_only_if_they_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut writer = DirWriter::create(&path).unwrap();
        writer.entry(Image::Pstree, 0, &task()).unwrap();
        writer.trust_checksums();
        let _directory = writer.share_directory().unwrap();
        let place = |at: usize, bytes: &[u8]| {
            use std::os::unix::fs::FileExt;
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(writer.staging.join("pages-1.img"))
                .unwrap();
            file.write_all_at(bytes, at as u64).unwrap();
        };
        let size = usize::try_from(MIN_PIECE).unwrap();
        let pages = [vec![7; size], vec![0; size], vec![9; size]].concat();
        place(0, &pages[..size]);
        place(2 * size, &pages[2 * size..]);
        let facts = |n: usize| Facts::of(&pages[n * size..(n + 1) * size]);
        let len = MIN_PIECE;
        writer.pages_placed(1, 0, len, &facts(0)).unwrap();
        // The second one is sent; the third is not overwritten by it.
        writer.data(Image::Pages, 1, &pages[size..2 * size]).unwrap();
        assert!(writer.pages_placed(1, len, len, &facts(2)).is_err(), "that is where the second one is");
        assert!(writer.pages_placed(1, 2 * len, len + 1, &facts(2)).is_err(), "more than is there");
        writer.pages_placed(1, 2 * len, len, &facts(2)).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::read(path.join("pages-1.img")).unwrap(), pages);
        crate::ImageSet::from_dir(&path).unwrap();
    }

    fn fdinfo() -> Vec<u8> {
        ckpt_proto::types::FdinfoEntry { id: 1, flags: 0, r#type: 1, fd: 3, ..Default::default() }
            .encode_to_vec()
    }
}
