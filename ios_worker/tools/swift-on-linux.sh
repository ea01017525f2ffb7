#!/bin/sh
# Installs Swift 6 on a Debian or Ubuntu machine that has none: Debian trixie's swiftlang, unpacked into a root
# directory of its own (2.6 GB), from the Debian mirror this machine already uses. Nothing of the machine's own
# packages changes but `mmdebstrap`, which does the unpacking. Root only. Idempotent: a second run takes no time.
#
#   swift-on-linux.sh           installs what is missing
#   swift-on-linux.sh --check   exit 0 if nothing is missing, 1 if something is
#
# Afterwards tools/swift6 runs commands inside that root: `tools/swift6 swift build`.
# DIM_SWIFT_ROOT names another place than /opt/dim-swift.
set -eu

root=${DIM_SWIFT_ROOT:-/opt/dim-swift}
# libssl-dev: the cryptographic primitives on Linux; libc6-dev is not a dependency of swiftlang but needed by it
packages=swiftlang,libc6-dev,libstdc++-14-dev,libssl-dev
stamp="$root/.complete-$(printf '%s' "$packages" | cksum | cut -d' ' -f1)"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; say "hint: $2"; exit 1; }

[ -e "$stamp" ] && exit 0
[ "${1:-}" = --check ] && exit 1

[ "$(uname -s)" = Linux ] || die "this script is for Linux" "on macOS install Xcode 16 or newer; swift comes with it"
[ "$(id -u)" = 0 ] || die "Swift's root directory can only be made by root" "run: sudo $0"
command -v apt-get >/dev/null || die "this script knows Debian and Ubuntu" \
    "install Swift 6.0 or newer from https://swift.org/install and libssl-dev (openssl-devel) yourself"

if ! command -v mmdebstrap >/dev/null; then
    say "installing mmdebstrap"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap debian-archive-keyring >&2
fi

# The machine's own mirror, in one-line or deb822 form; an Ubuntu machine has none for Debian and takes the public one
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -nE 's/^(URIs:|deb)( +\[[^]]*\])? +([^ ]+\/debian)\/?( .*)?$/\3/p' | head -n 1)
mirror=${mirror:-http://deb.debian.org/debian}

say "unpacking Swift into $root (about 2.6 GB, a few minutes the first time)"
rm -rf --one-file-system "$root.part" "$root"
mmdebstrap --quiet --variant=essential --include="$packages" trixie "$root.part" "$mirror"
touch "$root.part/${stamp##*/}"
mv "$root.part" "$root"
DIM_SWIFT_ROOT="$root" "$(dirname "$0")/swift6" swiftc --version 2>/dev/null | grep -q 'Swift version 6\.' ||
    die "the Swift in $root does not start" "remove $root and run this script again"
say "Swift is ready: $(dirname "$0")/swift6 swift build"
