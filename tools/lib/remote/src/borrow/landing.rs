//! Where a process can be sent home from: looking for code, stack and room, without touching anything.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use ckpt_proc::maps::{self, Mapping};
use ckpt_sys::{Pid, RemoteAddr, SysError, memory, procfs, ptrace::Regs};
use memchr::memmem;

use super::{ARENA, PAGE, frame::ucontext};
use crate::{RemoteError, freeze::Thread};

/// Bytes below the stack pointer that belong to the running function (System V AMD64 ABI).
const RED_ZONE: u64 = 128;

/// Where a process can be sent home from: found once per address space.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Landing {
    /// Address of `syscall` followed by `ret` (clearing registers in between is harmless).
    pub(super) syscall: RemoteAddr,
    /// Address of `mov $15,%eax; syscall`.
    pub(super) sigreturn: RemoteAddr,
    /// Unused stack: lowest address and length.
    pub(super) dead: (RemoteAddr, u64),
    /// A page-aligned hole in the address space, if one was found.
    pub(super) hole: Option<RemoteAddr>,
    /// A signal that the process ignores without having asked to.
    pub(super) quiet: Option<i32>,
    /// Its system calls are filtered.
    pub(super) seccomp: bool,
}

/// Landings of the processes looked at, and offsets found in files that several of them map.
#[derive(Debug, Default)]
pub(crate) struct Landings {
    by_pid: HashMap<Pid, Landing>,
    maps: HashMap<Pid, Vec<Mapping>>,
    gadgets: HashMap<MappedFile, Gadgets>,
}

/// Device, inode and offset.
type MappedFile = ((u32, u32), u64, u64);

#[derive(Debug, Clone, Copy, Default)]
struct Gadgets {
    syscall: Option<u64>,
    sigreturn: Option<u64>,
}

/// Where files have both sequences, kept from one freeze to the next: to look through a C library takes a tenth of a
/// millisecond. A file can change, so what is kept is looked at again where it should be ([`Gadgets::seen`]).
static SEEN: LazyLock<Mutex<HashMap<MappedFile, (u64, u64)>>> = LazyLock::new(Mutex::default);

impl Gadgets {
    /// Those that an earlier freeze saw in the same file, if they are still there.
    fn seen(pid: Pid, mapping: &Mapping, file: MappedFile) -> Option<Self> {
        let (syscall, sigreturn) = *SEEN.lock().unwrap_or_else(PoisonError::into_inner).get(&file)?;
        let starts_with = |at: u64, find: fn(&[u8]) -> Option<u64>| {
            let mut code = [0; 32];
            let n = usize::try_from(mapping.len().checked_sub(at)?).unwrap_or(code.len()).min(code.len());
            memory::read_exact(pid, RemoteAddr(mapping.start + at), &mut code[..n]).ok()?;
            (find(&code[..n]) == Some(0)).then_some(at)
        };
        Some(Self {
            syscall: Some(starts_with(syscall, find_syscall)?),
            sigreturn: Some(starts_with(sigreturn, find_sigreturn)?),
        })
    }

    fn remember(self, file: MappedFile) {
        if let (Some(syscall), Some(sigreturn)) = (self.syscall, self.sigreturn) {
            SEEN.lock().unwrap_or_else(PoisonError::into_inner).insert(file, (syscall, sigreturn));
        }
    }
}

impl Landing {
    /// What a task that returns to it runs on with; its FPU state is at `fpstate`.
    pub(super) fn frame(&self, regs: &Regs, mask: u64, fpstate: u64) -> Vec<u8> {
        [&self.sigreturn.0.to_le_bytes()[..], &ucontext(regs, mask, fpstate)].concat()
    }
}

impl Landings {
    /// The landing of process `pid`, whose threads are `threads`. Only reads.
    pub(crate) fn of(&mut self, threads: &[Thread], pid: Pid) -> Result<Landing, RemoteError> {
        if let Some(&landing) = self.by_pid.get(&pid) {
            return Ok(landing);
        }
        let landing = self.find(threads, pid)?;
        self.by_pid.insert(pid, landing);
        Ok(landing)
    }

    pub(crate) fn maps(&self, pid: Pid) -> Option<&[Mapping]> {
        self.maps.get(&pid).map(Vec::as_slice)
    }

