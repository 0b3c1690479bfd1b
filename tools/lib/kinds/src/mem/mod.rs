//! Address spaces and pages.
//!
//! What is stored of a mapping:
//!
//! | mapping | pages stored |
//! | --- | --- |
//! | private anonymous | those that were touched and are not the shared zero page |
//! | private, of a file | those that were written (anonymous by now) |
//! | shared, of a file | none: the file has them |
//! | shared anonymous, memfd | once per segment, by offset, not per mapping |
//! | ring of a packet socket | none: those who complete sockets read it |
//! | System V shared memory | once per segment, by offset |
//! | vdso | all, to compare with the kernel that restores |
//! | vvar, vsyscall | none: the kernel's |
//!
//! Memory of huge pages (hugetlbfs) is any of the first six, in pages of its own size ([`ckpt_sys::hugetlb`]).

pub mod dump;
pub mod flags;
pub mod guard;
mod place;
pub mod restore;
pub mod share;
pub mod snapshot;
pub mod stash;
pub mod sysv;
pub mod track;

/// Whether a mapping is of huge pages (MAP_HUGETLB).
pub(crate) fn is_huge(vma: &ckpt_proto::types::VmaEntry) -> bool {
    vma.flags & libc::MAP_HUGETLB.unsigned_abs() != 0
}

/// `vma_entry.status`: what a mapping is.
pub mod status {
    /// An ordinary mapping, to be made by mmap(2).
    pub const REGULAR: u32 = 1;
    /// The vsyscall page, which every task has and nobody can map.
    pub const VSYSCALL: u32 = 1 << 2;
    /// Code of the vdso.
    pub const VDSO: u32 = 1 << 3;
    /// The heap of brk(2).
    pub const HEAP: u32 = 1 << 5;
    /// A private mapping of a file.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// A shared mapping of a file.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared anonymous memory known by its segment.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// System V shared memory, besides `ANON_SHARED`; `shmid` is its id.
    pub const SYSVIPC: u32 = 1 << 10;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// The ring of a packet socket, which is a file in FILES.
    pub const SOCKET: u32 = 1 << 11;
    /// Data of the vdso.
    pub const VVAR: u32 = 1 << 12;
    /// The file is a memfd (shared anonymous memory is one, named /dev/zero).
    pub const MEMFD: u32 = 1 << 14;
}

/// `pagemap_entry.flags`.
pub mod page {
    /// The page is in the parent image.
    pub const PARENT: u32 = 1;
    /// A lazy restore may fetch the page later.
    pub const LAZY: u32 = 1 << 1;
    /// The page is in this image.
    pub const PRESENT: u32 = 1 << 2;
    /// The page is the one that the parent process has at this address. An own flag, which CRIU does not know.
    pub const AS_PARENT_PROCESS: u32 = 1 << 17;
}
