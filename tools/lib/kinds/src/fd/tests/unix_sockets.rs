//! Unix sockets.

use super::*;

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
        assert_eq!(crate::fd::dump::path(&sock::unix_name(receiver, sock::Side::Local).unwrap()), name);
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
    assert_eq!(crate::fd::dump::path(&local), name);
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
    assert_eq!(crate::fd::dump::path(&kept.peer_name.unwrap()), name);

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
