//! The mappings of a process with their flags, by an iterator of bpf(2) (Documentation/bpf/bpf_iterators.rst, `task_vma`,
//! Linux 6.1 for one of a single task).
//!
//! /proc/PID/smaps tells the flags too, but counts every page of the process for it: 13 ms for 1 GiB of 4 KiB pages. This takes
//! 10 us. The program copies three fields of each `struct vm_area_struct`; it runs when its file is read and at
//! no other time. Which flag a bit stands for differs from kernel to kernel, and is learned from mappings of our own
//! ([`Specimens`]).
//!
//! It takes CAP_BPF and CAP_PERFMON, and a kernel with BTF that is not locked down (kernel_lockdown(7)).

use std::{
    fs::File,
    io::Read,
    num::NonZeroUsize,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        raw::c_void,
    },
    ptr::NonNull,
};

use nix::{
    errno::Errno,
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
};

use crate::{
    Pid, RemoteAddr, SysError,
    bpf::{self, both, ins},
    btf::Btf,
    uffd,
};

const PAGE: usize = 4096;
/// More than the kernel gives at a time, 32 KiB. With a buffer that takes less it begins over and over again (Linux 6.18).
const BUFFER: usize = 64 << 10;

/// A mapping as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `vm_flags`.
    pub flags: u64,
}

/// The iterator.
#[derive(Debug)]
pub struct Vmas {
    program: OwnedFd,
}

/// The program: for the mapping in its context, writes start, end and flags, which are at these places in it.
fn program([start, end, flags]: [i16; 3]) -> Vec<u64> {
    vec![
        ins(0xbf, 6, 1, 0, 0),     // r6 = context
        ins(0x79, 7, 6, 16, 0),    // r7 = its mapping
        ins(0x55, 7, 0, 2, 0),     // if r7 == 0: the last call
        ins(0xb7, 0, 0, 0, 0),     //   return 0
        ins(0x95, 0, 0, 0, 0),     //
        ins(0x79, 1, 7, start, 0), // three words on the stack
        ins(0x7b, 10, 1, -24, 0),  //
        ins(0x79, 1, 7, end, 0),   //
        ins(0x7b, 10, 1, -16, 0),  //
        ins(0x79, 1, 7, flags, 0), //
        ins(0x7b, 10, 1, -8, 0),   //
        ins(0x79, 1, 6, 0, 0),     // r1 = context->meta->seq
        ins(0x79, 1, 1, 0, 0),     //
        ins(0xbf, 2, 10, 0, 0),    // r2 = &words
        ins(0x07, 2, 0, 0, -24),   //
        ins(0xb7, 3, 0, 0, 24),    // r3 = their bytes
        ins(0x85, 0, 0, 0, 127),   // bpf_seq_write
        ins(0xb7, 0, 0, 0, 0),     // return 0
        ins(0x95, 0, 0, 0, 0),     //
    ]
}

const TRACE_ITER: u32 = 28;

impl Vmas {
    /// Loads the program.
    ///
    /// # Errors
    /// EPERM: a privilege is missing, or the kernel is locked down. ENOENT: no BTF, or no such iterator.
    pub fn load() -> Result<Self, SysError> {
        const TRACING: u32 = 26;
        let types = Btf::read(&[])?;
        let place = |field| {
            let offset = types.offset("vm_area_struct", field)?;
            i16::try_from(offset).map_err(|_| SysError::new("BTF", "vm_area_struct", Errno::EOVERFLOW))
        };
        let code = program([place("vm_start")?, place("vm_end")?, place("vm_flags")?]);
        let function = types.function("bpf_iter_task_vma")?;
        Ok(Self { program: bpf::load(&code, TRACING, TRACE_ITER, function)? })
    }

