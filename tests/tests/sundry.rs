//! Programs of many kinds that keep themselves busy and count in a log: "tick 0", "tick 1", ... Each checks what it
//! gets from its children, threads and servers, and says BROKEN if it is not right. Checkpointed as they work,
//! killed, restored: the count goes on where it was.

use std::process::Command;

use ckpt_tests::{Target, TestDir, installed, net, process, skip, soon};

use crate::servers::python;

/// How many ticks there are. They are complete and in order.
fn ticks(target: &Target) -> usize {
    let log = target.log();
    assert!(!log.contains("BROKEN"), "{log}");
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    let numbers: Vec<usize> =
        whole.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect();
    assert!(numbers.iter().enumerate().all(|(at, &n)| at == n), "{log}");
    numbers.len()
}

fn goes_on(target: &Target) {
    let before = ticks(target);
    let output = || std::fs::read_to_string(target.path("output")).unwrap_or_default();
    assert!(soon(|| ticks(target) > before + 3), "stands still at {before}: {}", output());
}

/// Checkpoints, as soon as nobody has sent to a server that has not accepted the connection yet, and inotify events are read.
fn dump(target: &Target, name: &str, scan: &[&str]) {
    let mut outcome = None;
    let settled = soon(|| {
        let last = target.dumping(name, scan, &[]).run();
        let again = ["not accepted yet", "checkpoint when they have been read"]
            .iter()
            .any(|passing| last.code("ckpt-sk") != 0 && last.said.contains(passing));
        outcome = Some(last);
        !again
    });
    assert!(settled, "{outcome:?}");
    let _ = outcome.expect("at least one").ok("dump");
}

/// Starts it, and takes it through a checkpoint that it does not notice, and through two that it does not live to see.
fn keeps_counting(name: &str, programs: &[&str], words: &[&str]) {
    for program in programs {
        if !installed(program) {
            return skip(name, &format!("no {program}"));
        }
    }
    // In a network of its own, so that ports are free.
    net::alone(name, || {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        let target = Target::spawn(TestDir::new(name), command);
        goes_on(&target);
        dump(&target, "running", &[]);
        goes_on(&target);
        for round in ["first", "second"] {
            // Some have sessions of their own.
            let tree = process::tree(target.pid);
            dump(&target, round, &["--kill"]);
            process::wait_session_free(target.pid);
            assert!(soon(|| tree.iter().all(|&pid| process::is_free(pid))), "{tree:?}");
            let last = ticks(&target);
            target.restore_ok(round);
            goes_on(&target);
            assert!(ticks(&target) > last);
            assert_eq!(net::rules(), "");
        }
    });
}

#[test]
fn perl_with_a_child_on_a_pipe() {
    let script = r#"
        use IO::Handle;
        pipe(my $r, my $w);
        if (!fork) {
            close $r; $w->autoflush(1);
            local $SIG{ALRM} = sub { $w->print("tick $n\n"); $n++ };
            use Time::HiRes qw(ualarm); $n = 0; ualarm(10000, 10000);
            while (1) { select(undef, undef, undef, 1) }
        }
        close $w;
        open(my $log, ">>", "log"); $log->autoflush(1);
        while (<$r>) { print $log $_ }
        print $log "BROKEN end of pipe\n";"#;
    keeps_counting("perl_with_a_child_on_a_pipe", &["perl"], &["perl", "-e", script]);
}

#[test]
fn bash_with_a_coprocess_and_jobs_under_a_lock() {
    let script = r#"
        coproc CAT { while read -r x; do echo "got $x"; done; }
        job() { ( flock 9; read -r n <count; [ "$n" = "$1" ] || echo "BROKEN job $1 finds $n" >>log; echo $((n + 1)) >count ) 9>lock; }
        echo 0 >count; i=0
        while :; do
            (job $i & wait) # The job is an orphan's child.
            echo $i >&${CAT[1]}; read -r answer <&${CAT[0]}
            [ "$answer" = "got $i" ] || echo "BROKEN coprocess: $answer" >>log
            words=$(printf '%s\n' c a b | sort | tr -d '\n')
            [ "$words" = abc ] || echo "BROKEN pipeline: $words" >>log
            echo "tick $i" >>log; i=$((i + 1))
        done"#;
    keeps_counting("bash_with_a_coprocess_and_jobs_under_a_lock", &["flock"], &["bash", "-c", script]);
}

