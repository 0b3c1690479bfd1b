//! `--lazy`: the tree runs before its pages are there.
//!
//! ```text
//! R            builds the tree; asks each task for a userfaultfd, takes it out, and puts the memory whose pages can
//! │            wait under watch; then goes on as without --lazy
//! ├─ root ...  run as soon as everything but those pages is in place; who touches one waits
//! └─ server    holds the userfaultfds, brings what is waited for, and meanwhile everything else   (`serve`)
//!    └─ guardian   holds them too                                                                (`guard`)
//! ```
//!
//! The server is a child of R in a session of its own, which outlives it if need be: with --detach, or if the root ends
//! before others of the tree. When the last page is in it closes the last userfaultfd, and server and guardian end: the
//! processes are like any others then.
//!
//! The userfaultfds are made inside the tasks while these still have the privileges of R, and the kernel's own
//! accesses count as well (CAP_SYS_PTRACE): a read(2) into missing memory has to work. Nothing of them stays in a
//! task's table of descriptors.
//!
//! **Never wrong data.** Everything that is brought has been compared with its checksum. A page that can't be had, since
//! it is damaged or the server was killed, is never replaced by zeros: the tree is killed, with a message. See
//! `guard` for how that is sure even if the server gets SIGKILL.
//!
//! Which pages can wait is told in [`ckpt_kinds::mem::restore::later`]. Processes that share pages copy-on-write with
//! those that they are forked from are filled before they run: pages brought one process at a time are shared no more.
//!
//! Ways not chosen: a thread of R (with --detach R ends; in the foreground it dies of what kills a shell's job);
//! one server for each process (a chain's files would be opened for each of them); a userfaultfd that stays in each
//! task (then no guardian is needed, but the program sees a descriptor, and may close it).

pub mod guard;
pub mod missing;
pub mod serve;

