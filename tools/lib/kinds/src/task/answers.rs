//! Answers of a remote batch, taken in the order in which the modules asked; and little-endian fields
//! of kernel structures.

use anyhow::Context;
use ckpt_remote::{Call, Done, Syscalls};
use nix::errno::Errno;

/// The answers that have not been taken yet.
pub(super) struct Answers {
    answers: std::vec::IntoIter<(String, Done)>,
}

impl Answers {
    /// Runs the batch.
    pub(super) fn run(remote: &mut dyn Syscalls, calls: Vec<Call>) -> anyhow::Result<Self> {
        let done = remote.run(&calls)?;
        anyhow::ensure!(
            done.len() == calls.len(),
            "tid {}: {} of {} calls ran",
            remote.tid(),
            done.len(),
            calls.len()
        );
        let answers: Vec<_> = calls.into_iter().map(|c| c.name).zip(done).collect();
        Ok(Self { answers: answers.into_iter() })
    }

    fn next(&mut self) -> anyhow::Result<(String, Done)> {
        self.answers.next().context("more answers than calls are wanted")
    }

    /// The next call's return value.
    pub(super) fn value(&mut self) -> anyhow::Result<u64> {
        let (name, done) = self.next()?;
        done.result().context(name)
    }

    /// The same of a call that may fail.
    pub(super) fn result(&mut self) -> anyhow::Result<Result<u64, Errno>> {
        Ok(self.next()?.1.result())
    }

    /// What the next call wrote.
    pub(super) fn bytes(&mut self) -> anyhow::Result<Vec<u8>> {
        let (name, mut done) = self.next()?;
        done.result().with_context(|| name.clone())?;
        done.out.pop().with_context(|| format!("{name}: no answer"))
    }

    /// What the next call wrote, `None` if it failed.
    pub(super) fn bytes_if_any(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let (_, mut done) = self.next()?;
        Ok(if done.result().is_ok() { done.out.pop() } else { None })
    }
}

/// An entry that no kernel and no tool of ours would have made: exit status 4.
pub(super) fn malformed(what: impl Into<String>) -> anyhow::Error {
    ckpt_images::ImageError::Stream { file: "core image".to_owned(), what: what.into() }.into()
}

/// The 64-bit word at byte `at`; 0 beyond the end.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The 32-bit word at byte `at`; 0 beyond the end.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// The 16-bit word at byte `at`; 0 beyond the end.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

/// Words as the bytes of a kernel structure.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
