//! Round trips in one process: descriptors of the test itself are dumped to a stream, made again
//! from it, and looked at.

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

#[test]
fn regular_file_keeps_position_flags_and_sharing() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("a file (deleted)");
    let mut a = File::options().append(true).read(true).create(true).open(&name).unwrap();
    a.write_all(b"twelve bytes").unwrap();
    let duplicate = a.try_clone().unwrap();
    let other = File::open(&name).unwrap();
    nix::fcntl::fcntl(&duplicate, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let set = dump(&[target(&a), target(&duplicate), target(&other)]);
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    assert_eq!(table[0].id, table[1].id);
    assert_ne!(table[0].id, table[2].id);
    assert_eq!((table[0].flags, table[1].flags), (1, 0));
    let reg = entries(&set)[0].reg.clone().unwrap();
    assert_eq!((reg.pos, reg.size), (12, Some(12)));
    assert_eq!(reg.flags, (libc::O_APPEND | libc::O_RDWR | 0o100_000).cast_unsigned());
    let files = restore(&set);
    let fd = restored(&set, &files, target(&a));
    assert_eq!(nix::unistd::lseek(fd, 0, nix::unistd::Whence::SeekCur).unwrap(), 12);
    assert_eq!(file::flags(fd).unwrap(), reg.flags);
    assert!(fd.as_raw_fd() > a.as_raw_fd());
}

#[test]
fn deleted_file_comes_back_with_its_holes_and_no_name() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("gone");
    let a =
        File::options().read(true).write(true).create(true).truncate(true).mode(0o640).open(&name).unwrap();
    a.set_len(8 << 20).unwrap();
    a.write_all_at(b"far out", 5 << 20).unwrap();
    let b = File::open(&name).unwrap();
    fs::remove_file(&name).unwrap();
    let set = dump(&[target(&a), target(&b)]);
    assert_eq!(set.all::<RemapFilePathEntry>(Image::RemapFpath, 0).unwrap().len(), 2);
    let files = restore(&set);
    let back = File::from(restored(&set, &files, target(&a)).try_clone_to_owned().unwrap());
    let other = File::from(restored(&set, &files, target(&b)).try_clone_to_owned().unwrap());
    let (m, n) = (back.metadata().unwrap(), other.metadata().unwrap());
    assert_eq!((m.nlink(), m.len(), m.mode() & 0o777), (0, 8 << 20, 0o640));
    assert_eq!(m.ino(), n.ino());
    assert!(m.blocks() * 512 < 1 << 20, "holes were filled");
    let mut buffer = [0; 7];
    other.read_exact_at(&mut buffer, 5 << 20).unwrap();
    assert_eq!(&buffer, b"far out");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn large_deleted_file_is_refused_with_the_option() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("gone");
    let mut a = File::create(&name).unwrap();
    a.write_all(&vec![1; 2 << 20]).unwrap();
    fs::remove_file(&name).unwrap();
    let refused = refusal(Dump::default().run(&[target(&a)]));
    assert!(refused.advice.unwrap().contains("--ghost-limit 2097152"));
    let options = DumpOptions { ghost_limit: 2 << 20, ..DumpOptions::default() };
    Dump { options, ..Dump::default() }.run(&[target(&a)]).unwrap();
}

#[test]
fn deleted_name_is_followed_to_the_other_one() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let a = File::create(&one).unwrap();
    fs::hard_link(&one, &two).unwrap();
    fs::remove_file(&one).unwrap();
    let set = dump(&[target(&a)]);
    let files = restore(&set);
    assert_eq!(inode(&restored(&set, &files, target(&a))), inode(&a));
    // Moved out of the directory it can't be found.
    let elsewhere = dir.path().join("sub");
    fs::create_dir(&elsewhere).unwrap();
    fs::rename(&two, elsewhere.join("two")).unwrap();
    refusal(Dump::default().run(&[target(&a)]));
}

#[test]
fn changed_data_file_is_told_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("data of changed_data_file");
    fs::write(&name, b"before").unwrap();
    let a = File::open(&name).unwrap();
    let set = dump(&[target(&a)]);
    fs::write(&name, b"after it").unwrap();
    let options = RestoreOptions { warn: warned, ..RestoreOptions::default() };
    OpenFiles::open_all(&set, &options).unwrap();
    assert!(
        WARNINGS.lock().unwrap().iter().any(|w| w.contains("changed_data_file") && w.contains("8 bytes"))
    );
    let strict = RestoreOptions { files_strict: true, ..options };
    assert!(OpenFiles::open_all(&set, &strict).unwrap_err().root_cause().is::<Refused>());
    fs::remove_file(&name).unwrap();
    let error = format!("{:#}", OpenFiles::open_all(&set, &strict).unwrap_err());
    assert!(error.contains("changed_data_file") && error.contains("ENOENT"), "{error}");
}

#[test]
fn devices_and_directories() {
    let (null, dir) = (File::open("/dev/null").unwrap(), File::open("/tmp").unwrap());
    let set = dump(&[target(&null), target(&dir)]);
    let files = restore(&set);
    assert_eq!(inode(&restored(&set, &files, target(&null))), inode(&null));
    assert_eq!(inode(&restored(&set, &files, target(&dir))), inode(&dir));
}

