//! Sockets: options, and peeking at queues (recv(2), unix(7)). The kernel's tables of them are read in
//! [`crate::diag`].

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

pub use crate::lent::LentOption;
use crate::{SocketId, SysError, unixsock};

fn on(fd: BorrowedFd<'_>) -> String {
    format!("our fd {}", fd.as_raw_fd())
}

/// socket(2) with any numbers; `kind` may include `SOCK_CLOEXEC`.
///
/// # Errors
/// EPERM and EACCES (raw and packet sockets), EAFNOSUPPORT, EPROTONOSUPPORT.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: socket takes three integers.
    let ret = unsafe { libc::socket(domain, kind, protocol) };
    if ret < 0 {
        return Err(SysError::last("socket", format!("family {domain} type {kind} protocol {protocol}")));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// A socket option that is an int.
///
/// # Errors
/// ENOPROTOOPT, EOPNOTSUPP.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32, SysError> {
    let mut value = 0i32;
    let mut len: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
    let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    if ret < 0 { Err(SysError::last("getsockopt", format!("{} option {name}", on(fd)))) } else { Ok(value) }
}

/// Sets a socket option that is an int.
///
/// # Errors
/// EPERM, EINVAL, ENOPROTOOPT.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> Result<(), SysError> {
    // SAFETY: the kernel reads 4 bytes, the size of `value`.
    let ret = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    if ret < 0 { Err(SysError::last("setsockopt", format!("{} option {name}", on(fd)))) } else { Ok(()) }
}

/// A socket option of any type: at most `longest` bytes.
///
/// # Errors
/// ENOPROTOOPT, EOPNOTSUPP, EINVAL (too short).
pub fn option_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, longest: usize) -> Result<Vec<u8>, SysError> {
    let mut value = vec![0; longest];
    let mut len = libc::socklen_t::try_from(longest).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    if ret < 0 {
        return Err(SysError::last("getsockopt", format!("{} level {level} option {name}", on(fd))));
    }
    value.truncate(usize::try_from(len).unwrap_or(0));
    Ok(value)
}

fn short(fd: BorrowedFd<'_>, option: &str) -> SysError {
    SysError::new("getsockopt", format!("{} {option}: not as long as it has to be", on(fd)), Errno::EBADMSG)
}

/// A socket option whose buffer asks a question (`MCAST_MSFILTER`) and takes the answer. Returns its length.
///
/// # Errors
/// EADDRNOTAVAIL, EINVAL, ENOPROTOOPT.
pub fn ask_option(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> Result<usize, SysError> {
    let mut len = libc::socklen_t::try_from(buffer.len()).unwrap_or(0);
    // SAFETY: the kernel reads and writes at most `len` bytes, the size of `buffer`.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len) };
    if ret < 0 {
        return Err(SysError::last("getsockopt", format!("{} level {level} option {name}", on(fd))));
    }
    Ok(usize::try_from(len).unwrap_or(0))
}

/// Sets a socket option of any type that holds no pointers.
///
/// # Errors
/// EPERM, EINVAL, ENOPROTOOPT; EFAULT for `SO_ATTACH_FILTER` and its like, which hold one.
pub fn set_option_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), SysError> {
    let failed = || format!("{} level {level} option {name}", on(fd));
    // struct sock_fprog, and ipt_replace and ip6t_replace, into whose pointer the kernel writes.
    const IPT_SO_SET_REPLACE: i32 = 64;
    let pointers = match level {
        libc::SOL_SOCKET => matches!(name, libc::SO_ATTACH_FILTER | libc::SO_ATTACH_REUSEPORT_CBPF),
        libc::SOL_IP | libc::SOL_IPV6 => name == IPT_SO_SET_REPLACE,
        _ => false,
    };
    if pointers {
        return Err(SysError::new("setsockopt", failed(), Errno::EFAULT));
    }
    let len = libc::socklen_t::try_from(value.len()).unwrap_or(0);
    // SAFETY: the kernel reads `len` bytes, the size of `value`; options with pointers inside are refused above.
    let ret = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    if ret < 0 { Err(SysError::last("setsockopt", failed())) } else { Ok(()) }
}

