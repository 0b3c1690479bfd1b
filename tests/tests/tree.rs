//! Trees of processes.

use ckpt_tests::{Pipeline, Target, TestDir, process, soon, tool};
use nix::sys::signal::{Signal, kill};
use std::process::Command;

crate::survives! {
    tree_keeps_ids_groups_sessions_zombies_and_stops: "process_tree";
    two_hundred_threads_in_forty_processes_go_on: "crowd";
    descriptors_and_directories_that_processes_share_stay_shared: "shared_tables";
}

/// Either it can be restored, or it is refused by name; never half.
fn survives_or_is_refused(workload: &str, word: &str, asked: impl Fn(&Target) -> i32) {
    let target = Target::start(workload);
    let before = target.at_rest();
    let outcome = target.dump("img");
    if outcome.code("ckpt-write") == 0 {
        target.unchanged(&before);
        target.end();
        target.restore_ok("img");
        target.looks_like(&before);
    } else {
        let _ = outcome.fails("ckpt-scan", 3, &[word]);
        assert!(!target.path("img").exists());
        target.unchanged(&before);
    }
    assert_eq!(target.verdict_by(asked(&target)), "PASS");
}

#[test]
fn exited_leader_is_restored_or_refused() {
    survives_or_is_refused("leader_exited", "thread", |t| t.pid);
}

#[test]
fn a_table_of_siblings_alone_is_refused() {
    let target = Target::start("table_of_siblings");
    let before = target.at_rest();
    let outcome = target.dump("img");
    let _ = outcome.fails("ckpt-scan", 3, &["descriptor table", "not with its parent"]);
    target.unchanged(&before);
    target.passes("the original");
}

#[test]
fn vfork_in_progress_is_restored_or_refused() {
    survives_or_is_refused("vfork_waits", "vfork", |t| process::children(t.pid)[0]);
}

#[test]
fn taken_pid_is_named_with_its_holder() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    let before = target.at_rest();
    let outcome = target.restore("img");
    let _ = outcome.fails("ckpt-restore", 3, &[&target.pid.to_string(), "attacked"]);
    target.unchanged(&before);
    target.passes("the original that holds the pid");
}

#[test]
fn replace_ends_the_original_only() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    let image = target.path("img");
    let restore = Pipeline::new(target.dir.path()).stage([
        "ckpt-restore".into(),
        "--detach".into(),
        "--replace".into(),
        image.clone(),
    ]);
    let _ = process::reaping(&process::tree(target.pid), || restore.run()).ok("restore --replace");
    target.passes("the restored one");
    target.end();
    // Somebody else by that number is not the original: taken by force with the kernel's own counter.
    target.restore_ok("img");
    target.passes("the restored one");
}

#[test]
fn replace_leaves_a_stranger_alone() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    target.end();
    // Give the pid to a stranger: the next fork gets the number after ns_last_pid.
    let dir = TestDir::new("stranger");
    let mut stranger = None;
    for _ in 0..50 {
        if std::fs::write("/proc/sys/kernel/ns_last_pid", (target.pid - 1).to_string()).is_err() {
            ckpt_tests::skip("replace_leaves_a_stranger_alone", "ns_last_pid can't be written");
            return;
        }
        let mut child = Command::new("sleep").arg("1000").spawn().expect("start sleep");
        if i32::try_from(child.id()) == Ok(target.pid) {
            stranger = Some(child);
            break;
        }
        child.kill().and_then(|()| child.wait()).expect("end sleep");
    }
    let mut stranger = stranger.expect("a stranger got the pid");
    let outcome = Pipeline::new(dir.path())
        .stage(["ckpt-restore".into(), "--detach".into(), "--replace".into(), target.path("img")])
        .run();
    let alive = stranger.try_wait().expect("look at the stranger").is_none();
    stranger.kill().and_then(|()| stranger.wait()).expect("end the stranger");
    assert!(alive, "the stranger was ended: {outcome}");
    let _ = outcome.fails("ckpt-restore", 3, &["sleep"]);
}

#[test]
fn new_pidns_restores_beside_the_original() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    let before = target.at_rest();
    let pidfile = target.path("pidfile");
    let _ = Pipeline::new(target.dir.path())
        .stage([
            "ckpt-restore".into(),
            "--detach".into(),
            "--new-pidns".into(),
            "--pidfile".into(),
            pidfile.clone(),
            target.path("img"),
        ])
        .run()
        .ok("restore --new-pidns");
    let outside: i32 =
        std::fs::read_to_string(&pidfile).expect("read the pid file").trim().parse().expect("a pid");
    assert_ne!(outside, target.pid);
    let inside = process::text(outside, "status");
    let inside = inside.lines().find(|l| l.starts_with("NSpid:")).expect("NSpid");
    assert!(inside.ends_with(&format!("\t{}", target.pid)), "{inside}");
    target.unchanged(&before);
    target.passes("the original");
    assert_eq!(target.verdict_by(outside), "PASS", "the copy");
}

/// Pages are found damaged when the namespace is there already: its pid 1 knows why, its parent has to pass it on.
#[test]
fn new_pidns_tells_damage_by_its_status() {
    let target = Target::start("attacked");
    let img = target.dump_ok("img");
    let pages = std::fs::File::options().write(true).open(img.join("pages-1.img")).expect("open the pages");
    std::os::unix::fs::FileExt::write_all_at(&pages, &[0x5a; 64], 8192 + 17).expect("damage a page");
    for (options, code) in [(&["--detach"][..], 4), (&[], 125)] {
        let words = ["ckpt-restore", "--new-pidns"].into_iter().chain(options.iter().copied());
        let _ = Pipeline::new(target.dir.path())
            .stage(words.map(Into::into).chain([img.clone().into_os_string()]))
            .run()
            .fails("ckpt-restore", code, &["pages-1.img"]);
    }
    target.passes("the original");
}

#[test]
fn foreground_restore_waits_and_gives_the_status() {
    let dir = TestDir::new("foreground");
    let mut bash = Command::new("bash");
    bash.args(["-c", "trap 'exit 42' USR1; echo ready >>log; while :; do sleep 0.05; done"]);
    let target = Target::spawn(dir, bash);
    target.wait_log("ready");
    target.dump_ok("img");
    target.end();
    let pidfile = target.path("pidfile");
    let restore = Pipeline::new(target.dir.path())
        .stage(["ckpt-restore".into(), "--pidfile".into(), pidfile.clone(), target.path("img")])
        .start();
    assert!(
        soon(|| std::fs::read_to_string(&pidfile).is_ok_and(|t| t.trim() == target.pid.to_string())),
        "pid file"
    );
    assert!(soon(|| process::text(target.pid, "comm") == "bash\n"));
    assert_eq!(
        process::stat(target.pid).and_then(|s| s[1].parse().ok()),
        Some(restore.pid("ckpt-restore")),
        "parent"
    );
    kill(nix::unistd::Pid::from_raw(target.pid), Signal::SIGUSR1).expect("signal");
    let outcome = restore.wait();
    assert_eq!(outcome.code("ckpt-restore"), 42, "{outcome}");
}

#[test]
fn detached_root_belongs_to_nobody_here() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    target.end();
    let status = Command::new(tool("ckpt-restore"))
        .args(["--detach", "--pidfile"])
        .arg(target.path("pidfile"))
        .arg(target.path("img"))
        .status()
        .expect("run ckpt-restore");
    assert!(status.success());
    assert_eq!(
        std::fs::read_to_string(target.path("pidfile")).expect("read the pid file").trim(),
        target.pid.to_string()
    );
    target.passes("the restored one");
}
