//! Locks on files: fcntl(2) record locks, which belong to a descriptor table and a file, and tell who of those that share
//! the table has taken them; flock(2) and open-file-description locks, which belong to an open file.
//!
//! `fdinfo` lists those that a descriptor gives its task. They are taken again inside a task once
//! its descriptors are in place, without waiting: if somebody else has such a lock meanwhile, the restore fails.

use std::{cmp::Ordering, collections::HashSet};

use anyhow::{Context, bail};
use ckpt_proc::fdinfo::FdInfo;
use ckpt_proto::{Image, types::FileLockEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Refused, TargetFd, kcmp};

use crate::{Sink, sink::emit};

/// `flag` of a lock entry: a record lock.
const POSIX: u32 = 1;
/// `flag`: flock(2).
const FLOCK: u32 = 2;
/// `flag`: an open-file-description lock.
const OFD: u32 = 1024;
const F_OFD_SETLK: i32 = 37;

/// Locks of a tree.
#[derive(Debug, Default)]
pub(super) struct Locks {
    entries: Vec<FileLockEntry>,
    seen: HashSet<String>,
}

/// `1: POSIX  ADVISORY  WRITE 4711 fe:00:1048 0 EOF`: flag, type, who has taken it, start, length.
fn parse(line: &str) -> Option<(u32, u32, Pid, i64, i64)> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, class, "ADVISORY", kind, pid, _, start, end] = words[..] else { return None };
    let flag = match class {
        "POSIX" => POSIX,
        "FLOCK" => FLOCK,
        "OFDLCK" => OFD,
        _ => return None,
    };
    let kind = match kind {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return None,
    };
    let start: i64 = start.parse().ok()?;
    let len = if end == "EOF" { 0 } else { end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)? };
    Some((flag, u32::try_from(kind).ok()?, Pid(pid.parse().ok()?), start, len))
}

fn same_table(a: Pid, b: Pid) -> anyhow::Result<bool> {
    Ok(a == b || kcmp::compare(a.leader(), b.leader(), kcmp::Object::Files)? == Ordering::Equal)
}

impl Locks {
    /// Adds those of a descriptor of `pid`, one of the processes `tree`.
    pub(super) fn add(
        &mut self,
        tree: &HashSet<Pid>,
        pid: Pid,
        comm: &str,
        fd: TargetFd,
        info: &FdInfo,
    ) -> anyhow::Result<()> {
        for line in &info.locks {
            let Some((flag, kind, taker, start, len)) = parse(line) else {
                let reason = format!("a file lock or lease of this kind is not supported: {line}");
                return Err(Refused::new(format!("pid {pid} ({comm}) fd {fd}"), reason).into());
            };
            // A record lock shows at each descriptor of its file; one of an open file at each that shares it.
            let owner = if flag == POSIX { pid.to_string() } else { String::new() };
            let pid =
                if flag == POSIX && tree.contains(&taker) && same_table(pid, taker)? { taker } else { pid };
            let identity = line.split_once(':').map_or("", |(_, rest)| rest);
            if self.seen.insert(format!("{owner} {identity}")) {
                self.entries.push(FileLockEntry { flag, r#type: kind, pid: pid.0, fd: fd.0, start, len });
            }
        }
        Ok(())
    }

    pub(super) fn finish(&self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        self.entries.iter().try_for_each(|entry| emit(sink, Image::FileLocks, 0, entry))
    }
}

/// The call that takes a lock again.
pub(super) fn call(lock: &FileLockEntry) -> anyhow::Result<Call> {
    let fd = Arg::from(lock.fd);
    let name = format!("lock on fd {} (flag {}, type {})", lock.fd, lock.flag, lock.r#type);
    let kind = i32::try_from(lock.r#type).context("lock type")?;
    if lock.flag & FLOCK != 0 {
        let operation = match kind {
            libc::F_RDLCK => libc::LOCK_SH,
            libc::F_WRLCK => libc::LOCK_EX,
            _ => bail!("pid {}: {name}: unknown type", lock.pid),
        };
        return Ok(Call::new(name, libc::SYS_flock, [fd, Arg::from(operation | libc::LOCK_NB)]));
    }
    let command = match lock.flag {
        flag if flag & OFD != 0 => F_OFD_SETLK,
        flag if flag & POSIX != 0 => libc::F_SETLK,
        _ => bail!("pid {}: {name}: not supported", lock.pid),
    };
    // struct flock: short type, short whence, pad to 8, off_t start, off_t len, pid_t pid, pad.
    let mut flock = Vec::with_capacity(32);
    flock.extend_from_slice(&i16::try_from(kind).context("lock type")?.to_ne_bytes());
    flock.extend_from_slice(&[0; 6]);
    flock.extend_from_slice(&lock.start.to_ne_bytes());
    flock.extend_from_slice(&lock.len.to_ne_bytes());
    flock.extend_from_slice(&[0; 8]);
    Ok(Call::new(name, libc::SYS_fcntl, [fd, Arg::from(command), Arg::In(flock)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        assert_eq!(
            parse("1: POSIX  ADVISORY  WRITE 4711 fe:00:1048 10 19"),
            Some((POSIX, 1, Pid(4711), 10, 10))
        );
        assert_eq!(
            parse("1: FLOCK  ADVISORY  READ 4711 fe:00:1048 0 EOF"),
            Some((FLOCK, 0, Pid(4711), 0, 0))
        );
        assert_eq!(parse("1: LEASE  ACTIVE  WRITE 4711 fe:00:1048 0 EOF"), None);
        assert_eq!(
            parse("1: POSIX  ADVISORY  WRITE 1 fe:00:1 -9223372036854775808 9223372036854775807"),
            None
        );
    }
}
