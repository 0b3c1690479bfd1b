//! A look into the kernel's memory, for what it has no call to tell: what waits in a connection that nobody has
//! accepted, messages of no bytes that a peek passes over, the frame at which the kernel is in a packet socket's ring.
//!
//! **What there is.** `/proc/kcore` is not built into every kernel, and needs more privilege. A program in eBPF may read any
//! kernel memory (`bpf_probe_read_kernel`, bpf-helpers(7)), and BPF_PROG_TEST_RUN runs one once, here and now, without
//! hanging it into anything: nothing of the kernel is changed, no event is watched, and it is gone with its
//! descriptor. So the program is a few instructions that copy bytes from an address into memory shared with this
//! process, and all else is done here: from this process (`bpf_get_current_task`) to its table of descriptors, from there to
//! the socket, and along its queues, by the places of fields that BTF tells ([`crate::btf`]).
//!
//! Reading an address that is none is an error, and does no harm. What is read changes under the reader if somebody
//! uses the socket meanwhile, so this is for sockets that stand still: those of a frozen tree, the network locked.
//!
//! **Pages.** The bytes of a message are partly in pages of which only the `struct page` is named. All memory is mapped in one
//! piece, and so are these structures; the distance between the two is drawn at boot and not told. It is measured with a
//! message of our own, whose bytes are known, and by that all of this is tested before it is relied on.
//!
//! **Ways not chosen.** Iterators over sockets (as of mappings, [`crate::vmas`]) show what is in a socket's own structure,
//! not along its queues; programs that hang in the kernel (fentry) change with every kernel; accept(2) by a copy of the listener takes the connection from a tree that may
//! run on; MSG_PEEK looks at the caller's own queue; sock_diag(7) counts bytes only.
//!
//! It takes CAP_BPF and CAP_PERFMON, and a kernel with BTF that is not locked down (kernel_lockdown(7)).

use std::{
    hash::{BuildHasher, RandomState},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair},
};

use crate::{
    SysError,
    bpf::{self, both, ins},
    btf::Btf,
    ring::RingMemory,
};

/// Bytes that one run of the program copies at most.
const PIECE: usize = 1 << 16;
/// Messages in a queue, and entries in a backlog, at most: against a list that turns round.
const MANY: usize = 1 << 20;
/// Bytes in a message at most; TCP joins some.
const LARGE: usize = 1 << 24;
const GIB: u64 = 1 << 30;
/// Memory that a machine has at most, GiB.
const MACHINE: i64 = 1 << 14;

/// A message in the queue of a socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// What is not read of it.
    pub bytes: Vec<u8>,
    /// Who has sent it (pid, uid, gid), if that was noted (`SO_PASSCRED`).
    pub credentials: Option<(u32, u32, u32)>,
    /// The sender's address as in `sun_path`, if it has one and still lives.
    pub sender: Option<Vec<u8>>,
    /// Whether descriptors came with it.
    pub rights: bool,
}

/// A TCP connection that a listener has not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unaccepted {
    /// The address of its client.
    pub remote: SocketAddr,
    /// What has come over it.
    pub bytes: Vec<u8>,
    /// The sequence number up to which the client's bytes have come.
    pub received: u32,
    /// Whether urgent data is among them.
    pub urgent: bool,
}

/// The kernel's memory.
#[derive(Debug)]
pub struct Kernel {
    program: OwnedFd,
    shared: RingMemory,
    types: Btf,
    /// Address of this process's `struct files_struct`.
    files: u64,
    /// Address of a page, less 64 times that of its `struct page`.
    pages: u64,
}

