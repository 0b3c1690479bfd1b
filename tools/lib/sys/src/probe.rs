//! Is a kernel feature there, and may we use it? Asked by using it, in a way that changes nothing; what
//! the kernel answers is the answer. Features that have a wrapper elsewhere in this crate are probed
//! through that.

use std::{
    mem::size_of,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use nix::errno::Errno;

use crate::{Pid, SysError, Tid, ptrace};

/// clone3(2) with a chosen pid. We ask for our own, which is taken: EEXIST says that we might have had it.
///
/// # Errors
/// EPERM without CAP_CHECKPOINT_RESTORE, ENOSYS, E2BIG or EINVAL before Linux 5.5.
pub fn clone3_set_tid() -> Result<(), SysError> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
    }
    let tid = std::process::id();
    let args = CloneArgs {
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: &raw const tid as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: `args` is a clone_args of the stated size whose set_tid points to one pid. Without CLONE_VM
    // a child would be a fork of ours; none can be made, since the only pid allowed is taken by us.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if ret == 0 {
        // SAFETY: ends the child that can't be.
        unsafe { libc::_exit(0) };
    }
    match Errno::last() {
        Errno::EEXIST => Ok(()),
        errno => Err(SysError::new("clone3", "set_tid", errno)),
    }
}

/// userfaultfd(2) in user mode with UFFD_FEATURE_WP_ASYNC.
///
/// # Errors
/// ENOSYS, EPERM (`vm.unprivileged_userfaultfd`, seccomp), EINVAL before Linux 6.7.
pub fn userfaultfd_wp_async() -> Result<(), SysError> {
    crate::uffd::enable(crate::uffd::own()?.as_fd())
}

/// userfaultfd(2) for missing pages, with those that the kernel touches, and events.
///
/// # Errors
/// ENOSYS, EPERM without CAP_SYS_PTRACE, EINVAL before Linux 6.6.
pub fn userfaultfd_missing() -> Result<(), SysError> {
    // SAFETY: userfaultfd takes one integer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => unsafe { OwnedFd::from_raw_fd(fd) },
        _ => return Err(SysError::last("userfaultfd", "faults of the kernel")),
    };
    crate::uffd::enable_missing(fd.as_fd())
}

/// sock_diag(7) for sockets of `family`: dumps the closed ones, which are few, and looks at the first answer.
///
/// # Errors
/// ENOENT if the kernel has no such module, EPROTONOSUPPORT without sock_diag at all.
pub fn sock_diag(family: i32) -> Result<(), SysError> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST_DUMP: u16 = 0x301;
    let on = || if family == libc::AF_UNIX { "unix" } else { "inet" };
    // SAFETY: socket takes three integers.
    let fd =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(SysError::last("socket(NETLINK_SOCK_DIAG)", on()));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct nlmsghdr, then unix_diag_req (24 bytes) or inet_diag_req_v2 (56 bytes).
    let body = if family == libc::AF_UNIX { 24 } else { 56 };
    let mut request = vec![0u8; 16 + body];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = request.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &u32::try_from(16 + body).unwrap_or(0).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST_DUMP.to_ne_bytes());
    put(16, &[u8::try_from(family).unwrap_or(0)]);
    if family != libc::AF_UNIX {
        put(17, &[u8::try_from(libc::IPPROTO_TCP).unwrap_or(0)]);
    }
    // States: TCP_CLOSE, number 7.
    put(20, &(1u32 << 7).to_ne_bytes());
    // SAFETY: sends from a buffer of the stated length.
    let sent = unsafe { libc::send(fd.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(SysError::last("send(sock_diag)", on()));
    }
    let mut answer = [0u8; 1 << 14];
    // SAFETY: receives into a buffer of the stated length.
    let got = unsafe { libc::recv(fd.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    if got < 20 {
        return Err(SysError::last("recv(sock_diag)", on()));
    }
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    match kind {
        NLMSG_ERROR | NLMSG_DONE if code < 0 => Err(SysError::new("sock_diag", on(), Errno::from_raw(-code))),
        _ => Ok(()),
    }
}

/// prctl(PR_SET_MM, PR_SET_MM_MAP).
///
/// # Errors
/// EINVAL without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_mm_map() -> Result<(), SysError> {
    const PR_SET_MM_MAP_SIZE: libc::c_ulong = 15;
    let mut size = 0u32;
    let zero: libc::c_ulong = 0;
    // SAFETY: with PR_SET_MM_MAP_SIZE the kernel writes one u32 to `size`.
    match unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, zero, zero) } {
        0 => Ok(()),
        _ => Err(SysError::last("prctl(PR_SET_MM_MAP_SIZE)", "this process")),
    }
}

/// prctl(PR_TIMER_CREATE_RESTORE_IDS): POSIX timers with chosen ids.
///
/// # Errors
/// EINVAL on kernels that do not have it.
pub fn timer_restore_ids() -> Result<(), SysError> {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: libc::c_ulong = 2;
    let zero: libc::c_ulong = 0;
    // SAFETY: takes integers only, and GET changes nothing.
    match unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, zero, zero, zero) } {
        0 | 1 => Ok(()),
        _ => Err(SysError::last("prctl(PR_TIMER_CREATE_RESTORE_IDS)", "this process")),
    }
}

/// A child that does nothing, seized with `options` and stopped; `look` is asked about it.
///
/// # Errors
/// Of fork, of ptrace, or of `look`.
fn with_tracee(options: u32, look: impl FnOnce(Tid) -> Result<(), SysError>) -> Result<(), SysError> {
    // SAFETY: the child makes bare system calls only, which is allowed after fork whatever other
    // threads were doing.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => return Err(SysError::last("fork", "probe")),
        0 => loop {
            // SAFETY: takes integers only; the child is not to outlive us.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        },
        _ => {}
    }
    let tid = Tid(pid);
    let result = ptrace::seize(tid, options)
        .and_then(|()| ptrace::interrupt(tid))
        .and_then(|()| ptrace::wait(tid, false))
        .and_then(|_| look(tid));
    let _ = nix::sys::signal::kill(Pid(pid).nix(), nix::sys::signal::Signal::SIGKILL);
    while nix::sys::wait::waitpid(Pid(pid).nix(), Some(nix::sys::wait::WaitPidFlag::__WALL)).is_ok_and(
        |status| {
            !matches!(
                status,
                nix::sys::wait::WaitStatus::Exited(..) | nix::sys::wait::WaitStatus::Signaled(..)
            )
        },
    ) {}
    result
}

/// Seizing and stopping a child: ptrace(2) itself.
///
/// # Errors
/// EPERM (Yama's `ptrace_scope` 3, seccomp).
pub fn ptrace_seize() -> Result<(), SysError> {
    with_tracee(0, |_| Ok(()))
}

/// PTRACE_GET_RSEQ_CONFIGURATION.
///
/// # Errors
/// EIO before Linux 5.13 or without `CONFIG_RSEQ`.
pub fn ptrace_rseq() -> Result<(), SysError> {
    with_tracee(0, |tid| ptrace::rseq(tid).map(drop))
}

/// PTRACE_O_SUSPEND_SECCOMP.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN or from under seccomp, EINVAL without `CONFIG_CHECKPOINT_RESTORE`.
pub fn ptrace_suspend_seccomp() -> Result<(), SysError> {
    const PTRACE_O_SUSPEND_SECCOMP: u32 = 1 << 21;
    with_tracee(PTRACE_O_SUSPEND_SECCOMP, |_| Ok(()))
}
