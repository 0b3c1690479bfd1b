//! CRIU's own decoder reads every image file of every workload, and gives back the same bytes but for what it does
//! not know, which is listed here.
//!
//! `crit` starts for a file at a time, and takes a fifth of a second for that. So `crit.py` calls the library behind it
//! (pycriu) for all files at once, by the same functions; a few files go through the command itself.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use ckpt_images::service;
use ckpt_proto::Image;
use ckpt_tests::{
    Pipeline, Target, TestDir, installed,
    net::{self, Client},
    skip, tool,
};
use serde_json::Value;

use crate::workloads::{WITH_SOCKET, ordinary, start};

/// What crit can't read at all, and why.
const OWN: &[(Image, &str)] = &[
    (Image::Pages, "raw pages without any structure, of CRIU too"),
    (Image::CkptPages, "compressed pages, only with --compress"),
    (Image::CkptManifest, "sizes and checksums of the other files"),
    (Image::CkptSysvShm, "System V segments, which CRIU has with the namespace that they belong to"),
];

/// Workloads with a type of file that came to CRIU after the release in Debian, which can't name it.
const NEWER_FILES: &[&str] = &["pidfds"];

/// Fields that came to CRIU after the release in Debian (3.17). Those from 10001 on are ours.
const NEWER: &[(&str, u64)] = &[
    ("creds_entry", 18),
    ("creds_entry", 19),
    ("inet_sk_entry", 20),
    ("ip_opts_entry", 5),
    ("ip_opts_entry", 6),
    ("ip_opts_entry", 7),
    ("pagemap_entry", 5),
    ("task_core_entry", 21),
];

/// With arguments of their own: a log and what is to break are the first two of all.
const WITH_ARGUMENTS: &[(&str, &[&str])] = &[
    ("herd", &["-", "3", "16"]),
    ("memory_hog", &["-", "2"]),
    ("memory_storm", &["7"]),
    ("snapshotted", &["-", "4"]),
    ("socket_crowd", &["-", "30"]),
];

/// What reads images, as `crit` does: Debian's python, which need not be the first in PATH.
fn python() -> Option<PathBuf> {
    let crit =
        std::env::split_paths(&std::env::var_os("PATH")?).find_map(|dir| fs::read(dir.join("crit")).ok())?;
    let line = String::from_utf8(crit.split(|&b| b == b'\n').next()?.to_vec()).ok()?;
    Some(line.strip_prefix("#!")?.trim().into())
}

/// Dumps it, whatever leads out of it, into directories that stay when it ends.
fn dump(target: &Target, place: &Path, name: &str, scan: &[&str], write: &[&str]) {
    let pid = target.pid.to_string();
    let outcome = Pipeline::new(target.dir.path())
        .stage(["ckpt-scan", "-t", &pid].iter().chain(scan).copied())
        .stage(["ckpt-sk", "--external", "all", "--tcp-established", "--queued", "keep"])
        .stage(
            ["ckpt-write"]
                .into_iter()
                .chain(write.iter().copied())
                .map(Into::into)
                .chain([place.join(name).into_os_string()]),
        )
        .run();
    // Some workloads show what is refused.
    if outcome.code("ckpt-scan") != 3 {
        let _ = outcome.ok(name);
    }
}

