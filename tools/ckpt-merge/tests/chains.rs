//! Random chains, folded and thinned out: every page stays what it was to all who can still be restored.

#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use ckpt_images::{
    DirWriter, ImageError, ImageSet,
    pack::{self, Codec},
};
use ckpt_merge::Args;
use ckpt_proto::{
    Image, Message,
    types::{InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry},
};
use proptest::prelude::*;

const PAGE: usize = 4096;
const PAGES: u64 = 48;

/// What is in each page, by number.
type Memory = BTreeMap<u64, u8>;

/// One checkpoint: pages written since the one before, pages dropped, whether it is compressed.
#[derive(Debug, Clone)]
struct Step {
    written: Vec<(u64, u8)>,
    dropped: Vec<u64>,
    packed: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let written = prop::collection::vec((0..PAGES, 0..5_u8), 0..20);
    let dropped = prop::collection::vec(0..PAGES, 0..4);
    (written, dropped, any::<bool>()).prop_map(|(written, dropped, packed)| Step { written, dropped, packed })
}

/// Writes a checkpoint; what memory is like then.
fn write(dir: &Path, name: &str, parent: Option<(&str, &Memory)>, step: &Step) -> Memory {
    let mut out = DirWriter::create(&dir.join(name)).unwrap();
    let id = |name: &str| Some(name.as_bytes().to_vec());
    let inventory = InventoryEntry {
        img_version: 2,
        ckpt_id: id(name),
        ckpt_parent_id: parent.and_then(|(parent, _)| id(parent)),
        ..InventoryEntry::default()
    };
    out.entry(Image::Inventory, 0, &inventory.encode_to_vec()).unwrap();
    let task = PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7] };
    out.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
    out.entry(Image::Pagemap, 7, &PagemapHead { pages_id: 1 }.encode_to_vec()).unwrap();
    let mut memory = parent.map(|(_, memory)| memory.clone()).unwrap_or_default();
    let mut written = Memory::new();
    for &(page, byte) in &step.written {
        memory.insert(page, byte);
        written.insert(page, byte);
    }
    for page in &step.dropped {
        memory.remove(page);
        written.remove(page);
    }
    let mut bytes = Vec::new();
    for (&page, &byte) in &memory {
        let here = written.contains_key(&page);
        let entry = PagemapEntry {
            vaddr: page * PAGE as u64,
            compat_nr_pages: 0,
            in_parent: None,
            flags: Some(if here { 4 } else { 1 }),
            nr_pages: Some(1),
        };
        out.entry(Image::Pagemap, 7, &entry.encode_to_vec()).unwrap();
        if here {
            bytes.extend([byte; PAGE]);
        }
    }
    if step.packed && !bytes.is_empty() {
        for part in bytes.chunks(5 * PAGE) {
            out.data(Image::CkptPages, 1, &pack::pack(Codec::Lz4, part)).unwrap();
        }
    } else {
        out.data(Image::Pages, 1, &bytes).unwrap();
    }
    if let Some((parent, _)) = parent {
        out.link_parent(&dir.join(parent)).unwrap();
    }
    out.finish().unwrap();
    memory
}

/// A chain 0, 1, 2... in a directory, and a branch that goes off at 1.
fn chain(dir: &Path, steps: &[Step]) -> Vec<Memory> {
    let mut all: Vec<Memory> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let before = index.checked_sub(1).map(|n| n.to_string());
        let parent = before.as_deref().zip(all.last());
        let memory = write(dir, &index.to_string(), parent, step);
        all.push(memory);
    }
    all
}

