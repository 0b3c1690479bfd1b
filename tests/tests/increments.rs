//! Tracking and incremental checkpoints: nothing that was written is ever missed.

use std::{
    fs::{self, File},
    io::{BufRead, Write},
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    process::{Child, Command, Stdio},
};

use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{CoreEntry, MmEntry, PstreeEntry, VmaEntry},
};
use ckpt_sys::{
    RemoteAddr,
    memory::{self, Page, Scan},
};
use ckpt_tests::{
    Outcome, Pipeline, Random, Target,
    hugepages::{self, HugePages},
    installed,
    net::{self, Client},
    process, skip, soon, tool,
};
use nix::sys::signal::Signal;

use crate::sockets::{accept, conversation, waiting};

/// A `ckpt-track` at work.
pub struct Tracker {
    child: Child,
    pub address: String,
}

impl Tracker {
    pub fn start(target: &Target) -> Self {
        let address = format!("ckpt-test-track-{}", target.pid);
        let said = File::create(target.path("track.out")).expect("make a file");
        let child = Command::new(tool("ckpt-track"))
            .args(["-t", &target.pid.to_string(), "--address", &address])
            .stdin(Stdio::null())
            .stdout(said)
            .spawn()
            .expect("start ckpt-track");
        let ready = soon(|| fs::read_to_string(target.path("track.out")).is_ok_and(|s| s.trim() == address));
        assert!(ready, "ckpt-track is not ready");
        Self { child, address }
    }

    pub fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.end();
    }
}

/// A tracker whose table of descriptors is full sleeps until there is room, and then serves who has waited.
#[test]
fn a_tracker_without_descriptors_waits_for_some() {
    let target = Target::start("counting");
    let mut tracker = Tracker::start(&target);
    let pid = i32::try_from(tracker.child.id()).expect("pids are small");
    let limit = |files: &str| {
        let status = Command::new("prlimit")
            .args(["--pid", &pid.to_string(), &format!("--nofile={files}:")])
            .status()
            .expect("run prlimit");
        assert!(status.success());
    };
    limit("3");
    let syscall = || process::text(pid, "syscall");
    let poll = format!("{} ", nix::libc::SYS_poll);
    let address = tracker.address.clone();
    let outcome = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| dump(&target, &address, "1", None));
        // One that spins is hardly ever found asleep.
        let asleep = (0..200).filter(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            syscall().starts_with(&poll)
        });
        let asleep = asleep.count();
        limit("1024");
        (asleep, waiting.join().expect("join"))
    });
    assert!(outcome.0 > 150, "asleep {} times of 200", outcome.0);
    let _ = outcome.1.ok("dump");
    tracker.end();
}

/// How a tracked checkpoint is made: who stores memory, and from where.
#[derive(Debug, Clone, Copy, Default)]
pub struct How {
    /// ckpt-mem, as a stage of its own.
    pub stage: bool,
    pub snapshot: bool,
    /// What forked processes share is stored once.
    pub share: bool,
}

/// A tracked checkpoint NAME, an increment of PARENT if that is given.
pub fn dump(target: &Target, address: &str, name: &str, parent: Option<&str>) -> Outcome {
    dump_so(target, address, name, parent, How::default())
}

pub fn dump_so(target: &Target, address: &str, name: &str, parent: Option<&str>, how: How) -> Outcome {
    let pid = target.pid.to_string();
    let mut scan = vec!["ckpt-scan".into(), "-t".into(), pid.into()];
    let mut mem = vec!["ckpt-mem".into()];
    let mut write = vec!["ckpt-write".into(), target.path(name).into_os_string()];
    let memory = if how.stage { &mut mem } else { &mut scan };
    memory.extend(["--track".into(), address.into()]);
    if let Some(parent) = parent {
        for words in [&mut *memory, &mut write] {
            words.extend(["--parent".into(), target.path(parent).into_os_string()]);
        }
    }
    if how.snapshot {
        memory.push("--snapshot".into());
    }
    if how.share {
        memory.push("--share".into());
    }
    let pipeline = Pipeline::new(target.dir.path());
    let pipeline = if how.stage {
        scan.push("--no-mem".into());
        pipeline.stage(scan).stage(mem)
    } else {
        pipeline.stage(scan)
    };
    pipeline.stage(["ckpt-sk"]).stage(write).run()
}

pub fn dump_ok(target: &Target, address: &str, name: &str, parent: Option<&str>) {
    let outcome = dump(target, address, name, parent).ok("dump");
    assert!(!outcome.said.contains("warning"), "{outcome}");
}

/// Pages stored in the directory itself, and pages of the whole chain.
pub fn sizes(dir: &Path) -> (u64, u64) {
    let set = ImageSet::from_chain(dir).expect("read the images");
    let mut own = 0;
    let mut all = 0;
    for arg in set.args(Image::Pagemap) {
        for run in set.page_runs(Image::Pagemap, arg).expect("resolve the pages") {
            all += run.len / 4096;
            own += if run.file.level == 0 { run.len / 4096 } else { 0 };
        }
    }
    (own, all)
}

