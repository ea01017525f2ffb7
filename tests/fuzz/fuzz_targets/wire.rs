//! Any bytes, as everything the protocol reads. The body stands beside the parsers: `src/wire/src/fuzz.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dim_wire::fuzz::exercise(bytes);
});
