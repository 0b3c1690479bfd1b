//! /proc/PID/maps and /proc/PID/smaps (proc_pid_maps(5), proc_pid_smaps(5)).
//!
//! `smaps` is the only file in which the kernel tells a mapping's flags (VmFlags); the sizes in it
//! are skipped. Paths are bytes with `\012` for a newline, exactly as the kernel prints them; who
//! wants the file itself opens `/proc/PID/map_files/START-END`.

use memchr::{memchr, memchr_iter};

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// PROT_EXEC.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device of the file, major and minor.
    pub dev: (u32, u32),
    /// Inode of the file; 0 if there is none.
    pub inode: u64,
    /// Path, `[name]`, or empty.
    pub name: Vec<u8>,
    /// Two-letter VmFlags; empty when parsed from `maps`.
    pub flags: Vec<[u8; 2]>,
    /// Size of its pages, KiB; 0 when parsed from `maps`.
    pub page_kib: u64,
}

impl Mapping {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never: the kernel keeps no empty mappings.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether VmFlags holds `flag` (`b"gd"`: grows down, ...).
    #[must_use]
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    /// Whether a file is mapped, shared anonymous memory included.
    #[must_use]
    pub fn file(&self) -> bool {
        self.inode != 0
    }
}

/// A line that is not what the kernel writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: not a mapping: {text}")]
pub struct ParseError {
    /// Number of the line, from 1.
    pub line: usize,
    /// The line, escaped.
    pub text: String,
}

/// Parses the contents of `maps` or `smaps`.
///
/// # Errors
/// A line that is neither a mapping nor one of smaps' `Name: value` lines.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, ParseError> {
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut from = 0;
    let ends = memchr_iter(b'\n', text).chain((!text.ends_with(b"\n")).then_some(text.len()));
    for (number, end) in ends.enumerate() {
        let line = &text[from..end];
        from = end + 1;
        if line.is_empty() {
            continue;
        }
        // Details of smaps begin with a capital letter, mappings with a hexadecimal digit.
        if line[0].is_ascii_uppercase() {
            if let (Some(flags), Some(last)) = (line.strip_prefix(b"VmFlags:"), mappings.last_mut()) {
                last.flags = flags.split(|&b| b == b' ').filter_map(|f| f.try_into().ok()).collect();
            } else if let (Some(size), Some(last)) =
                (line.strip_prefix(b"KernelPageSize:"), mappings.last_mut())
            {
                let kib = std::str::from_utf8(size).ok().and_then(|s| s.trim().strip_suffix(" kB"));
                last.page_kib = kib.and_then(|kib| kib.parse().ok()).unwrap_or(0);
            }
            continue;
        }
        let mapping = mapping(line)
            .ok_or_else(|| ParseError { line: number + 1, text: line.escape_ascii().to_string() })?;
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|&b| b != b' ')?;
        let end = memchr(b' ', &rest[start..]).map_or(rest.len(), |n| start + n);
        let word = &rest[start..end];
        rest = &rest[end..];
        Some(word)
    };
    let (range, perms, offset, dev, inode) = (field()?, field()?, field()?, field()?, field()?);
    let (start, end) = pair(range, b'-')?;
    let (major, minor) = pair(dev, b':')?;
    let &[read, write, exec, shared] = perms else { return None };
    let name = rest.iter().position(|&b| b != b' ').map_or(&b""[..], |n| &rest[n..]);
    (start <= end).then(|| Mapping {
        start,
        end,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        shared: shared == b's',
        offset: hex(offset).unwrap_or(0),
        dev: (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0)),
        inode: std::str::from_utf8(inode).ok().and_then(|s| s.parse().ok()).unwrap_or(0),
        name: name.to_vec(),
        flags: Vec::new(),
        page_kib: 0,
    })
}

fn pair(word: &[u8], separator: u8) -> Option<(u64, u64)> {
    let at = memchr(separator, word)?;
    Some((hex(&word[..at])?, hex(&word[at + 1..])?))
}

fn hex(word: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_sample() {
        let text = b"55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]\n\
            Size:                132 kB\nKernelPageSize:        4 kB\nRss:                   4 kB\nTHPeligible:           0\n\
            VmFlags: rd wr mr mw me ac sd \n\
            7f1200000000-7f1200001000 r--s 00002000 fe:01 99 /tmp/a b\\012c (deleted)\nVmFlags: rd sh dd \n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\nVmFlags: ex \n";
        let maps = parse(text).expect("the sample parses");
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].name, b"[heap]");
        assert_eq!(maps[0].page_kib, 4);
        assert!(maps[0].has(b"wr") && !maps[0].shared && !maps[0].file());
        assert_eq!(maps[1].name, b"/tmp/a b\\012c (deleted)");
        assert_eq!((maps[1].offset, maps[1].dev, maps[1].inode), (0x2000, (0xfe, 1), 99));
        assert!(maps[1].shared && maps[1].has(b"dd"));
        assert_eq!((maps[2].start, maps[2].exec, maps[2].read), (0xffff_ffff_ff60_0000, true, false));
    }

    #[test]
    fn garbage_is_an_error() {
        let error =
            parse(b"55d0c0a00000-55d0c0a21000 rw-p 0 00:00 0\nzz\n").expect_err("second line is no mapping");
        assert_eq!(error.line, 2);
    }
}
