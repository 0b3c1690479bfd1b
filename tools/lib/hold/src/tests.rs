//! The two ends against each other, in one process.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    thread,
    time::{Duration, Instant},
};

use ckpt_sys::gift::Lending;
use ckpt_tests::Random;
use nix::{sys::stat::fstat, unistd::geteuid};

use super::*;

const SOON: Duration = Duration::from_secs(5);

#[test]
fn released_when_every_need_has_come_and_gone() {
    let holder = Holder::bind().unwrap();
    let name = holder.address().to_vec();
    let stages = thread::spawn(move || {
        let mem = Hold::take(&name, "mem").unwrap();
        let sk = Hold::take(&name, "sk").unwrap();
        mem.release();
        sk.release();
    });
    assert_eq!(holder.wait(&["mem", "sk"], false, SOON), Outcome::Released);
    stages.join().unwrap();
}

#[test]
fn commit_is_awaited_and_reported() {
    let holder = Holder::bind().unwrap();
    let hold = Hold::take(holder.address(), "write").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| hold.commit().unwrap());
        assert_eq!(holder.wait(&[], true, SOON), Outcome::Committed);
    });
}

#[test]
fn a_stage_that_is_not_needed_may_hold_on() {
    let holder = Holder::bind().unwrap();
    let writer = Hold::take(holder.address(), "write").unwrap();
    assert_eq!(holder.passed(&["sk"], Duration::ZERO), Outcome::NobodyCame { missing: vec!["sk".into()] });
    Hold::take(holder.address(), "sk").unwrap().release();
    assert_eq!(holder.passed(&["sk"], SOON), Outcome::Released);
    drop(writer);
    assert_eq!(
        holder.wait(&["sk"], false, SOON),
        Outcome::Failed { stage: "write".into(), reason: "it ended without a word".into() }
    );
}

#[test]
fn a_broken_connection_is_a_failure() {
    let holder = Holder::bind().unwrap();
    drop(Hold::take(holder.address(), "write").unwrap());
    let Outcome::Failed { stage, .. } = holder.wait(&[], true, SOON) else { panic!("not a failure") };
    assert_eq!(stage, "write");
}

#[test]
fn a_failure_carries_its_reason_on_one_line() {
    let holder = Holder::bind().unwrap();
    Hold::take(holder.address(), "mem").unwrap().fail("no\nspace");
    let failed = Outcome::Failed { stage: "mem".into(), reason: "no space".into() };
    assert_eq!(holder.wait(&["mem"], false, SOON), failed);
}

#[test]
fn a_stream_that_its_reader_leaves_unread_ends_the_wait() {
    let pipe = || -> (std::fs::File, std::fs::File) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        (reader.into(), writer.into())
    };
    let holder = Holder::bind().unwrap();
    let (mut reader, mut writer) = pipe();
    writer.write_all(b"all of it").unwrap();
    holder.close_when_read(writer);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    drop(reader);
    let nobody = Outcome::NobodyCame { missing: vec!["mem".into()] };
    assert_eq!(holder.wait(&["mem"], false, Duration::from_millis(20)), nobody, "read, and then closed");

    let (reader, mut writer) = pipe();
    writer.write_all(b"all of it").unwrap();
    holder.close_when_read(writer);
    drop(reader);
    assert_eq!(holder.wait(&["mem"], false, SOON), Outcome::Unread);
}

#[test]
fn requests_are_answered_by_who_waits() {
    let holder = Holder::bind().unwrap();
    let mut hold = Hold::take(holder.address(), "mem").unwrap();
    assert!(hold.ask("ARM 5").unwrap().is_err(), "nobody answers");
    holder.answer_requests();
    let stage = thread::spawn(move || {
        let armed = hold.ask("ARM 5").unwrap();
        assert!(armed.unwrap().1.is_some());
        assert_eq!(hold.ask("TWIN 6").unwrap().unwrap_err(), "not today");
        hold.release_until_durable().unwrap()
    });
    let Outcome::Asked(request) = holder.passed(&["mem"], SOON) else { panic!("no request") };
    assert_eq!(request.text, "ARM 5");
    request.answer(Ok((String::new(), Some(std::fs::File::open("/dev/null").unwrap().into()))));
    let Outcome::Asked(request) = holder.passed(&["mem"], SOON) else { panic!("no request") };
    request.answer(Err("not\ntoday".to_owned()));
    assert_eq!(holder.passed(&["mem"], SOON), Outcome::Released);
    Hold::take(holder.address(), "write").unwrap().commit().unwrap();
    assert_eq!(holder.wait(&["mem"], false, SOON), Outcome::Committed);
    drop(holder);
    assert!(stage.join().unwrap());
    let holder = Holder::bind().unwrap();
    let hold = Hold::take(holder.address(), "mem").unwrap();
    let stage = thread::spawn(move || hold.release_until_durable().unwrap());
    let missing = vec!["write".to_owned()];
    while !matches!(holder.passed(&["mem"], SOON), Outcome::Released) {}
    assert_eq!(holder.wait(&["mem"], false, Duration::ZERO), Outcome::NobodyCame { missing });
    drop(holder);
    assert!(!stage.join().unwrap(), "nobody has said that it is durable");
}

