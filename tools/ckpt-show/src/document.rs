//! A set of images as one JSON document.
//!
//! ```text
//! {"ckpt_show": 1, "hello": {...}, "images": [
//! {"image": "PSTREE", "arg": 0, "file": "pstree.img", "entries": [
//!   {"pid": 7, "ppid": 0, "pgid": 7, "sid": 7, "threads": [7]}]},
//! {"image": "PIPES_DATA", "arg": 0, "file": "pipes-data.img", "entries": [
//!   {"pipe_id": 1, "bytes": 5, "payload": "hello"}]},
//! {"image": "PAGES", "arg": 1, "file": "pages-1.img", "size": 8192},
//! {"image": "CKPT_PAGES", "arg": 2, "file": "ckpt-pages-2.img", "size": 310, "pages": 8192}]}
//! ```
//!
//! `hello` is there for a stream only. `payload` holds the raw contents that follow an entry (queued
//! bytes, contents of deleted files), as bytes are shown everywhere; `{"size": N}` stands for contents
//! over the limit. Of pages there is only the size;
//! of compressed ones also `pages`, the bytes that they unpack to. Keys may be added in later releases; none is
//! removed, and none changes its meaning, without another number after `ckpt_show`.

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context, anyhow};
use ckpt_images::ImageSet;
use ckpt_proto::{Image, Message, Payload};
use serde_json::{Value, json};

use crate::json::{bytes_to_json, message_to_json};

/// Number of the format.
pub const FORMAT: u64 = 1;

/// How to show what.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Raw contents over this many bytes are shown as their size only.
    pub payload: u64,
}

/// Writes the document of `set`; `pages` are the sizes of the pages images.
///
/// # Errors
/// The output's; images that can't be read.
pub fn write(
    set: &ImageSet,
    pages: &BTreeMap<u64, u64>,
    limits: Limits,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    write!(out, "{{\"ckpt_show\": {FORMAT}, ")?;
    if let Some(hello) = set.hello() {
        let descriptor = ckpt_proto::message_descriptor("hello").context("no message hello")?;
        write!(out, "\"hello\": {}, ", message_to_json(&descriptor, &hello.encode_to_vec())?)?;
    }
    write!(out, "\"images\": [")?;
    let mut first = true;
    for (image, arg) in set.images().filter(|(image, _)| !matches!(image, Image::Pages | Image::CkptPages)) {
        write!(out, "{}", if first { "\n" } else { ",\n" })?;
        first = false;
        write_image(set, image, arg, limits, out).with_context(|| image.file_name(arg))?;
    }
    for (&id, size) in pages {
        write!(out, "{}", if first { "\n" } else { ",\n" })?;
        first = false;
        let file = Image::Pages.file_name(id);
        write!(out, "{}", json!({"image": Image::Pages.name(), "arg": id, "file": file, "size": size}))?;
    }
    for id in set.args(Image::CkptPages) {
        write!(out, "{}", if first { "\n" } else { ",\n" })?;
        first = false;
        let image = Image::CkptPages;
        let size = set.payload(image, id, 0).map_or(0, |place| place.len);
        let pages = set.packed(id)?.map_or(0, |packed| packed.plain_len());
        let file = image.file_name(id);
        write!(
            out,
            "{}",
            json!({"image": image.name(), "arg": id, "file": file, "size": size, "pages": pages})
        )?;
    }
    writeln!(out, "]}}")?;
    Ok(())
}

fn write_image(
    set: &ImageSet,
    image: Image,
    arg: u64,
    limits: Limits,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let file = image.file_name(arg);
    if image.payload() == Payload::Raw {
        let payload = payload(set, image, arg, 0, limits)?.unwrap_or_else(|| Value::String(String::new()));
        let value = json!({"image": image.name(), "arg": arg, "file": file, "payload": payload});
        write!(out, "{value}")?;
        return Ok(());
    }
    write!(
        out,
        "{{\"image\": {}, \"arg\": {arg}, \"file\": {}, \"entries\": [",
        json!(image.name()),
        json!(file)
    )?;
    for (index, entry) in set.entries(image, arg).iter().enumerate() {
        write!(out, "{}", if index == 0 { "\n" } else { ",\n" })?;
        write!(out, "  {}", entry_to_json(set, image, arg, index, entry, limits)?)?;
    }
    write!(out, "]}}")?;
    Ok(())
}

fn entry_to_json(
    set: &ImageSet,
    image: Image,
    arg: u64,
    index: usize,
    entry: &[u8],
    limits: Limits,
) -> anyhow::Result<Value> {
    let mut value = match image.entry_message(index) {
        Some(name) => {
            let descriptor =
                ckpt_proto::message_descriptor(name).ok_or_else(|| anyhow!("no message {name}"))?;
            message_to_json(&descriptor, entry).with_context(|| format!("entry {index}"))?
        }
        // Known by name only.
        None => json!({"message": bytes_to_json(entry)}),
    };
    if let (Some(payload), Value::Object(object)) = (payload(set, image, arg, index, limits)?, &mut value) {
        object.insert("payload".to_owned(), payload);
    }
    Ok(value)
}

fn payload(
    set: &ImageSet,
    image: Image,
    arg: u64,
    index: usize,
    limits: Limits,
) -> anyhow::Result<Option<Value>> {
    let Some(place) = set.payload(image, arg, index).filter(|place| place.len > 0) else { return Ok(None) };
    if place.len > limits.payload {
        return Ok(Some(json!({"size": place.len})));
    }
    Ok(Some(bytes_to_json(&set.payload_bytes(image, arg, index, limits.payload)?)))
}
