//! Truth of the wire: CRIU's own images (`tests/golden`, made by CRIU 4.2) come back to life, what we write of the
//! same programs agrees with them field by field.
//!
//! The golden images name their programs and outputs as `/tmp/ckpt-golden/...` and hold fixed pids, so these tests
//! take turns.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard},
};

use ckpt_images::ImageSet;
use ckpt_proto::{Image, Message, message_descriptor, types};
use ckpt_tests::{Pipeline, TestDir, here, process, soon, workload::CLOSE_ALL};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost_reflect::{DynamicMessage, Kind, Value};

const PLACE: &str = "/tmp/ckpt-golden";

fn golden(name: &str) -> PathBuf {
    here().join("golden").join(name)
}

/// The place that the images name, for one test at a time. Its programs are ended on drop.
struct Place(#[allow(dead_code)] MutexGuard<'static, ()>);

impl Place {
    fn set_up() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        process::become_subreaper();
        let place = Self(turn);
        place.end();
        fs::create_dir_all(Path::new(PLACE).join("out")).expect("make the place");
        for name in ["counter", "family", "tcp"] {
            let binary = Path::new(PLACE).join(name);
            let same = || fs::read(&binary).ok() == fs::read(golden(name)).ok();
            if !same() {
                let _ = fs::remove_file(&binary);
                fs::copy(golden(name), &binary).expect("copy a golden program");
            }
            fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("chmod");
            // Made anew: one that somebody else has left may have another mode.
            let _ = fs::remove_file(place.output(name));
            fs::write(place.output(name), fs::read(golden(&format!("{name}.out"))).expect("read"))
                .expect("write");
        }
        place
    }

    fn output(&self, name: &str) -> PathBuf {
        Path::new(PLACE).join(format!("out/{name}.out"))
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.output(name)).unwrap_or_default()
    }

    /// Ends whatever runs one of the golden programs.
    fn end(&self) {
        let gone = soon(|| {
            let mut all = process::all();
            all.retain(|&pid| process::link(pid, "exe").starts_with(PLACE));
            for &pid in &all {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            all.iter().filter(|&&pid| !process::is_free(pid)).count() == 0
        });
        assert!(gone || std::thread::panicking(), "golden programs do not end");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.end();
    }
}

/// The processor state (XSTATE_BV) that some processes in `images` use.
fn processor_state(images: &Path, pids: &[i32]) -> u64 {
    let set = ImageSet::from_dir(images).expect("read the images");
    let state = |&pid: &i32| {
        let core: types::CoreEntry =
            set.one(Image::Core, u64::from(pid.unsigned_abs())).expect("a core image");
        core.thread_info.and_then(|info| info.fpregs.xsave).map_or(0, |xsave| xsave.xstate_bv)
    };
    pids.iter().map(state).fold(0, |all, one| all | one)
}

/// Restores CRIU's images and asks the program.
fn answers(name: &str, pids: &[i32], word: &str, options: &[&str]) {
    let place = Place::set_up();
    if options.is_empty() {
        process::wait_free(pids);
    }
    let dir = TestDir::new(name);
    let pidfile = dir.path().join("pid");
    let words = ["ckpt-restore", "--detach", "--pidfile"].into_iter().map(Into::into);
    let images = golden(&format!("{name}.criu"));
    let outcome = Pipeline::new(dir.path())
        .stage(
            words
                .chain([pidfile.clone().into_os_string()])
                .chain(options.iter().map(Into::into))
                .chain([images.clone().into_os_string()]),
        )
        .run();
    let missing = processor_state(&images, pids) & !ckpt_sys::xstate::enabled();
    if missing != 0 {
        // Vector code that the program has chosen at its start would be illegal here.
        let _ = outcome.fails("ckpt-restore", 3, &["XSTATE_BV", "same kind of processor"]);
        assert_eq!(place.said(name).lines().count(), 1, "something ran");
        ckpt_tests::skip(
            &format!("{name}.criu"),
            &format!("this processor lacks XSTATE_BV bits {missing:#x}"),
        );
        return;
    }
    let _ = outcome.ok(&format!("restore CRIU's {name}.criu"));
    let root: i32 = fs::read_to_string(&pidfile).expect("read the pid file").trim().parse().expect("a pid");
    if options.is_empty() {
        assert_eq!(root, pids[0]);
    }
    kill(Pid::from_raw(root), Signal::SIGUSR1).expect("ask");
    let answered = soon(|| place.said(name).lines().count() > 1);
    assert!(answered, "no answer: {}; state {:?}", place.said(name), process::state(root));
    let said = place.said(name);
    assert!(said.lines().last().is_some_and(|l| l.starts_with(word) && l.ends_with("ok")), "{said}");
}

