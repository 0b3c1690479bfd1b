//! TCP: listeners, connections with one or both ends in the tree, and the network lock.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use ckpt_tests::{
    Outcome, Pipeline, Random, Target, TestDir, installed,
    net::{self, Client},
    process, skip, soon,
};

crate::survives! {
    tcp_listeners_keep_addresses_and_options: "tcp_listener";
    tcp_connections_inside_the_tree_keep_everything: "tcp_connections";
}

fn server() -> Target {
    Target::start_with("tcp_answering", &["-", "7000"])
}

fn dump(target: &Target, name: &str, scan: &[&str], sk: &[&str]) -> Outcome {
    target.dumping(name, scan, sk).run()
}

fn img(target: &Target, name: &str) -> PathBuf {
    target.path(name)
}

/// Asks until told to stop; the number of rounds. Every answer is to the question and counts on.
fn keep_asking(address: &str, rounds: &AtomicU64, stop: &std::sync::atomic::AtomicBool) -> u64 {
    let mut client = Client::connect(address);
    let mut last = 0;
    while !stop.load(Ordering::SeqCst) {
        let n = rounds.load(Ordering::SeqCst);
        let what = if n % 7 == 3 { format!("big {n}") } else { format!("question {n}") };
        let answer = client.ask(&what);
        assert!(last == 0 || answer == last + 1, "answer {answer} after {last}");
        last = answer;
        rounds.fetch_add(1, Ordering::SeqCst);
    }
    rounds.load(Ordering::SeqCst)
}

fn goes_on(rounds: &AtomicU64) -> bool {
    let before = rounds.load(Ordering::SeqCst);
    soon(|| rounds.load(Ordering::SeqCst) > before + 3)
}

fn more_rounds(rounds: &AtomicU64) {
    assert!(goes_on(rounds), "the client waits in vain");
}

/// The client is in another network namespace, over IPv4 and over IPv6. Its server is checkpointed while it runs on,
/// then killed and restored, again and again.
#[test]
fn client_elsewhere_never_notices_that_its_server_was_gone() {
    for address in ["10.9.0.1:7000", "[fd09::1]:7000"] {
        net::alone("client_elsewhere_never_notices_that_its_server_was_gone", || {
            let rounds = AtomicU64::new(0);
            let (_target, asked) = net::beside(
                |stop| keep_asking(address, &rounds, stop),
                || {
                    let target = server();
                    assert!(soon(|| rounds.load(Ordering::SeqCst) > 3), "{}", target.log());
                    for round in 0..5 {
                        let running = format!("running{round}");
                        let _ = dump(&target, &running, &[], &["--tcp-established"]).ok("dump");
                        assert_eq!(net::rules(), "", "left after a dump");
                        more_rounds(&rounds);
                        let killed = format!("killed{round}");
                        let _ = dump(&target, &killed, &["--kill"], &["--tcp-established"]).ok("dump --kill");
                        process::wait_free(&[target.pid]);
                        let rules = net::rules();
                        assert!(rules.contains("table inet ckpt-") && rules.contains(". 7000"), "{rules}");
                        // Long enough for the client to send again what nobody takes.
                        std::thread::sleep(Duration::from_millis(300));
                        target.restore_ok(&killed);
                        assert_eq!(net::rules(), "", "left after a restore");
                        more_rounds(&rounds);
                    }
                    target.passes("the restored one");
                    assert!(!target.log().contains("lost a client"), "{}", target.log());
                    target
                },
            );
            assert!(asked > 30);
        });
    }
}

