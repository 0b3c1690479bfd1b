//! Pages written straight into the files of the image directory.
//!
//! Through pipes each page is moved by every stage, and each record wakes them up in turn: of a gibibyte `ckpt-sk` took a
//! sixth of all processor time for looking at none of it. Where all stages up to the writer are known (`ckpt-hold`) and the
//! writer shares its directory, pages go from the process into its file and the stream only tells of them (PLACED in
//! ckpt-stream(5)). The work is that of one reader and one writer, without waiting for each other, and some threads share it.
//!
//! A record is told of when it has been written. One that can't be (the disk is full, say) is sent
//! instead, so that it is the writer that fails, as it would have, or finds a way.
//!
//! Why not mmap(2) of the file, to read into it: each page is cleared before it is overwritten, and costs a fault.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{
        Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
};

use anyhow::{Context, bail};
use ckpt_proto::{
    Image,
    stream::{Facts, Writer},
};
use ckpt_sys::transfer::Output;
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::dump::{Plan, RECORD, Record, Records};

/// Most threads: writers of one file wait for each other, and to read takes them about as long as to write.
const THREADS: usize = 3;
/// Records that the writer is told of at a time.
const TELL: u64 = 32;

/// The file of pages image `id` in the writer's directory.
///
/// # Errors
/// Those of openat(2).
pub(super) fn file(directory: OwnedFd, id: u32) -> Result<File, Errno> {
    let name = Image::Pages.file_name(u64::from(id));
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(directory, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
}

/// A record that has been read, and written if that was possible.
struct Done {
    record: Record,
    facts: Facts,
    written: bool,
}

/// Places what is left of the records of a plan in `file`.
///
/// # Errors
/// The process died, or the output's.
pub(super) fn copy(
    plan: &Plan,
    memory: &File,
    mut records: Records<'_>,
    file: &File,
    out: &mut Writer<Output>,
    mut progress: impl FnMut(u64),
) -> anyhow::Result<()> {
    let what = "write the stream";
    let id = u64::from(plan.pages_id);
    let Some(first) = records.next() else { return Ok(()) };
    let mut next = first.offset;
    let records = Mutex::new(std::iter::once(first).chain(records));
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let (send, done) = sync_channel::<anyhow::Result<Done>>(2 * threads);
    thread::scope(|scope| {
        // Dropped with this block: then threads that are left do not go on.
        let done = done;
        for _ in 0..threads {
            let (send, records) = (send.clone(), &records);
            thread::Builder::new()
                .name("pages".to_owned())
                .spawn_scoped(scope, move || work(plan, memory, records, file, &send))
                .context("start a thread")?;
        }
        drop(send);
        // Those which have to wait for one before them.
        let mut early: BTreeMap<u64, Done> = BTreeMap::new();
        let mut told = 0;
        for finished in done {
            let finished = finished?;
            early.insert(finished.record.offset, finished);
            while let Some(Done { record, facts, written }) = early.remove(&next) {
                if written {
                    out.placed(id, record.offset, record.len as u64, facts).context(what)?;
                } else {
                    let mut bytes = vec![0; record.len];
                    plan.read_record(memory, &record, &mut bytes)?;
                    out.data(Image::Pages, id, &bytes).context(what)?;
                }
                told += 1;
                if told % TELL == 0 {
                    out.output().flush().context(what)?;
                }
                next += record.len as u64;
                progress(record.len as u64);
            }
        }
        if next < plan.bytes() {
            bail!("pid {}: a thread that reads pages has ended too early", plan.pid());
        }
        Ok(())
    })
}

/// What a thread does.
fn work(
    plan: &Plan,
    memory: &File,
    records: &Mutex<impl Iterator<Item = Record>>,
    file: &File,
    send: &SyncSender<anyhow::Result<Done>>,
) {
    let mut buffer = vec![0; RECORD];
    loop {
        let record = records.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some(record) = record else { return };
        let bytes = &mut buffer[..record.len];
        let done = plan.read_record(memory, &record, bytes).map(|()| {
            let facts = Facts::of(bytes);
            let written = file.write_all_at(bytes, record.offset).is_ok();
            Done { record, facts, written }
        });
        let failed = done.is_err();
        if send.send(done).is_err() || failed {
            return;
        }
    }
}
