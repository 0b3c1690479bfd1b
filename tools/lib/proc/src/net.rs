//! `/proc/PID/net/raw`, `raw6`, `icmp`, `icmp6` (and `tcp`, `udp`, which have the same form): the inet sockets
//! of the network namespace of a process.
//!
//! ```text
//!   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
//!    1: 00000000:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 20311 2 0000000000000000 0
//! ```
//!
//! Addresses are 32 bit words in network byte order, each printed as a number of the machine's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::status::Malformed;

/// One socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetSocket {
    /// Bound to; a raw socket has its protocol as port.
    pub local: SocketAddr,
    /// Connected to.
    pub remote: SocketAddr,
    /// `TCP_ESTABLISHED` 1 to `TCP_CLOSING` 11.
    pub state: u8,
    /// Memory taken by what was sent and is not gone yet.
    pub wqueue: u32,
    /// Memory taken by what was received and not read.
    pub rqueue: u32,
    /// Who made it.
    pub uid: u32,
    /// Its inode.
    pub inode: u64,
}

/// Reads one of the files.
///
/// # Errors
/// A line that is not as above.
pub fn parse(text: &[u8]) -> Result<Vec<NetSocket>, Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed("net"))?;
    text.lines()
        .skip(1)
        .filter(|line| !line.trim().is_empty())
        .map(|line| socket(line).ok_or(Malformed("net: socket")))
        .collect()
}

fn socket(line: &str) -> Option<NetSocket> {
    let mut fields = line.split_ascii_whitespace();
    fields.next()?.strip_suffix(':')?;
    let local = address(fields.next()?)?;
    let remote = address(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let (wqueue, rqueue) = fields.next()?.split_once(':')?;
    let uid = fields.nth(2)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(NetSocket {
        local,
        remote,
        state,
        wqueue: u32::from_str_radix(wqueue, 16).ok()?,
        rqueue: u32::from_str_radix(rqueue, 16).ok()?,
        uid,
        inode,
    })
}

fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| -> Option<[u8; 4]> {
        Some(u32::from_str_radix(ip.get(8 * at..8 * at + 8)?, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, to) in bytes.chunks_exact_mut(4).enumerate() {
                to.copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n   1: 0100007F:0001 00000000:0000 07 00000010:00000300 00:00000000 00000000  1000        0 20311 2 0000000000000000 0\n";
    const RAW6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n  58: 00000000000000000000000001000000:003A 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 7 2 0000000000000000 0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn addresses_of_both_kinds() {
        let v4 = parse(RAW.as_bytes()).unwrap();
        assert_eq!(v4[0].local, "127.0.0.1:1".parse().unwrap());
        assert_eq!((v4[0].state, v4[0].inode, v4[0].uid), (7, 20311, 1000));
        assert_eq!((v4[0].wqueue, v4[0].rqueue), (16, 768));
        let v6 = parse(RAW6.as_bytes()).unwrap();
        assert_eq!(v6[0].local, "[::1]:58".parse().unwrap());
    }

    #[test]
    fn cut_lines_are_errors() {
        assert!(parse(b"header\n").unwrap().is_empty());
        let line = RAW.lines().nth(1).unwrap();
        for end in [4, 12, 20, 40, 60, 90] {
            assert!(parse(format!("header\n{}\n", &line[..end]).as_bytes()).is_err(), "{end}");
        }
    }
}
