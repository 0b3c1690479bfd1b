//! Checkpoint images and streams: the schema's types, the catalogue of images, and the two codecs.
//!
//! - [`types`]: the messages of `schema/*.proto`, wire-compatible with CRIU 4.x.
//! - [`catalogue`]: one table of image kinds that every reader and writer uses.
//! - [`check`]: is a message what it is said to be?
//! - [`file`]: image files, as they lie in a directory.
//! - [`stream`]: the same contents as frames on a pipe.
//!
//! All decoding is total: input is hostile, allocation is bounded by [`MAX_MESSAGE`], and each
//! malformed byte is an error that names where it was found.

pub mod catalogue;
pub mod check;
pub mod file;
pub mod stream;

/// The messages of `schema/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod types {
    include!(concat!(env!("OUT_DIR"), "/ckpt.rs"));
}

pub use catalogue::{Image, Payload, PayloadLen};
pub use prost::{DecodeError, Message};

/// Largest image message that is accepted, bytes. The largest that CRIU is known to write
/// (an `mm_entry` of a task with 65,530 mappings, the kernel's default limit) is under 8 MiB.
pub const MAX_MESSAGE: u32 = 64 << 20;

/// Descriptors of all messages, for code that treats messages by description.
///
/// # Panics
/// Never: the descriptors are made by this crate's build.
#[must_use]
pub fn descriptors() -> &'static prost_reflect::DescriptorPool {
    static POOL: std::sync::OnceLock<prost_reflect::DescriptorPool> = std::sync::OnceLock::new();
    POOL.get_or_init(|| {
        prost_reflect::DescriptorPool::decode(
            &include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"))[..],
        )
        .expect("descriptors written by build.rs decode")
    })
}

/// Description of a message by its short name (`core_entry`).
#[must_use]
pub fn message_descriptor(name: &str) -> Option<prost_reflect::MessageDescriptor> {
    descriptors().get_message_by_name(&format!("ckpt.{name}"))
}
