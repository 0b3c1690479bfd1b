//! What can be asked of and done to an open file besides reading and writing it: owner and signal
//! of F_SETOWN (fcntl(2)), terminals (ioctl_tty(2)), timerfds (timerfd_create(2)), members of epoll
//! sets (kcmp(2)), anonymous shared memory.

use std::{
    ffi::CString,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::errno::Errno;

use crate::{SysError, TargetFd, Tid};

fn on(fd: BorrowedFd<'_>) -> String {
    format!("our fd {}", fd.as_raw_fd())
}

fn owned(ret: libc::c_int, call: &'static str, on: impl FnOnce() -> String) -> Result<OwnedFd, SysError> {
    if ret < 0 {
        return Err(SysError::last(call, on()));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// Whom SIGIO goes to (`F_GETOWN_EX`, `F_GETSIG`, `F_GETOWNER_UIDS`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID` 0, `F_OWNER_PID` 1, `F_OWNER_PGRP` 2.
    pub kind: u32,
    /// 0: nobody.
    pub pid: i32,
    /// The signal; 0 is SIGIO without siginfo.
    pub signal: i32,
    /// Real user of the process that set it.
    pub uid: u32,
    /// Effective user of the process that set it.
    pub euid: u32,
}

/// The owner of an open file.
///
/// # Errors
/// EBADF for O_PATH files.
pub fn owner(fd: BorrowedFd<'_>) -> Result<Owner, SysError> {
    const F_GETSIG: i32 = 11;
    const F_GETOWN_EX: i32 = 16;
    const F_GETOWNER_UIDS: i32 = 17;
    let mut ex = [0i32; 2];
    // SAFETY: F_GETOWN_EX writes a struct f_owner_ex, two ints.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, ex.as_mut_ptr()) };
    if ret < 0 {
        return Err(SysError::last("fcntl(F_GETOWN_EX)", on(fd)));
    }
    // SAFETY: F_GETSIG takes nothing.
    let signal = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) };
    if signal < 0 {
        return Err(SysError::last("fcntl(F_GETSIG)", on(fd)));
    }
    let mut owner = Owner { kind: ex[0].unsigned_abs(), pid: ex[1], signal, uid: 0, euid: 0 };
    if owner.pid != 0 {
        let mut uids = [0u32; 2];
        // SAFETY: F_GETOWNER_UIDS writes two uid_t.
        let ret = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
        match Errno::result(ret) {
            // Kernels without CONFIG_CHECKPOINT_RESTORE do not tell.
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(SysError::new("fcntl(F_GETOWNER_UIDS)", on(fd), errno)),
        }
        [owner.uid, owner.euid] = uids;
    }
    Ok(owner)
}

/// Status flags (`F_GETFL`), all bits.
///
/// # Errors
/// EBADF.
pub fn flags(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    // SAFETY: F_GETFL takes nothing.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    u32::try_from(ret).map_err(|_| SysError::last("fcntl(F_GETFL)", on(fd)))
}

/// Sets the status flags that can be set (`F_SETFL`).
///
/// # Errors
/// EPERM (O_NOATIME, append-only), EINVAL (O_DIRECT).
pub fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<(), SysError> {
    // SAFETY: F_SETFL takes an integer.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) };
    if ret < 0 { Err(SysError::last("fcntl(F_SETFL)", on(fd))) } else { Ok(()) }
}

/// open(2) with any flags, `O_CLOEXEC` added; `mode` counts with `O_CREAT` only.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path, flags: u32, mode: u32) -> Result<OwnedFd, SysError> {
    let name = || path.display().to_string();
    let c = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| SysError::new("open", name(), Errno::EINVAL))?;
    // SAFETY: `c` is a NUL-terminated string that outlives the call.
    let ret = unsafe { libc::open(c.as_ptr(), flags.cast_signed() | libc::O_CLOEXEC, mode) };
    owned(ret, "open", name)
}

