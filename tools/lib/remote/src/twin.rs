//! Copy-on-write copies of frozen processes, which hold their memory as it is while they run on.
//!
//! fork(2) by remote call would be the whole of it, but a child is a thing that its parent can see:
//! it is waited for, listed, signalled for, counted. So a *twin* is made in two steps:
//!
//! ```text
//!   target ── clone3 ──> between ── clone3(CLONE_VM) ──> twin
//!                        (the copy)                      (the same memory)
//!              wait4  <── dies;        the twin is init's child from here on
//! ```
//!
//! - `between` copies the page tables. CLONE_FILES: the target's table is shared, not copied, so
//!   that no reference to an open file is taken; the twin leaves it with
//!   close_range(CLOSE_RANGE_UNSHARE), which copies nothing of what it is to close (Linux 5.9).
//!   Exit signal 0: nobody is signalled when it dies (clone(2)).
//! - `twin` shares the memory of `between`, which may die then. It leaves group and session.
//! - The target itself waits for `between` while it is frozen, so nothing is left for it to see.
//!
//! Why not the other way round (`between` with CLONE_VM, the twin the copy): then the target's memory is
//! shared by two processes that run on their own if we die, and the time that the copy takes is
//! charged to the target as that of a child.
//!
//! CLONE_PTRACE hands both to us, stopped before their first instruction. If we are killed:
//!
//! 1. Before `between` exists, or has got PTRACE_O_EXITKILL: it starts on a stack of its own, a
//!    signal frame that leads to exit_group(2). The target's way home has a wait4(2) chained into
//!    it ([`Borrowed::guard`]), and the kernel writes the pid into that frame before `between` can
//!    run (CLONE_PARENT_SETTID). No pid: wait4 fails and harms nobody.
//! 2. Later: the kernel kills `between`, and the twin, which inherits the option.
//!
//! In case 1 another thread of the target that waits for clone children (`__WALL`) at this very
//! instant could be told of `between`. What the target can tell even in the orderly case:
//! getrusage(RUSAGE_CHILDREN) has `ru_maxrss` of a child as large as itself, and while the twin lives
//! its user has a process more (RLIMIT_NPROC, pids of its cgroup).
//!
//! The twin's bytes differ in two places from the target's, which are copied over at the end: the
//! unused stack with our frames, and the restartable-sequence area of the thread that forked, which
//! the kernel updated when `between` came to life.

use std::collections::HashSet;

use ckpt_sys::{
    Pid, RemoteAddr, Tid,
    clone::CloneArgs,
    memory,
    ptrace::{self, Regs, Stop},
};
use nix::errno::Errno;

use crate::{
    Arg, Call, RemoteError, Syscalls,
    borrow::{Borrowed, FRAME},
    freeze::Frozen,
};

/// No process has this pid (`PID_MAX_LIMIT` is 2^22).
const NOBODY: i32 = 0x7fff_fff0;
/// What tools like ps show.
const NAME: &[u8] = b"ckpt-snapshot\0";

/// Why a process has no twin.
#[derive(Debug, thiserror::Error)]
pub enum NoTwin {
    /// Something about the process or the system forbids it; the process is untouched.
    #[error("{0}")]
    Unfit(String),
    /// Remote calls failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// A stopped process with a copy-on-write copy of another's memory. It has no files, no children
/// and no parent to speak of. Dropping it ends it, and so does our death.
#[derive(Debug)]
pub struct Twin(Captive);

impl Twin {
    /// Its pid: what is to be read of the original's memory can be read from this process instead.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid(self.0.tid.0)
    }

    /// Gives the memory at `[start, end)` back. The original then no longer has to copy what it writes there.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn unmap(&mut self, start: u64, end: u64) -> Result<(), RemoteError> {
        self.0.call("munmap", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0]).map(drop)
    }

    /// Maps `[start, end)`, which a fork has not carried over, as anonymous memory to be written to.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn map(&mut self, start: u64, end: u64) -> Result<(), RemoteError> {
        let prot = (libc::PROT_READ | libc::PROT_WRITE).unsigned_abs();
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).unsigned_abs();
        let args = [start, end - start, prot.into(), flags.into(), !0, 0];
        self.0.call("mmap", libc::SYS_mmap, args).map(drop)
    }
}

/// A process that we were handed at birth.
#[derive(Debug)]
struct Captive {
    tid: Tid,
    regs: Regs,
}

