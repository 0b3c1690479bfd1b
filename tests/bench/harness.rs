//! What benchmarks share.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use ckpt_tests::{process, tool};

/// Rounds that count. Benchmarks run one more before, which warms up what [`warm_up`] does not.
pub const ROUNDS: usize = 5;

/// A directory on tmpfs, removed with all that is in it when this is dropped.
pub struct Tmpfs(pub PathBuf);

impl Tmpfs {
    pub fn new() -> Self {
        // tmpfs is what /dev/shm is everywhere that this is likely to run.
        let dir = PathBuf::from("/dev/shm").join(format!("ckpt-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("make a directory on tmpfs");
        Self(dir)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Touches `bytes` of memory as a file in `dir` and gives it back: the first touch of memory that a virtual machine has
/// not used yet costs many times a normal page fault. The host takes back what has been free for some seconds: for
/// steps that take as long, see [`Reserve`].
pub fn warm_up(dir: &Path, bytes: u64) {
    let path = dir.join("warm-up");
    let mut file = fs::File::create(&path).expect("make a file on tmpfs");
    let block = vec![0x5a_u8; 4 << 20];
    for _ in 0..bytes / (4 << 20) {
        file.write_all(&block).expect("tmpfs has room for what the benchmark needs");
    }
    drop(file);
    fs::remove_file(&path).expect("remove the warm-up file");
}

/// All memory of the machine that nothing uses, touched and held, and given back as fast as others take it. What they
/// get has then been in use until just before, however much they take and however long: never memory that the host
/// of a virtual machine has to find first, or has taken back while it was free.
pub struct Reserve {
    held: Arc<Mutex<Vec<Vec<u8>>>>,
    over: Arc<AtomicBool>,
    release: Option<JoinHandle<()>>,
}

impl Reserve {
    /// What stays free, bytes.
    const FREE: u64 = 512 << 20;
    /// Large enough that the allocator unmaps each when it is dropped (mallopt(3), `M_MMAP_THRESHOLD`).
    const PIECE: usize = 64 << 20;
    const LOOK_EVERY: Duration = Duration::from_millis(5);

    /// Empty at first.
    pub fn new() -> Self {
        let held = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let (pieces, told) = (Arc::clone(&held), Arc::clone(&over));
        let release = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                while free() < Self::FREE && pieces.lock().expect("no thread panics").pop().is_some() {}
                std::thread::sleep(Self::LOOK_EVERY);
            }
        });
        Self { held, over, release: Some(release) }
    }

    /// Takes what has come free, and touches it.
    pub fn fill(&self) {
        while free() > Self::FREE + 2 * Self::PIECE as u64 {
            let piece = vec![0x5a; Self::PIECE];
            self.held.lock().expect("no thread panics").push(piece);
        }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(release) = self.release.take() {
            let _ = release.join();
        }
    }
}

/// Memory that nothing uses at all, not even as a cache, bytes.
fn free() -> u64 {
    meminfo("MemFree")
}

/// What `memory_hog` has noted in its file: the longest time for which it did not get to run, and how long its last
/// fork took, zero if it has not forked since [`forget`].
pub fn felt(gap: &Path) -> (Duration, Duration) {
    let bytes = fs::read(gap).expect("read what the target notes");
    let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    (Duration::from_micros(word(0)), Duration::from_micros(word(8)))
}

/// Has it note anew.
pub fn forget(gap: &Path) {
    let file = fs::OpenOptions::new().write(true).open(gap);
    file.and_then(|mut f| f.write_all(&[0; 24])).expect("reset what the target notes");
}

/// Peak memory (VmHWM, KiB) of tools by name.
pub type Peaks = BTreeMap<String, u64>;

/// A pipeline of tools, the first word of each stage being the tool's name; the output of the last is dropped. With
/// `peaks` it is watched ([`watch`]).
pub fn pipeline(stages: &[&[&str]], peaks: Option<&mut Peaks>) {
    let mut running: Vec<(String, Child)> = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        let (name, args) = stage.split_first().expect("a stage has a name");
        let input = match running.last_mut() {
            Some((_, before)) => Stdio::from(before.stdout.take().expect("a pipe")),
            None => Stdio::null(),
        };
        let last = index + 1 == stages.len();
        let output = if last { Stdio::null() } else { Stdio::piped() };
        let child = Command::new(tool(name)).args(args).stdin(input).stdout(output).spawn();
        running.push(((*name).to_owned(), child.unwrap_or_else(|e| panic!("start {name}: {e}"))));
    }
    finish(running, peaks);
}

