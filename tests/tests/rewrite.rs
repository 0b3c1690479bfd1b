//! sk-rewrite between a checkpoint and its restore: what it edits is what the restored program has.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    time::Duration,
};

use ckpt_tests::{Outcome, Pipeline, Target, process, soon};

/// A server that answers each line with the number of lines so far: on a unix socket, on TCP.
const SERVER: &str = "
import asyncio, sys
count = 0
async def serve(reader, writer):
    global count
    while line := await reader.readline():
        count += 1
        writer.write(b'%d %s' % (count, line))
    writer.close()
async def main():
    unix = await asyncio.start_unix_server(serve, sys.argv[1])
    tcp = await asyncio.start_server(serve, '127.0.0.1', int(sys.argv[2]))
    open('log', 'w').write('ready')
    await asyncio.gather(unix.serve_forever(), tcp.serve_forever())
asyncio.run(main())
";

/// A port that nobody has at the moment.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

fn server() -> (Target, u16) {
    let dir = ckpt_tests::TestDir::new("rewritten");
    let port = free_port();
    let mut command = std::process::Command::new("python3");
    let path = dir.path().join("server.sock");
    command.args(["-c", SERVER]).arg(path).arg(port.to_string());
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    (target, port)
}

/// One question and its answer, over a connection that then stays.
fn ask<S>(stream: &S, what: &str) -> String
where
    for<'a> &'a S: Write + Read,
{
    let mut stream = stream;
    writeln!(stream, "{what}").expect("ask");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("hear the answer");
    line.trim_end().to_owned()
}

/// The same over connections that both ends have closed when this returns.
fn ask_unix(target: &Target, name: &str, what: &str) -> String {
    let stream = unix(target, name);
    let answer = ask(&stream, what);
    stream.shutdown(Shutdown::Write).expect("shut down");
    assert_eq!((&stream).read(&mut [0]).expect("wait for the end"), 0);
    answer
}

fn ask_tcp(port: u16, what: &str) -> String {
    let stream = tcp(port);
    let answer = ask(&stream, what);
    stream.shutdown(Shutdown::Write).expect("shut down");
    assert_eq!((&stream).read(&mut [0]).expect("wait for the end"), 0);
    answer
}

fn unix(target: &Target, name: &str) -> UnixStream {
    let stream = UnixStream::connect(target.path(name)).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    stream
}

fn tcp(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    stream
}

fn dump(target: &Target, options: &[&str]) {
    let _ = target.dumping("img", &[], options).run().ok("dump");
}

fn restore(target: &Target, rules: &[&str]) -> Outcome {
    Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("img")])
        .stage(["sk-rewrite"].iter().chain(rules).copied())
        .stage(["ckpt-restore", "--detach"])
        .run()
}

#[test]
fn a_server_moves_to_another_path_and_port() {
    let (target, port) = server();
    assert_eq!(ask_unix(&target, "server.sock", "a"), "1 a");
    assert_eq!(ask_tcp(port, "b"), "2 b");
    dump(&target, &[]);
    target.end();
    std::fs::remove_file(target.path("server.sock")).expect("remove the socket");
    let new = free_port();
    let (old_path, new_path) = (target.path("server.sock"), target.path("other.sock"));
    let rename = format!("{}={}", old_path.display(), new_path.display());
    let ports = format!("{port}={new}");
    let rules = ["--rename", &rename, "--port", &ports, "--set-opt", "kind=tcp:SO_KEEPALIVE=on"];
    let _ = restore(&target, &rules).ok("restore at other addresses");
    assert_eq!(ask(&unix(&target, "other.sock"), "c"), "3 c");
    assert_eq!(ask(&tcp(new), "d"), "4 d");
    assert!(!old_path.exists());
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn connections_of_a_kind_are_closed_and_others_stay() {
    let (target, port) = server();
    let (inside, outside) = (unix(&target, "server.sock"), tcp(port));
    assert_eq!(ask(&inside, "a"), "1 a");
    assert_eq!(ask(&outside, "b"), "2 b");
    // The accepted unix connection is the one that the list says it of.
    let list = std::process::Command::new(ckpt_tests::tool("ckpt-sk"))
        .args(["--list", "-t", &target.pid.to_string()])
        .output()
        .expect("run ckpt-sk");
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let id = list.lines().find(|l| l.contains("needs --external")).and_then(|l| l.split(' ').next());
    let id = id.unwrap_or_else(|| panic!("no external connection in\n{list}"));
    dump(&target, &["--external", id, "--tcp-close"]);
    drop((inside, outside));
    target.end();
    let path = target.path("server.sock");
    std::fs::remove_file(&path).expect("remove the socket");
    let rule = format!("path={}", path.display());
    // The listener bears the same path; the rule is about connections and passes over it.
    let _ = restore(&target, &["--close", &rule]).ok("restore with connections closed");
    assert_eq!(ask(&unix(&target, "server.sock"), "c"), "3 c");
    assert_eq!(ask(&tcp(port), "d"), "4 d");
}

#[test]
fn rules_that_do_not_fit_restore_nothing_and_leave_nothing_behind() {
    let (target, port) = server();
    dump(&target, &[]);
    target.end();
    let path = target.path("server.sock");
    std::fs::remove_file(&path).expect("remove the socket");
    let connect = format!("path={}=/x", path.display());
    let long = format!("{}=/{}", path.display(), "x".repeat(108));
    for (rules, code, words) in [
        (&["--close", "5"][..], 1, &["--close 5", "matches nothing", "unix-stream, listening"][..]),
        (&["--connect", &connect], 1, &["no connection"]),
        (&["--port", "1=2"], 1, &["--port 1=2", "matches nothing"]),
        (&["--set-opt", "kind=tcp:SO_NONSENSE=1"], 1, &["SO_NONSENSE", "SO_KEEPALIVE"]),
        (&["--rename", &long], 2, &["109 bytes"]),
        (&["--close", "kind=nonsense"], 2, &["unix-stream"]),
        (&["--rules", "/nonexistent"], 1, &["/nonexistent"]),
    ] {
        let outcome = restore(&target, rules).fails("sk-rewrite", code, words);
        assert_ne!(outcome.code("ckpt-restore"), 0, "{outcome}");
        assert!(soon(|| process::is_free(target.pid)), "{rules:?}");
        assert!(!path.exists(), "{rules:?}");
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "{rules:?}");
    }
}
