//! System calls inside a frozen live task, which must come out of it as if nothing had happened,
//! even if this process is killed in the middle.
//!
//! A stopped task's registers can be pointed at a `syscall` instruction and it will do our bidding.
//! But the kernel's promise on a tracer's death is only that the task runs on *from where it is*.
//! So before its registers are touched, the task is given a way home that needs nobody:
//!
//! ```text
//! dead stack (unused bytes at the far end of the main thread's stack):
//!     fpstate                     its FPU state, in the form of a signal frame
//!     HOME:  &sigreturn | ucontext of its own registers and signal mask
//!     UNMAP: &sigreturn | ucontext { rip = &syscall, munmap(page), rsp = HOME }
//! ```
//!
//! `&syscall` is a `syscall; ret` in the vdso or libc, `&sigreturn` the `mov $15,%eax; syscall` to
//! which every libc lets signal handlers return. Each remote call runs with `rip = &syscall` and
//! `rsp = HOME` (or UNMAP): whenever we are gone, the `ret` after the call leads to rt_sigreturn(2),
//! which restores every register, the FPU state and the signal mask in one step. No code of ours
//! is in the task for this.
//!
//! For many calls a page with a small runner and a table of calls is mapped, so that a whole batch
//! costs one stop. It tells us that it is done by a signal to itself that the task ignores (no
//! handler, default action "ignore"), which a tracer sees and nobody else. If there is no tracer,
//! the runner goes on: munmap of its own page by `&syscall`, `ret` to HOME. When no such signal is
//! free (Go programs catch all), seccomp filters the task, or nothing can be mapped (address space
//! full), calls are made one by one, two stops each.
//!
//! Ways not chosen: a page that is only mapped (it stays behind when the tracer is killed);
//! PTRACE_SINGLESTEP (the trap flag survives the tracer and kills the task); `int3` at the end
//! (deadly without a tracer); code poked into the program's text (left changed).
//!
//! The order of the steps at each end, and why:
//!
//! 1. The frames are written. Dead bytes of the stack change; nothing else.
//! 2. Registers are set, then the signal mask (all blocked). Killed in between: the task goes home.
//! 3. ... calls ...
//! 4. PTRACE_INTERRUPT, so that the task passes through signal delivery once more, where the kernel
//!    sees to an interrupted system call. Then the mask, then the registers: killed in between, the
//!    frame at HOME still has both. If the runner's page is to be unmapped, the interrupt comes while the
//!    task is entering that call, and one stop ends both.
//! 5. The stack bytes are put back.
//!
//! Some calls leave the task in a state that must not outlive us: a descriptor that is only to be
//! copied out, a socket in repair mode. [`Borrowed::guard`] takes the calls that undo it beforehand
//! and chains them, as more frames of the same kind, into the way home:
//!
//! ```text
//!     UNDO 1: &sigreturn | ucontext { rip = &syscall, close(7), rsp = UNDO 2 }
//!     UNDO 2: &sigreturn | ucontext { rip = &syscall, ..., rsp = HOME }
//! ```
//!
//! Every call then runs with `rsp = UNDO 1`. If we die, the task undoes it all and goes home; if we
//! live, [`Borrowed::unguard`] runs the same calls. A batch would need the runner's page unmapped in
//! the middle of this, so guarded calls are made one by one.
//!
//! A system call that was interrupted for us restarts by itself in the orderly case. On the way
//! home it is re-executed, so that a sleep may take longer after our violent death, but no call
//! fails with an EINTR that nobody sent.

mod frame;
mod landing;

use ckpt_sys::{
    Pid, RemoteAddr, SysError, Tid, memory,
    ptrace::{self, NT_X86_XSTATE, Regs, Stop},
};

use self::frame::{UCONTEXT, signal_fpstate};
pub(crate) use self::landing::{Landing, Landings};
use crate::{Arg, Call, Done, RemoteError, Syscalls, freeze::Frozen};

