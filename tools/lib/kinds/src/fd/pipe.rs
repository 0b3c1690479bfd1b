//! Pipes and FIFOs (pipe(7)).
//!
//! A pipe has an inode, which is its id in the images, a size, bytes in flight, and two ends, each of
//! which any number of open files may be. What is in flight is copied by tee(2) into a pipe of ours:
//! that takes nothing out. Packets (`O_DIRECT`) lose their boundaries in the images, so a pipe in
//! packet mode has to be empty.
//!
//! If only one end is in the tree, either nobody holds the other (poll(2) tells by POLLHUP or
//! POLLERR; it is restored like that), or somebody outside does. The tree can't be restored with a
//! pipe to nowhere in place of that, so this is refused unless the user says `--external pipe:[ID]`
//! and hands in a pipe at restore.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, bail};
use ckpt_images::ImageSet;
use ckpt_proto::{
    Image,
    types::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, PipeEntry},
};
use ckpt_sys::{FileId, Pid, Refused, TargetFd, file, pidfd};
use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::SFlag,
};

use super::{
    Descriptor, External, FileTable, Opening,
    dump::{find_holders, reopen, self_path},
    reg,
};
use crate::{Sink, sink::emit};

/// The kernel's default size; a pipe that has it and is empty needs no data entry.
const DEFAULT_SIZE: i32 = 65536;
const ACCESS: u32 = libc::O_ACCMODE.cast_unsigned();

/// The pipes of a tree.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    pipes: BTreeMap<(u64, u64), Pipe>,
}

#[derive(Debug)]
struct Pipe {
    /// Shortened to what the images have room for.
    id: u32,
    /// Path of a FIFO, `pipe:[ID]` of a pipe.
    link: Vec<u8>,
    fifo: bool,
    readers: bool,
    writers: bool,
    ends: Vec<PipeEntry>,
    /// Who was met first, for messages.
    subject: String,
    /// Where an end of it is open.
    place: (Pid, TargetFd),
    packets: bool,
}

impl Pipe {
    /// The same open file. Not kept: a tree can have more pipes than one process may have files open.
    fn copy(&self) -> anyhow::Result<OwnedFd> {
        let (pid, fd) = self.place;
        let copy = pidfd::open(pid).and_then(|task| pidfd::getfd(task.as_fd(), fd));
        copy.with_context(|| self.subject.clone())
    }
}

/// Which ends a file with these flags is.
fn ends(flags: u32) -> (bool, bool) {
    match flags & ACCESS {
        0 => (true, false),
        1 => (false, true),
        _ => (true, true),
    }
}

fn pipe_id(d: &Descriptor) -> anyhow::Result<u32> {
    u32::try_from(d.stat.st_ino).map_err(|_| d.refuse("its inode does not fit into the images").into())
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is(SFlag::S_IFIFO) && d.link.starts_with(b"pipe:[")
}

pub(super) fn recognise_fifo(d: &Descriptor) -> bool {
    d.is(SFlag::S_IFIFO)
}

fn note<'a>(table: &'a mut FileTable, d: &Descriptor, fifo: bool) -> anyhow::Result<&'a mut Pipe> {
    let (reads, writes) = ends(d.flags());
    let id = pipe_id(d)?;
    let pipe = table.pipes.pipes.entry(d.inode()).or_insert_with(|| Pipe {
        id,
        link: d.link.clone(),
        fifo,
        readers: false,
        writers: false,
        ends: Vec::new(),
        subject: d.subject(),
        place: (d.pid, d.fd),
        packets: false,
    });
    pipe.readers |= reads;
    pipe.writers |= writes;
    pipe.packets |= d.flags() & libc::O_DIRECT.cast_unsigned() != 0;
    Ok(pipe)
}

/// The entry waits until both ends had a chance to be met.
pub(super) fn dump(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let entry =
        PipeEntry { id: id.0, pipe_id: pipe_id(d)?, flags: d.flags(), fown: d.fown()?, ckpt_external: None };
    note(table, d, false)?.ends.push(entry);
    Ok(None)
}

