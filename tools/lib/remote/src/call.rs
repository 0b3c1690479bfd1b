//! What is to be run inside a task: a list of calls, each with arguments that are numbers, bytes
//! to be placed in the task's memory, or room for an answer.
//!
//! The same list serves both directions: on dump it runs in a task of the frozen tree (see
//! `borrow`), on restore in one that is being built (see `build`).

use nix::errno::Errno;

use ckpt_sys::{SysError, Tid};

/// One argument of a remote system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arg {
    /// Passed as it is: a number, or an address in the task.
    Val(u64),
    /// A pointer to these bytes (16-byte aligned), placed in scratch memory for the call.
    In(Vec<u8>),
    /// A pointer to so many zeroed bytes, given back in [`Done::out`].
    Out(usize),
    /// A pointer to these bytes, given back in [`Done::out`] as the call leaves them.
    InOut(Vec<u8>),
}

impl From<u64> for Arg {
    fn from(n: u64) -> Self {
        Self::Val(n)
    }
}

/// A signed number, sign-extended as the kernel's ABI wants it.
impl From<i32> for Arg {
    fn from(n: i32) -> Self {
        Self::Val(i64::from(n).cast_unsigned())
    }
}

/// One remote system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Name for messages, with what tells it apart: `rt_sigaction(SIGUSR1)`.
    pub name: String,
    /// System call number.
    pub nr: i64,
    /// Up to six arguments.
    pub args: Vec<Arg>,
    /// Whether a failure is an answer that the caller wants ([`Done::ret`] is then negative) rather
    /// than an error that ends the run.
    pub may_fail: bool,
}

impl Call {
    /// A call that must succeed.
    pub fn new(name: impl Into<String>, nr: i64, args: impl IntoIterator<Item = Arg>) -> Self {
        Self { name: name.into(), nr, args: args.into_iter().collect(), may_fail: false }
    }

    /// The same, but failing is an answer.
    #[must_use]
    pub fn may_fail(mut self) -> Self {
        self.may_fail = true;
        self
    }
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// What the kernel returned: -4095..-1 is a negated errno.
    pub ret: i64,
    /// Contents of the `Out` and `InOut` arguments after the call, in order.
    pub out: Vec<Vec<u8>>,
}

impl Done {
    /// The return value, or the errno.
    ///
    /// # Errors
    /// The errno that the call returned.
    pub fn result(&self) -> Result<u64, Errno> {
        match self.ret {
            -4095..=-1 => Err(Errno::from_raw(i32::try_from(-self.ret).unwrap_or(libc::EINVAL))),
            n => Ok(n.cast_unsigned()),
        }
    }
}

/// Why remote calls could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The task died. Nothing of ours is left: its memory is gone with it.
    #[error("tid {0} died")]
    Died(Tid),
    /// A call failed inside the task.
    #[error("tid {tid}: {name}")]
    Call {
        /// In which task.
        tid: Tid,
        /// Which call.
        name: String,
        /// What the kernel answered there.
        #[source]
        errno: Errno,
    },
    /// ptrace or memory access failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The task can't be used: why.
    #[error("tid {tid}: {what}")]
    Unusable {
        /// Which task.
        tid: Tid,
        /// Why.
        what: String,
    },
}

/// A stopped task that runs system calls for us.
pub trait Syscalls {
    /// The task.
    fn tid(&self) -> Tid;

    /// Runs `calls` in order, stopping at the first that fails without [`Call::may_fail`].
    ///
    /// # Errors
    /// See [`RemoteError`].
    fn run(&mut self, calls: &[Call]) -> Result<Vec<Done>, RemoteError>;
}

/// Runs one call and gives its return value.
///
/// # Errors
/// See [`RemoteError`].
pub fn run_one(task: &mut (impl Syscalls + ?Sized), call: Call) -> Result<Done, RemoteError> {
    let mut done = task.run(std::slice::from_ref(&call))?;
    done.pop()
        .ok_or_else(|| RemoteError::Unusable { tid: task.tid(), what: format!("{}: no answer", call.name) })
}
