//! Is this message what it is said to be? Answered by walking its bytes along the schema, before
//! anything is decoded.
//!
//! prost is lenient where proto2 is not: a missing required field becomes zero there, and a message
//! of two bytes can become a structure of hundreds. So the check comes first. It allocates nothing,
//! its depth is limited, and with required fields enforced a decoded message is at most a few times
//! larger than its encoding. Fields that the schema does not know are skipped: they may come from a
//! newer CRIU, and tools that pass messages on pass these on too.

use prost_reflect::{Cardinality, Kind, MessageDescriptor};

/// Deepest nesting of messages. The schema's own is five.
const MAX_DEPTH: u32 = 32;

/// What is wrong with an encoded message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}: byte {offset}: {what}")]
pub struct MessageError {
    /// Name of the innermost message type.
    pub message: String,
    /// Where in that message.
    pub offset: usize,
    /// What is wrong.
    pub what: String,
}

/// Checks that `bytes` are a well-formed message of type `name` (`core_entry`), with nothing required
/// missing. A name that the schema does not have passes unchecked.
///
/// # Errors
/// What is wrong with it.
pub fn check_message(name: &str, bytes: &[u8]) -> Result<(), MessageError> {
    match crate::message_descriptor(name) {
        Some(descriptor) => check(&descriptor, bytes, MAX_DEPTH),
        None => Ok(()),
    }
}

struct Cursor<'a> {
    message: &'a MessageDescriptor,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, what: impl Into<String>) -> MessageError {
        MessageError { message: self.message.name().to_owned(), offset: self.offset, what: what.into() }
    }

    fn is_empty(&self) -> bool {
        self.offset >= self.bytes.len()
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], MessageError> {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(taken) => {
                self.offset += taken.len();
                Ok(taken)
            }
            None => Err(self.error(format!("{len} bytes are said to follow, there are {}", rest.len()))),
        }
    }

    fn varint(&mut self) -> Result<u64, MessageError> {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        let mut value = 0;
        for (i, &byte) in rest.iter().take(10).enumerate() {
            if i == 9 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                self.offset += i + 1;
                return Ok(value);
            }
        }
        Err(self.error(if rest.len() < 10 { "ends inside a number" } else { "a number over 64 bits" }))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wire {
    Varint,
    Eight,
    Bytes,
    Four,
}

fn wire_of(kind: &Kind) -> Wire {
    match kind {
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => Wire::Eight,
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => Wire::Four,
        Kind::String | Kind::Bytes | Kind::Message(_) => Wire::Bytes,
        _ => Wire::Varint,
    }
}

fn check(message: &MessageDescriptor, bytes: &[u8], depth: u32) -> Result<(), MessageError> {
    let mut at = Cursor { message, bytes, offset: 0 };
    // Required fields have small numbers (a test sees to it).
    let mut seen = 0u128;
    while !at.is_empty() {
        let start = at.offset;
        let tag = at.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Varint,
            1 => Wire::Eight,
            2 => Wire::Bytes,
            5 => Wire::Four,
            other => return Err(MessageError { offset: start, ..at.error(format!("wire type {other}")) }),
        };
        let number = match u32::try_from(tag >> 3) {
            Ok(number @ 1..=0x1fff_ffff) => number,
            _ => {
                return Err(MessageError { offset: start, ..at.error("a field number that does not exist") });
            }
        };
        let contents = match wire {
            Wire::Varint => {
                at.varint()?;
                &[]
            }
            Wire::Eight => at.take(8)?,
            Wire::Four => at.take(4)?,
            Wire::Bytes => {
                let len = at.varint()?;
                at.take(len)?
            }
        };
        let Some(field) = message.get_field(number) else { continue };
        let kind = field.kind();
        let expected = wire_of(&kind);
        let wrong =
            |what: String| MessageError { offset: start, ..at.error(format!("{}: {what}", field.name())) };
        if wire == expected {
            match kind {
                Kind::Message(inner) => {
                    if depth == 0 {
                        return Err(wrong("nested too deeply".to_owned()));
                    }
                    check(&inner, contents, depth - 1)?;
                }
                Kind::String if std::str::from_utf8(contents).is_err() => {
                    return Err(wrong("not UTF-8".to_owned()));
                }
                _ => {}
            }
        } else if wire == Wire::Bytes && field.is_list() {
            packed(message, expected, contents).map_err(|e| wrong(e.what))?;
        } else {
            return Err(wrong("of another type".to_owned()));
        }
        if number < 128 {
            seen |= 1 << number;
        }
    }
    for field in message.fields() {
        let number = field.number();
        if field.cardinality() == Cardinality::Required && number < 128 && seen & (1 << number) == 0 {
            return Err(at.error(format!("the required field {} is missing", field.name())));
        }
    }
    Ok(())
}

fn packed(message: &MessageDescriptor, wire: Wire, bytes: &[u8]) -> Result<(), MessageError> {
    let mut at = Cursor { message, bytes, offset: 0 };
    while !at.is_empty() {
        match wire {
            Wire::Varint => drop(at.varint()?),
            Wire::Eight => drop(at.take(8)?),
            Wire::Four => drop(at.take(4)?),
            Wire::Bytes => return Err(at.error("of another type")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::types;

    #[test]
    fn required_fields_have_small_numbers() {
        for message in crate::descriptors().all_messages() {
            for field in message.fields().filter(|f| f.cardinality() == Cardinality::Required) {
                assert!(field.number() < 128, "{}", field.full_name());
            }
        }
    }

    #[test]
    fn what_is_required_may_not_be_missing() {
        let whole =
            types::PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1, 2] }.encode_to_vec();
        check_message("pstree_entry", &whole).unwrap();
        let error = check_message("pstree_entry", &whole[..2]).unwrap_err();
        assert!(error.what.contains("ppid"), "{error}");
    }

    #[test]
    fn packed_lists_are_lists_too() {
        let mut bytes =
            types::PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![] }.encode_to_vec();
        bytes.extend([5 << 3 | 2, 3, 0x80, 1, 7]);
        check_message("pstree_entry", &bytes).unwrap();
        assert_eq!(types::PstreeEntry::decode(&bytes[..]).unwrap().threads, [128, 7]);
        *bytes.last_mut().unwrap() = 0x80;
        check_message("pstree_entry", &bytes).unwrap_err();
    }

    #[test]
    fn deep_nesting_is_refused() {
        // The schema has no recursive message; an unknown field is not looked into.
        let mut bytes = vec![];
        for _ in 0..10_000 {
            let mut outer = vec![];
            prost::encoding::encode_key(600, prost::encoding::WireType::LengthDelimited, &mut outer);
            prost::encoding::encode_varint(bytes.len() as u64, &mut outer);
            outer.append(&mut bytes);
            bytes = outer;
        }
        check_message("pstree_entry", &bytes).unwrap_err();
    }

    fn names() -> Vec<String> {
        crate::descriptors().all_messages().map(|m| m.name().to_owned()).collect()
    }

    proptest! {
        #[test]
        fn what_passes_can_be_decoded(name in proptest::sample::select(names()), bytes: Vec<u8>) {
            if check_message(&name, &bytes).is_ok()
                && let Some(descriptor) = crate::message_descriptor(&name)
            {
                prost_reflect::DynamicMessage::decode(descriptor, &bytes[..]).unwrap();
            }
        }
    }
}
