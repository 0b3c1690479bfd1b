//! Seccomp filters: seccomp(2), prctl(PR_SET_SECCOMP).
//!
//! A thread has a chain of filters, each a classic BPF program that judges every system call. Children and
//! new threads share what is there when they are made; SECCOMP_FILTER_FLAG_TSYNC gives a chain to all threads,
//! and does so only while theirs are older parts of it. The kernel tells the programs to a tracer with CAP_SYS_ADMIN.
//!
//! The image is one table for all tasks, where each filter names the one before it; a thread names its newest.
//!
//! Restore installs the chain, oldest first, and just before the credentials, since later the task may not be
//! allowed to. From then on the filters would judge the calls that are still to come, so they are
//! suspended (PTRACE_O_SUSPEND_SECCOMP) until the tasks are let go. Threads that had one chain get it by TSYNC,
//! so that it is one chain again.
//!
//! Strict mode is refused: there is nothing that a task in it could be told to do.

use std::collections::HashMap;

use anyhow::{Context, ensure};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{CoreEntry, SeccompEntry, SeccompFilter, SeccompMode},
};
use ckpt_remote::{Arg, Call, Thread};
use ckpt_sys::{
    Pid, Refused, RemoteAddr, Tid,
    capability::{self, number::SYS_ADMIN},
    ptrace,
};
use nix::errno::Errno;

use super::answers::malformed;

const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u64 = 1;
/// The flags that the kernel tells of a filter: SECCOMP_FILTER_FLAG_LOG.
const FLAG_LOG: u32 = 2;
/// Size of struct sock_filter.
const INSTRUCTION: usize = 8;
/// BPF_MAXINSNS
const MAX_INSTRUCTIONS: usize = 4096;
/// The kernel limits the length of all filters of a chain together to less.
const MAX_CHAIN: usize = 32768;

/// All filters of a tree, each once.
#[derive(Debug, Default)]
pub struct Filters {
    table: Vec<SeccompFilter>,
    newest: HashMap<Tid, u32>,
}

impl Filters {
    /// Reads the filters of frozen threads.
    ///
    /// # Errors
    /// [`Refused`] without CAP_SYS_ADMIN, or from under a filter of one's own.
    pub fn read<'a>(threads: impl IntoIterator<Item = (Pid, &'a Thread)>) -> anyhow::Result<Self> {
        let mut filters = Self::default();
        for (pid, thread) in threads {
            let tid = thread.tid;
            if thread.status.seccomp != SeccompMode::Filter as u32 {
                continue;
            }
            let mut prev = None;
            // The kernel counts from the oldest one.
            for index in 0.. {
                let filter = match ptrace::seccomp_filter(tid, index) {
                    Ok(filter) => filter,
                    Err(error) if error.errno == Errno::ENOENT => break,
                    Err(error) if matches!(error.errno, Errno::EACCES | Errno::EPERM) => {
                        let reason = "its seccomp filters are told to nobody without CAP_SYS_ADMIN, nor to a tool that is filtered itself";
                        return Err(Refused::new(format!("pid {pid} tid {tid}"), reason)
                            .advise("run ckpt-scan as root, outside of a container")
                            .into());
                    }
                    Err(error) => return Err(error.into()),
                };
                let flags = ptrace::seccomp_flags(tid, index)?;
                prev = Some(filters.add(prev, u32::try_from(flags).ok().filter(|&f| f != 0), filter));
            }
            if let Some(newest) = prev {
                filters.newest.insert(tid, newest);
            }
        }
        Ok(filters)
    }

    fn add(&mut self, prev: Option<u32>, flags: Option<u32>, filter: Vec<u8>) -> u32 {
        let filter = SeccompFilter { filter, prev, flags };
        let known = self.table.iter().position(|known| *known == filter);
        let index = known.unwrap_or_else(|| {
            self.table.push(filter);
            self.table.len() - 1
        });
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// The image.
    #[must_use]
    pub fn entry(&self) -> SeccompEntry {
        SeccompEntry { seccomp_filters: self.table.clone() }
    }

    /// Notes in the core entry of `tid` which filters it has.
    pub fn note(&self, tid: Tid, core: &mut CoreEntry) {
        if let (Some(&newest), Some(thread)) = (self.newest.get(&tid), &mut core.thread_core) {
            thread.set_seccomp_mode(SeccompMode::Filter);
            thread.seccomp_filter = Some(newest);
        }
    }
}

/// The filters of the images, checked.
#[derive(Debug, Default)]
pub struct Table(Vec<SeccompFilter>);

/// A filter to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Its instructions, as the kernel takes them.
    pub program: Vec<u8>,
    flags: u64,
}

