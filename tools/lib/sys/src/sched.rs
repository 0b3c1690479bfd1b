//! Scheduling of other tasks: sched_getscheduler(2), sched_getaffinity(2). `nix` offers the second
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
