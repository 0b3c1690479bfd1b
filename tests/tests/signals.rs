//! Signals, timers, and system calls that a stop interrupts.

use ckpt_tests::{Target, process};
use nix::sys::signal::Signal;

crate::survives! {
    pending_signals_keep_siginfo_and_order: "signals_pending";
    handlers_keep_masks_and_flags: "signal_handlers";
    handler_on_altstack_returns_after_restore: "inside_handler";
    interval_timers_tick_on: "itimers";
    posix_timers_keep_ids_and_tick_on: "posix_timers";
    blocked_calls_notice_nothing: "blocked_calls";
}

#[test]
fn group_stopped_target_stays_stopped() {
    let target = Target::start("attacked");
    target.signal(Signal::SIGSTOP);
    assert!(ckpt_tests::soon(|| process::state(target.pid) == Some('T')));
    // Its timer goes on and makes a signal pending.
    ckpt_tests::soon(|| process::text(target.pid, "status").contains("ShdPnd:\t0000000400002000"));
    let before = target.snapshot();
    target.dump_ok("img");
    target.unchanged(&before);
    assert_eq!(process::state(target.pid), Some('T'));
    target.end();
    target.restore_ok("img");
    target.looks_like(&before);
    assert_eq!(process::state(target.pid), Some('T'));
    target.signal(Signal::SIGCONT);
    target.passes("the restored one after SIGCONT");
}

#[test]
fn repeated_dumps_do_not_disturb_blocked_calls() {
    let target = Target::start("blocked_calls");
    for round in 0..10 {
        target.dump_ok(&format!("img{round}"));
    }
    target.passes("the original after ten dumps");
}

#[test]
fn leave_stopped_stops_and_sigcont_goes_on() {
    let target = Target::start("attacked");
    let _ = target.dumping("img", &["--leave-stopped"], &[]).run().ok("dump");
    assert!(process::tree(target.pid).iter().all(|&p| process::state(p) == Some('T')));
    assert_eq!(
        process::text(target.pid, "status").lines().find(|l| l.starts_with("TracerPid")),
        Some("TracerPid:\t0")
    );
    for pid in process::tree(target.pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGCONT);
    }
    target.passes("the original after SIGCONT");
}
