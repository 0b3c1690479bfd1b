//! Memory that forked processes share copy-on-write: stored once with --share, and shared again by every restore.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use ckpt_images::ImageSet;
use ckpt_tests::{
    Pipeline, Random, Target,
    process::{self, pss},
    tool,
};
use nix::sys::signal::Signal;

use crate::increments::{How, Tracker, dump_so, same_as_live, sizes, stop};

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

/// A stage on directories of the target: words that begin with = are names of them.
fn stage(target: &Target, words: &str) -> Vec<std::ffi::OsString> {
    let word = |word: &str| match word.strip_prefix('=') {
        Some(name) => target.path(name).into_os_string(),
        None => word.into(),
    };
    words.split(' ').map(word).collect()
}

fn run(target: &Target, words: &str) {
    let _ = Pipeline::new(target.dir.path()).stage(stage(target, words)).run().ok(words);
}

fn go_on(target: &Target) {
    for pid in process::tree(target.pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGCONT);
    }
}

/// Forked, written to by either side, ended, orphaned, in any order between increments that store once what is shared:
/// every page of each, and of what is made of the chain, is compared with the memory of the processes.
#[test]
fn what_is_stored_once_in_a_chain_is_never_anothers() {
    let rounds: usize = std::env::var("CKPT_STORM_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(14);
    let mut random = Random::new("families");
    let target = Target::start_with("memory_family", &[&random.below(1 << 40).to_string()]);
    let tracker = Tracker::start(&target);
    let mut chain: Vec<String> = Vec::new();
    for round in 1..=rounds {
        target.signal(Signal::SIGUSR1);
        target.wait_log(&format!("round {round}"));
        let pids = process::tree(target.pid);
        pids.iter().for_each(|&pid| {
            if process::state(pid) != Some('Z') {
                stop(pid)
            }
        });
        let name = round.to_string();
        let how =
            How { stage: random.below(3) == 0, snapshot: random.below(2) == 0, share: random.below(6) > 0 };
        let parent = chain.last().filter(|_| random.below(12) > 0).cloned();
        if parent.is_none() {
            chain.clear();
        }
        let outcome = dump_so(&target, &tracker.address, &name, parent.as_deref(), how).ok("dump");
        assert!(!outcome.said.contains("is full"), "{how:?}: {outcome}");
        let (own, all) = same_as_live(&target.path(&name));
        println!("{name}: {} processes, {own} of {all} pages, {how:?}, on {parent:?}", pids.len());
        chain.push(name.clone());
        match random.below(6) {
            0 => run(&target, &format!("ckpt-merge ={name} =merged")),
            1 => {
                let base = &chain[usize::try_from(random.below(chain.len() as u64 - 1)).unwrap_or(0)];
                if *base != name {
                    run(&target, &format!("ckpt-merge --onto ={base} ={name} =merged"));
                }
            }
            2 => {
                run(&target, &format!("ckpt-merge --in-place ={name}"));
                chain.drain(..chain.len() - 1);
            }
            3 => {
                let _ = Pipeline::new(target.dir.path())
                    .stage(stage(&target, &format!("ckpt-read ={name}")))
                    .stage(stage(&target, "ckpt-write =merged"))
                    .run()
                    .ok("through a stream");
            }
            4 => run(&target, &format!("ckpt-merge --dedup ={name}")),
            _ => {}
        }
        same_as_live(&target.path(&name));
        if target.path("merged").exists() {
            same_as_live(&target.path("merged"));
            fs::remove_dir_all(target.path("merged")).expect("remove a directory");
        }
        run(&target, &format!("ckpt-show --verify ={name}"));
        go_on(&target);
    }
    target.end();
    target.restore_ok(&rounds.to_string());
    go_on(&target);
    target.signal(Signal::SIGUSR1);
    target.wait_log(&format!("round {}", rounds + 1));
    target.end();
}

/// Killed at any instant, `ckpt-merge --dedup` leaves the last checkpoint what it was; the others too, or they say that they
/// are not whole.
#[test]
fn killed_freeing_leaves_whole_checkpoints() {
    let rounds: usize = std::env::var("CKPT_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let mut random = Random::new("killed_freeing");
    let target = Target::start_with("memory_family", &["2"]);
    let tracker = Tracker::start(&target);
    for (number, name) in ["1", "2", "3", "4"].into_iter().enumerate() {
        target.signal(Signal::SIGUSR1);
        target.wait_log(&format!("round {}", number + 1));
        if name == "4" {
            process::tree(target.pid).into_iter().for_each(stop);
        }
        let parent = number.checked_sub(1).map(|_| number.to_string());
        let how = How { share: true, ..How::default() };
        let _ = dump_so(&target, &tracker.address, name, parent.as_deref(), how).ok("dump");
    }
    let (mut done, mut room) = (0, u64::MAX);
    for round in 0..rounds {
        let place = target.path(&format!("round{round}"));
        fs::create_dir(&place).expect("make a directory");
        for name in ["1", "2", "3", "4"] {
            let copy = Command::new("cp").arg("-a").arg(target.path(name)).arg(&place).status();
            assert!(copy.is_ok_and(|status| status.success()));
        }
        let mut child = Command::new(tool("ckpt-merge"))
            .arg("--dedup")
            .arg(place.join("4"))
            .stderr(Stdio::null())
            .spawn()
            .expect("start ckpt-merge");
        std::thread::sleep(Duration::from_micros(random.below(1_500_000)));
        done += usize::from(child.try_wait().expect("wait").is_some());
        let _ = child.kill();
        let _ = child.wait();
        same_as_live(&place.join("4"));
        for name in ["1", "2", "3"] {
            match ImageSet::from_chain(&place.join(name)) {
                Ok(set) => set.verify_pages().expect("whole"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("freed") || text.contains("should be there"), "{name}: {text}");
                }
            }
        }
        // What was cut short is done by the next.
        run(&target, &format!("ckpt-merge --dedup =round{round}/4"));
        same_as_live(&place.join("4"));
        room = room.min(["1", "2", "3", "4"].map(|name| size(&place.join(name))).iter().sum());
        fs::remove_dir_all(&place).expect("remove");
    }
    let all: u64 = ["1", "2", "3", "4"].map(|name| size(&target.path(name))).iter().sum();
    println!("{done} of {rounds} were done before they were killed; {room} bytes are left of {all}");
    assert!(room < all, "nothing was given back");
    target.end();
}

/// A family of workers is stored once in every checkpoint of a chain, and shares again whichever is restored, however.
#[test]
fn workers_share_again_from_any_link_of_a_chain() {
    const PAGES: u64 = 16 << 8;
    let target = Target::start_with("workers", &["-", "12", "16"]);
    let pids = process::tree(target.pid);
    let memory = pss(target.pid);
    let tracker = Tracker::start(&target);
    let chain = [None, Some("1"), Some("2"), Some("3")];
    for (name, parent) in ["1", "2", "3", "4"].into_iter().zip(chain) {
        let how = How { snapshot: name == "1", stage: name == "3", share: true };
        let outcome = dump_so(&target, &tracker.address, name, parent, how).ok("dump");
        assert!(!outcome.said.contains("is full"), "{outcome}");
        // All of them check everything in between, and write where they are: their stacks.
        target.passes("the target");
    }
    let stored: Vec<u64> = chain.iter().flatten().map(|name| sizes(&target.path(name)).0).collect();
    let own = |name: &str| size(&target.path(name)) / 4096;
    assert!(own("1") < PAGES + PAGES / 4, "{} pages in the first", own("1"));
    assert!(own("2") < PAGES / 4 && own("4") < PAGES / 4, "{stored:?}");
    let after = pss(target.pid);
    assert!(after <= memory * 21 / 20, "the dumps took pages apart: {after} KiB, it was {memory}");
    drop(tracker);
    end(&target, &pids);
    run(&target, "ckpt-merge =4 =full");
    run(&target, "ckpt-merge --onto =1 =4 =onto");
    let _ = Pipeline::new(target.dir.path())
        .stage(stage(&target, "ckpt-read =4"))
        .stage(stage(&target, "ckpt-write --compress lz4 =read"))
        .run()
        .ok("through a stream");
    assert!(own("full") < PAGES + PAGES / 4, "{} pages are merged", own("full"));
    assert!(own("onto") < PAGES / 4, "{} pages are merged onto the first", own("onto"));
    let restored = |what: &str| {
        let after = pss(target.pid);
        assert!(after <= memory * 11 / 10, "{what}: {after} KiB, it was {memory}");
        target.passes(what);
        end(&target, &pids);
    };
    for name in ["1", "3", "4", "full", "onto", "read"] {
        target.restore_ok(name);
        restored(name);
    }
    let _ = Pipeline::new(target.dir.path())
        .stage(stage(&target, "ckpt-read =4"))
        .stage(["ckpt-restore", "--detach"])
        .run()
        .ok("restore from a stream");
    restored("from a stream");
    run(&target, "ckpt-restore --lazy --detach =4");
    target.passes("the lazy one");
}

/// `ckpt series --share`, with full ones made ahead or not: each that is kept is small, and shares again.
#[test]
fn a_series_of_workers_is_stored_once() {
    const PAGES: u64 = 8 << 8;
    for more in ["--compress lz4", "--pre-dump"] {
        let target = Target::start_with("workers", &["-", "8", "8"]);
        let pids = process::tree(target.pid);
        let memory = pss(target.pid);
        let pid = target.pid;
        run(
            &target,
            &format!(
                "ckpt-series -t {pid} -D =series --share --every 20ms --count 6 --full-every 4 --keep 3 {more}"
            ),
        );
        target.passes("the target");
        end(&target, &pids);
        let names = fs::read_dir(target.path("series")).expect("list").flatten().map(|entry| entry.path());
        for dir in names {
            let stored = size(&dir) / 4096;
            assert!(stored < PAGES + PAGES / 4, "{more}: {stored} pages in {}", dir.display());
        }
        for name in ["series/000004", "series/000006"] {
            run(&target, &format!("ckpt-show --verify ={name}"));
            target.restore_ok(name);
            let after = pss(target.pid);
            assert!(after <= memory * 11 / 10, "{more} {name}: {after} KiB, it was {memory}");
            target.passes(name);
            end(&target, &pids);
        }
    }
}
