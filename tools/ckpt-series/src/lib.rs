//! `ckpt-series`: a series of checkpoints of a process tree, each an increment of the one before.
//!
//! Every checkpoint is the usual pipeline, `ckpt-scan | ckpt-sk | ckpt-write`, with its stages as
//! threads of this process, joined by pipes: nothing has to be started while the tree is frozen, and the
//! tree runs on when ckpt-scan and ckpt-sk are done with it, not when the disk is. The tracker
//! (`ckpt-tracking`) is one more thread.
//!
//! A full checkpoint stores everything, and the tree is not to stand still for that: its memory is forked
//! (`--snapshot` of ckpt-scan), or for `--pre-dump` copied before the freeze into a directory of its own, on which the
//! checkpoint is an increment.
//!
//! Directories are numbered from 1, or from behind what is there. A number is printed when its directory is
//! durable, and not before. Nothing that was printed depends on what comes later: a directory needs only
//! earlier ones, and each is whole or absent. So killing this process, or the machine, costs the checkpoint
//! under way and no other; the next series begins with a full one.

mod keep;

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ckpt_images::{Cleanup, recode::Codec};
use ckpt_sys::{Pid, pidfd};
use ckpt_tracking::{Server, TrackError, Tracker};
use clap::{CommandFactory, Parser};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};

pub use keep::Series;

/// Make a series of checkpoints, each an increment of the one before
///
/// One for each line on standard input, or by the clock; prints the number of each once
/// it is durable. `ckpt restore -D DIR/000137` works for any of them.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "ckpt-series",
    version,
    after_help = "\
Examples:
  ckpt series -t 4711 -D /var/ckpt --every 50ms --keep 1000
  while read -r n; do echo; done < answers | ckpt series -t 4711 -D /var/ckpt --external 48213
  ckpt restore -D /var/ckpt/000137 --connect 48213=/run/b.sock"
)]
pub struct Args {
    /// Root of the tree: this process and all its descendants
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = ckpt_cli::positive_pid)]
    pub tree: Pid,
    /// Directory for the numbered directories; made if it is not there
    #[arg(short = 'D', long, value_name = "DIR")]
    pub dir: PathBuf,
    /// A checkpoint every DURATION (50ms, 2s, 5m, 1h) instead of one for each line
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub every: Option<Duration>,
    /// End after N checkpoints
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Make every Nth checkpoint a full one
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub full_every: u64,
    /// Keep the last N checkpoints, and at most half as many more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub keep: Option<u64>,
    /// Read the pages of full checkpoints while the tree is frozen: no fork of its memory
    #[arg(long)]
    pub no_snapshot: bool,
    /// Copy the pages of full checkpoints while the tree runs, and those written meanwhile in the freeze
    #[arg(long, conflicts_with = "no_snapshot")]
    pub pre_dump: bool,
    /// Store pages that forked processes share once (not for CRIU)
    #[arg(long)]
    pub share: bool,
    /// The far end is outside the tree: a socket as for ckpt-sk (ID[:PATH], path=PATH, peer-pid=PID, all), pipe:[ID] or shm:[ID]
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<OsString>,
    /// What external connections have received but not read: drop or keep
    #[arg(long, value_name = "WHAT")]
    pub queued: Option<OsString>,
    /// Dump TCP connections whose other end is outside the tree
    #[arg(long)]
    pub tcp_established: bool,
    /// Dump all TCP connections as closed
    #[arg(long, conflicts_with = "tcp_established")]
    pub tcp_close: bool,
    /// Leave out connections that a listener of the tree has not accepted yet
    #[arg(long)]
    pub skip_in_flight: bool,
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Codec>,
    /// Largest deleted file that is stored in the images, bytes
    #[arg(long, value_name = "BYTES")]
    pub ghost_limit: Option<OsString>,
    /// How long to try to stop a tree that resists (vfork, uninterruptible I/O), seconds
    #[arg(long, value_name = "SECONDS")]
    pub freeze_timeout: Option<OsString>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    let duration = number.parse::<u64>().ok().and_then(|n| n.checked_mul(millis)).filter(|&n| n > 0);
    duration.map(Duration::from_millis).ok_or_else(|| "expected a duration: 50ms, 2s, 5m, 1h".to_owned())
}

