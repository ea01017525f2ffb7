//! Every type that a weight can be stored in and that the CPU multiplies: cut by `dim-split`'s own code and run in three
//! slices, the logits are llama_decode()'s of the whole, bit for bit. Matrices of a block (some of which the loader repacks),
//! experts, and the vocabulary's; and a mixture of all types in one model, as quantisers make them per tensor.
//!
//! ggml makes some of these types only with statistics that a random model has none of: there the bytes are drawn, and their
//! scales set so that rows stay about as large as they are.

mod common;

use std::path::{Path, PathBuf};

use common::pipeline::{self, Pipeline};
use common::{argmax, assert_exact, decode, stock};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Gguf, Tensor, TensorType};
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use half::f16;
use llama_sys_patch::{
    ContextParams, LLAMA_CPP_SYS_VERSION, Row, dequantize_rows, quantize_rows, test_support,
};

/// What no matrix is stored in: numbers of things, and what ggml makes of activations on its way.
const NO_WEIGHTS: [TensorType; 6] =
    [TensorType::I8, TensorType::I16, TensorType::I32, TensorType::I64, TensorType::F64, TensorType::Q8_K];

fn weight_types() -> Vec<TensorType> {
    let all = (0..256).filter_map(TensorType::from_id);
    all.filter(|ty| !NO_WEIGHTS.contains(ty) && *ty != TensorType::Q8_1).collect()
}

/// Sets the scale of a block of drawn bytes.
fn set_scale(ty: TensorType, block: &mut [u8], scale: f32) {
    let half = f16::from_f32(scale).to_bits();
    match ty {
        TensorType::TQ1_0 | TensorType::TQ2_0 => {
            let at = block.len() - 2;
            block[at..].copy_from_slice(&half.to_le_bytes());
        }
        // four bits of it at the top of each 16
        TensorType::IQ1_M => {
            for i in 0..4 {
                let (at, nibble) = (48 + 2 * i + 1, (half >> (4 * i)) as u8 & 15);
                block[at] = block[at] & 15 | nibble << 4;
            }
        }
        // one for every 16 values, of 4 bits of exponent and 3 of mantissa
        TensorType::NVFP4 => {
            let exponent = (scale.log2().round() as i32 + 7).clamp(1, 14) as u8;
            block[..4].fill(exponent << 3);
        }
        _ => block[..2].copy_from_slice(&half.to_le_bytes()),
    }
}

/// A tensor's values in another type: ggml's own conversion where it has one that needs nothing else, drawn bytes where not.
fn stored_as(ty: TensorType, tensor: &Tensor<'_>) -> Vec<u8> {
    let values: Vec<f32> = tensor
        .data()
        .unwrap()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let per_row = tensor.dims()[0] as usize;
    if let Ok(bytes) = quantize_rows(ty.id(), &values, per_row) {
        return bytes;
    }
    let block = ty.block_bytes() as usize;
    let n_blocks = values.len() / ty.block_len() as usize;
    let mut state = 1 + u64::from(ty.id());
    let mut draw = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let mut bytes: Vec<u8> = (0..n_blocks * block).map(|_| draw()).collect();
    let rms = |values: &[f32]| {
        let squares: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        (squares / values.len() as f64).sqrt() as f32
    };
    let wanted = rms(&values);
    let mut scale = 1.0;
    // some round their scale: twice
    for _ in 0..2 {
        bytes.chunks_exact_mut(block).for_each(|b| set_scale(ty, b, scale));
        let mut read = vec![0f32; values.len()];
        dequantize_rows(ty.id(), &bytes, per_row, &mut read).unwrap();
        let is = rms(&read);
        assert!(is.is_finite() && is > 0.0, "{ty}: {is}");
        scale *= wanted / is;
    }
    bytes
}

