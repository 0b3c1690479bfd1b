//! Completes the sockets of a checkpoint stream.
