//! The codecs against golden directories made by CRIU 4.2, and against hostile bytes.
#![allow(missing_docs)]

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use ckpt_proto::{
    Image, Message, Payload, file,
    stream::{self, Frame},
    types::{self, Hello},
};
use proptest::prelude::*;

/// Every file of the golden directories: kind, number, contents.
fn golden() -> Vec<(PathBuf, Image, u64, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut files = Vec::new();
    for dir in ["counter.criu", "family.criu", "tcp.criu"] {
        for entry in fs::read_dir(root.join(dir)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let (image, arg) =
                Image::parse_file_name(name).unwrap_or_else(|| panic!("{name} is in no catalogue"));
            let bytes = fs::read(&path).unwrap();
            files.push((path, image, arg, bytes));
        }
    }
    assert!(files.len() > 40);
    files
}

/// A message through the generated type that the catalogue names.
fn reencode(name: &str, bytes: &[u8]) -> Vec<u8> {
    macro_rules! by_name {
        ($($name:literal $type:ident,)*) => {
            match name {
                $($name => types::$type::decode(bytes).unwrap().encode_to_vec(),)*
                _ => panic!("add {name} to this list"),
            }
        };
    }
    by_name! {
        "core_entry" CoreEntry, "fdinfo_entry" FdinfoEntry, "file_entry" FileEntry, "fs_entry" FsEntry,
        "ghost_file_entry" GhostFileEntry, "task_kobj_ids_entry" TaskKobjIdsEntry,
        "inventory_entry" InventoryEntry, "memfd_inode_entry" MemfdInodeEntry, "mm_entry" MmEntry,
        "pagemap_entry" PagemapEntry, "pagemap_head" PagemapHead, "pipe_data_entry" PipeDataEntry,
        "pstree_entry" PstreeEntry, "remap_file_path_entry" RemapFilePathEntry,
        "seccomp_entry" SeccompEntry, "sk_packet_entry" SkPacketEntry,
        "tcp_stream_entry" TcpStreamEntry, "timens_entry" TimensEntry,
    }
}

#[test]
fn golden_images_decode_and_reencode_byte_for_byte() {
    for (path, image, _, bytes) in golden() {
        if image.payload() == Payload::Raw {
            continue;
        }
        let mut reader = file::Reader::new(&bytes[..], image, bytes.len() as u64).unwrap();
        let mut again = Vec::new();
        file::write_header(&mut again, image).unwrap();
        let mut index = 0;
        while let Some(entry) = reader.next_entry().unwrap() {
            let name = image.entry_message(index).unwrap();
            file::write_entry(&mut again, &reencode(name, &entry.message)).unwrap();
            again.extend(reader.payload(&entry).unwrap());
            index += 1;
        }
        assert!(again == bytes, "{} differs", path.display());
    }
}

#[test]
fn a_golden_image_cut_off_anywhere_is_an_error_or_shorter() {
    for (path, image, _, bytes) in
        golden().into_iter().filter(|(_, image, ..)| image.payload() != Payload::Raw)
    {
        let whole = read_all(image, &bytes).unwrap();
        for len in 0..bytes.len() {
            // A list may end after any entry, and the contents of a ghost file anywhere.
            if let Ok(entries) = read_all(image, &bytes[..len]) {
                let rest = image.payload() == Payload::Rest;
                assert!(!image.single() || rest, "{} cut at {len}", path.display());
                assert!(entries < whole || rest, "{} cut at {len}", path.display());
            }
        }
    }
}

fn read_all(image: Image, bytes: &[u8]) -> Result<usize, file::FileError> {
    let mut reader = file::Reader::new(bytes, image, bytes.len() as u64)?;
    let mut entries = 0;
    while let Some(entry) = reader.next_entry()? {
        reader.skip_payload(&entry)?;
        entries += 1;
    }
    Ok(entries)
}

fn read_stream(bytes: &[u8]) -> Result<Vec<(String, u64, Vec<u8>)>, stream::StreamError> {
    let (mut reader, _) = stream::Reader::open(bytes)?;
    let mut seen = Vec::new();
    while let Some(frame) = reader.next_frame()? {
        if let Frame::Entry { image, arg, .. } | Frame::Data { image, arg, .. } = frame {
            // More than the input has can't come, whatever a header says.
            seen.push((image, arg, reader.payload(1 << 40)?));
        }
    }
    Ok(seen)
}

fn hello() -> Hello {
    Hello { page_size: 4096, arch: 1, ..Hello::default() }
}

fn some_stream() -> Vec<u8> {
    let mut writer = stream::Writer::open(Vec::new(), hello()).unwrap();
    let task = types::PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7] };
    writer.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
    writer.data(Image::PipesData, 0, b"in flight").unwrap();
    writer.bulk().unwrap();
    writer.data(Image::Pages, 1, &[5; 300]).unwrap();
    writer.end().unwrap()
}

#[test]
fn a_stream_cut_off_anywhere_is_an_error() {
    let whole = some_stream();
    assert_eq!(read_stream(&whole).unwrap().len(), 3);
    for len in 0..whole.len() {
        read_stream(&whole[..len]).unwrap_err();
    }
}

