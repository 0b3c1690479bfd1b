//! Borrowing live tasks: they come out untouched, whether we finish or are killed.
//!
//! `examples/hammer.rs` does the borrowing, since it must be a process of its own to be killed.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

fn hammer() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test knows its own path");
    path.pop();
    path.pop();
    path.join("examples/hammer")
}

/// A process that ends with the test.
struct Target(Child);

impl Target {
    fn start(program: &str, args: &[&str]) -> Self {
        let child = Command::new("sh")
            .args(["-c", "umask 022; exec \"$0\" \"$@\"", program])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}"));
        let target = Self(child);
        // Past execve: until then it has our own maps.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !target.proc("wchan").contains("nanosleep") && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        target
    }

    fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.0.id())).unwrap_or_default()
    }

    /// What must be the same before and after.
    fn state(&self) -> (String, Vec<String>) {
        let wanted =
            ["TracerPid", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd", "Threads", "Seccomp", "Umask"];
        let status = self.proc("status");
        let lines = status.lines().filter(|l| wanted.iter().any(|w| l.starts_with(w))).map(str::to_owned);
        let fds = fs::read_dir(format!("/proc/{}/fd", self.0.id())).into_iter().flatten().flatten();
        let mut fds: Vec<_> = fds.map(|fd| fd.file_name().to_string_lossy().into_owned()).collect();
        fds.sort();
        let children = self.proc(&format!("task/{}/children", self.0.id()));
        (self.proc("maps"), lines.chain(fds).chain([children]).collect())
    }

    /// Waits until the state is `before` again: a killed tracer's tracee needs a moment to go home.
    fn settles(&self, before: &(String, Vec<String>)) -> bool {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.state() != *before {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn finished_borrow_leaves_no_trace() {
    let target = Target::start("sleep", &["1000"]);
    let before = target.state();
    let status =
        Command::new(hammer()).args([&target.0.id().to_string(), "20"]).status().expect("hammer starts");
    assert!(status.success(), "hammer: {status}");
    assert_eq!(target.state(), before);
}

#[test]
fn killed_tracer_leaves_no_trace() {
    let mut target = Target::start("sleep", &["1000"]);
    let before = target.state();
    let pid = target.0.id().to_string();
    for round in 0_u64..200 {
        let mut tracer = Command::new(hammer()).args([&pid, "1000000"]).spawn().expect("hammer starts");
        // Instants spread over start-up and many borrowings, without a random number generator.
        thread::sleep(Duration::from_micros(1500 + round * 7919 % 12_000));
        tracer.kill().expect("hammer can be killed");
        tracer.wait().expect("hammer can be waited for");
        assert!(target.settles(&before), "round {round}: before {before:#?} after {:#?}", target.state());
        assert!(
            target.0.try_wait().expect("target can be waited for").is_none(),
            "round {round}: target died"
        );
    }
}

#[test]
fn stopped_task_stays_stopped() {
    let target = Target::start("sleep", &["1000"]);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(target.0.id()).expect("pids fit"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("target can be stopped");
    let status =
        Command::new(hammer()).args([&target.0.id().to_string(), "5"]).status().expect("hammer starts");
    assert!(status.success(), "hammer: {status}");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !target.proc("status").contains("T (stopped)") {
        assert!(Instant::now() < deadline, "it runs: {}", target.proc("status"));
        thread::sleep(Duration::from_millis(1));
    }
}