/// The socket's classic BPF filter, 8 bytes (`struct sock_filter`) for each instruction; empty if there is none.
///
/// # Errors
/// EACCES: it is an eBPF program.
pub fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u8>, SysError> {
    let mut len = libc::socklen_t::try_from(filter_length(fd)?).unwrap_or(0);
    let mut program = vec![0; usize::try_from(len).unwrap_or(0) * 8];
    if len == 0 {
        return Ok(program);
    }
    let name = libc::SO_ATTACH_FILTER;
    // SAFETY: the kernel writes at most `len` instructions of 8 bytes, the size of `program`.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, program.as_mut_ptr().cast(), &raw mut len)
    };
    if ret < 0 { Err(SysError::last("getsockopt(SO_GET_FILTER)", on(fd))) } else { Ok(program) }
}

/// Attaches a filter as [`filter`] gives it.
///
/// # Errors
/// EINVAL: the kernel does not accept the program; EPERM: the filter is locked.
pub fn attach_filter(fd: BorrowedFd<'_>, program: &[u8]) -> Result<(), SysError> {
    let failed = |errno| SysError::new("setsockopt(SO_ATTACH_FILTER)", on(fd), errno);
    let code: Vec<libc::sock_filter> = program
        .as_chunks::<8>()
        .0
        .iter()
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    let len = u16::try_from(code.len()).map_err(|_| failed(Errno::EINVAL))?;
    let fprog = libc::sock_fprog { len, filter: code.as_ptr().cast_mut() };
    let size = libc::socklen_t::try_from(size_of_val(&fprog)).unwrap_or(0);
    let name = libc::SO_ATTACH_FILTER;
    // SAFETY: `fprog` points to `len` instructions, which the kernel reads only.
    let ret =
        unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const fprog).cast(), size) };
    if ret < 0 { Err(failed(Errno::last())) } else { Ok(()) }
}

/// The cookie of the network namespace of a socket: a number that no other namespace has since boot
/// (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
/// ENOTSOCK.
pub fn net_namespace(fd: BorrowedFd<'_>) -> Result<u64, SysError> {
    const SO_NETNS_COOKIE: i32 = 71;
    let value = option_bytes(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, 8)?;
    value.first_chunk().map(|b| u64::from_ne_bytes(*b)).ok_or_else(|| short(fd, "SO_NETNS_COOKIE"))
}

