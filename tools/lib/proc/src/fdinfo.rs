//! /proc/PID/fdinfo/FD (proc_pid_fdinfo(5), Documentation/filesystems/proc.rst).
//!
//! Four lines that every descriptor has, then lines of its kind:
//!
//! ```text
//! pos:    0                    decimal
//! flags:  02000002             octal, O_CLOEXEC mixed in from the descriptor
//! mnt_id: 15
//! ino:    1038                 since Linux 5.14
//! eventfd-count:                7      hexadecimal
//! tfd:        9 events:       19 data:               2a  pos:0 ino:40e sdev:10
//! ```
//!
//! Lines of unknown names are passed over: kernels add some with nearly every release.

/// A malformed file: line and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fdinfo: {what}: \"{line}\"")]
pub struct FdInfoError {
    /// What was expected.
    pub what: &'static str,
    /// The line, escaped.
    pub line: String,
}

/// One descriptor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// File position.
    pub pos: u64,
    /// Status flags of the open file; `O_CLOEXEC` is the descriptor's.
    pub flags: u32,
    /// Mount that the file was opened on.
    pub mnt_id: i32,
    /// What only files of its kind have.
    pub special: Special,
    /// Of a unix socket: descriptors in flight in its queue (Linux 5.10).
    pub scm_fds: u32,
    /// `lock:` lines, each a file lock held through this open file.
    pub locks: Vec<String>,
}

/// Lines that only files of one kind have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Special {
    /// None that we know.
    #[default]
    None,
    /// eventfd(2).
    Eventfd {
        /// Counter.
        count: u64,
        /// `EFD_SEMAPHORE`; told since Linux 6.5.
        semaphore: bool,
    },
    /// epoll(7): what is in the set.
    Epoll(Vec<EpollTarget>),
    /// signalfd(2): signals taken, bit 0 being signal 1.
    Signalfd(u64),
    /// timerfd_create(2).
    Timerfd(Timerfd),
    /// inotify(7): its watches. Without any there is no line to tell it by.
    Inotify(Vec<InotifyWatch>),
    /// fanotify(7).
    Fanotify,
    /// pidfd_open(2): the process, -1 if it is gone.
    Pidfd(i32),
}

/// One watch of an inotify instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Its number.
    pub wd: u32,
    /// Inode of the watched file.
    pub ino: u64,
    /// Its device, major << 20 | minor.
    pub dev: u32,
    /// `IN_*`.
    pub mask: u32,
    /// Type of the file handle, and the handle (open_by_handle_at(2)); empty if the file system has none.
    pub handle_type: i32,
    /// See there.
    pub handle: Vec<u8>,
}

/// One file in an epoll set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpollTarget {
    /// Descriptor number under which it was added.
    pub fd: i32,
    /// Events and `EPOLLET`, `EPOLLONESHOT` ...
    pub events: u32,
    /// The user's word.
    pub data: u64,
    /// Position of the target file.
    pub pos: u64,
    /// Inode of the target file.
    pub ino: u64,
    /// Its device as the kernel encodes it internally: major << 20 | minor.
    pub dev: u32,
}

/// State of a timerfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timerfd {
    /// `CLOCK_*`.
    pub clockid: u32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// Flags of the last timerfd_settime(2).
    pub settime_flags: u32,
    /// Time left until the next expiration, seconds and nanoseconds; zero: disarmed or expired.
    pub value: (u64, u64),
    /// Interval.
    pub interval: (u64, u64),
}

fn error(what: &'static str, line: &[u8]) -> FdInfoError {
    FdInfoError { what, line: line.escape_ascii().to_string() }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or("").trim()
}

/// `name: value` pairs of a line in which values hold no blanks and may follow the colon at some distance.
fn pairs(line: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    let mut words = text(line).split_ascii_whitespace();
    std::iter::from_fn(move || {
        let word = words.next()?;
        let (name, value) = word.split_once(':')?;
        let value = if value.is_empty() { words.next().unwrap_or("") } else { value };
        Some((name, value))
    })
}