/// Waits for the stages of a pipeline, and watches them if there are `peaks` to note.
pub fn finish(stages: Vec<(String, Child)>, peaks: Option<&mut Peaks>) {
    match peaks {
        Some(peaks) => watch(stages, peaks),
        None => wait(stages),
    }
}

/// Waits for the stages of a pipeline.
pub fn wait(stages: Vec<(String, Child)>) {
    for (name, mut child) in stages {
        let status = child.wait().expect("wait for a stage");
        assert!(status.success(), "{name}: {status}");
    }
}

/// Waits for the stages of a pipeline, watching each one's peak memory. To look takes a tenth of a processor, so this is
/// not for rounds that are timed.
pub fn watch(mut stages: Vec<(String, Child)>, peaks: &mut Peaks) {
    let mut left = stages.len();
    let mut ended = vec![false; left];
    while left > 0 {
        for (index, (name, child)) in stages.iter_mut().enumerate() {
            if ended[index] {
                continue;
            }
            let status = process::text(i32::try_from(child.id()).expect("a pid"), "status");
            let exe_is_tool = status.starts_with(&format!("Name:\t{name}"));
            let hwm = status
                .lines()
                .find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            if let (true, Some(kib)) = (exe_is_tool, hwm) {
                let peak = peaks.entry(name.clone()).or_default();
                *peak = (*peak).max(kib);
            }
            if let Some(status) = child.try_wait().expect("wait for a stage") {
                assert!(status.success(), "{name}: {status}");
                ended[index] = true;
                left -= 1;
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Memory that programs can have without hurting others, bytes.
pub fn available() -> u64 {
    meminfo("MemAvailable")
}

/// A figure of proc_meminfo(5), bytes.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let kib = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_else(|| panic!("{name} in /proc/meminfo")) << 10
}

/// Bytes of all files in a directory.
pub fn size(dir: &Path) -> u64 {
    fs::read_dir(dir).expect("list").flatten().map(|f| f.metadata().map_or(0, |m| m.len())).sum()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

/// The row of what all others are measured by.
pub fn yardstick(name: &str, seconds: &[f64]) {
    println!("{name:<22}{:>9.3} s{:>9.2} x", median(seconds.to_vec()), 1.0);
}

/// A row: the median time, its ratio to the yardstick of the same round, and whether that is within `target`.
pub fn ratio(name: &str, seconds: &[f64], yardstick: &[f64], target: f64) {
    let ratios: Vec<f64> = seconds.iter().zip(yardstick).map(|(t, y)| t / y).collect();
    let ratio = median(ratios.clone());
    let (low, high) = ratios.iter().fold((f64::MAX, 0.0_f64), |(l, h), &r| (l.min(r), h.max(r)));
    println!(
        "{name:<22}{:>9.3} s{ratio:>9.2} x  ({low:.2} to {high:.2}){:>15}",
        median(seconds.to_vec()),
        format!("<= {target} {}", verdict(ratio <= target))
    );
}

/// Rows of peak memory, each with whether it is below `target` MiB.
pub fn peak_rows(peaks: &Peaks, target: u64) {
    for (name, kib) in peaks {
        println!(
            "{:<22}{:>9.1} MiB{:>40}",
            format!("peak of {name}"),
            f64::from(u32::try_from(*kib).unwrap_or(u32::MAX)) / 1024.0,
            format!("< {target} {}", verdict(*kib < target << 10))
        );
    }
}