#[test]
fn pipe_keeps_what_is_in_flight() {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
    nix::unistd::write(&writer, b"in flight").unwrap();
    let set = dump(&[target(&reader), target(&writer)]);
    let mut buffer = [0; 16];
    assert_eq!(nix::unistd::read(&reader, &mut buffer).unwrap(), 9, "nothing was taken out");
    let files = restore(&set);
    let (r, w) = (restored(&set, &files, target(&reader)), restored(&set, &files, target(&writer)));
    assert_eq!((file::flags(r).unwrap(), file::flags(w).unwrap()), (0, 1));
    assert_eq!(nix::fcntl::fcntl(w, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
    assert_eq!(read_all(r), b"in flight");
    nix::unistd::write(w, b"more").unwrap();
    assert_eq!(read_all(r), b"more");
}

#[test]
fn pipe_that_nobody_writes_to_ends() {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    nix::unistd::write(&writer, b"last").unwrap();
    drop(writer);
    let set = dump(&[target(&reader)]);
    let files = restore(&set);
    let r = restored(&set, &files, target(&reader));
    assert_eq!(read_all(r), b"last");
    assert_eq!(nix::unistd::read(r, &mut [0; 4]), Ok(0));
}

#[test]
fn pipe_that_leads_outside_needs_a_word() {
    let (reader, mut child) = {
        // An exec closes the rest: it ends with the spawn.
        let _forking = crate::descriptors::forking();
        let child =
            std::process::Command::new("sleep").arg("100").stdout(std::process::Stdio::piped()).spawn();
        let mut child = child.unwrap();
        (child.stdout.take().unwrap(), child)
    };
    let fds = [target(&reader)];
    let refused = refusal(Dump::default().run(&fds));
    let id = inode(&reader);
    assert!(refused.reason.contains(&format!("pid {} (sleep)", child.id())), "{refused:?}");
    assert!(refused.advice.unwrap().contains(&format!("--external pipe:[{id}]")));
    let options = DumpOptions { external: vec![External::Pipe(id)], ..DumpOptions::default() };
    let set = Dump { options, ..Dump::default() }.run(&fds).unwrap();
    let options = DumpOptions { external: vec![External::Pipe(1)], ..DumpOptions::default() };
    let unknown = Dump { options, ..Dump::default() }.run(&fds).map(|_| ()).unwrap_err();
    assert!(unknown.to_string().contains(&format!("pipe:[{id}]")), "{unknown}");
    child.kill().unwrap();
    child.wait().unwrap();
    let error = OpenFiles::open_all(&set, &RestoreOptions::default()).unwrap_err();
    assert!(error.root_cause().is::<Refused>());
    let (new_reader, new_writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    let mut options = RestoreOptions::default();
    options.inherit.push((new_reader.as_raw_fd(), format!("pipe:[{id}]")));
    let files = OpenFiles::open_all(&set, &options).unwrap();
    nix::unistd::write(&new_writer, b"hello").unwrap();
    assert_eq!(read_all(restored(&set, &files, fds[0])), b"hello");
    options.inherit.push((0, "pipe:[1]".to_owned()));
    let error = OpenFiles::open_all(&set, &options).unwrap_err().to_string();
    assert!(error.contains(&format!("pipe:[{id}]")), "{error}");
}

#[test]
fn fifo_keeps_what_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("fifo");
    nix::unistd::mkfifo(&name, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let both = File::options().read(true).write(true).open(&name).unwrap();
    let reader = File::open(&name).unwrap();
    nix::unistd::write(&both, b"by name").unwrap();
    let set = dump(&[target(&both), target(&reader)]);
    assert_eq!(read_all(reader.as_fd()), b"by name");
    let (both_fd, reader_fd) = (target(&both), target(&reader));
    drop((both, reader));
    let files = restore(&set);
    assert_eq!(read_all(restored(&set, &files, reader_fd)), b"by name");
    nix::unistd::write(restored(&set, &files, both_fd), b"again").unwrap();
    assert_eq!(read_all(restored(&set, &files, reader_fd)), b"again");
}

#[test]
fn event_descriptors() {
    let plain = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK).unwrap();
    let semaphore = EventFd::from_value_and_flags(2, EfdFlags::EFD_SEMAPHORE).unwrap();
    let signals = file::signalfd(1 << 9 | 1 << 33).unwrap();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
    let (hour, step) = (TimeSpec::new(3600, 0), TimeSpec::new(0, 5));
    timer.set(Expiration::IntervalDelayed(hour, step), TimerSetTimeFlags::empty()).unwrap();
    let fast = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
    let milli = TimeSpec::new(0, 1_000_000);
    fast.set(Expiration::Interval(milli), TimerSetTimeFlags::empty()).unwrap();
    // Expired, and standing still since nobody has read it.
    nix::poll::poll(
        &mut [nix::poll::PollFd::new(fast.as_fd(), nix::poll::PollFlags::POLLIN)],
        nix::poll::PollTimeout::NONE,
    )
    .unwrap();
    let timer_fd = TargetFd(timer.as_fd().as_raw_fd());
    let fast_fd = TargetFd(fast.as_fd().as_raw_fd());
    let set = dump(&[target(&plain), target(&semaphore), target(&signals), timer_fd, fast_fd]);
    let all = entries(&set);
    let golden = all[0].efd.as_ref().unwrap();
    assert_eq!((golden.flags, golden.counter), ((libc::O_RDWR | libc::O_NONBLOCK).cast_unsigned(), 7));
    let files = restore(&set);
    let count = |fd: TargetFd| {
        let bytes = read_all(restored(&set, &files, fd));
        bytes.try_into().map(u64::from_ne_bytes)
    };
    assert_eq!(count(target(&plain)), Ok(7));
    assert_eq!(count(target(&semaphore)), Ok(1));
    assert_eq!(count(target(&semaphore)), Ok(1));
    assert!(count(fast_fd).unwrap() >= 1);
    let left = file::timerfd_gettime(restored(&set, &files, timer_fd)).unwrap();
    assert!((3590..=3600).contains(&left.value.0), "{left:?}");
    assert_eq!(left.interval, (0, 5));
    // It is armed: what is left of a millisecond may be nothing at this very moment.
    assert_eq!(file::timerfd_gettime(restored(&set, &files, fast_fd)).unwrap().interval, (0, 1_000_000));
    let again = Dump::default();
    let fd = TargetFd(restored(&set, &files, target(&signals)).as_raw_fd());
    let mask = entries(&again.run(&[fd]).unwrap())[0].sgfd.as_ref().unwrap().sigmask;
    assert_eq!(mask, 1 << 9 | 1 << 33);
}

#[test]
fn epoll_members_come_back_by_calls() {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let set_fd = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let event = EventFd::from_value(1).unwrap();
    let other = EventFd::from_value(1).unwrap();
    set_fd.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 42)).unwrap();
    let old = other.as_fd().try_clone_to_owned().unwrap();
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET | EpollFlags::EPOLLONESHOT;
    set_fd.add(&old, EpollEvent::new(flags, u64::MAX)).unwrap();
    let stale = old.as_raw_fd();
    drop(old);
    let set = dump(&[target(&set_fd.0), target(&event), target(&other)]);
    let entry = entries(&set).into_iter().find_map(|e| e.epfd).unwrap();
    assert_eq!(entry.flags, libc::O_RDWR.cast_unsigned());
    let member = |tfd: i32| entry.tfd.iter().find(|t| t.tfd == tfd.unsigned_abs()).unwrap();
    let golden = member(event.as_raw_fd());
    assert_eq!((golden.events, golden.data, golden.dev.is_some(), golden.ckpt_fd), (25, 42, true, None));
    let gone = member(stale);
    assert_eq!(gone.ckpt_fd, Some(other.as_raw_fd().unsigned_abs()));
    assert_eq!(gone.events, 25 | (1 << 31) | (1 << 30));
    let mut files = restore(&set);
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    let names: Vec<String> = files.placed(&table, own_pid()).unwrap().into_iter().map(|c| c.name).collect();
    assert!(names.iter().any(|n| n.contains(&format!("ADD, {})", event.as_raw_fd()))), "{names:?}");
    assert!(names.iter().any(|n| n == &format!("close({stale})")), "{names:?}");
    assert!(files.placed(&table, own_pid()).unwrap().is_empty(), "each set once");
}

