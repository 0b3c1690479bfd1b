//! Network namespaces for tests, and clients in them.
//!
//! A namespace belongs to a thread: what the thread starts is in it too, the tools included. So no test
//! touches the host's network, ports are free, and the rules that `nft` shows are the test's alone.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};

use crate::{installed, skip};

fn run(words: &str) {
    let mut words = words.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words.clone()).output().expect("run ip");
    assert!(output.status.success(), "{program} {:?}: {output:?}", words.collect::<Vec<_>>());
}

/// Runs a test in a network namespace of its own, or skips it.
///
/// # Panics
/// The test does.
pub fn alone(test: &str, work: impl FnOnce() + Send) {
    if !installed("ip") || !installed("nft") {
        return skip(test, "no ip or no nft");
    }
    std::thread::scope(|threads| {
        let thread = threads.spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                return skip(test, "no network namespace of its own");
            }
            run("ip link set lo up");
            work();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Joins the caller's namespace (10.9.0.1, fd09::1) to a new one (10.9.0.2, fd09::2). `near` runs in the former, `far` in
/// the latter at the same time, and is told to stop when `near` is done.
///
/// # Panics
/// A step or one of the two does.
pub fn beside<N, F: Send>(far: impl FnOnce(&AtomicBool) -> F + Send, near: impl FnOnce() -> N) -> (N, F) {
    let (tell, told) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let stop = &stop;
        let other = threads.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a second network namespace");
            tell.send(nix::unistd::gettid()).expect("tell the thread");
            wait.recv().expect("wait for the link");
            run("ip link set lo up");
            run("ip address add 10.9.0.2/24 dev far");
            run("ip address add fd09::2/64 dev far nodad");
            run("ip link set far up");
            far(stop)
        });
        let tid = told.recv().expect("hear of the thread");
        run(&format!("ip link add near type veth peer name far netns {tid}"));
        run("ip address add 10.9.0.1/24 dev near");
        run("ip address add fd09::1/64 dev near nodad");
        run("ip link set near up");
        go.send(()).expect("let it go on");
        let near = std::panic::catch_unwind(std::panic::AssertUnwindSafe(near));
        stop.store(true, Ordering::SeqCst);
        let far = other.join();
        let near = near.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (near, far.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// All rules of the caller's namespace.
///
/// # Panics
/// nft fails.
#[must_use]
pub fn rules() -> String {
    let output = Command::new("nft").args(["list", "ruleset"]).output().expect("run nft");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A client of `tcp_answering`.
#[derive(Debug)]
pub struct Client {
    write: TcpStream,
    read: BufReader<TcpStream>,
}

impl Client {
    /// Connects, for some seconds if need be.
    ///
    /// # Panics
    /// Nobody listens.
    #[must_use]
    pub fn connect(address: &str) -> Self {
        let address: SocketAddr = address.parse().expect("an address");
        let mut stream = None;
        crate::soon(|| {
            stream = TcpStream::connect(address).ok();
            stream.is_some()
        });
        let write = stream.unwrap_or_else(|| panic!("connect to {address}"));
        write.set_read_timeout(Some(Duration::from_secs(30))).expect("set a timeout");
        write.set_nodelay(true).expect("TCP_NODELAY");
        let read = BufReader::new(write.try_clone().expect("clone"));
        Self { write, read }
    }

    /// Sends a line.
    ///
    /// # Panics
    /// The connection is gone.
    pub fn say(&mut self, line: &str) {
        writeln!(self.write, "{line}").unwrap_or_else(|e| panic!("say {line}: {e}"));
    }

    /// Reads a line.
    ///
    /// # Panics
    /// The connection is gone, or nothing comes.
    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        self.read.read_line(&mut line).unwrap_or_else(|e| panic!("wait for an answer: {e}"));
        line.trim_end().to_owned()
    }

    /// Asks and returns the number of the answer.
    ///
    /// # Panics
    /// The answer is not to this.
    pub fn ask(&mut self, what: &str) -> u64 {
        self.say(what);
        let answer = self.hear();
        let rest = answer
            .trim_start_matches('x')
            .strip_prefix("answer ")
            .unwrap_or_else(|| panic!("{what}: heard {answer:?}"));
        let (number, to) = rest.split_once(" to ").unwrap_or_else(|| panic!("{what}: heard {rest:?}"));
        assert_eq!(to, what);
        number.parse().expect("a number")
    }

    /// The connection.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.write
    }
}
