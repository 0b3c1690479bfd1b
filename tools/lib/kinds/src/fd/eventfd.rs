//! eventfd(2): a counter. `fdinfo` tells all there is.
//!
//! The images have no field for `EFD_SEMAPHORE`; it is bit 0 of `flags`, where it also is in the
//! argument of eventfd2(2) and which no file status flag of an eventfd uses (they are all `O_RDWR`).

use anyhow::Context;
use ckpt_proc::fdinfo::Special;
use ckpt_proto::types::{EventfdFileEntry, FdTypes, FileEntry};
use ckpt_sys::FileId;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Descriptor, FileTable, Opening};
use crate::Sink;

const SEMAPHORE: u32 = libc::EFD_SEMAPHORE.cast_unsigned();

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("[eventfd]")
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let Special::Eventfd { count, semaphore } = d.info.special else {
        return Err(d.refuse("fdinfo does not tell its counter").into());
    };
    let efd = EventfdFileEntry {
        id: id.0,
        flags: d.flags() | if semaphore { SEMAPHORE } else { 0 },
        fown: d.fown()?,
        counter: count,
    };
    Ok(Some(FileEntry { r#type: FdTypes::Eventfd.into(), id: id.0, efd: Some(efd), ..FileEntry::default() }))
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let efd = entry.efd.as_ref().context("an eventfd without its entry")?;
        let mut flags = EfdFlags::EFD_CLOEXEC;
        flags.set(EfdFlags::EFD_SEMAPHORE, efd.flags & SEMAPHORE != 0);
        let fd = EventFd::from_flags(flags).context("eventfd2")?;
        if efd.counter > 0 {
            // Non-blocking while it is set: a counter of 2^64-1 would wait for ever.
            ckpt_sys::file::set_flags(std::os::fd::AsFd::as_fd(&fd), libc::O_NONBLOCK.cast_unsigned())?;
            nix::unistd::write(&fd, &efd.counter.to_ne_bytes())
                .with_context(|| format!("eventfd {}: write the counter {}", entry.id, efd.counter))?;
        }
        Opening::set_flags(std::os::fd::AsFd::as_fd(&fd), efd.flags & !SEMAPHORE)?;
        opening.keep(FileId(entry.id), fd.into())?;
    }
    Ok(())
}
