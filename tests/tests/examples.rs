//! Every example of the manual, of `--help` and of the README is run as it stands: a shell gets the line, with the
//! numbers and paths of a live server put in place of the manual's.
//!
//! The cast: 4711 is a program, 48213 its connection to somebody outside, /run/b.sock a socket where somebody waits.
//! `ssh host` is this machine.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use ckpt_tests::{Pipeline, Target, here, installed, process, skip, soon, tool};

use crate::{cli::TOOLS, sockets};

/// What needs more than the cast has, by a word of the line.
const NOT_RUN: &[(&str, &str)] = &[
    ("--port", "needs a server on TCP port 80"),
    ("--rules", "its rules are about TCP port 80"),
    ("path=/run/", "needs a connection to a socket of that name"),
    ("--accept", "waits for a client to connect"),
    ("ckpt-series", "goes on until it is stopped"),
    ("ckpt series", "goes on until it is stopped"),
    ("ckpt-track", "needs a tracker"),
    ("series/", "needs a series of increments"),
    ("| ckpt-sk --list", "lists of streams are still to come"),
    ("rename /run", "lines of a file of rules"),
    ("--close kind=unix-stream", "needs a server without a listener"),
    ("$(PID)", "a line of a Makefile"),
    ("man man/", "opens a pager"),
];

/// Where images are in examples.
const IMAGES: &[&str] = &["checkpoint", "images", "DIR", "old"];

/// Lines that belong together, and where they are from.
struct Example {
    from: String,
    lines: Vec<String>,
}

/// Examples of a manual page: `.Dl` lines, and displays.
fn of_page(name: &str, text: &str) -> Vec<Example> {
    let section = text.split(".Sh ").find_map(|s| s.strip_prefix("EXAMPLES\n")).unwrap_or_default();
    let mut examples = vec![Vec::new()];
    let mut display = false;
    for line in section.lines() {
        let line = line.replace(r"\e", r"\");
        if let Some(line) = line.strip_prefix(".Dl ") {
            examples.last_mut().expect("never empty").push(line.to_owned());
        } else if line.starts_with(".Bd") || line.starts_with(".Ed") {
            display = line.starts_with(".Bd");
        } else if display {
            examples.last_mut().expect("never empty").push(line);
        } else if !examples.last().expect("never empty").is_empty() {
            examples.push(Vec::new());
        }
    }
    let examples = examples.into_iter().filter(|lines| !lines.is_empty());
    examples.map(|lines| Example { from: name.to_owned(), lines }).collect()
}

/// Examples of a `--help`: each line is one.
fn of_help(name: &str) -> Vec<Example> {
    let output = Command::new(tool(name)).arg("--help").output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines().skip_while(|l| !l.starts_with("Example")).skip(1);
    let lines = lines.take_while(|l| l.starts_with("  "));
    lines.map(|l| Example { from: format!("{name} --help"), lines: vec![l.trim().to_owned()] }).collect()
}

/// Indented commands of the README.
fn of_readme() -> Vec<Example> {
    let text = fs::read_to_string(here().join("../README.md")).expect("read README.md");
    let commands = text.lines().filter(|l| l.starts_with("    ")).map(str::trim);
    let ours = commands.filter(|l| l.starts_with("ckpt") || l.starts_with("sk-"));
    ours.map(|l| Example { from: "README.md".to_owned(), lines: vec![l.to_owned()] }).collect()
}

fn all() -> Vec<Example> {
    let mut all = of_readme();
    let mut pages: Vec<_> = fs::read_dir(here().join("../man")).expect("list man").flatten().collect();
    pages.sort_by_key(std::fs::DirEntry::path);
    for page in pages {
        let text = fs::read_to_string(page.path()).expect("read a page");
        all.extend(of_page(&page.file_name().to_string_lossy(), &text));
    }
    all.extend(TOOLS.iter().flat_map(|name| of_help(name)));
    all
}

fn programs(at: &Path) {
    fs::create_dir_all(at).expect("make a directory");
    // The far end has pids of its own, and a directory of its own where no checkpoint lies yet unless one is read.
    let ssh = r#"#!/bin/sh
shift
mkdir -p far
case $* in *ckpt-write*) cd far;; esac
exec sh -c "$(printf %s "$*" | sed 's/ckpt-restore/ckpt-restore --new-pidns/')"
"#;
    fs::write(at.join("ssh"), ssh).expect("write ssh");
    fs::set_permissions(at.join("ssh"), fs::Permissions::from_mode(0o755)).expect("chmod");
}

