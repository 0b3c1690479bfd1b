//! Signals of this process: held back while tasks are made, forwarded to the root afterwards.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use anyhow::{Context, bail};
use ckpt_proc::status;
use ckpt_sys::{Pid, pidfd};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, SigmaskHow, Signal, kill, killpg, pthread_sigmask},
        signalfd::{SfdFlags, SignalFd, siginfo},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid as NixPid, getpgid, getpgrp, tcgetpgrp, tcsetpgrp},
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
        set.add(Signal::SIGWINCH);
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("signalfd")?;
        Ok(Self { old, fd })
    }

    /// Readable when somebody wants this process to end; a signal read from it counts as dealt with.
    ///
    /// # Errors
    /// The kernel's.
    pub fn interrupt(&self) -> anyhow::Result<Arc<OwnedFd>> {
        let set: SigSet = FORWARDED.into_iter().collect();
        let fd =
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;
        Ok(Arc::new(fd.as_fd().try_clone_to_owned().context("dup")?))
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

    /// Waits for the root's end and forwards signals to it; gives the exit status a shell would show. When the
    /// terminal stops the root (Ctrl-Z), this process stops too, for it is what the shell waits for; the
    /// foreground is the root's while it runs, and comes back in the end.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait_for(&mut self, root: Pid) -> anyhow::Result<u8> {
        let handle: OwnedFd = pidfd::open(root)?;
        let group = getpgid(Some(root.nix())).ok();
        let end = |status| {
            hand_terminal(group, Some(getpgrp()));
            Ok(u8::try_from(status).unwrap_or(255))
        };
        loop {
            // Any child: the page server of --lazy is one too.
            match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(status) if status.pid().is_some_and(|pid| pid != root.nix()) => continue,
                Ok(WaitStatus::Exited(_, code)) => return end(code & 0xff),
                Ok(WaitStatus::Signaled(_, signal, _)) => return end(128 + signal as i32),
                Ok(WaitStatus::Stopped(_, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU)) => {
                    hand_terminal(group, Some(getpgrp()));
                    if group != Some(getpgrp()) {
                        // What the terminal has sent to the root's group: the other stages of our pipeline.
                        let _ = killpg(getpgrp(), Signal::SIGTSTP);
                    }
                    kill(NixPid::this(), Signal::SIGSTOP).context("stop")?;
                    hand_terminal(Some(getpgrp()), group);
                    match group.filter(|&group| group != getpgrp()) {
                        // Nobody may be left in it.
                        Some(group) => drop(killpg(group, Signal::SIGCONT)),
                        None => match pidfd::send_signal(handle.as_fd(), libc::SIGCONT) {
                            Err(error) if !error.vanished() => return Err(error.into()),
                            _ => {}
                        },
                    }
                    continue;
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).with_context(|| format!("wait for pid {root}")),
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

/// Makes `to` the foreground group of our terminal, if there is one and `from` is that now. All signals are
/// blocked, so a background process may do it.
fn hand_terminal(from: Option<NixPid>, to: Option<NixPid>) {
    let (Some(from), Some(to)) = (from, to) else { return };
    if from != to
        && let Ok(terminal) = File::options().read(true).write(true).open("/dev/tty")
        && tcgetpgrp(&terminal) == Ok(from)
    {
        let _ = tcsetpgrp(&terminal, to);
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