fn epoll_target(line: &[u8]) -> Result<EpollTarget, FdInfoError> {
    let mut target = EpollTarget::default();
    let mut seen = false;
    for (name, value) in pairs(line) {
        let bad = |_| error("a file of an epoll set", line);
        match name {
            "tfd" => {
                target.fd = value.parse().map_err(bad)?;
                seen = true;
            }
            "events" => target.events = u32::from_str_radix(value, 16).map_err(bad)?,
            "data" => target.data = u64::from_str_radix(value, 16).map_err(bad)?,
            "pos" => target.pos = value.parse::<i64>().map_err(bad)?.cast_unsigned(),
            "ino" => target.ino = u64::from_str_radix(value, 16).map_err(bad)?,
            "sdev" => target.dev = u32::from_str_radix(value, 16).map_err(bad)?,
            _ => {}
        }
    }
    if seen { Ok(target) } else { Err(error("a file of an epoll set", line)) }
}

/// `inotify wd:1 ino:2 sdev:3 mask:4 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:0a0b...`, all
/// hexadecimal.
fn inotify_watch(line: &[u8]) -> Result<InotifyWatch, FdInfoError> {
    let bad = || error("a watch of inotify", line);
    let mut watch = InotifyWatch::default();
    for word in text(line).split_ascii_whitespace() {
        let Some((name, value)) = word.split_once(':') else { continue };
        let number = || u64::from_str_radix(value, 16).map_err(|_| bad());
        let short = || u32::from_str_radix(value, 16).map_err(|_| bad());
        match name {
            "wd" => watch.wd = short()?,
            "ino" => watch.ino = number()?,
            "sdev" => watch.dev = short()?,
            "mask" => watch.mask = short()?,
            "fhandle-type" => watch.handle_type = short()?.cast_signed(),
            "f_handle" => {
                let (digits, odd) = value.as_bytes().as_chunks::<2>();
                let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
                let handle = digits.iter().map(byte).collect::<Option<Vec<u8>>>();
                watch.handle = handle.filter(|_| odd.is_empty()).ok_or_else(bad)?;
            }
            _ => {}
        }
    }
    if watch.wd == 0 { Err(bad()) } else { Ok(watch) }
}

/// `(seconds, nanoseconds)`.
fn time(value: &str, line: &[u8]) -> Result<(u64, u64), FdInfoError> {
    let parse = || {
        let (seconds, nanos) = value.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
        Some((seconds.trim().parse().ok()?, nanos.trim().parse().ok()?))
    };
    parse().ok_or_else(|| error("expected (seconds, nanoseconds)", line))
}

