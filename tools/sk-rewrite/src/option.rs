//! Socket options by name.
//!
//! The images have an option as a field: of the options that all sockets have, of those of IP and TCP, or
//! of the socket itself. A name is that of setsockopt(2) (`SO_KEEPALIVE`, `TCP_NODELAY`, `IP_TTL`) or of the field. Which
//! fields there are is asked of the schema, so a new one needs nothing here.

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, ReflectMessage, Value};

/// Options whose field is called otherwise.
const OTHER_NAMES: [(&str, &str); 2] = [("so_bindtodevice", "so_bound_dev"), ("ipv6_v6only", "v6only")];

/// Timeouts are two fields each.
const TIMEOUTS: [(&str, &str, &str); 2] = [
    ("so_rcvtimeo", "so_rcv_tmo_sec", "so_rcv_tmo_usec"),
    ("so_sndtimeo", "so_snd_tmo_sec", "so_snd_tmo_usec"),
];

/// Fields of a socket that are no options.
const SOCKET_OPTIONS: [&str; 2] = ["v6only", "ckpt_peek_off"];

/// Sets an option in a `file_entry` that holds a socket.
///
/// # Errors
/// No such option, or not such a value.
pub fn set_option(file: &mut DynamicMessage, name: &str, value: &str) -> Result<(), String> {
    let socket = ["usk", "isk", "psk", "nlsk"].into_iter().find(|name| file.has_field_by_name(name));
    let Some(Value::Message(socket)) = socket.and_then(|name| file.get_field_by_name_mut(name)) else {
        return Err("it has not been read by ckpt-sk".to_owned());
    };
    let lower = name.to_ascii_lowercase();
    if let Some((_, seconds, micros)) = TIMEOUTS.iter().find(|(name, ..)| *name == lower) {
        let wrong = || format!("{name}: \"{value}\" is no number of seconds");
        let time: f64 = value.parse().map_err(|_| wrong())?;
        let time = std::time::Duration::try_from_secs_f64(time).map_err(|_| wrong())?;
        let Some(Value::Message(options)) = socket.get_field_by_name_mut("opts") else { return Err(wrong()) };
        options.set_field_by_name(seconds, Value::U64(time.as_secs()));
        options.set_field_by_name(micros, Value::U64(time.subsec_micros().into()));
        return Ok(());
    }
    for part in ["tcp_opts", "ip_opts", "opts", ""] {
        if part.is_empty() {
            if let Some(field) = field(socket, &lower).filter(|f| SOCKET_OPTIONS.contains(&f.name())) {
                return set(socket, &field, name, value);
            }
            continue;
        }
        // Each part has its own prefix; TCP_KEEPIDLE is in two places, of which the first counts.
        let fits = part == "opts" || lower.starts_with(part.trim_end_matches("opts"));
        if !fits || socket.descriptor().get_field_by_name(part).is_none() {
            continue;
        }
        let Some(Value::Message(options)) = socket.get_field_by_name_mut(part) else { continue };
        if let Some(field) = field(options, &lower) {
            return set(options, &field, name, value);
        }
    }
    Err(format!("no option {name}; there are {}", known(socket).join(", ")))
}

/// Sets an option in a `tcp_stream_entry`, if it has it; it repeats some.
pub fn set_stream_option(stream: &mut DynamicMessage, name: &str, value: &str) -> Result<(), String> {
    let lower = name.to_ascii_lowercase();
    match field(stream, &lower).filter(|_| matches!(lower.as_str(), "tcp_cork" | "tcp_nodelay")) {
        Some(field) => set(stream, &field, name, value),
        None => Ok(()),
    }
}

fn field(message: &DynamicMessage, name: &str) -> Option<FieldDescriptor> {
    let name = OTHER_NAMES.iter().find(|(other, _)| *other == name).map_or(name, |(_, field)| field);
    let short = name.split_once('_').map_or(name, |(_, short)| short);
    [name.to_owned(), short.to_owned(), format!("ckpt_{short}")]
        .iter()
        .find_map(|name| message.descriptor().get_field_by_name(name))
        .filter(is_scalar)
}

fn is_scalar(field: &FieldDescriptor) -> bool {
    !field.is_list() && !matches!(field.kind(), Kind::Message(_) | Kind::Bytes)
}

fn set(message: &mut DynamicMessage, field: &FieldDescriptor, name: &str, text: &str) -> Result<(), String> {
    let number = |bits: u32| -> Result<u64, String> {
        // Negative values of int options are kept as the bits that they have.
        let parsed = match text.parse::<i64>() {
            Ok(n) if n < 0 && bits == 32 => i32::try_from(n).ok().map(|n| u64::from(n.cast_unsigned())),
            Ok(n) => u64::try_from(n).ok(),
            Err(_) => None,
        };
        let most = if bits == 32 { u64::from(u32::MAX) } else { u64::MAX };
        parsed.filter(|&n| n <= most).ok_or_else(|| format!("{name}: \"{text}\" is no number of {bits} bits"))
    };
    let value = match field.kind() {
        Kind::Bool => match text {
            "1" | "on" | "true" => Value::Bool(true),
            "0" | "off" | "false" => Value::Bool(false),
            _ => return Err(format!("{name}: \"{text}\" is neither on nor off")),
        },
        Kind::Uint32 | Kind::Fixed32 => Value::U32(u32::try_from(number(32)?).unwrap_or(0)),
        Kind::Int32 | Kind::Sint32 => Value::I32(u32::try_from(number(32)?).unwrap_or(0).cast_signed()),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(number(64)?),
        Kind::String => Value::String(text.to_owned()),
        _ => return Err(format!("{name} can't be set here")),
    };
    message.try_set_field(field, value).map_err(|error| format!("{name}: {error}"))
}

/// Names of what can be set in a socket.
fn known(socket: &DynamicMessage) -> Vec<String> {
    let mut names: Vec<String> = TIMEOUTS.iter().map(|(name, ..)| name.to_ascii_uppercase()).collect();
    for part in ["opts", "ip_opts", "tcp_opts"] {
        let Some(field) = socket.descriptor().get_field_by_name(part) else { continue };
        let Kind::Message(options) = field.kind() else { continue };
        let prefix = match part {
            "opts" => "SO_",
            "ip_opts" => "IP_",
            _ => "TCP_",
        };
        for field in options.fields().filter(is_scalar).filter(|f| !f.name().contains("_tmo_")) {
            let bare = field.name().trim_start_matches("ckpt_").to_ascii_uppercase();
            let prefixed = bare.starts_with("SO_") || bare.starts_with("TCP_");
            names.push(if prefixed { bare } else { format!("{prefix}{bare}") });
        }
    }
    names.sort();
    names.dedup();
    names
}
