//! Memory of the tasks: in which order it is built, and from what.
//!
//! A task whose children share pages with it is built before the first of them is forked, and they
//! inherit what is the same ([`Inherited`]). All others are built when every task has been made:
//! copying page tables only to drop them would cost more than it saves. Pages come from the files of the image
//! directory, read by the tasks themselves, several at a time, or from a stream, whose order is the order of work: there
//! pages of a parent that is built early have to come before those of its children, as
//! `ckpt-scan --share` and `ckpt-read` write them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
};

use anyhow::{Context, bail, ensure};
use ckpt_images::{ImageSet, sums::damaged};
use ckpt_kinds::{
    fd::OpenFiles,
    mem::restore::{AddressSpace, inherit::Inherited},
};
use ckpt_proto::stream;
use ckpt_remote::{RemoteError, Syscalls, build::Fill};
use ckpt_sys::{Pid, RemoteAddr, TargetFd, memory};
use nix::errno::Errno;
use xxhash_rust::xxh3::Xxh3Default;

use crate::{
    births::Step,
    lazy::Lazy,
    make::{Family, HELP_FROM, bodies},
    region::Region,
    shared::Segment,
    tree::{Process, Tree},
};

/// Bytes copied at a time from one task to another.
const CHUNK: u64 = 1 << 20;

/// How far the memory of the tasks has been built.
pub struct Builder<'a> {
    tree: &'a Tree,
    set: &'a ImageSet,
    files: &'a OpenFiles,
    region: &'a Region,
    bulk: Option<stream::Reader<File>>,
    lazy: Option<Lazy>,
    /// Who is to be built before its children are made.
    early: BTreeSet<i32>,
    /// Whose stored pages are to be compared with those of the task it is forked from.
    alike: BTreeSet<i32>,
    /// Whose memory a task has, if not this process's.
    holds: BTreeMap<i32, i32>,
    mapped: BTreeMap<i32, Inherited>,
    filled: BTreeSet<i32>,
    /// By the number of the pages: whose they are, and how many bytes have come.
    owners: BTreeMap<u64, (i32, u64)>,
    segments: BTreeMap<u64, (&'a Segment, u64)>,
}

impl<'a> Builder<'a> {
    /// Plans it for tasks that will be made by `steps`.
    ///
    /// # Errors
    /// Images can't be read.
    pub fn new(
        tree: &'a Tree,
        set: &'a ImageSet,
        files: &'a OpenFiles,
        region: &'a Region,
        bulk: Option<stream::Reader<File>>,
        lazy: Option<Lazy>,
        steps: &[Step],
    ) -> anyhow::Result<Self> {
        let owners = bodies(tree).filter_map(|(p, body)| Some((body.space.pages.id?, (p.pid.0, 0))));
        let mut builder = Self {
            tree,
            set,
            files,
            region,
            early: BTreeSet::new(),
            alike: BTreeSet::new(),
            holds: BTreeMap::new(),
            mapped: BTreeMap::new(),
            filled: BTreeSet::new(),
            owners: owners.collect(),
            segments: region.shared.iter().map(|s| (s.pages_id(), (s, 0))).collect(),
            bulk,
            lazy,
        };
        builder.plan(steps)?;
        Ok(builder)
    }

    fn plan(&mut self, steps: &[Step]) -> anyhow::Result<()> {
        // The nearest process with memory of its own among those that fork each other.
        let mut sources: BTreeMap<i32, i32> = BTreeMap::new();
        let set = self.comparable();
        for &step in steps {
            let Step::Fork { parent, child } = step else { continue };
            let source = match self.space(parent) {
                Some(_) => Some(parent),
                None => sources.get(&parent).copied(),
            };
            let Some(source) = source else { continue };
            sources.insert(child, source);
            let (Some(space), Some(theirs)) = (self.space(child), self.space(source)) else { continue };
            // Pages are said to be as in the recorded parent, whoever forks the task.
            let process = self.tree.processes.iter().find(|p| p.pid.0 == child);
            let parent = process.map_or(0, |p| p.ppid);
            if self.bulk.is_some() && space.pages.own_bytes() < space.pages.bytes() {
                self.early.insert(parent);
            }
            if Inherited::pays(theirs, space, set)? {
                self.early.insert(source);
                self.alike.insert(child);
            }
        }
        Ok(())
    }