    fn find(&mut self, threads: &[Thread], pid: Pid) -> Result<Landing, RemoteError> {
        let unusable = |what: &str| RemoteError::Unusable { tid: pid.leader(), what: what.to_owned() };
        let status = &threads.first().ok_or(RemoteError::Died(pid.leader()))?.status;
        let path = format!("/proc/{pid}/maps");
        let text = procfs::read(&path).map_err(|e| {
            let errno = nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            RemoteError::Sys(SysError::new("read", path.clone(), errno))
        })?;
        let maps = maps::parse(&text).map_err(|e| unusable(&format!("{path}: {e}")))?;

        let mut found = Gadgets::default();
        let mut code: Vec<&Mapping> = maps.iter().filter(|m| m.exec && m.read).collect();
        code.sort_by_key(|m| (m.name != b"[vdso]", m.file(), m.len()));
        for mapping in code {
            let gadgets = self.scan(pid, mapping)?;
            found.syscall = found.syscall.or(gadgets.syscall.map(|o| mapping.start + o));
            found.sigreturn = found.sigreturn.or(gadgets.sigreturn.map(|o| mapping.start + o));
            if found.syscall.is_some() && found.sigreturn.is_some() {
                break;
            }
        }
        let (Some(syscall), Some(sigreturn)) = (found.syscall, found.sigreturn) else {
            return Err(unusable(
                "its code has no sequence that returns from a signal handler (mov $15,%eax; syscall), \
                 so no system call can be run in it safely",
            ));
        };
        let dead = dead_stack(&maps, threads).ok_or_else(|| {
            let pointers: Vec<String> = threads.iter().map(|t| format!("{:#x}", t.regs.rsp)).collect();
            unusable(&format!(
                "no unused stack was found for a return frame (stack nearly full? stack pointers: {})",
                pointers.join(" ")
            ))
        })?;
        let hole = hole(&maps);
        let busy = status.caught | status.pending | status.shared_pending;
        let quiet =
            [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD].into_iter().find(|s| busy & (1 << (s - 1)) == 0);
        let landing = Landing {
            syscall: RemoteAddr(syscall),
            sigreturn: RemoteAddr(sigreturn),
            dead,
            hole,
            quiet,
            seccomp: status.seccomp != 0,
        };
        self.maps.insert(pid, maps);
        Ok(landing)
    }

    /// Looks for the two sequences in one mapping; gives offsets.
    fn scan(&mut self, pid: Pid, mapping: &Mapping) -> Result<Gadgets, RemoteError> {
        let key = (mapping.dev, mapping.inode, mapping.offset);
        if let Some(&known) = self.gadgets.get(&key).filter(|_| mapping.file()) {
            return Ok(known);
        }
        if let Some(seen) = Gadgets::seen(pid, mapping, key).filter(|_| mapping.file()) {
            self.gadgets.insert(key, seen);
            return Ok(seen);
        }
        // Both are found early in a C library's text.
        const CHUNK: usize = 64 << 10;
        const OVERLAP: usize = 64;
        let mut gadgets = Gadgets::default();
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < mapping.len() && (gadgets.syscall.is_none() || gadgets.sigreturn.is_none()) {
            let n = usize::try_from(mapping.len() - at).unwrap_or(CHUNK).min(CHUNK);
            // A mapping may reach beyond the end of its file: what can't be read holds no code.
            if memory::read_exact(pid, RemoteAddr(mapping.start + at), &mut buffer[..n]).is_err() {
                break;
            }
            let text = &buffer[..n];
            gadgets.syscall = gadgets.syscall.or_else(|| find_syscall(text).map(|o| at + o));
            gadgets.sigreturn = gadgets.sigreturn.or_else(|| find_sigreturn(text).map(|o| at + o));
            at += (n - if n == CHUNK { OVERLAP } else { 0 }) as u64;
        }
        if mapping.file() {
            self.gadgets.insert(key, gadgets);
            gadgets.remember(key);
        }
        Ok(gadgets)
    }
}

/// `syscall`, then `ret`, with nothing between but `xor %reg,%reg`, which the vdso has there.
fn find_syscall(text: &[u8]) -> Option<u64> {
    memmem::find_iter(text, b"\x0f\x05").find(|&at| returns(&text[at + 2..])).map(|at| at as u64)
}

