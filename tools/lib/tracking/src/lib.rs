//! Tracking of writes between checkpoints.
//!
//! The kernel takes note of writes to a mapping as long as a userfaultfd watches it (see
//! [`ckpt_sys::uffd`]); somebody has to keep that descriptor open from one checkpoint to the next.
//! That is the [`Tracker`], in `ckpt-track` or in `ckpt-series`. It knows nothing of pages. What it keeps:
//!
//! - a userfaultfd for each process of the tree;
//! - which checkpoint it was that last read and renewed the protection, if that one became durable.
//!   Only an increment of that very checkpoint is complete: everything written since is marked, and
//!   nothing that was written before.
//!
//! A checkpoint is a session on the tracker's socket (an abstract unix socket, one message a packet;
//! only the same user and root are let in, on both sides):
//!
//! ```text
//! ckpt-scan                      tracker
//! BEGIN parent-id|-    ->        from here on, the next checkpoint is a full one ...
//!                      <-   INCREMENT | FULL reason
//!                      <-   WATCH pid start-time     + its userfaultfd, for each process
//!                      <-   END
//! WATCH pid start-time ->        + userfaultfd of a process that is new, or has called exec
//! COMMIT id            ->        ... unless this comes: the checkpoint is durable
//!                      <-   OK
//! ```
//!
//! So whatever fails between the first page whose mark is taken off and the last sync, at the worst the next
//! checkpoint is full. A session that begins while another is under way makes that one's COMMIT
//! worthless, since it has taken off marks that the other's successor would need.
//!
//! Ways not chosen: soft-dirty (absent from many kernels, all of arm64); a message for each fault
//! (UFFD_FEATURE_PAGEFAULT_FLAG_WP without WP_ASYNC: the target waits for the tracker, and hangs if that
//! dies); mprotect(2) and SIGSEGV from within (visible to the target).

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use ckpt_proc::stat;
use ckpt_remote::{Call, Frozen, Process, RemoteError, Syscalls, run_one};
use ckpt_sys::{Pid, SysError, TargetFd, pidfd, sock, uffd};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect,
            getsockopt, listen, sendmsg, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
    unistd::geteuid,
};

/// Names a checkpoint.
pub type Id = [u8; 16];

/// Longest message, bytes.
const MAX_MESSAGE: usize = 1024;
/// How long one side waits for the other, which has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a tracker that can have no more descriptors lets those wait who come, milliseconds.
const FULL: u16 = 100;

/// Why tracking does not work.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The socket.
    #[error("tracker {address}: {call}")]
    Socket {
        /// Name of the socket.
        address: String,
        /// What was being done.
        call: &'static str,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// Nobody is there.
    #[error("there is no tracker at {address}; start one with ckpt-track")]
    Gone {
        /// Name of the socket.
        address: String,
    },
    /// The other side is there and does not answer.
    #[error("tracker {address}: the other side of the connection says nothing for {} s", PATIENCE.as_secs())]
    Silent {
        /// Name of the socket.
        address: String,
    },
    /// The socket belongs to somebody else.
    #[error("the tracker at {address} belongs to uid {uid}")]
    Stranger {
        /// Name of the socket.
        address: String,
        /// Whose it is.
        uid: u32,
    },
    /// Something else was said than the protocol knows.
    #[error("tracker {address}: said {said:?}, which is not in the protocol")]
    Nonsense {
        /// Name of the socket.
        address: String,
        /// What came.
        said: String,
    },
    /// No userfaultfd could be made in a process.
    #[error("pid {pid}: userfaultfd")]
    Refused {
        /// In which.
        pid: Pid,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The process could not be asked.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The kernel.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A file in /proc.
    #[error("{path}")]
    Proc {
        /// Which.
        path: String,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
}

/// Whether an increment is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All writes since the parent are marked.
    Increment,
    /// They are not, and why.
    Full(String),
}

/// A process under tracking: a pid alone is no identity.
#[derive(Debug)]
struct Watch {
    /// Clock ticks since boot (proc_pid_stat(5)).
    start_time: u64,
    uffd: OwnedFd,
}

/// What is kept between checkpoints.
#[derive(Debug)]
pub struct Tracker {
    watches: BTreeMap<Pid, Watch>,
    /// The checkpoint that renewed the protection last and became durable, or why there is none.
    last: Result<Id, &'static str>,
    /// Counts sessions.
    session: u64,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { watches: BTreeMap::new(), last: Err("nothing has been tracked before"), session: 0 }
    }
}