#[test]
fn who_never_comes_is_named() {
    let holder = Holder::bind().unwrap();
    Hold::take(holder.address(), "sk").unwrap().release();
    let outcome = holder.wait(&["mem", "sk"], true, Duration::from_millis(20));
    assert_eq!(outcome, Outcome::NobodyCame { missing: vec!["mem".into(), "write".into()] });
}

#[test]
fn a_stage_that_could_not_speak_is_not_waited_for() {
    let holder = Holder::bind().unwrap();
    let address = SocketAddr::from_abstract_name(holder.address()).unwrap();
    drop(UnixStream::connect_addr(&address).unwrap());
    let outcome = holder.wait(&["sk"], false, Duration::MAX / 4);
    assert_eq!(outcome, Outcome::NobodyCame { missing: vec!["sk".to_owned()] });
}

#[test]
fn a_stage_that_holds_may_take_longer_than_the_timeout() {
    let holder = Holder::bind().unwrap();
    let hold = Hold::take(holder.address(), "mem").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(60));
            hold.release();
        });
        assert_eq!(holder.wait(&["mem"], false, Duration::from_millis(10)), Outcome::Released);
    });
}

#[test]
fn times_run_until_the_clock_is_dropped() {
    let holder = Holder::bind().unwrap();
    let mut hold = Hold::take(holder.address(), "write").unwrap();
    assert_eq!(hold.times().unwrap(), None);
    let since = Instant::now().checked_sub(SOON).unwrap();
    let clock = holder.clock(Duration::from_micros(70), since);
    let first = hold.times().unwrap().unwrap();
    assert!(first.freezing == Duration::from_micros(70) && first.frozen >= SOON);
    drop(clock);
    let last = hold.times().unwrap().unwrap();
    assert!(last.frozen >= first.frozen);
    thread::sleep(Duration::from_millis(2));
    assert_eq!(hold.times().unwrap(), Some(last));
    hold.release();
}

#[test]
fn silent_connections_and_nonsense_hold_nothing() {
    let holder = Holder::bind().unwrap();
    let address = SocketAddr::from_abstract_name(holder.address()).unwrap();
    let silent = UnixStream::connect_addr(&address).unwrap();
    let mut rude = UnixStream::connect_addr(&address).unwrap();
    rude.write_all(b"COMMIT\n").unwrap();
    assert_eq!(rude.read(&mut [0; 3]).unwrap(), 0, "no OK for a COMMIT without a hold");
    assert_eq!(holder.wait(&[], false, SOON), Outcome::Released);
    drop(silent);
}

/// Lines of the protocol in any order, with arguments of any kind, and bytes that are no lines.
fn nonsense(random: &mut Random) -> Vec<u8> {
    const WORDS: &[&str] = &[
        "HOLD", "RELEASE", "COMMIT", "FAIL", "DURABLE", "TIMES", "PASSES", "TAKES", "TOOK", "TRACKED", "ARM",
        "TWIN", "FORGET", "OK", "",
    ];
    const REST: &[&[u8]] = &[
        b"",
        b"",
        b" write",
        b" mem",
        b" 5",
        b" -1",
        b" 1:2",
        b" 1:2 2:1",
        b" 18446744073709551616",
        b" \0",
        b" \xff\xfe",
        b"  ",
    ];
    let mut pick = |n: usize| usize::try_from(random.below(n as u64)).unwrap();
    let mut bytes = if pick(2) == 0 { b"HOLD write\n".to_vec() } else { Vec::new() };
    for _ in 0..pick(8) {
        bytes.extend(WORDS[pick(WORDS.len())].bytes());
        bytes.extend(REST[pick(REST.len())]);
        bytes.extend(match pick(40) {
            0 => vec![b'x'; MAX_LINE + 600],
            1 => (0..pick(50)).map(|n| u8::try_from(n * 37 % 256).unwrap()).collect(),
            2 => b"\r\n".to_vec(),
            _ => b"\n".to_vec(),
        });
    }
    bytes
}

