//! `/proc/PID/status` and `/proc/PID/task/TID/status`, see proc_pid_status(5).
//!
//! Lines of `Key:\tvalue`. The name is the only value that a task chooses; the kernel escapes newlines
//! and backslashes in it, so lines stay lines.

/// A /proc file that isn't as the manual says: which file and field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("/proc: {0} is missing or malformed")]
pub struct Malformed(pub &'static str);

/// Real, effective, saved and file system id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ids {
    /// Real.
    pub real: u32,
    /// Effective.
    pub effective: u32,
    /// Saved.
    pub saved: u32,
    /// Of file system accesses.
    pub fs: u32,
}

/// Capability sets, bit n for capability n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caps {
    /// `CapInh`.
    pub inheritable: u64,
    /// `CapPrm`.
    pub permitted: u64,
    /// `CapEff`.
    pub effective: u64,
    /// `CapBnd`.
    pub bounding: u64,
    /// `CapAmb`.
    pub ambient: u64,
}

/// The fields that matter here. Those that older kernels or other configurations lack are optional.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Command name, raw, as [`crate::stat::Stat::comm`].
    pub name: Vec<u8>,
    /// State letter.
    pub state: u8,
    /// Process.
    pub tgid: i32,
    /// Parent process.
    pub ppid: i32,
    /// Process of the tracer, 0 if it isn't traced.
    pub tracer_pid: i32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// User ids.
    pub uid: Ids,
    /// Group ids.
    pub gid: Ids,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The pid in each nested namespace, the reader's first.
    pub ns_pids: Vec<i32>,
    /// Threads in the process.
    pub threads: u32,
    /// Pending for the thread, bit n-1 for signal n.
    pub pending: u64,
    /// Pending for the process.
    pub shared_pending: u64,
    /// Blocked.
    pub blocked: u64,
    /// Ignored.
    pub ignored: u64,
    /// Caught.
    pub caught: u64,
    /// Capabilities.
    pub caps: Caps,
    /// no_new_privs.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 off, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of seccomp filters (Linux 5.9).
    pub seccomp_filters: Option<u32>,
    /// Features that the thread turned on with arch_prctl(2): `shstk`, `wrss` (Linux 6.6, x86).
    pub thread_features: Vec<String>,
    /// Memory that is locked, KiB; 0 for what has no memory.
    pub locked_kib: u64,
    /// Whether it is a kernel thread (Linux 6.8).
    pub kthread: Option<bool>,
}

/// Reads the file.
///
/// # Errors
/// The first field that is malformed, or missing though every kernel has it.
pub fn parse(text: &[u8]) -> Result<Status, Malformed> {
    let value = |key: &[u8]| -> Option<&str> {
        let line = text.split(|&b| b == b'\n').find_map(|l| l.strip_prefix(key))?;
        std::str::from_utf8(line.strip_prefix(b":")?).ok().map(str::trim)
    };
    fn decimal<T: std::str::FromStr>(value: Option<&str>, name: &'static str) -> Result<T, Malformed> {
        value.and_then(|v| v.parse().ok()).ok_or(Malformed(name))
    }
    let hex =
        |key: &[u8], name| value(key).and_then(|v| u64::from_str_radix(v, 16).ok()).ok_or(Malformed(name));
    let list = |key: &[u8]| value(key).unwrap_or_default().split_ascii_whitespace();
    let ids = |key: &[u8], name| {
        let ids: Vec<u32> = list(key).map_while(|v| v.parse().ok()).collect();
        match ids[..] {
            [real, effective, saved, fs] => Ok(Ids { real, effective, saved, fs }),
            _ => Err(Malformed(name)),
        }
    };
    let numbers = |key: &[u8], name| -> Result<Vec<u32>, Malformed> {
        list(key).map(|v| v.parse().map_err(|_| Malformed(name))).collect()
    };
    Ok(Status {
        name: name(text),
        state: value(b"State").and_then(|v| v.bytes().next()).ok_or(Malformed("status: State"))?,
        tgid: decimal(value(b"Tgid"), "status: Tgid")?,
        ppid: decimal(value(b"PPid"), "status: PPid")?,
        tracer_pid: decimal(value(b"TracerPid"), "status: TracerPid")?,
        umask: value(b"Umask").and_then(|v| u32::from_str_radix(v, 8).ok()),
        uid: ids(b"Uid", "status: Uid")?,
        gid: ids(b"Gid", "status: Gid")?,
        groups: numbers(b"Groups", "status: Groups")?,
        ns_pids: list(b"NSpid").map_while(|v| v.parse().ok()).collect(),
        threads: decimal(value(b"Threads"), "status: Threads")?,
        pending: hex(b"SigPnd", "status: SigPnd")?,
        shared_pending: hex(b"ShdPnd", "status: ShdPnd")?,
        blocked: hex(b"SigBlk", "status: SigBlk")?,
        ignored: hex(b"SigIgn", "status: SigIgn")?,
        caught: hex(b"SigCgt", "status: SigCgt")?,
        caps: Caps {
            inheritable: hex(b"CapInh", "status: CapInh")?,
            permitted: hex(b"CapPrm", "status: CapPrm")?,
            effective: hex(b"CapEff", "status: CapEff")?,
            bounding: hex(b"CapBnd", "status: CapBnd")?,
            ambient: hex(b"CapAmb", "status: CapAmb")?,
        },
        no_new_privs: value(b"NoNewPrivs") == Some("1"),
        seccomp: value(b"Seccomp").map_or(Ok(0), |v| v.parse().map_err(|_| Malformed("status: Seccomp")))?,
        seccomp_filters: value(b"Seccomp_filters").and_then(|v| v.parse().ok()),
        thread_features: list(b"x86_Thread_features").map(str::to_owned).collect(),
        locked_kib: list(b"VmLck").next().and_then(|v| v.parse().ok()).unwrap_or(0),
        kthread: value(b"Kthread").map(|v| v == "1"),
    })
}

