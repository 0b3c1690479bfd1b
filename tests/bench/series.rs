//! A checkpoint after every message of a conversation: SIZE of them in one series, then twenty, chosen at random, are
//! restored and asked on.
//!
//! The server counts its messages in memory and says the number with each answer. It is killed before the first
//! restore; the client, which is outside of the checkpoint, listens at a new path for each.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use ckpt_tests::{Pipeline, Random, Target, process, tool};

use crate::harness::{Tmpfs, median};

const RESTORED: u64 = 20;

struct Talk(BufReader<UnixStream>);

impl Talk {
    fn ask(&mut self, what: &str) -> String {
        writeln!(self.0.get_mut(), "{what}").expect("ask");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("hear the answer");
        line.trim_end().to_owned()
    }
}

pub fn run(count: u64) {
    let dir = Tmpfs::new();
    let images = dir.join("series");
    let target = Target::start_with("answering", &["-", "server.sock"]);
    let stream = UnixStream::connect(target.path("server.sock")).expect("connect");
    let mut talk = Talk(BufReader::new(stream));
    assert_eq!(talk.ask("hello"), "answer 1 to hello");
    let sockets = fs::read_dir(format!("/proc/{}/fd", target.pid)).expect("list fds").flatten();
    let fds = sockets.filter_map(|f| f.file_name().to_str()?.parse::<i32>().ok());
    // The listener came first, the connection is the last descriptor.
    let is_socket = |fd: &i32| {
        process::link(target.pid, &format!("fd/{fd}")).display().to_string().starts_with("socket:[")
    };
    let id = process::socket_id(target.pid, fds.filter(is_socket).max().expect("sockets"));

    let errors = target.path("series.err");
    let mut child = Command::new(tool("ckpt-series"))
        .args(["-v", "-t", &target.pid.to_string(), "--external", &id.to_string(), "-D"])
        .arg(&images)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors).expect("make a file"))
        .spawn()
        .expect("start ckpt-series");
    let mut numbers = BufReader::new(child.stdout.take().expect("a pipe"));
    let start = Instant::now();
    for n in 1..=count {
        child.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("ask for a checkpoint");
        let mut line = String::new();
        numbers.read_line(&mut line).expect("read a number");
        assert_eq!(line, format!("{n:06}\n"), "{}", fs::read_to_string(&errors).unwrap_or_default());
        assert_eq!(talk.ask("and"), format!("answer {} to and", n + 1));
    }
    let took = start.elapsed().as_secs_f64();
    drop(child.stdin.take());
    let said = fs::read_to_string(&errors).expect("read what it says");
    assert!(child.wait().expect("wait for ckpt-series").success(), "{said}");
    let frozen = |line: &str| line.split_once("frozen for ")?.1.strip_suffix(" ms")?.parse::<f64>().ok();
    let frozen: Vec<f64> = said.lines().filter_map(frozen).collect();
    drop(talk);
    target.end();

    let mut random = Random::new("series");
    let mut times = Vec::new();
    let mut depths = Vec::new();
    for k in 0..RESTORED {
        let n = 1 + random.below(count);
        let name = images.join(format!("{n:06}"));
        let path = target.path(&format!("client-{k}.sock"));
        let listener = UnixListener::bind(&path).expect("listen");
        let start = Instant::now();
        let stage = [
            "ckpt-restore".into(),
            "--detach".into(),
            "--external".into(),
            format!("unix[{id}]:{}", path.display()).into(),
            name.into_os_string(),
        ];
        let _ = Pipeline::new(target.dir.path()).stage(stage).run().ok("restore one of the series");
        times.push(start.elapsed().as_secs_f64());
        let mut talk = Talk(BufReader::new(listener.accept().expect("the server connects").0));
        for more in 1..=3 {
            assert_eq!(talk.ask("go on"), format!("answer {} to go on", n + more), "restored from {n}");
        }
        drop(talk);
        target.end();
        depths.push(f64::from(u32::try_from((n - 1) % 1000).expect("a small number")));
    }
    let number = f64::from(u32::try_from(count).expect("a small number"));
    let bytes = f64::from(u32::try_from(room(&images) >> 10).expect("less than 4 TiB"));
    println!("{:<22}{:>9.1} /s, durable on tmpfs, an answer after each", "checkpoints", number / took);
    println!("{:<22}{:>9.3} ms", "frozen, median", median(frozen));
    println!(
        "{:<22}{:>9.1} MiB, {:.1} KiB each, one in 1000 of them full",
        "disk",
        bytes / 1024.0,
        bytes / number
    );
    println!("{:<22}{:>9} restored, each knew its number", "proven", RESTORED);
    println!("{:<22}{:>9.3} s, behind {:.0} increments (medians)", "restore", median(times), median(depths));
}

/// Room that all files below `dir` take, bytes.
fn room(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("list").flatten();
    let of = |m: fs::Metadata, path: &Path| if m.is_dir() { room(path) } else { m.blocks() * 512 };
    entries.map(|e| e.metadata().map_or(0, |m| of(m, &e.path()))).sum()
}
