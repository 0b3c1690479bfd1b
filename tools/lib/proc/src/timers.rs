//! `/proc/PID/timers`: the POSIX timers of a process, four lines each (`CONFIG_CHECKPOINT_RESTORE`).
//!
//! ```text
//! ID: 1
//! signal: 60/00007fff86e452a8
//! notify: signal/pid.2634
//! ClockID: 0
//! ```

use crate::status::Malformed;

/// How a timer tells that it expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// `SIGEV_SIGNAL`.
    Signal,
    /// `SIGEV_NONE`.
    None,
    /// `SIGEV_THREAD`, which the kernel treats as `SIGEV_SIGNAL`.
    Thread,
}

/// One timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer {
    /// The kernel's id.
    pub id: i32,
    /// Signal number.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// How it notifies.
    pub notify: Notify,
    /// The thread that gets the signal (`SIGEV_THREAD_ID`); `None`: the process.
    pub thread: Option<i32>,
    /// Clock, `CLOCK_*`; negative for the CPU clocks of a given process.
    pub clock: i32,
}

/// Reads the list.
///
/// # Errors
/// A line that is not as above.
pub fn parse(text: &[u8]) -> Result<Vec<Timer>, Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed("timers"))?;
    let mut lines = text.lines().filter(|l| !l.is_empty()).peekable();
    let mut timers = Vec::new();
    while let Some(first) = lines.next() {
        let mut value = |key: &str| lines.next().and_then(|l| l.strip_prefix(key));
        let id = first.strip_prefix("ID: ").and_then(|v| v.parse().ok()).ok_or(Malformed("timers: ID"))?;
        let (signal, sival) =
            value("signal: ").and_then(|v| v.split_once('/')).ok_or(Malformed("timers: signal"))?;
        let (how, whom) =
            value("notify: ").and_then(|v| v.split_once('/')).ok_or(Malformed("timers: notify"))?;
        let clock = value("ClockID: ").and_then(|v| v.parse().ok()).ok_or(Malformed("timers: ClockID"))?;
        let sival = sival.strip_prefix("0x").unwrap_or(sival);
        timers.push(Timer {
            id,
            signal: signal.parse().map_err(|_| Malformed("timers: signal"))?,
            value: if sival == "(null)" {
                0
            } else {
                u64::from_str_radix(sival, 16).map_err(|_| Malformed("timers: signal"))?
            },
            notify: match how {
                "signal" => Notify::Signal,
                "none" => Notify::None,
                "thread" => Notify::Thread,
                _ => return Err(Malformed("timers: notify")),
            },
            thread: match whom.split_once('.') {
                Some(("tid", tid)) => Some(tid.parse().map_err(|_| Malformed("timers: notify"))?),
                Some(("pid", _)) => None,
                _ => return Err(Malformed("timers: notify")),
            },
            clock,
        });
        // Fields that a later kernel may add.
        while lines.peek().is_some_and(|l| !l.starts_with("ID: ")) {
            lines.next();
        }
    }
    Ok(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds() {
        let text = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
            ID: 0\nsignal: 34/0000000000000000\nnotify: signal/tid.2640\nClockID: -21074\nSomething: new\n\
            ID: 2147483647\nsignal: 0/ffffffffffffffff\nnotify: none/pid.2634\nClockID: 1\n";
        let timers = parse(text).unwrap();
        let first = Timer {
            id: 1,
            signal: 60,
            value: 0x7fff_86e4_52a8,
            notify: Notify::Signal,
            thread: None,
            clock: 0,
        };
        assert_eq!(timers[0], first);
        assert_eq!((timers[1].thread, timers[1].clock), (Some(2640), -21074));
        assert_eq!((timers[2].id, timers[2].notify, timers[2].value), (i32::MAX, Notify::None, u64::MAX));
        assert_eq!(timers.len(), 3);
        assert_eq!(parse(b""), Ok(Vec::new()));
    }

    #[test]
    fn malformed_lists_are_errors() {
        for text in
            ["ID: x\n", "ID: 1\n", "ID: 1\nsignal: 60\n", "ID: 1\nsignal: 60/0\nnotify: maybe/pid.1\n"]
        {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
