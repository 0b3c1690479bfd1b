//! ptrace(2) requests that `nix` does not wrap.

use std::ffi::c_void;

use nix::{errno::Errno, sys::signal::Signal};

use crate::{SysError, Tid};

/// General registers, `struct user_regs_struct`.
pub use libc::user_regs_struct as Regs;

/// Register set of the extended processor state (`NT_X86_XSTATE`, linux/elf.h).
pub const NT_X86_XSTATE: i32 = 0x202;

const PTRACE_GETREGSET: u32 = 0x4204;
const PTRACE_SETREGSET: u32 = 0x4205;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_GET_THREAD_AREA: u32 = 25;

/// The raw request.
///
/// # Safety
/// `addr` and `data` must be what the request takes: pointers to memory that it may fill or read.
unsafe fn request(
    request: u32,
    call: &'static str,
    tid: Tid,
    addr: *mut c_void,
    data: *mut c_void,
) -> Result<i64, SysError> {
    // SAFETY: the caller keeps ptrace's rules for this request.
    let ret = unsafe { libc::ptrace(request as libc::c_uint, tid.0, addr, data) };
    if ret == -1 { Err(SysError::new(call, format!("tid {tid}"), Errno::last())) } else { Ok(ret) }
}

fn number(n: usize) -> *mut c_void {
    n as *mut c_void
}

/// Register set `kind` of a stopped task; at most `limit` bytes.
///
/// # Errors
/// ENODEV if the processor has no such set, ESRCH if the task is not stopped or gone.
pub fn get_regset(tid: Tid, kind: i32, limit: usize) -> Result<Vec<u8>, SysError> {
    let mut bytes = vec![0_u8; limit];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: limit };
    // SAFETY: `iov` describes `bytes`, which outlives the call; the kernel writes at most iov_len bytes.
    unsafe {
        request(
            PTRACE_GETREGSET,
            "ptrace(GETREGSET)",
            tid,
            number(kind.unsigned_abs() as usize),
            (&raw mut iov).cast(),
        )
    }?;
    bytes.truncate(iov.iov_len);
    Ok(bytes)
}

/// Sets register set `kind` of a stopped task.
///
/// # Errors
/// EINVAL for bad contents, ESRCH if the task is not stopped or gone.
pub fn set_regset(tid: Tid, kind: i32, bytes: &[u8]) -> Result<(), SysError> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: SETREGSET only reads the memory that `iov` describes.
    unsafe {
        request(
            PTRACE_SETREGSET,
            "ptrace(SETREGSET)",
            tid,
            number(kind.unsigned_abs() as usize),
            (&raw mut iov).cast(),
        )
    }
    .map(drop)
}

/// Signal mask of a stopped task, bit n-1 for signal n.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn sigmask(tid: Tid) -> Result<u64, SysError> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes 8 bytes, the size given, to `mask`.
    unsafe { request(PTRACE_GETSIGMASK, "ptrace(GETSIGMASK)", tid, number(8), (&raw mut mask).cast()) }?;
    Ok(mask)
}

/// Sets the signal mask of a stopped task.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn set_sigmask(tid: Tid, mask: u64) -> Result<(), SysError> {
    let mut mask = mask;
    // SAFETY: the kernel reads 8 bytes, the size given, from `mask`.
    unsafe { request(PTRACE_SETSIGMASK, "ptrace(SETSIGMASK)", tid, number(8), (&raw mut mask).cast()) }
        .map(drop)
}

/// Pending signals of a stopped task (`shared`: of its process), each as the 128 bytes of a siginfo_t.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn pending_signals(tid: Tid, shared: bool) -> Result<Vec<[u8; 128]>, SysError> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut all = Vec::new();
    loop {
        let mut chunk = [[0_u8; 128]; 32];
        let mut args = Args { off: all.len() as u64, flags: u32::from(shared), nr: 32 };
        // SAFETY: the kernel reads `args` and writes at most `nr` siginfo_t of 128 bytes to `chunk`.
        let n = unsafe {
            request(
                PTRACE_PEEKSIGINFO,
                "ptrace(PEEKSIGINFO)",
                tid,
                (&raw mut args).cast(),
                (&raw mut chunk).cast(),
            )
        }?;
        let n = usize::try_from(n).unwrap_or(0);
        if n == 0 {
            return Ok(all);
        }
        all.extend_from_slice(&chunk[..n]);
    }
}

