//! Tells which kernel features and privileges checkpoints can use.
fn main() {}