#[test]
fn memfd_and_anonymous_memory() {
    let memory = memfd_create(c"a name", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    let mut memory = File::from(memory);
    memory.write_all(b"contents").unwrap();
    nix::fcntl::fcntl(&memory, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK))
        .unwrap();
    let anonymous = file::shared_anonymous(4096).unwrap();
    let set = dump(&[target(&memory), target(&anonymous)]);
    let inodes: Vec<MemfdInodeEntry> = set.all(Image::MemfdInode, 0).unwrap();
    assert_eq!((&inodes[0].name[..], inodes[0].size, inodes[0].seals), (&b"a name"[..], 8, 2));
    assert_eq!((&inodes[1].name[..], inodes[1].seals, inodes[1].mode), (&b"/dev/zero"[..], 1, None));
    let mut files = restore(&set);
    let fd = restored(&set, &files, target(&memory));
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("/memfd:a name (deleted)"));
    assert_eq!(nix::unistd::lseek(fd, 0, nix::unistd::Whence::SeekCur).unwrap(), 8);
    let (segment, size) = files.shmem(inodes[0].shmid.into()).unwrap();
    assert_eq!(size, 8);
    nix::unistd::write(segment, b"put back").unwrap();
    let mut text = String::new();
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "put back");
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    assert!(files.placed(&table, own_pid()).unwrap().is_empty());
    let (segment, _) = files.shmem(inodes[0].shmid.into()).unwrap();
    assert_eq!(nix::fcntl::fcntl(segment, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap(), 2);
}

#[test]
fn sealed_memory_that_is_only_mapped_is_sealed_again() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let memory = File::from(memfd_create(c"sealed", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    memory.set_len(4096).unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL)).unwrap();
    let stream = tempfile::tempfile().unwrap();
    let mut writer = Writer::open(stream, Hello { page_size: 4096, arch: 1, ..Hello::default() }).unwrap();
    let mut table = FileTable::new(vec![own_pid()], DumpOptions::default(), super::Survey::default());
    let link = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let shmem = table.add_shmem(own_pid(), Path::new(&link), &mut writer).unwrap();
    table.finish(&mut writer).unwrap();
    let mut stream = writer.end().unwrap();
    stream.rewind().unwrap();
    let mut files = restore(&ImageSet::from_stream(stream).unwrap());
    let mapped = files.fd(FileId(shmem.file_id)).unwrap();
    assert_eq!(file::flags(mapped).unwrap() & libc::O_ACCMODE.cast_unsigned(), 0, "it could not be sealed");
    files.placed(&[], own_pid()).unwrap();
    let (segment, _) = files.shmem(shmem.shmid.into()).unwrap();
    assert_eq!(fcntl(segment, FcntlArg::F_GET_SEALS).unwrap(), 1 | 8);
}

