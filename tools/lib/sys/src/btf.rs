//! Where fields are in the structures of the running kernel (BTF, Documentation/bpf/btf.rst): `/sys/kernel/btf/vmlinux`,
//! and `/sys/kernel/btf/MODULE` for what is in a module, whose numbers and strings each go on behind those of the former.
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
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
/// Deeper than any structure is nested.
const DEPTH: u32 = 16;

/// The structures of the kernel, and of modules.
#[derive(Debug)]
pub struct Btf {
    kernel: Part,
    modules: Vec<Part>,
}

/// What one file tells.
#[derive(Debug, Default)]
struct Part {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins.
    starts: Vec<usize>,
    /// Structures by name: indices in `starts`.
    structs: HashMap<Vec<u8>, usize>,
}

/// A type: whose it is, and where it begins there.
#[derive(Clone, Copy)]
struct Type<'b> {
    part: &'b Part,
    at: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

impl Type<'_> {
    fn word(self, offset: usize) -> Option<u32> {
        word(&self.part.types, self.at + offset)
    }

    fn kind(self) -> Option<u32> {
        Some(self.word(4)? >> 24 & 0x1f)
    }
}

impl Part {
    fn read(path: &Path, kernel: Option<&Self>) -> Result<Self, SysError> {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|e| {
            SysError::new("read", name.clone(), Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        })?;
        Self::decode(&bytes, kernel).ok_or_else(|| SysError::new("decode", name, Errno::EBADMSG))
    }

    /// `kernel`: what the numbers of a module go on behind.
    fn decode(bytes: &[u8], kernel: Option<&Self>) -> Option<Self> {
        const MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
        if bytes.get(..2)? != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| -> Option<Vec<u8>> {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            Some(bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)?.to_vec())
        };
        let mut part = Self { types: section(8)?, strings: section(16)?, ..Self::default() };
        let mut at = 0;
        while at < part.types.len() {
            let ty = Type { part: &part, at };
            let (kind, count) = (ty.kind()?, (ty.word(4)? & 0xffff) as usize);
            let name = if kind == STRUCT || kind == UNION {
                Some(part.string(ty.word(0)?, kernel)?.to_vec())
            } else {
                None
            };
            if let Some(name) = name {
                part.structs.entry(name).or_insert(part.starts.len());
            }
            part.starts.push(at);
            at += 12
                + match kind {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                    ENUM | FUNC_PROTO => 8 * count,
                    _ => 0,
                };
        }
        Some(part)
    }

    fn string<'b>(&'b self, at: u32, kernel: Option<&'b Self>) -> Option<&'b [u8]> {
        let (strings, at) = match (kernel, at as usize) {
            (Some(kernel), at) if at < kernel.strings.len() => (&kernel.strings, at),
            (Some(kernel), at) => (&self.strings, at - kernel.strings.len()),
            (None, at) => (&self.strings, at),
        };
        let rest = strings.get(at..)?;
        rest.get(..rest.iter().position(|&b| b == 0)?)
    }
}

impl Btf {
    /// Those of the running kernel, and of those of `modules` that are modules in it: else they are there already.
    ///
    /// # Errors
    /// ENOENT: the kernel was built without (`CONFIG_DEBUG_INFO_BTF`). EBADMSG: they are not as expected.
    pub fn read(modules: &[&str]) -> Result<Self, SysError> {
        let directory = Path::new("/sys/kernel/btf");
        let kernel = Part::read(&directory.join("vmlinux"), None)?;
        let paths = modules.iter().map(|name| directory.join(name)).filter(|path| path.exists());
        let modules = paths.map(|path| Part::read(&path, Some(&kernel))).collect::<Result<_, _>>()?;
        Ok(Self { kernel, modules })
    }

    fn string<'b>(&'b self, part: &'b Part, at: u32) -> Option<&'b [u8]> {
        part.string(at, Some(&self.kernel).filter(|kernel| !std::ptr::eq(*kernel, part)))
    }

