//! kcmp(2): do two tasks share a kernel object?

use std::cmp::Ordering;

use nix::errno::Errno;

use crate::{SysError, TargetFd, Tid};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// Open file descriptions behind two descriptors.
    File(TargetFd, TargetFd),
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// cwd, root and umask.
    Fs,
    /// Signal handler tables.
    Sighand,
}

/// Compares an object of `a` with that of `b`. Equal means shared; the order is arbitrary but total
/// for as long as both live, so objects can be sorted by it.
///
/// # Errors
/// EPERM, ESRCH, EBADF, ENOSYS (no `CONFIG_KCMP`).
pub fn compare(a: Tid, b: Tid, object: Object) -> Result<Ordering, SysError> {
    let (kind, x, y) = match object {
        Object::File(x, y) => (0, x.0, y.0),
        Object::Vm => (1, 0, 0),
        Object::Files => (2, 0, 0),
        Object::Fs => (3, 0, 0),
        Object::Sighand => (4, 0, 0),
    };
    // SAFETY: for these kinds kcmp takes integers only and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, kind, x, y) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        3 => Ok(a.cmp(&b)),
        _ => Err(SysError::new("kcmp", format!("pids {a} and {b}"), Errno::last())),
    }
}
