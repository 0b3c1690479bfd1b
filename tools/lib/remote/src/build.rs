//! Running system calls in a task that is being built.
//!
//! On restore nothing of the task is worth keeping until its image is in place, so there is nothing
//! to borrow and give back (see `borrow` for that): the restoring process maps a *runner* (see
//! [`ckpt_sys::clone`]) at an address that is free in itself and in every task to come, and all of
//! them inherit it by fork.
//!
//! ```text
//! base            base + 4096
//! | runner's code | slot 0 | slot 1 | ...
//!
//! slot = | pid for clone3, scratch | table of calls | bytes for pointer arguments ... |
//! ```
//!
//! Threads share the area with their process. Those of the restored process all use slot 0, one at
//! a time; the other slots are for helpers that read pages beside it ([`Built::helper`]).
//! The area is unmapped by its own last system call: under PTRACE_SYSCALL the task stops at the
//! call's exit, before it would fetch another instruction, and there it gets its final registers.

use std::os::fd::AsFd;

use ckpt_sys::{
    Pid, RemoteAddr, SysError, TargetFd, Tid,
    clone::{CloneArgs, ENTRY_WORDS, MAY_FAIL, UNTIL_FULL, runner_syscall_offset},
    memory, pidfd,
    ptrace::{self, Regs, Stop},
};
use nix::errno::Errno;

use crate::{Arg, Call, Done, RemoteError, Syscalls};

const PAGE: u64 = 4096;
/// Room that runs don't touch, at the start of the data part: the pid list of clone3, and scratch
/// memory for structures that hold pointers themselves.
const WORDS: u64 = 4096;
/// Where in it the scratch memory begins.
const SCRATCH: u64 = 64;
const ENTRY: usize = ENTRY_WORDS * 8;

/// Where the runner is: the same place in all tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    base: RemoteAddr,
}

impl Area {
    /// Bytes of the whole area.
    pub const LEN: u64 = PAGE + Self::SLOT * (1 + Self::HELPERS as u64);
    /// How many helpers a process can have.
    pub const HELPERS: usize = 3;
    const SLOT: u64 = 256 << 10;

    /// Maps the runner into this process, for its children to inherit.
    ///
    /// # Errors
    /// EEXIST if something lies there.
    pub fn map(base: RemoteAddr) -> Result<Self, SysError> {
        let data = usize::try_from(Self::LEN - PAGE).expect("addresses are 64 bits wide");
        ckpt_sys::clone::map_runner(base, data)?;
        Ok(Self { base })
    }

    /// First address.
    #[must_use]
    pub fn base(self) -> RemoteAddr {
        self.base
    }
}

/// A read from a descriptor of the task into its memory, until `len` bytes have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// First address.
    pub addr: RemoteAddr,
    /// Bytes.
    pub len: u64,
}

/// Bytes of calls that one run can take.
const ROOM: usize = (Area::SLOT - WORDS) as usize;

/// What a process has in common with its parent, beside what threads have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shares {
    /// The table of descriptors (CLONE_FILES).
    pub files: bool,
    /// Working directory, root and umask (CLONE_FS).
    pub fs: bool,
}

/// A task being built: traced, stopped, all signals blocked.
#[derive(Debug)]
pub struct Built {
    pid: Pid,
    tid: Tid,
    area: Area,
    slot: u64,
    regs: Regs,
}

/// Calls that a task is busy with.
#[derive(Debug)]
#[must_use = "the task runs until `finish_run` has waited for it"]
pub struct Started {
    table: Table,
    count: usize,
}

