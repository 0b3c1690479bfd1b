//! `ckpt dump --pre-dump`: memory is copied in rounds while the tree runs, then the tree is frozen for the rest.
//!
//! ```text
//! ckpt-track -t PID &
//! ckpt-scan --track A --pre-dump | ckpt-write DIR.pre-1
//! ckpt-scan --track A --pre-dump --parent DIR.pre-1 | ckpt-write --parent DIR.pre-1 DIR.pre-2
//! ...                                        as long as the rounds get smaller
//! ckpt-scan --track A --parent DIR.pre-N | ckpt-sk | ckpt-write --parent DIR.pre-N DIR
//! ckpt-merge --in-place DIR                  DIR is a checkpoint like any other
//! rm -r DIR.pre-*
//! ```
//!
//! From the last ckpt-write on DIR can be restored, with or without the last two steps. If that does not come to
//! be, the other directories are of no use, and are removed.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
};

use anyhow::Context;

use crate::{Dump, Pipeline, Stage, path, pipeline, stage, trace};

/// A round that stores more than this share of the round before, in percent, is the last.
const SHRINKS: u64 = 75;

/// A round that stores no more pages than this is the last: the freeze would not notice them.
const FEW: u64 = 64;

/// Runs the rounds and the dump.
///
/// # Errors
/// Programs that can't be started, directories that can't be removed; a stage that fails is seen in the status.
pub fn run(dump: &Dump, rounds: u32, show: bool) -> anyhow::Result<ExitCode> {
    ckpt_cli::set_verbosity(dump.verbose);
    let mut made = Rounds { dirs: Vec::new(), kept: false };
    let tracker;
    let address = match &dump.track {
        Some(address) => address.clone(),
        None => match Tracker::start(dump, show)? {
            Ok(started) => {
                tracker = started;
                tracker.address.clone()
            }
            Err(code) => return Ok(code),
        },
    };
    let figures = tempfile::NamedTempFile::new().context("make a temporary file")?;
    let mut parent = dump.parent.clone();
    let mut before = u64::MAX;
    for round in 1..=rounds {
        let mut name = dump.dir.clone().into_os_string();
        name.push(format!(".pre-{round}"));
        let dir = PathBuf::from(name);
        let pipeline = dump.ahead(&address, parent.as_ref(), &dir, figures.path());
        trace(show, &pipeline);
        let code = pipeline.run()?;
        if code != 0 {
            return Ok(code.into());
        }
        parent = Some(dir.clone().into_os_string());
        made.dirs.push(dir);
        let stored = written(figures.path())?;
        ckpt_cli::note!(1, "round {round}: {stored} pages");
        if stored <= FEW || stored.saturating_mul(100) > before.saturating_mul(SHRINKS) {
            break;
        }
        before = stored;
    }
    // Its pages are compressed when they are merged.
    let last = Dump { track: Some(address), parent, compress: None, ..dump.clone() };
    let code = if last.stats.file.is_some() { last.run_with_stats(show)? } else { last.run_pipeline(show)? };
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    made.kept = true;
    let fold = stage("ckpt-merge", |words| {
        words.verbose(dump.verbose);
        words.flag("--in-place", true);
        // Those before the first round stay where they are.
        words.option("--onto", &dump.parent);
        words.option("--compress", &dump.compress);
        words.0.push(path(&dump.dir));
    });
    let pipeline = Pipeline { stages: vec![fold] };
    trace(show, &pipeline);
    let code = pipeline.run()?;
    made.kept = code != 0;
    if made.kept {
        let shown = dump.dir.display();
        ckpt_cli::warn(&format!(
            "{shown} is complete, but needs {shown}.pre-*: it could not be merged with them"
        ));
    }
    Ok(code.into())
}

/// Directories of the rounds; removed in the end, unless the dump needs them.
struct Rounds {
    dirs: Vec<PathBuf>,
    kept: bool,
}

impl Drop for Rounds {
    fn drop(&mut self) {
        // The last first: what is left, if this process is killed, is a chain still.
        for dir in self.dirs.iter().rev().filter(|_| !self.kept) {
            if let Err(error) = std::fs::remove_dir_all(dir) {
                ckpt_cli::warn(&format!("{}: remove: {error}", dir.display()));
            }
        }
    }
}

/// A `ckpt-track` that ends with this.
struct Tracker {
    child: Child,
    address: OsString,
}

impl Tracker {
    /// Starts it and waits until it tracks. Inside: the status with which it ended instead.
    fn start(dump: &Dump, show: bool) -> anyhow::Result<Result<Self, ExitCode>> {
        let name = format!("ckpt-dump-{}-{}", dump.tree.display(), std::process::id());
        let track = stage("ckpt-track", |words| {
            words.verbose(dump.verbose);
            words.option("--address", [&OsString::from(&name)]);
            words.option("--freeze-timeout", &dump.freeze_timeout);
            words.0.extend(["-t".into(), dump.tree.clone()]);
        });
        let Stage { program, args } = track.clone();
        trace(show, &Pipeline { stages: vec![track] });
        let mut command = Command::new(pipeline::find(&program));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let child = ckpt_sys::spawn::end_with_us(&mut command).spawn().context("run ckpt-track")?;
        let mut tracker = Self { child, address: name.into() };
        let mut line = String::new();
        if let Some(output) = tracker.child.stdout.take() {
            BufReader::new(output).read_line(&mut line).context("ckpt-track")?;
        }
        if line.is_empty() {
            let status = tracker.child.wait().context("ckpt-track")?;
            return Ok(Err(pipeline::code(status).max(1).into()));
        }
        Ok(Ok(tracker))
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pages that a round has stored, from the figures of its ckpt-scan.
fn written(figures: &Path) -> anyhow::Result<u64> {
    let text = std::fs::read(figures).with_context(|| figures.display().to_string())?;
    let figures: serde_json::Value = serde_json::from_slice(&text).context("statistics")?;
    figures["pages"]["written"].as_u64().context("statistics: pages written")
}

impl Dump {
    /// The stages of a round.
    fn ahead(&self, address: &OsString, parent: Option<&OsString>, dir: &Path, figures: &Path) -> Pipeline {
        let scan = stage("ckpt-scan", |words| {
            words.verbose(self.verbose);
            words.flag("--pre-dump", true);
            words.flag("--share", self.share);
            words.option("--track", [address]);
            words.option("--parent", parent);
            words.option("--freeze-timeout", &self.freeze_timeout);
            words.option("--stats", [&figures.as_os_str().to_owned()]);
            words.0.extend(["-t".into(), self.tree.clone()]);
        });
        let write = stage("ckpt-write", |words| {
            words.verbose(self.verbose);
            words.option("--parent", parent);
            words.0.push(path(dir));
        });
        Pipeline { stages: vec![scan, write] }
    }

    fn run_pipeline(&self, show: bool) -> anyhow::Result<ExitCode> {
        let pipeline = self.pipeline();
        trace(show, &pipeline);
        Ok(pipeline.run()?.into())
    }
}
