//! Pseudo-terminals: `ioctl_tty(2)`, pty(7), drivers/tty/pty.c.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::SysError;

fn on(fd: BorrowedFd<'_>) -> String {
    format!("fd {}", fd.as_raw_fd())
}

fn get(fd: BorrowedFd<'_>, name: &'static str, request: libc::Ioctl) -> Result<i32, SysError> {
    let mut value = 0_i32;
    // SAFETY: every request that this module passes here writes one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if ret < 0 { Err(SysError::last(name, on(fd))) } else { Ok(value) }
}

/// The number of the pair that master `fd` belongs to: N of `/dev/pts/N`.
///
/// # Errors
/// ENOTTY: it is no master.
pub fn number(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    get(fd, "ioctl(TIOCGPTN)", libc::TIOCGPTN).map(i32::cast_unsigned)
}

/// Whether the slave of master `fd` can't be opened yet.
///
/// # Errors
/// ENOTTY.
pub fn is_locked(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    get(fd, "ioctl(TIOCGPTLCK)", libc::TIOCGPTLCK).map(|on| on != 0)
}

/// Lets the slave of master `fd` be opened, or not.
///
/// # Errors
/// ENOTTY.
pub fn set_locked(fd: BorrowedFd<'_>, on_or_off: bool) -> Result<(), SysError> {
    set(fd, "ioctl(TIOCSPTLCK)", libc::TIOCSPTLCK, on_or_off)
}

/// Whether reads from master `fd` begin with a byte of status.
///
/// # Errors
/// ENOTTY.
pub fn in_packets(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    get(fd, "ioctl(TIOCGPKT)", libc::TIOCGPKT).map(|on| on != 0)
}

/// Switches that on or off. What has happened before is not told.
///
/// # Errors
/// ENOTTY.
pub fn set_packets(fd: BorrowedFd<'_>, on_or_off: bool) -> Result<(), SysError> {
    set(fd, "ioctl(TIOCPKT)", libc::TIOCPKT, on_or_off)
}

fn set(
    fd: BorrowedFd<'_>,
    name: &'static str,
    request: libc::Ioctl,
    on_or_off: bool,
) -> Result<(), SysError> {
    let value = i32::from(on_or_off);
    // SAFETY: TIOCSPTLCK and TIOCPKT read one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    if ret < 0 { Err(SysError::last(name, on(fd))) } else { Ok(()) }
}

/// Whether terminal `fd` can't be opened again.
///
/// # Errors
/// ENOTTY, EIO (hung up).
pub fn is_exclusive(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    get(fd, "ioctl(TIOCGEXCL)", libc::TIOCGEXCL).map(|on| on != 0)
}

/// Makes it so.
///
/// # Errors
/// ENOTTY.
pub fn set_exclusive(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    // SAFETY: TIOCEXCL has no argument.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCEXCL) };
    if ret < 0 { Err(SysError::last("ioctl(TIOCEXCL)", on(fd))) } else { Ok(()) }
}

/// A new open file of the slave of master `fd`, whatever is mounted on /dev/pts (Linux 4.13). Its descriptor is not
/// close-on-exec: unlike open(2), this call would leave that flag in the open file, for F_GETFL to see.
///
/// # Errors
/// EIO: it is locked; EBUSY: it is exclusive.
pub fn peer(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, SysError> {
    let flags = flags | libc::O_NOCTTY;
    // SAFETY: TIOCGPTPEER takes open(2)'s flags by value.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if ret < 0 {
        return Err(SysError::last("ioctl(TIOCGPTPEER)", on(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// Sets rows, columns and pixels. A process group in the foreground gets SIGWINCH if they change.
///
/// # Errors
/// ENOTTY, EIO (hung up).
pub fn set_size(fd: BorrowedFd<'_>, size: libc::winsize) -> Result<(), SysError> {
    // SAFETY: TIOCSWINSZ reads one winsize.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if ret < 0 { Err(SysError::last("ioctl(TIOCSWINSZ)", on(fd))) } else { Ok(()) }
}

/// Sets all line settings, speed and discipline included. Of a master: those of its slave.
///
/// # Errors
/// ENOTTY, EIO (hung up).
pub fn set_line(fd: BorrowedFd<'_>, settings: &libc::termios) -> Result<(), SysError> {
    // SAFETY: tcsetattr reads one termios.
    let ret = unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, settings) };
    if ret < 0 { Err(SysError::last("tcsetattr", on(fd))) } else { Ok(()) }
}
