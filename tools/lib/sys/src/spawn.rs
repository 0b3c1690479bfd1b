//! Child processes that do not outlive us (PR_SET_PDEATHSIG, prctl(2)).

use std::{io, os::unix::process::CommandExt, process::Command};

/// Lets the kernel send SIGTERM to the child when the calling *thread* ends, however it ends. The
/// child's own children do not inherit this.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let arm = move || {
        // SAFETY: this prctl takes integers only; it is a bare system call, safe between fork and exec.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // We may have died before the signal was armed.
        // SAFETY: getppid has no preconditions.
        let now = unsafe { libc::getppid() };
        if i64::from(now) == i64::from(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: `arm` makes two system calls and allocates nothing, so it may run between fork and exec.
    unsafe { command.pre_exec(arm) }
}
