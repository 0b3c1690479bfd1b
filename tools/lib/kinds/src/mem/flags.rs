//! Flags of mappings (VmFlags), told without counting pages.
//!
//! The kernel tells the flags in /proc/PID/smaps, and counts every page for that file: as long as a fork takes. A snapshot
//! is to cost a fork, not two, and an increment, which stores few pages, no walk over all of them. So they are asked of an
//! iterator of bpf(2) ([`Vmas`]), which gives bits, and the names of the bits are learned once from mappings of our own:
//! smaps lists the names of a mapping in the order of its bits.
//!
//! Where the iterator can't be had (CAP_BPF, CAP_PERFMON, BTF), or a mapping has a bit that is not known by name,
//! smaps is read.

use std::{collections::BTreeMap, sync::OnceLock};

use anyhow::Context;
use ckpt_proc::maps::{self, Mapping};
use ckpt_sys::{
    Pid, procfs,
    vmas::{Specimens, Vma, Vmas},
};

use super::{dump::ADVICE, guard};

/// Names of bits; none for one that has shown more than one name.
type Names = BTreeMap<u32, Option<[u8; 2]>>;

/// Where flags come from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flags(Option<&'static Iterator>);

#[derive(Debug)]
struct Iterator {
    vmas: Vmas,
    names: Names,
}

impl Flags {
    /// Prepares to ask for flags in a freeze, as quickly as can be: that takes 10 ms, once in a process. By default they
    /// are read from smaps.
    #[must_use]
    pub fn prepare() -> Self {
        static ITERATOR: OnceLock<Option<Iterator>> = OnceLock::new();
        Self(ITERATOR.get_or_init(Iterator::prepare).as_ref())
    }

    /// The mappings of a frozen process with their flags; `now` are the same without.
    ///
    /// # Errors
    /// /proc can't be read.
    pub fn mappings(self, pid: Pid, now: Option<&[Mapping]>) -> anyhow::Result<Vec<Mapping>> {
        let told = self.0.zip(now).and_then(|(iterator, now)| {
            let vmas = iterator.vmas.of(Pid(pid.0)).ok()?;
            now.iter().map(|mapping| describe(mapping, &vmas, &iterator.names)).collect()
        });
        told.map_or_else(|| smaps(pid), Ok)
    }

    /// Whether one of `mappings`, as [`Self::mappings`] gives them, may have guards. Kernels that do not tell (`gu`) have to
    /// be asked page by page.
    #[must_use]
    pub fn may_have_guards(self, mappings: &[Mapping]) -> bool {
        let guard = b"gu";
        let told =
            self.0.is_some_and(|iterator| iterator.names.values().any(|name| name.as_ref() == Some(guard)));
        !told || mappings.iter().any(|mapping| mapping.has(guard))
    }
}

/// Mappings with each kind of advice whose flag counts.
fn specimens() -> Specimens {
    let advice: Vec<i32> =
        ADVICE.iter().map(|(_, advice)| *advice).chain([guard::MADV_GUARD_INSTALL]).collect();
    Specimens::new(&advice)
}

impl Iterator {
    fn prepare() -> Option<Self> {
        let vmas = Vmas::load().ok()?;
        let own = Pid(i32::try_from(std::process::id()).ok()?);
        let _specimens = specimens();
        let names = learn(&vmas.of(own).ok()?, &smaps(own).ok()?);
        Some(Self { vmas, names })
    }
}

/// Learns names from mappings that are known both ways. Some bits have no name; a mapping with one shows fewer names than
/// bits, and teaches nothing.
fn learn(vmas: &[Vma], smaps: &[Mapping]) -> Names {
    let mut names = Names::new();
    for vma in vmas {
        let same = |m: &&Mapping| (m.start, m.end) == (vma.start, vma.end);
        let Some(mapping) = smaps.iter().find(same) else { continue };
        let bits: Vec<u32> = bits(vma.flags).collect();
        if bits.len() != mapping.flags.len() {
            continue;
        }
        for (bit, &name) in bits.into_iter().zip(&mapping.flags) {
            let known = names.entry(bit).or_insert(Some(name));
            if *known != Some(name) {
                *known = None;
            }
        }
    }
    names
}

