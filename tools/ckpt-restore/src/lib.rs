//! Rebuilds the processes of a checkpoint, from an image directory or from a stream.
//!
//! All or nothing: what can be checked is checked before the first process is made; then all tasks
//! are made and built under ptrace ([`make`]), and only when every one is complete do they run. Whatever
//! fails on the way, and even if this process is killed, none of them stays.
//!
//! - [`tree`]: what the images say, checked
//! - [`pids`]: pids in use, `--replace`
//! - [`births`]: the order of forks, sessions and process groups
//! - [`region`], [`make`], [`fill`], [`shared`]: building
//! - [`lazy`]: pages that come later
//! - [`outcome`]: signals meanwhile and afterwards

use std::{
    ffi::OsString,
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use ckpt_cli::stats;
use ckpt_images::{ImageSet, service};
use ckpt_kinds::{
    fd::{
        OpenFiles, RestoreOptions,
        unix::{ExternalSocket, Which},
    },
    mem,
};
use ckpt_proto::types::{RestoreStatsEntry, StatsEntry};
use ckpt_remote::build::Area;
use ckpt_sys::{Pid, Refused, SocketId, ids, pidfd};
use clap::{
    CommandFactory, Parser, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use nix::{
    libc,
    unistd::{AccessFlags, access, getpgid},
};

pub mod births;
pub mod fill;
pub mod lazy;
pub mod make;
pub mod moves;
pub mod outcome;
pub mod pidns;
pub mod pids;
pub mod region;
pub mod shared;
pub mod tree;

use crate::{
    births::Node, fill::Builder, lazy::Lazy, make::Family, outcome::Signals, region::Region, tree::Tree,
};

/// Exit status for failures of ckpt-restore itself in the foreground: all others are the restored root's.
pub const FAILED: u8 = 125;

/// What happens when a file that is open but not mapped has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FilesMode {
    /// Warn, naming the file.
    Warn,
    /// Fail.
    Strict,
}

/// A descriptor handed in for something that lies outside the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inherit {
    /// Number in this process.
    pub fd: i32,
    /// `socket:[ID]`, `pipe:[ID]`, `tty[..]` or a path.
    pub resource: String,
}

impl std::str::FromStr for Inherit {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        s.strip_prefix("fd[")
            .and_then(|rest| rest.split_once("]:"))
            .and_then(|(fd, resource)| Some(Self { fd: fd.parse().ok()?, resource: resource.to_owned() }))
            .filter(|inherit| !inherit.resource.is_empty() && inherit.fd >= 0)
            .ok_or_else(|| "expected fd[N]:RESOURCE, as in fd[5]:socket:[48213]".to_owned())
    }
}

/// Where the other end of an external unix connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// The socket.
    pub id: SocketId,
    /// What to connect it to, as in `sun_path`.
    pub path: Vec<u8>,
}

// By value as clap's parsers hand it over.
#[allow(clippy::needless_pass_by_value)]
fn external(text: OsString) -> Result<External, String> {
    match ExternalSocket::parse(text.as_bytes()) {
        Some(ExternalSocket { which: Which::Id(id), path: Some(path) }) => Ok(External { id, path }),
        _ => Err("expected unix[ID]:PATH, as in unix[48213]:/run/b.sock".to_owned()),
    }
}

/// Rebuild the processes of a checkpoint; without --detach wait for the root and end with its status
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-restore",
    version,
    after_help = "\
Examples:
  ckpt-restore -D images                        # restore, wait, give the root's status
  ckpt-read images | ckpt-restore --detach      # from a stream; leave the tree running
  ckpt-restore --inherit-fd 'fd[5]:socket:[48213]' images
  ckpt-read images | sk-rewrite --accept 48213 | ckpt-restore --timeout 10s

