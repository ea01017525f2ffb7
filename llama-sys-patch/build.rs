//! Compiles cpp/*.cpp against llama.cpp's internal headers and binds cpp/layer_eval.h.
//!
//! The headers are those of the llama.cpp that llama-cpp-sys-2 has just built, never a copy of our own:
//!
//!     DEP_LLAMA_ROOT                      that build's output folder (cargo sets it: `links = "llama"`)
//!       build/CMakeCache.txt              what CMake was run on
//!         CMAKE_HOME_DIRECTORY            .../llama-cpp-sys-2-<version>/llama.cpp
//!
//! The crate's version is read from the Cargo.toml beside that directory and must be the pinned one:
//! cpp/upstream.h lists what a newer one has to be checked for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The only llama-cpp-sys-2 whose internals this crate has been checked against.
const LLAMA_CPP_SYS_VERSION: &str = "0.1.161";

const SOURCES: [&str; 21] = [
    "cpp/absent.cpp",
    "cpp/boundary.cpp",
    "cpp/context.cpp",
    "cpp/crossing.cpp",
    "cpp/cut.cpp",
    "cpp/devices.cpp",
    "cpp/graph.cpp",
    "cpp/loader.cpp",
    "cpp/model.cpp",
    "cpp/plan.cpp",
    "cpp/quantise.cpp",
    "cpp/rows.cpp",
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
const HEADERS: [&str; 14] = [
    "cpp/boundary.h",
    "cpp/context.h",
    "cpp/crossing.h",
    "cpp/cut.h",
    "cpp/graph.h",
    "cpp/layer_eval.h",
    "cpp/model.h",
    "cpp/session.h",
    "cpp/stage.h",
    "cpp/state.h",
    "cpp/tiny_model.h",
    "cpp/upstream.h",
    "cpp/values.h",
    "cpp/whole_graph.h",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for file in SOURCES.iter().chain(&HEADERS).chain([&RPC_SOURCE]).chain(&TEST_SOURCES) {
        println!("cargo:rerun-if-changed={file}");
    }

    let root = PathBuf::from(env::var_os("DEP_LLAMA_ROOT").expect(
        "DEP_LLAMA_ROOT is not set: llama-cpp-sys-2 must be a direct dependency (its `links` key is \"llama\")",
    ));
    let llama_cpp = source_directory(&root.join("build/CMakeCache.txt"));
    check_version(&llama_cpp);

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
    for directory in ["src", "include", "ggml/include", "ggml/src"] {
        build.flag("-isystem").flag(llama_cpp.join(directory).display().to_string());
    }
    let rpc = env::var_os("CARGO_FEATURE_RPC").is_some();
    if rpc {
        check_rpc(&root.join("build/CMakeCache.txt"));
        build.file(RPC_SOURCE).define("DIM_RPC", None);
    }
    let test_support = env::var_os("CARGO_FEATURE_TEST_SUPPORT").is_some();
    if test_support {
        build.files(TEST_SOURCES).define("DIM_TEST_SUPPORT", None);
    }
    build.compile("dim_layer_eval");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindgen::Builder::default()
        .header("cpp/layer_eval.h")
        .allowlist_item("dim_.*")
        .allowlist_item("DIM_.*")
        .prepend_enum_name(false)
        .derive_default(true)
        .clang_args(rpc.then_some("-DDIM_RPC"))
        .clang_args(test_support.then_some("-DDIM_TEST_SUPPORT"))
        .layout_tests(true)
        .generate()
        .expect("bindgen could not read cpp/layer_eval.h")
        .write_to_file(out.join("layer_eval.rs"))
        .expect("the bindings could not be written to OUT_DIR");
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

/// The `rpc` feature needs a llama.cpp that was configured with its RPC backend.
fn check_rpc(cache: &Path) {
    let text = fs::read_to_string(cache).unwrap_or_default();
    assert!(
        text.lines().any(|line| line == "GGML_RPC:BOOL=ON"),
        "the rpc feature needs a llama.cpp with its RPC backend: build with GGML_RPC=ON in the environment and a \
         target directory of its own, as GGML_RPC=ON cargo build --release --features rpc --target-dir target/rpc"
    );
}

/// Refuses a llama.cpp that nobody has checked cpp/upstream.h against.
fn check_version(llama_cpp: &Path) {
    let manifest = llama_cpp.with_file_name("Cargo.toml");
    let text = fs::read_to_string(&manifest).unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
        .unwrap_or_else(|| panic!("{}: no version line", manifest.display()));
    assert!(
        version == LLAMA_CPP_SYS_VERSION,
        "llama-cpp-sys-2 is {version}, but cpp/upstream.h was checked against {LLAMA_CPP_SYS_VERSION}: \
         go through the list in that file, then change the version in build.rs"
    );
}
