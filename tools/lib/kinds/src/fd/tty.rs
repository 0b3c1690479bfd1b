//! Terminals. Pseudo-terminals that are the tree's own, with both ends: see [`pty`]. Here those that it shares
//! with the outside: a shell's, or a console.
//!
//! Such a terminal is not the tree's own: the restored tasks get the terminal that ckpt-restore has, or the
//! one handed in by `--inherit-fd fd[N]:tty[RDEV:DEV]` (numbers in hexadecimal).
//!
//! An editor that was dumped in the foreground has switched its terminal to single keys without echo, and
//! would be of no use on one that waits for lines. So a terminal gets the settings from the images where a
//! job in the foreground may set them: ckpt-restore is in the foreground itself and stays there, or the
//! terminal was handed in. Its size and speed are its own; SIGWINCH makes programs look at the size and draw
//! their screen again. Where the tasks were in the background, or will be, the settings belong to others.
//!
//! A session whose leader is in the tree gets the terminal as its controlling terminal again if it is no
//! other session's (a new pseudo-terminal, handed in); one session's terminal can't be another's too.

mod pty;

use std::{
    collections::{BTreeMap, HashMap},
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
    FileId, Pid, Refused,
    file::{self, Terminal},
    pty as sys_pty,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        stat::{SFlag, major, minor},
        termios::{ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, Termios, tcgetattr, tcsetattr},
    },
    unistd::{Pid as NixPid, getpgrp, getsid, tcgetpgrp, tcsetpgrp},
};
pub(super) use pty::check;

use super::{
    Descriptor, FileTable, Opening,
    dump::{path, reopen, self_path},
    reg,
};
use crate::{Sink, sink::emit};

/// Control characters that the kernel has; the C library's array is longer.
const CONTROL_CHARACTERS: usize = 19;

/// Terminals met so far.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    /// By device, and number of a master's pair: the number of their TTY_INFO entry.
    known: HashMap<(u64, u32), u32>,
    /// Ends of pseudo-terminals by number; of slaves the first that was met.
    masters: BTreeMap<u32, pty::End>,
    slaves: BTreeMap<u32, pty::End>,
}

