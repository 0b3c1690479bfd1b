//! What a checkpoint holds, in the terms of somebody who looks at it: tasks, what they have open, and who
//! talks to whom.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ckpt_images::{ImageError, ImageSet};
use ckpt_proto::{
    Image,
    types::{
        CoreEntry, FdTypes, FdinfoEntry, FileEntry, PstreeEntry, TaskKobjIdsEntry,
        external_socket::PolicyKind,
    },
};

/// A process.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its pid.
    pub pid: u32,
    /// Its parent's pid, 0 for the root.
    pub ppid: u32,
    /// Process group and session.
    pub pgid: u32,
    /// Session.
    pub sid: u32,
    /// Name, escaped.
    pub comm: String,
    /// `running`, `zombie`, `stopped`.
    pub state: &'static str,
    /// Its threads besides the leader: tid and name.
    pub threads: Vec<(u32, String)>,
    /// Number of stored pages.
    pub pages: u64,
    /// What it has open, by descriptor.
    pub fds: Vec<Fd>,
}

/// A descriptor.
#[derive(Debug, Clone)]
pub struct Fd {
    /// Its number.
    pub fd: u32,
    /// Open file description.
    pub file_id: u32,
    /// Kind and name.
    pub what: String,
}

/// Two ends of something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Pid of one end.
    pub from: u32,
    /// Pid of the other, or the name of what is outside.
    pub to: End,
    /// What connects them.
    pub label: String,
    /// Bytes go from `from` to `to` only.
    pub directed: bool,
}

/// The far end of a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// A task of the checkpoint.
    Task(u32),
    /// Something outside it, or what more than two tasks share.
    Outside(String),
}

/// A checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Tasks, parents before their children.
    pub tasks: Vec<Task>,
    /// Links between them.
    pub links: Vec<Link>,
}

impl Model {
    /// Reads what `set` holds.
    ///
    /// # Errors
    /// Images that contradict the schema.
    pub fn new(set: &ImageSet) -> Result<Self, ImageError> {
        let files: BTreeMap<u32, FileEntry> =
            set.all::<FileEntry>(Image::Files, 0)?.into_iter().map(|file| (file.id, file)).collect();
        let mut tasks = Vec::new();
        for entry in set.all::<PstreeEntry>(Image::Pstree, 0)? {
            tasks.push(task(set, &files, entry)?);
        }
        let links = links(&tasks, &files);
        Ok(Self { tasks, links })
    }

    /// The tasks as a tree: depth and task, each followed by its children. Tasks whose parent is not
    /// there (or that name each other as parents) count as roots.
    #[must_use]
    pub fn tree(&self) -> Vec<(usize, &Task)> {
        let mut rows = Vec::new();
        let mut placed = BTreeSet::new();
        let known: BTreeSet<u32> = self.tasks.iter().map(|task| task.pid).collect();
        let mut todo: Vec<(usize, &Task)> = self
            .tasks
            .iter()
            .filter(|task| !known.contains(&task.ppid) || task.ppid == task.pid)
            .map(|t| (0, t))
            .collect();
        todo.reverse();
        loop {
            while let Some((depth, task)) = todo.pop() {
                if !placed.insert(task.pid) {
                    continue;
                }
                rows.push((depth, task));
                let children =
                    self.tasks.iter().filter(|child| child.ppid == task.pid && child.pid != task.pid);
                todo.extend(children.rev().map(|child| (depth + 1, child)));
            }
            match self.tasks.iter().find(|task| !placed.contains(&task.pid)) {
                Some(task) => todo.push((0, task)),
                None => return rows,
            }
        }
    }
}

fn task(set: &ImageSet, files: &BTreeMap<u32, FileEntry>, entry: PstreeEntry) -> Result<Task, ImageError> {
    let core: Option<CoreEntry> = set.all(Image::Core, u64::from(entry.pid))?.into_iter().next();
    let tc = core.as_ref().and_then(|core| core.tc.as_ref());
    let ids: Option<TaskKobjIdsEntry> = match core.as_ref().and_then(|core| core.ids) {
        Some(ids) => Some(ids),
        None => set.all(Image::Ids, u64::from(entry.pid))?.into_iter().next(),
    };
    let mut fds = Vec::new();
    if let Some(ids) = ids {
        for fd in set.all::<FdinfoEntry>(Image::Fdinfo, u64::from(ids.files_id))? {
            let what = files.get(&fd.id).map_or_else(|| format!("file {} (missing)", fd.id), describe);
            fds.push(Fd { fd: fd.fd, file_id: fd.id, what });
        }
    }
    fds.sort_by_key(|fd| fd.fd);
    let mut threads = Vec::new();
    for &tid in entry.threads.iter().filter(|&&tid| tid != entry.pid) {
        let core: Option<CoreEntry> = set.all(Image::Core, u64::from(tid))?.into_iter().next();
        let comm = core.and_then(|core| core.thread_core).and_then(|core| core.comm).unwrap_or_default();
        threads.push((tid, text(&comm)));
    }
    let mut pages = 0u64;
    if !set.entries(Image::Pagemap, u64::from(entry.pid)).is_empty() {
        let (_, runs) = set.pagemap(Image::Pagemap, u64::from(entry.pid))?;
        for run in runs {
            pages = pages.saturating_add(run.nr_pages.unwrap_or(u64::from(run.compat_nr_pages)));
        }
    }
    let state = match tc.map(|tc| tc.task_state) {
        Some(1) => "running",
        Some(2 | 6) => "zombie",
        Some(3) => "stopped",
        _ => "unknown",
    };
    Ok(Task {
        pid: entry.pid,
        ppid: entry.ppid,
        pgid: entry.pgid,
        sid: entry.sid,
        comm: tc.map(|tc| text(&tc.comm)).unwrap_or_default(),
        state,
        threads,
        pages,
        fds,
    })
}

