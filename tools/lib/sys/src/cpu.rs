//! Layout of the processor's extended state (XSAVE area, Intel SDM vol. 1 ch. 13).

/// Where each extended component lies in an uncompacted XSAVE area, as PTRACE_GETREGSET gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Bit in XSTATE_BV.
    pub bit: u32,
    /// Offset in the area, bytes.
    pub offset: usize,
    /// Length, bytes.
    pub size: usize,
}

/// The component for bit `bit` (2 and up), `None` if this processor has none.
#[must_use]
pub fn xsave_component(bit: u32) -> Option<Component> {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid_count(0xd, bit);
        (leaf.eax > 0).then_some(Component { bit, offset: leaf.ebx as usize, size: leaf.eax as usize })
    }
}