/// The command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Makes checkpoints until `input` or the tree ends; numbers go to `output`.
///
/// # Errors
/// A checkpoint failed: the tree runs on, all that were printed are there.
pub fn run(args: &Args, input: File, mut output: File) -> anyhow::Result<()> {
    let root = pidfd::open(args.tree)?;
    let mut series = Series::open(&args.dir)?;
    let begun: Arc<Mutex<Option<Cleanup>>> = Arc::default();
    let at_end = Arc::clone(&begun);
    ckpt_cli::on_termination(move || {
        if let Some(cleanup) = at_end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            cleanup.remove();
        }
    })
    .context("start a thread")?;
    let tracking = Tracking::start(args.tree)?;
    let mut clock = Clock::new(args.every, input);
    let mut made = 0;
    let mut parent: Option<PathBuf> = None;
    while args.count.is_none_or(|count| made < count) && clock.next(root.as_fd())? {
        let due = made % args.full_every == 0;
        let dir = series.next();
        let from = parent.take().filter(|_| !due);
        let stage = |what: What<'_>, dir: &Path| {
            checkpoint(args, &tracking.address, what, dir, &begun).with_context(|| dir.display().to_string())
        };
        let result = if args.pre_dump && from.is_none() {
            let before = series.before();
            stage(What::Memory, &before)
                .and_then(|()| stage(What::Checkpoint { parent: Some(&before) }, &dir))
        } else {
            stage(What::Checkpoint { parent: from.as_deref() }, &dir)
        };
        // A task that is being killed fails calls with ESRCH a moment before its pidfd tells.
        if result.is_err() && ended(root.as_fd(), PollTimeout::from(1000_u16))? {
            break;
        }
        result?;
        let number = series.made()?;
        // In one call, so that a number is never cut short by our death.
        output.write_all(format!("{number:06}\n").as_bytes()).context("standard output")?;
        made += 1;
        parent = Some(dir);
        if let Some(keep) = args.keep {
            series.prune(keep, args.compress)?;
        }
    }
    Ok(())
}

/// Whether the process of a pidfd has ended.
fn ended(root: std::os::fd::BorrowedFd<'_>, wait: PollTimeout) -> anyhow::Result<bool> {
    let mut fds = [PollFd::new(root, PollFlags::POLLIN)];
    match poll(&mut fds, wait) {
        Ok(n) => Ok(n > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno).context("poll"),
    }
}

/// Tells when the next checkpoint is due.
enum Clock {
    Lines(BufReader<File>),
    Every { period: Duration, next: Instant },
}

impl Clock {
    fn new(every: Option<Duration>, input: File) -> Self {
        match every {
            Some(period) => Self::Every { period, next: Instant::now() },
            None => Self::Lines(BufReader::new(input)),
        }
    }

    /// Waits; false when there will be none, or the tree has ended.
    fn next(&mut self, root: std::os::fd::BorrowedFd<'_>) -> anyhow::Result<bool> {
        match self {
            Self::Lines(lines) => loop {
                if !lines.buffer().contains(&b'\n') {
                    let input = lines.get_ref().try_clone().context("standard input")?;
                    let mut fds =
                        [PollFd::new(root, PollFlags::POLLIN), PollFd::new(input.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Ok(_) => {}
                        Err(Errno::EINTR) => continue,
                        Err(errno) => return Err(errno).context("poll"),
                    }
                    if fds[0].any().unwrap_or(false) {
                        return Ok(false);
                    }
                }
                // A line counts when its end has come, or the input ends in it.
                let available = lines.fill_buf().context("standard input")?;
                let Some(end) = available.iter().position(|&b| b == b'\n') else {
                    let (all, over) = (available.len(), available.is_empty());
                    lines.consume(all);
                    if over {
                        return Ok(false);
                    }
                    continue;
                };
                lines.consume(end + 1);
                return Ok(true);
            },
            Self::Every { period, next } => loop {
                let now = Instant::now();
                if now >= *next {
                    // What was missed is not made up for.
                    *next = (*next + *period).max(now);
                    return Ok(!ended(root, PollTimeout::ZERO)?);
                }
                let left = PollTimeout::try_from(*next - now + Duration::from_micros(999));
                if ended(root, left.unwrap_or(PollTimeout::MAX))? {
                    return Ok(false);
                }
            },
        }
    }
}

/// The thread that keeps the tracking.
struct Tracking {
    address: String,
    /// Closing it ends the thread.
    _alive: OwnedFd,
}

impl Tracking {
    fn start(tree: Pid) -> anyhow::Result<Self> {
        let mut random = [0; 8];
        File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut random)).context("/dev/urandom")?;
        let address = format!("ckpt-series-{tree}-{:016x}", u64::from_ne_bytes(random));
        let mut server = Server::bind(&address)?;
        let (end, alive) = pipe2(OFlag::O_CLOEXEC).context("pipe2")?;
        thread::Builder::new()
            .name("tracker".to_owned())
            .spawn(move || {
                let served: Result<(), TrackError> = server.serve(&mut Tracker::default(), &[end.as_fd()]);
                if let Err(error) = served {
                    let error = ckpt_cli::describe(&error.into());
                    ckpt_cli::warn(&format!("tracking has ended, all checkpoints will be full: {error}"));
                }
            })
            .context("start a thread")?;
        Ok(Self { address, _alive: alive })
    }
}

/// What is made.
#[derive(Debug, Clone, Copy)]
enum What<'a> {
    /// A checkpoint; an increment if it has a parent.
    Checkpoint { parent: Option<&'a Path> },
    /// A pre-dump, of which a checkpoint is to be an increment.
    Memory,
}

