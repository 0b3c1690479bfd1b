//! Unix sockets: pairs, listeners, and the connection that leads out of the tree.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use ckpt_tests::{Pipeline, Target, process};

crate::survives! {
    socketpairs_keep_queues_and_options: "socketpairs";
    messages_keep_descriptors_and_credentials: "unix_messages";
    names_and_owners_of_sockets: "unix_names";
    a_crowd_of_socketpairs: "socket_crowd";
}

#[test]
fn listener_accepts_after_restore() {
    Target::start_with("unix_listener", &["-", "listener.sock"]).survives();
}

/// One end of a conversation with `answering`.
pub(crate) struct Talk {
    write: UnixStream,
    read: BufReader<UnixStream>,
}

impl Talk {
    pub(crate) fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        Self { write: stream.try_clone().expect("clone"), read: BufReader::new(stream) }
    }

    pub(crate) fn ask(&mut self, what: &str) -> String {
        writeln!(self.write, "{what}").expect("ask");
        let mut line = String::new();
        self.read.read_line(&mut line).expect("hear the answer");
        line.trim_end().to_owned()
    }
}

/// A server that has answered three messages of ours over a connection.
pub(crate) fn conversation() -> (Target, Talk, u64) {
    let target = Target::start_with("answering", &["-", "server.sock"]);
    let mut talk = Talk::over(UnixStream::connect(target.path("server.sock")).expect("connect"));
    for n in 1..=3 {
        assert_eq!(talk.ask(&format!("message {n}")), format!("answer {n} to message {n}"));
    }
    let id = latest(&target);
    (target, talk, id)
}

/// The ID of the socket on the highest descriptor of a server: its connection, for the listener came first.
pub(crate) fn latest(target: &Target) -> u64 {
    let sockets = std::fs::read_dir(format!("/proc/{}/fd", target.pid)).expect("list fds").flatten();
    let sockets: Vec<i32> = sockets
        .filter_map(|f| f.file_name().to_str()?.parse().ok())
        .filter(|fd| {
            process::link(target.pid, &format!("fd/{fd}")).display().to_string().starts_with("socket:[")
        })
        .collect();
    process::socket_id(target.pid, *sockets.iter().max().expect("sockets"))
}

fn dump_external(target: &Target, id: u64, name: &str) {
    let id = id.to_string();
    let _ = target.dumping(name, &[], &["--external", &id]).run().ok("dump with --external");
}

/// What stands in for the client after the restore: it listens where the server shall connect to.
pub(crate) fn accept(listener: &UnixListener) -> Talk {
    Talk::over(listener.accept().expect("the restored server connects").0)
}

pub(crate) fn waiting(path: &Path) -> UnixListener {
    UnixListener::bind(path).expect("listen")
}

/// A path that is taken: nothing is restored, and what was made before is gone.
#[test]
fn an_occupied_path_stops_a_restore_that_leaves_nothing() {
    let target = crate::inet::python(
        "occupied",
        "for name in 'abc':\n\
         \x20   s = socket.socket(socket.AF_UNIX)\n\
         \x20   s.bind(name)\n\
         \x20   s.listen()\n\
         \x20   globals()[name] = s",
    );
    target.dump_ok("img");
    target.end();
    let remove = || ["a", "b", "c"].map(|name| std::fs::remove_file(target.path(name)));
    let pages = std::fs::read_dir(target.path("img")).expect("list").flatten().map(|entry| entry.path());
    let pages = pages
        .filter(|path| path.to_string_lossy().contains("pages-"))
        .max_by_key(|path| path.metadata().map_or(0, |meta| meta.len()));
    let pages = pages.expect("pages");
    let nothing = |but: &str| {
        for name in ["a", "b", "c"].iter().filter(|name| **name != but) {
            assert!(!target.path(name).exists(), "{name} was left");
        }
        assert!(ckpt_tests::soon(|| process::is_free(target.pid)));
    };
    let _ = remove();
    // What is found when all sockets have been made.
    let whole = std::fs::read(&pages).expect("read");
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(&pages, damaged).expect("write");
    let _ = target.restore("img").fails("ckpt-restore", 4, &["have changed"]);
    nothing("");
    std::fs::write(&pages, whole).expect("write");
    for taken in ["a", "b", "c"] {
        let other = UnixListener::bind(target.path(taken)).expect("listen");
        let _ =
            target.restore("img").fails("ckpt-restore", 3, &[taken, "another process has a socket there"]);
        nothing(taken);
        assert!(UnixStream::connect(target.path(taken)).is_ok(), "the other one is still there");
        drop(other);
        let _ = remove();
        std::fs::write(target.path(taken), "no socket").expect("write");
        let _ = target.restore("img").fails("ckpt-restore", 1, &[taken, "no socket"]);
        nothing(taken);
        let _ = remove();
    }
    target.restore_ok("img");
    for name in ["a", "b", "c"] {
        let _ = UnixStream::connect(target.path(name)).expect("connect to the restored one");
    }
}

