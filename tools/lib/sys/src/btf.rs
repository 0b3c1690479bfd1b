//! Where fields are in the structures of the running kernel (BTF, Documentation/bpf/btf.rst): `/sys/kernel/btf/vmlinux`,
//! and `/sys/kernel/btf/MODULE` for what is in a module, whose numbers and strings go on behind those of the former.
//!
//! Only what is asked for is decoded. The kernel is trusted, yet nothing here goes beyond the bytes that are there.

use std::{collections::HashMap, fs, path::Path};

use nix::errno::Errno;

use crate::SysError;

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
/// Deeper than any structure is nested.
const DEPTH: u32 = 16;

/// The structures of the kernel, or of it and one module.
#[derive(Debug)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins; the first has number 1.
    starts: Vec<usize>,
    /// Structures by name.
    structs: HashMap<Vec<u8>, u32>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

impl Btf {
    /// Those of the kernel itself.
    ///
    /// # Errors
    /// ENOENT: the kernel was built without (`CONFIG_DEBUG_INFO_BTF`).
    pub fn vmlinux() -> Result<Self, SysError> {
        let mut btf =
            Self { types: Vec::new(), strings: Vec::new(), starts: Vec::new(), structs: HashMap::new() };
        btf.add(Path::new("/sys/kernel/btf/vmlinux"))?;
        Ok(btf)
    }

    /// Adds those of a module, if it is one: else they are there already. Of one module only.
    ///
    /// # Errors
    /// EBADMSG: they are not as expected.
    pub fn add_module(&mut self, name: &str) -> Result<(), SysError> {
        let path = Path::new("/sys/kernel/btf").join(name);
        if path.exists() { self.add(&path) } else { Ok(()) }
    }

    fn add(&mut self, path: &Path) -> Result<(), SysError> {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|e| {
            SysError::new("read", name.clone(), Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        })?;
        self.decode(&bytes).ok_or_else(|| SysError::new("decode", name, Errno::EBADMSG))
    }

    fn decode(&mut self, bytes: &[u8]) -> Option<()> {
        const MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
        if bytes.get(..2)? != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let part = |at: usize| -> Option<&[u8]> {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (types, strings) = (part(8)?, part(16)?);
        let mut at = self.types.len();
        self.types.extend_from_slice(types);
        self.strings.extend_from_slice(strings);
        while at < self.types.len() {
            self.starts.push(at);
            let info = word(&self.types, at + 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            if kind == STRUCT || kind == UNION {
                let name = self.string(word(&self.types, at)?)?.to_vec();
                let number = u32::try_from(self.starts.len()).ok()?;
                self.structs.entry(name).or_insert(number);
            }
            at += 12
                + match kind {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                    ENUM | FUNC_PROTO => 8 * count,
                    _ => 0,
                };
        }
        Some(())
    }

    fn string(&self, at: u32) -> Option<&[u8]> {
        let rest = self.strings.get(at as usize..)?;
        rest.get(..rest.iter().position(|&b| b == 0)?)
    }

    /// The type itself, behind typedefs and qualifiers: where it begins, and its kind.
    fn resolve(&self, mut number: u32) -> Option<(usize, u32)> {
        for _ in 0..DEPTH {
            let at = *self.starts.get((number as usize).checked_sub(1)?)?;
            let kind = word(&self.types, at + 4)? >> 24 & 0x1f;
            match kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => number = word(&self.types, at + 8)?,
                _ => return Some((at, kind)),
            }
        }
        None
    }

    /// A field's place in bytes and its type; those of nameless parts belong to the whole.
    fn field(&self, at: usize, name: &[u8], depth: u32) -> Option<(usize, u32)> {
        let info = word(&self.types, at + 4)?;
        for member in (0..(info & 0xffff) as usize).map(|n| at + 12 + 12 * n) {
            let (called, number) = (self.string(word(&self.types, member)?)?, word(&self.types, member + 4)?);
            let bits = word(&self.types, member + 8)?;
            // With the flag set, the upper byte is the width of a bit field.
            let place = (if info >> 31 == 1 { bits & 0xff_ffff } else { bits }) as usize / 8;
            if called == name {
                return Some((place, number));
            }
            if called.is_empty()
                && depth > 0
                && let Some((inner, kind)) = self.resolve(number)
                && (kind == STRUCT || kind == UNION)
                && let Some((more, number)) = self.field(inner, name, depth - 1)
            {
                return Some((place + more, number));
            }
        }
        None
    }

    /// Where `path`, names joined by dots, is in structure `of`: bytes from its start.
    ///
    /// # Errors
    /// ENOENT: this kernel has no such field.
    pub fn offset(&self, of: &str, path: &str) -> Result<u64, SysError> {
        let find = || {
            let mut number = *self.structs.get(of.as_bytes())?;
            let mut offset = 0;
            for name in path.split('.') {
                let (at, _) = self.resolve(number)?;
                let (place, next) = self.field(at, name.as_bytes(), DEPTH)?;
                (offset, number) = (offset + place, next);
            }
            Some(offset as u64)
        };
        find().ok_or_else(|| SysError::new("BTF", format!("{of}.{path}"), Errno::ENOENT))
    }

    /// Bytes of a structure.
    ///
    /// # Errors
    /// ENOENT: there is none.
    pub fn size(&self, of: &str) -> Result<u64, SysError> {
        let at = self.structs.get(of.as_bytes()).and_then(|&n| self.resolve(n));
        let size = at.and_then(|(at, _)| word(&self.types, at + 8));
        size.map(u64::from).ok_or_else(|| SysError::new("BTF", of, Errno::ENOENT))
    }
}