/// A restore that fails leaves the peer waiting, and the lock in place for the next one.
#[test]
fn failed_restore_leaves_the_lock_and_the_client_waiting() {
    net::alone("failed_restore_leaves_the_lock_and_the_client_waiting", || {
        let target = server();
        let mut client = Client::connect("127.0.0.1:7000");
        assert_eq!(client.ask("one"), 1);
        let _ = dump(&target, "img", &["--kill"], &["--tcp-established"]).ok("dump --kill");
        process::wait_free(&[target.pid]);
        let locked = net::rules();
        client.say("two");
        // Something else has the port.
        let other = std::net::TcpListener::bind("[::]:7000").expect("take the port");
        let _ = target.restore("img").fails("ckpt-restore", 3, &["7000", "in use"]);
        drop(other);
        // A program that was replaced is found out later, when the sockets exist.
        let log = target.path("log");
        let away = target.path("away");
        std::fs::rename(&log, &away).expect("move the log away");
        let outcome = target.restore("img");
        assert_ne!(outcome.code("ckpt-restore"), 0, "{outcome}");
        std::fs::rename(&away, &log).expect("move the log back");
        assert_eq!(net::rules(), locked, "the lock is as it was");
        assert!(process::is_free(target.pid));
        target.restore_ok("img");
        assert_eq!(net::rules(), "");
        assert_eq!(client.hear(), "answer 2 to two");
        assert_eq!(client.ask("three"), 3);
    });
}

#[test]
fn connection_that_leads_outside_needs_an_option() {
    net::alone("connection_that_leads_outside_needs_an_option", || {
        let target = server();
        let mut client = Client::connect("[::1]:7000");
        assert_eq!(client.ask("one"), 1);
        let words = ["TCP socket", "outside the tree", "--tcp-established", "--tcp-close", "fd 5"];
        let _ = dump(&target, "img", &[], &[]).fails("ckpt-sk", 3, &words);
        assert_eq!(net::rules(), "");
        assert_eq!(client.ask("two"), 2);
        // Closed in the images: the restored server goes on without this client.
        let _ = dump(&target, "closed", &[], &["--tcp-close"]).ok("dump --tcp-close");
        let _ = dump(&target, "kept", &[], &["--tcp-established"]).ok("dump --tcp-established");
        assert_eq!(client.ask("three"), 3);
        target.end();
        target.restore_ok("closed");
        assert!(soon(|| target.log().contains("lost a client: it closed")), "{}", target.log());
        assert_eq!(Client::connect("127.0.0.1:7000").ask("again"), 3);
        target.end();
        // The same, decided later.
        let _ = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), "--tcp-close".into(), img(&target, "kept")])
            .run()
            .ok("restore --tcp-close");
        assert_eq!(Client::connect("127.0.0.1:7000").ask("again"), 3);
        assert_eq!(net::rules(), "");
        target.passes("the restored one");
    });
}

#[test]
fn connection_whose_original_lives_is_not_made_twice() {
    net::alone("connection_whose_original_lives_is_not_made_twice", || {
        let target = server();
        let mut client = Client::connect("127.0.0.1:7000");
        assert_eq!(client.ask("one"), 1);
        let _ = dump(&target, "img", &[], &["--tcp-established"]).ok("dump");
        let outcome = Pipeline::new(target.dir.path())
            .stage(["ckpt-restore".into(), "--detach".into(), "--new-pidns".into(), img(&target, "img")])
            .run();
        assert_ne!(outcome.code("ckpt-restore"), 0, "{outcome}");
        assert!(outcome.said.contains("7000") && outcome.said.contains("in use"), "{outcome}");
        assert_eq!(net::rules(), "");
        assert_eq!(client.ask("two"), 2);
        target.passes("the original");
    });
}

#[test]
fn urgent_data_is_refused() {
    net::alone("urgent_data_is_refused", || {
        let target = server();
        // A stopped server reads nothing.
        let mut client = Client::connect("127.0.0.1:7000");
        assert_eq!(client.ask("one"), 1);
        target.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(soon(|| process::state(target.pid) == Some('T')));
        let flags = nix::sys::socket::MsgFlags::MSG_OOB;
        nix::sys::socket::send(client.stream().as_raw_fd(), b"!", flags).expect("send urgent data");
        let refused = |_: &()| dump(&target, "img", &[], &["--tcp-established"]);
        let _ = refused(&()).fails("ckpt-sk", 3, &["urgent data", "MSG_OOB", "fd 5"]);
        target.signal(nix::sys::signal::Signal::SIGCONT);
        assert_eq!(net::rules(), "");
        target.passes("the original");
    });
}

