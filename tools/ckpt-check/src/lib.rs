//! Tells which kernel features and privileges there are, and what each is needed for.
//!
//! One table, [`FEATURES`]; each row is probed by using the feature in a way that changes nothing (see
//! `ckpt_sys::probe`), so a sandbox, a missing capability and an old kernel are all seen for what
//! they are. Tests ask the same table before they skip.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd},
};

use ckpt_sys::{
    Pid, RemoteAddr, TargetFd, capability, kcmp, kernel::Kernel, memory, pidfd, probe, vmas::Vmas,
};
use clap::{CommandFactory, Parser};
use serde_json::json;

/// Tells which kernel features and privileges checkpoints can use
///
/// Ends with status 3 if something is missing that every checkpoint or restore needs.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "ckpt-check", version, after_help = EXAMPLES)]
pub struct Args {
    /// Print a JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: ckpt_cli::Common,
}

const EXAMPLES: &str = "\
Examples:
  ckpt-check
  ckpt-check --json | jq -r '.features[] | select(.available | not).name'";

/// The command, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Who can't do without a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Every dump or every restore.
    Always,
    /// Some: what is said in `used_for`.
    Sometimes,
}

/// A kernel feature or privilege.
#[derive(Debug, Clone, Copy)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// What it is needed for.
    pub used_for: &'static str,
    /// Who needs it.
    pub need: Need,
    /// Why it can't be used, if it can't.
    pub probe: fn() -> Result<(), String>,
}

macro_rules! features {
    ($($name:literal, $need:ident, $used_for:literal, $probe:expr;)*) => {
        /// All that checkpoints use.
        pub const FEATURES: &[Feature] =
            &[$(Feature { name: $name, used_for: $used_for, need: Need::$need, probe: $probe },)*];
    };
}

features! {
    "ptrace", Always, "stopping the tasks of a tree", || told(probe::ptrace_seize());
    "PAGEMAP_SCAN", Always, "finding populated pages (Linux 6.7)", pagemap_scan;
    "kcmp", Always, "finding open files that tasks share", kcmp_self;
    "pidfd_getfd", Always, "looking at descriptors of a task", getfd_self;
    "process_vm_readv", Always, "reading memory", read_self;
    "clone3 set_tid", Always, "restoring tasks with their pids (Linux 5.5, CAP_CHECKPOINT_RESTORE)", || told(probe::clone3_set_tid());
    "PR_SET_MM_MAP", Always, "restoring the places of heap, arguments and environment", || told(probe::set_mm_map());
    "PTRACE_GET_RSEQ_CONFIGURATION", Always, "restartable sequences, which glibc uses in every thread (Linux 5.13)", || told(probe::ptrace_rseq());
    "sock_diag unix", Always, "unix sockets", || told(probe::sock_diag(AF_UNIX));
    "sock_diag inet", Sometimes, "TCP and UDP sockets", || told(probe::sock_diag(AF_INET));
    "kernel memory", Sometimes, "data in connections that nobody has accepted, transmit rings (CAP_BPF, CAP_PERFMON, BTF)", || told(Kernel::open().map(drop));
    "bpf iterator task_vma", Sometimes, "short freezes with --snapshot and --track: flags of mappings without a walk over all pages (Linux 6.1, CAP_BPF, CAP_PERFMON, BTF)", || told(Vmas::load().and_then(|vmas| vmas.of(own())).map(drop));
    "PTRACE_O_SUSPEND_SECCOMP", Sometimes, "tasks under seccomp (CAP_SYS_ADMIN)", || told(probe::ptrace_suspend_seccomp());
    "userfaultfd WP_ASYNC", Sometimes, "tracking which pages change between checkpoints (Linux 6.7)", || told(probe::userfaultfd_wp_async());
    "userfaultfd events", Sometimes, "restoring with --lazy (Linux 6.6, CAP_SYS_PTRACE)", || told(probe::userfaultfd_missing());
    "PR_TIMER_CREATE_RESTORE_IDS", Sometimes, "POSIX timers whose ids are far apart", || told(probe::timer_restore_ids());
    "CAP_CHECKPOINT_RESTORE", Sometimes, "choosing pids; CAP_SYS_ADMIN does as well", || capability("CAP_CHECKPOINT_RESTORE");
    "CAP_SYS_ADMIN", Sometimes, "tasks under seccomp, choosing pids on old kernels", || capability("CAP_SYS_ADMIN");
    "CAP_SYS_PTRACE", Sometimes, "tasks of other users, and set-uid programs", || capability("CAP_SYS_PTRACE");
    "CAP_SETUID", Sometimes, "restoring tasks of other users", || capability("CAP_SETUID");
    "CAP_SETGID", Sometimes, "restoring tasks of other groups", || capability("CAP_SETGID");
    "CAP_SETPCAP", Sometimes, "restoring bounding sets and securebits", || capability("CAP_SETPCAP");
    "CAP_DAC_OVERRIDE", Sometimes, "opening files of other users", || capability("CAP_DAC_OVERRIDE");
    "CAP_CHOWN", Sometimes, "restoring deleted files of other users", || capability("CAP_CHOWN");
    "CAP_KILL", Sometimes, "ending tasks of other users (--kill, --replace)", || capability("CAP_KILL");
    "CAP_NET_ADMIN", Sometimes, "TCP connections; socket buffers over the system's limit", || capability("CAP_NET_ADMIN");
    "CAP_NET_RAW", Sometimes, "raw and packet sockets, received datagrams", || capability("CAP_NET_RAW");
    "CAP_DAC_READ_SEARCH", Sometimes, "names of files that inotify watches", || capability("CAP_DAC_READ_SEARCH");
    "CAP_SYS_CHROOT", Sometimes, "restoring tasks with a root directory of their own", || capability("CAP_SYS_CHROOT");
    "CAP_SYS_NICE", Sometimes, "restoring real-time and raised priorities", || capability("CAP_SYS_NICE");
    "CAP_SYS_RESOURCE", Sometimes, "restoring hard limits over our own, and negative oom_score_adj", || capability("CAP_SYS_RESOURCE");
}