    /// The structure of this name.
    fn structure(&self, name: &str) -> Option<Type<'_>> {
        let mut parts = [&self.kernel].into_iter().chain(&self.modules);
        parts.find_map(|part| Some(Type { part, at: *part.starts.get(*part.structs.get(name.as_bytes())?)? }))
    }

    /// The type of this number, as `part` counts, behind typedefs and qualifiers.
    fn resolve<'b>(&'b self, part: &'b Part, mut number: u32) -> Option<Type<'b>> {
        for _ in 0..DEPTH {
            // The first has number 1.
            let index = (number as usize).checked_sub(1)?;
            let (part, index) = match index.checked_sub(self.kernel.starts.len()) {
                Some(index) => (part, index),
                None => (&self.kernel, index),
            };
            let found = Type { part, at: *part.starts.get(index)? };
            match found.kind()? {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => number = found.word(8)?,
                _ => return Some(found),
            }
        }
        None
    }

    /// A field's place in bytes and its type; those of nameless parts belong to the whole.
    fn field<'b>(&'b self, of: Type<'b>, name: &[u8], depth: u32) -> Option<(usize, Type<'b>)> {
        let info = of.word(4)?;
        for member in (0..(info & 0xffff) as usize).map(|n| 12 + 12 * n) {
            let (called, number) = (self.string(of.part, of.word(member)?)?, of.word(member + 4)?);
            let bits = of.word(member + 8)?;
            // With the flag set, the upper byte is the width of a bit field.
            let place = (if info >> 31 == 1 { bits & 0xff_ffff } else { bits }) as usize / 8;
            if called == name {
                return Some((place, self.resolve(of.part, number)?));
            }
            if called.is_empty()
                && depth > 0
                && let Some(inner) = self.resolve(of.part, number)
                && [Some(STRUCT), Some(UNION)].contains(&inner.kind())
                && let Some((more, found)) = self.field(inner, name, depth - 1)
            {
                return Some((place + more, found));
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
            let mut whole = self.structure(of)?;
            let mut offset = 0;
            for name in path.split('.') {
                let (place, inner) = self.field(whole, name.as_bytes(), DEPTH)?;
                (offset, whole) = (offset + place, inner);
            }
            Some(offset as u64)
        };
        find().ok_or_else(|| SysError::new("BTF", format!("{of}.{path}"), Errno::ENOENT))
    }

    /// The number of a function of the kernel itself.
    ///
    /// # Errors
    /// ENOENT: there is none.
    pub fn function(&self, name: &str) -> Result<u32, SysError> {
        let part = &self.kernel;
        let called = |&at: &usize| {
            let ty = Type { part, at };
            Some(ty.kind()? == FUNC && self.string(part, ty.word(0)?)? == name.as_bytes())
        };
        let index = part.starts.iter().position(|at| called(at) == Some(true));
        let number = index.and_then(|index| u32::try_from(index + 1).ok());
        number.ok_or_else(|| SysError::new("BTF", name, Errno::ENOENT))
    }

    /// Bytes of a structure.
    ///
    /// # Errors
    /// ENOENT: there is none.
    pub fn size(&self, of: &str) -> Result<u64, SysError> {
        let size = self.structure(of).and_then(|of| of.word(8));
        size.map(u64::from).ok_or_else(|| SysError::new("BTF", of, Errno::ENOENT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with these types, words of 4 bytes, and these strings.
    fn file(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&0xeb9f_u16.to_ne_bytes());
        for (at, value) in [(4, 24), (12, types.len()), (16, types.len()), (20, strings.len())] {
            bytes[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_ne_bytes());
        }
        [&bytes[..], &types, strings].concat()
    }

    fn structure(name: u32, size: u32, fields: &[[u32; 3]]) -> Vec<u32> {
        let count = u32::try_from(fields.len()).unwrap();
        [&[name, STRUCT << 24 | count, size], fields.as_flattened()].concat()
    }

    #[test]
    fn every_module_counts_on_from_the_kernel() {
        // The kernel: 1 is an int, 2 `struct sock { int a; }` with 4 bytes in front.
        let int = [0, INT << 24, 4, 32];
        let types = [&int[..], &structure(1, 8, &[[6, 1, 32]])].concat();
        let kernel = Part::decode(&file(&types, b"\0sock\0a\0"), None).unwrap();
        assert_eq!(kernel.strings.len(), 8);
        // Each module: 3 is the same with a name of its own, 4 a structure with a `struct sock` and a 3.
        let module = |name: &str, place: u32| {
            let inner = structure(0, 4, &[[8 + 6, 1, 8]]);
            let outer = structure(8 + 1, 40, &[[1, 2, 64], [0, 3, place]]);
            let strings = format!("\0{name}\0own\0");
            Part::decode(&file(&[inner, outer].concat(), strings.as_bytes()), Some(&kernel)).unwrap()
        };
        let modules = vec![module("unix", 128), module("pack", 256)];
        let btf = Btf { kernel, modules };
        for (name, place) in [("unix", 16), ("pack", 32)] {
            assert_eq!(btf.offset(name, "own").unwrap(), place + 1);
            assert_eq!(btf.offset(name, "sock.a").unwrap(), 12);
            assert_eq!(btf.size(name).unwrap(), 40);
        }
        assert_eq!(btf.offset("sock", "a").unwrap(), 4);
        assert_eq!(btf.offset("sock", "b").unwrap_err().errno, Errno::ENOENT);
        assert!(Part::decode(b"\x9f\xeb", None).is_none());
    }
}
