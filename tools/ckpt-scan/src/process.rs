//! One process of the tree.

use std::{ops::Range, path::PathBuf};

use anyhow::Context;
use ckpt_kinds::{
    Sink,
    fd::FileTable,
    mem::{self, flags::Flags},
    sink::emit,
    task::{self, ThreadInput, seccomp::Filters},
};
use ckpt_proto::{
    Image,
    types::{FsEntry, TaskKobjIdsEntry, VmaEntry},
};
use ckpt_remote::{Frozen, Process, RemoteError, interrupted_call};
use ckpt_sys::{Pid, Refused};

use crate::number;

/// Emits everything of `process` but its pages; gives its mappings. Those that our tracking watches are
/// listed in `watched`.
///
/// # Errors
/// A refusal, or the kernel's.
#[expect(clippy::too_many_arguments, reason = "what all processes of a tree share, and one of them")]
pub fn dump(
    frozen: &mut Frozen,
    process: &Process,
    ids: TaskKobjIdsEntry,
    flags: Flags,
    files: &mut FileTable,
    filters: &Filters,
    processors: Option<&[u8]>,
    watched: Option<&mut Vec<Range<u64>>>,
    sink: &mut dyn Sink,
) -> anyhow::Result<Vec<VmaEntry>> {
    let pid = process.pid;
    let arg = number(pid.0);
    emit(sink, Image::Ids, arg, &ids)?;

    let exe_file_id = files.add_path(pid, &link(pid, "exe"), libc_rdonly(), sink)?;
    let mappings = flags.mappings(pid, frozen.maps(pid))?;
    let vmas = mem::dump::dump_vmas(pid, &process.comm(), &mappings, files, sink, watched)?;
    let mut mm = None;
    for thread in &process.threads {
        let what = || format!("tid {}", thread.tid);
        let mut borrowed = frozen.borrow(pid, thread.tid).map_err(as_refusal).with_context(what)?;
        let leader = thread.tid == pid.leader();
        let input = ThreadInput {
            pid,
            tid: thread.tid,
            remote: &mut borrowed,
            regs: interrupted_call(pid, &thread.regs),
            sigmask: thread.sigmask,
            stopped_by: process.stopped_by,
            stat: &process.stat,
            status: &thread.status,
            processors,
        };
        let mut core = if leader {
            let (core, fields) = task::dump_leader(input).with_context(what)?;
            mm = Some(fields);
            core
        } else {
            task::dump_thread(input).with_context(what)?
        };
        borrowed.finish().with_context(what)?;
        filters.note(thread.tid, &mut core);
        emit(sink, Image::Core, number(thread.tid.0), &core)?;
    }
    let mut mm = mm.context("its main thread is gone")?;
    mm.exe_file_id = exe_file_id;
    mm.vmas.clone_from(&vmas);
    if flags.may_have_guards(&mappings) {
        mm.ckpt_guards = mem::guard::find(pid, &vmas)?;
    }
    emit(sink, Image::Mm, arg, &mm)?;

    let cwd_id = files.add_path(pid, &link(pid, "cwd"), libc_rdonly(), sink)?;
    let root_id = files.add_path(pid, &link(pid, "root"), libc_rdonly(), sink)?;
    let leader = process.threads.first().context("its main thread is gone")?;
    let umask = leader.status.umask.with_context(|| format!("/proc/{pid}/status: no Umask"))?;
    emit(sink, Image::Fs, arg, &FsEntry { cwd_id, root_id, umask: Some(umask) })?;
    files.add_task(pid, &process.comm(), ids.files_id, sink)?;
    Ok(vmas)
}

/// A task that can't be asked can't be checkpointed.
fn as_refusal(error: RemoteError) -> anyhow::Error {
    match error {
        RemoteError::Unusable { tid, what } => Refused::new(format!("tid {tid}"), what).into(),
        error => error.into(),
    }
}

fn link(pid: Pid, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// O_RDONLY.
fn libc_rdonly() -> u32 {
    nix::fcntl::OFlag::O_RDONLY.bits().unsigned_abs()
}
