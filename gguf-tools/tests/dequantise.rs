//! `dim-dequantise`: the same values as plain numbers, everything else as it was, and what it does not do.
//!
//! Here the values are held against ggml's own reading, rounded by another crate; in tests/oracle/gguf_files.py against
//! the `gguf` package's, type by type.
#![cfg(feature = "engine")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::write_with;
use gguf_tools::dequantise::{DequantiseError, Dequantised};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Gguf, Tensor, TensorType, Value, check};
use gguf_tools::synth::Spec;
use half::f16;

fn synth(folder: &Path, weights: &str) -> PathBuf {
    let path = folder.join(format!("{weights}.gguf"));
    Spec::tiny("qwen2").unwrap().with_type(weights).unwrap().write(&path).unwrap();
    path
}

fn program(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dim-dequantise")).args(arguments).output().unwrap()
}

/// Its error line and its hint, after an exit code of 2.
fn refusal(arguments: &[&Path]) -> String {
    let output = program(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains("\nhint: "), "{stderr}");
    stderr
}

/// (n_values): a tensor as ggml reads it.
fn values(tensor: &Tensor<'_>) -> Vec<f32> {
    let mut out = vec![0f32; tensor.n_elements() as usize];
    let (ty, row) = (tensor.tensor_type().id(), tensor.dims()[0] as usize);
    llama_sys_patch::dequantize_rows(ty, tensor.data().unwrap(), row, &mut out).unwrap();
    out
}

#[test]
fn values_are_the_nearest_and_the_rest_is_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    for weights in ["q4_1", "q4_k_m", "q8_0"] {
        let (from, to) = (synth(folder.path(), weights), folder.path().join("out.gguf"));
        let output = program(&[&from, &to]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (from, to) = (Gguf::open(&from).unwrap(), Gguf::open(&to).unwrap());
        assert_eq!(from.n_tensors(), to.n_tensors());
        let mut converted = 0;
        for (was, is) in from.tensors().zip(to.tensors()) {
            assert_eq!((was.name(), was.dims()), (is.name(), is.dims()));
            if !was.tensor_type().is_quantized() {
                assert_eq!(was.tensor_type(), is.tensor_type());
                assert!(was.data().unwrap() == is.data().unwrap(), "{}", was.name());
                continue;
            }
            assert_eq!(is.tensor_type(), TensorType::F16);
            let nearest = values(&was).into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes());
            assert!(nearest.eq(is.data().unwrap().iter().copied()), "{}", was.name());
            converted += 1;
        }
        assert!(converted > 10, "{weights}: {converted}");
        for (was, is) in from.metadata().zip(to.metadata()) {
            assert_eq!(was.key, is.key);
            if was.key == "general.file_type" {
                assert_eq!(is.value, Value::U32(1));
            } else {
                assert_eq!(was.value, is.value, "{}", was.key);
            }
        }
        assert_eq!(from.metadata().len(), to.metadata().len());
    }
}

/// ggml asserts that what it maps begins at a multiple of 32 bytes: a file that says less is laid out anew, and one that says
/// more stays so.
#[test]
fn an_alignment_that_llama_cpp_does_not_map_is_not_carried_on() {
    let folder = tempfile::tempdir().unwrap();
    let source = Gguf::open(synth(folder.path(), "q8_0")).unwrap();
    for alignment in [8, 64] {
        let other = folder.path().join("other.gguf");
        let mut metadata: Vec<_> = source.metadata().map(|e| (e.key, e.value)).collect();
        metadata.push(("general.alignment", Value::U32(alignment)));
        metadata.push(("split.count", Value::U16(1)));
        write_with(&source, &other, &metadata);
        let out = folder.path().join("out.gguf");
        let output = program(&[&other, &out]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let out = Gguf::open(out).unwrap();
        check::model(&out).unwrap();
        assert_eq!(out.alignment(), u64::from(alignment.max(32)));
        assert!(out.get("split.count").is_none());
    }
}

#[test]
fn what_is_not_quantised_or_is_a_slice_or_the_file_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, quantised) = (synth(folder.path(), "f16"), synth(folder.path(), "q8_0"));
    let out = folder.path().join("out.gguf");
    assert!(refusal(&[&plain, &out]).contains("nothing in"));
    let before = std::fs::read(&quantised).unwrap();
    let link = folder.path().join("sub/../q8_0.gguf");
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    assert!(refusal(&[&quantised, &link]).contains("is the model itself"));
    assert!(std::fs::read(&quantised).unwrap() == before);
    let split = Command::new(env!("CARGO_BIN_EXE_dim-split"))
        .arg(&quantised)
        .args(["--middle", "1..2", "--no-canary"])
        .output()
        .unwrap();
    assert!(split.status.success(), "{}", String::from_utf8_lossy(&split.stderr));
    assert!(refusal(&[&folder.path().join("q8_0.head.gguf"), &out]).contains("is a slice"));
    assert!(!out.exists());
    let quantised = Gguf::open(&quantised).unwrap();
    let error = Dequantised::new(&quantised, TensorType::Q4_0).unwrap_err();
    assert!(matches!(error, DequantiseError::NotPlain(TensorType::Q4_0)), "{error}");
}

/// A scale that F16 can hold times a whole number is more than it can hold.
#[test]
fn a_value_beyond_f16_is_an_error_and_not_infinity() {
    let folder = tempfile::tempdir().unwrap();
    let source = Gguf::open(synth(folder.path(), "q8_0")).unwrap();
    let loud = folder.path().join("loud.gguf");
    let metadata: Vec<_> = source.metadata().map(|e| (e.key, e.value)).collect();
    let spec = |t: Tensor<'_>| TensorSpec::new(t.name(), t.tensor_type(), t.dims());
    let specs: Vec<_> = source.tensors().map(spec).collect();
    let mut writer = GgufWriter::create(&loud, &metadata, &specs).unwrap();
    for tensor in source.tensors() {
        let mut data = tensor.data().unwrap().to_vec();
        if tensor.name() == "blk.1.ffn_down.weight" {
            data[..2].copy_from_slice(&f16::from_f32(1000.0).to_le_bytes());
            data[2] = 100;
        }
        writer.write(&data).unwrap();
    }
    writer.finish().unwrap();
    let out = folder.path().join("out.gguf");
    let said = refusal(&[&loud, &out]);
    assert!(said.contains("'blk.1.ffn_down.weight'") && said.contains("F16"), "{said}");
    assert!(!out.exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "something half written is left");
    let wide = program(&[&loud, &out, Path::new("--type"), Path::new("bf16")]);
    assert!(wide.status.success(), "{}", String::from_utf8_lossy(&wide.stderr));
}
