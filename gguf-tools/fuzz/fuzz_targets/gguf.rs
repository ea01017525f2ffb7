//! Any bytes, read as a GGUF. The body stands beside the parser: `gguf-tools/src/fuzz.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    gguf_tools::fuzz::exercise(bytes);
});