/// The command name, from which newlines and backslashes were escaped.
fn name(text: &[u8]) -> Vec<u8> {
    let line = text.split(|&b| b == b'\n').find_map(|l| l.strip_prefix(b"Name:\t")).unwrap_or_default();
    let mut name = Vec::with_capacity(line.len());
    let mut bytes = line.iter();
    while let Some(&byte) = bytes.next() {
        name.push(match byte {
            b'\\' if bytes.next() == Some(&b'n') => b'\n',
            byte => byte,
        });
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] =
        b"Name:\tredis \\n\\\\ser\xff)\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4711\nNgid:\t0\n\
Pid:\t4712\nPPid:\t1\nTracerPid:\t99\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t6\t7\t4294967294\nFDSize:\t64\n\
Groups:\t4 24 1000 \nNStgid:\t4711\t3\nNSpid:\t4712\t4\nNSpgid:\t4711\t3\nNSsid:\t4711\t3\nKthread:\t0\n\
VmPeak:\t    2700 kB\nVmLck:\t      64 kB\nThreads:\t2\nSigQ:\t2/96365\nSigPnd:\t0000000000000200\nShdPnd:\t8000000000000000\n\
SigBlk:\tfffffffe7ffbfeff\nSigIgn:\t0000000000001000\nSigCgt:\t0000000180004a02\nCapInh:\t0000000000000400\n\
CapPrm:\t000001fffeffffff\nCapEff:\t0000000000000000\nCapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000400\n\
NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\nSpeculation_Store_Bypass:\tvulnerable\n\
Cpus_allowed:\t3\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\n";

    #[test]
    fn sample_with_an_odd_name() {
        let s = parse(SAMPLE).unwrap();
        assert_eq!(s.name, b"redis \n\\ser\xff)");
        assert_eq!((s.state, s.tgid, s.ppid, s.tracer_pid, s.umask), (b'S', 4711, 1, 99, Some(0o22)));
        assert_eq!(s.uid, Ids { real: 1000, effective: 1001, saved: 1002, fs: 1003 });
        assert_eq!((s.gid.fs, s.groups), (4_294_967_294, vec![4, 24, 1000]));
        assert_eq!((s.ns_pids, s.threads), (vec![4712, 4], 2));
        assert_eq!((s.pending, s.shared_pending, s.blocked), (0x200, 1 << 63, 0xffff_fffe_7ffb_feff));
        assert_eq!((s.caps.ambient, s.caps.permitted, s.caps.effective), (0x400, 0x01ff_feff_ffff, 0));
        assert_eq!(s.locked_kib, 64);
        assert_eq!((s.no_new_privs, s.seccomp, s.seccomp_filters), (true, 2, Some(3)));
        assert_eq!(
            (s.thread_features, s.kthread),
            (vec!["shstk".to_owned(), "wrss".to_owned()], Some(false))
        );
    }

    #[test]
    fn keys_are_whole_words() {
        // `Seccomp` must not be answered by `Seccomp_filters`, nor `Threads` by another line's end.
        let text = String::from_utf8_lossy(SAMPLE).replace("Seccomp:\t2\n", "");
        let s = parse(text.as_bytes()).unwrap();
        assert_eq!((s.seccomp, s.seccomp_filters), (0, Some(3)));
    }

    #[test]
    fn missing_and_malformed_fields_are_errors() {
        let text = String::from_utf8_lossy(SAMPLE).into_owned();
        for (from, to, what) in [
            ("CapAmb:\t0000000000000400\n", "", "status: CapAmb"),
            ("Uid:\t1000\t1001\t1002\t1003", "Uid:\t1000\t1001", "status: Uid"),
            ("Groups:\t4 24", "Groups:\t4 x", "status: Groups"),
            ("SigBlk:\tff", "SigBlk:\tzz", "status: SigBlk"),
        ] {
            assert_eq!(parse(text.replace(from, to).as_bytes()), Err(Malformed(what)));
        }
    }

    #[test]
    fn own_file() {
        let s = parse(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(s.tgid.unsigned_abs(), std::process::id());
    }
}
