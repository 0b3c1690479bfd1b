//! In which order processes have to be made so that parents, sessions and process groups come out
//! as recorded.
//!
//! The kernel gives no call to set them freely. A child gets the session and group of the task that
//! forks it; setsid(2) makes the caller leader of a new session; setpgid(2) moves a task within its
//! session. So a task must be forked by its parent at a time when the parent was in the right
//! session, that is, before or after the parent's own setsid. Three things remain that need a
//! *helper*, a task that is made only to end again:
//!
//! - a task whose real parent died and which a subreaper has adopted: its session may be one that the
//!   adopter never belonged to. A helper forked from that session's leader forks the task and ends.
//! - a session whose leader is gone: a helper with the leader's pid calls setsid.
//! - a group whose leader is gone: a helper with the leader's pid calls setpgid.
//!
//! A session or group that lies outside the tree is the one that `ckpt-restore` itself is in.
//!
//! This module only plans; it touches no process, and its tests run the plan on a model of the rules.

use std::collections::{BTreeMap, BTreeSet};

use ckpt_sys::Refused;

/// One process as recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Its pid.
    pub pid: i32,
    /// Its parent in the tree; 0 for the root.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub sid: i32,
    /// Whether it adopts orphaned descendants.
    pub subreaper: bool,
}

/// One step of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `parent` (0: ckpt-restore itself) forks `child`.
    Fork {
        /// Who forks.
        parent: i32,
        /// The new task's pid.
        child: i32,
    },
    /// The task adopts orphans from here on.
    Subreaper(i32),
    /// The task calls setsid.
    Setsid(i32),
    /// The task joins, or with its own pid makes, a process group.
    Join {
        /// Who.
        pid: i32,
        /// Which.
        pgid: i32,
    },
    /// A helper ends and is waited for by `parent`, the task that forked it.
    End {
        /// Which helper.
        helper: i32,
        /// Who forked it.
        parent: i32,
    },
}

/// Deepest tree that is followed.
const MAX_DEPTH: usize = 4096;

struct Planner<'a> {
    nodes: &'a BTreeMap<i32, Node>,
    children: BTreeMap<i32, Vec<i32>>,
    /// Session in which a task has to be born; absent: any.
    born: BTreeMap<i32, i32>,
    /// Tasks to be made by a helper of session leader K.
    adopted: BTreeMap<i32, Vec<i32>>,
    /// Tasks to be made before their parent's setsid.
    early: BTreeSet<i32>,
    /// Tasks made by a helper that stands for a dead session leader, by parent and session.
    orphaned: BTreeMap<(i32, i32), Vec<i32>>,
    spare: &'a mut dyn FnMut() -> i32,
    steps: Vec<Step>,
    /// Helpers that are needed until the groups are made, with their parents.
    helpers: Vec<(i32, i32)>,
}

fn refuse(pid: i32, why: String) -> anyhow::Error {
    Refused::new(format!("pid {pid}"), why).into()
}

/// Plans the making of `nodes`. `spare` gives pids for helpers that stand for nobody.
///
/// # Errors
/// The nodes form no tree; [`Refused`] for relations that can't be made.
pub fn plan(nodes: &BTreeMap<i32, Node>, spare: &mut dyn FnMut() -> i32) -> anyhow::Result<Vec<Step>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let mut roots = Vec::new();
    for node in nodes.values() {
        if nodes.contains_key(&node.ppid) {
            children.entry(node.ppid).or_default().push(node.pid);
        } else {
            roots.push(node.pid);
        }
    }
    let &[root] = &roots[..] else {
        anyhow::bail!("pstree.img: {} processes have no parent in the tree, one should", roots.len());
    };
    let order = top_down(root, &children)?;
    anyhow::ensure!(order.len() == nodes.len(), "pstree.img: processes are each other's ancestors");
    let mut planner = Planner {
        nodes,
        children,
        born: BTreeMap::new(),
        adopted: BTreeMap::new(),
        early: BTreeSet::new(),
        orphaned: BTreeMap::new(),
        spare,
        steps: Vec::new(),
        helpers: Vec::new(),
    };
    for &pid in order.iter().rev() {
        planner.constrain(pid, root)?;
    }
    planner.steps.push(Step::Fork { parent: 0, child: root });
    planner.make(root)?;
    planner.groups(root)?;
    for (helper, parent) in std::mem::take(&mut planner.helpers).into_iter().rev() {
        planner.steps.push(Step::End { helper, parent });
    }
    Ok(planner.steps)
}