/// A FIFO has two entries: its name as a file, and one that joins the name to what is in flight.
pub(super) fn dump_fifo(
    table: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    sink: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let name_id = table.new_id();
    let fields = reg::Fields { flags: d.flags(), pos: 0, fown: d.fown()? };
    let (subject, proc_path) = (d.subject(), d.proc_path());
    let found =
        reg::Found { subject: &subject, link: &d.link, stat: &d.stat, proc_path: &proc_path, mapped: false };
    let entry = reg::dump_found(table, &found, name_id, fields, sink)?;
    table.emit_entry(&entry, sink)?;
    let pipe = note(table, d, true)?;
    let fifo = FifoEntry { id: id.0, pipe_id: pipe.id, regf_id: Some(name_id.0) };
    Ok(Some(FileEntry { r#type: FdTypes::Fifo.into(), id: id.0, fifo: Some(fifo), ..FileEntry::default() }))
}

/// Who outside the tree holds the end that the tree does not.
fn outside(table: &FileTable, pipe: &Pipe) -> Option<(Pid, String)> {
    // The permissions of a link in /proc/PID/fd are the open file's access mode.
    let wanted = if pipe.fifo || pipe.readers == pipe.writers {
        0o600
    } else if pipe.readers {
        0o200
    } else {
        0o400
    };
    find_holders(|link| link == pipe.link).into_iter().find_map(|(pid, comm, fd, _)| {
        let mode = nix::sys::stat::lstat(format!("/proc/{pid}/fd/{fd}").as_str()).ok()?.st_mode;
        let own = pid.0.unsigned_abs() == std::process::id();
        // Our copies of a FIFO do not count; those of a pipe are of the end that the tree holds.
        let inside = table.tree.contains(&pid) || own && wanted == 0o600;
        (!inside && mode & wanted != 0).then_some((pid, comm))
    })
}

/// Whether anybody holds the end that the tree does not.
fn other_end_is_held(pipe: &Pipe) -> anyhow::Result<bool> {
    let events = if pipe.readers { PollFlags::POLLIN } else { PollFlags::POLLOUT };
    let copy = pipe.copy()?;
    let mut fds = [PollFd::new(copy.as_fd(), events)];
    poll(&mut fds, PollTimeout::ZERO).context("poll")?;
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    Ok(!fds[0].revents().unwrap_or(PollFlags::empty()).intersects(gone))
}

fn name(pipe: &Pipe) -> String {
    pipe.link.escape_ascii().to_string()
}

/// Decides on half pipes, writes entries and what is in flight.
pub(super) fn finish(table: &mut FileTable, sink: &mut dyn Sink) -> anyhow::Result<()> {
    let pipes = std::mem::take(&mut table.pipes.pipes);
    for external in &table.options.external {
        let External::Pipe(id) = external else { continue };
        if !pipes.values().any(|p| !p.fifo && u64::from(p.id) == *id) {
            let there: Vec<String> = pipes.values().filter(|p| !p.fifo).map(name).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(" ") };
            bail!("--external pipe:[{id}]: the tree has no such pipe; those that it has: {there}");
        }
    }
    for pipe in pipes.into_values() {
        let half = pipe.readers != pipe.writers;
        let marked = table.options.external.contains(&External::Pipe(pipe.id.into())) && !pipe.fifo;
        if marked && !half {
            let what = format!("--external {}: both ends are inside the tree", name(&pipe));
            return Err(Refused::new(pipe.subject, what).advise("leave the option out").into());
        }
        let external = half && marked;
        if half && !external && other_end_is_held(&pipe)? || pipe.fifo {
            check_outside(table, &pipe, half)?;
        }
        for mut end in pipe.ends.iter().cloned() {
            end.ckpt_external = external.then_some(true);
            let id = end.id;
            let entry =
                FileEntry { r#type: FdTypes::Pipe.into(), id, pipe: Some(end), ..FileEntry::default() };
            emit(sink, Image::Files, 0, &entry)?;
        }
        if pipe.readers && !external {
            dump_contents(&pipe, sink)?;
        }
    }
    Ok(())
}

fn check_outside(table: &FileTable, pipe: &Pipe, half: bool) -> anyhow::Result<()> {
    let what = if pipe.fifo { "FIFO" } else { "pipe" };
    let holder = match outside(table, pipe) {
        Some((pid, comm)) => format!("pid {pid} ({comm})"),
        None if half && !pipe.fifo => "somebody".to_owned(),
        None => return Ok(()),
    };
    let end = match (pipe.fifo, pipe.readers) {
        (true, _) => "it is also open in",
        (false, true) => "its writing end is held by",
        (false, false) => "its reading end is held by",
    };
    let refused = Refused::new(
        pipe.subject.clone(),
        format!("{what} {}: {end} {holder}, which is outside the tree", name(pipe)),
    );
    let advice = if pipe.fifo {
        "dump that process too (ckpt-scan -t), or end it".to_owned()
    } else {
        format!(
            "pass --external {0} (ckpt-scan) and at restore --inherit-fd fd[N]:{0}, or dump that process too",
            name(pipe)
        )
    };
    Err(refused.advise(advice).into())
}

fn dump_contents(pipe: &Pipe, sink: &mut dyn Sink) -> anyhow::Result<()> {
    let what = || format!("{}: {}", pipe.subject, name(pipe));
    let copy = pipe.copy()?;
    let size = fcntl(&copy, FcntlArg::F_GETPIPE_SZ).with_context(what)?;
    // An end for reading, whichever end the copy is; a new open file, so that flags are our own.
    let reader = reopen(&self_path(copy.as_fd()), libc::O_RDONLY | libc::O_NONBLOCK).with_context(what)?;
    let bytes = file::readable_bytes(reader.as_fd()).with_context(what)?;
    if bytes == 0 && size == DEFAULT_SIZE {
        return Ok(());
    }
    if bytes > 0 && pipe.packets {
        let reason = format!("{} is in packet mode (O_DIRECT) and holds {bytes} bytes", name(pipe));
        return Err(Refused::new(pipe.subject.clone(), reason).advise("checkpoint when it is empty").into());
    }
    let image = if pipe.fifo { Image::FifoData } else { Image::PipesData };
    let entry = PipeDataEntry { pipe_id: pipe.id, bytes, size: u32::try_from(size).ok() };
    emit(sink, image, 0, &entry)?;
    if bytes == 0 {
        return Ok(());
    }
    let (from, to) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("pipe2")?;
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(size))
        .with_context(|| format!("{}: F_SETPIPE_SZ of a copy", what()))?;
    let copied = tee(&reader, &to, bytes as usize, SpliceFFlags::SPLICE_F_NONBLOCK)
        .with_context(|| format!("{}: tee", what()))?;
    if copied != bytes as usize {
        bail!("{}: {copied} of {bytes} bytes could be copied", what());
    }
    sink.data_from(image, 0, from.as_fd(), bytes.into())
}

/// What is in flight in pipe `id`: its bytes, and the size if it is told.
fn contents(set: &ImageSet, image: Image, id: u32) -> anyhow::Result<Option<(Vec<u8>, Option<u32>)>> {
    let all: Vec<PipeDataEntry> = set.all(image, 0)?;
    let Some((index, entry)) = all.iter().enumerate().find(|(_, e)| e.pipe_id == id) else { return Ok(None) };
    let bytes = set.payload_bytes(image, 0, index, entry.bytes.into())?;
    Ok(Some((bytes, entry.size)))
}

fn fill(set: &ImageSet, image: Image, id: u32, writer: &OwnedFd) -> anyhow::Result<()> {
    let Some((bytes, size)) = contents(set, image, id)? else { return Ok(()) };
    if let Some(size) = size {
        let size = i32::try_from(size).with_context(|| format!("{}: size {size}", image.name()))?;
        fcntl(writer, FcntlArg::F_SETPIPE_SZ(size))
            .with_context(|| format!("pipe {id}: F_SETPIPE_SZ {size}"))?;
    }
    file::set_flags(writer.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let n = nix::unistd::write(writer, rest)
            .with_context(|| format!("pipe {id}: put {} bytes back in flight", rest.len()))?;
        rest = rest.get(n..).unwrap_or_default();
    }
    Ok(())
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let mut pipes: BTreeMap<u32, Vec<&PipeEntry>> = BTreeMap::new();
    for entry in entries {
        let pipe = entry.pipe.as_ref().context("a pipe without its entry")?;
        pipes.entry(pipe.pipe_id).or_default().push(pipe);
    }
    for (id, ends) in pipes {
        restore_one(opening, id, &ends).with_context(|| format!("pipe:[{id}]"))?;
    }
    Ok(())
}

fn restore_one(opening: &mut Opening<'_>, id: u32, all: &[&PipeEntry]) -> anyhow::Result<()> {
    let name = format!("pipe:[{id}]");
    if let Some(given) = opening.inherited(&name)? {
        let mode = nix::sys::stat::fstat(&given).context("fstat")?.st_mode;
        if SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) != SFlag::S_IFIFO {
            bail!("the descriptor given with --inherit-fd is no pipe");
        }
        for end in all {
            let fd = open_end(&given, end.flags)?;
            opening.keep(FileId(end.id), fd)?;
        }
        return Ok(());
    }
    if all.iter().any(|e| e.ckpt_external == Some(true)) {
        let advice = format!("pass --inherit-fd fd[N]:{name}, N being an open descriptor of a pipe");
        return Err(Refused::new(name, "its other end was outside the checkpoint").advise(advice).into());
    }
    let packets = all.iter().any(|e| e.flags & libc::O_DIRECT.cast_unsigned() != 0);
    let mut made = OFlag::O_CLOEXEC;
    made.set(OFlag::O_DIRECT, packets);
    let (reader, writer) = nix::unistd::pipe2(made).context("pipe2")?;
    fill(opening.set, Image::PipesData, id, &writer)?;
    // The first open file of each end is what pipe2 made; further ones are opened through it.
    let is_writer = |end: &&&PipeEntry| end.flags & ACCESS == 1;
    let is_reader = |end: &&&PipeEntry| end.flags & ACCESS == 0;
    let first_reader = all.iter().find(is_reader).map(|e| e.id);
    let first_writer = all.iter().find(is_writer).map(|e| e.id);
    for end in all.iter().filter(|e| ![first_reader, first_writer].contains(&Some(e.id))) {
        let fd = open_end(&reader, end.flags)?;
        opening.keep(FileId(end.id), fd)?;
    }
    for (end, fd) in [(all.iter().find(is_reader), reader), (all.iter().find(is_writer), writer)] {
        if let Some(end) = end {
            file::set_flags(fd.as_fd(), end.flags & !(ACCESS | libc::O_ASYNC.cast_unsigned()))?;
            opening.keep(FileId(end.id), fd)?;
        }
    }
    Ok(())
}

/// A new open file on the pipe behind `pipe`.
fn open_end(pipe: &OwnedFd, flags: u32) -> anyhow::Result<OwnedFd> {
    // Opening must not wait for the other end.
    let fd = reopen(&self_path(pipe.as_fd()), (flags & ACCESS).cast_signed() | libc::O_NONBLOCK)?;
    file::set_flags(fd.as_fd(), flags & !(ACCESS | libc::O_ASYNC.cast_unsigned()))?;
    Ok(fd)
}

pub(super) fn restore_fifos(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    let mut holders: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    for entry in entries {
        let fifo = entry.fifo.as_ref().context("a FIFO without its entry")?;
        let name = fifo.regf_id.context("a FIFO without a name")?;
        let reg = opening.reg(FileId(name))?.clone();
        let what = || format!("FIFO {}", reg.name.escape_ascii());
        if let Entry::Vacant(place) = holders.entry(fifo.pipe_id) {
            let handle = reg::open_handle(opening, &reg).with_context(what)?;
            let mode = nix::sys::stat::fstat(&handle).context("fstat")?.st_mode;
            if SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) != SFlag::S_IFIFO {
                bail!("{}: it is no FIFO any more", what());
            }
            let holder =
                reopen(&self_path(handle.as_fd()), libc::O_RDWR | libc::O_NONBLOCK).with_context(what)?;
            fill(opening.set, Image::FifoData, fifo.pipe_id, &holder).with_context(what)?;
            place.insert(holder);
        }
        if let Some(holder) = holders.get(&fifo.pipe_id) {
            let fd = open_end(holder, reg.flags).with_context(what)?;
            opening.keep(FileId(entry.id), fd)?;
            opening.note_owner(FileId(entry.id), reg.flags, &reg.fown);
        }
    }
    Ok(())
}
