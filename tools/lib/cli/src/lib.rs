//! What every tool's command line shares: exit codes, errors, messages, progress.
//!
//! A tool's `main` is one call of [`main`]; its library has `Args` (a clap parser), `command()` and
//! `run(args, input, output)`. `run` never exits and never prints an error: it returns it, and
//! [`finish`] prints the whole chain once, in four parts (what was done, to what, which call with
//! which errno, and on a line of its own what the user can do).
//!
//! stdout carries the product and nothing else; everything here goes to stderr. Writing to stderr
//! never fails a tool: a closed stderr is not worth a checkpoint.

pub mod stats;

use std::{
    fmt,
    fs::File,
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    process::ExitCode,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use ckpt_sys::{Refused, SysError};
use clap::{ArgAction, CommandFactory, Parser};
use indicatif::{HumanBytes, ProgressBar, ProgressState, ProgressStyle};
use nix::errno::Errno;
pub use stats::StatsOption;

/// Exit status, the same table for every tool and every man page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Done = 0,
    /// Failed. A target runs on unharmed; nothing was written or restored.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Refused: a resource that can't be checkpointed or restored, or a privilege that is missing.
    Refused = 3,
    /// The stream or image is incomplete or corrupt.
    Corrupt = 4,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// A length of time as options take it: a number, which may have a fraction, and `ms`, `s`, `m` or `h`;
/// seconds without a unit.
///
/// # Errors
/// What was expected.
pub fn duration(text: &str) -> Result<Duration, String> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => f64::NAN,
    };
    let seconds: Option<f64> = number.parse().ok().map(|n: f64| n * scale);
    let duration = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    duration.ok_or_else(|| "expected a length of time, as in 500ms, 10s or 2m".to_owned())
}

/// A command line that parsed but makes no sense. Exit status 2.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The status that an error ends a tool with: the first cause in its chain that has one of its own.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> Status {
    for cause in error.chain() {
        if cause.is::<UsageError>() {
            return Status::Usage;
        }
        if cause.is::<Refused>() {
            return Status::Refused;
        }
        if let Some(error) = cause.downcast_ref::<ckpt_proto::stream::StreamError>() {
            use ckpt_proto::stream::StreamError;
            return match error {
                StreamError::Io { .. } => Status::Failed,
                _ => Status::Corrupt,
            };
        }
        if let Some(error) = cause.downcast_ref::<ckpt_proto::file::FileError>() {
            use ckpt_proto::file::FileError;
            return match error {
                FileError::Io { .. } => Status::Failed,
                _ => Status::Corrupt,
            };
        }
        if let Some(error) = cause.downcast_ref::<ckpt_images::ImageError>() {
            return if error.is_corruption() { Status::Corrupt } else { Status::Failed };
        }
    }
    Status::Failed
}

/// The error as [`finish`] prints it: the chain joined by colons, then an indented line of advice.
#[must_use]
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = one_line(error);
    let advice = error.chain().find_map(|c| c.downcast_ref::<Refused>().and_then(|r| r.advice.as_deref()));
    let general = || what_may_help(error);
    for line in advice.map(str::to_owned).or_else(general).unwrap_or_default().lines() {
        text.push_str(ADVICE);
        text.push_str(&printable(line));
    }
    text
}

/// What a line of advice begins with.
const ADVICE: &str = "\n  ";

/// Text that may quote names of files and processes, with their control characters escaped: none can end a line or
/// command a terminal.
fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut all, c| {
        if c.is_control() {
            all.extend(c.escape_default())
        } else {
            all.push(c)
        }
        all
    })
}

/// The same for a message that may hold a described error, with its advice.
fn printable_lines(text: &str) -> String {
    text.split(ADVICE).map(printable).collect::<Vec<_>>().join(ADVICE)
}

/// Advice for what the kernel denies anywhere, and where nobody knows better.
fn what_may_help(error: &anyhow::Error) -> Option<String> {
    use ckpt_sys::capability::{self, number as cap};
    let unknown = |e: &&SysError| matches!(e.errno, Errno::ENOSYS | Errno::ENOTTY);
    if let Some(error) = error.chain().filter_map(|c| c.downcast_ref::<SysError>()).find(unknown) {
        let call = error.call;
        return Some(format!(
            "this kernel has no {call}, or a filter denies it; ckpt-check says what is missing"
        ));
    }
    let errno = error.chain().find_map(errno_of)?;
    // What files need, and what /proc/PID needs; and all else that some checkpoints need (ckpt-check).
    let caps: &[u32] = match errno {
        Errno::EMFILE => return Some("raise the limit on open files: ulimit -n".to_owned()),
        Errno::EACCES => &[cap::DAC_OVERRIDE, cap::SYS_PTRACE],
        _ => &[cap::CHECKPOINT_RESTORE, cap::SYS_PTRACE, cap::SYS_ADMIN, cap::NET_ADMIN],
    };
    capability::lack(errno, caps)
        .map(|names| format!("what may help and is missing: {names}; see ckpt-check"))
}

