//! Making processes with chosen pids (clone3(2), Linux 5.5), and the *runner*: machine code that a
//! stopped task executes to run a whole table of system calls per stop.
//!
//! The runner uses no stack and no memory but its table, and touches no register that a system call
//! keeps besides these:
//!
//! ```text
//! rbx  next entry of the table         r13  thread group id   } for the tgkill(2)
//! r12  entries left                    r14  thread id         } that ends the run
//! r15  0 while it runs, 1 once it is done
//!
//! entry, 9 words: number | 6 arguments | result | flags
//!        flags: 1 = go on if the call fails
//!               2 = a read(2): repeat it until the whole length has come; the result is what came
//! ```
//!
//! A run ends with a SIGSTOP that the task sends to itself and its tracer swallows. A breakpoint
//! would be the obvious end, but the kernel forces SIGTRAP: where it is ignored or blocked, it resets
//! the handler and the mask, and these are what is being restored. SIGSTOP can be neither ignored
//! nor blocked, and a stop swallowed by the tracer changes nothing (but for a pending SIGCONT, which
//! is therefore queued after the last run).

use std::{
    arch::global_asm,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use nix::errno::Errno;

use crate::{Pid, RemoteAddr, SysError};

global_asm!(
    ".pushsection .rodata.ckpt_runner,\"a\",@progbits",
    ".globl ckpt_runner_start, ckpt_runner_syscall, ckpt_runner_end",
    ".hidden ckpt_runner_start, ckpt_runner_syscall, ckpt_runner_end",
    "ckpt_runner_start:",
    "2: test r12, r12",
    "   jz 9f",
    "3: mov rax, [rbx]",
    "   mov rdi, [rbx + 8]",
    "   mov rsi, [rbx + 16]",
    "   mov rdx, [rbx + 24]",
    "   mov r10, [rbx + 32]",
    "   mov r8,  [rbx + 40]",
    "   mov r9,  [rbx + 48]",
    "ckpt_runner_syscall:",
    "   syscall",
    "   cmp rax, -4095",
    "   jae 6f",
    "   test qword ptr [rbx + 64], 2",
    "   jz 4f",
    // A partial read: go on behind what has come. At the end of the input (0) the run ends here.
    "   test rax, rax",
    "   jz 9f",
    "   add [rbx + 56], rax",
    "   add [rbx + 16], rax",
    "   sub [rbx + 24], rax",
    "   jnz 3b",
    "   jmp 5f",
    "4: mov [rbx + 56], rax",
    "5: add rbx, 72",
    "   dec r12",
    "   jmp 2b",
    "6: mov [rbx + 56], rax",
    "   test qword ptr [rbx + 64], 1",
    "   jnz 5b",
    "9: mov r15d, 1",
    "   mov eax, 234", // tgkill
    "   mov edi, r13d",
    "   mov esi, r14d",
    "   mov edx, 19", // SIGSTOP
    "   syscall",
    "   jmp 9b",
    "ckpt_runner_end:",
    ".popsection",
);

unsafe extern "C" {
    static ckpt_runner_start: u8;
    static ckpt_runner_syscall: u8;
    static ckpt_runner_end: u8;
}

/// Words in a table entry of the runner.
pub const ENTRY_WORDS: usize = 9;
/// Entry flag: a failing call does not end the run.
pub const MAY_FAIL: u64 = 1;
/// Entry flag: a read(2) that is repeated until its whole length has come.
pub const UNTIL_FULL: u64 = 2;

fn runner_code() -> &'static [u8] {
    let start = &raw const ckpt_runner_start;
    let end = &raw const ckpt_runner_end;
    // SAFETY: both symbols bound one run of bytes in .rodata, defined above.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Where the runner's `syscall` instruction is, bytes from its start.
#[must_use]
pub fn runner_syscall_offset() -> u64 {
    ((&raw const ckpt_runner_syscall) as usize - (&raw const ckpt_runner_start) as usize) as u64
}

/// Maps the runner at `addr`: one page of code, then `data_len` bytes (whole pages) for its table.
/// It stays mapped for good, to be inherited by fork.
///
/// # Errors
/// EEXIST if something lies there already.
pub fn map_runner(addr: RemoteAddr, data_len: usize) -> Result<(), SysError> {
    const PAGE: usize = 4096;
    let failed = |call, errno| Err(SysError::new(call, format!("address {addr:#x}"), errno));
    let at = addr.0 as usize as *mut libc::c_void;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: FIXED_NOREPLACE maps only where nothing is, so no memory of ours changes.
    let got = unsafe { libc::mmap(at, PAGE + data_len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if got == libc::MAP_FAILED {
        return failed("mmap", Errno::last());
    }
    if got != at {
        return failed("mmap", Errno::EEXIST);
    }
    let code = runner_code();
    // SAFETY: the page was mapped just now, is writable, and the code is shorter than it.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at.cast(), code.len()) };
    // SAFETY: the page is ours and nothing refers to it.
    if unsafe { libc::mprotect(at, PAGE, libc::PROT_READ | libc::PROT_EXEC) } == -1 {
        return failed("mprotect", Errno::last());
    }
    Ok(())
}

/// `struct clone_args`, as far as Linux 5.7 has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where the pidfd goes (`CLONE_PIDFD`).
    pub pidfd: u64,
    /// `CLONE_CHILD_*TID`.
    pub child_tid: u64,
    /// `CLONE_PARENT_SETTID`.
    pub parent_tid: u64,
    /// Signal to the parent when the child ends.
    pub exit_signal: u64,
    /// Lowest address of the stack; 0 keeps the parent's stack pointer.
    pub stack: u64,
    /// Its length.
    pub stack_size: u64,
    /// Thread-local storage (`CLONE_SETTLS`).
    pub tls: u64,
    /// Address of an array of pids, innermost pid namespace first.
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
    /// `CLONE_INTO_CGROUP`.
    pub cgroup: u64,
}

impl CloneArgs {
    /// As the kernel reads it.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
    }
}

/// Makes a child with pid `pid`: a copy of the calling process that waits in pause(2) to be seized. It dies with its parent.
/// The caller has one thread and all signals blocked.
///
/// # Errors
/// EEXIST if the pid is taken, EPERM without CAP_CHECKPOINT_RESTORE, ENOSYS before Linux 5.5.
pub fn spawn_waiting(pid: Pid) -> Result<(), SysError> {
    spawn_after(pid, || Ok(()))
}

/// The same, but nothing is open in it other than the descriptors `keep`: it holds these files while it lives.
///
/// # Errors
/// As [`spawn_waiting`].
pub fn spawn_keeper(pid: Pid, keep: &[RawFd]) -> Result<(), SysError> {
    spawn_after(pid, || crate::file::close_all_but(keep))
}

/// The child does `first`, and ends if that fails.
fn spawn_after(pid: Pid, first: impl FnOnce() -> Result<(), SysError>) -> Result<(), SysError> {
    let set_tid = pid.0;
    let args = CloneArgs {
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        set_tid: (&raw const set_tid) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let parent = std::process::id().cast_signed();
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of everything, of a process that has one
    // thread, so `first` finds every lock as it was left; then it runs nothing but the system calls below. `args` and `set_tid` outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match ret {
        -1 => Err(SysError::last("clone3", format!("pid {pid}"))),
        0 => {
            // SAFETY: takes integers only.
            unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
            if first().is_err() {
                end(1);
            }
            loop {
                // SAFETY: takes nothing.
                let now = unsafe { libc::syscall(libc::SYS_getppid) };
                if now != i64::from(parent) {
                    // SAFETY: ends this copy at once; there is nothing to clean up in it.
                    unsafe { libc::syscall(libc::SYS_exit_group, 1) };
                }
                // SAFETY: takes nothing. All signals are blocked, so only the tracer ends the wait.
                unsafe { libc::syscall(libc::SYS_pause) };
            }
        }
        _ => Ok(()),
    }
}

/// A pidfd, or one of a thread, of a process that has ended and been waited for.
///
/// # Errors
/// EAGAIN, ENOMEM; EINVAL for a thread before Linux 6.9.
pub fn pidfd_of_the_dead(thread: bool) -> Result<OwnedFd, SysError> {
    // No signal tells of its end.
    let args = CloneArgs::default();
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of everything, and ends at once.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    let pid = match i32::try_from(pid) {
        Ok(0) => {
            // SAFETY: ends this copy; there is nothing to clean up in it.
            unsafe { libc::_exit(0) }
        }
        Ok(pid) if pid > 0 => Pid(pid),
        _ => return Err(SysError::last("clone3", "this process")),
    };
    let opened = if thread { crate::pidfd::open_thread(pid.leader()) } else { crate::pidfd::open(pid) };
    // SAFETY: a null pointer is allowed where the status is not wanted.
    while unsafe { libc::waitpid(pid.0, std::ptr::null_mut(), libc::__WALL) } < 0
        && nix::errno::Errno::last() == nix::errno::Errno::EINTR
    {}
    opened
}

/// Splits this process in two, as fork(2). `None` in the child. The caller has one thread.
///
/// # Errors
/// EAGAIN, ENOMEM.
pub fn fork() -> Result<Option<Pid>, SysError> {
    // SAFETY: the process has one thread, so the child finds every lock as it was left.
    match unsafe { libc::fork() } {
        -1 => Err(SysError::last("fork", "this process")),
        0 => Ok(None),
        pid => Ok(Some(Pid(pid))),
    }
}

/// The same, but both have one table of descriptors: what one opens the other has open, and it stays open until both
/// have closed it or ended. `None` in the child. The caller has one thread.
///
/// # Errors
/// EAGAIN, ENOMEM.
pub fn fork_with_shared_files() -> Result<Option<Pid>, SysError> {
    let flags = i64::from(libc::CLONE_FILES | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of all memory, on the same stack. The
    // process has one thread, so the child finds every lock as it was left.
    match unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) } {
        -1 => Err(SysError::last("clone(CLONE_FILES)", "this process")),
        0 => Ok(None),
        pid => Ok(i32::try_from(pid).ok().map(Pid)),
    }
}