/// The program. Its argument is two words: an address and a number of bytes, to be copied into the map; with address 0, the
/// address of `current` is written there.
fn program(map: &OwnedFd) -> Vec<u64> {
    let fd = map.as_raw_fd();
    let piece = i32::try_from(PIECE).unwrap_or(i32::MAX);
    vec![
        ins(0xbf, 6, 1, 0, 0),     // r6 = arguments
        ins(0x62, 10, 0, -4, 0),   // key 0
        ins(0x18, 1, 1, 0, fd),    // r1 = map
        0,                         //   (its second half)
        ins(0xbf, 2, 10, 0, 0),    // r2 = &key
        ins(0x07, 2, 0, 0, -4),    //
        ins(0x85, 0, 0, 0, 1),     // bpf_map_lookup_elem
        ins(0x55, 0, 0, 2, 0),     // if r0 == 0
        ins(0xb7, 0, 0, 0, -1),    //   return -1
        ins(0x95, 0, 0, 0, 0),     //
        ins(0xbf, 7, 0, 0, 0),     // r7 = memory of the map
        ins(0x79, 3, 6, 0, 0),     // r3 = address
        ins(0x55, 3, 0, 4, 0),     // if r3 == 0
        ins(0x85, 0, 0, 0, 35),    //   bpf_get_current_task
        ins(0x7b, 7, 0, 0, 0),     //   *r7 = r0
        ins(0xb7, 0, 0, 0, 0),     //   return 0
        ins(0x95, 0, 0, 0, 0),     //
        ins(0x79, 2, 6, 8, 0),     // r2 = bytes
        ins(0x25, 2, 0, 3, piece), // if r2 <= PIECE
        ins(0xbf, 1, 7, 0, 0),     //
        ins(0x85, 0, 0, 0, 113),   //   bpf_probe_read_kernel
        ins(0x95, 0, 0, 0, 0),     //   return what it does
        ins(0xb7, 0, 0, 0, -1),    // return -1
        ins(0x95, 0, 0, 0, 0),     //
    ]
}

impl Kernel {
    /// Begins to look.
    ///
    /// # Errors
    /// EPERM: a privilege is missing, or the kernel is locked down. ENOENT: no BTF, or it has other fields than are known.
    /// EBADMSG: the test with a message of our own has failed.
    pub fn open() -> Result<Self, SysError> {
        const MAP_CREATE: i32 = 0;
        const ARRAY: u32 = 2;
        const MMAPABLE: u32 = 1 << 10;
        const RAW_TRACEPOINT: u32 = 17;
        // The families that may be modules.
        let types = Btf::read(&["unix", "af_packet"])?;
        let piece = u32::try_from(PIECE).unwrap_or(u32::MAX);
        let mut create = [0; 16];
        create[..3].copy_from_slice(&[both(ARRAY, 4), both(piece, 1), both(MMAPABLE, 0)]);
        let map = bpf::descriptor(MAP_CREATE, "bpf(BPF_MAP_CREATE)", &mut create)?;
        let shared = RingMemory::map(map.as_fd(), PIECE)?;
        let program = bpf::load(&program(&map), RAW_TRACEPOINT, 0, 0)?;
        let mut kernel = Self { program, shared, types, files: 0, pages: 0 };
        kernel.run(0, 0)?;
        let task = kernel.shared_word()?;
        kernel.files = kernel.pointer(kernel.at(task, "task_struct", "files")?)?;
        kernel.measure()?;
        Ok(kernel)
    }

    fn run(&self, address: u64, len: usize) -> Result<(), SysError> {
        const PROG_TEST_RUN: i32 = 10;
        let arguments = [address, len as u64];
        let mut attributes = [0; 16];
        attributes[0] = u64::from(self.program.as_raw_fd().cast_unsigned());
        attributes[5] = both(16, 0);
        attributes[6] = arguments.as_ptr() as u64;
        bpf::call(PROG_TEST_RUN, "bpf(BPF_PROG_TEST_RUN)", &mut attributes)?;
        match (attributes[0] >> 32) as u32 {
            0 => Ok(()),
            _ => Err(SysError::new("bpf_probe_read_kernel", format!("{address:#x}"), Errno::EFAULT)),
        }
    }

