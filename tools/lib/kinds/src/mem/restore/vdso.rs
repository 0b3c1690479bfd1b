//! The vdso: code that the kernel maps into every process, and the data pages it reads.
//!
//! A restored task may be stopped inside it or hold pointers to its functions, so it must find the
//! same code at the same place. The place is a matter of mremap(2). Whether it is the same code can't be told by comparing bytes: each
//! kernel build has its own build id and version note in it. What counts is that every function is
//! where it was, so segments and dynamic symbols (name, offset, size) are compared.

use anyhow::{Context, ensure};
use ckpt_proto::types::VmaEntry;
use ckpt_remote::{Arg, Call};
use ckpt_sys::Refused;

/// `[vvar]`, its companions and `[vdso]`: one block, because the code finds its data by distance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// First address of the data.
    pub start: u64,
    /// First address of the code.
    pub code: u64,
    /// First address after the code.
    pub end: u64,
}

impl Block {
    fn shape(&self) -> (u64, u64) {
        (self.code - self.start, self.end - self.code)
    }
}

/// Gathers the parts of a block from the areas of an image.
#[derive(Debug, Default)]
pub(super) struct Collect {
    data: Option<(u64, u64)>,
    code: Option<(u64, u64)>,
}

impl Collect {
    pub(super) fn add(&mut self, vma: &VmaEntry) -> anyhow::Result<()> {
        let part = if vma.status & super::status::VDSO != 0 { &mut self.code } else { &mut self.data };
        match part {
            None => *part = Some((vma.start, vma.end)),
            Some((_, end)) if *end == vma.start => *end = vma.end,
            Some(_) => anyhow::bail!("area {:#x}-{:#x}: a second vdso", vma.start, vma.end),
        }
        Ok(())
    }

    pub(super) fn block(&self) -> anyhow::Result<Option<Block>> {
        let Some((code, end)) = self.code else {
            ensure!(self.data.is_none(), "the vdso's data is mapped without its code");
            return Ok(None);
        };
        let start = self.data.map_or(code, |(start, _)| start);
        ensure!(
            self.data.is_none_or(|(_, data_end)| data_end == code),
            "the vdso's data does not end where its code begins"
        );
        Ok(Some(Block { start, code, end }))
    }
}

/// This process's vdso.
#[derive(Debug, Clone)]
pub struct Ours {
    /// Where it is.
    pub block: Block,
    /// Its mappings, each of which has to be moved by itself.
    parts: Vec<(u64, u64)>,
    code: Vec<u8>,
}

impl Ours {
    /// Finds it in the text of `/proc/self/maps`; `read` reads this process's memory. `None` if the kernel runs without (`vdso=0`).
    ///
    /// # Errors
    /// The mappings are not as on any known kernel.
    pub fn find(
        maps: &str,
        read: impl FnOnce(u64, &mut [u8]) -> std::io::Result<()>,
    ) -> anyhow::Result<Option<Self>> {
        let mut collect = Collect::default();
        let mut parts = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(range), Some(name)) = (words.next(), words.nth(4)) else { continue };
            let status = match name {
                "[vdso]" => super::status::VDSO,
                "[vvar]" | "[vvar_vclock]" => super::status::VVAR,
                _ => continue,
            };
            let bounds = range.split_once('-').and_then(|(a, b)| {
                Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))
            });
            let (start, end) = bounds.with_context(|| format!("/proc/self/maps: {line}"))?;
            collect.add(&VmaEntry { start, end, status, ..VmaEntry::default() })?;
            parts.push((start, end));
        }
        let Some(block) = collect.block()? else { return Ok(None) };
        let mut code = vec![0; usize::try_from(block.end - block.code).context("size of the vdso")?];
        read(block.code, &mut code).context("read the vdso of this process")?;
        Ok(Some(Self { block, parts, code }))
    }

    /// The same after it has been moved to `start`.
    #[must_use]
    pub fn moved(&self, start: u64) -> Self {
        let shift = |at: u64| at - self.block.start + start;
        Self {
            block: Block { start, code: shift(self.block.code), end: shift(self.block.end) },
            parts: self.parts.iter().map(|&(a, b)| (shift(a), shift(b))).collect(),
            code: self.code.clone(),
        }
    }

    /// Bytes of the whole block.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.block.end - self.block.start
    }

    /// Whether there is nothing, which can't be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a task recorded with a vdso at `block` (contents `stored`, if they are known) can use ours.
    ///
    /// # Errors
    /// [`Refused`] if it can't.
    pub fn check(&self, who: &str, block: &Block, stored: Option<&[u8]>) -> anyhow::Result<()> {
        let refuse = |why: String| {
            Refused::new(who, format!("its vdso is another than this kernel's: {why}"))
                .advise("restore on the kernel that the checkpoint was made on")
        };
        if block.shape() != self.block.shape() {
            let (data, code) = block.shape();
            let (our_data, our_code) = self.block.shape();
            let why = format!("{data} + {code} bytes there, {our_data} + {our_code} bytes here");
            return Err(refuse(why).into());
        }
        let Some(stored) = stored else { return Ok(()) };
        if stored == self.code {
            return Ok(());
        }
        let theirs = Elf::parse(stored).ok_or_else(|| refuse("its code is not an ELF image".into()))?;
        let ours = Elf::parse(&self.code).context("the vdso of this process is not an ELF image")?;
        if theirs.segments != ours.segments {
            return Err(refuse("the segments differ".into()).into());
        }
        if let Some((name, ..)) = theirs.symbols.iter().find(|symbol| !ours.symbols.contains(symbol)) {
            let why = format!("{} is not where it was", String::from_utf8_lossy(name));
            return Err(refuse(why).into());
        }
        Ok(())
    }

    /// Moves the block to `to`. It goes by way of `stage`, since a mapping can't be moved onto itself.
    pub(super) fn move_calls(&self, stage: u64, to: u64) -> Vec<Call> {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).unsigned_abs();
        let mut calls = Vec::new();
        for (from, to) in [(self.block.start, stage), (stage, to)] {
            for (start, end) in &self.parts {
                let offset = start - self.block.start;
                let args =
                    [from + offset, end - start, end - start, u64::from(flags), to + offset].map(Arg::Val);
                let name = format!("mremap(vdso to {:#x})", to + offset);
                calls.push(Call::new(name, libc::SYS_mremap, args));
            }
        }
        calls
    }
}

