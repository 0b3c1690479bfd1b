//! Pseudo-terminals whose master is in the tree (tmux, script, expect, a terminal emulator): the pair is the
//! tree's own, and made again.
//!
//! **Dump.** Line settings and size are the pair's and can be asked of either end; lock and packet mode are the
//! master's. Nothing may be open outside the tree. Bytes that one end has written and the other has not read can't
//! be peeked at, and reading them away, even to write them back, would lose them if the tool were killed
//! in between: so they are refused, and a moment later they have mostly been read. (A line that is being typed, without its end, is
//! not told by any call, and is lost.) poll(2) on an end makes the kernel deliver first what is under way to it
//! (`n_tty_poll`), so FIONREAD misses nothing.
//!
//! **Restore.** The kernel gives a new pair the lowest free number, so the ones below are opened and held until the
//! wanted one comes. If somebody has that, the pair gets another number, with a warning: open descriptors
//! do not care, only those who open `/dev/pts/N` by name do. Slaves are opened through their master
//! (TIOCGPTPEER), wherever devpts is mounted. A slave that was open once and is not any more is opened and closed:
//! the master's reads fail with EIO again. One whose master is gone is made with a master that goes.
//!
//! A terminal becomes the controlling one of a session right after its leader's setsid(2): children that are
//! forked from then on have it from their parent, and there is no other way to give it to them.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, bail};
use ckpt_proto::types::{FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyType};
use ckpt_sys::{FileId, Pid, Refused, file, pty};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::{major, minor},
    unistd::{Gid, Uid, fchown},
};

use super::{
    super::{
        Descriptor, FileTable, Opening,
        dump::{find_holders, path, reopen},
    },
    CONTROL_CHARACTERS, Restored, stat_of,
};

/// `/dev/ptmx`, and that of every devpts: majors and minors of linux/devices.txt.
pub(super) fn is_master(rdev: u64) -> bool {
    (major(rdev), minor(rdev)) == (5, 2)
}

pub(super) fn is_slave(rdev: u64) -> bool {
    (136..=143).contains(&major(rdev))
}

/// N of `/dev/pts/N`: each major has a million minors, and only the first is used (drivers/tty/pty.c).
pub(super) fn index_of(rdev: u64) -> u32 {
    u32::try_from(minor(rdev)).unwrap_or(0)
}

/// An end of a pair that was met.
#[derive(Debug)]
pub(super) struct End {
    subject: String,
    unread: u32,
    hung_up: bool,
}

impl End {
    pub(super) fn of(d: &Descriptor) -> anyhow::Result<Self> {
        let mut fds = [PollFd::new(d.copy.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).context("poll")?;
        let hung_up = fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
        let unread = match file::readable_bytes(d.copy.as_fd()) {
            Err(e) if e.errno == Errno::EIO => 0,
            unread => unread?,
        };
        Ok(Self { subject: d.subject(), unread, hung_up })
    }

    /// The other end was open, and is open nowhere any more.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }
}

/// Whether the pairs whose masters are in the tree are all the tree's, and hold nothing.
pub(in crate::fd) fn check(table: &FileTable) -> anyhow::Result<()> {
    let terminals = &table.terminals;
    if terminals.masters.is_empty() {
        return Ok(());
    }
    let number = |link: &[u8]| {
        let name = link.strip_prefix(b"/dev/pts/").and_then(|n| std::str::from_utf8(n).ok());
        name.and_then(|n| n.parse::<u32>().ok()).filter(|n| terminals.masters.contains_key(n))
    };
    let own = Pid(std::process::id().cast_signed());
    let outside = find_holders(|link| number(link).is_some())
        .into_iter()
        .find(|(pid, ..)| !table.tree.contains(pid) && *pid != own);
    if let Some((pid, comm, fd, link)) = outside {
        let master = number(&link).and_then(|n| terminals.masters.get(&n));
        let subject = master.map_or_else(String::new, |end| end.subject.clone());
        let link = link.escape_ascii();
        let reason = format!(
            "its terminal {link} is open as fd {fd} in pid {pid} ({comm}), which is outside the tree"
        );
        return Err(Refused::new(subject, reason).advise("dump that process too, or end it").into());
    }
    for (index, master) in &terminals.masters {
        let slave = terminals.slaves.get(index);
        for (end, what) in [(Some(master), "printed"), (slave, "typed")] {
            let Some(end) = end.filter(|end| end.unread > 0) else { continue };
            let reason = format!("{} bytes were {what} on /dev/pts/{index} and are not read yet", end.unread);
            return Err(Refused::new(end.subject.clone(), reason)
                .advise("try again when they have been read: they can't be copied without taking them away")
                .into());
        }
        // The kernel shows a slave's device number (136, N) as it is in stat.
        let controls = |pid: &&Pid| {
            stat_of(**pid).is_ok_and(|s| {
                let rdev = u64::from(s.tty_nr.cast_unsigned());
                is_slave(rdev) && index_of(rdev) == *index
            })
        };
        if slave.is_none()
            && let Some(pid) = table.tree.iter().find(controls)
        {
            let reason =
                format!("its controlling terminal /dev/pts/{index} is open in no process of the tree");
            return Err(Refused::new(format!("pid {pid}"), reason).into());
        }
    }
    Ok(())
}

/// An open file of a pair, as the images have it.
pub(super) type Part<'a> = (&'a FileEntry, &'a TtyFileEntry, &'a TtyInfoEntry);

