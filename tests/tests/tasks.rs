//! State of single tasks: registers, threads, credentials, attributes.

use ckpt_tests::{Target, process};

crate::survives! {
    all_registers_survive: "registers";
    threads_keep_their_state: "thread_state";
    unprivileged_user_keeps_credentials_and_limits: "credentials_user";
    capabilities_and_securebits_survive: "credentials_caps";
    names_and_treatment_survive: "task_attributes";
    chrooted_task_stays_in_its_root: "chrooted";
    deadly_seccomp_filter_confines_on: "seccomp_filter";
    chains_of_seccomp_filters_come_back_as_chains: "seccomp_chain";
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
