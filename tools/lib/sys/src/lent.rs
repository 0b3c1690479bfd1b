//! Options of somebody else's sockets that are changed for a while, and put back whatever happens.
//!
//! This process may be killed between the two. So a second one, the guardian, made at the first use, waits
//! for this one's end (a pidfd) and puts back what is noted in a page of memory that both share. It
//! shares the descriptor table too (CLONE_FILES), which has two consequences: the sockets are still open
//! to it when this process is gone, and so are all other descriptors: whoever waits for one of them to
//! be closed, like the holder of a frozen tree, learns of the death only when all options are as they were.
//!
//! A child for each change, with a table of its own, would be simpler, and costs a copy of the table each
//! time: with 20,000 sockets open that was most of a dump.

use std::{
    cell::RefCell,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::NonNull,
    sync::atomic::{AtomicI32, Ordering},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{SigSet, SigmaskHow},
};

use crate::{
    Pid, SysError,
    clone::CloneArgs,
    pidfd,
    sock::{option, set_option},
};

/// Options that one thread can have changed at the same time.
const SLOTS: usize = 16;

/// An option to be put back.
#[derive(Debug)]
struct Slot {
    /// The socket, or -1: nothing to do. Written last when taken, first when given back.
    fd: AtomicI32,
    level: AtomicI32,
    name: AtomicI32,
    before: AtomicI32,
}

/// The page that both processes share.
#[derive(Debug)]
struct Shared(NonNull<[Slot; SLOTS]>);

impl Shared {
    fn new() -> Result<Self, SysError> {
        const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
        const FLAGS: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let size = size_of::<[Slot; SLOTS]>();
        // SAFETY: a new mapping of anonymous memory touches nothing that exists.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, READ_WRITE, FLAGS, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(SysError::last("mmap", "a page shared with the guardian"));
        }
        let page = NonNull::new(at.cast::<[Slot; SLOTS]>());
        let shared = Self(page.ok_or_else(|| SysError::new("mmap", "a shared page", Errno::ENOMEM))?);
        for slot in shared.slots() {
            slot.fd.store(-1, Ordering::SeqCst);
        }
        Ok(shared)
    }

    fn slots(&self) -> &[Slot; SLOTS] {
        // SAFETY: the mapping is aligned to pages, at least as large, and lives as long as `self`; atomics
        // may be changed by the other process, and all zeroes, as it begins, are valid ones.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this size, and `slots` lends it no longer than `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<[Slot; SLOTS]>()) };
    }
}

/// The process that puts back what this one does not.
#[derive(Debug)]
struct Guardian {
    /// Who made it; a fork of that has none.
    of: u32,
    pid: libc::pid_t,
    handle: OwnedFd,
    shared: Shared,
    /// What the guardian waits for, through the shared table: it is not closed before that has ended.
    _end: OwnedFd,
}

thread_local! {
    static GUARDIAN: RefCell<Option<Guardian>> = const { RefCell::new(None) };
}

impl Guardian {
    fn start() -> Result<Self, SysError> {
        let on = "the guardian of lent options";
        let shared = Shared::new()?;
        let own = std::process::id();
        let end = pidfd::open(Pid(own.cast_signed()))?;
        let mut handle: RawFd = -1;
        // No exit signal: the guardian is none of the children that somebody waits for.
        let args = CloneArgs {
            flags: (libc::CLONE_FILES | libc::CLONE_PIDFD).cast_unsigned().into(),
            pidfd: (&raw mut handle) as u64,
            ..CloneArgs::default()
        };
        // No signal but SIGKILL ends the child; the mask is set before there is one.
        let mask = SigSet::all()
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .map_err(|errno| SysError::new("sigprocmask", "this thread", errno))?;
        // SAFETY: without CLONE_VM the child has its own copy of all memory, makes system calls only and never
        // returns, so locks that other threads hold are in nobody's way. `args` outlives the call.
        let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        if ret == 0 {
            guard(end.as_fd(), &shared);
        }
        let result =
            i32::try_from(ret).ok().filter(|&pid| pid > 0).ok_or_else(|| SysError::last("clone3", on));
        let _ = mask.thread_set_mask();
        let pid = result?;
        // SAFETY: CLONE_PIDFD has made this descriptor for us and nobody else knows its number.
        let handle = unsafe { OwnedFd::from_raw_fd(handle) };
        Ok(Self { of: own, pid, handle, shared, _end: end })
    }

    /// Whether it is ours, and has not been killed.
    fn is_there(&self) -> bool {
        let mut ended = [PollFd::new(self.handle.as_fd(), PollFlags::POLLIN)];
        self.of == std::process::id() && poll(&mut ended, PollTimeout::ZERO) == Ok(0)
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if self.of != std::process::id() {
            return;
        }
        if pidfd::send_signal(self.handle.as_fd(), libc::SIGKILL).is_err() {
            // It would be waited for in vain. It ends with this process.
            return;
        }
        // SAFETY: no status is asked for; __WALL also waits for children without an exit signal.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) };
    }
}

