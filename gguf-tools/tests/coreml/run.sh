#!/bin/sh
# Checks the Core ML packages that dim-split writes: run.sh [TEST...]
#
# Makes a virtual environment of its own under target/, with what requirements.txt names from PyPI, and builds the
# programs it needs unless DIM_BIN names a folder that has them.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}

venv=$target/coreml-venv
if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/installed"
fi

if [ -z "${DIM_BIN:-}" ]; then
    (cd "$root" && cargo build --quiet --release -p gguf-tools --bins --example coreml-oracle)
    DIM_BIN=$target/release
fi
PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" "$here/check.py" "$DIM_BIN" "$@"
