//! Parsers of /proc files.
//!
//! All parsers take bytes, not paths: they know nothing of a live system, and paths stay bytes
//! because Linux gives no promise of UTF-8. See proc(5) and its pages.

pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod net;
pub mod stat;
pub mod status;
pub mod timers;