impl Captive {
    /// Waits until `tid`, made by a task of ours, has stopped for the first time.
    ///
    /// Its stop may have been told already, to someone who waited for its maker. So it is the kernel's
    /// refusal of requests (ESRCH: not stopped) that is waited out.
    fn adopt(tid: Tid, syscall: RemoteAddr) -> Result<Self, RemoteError> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        loop {
            match ptrace::set_options(tid, options.unsigned_abs()) {
                Ok(()) => break,
                Err(error) if error.vanished() => match ptrace::wait(tid, true) {
                    Ok(Some(Stop::Exited(_) | Stop::Killed(_))) => return Err(RemoteError::Died(tid)),
                    Err(error) if error.errno == Errno::ECHILD => return Err(RemoteError::Died(tid)),
                    Err(error) => return Err(error.into()),
                    Ok(_) => std::thread::yield_now(),
                },
                Err(error) => return Err(error.into()),
            }
        }
        let mut captive = Self { tid, regs: ptrace::regs(tid)? };
        captive.regs.rip = syscall.0;
        captive.regs.orig_rax = !0;
        Ok(captive)
    }

    fn call(&mut self, name: &str, nr: i64, args: [u64; 6]) -> Result<u64, RemoteError> {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let regs = Regs { rax: nr.cast_unsigned(), rdi, rsi, rdx, r10, r8, r9, ..self.regs };
        ptrace::set_regs(self.tid, regs)?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::resume(self.tid, 0, true)?;
            match ptrace::wait(self.tid, false)? {
                Some(Stop::Syscall) => stops += 1,
                Some(Stop::Exited(_) | Stop::Killed(_)) => return Err(RemoteError::Died(self.tid)),
                // Signals are not for it.
                _ => {}
            }
        }
        match ptrace::regs(self.tid)?.rax.cast_signed() {
            ret @ -4095..=-1 => {
                let errno = Errno::from_raw(i32::try_from(-ret).unwrap_or(libc::EINVAL));
                Err(RemoteError::Call { tid: self.tid, name: name.to_owned(), errno })
            }
            ret => Ok(ret.cast_unsigned()),
        }
    }
}

impl Drop for Captive {
    fn drop(&mut self) {
        // Where that fails, it is killed when this process ends (PTRACE_O_EXITKILL): nobody waits for it.
        if ptrace::kill(self.tid).is_err() {
            return;
        }
        // As its tracer: its parent is told afterwards, if it has one.
        while let Ok(Some(stop)) = ptrace::wait(self.tid, false) {
            if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                break;
            }
        }
    }
}

impl Frozen {
    /// Makes a twin of every process that is not a zombie, in the order of [`Self::processes`], unless `unfit` says why it
    /// can't have one.
    ///
    /// # Errors
    /// Per process; see [`NoTwin`]. Then the process is as it was.
    pub fn twins(&mut self, unfit: impl Fn(Pid) -> Option<String>) -> Vec<(Pid, Result<Twin, NoTwin>)> {
        let mut adopters = HashSet::new();
        let mut twins = Vec::new();
        for process in self.processes.clone().into_iter().filter(|p| !p.zombie) {
            let adopted = adopters.contains(&process.parent());
            if adopted {
                adopters.insert(process.pid);
            }
            let twin = match unfit(process.pid) {
                Some(why) => Err(NoTwin::Unfit(why)),
                None => self.twin(process.pid, adopted, &mut adopters),
            };
            twins.push((process.pid, twin));
        }
        twins
    }

    fn twin(&mut self, pid: Pid, adopted: bool, adopters: &mut HashSet<Pid>) -> Result<Twin, NoTwin> {
        let unfit = |why: &str| Err(NoTwin::Unfit(why.to_owned()));
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        if namespace(&pid.to_string()) != namespace("self") {
            return unfit("it is in another pid namespace");
        }
        let mut borrowed = self.borrow(pid, pid.leader())?;
        let adopts = pid.0 == 1 || borrowed.is_subreaper()?;
        if adopts {
            adopters.insert(pid);
        }
        let twin = match (adopted || adopts, borrowed.filtered()) {
            (true, _) => unfit("it or an ancestor of it in the tree adopts orphans (PR_SET_CHILD_SUBREAPER)"),
            (_, true) => unfit("its system calls are filtered (seccomp)"),
            _ => borrowed.fork(),
        };
        let differs = borrowed.differs()?;
        borrowed.finish()?;
        let twin = twin?;
        for (at, len) in differs {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            memory::read_exact(pid, at, &mut bytes).map_err(RemoteError::from)?;
            memory::write_all(twin.pid(), at, &bytes).map_err(RemoteError::from)?;
        }
        Ok(twin)
    }
}