/// What was sent before the server accepts arrives when it does; and messages of no bytes, which a peek shows
/// once, are there in every checkpoint.
#[test]
fn data_that_nobody_can_read_yet_comes_back() {
    let target = Target::start("unaccepted");
    let before = target.at_rest();
    target.dump_ok("first");
    target.dump_ok("second");
    target.unchanged(&before);
    target.passes("the original");
    for round in 0..2 {
        let name = format!("img{round}");
        target.dump_ok(&name);
        target.dump_ok(&format!("{name}-again"));
        target.end();
        target.restore_ok(&format!("{name}-again"));
        target.passes("the restored one");
    }
}

/// A client that sent something, whose server is restored without having seen it.
const EARLY: &str = "import array\n\
     s = socket.socket(socket.AF_UNIX)\n\
     s.bind('server')\n\
     s.listen()\n\
     c = socket.socket(socket.AF_UNIX)\n\
     c.connect('server')\n";

#[test]
fn connections_not_accepted_are_left_out_if_wanted() {
    let code = format!(
        "{EARLY}c.send(b'early')\n\
         def check(*_):\n\
         \x20   s.setblocking(False)\n\
         \x20   try: s.accept(); fine = False\n\
         \x20   except BlockingIOError: fine = True\n\
         \x20   fine = fine and c.recv(9) == b''\n\
         \x20   try: c.send(b'x'); fine = False\n\
         \x20   except BrokenPipeError: pass\n\
         \x20   open('log', 'a').write('PASS\\n' if fine else 'BROKEN\\n')"
    );
    let target = crate::inet::python_checking("left_out", &code);
    let _ = target.dumping("img", &[], &["--skip-in-flight"]).run().ok("dump --skip-in-flight");
    target.end();
    target.restore_ok("img");
    target.passes("the restored one");
}