    /// Where stored pages can be compared: not on a stream, and not if that would take longer than what is being saved.
    fn comparable(&self) -> Option<&'a ImageSet> {
        (self.bulk.is_none() && self.lazy.is_none()).then_some(self.set)
    }

    fn process(&self, pid: i32) -> anyhow::Result<&'a Process> {
        self.tree
            .processes
            .iter()
            .find(|p| p.pid.0 == pid)
            .with_context(|| format!("pid {pid} is not listed"))
    }

    fn space(&self, pid: i32) -> Option<&'a AddressSpace> {
        let process = self.tree.processes.iter().find(|p| p.pid.0 == pid)?;
        Some(&process.body.as_ref()?.space)
    }

    /// `parent` is about to fork.
    ///
    /// # Errors
    /// Images, stream, kernel.
    pub fn before_fork(&mut self, family: &mut Family, parent: i32) -> anyhow::Result<()> {
        if self.early.contains(&parent) { self.build(family, parent) } else { Ok(()) }
    }

    /// `parent` has forked `child`.
    pub fn after_fork(&mut self, parent: i32, child: i32) {
        if let Some(&whose) = self.holds.get(&parent) {
            self.holds.insert(child, whose);
        }
    }

    /// Builds the memory of all that have none yet, shared memory too, and brings it to its final state; gives
    /// who brings the pages that come later.
    ///
    /// # Errors
    /// Images, stream, kernel.
    pub fn finish(mut self, family: &mut Family) -> anyhow::Result<Option<Lazy>> {
        let tree = self.tree;
        for (process, _) in bodies(tree) {
            self.map(family, process.pid.0)?;
        }
        if self.bulk.is_some() {
            self.read_stream(family, None)?;
            self.check_stream()?;
        } else {
            for segment in &self.region.shared {
                match &mut self.lazy {
                    Some(lazy) => segment.fill_from(lazy, self.files)?,
                    None => segment.fill_from_set(self.set, self.files)?,
                }
            }
            let mut jobs = Vec::new();
            for (process, body) in bodies(tree) {
                match self.mapped.get(&process.pid.0) {
                    Some(inherited) if self.lazy.is_none() && bytes(inherited) < HELP_FROM => {
                        if self.filled.insert(process.pid.0) {
                            let calls = body.space.read_calls(inherited, self.set);
                            jobs.push((process, calls.with_context(|| process.name())?));
                        }
                    }
                    _ => self.build(family, process.pid.0)?,
                }
            }
            family.read_side_by_side(&jobs)?;
        }
        for segment in &self.region.shared {
            segment.trim(self.files)?;
        }
        for (process, body) in bodies(tree) {
            let calls = body.space.finish_calls();
            family.task(process.pid.0)?.run(&calls).with_context(|| process.name())?;
        }
        if let Some(lazy) = &mut self.lazy {
            lazy.arm(family)?;
        }
        Ok(self.lazy)
    }

    /// Gives a task its private memory, pages included.
    fn build(&mut self, family: &mut Family, pid: i32) -> anyhow::Result<()> {
        self.map(family, pid)?;
        if !self.filled.insert(pid) {
            return Ok(());
        }
        if self.bulk.is_some() {
            return self.read_stream(family, Some(pid));
        }
        let process = self.process(pid)?;
        let (Some(space), Some(inherited)) = (self.space(pid), self.mapped.get(&pid)) else { return Ok(()) };
        if let (Some(lazy), Some(body)) = (&mut self.lazy, &process.body) {
            let alone = !self.early.contains(&pid);
            return lazy.build(process, body, inherited, alone).with_context(|| process.name());
        }
        let calls = space.read_calls(inherited, self.set).with_context(|| process.name())?;
        family.read_pages(process.pid, &calls, bytes(inherited)).with_context(|| process.name())
    }

    /// Gives a task its mappings and what it inherits.
    fn map(&mut self, family: &mut Family, pid: i32) -> anyhow::Result<()> {
        let Some(space) = self.space(pid).filter(|_| !self.mapped.contains_key(&pid)) else { return Ok(()) };
        let process = self.process(pid)?;
        let (region, files) = (self.region, self.files);
        let from = self.holds.get(&pid).and_then(|&whose| self.space(whose));
        let inherited = match from {
            Some(parent) if self.alike.contains(&pid) => {
                let set = self.comparable();
                Inherited::of(parent, space, set).with_context(|| process.name())?
            }
            _ => Inherited::nothing(space),
        };
        let mut calls = match from {
            Some(parent) if !inherited.kept.is_empty() => {
                let mut calls = inherited.clear_calls(space, &region.range());
                calls.extend(inherited.calls(parent, space));
                calls
            }
            from => {
                // The vdso is where the task had it whose memory this is.
                let vdso = match (&region.vdso, from.map(|parent| &parent.vdso)) {
                    (Some(ours), Some(Some(block))) => Some(ours.moved(block.start)),
                    (_, Some(None)) => None,
                    (ours, _) => ours.clone(),
                };
                ensure!(
                    vdso.is_some() || region.vdso.is_none() || space.vdso.is_none(),
                    "{}: it has a vdso and its parent has none",
                    process.name()
                );
                space.clear_calls(vdso.as_ref(), &region.range(), region.stage())
            }
        };
        calls.extend(space.map_calls(&inherited, &|id| files.fd(id).map(|fd| fd.as_raw_fd()))?);
        if let (Some(_), Some(block), None) = (&self.bulk, &space.vdso, from) {
            calls.push(region.shadow_call(block));
        }
        family
            .task(pid)?
            .run(&calls)
            .map_err(|error| space.explain(error))
            .with_context(|| process.name())?;
        if self.bulk.is_some() {
            for run in space.elsewhere(&inherited) {
                copy(Pid(process.ppid), process.pid, run.addr, run.len).with_context(|| process.name())?;
            }
        }
        self.mapped.insert(pid, inherited);
        self.holds.insert(pid, pid);
        Ok(())
    }

    /// Reads pages from the stream, until its end or until those of `until` are complete. Each
    /// frame's bytes are read by the task that they belong to.
    fn read_stream(&mut self, family: &mut Family, until: Option<i32>) -> anyhow::Result<()> {
        loop {
            if let Some(pid) = until
                && self.space(pid).is_none_or(|space| self.came(space) == space.pages.own_bytes())
            {
                return Ok(());
            }
            let Some(reader) = &mut self.bulk else { return Ok(()) };
            let Some(frame) = reader.next_frame()? else { return Ok(()) };
            let stream::Frame::Data { arg, len, sum, .. } = frame else { continue };
            if let Some(&(pid, at)) = self.owners.get(&arg) {
                ensure!(
                    self.holds.contains_key(&pid) || family.task(pid).is_ok(),
                    "pages-{arg}.img: pages of pid {pid} come before those of its parent"
                );
                self.map(family, pid)?;
                self.owners.insert(arg, (pid, at + len));
                self.read_private(family, pid, at, len, sum, arg)?;
            } else if let (Some((segment, at)), Some(reader)) = (self.segments.get_mut(&arg), &mut self.bulk)
            {
                if let Some(input) = reader.bulk_input() {
                    segment.fill_from_stream(input.as_fd(), *at, len, self.files)?;
                }
                if let Some(expected) = sum {
                    segment.check_filled(*at, len, self.files, expected)?;
                }
                *at += len;
                reader.moved(len);
            } else {
                bail!("pages-{arg}.img: no pagemap tells where these pages belong");
            }
        }
    }

    fn came(&self, space: &AddressSpace) -> u64 {
        space.pages.id.and_then(|id| self.owners.get(&id)).map_or(0, |&(_, came)| came)
    }

    fn read_private(
        &mut self,
        family: &mut Family,
        pid: i32,
        at: u64,
        len: u64,
        expected: Option<u64>,
        arg: u64,
    ) -> anyhow::Result<()> {
        let (Some(space), Some(reader)) = (self.space(pid), &mut self.bulk) else { return Ok(()) };
        let fills = space.fills(at, len, self.region.shadow());
        let sum: u64 = fills.iter().map(|fill| fill.len).sum();
        ensure!(sum == len, "pages-{arg}.img: more pages on the stream than the pagemap lists");
        let Some(input) = reader.bulk_input().map(|input| TargetFd(input.as_raw_fd())) else { return Ok(()) };
        let task = family.task(pid)?;
        let mut rest = &fills[..];
        while !rest.is_empty() {
            let started = task.start_reading(input, rest)?;
            task.finish_reading(started).map_err(|error| match error {
                RemoteError::Call { errno: Errno::ENODATA, .. } => reader.ended_in_bulk().into(),
                other => anyhow::Error::from(other),
            })?;
            rest = &rest[started..];
        }
        reader.moved(len);
        family.came(len);
        match expected {
            Some(expected) => check_read(space.pid, &fills, expected, arg),
            None => Ok(()),
        }
    }

    /// Has everything come?
    fn check_stream(&self) -> anyhow::Result<()> {
        for (id, &(pid, at)) in &self.owners {
            let want = self.space(pid).map_or(0, |space| space.pages.own_bytes());
            ensure!(at == want, "pages-{id}.img: {at} bytes came, the pagemap lists more");
        }
        for (id, (segment, at)) in &self.segments {
            ensure!(*at == segment.pages.bytes(), "pages-{id}.img: {at} bytes came, the pagemap lists more");
        }
        for (process, body) in bodies(self.tree) {
            let (Some(block), Some(ours)) = (&body.space.vdso, &self.region.vdso) else { continue };
            let stored = body.space.pages.runs.iter().any(|run| run.vdso);
            let mut code = vec![0; usize::try_from(block.end - block.code).context("size of the vdso")?];
            memory::read_exact(process.pid, self.region.shadow(), &mut code)?;
            ours.check(&process.name(), block, stored.then_some(&code))?;
        }
        Ok(())
    }
}