const PAGE: u64 = 4096;
/// Size of the mapped runner with table and arguments, bytes.
const ARENA: u64 = 64 * 1024;
/// The table starts here in the arena; the code before it is far shorter.
const TABLE: u64 = 256;
/// nr, six arguments, result, may_fail.
const ROW: u64 = 72;
/// How many calls a batch holds; the rest of the arena is for their data.
const ROWS: usize = 256;
/// Fewer calls than this are made one by one: mapping and unmapping costs four stops.
const WORTH_A_BATCH: usize = 6;
/// A frame with the address of `&sigreturn` before it, bytes.
pub(crate) const FRAME: u64 = (8 + UCONTEXT as u64).next_multiple_of(16);
const SYS_MUNMAP: u64 = 11;

/// The runner. In: rbx = table, r12 = number of rows, r13 = tgid, r14 = tid, r15 = signal,
/// rbp = &syscall, r8.. free, rsp = HOME. Position independent.
#[rustfmt::skip]
const RUNNER: &[u8] = &[
    0x4d, 0x85, 0xe4,                         //  0: test r12, r12
    0x74, 0x39,                               //  3: jz notify(62)
    0x48, 0x8b, 0x03,                         //  5: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08,                   //  8: mov rdi, [rbx+8]
    0x48, 0x8b, 0x73, 0x10,                   // 12: mov rsi, [rbx+16]
    0x48, 0x8b, 0x53, 0x18,                   // 16: mov rdx, [rbx+24]
    0x4c, 0x8b, 0x53, 0x20,                   // 20: mov r10, [rbx+32]
    0x4c, 0x8b, 0x43, 0x28,                   // 24: mov r8, [rbx+40]
    0x4c, 0x8b, 0x4b, 0x30,                   // 28: mov r9, [rbx+48]
    0x0f, 0x05,                               // 32: syscall
    0x48, 0x89, 0x43, 0x38,                   // 34: mov [rbx+56], rax
    0x48, 0x83, 0x7b, 0x40, 0x00,             // 38: cmp qword [rbx+64], 0
    0x75, 0x08,                               // 43: jne next(53)
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff,       // 45: cmp rax, -4095
    0x73, 0x09,                               // 51: jae notify(62)
    0x48, 0x83, 0xc3, 0x48,                   // 53: add rbx, 72
    0x49, 0xff, 0xcc,                         // 57: dec r12
    0xeb, 0xc2,                               // 60: jmp 0
    0xb8, 0xea, 0x00, 0x00, 0x00,             // 62: mov eax, 234 (tgkill)
    0x4c, 0x89, 0xef,                         // 67: mov rdi, r13
    0x4c, 0x89, 0xf6,                         // 70: mov rsi, r14
    0x4c, 0x89, 0xfa,                         // 73: mov rdx, r15
    0x0f, 0x05,                               // 76: syscall
    // 78: nobody stopped us here: unmap ourselves and go home.
    0xb8, 0x0b, 0x00, 0x00, 0x00,             // 78: mov eax, 11 (munmap)
    0x48, 0x8d, 0x3d, 0xa6, 0xff, 0xff, 0xff, // 83: lea rdi, [rip-90] (start of this page)
    0xbe, 0x00, 0x00, 0x01, 0x00,             // 90: mov esi, 65536 (ARENA)
    0xff, 0xe5,                               // 95: jmp rbp
];
/// Address of the instruction after the notifying system call.
const NOTIFIED: u64 = 78;

/// A frozen task that runs system calls for us; see the module's text for what it is promised.
#[derive(Debug)]
pub struct Borrowed<'a> {
    pid: Pid,
    tid: Tid,
    original: Regs,
    sigmask: u64,
    landing: Landing,
    held: &'a mut Vec<(Pid, i32)>,
    /// Stack bytes as they were, at `landing.dead.0`.
    saved: Vec<u8>,
    home: RemoteAddr,
    unmap: RemoteAddr,
    /// Start and length of the dead stack that is left for arguments of single calls.
    scratch: (RemoteAddr, u64),
    /// Whether the task's registers are ours now.
    away: bool,
    mapped: bool,
    guards: Vec<Guard>,
}

