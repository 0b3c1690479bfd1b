//! Repair mode of TCP sockets: reading and setting what belongs to the kernel (TCP_REPAIR, tcp(7)).
//!
//! A socket in repair mode lets CAP_NET_ADMIN see and set sequence numbers, windows and both queues, makes no
//! handshake when it is connected, and is closed without a word to its peer. What it does not do is work: its
//! owner's recv(2) and send(2) fail. So on a live socket the mode is a danger, and [`Repair`] keeps
//! it short: it is put back when that is dropped, and also if this process is killed ([`crate::lent`]).
//!
//! Leaving the mode has two traps. The kernel clears `SO_REUSEADDR`, which is therefore put back; and
//! with `TCP_REPAIR_OFF` it sends a window probe, which a lock on the network would not let pass and a
//! target that runs on has not asked for, so it is left by `TCP_REPAIR_OFF_NO_WP` (Linux 4.19).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{
    SysError,
    lent::LentOption,
    sock::{option, option_bytes, set_option, set_option_bytes, unread_memory},
};

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const REPAIR_ON: i32 = 1;
const REPAIR_OFF: i32 = 0;
const REPAIR_OFF_NO_WP: i32 = -1;

/// One of the two queues of a socket in repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Received and not read.
    Receive = 1,
    /// Sent or to be sent, and not acknowledged.
    Send = 2,
}

/// `struct tcp_repair_window` (linux/tcp.h).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Window {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// What both ends agreed on in the handshake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The peer's limit for segments, bytes.
    pub mss_clamp: u32,
    /// Shifts of the peer's and of our window, if there are any.
    pub wscale: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// Timestamps.
    pub timestamps: bool,
}

/// What TCP_INFO tells without repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// `TCP_ESTABLISHED` 1 to `TCP_CLOSING` 11.
    pub state: u8,
    /// `TCPI_OPT_*`.
    pub options: u8,
    /// Shift of the peer's window.
    pub snd_wscale: u8,
    /// Shift of our window.
    pub rcv_wscale: u8,
}

fn tcp(fd: BorrowedFd<'_>, name: i32) -> Result<i32, SysError> {
    option(fd, libc::IPPROTO_TCP, name)
}

fn set_tcp(fd: BorrowedFd<'_>, name: i32, value: i32) -> Result<(), SysError> {
    set_option(fd, libc::IPPROTO_TCP, name, value)
}

/// TCP_INFO, its first bytes.
///
/// # Errors
/// Those of getsockopt(2).
pub fn info(fd: BorrowedFd<'_>) -> Result<Info, SysError> {
    let bytes = option_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 8)?;
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    // snd_wscale and rcv_wscale are bit fields of four bits each, the first in the lower half.
    Ok(Info { state: byte(0), options: byte(5), snd_wscale: byte(6) & 15, rcv_wscale: byte(6) >> 4 })
}

/// Bytes (a FIN counts as one) that are sent or to be sent and not acknowledged, and how many of them
/// have not been sent yet (SIOCOUTQ, SIOCOUTQNSD).
///
/// # Errors
/// EINVAL: it listens.
pub fn outgoing(fd: BorrowedFd<'_>) -> Result<(u32, u32), SysError> {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    let mut unsent = 0i32;
    // SAFETY: SIOCOUTQNSD writes one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCOUTQNSD, &raw mut unsent) };
    if ret < 0 {
        return Err(SysError::last("ioctl(SIOCOUTQNSD)", format!("our fd {}", fd.as_raw_fd())));
    }
    Ok((unread_memory(fd)?, unsent.unsigned_abs()))
}

/// Whether the connection was ever there: bytes were acknowledged (the SYN counts) or received.
///
/// # Errors
/// Those of getsockopt(2).
pub fn was_connected(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    // tcpi_bytes_acked and tcpi_bytes_received (linux/tcp.h).
    let bytes = option_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 136)?;
    Ok(bytes.get(120..136).is_some_and(|counts| counts.iter().any(|&b| b != 0)))
}