impl Started {
    /// How many calls they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

/// A table of calls as it lies in the task.
#[derive(Debug)]
struct Table {
    bytes: Vec<u8>,
    /// For each call: place and length of its `Out` and `InOut` arguments in `bytes`.
    outs: Vec<Vec<(usize, usize)>>,
}

impl Table {
    fn word(&self, entry: usize, word: usize) -> u64 {
        let at = entry * ENTRY + word * 8;
        self.bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
    }
}

fn align(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Bytes that a call needs in the area.
fn need(call: &Call) -> usize {
    let args: usize = call
        .args
        .iter()
        .map(|arg| match arg {
            Arg::Val(_) => 0,
            Arg::In(bytes) | Arg::InOut(bytes) => align(bytes.len()),
            Arg::Out(len) => align(*len),
        })
        .sum();
    ENTRY + args
}

impl Built {
    /// Waits for the first stop of `tid`, a thread of process `pid`, which was just made by a task of
    /// the same tracer (or has just been seized and interrupted); blocks all its signals.
    ///
    /// # Errors
    /// It died.
    pub fn adopt(pid: Pid, tid: Tid, area: Area) -> Result<Self, RemoteError> {
        loop {
            match ptrace::wait(tid, false)? {
                Some(Stop::Interrupted | Stop::Group(_)) => break,
                Some(Stop::Exited(_) | Stop::Killed(_)) => return Err(RemoteError::Died(tid)),
                Some(_) => ptrace::resume(tid, 0, false)?,
                None => {}
            }
        }
        ptrace::set_sigmask(tid, !0)?;
        let regs = ptrace::regs(tid)?;
        Ok(Self { pid, tid, area, slot: 0, regs })
    }

    fn words(&self) -> RemoteAddr {
        self.area.base.plus(PAGE + self.slot * Area::SLOT)
    }

    fn table(&self) -> RemoteAddr {
        self.words().plus(WORDS)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Puts `bytes` (at most 4032) in memory that stays as it is from run to run; gives their address.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn place(&mut self, bytes: &[u8]) -> Result<RemoteAddr, RemoteError> {
        let at = self.words().plus(SCRATCH);
        if bytes.len() as u64 > WORDS - SCRATCH {
            let what = format!("{} bytes don't fit into the scratch memory", bytes.len());
            return Err(RemoteError::Unusable { tid: self.tid, what });
        }
        memory::write_all(self.pid, at, bytes)?;
        Ok(at)
    }

    fn at_runner(&self, offset: u64) -> Regs {
        let mut regs = self.regs;
        regs.rip = self.area.base.plus(offset).0;
        // Not inside a system call: nothing to restart.
        regs.orig_rax = u64::MAX;
        regs.eflags = 0x202;
        regs
    }

    fn encode(&self, calls: &[Call]) -> Table {
        let mut bytes = vec![0; calls.len() * ENTRY];
        let mut outs = Vec::with_capacity(calls.len());
        for (i, call) in calls.iter().enumerate() {
            let mut words = [0_u64; ENTRY_WORDS];
            let mut places = Vec::new();
            words[0] = call.nr.cast_unsigned();
            for (slot, arg) in words[1..7].iter_mut().zip(&call.args) {
                let at = align(bytes.len());
                let address = self.table().plus(at as u64).0;
                match arg {
                    Arg::Val(n) => *slot = *n,
                    Arg::In(contents) | Arg::InOut(contents) => {
                        bytes.resize(at, 0);
                        bytes.extend_from_slice(contents);
                        if matches!(arg, Arg::InOut(_)) {
                            places.push((at, contents.len()));
                        }
                        *slot = address;
                    }
                    Arg::Out(len) => {
                        bytes.resize(at + len, 0);
                        places.push((at, *len));
                        *slot = address;
                    }
                }
            }
            words[8] = if call.may_fail { MAY_FAIL } else { 0 };
            for (w, word) in words.iter().enumerate() {
                let at = i * ENTRY + w * 8;
                bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
            }
            outs.push(places);
        }
        Table { bytes, outs }
    }

    fn start(&mut self, table: &[u8], entries: usize) -> Result<(), RemoteError> {
        memory::write_all(self.pid, self.table(), table)?;
        let mut regs = self.at_runner(0);
        regs.rbx = self.table().0;
        regs.r12 = entries as u64;
        regs.r13 = u64::from(self.pid.0.unsigned_abs());
        regs.r14 = u64::from(self.tid.0.unsigned_abs());
        regs.r15 = 0;
        ptrace::set_regs(self.tid, regs)?;
        ptrace::resume(self.tid, 0, false)?;
        Ok(())
    }

    /// Waits for the end of a run; gives the number of entries that were not done.
    fn end(&mut self) -> Result<usize, RemoteError> {
        loop {
            match ptrace::wait(self.tid, false)? {
                Some(Stop::Signal(libc::SIGSTOP)) => {
                    let regs = ptrace::regs(self.tid)?;
                    if regs.r15 == 1 {
                        return Ok(usize::try_from(regs.r12).unwrap_or(usize::MAX));
                    }
                    ptrace::resume(self.tid, 0, false)?;
                }
                Some(Stop::Exited(_) | Stop::Killed(_)) => return Err(RemoteError::Died(self.tid)),
                // Signals from outside are not for the half-built task; events tell of its children.
                Some(_) => ptrace::resume(self.tid, 0, false)?,
                None => {}
            }
        }
    }

    /// Starts running `calls`, as many as fit into one run. [`Self::finish_run`] waits for them.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn start_run(&mut self, calls: &[Call]) -> Result<Started, RemoteError> {
        let mut used = 0;
        let fits = |call: &&Call| {
            used += need(call);
            // The first argument may lose up to 15 bytes to the alignment of the table's end.
            used + 16 <= ROOM
        };
        let count = calls.iter().take_while(fits).count();
        if let (0, Some(call)) = (count, calls.first()) {
            let what = format!("{}: {} bytes of arguments don't fit", call.name, need(call));
            return Err(RemoteError::Unusable { tid: self.tid, what });
        }
        let table = self.encode(calls.get(..count).unwrap_or_default());
        self.start(&table.bytes, count)?;
        Ok(Started { table, count })
    }

    /// Waits for the end of a run of `calls` that [`Self::start_run`] started.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn finish_run(&mut self, calls: &[Call], started: Started) -> Result<Vec<Done>, RemoteError> {
        let Started { mut table, count } = started;
        let left = self.end()?;
        memory::read_exact(self.pid, self.table(), &mut table.bytes)?;
        if left > 0
            && let Some(call) = calls.get(count.saturating_sub(left))
        {
            let ret = table.word(count.saturating_sub(left), 7).cast_signed();
            return Err(self.failed(call, ret));
        }
        let answers = table.outs.iter().enumerate().map(|(i, places)| Done {
            ret: table.word(i, 7).cast_signed(),
            out: places
                .iter()
                .map(|&(at, len)| table.bytes.get(at..at + len).unwrap_or_default().to_vec())
                .collect(),
        });
        Ok(answers.collect())
    }

    fn failed(&self, call: &Call, ret: i64) -> RemoteError {
        let errno = Errno::from_raw(i32::try_from(-ret).unwrap_or(libc::EINVAL));
        RemoteError::Call { tid: self.tid, name: call.name.clone(), errno }
    }

    /// Starts reading from the task's descriptor `fd` (at its position) into `fills`, one after the
    /// other, as many as one run takes; gives that number. [`Self::finish_reading`] waits for the end.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn start_reading(&mut self, fd: TargetFd, fills: &[Fill]) -> Result<usize, RemoteError> {
        let count = fills.len().min(ROOM / ENTRY);
        let mut bytes = Vec::with_capacity(count * ENTRY);
        for fill in &fills[..count] {
            let fd = i64::from(fd.0).cast_unsigned();
            let words = [libc::SYS_read.cast_unsigned(), fd, fill.addr.0, fill.len, 0, 0, 0, 0, UNTIL_FULL];
            bytes.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        }
        self.start(&bytes, count)?;
        Ok(count)
    }