#[test]
fn owner_of_a_file_is_set_as_the_user_who_set_it() {
    let ours = (nix::unistd::getuid().as_raw(), nix::unistd::geteuid().as_raw());
    let fown = FownEntry { uid: ours.0, euid: ours.1, signum: 0, pid_type: 1, pid: 1 };
    let names = |fown| super::fown::calls(5, 0, fown).into_iter().map(|c| c.name).collect::<Vec<_>>();
    assert_eq!(names(&fown), ["fcntl(5, F_SETOWN_EX, 1)"]);
    let of_another = FownEntry { uid: 1000, euid: 1001, ..fown };
    let back = format!("setresuid({}, {}, {})", ours.0, ours.1, ours.1);
    let before = format!("setresuid(1000, 1001, {})", ours.1);
    assert_eq!(names(&of_another), [&before, "fcntl(5, F_SETOWN_EX, 1)", &back]);
}

#[test]
fn locks_are_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let a = File::create(dir.path().join("locked")).unwrap();
    a.lock().unwrap();
    let set = dump(&[target(&a)]);
    let mut files = restore(&set);
    let table: Vec<FdinfoEntry> = set.all(Image::Fdinfo, 2).unwrap();
    let calls = files.placed(&table, own_pid()).unwrap();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].nr, libc::SYS_flock);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let mptcp = sock::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 262).unwrap();
    let kmsg = File::open("/proc/1/status").unwrap();
    let namespace = File::open("/proc/self/ns/net").unwrap();
    let fds = [(target(&mptcp), "MPTCP"), (target(&kmsg), "in /proc"), (target(&namespace), "namespace")];
    for (fd, name) in fds {
        let refused = refusal(Dump::default().run(&[fd]));
        assert!(refused.reason.contains(name), "{refused:?}");
        assert!(refused.subject.contains(&format!("pid {} (test) fd {fd}", own_pid())), "{refused:?}");
    }
}

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn say(fd: &OwnedFd, text: &[u8]) {
    send(fd.as_raw_fd(), text, nix::sys::socket::MsgFlags::MSG_DONTWAIT).unwrap();
}

#[test]
fn socketpair_queues_survive_both_ways() {
    let (a, b) = pair(SockType::Stream);
    say(&a, b"to b");
    say(&b, b"to ");
    say(&b, b"a");
    sock::set_option(a.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 0).unwrap();
    let set = dump(&[target(&a), target(&b)]);
    let entry = usk(&set, inode(&a));
    assert_eq!((entry.r#type, entry.state, entry.flags, entry.uflags), (1, 1, 2, 0));
    assert_eq!((u64::from(entry.peer), &entry.name[..], entry.ns_id), (inode(&b), &b""[..], Some(2)));
    assert_eq!(entry.backlog, 768, "what CRIU writes there is the memory of what was sent");
    assert_eq!((entry.shutdown, entry.file_perms, entry.opts.so_mark), (None, None, None));
    let files = restore(&set);
    assert_eq!(read_all(restored(&set, &files, target(&b))), b"to b");
    assert_eq!(read_all(restored(&set, &files, target(&a))), b"to a");
    assert_eq!(read_all(b.as_fd()), b"to b", "nothing was taken from the original");
    let old = sock::option(a.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap();
    let new = sock::option(restored(&set, &files, target(&a)), libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap();
    assert_eq!(old, new);
}

#[test]
fn message_boundaries_survive() {
    for kind in [SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        for text in [&b"one"[..], b"three", b"x"] {
            say(&a, text);
        }
        if kind == SockType::SeqPacket {
            nix::sys::socket::shutdown(a.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
        }
        let set = dump(&[target(&a), target(&b)]);
        let peek_off = sock::option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
        assert_eq!(peek_off, -1, "put back");
        let files = restore(&set);
        let back = restored(&set, &files, target(&b));
        for text in [&b"one"[..], b"three", b"x"] {
            assert_eq!(read_all(back), text);
        }
        assert_eq!(read_all(b.as_fd()), b"one");
    }
}

#[test]
fn one_way_connections_of_all_sorts() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("d.sock");
    let receiver = std::os::unix::net::UnixDatagram::bind(&name).unwrap();
    let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
    sender.connect(&name).unwrap();
    let fds = [target(&receiver), target(&sender)];
    let named = dump(&fds);
    fs::remove_file(&name).unwrap();
    // Somebody else's business, which a deleted name must not disturb.
    fs::write(&name, "another file").unwrap();
    let deleted = dump(&fds);
    drop(receiver);
    for set in [deleted, named] {
        let files = restore(&set);
        nix::unistd::write(restored(&set, &files, fds[1]), b"through").unwrap();
        let receiver = restored(&set, &files, fds[0]);
        assert_eq!(read_all(receiver), b"through");
        assert_eq!(super::dump::path(&sock::unix_name(receiver, sock::Side::Local).unwrap()), name);
        if fs::read(&name).is_ok_and(|text| text == b"another file") {
            fs::remove_file(&name).unwrap();
        }
    }
    // Half of a pair that was connected to another socket since.
    let (a, b) = pair(SockType::Datagram);
    say(&b, b"before");
    say(&a, b"lost when b turns away");
    let other = std::os::unix::net::UnixDatagram::bind(dir.path().join("e.sock")).unwrap();
    sock::connect_unix(b.as_fd(), dir.path().join("e.sock").as_os_str().as_encoded_bytes()).unwrap();
    // Whoever is left behind is told so by an error, which has to be read first.
    let fds = [target(&a), target(&b), target(&other)];
    assert!(refusal(Dump::default().run(&fds)).reason.contains("ECONNRESET"));
    assert_eq!(sock::option(a.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR).unwrap(), libc::ECONNRESET);
    let set = dump(&fds);
    drop((a, b, other));
    let files = restore(&set);
    let [a, b, other] = fds.map(|fd| restored(&set, &files, fd));
    assert_eq!(read_all(a), b"before");
    nix::unistd::write(b, b"to the other").unwrap();
    assert_eq!(read_all(other), b"to the other");
    assert!(nix::unistd::write(a, b"x").is_err(), "its peer has turned away");
}

#[test]
fn datagrams_keep_their_order_and_senders() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let bind = |name: &str| std::os::unix::net::UnixDatagram::bind(at(name)).unwrap();
    let receiver = bind("receiver");
    let (one, two, gone) = (bind("one"), bind("two"), bind("gone"));
    let unnamed = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let all = [(&one, "1"), (&two, "2"), (&gone, "3"), (&unnamed, "4"), (&one, "5")];
    for (sender, text) in all {
        sender.send_to(text.as_bytes(), at("receiver")).unwrap();
    }
    one.connect(at("receiver")).unwrap();
    drop(gone);
    let fds = [target(&receiver), target(&one), target(&two)];
    let set = dump(&fds);
    drop((receiver, one, two));
    let files = restore(&set);
    let receiver =
        std::os::unix::net::UnixDatagram::from(restored(&set, &files, fds[0]).try_clone_to_owned().unwrap());
    receiver.set_nonblocking(true).unwrap();
    let mut buffer = [0; 8];
    for (text, sender) in
        [("1", Some("one")), ("2", Some("two")), ("3", Some("gone")), ("4", None), ("5", Some("one"))]
    {
        let (n, from) = receiver.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], text.as_bytes());
        assert_eq!(from.as_pathname().map(std::path::Path::to_owned), sender.map(at));
    }
    assert!(receiver.recv_from(&mut buffer).is_err());
    nix::unistd::write(restored(&set, &files, fds[1]), b"more").unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 4);
}