/// A checkpoint of each workload and of each way to store one.
fn everything(place: &Path) {
    let mut plain: Vec<String> = ordinary();
    plain.retain(|name| !WITH_SOCKET.contains(&name.as_str()) && !NEWER_FILES.contains(&name.as_str()));
    // These hear what all others send, and unread packets are refused.
    let (hearing, plain): (Vec<String>, Vec<String>) =
        plain.into_iter().partition(|name| name.starts_with("packet_"));
    for name in &hearing {
        dump(&start(name, "-"), place, name, &[], &[]);
    }
    let names = std::sync::Mutex::new(plain.into_iter());
    let names = &names;
    std::thread::scope(|threads| {
        for _ in 0..3 {
            threads.spawn(move || {
                loop {
                    let next = names.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                    let Some(name) = next else { break };
                    dump(&start(&name, "-"), place, &name, &[], &[]);
                }
            });
        }
        for (name, args) in WITH_ARGUMENTS {
            dump(&Target::start_with(name, args), place, name, &[], &[]);
        }
    });
    let listener = start("unix_listener", "-");
    dump(&listener, place, "unix_listener", &[], &[]);
    // Connections that lead out, by a unix socket and by TCP.
    let server = Target::start_with("remembering", &["-", "server.sock"]);
    let client = std::os::unix::net::UnixStream::connect(server.path("server.sock")).expect("connect");
    (&client).write_all(b"one\ntwo\n").expect("say");
    dump(&server, place, "remembering", &[], &[]);
    let answering = Target::start_with("tcp_answering", &["-", "7000"]);
    let mut client = Client::connect("127.0.0.1:7000");
    client.ask("one");
    dump(&answering, place, "tcp_answering", &[], &[]);
    dump(&answering, place, "tcp_answering_killed", &["--kill"], &[]);
    // Ways to store pages.
    let workers = Target::start_with("workers", &["-", "4", "4"]);
    dump(&workers, place, "workers", &[], &[]);
    dump(&workers, place, "workers_shared", &["--share"], &[]);
    dump(&workers, place, "workers_snapshot", &["--snapshot"], &[]);
    dump(&workers, place, "workers_packed", &[], &["--compress", "lz4"]);
    let dirt = Target::start_with("memory_dirt", &["-", "4", "20"]);
    let series = Command::new(tool("ckpt-series"))
        .args(["-t", &dirt.pid.to_string(), "--every", "10ms", "--count", "3", "-D"])
        .arg(place.join("series"))
        .stdout(Stdio::null())
        .status();
    assert!(series.expect("run ckpt-series").success());
    for number in ["000002", "000003"] {
        assert!(place.join("series").join(number).join("parent").exists(), "no increment");
    }
}

/// All image files below a directory. What is no image and not known either has no business there.
fn images(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("list images").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let kind = entry.file_type().expect("a type");
        match Image::parse_file_name(&name) {
            _ if kind.is_dir() => images(&path, found),
            _ if name == "parent" || name.starts_with('.') || name == "series.lock" => {}
            Some((image, _)) if OWN.iter().any(|(own, _)| *own == image) => {}
            None if name != service::DUMP => panic!("{}: what is that?", path.display()),
            _ => found.push(path),
        }
    }
}

#[test]
fn crit_reads_all_that_we_write() {
    const TEST: &str = "crit_reads_all_that_we_write";
    let Some(python) = python() else { return skip(TEST, "no crit (Debian package criu)") };
    net::alone(TEST, || {
        let dir = TestDir::new("crit");
        everything(dir.path());
        let dumped = fs::read_dir(dir.path()).expect("list").count();
        assert!(dumped > 50, "only {dumped} checkpoints");
        let mut files = Vec::new();
        images(dir.path(), &mut files);
        let kinds: BTreeSet<Image> = files
            .iter()
            .filter_map(|file| Some(Image::parse_file_name(&file.file_name()?.to_string_lossy())?.0))
            .collect();
        assert!(kinds.len() >= 20, "only {} kinds of images: {kinds:?}", kinds.len());
        let report = read_all(&python, &files);
        let list = |name: &str| report[name].as_array().cloned().unwrap_or_default();
        assert!(list("broken").is_empty() && list("magics").is_empty(), "{report:#}");
        let decoded = report["files"].as_u64().unwrap_or_default();
        assert_eq!(decoded, files.len() as u64);
        for field in list("unknown") {
            let (message, number) =
                (field[0].as_str().unwrap_or_default(), field[1].as_u64().unwrap_or_default());
            assert!(number >= 10001 || NEWER.contains(&(message, number)), "{message} has no field {number}");
        }
        eprintln!(
            "{decoded} files of {} kinds, {} of them byte for byte; fields that crit passes over: {}",
            kinds.len(),
            report["same"],
            report["unknown"]
        );
        by_the_command(dir.path());
    });
}

