//! The hold protocol: how the stages behind `ckpt-scan` tell it when the frozen tree may go on.
//!
//! `ckpt-scan` keeps the tree frozen by being its tracer. Stages that look at the live tree
//! (`ckpt-mem`, `ckpt-sk`) need it to stay so until they are done, and with `--kill` the tree may be
//! killed only after `ckpt-write` has put the directory safely in place. So `ckpt-scan` listens on a
//! unix stream socket with a random abstract name, which is the first thing in the stream
//! (`hello.control`), and the stages connect to it. Lines of ASCII, each answered by `OK`:
//!
//! ```text
//! stage                holder
//! HOLD mem        ->          the tree stays frozen while this connection is open
//!                 <-   OK
//! RELEASE         ->          done with the tree
//!                 <-   OK
//! or COMMIT       ->          (ckpt-write) the directory is durable under its final name
//! or FAIL reason  ->          the checkpoint will not come to be
//! TIMES           ->          (after HOLD) how long has the tree been stopped?
//!                 <-   OK 1200 84000      to stop it took 1.2 ms, and it was or is stopped for 84
//!
//! PASSES in out   ->          the stage hands on what it reads from pipe `in` into pipe `out`, and keeps none of it
//!                 <-   OK
//! TAKES in        ->          (ckpt-write) the stage reads pipe `in` and says how far it has come:
//!   + a directory <-   OK     into which pages may be written instead
//! TOOK bytes      ->          of pages so far, which are in no pipe any more (no answer)
//! ```
//!
//! The last three let ckpt-scan use the memory again that it has lent to a pipe ([`Taken`]): a pipe itself does
//! not tell when its reader is done. They count only if they join up from ckpt-scan's output to the writer, by the
//! device and inode numbers of the pipes (fstat(2)): then no program that we don't know can have kept a page, and none
//! needs to see them. So ckpt-scan may write pages into the files that the writer is about to make, in the directory whose
//! descriptor came with TAKES, and only tell of them in the stream.
//!
//! ckpt-mem can ask for what only the tracer of a tree can do or knows, if that answers at all (`ckpt-scan --no-mem`);
//! the answer is `OK ...` or `NO reason`:
//!
//! ```text
//! TRACKED pid     ->          does a userfaultfd watch memory of this process?
//!                 <-   OK yes|no
//! ARM pid         ->          make a userfaultfd in it
//!                 <-   OK       + the descriptor
//! TWIN pid        ->          fork the tree's memory, if that is not done
//!                 <-   OK pid of the copy of this process, which lives as long as the holder
//! FORGET pid      ->          or until then
//!                 <-   OK
//! DURABLE         ->          before its last word: say so when ckpt-write has said COMMIT
//!                 <-   OK
//!                 <-   DURABLE
//! ```
//!
//! A connection that breaks after HOLD without one of the three last words is a failure: a stage
//! killed with SIGKILL is told from one that is done, and needs no clean-up code for that.
//!
//! An abstract name needs no file system and vanishes with its owner, but it has no permissions:
//! anybody in the network namespace can connect. Therefore the holder asks the kernel who is there
//! (SO_PEERCRED) and closes connections of other users before reading a byte; only its own user
//! and root count. Such strangers can't delay or end a wait.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    str::FromStr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ckpt_sys::{gift::Lending, sock::receive_with_rights};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials},
        stat::{SFlag, fstat},
    },
    unistd::geteuid,
};

/// Longest line of the protocol, bytes.
const MAX_LINE: usize = 4096;
/// Most connections at a time.
const MAX_PEERS: usize = 64;
/// How long a stage waits for the holder's answer. The holder does nothing else, so this is generous.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a hold could not be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The control socket could not be made.
    #[error("control socket: {call}")]
    Bind {
        /// Which step.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nobody listens any more: the holder has ended, and the tree is not frozen.
    #[error("the holder of the frozen tree has ended")]
    Gone,
    /// The holder does not take orders from this user.
    #[error("the holder of the frozen tree refuses uid {uid}; run all stages as the same user")]
    Stranger {
        /// Our effective uid.
        uid: u32,
    },
    /// The connection failed or the answer was not `OK`.
    #[error("control socket: {what}")]
    Broken {
        /// What was being said.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which pipe a descriptor is an end of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipeId {
    dev: u64,
    ino: u64,
}

impl PipeId {
    /// That of `fd`, if it is a pipe.
    #[must_use]
    pub fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        let pipe = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO;
        pipe.then_some(Self { dev: stat.st_dev, ino: stat.st_ino })
    }
}

