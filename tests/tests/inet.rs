//! UDP, raw and ping sockets, and the options of sockets of all kinds.

use std::{net::UdpSocket, process::Command};

use ckpt_tests::{Target, TestDir};

crate::survives! {
    socket_options_of_all_kinds: "socket_options";
    udp_queues_names_and_memberships: "udp_sockets";
    raw_sockets_work_again: "raw_sockets";
    netlink_ports_and_groups: "netlink_sockets";
    packet_sockets_filters_and_rings: "packet_sockets";
    mapped_rings_go_on_where_they_were: "packet_rings";
    transmit_rings_go_on_where_they_were: "packet_transmit";
}

/// A Python program that makes sockets, says ready and stays.
pub(crate) fn python(name: &str, code: &str) -> Target {
    let dir = TestDir::new(name);
    let log = dir.path().join("log");
    let mut command = Command::new("python3");
    command.arg("-c").arg(format!(
        "import socket, os, signal, time\n{code}\nopen({:?}, 'a').write('ready\\n')\nsignal.pause()",
        log.display().to_string()
    ));
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    target
}

/// The same, whose function `check` is called whenever it is asked for a verdict. The signal is taken by sigwait(3): one that
/// came between Python's last look for signals and its pause(2) would be slept over.
pub(crate) fn python_checking(name: &str, code: &str) -> Target {
    let asked = "def asked():\n    while True: check(signal.sigwait([signal.SIGUSR1]))\n\
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n\
        signal.pause = asked";
    python(name, &format!("{code}\n{asked}"))
}

pub(crate) fn refused(target: &Target, words: &[&str]) {
    let before = target.at_rest();
    let _ = target.dump("img").fails("ckpt-sk", 3, words);
    assert!(!target.path("img").exists());
    target.unchanged(&before);
}

/// What a restore leaves in a ring tells the next checkpoint as much as what the kernel leaves there.
#[test]
fn restored_rings_are_checkpointed_again() {
    for workload in ["packet_rings", "packet_transmit"] {
        let target = Target::start(workload);
        for round in 0..3 {
            let name = format!("img{round}");
            target.dump_ok(&name);
            target.end();
            target.restore_ok(&name);
            // At once, and after frames have come.
            if round != 1 {
                target.passes("the restored one");
            }
        }
    }
}

#[test]
fn corked_data_is_refused() {
    let target = python(
        "corked",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.connect(('127.0.0.1', 9))\n\
         s.send(b'half', socket.MSG_MORE)",
    );
    refused(&target, &["UDP socket", "unsent data", "MSG_MORE"]);
}

#[test]
fn a_queue_that_cant_be_given_back_needs_a_word() {
    let target = python(
        "raw_queue",
        "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)\n\
         s.sendto(b'unread', ('127.0.0.1', 0))",
    );
    refused(&target, &["raw socket", "not read", "--queued=drop"]);
    let _ = target.dumping("img", &[], &["--queued=drop"]).run().ok("dump with --queued=drop");
    target.end();
    target.restore_ok("img");
    target.end();
}

#[test]
fn a_waiting_error_is_not_taken_from_the_target() {
    let target = python(
        "udp_error",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         t = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         t.bind(('127.0.0.1', 0))\n\
         s.connect(t.getsockname())\n\
         t.close()\n\
         s.send(b'x')",
    );
    refused(&target, &["UDP socket", "an error waits", "--queued=drop"]);
}

/// Bound to what no interface has (IP_FREEBIND, IP_TRANSPARENT), which the kernel allows only if that is set before.
#[test]
fn addresses_that_no_interface_has_come_back() {
    let target = python_checking(
        "freebind",
        "made = []\n\
         for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:\n\
         \x20   for family, level, option, address in (\n\
         \x20           (socket.AF_INET, 0, 15, '198.51.100.7'), (socket.AF_INET, 0, 19, '198.51.100.8'),\n\
         \x20           (socket.AF_INET6, 41, 78, '2001:db8::7'), (socket.AF_INET6, 41, 75, '2001:db8::8')):\n\
         \x20       s = socket.socket(family, kind)\n\
         \x20       s.setsockopt(level, option, 1)\n\
         \x20       s.bind((address, 0))\n\
         \x20       if kind == socket.SOCK_STREAM: s.listen()\n\
         \x20       made.append((s, level, option, s.getsockname()))\n\
         def check(*_):\n\
         \x20   good = all(s.getsockname() == name and s.getsockopt(level, option) for s, level, option, name in made)\n\
         \x20   open('log', 'a').write('PASS\\n' if good else 'BROKEN\\n')",
    );
    target.survives();
}

