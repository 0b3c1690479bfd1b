//! ckpt-write is the inverse of ckpt-read, refuses what is no checkpoint, and leaves nothing behind when
//! it fails.
#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use ckpt_hold::{Holder, Outcome};
use ckpt_proto::{
    Image, Message,
    stream::Writer,
    types::{
        FdTypes, FileEntry, FownEntry, Hello, InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry,
        SocketStub,
    },
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect()
}

fn write_args(dir: &Path) -> ckpt_write::Args {
    ckpt_write::Args {
        dir: dir.to_owned(),
        compress: None,
        parent: None,
        stats: Default::default(),
        common: Default::default(),
    }
}

fn read_args(dir: &Path) -> ckpt_read::Args {
    ckpt_read::Args { dir: dir.to_owned(), decompress: false, no_verify: false, common: Default::default() }
}

fn copy_through_a_pipe(from: &Path, to: &Path) {
    let (input, output) = nix::unistd::pipe().unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| ckpt_read::run(&read_args(from), File::from(output)));
        ckpt_write::run(&write_args(to), File::from(input)).unwrap();
        reader.join().unwrap().unwrap();
    });
}

#[test]
fn golden_directories_survive_byte_for_byte() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["counter.criu", "family.criu", "tcp.criu"] {
        let (first, second) = (tmp.path().join(name), tmp.path().join(format!("{name}.again")));
        copy_through_a_pipe(&golden(name), &first);
        let mut copied = files(&first);
        assert!(copied.remove("ckpt-manifest.img").is_some());
        let original = files(&golden(name));
        assert_eq!(original.keys().collect::<Vec<_>>(), copied.keys().collect::<Vec<_>>());
        for (file, bytes) in &original {
            assert!(*bytes == copied[file], "{name}/{file} differs");
        }
        // Our own directories too, manifest included.
        copy_through_a_pipe(&first, &second);
        assert!(files(&first) == files(&second));
    }
}

#[test]
fn through_a_file_it_is_the_same() {
    let tmp = tempfile::tempdir().unwrap();
    let (stream, dir) = (tmp.path().join("stream"), tmp.path().join("dir"));
    ckpt_read::run(&read_args(&golden("family.criu")), File::create(&stream).unwrap()).unwrap();
    ckpt_write::run(&write_args(&dir), File::open(&stream).unwrap()).unwrap();
    let mut copied = files(&dir);
    copied.remove("ckpt-manifest.img");
    assert!(copied == files(&golden("family.criu")));
}

fn hello() -> Hello {
    Hello { page_size: 4096, arch: 1, ..Hello::default() }
}

fn stream(hello: Hello, fill: impl FnOnce(&mut Writer<File>) -> std::io::Result<()>) -> File {
    let mut writer = Writer::open(tempfile::tempfile().unwrap(), hello).unwrap();
    let inventory = InventoryEntry { img_version: 2, ..Default::default() };
    writer.entry(Image::Inventory, 0, &inventory.encode_to_vec()).unwrap();
    let task = PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7] };
    writer.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
    fill(&mut writer).unwrap();
    let mut file = writer.end().unwrap();
    file.rewind().unwrap();
    file
}

/// Runs ckpt-write, which must fail and leave nothing; gives the exit status.
fn fails(input: File) -> (u8, String) {
    let tmp = tempfile::tempdir().unwrap();
    let error = ckpt_write::run(&write_args(&tmp.path().join("dir")), input).unwrap_err();
    assert!(files(tmp.path()).is_empty(), "left behind: {:?}", files(tmp.path()).keys());
    (ckpt_cli::code_of(&error) as u8, ckpt_cli::describe(&error))
}

#[test]
fn an_incomplete_stream_is_refused_naming_the_stage_that_is_missing() {
    let (code, text) = fails(stream(Hello { lacks: vec!["mem".into()], ..hello() }, |_| Ok(())));
    assert!(code == 3 && text.contains("ckpt-mem"), "{code} {text}");
    let stub = SocketStub {
        pid: 7,
        fd: 9,
        ino: 48213,
        domain: 1,
        r#type: 1,
        protocol: 0,
        flags: 2,
        fown: FownEntry::default(),
        in_flight: Vec::new(),
    };
    let file =
        FileEntry { r#type: FdTypes::Unixsk.into(), id: 1, ckpt_stub: Some(stub), ..Default::default() };
    let (code, text) = fails(stream(hello(), |w| w.entry(Image::Files, 0, &file.encode_to_vec())));
    assert!(code == 3 && text.contains("socket:[48213]") && text.contains("ckpt-sk"), "{code} {text}");
}

#[test]
fn missing_pages_are_noticed() {
    let (code, text) = fails(stream(hello(), |w| {
        w.entry(Image::Pagemap, 7, &PagemapHead { pages_id: 1 }.encode_to_vec())?;
        let run = PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 2,
            nr_pages: Some(2),
            flags: Some(4),
            in_parent: None,
        };
        w.entry(Image::Pagemap, 7, &run.encode_to_vec())?;
        w.bulk()?;
        w.data(Image::Pages, 1, &[0; 4096])
    }));
    assert!(code == 4 && text.contains("pages-1.img"), "{code} {text}");
}

#[test]
fn a_stream_cut_off_anywhere_leaves_nothing() {
    let mut whole = Vec::new();
    let task = PstreeEntry { pid: 8, ppid: 7, pgid: 7, sid: 7, threads: vec![8] };
    stream(hello(), |w| {
        w.entry(Image::Pstree, 0, &task.encode_to_vec())?;
        w.bulk()?;
        w.data(Image::Pages, 1, b"pages")
    })
    .read_to_end(&mut whole)
    .unwrap();
    for len in 0..whole.len() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&whole[..len]).unwrap();
        file.rewind().unwrap();
        let (code, text) = fails(file);
        assert_eq!(code, 4, "cut at {len}: {text}");
    }
}

#[test]
fn a_directory_that_exists_is_not_touched() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("mine"), "x").unwrap();
    ckpt_write::run(&write_args(&dir), stream(hello(), |_| Ok(()))).unwrap_err();
    assert_eq!(files(&dir).keys().collect::<Vec<_>>(), ["mine"]);
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
}

#[test]
fn the_holder_hears_commit_only_after_the_directory_is_there() {
    let tmp = tempfile::tempdir().unwrap();
    let holder = Holder::bind().unwrap();
    let control = Some(holder.address().to_vec());
    let dir = tmp.path().join("dir");
    ckpt_write::run(&write_args(&dir), stream(Hello { control, ..hello() }, |_| Ok(()))).unwrap();
    assert!(dir.join("inventory.img").exists());
    assert_eq!(holder.wait(&[], true, Duration::from_secs(5)), Outcome::Committed);
}

#[test]
fn the_holder_hears_why_it_failed() {
    let holder = Holder::bind().unwrap();
    let control = Some(holder.address().to_vec());
    fails(stream(Hello { control, lacks: vec!["sk".into()], ..hello() }, |_| Ok(())));
    let outcome = holder.wait(&[], true, Duration::from_secs(5));
    let Outcome::Failed { stage, reason } = outcome else { panic!("{outcome:?}") };
    assert!(stage == "write" && reason.contains("inside its sockets"), "{reason}");
}

#[test]
fn a_stream_that_outlived_its_holder_is_written_all_the_same() {
    let tmp = tempfile::tempdir().unwrap();
    let control = Some(Holder::bind().unwrap().address().to_vec());
    ckpt_write::run(&write_args(&tmp.path().join("dir")), stream(Hello { control, ..hello() }, |_| Ok(())))
        .unwrap();
}
