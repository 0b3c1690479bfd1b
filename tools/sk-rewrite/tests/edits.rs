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
        ExternalSocket, FdTypes, FileEntry, FownEntry, Hello, SkOptsEntry, SkPacketEntry, UnixSkEntry,
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
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/family.criu");
    let output = tempfile::tempfile().unwrap();
    ckpt_read::run(&ckpt_read::Args { dir, common: Default::default() }, output.try_clone().unwrap())
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
    Some(ExternalSocket { policy: PolicyKind::Inherit.into(), peer_name, ..Default::default() })
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
    let mut entry = socket(3, 48213, 48214, inherit(Some(b"/run/b.sock"))).encode_to_vec();
    entry.extend(FUTURE);
    writer.entry(Image::Files, 0, &entry).unwrap();
    writer.entry(Image::Files, 0, &socket(4, 48215, 48216, inherit(None)).encode_to_vec()).unwrap();
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
        ("--inherit 48213", PolicyKind::Inherit, None),
        ("--close 48213", PolicyKind::Close, None),
    ] {
        let external = policy(rewritten(line, &external()).unwrap(), 48213);
        assert_eq!((external.policy(), external.path.as_deref()), (kind, path), "{line}");
        assert_eq!(external.peer_name.as_deref(), Some(&b"/run/b.sock"[..]), "{line}");
    }
    assert_eq!(
        policy(rewritten("--external 48215", &external()).unwrap(), 48215).policy(),
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
    assert!(error.contains("--close 5") && error.contains("48213 (stream"), "{error}");
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
    let output = rewritten("--close 425932 --inherit 425933", &family()).unwrap();
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
