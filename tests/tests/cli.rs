//! Command lines: exit statuses, `--help`, and pipelines of other shapes that give the same images.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use ckpt_tests::{Pipeline, Target, TestDir, installed, process, skip, tool};

pub(crate) const TOOLS: &[&str] = &[
    "ckpt-scan",
    "ckpt-mem",
    "ckpt-track",
    "ckpt-series",
    "ckpt-sk",
    "ckpt-write",
    "ckpt-read",
    "sk-rewrite",
    "ckpt-restore",
    "ckpt-show",
    "ckpt-encode",
    "ckpt-merge",
    "ckpt-check",
    "ckpt",
];

#[test]
fn help_fits_a_screen_and_has_examples() {
    for name in TOOLS {
        let output = Command::new(tool(name)).arg("--help").output().expect("run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name}");
        assert!(text.lines().count() <= 50, "{name} --help has {} lines", text.lines().count());
        assert!(text.contains("Example"), "{name} --help has no examples:\n{text}");
    }
}

#[test]
fn wrong_usage_is_status_2() {
    for name in TOOLS {
        let status = Command::new(tool(name))
            .arg("--no-such-option")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert_eq!(status.expect("run").code(), Some(2), "{name}");
    }
}

#[test]
fn a_process_that_is_not_there_is_named() {
    let dir = TestDir::new("nobody");
    let outcome = Pipeline::new(dir.path()).line("ckpt-scan -t 4194303").run();
    let _ = outcome.fails("ckpt-scan", 1, &["ckpt-scan: ", "4194303"]);
}

#[test]
fn missing_directory_is_named() {
    let dir = TestDir::new("nowhere");
    for line in ["ckpt-restore --detach", "ckpt-read", "ckpt-show"] {
        let name = line.split(' ').next().unwrap_or_default();
        let outcome = Pipeline::new(dir.path()).line(&format!("{line} /no/such/directory")).run();
        let _ = outcome.fails(name, 1, &["/no/such/directory"]);
    }
    // In the foreground the status is the restored root's, so failures have one of their own.
    let _ = Pipeline::new(dir.path()).line("ckpt-restore /no/such/directory").run().fails(
        "ckpt-restore",
        125,
        &[],
    );
}

#[test]
fn check_reports_what_is_there() {
    let dir = TestDir::new("check");
    let outcome = Pipeline::new(dir.path()).line("ckpt-check").run();
    assert!([0, 3].contains(&outcome.code("ckpt-check")), "{outcome}");
    let report = fs::read_to_string(dir.path().join("stdout")).expect("read the report");
    for word in ["PAGEMAP_SCAN", "clone3"] {
        assert!(report.contains(word), "no {word} in\n{report}");
    }
}

/// Contents of a directory, decoded by nobody.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .expect("list images")
        .flatten()
        .map(|f| (f.file_name().to_string_lossy().into_owned(), fs::read(f.path()).expect("read an image")))
        .collect()
}

/// Whether the same but for a few words: a thread's rseq area holds the CPU that it ran on last.
fn nearly(a: Option<&Vec<u8>>, b: Option<&Vec<u8>>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return false };
    a.len() == b.len() && a.iter().zip(b).filter(|(x, y)| x != y).count() <= 64
}

/// Files that differ. What tells the time of the dump differs rightly.
fn differing(a: &Path, b: &Path) -> Vec<String> {
    let (a, b) = (contents(a), contents(b));
    let mut names: Vec<String> = a.keys().chain(b.keys()).cloned().collect();
    names.sort();
    names.dedup();
    names.retain(|n| {
        a.get(n) != b.get(n)
            && !["inventory.img", "ckpt-manifest.img", "stats-dump"].contains(&n.as_str())
            && !n.starts_with("timens-")
    });
    names.retain(|n| !(n.starts_with("pages-") && nearly(a.get(n), b.get(n))));
    names
}

#[test]
fn pass_through_stages_change_nothing() {
    // At a standstill, so that two dumps see the same.
    let target = Target::start("signals_pending");
    target.signal(nix::sys::signal::Signal::SIGSTOP);
    assert!(ckpt_tests::soon(|| process::state(target.pid) == Some('T')));
    let reference = target.dump_ok("reference");
    let pid = target.pid;
    let mut shapes = vec![
        ("again", format!("ckpt-scan -t {pid} | ckpt-sk")),
        ("cats", format!("ckpt-scan -t {pid} | cat | ckpt-sk | cat")),
        ("mem", format!("ckpt-scan --no-mem -t {pid} | ckpt-mem | ckpt-sk")),
        ("mem after sk", format!("ckpt-scan --no-mem -t {pid} | ckpt-sk | cat | ckpt-mem")),
        ("no sk", format!("ckpt-scan -t {pid}")),
        ("twice", format!("ckpt-scan -t {pid} | ckpt-sk | ckpt-sk")),
    ];
    if installed("zstd") {
        shapes.push(("zstd", format!("ckpt-scan -t {pid} | zstd -1 -q | zstd -d -q | ckpt-sk")));
    } else {
        skip("pass_through_stages_change_nothing", "no zstd");
    }
    for (name, line) in shapes {
        let path = target.path(name);
        let _ = Pipeline::new(target.dir.path())
            .line(&line)
            .stage(["ckpt-write".into(), path.clone()])
            .run()
            .ok(&line);
        assert_eq!(differing(&reference, &path), Vec::<String>::new(), "{line}");
    }
    // From the directory and back into one.
    let copy = target.path("copy");
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), reference.clone()])
        .stage(["cat"])
        .stage(["ckpt-write".into(), copy.clone()])
        .run()
        .ok("ckpt-read | ckpt-write");
    assert_eq!(differing(&reference, &copy), Vec::<String>::new(), "ckpt-read | ckpt-write");
}

