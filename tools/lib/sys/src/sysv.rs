//! System V shared memory (sysvipc(7), shmget(2), shmctl(2), shmat(2)) of the caller's IPC namespace.

use std::{fs, os::fd::OwnedFd, path::Path};

use nix::errno::Errno;

use crate::{SysError, capability, file};

/// Bit of [`State::mode`]: removed, and gone with the last who detaches.
pub const DEST: u32 = 0o1000;
/// Bit of [`State::mode`]: kept in memory (SHM_LOCK).
pub const LOCKED: u32 = 0o2000;

/// What shmctl(IPC_STAT) tells of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Its key; 0 if it is private or removed.
    pub key: i32,
    /// Bytes.
    pub size: u64,
    /// Permissions, [`DEST`], [`LOCKED`].
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// How many mappings there are of it.
    pub attached: u64,
}

fn on(id: i32) -> String {
    format!("System V shared memory {id}")
}

/// The state of segment `id`; `None` if there is no such one.
///
/// # Errors
/// EACCES.
pub fn state(id: i32) -> Result<Option<State>, SysError> {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one shmid_ds.
    if unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) } < 0 {
        return match Errno::last() {
            Errno::EINVAL | Errno::EIDRM => Ok(None),
            errno => Err(SysError::new("shmctl(IPC_STAT)", on(id), errno)),
        };
    }
    Ok(Some(State {
        key: ds.shm_perm.__key,
        size: ds.shm_segsz as u64,
        mode: u32::from(ds.shm_perm.mode),
        uid: ds.shm_perm.uid,
        gid: ds.shm_perm.gid,
        attached: ds.shm_nattch,
    }))
}

/// Makes a segment with the id `id`, created by `uid` and `gid` as far as the caller may say so. `huge`: 0, or
/// SHM_HUGETLB and the size of its pages.
///
/// # Errors
/// EEXIST: the key or the id is taken. EPERM or EACCES: choosing an id takes CAP_CHECKPOINT_RESTORE. ENOENT: the kernel
/// has no CONFIG_CHECKPOINT_RESTORE. ENOSPC, ENOMEM; EINVAL: there are no pages of this size.
pub fn create(id: i32, key: i32, size: u64, (uid, gid): (u32, u32), huge: u32) -> Result<(), SysError> {
    const NEXT: &str = "/proc/sys/kernel/shm_next_id";
    let size = usize::try_from(size).map_err(|_| SysError::new("shmget", on(id), Errno::EINVAL))?;
    let tell = |error: std::io::Error| {
        SysError::new(
            "write /proc/sys/kernel/shm_next_id",
            on(id),
            Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        )
    };
    // Somebody else may make a segment between the two calls, and get the id.
    for _ in 0..8 {
        fs::write(NEXT, id.to_string()).map_err(tell)?;
        // A thread of its own, since credentials belong to threads and a segment has its creator's.
        let made = std::thread::spawn(move || {
            // SAFETY: the bare calls change this thread alone, which ends with this closure; they touch no memory.
            unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) };
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
            // Another user may not make segments of huge pages, unless this thread still may (CAP_IPC_LOCK).
            if huge != 0 {
                let _ = capability::raise_permitted();
            }
            let flags = libc::IPC_CREAT | libc::IPC_EXCL | huge.cast_signed() | 0o600;
            // SAFETY: shmget takes integers.
            let made = unsafe { libc::shmget(key, size, flags) };
            if made < 0 { Err(Errno::last()) } else { Ok(made) }
        })
        .join()
        .unwrap_or(Err(Errno::EIO))
        .map_err(|errno| SysError::new("shmget", on(id), errno))?;
        if made == id {
            return Ok(());
        }
        remove(made)?;
        if state(id)?.is_some() {
            break;
        }
    }
    Err(SysError::new("shmget", on(id), Errno::EEXIST))
}

/// Gives segment `id` its owner and permissions, and locks it if `mode` has [`LOCKED`].
///
/// # Errors
/// EPERM.
pub fn set(id: i32, (uid, gid): (u32, u32), mode: u32) -> Result<(), SysError> {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    (ds.shm_perm.uid, ds.shm_perm.gid) = (uid, gid);
    ds.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: IPC_SET reads one shmid_ds.
    if unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut ds) } < 0 {
        return Err(SysError::last("shmctl(IPC_SET)", on(id)));
    }
    let command = if mode & LOCKED != 0 { SHM_LOCK } else { SHM_UNLOCK };
    // SAFETY: these commands read and write nothing.
    if unsafe { libc::shmctl(id, command, std::ptr::null_mut()) } < 0 {
        return Err(SysError::last("shmctl(SHM_LOCK)", on(id)));
    }
    Ok(())
}

/// linux/shm.h
const SHM_LOCK: i32 = 11;
const SHM_UNLOCK: i32 = 12;

/// Marks segment `id` as removed.
///
/// # Errors
/// EPERM, EINVAL (it is gone).
pub fn remove(id: i32) -> Result<(), SysError> {
    // SAFETY: IPC_RMID reads and writes nothing.
    let ret = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    if ret < 0 { Err(SysError::last("shmctl(IPC_RMID)", on(id))) } else { Ok(()) }
}

/// A segment that this process is attached to, until this is dropped.
#[derive(Debug)]
pub struct Attached {
    at: usize,
    /// Its memory as an open file, as /proc/self/map_files gives it.
    pub memory: OwnedFd,
}

impl Attached {
    /// Attaches to segment `id`, which has `size` bytes in pages of `page` bytes.
    ///
    /// # Errors
    /// EACCES, EINVAL; EPERM: opening map_files takes CAP_CHECKPOINT_RESTORE. ENOENT: its pages have another size.
    pub fn to(id: i32, size: u64, page: u64) -> Result<Self, SysError> {
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe { libc::shmat(id, std::ptr::null(), 0) } as usize;
        if start == usize::MAX {
            return Err(SysError::last("shmat", on(id)));
        }
        let end = start as u64 + size.next_multiple_of(page.max(1));
        let path = format!("/proc/self/map_files/{start:x}-{end:x}");
        match file::open(Path::new(&path), libc::O_RDWR.cast_unsigned(), 0) {
            Ok(memory) => Ok(Self { at: start, memory }),
            Err(error) => {
                detach(start);
                Err(error)
            }
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        detach(self.at);
    }
}

fn detach(at: usize) {
    // SAFETY: `at` is where shmat mapped it, nothing points into it, and nobody unmaps it but its one owner.
    unsafe { libc::shmdt(at as *const libc::c_void) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_has_the_id_that_was_asked_for() {
        // Of a slot far from those that others get, with a sequence number.
        let id = 3 << 15 | 3000;
        if create(id, 0, 5000, (0, 0), 0).is_err() {
            return;
        }
        let attached = Attached::to(id, 5000, 4096).unwrap();
        set(id, (7, 8), 0o640).unwrap();
        nix::sys::uio::pwrite(&attached.memory, b"x", 4999).unwrap();
        remove(id).unwrap();
        let state = super::state(id).unwrap().unwrap();
        // A child that another test makes meanwhile is attached too.
        let attached_by = state.attached;
        let expected =
            State { key: 0, size: 5000, mode: 0o640 | DEST, uid: 7, gid: 8, attached: attached_by };
        assert_eq!(state, expected);
        assert!(attached_by >= 1);
        assert!(create(id, 0, 5000, (0, 0), 0).is_err());
        drop(attached);
        let gone = (0..5000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            super::state(id).unwrap().is_none()
        });
        assert!(gone);
    }
}
