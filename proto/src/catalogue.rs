//! The image catalogue: one row for each kind of image file.
//!
//! Every reader and writer, the stream and `ckpt-show` work from this table; a kind that is not
//! here does not exist for the tools. Names, patterns and magics are CRIU's; rows whose name
//! begins with `CKPT_` are this project's own, and CRIU passes over such files.

use prost::Message;

use crate::types;

/// What follows an entry's message in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: the next entry.
    None,
    /// The whole file is raw bytes: no magic, no entries.
    Raw,
    /// `pipe_data_entry.bytes` bytes.
    PipeBytes,
    /// `sk_packet_entry.length` bytes.
    QueueLength,
    /// `tcp_stream_entry.inq_len` and then `outq_len` bytes.
    TcpQueues,
    /// Everything up to the end of the file.
    Rest,
}

/// How long an entry's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadLen {
    /// Exactly so many bytes.
    Exact(u64),
    /// Up to the end of the file.
    Rest,
}

macro_rules! catalogue {
    ($($id:ident, $name:literal, $pattern:literal, $magic:literal, $message:expr, $single:literal, $payload:ident;)*) => {
        /// A kind of image.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Image {
            $(#[doc = concat!("`", $pattern, "`")] $id,)*
        }

        /// All kinds, in catalogue order.
        pub const IMAGES: &[Image] = &[$(Image::$id,)*];

        impl Image {
            /// The name used in streams, by `ckpt-show` and by `crit`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }

            /// The file name with a printf conversion (`%u`, `%lu`, `%x`) where the number goes.
            #[must_use]
            pub const fn pattern(self) -> &'static str {
                match self { $(Self::$id => $pattern,)* }
            }

            /// The kind's own magic; 0 for raw images.
            #[must_use]
            pub const fn magic(self) -> u32 {
                match self { $(Self::$id => $magic,)* }
            }

            /// Message of each entry; `None` for raw images and for kinds that the tools know only by name.
            /// The first entry of a pagemap is a `pagemap_head` instead.
            #[must_use]
            pub const fn message(self) -> Option<&'static str> {
                match self { $(Self::$id => $message,)* }
            }

            /// Whether the file holds exactly one entry.
            #[must_use]
            pub const fn single(self) -> bool {
                match self { $(Self::$id => $single,)* }
            }

            /// What follows an entry.
            #[must_use]
            pub const fn payload(self) -> Payload {
                match self { $(Self::$id => Payload::$payload,)* }
            }
        }
    };
}

