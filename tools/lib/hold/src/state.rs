//! What stages have said, shared by the thread that hears them and the one that waits.

use std::{
    collections::{BTreeMap, VecDeque},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{Outcome, PipeId, Request};

/// How long the tree is stopped.
#[derive(Debug)]
pub(crate) struct Freeze {
    /// What it took to stop all of it.
    pub(crate) freezing: Duration,
    /// When that was done.
    pub(crate) since: Instant,
    /// How long it has been stopped, if it runs again.
    pub(crate) over: Option<Duration>,
}

/// What is known.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Whether requests are taken, and those that are not answered yet.
    pub(crate) answers: bool,
    pub(crate) requests: VecDeque<Request>,
    /// Who wants to hear of COMMIT.
    pub(crate) tell: Vec<UnixStream>,
    pub(crate) freeze: Option<Freeze>,
    /// Stages that hold now, by connection.
    pub(crate) holding: BTreeMap<u64, String>,
    /// Stages that have taken a hold, ever.
    pub(crate) came: Vec<String>,
    /// Stages that released properly.
    pub(crate) gone: Vec<String>,
    pub(crate) committed: bool,
    /// Which stage has failed first, and why.
    pub(crate) failed: Option<(String, String)>,
    /// A stage has come and gone without a word: it could not speak. Those that are missing will not come then.
    pub(crate) mute: bool,
    /// The reader of the stream has ended before it has read all of it.
    pub(crate) unread: bool,
    /// The holder ends.
    pub(crate) stop: bool,
    /// Pipes that stages read and the ones that they hand on into.
    pub(crate) passes: Vec<(PipeId, PipeId)>,
    /// The pipe that the writer reads.
    pub(crate) takes: Option<PipeId>,
    /// Bytes of pages that it has read.
    pub(crate) taken: u64,
    /// The directory that it fills.
    pub(crate) directory: Option<OwnedFd>,
}

impl State {
    /// Whether what goes into `pipe` arrives at the writer through stages that we know.
    pub(crate) fn leads_to_writer(&self, mut pipe: PipeId) -> bool {
        // Each stage at most once.
        for _ in 0..=self.passes.len() {
            if self.takes == Some(pipe) {
                return true;
            }
            let Some((_, out)) = self.passes.iter().find(|(input, _)| *input == pipe) else { return false };
            pipe = *out;
        }
        false
    }

    /// Whether all these stages have come and released.
    pub(crate) fn have_gone(&self, needs: &[&str]) -> bool {
        needs.iter().all(|need| self.gone.iter().any(|stage| stage == need))
    }

    /// Those of these stages that have not come yet.
    pub(crate) fn missing(&self, needs: &[&str]) -> Vec<String> {
        let absent = needs.iter().filter(|&need| !self.came.iter().any(|stage| stage == need));
        absent.map(|&need| need.to_owned()).collect()
    }

    /// Why nothing can come of the checkpoint any more, if so.
    pub(crate) fn failure(&self) -> Option<Outcome> {
        match &self.failed {
            Some((stage, reason)) => Some(Outcome::Failed { stage: stage.clone(), reason: reason.clone() }),
            None if self.unread => Some(Outcome::Unread),
            None => None,
        }
    }
}

/// It, and whoever waits for it to change.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves plain data behind, good enough to go on with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.lock());
        self.changed.notify_all();
    }
}
