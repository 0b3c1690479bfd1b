//! epoll(7) sets.
//!
//! A set holds open files, each under the descriptor number by which it was added, in whatever
//! process that was. `fdinfo` lists number, events and data. The number need not name that file any
//! more: the descriptor may have been closed while a duplicate lives on. kcmp(KCMP_EPOLL_TFD) tells; if
//! the number is stale another descriptor of the same file is looked for and stored as `ckpt_fd`. Of the
//! processes that share a set (after fork) any may be the one that still has the file open: `ckpt_pid`.
//!
//! At restore the members are added inside a task, when its descriptors have their numbers. For a
//! stale one the file is put under the old number for that moment:
//!
//! ```text
//! dup(tfd) -> saved (if taken)   dup2(fd, tfd)   epoll_ctl(ADD, tfd)   dup3(saved, tfd) or close(tfd)
//! ```
//!
//! Which of the ready members were told already (EPOLLET) is not known: they are told once more, as after a dup.

use std::os::fd::OwnedFd;

use anyhow::Context;
use ckpt_proc::fdinfo::{EpollTarget, Special};
use ckpt_proto::types::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FdinfoEntry, FileEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{FileId, Pid, Refused, TargetFd, file};
use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags},
};

use super::{Descriptor, FileTable, Opening};
use crate::Sink;

/// A set whose members are looked up when all tasks are known.
#[derive(Debug)]
pub(super) struct Pending {
    entry: EventpollFileEntry,
    targets: Vec<EpollTarget>,
    subject: String,
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("[eventpoll]")
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let targets = match &d.info.special {
        Special::Epoll(targets) => targets.clone(),
        _ => Vec::new(),
    };
    let entry = EventpollFileEntry { id: id.0, flags: d.flags(), fown: d.fown()?, tfd: Vec::new() };
    table.epolls.push(Pending { entry, targets, subject: d.subject() });
    Ok(None)
}

/// Finds the members of a set among the descriptors of the tree.
pub(super) fn complete(table: &FileTable, pending: Pending) -> anyhow::Result<FileEntry> {
    let Pending { mut entry, targets, subject } = pending;
    let id = FileId(entry.id);
    let mut seen: std::collections::HashMap<i32, u32> = std::collections::HashMap::new();
    for target in targets {
        let nth = seen.entry(target.fd).or_insert(0);
        let (ckpt_fd, ckpt_pid) = find(table, id, &target, *nth, &subject)?;
        *nth += 1;
        entry.tfd.push(EventpollTfdEntry {
            id: 0,
            tfd: target.fd.unsigned_abs(),
            events: target.events,
            data: target.data,
            dev: Some(target.dev),
            inode: Some(target.ino),
            pos: Some(target.pos),
            ckpt_fd,
            ckpt_pid,
        });
    }
    Ok(FileEntry { r#type: FdTypes::Eventpoll.into(), id: id.0, epfd: Some(entry), ..FileEntry::default() })
}

/// The number that names the file, if it is not the one under which it was added; and the process where
/// it does, if it is not the first that holds the set.
fn find(
    table: &FileTable,
    set: FileId,
    target: &EpollTarget,
    nth: u32,
    subject: &str,
) -> anyhow::Result<(Option<u32>, Option<u32>)> {
    let holders = table.holders_of(set);
    for (i, &(pid, set_fd)) in holders.iter().enumerate() {
        let ckpt_pid = (holders.first().map(|h| h.0) != Some(pid)).then_some(pid.0.unsigned_abs());
        // A set that the process has twice.
        if holders.iter().take(i).any(|h| h.0 == pid) {
            continue;
        }
        let is_target = |fd: TargetFd| {
            let set = (pid.leader(), set_fd);
            match file::is_epoll_target((pid.leader(), fd), set, target.fd, nth) {
                Ok(is) => Ok(is),
                Err(e) if e.errno == Errno::EBADF => Ok(false),
                Err(e) => Err(anyhow::Error::new(e).context(subject.to_owned())),
            }
        };
        if is_target(TargetFd(target.fd))? {
            return Ok((None, ckpt_pid));
        }
        for &(_, fd) in table.holders.values().flatten().filter(|(holder, _)| *holder == pid) {
            if is_target(fd)? {
                return Ok((Some(fd.0.unsigned_abs()), ckpt_pid));
            }
        }
    }
    let reason = format!(
        "epoll set: a file that was added as fd {} is open only in processes that do not have the set, or nowhere",
        target.fd
    );
    Err(Refused::new(subject, reason).into())
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let epfd = entry.epfd.as_ref().context("an epoll set without its entry")?;
        let fd: OwnedFd = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?.0;
        Opening::set_flags(std::os::fd::AsFd::as_fd(&fd), epfd.flags)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}

/// The calls that add those members of `set` that are the task's to add, and removes them from it.
/// The set is descriptor `epfd` in the task with table `fdinfo`, the `first` or a later one that has it.
pub(super) fn calls(
    epfd: u32,
    set: &mut EventpollFileEntry,
    first: bool,
    fdinfo: &[FdinfoEntry],
    pid: Pid,
) -> anyhow::Result<Vec<Call>> {
    let mut calls = Vec::new();
    let entry_of = |fd: u32| fdinfo.iter().find(|e| e.fd == fd);
    let val = |n: u32| Arg::Val(n.into());
    let its = |m: &EventpollTfdEntry| m.ckpt_pid.map_or(first, |of| of == pid.0.unsigned_abs());
    let (its, others) = std::mem::take(&mut set.tfd).into_iter().partition::<Vec<_>, _>(its);
    set.tfd = others;
    for member in &its {
        let tfd = member.tfd;
        let mut event = member.events.to_ne_bytes().to_vec();
        event.extend_from_slice(&member.data.to_ne_bytes());
        let name = format!("epoll_ctl({epfd}, EPOLL_CTL_ADD, {tfd})");
        let args = [val(epfd), Arg::from(libc::EPOLL_CTL_ADD), val(tfd), Arg::In(event)];
        let add = Call::new(name, libc::SYS_epoll_ctl, args);
        let Some(other) = member.ckpt_fd else {
            entry_of(tfd)
                .with_context(|| format!("pid {pid}: epoll set {epfd} has fd {tfd}, which is not open"))?;
            calls.push(add);
            continue;
        };
        entry_of(other)
            .with_context(|| format!("pid {pid}: epoll set {epfd} has fd {other}, which is not open"))?;
        let dup3 = |from: u32, to: u32, flags: i32| {
            Call::new(format!("dup3({from}, {to})"), libc::SYS_dup3, [val(from), val(to), Arg::from(flags)])
        };
        // A number that no descriptor of the task has.
        let free = fdinfo.iter().map(|e| e.fd).max().unwrap_or(0).max(tfd).saturating_add(1);
        let close = |fd: u32| Call::new(format!("close({fd})"), libc::SYS_close, [val(fd)]);
        match entry_of(tfd) {
            Some(taken) => {
                let flags = if taken.flags & 1 != 0 { libc::O_CLOEXEC } else { 0 };
                calls.extend([
                    dup3(tfd, free, 0),
                    dup3(other, tfd, 0),
                    add,
                    dup3(free, tfd, flags),
                    close(free),
                ]);
            }
            None => calls.extend([dup3(other, tfd, 0), add, close(tfd)]),
        }
    }
    Ok(calls)
}