/// One checkpoint: its stages, each in a thread, joined by pipes.
fn checkpoint(
    args: &Args,
    tracker: &str,
    what: What<'_>,
    dir: &Path,
    begun: &Mutex<Option<Cleanup>>,
) -> anyhow::Result<()> {
    let (scan, sk, write) = stages(args, tracker, what, dir)?;
    let pipe = || pipe2(OFlag::O_CLOEXEC).map(|(r, w)| (File::from(r), File::from(w))).context("pipe2");
    let (mut write_in, scan_out) = pipe()?;
    // There are no sockets in a pre-dump.
    let between = match what {
        What::Memory => None,
        What::Checkpoint { .. } => {
            let (last, sk_out) = pipe()?;
            Some((std::mem::replace(&mut write_in, last), sk_out))
        }
    };
    let (scanned, completed, written) = thread::scope(|scope| {
        let sk = between.map(|(input, output)| scope.spawn(move || ckpt_sk::run(&sk, input, output)));
        let write = scope.spawn(move || {
            ckpt_write::store(&write, write_in, |cleanup| {
                *begun.lock().unwrap_or_else(PoisonError::into_inner) = Some(cleanup);
                Ok(())
            })
        });
        // The tracer is this thread in every checkpoint.
        (ckpt_scan::run(&scan, scan_out), sk.map_or(Ok(Ok(())), |sk| sk.join()), write.join())
    });
    begun.lock().unwrap_or_else(PoisonError::into_inner).take();
    let flat = |joined: thread::Result<anyhow::Result<()>>| {
        joined.unwrap_or_else(|_| Err(anyhow::anyhow!("a stage has panicked")))
    };
    // The first stage to fail is the cause; those behind it only miss the end of the stream, and those before
    // it find nobody reading.
    let mut failures: Vec<anyhow::Error> =
        [scanned, flat(completed), flat(written)].into_iter().filter_map(Result::err).collect();
    let cause = failures.iter().position(|e| {
        let status = ckpt_cli::code_of(e);
        matches!(status, ckpt_cli::Status::Refused | ckpt_cli::Status::Usage)
    });
    match (cause, failures.is_empty()) {
        (_, true) => Ok(()),
        (cause, false) => Err(failures.swap_remove(cause.unwrap_or(0))),
    }
}

/// The command lines of the stages.
fn stages(
    args: &Args,
    tracker: &str,
    what: What<'_>,
    dir: &Path,
) -> anyhow::Result<(ckpt_scan::Args, ckpt_sk::Args, ckpt_write::Args)> {
    let mut scan: Vec<OsString> = vec!["ckpt-scan".into(), "-t".into(), args.tree.to_string().into()];
    scan.extend(["--track".into(), tracker.into()]);
    let mut sk: Vec<OsString> = vec!["ckpt-sk".into()];
    let mut write: Vec<OsString> = vec!["ckpt-write".into()];
    let is_checkpoint = matches!(what, What::Checkpoint { .. });
    for resource in args.external.iter().filter(|_| is_checkpoint) {
        let words = if ckpt_cli::is_socket(resource) { &mut sk } else { &mut scan };
        words.extend(["--external".into(), resource.clone()]);
    }
    match what {
        What::Memory => scan.push("--pre-dump".into()),
        // Of an increment too, which is full if the tracking is lost, and may be large.
        What::Checkpoint { .. } if !args.no_snapshot && !args.pre_dump => scan.push("--snapshot".into()),
        What::Checkpoint { .. } => {}
    }
    if let What::Checkpoint { parent: Some(parent) } = what {
        for words in [&mut scan, &mut write] {
            words.extend(["--parent".into(), parent.into()]);
        }
    }
    let option = |words: &mut Vec<OsString>, name: &str, value: &Option<OsString>| {
        words.extend(value.iter().flat_map(|value| [name.into(), value.clone()]));
    };
    if args.share {
        scan.push("--share".into());
    }
    if is_checkpoint {
        option(&mut scan, "--ghost-limit", &args.ghost_limit);
    }
    option(&mut scan, "--freeze-timeout", &args.freeze_timeout);
    option(&mut sk, "--queued", &args.queued);
    let flags = [
        ("--tcp-established", args.tcp_established),
        ("--tcp-close", args.tcp_close),
        ("--skip-in-flight", args.skip_in_flight),
    ];
    sk.extend(flags.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag.into()));
    option(&mut write, "--compress", &args.compress.map(|codec| codec.to_string().into()));
    write.extend(["--".into(), dir.into()]);
    let usage = |error: clap::Error| ckpt_cli::UsageError(error.render().to_string());
    Ok((
        ckpt_scan::Args::try_parse_from(scan).map_err(usage)?,
        ckpt_sk::Args::try_parse_from(sk).map_err(usage)?,
        ckpt_write::Args::try_parse_from(write).map_err(usage)?,
    ))
}

/// Makes the directory of a series, private to its owner.
fn make_dir(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} is no directory", dir.display())
        }
        Err(e) => Err(e).with_context(|| format!("{}: mkdir", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(
            ["", "5", "ms", "0s", "1d", "-1s", "99999999999999999999s"].iter().all(|s| duration(s).is_err())
        );
    }
}