/// tail(1) watches by inotify.
#[test]
fn tail_follows_a_file() {
    let script = r#"
        >in
        ( i=0; while sleep 0.01; do echo "tick $i" >>in; i=$((i + 1)); done ) &
        exec tail -n +1 -f in >>log"#;
    keeps_counting("tail_follows_a_file", &["tail"], &["bash", "-c", script]);
}

#[test]
fn make_with_parallel_jobs() {
    let script = r#"
        printf 'all: %s\nall:\n\nt%%:\n\t@sleep 0.01; echo $@ >>made\n' "$(echo t{1..40})" >Makefile
        i=0
        while :; do
            rm -f made
            make -s -j3 all || echo "BROKEN make: $?" >>log
            [ "$(sort -u made | wc -l) $(wc -l <made)" = "40 40" ] || echo "BROKEN $(wc -l made)" >>log
            echo "tick $i" >>log; i=$((i + 1))
        done"#;
    keeps_counting("make_with_parallel_jobs", &["make"], &["bash", "-c", script]);
}

/// Semaphores and memory in /dev/shm, queues with their threads, a pool, a manager behind a unix socket.
#[test]
fn python_multiprocessing() {
    let script = r#"
import multiprocessing as mp, time
from multiprocessing import shared_memory

def count(queue, space, memory, lock):
    memory = shared_memory.SharedMemory(memory)
    while True:
        space.acquire()
        with lock:
            n = int.from_bytes(memory.buf[:8], "little")
            memory.buf[:8] = (n + 1).to_bytes(8, "little")
        queue.put(n)
        time.sleep(0.001)

def broken(what): print("BROKEN", what, file=log)

memory = shared_memory.SharedMemory(create=True, size=4096)
queue, space, lock = mp.Queue(), mp.Semaphore(10), mp.Lock()
for _ in range(3):
    mp.Process(target=count, args=(queue, space, memory.name, lock), daemon=True).start()
pool, shared = mp.Pool(2), mp.Manager().dict()
log = open("log", "a", buffering=1)
seen, low, i = set(), 0, 0
while True:
    n = queue.get(timeout=60)
    space.release()
    if n < low or n in seen: broken(f"{n} came twice")
    seen.add(n)
    while low in seen: seen.remove(low); low += 1
    if len(seen) > 30: broken(f"{low} is lost")
    if n % 20 == 0:
        if pool.map(abs, range(-5, 0)) != [5, 4, 3, 2, 1]: broken("pool")
        shared["i"] = i
        if shared["i"] != i: broken("manager")
        print("tick", i, file=log); i += 1
"#;
    keeps_counting("python_multiprocessing", &["python3"], &[python(), "-c", script]);
}

