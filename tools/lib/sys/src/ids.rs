//! Numbers that must not be mixed up.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

number! {
    /// A process (thread group) in the caller's pid namespace.
    Pid(i32)
}
number! {
    /// A thread in the caller's pid namespace.
    Tid(i32)
}
number! {
    /// A descriptor number in the target; never valid in the calling process.
    TargetFd(i32)
}
number! {
    /// Identity of an open file description in the images (`file_entry.id`).
    FileId(u32)
}
number! {
    /// A socket's inode on sockfs: the ID in `socket:[ID]`.
    SocketId(u64)
}
number! {
    /// An address in the target's address space.
    RemoteAddr(u64)
}

impl Pid {
    /// As `nix` wants it.
    #[must_use]
    pub fn nix(self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0)
    }

    /// The thread group's leader.
    #[must_use]
    pub fn leader(self) -> Tid {
        Tid(self.0)
    }
}

impl Tid {
    /// As `nix` wants it.
    #[must_use]
    pub fn nix(self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0)
    }
}

impl RemoteAddr {
    /// The address `bytes` further on.
    ///
    /// # Panics
    /// On overflow, which no address inside a mapping can reach.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.checked_add(bytes).expect("addresses end below 2^64"))
    }
}

impl fmt::LowerHex for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// Pids that are neither in use nor in the images, for tasks that end again at once.
pub fn spare_pids(taken: std::collections::BTreeSet<i32>) -> impl FnMut() -> i32 + 'static {
    // From high numbers down, where the kernel's own search arrives last.
    let exists = |pid: i32| std::path::Path::new(&format!("/proc/{pid}")).exists();
    let max = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|n| n.trim().parse().ok());
    let mut next: i32 = max.unwrap_or(32768);
    move || {
        loop {
            next -= 1;
            if next <= 300 || !taken.contains(&next) && !exists(next) {
                return next;
            }
        }
    }
}
