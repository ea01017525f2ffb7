//! What single architectures want beyond the tiny models' usual keys (cpp/tiny_keys.cpp).

use std::path::{Path, PathBuf};

use llama_sys_patch::{Error, test_support};

/// Blocks of a tiny model; gemma3n has more.
pub(crate) const N_BLOCKS: u32 = 8;

/// The options for an architecture.
pub(crate) fn options(arch: &str) -> &'static [&'static str] {
    match arch {
        "olmoe" | "dots1" | "deepseek2-ocr" => &[".attention.head_count_kv=4"],
        "plm" => &[".attention.key_length=96", ".rope.dimension_count=32", ".attention.head_count_kv=4"],
        "rwkv6" => &[".attention.head_count_kv=4", "without time_mix_lerp_fused"],
        "rwkv6qwen2" => &[".token_shift_count=1", ".attention.head_count_kv=4", "without time_mix_first"],
        "arwkv7" => &[".token_shift_count=1", ".attention.head_count_kv=4"],
        "deepseek4" => &[
            ".attention.compress_ratios=[0,0,4,128,4,128,4,128]",
            ".attention.head_count_kv=1",
            ".attention.key_length=128",
            ".attention.value_length=128",
            ".rope.dimension_count=32",
            ".hash_layer_count=2",
            ".expert_gating_func=4",
            ".hyper_connection.count=4",
        ],
        "hy_v4" => &[".attention.indexer.types=[1,0,0,1,0,1,0,0]", ".hyper_connection.count=4"],
        "glm5-next" => &[
            ".attention.indexer.kpool=4",
            ".hyper_connection.count=4",
            ".rope.dimension_count=0",
            ".attention.key_length=64",
            ".attention.key_length_mla=64",
        ],
        "hrm_text" => &[".hrm.layers_per_stack=2", ".hrm.h_cycles=2", ".hrm.l_cycles=1"],
        "graniteswitch" => &[
            ".adapters.count=2",
            ".adapters.lora_rank=8",
            ".adapters.token_ids_activate=[3,4]",
            ".adapters.token_ids_substitute=[5,6]",
        ],
        _ => &[],
    }
}

/// Writes a tiny model of an architecture into a folder.
pub(crate) fn write(arch: &str, more: &[&str], folder: &Path) -> Result<PathBuf, Error> {
    let path = folder.join("model.gguf");
    let options: Vec<&str> = options(arch).iter().chain(more).copied().collect();
    test_support::write_model(arch, N_BLOCKS, &options, &path)?;
    Ok(path)
}
