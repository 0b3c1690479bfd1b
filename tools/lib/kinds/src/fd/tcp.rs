//! TCP sockets (tcp(7)).

use std::os::fd::AsFd;

use anyhow::bail;
use ckpt_proto::{
    Image,
    types::{FdTypes, FileEntry, InetSkEntry},
};
use ckpt_sys::{FileId, sock};

use super::{Descriptor, Opening, inet, socket};
use crate::{Sink, fd::socket::Completion, sink::emit};

/// `state`: listening.
const LISTEN: u8 = 10;

pub(super) fn recognise(d: &Descriptor) -> bool {
    (d.is_socket(libc::AF_INET, libc::SOCK_STREAM) || d.is_socket(libc::AF_INET6, libc::SOCK_STREAM))
        && sock::option(d.copy.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|protocol| protocol == libc::IPPROTO_TCP)
}

/// ckpt-sk's part.
pub(super) fn complete(
    sockets: Vec<socket::Socket<'_>>,
    completion: Completion<'_>,
    sink: &mut dyn Sink,
) -> anyhow::Result<()> {
    if sockets.is_empty() {
        return Ok(());
    }
    let (table, _) = inet::table(libc::IPPROTO_TCP)?;
    for socket in &sockets {
        let diag = table.get(&socket.stub.ino);
        let what = format!("TCP socket {}", socket.stub.ino);
        let mut isk = inet::entry(socket, diag, &what, completion)?;
        match diag.map(|d| d.state) {
            None | Some(inet::CLOSE) => {}
            Some(LISTEN) => isk.backlog = diag.map_or(0, |d| d.wqueue),
            Some(_) => {
                return Err(socket.refuse(&what, "established connections are not supported yet").into());
            }
        }
        let kind = FdTypes::Inetsk.into();
        let entry = FileEntry { r#type: kind, id: socket.file_id, isk: Some(isk), ..FileEntry::default() };
        emit(sink, Image::Files, 0, &entry)?;
    }
    Ok(())
}

/// ckpt-restore's part.
pub(super) fn restore(opening: &mut Opening<'_>, entries: &[&InetSkEntry]) -> anyhow::Result<()> {
    for isk in entries {
        let what = format!("TCP socket {}", isk.ino);
        let fd = inet::new_socket(isk, &what)?;
        let local = inet::source(isk)?;
        match isk.state {
            state if state == u32::from(LISTEN) => {
                inet::bind(fd.as_fd(), &what, local)?;
                sock::listen(fd.as_fd(), i32::try_from(isk.backlog).unwrap_or(i32::MAX))?;
            }
            state if state == u32::from(inet::CLOSE) => {
                if local.port() != 0 {
                    inet::bind(fd.as_fd(), &what, local)?;
                }
            }
            state => bail!("{what}: state {state} (to {}) is not supported yet", inet::destination(isk)?),
        }
        inet::finish(fd.as_fd(), isk, &what)?;
        opening.set_flags(fd.as_fd(), isk.flags)?;
        opening.keep(FileId(isk.id), fd)?;
    }
    Ok(())
}