fn read_all(python: &Path, files: &[PathBuf]) -> Value {
    let mut child = Command::new(python)
        .arg("-c")
        .arg(include_str!("crit.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start python");
    let names: String = files.iter().map(|file| format!("{}\n", file.display())).collect();
    child.stdin.take().expect("a pipe").write_all(names.as_bytes()).expect("tell the names");
    let output = child.wait_with_output().expect("wait for python");
    assert!(output.status.success(), "crit.py: {}", output.status);
    serde_json::from_slice(&output.stdout).expect("what it found out")
}

/// `crit show`, `crit decode | crit encode`, `crit x DIR ps`.
fn by_the_command(place: &Path) {
    assert!(installed("crit"));
    let dir = place.join("process_tree");
    let crit = |args: &[&str]| {
        let output = Command::new("crit").args(args).current_dir(&dir).output().expect("run crit");
        assert!(output.status.success(), "crit {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let stats: Value = serde_json::from_str(&crit(&["show", service::DUMP])).expect("JSON");
    let number =
        |name: &str| stats["entries"][0]["dump"][name].as_u64().unwrap_or_else(|| panic!("{name}: {stats}"));
    let pages: u64 = fs::read_dir(&dir)
        .expect("list images")
        .flatten()
        .filter(|file| file.file_name().to_string_lossy().starts_with("pages-"))
        .map(|file| file.metadata().map_or(0, |meta| meta.len() / 4096))
        .sum();
    assert_eq!(number("pages_written") + number("shpages_written"), pages);
    assert!(number("freezing_time") > 0 && number("frozen_time") > 0, "{stats}");
    crit(&["decode", "-i", "pstree.img", "-o", "pstree.json"]);
    crit(&["encode", "-i", "pstree.json", "-o", "again.img"]);
    assert!(fs::read(dir.join("pstree.img")).ok() == fs::read(dir.join("again.img")).ok());
    assert!(crit(&["x", ".", "ps"]).contains("process_tree"));
    // An increment counts what it left to the one before.
    let text = Command::new("crit").arg("show").arg(place.join("series/000003").join(service::DUMP)).output();
    let stats: Value = serde_json::from_slice(&text.expect("run crit").stdout).expect("JSON");
    assert!(stats["entries"][0]["dump"]["pages_skipped_parent"].as_u64() > Some(900), "{stats}");
}

#[test]
fn a_restore_leaves_figures_where_it_is_told() {
    let target = Target::start("memory_private");
    let img = target.dump_ok("img");
    let work = target.path("work");
    let words = |work: &Path| {
        [
            "ckpt-restore".into(),
            "--detach".into(),
            "--work-dir".into(),
            work.as_os_str().to_owned(),
            img.clone().into_os_string(),
        ]
    };
    target.end();
    let restore = || Pipeline::new(target.dir.path()).stage(words(&work)).run();
    let _ = restore().fails("ckpt-restore", 1, &["work"]);
    fs::create_dir(&work).expect("make a directory");
    let _ = restore().ok("restore");
    target.passes("the restored one");
    assert!(!img.join(service::RESTORE).exists());
    let written = fs::read(work.join(service::RESTORE)).expect("read it");
    assert_eq!(written[..8], [0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57]);
    if !installed("crit") {
        return skip("a_restore_leaves_figures_where_it_is_told", "no crit (Debian package criu)");
    }
    let text = Command::new("crit").arg("show").arg(work.join(service::RESTORE)).output().expect("run crit");
    let stats: Value = serde_json::from_slice(&text.stdout).expect("JSON");
    let number = |name: &str| {
        stats["entries"][0]["restore"][name].as_u64().unwrap_or_else(|| panic!("{name}: {stats}"))
    };
    assert!(number("pages_restored") > 100 && number("forking_time") > 0);
    assert!(number("restore_time") >= number("forking_time"));
}