/// Connections that wait in a backlog: passed over if the original runs on, refused if it would be killed.
#[test]
fn connections_in_flight_follow_the_rule() {
    net::alone("connections_in_flight_follow_the_rule", || {
        let target = server();
        target.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(soon(|| process::state(target.pid) == Some('T')));
        let mut waiting = Client::connect("127.0.0.1:7000");
        waiting.say("early");
        let words = ["wait to be accepted", "--skip-in-flight"];
        let _ = dump(&target, "img", &["--kill"], &[]).fails("ckpt-sk", 3, &words);
        let _ = dump(&target, "img", &[], &[]).ok("dump");
        target.signal(nix::sys::signal::Signal::SIGCONT);
        assert_eq!(waiting.hear(), "answer 1 to early", "the original accepts it");
        let _ = dump(&target, "killed", &["--kill"], &["--skip-in-flight", "--tcp-established"])
            .ok("dump --kill");
        process::wait_free(&[target.pid]);
        target.restore_ok("killed");
        assert_eq!(waiting.ask("again"), 2);
    });
}

/// A peer that sends its last words and closes while the server is gone; one that has done so before.
#[test]
fn ends_of_connections_come_through() {
    net::alone("ends_of_connections_come_through", || {
        let target = server();
        let mut half = Client::connect("127.0.0.1:7000");
        assert_eq!(half.ask("one"), 1);
        target.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(soon(|| process::state(target.pid) == Some('T')));
        half.say("last words");
        half.stream().shutdown(std::net::Shutdown::Write).expect("shut down");
        let _ = dump(&target, "img", &["--kill"], &["--tcp-established"]).ok("dump --kill");
        process::wait_free(&[target.pid]);
        target.restore_ok("img");
        target.signal(nix::sys::signal::Signal::SIGCONT);
        assert_eq!(half.hear(), "answer 2 to last words");
        assert_eq!(half.hear(), "", "the server closes in turn");
        assert!(soon(|| target.log().contains("lost a client: it closed")), "{}", target.log());
        // Gone before the restore: its FIN waits until then.
        let mut gone = Client::connect("127.0.0.1:7000");
        assert_eq!(gone.ask("three"), 3);
        let _ = dump(&target, "img2", &["--kill"], &["--tcp-established"]).ok("dump --kill");
        process::wait_free(&[target.pid]);
        gone.say("four");
        drop(gone);
        target.restore_ok("img2");
        assert!(soon(|| target.log().matches("lost a client").count() == 2), "{}", target.log());
        assert_eq!(net::rules(), "");
    });
}