fn index(info: &TtyInfoEntry) -> Option<u32> {
    info.pty.as_ref().map(|pty| pty.index)
}

/// Whether these images hold the pair of `info`, and not just one end that leads outside.
pub(super) fn is_own(info: &TtyInfoEntry, all: &[TtyInfoEntry]) -> bool {
    let is_pty = info.r#type == i32::from(TtyType::Pty) && info.pty.is_some();
    let has_master = || all.iter().any(|i| is_master(i.rdev.into()) && index(i) == index(info));
    is_pty && (is_master(info.rdev.into()) || info.termios.is_none() || has_master())
}

/// Makes the pairs; gives those that have a slave.
pub(super) fn restore(opening: &mut Opening<'_>, parts: &[Part<'_>]) -> anyhow::Result<Vec<Restored>> {
    let mut pairs: BTreeMap<u32, Vec<Part<'_>>> = BTreeMap::new();
    for part in parts {
        pairs.entry(index(part.2).context("a pseudo-terminal without its number")?).or_default().push(*part);
    }
    let mut restored = Vec::new();
    for (index, parts) in pairs {
        let what = || format!("pseudo-terminal /dev/pts/{index}");
        restored.extend(restore_pair(opening, index, &parts).with_context(what)?);
    }
    Ok(restored)
}

