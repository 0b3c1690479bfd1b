//! What extended processor state this system runs with (Intel SDM vol. 1 ch. 13).

/// Components that the system has enabled: XCR0. 3 (x87 and SSE) on processors without XSAVE.
#[must_use]
pub fn enabled() -> u64 {
    const LEGACY: u64 = 3;
    let osxsave = std::arch::x86_64::__cpuid(1).ecx & (1 << 27) != 0;
    if !osxsave {
        return LEGACY;
    }
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: register 0 exists wherever XGETBV does.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: CPUID says that the system has set CR4.OSXSAVE, which is what XGETBV needs.
    unsafe { xcr0() }
}

/// Length of the uncompacted area for the enabled components, bytes: what PTRACE_SETREGSET wants.
#[must_use]
pub fn area_size() -> usize {
    const LEGACY_AND_HEADER: usize = 576;
    if enabled() == 3 && std::arch::x86_64::__cpuid(0).eax < 0xd {
        return LEGACY_AND_HEADER;
    }
    (std::arch::x86_64::__cpuid_count(0xd, 0).ebx as usize).max(LEGACY_AND_HEADER)
}
