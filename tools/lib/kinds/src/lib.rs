//! Kernel resources: how each is recognised, dumped and restored.
//!
//! One home per resource, both directions side by side:
//!
//! - [`fd`]: what a descriptor can refer to; one module and one row of a table for each kind.
//! - [`task`]: registers, signals, timers, credentials, limits: what a task is besides its memory
//!   and files.
//! - [`mem`]: address spaces and pages.

pub mod fd;
pub mod mem;
pub mod sink;
pub mod task;

pub use sink::Sink;

/// Tests run as threads of one process, and a child that one of them forks holds every descriptor
/// that another is just dumping: it would be refused as held from outside. So who forks, and who dumps
/// descriptors, which may fork too, keeps [`forking`](descriptors::forking) until that is over.
#[cfg(test)]
mod descriptors {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    static TABLE: Mutex<()> = Mutex::new(());

    pub fn forking() -> MutexGuard<'static, ()> {
        TABLE.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
