//! Restartable sequences of stopped threads (Documentation/userspace-api/rseq.rst, linux/rseq.h).
//!
//! A thread that is stopped inside a critical section was preempted there, so the kernel would move it
//! to the section's abort handler before it runs on. It decides so from `rseq_cs` in the thread's
//! memory, and any system call that we run inside the thread from elsewhere makes it forget: it sees an
//! instruction pointer outside the section and clears the field. So whoever saves the registers of a
//! thread in order to put them back, here or in an image, does the kernel's step himself: if
//! [`abort_address`] gives one, it becomes the instruction pointer.

use crate::{Pid, RemoteAddr, SysError, Tid, memory, ptrace};

/// Where a stopped thread with instruction pointer `ip` has to go on if it is inside a critical
/// section. To be asked before the first remote call.
///
/// # Errors
/// ptrace or memory access; ESRCH if the thread is gone.
pub fn abort_address(pid: Pid, tid: Tid, ip: u64) -> Result<Option<u64>, SysError> {
    let config = ptrace::rseq(tid)?;
    if config.abi_pointer == 0 {
        return Ok(None);
    }
    // struct rseq: cpu_id_start u32, cpu_id u32, rseq_cs u64.
    let mut pointer = [0_u8; 8];
    memory::read_exact(pid, RemoteAddr(config.abi_pointer.wrapping_add(8)), &mut pointer)?;
    let section = u64::from_le_bytes(pointer);
    if section == 0 {
        return Ok(None);
    }
    // struct rseq_cs: version u32, flags u32, start_ip u64, post_commit_offset u64, abort_ip u64.
    let mut words = [[0_u8; 8]; 4];
    memory::read_exact(pid, RemoteAddr(section), words.as_flattened_mut())?;
    let [_, start, length, abort] = words.map(u64::from_le_bytes);
    Ok((ip.wrapping_sub(start) < length).then_some(abort))
}
