//! What can go wrong with images.

use std::{io, path::PathBuf};

use ckpt_proto::{file::FileError, stream::StreamError};
use ckpt_sys::SysError;

/// Why images could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A system call on a file or directory failed.
    #[error("{}: {call}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Bytes could not be moved.
    #[error("{file}")]
    Transfer {
        /// Into or out of which file.
        file: String,
        /// What failed.
        #[source]
        source: SysError,
    },
    /// A checkpoint of which pages were freed.
    #[error(
        "{}: pages that later checkpoints have replaced were freed (ckpt-merge --dedup); only those can be restored",
        path.display()
    )]
    Freed {
        /// Its directory.
        path: PathBuf,
    },
    /// The directory is there already.
    #[error("{} exists already; checkpoints are never overwritten", path.display())]
    Exists {
        /// Which one.
        path: PathBuf,
    },
    /// An image file is malformed.
    #[error("{file}")]
    File {
        /// Which file.
        file: String,
        /// Where and what.
        #[source]
        source: FileError,
    },
    /// The stream is malformed or ended early.
    #[error(transparent)]
    FromStream(#[from] StreamError),
    /// Frames of an image contradict each other.
    #[error("{file}: {what}")]
    Stream {
        /// The image's file name.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// The directory is not what its manifest says.
    #[error(
        "{file}: {what} (ckpt-manifest.img says so; delete ckpt-manifest.img if the images were edited on purpose)"
    )]
    Manifest {
        /// Which file.
        file: String,
        /// What differs.
        what: String,
    },
    /// An image that has to be there is not.
    #[error("{file} is missing")]
    Missing {
        /// Which file.
        file: String,
    },
    /// A message is not what was asked for.
    #[error("{file}: entry {index}")]
    Decode {
        /// Which file.
        file: String,
        /// Which entry, counted from zero.
        index: usize,
        /// What is wrong.
        #[source]
        source: ckpt_proto::DecodeError,
    },
    /// More than is ever kept in memory.
    #[error("{file}: {what}")]
    TooMuch {
        /// Which file.
        file: String,
        /// What there is too much of.
        what: String,
    },
    /// Not a file of the kind that an image is.
    #[error("{file} is not a regular file")]
    NotAFile {
        /// Which file.
        file: String,
    },
}

impl ImageError {
    pub(crate) fn io(path: impl Into<PathBuf>, call: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, call, source }
    }

    pub(crate) fn errno(
        path: impl Into<PathBuf>,
        call: &'static str,
    ) -> impl FnOnce(nix::errno::Errno) -> Self {
        let path = path.into();
        move |errno| Self::Io { path, call, source: errno.into() }
    }

    /// The stream could not be written.
    #[must_use]
    pub fn output(source: io::Error) -> Self {
        Self::Io { path: "stream".into(), call: "write", source }
    }

    /// Whether the images are at fault rather than the machine.
    #[must_use]
    pub fn is_corruption(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Transfer { .. } | Self::Exists { .. } | Self::Freed { .. } => false,
            Self::File { source, .. } => !matches!(source, FileError::Io { .. }),
            Self::FromStream(source) => !matches!(source, StreamError::Io { .. }),
            _ => true,
        }
    }
}