const AF_UNIX: i32 = 1;
const AF_INET: i32 = 2;

fn told(result: Result<(), ckpt_sys::SysError>) -> Result<(), String> {
    result.map_err(|error| ckpt_cli::describe(&error.into()))
}

fn own() -> Pid {
    Pid(i32::try_from(std::process::id()).unwrap_or(0))
}

fn pagemap_scan() -> Result<(), String> {
    let file = File::open("/proc/self/pagemap").map_err(|e| format!("/proc/self/pagemap: {e}"))?;
    // The page that this constant lies in.
    let start = (FEATURES.as_ptr() as u64) & !4095;
    let scan = memory::Scan {
        inverted: memory::Page::empty(),
        all: memory::Page::empty(),
        any: memory::Page::PRESENT,
        report: memory::Page::PRESENT,
    };
    let range = (RemoteAddr(start), RemoteAddr(start + 4096));
    told(memory::pagemap_scan(file.as_fd(), range.0, range.1, scan, &mut Vec::new()))
}

fn kcmp_self() -> Result<(), String> {
    told(kcmp::compare(own().leader(), own().leader(), kcmp::Object::Vm).map(drop))
}

fn getfd_self() -> Result<(), String> {
    let file = File::open("/dev/null").map_err(|e| format!("/dev/null: {e}"))?;
    told(pidfd::open(own()).and_then(|fd| pidfd::getfd(fd.as_fd(), TargetFd(file.as_raw_fd())).map(drop)))
}

fn read_self() -> Result<(), String> {
    let byte = 42u8;
    let mut copy = [0];
    told(memory::read_exact(own(), RemoteAddr(&raw const byte as u64), &mut copy))
}

/// Whether the capability called `name` is in our effective set.
fn capability(name: &str) -> Result<(), String> {
    match capability::by_name(name) {
        Some(number) if capability::held(number) => Ok(()),
        Some(_) => Err("not in the effective set".to_owned()),
        None => Err("unknown".to_owned()),
    }
}

/// Whether the feature called `name` can be used; if not, why.
///
/// # Errors
/// What the kernel said; that there is no such row, too.
pub fn available(name: &str) -> Result<(), String> {
    match FEATURES.iter().find(|feature| feature.name == name) {
        Some(feature) => (feature.probe)(),
        None => Err(format!("no feature is called {name:?}")),
    }
}

/// Probes everything and prints the report to `output`.
///
/// # Errors
/// [`ckpt_sys::Refused`] if something is missing that is always needed.
pub fn run(args: &Args, output: File) -> anyhow::Result<()> {
    let found: Vec<_> = FEATURES.iter().map(|feature| (feature, (feature.probe)())).collect();
    let mut report = Vec::new();
    if args.json {
        let features: Vec<_> = (found.iter())
            .map(|(feature, result)| {
                let mut row = json!({
                    "name": feature.name,
                    "used_for": feature.used_for,
                    "required": feature.need == Need::Always,
                    "available": result.is_ok(),
                });
                if let (Err(reason), Some(row)) = (result, row.as_object_mut()) {
                    row.insert("reason".to_owned(), reason.as_str().into());
                }
                row
            })
            .collect();
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let document = json!({"ckpt_check": 1, "kernel": kernel, "features": features});
        writeln!(report, "{document:#}")?;
    } else {
        for (feature, result) in &found {
            let state = match (result, feature.need) {
                (Ok(()), _) => "ok",
                (Err(_), Need::Always) => "MISSING",
                (Err(_), Need::Sometimes) => "missing",
            };
            writeln!(report, "{state:8} {:30} {}", feature.name, feature.used_for)?;
            if let Err(reason) = result {
                writeln!(report, "{:8} {:30}   {reason}", "", "")?;
            }
        }
    }
    match (&output).write_all(&report) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        result => result?,
    }
    let missing: Vec<_> = (found.iter())
        .filter(|(feature, result)| feature.need == Need::Always && result.is_err())
        .map(|(feature, _)| feature.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let advice = "run as root, or on a kernel from 6.7 on with CONFIG_CHECKPOINT_RESTORE; in a container, see its seccomp profile";
    Err(ckpt_sys::Refused::new("this machine", format!("always needed and missing: {}", missing.join(", ")))
        .advise(advice)
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_a_row_for_each_feature() {
        let output = File::options().write(true).open("/dev/null").unwrap();
        // What is missing here is none of this test's business, but it must be refused properly.
        if let Err(error) = run(&Args { json: true, ..Args::default() }, output) {
            assert_eq!(ckpt_cli::code_of(&error), ckpt_cli::Status::Refused);
        }
    }

    #[test]
    fn unknown_names_are_not_available() {
        assert!(available("teleportation").is_err());
        assert_eq!(available("CAP_SYS_ADMIN").is_ok(), capability("CAP_SYS_ADMIN").is_ok());
    }

    #[test]
    fn probes_leave_no_children() {
        for feature in FEATURES {
            let _ = (feature.probe)();
        }
        let children =
            std::fs::read_to_string(format!("/proc/self/task/{}/children", nix::unistd::gettid())).unwrap();
        assert_eq!(children, "");
    }
}
