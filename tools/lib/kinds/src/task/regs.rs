//! Registers: general, x87 and vector state, thread-local segments.
//!
//! A thread that was frozen inside a system call has left it with a code that only the kernel
//! sees (`-ERESTART...`), and the kernel would act on it when the thread runs on. An image can't rely
//! on that, so the registers are stored as the program would see them (and as CRIU stores them):
//! the call is run again by moving back to its instruction, or, where the kernel keeps hidden state to go on
//! with (`-ERESTART_RESTARTBLOCK`: sleeping, polling), it has been interrupted (`-EINTR`).
//!
//! A restore knows better than to let a program see an EINTR that no signal caused: a call which was
//! interrupted by the freeze alone is made again (`REPEATABLE`), with its full timeout.
//!
//! Vector state is what PTRACE_GETREGSET(NT_X86_XSTATE) gives: an uncompacted XSAVE area.
//!
//! ```text
//!   0  FXSAVE area: x87, MXCSR, XMM; byte 464: mask of components that the kernel has enabled
//! 512  header: XSTATE_BV (components not in their initial state), XCOMP_BV = 0
//! 576  components, each where CPUID says: upper halves of YMM, MPX, AVX-512, PKRU, ...
//! ```
//!
//! The places differ between processors, so images hold the components and not the area.

use anyhow::{Context, ensure};
use ckpt_proto::types::{
    CoreEntry, ThreadInfoX86, UserDescT, UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode,
    UserX86XsaveEntry,
};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    Refused, Tid,
    cpu::{Component, xsave_component},
    ptrace::{self, Regs},
    xstate,
};

use super::{
    answers::{malformed, u16_at, u32_at, u64_at},
    signals,
};

/// Offsets in the area.
const ST_SPACE: usize = 32;
const XMM_SPACE: usize = 160;
const ENABLED: usize = 464;
const HEADER: usize = 512;
const END_OF_HEADER: usize = 576;
/// Largest area that is read; processors with AMX have about 11 KiB.
const LARGEST: usize = 1 << 16;
/// Code segment of 64-bit programs.
const USER_CS: u64 = 0x33;
/// Segments for thread-local storage in the GDT.
const TLS: std::ops::Range<usize> = 12..15;

/// Bits of XSTATE_BV.
mod bit {
    pub const X87: u32 = 0;
    pub const SSE: u32 = 1;
    pub const YMM: u32 = 2;
    pub const BNDREGS: u32 = 3;
    pub const BNDCSR: u32 = 4;
    pub const OPMASK: u32 = 5;
    pub const ZMM_HI256: u32 = 6;
    pub const HI16_ZMM: u32 = 7;
    pub const PKRU: u32 = 9;
}
/// Components that images have fields for.
const STORED: u64 = 0x2ff;

pub(super) fn dump(tid: Tid, regs: &Regs, clear_tid_addr: u64) -> anyhow::Result<ThreadInfoX86> {
    if regs.cs != USER_CS {
        return Err(Refused::new(
            format!("tid {tid}"),
            "is a 32-bit task; only 64-bit programs can be checkpointed",
        )
        .into());
    }
    let area = ptrace::get_regset(tid, ptrace::NT_X86_XSTATE, LARGEST)?;
    let tls = TLS.map(|n| ptrace::thread_area(tid, n).map(segment)).collect::<Result<_, _>>()?;
    let fpregs = fpregs(&area).with_context(|| format!("tid {tid}"))?;
    Ok(ThreadInfoX86 { clear_tid_addr, gpregs: general(regs), fpregs, tls })
}

/// Length of `syscall`, bytes.
const SYSCALL_INSTRUCTION: u64 = 2;

/// Calls that fail with EINTR after any stop, handler or not (signal(7)), or that the kernel would
/// have gone on with by restart_syscall(2), and that can be made again since they had done nothing yet.
const REPEATABLE: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_futex,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];

/// The registers as the program sees them after an interrupted system call.
fn general(regs: &Regs) -> UserX86RegsEntry {
    const ERESTARTSYS: i64 = 512;
    const ERESTARTNOINTR: i64 = 513;
    const ERESTARTNOHAND: i64 = 514;
    const ERESTART_RESTARTBLOCK: i64 = 516;
    let (mut ax, mut ip) = (regs.rax, regs.rip);
    let in_syscall = regs.orig_rax.cast_signed() >= 0;
    match -(regs.rax.cast_signed().max(-4096)) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND if in_syscall => {
            ax = regs.orig_rax;
            ip = ip.wrapping_sub(SYSCALL_INSTRUCTION);
        }
        ERESTART_RESTARTBLOCK if in_syscall => ax = i64::from(-libc::EINTR).cast_unsigned(),
        _ => {}
    }
    UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native.into()),
    }
}

