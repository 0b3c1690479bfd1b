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
//! killed with SIGKILL is told from one that is done, and needs no clean-up code for that. A connection that ends
//! without a word is that of a stage which can't speak, and says so itself: nobody is waited for any longer.
//!
//! An abstract name needs no file system and vanishes with its owner, but it has no permissions:
//! anybody in the network namespace can connect. Therefore the holder asks the kernel who is there
//! (SO_PEERCRED) and closes connections of other users before reading a byte; only its own user
//! and root count. Such strangers can't delay or end a wait.

mod holder;
mod server;
mod stage;
mod state;
#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    str::FromStr,
    time::Duration,
};

use nix::sys::{
    socket::{ControlMessage, MsgFlags, sendmsg},
    stat::{SFlag, fstat},
};

pub use holder::{Clock, Holder, Outcome, Request, Taken};
pub use stage::{Hold, passes};

/// Longest line of the protocol, bytes.
const MAX_LINE: usize = 4096;
/// The stage that COMMIT is expected of.
const WRITER: &str = "write";

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

/// How long a tree is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// From the first thread's stop to the last one's.
    pub freezing: Duration,
    /// From then on until it ran again, or so far.
    pub frozen: Duration,
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

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
