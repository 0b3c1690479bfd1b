//! Attacks on the invariants of the design: whatever happens to the tools, the target is unharmed, an image
//! directory is whole or absent, and a failed restore leaves nothing behind.

use std::{
    fs,
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_proto::stream::Reader;
use ckpt_tests::{Outcome, Pipeline, Random, Target, TestDir, installed, process, skip, tools::Running};

/// How many instants are attacked.
const INSTANTS: u64 = 200;

fn pipeline(target: &Target, scan: &[&str], out: &Path) -> Pipeline {
    let pid = target.pid.to_string();
    Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid].iter().chain(scan).copied())
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), out.to_owned()])
}

/// Names in a directory.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("list")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Whether a directory is a checkpoint as a whole: it reads to its end.
fn whole(dir: &Path, target: &Target) -> bool {
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-read".into(), dir.to_owned()])
        .stage(["cat"])
        .output(null())
        .run();
    outcome.code("ckpt-read") == 0
}

fn null() -> fs::File {
    fs::OpenOptions::new().write(true).open("/dev/null").expect("open /dev/null")
}

/// How long a dump takes, the slowest of a few.
fn duration_of_a_dump(target: &Target) -> Duration {
    let mut slowest = Duration::ZERO;
    for round in 0..4 {
        let out = target.path(&format!("measure{round}"));
        let start = Instant::now();
        let _ = pipeline(target, &[], &out).run().ok("dump");
        slowest = slowest.max(start.elapsed());
        fs::remove_dir_all(&out).expect("remove the images");
    }
    slowest
}

/// Kills `stage` at random instants of a dump. With ckpt-mem as a stage of its own if that is the one.
fn killed_at_random(test: &str, stage: &str) {
    killed_with_target(test, stage, &Target::start("attacked"), INSTANTS);
}

fn killed_with_target(test: &str, stage: &str, target: &Target, instants: u64) {
    let dump = |target: &Target, out: &Path, instant: u64| {
        if stage == "ckpt-mem" {
            let how = if instant.is_multiple_of(2) { "" } else { "--snapshot" };
            let line = format!("ckpt-scan --no-mem -t {} | ckpt-mem {how} | ckpt-sk", target.pid);
            Pipeline::new(target.dir.path()).line(&line).stage(["ckpt-write".into(), out.to_owned()])
        } else {
            pipeline(target, &[], out)
        }
    };
    let mut random = Random::new(test);
    let parent = target.path("out");
    fs::create_dir(&parent).expect("make a directory");
    let span = duration_of_a_dump(target) * 12 / 10;
    let mut before = target.at_rest();
    let (mut complete, mut absent) = (0, 0);
    for instant in 0..instants {
        let out = parent.join("img");
        let delay = Duration::from_nanos(random.below(u64::try_from(span.as_nanos()).expect("a short time")));
        let mut running: Running = dump(target, &out, instant).start();
        let end = Instant::now() + delay;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        running.kill(stage);
        let outcome = running.wait().sane();
        let context = || format!("instant {instant}, {stage} killed after {delay:?}: {outcome}");
        if out.exists() {
            assert!(whole(&out, target), "half a directory under its final name: {}", context());
            fs::remove_dir_all(&out).expect("remove the images");
            complete += 1;
        } else {
            assert!(
                outcome.stages.iter().any(|(_, s)| !s.success()),
                "nothing written, and nobody says so: {}",
                context()
            );
            absent += 1;
        }
        let left = names(&parent);
        if stage == "ckpt-write" {
            // Nobody can clean up after a SIGKILL; but what is left must not look like images.
            assert!(left.iter().all(|n| n.starts_with('.')), "{left:?} left: {}", context());
            for name in left {
                fs::remove_dir_all(parent.join(name)).expect("remove what is left");
            }
        } else {
            assert!(left.is_empty(), "{left:?} left: {}", context());
        }
        for pid in process::tree(target.pid) {
            let status = process::text(pid, "status");
            assert!(status.contains("TracerPid:\t0"), "still traced: {}", context());
        }
        target.unchanged(&before);
        if instant % 20 == 0 {
            target.passes(&context());
            before = target.at_rest();
        }
    }
    eprintln!("{test}: {complete} whole, {absent} absent, dump takes up to {span:?}");
    assert!(absent > 0, "no instant hit the dump");
    target.passes("the target after all attacks");
}

