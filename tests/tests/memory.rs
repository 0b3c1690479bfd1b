//! Memory of all kinds.

use ckpt_sys::sysv;
use ckpt_tests::{Pipeline, Target, process};

use crate::increments::{Tracker, dump_ok};

crate::survives! {
    private_memory_keeps_bytes_and_holes: "memory_private";
    file_mappings_keep_own_pages_and_stay_shared: "memory_file";
    shared_memory_stays_shared_between_three_generations: "memory_shared";
    heap_and_stack_grow_after_restore: "memory_growth";
    mlock_and_madvise_still_hold: "memory_flags";
    guard_regions_stay_where_they_are: "memory_guards";
    system_v_shared_memory_comes_back_under_its_id: "sysv_shm";
    vdso_tells_time_after_restore: "memory_vdso";
    full_address_space_has_room_for_a_checkpoint: "address_space_full";
}

/// A terabyte of which 10 MiB are there is stored, and comes back, as 10 MiB.
#[test]
fn a_sparse_terabyte_costs_what_is_in_it() {
    let target = Target::start("memory_sparse");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let img = target.dump_ok("img");
    target.unchanged(&before);
    let size: u64 = std::fs::read_dir(&img)
        .expect("list images")
        .flatten()
        .map(|f| f.metadata().map_or(0, |m| m.len()))
        .sum();
    assert!(size < 12 << 20, "{size} bytes of images for 10 MiB");
    let _ = target.dumping("snapshot", &["--snapshot"], &[]).run().ok("dump --snapshot");
    target.passes("the target");
    target.end();
    process::wait_free(&pids);
    for name in ["img", "snapshot"] {
        target.restore_ok(name);
        target.passes("the restored one");
        target.end();
        process::wait_free(&pids);
    }
}

/// Pages of a large process are written into the writer's file by the one who reads them, unless there is a stage of which
/// nobody knows what it does.
#[test]
fn pages_are_sent_only_past_strangers() {
    let target = Target::start_with("memory_hog", &["-", "48"]);
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let pid = target.pid.to_string();
    for (name, strangers, all) in [("placed", &[][..], true), ("sent", &["cat"], false)] {
        let (img, stats) = (target.path(name), target.path(&format!("{name}.json")));
        let mut pipeline =
            Pipeline::new(target.dir.path()).stage(["ckpt-scan", "-t", &pid]).stage(["ckpt-sk"]);
        for stranger in strangers {
            pipeline = pipeline.stage([*stranger]);
        }
        let write = ["ckpt-write".into(), "--stats".into(), stats.clone(), img.clone()];
        let _ = pipeline.stage(write).run().ok("dump");
        target.unchanged(&before);
        let stats: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&stats).expect("read the figures")).expect("JSON");
        let count = |what: &str| stats["pages"][what].as_u64().expect("a number");
        // The first few may be sent before the writer has said where they belong.
        assert_eq!(count("placed") > count("written") / 2, all, "{stats}");
        assert_eq!(count("placed") > 0, all, "{stats}");
        let _ = Pipeline::new(target.dir.path())
            .stage(["ckpt-show".into(), "--verify".into(), img])
            .run()
            .ok("ckpt-show --verify");
    }
    let files = ["placed", "sent"].map(|name| target.path(name).join("pages-1.img"));
    let [placed, sent] = files.map(|file| std::fs::read(file).expect("read pages"));
    assert_eq!(placed.len(), sent.len());
    assert!(placed.len() > 48 << 20);
    target.end();
    process::wait_free(&pids);
    target.restore_ok("placed");
    target.passes("the restored one");
    target.end();
}

#[test]
fn images_of_sparse_memory_are_small() {
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let size: u64 = std::fs::read_dir(&img)
        .expect("list images")
        .flatten()
        .map(|f| f.metadata().map_or(0, |m| m.len()))
        .sum();
    let resident: u64 = process::text(target.pid, "status")
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:")?.trim().trim_end_matches(" kB").parse().ok())
        .expect("VmRSS");
    assert!(size < resident * 1024, "{size} bytes of images for {resident} KiB of resident memory");
}

