//! For tests (feature `selfcall`): lists of system calls meant for another task, run in the calling
//! process; and children to run them in.
//!
//! Addresses in such a list mean the caller's memory here. The functions are safe to call in the sense
//! that tests only pass lists that are harmless to run in a process that is as it should be.

use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, fork},
};

use crate::Pid;

/// An argument, as `ckpt_remote::Arg` has it.
#[derive(Debug)]
pub enum Slot {
    /// A number.
    Val(u64),
    /// A buffer, 16-byte aligned by the callee, whose contents are updated.
    Bytes(Vec<u8>),
}

/// Runs one call in the calling thread; -4095..-1 is a negated errno. Buffers are updated.
///
/// # Panics
/// With more than six arguments.
pub fn run(nr: i64, args: &mut [Slot]) -> i64 {
    assert!(args.len() <= 6, "a system call has at most six arguments");
    let mut buffers: Vec<Vec<u128>> = args
        .iter()
        .map(|slot| match slot {
            Slot::Val(_) => Vec::new(),
            Slot::Bytes(bytes) => {
                let mut words = vec![0_u128; bytes.len().div_ceil(16).max(1)];
                for (word, chunk) in words.iter_mut().zip(bytes.chunks(16)) {
                    let mut whole = [0_u8; 16];
                    whole[..chunk.len()].copy_from_slice(chunk);
                    *word = u128::from_le_bytes(whole);
                }
                words
            }
        })
        .collect();
    let mut raw = [0_u64; 6];
    for ((raw, slot), buffer) in raw.iter_mut().zip(args.iter()).zip(&mut buffers) {
        *raw = match slot {
            Slot::Val(n) => *n,
            Slot::Bytes(_) => buffer.as_mut_ptr() as u64,
        };
    }
    let ret: i64;
    // SAFETY: the instruction clobbers rcx and r11 only; what the call does to this process is the
    // business of the test that made the list (see the module's text). Not libc::syscall, which would
    // hide the difference between -1 and an errno.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") nr => ret, in("rdi") raw[0], in("rsi") raw[1], in("rdx") raw[2],
            in("r10") raw[3], in("r8") raw[4], in("r9") raw[5], lateout("rcx") _, lateout("r11") _);
    }
    for (slot, buffer) in args.iter_mut().zip(buffers) {
        if let Slot::Bytes(bytes) = slot {
            let whole: Vec<u8> = buffer.iter().flat_map(|w| w.to_le_bytes()).collect();
            let len = bytes.len();
            bytes.copy_from_slice(&whole[..len]);
        }
    }
    ret
}

/// A child that runs `work` and exits with what it returns; a panic there is exit code 101.
///
/// # Panics
/// If fork(2) fails.
pub fn spawn(work: impl FnOnce() -> i32) -> Pid {
    // SAFETY: glibc makes its allocator usable in the child; tests use nothing else that threads share.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => Pid(child.as_raw()),
        ForkResult::Child => {
            // The harness would catch what a panic prints, and lose it with this process.
            std::panic::set_hook(Box::new(|panic| {
                let text = format!("child {}: {panic}\n", std::process::id());
                let _ = nix::unistd::write(std::io::stderr(), text.as_bytes());
            }));
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the process at once; nothing of it is used afterwards.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Makes the calling process a tracee of its parent (PTRACE_TRACEME).
///
/// # Panics
/// If it is traced already.
pub fn trace_me() {
    nix::sys::ptrace::traceme().expect("PTRACE_TRACEME");
}

/// Runs `work` in a child, and gives the exit code: `None` if a signal killed it.
///
/// # Panics
/// If fork(2) or waitpid(2) fails.
pub fn in_child(work: impl FnOnce() -> i32) -> Option<i32> {
    match waitpid(spawn(work).nix(), None).expect("waitpid") {
        WaitStatus::Exited(_, code) => Some(code),
        _ => None,
    }
}
