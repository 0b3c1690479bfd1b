//! What is to be restored, read from the images and checked before any process is made.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use ckpt_images::ImageSet;
use ckpt_kinds::{
    mem::restore::AddressSpace,
    task::{self, seccomp},
};
use ckpt_proto::{
    Image,
    types::{
        CoreEntry, FdinfoEntry, FsEntry, InventoryEntry, PstreeEntry, TaskKobjIdsEntry, core_entry::March,
    },
};
use ckpt_remote::build::Shares;
use ckpt_sys::{Pid, Refused, Tid};

/// Newest version of this project's additions that this release knows.
const FORMAT: u32 = 1;
/// The kernel's limit of pid_max.
const MAX_PID: i32 = 1 << 22;

/// A thread and its state.
#[derive(Debug)]
pub struct Thread {
    /// Its id.
    pub tid: Tid,
    /// Its image.
    pub core: CoreEntry,
}

/// What a living process has besides threads.
#[derive(Debug)]
pub struct Body {
    /// Its memory.
    pub space: AddressSpace,
    /// cwd, root, umask.
    pub fs: FsEntry,
    /// Its descriptors; none if it has them by its parent's table.
    pub fds: Vec<FdinfoEntry>,
    /// What it has in common with its parent.
    pub shares: Shares,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    /// Its pid.
    pub pid: Pid,
    /// Its parent's; 0 for the root.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The leader first.
    pub threads: Vec<Thread>,
    /// `None` for a zombie.
    pub body: Option<Body>,
    /// Command name, for messages.
    pub comm: String,
}

impl Process {
    /// The leader's image, which holds what belongs to the process.
    pub fn core(&self) -> &CoreEntry {
        &self.threads[0].core
    }

    /// For messages.
    pub fn name(&self) -> String {
        format!("pid {} ({})", self.pid, self.comm)
    }
}

/// All processes, parents before children.
#[derive(Debug)]
pub struct Tree {
    /// The root first.
    pub processes: Vec<Process>,
    /// What their threads are confined by.
    pub filters: seccomp::Table,
}

fn number(n: u32, what: &str) -> anyhow::Result<i32> {
    let n = i32::try_from(n).ok().filter(|&n| n < MAX_PID);
    n.with_context(|| format!("pstree.img: {what} out of range"))
}

impl Tree {
    /// Reads everything but pages and files.
    ///
    /// # Errors
    /// Malformed images; what can't be restored is [`Refused`].
    pub fn read(set: &ImageSet) -> anyhow::Result<Self> {
        let inventory = check_origin(set)?;
        let entries: Vec<PstreeEntry> = set.all(Image::Pstree, 0)?;
        ensure!(!entries.is_empty(), "pstree.img lists no process");
        let mut tids = BTreeSet::new();
        let mut found = BTreeMap::new();
        let mut order = Vec::new();
        for entry in &entries {
            let process = read_process(set, entry, &inventory)?;
            for thread in &process.threads {
                ensure!(tids.insert(thread.tid), "pstree.img: tid {} is listed twice", thread.tid);
            }
            order.push(process.pid);
            found.insert(process.pid, process);
        }
        share(set, &mut found)?;
        // Parents first, else as listed.
        let mut processes = Vec::new();
        let mut placed = BTreeSet::new();
        while !order.is_empty() {
            let before = order.len();
            order.retain(|pid| {
                let parent = found.get(pid).map_or(0, |p| p.ppid);
                let ready = placed.contains(&parent)
                    || !found.contains_key(&Pid(parent)) && !placed.contains(&parent);
                if ready && let Some(process) = found.remove(pid) {
                    placed.insert(pid.0);
                    processes.push(process);
                }
                !ready
            });
            ensure!(order.len() < before, "pstree.img: processes are each other's ancestors");
        }
        let filters = seccomp::Table::read(set)?;
        for process in &processes {
            for thread in &process.threads {
                filters.of(&thread.core).with_context(|| process.name())?;
            }
        }
        Ok(Self { processes, filters })
    }

    /// The root.
    pub fn root(&self) -> &Process {
        &self.processes[0]
    }

    /// What `child` will have in common with `forker`, which makes it.
    ///
    /// # Errors
    /// [`Refused`] if it shares something with its parent, and that is another.
    pub fn shares(&self, child: i32, forker: i32) -> anyhow::Result<Shares> {
        let process = self.processes.iter().find(|p| p.pid.0 == child);
        let shares = process.and_then(|p| Some((p, p.body.as_ref()?.shares)));
        match shares {
            Some((process, shares)) if shares != Shares::default() && process.ppid != forker => {
                let why = format!(
                    "it shares descriptors or directories with its parent {}, and is in a session that this was never in",
                    process.ppid
                );
                Err(Refused::new(process.name(), why).into())
            }
            shares => Ok(shares.map(|(_, shares)| shares).unwrap_or_default()),
        }
    }

    /// Every pid and tid that will be in use, those of groups and sessions included.
    pub fn numbers(&self) -> BTreeSet<i32> {
        self.processes.iter().flat_map(|p| p.threads.iter().map(|t| t.tid.0).chain([p.pgid, p.sid])).collect()
    }
}

