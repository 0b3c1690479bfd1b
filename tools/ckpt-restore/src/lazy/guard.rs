//! The guardian: sees to it that the server's death does no harm.
//!
//! A userfaultfd that nobody holds any more is gone, and pages that have not come would read as zeros. The guardian
//! holds them: it has one table of descriptors with the server ([`clone::fork_with_shared_files`]), so that not even a
//! userfaultfd which the kernel has just made for a forked child is lost. While the server lives the guardian waits.
//! If the server ends before it has closed the last userfaultfd, it kills the processes that were restored and
//! their descendants. What it can't find, such as a daemon that has left the family, it takes the missing pages
//! from for good: touching one is then SIGBUS, not a zero.
//!
//! If the guardian ends first the server makes another one. It has a name and a session of its own, so that what is
//! aimed at one of the two does not hit both.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_sys::{Pid, RemoteAddr, clone, pidfd, uffd};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::serve::Restored;

/// Addresses that a process can have.
const ALL: (RemoteAddr, RemoteAddr) = (RemoteAddr(1 << 16), RemoteAddr(0x7fff_ffff_f000));
/// How often it is looked whether those who were killed are gone, milliseconds.
const LOOK: u8 = 20;

/// Waits for the server's end; gives the exit status.
pub fn watch(server: BorrowedFd<'_>, restored: &Restored) -> i32 {
    let mut end = [PollFd::new(server, PollFlags::POLLIN)];
    while !matches!(poll(&mut end, PollTimeout::NONE), Ok(n) if n > 0) {}
    let mut left = userfaultfds();
    left.retain(|uffd| uffd::is_alive(uffd.as_fd()));
    if left.is_empty() {
        return 0;
    }
    let root = restored.0.first().map_or_else(String::new, |(pid, _)| format!(" {pid}"));
    ckpt_cli::warn(&format!(
        "the page server ended before all pages had come: the restored process{root} and its family are killed; \
         restore them again"
    ));
    let mut doomed: BTreeMap<Pid, OwnedFd> = BTreeMap::new();
    for (pid, handle) in &restored.0 {
        doomed.extend(handle.try_clone().ok().map(|handle| (*pid, handle)));
    }
    // Those who wait for a page that the server had been told of ask again.
    for uffd in &left {
        let _ = uffd::wake(uffd.as_fd(), ALL.0, ALL.1);
    }
    while !left.is_empty() {
        kill(&mut doomed);
        let mut fds: Vec<PollFd<'_>> =
            left.iter().map(|uffd| PollFd::new(uffd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, PollTimeout::from(LOOK));
        let mut children = Vec::new();
        for uffd in &left {
            let mut events = Vec::new();
            // What can't be read makes its process wait, which is all that is wanted.
            let _ = uffd::read(uffd.as_fd(), &mut events);
            for event in events {
                match event {
                    uffd::Event::Fault(addr) => take_away(uffd.as_fd(), addr),
                    uffd::Event::Fork(child) => children.push(child),
                    _ => {}
                }
            }
        }
        left.extend(children);
        left.retain(|uffd| uffd::is_alive(uffd.as_fd()));
    }
    1
}

/// Makes a missing page one that can't be had. Until that works who touches it waits, or asks again.
fn take_away(uffd: BorrowedFd<'_>, addr: RemoteAddr) {
    let page = RemoteAddr(addr.0 & !4095);
    if uffd::poison(uffd, page, 4096).is_err() {
        let _ = uffd::wake(uffd, page, page.plus(4096));
    }
}

/// All userfaultfds that are open here, as copies.
fn userfaultfds() -> Vec<OwnedFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
    });
    let numbers: Vec<i32> = ours.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.into_iter().filter_map(|fd| clone::adopt_fd(fd).ok()).collect()
}

/// Kills `doomed` and all their descendants, whom it adds.
fn kill(doomed: &mut BTreeMap<Pid, OwnedFd>) {
    // Descendants first, as long as they can be found through their parents.
    let mut todo: Vec<Pid> = doomed.keys().copied().collect();
    while let Some(pid) = todo.pop() {
        let alive = doomed.get(&pid).is_some_and(|handle| pidfd::send_signal(handle.as_fd(), 0).is_ok());
        for child in if alive { children(pid) } else { Vec::new() } {
            if let (false, Ok(handle)) = (doomed.contains_key(&child), pidfd::open(child)) {
                doomed.insert(child, handle);
                todo.push(child);
            }
        }
    }
    for handle in doomed.values() {
        let _ = pidfd::send_signal(handle.as_fd(), libc::SIGKILL);
    }
}

fn children(pid: Pid) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|n| n.parse().ok().map(Pid)).collect::<Vec<_>>())
        .collect()
}
