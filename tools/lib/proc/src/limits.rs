//! `/proc/PID/limits`: a table of resource limits, a line per resource in the kernel's order
//! (`RLIMIT_CPU` = 0, ...). The first column holds spaces, so it is matched as a whole.
//!
//! prlimit(2) would give numbers, but on a task of another user it wants CAP_SYS_RESOURCE even for
//! reading.

use crate::status::Malformed;

/// No limit (`RLIM_INFINITY`).
pub const INFINITY: u64 = u64::MAX;

/// First column of each line, in order of the resource numbers, and the name of the constant.
pub const RESOURCES: [(&str, &str); 16] = [
    ("Max cpu time", "RLIMIT_CPU"),
    ("Max file size", "RLIMIT_FSIZE"),
    ("Max data size", "RLIMIT_DATA"),
    ("Max stack size", "RLIMIT_STACK"),
    ("Max core file size", "RLIMIT_CORE"),
    ("Max resident set", "RLIMIT_RSS"),
    ("Max processes", "RLIMIT_NPROC"),
    ("Max open files", "RLIMIT_NOFILE"),
    ("Max locked memory", "RLIMIT_MEMLOCK"),
    ("Max address space", "RLIMIT_AS"),
    ("Max file locks", "RLIMIT_LOCKS"),
    ("Max pending signals", "RLIMIT_SIGPENDING"),
    ("Max msgqueue size", "RLIMIT_MSGQUEUE"),
    ("Max nice priority", "RLIMIT_NICE"),
    ("Max realtime priority", "RLIMIT_RTPRIO"),
    ("Max realtime timeout", "RLIMIT_RTTIME"),
];

/// A soft and a hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// In force.
    pub soft: u64,
    /// How far the soft limit may be raised.
    pub hard: u64,
}

/// Reads the table: one limit per resource, indexed by its number.
///
/// # Errors
/// A resource that is missing or has no numbers.
pub fn parse(text: &[u8]) -> Result<[Limit; 16], Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed("limits"))?;
    let mut limits = [Limit { soft: INFINITY, hard: INFINITY }; 16];
    for (limit, (title, name)) in limits.iter_mut().zip(RESOURCES) {
        let line = text.lines().find_map(|l| l.strip_prefix(title)).ok_or(Malformed(name))?;
        let mut columns = line.split_ascii_whitespace().map(|v| match v {
            "unlimited" => Some(INFINITY),
            number => number.parse().ok(),
        });
        let mut next = || columns.next().flatten().ok_or(Malformed(name));
        *limit = Limit { soft: next()?, hard: next()? };
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             unlimited            unlimited            bytes     
Max data size             unlimited            unlimited            bytes     
Max stack size            8388608              unlimited            bytes     
Max core file size        0                    unlimited            bytes     
Max resident set          unlimited            unlimited            bytes     
Max processes             96365                96365                processes 
Max open files            1024                 20000                files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
Max pending signals       96365                96365                signals   
Max msgqueue size         819200               819200               bytes     
Max nice priority         0                    0                    
Max realtime priority     0                    0                    
Max realtime timeout      18446744073709551614 unlimited            us        
";

    #[test]
    fn table() {
        let limits = parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(limits[0], Limit { soft: INFINITY, hard: INFINITY });
        assert_eq!(limits[3], Limit { soft: 8_388_608, hard: INFINITY });
        assert_eq!(limits[7], Limit { soft: 1024, hard: 20000 });
        assert_eq!(limits[13], Limit { soft: 0, hard: 0 });
        assert_eq!(limits[15], Limit { soft: u64::MAX - 1, hard: INFINITY });
    }

    #[test]
    fn missing_line_names_the_limit() {
        let cut = SAMPLE.replace("Max msgqueue size ", "Max something     ");
        assert_eq!(parse(cut.as_bytes()), Err(Malformed("RLIMIT_MSGQUEUE")));
    }

    #[test]
    fn own_table() {
        parse(&std::fs::read("/proc/self/limits").unwrap()).unwrap();
    }
}
