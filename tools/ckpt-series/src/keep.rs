//! The directories of a series, and which of them are kept.
//!
//! An increment needs the directories before it, so the old end of a series can only be cut off in front of
//! a full checkpoint. Where there is none at the right place, one is made: the increment there is folded
//! into a full checkpoint of the same name and id.
//!
//! ```text
//! 1 <- 2 <- 3 <- 4 <- 5 <- 6                 keep 3
//! 1 <- 2 <- 3 <- 4 <- 5 <- 6   and .000004.ckpt-partial-*, full, durable
//!                4 <- 5 <- 6                 after they have changed places (RENAME_EXCHANGE): 4 is full
//! ```
//!
//! At each instant every directory is restorable: before and after the exchange, the name 000004 has the
//! same contents, and the others are removed, newest first, only when that is durable. What a killed
//! process leaves has names that begin with a dot, and is removed by the next. So does a power cut, after which
//! only what was synced need be there: what was printed was, and nothing else has a number.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::Context;
use ckpt_images::{DirWriter, ImageSet, recode::Codec};
use nix::fcntl::{Flock, FlockArg};

/// Beginning of the names of directories that are being removed.
const GONE: &str = ".gone-";
/// Beginning of the names of pre-dumps, each with the number of the checkpoint that is an increment of it.
const BEFORE: &str = "before-";

/// Of a checkpoint's directory.
fn name(number: u64) -> String {
    format!("{number:06}")
}

/// Of the directory of its pre-dump.
fn before_name(number: u64) -> String {
    format!("{BEFORE}{number:06}")
}

/// The part of a name that is to be a number.
fn number_of(name: &str) -> &str {
    name.strip_prefix(BEFORE).unwrap_or(name)
}

fn is_number(name: &str) -> bool {
    name.len() >= 6 && name.bytes().all(|b| b.is_ascii_digit())
}

/// Numbered directories.
#[derive(Debug)]
pub struct Series {
    dir: PathBuf,
    numbers: BTreeSet<u64>,
    next: u64,
    /// The directory, locked against a second series.
    _lock: Flock<File>,
}

