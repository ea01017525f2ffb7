#!/bin/sh
# Every architecture on a GPU: whole against three slices, all blocks offloaded. Plain C++, no Rust; llama.cpp is built with
# CUDA for the one chip that is there.
#
# usage: tests/cuda/sweep.sh LLAMA_CPP [BUILD]
#
#   LLAMA_CPP   llama.cpp's source as llama-cpp-sys-2 unpacks it (~/.cargo/registry/src/*/llama-cpp-sys-2-*/llama.cpp)
#   BUILD       where it is built; target/cuda if not given. Run again, it is built no further.
#   BACKEND     in the environment: cuda (if not given), or cpu, to try the script where there is no GPU
#
# One line per architecture, then a count of each kind: SAME (every bit), OTHER (how much), CUT (cannot be cut, or no tiny model
# is made of it: why), DIED (a signal, or no answer within 60 s). Sized for eight minutes on 16 cores: llama.cpp takes most of
# them, the sweep one and a half, several architectures at a time.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cpp=$here/../../llama-sys-patch/cpp
source=${1:?usage: tests/cuda/sweep.sh LLAMA_CPP [BUILD]}
build=${2:-$here/../../target/cuda}
jobs=$(nproc)
case ${BACKEND:-cuda} in
    cuda) backend='-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES=native' ;;
    cpu) backend= ;;
    *) echo "error: BACKEND is cuda or cpu" >&2; exit 2 ;;
esac

# shellcheck disable=SC2086  # options
cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
    $backend > "$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
cmake --build "$build" --target llama -j "$jobs" >> "$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }

objects=$build/sweep
mkdir -p "$objects"
{
    for file in "$cpp"/*.cpp "$here/sweep.cpp"; do
        case $file in */rpc.cpp) ;; *) echo "$file" ;; esac
    done
} | xargs -P "$jobs" -I FILE sh -c 'out=$1/$(basename "$2" .cpp).o; [ "$out" -nt "$2" ] || exec "${CXX:-c++}" -std=c++17 -O1 \
    -DGGML_USE_CPU -DNDEBUG -DDIM_TEST_SUPPORT -I "$3" -isystem "$4/src" -isystem "$4/include" -isystem "$4/ggml/include" \
    -isystem "$4/ggml/src" -c "$2" -o "$out"' sh "$objects" FILE "$cpp" "$source"
# the libraries refer to each other
libraries=$(find "$build" -name 'lib*.a' | tr '\n' ' ')
cuda=
if [ -n "$backend" ]; then
    toolkit=$(dirname "$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")
    cuda="-L$toolkit/lib64 -L$toolkit/lib64/stubs -lcudart -lcublas -lcublasLt -lcuda"
fi
# shellcheck disable=SC2086  # lists
"${CXX:-c++}" "$objects"/*.o -Wl,--start-group $libraries -Wl,--end-group $cuda -lpthread -ldl -lm -o "$build/sweep/sweep"

# several at a time: tiny models leave a GPU idle
one='arch=$1; folder=$(mktemp -d); code=0
timeout 60 "$2" "$arch" "$folder" > "$folder/said" 2> /dev/null || code=$?
rm -f "$folder"/*.gguf
case $code in 0) kind=SAME ;; 1) kind=OTHER ;; 2) kind=CUT ;; *) kind=DIED ;; esac
echo "$kind $arch: $(tail -n 1 "$folder/said")"
rm -rf "$folder"'
"$build/sweep/sweep" | xargs -P "$((jobs > 8 ? 8 : jobs))" -I ARCH sh -c "$one" sh ARCH "$build/sweep/sweep" | tee "$build/result"
echo
cut -d ' ' -f 1 "$build/result" | sort | uniq -c