/// Both ends of TLS connections, subprocesses, a pool of threads.
#[test]
fn python_asyncio_with_tls() {
    let script = r#"
import asyncio, ssl, subprocess
subprocess.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k.pem -out c.pem -subj /CN=x 2>&1", shell=True, check=True)
log = open("log", "a", buffering=1)
async def serve(reader, writer):
    n = 0
    while line := await reader.readline():
        writer.write(b"%d " % n + line); n += 1
        await writer.drain()
async def client(context):
    reader, writer = await asyncio.open_connection("127.0.0.1", 7000, ssl=context)
    n = 0
    while True:
        writer.write(b"x" * (n * 37 % 5000) + b"\n")
        if await asyncio.wait_for(reader.readline(), 60) != b"%d " % n + b"x" * (n * 37 % 5000) + b"\n":
            print("BROKEN tls", file=log)
        n += 1
        await asyncio.sleep(0.005)
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain("c.pem", "k.pem")
    await asyncio.start_server(serve, "127.0.0.1", 7000, ssl=context)
    context = ssl.create_default_context(cafile="c.pem"); context.check_hostname = False
    clients = [asyncio.create_task(client(context)) for _ in range(5)]
    n = 0
    while True:
        for c in clients:
            if c.done(): print("BROKEN", c.exception(), file=log)
        child = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if (await child.communicate(b"%d" % n))[0] != b"%d" % n: print("BROKEN child", file=log)
        print("tick", n, file=log)
        n = await asyncio.get_running_loop().run_in_executor(None, lambda: n + 1)
asyncio.run(main())
"#;
    keeps_counting("python_asyncio_with_tls", &["python3", "openssl"], &[python(), "-c", script]);
}

/// A bus, somebody who listens to all of it, and clients that come and go.
#[test]
fn dbus_daemon_with_a_monitor() {
    let script = r#"
        cat >bus <<'XML'
<busconfig><type>session</type><listen>unix:dir=/tmp</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
XML
        dbus-daemon --config-file=bus --nofork --print-address=1 >address &
        until [ -s address ]; do sleep 0.01; done
        DBUS_SESSION_BUS_ADDRESS=$(<address); export DBUS_SESSION_BUS_ADDRESS
        dbus-monitor >heard &
        until [ -s heard ]; do sleep 0.01; done
        i=0
        while :; do
            dbus-send --session --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ListNames >names 2>&1 &&
                grep -q 'string "org.freedesktop.DBus"' names || echo "BROKEN $(<names)" >>log
            echo "tick $i" >>log; i=$((i + 1))
        done"#;
    let programs = ["dbus-daemon", "dbus-send", "dbus-monitor"];
    keeps_counting("dbus_daemon_with_a_monitor", &programs, &["bash", "-c", script]);
}

/// memcached with its threads on a unix socket, socat that forks to pass TCP on to it, bash as the client.
#[test]
fn memcached_behind_socat() {
    let script = r#"
        memcached -u root -t 2 -s sock &
        until [ -S sock ]; do sleep 0.01; done
        socat TCP-LISTEN:7000,bind=127.0.0.1,reuseaddr,fork UNIX-CONNECT:sock &
        until exec 5<>/dev/tcp/127.0.0.1/7000; do sleep 0.01; done 2>>output
        ask() { printf "$1\r\n" >&5; read -r -t 60 answer <&5; answer=${answer%$'\r'}; }
        ask 'set n 0 0 1\r\n0'
        [ "$answer" = STORED ] || echo "BROKEN set: $answer" >>log
        i=0
        while :; do
            ask 'incr n 1'
            [ "$answer" = $((i + 1)) ] || echo "BROKEN $answer after $i" >>log
            echo "tick $i" >>log; i=$((i + 1))
        done"#;
    keeps_counting("memcached_behind_socat", &["memcached", "socat"], &["bash", "-c", script]);
}