    fn shared_word(&self) -> Result<u64, SysError> {
        let mut word = [0; 8];
        self.shared.read(0, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), SysError> {
        for (n, piece) in buffer.chunks_mut(PIECE).enumerate() {
            self.run(address.wrapping_add((n * PIECE) as u64), piece.len())?;
            self.shared.read(0, piece)?;
        }
        Ok(())
    }

    fn pointer(&self, address: u64) -> Result<u64, SysError> {
        self.run(address, 8)?;
        self.shared_word()
    }

    fn word(&self, address: u64) -> Result<u32, SysError> {
        let mut word = [0; 4];
        self.read(address, &mut word)?;
        Ok(u32::from_ne_bytes(word))
    }

    fn half(&self, address: u64) -> Result<u16, SysError> {
        let mut half = [0; 2];
        self.read(address, &mut half)?;
        Ok(u16::from_ne_bytes(half))
    }

    /// The address of a field of the structure at `base`.
    fn at(&self, base: u64, of: &str, field: &str) -> Result<u64, SysError> {
        Ok(base.wrapping_add(self.types.offset(of, field)?))
    }

    /// `struct sock` of a descriptor of this process.
    fn sock(&self, fd: BorrowedFd<'_>) -> Result<u64, SysError> {
        // The table moves when it grows.
        let table = self.pointer(self.at(self.files, "files_struct", "fdt")?)?;
        let first = self.pointer(self.at(table, "fdtable", "fd")?)?;
        let number = u64::from(fd.as_raw_fd().cast_unsigned());
        let file = self.pointer(first.wrapping_add(8 * number))?;
        let socket = self.pointer(self.at(file, "file", "private_data")?)?;
        let sock = self.pointer(self.at(socket, "socket", "sk")?)?;
        // Both point at each other, if it is a socket.
        if self.pointer(self.at(sock, "sock", "sk_socket")?)? != socket {
            return Err(SysError::new(
                "read kernel memory",
                format!("fd {}", fd.as_raw_fd()),
                Errno::EBADMSG,
            ));
        }
        Ok(sock)
    }

    /// Runs along the receive queue of a `struct sock`.
    fn queue(&self, sock: u64, mut each: impl FnMut(u64) -> Result<(), SysError>) -> Result<(), SysError> {
        let head = self.at(sock, "sock", "sk_receive_queue")?;
        let mut skb = self.pointer(head)?;
        for _ in 0..MANY {
            if skb == head {
                return Ok(());
            }
            each(skb)?;
            skb = self.pointer(self.at(skb, "sk_buff", "next")?)?;
        }
        Err(SysError::new("read kernel memory", "a queue without end", Errno::EBADMSG))
    }

    /// The bytes of a `struct sk_buff`.
    fn bytes(&self, skb: u64) -> Result<Vec<u8>, SysError> {
        let len = self.word(self.at(skb, "sk_buff", "len")?)? as usize;
        let paged = self.word(self.at(skb, "sk_buff", "data_len")?)? as usize;
        if len > LARGE || paged > len {
            return Err(SysError::new("read kernel memory", format!("{len} bytes"), Errno::EBADMSG));
        }
        let mut bytes = vec![0; len - paged];
        self.read(self.pointer(self.at(skb, "sk_buff", "data")?)?, &mut bytes)?;
        if paged == 0 {
            return Ok(bytes);
        }
        for (page, len, offset) in self.fragments(skb)? {
            if bytes.len() + len > LARGE {
                return Err(SysError::new("read kernel memory", format!("{len} bytes"), Errno::EBADMSG));
            }
            let start = bytes.len();
            bytes.resize(start + len, 0);
            let address = (page << 6).wrapping_add(self.pages).wrapping_add(offset);
            self.read(address, bytes.get_mut(start..).unwrap_or_default())?;
        }
        let shared = self.shared_info(skb)?;
        let mut more = self.pointer(self.at(shared, "skb_shared_info", "frag_list")?)?;
        while more != 0 && bytes.len() < len {
            bytes.extend(self.bytes(more)?);
            more = self.pointer(self.at(more, "sk_buff", "next")?)?;
        }
        if bytes.len() != len {
            let what = format!("{} of {len} bytes", bytes.len());
            return Err(SysError::new("read kernel memory", what, Errno::EBADMSG));
        }
        Ok(bytes)
    }

    fn shared_info(&self, skb: u64) -> Result<u64, SysError> {
        let head = self.pointer(self.at(skb, "sk_buff", "head")?)?;
        // An offset on all machines with 64 bits (linux/skbuff.h).
        Ok(head.wrapping_add(self.word(self.at(skb, "sk_buff", "end")?)?.into()))
    }

    /// Pages of an sk_buff: address of `struct page`, bytes, offset. `skb_frag_t`, and `struct bio_vec` before it, have
    /// these in 8, 4 and 4 bytes.
    fn fragments(&self, skb: u64) -> Result<Vec<(u64, usize, u64)>, SysError> {
        let shared = self.shared_info(skb)?;
        let mut count = [0];
        self.read(self.at(shared, "skb_shared_info", "nr_frags")?, &mut count)?;
        let first = self.at(shared, "skb_shared_info", "frags")?;
        let mut all = Vec::new();
        for at in (0..u64::from(count[0])).map(|n| first.wrapping_add(16 * n)) {
            let page = self.pointer(at)?;
            // Memory of a device, not of the machine (net/netmem.h).
            if page & 1 != 0 {
                return Err(SysError::new("read kernel memory", "memory of a device", Errno::EOPNOTSUPP));
            }
            all.push((page, self.word(at + 8)? as usize, self.word(at + 12)?.into()));
        }
        Ok(all)
    }

    /// Finds the distance between pages and their structures, with a message of our own.
    fn measure(&mut self) -> Result<(), SysError> {
        let failed = |why: &str| SysError::new("read kernel memory", why, Errno::EBADMSG);
        if self.types.size("page")? != 64 {
            return Err(failed("struct page is not 64 bytes"));
        }
        let (from, to) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| SysError::new("socketpair", "a test", e))?;
        let random = RandomState::new();
        let message: Vec<u8> = (0..4096_u32).flat_map(|n| random.hash_one(n).to_ne_bytes()).collect();
        let sent = send(from.as_raw_fd(), &message, MsgFlags::MSG_DONTWAIT)
            .map_err(|e| SysError::new("send", "a test", e))?;
        let skb = self.pointer(self.at(self.sock(to.as_fd())?, "sock", "sk_receive_queue")?)?;
        let (page, len, offset) =
            *self.fragments(skb)?.first().ok_or_else(|| failed("a message without pages"))?;
        let len = len.min(PIECE);
        let paged = self.word(self.at(skb, "sk_buff", "data_len")?)? as usize;
        let linear = (self.word(self.at(skb, "sk_buff", "len")?)? as usize).saturating_sub(paged);
        let wanted =
            message.get(linear..linear + len).ok_or_else(|| failed("a message of another length"))?;
        // Both maps begin at a multiple of 1 GiB (arch/x86/mm/kaslr.c), and this is mapped by the first one.
        let near = self.pointer(self.at(skb, "sk_buff", "head")?)? & !(GIB - 1);
        let base = near.wrapping_sub((page << 6) & !(GIB - 1));
        let mut found = vec![0; len];
        for distance in (0..MACHINE).flat_map(|n| [n, -n]) {
            self.pages = base.wrapping_add((distance * (1 << 30)).cast_unsigned());
            let address = (page << 6).wrapping_add(self.pages).wrapping_add(offset);
            if self.read(address, &mut found).is_ok() && found == wanted {
                let all = self.bytes(skb)?;
                let same = message.get(..sent).is_some_and(|sent| sent.starts_with(&all));
                return if same { Ok(()) } else { Err(failed("a message of known bytes")) };
            }
        }
        Err(failed("the pages of a message are not found"))
    }

