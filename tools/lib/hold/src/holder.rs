//! `ckpt-scan`'s end: what it waits for.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{Arc, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ckpt_sys::gift::Lending;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    HoldError, MAX_LINE, PipeId, WRITER, one_line, send_with_right,
    server::Server,
    state::{Freeze, Shared, State},
};

/// How a wait ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All that was waited for has come and gone.
    Released,
    /// The same, and a writer has said COMMIT.
    Committed,
    /// A stage failed, or its connection broke.
    Failed {
        /// Its name.
        stage: String,
        /// Its words.
        reason: String,
    },
    /// Nobody reads the stream any more, and not all of it has been read.
    Unread,
    /// Not the end: a stage asks for something. It is to be answered, and the wait to go on.
    Asked(Request),
    /// These stages did not come in time.
    NobodyCame {
        /// Which.
        missing: Vec<String>,
    },
}

/// What a stage asks of the holder.
#[derive(Debug, Clone)]
pub struct Request {
    /// What for, and about which process: `ARM 4711`.
    pub text: String,
    pub(crate) socket: Arc<UnixStream>,
}

impl PartialEq for Request {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Request {}

impl Request {
    /// Answers it: text and a descriptor, or why not. Whoever does not hear it is gone, which the wait tells.
    pub fn answer(&self, answer: Result<(String, Option<OwnedFd>), String>) {
        let (text, fd) = match answer {
            Ok((text, fd)) => (format!("OK {}", one_line(&text)), fd),
            Err(reason) => (format!("NO {}", one_line(&reason)), None),
        };
        let mut text = text;
        while text.len() > MAX_LINE / 2 {
            text.pop();
        }
        text.push('\n');
        let _ = send_with_right(&self.socket, &text, fd.as_ref().map(AsFd::as_fd));
    }
}

/// Tells those who ask [`Hold::times`]; the clock runs until it is dropped.
#[derive(Debug)]
pub struct Clock(Arc<Shared>);

impl Drop for Clock {
    fn drop(&mut self) {
        self.0.change(|state| {
            if let Some(freeze) = &mut state.freeze {
                freeze.over = Some(freeze.since.elapsed());
            }
        });
    }
}

/// What tells `ckpt-scan` that pages which it gave to its output are referred to by nothing any more.
#[derive(Debug)]
pub struct Taken {
    shared: Arc<Shared>,
    output: PipeId,
}

impl Lending for Taken {
    /// Whether a writer tells how far it has come with what goes into the pipe, and no other program can have kept any
    /// of it.
    fn known(&self) -> bool {
        self.shared.lock().leads_to_writer(self.output)
    }