/// Whether a stage of the line that writes images, or one that does not, names `path`.
fn uses(line: &str, path: &str, writing: bool) -> bool {
    let writer = |stage: &str| stage.contains("ckpt-write ") || stage.contains("dump ");
    line.split('|').any(|stage| writer(stage) == writing && names(stage, path))
}

fn names(line: &str, path: &str) -> bool {
    line.split(|c: char| c.is_whitespace() || c == '\'' || c == '/').any(|word| word == path)
}

/// Runs an example from scratch; what went wrong.
fn run(example: &Example) -> Result<(), String> {
    let connected = example.lines.iter().any(|l| l.contains("48213"));
    // The connection has to stay open meanwhile.
    let (target, _talk, id) = if connected {
        let (target, talk, id) = sockets::conversation();
        (target, Some(talk), id)
    } else {
        (Target::start("signals_pending"), None, 0)
    };
    let dir = target.dir.path().to_owned();
    let at = dir.display().to_string();
    let pid = target.pid.to_string();
    programs(&dir.join("bin"));
    let _listener = UnixListener::bind(dir.join("b.sock")).expect("listen");
    let dump = |name: &str| {
        let mut sk = vec!["ckpt-sk".to_owned()];
        sk.extend(connected.then(|| format!("--external={id}")));
        let _ = Pipeline::new(&dir)
            .stage(["ckpt-scan", "-t", &pid])
            .stage(sk)
            .stage(["ckpt-write".into(), dir.join(name)])
            .run()
            .ok("dump for an example");
    };
    let lines: Vec<String> = example
        .lines
        .iter()
        .map(|line| {
            let line = line.replace("/var/ckpt/", "ckpt.").replace("/var/tmp/", "");
            let line =
                line.replace("/run/b.sock", &format!("{at}/b.sock")).replace("/run/", &format!("{at}/"));
            let line = line.replace("core-7", &format!("core-{pid}")).replace("'...'", ".");
            line.replace("4711", &pid).replace("48213", &id.to_string())
        })
        .collect();
    let ends = |c: char| c.is_whitespace() || c == '\'';
    let numbered = lines.iter().flat_map(|l| l.split(ends)).filter(|word| word.starts_with("ckpt."));
    let places: BTreeSet<String> = IMAGES.iter().copied().chain(numbered).map(str::to_owned).collect();
    for name in places {
        let first = |writing| lines.iter().position(|line| uses(line, &name, writing));
        if first(false).is_some_and(|read| first(true).is_none_or(|written| read <= written)) {
            dump(&name);
        }
    }
    let tree = process::tree(target.pid);
    let comm = process::text(target.pid, "comm");
    for line in &lines {
        let restores = line.contains("ckpt-restore") || line.contains("ckpt restore");
        if restores && !line.contains("--new-pidns") && !line.contains("ckpt-scan") {
            target.end();
        }
        line_runs(line, &target, &comm, restores)?;
        if line.contains("--kill") {
            process::wait_free(&tree);
        }
    }
    Ok(())
}