impl Series {
    /// Opens or makes the directory of a series.
    ///
    /// # Errors
    /// It can't be read or made.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        crate::make_dir(dir)?;
        let what = || dir.display().to_string();
        let lock = Flock::lock(File::open(dir).with_context(what)?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("{}: lock (is there another ckpt-series at work?)", dir.display()))?;
        let mut numbers = BTreeSet::new();
        let mut before = BTreeSet::new();
        for entry in fs::read_dir(dir).with_context(what)? {
            let entry = entry.with_context(what)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let hidden = name.strip_prefix('.').and_then(|name| name.split_once('.'));
            if name.starts_with(GONE) {
                fs::remove_dir_all(entry.path()).with_context(what)?;
            } else if let Some((number, _)) = hidden.filter(|(name, _)| is_number(number_of(name))) {
                DirWriter::remove_abandoned(&dir.join(number));
            } else if name.starts_with(BEFORE) {
                before.extend(number_of(name).parse::<u64>().ok());
            } else if is_number(name) {
                numbers.extend(name.parse::<u64>().ok());
            }
        }
        let next = numbers.last().map_or(1, |last| last + 1);
        let series = Self { dir: dir.to_owned(), numbers, next, _lock: lock };
        // Of checkpoints that came to nothing, or are gone.
        before.difference(&series.numbers).try_for_each(|&number| series.remove(&before_name(number)))?;
        Ok(series)
    }

    /// The directory of a pre-dump for the checkpoint that is to be made next.
    #[must_use]
    pub fn before(&self) -> PathBuf {
        self.dir.join(before_name(self.next))
    }

    /// Removes a directory, if it is there. While that is being done it is no checkpoint any more: it loses its name
    /// first.
    fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let gone = self.dir.join(format!("{GONE}{name}"));
        match fs::rename(&path, &gone) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("{}: rename", path.display())),
            Ok(()) => fs::remove_dir_all(&gone).with_context(|| format!("{}: remove", gone.display())),
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(name(number))
    }

    /// The directory that is to be made next.
    #[must_use]
    pub fn next(&self) -> PathBuf {
        self.path(self.next)
    }

    /// It has been made: its number.
    ///
    /// # Errors
    /// There are no more numbers.
    pub fn made(&mut self) -> anyhow::Result<u64> {
        let number = self.next;
        self.numbers.insert(number);
        self.next = number.checked_add(1).context("no more numbers")?;
        Ok(number)
    }

    /// Removes what is older than the last `keep` checkpoints, when half as many more have gathered. The pages of one that
    /// becomes a full one are compressed as those of the series are.
    ///
    /// # Errors
    /// Then all are as they were, or some of the old ones are gone.
    pub fn prune(&mut self, keep: u64, compress: Option<Codec>) -> anyhow::Result<()> {
        let keep = usize::try_from(keep).unwrap_or(usize::MAX);
        let slack = (keep / 2).max(1);
        if self.numbers.len() <= keep.saturating_add(slack) {
            return Ok(());
        }
        let Some(&first) = self.numbers.iter().rev().nth(keep - 1) else { return Ok(()) };
        self.fold(first, compress)?;
        let old: Vec<u64> = self.numbers.range(..first).copied().collect();
        self.remove(&before_name(first))?;
        for number in old.into_iter().rev() {
            self.remove(&name(number))?;
            self.numbers.remove(&number);
            self.remove(&before_name(number))?;
        }
        Ok(())
    }

    /// Makes a checkpoint full, if it is an increment.
    fn fold(&self, number: u64, compress: Option<Codec>) -> anyhow::Result<()> {
        let path = self.path(number);
        let what = || format!("{}: fold", path.display());
        let set = ImageSet::from_chain(&path).with_context(what)?;
        if !set.has_parent() {
            return Ok(());
        }
        let mut full = DirWriter::create_over(&path).with_context(what)?;
        let verification = set.verification().with_context(what)?;
        ckpt_merge::fold::fold(&set, None, compress, &mut full, &mut |_| ()).with_context(what)?;
        ckpt_merge::fold::keep_others(&path, &mut full).with_context(what)?;
        verification.finish().with_context(what)?;
        full.finish().with_context(what)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use ckpt_proto::{Image, Message};

    use super::*;

    #[test]
    fn numbers_go_on_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "000007",
            "000012",
            "1000000",
            ".gone-000003",
            ".000007.ckpt-partial-0123456789abcdef",
            ".1000001.ckpt-partial-0123456789abcdef",
            ".before-1000001.ckpt-partial-0123456789abcdef",
            "before-000012",
            "before-000011",
            "before-1000001",
            "notes",
            "12",
        ] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut series = Series::open(dir.path()).unwrap();
        assert_eq!(series.next(), dir.path().join("1000001"));
        assert_eq!(series.made().unwrap(), 1_000_001);
        assert!(Series::open(dir.path()).is_err(), "two series in one directory");
        let left: BTreeSet<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(
            left.into_iter().collect::<Vec<_>>(),
            ["000007", "000012", "1000000", "12", "before-000012", "notes"]
        );
    }

    /// A checkpoint of `pages` pages, of which `own` are its own and the others in its parent.
    fn write(dir: &Path, name: &str, parent: Option<&str>, own: &[u64], pages: u64) {
        use ckpt_proto::types::{InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry};
        let mut out = DirWriter::create(&dir.join(name)).unwrap();
        let id = |name: &str| Some(name.as_bytes().to_vec());
        let inventory = InventoryEntry {
            img_version: 2,
            ckpt_id: id(name),
            ckpt_parent_id: parent.and_then(id),
            ..InventoryEntry::default()
        };
        let task = PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7] };
        out.entry(Image::Inventory, 0, &inventory.encode_to_vec()).unwrap();
        out.entry(Image::Pstree, 0, &task.encode_to_vec()).unwrap();
        out.entry(Image::Pagemap, 7, &PagemapHead { pages_id: 1 }.encode_to_vec()).unwrap();
        for page in 0..pages {
            let flags = Some(if own.contains(&page) { 4 } else { 1 });
            let entry = PagemapEntry { vaddr: page * 4096, nr_pages: Some(1), flags, ..Default::default() };
            out.entry(Image::Pagemap, 7, &entry.encode_to_vec()).unwrap();
        }
        for page in own {
            out.data(Image::Pages, 1, &[name.as_bytes()[5] ^ u8::try_from(*page).unwrap(); 4096]).unwrap();
        }
        if let Some(parent) = parent {
            out.link_parent(&dir.join(parent)).unwrap();
        }
        out.finish().unwrap();
    }

    /// What the pages of a checkpoint are, if it is whole.
    fn read(path: &Path) -> Option<Vec<u8>> {
        let set = ImageSet::from_chain(path).ok()?;
        set.verify_pages().ok()?;
        let mut bytes = Vec::new();
        for run in set.page_runs(Image::Pagemap, 7).ok()? {
            let place = set.pages_in(run.file)?;
            let file = File::from(place.file.try_clone_to_owned().ok()?);
            let mut pages = vec![0; usize::try_from(run.len).ok()?];
            file.read_exact_at(&mut pages, place.offset + run.offset).ok()?;
            bytes.extend(pages);
        }
        Some(bytes)
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap().flatten() {
            let place = to.join(entry.file_name());
            match fs::read_link(entry.path()) {
                Ok(link) => std::os::unix::fs::symlink(link, place).unwrap(),
                Err(_) if entry.path().is_dir() => copy(&entry.path(), &place),
                Err(_) => drop(fs::copy(entry.path(), place).unwrap()),
            }
        }
    }

    /// A power cut loses what was not synced: of a directory in the making any file may be empty, cut or missing, and
    /// one that was being removed may be back in part. What has its number is whole all the same.
    #[test]
    fn a_power_cut_costs_nothing_that_has_a_number() {
        let home = tempfile::tempdir().unwrap();
        let before = home.path().join("before");
        fs::create_dir(&before).unwrap();
        write(&before, "000001", None, &[0, 1, 2], 3);
        for n in 2..=6 {
            write(&before, &format!("00000{n}"), Some(&format!("00000{}", n - 1)), &[n % 3], 3);
        }
        let states: Vec<Vec<u8>> =
            (1..=6).map(|n| read(&before.join(format!("00000{n}"))).unwrap()).collect();
        // Number 7 in the making, and number 4 about to be replaced by a full one, in every state of decay.
        for decay in 0..4 {
            let dir = home.path().join(format!("after-{decay}"));
            copy(&before, &dir);
            for staged in [".000007.ckpt-partial-00112233445566aa", ".000004.ckpt-partial-00112233445566bb"] {
                copy(&dir.join("000006"), &dir.join(staged));
                for (at, file) in fs::read_dir(dir.join(staged)).unwrap().flatten().enumerate() {
                    match (at + decay) % 4 {
                        0 => fs::remove_file(file.path()).unwrap(),
                        1 if !file.path().is_symlink() => drop(File::create(file.path()).unwrap()),
                        2 if !file.path().is_symlink() => {
                            let bytes = fs::read(file.path()).unwrap();
                            fs::write(file.path(), &bytes[..bytes.len() / 2]).unwrap();
                        }
                        _ => {}
                    }
                }
            }
            copy(&dir.join("000001"), &dir.join(".gone-000000"));
            fs::remove_file(dir.join(".gone-000000").join("pstree.img")).unwrap();
            let mut series = Series::open(&dir).unwrap();
            assert_eq!(series.next(), dir.join("000007"));
            let names = |dir: &Path| -> BTreeSet<String> {
                let entries = fs::read_dir(dir).unwrap().flatten();
                entries.map(|e| e.file_name().into_string().unwrap()).collect()
            };
            assert_eq!(names(&dir), names(&before));
            let same = |n: u64| assert!(read(&series_path(&dir, n)).as_ref() == states.get(index(n)), "{n}");
            (1..=6).for_each(same);
            series.prune(3, None).unwrap();
            (4..=6).for_each(same);
            assert_eq!(names(&dir).into_iter().collect::<Vec<_>>(), ["000004", "000005", "000006"]);
            assert!(!dir.join("000004/parent").exists());
        }
    }

    fn series_path(dir: &Path, n: u64) -> PathBuf {
        dir.join(format!("{n:06}"))
    }

    fn index(n: u64) -> usize {
        usize::try_from(n - 1).unwrap()
    }
}
