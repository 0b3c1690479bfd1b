//! `ckpt-scan`: freezes a process tree, reads everything but the inside of sockets, and writes it
//! as a checkpoint stream.
//!
//! This process is the tracer and so the holder of the freeze: it stays until the stages behind it
//! are done with the live tree (ckpt-hold), then lets the tree run on, or kills it if that was
//! asked for and a writer has said COMMIT. If it dies, the kernel lets the tree run on.

mod ids;
mod pre_dump;
mod process;

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ckpt_cli::stats;
use ckpt_hold::{Clock, Holder, Outcome, PipeId};
use ckpt_images::recode::{self, Behind, Codec, Recode};
use ckpt_kinds::{
    fd::{DumpOptions, External, FileTable, Survey, tcp::lock::TreeLock},
    mem::{dump::ShmemPlan, flags::Flags},
    sink::emit,
    task::{self, seccomp::Filters},
};
use ckpt_pages::{Memory, Private, Tracking, snapshot};
use ckpt_proto::{
    Image,
    stream::Writer,
    types::{Hello, InventoryEntry, PstreeEntry, TimensEntry, Timespec, core_entry::March},
};
use ckpt_remote::{FreezeError, Frozen, Release, Twin};
use ckpt_sys::{Pid, Refused, nft, transfer::Output};
use ckpt_tracking::arm;
use clap::{CommandFactory, Parser};

/// Freeze a process tree and write it as a checkpoint stream
#[derive(Debug, Parser)]
#[command(
    name = "ckpt-scan",
    version,
    after_help = "\
Examples:
  ckpt-scan -t 4711 | ckpt-sk | ckpt-write /var/ckpt/1
  ckpt-scan -t 4711 --kill | ckpt-sk --external 48213 | ckpt-write /var/ckpt/last
  ckpt-scan -t 4711 --snapshot | ckpt-sk | ckpt-write /var/ckpt/2
  ckpt-scan -t 4711 --track ckpt-track-4711 --parent 1 | ckpt-sk | ckpt-write --parent 1 2
  ckpt-scan -t 4711 --track ckpt-track-4711 --pre-dump | ckpt-write 0
  ckpt-scan -t 4711 --no-mem | ckpt-mem | ckpt-sk | zstd > state.zst

The tree runs on when the last stage is done with it. See ckpt(7) for the pipeline."
)]
pub struct Args {
    /// Root of the tree: this process and all its descendants
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = ckpt_cli::positive_pid)]
    pub tree: Pid,
    /// Leave private memory to a ckpt-mem stage behind
    #[arg(long)]
    pub no_mem: bool,
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Codec>,
    /// Kill the tree once the images are durable (a writer said COMMIT)
    #[arg(long, conflicts_with = "leave_stopped")]
    pub kill: bool,
    /// Leave the tree stopped, as after SIGSTOP
    #[arg(long)]
    pub leave_stopped: bool,
    /// Read pages from copy-on-write forks, while the tree runs on
    #[arg(long, conflicts_with_all = ["kill", "leave_stopped", "no_mem"])]
    pub snapshot: bool,
    /// Track writes with the ckpt-track at ADDRESS, for increments
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_mem")]
    pub track: Option<String>,
    /// Store only what has been written since the checkpoint in DIR
    #[arg(long, value_name = "DIR", requires = "track")]
    pub parent: Option<PathBuf>,
    /// Write only memory, read while the tree runs, as a parent
    #[arg(long, requires = "track", conflicts_with_all = [
        "no_mem", "kill", "leave_stopped", "snapshot", "external", "ghost_limit"
    ])]
    pub pre_dump: bool,
    /// Store pages that forked processes share once (not for CRIU)
    #[arg(long, conflicts_with = "no_mem")]
    pub share: bool,
    /// What is outside the tree too: pipe:[ID], shm:[ID], pidfd:[PID]
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<External>,
    /// Largest deleted file that is stored in the images, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    pub ghost_limit: u64,
    /// How long to try to stop a tree that resists (vfork, uninterruptible I/O), seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub freeze_timeout: u64,
    /// How long to wait for stages that must come (ckpt-sk, ckpt-mem, ckpt-write), seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub attach_timeout: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

