//! Stopping a process tree, and running system calls inside its stopped tasks.

mod borrow;
pub mod build;
mod call;
mod freeze;
mod twin;

pub use borrow::{Borrowed, interrupted_call};
pub use call::{Arg, Call, Done, RemoteError, Syscalls, run_one};
pub use freeze::{FreezeError, Frozen, Process, Release, Thread};
pub use twin::{NoTwin, Twin};