pub fn stop(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).expect("stop a process");
    assert!(soon(|| process::state(pid) == Some('T')), "{pid} does not stop");
}

/// What is mapped at an address. (Mappings may have been joined or cut since the checkpoint, when the tracking of a neighbour
/// began or ended.)
fn mapped_file(pid: u64, addr: u64) -> File {
    let dir = std::path::PathBuf::from(format!("/proc/{pid}/map_files"));
    let holds = |name: &str| {
        let (start, end) = name.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some((number(start)?..number(end)?).contains(&addr))
    };
    let names = fs::read_dir(&dir).expect("list mapped files").flatten().map(|e| e.file_name());
    let name = names.into_iter().find(|name| name.to_str().and_then(holds) == Some(true));
    File::open(dir.join(name.expect("a file is mapped there"))).expect("the file")
}

/// What the kernel writes in the memory of a thread when that goes on: on which processor it is (struct rseq: `cpu_id_start`,
/// `cpu_id`; `node_id`, `mm_cid`). A process that is stopped stays in the kernel, and nothing is written.
fn written_by_kernel(set: &ImageSet, task: &PstreeEntry) -> Vec<Range<u64>> {
    if i32::try_from(task.pid).ok().and_then(process::state) == Some('T') {
        return Vec::new();
    }
    let core = |tid: &u32| set.one::<CoreEntry>(Image::Core, (*tid).into()).expect("a thread");
    let areas = task.threads.iter().filter_map(|tid| core(tid).thread_core?.rseq_entry);
    let fields = |at: u64| [at..at + 8, at + 20..at + 28];
    areas.flat_map(|area| fields(area.rseq_abi_pointer)).collect()
}

/// Makes the bytes of `have`, which are at `at`, those of `want`, as far as they are in `ranges`.
fn leave_out(ranges: &[Range<u64>], at: u64, want: &[u8], have: &mut [u8]) {
    for ((byte, &same), addr) in have.iter_mut().zip(want).zip(at..) {
        if ranges.iter().any(|range| range.contains(&addr)) {
            *byte = same;
        }
    }
}

/// Compares every page of every private mapping with the memory of the processes, which are stopped, or asleep.
pub fn same_as_live(dir: &Path) -> (u64, u64) {
    let set = ImageSet::from_chain(dir).expect("read the images");
    set.verify_pages().expect("checksums");
    let tasks = set.all::<PstreeEntry>(Image::Pstree, 0).expect("a tree");
    let mut pages = 0;
    for task in &tasks {
        let pid = u64::from(task.pid);
        let mm = set.one::<MmEntry>(Image::Mm, pid).expect("an address space");
        let runs = set.page_runs(Image::Pagemap, pid).expect("resolve the pages");
        let live = File::open(format!("/proc/{pid}/mem")).expect("open the memory");
        let kernels = written_by_kernel(&set, task);
        // What is not in the images is what a fresh mapping has.
        let vmas = mm.vmas.iter().filter(|vma| {
            vma.status & (1 << 9 | 1 << 6) != 0 && vma.status & (1 << 2 | 1 << 3 | 1 << 12) == 0
        });
        for vma in vmas {
            let file = (vma.status & (1 << 6) != 0).then(|| mapped_file(pid, vma.start));
            let huge = (vma.flags & nix::libc::MAP_HUGETLB.unsigned_abs() != 0).then(|| own_pages(pid, vma));
            let mut at = vma.start;
            while at < vma.end {
                let i = runs.partition_point(|run| run.addr + run.len <= at);
                let run = runs.get(i).filter(|run| run.addr <= at);
                let mut want = vec![0; 4096];
                if let Some(run) = run {
                    let place = set.pages_in(run.file).expect("a pages file");
                    let offset = place.offset + run.offset + (at - run.addr);
                    File::from(place.file.try_clone_to_owned().expect("clone"))
                        .read_exact_at(&mut want, offset)
                        .expect("read a page");
                    pages += 1;
                } else if let Some(file) = &file {
                    let _ = file.read_at(&mut want, vma.pgoff + (at - vma.start)).expect("read the file");
                }
                // To read a huge page that is not there would make it.
                if huge.as_ref().is_some_and(|own| run.is_none() && !own.iter().any(|r| r.contains(&at))) {
                    at += 4096;
                    continue;
                }
                let mut have = vec![0; 4096];
                match live.read_exact_at(&mut have, at) {
                    Ok(()) => {}
                    // Beyond the end of a mapped file, and the guard below a stack.
                    Err(_) if run.is_none() => {
                        at += 4096;
                        continue;
                    }
                    Err(e) => panic!("read pid {pid} at {at:#x}: {e}"),
                }
                leave_out(&kernels, at, &want, &mut have);
                let from = run.map(|run| run.file.level);
                assert!(
                    have == want,
                    "{}: pid {pid} page {at:#x}, from level {from:?}, area {vma:?}",
                    dir.display()
                );
                at += 4096;
            }
        }
    }
    shared_same_as_live(&set, &tasks);
    let (own, all) = sizes(dir);
    assert!(pages <= all);
    (own, all)
}

