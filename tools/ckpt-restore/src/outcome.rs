//! Signals of this process: held back while tasks are made, forwarded to the root afterwards.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, bail};
use ckpt_proc::status;
use ckpt_sys::{Pid, pidfd, ptrace};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, SigmaskHow, Signal, pthread_sigmask},
        signalfd::{SfdFlags, SignalFd, siginfo},
    },
    unistd::{Pid as NixPid, getpgid},
};

const FORWARDED: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// While it lives, all signals of this process are blocked, and those that would end it are taken
/// note of. The tasks inherit the blocking, so nothing reaches them before they are complete.
#[derive(Debug)]
pub struct Signals {
    old: SigSet,
    fd: SignalFd,
}

impl Signals {
    /// Blocks them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn hold() -> anyhow::Result<Self> {
        let mut old = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut old))
            .context("sigprocmask")?;
        let mut set: SigSet = FORWARDED.into_iter().collect();
        set.add(Signal::SIGCHLD);
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("signalfd")?;
        Ok(Self { old, fd })
    }

    /// Whether somebody wants this process to end.
    ///
    /// # Errors
    /// Yes, by this signal.
    pub fn check(&self) -> anyhow::Result<()> {
        let text = std::fs::read("/proc/thread-self/status").unwrap_or_default();
        let bits = status::parse(&text).map_or(0, |s| s.pending | s.shared_pending);
        match FORWARDED.into_iter().find(|&signal| bits & (1 << (signal as i32 - 1)) != 0) {
            Some(signal) => {
                // Taken away, so that there is time to undo everything and say so.
                let _ = self.fd.read_signal();
                bail!("interrupted by {signal}; nothing was restored")
            }
            None => Ok(()),
        }
    }

    /// Waits for the root's end and forwards signals to it; gives the exit status a shell would show.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait_for(&mut self, root: Pid) -> anyhow::Result<u8> {
        let handle: OwnedFd = pidfd::open(root)?;
        loop {
            match ptrace::wait(root.leader(), true)? {
                Some(ptrace::Stop::Exited(code)) => return Ok(u8::try_from(code & 0xff).unwrap_or(1)),
                Some(ptrace::Stop::Killed(signal)) => return Ok(u8::try_from(128 + signal).unwrap_or(255)),
                _ => {}
            }
            let Some(info) = self.fd.read_signal().context("read a signal")? else { continue };
            pass_on(&info, root, handle.as_fd())?;
        }
    }

    /// Waits for a signal, which is forwarded to `root`, or for something to read from `news`; tells whether that came.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forward(&mut self, root: Pid, news: BorrowedFd<'_>) -> anyhow::Result<bool> {
        let mut fds = [PollFd::new(news, PollFlags::POLLIN), PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let any = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        if any(&fds[0]) {
            return Ok(true);
        }
        if any(&fds[1])
            && let Some(info) = self.fd.read_signal().context("read a signal")?
            && let Ok(handle) = pidfd::open(root)
        {
            pass_on(&info, root, handle.as_fd())?;
        }
        Ok(false)
    }
}

fn pass_on(info: &siginfo, root: Pid, handle: BorrowedFd<'_>) -> anyhow::Result<()> {
    let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
    // What the terminal sends goes to the whole foreground group: the root has it already.
    let from_terminal = info.ssi_code == libc::SI_KERNEL;
    let together = getpgid(Some(root.nix())).ok() == getpgid(None::<NixPid>).ok();
    if signal != libc::SIGCHLD && !(from_terminal && together) {
        match pidfd::send_signal(handle, signal) {
            Err(error) if !error.vanished() => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

impl Drop for Signals {
    fn drop(&mut self) {
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&self.old), None);
    }
}