/// Calls on the way home that undo others.
#[derive(Debug)]
struct Guard {
    undo: Vec<Undo>,
    /// What the task had before: its next stop on the way home, and memory for arguments.
    home: RemoteAddr,
    scratch: (RemoteAddr, u64),
}

#[derive(Debug)]
struct Undo {
    call: Call,
    layout: Layout,
    /// The frame that leads to the call.
    frame: RemoteAddr,
}

impl Frozen {
    /// Borrows thread `tid` of process `pid` for remote calls.
    ///
    /// # Errors
    /// [`RemoteError::Unusable`] says why it can't be used; the task is untouched then.
    pub fn borrow(&mut self, pid: Pid, tid: Tid) -> Result<Borrowed<'_>, RemoteError> {
        let gone = || RemoteError::Died(tid);
        let process = self.processes.iter().find(|p| p.pid == pid).ok_or_else(gone)?;
        let thread = process.threads.iter().find(|t| t.tid == tid).ok_or_else(gone)?;
        let (original, sigmask) = (thread.regs, thread.sigmask);
        let landing = self.landings.of(&process.threads, pid)?;
        if landing.seccomp {
            // Filters of the task would judge our calls; until we are gone they don't.
            let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP;
            ptrace::set_options(tid, options.unsigned_abs())?;
        }
        let xstate = ptrace::get_regset(tid, NT_X86_XSTATE, 64 * 1024)?;

        let base = landing.dead.0.0.next_multiple_of(64);
        let fpstate = signal_fpstate(&xstate);
        let home = (base + fpstate.len() as u64).next_multiple_of(16);
        let unmap = home + FRAME;
        let scratch = (unmap + FRAME).next_multiple_of(64);
        let end = landing.dead.0.0 + landing.dead.1;
        if scratch + 256 > end {
            let what = "its stack has too little unused space for a return frame".to_owned();
            return Err(RemoteError::Unusable { tid, what });
        }
        let mut saved = vec![0; usize::try_from(end - base).unwrap_or(0)];
        memory::read_exact(pid, RemoteAddr(base), &mut saved)?;

        let back = going_back(pid, &original);
        let mut frames = fpstate;
        frames.resize(usize::try_from(scratch - base).unwrap_or(0), 0);
        let mut place = |at: u64, regs: &Regs, mask: u64| {
            let offset = usize::try_from(at - base).unwrap_or(0);
            let frame = landing.frame(regs, mask, base);
            frames[offset..offset + frame.len()].copy_from_slice(&frame);
        };
        place(home, &back, sigmask);
        if let Some(page) = landing.hole {
            let unmapping = Regs {
                rip: landing.syscall.0,
                rsp: home,
                rax: SYS_MUNMAP,
                rdi: page.0,
                rsi: ARENA,
                ..original
            };
            place(unmap, &unmapping, !0);
        }
        memory::write_all(pid, RemoteAddr(base), &frames)?;
        Ok(Borrowed {
            pid,
            tid,
            original,
            sigmask,
            landing: Landing { dead: (RemoteAddr(base), end - base), ..landing },
            held: &mut self.held,
            saved,
            home: RemoteAddr(home),
            unmap: RemoteAddr(unmap),
            scratch: (RemoteAddr(scratch), end - scratch),
            away: false,
            mapped: false,
            guards: Vec::new(),
        })
    }
}

/// The registers with which the task goes home without us. An interrupted system call (its result
/// is one of the kernel's ERESTART values) is executed again.
fn going_back(pid: Pid, original: &Regs) -> Regs {
    let mut back = interrupted_call(pid, original);
    if back.orig_rax.cast_signed() >= 0 && (-516..=-512).contains(&back.rax.cast_signed()) {
        back.rip -= SYSCALL_INSTRUCTION;
        back.rax = back.orig_rax;
    }
    back
}

