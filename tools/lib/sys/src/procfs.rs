//! Reading files in /proc.
//!
//! `std::fs::read` asks for the size, which is 0 there, and begins with 32 bytes, so that one line takes seven calls.
//! While a tree is frozen that is time in which it does not run: three calls do.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// Larger than nearly all of them, bytes.
const ROOM: usize = 8 << 10;

/// The whole of a file.
///
/// # Errors
/// Those of open(2) and read(2).
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(ROOM);
    // `Take` does not ask for the size.
    File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The whole of a file that is text.
///
/// # Errors
/// As [`read`]; `InvalidData` if it is not UTF-8.
pub fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_long_file_is_read() {
        let long = "/proc/kallsyms";
        assert!(read(long).unwrap().len() > 4 * ROOM || !read(long).unwrap().is_empty());
        assert_eq!(read("/proc/self/auxv").unwrap(), std::fs::read("/proc/self/auxv").unwrap());
        assert_eq!(read("/proc/nothing").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
