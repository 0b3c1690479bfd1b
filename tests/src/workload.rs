//! Workloads and other programs under test.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Outcome, Pipeline, Snapshot, TestDir, bin_dir, here, process, soon};

/// Compiles `workloads/NAME.c` unless that has been done since it (or the shared header) changed.
///
/// # Panics
/// gcc fails.
#[must_use]
pub fn compile(name: &str) -> PathBuf {
    let sources = here().join("workloads");
    let out = bin_dir().parent().map_or_else(std::env::temp_dir, Path::to_owned).join("workloads");
    fs::create_dir_all(&out).expect("make target/workloads");
    let source = sources.join(format!("{name}.c"));
    let binary = out.join(name);
    let lock = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .open(out.join(".lock"))
        .expect("open the lock");
    let _held = Flock::lock(lock, FlockArg::LockExclusive).expect("lock target/workloads");
    let time = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let newest = time(&source).max(time(&sources.join("workload.h")));
    if time(&binary) < newest {
        let fresh = out.join(format!(".{name}.{}", std::process::id()));
        let status = Command::new("gcc")
            .args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .args([&fresh, &source])
            .status()
            .expect("run gcc");
        assert!(status.success(), "gcc {}", source.display());
        fs::rename(&fresh, &binary).expect("move the workload into place");
    }
    binary
}

