//! Prints checkpoint images and streams.
fn main() {}