/// Whether anything was sent, or is to be.
///
/// # Errors
/// Those of getsockopt(2) and ioctl(2).
pub fn has_sent(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    // tcpi_bytes_sent (linux/tcp.h, Linux 4.19).
    let bytes = option_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 208)?;
    Ok(outgoing(fd)?.0 != 0 || bytes.get(200..208).is_none_or(|count| count.iter().any(|&b| b != 0)))
}

/// The timestamp that the socket would send now.
///
/// # Errors
/// Those of getsockopt(2).
pub fn timestamp(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    tcp(fd, TCP_TIMESTAMP).map(i32::cast_unsigned)
}

/// Makes the socket's timestamps go on from `timestamp`. In repair mode.
///
/// # Errors
/// EPERM: not in repair mode.
pub fn set_timestamp(fd: BorrowedFd<'_>, timestamp: u32) -> Result<(), SysError> {
    set_tcp(fd, TCP_TIMESTAMP, timestamp.cast_signed())
}

/// Enters repair mode on a socket of our own.
///
/// # Errors
/// EPERM: no CAP_NET_ADMIN, or the socket listens.
pub fn enter_repair(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    set_tcp(fd, TCP_REPAIR, REPAIR_ON)
}

/// Leaves it; a window probe tells the peer that we are there.
///
/// # Errors
/// EPERM.
pub fn leave_repair(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    set_tcp(fd, TCP_REPAIR, REPAIR_OFF)
}

/// Leaves it without one.
///
/// # Errors
/// EPERM.
pub fn abandon_repair(fd: BorrowedFd<'_>) -> Result<(), SysError> {
    set_tcp(fd, TCP_REPAIR, REPAIR_OFF_NO_WP)
}

/// Selects the queue that send(2), recv(2) and the sequence number mean; `None` for neither.
///
/// # Errors
/// EPERM: not in repair mode.
pub fn select(fd: BorrowedFd<'_>, queue: Option<Queue>) -> Result<(), SysError> {
    set_tcp(fd, TCP_REPAIR_QUEUE, queue.map_or(0, |q| q as i32))
}

/// The sequence number after the last byte of a queue.
///
/// # Errors
/// EPERM: not in repair mode.
pub fn sequence(fd: BorrowedFd<'_>, queue: Queue) -> Result<u32, SysError> {
    select(fd, Some(queue))?;
    tcp(fd, TCP_QUEUE_SEQ).map(i32::cast_unsigned)
}

/// Sets it, on a socket that is not connected yet.
///
/// # Errors
/// EPERM: not in repair mode, or connected.
pub fn set_sequence(fd: BorrowedFd<'_>, queue: Queue, sequence: u32) -> Result<(), SysError> {
    select(fd, Some(queue))?;
    set_tcp(fd, TCP_QUEUE_SEQ, sequence.cast_signed())
}

/// The windows.
///
/// # Errors
/// EPERM: not in repair mode.
pub fn window(fd: BorrowedFd<'_>) -> Result<Window, SysError> {
    let bytes = option_bytes(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, size_of::<Window>())?;
    let word =
        |i: usize| bytes.get(4 * i..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_ne_bytes(*b));
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = [0, 1, 2, 3, 4].map(word);
    Ok(Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup })
}