#[test]
fn counter_of_criu_answers_ok() {
    answers("counter", &[31001], "counter ", &[]);
}

#[test]
fn family_of_criu_answers_ok() {
    answers("family", &[31101, 31104, 31105, 31106], "family ", &[]);
}

/// Established connections, a listener and a UDP socket, by CRIU. In a network of its own: the ports are fixed.
#[test]
fn tcp_of_criu_answers_ok() {
    ckpt_tests::net::alone("tcp_of_criu_answers_ok", || answers("tcp", &[31201], "tcp ", &[]));
}

#[test]
fn counter_of_criu_answers_ok_in_a_pid_namespace_of_its_own() {
    answers("counter", &[31001], "counter ", &["--new-pidns"]);
}

/// Fields in which our images of the same program differ from CRIU's, and why they may.
/// `*` stands for any text; the first matching row counts.
const MAY_DIFFER: &[(&str, &str)] = &[
    // Numbers that the kernel gives out.
    (
        "*gpregs*",
        "addresses: the stack lies elsewhere in each run; a register can hold anything of the moment",
    ),
    ("*fpregs*", "what string functions leave in vector registers depends on addresses and on when"),
    ("*fs_base*", "address of the thread's block"),
    ("table* fd 003 .reg.pos", "the log: its first line holds the pid, which has more or fewer digits"),
    ("table* fd 003 .reg.size", "likewise"),
    ("*clear_tid_addr*", "address"),
    ("*futex_rla", "address"),
    ("*rseq_abi_pointer*", "address"),
    ("*rseq_cs*", "address"),
    ("*.mm_*", "addresses of the heap, the stack and the program's parts"),
    ("*mm.mm_saved_auxv*", "addresses and random bytes that the kernel gave the program"),
    ("*vma * start", "address"),
    ("*vma * end", "address"),
    ("*vma * pgoff", "offset of anonymous memory is its address"),
    (
        "* PAGEMAP *",
        "which pages are present depends on addresses and on when; the restored programs prove the contents",
    ),
    ("*inode*", "inode numbers"),
    ("*shmid*", "inode number of the shared memory"),
    ("*dev", "device numbers of the machine"),
    ("*.ino*", "inode numbers"),
    ("*pipe_id*", "inode number of the pipe"),
    ("*peer*", "inode number of the peer"),
    ("*mnt_id*", "mount of the machine"),
    // Signals 32 and 33 are libc's own: it lets no program reset them if whoever started it ignored them.
    ("*sigactions[029].sigaction", "inherited from the environment of the test"),
    ("*sigactions[030].sigaction", "inherited from the environment of the test"),
    // Time.
    ("*timers.*sec", "what is left of a timer"),
    ("*signals_s.signals*", "a tick of its timer may be pending"),
    ("timens*", "clocks"),
    ("*dump_uptime", "clock"),
    ("*inventory*dump_criu_run_id*", "id of a run of CRIU"),
    ("GHOST_FILE*tim.*", "times of the unlinked file"),
    // The machine and the user who ran it.
    ("*rlimits*", "limits of the machine that the golden images were made on"),
    ("*loginuid*", "session of the user"),
    ("*blk_sigset_extended*", "only with realtime signals, which these programs don't have"),
    ("*cg_set*", "control groups are for another issue"),
    ("*root_cg_set*", "control groups are for another issue"),
    ("inventory*plugins*", "plugins of CRIU"),
    ("inventory*network_lock*", "how CRIU locks the network"),
    ("inventory*lsmtype*", "security modules"),
    ("inventory*ckpt*", "our own fields"),
    ("*ckpt_*", "our own fields"),
    ("*cwd*name", "where the program was started"),
    ("*cwd*", "where the program was started"),
];

