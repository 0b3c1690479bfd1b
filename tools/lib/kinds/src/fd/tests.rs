//! Round trips in one process: descriptors of the test itself are dumped to a stream, made again
//! from it, and looked at.

mod files;
mod unix_sockets;

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileExt, MetadataExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::Mutex,
};

use ckpt_images::ImageSet;
use ckpt_proto::{
    Image, Message,
    stream::Writer,
    types::{FdinfoEntry, FileEntry, FownEntry, Hello, MemfdInodeEntry, RemapFilePathEntry, UnixSkEntry},
};
use ckpt_sys::{FileId, Pid, Refused, SocketId, TargetFd, file, sock};
use nix::{
    fcntl::OFlag,
    sys::{
        eventfd::{EfdFlags, EventFd},
        memfd::{MFdFlags, memfd_create},
        socket::{AddressFamily, SockFlag, SockType, send, socketpair},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use super::{
    DumpOptions, External, FileTable, Look, OpenFiles, RestoreOptions,
    socket::{self, Completion, Queued, Say, SkOptions},
    sockopt::Defaults,
    unix::{self, ExternalSocket},
};

fn own_pid() -> Pid {
    Pid(std::process::id().cast_signed())
}

fn target(fd: &impl AsRawFd) -> TargetFd {
    TargetFd(fd.as_raw_fd())
}

/// A dump of some descriptors of this process.
#[derive(Default)]
struct Dump {
    options: DumpOptions,
    sockets: SkOptions,
}

/// Takes entries, and keeps socket stubs apart as ckpt-sk would.
struct Capture {
    writer: Writer<File>,
    stubs: Vec<FileEntry>,
}

impl crate::Sink for Capture {
    fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> anyhow::Result<()> {
        if image == Image::Files {
            let entry = FileEntry::decode(message)?;
            if entry.ckpt_stub.is_some() {
                self.stubs.push(entry);
                return Ok(());
            }
        }
        Ok(self.writer.entry(image, arg, message)?)
    }
    fn data(&mut self, image: Image, arg: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.writer.data(image, arg, bytes)?)
    }
    fn data_from(&mut self, image: Image, arg: u64, from: BorrowedFd<'_>, len: u64) -> anyhow::Result<()> {
        crate::Sink::data_from(&mut self.writer, image, arg, from, len)
    }
}

impl Dump {
    fn run(&self, fds: &[TargetFd]) -> anyhow::Result<ImageSet> {
        // A child keeps options of sockets for a moment (`LentOption`).
        let _forking = crate::descriptors::forking();
        let stream = tempfile::tempfile()?;
        let hello = Hello { page_size: 4096, arch: 1, ..Hello::default() };
        let mut sink = Capture { writer: Writer::open(stream, hello)?, stubs: Vec::new() };
        let mut table = FileTable::new(vec![own_pid()], self.options.clone(), super::Survey::default());
        table.add_descriptors(own_pid(), "test", 2, fds, &mut sink)?;
        let _in_flight = table.finish(&mut sink)?;
        let stubs = std::mem::take(&mut sink.stubs);
        let say = Say { warn: &warned, note: &|_| () };
        let defaults = &Defaults::default();
        let completion = Completion {
            net_ns: &|_| Some(2),
            options: &self.sockets,
            say,
            defaults,
            look: &Look::default(),
        };
        socket::complete(&stubs, completion, &mut sink)?;
        let mut stream = sink.writer.end()?;
        stream.rewind()?;
        Ok(ImageSet::from_stream(stream)?)
    }
}

fn dump(fds: &[TargetFd]) -> ImageSet {
    Dump::default().run(fds).unwrap()
}

fn restore(set: &ImageSet) -> OpenFiles {
    OpenFiles::open_all(set, &RestoreOptions::default()).unwrap()
}

/// The restored file that descriptor number `fd` had.
fn restored<'a>(set: &ImageSet, files: &'a OpenFiles, fd: TargetFd) -> BorrowedFd<'a> {
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    let entry = table.iter().find(|e| e.fd == fd.0.unsigned_abs()).unwrap();
    files.fd(FileId(entry.id)).unwrap()
}

/// The number of the only descriptor.
fn entries_fd(set: &ImageSet) -> TargetFd {
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    TargetFd(table[0].fd.cast_signed())
}

fn entries(set: &ImageSet) -> Vec<FileEntry> {
    set.all(Image::Files, 0).unwrap()
}

fn usk(set: &ImageSet, id: u64) -> UnixSkEntry {
    entries(set).into_iter().filter_map(|e| e.usk).find(|u| u64::from(u.ino) == id).unwrap()
}

fn read_all(fd: BorrowedFd<'_>) -> Vec<u8> {
    file::set_flags(fd, libc::O_NONBLOCK.cast_unsigned()).unwrap();
    let mut buffer = vec![0; 1 << 16];
    let n = nix::unistd::read(fd, &mut buffer).unwrap_or(0);
    buffer.truncate(n);
    buffer
}

fn inode(fd: &impl AsFd) -> u64 {
    nix::sys::stat::fstat(fd).unwrap().st_ino
}

fn refusal(result: anyhow::Result<ImageSet>) -> Refused {
    let error = result.map(|_| ()).unwrap_err();
    error.downcast::<Refused>().unwrap()
}

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn warned(text: &str) {
    WARNINGS.lock().unwrap().push(text.to_owned());
}