fn returns(mut code: &[u8]) -> bool {
    loop {
        match code {
            [0xc3, ..] => return true,
            // xor r32,r32 with the same register twice, and its form for r8d to r15d.
            [0x31, m, rest @ ..] | [0x45, 0x31, m, rest @ ..]
                if m >> 6 == 3 && (m >> 3) & 7 == m & 7 && m & 7 != 4 =>
            {
                code = rest;
            }
            _ => return false,
        }
    }
}

fn find_sigreturn(text: &[u8]) -> Option<u64> {
    memmem::find(text, b"\xb8\x0f\x00\x00\x00\x0f\x05")
        .or_else(|| memmem::find(text, b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"))
        .map(|at| at as u64)
}

/// The unused far end of a stack: below everything that any thread has there. The main thread's
/// stack is preferred: the kernel made it, and nobody carves other things out of its far end.
fn dead_stack(maps: &[Mapping], threads: &[Thread]) -> Option<(RemoteAddr, u64)> {
    const WANTED: u64 = 20 * 1024;
    const ENOUGH: u64 = 4 * 1024 + 2048;
    let unused = |m: &Mapping| {
        let used = threads.iter().map(|t| t.regs.rsp).filter(|rsp| (m.start..=m.end).contains(rsp)).min();
        // Without a stack pointer in it, only the part that a fresh program's stack never reaches is safe.
        let top = used.map_or(m.start + m.len() / 4, |rsp| rsp.saturating_sub(RED_ZONE + 512));
        top.saturating_sub(m.start)
    };
    let main = maps.iter().find(|m| m.name == b"[stack]" && m.write && m.read);
    let others = maps.iter().filter(|m| {
        m.write && m.read && !m.shared && threads.iter().any(|t| (m.start..m.end).contains(&t.regs.rsp))
    });
    main.into_iter().chain(others).find_map(|m| {
        let free = unused(m);
        (free >= ENOUGH).then(|| (RemoteAddr(m.start), free.min(WANTED)))
    })
}

/// A hole of [`ARENA`] bytes, not next to anything that may grow, and not where the kernel would
/// put the next mapping.
fn hole(maps: &[Mapping]) -> Option<RemoteAddr> {
    const LOWEST: u64 = 0x10_0000;
    const HIGHEST: u64 = 0x7fff_0000_0000;
    const MARGIN: u64 = 2 << 20;
    let mut end = LOWEST;
    for mapping in maps.iter().filter(|m| m.start < HIGHEST) {
        if mapping.start > end && mapping.start - end > ARENA + 2 * MARGIN {
            let at = (mapping.start - ARENA - MARGIN) & !(PAGE - 1);
            return Some(RemoteAddr(at));
        }
        end = end.max(mapping.end);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vdso_and_libc_endings_return() {
        assert!(returns(&[0xc3]));
        // xor edx,edx; xor ecx,ecx; xor r11d,r11d; ret
        assert!(returns(&[0x31, 0xd2, 0x31, 0xc9, 0x45, 0x31, 0xdb, 0xc3]));
        // cmp rax,-4095 does something else first; xor edx,ecx is no clearing.
        assert!(!returns(&[0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, 0xc3]));
        assert!(!returns(&[0x31, 0xca, 0xc3]));
        assert!(!returns(&[]));
    }

    #[test]
    fn what_was_seen_in_a_file_is_looked_at_again() {
        let pid = Pid(std::process::id().cast_signed());
        let maps = maps::parse(&procfs::read("/proc/self/maps").unwrap()).unwrap();
        let libc = maps
            .iter()
            .find(|m| m.exec && m.name.ends_with(b"/libc.so.6"))
            .expect("tests are linked to libc");
        let file = (libc.dev, libc.inode, libc.offset);
        let scanned = Landings::default().scan(pid, libc).unwrap();
        let found = (scanned.syscall.unwrap(), scanned.sigreturn.unwrap());
        let seen = || Gadgets::seen(pid, libc, file).map(|g| (g.syscall.unwrap(), g.sigreturn.unwrap()));
        assert_eq!(seen(), Some(found));

        SEEN.lock().unwrap().insert(file, (found.0 + 1, found.1));
        assert_eq!(seen(), None);
        SEEN.lock().unwrap().insert(file, (found.0, libc.len() + 1));
        assert_eq!(seen(), None);
        let again = Landings::default().scan(pid, libc).unwrap();
        assert_eq!((again.syscall.unwrap(), again.sigreturn.unwrap()), found);
    }
}