/// Length of `syscall`, bytes.
const SYSCALL_INSTRUCTION: u64 = 2;

/// `regs` with the number of the system call that the program made, where they tell only of
/// restart_syscall(2): in `orig_rax` if that was interrupted in turn, in `rax` if it is about to be
/// made. Its kernel state survives neither rt_sigreturn(2) nor a restore: it would give EINTR. The
/// arguments are still in place, and the number is in the program's text, where nearly all code
/// sets it right before the `syscall` instruction.
#[must_use]
pub fn interrupted_call(pid: Pid, regs: &Regs) -> Regs {
    const RESTART_SYSCALL: u64 = 219;
    let mut regs = *regs;
    let (behind, again) = if regs.orig_rax == RESTART_SYSCALL {
        (regs.rip, false)
    } else if regs.rax == RESTART_SYSCALL && regs.orig_rax.cast_signed() >= 0 {
        (regs.rip + SYSCALL_INSTRUCTION, true)
    } else {
        return regs;
    };
    let mut text = [0; 48];
    let before = RemoteAddr(behind.wrapping_sub(text.len() as u64));
    if memory::read_exact(pid, before, &mut text).is_ok()
        && let Some(nr) = restarted_number(&text)
    {
        *if again { &mut regs.rax } else { &mut regs.orig_rax } = nr;
    }
    regs
}

/// The number set by the last `mov $nr,%eax` before the `syscall` that ends `text`, if it is one of
/// the calls that restart by restart_syscall(2): poll, nanosleep, futex, clock_nanosleep.
fn restarted_number(text: &[u8]) -> Option<u64> {
    let code = text.strip_suffix(b"\x0f\x05")?;
    code.windows(5).rev().find_map(|w| match w {
        [0xb8, nr @ (7 | 35 | 202 | 230), 0, 0, 0] => Some(u64::from(*nr)),
        _ => None,
    })
}

/// What a batch's arguments became: addresses, and where the answers will be.
#[derive(Debug)]
struct Layout {
    args: [u64; 6],
    outs: Vec<(RemoteAddr, usize)>,
}

/// Places data arguments of `call` from `*at` on (16-byte aligned), below `end`; collects what is to be written.
fn lay_out(call: &Call, at: &mut u64, end: u64, writes: &mut Vec<(u64, Vec<u8>)>) -> Option<Layout> {
    let mut layout = Layout { args: [0; 6], outs: Vec::new() };
    for (slot, arg) in layout.args.iter_mut().zip(&call.args) {
        let bytes = match arg {
            Arg::Val(n) => {
                *slot = *n;
                continue;
            }
            Arg::In(bytes) | Arg::InOut(bytes) => bytes.clone(),
            Arg::Out(len) => vec![0; *len],
        };
        let start = at.next_multiple_of(16);
        let len = bytes.len() as u64;
        if start + len > end {
            return None;
        }
        *slot = start;
        *at = start + len;
        if !matches!(arg, Arg::In(_)) {
            layout.outs.push((RemoteAddr(start), bytes.len()));
        }
        writes.push((start, bytes));
    }
    Some(layout)
}