#[test]
fn an_occupied_port_is_named_and_nothing_is_left() {
    let target = python(
        "udp_port",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.bind(('127.0.0.1', 0))\n\
         open('port', 'w').write(str(s.getsockname()[1]))",
    );
    target.dump_ok("img");
    target.end();
    let port: u16 = std::fs::read_to_string(target.path("port")).expect("read").parse().expect("a port");
    let squatter = UdpSocket::bind(("127.0.0.1", port)).expect("take the port");
    let _ = target.restore("img").fails("ckpt-restore", 3, &[&format!("127.0.0.1:{port}"), "in use"]);
    assert!(ckpt_tests::soon(|| ckpt_tests::process::is_free(target.pid)));
    drop(squatter);
    target.restore_ok("img");
    target.end();
}

#[test]
fn an_ebpf_filter_is_refused() {
    // The smallest program: r0 = 0; exit.
    let target = python(
        "ebpf_filter",
        "import ctypes, struct\n\
         code = struct.pack('<BBhi', 0xb7, 0, 0, 0) + struct.pack('<BBhi', 0x95, 0, 0, 0)\n\
         insns, license = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b'GPL')\n\
         attr = struct.pack('<IIQQ', 1, 2, ctypes.addressof(insns), ctypes.addressof(license))\n\
         attr = ctypes.create_string_buffer(attr.ljust(128, b'\\0'), 128)\n\
         prog = ctypes.CDLL(None).syscall(321, 5, attr, 128)\n\
         assert prog >= 0\n\
         s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.setsockopt(socket.SOL_SOCKET, 50, prog)\n\
         os.close(prog)",
    );
    refused(&target, &["UDP socket", "eBPF"]);
}

#[test]
fn an_unread_netlink_message_needs_a_word() {
    let target = python(
        "netlink_queue",
        "import struct\n\
         s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n\
         s.bind((0, 0))\n\
         s.send(struct.pack('IHHIIII', 20, 999, 1, 1, 0, 0, 0)[:20])",
    );
    refused(&target, &["netlink socket", "not read", "--queued=drop"]);
}

#[test]
fn a_tunnel_of_the_kernel_is_refused() {
    let target = python(
        "encap",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.bind(('127.0.0.1', 0))\n\
         s.setsockopt(17, 100, 3)",
    );
    refused(&target, &["UDP socket", "UDP_ENCAP 3"]);
}

/// Without privileges what needs one is named, and nothing is left behind.
#[test]
fn a_missing_capability_is_named() {
    let target = python(
        "raw_unprivileged",
        "import ctypes, struct\n\
         s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)\n\
         libc, none = ctypes.CDLL(None), bytes(24)\n\
         assert libc.prctl(24, 13, 0, 0, 0) == 0\n\
         assert libc.capset(struct.pack('Ii', 0x20080522, 0), none) == 0",
    );
    target.dump_ok("img");
    target.end();
    let outcome = Command::new("setpriv")
        .args(["--inh-caps=-net_raw", "--bounding-set=-net_raw"])
        .args([ckpt_tests::tool("ckpt-restore"), "--detach".into(), target.path("img")])
        .output()
        .expect("run setpriv");
    let said = String::from_utf8_lossy(&outcome.stderr);
    assert_eq!(outcome.status.code(), Some(3), "{said}");
    assert!(said.contains("raw socket") && said.contains("CAP_NET_RAW"), "{said}");
    assert!(ckpt_tests::soon(|| ckpt_tests::process::is_free(target.pid)));
}

