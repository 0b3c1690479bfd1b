//! signalfd(2): a mask. Signals that it would return are pending ones of the task that reads it, so
//! they are not its state.

use anyhow::Context;
use ckpt_proc::fdinfo::Special;
use ckpt_proto::types::{FdTypes, FileEntry, SignalfdEntry};
use ckpt_sys::FileId;

use super::{Descriptor, FileTable, Opening};
use crate::Sink;

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("[signalfd]")
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let Special::Signalfd(sigmask) = d.info.special else {
        return Err(d.refuse("fdinfo does not tell its mask").into());
    };
    let sgfd = SignalfdEntry { id: id.0, flags: d.flags(), fown: d.fown()?, sigmask };
    Ok(Some(FileEntry {
        r#type: FdTypes::Signalfd.into(),
        id: id.0,
        sgfd: Some(sgfd),
        ..FileEntry::default()
    }))
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let sgfd = entry.sgfd.as_ref().context("a signalfd without its entry")?;
        let fd = ckpt_sys::file::signalfd(sgfd.sigmask).with_context(|| format!("file {}", entry.id))?;
        Opening::set_flags(std::os::fd::AsFd::as_fd(&fd), sgfd.flags)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}
