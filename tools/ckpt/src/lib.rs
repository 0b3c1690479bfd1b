//! The usual pipelines in one word.
//!
//! `ckpt dump` and `ckpt restore` put together the stages that one would type and run them; `-x` shows
//! the pipeline, so that it can be copied and changed. `ckpt foo` runs `ckpt-foo`, as git does.

mod pipeline;
mod pre_dump;

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, bail};
use clap::{CommandFactory, Parser, Subcommand};

pub use pipeline::{Pipeline, Stage, blame};

/// Checkpoints and restores process trees
///
/// Any other COMMAND runs the program ckpt-COMMAND, found beside this one or in PATH:
/// scan, mem, sk, write, read, restore, show, encode, check, track, series.
#[derive(Debug, Clone, Parser)]
#[command(name = "ckpt", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Args {
    /// Print the pipeline that is run to standard error
    #[arg(short = 'x')]
    pub trace: bool,
    #[command(subcommand)]
    #[allow(missing_docs)]
    pub command: Verb,
}

const EXAMPLES: &str = "\
Examples:
  ckpt dump -t 4711 -D checkpoint                        # the tree runs on
  ckpt dump -t 4711 -D checkpoint --pre-dump --kill      # most memory is copied before
  ckpt -x dump -t 4711 -D checkpoint --external 48213    # shows the stages
  ckpt restore -D checkpoint --connect 48213=/run/b.sock --detach
  ckpt show --tree checkpoint                            # runs ckpt-show";

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Verb {
    /// Checkpoint a process tree: ckpt-scan | ckpt-sk | ckpt-write
    Dump(Dump),
    /// Restore a checkpoint: ckpt-restore, with sk-rewrite before it if sockets are edited
    Restore(Restore),
    /// Another command: the program `ckpt-COMMAND`.
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// Checkpoint a process tree: ckpt-scan | ckpt-sk | ckpt-write
///
/// The tree runs on unless --kill or --leave-stopped is given.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Dump {
    /// Root of the tree
    #[arg(short = 't', long, value_name = "PID")]
    pub tree: OsString,
    /// Directory to make
    #[arg(short = 'D', long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The far end is outside the tree: a socket as for ckpt-sk (ID[:PATH], path=PATH, peer-pid=PID, all), pipe:[ID] or shm:[ID]
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<OsString>,
    /// What external sockets hold unread: drop or keep
    #[arg(long, value_name = "WHAT")]
    pub queued: Option<OsString>,
    /// Track writes with the ckpt-track at ADDRESS
    #[arg(long, value_name = "ADDRESS")]
    pub track: Option<OsString>,
    /// Store only what was written since the checkpoint in DIR
    #[arg(long, value_name = "DIR", requires = "track")]
    pub parent: Option<OsString>,
    /// Copy memory while the tree runs, in rounds (at most ROUNDS, default 8), before it is frozen for the rest
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, require_equals = true, default_missing_value = "8",
        value_parser = clap::value_parser!(u32).range(1..))]
    pub pre_dump: Option<u32>,
    /// Kill the tree once the directory is safely in place
    #[arg(long, conflicts_with = "leave_stopped")]
    pub kill: bool,
    /// Leave the tree stopped, as after SIGSTOP
    #[arg(long)]
    pub leave_stopped: bool,
    /// Let the tree run on as soon as its memory has been forked
    #[arg(long, conflicts_with_all = ["kill", "leave_stopped"])]
    pub snapshot: bool,
    /// Store pages that forked processes share once; CRIU can't restore such images
    #[arg(long)]
    pub share: bool,
    /// Largest deleted file that is stored, bytes
    #[arg(long, value_name = "BYTES")]
    pub ghost_limit: Option<OsString>,
    /// How long to try to stop a tree that resists, seconds
    #[arg(long, value_name = "SECONDS")]
    pub freeze_timeout: Option<OsString>,
    /// Compress pages: zstd, zstd:LEVEL or lz4
    #[arg(long, value_name = "HOW")]
    pub compress: Option<OsString>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    /// Say what is being done; twice for details
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Restore a checkpoint: ckpt-restore, with sk-rewrite before it if sockets are edited
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Restore {
    /// Image directory
    #[arg(short = 'D', long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Leave the processes running and end, instead of waiting for the root
    #[arg(short, long)]
    pub detach: bool,
    /// Leave all processes stopped; SIGCONT lets them run
    #[arg(long)]
    pub leave_stopped: bool,
    /// Write the root's pid to FILE
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<OsString>,
    /// End the original processes first, if they still are the ones
    #[arg(long)]
    pub replace: bool,
    /// Restore in a new pid namespace
    #[arg(long, conflicts_with = "replace")]
    pub new_pidns: bool,
    /// Let the processes run at once; their pages come when they are touched, and in the background
    #[arg(long, conflicts_with_all = ["accept", "connect", "close", "drop_queues"])]
    pub lazy: bool,
    /// Use descriptor N for an external RESOURCE
    #[arg(long, value_name = "fd[N]:RESOURCE")]
    pub inherit_fd: Vec<OsString>,
    /// Connect the external unix socket ID to PATH
    #[arg(long, value_name = "unix[ID]:PATH")]
    pub external: Vec<OsString>,
    /// Try for so long to connect external sockets
    #[arg(long, value_name = "DURATION")]
    pub retry: Option<OsString>,
    /// Wait at most so long for the peer of each external socket that accepts it
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<OsString>,
    /// What to do about data files that have changed
    #[arg(long, value_name = "MODE")]
    pub files: Option<OsString>,
    /// sk-rewrite: take the next client at PATH (default: where it was accepted) as the socket's peer
    #[arg(long, value_name = "ID[=PATH]")]
    pub accept: Vec<OsString>,
    /// sk-rewrite: connect the socket to PATH
    #[arg(long, value_name = "ID=PATH")]
    pub connect: Vec<OsString>,
    /// sk-rewrite: the socket's peer has closed
    #[arg(long, value_name = "ID")]
    pub close: Vec<OsString>,
    /// sk-rewrite: forget what the socket has not read
    #[arg(long, value_name = "ID")]
    pub drop_queues: Vec<OsString>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub stats: ckpt_cli::StatsOption,
    /// Say what is being done; twice for details
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs what `args` say. A single program takes this process's place.
///
/// # Errors
/// Programs that can't be started; a stage that fails says so itself and is only seen in the status.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pipeline = match &args.command {
        Verb::Dump(dump) => {
            // ckpt-write would say so too, but not before the tree was frozen for nothing.
            if std::fs::symlink_metadata(&dump.dir).is_ok() {
                bail!("{} exists already; checkpoints are never overwritten", dump.dir.display());
            }
            if let Some(rounds) = dump.pre_dump {
                return pre_dump::run(dump, rounds, args.trace);
            }
            if dump.stats.file.is_some() {
                return dump.run_with_stats(args.trace);
            }
            dump.pipeline()
        }
        Verb::Restore(restore) => restore.pipeline(),
        Verb::Other(words) => other(words)?,
    };
    trace(args.trace, &pipeline);
    if let [stage] = &pipeline.stages[..] {
        let program = pipeline::find(&stage.program);
        let error = Command::new(&program).args(&stage.args).exec();
        return Err(error).with_context(|| format!("run {}", stage.program.display()));
    }
    let code = pipeline.run()?;
    Ok(ExitCode::from(code))
}

