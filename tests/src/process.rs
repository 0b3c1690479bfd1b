//! Trees of processes as `/proc` shows them.
//!
//! Tests kill what they started and nothing else: a process belongs to a test if its initial environment holds the
//! test's marker (`CKPT_TEST_DIR=...`) or, where a program has written its title over that, if it works in the test's
//! directory. Restored processes have the environment of the original, so they are found the same way; so are
//! orphans that the kernel gave to someone else. This process makes itself subreaper, so that
//! orphans come here and are reaped at once: a pid that only a zombie holds is still taken.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Once,
};

use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use crate::soon;

/// Variable that marks a test's processes.
pub const MARKER: &str = "CKPT_TEST_DIR";

/// Makes this process the parent of its descendants' orphans.
pub fn become_subreaper() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = prctl::set_child_subreaper(true);
    });
}

/// All processes.
pub fn all() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// `/proc/PID/NAME` as text; empty if it is gone.
#[must_use]
pub fn text(pid: i32, name: &str) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default()).into_owned()
}

/// Threads of a process, sorted.
#[must_use]
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut tids: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable();
    tids
}

/// Children of a process, zombies included, sorted.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let mut pids: Vec<i32> = threads(pid)
        .iter()
        .flat_map(|tid| {
            let list = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
            list.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<i32>>()
        })
        .collect();
    pids.sort_unstable();
    pids
}

/// A process and all its descendants, root first.
#[must_use]
pub fn tree(root: i32) -> Vec<i32> {
    let mut pids = vec![root];
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        pids.extend(children(pid));
        next += 1;
    }
    pids
}

/// Proportional share of memory of a tree, KiB: what it takes by itself.
#[must_use]
pub fn pss(root: i32) -> u64 {
    let of = |pid: i32| {
        let text = text(pid, "smaps_rollup");
        let line = text.lines().find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
        line.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    tree(root).into_iter().map(of).sum()
}

/// The fields of `/proc/PID/stat` behind the command name: index 0 is the state.
#[must_use]
pub fn stat(pid: i32) -> Option<Vec<String>> {
    let line = text(pid, "stat");
    let (_, rest) = line.rsplit_once(") ")?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// State letter; `None` if there is no such process.
#[must_use]
pub fn state(pid: i32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// Whether no thread of the tree under `root` is running or waiting for a processor.
#[must_use]
pub fn asleep(root: i32) -> bool {
    tree(root).into_iter().flat_map(threads).all(|tid| state(tid) != Some('R'))
}

/// Whether the pid is not in use, not even by a zombie. A zombie that is ours is reaped on the way.
#[must_use]
pub fn is_free(pid: i32) -> bool {
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    !Path::new(&format!("/proc/{pid}")).exists()
}

/// Living processes that carry the marker of `dir`.
#[must_use]
pub fn marked(dir: &Path) -> Vec<i32> {
    let wanted = format!("{MARKER}={}", dir.display()).into_bytes();
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let mine = |pid: &i32| {
        // A process whose first thread has ended shows nothing there, but in its other threads.
        let holds = |tid: i32| {
            let environ = fs::read(format!("/proc/{pid}/task/{tid}/environ")).unwrap_or_default();
            environ.split(|&b| b == 0).any(|variable| variable == wanted)
                || link(*pid, &format!("task/{tid}/cwd")).starts_with(dir)
        };
        *pid != me && threads(*pid).into_iter().any(holds)
    };
    all().into_iter().filter(mine).collect()
}

/// Ends all processes of the test in `dir` together with their descendants, and waits until the pids are free.
///
/// # Panics
/// Some pid is still taken after a long wait.
pub fn end_all(dir: &Path) {
    let mut ended = BTreeSet::new();
    let mut sessions = BTreeSet::new();
    let session = |pid: i32| stat(pid).and_then(|fields| fields.get(3)?.parse::<i32>().ok());
    let ours = session(i32::try_from(std::process::id()).unwrap_or(0));
    let gone = soon(|| {
        let living: BTreeSet<i32> = marked(dir).into_iter().flat_map(tree).collect();
        // A zombie has no environment, but it holds on to the number of its session all the same.
        sessions.extend(
            living.iter().filter_map(|&pid| session(pid)).filter(|&sid| Some(sid) != ours && sid > 1),
        );
        let dead =
            |pid: &i32| state(*pid) == Some('Z') && session(*pid).is_some_and(|sid| sessions.contains(&sid));
        ended.extend(all().into_iter().filter(dead));
        // All at once, as by a power cut: none sees that another is gone. (A database whose client ends rolls back.)
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for &pid in &living {
                let _ = kill(Pid::from_raw(pid), signal);
            }
        }
        ended.extend(&living);
        let free = ended.iter().filter(|&&pid| is_free(pid)).count();
        living.is_empty() && free == ended.len()
    });
    if !gone && !std::thread::panicking() {
        let left: Vec<_> = ended.iter().filter(|&&p| !is_free(p)).map(|&p| (p, stat(p))).collect();
        panic!("processes that do not go away: {left:?}");
    }
}

/// Does `work` while orphans and children among `pids` are reaped, as a parent that waits for them would.
pub fn reaping<R>(pids: &[i32], work: impl FnOnce() -> R) -> R {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                for &pid in pids {
                    if state(pid) == Some('Z') {
                        let _ = is_free(pid);
                    }
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Waits until all of `pids` are free.
///
/// # Panics
/// They are still taken after a long wait.
pub fn wait_free(pids: &[i32]) {
    let free = soon(|| pids.iter().all(|&pid| is_free(pid)));
    assert!(
        free,
        "pids still taken: {:?}",
        pids.iter().filter(|&&p| !is_free(p)).map(|&p| (p, stat(p))).collect::<Vec<_>>()
    );
}

/// Waits until nobody is left of a session whose processes have all been killed, its zombies included.
///
/// # Panics
/// Some pid is still taken after a long wait.
pub fn wait_session_free(sid: i32) {
    let mut left = Vec::new();
    let free = soon(|| {
        let of_session =
            |pid: &i32| stat(*pid).is_some_and(|fields| fields.get(3).is_some_and(|s| s.parse() == Ok(sid)));
        left = all().into_iter().filter(of_session).collect();
        left.retain(|&pid| !is_free(pid));
        left.is_empty()
    });
    assert!(free, "still there: {:?}", left.iter().map(|&p| (p, stat(p))).collect::<Vec<_>>());
}

/// Where `/proc/PID/NAME` points.
#[must_use]
pub fn link(pid: i32, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/{name}")).unwrap_or_default()
}

/// Inode of the socket behind descriptor `fd`: the ID of `ckpt-sk --external`.
///
/// # Panics
/// It is no socket.
#[must_use]
pub fn socket_id(pid: i32, fd: i32) -> u64 {
    let target = link(pid, &format!("fd/{fd}")).display().to_string();
    let inode = target.strip_prefix("socket:[").and_then(|t| t.strip_suffix(']'));
    inode.and_then(|i| i.parse().ok()).unwrap_or_else(|| panic!("pid {pid} fd {fd} is {target}"))
}