/// Registers for PTRACE_SETREGS. The thread is in no system call, whatever it stopped in while it was built.
pub(super) fn restore(core: &CoreEntry) -> anyhow::Result<Regs> {
    let gp = &core.thread_info.as_ref().ok_or_else(|| malformed("no registers"))?.gpregs;
    if gp.mode.is_some_and(|m| m != i32::from(UserX86RegsMode::Native)) || gp.cs != USER_CS {
        return Err(Refused::new("registers", "of a 32-bit task can't be restored").into());
    }
    // With a handler's return the kernel sets orig_ax to -1; only the freeze leaves EINTR beside a number.
    // With a signal about to be handled EINTR is what the program has to see.
    let repeat = gp.ax.cast_signed() == -i64::from(libc::EINTR)
        && REPEATABLE.contains(&gp.orig_ax.cast_signed())
        && !signals::deliverable(core);
    let (ax, ip) =
        if repeat { (gp.orig_ax, gp.ip.wrapping_sub(SYSCALL_INSTRUCTION)) } else { (gp.ax, gp.ip) };
    Ok(Regs {
        r15: gp.r15,
        r14: gp.r14,
        r13: gp.r13,
        r12: gp.r12,
        rbp: gp.bp,
        rbx: gp.bx,
        r11: gp.r11,
        r10: gp.r10,
        r9: gp.r9,
        r8: gp.r8,
        rax: ax,
        rcx: gp.cx,
        rdx: gp.dx,
        rsi: gp.si,
        rdi: gp.di,
        orig_rax: u64::MAX,
        rip: ip,
        cs: gp.cs,
        eflags: gp.flags,
        rsp: gp.sp,
        ss: gp.ss,
        fs_base: gp.fs_base,
        gs_base: gp.gs_base,
        ds: gp.ds,
        es: gp.es,
        fs: gp.fs,
        gs: gp.gs,
    })
}

fn words32(area: &[u8], from: usize, len: usize) -> Vec<u32> {
    (from..from + len).step_by(4).map(|at| u32_at(area, at)).collect()
}

fn words64(area: &[u8], place: Component) -> Vec<u64> {
    (place.offset..place.offset + place.size).step_by(8).map(|at| u64_at(area, at)).collect()
}

fn fpregs(area: &[u8]) -> anyhow::Result<UserX86FpregsEntry> {
    ensure!(area.len() >= HEADER, "the extended state has only {} bytes", area.len());
    let (enabled, in_use) = (u64_at(area, ENABLED), u64_at(area, HEADER));
    let foreign = in_use & !STORED;
    if foreign != 0 {
        let reason = format!("uses processor state that images have no place for (XSTATE_BV {in_use:#x})");
        return Err(Refused::new("the thread", reason).into());
    }
    let place = |bit: u32| {
        let place = xsave_component(bit).filter(|_| enabled >> bit & 1 == 1)?;
        (place.offset + place.size <= area.len()).then_some(place)
    };
    let of32 = |bit| place(bit).map_or_else(Vec::new, |p| words32(area, p.offset, p.size));
    let of64 = |bit| place(bit).map_or_else(Vec::new, |p| words64(area, p));
    let xsave = UserX86XsaveEntry {
        xstate_bv: in_use,
        ymmh_space: of32(bit::YMM),
        bndreg_state: of64(bit::BNDREGS),
        bndcsr_state: of64(bit::BNDCSR),
        opmask_reg: of64(bit::OPMASK),
        zmm_upper: of64(bit::ZMM_HI256),
        hi16_zmm: of64(bit::HI16_ZMM),
        pkru: of32(bit::PKRU),
        cet: None,
    };
    Ok(UserX86FpregsEntry {
        cwd: u16_at(area, 0).into(),
        swd: u16_at(area, 2).into(),
        twd: u16_at(area, 4).into(),
        fop: u16_at(area, 6).into(),
        rip: u64_at(area, 8),
        rdp: u64_at(area, 16),
        mxcsr: u32_at(area, 24),
        mxcsr_mask: u32_at(area, 28),
        st_space: words32(area, ST_SPACE, XMM_SPACE - ST_SPACE),
        xmm_space: words32(area, XMM_SPACE, 256),
        padding: Vec::new(),
        xsave: Some(xsave),
    })
}

