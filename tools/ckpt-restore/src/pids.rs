//! Are the pids free, who has them, and may the holder be replaced?

use std::{
    collections::BTreeSet,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{Image, types::FileEntry};
use ckpt_sys::{Pid, Refused, pidfd};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{region::link, tree::Tree};

fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn comm(pid: i32) -> String {
    let path = format!("/proc/{pid}/comm");
    std::fs::read(path)
        .map_or_else(|_| "?".to_owned(), |c| String::from_utf8_lossy(c.trim_ascii_end()).into_owned())
}

/// Checks that no pid or tid of the tree is in use.
///
/// # Errors
/// [`Refused`], naming who has it.
pub fn check_free(tree: &Tree) -> anyhow::Result<()> {
    check_numbers(tree)?;
    for thread in tree.processes.iter().flat_map(|p| &p.threads) {
        let tid = thread.tid.0;
        // One that has ended is gone as soon as its parent looks; some are not quick.
        let start = Instant::now();
        while ended(tid) && start.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if exists(tid) {
            return Err(Refused::new(format!("pid {tid}"), format!("taken by {}", holder(tid)))
                .advise("end that process, or pass --replace (if it is the original) or --new-pidns")
                .into());
        }
    }
    Ok(())
}

/// A number is in use as well while it names a process group or session that somebody is in
/// (`alloc_pid` in kernel/pid.c), even if the process that gave it its name has ended.
fn check_numbers(tree: &Tree) -> anyhow::Result<()> {
    let wanted: BTreeSet<i32> = tree.processes.iter().flat_map(|p| &p.threads).map(|t| t.tid.0).collect();
    let start = Instant::now();
    while let Some((number, member)) = group_in_use(&wanted) {
        if !ended(member) || start.elapsed() > Duration::from_secs(5) {
            let reason = format!("is still the process group or session of pid {member} ({})", comm(member));
            return Err(Refused::new(format!("pid {number}"), reason)
                .advise("end that process, or pass --new-pidns")
                .into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A number among `wanted` that is the group or session of a process with another pid, and that process.
fn group_in_use(wanted: &BTreeSet<i32>) -> Option<(i32, i32)> {
    let entries = std::fs::read_dir("/proc").ok()?;
    entries.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        // Whoever has a wanted pid itself is found and named by `check_free`, or is to be replaced.
        if wanted.contains(&pid) {
            return None;
        }
        let stat = ckpt_proc::stat::parse(&std::fs::read(entry.path().join("stat")).ok()?).ok()?;
        [stat.pgrp, stat.session].into_iter().find(|n| wanted.contains(n)).map(|n| (n, pid))
    })
}

fn ended(tid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

fn holder(tid: i32) -> String {
    let leader = std::fs::read_to_string(format!("/proc/{tid}/status")).ok().and_then(|status| {
        status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse::<i32>().ok())
    });
    match leader {
        Some(leader) if leader != tid => format!("a thread of {} ({leader})", comm(leader)),
        _ => comm(tid),
    }
}

/// Ends the original processes: those that have a pid of the tree, with the name and executable
/// that are recorded for it. Everything is checked before the first one is ended.
///
/// # Errors
/// [`Refused`] if somebody else has one of the pids.
pub fn replace(tree: &Tree, set: &ImageSet) -> anyhow::Result<()> {
    let files: Vec<FileEntry> = set.all(Image::Files, 0)?;
    let mut victims = Vec::new();
    for process in &tree.processes {
        let pid = process.pid;
        if !exists(pid.0) {
            continue;
        }
        // From here on the pidfd is the process, whatever happens to its number.
        let Ok(fd) = pidfd::open(pid) else { continue };
        let refuse = |why: String| {
            let who = format!("pid {pid}");
            Refused::new(who, why)
                .advise("it is not the process that was checkpointed, so --replace leaves it alone")
        };
        let now = comm(pid.0);
        if now != process.comm {
            return Err(refuse(format!("taken by {now}, {} was recorded", process.comm)).into());
        }
        if let Some(body) = &process.body {
            let id = body.space.mm.exe_file_id;
            let recorded =
                files.iter().find(|f| f.id == id).and_then(|f| f.reg.as_ref()).map(|r| r.name.clone());
            let exe = link(&format!("/proc/{pid}/exe"));
            // A zombie has no executable any more.
            if let (Some(recorded), Ok(exe)) = (recorded, exe)
                && exe != recorded
                && exe != [&recorded[..], b" (deleted)"].concat()
            {
                return Err(refuse(format!("runs {}", String::from_utf8_lossy(&exe))).into());
            }
        }
        victims.push((pid, fd));
    }
    for (_, fd) in &victims {
        match pidfd::send_signal(fd.as_fd(), libc::SIGKILL) {
            Err(error) if !error.vanished() => return Err(error).context("--replace"),
            _ => {}
        }
    }
    for (pid, fd) in &victims {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(5000_u16)).context("poll")? == 0 {
            bail!("pid {pid} was killed and does not end");
        }
        wait_gone(*pid)?;
    }
    Ok(())
}

/// A pid is free only when the parent has waited for it.
fn wait_gone(pid: Pid) -> anyhow::Result<()> {
    let start = Instant::now();
    while exists(pid.0) {
        if start.elapsed() > Duration::from_secs(5) {
            let why = "has ended, but its parent does not wait for it, so the pid stays taken";
            return Err(Refused::new(format!("pid {pid}"), why).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