/// The guardian's life.
fn guard(end: BorrowedFd<'_>, shared: &Shared) -> ! {
    // Out of the process group, which may be killed as a whole.
    let _ = nix::unistd::setsid();
    loop {
        let mut ended = [PollFd::new(end, PollFlags::POLLIN)];
        match poll(&mut ended, PollTimeout::NONE) {
            Ok(n) if n > 0 => break,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    // What was changed last is put back first.
    for slot in shared.slots().iter().rev() {
        let fd = slot.fd.load(Ordering::SeqCst);
        if fd >= 0 {
            // SAFETY: the number is open in the table that was shared with the dead, who can't close it any more.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = set_option(
                fd,
                slot.level.load(Ordering::SeqCst),
                slot.name.load(Ordering::SeqCst),
                slot.before.load(Ordering::SeqCst),
            );
        }
    }
    // SAFETY: no pointers.
    unsafe { libc::_exit(0) }
}

/// An option of somebody else's socket that is changed for a while. It is put back when this is dropped, and
/// also if this process is killed.
#[derive(Debug)]
pub struct LentOption<'a> {
    fd: BorrowedFd<'a>,
    level: i32,
    name: i32,
    before: i32,
    slot: usize,
    // The slot is one of this thread's guardian.
    _thread: PhantomData<*const ()>,
}

impl<'a> LentOption<'a> {
    /// Sets an int option of level `SOL_SOCKET`.
    ///
    /// # Errors
    /// Those of getsockopt(2), setsockopt(2) and clone(2), EBUSY when 16 are lent already; then nothing is
    /// changed.
    pub fn set(fd: BorrowedFd<'a>, name: i32, value: i32) -> Result<Self, SysError> {
        let before = option(fd, libc::SOL_SOCKET, name)?;
        Self::change(fd, libc::SOL_SOCKET, name, value, before)
    }

    /// Sets an int option of any level, to be put back by setting it to `before`. What is changed later is put back
    /// earlier, if it is dropped in this order.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn change(
        fd: BorrowedFd<'a>,
        level: i32,
        name: i32,
        value: i32,
        before: i32,
    ) -> Result<Self, SysError> {
        let slot = GUARDIAN.with_borrow_mut(|guardian| {
            if !guardian.as_ref().is_some_and(Guardian::is_there) {
                *guardian = Some(Guardian::start()?);
            }
            let slots = guardian.as_ref().map(|guardian| guardian.shared.slots().iter().enumerate());
            let free = slots.into_iter().flatten().find(|(_, slot)| slot.fd.load(Ordering::SeqCst) < 0);
            let (index, slot) =
                free.ok_or_else(|| SysError::new("lend", "too many options", Errno::EBUSY))?;
            slot.level.store(level, Ordering::SeqCst);
            slot.name.store(name, Ordering::SeqCst);
            slot.before.store(before, Ordering::SeqCst);
            slot.fd.store(fd.as_raw_fd(), Ordering::SeqCst);
            Ok(index)
        })?;
        let lent = Self { fd, level, name, before, slot, _thread: PhantomData };
        set_option(fd, level, name, value)?;
        Ok(lent)
    }
}

impl Drop for LentOption<'_> {
    fn drop(&mut self) {
        let _ = set_option(self.fd, self.level, self.name, self.before);
        GUARDIAN.with_borrow(|guardian| {
            let slot = guardian.as_ref().and_then(|guardian| guardian.shared.slots().get(self.slot));
            if let Some(slot) = slot {
                slot.fd.store(-1, Ordering::SeqCst);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn offset(fd: &OwnedFd) -> i32 {
        option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap()
    }

    #[test]
    fn lent_option_is_put_back() {
        let (a, b) = pair();
        let before = offset(&b);
        for message in [b"one", b"two"] {
            nix::unistd::write(&a, message).unwrap();
        }
        let lent = LentOption::set(b.as_fd(), libc::SO_PEEK_OFF, 0).unwrap();
        let mut buffer = [0; 16];
        for message in [b"one", b"two"] {
            let len = recv(b.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK).unwrap();
            assert_eq!(&buffer[..len], message);
        }
        assert_eq!(offset(&b), 6);
        drop(lent);
        assert_eq!(offset(&b), before);
    }

    #[test]
    fn several_are_lent_and_a_dead_guardian_is_replaced() {
        let pairs: Vec<_> = (0..SLOTS + 1).map(|_| pair()).collect();
        let lend = |n: usize| LentOption::set(pairs[n].1.as_fd(), libc::SO_PEEK_OFF, 5);
        {
            let lent: Vec<_> = (0..SLOTS).map(|n| lend(n).unwrap()).collect();
            assert_eq!(lend(SLOTS).unwrap_err().errno, Errno::EBUSY);
            assert_eq!((lent.len(), offset(&pairs[3].1), offset(&pairs[SLOTS].1)), (SLOTS, 5, -1));
        }
        let guardian = |g: &RefCell<Option<Guardian>>| g.borrow().as_ref().unwrap().pid;
        let first = GUARDIAN.with(guardian);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::SIGKILL).unwrap();
        while GUARDIAN.with_borrow(|g| g.as_ref().is_some_and(Guardian::is_there)) {}
        drop(lend(0).unwrap());
        assert_ne!(GUARDIAN.with(guardian), first);
        assert!(pairs.iter().all(|(_, b)| offset(b) == -1));
    }

    #[test]
    fn lent_option_is_put_back_by_the_dead() {
        let (_a, b) = pair();
        let before = offset(&b);
        let (told, tell) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child makes system calls only, and ends without running anything of ours.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let lent = LentOption::set(b.as_fd(), libc::SO_PEEK_OFF, 77);
            let _ = nix::unistd::write(&tell, &[u8::from(lent.is_ok())]);
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
        let mut ok = [0];
        nix::unistd::read(&told, &mut ok).unwrap();
        assert_eq!((ok, offset(&b)), ([1], 77));
        drop(tell);
        let child = nix::unistd::Pid::from_raw(child);
        nix::sys::signal::kill(child, nix::sys::signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(child, None).unwrap();
        // The guardian has the pipe too, and closes it when it is done.
        assert_eq!(nix::unistd::read(&told, &mut ok).unwrap(), 0);
        assert_eq!(offset(&b), before);
    }
}