fn may_differ(key: &str) -> bool {
    fn glob(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|i| glob(rest, &text[i..])),
            Some((c, rest)) => text.first() == Some(c) && glob(rest, &text[1..]),
        }
    }
    MAY_DIFFER.iter().any(|(pattern, _)| glob(pattern.as_bytes(), key.as_bytes()))
}

/// Fields of a message as lines.
fn flatten(prefix: &str, message: &DynamicMessage, out: &mut BTreeMap<String, String>) {
    for (field, value) in message.fields() {
        let key = format!("{prefix}.{}", field.name());
        let values = match value {
            Value::List(list) => {
                list.iter().enumerate().map(|(i, v)| (format!("{key}[{i:03}]"), v)).collect()
            }
            single => vec![(key, single)],
        };
        for (key, value) in values {
            match (value, field.kind()) {
                (Value::Message(inner), _) => flatten(&key, inner, out),
                (Value::EnumNumber(n), Kind::Enum(names)) => {
                    let name = names.get_value(*n).map_or_else(|| n.to_string(), |v| v.name().to_owned());
                    out.insert(key, name);
                }
                (Value::Bytes(bytes), _) => {
                    out.insert(key, String::from_utf8_lossy(bytes).into_owned());
                }
                (value, _) => {
                    out.insert(key, value.to_string());
                }
            }
        }
    }
}

fn message(name: &str, bytes: &[u8]) -> DynamicMessage {
    let descriptor = message_descriptor(name).expect("a message of the schema");
    DynamicMessage::decode(descriptor, bytes).expect("a message that decodes")
}

