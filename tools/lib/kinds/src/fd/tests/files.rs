//! Everything but sockets.

use super::*;

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
    let anonymous = file::shared_anonymous(4096, 0).unwrap();
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
    let mut table = FileTable::new(vec![own_pid()], DumpOptions::default(), crate::fd::Survey::default());
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
    let names = |fown| crate::fd::fown::calls(5, 0, fown).into_iter().map(|c| c.name).collect::<Vec<_>>();
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