/// It ends the wait or it is nothing; it is no COMMIT unless a stage that holds says that; and others are heard after it.
#[test]
fn nonsense_of_any_kind_neither_ends_the_holder_nor_commits() {
    let mut random = Random::new("hold_nonsense");
    for _ in 0..400 {
        let holder = Holder::bind().unwrap();
        if random.below(2) == 0 {
            holder.answer_requests();
        }
        let address = SocketAddr::from_abstract_name(holder.address()).unwrap();
        let mut stage = UnixStream::connect_addr(&address).unwrap();
        let said = nonsense(&mut random);
        // It is let go in the middle of it.
        let _ = stage.write_all(&said);
        drop(stage);
        Hold::take(holder.address(), "sk").unwrap().release();
        let outcome = loop {
            match holder.wait(&["sk"], true, Duration::ZERO) {
                Outcome::Asked(request) => request.answer(Err("no".to_owned())),
                outcome => break outcome,
            }
        };
        let text = String::from_utf8_lossy(&said);
        let line =
            |wanted: &str| text.lines().position(|line| line.trim_end().split(' ').next() == Some(wanted));
        let may_commit = line("HOLD").zip(line("COMMIT")).is_some();
        assert!(outcome != Outcome::Committed || may_commit, "{outcome:?} after {text:?}");
    }
}

#[test]
fn memory_is_free_again_only_behind_known_stages() {
    let holder = Holder::bind().unwrap();
    let (first_in, first_out) = nix::unistd::pipe().unwrap();
    let (second_in, second_out) = nix::unistd::pipe().unwrap();
    let output = PipeId::of(first_out.as_fd()).unwrap();
    let mut writer = Hold::take(holder.address(), "write").unwrap();
    let directory = std::fs::File::open("/dev").unwrap();
    assert!(writer.takes(PipeId::of(second_in.as_fd()).unwrap(), directory.as_fd()));
    let taken = holder.taken_from(output);
    assert!(!taken.known(), "who reads the first pipe has not been said");
    assert!(taken.directory().is_none(), "and whether it needs to see the pages");
    let ends = [first_in.as_fd(), second_out.as_fd()].map(|fd| PipeId::of(fd).unwrap());
    passes(holder.address(), ends[0], ends[1]);
    assert!(taken.known());
    let inode = |fd: BorrowedFd<'_>| fstat(fd).unwrap().st_ino;
    assert_eq!(inode(taken.directory().unwrap().as_fd()), inode(directory.as_fd()));
    writer.took(10);
    taken.wait(10).unwrap();
    thread::scope(|scope| {
        let wait = scope.spawn(|| taken.wait(11));
        drop(writer);
        assert!(wait.join().unwrap().is_err(), "the writer has ended");
    });
}

#[test]
fn pipes_in_a_circle_lead_nowhere() {
    let holder = Holder::bind().unwrap();
    let (_, output) = nix::unistd::pipe().unwrap();
    let pipe = PipeId::of(output.as_fd()).unwrap();
    passes(holder.address(), pipe, pipe);
    assert!(!holder.taken_from(pipe).known());
}

#[test]
fn the_holders_end_is_told_from_a_failure() {
    let holder = Holder::bind().unwrap();
    let name = holder.address().to_vec();
    drop(holder);
    assert!(matches!(Hold::take(&name, "write"), Err(HoldError::Gone)));
}

/// Needs root, to become somebody else.
#[test]
fn other_users_are_not_heard() {
    if !geteuid().is_root() {
        return ckpt_tests::skip("other_users_are_not_heard", "needs root");
    }
    let holder = Holder::bind().unwrap();
    let name = String::from_utf8(holder.address().to_vec()).unwrap();
    let script = format!(
        "import socket,os\nos.setuid(65534)\ns=socket.socket(socket.AF_UNIX)\ns.connect('\\0{name}')\n\
         try:\n s.sendall(b'HOLD write\\n')\n d=s.recv(10)\nexcept OSError:\n d=b''\nassert d==b'',d\n"
    );
    let python = std::process::Command::new("python3").arg("-c").arg(script).status();
    let Ok(status) = python else {
        return ckpt_tests::skip("other_users_are_not_heard", "needs python3");
    };
    assert!(status.success());
    assert_eq!(holder.wait(&[], false, SOON), Outcome::Released);
}