Exit status: the root's (128 + N if signal N killed it), 125 if the restore failed.
With --detach: 0 restored, 1 failed, 2 usage, 3 refused, 4 damaged images."
)]
pub struct Args {
    #[command(flatten)]
    common: ckpt_cli::Common,
    #[command(flatten)]
    stats: ckpt_cli::StatsOption,
    /// Leave CRIU's file stats-restore in DIR
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Image directory; without one the stream on standard input
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// The same, as an option
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "dir")]
    pub images: Option<PathBuf>,
    /// Do not wait: leave the processes running and end
    #[arg(short, long)]
    pub detach: bool,
    /// Leave all processes stopped; SIGCONT lets them run
    #[arg(long)]
    pub leave_stopped: bool,
    /// Write the root's pid to FILE once everything is restored
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// End the original processes first, if they still are the ones
    #[arg(long)]
    pub replace: bool,
    /// Restore in a new pid namespace, beside whoever has the pids
    #[arg(long, conflicts_with = "replace")]
    pub new_pidns: bool,
    /// Use this process's descriptor N for an external RESOURCE
    #[arg(long, value_name = "fd[N]:RESOURCE")]
    pub inherit_fd: Vec<Inherit>,
    /// Connect the external unix socket ID to PATH or @NAME
    #[arg(long, value_name = "unix[ID]:PATH", value_parser = OsStringValueParser::new().try_map(external))]
    pub external: Vec<External>,
    /// Let the processes run at once; their pages come when they are touched, and in the background
    #[arg(long)]
    pub lazy: bool,
    /// Do not compare pages with their checksums
    #[arg(long)]
    pub no_verify: bool,
    /// TCP connections with an end outside come back closed
    #[arg(long)]
    pub tcp_close: bool,
    /// How long to wait for a listener to connect to
    #[arg(long, value_name = "DURATION", value_parser = ckpt_cli::duration)]
    pub retry: Option<Duration>,
    /// How long to wait for a peer that is to be accepted
    #[arg(long, value_name = "DURATION", value_parser = ckpt_cli::duration)]
    pub timeout: Option<Duration>,
    /// Data files that have changed: warn, or strict (fail)
    #[arg(long, value_name = "MODE", default_value = "warn", hide_possible_values = true)]
    pub files: FilesMode,
}

/// The command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs the tool. In the foreground an error ends it with status [`FAILED`], to be told from the
/// root's own; with --detach the status is one of the table that all tools share.
#[must_use]
pub fn main(args: Args) -> ExitCode {
    let detach = args.detach;
    match ckpt_cli::stdin().and_then(|input| run(args, input)) {
        Ok(code) => code.into(),
        Err(error) => {
            let code = ckpt_cli::finish("ckpt-restore", Err(error));
            if detach { code } else { FAILED.into() }
        }
    }
}

/// Restores, and waits if that is wanted; gives the exit status.
///
/// # Errors
/// Nothing was restored, and why.
pub fn run(args: Args, input: File) -> anyhow::Result<u8> {
    if let Some(dir) = &args.work_dir {
        access(dir, AccessFlags::W_OK).with_context(|| format!("{}: can't write there", dir.display()))?;
        stats::begin();
    }
    args.stats.begin();
    stats::phase("read");
    let mut set = match args.dir.as_ref().or(args.images.as_ref()) {
        Some(dir) => {
            let set = ImageSet::from_chain(dir)?;
            if args.lazy {
                lazy::check()?;
                set
            } else {
                set.unpacked()?
            }
        }
        None if args.lazy => {
            let text = "--lazy takes an image directory: pages of a stream can't be had out of turn";
            return Err(ckpt_cli::UsageError(text.to_owned()).into());
        }
        None => {
            ckpt_cli::not_a_terminal(&input, "standard input")?;
            ImageSet::from_stream(input)?
        }
    };
    let name = args.dir.as_ref().or(args.images.as_ref());
    set.more_than_memory(name.map_or("standard input".as_ref(), PathBuf::as_path))?;
    let tree = Tree::read(&set)?;
    ckpt_cli::note!(1, "{} processes, root {}", tree.processes.len(), tree.root().name());
    if args.new_pidns {
        return pidns::run(&args, &tree, &mut set);
    }
    if args.replace {
        pids::replace(&tree, &set)?;
    }
    pids::check_free(&tree)?;
    let mut signals = Signals::hold()?;
    let root = restore(&args, &tree, &mut set, &signals, true)?;
    ckpt_cli::note!(1, "restored");
    // What this process holds open must not keep others from seeing it closed.
    drop((set, tree));
    for inherited in args.inherit_fd.iter().filter(|inherited| inherited.fd > 2) {
        let _ = nix::unistd::close(inherited.fd);
    }
    if args.detach { Ok(0) } else { signals.wait_for(root) }
}