/// The network namespace of a socket, as a descriptor of `/proc/PID/ns/net` (`SIOCGSKNS`, include/uapi/linux/sockios.h).
///
/// # Errors
/// EPERM without CAP_NET_ADMIN over the namespace.
pub fn network(fd: BorrowedFd<'_>) -> Result<OwnedFd, SysError> {
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: SIOCGSKNS takes no argument.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS) };
    if ret < 0 {
        return Err(SysError::last("ioctl(SIOCGSKNS)", on(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// Receives one message and the descriptors that came with it, at most four; 0 bytes at the end.
///
/// # Errors
/// See recvmsg(2).
pub fn receive_with_rights(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), SysError> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let failed = |errno| SysError::new("recvmsg", on(fd), errno);
    let mut control = nix::cmsg_space!([i32; 4]);
    let mut slices = [std::io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(fd.as_raw_fd(), &mut slices, Some(&mut control), flags).map_err(failed)?;
    let mut fds = Vec::new();
    for part in message.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            for number in numbers {
                // SAFETY: recvmsg(2) has just made this descriptor for us, and nobody else knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok((message.bytes, fds))
}

/// Takes the socket's filter away.
///
/// # Errors
/// ENOENT: it has none. EPERM: it is locked.
pub fn detach_filter(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)
}

/// Length of the socket's classic BPF filter in instructions, 0 if there is none.
///
/// # Errors
/// Those of getsockopt(2).
pub fn filter_length(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    const SO_GET_FILTER: i32 = 26;
    let mut len: libc::socklen_t = 0;
    // SAFETY: a length of 0 asks for the filter's length; nothing is written through the pointer.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_GET_FILTER, std::ptr::null_mut(), &raw mut len)
    };
    if ret < 0 { Err(SysError::last("getsockopt(SO_GET_FILTER)", on(fd))) } else { Ok(len) }
}

/// Sets `SO_LINGER`.
///
/// # Errors
/// Those of setsockopt(2).
pub fn set_linger(fd: BorrowedFd<'_>, seconds: u32) -> Result<(), SysError> {
    set_option_bytes(fd, libc::SOL_SOCKET, libc::SO_LINGER, &[1, seconds].map(u32::to_ne_bytes).concat())
}

/// An address of a unix socket as bytes of `sun_path`: empty for unnamed ones, a leading NUL for
/// abstract names, a path without its trailing NUL otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// getsockname(2).
    Local,
    /// getpeername(2).
    Peer,
}

/// Reads one side's address of a unix socket.
///
/// # Errors
/// ENOTCONN (peer), EAFNOSUPPORT if it is no unix socket.
pub fn unix_name(fd: BorrowedFd<'_>, side: Side) -> Result<Vec<u8>, SysError> {
    // Two bytes of family, 108 of path, and the NUL that the kernel may add.
    let mut storage = [0u8; 128];
    let mut len: libc::socklen_t = 128;
    let ret = match side {
        // SAFETY: the kernel writes at most `len` bytes, the size of `storage`; any bytes are valid.
        Side::Local => unsafe {
            libc::getsockname(fd.as_raw_fd(), storage.as_mut_ptr().cast(), &raw mut len)
        },
        // SAFETY: as above.
        Side::Peer => unsafe { libc::getpeername(fd.as_raw_fd(), storage.as_mut_ptr().cast(), &raw mut len) },
    };
    let call = if side == Side::Local { "getsockname" } else { "getpeername" };
    if ret < 0 {
        return Err(SysError::last(call, on(fd)));
    }
    if i32::from(u16::from_ne_bytes([storage[0], storage[1]])) != libc::AF_UNIX {
        return Err(SysError::new(call, on(fd), Errno::EAFNOSUPPORT));
    }
    let len = usize::try_from(len).unwrap_or(0).min(storage.len());
    let name = storage.get(2..len).unwrap_or_default();
    Ok(trim_path(name).to_vec())
}

/// A path without what follows its NUL; abstract names as they are.
#[must_use]
pub fn trim_path(name: &[u8]) -> &[u8] {
    match name.first() {
        None | Some(0) => name,
        Some(_) => name.split(|&b| b == 0).next().unwrap_or_default(),
    }
}

fn shown(name: &[u8]) -> String {
    match name.split_first() {
        Some((0, rest)) => format!("@{}", rest.escape_ascii()),
        _ => name.escape_ascii().to_string(),
    }
}

/// Binds a unix socket to a name as [`unix_name`] gives it.
///
/// # Errors
/// EADDRINUSE, ENOENT, ENAMETOOLONG.
pub fn bind_unix(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), SysError> {
    let too_long = || SysError::new("bind", shown(name), Errno::ENAMETOOLONG);
    let address = unixsock::address(name).ok_or_else(too_long)?;
    let len = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    // SAFETY: the kernel reads `len` bytes, the size of `address`.
    let ret = unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), len) };
    if ret < 0 { Err(SysError::last("bind", shown(name))) } else { Ok(()) }
}

/// Connects a unix socket to a name as [`unix_name`] gives it.
///
/// # Errors
/// ENOENT, ECONNREFUSED, EPROTOTYPE, EAGAIN (backlog full, on a non-blocking socket).
pub fn connect_unix(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), SysError> {
    let too_long = || SysError::new("connect", shown(name), Errno::ENAMETOOLONG);
    let address = unixsock::address(name).ok_or_else(too_long)?;
    let len = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    // SAFETY: the kernel reads `len` bytes, the size of `address`.
    let ret = unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), len) };
    if ret < 0 { Err(SysError::last("connect", shown(name))) } else { Ok(()) }
}

/// listen(2) with any backlog.
///
/// # Errors
/// EINVAL: not bound.
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> Result<(), SysError> {
    // SAFETY: listen takes two integers.
    let ret = unsafe { libc::listen(fd.as_raw_fd(), backlog) };
    if ret < 0 { Err(SysError::last("listen", on(fd))) } else { Ok(()) }
}