/// The command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs the tool with `output` as its standard output.
///
/// # Errors
/// The tree is unharmed and runs on whatever went wrong.
pub fn run(args: &Args, output: File) -> anyhow::Result<()> {
    ckpt_cli::not_a_terminal(&output, "standard output")?;
    let plain_file = output.metadata().is_ok_and(|m| m.is_file());
    if plain_file && args.kill {
        let text = "--kill needs a writer that says when the images are durable: pipe into ckpt-write";
        return Err(ckpt_cli::UsageError(text.to_owned()).into());
    }
    args.stats.begin();
    if args.pre_dump {
        return pre_dump::run(args, output, plain_file);
    }
    stats::phase("freeze");
    let holder = Holder::bind()?;
    let mut tracking = Tracking::begin(args.track.as_deref(), args.parent.as_ref())?;
    // Whatever can be done before is not done in the freeze.
    let (output, behind) = match args.compress {
        Some(codec) => recode::behind(output, Recode::Pack(codec))?,
        None => (output, Behind::default()),
    };
    let output = lending(output, &holder);
    let processors = task::processors();
    // Where all pages are read in the freeze, it matters little that they are counted too.
    let flags = if args.snapshot || tracking.on() { Flags::prepare() } else { Flags::default() };
    let asked = Instant::now();
    let frozen = Frozen::freeze(args.tree, Duration::from_secs(args.freeze_timeout)).map_err(as_refusal)?;
    let clock = holder.clock(asked.elapsed(), frozen.since());
    ckpt_cli::note!(1, "froze {} processes", frozen.processes.len());
    let mut held = Held { frozen, clock, lock: None, leaves: None, in_flight: Vec::new() };
    stats::phase("entries");
    stats::count("tree", "processes", held.frozen.processes.len() as u64);
    let (needs, survey) = match what_lacks(args, &held.frozen, plain_file).and_then(|(needs, survey)| {
        held.lock_network(args, &needs)?;
        Ok((needs, survey))
    }) {
        Ok(found) => found,
        Err(error) => return give_up(held, None::<Writer<Output>>, error),
    };
    let hello = hello(args, &holder, plain_file, &needs);
    let mut writer = Writer::open(output, hello).context("write the stream")?;
    let holder = (!plain_file).then_some(&holder);
    if let (Some(holder), true) = (holder, args.no_mem) {
        holder.answer_requests();
    }
    let memory = match dump(args, &mut held, survey, processors.as_deref(), flags, &mut tracking, &mut writer)
    {
        Ok(memory) => memory,
        Err(error) => return give_up(held, Some(writer), error).map_err(|e| blame(e, holder)),
    };
    stats::phase("pages");
    let mut held = Some(held);
    let copied = if args.snapshot {
        let patience = Duration::from_secs(args.attach_timeout);
        let mut tree = Forked { held: &mut held, holder, needs: &needs, patience, root: args.tree };
        snapshot::copy(&mut tree, &memory, &tracking, &mut writer)
    } else if args.no_mem {
        memory.copy_shared(&mut writer)
    } else {
        let patience = if needs.is_empty() { Duration::ZERO } else { STAGES_COME };
        let mut clerk = Clerk { memory: &memory, twins: None };
        let run_on = || let_run(args, &mut clerk, &mut held, holder, &needs, patience);
        memory.copy(&tracking, !needs.is_empty(), &mut writer, run_on)
    };
    if let Err(error) = copied {
        return give_up(held, Some(writer), error).map_err(|e| blame(e, holder));
    }
    ckpt_pages::count(&writer);
    stats::phase("stages");
    let output = writer.end().context("write the stream")?.into_file();
    match holder {
        Some(holder) if !holder.all_came(&needs) => holder.close_when_read(output),
        // Programs that wait for its end (cat, zstd) finish.
        _ => drop(output),
    }
    if let Err(error) = behind.finish() {
        return give_up(held, None, error.into()).map_err(|e| blame(e, holder));
    }
    settle(args, held, holder, &needs, tracking, &memory)?;
    args.stats.write()
}

fn hello(args: &Args, holder: &Holder, plain_file: bool, needs: &[&str]) -> Hello {
    Hello {
        page_size: 4096,
        arch: March::X8664 as u32,
        control: (!plain_file).then(|| holder.address().to_vec()),
        lacks: needs.iter().map(ToString::to_string).collect(),
        root_pid: Some(args.tree.0.unsigned_abs()),
        packed: None,
    }
}

