//! What the tools need from the kernel's rules: few capabilities, of which a missing one is named, and small limits
//! on resources, which end in an error or in nothing at all. The target never notices.

use std::{
    ffi::OsString,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::Command,
};

use ckpt_tests::{Outcome, Pipeline, Target, TestDir, installed, process, skip, tool, workload};

/// Somebody with no privileges.
const USER: u32 = 65534;

/// Words that run a program as `USER` with these capabilities only (commas between, each with its `+`).
fn as_user(caps: &str) -> Vec<OsString> {
    let (uid, gid) = (format!("--reuid={USER}"), format!("--regid={USER}"));
    let (inheritable, ambient) = (format!("--inh-caps=-all{caps}"), format!("--ambient-caps=-all{caps}"));
    words(&["setpriv", &uid, &gid, "--clear-groups", &inheritable, &ambient])
}

/// Words that run a program as root with these capabilities only.
fn as_root(caps: &str) -> Vec<OsString> {
    words(&["setpriv", "--inh-caps=-all", &format!("--bounding-set=-all{caps}")])
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}

/// Runs stages, each behind the words for it.
fn run(dir: &Path, stages: Vec<(&str, Vec<OsString>, Vec<OsString>)>) -> Outcome {
    let mut pipeline = Pipeline::new(dir);
    for (name, before, args) in stages {
        let program = tool(name).into_os_string();
        pipeline = pipeline.program(name, before.into_iter().chain([program]).chain(args));
    }
    pipeline.run()
}

/// A dump to DIR/img where all stages, or those of one name, run behind `before`.
fn dump(target: &Target, before: &[OsString], which: Option<&str>) -> Outcome {
    let mine = |name| if which.is_none_or(|which| which == name) { before.to_vec() } else { Vec::new() };
    let pid = target.pid.to_string();
    run(
        target.dir.path(),
        vec![
            ("ckpt-scan", mine("ckpt-scan"), vec!["-t".into(), pid.into()]),
            ("ckpt-sk", mine("ckpt-sk"), vec![]),
            ("ckpt-write", mine("ckpt-write"), vec![target.path("img").into()]),
        ],
    )
}

fn restore(target: &Target, before: &[OsString]) -> Outcome {
    let args = vec!["--detach".into(), target.path("img").into()];
    run(target.dir.path(), vec![("ckpt-restore", before.to_vec(), args)])
}

/// Nothing beside DIR/img that a failed dump could leave.
fn assert_clean(target: &Target, context: &str, outcome: &Outcome) {
    let names = std::fs::read_dir(target.dir.path()).expect("list").flatten();
    let left: Vec<_> =
        names.map(|f| f.file_name()).filter(|n| n.as_encoded_bytes().starts_with(b".")).collect();
    assert!(left.is_empty(), "{context}: {left:?} is left: {outcome}");
}

/// A program of `USER`, in a directory of his; `None` if he can't get there.
fn target_of_user(test: &str, name: &str) -> Option<Target> {
    if !installed("setpriv") {
        skip(test, "no setpriv");
        return None;
    }
    let dir = TestDir::new(name);
    chown(dir.path(), Some(USER), Some(USER)).expect("chown the directory");
    let program = dir.path().join(name);
    std::fs::copy(workload::compile(name), &program).expect("copy the workload");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let user = as_user("");
    let can = |program: &Path| {
        let status = Command::new(&user[0]).args(&user[1..]).args(["test", "-x"]).arg(program).status();
        status.is_ok_and(|s| s.success())
    };
    if !can(&program) || !can(&tool("ckpt-scan")) {
        skip(test, "other users can't reach the directory of the tests");
        return None;
    }
    let mut command = Command::new(&user[0]);
    command.args(&user[1..]).arg(&program).arg(dir.path().join("log"));
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    chown(target.path("output"), Some(USER), Some(USER)).expect("chown its output");
    Some(target)
}

/// CAP_CHECKPOINT_RESTORE, which was made for this, is all that users need for programs of their own.
#[test]
fn user_with_cap_checkpoint_restore_alone_dumps_and_restores() {
    let test = "user_with_cap_checkpoint_restore_alone_dumps_and_restores";
    let Some(target) = target_of_user(test, "attacked") else { return };
    let before = target.at_rest();
    let _ = dump(&target, &as_user(""), None).fails("ckpt-scan", 3, &["CAP_CHECKPOINT_RESTORE"]);
    target.unchanged(&before);
    let user = as_user(",+checkpoint_restore");
    let _ = dump(&target, &user, None).ok("dump as a user");
    target.unchanged(&before);
    target.passes("the target");
    target.end();
    let _ = restore(&target, &as_user("")).fails("ckpt-restore", 3, &["CAP_CHECKPOINT_RESTORE"]);
    let _ = restore(&target, &user).ok("restore as a user");
    target.passes("the restored one");
}