impl fmt::Display for PipeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.dev, self.ino)
    }
}

impl FromStr for PipeId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (dev, ino) = text.split_once(':').ok_or(())?;
        Ok(Self { dev: dev.parse().map_err(drop)?, ino: ino.parse().map_err(drop)? })
    }
}

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
    socket: Arc<UnixStream>,
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

/// Sends a line, with a descriptor or without; whether all of it went.
fn send_with_right(socket: &UnixStream, line: &str, fd: Option<BorrowedFd<'_>>) -> bool {
    let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let bytes = [io::IoSlice::new(line.as_bytes())];
    sendmsg::<()>(socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)
        .is_ok_and(|n| n == line.len())
}

/// How long a tree is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// From the first thread's stop to the last one's.
    pub freezing: Duration,
    /// From then on until it ran again, or so far.
    pub frozen: Duration,
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

#[derive(Debug)]
struct Freeze {
    freezing: Duration,
    since: Instant,
    over: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether requests are taken, and those that are not answered yet.
    answers: bool,
    requests: VecDeque<Request>,
    /// Who wants to hear of COMMIT.
    tell: Vec<UnixStream>,
    freeze: Option<Freeze>,
    /// Stages that hold now, by connection.
    holding: BTreeMap<u64, String>,
    /// Stages that have taken a hold, ever.
    came: Vec<String>,
    /// Stages that released properly.
    gone: Vec<String>,
    committed: bool,
    failed: Option<(String, String)>,
    unread: bool,
    stop: bool,
    /// Pipes that stages read and the ones that they hand on into.
    passes: Vec<(PipeId, PipeId)>,
    /// The pipe that the writer reads.
    takes: Option<PipeId>,
    /// Bytes of pages that it has read.
    taken: u64,
    /// The directory that it fills.
    directory: Option<OwnedFd>,
}

impl State {
    /// Whether what goes into `pipe` arrives at the writer through stages that we know.
    fn leads_to_writer(&self, mut pipe: PipeId) -> bool {
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

    /// Why nothing can come of the checkpoint any more, if so.
    fn failure(&self) -> Option<Outcome> {
        match &self.failed {
            Some((stage, reason)) => Some(Outcome::Failed { stage: stage.clone(), reason: reason.clone() }),
            None if self.unread => Some(Outcome::Unread),
            None => None,
        }
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

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves plain data behind, good enough to go on with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.lock());
        self.changed.notify_all();
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
        std::fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(failed("read /dev/urandom"))?;
        let name = format!("ckpt-hold-{:032x}", u128::from_ne_bytes(random)).into_bytes();
        let address = SocketAddr::from_abstract_name(&name).map_err(failed("name"))?;
        let listener = UnixListener::bind_addr(&address).map_err(failed("bind"))?;
        listener.set_nonblocking(true).map_err(failed("set non-blocking"))?;
        let (wake, woken) = UnixStream::pair().map_err(failed("socketpair"))?;
        let shared = Arc::new(Shared::default());
        let server = Server { listener, woken, shared: Arc::clone(&shared), peers: Vec::new(), next: 0 };
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
        let state = self.shared.lock();
        needs.iter().all(|need| state.came.iter().any(|stage| stage == need))
    }