    /// The receive queue of a unix socket.
    ///
    /// # Errors
    /// Those of [`Self::open`]; EFAULT, EBADMSG: the queue has changed meanwhile.
    pub fn unix_queue(&self, fd: BorrowedFd<'_>) -> Result<Vec<Message>, SysError> {
        self.unix_messages(self.sock(fd)?)
    }

    /// What waits at the far end of a connection, which may be in a backlog and belong to nobody.
    ///
    /// # Errors
    /// As of [`Self::unix_queue`]; ENOTCONN.
    pub fn unix_peer_queue(&self, fd: BorrowedFd<'_>) -> Result<Vec<Message>, SysError> {
        match self.pointer(self.at(self.sock(fd)?, "unix_sock", "peer")?)? {
            0 => Err(SysError::new("read kernel memory", "its peer", Errno::ENOTCONN)),
            peer => {
                // Kernels without CONFIG_AF_UNIX_OOB have no such field.
                let urgent = self.at(peer, "unix_sock", "oob_skb");
                if urgent.is_ok_and(|at| self.pointer(at).is_ok_and(|skb| skb != 0)) {
                    return Err(SysError::new("read", "out-of-band data", Errno::EOPNOTSUPP));
                }
                self.unix_messages(peer)
            }
        }
    }

    fn unix_messages(&self, sock: u64) -> Result<Vec<Message>, SysError> {
        let mut all = Vec::new();
        self.queue(sock, |skb| {
            let notes = self.at(skb, "sk_buff", "cb")?;
            let note = |field: &str| self.at(notes, "unix_skb_parms", field);
            let mut bytes = self.bytes(skb)?;
            // Of a stream, the first bytes of a message may have been read.
            let read = (self.word(note("consumed")?)? as usize).min(bytes.len());
            bytes.drain(..read);
            let pid = self.pointer(note("pid")?)?;
            let credentials = match pid {
                0 => None,
                pid => {
                    let level = u64::from(self.word(self.at(pid, "pid", "level")?)?);
                    let numbers = self.at(pid, "pid", "numbers")?;
                    let number = numbers.wrapping_add(self.types.size("upid")?.wrapping_mul(level));
                    Some((self.word(number)?, self.word(note("uid")?)?, self.word(note("gid")?)?))
                }
            };
            let rights = self.pointer(note("fp")?)? != 0;
            let sender = self.pointer(self.at(skb, "sk_buff", "sk")?)?;
            let sender = if sender == 0 { None } else { self.unix_name(sender)? };
            all.push(Message { bytes, credentials, sender, rights });
            Ok(())
        })?;
        Ok(all)
    }

