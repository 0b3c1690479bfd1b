//! The harness of the end-to-end tests: real processes, the real tools, and a look at both from outside.
//!
//! - [`process`]: trees of processes as `/proc` shows them; ending them and waiting until their pids are free.
//! - [`workload`]: the C programs of `workloads/`, compiled once, started each in a directory of its own.
//! - [`tools`]: pipelines of the built binaries, with their exit statuses and what they said.
//! - [`hugepages`]: the pool of huge pages, for one test at a time.
//! - [`snapshot`]: everything about a tree that an observer can see, for before/after comparisons.
//!
//! A test that fails panics; its directory is then kept and the message says how to look inside. A test that
//! can't run here says `SKIP` and why on stderr ([`skip`]), and CI counts those.

pub mod hugepages;
pub mod net;
pub mod process;
pub mod snapshot;
pub mod tools;
pub mod workload;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub use snapshot::Snapshot;
pub use tools::{Outcome, Pipeline, tool};
pub use workload::Target;

/// How long anything may take before a test gives up on it. Generous: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where this crate's sources are.
#[must_use]
pub fn here() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The profile directory of this test's executable (`target/debug`): the tools lie in it, built by
/// `cargo build --workspace`.
///
/// # Panics
/// The executable lies somewhere else than cargo puts tests.
#[must_use]
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CKPT_BIN_DIR") {
        return dir.into();
    }
    let exe = std::env::current_exe().expect("the path of the test executable");
    exe.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").to_owned()
}

/// Polls `condition` until it holds; false when [`PATIENCE`] is used up. For what has no event to wait for.
pub fn soon(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reports a test that can't run here. The recipes count these lines.
pub fn skip(test: &str, why: &str) {
    eprintln!("SKIP {test}: {why}");
    if let Some(path) = std::env::var_os("CKPT_SKIPS") {
        use std::io::Write;
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
            let _ = writeln!(file, "{test}: {why}");
        }
    }
}

/// Whether a program is installed.
#[must_use]
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

/// A directory that is removed at the end of the test, unless the test failed.
#[derive(Debug)]
pub struct TestDir(Option<tempfile::TempDir>);

impl TestDir {
    /// A fresh directory below `target/tests`.
    ///
    /// # Panics
    /// It can't be made.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let parent = bin_dir().parent().map_or_else(std::env::temp_dir, Path::to_owned).join("tests");
        std::fs::create_dir_all(&parent).expect("make target/tests");
        // Tasks of other users have to reach their files.
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .expect("make a test directory");
        Self(Some(dir))
    }

    /// Its path.
    ///
    /// # Panics
    /// Never: it is only taken on drop.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("taken on drop only").path()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let Some(dir) = self.0.take() else { return };
        if std::thread::panicking() {
            let path = dir.keep();
            eprintln!(
                "kept {0}: look inside with\n  tail {0}/*.err {0}/log; {1}/ckpt-show {0}/img",
                path.display(),
                bin_dir().display()
            );
        }
    }
}

/// Random numbers for choosing instants and bytes to attack: xorshift64*, reproducible from its seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded from `CKPT_SEED` or the clock; prints the seed.
    #[must_use]
    pub fn new(test: &str) -> Self {
        let seed = std::env::var("CKPT_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |d| d.as_secs() * 1_000_003 + u64::from(d.subsec_nanos()))
        });
        eprintln!("{test}: CKPT_SEED={seed}");
        Self(seed | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound.max(1)
    }
}
