//! pidfd_open(2): a process, or with `PIDFD_THREAD` a thread. `fdinfo` tells which: its number, -1 when it has been
//! waited for.
//!
//! - Of the tree: it can be opened only when that task exists ([`super::late`]).
//! - Waited for: nothing can be asked of it, so any process that came and went stands for it.
//! - Outside: only who restores knows whether the process of that number is still the one that was meant. It has to be
//!   handed in, and to be named at dump.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use ckpt_proc::fdinfo::Special;
use ckpt_proto::types::{FdTypes, FileEntry, PidfdEntry};
use ckpt_sys::{FileId, Pid, Refused, Tid, clone, pidfd};

use super::{Descriptor, External, FileTable, Opening, late};
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
    let external = nspid >= 0 && !late::of_tree(table, nspid)?;
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
            opening.late.insert(entry.id, late::Entry::Pidfd(pidfd));
            continue;
        };
        Opening::set_flags(fd.as_fd(), pidfd.flags)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}

/// One of the tree, which is there now.
pub(super) fn open_late(entry: &PidfdEntry) -> anyhow::Result<OwnedFd> {
    let fd = match entry.flags & THREAD {
        0 => pidfd::open(Pid(entry.nspid)),
        _ => pidfd::open_thread(Tid(entry.nspid)),
    }?;
    Opening::set_flags(fd.as_fd(), entry.flags)?;
    Ok(fd)
}