#[test]
fn socket_stage_is_asked_for_when_it_is_missing() {
    let target = Target::start("socketpairs");
    let pid = target.pid.to_string();
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(["ckpt-write".into(), target.path("img")])
        .run();
    assert!(!target.path("img").exists());
    assert_ne!(outcome.code("ckpt-write"), 0, "{outcome}");
    assert!(outcome.said.contains("ckpt-sk"), "{outcome}");
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "--no-mem", "-t", &pid])
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), target.path("img")])
        .run();
    assert!(!target.path("img").exists());
    assert!(outcome.said.contains("ckpt-mem"), "{outcome}");
    target.passes("the target");
}

#[test]
fn driver_runs_the_pipelines_and_prints_them() {
    let target = Target::start("attacked");
    let pid = target.pid.to_string();
    let outcome = Pipeline::new(target.dir.path())
        .stage([
            "ckpt".into(),
            "-x".into(),
            "dump".into(),
            "-t".into(),
            pid.clone().into(),
            "-D".into(),
            target.path("img").into_os_string(),
        ])
        .run()
        .ok("ckpt dump");
    assert!(
        outcome.said.contains("ckpt-scan")
            && outcome.said.contains('|')
            && outcome.said.contains("ckpt-write"),
        "{outcome}"
    );
    target.passes("the original");
    target.end();
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt".into(), "restore".into(), "--detach".into(), "-D".into(), target.path("img")])
        .run()
        .ok("ckpt restore");
    target.passes("the restored one");
    // As git does: `ckpt foo` is `ckpt-foo`.
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt".into(), "show".into(), target.path("img")])
        .run()
        .ok("ckpt show");
}

#[test]
fn restore_reads_a_stream() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    target.end();
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("img")])
        .stage(["cat"])
        .stage(["ckpt-restore", "--detach"])
        .run()
        .ok("restore from a stream");
    target.passes("the restored one");
}

#[test]
fn show_head_is_success_and_jq_round_trips() {
    let target = Target::start("signals_pending");
    target.dump_ok("img");
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-show".into(), target.path("img")])
        .stage(["head", "-n", "3"])
        .run();
    assert_eq!(outcome.code("ckpt-show"), 0, "{outcome}");
    let core = target.path("img").join(format!("core-{}.img", target.pid));
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-show".into(), core.clone()])
        .stage(["ckpt-encode", "--image"])
        .output(fs::File::create(target.path("core")).expect("make a file"))
        .run()
        .ok("ckpt-show | ckpt-encode");
    assert_eq!(fs::read(core).expect("read"), fs::read(target.path("core")).expect("read"));
}

/// No directory at all: from one process into its copy beside it.
#[test]
fn stream_goes_straight_into_a_copy() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    let pidfile = target.path("pidfile");
    let pid = target.pid.to_string();
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(["ckpt-sk"])
        .stage([
            "ckpt-restore".into(),
            "--detach".into(),
            "--new-pidns".into(),
            "--pidfile".into(),
            pidfile.clone(),
        ])
        .run()
        .ok("ckpt-scan | ckpt-sk | ckpt-restore --new-pidns");
    let copy: i32 = fs::read_to_string(&pidfile).expect("read the pid file").trim().parse().expect("a pid");
    target.unchanged(&before);
    target.passes("the original");
    assert_eq!(target.verdict_by(copy), "PASS", "the copy");
}

/// `--help` aside, stdout carries the product only: a dump to a terminal or a plain file says nothing there.
#[test]
fn messages_go_to_stderr() {
    let target = Target::start("signals_pending");
    let _ = target.dump("img").ok("dump");
    assert_eq!(fs::read(target.path("stdout")).expect("read stdout"), b"");
}

/// The standard library would put /dev/null in its place, and numbers that somebody relies on would be gone.
#[test]
fn a_closed_standard_output_is_refused() {
    for (tool_name, args) in [("ckpt-series", "-t 1 -D d --count 1"), ("ckpt-check", ""), ("ckpt-read", "d")]
    {
        let dir = TestDir::new("closed");
        let line = format!("exec {} {args} >&-", tool(tool_name).display());
        let output = Command::new("sh").args(["-c", &line]).current_dir(dir.path()).output().expect("run");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("standard output is closed"), "{said}");
        assert!(!dir.path().join("d").exists(), "{tool_name} has begun");
    }
}
