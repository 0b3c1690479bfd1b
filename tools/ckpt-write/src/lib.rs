//! Writes a checkpoint stream to an image directory.
