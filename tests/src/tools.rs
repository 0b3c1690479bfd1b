//! Pipelines of the built tools.
//!
//! Stages are started as a shell would, joined by pipes; each one's stderr goes to a file in the test's directory
//! (`0-ckpt-scan.err`), so that no stage can block on it and a failed test keeps it.

use std::{
    ffi::OsString,
    fs::File,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::{bin_dir, installed};

/// The path of a tool.
///
/// # Panics
/// It has not been built.
#[must_use]
pub fn tool(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace` first", path.display());
    path
}

/// A stage: our tool if the name begins with `ckpt` or `sk-`, else a program of the system.
fn command(name: &str) -> Command {
    if name.starts_with("ckpt") || name.starts_with("sk-") {
        Command::new(tool(name))
    } else {
        assert!(installed(name), "{name} is not installed");
        Command::new(name)
    }
}

/// Stages to be joined by pipes.
#[derive(Debug)]
pub struct Pipeline {
    stages: Vec<(String, Command)>,
    dir: PathBuf,
    input: Option<File>,
    output: Option<File>,
}

impl Pipeline {
    /// An empty pipeline whose stages write their messages below `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { stages: Vec::new(), dir: dir.to_owned(), input: None, output: None }
    }

    /// Adds a stage from words, as in `["ckpt-scan", "-t", "12"]`.
    ///
    /// # Panics
    /// There are no words.
    #[must_use]
    pub fn stage<S: Into<OsString>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        let mut words = words.into_iter().map(Into::into);
        let name = words.next().expect("a stage has a name").into_string().expect("a readable name");
        let mut command = command(&name);
        command.args(words);
        self.stages.push((name, command));
        self
    }

    /// Adds a stage called `name` that runs `words` as they are.
    ///
    /// # Panics
    /// There are no words.
    #[must_use]
    pub fn program<S: Into<OsString>>(mut self, name: &str, words: impl IntoIterator<Item = S>) -> Self {
        let mut words = words.into_iter().map(Into::into);
        let mut command = Command::new(words.next().expect("a stage has a program"));
        command.args(words);
        self.stages.push((name.to_owned(), command));
        self
    }

    /// Adds stages from a line split at spaces and `|`.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        for stage in line.split('|') {
            self = self.stage(stage.split_whitespace());
        }
        self
    }

    /// Standard input of the first stage; /dev/null otherwise.
    #[must_use]
    pub fn input(mut self, file: File) -> Self {
        self.input = Some(file);
        self
    }

    /// Standard output of the last stage; a file `stdout` in the directory otherwise.
    #[must_use]
    pub fn output(mut self, file: File) -> Self {
        self.output = Some(file);
        self
    }

    /// Starts all stages.
    ///
    /// # Panics
    /// A stage can't be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let mut children: Vec<(String, Child)> = Vec::new();
        let count = self.stages.len();
        let mut previous = self.input.take().map_or_else(Stdio::null, Stdio::from);
        for (index, (name, mut command)) in self.stages.into_iter().enumerate() {
            let errors =
                File::create(self.dir.join(format!("{index}-{name}.err"))).expect("make a stage's .err file");
            command.stdin(previous).stderr(errors);
            previous = Stdio::null();
            if index + 1 < count {
                command.stdout(Stdio::piped());
            } else {
                let output = self
                    .output
                    .take()
                    .unwrap_or_else(|| File::create(self.dir.join("stdout")).expect("make stdout"));
                command.stdout(output);
            }
            let mut child = command.spawn().unwrap_or_else(|e| panic!("start {name}: {e}"));
            if let Some(output) = child.stdout.take() {
                previous = output.into();
            }
            children.push((name, child));
        }
        Running { children, dir: self.dir }
    }

    /// Runs to the end.
    #[must_use]
    pub fn run(self) -> Outcome {
        self.start().wait()
    }
}

/// A pipeline at work.
#[derive(Debug)]
pub struct Running {
    children: Vec<(String, Child)>,
    dir: PathBuf,
}

