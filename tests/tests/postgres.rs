//! PostgreSQL under load: System V and POSIX shared memory, semaphores in it, a listener, latches by signalfd and
//! epoll, a dozen processes. Its clients are in the tree, a transaction is open, and nobody notices anything.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use ckpt_images::ImageSet;
use ckpt_proto::{Image, types::PstreeEntry};
use ckpt_tests::{Target, TestDir, process, skip, soon};

/// Where Debian keeps the programs of its newest release.
fn programs() -> Option<PathBuf> {
    let releases = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let mut found: Vec<PathBuf> =
        releases.map(|e| e.path().join("bin")).filter(|p| p.join("initdb").exists()).collect();
    found.sort();
    found.pop()
}

/// The server does not run as root.
const SCRIPT: &str = r#"
    export PGHOST=$PWD PGUSER=postgres PGDATABASE=postgres
    as=; if [ "$(id -u)" = 0 ]; then chown postgres . output; as="setpriv --reuid postgres --regid postgres --clear-groups"; fi
    $as $BIN/initdb -D data -A trust -U postgres >initdb.log 2>&1 || { cat initdb.log; exit 1; }
    $as $BIN/postgres -D data -k "$PWD" -c listen_addresses= -c fsync=off -c max_parallel_workers_per_gather=2 >server.log 2>&1 &
    until $BIN/psql -qc 'select 1' >/dev/null 2>&1; do sleep 0.1; done
    $BIN/pgbench -i -q -s 1 >/dev/null 2>&1
    $BIN/pgbench -c 3 -j 1 -T 100000 -P 1 >bench.log 2>&1 &
    # A query by several processes at once, over and over.
    printf '%s\n' 'set force_parallel_mode = on;' "select 'sum ' || sum(aid) from pgbench_accounts \\watch 0.1" |
        $BIN/psql -qtA >parallel.log 2>&1 &
    mkfifo go; exec 8<>go
    # Temporary tables are in the memory of one process, and what is not committed nobody else sees.
    { printf '%s\n' "begin; create temp table mine as select 42 as n; select 'begun ' || n from mine;"
      read -ru 8 word; echo "select '$word ' || n from mine; commit;"; read -ru 8 word; } |
        $BIN/psql -qtA >open.log 2>&1 &
    wait
"#;

fn ask(bin: &Path, target: &Target, query: &str) -> String {
    let out = Command::new(bin.join("psql"))
        .args(["-U", "postgres", "-qtA", "-h"])
        .arg(target.dir.path())
        .args(["-c", query])
        .output()
        .expect("run psql");
    assert!(out.status.success(), "{query}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A file that grows, so that whoever writes it is at work.
fn grows(target: &Target, name: &str) {
    let len = || std::fs::metadata(target.path(name)).map_or(0, |m| m.len());
    let before = len();
    assert!(soon(|| len() > before + 40), "{name} stands still");
}

#[test]
fn postgres_goes_on_with_its_clients_and_their_transactions() {
    let Some(bin) = programs() else {
        skip("postgres", "there is no PostgreSQL");
        return;
    };
    let mut command = Command::new("bash");
    command.args(["-c", SCRIPT]).env("BIN", &bin);
    let target = Target::spawn(TestDir::new("postgres"), command);
    let read = |name: &str| std::fs::read_to_string(target.path(name)).unwrap_or_default();
    let ready = || read("open.log").contains("begun 42") && read("parallel.log").contains("sum ");
    assert!(soon(|| ready() && read("bench.log").contains("progress: 1")), "postgres is not ready");
    let _ = target.dumping("beside", &["--snapshot"], &[]).run().ok("dump --snapshot");
    grows(&target, "bench.log");
    let until = read("server.log").len();
    // Its files are not in the images: they have to stay as they are.
    let _ = target.dumping("img", &["--kill"], &[]).run().ok("dump --kill");
    target.end();
    // Workers come and go: who was there is in the images.
    let set = ImageSet::from_chain(&target.path("img")).expect("read the images");
    let tasks = set.all::<PstreeEntry>(Image::Pstree, 0).expect("a tree");
    let pids: Vec<i32> = tasks.iter().map(|task| task.pid.cast_signed()).collect();
    process::wait_free(&pids);
    target.restore_ok("img");
    grows(&target, "bench.log");
    grows(&target, "parallel.log");
    let mut go = File::options().write(true).open(target.path("go")).expect("open the FIFO");
    go.write_all(b"restored\n").expect("write to the FIFO");
    assert!(soon(|| read("open.log").contains("restored 42")), "the open transaction: {}", read("open.log"));
    // Every transaction moved the same sum in four tables.
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
                       (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers),
                       (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)";
    assert_eq!(ask(&bin, &target, sums), "t|t|t");
    let (server, bench) = (read("server.log").split_off(until), read("bench.log"));
    for word in ["FATAL", "PANIC", "ERROR", "terminat", "recovery"] {
        assert!(!server.contains(word) && !bench.contains(word), "{word}:\n{server}\n{bench}");
    }
    assert!(!bench.contains("aborted"), "{bench}");
    // It takes its shared memory away itself.
    let postmaster = read("data/postmaster.pid");
    let postmaster: i32 = postmaster.lines().next().and_then(|pid| pid.parse().ok()).expect("a pid");
    let pid = nix::unistd::Pid::from_raw(postmaster);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("end the server");
    assert!(
        soon(|| process::is_free(postmaster) || !target.path("data/postmaster.pid").exists()),
        "it does not end"
    );
}
