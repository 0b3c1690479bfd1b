//! End-to-end tests: real processes through the real tools. One binary, so that it links once.
//!
//! - `workloads`: the workloads themselves: they pass when left alone, and every check in them can fail
//! - `memory`, `signals`, `tasks`, `files`, `sockets`, `tree`: one trip per kernel resource
//! - `sharing`: copy-on-write memory of forked processes stays shared
//! - `huge`: memory of huge pages (hugetlbfs)
//! - `snapshots`: `ckpt-scan --snapshot`: the target runs on and notices nothing
//! - `inet`: UDP, raw and other sockets that are not TCP; socket options
//! - `tcp`: connections, and the network lock
//! - `rewrite`: sk-rewrite between a checkpoint and its restore
//! - `increments`: tracking, and checkpoints that continue others
//! - `predumps`: memory copied from the running tree, ahead of a checkpoint
//! - `invariants`: attacks: tools killed, disks full, pipes closed, images damaged
//! - `lazy`: `ckpt-restore --lazy`: pages that come later, and a server that does not live to bring them
//! - `images`: compressed pages, chains of increments, checksums
//! - `denied`: system calls that the kernel denies to a tool, one at a time
//! - `disks`: a series onto a disk that is full, read-only or not there any more
//! - `privileges`: tools with few capabilities and small limits
//! - `wire`: CRIU's own images restored; ours compared with them field by field
//! - `postgres`: PostgreSQL with clients in its tree
//! - `crit`: CRIU's decoder reads all that we write
//! - `equal`: equal pages of several checkpoints share their room
//! - `programs`: bash, python, redis, sqlite, nginx
//! - `ptys`: programs that have terminals of their own: script, tmux, a shell that Python talks to
//! - `servers`: redis, nginx, gunicorn and asyncio, with clients that know every answer, inside and outside of the tree
//! - `sundry`: other programs that keep themselves busy and count
//! - `cli`: options, exit statuses, pipelines of other shapes
//! - `examples`: the lines of manual, help and README, run as they stand

#![allow(missing_docs)]

mod cli;
mod crit;
mod denied;
mod disks;
mod equal;
mod examples;
mod files;
mod huge;
mod images;
mod increments;
mod inet;
mod invariants;
mod lazy;
mod memory;
mod outside;
mod postgres;
mod predumps;
mod privileges;
mod programs;
mod ptys;
mod rewrite;
mod servers;
mod sharing;
mod signals;
mod snapshots;
mod sockets;
mod sundry;
mod tasks;
mod tcp;
mod tree;
mod wire;
mod workloads;

/// A test of the whole trip of one workload.
macro_rules! survives {
    ($($test:ident: $workload:literal;)*) => {
        $(#[test]
        fn $test() {
            ckpt_tests::Target::start($workload).survives();
        })*
    };
}
pub(crate) use survives;