#[test]
fn killed_scan_leaves_target_and_no_directory() {
    killed_at_random("killed_scan", "ckpt-scan");
}

#[test]
fn killed_sk_leaves_target_and_no_directory() {
    killed_at_random("killed_sk", "ckpt-sk");
}

#[test]
fn killed_write_leaves_target_and_no_directory() {
    killed_at_random("killed_write", "ckpt-write");
}

/// Enough memory for pages to be written by ckpt-scan into the directory of ckpt-write.
#[test]
fn killed_while_pages_go_straight_into_the_file() {
    for stage in ["ckpt-scan", "ckpt-sk", "ckpt-write"] {
        let target = Target::start_with("memory_hog", &["-", "48"]);
        killed_with_target("killed_placing", stage, &target, 30);
    }
}

#[test]
fn killed_mem_leaves_target_and_no_directory() {
    killed_at_random("killed_mem", "ckpt-mem");
}

/// ckpt-restore killed at random: all or nothing, so nothing.
#[test]
fn killed_restore_leaves_no_process() {
    let target = Target::start("attacked");
    let pids = process::tree(target.pid);
    target.dump_ok("img");
    target.end();
    let start = Instant::now();
    target.restore_ok("img");
    let span = start.elapsed() * 11 / 10;
    target.passes("the restored one");
    target.end();
    let mut random = Random::new("killed_restore");
    for instant in 0..100 {
        let delay = Duration::from_nanos(random.below(u64::try_from(span.as_nanos()).expect("a short time")));
        let mut running = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), target.path("img")])
            .start();
        let end = Instant::now() + delay;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        running.kill("ckpt-restore");
        let outcome = running.wait().sane();
        if outcome.code("ckpt-restore") == 0 {
            target.passes("the restored one");
            target.end();
            continue;
        }
        // Either all of it was released before the kill, or none of it lives.
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let living: Vec<i32> = pids.iter().copied().filter(|&p| !process::is_free(p)).collect();
            if living.is_empty() {
                break;
            }
            if living == pids && Instant::now() > end - Duration::from_secs(4) {
                target.passes("released before the kill");
                target.end();
                break;
            }
            let states: Vec<_> = living.iter().map(|&p| (p, process::stat(p))).collect();
            assert!(Instant::now() < end, "instant {instant} after {delay:?}: half a tree: {states:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A small tmpfs, unmounted at the end.
pub struct SmallDisk(pub PathBuf);

impl SmallDisk {
    pub fn new(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(at).expect("make a mount point");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|s| s.success()).then(|| Self(at.to_owned()))
    }

    /// Mounts it again with other options.
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status().expect("run mount");
        assert!(status.success(), "{options}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn full_disk_leaves_target_and_nothing_written() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    for size in ["16k", "200k", "1m", "8m", "15m"] {
        let Some(disk) = SmallDisk::new(&target.path("disk"), size) else {
            return skip("full_disk_leaves_target_and_nothing_written", "can't mount a tmpfs");
        };
        for scan in [&[][..], &["--kill"]] {
            let outcome = pipeline(&target, scan, &disk.0.join("img")).run();
            assert!(names(&disk.0).is_empty(), "{:?} left on a disk of {size}: {outcome}", names(&disk.0));
            assert_ne!(outcome.code("ckpt-scan"), 0, "{outcome}");
            let _ = outcome.fails("ckpt-write", 1, &["No space left"]);
            target.unchanged(&before);
        }
    }
    target.passes("the target");
}

