//! Memberships of sockets in multicast groups (ip(7), ipv6(7), RFC 3678).
//!
//! The kernel lists the groups of an interface (`/proc/net/igmp`, `igmp6`), not those of a socket. But
//! `MCAST_MSFILTER` tells of one group on one interface whether, and how, a socket is a member of it. Every
//! group that some socket has joined is in the lists, so asking each socket for each listed group
//! finds all memberships. Memberships on interfaces that are gone are found by neither; they have no effect.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use anyhow::{Context, bail};
use ckpt_proto::types::{InetSkEntry, MulticastGroup};
use ckpt_sys::sock;
use nix::{
    errno::Errno,
    net::if_::{if_indextoname, if_nametoindex},
};

use super::inet;

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const MCAST_INCLUDE: u32 = 1;
/// `struct sockaddr_storage`.
const ADDRESS: usize = 128;
/// `struct group_filter` up to its sources: interface, address, mode, number.
const HEADER: usize = 8 + ADDRESS + 8;
/// More sources than the kernel lets a socket have by default (net.ipv4.igmp_max_msf is 10).
const SOURCES: usize = 512;

/// A group on an interface: by index.
pub(super) type Joined = (u32, IpAddr);

/// The groups that interfaces of this network namespace have joined.
///
/// # Errors
/// The lists can't be read; a kernel without IPv6 or multicast has none.
pub(super) fn groups() -> anyhow::Result<Vec<Joined>> {
    let read = |path: &str| match fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        text => text.with_context(|| format!("read {path}")),
    };
    let mut all = parse_igmp(&read("/proc/net/igmp")?);
    all.extend(parse_igmp6(&read("/proc/net/igmp6")?));
    Ok(all)
}

/// A line with a number for each interface, then a line for each of its groups: a word in network
/// byte order, printed as a number of the machine's.
fn parse_igmp(text: &str) -> Vec<Joined> {
    let mut all = Vec::new();
    let mut interface = None;
    for line in text.lines().skip(1) {
        let Some(first) = line.split_whitespace().next() else { continue };
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            interface = first.parse().ok();
        } else if let (Some(index), Ok(word)) = (interface, u32::from_str_radix(first, 16)) {
            all.push((index, Ipv4Addr::from(word.to_ne_bytes()).into()));
        }
    }
    all
}

/// A line for each group: index and name of the interface, 32 digits, users, state.
fn parse_igmp6(text: &str) -> Vec<Joined> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (index, group) = (words.next()?.parse().ok()?, words.nth(1)?);
        Some((index, Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?).into()))
    };
    text.lines().filter_map(line).collect()
}

fn level(ip: IpAddr) -> i32 {
    if ip.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// `struct sockaddr_storage` of an address.
fn storage(ip: IpAddr) -> [u8; ADDRESS] {
    let mut bytes = [0; ADDRESS];
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    bytes[..2].copy_from_slice(&u16::try_from(family).unwrap_or(0).to_ne_bytes());
    match ip {
        IpAddr::V4(v4) => bytes[4..8].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes[8..24].copy_from_slice(&v6.octets()),
    }
    bytes
}

/// `struct group_filter`, or as much of it as `struct group_req` is.
fn request(index: u32, group: IpAddr) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes[..4].copy_from_slice(&index.to_ne_bytes());
    bytes.extend_from_slice(&storage(group));
    bytes
}

/// Which of `groups` a socket is a member of.
///
/// # Errors
/// Those of getsockopt(2).
pub(super) fn dump(fd: BorrowedFd<'_>, v6: bool, groups: &[Joined]) -> anyhow::Result<Vec<MulticastGroup>> {
    let mut found = Vec::new();
    for &(index, group) in groups.iter().filter(|(_, group)| v6 || group.is_ipv4()) {
        let mut buffer = request(index, group);
        buffer.resize(HEADER + SOURCES * ADDRESS, 0);
        let count = u32::try_from(SOURCES).unwrap_or(0);
        buffer[HEADER - 4..HEADER].copy_from_slice(&count.to_ne_bytes());
        match sock::ask_option(fd, level(group), MCAST_MSFILTER, &mut buffer) {
            // Not a member. (EINVAL: the interface has no IPv6 any more. ENODEV: it is gone.)
            Err(e)
                if matches!(
                    e.errno,
                    Errno::EADDRNOTAVAIL | Errno::EINVAL | Errno::ENODEV | Errno::ENOPROTOOPT
                ) =>
            {
                continue;
            }
            answered => drop(answered?),
        }
        let word =
            |at: usize| buffer.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_ne_bytes(*b));
        let sources = usize::try_from(word(HEADER - 4)).unwrap_or(usize::MAX);
        if sources > SOURCES {
            bail!("a membership in {group} with {sources} sources, more than {SOURCES}");
        }
        let place = if group.is_ipv4() { 4..8 } else { 8..24 };
        let each = buffer[HEADER..].chunks_exact(ADDRESS).take(sources);
        let interface = if_indextoname(index).context("if_indextoname")?;
        found.push(MulticastGroup {
            interface: interface.to_bytes().to_vec(),
            group: inet::octets(group),
            include: Some(word(HEADER - 8) == MCAST_INCLUDE).filter(|&include| include),
            sources: each.map(|source| source[place.clone()].to_vec()).collect(),
        });
    }
    Ok(found)
}