fn bits(flags: u64) -> impl std::iter::Iterator<Item = u32> {
    (0..u64::BITS).filter(move |bit| flags >> bit & 1 == 1)
}

/// A mapping with its flags; `None` if they can't be told.
fn describe(mapping: &Mapping, vmas: &[Vma], names: &Names) -> Option<Mapping> {
    // Outside of user space, and the same in all processes.
    if mapping.name == b"[vsyscall]" {
        return Some(Mapping { flags: vec![*b"ex"], page_kib: 4, ..mapping.clone() });
    }
    let at = vmas.binary_search_by_key(&mapping.start, |vma| vma.start).ok()?;
    let vma = vmas.get(at).filter(|vma| vma.end == mapping.end)?;
    let flags: Vec<[u8; 2]> = bits(vma.flags).map(|bit| *names.get(&bit)?).collect::<Option<_>>()?;
    // How large the pages are smaps alone tells.
    (!flags.contains(b"ht")).then(|| Mapping { flags, page_kib: 4, ..mapping.clone() })
}

/// The mappings of a process as they are now, with their flags.
///
/// # Errors
/// /proc can't be read.
pub fn smaps(pid: Pid) -> anyhow::Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    let text = procfs::read(&path).with_context(|| path.clone())?;
    maps::parse(&text).context(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, flags: &[&[u8; 2]]) -> Mapping {
        let line = format!("{start:x}-{:x} rw-p 00000000 00:00 0\n", start + 0x1000);
        let plain = maps::parse(line.as_bytes()).unwrap().remove(0);
        Mapping { flags: flags.iter().map(|f| **f).collect(), page_kib: 4, ..plain }
    }

    fn vma(start: u64, flags: u64) -> Vma {
        Vma { start, end: start + 0x1000, flags }
    }

    /// The iterator says what smaps says, of mappings of all kinds.
    #[test]
    fn flags_are_those_of_smaps() {
        let Flags(Some(iterator)) = Flags::prepare() else {
            eprintln!("SKIP: bpf iterators can't be used here");
            return;
        };
        let _specimens = specimens();
        let own = Pid(i32::try_from(std::process::id()).unwrap());
        // Other tests map memory meanwhile.
        let (vmas, all) = (iterator.vmas.of(own).unwrap(), smaps(own).unwrap());
        let mut seen = std::collections::BTreeSet::new();
        for known in &all {
            let plain = Mapping { flags: Vec::new(), page_kib: 0, ..known.clone() };
            let Some(told) = describe(&plain, &vmas, &iterator.names) else { continue };
            assert_eq!(&told, known);
            seen.extend(told.flags);
        }
        for flag in [b"dc", b"dd", b"wf", b"sr", b"rr", b"gd", b"nr", b"sh", b"uw", b"ex"] {
            assert!(seen.contains(flag), "{} is not learned", flag.escape_ascii());
        }
    }

    #[test]
    fn what_is_not_certain_is_not_told() {
        let names = learn(
            &[vma(0x1000, 0b0011), vma(0x2000, 0b0101), vma(0x3000, 0b1001), vma(0x4000, 0b10001)],
            &[
                mapping(0x1000, &[b"rd", b"wr"]),
                mapping(0x2000, &[b"rd", b"ex"]),
                // A bit without a name.
                mapping(0x3000, &[b"rd"]),
                // It was another mapping by then.
                mapping(0x4000, &[b"wr", b"ex"]),
            ],
        );
        let told = |flags| describe(&mapping(0x1000, &[]), &[vma(0x1000, flags)], &names);
        assert_eq!(told(0b0110), Some(mapping(0x1000, &[b"wr", b"ex"])));
        assert_eq!(told(0b1110), None, "no name");
        assert_eq!(told(0b0111), None, "two names");
        assert_eq!(describe(&mapping(0x1000, &[]), &[vma(0x2000, 2)], &names), None, "no such mapping");
    }
}
