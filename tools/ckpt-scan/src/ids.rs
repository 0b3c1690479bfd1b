//! Kernel-object ids: which tasks share an address space, a descriptor table, cwd and root, or
//! signal handlers (kcmp(2)), and the namespaces.
//!
//! Id 1 of each kind stands for the dumping tool itself, as in CRIU's images; the tree's objects
//! follow from 2. Processes that share what the restore can't share again are refused here.

use std::{cmp::Ordering, collections::HashMap};

use ckpt_proto::types::TaskKobjIdsEntry;
use ckpt_remote::Process;
use ckpt_sys::{
    Pid, Refused,
    kcmp::{self, Object},
};

/// Ids of all processes.
#[derive(Debug)]
pub struct Ids(HashMap<Pid, TaskKobjIdsEntry>);

impl Ids {
    /// The dumping tool's own.
    #[must_use]
    pub fn root(&self) -> TaskKobjIdsEntry {
        entry(1)
    }

    /// Those of a process of the tree.
    #[must_use]
    pub fn of(&self, pid: Pid) -> TaskKobjIdsEntry {
        self.0.get(&pid).copied().unwrap_or_else(|| entry(1))
    }
}

fn entry(id: u32) -> TaskKobjIdsEntry {
    TaskKobjIdsEntry {
        vm_id: id,
        files_id: id,
        fs_id: id,
        sighand_id: id,
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(3),
        uts_ns_id: Some(4),
        time_ns_id: Some(5),
        mnt_ns_id: Some(6),
        user_ns_id: Some(7),
        cgroup_ns_id: Some(8),
    }
}

/// What processes may share: what it is called, and whether it can be shared again.
const SHAREABLE: [(Object, &str, bool); 4] = [
    (Object::Vm, "memory (CLONE_VM)", false),
    (Object::Files, "descriptor table (CLONE_FILES)", true),
    (Object::Fs, "cwd and root (CLONE_FS)", true),
    (Object::Sighand, "signal handlers (CLONE_SIGHAND)", false),
];

/// Gives every live process its ids.
///
/// # Errors
/// [`Refused`] if processes share an object that can't be shared again, or threads of one process don't share one.
pub fn assign(processes: &[Process]) -> anyhow::Result<Ids> {
    let live: Vec<&Process> = processes.iter().filter(|p| !p.zombie).collect();
    let mut ids: HashMap<Pid, TaskKobjIdsEntry> =
        live.iter().zip(2..).map(|(process, id)| (process.pid, entry(id))).collect();
    for (object, name, again) in SHAREABLE {
        for sharers in sharers(&live, object)? {
            check_family(&sharers, name, again)?;
            let first = sharers.first().and_then(|process| ids.get(&process.pid)).copied();
            for process in sharers {
                let (Some(first), Some(own)) = (first, ids.get_mut(&process.pid)) else { continue };
                match object {
                    Object::Files => own.files_id = first.files_id,
                    Object::Fs => own.fs_id = first.fs_id,
                    _ => {}
                }
            }
        }
    }
    for process in &live {
        for thread in process.threads.iter().skip(1) {
            for (object, name, _) in [SHAREABLE[1], SHAREABLE[2]] {
                if kcmp::compare(process.pid.leader(), thread.tid, object)? != Ordering::Equal {
                    let subject = format!("{} tid {}", process.subject(), thread.tid);
                    let reason = format!("the thread has a {name} of its own, which can't be restored yet");
                    return Err(Refused::new(subject, reason).into());
                }
            }
        }
    }
    Ok(Ids(ids))
}

/// Those of the processes that share an object, in their order: a list for each that is shared.
fn sharers<'p>(live: &[&'p Process], object: Object) -> anyhow::Result<Vec<Vec<&'p Process>>> {
    // kcmp orders objects, so that sharers stand side by side after sorting, which leaves their order alone.
    let mut sorted = live.to_vec();
    let mut failure = None;
    sorted.sort_by(|a, b| {
        kcmp::compare(a.pid.leader(), b.pid.leader(), object).unwrap_or_else(|e| {
            failure = Some(e);
            Ordering::Equal
        })
    });
    if let Some(error) = failure {
        return Err(error.into());
    }
    let mut groups: Vec<Vec<&Process>> = Vec::new();
    for process in sorted {
        if let Some(group) = groups.last_mut()
            && let Some(last) = group.last()
            && kcmp::compare(last.pid.leader(), process.pid.leader(), object)? == Ordering::Equal
        {
            group.push(process);
        } else {
            groups.push(vec![process]);
        }
    }
    groups.retain(|group| group.len() > 1);
    Ok(groups)
}

/// Whether `sharers`, parents before children, can be made so that they share the object again: only who is forked by one
/// that has it can have it.
fn check_family(sharers: &[&Process], name: &str, again: bool) -> Result<(), Refused> {
    let Some((first, others)) = sharers.split_first() else { return Ok(()) };
    for process in others {
        let with = |other: Pid| format!("shares its {name} with process {other}");
        if !again {
            let reason = format!("{}, which can't be restored yet", with(first.pid));
            return Err(Refused::new(process.subject(), reason));
        }
        let Some(parent) = sharers.iter().find(|p| p.pid == process.parent()) else {
            let reason = format!(
                "{} and not with its parent {}, from which alone it could have it at a restore",
                with(first.pid),
                process.parent()
            );
            return Err(Refused::new(process.subject(), reason));
        };
        // Somebody else forks those that are in a session which their parent can't have been in.
        let (session, theirs) = (process.stat.session, parent.stat.session);
        if session != process.pid.0 && session != theirs && theirs != parent.pid.0 {
            let reason =
                format!("{} and is in session {session}, where its parent was not", with(parent.pid));
            return Err(Refused::new(process.subject(), reason));
        }
    }
    Ok(())
}