#[test]
fn empty_messages_are_in_every_checkpoint() {
    let (a, b) = pair(SockType::Datagram);
    for text in [&b""[..], b"one", b"", b"three"] {
        say(&a, text);
    }
    let fds = [target(&a), target(&b)];
    let set = dump(&fds);
    let files = restore(&set);
    let back = restored(&set, &files, fds[1]);
    for text in [&b""[..], b"one", b"", b"three"] {
        let mut buffer = [0; 9];
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let n = nix::sys::socket::recv(back.as_raw_fd(), &mut buffer, flags).unwrap();
        assert_eq!(&buffer[..n], text);
    }
    say(&b, b"");
    say(&a, &vec![3; 100_000]);
    for _ in 0..3 {
        let set = dump(&fds);
        let queue: Vec<ckpt_proto::types::SkPacketEntry> = set.all(Image::SkQueues, 0).unwrap();
        let of = |file: u32| queue.iter().filter(|p| p.id_for == file).map(|p| p.length).collect::<Vec<_>>();
        assert_eq!(of(usk(&set, inode(&b)).id), [0, 3, 0, 5, 100_000]);
        assert_eq!(of(usk(&set, inode(&a)).id), [0]);
    }
}

#[test]
fn only_an_empty_message_can_be_checkpointed_again() {
    for kind in [SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        say(&a, b"");
        say(&a, &vec![3; 100_000]);
        for _ in 0..3 {
            let set = dump(&[target(&a), target(&b)]);
            let queue: Vec<ckpt_proto::types::SkPacketEntry> = set.all(Image::SkQueues, 0).unwrap();
            assert_eq!(queue.iter().map(|p| p.length).collect::<Vec<_>>(), [0, 100_000], "{kind:?}");
        }
    }
}