/// Lets this process have as many files open as it may, and `wanted` even if that takes CAP_SYS_RESOURCE, which
/// it may not have. Gives the limit as it is now.
#[must_use]
pub fn raise_limit(wanted: u64) -> u64 {
    use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(RLIMIT_NOFILE) else { return 0 };
    if wanted > hard && setrlimit(RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return wanted;
    }
    if setrlimit(RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// Closes all descriptors of this process but those in `keep`. For a child that is to hold on to nothing of its parent's,
/// and that never drops what owns them.
///
/// # Errors
/// ENOSYS before Linux 5.9.
pub fn close_all_but(keep: &[RawFd]) -> Result<(), SysError> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut from = 0;
    for next in keep.into_iter().chain([u32::MAX]) {
        if next > from {
            // SAFETY: takes integers only; that nobody uses what is closed is the caller's promise.
            let ret = unsafe { libc::syscall(libc::SYS_close_range, from, next - 1, 0) };
            if ret != 0 {
                return Err(SysError::last("close_range", format!("fd {from}")));
            }
        }
        from = next.saturating_add(1);
    }
    Ok(())
}

/// A duplicate of `fd` numbered `least` or higher, close-on-exec.
///
/// # Errors
/// EMFILE, EINVAL (`least` beyond RLIMIT_NOFILE).
pub fn dup_above(fd: BorrowedFd<'_>, least: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    owned(ret, "fcntl(F_DUPFD_CLOEXEC)", || on(fd))
}

/// A duplicate of descriptor `raw` of this process, which the user named by its number.
///
/// # Errors
/// EBADF if there is none.
pub fn dup_number(raw: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer; a number that names no descriptor gives EBADF.
    let ret = unsafe { libc::fcntl(raw, libc::F_DUPFD_CLOEXEC, 3) };
    owned(ret, "fcntl(F_DUPFD_CLOEXEC)", || format!("our fd {raw}"))
}

/// Opens (`O_PATH`) the file of a handle on the file system of `directory`.
///
/// The kernel wants a descriptor of the file system that is more than `O_PATH`, and opening one would be noticed by
/// whoever watches the directory; or a current directory there, which a thread of its own enters.
///
/// # Errors
/// ESTALE: there is no such file any more; EPERM without CAP_DAC_READ_SEARCH; EINVAL.
pub fn open_by_handle(directory: &Path, kind: i32, handle: &[u8]) -> Result<OwnedFd, SysError> {
    let failed = |call, errno| SysError::new(call, directory.display().to_string(), errno);
    // struct file_handle: length, type, bytes; at most 128 of these. Words keep it aligned.
    let mut words = [0u32; 2 + 32];
    if handle.len() > 128 {
        return Err(failed("open_by_handle_at", Errno::EINVAL));
    }
    words[0] = u32::try_from(handle.len()).unwrap_or(0);
    words[1] = kind.cast_unsigned();
    for (word, bytes) in words[2..].iter_mut().zip(handle.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(four);
    }
    let open = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)
            .map_err(|errno| failed("unshare(CLONE_FS)", errno))?;
        nix::unistd::chdir(directory).map_err(|errno| failed("chdir", errno))?;
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: `words` is a struct file_handle with as many bytes behind it as it says, which the kernel reads.
        let ret =
            unsafe { libc::syscall(libc::SYS_open_by_handle_at, libc::AT_FDCWD, words.as_ptr(), flags) };
        owned(libc::c_int::try_from(ret).unwrap_or(-1), "open_by_handle_at", || {
            directory.display().to_string()
        })
    };
    std::thread::scope(|scope| match scope.spawn(open).join() {
        Ok(opened) => opened,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// inotify_add_watch(2): the number of the watch.
///
/// # Errors
/// ENOENT, EACCES, ENOSPC.
pub fn watch(instance: BorrowedFd<'_>, path: &Path, mask: u32) -> Result<i32, SysError> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| SysError::new("inotify_add_watch", path.display().to_string(), Errno::EINVAL))?;
    // SAFETY: `name` is a string that outlives the call.
    let ret = unsafe { libc::inotify_add_watch(instance.as_raw_fd(), name.as_ptr(), mask) };
    if ret < 0 { Err(SysError::last("inotify_add_watch", path.display().to_string())) } else { Ok(ret) }
}

/// inotify_rm_watch(2).
///
/// # Errors
/// EINVAL: there is no such watch.
pub fn unwatch(instance: BorrowedFd<'_>, number: i32) -> Result<(), SysError> {
    // SAFETY: inotify_rm_watch takes two integers.
    let ret = unsafe { libc::inotify_rm_watch(instance.as_raw_fd(), number) };
    if ret < 0 { Err(SysError::last("inotify_rm_watch", format!("watch {number}"))) } else { Ok(()) }
}

/// Bytes that can be read at once (`FIONREAD`).
///
/// # Errors
/// ENOTTY for files that do not tell.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    let mut n = 0i32;
    // SAFETY: FIONREAD writes one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) };
    if ret < 0 {
        return Err(SysError::last("ioctl(FIONREAD)", on(fd)));
    }
    Ok(n.unsigned_abs())
}

/// Whether descriptor `fd` of `tid` is the file that its epoll set `epoll` knows as number `tfd`
/// (`KCMP_EPOLL_TFD`). `nth` counts files that were added under the same number, from 0.
///
/// # Errors
/// ENOENT: the set has no such file; EBADF, EPERM, ESRCH.
pub fn is_epoll_target(
    fd_of: (Tid, TargetFd),
    set_of: (Tid, TargetFd),
    tfd: i32,
    nth: u32,
) -> Result<bool, SysError> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = [set_of.1.0.cast_unsigned(), tfd.cast_unsigned(), nth];
    // SAFETY: `slot` is a struct kcmp_epoll_slot, three u32, which the kernel only reads.
    let ret = unsafe {
        libc::syscall(libc::SYS_kcmp, fd_of.0.0, set_of.0.0, KCMP_EPOLL_TFD, fd_of.1.0, slot.as_ptr())
    };
    if ret < 0 {
        return Err(SysError::last("kcmp(EPOLL_TFD)", format!("pid {} fd {}", set_of.0, set_of.1)));
    }
    Ok(ret == 0)
}