/// Bytes for people: up to the first NUL, escaped where they are not printable.
fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
    escape(bytes)
}

fn escape(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// An address of a unix socket.
fn socket_path(bytes: &[u8]) -> String {
    match bytes.split_first() {
        Some((0, name)) => format!("@{}", escape(name)),
        _ => text(bytes),
    }
}

fn inet(words: &[u32], port: u32) -> String {
    // The words are the address as it lies in memory, in network order.
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let ip = <[u8; 4]>::try_from(&bytes[..])
        .map(|b| IpAddr::V4(Ipv4Addr::from(b)))
        .or_else(|_| <[u8; 16]>::try_from(&bytes[..]).map(|b| IpAddr::V6(Ipv6Addr::from(b))));
    match ip {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        Ok(ip) => format!("{ip}:{port}"),
        Err(_) => format!("?:{port}"),
    }
}

/// One line about an open file.
fn describe(file: &FileEntry) -> String {
    let kind = FdTypes::try_from(file.r#type).map_or_else(
        |_| format!("type {}", file.r#type),
        |kind| match kind {
            FdTypes::Reg => "file".to_owned(),
            FdTypes::Unixsk => "unix".to_owned(),
            FdTypes::Inetsk => "inet".to_owned(),
            other => other.as_str_name().to_lowercase(),
        },
    );
    let detail = if let Some(reg) = &file.reg {
        format!(
            "{} {}{}",
            text(&reg.name),
            access(reg.flags),
            if reg.pos > 0 { format!(" at {}", reg.pos) } else { String::new() }
        )
    } else if let Some(pipe) = &file.pipe {
        format!("{} {}", pipe.pipe_id, access(pipe.flags))
    } else if let Some(fifo) = &file.fifo {
        format!("{}", fifo.pipe_id)
    } else if let Some(socket) = &file.usk {
        let mut line = socket.ino.to_string();
        if !socket.name.is_empty() {
            line.push_str(&format!(" {}", socket_path(&socket.name)));
        }
        if let Some(external) = &socket.ckpt_external {
            line.push_str(&format!(" -> {}", outside(external)));
        } else if socket.peer != 0 {
            line.push_str(&format!(" - {}", socket.peer));
        } else if socket.state == 10 {
            line.push_str(" listening");
        }
        line
    } else if let Some(socket) = &file.isk {
        let protocol = match socket.proto {
            6 => "tcp",
            17 => "udp",
            1 => "icmp",
            _ => "ip",
        };
        let source = inet(&socket.src_addr, socket.src_port);
        match socket.state {
            10 => format!("{protocol} {source} listening"),
            _ if socket.dst_port != 0 => {
                format!("{protocol} {source} - {}", inet(&socket.dst_addr, socket.dst_port))
            }
            _ => format!("{protocol} {source}"),
        }
    } else if let Some(stub) = &file.ckpt_stub {
        format!("{} (not read yet)", stub.ino)
    } else if let Some(eventfd) = &file.efd {
        format!("counter {}", eventfd.counter)
    } else if let Some(epoll) = &file.epfd {
        format!("{} descriptors", epoll.tfd.len())
    } else if let Some(timer) = &file.tfd {
        format!("clock {}", timer.clockid)
    } else {
        String::new()
    };
    format!("{kind} {detail}").trim_end().to_owned()
}

fn access(flags: u32) -> &'static str {
    match flags & 3 {
        0 => "r",
        1 => "w",
        _ => "rw",
    }
}

fn outside(external: &ckpt_proto::types::ExternalSocket) -> String {
    let name = external.path.as_ref().or(external.peer_name.as_ref()).filter(|name| !name.is_empty());
    let name = name.map(|name| socket_path(name));
    match (PolicyKind::try_from(external.policy), name) {
        (Ok(PolicyKind::Close), _) => "closed".to_owned(),
        (Ok(PolicyKind::Inherit), None) => "inherited".to_owned(),
        (_, Some(name)) => name,
        (_, None) => "outside".to_owned(),
    }
}

/// Who is connected to whom.
fn links(tasks: &[Task], files: &BTreeMap<u32, FileEntry>) -> Vec<Link> {
    let mut holders: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for task in tasks {
        for fd in &task.fds {
            holders.entry(fd.file_id).or_default().insert(task.pid);
        }
    }
    let none = BTreeSet::new();
    let held = |id: u32| holders.get(&id).unwrap_or(&none);
    let mut links = BTreeSet::new();
    // Pipes: every writer to every reader.
    let mut pipes: BTreeMap<u32, (BTreeSet<u32>, BTreeSet<u32>, bool)> = BTreeMap::new();
    for file in files.values() {
        if let Some(pipe) = &file.pipe {
            let (writers, readers, external) = pipes.entry(pipe.pipe_id).or_default();
            let ends = if pipe.flags & 3 == 0 { readers } else { writers };
            ends.extend(held(file.id));
            *external |= pipe.ckpt_external.unwrap_or(false);
        }
    }
    let inos: BTreeMap<u32, u32> = files.values().filter_map(|f| Some((f.usk.as_ref()?.ino, f.id))).collect();
    for (id, (writers, readers, external)) in pipes {
        let label = format!("pipe {id}");
        // Each with each would be too many.
        if writers.union(&readers).count() > 2 {
            for (ends, what) in [(&writers, "writes"), (&readers, "reads")] {
                let link = |&from| Link {
                    from,
                    to: End::Outside(label.clone()),
                    label: format!("{label} ({what})"),
                    directed: what == "writes",
                };
                links.extend(ends.iter().map(link));
            }
            continue;
        }
        for &from in &writers {
            // A task that reads what it writes is news only if nobody else does.
            for &to in readers.iter().filter(|&&to| to != from || writers.union(&readers).count() == 1) {
                links.insert(Link { from, to: End::Task(to), label: label.clone(), directed: true });
            }
        }
        if external {
            for &from in writers.iter().chain(&readers) {
                links.insert(Link {
                    from,
                    to: End::Outside(label.clone()),
                    label: label.clone(),
                    directed: false,
                });
            }
        }
    }
    let inet_name = |file: &FileEntry, reversed: bool| {
        let socket = file.isk.as_ref().filter(|socket| socket.dst_port != 0)?;
        let ends = [(&socket.src_addr, socket.src_port), (&socket.dst_addr, socket.dst_port)];
        let (a, b) = if reversed { (ends[1], ends[0]) } else { (ends[0], ends[1]) };
        Some((socket.proto, inet(a.0, a.1), inet(b.0, b.1)))
    };
    let inets: BTreeMap<_, u32> = files.values().filter_map(|f| Some((inet_name(f, false)?, f.id))).collect();
    for file in files.values() {
        if let Some(socket) = &file.usk {
            let peer = inos.get(&socket.peer).copied();
            for &from in held(file.id) {
                if let Some(external) = &socket.ckpt_external {
                    let label = format!("unix {}", socket.ino);
                    links.insert(Link { from, to: End::Outside(outside(external)), label, directed: false });
                } else if let Some(peer) = peer {
                    let (low, high) = (socket.ino.min(socket.peer), socket.ino.max(socket.peer));
                    let label = format!("unix {low} - {high}");
                    if held(file.id).union(held(peer)).count() > 2 {
                        let to = End::Outside(label);
                        let label = format!("unix {}", socket.ino);
                        links.insert(Link { from, to, label, directed: false });
                    } else if socket.ino == low {
                        // Each connection once, from its smaller inode.
                        for &to in held(peer) {
                            links.insert(Link {
                                from,
                                to: End::Task(to),
                                label: label.clone(),
                                directed: false,
                            });
                        }
                    }
                }
            }
        }
        if let Some((protocol, source, target)) = inet_name(file, false) {
            let label = format!("{} {source} - {target}", if protocol == 6 { "tcp" } else { "inet" });
            match inet_name(file, true).and_then(|name| inets.get(&name)) {
                Some(&peer) if source <= target => {
                    for &from in held(file.id) {
                        for &to in held(peer) {
                            links.insert(Link {
                                from,
                                to: End::Task(to),
                                label: label.clone(),
                                directed: false,
                            });
                        }
                    }
                }
                Some(_) => {}
                None => {
                    for &from in held(file.id) {
                        let to = End::Outside(target.clone());
                        links.insert(Link { from, to, label: label.clone(), directed: false });
                    }
                }
            }
        }
    }
    links.into_iter().collect()
}
