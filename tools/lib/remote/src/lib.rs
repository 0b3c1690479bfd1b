//! Stopping a process tree, and running system calls inside its stopped tasks.

mod call;

pub use call::{Arg, Call, Done, RemoteError, Syscalls, run_one};
