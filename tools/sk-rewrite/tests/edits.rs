//! Edits of streams made of golden directories and of hand-made sockets.
#![allow(missing_docs)]

use std::{
    fs::File,
    io::{Read, Seek},
    path::Path,
};

use ckpt_images::ImageSet;
use ckpt_proto::{
    Image, Message,
    stream::Writer,
    types::{
        ExternalSocket, FdTypes, FdinfoEntry, FileEntry, FownEntry, Hello, InetSkEntry, SkOptsEntry,
        SkPacketEntry, SocketStub, TaskKobjIdsEntry, TcpStreamEntry, UnixSkEntry,
        external_socket::PolicyKind,
    },
};
use clap::Parser;

fn args(line: &str) -> sk_rewrite::Args {
    sk_rewrite::Args::try_parse_from(std::iter::once("sk-rewrite").chain(line.split_whitespace())).unwrap()
}

fn rewritten(line: &str, input: &File) -> anyhow::Result<File> {
    let mut input = input.try_clone().unwrap();
    input.rewind().unwrap();
    let mut output = tempfile::tempfile().unwrap();
    sk_rewrite::run(&args(line), input, output.try_clone().unwrap())?;
    output.rewind().unwrap();
    Ok(output)
}

fn bytes(mut file: &File) -> Vec<u8> {
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn family() -> File {
    golden("family")
}

/// A listener on 127.0.0.1:47113, both ends of a connection to it, and UDP on port 47114; by CRIU.
fn tcp() -> File {
    golden("tcp")
}

fn golden(name: &str) -> File {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/golden/{name}.criu"));
    let output = tempfile::tempfile().unwrap();
    ckpt_read::run(
        &ckpt_read::Args { dir, decompress: false, no_verify: false, common: Default::default() },
        output.try_clone().unwrap(),
    )
    .unwrap();
    output
}

fn socket(id: u32, ino: u32, peer: u32, external: Option<ExternalSocket>) -> FileEntry {
    let usk = UnixSkEntry {
        id,
        ino,
        r#type: 1,
        state: 1,
        peer,
        fown: FownEntry::default(),
        opts: SkOptsEntry::default(),
        ckpt_external: external,
        ..Default::default()
    };
    FileEntry { r#type: FdTypes::Unixsk.into(), id, usk: Some(usk), ..Default::default() }
}

fn inherit(peer_name: Option<&[u8]>) -> Option<ExternalSocket> {
    let peer_name = peer_name.map(<[u8]>::to_vec);
    let peer_pid = peer_name.is_some().then_some(77);
    Some(ExternalSocket { policy: PolicyKind::Inherit.into(), peer_name, peer_pid, ..Default::default() })
}

/// A field numbered 10100, unknown to this release.
const FUTURE: [u8; 6] = [0xa2, 0xf7, 0x04, 2, b'h', b'i'];

/// Two external sockets, with queues that come before their entries.
fn external() -> File {
    let hello = Hello { page_size: 4096, arch: 1, ..Hello::default() };
    let mut writer = Writer::open(tempfile::tempfile().unwrap(), hello).unwrap();
    for (id, bytes) in [(3u32, &b"queued"[..]), (4, b"other")] {
        let packet =
            SkPacketEntry { id_for: id, length: bytes.len().try_into().unwrap(), ..Default::default() };
        writer.entry(Image::SkQueues, 0, &packet.encode_to_vec()).unwrap();
        writer.data(Image::SkQueues, 0, bytes).unwrap();
    }
    let mut named = socket(3, 48213, 48214, inherit(Some(b"/run/b.sock")));
    named.usk.as_mut().unwrap().name = b"/run/a.sock\0".to_vec();
    let mut entry = named.encode_to_vec();
    entry.extend(FUTURE);
    writer.entry(Image::Files, 0, &entry).unwrap();
    writer.entry(Image::Files, 0, &socket(4, 48215, 48216, inherit(None)).encode_to_vec()).unwrap();
    let descriptor =
        FdinfoEntry { id: 3, flags: 0, r#type: FdTypes::Unixsk.into(), fd: 7, ..Default::default() };
    writer.entry(Image::Fdinfo, 2, &descriptor.encode_to_vec()).unwrap();
    let ids = TaskKobjIdsEntry { vm_id: 1, files_id: 2, fs_id: 1, sighand_id: 1, ..Default::default() };
    writer.entry(Image::Ids, 101, &ids.encode_to_vec()).unwrap();
    writer.bulk().unwrap();
    writer.data(Image::Pages, 1, &[7; 10_000]).unwrap();
    writer.end().unwrap()
}

fn policy(output: File, ino: u32) -> ExternalSocket {
    let set = ImageSet::from_stream(output).unwrap();
    let files: Vec<FileEntry> = set.all(Image::Files, 0).unwrap();
    files.into_iter().filter_map(|f| f.usk).find(|s| s.ino == ino).unwrap().ckpt_external.unwrap()
}

#[test]
fn without_rules_nothing_changes() {
    for input in [family(), external()] {
        assert!(bytes(&rewritten("", &input).unwrap()) == bytes(&input));
    }
}

#[test]
fn each_rule_sets_its_policy() {
    for (line, kind, path) in [
        ("--connect 48213=/run/c.sock", PolicyKind::Connect, Some(&b"/run/c.sock"[..])),
        ("--connect socket:[48213]=@c", PolicyKind::Connect, Some(b"\0c")),
        ("--external unix[48213]:/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--external 48213", PolicyKind::Connect, None),
        ("--accept 48213=/run/a", PolicyKind::Accept, Some(b"/run/a")),
        ("--connect peer=/run/b.sock=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--connect fd=101/7=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--connect path=/run/a.sock=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--connect peer=48214=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--connect peer-pid=77=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--drop-queues 48215 --connect kind=unix=/run/c", PolicyKind::Connect, Some(b"/run/c")),
        ("--inherit 48213", PolicyKind::Inherit, None),
        ("--close 48213", PolicyKind::Close, None),
    ] {
        // What is queued would be in the way of a new connection.
        let line = format!("{line} --drop-queues 48213 --drop-queues kind=unix-stream");
        let external = policy(rewritten(&line, &external()).unwrap(), 48213);
        assert_eq!((external.policy(), external.path.as_deref()), (kind, path), "{line}");
        assert_eq!(external.peer_name.as_deref(), Some(&b"/run/b.sock"[..]), "{line}");
    }
    assert_eq!(
        policy(rewritten("--external 48215 --drop-queues id=48215", &external()).unwrap(), 48215).policy(),
        PolicyKind::Inherit
    );
}

#[test]
fn fields_from_the_future_stay() {
    let output = rewritten("--close 48213", &external()).unwrap();
    let set = ImageSet::from_stream(output).unwrap();
    assert!(set.entries(Image::Files, 0)[0].ends_with(&FUTURE));
}

#[test]
fn queues_are_dropped_though_they_come_before_their_socket() {
    let set = ImageSet::from_stream(rewritten("--drop-queues 48213", &external()).unwrap()).unwrap();
    let packets: Vec<SkPacketEntry> = set.all(Image::SkQueues, 0).unwrap();
    assert_eq!(packets.iter().map(|p| p.id_for).collect::<Vec<_>>(), [4]);
    assert_eq!(set.payload_bytes(Image::SkQueues, 0, 0, 99).unwrap(), b"other");
}

#[test]
fn a_rule_that_matches_nothing_lists_what_there_is() {
    let error = rewritten("--close 5", &external()).unwrap_err().to_string();
    assert!(error.contains("--close 5") && error.contains("48213 (fd=101/7, unix-stream"), "{error}");
    rewritten("--close 5 --allow-unmatched", &external()).unwrap();
}

#[test]
fn a_failed_rewrite_ends_the_stream_with_its_reason() {
    let mut input = external();
    input.rewind().unwrap();
    let mut output = tempfile::tempfile().unwrap();
    sk_rewrite::run(&args("--close 5"), input, output.try_clone().unwrap()).unwrap_err();
    output.rewind().unwrap();
    let error = ImageSet::from_stream(output).unwrap_err().to_string();
    assert!(error.contains("gave up") && error.contains("--close 5"), "{error}");
}

#[test]
fn one_end_of_a_connection_inside_is_not_torn_off() {
    let error = rewritten("--close 425932", &family()).unwrap_err().to_string();
    assert!(error.contains("425933"), "{error}");
    let output = rewritten("--close 425932 --inherit 425933 --drop-queues 425933", &family()).unwrap();
    assert_eq!(policy(output, 425_933).policy(), PolicyKind::Inherit);
}

#[test]
fn contradictions_are_a_usage_error() {
    let error = rewritten("--close 48213 --inherit 48213", &external()).unwrap_err();
    assert_eq!(ckpt_cli::code_of(&error), ckpt_cli::Status::Usage);
}

#[test]
fn a_dry_run_writes_no_stream() {
    assert!(bytes(&rewritten("--dry-run --close 48213", &external()).unwrap()).is_empty());
    rewritten("--dry-run --close 5", &external()).unwrap_err();
}

#[test]
fn queued_bytes_do_not_fit_into_a_new_connection() {
    for rule in ["connect 48213=/run/c", "inherit 48213", "accept 48213=/run/c"] {
        let error = rewritten(&format!("--{rule}"), &external()).unwrap_err().to_string();
        assert!(error.contains("6 bytes received") && error.contains("--drop-queues 48213"), "{error}");
    }
    let set = ImageSet::from_stream(rewritten("--close 48213", &external()).unwrap()).unwrap();
    assert_eq!(set.all::<SkPacketEntry>(Image::SkQueues, 0).unwrap().len(), 2);
}

#[test]
fn two_rules_for_one_connection_name_it() {
    let error = rewritten("--close 48213 --inherit fd=101/7", &external()).unwrap_err().to_string();
    assert!(error.contains("contradict") && error.contains("socket 48213"), "{error}");
}

#[test]
fn what_is_no_connection_is_not_made_again() {
    for (line, why) in [
        ("--connect kind=udp=/x", "only unix connections"),
        ("--close addr=127.0.0.1:47114", "no connection"),
        ("--close 426765", "no connection"),
        ("--accept 426766", "only unix connections"),
    ] {
        let error = rewritten(line, &tcp()).unwrap_err().to_string();
        assert!(error.contains(why), "{line}: {error}");
    }
    let error = rewritten("--drop-queues 48215 --accept 48215", &external()).unwrap_err().to_string();
    assert!(error.contains("no address of its own"), "{error}");
}

fn inet(output: &File) -> Vec<InetSkEntry> {
    let mut output = output.try_clone().unwrap();
    output.rewind().unwrap();
    let set = ImageSet::from_stream(output).unwrap();
    let files: Vec<FileEntry> = set.all(Image::Files, 0).unwrap();
    files.into_iter().filter_map(|f| f.isk).collect()
}

fn sides(output: &File) -> Vec<String> {
    let side = |words: &[u32], port| ckpt_socket::address(words, port).unwrap().to_string();
    let all = inet(output).into_iter();
    all.map(|s| format!("{} {}", side(&s.src_addr, s.src_port), side(&s.dst_addr, s.dst_port))).collect()
}

#[test]
fn addresses_and_ports_change_at_both_ends() {
    let before = sides(&tcp());
    for (line, from, to) in [
        ("--addr 127.0.0.1=127.0.0.2", "127.0.0.1:", "127.0.0.2:"),
        ("--port 47113=80", ":47113", ":80"),
        ("--addr 127.0.0.1:47113=127.0.0.7:81", "127.0.0.1:47113", "127.0.0.7:81"),
    ] {
        let after = sides(&rewritten(line, &tcp()).unwrap());
        let expected: Vec<String> = before.iter().map(|s| s.replace(from, to)).collect();
        assert_eq!(after, expected, "{line}");
        assert_ne!(after, before);
    }
    // Two ports change places.
    let after = sides(&rewritten("--port 47113=47114 --port 47114=47113", &tcp()).unwrap());
    let swap = |s: &String| s.replace(":47113", ":x").replace(":47114", ":47113").replace(":x", ":47114");
    assert_eq!(after, before.iter().map(swap).collect::<Vec<_>>());
}

#[test]
fn no_two_sockets_get_one_address() {
    let input = with_files(vec![
        tcp_socket(1, "10.0.0.1:80", "0.0.0.0:0", 10),
        tcp_socket(2, "10.0.0.1:81", "0.0.0.0:0", 10),
    ]);
    let error = rewritten("--port 80=81", &input).unwrap_err().to_string();
    assert!(error.contains("10.0.0.1:81") && error.contains("both"), "{error}");
    rewritten("--port 80=81 --port 81=80", &input).unwrap();
}

#[test]
fn a_connection_that_leads_out_moves_only_with_its_peer() {
    let input = with_files(vec![
        tcp_socket(1, "10.0.0.1:80", "0.0.0.0:0", 10),
        tcp_socket(2, "10.0.0.1:80", "10.0.0.9:4000", 1),
    ]);
    for line in ["--addr 10.0.0.1=10.0.0.2", "--port 80=81", "--addr 10.0.0.9=10.0.0.8", "--port 4000=4001"] {
        let error = rewritten(line, &input).unwrap_err().to_string();
        assert!(error.contains("10.0.0.9:4000") && error.contains("--peers-follow"), "{line}: {error}");
        assert_ne!(sides(&rewritten(&format!("{line} --peers-follow"), &input).unwrap()), sides(&input));
    }
    // A closed connection has no other end.
    let output = rewritten("--close 2 --port 80=81", &input).unwrap();
    assert_eq!(sides(&output), ["10.0.0.1:81 0.0.0.0:0", "10.0.0.1:81 10.0.0.9:4000"]);
}

#[test]
fn mapped_addresses_stay_mapped() {
    let input = with_files(vec![
        tcp_socket(1, "[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.1]:4000", 1),
        tcp_socket(2, "10.0.0.1:4000", "10.0.0.1:80", 1),
    ]);
    let output = rewritten("--addr 10.0.0.1=10.0.0.2", &input).unwrap();
    assert_eq!(sides(&output), ["[::ffff:10.0.0.2]:80 [::ffff:10.0.0.2]:4000", "10.0.0.2:4000 10.0.0.2:80"]);
}

#[test]
fn a_tcp_connection_is_closed_with_its_state() {
    let set = |line: &str| ImageSet::from_stream(rewritten(line, &tcp()).unwrap()).unwrap();
    assert_eq!(set("--port 47113=80").args(Image::TcpStream).len(), 2);
    let error = rewritten("--close 426766", &tcp()).unwrap_err().to_string();
    assert!(error.contains("socket 426768") && error.contains("as well"), "{error}");
    // The listener at this address stays: it has no connection.
    let closed = set("--close addr=127.0.0.1:47113 --close 426766");
    // What was received stays to be read.
    let entry: TcpStreamEntry = closed.one(Image::TcpStream, 426_766).unwrap();
    assert_eq!((entry.inq_len, entry.outq_len), (6, 0));
    assert_eq!(closed.payload_bytes(Image::TcpStream, 426_766, 0, 99).unwrap(), b"world!");
    let closed = set("--close addr=127.0.0.1 --drop-queues kind=tcp");
    assert_eq!(closed.args(Image::TcpStream).len(), 0);
    let files: Vec<FileEntry> = closed.all(Image::Files, 0).unwrap();
    let states = files.iter().filter_map(|f| f.isk.as_ref()).map(|s| (s.state, s.ckpt_closed));
    assert_eq!(states.filter(|(state, closed)| *state == 7 && *closed == Some(1)).count(), 2);
}

#[test]
fn a_tcp_queue_is_dropped_and_the_numbers_stay() {
    let output = rewritten("--drop-queues 426766", &tcp()).unwrap();
    let set = ImageSet::from_stream(output).unwrap();
    let entry: TcpStreamEntry = set.one(Image::TcpStream, 426_766).unwrap();
    assert_eq!((entry.inq_len, entry.inq_seq), (0, 1_367_525_348));
    let other: TcpStreamEntry = set.one(Image::TcpStream, 426_768).unwrap();
    assert_eq!(other.inq_len, 5);
    assert_eq!(set.payload_bytes(Image::TcpStream, 426_768, 0, 99).unwrap(), b"hello");
}

#[test]
fn options_are_set_by_their_names() {
    let line = "--set-opt 426766:SO_KEEPALIVE=on --set-opt 426766:TCP_NODELAY=1 --set-opt 426766:IP_TTL=9 \
                --set-opt kind=tcp:SO_RCVTIMEO=1.5 --set-opt 426766:SO_REUSEADDR=1 --set-opt addr=127.0.0.1:47113:tcp_keepidle=5";
    let output = rewritten(line, &tcp()).unwrap();
    let socket = inet(&output).into_iter().find(|s| s.ino == 426_766).unwrap();
    let tcp_options = socket.tcp_opts.unwrap();
    assert_eq!((tcp_options.nodelay, tcp_options.keepidle), (Some(true), Some(7200)));
    assert_eq!((socket.opts.so_keepalive, socket.opts.reuseaddr), (Some(true), Some(true)));
    assert_eq!((socket.opts.so_rcv_tmo_sec, socket.opts.so_rcv_tmo_usec), (1, 500_000));
    assert_eq!(socket.ip_opts.unwrap().ttl, Some(9));
    let mut output = output;
    output.rewind().unwrap();
    let set = ImageSet::from_stream(output).unwrap();
    assert_eq!(set.one::<TcpStreamEntry>(Image::TcpStream, 426_766).unwrap().nodelay, Some(true));
    // One that has no field of its own.
    let output = rewritten("--set-opt 426766:TCP_CONGESTION=reno", &tcp()).unwrap();
    let socket = inet(&output).into_iter().find(|s| s.ino == 426_766).unwrap();
    let stored = &socket.opts.ckpt_options[..];
    assert!(stored.iter().any(|o| (o.level, o.name, &o.value[..]) == (6, 13, b"reno\0")), "{stored:?}");
    for (option, why) in [
        ("SO_NONE=1", "SO_KEEPALIVE, "),
        ("SO_KEEPALIVE=2", "0 or 1"),
        ("SO_MARK=x", "a number"),
        ("UDP_GRO=1", "TCP_NODELAY"),
    ] {
        let error = rewritten(&format!("--set-opt 426766:{option}"), &tcp()).unwrap_err().to_string();
        assert!(error.contains(why), "{option}: {error}");
    }
}

#[test]
fn paths_are_renamed_wherever_they_are() {
    let mut bound = socket(5, 50, 0, None);
    let unix = bound.usk.as_mut().unwrap();
    (unix.state, unix.name) = (10, b"/run/a/b.sock\0".to_vec());
    unix.ckpt_file = Some(b"/run/a/moved".to_vec());
    let mut relative = socket(6, 60, 0, None);
    let unix = relative.usk.as_mut().unwrap();
    (unix.state, unix.name, unix.name_dir) = (10, b"c.sock\0".to_vec(), Some(b"/run/a".to_vec()));
    let input = with_files(vec![bound, relative, socket(7, 70, 71, inherit(Some(b"/run/a/d.sock")))]);
    let output = rewritten("--rename /run/a/=/srv/", &input).unwrap();
    let files: Vec<FileEntry> = ImageSet::from_stream(output).unwrap().all(Image::Files, 0).unwrap();
    let sockets: Vec<UnixSkEntry> = files.into_iter().filter_map(|f| f.usk).collect();
    assert_eq!(sockets[0].name, b"/srv/b.sock\0");
    assert_eq!(sockets[0].ckpt_file.as_deref(), Some(&b"/srv/moved"[..]));
    assert_eq!(
        (&sockets[1].name[..], sockets[1].name_dir.as_deref()),
        (&b"c.sock\0"[..], Some(&b"/srv"[..]))
    );
    assert_eq!(sockets[2].ckpt_external.as_ref().unwrap().peer_name.as_deref(), Some(&b"/srv/d.sock"[..]));
    let error = rewritten("--rename /run/a/b.sock=/run/a/c.sock", &input).unwrap_err().to_string();
    assert!(error.contains("would both be bound to /run/a/c.sock"), "{error}");
    let error = rewritten("--rename /none=/x", &input).unwrap_err().to_string();
    assert!(error.contains("matches nothing"), "{error}");
}

#[test]
fn rules_come_from_files() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let text = "# what becomes of it\n\n  connect 48213=/run/c.sock\n--drop-queues=kind=unix\n";
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    let line = format!("--rules {}", file.path().display());
    let external = policy(rewritten(&line, &external()).unwrap(), 48213);
    assert_eq!(external.path.as_deref(), Some(&b"/run/c.sock"[..]));

    std::io::Write::write_all(&mut file, b"forget 1\n").unwrap();
    let error = rewritten(&line, &family()).unwrap_err();
    assert_eq!(ckpt_cli::code_of(&error), ckpt_cli::Status::Usage);
    assert!(error.to_string().contains("line 5"), "{error}");
}

#[test]
fn a_stream_that_ckpt_sk_has_not_seen_is_refused() {
    let stub = SocketStub { pid: 1, fd: 2, ino: 48213, domain: 1, r#type: 1, ..Default::default() };
    let file =
        FileEntry { r#type: FdTypes::Unixsk.into(), id: 1, ckpt_stub: Some(stub), ..Default::default() };
    let error = rewritten("--close 48213", &with_files(vec![file])).unwrap_err();
    assert_eq!(ckpt_cli::code_of(&error), ckpt_cli::Status::Refused);
}

fn tcp_socket(ino: u32, local: &str, remote: &str, state: u32) -> FileEntry {
    let [local, remote]: [std::net::SocketAddr; 2] = [local, remote].map(|a| a.parse().unwrap());
    let isk = InetSkEntry {
        id: ino,
        ino,
        family: if local.is_ipv4() { 2 } else { 10 },
        r#type: 1,
        proto: 6,
        state,
        src_port: local.port().into(),
        dst_port: remote.port().into(),
        src_addr: ckpt_socket::words(local.ip()),
        dst_addr: ckpt_socket::words(remote.ip()),
        ..Default::default()
    };
    FileEntry { r#type: FdTypes::Inetsk.into(), id: ino, isk: Some(isk), ..Default::default() }
}

fn with_files(files: Vec<FileEntry>) -> File {
    let hello = Hello { page_size: 4096, arch: 1, ..Hello::default() };
    let mut writer = Writer::open(tempfile::tempfile().unwrap(), hello).unwrap();
    for file in files {
        writer.entry(Image::Files, 0, &file.encode_to_vec()).unwrap();
    }
    writer.end().unwrap()
}

#[test]
fn damaged_streams_are_errors_and_nothing_worse() {
    for input in [external(), tcp()] {
        let good = bytes(&input);
        // Pages are passed on unread, and come behind this.
        let end = good.len().min(6000);
        for at in (0..end).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, &bad).unwrap();
            let rules = "--drop-queues kind=unix --close kind=tcp --port 47113=1 --set-opt kind=tcp:SO_MARK=1 --allow-unmatched";
            let result = rewritten(rules, &file);
            assert!(at >= 300 || result.is_err(), "byte {at}");
        }
    }
}
