//! Signal frames as rt_sigreturn(2) takes them.

use ckpt_sys::ptrace::Regs;

/// Bytes of `struct ucontext` that it reads.
pub(super) const UCONTEXT: usize = 304;

/// An XSAVE area from PTRACE_GETREGSET as rt_sigreturn(2) takes it: the software-reserved bytes tell
/// its size and features, and a second magic word follows it (arch/x86/include/uapi/asm/sigcontext.h).
pub(super) fn signal_fpstate(xstate: &[u8]) -> Vec<u8> {
    const MAGIC1: u32 = 0x4650_5853;
    const MAGIC2: u32 = 0x4650_5845;
    const SOFTWARE: usize = 464;
    let mut area = xstate.to_vec();
    let size = u32::try_from(area.len()).unwrap_or(0);
    if area.len() >= 576 {
        let mut software = [0; 48];
        software[..4].copy_from_slice(&MAGIC1.to_le_bytes());
        software[4..8].copy_from_slice(&(size + 4).to_le_bytes());
        // GETREGSET leaves the mask of enabled features here.
        software[8..16].copy_from_slice(&xstate[SOFTWARE..SOFTWARE + 8]);
        software[16..20].copy_from_slice(&size.to_le_bytes());
        area[SOFTWARE..SOFTWARE + 48].copy_from_slice(&software);
    }
    area.extend_from_slice(&MAGIC2.to_le_bytes());
    area
}

/// `struct ucontext` for rt_sigreturn(2), with the FPU state at `fpstate`.
pub(super) fn ucontext(regs: &Regs, mask: u64, fpstate: u64) -> [u8; UCONTEXT] {
    // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    const FLAGS: u64 = 7;
    // An alternate stack with impossible flags: the kernel then leaves the registered one alone
    // (do_sigaltstack fails, and restore_altstack ignores all errors but EFAULT).
    const NO_ALTSTACK: u64 = 4;
    let segments = (regs.cs & 0xffff) | ((regs.ss & 0xffff) << 48);
    let words = [
        FLAGS,
        0, // uc_link
        0,
        NO_ALTSTACK,
        0, // uc_stack: ss_sp, ss_flags, ss_size
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
        segments,
        0,
        0,
        0,
        0, // err, trapno, oldmask, cr2
        fpstate,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0, // reserved
        mask,
    ];
    let mut bytes = [0; UCONTEXT];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}
