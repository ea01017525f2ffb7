#!/bin/sh
# Fuzzes the wire protocol with a stable compiler: run.sh [RUNS] [libFuzzer options]. 100,000 runs if not said.
set -eu
cd "$(dirname "$0")"
runs=${1:-100000}
[ $# -eq 0 ] || shift
target=${CARGO_TARGET_DIR:-target}
# named, so that build scripts and macros, which run here too, are not instrumented
host=$(rustc -vV | sed -n 's/^host: //p')
# what cargo-fuzz passes, less the sanitizer, which needs a nightly compiler: there is no unsafe code to find with it
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
    CARGO_TARGET_DIR=$target cargo build --quiet --release --target "$host" --bin wire
CARGO_TARGET_DIR=$target/plain cargo run --quiet --release --bin seeds -- ../../docs/vectors "$target/seeds"
mkdir -p "$target/corpus"
exec "$target/$host/release/wire" -runs="$runs" -max_len=1024 -timeout=5 -malloc_limit_mb=64 -rss_limit_mb=1024 \
    -print_final_stats=1 "$@" "$target/corpus" "$target/seeds"