#[test]
fn closed_pipe_leaves_target() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    let pid = target.pid.to_string();
    for bytes in ["0", "1", "8", "100", "4096", "70000", "3000000"] {
        for scan in [&[][..], &["--kill"]] {
            let outcome = Pipeline::new(target.dir.path())
                .stage(["ckpt-scan", "-t", &pid].iter().chain(scan).copied())
                .stage(["head", "-c", bytes])
                .output(null())
                .run();
            assert_ne!(outcome.code("ckpt-scan"), 0, "no image exists: {outcome}");
            let _ = outcome.sane();
            target.unchanged(&before);
        }
        // The same through a stage in between, to a writer that sees the end too early.
        let out = target.path("img");
        let outcome = Pipeline::new(target.dir.path())
            .stage(["ckpt-scan", "-t", &pid])
            .stage(["head", "-c", bytes])
            .stage(["ckpt-write".into(), out.clone()])
            .run();
        assert!(!out.exists(), "{outcome}");
        let _ = outcome.fails("ckpt-write", 4, &["ckpt-write: "]);
        target.unchanged(&before);
    }
    let names = names(target.dir.path());
    assert!(!names.iter().any(|n| n.starts_with('.')), "staging left: {names:?}");
    target.passes("the target");
}

#[test]
fn kill_comes_after_commit_only() {
    let target = Target::start("attacked");
    let before = target.at_rest();
    // No writer, hence no COMMIT: the stream to a file.
    let pid = target.pid.to_string();
    let outcome = Pipeline::new(target.dir.path()).stage(["ckpt-scan", "--kill", "-t", &pid]).run();
    assert_eq!(process::state(target.pid).map(|s| s != 'Z'), Some(true), "killed without COMMIT: {outcome}");
    target.unchanged(&before);
    // A name that is taken.
    fs::create_dir(target.path("taken")).expect("make a directory");
    let outcome = pipeline(&target, &["--kill"], &target.path("taken")).run();
    assert_ne!(outcome.code("ckpt-write"), 0, "{outcome}");
    assert_eq!(names(&target.path("taken")), Vec::<String>::new());
    target.unchanged(&before);
    target.passes("the target");
    let before = target.at_rest();
    // A writer that has read everything and ends without a word, or says that it failed.
    for last in ["", "FAIL no room\n", "RELEASE\n"] {
        let (input, output) = nix::unistd::pipe().expect("pipe");
        let running = Pipeline::new(target.dir.path())
            .stage(["ckpt-scan", "--kill", "--attach-timeout", "1", "-t", &pid])
            .output(output.into())
            .start();
        let (mut reader, hello) = Reader::open(fs::File::from(input)).expect("a stream");
        let name = SocketAddr::from_abstract_name(hello.control.unwrap_or_default()).expect("a name");
        let mut hold = UnixStream::connect_addr(&name).expect("connect to the holder");
        hold.write_all(b"HOLD write\n").expect("hold");
        hold.read_exact(&mut [0; 3]).expect("OK");
        while reader.next_frame().expect("a stream").is_some() {}
        hold.write_all(last.as_bytes()).expect("the last word");
        drop(hold);
        let outcome = running.wait().sane();
        assert!([1, 3].contains(&outcome.code("ckpt-scan")), "after {last:?}: {outcome}");
        target.unchanged(&before);
    }
    target.passes("the target");
    // And a commit at last.
    let pids = process::tree(target.pid);
    let _ = pipeline(&target, &["--kill"], &target.path("img")).run().ok("dump --kill");
    assert!(whole(&target.path("img"), &target));
    process::wait_free(&pids);
    target.restore_ok("img");
    target.passes("the restored one");
}

#[test]
fn directory_that_exists_is_left_alone() {
    let target = Target::start("attacked");
    target.dump_ok("img");
    let before: Vec<_> = names(&target.path("img"))
        .into_iter()
        .map(|n| fs::metadata(target.path("img").join(n)).and_then(|m| m.modified()).ok())
        .collect();
    let _ = target.dump("img").fails("ckpt-write", 1, &["exists"]);
    let after: Vec<_> = names(&target.path("img"))
        .into_iter()
        .map(|n| fs::metadata(target.path("img").join(n)).and_then(|m| m.modified()).ok())
        .collect();
    assert_eq!(before, after);
    target.passes("the target");
}

#[test]
fn directories_are_0700_and_files_0600() {
    use std::os::unix::fs::PermissionsExt;
    let target = Target::start("attacked");
    let img = target.dump_ok("img");
    assert_eq!(fs::metadata(&img).expect("stat").permissions().mode() & 0o7777, 0o700);
    for name in names(&img) {
        assert_eq!(
            fs::metadata(img.join(&name)).expect("stat").permissions().mode() & 0o7777,
            0o600,
            "{name}"
        );
    }
}