/// What this process holds for as long as the stages behind it need it. The kernel ends both if it dies.
struct Held {
    frozen: Frozen,
    /// Tells the writer how long.
    clock: Clock,
    /// On the tree's TCP connections.
    lock: Option<TreeLock>,
    /// The name of the lock that stays when the tree is killed.
    leaves: Option<String>,
    /// Files that only messages hold; ckpt-sk finds them here.
    in_flight: Vec<OwnedFd>,
}

impl Held {
    /// Stops the packets of the tree's TCP connections, if it has any and they will be read.
    fn lock_network(&mut self, args: &Args, needs: &[&str]) -> anyhow::Result<()> {
        if !needs.contains(&"sk") {
            return Ok(());
        }
        let live: Vec<Pid> = self.frozen.processes.iter().filter(|p| !p.zombie).map(|p| p.pid).collect();
        self.lock = TreeLock::of(&live)?;
        if args.kill {
            self.leaves = Some(nft::new_name()?);
        }
        Ok(())
    }

    /// Ends the freeze, and the lock on the network unless the tree is killed: then its connections stay silent
    /// until they are restored.
    fn free(self, how: Release) -> anyhow::Result<()> {
        let Self { frozen, clock, mut lock, leaves, in_flight } = self;
        drop(in_flight);
        let (held, worked) = (frozen.since().elapsed(), frozen.worked());
        let copies = match &lock {
            Some(lock) if matches!(how, Release::Kill) => lock.sockets(),
            _ => {
                lock = None;
                Ok(Vec::new())
            }
        };
        frozen.release(if copies.is_ok() { how } else { Release::Run });
        drop(clock);
        let copies = copies.context("not killed: its TCP connections could not be kept silent")?;
        stats::seconds("frozen", held);
        stats::seconds("frozen_processor", worked);
        ckpt_cli::note!(1, "the tree was frozen for {:.2} ms", held.as_secs_f64() * 1000.0);
        ckpt_cli::note!(
            2,
            "of which {:.2} ms were processor time of ckpt-scan",
            worked.as_secs_f64() * 1000.0
        );
        if let (Some(lock), Some(name)) = (lock, leaves) {
            lock.leave(&name, copies)?;
            ckpt_cli::note!(
                1,
                "its TCP connections are locked until they are restored: nft list table inet {name}"
            );
        }
        Ok(())
    }
}

/// How long the stages behind may take to get what was written before the pages. Some get it only with the rest, if a
/// program in between gathers it.
const STAGES_COME: Duration = Duration::from_millis(100);

/// A frozen tree whose memory is forked, so that it runs on while that is read.
struct Forked<'a> {
    held: &'a mut Option<Held>,
    /// The stages behind us; none behind a plain file.
    holder: Option<&'a Holder>,
    /// Which of them work on the live tree, and how long to wait for them to come.
    needs: &'a [&'a str],
    patience: Duration,
    root: Pid,
}

impl snapshot::Tree for Forked<'_> {
    type Twin = Twin;

    fn twins(&mut self, memory: &Memory) -> anyhow::Result<HashMap<Pid, (Pid, Twin)>> {
        let Some(held) = &mut self.held else { return Ok(HashMap::new()) };
        let mut twins = HashMap::new();
        for (pid, twin) in snapshot::take(&mut held.frozen, memory)? {
            match twin {
                Ok(twin) => drop(twins.insert(pid, (twin.pid(), twin))),
                Err(why) => snapshot::warn(memory, pid, &why),
            }
        }
        Ok(twins)
    }

    fn let_go(&mut self) -> anyhow::Result<()> {
        if let Some(holder) = self.holder {
            succeeded(self.root, holder.passed(self.needs, self.patience))?;
        }
        self.held.take().map_or(Ok(()), |held| held.free(Release::Run))
    }
}

/// The output; where the stages behind tell, memory given to it is used again.
fn lending(output: File, holder: &Holder) -> Output {
    let pipe = PipeId::of(output.as_fd());
    let output = Output::new(output);
    match pipe {
        Some(pipe) => output.lending(holder.taken_from(pipe)),
        None => output,
    }
}

/// A refusal as such, so that it is told from a failure.
fn as_refusal(error: FreezeError) -> anyhow::Error {
    match error {
        FreezeError::Refused(refused) => refused.into(),
        error => error.into(),
    }
}

