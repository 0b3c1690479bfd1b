//! What becomes of images outside the kernel: compressed pages, checksums.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use ckpt_tests::{Pipeline, Target};
use serde_json::Value;

fn words<'a>(line: &'a str, path: &'a Path) -> impl Iterator<Item = std::ffi::OsString> + 'a {
    line.split(' ').map(Into::into).chain([path.into()])
}

/// All images of one kind in a directory.
fn images(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).expect("list images").flatten().map(|f| f.path());
    files.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))).collect()
}

fn size(files: &[PathBuf]) -> u64 {
    files.iter().map(|f| f.metadata().expect("stat an image").len()).sum()
}

/// Dumps through `stages` before ckpt-write, restores by `restore`.
fn trip(dump: &[&str], restore: &[&str]) {
    let target = Target::start("memory_private");
    let before = target.at_rest();
    let img = target.path("img");
    let pid = target.pid.to_string();
    let mut pipeline = Pipeline::new(target.dir.path());
    for (index, stage) in dump.iter().enumerate() {
        let stage = stage.replace("PID", &pid);
        pipeline =
            if index + 1 == dump.len() { pipeline.stage(words(&stage, &img)) } else { pipeline.line(&stage) };
    }
    let _ = pipeline.run().ok("dump");
    assert!(images(&img, "pages-").is_empty(), "plain pages");
    let packed = images(&img, "ckpt-pages-");
    assert!(!packed.is_empty());
    target.unchanged(&before);
    target.end();
    let mut pipeline = Pipeline::new(target.dir.path());
    for (index, stage) in restore.iter().enumerate() {
        pipeline = if index == 0 { pipeline.stage(words(stage, &img)) } else { pipeline.line(stage) };
    }
    let _ = pipeline.run().ok("restore");
    target.looks_like(&before);
    target.passes("the restored one");
    target.end();
}

#[test]
fn pages_compressed_by_the_scanner_are_restored_from_a_directory() {
    trip(&["ckpt-scan --compress zstd:3 -t PID", "ckpt-sk", "ckpt-write"], &["ckpt-restore --detach"]);
}

#[test]
fn pages_compressed_by_a_memory_stage_are_restored_from_a_stream() {
    trip(
        &["ckpt-scan --no-mem -t PID", "ckpt-mem --compress lz4", "ckpt-sk", "ckpt-write"],
        &["ckpt-read", "ckpt-restore --detach"],
    );
}

#[test]
fn pages_compressed_by_the_writer_are_restored_from_a_plain_stream() {
    trip(
        &["ckpt-scan -t PID", "ckpt-sk", "ckpt-write --compress zstd"],
        &["ckpt-read --decompress", "ckpt-restore --detach"],
    );
}

#[test]
fn compressing_and_decompressing_gives_the_same_files() {
    let target = Target::start("memory_private");
    let plain = target.dump_ok("plain");
    let (packed, again) = (target.path("packed"), target.path("again"));
    let run = |read: &str, from: &Path, write: &str, to: &Path| {
        Pipeline::new(target.dir.path()).stage(words(read, from)).stage(words(write, to)).run().ok(write)
    };
    let _ = run("ckpt-read", &plain, "ckpt-write --compress zstd", &packed);
    let _ = run("ckpt-read --decompress", &packed, "ckpt-write", &again);
    assert!(size(&images(&packed, "ckpt-pages-")) < size(&images(&plain, "pages-")));
    for file in fs::read_dir(&plain).expect("list images").flatten() {
        // The same pages in other pieces; and a copy was never dumped.
        if ["ckpt-manifest.img", "stats-dump"].iter().any(|name| file.file_name() == *name) {
            continue;
        }
        let other = again.join(file.file_name());
        assert!(fs::read(file.path()).ok() == fs::read(&other).ok(), "{} differs", other.display());
    }
    // Compressed ones are written as they are, not again.
    let copy = target.path("copy");
    let _ = run("ckpt-read", &packed, "ckpt-write --compress lz4", &copy);
    for file in images(&packed, "ckpt-pages-") {
        let other = copy.join(file.file_name().expect("a name"));
        assert!(fs::read(file).ok() == fs::read(other).ok());
    }
}

#[test]
fn damaged_compressed_pages_are_not_restored() {
    let target = Target::start("memory_private");
    let img = target.path("img");
    let pid = target.pid.to_string();
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid])
        .stage(["ckpt-sk"])
        .stage(words("ckpt-write --compress lz4", &img))
        .run()
        .ok("dump");
    let file =
        images(&img, "ckpt-pages-").into_iter().max_by_key(|f| size(std::slice::from_ref(f))).expect("pages");
    let open = OpenOptions::new().read(true).write(true).open(&file).expect("open");
    let at = open.metadata().expect("stat").size() / 2;
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).expect("read");
    open.write_all_at(&[byte[0] ^ 4], at).expect("write");
    target.end();
    let _ = target.restore("img").fails("ckpt-restore", 4, &["compressed pages"]);
    assert!(ckpt_tests::process::marked(target.dir.path()).is_empty(), "somebody was left");
}

#[test]
fn pages_of_zeros_take_no_room() {
    // Eight of its pages were written with zeros.
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let room = |dir: &Path| -> (u64, u64) {
        let pages = images(dir, "pages-");
        let blocks = pages.iter().map(|f| f.metadata().expect("stat").blocks()).sum::<u64>();
        (size(&pages), blocks * 512)
    };
    let (size, taken) = room(&img);
    assert!(taken + 8 * 4096 <= size, "{taken} bytes on disk for {size} of pages");
    // Through a stream that nobody is behind.
    let copy = target.path("copy");
    let _ = Pipeline::new(target.dir.path())
        .stage(words("ckpt-read", &img))
        .stage(words("ckpt-write", &copy))
        .run()
        .ok("copy");
    let (size, taken) = room(&copy);
    assert!(taken + 8 * 4096 <= size, "{taken} bytes on disk for {size} of copied pages");
}

