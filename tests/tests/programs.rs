//! Real programs under load: checkpointed while they work, killed, restored, and asked for their own opinion.
//!
//! A client that is connected at the instant of the dump is half a connection to the outside, which is refused and
//! harms nobody; so the loads connect afresh for each request, and the dump is tried until it falls between two. Every
//! request has to succeed all the same, whether its instant was hit or not.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use ckpt_tests::{Snapshot, Target, TestDir, installed, process, skip, soon};

/// Dumps between two requests. Attempts that hit one have to be refused by the right stage.
fn dump_between_requests(target: &Target) -> u32 {
    for attempt in 1..400 {
        let outcome = target.dump("img");
        if outcome.code("ckpt-write") == 0 {
            let _ = outcome.ok("dump");
            return attempt;
        }
        assert!(!target.path("img").exists());
        // A client is connected.
        let _ = outcome.fails("ckpt-sk", 3, &["--external"]);
    }
    panic!("no dump fell between two requests");
}

/// Runs `load` in a thread until `work` is done; the number of rounds that it made. `load` panics on a failed request.
fn under_load<R>(load: impl Fn(u64) + Sync, work: impl FnOnce(&AtomicU64) -> R) -> (R, u64) {
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let loader = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                load(rounds.load(Ordering::SeqCst));
                rounds.fetch_add(1, Ordering::SeqCst);
                // Room for a dump between two requests.
                std::thread::sleep(Duration::from_millis(4));
            }
        });
        assert!(soon(|| rounds.load(Ordering::SeqCst) > 20 || loader.is_finished()));
        // The loader has to stop when the work panics, too.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&rounds)));
        done.store(true, Ordering::SeqCst);
        let load = loader.join();
        let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        load.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (result, rounds.load(Ordering::SeqCst))
    })
}

/// Structure of a tree that works: its maps, descriptors and counters move, its identities do not.
fn structure(target: &Target) -> Snapshot {
    let moving = [" map ", " fd ", "syscall", "Pnd"];
    target.snapshot().without(|key| moving.iter().any(|word| key.contains(word)))
}

/// A program that works is caught in the middle of things: some look within a while has to agree.
fn looks_like(target: &Target, before: &Snapshot) {
    let mut diff = Vec::new();
    let agrees = soon(|| {
        diff = before.diff(&structure(target).portable(target.pid));
        diff.is_empty()
    });
    assert!(agrees, "{diff:#?}");
}

fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).expect("write the script");
    path
}

#[test]
fn bash_script_with_children() {
    let dir = TestDir::new("bash");
    let path = script(
        dir.path(),
        "script",
        r#"
        asked=
        trap 'asked=1' USR1
        number() { local n=; until [ -n "$n" ]; do n=$(<count); done; echo "$n"; }
        # A producer and a consumer joined by a pipe: not one number may be lost, doubled or changed.
        ( trap '' USR1; i=0; while :; do i=$((i + 1)); echo $i; (( i % 50 )) || sleep 0.01; done ) | (
            trap '' USR1; last=0
            while read -r n; do
                [ "$n" = $((last + 1)) ] || echo "BROKEN sequence: $n after $last" >>log
                last=$n
                (( n % 20 )) || echo "$n" >count
            done; echo "BROKEN end of pipe" >>log ) &
        sleep 10000 & sleeper=$!
        declare -A table; for i in {1..500}; do table[key$i]=$((i * i)); done
        until [ -s count ]; do sleep 0.01; done
        echo ready >>log
        while :; do
            # Short-lived children all the time.
            out=$(echo "$RANDOM" | sort | wc -l)
            [ "$out" = 1 ] || echo "BROKEN command substitution: '$out'" >>log
            if [ -n "$asked" ]; then
                asked=
                sleep 0.2
                for i in {1..500}; do [ "${table[key$i]}" = $((i * i)) ] || echo "BROKEN table" >>log; done
                kill -0 $sleeper || echo "BROKEN sleeper" >>log
                before=$(number); sleep 0.3; after=$(number)
                [ "$after" -gt "$before" ] || echo "BROKEN the pipeline stands still at $before" >>log
                (exit 7); [ $? = 7 ] || echo "BROKEN exit status" >>log
                grep -q ^BROKEN log || echo PASS >>log
            fi
        done"#,
    );
    let mut command = Command::new("bash");
    command.arg(path);
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    for round in 0..5 {
        target.dump_ok(&format!("img{round}"));
    }
    target.passes("the original");
    target.dump_ok("img");
    target.end();
    target.restore_ok("img");
    target.passes("the restored one");
}

