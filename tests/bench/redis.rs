//! What a series of checkpoints costs a busy database, next to what its own BGSAVE costs it.
//!
//! redis-server with SIZE MiB of values serves one client, outside of the checkpoint, that writes without a pause: in
//! each request it counts and overwrites a value of a hot set. For a while it is left alone, then 100 checkpoints are
//! made in a series, then it saves itself by BGSAVE (a fork, too) over and over. For each phase the client reports its
//! requests per second and the longest time it had to wait for an answer.
//!
//! Then ten states, chosen at random, are restored: the counter has to lie between what the client had been answered
//! when the checkpoint before was printed and when this one was, the keys have to be all there, and the writes of each
//! request, of which there are two, have to be both there or both not.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use ckpt_tests::{Pipeline, Random, Target, TestDir, installed, skip, soon, tool};

use crate::harness::{self, Tmpfs};

const CHECKPOINTS: usize = 100;
const PERIOD: &str = "100ms";
const RESTORED: u64 = 10;
/// Bytes of a value.
const VALUE: u64 = 1000;
/// Values that are overwritten.
const HOT: u64 = 2000;

/// One connection that speaks the server's protocol.
struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connect to redis");
        let reader = BufReader::new(stream.try_clone().expect("clone the connection"));
        Self { stream, reader }
    }

    fn send(&mut self, request: &str) {
        self.stream.write_all(request.as_bytes()).expect("send to redis");
    }

    /// The first line of an answer, or the value of a string.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("an answer of redis");
        if line.starts_with('$') && !line.starts_with("$-") {
            line.clear();
            self.reader.read_line(&mut line).expect("a value of redis");
        }
        line.trim_end().to_owned()
    }

    fn ask(&mut self, request: &str) -> String {
        self.send(&format!("{request}\r\n"));
        self.answer()
    }

    /// Counts, and writes number `n` into a hot value; both or neither.
    fn write(&mut self, n: u64) {
        let width = usize::try_from(VALUE).expect("a small number");
        let slot = n % HOT;
        self.send(&format!("MULTI\r\nINCR counter\r\nSET hot:{slot} {n:0width$}\r\nEXEC\r\n"));
        for expected in ["+OK", "+QUEUED", "+QUEUED", "*2"] {
            assert_eq!(self.answer(), expected);
        }
        assert_eq!(self.answer(), format!(":{n}"));
        assert_eq!(self.answer(), "+OK");
    }
}

/// What the client noticed in one phase.
struct Felt {
    per_second: f64,
    longest: Duration,
}

/// The client's work, shared with whoever measures it.
#[derive(Default)]
struct Load {
    written: AtomicU64,
    /// Longest wait since it was last reset, microseconds.
    longest: AtomicU64,
    over: AtomicBool,
}

/// Ends the load, also when what it is measured by panics.
struct End<'a>(&'a Load);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

