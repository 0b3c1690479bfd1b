//! A stage's end: taking a hold, and what is said while it lasts.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    time::Duration,
};

use ckpt_sys::sock::receive_with_rights;
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use crate::{HoldError, MAX_LINE, PipeId, Times, one_line, send_with_right};

/// How long a stage waits for the holder's answer. The holder does nothing else, so this is generous.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

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
