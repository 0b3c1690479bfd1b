//! CRIU's statistics files, `stats-dump` and `stats-restore`.
//!
//! They are no images: nothing is restored from them, they have a magic of their own and no `.img` in
//! their names, and no reader of a directory looks at them. `crit show` prints them.

use std::{io, time::Duration};

use ckpt_proto::{Message, catalogue::SERVICE_MAGIC, file, types::StatsEntry};

/// Name of the file that a dump leaves.
pub const DUMP: &str = "stats-dump";
/// Name of the file that a restore leaves.
pub const RESTORE: &str = "stats-restore";

const STATS_MAGIC: u32 = 0x5709_3306;

/// Contents of such a file.
///
/// # Errors
/// None that can be met: it has a dozen numbers.
pub fn contents(stats: &StatsEntry) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.extend(SERVICE_MAGIC.to_le_bytes());
    bytes.extend(STATS_MAGIC.to_le_bytes());
    file::write_entry(&mut bytes, &stats.encode_to_vec())?;
    Ok(bytes)
}

/// Microseconds as they are counted there; more than an hour, for which there is no room, is the most there is.
#[must_use]
pub fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
