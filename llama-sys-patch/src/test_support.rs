//! Tiny random models of any architecture that llama.cpp has, for this crate's tests. Not a part of its interface.

use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};

use crate::error::check_status;
use crate::model::c_paths;
use crate::{Error, ffi};

/// Every architecture that llama.cpp has a name for.
pub fn architectures() -> Vec<String> {
    // SAFETY: no pointers.
    let count = unsafe { ffi::dim_test_architectures() };
    (0..count)
        .map(|index| {
            // SAFETY: a NUL-terminated text that lives as long as the process.
            let name = unsafe { CStr::from_ptr(ffi::dim_test_architecture(index)) };
            name.to_string_lossy().into_owned()
        })
        .collect()
}

/// Writes a tiny random model. `options`: see `dim_test_write_model` in `cpp/layer_eval.h`.
///
/// # Errors
/// llama.cpp makes no model of such keys. Some it aborts on.
pub fn write_model(arch: &str, n_blocks: u32, options: &[&str], path: &Path) -> Result<(), Error> {
    let nul = |_| Error::InvalidArgument("a NUL byte in an option".into());
    let c_arch = CString::new(arch).map_err(nul)?;
    let c_options = options.iter().map(|&o| CString::new(o)).collect::<Result<Vec<_>, _>>().map_err(nul)?;
    let pointers: Vec<*const c_char> = c_options.iter().map(|o| o.as_ptr()).collect();
    let c_path = c_paths(&[path])?;
    // SAFETY: all texts are NUL-terminated and valid for the call.
    check_status(unsafe {
        ffi::dim_test_write_model(
            c_arch.as_ptr(),
            n_blocks,
            pointers.as_ptr(),
            pointers.len(),
            c_path[0].as_ptr(),
        )
    })
}

/// Blocks of a tiny model; gemma3n has more.
pub const N_BLOCKS: u32 = 8;

/// What an architecture wants beyond the tiny models' usual keys (cpp/tiny_keys.cpp).
pub fn options(arch: &str) -> &'static [&'static str] {
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

/// Writes a tiny model of an architecture, with what it wants and `more` (`options` of [`write_model`]), into a folder.
///
/// # Errors
/// As [`write_model`].
pub fn write(arch: &str, more: &[&str], folder: &Path) -> Result<PathBuf, Error> {
    let path = folder.join("model.gguf");
    let options: Vec<&str> = options(arch).iter().chain(more).copied().collect();
    write_model(arch, N_BLOCKS, &options, &path)?;
    Ok(path)
}
