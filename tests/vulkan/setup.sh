#!/bin/sh
# Makes llama.cpp's Vulkan backend buildable and runnable on a machine without a GPU (Debian 12 or 13, amd64 or arm64).
#
# usage: tests/vulkan/setup.sh [DIR]      DIR: where the headers go, target/vulkan-sdk if not given
#
# Installs Mesa's software driver and the shader compiler from Debian, and unpacks Debian 13's Vulkan and SPIR-V headers
# into DIR without installing them: Debian 12's Vulkan headers (1.3.239) are too old for ggml. Run again, it finds
# everything there and does nothing. Needs root (or sudo) once, and a Debian mirror.
#
# Then:
#   VULKAN_SDK=$PWD/target/vulkan-sdk GGML_VK_VISIBLE_DEVICES=0 CARGO_TARGET_DIR=target/vulkan \
#       cargo test --release -p llama-sys-patch --features vulkan --test offload
# GGML_VK_VISIBLE_DEVICES=0 because ggml leaves out software devices unless they are asked for by number.
set -eu

sdk=${1:-$(cd "$(dirname "$0")/../.." && pwd)/target/vulkan-sdk}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
ready=$sdk/ready

root=
if [ "$(id -u)" != 0 ]; then root=sudo; fi

# ---- the driver, the loader, the shader compiler
missing=
for package in mesa-vulkan-drivers libvulkan1 glslc; do
    state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    case $state in
        *" installed") ;;
        *) missing="$missing $package" ;;
    esac
done
if [ -n "$missing" ]; then
    echo "vulkan: installing$missing" >&2
    $root apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive $root apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends $missing >/dev/null
fi

# ---- Debian 13's headers, beside the system
if [ ! -e "$ready" ]; then
    echo "vulkan: unpacking Debian 13's headers into $sdk" >&2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/deb"
    # an apt of its own: nothing of it reaches the system's package lists
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/sources.list"
    cat > "$work/apt.conf" <<CONF
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "";
APT::Get::List-Cleanup "0";
Acquire::Languages "none";
CONF
    APT_CONFIG=$work/apt.conf apt-get update -qq
    (cd "$work/deb" && APT_CONFIG=$work/apt.conf apt-get download -qq libvulkan-dev spirv-headers)
    rm -rf "$sdk"
    mkdir -p "$sdk/lib"
    for deb in "$work"/deb/*.deb; do dpkg-deb -x "$deb" "$work/tree"; done
    mv "$work/tree/usr/include" "$work/tree/usr/share" "$sdk/"
    loader=$(ldconfig -p | sed -n 's/.*libvulkan\.so\.1 .*=> //p' | head -n 1)
    ln -s "$loader" "$sdk/lib/libvulkan.so"
    touch "$ready"
fi

echo "vulkan: ready in $sdk" >&2