/// Shows what is run, if that is wanted.
fn trace(wanted: bool, pipeline: &Pipeline) {
    use std::io::Write;
    if wanted {
        let _ = writeln!(std::io::stderr(), "+ {pipeline}");
    }
}

fn other(words: &[OsString]) -> anyhow::Result<Pipeline> {
    let (name, args) = words.split_first().context("no command")?;
    let mut program = OsString::from("ckpt-");
    program.push(name);
    // An option or a path is no command.
    let sane = !name.as_encoded_bytes().contains(&b'/') && !name.as_encoded_bytes().starts_with(b"-");
    if !sane || !pipeline::exists(&program) {
        let text = format!("there is no command {}: {} was not found", name.display(), program.display());
        return Err(ckpt_cli::UsageError(text).into());
    }
    Ok(Pipeline { stages: vec![Stage { program, args: args.to_vec() }] })
}

/// Arguments in the making.
#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn flag(&mut self, name: &str, given: bool) {
        if given {
            self.0.push(name.into());
        }
    }

    fn verbose(&mut self, count: u8) {
        for _ in 0..count {
            self.0.push("-v".into());
        }
    }

    /// `--name=value`, which works for values that begin with a dash too.
    fn option<'a>(&mut self, name: &str, values: impl IntoIterator<Item = &'a OsString>) {
        for value in values {
            let mut word = OsString::from(name);
            word.push("=");
            word.push(value);
            self.0.push(word);
        }
    }
}

fn stage(program: &str, fill: impl FnOnce(&mut Words)) -> Stage {
    let mut words = Words::default();
    fill(&mut words);
    Stage { program: program.into(), args: words.0 }
}