impl Tracker {
    fn begin(&mut self, parent: Option<Id>) -> (u64, Verdict) {
        let unfinished = "the checkpoint before has failed, or has not become durable";
        let verdict = match (parent, std::mem::replace(&mut self.last, Err(unfinished))) {
            (None, _) => Verdict::Full("no parent was named".to_owned()),
            (Some(_), Err(why)) => Verdict::Full(why.to_owned()),
            (Some(parent), Ok(last)) if parent == last => Verdict::Increment,
            (Some(_), Ok(last)) => {
                Verdict::Full(format!("the last tracked checkpoint is another one, {}", hex(&last)))
            }
        };
        self.session += 1;
        (self.session, verdict)
    }

    fn commit(&mut self, session: u64, id: Id) {
        if session == self.session {
            self.last = Ok(id);
        }
    }

    /// Keeps the userfaultfd of a process, in place of an earlier one.
    pub fn watch(&mut self, pid: Pid, start_time: u64, uffd: OwnedFd) {
        self.watches.insert(pid, Watch { start_time, uffd });
    }

    /// Forgets processes that have ended.
    fn sweep(&mut self) {
        self.watches.retain(|_, watch| uffd::is_alive(watch.uffd.as_fd()));
    }
}

/// A checkpoint id as text.
#[must_use]
pub fn hex(id: &Id) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

fn parse_id(text: &str) -> Option<Id> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)).flatten()
}

/// When a process was started: tells it from another one with the same pid.
///
/// # Errors
/// It is gone.
pub fn start_time(pid: Pid) -> Result<u64, TrackError> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read(&path).map_err(|source| TrackError::Proc { path: path.clone(), source })?;
    let parsed = stat::parse(&text).map_err(|e| io::Error::other(e.to_string()));
    Ok(parsed.map_err(|source| TrackError::Proc { path, source })?.start_time)
}

/// Makes a userfaultfd in a frozen process and takes it out. Nothing stays in the process, not even if
/// this one is killed in between: the task closes the descriptor itself on its way home.
///
/// # Errors
/// The process can't be asked, or may not have one (a seccomp filter; EMFILE).
pub fn arm(frozen: &mut Frozen, process: &Process) -> Result<OwnedFd, TrackError> {
    let pid = process.pid;
    let flags = uffd::USER_MODE_ONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let free = lowest_free(pid)?;
    let handle = pidfd::open(pid)?;
    let mut task = frozen.borrow(pid, pid.leader())?;
    let close = |fd: i32| Call::new(format!("close({fd})"), libc::SYS_close, [fd.into()]).may_fail();
    task.guard(vec![close(free)])?;
    let made =
        run_one(&mut task, Call::new("userfaultfd", libc::SYS_userfaultfd, [flags.into()]).may_fail())?;
    let copy = made.result().map(|fd| {
        let fd = TargetFd(i32::try_from(fd).unwrap_or(-1));
        (fd, pidfd::getfd(handle.as_fd(), fd))
    });
    task.unguard()?;
    if let Ok((fd, _)) = &copy
        && fd.0 != free
    {
        task.run(&[close(fd.0)])?;
    }
    task.finish()?;
    let (_, uffd) = copy.map_err(|errno| TrackError::Refused { pid, errno })?;
    let uffd = uffd?;
    uffd::enable(uffd.as_fd())?;
    Ok(uffd)
}

/// The number that the kernel gives to the next descriptor of a frozen process.
fn lowest_free(pid: Pid) -> Result<i32, TrackError> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).map_err(|source| TrackError::Proc { path, source })?;
    let mut used: Vec<i32> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    used.sort_unstable();
    let gap = (0..).zip(&used).find(|(number, used)| number != *used);
    Ok(gap.map_or_else(|| i32::try_from(used.len()).unwrap_or(i32::MAX), |(number, _)| number))
}

/// One side of a conversation.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    address: String,
}

impl Line {
    fn failed(&self, call: &'static str) -> impl FnOnce(Errno) -> TrackError {
        let address = self.address.clone();
        move |errno| match errno {
            Errno::EAGAIN => TrackError::Silent { address },
            errno => TrackError::Socket { address, call, errno },
        }
    }

    fn say(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), TrackError> {
        let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let bytes = [io::IoSlice::new(text.as_bytes())];
        sendmsg::<()>(self.socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)
            .map(drop)
            .map_err(self.failed("send"))
    }