/// Sets them, on a connected socket whose queues are filled.
///
/// # Errors
/// EINVAL: they contradict each other or the sequence numbers.
pub fn set_window(fd: BorrowedFd<'_>, w: Window) -> Result<(), SysError> {
    let bytes: Vec<u8> = [w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    set_option_bytes(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &bytes)
}

/// The peer's limit for segments, which TCP_MAXSEG gives in repair mode.
///
/// # Errors
/// Those of getsockopt(2).
pub fn mss_clamp(fd: BorrowedFd<'_>) -> Result<u32, SysError> {
    tcp(fd, libc::TCP_MAXSEG).map(i32::cast_unsigned)
}

/// Sets what a handshake would have negotiated, on a connected socket in repair mode.
///
/// # Errors
/// EPERM: not in repair mode; EFBIG: a shift above 14.
pub fn set_negotiated(fd: BorrowedFd<'_>, n: Negotiated) -> Result<(), SysError> {
    const TCPOPT_MSS: u32 = 2;
    const TCPOPT_WINDOW: u32 = 3;
    const TCPOPT_SACK_PERM: u32 = 4;
    const TCPOPT_TIMESTAMP: u32 = 8;
    let mut options = Vec::new();
    let mut put = |code: u32, value: u32| options.extend([code, value].iter().flat_map(|w| w.to_ne_bytes()));
    if n.sack {
        put(TCPOPT_SACK_PERM, 0);
    }
    if let Some((snd, rcv)) = n.wscale {
        put(TCPOPT_WINDOW, u32::from(snd) | u32::from(rcv) << 16);
    }
    if n.timestamps {
        put(TCPOPT_TIMESTAMP, 0);
    }
    put(TCPOPT_MSS, n.mss_clamp);
    set_option_bytes(fd, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &options)
}

/// Somebody else's socket in repair mode, for a moment. Put back when it is dropped, and if this process is killed.
#[derive(Debug)]
pub struct Repair<'a> {
    fd: BorrowedFd<'a>,
    // In this order: leaving the mode clears the other.
    mode: LentOption<'a>,
    reuse: LentOption<'a>,
}

impl<'a> Repair<'a> {
    /// Enters repair mode on a socket of a frozen task.
    ///
    /// # Errors
    /// EPERM: no CAP_NET_ADMIN, or the socket listens.
    pub fn enter(fd: BorrowedFd<'a>) -> Result<Self, SysError> {
        let before = option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        let reuse = LentOption::change(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, before, before)?;
        let mode = LentOption::change(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON, REPAIR_OFF_NO_WP)?;
        Ok(Self { fd, mode, reuse })
    }

    /// The socket.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd
    }

    /// Leaves the mode. Dropping does the same but can't tell of errors.
    ///
    /// # Errors
    /// It could not be left.
    pub fn leave(self) -> Result<(), SysError> {
        let Self { fd, mode, reuse } = self;
        drop(mode);
        drop(reuse);
        match tcp(fd, TCP_REPAIR)? {
            0 => Ok(()),
            _ => abandon_repair(fd),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn in_repair(fd: impl AsFd) -> bool {
        tcp(fd.as_fd(), TCP_REPAIR).unwrap() != 0
    }

    #[test]
    fn both_ends_tell_the_same_sequence_numbers() {
        let (mut client, mut server) = pair();
        set_option(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 2]).unwrap();
        set_option(client.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
        let Ok(repair) = Repair::enter(client.as_fd()) else {
            return; // no CAP_NET_ADMIN
        };
        let sent = sequence(repair.fd(), Queue::Send).unwrap();
        assert!(in_repair(&client) && mss_clamp(repair.fd()).unwrap() > 500);
        repair.leave().unwrap();
        let repair = Repair::enter(server.as_fd()).unwrap();
        assert_eq!(sequence(repair.fd(), Queue::Receive).unwrap(), sent);
        assert_eq!(window(repair.fd()).unwrap().rcv_wup, sent);
        drop(repair);
        assert!(!in_repair(&client) && !in_repair(&server));
        assert_eq!(option(client.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 1);
        assert_eq!(option(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 0);
        assert_eq!(info(server.as_fd()).unwrap().state, 1);
        client.write_all(b"!").unwrap();
        let mut rest = [0; 4];
        server.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"llo!");
    }

    #[test]
    fn repair_mode_ends_with_its_user() {
        let (client, _server) = pair();
        set_option(client.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
        let (told, tell) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child makes system calls only, and ends without running anything of ours.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let repair = Repair::enter(client.as_fd());
            let _ = nix::unistd::write(&tell, &[u8::from(repair.is_ok())]);
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
        let mut ok = [0];
        nix::unistd::read(&told, &mut ok).unwrap();
        assert_eq!(ok == [1], in_repair(&client));
        drop(tell);
        let child = nix::unistd::Pid::from_raw(child);
        nix::sys::signal::kill(child, nix::sys::signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(child, None).unwrap();
        // The guardian has the pipe too, and closes it when it is done.
        assert_eq!(nix::unistd::read(&told, &mut ok).unwrap(), 0);
        assert!(!in_repair(&client));
        assert_eq!(option(client.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 1);
    }
}