/// Bytes of a dump as a stream, of a target that is small.
fn stream() -> (Target, Vec<u8>) {
    let target = Target::start("signals_pending");
    let pid = target.pid.to_string();
    let _ = Pipeline::new(target.dir.path())
        .line(&format!("ckpt-scan -t {pid} | ckpt-sk"))
        .output(fs::File::create(target.path("stream")).expect("make a file"))
        .run()
        .ok("dump");
    let bytes = fs::read(target.path("stream")).expect("read the stream");
    (target, bytes)
}

/// Runs a tool on damaged bytes.
fn feed(dir: &Path, bytes: &[u8], words: &[&str]) -> Outcome {
    fs::write(dir.join("damaged"), bytes).expect("write the damaged stream");
    let input = fs::File::open(dir.join("damaged")).expect("open");
    Pipeline::new(dir).stage(words.iter().copied()).input(input).output(null()).run()
}

#[test]
fn truncated_stream_is_an_error_for_every_reader() {
    let (target, bytes) = stream();
    target.end();
    let mut random = Random::new("truncated_stream");
    let total = u64::try_from(bytes.len()).expect("a length");
    let mut cuts: Vec<u64> = vec![0, 1, 7, 8, 9, 12, total - 1, total - 2, total - 20];
    cuts.extend((0..25).map(|_| random.below(total)));
    cuts.extend((0..15).map(|_| random.below(20_000.min(total))));
    let out = target.path("out");
    fs::create_dir(&out).expect("make a directory");
    for cut in cuts {
        let part = &bytes[..usize::try_from(cut).expect("a length")];
        let _ = feed(target.dir.path(), part, &["ckpt-write", out.join("img").to_str().expect("a path")])
            .fails("ckpt-write", 4, &["ckpt-write: "]);
        assert!(names(&out).is_empty(), "cut at {cut}: {:?}", names(&out));
        let _ = feed(target.dir.path(), part, &["ckpt-show"]).fails("ckpt-show", 4, &["ckpt-show: "]);
        let _ = feed(target.dir.path(), part, &["ckpt-restore", "--detach"]).fails(
            "ckpt-restore",
            4,
            &["ckpt-restore: "],
        );
        process::wait_free(&[target.pid]);
        // It may find out that its rule matches nothing before it finds the end missing.
        let outcome = feed(target.dir.path(), part, &["sk-rewrite", "--close", "1"]).sane();
        assert!([1, 4].contains(&outcome.code("sk-rewrite")), "cut at {cut}: {outcome}");
    }
    // The whole one is fine, which shows that the cuts were what was wrong.
    let _ =
        feed(target.dir.path(), &bytes, &["ckpt-restore", "--detach"]).ok("restore from the whole stream");
    target.passes("the restored one");
}

#[test]
fn flipped_bits_in_a_stream_are_found() {
    let (target, bytes) = stream();
    target.end();
    let mut random = Random::new("flipped_stream");
    let total = bytes.len();
    let out = target.path("out");
    fs::create_dir(&out).expect("make a directory");
    let first_pages = bytes.windows(5).position(|w| w == b"PAGES").unwrap_or(total);
    for round in 0..40 {
        // The end record, anywhere (which is mostly pages), before the pages.
        let at = match round % 8 {
            7 => total - 1 - usize::try_from(random.below(16)).expect("small"),
            4..7 => usize::try_from(random.below(total as u64)).expect("small"),
            _ => usize::try_from(random.below(first_pages as u64)).expect("small"),
        };
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << random.below(8);
        for words in
            [&["ckpt-write", out.join("img").to_str().expect("a path")][..], &["ckpt-restore", "--detach"]]
        {
            let outcome = feed(target.dir.path(), &damaged, words).sane();
            assert_ne!(
                outcome.code(words[0]),
                0,
                "a flipped bit at byte {at} of {total} went through {words:?}: {outcome}"
            );
            // The checksum comes last; what follows from the damage may be found before.
            assert!([1, 3, 4].contains(&outcome.code(words[0])), "byte {at}: {outcome}");
            assert!(names(&out).is_empty(), "byte {at}: {:?}", names(&out));
        }
        process::wait_free(&[target.pid]);
    }
}