    fn unix_name(&self, sock: u64) -> Result<Option<Vec<u8>>, SysError> {
        let address = self.pointer(self.at(sock, "unix_sock", "addr")?)?;
        if address == 0 {
            return Ok(None);
        }
        // With the family in front, 2 bytes; at most sockaddr_un and a NUL.
        let len = self.word(self.at(address, "unix_address", "len")?)? as usize;
        let mut name = vec![0; len.clamp(2, 111) - 2];
        self.read(self.at(address, "unix_address", "name")? + 2, &mut name)?;
        Ok(Some(name))
    }

    /// The connections in the backlog of a TCP listener.
    ///
    /// # Errors
    /// As of [`Self::unix_queue`].
    pub fn tcp_backlog(&self, listener: BorrowedFd<'_>) -> Result<Vec<Unaccepted>, SysError> {
        let sock = self.sock(listener)?;
        let mut all = Vec::new();
        let mut request =
            self.pointer(self.at(sock, "inet_connection_sock", "icsk_accept_queue.rskq_accept_head")?)?;
        while request != 0 && all.len() < MANY {
            match self.pointer(self.at(request, "request_sock", "sk")?)? {
                0 => {}
                child => all.push(self.unaccepted(child)?),
            }
            request = self.pointer(self.at(request, "request_sock", "dl_next")?)?;
        }
        Ok(all)
    }

    fn unaccepted(&self, sock: u64) -> Result<Unaccepted, SysError> {
        let port = u16::from_be(self.half(self.at(sock, "sock_common", "skc_dport")?)?);
        let ip: IpAddr = match i32::from(self.half(self.at(sock, "sock_common", "skc_family")?)?) {
            libc::AF_INET => {
                let mut ip = [0; 4];
                self.read(self.at(sock, "sock_common", "skc_daddr")?, &mut ip)?;
                Ipv4Addr::from(ip).into()
            }
            _ => {
                let mut ip = [0; 16];
                self.read(self.at(sock, "sock_common", "skc_v6_daddr")?, &mut ip)?;
                IpAddr::V6(Ipv6Addr::from(ip)).to_canonical()
            }
        };
        let next = self.word(self.at(sock, "tcp_sock", "copied_seq")?)?;
        let received = self.word(self.at(sock, "tcp_sock", "rcv_nxt")?)?;
        let urgent = self.half(self.at(sock, "tcp_sock", "urg_data")?)? != 0;
        let mut bytes = Vec::new();
        self.queue(sock, |skb| {
            let first = self.word(self.at(self.at(skb, "sk_buff", "cb")?, "tcp_skb_cb", "seq")?)?;
            let piece = self.bytes(skb)?;
            let at = next.wrapping_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
            // Packets may overlap.
            let known = at.wrapping_sub(first) as usize;
            bytes.extend_from_slice(piece.get(known..).unwrap_or_default());
            Ok(())
        })?;
        let mut remote = SocketAddr::new(ip, port);
        if let SocketAddr::V6(v6) = &mut remote {
            v6.set_scope_id(0);
        }
        Ok(Unaccepted { remote, bytes, received, urgent })
    }