/// The event loop, a thread of its own engine, a child on pipes, both ends of a connection that is kept alive.
#[test]
fn node_with_a_worker_and_a_child() {
    let script = r#"
const { Worker } = require("worker_threads"), fs = require("fs"), http = require("http");
const broken = (what) => fs.appendFileSync("log", `BROKEN ${what}\n`);
const once = (from, event) => new Promise((good) => from.once(event, good));
const twice = `const { parentPort: p } = require("worker_threads"); p.on("message", (n) => p.postMessage(2 * n))`;
const worker = new Worker(twice, { eval: true }), cat = require("child_process").spawn("cat");
const server = http.createServer((request, response) => response.end(request.url));
server.keepAliveTimeout = 0;
const agent = new http.Agent({ keepAlive: true });
const get = (path) => new Promise((good, bad) => http.get({ host: "127.0.0.1", port: 7000, path, agent }, (answer) => {
    let text = "";
    answer.on("data", (bytes) => text += bytes).on("end", () => good(text));
}).on("error", bad));
server.listen(7000, "127.0.0.1", async () => {
    for (let n = 0;; n++) {
        const product = once(worker, "message"), echo = once(cat.stdout, "data");
        worker.postMessage(n);
        cat.stdin.write(`${n}`);
        if (await product !== 2 * n) broken(`worker: ${await product}`);
        if (String(await echo) !== `${n}`) broken(`child: ${await echo}`);
        if (await get(`/${n}`) !== `/${n}`) broken("connection");
        fs.appendFileSync("log", `tick ${n}\n`);
    }
});"#;
    keeps_counting("node_with_a_worker_and_a_child", &["node"], &["node", "-e", script]);
}

/// Schedulers on all processors, a helper process that forks for it, a port to a child, both ends of a connection.
#[test]
fn erlang_with_a_port_and_a_connection() {
    let script = r#"
        Cat = open_port({spawn, "cat"}, [binary, {line, 100}]),
        {ok, Listener} = gen_tcp:listen(7000, [binary, {packet, line}, {active, false}, {ip, {127, 0, 0, 1}}]),
        spawn(fun() ->
            {ok, Server} = gen_tcp:accept(Listener),
            Echo = fun(Again) -> {ok, Line} = gen_tcp:recv(Server, 0), ok = gen_tcp:send(Server, Line), Again(Again) end,
            Echo(Echo) end),
        {ok, Client} = gen_tcp:connect({127, 0, 0, 1}, 7000, [binary, {packet, line}, {active, false}]),
        Say = fun(Words) -> ok = file:write_file("log", [Words, 10], [append]) end,
        Square = fun(N) -> Me = self(), spawn(fun() -> Me ! {square, N * N} end) end,
        Count = fun(Again, N) ->
            Text = integer_to_binary(N), Line = <<Text/binary, 10>>,
            Cat ! {self(), {command, Line}},
            receive {Cat, {data, {eol, Text}}} -> ok after 60000 -> Say("BROKEN port") end,
            [Square(N) || _ <- lists:seq(1, 50)],
            [receive {square, S} when S =:= N * N -> ok after 60000 -> Say("BROKEN process") end || _ <- lists:seq(1, 50)],
            ok = gen_tcp:send(Client, Line),
            case gen_tcp:recv(Client, 0, 60000) of {ok, Line} -> ok; Other -> Say(io_lib:format("BROKEN ~p", [Other])) end,
            Say(["tick ", Text]),
            Again(Again, N + 1) end,
        Count(Count, 0)."#;
    let words = ["erl", "-noshell", "-noinput", "-eval", script];
    keeps_counting("erlang_with_a_port_and_a_connection", &["erl"], &words);
}

/// A supervisor whose control socket was bound under another name, and a program that it starts again and again.
#[test]
fn supervisord_restarts_a_program() {
    let script = r#"
        cat >conf <<'INI'
[supervisord]
nodaemon=true
user=root
logfile=said
pidfile=pid
[unix_http_server]
file=%(here)s/sock
[supervisorctl]
serverurl=unix://%(here)s/sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:sleeper]
command=sleep 10000
startsecs=0
INI
        supervisord -c conf >output &
        until supervisorctl -c conf status >status 2>&1; do sleep 0.05; done
        i=0
        while :; do
            supervisorctl -c conf restart sleeper >restarted 2>&1
            grep -q 'sleeper: started' restarted || echo "BROKEN restart: $(<restarted)" >>log
            echo "tick $i" >>log; i=$((i + 1))
        done"#;
    let programs = ["supervisord", "supervisorctl"];
    keeps_counting("supervisord_restarts_a_program", &programs, &["bash", "-c", script]);
}