/// However the pages come: from a copy of the process, once for both, or piece by piece from a chain.
#[test]
fn guard_regions_come_with_every_way_to_store_pages() {
    let target = Target::start("memory_guards");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let pid = target.pid.to_string();
    for (name, option) in [("snapshot", "--snapshot"), ("once", "--share"), ("staged", "--no-mem")] {
        let mut pipeline = Pipeline::new(target.dir.path()).stage(["ckpt-scan", option, "-t", &pid]);
        if option == "--no-mem" {
            pipeline = pipeline.stage(["ckpt-mem"]);
        }
        let _ = pipeline.stage(["ckpt-sk"]).stage(["ckpt-write".into(), target.path(name)]).run().ok(name);
        target.unchanged(&before);
    }
    let tracker = Tracker::start(&target);
    for (name, parent) in [("1", None), ("2", Some("1")), ("3", Some("2"))] {
        dump_ok(&target, &tracker.address, name, parent);
    }
    drop(tracker);
    target.unchanged(&before);
    target.end();
    process::wait_free(&pids);
    for name in ["snapshot", "once", "staged", "3"] {
        target.restore_ok(name);
        target.looks_like(&before);
        target.passes(name);
        target.end();
        process::wait_free(&pids);
    }
}

/// Segments that a killed tree leaves behind are its own again; those that others use are refused, or left alone.
#[test]
fn a_segment_that_outlives_its_processes_gets_its_contents_back() {
    let target = Target::start("sysv_shm");
    let log = target.log();
    let id: i32 = log.lines().find_map(|line| line.strip_prefix("segment ")?.parse().ok()).expect("an id");
    let pids = process::tree(target.pid);
    let before = target.at_rest();
    let size = sysv::state(id).expect("its state").expect("a segment").size;
    let other = sysv::Attached::to(id, size, 4096).expect("attach");
    let us = format!("pid {}", std::process::id());
    let _ = target.dump("refused").fails("ckpt-scan", 3, &["outside of the tree", &us, "--external shm:["]);
    let dump = |name: &str, options: &[&str]| {
        let pid = target.pid.to_string();
        Pipeline::new(target.dir.path())
            .stage(["ckpt-scan", "-t", &pid].iter().chain(options))
            .stage(["ckpt-sk"])
            .stage(["ckpt-write".into(), target.path(name)])
            .run()
            .ok(name)
    };
    dump("external", &["--external", &format!("shm:[{id}]")]);
    drop(other);
    target.unchanged(&before);
    dump("snapshot", &["--snapshot"]);
    dump("img", &[]);
    target.unchanged(&before);
    target.end();
    process::wait_free(&pids);
    // It is there still, as somebody else leaves it.
    {
        let other = sysv::Attached::to(id, size, 4096).expect("attach");
        let memory = std::fs::File::from(other.memory.try_clone().expect("a copy"));
        std::os::unix::fs::FileExt::write_all_at(&memory, &[9; 4096], 30 * 4096).expect("write");
        let _ = target.restore("img").fails("ckpt-restore", 3, &["in use by others", &us]);
    }
    target.restore_ok("img");
    target.looks_like(&before);
    target.end();
    process::wait_free(&pids);
    // Its contents are as they are for a tree that shares it with others.
    target.restore_ok("external");
    target.looks_like(&before);
    target.end();
    process::wait_free(&pids);
    sysv::remove(id).expect("remove the segment");
    let _ = target.restore("external").fails("ckpt-restore", 1, &["external to the checkpoint"]);
    // Another one in its place.
    sysv::create(id, 0, 4096, (0, 0), 0).expect("make another");
    let _ = target.restore("img").fails("ckpt-restore", 3, &["belongs to another segment", "ipcrm"]);
    sysv::remove(id).expect("remove the other");
    for name in ["snapshot", "img"] {
        target.restore_ok(name);
        target.looks_like(&before);
        target.passes(name);
        target.end();
        process::wait_free(&pids);
    }
    assert_eq!(sysv::state(id).expect("its state"), None);
}

#[test]
fn rings_for_asynchronous_io_are_refused_with_what_can_be_done() {
    for (kind, word) in [("aio", "io_setup"), ("io_uring", "an io_uring")] {
        let target = Target::start_with("async_rings", &["-", kind]);
        let before = target.at_rest();
        let outcome = target.dump("img");
        let _ = outcome.fails("ckpt-scan", 3, &[word, "without asynchronous I/O"]);
        target.unchanged(&before);
        target.passes(kind);
    }
}