/// The same where the listener is outside: what it has not accepted is sent to the one that is connected to later.
#[test]
fn data_for_a_listener_outside_is_kept_if_wanted() {
    use std::{
        io::Read,
        os::{linux::net::SocketAddrExt, unix::net::SocketAddr},
    };
    let name = format!("ckpt-tests-outside-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("bind");
    let code = format!("c = socket.socket(socket.AF_UNIX)\nc.connect('\\0{name}')\nc.send(b'early')");
    let target = crate::inet::python("to_outside", &code);
    let before = target.at_rest();
    let refused = target.dumping("img", &[], &["--external", "all"]).run();
    let _ = refused.fails("ckpt-sk", 3, &["listener outside that has not accepted", "--queued=keep"]);
    target.unchanged(&before);
    let _ = target.dumping("img", &[], &["--external", "all", "--queued=keep"]).run().ok("dump");
    target.unchanged(&before);
    let (mut first, _) = listener.accept().expect("accept the original");
    let mut bytes = [0; 5];
    first.read_exact(&mut bytes).expect("what the original sent");
    assert_eq!(&bytes, b"early");
    target.end();
    target.restore_ok("img");
    let (mut second, _) = listener.accept().expect("accept the restored one");
    second.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    second.read_exact(&mut bytes).expect("what was not read");
    assert_eq!(&bytes, b"early");
    target.end();
}

#[test]
fn descriptors_in_a_backlog_are_refused() {
    let code =
        format!("{EARLY}c.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])");
    let target = crate::inet::python("rights_in_backlog", &code);
    crate::inet::refused(&target, &["not accepted yet", "SCM_RIGHTS", "--skip-in-flight"]);
}

#[test]
fn half_a_connection_is_refused_naming_the_peer() {
    let (target, mut talk, id) = conversation();
    let before = target.at_rest();
    let me = std::process::id().to_string();
    let _ = target.dump("img").fails("ckpt-sk", 3, &[&id.to_string(), "--external", &me]);
    assert!(!target.path("img").exists());
    target.unchanged(&before);
    assert_eq!(talk.ask("still there"), "answer 4 to still there");
}

#[test]
fn external_connection_goes_on_while_dumped() {
    let (target, mut talk, id) = conversation();
    let before = target.at_rest();
    for n in 4..9 {
        dump_external(&target, id, &format!("img{n}"));
        target.unchanged(&before);
        assert_eq!(talk.ask("and"), format!("answer {n} to and"));
    }
}

#[test]
fn sk_rewrite_connects_the_third_state_again() {
    let (target, mut talk, id) = conversation();
    dump_external(&target, id, "img");
    assert_eq!(talk.ask("forgotten"), "answer 4 to forgotten");
    target.end();
    let path = target.path("client.sock");
    let listener = waiting(&path);
    let rule = format!("{id}={}", path.display());
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("img")])
        .stage(["sk-rewrite", "--connect", &rule])
        .stage(["ckpt-restore", "--detach"])
        .run()
        .ok("restore through sk-rewrite --connect");
    let mut talk = accept(&listener);
    assert_eq!(talk.ask("message four"), "answer 4 to message four");
    assert_eq!(talk.ask("message five"), "answer 5 to message five");
    // Its own listener is there too, for the next client.
    drop(talk);
    let mut other = Talk::over(UnixStream::connect(target.path("server.sock")).expect("connect"));
    assert_eq!(other.ask("new client"), "answer 6 to new client");
}

#[test]
fn restore_connects_by_external_option() {
    let (target, talk, id) = conversation();
    dump_external(&target, id, "img");
    drop(talk);
    target.end();
    let path = target.path("client.sock");
    let listener = waiting(&path);
    let option = format!("unix[{id}]:{}", path.display());
    let _ = Pipeline::new(target.dir.path())
        .stage([
            "ckpt-restore".into(),
            "--detach".into(),
            "--external".into(),
            option.into(),
            target.path("img").into_os_string(),
        ])
        .run()
        .ok("restore --external");
    assert_eq!(accept(&listener).ask("message four"), "answer 4 to message four");
}

#[test]
fn restore_takes_an_inherited_connection() {
    let (target, talk, id) = conversation();
    dump_external(&target, id, "img");
    drop(talk);
    target.end();
    let (ours, theirs) = UnixStream::pair().expect("make a pair");
    // Standard input is a descriptor that any parent can hand over.
    let status = std::process::Command::new(ckpt_tests::tool("ckpt-restore"))
        .args(["--detach", "--inherit-fd", &format!("fd[0]:socket:[{id}]")])
        .arg(target.path("img"))
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .status()
        .expect("run ckpt-restore");
    assert!(status.success(), "{status}");
    assert_eq!(Talk::over(ours).ask("message four"), "answer 4 to message four");
}

/// The reason for all of this: a checkpoint after every message, and back to any of them.
#[test]
fn every_state_of_a_conversation_can_be_restored() {
    let (target, mut talk, id) = conversation();
    for n in 4..8 {
        dump_external(&target, id, &format!("after{}", n - 1));
        assert_eq!(talk.ask("next"), format!("answer {n} to next"));
    }
    drop(talk);
    target.end();
    let path = target.path("client.sock");
    for state in [5, 3, 6] {
        let _ = std::fs::remove_file(&path);
        let listener = waiting(&path);
        let rule = format!("{id}={}", path.display());
        let _ = Pipeline::new(target.dir.path())
            .stage(["ckpt-read".into(), target.path(&format!("after{state}"))])
            .stage(["sk-rewrite", "--connect", &rule])
            .stage(["ckpt-restore", "--detach"])
            .run()
            .ok("restore");
        assert_eq!(accept(&listener).ask("again"), format!("answer {} to again", state + 1));
        target.end();
    }
}