#[test]
fn a_flipped_bit_outside_pages_is_noticed() {
    let whole = some_stream();
    let pages = whole.windows(300).position(|window| window == [5; 300]).unwrap();
    for byte in (0..whole.len()).filter(|byte| !(pages..pages + 300).contains(byte)) {
        for bit in 0..8 {
            let mut flipped = whole.clone();
            flipped[byte] ^= 1 << bit;
            assert!(read_stream(&flipped).is_err(), "byte {byte} bit {bit}");
        }
    }
}

#[test]
fn an_abort_is_an_error_with_its_reason() {
    let writer = stream::Writer::open(Vec::new(), hello()).unwrap();
    struct Shared<'a>(&'a mut Vec<u8>);
    impl io::Write for Shared<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    drop(writer);
    let mut bytes = Vec::new();
    stream::Writer::open(Shared(&mut bytes), hello()).unwrap().abort("disk on fire").unwrap();
    let error = read_stream(&bytes).unwrap_err().to_string();
    assert!(error.contains("disk on fire"), "{error}");
}

/// An input that is asked for at most what it has: nobody may allocate by a length that was only claimed.
struct Small<'a>(&'a [u8]);

impl Read for Small<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        assert!(buffer.len() <= (1 << 16) + self.0.len(), "a buffer of {} bytes", buffer.len());
        self.0.read(buffer)
    }
}

#[test]
fn a_claimed_length_allocates_nothing() {
    let mut bytes = Vec::new();
    file::write_header(&mut bytes, Image::Core).unwrap();
    bytes.extend(ckpt_proto::MAX_MESSAGE.to_le_bytes());
    bytes.extend([0; 10]);
    let mut reader = file::Reader::new(Small(&bytes), Image::Core, bytes.len() as u64).unwrap();
    assert!(matches!(reader.next_entry(), Err(file::FileError::Truncated { .. })));
}

fn images() -> impl Strategy<Value = Image> {
    let readable: Vec<Image> = ckpt_proto::catalogue::IMAGES
        .iter()
        .copied()
        .filter(|image| image.payload() != Payload::Raw)
        .collect();
    proptest::sample::select(readable)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn random_entries_never_panic(image in images(), bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_all(image, &bytes);
        let mut whole = Vec::new();
        file::write_header(&mut whole, image).unwrap();
        whole.extend(&bytes);
        let _ = read_all(image, &whole);
        let mut entry = Vec::new();
        file::write_header(&mut entry, image).unwrap();
        file::write_entry(&mut entry, &bytes).unwrap();
        let _ = read_all(image, &entry);
    }

    #[test]
    fn damaged_golden_images_never_panic(pick: proptest::sample::Index, at: proptest::sample::Index, bits in 1u8..) {
        let files = golden();
        let (_, image, _, bytes) = pick.get(&files);
        if image.payload() != Payload::Raw {
            let mut bytes = bytes.clone();
            let at = at.index(bytes.len());
            bytes[at] ^= bits;
            let _ = read_all(*image, &bytes);
        }
    }

    #[test]
    fn random_streams_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_stream(&bytes);
        let mut whole = stream::MAGIC.to_vec();
        whole.extend(&bytes);
        let _ = read_stream(&whole);
        let mut framed = stream::Writer::open(Vec::new(), hello()).unwrap().end().unwrap();
        framed.extend(&bytes);
        let _ = read_stream(&framed);
    }

    #[test]
    fn streams_come_back(parts in proptest::collection::vec(
        (any::<bool>(), images(), any::<u64>(), proptest::collection::vec(any::<u8>(), 1..100)), 0..20,
    )) {
        let mut writer = stream::Writer::open(Vec::new(), hello()).unwrap();
        let mut expected = Vec::new();
        for (entry, image, arg, bytes) in parts {
            if entry {
                writer.entry(image, arg, &bytes).unwrap();
            } else {
                writer.data(image, arg, &bytes).unwrap();
            }
            expected.push((image.name().to_owned(), arg, bytes));
        }
        let bytes = writer.end().unwrap();
        prop_assert_eq!(read_stream(&bytes).unwrap(), expected.clone());
        // And through a stage that passes everything on.
        let (mut reader, hello) = stream::Reader::open(&bytes[..]).unwrap();
        let mut writer = stream::Writer::open(Vec::new(), hello).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            stream::forward(&mut reader, &frame, &mut writer).unwrap();
        }
        prop_assert_eq!(writer.end().unwrap(), bytes);
    }
}

#[test]
fn pages_in_another_directory_are_an_error_for_who_has_none() {
    let mut writer = stream::Writer::open(Vec::new(), hello()).unwrap();
    writer.bulk().unwrap();
    let facts = stream::Facts { sum: Some(5), zeros: vec![1, 1] };
    writer.placed(3, 4096, 8192, facts.clone()).unwrap();
    assert_eq!((writer.counts().page_bytes, writer.counts().zero_pages), (8192, 1));
    let bytes = writer.end().unwrap();
    assert!(matches!(read_stream(&bytes), Err(stream::StreamError::Malformed { .. })));
    let (mut reader, _) = stream::Reader::open(&bytes[..]).unwrap();
    reader.takes_placed();
    assert_eq!(reader.next_frame().unwrap(), Some(Frame::Bulk));
    assert_eq!(reader.next_frame().unwrap(), Some(Frame::Placed { arg: 3, at: 4096, len: 8192, facts }));
    assert_eq!(reader.next_frame().unwrap(), None);
}