    /// Waits for the reads started by [`Self::start_reading`], which gave `count`.
    ///
    /// # Errors
    /// See [`RemoteError`]; an input that ends early is ENODATA.
    pub fn finish_reading(&mut self, count: usize) -> Result<(), RemoteError> {
        let left = self.end()?;
        if left == 0 {
            return Ok(());
        }
        let stopped = count.saturating_sub(left);
        let mut entry = [0; ENTRY];
        memory::read_exact(self.pid, self.table().plus((stopped * ENTRY) as u64), &mut entry)?;
        let word = |w: usize| u64::from_ne_bytes(entry[w * 8..w * 8 + 8].try_into().expect("eight bytes"));
        let ret = word(7).cast_signed();
        let errno = if (-4095..0).contains(&ret) { ret.unsigned_abs() as i32 } else { libc::ENODATA };
        let name = format!("read of {} bytes to {:#x}", word(3), word(2));
        Err(RemoteError::Call { tid: self.tid, name, errno: Errno::from_raw(errno) })
    }

    /// Makes a child process with this pid by clone3 inside the task.
    ///
    /// # Errors
    /// See [`RemoteError`]; EEXIST if the number is taken.
    pub fn clone_process(&mut self, new: Pid, shares: Shares) -> Result<Self, RemoteError> {
        let files = if shares.files { libc::CLONE_FILES } else { 0 };
        let fs = if shares.fs { libc::CLONE_FS } else { 0 };
        self.clone_task(format!("clone3(process {new})"), new, new.leader(), files | fs, libc::SIGCHLD)
    }

