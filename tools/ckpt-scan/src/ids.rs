//! Kernel-object ids: which tasks share an address space, a descriptor table, cwd and root, or
//! signal handlers (kcmp(2)), and the namespaces.
//!
//! Id 1 of each kind stands for the dumping tool itself, as in CRIU's images; the tree's objects
//! follow from 2. Processes that share what the restore can't share yet are refused here.

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

const SHAREABLE: [(Object, &str); 4] = [
    (Object::Vm, "memory (CLONE_VM)"),
    (Object::Files, "descriptor table (CLONE_FILES)"),
    (Object::Fs, "cwd and root (CLONE_FS)"),
    (Object::Sighand, "signal handlers (CLONE_SIGHAND)"),
];

/// Gives every live process its ids.
///
/// # Errors
/// [`Refused`] if processes share an object, or threads of one process don't.
pub fn assign(processes: &[Process]) -> anyhow::Result<Ids> {
    let live: Vec<&Process> = processes.iter().filter(|p| !p.zombie).collect();
    for (object, name) in SHAREABLE {
        // kcmp orders objects, so that sharers stand side by side after sorting.
        let mut sorted = live.clone();
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
        for pair in sorted.windows(2) {
            if kcmp::compare(pair[0].pid.leader(), pair[1].pid.leader(), object)? == Ordering::Equal {
                let subject = pair[1].subject();
                let reason =
                    format!("shares its {name} with process {}, which can't be restored yet", pair[0].pid);
                return Err(Refused::new(subject, reason).into());
            }
        }
    }
    for process in &live {
        for thread in process.threads.iter().skip(1) {
            for (object, name) in [SHAREABLE[1], SHAREABLE[2]] {
                if kcmp::compare(process.pid.leader(), thread.tid, object)? != Ordering::Equal {
                    let subject = format!("{} tid {}", process.subject(), thread.tid);
                    let reason = format!("the thread has a {name} of its own, which can't be restored yet");
                    return Err(Refused::new(subject, reason).into());
                }
            }
        }
    }
    let ids = live.iter().zip(2..).map(|(process, id)| (process.pid, entry(id))).collect();
    Ok(Ids(ids))
}
