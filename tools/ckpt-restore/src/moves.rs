//! In which order a task's descriptors get their numbers.
//!
//! A task inherits all open files of the images at numbers that this process chose, and dup3(2) puts each where
//! it belongs. Numbers far above all others would never be in each other's way, but a task may
//! use all numbers that there can be (RLIMIT_NOFILE). So a number may be one from which a file is still to be taken,
//! and one to which another belongs: it is overwritten when nothing needs it any more, and where files only change
//! places, one of them waits at a number that nobody uses.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::ensure;

/// A step: the file at `from` is to be found at `to` too. Both the same: only the flag is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// A number that is open.
    pub from: i32,
    /// The number that is given a new meaning.
    pub to: i32,
    /// Close-on-exec.
    pub cloexec: bool,
}

/// Orders moves, each from a number as it is before all of them, so that they come out as if done at once.
///
/// # Errors
/// Two moves to one number.
pub fn in_order(wanted: &[Move]) -> anyhow::Result<Vec<Move>> {
    let mut pending: BTreeMap<i32, Move> = BTreeMap::new();
    // How many files have still to be taken from a number.
    let mut needed: HashMap<i32, usize> = HashMap::new();
    let mut done = Vec::with_capacity(wanted.len());
    let mut targets = HashSet::new();
    for &step in wanted {
        ensure!(targets.insert(step.to), "fd {}: there are two of this number", step.to);
        if step.from == step.to {
            done.push(step);
        } else {
            pending.insert(step.to, step);
            *needed.entry(step.from).or_default() += 1;
        }
    }
    let mut free: Vec<i32> = pending.keys().copied().filter(|to| !needed.contains_key(to)).collect();
    let sources: HashSet<i32> = wanted.iter().map(|step| step.from).collect();
    let mut spare = 0;
    loop {
        while let Some(to) = free.pop() {
            let Some(step) = pending.remove(&to) else { continue };
            done.push(step);
            let Some(left) = needed.get_mut(&step.from) else { continue };
            *left -= 1;
            if *left == 0 {
                needed.remove(&step.from);
                free.push(step.from);
            }
        }
        // What is left are circles: each number is needed for one other.
        let Some((&waits, _)) = pending.first_key_value() else { return Ok(done) };
        while targets.contains(&spare) || sources.contains(&spare) {
            spare += 1;
        }
        done.push(Move { from: waits, to: spare, cloexec: true });
        for step in pending.values_mut().filter(|step| step.from == waits) {
            step.from = spare;
        }
        needed.remove(&waits);
        needed.insert(spare, 1);
        free.push(waits);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is where after these moves.
    fn run(before: &HashMap<i32, i32>, steps: &[Move]) -> HashMap<i32, i32> {
        let mut now = before.clone();
        for step in steps {
            let file = now[&step.from];
            now.insert(step.to, file);
        }
        now
    }

    fn check(wanted: &[(i32, i32)]) {
        let wanted: Vec<Move> = wanted.iter().map(|&(from, to)| Move { from, to, cloexec: false }).collect();
        // Files have the number that they have at first.
        let before: HashMap<i32, i32> = wanted.iter().map(|m| (m.from, m.from)).collect();
        let steps = in_order(&wanted).unwrap();
        let after = run(&before, &steps);
        for step in &wanted {
            assert_eq!(after[&step.to], step.from, "{wanted:?} {steps:?}");
        }
    }

    #[test]
    fn chains_circles_and_copies() {
        check(&[]);
        check(&[(5, 5), (5, 6), (5, 7)]);
        check(&[(100, 0), (101, 1), (102, 1000)]);
        check(&[(1, 2), (2, 3), (3, 4)]);
        check(&[(1, 2), (2, 1)]);
        check(&[(1, 2), (2, 3), (3, 1), (1, 9), (3, 8), (4, 5), (5, 4)]);
        assert!(
            in_order(&[Move { from: 1, to: 3, cloexec: false }, Move { from: 2, to: 3, cloexec: true }])
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn any_moves_come_out_as_if_done_at_once(
            wanted in proptest::collection::btree_map(0..40i32, 0..40i32, 0..40)
        ) {
            check(&wanted.into_iter().map(|(to, from)| (from, to)).collect::<Vec<_>>());
        }
    }
}
