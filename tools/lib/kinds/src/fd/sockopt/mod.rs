//! Socket options: which there are, where they are in the images, and reading and setting them.
//!
//! One table ([`OPTIONS`]) serves all families. CRIU's messages have fields for some thirty options;
//! an option that has one is stored there always, as CRIU does it. All others are in a list of our own
//! (`sk_opts_entry.ckpt_options`), and only if they differ from what a new socket of the same kind has:
//! the defaults come from a socket that is made for the comparison ([`Defaults`]), since many depend on sysctls.
//!
//! At restore an option is set only if its value differs from what the new socket has. This keeps
//! away from privileges that are not needed (`SO_PRIORITY` of 0 is anybody's), and from options
//! that the kernel lets nobody set twice.
//!
//! The list in an image is untrusted: options that are not in the table, or that have a field of their
//! own, are errors there. `SO_ATTACH_FILTER`, whose argument holds a pointer, is one of the latter.

mod table;

use std::{
    cell::RefCell,
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
    rc::Rc,
};

use anyhow::{Context, bail};
use ckpt_proto::types::{InetSkEntry, IpOptsEntry, IpOptsRawEntry, SkOptsEntry, SocketOption, TcpOptsEntry};
use ckpt_sys::{Refused, SysError, sock};
use nix::errno::Errno;

use super::socket::Socket;
pub use table::{ALL, INET, NETLINK, OPTIONS, Opt, PACKET, PING, RAW, TCP, UDP, UNIX, V4, V6, Value};

/// Where the images have an option.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// In a field of its own: reading and writing it.
    Own(fn(&Options) -> Option<Vec<u8>>, fn(&mut Options, &[u8])),
    /// In the list of options.
    List,
    /// Nowhere: why it can't be restored.
    Refused(&'static str),
}

/// When an option is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before bind(2), which looks at it.
    BeforeBind,
    /// On the finished socket.
    Later,
    /// When nothing more is done to the socket, queues included.
    Last,
}

/// What a kind of socket is, as a set of [`UNIX`], [`TCP`], ... with one family for those of [`INET`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class(u16);

impl Class {
    /// By `SO_DOMAIN`, `SO_TYPE` and `SO_PROTOCOL`. Unknown kinds have no options.
    #[must_use]
    pub fn of(domain: u32, kind: u32, protocol: u32) -> Self {
        let [domain, kind, protocol] = [domain, kind, protocol].map(u32::cast_signed);
        let inet = || match (kind, protocol) {
            (libc::SOCK_STREAM, _) => TCP,
            (libc::SOCK_RAW, _) => RAW,
            (_, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) => PING,
            _ => UDP,
        };
        Self(match domain {
            libc::AF_UNIX => UNIX,
            libc::AF_INET => inet() | V4,
            libc::AF_INET6 => inet() | V6,
            libc::AF_PACKET => PACKET,
            libc::AF_NETLINK => NETLINK,
            _ => 0,
        })
    }

    /// Of a socket in the tree.
    #[must_use]
    pub fn of_socket(socket: &Socket<'_>) -> Self {
        Self::of(socket.stub.domain, socket.stub.r#type, socket.stub.protocol)
    }

    /// Of an entry.
    #[must_use]
    pub fn of_inet(isk: &InetSkEntry) -> Self {
        Self::of(isk.family, isk.r#type, isk.proto)
    }

    /// Whether sockets of this kind have an option.
    #[must_use]
    pub fn has(self, opt: &Opt) -> bool {
        let (kinds, family) = (self.0 & !(V4 | V6), self.0 & (V4 | V6));
        opt.of & kinds != 0 && (family == 0 || opt.of & family != 0)
    }
}

/// The options of one socket, as they are in the images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// Of all sockets, and the list.
    pub sk: SkOptsEntry,
    /// Of inet sockets; without `raw`.
    pub ip: IpOptsEntry,
    /// Of raw IP sockets.
    pub raw: IpOptsRawEntry,
    /// Of TCP sockets.
    pub tcp: TcpOptsEntry,
    /// `IPV6_V6ONLY`.
    pub v6only: Option<bool>,
}

impl Options {
    /// Those of sockets that are not inet sockets.
    #[must_use]
    pub fn of(sk: &SkOptsEntry) -> Self {
        Self { sk: sk.clone(), ..Self::default() }
    }