/// The pages that a mapping has of its own, not its file's.
fn own_pages(pid: u64, vma: &VmaEntry) -> Vec<Range<u64>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("open the pagemap");
    let scan = Scan { inverted: Page::FILE, all: Page::FILE, any: Page::PRESENT, report: Page::empty() };
    let (start, end) = (RemoteAddr(vma.start), RemoteAddr(vma.end));
    let mut found = Vec::new();
    memory::pagemap_scan(pagemap.as_fd(), start, end, scan, &mut found).expect("PAGEMAP_SCAN");
    found.into_iter().map(|range| range.start..range.end).collect()
}

/// The same for shared memory, anonymous and of System V: segments by what is in them.
fn shared_same_as_live(set: &ImageSet, tasks: &[PstreeEntry]) {
    let stored: Vec<Vec<u8>> = set
        .args(Image::ShmemPagemap)
        .into_iter()
        .map(|arg| {
            let mut bytes = Vec::new();
            for run in set.page_runs(Image::ShmemPagemap, arg).expect("resolve the pages") {
                let place = set.pages_in(run.file).expect("a pages file");
                let file = File::from(place.file.try_clone_to_owned().expect("clone"));
                let (at, len) = (usize::try_from(run.addr).unwrap(), usize::try_from(run.len).unwrap());
                bytes.resize(bytes.len().max(at + len), 0);
                file.read_exact_at(&mut bytes[at..at + len], place.offset + run.offset).expect("read");
            }
            bytes
        })
        .collect();
    for task in tasks {
        let pid = i32::try_from(task.pid).expect("a pid");
        let maps = process::text(pid, "maps");
        let names = ["/dev/zero (deleted)", " /SYSV", "/memfd:", "/anon_hugepage (deleted)"];
        let shared = maps.lines().filter(|l| l.contains("s 0") && names.iter().any(|name| l.contains(name)));
        shared.for_each(|line| one_shared_as_live(&stored, task.pid, line));
    }
}

fn one_shared_as_live(stored: &[Vec<u8>], pid: u32, line: &str) {
    let ends = line.split([' ', '-']).take(2).map(|n| u64::from_str_radix(n, 16).expect("an address"));
    let [start, end] = ends.collect::<Vec<_>>()[..] else { panic!("{line}") };
    let mut live = vec![0; usize::try_from(end - start).unwrap()];
    // The file that is mapped: to touch its pages would make those which are not there.
    mapped_file(pid.into(), start).read_exact_at(&mut live, 0).expect("read shared memory");
    let end = live.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    let same = |bytes: &Vec<u8>| {
        bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1) == end && bytes[..end] == live[..end]
    };
    assert!(stored.iter().any(same), "pid {pid}: its shared memory is not among {} segments", stored.len());
}

/// A checkpoint leaves nothing in the memory of a program that sleeps; only the kernel notes where it has woken up.
#[test]
fn of_a_program_that_sleeps_only_the_processor_changes() {
    let target = Target::start("counting");
    let before = target.at_rest();
    let on = |processor: &str| {
        let words = ["-c", "-p", processor, &target.pid.to_string()];
        Command::new("taskset").args(words).output().expect("run taskset").status.success()
    };
    if !on("0") || !on("1") {
        return skip("of a program that sleeps only the processor changes", "there is but one processor");
    }
    for (name, processor) in [("0", "0"), ("1", "1"), ("2", "0")] {
        assert!(on(processor));
        target.dump_ok(name);
        target.unchanged(&before);
    }
    for name in ["0", "1", "2"] {
        let _ = same_as_live(&target.path(name));
    }
}

/// A write to a page that was dropped is two faults, and a process can be stopped between them.
#[test]
fn what_is_half_written_is_not_as_it_was() {
    let target = Target::start("memory_rewritten");
    let tracker = Tracker::start(&target);
    let mut random = Random::new("half_written");
    let faults = || process::stat(target.pid).and_then(|stat| stat[7].parse::<u64>().ok()).expect("faults");
    for round in 1..=16 {
        let how = How { stage: round % 2 == 0, ..How::default() };
        let names = ["before", "amidst"].map(|name| format!("{name}{round}"));
        let _ = dump_so(&target, &tracker.address, &names[0], None, how).ok("dump");
        let amidst = faults() + random.below(3000);
        target.signal(Signal::SIGUSR1);
        while faults() < amidst && process::state(target.pid) != Some('S') {}
        stop(target.pid);
        let _ = dump_so(&target, &tracker.address, &names[1], Some(&names[0]), how).ok("dump");
        let _ = same_as_live(&target.path(&names[1]));
        target.signal(Signal::SIGCONT);
        target.wait_log(&format!("round {round}"));
        names.iter().for_each(|name| fs::remove_dir_all(target.path(name)).expect("remove a checkpoint"));
    }
}

