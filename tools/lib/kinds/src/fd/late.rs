//! What names a task of the tree, a pidfd or a file in `/proc/PID`: it can be opened only when that task exists, and then
//! no task inherits it any more. The restorer opens it, and the tasks take copies from there (pidfd_getfd(2)), so that
//! those who shared an open file share one.

use std::{collections::BTreeMap, fs};

use anyhow::Context;
use ckpt_images::ImageSet;
use ckpt_proc::status;
use ckpt_proto::types::{PidfdEntry, RegFileEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{FileId, Pid};

use super::{FileTable, OpenFiles, pidfd, reg};

/// Whether a task belongs to the tree: a thread of it, or a process that has ended and that one of it has to wait for.
pub(super) fn of_tree(table: &FileTable, task: i32) -> anyhow::Result<bool> {
    let path = format!("/proc/{task}/status");
    let Ok(text) = fs::read(&path) else { return Ok(false) };
    let status = status::parse(&text).context(path)?;
    let has = |pid: i32| table.tree.contains(&Pid(pid));
    Ok(has(status.tgid) || status.state == b'Z' && has(status.ppid))
}

#[derive(Debug)]
pub(super) enum Entry {
    Pidfd(PidfdEntry),
    InProc(RegFileEntry),
}

/// Entries by file id, to be opened when the tree is there.
#[derive(Debug, Default)]
pub(super) struct Late(BTreeMap<u32, Entry>);

impl Late {
    pub(super) fn has(&self, id: u32) -> bool {
        self.0.contains_key(&id)
    }

    /// Sets the position again, once, when names and ids are what they were: lseek(2) makes the text of such a file up
    /// to there and keeps what it has begun (fs/seq_file.c). From the start, since it does nothing where it is.
    pub(super) fn positions(&mut self, id: u32, fd: u32) -> Vec<Call> {
        let Some(Entry::InProc(RegFileEntry { pos: end @ 1.., .. })) = self.0.remove(&id) else {
            return Vec::new();
        };
        let seek = |to: u64| {
            let args = [fd.into(), to, libc::SEEK_SET.cast_unsigned().into()];
            Call::new(format!("lseek({fd}, {to})"), libc::SYS_lseek, args.map(Arg::Val))
        };
        vec![seek(0), seek(end)]
    }

    pub(super) fn insert(&mut self, id: u32, entry: Entry) {
        self.0.insert(id, entry);
    }
}

impl OpenFiles {
    /// Opens those, when all tasks are there, and puts them where they are in flight.
    ///
    /// # Errors
    /// There is no such task, or it has no such file.
    pub fn open_late(&mut self, set: &ImageSet) -> anyhow::Result<()> {
        for (&id, entry) in &self.late.0 {
            let fd = match entry {
                Entry::Pidfd(entry) => pidfd::open_late(entry).context("a pidfd"),
                Entry::InProc(entry) => reg::open_late(entry).with_context(|| reg::printable(entry)),
            };
            self.files.insert(FileId(id), fd.with_context(|| format!("file {id}"))?)?;
        }
        match self.unix.take() {
            Some(sockets) => sockets.deliver(set, &self.files).context("files of tasks in flight"),
            None => Ok(()),
        }
    }
}