    /// The next message, and the descriptor that came with it; an empty one at the end.
    fn hear(&self) -> Result<(String, Option<OwnedFd>), TrackError> {
        let mut buffer = [0; MAX_MESSAGE];
        let (len, mut fds) = sock::receive_with_rights(self.socket.as_fd(), &mut buffer)
            .map_err(|error| self.failed("recvmsg")(error.errno))?;
        Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), fds.pop()))
    }

    fn nonsense(&self, said: &str) -> TrackError {
        TrackError::Nonsense { address: self.address.clone(), said: said.to_owned() }
    }

    fn is_friend(&self) -> Result<(), u32> {
        match getsockopt(&self.socket, sockopt::PeerCredentials) {
            Ok(peer) if peer.uid() == geteuid().as_raw() || peer.uid() == 0 => Ok(()),
            Ok(peer) => Err(peer.uid()),
            Err(_) => Err(u32::MAX),
        }
    }

    fn be_patient(&self) -> Result<(), TrackError> {
        let time = TimeVal::seconds(i64::try_from(PATIENCE.as_secs()).unwrap_or(10));
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &time).map_err(self.failed("set a timeout"))?;
        setsockopt(&self.socket, sockopt::SendTimeout, &time).map_err(self.failed("set a timeout"))
    }
}

fn new_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)
}

/// A checkpoint under tracking, as the tool that makes it sees it.
#[derive(Debug)]
pub struct Session {
    line: Line,
    verdict: Verdict,
    watches: HashMap<Pid, Watch>,
}

impl Session {
    /// Begins a checkpoint that is to be an increment of `parent`. Unless [`Self::commit`] is called, the
    /// next one can't be an increment.
    ///
    /// # Errors
    /// There is no tracker at `address`, or it is somebody else's.
    pub fn begin(address: &str, parent: Option<Id>) -> Result<Self, TrackError> {
        let failed = |call| move |errno| TrackError::Socket { address: address.to_owned(), call, errno };
        let socket = new_socket(SockFlag::empty()).map_err(failed("socket"))?;
        let line = Line { socket, address: address.to_owned() };
        let name = UnixAddr::new_abstract(address.as_bytes()).map_err(failed("name"))?;
        connect(line.socket.as_raw_fd(), &name).map_err(|errno| match errno {
            Errno::ECONNREFUSED | Errno::ENOENT => TrackError::Gone { address: address.to_owned() },
            errno => failed("connect")(errno),
        })?;
        line.is_friend().map_err(|uid| TrackError::Stranger { address: address.to_owned(), uid })?;
        line.be_patient()?;
        let parent = parent.map_or_else(|| "-".to_owned(), |id| hex(&id));
        line.say(&format!("BEGIN {parent}"), None)?;
        let (said, _) = line.hear()?;
        let verdict = match said.split_once(' ') {
            None if said == "INCREMENT" => Verdict::Increment,
            Some(("FULL", reason)) => Verdict::Full(reason.to_owned()),
            _ => return Err(line.nonsense(&said)),
        };
        let mut watches = HashMap::new();
        loop {
            let (said, fd) = line.hear()?;
            if said == "END" {
                break;
            }
            let watch = parse_watch(&said).zip(fd).ok_or_else(|| line.nonsense(&said))?;
            let ((pid, start_time), uffd) = watch;
            watches.insert(pid, Watch { start_time, uffd });
        }
        Ok(Self { line, verdict, watches })
    }

    /// Whether the parent is the checkpoint that the marks belong to.
    #[must_use]
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Whether this very process has a userfaultfd that still works: not if it has called exec.
    #[must_use]
    pub fn watches(&self, pid: Pid, start_time: u64) -> bool {
        let known = self.watches.get(&pid);
        known.is_some_and(|w| w.start_time == start_time && uffd::is_alive(w.uffd.as_fd()))
    }

    /// Hands a new userfaultfd of a process ([`arm`]) to the tracker.
    ///
    /// # Errors
    /// The tracker is gone.
    pub fn watch(&mut self, pid: Pid, start_time: u64, uffd: OwnedFd) -> Result<(), TrackError> {
        self.line.say(&format!("WATCH {} {start_time}", pid.0), Some(uffd.as_fd()))?;
        self.watches.insert(pid, Watch { start_time, uffd });
        Ok(())
    }

    /// The userfaultfd of a process after [`Self::watch`].
    #[must_use]
    pub fn uffd(&self, pid: Pid) -> Option<BorrowedFd<'_>> {
        self.watches.get(&pid).map(|watch| watch.uffd.as_fd())
    }

    /// The checkpoint `id` is durable.
    ///
    /// # Errors
    /// The tracker did not answer.
    pub fn commit(self, id: Id) -> Result<(), TrackError> {
        self.line.say(&format!("COMMIT {}", hex(&id)), None)?;
        match self.line.hear()?.0.as_str() {
            "OK" => Ok(()),
            said => Err(self.line.nonsense(said)),
        }
    }
}