/// Ends a forked child at once: nothing that is the parent's too is dropped, flushed or undone.
pub fn end(code: i32) -> ! {
    // SAFETY: no pointers.
    unsafe { libc::_exit(code) }
}

/// What the child of [`see_through`] does.
pub struct Steps<P, C, W, U> {
    /// Before the commitment.
    pub prepare: P,
    /// Whether it was made, asked when nothing is left of a process that could not tell any more.
    pub committed: C,
    /// After it; told whether the parent is there.
    pub work: W,
    /// Instead, if there was none: to be right even after half of `prepare`.
    pub undo: U,
}

/// Runs `commit` here, between two steps in a child, which comes to its end even if this process is killed meanwhile.
///
/// The child has all that this process has, descriptors included, but is out of its process group. The caller has one thread.
///
/// # Errors
/// `commit`'s, then there is no `work`; what `prepare` or `work` says is wrong; that there can be no child.
pub fn see_through<E, T>(
    steps: Steps<
        impl FnOnce() -> Result<T, String>,
        impl FnOnce() -> bool,
        impl FnOnce(T, bool) -> Result<(), String>,
        impl FnOnce(),
    >,
    commit: impl FnOnce() -> Result<(), E>,
) -> Result<(), E>
where
    E: From<SysError> + From<String>,
{
    use nix::{errno::Errno, fcntl::OFlag, poll, unistd};
    use std::{
        fs::File,
        io::{Read, Write},
        os::fd::AsFd,
    };
    /// Begins no text.
    const READY: u8 = b'\n';
    let failed = |errno| SysError::new("pipe2", "this process", errno);
    let (from_child, to_parent) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    let (from_parent, to_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    let parent = crate::pidfd::open(Pid(std::process::id().cast_signed()))?;
    let Some(child) = fork()? else {
        let _ = unistd::setsid();
        drop(to_child);
        let mut to_parent = File::from(to_parent);
        let said = match (steps.prepare)() {
            Err(said) => {
                (steps.undo)();
                said
            }
            Ok(prepared) => {
                let _ = to_parent.write_all(&[READY]);
                let mut word = [0];
                let heard = matches!(File::from(from_parent).read(&mut word), Ok(1));
                let wanted = if heard {
                    word == [1]
                } else {
                    let mut end = [poll::PollFd::new(parent.as_fd(), poll::PollFlags::POLLIN)];
                    while poll::poll(&mut end, poll::PollTimeout::NONE) == Err(Errno::EINTR) {}
                    (steps.committed)()
                };
                if wanted {
                    (steps.work)(prepared, heard).err().unwrap_or_else(|| "done".to_owned())
                } else {
                    (steps.undo)();
                    String::new()
                }
            }
        };
        // If nobody listens any more, it was done for those that are left.
        let _ = to_parent.write_all(said.as_bytes());
        // SAFETY: no pointers. Nothing is unwound, so nothing of the parent's is undone.
        unsafe { libc::_exit(0) }
    };
    drop(to_parent);
    let mut from_child = File::from(from_child);
    let mut first = [0];
    let ready = matches!(from_child.read(&mut first), Ok(1)) && first == [READY];
    let committed = if ready { commit() } else { Ok(()) };
    let told = File::from(to_child).write_all(&[u8::from(ready && committed.is_ok())]);
    let mut said = String::new();
    let heard = from_child.read_to_string(&mut said);
    while nix::sys::wait::waitpid(child.nix(), None) == Err(Errno::EINTR) {}
    committed?;
    if !ready {
        let first = if first == [0] { "" } else { std::str::from_utf8(&first).unwrap_or_default() };
        return Err(format!("{first}{said}").into());
    }
    match told.and(heard) {
        Ok(_) if said == "done" => Ok(()),
        Ok(_) if !said.is_empty() => Err(said.into()),
        _ => Err("the child that does this was killed".to_owned().into()),
    }
}

/// Takes over the descriptor `fd`, which was handed to this process by number on its command line.
///
/// # Errors
/// EBADF if there is none.
pub fn adopt_fd(fd: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: F_DUPFD_CLOEXEC takes integers only.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(SysError::last("fcntl(F_DUPFD_CLOEXEC)", format!("fd {fd}")));
    }
    // SAFETY: made just now, nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