/// A timer's setting: seconds and nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimerSpec {
    /// Until the next expiration; zero: disarmed.
    pub value: (u64, u64),
    /// Between expirations after it; zero: once.
    pub interval: (u64, u64),
}

impl TimerSpec {
    fn to_c(self) -> Option<libc::itimerspec> {
        let spec = |(s, n): (u64, u64)| {
            Some(libc::timespec { tv_sec: i64::try_from(s).ok()?, tv_nsec: i64::try_from(n).ok()? })
        };
        Some(libc::itimerspec { it_interval: spec(self.interval)?, it_value: spec(self.value)? })
    }
}

/// A new timerfd, close-on-exec.
///
/// # Errors
/// EINVAL (unknown clock), EPERM (alarm clocks without CAP_WAKE_ALARM).
pub fn timerfd_create(clock: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: timerfd_create takes two integers.
    let ret = unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) };
    owned(ret, "timerfd_create", || format!("clock {clock}"))
}

/// timerfd_gettime(2). Brings the expirations of an interval timer up to date, as a read would.
///
/// # Errors
/// EINVAL: not a timerfd.
pub fn timerfd_gettime(fd: BorrowedFd<'_>) -> Result<TimerSpec, SysError> {
    let mut spec = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec { tv_sec: 0, tv_nsec: 0 },
    };
    // SAFETY: the call writes one itimerspec.
    let ret = unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut spec) };
    if ret < 0 {
        return Err(SysError::last("timerfd_gettime", on(fd)));
    }
    let pair = |t: libc::timespec| (t.tv_sec.cast_unsigned(), t.tv_nsec.cast_unsigned());
    Ok(TimerSpec { value: pair(spec.it_value), interval: pair(spec.it_interval) })
}

