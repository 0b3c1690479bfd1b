//! Terminals that the tree shares with the outside: a shell's, or a console.
//!
//! Such a terminal is not the tree's own, so nothing of it is restored but the fact that a file is
//! open on it: the restored tasks get the terminal that ckpt-restore has, or the one handed in by
//! `--inherit-fd fd[N]:tty[RDEV:DEV]` (numbers in hexadecimal). Its settings belong to whoever uses it then;
//! they are stored for readers of the images only. A terminal whose master is inside the tree is refused with the master.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{
        FdTypes, FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
    },
};
use ckpt_sys::{
    FileId, Refused,
    file::{self, Terminal},
};
use nix::{
    errno::Errno,
    sys::stat::{SFlag, major, minor},
};

use super::{
    Descriptor, FileTable, Opening,
    dump::{path, reopen, self_path},
    reg,
};
use crate::{Sink, sink::emit};

/// Control characters that the kernel has; the C library's array is longer.
const CONTROL_CHARACTERS: usize = 19;

/// Terminals met so far, by device: the number of their TTY_INFO entry.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    known: HashMap<u64, u32>,
}

fn kind(rdev: u64) -> Option<TtyType> {
    match (major(rdev), minor(rdev)) {
        (136..=143, _) => Some(TtyType::Pty),
        (5, 0) => Some(TtyType::Ctty),
        (5, 1) => Some(TtyType::Console),
        (4, 0..=63) => Some(TtyType::Vt),
        (4, _) => Some(TtyType::Serial),
        _ => None,
    }
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is(SFlag::S_IFCHR) && kind(d.stat.st_rdev).is_some()
}

pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    sink: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let next = u32::try_from(table.terminals.known.len()).context("too many terminals")? + 1;
    let info_id = *table.terminals.known.entry(d.stat.st_rdev).or_insert(next);
    if info_id == next {
        let terminal = match file::terminal(d.copy.as_fd()) {
            Ok(terminal) => terminal,
            Err(e) if e.errno == Errno::EIO => return Err(d.refuse("this terminal was hung up").into()),
            Err(e) => return Err(e).with_context(|| d.subject()),
        };
        emit(sink, Image::TtyInfo, 0, &info(d, info_id, &terminal))?;
    }
    let fown = d.fown()?;
    // The name, where it can be reached; nothing depends on it.
    let reachable = nix::sys::stat::lstat(path(&d.link)).is_ok_and(|s| (s.st_dev, s.st_ino) == d.inode());
    let regf_id = if reachable {
        let name_id = table.new_id();
        let (subject, proc_path) = (d.subject(), d.proc_path());
        let found = reg::Found {
            subject: &subject,
            link: &d.link,
            stat: &d.stat,
            proc_path: &proc_path,
            mapped: false,
        };
        let fields = reg::Fields { flags: d.flags(), pos: 0, fown };
        let entry = reg::dump_found(table, &found, name_id, fields, sink)?;
        table.emit_entry(&entry, sink)?;
        Some(name_id.0)
    } else {
        None
    };
    let tty = TtyFileEntry { id: id.0, tty_info_id: info_id, flags: d.flags(), fown, regf_id };
    Ok(Some(FileEntry { r#type: FdTypes::Tty.into(), id: id.0, tty: Some(tty), ..FileEntry::default() }))
}

fn info(d: &Descriptor, id: u32, terminal: &Terminal) -> TtyInfoEntry {
    let t = &terminal.termios;
    let w = &terminal.winsize;
    let kind = kind(d.stat.st_rdev).unwrap_or(TtyType::Unknown);
    TtyInfoEntry {
        id,
        r#type: kind.into(),
        locked: false,
        exclusive: false,
        packet_mode: false,
        sid: terminal.sid.unsigned_abs(),
        pgrp: terminal.pgrp.unsigned_abs(),
        rdev: u32::try_from(d.stat.st_rdev).unwrap_or(0),
        termios: Some(TermiosEntry {
            c_iflag: t.c_iflag,
            c_oflag: t.c_oflag,
            c_cflag: t.c_cflag,
            c_lflag: t.c_lflag,
            c_line: t.c_line.into(),
            c_ispeed: t.c_ispeed,
            c_ospeed: t.c_ospeed,
            c_cc: t.c_cc.iter().take(CONTROL_CHARACTERS).map(|&c| c.into()).collect(),
        }),
        termios_locked: None,
        winsize: Some(WinsizeEntry {
            ws_row: w.ws_row.into(),
            ws_col: w.ws_col.into(),
            ws_xpixel: w.ws_xpixel.into(),
            ws_ypixel: w.ws_ypixel.into(),
        }),
        pty: (kind == TtyType::Pty)
            .then(|| TtyPtyEntry { index: u32::try_from(minor(d.stat.st_rdev)).unwrap_or(0) }),
        dev: u32::try_from(d.stat.st_dev).ok(),
        uid: Some(d.stat.st_uid),
        gid: Some(d.stat.st_gid),
    }
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let infos: Vec<TtyInfoEntry> = opening.set.all(Image::TtyInfo, 0)?;
    let mut terminals: HashMap<u32, OwnedFd> = HashMap::new();
    for entry in entries {
        let tty = entry.tty.as_ref().context("a terminal without its entry")?;
        let info = infos
            .iter()
            .find(|i| i.id == tty.tty_info_id)
            .with_context(|| format!("file {}: no terminal {}", entry.id, tty.tty_info_id))?;
        let terminal = match terminals.entry(info.id) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(find_terminal(opening, info)?),
        };
        let keep = (libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC)
            .cast_unsigned();
        let flags = (tty.flags & keep).cast_signed() | libc::O_NOCTTY;
        let fd = match reopen(&self_path(terminal.as_fd()), flags) {
            Ok(fd) => fd,
            // The terminal of another user, who handed it to us open: shared then.
            Err(_) => terminal.try_clone().context("dup")?,
        };
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}

fn find_terminal(opening: &mut Opening<'_>, info: &TtyInfoEntry) -> anyhow::Result<OwnedFd> {
    let key = format!("tty[{:x}:{:x}]", info.rdev, info.dev.unwrap_or(0));
    if let Some(given) = opening.inherited(&key)? {
        if !nix::unistd::isatty(&given).unwrap_or(false) {
            bail!("{key}: the descriptor given with --inherit-fd is no terminal");
        }
        return Ok(given);
    }
    for n in 0..3 {
        if let Ok(fd) = file::dup_number(n)
            && nix::unistd::isatty(&fd).unwrap_or(false)
        {
            return Ok(fd);
        }
    }
    reopen(path(b"/dev/tty"), libc::O_RDWR | libc::O_NOCTTY).map_err(|_| {
        let advice = format!("run ckpt-restore on a terminal, or pass --inherit-fd fd[N]:{key}");
        Refused::new(key, "the tasks used a terminal, and ckpt-restore has none").advise(advice).into()
    })
}
