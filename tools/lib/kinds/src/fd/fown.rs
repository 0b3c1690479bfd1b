//! Who is told by a signal that a file is ready: F_SETOWN and F_SETSIG (fcntl(2)).
//!
//! The owner is a pid, so it can be set only once all processes are there again. The kernel notes the
//! caller's real and effective user ids with it, and later asks by these whether the signal may be sent:
//! the call runs inside a task, which for that moment takes the ids that the images tell.

use std::os::fd::BorrowedFd;

use ckpt_proto::types::{FdTypes, FileEntry, FownEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::file;
use nix::unistd::{geteuid, getuid};

const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// The owner of an open file with these flags.
pub(super) fn dump(fd: BorrowedFd<'_>, flags: u32) -> anyhow::Result<FownEntry> {
    if flags & libc::O_PATH.cast_unsigned() != 0 {
        return Ok(FownEntry::default());
    }
    let owner = file::owner(fd)?;
    if owner.pid == 0 {
        return Ok(FownEntry { signum: owner.signal.unsigned_abs(), ..FownEntry::default() });
    }
    Ok(FownEntry {
        uid: owner.uid,
        euid: owner.euid,
        signum: owner.signal.unsigned_abs(),
        pid_type: owner.kind,
        pid: owner.pid.unsigned_abs(),
    })
}

/// Flags and owner of an entry.
pub(super) fn of(entry: &FileEntry) -> Option<(u32, &FownEntry)> {
    Some(match entry.r#type() {
        FdTypes::Reg => entry.reg.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Pipe => entry.pipe.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Unixsk => entry.usk.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Inetsk => entry.isk.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Packetsk => entry.psk.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Netlinksk => entry.nlsk.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Inotify => entry.ify.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Eventfd => entry.efd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Eventpoll => entry.epfd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Signalfd => entry.sgfd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Timerfd => entry.tfd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Memfd => entry.memfd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Pidfd => entry.pidfd.as_ref().map(|e| (e.flags, &e.fown))?,
        FdTypes::Tty => entry.tty.as_ref().map(|e| (e.flags, &e.fown))?,
        _ => return None,
    })
}

fn setresuid(real: u32, effective: u32, saved: u32) -> Call {
    let args = [real, effective, saved].map(|id| Arg::Val(id.into()));
    Call::new(format!("setresuid({real}, {effective}, {saved})"), libc::SYS_setresuid, args)
}

/// The calls that give descriptor `fd` its owner, signal and O_ASYNC, in that order: signals are
/// sent from the moment O_ASYNC is set.
pub(super) fn calls(fd: u32, flags: u32, fown: &FownEntry) -> Vec<Call> {
    let fcntl = |name: String, command: i32, arg: Arg| {
        Call::new(name, libc::SYS_fcntl, [Arg::Val(fd.into()), Arg::from(command), arg])
    };
    let mut calls = Vec::new();
    if fown.signum != 0 {
        calls.push(fcntl(format!("fcntl({fd}, F_SETSIG)"), F_SETSIG, Arg::Val(fown.signum.into())));
    }
    if fown.pid != 0 {
        let owner = [fown.pid_type.to_ne_bytes(), fown.pid.to_ne_bytes()].concat();
        let set = fcntl(format!("fcntl({fd}, F_SETOWN_EX, {})", fown.pid), F_SETOWN_EX, Arg::In(owner));
        // Until its own credentials are set, last of all, the task has ours.
        let ours = (getuid().as_raw(), geteuid().as_raw());
        if ours == (fown.uid, fown.euid) {
            calls.push(set);
        } else {
            // Raw system calls change one thread only. With our id saved it can go back, capabilities included.
            calls.extend([setresuid(fown.uid, fown.euid, ours.1), set, setresuid(ours.0, ours.1, ours.1)]);
        }
    }
    if flags & libc::O_ASYNC.cast_unsigned() != 0 {
        calls.push(fcntl(format!("fcntl({fd}, F_SETFL, O_ASYNC)"), libc::F_SETFL, Arg::Val(flags.into())));
    }
    calls
}
