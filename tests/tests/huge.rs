//! Memory of huge pages (hugetlbfs): every kind of it, every way to store it, and a pool that is too small.

use std::process::Command;

use ckpt_tests::{
    Outcome, Pipeline, Target, TestDir,
    hugepages::{self, HugeFiles, HugePages},
    installed, process,
};

use crate::increments::{Tracker, dump_ok};

/// Deleted files of whole huge pages are larger than is stored without being asked.
const GHOSTS: &[&str] = &["--ghost-limit", "16777216"];

/// What tells a workload that it may have huge pages: the pool is this test's.
const HAVE: &[&str] = &["-", "huge"];

/// A checkpoint NAME by `scan`, further `stages`, and ckpt-write with `write`.
fn dump(target: &Target, name: &str, scan: &[&str], stages: &[&str], write: &[&str]) {
    let pid = target.pid.to_string();
    let mut pipeline = Pipeline::new(target.dir.path()).stage(["ckpt-scan", "-t", &pid].iter().chain(scan));
    for stage in stages {
        pipeline = pipeline.stage([*stage]);
    }
    let words = ["ckpt-write"].iter().chain(write).map(Into::into);
    let _ = pipeline.stage(words.chain([target.path(name).into_os_string()])).run().ok(name);
}

fn restore(target: &Target, name: &str, options: &[&str]) -> Outcome {
    let words = ["ckpt-restore", "--detach"].iter().chain(options).map(Into::into);
    Pipeline::new(target.dir.path()).stage(words.chain([target.path(name).into_os_string()])).run()
}

/// Checkpoints it in every way, and restores each.
fn survives_every_way(target: &Target, options: &[&str]) {
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    assert!(process::text(target.pid, "smaps").contains(" ht "), "no huge pages");
    type Way = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str]);
    const WAYS: &[Way] = &[
        ("plain", &[], &["ckpt-sk"], &[]),
        ("snapshot", &["--snapshot"], &["ckpt-sk"], &[]),
        ("once", &["--share"], &["ckpt-sk"], &[]),
        ("packed", &[], &["ckpt-sk"], &["--compress", "lz4"]),
        ("staged", &["--no-mem"], &["ckpt-mem", "ckpt-sk"], &[]),
    ];
    for (name, scan, stages, write) in WAYS {
        dump(target, name, &[scan, options].concat(), stages, write);
        target.unchanged(&before);
    }
    let in_use = hugepages::in_use();
    target.end();
    process::wait_free(&pids);
    let ends = |how: &str| {
        target.looks_like(&before);
        // What forked processes share may be two of them now, unless it was stored once.
        let now = hugepages::in_use();
        let more = u64::from(how != "once");
        assert!(now <= in_use + more, "{how}: {now} pages in use, had {in_use}");
        target.passes(how);
        target.end();
        process::wait_free(&pids);
    };
    for (name, ..) in WAYS {
        for lazy in [&[][..], &["--lazy"]] {
            let _ = restore(target, name, lazy).ok(name);
            ends(name);
        }
    }
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("plain")])
        .stage(["ckpt-restore", "--detach"])
        .run()
        .ok("from a stream");
    ends("from a stream");
}

#[test]
fn shared_huge_pages_survive() {
    let Some(_pool) = HugePages::take("shared huge pages", 32) else { return };
    let target = Target::start_with("huge_shared", HAVE);
    survives_every_way(&target, &[]);
    if installed("crit") {
        let images = target.path("plain");
        let crit = |image: &str| {
            let out = Command::new("crit").arg("show").arg(images.join(image)).output();
            String::from_utf8_lossy(&out.expect("run crit").stdout).into_owned()
        };
        let memfds = crit("memfd.img");
        for flag in [4_u32 | 21 << 26, 4 | 30 << 26] {
            assert!(memfds.contains(&format!("\"hugetlb_flag\": {flag}")), "{memfds}");
        }
    } else {
        ckpt_tests::skip("shared huge pages with crit", "crit is not installed");
    }
}

#[test]
fn private_huge_pages_survive() {
    let Some(_pool) = HugePages::take("private huge pages", 16) else { return };
    let target = Target::start_with("memory_huge", HAVE);
    survives_every_way(&target, &[]);
}

#[test]
fn files_of_huge_pages_survive() {
    let Some(_pool) = HugePages::take("files of huge pages", 24) else { return };
    let Some(files) = HugeFiles::mount("files of huge pages") else { return };
    let dir = files.path();
    let target = Target::start_with("huge_files", &["-", &dir.to_string_lossy()]);
    let _ = target.dump("refused").fails("ckpt-scan", 3, &["a deleted file of", "--ghost-limit"]);
    survives_every_way(&target, GHOSTS);
    // The file system is somewhere else.
    assert!(files.unmount());
    std::fs::write(dir.join("named"), "").expect("another file in its place");
    std::fs::File::options()
        .write(true)
        .open(dir.join("named"))
        .and_then(|f| f.set_len(8 << 20))
        .expect("of its size");
    let words = ["of pages of 2097152 bytes", "one of ordinary pages", "mount there"];
    let _ = target.restore("plain").fails("ckpt-restore", 3, &words);
    assert!(process::is_free(target.pid));
}