    /// Makes a thread of this process with this tid.
    ///
    /// # Errors
    /// See [`RemoteError`]; EEXIST if the number is taken.
    pub fn clone_thread(&mut self, new: Tid) -> Result<Self, RemoteError> {
        let shared = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND;
        let flags = shared | libc::CLONE_THREAD | libc::CLONE_SYSVSEM;
        self.clone_task(format!("clone3(thread {new})"), self.pid, new, flags, 0)
    }

    fn clone_task(
        &mut self,
        name: String,
        pid: Pid,
        new: Tid,
        flags: i32,
        exit_signal: i32,
    ) -> Result<Self, RemoteError> {
        memory::write_all(self.pid, self.words(), &new.0.to_ne_bytes())?;
        let args = CloneArgs {
            flags: u64::from(flags.unsigned_abs()),
            exit_signal: u64::from(exit_signal.unsigned_abs()),
            set_tid: self.words().0,
            set_tid_size: 1,
            ..CloneArgs::default()
        };
        let bytes = args.bytes();
        let len = bytes.len() as u64;
        self.run(&[Call::new(name, libc::SYS_clone3, [Arg::In(bytes), Arg::Val(len)])])?;
        Self::adopt(pid, new, self.area)
    }

    /// Makes a thread that runs calls at the same time as this task, number `index` (below
    /// [`Area::HELPERS`]) of such. End it with [`Self::end_thread`].
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn helper(&mut self, tid: Tid, index: usize) -> Result<Self, RemoteError> {
        let mut helper = self.clone_thread(tid)?;
        helper.slot = 1 + index.min(Area::HELPERS - 1) as u64;
        Ok(helper)
    }

