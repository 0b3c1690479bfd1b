//! Freezes a tree and runs a batch of system calls in each of its threads, and some that leave
//! traces unless they are undone, COUNT times; each time it makes a twin of every process.
//!
//! Killed at any instant, it must leave no trace in the tree; `tests/remote.rs` does that.

use std::{error::Error, time::Duration};

use ckpt_remote::{Arg, Call, Frozen, Release, Syscalls};
use ckpt_sys::{Pid, RemoteAddr, memory};

fn close(fd: i32) -> Call {
    Call::new(format!("close({fd})"), libc::SYS_close, [Arg::from(fd)]).may_fail()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let pid: Pid = args.next().ok_or("usage: hammer PID COUNT")?.parse()?;
    let count: u32 = args.next().ok_or("usage: hammer PID COUNT")?.parse()?;
    for _ in 0..count {
        let mut frozen = Frozen::freeze(pid, Duration::from_secs(5))?;
        for process in frozen.processes.clone() {
            for thread in &process.threads {
                let mut calls = vec![
                    Call::new("getpid", libc::SYS_getpid, []),
                    Call::new("gettid", libc::SYS_gettid, []),
                    Call::new("close(-1)", libc::SYS_close, [Arg::from(-1)]).may_fail(),
                ];
                for signal in 1..=64 {
                    calls.push(Call::new(
                        "rt_sigaction",
                        libc::SYS_rt_sigaction,
                        [Arg::from(signal), Arg::Val(0), Arg::Out(32), Arg::Val(8)],
                    ));
                }
                let mut borrowed = frozen.borrow(process.pid, thread.tid)?;
                let done = borrowed.run(&calls)?;
                let few = borrowed.run(&calls[..2])?;
                for round in 0..20 {
                    // A descriptor and a umask that must not stay; two guards, the inner one undone by hand.
                    borrowed.guard(vec![close(901), close(900)])?;
                    let dup = |at| Call::new("dup", libc::SYS_fcntl, [0, libc::F_DUPFD, at].map(Arg::from));
                    borrowed.run(&[dup(900), dup(901)])?;
                    let umask = Call::new("umask", libc::SYS_umask, [Arg::Val(0o123)]);
                    borrowed.guard(vec![Call::new("umask", libc::SYS_umask, [Arg::Val(0o22)])])?;
                    borrowed.run(&[umask])?;
                    if borrowed.unguard()?.first().map(|done| done.ret) != Some(0o123) {
                        return Err("umask was not what it was set to".into());
                    }
                    // The last one is left to whoever gives the task back.
                    if round < 19 {
                        borrowed.unguard()?;
                    }
                }
                borrowed.finish()?;
                let told = (done[0].ret, done[1].ret, done[2].ret, few[1].ret);
                let tid = i64::from(thread.tid.0);
                if told != (i64::from(process.pid.0), tid, -i64::from(libc::EBADF), tid) {
                    return Err(format!("tid {tid} answered {told:?}").into());
                }
            }
        }
        let mut held = Vec::new();
        for (pid, twin) in frozen.twins(|_| None) {
            let twin = twin?;
            let mut bytes = [[0; 16]; 2];
            let at =
                frozen.processes.iter().find(|p| p.pid == pid).ok_or("who is that?")?.threads[0].regs.rsp;
            for (pid, bytes) in [pid, twin.pid()].into_iter().zip(&mut bytes) {
                memory::read_exact(pid, RemoteAddr(at), bytes)?;
            }
            if bytes[0] != bytes[1] {
                return Err(format!("pid {pid}: another stack in the twin: {bytes:x?}").into());
            }
            held.push(twin);
        }
        frozen.release(Release::Run);
    }
    Ok(())
}