type Segment = (u64, u64, u32);
type Symbol = (Vec<u8>, u64, u64);

/// The parts of an ELF image that callers depend on.
#[derive(Debug, PartialEq, Eq)]
struct Elf {
    segments: Vec<Segment>,
    symbols: Vec<Symbol>,
}

impl Elf {
    /// Total: `None` for anything that is not a 64-bit little-endian ELF image with dynamic symbols.
    fn parse(image: &[u8]) -> Option<Self> {
        const PT_LOAD: u64 = 1;
        const PT_DYNAMIC: u64 = 2;
        if image.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let number = |at: u64, size: usize| -> Option<u64> {
            let at = usize::try_from(at).ok()?;
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(image.get(at..at.checked_add(size)?)?);
            Some(u64::from_le_bytes(bytes))
        };
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut segments = Vec::new();
        let mut dynamic = None;
        let mut base = None;
        for i in 0..count {
            let at = table.checked_add(size * i)?;
            let (kind, flags) = (number(at, 4)?, number(at.checked_add(4)?, 4)?);
            let (offset, vaddr) = (number(at + 8, 8)?, number(at + 16, 8)?);
            match kind {
                PT_LOAD => {
                    base = base.or(Some(vaddr.wrapping_sub(offset)));
                    segments.push((vaddr, number(at + 40, 8)?, u32::try_from(flags).ok()?));
                }
                PT_DYNAMIC => dynamic = Some((offset, number(at + 32, 8)?)),
                _ => {}
            }
        }
        let base = base?;
        let (dynamic, len) = dynamic?;
        let (mut symtab, mut strtab, mut strsz) = (None, None, None);
        for i in 0..len / 16 {
            let at = dynamic.checked_add(16 * i)?;
            let value = number(at.checked_add(8)?, 8)?;
            match number(at, 8)? {
                0 => break,
                5 => strtab = Some(value.wrapping_sub(base)),
                6 => symtab = Some(value.wrapping_sub(base)),
                10 => strsz = Some(value),
                _ => {}
            }
        }
        let (symtab, strtab, strsz) = (symtab?, strtab?, strsz?);
        // The linker lays the strings right behind the symbols.
        let count = strtab.checked_sub(symtab)? / 24;
        let mut symbols = Vec::new();
        for i in 1..count {
            let at = symtab.checked_add(24 * i)?;
            let name = number(at, 4)?;
            if name >= strsz {
                return None;
            }
            let start = usize::try_from(strtab.checked_add(name)?).ok()?;
            let name = image.get(start..)?.split(|&b| b == 0).next()?.to_vec();
            symbols.push((name, number(at + 8, 8)?, number(at + 16, 8)?));
        }
        symbols.sort();
        Some(Self { segments, symbols })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Option<Ours> {
        use std::os::unix::fs::FileExt;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        Ours::find(&maps, |at, buffer| memory.read_exact_at(buffer, at)).unwrap()
    }

    #[test]
    fn another_build_id_is_no_difference_but_a_moved_symbol_is() {
        let Some(ours) = ours() else { return };
        let elf = Elf::parse(&ours.code).unwrap();
        assert!(elf.symbols.iter().any(|(name, ..)| name == b"__vdso_clock_gettime"), "{elf:?}");
        let mut other = ours.code.clone();
        let note = other.windows(4).position(|w| w == b"GNU\0").unwrap();
        other[note + 4] ^= 0xff;
        ours.check("pid 1", &ours.block, Some(&other)).unwrap();
        let mut moved = ours.clone();
        let value = elf.symbols.iter().find(|(name, ..)| name == b"__vdso_clock_gettime").unwrap().1;
        let at = moved.code.windows(8).position(|w| w == value.to_le_bytes()).unwrap();
        moved.code[at] ^= 0x10;
        assert!(ours.check("pid 1", &ours.block, Some(&moved.code)).is_err());
    }

    #[test]
    fn cut_or_garbled_images_are_no_elf() {
        let Some(ours) = ours() else { return };
        for len in 0..ours.code.len().min(4096) {
            let _ = Elf::parse(&ours.code[..len]);
        }
        assert_eq!(Elf::parse(b"\x7fELF\x02\x01"), None);
    }
}