impl Dump {
    /// Runs the stages and gathers the figures of each.
    fn run_with_stats(&self, show: bool) -> anyhow::Result<ExitCode> {
        self.stats.begin();
        let dir = tempfile::tempdir().context("make a temporary directory")?;
        let mut pipeline = self.pipeline();
        let mut files = Vec::new();
        for stage in &mut pipeline.stages {
            // ckpt-sk has none.
            if stage.program == "ckpt-scan" || stage.program == "ckpt-write" {
                let file = dir.path().join(&stage.program);
                let mut words = Words::default();
                words.option("--stats", [&file.clone().into_os_string()]);
                stage.args.splice(0..0, words.0);
                files.push(file);
            }
        }
        trace(show, &pipeline);
        let code = pipeline.run()?;
        if code == 0 {
            for file in files {
                let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                ckpt_cli::stats::part(&name, serde_json::from_slice(&text).context("statistics")?);
            }
            self.stats.write()?;
        }
        Ok(ExitCode::from(code))
    }

    /// The stages of this dump.
    #[must_use]
    pub fn pipeline(&self) -> Pipeline {
        let (sockets, others): (Vec<_>, Vec<_>) =
            self.external.iter().partition(|external| ckpt_cli::is_socket(external));
        let scan = stage("ckpt-scan", |words| {
            words.verbose(self.verbose);
            words.flag("--kill", self.kill);
            words.flag("--leave-stopped", self.leave_stopped);
            words.flag("--snapshot", self.snapshot);
            words.flag("--share", self.share);
            words.option("--track", &self.track);
            words.option("--parent", &self.parent);
            words.option("--ghost-limit", &self.ghost_limit);
            words.option("--freeze-timeout", &self.freeze_timeout);
            words.option("--external", others);
            words.0.extend(["-t".into(), self.tree.clone()]);
        });
        let sk = stage("ckpt-sk", |words| {
            words.verbose(self.verbose);
            words.option("--external", sockets);
            words.option("--queued", &self.queued);
        });
        let write = stage("ckpt-write", |words| {
            words.verbose(self.verbose);
            words.option("--compress", &self.compress);
            words.option("--parent", &self.parent);
            words.0.push(path(&self.dir));
        });
        Pipeline { stages: vec![scan, sk, write] }
    }
}

impl Restore {
    /// The stages of this restore.
    #[must_use]
    pub fn pipeline(&self) -> Pipeline {
        let edited = !(self.connect.is_empty()
            && self.accept.is_empty()
            && self.close.is_empty()
            && self.drop_queues.is_empty());
        let restore = stage("ckpt-restore", |words| {
            words.verbose(self.verbose);
            words.flag("--detach", self.detach);
            words.flag("--leave-stopped", self.leave_stopped);
            words.flag("--replace", self.replace);
            words.flag("--new-pidns", self.new_pidns);
            words.flag("--lazy", self.lazy);
            words.option("--pidfile", &self.pidfile);
            words.option("--inherit-fd", &self.inherit_fd);
            words.option("--external", &self.external);
            words.option("--retry", &self.retry);
            words.option("--timeout", &self.timeout);
            words.option("--files", &self.files);
            words.option("--stats", &self.stats.file);
            if !edited {
                words.0.push(path(&self.dir));
            }
        });
        if !edited {
            return Pipeline { stages: vec![restore] };
        }
        let read = stage("ckpt-read", |words| {
            words.verbose(self.verbose);
            words.0.push(path(&self.dir));
        });
        let rewrite = stage("sk-rewrite", |words| {
            words.verbose(self.verbose);
            words.option("--connect", &self.connect);
            words.option("--accept", &self.accept);
            words.option("--close", &self.close);
            words.option("--drop-queues", &self.drop_queues);
        });
        Pipeline { stages: vec![read, rewrite, restore] }
    }
}

/// A path that no option parser takes for an option.
fn path(dir: &std::path::Path) -> OsString {
    match dir.as_os_str().as_encoded_bytes().first() {
        Some(b'-') => std::path::Path::new(".").join(dir).into(),
        _ => dir.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(line: &str) -> String {
        let args = Args::try_parse_from(std::iter::once("ckpt").chain(line.split(' '))).unwrap();
        match args.command {
            Verb::Dump(dump) => dump.pipeline().to_string(),
            Verb::Restore(restore) => restore.pipeline().to_string(),
            Verb::Other(words) => format!("{words:?}"),
        }
    }

    #[test]
    fn the_pipelines_are_those_of_the_manual() {
        assert_eq!(shown("dump -t 4711 -D d"), "ckpt-scan -t 4711 | ckpt-sk | ckpt-write d");
        assert_eq!(
            shown("dump -t 4711 --dir=-d --kill --external 48213:/a --external pipe:[5]"),
            "ckpt-scan --kill '--external=pipe:[5]' -t 4711 | ckpt-sk --external=48213:/a | ckpt-write ./-d"
        );
        assert_eq!(shown("restore -D d --detach"), "ckpt-restore --detach d");
        assert_eq!(
            shown("restore -D d --connect 48213=/b"),
            "ckpt-read d | sk-rewrite --connect=48213=/b | ckpt-restore"
        );
        assert_eq!(shown("show --tree d"), r#"["show", "--tree", "d"]"#);
    }
}
