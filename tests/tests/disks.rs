//! A series of checkpoints on a disk that fills up, turns read-only or loses what was on it: all that was finished stays, the
//! target runs on, nobody is left behind, and the next series goes on where there is room again.

use std::{
    fs::{self, File},
    io::Write,
};

use ckpt_tests::{Target, process, skip, soon};

use crate::{
    increments::{Series, all_whole, count_of, goes_on_from, names},
    invariants::SmallDisk,
};

/// Makes one checkpoint more, if it can be made.
fn make(series: &mut Series, target: &Target, made: &mut Vec<(String, u64)>) -> bool {
    let count = count_of(target);
    let number = series.make();
    let is_made = number.is_some();
    made.extend(number.map(|number| (number, count)));
    is_made
}

/// Fills a disk up to the last `room` bytes.
fn fill(disk: &SmallDisk, room: u64) {
    let mut file = File::create(disk.0.join("fill")).expect("make a file");
    while file.write_all(&[1; 4096]).is_ok() {}
    let len = file.metadata().expect("stat").len();
    file.set_len(len.saturating_sub(room)).expect("make room");
}

/// A target that has been let go: nobody traces it, watches it or is a copy of it.
fn is_let_go(target: &Target) {
    target.passes("the target");
    assert!(process::text(target.pid, "status").contains("TracerPid:\t0"));
    let smaps = process::text(target.pid, "smaps");
    assert!(!smaps.lines().any(|l| l.starts_with("VmFlags") && l.contains(" uw")), "it is watched");
    assert!(soon(|| process::marked(target.dir.path()) == [target.pid]), "a copy of it is left");
}

/// A series to which `spoil` happens after three checkpoints; it makes `more` until it ends and says `why`.
fn spoiled(
    test: &str,
    options: &[&str],
    spoil: impl Fn(&SmallDisk),
    more: usize,
    why: &str,
    mend: impl Fn(&SmallDisk),
) {
    let target = Target::start("counting");
    let Some(disk) = SmallDisk::new(&target.path("series"), "24m") else {
        return skip(test, "can't mount a tmpfs");
    };
    let mut made = Vec::new();
    let mut series = Series::start(&target, options);
    assert!((0..3).all(|_| make(&mut series, &target, &mut made)));
    spoil(&disk);
    assert!((0..more).all(|_| make(&mut series, &target, &mut made)));
    assert!(!make(&mut series, &target, &mut made), "it does not end");
    let said = || fs::read_to_string(target.path("series.err")).unwrap_or_default();
    assert_eq!(series.end(), Some(1), "{}", said());
    assert!(said().contains(why), "no {why:?}: {}", said());
    is_let_go(&target);
    let there = |made: &[(String, u64)]| {
        made.iter().filter(|(n, _)| disk.0.join(n).exists()).cloned().collect::<Vec<_>>()
    };
    let left = there(&made);
    all_whole(&disk.0);
    let is_known =
        |name: &String| name == "fill" || name.starts_with("before-") || left.iter().any(|(n, _)| n == name);
    assert!(names(&disk.0).iter().all(is_known), "{:?}", names(&disk.0));
    mend(&disk);
    let mut series = Series::start(&target, options);
    made.retain(|made| left.contains(made));
    assert!(make(&mut series, &target, &mut made), "{}", said());
    assert_eq!(series.end(), Some(0), "{}", said());
    is_let_go(&target);
    target.end();
    for (number, _) in there(&made) {
        goes_on_from(&target, &number, &made);
    }
}

fn is_full(disk: &SmallDisk) {
    fill(disk, 0);
}

fn is_emptied(disk: &SmallDisk) {
    fs::remove_file(disk.0.join("fill")).expect("make room");
}

#[test]
fn a_full_disk_ends_a_series() {
    for options in
        [&[][..], &["--full-every", "3"], &["--full-every", "3", "--pre-dump", "--compress", "lz4"]]
    {
        spoiled("a full disk ends a series", options, is_full, 0, "No space left on device", is_emptied);
    }
}

/// There is room for an increment, and none for the full one that it is folded into.
#[test]
fn no_room_to_fold_ends_a_series() {
    let test = "no room to fold ends a series";
    spoiled(test, &["--keep", "2"], |disk| fill(disk, 2 << 20), 1, "fold", is_emptied);
}

#[test]
fn a_disk_that_turns_read_only_ends_a_series() {
    let test = "a disk that turns read-only ends a series";
    spoiled(test, &[], |disk| disk.remount("ro"), 0, "Read-only file system", |disk| disk.remount("rw"));
}

#[test]
fn a_checkpoint_that_is_gone_ends_a_series() {
    let remove =
        |disk: &SmallDisk, name: &str| fs::remove_dir_all(disk.0.join(name)).expect("remove a checkpoint");
    let why = "000003: open the image directory";
    spoiled("a checkpoint that is gone", &[], |disk| remove(disk, "000003"), 0, why, |_: &SmallDisk| ());
}