    /// Those of an inet socket.
    #[must_use]
    pub fn of_inet(isk: &InetSkEntry) -> Self {
        let mut ip = isk.ip_opts.clone().unwrap_or_default();
        let raw = ip.raw.take().unwrap_or_default();
        Self { sk: isk.opts.clone(), ip, raw, tcp: isk.tcp_opts.unwrap_or_default(), v6only: isk.v6only }
    }

    /// Puts them into the entry of an inet socket.
    pub fn store_inet(self, isk: &mut InetSkEntry) {
        let Self { sk, ip, raw, tcp, v6only } = self;
        let raw = (raw != IpOptsRawEntry::default()).then_some(raw);
        isk.opts = sk;
        isk.ip_opts = Some(IpOptsEntry { raw, ..ip });
        isk.tcp_opts = Some(tcp);
        isk.v6only = v6only;
    }

    /// The value of an option, as getsockopt(2) gives it.
    #[must_use]
    pub fn get(&self, opt: &Opt) -> Option<Vec<u8>> {
        match opt.field {
            Field::Own(get, _) => get(self),
            Field::List => {
                let mut list = self.sk.ckpt_options.iter();
                list.find(|o| (o.level, o.name) == (opt.level, opt.number)).map(|o| o.value.clone())
            }
            Field::Refused(_) => None,
        }
    }

    /// Stores a value.
    pub fn put(&mut self, opt: &Opt, value: &[u8]) {
        match opt.field {
            Field::Own(_, put) => put(self, value),
            Field::List => {
                let list = &mut self.sk.ckpt_options;
                list.retain(|o| (o.level, o.name) != (opt.level, opt.number));
                list.push(SocketOption { level: opt.level, name: opt.number, value: value.to_vec() });
            }
            Field::Refused(_) => {}
        }
    }

    /// Whether the list holds only what may be in it.
    fn check(&self, class: Class) -> anyhow::Result<()> {
        for stored in &self.sk.ckpt_options {
            let known = OPTIONS.iter().find(|o| {
                (o.level, o.number) == (stored.level, stored.name)
                    && class.has(o)
                    && matches!(o.field, Field::List)
            });
            let opt = known.with_context(|| {
                format!(
                    "option {} of level {} is not known for this kind of socket",
                    stored.name, stored.level
                )
            })?;
            if stored.value.len() > opt.value.longest() {
                bail!("a value of {} bytes for {}", stored.value.len(), opt.name);
            }
        }
        Ok(())
    }
}

impl Value {
    /// Most bytes that a value has.
    fn longest(self) -> usize {
        match self {
            Self::Flag | Self::Int | Self::Size { .. } => 4,
            Self::Long | Self::Linger => 8,
            Self::Time | Self::Interface(_) => 16,
            Self::Text(n) | Self::Bytes(n) => n,
            Self::Filter => usize::from(u16::MAX) * 8,
        }
    }
}

impl Opt {
    /// Reads a value as people write it: numbers, `on` and `off`, strings; times and SO_LINGER in
    /// seconds; anything else as hexadecimal bytes. Sizes are as getsockopt(2) gives them.
    ///
    /// # Errors
    /// What was expected.
    pub fn parse(&self, text: &str) -> Result<Vec<u8>, String> {
        let wrong = |what: &str| format!("{}: expected {what}, not {text:?}", self.name);
        let number = || match text {
            "on" => Ok(1),
            "off" => Ok(0),
            _ => text.parse::<i64>().map_err(|_| wrong("a number")),
        };
        let word = |n: i64| {
            i32::try_from(n).map(|n| n.to_ne_bytes().to_vec()).map_err(|_| wrong("a number of 32 bits"))
        };
        match self.value {
            Value::Flag => match number()? {
                n @ (0 | 1) => word(n),
                _ => Err(wrong("0 or 1")),
            },
            Value::Int | Value::Size { .. } => word(number()?),
            Value::Long => Ok(number()?.to_ne_bytes().to_vec()),
            Value::Linger if text == "off" => Ok(vec![0; 8]),
            Value::Linger => Ok([1u32.to_ne_bytes().to_vec(), word(number()?)?].concat()),
            Value::Time => {
                let (sec, rest) = text.split_once('.').unwrap_or((text, ""));
                let usec = format!("{rest:0<6}");
                match (sec.parse::<u64>(), usec.parse::<u64>()) {
                    (Ok(sec), Ok(usec)) if usec < 1_000_000 => {
                        Ok([sec.to_ne_bytes(), usec.to_ne_bytes()].concat())
                    }
                    _ => Err(wrong("seconds")),
                }
            }
            Value::Text(longest) if text.len() < longest => Ok([text.as_bytes(), &[0]].concat()),
            Value::Text(_) => Err(wrong("a shorter name")),
            Value::Interface(_) if text.len() < self.value.longest() => Ok(text.as_bytes().to_vec()),
            Value::Interface(_) => Err(wrong("the name of an interface")),
            Value::Bytes(_) | Value::Filter => {
                let digits = text.as_bytes().as_chunks::<2>();
                let byte = |pair: &[u8; 2]| {
                    std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok())
                };
                let bytes: Option<Vec<u8>> = digits.0.iter().map(byte).collect();
                bytes
                    .filter(|b| digits.1.is_empty() && b.len() <= self.value.longest())
                    .ok_or_else(|| wrong("hexadecimal bytes"))
            }
        }
    }