    /// Lets a thread that is not its process's leader end, and waits for that.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn end_thread(mut self) -> Result<(), RemoteError> {
        let table = self.encode(&[Call::new("exit", libc::SYS_exit, [Arg::Val(0)])]);
        self.start(&table.bytes, 1)?;
        self.wait_end_of_life(None)
    }

    /// Runs one call under PTRACE_SYSCALL: without the SIGSTOP that ends a run, and safe for a call
    /// after which the runner is gone. `Out` arguments are not given back.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn step(&mut self, call: &Call) -> Result<i64, RemoteError> {
        let table = self.encode(std::slice::from_ref(call));
        memory::write_all(self.pid, self.table(), &table.bytes)?;
        let mut regs = self.at_runner(runner_syscall_offset());
        regs.rax = table.word(0, 0);
        regs.rdi = table.word(0, 1);
        regs.rsi = table.word(0, 2);
        regs.rdx = table.word(0, 3);
        regs.r10 = table.word(0, 4);
        regs.r8 = table.word(0, 5);
        regs.r9 = table.word(0, 6);
        ptrace::set_regs(self.tid, regs)?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::resume(self.tid, 0, true)?;
            match ptrace::wait(self.tid, false)? {
                Some(Stop::Syscall) => stops += 1,
                Some(Stop::Exited(_) | Stop::Killed(_)) => return Err(RemoteError::Died(self.tid)),
                _ => {}
            }
        }
        let ret = ptrace::regs(self.tid)?.rax.cast_signed();
        if (-4095..0).contains(&ret) && !call.may_fail {
            return Err(self.failed(call, ret));
        }
        Ok(ret)
    }

    /// Unmaps `len` bytes from the runner's first one on. After this the process makes no more calls for us.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn drop_runner(&mut self, len: u64) -> Result<(), RemoteError> {
        let args = [Arg::Val(self.area.base.0), Arg::Val(len)];
        self.step(&Call::new("munmap(runner)", libc::SYS_munmap, args)).map(drop)
    }

    /// Lets the task run the call `exit_group(code)` and waits for its end.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn exit(mut self, code: i32) -> Result<(), RemoteError> {
        let call = Call::new("exit_group", libc::SYS_exit_group, [Arg::from(code)]);
        let table = self.encode(&[call]);
        self.start(&table.bytes, 1)?;
        self.wait_end_of_life(None)
    }

    /// Lets `signal` kill the task and waits for its end.
    ///
    /// # Errors
    /// See [`RemoteError`]; `Unusable` for a signal that kills nobody.
    pub fn die_of(mut self, signal: i32) -> Result<(), RemoteError> {
        const HARMLESS: [i32; 8] = [
            libc::SIGCHLD,
            libc::SIGCONT,
            libc::SIGURG,
            libc::SIGWINCH,
            libc::SIGSTOP,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
        ];
        if HARMLESS.contains(&signal) || !(1..=64).contains(&signal) {
            let what = format!("signal {signal} can't have killed it");
            return Err(RemoteError::Unusable { tid: self.tid, what });
        }
        if signal != libc::SIGKILL {
            let default = Arg::In(vec![0; 32]);
            let args = [Arg::from(signal), default, Arg::Val(0), Arg::Val(8)];
            self.run(&[Call::new(format!("rt_sigaction({signal})"), libc::SYS_rt_sigaction, args)])?;
            ptrace::set_sigmask(self.tid, !(1 << (signal - 1)))?;
        }
        let pidfd = pidfd::open(self.pid)?;
        pidfd::send_signal(pidfd.as_fd(), signal)?;
        if signal != libc::SIGKILL {
            let mut regs = self.at_runner(0);
            regs.r12 = 0;
            ptrace::set_regs(self.tid, regs)?;
            ptrace::resume(self.tid, 0, false)?;
        }
        self.wait_end_of_life(Some(signal))
    }

    fn wait_end_of_life(&mut self, deliver: Option<i32>) -> Result<(), RemoteError> {
        loop {
            match ptrace::wait(self.tid, false)? {
                Some(Stop::Exited(_) | Stop::Killed(_)) => return Ok(()),
                Some(Stop::Signal(signal)) if Some(signal) == deliver => {
                    ptrace::resume(self.tid, signal, false)?
                }
                Some(_) => ptrace::resume(self.tid, 0, false)?,
                None => {}
            }
        }
    }
}

impl Syscalls for Built {
    fn tid(&self) -> Tid {
        self.tid
    }

    fn run(&mut self, calls: &[Call]) -> Result<Vec<Done>, RemoteError> {
        let mut done = Vec::with_capacity(calls.len());
        let mut rest = calls;
        while !rest.is_empty() {
            let started = self.start_run(rest)?;
            let (now, later) = rest.split_at(started.count);
            done.append(&mut self.finish_run(now, started)?);
            rest = later;
        }
        Ok(done)
    }
}