fn errno_of(cause: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let io = || cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).map(Errno::from_raw);
    cause.downcast_ref::<Errno>().copied().or_else(io)
}

/// The chain of causes on one line. What a cause repeats of the one above it is said once.
fn one_line(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        // What clap says has lines of its own.
        let part = if cause.is::<UsageError>() { cause.to_string() } else { printable(&cause.to_string()) };
        match parts.last() {
            // Some errors show their cause in their own text.
            Some(last) if last.ends_with(&part) => continue,
            // "pid 7 (a)", then "pid 7 (a) fd 3: ...".
            Some(last) if part.starts_with(last.as_str()) => drop(parts.pop()),
            _ => {}
        }
        parts.push(part);
    }
    parts.join(": ")
}

/// The error for those behind and before in the pipeline, on one line: what `tool` met, or, if the
/// stage before had given up already, what that one said.
#[must_use]
pub fn reason(tool: &str, error: &anyhow::Error) -> String {
    use ckpt_proto::stream::StreamError;
    let aborted = error.chain().find_map(|cause| match cause.downcast_ref::<StreamError>() {
        Some(StreamError::Aborted { reason }) => Some(reason.clone()),
        _ => None,
    });
    aborted.unwrap_or_else(|| format!("{tool}: {}", one_line(error)))
}

static TOOL: OnceLock<String> = OnceLock::new();
static VERBOSITY: AtomicU8 = AtomicU8::new(0);

fn tool() -> &'static str {
    TOOL.get().map_or("ckpt", String::as_str)
}