impl Running {
    /// Kills the stage with SIGKILL.
    ///
    /// # Panics
    /// There is no such stage.
    pub fn kill(&mut self, stage: &str) {
        let (_, child) = self
            .children
            .iter_mut()
            .find(|(name, _)| name == stage)
            .expect("the stage is part of the pipeline");
        let _ = child.kill();
    }

    /// The pid of a stage.
    ///
    /// # Panics
    /// There is no such stage.
    #[must_use]
    pub fn pid(&self, stage: &str) -> u32 {
        self.children
            .iter()
            .find(|(name, _)| name == stage)
            .expect("the stage is part of the pipeline")
            .1
            .id()
    }

    /// Waits for all stages.
    ///
    /// # Panics
    /// They don't end; those that are left are killed.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        let end = Instant::now() + 4 * crate::PATIENCE;
        let mut stages = Vec::new();
        let names: Vec<String> = self.children.iter().map(|(name, _)| name.clone()).collect();
        for (index, name) in names.iter().enumerate() {
            let status = loop {
                if let Some(status) = self.children[index].1.try_wait().expect("wait for a stage") {
                    break status;
                }
                if Instant::now() > end {
                    let said = self.said();
                    for (_, child) in &mut self.children {
                        let _ = child.kill();
                        let _ = child.wait();
                    }
                    panic!("{name} of {names:?} does not end; so far:\n{said}");
                }
                std::thread::sleep(Duration::from_micros(300));
            };
            stages.push((name.clone(), status));
        }
        Outcome { said: self.said(), stages }
    }

    fn said(&self) -> String {
        let mut all = String::new();
        for (index, (name, _)) in self.children.iter().enumerate() {
            let bytes = std::fs::read(self.dir.join(format!("{index}-{name}.err"))).unwrap_or_default();
            all.push_str(&String::from_utf8_lossy(&bytes));
        }
        all
    }
}

/// How a pipeline ended.
#[derive(Debug)]
pub struct Outcome {
    /// Name and status of each stage.
    pub stages: Vec<(String, ExitStatus)>,
    /// Everything that the stages wrote to stderr.
    pub said: String,
}

impl Outcome {
    /// Asserts that all stages ended with status 0.
    ///
    /// # Panics
    /// One did not.
    #[must_use]
    pub fn ok(self, doing: &str) -> Self {
        assert!(self.stages.iter().all(|(_, s)| s.success()), "{doing} failed: {self}");
        self.sane()
    }

    /// Asserts that no stage panicked or died of a signal that nobody sent.
    ///
    /// # Panics
    /// One did.
    #[must_use]
    pub fn sane(self) -> Self {
        assert!(!self.said.contains("panicked"), "a stage panicked: {self}");
        for (name, status) in &self.stages {
            let signal = status.signal();
            assert!(
                matches!(signal, None | Some(nix::libc::SIGKILL | nix::libc::SIGPIPE)),
                "{name} died of signal {signal:?}: {self}"
            );
        }
        self
    }

    /// Exit code of the last stage with this name; -1 if a signal ended it.
    ///
    /// # Panics
    /// There is no such stage.
    #[must_use]
    pub fn code(&self, stage: &str) -> i32 {
        let (_, status) =
            self.stages.iter().rfind(|(name, _)| name == stage).expect("the stage is part of the pipeline");
        status.code().unwrap_or(-1)
    }

    /// Asserts that `stage` ended with `code` and that the messages contain all of `words`.
    ///
    /// # Panics
    /// Not so.
    #[must_use]
    pub fn fails(self, stage: &str, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code(stage), code, "exit status of {stage}: {self}");
        for word in words {
            assert!(self.said.contains(word), "no {word:?} in the messages: {self}");
        }
        self.sane()
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, status) in &self.stages {
            write!(f, "[{name}: {status}] ")?;
        }
        write!(f, "\n{}", self.said)
    }
}