/// Joins all groups again.
///
/// # Errors
/// An interface that is not there; malformed entries; those of setsockopt(2).
pub(super) fn restore(fd: BorrowedFd<'_>, isk: &InetSkEntry) -> anyhow::Result<()> {
    for entry in &isk.ckpt_groups {
        let group = inet::address_of(&entry.group)?;
        let interface = entry.interface.escape_ascii();
        let index = if_nametoindex(&entry.interface[..])
            .with_context(|| format!("join {group} on interface {interface}"))?;
        let mut buffer = request(index, group);
        sock::set_option_bytes(fd, level(group), MCAST_JOIN_GROUP, &buffer)
            .with_context(|| format!("join {group} on interface {interface}"))?;
        let include = entry.include == Some(true);
        if include || !entry.sources.is_empty() {
            let mode = if include { MCAST_INCLUDE } else { 0 };
            buffer.extend_from_slice(&mode.to_ne_bytes());
            buffer.extend_from_slice(&u32::try_from(entry.sources.len())?.to_ne_bytes());
            for source in &entry.sources {
                buffer.extend_from_slice(&storage(inet::address_of(source)?));
            }
            sock::set_option_bytes(fd, level(group), MCAST_MSFILTER, &buffer)
                .with_context(|| format!("senders to {group} on interface {interface}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd};

    use super::*;

    #[test]
    fn lists_are_read() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    12\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let all = parse_igmp(igmp);
        assert_eq!(all, [(1, "224.0.0.1".parse().unwrap()), (12, "224.0.0.251".parse().unwrap())]);
        let igmp6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse_igmp6(igmp6), [(1, "ff02::1".parse().unwrap())]);
        assert_eq!(parse_igmp6("1 lo xyz\n\n1\n"), []);
    }

    #[test]
    fn memberships_are_asked_for_and_made_again() {
        let new = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (member, restored, stranger) = (new(), new(), new());
        let lo = if_nametoindex("lo").unwrap();
        let group: IpAddr = "239.1.2.3".parse().unwrap();
        let blocked = ["10.0.0.7".parse::<IpAddr>().unwrap(), "10.0.0.8".parse().unwrap()];
        let entry = MulticastGroup {
            interface: b"lo".to_vec(),
            group: inet::octets(group),
            include: None,
            sources: blocked.map(inet::octets).to_vec(),
        };
        let isk = InetSkEntry { ckpt_groups: vec![entry], ..InetSkEntry::default() };
        restore(member.as_fd(), &isk).unwrap();
        let found = dump(member.as_fd(), false, &groups().unwrap()).unwrap();
        assert_eq!(found, isk.ckpt_groups);
        assert!(groups().unwrap().contains(&(lo, group)));
        assert_eq!(dump(stranger.as_fd(), false, &groups().unwrap()).unwrap(), []);
        let included = MulticastGroup { include: Some(true), ..isk.ckpt_groups[0].clone() };
        let isk = InetSkEntry { ckpt_groups: vec![included], ..InetSkEntry::default() };
        restore(restored.as_fd(), &isk).unwrap();
        assert_eq!(dump(restored.as_fd(), false, &groups().unwrap()).unwrap(), isk.ckpt_groups);
        let short = MulticastGroup { group: vec![1, 2, 3], ..isk.ckpt_groups[0].clone() };
        assert!(restore(new().as_fd(), &InetSkEntry { ckpt_groups: vec![short], ..isk }).is_err());
    }
}