fn say(message: fmt::Arguments<'_>) {
    // One write, so that lines of the stages of a pipeline do not mix.
    let line = format!("{}: {message}\n", tool());
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Prints the error, if any, and gives the exit status.
pub fn finish(tool: &str, result: anyhow::Result<()>) -> ExitCode {
    finish_with(tool, result.map(|()| Status::Done.into()))
}

/// Like [`finish`] for a tool with exit statuses of its own.
pub fn finish_with(tool: &str, result: anyhow::Result<ExitCode>) -> ExitCode {
    let _ = TOOL.set(tool.to_owned());
    match result {
        Ok(code) => code,
        Err(error) => {
            say(format_args!("{}", describe(&error)));
            code_of(&error).into()
        }
    }
}

/// How often `-v` was given.
pub fn verbosity() -> u8 {
    VERBOSITY.load(Ordering::Relaxed)
}

/// Sets what [`verbosity`] returns.
pub fn set_verbosity(level: u8) {
    VERBOSITY.store(level, Ordering::Relaxed);
}

/// Prints a message to stderr if `-v` was given at least `$level` times.
#[macro_export]
macro_rules! note {
    ($level:expr, $($message:tt)*) => {
        if $crate::verbosity() >= $level {
            $crate::note_line(::std::format_args!($($message)*));
        }
    };
}

/// What [`note!`] calls.
#[doc(hidden)]
pub fn note_line(message: fmt::Arguments<'_>) {
    say(format_args!("{}", printable_lines(&message.to_string())));
}

/// Prints a warning to stderr, whatever the verbosity.
pub fn warn(message: &str) {
    say(format_args!("warning: {}", printable_lines(message)));
}

/// Options that every tool has; flatten it into the tool's `Args`. [`main`] acts on it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Common {
    /// Say what is being done; twice for details
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// A command whose `--help` says all there is in the form of `-h`: a line for each option, no blank lines between.
fn on_one_screen(command: clap::Command) -> clap::Command {
    let about = command.get_long_about().or(command.get_about()).cloned().unwrap_or_default();
    command.about(about).long_about(None::<&'static str>)
}

/// Parses the command line, runs the tool and turns its result into the exit status.
pub fn main<A: Parser>(tool: &'static str, run: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    main_with(tool, |args: A| run(args).map(|()| Status::Done.into()))
}

/// Like [`main`] for a tool with exit statuses of its own.
pub fn main_with<A: Parser>(tool: &'static str, run: impl FnOnce(A) -> anyhow::Result<ExitCode>) -> ExitCode {
    let _ = TOOL.set(tool.to_owned());
    ckpt_sys::limits::prepare();
    let parsed = on_one_screen(<A as CommandFactory>::command()).try_get_matches().and_then(|matches| {
        if let Ok(Some(&level)) = matches.try_get_one::<u8>("verbose") {
            set_verbosity(level);
        }
        A::from_arg_matches(&matches)
    });
    match parsed {
        Ok(args) => finish_with(tool, run(args)),
        Err(error) => {
            let _ = error.print();
            if error.use_stderr() { Status::Usage.into() } else { Status::Done.into() }
        }
    }
}

/// A process id as the value of an option.
///
/// # Errors
/// It is none.
pub fn positive_pid(text: &str) -> Result<ckpt_sys::Pid, String> {
    text.parse()
        .ok()
        .filter(|pid: &ckpt_sys::Pid| pid.0 > 0)
        .ok_or_else(|| "expected a process id".to_owned())
}

/// Standard input as a descriptor of our own, unbuffered.
///
/// # Errors
/// It is closed.
pub fn stdin() -> anyhow::Result<File> {
    use anyhow::Context;
    io::stdin().as_fd().try_clone_to_owned().map(File::from).context("standard input")
}

/// Standard output as a descriptor of our own, unbuffered.
///
/// # Errors
/// It is closed.
pub fn stdout() -> anyhow::Result<File> {
    use anyhow::Context;
    anyhow::ensure!(
        !ckpt_sys::limits::stdout_was_closed(),
        "standard output is closed: what is to be written there would be lost (> /dev/null, if it is not needed)"
    );
    io::stdout().as_fd().try_clone_to_owned().map(File::from).context("standard output")
}

/// What stands for standard output where nothing is to be written to it.
///
/// # Errors
/// There is no /dev/null.
pub fn no_output() -> anyhow::Result<File> {
    use anyhow::Context;
    File::options().write(true).open("/dev/null").context("/dev/null")
}

/// Standard output as a descriptor of our own and the only one: standard output itself is
/// /dev/null from here on, so that the reader sees the end as soon as the file is dropped.
///
/// # Errors
/// It is closed, or there is no /dev/null.
pub fn take_stdout() -> anyhow::Result<File> {
    use anyhow::Context;
    let own = stdout()?;
    let null = no_output()?;
    nix::unistd::dup2_stdout(&null).context("standard output: dup2")?;
    Ok(own)
}

/// Refuses to read a stream from, or write one to, a terminal.
///
/// # Errors
/// [`UsageError`] saying so.
pub fn not_a_terminal(file: &File, what: &str) -> Result<(), UsageError> {
    if file.is_terminal() {
        return Err(UsageError(format!(
            "{what} is a terminal; a checkpoint stream goes through a pipe or file"
        )));
    }
    Ok(())
}

/// Whether the error's cause is that nobody reads our output any more.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
            || cause.downcast_ref::<nix::errno::Errno>() == Some(&nix::errno::Errno::EPIPE)
    })
}

/// Runs `f` when the process is told to end (SIGINT, SIGTERM, SIGHUP), and then ends it by that very
/// signal, so that the shell sees what happened. To be called before other threads are made: the
/// signals are blocked from here on and one thread waits for them. What was ignored (`nohup`) stays so.
///
/// # Errors
/// No thread can be made.
pub fn on_termination(f: impl FnOnce() + Send + 'static) -> io::Result<()> {
    use nix::sys::signal::{SigSet, Signal, raise};
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Ok(signal) = set.wait() {
            f();
            let _ = set.thread_unblock();
            let _ = raise(signal);
        }
    })?;
    Ok(())
}

/// Whether the `--external` of a whole pipeline names a socket: those are ckpt-sk's, everything else is ckpt-scan's.
#[must_use]
pub fn is_socket(resource: &std::ffi::OsStr) -> bool {
    let bytes = resource.as_encoded_bytes();
    let prefixes = [&b"unix["[..], b"socket:[", b"path=", b"peer-pid="];
    bytes == b"all"
        || bytes.first().is_some_and(u8::is_ascii_digit)
        || prefixes.iter().any(|prefix| bytes.starts_with(prefix))
}

