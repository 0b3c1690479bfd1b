//! The names of sockets, at restore: files and abstract names that they are bound to.
//!
//! A socket that has a file is reached through a descriptor of that, `/proc/self/fd/N`, which works whatever has become of
//! the path.

use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ckpt_proto::types::UnixSkEntry;
use ckpt_sys::{
    Refused,
    sock::{self, trim_path},
};
use nix::errno::Errno;

use super::{Sockets, new_socket, what};
use crate::fd::{Opening, dump::path};

impl Sockets {
    /// Binds a socket to its name if it has one.
    pub(super) fn bind(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &UnixSkEntry,
        fd: &OwnedFd,
    ) -> anyhow::Result<()> {
        let name = trim_path(&usk.name);
        if name.is_empty() {
            return Ok(());
        }
        let Some(file) = socket_path(usk) else { return Ok(sock::bind_unix(fd.as_fd(), &usk.name)?) };
        let ino = u64::from(usk.ino);
        let deleted = usk.deleted == Some(true);
        if deleted && let Some(handle) = self.others.bind_apart(fd.as_fd(), name)? {
            self.handles.insert(ino, handle);
            return Ok(());
        }
        remove_stale(usk, &file)?;
        with_directory(usk, |name| Ok(sock::bind_unix(fd.as_fd(), name)?))?;
        let made = opening.created(file.clone(), false);
        self.handles.insert(ino, open_handle(&file)?);
        if let Some(perms) = &usk.file_perms {
            let set = || -> std::io::Result<()> {
                std::os::unix::fs::chown(&file, Some(perms.uid), Some(perms.gid))?;
                fs::set_permissions(&file, fs::Permissions::from_mode(perms.mode & 0o7777))
            };
            set().with_context(|| format!("owner and mode of {}", file.display()))?;
        }
        if deleted {
            opening.remove_created(made);
            return Ok(());
        }
        let moved = usk.ckpt_file.as_deref().map(|moved| path(moved).to_owned());
        if let Some(moved) = &moved {
            remove_stale(usk, moved)?;
            fs::rename(&file, moved)
                .with_context(|| format!("rename {} to {}", file.display(), moved.display()))?;
        }
        opening.keep_socket(made, moved.unwrap_or(file));
        Ok(())
    }

    /// Like [`Self::bind`], for a socket that only happens to have a name: left out, and told, if somebody has
    /// it now.
    pub(super) fn bind_if_free(
        &mut self,
        opening: &mut Opening<'_>,
        usk: &UnixSkEntry,
        fd: &OwnedFd,
    ) -> anyhow::Result<()> {
        let warn = opening.options.warn;
        let taken = || warn(&format!("{}: its name is taken, it comes back without one", what(usk)));
        if socket_path(usk).is_some_and(|file| fs::symlink_metadata(file).is_ok()) {
            taken();
            return Ok(());
        }
        match self.bind(opening, usk, fd) {
            Err(e)
                if e.downcast_ref::<ckpt_sys::SysError>().is_some_and(|e| e.errno == Errno::EADDRINUSE) =>
            {
                taken();
                Ok(())
            }
            other => other,
        }
    }

    /// The address under which socket `ino` is reached now; empty if it has none.
    pub(super) fn address_of(&self, ino: u64) -> anyhow::Result<Vec<u8>> {
        if let Some(handle) = self.handles.get(&ino) {
            return Ok(handle_name(handle));
        }
        match self.made.get(&ino) {
            // Handed in.
            Some(fd) if self.given.contains(&ino) => Ok(sock::unix_name(fd.as_fd(), sock::Side::Local)?),
            _ => Ok(self.entry(ino)?.name.clone()),
        }
    }
}

pub(super) fn handle_name(handle: &OwnedFd) -> Vec<u8> {
    format!("/proc/self/fd/{}", handle.as_raw_fd()).into_bytes()
}

/// The file of a socket, to reach it by.
pub(super) fn open_handle(file: &Path) -> anyhow::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    Ok(ckpt_sys::file::open(file, flags.cast_unsigned(), 0)?)
}

/// Runs `f` with the name of `usk`, in the directory that a relative one was relative to.
pub(super) fn with_directory<T>(
    usk: &UnixSkEntry,
    f: impl FnOnce(&[u8]) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let name = trim_path(&usk.name);
    let Some(directory) =
        usk.name_dir.as_ref().filter(|_| name.first().is_some_and(|&b| b != 0 && b != b'/'))
    else {
        return f(name);
    };
    let before = fs::File::open(".").context("open the current directory")?;
    let directory = path(trim_path(directory));
    nix::unistd::chdir(directory).with_context(|| format!("chdir {}", directory.display()))?;
    let result = f(name);
    nix::unistd::fchdir(&before).context("fchdir")?;
    result
}

/// The path of a socket file, absolute; `None` for other names.
pub(super) fn socket_path(usk: &UnixSkEntry) -> Option<PathBuf> {
    let name = trim_path(&usk.name);
    name.first().filter(|&&b| b != 0)?;
    let directory = usk.name_dir.as_ref().map_or(PathBuf::new(), |d| path(trim_path(d)).to_owned());
    Some(directory.join(path(name)))
}

/// Removes a socket file that nobody listens at. Anything else in its place is an error.
pub(super) fn remove_stale(usk: &UnixSkEntry, file: &Path) -> anyhow::Result<()> {
    let Ok(found) = fs::symlink_metadata(file) else { return Ok(()) };
    if !found.file_type().is_socket() {
        bail!("{}: a file is in the way that is no socket", file.display());
    }
    let probe = new_socket(usk)?;
    ckpt_sys::file::set_flags(probe.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
    match sock::connect_unix(probe.as_fd(), file.as_os_str().as_bytes()) {
        Err(e) if e.errno == Errno::ECONNREFUSED => {
            fs::remove_file(file).with_context(|| format!("remove the stale {}", file.display()))
        }
        Err(e) if e.errno == Errno::ENOENT => Ok(()),
        Ok(()) | Err(_) => {
            let reason = "another process has a socket there";
            Err(Refused::new(file.display().to_string(), reason).advise("end it, or move its socket").into())
        }
    }
}
