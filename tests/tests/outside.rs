//! Connections that lead out of the tree: which are chosen, what becomes of them, and what is said when they
//! can't be made again. Unix sockets of the three types.

use std::{
    io::{BufRead, BufReader, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    time::Duration,
};

use ckpt_tests::{Outcome, Pipeline, Target, process, soon};

/// Program B, and what it knows about A: all that it has said.
struct Client {
    write: UnixStream,
    read: BufReader<UnixStream>,
    count: u64,
    digest: u64,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        let read = BufReader::new(stream.try_clone().expect("clone"));
        Self { write: stream, read, count: 0, digest: 0xcbf2_9ce4_8422_2325 }
    }

    /// Takes the place of another, at an earlier state.
    fn at(self, (count, digest): (u64, u64)) -> Self {
        Self { count, digest, ..self }
    }

    fn state(&self) -> (u64, u64) {
        (self.count, self.digest)
    }

    fn note(&mut self, line: &str) {
        for byte in line.bytes().chain([b'\n']) {
            self.digest = (self.digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        self.count += 1;
    }

    /// Says a line. The answer proves that A has heard the same as this client believes.
    fn says(&mut self, line: &str) {
        writeln!(self.write, "{line}").expect("say");
        self.note(line);
        let mut answer = String::new();
        self.read.read_line(&mut answer).expect("hear the answer");
        assert_eq!(answer.trim_end(), format!("{} {:016x}", self.count, self.digest), "answer to {line:?}");
    }
}

/// The server and its client, after some messages.
fn story(messages: u64) -> (Target, Client, u64) {
    let target = Target::start_with("remembering", &["-", "server.sock"]);
    let mut client = Client::new(UnixStream::connect(target.path("server.sock")).expect("connect"));
    for n in 1..=messages {
        client.says(&format!("message {n}"));
    }
    target.wait_log("connected");
    let id = process::socket_id(target.pid, 4);
    (target, client, id)
}

fn dump(target: &Target, name: &str, options: &[&str]) -> Outcome {
    let pid = target.pid.to_string();
    Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(std::iter::once("ckpt-sk").chain(options.iter().copied()))
        .stage(["ckpt-write".into(), target.path(name)])
        .run()
}

fn restore(target: &Target, name: &str, rewrite: &[&str], options: &[&str]) -> Pipeline {
    let read = Pipeline::new(target.dir.path()).stage(["ckpt-read".into(), target.path(name)]);
    let edited = if rewrite.is_empty() {
        read
    } else {
        read.stage(std::iter::once("sk-rewrite").chain(rewrite.iter().copied()))
    };
    edited.stage(["ckpt-restore", "--detach"].into_iter().chain(options.iter().copied()))
}

/// Ends the original, and takes its socket file away.
fn end(target: &Target) {
    target.end();
    std::fs::remove_file(target.path("server.sock")).expect("the original has left its socket");
}

/// Connects as soon as somebody listens.
fn connect(path: &Path) -> Client {
    let mut stream = None;
    assert!(soon(|| {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    }));
    Client::new(stream.expect("connected"))
}

/// A listens, B connects. A is checkpointed after each of 200 messages and runs on. Then it goes back to some of
/// these states, meeting B' in each of the three ways, and hears other messages from there.
#[test]
fn a_server_goes_back_to_any_message() {
    let (target, mut client, id) = story(0);
    let id = id.to_string();
    let mut states = Vec::new();
    for n in 1..=200 {
        client.says(&format!("message {n}"));
        let _ = dump(&target, &format!("after{n}"), &["--external", &id]).ok("dump");
        states.push(client.state());
    }
    client.says("the last word");
    drop(client);
    target.end();
    for n in (20..=200).step_by(20) {
        let (name, state) = (format!("after{n}"), states[n - 1]);
        let from_here = |client: Client, how: &str| {
            let mut client = client.at(state);
            for k in 0..3 {
                client.says(&format!("{how} {k} at {n}"));
            }
            drop(client);
            target.end();
        };
        // It was accepted, so that is what happens by itself: at its own listener, which is in the checkpoint.
        let running = restore(&target, &name, &[], &["--timeout", "20s"]).start();
        let client = connect(&target.path("server.sock"));
        let _ = running.wait().ok("restore by accept");
        from_here(client, "accepted");
        // To a path where a replacement for B listens.
        let path = target.path("b.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("listen");
        let rule = format!("{id}={}", path.display());
        let _ = restore(&target, &name, &["--connect", &rule], &[]).run().ok("restore by connect");
        from_here(Client::new(listener.accept().expect("A connects").0), "connected");
        // As a descriptor.
        let (ours, theirs) = UnixStream::pair().expect("make a pair");
        let status = std::process::Command::new(ckpt_tests::tool("ckpt-restore"))
            .args(["--detach", "--inherit-fd", &format!("fd[0]:socket:[{id}]")])
            .arg(target.path(&name))
            .stdin(OwnedFd::from(theirs))
            .status()
            .expect("run ckpt-restore");
        assert!(status.success(), "{status}");
        from_here(Client::new(ours), "inherited");
    }
}

#[test]
fn waiting_for_a_peer_ends_and_leaves_nothing() {
    let (target, client, id) = story(2);
    let id = id.to_string();
    let _ = dump(&target, "img", &["--external", &id]).ok("dump");
    drop(client);
    end(&target);
    let gone = || {
        assert!(!target.path("server.sock").exists() && !target.path("other.sock").exists());
        assert!(soon(|| process::is_free(target.pid)));
    };
    let words = [id.as_str(), "server.sock", "0.1 s"];
    let _ = restore(&target, "img", &[], &["--timeout", "100ms"]).run().fails("ckpt-restore", 1, &words);
    gone();
    // At a path of its own, and ended by a signal.
    let rule = format!("{id}={}", target.path("other.sock").display());
    for options in [&["-v"][..], &["-v", "--new-pidns"]] {
        let running = restore(&target, "img", &["--accept", &rule], options).start();
        let errors = target.path("2-ckpt-restore.err");
        assert!(soon(
            || std::fs::read_to_string(&errors).is_ok_and(|text| text.contains("waits for its peer"))
        ));
        assert!(target.path("other.sock").exists());
        let pid = i32::try_from(running.pid("ckpt-restore")).expect("small");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
            .expect("kill");
        let outcome = running.wait();
        assert_ne!(outcome.code("ckpt-restore"), 0);
        assert!(outcome.said.contains("interrupted by SIGTERM"), "{outcome}");
        gone();
    }
    // Something else is there already.
    std::fs::write(target.path("other.sock"), "in the way").expect("write");
    let _ = restore(&target, "img", &["--accept", &rule], &[]).run().fails("ckpt-restore", 1, &["no socket"]);
    std::fs::remove_file(target.path("other.sock")).expect("it is still there");
    let other = UnixListener::bind(target.path("other.sock")).expect("listen");
    let _ = restore(&target, "img", &["--accept", &rule], &[]).run().fails(
        "ckpt-restore",
        3,
        &["another process"],
    );
    drop(other);
    std::fs::remove_file(target.path("other.sock")).expect("it is still there");
    gone();
}

#[test]
fn a_peer_can_be_waited_for_at_another_path() {
    let (target, client, id) = story(2);
    let (id, state) = (id.to_string(), client.state());
    let _ = dump(&target, "img", &["--external", "all"]).ok("dump");
    drop(client);
    target.end();
    let other = target.path("other.sock");
    let rule = format!("{id}={}", other.display());
    let running = restore(&target, "img", &["--accept", &rule], &["--timeout", "20s"]).start();
    let mut client = connect(&other).at(state);
    let _ = running.wait().ok("restore by accept elsewhere");
    assert!(!other.exists(), "it was made for the moment");
    client.says("there");
    drop(client);
    target.end();
    // The other way round: it is A who has to wait until somebody listens.
    let running = restore(&target, "img", &["--connect", &rule], &["-v", "--retry", "20s"]).start();
    assert!(soon(|| {
        let said = std::fs::read_to_string(target.path("2-ckpt-restore.err"));
        said.is_ok_and(|text| text.contains("waits for somebody to listen"))
    }));
    let listener = UnixListener::bind(&other).expect("listen");
    let _ = running.wait().ok("restore by connect, later");
    let mut client = Client::new(listener.accept().expect("A connects").0).at(state);
    client.says("here");
    drop(client);
    target.end();
    std::fs::remove_file(&other).expect("remove");
    let words = ["other.sock", "--external"];
    let _ = restore(&target, "img", &["--connect", &rule], &["--retry", "50ms"]).run().fails(
        "ckpt-restore",
        1,
        &words,
    );
    assert!(!target.path("server.sock").exists());
}

#[test]
fn connections_are_chosen_in_many_ways() {
    let (target, mut client, id) = story(1);
    let before = target.at_rest();
    let server = target.path("server.sock").display().to_string();
    let me = std::process::id().to_string();
    let by_id = [id.to_string(), format!("unix[{id}]"), format!("socket:[{id}]"), format!("{id}:@abstract")];
    // The address is as the server has bound it.
    let others = ["path=server.sock".to_owned(), format!("peer-pid={me}"), "all".to_owned()];
    for (n, option) in by_id.iter().chain(&others).enumerate() {
        let name = format!("img{n}");
        let _ = dump(&target, &name, &["--external", option]).ok(option);
        let images = ckpt_images::ImageSet::from_dir(&target.path(&name)).expect("read");
        let files: Vec<ckpt_proto::types::FileEntry> =
            images.all(ckpt_proto::Image::Files, 0).expect("files");
        let external: Vec<_> = files.into_iter().filter_map(|f| f.usk?.ckpt_external).collect();
        assert_eq!(external.len(), 1, "{option}");
        let accept = !option.contains('@');
        use ckpt_proto::types::external_socket::PolicyKind;
        assert_eq!(external[0].policy() == PolicyKind::Accept, accept, "{option}: {external:?}");
        assert_eq!(external[0].peer_pid, Some(std::process::id()));
    }
    for option in ["1", "path=/no/such.sock", "path=@server.sock", "peer-pid=1", &server] {
        let option = if option.starts_with('/') { format!("path={option}.x") } else { option.to_owned() };
        let words = ["--external", &id.to_string()];
        let outcome = dump(&target, "no", &["--external", &option, "--external", "all"]);
        let _ = outcome.fails("ckpt-sk", 1, &words);
        assert!(!target.path("no").exists());
    }
    target.unchanged(&before);
    client.says("still there");
}

/// Bytes that wait on either side are counted, and left out or kept as the user says.
#[test]
fn unread_bytes_are_never_lost_silently() {
    let (target, mut client, id) = story(1);
    let state = client.state();
    // An answer that is not read.
    writeln!(client.write, "unheard").expect("say");
    client.note("unheard");
    assert!(soon(|| {
        let mut waiting = 0u8;
        use std::os::fd::AsRawFd;
        let flags = nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        nix::sys::socket::recv(client.write.as_raw_fd(), std::slice::from_mut(&mut waiting), flags).is_ok()
    }));
    let answer = format!("2 {:016x}\n", client.digest);
    let words = [&answer.len().to_string(), "not read yet by its peer", "--queued=keep"];
    let _ = dump(&target, "img", &["--external", "all"]).fails("ckpt-sk", 3, &words);
    let dropped = dump(&target, "dropped", &["--external", "all", "--queued=drop"]).ok("dump");
    assert!(dropped.said.contains("left out"), "{dropped}");
    let _ = dump(&target, "kept", &["--external", "all", "--queued=keep"]).ok("dump");
    // A question that is not read, as the server is not running.
    target.signal(nix::sys::signal::Signal::SIGSTOP);
    assert!(soon(|| process::state(target.pid) == Some('T')));
    client.write.write_all(b"twelve bytes").expect("say");
    let _ = dump(&target, "img", &["--external", "all"]).fails("ckpt-sk", 3, &["12 bytes", "not read"]);
    let _ = dump(&target, "both", &["--external", "all", "--queued=keep"]).ok("dump");
    let state_after = client.state();
    drop(client);
    end(&target);
    for (name, missing) in [("kept", false), ("dropped", true)] {
        let running = restore(&target, name, &[], &["--timeout", "20s"]).start();
        let mut client = connect(&target.path("server.sock")).at(state_after);
        let _ = running.wait().ok("restore");
        if !missing {
            let mut line = String::new();
            client.read.read_line(&mut line).expect("the answer from before");
            assert_eq!(line, answer);
        }
        client.says("next");
        drop(client);
        end(&target);
    }
    let words = ["12 bytes", &id.to_string(), "--drop-queues"];
    let _ = restore(&target, "both", &[], &["--timeout", "1s"]).run().fails("ckpt-restore", 3, &words);
    assert!(!target.path("server.sock").exists());
    // With the peer gone for good they are read, and then comes the end: the server goes on with the next client.
    let _ = restore(&target, "both", &["--close", &id.to_string()], &[]).run().ok("restore with close");
    target.signal(nix::sys::signal::Signal::SIGCONT);
    let mut client = connect(&target.path("server.sock")).at(state);
    client.note("unheard");
    for byte in b"twelve bytes" {
        client.digest = (client.digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    client.says("anew");
}

#[test]
fn what_is_handed_in_has_to_fit() {
    let (target, client, id) = story(1);
    let _ = dump(&target, "img", &["--external", "all"]).ok("dump");
    drop(client);
    end(&target);
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().expect("a pair");
    let listener = UnixListener::bind(target.path("another.sock")).expect("listen");
    let unconnected = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::empty(),
        None,
    );
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let file = std::fs::File::open("/dev/null").expect("open");
    let wrong: [(OwnedFd, &str); 5] = [
        (datagram.into(), "datagram"),
        (listener.into(), "listens"),
        (unconnected.expect("a socket"), "not connected"),
        (tcp.into(), "no unix socket"),
        (file.into(), "no socket"),
    ];
    for (fd, word) in wrong {
        let output = std::process::Command::new(ckpt_tests::tool("ckpt-restore"))
            .args(["--detach", "--inherit-fd", &format!("fd[0]:socket:[{id}]")])
            .arg(target.path("img"))
            .stdin(fd)
            .output()
            .expect("run ckpt-restore");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(word), "{word}: {said}");
        assert!(!target.path("server.sock").exists() && soon(|| process::is_free(target.pid)));
    }
}