    /// A value for people, in the form that [`Self::parse`] reads.
    #[must_use]
    pub fn shown(&self, value: &[u8]) -> String {
        let number = |at| value.get(at..).and_then(int).unwrap_or(0).cast_signed();
        match self.value {
            Value::Flag | Value::Int | Value::Size { .. } => number(0).to_string(),
            Value::Long => long(value, 0).cast_signed().to_string(),
            Value::Linger if number(0) == 0 => "off".to_owned(),
            Value::Linger => number(4).to_string(),
            Value::Time => format!("{}.{:06}", long(value, 0), long(value, 8)),
            Value::Text(_) | Value::Interface(_) => text(value),
            Value::Bytes(_) | Value::Filter => value.iter().map(|b| format!("{b:02x}")).collect(),
        }
    }
}

/// An option by its name in C, in any case; `None` for one that is not known or can't be restored. An
/// option that is in different places for different kinds has several rows: `class` picks one.
#[must_use]
pub fn find(name: &str, class: Class) -> Option<&'static Opt> {
    let known = |o: &&Opt| o.name.eq_ignore_ascii_case(name) && !matches!(o.field, Field::Refused(_));
    OPTIONS.iter().filter(|o| class.has(o)).find(known)
}

/// The first four bytes as a number.
fn int(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

/// Eight bytes as a number, 0 if they are not there.
fn long(value: &[u8], at: usize) -> u64 {
    value.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_ne_bytes(*b))
}

/// A string without what follows its NUL.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
}

type Values = HashMap<(i32, i32), Vec<u8>>;

/// What new sockets of each kind have, read once.
#[derive(Debug, Default)]
pub struct Defaults(RefCell<HashMap<(u32, u32, u32), Rc<Values>>>);

impl Defaults {
    /// Of sockets like this one. Empty if this process may not make any: then all options are stored.
    fn like(&self, socket: &Socket<'_>) -> anyhow::Result<Rc<Values>> {
        let stub = socket.stub;
        let key = (stub.domain, stub.r#type, stub.protocol);
        if let Some(known) = self.0.borrow().get(&key) {
            return Ok(known.clone());
        }
        let [domain, kind, protocol] = [key.0, key.1, key.2].map(u32::cast_signed);
        let mut values = Values::new();
        if let Ok(new) = sock::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) {
            for opt in OPTIONS.iter().filter(|o| Class::of_socket(socket).has(o)) {
                if let Some(value) = read(new.as_fd(), opt)? {
                    values.insert((opt.level, opt.number), value);
                }
            }
        }
        let values = Rc::new(values);
        self.0.borrow_mut().insert(key, values.clone());
        Ok(values)
    }
}

