//! Adds page contents to a checkpoint stream.
fn main() {}