/// Is this a checkpoint that this machine and release can restore?
fn check_origin(set: &ImageSet) -> anyhow::Result<InventoryEntry> {
    if let Some(hello) = set.hello() {
        if let [lacks, ..] = &hello.lacks[..] {
            return Err(Refused::new("stream", format!("it still lacks what ckpt-{lacks} adds"))
                .advise(format!("put ckpt-{lacks} into the pipeline"))
                .into());
        }
        if hello.page_size != 4096 || hello.arch != March::X8664 as u32 {
            return Err(Refused::new("stream", "made on another architecture").into());
        }
    }
    let inventory: InventoryEntry = set.one(Image::Inventory, 0)?;
    if !(1..=2).contains(&inventory.img_version) {
        let why = format!("image version {}, this release knows version 2", inventory.img_version);
        return Err(Refused::new("inventory.img", why).into());
    }
    if let Some(format) = inventory.ckpt_format.filter(|&format| format > FORMAT) {
        let why = format!("format {format} of a later release, this one knows format {FORMAT}");
        return Err(Refused::new("inventory.img", why).into());
    }
    Ok(inventory)
}

fn read_process(set: &ImageSet, entry: &PstreeEntry, inventory: &InventoryEntry) -> anyhow::Result<Process> {
    let pid = number(entry.pid, "a pid")?;
    ensure!(pid > 0, "pstree.img: pid 0");
    ensure!(entry.threads.first() == Some(&entry.pid), "pstree.img: pid {pid} is not its own first thread");
    let mut threads = Vec::new();
    for &tid in &entry.threads {
        let file = Image::Core.file_name(tid.into());
        let core: CoreEntry = set.one(Image::Core, tid.into())?;
        if core.mtype != March::X8664 as i32 {
            return Err(Refused::new(file, "made on another architecture").into());
        }
        threads.push(Thread { tid: Tid(number(tid, "a tid")?), core });
    }
    let leader = threads.first().context("pstree.img: no threads")?;
    let tc = leader.core.tc.as_ref();
    let tc = tc.with_context(|| format!("{}: no task entry", Image::Core.file_name(entry.pid.into())))?;
    let dead = match tc.task_state {
        1 | 3 => false,
        2 => true,
        state => anyhow::bail!("{}: task state {state}", Image::Core.file_name(entry.pid.into())),
    };
    let comm = String::from_utf8_lossy(&tc.comm).into_owned();
    let body = if dead {
        ensure!(threads.len() == 1, "pid {pid} is dead and has threads");
        None
    } else {
        for thread in &threads {
            task::restore::check(&thread.core)
                .with_context(|| format!("pid {pid} ({comm}) tid {}", thread.tid))?;
        }
        let ids = ids(set, entry.pid, &leader.core)?;
        check_namespaces(pid, &ids, inventory)?;
        let space = AddressSpace::read(set, Pid(pid))?;
        let fs = set.one(Image::Fs, entry.pid.into())?;
        let fds = set.all(Image::Fdinfo, ids.files_id.into())?;
        Some(Body { space, fs, fds, shares: Shares::default() })
    };
    let (ppid, pgid, sid) =
        (number(entry.ppid, "a ppid")?, number(entry.pgid, "a pgid")?, number(entry.sid, "a sid")?);
    Ok(Process { pid: Pid(pid), ppid, pgid, sid, threads, body, comm })
}

fn ids(set: &ImageSet, pid: u32, core: &CoreEntry) -> anyhow::Result<TaskKobjIdsEntry> {
    match core.ids {
        Some(ids) => Ok(ids),
        None => Ok(set.one(Image::Ids, pid.into())?),
    }
}

/// All tasks live in the namespaces of the tree's creator; anything else is not restored yet.
fn check_namespaces(pid: i32, ids: &TaskKobjIdsEntry, inventory: &InventoryEntry) -> anyhow::Result<()> {
    let Some(root) = &inventory.root_ids else { return Ok(()) };
    for (name, theirs, outer) in [
        ("pid", ids.pid_ns_id, root.pid_ns_id),
        ("net", ids.net_ns_id, root.net_ns_id),
        ("ipc", ids.ipc_ns_id, root.ipc_ns_id),
        ("uts", ids.uts_ns_id, root.uts_ns_id),
        ("mount", ids.mnt_ns_id, root.mnt_ns_id),
        ("user", ids.user_ns_id, root.user_ns_id),
    ] {
        if theirs.is_some() && outer.is_some() && theirs != outer {
            let why = format!("it is in a {name} namespace of its own, which can't be restored");
            return Err(Refused::new(format!("pid {pid}"), why).into());
        }
    }
    Ok(())
}

/// Finds out what processes share with their parents. What a process shares with others, but not with its parent, it can't
/// be given (CLONE_* without CLONE_THREAD), nor memory and signal handlers.
fn share(set: &ImageSet, found: &mut BTreeMap<Pid, Process>) -> anyhow::Result<()> {
    let mut all = BTreeMap::new();
    for process in found.values().filter(|p| p.body.is_some()) {
        all.insert(process.pid.0, ids(set, process.pid.0.unsigned_abs(), process.core())?);
    }
    let mut owners = BTreeMap::new();
    for process in found.values_mut() {
        let name = process.name();
        let (Some(own), Some(body)) = (all.get(&process.pid.0), &mut process.body) else { continue };
        let parent = all.get(&process.ppid);
        let with_parent = |id: fn(&TaskKobjIdsEntry) -> u32| parent.is_some_and(|p| id(p) == id(own));
        body.shares = Shares { files: with_parent(|ids| ids.files_id), fs: with_parent(|ids| ids.fs_id) };
        if body.shares.files {
            body.fds.clear();
        }
        for (what, id, has) in [
            ("memory", own.vm_id, false),
            ("descriptor table", own.files_id, body.shares.files),
            ("working directory", own.fs_id, body.shares.fs),
            ("signal handlers", own.sighand_id, false),
        ] {
            if has {
                continue;
            }
            if let Some(other) = owners.insert((what, id), process.pid) {
                let why = format!("it shares its {what} with process {other}, which can't be restored");
                return Err(Refused::new(name, why).into());
            }
        }
    }
    Ok(())
}