#[test]
fn large_queue_and_small_buffer() {
    let (a, b) = pair(SockType::Stream);
    sock::set_option(a.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, 400_000).unwrap();
    file::set_flags(a.as_fd(), libc::O_NONBLOCK.cast_unsigned()).unwrap();
    let mut total = 0;
    while let Ok(n) = nix::unistd::write(&a, &[7; 1000]) {
        total += n;
    }
    sock::set_option(a.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, 5000).unwrap();
    let set = dump(&[target(&a), target(&b)]);
    let files = restore(&set);
    let back = restored(&set, &files, target(&b));
    assert_eq!(file::readable_bytes(back).unwrap() as usize, total);
    let size = sock::option(restored(&set, &files, target(&a)), libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap();
    assert_eq!(size, 10_000);
    assert!(file::flags(restored(&set, &files, target(&a))).unwrap() & libc::O_NONBLOCK.cast_unsigned() != 0);
}

#[test]
fn peer_that_closed_leaves_its_last_words() {
    let (a, b) = pair(SockType::Stream);
    say(&a, b"goodbye");
    drop(a);
    let set = dump(&[target(&b)]);
    let files = restore(&set);
    let back = restored(&set, &files, target(&b));
    assert_eq!(read_all(back), b"goodbye");
    assert_eq!(nix::unistd::read(back, &mut [0; 4]), Ok(0));
}

fn receive(fd: BorrowedFd<'_>) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut buffer = [0; 64];
    let got = ckpt_sys::unixsock::peek(fd, &mut buffer).unwrap().unwrap();
    // Received for good by a call that does not want the descriptors.
    assert_eq!(read_some(fd, got.len), buffer[..got.len]);
    (buffer[..got.len].to_vec(), got.rights)
}

fn read_some(fd: BorrowedFd<'_>, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len.max(1)];
    let n = nix::unistd::read(fd, &mut buffer).unwrap();
    buffer.truncate(n);
    buffer
}

#[test]
fn descriptors_in_flight() {
    for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        let mut data = tempfile::tempfile().unwrap();
        data.write_all(b"in a file").unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"in a pipe").unwrap();
        let event = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK).unwrap();
        let (c, d) = pair(SockType::Stream);
        nix::unistd::write(&d, b"in a socket").unwrap();
        let send = |bytes: &[u8], fds: &[BorrowedFd<'_>]| {
            ckpt_sys::unixsock::send_message(a.as_fd(), bytes, None, fds, None).unwrap();
        };
        send(b"plain", &[]);
        send(b"two", &[data.as_fd(), reader.as_fd()]);
        send(b"three", &[event.as_fd(), c.as_fd()]);
        // One that the table has too, and a socket that is in flight in itself.
        send(b"loop", &[writer.as_fd(), b.as_fd()]);
        send(b"end", &[]);
        drop((data, reader, event, c));
        let fds = [&a, &b, &d, &writer].map(target);
        let set = dump(&fds);
        drop((a, b, d, writer));
        let files = restore(&set);
        let [_, back, d, writer] = fds.map(|fd| restored(&set, &files, fd));
        // A stream has no boundary in front of descriptors, only behind them.
        let stream = kind == SockType::Stream;
        if !stream {
            assert_eq!(receive(back).0, b"plain");
        }
        let (text, rights) = receive(back);
        assert_eq!((&text[..], rights.len()), (if stream { &b"plaintwo"[..] } else { b"two" }, 2));
        check_file_and_pipe(&rights, writer);
        let (text, rights) = receive(back);
        assert_eq!((&text[..], rights.len()), (&b"three"[..], 2));
        assert_eq!(read_some(rights[0].as_fd(), 8), 7u64.to_ne_bytes());
        assert_eq!(read_some(rights[1].as_fd(), 64), b"in a socket");
        nix::unistd::write(d, b"more").unwrap();
        assert_eq!(read_some(rights[1].as_fd(), 64), b"more");
        let (text, rights) = receive(back);
        assert_eq!((&text[..], rights.len()), (&b"loop"[..], 2));
        for (fd, known) in rights.iter().zip([writer, back]) {
            let (own, fd, known) = (own_pid().leader(), target(fd), TargetFd(known.as_raw_fd()));
            let same = ckpt_sys::kcmp::compare(own, own, ckpt_sys::kcmp::Object::File(fd, known)).unwrap();
            assert_eq!(same, std::cmp::Ordering::Equal);
        }
        drop(rights);
        assert_eq!(receive(back).0, b"end");
    }
}

fn check_file_and_pipe(rights: &[OwnedFd], writer: BorrowedFd<'_>) {
    let mut file = File::from(rights[0].try_clone().unwrap());
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "in a file");
    assert_eq!(read_some(rights[1].as_fd(), 64), b"in a pipe");
    nix::unistd::write(writer, b"more").unwrap();
    assert_eq!(read_some(rights[1].as_fd(), 64), b"more");
}

#[test]
fn an_epoll_set_in_flight_is_refused() {
    let (a, b) = pair(SockType::Stream);
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    ckpt_sys::unixsock::send_message(a.as_fd(), b"x", None, &[epoll.0.as_fd()], None).unwrap();
    drop(epoll);
    let refused = refusal(Dump::default().run(&[target(&a), target(&b)]));
    assert!(refused.reason.contains("epoll set"), "{refused:?}");
}

#[test]
fn listener_and_accepted_connection_keep_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("l.sock");
    let listener = UnixListener::bind(&name).unwrap();
    fs::set_permissions(&name, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let client = UnixStream::connect(&name).unwrap();
    let fds = [target(&listener), target(&client)];
    assert_eq!(usk(&dump(&fds), inode(&client)).peer, usk(&dump(&fds), inode(&listener)).ino);
    (&client).write_all(b"question").unwrap();
    let queue: Vec<ckpt_proto::types::SkPacketEntry> = dump(&fds).all(Image::SkQueues, 0).unwrap();
    assert!(queue.len() == 1 && queue[0].length == 8 && queue[0].ckpt_unsent(), "{queue:?}");
    let (server, _) = listener.accept().unwrap();
    let fds = [target(&listener), target(&client), target(&server)];
    let set = dump(&fds);
    let entry = usk(&set, inode(&listener));
    assert_eq!(entry.state, 10);
    assert!(entry.backlog >= 128);
    assert_eq!(entry.name.last(), Some(&0), "a path ends with NUL, as in sun_path");
    // The original is still there.
    let error = OpenFiles::open_all(&set, &RestoreOptions::default()).unwrap_err();
    assert!(format!("{error:#}").contains("another process has a socket there"), "{error:#}");
    drop((listener, client, server));
    let mut files = restore(&set);
    assert_eq!(fs::metadata(&name).unwrap().mode() & 0o777, 0o600);
    let server = restored(&set, &files, fds[2]);
    let local = sock::unix_name(server, sock::Side::Local).unwrap();
    assert_eq!(super::dump::path(&local), name);
    assert_eq!(read_all(server), b"question");
    let client = UnixStream::connect(&name).unwrap();
    sock::accept(restored(&set, &files, fds[0])).unwrap();
    drop(client);
    files.undo();
    assert!(!name.exists());
}

