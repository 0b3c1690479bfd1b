//! Checkpoints and restores process trees in one command.
fn main() {}