/// What a task has to read.
fn bytes(inherited: &Inherited) -> u64 {
    inherited.missing.iter().map(|run| run.len).sum()
}

/// Copies memory from one task to another, to the same addresses. Not by process_vm_readv(2), which
/// would take pages that are shared from those who share them.
fn copy(from: Pid, to: Pid, addr: u64, len: u64) -> anyhow::Result<()> {
    let path = format!("/proc/{from}/mem");
    let from = File::open(&path).with_context(|| path.clone())?;
    let mut buffer = vec![0; usize::try_from(len.min(CHUNK)).unwrap_or(0)];
    let mut done = 0;
    while done < len {
        let n = usize::try_from((len - done).min(CHUNK)).unwrap_or(0);
        from.read_exact_at(&mut buffer[..n], addr + done).with_context(|| path.clone())?;
        memory::write_all(to, RemoteAddr(addr + done), &buffer[..n])?;
        done += n as u64;
    }
    Ok(())
}

/// Pages on a stream go straight into the task, so their checksum is taken from its memory.
fn check_read(pid: Pid, fills: &[Fill], expected: u64, pages_id: u64) -> anyhow::Result<()> {
    let mut hash = Xxh3Default::new();
    let mut buffer = vec![0; 1 << 18];
    // By way of /proc/PID/mem, which asks for no permission of the mapping: some have none.
    let path = format!("/proc/{pid}/mem");
    let memory = File::open(&path).with_context(|| path.clone())?;
    for fill in fills {
        let mut done = 0;
        while done < fill.len {
            let n = usize::try_from(fill.len - done).unwrap_or(usize::MAX).min(buffer.len());
            memory.read_exact_at(&mut buffer[..n], fill.addr.0 + done).with_context(|| path.clone())?;
            hash.update(&buffer[..n]);
            done += n as u64;
        }
    }
    ensure!(hash.digest() == expected, damaged(pages_id));
    Ok(())
}