/// A checkpoint with all numbers replaced by what they stand for: processes by their role, file ids by the file.
fn view(dir: &Path) -> BTreeMap<String, String> {
    let set = ImageSet::from_dir(dir).expect("read the images");
    let mut out = BTreeMap::new();
    let mut roles: BTreeMap<u64, String> = BTreeMap::new();
    let tree = set.all::<types::PstreeEntry>(Image::Pstree, 0).expect("the tree");
    for (index, entry) in tree.iter().enumerate() {
        roles.insert(u64::from(entry.pid), format!("task{index}"));
        for (number, tid) in entry.threads.iter().enumerate().skip(1) {
            roles.insert(u64::from(*tid), format!("task{index}thread{number}"));
        }
    }
    let role = |pid: u64| roles.get(&pid).cloned().unwrap_or_else(|| format!("outside({pid})"));
    for (index, entry) in tree.iter().enumerate() {
        let ids = [("ppid", entry.ppid), ("pgid", entry.pgid), ("sid", entry.sid)];
        for (name, pid) in ids {
            let who = if pid == 0 { "nobody".to_owned() } else { role(u64::from(pid)) };
            out.insert(format!("pstree task{index} {name}"), who);
        }
        out.insert(format!("pstree task{index} threads"), entry.threads.len().to_string());
    }
    // Files by id.
    let mut files: BTreeMap<u64, BTreeMap<String, String>> = BTreeMap::new();
    for bytes in set.entries(Image::Files, 0) {
        let entry = message("file_entry", bytes);
        let mut lines = BTreeMap::new();
        flatten("", &entry, &mut lines);
        let id = lines.get(".id").and_then(|id| id.parse().ok()).expect("a file's id");
        lines.retain(|key, _| key != ".id" && !key.ends_with(".id"));
        files.insert(id, lines);
    }
    let put_file = |out: &mut BTreeMap<String, String>, prefix: &str, id: u64| {
        for (key, value) in files.get(&id).into_iter().flatten() {
            out.insert(format!("{prefix}{key}"), value.clone());
        }
    };
    // What a file is called elsewhere: by the first descriptor that stands for it. Fdinfo comes early in the catalogue.
    let mut labels: BTreeMap<u64, String> = BTreeMap::new();
    for (image, arg) in set.images() {
        let who = match image {
            Image::Core | Image::Mm | Image::Ids | Image::Fs | Image::Pagemap => {
                format!("{} {}", role(arg), image.name())
            }
            Image::Fdinfo => format!("table{arg}"),
            Image::ShmemPagemap | Image::Pages | Image::GhostFile => image.name().to_owned(),
            _ => image.name().to_lowercase(),
        };
        if matches!(image, Image::Files | Image::Pages | Image::Pstree | Image::CkptManifest) {
            continue;
        }
        for (index, bytes) in set.entries(image, arg).iter().enumerate() {
            let Some(name) = image.entry_message(index) else { continue };
            let entry = message(name, bytes);
            let mut lines = BTreeMap::new();
            flatten("", &entry, &mut lines);
            match image {
                Image::Fdinfo => {
                    let number =
                        |name: &str| lines.get(name).and_then(|v| v.parse::<u64>().ok()).expect("a number");
                    let fd = number(".fd");
                    // The golden programs were started by something that left them an end of its pipe.
                    if fd == 251 {
                        continue;
                    }
                    labels.entry(number(".id")).or_insert_with(|| format!("{who} fd {fd}"));
                    out.insert(
                        format!("{who} fd {fd:03} flags"),
                        lines.get(".flags").cloned().unwrap_or_default(),
                    );
                    put_file(&mut out, &format!("{who} fd {fd:03} "), number(".id"));
                }
                Image::Fs => {
                    let number =
                        |name: &str| lines.get(name).and_then(|v| v.parse::<u64>().ok()).expect("a number");
                    put_file(&mut out, &format!("{who} cwd"), number(".cwd_id"));
                    put_file(&mut out, &format!("{who} root"), number(".root_id"));
                    out.insert(format!("{who} umask"), lines.get(".umask").cloned().unwrap_or_default());
                }
                Image::Mm => {
                    let mm = types::MmEntry::decode(&bytes[..]).expect("an mm");
                    put_file(&mut out, &format!("{who} exe"), u64::from(mm.exe_file_id));
                    // Areas by what they are; a file is told by its name.
                    for (key, value) in lines {
                        if let Some((area, field)) =
                            key.strip_prefix(".vmas[").and_then(|rest| rest.split_once("]."))
                        {
                            let of_file = mm
                                .vmas
                                .get(area.parse::<usize>().expect("an index"))
                                .is_some_and(|v| v.status & 0b1_0100_0000 != 0);
                            if field == "shmid" && of_file {
                                put_file(
                                    &mut out,
                                    &format!("{who} vma {area} file"),
                                    value.parse().unwrap_or_default(),
                                );
                            } else {
                                out.insert(format!("{who} vma {area} {field}"), value);
                            }
                        } else if key != ".exe_file_id" {
                            out.insert(format!("{who} mm{key}"), value);
                        }
                    }
                }
                _ => {
                    for (key, value) in lines {
                        let field = key.rsplit('.').next().unwrap_or_default();
                        let value = match field {
                            "id_for" | "orig_id" => {
                                value.parse().ok().and_then(|id| labels.get(&id).cloned()).unwrap_or(value)
                            }
                            "pid" | "si_pid" => value.parse().map_or(value, role),
                            _ => value,
                        };
                        out.insert(format!("{who} {index}{key}"), value);
                    }
                }
            }
        }
    }
    out
}

