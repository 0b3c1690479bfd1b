//! pidfds: a task's identity, and copies of its descriptors (pidfd_open(2), pidfd_getfd(2)).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{Pid, SysError, TargetFd, Tid};

fn owned(ret: libc::c_long, call: &'static str, on: String) -> Result<OwnedFd, SysError> {
    match i32::try_from(ret) {
        // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(SysError::last(call, on)),
    }
}

/// A pidfd of process `pid`.
///
/// # Errors
/// ESRCH if it is gone.
pub fn open(pid: Pid) -> Result<OwnedFd, SysError> {
    // SAFETY: pidfd_open takes two integers and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    owned(ret, "pidfd_open", format!("pid {pid}"))
}

/// A pidfd of thread `tid` (`PIDFD_THREAD`, Linux 6.9).
///
/// # Errors
/// ESRCH if it is gone, EINVAL on older kernels.
pub fn open_thread(tid: Tid) -> Result<OwnedFd, SysError> {
    // SAFETY: pidfd_open takes two integers and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, tid.0, libc::O_EXCL) };
    owned(ret, "pidfd_open(PIDFD_THREAD)", format!("tid {tid}"))
}

/// A copy of the target's descriptor `fd`: the same open file description, close-on-exec.
/// Needs PTRACE_MODE_ATTACH_REALCREDS over the target.
///
/// # Errors
/// EBADF if the target has no such descriptor, EPERM, ESRCH.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: TargetFd) -> Result<OwnedFd, SysError> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd.0, 0) };
    owned(ret, "pidfd_getfd", format!("fd {fd}"))
}

/// Sends `signal` to the process.
///
/// # Errors
/// ESRCH if it is gone, EPERM.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), SysError> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo pointer is allowed and means "as kill(2)".
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0) };
    if ret == 0 { Ok(()) } else { Err(SysError::last("pidfd_send_signal", format!("signal {signal}"))) }
}