/// `pidfile`: whether the pid to be written is known here.
fn restore(
    args: &Args,
    tree: &Tree,
    set: &mut ImageSet,
    signals: &Signals,
    pidfile: bool,
) -> anyhow::Result<Pid> {
    let options = RestoreOptions {
        inherit: args.inherit_fd.iter().map(|i| (i.fd, i.resource.clone())).collect(),
        external_unix: args.external.iter().map(|e| (e.id, e.path.clone())).collect(),
        retry: args.retry.unwrap_or_default(),
        timeout: args.timeout,
        interrupt: Some(signals.interrupt()?),
        files_strict: args.files == FilesMode::Strict,
        tcp_close: args.tcp_close,
        pids: tree.numbers(),
        warn: ckpt_cli::warn,
        note: |text| ckpt_cli::note!(1, "{text}"),
    };
    let vdso = make::own_vdso()?;
    let mut lazy = match args.lazy {
        true => Some(Lazy::open(set, tree, !args.no_verify)?),
        false => None,
    };
    for process in &tree.processes {
        check_vdso(process, vdso.as_ref(), set, lazy.as_mut())?;
    }
    let steps = births::plan(&nodes(tree), &mut ids::spare_pids(tree.numbers()))?;
    let mut files = OpenFiles::open_all(set, &options)?;
    // Pages are compared with their checksums while they are placed, and nobody runs before they have been.
    let verification = if args.no_verify || args.lazy { None } else { Some(set.verification()?) };
    let built = build(args, tree, set, signals, &steps, vdso, &mut files, lazy).and_then(|mut family| {
        if let Some(verification) = verification {
            stats::phase("verify");
            verification.finish()?;
        }
        stats::phase("go");
        let pid = tree.root().pid;
        let path = args.pidfile.as_ref().filter(|_| pidfile);
        let pidfile = path.map(|path| PidFile::write(path, pid)).transpose()?;
        let group_of = |pgid| {
            let member = tree.processes.iter().find(|p| p.pgid == pgid)?;
            getpgid(Some(member.pid.nix())).ok()
        };
        files.take_terminals(!args.detach, group_of)?;
        let handle = pidfd::open(pid)?;
        files.go_live(set, || family.stand_alone(), || make::lives(pid, handle.as_fd()))?;
        family.go()?;
        files.redraw();
        stats::count("tree", "processes", tree.processes.len() as u64);
        stats::count("pages", "restored", pages(tree));
        if let Some(pidfile) = pidfile {
            pidfile.keep();
        }
        Ok(pid)
    });
    if built.is_err() {
        files.undo();
    } else if let Err(error) = leave_stats(args, tree).and_then(|()| args.stats.write()) {
        // They run: too late to fail.
        ckpt_cli::warn(&ckpt_cli::describe(&error));
    }
    built
}

/// How many are stored, of all processes.
fn pages(tree: &Tree) -> u64 {
    let spaces = tree.processes.iter().filter_map(|p| Some(&p.body.as_ref()?.space));
    spaces.map(|space| space.pages.bytes() / 4096).sum()
}

/// CRIU leaves this in its work directory, which is that of the images if nothing else is said. Here it is written only if
/// somebody asks: images are for reading.
fn leave_stats(args: &Args, tree: &Tree) -> anyhow::Result<()> {
    let Some(dir) = &args.work_dir else { return Ok(()) };
    let restore = RestoreStatsEntry {
        forking_time: service::micros(stats::taken(Some("tasks"))),
        restore_time: service::micros(stats::taken(None)),
        pages_restored: Some(pages(tree)),
        ..RestoreStatsEntry::default()
    };
    let path = dir.join(service::RESTORE);
    let contents = service::contents(&StatsEntry { dump: None, restore: Some(restore) });
    contents
        .and_then(|bytes| std::fs::write(&path, bytes))
        .with_context(|| format!("{}: write", path.display()))
}