fn line_runs(line: &str, target: &Target, comm: &str, restores: bool) -> Result<(), String> {
    let dir = target.dir.path();
    let path = format!(
        "{}:{}:{}",
        dir.join("bin").display(),
        ckpt_tests::bin_dir().display(),
        std::env::var("PATH").unwrap_or_default()
    );
    // Descriptors that an example hands in are one end of a connection.
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().expect("make a pair");
    let prelude = "set -o pipefail; for n in 5 7; do eval \"exec $n<&0\"; done; exec </dev/null\n";
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("{prelude}{line}")).current_dir(dir).env("PATH", path);
    shell.stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut shell = shell.spawn().expect("start bash");
    let foreground = restores && !line.contains("--detach");
    if foreground {
        let beside = line.contains("--new-pidns");
        let pid = || {
            let restored = |&p: &i32| process::text(p, "comm") == comm && beside == (p != target.pid);
            process::marked(dir).into_iter().find(restored)
        };
        let mut alive = None;
        soon(|| {
            alive = pid().filter(|&p| process::state(p) == Some('S'));
            alive.is_some() || shell.try_wait().is_ok_and(|ended| ended.is_some())
        });
        match alive {
            Some(pid) => {
                let _ = target.verdict_by(pid);
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            None => {
                let _ = shell.kill();
            }
        }
    }
    let mut said = String::new();
    // What runs on detached may hold these pipes' other ends for as long as it lives: it does not.
    for pipe in [
        shell.stdout.take().map(|p| Box::new(p) as Box<dyn Read>),
        shell.stderr.take().map(|p| Box::new(p) as Box<dyn Read>),
    ] {
        let mut bytes = Vec::new();
        pipe.expect("a pipe").read_to_end(&mut bytes).expect("read what it says");
        said += &String::from_utf8_lossy(&bytes);
    }
    let status = shell.wait().expect("wait for bash").code();
    let wanted = if foreground { 128 + 9 } else { 0 };
    if status != Some(wanted) {
        said.truncate(1000);
        return Err(format!("{line}\n  status {status:?} instead of {wanted}: {said}"));
    }
    if restores && !foreground && !line.contains("ssh") && !line.contains("--new-pidns") {
        if !process::marked(dir).contains(&target.pid) {
            return Err(format!("{line}\n  nothing was restored: {said}"));
        }
        target.passes(line);
    }
    Ok(())
}