fn read(path: &Path) -> Result<Memory, ImageError> {
    let set = ImageSet::from_chain(path)?;
    set.verify_pages()?;
    let mut memory = Memory::new();
    for run in set.page_runs(Image::Pagemap, 7)? {
        let mut bytes = vec![0; usize::try_from(run.len).unwrap()];
        match (set.pages_in(run.file), set.packed_in(run.file)?) {
            (Some(place), _) => {
                let file = File::from(place.file.try_clone_to_owned().unwrap());
                file.read_exact_at(&mut bytes, run.offset).unwrap();
            }
            (None, Some(mut packed)) => packed.read_exact_at(&mut bytes, run.offset)?,
            (None, None) => panic!("no pages"),
        }
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            assert!(page.iter().all(|b| *b == page[0]));
            memory.insert(run.addr / PAGE as u64 + number as u64, page[0]);
        }
    }
    Ok(memory)
}

fn merge(args: &Args) -> anyhow::Result<()> {
    ckpt_merge::run(args, File::open("/dev/null").unwrap())
}

fn room(path: PathBuf) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn folding_changes_no_page(steps in prop::collection::vec(step(), 2..6), packed in any::<bool>()) {
        let compress = packed.then_some(Codec::Lz4);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let memories = chain(dir, &steps);
        let last = steps.len() - 1;
        let tip = dir.join(last.to_string());
        merge(&Args { dir: tip.clone(), out: Some(dir.join("full")), compress, ..Args::default() }).unwrap();
        prop_assert!(memories[last].is_empty() || dir.join("full/ckpt-pages-1.img").exists() == packed);
        for base in 0..last {
            let (out, onto) = (dir.join(format!("onto-{base}")), Some(dir.join(base.to_string())));
            merge(&Args { dir: tip.clone(), out: Some(out.clone()), onto, compress, ..Args::default() }).unwrap();
            prop_assert_eq!(&read(&out).unwrap(), &memories[last]);
        }
        // In the middle: those behind do not notice, and need nothing before it any more.
        let middle = last / 2;
        merge(&Args { dir: dir.join(middle.to_string()), in_place: true, compress, ..Args::default() }).unwrap();
        for before in 0..middle {
            fs::remove_dir_all(dir.join(before.to_string())).unwrap();
        }
        for (index, memory) in memories.iter().enumerate().skip(middle) {
            prop_assert_eq!(&read(&dir.join(index.to_string())).unwrap(), memory);
        }
        prop_assert_eq!(&read(&dir.join("full")).unwrap(), &memories[last]);
        let hidden = fs::read_dir(dir).unwrap().flatten().filter(|f| f.file_name().as_encoded_bytes()[0] == b'.');
        prop_assert_eq!(hidden.count(), 0);
    }

    #[test]
    fn freeing_leaves_what_is_needed(
        steps in prop::collection::vec(step(), 2..6), branch in step(), at: prop::sample::Index,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let memories = chain(dir, &steps);
        let last = steps.len() - 1;
        let tip = dir.join(last.to_string());
        let from = at.index(steps.len());
        let branched = write(dir, "branch", Some((&from.to_string(), &memories[from])), &branch);
        let args = Args { dir: tip.clone(), dedup: true, ..Args::default() };
        // Twice: the second time there is nothing left to do.
        for _ in 0..2 {
            merge(&args).unwrap();
            prop_assert_eq!(&read(&tip).unwrap(), &memories[last]);
            prop_assert_eq!(&read(&dir.join("branch")).unwrap(), &branched);
        }
        // The older ones are what they were, or say that they are not.
        for (index, memory) in memories.iter().enumerate().take(last) {
            match read(&dir.join(index.to_string())) {
                Ok(read) => prop_assert_eq!(&read, memory),
                Err(error) => {
                    let text = error.to_string();
                    prop_assert!(text.contains("freed") || text.contains("should be there"), "{}", text);
                }
            }
        }
        // A full one can still be made.
        merge(&Args { dir: tip, out: Some(dir.join("full")), ..Args::default() }).unwrap();
        prop_assert_eq!(&read(&dir.join("full")).unwrap(), &memories[last]);
    }
}

fn plain(written: impl Iterator<Item = u64>, byte: u8) -> Step {
    Step { written: written.map(|page| (page, byte)).collect(), dropped: Vec::new(), packed: false }
}