/// The value of an option; `None` if the socket does not have it (an old kernel, another protocol).
fn read(fd: BorrowedFd<'_>, opt: &Opt) -> Result<Option<Vec<u8>>, SysError> {
    if opt.value == Value::Filter {
        return sock::filter(fd).map(Some);
    }
    let value = match sock::option_bytes(fd, opt.level, opt.number, opt.value.longest()) {
        Err(e)
            if matches!(
                e.errno,
                Errno::ENOPROTOOPT
                    | Errno::EOPNOTSUPP
                    | Errno::EINVAL
                    | Errno::ENOTCONN
                    | Errno::ENODEV
                    | Errno::EADDRNOTAVAIL
            ) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    let Value::Interface(network_order) = opt.value else { return Ok(Some(value)) };
    let index = int(&value).map_or(0, |i| if network_order { u32::from_be(i) } else { i });
    // An interface that is gone is none.
    let name = nix::net::if_::if_indextoname(index).ok().filter(|_| index != 0);
    Ok(Some(name.map(|n| n.to_bytes().to_vec()).unwrap_or_default()))
}

/// What setsockopt(TCP_MAXSEG) takes: TCP_MIN_MSS to MAX_TCP_WINDOW (include/net/tcp.h).
const MSS: std::ops::RangeInclusive<u32> = 88..=32767;

/// The options of a socket of the tree; `what` is its kind and inode, for messages.
///
/// # Errors
/// [`Refused`] for options that are set and can't be restored.
pub fn dump(socket: &Socket<'_>, what: &str, defaults: &Defaults) -> anyhow::Result<Options> {
    let defaults = defaults.like(socket)?;
    let copy = socket.copy()?;
    let mut options = Options::default();
    let connected = Class::of_socket(socket).0 & TCP != 0 && !tcp_idle(copy.as_fd())?;
    for opt in OPTIONS.iter().filter(|o| Class::of_socket(socket).has(o)) {
        // Of a connection they tell something else, or have had their effect.
        if connected && ["TCP_MAXSEG", "TCP_FASTOPEN_CONNECT"].contains(&opt.name) {
            continue;
        }
        let value = match read(copy.as_fd(), opt) {
            Err(e) if opt.value == Value::Filter && e.errno == Errno::EACCES => {
                let reason = "an eBPF program is attached to it (SO_ATTACH_BPF), which can't be read back";
                return Err(socket.refuse(what, reason).into());
            }
            value => value.with_context(|| format!("{}: {}", socket.subject, opt.name))?,
        };
        let Some(value) = value else { continue };
        let changed = defaults.get(&(opt.level, opt.number)) != Some(&value);
        match opt.field {
            Field::Own(_, put) => put(&mut options, &value),
            // What nobody can ask for is what the kernel has computed.
            Field::List if opt.name == "TCP_MAXSEG" && !int(&value).is_some_and(|mss| MSS.contains(&mss)) => {
            }
            Field::List if changed => {
                check_value(opt, &value).map_err(|why| socket.refuse(what, why))?;
                options.put(opt, &value);
            }
            Field::Refused(why) if changed => {
                let reason = format!("{} ({}): {why}", opt.name, opt.shown(&value));
                return Err(socket.refuse(what, reason).into());
            }
            Field::List | Field::Refused(_) => {}
        }
    }
    Ok(options)
}

/// Whether a TCP socket listens, or has no connection.
fn tcp_idle(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    const TCP_CLOSE: u8 = 7;
    const TCP_LISTEN: u8 = 10;
    let info = sock::option_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 1)?;
    Ok(info.first().is_some_and(|state| [TCP_CLOSE, TCP_LISTEN].contains(state)))
}

/// Values that stand for more than themselves.
fn check_value(opt: &Opt, value: &[u8]) -> Result<(), String> {
    const SOF_TIMESTAMPING_OPT_ID: u32 = 1 << 7;
    const UDP_ENCAP_ESPINUDP: u32 = 2;
    let number = int(value).unwrap_or(0);
    match opt.name {
        "SO_TIMESTAMPING" if number & SOF_TIMESTAMPING_OPT_ID != 0 => {
            Err("SO_TIMESTAMPING with OPT_ID: the kernel does not tell how far it has counted".to_owned())
        }
        "UDP_ENCAP" if number != UDP_ENCAP_ESPINUDP => {
            Err(format!("a tunnel of the kernel (UDP_ENCAP {number}) ends at it"))
        }
        _ => Ok(()),
    }
}

/// Sets those options of a new socket that are set at this time.
///
/// # Errors
/// [`Refused`] if it takes a privilege that this process does not have; options that are not known.
pub fn restore(
    fd: BorrowedFd<'_>,
    what: &str,
    class: Class,
    options: &Options,
    when: When,
) -> anyhow::Result<()> {
    options.check(class).with_context(|| what.to_owned())?;
    for opt in OPTIONS.iter().filter(|o| o.when == when && class.has(o)) {
        let Some(wanted) = options.get(opt) else { continue };
        if read(fd, opt).ok().flatten().as_ref() == Some(&wanted) {
            continue;
        }
        match set(fd, opt, &wanted, options) {
            Err(e) if e.errno == Errno::EPERM => {
                let reason = format!(
                    "setting its option {} ({}) needs CAP_NET_ADMIN or CAP_NET_RAW",
                    opt.name,
                    opt.shown(&wanted)
                );
                let advice = format!("change it first: sk-rewrite --set-opt ID:{}=VALUE", opt.name);
                return Err(Refused::new(what, reason).advise(advice).into());
            }
            done => {
                done.with_context(|| format!("{what}: set {} to {}", opt.name, opt.shown(&wanted)))?;
            }
        }
    }
    Ok(())
}