/// Every state of an end that the peer, in another process, can bring about: data and ends arrive as if nothing had been.
#[test]
fn all_sorts_of_ends_with_a_peer_outside() {
    net::alone("all_sorts_of_ends_with_a_peer_outside", || {
        let listener = std::net::TcpListener::bind("127.0.0.1:7001").expect("listen");
        let dir = TestDir::new("ends");
        let counts_file = dir.path().join("counts");
        let accept = std::thread::spawn(move || {
            let peers: Vec<TcpStream> = (0..5).map(|_| listener.accept().expect("accept").0).collect();
            assert!(soon(|| counts_file.exists()));
            for peer in &peers[2..] {
                peer.shutdown(std::net::Shutdown::Write).expect("shut down");
            }
            peers
        });
        let mut command = std::process::Command::new("python3");
        command.arg("-c").arg(
            "import socket, signal, time, os\n\
             def stuff(s):\n\
             \x20   s.setblocking(False)\n\
             \x20   n = idle = 0\n\
             \x20   while idle < 20:\n\
             \x20       try: n += s.send(b'z' * 65536); idle = 0\n\
             \x20       except BlockingIOError: idle += 1; time.sleep(0.002)\n\
             \x20   return n\n\
             def state(s): return s.getsockopt(6, 11, 1)[0]\n\
             signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n\
             wait1, wait2, closing, last, wait = [socket.create_connection(('127.0.0.1', 7001)) for _ in range(5)]\n\
             counts = [stuff(wait1), 0, stuff(closing), stuff(last), 0]\n\
             for s in wait1, wait2, closing: s.shutdown(1)\n\
             open('new', 'w').write(' '.join(map(str, counts)))\n\
             os.rename('new', 'counts')\n\
             while [state(s) for s in (wait1, wait2, closing, last, wait)] != [4, 5, 11, 8, 8]: time.sleep(0.01)\n\
             last.shutdown(1)\n\
             assert state(last) == 9\n\
             open('log', 'a').write('ready\\n')\n\
             signal.sigwait([signal.SIGUSR1])\n\
             wait.send(b'later')\n\
             wait.close()\n\
             signal.pause()",
        );
        let target = Target::spawn(dir, command);
        target.wait_log("ready");
        let mut peers = accept.join().expect("accept");
        let counts = std::fs::read_to_string(target.path("counts")).expect("read");
        let counts: Vec<usize> = counts.split(' ').map(|n| n.parse().expect("a number")).collect();
        let _ = dump(&target, "img", &["--kill"], &["--tcp-established"]).ok("dump --kill");
        process::wait_free(&[target.pid]);
        target.restore_ok("img");
        target.signal(nix::sys::signal::Signal::SIGUSR1);
        for (peer, count) in peers.iter_mut().zip(&counts[..4]) {
            peer.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
            let mut all = Vec::new();
            peer.read_to_end(&mut all).expect("read up to the end");
            assert!(all.len() == *count && all.iter().all(|&b| b == b'z'), "{} of {count}", all.len());
        }
        let mut words = String::new();
        peers[4].read_to_string(&mut words).expect("read up to the end");
        assert_eq!(words, "later");
        // What the peer still may say is heard.
        peers[1].write_all(b"more").expect("write");
        assert_eq!(net::rules(), "");
    });
}

/// SYN_SENT: a connection that is asked for and not there yet is asked for again, from the same port.
#[test]
fn a_connect_under_way_goes_on() {
    net::alone("a_connect_under_way_goes_on", || {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket,
        };
        let server =
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        bind(server.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 7001)).expect("bind");
        listen(&server, Backlog::new(1).expect("a backlog")).expect("listen");
        let server = std::net::TcpListener::from(server);
        let address = server.local_addr().expect("an address");
        let mut fillers = Vec::new();
        while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            fillers.push(filler);
        }
        let target = crate::inet::python(
            "syn_sent",
            "import threading, select\n\
             s = socket.socket()\n\
             s.setblocking(False)\n\
             s.connect_ex(('127.0.0.1', 7001))\n\
             def later():\n\
             \x20   select.select([], [s], [])\n\
             \x20   s.send(b'%d' % s.getsockname()[1])\n\
             \x20   s.shutdown(1)\n\
             threading.Thread(target=later).start()\n\
             assert s.getsockopt(6, 11, 1)[0] == 2",
        );
        target.dump_ok("img");
        target.end();
        target.restore_ok("img");
        for _ in fillers {
            let _ = server.accept().expect("accept a filler");
        }
        let (mut stream, from) = server.accept().expect("accept the restored one");
        let mut words = String::new();
        stream.read_to_string(&mut words).expect("read");
        assert_eq!(words, from.port().to_string());
        assert_eq!(net::rules(), "");
    });
}

/// Connections within the tree that nobody has accepted, and what the kernel remembers of those that were closed.
#[test]
fn connections_of_nobody() {
    net::alone("connections_of_nobody", || {
        let waiting = crate::inet::python(
            "waiting",
            "l = socket.create_server(('127.0.0.1', 0))\n\
             c = socket.create_connection(l.getsockname())\n\
             c.send(b'early', socket.MSG_OOB)",
        );
        crate::inet::refused(&waiting, &["not accepted", "MSG_OOB", "--skip-in-flight"]);
        let _ = dump(&waiting, "img", &[], &["--skip-in-flight"]).ok("dump --skip-in-flight");
        waiting.end();
        let remembered = crate::inet::python(
            "remembered",
            "l = socket.socket()\n\
             l.bind(('127.0.0.1', 7002))\n\
             l.listen()\n\
             c = socket.create_connection(('127.0.0.1', 7002))\n\
             l.accept()[0].close()\n\
             assert c.recv(1) == b''\n\
             c.close()",
        );
        remembered.dump_ok("img");
        remembered.end();
        let take = || std::net::TcpListener::bind("127.0.0.1:7002");
        assert!(take().is_err(), "the original left nothing behind");
        remembered.restore_ok("img");
        remembered.end();
        // Somebody who listens there is another matter.
        let squatter = take().expect("take the port");
        let _ = remembered.restore("img").fails("ckpt-restore", 3, &["127.0.0.1:7002", "in use"]);
        drop(squatter);
        remembered.restore_ok("img");
        assert!(TcpStream::connect("127.0.0.1:7002").is_ok());
        assert_eq!(net::rules(), "");
    });
}

