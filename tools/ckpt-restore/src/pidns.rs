//! `--new-pidns`: the same restore, done by a copy of this process that is pid 1 of a new pid namespace.
//!
//! ```text
//! R            parent: prints nothing, forwards signals, gives the root's status
//! └─ init      pid 1 inside: restores, then waits for whoever ends in the namespace
//!    └─ root   has its recorded pid inside, another one outside
//! ```
//!
//! Inside, `/proc` is a new one, in a mount namespace of its own whose other mounts follow the outer
//! ones; the restored tasks stay in it. When init ends, for whatever reason, the kernel kills all
//! that is left in the namespace, so it stays until nobody is left.
//!
//! Over a pipe init tells that everything runs, and later the root's status.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_sys::{
    Pid, clone,
    ptrace::{self, Stop},
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitStatus, wait},
    },
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout, pipe2},
};

use crate::{Args, FAILED, PidFile, outcome::Signals, tree::Tree};

/// Restores into a new pid namespace. Returns in both processes: in each, its exit status.
///
/// # Errors
/// Nothing was restored.
pub fn run(args: &Args, tree: &Tree, set: &mut ImageSet) -> anyhow::Result<u8> {
    let mut signals = Signals::hold()?;
    let (from_init, to_parent) = pipe2(OFlag::O_CLOEXEC).context("pipe2")?;
    unshare(CloneFlags::CLONE_NEWPID).context("unshare(CLONE_NEWPID)")?;
    let Some(init) = clone::fork()? else {
        drop(from_init);
        return be_init(args, tree, set, &signals, to_parent.into());
    };
    drop(to_parent);
    let mut news = File::from(from_init);
    let mut word = [0];
    // It may be waiting for a peer to connect, which a signal ends.
    while !signals.forward(init, news.as_fd())? {}
    if news.read(&mut word).context("read from init")? == 0 {
        // It has said why, and ends with the status for that.
        return Ok(match ptrace::wait(init.leader(), false) {
            Ok(Some(Stop::Exited(status))) => u8::try_from(status).unwrap_or(FAILED),
            _ => FAILED,
        });
    }
    let root = outer_pid(init, tree.root().pid);
    let written = root.and_then(|root| {
        if let Some(path) = &args.pidfile {
            PidFile::write(path, root)?.keep();
        }
        Ok(root)
    });
    let root = match written {
        Ok(root) => root,
        Err(error) => {
            let _ = kill(init.nix(), Signal::SIGKILL);
            return Err(error);
        }
    };
    if args.detach {
        return Ok(0);
    }
    loop {
        if signals.forward(root, news.as_fd())? {
            return match news.read(&mut word).context("read from init")? {
                0 => bail!("pid 1 of the namespace was killed, and everything with it"),
                _ => Ok(word[0]),
            };
        }
    }
}

fn be_init(
    args: &Args,
    tree: &Tree,
    set: &mut ImageSet,
    signals: &Signals,
    mut parent: File,
) -> anyhow::Result<u8> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .context("mount(/, MS_SLAVE)")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .context("mount /proc of the new namespace")?;
    let root = crate::restore(args, tree, set, signals, false)?;
    parent.write_all(&[0]).context("tell the parent")?;
    prctl::set_pdeathsig(None).context("prctl(PR_SET_PDEATHSIG)")?;
    // What this process holds open must not keep others from seeing it closed.
    drop(std::mem::take(set));
    if args.detach {
        let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
        dup2_stdin(&null)
            .and_then(|()| dup2_stdout(&null))
            .and_then(|()| dup2_stderr(&null))
            .context("dup2")?;
    }
    loop {
        let code = match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == root.nix() => code & 0xff,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == root.nix() => 128 + signal as i32,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => return Ok(0),
        };
        // The parent may be gone, and need not know then.
        let _ = parent.write_all(&[u8::try_from(code).unwrap_or(255)]);
    }
}

/// The root's pid as seen here: the child of `init` whose innermost pid is `inner`.
fn outer_pid(init: Pid, inner: Pid) -> anyhow::Result<Pid> {
    let path = format!("/proc/{init}/task/{init}/children");
    let children = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    for pid in children.split_ascii_whitespace() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        if pids.split_ascii_whitespace().next_back() == Some(&inner.to_string()) {
            return Ok(Pid(pid.parse().with_context(|| path.clone())?));
        }
    }
    bail!("{path}: the restored root is not there")
}