/// Lets the tree go before anything else, then tells the reader why.
fn give_up(
    held: impl Into<Option<Held>>,
    writer: Option<Writer<Output>>,
    error: anyhow::Error,
) -> anyhow::Result<()> {
    if let Some(held) = held.into() {
        drop(held.lock);
        held.frozen.release(Release::Run);
    }
    if let Some(writer) = writer {
        // If the reader is gone it knows already.
        let _ = writer.abort(&ckpt_cli::reason("ckpt-scan", &error));
    }
    Err(error)
}

/// A broken pipe is only how a failure behind us arrives here; the stage may have said why.
fn blame(error: anyhow::Error, holder: Option<&Holder>) -> anyhow::Error {
    if ckpt_cli::is_broken_pipe(&error)
        && let Some(holder) = holder
        && let Outcome::Failed { stage, reason } = holder.wait(&[], false, Duration::ZERO)
    {
        return failed_behind(&stage, &reason);
    }
    error
}

fn failed_behind(stage: &str, reason: &str) -> anyhow::Error {
    let reason = reason.strip_prefix(&format!("ckpt-{stage}: ")).unwrap_or(reason);
    anyhow::anyhow!("the checkpoint failed in ckpt-{stage}: {reason}")
}

/// What stages have to follow.
fn what_lacks(args: &Args, frozen: &Frozen, plain_file: bool) -> anyhow::Result<(Vec<&'static str>, Survey)> {
    let live: Vec<Pid> = frozen.processes.iter().filter(|p| !p.zombie).map(|p| p.pid).collect();
    let mut needs = Vec::new();
    if args.no_mem {
        needs.push("mem");
    }
    let survey = FileTable::survey(&live)?;
    if survey.sockets {
        needs.push("sk");
    }
    if plain_file && !needs.is_empty() {
        let refused = Refused::new(
            format!("pid {}", args.tree),
            format!(
                "a stream in a plain file can't be completed later, and ckpt-{} has to complete it",
                needs[0]
            ),
        );
        return Err(refused.advise(format!("pipe: ckpt-scan ... | ckpt-{} > FILE", needs[0])).into());
    }
    Ok((needs, survey))
}

/// Ends the hold: waits for the stages behind, then does with the tree what was asked for. Behind a
/// plain file there are none. After a snapshot (`held` is `None`) the tree runs already.
fn settle(
    args: &Args,
    held: Option<Held>,
    holder: Option<&Holder>,
    needs: &[&str],
    tracking: Tracking,
    memory: &Memory,
) -> anyhow::Result<()> {
    let patience = Duration::from_secs(args.attach_timeout);
    let mut held = held;
    let mut clerk = Clerk { memory, twins: None };
    let_run(args, &mut clerk, &mut held, holder, needs, patience)?;
    let outcome = holder.map_or(Outcome::Released, |holder| {
        let commit = args.kill || tracking.on();
        answering(&mut clerk, &mut held, || holder.wait(needs, commit, patience))
    });
    let release = match (&outcome, args.kill, args.leave_stopped) {
        (Outcome::Committed, true, _) => Release::Kill,
        (Outcome::Committed | Outcome::Released, false, true) => Release::Stop,
        _ => Release::Run,
    };
    let freed = held.map_or(Ok(()), |held| held.free(release));
    match outcome {
        Outcome::Released if args.kill => {
            bail!("pid {}: not killed: no writer has said that the images are durable", args.tree)
        }
        // It was only to say what the next checkpoint can be.
        Outcome::NobodyCame { missing } if !args.kill && missing == ["write"] => {
            tracking.end(false);
            Ok(())
        }
        outcome => {
            let durable = outcome == Outcome::Committed;
            succeeded(args.tree, outcome)?;
            freed?;
            // What has been killed has no next checkpoint.
            if !args.kill {
                tracking.end(durable);
            }
            Ok(())
        }
    }
}

/// Everything has been read from the tree: it need not wait for the disk, unless something else than to run is
/// to become of it. Whether the stages that work on it are done is awaited for as long as they do, and `patience`
/// if they have not come.
fn let_run(
    args: &Args,
    clerk: &mut Clerk<'_>,
    held: &mut Option<Held>,
    holder: Option<&Holder>,
    needs: &[&str],
    patience: Duration,
) -> anyhow::Result<()> {
    if args.kill || args.leave_stopped || held.is_none() {
        return Ok(());
    }
    if holder
        .is_none_or(|holder| answering(clerk, held, || holder.passed(needs, patience)) == Outcome::Released)
        && let Some(held) = held.take()
    {
        held.free(Release::Run)?;
    }
    Ok(())
}

