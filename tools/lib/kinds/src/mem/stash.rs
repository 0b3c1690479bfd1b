//! Pages read into memory of our own, so that the process may run on before they are written.
//!
//! Into a pipe they go no faster than the slowest stage behind takes them out, and its processor time comes from
//! the same processors. An increment is small, and so are most programs: what costs them time is
//! then one copy.

use std::{io::Write, os::fd::AsFd};

use anyhow::Context;
use ckpt_proto::{Image, stream::Writer};

use super::dump::{Plan, RECORD};

/// The pages of one process.
#[derive(Debug)]
pub struct Stash {
    pages_id: u32,
    /// As they will be written.
    records: Vec<Vec<u8>>,
}

impl Plan {
    /// Reads the pages, [`Plan::bytes`] of them.
    ///
    /// # Errors
    /// The process died.
    pub fn stash(&self) -> anyhow::Result<Stash> {
        let memory = self.memory()?;
        let mut left = usize::try_from(self.bytes()).context("too many pages")?;
        let mut records: Vec<Vec<u8>> = Vec::with_capacity(left.div_ceil(RECORD));
        let mut filled = RECORD;
        for run in self.stored() {
            let mut at = run.start;
            while at < run.end {
                if filled == RECORD {
                    records.push(vec![0; left.min(RECORD)]);
                    filled = 0;
                }
                let Some(record) = records.last_mut() else { break };
                let n = usize::try_from(run.end - at).unwrap_or(RECORD).min(record.len() - filled);
                let place = &mut record[filled..filled + n];
                self.read(&memory, place, at)?;
                filled += n;
                left -= n;
                at += n as u64;
            }
        }
        Ok(Stash { pages_id: self.pages_id, records })
    }
}

impl Stash {
    /// Writes the pages, as [`Plan::copy`] does.
    ///
    /// # Errors
    /// The output's.
    pub fn write<W: Write + AsFd>(
        self,
        out: &mut Writer<W>,
        mut progress: impl FnMut(u64),
    ) -> anyhow::Result<()> {
        for record in self.records {
            out.data(Image::Pages, u64::from(self.pages_id), &record).context("write the stream")?;
            progress(record.len() as u64);
        }
        Ok(())
    }
}
