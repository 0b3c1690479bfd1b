//! The kernel's pool of huge pages, which is empty unless somebody fills it: tests take it one after the other.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::TestDir;

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Pages of 2 MiB in the pool, besides those that were there before, for as long as this lives.
#[derive(Debug)]
pub struct HugePages {
    /// Says how many there were, in case that its holder is killed.
    lock: Flock<File>,
    before: u64,
    /// How many others have, and keep.
    others: u64,
}

impl HugePages {
    /// Waits until no other test has the pool, on this machine. `None`, and the test is reported as skipped, if there can't be
    /// so many pages.
    ///
    /// # Panics
    /// The lock can't be made.
    #[must_use]
    pub fn take(test: &str, count: u64) -> Option<Self> {
        let path = std::env::temp_dir().join("ckpt-tests-huge-pages");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let lock = Flock::lock(file.expect("open the lock"), FlockArg::LockExclusive);
        let mut lock = lock.map_err(|(_, errno)| errno).expect("lock the pool");
        let mut left = String::new();
        lock.read_to_string(&mut left).expect("read the lock");
        let taken = left.trim().parse().ok().or_else(now).and_then(|before| {
            let mut pool = Self { lock, before, others: before.max(in_use()) };
            pool.note(&before.to_string());
            pool.resize(count).then_some(pool)
        });
        if taken.is_none() {
            crate::skip(test, "the kernel's pool of huge pages can't be enlarged");
        }
        taken
    }

    /// Makes it `count` pages more than others have; false if that can't be.
    #[must_use]
    pub fn resize(&self, count: u64) -> bool {
        let wanted = self.others + count;
        fs::write(POOL, wanted.to_string()).is_ok() && now() == Some(wanted)
    }

    fn note(&mut self, text: &str) {
        let _ = self.lock.set_len(0);
        let _ = self.lock.rewind();
        let _ = self.lock.write_all(text.as_bytes());
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.before.to_string());
        self.note("");
    }
}

fn now() -> Option<u64> {
    fs::read_to_string(POOL).ok()?.trim().parse().ok()
}

/// Pages of the pool that are in use, or promised to somebody.
///
/// # Panics
/// The kernel does not tell.
#[must_use]
pub fn in_use() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let number = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|n| n.trim().parse().ok()).expect("a number of huge pages")
    };
    number("HugePages_Total") - number("HugePages_Free") + number("HugePages_Rsvd")
}

/// A hugetlbfs mounted in a directory of its own.
#[derive(Debug)]
pub struct HugeFiles(TestDir);

impl HugeFiles {
    /// `None`, and the test is reported as skipped, if it can't be mounted.
    #[must_use]
    pub fn mount(test: &str) -> Option<Self> {
        let files = Self(TestDir::new("hugetlbfs"));
        if !files.again() {
            crate::skip(test, "hugetlbfs can't be mounted");
            return None;
        }
        Some(files)
    }

    /// Mounts another one over it.
    #[must_use]
    pub fn again(&self) -> bool {
        let (options, none) = (Some("pagesize=2M"), None::<&str>);
        mount(none, self.0.path(), Some("hugetlbfs"), MsFlags::empty(), options).is_ok()
    }

    /// Takes it away; what is open stays.
    #[must_use]
    pub fn unmount(&self) -> bool {
        umount2(self.0.path(), MntFlags::MNT_DETACH).is_ok()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::to_owned(self.0.path())
    }
}

impl Drop for HugeFiles {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}