impl Borrowed<'_> {
    fn unusable(&self, what: impl Into<String>) -> RemoteError {
        RemoteError::Unusable { tid: self.tid, what: what.into() }
    }

    /// Takes the task over, or goes on with it, at `regs`.
    fn steer(&mut self, regs: Regs, blocked: u64) -> Result<(), RemoteError> {
        ptrace::set_regs(self.tid, Regs { orig_rax: !0, ..regs })?;
        ptrace::set_sigmask(self.tid, blocked)?;
        self.away = true;
        Ok(())
    }

    /// Waits for the stop that `wanted` accepts. Signals that get through although all are blocked
    /// (SIGSTOP) are held back and sent again at the end.
    fn await_stop(&mut self, syscalls: bool, wanted: impl Fn(Stop) -> bool) -> Result<(), RemoteError> {
        loop {
            ptrace::resume(self.tid, 0, syscalls).map_err(|e| self.died(e))?;
            // All others are stopped: what is heard of them is that they were killed.
            let stop = loop {
                match ptrace::wait_any().map_err(|e| self.died(e))? {
                    (tid, Stop::Exited(_) | Stop::Killed(_)) => return Err(RemoteError::Died(tid)),
                    (tid, stop) if tid == self.tid => break stop,
                    _ => {}
                }
            };
            match stop {
                stop if wanted(stop) => return Ok(()),
                Stop::Signal(signal) if ptrace::is_stop_signal(signal) => self.held.push((self.pid, signal)),
                _ => {}
            }
        }
    }

    fn died(&self, error: SysError) -> RemoteError {
        if error.vanished() { RemoteError::Died(self.tid) } else { error.into() }
    }

    /// One system call by itself: two stops.
    fn single(&mut self, nr: u64, args: [u64; 6], home: RemoteAddr) -> Result<i64, RemoteError> {
        self.steer(self.calling(nr, args, home), !0)?;
        self.await_stop(true, |s| s == Stop::Syscall)?;
        self.await_stop(true, |s| s == Stop::Syscall)?;
        Ok(ptrace::regs(self.tid)?.rax.cast_signed())
    }

    /// The registers with which the task makes a call and returns to the frame at `home`.
    pub(crate) fn calling(&self, nr: u64, args: [u64; 6], home: RemoteAddr) -> Regs {
        Regs {
            rip: self.landing.syscall.0,
            rsp: home.0,
            rax: nr,
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            r10: args[3],
            r8: args[4],
            r9: args[5],
            ..self.original
        }
    }

    pub(crate) fn way_home(&self) -> RemoteAddr {
        if self.mapped { self.unmap } else { self.home }
    }

    fn one_by_one(&mut self, call: &Call) -> Result<Done, RemoteError> {
        let mut writes = Vec::new();
        let mut at = self.scratch.0.0;
        let layout =
            lay_out(call, &mut at, self.scratch.0.0 + self.scratch.1, &mut writes).ok_or_else(|| {
                self.unusable(format!("{}: its arguments do not fit into the unused stack", call.name))
            })?;
        for (addr, bytes) in &writes {
            memory::write_all(self.pid, RemoteAddr(*addr), bytes)?;
        }
        let ret = self.single(call.nr.cast_unsigned(), layout.args, self.way_home())?;
        self.collect(ret, &layout.outs)
    }

    fn collect(&self, ret: i64, outs: &[(RemoteAddr, usize)]) -> Result<Done, RemoteError> {
        let mut done = Done { ret, out: Vec::with_capacity(outs.len()) };
        for &(addr, len) in outs {
            let mut bytes = vec![0; len];
            memory::read_exact(self.pid, addr, &mut bytes)?;
            done.out.push(bytes);
        }
        Ok(done)
    }

    /// Maps the arena if that is possible; whether there is one.
    fn arena(&mut self) -> Result<Option<(RemoteAddr, i32)>, RemoteError> {
        let (Some(page), Some(quiet), false) = (self.landing.hole, self.landing.quiet, self.landing.seccomp)
        else {
            return Ok(None);
        };
        if !self.guards.is_empty() {
            return Ok(None);
        }
        if !self.mapped {
            let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC).unsigned_abs();
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).unsigned_abs();
            let args = [page.0, ARENA, prot.into(), flags.into(), !0, 0];
            // If we die right after this call, the way home leads over UNMAP.
            let ret = self.single(libc::SYS_mmap.cast_unsigned(), args, self.unmap)?;
            if ret.cast_unsigned() != page.0 {
                self.landing.hole = None;
                return Ok(None);
            }
            self.mapped = true;
            memory::write_all(self.pid, page, RUNNER)?;
        }
        Ok(Some((page, quiet)))
    }

    /// As many of `calls` as fit, in one stop.
    fn batch(&mut self, page: RemoteAddr, quiet: i32, calls: &[Call]) -> Result<Vec<Done>, RemoteError> {
        let table = page.0 + TABLE;
        let (mut at, end) = (table + ROW * calls.len().min(ROWS) as u64, page.0 + ARENA);
        let mut writes = Vec::new();
        let mut rows = Vec::new();
        let mut layouts = Vec::new();
        for call in calls.iter().take(ROWS) {
            let mut mine = Vec::new();
            let Some(layout) = lay_out(call, &mut at, end, &mut mine) else { break };
            writes.extend(mine);
            let words =
                [call.nr.cast_unsigned()].into_iter().chain(layout.args).chain([0, call.may_fail.into()]);
            rows.extend(words.flat_map(u64::to_le_bytes));
            layouts.push(layout);
        }
        if layouts.is_empty() {
            return calls.first().map(|call| self.one_by_one(call)).into_iter().collect();
        }
        // Table and data in one piece, which costs one call each way.
        let offset = |addr: u64| usize::try_from(addr - table).unwrap_or(0);
        let mut image = vec![0; offset(at)];
        writes.push((table, rows));
        for (addr, bytes) in &writes {
            image[offset(*addr)..][..bytes.len()].copy_from_slice(bytes);
        }
        memory::write_all(self.pid, RemoteAddr(table), &image)?;
        let regs = Regs {
            rip: page.0,
            rsp: self.home.0,
            rbx: table,
            r12: layouts.len() as u64,
            r13: u64::from(self.pid.0.unsigned_abs()),
            r14: u64::from(self.tid.0.unsigned_abs()),
            r15: u64::from(quiet.unsigned_abs()),
            rbp: self.landing.syscall.0,
            ..self.original
        };
        self.steer(regs, !(1 << (quiet - 1)))?;
        loop {
            self.await_stop(false, |s| s == Stop::Signal(quiet))?;
            // The same signal may have come from elsewhere; the task ignores it, so do we.
            if ptrace::regs(self.tid)?.rip == page.0 + NOTIFIED {
                break;
            }
        }
        memory::read_exact(self.pid, RemoteAddr(table), &mut image)?;
        let mut answers = Vec::new();
        for ((call, layout), row) in
            calls.iter().zip(&layouts).zip(image.chunks_exact(usize::try_from(ROW).unwrap_or(1)))
        {
            let ret = i64::from_le_bytes(row[56..64].try_into().unwrap_or_default());
            let out = layout.outs.iter().map(|&(addr, len)| image[offset(addr.0)..][..len].to_vec());
            let done = Done { ret, out: out.collect() };
            let failed = !call.may_fail && done.result().is_err();
            answers.push(done);
            if failed {
                break;
            }
        }
        Ok(answers)
    }

    /// Promises that `undo` is run after the calls made from here on: in [`Self::unguard`], when the
    /// task is given back, or by the task itself if this process dies. Guards nest; the last comes first.
    ///
    /// A call that is interrupted by our death counts as made or as not made: `undo` has to be right
    /// for both (closing a descriptor that is not open fails, which harms nobody).
    ///
    /// # Errors
    /// See [`RemoteError`]; `Unusable` if the frames do not fit into the unused stack. Nothing is
    /// promised then.
    pub fn guard(&mut self, undo: Vec<Call>) -> Result<(), RemoteError> {
        self.unmap_arena()?;
        let (start, len) = self.scratch;
        let (mut at, end) = (start.0, start.0 + len);
        let mut writes = Vec::new();
        let mut entries = Vec::with_capacity(undo.len());
        let mut fits = true;
        for call in undo {
            match lay_out(&call, &mut at, end, &mut writes) {
                Some(layout) => entries.push(Undo { call, layout, frame: RemoteAddr(0) }),
                None => fits = false,
            }
        }
        at = at.next_multiple_of(16);
        let free = (at + FRAME * entries.len() as u64).next_multiple_of(64);
        if !fits || free + 256 > end {
            return Err(self.unusable("its stack has too little unused space to guard what is done to it"));
        }
        for entry in &mut entries {
            entry.frame = RemoteAddr(at);
            at += FRAME;
        }
        for (index, entry) in entries.iter().enumerate() {
            let next = entries.get(index + 1).map_or(self.home, |next| next.frame);
            let regs = self.calling(entry.call.nr.cast_unsigned(), entry.layout.args, next);
            writes.push((entry.frame.0, self.landing.frame(&regs, !0, self.landing.dead.0.0)));
        }
        for (addr, bytes) in &writes {
            memory::write_all(self.pid, RemoteAddr(*addr), bytes)?;
        }
        let first = entries.first().map_or(self.home, |entry| entry.frame);
        self.guards.push(Guard {
            undo: entries,
            home: std::mem::replace(&mut self.home, first),
            scratch: std::mem::replace(&mut self.scratch, (RemoteAddr(free), end - free)),
        });
        Ok(())
    }

    /// Runs the calls of the last [`Self::guard`] and gives their answers.
    ///
    /// # Errors
    /// See [`RemoteError`]. All calls are made; the first failure without [`Call::may_fail`] is told.
    pub fn unguard(&mut self) -> Result<Vec<Done>, RemoteError> {
        let Some(guard) = self.guards.pop() else { return Ok(Vec::new()) };
        let mut answers = Vec::with_capacity(guard.undo.len());
        let mut failure = None;
        for (index, Undo { call, layout, .. }) in guard.undo.iter().enumerate() {
            let next = guard.undo.get(index + 1).map_or(guard.home, |next| next.frame);
            let ret = self.single(call.nr.cast_unsigned(), layout.args, next)?;
            let done = self.collect(ret, &layout.outs)?;
            if let (Err(errno), false) = (done.result(), call.may_fail) {
                failure = failure.or(Some((call.name.clone(), errno)));
            }
            answers.push(done);
        }
        (self.home, self.scratch) = (guard.home, guard.scratch);
        match failure {
            Some((name, errno)) => Err(RemoteError::Call { tid: self.tid, name, errno }),
            None => Ok(answers),
        }
    }

    /// Where the kernel finds the first argument of the last guard's first call.
    pub(crate) fn guarded_argument(&self) -> RemoteAddr {
        const RDI: u64 = 13 * 8;
        let frame =
            self.guards.last().and_then(|guard| guard.undo.first()).map_or(self.home, |undo| undo.frame);
        frame.plus(8 + RDI)
    }

    /// Takes note that the kernel has written `value` there.
    pub(crate) fn set_guarded_argument(&mut self, value: i32) {
        if let Some(undo) = self.guards.last_mut().and_then(|guard| guard.undo.first_mut()) {
            undo.layout.args[0] = u64::from(value.unsigned_abs());
        }
    }

    /// A frame that leads to `regs`, with all signals blocked.
    pub(crate) fn frame(&self, regs: &Regs) -> Vec<u8> {
        self.landing.frame(regs, !0, self.landing.dead.0.0)
    }

    /// The unused stack that is left for arguments: start and length.
    pub(crate) fn scratch(&self) -> (RemoteAddr, u64) {
        self.scratch
    }

    /// Address of the `syscall` instruction that is used.
    pub(crate) fn syscall(&self) -> RemoteAddr {
        self.landing.syscall
    }

    /// The unused stack that was written to and will be put back.
    pub(crate) fn dead_stack(&self) -> (RemoteAddr, u64) {
        self.landing.dead
    }

    /// Whether a seccomp filter would judge the task's calls if we were not there.
    pub(crate) fn filtered(&self) -> bool {
        self.landing.seccomp
    }

    fn unmap_arena(&mut self) -> Result<(), RemoteError> {
        if self.mapped
            && let Some(page) = self.landing.hole
        {
            self.single(SYS_MUNMAP, [page.0, ARENA, 0, 0, 0, 0], self.home)?;
            self.mapped = false;
        }
        Ok(())
    }

    /// Gives the task back as it was. Dropping does the same but can't tell of errors.
    ///
    /// # Errors
    /// The task died, or ptrace failed.
    pub fn finish(mut self) -> Result<(), RemoteError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), RemoteError> {
        let mut failure = None;
        while !self.guards.is_empty() {
            match self.unguard() {
                Err(error @ RemoteError::Call { .. }) => failure = failure.or(Some(error)),
                other => drop(other?),
            }
        }
        if self.away {
            let stopped = |s| matches!(s, Stop::Interrupted | Stop::Group(_));
            let unmapping = self.landing.hole.filter(|_| self.mapped);
            if let Some(page) = unmapping {
                let args = [page.0, ARENA, 0, 0, 0, 0];
                self.steer(self.calling(SYS_MUNMAP, args, self.home), !0)?;
                self.await_stop(true, |s| s == Stop::Syscall)?;
                self.mapped = false;
            }
            ptrace::interrupt(self.tid).map_err(|e| self.died(e))?;
            if unmapping.is_some() {
                // It comes from the call straight into the stop.
                self.await_stop(false, stopped)?;
            }
            ptrace::set_sigmask(self.tid, self.sigmask)?;
            ptrace::set_regs(self.tid, self.original)?;
            self.away = false;
            if unmapping.is_none() {
                self.await_stop(false, stopped)?;
            }
        }
        let saved = std::mem::take(&mut self.saved);
        memory::write_all(self.pid, self.landing.dead.0, &saved)?;
        failure.map_or(Ok(()), Err)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if !self.saved.is_empty() {
            // Whoever wants to know of failures calls `finish`.
            let _ = self.give_back();
        }
    }
}