fn top_down(root: i32, children: &BTreeMap<i32, Vec<i32>>) -> anyhow::Result<Vec<i32>> {
    let mut order = Vec::new();
    let mut todo = vec![(root, 0)];
    while let Some((pid, depth)) = todo.pop() {
        anyhow::ensure!(depth < MAX_DEPTH, "pstree.img: more than {MAX_DEPTH} generations");
        order.push(pid);
        todo.extend(children.get(&pid).into_iter().flatten().map(|&child| (child, depth + 1)));
    }
    Ok(order)
}

impl Planner<'_> {
    fn node(&self, pid: i32) -> Node {
        self.nodes[&pid]
    }

    fn leads_session(&self, sid: i32) -> bool {
        self.nodes.get(&sid).is_some_and(|leader| leader.sid == sid)
    }

    fn descends(&self, mut pid: i32, ancestor: i32) -> bool {
        while let Some(node) = self.nodes.get(&pid) {
            if node.ppid == ancestor {
                return true;
            }
            pid = node.ppid;
        }
        false
    }

    /// Finds out how the children of `pid` are made, and in which session `pid` has to be born.
    fn constrain(&mut self, pid: i32, root: i32) -> anyhow::Result<()> {
        let node = self.node(pid);
        let leader = node.sid == pid;
        if leader && node.pgid != pid {
            return Err(refuse(pid, format!("leads session {pid} from process group {}", node.pgid)));
        }
        let mut born = (!leader).then_some(node.sid);
        for child in self.children.get(&pid).cloned().unwrap_or_default() {
            let Some(&session) = self.born.get(&child) else { continue };
            if session == node.sid {
                continue;
            }
            let alive = self.leads_session(session);
            if node.subreaper && alive && self.descends(session, pid) && !self.descends(session, child) {
                self.adopted.entry(session).or_default().push(child);
            } else if node.subreaper && !alive && !self.outside(session, root) {
                self.orphaned.entry((pid, session)).or_default().push(child);
            } else if leader && born.is_none_or(|b| b == session) && session != child {
                born = Some(session);
                self.early.insert(child);
            } else {
                let why = format!(
                    "is in session {session}, its parent {pid} in session {}, and nothing tells how it got there",
                    node.sid
                );
                return Err(refuse(child, why));
            }
        }
        if let Some(session) = born {
            self.born.insert(pid, session);
        }
        Ok(())
    }

    /// Whether `session` is the one that the root was in, with a leader outside the tree.
    fn outside(&self, session: i32, root: i32) -> bool {
        self.node(root).sid == session && !self.nodes.contains_key(&session)
    }

    fn fork(&mut self, parent: i32, child: i32) -> anyhow::Result<()> {
        self.steps.push(Step::Fork { parent, child });
        self.make(child)
    }

    /// Everything that grows from `pid`, which has just been forked.
    fn make(&mut self, pid: i32) -> anyhow::Result<()> {
        let node = self.node(pid);
        if node.subreaper {
            self.steps.push(Step::Subreaper(pid));
        }
        let children = self.children.get(&pid).cloned().unwrap_or_default();
        for &child in children.iter().filter(|&c| self.early.contains(c)).collect::<Vec<_>>() {
            self.fork(pid, child)?;
        }
        if node.sid == pid {
            self.steps.push(Step::Setsid(pid));
        }
        let elsewhere: BTreeSet<i32> =
            self.adopted.values().chain(self.orphaned.values()).flatten().copied().collect();
        for &child in &children {
            if !self.early.contains(&child) && !elsewhere.contains(&child) {
                self.fork(pid, child)?;
            }
        }
        if let Some(tasks) = self.adopted.get(&pid).cloned() {
            let helper = (self.spare)();
            self.steps.push(Step::Fork { parent: pid, child: helper });
            for task in tasks {
                self.fork(helper, task)?;
            }
            self.steps.push(Step::End { helper, parent: pid });
        }
        let sessions: Vec<i32> =
            self.orphaned.keys().filter(|(parent, _)| *parent == pid).map(|&(_, session)| session).collect();
        for session in sessions {
            if self.helpers.iter().any(|&(helper, _)| helper == session) {
                return Err(refuse(session, "its session has members in two families, and no leader".into()));
            }
            self.steps.push(Step::Fork { parent: pid, child: session });
            self.steps.push(Step::Setsid(session));
            self.helpers.push((session, pid));
            for task in self.orphaned.get(&(pid, session)).cloned().unwrap_or_default() {
                self.fork(session, task)?;
            }
        }
        Ok(())
    }

    fn groups(&mut self, root: i32) -> anyhow::Result<()> {
        let mut groups: BTreeMap<(i32, i32), Vec<i32>> = BTreeMap::new();
        for node in self.nodes.values().filter(|node| node.sid != node.pid) {
            groups.entry((node.sid, node.pgid)).or_default().push(node.pid);
        }
        let helps = |planner: &Self, pid| planner.helpers.iter().any(|&(helper, _)| helper == pid);
        // Of the groups that lie outside, one can be ours: the root's.
        let mut ours = (!self.leads_session(self.node(root).sid)).then(|| self.node(root).pgid);
        for ((sid, pgid), mut members) in groups {
            let known = self.nodes.contains_key(&pgid) || helps(self, pgid);
            let outer = !self.leads_session(sid) && !helps(self, sid);
            if !known && outer && *ours.get_or_insert(pgid) == pgid {
                continue;
            }
            if pgid == sid && (self.leads_session(sid) || helps(self, sid)) {
                // The leader's own group, which exists.
            } else if let Some(leader) = self.nodes.get(&pgid) {
                if leader.pgid != pgid || leader.sid != sid {
                    return Err(refuse(pgid, format!("is in group {}, and leads group {pgid}", leader.pgid)));
                }
                members.retain(|&pid| pid != pgid);
                self.steps.push(Step::Join { pid: pgid, pgid });
            } else {
                let Some(&member) = members.first() else { continue };
                self.steps.push(Step::Fork { parent: member, child: pgid });
                self.steps.push(Step::Join { pid: pgid, pgid });
                self.helpers.push((pgid, member));
            }
            self.steps.extend(members.into_iter().map(|pid| Step::Join { pid, pgid }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Task {
        ppid: i32,
        sid: i32,
        pgid: i32,
        subreaper: bool,
    }

    /// The kernel's rules, run over the plan; session and group 1 are ckpt-restore's.
    fn run(steps: &[Step]) -> BTreeMap<i32, Task> {
        let mut tasks = BTreeMap::from([(0, Task { ppid: -1, sid: 1, pgid: 1, subreaper: true })]);
        for &step in steps {
            match step {
                Step::Fork { parent, child } => {
                    let from = tasks[&parent];
                    assert!(!tasks.contains_key(&child), "{child} twice");
                    tasks.insert(child, Task { ppid: parent, subreaper: false, ..from });
                }
                Step::Subreaper(pid) => tasks.get_mut(&pid).unwrap().subreaper = true,
                Step::Setsid(pid) => {
                    assert!(tasks.values().all(|t| t.pgid != pid), "setsid of a group leader");
                    let task = tasks.get_mut(&pid).unwrap();
                    (task.sid, task.pgid) = (pid, pid);
                }
                Step::Join { pid, pgid } => {
                    let sid = tasks[&pid].sid;
                    assert_ne!(sid, pid, "setpgid of a session leader");
                    assert!(
                        pid == pgid || tasks.values().any(|t| t.pgid == pgid && t.sid == sid),
                        "no group {pgid}"
                    );
                    tasks.get_mut(&pid).unwrap().pgid = pgid;
                }
                Step::End { helper, parent } => {
                    let gone = tasks.remove(&helper).unwrap();
                    assert_eq!(gone.ppid, parent);
                    let mut reaper = parent;
                    while !tasks[&reaper].subreaper {
                        reaper = tasks[&reaper].ppid;
                    }
                    for task in tasks.values_mut().filter(|t| t.ppid == helper) {
                        task.ppid = reaper;
                    }
                }
            }
        }
        tasks.remove(&0);
        tasks
    }

    /// (pid, ppid, pgid, sid, subreaper); groups and sessions that end as 1 are outside.
    fn check(list: &[(i32, i32, i32, i32, bool)], outside: &[i32]) {
        let nodes: BTreeMap<i32, Node> = list
            .iter()
            .map(|&(pid, ppid, pgid, sid, subreaper)| (pid, Node { pid, ppid, pgid, sid, subreaper }))
            .collect();
        let mut next = 900;
        let steps = plan(&nodes, &mut || {
            next += 1;
            next
        })
        .unwrap();
        let got = run(&steps);
        let outer = |n: i32| if outside.contains(&n) { 1 } else { n };
        let expected: BTreeMap<i32, Task> = nodes
            .values()
            .map(|n| {
                let task =
                    Task { ppid: n.ppid, sid: outer(n.sid), pgid: outer(n.pgid), subreaper: n.subreaper };
                (n.pid, task)
            })
            .collect();
        assert_eq!(got, expected, "{steps:?}");
    }

    #[test]
    fn one_task_leads_its_session_or_stays_in_ours() {
        check(&[(10, 0, 10, 10, false)], &[]);
        check(&[(10, 0, 10, 5, false)], &[5]);
        check(&[(10, 0, 4, 5, false)], &[4, 5]);
    }

    #[test]
    fn a_shell_with_two_jobs() {
        check(
            &[
                (10, 0, 10, 10, false),
                (11, 10, 11, 10, false),
                (12, 10, 11, 10, false),
                (13, 10, 13, 10, false),
            ],
            &[],
        );
    }

    #[test]
    fn a_child_from_before_its_parents_setsid() {
        check(&[(10, 0, 10, 10, false), (11, 10, 11, 11, false), (12, 11, 10, 10, false)], &[]);
        check(&[(10, 0, 10, 10, false), (12, 10, 4, 5, false)], &[4, 5]);
    }

    #[test]
    fn a_group_whose_leader_is_gone() {
        check(&[(10, 0, 10, 10, false), (12, 10, 11, 10, false), (13, 10, 11, 10, false)], &[]);
    }

    #[test]
    fn a_daemon_adopted_by_a_subreaper() {
        // Session 20 was led by a task that is gone; 21 is its child.
        check(&[(10, 0, 10, 10, true), (21, 10, 20, 20, false), (22, 21, 22, 20, false)], &[]);
        // Session 20 is led by a living task; 23 lost its parent there.
        check(&[(10, 0, 10, 10, true), (20, 10, 20, 20, false), (23, 10, 20, 20, false)], &[]);
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let node = |pid, ppid, sid| (pid, Node { pid, ppid, pgid: pid, sid, subreaper: false });
        let nodes = BTreeMap::from([node(10, 0, 10), node(11, 10, 10), node(12, 11, 77)]);
        assert!(plan(&nodes, &mut || 900).is_err());
        let nodes = BTreeMap::from([node(10, 11, 10), node(11, 10, 10)]);
        assert!(plan(&nodes, &mut || 900).is_err());
    }
}
