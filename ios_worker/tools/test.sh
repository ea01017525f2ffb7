#!/bin/sh
# Everything about the Swift part that can be tested on this machine; `make test-swift`. Installs what is missing if it
# may. What cannot be run here is named at the end, and is no failure.
#
#   toolchain   Swift 6 of this machine, or tools/swift-on-linux.sh (root, Debian)
#   lint        swift format, strictly
#   build       debug and release
#   tests       golden vectors, properties, stage, reference evaluation, server over sockets, loader and app with stand-ins
#               that behave as iOS does; line coverage >= 90 % of the targets without I/O
#   types       the files that Linux cannot build, against stub modules
#   project     the Xcode project's structure, its scheme and assets, and rules of the app's sources, with planted faults
#   memory      what verifying and pushing a large directory takes, and that a second start does not read it again
#   interop     dim-host and dim-split against the Swift worker, and tests/swift-interop.rs, if they are built; round
#               trips against a Rust worker's, both ends on one core: shown, not judged
set -eu
cd "$(dirname "$0")/.."
skipped=
skip() { skipped="$skipped
  - $1"; }
say() { printf '== ios_worker: %s\n' "$*"; }

if ! tools/swift6 true 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        tools/swift-on-linux.sh || { say "NOT RUN: Swift 6 could not be installed here"; exit 0; }
    else
        say "NOT RUN: no Swift 6 here; on Debian: sudo ios_worker/tools/swift-on-linux.sh, on macOS: Xcode 16"
        exit 0
    fi
elif [ "$(uname -s)" = Linux ] && ! command -v swift >/dev/null; then
    tools/swift-on-linux.sh
fi
if ! tools/swift6 true; then
    say "NOT RUN: Swift 6 is installed but cannot be entered here (see above)"
    exit 0
fi
jobs=${DIM_SWIFT_JOBS:-$(getconf _NPROCESSORS_ONLN)}

say lint
tools/swift6 swift format lint --strict -r Package.swift Sources Tests App

say "build, release"
tools/swift6 swift build -j "$jobs" -c release --product dim-worker-swift 2>&1 | tail -n 3
test -x .build/release/dim-worker-swift

say "build, debug, and tests"
log=.build/tests.log
if ! tools/swift6 swift test -j "$jobs" --enable-code-coverage >"$log" 2>&1; then
    grep -E 'error|✘|recorded' "$log" | head -n 60 || tail -n 60 "$log"
    exit 1
fi
grep -E 'Test run with' "$log"

say coverage
report=$(tools/swift6 swift test --show-codecov-path)
python3 tools/coverage.py "$report" 90 DIMCrypto DIMWire DIMStage DIMPhone

if [ "$(uname -s)" = Linux ]; then
    say types
    tools/typecheck.sh
fi

say project
python=.build/venv/bin/python
if "$python" -c 'import openstep_parser' 2>/dev/null ||
    { python3 -m venv .build/venv && .build/venv/bin/pip install -q --disable-pip-version-check openstep-parser==2.0.3; }; then
    PYTHONDONTWRITEBYTECODE=1 "$python" tools/check_project.py
else
    skip "the Xcode project's structure: openstep-parser could not be installed"
fi

bin=${DIM_BIN:-$PWD/../target/release}
say memory
if [ -x "$bin/dim-host" ]; then
    python3 tools/memory.py 300000000 "$PWD/tools/swift6" "$PWD/.build/release/dim-worker-swift" -- "$bin/dim-host"
else
    python3 tools/memory.py 300000000 "$PWD/tools/swift6" "$PWD/.build/release/dim-worker-swift"
    skip "the memory of a push: run make build first"
fi

if [ -x "$bin/dim-host" ] && [ -x "$bin/dim-split" ] && [ -x "$bin/dim-synth" ] && [ "$(uname -s)" = Linux ]; then
    say interop
    python3 tools/interop.py "$bin" "$PWD/tools/swift6" "$PWD/.build/release/dim-worker-swift"
    if [ -x "$bin/examples/swift-interop" ]; then
        "$bin/examples/swift-interop" "$PWD/tools/swift6" "$PWD/.build/release/dim-worker-swift"
        taskset -c 0 "$bin/examples/swift-interop" --bench "$PWD/tools/swift6" "$PWD/.build/release/dim-worker-swift"
    else
        skip "the Rust host against the Swift worker by hand: cargo build --release --example swift-interop first"
    fi
else
    skip "dim-host with the Swift worker: run make build first"
fi

skip "Core ML itself, the app in Xcode, anything on a device: see docs/LIMITATIONS.md"
say "passed. Not run:$skipped"