/// A tool's output, with this on its standard input.
fn output(tool: &str, args: &[&str], input: std::process::Stdio) -> String {
    let output = std::process::Command::new(ckpt_tests::tool(tool))
        .args(args)
        .stdin(input)
        .output()
        .unwrap_or_else(|e| panic!("run {tool}: {e}"));
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Which row of a list an id is in.
fn row(list: &str, id: u64) -> String {
    let found = list.lines().find(|line| line.starts_with(&format!("{id} ")));
    found.unwrap_or_else(|| panic!("{id} is not in the list:\n{list}")).to_owned()
}

#[test]
fn the_list_of_a_tree_names_the_peer_outside_and_what_it_takes() {
    let (target, _talk, id) = conversation();
    let before = target.at_rest();
    let pid = target.pid.to_string();
    let list = output("ckpt-sk", &["--list", "-t", &pid], std::process::Stdio::null());
    let row = row(&list, id);
    for word in ["unix-stream", "connected", "server.sock", "(outside)", &format!("needs --external {id}")] {
        assert!(row.contains(word), "{word} in {row}");
    }
    let args = ["--list", "-t", &pid, "--external", &id.to_string()];
    assert!(self::row(&output("ckpt-sk", &args, std::process::Stdio::null()), id).contains("yes, external"));
    let json = output("ckpt-sk", &["--list", "--json", "-t", &pid], std::process::Stdio::null());
    assert!(json.contains(&format!("\"id\": {id}")) && json.contains("\"inside\": false"), "{json}");
    target.unchanged(&before);
}

#[test]
fn the_list_of_a_stream_needs_no_kernel_and_that_of_a_frozen_tree_does_it_no_harm() {
    let (target, _talk, id) = conversation();
    dump_external(&target, id, "img");
    let before = target.at_rest();
    let images = target.path("img");
    let read = || {
        let child = std::process::Command::new(ckpt_tests::tool("ckpt-read"))
            .arg(&images)
            .stdout(std::process::Stdio::piped())
            .spawn();
        child.expect("run ckpt-read")
    };
    let mut reader = read();
    let list = output("ckpt-sk", &["--list"], reader.stdout.take().expect("a pipe").into());
    assert!(reader.wait().expect("wait").success());
    assert!(row(&list, id).contains("accepts on"), "{list}");

    let pid = target.pid.to_string();
    for scan in [&["ckpt-scan", "-t", &pid][..], &["ckpt-scan", "--snapshot", "-t", &pid]] {
        let outcome = Pipeline::new(target.dir.path())
            .stage(scan)
            .stage(["ckpt-sk", "--list"])
            .output(std::fs::File::create(target.path("list")).expect("make a file"))
            .run();
        let _ = outcome.ok("list the sockets of a frozen tree");
        let list = std::fs::read_to_string(target.path("list")).expect("read the list");
        assert!(row(&list, id).contains(&format!("needs --external {id}")), "{list}");
        target.unchanged(&before);
    }
}

#[test]
fn the_list_enters_the_network_namespace_of_the_tree() {
    let dir = ckpt_tests::TestDir::new("elsewhere");
    let mut command = std::process::Command::new("unshare");
    let script = "import socket,os,time;s=socket.socket();s.bind(('0.0.0.0',4711));s.listen(7);u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);u.bind(('0.0.0.0',4712));open('log','w').write('ready');time.sleep(600)";
    command.args(["-n", "python3", "-c", script]);
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    let list = output("ckpt-sk", &["--list", "-t", &target.pid.to_string()], std::process::Stdio::null());
    let rows: Vec<&str> = list.lines().filter(|l| l.contains("0.0.0.0:471")).collect();
    assert_eq!(rows.len(), 2, "{list}");
    assert!(
        rows.iter().any(|r| r.contains("tcp") && r.contains("listening") && r.contains("nsenter")),
        "{list}"
    );
    assert!(rows.iter().any(|r| r.contains("udp") && r.contains("unconnected")), "{list}");
}
