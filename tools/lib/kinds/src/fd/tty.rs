//! Terminals that the tree shares with the outside: a shell's, or a console.
//!
//! Such a terminal is not the tree's own: the restored tasks get the terminal that ckpt-restore has, or the
//! one handed in by `--inherit-fd fd[N]:tty[RDEV:DEV]` (numbers in hexadecimal). A terminal whose master is
//! inside the tree is refused with the master.
//!
//! An editor that was dumped in the foreground has switched its terminal to single keys without echo, and
//! would be of no use on one that waits for lines. So a terminal gets the settings from the images where a
//! job in the foreground may set them: ckpt-restore is in the foreground itself and stays there, or the
//! terminal was handed in. Its size and speed are its own; SIGWINCH makes programs look at the size and draw
//! their screen again. Where the tasks were in the background, or will be, the settings belong to others.
//!
//! A session whose leader is in the tree gets the terminal as its controlling terminal again if it is no
//! other session's (a new pseudo-terminal, handed in); one session's terminal can't be another's too.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    types::{
        FdTypes, FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
    },
};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    FileId, Refused,
    file::{self, Terminal},
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        stat::{SFlag, major, minor},
        termios::{ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, Termios, tcgetattr, tcsetattr},
    },
    unistd::{Pid as NixPid, getpgrp, tcgetpgrp, tcsetpgrp},
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
        emit(sink, Image::TtyInfo, 0, &info(d, info_id, &terminal)?)?;
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

/// Session and foreground group of the terminal, if it is the controlling one of the task that has it: the
/// terminal itself tells them to members of that session only.
fn owners(d: &Descriptor) -> anyhow::Result<(u32, u32)> {
    let at = format!("/proc/{}/stat", d.pid);
    let stat = ckpt_proc::stat::parse(&std::fs::read(&at).with_context(|| at.clone())?).context(at)?;
    // Both pack the device's number in the same way, new_encode_dev() in linux/kdev_t.h.
    let controls = u64::from(stat.tty_nr.cast_unsigned()) == d.stat.st_rdev;
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    Ok(if controls { (number(stat.session), number(stat.tpgid)) } else { (0, 0) })
}

fn info(d: &Descriptor, id: u32, terminal: &Terminal) -> anyhow::Result<TtyInfoEntry> {
    let (sid, pgrp) = owners(d)?;
    let t = &terminal.termios;
    let w = &terminal.winsize;
    let kind = kind(d.stat.st_rdev).unwrap_or(TtyType::Unknown);
    Ok(TtyInfoEntry {
        id,
        r#type: kind.into(),
        locked: false,
        exclusive: false,
        packet_mode: false,
        sid,
        pgrp,
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
    })
}

/// A terminal that restored tasks use.
#[derive(Debug)]
pub(super) struct Restored {
    fd: OwnedFd,
    info: TtyInfoEntry,
    /// The open files that lead to it.
    files: Vec<u32>,
    /// Handed in by the user for this purpose.
    given: bool,
    /// When it has been taken over: its settings before, and the group in its foreground.
    taken: Option<(Termios, NixPid)>,
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let infos: Vec<TtyInfoEntry> = opening.set.all(Image::TtyInfo, 0)?;
    let mut terminals: HashMap<u32, Restored> = HashMap::new();
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
        let fd = match reopen(&self_path(terminal.fd.as_fd()), flags) {
            Ok(fd) => fd,
            // The terminal of another user, who handed it to us open: shared then.
            Err(_) => terminal.fd.try_clone().context("dup")?,
        };
        terminal.files.push(entry.id);
        opening.keep(FileId(entry.id), fd)?;
    }
    opening.terminals = terminals.into_values().collect();
    Ok(())
}

fn find_terminal(opening: &mut Opening<'_>, info: &TtyInfoEntry) -> anyhow::Result<Restored> {
    let key = format!("tty[{:x}:{:x}]", info.rdev, info.dev.unwrap_or(0));
    let restored = |fd, given| Restored { fd, info: info.clone(), files: Vec::new(), given, taken: None };
    if let Some(given) = opening.inherited(&key)? {
        if !nix::unistd::isatty(&given).unwrap_or(false) {
            bail!("{key}: the descriptor given with --inherit-fd is no terminal");
        }
        return Ok(restored(given, true));
    }
    for n in 0..3 {
        if let Ok(fd) = file::dup_number(n)
            && nix::unistd::isatty(&fd).unwrap_or(false)
        {
            return Ok(restored(fd, false));
        }
    }
    let own = reopen(path(b"/dev/tty"), libc::O_RDWR | libc::O_NOCTTY).map_err(|_| {
        let advice = format!("run ckpt-restore on a terminal, or pass --inherit-fd fd[N]:{key}");
        Refused::new(key, "the tasks used a terminal, and ckpt-restore has none").advise(advice)
    })?;
    Ok(restored(own, false))
}

