//! Calls made in the name of others: so that SO_PEERCRED and SCM_CREDENTIALS tell what they told before.
//!
//! Files are opened before there are tasks, so the pids of the tree are free now, and stand-ins
//! ([`ckpt_sys::standin`]) can have them. They are gone when the tasks are made.

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
};

use ckpt_proto::types::SkCreds;
use ckpt_sys::{
    Pid, SysError, sock,
    standin::{Ids, StandIn},
    unixsock,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
};

/// Stand-ins at work.
#[derive(Debug)]
pub(super) struct Others {
    by_pid: HashMap<u32, (Ids, Option<StandIn>)>,
    /// One that binds apart; `Some(None)` if there can't be one.
    apart: Option<Option<StandIn>>,
    pub(super) warn: fn(&str),
}

fn sys(call: &'static str, errno: Errno) -> SysError {
    SysError::new(call, "a unix socket", errno)
}

impl Others {
    pub(super) fn new(warn: fn(&str)) -> Self {
        Self { by_pid: HashMap::new(), apart: None, warn }
    }

    /// Who makes a call in the name of `creds`; `None`: this process.
    fn of(&mut self, creds: Option<&SkCreds>) -> Option<&StandIn> {
        let creds = creds?;
        let ids = Ids { uid: creds.uid, gid: creds.gid, groups: creds.groups.clone() };
        let known = self.by_pid.get(&creds.pid).is_some_and(|(had, _)| *had == ids);
        if !known {
            // One of other ids has the pid.
            self.by_pid.remove(&creds.pid);
            let stand_in = start(creds.pid, &ids, self.warn);
            self.by_pid.insert(creds.pid, (ids, stand_in));
        }
        self.by_pid.get(&creds.pid)?.1.as_ref()
    }

    /// The pid that a call in the name of `creds` is noted with.
    pub(super) fn pid_of(&mut self, creds: Option<&SkCreds>) -> u32 {
        self.of(creds).map_or_else(std::process::id, |stand_in| stand_in.pid().0.unsigned_abs())
    }

    /// Sees to it that there is a process with this pid.
    pub(super) fn ensure(&mut self, pid: u32) {
        let wanted = i32::try_from(pid).ok().filter(|&pid| pid > 0).map(Pid);
        if let Some(wanted) = wanted
            && self.by_pid.get(&pid).is_none_or(|(_, stand_in)| stand_in.is_none())
            // If it can't be made it is there, or whoever needs it will say that it is not.
            && let Ok(stand_in) = StandIn::start(Some(wanted), None, false)
        {
            let ids = Ids { uid: u32::MAX, gid: u32::MAX, groups: Vec::new() };
            self.by_pid.insert(pid, (ids, Some(stand_in)));
        }
    }

    pub(super) fn pair(
        &mut self,
        creds: Option<&SkCreds>,
        kind: i32,
    ) -> Result<(OwnedFd, OwnedFd), SysError> {
        match self.of(creds) {
            Some(stand_in) => stand_in.pair(kind),
            None => {
                let kind = match kind {
                    libc::SOCK_STREAM => SockType::Stream,
                    libc::SOCK_DGRAM => SockType::Datagram,
                    _ => SockType::SeqPacket,
                };
                socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
                    .map_err(|e| sys("socketpair", e))
            }
        }
    }

    pub(super) fn listen(
        &mut self,
        creds: Option<&SkCreds>,
        fd: BorrowedFd<'_>,
        backlog: i32,
    ) -> Result<(), SysError> {
        match self.of(creds) {
            Some(stand_in) => stand_in.listen(fd, backlog),
            None => sock::listen(fd, backlog),
        }
    }

    pub(super) fn connect(
        &mut self,
        creds: Option<&SkCreds>,
        fd: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), SysError> {
        match self.of(creds) {
            Some(stand_in) => {
                let address = unixsock::address(name).ok_or_else(|| sys("connect", Errno::ENAMETOOLONG))?;
                stand_in.connect(fd, &address)
            }
            None => sock::connect_unix(fd, name),
        }
    }

    /// Binds to a path that nobody else sees, and gives the file; `None` without the privilege for it.
    pub(super) fn bind_apart(
        &mut self,
        fd: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<Option<OwnedFd>, SysError> {
        let apart = self.apart.get_or_insert_with(|| StandIn::start(None, None, true).ok());
        let Some(apart) = apart else { return Ok(None) };
        let address = unixsock::address(name).ok_or_else(|| sys("bind", Errno::ENAMETOOLONG))?;
        apart.bind_apart(fd, &address, &directories(name)).map(Some)
    }
}

fn start(pid: u32, ids: &Ids, warn: fn(&str)) -> Option<StandIn> {
    let own = Ids {
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        groups: nix::unistd::getgroups()
            .map(|all| all.iter().map(|g| g.as_raw()).collect())
            .unwrap_or_default(),
    };
    let wanted = (own != *ids).then_some(ids);
    let number = i32::try_from(pid).ok().filter(|&pid| pid > 0).map(Pid);
    let why = match StandIn::start(number, wanted, false) {
        Ok(stand_in) => return Some(stand_in),
        Err(error) if error.errno == Errno::EEXIST => "another process has it".to_owned(),
        Err(error) => error.to_string(),
    };
    warn(&format!("SO_PEERCRED of unix sockets that pid {pid} has made will tell another pid: {why}"));
    let without = StandIn::start(None, wanted, false);
    if let (Err(error), Some(_)) = (&without, wanted) {
        warn(&format!(
            "SO_PEERCRED of unix sockets that uid {} has made will tell another user: {error}",
            ids.uid
        ));
    }
    without.ok()
}

/// All directories that `name` needs, outermost first; a relative one starts from the last of them.
fn directories(name: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut base = Vec::new();
    if !name.starts_with(b"/") {
        // Deep enough for every "..".
        for _ in 0..name.split(|&b| b == b'/').filter(|part| *part == b"..").count() + 1 {
            base.extend_from_slice(b"/d");
            all.push(base.clone());
        }
    }
    let mut at = base.clone();
    let parts: Vec<&[u8]> = name.split(|&b| b == b'/').filter(|part| !part.is_empty()).collect();
    for part in parts.iter().take(parts.len().saturating_sub(1)) {
        at.push(b'/');
        at.extend_from_slice(part);
        all.push(at.clone());
    }
    if !base.is_empty() {
        all.push(base);
    }
    all
}

#[cfg(test)]
mod tests {
    #[test]
    fn directories_of_names() {
        let of = |name: &str| {
            let all = super::directories(name.as_bytes());
            all.iter().map(|d| String::from_utf8_lossy(d).into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("/x"), "");
        assert_eq!(of("/run/a/x"), "/run /run/a");
        assert_eq!(of("x"), "/d /d");
        assert_eq!(of("../a/x"), "/d /d/d /d/d/.. /d/d/../a /d/d");
    }
}
