//! Tests of the tests: without a checkpoint every workload passes, and each of its checks can fail.

use ckpt_tests::{Target, here, workload};

fn names() -> Vec<String> {
    let files = std::fs::read_dir(here().join("workloads")).expect("list workloads").flatten();
    let mut names: Vec<String> =
        files.filter_map(|f| Some(f.file_name().to_str()?.strip_suffix(".c")?.to_owned())).collect();
    names.sort();
    names
}

/// Those that need more around them than a log, or check nothing themselves.
const SPECIAL: &[&str] = &["terminal", "fullscreen", "memory_family", "memory_rewritten"];
/// Those whose third argument [`start`] knows.
pub(crate) const WITH_SOCKET: &[&str] = &["answering", "unix_listener"];

/// Those that take more arguments, and do without them.
const MODEST: &[&str] = &["huge_files", "memory_later", "memory_sparse"];

/// All that can be started by [`start`]: others want more arguments than a log and what is to break.
pub(crate) fn ordinary() -> Vec<String> {
    let takes_more = |name: &str| {
        let source =
            std::fs::read_to_string(here().join(format!("workloads/{name}.c"))).expect("read a workload");
        source.contains("argv[3]") || source.contains("argc > 3")
    };
    let fits = |name: &String| {
        let name = name.as_str();
        WITH_SOCKET.contains(&name) || MODEST.contains(&name) || !SPECIAL.contains(&name) && !takes_more(name)
    };
    names().into_iter().filter(fits).collect()
}

pub(crate) fn start(name: &str, broken: &str) -> Target {
    match name {
        _ if WITH_SOCKET.contains(&name) => Target::start_with(name, &[broken, &format!("{name}.sock")]),
        _ => Target::start_with(name, &[broken]),
    }
}

/// Who answers: the root, but for a parent that can't.
fn asked(target: &Target, name: &str) -> i32 {
    if name == "vfork_waits" { ckpt_tests::process::children(target.pid)[0] } else { target.pid }
}

#[test]
fn every_workload_passes_when_left_alone() {
    for name in &ordinary() {
        let target = start(name, "-");
        assert_eq!(target.verdict_by(asked(&target, name)), "PASS", "{name}");
    }
}

#[test]
fn every_check_can_fail() {
    for name in &ordinary() {
        let breaks = workload::breaks(name);
        assert!(!breaks.is_empty(), "{name} can't fail");
        // Side by side: most of the time goes into waiting for what does not come.
        std::thread::scope(|scope| {
            for broken in &breaks {
                scope.spawn(move || {
                    let target = start(name, broken);
                    let verdict = target.verdict_by(asked(&target, name));
                    assert!(
                        verdict.starts_with("BROKEN") && !verdict.contains("set-up"),
                        "{name} {broken}: {verdict}"
                    );
                });
            }
        });
    }
}

#[test]
fn a_snapshot_sees_what_happens_to_a_target() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    assert!(before.len() > 150, "only {} lines", before.len());
    target.unchanged(&before);
    // A pending signal, a descriptor, a mapping: through /proc nothing else can be changed from outside.
    target.signal(nix::sys::signal::Signal::SIGUSR2);
    assert!(!before.diff(&target.snapshot()).is_empty());
}
