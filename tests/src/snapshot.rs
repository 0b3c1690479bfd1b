//! Everything about a tree of processes that can be seen from outside, as sorted lines.
//!
//! Two uses. A target that was dumped and runs on has to look the same before and after, to the last line
//! ([`Snapshot::of`]). A restored tree has to look like the original but for what the kernel gives out anew
//! ([`Snapshot::portable`]: inode numbers of pipes and sockets, mount ids, the parent of the root).
//!
//! Left out because it changes by itself: counters, resident sizes, what is left of timers, which CPU.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    fs,
};

use crate::process;

/// The state of a tree: "pid 12 status SigBlk" -> "0000000000000200".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, String>);

/// Lines of `status` that say something lasting.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmLck",
    "VmPeak_",
    "CoreDumping",
    "THP_enabled",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];

/// Running, sleeping and waiting for the disk are one state to an observer; stopped, traced and dead are not.
fn state_class(state: char) -> &'static str {
    match state {
        'R' | 'S' | 'D' | 'I' => "alive",
        'T' => "stopped",
        't' => "TRACED",
        'Z' | 'X' => "dead",
        _ => "gone",
    }
}

/// A system call as `/proc/TID/syscall` shows it. After a stop the kernel may go on with a relative sleep through
/// restart_syscall(2): same arguments, other number. It can't be told from outside and does no harm.
fn call(text: &str) -> String {
    match text.trim_end().split_once(' ') {
        Some((_, arguments)) if arguments.contains(' ') => arguments.to_owned(),
        _ => "running".to_owned(),
    }
}

