//! Errors that every layer understands.

use nix::errno::Errno;

/// A system call that failed: what it was done to, its name, and the errno as source.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{on}: {call}")]
pub struct SysError {
    /// Name of the system call (`pidfd_getfd`, `ioctl(PAGEMAP_SCAN)`).
    pub call: &'static str,
    /// The pid, fd, path or address that it was done to.
    pub on: String,
    /// What the kernel answered.
    #[source]
    pub errno: Errno,
}

impl SysError {
    /// An error of `call` done to `on`.
    pub fn new(call: &'static str, on: impl Into<String>, errno: Errno) -> Self {
        Self { call, on: on.into(), errno }
    }

    /// An error of `call` done to `on`, from the calling thread's errno.
    pub fn last(call: &'static str, on: impl Into<String>) -> Self {
        Self::new(call, on, Errno::last())
    }

    /// Whether the target is gone: an ordinary outcome of any call on a live process.
    #[must_use]
    pub fn vanished(&self) -> bool {
        self.errno == Errno::ESRCH
    }
}

/// Something that can't be checkpointed or restored, or that a missing privilege forbids. Exit status 3.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{subject}: {reason}")]
pub struct Refused {
    /// What it is about: pid, command, fd, inode.
    pub subject: String,
    /// Why not.
    pub reason: String,
    /// What the user can do about it; printed on a line of its own.
    pub advice: Option<String>,
}

impl Refused {
    /// A refusal without advice.
    pub fn new(subject: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { subject: subject.into(), reason: reason.into(), advice: None }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}
