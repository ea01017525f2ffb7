#!/bin/sh
# Type-checks, on Linux, every file that Linux cannot build: the parts of the package under `#if canImport(CoreML)`,
# `CryptoKit`, `Darwin`, and the app. The frameworks are stood in for by the declarations in Stubs/. Shows that the code
# fits those declarations, not that Xcode builds it.
set -eu
cd "$(dirname "$0")/.."
out=.build/typecheck
rm -rf "$out"
mkdir -p "$out"

# Swift 6 language mode, as the package and the app say
flags="-swift-version 6 -I $out -warnings-as-errors"

module() {
    name=$1
    shift
    # shellcheck disable=SC2086
    tools/swift6 swiftc $flags -parse-as-library -emit-module -emit-module-path "$out/$name.swiftmodule" \
        -module-name "$name" "$@"
}

for stub in os Darwin dnssd CryptoKit CoreML Network Security UIKit SwiftUI; do
    module "$stub" Stubs/$stub/*.swift
done
for target in DIMCrypto DIMWire DIMStage DIMCoreML DIMServer DIMPhone DIMReference; do
    module "$target" Sources/$target/*.swift
done
# main.swift is a script: it cannot be parsed as a library
# shellcheck disable=SC2086
tools/swift6 swiftc $flags -typecheck -module-name dim_worker_swift Sources/dim-worker-swift/*.swift
# shellcheck disable=SC2086
tools/swift6 swiftc $flags -parse-as-library -typecheck -module-name DIMWorker App/DIMWorker/*.swift
echo "type checks with stub modules: ok"