#[test]
fn every_example_runs_as_it_stands() {
    for program in ["jq", "zstd"] {
        if !installed(program) {
            return skip("every_example_runs_as_it_stands", &format!("no {program}"));
        }
    }
    let examples: Vec<Example> = all()
        .into_iter()
        .filter(|e| !e.lines.iter().any(|l| NOT_RUN.iter().any(|(word, _)| l.contains(word))))
        .collect();
    assert!(examples.len() > 40, "only {} examples were found", examples.len());
    let next = AtomicUsize::new(0);
    let failures: Vec<String> = std::thread::scope(|scope| {
        let work = || {
            let mut failures = Vec::new();
            while let Some(example) = examples.get(next.fetch_add(1, Ordering::SeqCst)) {
                if let Err(error) = run(example) {
                    failures.push(format!("{}: {error}", example.from));
                }
            }
            failures
        };
        let workers = [scope.spawn(work), scope.spawn(work)];
        workers.into_iter().flat_map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    assert!(
        failures.is_empty(),
        "{} of {} examples:\n{}",
        failures.len(),
        examples.len(),
        failures.join("\n")
    );
}

/// The story of the README: a server goes back while its client has moved on. Every command of the section is run as it
/// stands, but for names, and for a checkpoint of message 6 instead of 60.
#[test]
fn the_story_of_the_readme_runs_as_it_stands() {
    const MESSAGES: usize = 6;
    let text = fs::read_to_string(here().join("../README.md")).expect("read README.md");
    let section = text.split("\n## ").find(|s| s.starts_with("Going back")).expect("the section is there");
    let mut commands = section.lines().filter_map(|l| l.strip_prefix("    ")).map(str::trim);
    let target = Target::start_with("answering", &["-", "a.sock"]);
    let dir = target.dir.path().to_owned();
    let at = dir.display().to_string();
    let (bin, ckpt) = (dir.join("bin"), dir.join("ckpt"));
    for made in [&bin, &ckpt] {
        fs::create_dir(made).expect("make a directory");
    }
    let asking = |from: usize, count: usize| {
        let mut command = Command::new(ckpt_tests::workload::compile("asking"));
        command.arg("connect").arg(dir.join("a.sock")).args([from.to_string(), count.to_string()]);
        command
    };
    let mut first = asking(1, MESSAGES + 2);
    let mut first = first.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start the client");
    let mut pace = first.stdin.take().expect("piped");
    let mut heard = std::io::BufReader::new(first.stdout.take().expect("piped"));
    let mut hear = |line: String| {
        let mut answer = String::new();
        std::io::BufRead::read_line(&mut heard, &mut answer).expect("hear the client");
        assert_eq!(answer.trim_end(), line);
    };
    target.wait_log("connected");
    let id = sockets::latest(&target).to_string();
    // A client that goes on after a message, as soon as it can.
    let client = format!(
        "#!/bin/bash\nuntil yes | {} connect \"$3\" $(($2 + 1)) 2; do sleep 0.05; done >>{at}/heard\n",
        ckpt_tests::workload::compile("asking").display()
    );
    fs::write(bin.join("client"), client).expect("write client");
    fs::set_permissions(bin.join("client"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let path = format!(
        "{}:{}:{}",
        bin.display(),
        ckpt_tests::bin_dir().display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let shell = |lines: &str| {
        let lines = lines.replace("/var/ckpt/", &format!("{}/", ckpt.display())).replace("/60", "/6");
        let lines =
            lines.replace("--from-message 60", "--from-message 6").replace("/run/", &format!("{at}/"));
        let lines = lines.replace("4711", &target.pid.to_string()).replace("48213", &id);
        let mut command = Command::new("bash");
        command.args(["-c", &format!("exec 7<&0; {lines}")]).current_dir(&dir).env("PATH", &path);
        command
    };

    let line = commands.next().expect("the loop that checkpoints");
    assert!(line.starts_with("n=0; while read"), "{line}");
    let mut each = shell(line).stdin(Stdio::piped()).spawn().expect("start bash");
    let mut every = each.stdin.take().expect("piped");
    for n in 1..=MESSAGES + 1 {
        use std::io::Write;
        pace.write_all(b"\n").expect("let the client ask");
        hear(format!("answer {n} to question {n}"));
        every.write_all(b"message\n").expect("let the loop go on");
        assert!(soon(|| ckpt.join(n.to_string()).exists()), "no checkpoint after message {n}");
    }
    drop(every);
    assert!(each.wait().expect("wait for bash").success());
    {
        use std::io::Write;
        pace.write_all(b"\n").expect("let the client ask");
    }
    hear(format!("answer {0} to question {0}", MESSAGES + 2));
    assert!(first.wait().expect("wait for the client").success());

    // The same client comes again; then somebody else at another path, somebody who is called on, and somebody who is
    // already connected.
    let line = format!(
        "{}\n{}\nwait",
        commands.next().expect("restore by accept"),
        commands.next().expect("a client")
    );
    target.end();
    let output = shell(&line).stdin(Stdio::null()).output().expect("run bash");
    assert!(output.status.success(), "{line}: {output:?}");
    let heard = fs::read_to_string(dir.join("heard")).expect("what the client heard");
    assert_eq!(heard, "answer 7 to question 7\nanswer 8 to question 8\n");
    target.passes(&line);
    target.end();
    let mut ways = 0;
    for (way, line) in commands.enumerate() {
        let mut talk = None;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("make a pair");
        let there = dir.join("b.sock");
        let _ = fs::remove_file(&there);
        let listener = UnixListener::bind(there).expect("listen");
        let mut running = shell(line).stdin(std::os::fd::OwnedFd::from(theirs)).spawn().expect("start bash");
        if line.contains("--accept") {
            assert!(soon(|| {
                talk = std::os::unix::net::UnixStream::connect(dir.join("again.sock")).ok();
                talk.is_some()
            }));
        }
        assert!(running.wait().expect("wait for bash").success(), "{line}");
        if line.contains("--connect") {
            talk = Some(listener.accept().expect("the server comes").0);
        }
        let mut talk = sockets::Talk::over(talk.unwrap_or(ours));
        assert_eq!(talk.ask(&format!("way {way}")), format!("answer 7 to way {way}"), "{line}");
        target.passes(line);
        target.end();
        ways += 1;
    }
    assert_eq!(ways, 3, "by accept, by connect, by inheritance");
}