#[allow(clippy::too_many_arguments)]
fn build(
    args: &Args,
    tree: &Tree,
    set: &mut ImageSet,
    signals: &Signals,
    steps: &[births::Step],
    vdso: Option<ckpt_kinds::mem::restore::vdso::Ours>,
    files: &mut OpenFiles,
    lazy: Option<Lazy>,
) -> anyhow::Result<Family> {
    let shared = shared::segments(set)?;
    let spaces = tree.processes.iter().filter_map(|p| Some(&p.body.as_ref()?.space));
    let region = Region::find(spaces, vdso, shared)?;
    let area = Area::map(region.base())?;
    let own_root = region::link("/proc/self/root")?;
    let mut bulk = set.take_bulk();
    if let (Some(bulk), true) = (&mut bulk, args.no_verify) {
        bulk.ignore_sums();
    }
    stats::phase("tasks");
    let bytes = make::bodies(tree).map(|(_, body)| body.space.pages.own_bytes()).sum();
    let mut family = Family::new(area, Box::new(ids::spare_pids(tree.numbers())), bytes)?;
    let terminals = files.controlling_terminals();
    let terminals = terminals.into_iter().map(|(sid, fd)| (sid, fd.as_raw_fd())).collect();
    let mut memory = Builder::new(tree, set, files, &region, bulk, lazy, steps)?;
    family.fork_all(tree, steps, &mut memory, &terminals)?;
    family.bury(tree)?;
    signals.check()?;
    stats::phase("pages");
    let lazy = memory.finish(&mut family)?;
    stats::phase("finish");
    signals.check()?;
    family.finish(tree, set, files, &own_root)?;
    if let Some(lazy) = lazy {
        family.serve(lazy.start(tree)?);
    }
    family.seal(tree, &region, args.leave_stopped)?;
    signals.check()?;
    Ok(family)
}

fn check_vdso(
    process: &tree::Process,
    ours: Option<&ckpt_kinds::mem::restore::vdso::Ours>,
    set: &ImageSet,
    lazy: Option<&mut Lazy>,
) -> anyhow::Result<()> {
    let Some(space) = process.body.as_ref().map(|body| &body.space) else { return Ok(()) };
    let Some(block) = &space.vdso else { return Ok(()) };
    let Some(ours) = ours else {
        return Err(Refused::new(process.name(), "it has a vdso, and this kernel runs without").into());
    };
    let on_stream = space.pages.id.is_some_and(|id| set.pages(id).is_none());
    let stored = match lazy {
        Some(lazy) => space.stored_vdso(|run, buffer| lazy.read(run, buffer))?,
        None if on_stream => None,
        None => {
            space.pages.check_files(set)?;
            space.stored_vdso(|run, buffer| mem::restore::read_run(set, run, buffer))?
        }
    };
    ours.check(&process.name(), block, stored.as_deref())
}

fn nodes(tree: &Tree) -> std::collections::BTreeMap<i32, Node> {
    let node = |p: &tree::Process| Node {
        pid: p.pid.0,
        ppid: p.ppid,
        pgid: p.pgid,
        sid: p.sid,
        subreaper: p.core().tc.as_ref().is_some_and(|tc| tc.child_subreaper()),
    };
    tree.processes.iter().map(|p| (p.pid.0, node(p))).collect()
}

/// A pid file that is removed again unless the restore succeeds.
struct PidFile {
    path: PathBuf,
    kept: bool,
}

impl PidFile {
    fn write(path: &std::path::Path, pid: Pid) -> anyhow::Result<Self> {
        let failed = || format!("{}: write the pid", path.display());
        let mut file = File::create(path).with_context(failed)?;
        let pidfile = Self { path: path.to_owned(), kept: false };
        writeln!(file, "{pid}").with_context(failed)?;
        Ok(pidfile)
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

const _: () = assert!(libc::SIGCHLD == 17, "signal numbers of x86-64");