/// A progress bar on stderr: only on a terminal, and only for work that takes more than a second.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: Option<u64>,
    done: u64,
    start: Instant,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    const PATIENCE: Duration = Duration::from_secs(1);

    /// Progress of moving `total` bytes, if that is known.
    #[must_use]
    pub fn new(what: &'static str, total: Option<u64>) -> Self {
        let terminal = io::stderr().is_terminal();
        Self { what, total, done: 0, start: Instant::now(), terminal, bar: None }
    }

    /// `bytes` more are done.
    pub fn inc(&mut self, bytes: u64) {
        self.done += bytes;
        if !self.terminal || self.start.elapsed() < Self::PATIENCE {
            return;
        }
        let (total, what) = (self.total, self.what);
        let bar = self.bar.get_or_insert_with(|| {
            let template = match total {
                Some(_) => "{msg} {bar:30} {bytes}/{total_bytes} {rate}",
                None => "{msg} {bytes} {rate}",
            };
            let start = self.start;
            let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
            if let Ok(style) = ProgressStyle::with_template(template) {
                // The bar's own rate takes what was done before it appeared for the work of an instant.
                let rate = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                    let _ = write!(out, "{}/s", HumanBytes(per_second(state.pos(), start.elapsed())));
                };
                bar.set_style(style.with_key("rate", rate));
            }
            bar.with_message(what)
        });
        bar.set_position(self.done);
    }

    /// All is done: clears the line.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1000 / time.as_millis().max(1)).unwrap_or(u64::MAX)
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use ckpt_proto::stream::StreamError;

    use super::*;

    #[test]
    fn rates_are_of_the_whole_time() {
        assert_eq!(per_second(3 << 30, Duration::from_millis(1500)), 2 << 30);
        assert_eq!(per_second(5, Duration::ZERO), 5000);
        assert_eq!(per_second(u64::MAX, Duration::from_millis(1)), u64::MAX);
    }

    #[test]
    fn sockets_are_told_from_other_resources() {
        for name in ["48213", "48213:/run/b", "unix[5]", "socket:[5]", "path=/run/a", "peer-pid=4711", "all"]
        {
            assert!(is_socket(name.as_ref()), "{name}");
        }
        for name in ["pipe:[5]", "shm:[5]", "pidfd:[5]", "allx", ""] {
            assert!(!is_socket(name.as_ref()), "{name}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in
            [("10", 10_000), ("1.5s", 1500), ("500ms", 500), ("2m", 120_000), ("0", 0), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "5 s", "5d", "1e400", "nan", "inf"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn code_is_found_anywhere_in_the_chain() {
        let refused: anyhow::Result<()> = Err(Refused::new("pid 1", "no").into());
        assert_eq!(code_of(&refused.context("a").context("b").unwrap_err()), Status::Refused);
        let stream: anyhow::Result<()> = Err(StreamError::Incomplete { offset: 1, at: "x" }.into());
        assert_eq!(code_of(&stream.context("read").unwrap_err()), Status::Corrupt);
        assert_eq!(code_of(&anyhow::anyhow!("other")), Status::Failed);
        assert_eq!(code_of(&UsageError("x".into()).into()), Status::Usage);
    }

    #[test]
    fn names_neither_end_lines_nor_command_terminals() {
        let error = anyhow::Error::from(Refused::new("/tmp/a\n\u{1b}[2Jb", "no").advise("mv 'a\tb'"));
        assert_eq!(describe(&error), "/tmp/a\\n\\u{1b}[2Jb: no\n  mv 'a\\tb'");
        assert_eq!(printable_lines(&describe(&error)), describe(&error));
        assert_eq!(reason("x", &error), "x: /tmp/a\\n\\u{1b}[2Jb: no");
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let error = anyhow::Error::from(SysError::new("ioctl(X)", "pid 1", Errno::ENOTTY)).context("dump");
        let text = describe(&error);
        assert!(text.contains("\n  this kernel has no ioctl(X)") && text.contains("ckpt-check"), "{text}");
    }

    #[test]
    fn advice_is_on_its_own_line() {
        let error =
            anyhow::Error::from(Refused::new("pid 1", "half a connection").advise("pass --external 5"));
        assert_eq!(describe(&error.context("dump")), "dump: pid 1: half a connection\n  pass --external 5");
    }

    #[test]
    fn a_cause_that_was_printed_is_not_printed_again() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {source}")]
        struct Outer {
            source: io::Error,
        }
        let error = anyhow::Error::from(Outer { source: io::Error::other("inner") });
        assert_eq!(describe(&error), "outer: inner");
    }
}