fn copy_dir(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).expect("make a directory");
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).expect("copy an image");
    }
}

#[test]
fn damaged_directories_are_refused_and_leave_no_process() {
    let target = Target::start("signals_pending");
    let pid = target.pid;
    let img = target.dump_ok("img");
    target.end();
    let mut random = Random::new("damaged_directories");
    let damaged = target.path("damaged");
    let files = names(&img);
    let attack = |what: &str, name: &str, change: &mut dyn FnMut(&mut Vec<u8>)| {
        copy_dir(&img, &damaged);
        let path = damaged.join(name);
        let mut bytes = fs::read(&path).expect("read an image");
        if bytes.is_empty() {
            return;
        }
        change(&mut bytes);
        fs::write(&path, &bytes).expect("write an image");
        let outcome = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), damaged.clone()])
            .run();
        assert!(outcome.code("ckpt-restore") != 0, "{name} {what}: restored: {outcome}");
        assert!(outcome.said.contains(name), "{name} {what}: the message does not name the file: {outcome}");
        let _ = outcome.fails("ckpt-restore", 4, &[]);
        process::wait_free(&[pid]);
        let show = Pipeline::new(target.dir.path())
            .stage(["ckpt-show".into(), damaged.clone()])
            .output(null())
            .run()
            .sane();
        assert!([0, 4].contains(&show.code("ckpt-show")), "{name} {what}: {show}");
    };
    for name in &files {
        attack("cut in half", name, &mut |b| b.truncate(b.len() / 2));
        attack("without its last byte", name, &mut |b| b.truncate(b.len() - 1));
        attack("emptied", name, &mut Vec::clear);
        attack("with a byte too many", name, &mut |b| b.push(0));
        for _ in 0..2 {
            let (at, bit) = (random.below(u64::MAX), random.below(8));
            attack("with a flipped bit", name, &mut |b| {
                let at = usize::try_from(at % b.len() as u64).expect("an index");
                b[at] ^= 1 << bit;
            });
        }
    }
    for name in &files {
        copy_dir(&img, &damaged);
        fs::remove_file(damaged.join(name)).expect("remove an image");
        let outcome = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), damaged.clone()])
            .run()
            .sane();
        if name == "ckpt-manifest.img" {
            // A directory without a manifest is as CRIU makes them: no worse than that.
            target.end();
            continue;
        }
        let _ = outcome.fails("ckpt-restore", 4, &[name]);
        process::wait_free(&[pid]);
    }
    // A symbolic link in place of an image leads nowhere.
    copy_dir(&img, &damaged);
    let core = files.iter().find(|n| n.starts_with("core-")).expect("a core image");
    fs::remove_file(damaged.join(core)).expect("remove an image");
    std::os::unix::fs::symlink(img.join(core), damaged.join(core)).expect("make a link");
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-restore".into(), "--detach".into(), damaged.clone()])
        .run()
        .sane();
    assert_ne!(outcome.code("ckpt-restore"), 0, "followed a link out of the directory: {outcome}");
    process::wait_free(&[pid]);
}

/// Without a manifest nothing but the decoders stands between a damaged image and the restore.
#[test]
fn damaged_images_without_a_manifest_never_panic() {
    let target = Target::start("signals_pending");
    let img = target.dump_ok("img");
    target.end();
    let _ = fs::remove_file(img.join("ckpt-manifest.img"));
    let mut random = Random::new("damaged_images_without_a_manifest");
    let damaged = target.path("damaged");
    let files = names(&img);
    for round in 0..120 {
        let name = &files[usize::try_from(random.below(files.len() as u64)).expect("an index")];
        if name.starts_with("pages-") {
            continue;
        }
        copy_dir(&img, &damaged);
        let path = damaged.join(name);
        let mut bytes = fs::read(&path).expect("read an image");
        if bytes.is_empty() {
            continue;
        }
        for _ in 0..=random.below(3) {
            let at = usize::try_from(random.below(bytes.len() as u64)).expect("an index");
            bytes[at] = u8::try_from(random.below(256)).expect("a byte");
        }
        fs::write(&path, &bytes).expect("write an image");
        let outcome = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), damaged.clone()])
            .run();
        let context = format!("round {round}, {name}: {outcome}");
        let outcome = outcome.sane();
        if outcome.code("ckpt-restore") == 0 {
            // The change was in something that may be any value.
            target.end();
        }
        let left: Vec<_> = process::marked(target.dir.path());
        assert!(left.is_empty(), "left {left:?}: {context}");
        assert!((0..=4).contains(&outcome.code("ckpt-restore")), "{context}");
        let show = Pipeline::new(target.dir.path())
            .stage(["ckpt-show".into(), damaged.clone()])
            .output(null())
            .run()
            .sane();
        assert!([0, 4].contains(&show.code("ckpt-show")), "{context}{show}");
    }
}

