//! Image directories and sets of images.
//!
//! - [`ImageSet`]: everything that a directory or stream holds except pages, for those who need to
//!   see all of it (`ckpt-restore`, `ckpt-show`). Messages are in memory; raw contents are given as a
//!   [`Place`] in a file, to be moved by the kernel.
//! - [`DirWriter`]: a directory in the making, which appears under its name complete or not at all.
//!
//! Images are hostile input: every length is checked before it is believed, nothing outside the
//! directory is opened, no symbolic link in it is followed, and what is kept in memory is limited.

pub mod chain;
mod error;
pub mod pack;
pub mod produce;
pub mod pull;
pub mod recode;
pub mod service;
mod set;
pub mod stage;
pub mod sums;
mod write;

use std::os::fd::BorrowedFd;

use ckpt_proto::{Image, PayloadLen};

pub use chain::{PageRun, PagesFile};
pub use error::ImageError;
pub use set::{ImageSet, MAX_MEMORY};
pub use write::{Cleanup, DirWriter};

/// Raw contents as a part of a file.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The file. Its position is anybody's: use positioned reads.
    pub file: BorrowedFd<'a>,
    /// Where in it the contents start, bytes.
    pub offset: u64,
    /// How long they are, bytes.
    pub len: u64,
}

/// Follows the order of entries and contents of one image: contents belong to the entry before them
/// and are as long as it says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order {
    /// Contents still to come for the last entry; `None` before the first entry.
    missing: Option<PayloadLen>,
    entries: u64,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self { missing: None, entries: 0 }
    }

    /// An entry comes. Its number, counted from zero.
    pub(crate) fn entry(&mut self, image: Image, arg: u64, message: &[u8]) -> Result<u64, ImageError> {
        let bad = |what: String| ImageError::Stream { file: image.file_name(arg), what };
        self.complete(image, arg)?;
        if image.payload() == ckpt_proto::Payload::Raw {
            return Err(bad("a raw image has no entries".to_owned()));
        }
        if image.single() && self.entries > 0 {
            return Err(bad("a second entry, where the image holds one".to_owned()));
        }
        let index = self.entries;
        if let Some(name) = usize::try_from(index).ok().and_then(|i| image.entry_message(i)) {
            ckpt_proto::file::check_message(name, message)
                .map_err(|e| bad(format!("entry {index} is not a {name}: {e}")))?;
        }
        let len = image.payload_len(message).map_err(|e| bad(format!("entry {index}: {e}")))?;
        self.missing = Some(len);
        self.entries += 1;
        Ok(index)
    }

    /// `len` bytes of contents come.
    pub(crate) fn data(&mut self, image: Image, arg: u64, len: u64) -> Result<(), ImageError> {
        let bad = |what: String| ImageError::Stream { file: image.file_name(arg), what };
        if image.payload() == ckpt_proto::Payload::Raw || len == 0 {
            return Ok(());
        }
        match &mut self.missing {
            None => Err(bad("contents before any entry".to_owned())),
            Some(PayloadLen::Rest) => Ok(()),
            Some(PayloadLen::Exact(left)) => {
                *left = left
                    .checked_sub(len)
                    .ok_or_else(|| bad(format!("{len} bytes of contents where the entry has {left} left")))?;
                Ok(())
            }
        }
    }

    /// Nothing more comes for the last entry.
    pub(crate) fn complete(&self, image: Image, arg: u64) -> Result<(), ImageError> {
        match self.missing {
            Some(PayloadLen::Exact(left)) if left > 0 => Err(ImageError::Stream {
                file: image.file_name(arg),
                what: format!("{left} bytes of contents are missing"),
            }),
            _ => Ok(()),
        }
    }

    /// Nothing more comes at all.
    pub(crate) fn end(&self, image: Image, arg: u64) -> Result<(), ImageError> {
        if image.single() && self.entries == 0 {
            let what = "no entry, where the image holds one".to_owned();
            return Err(ImageError::Stream { file: image.file_name(arg), what });
        }
        self.complete(image, arg)
    }
}