/// Kills `stage` at random instants, with traffic on the connection all the time.
fn killed_at_random(stage: &'static str) {
    net::alone(stage, || {
        let rounds = AtomicU64::new(0);
        let (_target, asked) = net::beside(
            |stop| keep_asking("10.9.0.1:7000", &rounds, stop),
            || {
                let target = server();
                let mut random = Random::new(stage);
                assert!(soon(|| rounds.load(Ordering::SeqCst) > 3), "{}", target.log());
                let start = Instant::now();
                let _ = dump(&target, "first", &[], &["--tcp-established"]).ok("dump");
                let span = u64::try_from(start.elapsed().as_nanos()).expect("a short time");
                for instant in 0..60 {
                    let delay = Duration::from_nanos(random.below(span * 12 / 10));
                    let mut running = target.dumping("img", &[], &["--tcp-established"]).start();
                    let end = Instant::now() + delay;
                    while Instant::now() < end {
                        std::hint::spin_loop();
                    }
                    running.kill(stage);
                    let outcome = running.wait().sane();
                    assert!(soon(|| net::rules().is_empty()), "instant {instant}: {}", net::rules());
                    let _ = std::fs::remove_dir_all(img(&target, "img"));
                    more_rounds(&rounds);
                    assert!(
                        !target.log().contains("lost"),
                        "instant {instant} {delay:?} {outcome}: {}",
                        target.log()
                    );
                }
                target.passes("the target");
                target
            },
        );
        assert!(asked > 60);
    });
}

#[test]
fn killed_scan_leaves_connections_and_no_rules() {
    killed_at_random("ckpt-scan");
}

#[test]
fn killed_sk_leaves_connections_and_no_rules() {
    killed_at_random("ckpt-sk");
}

#[test]
fn killed_write_leaves_connections_and_no_rules() {
    killed_at_random("ckpt-write");
}

/// ckpt-restore killed at random: the peer never hears of it, and the next restore goes on.
#[test]
fn killed_restore_leaves_the_peer_waiting() {
    net::alone("killed_restore_leaves_the_peer_waiting", || {
        let rounds = AtomicU64::new(0);
        let _target = net::beside(
            |stop| keep_asking("10.9.0.1:7000", &rounds, stop),
            || {
                let target = server();
                let mut random = Random::new("killed_restore");
                assert!(soon(|| rounds.load(Ordering::SeqCst) > 3), "{}", target.log());
                let mut span = 20_000_000;
                for instant in 0..25 {
                    let name = format!("img{instant}");
                    let _ = dump(&target, &name, &["--kill"], &["--tcp-established"]).ok("dump --kill");
                    process::wait_free(&[target.pid]);
                    let delay = Duration::from_nanos(random.below(span));
                    let mut running = Pipeline::new(target.dir.path())
                        .stage(["ckpt-restore".into(), "--detach".into(), img(&target, &name)])
                        .start();
                    let end = Instant::now() + delay;
                    while Instant::now() < end {
                        std::hint::spin_loop();
                    }
                    running.kill("ckpt-restore");
                    let outcome = running.wait().sane();
                    let mut again = false;
                    let lives = || {
                        let traced = process::state(target.pid) == Some('t');
                        !process::is_free(target.pid) && !traced && net::rules().is_empty()
                    };
                    if outcome.code("ckpt-restore") != 0 && !soon_short(lives) {
                        again = true;
                        assert!(net::rules().contains("ckpt-"), "instant {instant}: the lock is gone");
                        process::wait_free(&[target.pid]);
                        let start = Instant::now();
                        target.restore_ok(&name);
                        span = u64::try_from(start.elapsed().as_nanos()).expect("a short time") * 11 / 10;
                    }
                    assert_eq!(net::rules(), "", "instant {instant}");
                    assert!(
                        goes_on(&rounds),
                        "instant {instant} {delay:?} of {span}, restored again: {again}: {outcome}\n{:?}\n{}",
                        process::state(target.pid),
                        target.log()
                    );
                    assert!(!target.log().contains("lost"), "instant {instant} {delay:?}: {}", target.log());
                }
                target
            },
        );
    });
}

