//! Descriptors that are no sockets.

use std::process::{Command, Stdio};

use ckpt_tests::{Pipeline, Target, TestDir, process, workload};
use nix::{pty::openpty, sys::signal::Signal};

crate::survives! {
    pidfds_stand_for_the_same_processes: "pidfds";
    files_in_proc_are_read_on: "proc_files";
    regular_files_keep_offsets_flags_and_sharing: "files_regular";
    deleted_files_keep_their_contents: "files_deleted";
    pipes_and_fifos_keep_bytes_in_flight: "pipes";
    eventfds_timerfds_and_signalfds_go_on: "event_files";
    epoll_sets_watch_the_same: "epoll_sets";
    memfds_keep_contents_and_seals: "memfds";
    file_locks_stay_with_their_owners: "file_locks";
    descriptors_of_any_number_come_back: "descriptors_many";
    inotify_watches_keep_their_numbers: "inotify_user";
    files_of_two_processes: "open_everywhere";
}

/// A command that can have 300 files open, and may not change that.
fn with_little_room(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("prlimit");
    command.args(["--nofile=300:300", "setpriv", "--bounding-set=-sys_resource"]).arg(program);
    command
}

/// Together the two have half as many files again open as each tool may have.
#[test]
fn a_tree_may_have_more_files_open_than_the_tools() {
    let dir = TestDir::new("open_everywhere");
    let mut command = with_little_room(workload::compile("open_everywhere"));
    command.arg(dir.path().join("log"));
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    let before = target.at_rest();
    let tool = |name| with_little_room(ckpt_tests::tool(name));
    let mut scan = tool("ckpt-scan");
    let mut scan =
        scan.args(["-t", &target.pid.to_string()]).stdout(Stdio::piped()).spawn().expect("ckpt-scan");
    let mut sk = tool("ckpt-sk");
    let mut sk =
        sk.stdin(scan.stdout.take().expect("a pipe")).stdout(Stdio::piped()).spawn().expect("ckpt-sk");
    let mut write = tool("ckpt-write");
    write.arg(target.path("img")).stdin(sk.stdout.take().expect("a pipe"));
    assert!(write.status().expect("ckpt-write").success());
    assert!(scan.wait().expect("ckpt-scan").success() && sk.wait().expect("ckpt-sk").success());
    target.unchanged(&before);
    target.end();
    let mut restore = tool("ckpt-restore");
    let output = restore.arg("--detach").arg(target.path("img")).output().expect("ckpt-restore");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.looks_like(&before);
    target.passes("the restored one");
}

/// The restorer can have little more open than the program has, whose numbers fill all of that.
#[test]
fn a_task_may_use_nearly_all_numbers() {
    let target = Target::start("descriptors_many");
    let before = target.at_rest();
    target.dump_ok("img");
    target.end();
    let outcome = Command::new("prlimit")
        .args(["--nofile=800:800", "setpriv", "--bounding-set=-sys_resource"])
        .arg(ckpt_tests::tool("ckpt-restore"))
        .args(["--detach", "img"])
        .current_dir(target.dir.path())
        .output()
        .expect("run prlimit");
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    target.looks_like(&before);
    target.passes("the restored one");
}

#[test]
fn unread_inotify_events_are_refused_and_stay() {
    let target = Target::start("inotify_user");
    let watched = target.path(&format!("watched-{}", target.pid));
    std::fs::write(watched.join("new"), "").expect("make a file");
    let before = target.at_rest();
    let _ = target.dump("img").fails("ckpt-scan", 3, &["inotify", &target.pid.to_string(), "events wait"]);
    assert!(!target.path("img").exists());
    target.unchanged(&before);
    assert!(target.verdict().starts_with("BROKEN no event yet"));
}

#[test]
fn shell_job_gets_the_terminal_of_its_restorer() {
    let pty = openpty(None, None).expect("open a pty");
    let dir = TestDir::new("terminal");
    let log = dir.path().join("log");
    let tty = || std::fs::File::from(pty.slave.try_clone().expect("clone the terminal"));
    // Without the master's descriptor, which a child of this process would inherit.
    let mut command = Command::new("bash");
    command.args(["-c", workload::CLOSE_ALL, "bash"]).arg(workload::compile("terminal"));
    command.arg(&log).stdin(tty()).stdout(tty()).stderr(tty());
    let target = Target::spawn_as_it_is(dir, command);
    target.wait_log("ready");
    target.dump_ok("img");
    target.end();
    let restore = Command::new(ckpt_tests::tool("ckpt-restore"))
        .arg("--detach")
        .arg(target.path("img"))
        .stdin(tty())
        .stdout(tty())
        .stderr(tty())
        .status()
        .expect("run ckpt-restore");
    assert!(restore.success(), "{restore}");
    target.passes("the restored one");
}