/// `WATCH pid start-time`.
fn parse_watch(said: &str) -> Option<(Pid, u64)> {
    let mut words = said.strip_prefix("WATCH ")?.split(' ');
    let pid = words.next()?.parse().ok().filter(|&pid| pid > 0)?;
    let start_time = words.next()?.parse().ok()?;
    words.next().is_none().then_some((Pid(pid), start_time))
}

/// The tracker's socket.
#[derive(Debug)]
pub struct Server {
    line: Line,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    line: Line,
    session: Option<u64>,
}

impl Server {
    /// Binds the socket.
    ///
    /// # Errors
    /// EADDRINUSE if there is a tracker of that name.
    pub fn bind(address: &str) -> Result<Self, TrackError> {
        let failed = |call| move |errno| TrackError::Socket { address: address.to_owned(), call, errno };
        let socket = new_socket(SockFlag::SOCK_NONBLOCK).map_err(failed("socket"))?;
        let line = Line { socket, address: address.to_owned() };
        let name = UnixAddr::new_abstract(address.as_bytes()).map_err(failed("name"))?;
        bind(line.socket.as_raw_fd(), &name).map_err(failed("bind"))?;
        listen(&line.socket, Backlog::new(16).map_err(failed("listen"))?).map_err(failed("listen"))?;
        Ok(Self { line, clients: Vec::new() })
    }

