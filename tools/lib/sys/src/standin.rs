//! Stand-ins: short-lived processes that make calls on unix sockets in the name of somebody who is gone.
//!
//! The kernel notes with a socket who called socketpair(2), connect(2) or listen(2) on it (SO_PEERCRED,
//! unix(7)): the caller's pid, effective ids and supplementary groups of that moment. There is no call
//! that sets them. But a process can be made with the pid (clone3(2) with `set_tid`), ids and groups that
//! are wanted, and shares our descriptor table (CLONE_FILES), so that what it does to a socket is done to
//! ours. The kernel keeps the pid with the socket, so the number is still told when the
//! stand-in has ended.
//!
//! A stand-in keeps uid 0 as its saved id and file system id, so that permissions of socket files are
//! those of this process; only what the kernel notes is the other's.
//!
//! It can also bind *apart*: in a tmpfs that nobody else sees, with the name as it would be seen
//! from a root directory of its own. That gives a socket any path as its name without touching the file
//! system: one that was deleted, or where another socket is now. It is reached through a descriptor of
//! the file (O_PATH) as `/proc/self/fd/N`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
};

use crate::{Pid, SysError, clone::CloneArgs, pidfd};

/// Ids that a stand-in has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    /// Real and effective user id.
    pub uid: u32,
    /// Real and effective group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A stand-in. It ends when this is dropped, or this thread ends.
#[derive(Debug)]
pub struct StandIn {
    pid: Pid,
    handle: OwnedFd,
    line: OwnedFd,
    // Shared with the stand-in, which takes its orders from it: it must not be closed earlier.
    _theirs: OwnedFd,
}

const PAIR: i32 = 1;
const LISTEN: i32 = 2;
const CONNECT: i32 = 3;
const BIND_APART: i32 = 4;
/// Three numbers, then up to two names with a NUL each.
const REQUEST: usize = 12 + 4096 + 256;

impl StandIn {
    /// Makes a process with the pid `pid`, or any without one, and with `ids`, or ours. With `apart` it
    /// has a mount namespace and root directory of its own, for [`Self::bind_apart`].
    ///
    /// # Errors
    /// EEXIST: the pid is taken. EPERM without CAP_CHECKPOINT_RESTORE (pid), CAP_SETUID and
    /// CAP_SETGID (ids), CAP_SYS_ADMIN (`apart`).
    pub fn start(pid: Option<Pid>, ids: Option<&Ids>, apart: bool) -> Result<Self, SysError> {
        let on = || pid.map_or_else(|| "a stand-in".to_owned(), |pid| format!("pid {pid}"));
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| SysError::new("socketpair", on(), errno))?;
        let set_tid = pid.map_or(0, |pid| pid.0);
        let mut pidfd: RawFd = -1;
        let args = CloneArgs {
            flags: (libc::CLONE_FILES | libc::CLONE_PIDFD).cast_unsigned().into(),
            pidfd: (&raw mut pidfd) as u64,
            set_tid: if pid.is_some() { (&raw const set_tid) as u64 } else { 0 },
            set_tid_size: u64::from(pid.is_some()),
            ..CloneArgs::default()
        };
        let parent = std::process::id().cast_signed();
        // SAFETY: without CLONE_VM the child has its own copy of all memory, and it makes nothing but
        // system calls on memory of its own stack and never returns, so locks that other threads of
        // this process hold are in nobody's way. `args` and what it points to outlive the call.
        let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        if ret == 0 {
            serve(theirs.as_raw_fd(), parent, ids, apart);
        }
        let child = i32::try_from(ret).ok().filter(|&ret| ret > 0);
        let child = child.ok_or_else(|| SysError::last("clone3", on()))?;
        // SAFETY: CLONE_PIDFD has made this descriptor for us and nobody else knows its number.
        let handle = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let started = Self { pid: Pid(child), handle, line: ours, _theirs: theirs };
        started.reply("take the ids of").map(|_| ())?;
        Ok(started)
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// socketpair(2), close-on-exec.
    ///
    /// # Errors
    /// Those of the call.
    pub fn pair(&self, kind: i32) -> Result<(OwnedFd, OwnedFd), SysError> {
        let (a, b) = self.ask("socketpair", PAIR, kind, 0, &[])?;
        // SAFETY: the stand-in has just made these two in our shared table, and tells nobody else.
        let a = unsafe { OwnedFd::from_raw_fd(a) };
        // SAFETY: as above.
        let b = unsafe { OwnedFd::from_raw_fd(b) };
        Ok((a, b))
    }

