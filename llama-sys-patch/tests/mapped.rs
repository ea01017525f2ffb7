//! A mapped model's weights take no memory of the process. Alone in its file: nothing else may allocate meanwhile.
#![cfg(target_os = "linux")]

mod common;

use common::write;
use gguf_tools::synth::Spec;
use llama_sys_patch::{Model, ModelParams};

/// Resident anonymous memory of this process: the heap, not what is mapped from files.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn mapped_weights_are_not_copied() {
    for (weights, no_lm_head, no_repack) in
        [("f16", false, false), ("f16", true, false), ("f16", true, true), ("q4_0", true, true)]
    {
        let file = write(&Spec::new("small", None).unwrap().with_type(weights).unwrap().vocab(512));
        let load = |use_mmap| {
            let params =
                ModelParams { gpu_layers: Some(0), use_mmap, no_lm_head, no_repack, ..Default::default() };
            let before = anonymous_bytes();
            let model = Model::load(&[&file.path], params).unwrap();
            (anonymous_bytes().saturating_sub(before), model.weights_bytes())
        };
        let what = format!("{weights}, no_lm_head {no_lm_head}, no_repack {no_repack}");
        let (read, weights_bytes) = load(false);
        assert!(weights_bytes > 20 << 20 && read > weights_bytes / 2, "{what}: {read} of {weights_bytes}");
        let (mapped, _) = load(true);
        assert!(mapped < 8 << 20, "{what}: {mapped} bytes of {weights_bytes}");
    }
}
