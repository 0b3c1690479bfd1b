//! Open files in flight: descriptors in messages that nobody has received yet (SCM_RIGHTS, unix(7)).
//!
//! A peek makes copies of them, so ckpt-scan has descriptors of its own for these files, and treats them as it
//! treats those of the tree: kcmp(2) tells whether a file is one that has been met. What is new gets an
//! entry like any other, found at ckpt-scan's own pid and descriptor. The socket's stub lists the
//! numbers of the files for each message that has some; ckpt-sk writes them into the queue.
//!
//! A socket in flight can have files in flight itself, even itself: each is looked into when it is first
//! met, and its stub is written when all that it holds is known.
//!
//! A file that is in flight and nowhere else is in no task's table, so nothing can be done to it inside of a
//! task: epoll sets, whose members are told by numbers, and owners for SIGIO are refused there.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::Context;
use ckpt_proto::types::{FdTypes, FileEntry, ScmEntry};
use ckpt_sys::{Pid, Refused, TargetFd, file, pidfd};

use super::queue;
use crate::{
    Sink,
    fd::{Descriptor, FileTable, dump::reread, socket},
    sink::emit,
};

/// A socket whose stub waits for what is in flight in it.
#[derive(Debug)]
pub(in crate::fd) struct Pending {
    entry: FileEntry,
    subject: String,
    messages: Vec<Vec<OwnedFd>>,
}

/// The stub of a socket, or nothing yet if there is something in flight in it.
pub(in crate::fd) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    entry: Option<FileEntry>,
) -> anyhow::Result<Option<FileEntry>> {
    // The kernel counts them, those of connections that a listener has not accepted included.
    if reread(d)?.scm_fds == 0 {
        return Ok(entry);
    }
    let Some((entry, stub)) = entry.and_then(|e| Some((e.clone(), e.ckpt_stub?))) else { return Ok(None) };
    let kind = i32::try_from(stub.r#type).unwrap_or(0);
    let mut messages = Vec::new();
    let refuse = |reason: String| Refused::new(d.subject(), format!("socket {}: {reason}", stub.ino));
    let ends = kind == libc::SOCK_SEQPACKET && queue::is_shut(d.copy.as_fd())?;
    let walk = queue::Walk { fd: d.copy.as_fd(), kind, ends, refuse: &refuse };
    if !socket::listens(d.copy.as_fd())? {
        walk.all(&mut |_, received| {
            if !received.rights.is_empty() {
                messages.push(received.rights);
            }
            Ok(())
        })?;
    }
    table.in_flight.push(Pending { entry, subject: d.subject(), messages });
    Ok(None)
}

impl FileTable {
    /// Adds the files that are in flight in the sockets added so far.
    ///
    /// # Errors
    /// [`Refused`] for what can't be checkpointed; the sink's.
    pub fn add_in_flight(&mut self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        let own = Pid(std::process::id().cast_signed());
        let mut task = None;
        while let Some(Pending { mut entry, subject, messages }) = self.in_flight.pop() {
            let mut found = Vec::new();
            for message in messages {
                let mut rights = Vec::new();
                for fd in message {
                    let task = match &task {
                        Some(task) => task,
                        None => task.insert(pidfd::open(own)?),
                    };
                    let comm = format!("in flight to {subject}");
                    let number = TargetFd(fd.as_raw_fd());
                    let before = self.next_id;
                    let (id, kind, info) = self
                        .add_descriptor(own, &comm, task.as_fd(), number, sink)
                        .with_context(|| comm.clone())?;
                    if self.next_id != before {
                        let why = if kind == FdTypes::Eventpoll {
                            "an epoll set"
                        } else if !info.locks.is_empty() {
                            "a file with a lock"
                        } else if file::owner(fd.as_fd()).is_ok_and(|owner| owner.pid != 0) {
                            "a file that sends SIGIO"
                        } else {
                            ""
                        };
                        if !why.is_empty() {
                            let refused =
                                Refused::new(subject, format!("{why} is in flight to it, and nowhere else"));
                            return Err(refused.advise("checkpoint when it has been received").into());
                        }
                        // Whoever follows finds the file here.
                        self.flying.push(fd);
                    }
                    rights.push(id.0);
                }
                found.push(ScmEntry { r#type: libc::SCM_RIGHTS.unsigned_abs(), rights });
            }
            if let Some(stub) = &mut entry.ckpt_stub {
                stub.in_flight = found;
            }
            emit(sink, ckpt_proto::Image::Files, 0, &entry)?;
        }
        Ok(())
    }
}
