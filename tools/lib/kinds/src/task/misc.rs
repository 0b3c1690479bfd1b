//! Small settings: name, personality, where the kernel clears the thread id, robust futexes,
//! restartable sequences, parent-death signal, subreaper, membarrier registrations.

use anyhow::Context;
use ckpt_proto::types::RseqEntry;
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Refused, Tid, procfs, ptrace};
use nix::errno::Errno;

use super::answers::{Answers, u32_at, u64_at};

/// linux/prctl.h, linux/membarrier.h
const PR_SET_PDEATHSIG: i32 = 1;
const PR_GET_PDEATHSIG: i32 = 2;
const PR_SET_NAME: i32 = 15;
const PR_SET_CHILD_SUBREAPER: i32 = 36;
const PR_GET_CHILD_SUBREAPER: i32 = 37;
const PR_GET_TID_ADDRESS: i32 = 40;
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
/// The commands that register: global, private, private with core serialisation, private with rseq.
const MEMBARRIER_REGISTER: [u32; 4] = [1 << 2, 1 << 4, 1 << 6, 1 << 8];
/// Size of struct robust_list_head.
const ROBUST_HEAD: u64 = 24;
/// Longest command name.
const COMM: usize = 15;

/// Of each thread.
pub(super) fn ask_thread(calls: &mut Vec<Call>) {
    let get = |name: &str, option: i32, len| Call::new(name, libc::SYS_prctl, [option.into(), Arg::Out(len)]);
    calls.push(get("prctl(PR_GET_TID_ADDRESS)", PR_GET_TID_ADDRESS, 8).may_fail());
    calls.push(get("prctl(PR_GET_PDEATHSIG)", PR_GET_PDEATHSIG, 4));
}

/// Where the kernel clears the thread id, and the parent-death signal.
pub(super) fn read_thread(tid: Tid, answers: &mut Answers) -> anyhow::Result<(u64, Option<u32>)> {
    let address = answers.bytes_if_any()?.ok_or_else(|| {
        Refused::new(format!("tid {tid}"), "the kernel does not tell its clear_child_tid address")
            .advise("the kernel needs CONFIG_CHECKPOINT_RESTORE")
    })?;
    let signal = u32_at(&answers.bytes()?, 0);
    Ok((u64_at(&address, 0), (signal != 0).then_some(signal)))
}

/// Of each process.
pub(super) fn ask_process(calls: &mut Vec<Call>) {
    let args = [PR_GET_CHILD_SUBREAPER.into(), Arg::Out(4)];
    calls.push(Call::new("prctl(PR_GET_CHILD_SUBREAPER)", libc::SYS_prctl, args));
    let args = [Arg::Val(MEMBARRIER_CMD_GET_REGISTRATIONS), Arg::Val(0), Arg::Val(0)];
    calls.push(Call::new("membarrier(GET_REGISTRATIONS)", libc::SYS_membarrier, args).may_fail());
    // This value asks and sets nothing (personality(2)).
    calls.push(Call::new("personality", libc::SYS_personality, [Arg::Val(0xffff_ffff)]));
}

/// What [`ask_process`] asked for.
pub(super) struct OfProcess {
    pub(super) subreaper: bool,
    /// Registrations, if there are any (unknown before Linux 6.3).
    pub(super) membarrier: Option<u32>,
    /// Execution domain.
    pub(super) personality: u32,
}

pub(super) fn read_process(answers: &mut Answers) -> anyhow::Result<OfProcess> {
    let subreaper = u32_at(&answers.bytes()?, 0) != 0;
    let registrations = match answers.result()? {
        Ok(mask) => u32::try_from(mask)?,
        Err(Errno::EINVAL | Errno::ENOSYS) => 0,
        Err(errno) => return Err(errno).context("membarrier(GET_REGISTRATIONS)"),
    };
    let personality = u32::try_from(answers.value()?)?;
    Ok(OfProcess { subreaper, membarrier: (registrations != 0).then_some(registrations), personality })
}

/// A number in a /proc file that some kernels lack.
pub(super) fn number_if_any<T: std::str::FromStr>(path: &str) -> anyhow::Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match procfs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().parse().with_context(|| path.to_owned())?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context(path.to_owned()),
    }
}

/// Which mappings a core dump would hold; none on kernels that write no core dumps.
pub(super) fn coredump_filter(pid: Pid) -> anyhow::Result<Option<u32>> {
    let path = format!("/proc/{pid}/coredump_filter");
    match procfs::read_to_string(&path) {
        Ok(text) => Ok(Some(u32::from_str_radix(text.trim(), 16).context(path)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context(path),
    }
}

/// Sets that from outside. It belongs to the address space, so any task of it will do.
pub(super) fn restore_coredump_filter(pid: Pid, filter: u32) -> anyhow::Result<()> {
    if coredump_filter(pid)?.is_none_or(|now| now == filter) {
        return Ok(());
    }
    let path = format!("/proc/{pid}/coredump_filter");
    std::fs::write(&path, format!("{filter:#x}")).context(path)
}

/// The rseq area, if the thread registered one.
pub(super) fn rseq(tid: Tid) -> anyhow::Result<Option<RseqEntry>> {
    let config = ptrace::rseq(tid)?;
    Ok((config.abi_pointer != 0).then_some(RseqEntry {
        rseq_abi_pointer: config.abi_pointer,
        rseq_abi_size: config.abi_size,
        signature: config.signature,
        rseq_cs_pointer: None,
    }))
}

pub(super) fn restore_rseq(rseq: &RseqEntry) -> Option<Call> {
    let args = [
        Arg::Val(rseq.rseq_abi_pointer),
        Arg::Val(rseq.rseq_abi_size.into()),
        Arg::Val(0),
        Arg::Val(rseq.signature.into()),
    ];
    (rseq.rseq_abi_pointer != 0).then(|| Call::new("rseq", libc::SYS_rseq, args))
}

pub(super) fn restore_robust_list(head: u64) -> Option<Call> {
    let args = [Arg::Val(head), Arg::Val(ROBUST_HEAD)];
    (head != 0).then(|| Call::new("set_robust_list", libc::SYS_set_robust_list, args))
}

pub(super) fn restore_tid_address(address: u64) -> Call {
    Call::new("set_tid_address", libc::SYS_set_tid_address, [Arg::Val(address)])
}

pub(super) fn restore_comm(comm: &[u8]) -> Call {
    let mut name: Vec<u8> = comm.iter().copied().take(COMM).collect();
    name.push(0);
    Call::new("prctl(PR_SET_NAME)", libc::SYS_prctl, [PR_SET_NAME.into(), Arg::In(name)])
}

pub(super) fn restore_pdeathsig(signal: u32) -> Call {
    Call::new("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, [PR_SET_PDEATHSIG.into(), Arg::Val(signal.into())])
}

pub(super) fn restore_personality(personality: u32) -> Call {
    Call::new("personality", libc::SYS_personality, [Arg::Val(personality.into())])
}

pub(super) fn restore_subreaper(on: bool) -> Call {
    let args = [PR_SET_CHILD_SUBREAPER.into(), Arg::Val(on.into())];
    Call::new("prctl(PR_SET_CHILD_SUBREAPER)", libc::SYS_prctl, args)
}

pub(super) fn restore_membarrier(registrations: u32) -> Vec<Call> {
    let register = |command: u32| {
        let args = [Arg::Val(command.into()), Arg::Val(0), Arg::Val(0)];
        Call::new(format!("membarrier({command:#x})"), libc::SYS_membarrier, args)
    };
    MEMBARRIER_REGISTER.into_iter().filter(|c| registrations & c != 0).map(register).collect()
}
