//! Unix sockets.

use anyhow::Context;
use ckpt_proto::types::{FdTypes, FileEntry, SocketStub};
use ckpt_sys::{FileId, sock};
use std::os::fd::AsFd;

use super::{Descriptor, FileTable, Opening};
use crate::Sink;

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.domain() == Some(libc::AF_UNIX)
}

/// ckpt-scan's part: a stub, which ckpt-sk completes.
pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let option = |name| -> anyhow::Result<u32> {
        let value = sock::option(d.copy.as_fd(), libc::SOL_SOCKET, name).with_context(|| d.subject())?;
        Ok(value.unsigned_abs())
    };
    let stub = SocketStub {
        pid: d.pid.0.unsigned_abs(),
        fd: d.fd.0.unsigned_abs(),
        ino: d.stat.st_ino,
        domain: option(libc::SO_DOMAIN)?,
        r#type: option(libc::SO_TYPE)?,
        protocol: option(libc::SO_PROTOCOL)?,
        flags: d.flags(),
        fown: d.fown()?,
    };
    Ok(Some(FileEntry {
        r#type: FdTypes::Unixsk.into(),
        id: id.0,
        ckpt_stub: Some(stub),
        ..FileEntry::default()
    }))
}

pub(super) fn restore(_: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    if entries.is_empty() { Ok(()) } else { anyhow::bail!("not written yet") }
}