catalogue! {
    Inventory, "INVENTORY", "inventory.img", 0x58313116, Some("inventory_entry"), true, None;
    Fdinfo, "FDINFO", "fdinfo-%u.img", 0x56213732, Some("fdinfo_entry"), false, None;
    Pagemap, "PAGEMAP", "pagemap-%lu.img", 0x56084025, Some("pagemap_entry"), false, None;
    ShmemPagemap, "SHMEM_PAGEMAP", "pagemap-shmem-%lu.img", 0x56084025, Some("pagemap_entry"), false, None;
    RegFiles, "REG_FILES", "reg-files.img", 0x50363636, Some("reg_file_entry"), false, None;
    ExtFiles, "EXT_FILES", "ext-files.img", 0x59255641, Some("ext_file_entry"), false, None;
    NsFiles, "NS_FILES", "ns-files.img", 0x61394011, Some("ns_file_entry"), false, None;
    EventfdFile, "EVENTFD_FILE", "eventfd.img", 0x44523722, Some("eventfd_file_entry"), false, None;
    EventpollFile, "EVENTPOLL_FILE", "eventpoll.img", 0x45023858, Some("eventpoll_file_entry"), false, None;
    EventpollTfd, "EVENTPOLL_TFD", "eventpoll-tfd.img", 0x44433746, Some("eventpoll_tfd_entry"), false, None;
    Signalfd, "SIGNALFD", "signalfd.img", 0x57323820, Some("signalfd_entry"), false, None;
    InotifyFile, "INOTIFY_FILE", "inotify.img", 0x48424431, Some("inotify_file_entry"), false, None;
    InotifyWd, "INOTIFY_WD", "inotify-wd.img", 0x54562009, Some("inotify_wd_entry"), false, None;
    FanotifyFile, "FANOTIFY_FILE", "fanotify.img", 0x55096122, Some("fanotify_file_entry"), false, None;
    FanotifyMark, "FANOTIFY_MARK", "fanotify-mark.img", 0x56506035, Some("fanotify_mark_entry"), false, None;
    Core, "CORE", "core-%u.img", 0x55053847, Some("core_entry"), true, None;
    Ids, "IDS", "ids-%u.img", 0x54432030, Some("task_kobj_ids_entry"), true, None;
    Mm, "MM", "mm-%u.img", 0x57492820, Some("mm_entry"), true, None;
    Vmas, "VMAS", "vmas-%u.img", 0x54123737, Some("vma_entry"), false, None;
    Pipes, "PIPES", "pipes.img", 0x56513555, Some("pipe_entry"), false, None;
    PipesData, "PIPES_DATA", "pipes-data.img", 0x56453709, Some("pipe_data_entry"), false, PipeBytes;
    Fifo, "FIFO", "fifo.img", 0x58364939, Some("fifo_entry"), false, None;
    FifoData, "FIFO_DATA", "fifo-data.img", 0x59333054, Some("pipe_data_entry"), false, PipeBytes;
    Pstree, "PSTREE", "pstree.img", 0x50273030, Some("pstree_entry"), false, None;
    Sigact, "SIGACT", "sigacts-%u.img", 0x55344201, Some("sa_entry"), false, None;
    Unixsk, "UNIXSK", "unixsk.img", 0x54373943, Some("unix_sk_entry"), false, None;
    Inetsk, "INETSK", "inetsk.img", 0x56443851, Some("inet_sk_entry"), false, None;
    Packetsk, "PACKETSK", "packetsk.img", 0x60454618, Some("packet_sock_entry"), false, None;
    NetlinkSk, "NETLINK_SK", "netlinksk.img", 0x58005614, Some("netlink_sk_entry"), false, None;
    SkQueues, "SK_QUEUES", "sk-queues.img", 0x56264026, Some("sk_packet_entry"), false, QueueLength;
    Itimers, "ITIMERS", "itimers-%u.img", 0x57464056, Some("itimer_entry"), true, None;
    PosixTimers, "POSIX_TIMERS", "posix-timers-%u.img", 0x52603957, Some("posix_timer_entry"), false, None;
    Creds, "CREDS", "creds-%u.img", 0x54023547, Some("creds_entry"), true, None;
    Utsns, "UTSNS", "utsns-%u.img", 0x54473203, Some("utsns_entry"), true, None;
    IpcVar, "IPC_VAR", "ipcns-var-%u.img", 0x53115007, None, false, None;
    IpcnsShm, "IPCNS_SHM", "ipcns-shm-%u.img", 0x46283044, None, false, None;
    IpcnsMsg, "IPCNS_MSG", "ipcns-msg-%u.img", 0x55453737, None, false, None;
    IpcnsSem, "IPCNS_SEM", "ipcns-sem-%u.img", 0x59573019, None, false, None;
    Fs, "FS", "fs-%u.img", 0x51403912, Some("fs_entry"), true, None;
    RemapFpath, "REMAP_FPATH", "remap-fpath.img", 0x59133954, Some("remap_file_path_entry"), false, None;
    GhostFile, "GHOST_FILE", "ghost-file-%x.img", 0x52583605, Some("ghost_file_entry"), true, Rest;
    MemfdInode, "MEMFD_INODE", "memfd.img", 0x48453499, Some("memfd_inode_entry"), false, None;
    TcpStream, "TCP_STREAM", "tcp-stream-%x.img", 0x51465506, Some("tcp_stream_entry"), true, TcpQueues;
    Mnts, "MNTS", "mountpoints-%u.img", 0x55563928, None, false, None;
    Netdev, "NETDEV", "netdev-%u.img", 0x57373951, None, false, None;
    Netns, "NETNS", "netns-%u.img", 0x55933752, None, false, None;
    Ifaddr, "IFADDR", "ifaddr-%u.img", 0, None, false, Raw;
    Route, "ROUTE", "route-%u.img", 0, None, false, Raw;
    Route6, "ROUTE6", "route6-%u.img", 0, None, false, Raw;
    Rule, "RULE", "rule-%u.img", 0, None, false, Raw;
    Iptables, "IPTABLES", "iptables-%u.img", 0, None, false, Raw;
    Ip6tables, "IP6TABLES", "ip6tables-%u.img", 0, None, false, Raw;
    Nftables, "NFTABLES", "nftables-%u.img", 0, None, false, Raw;
    TmpfsImg, "TMPFS_IMG", "tmpfs-%u.tar.gz.img", 0, None, false, Raw;
    TmpfsDev, "TMPFS_DEV", "tmpfs-dev-%u.tar.gz.img", 0, None, false, Raw;
    Autofs, "AUTOFS", "autofs-%u.img", 0x49353943, None, false, None;
    BinfmtMisc, "BINFMT_MISC", "binfmt-misc.img", 0x67343323, None, false, None;
    TtyFiles, "TTY_FILES", "tty.img", 0x59433025, Some("tty_file_entry"), false, None;
    TtyInfo, "TTY_INFO", "tty-info.img", 0x59453036, Some("tty_info_entry"), false, None;
    TtyData, "TTY_DATA", "tty-data.img", 0x59413026, Some("tty_data_entry"), false, None;
    FileLocks, "FILE_LOCKS", "filelocks.img", 0x54323616, Some("file_lock_entry"), false, None;
    Rlimit, "RLIMIT", "rlimit-%u.img", 0x57113925, Some("rlimit_entry"), false, None;
    Pages, "PAGES", "pages-%u.img", 0, None, false, Raw;
    Signal, "SIGNAL", "signal-s-%u.img", 0x59255647, Some("siginfo_entry"), false, None;
    Psignal, "PSIGNAL", "signal-p-%u.img", 0x59255647, Some("siginfo_entry"), false, None;
    Tunfile, "TUNFILE", "tunfile.img", 0x57143751, Some("tunfile_entry"), false, None;
    Cgroup, "CGROUP", "cgroup.img", 0x59383330, None, false, None;
    Timerfd, "TIMERFD", "timerfd.img", 0x50493712, Some("timerfd_entry"), false, None;
    Cpuinfo, "CPUINFO", "cpuinfo.img", 0x61404013, Some("cpuinfo_entry"), true, None;
    Seccomp, "SECCOMP", "seccomp.img", 0x64413049, Some("seccomp_entry"), true, None;
    Userns, "USERNS", "userns-%u.img", 0x55474906, Some("userns_entry"), true, None;
    NetnfCt, "NETNF_CT", "netns-ct-%u.img", 0, None, false, Raw;
    NetnfExp, "NETNF_EXP", "netns-exp-%u.img", 0, None, false, Raw;
    Files, "FILES", "files.img", 0x56303138, Some("file_entry"), false, None;
    Timens, "TIMENS", "timens-%u.img", 0x43114433, Some("timens_entry"), true, None;
    Pidns, "PIDNS", "pidns-%u.img", 0x61157326, Some("pidns_entry"), true, None;
    BpfmapFile, "BPFMAP_FILE", "bpfmap-file.img", 0x57506142, Some("bpfmap_file_entry"), false, None;
    BpfmapData, "BPFMAP_DATA", "bpfmap-data.img", 0x64324033, None, false, None;
    Apparmor, "APPARMOR", "apparmor.img", 0x59423047, None, false, None;
    Pidfd, "PIDFD", "pidfd.img", 0x54435556, Some("pidfd_entry"), false, None;
    CkptPages, "CKPT_PAGES", "ckpt-pages-%u.img", 0, None, false, Raw;
    CkptSysvShm, "CKPT_SYSV_SHM", "ckpt-sysv-shm.img", 0x434b_5653, Some("sysv_shm_entry"), false, None;
    CkptManifest, "CKPT_MANIFEST", "ckpt-manifest.img", 0x434b_4d31, Some("manifest_entry"), false, None;
}

