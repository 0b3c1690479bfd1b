//! inotify(7): watches on files.
//!
//! `fdinfo` tells of a watch its number, mask, and the watched file by device, inode and handle, not by name. A name
//! comes from opening the handle (open_by_handle_at(2)) and asking where the descriptor leads. It goes into
//! `fh_entry.path`, where CRIU puts the names that it finds.
//!
//! The program knows watches by their numbers, which the kernel gives out in rising order and does not take. So numbers
//! that are not wanted are passed over by watches that are removed at once; the events that tell of that
//! (`IN_IGNORED`) are read before the instance is handed on. Events that wait to be read can't be made again and
//! are refused.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_proc::fdinfo::{InotifyWatch, Special};
use ckpt_proto::types::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};
use ckpt_sys::{FileId, Refused, file};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use super::{
    Descriptor, FileTable, Opening,
    dump::{kernel_dev, read_link, self_path},
};
use crate::Sink;

/// Most numbers that are passed over: more take longer than anybody waits.
const PASSED_OVER: u32 = 1 << 22;

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("inotify")
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let watches = match &d.info.special {
        Special::Inotify(watches) => watches.as_slice(),
        _ => &[],
    };
    let waiting = file::readable_bytes(d.copy.as_fd())?;
    if waiting > 0 {
        let reason = format!("{waiting} bytes of events wait to be read, which can't be made again");
        return Err(d.refuse(reason).advise("checkpoint when they have been read").into());
    }
    let mut wd = Vec::new();
    for watch in watches {
        wd.push(InotifyWdEntry {
            id: id.0,
            i_ino: watch.ino,
            mask: watch.mask,
            ignored_mask: 0,
            s_dev: watch.dev,
            wd: watch.wd,
            f_handle: FhEntry {
                bytes: u32::try_from(watch.handle.len()).context("length of a handle")?,
                r#type: watch.handle_type.cast_unsigned(),
                handle: watch.handle.chunks(8).map(word).collect(),
                path: Some(name(d, watch)?),
                mnt_id: None,
            },
        });
    }
    wd.sort_by_key(|w| w.wd);
    let ify = InotifyFileEntry { id: id.0, flags: d.flags(), fown: d.fown()?, wd };
    Ok(Some(FileEntry { r#type: FdTypes::Inotify.into(), id: id.0, ify: Some(ify), ..FileEntry::default() }))
}

/// Up to eight bytes, the first ones lowest.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// A path of the watched file.
fn name(d: &Descriptor, watch: &InotifyWatch) -> anyhow::Result<String> {
    let which = format!("watch {} (inode {})", watch.wd, watch.ino);
    let refuse = |reason: &str| d.refuse(format_args!("{which}: {reason}"));
    if watch.handle.is_empty() {
        return Err(refuse("its file system has no handles, so its name can't be found").into());
    }
    let file = match open(watch) {
        Ok(Some(file)) => file,
        Ok(None) => return Err(refuse("its file system is not mounted here").into()),
        Err(e) if e.errno == Errno::EPERM => {
            return Err(refuse("finding its name needs CAP_DAC_READ_SEARCH").into());
        }
        Err(e) if e.errno == Errno::ESTALE => return Err(refuse("its file is deleted").into()),
        Err(e) => return Err(anyhow::Error::from(e).context(which)),
    };
    let path = read_link(&self_path(file.as_fd()))?;
    let found = nix::sys::stat::lstat(super::dump::path(&path));
    if !found.is_ok_and(|s| s.st_ino == watch.ino && kernel_dev(s.st_dev) == watch.dev) {
        return Err(refuse(&format!("it has no name here any more ({})", path.escape_ascii())).into());
    }
    String::from_utf8(path).map_err(|_| refuse("its name is not UTF-8, as the images want it").into())
}

/// Opens a watched file by its handle, on any mount of its file system.
fn open(watch: &InotifyWatch) -> Result<Option<OwnedFd>, ckpt_sys::SysError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let device = format!("{}:{}", watch.dev >> 20, watch.dev & 0xf_ffff);
    let mut failed = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(2);
        let (Some(dev), Some(point)) = (fields.next(), fields.nth(1)) else { continue };
        let point = PathBuf::from(unescaped(point));
        // Subvolumes have devices of their own, which mountinfo does not tell.
        let same = |s: nix::sys::stat::FileStat| kernel_dev(s.st_dev) == watch.dev;
        if dev != device && !nix::sys::stat::stat(&point).is_ok_and(same) {
            continue;
        }
        match file::open_by_handle(&point, watch.handle_type, &watch.handle) {
            Ok(file) => return Ok(Some(file)),
            Err(e) => failed = Some(e),
        }
    }
    failed.map_or(Ok(None), Err)
}

