//! Edits the sockets of a checkpoint stream.