    /// The frames, of version 3 blocks, at which the kernel goes on in the receive and in the transmit ring of a packet
    /// socket.
    ///
    /// # Errors
    /// As of [`Self::unix_queue`].
    pub fn packet_heads(&self, fd: BorrowedFd<'_>) -> Result<(u32, u32), SysError> {
        let sock = self.sock(fd)?;
        let head = |ring: &str| self.word(self.at(sock, "packet_sock", ring)?);
        Ok((head("rx_ring.head")?, head("tx_ring.head")?))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::{
            linux::net::SocketAddrExt,
            unix::net::{SocketAddr, UnixListener, UnixStream},
        },
    };

    use super::*;

    fn kernel() -> Option<Kernel> {
        match Kernel::open() {
            Ok(kernel) => Some(kernel),
            Err(error) if [Errno::EPERM, Errno::ENOENT, Errno::EACCES].contains(&error.errno) => {
                eprintln!("SKIP: kernel memory can't be read: {error}: {}", error.errno);
                None
            }
            Err(error) => panic!("{error}: {}", error.errno),
        }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
    }

    #[test]
    fn what_a_connection_in_a_backlog_holds_is_read_and_stays() {
        let Some(kernel) = kernel() else { return };
        let name = format!("ckpt-kernel-{}", std::process::id());
        let listener =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        let mut client = UnixStream::connect_addr(&listener.local_addr().unwrap()).unwrap();
        assert_eq!(kernel.unix_peer_queue(client.as_fd()).unwrap(), []);
        client.set_nonblocking(true).unwrap();
        let sent = pattern(150_000);
        let mut n = client.write(b"small").unwrap();
        n += client.write(&sent[5..]).unwrap();
        let messages = kernel.unix_peer_queue(client.as_fd()).unwrap();
        let read: Vec<u8> = messages.iter().flat_map(|m| m.bytes.clone()).collect();
        assert_eq!(read.len(), n);
        assert!(read.starts_with(b"small") && read[5..] == sent[5..n]);
        let (mut server, _) = listener.accept().unwrap();
        let mut got = vec![0; n];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, read);
    }

    #[test]
    fn a_message_of_no_bytes_is_seen_as_often_as_asked() {
        let Some(kernel) = kernel() else { return };
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        for message in [&b"one"[..], b"", b"two", b""] {
            send(a.as_raw_fd(), message, MsgFlags::empty()).unwrap();
        }
        for _ in 0..3 {
            let queue = kernel.unix_queue(b.as_fd()).unwrap();
            let queue: Vec<&[u8]> = queue.iter().map(|m| &m.bytes[..]).collect();
            assert_eq!(queue, [&b"one"[..], b"", b"two", b""]);
        }
    }

    #[test]
    fn what_a_tcp_connection_in_a_backlog_has_received_is_read() {
        let Some(kernel) = kernel() else { return };
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut second = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let sent = pattern(30_000);
            client.write_all(&sent[..3]).unwrap();
            client.write_all(&sent[3..]).unwrap();
            second.write_all(b"second").unwrap();
            let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
            loop {
                let all = kernel.tcp_backlog(listener.as_fd()).unwrap();
                assert_eq!(all.len(), 2);
                if all[0].bytes.len() == sent.len() && all[1].bytes == b"second" {
                    assert_eq!(all[0].bytes, sent);
                    assert_eq!(all[0].remote, client.local_addr().unwrap());
                    break;
                }
                assert!(std::time::Instant::now() < end, "{all:?}");
            }
        }
    }
}
