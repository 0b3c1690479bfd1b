//! System calls that no crate wraps, behind safe functions, and the small types that all tools share.
//!
//! This is the only crate with unsafe code (see `[workspace.lints]`); each module covers one kernel
//! interface and says which page or file of the kernel documents it. What `nix` or `std` already
//! wrap is used from there.

#![allow(unsafe_code)]

mod bpf;
pub mod btf;
pub mod capability;
pub mod clone;
pub mod cpu;
pub mod dedupe;
pub mod diag;
pub mod error;
pub mod file;
pub mod gift;
pub mod hugetlb;
pub mod ids;
pub mod kcmp;
pub mod kernel;
mod lent;
pub mod limits;
pub mod memory;
pub mod nft;
pub mod pidfd;
pub mod prctl;
pub mod probe;
pub mod procfs;
pub mod ptrace;
pub mod pty;
pub mod ring;
pub mod rseq;
pub mod sched;
#[cfg(feature = "selfcall")]
pub mod selfcall;
pub mod sock;
pub mod spawn;
pub mod standin;
pub mod sysv;
pub mod tcp;
pub mod transfer;
pub mod uffd;
pub mod unixsock;
pub mod vmas;
pub mod xstate;

pub use error::{Refused, SysError};
pub use ids::{FileId, Pid, RemoteAddr, SocketId, TargetFd, Tid};