#[test]
fn python_with_threads() {
    if !installed("python3") {
        return skip("python_with_threads", "no python3");
    }
    let dir = TestDir::new("python");
    let path = script(
        dir.path(),
        "script.py",
        r#"
import hashlib, os, queue, select, signal, socket, sqlite3, subprocess, sys, tempfile, threading, time

def say(line):
    with open("log", "a") as f: f.write(line + "\n")

def broken(what):
    say("BROKEN " + what); os._exit(1)

asked = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: asked.set())

# Each worker extends a hash chain; whoever knows the length knows what it has to be.
chains, lock = {}, threading.Lock()
def worker(name):
    state, n = name.encode(), 0
    while True:
        for _ in range(50): state = hashlib.sha256(state).digest(); n += 1
        with lock: chains[name] = (n, state)
        time.sleep(0.001)
def expected(name, n):
    state = name.encode()
    for _ in range(n): state = hashlib.sha256(state).digest()
    return state

# A queue between two threads, a socketpair echo, a child on pipes, an in-memory database, an unlinked file.
numbers, total = queue.Queue(10), [0, 0]
def producer():
    i = 0
    while True: numbers.put(i); i += 1
def consumer():
    while True:
        i = numbers.get()
        if i != total[0]: broken(f"queue: {i} instead of {total[0]}")
        total[0] += 1; total[1] += i
        if i % 100 == 0: time.sleep(0.001)
a, b = socket.socketpair()
def echo():
    while True: b.sendall(b.recv(1000))
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
db = sqlite3.connect(":memory:", check_same_thread=False)
db.execute("create table t(n)"); db.executemany("insert into t values(?)", [(i,) for i in range(1000)])
ghost = tempfile.TemporaryFile(dir="."); ghost.write(b"ghost" * 1000); ghost.flush()
timer = select.epoll(); timer.register(a, select.EPOLLIN)

threads = [threading.Thread(target=worker, args=(f"w{i}",), daemon=True) for i in range(4)]
threads += [threading.Thread(target=f, daemon=True) for f in (producer, consumer, echo)]
for t in threads: t.start()
while len(chains) < 4: time.sleep(0.01)
say("ready")
while True:
    while not asked.wait(0.05): pass
    asked.clear()
    with lock: then = dict(chains)
    if any(expected(k, n) != s for k, (n, s) in then.items()): broken("hash chains")
    deadline = time.monotonic() + 10
    while any(chains[k][0] <= n for k, (n, _) in then.items()):
        if time.monotonic() > deadline: broken("workers stand still")
        time.sleep(0.01)
    count = total[0]
    time.sleep(0.1)
    if total[0] <= count: broken("queue stands still")
    a.sendall(b"echo")
    if not timer.poll(5) or a.recv(100) != b"echo": broken("socketpair")
    child.stdin.write(b"line\n"); child.stdin.flush()
    if child.stdout.readline() != b"line\n": broken("child")
    if db.execute("select sum(n) from t").fetchone()[0] != 499500: broken("database")
    ghost.seek(0)
    if ghost.read() != b"ghost" * 1000: broken("unlinked file")
    if not all(t.is_alive() for t in threads): broken("threads")
    say("PASS")
"#,
    );
    let python = if Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" };
    let mut command = Command::new(python);
    command.arg(path);
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    for round in 0..5 {
        target.dump_ok(&format!("img{round}"));
    }
    target.passes("the original");
    let before = structure(&target).portable(target.pid);
    target.dump_ok("img");
    target.end();
    target.restore_ok("img");
    looks_like(&target, &before);
    target.passes("the restored one");
}