/// timerfd_settime(2).
///
/// # Errors
/// EINVAL for times or flags out of range.
pub fn timerfd_settime(fd: BorrowedFd<'_>, flags: i32, spec: TimerSpec) -> Result<(), SysError> {
    let Some(spec) = spec.to_c() else {
        return Err(SysError::new("timerfd_settime", on(fd), Errno::EINVAL));
    };
    // SAFETY: the call reads one itimerspec; a null pointer for the old value is allowed.
    let ret = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const spec, std::ptr::null_mut()) };
    if ret < 0 { Err(SysError::last("timerfd_settime", on(fd))) } else { Ok(()) }
}

/// Sets the count of expirations that the next read returns (`TFD_IOC_SET_TICKS`).
///
/// # Errors
/// ENOTTY (no CONFIG_CHECKPOINT_RESTORE), EINVAL (zero).
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<(), SysError> {
    // _IOW('T', 0, __u64)
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: the ioctl reads one u64.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    if ret < 0 { Err(SysError::last("ioctl(TFD_IOC_SET_TICKS)", on(fd))) } else { Ok(()) }
}

/// A new signalfd for the signals of `mask` (bit 0 is signal 1), close-on-exec.
///
/// # Errors
/// EMFILE, ENOMEM.
pub fn signalfd(mask: u64) -> Result<OwnedFd, SysError> {
    // SAFETY: signalfd4 reads 8 bytes, the size of `mask` and of the kernel's signal set.
    let ret = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, libc::SFD_CLOEXEC) };
    owned(libc::c_int::try_from(ret).unwrap_or(-1), "signalfd4", || format!("mask {mask:#x}"))
}

/// State of a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Line settings.
    pub termios: libc::termios,
    /// Rows, columns, pixels.
    pub winsize: libc::winsize,
}

/// Reads the state of terminal `fd`.
///
/// # Errors
/// ENOTTY, EIO (hung up).
pub fn terminal(fd: BorrowedFd<'_>) -> Result<Terminal, SysError> {
    // SAFETY: all-zero is a valid value of these plain C structs.
    let (mut termios, mut winsize): (libc::termios, libc::winsize) = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes one termios.
    if unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut termios) } < 0 {
        return Err(SysError::last("tcgetattr", on(fd)));
    }
    // SAFETY: TIOCGWINSZ writes one winsize.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut winsize) } < 0 {
        return Err(SysError::last("ioctl(TIOCGWINSZ)", on(fd)));
    }
    Ok(Terminal { termios, winsize })
}

/// Shared anonymous memory of `size` bytes, as `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes it, as an open file. `huge` are flags
/// of [`crate::hugetlb::MAP`], or 0; huge pages are neither made nor promised by this.
///
/// # Errors
/// EPERM without CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN; ENOMEM; EINVAL if there are no pages of this size.
pub fn shared_anonymous(size: usize, huge: u32) -> Result<OwnedFd, SysError> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | huge.cast_signed();
    if huge != 0 {
        flags |= libc::MAP_NORESERVE;
    }
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(SysError::last("mmap", format!("{size} bytes of shared memory")));
    }
    let from = start as usize;
    let end = from + size.next_multiple_of(4096);
    let opened =
        open(Path::new(&format!("/proc/self/map_files/{from:x}-{end:x}")), libc::O_RDWR.cast_unsigned(), 0);
    // SAFETY: this is the mapping made above; nothing points into it.
    unsafe { libc::munmap(start, size) };
    opened
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn owner_is_told() {
        let (a, _b) = nix::unistd::pipe().unwrap();
        assert_eq!(owner(a.as_fd()).unwrap(), Owner::default());
    }

    #[test]
    fn anonymous_memory_is_named_as_the_kernel_names_it() {
        let fd = shared_anonymous(5000, 0).unwrap();
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_eq!(name.to_str(), Some("/dev/zero (deleted)"));
    }

    #[test]
    fn ticks_of_a_timer_can_be_set() {
        let fd = timerfd_create(libc::CLOCK_MONOTONIC).unwrap();
        timerfd_set_ticks(fd.as_fd(), 7).unwrap();
        let mut buffer = [0; 8];
        nix::unistd::read(&fd, &mut buffer).unwrap();
        assert_eq!(u64::from_ne_bytes(buffer), 7);
    }
}