/// Root does with a few capabilities, and is told which one is missing.
#[test]
fn missing_capabilities_are_named() {
    let Some(target) = target_of_user("missing_capabilities_are_named", "attacked") else { return };
    let before = target.at_rest();
    let attack = |caps: &[&str], run: &mut dyn FnMut(&[OsString]) -> Outcome| {
        let set = |caps: &[&str]| as_root(&caps.iter().map(|cap| format!(",+{cap}")).collect::<String>());
        for missing in caps {
            let rest: Vec<&str> = caps.iter().copied().filter(|cap| cap != missing).collect();
            let outcome = run(&set(&rest)).sane();
            let name = format!("CAP_{}", missing.to_uppercase());
            assert!(outcome.stages.iter().all(|(_, status)| !status.success()), "without {name}: {outcome}");
            assert!(outcome.said.contains(&name), "{name} is not named: {outcome}");
            assert_clean(&target, &name, &outcome);
            assert!(process::marked(target.dir.path()).len() != 1, "half a tree is left: {outcome}");
        }
        let _ = run(&set(caps)).ok("with all that is needed");
    };
    attack(&["sys_ptrace", "checkpoint_restore", "dac_override", "kill"], &mut |before| {
        dump(&target, before, None)
    });
    target.unchanged(&before);
    target.passes("the target");
    target.end();
    let caps = ["sys_ptrace", "checkpoint_restore", "dac_override", "setuid", "setgid"];
    attack(&caps, &mut |before| restore(&target, before));
    target.passes("the restored one");
}

/// Limits that a tool can live with, and others that it can't.
#[test]
fn small_limits_are_lived_with_or_told() {
    if !installed("prlimit") {
        return skip("small_limits_are_lived_with_or_told", "no prlimit");
    }
    let target = Target::start("attacked");
    let before = target.at_rest();
    // What a limit makes of each stage: nothing, or these words.
    let fine = "";
    let cases = [
        ("--nofile=20:256", [fine; 3]),
        ("--nofile=6", ["Too many open files", fine, "Too many open files"]),
        ("--as=100000000", [fine; 3]),
        ("--fsize=65536", [fine, fine, "File too large"]),
        ("--fsize=0", [fine, fine, "File too large"]),
        ("--stack=131072:", [fine; 3]),
        ("--memlock=0", [fine; 3]),
        ("--sigpending=0", [fine; 3]),
        ("--msgqueue=0", [fine; 3]),
    ];
    // What the tests themselves were started with is not counted.
    let close: String = (3..=9).map(|fd| format!(" {fd}>&-")).collect();
    let limited =
        |limit: &str| words(&["sh", "-c", &format!("exec{close}; exec \"$@\""), "sh", "prlimit", limit]);
    for (limit, expected) in cases {
        for (stage, words) in ["ckpt-scan", "ckpt-sk", "ckpt-write"].into_iter().zip(expected) {
            let context = format!("{stage} with {limit}");
            let outcome = dump(&target, &limited(limit), Some(stage)).sane();
            let img = target.path("img");
            assert_eq!(img.exists(), words == fine, "{context}: {outcome}");
            assert!(outcome.said.contains(words), "{context}: {outcome}");
            assert_clean(&target, &context, &outcome);
            target.unchanged(&before);
            if img.exists() {
                std::fs::remove_dir_all(img).expect("remove the images");
            }
        }
    }
    target.passes("the target");
    target.dump_ok("img");
    target.end();
    for limit in ["--nofile=6", "--fsize=0", "--as=1000000"] {
        let outcome = restore(&target, &limited(limit));
        assert_ne!(outcome.code("ckpt-restore"), 0, "{limit}: {outcome}");
        assert_eq!(process::marked(target.dir.path()), Vec::<i32>::new(), "{limit}: {outcome}");
    }
    for limit in ["--nofile=20:", "--stack=131072:", "--as=100000000:"] {
        let _ = restore(&target, &limited(limit)).ok(limit);
        target.passes(limit);
        target.end();
    }
}
