//! The thread that hears what stages say, line by line, and answers.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    thread,
    time::Duration,
};

use ckpt_sys::sock::receive_with_rights;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use crate::{MAX_LINE, Request, state::Shared};

/// Most connections at a time.
const MAX_PEERS: usize = 64;

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
    /// Has said anything at all.
    spoke: bool,
    /// Has said its last word.
    over: bool,
}

/// Listens, and hears everybody.
pub(crate) struct Server {
    listener: UnixListener,
    woken: UnixStream,
    shared: Arc<Shared>,
    peers: Vec<Peer>,
    next: u64,
}

impl Server {
    /// `woken`: its other end is closed when this is to end.
    pub(crate) fn new(listener: UnixListener, woken: UnixStream, shared: Arc<Shared>) -> Self {
        Self { listener, woken, shared, peers: Vec::new(), next: 0 }
    }

    pub(crate) fn serve(mut self) {
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
                        spoke: false,
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
                    self.spoke = true;
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
        if !self.spoke {
            shared.change(|state| state.mute = true);
        }
        if let (false, Some(stage)) = (self.over, &self.stage) {
            shared.change(|state| {
                state.holding.remove(&self.id);
                state.failed.get_or_insert_with(|| (stage.clone(), reason.to_owned()));
            });
        }
        false
    }
}