/// Parses the file.
///
/// # Errors
/// A known line whose value is no number, or no `flags:` line.
pub fn parse(bytes: &[u8]) -> Result<FdInfo, FdInfoError> {
    let mut info = FdInfo::default();
    let mut timer = None::<Timerfd>;
    let mut flags = None;
    for line in bytes.split(|&b| b == b'\n') {
        let Some(colon) = memchr::memchr(b':', line) else {
            continue;
        };
        let (name, value) = (&line[..colon], text(&line[colon + 1..]));
        let bad = |_| error("expected a number", line);
        match name {
            b"pos" => info.pos = value.parse::<i64>().map_err(bad)?.cast_unsigned(),
            b"flags" => flags = Some(u32::from_str_radix(value, 8).map_err(bad)?),
            b"mnt_id" => info.mnt_id = value.parse().map_err(bad)?,
            b"scm_fds" => info.scm_fds = value.parse().map_err(bad)?,
            b"lock" => info.locks.push(line[colon + 1..].trim_ascii().escape_ascii().to_string()),
            b"eventfd-count" => {
                info.special = Special::Eventfd {
                    count: u64::from_str_radix(value, 16).map_err(bad)?,
                    semaphore: false,
                };
            }
            b"eventfd-semaphore" => {
                if let Special::Eventfd { semaphore, .. } = &mut info.special {
                    *semaphore = value == "1";
                }
            }
            b"sigmask" => info.special = Special::Signalfd(u64::from_str_radix(value, 16).map_err(bad)?),
            b"Pid" => info.special = Special::Pidfd(value.parse().map_err(bad)?),
            b"tfd" => match &mut info.special {
                Special::Epoll(targets) => targets.push(epoll_target(line)?),
                other => *other = Special::Epoll(vec![epoll_target(line)?]),
            },
            b"clockid" => timer.get_or_insert_default().clockid = value.parse().map_err(bad)?,
            b"ticks" => timer.get_or_insert_default().ticks = value.parse().map_err(bad)?,
            b"settime flags" => {
                timer.get_or_insert_default().settime_flags = u32::from_str_radix(value, 8).map_err(bad)?;
            }
            b"it_value" => timer.get_or_insert_default().value = time(value, line)?,
            b"it_interval" => timer.get_or_insert_default().interval = time(value, line)?,
            b"inotify wd" => match &mut info.special {
                Special::Inotify(watches) => watches.push(inotify_watch(line)?),
                other => *other = Special::Inotify(vec![inotify_watch(line)?]),
            },
            name if name.starts_with(b"fanotify ") => info.special = Special::Fanotify,
            _ => {}
        }
    }
    if let Some(timer) = timer {
        info.special = Special::Timerfd(timer);
    }
    info.flags = flags.ok_or_else(|| error("no line of flags", b""))?;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_file() {
        let info = parse(b"pos:\t12\nflags:\t02102001\nmnt_id:\t29\nino:\t42\n").unwrap();
        assert_eq!((info.pos, info.flags, info.mnt_id), (12, 0o2102001, 29));
        assert_eq!(info.special, Special::None);
    }

    #[test]
    fn eventfd_count_is_hexadecimal() {
        let info = parse(
            b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1038\neventfd-count:               1f\neventfd-id: 3\neventfd-semaphore: 1\n",
        )
        .unwrap();
        assert_eq!(info.special, Special::Eventfd { count: 31, semaphore: true });
    }

    #[test]
    fn epoll_with_negative_position_and_high_events() {
        let info = parse(
            b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1038\n\
              tfd:        9 events:       19 data:               2a  pos:0 ino:40e sdev:10\n\
              tfd:      100 events: c0000001 data: ffffffffffffffff  pos:-1 ino:1 sdev:fe00000\n",
        )
        .unwrap();
        let Special::Epoll(targets) = info.special else { panic!("{info:?}") };
        assert_eq!(targets[0], EpollTarget { fd: 9, events: 25, data: 42, pos: 0, ino: 1038, dev: 16 });
        assert_eq!(targets[1].events, 0xc000_0001);
        assert_eq!((targets[1].data, targets[1].pos, targets[1].dev), (u64::MAX, u64::MAX, 254 << 20));
    }

    #[test]
    fn timerfd() {
        let info = parse(
            b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1038\nclockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49406829)\nit_interval: (1, 5)\n",
        )
        .unwrap();
        let expected =
            Timerfd { clockid: 1, ticks: 3, settime_flags: 1, value: (0, 49_406_829), interval: (1, 5) };
        assert_eq!(info.special, Special::Timerfd(expected));
    }

    #[test]
    fn locks_and_watches_are_seen() {
        let info =
            parse(b"pos:\t0\nflags:\t02\nmnt_id:\t15\nlock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:2 0 EOF\n")
                .unwrap();
        assert_eq!(info.locks.len(), 1);
        let info =
            parse(b"pos:\t0\nflags:\t00\nmnt_id:\t15\ninotify wd:1f ino:2 sdev:300001 mask:4 ignored_mask:0 fhandle-bytes:2 fhandle-type:1 f_handle:0aff\ninotify wd:1 ino:2 sdev:3 mask:4 ignored_mask:0\n");
        let Special::Inotify(watches) = info.unwrap().special else { panic!("no inotify") };
        let first =
            InotifyWatch { wd: 0x1f, ino: 2, dev: 0x30_0001, mask: 4, handle_type: 1, handle: vec![10, 255] };
        assert_eq!(watches.len(), 2);
        assert_eq!(watches[0], first);
        assert!(parse(b"flags:\t00\ninotify wd:1 f_handle:0\n").is_err());
    }

    #[test]
    fn nonsense_is_an_error_not_a_panic() {
        for text in [
            &b""[..],
            b"pos:\tx\nflags:\t0\n",
            b"flags:\t9\n",
            b"flags:\t0\ntfd: events: 1\n",
            b"flags: 0\nit_value: (1 2)\n",
            b"flags: 0\nit_value: (\xff, 2)\n",
        ] {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }
}