/// The names of the ways in which a workload can be made to fail: every `BREAK("name")` in its source.
///
/// # Panics
/// There is no such workload.
#[must_use]
pub fn breaks(name: &str) -> Vec<String> {
    let source =
        fs::read_to_string(here().join(format!("workloads/{name}.c"))).expect("read the workload's source");
    let mut names: Vec<String> = source
        .split("BREAK(\"")
        .skip(1)
        .filter_map(|rest| rest.split_once('"'))
        .map(|(name, _)| name.to_owned())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Shell words that close every descriptor above 2 and become the command that follows.
pub const CLOSE_ALL: &str =
    r#"for f in /proc/$$/fd/*; do n=${f##*/}; [ $n -gt 2 ] && eval "exec $n>&-"; done; exec "$@""#;

/// A program under test, in a directory of its own. Dropping it ends all its processes.
#[derive(Debug)]
pub struct Target {
    /// The root of the tree.
    pub pid: i32,
    /// Its directory: `log`, the stages' messages, and what it makes itself.
    pub dir: TestDir,
}

impl Target {
    /// Starts a workload and waits until it is ready.
    ///
    /// # Panics
    /// It does not become ready.
    #[must_use]
    pub fn start(name: &str) -> Self {
        Self::start_with(name, &[])
    }

    /// Starts a workload with arguments behind the log.
    ///
    /// # Panics
    /// It does not become ready.
    #[must_use]
    pub fn start_with(name: &str, args: &[&str]) -> Self {
        let mut command = Command::new(compile(name));
        let dir = TestDir::new(name);
        command.arg(dir.path().join("log")).args(args);
        let target = Self::spawn(dir, command);
        target.wait_log("ready");
        for line in target.log().lines().filter_map(|line| line.strip_prefix("SKIP ")) {
            crate::skip(name, line);
        }
        target
    }

    /// Starts any program in `dir`, in a session of its own, without descriptors that lead outside.
    ///
    /// # Panics
    /// It can't be started.
    #[must_use]
    pub fn spawn(dir: TestDir, command: Command) -> Self {
        // setsid(1) execs the program without a fork, for a child of ours leads no group; so does the shell, which
        // closes what this process inherited without close-on-exec from whoever runs the tests.
        let mut outer = Command::new("setsid");
        outer.args(["bash", "-c", CLOSE_ALL, "bash"]).arg(command.get_program()).args(command.get_args());
        let output = fs::File::create(dir.path().join("output")).expect("make output");
        outer.stdin(Stdio::null()).stdout(output.try_clone().expect("clone output")).stderr(output);
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        Self::spawn_as_it_is(dir, outer)
    }

    /// Starts a program with the descriptors and session that the command says.
    ///
    /// # Panics
    /// It can't be started.
    #[must_use]
    pub fn spawn_as_it_is(dir: TestDir, mut command: Command) -> Self {
        process::become_subreaper();
        command.current_dir(dir.path()).env(process::MARKER, dir.path()).env("LC_ALL", "C");
        // Not kept as a `Child`: the pid goes over to the restored process, and `process::is_free` reaps both.
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        let pid = i32::try_from(child.id()).expect("pids are small");
        Self { pid, dir }
    }

    /// Path of a file in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The log so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("log")).unwrap_or_default()).into_owned()
    }

    fn lines(&self, word: &str) -> usize {
        self.log().lines().filter(|line| line.starts_with(word)).count()
    }

    /// Waits until a line of the log begins with `word`.
    ///
    /// # Panics
    /// It does not come, or BROKEN does.
    pub fn wait_log(&self, word: &str) {
        let came = soon(|| self.lines(word) > 0 || self.lines("BROKEN") > 0);
        assert!(
            came && self.lines("BROKEN") == 0,
            "waiting for {word:?}, the log says:\n{}{}",
            self.log(),
            self.last_words()
        );
    }

    fn last_words(&self) -> String {
        let states: Vec<_> = process::tree(self.pid)
            .into_iter()
            .map(|p| (p, process::state(p), process::text(p, "comm")))
            .collect();
        format!(
            "output: {}\nprocesses: {states:?}",
            String::from_utf8_lossy(&fs::read(self.path("output")).unwrap_or_default())
        )
    }

    /// Sends a signal to the root.
    ///
    /// # Panics
    /// It is gone.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal)
            .unwrap_or_else(|e| panic!("send {signal} to {}: {e}\n{}", self.pid, self.log()));
    }

    /// Asks the workload to check itself and returns its verdict: "PASS" or "BROKEN ...".
    ///
    /// # Panics
    /// It says nothing.
    #[must_use]
    pub fn verdict(&self) -> String {
        self.verdict_by(self.pid)
    }

    /// As [`Self::verdict`], asking another process of the tree.
    ///
    /// # Panics
    /// It says nothing.
    #[must_use]
    pub fn verdict_by(&self, pid: i32) -> String {
        let passes = self.lines("PASS");
        assert_eq!(self.lines("BROKEN"), 0, "{}", self.log());
        kill(Pid::from_raw(pid), Signal::SIGUSR1)
            .unwrap_or_else(|e| panic!("ask {pid}: {e}\n{}", self.log()));
        let came = soon(|| self.lines("PASS") > passes || self.lines("BROKEN") > 0);
        assert!(came, "no verdict, the log says:\n{}{}", self.log(), self.last_words());
        let log = self.log();
        log.lines().rfind(|l| l.starts_with("BROKEN")).unwrap_or("PASS").to_owned()
    }

    /// Asserts that the workload finds itself unharmed.
    ///
    /// # Panics
    /// It does not.
    pub fn passes(&self, who: &str) {
        let verdict = self.verdict();
        assert_eq!(verdict, "PASS", "{who} says so; the log:\n{}", self.log());
    }

    /// What the tree looks like from outside.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(self.pid)
    }

    /// A snapshot of a tree at rest: two in a row that agree, with all threads asleep. (On a busy machine
    /// one may be caught twice while it starts, or between a signal and its handler; one that never sleeps
    /// is taken as it is after a while.)
    ///
    /// # Panics
    /// It does not come to rest.
    #[must_use]
    pub fn at_rest(&self) -> Snapshot {
        let mut last = self.snapshot();
        let mut diff = Vec::new();
        let start = std::time::Instant::now();
        let rests = soon(|| {
            let asleep = process::asleep(self.pid);
            let now = self.snapshot();
            diff = last.diff(&now);
            last = now;
            let asleep = asleep && process::asleep(self.pid);
            diff.is_empty() && (asleep || start.elapsed() > std::time::Duration::from_secs(2))
        });
        assert!(rests && last.len() > 20, "the target does not come to rest: {diff:#?}");
        last
    }

    /// Asserts that an observer sees no change since `before`. Threads are caught in motion, so it may take more than
    /// one look to see them in the same place.
    ///
    /// # Panics
    /// There is a change that stays.
    pub fn unchanged(&self, before: &Snapshot) {
        let mut diff = Vec::new();
        let same = {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
            loop {
                diff.clear();
                diff.extend(before.diff(&self.snapshot()));
                if diff.is_empty() {
                    break true;
                }
                if std::time::Instant::now() > end {
                    break false;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        assert!(same, "the target was changed: {diff:#?}");
    }

    /// Asserts that the restored tree looks like the original `before`.
    ///
    /// # Panics
    /// There is a difference that stays.
    pub fn looks_like(&self, before: &Snapshot) {
        let before = before.portable(self.pid);
        let mut diff = Vec::new();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(3);
        loop {
            diff.clear();
            diff.extend(before.diff(&self.snapshot().portable(self.pid)));
            // A thread that is stopped before it makes its interrupted call again stands on the instruction,
            // not behind it.
            if process::state(self.pid) == Some('T') {
                diff.retain(|line| !line.contains(" syscall: "));
            }
            if diff.is_empty() {
                return;
            }
            if std::time::Instant::now() > end {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("the restored tree differs: {diff:#?}");
    }

    /// `ckpt-scan -t PID | ckpt-sk | ckpt-write DIR/NAME`.
    #[must_use]
    pub fn dump(&self, name: &str) -> Outcome {
        self.dumping(name, &[], &[]).run()
    }

    /// `ckpt-scan -t PID SCAN... | ckpt-sk SK... | ckpt-write DIR/NAME`, not started yet.
    #[must_use]
    pub fn dumping(&self, name: &str, scan: &[&str], sk: &[&str]) -> Pipeline {
        let pid = self.pid.to_string();
        Pipeline::new(self.dir.path())
            .stage(["ckpt-scan", "-t", &pid].iter().chain(scan).copied())
            .stage(["ckpt-sk"].iter().chain(sk).copied())
            .stage(["ckpt-write".into(), self.path(name)])
    }

    /// Dumps to DIR/NAME.
    ///
    /// # Panics
    /// It fails.
    pub fn dump_ok(&self, name: &str) -> PathBuf {
        let _ = self.dump(name).ok("dump");
        let path = self.path(name);
        assert!(path.is_dir(), "no {}", path.display());
        path
    }

    /// `ckpt-restore --detach DIR/NAME`.
    #[must_use]
    pub fn restore(&self, name: &str) -> Outcome {
        Pipeline::new(self.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), self.path(name)])
            .run()
    }

    /// Restores from DIR/NAME.
    ///
    /// # Panics
    /// It fails.
    pub fn restore_ok(&self, name: &str) {
        let _ = self.restore(name).ok("restore");
    }

    /// Ends all processes and waits until their pids are free.
    pub fn end(&self) {
        process::end_all(self.dir.path());
    }

    /// Appends a line to the log, for the reader of a failed test.
    pub fn note(&self, line: &str) {
        if let Ok(mut file) = fs::OpenOptions::new().append(true).open(self.path("log")) {
            let _ = writeln!(file, "# {line}");
        }
    }

    /// The whole trip: dump, the original unharmed and passing; end it, restore, the same to an observer and to itself.
    pub fn survives(&self) {
        let before = self.at_rest();
        self.dump_ok("img");
        self.unchanged(&before);
        self.passes("the original after the dump");
        self.end();
        self.note("restore");
        self.restore_ok("img");
        self.looks_like(&before);
        self.passes("the restored one");
        self.end();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        process::end_all(self.dir.path());
    }
}
