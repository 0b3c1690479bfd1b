//! Programs that have pseudo-terminals of their own, and others on them.

use std::{io::Write, path::Path, process::Command};

use ckpt_tests::{Target, TestDir, installed, process, skip, soon, workload::CLOSE_ALL};

/// Asked by SIGUSR1, has a shell on a terminal of its own count, and a job of it interrupted.
const TALKER: &str = r#"
import os, pty, signal, sys
log = open(sys.argv[1], "a", buffering=1)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.environ["PS1"] = "ready> "
pid, terminal = pty.fork()
if not pid:
    os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
def said(end):
    text = b""
    while not text.endswith(end): text += os.read(terminal, 1000)
    return text
said(b"ready> ")
number = 1
os.write(terminal, b"n=1\n"); said(b"ready> ")
log.write("ready\n")
while True:
    signal.sigwait([signal.SIGUSR1])
    try:
        number *= 3
        os.write(terminal, b"n=$((n*3)); echo [$n]\n")
        text = said(b"ready> ")
        assert b"[%d]\r\n" % number in text, text
        os.write(terminal, b"cat\n")
        said(b"cat\r\n")
        os.write(terminal, b"here\n")
        said(b"here\r\nhere\r\n")
        assert os.tcgetpgrp(terminal) != pid
        os.write(terminal, b"\x03")
        text = said(b"ready> ")
        assert b"^C" in text, text
        log.write("PASS\n")
    except Exception as e:
        log.write("BROKEN %r\n" % e)
"#;

/// Until they are dropped, terminals that are made have numbers that other tests will not take.
fn lower_numbers() -> Vec<nix::pty::PtyMaster> {
    let open = || nix::pty::posix_openpt(nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_NOCTTY);
    (0..30).map(|_| open().expect("open a terminal")).collect()
}

#[test]
fn pseudo_terminals_come_back_as_pairs() {
    let lower = lower_numbers();
    let target = Target::start("pseudo_terminals");
    drop(lower);
    target.survives();
}

fn talker() -> Target {
    let dir = TestDir::new("pty_talker");
    let script = dir.path().join("talker.py");
    std::fs::write(&script, TALKER).expect("write the script");
    let mut command = Command::new("python3");
    command.arg(&script).arg(dir.path().join("log")).env("TERM", "dumb");
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    target
}

#[test]
fn a_shell_in_a_terminal_of_python_answers_on() {
    if !installed("python3") {
        return skip("a_shell_in_a_terminal_of_python_answers_on", "no python3");
    }
    let lower = lower_numbers();
    let target = talker();
    drop(lower);
    target.passes("the original");
    target.survives();
}

#[test]
fn what_nobody_has_read_yet_is_refused_and_stays() {
    let target = Target::start("pseudo_terminals");
    let before = target.at_rest();
    // The workload's own pair in packet mode is number 5 on; its terminal can be written to by name.
    let terminal = process::link(target.pid, "fd/5").display().to_string();
    let writes = || {
        let mut file = std::fs::OpenOptions::new().write(true).open(&terminal)?;
        file.write_all(b"unread")
    };
    if let Err(error) = writes() {
        return skip("what_nobody_has_read_yet_is_refused_and_stays", &error.to_string());
    }
    let pid = target.pid.to_string();
    let _ = target.dump("img").fails("ckpt-scan", 3, &[&pid, "bytes were printed", &terminal]);
    assert!(!target.path("img").exists());
    target.unchanged(&before);
    assert!(target.verdict().starts_with("BROKEN nothing has happened"), "the bytes are still there");
}

#[test]
fn a_terminal_that_others_have_open_is_refused() {
    let target = Target::start("pseudo_terminals");
    let terminal = process::link(target.pid, "fd/5").display().to_string();
    let Ok(held) = std::fs::OpenOptions::new().write(true).open(&terminal) else {
        return skip("a_terminal_that_others_have_open_is_refused", "it can't be opened");
    };
    let own = std::process::id().to_string();
    let _ = target.dump("img").fails("ckpt-scan", 3, &[&terminal, "outside the tree", &own]);
    drop(held);
    target.passes("the target");
}

/// Number and name of a pair may be somebody else's by then: open descriptors work all the same.
#[test]
fn a_terminal_whose_number_is_taken_gets_another() {
    let target = talker();
    target.dump_ok("img");
    target.passes("the original");
    let outcome = ckpt_tests::Pipeline::new(target.dir.path())
        .stage(["ckpt-restore".into(), "--detach".into(), "--new-pidns".into(), target.path("img")])
        .run()
        .ok("restore beside the original");
    assert!(outcome.said.contains("comes back as /dev/pts/"), "{outcome}");
    target.passes("the original beside the restored one");
}

