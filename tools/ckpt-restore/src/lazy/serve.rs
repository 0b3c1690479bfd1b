//! The page server: brings pages to those who wait for them, and all others when nobody waits.
//!
//! One thread, so that what the kernel tells and what is done about it stay in order. The rules of the kernel
//! (fs/userfaultfd.c) that this rests on:
//!
//! - A process that changes its mappings waits until its event has been read; until it has gone on, no page can be
//!   placed (EAGAIN). So whatever is placed goes by what the events have said so far.
//! - madvise(2) gives pages up *after* its event was read: from then on nothing old is placed there, and what
//!   somebody touches meanwhile becomes zeros, which it is afterwards too.
//! - A fault where nothing is missing, say in a hole of the mapping or where it has grown, becomes zeros.
//! - After a fork the child's memory is as the parent's was, and has a userfaultfd of its own: it is missing the
//!   same pages. No page has come between the fork and the event.
//! - Pages that are there are left alone (EEXIST), addresses that are not under watch any more too (ENOENT, after the
//!   range was cut down to a page: a copy must not cross from one mapping into the next).
//! - exec(2) and the end of a process leave a userfaultfd without memory (ESRCH).

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use anyhow::Context;
use ckpt_images::pull::Puller;
use ckpt_sys::{Pid, RemoteAddr, SysError, uffd};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::missing::Missing;

const PAGE: u64 = 4096;
/// How long an answer may be EAGAIN or ENOMEM before the next look, milliseconds.
const SHORT: u8 = 1;
/// How many looks in a row may find no memory.
const PATIENCE: u32 = 30_000;
/// Each time that so many more address spaces are there, those that have ended are looked for.
const SWEEP: usize = 64;

/// An address space that is missing pages.
#[derive(Debug)]
pub struct Space {
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// For messages.
    pub name: String,
    /// What has not come.
    pub missing: Missing,
    /// Pages that somebody waits for.
    pub wanted: BTreeSet<u64>,
}

/// How placing pages went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placed {
    /// So many bytes are dealt with.
    Done(u64),
    /// Not now.
    Later { memory: bool },
    /// The address space is gone.
    Gone,
}

impl Space {
    /// A new one.
    pub fn new(uffd: OwnedFd, name: String, missing: Missing) -> Self {
        Self { uffd, name, missing, wanted: BTreeSet::new() }
    }

    /// Takes note of what the kernel tells; gives forked children.
    fn hear(&mut self) -> anyhow::Result<Vec<Self>> {
        let mut events = Vec::new();
        uffd::read(self.uffd.as_fd(), &mut events).with_context(|| self.name.clone())?;
        let mut children = Vec::new();
        for event in events {
            match event {
                uffd::Event::Fault(addr) => {
                    self.wanted.insert(addr.0 / PAGE * PAGE);
                }
                uffd::Event::Fork(uffd) => {
                    let name = format!("a child of {}", self.name.trim_start_matches("a child of "));
                    children.push(Self::new(uffd, name, self.missing.clone()));
                }
                uffd::Event::Remap { from, to, len } => self.missing.shift(from, to, len),
                uffd::Event::Remove(range) | uffd::Event::Unmap(range) => {
                    self.missing.take(range);
                }
            }
        }
        Ok(children)
    }

    /// Brings the page at `addr`, and what follows it in memory and in the file.
    fn bring(&mut self, addr: u64, pages: &mut Puller) -> anyhow::Result<Placed> {
        let placed = match self.missing.at(addr) {
            None => {
                answer(self.uffd.as_fd(), addr, PAGE, uffd::zero(self.uffd.as_fd(), RemoteAddr(addr), PAGE))
            }
            Some(stored) => {
                let mut page = [0; PAGE as usize];
                let bytes = pages.from(stored.file, stored.offset).with_context(|| self.name.clone())?;
                let len = usize::try_from(stored.len).unwrap_or(usize::MAX).min(bytes.len());
                // Units of strange images may end within a page.
                let bytes = match len / page.len() * page.len() {
                    0 => {
                        pages.read_exact_at(stored.file, &mut page, stored.offset)?;
                        &page[..]
                    }
                    len => &bytes[..len],
                };
                place(self.uffd.as_fd(), addr, bytes)
            }
        };
        let placed = placed.with_context(|| format!("{}: page at {addr:#x}", self.name))?;
        if let Placed::Done(len) = placed {
            self.missing.take(addr..addr + len);
            self.wanted.retain(|page| !(addr..addr + len).contains(page));
        }
        Ok(placed)
    }
}

/// What the kernel's answer to placing `len` bytes means.
fn answer(
    uffd: BorrowedFd<'_>,
    addr: u64,
    len: u64,
    result: Result<u64, SysError>,
) -> Result<Placed, SysError> {
    let error = match result {
        Ok(done) => return Ok(Placed::Done(done)),
        Err(error) => error,
    };
    match error.errno {
        Errno::EAGAIN => Ok(Placed::Later { memory: false }),
        Errno::ENOMEM => Ok(Placed::Later { memory: true }),
        Errno::ESRCH => Ok(Placed::Gone),
        // Whoever waits finds the page, or no memory, when it looks again.
        Errno::EEXIST | Errno::ENOENT if len <= PAGE => {
            uffd::wake(uffd, RemoteAddr(addr), RemoteAddr(addr + PAGE))?;
            Ok(Placed::Done(PAGE))
        }
        Errno::EEXIST | Errno::ENOENT => Ok(Placed::Done(0)),
        _ => Err(error),
    }
}