/// Places bytes in the area; both come from checked lengths, so nothing is cut.
fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in area.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// An area for PTRACE_SETREGSET on this processor.
pub(super) fn restore_xstate(core: &CoreEntry) -> anyhow::Result<Vec<u8>> {
    let fp = &core.thread_info.as_ref().ok_or_else(|| malformed("no registers"))?.fpregs;
    let enabled = xstate::enabled();
    let mut area = vec![0; xstate::area_size()];
    for (at, value, name) in [(0, fp.cwd, "cwd"), (2, fp.swd, "swd"), (4, fp.twd, "twd"), (6, fp.fop, "fop")]
    {
        let value = u16::try_from(value).map_err(|_| malformed(format!("x87 register {name}")))?;
        put(&mut area, at, &value.to_le_bytes());
    }
    put(&mut area, 8, &fp.rip.to_le_bytes());
    put(&mut area, 16, &fp.rdp.to_le_bytes());
    put(&mut area, 24, &fp.mxcsr.to_le_bytes());
    put(&mut area, 28, &fp.mxcsr_mask.to_le_bytes());
    let bytes32 = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let bytes64 = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    for (at, words, count) in [(ST_SPACE, &fp.st_space, 32), (XMM_SPACE, &fp.xmm_space, 64)] {
        if words.len() != count {
            return Err(malformed(format!("x87 or SSE state of {} words, not {count}", words.len())));
        }
        put(&mut area, at, &bytes32(words));
    }
    put(&mut area, ENABLED, &enabled.to_le_bytes());
    // Without the extended part (a processor without XSAVE), x87 and SSE are all that was in use.
    let legacy = UserX86XsaveEntry { xstate_bv: 1 << bit::X87 | 1 << bit::SSE, ..Default::default() };
    let xsave = fp.xsave.as_ref().unwrap_or(&legacy);
    let missing = xsave.xstate_bv & !(enabled & STORED);
    if missing != 0 {
        let reason =
            format!("the task uses state that this processor or system lacks (XSTATE_BV bits {missing:#x})");
        return Err(Refused::new("registers", reason)
            .advise("restore on a machine with the same kind of processor")
            .into());
    }
    put(&mut area, HEADER, &xsave.xstate_bv.to_le_bytes());
    for (bit, bytes) in [
        (bit::YMM, bytes32(&xsave.ymmh_space)),
        (bit::BNDREGS, bytes64(&xsave.bndreg_state)),
        (bit::BNDCSR, bytes64(&xsave.bndcsr_state)),
        (bit::OPMASK, bytes64(&xsave.opmask_reg)),
        (bit::ZMM_HI256, bytes64(&xsave.zmm_upper)),
        (bit::HI16_ZMM, bytes64(&xsave.hi16_zmm)),
        (bit::PKRU, bytes32(&xsave.pkru)),
    ] {
        if xsave.xstate_bv >> bit & 1 == 0 {
            continue; // in its initial state, whatever the field says
        }
        let place = xsave_component(bit).context("CPUID does not describe an enabled component")?;
        if bytes.len() != place.size || place.offset < END_OF_HEADER || place.offset + place.size > area.len()
        {
            return Err(malformed(format!(
                "processor state {bit} of {} bytes, not {}",
                bytes.len(),
                place.size
            )));
        }
        put(&mut area, place.offset, &bytes);
    }
    Ok(area)
}

/// `struct user_desc`: number, base, limit, and flags from bit 0: 32-bit, contents (2 bits), read and
/// execute only, limit in pages, not present, usable.
fn segment([number, base, limit, flags]: [u32; 4]) -> UserDescT {
    let flag = |bit: u32| flags >> bit & 1 == 1;
    UserDescT {
        entry_number: number,
        base_addr: base,
        limit,
        seg_32bit: flag(0),
        contents_l: flag(1),
        contents_h: flag(2),
        read_exec_only: flag(3),
        limit_in_pages: flag(4),
        seg_not_present: flag(5),
        usable: flag(6),
    }
}

