//! Connections whose other end is outside the checkpoint, by the policy in the images.
//!
//! * *connect* goes to the peer's address, or another; a peer that is not there yet can be waited for.
//! * *accept* waits for a client, where this end was accepted itself: at the listener that it came from, which
//!   may be one of the images, or at another address, where ckpt-restore listens for as long as it waits.
//! * *inherit* was dealt with before: the user has handed in a descriptor, or it is missing now.
//! * *close*: the peer is gone; what was queued can be read, then comes the end.
//!
//! Whoever waits can be interrupted, and nothing stays behind then, for there are no tasks yet.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ckpt_proto::types::{UnixSkEntry, external_socket::PolicyKind};
use ckpt_sys::{
    Refused, file,
    sock::{self, trim_path},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use super::{
    Sockets, is_datagram, is_external,
    listen::Place,
    names::{remove_stale, socket_path},
    new_socket, shown, what,
};
use crate::fd::{Opening, dump::path};

/// Pause between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(20);

/// What the images or the command line say, and the address that belongs to it.
fn policy(opening: &Opening<'_>, usk: &UnixSkEntry) -> (PolicyKind, Option<Vec<u8>>) {
    let chosen = opening.options.external_unix.iter().find(|(id, _)| id.0 == u64::from(usk.ino));
    if let Some((_, path)) = chosen {
        return (PolicyKind::Connect, Some(path.clone()));
    }
    let Some(external) = &usk.ckpt_external else { return (PolicyKind::Inherit, None) };
    let path = external.path.clone().filter(|p| !trim_path(p).is_empty());
    match external.policy() {
        PolicyKind::Connect => {
            let named = external.peer_name.clone().filter(|n| !trim_path(n).is_empty());
            (PolicyKind::Connect, path.or(named))
        }
        other => (other, path),
    }
}

/// Whether its peer is to be gone.
pub(super) fn is_closed(opening: &Opening<'_>, usk: &UnixSkEntry) -> bool {
    is_external(usk) && policy(opening, usk).0 == PolicyKind::Close
}

/// Makes the end inside.
pub(super) fn connection(
    sockets: &mut Sockets,
    opening: &mut Opening<'_>,
    usk: &Rc<UnixSkEntry>,
) -> anyhow::Result<OwnedFd> {
    let ino = u64::from(usk.ino);
    if opening.options.external_unix.iter().any(|(id, _)| id.0 == ino) {
        opening.connected.insert(ino);
    }
    let by_hand = format!("--inherit-fd fd[N]:socket:[{ino}] or --external 'unix[{ino}]:PATH'");
    let unnamed = || {
        let reason = "its peer is outside the checkpoint and has no name to connect to";
        Refused::new(what(usk), reason).advise(format!("pass {by_hand}"))
    };
    match policy(opening, usk) {
        (PolicyKind::Close, _) => {
            let (fd, far) = sockets.alone(opening, usk)?;
            sockets.far.insert(ino, far);
            Ok(fd)
        }
        (PolicyKind::Inherit, _) | (PolicyKind::Connect, None) => Err(unnamed().into()),
        (PolicyKind::Accept, _) if is_datagram(usk) => {
            let reason = "a datagram socket can't accept its peer";
            Err(Refused::new(what(usk), reason).advise(format!("pass {by_hand}")).into())
        }
        (PolicyKind::Accept, path) => accept(sockets, opening, usk, path.as_deref()),
        (PolicyKind::Connect, Some(name)) => {
            let fd = new_socket(usk)?;
            if sockets.listener_of(usk).is_none() {
                sockets.bind_if_free(opening, usk, &fd)?;
            } else {
                // It was accepted; now it connects, and the name is the listener's.
                let reason = "its name is that of a listener, it comes back without one";
                (opening.options.warn)(&format!("{}: {reason}", what(usk)));
            }
            connect(opening, usk, &fd, trim_path(&name))
                .with_context(|| format!("connect to {} (to change this pass {by_hand})", shown(&name)))?;
            Ok(fd)
        }
    }
}

/// Connects, if need be again and again for as long as the user wants to wait.
fn connect(opening: &Opening<'_>, usk: &UnixSkEntry, fd: &OwnedFd, name: &[u8]) -> anyhow::Result<()> {
    let end = Instant::now() + opening.options.retry;
    let mut told = false;
    // Without waiting for room in the backlog, which could take for ever.
    file::set_flags(fd.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
    loop {
        match sock::connect_unix(fd.as_fd(), name) {
            Err(e) if matches!(e.errno, Errno::ECONNREFUSED | Errno::ENOENT | Errno::EAGAIN) => {
                if Instant::now() >= end {
                    return Err(e.into());
                }
            }
            other => {
                other?;
                return Ok(file::set_flags(fd.as_fd(), 0)?);
            }
        }
        if !std::mem::replace(&mut told, true) {
            (opening.options.note)(&format!(
                "{}: waits for somebody to listen at {}",
                what(usk),
                shown(name)
            ));
        }
        let _ = wait(opening, None, Some(PAUSE))?;
    }
}

/// Waits for the peer to connect.
fn accept(
    sockets: &mut Sockets,
    opening: &mut Opening<'_>,
    usk: &Rc<UnixSkEntry>,
    to: Option<&[u8]>,
) -> anyhow::Result<OwnedFd> {
    let name = trim_path(to.unwrap_or(&usk.name)).to_vec();
    if name.is_empty() {
        let reason = "it is to accept its peer, but had no name itself";
        let advice = format!("... | sk-rewrite --accept {}=PATH | ckpt-restore", usk.ino);
        return Err(Refused::new(what(usk), reason).advise(advice).into());
    }
    let ours = UnixSkEntry { name: name.clone(), ..UnixSkEntry::clone(usk) };
    let ours = sockets.listener_of(&ours).cloned();
    let known = sockets.momentary.iter().position(|m| m.name == name && m.in_place);
    let place = match (&ours, known) {
        (Some(listener), _) => Place::Ours(listener.ino.into()),
        (None, Some(index)) => Place::Momentary(index),
        (None, None) => listen(sockets, opening, usk, to)?,
    };
    let creds = ours.as_ref().and_then(|l| l.ckpt_peer_creds.as_ref()).cloned();
    sockets.listen_as(place, creds.as_ref())?;
    if let Some(fd) = sockets.strangers.get_mut(&place).filter(|s| !s.is_empty()).map(|s| s.remove(0)) {
        return Ok(fd);
    }
    let timeout = opening.options.timeout;
    let limit = timeout.map_or_else(String::new, |t| format!(", for at most {} s", t.as_secs_f64()));
    (opening.options.note)(&format!(
        "{}: waits for its peer to connect to {}{limit}",
        what(usk),
        shown(&name)
    ));
    let end = timeout.map(|t| Instant::now() + t);
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let listening = sockets.listening(place)?;
        if wait(opening, Some(listening), left)? {
            return Ok(sock::accept(listening)?);
        }
        if left.is_some_and(|left| left.is_zero()) {
            bail!(
                "nobody has connected to {} within {} s",
                shown(&name),
                timeout.unwrap_or_default().as_secs_f64()
            );
        }
    }
}

/// Listens where no socket of the images does, for as long as this restore takes.
fn listen(
    sockets: &mut Sockets,
    opening: &mut Opening<'_>,
    usk: &UnixSkEntry,
    to: Option<&[u8]>,
) -> anyhow::Result<Place> {
    let mut at = usk.clone();
    if let Some(to) = to {
        at.name = to.to_vec();
        at.name_dir = None;
    }
    let name = trim_path(&at.name).to_vec();
    let fd = new_socket(usk)?;
    match socket_path(&at) {
        None => sock::bind_unix(fd.as_fd(), &name)?,
        Some(place) => {
            remove_stale(usk, &place)?;
            // As it was: a relative name is one from the directory where it was bound.
            let name = if name.starts_with(b"/") { path(&name).to_owned() } else { place.clone() };
            sock::bind_unix(fd.as_fd(), name.as_os_str().as_encoded_bytes())?;
            opening.created(place, false);
        }
    }
    Ok(sockets.add_momentary(name, usk, fd, None, true))
}

/// Waits until `fd` is readable, the user wants to end, which is an error, or the time is over.
fn wait(opening: &Opening<'_>, fd: Option<BorrowedFd<'_>>, limit: Option<Duration>) -> anyhow::Result<bool> {
    let interrupt = opening.options.interrupt.as_ref();
    let mut fds: Vec<PollFd<'_>> = fd
        .into_iter()
        .chain(interrupt.map(|i| i.as_fd()))
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    // A little later rather than a little earlier.
    let limit = limit.map_or(PollTimeout::NONE, |l| {
        PollTimeout::try_from(l + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, limit) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("poll"),
    }
    let ready = |index: usize| fds.get(index).is_some_and(|f| f.any().unwrap_or(false));
    if let Some(interrupt) = interrupt
        && ready(usize::from(fd.is_some()))
    {
        // struct signalfd_siginfo begins with the signal's number.
        let mut info = [0; 128];
        let _ = nix::unistd::read(interrupt, &mut info);
        let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let signal = Signal::try_from(number).map_or("a signal", Signal::as_str);
        bail!("interrupted by {signal}; nothing was restored");
    }
    Ok(fd.is_some() && ready(0))
}
