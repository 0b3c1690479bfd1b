//! State of single tasks: registers, threads, credentials, attributes.

use ckpt_tests::{Target, process};

crate::survives! {
    all_registers_survive: "registers";
    threads_keep_their_state: "thread_state";
    unprivileged_user_keeps_credentials_and_limits: "credentials_user";
    capabilities_and_securebits_survive: "credentials_caps";
    names_and_treatment_survive: "task_attributes";
    chrooted_task_stays_in_its_root: "chrooted";
}

/// The filter would kill the task for the first system call that is not its own.
#[test]
fn seccomp_filter_is_refused_and_does_not_kill() {
    let target = Target::start("seccomp_filter");
    let before = target.at_rest();
    let outcome = target.dump("img");
    if outcome.code("ckpt-write") == 0 {
        target.unchanged(&before);
        target.passes("the original");
        target.end();
        target.restore_ok("img");
        target.looks_like(&before);
    } else {
        let _ = outcome.fails("ckpt-scan", 3, &["seccomp", &target.pid.to_string()]);
        assert!(!target.path("img").exists());
        target.unchanged(&before);
    }
    target.passes("the one that lives");
}

#[test]
fn register_loop_survives_many_dumps() {
    let target = Target::start("registers");
    for round in 0..30 {
        target.dump_ok(&format!("img{round}"));
    }
    target.passes("the original after 30 dumps");
    assert_eq!(process::state(target.pid), Some('S'));
}