impl Syscalls for Borrowed<'_> {
    fn tid(&self) -> Tid {
        self.tid
    }

    fn run(&mut self, calls: &[Call]) -> Result<Vec<Done>, RemoteError> {
        let mut answers = Vec::with_capacity(calls.len());
        while answers.len() < calls.len() {
            let rest = &calls[answers.len()..];
            let arena = if rest.len() >= WORTH_A_BATCH || self.mapped { self.arena()? } else { None };
            let more = match arena {
                Some((page, quiet)) => self.batch(page, quiet, rest)?,
                None => vec![self.one_by_one(&rest[0])?],
            };
            if more.is_empty() {
                return Err(self.unusable("a batch of calls made no progress"));
            }
            for done in more {
                let call = &calls[answers.len()];
                if let (Err(errno), false) = (done.result(), call.may_fail) {
                    return Err(RemoteError::Call { tid: self.tid, name: call.name.clone(), errno });
                }
                answers.push(done);
            }
        }
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_a_restarted_call_is_in_the_text() {
        let text = |nr: u8, between: &[u8]| [&[0xb8, nr, 0, 0, 0], between, b"\x0f\x05"].concat();
        assert_eq!(restarted_number(&text(7, &[])), Some(7));
        assert_eq!(restarted_number(&text(230, &[0x48, 0x89, 0xe5])), Some(230));
        assert_eq!(restarted_number(&text(1, &[])), None);
        assert_eq!(restarted_number(b"\xb8\x07\0\0\0"), None);
    }

    #[test]
    fn runner_is_consistent_with_its_constants() {
        assert!(RUNNER.len() < usize::try_from(TABLE).expect("small"));
        // The notifying syscall ends where NOTIFIED says, and the page's start is found from there.
        let notified = usize::try_from(NOTIFIED).expect("small");
        assert_eq!(&RUNNER[notified - 2..notified], b"\x0f\x05");
        let lea_end = 90;
        let displacement = i32::from_le_bytes(RUNNER[lea_end - 4..lea_end].try_into().expect("four bytes"));
        assert_eq!(i32::try_from(lea_end).expect("small") + displacement, 0);
        assert_eq!(RUNNER[91..95], u32::try_from(ARENA).expect("small").to_le_bytes());
    }
}