/// Our own dump of a golden program, started as its images say it was.
fn dump_of(name: &str) -> (Place, TestDir) {
    let place = Place::set_up();
    let dir = TestDir::new(name);
    let null = || fs::OpenOptions::new().write(true).open("/dev/null").expect("open /dev/null");
    // One open file behind stdout and stderr, as in the golden images.
    let shared = null();
    let mut child = Command::new("setsid")
        .args(["bash", "-c", CLOSE_ALL, "bash"])
        // As a job in the background of a script: with signals ignored, and a descriptor that the script had open.
        .args([
            "env",
            "--default-signal",
            "--ignore-signal=INT,QUIT",
            "bash",
            "-c",
            "exec \"$@\" 10</dev/null",
            "bash",
        ])
        .arg(Path::new(PLACE).join(name))
        .arg(place.output(name))
        .stdin(Stdio::null())
        .stdout(shared.try_clone().expect("clone"))
        .stderr(shared)
        .spawn()
        .expect("start the golden program");
    let pid = i32::try_from(child.id()).expect("a pid");
    assert!(soon(|| place.said(name).starts_with(&format!("ready {pid}"))), "{}", place.said(name));
    let _ = Pipeline::new(dir.path())
        .stage(["ckpt-scan", "-t", &pid.to_string()])
        .stage(["ckpt-sk"])
        .stage(["ckpt-write".into(), dir.path().join("img")])
        .run()
        .ok("dump");
    let _ = child.kill();
    let _ = child.wait();
    (place, dir)
}

fn agrees(name: &str) {
    let theirs = view(&golden(&format!("{name}.criu")));
    assert!(theirs.len() > 200, "only {} fields", theirs.len());
    let compared = theirs.keys().filter(|k| !may_differ(k)).count();
    eprintln!("{name}: {compared} of {} fields compared", theirs.len());
    // CRIU met all tasks in pause(2); we may meet one in the handler of its timer, with that signal blocked.
    let mut wrong = Vec::new();
    for _ in 0..5 {
        wrong = differences(name, &theirs);
        if !wrong.iter().any(|line| line.contains("tc.blk_sigset")) {
            break;
        }
    }
    assert!(wrong.is_empty(), "{} fields differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// What a new dump of the program has otherwise.
fn differences(name: &str, theirs: &BTreeMap<String, String>) -> Vec<String> {
    let (_place, dir) = dump_of(name);
    let ours = view(&dir.path().join("img"));
    let mut wrong = Vec::new();
    for (key, value) in theirs {
        match ours.get(key) {
            _ if may_differ(key) => {}
            None => wrong.push(format!("{key}: CRIU has {value:?}, we have nothing")),
            Some(ours) if ours != value => wrong.push(format!("{key}: CRIU has {value:?}, we have {ours:?}")),
            Some(_) => {}
        }
    }
    for (key, value) in ours.iter().filter(|(key, _)| !theirs.contains_key(*key) && !may_differ(key)) {
        wrong.push(format!("{key}: CRIU has nothing, we have {value:?}"));
    }
    wrong
}

#[test]
fn our_images_of_counter_agree_with_criu() {
    agrees("counter");
}

#[test]
fn our_images_of_family_agree_with_criu() {
    agrees("family");
}

/// Every message of every golden image, through our types and back: byte for byte.
#[test]
fn golden_images_pass_through_read_and_write() {
    for name in ["counter", "family", "tcp"] {
        let dir = TestDir::new(name);
        let copy = dir.path().join("copy");
        let _ = Pipeline::new(dir.path())
            .stage(["ckpt-read".into(), golden(&format!("{name}.criu"))])
            .stage(["ckpt-write".into(), copy.clone()])
            .run()
            .ok("ckpt-read | ckpt-write of CRIU's images");
        for file in fs::read_dir(golden(&format!("{name}.criu"))).expect("list images").flatten() {
            let same = fs::read(file.path()).ok() == fs::read(copy.join(file.file_name())).ok();
            assert!(same, "{} changed on the way", file.path().display());
        }
    }
}

#[test]
fn show_prints_every_golden_directory() {
    for name in ["counter", "family", "tcp"] {
        let dir = TestDir::new(name);
        let _ = Pipeline::new(dir.path())
            .stage(["ckpt-show".into(), golden(&format!("{name}.criu"))])
            .run()
            .ok("ckpt-show");
        let json = fs::read_to_string(dir.path().join("stdout")).expect("read");
        for word in ["pstree", "core", "mm"] {
            assert!(json.to_lowercase().contains(word), "no {word} in the output for {name}");
        }
    }
}