    /// listen(2).
    ///
    /// # Errors
    /// Those of the call.
    pub fn listen(&self, fd: BorrowedFd<'_>, backlog: i32) -> Result<(), SysError> {
        self.ask("listen", LISTEN, fd.as_raw_fd(), backlog, &[]).map(|_| ())
    }

    /// connect(2) to `address`, a `struct sockaddr_un` of its true length.
    ///
    /// # Errors
    /// Those of the call.
    pub fn connect(&self, fd: BorrowedFd<'_>, address: &[u8]) -> Result<(), SysError> {
        self.ask("connect", CONNECT, fd.as_raw_fd(), 0, &[address]).map(|_| ())
    }

    /// Binds `fd` to `address` in the stand-in's own empty file system, where `directories` (all that the
    /// path needs, outermost first, absolute) are made first; a relative path starts from the last of
    /// them. The name is free again afterwards. Gives the socket's file (O_PATH).
    ///
    /// # Errors
    /// ENAMETOOLONG; those of mkdir(2), bind(2) and open(2).
    pub fn bind_apart(
        &self,
        fd: BorrowedFd<'_>,
        address: &[u8],
        directories: &[Vec<u8>],
    ) -> Result<OwnedFd, SysError> {
        for directory in directories {
            self.ask("mkdir", BIND_APART, -1, 0, &[directory.as_slice(), b"\0"])?;
        }
        let (file, _) = self.ask("bind", BIND_APART, fd.as_raw_fd(), 0, &[address])?;
        // SAFETY: the stand-in has just opened it in our shared table, and tells nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }

    fn ask(
        &self,
        call: &'static str,
        op: i32,
        a: i32,
        b: i32,
        names: &[&[u8]],
    ) -> Result<(i32, i32), SysError> {
        let mut request = Vec::with_capacity(256);
        for number in [op, a, b] {
            request.extend_from_slice(&number.to_ne_bytes());
        }
        request.extend(names.iter().copied().flatten());
        if request.len() > REQUEST {
            return Err(SysError::new(call, format!("pid {}", self.pid), Errno::ENAMETOOLONG));
        }
        send(self.line.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)
            .map_err(|errno| SysError::new("send", "a stand-in", errno))?;
        self.reply(call)
    }

    fn reply(&self, call: &'static str) -> Result<(i32, i32), SysError> {
        let failed = |call, errno| SysError::new(call, format!("pid {}", self.pid), errno);
        let mut fds = [
            PollFd::new(self.line.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.handle.as_fd(), PollFlags::POLLIN),
        ];
        while let Err(errno) = poll(&mut fds, PollTimeout::NONE) {
            if errno != Errno::EINTR {
                return Err(failed("poll", errno));
            }
        }
        if !fds[0].any().unwrap_or(false) {
            return Err(failed("a stand-in was killed during", Errno::ESRCH));
        }
        let mut reply = [0u8; 12];
        let n = recv(self.line.as_raw_fd(), &mut reply, MsgFlags::empty()).map_err(|e| failed("recv", e))?;
        if n != reply.len() {
            return Err(failed("recv", Errno::EBADMSG));
        }
        match (word(&reply, 0), word(&reply, 1), word(&reply, 2)) {
            (0, a, b) => Ok((a, b)),
            (errno, ..) => Err(failed(call, Errno::from_raw(errno))),
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        if pidfd::send_signal(self.handle.as_fd(), libc::SIGKILL).is_err() {
            // It would be waited for in vain.
            return;
        }
        // SAFETY: waits for a child of ours; a null status is allowed. __WALL: it sends no signal at its end.
        while unsafe { libc::waitpid(self.pid.0, std::ptr::null_mut(), libc::__WALL) } == -1
            && Errno::last() == Errno::EINTR
        {}
    }
}

fn word(bytes: &[u8], index: usize) -> i32 {
    let at = 4 * index;
    bytes.get(at..at + 4).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// A system call of integers and pointers to live memory; -1 stands for an error in errno.
fn call(number: libc::c_long, args: [u64; 5]) -> i64 {
    // SAFETY: only called below, in the stand-in, with pointers to its own live buffers and their lengths.
    unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) }
}

fn int(n: i32) -> u64 {
    i64::from(n).cast_unsigned()
}

/// The stand-in's life. No memory is allocated here: another thread may have held the allocator's lock
/// when this process was copied.
fn serve(line: RawFd, parent: i32, ids: Option<&Ids>, apart: bool) -> ! {
    let mut errno = 0;
    if ids.is_some_and(|ids| !take(ids)) || (apart && !move_apart()) {
        errno = Errno::last_raw();
    }
    // A change of ids resets it, so it comes after.
    call(libc::SYS_prctl, [int(libc::PR_SET_PDEATHSIG), int(libc::SIGKILL), 0, 0, 0]);
    let orphan = call(libc::SYS_getppid, [0; 5]) != i64::from(parent);
    let mut request = [0u8; REQUEST + 1];
    let mut reply = [errno, 0, 0];
    loop {
        if orphan {
            break;
        }
        let bytes = reply.map(i32::to_ne_bytes);
        let bytes = bytes.as_flattened();
        call(libc::SYS_sendto, [int(line), bytes.as_ptr() as u64, 12, int(libc::MSG_NOSIGNAL), 0]);
        let n = loop {
            let n = call(libc::SYS_recvfrom, [int(line), request.as_mut_ptr() as u64, REQUEST as u64, 0, 0]);
            if n >= 0 || Errno::last() != Errno::EINTR {
                break n;
            }
        };
        let Some(request) = usize::try_from(n).ok().filter(|&n| n >= 12).and_then(|n| request.get_mut(..n))
        else {
            break;
        };
        let mut out = [-1i32; 2];
        let done = act(request, &mut out);
        reply = [if done { 0 } else { Errno::last_raw() }, out[0], out[1]];
    }
    loop {
        call(libc::SYS_exit_group, [0; 5]);
    }
}

fn act(request: &[u8], out: &mut [i32; 2]) -> bool {
    let (op, a, b) = (word(request, 0), word(request, 1), word(request, 2));
    let rest = request.get(12..).unwrap_or_default();
    let (at, len) = (rest.as_ptr() as u64, rest.len() as u64);
    match op {
        PAIR => {
            let kind = a | libc::SOCK_CLOEXEC;
            call(libc::SYS_socketpair, [int(libc::AF_UNIX), int(kind), 0, out.as_mut_ptr() as u64, 0]) == 0
        }
        LISTEN => call(libc::SYS_listen, [int(a), int(b), 0, 0, 0]) == 0,
        CONNECT => call(libc::SYS_connect, [int(a), at, len, 0, 0]) == 0,
        // A directory, ended by a NUL.
        BIND_APART if a < 0 => {
            let made = call(libc::SYS_mkdirat, [int(libc::AT_FDCWD), at, 0o755, 0, 0]) == 0
                || Errno::last() == Errno::EEXIST;
            made && call(libc::SYS_chdir, [at, 0, 0, 0, 0]) == 0
        }
        BIND_APART => {
            // Behind the family; a path of 108 bytes has no NUL in the address.
            let mut name = [0u8; 120];
            let path = rest.get(2..).unwrap_or_default();
            for (to, from) in name.iter_mut().zip(path.iter().take(108)) {
                *to = *from;
            }
            let name = name.as_ptr() as u64;
            if call(libc::SYS_bind, [int(a), at, len, 0, 0]) != 0 {
                return false;
            }
            let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
            let file = call(libc::SYS_openat, [int(libc::AT_FDCWD), name, int(flags), 0, 0]);
            out[0] = i32::try_from(file).unwrap_or(-1);
            file >= 0 && call(libc::SYS_unlinkat, [int(libc::AT_FDCWD), name, 0, 0, 0]) == 0
        }
        _ => false,
    }
}

/// Takes the ids, keeping uid 0, if it was ours, as saved and file system id.
fn take(ids: &Ids) -> bool {
    let groups = [ids.groups.len() as u64, ids.groups.as_ptr() as u64, 0, 0, 0];
    let keep = int(-1);
    // What is right already need not be set, and might not be permitted.
    let groups_set = call(libc::SYS_setgroups, groups) == 0 || ids.groups.is_empty();
    groups_set
        && call(libc::SYS_setresgid, [ids.gid.into(), ids.gid.into(), keep, 0, 0]) == 0
        && call(libc::SYS_setresuid, [ids.uid.into(), ids.uid.into(), keep, 0, 0]) == 0
        && call(libc::SYS_setfsuid, [0; 5]) >= 0
}

/// An empty file system of its own as root directory.
fn move_apart() -> bool {
    let root = c"/".as_ptr() as u64;
    // Covered in our own namespace only; it is there wherever this runs.
    let place = c"/proc".as_ptr() as u64;
    let tmpfs = c"tmpfs".as_ptr() as u64;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    call(libc::SYS_unshare, [int(libc::CLONE_NEWNS), 0, 0, 0, 0]) == 0
        && call(libc::SYS_mount, [0, root, 0, private, 0]) == 0
        && call(libc::SYS_mount, [tmpfs, place, tmpfs, 0, 0]) == 0
        && call(libc::SYS_chroot, [place, 0, 0, 0, 0]) == 0
        && call(libc::SYS_chdir, [root, 0, 0, 0, 0]) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unixsock;

    #[test]
    fn a_pair_is_noted_as_made_by_the_stand_in() {
        let ids = Ids { uid: 4711, gid: 4712, groups: vec![7, 4713] };
        let Ok(stand_in) = StandIn::start(None, Some(&ids), false) else {
            return assert!(!nix::unistd::geteuid().is_root());
        };
        let pid = stand_in.pid;
        let (a, b) = stand_in.pair(libc::SOCK_STREAM).unwrap();
        drop(stand_in);
        for end in [a, b] {
            let peer = unixsock::peer_credentials(end.as_fd()).unwrap().unwrap();
            assert_eq!((peer.pid, peer.ids), (pid.0.unsigned_abs(), ids.clone()));
        }
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_socket_bound_apart_has_the_name_and_can_be_reached() {
        let Ok(stand_in) = StandIn::start(None, None, true) else {
            return assert!(!nix::unistd::geteuid().is_root());
        };
        let name = b"/no/such/directory/socket";
        for _ in 0..2 {
            let new = || {
                nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            };
            let (listener, client) = (new().unwrap(), new().unwrap());
            let address = unixsock::address(name).unwrap();
            let directories = [&b"/no"[..], b"/no/such", b"/no/such/directory"].map(<[u8]>::to_vec);
            let file = stand_in.bind_apart(listener.as_fd(), &address, &directories).unwrap();
            let bound = crate::sock::unix_name(listener.as_fd(), crate::sock::Side::Local).unwrap();
            assert_eq!(bound, name);
            stand_in.listen(listener.as_fd(), 1).unwrap();
            crate::sock::connect_unix(
                client.as_fd(),
                format!("/proc/self/fd/{}", file.as_raw_fd()).as_bytes(),
            )
            .unwrap();
            assert_eq!(crate::sock::unix_name(client.as_fd(), crate::sock::Side::Peer).unwrap(), name);
        }
        assert!(!std::path::Path::new("/no").exists());
    }
}
