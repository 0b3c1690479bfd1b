//! Real servers over sockets, under load, with clients inside and outside of the tree: checkpointed while they work,
//! killed, restored. Every client knows the one right answer to each of its requests, so nothing may be lost, come
//! twice, or come from another state.
//!
//! Clients over TCP never notice. Unix connections can't wait for a server that is gone: their clients see the end and
//! come back, and the one request whose answer they did not hear has either been served or not.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use ckpt_tests::{
    Pipeline, Target, TestDir, here, installed,
    net::{self, Client},
    process, skip, soon,
};

/// Debian's own, if it is there: a version manager's is started through scripts.
pub(crate) fn python() -> &'static str {
    if Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" }
}

fn workload(name: &str) -> Command {
    let mut command = Command::new(python());
    command.arg(here().join("workloads").join(name));
    command
}

/// How far each of many clients is.
struct Progress(Vec<AtomicU64>);

impl Progress {
    fn of(clients: usize) -> Self {
        Self((0..clients).map(|_| AtomicU64::new(0)).collect())
    }

    fn step(&self, client: usize) {
        self.0[client].fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until every client has made some more steps.
    fn all_go_on(&self, target: &Target) {
        let now = || self.0.iter().map(|n| n.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let before = now();
        let go_on = || now().iter().zip(&before).all(|(now, before)| *now > before + 3);
        assert!(soon(go_on), "some stand still: {before:?} {:?}\n{}", now(), target.log());
    }
}

/// Runs `work` while each of `clients` goes on in a thread of its own, until it is told to stop.
fn while_they_work<R>(
    clients: std::ops::Range<usize>,
    client: impl Fn(usize, &AtomicBool) + Sync,
    work: impl FnOnce() -> R,
) -> R {
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let (stop, client) = (&stop, &client);
        let running: Vec<_> = clients.map(|n| threads.spawn(move || client(n, stop))).collect();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::SeqCst);
        for thread in running {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The same for clients that only need to be told when to stop.
fn crowd(clients: std::ops::Range<usize>, stop: &AtomicBool, client: impl Fn(usize, &AtomicBool) + Sync) {
    std::thread::scope(|threads| {
        let client = &client;
        for n in clients {
            threads.spawn(move || client(n, stop));
        }
    });
}

/// Checkpoints. (Redis has its own /proc/PID/stat open now and then.)
fn dump(target: &Target, name: &str, scan: &[&str], sk: &[&str]) {
    let _ = target.dumping(name, scan, sk).run().ok("dump");
    let locked = scan.contains(&"--kill") && sk.contains(&"--tcp-established");
    assert_eq!(net::rules().contains("ckpt-"), locked);
}

/// Checkpoints and kills.
fn kill(target: &Target, name: &str, sk: &[&str]) {
    dump(target, name, &["--kill"], sk);
    process::wait_session_free(target.pid);
}

/// A unix connection of lines.
struct Line {
    write: UnixStream,
    read: BufReader<UnixStream>,
}

impl Line {
    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set a timeout");
        Self { read: BufReader::new(stream.try_clone().expect("clone")), write: stream }
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        self.write.write_all(line.as_bytes())
    }

    fn hear(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.read.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    /// Passes over answers to what was asked over an earlier connection.
    fn hear_until(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<String> {
        loop {
            let line = self.hear()?;
            if wanted(&line) {
                return Ok(line);
            }
        }
    }
}

/// A client that comes back when its connection is gone, until it is told to stop; the number of its connections.
fn comes_back(
    stop: &AtomicBool,
    reach: impl Fn() -> Option<UnixStream>,
    mut session: impl FnMut(&mut Line) -> io::Result<()>,
) -> u64 {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let mut connections = 0;
    while !stop.load(Ordering::SeqCst) {
        let Some(stream) = reach() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        connections += 1;
        match session(&mut Line::over(stream)) {
            Ok(()) => {}
            Err(e) if [BrokenPipe, ConnectionReset, UnexpectedEof].contains(&e.kind()) => {}
            Err(e) => panic!("a client, on connection {connections}: {e}"),
        }
    }
    connections
}

/// Counts at redis over TCP, on one connection.
fn counts_over_tcp(n: usize, progress: &Progress, stop: &AtomicBool) {
    let mut client = Client::connect("10.9.0.1:7000");
    let mut count = 0;
    while !stop.load(Ordering::SeqCst) {
        client.say(&format!("INCR outside:{n}\r"));
        count += 1;
        assert_eq!(client.hear(), format!(":{count}"), "client {n}");
        progress.step(n);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Counts at redis over its unix socket, and comes back.
fn counts_over_unix(n: usize, socket: &Path, progress: &Progress, stop: &AtomicBool) -> u64 {
    let (mut count, mut greeting) = (0, 0);
    comes_back(
        stop,
        || UnixStream::connect(socket).ok(),
        |line| {
            greeting += 1;
            let word = format!("greeting-{n}-{greeting}");
            line.say(&format!("ECHO {word}\r\n"))?;
            line.hear_until(|l| l == word)?;
            line.say(&format!("GET outside:{n}\r\n"))?;
            let value = match line.hear()?.as_str() {
                "$-1" => 0,
                _ => line.hear()?.parse().expect("a number"),
            };
            assert!(value == count || value == count + 1, "client {n} has heard {count}, finds {value}");
            count = value;
            while !stop.load(Ordering::SeqCst) {
                line.say(&format!("INCR outside:{n}\r\n"))?;
                assert_eq!(line.hear()?, format!(":{}", count + 1), "client {n}");
                count += 1;
                progress.step(n);
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        },
    )
}

/// A hundred clients: unix and TCP, inside the tree and outside, 25 of each; the TCP clients outside and half of the unix
/// clients outside are in another network namespace.
#[test]
fn a_hundred_clients_of_redis_inside_and_outside() {
    const NAME: &str = "a_hundred_clients_of_redis_inside_and_outside";
    if !installed("redis-server") || !installed("python3") {
        return skip(NAME, "no redis-server or no python3");
    }
    net::alone(NAME, || {
        let dir = TestDir::new("redis_users");
        let socket = dir.path().join("redis.sock");
        let progress = Progress::of(50);
        let visits = Mutex::new(Vec::new());
        let over_unix = |n: usize, stop: &AtomicBool| {
            let connections = counts_over_unix(n, &socket, &progress, stop);
            visits.lock().expect("not poisoned").push(connections);
        };
        let client = |n: usize, stop: &AtomicBool| match n {
            0..25 => counts_over_tcp(n, &progress, stop),
            _ => over_unix(n, stop),
        };
        let (target, ()) = net::beside(
            |stop| crowd(0..38, stop, client),
            || {
                let mut command = workload("redis_users.py");
                command.arg(dir.path().join("log")).arg(dir.path().join("redis.sock")).args(["7000", "25"]);
                let target = Target::spawn(dir, command);
                target.wait_log("ready");
                while_they_work(38..50, client, || {
                    let me = std::process::id().to_string();
                    let sk = ["--tcp-established", "--external", "all", "--queued=drop"];
                    progress.all_go_on(&target);
                    dump(&target, "running", &[], &sk);
                    progress.all_go_on(&target);
                    target.passes("the original");
                    // They are taken back as they come, in the middle of their conversations.
                    kill(&target, "accepted", &sk);
                    let _ = Pipeline::new(target.dir.path())
                        .stage([
                            "ckpt-restore".into(),
                            "--detach".into(),
                            "--timeout=30s".into(),
                            target.path("accepted"),
                        ])
                        .run()
                        .ok("restore by accept");
                    assert_eq!(net::rules(), "");
                    progress.all_go_on(&target);
                    target.passes("the restored one");
                    // Redis sees them go, and serves them anew.
                    kill(&target, "closed", &sk);
                    let _ = Pipeline::new(target.dir.path())
                        .stage(["ckpt-read".into(), target.path("closed")])
                        .stage(["sk-rewrite", "--close", &format!("peer-pid={me}")])
                        .stage(["ckpt-restore", "--detach"])
                        .run()
                        .ok("restore by close");
                    assert_eq!(net::rules(), "");
                    progress.all_go_on(&target);
                    target.passes("the one restored again");
                });
                target
            },
        );
        let visits = visits.into_inner().expect("not poisoned");
        assert!(visits.len() == 25 && visits.iter().all(|&n| n >= 3), "{visits:?}");
        drop(target);
    });
}

/// Asks for pages over one connection that is kept alive, again and again.
fn browses(n: usize, pages: &[(&str, Vec<u8>)], progress: &Progress, stop: &AtomicBool) {
    let mut stream = None;
    assert!(soon(|| {
        stream = TcpStream::connect("10.9.0.1:8000").ok();
        stream.is_some()
    }));
    let mut stream = stream.expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set a timeout");
    let mut read = BufReader::new(stream.try_clone().expect("clone"));
    let mut turn = n;
    while !stop.load(Ordering::SeqCst) {
        let (path, page) = &pages[turn % pages.len()];
        turn += 1;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
        let mut length = None;
        for row in 0.. {
            let mut line = String::new();
            assert_ne!(read.read_line(&mut line).expect("a header"), 0, "client {n} lost its connection");
            assert!(row > 0 || line.starts_with("HTTP/1.1 200"), "{path}: {line}");
            assert!(!line.starts_with("Connection: close"));
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value.trim().parse().ok();
            }
            if line == "\r\n" {
                break;
            }
        }
        assert_eq!(length, Some(page.len()), "{path}");
        let mut body = vec![0; page.len()];
        // Slowly, so that the server is always in the middle of some answer.
        for part in body.chunks_mut(100_000) {
            read.read_exact(part).expect("the page");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(body == *page, "{path} came damaged");
        progress.step(n);
    }
}

/// Master and workers, keepalive connections over TCP from another namespace; half of the pages are fetched by the
/// workers from each other over unix connections that they keep, too.
#[test]
fn nginx_serves_on_over_the_same_connections() {
    const NAME: &str = "nginx_serves_on_over_the_same_connections";
    if !installed("nginx") {
        return skip(NAME, "no nginx");
    }
    net::alone(NAME, || {
        let dir = TestDir::new("nginx_tcp");
        let at = dir.path().display().to_string();
        fs::create_dir(dir.path().join("www")).expect("make a directory");
        let large: Vec<u8> =
            (0..400_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for (name, page) in [("small", &large[..1000]), ("large", &large[..])] {
            fs::write(dir.path().join("www").join(name), page).expect("write a page");
        }
        let config = format!(
            "daemon off; worker_processes 2; pid {at}/pid; error_log {at}/log notice; user root;
            events {{ worker_connections 256; }}
            http {{ access_log {at}/access.log; client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;
              sendfile on; keepalive_requests 1000000; keepalive_timeout 300s;
              upstream behind {{ server unix:{at}/sock; keepalive 8; }}
              server {{ listen 8000; root {at}/www;
                location /behind/ {{ proxy_pass http://behind/; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }}
              server {{ listen unix:{at}/sock; root {at}/www; }} }}"
        );
        fs::write(dir.path().join("nginx.conf"), config).expect("write nginx.conf");
        let pages = [
            ("/small", large[..1000].to_vec()),
            ("/behind/large", large.clone()),
            ("/behind/small", large[..1000].to_vec()),
            ("/large", large),
        ];
        let progress = Progress::of(20);
        let _target = net::beside(
            |stop| crowd(0..20, stop, |n, stop| browses(n, &pages, &progress, stop)),
            || {
                let mut command = Command::new(if Path::new("/usr/sbin/nginx").exists() {
                    "/usr/sbin/nginx"
                } else {
                    "nginx"
                });
                command.args(["-p", &at, "-c"]).arg(dir.path().join("nginx.conf"));
                let target = Target::spawn(dir, command);
                progress.all_go_on(&target);
                let workers = process::children(target.pid);
                assert_eq!(workers.len(), 2);
                dump(&target, "running", &[], &["--tcp-established"]);
                progress.all_go_on(&target);
                for round in 0..3 {
                    let name = format!("img{round}");
                    kill(&target, &name, &["--tcp-established"]);
                    target.restore_ok(&name);
                    assert_eq!(net::rules(), "");
                    assert_eq!(process::children(target.pid), workers);
                    progress.all_go_on(&target);
                }
                assert!(
                    !target.log().contains("[alert]") && !target.log().contains("[error]"),
                    "{}",
                    target.log()
                );
                target
            },
        );
    });
}

/// Counters of an application in memory that all workers share.
const APPLICATION: &str = r#"
import mmap
counts = mmap.mmap(-1, 8 * 64)
def application(environ, start):
    what, _, key = environ["PATH_INFO"][1:].partition("/")
    if what == "word":
        body = key
    else:
        at = slice(8 * int(key), 8 * int(key) + 8)
        n = int.from_bytes(counts[at], "little") + (what == "count")
        counts[at] = n.to_bytes(8, "little")
        body = f"{what} {n}"
    body = body.encode() + b"\n"
    start("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"#;

/// A master and three workers of four threads each that all accept on one unix socket; connections are kept alive.
#[test]
fn forked_workers_take_their_unix_clients_back() {
    const NAME: &str = "forked_workers_take_their_unix_clients_back";
    if !installed("gunicorn") {
        return skip(NAME, "no gunicorn");
    }
    net::alone(NAME, || {
        let dir = TestDir::new("gunicorn");
        let socket = dir.path().join("sock");
        fs::write(dir.path().join("application.py"), APPLICATION).expect("write the application");
        let mut command = Command::new("gunicorn");
        command.args([
            "--workers=3",
            "--worker-class=gthread",
            "--threads=4",
            "--keep-alive=300",
            "--preload",
        ]);
        command.arg(format!("--bind=unix:{}", socket.display())).args(["--error-logfile=log", "application"]);
        let target = Target::spawn(dir, command);
        let progress = Progress::of(12);
        let client = |n: usize, stop: &AtomicBool| {
            let (mut count, mut greeting) = (0, 0);
            let ask = |line: &mut Line, what: &str, answer: &str| {
                line.say(&format!("GET /{what} HTTP/1.1\r\nHost: test\r\n\r\n"))?;
                line.hear_until(|l| l.starts_with(answer))
            };
            let connections = comes_back(
                stop,
                || UnixStream::connect(&socket).ok(),
                |line| {
                    greeting += 1;
                    let word = format!("word-{n}-{greeting}.");
                    ask(line, &format!("word/{word}"), &word)?;
                    let found: u64 =
                        ask(line, &format!("look/{n}"), "look ")?[5..].parse().expect("a number");
                    assert!(
                        found == count || found == count + 1,
                        "client {n} has heard {count}, finds {found}"
                    );
                    count = found;
                    while !stop.load(Ordering::SeqCst) {
                        let answer = ask(line, &format!("count/{n}"), "count ")?;
                        assert_eq!(answer, format!("count {}", count + 1), "client {n}");
                        count += 1;
                        progress.step(n);
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Ok(())
                },
            );
            // One to begin with and one for each restore; and maybe one to a listener that was about to go.
            assert!(connections >= 3, "client {n} has come {connections} times");
        };
        while_they_work(0..12, client, || {
            // They are forked one by one, and clients are served as soon as there is one.
            assert!(soon(|| target.log().matches("Booting worker").count() == 3), "{}", target.log());
            progress.all_go_on(&target);
            let sk = ["--external", "all", "--queued=drop"];
            dump(&target, "running", &[], &sk);
            progress.all_go_on(&target);
            let workers = process::children(target.pid);
            for name in ["first", "second"] {
                kill(&target, name, &sk);
                let _ = Pipeline::new(target.dir.path())
                    .stage([
                        "ckpt-restore".into(),
                        "--detach".into(),
                        "--timeout=30s".into(),
                        target.path(name),
                    ])
                    .run()
                    .ok("restore");
                assert_eq!(process::children(target.pid), workers);
                progress.all_go_on(&target);
            }
        });
        assert!(!target.log().contains("ERROR") && !target.log().contains("CRITICAL"), "{}", target.log());
    });
}

/// What a session of `sessions.py` has been told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Told {
    count: u64,
    hash: u64,
}

impl Told {
    fn then(self, value: u64) -> Self {
        Self { count: self.count + 1, hash: (self.hash * 31 + value) % 1_000_003 }
    }

    /// What is told next: different in each client.
    fn next(self, n: usize) -> u64 {
        (self.count * 13 + u64::try_from(n).expect("small") * 7 + 1) % 1000
    }
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.count, self.hash)
    }
}

const NOTHING: Told = Told { count: 0, hash: 7 };

/// The paths at which unix client `n` finds its session again: one where the server listens for it, one where it
/// listens for the server.
fn meeting(dir: &Path, n: usize) -> [PathBuf; 2] {
    ["there", "here"].map(|side| dir.join(format!("{side}{n}.sock")))
}

fn session_over_unix(
    n: usize,
    dir: &Path,
    inodes: &Mutex<HashMap<u32, usize>>,
    progress: &Progress,
    stop: &AtomicBool,
) {
    let [there, here] = meeting(dir, n);
    let listener = UnixListener::bind(here).expect("listen");
    listener.set_nonblocking(true).expect("set O_NONBLOCK");
    let (mut told, mut greeting) = (NOTHING, 0);
    let connections = comes_back(
        stop,
        || {
            let first = inodes.lock().expect("not poisoned").values().all(|&m| m != n);
            let reached = if first {
                UnixStream::connect(dir.join("sessions.sock")).ok()
            } else {
                UnixStream::connect(&there).ok().or_else(|| {
                    let stream = listener.accept().ok()?.0;
                    stream.set_nonblocking(false).expect("clear O_NONBLOCK");
                    Some(stream)
                })
            };
            if let Some(stream) = &reached {
                let link = fs::read_link(format!("/proc/self/fd/{}", stream.as_raw_fd())).expect("readlink");
                let inode = link.display().to_string().trim_matches(|c: char| !c.is_ascii_digit()).parse();
                inodes.lock().expect("not poisoned").insert(inode.expect("an inode"), n);
            }
            reached
        },
        |line| {
            greeting += 1;
            line.say(&format!("? greeting{greeting}\n"))?;
            let word = format!("= greeting{greeting} ");
            let state = line.hear_until(|l| l.starts_with(&word))?;
            let state = &state[word.len()..];
            let either = [told, told.then(told.next(n))];
            told = *either
                .iter()
                .find(|t| t.to_string() == state)
                .unwrap_or_else(|| panic!("client {n} finds {state:?}, which is none of {either:?}"));
            while !stop.load(Ordering::SeqCst) {
                let value = told.next(n);
                line.say(&format!("x {value}\n"))?;
                assert_eq!(line.hear()?, told.then(value).to_string(), "client {n}");
                told = told.then(value);
                progress.step(n);
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        },
    );
    assert_eq!(connections, 3, "client {n}: one to begin with, and one for each restore");
}

fn session_over_tcp(n: usize, progress: &Progress, stop: &AtomicBool) {
    let mut client = Client::connect("10.9.0.1:7000");
    let mut told = NOTHING;
    while !stop.load(Ordering::SeqCst) {
        let value = told.next(n);
        client.say(&format!("x {value}"));
        told = told.then(value);
        assert_eq!(client.hear(), told.to_string(), "client {n}");
        progress.step(n);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A python asyncio server in the manner of sshd: a shell for each connection, over TCP and unix, clients inside and
/// outside. Each unix client outside finds its own session again: at a path where the server listens for it alone, and
/// at one where it listens for the server.
#[test]
fn each_client_of_asyncio_finds_its_own_session() {
    const NAME: &str = "each_client_of_asyncio_finds_its_own_session";
    const CLIENTS: usize = 12;
    if !installed("python3") {
        return skip(NAME, "no python3");
    }
    net::alone(NAME, || {
        let dir = TestDir::new("sessions");
        let at = dir.path().to_owned();
        let progress = Progress::of(CLIENTS);
        let inodes = Mutex::new(HashMap::new());
        let _target = net::beside(
            |stop| crowd(0..CLIENTS / 2, stop, |n, stop| session_over_tcp(n, &progress, stop)),
            || {
                let mut command = workload("sessions.py");
                command.arg(dir.path().join("log")).arg(dir.path().join("sessions.sock")).args(["7000", "5"]);
                let target = Target::spawn(dir, command);
                target.wait_log("ready");
                let over_unix =
                    |n: usize, stop: &AtomicBool| session_over_unix(n, &at, &inodes, &progress, stop);
                while_they_work(CLIENTS / 2..CLIENTS, over_unix, || {
                    progress.all_go_on(&target);
                    let sk = ["--tcp-established", "--external", "all", "--queued=drop"];
                    dump(&target, "running", &[], &sk);
                    progress.all_go_on(&target);
                    target.passes("the original");
                    for (side, verb) in ["accept", "connect"].into_iter().enumerate() {
                        kill(&target, verb, &sk);
                        let images = ckpt_images::ImageSet::from_dir(&target.path(verb)).expect("read");
                        let files: Vec<ckpt_proto::types::FileEntry> =
                            images.all(ckpt_proto::Image::Files, 0).expect("files");
                        let outside =
                            files.into_iter().filter_map(|f| f.usk).filter(|u| u.ckpt_external.is_some());
                        let rules: Vec<String> = outside
                            .map(|u| {
                                let n = inodes.lock().expect("not poisoned")[&u.peer];
                                format!("{verb} {}={}\n", u.ino, meeting(&at, n)[side].display())
                            })
                            .collect();
                        assert_eq!(rules.len(), CLIENTS / 2);
                        fs::write(target.path("rules"), rules.concat()).expect("write the rules");
                        let _ = Pipeline::new(target.dir.path())
                            .stage(["ckpt-read".into(), target.path(verb)])
                            .stage(["sk-rewrite".into(), "--rules".into(), target.path("rules")])
                            .stage(["ckpt-restore", "--detach", "--timeout=30s"])
                            .run()
                            .ok(verb);
                        assert_eq!(net::rules(), "");
                        progress.all_go_on(&target);
                        target.passes("the restored one");
                    }
                });
                target
            },
        );
    });
}