/// Seccomp filter number `index` of a stopped task, the oldest being 0: its instructions, 8 bytes each.
///
/// # Errors
/// ENOENT if it has fewer; EACCES without CAP_SYS_ADMIN or under a filter of one's own.
pub fn seccomp_filter(tid: Tid, index: usize) -> Result<Vec<u8>, SysError> {
    const NAME: &str = "ptrace(SECCOMP_GET_FILTER)";
    /// Size of struct sock_filter.
    const INSTRUCTION: usize = 8;
    // SAFETY: without a place to write to, the kernel only counts.
    let count = unsafe { request(PTRACE_SECCOMP_GET_FILTER, NAME, tid, number(index), number(0)) }?;
    let mut program = vec![0_u8; usize::try_from(count).unwrap_or(0) * INSTRUCTION];
    // SAFETY: it writes the instructions that it has counted, and filters never change.
    unsafe { request(PTRACE_SECCOMP_GET_FILTER, NAME, tid, number(index), program.as_mut_ptr().cast()) }?;
    Ok(program)
}

/// `SECCOMP_FILTER_FLAG_*` of that filter, as far as the kernel keeps them.
///
/// # Errors
/// As [`seccomp_filter`].
pub fn seccomp_flags(tid: Tid, index: usize) -> Result<u64, SysError> {
    // struct seccomp_metadata: the index goes in, the flags come out.
    let mut metadata = [index as u64, 0];
    // SAFETY: the kernel reads and writes at most the given size of `metadata`.
    unsafe {
        request(
            PTRACE_SECCOMP_GET_METADATA,
            "ptrace(SECCOMP_GET_METADATA)",
            tid,
            number(size_of_val(&metadata)),
            metadata.as_mut_ptr().cast(),
        )
    }?;
    Ok(metadata[1])
}

/// A task's registered restartable-sequences area (linux/ptrace.h, Linux 5.13).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of struct rseq; 0 if none is registered.
    pub abi_pointer: u64,
    /// Its registered size, bytes.
    pub abi_size: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    /// Always 0 now.
    pub flags: u32,
    pad: u32,
}

/// The rseq area of a stopped task.
///
/// # Errors
/// EIO before Linux 5.13, ESRCH if the task is not stopped or gone.
pub fn rseq(tid: Tid) -> Result<RseqConfiguration, SysError> {
    let mut config = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    // SAFETY: the kernel writes at most `size` bytes to `config`.
    unsafe {
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            "ptrace(GET_RSEQ_CONFIGURATION)",
            tid,
            number(size),
            (&raw mut config).cast(),
        )
    }?;
    Ok(config)
}

/// GDT entry `index` (12 to 14: the TLS slots) as `struct user_desc`: entry number, base, limit, flags.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn thread_area(tid: Tid, index: usize) -> Result<[u32; 4], SysError> {
    let mut desc = [0_u32; 4];
    // SAFETY: the kernel writes a struct user_desc, which is four 32-bit words.
    unsafe {
        request(PTRACE_GET_THREAD_AREA, "ptrace(GET_THREAD_AREA)", tid, number(index), (&raw mut desc).cast())
    }?;
    Ok(desc)
}

/// Address of the robust futex list head of `tid` and its length (get_robust_list(2)); no ptrace needed.
///
/// # Errors
/// EPERM, ESRCH.
pub fn robust_list(tid: Tid) -> Result<(u64, u64), SysError> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: the kernel writes one pointer and one size_t to the two places.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    if ret == 0 { Ok((head, len)) } else { Err(SysError::last("get_robust_list", format!("tid {tid}"))) }
}

/// Lets a stopped task run on until its next stop, with `signal` delivered (0: none) and, with
/// `syscalls`, stopping at system call entry and exit too.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn resume(tid: Tid, signal: i32, syscalls: bool) -> Result<(), SysError> {
    let (op, name) = if syscalls {
        (libc::PTRACE_SYSCALL, "ptrace(SYSCALL)")
    } else {
        (libc::PTRACE_CONT, "ptrace(CONT)")
    };
    // SAFETY: CONT and SYSCALL take a signal number and touch no memory.
    unsafe { request(op, name, tid, number(0), number(signal.unsigned_abs() as usize)) }.map(drop)
}

/// Sends `signal` to one thread of a process (tgkill(2)).
///
/// # Errors
/// ESRCH if it is gone, EPERM.
pub fn signal_thread(pid: crate::Pid, tid: Tid, signal: i32) -> Result<(), SysError> {
    // SAFETY: tgkill takes three integers and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_tgkill, pid.0, tid.0, signal) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("tgkill", format!("tid {tid}"))) }
}

/// Ends tracing of a stopped task, delivering `signal` (0: none).
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn detach(tid: Tid, signal: i32) -> Result<(), SysError> {
    // SAFETY: DETACH takes a signal number and touches no memory.
    unsafe {
        request(libc::PTRACE_DETACH, "ptrace(DETACH)", tid, number(0), number(signal.unsigned_abs() as usize))
    }
    .map(drop)
}