/// Thousands of operations on memory between checkpoints, each of which is compared page by page.
#[test]
fn no_write_is_ever_missed() {
    storm(15, &[]);
}

/// The same with much of the memory in huge pages, shared and private, of files and anonymous.
#[test]
fn no_write_to_huge_pages_is_ever_missed() {
    let Some(_pool) = HugePages::take("no write to huge pages is ever missed", 56) else { return };
    let in_use = hugepages::in_use();
    storm(9, &["huge"]);
    assert!(soon(|| hugepages::in_use() == in_use), "{} huge pages stay in use", hugepages::in_use());
}

/// What a checkpoint may say: of a process with private huge pages there are no copies.
fn is_calm(outcome: &Outcome) -> bool {
    let expected = |line: &str| line.contains("no snapshot: it has private memory of huge pages");
    !outcome.said.lines().any(|line| line.contains("warning") && !expected(line))
}

fn storm(rounds: usize, how: &[&str]) {
    let asked = std::env::var("CKPT_STORM_ROUNDS").ok().and_then(|n| n.parse().ok());
    let rounds: usize = asked.unwrap_or(rounds);
    let seed = std::env::var("CKPT_STORM_SEED").unwrap_or_else(|_| std::process::id().to_string());
    println!("CKPT_STORM_SEED={seed}");
    let target = Target::start_with("memory_storm", &[&[seed.as_str()], how].concat());
    if let Some(needs) =
        target.log().lines().find_map(|line| line.strip_prefix("needs ")?.parse::<u64>().ok())
    {
        assert!(needs <= 56, "the pool has too few pages: {needs}");
    }
    let tracker = Tracker::start(&target);
    let (mut stored, mut total) = (0, 0);
    let mut worked = 0;
    let mut work = || {
        worked += 1;
        target.signal(Signal::SIGUSR1);
        target.wait_log(&format!("round {worked}"));
    };
    let mut parent: Option<String> = None;
    for round in 1..=rounds {
        work();
        // Whoever stores memory, from wherever: it is the same chain.
        let how = How { stage: round % 4 < 2, snapshot: round % 2 == 1, share: round % 5 < 2 };
        if round % 3 == 0 {
            // A full one, from a snapshot, of a tree that goes on all the time: what is written while the copy is
            // being read must be in the next.
            let name = format!("{round}-live");
            let how = How { snapshot: true, ..how };
            let outcome = std::thread::scope(|scope| {
                let dumping = scope.spawn(|| dump_so(&target, &tracker.address, &name, None, how));
                while !dumping.is_finished() {
                    work();
                }
                dumping.join().expect("a dump")
            });
            let outcome = outcome.ok("dump a tree that runs");
            assert!(is_calm(&outcome), "{how:?}: {outcome}");
            parent = Some(name);
        }
        let pids = process::tree(target.pid);
        pids.iter().for_each(|&pid| stop(pid));
        let name = round.to_string();
        let outcome = dump_so(&target, &tracker.address, &name, parent.as_deref(), how).ok("dump");
        assert!(is_calm(&outcome), "{how:?}: {outcome}");
        let (own, all) = same_as_live(&target.path(&name));
        if parent.replace(name).is_some() {
            stored += own;
            total += all;
        }
        for pid in pids {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGCONT).expect("go on");
        }
    }
    println!("{stored} of {total} pages stored in {} increments, {worked} rounds of work", rounds - 1);
    assert!(stored * 10 < total * 9, "{stored} of {total} pages stored: nothing is tracked");
    // An increment restores like any other checkpoint.
    let last = rounds.to_string();
    target.end();
    target.restore_ok(&last);
    target.end();
}

/// Killed at any instant of its beginning, a tracker leaves nothing behind, and the next checkpoint knows that it is full.
#[test]
fn killed_tracker_leaves_the_target_and_no_doubt() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    let mut random = Random::new("killed_tracker");
    let address = format!("ckpt-test-killed-{}", target.pid);
    for round in 0..40 {
        let mut child = Command::new(tool("ckpt-track"))
            .args(["-t", &target.pid.to_string(), "--address", &address])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("start ckpt-track");
        std::thread::sleep(std::time::Duration::from_micros(random.below(60_000)));
        let _ = child.kill();
        let _ = child.wait();
        target.unchanged(&before);
        for pid in process::tree(target.pid) {
            assert!(process::text(pid, "status").contains("TracerPid:\t0"), "round {round}: still traced");
            let smaps = process::text(pid, "smaps");
            assert!(!smaps.lines().any(|l| l.starts_with("VmFlags") && l.contains(" uw")), "round {round}");
        }
        if round % 10 == 0 {
            let name = round.to_string();
            let outcome = dump(&target, &address, &name, None).ok("dump");
            assert!(outcome.said.contains("full and not tracked"), "{outcome}");
            let (own, all) = sizes(&target.path(&name));
            assert_eq!(own, all);
            target.unchanged(&before);
        }
    }
    target.passes("the target");
}