#[test]
fn garbage_is_no_stream() {
    let dir = TestDir::new("garbage");
    let mut random = Random::new("garbage");
    for len in [0, 1, 8, 100, 5000, 100_000] {
        let bytes: Vec<u8> = (0..len).map(|_| u8::try_from(random.below(256)).expect("a byte")).collect();
        let out = dir.path().join("img");
        for words in [
            &["ckpt-write", out.to_str().expect("a path")][..],
            &["ckpt-restore", "--detach"],
            &["ckpt-show"],
            &["ckpt-sk"],
            &["ckpt-mem"],
            &["sk-rewrite", "--close", "1"],
        ] {
            let _ = feed(dir.path(), &bytes, words).fails(words[0], 4, &[words[0]]);
        }
        assert!(!out.exists());
    }
}

/// A program that dies in the middle of its own dump is an ordinary failure.
#[test]
fn target_that_dies_meanwhile_is_an_error() {
    let target = Target::start("attacked");
    let span = duration_of_a_dump(&target);
    target.end();
    let mut random = Random::new("target_dies");
    for _ in 0..20 {
        let target = Target::start("attacked");
        let running = pipeline(&target, &[], &target.path("img")).start();
        std::thread::sleep(Duration::from_nanos(
            random.below(u64::try_from(span.as_nanos()).expect("a short time")),
        ));
        target.signal(nix::sys::signal::Signal::SIGKILL);
        let outcome = running.wait().sane();
        let written = target.path("img").exists();
        assert_eq!(written, outcome.code("ckpt-write") == 0, "{outcome}");
        assert!(!written || whole(&target.path("img"), &target), "{outcome}");
        let left: Vec<_> = names(target.dir.path()).into_iter().filter(|n| n.starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?}: {outcome}");
    }
}

/// A stage that hangs does not freeze the target for ever once it is gone.
#[test]
fn killed_middle_stage_frees_the_target() {
    if !installed("sleep") {
        return skip("killed_middle_stage_frees_the_target", "no sleep");
    }
    let target = Target::start("attacked");
    let before = target.at_rest();
    let pid = target.pid.to_string();
    let mut running = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(["sleep", "1000"])
        .stage(["ckpt-write".into(), target.path("img")])
        .start();
    let frozen = ckpt_tests::soon(|| process::state(target.pid) == Some('t'));
    assert!(frozen, "the tree is frozen while nobody reads");
    running.kill("sleep");
    let outcome = running.wait().sane();
    assert_ne!(outcome.code("ckpt-scan"), 0, "{outcome}");
    assert_ne!(outcome.code("ckpt-write"), 0, "{outcome}");
    target.unchanged(&before);
    target.passes("the target");
}

/// Reads everything there is and fails when it is not what was expected.
#[test]
fn restored_processes_hold_no_descriptor_of_the_restorer() {
    let target = Target::start("signals_pending");
    target.dump_ok("img");
    target.end();
    let mut child = Command::new(ckpt_tests::tool("ckpt-restore"))
        .arg("--detach")
        .arg(target.path("img"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("run ckpt-restore");
    let mut output = Vec::new();
    // The pipe ends only when nobody holds it any more.
    child.stdout.take().expect("a pipe").read_to_end(&mut output).expect("read to the end");
    assert!(child.wait().expect("wait").success());
    let _ = std::io::stderr().write_all(&output);
    target.passes("the restored one");
}
