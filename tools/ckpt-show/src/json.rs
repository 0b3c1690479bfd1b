//! Messages as JSON and back.
//!
//! | protobuf | JSON |
//! | --- | --- |
//! | message | object; keys are the schema's field names; fields that are absent are left out |
//! | repeated field | array |
//! | number | number; beyond 2^53 a string of its digits, since jq and others compute with doubles |
//! | bool, string | the same |
//! | enum | its name; a number where the schema has no name for it |
//! | bytes | a string if they are printable UTF-8, else `{"hex": "00ff"}` |
//! | fields that the schema does not know | `"unknown_fields": {"hex": ...}`, encoded |
//!
//! The two directions are exact inverses: what `ckpt-show` prints, `ckpt-encode` turns into the very bytes
//! that it was made of.

use ckpt_proto::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value as Field, bytes::Bytes};
use serde_json::{Map, Value};

/// Key of what the schema does not know.
const UNKNOWN: &str = "unknown_fields";

/// JSON that is not what a message should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub struct JsonError {
    /// Where: message and field names.
    pub at: String,
    /// What is wrong.
    pub what: String,
}

impl JsonError {
    /// An error at `at`.
    pub fn new(at: impl Into<String>, what: impl Into<String>) -> Self {
        Self { at: at.into(), what: what.into() }
    }
}

/// Bytes as JSON.
#[must_use]
pub fn bytes_to_json(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => Value::String(text.to_owned()),
        _ => hex(bytes),
    }
}

fn hex(bytes: &[u8]) -> Value {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Value::Object(Map::from_iter([("hex".to_owned(), Value::String(text))]))
}

/// Bytes of what [`bytes_to_json`] made.
///
/// # Errors
/// It is neither a string nor `{"hex": ...}`.
pub fn bytes_from_json(value: &Value, at: &str) -> Result<Vec<u8>, JsonError> {
    let bad = || JsonError::new(at, "bytes are a string or {\"hex\": \"00ff\"}");
    let digits = match value {
        Value::String(text) => return Ok(text.clone().into_bytes()),
        Value::Object(object) if object.len() == 1 => {
            object.get("hex").and_then(Value::as_str).ok_or_else(bad)?
        }
        _ => return Err(bad()),
    };
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|n| u8::try_from(n).ok());
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else { return Err(bad()) };
    pairs
        .iter()
        .map(|&[high, low]| Some(nibble(high)? << 4 | nibble(low)?))
        .collect::<Option<_>>()
        .ok_or_else(bad)
}

/// An encoded message as JSON.
///
/// # Errors
/// It is no such message.
pub fn message_to_json(
    descriptor: &MessageDescriptor,
    bytes: &[u8],
) -> Result<Value, ckpt_proto::DecodeError> {
    Ok(to_json(&DynamicMessage::decode(descriptor.clone(), bytes)?))
}

fn to_json(message: &DynamicMessage) -> Value {
    let mut object = Map::new();
    for (field, value) in message.fields() {
        object.insert(field.name().to_owned(), field_to_json(&field.kind(), value));
    }
    let mut unknown = Vec::new();
    for field in message.unknown_fields() {
        field.encode(&mut unknown);
    }
    if !unknown.is_empty() {
        object.insert(UNKNOWN.to_owned(), hex(&unknown));
    }
    Value::Object(object)
}

/// `n`, whose absolute value is given, in a form that survives programs that know no integers but doubles.
fn exact<N: Into<Value> + ToString>(n: N, absolute: u64) -> Value {
    if absolute > 1 << 53 { n.to_string().into() } else { n.into() }
}

fn field_to_json(kind: &Kind, value: &Field) -> Value {
    match value {
        Field::Bool(b) => (*b).into(),
        Field::I32(n) => (*n).into(),
        Field::I64(n) => exact(*n, n.unsigned_abs()),
        Field::U32(n) => (*n).into(),
        Field::U64(n) => exact(*n, *n),
        Field::F32(n) => f64::from(*n).into(),
        Field::F64(n) => (*n).into(),
        Field::String(s) => s.as_str().into(),
        Field::Bytes(bytes) => bytes_to_json(bytes),
        Field::EnumNumber(n) => match kind {
            Kind::Enum(e) => e.get_value(*n).map_or_else(|| (*n).into(), |v| v.name().into()),
            _ => (*n).into(),
        },
        Field::Message(message) => to_json(message),
        Field::List(list) => list.iter().map(|value| field_to_json(kind, value)).collect(),
        // The schema has no maps.
        Field::Map(_) => Value::Null,
    }
}

/// Encodes the message that `value` stands for.
///
/// # Errors
/// Where it is not what the schema says. A missing required field is an error too.
pub fn message_from_json(
    descriptor: &MessageDescriptor,
    value: &Value,
    at: &str,
) -> Result<Vec<u8>, JsonError> {
    let bytes = from_json(descriptor, value, at)?.encode_to_vec();
    ckpt_proto::check::check_message(descriptor.name(), &bytes)
        .map_err(|e| JsonError::new(at, e.to_string()))?;
    Ok(bytes)
}