impl Restored {
    /// Whether open file `id` leads to it.
    pub(super) fn is(&self, id: u32) -> bool {
        self.files.contains(&id)
    }

    /// Gives the terminal the settings from the images, and the foreground to the group that had it, if it is for
    /// the restored tasks to have: `stays` tells whether ckpt-restore stays in the foreground, `group_of` which
    /// group the members of a recorded one are in now.
    pub(super) fn take_over(
        &mut self,
        stays: bool,
        group_of: impl Fn(i32) -> Option<NixPid>,
    ) -> anyhow::Result<()> {
        let Some(group) = i32::try_from(self.info.pgrp).ok().and_then(group_of) else { return Ok(()) };
        if !(self.given || stays && is_foreground(self.fd.as_fd())) {
            return Ok(());
        }
        let now = tcgetattr(&self.fd).context("tcgetattr")?;
        let wanted = self.info.termios.as_ref().map(|t| settings(&now, t));
        self.taken = Some((now, group));
        if let Some(wanted) = wanted {
            tcsetattr(&self.fd, SetArg::TCSADRAIN, &wanted).context("tcsetattr")?;
        }
        match tcsetpgrp(&self.fd, group) {
            // The tasks have a session of their own, where this is not the controlling terminal.
            Ok(()) | Err(Errno::EPERM | Errno::ENOTTY) => Ok(()),
            Err(errno) => Err(errno).context("tcsetpgrp"),
        }
    }

    /// Undoes [`Self::take_over`]. Failures could only be told to somebody who is just told about another one.
    pub(super) fn give_back(&self) {
        if let Some((before, _)) = &self.taken {
            let _ = tcsetpgrp(&self.fd, getpgrp());
            let _ = tcsetattr(&self.fd, SetArg::TCSADRAIN, before);
        }
    }

    /// Has the programs in the foreground draw again what they show there.
    ///
    /// Not before they wait again in the call that the dump interrupted: a handler that runs on the way into
    /// read(2) sets its flag after the program has looked at it, and nothing interrupts the read then.
    pub(super) fn redraw(&self) {
        const STEP: Duration = Duration::from_millis(1);
        const STEPS: u32 = 100;
        if let Some((_, group)) = &self.taken {
            let waits = || {
                let stat = std::fs::read(format!("/proc/{group}/stat")).unwrap_or_default();
                ckpt_proc::stat::parse(&stat).map_or(true, |stat| stat.state == b'S')
            };
            (0..STEPS).take_while(|_| !waits()).for_each(|_| std::thread::sleep(STEP));
            let _ = killpg(*group, Signal::SIGWINCH);
        }
    }

    /// In a task that has the terminal as `fd`: makes it the controlling terminal again of the session that `pid` leads.
    pub(super) fn calls(&self, fd: u32, pid: i32) -> Vec<Call> {
        if !self.given || self.info.sid.cast_signed() != pid {
            return Vec::new();
        }
        let ioctl = |name: &str, request: u64, argument| {
            Call::new(name, libc::SYS_ioctl, [Arg::Val(fd.into()), Arg::Val(request), argument]).may_fail()
        };
        let group = Arg::In(self.info.pgrp.to_le_bytes().to_vec());
        vec![
            ioctl("ioctl(TIOCSCTTY)", libc::TIOCSCTTY, Arg::Val(0)),
            ioctl("ioctl(TIOCSPGRP)", libc::TIOCSPGRP, group),
        ]
    }
}

fn is_foreground(terminal: BorrowedFd<'_>) -> bool {
    tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp())
}

/// Line settings as they were; what depends on the terminal itself (speed, character size) stays.
fn settings(now: &Termios, wanted: &TermiosEntry) -> Termios {
    let mut settings = now.clone();
    settings.input_flags = InputFlags::from_bits_retain(wanted.c_iflag);
    settings.output_flags = OutputFlags::from_bits_retain(wanted.c_oflag);
    settings.local_flags = LocalFlags::from_bits_retain(wanted.c_lflag);
    settings.control_flags = now.control_flags & !ControlFlags::HUPCL
        | ControlFlags::from_bits_retain(wanted.c_cflag) & ControlFlags::HUPCL;
    for (now, &wanted) in settings.control_chars.iter_mut().zip(&wanted.c_cc) {
        *now = u8::try_from(wanted).unwrap_or(0);
    }
    settings
}
