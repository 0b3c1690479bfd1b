//! What unix sockets alone have (unix(7)): addresses, credentials, and messages with descriptors.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::{SysError, sock, standin::Ids};

/// Who a process was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// 0 if it is in a pid namespace that can't be seen from here.
    pub pid: u32,
    /// Effective ids (of a message: what it says) and groups.
    pub ids: Ids,
}

fn on(fd: BorrowedFd<'_>) -> String {
    format!("our fd {}", fd.as_raw_fd())
}

/// `struct sockaddr_un` of a name, as long as it has to be; `None` if the name is too long.
#[must_use]
pub fn address(name: &[u8]) -> Option<Vec<u8>> {
    let mut address = u16::try_from(libc::AF_UNIX).ok()?.to_ne_bytes().to_vec();
    address.extend_from_slice(name);
    if name.first().is_some_and(|&b| b != 0) && name.len() < 108 {
        address.push(0);
    }
    (name.len() <= 108).then_some(address)
}

/// SO_PEERCRED and SO_PEERGROUPS: who is at the other end, of a listener who made it listen. `None` if
/// nobody was noted.
///
/// # Errors
/// Those of getsockopt(2).
pub fn peer_credentials(fd: BorrowedFd<'_>) -> Result<Option<Credentials>, SysError> {
    const SO_PEERGROUPS: i32 = 59;
    const NGROUPS_MAX: usize = 1 << 16;
    let numbers = |name, longest| {
        let value = sock::option_bytes(fd, libc::SOL_SOCKET, name, longest)?;
        Ok::<Vec<u32>, SysError>(value.as_chunks::<4>().0.iter().map(|b| u32::from_ne_bytes(*b)).collect())
    };
    match numbers(libc::SO_PEERCRED, size_of::<libc::ucred>())?[..] {
        [_, u32::MAX, _] => Ok(None),
        [pid, uid, gid] => {
            let groups = numbers(SO_PEERGROUPS, 4 * NGROUPS_MAX).unwrap_or_default();
            Ok(Some(Credentials { pid, ids: Ids { uid, gid, groups } }))
        }
        _ => Err(SysError::new("getsockopt(SO_PEERCRED)", on(fd), Errno::EBADMSG)),
    }
}

/// The file that a socket is bound to, or that the listener was which it was accepted from (O_PATH).
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, ENOENT if it is bound to no path.
pub fn bound_file(fd: BorrowedFd<'_>) -> Result<OwnedFd, SysError> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: SIOCUNIXFILE takes no argument.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) };
    if ret < 0 {
        return Err(SysError::last("ioctl(SIOCUNIXFILE)", on(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// One message, or piece of a stream.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes put into the buffer.
    pub len: usize,
    /// Length of the message, which is more than `len` if the buffer was too short.
    pub full_len: usize,
    /// Descriptors that came with it (SCM_RIGHTS), close-on-exec.
    pub rights: Vec<OwnedFd>,
    /// Who sent it (SCM_CREDENTIALS), if the socket asks for that: pid, uid, gid.
    pub credentials: Option<(u32, u32, u32)>,
    /// The sender's address as in `sun_path`, of datagrams.
    pub sender: Option<Vec<u8>>,
    /// Control data did not fit.
    pub control_truncated: bool,
}

/// Peeks at the queue of `fd` without waiting, at the socket's `SO_PEEK_OFF` if it has one. `None` when
/// there is nothing; the end of a stream is a message of no bytes.
///
/// # Errors
/// Those of recvmsg(2) other than EAGAIN.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<Received>, SysError> {
    // Aligned as struct cmsghdr wants it; SCM_MAX_FD (253) descriptors and all else fit.
    let mut control = [0u64; 512];
    let mut name = [0u8; 128];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_name = name.as_mut_ptr().cast();
    msg.msg_namelen = 128;
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `msg` points to `name`, one iovec over `buffer`, and `control`, all with their true lengths.
    let ret = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) };
    let Ok(full_len) = usize::try_from(ret) else {
        return match Errno::last() {
            Errno::EAGAIN => Ok(None),
            errno => Err(SysError::new("recvmsg(MSG_PEEK)", on(fd), errno)),
        };
    };
    let mut received = Received {
        len: full_len.min(buffer.len()),
        full_len,
        control_truncated: msg.msg_flags & libc::MSG_CTRUNC != 0,
        ..Received::default()
    };
    let named = usize::try_from(msg.msg_namelen).unwrap_or(0).min(name.len());
    if let Some(sender) = name.get(2..named).filter(|n| !n.is_empty()) {
        received.sender = Some(sock::trim_path(sender).to_vec());
    }
    let words = control.map(u64::to_ne_bytes);
    let bytes = words.as_flattened();
    let bytes = &bytes[..msg.msg_controllen.min(bytes.len())];
    for (level, kind, data) in records(bytes) {
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                let raw = data.chunks_exact(4).map(|b| RawFd::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                // SAFETY: the kernel has just made these descriptors for us by SCM_RIGHTS, each told once.
                received.rights.extend(raw.map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                let word = |i: usize| {
                    data.get(4 * i..4 * i + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
                };
                if let (Some(pid), Some(uid), Some(gid)) = (word(0), word(1), word(2)) {
                    received.credentials = Some((pid, uid, gid));
                }
            }
            // A pidfd of the sender.
            (libc::SOL_SOCKET, SCM_PIDFD) => {
                if let Some(&[a, b, c, d]) = data.first_chunk::<4>()
                    && RawFd::from_ne_bytes([a, b, c, d]) >= 0
                {
                    // SAFETY: as above.
                    drop(unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes([a, b, c, d])) });
                }
            }
            _ => {}
        }
    }
    Ok(Some(received))
}

