//! Compiles cpp/*.cpp against llama.cpp's internal headers and binds cpp/layer_eval.h.
//!
//! The headers are those of the llama.cpp that llama-cpp-sys-2 has just built, never a copy of our own:
//!
//!     DEP_LLAMA_ROOT                      that build's output folder (cargo sets it: `links = "llama"`)
//!       build/CMakeCache.txt              what CMake was run on
//!         CMAKE_HOME_DIRECTORY            .../llama-cpp-sys-2-<version>/llama.cpp
//!
//! The crate's version is read from the Cargo.toml beside that directory and becomes LLAMA_CPP_SYS_VERSION. Which one
//! it has to be stands in one place, the workspace's Cargo.toml, as an exact requirement: a bump there is the moment to
//! go through cpp/upstream.h, which then has to compile again.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

const SOURCES: [&str; 27] = [
    "cpp/absent.cpp",
    "cpp/boundary.cpp",
    "cpp/chat.cpp",
    "cpp/context.cpp",
    "cpp/crossing.cpp",
    "cpp/cut.cpp",
    "cpp/devices.cpp",
    "cpp/grammar.cpp",
    "cpp/grammar_check.cpp",
    "cpp/graph.cpp",
    "cpp/loader.cpp",
    "cpp/model.cpp",
    "cpp/operands.cpp",
    "cpp/plan.cpp",
    "cpp/quantise.cpp",
    "cpp/room.cpp",
    "cpp/rows.cpp",
    "cpp/saved.cpp",
    "cpp/session.cpp",
    "cpp/stage.cpp",
    "cpp/stage_api.cpp",
    "cpp/stage_graph.cpp",
    "cpp/state.cpp",
    "cpp/stock.cpp",
    "cpp/text.cpp",
    "cpp/values.cpp",
    "cpp/whole_graph.cpp",
];
/// Compiled with the `rpc` feature only.
const RPC_SOURCE: &str = "cpp/rpc.cpp";
/// Compiled with the `test-support` feature only.
const TEST_SOURCES: [&str; 2] = ["cpp/tiny_keys.cpp", "cpp/tiny_model.cpp"];
const HEADERS: [&str; 18] = [
    "cpp/boundary.h",
    "cpp/context.h",
    "cpp/crossing.h",
    "cpp/cut.h",
    "cpp/dialogue.h",
    "cpp/graph.h",
    "cpp/layer_eval.h",
    "cpp/model.h",
    "cpp/operands.h",
    "cpp/room.h",
    "cpp/session.h",
    "cpp/stage.h",
    "cpp/state.h",
    "cpp/text.h",
    "cpp/tiny_model.h",
    "cpp/upstream.h",
    "cpp/values.h",
    "cpp/whole_graph.h",
];

/// What of llama.cpp's `common` is about chats: templates, parsers of answers, grammars of tool calls. Compiled here and not
/// by CMake, whose target has the rest of that library too: sampling, downloads, a web server's client. Where CMake has
/// compiled it all the same, that one is linked.
const COMMON: [&str; 17] = [
    "chat",
    "chat-auto-parser-generator",
    "chat-auto-parser-helpers",
    "chat-diff-analyzer",
    "chat-peg-parser",
    "jinja/caps",
    "jinja/lexer",
    "jinja/parser",
    "jinja/runtime",
    "jinja/string",
    "jinja/value",
    "json",
    "json-schema",
    "json-schema-to-grammar",
    "peg-parser",
    "trie",
    "unicode",
];
const STAND_INS: &str = "cpp/common_stand_ins.cpp";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for file in SOURCES.iter().chain(&HEADERS).chain([&RPC_SOURCE, &STAND_INS]).chain(&TEST_SOURCES) {
        println!("cargo:rerun-if-changed={file}");
    }

    check_cpu();
    let root = PathBuf::from(env::var_os("DEP_LLAMA_ROOT").expect(
        "DEP_LLAMA_ROOT is not set: llama-cpp-sys-2 must be a direct dependency (its `links` key is \"llama\")",
    ));
    let llama_cpp = source_directory(&root.join("build/CMakeCache.txt"));
    println!("cargo:rustc-env=LLAMA_CPP_SYS_VERSION={}", version(&llama_cpp));

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .files(SOURCES)
        .include("cpp")
        .define("GGML_USE_CPU", None)
        .define("NDEBUG", None)
        .flag_if_supported("-fvisibility=hidden")
        .flag_if_supported("-Wall")
        .flag_if_supported("-Wextra")
        .flag_if_supported("-Wno-unused-parameter")
        .flag_if_supported("-Wno-missing-field-initializers");
    // what llama.cpp's own src/CMakeLists.txt has; as system headers, because their warnings are not ours
    for directory in ["src", "include", "ggml/include", "ggml/src", "common"] {
        build.flag("-isystem").flag(llama_cpp.join(directory).display().to_string());
    }
    let rpc = env::var_os("CARGO_FEATURE_RPC").is_some();
    if rpc {
        check_rpc(&root);
        build.file(RPC_SOURCE).define("DIM_RPC", None);
    }
    let test_support = env::var_os("CARGO_FEATURE_TEST_SUPPORT").is_some();
    if test_support {
        build.files(TEST_SOURCES).define("DIM_TEST_SUPPORT", None);
    }
    build.compile("dim_layer_eval");
    // a build that does not see cmake/without-common.cmake has made all of it already
    if !cache_says(&root, "LLAMA_BUILD_COMMON:BOOL=ON") {
        compile_common(&llama_cpp, &root.join("dim_common"));
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindgen::Builder::default()
        .header("cpp/dialogue.h")
        .allowlist_item("dim_.*")
        .allowlist_item("DIM_.*")
        .prepend_enum_name(false)
        .derive_default(true)
        .clang_args(rpc.then_some("-DDIM_RPC"))
        .clang_args(test_support.then_some("-DDIM_TEST_SUPPORT"))
        .layout_tests(true)
        .generate()
        .expect("bindgen could not read cpp/dialogue.h")
        .write_to_file(out.join("layer_eval.rs"))
        .expect("the bindings could not be written to OUT_DIR");
}

