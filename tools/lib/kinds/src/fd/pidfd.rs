//! pidfd_open(2): a process, or with `PIDFD_THREAD` a thread. `fdinfo` tells which: its number, -1 when it has been
//! waited for.
//!
//! - Of the tree: it can be opened only when that task exists, and then no task inherits it any more. The restorer opens
//!   it, and the tasks take copies from there (pidfd_getfd(2)), so that those who shared an open file share one.
//! - Waited for: nothing can be asked of it, so any process that came and went stands for it.
//! - Outside: only who restores knows whether the process of that number is still the one that was meant. It has to be
//!   handed in, and to be named at dump.

use std::{collections::BTreeMap, fs, os::fd::AsFd};

use anyhow::Context;
use ckpt_images::ImageSet;
use ckpt_proc::{fdinfo::Special, status};
use ckpt_proto::types::{FdTypes, FileEntry, PidfdEntry};
use ckpt_sys::{FileId, Pid, Refused, Tid, clone, file, pidfd};

use super::{Descriptor, External, FileTable, OpenFiles, Opening};
use crate::Sink;

/// In the flags of an open pidfd (linux/pidfd.h).
const THREAD: u32 = libc::O_EXCL.cast_unsigned();

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("[pidfd]") || d.link.starts_with(b"pidfd:[")
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let Special::Pidfd(nspid) = d.info.special else {
        return Err(d.refuse("fdinfo does not tell its process").into());
    };
    let external = nspid >= 0 && !of_tree(table, nspid)?;
    if external && !table.options.external.contains(&External::Pidfd(nspid)) {
        let what =
            format!("it stands for pid {nspid} ({}), which is outside of the tree", super::comm(Pid(nspid)));
        let advice =
            format!("pass --external pidfd:[{nspid}] and at restore --inherit-fd fd[N]:pidfd:[{nspid}]");
        return Err(d.refuse(what).advise(advice).into());
    }
    let pidfd = PidfdEntry {
        id: id.0,
        // Only whether it is the same as another's counts.
        ino: u32::try_from(d.stat.st_ino & u64::from(u32::MAX)).unwrap_or(0),
        flags: d.flags(),
        nspid,
        fown: d.fown()?,
        ckpt_external: external.then_some(true),
    };
    Ok(Some(FileEntry {
        r#type: FdTypes::Pidfd.into(),
        id: id.0,
        pidfd: Some(pidfd),
        ..FileEntry::default()
    }))
}

/// Whether a task belongs to the tree: a thread of it, or a process that has ended and that one of it has to wait for.
fn of_tree(table: &FileTable, task: i32) -> anyhow::Result<bool> {
    let path = format!("/proc/{task}/status");
    let Ok(text) = fs::read(&path) else { return Ok(false) };
    let status = status::parse(&text).context(path)?;
    let has = |pid: i32| table.tree.contains(&Pid(pid));
    Ok(has(status.tgid) || status.state == b'Z' && has(status.ppid))
}

/// Those of the tree, which are opened when it is there.
#[derive(Debug, Default)]
pub(super) struct Late(BTreeMap<u32, PidfdEntry>);

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let pidfd = entry.pidfd.context("a pidfd without its entry")?;
        let fd = if pidfd.ckpt_external() {
            let key = format!("pidfd:[{}]", pidfd.nspid);
            let Some(fd) = opening.inherited(&key)? else {
                let refused = Refused::new(key.clone(), "this process is outside of the checkpoint");
                return Err(refused.advise(format!("pass --inherit-fd fd[N]:{key}")).into());
            };
            fd
        } else if pidfd.nspid < 0 {
            clone::pidfd_of_the_dead(pidfd.flags & THREAD != 0)?
        } else {
            opening.late.0.insert(entry.id, pidfd);
            continue;
        };
        opening.set_flags(fd.as_fd(), pidfd.flags)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}

impl Late {
    pub(super) fn has(&self, id: u32) -> bool {
        self.0.contains_key(&id)
    }
}

impl OpenFiles {
    /// Opens those, when all tasks are there, and puts them where they are in flight.
    ///
    /// # Errors
    /// There is no such task.
    pub fn open_late(&mut self, set: &ImageSet) -> anyhow::Result<()> {
        for (&id, entry) in &self.late.0 {
            let fd = match entry.flags & THREAD {
                0 => pidfd::open(Pid(entry.nspid)),
                _ => pidfd::open_thread(Tid(entry.nspid)),
            };
            let fd = fd.with_context(|| format!("file {id}: a pidfd"))?;
            if entry.flags & libc::O_NONBLOCK.cast_unsigned() != 0 {
                let flags = file::flags(fd.as_fd())?;
                file::set_flags(fd.as_fd(), flags | libc::O_NONBLOCK.cast_unsigned())?;
            }
            self.files.insert(FileId(id), fd)?;
        }
        match self.unix.take() {
            Some(sockets) => sockets.deliver(set, &self.files).context("pidfds in flight"),
            None => Ok(()),
        }
    }
}