const SCM_PIDFD: i32 = 4;

/// Level, type and data of the records of a control buffer.
fn records(control: &[u8]) -> Vec<(i32, i32, &[u8])> {
    let word = |at: usize| control.get(at..at + 4).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let mut found = Vec::new();
    let mut at = 0;
    // struct cmsghdr: size_t len, int level, int type; then data, all aligned to 8.
    while let (Some(len), Some(level), Some(kind)) = (control.get(at..at + 8), word(at + 8), word(at + 12)) {
        let len = usize::from_ne_bytes([len[0], len[1], len[2], len[3], len[4], len[5], len[6], len[7]]);
        let Some(data) = at.checked_add(len).and_then(|end| control.get(at + 16..end)) else { break };
        found.push((level, kind, data));
        at += len.next_multiple_of(8);
    }
    found
}

/// Sends one message without waiting: to `to` (an address) or the socket's peer, with descriptors and as
/// somebody else, which takes CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID, and that the pid is there. Gives
/// the number of bytes taken.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send_message(
    fd: BorrowedFd<'_>,
    bytes: &[u8],
    to: Option<&[u8]>,
    rights: &[BorrowedFd<'_>],
    credentials: Option<(u32, u32, u32)>,
) -> Result<usize, SysError> {
    let mut control: Vec<u8> = Vec::new();
    let mut record = |kind: i32, data: &[u8]| {
        control.extend_from_slice(&(16 + data.len()).to_ne_bytes());
        control.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        control.extend_from_slice(&kind.to_ne_bytes());
        control.extend_from_slice(data);
        control.resize(control.len().next_multiple_of(8), 0);
    };
    if !rights.is_empty() {
        let raw: Vec<u8> = rights.iter().flat_map(|fd| fd.as_fd().as_raw_fd().to_ne_bytes()).collect();
        record(libc::SCM_RIGHTS, &raw);
    }
    if let Some((pid, uid, gid)) = credentials {
        let raw: Vec<u8> = [pid, uid, gid].iter().flat_map(|n| n.to_ne_bytes()).collect();
        record(libc::SCM_CREDENTIALS, &raw);
    }
    // Words, for their alignment.
    let mut words: Vec<u64> = control
        .chunks(8)
        .map(|c| u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect();
    let mut name = to.map(<[u8]>::to_vec).unwrap_or_default();
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    if !name.is_empty() {
        msg.msg_name = name.as_mut_ptr().cast();
        msg.msg_namelen = libc::socklen_t::try_from(name.len()).unwrap_or(0);
    }
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if !words.is_empty() {
        msg.msg_control = words.as_mut_ptr().cast();
        msg.msg_controllen = control.len();
    }
    // SAFETY: `msg` points to `name`, one iovec over `bytes`, which sendmsg only reads, and `words`, all with
    // their true lengths.
    let ret =
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(ret).map_err(|_| SysError::last("sendmsg", on(fd)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn messages_carry_descriptors_and_credentials() {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC).unwrap();
        sock::set_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
        let own = (std::process::id(), nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        send_message(a.as_fd(), b"text", None, &[a.as_fd(), b.as_fd()], Some(own)).unwrap();
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let peeked = peek(b.as_fd(), &mut buffer).unwrap().unwrap();
            assert_eq!((peeked.len, peeked.rights.len(), peeked.credentials), (4, 2, Some(own)));
            let inode = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_ino;
            assert_eq!(inode(peeked.rights[1].as_fd()), inode(b.as_fd()));
        }
    }
}
