//! `--list`: a table of sockets, of a live tree or of a stream.
//!
//! In a stream that has passed ckpt-sk all is in its entries. Straight from ckpt-scan there are only stubs; the
//! tree that stands frozen behind it tells the rest.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::Write,
    os::fd::AsFd,
};

use anyhow::{Context, bail};
use ckpt_hold::Hold;
use ckpt_images::{ImageError, stage};
use ckpt_kinds::fd::{
    socket::SkOptions,
    socklist::{self, Listed},
};
use ckpt_proto::{
    Image, MAX_MESSAGE, Message,
    stream::{Frame, Reader, Writer},
    types::{CoreEntry, FdinfoEntry, FileEntry, SkPacketEntry, TaskKobjIdsEntry, TcpStreamEntry},
};
use ckpt_socket::View;
use ckpt_sys::{Pid, TargetFd};

use crate::{Args, LACKS, is_pagemap};

/// Lists sockets: those of the tree that `-t` names, or those of the stream that `input` gives.
///
/// # Errors
/// No such process, or one that may not be looked at; a stream that is damaged.
pub fn list(
    args: &Args,
    input: impl FnOnce() -> anyhow::Result<File>,
    output: &mut dyn Write,
) -> anyhow::Result<()> {
    let allowed = args.options(false);
    let (listed, live) = match args.tree {
        Some(pid) => (socklist::live(&socklist::tree(Pid(pid)), &allowed)?, true),
        None => from_stream(input()?, &allowed)?,
    };
    if args.json {
        let all: Vec<_> = listed.iter().map(|socket| json(socket, live)).collect();
        serde_json::to_writer_pretty(&mut *output, &all).context("write")?;
        return writeln!(output).context("write");
    }
    let fate = if live { "DUMP" } else { "RESTORE" };
    let title = [
        "ID",
        "KIND",
        "STATE",
        "PID/FD",
        "COMMAND",
        "LOCAL",
        "PEER",
        "PEER HELD BY",
        "RECEIVED",
        "UNSENT",
        fate,
    ];
    let mut rows = vec![title.map(str::to_owned)];
    rows.extend(listed.iter().map(row));
    let widths: Vec<usize> = (0..title.len())
        .map(|i| rows.iter().filter_map(|r| r.get(i)).map(|cell| cell.chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        writeln!(output, "{}", cells.join("  ").trim_end()).context("write")?;
    }
    Ok(())
}

fn row(s: &Listed) -> [String; 11] {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let peer = match (s.peer_id, s.peer.as_str()) {
        (Some(id), "") => id.to_string(),
        (Some(id), name) => format!("{id} {name}"),
        (None, name) => or_dash(name),
    };
    let holder = match &s.peer_holder {
        Some((pid, comm)) => format!("{pid} {comm}{}", if s.peer_inside { "" } else { " (outside)" }),
        None => "-".to_owned(),
    };
    let held = match s.holders.as_slice() {
        [] => "-".to_owned(),
        [(pid, fd)] => format!("{pid}/{fd}"),
        [(pid, fd), others @ ..] => format!("{pid}/{fd} +{}", others.len()),
    };
    [
        s.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
        s.kind.to_owned(),
        s.state.clone(),
        held,
        or_dash(&s.comm),
        or_dash(&s.local),
        peer,
        holder,
        s.received.to_string(),
        s.unsent.to_string(),
        s.fate.clone(),
    ]
}

fn json(s: &Listed, live: bool) -> serde_json::Value {
    let first = s.holders.first();
    let has_peer = s.peer_id.is_some() || !s.peer.is_empty() || s.peer_holder.is_some();
    let mut socket = serde_json::json!({
        "id": s.id,
        "kind": s.kind,
        "state": s.state,
        "pid": first.map(|(pid, _)| pid.0),
        "command": s.comm,
        "fd": first.map(|(_, fd)| fd.0),
        "holders": s.holders.iter().map(|(pid, fd)| serde_json::json!({"pid": pid.0, "fd": fd.0})).collect::<Vec<_>>(),
        "local": s.local,
        "peer": has_peer.then(|| serde_json::json!({
            "id": s.peer_id,
            "name": s.peer,
            "inside": s.peer_inside,
            "pid": s.peer_holder.as_ref().map(|(pid, _)| pid.0),
            "command": s.peer_holder.as_ref().map(|(_, comm)| comm),
        })),
        "received": s.received,
        "unsent": s.unsent,
    });
    let key = if live { "dump" } else { "restore" };
    if let Some(object) = socket.as_object_mut() {
        object.insert(key.to_owned(), s.fate.clone().into());
    }
    socket
}

/// What a stream tells about its sockets.
#[derive(Default)]
struct Seen {
    sockets: Vec<View>,
    /// Processes with sockets that are only stubs.
    stubs: BTreeSet<Pid>,
    descriptors: Vec<(u64, u32, u32)>,
    tables: HashMap<u64, Vec<Pid>>,
    comms: HashMap<Pid, String>,
    received: HashMap<u32, u64>,
    /// Bytes of the two queues of TCP connections, by inode.
    tcp: HashMap<u64, (u64, u64)>,
    memory: u64,
}

/// The sockets of a stream, and whether they are live.
fn from_stream(input: File, allowed: &SkOptions) -> anyhow::Result<(Vec<Listed>, bool)> {
    ckpt_cli::not_a_terminal(&input, "standard input")?;
    stage::grow_pipe(input.as_fd());
    let (mut reader, hello) = Reader::open(input)?;
    let wanted = hello.lacks.iter().any(|l| l == LACKS);
    let mut hold = match &hello.control {
        Some(control) if wanted => {
            Some(Hold::take(control, LACKS).context("take a hold on the frozen tree")?)
        }
        _ => None,
    };
    let mut seen = Seen::default();
    let mut listed = None;
    // Whatever is not looked at goes there.
    let null = File::options().write(true).open("/dev/null").context("/dev/null")?;
    let mut rest = Writer::open(null, hello).context("/dev/null")?;
    while let Some(frame) = reader.next_frame()? {
        // ckpt-scan may wait for this before it writes pages, or which there are (ckpt-stream(5)).
        let awaited = hold.is_some() && matches!(&frame, Frame::Entry { image, .. } if is_pagemap(image));
        if listed.is_none() && (awaited || matches!(frame, Frame::Bulk)) {
            listed = Some(seen.list(hold.is_some(), allowed)?);
            if let Some(hold) = hold.take() {
                hold.release();
            }
        }
        match &frame {
            Frame::Entry { image, arg, .. } => match Image::by_name(image).filter(|&image| is_told(image)) {
                Some(image) => seen.entry(image, *arg, &mut reader)?,
                None => stage::forward(&mut reader, &frame, &mut rest)?,
            },
            _ => stage::forward(&mut reader, &frame, &mut rest)?,
        }
    }
    let listed = match listed {
        Some(listed) => listed,
        None => seen.list(hold.is_some(), allowed)?,
    };
    if let Some(hold) = hold {
        hold.release();
    }
    Ok(listed)
}

fn is_told(image: Image) -> bool {
    matches!(
        image,
        Image::Files | Image::Fdinfo | Image::Ids | Image::Core | Image::SkQueues | Image::TcpStream
    )
}

impl Seen {
    fn entry(&mut self, image: Image, arg: u64, reader: &mut Reader<File>) -> anyhow::Result<()> {
        // What an entry of which something is remembered takes at most, names apart.
        const EACH: u64 = 1 << 10;
        let message = reader.payload(u64::from(MAX_MESSAGE))?;
        let name = image.message().unwrap_or_default();
        ckpt_proto::check::check_message(name, &message)
            .map_err(|e| ImageError::Stream { file: image.file_name(arg), what: e.to_string() })?;
        let pid = || i32::try_from(arg).map(Pid).context("a process id");
        match image {
            Image::Files => {
                let file = FileEntry::decode(&message[..])?;
                if let Some(stub) = &file.ckpt_stub {
                    self.stubs.insert(Pid(i32::try_from(stub.pid).context("a socket's pid")?));
                }
                match View::of(&file) {
                    Some(socket) => self.sockets.push(socket),
                    None => return Ok(()),
                }
            }
            Image::Fdinfo => {
                let descriptor = FdinfoEntry::decode(&message[..])?;
                self.descriptors.push((arg, descriptor.id, descriptor.fd));
            }
            Image::Ids => {
                let ids = TaskKobjIdsEntry::decode(&message[..])?;
                self.tables.entry(ids.files_id.into()).or_default().push(pid()?);
            }
            Image::Core => {
                let core = CoreEntry::decode(&message[..])?;
                if let Some(tc) = core.tc {
                    self.comms.insert(pid()?, tc.comm.escape_ascii().to_string());
                }
            }
            Image::SkQueues => {
                let packet = SkPacketEntry::decode(&message[..])?;
                *self.received.entry(packet.id_for).or_default() += u64::from(packet.length);
            }
            _ => {
                let tcp = TcpStreamEntry::decode(&message[..])?;
                self.tcp.insert(arg, (tcp.inq_len.into(), tcp.outq_len.into()));
            }
        }
        self.memory += EACH;
        if self.memory > ckpt_images::MAX_MEMORY {
            let what = "too many sockets and descriptors".to_owned();
            return Err(ImageError::TooMuch { file: image.file_name(arg), what }.into());
        }
        Ok(())
    }

    fn list(&mut self, held: bool, allowed: &SkOptions) -> anyhow::Result<(Vec<Listed>, bool)> {
        if !self.stubs.is_empty() {
            if !held {
                bail!(
                    "no frozen tree is behind the stream any more: run ckpt-sk in one pipeline with ckpt-scan"
                );
            }
            let tree: Vec<Pid> = self.stubs.iter().copied().collect();
            return Ok((socklist::live(&tree, allowed)?, true));
        }
        let mut holders: HashMap<u32, Vec<(Pid, TargetFd)>> = HashMap::new();
        for &(table, file, fd) in &self.descriptors {
            for &pid in self.tables.get(&table).into_iter().flatten() {
                holders.entry(file).or_default().push((pid, TargetFd(fd.cast_signed())));
            }
        }
        let canonical = |s: &View| {
            let of = |a: std::net::SocketAddr| std::net::SocketAddr::new(a.ip().to_canonical(), a.port());
            s.addresses.map(|(local, remote)| (s.kind.trim_end_matches('6'), of(local), of(remote)))
        };
        let by_id: HashMap<u64, &View> =
            self.sockets.iter().filter_map(|socket| Some((socket.id?, socket))).collect();
        let by_sides: HashMap<_, &View> = (self.sockets.iter())
            .filter_map(|socket| Some((canonical(socket)?, socket)))
            .filter(|((_, _, remote), _)| remote.port() != 0)
            .collect();
        let comm = |pid: &Pid| self.comms.get(pid).cloned().unwrap_or_default();
        let listed = self.sockets.iter().map(|socket| {
            let held = holders.get(&socket.file_id).cloned().unwrap_or_default();
            let far =
                canonical(socket).and_then(|(kind, local, remote)| by_sides.get(&(kind, remote, local)));
            let peer = socket.peer_id.and_then(|id| by_id.get(&id)).or(far);
            let peer_pid = peer.and_then(|p| holders.get(&p.file_id)?.first()).map(|(pid, _)| *pid);
            let at_dump = socket.peer_holder.clone().map(|(pid, comm)| (Pid(pid.cast_signed()), comm));
            let tcp = socket.id.and_then(|id| self.tcp.get(&id)).copied().unwrap_or_default();
            let queued = self.received.get(&socket.file_id).copied().unwrap_or(0);
            Listed {
                id: socket.id,
                kind: socket.kind,
                state: socket.state.to_owned(),
                comm: held.first().map(|(pid, _)| comm(pid)).unwrap_or_default(),
                holders: held,
                local: socket.local.clone(),
                peer: match peer {
                    Some(peer) if socket.peer.is_empty() => peer.local.clone(),
                    _ => socket.peer.clone(),
                },
                peer_id: peer.and_then(|peer| peer.id).or(socket.peer_id),
                peer_holder: peer_pid.map(|pid| (pid, comm(&pid))).or(at_dump),
                peer_inside: peer.is_some(),
                received: queued + tcp.0,
                unsent: tcp.1,
                fate: match socket.policy.as_str() {
                    "" if socket.addresses.is_some() && socket.state == "established" && peer.is_none() => {
                        "expects its peer".to_owned()
                    }
                    "" => "as it was".to_owned(),
                    policy => policy.to_owned(),
                },
            }
        });
        Ok((listed.collect(), false))
    }
}