#[test]
fn an_increment_survives_like_a_full_checkpoint() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let tracker = Tracker::start(&target);
    target.unchanged(&before);
    dump_ok(&target, &tracker.address, "1", None);
    dump_ok(&target, &tracker.address, "2", Some("1"));
    dump_ok(&target, &tracker.address, "3", Some("2"));
    let (own, all) = sizes(&target.path("3"));
    assert!(own * 20 < all, "{own} of {all} pages");
    target.end();
    target.restore_ok("3");
    target.looks_like(&before);
    target.passes("the restored one");
    target.end();
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), target.path("3")])
        .stage(["ckpt-restore", "--detach"])
        .run();
    let _ = outcome.ok("restore from a stream");
    target.looks_like(&before);
    target.passes("the one restored from a stream");
}

#[test]
fn a_merged_chain_survives_without_its_ancestors() {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let tracker = Tracker::start(&target);
    dump_ok(&target, &tracker.address, "1", None);
    dump_ok(&target, &tracker.address, "2", Some("1"));
    dump_ok(&target, &tracker.address, "3", Some("2"));
    drop(tracker);
    target.end();
    let merge = |words: &[&str]| {
        let paths = words.iter().map(|word| match word.strip_prefix('=') {
            Some(name) => target.path(name).into_os_string(),
            None => word.into(),
        });
        Pipeline::new(target.dir.path()).stage(std::iter::once("ckpt-merge".into()).chain(paths)).run()
    };
    let survives = |name: &str| {
        target.restore_ok(name);
        target.looks_like(&before);
        target.passes(name);
        target.end();
    };
    let _ = merge(&["=3", "=full"]).ok("merge");
    assert_eq!(sizes(&target.path("full")).0, sizes(&target.path("3")).1);
    let _ = merge(&["--onto", "=1", "=3", "=onto"]).ok("merge onto the first");
    let _ = merge(&["--dedup", "=3"]).ok("free");
    survives("3");
    survives("onto");
    let _ = merge(&["--in-place", "=3"]).ok("merge in place");
    for name in ["1", "2", "onto"] {
        fs::remove_dir_all(target.path(name)).expect("remove a checkpoint");
    }
    survives("3");
    survives("full");
}

#[test]
fn what_can_not_be_an_increment_is_full_and_says_so() {
    let target = Target::start("memory_private");
    let mut tracker = Tracker::start(&target);
    let full = |outcome: Outcome, why: &str, name: &str| {
        let outcome = outcome.ok("dump");
        assert!(outcome.said.contains(why), "{outcome}");
        let (own, all) = sizes(&target.path(name));
        assert_eq!(own, all, "{outcome}");
        assert!(!target.path(name).join("parent").exists());
    };
    dump_ok(&target, &tracker.address, "1", None);
    // It fails after the marks have been taken off: the disk is full, say.
    let failed = Pipeline::new(target.dir.path())
        .stage(
            ["ckpt-scan", "-t", &target.pid.to_string(), "--track", &tracker.address, "--parent"]
                .map(Into::into)
                .into_iter()
                .chain([target.path("1").into_os_string()]),
        )
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), target.path("1")])
        .run();
    assert_ne!(failed.code("ckpt-write"), 0, "{failed}");
    full(dump(&target, &tracker.address, "2", Some("1")), "has not become durable", "2");
    dump_ok(&target, &tracker.address, "3", Some("2"));
    full(dump(&target, &tracker.address, "4", Some("2")), "another one", "4");
    // A stream of an increment is no checkpoint by itself, nor with another parent.
    let pid = target.pid.to_string();
    for parent in [None, Some("1")] {
        let mut write = vec!["ckpt-write".into(), target.path("5").into_os_string()];
        if let Some(parent) = parent {
            write.extend(["--parent".into(), target.path(parent).into_os_string()]);
        }
        dump_ok(&target, &tracker.address, &format!("new{parent:?}"), None);
        let scan = ["ckpt-scan", "-t", &pid, "--track", &tracker.address, "--parent"].map(Into::into);
        let scan = scan.into_iter().chain([target.path(&format!("new{parent:?}")).into_os_string()]);
        let outcome = Pipeline::new(target.dir.path()).stage(scan).stage(["ckpt-sk"]).stage(write).run();
        let _ = outcome.fails("ckpt-write", 3, &["increment"]);
        assert!(!target.path("5").exists());
    }
    // Without tracking it says what to do.
    let _ = target.dump("6").fails("ckpt-scan", 3, &["userfaultfd", "--track"]);
    let line = format!("ckpt-scan --no-mem -t {pid} | ckpt-mem | ckpt-sk");
    let stage = Pipeline::new(target.dir.path()).line(&line).stage(["ckpt-write".into(), target.path("6")]);
    let _ = stage.run().fails("ckpt-mem", 3, &["userfaultfd", "ckpt-mem --track"]);
    tracker.end();
    full(dump(&target, &tracker.address, "7", Some("3")), "no tracker", "7");
    let stage = How { stage: true, ..How::default() };
    full(dump_so(&target, &tracker.address, "8", Some("7"), stage), "no tracker", "8");
    target.passes("the target");
    let uw =
        process::text(target.pid, "smaps").lines().any(|l| l.starts_with("VmFlags") && l.contains(" uw"));
    assert!(!uw, "nothing is left of the tracking");
}

