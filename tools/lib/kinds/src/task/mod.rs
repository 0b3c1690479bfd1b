//! What a task is besides its memory and files.