fn fdinfo(text: &str) -> String {
    let mut out = String::new();
    let mut lines: Vec<&str> = text.lines().collect();
    if text.contains("tfd:") {
        // An epoll set lists its members by address.
        lines.sort_unstable();
    }
    for line in lines {
        let name = line.split(':').next().unwrap_or_default();
        if !["it_value", "ticks", "eventfd-id"].contains(&name) {
            let _ = write!(out, "{} ", line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    out
}

fn thread(map: &mut BTreeMap<String, String>, pid: i32, tid: i32) {
    let file = |name: &str| process::text(pid, &format!("task/{tid}/{name}"));
    let mut put = |key: &str, value: String| {
        map.insert(format!("pid {pid} thread {tid} {key}"), value);
    };
    for line in file("status").lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        if STATUS.contains(&name) {
            put(&format!("status {name}"), value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    let stat = file("stat");
    if let Some((_, rest)) = stat.rsplit_once(") ") {
        let fields: Vec<&str> = rest.split(' ').collect();
        let state = fields.first().and_then(|s| s.chars().next()).unwrap_or('?');
        put("state", state_class(state).to_owned());
        // proc_pid_stat(5) numbers from 1 and counts pid and comm.
        let names = [
            ("ppid", 4),
            ("pgrp", 5),
            ("session", 6),
            ("tty", 7),
            ("exit signal", 38),
            ("rt_priority", 40),
            ("policy", 41),
            ("exit code", 52),
        ];
        for (name, number) in names {
            put(name, fields.get(number - 3).copied().unwrap_or_default().to_owned());
        }
        // A real-time policy shows its priority in place of nice.
        put("nice", fields.get(19 - 3).copied().unwrap_or_default().to_owned());
        if !matches!(state, 'Z' | 'X') {
            put("syscall", call(&file("syscall")));
        }
    }
    put("comm", file("comm"));
}

fn one_process(map: &mut BTreeMap<String, String>, pid: i32) {
    for tid in process::threads(pid) {
        thread(map, pid, tid);
    }
    let mut put = |key: String, value: String| {
        map.insert(format!("pid {pid} {key}"), value);
    };
    put("threads".into(), format!("{:?}", process::threads(pid)));
    put("children".into(), format!("{:?}", process::children(pid)));
    for name in [
        "cmdline",
        "environ",
        "limits",
        "oom_score_adj",
        "personality",
        "timerslack_ns",
        "loginuid",
        "coredump_filter",
        "timers",
        "uid_map",
    ] {
        put(name.into(), process::text(pid, name));
    }
    put("auxv".into(), format!("{:02x?}", fs::read(format!("/proc/{pid}/auxv")).unwrap_or_default()));
    for name in ["exe", "cwd", "root"] {
        put(name.into(), process::link(pid, name).display().to_string());
    }
    for line in process::text(pid, "maps").lines() {
        let (range, rest) = line.split_once(' ').unwrap_or((line, ""));
        put(format!("map {range}"), rest.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    for fd in fds.filter_map(|e| e.file_name().into_string().ok()) {
        let link = process::link(pid, &format!("fd/{fd}"));
        put(
            format!("fd {fd}"),
            format!("{} {}", link.display(), fdinfo(&process::text(pid, &format!("fdinfo/{fd}")))),
        );
    }
}

impl Snapshot {
    /// The tree of `root` as it is now.
    #[must_use]
    pub fn of(root: i32) -> Self {
        let mut map = BTreeMap::new();
        for pid in process::tree(root) {
            one_process(&mut map, pid);
        }
        Self(map)
    }

    /// What has to come back on a restore too: without what the kernel numbers afresh.
    #[must_use]
    pub fn portable(&self, root: i32) -> Self {
        let mut names: HashMap<String, String> = HashMap::new();
        let mut map = BTreeMap::new();
        for (key, value) in &self.0 {
            let of_root = key.starts_with(&format!("pid {root} "));
            // Of the dead only the exit status comes back, and where a stopped task stands in the kernel is its own affair.
            let thread =
                key.rsplit_once(" status ").or_else(|| key.rsplit_once(' ')).map_or("", |(thread, _)| thread);
            let state = self.0.get(&format!("{thread} state")).map_or("", String::as_str);
            if state == "dead" && (key.contains("status Sig") || key.ends_with("ShdPnd")) {
                continue;
            }
            if key.ends_with("status FDSize")
                || key.ends_with("loginuid")
                || (of_root && (key.ends_with("status PPid") || key.ends_with(" ppid")))
            {
                continue;
            }
            let mut words: Vec<String> = value.split(' ').map(str::to_owned).collect();
            if key.ends_with(" syscall") && state == "stopped" {
                // The last two are stack pointer and program counter.
                words = words.split_off(words.len().saturating_sub(2));
            }
            if key.contains(" map ") {
                // perms offset dev inode path: the inode of a shared or deleted file is a new one.
                if value.contains("/dev/zero") || value.contains("/memfd:") || value.contains("(deleted)") {
                    words.truncate(2);
                    words.push("anonymous file".into());
                } else if value.contains(" socket:[") {
                    // A ring; the name has the inode once more.
                    words.remove(3);
                }
            } else if key.contains(" fd ") {
                let mut kept = Vec::new();
                let mut rest = words.into_iter().peekable();
                while let Some(word) = rest.next() {
                    if word == "mnt_id:" || word == "ino:" {
                        rest.next();
                        continue;
                    }
                    if word.starts_with("ino:") || word.starts_with("sdev:") {
                        // Targets of an epoll set.
                        continue;
                    }
                    kept.push(word);
                }
                words = kept;
            }
            // A deleted file is another file with the same contents now; where its name was taken, under another name.
            if value.contains(" (deleted) ") {
                let name = words[0].rsplit_once(".ckpt.").map_or(words[0].as_str(), |(name, _)| name);
                let name = name.trim_end_matches(|c: char| c.is_ascii_digit());
                words[0] = name.to_owned();
            }
            // pipe:[4711] -> pipe #1, in the order of appearance.
            for word in &mut words {
                if (word.starts_with("pipe:[") || word.starts_with("socket:[")) && word.ends_with(']') {
                    let next = format!("{} #{}", word.split(':').next().unwrap_or_default(), names.len() + 1);
                    *word = names.entry(word.clone()).or_insert(next).clone();
                }
            }
            map.insert(key.clone(), words.join(" "));
        }
        Self(map).merged()
    }

    /// Neighbouring mappings of the same kind as one: whether the kernel merges them depends on their history.
    #[must_use]
    fn merged(self) -> Self {
        let mut out = BTreeMap::new();
        let mut last: Option<(String, u64, u64, String)> = None;
        let mut maps = Vec::new();
        for (key, value) in self.0 {
            let range = key.split_once(" map ").and_then(|(pid, range)| {
                let (start, end) = range.split_once('-')?;
                Some((
                    pid.to_owned(),
                    u64::from_str_radix(start, 16).ok()?,
                    u64::from_str_radix(end, 16).ok()?,
                ))
            });
            match range {
                Some((pid, start, end)) => maps.push((pid, start, end, value)),
                None => _ = out.insert(key, value),
            }
        }
        maps.sort();
        for (pid, start, end, value) in maps {
            match &mut last {
                // Only memory without a file: its offset says nothing.
                Some((p, _, e, v))
                    if *p == pid && *e == start && *v == value && value.contains(" 00:00 0") =>
                {
                    *e = end
                }
                _ => {
                    if let Some((p, s, e, v)) = last.replace((pid, start, end, value)) {
                        out.insert(format!("{p} map {s:x}-{e:x}"), v);
                    }
                }
            }
        }
        if let Some((p, s, e, v)) = last {
            out.insert(format!("{p} map {s:x}-{e:x}"), v);
        }
        Self(out)
    }

    /// Without the keys for which `drop` says so.
    #[must_use]
    pub fn without(mut self, drop: impl Fn(&str) -> bool) -> Self {
        self.0.retain(|key, _| !drop(key));
        self
    }

    /// The differences, one per line; empty if there are none.
    #[must_use]
    pub fn diff(&self, after: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (key, value) in &self.0 {
            match after.0.get(key) {
                None => lines.push(format!("{key}: {value:?} is gone")),
                // Caught between two calls, once before or once after.
                Some(now) if key.ends_with(" syscall") && (now == "running" || value == "running") => {}
                Some(now) if now != value => lines.push(format!("{key}: {value:?} became {now:?}")),
                Some(_) => {}
            }
        }
        lines.extend(
            after.0.iter().filter(|(k, _)| !self.0.contains_key(*k)).map(|(k, v)| format!("{k}: new: {v:?}")),
        );
        lines
    }

    /// Number of lines, to see that a snapshot is not empty.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
