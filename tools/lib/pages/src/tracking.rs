//! `--track`, `--parent`: this checkpoint as an increment of another.

use std::{
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_kinds::mem::track::Tracked;
use ckpt_sys::Pid;
use ckpt_tracking::{Id, Session, TrackError, Verdict, start_time};

/// What a checkpoint is called, and how it continues an earlier one.
#[derive(Debug)]
pub struct Tracking {
    /// Its own id.
    pub id: Id,
    /// The id of its parent, if it is an increment.
    pub parent: Option<Id>,
    /// Its session with the tracker, if there is one.
    session: Option<Session>,
}

impl Tracking {
    /// Begins a checkpoint of a new id. With a parent it is an increment if the tracker at `address` vouches for that;
    /// else, or if that has ended, it is full, and a warning says why.
    ///
    /// # Errors
    /// There is no such parent, or the tracker is somebody else's.
    pub fn begin(address: Option<&str>, parent: Option<&PathBuf>) -> anyhow::Result<Self> {
        let mut id = Id::default();
        File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut id)).context("/dev/urandom")?;
        Self::join(id, address, parent)
    }

    /// The same for a checkpoint that has an id.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn join(id: Id, address: Option<&str>, parent: Option<&PathBuf>) -> anyhow::Result<Self> {
        let Some(address) = address else { return Ok(Self { id, parent: None, session: None }) };
        let mut parent = parent.map(|dir| id_of(dir)).transpose()?;
        let session = match Session::begin(address, parent) {
            Ok(session) => session,
            Err(error @ TrackError::Gone { .. }) => {
                ckpt_cli::warn(&format!("the checkpoint is full and not tracked: {error}"));
                return Ok(Self { id, parent: None, session: None });
            }
            Err(error) => return Err(error.into()),
        };
        if let (Verdict::Full(why), true) = (session.verdict(), parent.is_some()) {
            ckpt_cli::warn(&format!("the checkpoint is full, not an increment: {why}"));
            parent = None;
        }
        Ok(Self { id, parent, session: Some(session) })
    }

    /// Whether a tracker takes part.
    #[must_use]
    pub fn on(&self) -> bool {
        self.session.is_some()
    }

    /// Puts a process under tracking, if it is not: `arm` makes a userfaultfd in it. One that can't be is stored in full.
    pub fn watch(&mut self, pid: Pid, arm: impl FnOnce() -> anyhow::Result<OwnedFd>) {
        let Some(session) = &mut self.session else { return };
        let watch = || -> anyhow::Result<()> {
            let start_time = start_time(pid)?;
            if !session.watches(pid, start_time) {
                session.watch(pid, start_time, arm()?)?;
            }
            Ok(())
        };
        if let Err(error) = watch() {
            let error = ckpt_cli::describe(&error);
            ckpt_cli::warn(&format!("pid {pid} is stored in full: {error}"));
        }
    }

    /// Whether a checkpoint is to be an increment.
    #[must_use]
    pub fn increment(&self) -> bool {
        self.parent.is_some()
    }

    /// Whether the writes of `pid` are tracked.
    #[must_use]
    pub fn tracks(&self, pid: Pid) -> bool {
        self.session.as_ref().is_some_and(|session| session.uffd(pid).is_some())
    }

    /// How the writes of `pid` are tracked. `faulting`: a thread of it was stopped outside of a system call.
    #[must_use]
    pub fn of(&self, pid: Pid, faulting: bool) -> Option<Tracked<'_>> {
        let uffd = self.session.as_ref()?.uffd(pid)?;
        Some(Tracked { uffd, increment: self.increment(), faulting })
    }

    /// The checkpoint is durable, or not known to be.
    pub fn end(self, durable: bool) {
        let Some(session) = self.session else { return };
        let why = if durable {
            let Err(error) = session.commit(self.id) else { return };
            ckpt_cli::describe(&error.into())
        } else {
            "no ckpt-write has said that this checkpoint is durable".to_owned()
        };
        ckpt_cli::warn(&format!("the next checkpoint can't be an increment: {why}"));
    }
}

/// The id of the checkpoint in `dir`.
fn id_of(dir: &Path) -> anyhow::Result<Id> {
    let what = || dir.display().to_string();
    let id = ImageSet::id_of_dir(dir).with_context(what)?;
    match id.and_then(|id| id.try_into().ok()) {
        Some(id) => Ok(id),
        None => bail!("{}: no checkpoint that can be a parent: it has no id", dir.display()),
    }
}