fn from_json(descriptor: &MessageDescriptor, value: &Value, at: &str) -> Result<DynamicMessage, JsonError> {
    let Value::Object(object) = value else {
        return Err(JsonError::new(at, format!("a {} is an object", descriptor.name())));
    };
    let mut message = DynamicMessage::new(descriptor.clone());
    for (name, value) in object {
        let at = format!("{at}.{name}");
        if name == UNKNOWN {
            let bytes = bytes_from_json(value, &at)?;
            message.merge(&bytes[..]).map_err(|e| JsonError::new(at, e.to_string()))?;
            continue;
        }
        let Some(field) = descriptor.get_field_by_name(name) else {
            return Err(JsonError::new(at, format!("{} has no such field", descriptor.name())));
        };
        let value = if field.is_list() {
            let Value::Array(list) = value else { return Err(JsonError::new(at, "this field is an array")) };
            Field::List(
                list.iter().map(|value| field_from_json(&field, value, &at)).collect::<Result<_, _>>()?,
            )
        } else {
            field_from_json(&field, value, &at)?
        };
        message.try_set_field(&field, value).map_err(|e| JsonError::new(at, e.to_string()))?;
    }
    Ok(message)
}

fn field_from_json(field: &FieldDescriptor, value: &Value, at: &str) -> Result<Field, JsonError> {
    let bad = |what: &str| JsonError::new(at, format!("this field is {what}"));
    fn int<T: TryFrom<i128>>(value: &Value) -> Option<T> {
        let n = match value {
            Value::String(digits) => digits.parse().ok(),
            value => value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from)),
        };
        n.and_then(|n| T::try_from(n).ok())
    }
    Ok(match field.kind() {
        Kind::Bool => Field::Bool(value.as_bool().ok_or_else(|| bad("true or false"))?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            Field::I32(int(value).ok_or_else(|| bad("a signed number of 32 bits"))?)
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
            Field::I64(int(value).ok_or_else(|| bad("a signed number of 64 bits"))?)
        }
        Kind::Uint32 | Kind::Fixed32 => Field::U32(int(value).ok_or_else(|| bad("a number of 32 bits"))?),
        Kind::Uint64 | Kind::Fixed64 => Field::U64(int(value).ok_or_else(|| bad("a number of 64 bits"))?),
        #[expect(clippy::cast_possible_truncation, reason = "nothing in the schema is a float")]
        Kind::Float => Field::F32(value.as_f64().ok_or_else(|| bad("a number"))? as f32),
        Kind::Double => Field::F64(value.as_f64().ok_or_else(|| bad("a number"))?),
        Kind::String => Field::String(value.as_str().ok_or_else(|| bad("a string"))?.to_owned()),
        Kind::Bytes => Field::Bytes(Bytes::from(bytes_from_json(value, at)?)),
        Kind::Enum(e) => Field::EnumNumber(match value {
            Value::String(name) => e
                .get_value_by_name(name)
                .ok_or_else(|| bad(&format!("one of the names of {}", e.name())))?
                .number(),
            value => int(value).ok_or_else(|| bad("a name or a number"))?,
        }),
        Kind::Message(descriptor) => Field::Message(from_json(&descriptor, value, at)?),
    })
}

#[cfg(test)]
mod tests {
    use ckpt_proto::types::{ManifestEntry, PstreeEntry, SkOptsEntry, UnixSkEntry};

    use super::*;

    fn round_trip(name: &str, bytes: &[u8]) -> Value {
        let descriptor = ckpt_proto::message_descriptor(name).unwrap();
        let json = message_to_json(&descriptor, bytes).unwrap();
        let parsed: Value = serde_json::from_str(&json.to_string()).unwrap();
        assert_eq!(message_from_json(&descriptor, &parsed, name).unwrap(), bytes, "{json}");
        json
    }

    #[test]
    fn odd_bytes_and_large_numbers_survive() {
        for name in
            [&b""[..], b"/run/a b", "/run/\u{fc}".as_bytes(), b"\0abstract", b"\xff\xfe", b"{\"hex\":1}\n"]
        {
            let socket = UnixSkEntry {
                name: name.to_vec(),
                opts: SkOptsEntry { so_snd_tmo_sec: u64::MAX, ..Default::default() },
                mnt_id: Some(-1),
                shutdown: Some(77),
                ..Default::default()
            };
            let json = round_trip("unix_sk_entry", &socket.encode_to_vec());
            assert_eq!(json["opts"]["so_snd_tmo_sec"], u64::MAX.to_string());
            assert_eq!(json["shutdown"], 77);
            assert_eq!(json["mnt_id"], -1);
        }
    }

    #[test]
    fn unknown_fields_survive() {
        let mut bytes = PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1] }.encode_to_vec();
        bytes.extend([0xa2, 0xf7, 0x04, 2, b'h', b'i']);
        round_trip("pstree_entry", &bytes);
    }

    #[test]
    fn what_is_no_message_is_named() {
        let descriptor = ckpt_proto::message_descriptor("manifest_entry").unwrap();
        for (json, part) in [
            (r#"{"name": "x"}"#, "size"),
            (r#"{"name": 5, "size": 1}"#, "m.name"),
            (r#"{"name": "x", "size": -1}"#, "m.size"),
            (r#"{"name": "x", "size": 1.5}"#, "m.size"),
            (r#"{"name": "x", "size": 1, "sise": 1}"#, "m.sise"),
            ("[]", "m"),
        ] {
            let error =
                message_from_json(&descriptor, &serde_json::from_str(json).unwrap(), "m").unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        let whole = ManifestEntry { name: "x".into(), size: 1, xxh3: Some(u64::MAX), pieces: Vec::new() };
        round_trip("manifest_entry", &whole.encode_to_vec());
    }
}
