//! The table of tensor types against ggml's own: every type that a file may hold is sized as ggml sizes it.
#![cfg(feature = "engine")]

use gguf_tools::gguf::TensorType;
use llama_sys_patch::RowType;

#[test]
fn every_type_is_sized_as_ggml_sizes_it() {
    let mut known = 0;
    // far beyond what there is: a type that ggml has and this table has not is one that files will come with
    for id in 0..256 {
        let (ours, ggml) = (TensorType::from_id(id), RowType::of(id));
        match (ours, ggml) {
            (Some(ours), Ok(ggml)) => {
                assert_eq!(ours.block_len(), ggml.block_values as u64, "{ours}");
                assert_eq!(ours.block_bytes(), ggml.block_bytes as u64, "{ours}");
                assert!(ours.name().eq_ignore_ascii_case(&ggml.name), "{ours} is {} in ggml", ggml.name);
                known += 1;
            }
            (None, Err(_)) => {}
            (ours, ggml) => panic!("type {id}: {ours:?}, and in ggml {ggml:?}"),
        }
    }
    assert_eq!(known, TensorType::ALL.len());
}