/// `ckpt-series` at work: lines in, numbers out.
pub struct Series {
    child: Child,
    numbers: std::io::BufReader<std::process::ChildStdout>,
}

impl Series {
    pub fn start(target: &Target, args: &[&str]) -> Self {
        let errors =
            File::options().create(true).append(true).open(target.path("series.err")).expect("make a file");
        let mut child = Command::new(tool("ckpt-series"))
            .args(["-t", &target.pid.to_string(), "-D"])
            .arg(target.path("series"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("start ckpt-series");
        let numbers = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, numbers }
    }

    /// Asks for a checkpoint and gives its number; `None` if there will be none.
    pub fn make(&mut self) -> Option<String> {
        let input = self.child.stdin.as_mut().expect("a pipe");
        let _ = input.write_all(b"now\n");
        let mut line = String::new();
        self.numbers.read_line(&mut line).expect("read a number");
        (!line.is_empty()).then(|| line.trim().to_owned())
    }

    /// Makes so many checkpoints of the counting workload, and ends; each with the count before it.
    pub fn make_all(mut self, target: &Target, checkpoints: usize) -> Vec<(String, u64)> {
        let made = (0..checkpoints).map(|_| {
            let count = count_of(target);
            (self.make().expect("a checkpoint"), count)
        });
        let made = made.collect();
        assert_eq!(self.end(), Some(0));
        made
    }

    pub fn end(mut self) -> Option<i32> {
        drop(self.child.stdin.take());
        self.child.wait().expect("wait for ckpt-series").code()
    }
}

impl Drop for Series {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("list").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().expect("a name")).collect();
    names.sort();
    names
}

/// Restores a checkpoint of a series, which goes on from the count that it was made at.
pub fn goes_on_from(target: &Target, name: &str, made: &[(String, u64)]) {
    let (_, count) = made.iter().find(|(number, _)| number == name).expect("a number that was printed");
    target.restore_ok(&format!("series/{name}"));
    assert_eq!(count_of(target), count + 1, "restored from {name}");
    target.passes("the restored one");
    target.end();
}

/// What the counting workload says of itself.
pub fn count_of(target: &Target) -> u64 {
    let before = target.log().lines().filter(|l| l.starts_with("count ")).count();
    target.signal(Signal::SIGUSR1);
    let mut last = 0;
    let came = soon(|| {
        let log = target.log();
        let lines: Vec<_> = log.lines().filter_map(|l| l.strip_prefix("count ")).collect();
        last = lines.last().and_then(|l| l.parse().ok()).unwrap_or(0);
        lines.len() > before
    });
    assert!(came, "no count: {}", target.log());
    last
}

#[test]
fn every_checkpoint_of_a_series_can_be_restored() {
    let target = Target::start("counting");
    let series = Series::start(&target, &["--full-every", "7"]);
    let made = series.make_all(&target, 20);
    assert_eq!(made.first().map(|(n, _)| n.as_str()), Some("000001"));
    for (number, _) in &made {
        let n: u64 = number.parse().expect("a number");
        let link = target.path("series").join(number).join("parent").exists();
        assert_eq!(link, n % 7 != 1, "{number}");
    }
    target.end();
    // The count goes up by one each time it is asked for, and every value is in other pages.
    for (number, count) in made.iter().rev().step_by(3) {
        target.restore_ok(&format!("series/{number}"));
        assert_eq!(count_of(&target), count + 1, "restored from {number}");
        target.passes("the restored one");
        target.end();
    }
}

#[test]
fn old_checkpoints_are_folded_and_go() {
    for compress in [&[][..], &["--compress", "lz4"]] {
        let target = Target::start("counting");
        let series = Series::start(&target, &[&["--keep", "4"], compress].concat());
        let made = series.make_all(&target, 17);
        let numbers = names(&target.path("series"));
        assert!((4..=6).contains(&numbers.len()), "{numbers:?}");
        target.end();
        for number in &numbers {
            let files = names(&target.path("series").join(number));
            let packed = files.iter().any(|name| name.starts_with("ckpt-pages-"));
            assert_eq!(packed, !compress.is_empty(), "{number}: {files:?}");
            goes_on_from(&target, number, &made);
        }
    }
}

