//! Runs pipelines of tools as a shell would.
//!
//! The stages are in the driver's own process group, so Ctrl-C reaches them all; a signal that is sent
//! to the driver alone is passed on to them. A driver that is killed takes its stages with it
//! (PR_SET_PDEATHSIG): the writer then removes what it has begun, the tracer's end frees the tree.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use anyhow::Context;
use ckpt_sys::SysError;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

/// One program of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its name.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// Programs, the output of each being the input of the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// In order.
    pub stages: Vec<Stage>,
}

fn quoted(word: &OsStr) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(b);
    let bytes = word.as_encoded_bytes();
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return word.to_string_lossy().into_owned();
    }
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, stage) in self.stages.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { " | " })?;
            f.write_str(&quoted(&stage.program))?;
            for arg in &stage.args {
                write!(f, " {}", quoted(arg))?;
            }
        }
        Ok(())
    }
}

fn beside_us(program: &OsStr) -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.parent()?.join(program);
    path.is_file().then_some(path)
}

/// Where `program` is: beside our own binary, else wherever PATH leads.
#[must_use]
pub fn find(program: &OsStr) -> PathBuf {
    beside_us(program).unwrap_or_else(|| PathBuf::from(program))
}

/// Whether there is such a program.
#[must_use]
pub fn exists(program: &OsStr) -> bool {
    beside_us(program).is_some()
        || std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| is_program(&dir.join(program))))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// The status of a pipeline: that of the stage whose failure was the cause of the others'.
///
/// A failing stage makes its neighbours fail too: those behind it miss the end record (4), those before
/// it find nobody reading (1). So the cause is, in this order: death by a signal (128 + N), a usage
/// error (2), a refusal (3), a failure (1), anything else (the first stage's). All zero but the last:
/// the last one's own status, such as that of a restored program.
#[must_use]
pub fn blame(codes: &[u8]) -> u8 {
    let first = |wanted: &dyn Fn(u8) -> bool| codes.iter().copied().find(|&code| wanted(code));
    first(&|code| code > 128)
        .or_else(|| first(&|code| code == 2))
        .or_else(|| first(&|code| code == 3))
        .or_else(|| first(&|code| code == 1))
        .or_else(|| first(&|code| code != 0))
        .unwrap_or(0)
}

/// A stage's exit status, 128 and its number for a signal.
pub(crate) fn code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

impl Pipeline {
    /// Runs all stages and waits for all of them; the status by [`blame`].
    ///
    /// # Errors
    /// A stage can't be started; then those before it are ended.
    pub fn run(&self) -> anyhow::Result<u8> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
            signals.add(signal);
        }
        // The stages start with nothing blocked: std::process sees to it.
        signals.thread_block().context("block signals")?;
        let events = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("signalfd")?;
        let mut running = Running::default();
        let mut input = None;
        for (index, stage) in self.stages.iter().enumerate() {
            let mut command = Command::new(find(&stage.program));
            command.args(&stage.args);
            if let Some(input) = input.take() {
                command.stdin(Stdio::from(input));
            }
            if index + 1 < self.stages.len() {
                command.stdout(Stdio::piped());
            }
            let mut child = ckpt_sys::spawn::end_with_us(&mut command)
                .spawn()
                .with_context(|| format!("run {}", stage.program.display()))?;
            input = child.stdout.take();
            running.add(child)?;
        }
        while running.reap()? {
            let mut fds = vec![PollFd::new(events.as_fd(), PollFlags::POLLIN)];
            fds.extend(running.pidfds().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("poll"),
            }
            while let Ok(Some(event)) = events.read_signal() {
                let signal = i32::try_from(event.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok());
                // From the terminal it has come to the whole process group already.
                let from_kernel = event.ssi_code == nix::libc::SI_KERNEL;
                if let Some(signal) = signal.filter(|_| !from_kernel) {
                    running.signal(signal);
                }
            }
        }
        Ok(blame(&running.stages.iter().map(|stage| stage.code.unwrap_or(1)).collect::<Vec<_>>()))
    }
}

struct RunningStage {
    child: Child,
    /// Readable once it has ended.
    pidfd: OwnedFd,
    code: Option<u8>,
}

/// The stages that have been started. Dropped early, it ends them.
#[derive(Default)]
struct Running {
    stages: Vec<RunningStage>,
}

impl Running {
    fn add(&mut self, mut child: Child) -> anyhow::Result<()> {
        let pid = i32::try_from(child.id()).map_err(|_| SysError::new("fork", "a stage", Errno::ERANGE));
        match pid.and_then(|pid| ckpt_sys::pidfd::open(ckpt_sys::Pid(pid))) {
            Ok(pidfd) => {
                self.stages.push(RunningStage { child, pidfd, code: None });
                Ok(())
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// Collects those that have ended; whether any still runs.
    fn reap(&mut self) -> anyhow::Result<bool> {
        for stage in self.stages.iter_mut().filter(|stage| stage.code.is_none()) {
            stage.code = stage.child.try_wait().context("wait for a stage")?.map(code);
        }
        Ok(self.stages.iter().any(|stage| stage.code.is_none()))
    }

    fn pidfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.stages.iter().filter(|stage| stage.code.is_none()).map(|stage| stage.pidfd.as_fd())
    }

    fn signal(&self, signal: Signal) {
        for pidfd in self.pidfds() {
            let _ = ckpt_sys::pidfd::send_signal(pidfd, signal as i32);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::SIGTERM);
        for stage in self.stages.iter_mut().filter(|stage| stage.code.is_none()) {
            let _ = stage.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_told_from_its_consequences() {
        assert_eq!(blame(&[0, 0, 0]), 0);
        // ckpt-sk refuses; the others miss their neighbour.
        assert_eq!(blame(&[1, 3, 4]), 3);
        // ckpt-write finds the disk full.
        assert_eq!(blame(&[1, 1, 1]), 1);
        // ckpt-scan is killed.
        assert_eq!(blame(&[137, 4, 4]), 137);
        // A damaged stream.
        assert_eq!(blame(&[0, 4, 4]), 4);
        // What ckpt-restore's program said.
        assert_eq!(blame(&[0, 0, 42]), 42);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted(OsStr::new("a b")), "'a b'");
        assert_eq!(quoted(OsStr::new("it's")), r"'it'\''s'");
        assert_eq!(quoted(OsStr::new("")), "''");
        assert_eq!(quoted(OsStr::new("--connect=1=@x")), "--connect=1=@x");
    }

    #[test]
    fn programs_are_run_and_signals_passed_on() {
        let sh = |script: &str| Stage { program: "sh".into(), args: vec!["-c".into(), script.into()] };
        let run =
            |scripts: &[&str]| Pipeline { stages: scripts.iter().map(|s| sh(s)).collect() }.run().unwrap();
        assert_eq!(run(&["echo x", "cat", "grep -q x"]), 0);
        assert_eq!(run(&["exit 1", "exit 3", "exit 4"]), 3);
        assert_eq!(run(&["kill -9 $$", "cat; exit 4"]), 137);
        // Nobody but the stages holds the pipes.
        assert_eq!(run(&["yes", "exit 0"]), 128 + 13);
    }
}