/// Copies `bytes` to `addr`: as much as goes now.
fn place(uffd: BorrowedFd<'_>, addr: u64, bytes: &[u8]) -> Result<Placed, SysError> {
    let mut most = bytes.len();
    let mut done = 0;
    while done < bytes.len() {
        let len = most.min(bytes.len() - done);
        let at = addr + done as u64;
        match answer(uffd, at, len as u64, uffd::copy(uffd, RemoteAddr(at), &bytes[done..done + len]))? {
            // Something is in the way: in smaller steps.
            Placed::Done(0) => most = (len / 2).next_multiple_of(4096),
            Placed::Done(n) => done += usize::try_from(n).unwrap_or(len),
            Placed::Later { .. } if done > 0 => break,
            other => return Ok(other),
        }
    }
    Ok(Placed::Done(done as u64))
}

/// The server's state.
pub struct Server<'a> {
    /// Whom it serves; those restored come first, then what they have forked.
    pub spaces: Vec<Space>,
    /// The pages.
    pub pages: Puller,
    /// Readable when the processes run; until then only what is waited for is brought.
    pub go: Option<OwnedFd>,
    /// Becomes readable when the guardian has ended.
    pub guardian: OwnedFd,
    /// Makes another guardian.
    pub replace: &'a mut dyn FnMut() -> anyhow::Result<OwnedFd>,
}

impl Server<'_> {
    /// Serves until nothing is missing any more.
    ///
    /// # Errors
    /// Pages can't be read or are damaged, or can't be placed: then some are missing still.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut wait = PollTimeout::ZERO;
        let mut without_memory = 0;
        loop {
            self.spaces.retain(|space| !space.missing.is_empty());
            if self.spaces.is_empty() {
                return Ok(());
            }
            self.hear(wait)?;
            let later = self.answer_all()?;
            let placed = match later {
                Some(later) => Some(later),
                None if self.go.is_none() => self.pull()?,
                None => None,
            };
            without_memory = match placed {
                Some(Placed::Later { memory: true }) => without_memory + 1,
                _ => 0,
            };
            if without_memory > PATIENCE {
                anyhow::bail!("there is no memory for pages (ENOMEM)");
            }
            wait = match placed {
                Some(Placed::Later { .. }) => PollTimeout::from(SHORT),
                None if self.go.is_some() => PollTimeout::NONE,
                _ => PollTimeout::ZERO,
            };
        }
    }

    /// Listens to everybody.
    fn hear(&mut self, wait: PollTimeout) -> anyhow::Result<()> {
        let mut fds: Vec<PollFd<'_>> =
            self.spaces.iter().map(|space| PollFd::new(space.uffd.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(self.guardian.as_fd(), PollFlags::POLLIN));
        fds.extend(self.go.iter().map(|go| PollFd::new(go.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, wait) {
            Ok(0) | Err(Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let count = self.spaces.len();
        if ready.get(count) == Some(&true) {
            self.guardian = (self.replace)()?;
        }
        if ready.get(count + 1) == Some(&true) {
            self.go = None;
        }
        for (index, _) in ready.iter().take(count).enumerate().filter(|&(_, &ready)| ready) {
            let Some(space) = self.spaces.get_mut(index) else { continue };
            let children = space.hear()?;
            self.spaces.extend(children);
        }
        if self.spaces.len() / SWEEP > count / SWEEP {
            self.spaces.retain(|space| uffd::is_alive(space.uffd.as_fd()));
        }
        Ok(())
    }

    /// Brings what is waited for; tells what has to wait.
    fn answer_all(&mut self) -> anyhow::Result<Option<Placed>> {
        let mut later = None;
        for space in &mut self.spaces {
            while let Some(&page) = space.wanted.first() {
                match space.bring(page, &mut self.pages)? {
                    Placed::Done(_) => {}
                    Placed::Gone => {
                        space.missing = Missing::default();
                        space.wanted.clear();
                    }
                    placed => {
                        later = Some(placed);
                        break;
                    }
                }
            }
        }
        Ok(later)
    }

    /// Brings some pages that nobody has asked for.
    fn pull(&mut self) -> anyhow::Result<Option<Placed>> {
        let Some(space) = self.spaces.iter_mut().find(|space| !space.missing.is_empty()) else {
            return Ok(Some(Placed::Done(0)));
        };
        let Some(first) = space.missing.first() else { return Ok(Some(Placed::Done(0))) };
        let placed = space.bring(first, &mut self.pages)?;
        if placed == Placed::Gone {
            space.missing = Missing::default();
        }
        Ok(Some(placed))
    }
}

/// Those who have to go if pages can't come any more, by pidfd.
#[derive(Debug, Default)]
pub struct Restored(pub Vec<(Pid, OwnedFd)>);