/// Waits, and answers what is asked meanwhile.
fn answering(clerk: &mut Clerk<'_>, held: &mut Option<Held>, wait: impl Fn() -> Outcome) -> Outcome {
    loop {
        match wait() {
            Outcome::Asked(request) => request.answer(clerk.answer(&request.text, held.as_mut())),
            outcome => return outcome,
        }
    }
}

/// Does for ckpt-mem what only the tracer can do.
struct Clerk<'a> {
    memory: &'a Memory,
    /// When they have been asked for.
    twins: Option<HashMap<Pid, Result<Twin, String>>>,
}

impl Clerk<'_> {
    fn answer(
        &mut self,
        request: &str,
        held: Option<&mut Held>,
    ) -> Result<(String, Option<OwnedFd>), String> {
        let unknown = || format!("{request:?}: there is no such process");
        let (word, pid) = request.split_once(' ').unwrap_or((request, ""));
        let pid = pid.parse().map(Pid).map_err(|_| unknown())?;
        let private = self.memory.private.iter().find(|p| p.pid == pid).ok_or_else(unknown)?;
        let text = |text: &str| Ok((text.to_owned(), None));
        match (word, held) {
            ("TRACKED", _) => text(if private.watched.is_empty() { "no" } else { "yes" }),
            ("FORGET", _) => {
                drop(self.twins.as_mut().and_then(|twins| twins.remove(&pid)));
                text("")
            }
            (_, None) => Err("the tree is frozen no more".to_owned()),
            ("ARM", Some(held)) => {
                let process = held.frozen.processes.iter().find(|p| p.pid == pid).cloned();
                let uffd = arm(&mut held.frozen, &process.ok_or_else(unknown)?);
                Ok((String::new(), Some(uffd.map_err(|e| ckpt_cli::describe(&e.into()))?)))
            }
            (_, Some(held)) => {
                let twins = match &mut self.twins {
                    Some(twins) => twins,
                    none => {
                        let twins = snapshot::take(&mut held.frozen, self.memory);
                        none.insert(twins.map_err(|e| ckpt_cli::describe(&e))?)
                    }
                };
                match twins.get(&pid) {
                    Some(Ok(twin)) => text(&twin.pid().to_string()),
                    Some(Err(why)) => Err(why.clone()),
                    None => Err(unknown()),
                }
            }
        }
    }
}

/// Did the stages behind do their part?
fn succeeded(tree: Pid, outcome: Outcome) -> anyhow::Result<()> {
    match outcome {
        Outcome::Committed | Outcome::Released => Ok(()),
        Outcome::Failed { stage, reason } => Err(failed_behind(&stage, &reason)),
        Outcome::Asked(request) => bail!("a stage has asked for {:?}, and nobody has answered", request.text),
        Outcome::Unread => {
            bail!("pid {tree}: the stage behind has ended before it had read the stream")
        }
        Outcome::NobodyCame { missing } => {
            let stages = missing.iter().map(|s| format!("ckpt-{s}")).collect::<Vec<_>>().join(", ");
            let reason = format!("no {stages} has come to this stream, so the checkpoint is incomplete");
            let refused = Refused::new(format!("pid {tree}"), reason);
            Err(refused.advise("ckpt-scan -t PID | ckpt-sk | ckpt-write DIR is the whole pipeline").into())
        }
    }
}