/// Kills the process of a tracee with SIGKILL. The kernel takes it from whoever traces: neither kill(2) nor CAP_KILL is
/// needed.
///
/// # Errors
/// ESRCH if it is gone, or not a tracee of the calling thread.
pub fn kill(tid: Tid) -> Result<(), SysError> {
    // SAFETY: KILL takes nothing.
    unsafe { request(libc::PTRACE_KILL, "ptrace(KILL)", tid, number(0), number(0)) }.map(drop)
}

/// Attaches to `tid` without stopping it; `options` are `PTRACE_O_*` bits.
///
/// # Errors
/// EPERM if it is traced already or may not be traced, ESRCH if it is gone.
pub fn seize(tid: Tid, options: u32) -> Result<(), SysError> {
    // SAFETY: SEIZE takes an integer and touches no memory.
    unsafe { request(libc::PTRACE_SEIZE, "ptrace(SEIZE)", tid, number(0), number(options as usize)) }
        .map(drop)
}

/// Asks a seized task to stop.
///
/// # Errors
/// ESRCH if it is gone.
pub fn interrupt(tid: Tid) -> Result<(), SysError> {
    // SAFETY: INTERRUPT takes nothing.
    unsafe { request(libc::PTRACE_INTERRUPT, "ptrace(INTERRUPT)", tid, number(0), number(0)) }.map(drop)
}

/// Changes the `PTRACE_O_*` bits of a stopped task.
///
/// # Errors
/// EPERM (PTRACE_O_SUSPEND_SECCOMP without CAP_SYS_ADMIN), EINVAL, ESRCH.
pub fn set_options(tid: Tid, options: u32) -> Result<(), SysError> {
    // SAFETY: SETOPTIONS takes an integer and touches no memory.
    unsafe {
        request(libc::PTRACE_SETOPTIONS, "ptrace(SETOPTIONS)", tid, number(0), number(options as usize))
    }
    .map(drop)
}

/// General registers of a stopped task.
///
/// # Errors
/// ESRCH if the task is not stopped or gone.
pub fn regs(tid: Tid) -> Result<Regs, SysError> {
    nix::sys::ptrace::getregs(tid.nix())
        .map_err(|e| SysError::new("ptrace(GETREGS)", format!("tid {tid}"), e))
}

/// Sets the general registers of a stopped task.
///
/// # Errors
/// EIO for values that the kernel refuses, ESRCH if the task is not stopped or gone.
pub fn set_regs(tid: Tid, regs: Regs) -> Result<(), SysError> {
    nix::sys::ptrace::setregs(tid.nix(), regs)
        .map_err(|e| SysError::new("ptrace(SETREGS)", format!("tid {tid}"), e))
}

/// The event of a `PTRACE_EVENT_*` stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// About to receive this signal.
    Signal(i32),
    /// PTRACE_EVENT_STOP after INTERRUPT, or of a new child.
    Interrupted,
    /// PTRACE_EVENT_STOP in a group-stop by this signal.
    Group(i32),
    /// Entry to or exit from a system call (with PTRACE_O_TRACESYSGOOD).
    Syscall,
    /// Another `PTRACE_EVENT_*`.
    Event(i32),
    /// Gone, with this exit code.
    Exited(i32),
    /// Killed by this signal.
    Killed(i32),
}

/// Waits for the next stop of `tid` (`__WALL`). With `nohang`, `None` when there is none yet.
///
/// # Errors
/// ECHILD if it is not a tracee of the calling thread.
pub fn wait(tid: Tid, nohang: bool) -> Result<Option<Stop>, SysError> {
    let mut status = 0;
    let flags = libc::__WALL | if nohang { libc::WNOHANG } else { 0 };
    loop {
        // SAFETY: waitpid writes one int to `status`.
        let ret = unsafe { libc::waitpid(tid.0, &raw mut status, flags) };
        match ret {
            0 => return Ok(None),
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(SysError::last("waitpid", format!("tid {tid}"))),
            _ => return Ok(Some(decode(status))),
        }
    }
}

/// Waits for the next stop or end of any tracee or child of the calling thread.
///
/// To block on one thread alone is a trap: a leader's end is not reported before its other threads have
/// been waited for.
///
/// # Errors
/// ECHILD if there is none.
pub fn wait_any() -> Result<(Tid, Stop), SysError> {
    let mut status = 0;
    loop {
        // SAFETY: waitpid writes one int to `status`.
        let ret = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        match ret {
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(SysError::last("waitpid", "any task")),
            tid => return Ok((Tid(tid), decode(status))),
        }
    }
}

/// Reads a wait status as a ptrace stop.
#[must_use]
pub fn decode(status: i32) -> Stop {
    const EVENT_STOP: i32 = 128;
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupted,
        EVENT_STOP => Stop::Group(signal),
        event => Stop::Event(event),
    }
}

/// Whether `signal` is one that stops a process by default.
#[must_use]
pub fn is_stop_signal(signal: i32) -> bool {
    [Signal::SIGSTOP, Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU].iter().any(|&s| s as i32 == signal)
}
