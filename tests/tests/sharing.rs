//! Memory that forked processes share copy-on-write: stored once with --share, and shared again by every restore.

use std::{fs, path::Path};

use ckpt_tests::{
    Pipeline, Target,
    process::{self, pss},
};

fn size(dir: &Path) -> u64 {
    fs::read_dir(dir).expect("list images").flatten().map(|f| f.metadata().map_or(0, |m| m.len())).sum()
}

fn dump(target: &Target, options: &[&str], name: &str) {
    let _ = target.dumping(name, options, &[]).run().ok("dump");
}

fn end(target: &Target, pids: &[i32]) {
    target.end();
    process::wait_free(pids);
}

#[test]
fn forked_workers_share_again_and_are_stored_once() {
    let target = Target::start_with("workers", &["-", "20", "64"]);
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let (memory, mib) = (pss(target.pid), 64 << 20);
    dump(&target, &["--share"], "once");
    dump(&target, &["--share", "--snapshot"], "once-snapshot");
    let line = format!("ckpt-scan --no-mem -t {} | ckpt-mem --share --snapshot | ckpt-sk", target.pid);
    let stage =
        Pipeline::new(target.dir.path()).line(&line).stage(["ckpt-write".into(), target.path("once-stage")]);
    let outcome = stage.run().ok("dump with ckpt-mem");
    assert!(!outcome.said.contains("no snapshot"), "{outcome}");
    dump(&target, &[], "each");
    target.unchanged(&before);
    let after = pss(target.pid);
    assert!(after <= memory * 21 / 20, "the dumps took pages apart: {after} KiB, it was {memory}");
    assert!(size(&target.path("once")) < mib + mib / 5, "{} bytes", size(&target.path("once")));
    assert!(size(&target.path("once-snapshot")) < mib + mib / 5);
    assert!(size(&target.path("once-stage")) < mib + mib / 5);
    assert!(size(&target.path("each")) > mib * 20);
    let merge = Pipeline::new(target.dir.path()).stage([
        "ckpt-merge".into(),
        target.path("once"),
        target.path("merged"),
    ]);
    let _ = merge.run().ok("merge");
    assert!(size(&target.path("merged")) < mib + mib / 5, "{} bytes", size(&target.path("merged")));
    end(&target, &pids);
    for name in ["once", "once-snapshot", "once-stage", "merged", "each"] {
        target.restore_ok(name);
        let after = pss(target.pid);
        assert!(after <= memory * 11 / 10, "{name}: {after} KiB, it was {memory}");
        target.looks_like(&before);
        target.passes("the restored one");
        end(&target, &pids);
    }
    // From a stream that says what is the same.
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("once")])
        .stage(["ckpt-restore", "--detach"])
        .run()
        .ok("restore from a stream");
    let after = pss(target.pid);
    assert!(after <= memory * 11 / 10, "stream: {after} KiB, it was {memory}");
    target.passes("the restored one");
    // What was shared can be shared once more.
    dump(&target, &["--share"], "again");
    assert!(size(&target.path("again")) < mib + mib / 5, "{} bytes", size(&target.path("again")));
}

#[test]
fn processes_that_share_nothing_are_stored_as_before() {
    let target = Target::start("attacked");
    let pids = process::tree(target.pid);
    dump(&target, &["--share"], "img");
    end(&target, &pids);
    target.restore_ok("img");
    target.passes("the restored one");
}