/// An interactive shell in a terminal of its own.
struct Shell {
    keys: std::fs::File,
    pid: i32,
}

impl Shell {
    fn start(target: &std::path::Path, rows: u16, columns: u16) -> Self {
        let size = nix::pty::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).expect("open a pty");
        let tty = || std::fs::File::from(pty.slave.try_clone().expect("clone the terminal"));
        let output = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(target.join("shell"))
            .expect("open the shell's output");
        let mut command = Command::new("setsid");
        command.args([
            "--ctty",
            "bash",
            "-c",
            workload::CLOSE_ALL,
            "bash",
            "bash",
            "--norc",
            "--noprofile",
            "-i",
        ]);
        command.stdin(tty()).stdout(tty()).stderr(tty()).current_dir(target).env("PS1", "");
        command.env(process::MARKER, target).env("HISTFILE", "");
        // Its end is that of the test: process::end_all.
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().expect("start a shell");
        let mut screen = std::fs::File::from(pty.master.try_clone().expect("clone the master"));
        // What nobody reads would stop the shell.
        std::thread::spawn(move || std::io::copy(&mut screen, &mut &output));
        Self { keys: pty.master.into(), pid: i32::try_from(child.id()).expect("a pid") }
    }

    fn press(&mut self, keys: &str) {
        use std::io::Write;
        self.keys.write_all(keys.as_bytes()).expect("press keys");
    }
}

/// An editor is dumped in one window and goes on in another one, of another size: raw keys, its screen drawn again,
/// Ctrl-Z and fg, and its exit status to the shell.
#[test]
fn editor_goes_on_in_another_window() {
    process::become_subreaper();
    let dir = TestDir::new("fullscreen");
    let program = workload::compile("fullscreen");
    let mut first = Shell::start(dir.path(), 24, 80);
    let mut target = Target { pid: first.pid, dir };
    first.press(&format!("{} log\r", program.display()));
    target.wait_log("drawn 24x80");
    first.press("a");
    target.wait_log("key a");
    let jobs = process::children(first.pid);
    target.pid = *jobs.first().expect("a job of the shell");
    target.dump_ok("img");
    first.press("b");
    target.wait_log("key b");
    target.end();
    target.note("restore");
    let mut second = Shell::start(target.dir.path(), 30, 100);
    second.press(&format!("{} img\r", ckpt_tests::tool("ckpt-restore").display()));
    target.wait_log("drawn 30x100");
    second.press("c");
    target.wait_log("key c");
    second.press("\x1a");
    assert!(ckpt_tests::soon(|| process::state(target.pid) == Some('T')), "Ctrl-Z stops it");
    second.press("echo shell again >>log\r");
    target.wait_log("shell again");
    second.press("fg\r");
    target.wait_log("continued in the foreground");
    second.press("d");
    target.wait_log("key d");
    second.press("q");
    target.wait_log("key q");
    second.press("echo status $? >>log\r");
    target.wait_log("status 42");
    second.press("stty -a >modes; echo done >>log\r");
    target.wait_log("done");
    let modes = std::fs::read_to_string(target.path("modes")).expect("read the modes");
    assert!(modes.contains(" icanon") && modes.contains(" echo "), "{modes}");
}

/// A pipe whose other end is held by someone outside is refused, naming pid, fd and the pipe.
#[test]
fn pipe_to_the_outside_is_refused_by_name() {
    let dir = TestDir::new("outside");
    let mut command = Command::new("sleep");
    command
        .arg("1000")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    process::become_subreaper();
    let mut child = command.env(process::MARKER, dir.path()).spawn().expect("start sleep");
    let target = Target { pid: i32::try_from(child.id()).expect("a pid"), dir };
    let outcome = target.dump("img");
    assert!(!target.path("img").exists(), "{outcome}");
    let _ = outcome.fails("ckpt-scan", 3, &["pipe:[", &target.pid.to_string()]);
    assert_eq!(process::state(target.pid), Some('S'));
    child.kill().and_then(|()| child.wait()).expect("end sleep");
}

fn scribble(path: &std::path::Path) {
    use std::io::Write;
    std::fs::OpenOptions::new()
        .append(true)
        .open(path)
        .and_then(|mut f| f.write_all(b"changed"))
        .expect("change the file");
}