#[test]
fn damaged_pages_are_restored_only_if_nobody_may_look() {
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let file =
        images(&img, "pages-").into_iter().max_by_key(|f| size(std::slice::from_ref(f))).expect("pages");
    let open = OpenOptions::new().read(true).write(true).open(&file).expect("open");
    // Somewhere in the large mapping, which the program checks.
    let at = open.metadata().expect("stat").size() / 2;
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).expect("read");
    open.write_all_at(&[byte[0] ^ 4], at).expect("write");
    target.end();
    let _ = target.restore("img").fails("ckpt-restore", 4, &["have changed"]);
    let read = |option: &str| {
        let null = fs::File::options().write(true).open("/dev/null").expect("open /dev/null");
        Pipeline::new(target.dir.path()).stage(words(&format!("ckpt-read{option}"), &img)).output(null).run()
    };
    let _ = read("").fails("ckpt-read", 4, &["have changed"]);
    let _ = read(" --no-verify").ok("read without looking");
    let restore = |stages: &[&str]| {
        let mut pipeline = Pipeline::new(target.dir.path()).stage(words(stages[0], &img));
        for stage in &stages[1..] {
            pipeline = pipeline.line(stage);
        }
        pipeline.run()
    };
    // The checksums went with them, so it is found at the end.
    let _ =
        restore(&["ckpt-read --no-verify", "ckpt-restore --detach"]).fails("ckpt-restore", 4, &["checksum"]);
    let _ = restore(&["ckpt-read --no-verify", "ckpt-restore --no-verify --detach"]).ok("restore unseen");
    assert_ne!(target.verdict(), "PASS", "the damage is gone");
    target.end();
}

#[test]
fn figures_add_up() {
    let target = Target::start("memory_private");
    let (img, pid) = (target.path("img"), target.pid.to_string());
    let (dumped, restored) = (target.path("dumped.json"), target.path("restored.json"));
    let _ = Pipeline::new(target.dir.path())
        .stage(["ckpt", "dump", "-t", &pid, "-D"].into_iter().map(Into::into).chain([
            img.clone().into_os_string(),
            "--stats".into(),
            dumped.clone().into_os_string(),
        ]))
        .run()
        .ok("dump");
    target.end();
    let _ = Pipeline::new(target.dir.path())
        .stage([
            "ckpt-restore".into(),
            "--detach".into(),
            "--stats".into(),
            restored.clone().into_os_string(),
            img.clone().into_os_string(),
        ])
        .run()
        .ok("restore");
    target.passes("the restored one");
    target.end();
    let read = |path: &Path| -> Value {
        serde_json::from_slice(&fs::read(path).expect("read the figures")).expect("they are JSON")
    };
    let (dumped, restored) = (read(&dumped), read(&restored));
    let number = |value: &Value, at: &str| {
        value.pointer(at).and_then(Value::as_u64).unwrap_or_else(|| panic!("{at}: {value}"))
    };
    let seconds = |value: &Value, at: &str| {
        value.pointer(at).and_then(Value::as_f64).unwrap_or_else(|| panic!("{at}: {value}"))
    };
    let pages = size(&images(&img, "pages-")) / 4096;
    for stage in ["ckpt-scan", "ckpt-write"] {
        assert_eq!(number(&dumped, &format!("/stages/{stage}/pages/written")), pages);
        assert!(number(&dumped, &format!("/stages/{stage}/pages/zero")) >= 8, "{dumped}");
        assert_eq!(number(&dumped, &format!("/stages/{stage}/pages/in_parent")), 0);
        assert_eq!(number(&dumped, &format!("/stages/{stage}/ckpt_stats")), 1);
    }
    assert_eq!(number(&restored, "/pages/restored"), pages);
    assert!(seconds(&dumped, "/stages/ckpt-scan/seconds/frozen") <= seconds(&dumped, "/seconds/total"));
    let Some(Value::Object(phases)) = restored.pointer("/seconds") else { panic!("{restored}") };
    let sum: f64 = phases.iter().filter(|(name, _)| *name != "total").filter_map(|(_, s)| s.as_f64()).sum();
    let total = seconds(&restored, "/seconds/total");
    assert!(sum <= total && sum > total / 2.0, "{restored}");
}

#[test]
fn verifying_finds_damage_anywhere() {
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let packed = target.path("packed");
    let _ = Pipeline::new(target.dir.path())
        .stage(words("ckpt-read", &img))
        .stage(words("ckpt-write --compress lz4", &packed))
        .run()
        .ok("copy");
    let verify = |dir: &Path| {
        let null = fs::File::options().write(true).open("/dev/null").expect("open /dev/null");
        Pipeline::new(target.dir.path()).stage(words("ckpt-show --verify", dir)).output(null).run()
    };
    for dir in [&img, &packed] {
        let _ = verify(dir).ok("verify");
        for file in fs::read_dir(dir).expect("list images").flatten().map(|f| f.path()) {
            // Nothing is restored from it.
            if file.ends_with("stats-dump") {
                continue;
            }
            let whole = fs::read(&file).expect("read");
            let Some(at) = whole.len().checked_sub(1) else { continue };
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&file, damaged).expect("write");
            let _ = verify(dir).fails("ckpt-show", 4, &[]);
            fs::write(&file, whole).expect("write");
        }
        let _ = verify(dir).ok("verify again");
    }
}
