//! Random chains of families, in which pages are stored once for a process and those that it forked: folded and thinned
//! out, every page of every process stays what it was.

#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use ckpt_images::{DirWriter, ImageSet, chain};
use ckpt_merge::Args;
use ckpt_proto::{
    Image, Message,
    stream::Writer,
    types::{Hello, InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry},
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const PAGES: u64 = 12;
const PIDS: u64 = 5;
const IN_PARENT: u32 = 1;
const PRESENT: u32 = 4;
const AS_PARENT_PROCESS: u32 = 1 << 17;

/// What is in each page, and which write put it there.
type Memory = BTreeMap<u64, u32>;
/// Parent and memory of each process. The first has no parent.
type Family = BTreeMap<u64, (u64, Memory)>;

#[derive(Debug, Clone)]
enum Event {
    /// What this process has in this page is new.
    Write(u64, u64),
    Drop(u64, u64),
    /// The one forks the other, if that is free.
    Fork(u64, u64),
    /// It ends; its children are the first one's then.
    End(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let pid = || 0..PIDS;
    prop_oneof![
        4 => (pid(), 0..PAGES).prop_map(|(pid, page)| Event::Write(pid, page)),
        1 => (pid(), 0..PAGES).prop_map(|(pid, page)| Event::Drop(pid, page)),
        3 => (pid(), pid()).prop_map(|(parent, child)| Event::Fork(parent, child)),
        1 => pid().prop_map(Event::End),
    ]
}

/// Events between two checkpoints.
fn chapters() -> impl Strategy<Value = Vec<Vec<Event>>> {
    prop::collection::vec(prop::collection::vec(event(), 0..14), 2..6)
}

fn happen(family: &mut Family, event: &Event, writes: &mut u32, born: &mut Vec<u64>) {
    match *event {
        Event::Write(pid, page) => {
            *writes += 1;
            family.get_mut(&pid).map(|(_, memory)| memory.insert(page, *writes));
        }
        Event::Drop(pid, page) => drop(family.get_mut(&pid).map(|(_, memory)| memory.remove(&page))),
        Event::Fork(parent, child) => {
            if let (Some((_, memory)), false) = (family.get(&parent), family.contains_key(&child)) {
                let memory = memory.clone();
                family.insert(child, (parent, memory));
                born.push(child);
            }
        }
        Event::End(0) => {}
        Event::End(pid) => {
            family.remove(&pid);
            family.values_mut().filter(|(parent, _)| *parent == pid).for_each(|(parent, _)| *parent = 0);
            born.retain(|&child| child != pid);
        }
    }
}

fn pid_of(process: u64) -> u64 {
    process + 7
}

/// Writes a checkpoint; `before` is the one that it is an increment of, and the family then.
fn write(dir: &Path, name: usize, family: &Family, before: Option<&Family>, born: &[u64]) {
    let mut out = DirWriter::create(&dir.join(name.to_string())).unwrap();
    let id = |name: usize| Some(name.to_string().into_bytes());
    let inventory = InventoryEntry {
        img_version: 2,
        ckpt_id: id(name),
        ckpt_parent_id: before.and_then(|_| id(name - 1)),
        ..InventoryEntry::default()
    };
    out.entry(Image::Inventory, 0, &inventory.encode_to_vec()).unwrap();
    for (&process, &(parent, _)) in family {
        let pid = u32::try_from(pid_of(process)).unwrap();
        let ppid = if process == 0 { 0 } else { u32::try_from(pid_of(parent)).unwrap() };
        let task = PstreeEntry { pid, ppid, pgid: 7, sid: 7, threads: vec![pid] };
        out.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
    }
    for (index, (&process, (parent, memory))) in family.iter().enumerate() {
        // Numbers of pages files have nothing to do with those of other checkpoints.
        let pages_id = u32::try_from(index + 1).unwrap();
        let arg = pid_of(process);
        out.entry(Image::Pagemap, arg, &PagemapHead { pages_id }.encode_to_vec()).unwrap();
        let mut entries = Vec::new();
        let mut bytes = Vec::new();
        for (&page, &write) in memory {
            let known = before.and_then(|before| before.get(&process)).filter(|_| !born.contains(&process));
            let in_parent = known.and_then(|(_, memory)| memory.get(&page)) == Some(&write);
            let shared = process != 0 && family[parent].1.get(&page) == Some(&write);
            let flags = match (in_parent, shared) {
                (true, _) => IN_PARENT,
                (false, true) => AS_PARENT_PROCESS,
                (false, false) => PRESENT,
            };
            if flags == PRESENT {
                bytes.extend(write.to_le_bytes().repeat(1024));
            }
            let entry = PagemapEntry {
                vaddr: page * PAGE,
                nr_pages: Some(1),
                flags: Some(flags),
                ..PagemapEntry::default()
            };
            chain::add_entry(&mut entries, entry);
        }
        for entry in entries {
            out.entry(Image::Pagemap, arg, &entry.encode_to_vec()).unwrap();
        }
        out.data(Image::Pages, pages_id.into(), &bytes).unwrap();
    }
    if before.is_some() {
        out.link_parent(&dir.join((name - 1).to_string())).unwrap();
    }
    out.finish().unwrap();
}

fn memory(set: &ImageSet, pid: u64) -> Memory {
    let mut memory = Memory::new();
    for run in set.page_runs(Image::Pagemap, pid).unwrap() {
        let place = set.pages_in(run.file).unwrap();
        let file = File::from(place.file.try_clone_to_owned().unwrap());
        for page in 0..run.len / PAGE {
            let mut word = [0; 4];
            file.read_exact_at(&mut word, place.offset + run.offset + page * PAGE + 1000).unwrap();
            memory.insert(run.addr / PAGE + page, u32::from_le_bytes(word));
        }
    }
    memory
}

fn family_in(set: &ImageSet) -> Family {
    set.verify_pages().unwrap();
    let tasks: Vec<PstreeEntry> = set.all(Image::Pstree, 0).unwrap();
    let parent = |task: &PstreeEntry| u64::from(task.ppid).saturating_sub(7);
    tasks.iter().map(|task| (u64::from(task.pid) - 7, (parent(task), memory(set, task.pid.into())))).collect()
}

fn read(path: &Path) -> Family {
    family_in(&ImageSet::from_chain(path).unwrap())
}

/// The same by way of a stream.
fn streamed(path: &Path) -> Family {
    let set = ImageSet::from_chain(path).unwrap();
    let pipe = tempfile::NamedTempFile::new().unwrap();
    let mut out =
        Writer::open(pipe.reopen().unwrap(), Hello { page_size: 4096, ..Hello::default() }).unwrap();
    ckpt_images::produce::write(&set, &mut out, true, &mut |_| ()).unwrap();
    out.end().unwrap();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("x");
    let args = ckpt_write_args(&path);
    ckpt_write::store(&args, pipe.reopen().unwrap(), |_| Ok(())).unwrap();
    read(&path)
}

fn ckpt_write_args(path: &Path) -> ckpt_write::Args {
    use clap::Parser;
    ckpt_write::Args::try_parse_from(["ckpt-write".into(), path.as_os_str().to_owned()]).unwrap()
}

fn merge(args: &Args) {
    ckpt_merge::run(args, File::open("/dev/null").unwrap()).unwrap();
}

/// Bytes of pages.
fn stored(path: &Path) -> u64 {
    let pages = |name: &str| name.starts_with("pages-");
    let files = fs::read_dir(path).unwrap().flatten();
    files.filter(|f| f.file_name().to_str().is_some_and(pages)).map(|f| f.metadata().unwrap().len()).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn every_page_of_a_family_stays_what_it_was(chapters in chapters()) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = dir.path();
        let mut states: Vec<Family> = Vec::new();
        let mut family = Family::from([(0, (0, (0..PAGES).map(|page| (page, 0)).collect()))]);
        let mut writes = 0;
        for (name, events) in chapters.iter().enumerate() {
            let mut born = Vec::new();
            events.iter().for_each(|event| happen(&mut family, event, &mut writes, &mut born));
            write(dir, name, &family, states.last(), &born);
            states.push(family.clone());
        }
        let last = states.len() - 1;
        let path = |name: usize| dir.join(name.to_string());
        let all_are_whole = |from: usize| -> Result<(), TestCaseError> {
            for (name, state) in states.iter().enumerate().skip(from) {
                prop_assert_eq!(&read(&path(name)), state);
            }
            Ok(())
        };
        all_are_whole(0)?;
        prop_assert_eq!(&streamed(&path(last)), &states[last]);
        let full = dir.join("full");
        merge(&Args { dir: path(last), out: Some(full.clone()), ..Args::default() });
        prop_assert_eq!(&read(&full), &states[last]);
        // What differs between a process and its parent, and nothing else, is stored for each; but what an orphan stored
        // beside the parent that it had is not compared with the one that takes it in.
        let (mut own, mut perhaps) = (0, 0);
        for (child, (parent, memory)) in &states[last] {
            let theirs = states[last].get(parent).filter(|(_, theirs)| !std::ptr::eq(theirs, memory));
            let same = |&(page, write): &(&u64, &u32)| theirs.and_then(|(_, m)| m.get(page)) == Some(write);
            let equal = memory.iter().filter(same).count() as u64;
            let orphan = states.iter().filter_map(|state| state.get(child)).any(|(before, _)| before != parent);
            own += memory.len() as u64 - equal;
            perhaps += if orphan { equal } else { 0 };
        }
        let pages = stored(&full) / PAGE;
        prop_assert!((own..=own + perhaps).contains(&pages), "{pages} pages, {own} and {perhaps} at most");
        for base in 0..last {
            let out = dir.join(format!("onto-{base}"));
            let onto = Some(path(base));
            merge(&Args { dir: path(last), out: Some(out.clone()), onto, ..Args::default() });
            prop_assert_eq!(&read(&out), &states[last]);
        }
        let middle = last / 2;
        merge(&Args { dir: path(middle), in_place: true, ..Args::default() });
        for before in 0..middle {
            fs::remove_dir_all(path(before)).unwrap();
        }
        (0..last).for_each(|base| fs::remove_dir_all(dir.join(format!("onto-{base}"))).unwrap());
        all_are_whole(middle)?;
        merge(&Args { dir: path(last), dedup: true, ..Args::default() });
        all_are_whole(last)?;
        prop_assert_eq!(&read(&full), &states[last]);
    }
}