/// The model with every matrix that fits in the type that `choose` gives for it; how many there are.
fn store(from: &Path, to: &Path, mut choose: impl FnMut(usize) -> TensorType) -> usize {
    let gguf = Gguf::open(from).unwrap();
    let metadata: Vec<_> = gguf.metadata().map(|e| (e.key, e.value)).collect();
    let mut n_stored = 0;
    let mut contents = Vec::new();
    for tensor in gguf.tensors() {
        let ty = choose(n_stored);
        let is_matrix = tensor.dims().len() > 1 && !tensor.name().contains("gate_inp");
        let fits = is_matrix && tensor.dims()[0].is_multiple_of(ty.block_len());
        n_stored += usize::from(fits);
        let (ty, data) = match fits && tensor.tensor_type() == TensorType::F32 {
            true => (ty, stored_as(ty, &tensor)),
            false => (tensor.tensor_type(), tensor.data().unwrap().to_vec()),
        };
        contents.push((TensorSpec::new(tensor.name(), ty, tensor.dims()), data));
    }
    let specs: Vec<_> = contents.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = GgufWriter::create(to, &metadata, &specs).unwrap();
    contents.iter().for_each(|(_, data)| writer.write(data).unwrap());
    writer.finish().unwrap();
    n_stored
}

/// Head, middle and tail as `dim-split` writes them.
fn slices(model: &Path) -> Vec<PathBuf> {
    let folder = model.parent().unwrap();
    let gguf = Gguf::open(model).unwrap();
    let middles = vec!["3..5".parse().unwrap()];
    let request = Request { middles, stem: "cut".into(), no_canary: true, ..Request::default() };
    let manifest = split(&Plan::new(&gguf, &request).unwrap(), folder, "cut", |_| {}).unwrap();
    manifest.slices.iter().map(|slice| folder.join(&slice.file)).collect()
}

fn is_exact(model: &Path, what: &str) {
    let context =
        ContextParams { n_ctx: 64, n_batch: 24, n_ubatch: 16, n_threads: 1, ..ContextParams::default() };
    let whole = pipeline::load(model).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut oracle = stock(&whole, &context);
    let mut ours = Pipeline::new(&slices(model), &context).unwrap_or_else(|e| panic!("{what}: {e}"));
    let prompt = common::tokens(&whole, 5, 24);
    let rows = Row::chunk(0, 0, prompt.len());
    let mut expected = decode(&mut oracle, &rows, &prompt);
    assert!(expected.iter().all(|x| x.is_finite()) && expected.iter().any(|&x| x != expected[0]), "{what}");
    assert_exact(&ours.evaluate(&rows, &prompt).unwrap(), &expected, what);
    for step in 0..4 {
        let (rows, token) = (Row::chunk(0, 24 + step, 1), [argmax(&expected)]);
        expected = decode(&mut oracle, &rows, &token);
        assert_exact(&ours.evaluate(&rows, &token).unwrap(), &expected, &format!("{what}, step {step}"));
    }
}

#[test]
fn every_type_of_weights_is_exact_in_three_slices() {
    let types = weight_types();
    println!("{} types of llama-cpp-sys-2 {LLAMA_CPP_SYS_VERSION}", types.len());
    assert!(types.len() >= 28, "{types:?}");
    // dense, and with experts
    for arch in ["llama", "qwen3moe"] {
        let folder = tempfile::tempdir().unwrap();
        let plain = test_support::write(arch, &[], folder.path()).unwrap();
        let model = folder.path().join("typed.gguf");
        for &ty in &types {
            let n_stored = store(&plain, &model, |_| ty);
            assert!(n_stored >= 8 * 6, "{arch}: {n_stored} matrices can be {ty}");
            is_exact(&model, &format!("{arch} in {ty}"));
        }
    }
}

#[test]
fn a_mixture_of_all_types_is_exact_in_three_slices() {
    let types = weight_types();
    for arch in ["llama", "qwen3moe"] {
        let folder = tempfile::tempdir().unwrap();
        let plain = test_support::write(arch, &[], folder.path()).unwrap();
        let model = folder.path().join("mixed.gguf");
        // neighbours differ, and so do the same matrices of two blocks
        store(&plain, &model, |i| types[i * 5 % types.len()]);
        let stored = Gguf::open(&model).unwrap();
        let mut seen: Vec<_> = stored.tensors().map(|t| t.tensor_type()).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), types.len(), "{seen:?}");
        is_exact(&model, &format!("{arch}, mixed"));
    }
}