/// llama.cpp's `common`, as far as chats need it, with its parsers of families: into `out`, beside llama.cpp itself. This
/// crate's own folder is another one for every selection of features, and for clippy, and it takes a minute.
fn compile_common(llama_cpp: &Path, out: &Path) {
    let common = llama_cpp.join("common");
    fs::create_dir_all(out).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
    // it changes less often than what is compiled above: a stamp says of what it was made
    let stamp = out.join("dim_common.stamp");
    let flags = env::vars().filter(|(name, _)| name.starts_with("CXX"));
    let flags: Vec<String> = flags.map(|(name, value)| format!("{name}={value}")).collect();
    let stand_ins = fs::read_to_string(STAND_INS).unwrap_or_default();
    let made_of = format!("{}\n{flags:?}\n{COMMON:?}\n{stand_ins}", common.display());
    if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == made_of) {
        println!("cargo:rustc-link-search=native={}", out.display());
        println!("cargo:rustc-link-lib=static=dim_common");
        return;
    }
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .define("NDEBUG", None)
        .flag_if_supported("-fvisibility=hidden")
        .warnings(false);
    // nothing of it is on a token's way, and at -O3 it takes as long as half of llama.cpp
    build.opt_level(1);
    for directory in ["common", "include", "ggml/include", "vendor"] {
        build.include(llama_cpp.join(directory));
    }
    build.files(COMMON.map(|name| common.join(format!("{name}.cpp"))));
    let parsers = fs::read_dir(common.join("parsers")).expect("llama.cpp has a folder common/parsers");
    let mut parsers: Vec<PathBuf> = parsers.flatten().map(|entry| entry.path()).collect();
    parsers.retain(|path| path.extension().is_some_and(|extension| extension == "cpp"));
    parsers.sort();
    build.files(parsers).file(STAND_INS).out_dir(out).compile("dim_common");
    fs::write(&stamp, made_of).unwrap_or_else(|e| panic!("{}: {e}", stamp.display()));
}

/// Whether CMake's cache has this line.
fn cache_says(root: &Path, line: &str) -> bool {
    let text = fs::read_to_string(root.join("build/CMakeCache.txt")).unwrap_or_default();
    text.lines().any(|has| has == line)
}

/// The llama.cpp directory that CMake configured, by its own cache.
fn source_directory(cache: &Path) -> PathBuf {
    println!("cargo:rerun-if-changed={}", cache.display());
    let text = fs::read_to_string(cache)
        .unwrap_or_else(|e| panic!("{}: {e} (llama-cpp-sys-2 builds llama.cpp there)", cache.display()));
    let directory = text
        .lines()
        .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .unwrap_or_else(|| panic!("{}: no CMAKE_HOME_DIRECTORY line", cache.display()));
    let directory = PathBuf::from(directory);
    let internal = directory.join("src/llama-context.h");
    assert!(internal.is_file(), "{} is missing: llama.cpp's internal headers are needed", internal.display());
    directory
}

/// llama-cpp-sys-2 compiles llama.cpp for the CPU that rustc is told to compile for, and says nothing about it. This
/// workspace's .cargo/config.toml says "native"; a program elsewhere that depends on this crate has no such line.
/// [`unused_cpu_features`](../src/cpu.rs) is the same question at run time.
fn check_cpu() {
    let var = |name| env::var(name).unwrap_or_default();
    let (host, target) = (var("HOST"), var("TARGET"));
    let native = var("CARGO_ENCODED_RUSTFLAGS").split('\x1f').any(|flag| flag.ends_with("target-cpu=native"));
    assert!(
        host == target || !native,
        "target-cpu=native is the CPU of {host}, but this is a build for {target}: name that machine's CPU instead, as \
         RUSTFLAGS=\"-C target-cpu=x86-64-v3\", or set RUSTFLAGS= for the least there is"
    );
    if var("CARGO_CFG_TARGET_ARCH") == "x86_64"
        && !var("CARGO_CFG_TARGET_FEATURE").split(',').any(|f| f == "avx2")
    {
        println!(
            "cargo:warning=llama.cpp is compiled without AVX2 and will be about ten times slower than it could be: set \
             RUSTFLAGS=\"-C target-cpu=native\" for this machine, \"-C target-cpu=x86-64-v3\" for those made since 2013"
        );
    }
}

/// The `rpc` feature needs a llama.cpp that was configured with its RPC backend.
fn check_rpc(root: &Path) {
    assert!(
        cache_says(root, "GGML_RPC:BOOL=ON"),
        "the rpc feature needs a llama.cpp with its RPC backend: build with GGML_RPC=ON in the environment and a \
         target directory of its own, as GGML_RPC=ON cargo build --release --features rpc --target-dir target/rpc"
    );
}

/// The version of the crate that llama.cpp came with.
fn version(llama_cpp: &Path) -> String {
    let manifest = llama_cpp.with_file_name("Cargo.toml");
    let text = fs::read_to_string(&manifest).unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
    text.lines()
        .find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
        .unwrap_or_else(|| panic!("{}: no version line", manifest.display()))
        .to_owned()
}