    /// EPIPE if a stage fails before.
    fn wait(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.shared.lock();
        while state.taken < bytes {
            if state.stop || state.failure().is_some() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn directory(&self) -> Option<OwnedFd> {
        let state = self.shared.lock();
        let known = state.leads_to_writer(self.output);
        state.directory.as_ref().filter(|_| known)?.try_clone().ok()
    }
}

/// The holder's end, in `ckpt-scan`. Dropping it closes the socket.
#[derive(Debug)]
pub struct Holder {
    name: Vec<u8>,
    shared: Arc<Shared>,
    /// Closing it ends the thread.
    wake: Option<UnixStream>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Holder {
    /// Makes the control socket and starts the thread that serves it.
    ///
    /// # Errors
    /// See [`HoldError`].
    pub fn bind() -> Result<Self, HoldError> {
        let failed = |call| move |source| HoldError::Bind { call, source };
        let mut random = [0; 16];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(failed("read /dev/urandom"))?;
        let name = format!("ckpt-hold-{:032x}", u128::from_ne_bytes(random)).into_bytes();
        let address = SocketAddr::from_abstract_name(&name).map_err(failed("name"))?;
        let listener = UnixListener::bind_addr(&address).map_err(failed("bind"))?;
        listener.set_nonblocking(true).map_err(failed("set non-blocking"))?;
        let (wake, woken) = UnixStream::pair().map_err(failed("socketpair"))?;
        let shared = Arc::new(Shared::default());
        let server = Server::new(listener, woken, Arc::clone(&shared));
        let thread = thread::Builder::new()
            .name("hold".to_owned())
            .spawn(move || server.serve())
            .map_err(failed("start a thread"))?;
        Ok(Self { name, shared, wake: Some(wake), thread: Some(thread) })
    }

    /// Name of the socket in the abstract namespace, without the leading NUL; goes into `hello.control`.
    #[must_use]
    pub fn address(&self) -> &[u8] {
        &self.name
    }

    /// From here on waits end as [`Outcome::Asked`] when a stage asks for something.
    pub fn answer_requests(&self) {
        self.shared.lock().answers = true;
    }

    /// Whether every stage in `needs` has taken a hold.
    #[must_use]
    pub fn all_came(&self, needs: &[&str]) -> bool {
        self.shared.lock().missing(needs).is_empty()
    }

    /// Closes `output`, the stream that has been written as a whole, when it has been read. If its reader ends
    /// before that, which a writer that has closed its pipe would never hear of, waits end as [`Outcome::Unread`].
    /// Anything but a pipe is closed at once.
    pub fn close_when_read(&self, output: File) {
        let shared = Arc::clone(&self.shared);
        // Without a thread, the pipe is closed and the wait has its timeout.
        let _ = thread::Builder::new().name("output".to_owned()).spawn(move || {
            let left = || ckpt_sys::file::readable_bytes(output.as_fd()).is_ok_and(|bytes| bytes > 0);
            while !shared.lock().stop && left() {
                let mut fds = [PollFd::new(output.as_fd(), PollFlags::empty())];
                match poll(&mut fds, PollTimeout::from(1_u8)) {
                    // POLLERR: no reader (pipe(7), poll(2)).
                    Ok(n) if n > 0 => {
                        // It may have read the rest and ended since the last look.
                        if left() {
                            shared.change(|state| state.unread = true);
                        }
                        return;
                    }
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(_) => return,
                }
            }
        });
    }

    /// The tree is stopped since `since`, and to stop it took `freezing`. It runs when the clock is dropped.
    #[must_use]
    pub fn clock(&self, freezing: Duration, since: Instant) -> Clock {
        self.shared.change(|state| state.freeze = Some(Freeze { freezing, since, over: None }));
        Clock(Arc::clone(&self.shared))
    }

    /// What tells how far the writer has come with what goes into `output`.
    #[must_use]
    pub fn taken_from(&self, output: PipeId) -> Taken {
        Taken { shared: Arc::clone(&self.shared), output }
    }

    /// Blocks until every stage in `needs` has come and gone, whoever else still holds, or until a stage
    /// fails. For a tree of which a snapshot has been taken: the writer need not be done before it may run.
    #[must_use]
    pub fn passed(&self, needs: &[&str], attach_timeout: Duration) -> Outcome {
        self.wait_for(attach_timeout, |state| {
            if state.have_gone(needs) { Ok(Outcome::Released) } else { Err(state.missing(needs)) }
        })
    }

    /// Blocks until every stage in `needs` has come and gone, every hold is released and, with
    /// `commit`, a writer has said COMMIT; or until a stage fails. `attach_timeout` bounds only the
    /// waiting for stages that have not come yet: one that holds may take as long as it lives.
    #[must_use]
    pub fn wait(&self, needs: &[&str], commit: bool, attach_timeout: Duration) -> Outcome {
        self.wait_for(attach_timeout, |state| {
            // Who wants to hear of it waits for it.
            let commit = commit || !state.tell.is_empty();
            if state.holding.is_empty() && state.have_gone(needs) && (!commit || state.committed) {
                return Ok(if state.committed { Outcome::Committed } else { Outcome::Released });
            }
            // Whoever else is to come may do so while somebody holds.
            if !state.holding.is_empty() {
                return Err(Vec::new());
            }
            let mut missing = state.missing(needs);
            // A writer that released without COMMIT will not say it any more.
            if commit && !state.committed {
                missing.push(WRITER.to_owned());
            }
            Err(missing)
        })
    }

    /// Blocks until `look` gives an outcome, a stage fails or one asks for something. Until then it gives the stages that
    /// are missing; if any are, and the time is over, nobody waits for them any longer.
    fn wait_for(
        &self,
        attach_timeout: Duration,
        look: impl Fn(&State) -> Result<Outcome, Vec<String>>,
    ) -> Outcome {
        let deadline = Instant::now() + attach_timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = state.failure() {
                return failure;
            }
            if let Some(request) = state.requests.pop_front() {
                return Outcome::Asked(request);
            }
            let missing = match look(&state) {
                Ok(outcome) => return outcome,
                Err(missing) => missing,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            state = if missing.is_empty() {
                self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else if left.is_zero() || state.mute {
                return Outcome::NobodyCame { missing };
            } else {
                self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.wake.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
