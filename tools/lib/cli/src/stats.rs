//! Figures of one run, as a JSON object: `--stats FILE|-`.
//!
//! They are gathered from wherever something is counted, so there is one set for the whole process. The format is
//! documented in ckpt(7): keys may be added, none is removed and none changes its meaning without another
//! number after `ckpt_stats`.

use std::{
    ffi::OsString,
    io::Write,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::{Map, Value, json};

/// Number of the format.
const FORMAT: u64 = 1;

/// The option; flatten it into the `Args` of a tool that has figures.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StatsOption {
    /// Write figures of this run as JSON to FILE (-: standard error)
    #[arg(long = "stats", value_name = "FILE")]
    pub file: Option<OsString>,
}

#[derive(Debug)]
struct State {
    start: Instant,
    phase: Option<(&'static str, Instant)>,
    /// `seconds`, `pages`, ...: each an object of figures.
    groups: Map<String, Value>,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn add(&mut self, group: &str, name: &str, figure: Value) {
        let group = self.groups.entry(group).or_insert_with(|| json!({}));
        if let Value::Object(group) = group {
            group.insert(name.to_owned(), figure);
        }
    }

    fn end_phase(&mut self) {
        if let Some((name, since)) = self.phase.take() {
            self.add("seconds", name, since.elapsed().as_secs_f64().into());
        }
    }
}

impl StatsOption {
    /// Starts the clock, if figures are wanted.
    pub fn begin(&self) {
        if self.file.is_some() {
            begin();
        }
    }

    /// Writes the figures, if they were asked for.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self) -> anyhow::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let Some(mut state) = state().take() else { return Ok(()) };
        state.end_phase();
        state.add("seconds", "total", state.start.elapsed().as_secs_f64().into());
        let mut all = Map::new();
        all.insert("ckpt_stats".to_owned(), FORMAT.into());
        all.insert("tool".to_owned(), crate::tool().into());
        all.extend(state.groups);
        let text = format!("{}\n", Value::Object(all));
        if file == "-" {
            return std::io::stderr().write_all(text.as_bytes()).context("write statistics");
        }
        std::fs::write(file, text).with_context(|| format!("{}: write statistics", file.display()))
    }
}

/// Starts the clock for figures that are read with [`taken`].
pub fn begin() {
    *state() = Some(State { start: Instant::now(), phase: None, groups: Map::new() });
}

/// How long a phase that has ended took; without a name, all of it so far.
#[must_use]
pub fn taken(name: Option<&str>) -> Duration {
    let state = state();
    let Some(state) = state.as_ref() else { return Duration::ZERO };
    let Some(name) = name else { return state.start.elapsed() };
    let seconds = state.groups.get("seconds").and_then(|group| group.get(name)).and_then(Value::as_f64);
    Duration::try_from_secs_f64(seconds.unwrap_or_default()).unwrap_or_default()
}

/// What is timed from here on is called `name`; what was before has ended.
pub fn phase(name: &'static str) {
    if let Some(state) = state().as_mut() {
        state.end_phase();
        state.phase = Some((name, Instant::now()));
    }
}

/// A time that is no phase.
pub fn seconds(name: &str, time: Duration) {
    if let Some(state) = state().as_mut() {
        state.add("seconds", name, time.as_secs_f64().into());
    }
}

/// A number in a group such as `pages`.
pub fn count(group: &str, name: &str, number: u64) {
    if let Some(state) = state().as_mut() {
        state.add(group, name, number.into());
    }
}

/// The figures of a part that was a program of its own.
pub fn part(tool: &str, figures: Value) {
    if let Some(state) = state().as_mut() {
        state.add("stages", tool, figures);
    }
}