/// 64-bit programs keep their thread pointer in FS_BASE, so these are nearly always empty.
pub(super) fn restore_tls(core: &CoreEntry) -> Vec<Call> {
    let segments = core.thread_info.iter().flat_map(|t| &t.tls);
    let set = |s: &UserDescT| {
        let flags = [
            s.seg_32bit,
            s.contents_l,
            s.contents_h,
            s.read_exec_only,
            s.limit_in_pages,
            s.seg_not_present,
            s.usable,
        ];
        let flags = (0..).zip(flags).fold(0_u32, |all, (n, on)| all | u32::from(on) << n);
        let desc =
            [s.entry_number, s.base_addr, s.limit, flags].into_iter().flat_map(u32::to_le_bytes).collect();
        Call::new(
            format!("set_thread_area({})", s.entry_number),
            libc::SYS_set_thread_area,
            [Arg::InOut(desc)],
        )
    };
    segments.filter(|s| !s.seg_not_present).map(set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_sys::{
        Pid,
        ptrace::{Stop, wait},
        selfcall,
    };
    use nix::sys::signal::{Signal, raise};

    /// A traced child that has stopped itself.
    fn stopped_child() -> Pid {
        let pid = selfcall::spawn(|| {
            selfcall::trace_me();
            raise(Signal::SIGSTOP).unwrap();
            0
        });
        assert_eq!(wait(pid.leader(), false).unwrap(), Some(Stop::Signal(libc::SIGSTOP)));
        pid
    }

    fn end(pid: Pid) {
        nix::sys::signal::kill(pid.nix(), Signal::SIGKILL).unwrap();
        wait(pid.leader(), false).unwrap();
    }

    fn core(info: ThreadInfoX86) -> CoreEntry {
        CoreEntry { thread_info: Some(info), ..Default::default() }
    }

    #[test]
    fn every_component_comes_back() {
        let _forking = crate::descriptors::forking();
        let pid = stopped_child();
        let tid = pid.leader();
        let mut area = ptrace::get_regset(tid, ptrace::NT_X86_XSTATE, LARGEST).unwrap();
        assert_eq!(area.len(), xstate::area_size());
        // Everything that the processor has and images store gets a value of its own.
        let enabled = u64_at(&area, ENABLED) & STORED & xstate::enabled();
        assert!(enabled & 3 == 3);
        for (at, byte) in (ST_SPACE..416).zip((1..=250).cycle()) {
            area[at] = byte;
        }
        for component in (2..10).filter(|b| enabled >> b & 1 == 1).filter_map(xsave_component) {
            let bytes: Vec<u8> =
                (1..=250).cycle().skip(component.bit as usize).take(component.size).collect();
            put(&mut area, component.offset, &bytes);
            if component.bit == bit::PKRU {
                put(&mut area, component.offset, &[0, 0, 0, 0x40, 0, 0, 0, 0]);
            }
        }
        put(&mut area, HEADER, &enabled.to_le_bytes());
        ptrace::set_regset(tid, ptrace::NT_X86_XSTATE, &area).unwrap();
        let info = dump(tid, &ptrace::regs(tid).unwrap(), 0).unwrap();
        assert_eq!(info.fpregs.xsave.as_ref().unwrap().xstate_bv, enabled);
        end(pid);

        let other = stopped_child();
        let tid = other.leader();
        ptrace::set_regset(tid, ptrace::NT_X86_XSTATE, &restore_xstate(&core(info.clone())).unwrap())
            .unwrap();
        let again = dump(tid, &ptrace::regs(tid).unwrap(), 0).unwrap();
        assert_eq!(again.fpregs, info.fpregs);
        end(other);
    }

    #[test]
    fn initial_state_comes_back() {
        let _forking = crate::descriptors::forking();
        let pid = stopped_child();
        let tid = pid.leader();
        let info = dump(tid, &ptrace::regs(tid).unwrap(), 0).unwrap();
        ptrace::set_regset(tid, ptrace::NT_X86_XSTATE, &restore_xstate(&core(info.clone())).unwrap())
            .unwrap();
        assert_eq!(dump(tid, &ptrace::regs(tid).unwrap(), 0).unwrap(), info);
        let mut regs = restore(&core(info)).unwrap();
        // PTRACE_SETREGS takes what we make of an image.
        regs.fs_base = 0x1000;
        ptrace::set_regs(tid, regs).unwrap();
        assert_eq!(ptrace::regs(tid).unwrap().fs_base, 0x1000);
        end(pid);
    }

    #[test]
    fn state_that_this_processor_lacks_is_refused() {
        let _forking = crate::descriptors::forking();
        let pid = stopped_child();
        let mut info = dump(pid.leader(), &ptrace::regs(pid.leader()).unwrap(), 0).unwrap();
        end(pid);
        info.fpregs.xsave.as_mut().unwrap().xstate_bv |= 1 << 18;
        let error = restore_xstate(&core(info.clone())).unwrap_err();
        assert!(error.downcast_ref::<Refused>().is_some(), "{error:#}");
        info.fpregs.xsave.as_mut().unwrap().xstate_bv = 2;
        info.fpregs.xmm_space.pop();
        assert!(restore_xstate(&core(info)).is_err());
    }

    #[test]
    fn interrupted_calls_are_run_again_or_end_with_eintr() {
        let _forking = crate::descriptors::forking();
        let pid = stopped_child();
        let mut regs = ptrace::regs(pid.leader()).unwrap();
        end(pid);
        regs.orig_rax = 34;
        regs.rip = 0x1002;
        for code in [512_i64, 513, 514] {
            regs.rax = (-code).cast_unsigned();
            let gp = general(&regs);
            assert_eq!((gp.ax, gp.ip, gp.orig_ax), (34, 0x1000, 34));
        }
        regs.rax = (-516_i64).cast_unsigned();
        let gp = general(&regs);
        assert_eq!((gp.ax, gp.ip), ((-4_i64).cast_unsigned(), 0x1002));
        // Not in a call: the same number is the program's own.
        regs.orig_rax = u64::MAX;
        assert_eq!(general(&regs).ax, (-516_i64).cast_unsigned());
        regs.rax = 0x8000_0000_0000_0000;
        assert_eq!(general(&regs).ax, regs.rax);
    }
}