    /// The mappings of `pid`, in the order of their addresses. Those that the kernel has outside of user space are none of
    /// them.
    ///
    /// # Errors
    /// ESRCH; EINVAL before Linux 6.1; EBADMSG if they are not in order.
    pub fn of(&self, pid: Pid) -> Result<Vec<Vma>, SysError> {
        const LINK_CREATE: i32 = 28;
        const ITER_CREATE: i32 = 33;
        // Its main thread; by the process there could be one turn for each thread.
        let only = [pid.0.unsigned_abs(), 0, 0];
        let mut attributes = [0; 16];
        attributes[0] = both(self.program.as_raw_fd().cast_unsigned(), 0);
        attributes[1] = both(TRACE_ITER, 0);
        attributes[2] = only.as_ptr() as u64;
        attributes[3] = size_of_val(&only) as u64;
        let link = bpf::descriptor(LINK_CREATE, "bpf(BPF_LINK_CREATE)", &mut attributes)?;
        let mut attributes = [0; 16];
        attributes[0] = both(link.as_raw_fd().cast_unsigned(), 0);
        let mut file = File::from(bpf::descriptor(ITER_CREATE, "bpf(BPF_ITER_CREATE)", &mut attributes)?);
        let failed = |errno| SysError::new("read", format!("the mappings of pid {pid}"), errno);
        let mut all: Vec<Vma> = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let len = file
                .read(&mut buffer)
                .map_err(|e| failed(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))?;
            let (words, _) = buffer.get(..len).unwrap_or_default().as_chunks::<8>();
            let (vmas, _) = words.as_chunks::<3>();
            for vma in vmas.iter().map(|words| words.map(u64::from_ne_bytes)) {
                let [start, end, flags] = vma;
                if all.last().is_some_and(|before| before.end > start) {
                    return Err(failed(Errno::EBADMSG));
                }
                all.push(Vma { start, end, flags });
            }
            if len == 0 {
                return Ok(all);
            }
        }
    }
}

/// Mappings of this process, of a page each, that show what flags look like. They go with this.
#[derive(Debug)]
pub struct Specimens {
    mappings: Vec<NonNull<c_void>>,
    /// Watches one of them.
    _uffd: Option<OwnedFd>,
}

impl Specimens {
    /// Makes one mapping for each of `advice` (madvise(2)), and some of other kinds. What can't be made is left out.
    #[must_use]
    pub fn new(advice: &[i32]) -> Self {
        let mut all = Self { mappings: Vec::new(), _uffd: None };
        let plain = MapFlags::MAP_PRIVATE;
        for flags in [
            plain | MapFlags::MAP_NORESERVE,
            plain | MapFlags::MAP_GROWSDOWN,
            plain | MapFlags::MAP_LOCKED,
            MapFlags::MAP_SHARED,
        ] {
            all.add(flags);
        }
        for &advice in advice {
            let Some(at) = all.add(plain) else { continue };
            // SAFETY: advice for a page that is mapped and that nobody uses; if the kernel does not take it, so be it.
            unsafe { libc::madvise(at.as_ptr(), PAGE, advice) };
        }
        all._uffd = all.add(plain).and_then(|at| {
            let start = RemoteAddr(at.as_ptr() as u64);
            let uffd = uffd::own().ok()?;
            uffd::enable(uffd.as_fd())
                .and_then(|()| uffd::register(uffd.as_fd(), start, start.plus(PAGE as u64)))
                .ok()?;
            Some(uffd)
        });
        all
    }

    fn add(&mut self, flags: MapFlags) -> Option<NonNull<c_void>> {
        let size = NonZeroUsize::new(PAGE)?;
        // SAFETY: a new mapping wherever the kernel likes; no memory of ours is affected.
        let at = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }
            .ok()?;
        self.mappings.push(at);
        Some(at)
    }
}

impl Drop for Specimens {
    fn drop(&mut self) {
        for &at in &self.mappings {
            // SAFETY: made by `add` with this length, and nothing refers to it.
            let _ = unsafe { munmap(at, PAGE) };
        }
    }
}
