//! Compressing the pages of a stream, and the inverse: a stage that a tool runs inside itself.
//!
//! Every tool that takes or gives pages could know both kinds. Instead there is one place that makes one kind out of
//! the other, as a thread with a stream on either side, so that readers of pages see plain ones and
//! writers give plain ones, and all of it overlaps. The work itself is done by a thread per processor, block by block
//! ([`pack`]); results leave in the order of the pages. At most [`DEPTH`] blocks per worker are in memory.
//!
//! The thread blocks all signals: they are the tool's. A failure becomes an ABORT in the stream that it makes.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use ckpt_proto::{
    Image,
    stream::{Facts, Frame, Reader, StreamError, Writer},
    types::Hello,
};
use nix::{fcntl::OFlag, sys::signal::SigSet, unistd::pipe2};
use xxhash_rust::xxh3::Xxh3Default;

pub use crate::pack::Codec;
use crate::{
    ImageError,
    pack::{self, HEADER},
    stage,
    sums::damaged,
};

/// Blocks that wait or are worked on, per worker.
const DEPTH: usize = 4;

/// What is to be made of the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recode {
    /// Plain ones are compressed; what is compressed already stays as it is.
    Pack(Codec),
    /// Compressed ones are unpacked.
    Unpack,
}

/// Puts the recoding between a stream that has been opened and its reader.
///
/// # Errors
/// There can't be one more pipe or thread.
pub fn before(
    reader: Reader<File>,
    hello: Hello,
    recode: Recode,
) -> Result<(Reader<File>, Hello), ImageError> {
    let (theirs, ours) = pipe()?;
    start(move || {
        let _ = run(reader, hello, ours, recode);
    })?;
    Ok(Reader::open(theirs)?)
}

/// Puts the recoding behind a writer: what is written to the file that is returned goes on to `output`.
///
/// # Errors
/// There can't be one more pipe or thread.
pub fn behind(output: File, recode: Recode) -> Result<(File, Behind), ImageError> {
    let (ours, theirs) = pipe()?;
    let thread = start(move || {
        let (reader, hello) = Reader::open(ours)?;
        run(reader, hello, output, recode)
    })?;
    Ok((theirs, Behind(Some(thread))))
}

/// A stream's way from its writer to the output.
#[derive(Debug, Default)]
pub struct Behind(Option<JoinHandle<Result<(), ImageError>>>);

impl Behind {
    /// Waits until everything has reached the output. The writer must have been dropped.
    ///
    /// # Errors
    /// What went wrong there.
    pub fn finish(self) -> Result<(), ImageError> {
        let panicked =
            || ImageError::io("compression", "thread")(std::io::Error::other("the thread has panicked"));
        self.0.map_or(Ok(()), |thread| thread.join().unwrap_or_else(|_| Err(panicked())))
    }
}

fn pipe() -> Result<(File, File), ImageError> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(ImageError::errno("pipe", "pipe2"))?;
    stage::grow_pipe(reader.as_fd());
    Ok((reader.into(), writer.into()))
}

/// Starts a thread that gets no signals.
pub(crate) fn start<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, ImageError> {
    let failed = ImageError::io("compression", "start a thread");
    let before = SigSet::thread_get_mask().map_err(ImageError::errno("compression", "sigprocmask"))?;
    // The thread inherits the mask, so there is no instant at which it could get one.
    SigSet::all().thread_block().map_err(ImageError::errno("compression", "sigprocmask"))?;
    let thread = thread::Builder::new().name("pages".to_owned()).spawn(work).map_err(failed);
    before.thread_set_mask().map_err(ImageError::errno("compression", "sigprocmask"))?;
    thread
}

fn run(mut reader: Reader<File>, mut hello: Hello, output: File, recode: Recode) -> Result<(), ImageError> {
    stage::grow_pipe(output.as_fd());
    hello.packed = matches!(recode, Recode::Pack(_)).then_some(true);
    let mut writer = Writer::open(output, hello).map_err(ImageError::output)?;
    match copy(&mut reader, &mut writer, recode) {
        Ok(()) => writer.end().map(drop).map_err(ImageError::output),
        Err(error) => {
            let _ = writer.abort(&reason(&error));
            Err(error)
        }
    }
}