/// A mapping of a file that has not got such pages any more would be another one.
#[test]
fn an_ordinary_file_in_the_place_of_one_of_huge_pages_is_refused() {
    const MAPS: &str = "import mmap, os, signal, sys
f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(f, 2 << 20)
m = mmap.mmap(f, 2 << 20)
m[0] = 1
os.close(f)
open(sys.argv[2], 'a').write('ready')
signal.pause()";
    let Some(_pool) = HugePages::take("a file of huge pages", 4) else { return };
    let Some(files) = HugeFiles::mount("a file of huge pages") else { return };
    let (dir, file) = (TestDir::new("mapped"), files.path().join("file"));
    let mut python = Command::new("python3");
    python.args(["-c", MAPS]).args([&file, &dir.path().join("log")]);
    let target = Target::spawn(dir, python);
    target.wait_log("ready");
    target.dump_ok("img");
    let pids = process::tree(target.pid);
    target.end();
    process::wait_free(&pids);
    assert!(files.unmount());
    std::fs::File::create(&file).and_then(|file| file.set_len(2 << 20)).expect("an ordinary file");
    let words = ["the file there is not of huge pages", "mount the hugetlbfs"];
    let _ = target.restore("img").fails("ckpt-restore", 3, &words);
    assert!(process::is_free(target.pid));
}

/// Of huge pages an increment has what was written, and a hole where there is none any more.
#[test]
fn increments_of_huge_pages_restore() {
    let Some(_pool) = HugePages::take("increments of huge pages", 32) else { return };
    for name in ["memory_huge", "huge_shared"] {
        let target = Target::start_with(name, HAVE);
        let pids = process::tree(target.pid);
        let before = target.at_rest();
        let tracker = Tracker::start(&target);
        for (name, parent) in [("1", None), ("2", Some("1")), ("3", Some("2"))] {
            dump_ok(&target, &tracker.address, name, parent);
        }
        // A pre-dump leaves them to the checkpoint, although they are tracked by now.
        dump(&target, "ahead", &["--track", &tracker.address, "--pre-dump"], &[], &[]);
        dump_ok(&target, &tracker.address, "4", Some("ahead"));
        drop(tracker);
        target.unchanged(&before);
        target.end();
        process::wait_free(&pids);
        let words = ["ckpt-merge".into(), target.path("3"), target.path("merged")];
        let _ = Pipeline::new(target.dir.path()).stage(words).run().ok("ckpt-merge");
        for checkpoint in ["3", "4", "merged"] {
            target.restore_ok(checkpoint);
            target.looks_like(&before);
            target.passes(checkpoint);
            target.end();
            process::wait_free(&pids);
        }
    }
}

/// What a machine lacks is told, with what to do about it, and nothing of the tree is there.
#[test]
fn too_few_huge_pages_are_told() {
    let Some(pool) = HugePages::take("too few huge pages", 32) else { return };
    let Some(files) = HugeFiles::mount("too few huge pages") else { return };
    let dir = files.path();
    for (name, enough) in [("memory_huge", 5), ("huge_shared", 14), ("huge_files", 16)] {
        let files = dir.to_string_lossy();
        let args = ["-", if name == "huge_files" { &files } else { "huge" }];
        let target = Target::start_with(name, &args);
        let pids = process::tree(target.pid);
        dump(&target, "img", GHOSTS, &["ckpt-sk"], &[]);
        target.end();
        process::wait_free(&pids);
        // Until there are as many as it takes, whatever it is that does not fit.
        let mut refusals = 0;
        let needs = (0..=enough).find(|&count| {
            assert!(pool.resize(count), "{name}: the pool can't have {count} pages");
            for lazy in [&[][..], &["--lazy"]] {
                let outcome = restore(&target, "img", lazy);
                if outcome.code("ckpt-restore") == 0 {
                    return true;
                }
                let _ =
                    outcome.fails("ckpt-restore", 3, &["too few huge pages of 2048 KiB", "vm.nr_hugepages"]);
                assert!(
                    pids.iter().all(|&pid| process::is_free(pid)),
                    "{name}: some of it is there with {count} pages"
                );
                refusals += 1;
            }
            false
        });
        assert!(needs.is_some_and(|n| n > 2) && refusals > 4, "{name}: {needs:?} pages, {refusals} refusals");
        target.passes(name);
        target.end();
        process::wait_free(&pids);
        assert!(pool.resize(32));
    }
}

/// A copy-on-write copy would end a program that has no huge page left for a copy.
#[test]
fn a_snapshot_takes_no_huge_pages() {
    let Some(_pool) = HugePages::take("snapshots and huge pages", 12) else { return };
    let target = Target::start_with("huge_tight", HAVE);
    let pids = process::tree(target.pid);
    for name in ["1", "2", "3"] {
        let outcome = target.dumping(name, &["--snapshot"], &[]).run().ok("dump --snapshot");
        assert_eq!(process::tree(target.pid), pids, "one of them has ended");
        assert!(outcome.said.contains("no snapshot: it has private memory of huge pages"), "{outcome}");
    }
    target.passes("the target");
    target.end();
    process::wait_free(&pids);
    target.restore_ok("3");
    target.passes("the restored one");
    target.end();
}
