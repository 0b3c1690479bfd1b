//! Scheduling of other tasks: sched_getscheduler(2), getpriority(2), sched_getaffinity(2). `nix` offers the second
//! only for masks of up to 1024 processors.

use nix::errno::Errno;

use crate::{SysError, Tid};

/// Scheduling policy (`SCHED_*`), with `SCHED_RESET_ON_FORK` as a flag in it. `Tid(0)` is the caller.
///
/// # Errors
/// ESRCH if the task is gone.
pub fn policy(tid: Tid) -> Result<u32, SysError> {
    // SAFETY: sched_getscheduler takes an integer and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getscheduler, tid.0) };
    u32::try_from(ret).map_err(|_| SysError::last("sched_getscheduler", format!("tid {tid}")))
}

/// Nice value.
///
/// # Errors
/// ESRCH if the task is gone.
pub fn nice(tid: Tid) -> Result<i32, SysError> {
    // SAFETY: getpriority takes two integers and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) };
    // The kernel gives 20 - nice, so that no value looks like an error.
    match i32::try_from(ret) {
        Ok(value) if value > 0 => Ok(20 - value),
        _ => Err(SysError::last("getpriority", format!("tid {tid}"))),
    }
}

/// Real-time priority, 0 outside the real-time classes.
///
/// # Errors
/// ESRCH if the task is gone.
pub fn rt_priority(tid: Tid) -> Result<u32, SysError> {
    let mut priority = 0_i32;
    // SAFETY: sched_getparam writes one struct sched_param, an int.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getparam, tid.0, &raw mut priority) };
    if ret == 0 {
        Ok(priority.unsigned_abs())
    } else {
        Err(SysError::last("sched_getparam", format!("tid {tid}")))
    }
}

/// Processors that the task may run on: bit n % 8 of byte n / 8 for processor n, trailing zero bytes cut.
/// `Tid(0)` is the caller.
///
/// # Errors
/// ESRCH if the task is gone.
pub fn affinity(tid: Tid) -> Result<Vec<u8>, SysError> {
    // The kernel refuses buffers smaller than its own mask, CONFIG_NR_CPUS bits, with EINVAL.
    for len in [1024_usize, 8192, 65536] {
        let mut mask = vec![0_u8; len];
        // SAFETY: the kernel writes at most `len` bytes to `mask`.
        let ret = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid.0, len, mask.as_mut_ptr()) };
        match usize::try_from(ret) {
            Ok(n) => {
                mask.truncate(n);
                while mask.last() == Some(&0) {
                    mask.pop();
                }
                return Ok(mask);
            }
            Err(_) if Errno::last() == Errno::EINVAL => {}
            Err(_) => break,
        }
    }
    Err(SysError::last("sched_getaffinity", format!("tid {tid}")))
}