/// Every numbered directory of a series is a whole checkpoint, whichever others it needs.
pub fn all_whole(series: &Path) {
    for entry in fs::read_dir(series).expect("list the series") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let set = ImageSet::from_chain(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        set.verify_pages().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

/// Killed at any instant: what was printed can be restored, the target does not notice, the next series goes on.
#[test]
fn killed_series_leaves_all_that_it_printed() {
    const KEPT: u64 = 5;
    let rounds: usize = std::env::var("CKPT_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let target = Target::start("counting");
    let images = target.path("series");
    let mut random = Random::new("killed_series");
    let mut made: Vec<(String, u64)> = Vec::new();
    let there = |number: &str| images.join(number).is_dir();
    for round in 0..rounds {
        let mut args = vec!["--keep", "5", "--full-every", "3"];
        // All ways to make a full one.
        args.extend([None, Some("--pre-dump"), Some("--no-snapshot")][round % 3]);
        let mut series = Series::start(&target, &args);
        for _ in 0..random.below(4) {
            let count = count_of(&target);
            made.push((series.make().expect("a checkpoint"), count));
        }
        // Somewhere in the middle of the next one, or of what is done for --keep behind it.
        let count = count_of(&target);
        let pid = nix::unistd::Pid::from_raw(i32::try_from(series.child.id()).expect("a pid"));
        let after = std::time::Duration::from_micros(random.below(100_000));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(after);
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        });
        made.extend(series.make().map(|number| (number, count)));
        killer.join().expect("the killer");
        drop(series);
        assert!(soon(|| process::asleep(target.pid)));
        if images.is_dir() {
            all_whole(&images);
        }
        // One that was killed before it was printed is among those that are kept.
        let numbers = fs::read_dir(&images).into_iter().flatten().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
        let oldest = numbers.max().unwrap_or(0).saturating_sub(KEPT - 1);
        let is_kept = |number: &str| number.parse::<u64>().expect("a number") >= oldest;
        assert!(
            made.iter().all(|(number, _)| !is_kept(number) || there(number)),
            "round {round}: {made:?}, {:?}",
            fs::read_dir(&images).map(|entries| entries.flatten().map(|e| e.file_name()).collect::<Vec<_>>())
        );
    }
    target.passes("the target");
    let uw =
        process::text(target.pid, "smaps").lines().any(|l| l.starts_with("VmFlags") && l.contains(" uw"));
    assert!(!uw && process::text(target.pid, "status").contains("TracerPid:\t0"));
    assert_eq!(process::tree(target.pid), [target.pid], "a copy of it is left");
    target.end();
    assert!(made.len() > 3, "{made:?}");
    for (number, count) in made.iter().rev().filter(|(number, _)| there(number)).take(6) {
        target.restore_ok(&format!("series/{number}"));
        assert_eq!(count_of(&target), count + 1, "restored from {number}");
        target.end();
    }
}

/// Full ones that are copied ahead of the freeze are increments of that copy, which goes with them.
#[test]
fn pre_dumps_of_a_series_stay_as_long_as_they_are_needed() {
    let target = Target::start("counting");
    let series = Series::start(&target, &["--keep", "4", "--full-every", "3", "--pre-dump"]);
    let made = series.make_all(&target, 11);
    let names = names(&target.path("series"));
    assert!(names.iter().any(|name| name == "before-000010"), "{names:?}");
    let (before, numbers): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.starts_with("before-"));
    for name in before {
        let number = name.trim_start_matches("before-").to_owned();
        assert!(numbers.contains(&&number), "{name} is needed by nobody: {names:?}");
    }
    all_whole(&target.path("series"));
    target.end();
    for name in numbers {
        goes_on_from(&target, name, &made);
    }
}

