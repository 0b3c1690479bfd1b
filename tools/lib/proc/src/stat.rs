//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`, see proc_pid_stat(5).
//!
//! One line of fields separated by spaces, except that the second, the command name in parentheses,
//! is whatever the task chose (prctl(PR_SET_NAME)): spaces, parentheses and newlines come as they are.
//! No later field holds a `)`, so the last one ends the name.

use memchr::memrchr;

use crate::status::Malformed;

/// The fields of the line that matter here; numbers in comments are those of proc_pid_stat(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Process or thread id.
    pub pid: i32,
    /// Command name, at most 15 bytes for user tasks, raw.
    pub comm: Vec<u8>,
    /// State letter (3): `R`, `S`, `D`, `T`, `t`, `Z`, ...
    pub state: u8,
    /// Parent process (4).
    pub ppid: i32,
    /// Process group (5).
    pub pgrp: i32,
    /// Session (6).
    pub session: i32,
    /// Controlling terminal's device number (7), 0 for none.
    pub tty_nr: i32,
    /// Foreground process group of that terminal (8), -1 for none.
    pub tpgid: i32,
    /// `PF_*` bits (9).
    pub flags: u32,
    /// Nice value (19).
    pub nice: i32,
    /// Threads in the process (20).
    pub num_threads: i32,
    /// Start time after boot in clock ticks (22): with the pid, the task's identity.
    pub start_time: u64,
    /// Program text (26, 27). Addresses are 0 without permission to trace the task.
    pub start_code: u64,
    /// End of program text (27).
    pub end_code: u64,
    /// Bottom of the stack (28).
    pub start_stack: u64,
    /// Signal that its parent gets when it ends (38); -1 for threads.
    pub exit_signal: i32,
    /// Real-time priority (40), 0 outside the real-time classes.
    pub rt_priority: u32,
    /// Scheduling policy (41), `SCHED_*`.
    pub policy: u32,
    /// Program data (45).
    pub start_data: u64,
    /// End of program data (46).
    pub end_data: u64,
    /// Where the heap starts (47).
    pub start_brk: u64,
    /// Command line arguments (48).
    pub arg_start: u64,
    /// End of the arguments (49).
    pub arg_end: u64,
    /// Environment (50).
    pub env_start: u64,
    /// End of the environment (51).
    pub env_end: u64,
    /// Exit status as waitpid(2) gives it (52); 0 without permission to trace the task.
    pub exit_code: i32,
}

/// Reads the line.
///
/// # Errors
/// The first field that is missing or no number.
pub fn parse(text: &[u8]) -> Result<Stat, Malformed> {
    let open = text.iter().position(|&b| b == b'(').ok_or(Malformed("stat: command name"))?;
    let close = memrchr(b')', text).filter(|&c| c > open).ok_or(Malformed("stat: command name"))?;
    let head = text.get(..open).unwrap_or_default();
    let pid =
        std::str::from_utf8(head).ok().and_then(|s| s.trim().parse().ok()).ok_or(Malformed("stat: pid"))?;
    let comm = text.get(open + 1..close).unwrap_or_default().to_vec();
    let rest =
        std::str::from_utf8(text.get(close + 1..).unwrap_or_default()).map_err(|_| Malformed("stat"))?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Fields are counted from 1 in the manual, and two are behind us.
    let field = |n: usize| fields.get(n - 3).copied();
    fn number<T: std::str::FromStr>(field: Option<&str>, name: &'static str) -> Result<T, Malformed> {
        field.and_then(|f| f.parse().ok()).ok_or(Malformed(name))
    }
    let state = field(3).and_then(|f| f.bytes().next()).ok_or(Malformed("stat: state"))?;
    Ok(Stat {
        pid,
        comm,
        state,
        ppid: number(field(4), "stat: ppid")?,
        pgrp: number(field(5), "stat: pgrp")?,
        session: number(field(6), "stat: session")?,
        tty_nr: number(field(7), "stat: tty_nr")?,
        tpgid: number(field(8), "stat: tpgid")?,
        flags: number(field(9), "stat: flags")?,
        nice: number(field(19), "stat: nice")?,
        num_threads: number(field(20), "stat: num_threads")?,
        start_time: number(field(22), "stat: starttime")?,
        start_code: number(field(26), "stat: startcode")?,
        end_code: number(field(27), "stat: endcode")?,
        start_stack: number(field(28), "stat: startstack")?,
        exit_signal: number(field(38), "stat: exit_signal")?,
        rt_priority: number(field(40), "stat: rt_priority")?,
        policy: number(field(41), "stat: policy")?,
        start_data: number(field(45), "stat: start_data")?,
        end_data: number(field(46), "stat: end_data")?,
        start_brk: number(field(47), "stat: start_brk")?,
        arg_start: number(field(48), "stat: arg_start")?,
        arg_end: number(field(49), "stat: arg_end")?,
        env_start: number(field(50), "stat: env_start")?,
        env_end: number(field(51), "stat: env_end")?,
        exit_code: number(field(52), "stat: exit_code")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: &[u8] = b" S 1 4711 4710 34816 4711 4194304 92 0 0 0 1 2 0 0 20 -5 3 0 863604 2764800 226 \
        18446744073709551615 4198400 4689873 140732313570736 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 4859608 4866672 \
        801955840 140732313573833 140732313573891 140732313573891 140732313575391 9\n";

    fn line(comm: &[u8]) -> Vec<u8> {
        [b"4711 (", comm, b")", TAIL].concat()
    }

    #[test]
    fn plain_line() {
        let stat = parse(&line(b"counter")).unwrap();
        assert_eq!((stat.pid, stat.comm.as_slice(), stat.state), (4711, &b"counter"[..], b'S'));
        assert_eq!((stat.ppid, stat.pgrp, stat.session, stat.tty_nr), (1, 4711, 4710, 34816));
        assert_eq!((stat.flags, stat.nice, stat.num_threads, stat.start_time), (4194304, -5, 3, 863604));
        assert_eq!((stat.start_code, stat.end_code), (4198400, 4689873));
        assert_eq!((stat.exit_signal, stat.rt_priority, stat.policy), (17, 0, 0));
        assert_eq!((stat.start_brk, stat.env_end, stat.exit_code), (801955840, 140732313575391, 9));
    }

    #[test]
    fn names_with_spaces_parentheses_newlines_and_no_text() {
        for comm in [&b"a b"[..], b") S 0 (", b"((x)", b"x)\n) R 7", b"", b"\xff\xfe\x80"] {
            let stat = parse(&line(comm)).unwrap();
            assert_eq!((stat.comm.as_slice(), stat.ppid), (comm, 1));
        }
    }

    #[test]
    fn cut_lines_are_errors() {
        let whole = line(b"x");
        for end in 0..whole.len() - 3 {
            assert!(parse(&whole[..end]).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn own_line() {
        let stat = parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(stat.pid.unsigned_abs(), std::process::id());
    }
}
