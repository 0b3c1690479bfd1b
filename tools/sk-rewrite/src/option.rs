//! Socket options by name, from the table by which they are dumped and restored ([`ckpt_kinds::fd::sockopt`]).

use ckpt_kinds::fd::sockopt::{self, Class, OPTIONS, Options};
use ckpt_proto::types::FileEntry;

/// Of TCP connections two options are in the image of the connection too: their fields there.
const IN_STREAM: [(&str, &str); 2] = [("TCP_NODELAY", "nodelay"), ("TCP_CORK", "cork")];

/// Sets an option in an entry that holds a socket.
///
/// # Errors
/// No such option, or not such a value.
pub fn set_option(file: &mut FileEntry, name: &str, value: &str) -> Result<(), String> {
    let FileEntry { usk, isk, psk, nlsk, .. } = file;
    let (class, opts) = match (usk, isk, psk, nlsk) {
        (Some(usk), ..) => (Class::of(libc::AF_UNIX.unsigned_abs(), usk.r#type, 0), &mut usk.opts),
        (_, Some(isk), ..) => {
            let (opt, bytes) = parse(Class::of_inet(isk), name, value)?;
            let mut options = Options::of_inet(isk);
            options.put(opt, &bytes);
            options.store_inet(isk);
            return Ok(());
        }
        (_, _, Some(psk), _) => (Class::of(libc::AF_PACKET.unsigned_abs(), psk.r#type, 0), &mut psk.opts),
        (.., Some(nlsk)) => (Class::of(libc::AF_NETLINK.unsigned_abs(), 0, nlsk.protocol), &mut nlsk.opts),
        _ => return Err("it has not been read by ckpt-sk".to_owned()),
    };
    let (opt, bytes) = parse(class, name, value)?;
    let mut options = Options::of(opts);
    options.put(opt, &bytes);
    *opts = options.sk;
    Ok(())
}

fn parse(class: Class, name: &str, value: &str) -> Result<(&'static sockopt::Opt, Vec<u8>), String> {
    let known = || {
        let mut names: Vec<&str> = OPTIONS.iter().filter(|o| class.has(o)).map(|o| o.name).collect();
        names.retain(|name| sockopt::find(name, class).is_some());
        names.sort_unstable();
        names.join(", ")
    };
    let opt = sockopt::find(name, class).ok_or_else(|| format!("no option {name}; there are {}", known()))?;
    Ok((opt, opt.parse(value)?))
}

/// The field of `tcp_stream_entry` that repeats a switch, and its value.
pub fn in_stream(name: &str, value: &str) -> Option<(&'static str, bool)> {
    let (_, field) = IN_STREAM.iter().find(|(option, _)| option.eq_ignore_ascii_case(name))?;
    Some((field, matches!(value, "on" | "1")))
}