    /// Serves sessions until `end` becomes readable: a pidfd of the tree's root, or the end of a pipe.
    ///
    /// # Errors
    /// The socket's.
    pub fn serve(&mut self, tracker: &mut Tracker, end: &[BorrowedFd<'_>]) -> Result<(), TrackError> {
        let mut full = false;
        loop {
            let mut fds: Vec<PollFd<'_>> = end.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            // Whoever waits there while there is no descriptor for it would wake us at once, again and again.
            let (comes, patience) = match full {
                true => (PollFlags::empty(), PollTimeout::from(FULL)),
                false => (PollFlags::POLLIN, PollTimeout::NONE),
            };
            fds.push(PollFd::new(self.line.socket.as_fd(), comes));
            fds.extend(self.clients.iter().map(|c| PollFd::new(c.line.socket.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, patience) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.line.failed("poll")(errno)),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            let (ended, rest) = ready.split_at(end.len());
            if ended.contains(&true) {
                return Ok(());
            }
            let mut talks = rest.iter().skip(1);
            // A client that says what is not understood, or nothing more, is let go.
            self.clients.retain_mut(|c| talks.next() != Some(&true) || c.serve(tracker).unwrap_or(false));
            if full || rest.first() == Some(&true) {
                full = !self.accept()?;
            }
        }
    }

    /// Lets in who waits, if anybody does; false if there is no room.
    fn accept(&mut self) -> Result<bool, TrackError> {
        let socket = match sock::accept(self.line.socket.as_fd()) {
            Ok(socket) => socket,
            Err(error) => {
                return match error.errno {
                    Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED => Ok(true),
                    Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => Ok(false),
                    errno => Err(self.line.failed("accept4")(errno)),
                };
            }
        };
        let line = Line { socket, address: self.line.address.clone() };
        if line.is_friend().is_ok() && line.be_patient().is_ok() {
            self.clients.push(Client { line, session: None });
        }
        Ok(true)
    }
}

impl Client {
    /// Answers one message; false at the end.
    fn serve(&mut self, tracker: &mut Tracker) -> Result<bool, TrackError> {
        let (said, fd) = self.line.hear()?;
        let (word, rest) = said.split_once(' ').unwrap_or((&said, ""));
        match (word, self.session) {
            ("BEGIN", None) => {
                let parent = match rest {
                    "-" => None,
                    id => Some(parse_id(id).ok_or_else(|| self.line.nonsense(&said))?),
                };
                tracker.sweep();
                let (session, verdict) = tracker.begin(parent);
                self.session = Some(session);
                match verdict {
                    Verdict::Increment => self.line.say("INCREMENT", None)?,
                    Verdict::Full(reason) => self.line.say(&format!("FULL {reason}"), None)?,
                }
                for (pid, watch) in &tracker.watches {
                    let text = format!("WATCH {} {}", pid.0, watch.start_time);
                    self.line.say(&text, Some(watch.uffd.as_fd()))?;
                }
                self.line.say("END", None)?;
            }
            ("WATCH", Some(_)) => {
                let watch = parse_watch(&said).zip(fd).ok_or_else(|| self.line.nonsense(&said))?;
                let ((pid, start_time), uffd) = watch;
                tracker.watch(pid, start_time, uffd);
            }
            ("COMMIT", Some(session)) => {
                let id = parse_id(rest).ok_or_else(|| self.line.nonsense(&said))?;
                tracker.commit(session, id);
                self.line.say("OK", None)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use ckpt_tests::Random;

    use super::*;

    const A: Id = [1; 16];
    const B: Id = [2; 16];

    #[test]
    fn only_the_last_durable_checkpoint_can_have_an_increment() {
        let mut tracker = Tracker::default();
        let full = |verdict: Verdict| matches!(verdict, Verdict::Full(_));
        let (first, verdict) = tracker.begin(None);
        assert!(full(verdict));
        tracker.commit(first, A);
        let (second, verdict) = tracker.begin(Some(A));
        assert_eq!(verdict, Verdict::Increment);
        // It fails: nobody commits.
        let (third, verdict) = tracker.begin(Some(A));
        assert!(full(verdict));
        // It was only slow: too late.
        tracker.commit(second, B);
        assert!(full(tracker.begin(Some(B)).1));
        tracker.commit(third, A);
        let (last, _) = tracker.begin(None);
        tracker.commit(last, B);
        assert!(full(tracker.begin(Some(A)).1));
    }

    #[test]
    fn a_session_over_the_socket() {
        let address = format!("ckpt-tracking-test-{}", std::process::id());
        let mut server = Server::bind(&address).unwrap();
        assert!(matches!(Server::bind(&address), Err(TrackError::Socket { errno: Errno::EADDRINUSE, .. })));
        let (end, ends) = nix::unistd::pipe().unwrap();
        let thread = thread::spawn(move || {
            let mut tracker = Tracker::default();
            server.serve(&mut tracker, &[end.as_fd()]).unwrap();
        });
        let first = Session::begin(&address, Some(A)).unwrap();
        assert!(matches!(first.verdict(), Verdict::Full(_)));
        first.commit(A).unwrap();
        let second = Session::begin(&address, Some(A)).unwrap();
        assert_eq!(second.verdict(), &Verdict::Increment);
        drop(second);
        assert!(matches!(Session::begin(&address, Some(A)).unwrap().verdict(), Verdict::Full(_)));
        drop(ends);
        thread.join().unwrap();
        assert!(matches!(Session::begin(&address, None), Err(TrackError::Gone { .. })));
    }

    /// Words in any order, with arguments and descriptors of any kind: whoever says what is not understood is let go, and
    /// the next is served.
    #[test]
    fn nonsense_ends_a_client_and_not_the_tracker() {
        const WORDS: &[&str] = &["BEGIN", "WATCH", "COMMIT", "END", "OK", "", "BEGIN -\nCOMMIT"];
        const REST: &[&str] = &[
            "",
            " -",
            " 01010101010101010101010101010101",
            " +1010101010101010101010101010101",
            " \u{e9}\u{e9}",
            " 4711 1",
            " -1 1",
            " 1 -1",
            " 4711 1 1",
            " 99999999999 1",
            " 1 18446744073709551616",
        ];
        let mut random = Random::new("tracking_nonsense");
        let mut pick = |n: usize| usize::try_from(random.below(n as u64)).unwrap();
        let address = format!("ckpt-tracking-nonsense-{}", std::process::id());
        let mut server = Server::bind(&address).unwrap();
        let (end, ends) = nix::unistd::pipe().unwrap();
        let thread = thread::spawn(move || server.serve(&mut Tracker::default(), &[end.as_fd()]).unwrap());
        let name = UnixAddr::new_abstract(address.as_bytes()).unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        for _ in 0..500 {
            let line = Line { socket: new_socket(SockFlag::empty()).unwrap(), address: address.clone() };
            connect(line.socket.as_raw_fd(), &name).unwrap();
            for _ in 0..pick(6) {
                let mut text = [WORDS[pick(WORDS.len())], REST[pick(REST.len())]].concat();
                if pick(20) == 0 {
                    text.push_str(&"x".repeat(2 * MAX_MESSAGE));
                }
                let fd = (pick(2) == 0).then(|| null.as_fd());
                // It may have been let go.
                let _ = line.say(&text, fd);
            }
            drop(line);
            let session = Session::begin(&address, Some(B)).unwrap();
            assert!(matches!(session.verdict(), Verdict::Full(_)), "nobody has committed that");
            assert!(!session.watches(Pid(4711), 1), "that is no userfaultfd");
        }
        drop(ends);
        thread.join().unwrap();
    }
}
