//! ckpt-encode turns what ckpt-show prints into the bytes that it was made of.
#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
};

const GOLDEN: [&str; 3] = ["counter.criu", "family.criu", "tcp.criu"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    fs::read_dir(dir).unwrap().map(entry).collect()
}

fn temporary(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn contents(mut file: &File) -> Vec<u8> {
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn show(args: ckpt_show::Args, input: File) -> Vec<u8> {
    let output = tempfile::tempfile().unwrap();
    ckpt_show::run(&args, input, output.try_clone().unwrap()).unwrap();
    contents(&output)
}

fn show_path(path: &Path, payload_limit: u64) -> Vec<u8> {
    let args =
        ckpt_show::Args { path: Some(path.to_owned()), json: true, payload_limit, ..Default::default() };
    show(args, temporary(b""))
}

fn encode(args: &ckpt_encode::Args, json: &[u8]) -> anyhow::Result<Vec<u8>> {
    let output = tempfile::tempfile().unwrap();
    ckpt_encode::run(args, temporary(json), output.try_clone().unwrap())?;
    Ok(contents(&output))
}

#[test]
fn each_golden_image_by_itself() {
    for name in GOLDEN {
        for (file, bytes) in files(&golden(name)).into_iter().filter(|(file, _)| !file.starts_with("pages-"))
        {
            let json = show_path(&golden(name).join(&file), 1 << 20);
            let encoded = encode(&ckpt_encode::Args { image: true, ..Default::default() }, &json).unwrap();
            assert!(encoded == bytes, "{name}/{file}");
        }
    }
}

#[test]
fn golden_directories_whatever_the_limit() {
    let tmp = tempfile::tempdir().unwrap();
    for (name, limit) in GOLDEN.into_iter().flat_map(|name| [(name, 1 << 20), (name, 4)]) {
        let dir = tmp.path().join(format!("{name}.{limit}"));
        let args = ckpt_encode::Args {
            dir: Some(dir.clone()),
            pages_from: Some(golden(name)),
            ..Default::default()
        };
        encode(&args, &show_path(&golden(name), limit)).unwrap();
        let mut copied = files(&dir);
        copied.remove("ckpt-manifest.img").unwrap();
        assert!(copied == files(&golden(name)), "{name}");
    }
}

#[test]
fn a_stream_becomes_the_same_stream() {
    let stream = tempfile::tempfile().unwrap();
    let args = ckpt_read::Args {
        dir: golden("family.criu"),
        decompress: false,
        no_verify: false,
        common: Default::default(),
    };
    ckpt_read::run(&args, stream.try_clone().unwrap()).unwrap();
    let original = contents(&stream);
    let json =
        show(ckpt_show::Args { json: true, payload_limit: 99, ..Default::default() }, temporary(&original));
    let args = ckpt_encode::Args { pages_from: Some(golden("family.criu")), ..Default::default() };
    assert!(encode(&args, &json).unwrap() == original);
}

#[test]
fn pages_that_are_not_there_are_an_error() {
    let json = show_path(&golden("counter.criu"), 99);
    let error = encode(&ckpt_encode::Args::default(), &json).unwrap_err();
    assert!(error.to_string().contains("--pages-from"), "{error}");
    let args = ckpt_encode::Args { pages_from: Some(golden("tcp.criu")), ..Default::default() };
    encode(&args, &json).unwrap_err();
}

#[test]
fn nonsense_is_an_error_that_says_where() {
    for (json, part) in [
        ("", "not JSON"),
        ("{}", "ckpt-show"),
        (r#"{"ckpt_show": 2, "images": []}"#, "format 2"),
        (r#"{"ckpt_show": 1, "images": [{"image": "NOPE"}]}"#, "NOPE"),
        (r#"{"ckpt_show": 1, "images": [{"image": "PSTREE"}]}"#, "pstree.img"),
        (r#"{"ckpt_show": 1, "images": [{"image": "PSTREE", "entries": [{"pid": 1}]}]}"#, "ppid"),
        (r#"{"ckpt_show": 1, "images": [{"image": "PSTREE", "entries": [{"pid": "x"}]}]}"#, "entry 0.pid"),
        (
            r#"{"ckpt_show": 1, "images": [{"image": "IFADDR", "arg": 1, "payload": {"hex": "0"}}]}"#,
            "ifaddr-1.img",
        ),
    ] {
        let error = encode(&ckpt_encode::Args::default(), json.as_bytes()).unwrap_err();
        assert!(ckpt_cli::describe(&error).contains(part), "{json}: {}", ckpt_cli::describe(&error));
    }
}

#[test]
fn drawings_of_golden_directories() {
    for name in GOLDEN {
        for (args, start) in [
            (ckpt_show::Args { tree: true, ..Default::default() }, "31"),
            (ckpt_show::Args { dot: true, ..Default::default() }, "digraph checkpoint {"),
            (ckpt_show::Args { svg: true, ..Default::default() }, "<svg "),
        ] {
            let args = ckpt_show::Args { path: Some(golden(name)), ..args };
            let text = String::from_utf8(show(args, temporary(b""))).unwrap();
            assert!(text.starts_with(start), "{name}: {text}");
            assert_eq!(text.contains("425932"), name == "family.criu", "{name}: {text}");
        }
    }
}
