//! An address space apart from its mappings: where code, heap, stack and arguments lie, the auxiliary
//! vector, whether it may be dumped, huge pages.
//!
//! prctl(PR_SET_MM_MAP) sets the addresses, the vector and the executable at once, and unlike the older
//! PR_SET_MM options it does not need CAP_SYS_RESOURCE.

use anyhow::Context;
use ckpt_proc::stat::Stat;
use ckpt_proto::types::MmEntry;
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Refused, RemoteAddr, procfs};

use super::answers::{Answers, u32_at, words};

/// linux/prctl.h
const PR_GET_DUMPABLE: i32 = 3;
const PR_SET_DUMPABLE: i32 = 4;
const PR_GET_TSC: i32 = 25;
const PR_TSC_ENABLE: u32 = 1;
const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: i32 = 14;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_GET_MDWE: i32 = 66;
/// Most words that an auxiliary vector is written with; the kernel keeps fewer.
pub(super) const MAX_AUXV: usize = 126;

pub(super) fn ask(calls: &mut Vec<Call>) {
    let get = |name: &str, option: i32| Call::new(name, libc::SYS_prctl, [option.into()]);
    let zeros = [Arg::Val(0), Arg::Val(0), Arg::Val(0), Arg::Val(0)];
    let with_zeros = |name: &str, option: i32| {
        Call::new(name, libc::SYS_prctl, std::iter::once(option.into()).chain(zeros.clone())).may_fail()
    };
    calls.extend([
        Call::new("brk(0)", libc::SYS_brk, [Arg::Val(0)]),
        get("prctl(PR_GET_DUMPABLE)", PR_GET_DUMPABLE),
        with_zeros("prctl(PR_GET_THP_DISABLE)", PR_GET_THP_DISABLE),
        with_zeros("prctl(PR_GET_MDWE)", PR_GET_MDWE),
        Call::new("prctl(PR_GET_TSC)", libc::SYS_prctl, [PR_GET_TSC.into(), Arg::Out(4)]).may_fail(),
    ]);
}

pub(super) fn read(pid: Pid, stat: &Stat, answers: &mut Answers) -> anyhow::Result<MmEntry> {
    let brk = answers.value()?;
    let dumpable = i32::try_from(answers.value()?)?;
    let thp_disabled = answers.result()?.is_ok_and(|v| v != 0);
    if answers.result()?.is_ok_and(|v| v != 0) {
        let reason = "memory-deny-write-execute is on (PR_SET_MDWE), which has no place in the images";
        return Err(Refused::new(format!("pid {pid}"), reason).into());
    }
    if answers.bytes_if_any()?.is_some_and(|v| u32_at(&v, 0) != PR_TSC_ENABLE) {
        let reason = "reading the time-stamp counter is off (PR_SET_TSC), which has no place in the images";
        return Err(Refused::new(format!("pid {pid}"), reason).into());
    }
    let path = format!("/proc/{pid}/auxv");
    let auxv = procfs::read(&path).context(path)?;
    Ok(MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: brk,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id: 0,
        mm_saved_auxv: parse_auxv(&auxv),
        vmas: Vec::new(),
        dumpable: Some(dumpable),
        aios: Vec::new(),
        thp_disabled: Some(thp_disabled),
        ckpt_guards: Vec::new(),
    })
}

/// The vector's words up to its end mark (type `AT_NULL`), which is not stored.
fn parse_auxv(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    pairs
        .iter()
        .map(|pair| pair.map(u64::from_le_bytes))
        .take_while(|[kind, _]| *kind != 0)
        .flatten()
        .collect()
}

/// The vector with its end mark.
pub(super) fn auxv_bytes(mm: &MmEntry) -> Vec<u8> {
    let mut all: Vec<u64> = mm.mm_saved_auxv.iter().copied().take(MAX_AUXV).collect();
    all.resize(all.len().next_multiple_of(2), 0);
    all.extend([0, 0]);
    words(&all)
}

pub(super) fn restore(mm: &MmEntry, exe_fd: i32, auxv_at: RemoteAddr) -> Vec<Call> {
    // struct prctl_mm_map
    let map = words(&[
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        auxv_at.0,
        (auxv_bytes(mm).len() as u64) | u64::from(exe_fd.cast_unsigned()) << 32,
    ]);
    let len = map.len() as u64;
    let args = [PR_SET_MM.into(), PR_SET_MM_MAP.into(), Arg::In(map), Arg::Val(len), Arg::Val(0)];
    let thp = u64::from(mm.thp_disabled == Some(true));
    let thp_args = [PR_SET_THP_DISABLE.into(), Arg::Val(thp), Arg::Val(0), Arg::Val(0), Arg::Val(0)];
    let mut set_thp = Call::new("prctl(PR_SET_THP_DISABLE)", libc::SYS_prctl, thp_args);
    set_thp.may_fail = thp == 0;
    vec![Call::new("prctl(PR_SET_MM, PR_SET_MM_MAP)", libc::SYS_prctl, args), set_thp]
}

/// A value of 2 ("readable by root only") can't be asked for; the kernel gives it by itself to tasks whose
/// credentials changed, where it is configured to. 0 denies no less.
pub(super) fn restore_dumpable(mm: &MmEntry) -> Option<Call> {
    let value = u64::from(mm.dumpable? == 1);
    Some(Call::new("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, [PR_SET_DUMPABLE.into(), Arg::Val(value)]))
}

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::selfcall;

    fn dump_self(pid: Pid) -> MmEntry {
        let stat = ckpt_proc::stat::parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        let mut calls = Vec::new();
        ask(&mut calls);
        read(pid, &stat, &mut Answers::run(&mut Own, calls).unwrap()).unwrap()
    }

    #[test]
    fn own_address_space_comes_back() {
        let code = selfcall::in_child(|| {
            let pid = Pid(nix::unistd::getpid().as_raw());
            let mut want = dump_self(pid);
            assert_eq!((want.dumpable, want.thp_disabled), (Some(1), Some(false)));
            assert!(want.mm_start_code < want.mm_end_code && want.mm_brk >= want.mm_start_brk);
            assert!(want.mm_arg_start < want.mm_arg_end && want.mm_saved_auxv.len().is_multiple_of(2));
            // Something of everything changes.
            want.mm_arg_end -= 1;
            want.mm_end_data += 8;
            want.mm_saved_auxv.extend([99, 0, 98, 7]);
            (want.dumpable, want.thp_disabled) = (Some(0), Some(true));
            let auxv = auxv_bytes(&want);
            Own.run(&restore(&want, -1, RemoteAddr(auxv.as_ptr() as u64))).unwrap();
            let text = std::fs::read("/proc/self/auxv").unwrap();
            assert_eq!(parse_auxv(&text), want.mm_saved_auxv);
            Own.run(&restore_dumpable(&want).into_iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(dump_self(pid), want);
            0
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn auxv_ends_at_its_mark() {
        assert_eq!(parse_auxv(&words(&[33, 1, 23, 0, 28, 32, 0, 0, 5, 5])), [33, 1, 23, 0, 28, 32]);
        assert_eq!(parse_auxv(&words(&[33])), []);
    }
}
