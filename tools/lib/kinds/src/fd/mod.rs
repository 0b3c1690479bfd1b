//! What a descriptor can refer to.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use ckpt_images::ImageSet;
use ckpt_proto::types::FdinfoEntry;
use ckpt_remote::Call;
use ckpt_sys::{FileId, Pid, SocketId};

use crate::Sink;

/// What the user allowed at dump time.
#[derive(Debug, Clone, Default)]
pub struct DumpOptions {
    /// Resources that lead outside the tree and shall be handed in again at restore.
    pub external: Vec<External>,
    /// Largest deleted file whose contents go into the images, bytes; 0 stands for the default (1 MiB).
    pub ghost_limit: u64,
}

/// A resource shared with processes outside the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// `pipe:[ID]`.
    Pipe(u64),
}

impl std::str::FromStr for External {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> anyhow::Result<Self> {
        s.strip_prefix("pipe:[")
            .and_then(|s| s.strip_suffix(']'))
            .and_then(|s| s.parse().ok())
            .map(Self::Pipe)
            .ok_or_else(|| anyhow::anyhow!("--external {s}: expected pipe:[ID], as /proc/PID/fd shows it"))
    }
}

/// What a first look at the tree tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Survey {
    /// Some task has a socket: ckpt-sk has to follow.
    pub sockets: bool,
}

/// Shared memory that a mapping refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shmem {
    /// Its entry in FILES.
    pub file_id: u32,
    /// Its number in SHMEM_PAGEMAP.
    pub shmid: u32,
    /// Whether it was met for the first time.
    pub new: bool,
}

/// Contents to be stored as SHMEM_PAGEMAP and pages.
#[derive(Debug)]
pub struct ShmemSegment {
    /// Number of the SHMEM_PAGEMAP image.
    pub shmid: u32,
    /// Bytes.
    pub size: u64,
    /// The memory itself, readable.
    pub fd: OwnedFd,
}

/// All open files of a tree, while they are dumped.
#[derive(Debug)]
pub struct FileTable {}

#[allow(missing_docs, unused_variables, clippy::missing_errors_doc)]
impl FileTable {
    pub fn new(tree: Vec<Pid>, options: DumpOptions) -> Self {
        Self {}
    }
    pub fn survey(tree: &[Pid]) -> anyhow::Result<Survey> {
        anyhow::bail!("not written yet")
    }
    pub fn add_task(&mut self, pid: Pid, comm: &str, files_id: u32, sink: &mut dyn Sink) -> anyhow::Result<()> {
        anyhow::bail!("not written yet")
    }
    pub fn add_path(&mut self, pid: Pid, link: &Path, flags: u32, sink: &mut dyn Sink) -> anyhow::Result<u32> {
        anyhow::bail!("not written yet")
    }
    pub fn add_shmem(&mut self, pid: Pid, link: &Path, sink: &mut dyn Sink) -> anyhow::Result<Shmem> {
        anyhow::bail!("not written yet")
    }
    /// Memory whose contents the caller has to store; call after the last `add_*`.
    pub fn shmem_segments(&self) -> anyhow::Result<Vec<ShmemSegment>> {
        anyhow::bail!("not written yet")
    }
    pub fn finish(self, sink: &mut dyn Sink) -> anyhow::Result<()> {
        anyhow::bail!("not written yet")
    }
}

/// What the user wants at restore.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Descriptors of this process that stand for `socket:[ID]`, `pipe:[ID]`, `tty[..]` or a path.
    pub inherit: Vec<(i32, String)>,
    /// Where external unix connections go, instead of where the images say.
    pub external_unix: Vec<(SocketId, Vec<u8>)>,
    /// A changed data file is an error.
    pub files_strict: bool,
    /// Takes warnings.
    pub warn: fn(&str),
}

/// Every open file of the images, opened in this process.
#[derive(Debug)]
pub struct OpenFiles {}

#[allow(missing_docs, unused_variables, clippy::missing_errors_doc)]
impl OpenFiles {
    pub fn open_all(set: &ImageSet, options: &RestoreOptions) -> anyhow::Result<Self> {
        anyhow::bail!("not written yet")
    }
    pub fn fd(&self, id: FileId) -> Option<BorrowedFd<'_>> {
        None
    }
    pub fn shmem(&self, shmid: u32) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
    pub fn placed(&mut self, fdinfo: &[FdinfoEntry], pid: Pid) -> anyhow::Result<Vec<Call>> {
        anyhow::bail!("not written yet")
    }
    pub fn undo(&mut self) {}
}