#[test]
fn replaced_pages_take_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let memories = chain(dir, &[plain(0..40, 1), plain(10..30, 2), plain(12..14, 3)]);
    let before = room(dir.join("0/pages-1.img"));
    merge(&Args { dir: dir.join("2"), dedup: true, ..Args::default() }).unwrap();
    let after = room(dir.join("0/pages-1.img"));
    assert_eq!(before - after, 20 * 4096);
    assert_eq!(read(&dir.join("2")).unwrap(), memories[2]);
    let error = read(&dir.join("1")).unwrap_err();
    assert!(matches!(error, ImageError::Freed { .. }), "{error}");
    // The first is only good for what the last needs of it.
    assert!(read(&dir.join("0")).is_err());
}

#[test]
fn what_was_stored_again_as_it_was_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mixed =
        Step { written: (10..30).map(|page| (page, u8::from(page < 25))).collect(), ..plain(0..0, 0) };
    let memories = chain(dir, &[plain(0..40, 1), mixed, plain(12..27, 0)]);
    fs::write(dir.join("2/stats-dump"), "figures").unwrap();
    merge(&Args { dir: dir.join("2"), dedup: true, ..Args::default() }).unwrap();
    let stored = |name: &str| fs::metadata(dir.join(name).join("pages-1.img")).unwrap().len() / 4096;
    // Pages 25 to 29 are different in the second, 12 to 24 in the third.
    assert_eq!([stored("1"), stored("2")], [5, 13]);
    assert_eq!(read(&dir.join("2")).unwrap(), memories[2]);
    assert!(dir.join("2/stats-dump").exists());
}

#[test]
fn what_is_no_image_stays_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let memories = chain(dir, &[plain(0..40, 1), plain(10..30, 2)]);
    fs::write(dir.join("1/stats-dump"), "figures").unwrap();
    merge(&Args { dir: dir.join("1"), in_place: true, ..Args::default() }).unwrap();
    assert!(fs::symlink_metadata(dir.join("1/parent")).is_err());
    assert_eq!(fs::read(dir.join("1/stats-dump")).unwrap(), b"figures");
    assert_eq!(read(&dir.join("1")).unwrap(), memories[1]);
}

#[test]
fn damage_is_not_made_valid_by_freeing_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    chain(dir, &[plain(0..40, 1), plain(10..30, 2)]);
    let pages = File::options().write(true).open(dir.join("0/pages-1.img")).unwrap();
    pages.write_all_at(&[9], 5).unwrap();
    assert!(merge(&Args { dir: dir.join("1"), dedup: true, ..Args::default() }).is_err());
    assert!(merge(&Args { dir: dir.join("1"), out: Some(dir.join("x")), ..Args::default() }).is_err());
    assert!(!dir.join("x").exists());
}

#[test]
fn one_that_leads_here_and_cannot_be_read_stops_the_freeing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let memories = chain(dir, &[plain(0..40, 1), plain(10..30, 2)]);
    write(dir, "odd", Some(("0", &memories[0])), &plain(0..1, 3));
    fs::write(dir.join("odd/pagemap-7.img"), "no pagemap").unwrap();
    let args = Args { dir: dir.join("1"), dedup: true, ..Args::default() };
    assert!(merge(&args).unwrap_err().to_string().contains("odd"));
    assert_eq!(read(&dir.join("0")).unwrap(), memories[0]);
    merge(&Args { force: true, ..args }).unwrap();
    assert_eq!(read(&dir.join("1")).unwrap(), memories[1]);
}

#[test]
fn a_base_has_to_be_an_ancestor() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    chain(dir, &[plain(0..4, 1), plain(1..3, 2)]);
    write(dir, "other", None, &plain(0..4, 1));
    for base in ["other", "1"] {
        let onto = Some(dir.join(base));
        let args = Args { dir: dir.join("1"), out: Some(dir.join("x")), onto, ..Args::default() };
        assert!(merge(&args).is_err(), "{base}");
    }
}
