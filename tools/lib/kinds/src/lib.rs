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