/// Whether it is so within a moment.
fn soon_short(wanted: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        if wanted() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// A megabyte in each direction that nobody has read when the server goes.
#[test]
fn large_queues_survive_on_one_side() {
    net::alone("large_queues_survive_on_one_side", || {
        let target = server();
        let mut client = TcpStream::connect("127.0.0.1:7000").expect("connect");
        client.write_all(b"big one\n").expect("ask");
        assert!(soon(|| target.log().contains("ready")));
        // The answer fills our receive queue and the server's send queue; nobody reads.
        std::thread::sleep(Duration::from_millis(100));
        let _ = dump(&target, "img", &["--kill"], &["--tcp-established"]).ok("dump --kill");
        process::wait_free(&[target.pid]);
        target.restore_ok("img");
        let mut answer = vec![0; (1 << 20) + "answer 1 to big one\n".len()];
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        client.read_exact(&mut answer).expect("read all of the answer");
        assert!(answer[..1 << 20].iter().all(|&b| b == b'x'));
        assert_eq!(&answer[1 << 20..], b"answer 1 to big one\n");
    });
}

/// Counts up at redis, over one connection, until told to stop; every answer is the next number.
fn count_up(key: usize, rounds: &AtomicU64, stop: &std::sync::atomic::AtomicBool) -> u64 {
    let mut client = Client::connect("10.9.0.1:7000");
    let mut expected = 0;
    while !stop.load(Ordering::SeqCst) {
        client.say(&format!("INCR counter{key}\r"));
        expected += 1;
        assert_eq!(client.hear(), format!(":{expected}"), "client {key}");
        rounds.fetch_add(1, Ordering::SeqCst);
    }
    expected
}

/// Fifty clients in another network namespace count at a redis that is killed and restored under them: no answer is lost,
/// none comes twice.
#[test]
fn fifty_clients_of_redis_never_notice() {
    if !installed("redis-server") {
        return skip("fifty_clients_of_redis_never_notice", "no redis-server");
    }
    net::alone("fifty_clients_of_redis_never_notice", || {
        let rounds = AtomicU64::new(0);
        let (_target, counted) = net::beside(
            |stop| {
                std::thread::scope(|threads| {
                    let rounds = &rounds;
                    let clients: Vec<_> =
                        (0..50).map(|key| threads.spawn(move || count_up(key, rounds, stop))).collect();
                    clients.into_iter().map(|c| c.join().expect("a client")).collect::<Vec<_>>()
                })
            },
            || {
                let dir = TestDir::new("redis_tcp");
                let mut command = std::process::Command::new("redis-server");
                command.args(["--port", "7000", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]);
                command.arg("--logfile").arg(dir.path().join("log"));
                let target = Target::spawn(dir, command);
                assert!(soon(|| rounds.load(Ordering::SeqCst) > 500), "{}", target.log());
                for round in 0..3 {
                    let name = format!("img{round}");
                    let _ = dump(&target, &name, &["--kill"], &["--tcp-established"]).ok("dump --kill");
                    process::wait_free(&[target.pid]);
                    target.restore_ok(&name);
                    assert_eq!(net::rules(), "");
                    let before = rounds.load(Ordering::SeqCst);
                    assert!(
                        soon(|| rounds.load(Ordering::SeqCst) > before + 500),
                        "the clients wait in vain"
                    );
                }
                target
            },
        );
        assert!(counted.iter().all(|&n| n > 10), "{counted:?}");
    });
}
