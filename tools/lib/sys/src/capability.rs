//! Capabilities (capabilities(7)): names for messages, and which ones the calling thread has.

use nix::errno::Errno;

/// Numbers of those that this code asks for by name (linux/capability.h).
pub mod number {
    #![allow(missing_docs)]
    pub const DAC_OVERRIDE: u32 = 1;
    pub const KILL: u32 = 5;
    pub const SETGID: u32 = 6;
    pub const SETUID: u32 = 7;
    pub const SETPCAP: u32 = 8;
    pub const NET_ADMIN: u32 = 12;
    pub const SYS_PTRACE: u32 = 19;
    pub const SYS_ADMIN: u32 = 21;
    pub const SYS_NICE: u32 = 23;
    pub const SYS_RESOURCE: u32 = 24;
    pub const CHECKPOINT_RESTORE: u32 = 40;
}

/// Names by number.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Whether `set` has capability `cap`.
#[must_use]
pub fn has(set: u64, cap: u32) -> bool {
    set.checked_shr(cap).unwrap_or(0) & 1 == 1
}

/// Names of the capabilities in `set`, with commas between.
#[must_use]
pub fn names(set: u64) -> String {
    let name = |n: u32| match NAMES.get(n as usize) {
        Some(&name) => name.to_owned(),
        None => format!("capability {n}"),
    };
    (0..64).filter(|&n| has(set, n)).map(name).collect::<Vec<_>>().join(", ")
}

/// The number of the capability called `name`, as in `CAP_KILL`.
#[must_use]
pub fn by_name(name: &str) -> Option<u32> {
    NAMES.iter().position(|&known| known == name).and_then(|n| n.try_into().ok())
}

/// The calling thread's effective set; empty if the kernel does not tell.
#[must_use]
pub fn effective() -> u64 {
    // _LINUX_CAPABILITY_VERSION_3 (capget(2)): two 32-bit halves of effective, permitted, inheritable.
    let mut header: [u32; 2] = [0x2008_0522, 0];
    let mut data = [[0_u32; 3]; 2];
    // SAFETY: `header` is a __user_cap_header_struct, `data` the two __user_cap_data_struct of version 3.
    match unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) } {
        0 => u64::from(data[0][0]) | u64::from(data[1][0]) << 32,
        _ => 0,
    }
}

/// Takes all of the calling thread's permitted set into its effective set, which a change of its user has emptied.
///
/// # Errors
/// EPERM.
pub fn raise_permitted() -> Result<(), Errno> {
    let mut header: [u32; 2] = [0x2008_0522, 0];
    let mut data = [[0_u32; 3]; 2];
    // SAFETY: as in `effective`.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) })?;
    for half in &mut data {
        half[0] = half[1];
    }
    // SAFETY: as above; capset reads both, and changes this thread alone.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// Whether the calling thread has `cap` in its effective set.
#[must_use]
pub fn held(cap: u32) -> bool {
    has(effective(), cap)
}

/// The names of those of `caps` for want of which a call may have failed with `errno`; `None` if that is not what it
/// means, or all are there.
#[must_use]
pub fn lack(errno: Errno, caps: &[u32]) -> Option<String> {
    if !matches!(errno, Errno::EPERM | Errno::EACCES) {
        return None;
    }
    let have = effective();
    let set = caps.iter().filter(|&&cap| !has(have, cap)).fold(0, |set, &cap| set | 1 << cap);
    (set != 0).then(|| names(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(names(1 << 40 | 1 << 5 | 1 << 63), "CAP_KILL, CAP_CHECKPOINT_RESTORE, capability 63");
        assert_eq!(by_name("CAP_SYS_RESOURCE"), Some(number::SYS_RESOURCE));
        assert_eq!(by_name("CAP_TELEPORT"), None);
    }

    #[test]
    fn the_effective_set_is_that_of_proc() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
        assert_eq!(effective(), u64::from_str_radix(line.trim(), 16).unwrap());
    }
}