impl Table {
    /// Reads the image; there may be none.
    ///
    /// # Errors
    /// Malformed filters.
    pub fn read(set: &ImageSet) -> anyhow::Result<Self> {
        let entries: Vec<SeccompEntry> = set.all(Image::Seccomp, 0)?;
        let filters: Vec<SeccompFilter> = entries.into_iter().flat_map(|e| e.seccomp_filters).collect();
        for (index, filter) in filters.iter().enumerate() {
            let len = filter.filter.len();
            let sane = len > 0 && len.is_multiple_of(INSTRUCTION) && len / INSTRUCTION <= MAX_INSTRUCTIONS;
            // An older one comes first, so there are no circles.
            let older = filter.prev.is_none_or(|prev| usize::try_from(prev).is_ok_and(|prev| prev < index));
            if !(sane && older && filter.flags.unwrap_or(0) & !FLAG_LOG == 0) {
                return Err(malformed(format!("seccomp filter {index}")));
            }
        }
        Ok(Self(filters))
    }

    /// The filters of a thread, oldest first.
    ///
    /// # Errors
    /// [`Refused`] for what can't be restored here; an entry that names no filter.
    pub fn of(&self, core: &CoreEntry) -> anyhow::Result<Vec<Filter>> {
        let Some(thread) = &core.thread_core else { return Ok(Vec::new()) };
        match thread.seccomp_mode() {
            SeccompMode::Disabled => return Ok(Vec::new()),
            SeccompMode::Strict => {
                let reason = "is confined by seccomp in strict mode, which can't be restored";
                return Err(Refused::new("the thread", reason).into());
            }
            SeccompMode::Filter => {}
        }
        if !capability::held(SYS_ADMIN) {
            return Err(Refused::new(
                "the thread",
                "is confined by seccomp; to restore that needs CAP_SYS_ADMIN",
            )
            .advise("run ckpt-restore as root")
            .into());
        }
        let mut chain = Vec::new();
        let mut next = thread.seccomp_filter;
        while let Some(index) = next {
            let filter = usize::try_from(index).ok().and_then(|index| self.0.get(index));
            let filter = filter.ok_or_else(|| malformed(format!("no seccomp filter {index}")))?;
            chain.push(Filter { program: filter.filter.clone(), flags: filter.flags.unwrap_or(0).into() });
            ensure!(chain.len() <= MAX_CHAIN, malformed("an endless chain of seccomp filters"));
            next = filter.prev;
        }
        if chain.is_empty() {
            return Err(malformed("a thread under a seccomp filter that is not named"));
        }
        chain.reverse();
        Ok(chain)
    }
}

/// The calls, of a task, that install `filter`, whose program lies at `at` in its memory; for all threads
/// of the process if `all`.
///
/// # Errors
/// It is too long.
pub fn install(filter: &Filter, at: RemoteAddr, all: bool) -> anyhow::Result<Call> {
    let count = u16::try_from(filter.program.len() / INSTRUCTION).context("a seccomp filter")?;
    // struct sock_fprog: a number of instructions, padding, their address.
    let program = [u64::from(count).to_le_bytes(), at.0.to_le_bytes()].concat();
    let flags = filter.flags | if all { FLAG_TSYNC } else { 0 };
    let args = [Arg::Val(SECCOMP_SET_MODE_FILTER), Arg::Val(flags), Arg::In(program)];
    Ok(Call::new("seccomp(SECCOMP_SET_MODE_FILTER)", libc::SYS_seccomp, args))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(filters: &[(usize, Option<u32>)]) -> Filters {
        let mut all = Filters::default();
        for &(len, prev) in filters {
            all.add(prev, None, vec![0; len]);
        }
        all
    }

    #[test]
    fn equal_filters_are_kept_once_if_their_past_is_equal() {
        let filters = table(&[(8, None), (16, Some(0)), (16, Some(0)), (16, None), (16, Some(1))]);
        assert_eq!(filters.entry().seccomp_filters.len(), 4);
    }

    #[test]
    fn chains_come_oldest_first() {
        let table = Table(table(&[(8, None), (16, Some(0)), (24, Some(1))]).entry().seccomp_filters);
        let mut core = CoreEntry { thread_core: Some(Default::default()), ..Default::default() };
        assert_eq!(table.of(&core).unwrap(), []);
        let thread = core.thread_core.as_mut().unwrap();
        thread.set_seccomp_mode(SeccompMode::Filter);
        thread.seccomp_filter = Some(2);
        if capability::held(SYS_ADMIN) {
            let lengths: Vec<_> = table.of(&core).unwrap().iter().map(|f| f.program.len()).collect();
            assert_eq!(lengths, [8, 16, 24]);
        }
        core.thread_core.as_mut().unwrap().seccomp_filter = Some(3);
        assert!(table.of(&core).is_err());
        core.thread_core.as_mut().unwrap().set_seccomp_mode(SeccompMode::Strict);
        assert!(table.of(&core).is_err());
    }
}
