//! Reads an image directory as a checkpoint stream.
fn main() {}