/// Writes everything but the contents of memory; tells whose there are.
fn dump(
    args: &Args,
    held: &mut Held,
    survey: Survey,
    processors: Option<&[u8]>,
    flags: Flags,
    tracking: &mut Tracking,
    writer: &mut Writer<Output>,
) -> anyhow::Result<Memory> {
    let frozen = &mut held.frozen;
    let processes = frozen.processes.clone();
    let live: Vec<Pid> = processes.iter().filter(|p| !p.zombie).map(|p| p.pid).collect();
    for process in processes.iter().filter(|p| !p.zombie) {
        task::check(process).with_context(|| process.subject())?;
    }
    let ids = ids::assign(&processes)?;
    let inventory = InventoryEntry {
        root_ids: Some(ids.root()),
        ckpt_net_lock: held.leaves.clone(),
        ..inventory(tracking)?
    };
    emit(writer, Image::Inventory, 0, &inventory)?;
    emit(writer, Image::Timens, 0, &clocks()?)?;
    let threads = processes.iter().filter(|p| !p.zombie).flat_map(|p| p.threads.iter().map(|t| (p.pid, t)));
    let filters = Filters::read(threads)?;
    emit(writer, Image::Seccomp, 0, &filters.entry())?;
    for process in &processes {
        emit(writer, Image::Pstree, 0, &pstree(process, args.tree)?)?;
    }

    let options = DumpOptions { external: args.external.clone(), ghost_limit: args.ghost_limit };
    let mut files = FileTable::new(live, options, survey);
    let mut memory = Vec::new();
    for process in &processes {
        let what = || process.subject();
        if process.zombie {
            emit(writer, Image::Core, number(process.pid.0), &task::dump_zombie(&process.stat))?;
            continue;
        }
        tracking.watch(process.pid, || Ok(arm(frozen, process)?));
        let mut watched = Vec::new();
        // With --no-mem it is ckpt-mem that knows whether they are ours.
        let ours = (args.no_mem || tracking.tracks(process.pid)).then_some(&mut watched);
        let vmas = process::dump(
            frozen,
            process,
            ids.of(process.pid),
            flags,
            &mut files,
            &filters,
            processors,
            ours,
            writer,
        )
        .with_context(what)?;
        memory.push((process, vmas, watched));
    }
    files.add_in_flight(writer)?;
    let segments = files.shmem_segments(writer)?;
    held.in_flight = files.finish(writer)?;

    let mut pages_id = 0;
    let mut next_id = || {
        pages_id += 1;
        pages_id
    };
    let mut shared = Vec::new();
    for segment in &segments {
        let own = reopen(segment.fd.as_fd())?;
        let plan = ShmemPlan::new(segment.shmid, own.as_fd(), segment.size, next_id())?;
        plan.emit(writer)?;
        shared.push((plan, own));
    }
    let private = memory
        .into_iter()
        .map(|(process, vmas, watched)| Private {
            pid: process.pid,
            ppid: process.parent(),
            comm: process.comm(),
            vmas,
            watched,
            pages_id: next_id(),
            faulting: process.at_work(),
        })
        .collect();
    Ok(Memory { shared, private, once: args.share })
}

/// The same file with a file position of its own: the descriptor at hand shares one with the target.
fn reopen(fd: BorrowedFd<'_>) -> anyhow::Result<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    File::open(&path).with_context(|| format!("reopen shared memory through {path}"))
}

/// A pid as it goes into file names and messages.
pub(crate) fn number(pid: i32) -> u64 {
    u64::from(pid.unsigned_abs())
}

fn pstree(process: &ckpt_remote::Process, root: Pid) -> anyhow::Result<PstreeEntry> {
    let field =
        |n: i32, name: &str| u32::try_from(n).with_context(|| format!("pid {}: {name} is {n}", process.pid));
    let mut threads = process.threads.iter().map(|t| t.tid.0.unsigned_abs()).collect::<Vec<_>>();
    if process.zombie {
        threads.push(process.pid.0.unsigned_abs());
    }
    Ok(PstreeEntry {
        pid: field(process.pid.0, "pid")?,
        ppid: if process.pid == root { 0 } else { field(process.stat.ppid, "ppid")? },
        pgid: field(process.stat.pgrp, "pgid")?,
        sid: field(process.stat.session, "sid")?,
        threads,
    })
}

fn inventory(tracking: &Tracking) -> anyhow::Result<InventoryEntry> {
    let kernel = nix::sys::utsname::uname().context("uname")?;
    Ok(InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        root_cg_set: Some(1),
        lsmtype: Some(0),
        network_lock_method: Some(0),
        ckpt_format: Some(1),
        ckpt_kernel: Some(kernel.release().to_string_lossy().into_owned()),
        ckpt_id: Some(tracking.id.to_vec()),
        ckpt_parent_id: tracking.parent.map(|id| id.to_vec()),
        ..InventoryEntry::default()
    })
}

fn clocks() -> anyhow::Result<TimensEntry> {
    use nix::time::{ClockId, clock_gettime};
    let read = |id: ClockId| -> anyhow::Result<Timespec> {
        let now = clock_gettime(id).context("clock_gettime")?;
        Ok(Timespec { tv_sec: now.tv_sec().cast_unsigned(), tv_nsec: now.tv_nsec().cast_unsigned() })
    };
    Ok(TimensEntry { monotonic: read(ClockId::CLOCK_MONOTONIC)?, boottime: read(ClockId::CLOCK_BOOTTIME)? })
}