/// A loop that says what it is told through a FIFO.
fn told(fifo: &Path) -> String {
    let loops = "while true; do read -r word < \"$FIFO\" && echo \"<$word>\"; done";
    format!("FIFO='{}'; echo begins; {loops}", fifo.display())
}

fn make_fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("mkfifo");
}

fn holds(path: &Path, text: &str) -> bool {
    std::fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
}

#[test]
fn script_writes_on_what_its_command_says() {
    if !installed("script") {
        return skip("script_writes_on_what_its_command_says", "no script");
    }
    let dir = TestDir::new("script");
    let (fifo, out) = (dir.path().join("fifo"), dir.path().join("typescript"));
    make_fifo(&fifo);
    let mut command = Command::new("script");
    let lower = lower_numbers();
    command.args(["-q", "-f", "-c"]).arg(told(&fifo)).arg(&out).env("SHELL", "/bin/bash");
    let target = Target::spawn(dir, command);
    let says = |word: &str| {
        std::fs::write(&fifo, format!("{word}\n")).expect("write to the FIFO");
        assert!(soon(|| holds(&out, &format!("<{word}>"))), "{word}: {:?}", std::fs::read(&out));
    };
    assert!(soon(|| holds(&out, "begins")), "script does not begin");
    drop(lower);
    says("first");
    let before = target.at_rest();
    target.dump_ok("img");
    target.unchanged(&before);
    says("second");
    target.end();
    target.restore_ok("img");
    target.looks_like(&before);
    says("third");
}

#[test]
fn a_tmux_server_keeps_its_panes() {
    if !installed("tmux") {
        return skip("a_tmux_server_keeps_its_panes", "no tmux");
    }
    process::become_subreaper();
    let dir = TestDir::new("tmux");
    let socket = dir.path().join("sock");
    let tmux = |words: &[&str]| {
        let mut command = Command::new("bash");
        command.args(["-c", CLOSE_ALL, "bash", "tmux", "-f", "/dev/null", "-S"]).arg(&socket).args(words);
        command
            .env(process::MARKER, dir.path())
            .env_remove("TMUX")
            .env("TERM", "screen")
            .env("LC_ALL", "C.UTF-8");
        let output = command.stdin(std::process::Stdio::null()).output().expect("run tmux");
        assert!(output.status.success(), "tmux {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    tmux(&["new-session", "-d", "-x", "90", "-y", "20", "PS1='> ' bash --norc --noprofile"]);
    tmux(&["split-window", "-h", "PS1='% ' bash --norc --noprofile"]);
    let pid: i32 = tmux(&["display-message", "-p", "#{pid}"]).trim().parse().expect("a pid");
    let says = |pane: &str, what: &str| {
        tmux(&["send-keys", "-t", pane, &format!("echo $(({what}+1))"), "Enter"]);
        let answer = (what.parse::<u32>().expect("a number") + 1).to_string();
        let came = soon(|| tmux(&["capture-pane", "-p", "-t", pane]).contains(&answer));
        assert!(came, "{what}: {}", tmux(&["capture-pane", "-p", "-t", pane]));
    };
    says(":.0", "41234");
    says(":.1", "51234");
    let mut said = String::new();
    let dumped = soon(|| {
        // A shell may be about to print its prompt.
        let _ = std::fs::remove_dir_all(dir.path().join("img"));
        let outcome = ckpt_tests::Pipeline::new(dir.path())
            .line(&format!("ckpt-scan -t {pid} | ckpt-sk"))
            .stage(["ckpt-write".into(), dir.path().join("img")])
            .run();
        said = outcome.to_string();
        outcome.code("ckpt-write") == 0
    });
    assert!(dumped, "{said}");
    says(":.0", "61234");
    process::end_all(dir.path());
    let _ = std::fs::remove_file(&socket);
    let _ = ckpt_tests::Pipeline::new(dir.path())
        .stage(["ckpt-restore".into(), "--detach".into(), dir.path().join("img")])
        .run()
        .ok("restore the server");
    // What was on the screens at the time of the dump, and no later.
    let screen = tmux(&["capture-pane", "-p", "-t", ":.0"]);
    assert!(screen.contains("41235") && !screen.contains("61235"), "{screen}");
    says(":.0", "71234");
    says(":.1", "81234");
    assert_eq!(tmux(&["display-message", "-p", "#{window_width}x#{window_height}"]).trim(), "90x20");
    tmux(&["kill-server"]);
    process::end_all(dir.path());
}
