//! Freezes a process tree and writes it as a checkpoint stream.
fn main() {}