/// One request over a connection of its own, in redis's inline form; the first line of the answer.
fn redis(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("connect for {request}: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    stream.write_all(format!("{request}\r\n").as_bytes()).unwrap_or_else(|e| panic!("send {request}: {e}"));
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap_or_else(|e| panic!("{request}: {e}"));
    if let Some(length) = line.trim_end().strip_prefix('$') {
        let length: i64 = length.parse().expect("a length");
        line.clear();
        if length >= 0 {
            reader.read_line(&mut line).expect("read the value");
        }
    }
    line.trim_end().to_owned()
}

#[test]
fn redis_keeps_its_data_and_serves() {
    if !installed("redis-server") {
        return skip("redis_keeps_its_data_and_serves", "no redis-server");
    }
    let dir = TestDir::new("redis");
    let socket = dir.path().join("redis.sock");
    // Saving takes long on purpose: the dump meets the child that writes the file.
    let config = format!(
        "port 0\nunixsocket {0}/redis.sock\ndir {0}\nlogfile {0}/log\nsave \"\"\nappendonly no\ndaemonize no\nrdb-key-save-delay 50\nenable-debug-command yes\n",
        dir.path().display()
    );
    let config = script(dir.path(), "redis.conf", &config);
    let mut command = Command::new("redis-server");
    command.arg(config);
    let target = Target::spawn(dir, command);
    assert!(soon(|| UnixStream::connect(&socket).is_ok()), "{}", target.log());
    assert_eq!(redis(&socket, "DEBUG POPULATE 20000 key 200"), "+OK");
    for i in 0..200 {
        assert_eq!(redis(&socket, &format!("RPUSH list {i}")), format!(":{}", i + 1));
    }
    assert_eq!(redis(&socket, "SET kept before-the-dump"), "+OK");
    assert_eq!(redis(&socket, "BGSAVE"), "+Background saving started");
    let load = |round: u64| {
        assert_eq!(redis(&socket, "INCR counter"), format!(":{}", round + 1));
        assert_eq!(redis(&socket, "GET kept"), "before-the-dump");
    };
    let ((attempts, low, high), total) = under_load(load, |rounds| {
        let low = rounds.load(Ordering::SeqCst);
        let attempts = dump_between_requests(&target);
        (attempts, low, rounds.load(Ordering::SeqCst))
    });
    let children = process::children(target.pid).len();
    eprintln!("redis: dumped at attempt {attempts} of {total} rounds, with {children} child");
    assert_eq!(redis(&socket, "GET counter"), total.to_string(), "the original counts on");
    target.end();
    target.restore_ok("img");
    assert_eq!(redis(&socket, "GET kept"), "before-the-dump");
    let counter: u64 = redis(&socket, "GET counter").parse().expect("a number");
    assert!((low..=high + 1).contains(&counter), "counter {counter} is not from between {low} and {high}");
    assert_eq!(redis(&socket, "DBSIZE"), ":20003");
    assert_eq!(redis(&socket, "LINDEX list 199"), "199");
    assert_eq!(redis(&socket, "SET kept after-the-restore"), "+OK");
    assert_eq!(redis(&socket, "GET kept"), "after-the-restore");
    // The child that saves goes on and ends; its parent notices; the file is whole.
    assert!(
        soon(|| redis(&socket, "PING") == "+PONG" && process::children(target.pid).is_empty()),
        "the saving child does not end: {}",
        target.log()
    );
    assert!(target.log().contains("Background saving terminated with success"), "{}", target.log());
    if installed("redis-check-rdb") {
        let check =
            Command::new("redis-check-rdb").arg(target.path("dump.rdb")).output().expect("check the file");
        assert!(check.status.success(), "{check:?}");
    }
}

#[test]
fn sqlite_commits_after_restore_what_it_began_before() {
    if !installed("sqlite3") {
        return skip("sqlite_commits_after_restore_what_it_began_before", "no sqlite3");
    }
    let dir = TestDir::new("sqlite");
    let path = script(
        dir.path(),
        "script",
        r#"
        trap 'asked=1' USR1
        asked=
        mkfifo input
        sqlite3 -batch test.db <input >answers 2>&1 &
        sqlite=$!
        exec 9>input
        cat >&9 <<'SQL'
PRAGMA cache_size=20;
CREATE TABLE t(n INTEGER PRIMARY KEY, v TEXT);
WITH RECURSIVE c(n) AS (VALUES(1) UNION ALL SELECT n+1 FROM c WHERE n<5000) INSERT INTO t SELECT n, hex(randomblob(100)) FROM c;
CREATE TABLE sums(s);
INSERT INTO sums SELECT sum(length(v)) FROM t;
BEGIN IMMEDIATE;
UPDATE t SET v = v || 'changed' WHERE n % 2;
SELECT 'in transaction ' || count(*) FROM t WHERE v LIKE '%changed';
SQL
        until grep -q 'in transaction 2500' answers; do sleep 0.01; done
        echo ready >>log
        while [ -z "$asked" ]; do sleep 0.02; done
        cat >&9 <<'SQL'
INSERT INTO t VALUES(9999, 'after');
COMMIT;
PRAGMA integrity_check;
SELECT 'rows ' || count(*) || ' changed ' || sum(v LIKE '%changed') FROM t;
SELECT 'sum ' || ((SELECT sum(length(v)) FROM t) = (SELECT s FROM sums) + 2500 * 7 + 5);
SQL
        exec 9>&-
        wait $sqlite || echo "BROKEN sqlite3 ended with $?" >>log
        if [ "$(tail -n 3 answers | tr '\n' ,)" = "ok,rows 5001 changed 2500,sum 1," ]; then echo PASS >>log
        else echo "BROKEN $(tail -n 4 answers | tr '\n' ,)" >>log; fi
        while :; do sleep 1; done"#,
    );
    let mut command = Command::new("bash");
    command.arg(path);
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    let locked = || {
        let out = Command::new("sqlite3")
            .arg(target.path("test.db"))
            .arg("BEGIN IMMEDIATE; ROLLBACK;")
            .output()
            .expect("run sqlite3");
        String::from_utf8_lossy(&out.stderr).contains("locked")
    };
    assert!(locked(), "the transaction holds its lock");
    assert!(target.path("test.db-journal").exists(), "the cache has spilled into the file");
    target.dump_ok("img");
    assert!(locked(), "the original still holds its lock");
    target.end();
    target.restore_ok("img");
    assert!(locked(), "the restored one holds the lock");
    target.passes("the restored transaction");
    assert!(!locked());
    let check = Command::new("sqlite3")
        .arg(target.path("test.db"))
        .arg("PRAGMA integrity_check; SELECT count(*) FROM t;")
        .output()
        .expect("run sqlite3");
    assert_eq!(String::from_utf8_lossy(&check.stdout), "ok\n5001\n", "{check:?}");
}

/// A page of a web server on a unix socket.
fn get(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("connect: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    write!(stream, "GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").expect("send a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read the answer");
    answer
}

#[test]
fn nginx_with_workers_serves_on() {
    if !installed("nginx") {
        return skip("nginx_with_workers_serves_on", "no nginx");
    }
    let dir = TestDir::new("nginx");
    let at = dir.path().display().to_string();
    fs::create_dir(dir.path().join("www")).expect("make a directory");
    let page = "a page of nginx\n".repeat(2000);
    fs::write(dir.path().join("www/page"), &page).expect("write a page");
    let config = format!(
        "daemon off; worker_processes 2; pid {at}/pid; error_log {at}/log notice; user root;
        events {{ worker_connections 64; }}
        http {{ access_log {at}/access.log; client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;
          server {{ listen unix:{at}/sock; root {at}/www; }} }}"
    );
    let config = script(dir.path(), "nginx.conf", &config);
    let socket = dir.path().join("sock");
    let mut command =
        Command::new(if Path::new("/usr/sbin/nginx").exists() { "/usr/sbin/nginx" } else { "nginx" });
    command.args(["-p", &at, "-c"]).arg(config);
    let target = Target::spawn(dir, command);
    assert!(
        soon(|| UnixStream::connect(&socket).is_ok() && process::children(target.pid).len() == 2),
        "{}",
        target.log()
    );
    let served = || {
        let answer = get(&socket, "/page");
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with(&page), "{answer:.300}");
    };
    let (attempts, total) = under_load(|_| served(), |_| dump_between_requests(&target));
    eprintln!("nginx: dumped at attempt {attempts} during {total} requests");
    let before = structure(&target).portable(target.pid);
    let workers = process::children(target.pid);
    target.end();
    target.restore_ok("img");
    assert_eq!(workers, process::children(target.pid));
    looks_like(&target, &before);
    for _ in 0..50 {
        served();
    }
    // Master and workers still talk: a reload starts new workers with the new configuration and ends the old ones.
    fs::write(target.path("www/page2"), "second page").expect("write a page");
    target.signal(nix::sys::signal::Signal::SIGHUP);
    assert!(
        soon(|| process::children(target.pid).len() == 2
            && process::children(target.pid).iter().all(|p| !workers.contains(p))),
        "reload: {}",
        target.log()
    );
    assert!(get(&socket, "/page2").ends_with("second page"));
    assert_eq!(
        fs::read_to_string(target.path("pid")).expect("read the pid file").trim(),
        target.pid.to_string()
    );
    target.signal(nix::sys::signal::Signal::SIGQUIT);
    assert!(soon(|| process::is_free(target.pid)), "nginx ends when it is told to");
    assert!(!target.log().contains("[alert]") && !target.log().contains("[emerg]"), "{}", target.log());
}