/// A mount point as mountinfo writes it: `\040` is a blank.
fn unescaped(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let ify = entry.ify.as_ref().context("an inotify instance without its entry")?;
        let what = format!("inotify instance {}", ify.id);
        let instance =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init1")?;
        let mut watches: Vec<&InotifyWdEntry> = ify.wd.iter().collect();
        watches.sort_by_key(|w| w.wd);
        let mut next = 1;
        for watch in watches {
            let path = path_of(watch, &what)?;
            pass_over(&instance, next, watch.wd).with_context(|| what.clone())?;
            let got = add(instance.as_fd(), &path, watch.mask)
                .with_context(|| format!("{what}: watch {}", path.display()))?;
            if got != watch.wd.cast_signed() {
                bail!("{what}: {} got watch {got}, not {}: is it watched twice?", path.display(), watch.wd);
            }
            next = watch.wd + 1;
        }
        while !matches!(instance.read_events(), Err(Errno::EAGAIN)) {}
        Opening::set_flags(instance.as_fd(), ify.flags)?;
        opening.keep(FileId(entry.id), instance.into())?;
    }
    Ok(())
}

fn path_of(watch: &InotifyWdEntry, what: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = &watch.f_handle.path {
        return Ok(path.into());
    }
    // CRIU stores no name where it does not need one.
    let bytes = usize::try_from(watch.f_handle.bytes).unwrap_or(usize::MAX);
    let mut handle: Vec<u8> = watch.f_handle.handle.iter().flat_map(|w| w.to_le_bytes()).collect();
    handle.truncate(bytes);
    let (ino, dev, handle_type) = (watch.i_ino, watch.s_dev, watch.f_handle.r#type.cast_signed());
    let known = InotifyWatch { wd: watch.wd, ino, dev, mask: watch.mask, handle_type, handle };
    let file = open(&known).ok().flatten().ok_or_else(|| {
        Refused::new(what, format!("the file of watch {} (inode {ino}) is not here", watch.wd))
    })?;
    Ok(super::dump::path(&read_link(&self_path(file.as_fd()))?).to_owned())
}

/// inotify_add_watch(2); of a symbolic link the link itself is watched, since that is what was found.
fn add(instance: BorrowedFd<'_>, path: &Path, mask: u32) -> anyhow::Result<i32> {
    Ok(file::watch(instance, path, mask | AddWatchFlags::IN_DONT_FOLLOW.bits())?)
}

/// Uses up the numbers from `next` to before `wanted`.
fn pass_over(instance: &Inotify, next: u32, wanted: u32) -> anyhow::Result<()> {
    if wanted == 0 || wanted.saturating_sub(next) > PASSED_OVER {
        bail!("watch number {wanted} after {next}: too far away");
    }
    for number in next..wanted {
        // A file that is watched already would keep its number; this one is nobody's choice.
        let got = add(instance.as_fd(), Path::new("/proc/self/stat"), AddWatchFlags::IN_MODIFY.bits())?;
        file::unwatch(instance.as_fd(), got)?;
        if got != number.cast_signed() {
            bail!("a new watch got number {got}, not {number}");
        }
        // The queue takes 16384 events by default (fs.inotify.max_queued_events).
        if number % 1024 == 0 {
            while !matches!(instance.read_events(), Err(Errno::EAGAIN)) {}
        }
    }
    Ok(())
}