/// The next connection, close-on-exec.
///
/// # Errors
/// Those of accept(2).
pub fn accept(fd: BorrowedFd<'_>) -> Result<OwnedFd, SysError> {
    // SAFETY: null pointers say that the peer's address is not wanted.
    let ret = unsafe {
        libc::accept4(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    };
    if ret < 0 {
        return Err(SysError::last("accept4", on(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

/// Memory taken by what was sent through a unix socket and not read yet, bytes (`SIOCOUTQ`).
///
/// # Errors
/// Those of ioctl(2).
pub fn unread_memory(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    let mut n = 0i32;
    // SAFETY: SIOCOUTQ writes one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
    if ret < 0 { Err(SysError::last("ioctl(SIOCOUTQ)", on(fd))) } else { Ok(n.unsigned_abs()) }
}

/// What poll(2) says of `fd` at once: those of `events`, POLLERR and POLLHUP.
///
/// # Errors
/// ENOMEM, EINTR.
pub fn poll_now(fd: BorrowedFd<'_>, events: i16) -> Result<i16, SysError> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: the kernel reads and writes one pollfd.
    let ret = unsafe { libc::poll(&raw mut entry, 1, 0) };
    if ret < 0 { Err(SysError::last("poll", on(fd))) } else { Ok(entry.revents) }
}

/// bind(2) to an address of any family, as the kernel has it.
///
/// # Errors
/// EADDRINUSE, EADDRNOTAVAIL, EINVAL, ENODEV.
pub fn bind_to(fd: BorrowedFd<'_>, address: &[u8]) -> Result<(), SysError> {
    let len = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    // SAFETY: the kernel reads `len` bytes, the size of `address`.
    let ret = unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), len) };
    if ret < 0 { Err(SysError::last("bind", on(fd))) } else { Ok(()) }
}

/// sendto(2) to an address of any family, as the kernel has it. Bytes sent.
///
/// # Errors
/// ENETDOWN, EMSGSIZE, EPERM and others.
pub fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], address: &[u8]) -> Result<usize, SysError> {
    let len = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    let (data, to) = (bytes.as_ptr().cast(), address.as_ptr().cast());
    // SAFETY: the kernel reads as many bytes as `bytes` and `address` have.
    let sent = unsafe { libc::sendto(fd.as_raw_fd(), data, bytes.len(), libc::MSG_NOSIGNAL, to, len) };
    usize::try_from(sent).map_err(|_| SysError::last("sendto", on(fd)))
}

/// Lets a datagram socket be connected to nobody. It stays bound to its port, but to no device.
///
/// # Errors
/// Those of connect(2).
pub fn disconnect(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    // A struct sockaddr of family AF_UNSPEC.
    let address = [0u8; 16];
    // SAFETY: the kernel reads 16 bytes, the size of `address`.
    let ret = unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), 16) };
    if ret < 0 { Err(SysError::last("connect(AF_UNSPEC)", on(fd))) } else { Ok(()) }
}

/// Lets `fd` have received this much. Best effort: beyond `net.core.rmem_max` it takes CAP_NET_ADMIN.
pub fn make_receive_room(fd: BorrowedFd<'_>, bytes: usize) {
    const SO_RCVBUFFORCE: i32 = 33;
    let wanted = i32::try_from(bytes).unwrap_or(i32::MAX / 2);
    let now = option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0);
    if now < wanted && set_option(fd, libc::SOL_SOCKET, SO_RCVBUFFORCE, wanted).is_err() {
        let _ = set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, wanted);
    }
}

/// Lets `fd` have this much sent and unread. Best effort: beyond `net.core.wmem_max` it takes CAP_NET_ADMIN.
pub fn make_room(fd: BorrowedFd<'_>, bytes: usize) {
    const SO_SNDBUFFORCE: i32 = 32;
    let wanted = i32::try_from(bytes).unwrap_or(i32::MAX / 2);
    let now = option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0);
    if now < wanted && set_option(fd, libc::SOL_SOCKET, SO_SNDBUFFORCE, wanted).is_err() {
        let _ = set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, wanted);
    }
}

/// A socket's inode from `socket:[ID]`, `unix[ID]` or the bare number.
#[must_use]
pub fn parse_id(text: &str) -> Option<SocketId> {
    let inner = |prefix: &str| text.strip_prefix(prefix).and_then(|t| t.strip_suffix(']'));
    inner("socket:[").or_else(|| inner("unix[")).unwrap_or(text).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_in_three_spellings() {
        for text in ["48213", "socket:[48213]", "unix[48213]"] {
            assert_eq!(parse_id(text), Some(SocketId(48213)));
        }
        for text in ["", "unix[", "unix[x]", "pipe:[1]", "-1"] {
            assert_eq!(parse_id(text), None, "{text}");
        }
    }
}