#[test]
fn changed_data_file_warns_and_strict_refuses() {
    let target = Target::start("files_regular");
    target.dump_ok("img");
    target.end();
    scribble(&target.path("rw"));
    let strict = Pipeline::new(target.dir.path())
        .stage([
            "ckpt-restore".into(),
            "--detach".into(),
            "--files".into(),
            "strict".into(),
            target.path("img"),
        ])
        .run();
    assert_ne!(strict.code("ckpt-restore"), 0, "{strict}");
    assert!(strict.said.contains("/rw"), "{strict}");
    assert!(process::is_free(target.pid));
    let outcome = target.restore("img").ok("restore");
    assert!(outcome.said.contains("/rw"), "the warning names the file: {outcome}");
}

#[test]
fn changed_executable_is_refused() {
    let dir = TestDir::new("changed");
    let copy = dir.path().join("program");
    std::fs::copy(workload::compile("itimers"), &copy).expect("copy the workload");
    let mut command = Command::new(&copy);
    command.arg(dir.path().join("log"));
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    target.dump_ok("img");
    target.end();
    // Another program under the same name: another build id and size.
    std::fs::remove_file(&copy)
        .and_then(|()| std::fs::copy(workload::compile("registers"), &copy))
        .expect("replace the program");
    let outcome = target.restore("img");
    assert_ne!(outcome.code("ckpt-restore"), 0, "{outcome}");
    assert!(outcome.said.contains("program"), "{outcome}");
    assert!(process::is_free(target.pid), "nothing is left");
    let _ = outcome.sane();
}

#[test]
fn missing_file_is_named_and_nothing_is_left() {
    let target = Target::start("files_regular");
    target.dump_ok("img");
    target.end();
    std::fs::remove_file(target.path("append")).expect("remove a file");
    let outcome = target.restore("img").fails("ckpt-restore", 1, &["append"]);
    assert!(process::is_free(target.pid), "{outcome}");
}

#[test]
fn restored_ghosts_leave_no_names() {
    let target = Target::start("files_deleted");
    let names = || {
        let mut v: Vec<_> =
            std::fs::read_dir(target.dir.path()).expect("list").flatten().map(|f| f.file_name()).collect();
        v.retain(|n| !n.to_string_lossy().ends_with(".err") && n != "stdout" && n != "img");
        v.sort();
        v
    };
    let before = names();
    target.dump_ok("img");
    target.end();
    target.restore_ok("img");
    assert_eq!(before, names());
    target.signal(Signal::SIGKILL);
    target.end();
    assert_eq!(before, names());
}

/// A process outside is somebody else's to identify: named at dump, handed in at restore.
#[test]
fn a_pidfd_of_a_process_outside_has_to_be_handed_in() {
    if !ckpt_tests::installed("python3") {
        ckpt_tests::skip("pidfd outside", "no python3");
        return;
    }
    let us = std::process::id();
    let script = format!(
        "import os, select, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
fd = os.pidfd_open({us})
open('log', 'a').write('ready\\n')
signal.sigwait([signal.SIGUSR1])
os.kill({us}, 0)
told = open(f'/proc/self/fdinfo/{{fd}}').read()
open('log', 'a').write('PASS\\n' if 'Pid:\\t{us}\\n' in told else 'BROKEN ' + told)
signal.pause()"
    );
    let mut command = std::process::Command::new("python3");
    command.args(["-c", &script]);
    let target = Target::spawn(ckpt_tests::TestDir::new("pidfd"), command);
    target.wait_log("ready");
    let pids = process::tree(target.pid);
    let external = format!("pidfd:[{us}]");
    let _ = target.dump("refused").fails("ckpt-scan", 3, &["outside of the tree", &external]);
    let _ = target.dumping("img", &["--external", &external], &[]).run().ok("dump");
    target.end();
    process::wait_free(&pids);
    let _ = target.restore("img").fails("ckpt-restore", 3, &["--inherit-fd", &external]);
    let launch = format!(
        "import os, sys
os.dup2(os.pidfd_open({us}), 5)
os.execvp(sys.argv[1], sys.argv[1:])"
    );
    let _ = ckpt_tests::Pipeline::new(target.dir.path())
        .stage([
            "python3".into(),
            "-c".into(),
            launch.into(),
            ckpt_tests::tool("ckpt-restore").into_os_string(),
            "--detach".into(),
            "--inherit-fd".into(),
            format!("fd[5]:{external}").into(),
            target.path("img").into_os_string(),
        ])
        .run()
        .ok("restore");
    target.passes("the restored one");
}