impl Borrowed<'_> {
    fn is_subreaper(&mut self) -> Result<bool, RemoteError> {
        let args = [libc::PR_GET_CHILD_SUBREAPER.into(), Arg::Out(4), 0.into(), 0.into(), 0.into()];
        let done = crate::run_one(self, Call::new("prctl(PR_GET_CHILD_SUBREAPER)", libc::SYS_prctl, args))?;
        Ok(done.out.first().is_some_and(|bytes| bytes.iter().any(|&b| b != 0)))
    }

    /// Where a copy of this process's memory is not what the process has once it is given back: address and length.
    fn differs(&self) -> Result<Vec<(RemoteAddr, u64)>, RemoteError> {
        let rseq = ptrace::rseq(self.tid())?;
        let mut differs = vec![self.dead_stack()];
        if rseq.abi_pointer != 0 {
            differs.push((RemoteAddr(rseq.abi_pointer), rseq.abi_size.into()));
        }
        Ok(differs)
    }

    /// Makes the twin; see the module's text.
    fn fork(&mut self) -> Result<Twin, NoTwin> {
        let pid = Pid(self.tid().0);
        let wait = [NOBODY.into(), 0.into(), libc::__WALL.into(), 0.into()];
        self.guard(vec![Call::new("wait4", libc::SYS_wait4, wait).may_fail()])?;
        let pid_slot = self.guarded_argument();
        let exit = self.calling(libc::SYS_exit_group.cast_unsigned(), [0; 6], self.way_home());
        let (room, len) = self.scratch();
        let stack = room.0.next_multiple_of(16);
        let args_at = stack + FRAME;
        if args_at + 128 > room.0 + len {
            self.unguard()?;
            return Err(NoTwin::Unfit("its stack has too little unused space".to_owned()));
        }
        let frame = self.frame(&exit);
        let flags = |bits: i32| u64::from(bits.unsigned_abs());
        let args = CloneArgs {
            flags: flags(libc::CLONE_FILES | libc::CLONE_PTRACE | libc::CLONE_PARENT_SETTID),
            parent_tid: pid_slot.0,
            // The kernel puts the stack pointer at the end of this.
            stack: stack - 64,
            stack_size: 64,
            ..CloneArgs::default()
        };
        let size = args.bytes().len() as u64;
        memory::write_all(pid, RemoteAddr(stack), &frame).map_err(RemoteError::from)?;
        memory::write_all(pid, RemoteAddr(args_at), &args.bytes()).map_err(RemoteError::from)?;
        let call = Call::new("clone3", libc::SYS_clone3, [Arg::Val(args_at), Arg::Val(size)]).may_fail();
        let twin = match crate::run_one(self, call)?.result() {
            Err(errno) => Err(NoTwin::Unfit(format!("it can't fork: {errno}"))),
            Ok(child) => {
                let child = i32::try_from(child).unwrap_or(NOBODY);
                self.set_guarded_argument(child);
                self.beyond(Tid(child), args_at)
            }
        };
        // `between` is dead by now; this takes away what is left of it.
        self.unguard()?;
        twin
    }

    /// From `between` to the twin.
    fn beyond(&self, tid: Tid, args_at: u64) -> Result<Twin, NoTwin> {
        let mut between = Captive::adopt(tid, self.syscall())?;
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PTRACE;
        let args = CloneArgs { flags: u64::from(flags.unsigned_abs()), ..CloneArgs::default() }.bytes();
        let write = |tid: Tid, bytes: &[u8]| {
            memory::write_all(Pid(tid.0), RemoteAddr(args_at), bytes).map_err(RemoteError::from)
        };
        write(tid, &args)?;
        let made = between.call("clone3", libc::SYS_clone3, [args_at, args.len() as u64, 0, 0, 0, 0]);
        let child = match made {
            Err(RemoteError::Call { errno, .. }) => {
                return Err(NoTwin::Unfit(format!("it can't fork: {errno}")));
            }
            made => Tid(i32::try_from(made?).unwrap_or(NOBODY)),
        };
        let mut twin = Captive::adopt(child, self.syscall())?;
        const UNSHARE: u64 = 2;
        twin.call("close_range", libc::SYS_close_range, [0, u32::MAX.into(), UNSHARE, 0, 0, 0])?;
        drop(between);
        twin.call("setsid", libc::SYS_setsid, [0; 6])?;
        write(child, NAME)?;
        let name = u64::from(libc::PR_SET_NAME.unsigned_abs());
        twin.call("prctl(PR_SET_NAME)", libc::SYS_prctl, [name, args_at, 0, 0, 0, 0])?;
        // If memory gets short, the twin is the one to go. Not permitted: then it is judged like its original.
        let _ = std::fs::write(format!("/proc/{child}/oom_score_adj"), "1000");
        Ok(Twin(twin))
    }
}
