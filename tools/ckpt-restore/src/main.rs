//! Rebuilds the processes of a checkpoint.
fn main() {}