#[test]
fn accepted_connection_whose_client_has_closed() {
    let dir = tempfile::tempdir().unwrap();
    for name in [dir.path().join("l.sock").into_os_string().into_encoded_bytes(), b"\0ckpt-widow".to_vec()] {
        let listener = socket_at(&name, true);
        let client = socket_at(b"", false);
        sock::connect_unix(client.as_fd(), &name).unwrap();
        let server = sock::accept(listener.as_fd()).unwrap();
        nix::unistd::write(&client, b"last words").unwrap();
        drop(client);
        let fds = [target(&listener), target(&server)];
        let set = dump(&fds);
        drop((listener, server));
        let files = restore(&set);
        let server = restored(&set, &files, fds[1]);
        assert_eq!(sock::trim_path(&sock::unix_name(server, sock::Side::Local).unwrap()), name);
        assert_eq!(read_all(server), b"last words");
        assert_eq!(nix::unistd::read(server, &mut [0]).unwrap(), 0);
    }
}

#[test]
fn connections_from_outside_that_wait_are_passed_over() {
    let name = format!("\0ckpt-backlog-{}", std::process::id()).into_bytes();
    let listener = socket_at(&name, true);
    let waiting = [socket_at(b"", false), socket_at(b"", false), socket_at(b"", false)];
    for client in &waiting {
        sock::connect_unix(client.as_fd(), &name).unwrap();
        nix::unistd::write(client, b"question").unwrap();
    }
    let [closed, ..] = waiting;
    drop(closed);
    let set = dump(&[target(&listener)]);
    let told = |w: &String| w.contains("1 connections, not accepted yet and closed");
    assert!(WARNINGS.lock().unwrap().iter().any(told));
    drop(listener);
    let files = restore(&set);
    let listener = restored(&set, &files, entries_fd(&set));
    file::set_flags(listener, libc::O_NONBLOCK.cast_unsigned()).unwrap();
    assert_eq!(sock::accept(listener).unwrap_err().errno, nix::errno::Errno::EAGAIN);
}

#[test]
fn connections_that_wait_to_be_accepted() {
    let dir = tempfile::tempdir().unwrap();
    for name in [dir.path().join("l.sock").into_os_string().into_encoded_bytes(), b"\0ckpt-waiting".to_vec()]
    {
        let listener = socket_at(&name, true);
        let clients = [(); 3].map(|()| socket_at(b"", false));
        // Not in the order of their inodes.
        for client in clients.iter().rev() {
            sock::connect_unix(client.as_fd(), &name).unwrap();
        }
        let fds = [target(&listener), target(&clients[0]), target(&clients[1]), target(&clients[2])];
        let set = dump(&fds);
        drop((listener, clients));
        let files = restore(&set);
        let listener = restored(&set, &files, fds[0]);
        for client in fds[1..].iter().rev().map(|&fd| restored(&set, &files, fd)) {
            let server = sock::accept(listener).unwrap();
            nix::unistd::write(client, b"question").unwrap();
            assert_eq!(read_all(server.as_fd()), b"question");
        }
    }
}

#[test]
fn credentials_are_those_of_the_old_days() {
    use ckpt_sys::{
        standin::{Ids, StandIn},
        unixsock,
    };
    let ids = Ids { uid: 4711, gid: 4712, groups: vec![4713] };
    let Ok(somebody) = StandIn::start(None, Some(&ids), false) else {
        return assert!(!nix::unistd::geteuid().is_root());
    };
    let pid = somebody.pid().0.unsigned_abs();
    let (a, b) = somebody.pair(libc::SOCK_SEQPACKET).unwrap();
    let name = b"\0ckpt-credentials";
    let listener = socket_at(name, true);
    somebody.listen(listener.as_fd(), 5).unwrap();
    let client = socket_at(b"", false);
    sock::connect_unix(client.as_fd(), name).unwrap();
    let server = sock::accept(listener.as_fd()).unwrap();
    sock::set_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    let of_message = (pid, 4711, 4712);
    unixsock::send_message(a.as_fd(), b"text", None, &[], Some(of_message)).unwrap();
    drop(somebody);
    let fds = [&a, &b, &listener, &client, &server].map(target);
    let set = dump(&fds);
    drop((a, b, listener, client, server));
    let files = restore(&set);
    for fd in &fds[..4] {
        let peer = unixsock::peer_credentials(restored(&set, &files, *fd)).unwrap().unwrap();
        assert_eq!((peer.pid, &peer.ids), (pid, &ids), "fd {fd}");
    }
    // This process has made this one, and is still there: it can only be told apart by another pid.
    let peer = unixsock::peer_credentials(restored(&set, &files, fds[4])).unwrap().unwrap();
    assert_eq!(peer.ids.uid, nix::unistd::geteuid().as_raw());
    let message = unixsock::peek(restored(&set, &files, fds[1]), &mut [0; 8]).unwrap().unwrap();
    assert_eq!((message.len, message.credentials), (4, Some(of_message)));
}

#[test]
fn abstract_names() {
    let name = format!("\0ckpt-test-{}", std::process::id()).into_bytes();
    let listener = socket_at(&name, true);
    let client = socket_at(b"", false);
    sock::connect_unix(client.as_fd(), &name).unwrap();
    let server = sock::accept(listener.as_fd()).unwrap();
    let fds = [target(&server), target(&client)];
    // The listener is closed, connections that it accepted bear its name all the same.
    drop(listener);
    let set = dump(&fds);
    drop((server, client));
    let files = restore(&set);
    assert_eq!(sock::unix_name(restored(&set, &files, fds[0]), sock::Side::Local).unwrap(), name);
    assert_eq!(sock::unix_name(restored(&set, &files, fds[1]), sock::Side::Peer).unwrap(), name);
}

fn socket_at(name: &[u8], listen: bool) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    if !name.is_empty() {
        sock::bind_unix(fd.as_fd(), name).unwrap();
    }
    if listen {
        sock::listen(fd.as_fd(), 5).unwrap();
    }
    fd
}