fn restore_pair(
    opening: &mut Opening<'_>,
    index: u32,
    parts: &[Part<'_>],
) -> anyhow::Result<Option<Restored>> {
    let of_master = |part: &&Part<'_>| is_master(part.2.rdev.into());
    let masters: Vec<&Part<'_>> = parts.iter().filter(of_master).collect();
    let slaves: Vec<&Part<'_>> = parts.iter().filter(|part| !of_master(part)).collect();
    if masters.len() > 1 {
        bail!("{} open files are its master, there can be one", masters.len());
    }
    let (master, got) = open_master(index)?;
    if got != index {
        let text = "somebody else has that number: who opens the terminal by name, as programs that were told it may, gets another one";
        (opening.options.warn)(&format!("/dev/pts/{index} comes back as /dev/pts/{got}: {text}"));
    }
    pty::set_locked(master.as_fd(), false)?;
    let mut ends = Vec::new();
    for (_, tty, _) in &slaves {
        let keep = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC;
        ends.push(pty::peer(master.as_fd(), tty.flags.cast_signed() & keep)?);
    }
    // The slave's entry has them too, but for one that was never opened.
    let settings = slaves.iter().chain(&masters).find_map(|part| Some((part.2.termios.as_ref()?, part.2)));
    if let Some((termios, info)) = settings {
        pty::set_line(master.as_fd(), &line(file::terminal(master.as_fd())?.termios, termios)?)?;
        if let Some(size) = &info.winsize {
            let cells = |n: u32| u16::try_from(n).context("size of a terminal");
            let (ws_row, ws_col) = (cells(size.ws_row)?, cells(size.ws_col)?);
            let (ws_xpixel, ws_ypixel) = (cells(size.ws_xpixel)?, cells(size.ws_ypixel)?);
            pty::set_size(master.as_fd(), libc::winsize { ws_row, ws_col, ws_xpixel, ws_ypixel })?;
        }
    }
    let mut restored = None;
    for ((entry, _, info), fd) in slaves.iter().zip(ends) {
        let (uid, gid) = (info.uid.map(Uid::from_raw), info.gid.map(Gid::from_raw));
        let now = nix::sys::stat::fstat(&fd).context("fstat")?;
        if info.termios.is_some()
            && (info.uid.unwrap_or(now.st_uid), info.gid.unwrap_or(now.st_gid)) != (now.st_uid, now.st_gid)
        {
            fchown(&fd, uid, gid).context("fchown")?;
        }
        if info.exclusive {
            pty::set_exclusive(fd.as_fd())?;
        }
        if restored.is_none() {
            // Who is to be on it finds it by number, before it has a table of its own.
            opening.hold(FileId(entry.id));
            let copy = fd.try_clone().context("dup")?;
            restored = Some(Restored { own: true, ..Restored::new(info, copy) });
        }
        restored.iter_mut().for_each(|terminal| terminal.files.push(entry.id));
        opening.keep(FileId(entry.id), fd)?;
    }
    let Some((entry, tty, info)) = masters.first() else { return Ok(None) };
    if slaves.is_empty() && info.ckpt_hung_up() {
        drop(pty::peer(master.as_fd(), libc::O_RDWR)?);
    }
    if info.exclusive {
        pty::set_exclusive(master.as_fd())?;
    }
    pty::set_packets(master.as_fd(), info.packet_mode)?;
    pty::set_locked(master.as_fd(), info.locked)?;
    Opening::set_flags(master.as_fd(), tty.flags)?;
    opening.keep(FileId(entry.id), master)?;
    Ok(restored)
}

/// A new master, of the pair with this number if that is free; and its number.
fn open_master(wanted: u32) -> anyhow::Result<(OwnedFd, u32)> {
    // The kernel gives the lowest free number, so all those below are taken before it comes.
    let mut lower: Vec<(OwnedFd, u32)> = Vec::new();
    loop {
        let opened = reopen(path(b"/dev/ptmx"), libc::O_RDWR | libc::O_NOCTTY)
            .and_then(|fd| Ok((pty::number(fd.as_fd())?, fd)));
        match opened {
            Ok((number, fd)) if number == wanted => return Ok((fd, number)),
            Ok((number, fd)) if number < wanted => lower.push((fd, number)),
            Ok((number, fd)) => return Ok(lower.into_iter().next().unwrap_or((fd, number))),
            // No more descriptors, or terminals.
            Err(error) => return lower.into_iter().next().ok_or(error),
        }
    }
}

fn line(mut settings: libc::termios, wanted: &TermiosEntry) -> anyhow::Result<libc::termios> {
    settings.c_iflag = wanted.c_iflag;
    settings.c_oflag = wanted.c_oflag;
    settings.c_cflag = wanted.c_cflag;
    settings.c_lflag = wanted.c_lflag;
    settings.c_line = u8::try_from(wanted.c_line).context("line discipline")?;
    settings.c_ispeed = wanted.c_ispeed;
    settings.c_ospeed = wanted.c_ospeed;
    for (now, &wanted) in settings.c_cc.iter_mut().zip(&wanted.c_cc).take(CONTROL_CHARACTERS) {
        *now = u8::try_from(wanted).context("control character")?;
    }
    Ok(settings)
}