impl Load {
    fn run(&self, client: &mut Client) {
        while !self.over.load(Ordering::Relaxed) {
            let start = Instant::now();
            client.write(self.written.load(Ordering::SeqCst) + 1);
            let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.longest.fetch_max(micros, Ordering::SeqCst);
            self.written.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn during<R>(&self, work: impl FnOnce() -> R) -> (R, Felt) {
        self.longest.store(0, Ordering::SeqCst);
        let (start, before) = (Instant::now(), self.written.load(Ordering::SeqCst));
        let result = work();
        let written = self.written.load(Ordering::SeqCst) - before;
        let written = f64::from(u32::try_from(written).expect("a number of requests"));
        let longest = Duration::from_micros(self.longest.load(Ordering::SeqCst));
        (result, Felt { per_second: written / start.elapsed().as_secs_f64(), longest })
    }
}

pub fn run(mib: u64) {
    if !installed("redis-server") {
        return skip("bench redis", "no redis-server");
    }
    let dir = Tmpfs::new();
    harness::warm_up(&dir.0, (mib * 4) << 20);
    let (target, socket) = start(mib, &dir);
    let mut client = Client::connect(&socket);
    let keys = client.ask("DBSIZE");
    let id = connection(target.pid);

    let load = Load::default();
    // What had been answered when a checkpoint was printed, with the state before all of them first.
    let mut marks = Vec::new();
    let images = dir.join("series");
    std::thread::scope(|scope| {
        scope.spawn(|| load.run(&mut client));
        let _end = End(&load);
        assert!(soon(|| load.written.load(Ordering::SeqCst) > HOT));
        let ((), alone) = load.during(|| std::thread::sleep(Duration::from_secs(5)));
        let (frozen, series) = load.during(|| {
            let frozen;
            (marks, frozen) = checkpoints(&target, &images, &id, &load);
            frozen
        });
        let (saves, saving) = load.during(|| saves(&socket));
        let row = |name: &str, felt: &Felt| {
            let share = felt.per_second / alone.per_second;
            println!(
                "{name:<22}{:>9.0} requests/s{share:>7.2} x{:>12.1} ms longest wait",
                felt.per_second,
                felt.longest.as_secs_f64() * 1000.0
            );
        };
        row("left alone", &alone);
        row(&format!("{CHECKPOINTS} checkpoints"), &series);
        let (first, others) = frozen.split_first().expect("a first checkpoint");
        println!(
            "{:<22}{first:>9.1} ms the first, which is full;{:>6.1} ms the others (median)",
            "frozen",
            harness::median(others.to_vec())
        );
        row(&format!("{saves} times BGSAVE"), &saving);
    });
    let bytes: u64 = pages_files(&images).iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
    println!("{} MiB of data, {} MiB of pages in {CHECKPOINTS} checkpoints", mib, bytes >> 20);
    target.end();

    let mut random = Random::new("redis");
    for _ in 0..RESTORED {
        let number = usize::try_from(random.below(CHECKPOINTS as u64)).expect("a small number");
        let image = images.join(format!("{:06}", number + 1));
        let _ = Pipeline::new(target.dir.path())
            .stage(["ckpt-read".into(), image.into_os_string()])
            .stage(["sk-rewrite", "--close", &id, "--drop-queues", &id])
            .stage(["ckpt-restore", "--detach"])
            .run()
            .ok("restore");
        let mut client = Client::connect(&socket);
        let counter: u64 = client.ask("GET counter").parse().expect("a number");
        let (low, high) = (marks[number], marks[number + 1] + 1);
        assert!(
            (low..=high).contains(&counter),
            "checkpoint {}: {counter} is not in {low}..={high}",
            number + 1
        );
        for n in counter.saturating_sub(HOT - 1)..=counter {
            let value = client.ask(&format!("GET hot:{}", n % HOT));
            assert_eq!(value.trim_start_matches('0'), n.to_string(), "hot value of request {n}");
        }
        // The counter and the hot values came after the keys were counted.
        let size = |text: &str| text.trim_start_matches(':').parse::<u64>().expect("a number of keys");
        assert_eq!(size(&client.ask("DBSIZE")), size(&keys) + HOT + 1);
        assert_eq!(client.ask("GET key:77").len(), usize::try_from(VALUE).expect("small"));
        target.end();
    }
    println!("{RESTORED} random states restored and verified");
}

fn start(mib: u64, dir: &Tmpfs) -> (Target, PathBuf) {
    let home = TestDir::new("redis");
    let socket = dir.join("redis.sock");
    let config = format!(
        "port 0\nunixsocket {}\ndir {}\nlogfile {1}/log\nsave \"\"\nappendonly no\nenable-debug-command yes\n",
        socket.display(),
        home.path().display()
    );
    let path = home.path().join("redis.conf");
    fs::write(&path, config).expect("write the configuration");
    let mut command = Command::new("redis-server");
    command.arg(path);
    let target = Target::spawn(home, command);
    assert!(soon(|| UnixStream::connect(&socket).is_ok()), "redis does not start: {}", target.log());
    let count = (mib << 20) / VALUE;
    assert_eq!(Client::connect(&socket).ask(&format!("DEBUG POPULATE {count} key {VALUE}")), "+OK");
    (target, socket)
}

/// The inode of the server's end of its only connection.
fn connection(pid: i32) -> String {
    let out = Command::new(tool("ckpt-sk"))
        .args(["--list", "-t", &pid.to_string()])
        .output()
        .expect("run ckpt-sk --list");
    let text = String::from_utf8_lossy(&out.stdout);
    let row = text.lines().find(|row| row.contains("(outside)"));
    let id = row.and_then(|row| row.split_whitespace().next());
    id.unwrap_or_else(|| panic!("no connection from outside in {text}")).to_owned()
}

/// Makes the series; gives what had been answered before it and after each number, and how long each freeze took, ms.
fn checkpoints(target: &Target, images: &Path, id: &str, load: &Load) -> (Vec<u64>, Vec<f64>) {
    let said = target.path("series.err");
    let mut series = Command::new(tool("ckpt-series"))
        .args(["-v", "-t", &target.pid.to_string(), "--every", PERIOD, "--count", &CHECKPOINTS.to_string()])
        .args(["--external", id, "--queued", "drop", "-D"])
        .arg(images)
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&said).expect("make a file"))
        .spawn()
        .expect("start ckpt-series");
    let mut marks = vec![load.written.load(Ordering::SeqCst)];
    for line in BufReader::new(series.stdout.take().expect("a pipe")).lines() {
        let number = line.expect("a number");
        marks.push(load.written.load(Ordering::SeqCst));
        assert_eq!(number.parse::<usize>().ok(), Some(marks.len() - 1));
    }
    assert!(series.wait().expect("wait for ckpt-series").success());
    assert_eq!(marks.len(), CHECKPOINTS + 1);
    let said = fs::read_to_string(&said).expect("read what it says");
    let frozen = |line: &str| line.split_once("frozen for ")?.1.strip_suffix(" ms")?.parse::<f64>().ok();
    (marks, said.lines().filter_map(frozen).collect())
}

/// Has the server save itself as often as it can in a few seconds; how often that was.
fn saves(socket: &Path) -> u32 {
    let mut client = Client::connect(socket);
    let end = Instant::now() + Duration::from_secs(8);
    let mut count = 0;
    while Instant::now() < end {
        assert_eq!(client.ask("BGSAVE"), "+Background saving started");
        count += 1;
        let saving = |client: &mut Client| {
            client.send("INFO persistence\r\n");
            let mut text = String::new();
            while !text.contains("rdb_bgsave_in_progress:") {
                text = String::new();
                client.reader.read_line(&mut text).expect("INFO of redis");
            }
            let busy = text.trim_end().ends_with('1');
            // The rest of the answer, up to what comes last.
            client.send("ECHO over\r\n");
            while client.answer() != "over" {}
            busy
        };
        while saving(&mut client) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    count
}

fn pages_files(images: &Path) -> Vec<PathBuf> {
    let dirs = fs::read_dir(images).into_iter().flatten().flatten();
    let files = dirs.flat_map(|dir| fs::read_dir(dir.path()).into_iter().flatten().flatten());
    let pages = files.filter(|file| file.file_name().to_string_lossy().starts_with("pages-"));
    pages.map(|file| file.path()).collect()
}