fn external(id: u64, path: Option<&Path>) -> SkOptions {
    let path = path.map(|p| std::os::unix::ffi::OsStrExt::as_bytes(p.as_os_str()).to_vec());
    SkOptions {
        external: vec![ExternalSocket { which: unix::Which::Id(SocketId(id)), path }],
        ..SkOptions::default()
    }
}

#[test]
fn connection_to_the_outside_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("b.sock");
    let listener = UnixListener::bind(&name).unwrap();
    let client = UnixStream::connect(&name).unwrap();
    let (mut outside, _) = listener.accept().unwrap();
    let fds = [target(&client)];
    let id = inode(&client);
    let refused = refusal(Dump::default().run(&fds));
    assert!(refused.reason.contains("its peer is outside the tree"), "{refused:?}");
    let advice = format!("pass --external {id}[:PATH] here, or dump the peer too (ckpt-scan -t)");
    assert_eq!(refused.advice, Some(advice));
    let unknown = Dump { sockets: external(1, None), ..Dump::default() }.run(&fds).map(|_| ()).unwrap_err();
    assert!(unknown.to_string().contains(&id.to_string()), "{unknown}");
    let set = Dump { sockets: external(id, None), ..Dump::default() }.run(&fds).unwrap();
    let entry = usk(&set, id);
    assert_eq!(entry.uflags, 1);
    let kept = entry.ckpt_external.unwrap();
    assert_eq!((kept.policy, kept.path.is_none()), (1, true));
    assert_eq!(super::dump::path(&kept.peer_name.unwrap()), name);

    let files = restore(&set);
    let (mut again, _) = listener.accept().unwrap();
    again.write_all(b"answer").unwrap();
    assert_eq!(read_all(restored(&set, &files, fds[0])), b"answer");

    // By another path, and by a descriptor handed in.
    let other = dir.path().join("c.sock");
    let elsewhere = UnixListener::bind(&other).unwrap();
    let path = std::os::unix::ffi::OsStrExt::as_bytes(other.as_os_str()).to_vec();
    let options = RestoreOptions { external_unix: vec![(SocketId(id), path)], ..RestoreOptions::default() };
    OpenFiles::open_all(&set, &options).unwrap();
    elsewhere.accept().unwrap();
    let (given, kept) = UnixStream::pair().unwrap();
    let mut options = RestoreOptions::default();
    options.inherit.push((given.as_raw_fd(), format!("socket:[{id}]")));
    let files = OpenFiles::open_all(&set, &options).unwrap();
    (&kept).write_all(b"handed in").unwrap();
    assert_eq!(read_all(restored(&set, &files, fds[0])), b"handed in");
    let (wrong, _other) = pair(SockType::SeqPacket);
    options.inherit[0].0 = wrong.as_raw_fd();
    let error = format!("{:#}", OpenFiles::open_all(&set, &options).unwrap_err());
    assert!(error.contains("seqpacket"), "{error}");

    // Unread bytes from outside.
    outside.write_all(b"12345").unwrap();
    let refused = refusal(Dump { sockets: external(id, None), ..Dump::default() }.run(&fds));
    assert!(refused.reason.contains("5 bytes"), "{refused:?}");
    for (queued, restorable) in [(Queued::Drop, true), (Queued::Keep, false)] {
        let sockets = SkOptions { queued, ..external(id, None) };
        let set = Dump { sockets, ..Dump::default() }.run(&fds).unwrap();
        let result = OpenFiles::open_all(&set, &RestoreOptions::default());
        assert_eq!(result.is_ok(), restorable, "{result:?}");
    }
}

#[test]
fn unnamed_peer_outside_has_to_be_handed_in() {
    let (a, _b) = pair(SockType::Stream);
    let id = inode(&a);
    let set = Dump { sockets: external(id, None), ..Dump::default() }.run(&[target(&a)]).unwrap();
    let error = OpenFiles::open_all(&set, &RestoreOptions::default()).unwrap_err();
    let refused = error.downcast_ref::<Refused>().or_else(|| error.root_cause().downcast_ref()).unwrap();
    assert!(refused.advice.as_ref().unwrap().contains(&format!("--inherit-fd fd[N]:socket:[{id}]")));
}

#[test]
fn golden_images_open() {
    let golden = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/golden");
    let place = Path::new("/tmp/ckpt-golden");
    fs::create_dir_all(place.join("out")).unwrap();
    for program in ["counter", "family"] {
        let copy = |from: &str, to: std::path::PathBuf| {
            if !to.exists() {
                fs::copy(golden.join(from), to).unwrap();
            }
        };
        copy(program, place.join(program));
        copy(&format!("{program}.out"), place.join(format!("out/{program}.out")));
        let set = ImageSet::from_dir(&golden.join(format!("{program}.criu"))).unwrap();
        let files = restore(&set);
        for arg in set.args(Image::Fdinfo) {
            for entry in set.all::<FdinfoEntry>(Image::Fdinfo, arg).unwrap() {
                assert!(files.fd(FileId(entry.id)).is_some(), "{program}: {entry:?}");
            }
        }
        if program == "family" {
            assert_eq!(read_all(files.fd(FileId(6)).unwrap()), b"in flight");
            assert_eq!(read_all(files.fd(FileId(8)).unwrap()), b"from child");
            assert_eq!(read_all(files.fd(FileId(16)).unwrap()), b"to child");
            assert_eq!(files.shmem(5880).unwrap().1, 4096);
        }
    }
}