fn set(fd: BorrowedFd<'_>, opt: &Opt, value: &[u8], options: &Options) -> Result<(), SysError> {
    let set = |number, value: &[u8]| sock::set_option_bytes(fd, opt.level, number, value);
    match opt.value {
        Value::Size { force } => {
            let half = (int(value).unwrap_or(0) / 2).to_ne_bytes();
            match set(force, &half) {
                Err(e) if e.errno == Errno::EPERM => {
                    set(opt.number, &half)?;
                    // A size that the kernel chose is no promise; one that the program chose is.
                    let locked = options.sk.so_buf_lock.unwrap_or(0) & if force == 32 { 1 } else { 2 } != 0;
                    let short = read(fd, opt)?.and_then(|now| int(&now)) < int(value);
                    if locked && short { Err(e) } else { Ok(()) }
                }
                done => done,
            }
        }
        Value::Interface(network_order) => {
            let index = match value {
                [] => 0,
                name => nix::net::if_::if_nametoindex(name)
                    .map_err(|errno| SysError::new("if_nametoindex", text(name), errno))?,
            };
            set(opt.number, &if network_order { index.to_be_bytes() } else { index.to_ne_bytes() })
        }
        Value::Filter => sock::attach_filter(fd, value),
        _ => set(opt.number, value),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, os::fd::OwnedFd};

    use ckpt_proto::types::SocketStub;

    use super::*;

    fn stub(domain: i32, kind: i32, protocol: i32) -> SocketStub {
        let [domain, r#type, protocol] = [domain, kind, protocol].map(i32::cast_unsigned);
        SocketStub { domain, r#type, protocol, ..SocketStub::default() }
    }

    /// A new socket, which stays open.
    fn socket(stub: &SocketStub) -> Socket<'static> {
        let new = sock::socket(
            stub.domain.cast_signed(),
            stub.r#type.cast_signed() | libc::SOCK_CLOEXEC,
            stub.protocol.cast_signed(),
        );
        let fd = std::os::fd::IntoRawFd::into_raw_fd(new.unwrap()).cast_unsigned();
        let stub = Box::leak(Box::new(SocketStub { fd, ..stub.clone() }));
        let own = ckpt_sys::pidfd::open(ckpt_sys::Pid(std::process::id().cast_signed())).unwrap();
        Socket { file_id: 1, stub, task: own.into(), subject: "a test".into(), foreign: None }
    }

    #[test]
    fn no_kind_has_two_rows_for_an_option() {
        let all = [
            UNIX,
            TCP | V4,
            TCP | V6,
            UDP | V4,
            UDP | V6,
            RAW | V4,
            RAW | V6,
            PING | V4,
            PING | V6,
            PACKET,
            NETLINK,
        ];
        for class in all.map(Class) {
            let mut numbers = HashSet::new();
            let mut names = HashSet::new();
            for opt in OPTIONS.iter().filter(|o| class.has(o)) {
                assert!(
                    numbers.insert((opt.level, opt.number)) && names.insert(opt.name),
                    "{class:?} {}",
                    opt.name
                );
            }
            assert!(names.len() > 20);
        }
    }

    #[test]
    fn a_new_socket_has_nothing_in_the_list() {
        for stub in
            [stub(1, 1, 0), stub(2, 2, 17), stub(10, 2, 17), stub(2, 1, 6), stub(10, 1, 6), stub(16, 3, 0)]
        {
            let options = dump(&socket(&stub), "socket", &Defaults::default()).unwrap();
            assert_eq!(options.sk.ckpt_options, [], "{stub:?}");
        }
    }

    /// Values that differ from the default, for everything that nobody needs a privilege for.
    #[test]
    fn every_option_comes_back() {
        for stub in
            [stub(1, 2, 0), stub(2, 2, 17), stub(10, 2, 17), stub(2, 1, 6), stub(10, 1, 6), stub(16, 3, 0)]
        {
            let class = Class::of(stub.domain, stub.r#type, stub.protocol);
            let socket = socket(&stub);
            let mut set = 0;
            for opt in OPTIONS.iter().filter(|o| class.has(o) && matches!(o.value, Value::Flag | Value::Int))
            {
                let Some(now) = read(socket.copy().unwrap().as_fd(), opt).unwrap() else { continue };
                // Sticks to the list of local addresses, or would corrupt the next send.
                if ["SO_RESERVE_MEM", "UDP_ENCAP", "UDP_CORK", "SO_LOCK_FILTER"].contains(&opt.name) {
                    continue;
                }
                let wanted = if int(&now) == Some(0) { 1u32 } else { 2 };
                set += i32::from(
                    sock::set_option_bytes(
                        socket.copy().unwrap().as_fd(),
                        opt.level,
                        opt.number,
                        &wanted.to_ne_bytes(),
                    )
                    .is_ok(),
                );
            }
            assert!(set > 10, "{set}");
            let options = dump(&socket, "socket", &Defaults::default()).unwrap();
            let new: OwnedFd = super::tests::socket(&stub).copy().unwrap();
            for when in [When::BeforeBind, When::Later, When::Last] {
                restore(new.as_fd(), "socket", class, &options, when).unwrap();
            }
            for opt in OPTIONS.iter().filter(|o| class.has(o)) {
                assert_eq!(
                    read(new.as_fd(), opt).unwrap(),
                    read(socket.copy().unwrap().as_fd(), opt).unwrap(),
                    "{stub:?} {}",
                    opt.name
                );
            }
        }
    }

    #[test]
    fn filters_come_back_and_stay_locked() {
        let stub = stub(2, 2, 17);
        let socket = socket(&stub);
        // ret #65535
        let program = [6, 0, 0, 0, 255, 255, 0, 0];
        sock::attach_filter(socket.copy().unwrap().as_fd(), &program).unwrap();
        sock::set_option(socket.copy().unwrap().as_fd(), libc::SOL_SOCKET, 44, 1).unwrap();
        let options = dump(&socket, "socket", &Defaults::default()).unwrap();
        assert_eq!(options.sk.so_filter.len(), 1);
        let new = super::tests::socket(&stub).copy().unwrap();
        let class = Class::of_socket(&socket);
        restore(new.as_fd(), "socket", class, &options, When::Last).unwrap();
        assert_eq!(sock::filter(new.as_fd()).unwrap(), program);
        assert!(sock::attach_filter(new.as_fd(), &program).is_err());
    }

    #[test]
    fn values_are_read_and_shown() {
        let udp = Class(UDP | V4);
        for (name, text, bytes) in [
            ("so_mark", "7", &[7, 0, 0, 0][..]),
            ("SO_RCVTIMEO", "9.500000", &[9, 0, 0, 0, 0, 0, 0, 0, 0x20, 0xa1, 7, 0, 0, 0, 0, 0]),
            ("SO_LINGER", "off", &[0; 8]),
            ("SO_LINGER", "5", &[1, 0, 0, 0, 5, 0, 0, 0]),
            ("SO_BINDTODEVICE", "lo", b"lo\0"),
            ("IP_OPTIONS", "0102ff", &[1, 2, 255]),
            ("IP_UNICAST_IF", "eth0", b"eth0"),
        ] {
            let opt = find(name, udp).unwrap();
            assert_eq!(opt.parse(text).unwrap(), bytes, "{name}");
            assert_eq!(opt.shown(bytes), text);
        }
        for (name, wrong) in
            [("SO_BROADCAST", "2"), ("SO_MARK", "x"), ("IP_OPTIONS", "0g"), ("IP_OPTIONS", "012")]
        {
            assert!(find(name, udp).unwrap().parse(wrong).is_err(), "{name} {wrong}");
        }
        assert!(find("TCP_ULP", Class(TCP | V4)).is_none());
        assert!(find("UDP_CORK", Class(TCP | V4)).is_none());
    }

    #[test]
    fn a_list_with_strangers_is_an_error() {
        let stub = stub(2, 2, 17);
        let socket = socket(&stub);
        // Not known; has a field of its own; another kind's; too long.
        for (level, name, len) in [(99, 99, 4), (1, 26, 4), (6, 7, 4), (0, 10, 17)] {
            let mut options = Options::default();
            options.sk.ckpt_options.push(SocketOption { level, name, value: vec![0; len] });
            let done = restore(
                socket.copy().unwrap().as_fd(),
                "socket",
                Class::of_socket(&socket),
                &options,
                When::Later,
            );
            assert!(done.is_err(), "{level} {name}");
        }
    }
}