/// First word of nearly every image file.
pub const COMMON_MAGIC: u32 = 0x5456_4319;
/// First word of service images (`stats-*`, `irmap-cache`).
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

impl Image {
    /// The kind with this catalogue name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        IMAGES.iter().copied().find(|i| i.name() == name)
    }

    /// Whether the file name carries a number.
    #[must_use]
    pub fn numbered(self) -> bool {
        self.pattern().contains('%')
    }

    /// The file name of image `arg` of this kind; `arg` is ignored where the name has no number.
    #[must_use]
    pub fn file_name(self, arg: u64) -> String {
        let pattern = self.pattern();
        for (conversion, hex) in [("%lu", false), ("%u", false), ("%x", true)] {
            if let Some((head, tail)) = pattern.split_once(conversion) {
                return if hex { format!("{head}{arg:x}{tail}") } else { format!("{head}{arg}{tail}") };
            }
        }
        pattern.to_owned()
    }

    /// The kind and number that a file name stands for; `None` if it is no image's name.
    /// Only the canonical spelling counts: `core-007.img` is nobody's name.
    #[must_use]
    pub fn parse_file_name(name: &str) -> Option<(Self, u64)> {
        for &image in IMAGES {
            let pattern = image.pattern();
            let arg = match pattern.split_once('%') {
                None if pattern == name => Some(0),
                None => None,
                Some((head, rest)) => {
                    let tail = rest.trim_start_matches('l').get(1..).unwrap_or("");
                    let radix = if rest.starts_with('x') { 16 } else { 10 };
                    name.strip_prefix(head)
                        .and_then(|n| n.strip_suffix(tail))
                        .and_then(|n| u64::from_str_radix(n, radix).ok())
                }
            };
            if let Some(arg) = arg.filter(|&a| image.file_name(a) == name) {
                return Some((image, arg));
            }
        }
        None
    }

    /// Whether the file starts with `COMMON_MAGIC` before the kind's own magic.
    #[must_use]
    pub fn has_common_magic(self) -> bool {
        self != Self::Inventory && self.payload() != Payload::Raw
    }

    /// Full name (`ckpt.core_entry`) of the message of entry number `index`.
    #[must_use]
    pub fn entry_message(self, index: usize) -> Option<&'static str> {
        match self {
            Self::Pagemap | Self::ShmemPagemap if index == 0 => Some("pagemap_head"),
            _ => self.message(),
        }
    }

    /// Length of the payload that follows `entry` in a file of this kind.
    ///
    /// # Errors
    /// The message does not decode.
    pub fn payload_len(self, entry: &[u8]) -> Result<PayloadLen, prost::DecodeError> {
        Ok(match self.payload() {
            Payload::None => PayloadLen::Exact(0),
            Payload::Raw | Payload::Rest => PayloadLen::Rest,
            Payload::PipeBytes => PayloadLen::Exact(u64::from(types::PipeDataEntry::decode(entry)?.bytes)),
            Payload::QueueLength => PayloadLen::Exact(u64::from(types::SkPacketEntry::decode(entry)?.length)),
            Payload::TcpQueues => {
                let e = types::TcpStreamEntry::decode(entry)?;
                PayloadLen::Exact(u64::from(e.inq_len) + u64::from(e.outq_len))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back() {
        for &image in IMAGES {
            let arg = if image.numbered() { 48_213 } else { 0 };
            assert_eq!(Image::parse_file_name(&image.file_name(arg)), Some((image, arg)), "{}", image.name());
            assert_eq!(Image::by_name(image.name()), Some(image));
        }
    }

    #[test]
    fn look_alikes_are_no_images() {
        for name in [
            "core-.img",
            "core-+1.img",
            "core-007.img",
            "core-1.img.tmp",
            "../core-1.img",
            "ghost-file-G.img",
        ] {
            assert_eq!(Image::parse_file_name(name), None, "{name}");
        }
    }
}
