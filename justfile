# What developers and CI run. `./just RECIPE` works without an installed just.

set shell := ["bash", "-euo", "pipefail", "-c"]

target := env("CARGO_TARGET_DIR", justfile_directory() / "target")

# List the recipes.
default:
    @just --list

# Install what demo and tests need (idempotent, quick when all is there).
setup:
    @tests/setup.sh

# A server is checkpointed in mid-conversation, killed, and answers on from an earlier state.
demo: setup
    @cargo build --quiet --bins
    @CKPT_BIN_DIR="{{ target }}/debug" tests/demo

# All tests, end to end ones on real programs included; arguments go to the test binary.
test *ARGS: setup
    cargo build --workspace --bins
    cargo test --workspace --no-fail-fast -- --test-threads 2 {{ ARGS }}

# Format and lints, nothing allowed to warn.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# Manual pages without a complaint from mandoc.
man: setup
    tests/lint-man

# What CI calls: everything that can fail.
ci: lint man test

# The same by the name that style guides use.
check: ci

# A benchmark by NAME and with SIZE, whose table in docs/performance.md is renewed, and its plot.
record *ARGS: setup
    cargo build --quiet --release --bins
    @cargo build --quiet --release -p ckpt-tests --bin bench
    @CKPT_BIN_DIR="{{ target }}/release" tests/record-bench {{ ARGS }}

# Benchmarks, each as a ratio to its yardstick: all of them, or one by NAME and with SIZE (`just bench pages 256`).
bench *ARGS: setup
    cargo build --quiet --release --bins
    @cargo build --quiet --release -p ckpt-tests --bin bench
    @CKPT_BIN_DIR="{{ target }}/release" "{{ target }}/release/bench" {{ ARGS }}
