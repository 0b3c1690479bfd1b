//! The directories of a series, and which of them are kept.
//!
//! An increment needs the directories before it, so the old end of a series can only be cut off in front of
//! a full checkpoint. Where there is none at the right place, one is made: the increment there is folded
//! into a full checkpoint of the same name and id.
//!
//! ```text
//! 1 <- 2 <- 3 <- 4 <- 5 <- 6          keep 3
//! 1 <- 2 <- 3 <- 4 <- 5 <- 6   and .fold-000004, full, durable
//!                4 <- 5 <- 6          after they have changed places (RENAME_EXCHANGE): 4 is full
//! ```
//!
//! At each instant every directory is restorable: before and after the exchange, the name 000004 has the
//! same contents, and the others are removed, newest first, only when that is durable. What a killed
//! process leaves has names that begin with a dot, and is removed by the next.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use anyhow::Context;
use ckpt_images::ImageSet;
use clap::Parser;
use nix::{
    fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, RenameFlags, renameat2},
    unistd::pipe2,
};

/// Beginnings of names that are removed on sight: of full copies in the making (also while ckpt-write stages
/// them), and of directories that are being removed.
const FOLD: &str = ".fold-";
const GONE: &str = ".gone-";
const STAGED: &str = "..fold-";

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
        for entry in fs::read_dir(dir).with_context(what)? {
            let entry = entry.with_context(what)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if [FOLD, GONE, STAGED].iter().any(|prefix| name.starts_with(prefix)) {
                fs::remove_dir_all(entry.path()).with_context(what)?;
            } else if name.len() >= 6 && name.bytes().all(|b| b.is_ascii_digit()) {
                numbers.extend(name.parse::<u64>().ok());
            }
        }
        let next = numbers.last().map_or(1, |last| last + 1);
        Ok(Self { dir: dir.to_owned(), numbers, next, _lock: lock })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:06}"))
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

    /// Removes what is older than the last `keep` checkpoints, when half as many more have gathered.
    ///
    /// # Errors
    /// Then all are as they were, or some of the old ones are gone.
    pub fn prune(&mut self, keep: u64) -> anyhow::Result<()> {
        let keep = usize::try_from(keep).unwrap_or(usize::MAX);
        let slack = (keep / 2).max(1);
        if self.numbers.len() <= keep.saturating_add(slack) {
            return Ok(());
        }
        let Some(&first) = self.numbers.iter().rev().nth(keep - 1) else { return Ok(()) };
        self.fold(first)?;
        let old: Vec<u64> = self.numbers.range(..first).copied().collect();
        for number in old.into_iter().rev() {
            // A directory that is being removed is no checkpoint any more: it loses its name first.
            let gone = self.dir.join(format!("{GONE}{number:06}"));
            let path = self.path(number);
            fs::rename(&path, &gone).with_context(|| format!("{}: rename", path.display()))?;
            self.numbers.remove(&number);
            fs::remove_dir_all(&gone).with_context(|| format!("{}: remove", gone.display()))?;
        }
        Ok(())
    }

    /// Makes a checkpoint full, if it is an increment.
    fn fold(&self, number: u64) -> anyhow::Result<()> {
        let path = self.path(number);
        if !ImageSet::from_dir(&path).with_context(|| path.display().to_string())?.has_parent() {
            return Ok(());
        }
        let full = self.dir.join(format!("{FOLD}{number:06}"));
        copy(&path, &full).with_context(|| format!("{}: fold", path.display()))?;
        let what = || format!("{}: put the folded checkpoint in its place", path.display());
        match renameat2(AT_FDCWD, &full, AT_FDCWD, &path, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => {}
            // A file system that can't exchange: the name is missing for a moment.
            Err(nix::errno::Errno::EINVAL) => {
                let old = self.dir.join(format!("{GONE}{number:06}"));
                fs::rename(&path, &old).with_context(what)?;
                fs::rename(&full, &path).with_context(what)?;
                fs::rename(&old, &full).with_context(what)?;
            }
            Err(errno) => return Err(errno).with_context(what),
        }
        File::open(&self.dir).and_then(|dir| dir.sync_all()).with_context(what)?;
        fs::remove_dir_all(&full).with_context(|| format!("{}: remove", full.display()))
    }
}

/// `ckpt-read FROM | ckpt-write TO`: a full copy with the same id.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let usage = |error: clap::Error| ckpt_cli::UsageError(error.render().to_string());
    let read = ckpt_read::Args::try_parse_from(["ckpt-read".as_ref(), "--".as_ref(), from.as_os_str()]);
    let write = ckpt_write::Args::try_parse_from(["ckpt-write".as_ref(), "--".as_ref(), to.as_os_str()]);
    let (read, write) = (read.map_err(usage)?, write.map_err(usage)?);
    let (input, output) = pipe2(OFlag::O_CLOEXEC).context("pipe2")?;
    thread::scope(|scope| {
        let reader = scope.spawn(move || ckpt_read::run(&read, File::from(output)));
        let written = ckpt_write::store(&write, File::from(input), |_| Ok(()));
        let read = reader.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a stage has panicked")));
        read.and(written)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "000007",
            "000012",
            "1000000",
            ".fold-000007",
            ".gone-000003",
            "..fold-000007.ckpt-partial-1",
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
        assert_eq!(left.into_iter().collect::<Vec<_>>(), ["000007", "000012", "1000000", "12", "notes"]);
    }
}