/// Ports and addresses are free again for others, and taken again by the restored one.
#[test]
fn an_asyncio_datagram_server_goes_on() {
    let dir = TestDir::new("asyncio_udp");
    let mut command = Command::new("python3");
    command.arg("-c").arg(
        "import asyncio\n\
         class Echo(asyncio.DatagramProtocol):\n\
         \x20   n = 0\n\
         \x20   def connection_made(self, transport): self.transport = transport\n\
         \x20   def datagram_received(self, data, addr):\n\
         \x20       Echo.n += 1\n\
         \x20       self.transport.sendto(b'%d %s' % (Echo.n, data), addr)\n\
         async def main():\n\
         \x20   transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Echo, local_addr=('127.0.0.1', 0))\n\
         \x20   open('port', 'w').write(str(transport.get_extra_info('sockname')[1]))\n\
         \x20   open('log', 'w').write('ready\\n')\n\
         \x20   await asyncio.Event().wait()\n\
         asyncio.run(main())\n",
    );
    let target = Target::spawn(dir, command);
    target.wait_log("ready");
    let port: u16 = std::fs::read_to_string(target.path("port")).expect("read").parse().expect("a port");
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client.set_read_timeout(Some(std::time::Duration::from_secs(20))).expect("set a timeout");
    client.connect(("127.0.0.1", port)).expect("connect");
    let ask = |n: u32| {
        client.send(b"hello").expect("send");
        let mut buffer = [0; 64];
        let len = client.recv(&mut buffer).expect("an answer");
        assert_eq!(buffer[..len], *format!("{n} hello").as_bytes());
    };
    ask(1);
    ask(2);
    let before = target.at_rest();
    target.dump_ok("img");
    target.unchanged(&before);
    ask(3);
    target.end();
    target.restore_ok("img");
    ask(3);
    ask(4);
    target.end();
}

/// Runs a script in a network namespace of its own, with the tools in its path and no descriptors but three.
fn in_own_network(dir: &TestDir, script: &str) {
    let tools = ckpt_tests::tool("ckpt-scan");
    let path = format!(
        "{}:{}",
        tools.parent().expect("a directory").display(),
        std::env::var("PATH").expect("PATH")
    );
    let script = format!(
        "set -euo pipefail; soon() {{ for i in {{1..2000}}; do \"$@\" && return; sleep 0.01; done; return 1; }}\n\
         trip() {{ ckpt-scan -t $P | ckpt-sk | ckpt-write img; kill -9 $P; wait $P || true; ckpt-restore --detach img; }}\n{script}"
    );
    let outcome = Command::new("unshare")
        .args(["-n", "bash", "-c", ckpt_tests::workload::CLOSE_ALL, "bash", "bash", "-c", &script])
        .current_dir(dir.path())
        .env("PATH", path)
        .env(ckpt_tests::process::MARKER, dir.path())
        .output()
        .expect("run unshare");
    ckpt_tests::process::end_all(dir.path());
    let said = String::from_utf8_lossy(&outcome.stderr);
    assert!(outcome.status.success(), "{} {said}", String::from_utf8_lossy(&outcome.stdout));
}

#[test]
fn ip_monitor_hears_what_happens_after_the_restore() {
    let dir = TestDir::new("ip_monitor");
    in_own_network(
        &dir,
        "setsid ip monitor address < /dev/null > out 2>&1 & P=$!\n\
         bound() { grep -q \" $P \" /proc/net/netlink; }; soon bound\n\
         trip; ip link set lo up; ip addr add 127.77.0.1/32 dev lo\n\
         soon grep -q 127.77.0.1 out; kill -9 $P",
    );
}

#[test]
fn ping_sockets_keep_their_ports() {
    let dir = TestDir::new("ping_sockets");
    let workload = ckpt_tests::workload::compile("raw_sockets");
    in_own_network(
        &dir,
        &format!(
            "ip link set lo up; echo '0 1000' > /proc/sys/net/ipv4/ping_group_range\n\
             setsid {} log < /dev/null > out 2>&1 & P=$!\n\
             soon grep -qs ready log; ! grep SKIP log; trip; kill -USR1 $P\n\
             soon grep -q -e PASS -e BROKEN log; cat log; grep -q PASS log; kill -9 $P",
            workload.display()
        ),
    );
}