/// The chain of causes on one line; of a stage that gave up, its own words.
pub(crate) fn reason(error: &ImageError) -> String {
    if let ImageError::FromStream(StreamError::Aborted { reason }) = error {
        return reason.clone();
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn copy(reader: &mut Reader<File>, writer: &mut Writer<File>, recode: Recode) -> Result<(), ImageError> {
    match recode {
        Recode::Pack(codec) => Packing::new(codec)?.copy(reader, writer),
        Recode::Unpack => unpack_all(reader, writer),
    }
}

/// Plain pages on their way into blocks.
struct Packing {
    codec: Codec,
    pool: Pool<(u64, Vec<u8>)>,
    /// What does not fill a block yet, and whose pages these are.
    id: u64,
    rest: Vec<u8>,
}

impl Packing {
    fn new(codec: Codec) -> Result<Self, ImageError> {
        Ok(Self { codec, pool: Pool::start()?, id: 0, rest: Vec::with_capacity(pack::PLAIN) })
    }

    fn copy(&mut self, reader: &mut Reader<File>, writer: &mut Writer<File>) -> Result<(), ImageError> {
        while let Some(frame) = reader.next_frame()? {
            match &frame {
                Frame::Data { image, arg, len, sum, .. } if *len > 0 && image == Image::Pages.name() => {
                    if self.id != *arg {
                        self.flush(writer)?;
                        self.id = *arg;
                    }
                    self.take(reader, writer, *sum)?;
                }
                // In time for whoever starts to build at this point.
                Frame::Bulk => {
                    self.drain(writer)?;
                    stage::forward(reader, &frame, writer)?;
                }
                _ => stage::forward(reader, &frame, writer)?,
            }
        }
        self.drain(writer)
    }

    /// Takes in the contents of a record.
    fn take(
        &mut self,
        reader: &mut Reader<File>,
        writer: &mut Writer<File>,
        sum: Option<u64>,
    ) -> Result<(), ImageError> {
        let mut hash = Xxh3Default::new();
        while reader.pending() > 0 {
            let had = self.rest.len();
            let room = (pack::PLAIN - had) as u64;
            let want = usize::try_from(reader.pending().min(room)).unwrap_or(0);
            self.rest.resize(had + want, 0);
            reader.read_payload(&mut self.rest[had..])?;
            if sum.is_some() {
                hash.update(&self.rest[had..]);
            }
            if self.rest.len() == pack::PLAIN {
                self.flush(writer)?;
            }
        }
        if sum.is_some_and(|sum| sum != hash.digest()) {
            return Err(damaged(self.id).into());
        }
        Ok(())
    }

    fn flush(&mut self, writer: &mut Writer<File>) -> Result<(), ImageError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        let plain = std::mem::replace(&mut self.rest, Vec::with_capacity(pack::PLAIN));
        let (codec, id) = (self.codec, self.id);
        match self.pool.push(move || (id, pack::pack(codec, &plain))) {
            Some(block) => put(writer, &block),
            None => Ok(()),
        }
    }

    fn drain(&mut self, writer: &mut Writer<File>) -> Result<(), ImageError> {
        self.flush(writer)?;
        while let Some(block) = self.pool.pop() {
            put(writer, &block)?;
        }
        Ok(())
    }
}

fn put(writer: &mut Writer<File>, (id, block): &(u64, Vec<u8>)) -> Result<(), ImageError> {
    writer.data(Image::CkptPages, *id, block).map_err(ImageError::output)
}

fn unpack_all(reader: &mut Reader<File>, writer: &mut Writer<File>) -> Result<(), ImageError> {
    type Unpacked = (u64, Result<(Vec<u8>, Facts), String>);
    let put = |writer: &mut Writer<File>, (id, plain): Unpacked| {
        let (plain, facts) =
            plain.map_err(|what| ImageError::Stream { file: Image::CkptPages.file_name(id), what })?;
        writer
            .bulk_data(id, plain.len() as u64, facts)
            .and_then(|()| writer.output().write_all(&plain))
            .map_err(ImageError::output)
    };
    let mut pool = Pool::start()?;
    while let Some(frame) = reader.next_frame()? {
        match &frame {
            Frame::Data { image, arg, len, .. } if image == Image::CkptPages.name() => {
                if *len == 0 {
                    writer.data_header(Image::Pages.name(), *arg, 0).map_err(ImageError::output)?;
                    continue;
                }
                let id = *arg;
                let block = reader.payload((HEADER + pack::MAX_PLAIN) as u64)?;
                let done = pool.push(move || (id, unpack(&block)));
                done.map_or(Ok(()), |done| put(writer, done))?;
            }
            _ => {
                // Nothing overtakes the pages before it.
                while let Some(done) = pool.pop() {
                    put(writer, done)?;
                }
                stage::forward(reader, &frame, writer)?;
            }
        }
    }
    while let Some(done) = pool.pop() {
        put(writer, done)?;
    }
    Ok(())
}

/// The pages in one block, and what is to be said of them.
fn unpack(block: &[u8]) -> Result<(Vec<u8>, Facts), String> {
    let (header, stored) = pack::split(block).map_err(|e| e.to_string())?;
    let plain = header.unpack(stored).map_err(|e| e.to_string())?;
    let facts = Facts::of(&plain);
    Ok((plain, facts))
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that work on pieces of a sequence; results come in its order.
struct Pool<T> {
    jobs: Sender<Job>,
    pending: VecDeque<Receiver<T>>,
    depth: usize,
}

impl<T: Send + 'static> Pool<T> {
    fn start() -> Result<Self, ImageError> {
        let workers = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..workers {
            let queue = Arc::clone(&queue);
            start(move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { break };
                    job();
                }
            })?;
        }
        Ok(Self { jobs, pending: VecDeque::new(), depth: workers * DEPTH })
    }

    /// Hands in the next piece of work. If there are enough of them already, the oldest one's result.
    fn push(&mut self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let done = if self.pending.len() >= self.depth { self.pop() } else { None };
        let (result, receiver) = channel();
        self.pending.push_back(receiver);
        let job = move || {
            let _ = result.send(work());
        };
        self.jobs.send(Box::new(job)).expect("the workers live as long as there can be jobs");
        done
    }

    /// The oldest result, when it is there; `None` if all have been given.
    fn pop(&mut self) -> Option<T> {
        let oldest = self.pending.pop_front()?;
        Some(oldest.recv().expect("every job sends its result"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Seek};

    use super::*;

    fn hello() -> Hello {
        Hello { page_size: 4096, arch: 1, ..Hello::default() }
    }

    fn stream(fill: impl FnOnce(&mut Writer<File>) -> io::Result<()>) -> File {
        let mut writer = Writer::open(tempfile::tempfile().unwrap(), hello()).unwrap();
        fill(&mut writer).unwrap();
        let mut file = writer.end().unwrap();
        file.rewind().unwrap();
        file
    }

    fn recoded(input: File, recode: Recode) -> Result<File, ImageError> {
        let (reader, hello) = Reader::open(input)?;
        let mut output = tempfile::tempfile().unwrap();
        run(reader, hello, output.try_clone().unwrap(), recode)?;
        output.rewind().unwrap();
        Ok(output)
    }

    /// Everything about pages that is in a stream.
    fn pages(input: File) -> (Vec<u8>, Vec<u8>, bool) {
        let (mut reader, hello) = Reader::open(input).unwrap();
        let mut all = (Vec::new(), Vec::new(), hello.packed());
        while let Some(frame) = reader.next_frame().unwrap() {
            let Frame::Data { image, arg, .. } = frame else { continue };
            assert_eq!(image, Image::Pages.name());
            let bytes = reader.payload(1 << 30).unwrap();
            if arg == 1 { all.0.extend(bytes) } else { all.1.extend(bytes) }
        }
        all
    }

    #[test]
    fn pages_come_back_in_their_order() {
        let one: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let two = vec![0; 5 << 20];
        let plain = stream(|w| {
            w.bulk()?;
            w.data(Image::Pages, 1, &one[..4096])?;
            w.data(Image::Pages, 2, &two)?;
            w.data(Image::Pages, 1, &one[4096..])
        });
        for codec in [Codec::Lz4, Codec::Zstd(1)] {
            let mut input = plain.try_clone().unwrap();
            input.rewind().unwrap();
            let mut packed = recoded(input, Recode::Pack(codec)).unwrap();
            assert!(packed.metadata().unwrap().len() < (one.len() / 2) as u64);
            let again = recoded(packed.try_clone().unwrap(), Recode::Pack(codec)).unwrap();
            assert_eq!(again.metadata().unwrap().len(), packed.metadata().unwrap().len());
            packed.rewind().unwrap();
            let got = pages(recoded(packed, Recode::Unpack).unwrap());
            assert!(got == (one.clone(), two.clone(), false));
        }
    }

    #[test]
    fn damage_is_told_as_such() {
        let input = stream(|w| {
            w.bulk_data(1, 4096, Facts { sum: Some(1), zeros: Vec::new() })?;
            w.output().write_all(&[1; 4096])
        });
        assert!(recoded(input, Recode::Pack(Codec::Lz4)).unwrap_err().is_corruption());
        let mut bytes = Vec::new();
        let input = stream(|w| w.data(Image::Pages, 1, &[1; 4096]));
        recoded(input, Recode::Pack(Codec::Lz4)).unwrap().read_to_end(&mut bytes).unwrap();
        let at = bytes.windows(4).position(|four| four == b"CKPB").unwrap() + HEADER + 1;
        bytes[at] ^= 1;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let error = recoded(file, Recode::Unpack).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("checksum"), "{error}");
    }

    #[test]
    fn a_reader_that_was_not_told_refuses_compressed_pages() {
        let input = stream(|w| w.data(Image::CkptPages, 1, &pack::pack(Codec::Lz4, &[1; 4096])));
        let (mut reader, _) = Reader::open(input).unwrap();
        assert!(reader.next_frame().is_err());
    }

    #[test]
    fn a_failure_reaches_the_reader_behind() {
        let mut input = stream(|w| w.data(Image::Pages, 1, &[1; 4096]));
        let len = input.metadata().unwrap().len();
        input.set_len(len - 1).unwrap();
        input.rewind().unwrap();
        let (reader, hello) = Reader::open(input).unwrap();
        let (mut reader, hello) = before(reader, hello, Recode::Pack(Codec::Lz4)).unwrap();
        assert!(hello.packed());
        let error = loop {
            match reader.next_frame() {
                Ok(Some(_)) => {}
                other => break other.unwrap_err(),
            }
        };
        assert!(matches!(error, StreamError::Aborted { .. }), "{error}");
    }
}
