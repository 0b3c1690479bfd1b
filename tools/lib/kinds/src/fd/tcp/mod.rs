//! TCP sockets (tcp(7)): listeners, connections in every state, and the network lock.
//!
//! **What the kernel offers.** Everything that a connection is can be read and set in *repair mode*
//! ([`ckpt_sys::tcp`]): sequence numbers, both queues, windows, what was negotiated. But a
//! socket in that mode does not work, and the target has no part in it: setting and clearing it takes
//! CAP_NET_ADMIN, which most targets do not have, so a task can't be left with a call that undoes
//! it as is done for other things (`Borrowed::guard`). ckpt-sk does it on its copy of the descriptor, for some
//! five system calls and one copy of the send queue at a time, and a child process of it puts the mode back if
//! it is killed meanwhile; ckpt-scan keeps the tree frozen until that child is done too. Only the death
//! of ckpt-scan itself in these microseconds lets a task run early; ckpt-sk still leaves the mode at once.
//!
//! **The lock.** While the tree is frozen the kernel goes on receiving and acknowledging for it. What came
//! after a queue was read would be in no image, though its sender has been told that it arrived. So
//! ckpt-scan, which knows when the freeze begins and ends, holds a lock on all connections of the tree for just
//! that time ([`lock`]), by a table of nftables that the kernel removes when ckpt-scan dies. Peers
//! notice a delay: what was dropped is sent again.
//!
//! With `--kill` the lock has to last until the restore, or the host would answer the peers with RST. First the
//! tasks are killed; ckpt-scan has copies of their sockets, so these stay open. Then the lock is made
//! again in a table that lasts, the sockets are put into repair mode, and closed: without a word to anybody. A
//! SIGKILL at any instant leaves a tree that runs unlocked, or one that is dead.
//!
//! **Both ends in the tree, or one.** A connection within the tree is whole in the images; nothing
//! about it can go wrong. If the other end is outside, the images hold half of something that
//! lives on: restored too late, the peer has gone on and resets it. So the user has to say that it is meant
//! (`ckpt-sk --tcp-established`), or to have it closed instead (`--tcp-close`).
//!
//! **States.** [`restore`] makes an established connection of every one and lets the kernel go the rest of
//! the way, by sending FIN as the socket's owner would, or by having it receive one.
//!
//! Refused: unread urgent data (its place in the queue can't be set), an error that nobody has seen other than
//! ECONNRESET, TCP_ULP (kTLS), MPTCP. Urgent data that was sent and is not acknowledged can't be told from
//! other data, and becomes such.

mod complete;
pub mod lock;
mod restore;

use std::os::fd::AsFd;

use ckpt_sys::sock;

use super::Descriptor;

pub(super) use complete::complete;
pub(super) use restore::{Connections, restore};

/// What the user allowed.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpOptions {
    /// Connections whose other end is outside the tree are dumped.
    pub established: bool,
    /// All connections are dumped as closed.
    pub close: bool,
    /// Connections that a listener has not accepted yet are left out.
    pub skip_in_flight: bool,
    /// The tree will be killed.
    pub kill: bool,
}

/// `state`, as in include/net/tcp_states.h.
mod state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;

    /// FIN has been queued or sent; it counts as a byte of the send queue.
    pub fn fin_sent(state: u8) -> bool {
        matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING)
    }

    /// FIN has been sent, and not acknowledged.
    pub fn fin_unacknowledged(state: u8) -> bool {
        fin_sent(state) && state != FIN_WAIT2
    }

    /// FIN has been received; it counts as a byte of the sequence.
    pub fn fin_received(state: u8) -> bool {
        matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
    }

    /// It has sequence numbers and a peer.
    pub fn connected(state: u8) -> bool {
        state == ESTABLISHED || fin_sent(state) || fin_received(state)
    }

    pub fn name(state: u8) -> &'static str {
        const NAMES: [&str; 12] = [
            "unknown",
            "ESTABLISHED",
            "SYN_SENT",
            "SYN_RECV",
            "FIN_WAIT1",
            "FIN_WAIT2",
            "TIME_WAIT",
            "CLOSE",
            "CLOSE_WAIT",
            "LAST_ACK",
            "LISTEN",
            "CLOSING",
        ];
        NAMES.get(usize::from(state)).copied().unwrap_or("unknown")
    }
}

pub(super) fn recognise(d: &Descriptor) -> bool {
    (d.is_socket(libc::AF_INET, libc::SOCK_STREAM) || d.is_socket(libc::AF_INET6, libc::SOCK_STREAM))
        && sock::option(d.copy.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|protocol| protocol == libc::IPPROTO_TCP)
}
