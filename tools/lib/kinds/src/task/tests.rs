//! A whole process, dumped as `ckpt-scan` does it; and what restore makes of damaged entries.

use std::time::Duration;

use ckpt_proto::{Message, types::CoreEntry};
use ckpt_remote::{Frozen, Release};
use ckpt_sys::{Pid, RemoteAddr, Tid, selfcall};
use nix::{
    sys::{
        signal::{SigSet, Signal, kill, raise},
        wait::{Id, WaitPidFlag, waitid, waitpid},
    },
    unistd::{pause, pipe, read, write},
};

use super::{ThreadInput, check, dump_leader, dump_zombie, processors, restore};

/// The core entry of a child that did `setup`.
fn dumped(setup: impl FnOnce()) -> CoreEntry {
    let _forking = crate::descriptors::forking();
    let (reader, writer) = pipe().unwrap();
    let pid = selfcall::spawn(move || {
        setup();
        write(&writer, b"!").unwrap();
        loop {
            pause();
        }
    });
    read(&reader, &mut [0]).unwrap();
    // pause(2) has been entered.
    while !std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap().starts_with("34 ") {
        std::thread::sleep(Duration::from_micros(100));
    }
    let core = dump(pid);
    kill(pid.nix(), Signal::SIGKILL).unwrap();
    waitpid(pid.nix(), None).unwrap();
    core
}

fn dump(pid: Pid) -> CoreEntry {
    let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
    let process = frozen.processes[0].clone();
    check(&process).unwrap();
    let thread = &process.threads[0];
    let mut borrowed = frozen.borrow(pid, thread.tid).unwrap();
    let processors = processors();
    let input = ThreadInput {
        pid,
        tid: thread.tid,
        remote: &mut borrowed,
        regs: thread.regs,
        sigmask: thread.sigmask,
        stopped_by: process.stopped_by,
        stat: &process.stat,
        status: &thread.status,
        processors: processors.as_deref(),
    };
    let (core, _) = dump_leader(input).unwrap();
    borrowed.finish().unwrap();
    frozen.release(Release::Run);
    core
}

#[test]
fn whole_process_is_told_by_its_entry() {
    let core = dumped(|| {
        nix::sys::prctl::set_name(c"a) S (\n").unwrap();
        nix::sys::prctl::set_pdeathsig(Signal::SIGHUP).unwrap();
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        nix::sys::prctl::set_timerslack(12_345).unwrap();
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGUSR1);
        mask.thread_block().unwrap();
        raise(Signal::SIGUSR1).unwrap();
        kill(nix::unistd::getpid(), Signal::SIGUSR1).unwrap();
    });
    let (tc, thread) = (core.tc.as_ref().unwrap(), core.thread_core.as_ref().unwrap());
    assert_eq!((tc.task_state, tc.exit_code, tc.stop_signo), (1, 0, None));
    assert_eq!((tc.comm.as_slice(), thread.comm.as_deref()), (&b"a) S (\n"[..], Some(&b"a) S (\n"[..])));
    assert_eq!((tc.blk_sigset, tc.child_subreaper), (0x200, Some(true)));
    assert_eq!((thread.pdeath_sig, thread.ckpt_timerslack_ns), (Some(1), Some(12_345)));
    assert_eq!(tc.signals_s.as_ref().unwrap().signals.len(), 1);
    assert_eq!(thread.signals_p.as_ref().unwrap().signals.len(), 1);
    assert_eq!(tc.sigactions.len(), 62);
    assert_eq!(tc.rlimits.as_ref().unwrap().rlimits.len(), 16);
    // pause(2), to be run again.
    let regs = &core.thread_info.as_ref().unwrap().gpregs;
    assert_eq!((regs.ax, regs.orig_ax), (34, 34));
    restore::check(&core).unwrap();
    assert_eq!(restore::sigmask(&core), 0x200);
    assert_eq!(restore::regs(&core).unwrap().orig_rax, u64::MAX);
}

#[test]
fn stopped_process_is_stored_as_stopped() {
    let _forking = crate::descriptors::forking();
    let pid = selfcall::spawn(|| {
        // In an orphaned process group, as that of a CI job may be, SIGTSTP stops nobody.
        nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0)).unwrap();
        raise(Signal::SIGTSTP).unwrap();
        0
    });
    waitid(Id::Pid(pid.nix()), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT).unwrap();
    let core = dump(pid);
    kill(pid.nix(), Signal::SIGKILL).unwrap();
    waitpid(pid.nix(), None).unwrap();
    let tc = core.tc.as_ref().unwrap();
    assert_eq!((tc.task_state, tc.stop_signo), (3, Some(20)));
    assert_eq!(restore::stop_signal(&core), Some(20));
}

#[test]
fn zombie_keeps_its_exit_code() {
    let _forking = crate::descriptors::forking();
    let pid = selfcall::spawn(|| 7);
    waitid(Id::Pid(pid.nix()), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap();
    let core = dump_zombie(&ckpt_proc::stat::parse(&stat).unwrap());
    waitpid(pid.nix(), None).unwrap();
    let tc = core.tc.unwrap();
    assert_eq!((tc.task_state, tc.exit_code), (2, 7 << 8));
}

#[test]
fn damaged_entries_never_panic() {
    let whole = dumped(|| {}).encode_to_vec();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut decoded = 0;
    for _ in 0..5000 {
        let mut bytes = whole.clone();
        for _ in 0..=random() % 8 {
            let at = usize::try_from(random()).unwrap() % bytes.len();
            bytes[at] = random().to_le_bytes()[0];
        }
        if random() % 8 == 0 {
            bytes.truncate(usize::try_from(random()).unwrap() % bytes.len());
        }
        let Ok(core) = CoreEntry::decode(&bytes[..]) else { continue };
        decoded += 1;
        let _ = restore::check(&core);
        let _ = (
            restore::regs(&core),
            restore::xstate(&core),
            restore::sigmask(&core),
            restore::stop_signal(&core),
        );
        let calls = [
            restore::process_calls(&core),
            restore::thread_calls(&core),
            restore::timer_calls(&core),
            restore::pending_calls(&core, Pid(1), Tid(1), true),
            restore::creds_calls(&core),
        ];
        assert!(calls.iter().flatten().all(|c| c.args.len() <= 6));
    }
    assert!(decoded > 100, "only {decoded} entries were readable");
    let mm = ckpt_proto::types::MmEntry { mm_saved_auxv: vec![1; 100_000], ..Default::default() };
    assert!(restore::auxv_bytes(&mm).len() <= 1024);
    assert_eq!(restore::mm_calls(&mm, -1, RemoteAddr(0)).len(), 2);
}
