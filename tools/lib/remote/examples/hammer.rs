//! Freezes a tree and runs a batch of system calls in each of its threads, COUNT times.
//!
//! Killed at any instant, it must leave no trace in the tree; `tests/remote.rs` does that.

use std::{error::Error, time::Duration};

use ckpt_remote::{Arg, Call, Frozen, Release, Syscalls};
use ckpt_sys::Pid;

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
                borrowed.finish()?;
                let told = (done[0].ret, done[1].ret, done[2].ret, few[1].ret);
                let tid = i64::from(thread.tid.0);
                if told != (i64::from(process.pid.0), tid, -i64::from(libc::EBADF), tid) {
                    return Err(format!("tid {tid} answered {told:?}").into());
                }
            }
        }
        frozen.release(Release::Run);
    }
    Ok(())
}