use std::{
    fs::File,
    io::{Read, Write},
    mem::ManuallyDrop,
    ops::Range,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use anyhow::{Context, ensure};
use ckpt_images::{ImageSet, pull::Puller};
use ckpt_kinds::mem::restore::{Run, inherit::Inherited, later};
use ckpt_proto::Image;
use ckpt_remote::{Call, run_one};
use ckpt_sys::{Pid, Refused, RemoteAddr, TargetFd, clone, file, memory, pidfd, probe, uffd};
use nix::{
    fcntl::OFlag,
    libc,
    sys::{prctl, wait::waitpid},
    unistd::{chdir, dup2_stdin, dup2_stdout, pipe2, setsid},
};

use crate::{
    make::{Family, bodies},
    shared,
    tree::{Body, Process, Tree},
};
use missing::Missing;
use serve::{Restored, Server, Space};

/// Whether it can be done here.
///
/// # Errors
/// [`Refused`], with why not.
pub fn check() -> anyhow::Result<()> {
    probe::userfaultfd_missing().map_err(|error| {
        let why = format!("userfaultfd can't be used: {}", ckpt_cli::describe(&error.into()));
        Refused::new("--lazy", why)
            .advise("it takes CAP_SYS_PTRACE, and Linux 6.6 or later; see ckpt-check")
            .into()
    })
}

/// A process whose pages can wait, in part.
#[derive(Debug)]
struct Waiting {
    pid: Pid,
    name: String,
    areas: Vec<Range<u64>>,
    missing: Missing,
    uffd: Option<OwnedFd>,
}

/// Pages, and who is to get them later.
#[derive(Debug)]
pub struct Lazy {
    pages: Puller,
    waiting: Vec<Waiting>,
}

impl Lazy {
    /// Opens all files with pages.
    ///
    /// # Errors
    /// One is missing, or shorter than the pagemaps say.
    pub fn open(set: &ImageSet, tree: &Tree, verify: bool) -> anyhow::Result<Self> {
        let segments = shared::segments(set)?;
        let spaces = bodies(tree).map(|(_, body)| &body.space.pages);
        let runs: Vec<Run> = spaces
            .chain(segments.iter().map(|segment| &segment.pages))
            .flat_map(|pages| pages.runs.iter().copied())
            .collect();
        let pages = Puller::open(set, runs.iter().map(|run| run.file), verify)?;
        for run in &runs {
            let (len, end) = (pages.len_of(run.file).unwrap_or(0), run.offset.saturating_add(run.len));
            let name = || Image::Pages.file_name(run.file.id);
            ensure!(end <= len, "{}: {len} bytes, the pagemap lists {end}", name());
        }
        Ok(Self { pages, waiting: Vec::new() })
    }

    /// Reads all pages of a run.
    ///
    /// # Errors
    /// They are damaged, or can't be read.
    pub fn read(&mut self, run: &Run, buffer: &mut [u8]) -> anyhow::Result<()> {
        Ok(self.pages.read_exact_at(run.file, buffer, run.offset)?)
    }

    /// Gives `each` all pages of a run, with their addresses.
    ///
    /// # Errors
    /// They are damaged, or can't be read; or `each` has failed.
    pub fn for_each(
        &mut self,
        run: &Run,
        mut each: impl FnMut(u64, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut done = 0;
        while done < run.len {
            let bytes = self.pages.from(run.file, run.offset + done)?;
            let len = usize::try_from(run.len - done).unwrap_or(usize::MAX).min(bytes.len());
            each(run.addr + done, &bytes[..len])?;
            done += len as u64;
        }
        Ok(())
    }

    /// Fills what can't wait of a task's private memory, all of it unless it is `alone` with its pages.
    ///
    /// # Errors
    /// Images, or the kernel.
    pub fn build(
        &mut self,
        process: &Process,
        body: &Body,
        inherited: &Inherited,
        alone: bool,
    ) -> anyhow::Result<()> {
        let hot: Vec<u64> = process.threads.iter().flat_map(|thread| later::hot(&thread.core)).collect();
        let parted = body.space.part(&inherited.missing, &hot);
        let waits = alone && inherited.kept.is_empty();
        for run in if waits { &parted.now } else { &inherited.missing } {
            self.for_each(run, |addr, bytes| Ok(memory::write_all(process.pid, RemoteAddr(addr), bytes)?))?;
        }
        if waits && !parted.later.is_empty() {
            let missing = Missing::new(&parted.later);
            self.waiting.push(Waiting {
                pid: process.pid,
                name: process.name(),
                areas: parted.areas,
                missing,
                uffd: None,
            });
        }
        Ok(())
    }

    /// Gives each task that is to wait for pages a userfaultfd, which is kept here. To be called before the task's
    /// descriptors and limits are what they are to be: it needs room for one more.
    ///
    /// # Errors
    /// A task may not have one.
    pub fn arm(&mut self, family: &mut Family) -> anyhow::Result<()> {
        for waiting in &mut self.waiting {
            waiting.uffd = Some(arm(family, waiting.pid).with_context(|| waiting.name.clone())?);
        }
        Ok(())
    }

    /// Puts the memory that waits for pages under watch, and starts the server. All tasks have been made by now, so no
    /// new process takes a pid that is theirs; from now on this process touches their memory as anybody does.
    ///
    /// # Errors
    /// The kernel's; there can't be one more process.
    pub fn start(self, tree: &Tree) -> anyhow::Result<Option<Handle>> {
        let mut spaces = Vec::new();
        for waiting in self.waiting {
            let Some(uffd) = waiting.uffd else { continue };
            for area in &waiting.areas {
                uffd::register_missing(uffd.as_fd(), RemoteAddr(area.start), RemoteAddr(area.end))
                    .with_context(|| waiting.name.clone())?;
            }
            spaces.push(Space::new(uffd, waiting.name, waiting.missing));
        }
        if spaces.is_empty() {
            return Ok(None);
        }
        let bytes: u64 = spaces.iter().map(|space| space.missing.bytes()).sum();
        ckpt_cli::note!(1, "{bytes} bytes of pages come later");
        let mut restored = Restored::default();
        for (process, _) in bodies(tree) {
            restored.0.push((process.pid, pidfd::open(process.pid)?));
        }
        let (go, handle) = pipe2(OFlag::O_CLOEXEC).context("pipe2")?;
        let (ready, tell) = pipe2(OFlag::O_CLOEXEC).context("pipe2")?;
        let Some(_) = clone::fork()? else {
            drop((handle, ready));
            let serve = || be_server(self.pages, spaces, &restored, go, tell);
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(serve));
            let code = match served {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => {
                    // The guardian says what follows from it.
                    let _ = ckpt_cli::finish("ckpt-restore", Err(error));
                    1
                }
                Err(_) => 1,
            };
            // No userfaultfd is dropped either.
            clone::end(code);
        };
        drop(tell);
        let started = File::from(ready).read(&mut [0]).context("wait for the page server")?;
        ensure!(started == 1, "the page server has not come up");
        Ok(Some(Handle(handle.into())))
    }
}

/// Has a task make a userfaultfd, and takes it out.
fn arm(family: &mut Family, pid: Pid) -> anyhow::Result<OwnedFd> {
    let handle = pidfd::open(pid)?;
    let task = family.task(pid.0)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let made = run_one(task, Call::new("userfaultfd", libc::SYS_userfaultfd, [flags.into()]))?;
    let fd = i32::try_from(made.ret).context("userfaultfd")?;
    let uffd = pidfd::getfd(handle.as_fd(), TargetFd(fd))?;
    run_one(task, Call::new("close(userfaultfd)", libc::SYS_close, [fd.into()]))?;
    uffd::enable_missing(uffd.as_fd())?;
    Ok(uffd)
}

/// A server, seen from the process that has started it.
#[derive(Debug)]
pub struct Handle(File);

impl Handle {
    /// The tasks run. (If this process ends, the server finds out by itself whether they do.)
    pub fn go(mut self) {
        let _ = self.0.write_all(&[1]);
    }
}

/// Serves in this process, a fresh child. If that fails, the userfaultfds stay open until the process has ended.
fn be_server(
    pages: Puller,
    spaces: Vec<Space>,
    restored: &Restored,
    go: OwnedFd,
    ready: OwnedFd,
) -> anyhow::Result<()> {
    // No descriptor, directory, terminal or process group of the parent's, but its stderr.
    setsid().context("setsid")?;
    prctl::set_name(c"ckpt-lazy").context("prctl(PR_SET_NAME)")?;
    chdir("/").context("chdir")?;
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    let mut keep = vec![2, null.as_raw_fd(), go.as_raw_fd(), ready.as_raw_fd()];
    keep.extend(pages.descriptors());
    keep.extend(spaces.iter().map(|space| space.uffd.as_raw_fd()));
    keep.extend(restored.0.iter().map(|(_, handle)| handle.as_raw_fd()));
    file::close_all_but(&keep)?;
    dup2_stdin(&null).and_then(|()| dup2_stdout(&null)).context("dup2")?;
    let own = pidfd::open(Pid(std::process::id().cast_signed()))?;
    let mut guardian = None;
    let mut replace = || -> anyhow::Result<OwnedFd> {
        if let Some(before) = guardian.take() {
            let _ = waitpid(Pid::nix(before), None);
        }
        let Some(pid) = clone::fork_with_shared_files()? else {
            let _ = setsid();
            let _ = prctl::set_name(c"ckpt-guardian");
            clone::end(guard::watch(own.as_fd(), restored));
        };
        guardian = Some(pid);
        Ok(pidfd::open(pid)?)
    };
    let first = replace()?;
    File::from(ready).write_all(&[1]).context("tell that the page server is up")?;
    let server = Server { spaces, pages, go: Some(go), guardian: first, replace: &mut replace };
    let mut server = ManuallyDrop::new(server);
    server.run()?;
    ckpt_cli::note!(1, "all pages are in");
    let _ = pidfd::send_signal(server.guardian.as_fd(), libc::SIGKILL);
    if let Some(pid) = guardian {
        let _ = waitpid(pid.nix(), None);
    }
    Ok(())
}