/// A number is printed when a power cut can no longer lose its directory: each file of it has been synced before it got
/// its name, and the name before the number.
#[test]
fn what_is_printed_has_been_synced() {
    if !installed("strace") {
        return skip("the order of syncs", "no strace");
    }
    let target = Target::start("counting");
    let trace = target.path("trace");
    let output = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=fsync,rename,renameat2,write", "-o"])
        .arg(&trace)
        .arg(tool("ckpt-series"))
        .args(["-t", &target.pid.to_string(), "--every", "20ms", "--count", "4", "--keep", "2", "-D"])
        .arg(target.path("series"))
        .output()
        .expect("run strace");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "000001\n000002\n000003\n000004\n", "{output:?}");
    let trace = fs::read_to_string(&trace).expect("read the trace");
    let lines: Vec<&str> = trace.lines().collect();
    let find = |what: &dyn Fn(&str) -> bool| lines.iter().position(|line| what(line));
    let series = target.path("series").display().to_string();
    for number in ["000003", "000004"] {
        // Number 3 has been folded: it was renamed twice.
        let staging = format!("/.{number}.ckpt-partial-");
        let is_rename = |line: &str| line.contains("rename") && line.contains(&staging);
        let mut from = 0;
        while let Some(next) = lines.iter().skip(from).position(|line| is_rename(line)) {
            let renamed = from + next;
            let at = lines[renamed].find(&staging).expect("it is there");
            let partial = lines[renamed][at..].split('"').next().expect("a name");
            let before = |name: &str| {
                let synced = format!("{partial}{name}>");
                lines[from..renamed].iter().any(|line| line.contains("fsync(") && line.contains(&synced))
            };
            assert!(before(""), "{partial} itself");
            for entry in fs::read_dir(target.path("series").join(number)).expect("list").flatten() {
                if entry.file_type().expect("a type").is_file() {
                    let name = format!("/{}", entry.file_name().display());
                    assert!(before(&name), "{partial}{name} was not synced");
                }
            }
            let synced = format!("{series}>");
            let named = lines.iter().skip(renamed).position(|l| l.contains("fsync(") && l.contains(&synced));
            let named = renamed + named.expect("the directory is synced");
            let said = format!(r#""{number}\n""#);
            let printed = find(&|line| line.contains("write(") && line.contains(&said));
            assert!(from > 0 || printed.expect("a number") > named, "{number} was printed too early");
            from = named;
        }
        assert!(from > 0, "{number} was never renamed");
    }
}

#[test]
fn a_series_ends_with_its_tree_and_refuses_a_second_in_its_directory() {
    let target = Target::start("counting");
    let mut series = Series::start(&target, &["--every", "20ms"]);
    let mut line = String::new();
    series.numbers.read_line(&mut line).expect("read a number");
    assert_eq!(line, "000001\n");
    let second = Series::start(&target, &[]);
    assert_eq!(second.end(), Some(1));
    target.end();
    assert_eq!(
        series.end(),
        Some(0),
        "{}",
        fs::read_to_string(target.path("series.err")).unwrap_or_default()
    );
}

/// A checkpoint after every message of a conversation; back to some of them, in any order, and on from there.
#[test]
fn a_conversation_goes_on_from_any_of_its_messages() {
    let messages: u64 = std::env::var("CKPT_SERIES_MESSAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let (target, mut talk, id) = conversation();
    let mut series = Series::start(&target, &["--external", &id.to_string(), "--full-every", "25"]);
    for n in 4..messages + 4 {
        assert_eq!(series.make().as_deref(), Some(format!("{:06}", n - 3).as_str()));
        assert_eq!(talk.ask("and"), format!("answer {n} to and"));
    }
    assert_eq!(series.end(), Some(0));
    drop(talk);
    target.end();
    // 7919 is no divisor of any number of messages that is likely to be asked for.
    for k in 0..6 {
        let n = 1 + k * 7919 % messages;
        let path = target.path(&format!("client-{n}.sock"));
        let listener = waiting(&path);
        let option = format!("unix[{id}]:{}", path.display());
        let dir = target.path("series").join(format!("{n:06}"));
        let stage = [
            "ckpt-restore".into(),
            "--detach".into(),
            "--external".into(),
            option.into(),
            dir.into_os_string(),
        ];
        let _ = Pipeline::new(target.dir.path()).stage(stage).run().ok("restore one of a series");
        let mut talk = accept(&listener);
        assert_eq!(talk.ask("go on"), format!("answer {} to go on", n + 3));
        assert_eq!(talk.ask("and on"), format!("answer {} to and on", n + 4));
        target.end();
    }
}

/// Options for sockets are those of ckpt-sk: connections that only ckpt-sk has an option for, and all at once.
#[test]
fn a_series_takes_the_options_for_sockets() {
    net::alone("a_series_takes_the_options_for_sockets", || {
        let target = Target::start_with("tcp_answering", &["-", "7000"]);
        let mut client = Client::connect("127.0.0.1:7000");
        assert_eq!(client.ask("one"), 1);
        let mut refused = Series::start(&target, &[]);
        assert_eq!(refused.make(), None);
        assert_eq!(refused.end(), Some(3));
        for (option, number) in [("--tcp-established", "000001"), ("--tcp-close", "000002")] {
            let mut series = Series::start(&target, &[option, "--skip-in-flight"]);
            assert_eq!(series.make().as_deref(), Some(number));
            assert_eq!(series.end(), Some(0));
        }
        assert_eq!(client.ask("two"), 2);
        target.passes("the target");
    });
    let (target, mut talk, _) = conversation();
    let mut series = Series::start(&target, &["--external", "all"]);
    assert_eq!(series.make().as_deref(), Some("000001"));
    assert_eq!(series.end(), Some(0));
    assert_eq!(talk.ask("and"), "answer 4 to and");
    target.passes("the target");
}