fn kind(rdev: u64) -> Option<TtyType> {
    match (major(rdev), minor(rdev)) {
        (136..=143, _) | (5, 2) => Some(TtyType::Pty),
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
    let rdev = d.stat.st_rdev;
    let (is_master, is_slave) = (pty::is_master(rdev), pty::is_slave(rdev));
    let index = if is_master { sys_pty::number(d.copy.as_fd())? } else { pty::index_of(rdev) };
    let terminal = match file::terminal(d.copy.as_fd()) {
        Ok(terminal) => Some(terminal),
        // A slave whose master is gone: nothing is left of it but that.
        Err(e) if e.errno == Errno::EIO && is_slave => None,
        Err(e) if e.errno == Errno::EIO => return Err(d.refuse("this terminal was hung up").into()),
        Err(e) => return Err(e).with_context(|| d.subject()),
    };
    let next = u32::try_from(table.terminals.known.len()).context("too many terminals")? + 1;
    // One that was hung up may have a successor of the same number.
    let key = if terminal.is_some() { (rdev, index) } else { (rdev, u32::MAX) };
    let info_id = *table.terminals.known.entry(key).or_insert(next);
    if info_id == next {
        let end = if is_master || is_slave { Some(pty::End::of(d)?) } else { None };
        let mut info = info(table, d, (info_id, index), terminal.as_ref())?;
        if is_master {
            info.locked = sys_pty::is_locked(d.copy.as_fd())?;
            info.packet_mode = sys_pty::in_packets(d.copy.as_fd())?;
            info.ckpt_hung_up = end.as_ref().filter(|end| end.is_hung_up()).map(|_| true);
        }
        if is_master || is_slave && terminal.is_some() {
            info.exclusive = sys_pty::is_exclusive(d.copy.as_fd())?;
        }
        emit(sink, Image::TtyInfo, 0, &info)?;
        if let Some(end) = end.filter(|_| terminal.is_some()) {
            let ends = if is_master { &mut table.terminals.masters } else { &mut table.terminals.slaves };
            ends.insert(index, end);
        }
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

fn stat_of(pid: Pid) -> anyhow::Result<ckpt_proc::stat::Stat> {
    let at = format!("/proc/{pid}/stat");
    ckpt_proc::stat::parse(&std::fs::read(&at).with_context(|| at.clone())?).context(at)
}

/// Session and foreground group of the terminal, if it is the controlling one of a task of the tree: the
/// terminal itself tells them to members of that session only.
fn owners(table: &FileTable, d: &Descriptor) -> anyhow::Result<(u32, u32)> {
    for &pid in std::iter::once(&d.pid).chain(&table.tree) {
        let stat = stat_of(pid)?;
        // Both pack the device's number in the same way, new_encode_dev() in linux/kdev_t.h.
        if u64::from(stat.tty_nr.cast_unsigned()) == d.stat.st_rdev {
            let number = |n: i32| u32::try_from(n).unwrap_or(0);
            return Ok((number(stat.session), number(stat.tpgid)));
        }
    }
    Ok((0, 0))
}

fn info(
    table: &FileTable,
    d: &Descriptor,
    (id, index): (u32, u32),
    terminal: Option<&Terminal>,
) -> anyhow::Result<TtyInfoEntry> {
    let (sid, pgrp) = if terminal.is_some() { owners(table, d)? } else { (0, 0) };
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
        termios: terminal.map(|Terminal { termios: t, .. }| TermiosEntry {
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
        winsize: terminal.map(|Terminal { winsize: w, .. }| WinsizeEntry {
            ws_row: w.ws_row.into(),
            ws_col: w.ws_col.into(),
            ws_xpixel: w.ws_xpixel.into(),
            ws_ypixel: w.ws_ypixel.into(),
        }),
        pty: (kind == TtyType::Pty).then_some(TtyPtyEntry { index }),
        dev: u32::try_from(d.stat.st_dev).ok(),
        uid: Some(d.stat.st_uid),
        gid: Some(d.stat.st_gid),
        ckpt_hung_up: None,
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
    /// Made for the tasks.
    own: bool,
    /// A task has been told to give the foreground to the group that had it.
    told: bool,
    /// When it has been taken over: its settings before, and the group in its foreground.
    taken: Option<(Termios, NixPid)>,
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let infos: Vec<TtyInfoEntry> = opening.set.all(Image::TtyInfo, 0)?;
    let mut terminals: HashMap<u32, Restored> = HashMap::new();
    let mut pairs = Vec::new();
    for entry in entries {
        let tty = entry.tty.as_ref().context("a terminal without its entry")?;
        let info = infos
            .iter()
            .find(|i| i.id == tty.tty_info_id)
            .with_context(|| format!("file {}: no terminal {}", entry.id, tty.tty_info_id))?;
        if pty::is_own(info, &infos) {
            pairs.push((entry, tty, info));
            continue;
        }
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
        opening.hold(FileId(entry.id));
        opening.keep(FileId(entry.id), fd)?;
    }
    opening.terminals = terminals.into_values().collect();
    let own = pty::restore(opening, &pairs)?;
    opening.terminals.extend(own);
    Ok(())
}

fn find_terminal(opening: &mut Opening<'_>, info: &TtyInfoEntry) -> anyhow::Result<Restored> {
    let key = format!("tty[{:x}:{:x}]", info.rdev, info.dev.unwrap_or(0));
    let restored = |fd, given| Restored { given, ..Restored::new(info, fd) };
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
    fn new(info: &TtyInfoEntry, fd: OwnedFd) -> Self {
        let (info, files) = (info.clone(), Vec::new());
        Self { fd, info, files, given: false, own: false, told: false, taken: None }
    }

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
        if self.own || !(self.given || stays && is_foreground(self.fd.as_fd())) {
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

    /// The session that has it as its controlling terminal, if that is for us to make so, and an open file of it.
    pub(super) fn controls(&self) -> Option<(i32, u32)> {
        let sid = i32::try_from(self.info.sid).ok().filter(|&sid| sid > 0 && (self.given || self.own))?;
        Some((sid, *self.files.first()?))
    }

    /// In task `pid`, which has the terminal as `fd`: gives the foreground to the group that had it. Once, in a
    /// task whose controlling terminal it is; signals are blocked, so one in the background may.
    pub(super) fn calls(&mut self, fd: u32, pid: Pid) -> Vec<Call> {
        let is_member = |sid: i32| getsid(Some(pid.nix())).is_ok_and(|own| own.as_raw() == sid);
        if self.told || self.info.pgrp == 0 || !self.controls().is_some_and(|(sid, _)| is_member(sid)) {
            return Vec::new();
        }
        self.told = true;
        let group = Arg::In(self.info.pgrp.to_le_bytes().to_vec());
        let args = [Arg::Val(fd.into()), Arg::Val(libc::TIOCSPGRP), group];
        // The group may have ended.
        vec![Call::new("ioctl(TIOCSPGRP)", libc::SYS_ioctl, args).may_fail()]
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