    /// Closes `output`, the stream that has been written as a whole, when it has been read. If its reader ends
    /// before that, which a writer that has closed its pipe would never hear of, waits end as [`Outcome::Unread`].
    /// Anything but a pipe is closed at once.
    pub fn close_when_read(&self, output: std::fs::File) {
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
        let deadline = Instant::now() + attach_timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = state.failure() {
                return failure;
            }
            if let Some(request) = state.requests.pop_front() {
                return Outcome::Asked(request);
            }
            let listed = |list: &[String], stage: &str| list.iter().any(|name| name == stage);
            if needs.iter().all(|need| listed(&state.gone, need)) {
                return Outcome::Released;
            }
            let missing: Vec<String> =
                needs.iter().filter(|need| !listed(&state.came, need)).map(|&need| need.to_owned()).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if missing.is_empty() {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if left.is_zero() {
                return Outcome::NobodyCame { missing };
            } else {
                (state, _) =
                    self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Blocks until every stage in `needs` has come and gone, every hold is released and, with
    /// `commit`, a writer has said COMMIT; or until a stage fails. `attach_timeout` bounds only the
    /// waiting for stages that have not come yet: one that holds may take as long as it lives.
    #[must_use]
    pub fn wait(&self, needs: &[&str], commit: bool, attach_timeout: Duration) -> Outcome {
        let deadline = Instant::now() + attach_timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = state.failure() {
                return failure;
            }
            if let Some(request) = state.requests.pop_front() {
                return Outcome::Asked(request);
            }
            // Who wants to hear of it waits for it.
            let commit = commit || !state.tell.is_empty();
            let done = state.holding.is_empty()
                && needs.iter().all(|&need| state.gone.iter().any(|stage| stage == need))
                && (!commit || state.committed);
            if done {
                return if state.committed { Outcome::Committed } else { Outcome::Released };
            }
            let absent = |stage: &str| !state.came.iter().any(|came| came == stage);
            let mut missing: Vec<String> =
                needs.iter().filter(|stage| absent(stage)).map(|&stage| stage.to_owned()).collect();
            // A writer that released without COMMIT will not say it any more.
            if commit && !state.committed && !state.holding.values().any(|stage| stage == WRITER) {
                missing.push(WRITER.to_owned());
            }
            if missing.is_empty() || !state.holding.is_empty() {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Outcome::NobodyCame { missing };
            }
            (state, _) =
                self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The stage that COMMIT is expected of.
const WRITER: &str = "write";

impl Drop for Holder {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.wake.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// To a line of the protocol.
enum Answer {
    /// OK, and what to add.
    Ok(String),
    Silence,
}

/// Whether a line is a request, which is answered by who waits.
fn is_request(line: &str) -> bool {
    line.split_once(' ').is_some_and(|(word, rest)| {
        matches!(word, "TRACKED" | "ARM" | "TWIN" | "FORGET") && rest.parse::<u32>().is_ok()
    })
}

struct Peer {
    id: u64,
    socket: UnixStream,
    buffer: Vec<u8>,
    /// What came with the last bytes.
    fd: Option<OwnedFd>,
    stage: Option<String>,
    /// Has said its last word.
    over: bool,
}

struct Server {
    listener: UnixListener,
    woken: UnixStream,
    shared: Arc<Shared>,
    peers: Vec<Peer>,
    next: u64,
}

impl Server {
    fn serve(mut self) {
        loop {
            let mut fds = vec![
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            fds.extend(self.peers.iter().map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            if self.shared.lock().stop {
                return;
            }
            self.accept();
            let shared = &self.shared;
            self.peers.retain_mut(|peer| peer.serve(shared));
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    let friend = getsockopt(&socket, PeerCredentials)
                        .is_ok_and(|peer| peer.uid() == geteuid().as_raw() || peer.uid() == 0);
                    if !friend || self.peers.len() >= MAX_PEERS || socket.set_nonblocking(true).is_err() {
                        continue;
                    }
                    self.next += 1;
                    self.peers.push(Peer {
                        id: self.next,
                        socket,
                        buffer: Vec::new(),
                        fd: None,
                        stage: None,
                        over: false,
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // Out of descriptors: somebody may close one.
                    thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
        }
    }
}

impl Peer {
    /// Reads what is there; false when the connection is to be closed.
    fn serve(&mut self, shared: &Shared) -> bool {
        let mut chunk = [0; 512];
        loop {
            match receive_with_rights(self.socket.as_fd(), &mut chunk) {
                Ok((0, _)) => return self.broken(shared, "it ended without a word"),
                Ok((n, mut fds)) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    self.fd = fds.pop().or(self.fd.take());
                }
                Err(e) if e.errno == Errno::EAGAIN => return true,
                Err(e) if e.errno == Errno::EINTR => continue,
                Err(e) => return self.broken(shared, &format!("its connection broke: {}", e.errno)),
            }
            while let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let Some(answer) = self.line(&line, shared) else {
                    return self.broken(shared, &format!("it said {line:?}, which is not in the protocol"));
                };
                if let Answer::Ok(more) = answer
                    && self.socket.write_all(format!("OK{more}\n").as_bytes()).is_err()
                    && !self.over
                {
                    return self.broken(shared, "it ended without a word");
                }
            }
            if self.buffer.len() > MAX_LINE {
                return self.broken(shared, "it sent an endless line");
            }
        }
    }

    /// What to answer; `None` for what is not in the protocol.
    fn line(&mut self, line: &str, shared: &Shared) -> Option<Answer> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (word, self.over, &self.stage) {
            ("HOLD", false, None) if !rest.is_empty() => {
                self.stage = Some(rest.to_owned());
                shared.change(|state| {
                    state.came.push(rest.to_owned());
                    state.holding.insert(self.id, rest.to_owned());
                });
            }
            ("RELEASE" | "COMMIT", false, Some(stage)) => {
                self.over = true;
                shared.change(|state| {
                    state.holding.remove(&self.id);
                    state.gone.push(stage.clone());
                    state.committed |= word == "COMMIT";
                    for mut socket in state.tell.iter().filter(|_| word == "COMMIT") {
                        // Whoever is gone needs no answer.
                        let _ = socket.write_all(b"DURABLE\n");
                    }
                });
            }
            ("FAIL", false, Some(stage)) => {
                self.over = true;
                shared.change(|state| {
                    state.holding.remove(&self.id);
                    state.failed.get_or_insert_with(|| (stage.clone(), rest.to_owned()));
                });
            }
            ("DURABLE", false, Some(_)) if rest.is_empty() => {
                let Ok(socket) = self.socket.try_clone() else { return None };
                shared.change(|state| state.tell.push(socket));
            }
            (_, false, Some(_)) if is_request(line) => {
                let Ok(socket) = self.socket.try_clone() else { return None };
                let request = Request { text: line.to_owned(), socket: Arc::new(socket) };
                if shared.lock().answers {
                    shared.change(|state| state.requests.push_back(request));
                } else {
                    let why = "ckpt-scan has done that itself (it runs without --no-mem)";
                    request.answer(Err(why.to_owned()));
                }
                return Some(Answer::Silence);
            }
            ("TIMES", false, Some(_)) => {
                let state = shared.lock();
                let times = state.freeze.as_ref().map(|freeze| {
                    let frozen = freeze.over.unwrap_or_else(|| freeze.since.elapsed());
                    format!(" {} {}", freeze.freezing.as_micros(), frozen.as_micros())
                });
                return Some(Answer::Ok(times.unwrap_or_default()));
            }
            ("PASSES", false, _) => {
                let (from, to) = rest.split_once(' ')?;
                let pipes = (from.parse().ok()?, to.parse().ok()?);
                shared.change(|state| state.passes.push(pipes));
            }
            ("TAKES", false, Some(_)) => {
                let pipe = rest.parse().ok()?;
                let directory = self.fd.take();
                shared.change(|state| (state.takes, state.directory) = (Some(pipe), directory));
            }
            ("TOOK", false, Some(_)) => {
                let bytes = rest.parse().ok()?;
                shared.change(|state| state.taken = bytes);
                return Some(Answer::Silence);
            }
            _ => return None,
        }
        Some(Answer::Ok(String::new()))
    }

    /// The connection is over; a failure unless the stage had nothing or no more to say.
    fn broken(&mut self, shared: &Shared, reason: &str) -> bool {
        if let (false, Some(stage)) = (self.over, &self.stage) {
            shared.change(|state| {
                state.holding.remove(&self.id);
                state.failed.get_or_insert_with(|| (stage.clone(), reason.to_owned()));
            });
        }
        false
    }
}

/// A stage's hold on the frozen tree. Dropped without a last word it counts as a failure.
#[derive(Debug)]
pub struct Hold {
    socket: UnixStream,
}

impl Hold {
    fn connect(control: &[u8]) -> Result<Self, HoldError> {
        let failed = |source| HoldError::Broken { what: "connect", source };
        let address = SocketAddr::from_abstract_name(control).map_err(failed)?;
        let socket = UnixStream::connect_addr(&address).map_err(|source| match source.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => HoldError::Gone,
            _ => failed(source),
        })?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Takes a hold at the control socket `control` (from `hello.control`) in the name of `stage`.
    ///
    /// # Errors
    /// [`HoldError::Gone`] if nobody listens any more, and the others.
    pub fn take(control: &[u8], stage: &str) -> Result<Self, HoldError> {
        let mut hold = Self::connect(control)?;
        hold.say("take the hold", &format!("HOLD {}", one_line(stage))).map_err(|error| match error {
            // The holder closes connections of strangers without a word.
            HoldError::Broken { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                match getsockopt(&hold.socket, PeerCredentials) {
                    Ok(peer) if peer.uid() != geteuid().as_raw() && !geteuid().is_root() => {
                        HoldError::Stranger { uid: geteuid().as_raw() }
                    }
                    _ => HoldError::Gone,
                }
            }
            error => error,
        })?;
        Ok(hold)
    }

    fn say(&mut self, what: &'static str, line: &str) -> Result<(), HoldError> {
        let failed = |source| HoldError::Broken { what, source };
        self.socket.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
        self.heard(what)
    }

    fn heard(&mut self, what: &'static str) -> Result<(), HoldError> {
        let failed = |source| HoldError::Broken { what, source };
        let mut answer = [0; 3];
        self.socket.read_exact(&mut answer).map_err(failed)?;
        if &answer != b"OK\n" {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "the answer is not OK")));
        }
        Ok(())
    }

    /// Asks the holder for something: text and a descriptor, or why not.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn ask(&mut self, request: &str) -> Result<Result<(String, Option<OwnedFd>), String>, HoldError> {
        let failed = |source| HoldError::Broken { what: "ask the holder", source };
        self.socket.write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
        let (mut answer, mut fd) = (Vec::new(), None);
        while !answer.ends_with(b"\n") {
            let mut buffer = [0; MAX_LINE];
            let (n, mut fds) = receive_with_rights(self.socket.as_fd(), &mut buffer)
                .map_err(|error| failed(error.errno.into()))?;
            if n == 0 || answer.len() > MAX_LINE {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            answer.extend_from_slice(&buffer[..n]);
            fd = fd.or(fds.pop());
        }
        let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
        match answer.split_once(' ') {
            Some(("OK", text)) => Ok(Ok((text.to_owned(), fd))),
            None if answer == "OK" => Ok(Ok((String::new(), fd))),
            Some(("NO", reason)) => Ok(Err(reason.to_owned())),
            _ => Err(failed(io::Error::new(io::ErrorKind::InvalidData, "the answer is neither OK nor NO"))),
        }
    }

    /// Done with the tree; waits until it is known whether the directory is durable.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn release_until_durable(mut self) -> Result<bool, HoldError> {
        self.say("wait", "DURABLE")?;
        self.say("release", "RELEASE")?;
        let failed = |source| HoldError::Broken { what: "wait", source };
        self.socket.set_read_timeout(None).map_err(failed)?;
        let mut said = [0; b"DURABLE\n".len()];
        match self.socket.read_exact(&mut said) {
            Ok(()) => Ok(&said == b"DURABLE\n"),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }

    /// How long the tree has been stopped; `None` if the holder does not tell.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn times(&mut self) -> Result<Option<Times>, HoldError> {
        let Ok((answer, _)) = self.ask("TIMES")? else { return Ok(None) };
        let mut numbers = answer.split_whitespace().map(|n| n.parse().ok().map(Duration::from_micros));
        let (freezing, frozen) = (numbers.next().flatten(), numbers.next().flatten());
        Ok(freezing.zip(frozen).map(|(freezing, frozen)| Times { freezing, frozen }))
    }

    /// Says that the stage reads the pages of the stream from the pipe `input` and will tell by [`Self::took`] how far
    /// it has come. If that can't be said nobody waits for it. A holder that is the same user may write pages into
    /// `directory` instead of sending them; whether that was said.
    pub fn takes(&mut self, input: PipeId, directory: BorrowedFd<'_>) -> bool {
        let what = "say which pipe is read";
        let line = format!("TAKES {input}\n");
        let friend =
            getsockopt(&self.socket, PeerCredentials).is_ok_and(|peer| peer.uid() == geteuid().as_raw());
        send_with_right(&self.socket, &line, friend.then_some(directory))
            && self.heard(what).is_ok()
            && friend
    }

    /// `bytes` of pages, all told, have left the pipe and are referred to by nothing any more.
    pub fn took(&mut self, bytes: u64) {
        // A holder that is gone does not wait for it.
        let _ = self.socket.write_all(format!("TOOK {bytes}\n").as_bytes());
    }

    /// The directory is durable under its final name: with `--kill` the tree may be killed now.
    ///
    /// # Errors
    /// The holder did not take it: it is gone, and the tree runs.
    pub fn commit(mut self) -> Result<(), HoldError> {
        self.say("commit", "COMMIT")
    }

    /// Done with the tree. If the holder is gone there is nothing to release.
    pub fn release(mut self) {
        let _ = self.say("release", "RELEASE");
    }

    /// The checkpoint will not come to be; `reason` is for the holder's error message.
    pub fn fail(mut self, reason: &str) {
        let mut reason = one_line(reason);
        while reason.len() > MAX_LINE / 2 {
            reason.pop();
        }
        let _ = self.say("fail", &format!("FAIL {reason}"));
    }
}

/// Says to the holder at `control` that the caller hands the pages of the stream on from `input` to `output` and keeps
/// none of them. If that can't be said nobody counts on it.
pub fn passes(control: &[u8], input: PipeId, output: PipeId) {
    if let Ok(mut holder) = Hold::connect(control) {
        let _ = holder.say("say which pipes are joined", &format!("PASSES {input} {output}"));
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn released_when_every_need_has_come_and_gone() {
        let holder = Holder::bind().unwrap();
        let name = holder.address().to_vec();
        let stages = thread::spawn(move || {
            let mem = Hold::take(&name, "mem").unwrap();
            let sk = Hold::take(&name, "sk").unwrap();
            mem.release();
            sk.release();
        });
        assert_eq!(holder.wait(&["mem", "sk"], false, SOON), Outcome::Released);
        stages.join().unwrap();
    }

    #[test]
    fn commit_is_awaited_and_reported() {
        let holder = Holder::bind().unwrap();
        let hold = Hold::take(holder.address(), "write").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| hold.commit().unwrap());
            assert_eq!(holder.wait(&[], true, SOON), Outcome::Committed);
        });
    }

    #[test]
    fn a_stage_that_is_not_needed_may_hold_on() {
        let holder = Holder::bind().unwrap();
        let writer = Hold::take(holder.address(), "write").unwrap();
        assert_eq!(
            holder.passed(&["sk"], Duration::ZERO),
            Outcome::NobodyCame { missing: vec!["sk".into()] }
        );
        Hold::take(holder.address(), "sk").unwrap().release();
        assert_eq!(holder.passed(&["sk"], SOON), Outcome::Released);
        drop(writer);
        assert_eq!(
            holder.wait(&["sk"], false, SOON),
            Outcome::Failed { stage: "write".into(), reason: "it ended without a word".into() }
        );
    }

    #[test]
    fn a_broken_connection_is_a_failure() {
        let holder = Holder::bind().unwrap();
        drop(Hold::take(holder.address(), "write").unwrap());
        let Outcome::Failed { stage, .. } = holder.wait(&[], true, SOON) else { panic!("not a failure") };
        assert_eq!(stage, "write");
    }

    #[test]
    fn a_failure_carries_its_reason_on_one_line() {
        let holder = Holder::bind().unwrap();
        Hold::take(holder.address(), "mem").unwrap().fail("no\nspace");
        let failed = Outcome::Failed { stage: "mem".into(), reason: "no space".into() };
        assert_eq!(holder.wait(&["mem"], false, SOON), failed);
    }

    #[test]
    fn a_stream_that_its_reader_leaves_unread_ends_the_wait() {
        let pipe = || -> (std::fs::File, std::fs::File) {
            let (reader, writer) = nix::unistd::pipe().unwrap();
            (reader.into(), writer.into())
        };
        let holder = Holder::bind().unwrap();
        let (mut reader, mut writer) = pipe();
        writer.write_all(b"all of it").unwrap();
        holder.close_when_read(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        drop(reader);
        let nobody = Outcome::NobodyCame { missing: vec!["mem".into()] };
        assert_eq!(holder.wait(&["mem"], false, Duration::from_millis(20)), nobody, "read, and then closed");

        let (reader, mut writer) = pipe();
        writer.write_all(b"all of it").unwrap();
        holder.close_when_read(writer);
        drop(reader);
        assert_eq!(holder.wait(&["mem"], false, SOON), Outcome::Unread);
    }

    #[test]
    fn requests_are_answered_by_who_waits() {
        let holder = Holder::bind().unwrap();
        let mut hold = Hold::take(holder.address(), "mem").unwrap();
        assert!(hold.ask("ARM 5").unwrap().is_err(), "nobody answers");
        holder.answer_requests();
        let stage = thread::spawn(move || {
            let armed = hold.ask("ARM 5").unwrap();
            assert!(armed.unwrap().1.is_some());
            assert_eq!(hold.ask("TWIN 6").unwrap().unwrap_err(), "not today");
            hold.release_until_durable().unwrap()
        });
        let Outcome::Asked(request) = holder.passed(&["mem"], SOON) else { panic!("no request") };
        assert_eq!(request.text, "ARM 5");
        request.answer(Ok((String::new(), Some(std::fs::File::open("/dev/null").unwrap().into()))));
        let Outcome::Asked(request) = holder.passed(&["mem"], SOON) else { panic!("no request") };
        request.answer(Err("not\ntoday".to_owned()));
        assert_eq!(holder.passed(&["mem"], SOON), Outcome::Released);
        Hold::take(holder.address(), "write").unwrap().commit().unwrap();
        assert_eq!(holder.wait(&["mem"], false, SOON), Outcome::Committed);
        drop(holder);
        assert!(stage.join().unwrap());
        let holder = Holder::bind().unwrap();
        let hold = Hold::take(holder.address(), "mem").unwrap();
        let stage = thread::spawn(move || hold.release_until_durable().unwrap());
        let missing = vec!["write".to_owned()];
        while !matches!(holder.passed(&["mem"], SOON), Outcome::Released) {}
        assert_eq!(holder.wait(&["mem"], false, Duration::ZERO), Outcome::NobodyCame { missing });
        drop(holder);
        assert!(!stage.join().unwrap(), "nobody has said that it is durable");
    }

    #[test]
    fn who_never_comes_is_named() {
        let holder = Holder::bind().unwrap();
        Hold::take(holder.address(), "sk").unwrap().release();
        let outcome = holder.wait(&["mem", "sk"], true, Duration::from_millis(20));
        assert_eq!(outcome, Outcome::NobodyCame { missing: vec!["mem".into(), "write".into()] });
    }

    #[test]
    fn a_stage_that_holds_may_take_longer_than_the_timeout() {
        let holder = Holder::bind().unwrap();
        let hold = Hold::take(holder.address(), "mem").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(60));
                hold.release();
            });
            assert_eq!(holder.wait(&["mem"], false, Duration::from_millis(10)), Outcome::Released);
        });
    }

    #[test]
    fn times_run_until_the_clock_is_dropped() {
        let holder = Holder::bind().unwrap();
        let mut hold = Hold::take(holder.address(), "write").unwrap();
        assert_eq!(hold.times().unwrap(), None);
        let since = Instant::now().checked_sub(SOON).unwrap();
        let clock = holder.clock(Duration::from_micros(70), since);
        let first = hold.times().unwrap().unwrap();
        assert!(first.freezing == Duration::from_micros(70) && first.frozen >= SOON);
        drop(clock);
        let last = hold.times().unwrap().unwrap();
        assert!(last.frozen >= first.frozen);
        thread::sleep(Duration::from_millis(2));
        assert_eq!(hold.times().unwrap(), Some(last));
        hold.release();
    }

    #[test]
    fn silent_connections_and_nonsense_hold_nothing() {
        let holder = Holder::bind().unwrap();
        let address = SocketAddr::from_abstract_name(holder.address()).unwrap();
        let silent = UnixStream::connect_addr(&address).unwrap();
        let mut rude = UnixStream::connect_addr(&address).unwrap();
        rude.write_all(b"COMMIT\n").unwrap();
        assert_eq!(rude.read(&mut [0; 3]).unwrap(), 0, "no OK for a COMMIT without a hold");
        assert_eq!(holder.wait(&[], false, SOON), Outcome::Released);
        drop(silent);
    }

    #[test]
    fn memory_is_free_again_only_behind_known_stages() {
        let holder = Holder::bind().unwrap();
        let (first_in, first_out) = nix::unistd::pipe().unwrap();
        let (second_in, second_out) = nix::unistd::pipe().unwrap();
        let output = PipeId::of(first_out.as_fd()).unwrap();
        let mut writer = Hold::take(holder.address(), "write").unwrap();
        let directory = std::fs::File::open("/dev").unwrap();
        assert!(writer.takes(PipeId::of(second_in.as_fd()).unwrap(), directory.as_fd()));
        let taken = holder.taken_from(output);
        assert!(!taken.known(), "who reads the first pipe has not been said");
        assert!(taken.directory().is_none(), "and whether it needs to see the pages");
        let ends = [first_in.as_fd(), second_out.as_fd()].map(|fd| PipeId::of(fd).unwrap());
        passes(holder.address(), ends[0], ends[1]);
        assert!(taken.known());
        let inode = |fd: BorrowedFd<'_>| fstat(fd).unwrap().st_ino;
        assert_eq!(inode(taken.directory().unwrap().as_fd()), inode(directory.as_fd()));
        writer.took(10);
        taken.wait(10).unwrap();
        thread::scope(|scope| {
            let wait = scope.spawn(|| taken.wait(11));
            drop(writer);
            assert!(wait.join().unwrap().is_err(), "the writer has ended");
        });
    }

    #[test]
    fn pipes_in_a_circle_lead_nowhere() {
        let holder = Holder::bind().unwrap();
        let (_, output) = nix::unistd::pipe().unwrap();
        let pipe = PipeId::of(output.as_fd()).unwrap();
        passes(holder.address(), pipe, pipe);
        assert!(!holder.taken_from(pipe).known());
    }

    #[test]
    fn the_holders_end_is_told_from_a_failure() {
        let holder = Holder::bind().unwrap();
        let name = holder.address().to_vec();
        drop(holder);
        assert!(matches!(Hold::take(&name, "write"), Err(HoldError::Gone)));
    }

    /// Needs root, to become somebody else.
    #[test]
    fn other_users_are_not_heard() {
        if !geteuid().is_root() {
            return ckpt_tests::skip("other_users_are_not_heard", "needs root");
        }
        let holder = Holder::bind().unwrap();
        let name = String::from_utf8(holder.address().to_vec()).unwrap();
        let script = format!(
            "import socket,os\nos.setuid(65534)\ns=socket.socket(socket.AF_UNIX)\ns.connect('\\0{name}')\n\
             try:\n s.sendall(b'HOLD write\\n')\n d=s.recv(10)\nexcept OSError:\n d=b''\nassert d==b'',d\n"
        );
        let python = std::process::Command::new("python3").arg("-c").arg(script).status();
        let Ok(status) = python else {
            return ckpt_tests::skip("other_users_are_not_heard", "needs python3");
        };
        assert!(status.success());
        assert_eq!(holder.wait(&[], false, SOON), Outcome::Released);
    }
}
