//! What dim-synth writes is what a converter would have written, and the same on every machine.

use std::process::Command;

use gguf_tools::{
    failure::Explained,
    gguf::{Gguf, TensorType, Value, check},
    synth::{Error, Experts, FAMILIES, Head, MIN_VOCAB, RopeFactors, Spec, type_names},
};
use sha2::{Digest, Sha256};

fn sha256(path: &std::path::Path) -> String {
    Sha256::digest(std::fs::read(path).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A change of these means that everybody's synthesised models change: recorded figures are then of other models.
#[test]
fn the_same_spec_gives_the_same_bytes_on_every_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for (weights, expected) in [
        ("f32", "54ffc86a53d377ffdbad935cd0c0576e6d401d1fc17ffbb7e293cbbb8470ad03"),
        ("f16", "52befdaf03e51a8251d4b607251513761753dc5d5eaa292df17eb903bfe6fa76"),
        ("q4_k_m", "1af51e5fcc0e13db7204cff18712f46f94ba1e70e566159199e4e37084ffafa6"),
    ] {
        let spec = Spec::tiny("llama").unwrap().with_type(weights).unwrap().rope_factors(RopeFactors::Llama3);
        spec.write(&path).unwrap();
        assert_eq!(sha256(&path), expected, "{weights}");
        spec.clone().seed(2).write(&path).unwrap();
        assert_ne!(sha256(&path), expected, "{weights}: another seed must be another model");
    }
}

#[test]
fn every_family_in_every_type_passes_our_checks_and_agrees_with_another_reader() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for family in FAMILIES {
        // every type once with and once without experts; elsewhere a plain, a block and a mixed one
        let all_types = ["llama", "qwen3moe"].contains(&family.arch);
        for weights in type_names().filter(|t| all_types || ["f16", "q8_0", "q4_k_m"].contains(t)) {
            for tied in [false, true] {
                let spec = Spec::tiny(family.arch).unwrap().with_type(weights).unwrap().tied(tied).blocks(2);
                let name = format!("{} {weights} tied={tied}", family.arch);
                match (family.head, tied) {
                    (Head::Own, true) => {
                        assert!(matches!(spec.write(&path), Err(Error::OnlyOwnHead { .. })), "{name}");
                        continue;
                    }
                    (Head::Tied, false) => {
                        assert!(matches!(spec.write(&path), Err(Error::OnlyTied { .. })), "{name}");
                        continue;
                    }
                    _ => spec.write(&path).unwrap(),
                }
                assert_eq!(std::fs::metadata(&path).unwrap().len(), spec.bytes().unwrap(), "{name}");

                let gguf = Gguf::open(&path).unwrap();
                let hparams = check::model(&gguf).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(hparams.n_blocks, 2, "{name}");
                assert_eq!(hparams.n_vocab, 512, "{name}");
                assert_eq!(gguf.tensor("output.weight").is_none(), tied, "{name}");

                let mut other = gguf_rs::get_gguf_container(path.to_str().unwrap()).unwrap();
                let other = other.decode().unwrap();
                assert_eq!(other.model_family(), family.arch, "{name}");
                assert_eq!(other.tensors().len(), gguf.n_tensors(), "{name}");
                for (ours, theirs) in gguf.tensors().zip(other.tensors()) {
                    assert_eq!(ours.name(), theirs.name, "{name}");
                    assert_eq!(ours.tensor_type().id(), theirs.kind, "{name} {}", ours.name());
                    assert_eq!(ours.dims(), theirs.shape, "{name} {}", ours.name());
                    assert_eq!(ours.offset(), theirs.offset, "{name} {}", ours.name());
                    // gguf-rs sizes these two by blocks of 256 values
                    if !matches!(ours.tensor_type(), TensorType::BF16 | TensorType::IQ4_NL) {
                        assert_eq!(ours.n_bytes(), theirs.size, "{name} {}", ours.name());
                    }
                }
            }
        }
    }
}

#[test]
fn shapes_have_the_weights_of_the_models_they_are_named_after() {
    for (shape, n_weights) in [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("llama3.2-1b", 1_235_814_400 + 32),
        ("llama3.2-3b", 3_212_749_824 + 64),
        ("llama3.1-8b", 8_030_261_248 + 64),
        ("llama2-7b", 6_738_415_616),
        ("mistral-7b", 7_248_023_552),
        ("mixtral-8x7b", 46_702_792_704),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("olmo2-1b", 1_484_916_736),
        ("olmo2-7b", 7_298_617_344),
        ("olmoe-1b-7b", 6_919_161_856),
        ("starcoder2-3b", 3_030_371_328),
        ("stablelm2-1.6b", 1_644_515_328),
        ("internlm2-1.8b", 1_889_110_016),
        ("granite3.1-2b", 2_533_531_648),
        ("gemma-2b", 2_506_172_416),
        ("phi-2", 2_779_683_840),
        ("phi3-mini", 3_821_079_552),
        ("falcon-7b", 7_217_189_760),
        ("pythia-410m", 405_334_016),
        ("pythia-1.4b", 1_414_647_808),
    ] {
        let spec = Spec::new(shape, None).unwrap();
        assert_eq!(spec.n_weights(), n_weights, "{shape}");
    }
    // as its publishers ship it, 15,231,233,024 bytes of weights in F16 with norms and biases in it
    let bytes = Spec::new("qwen2.5-7b", None).unwrap().bytes().unwrap();
    assert!((15_231_233_024..15_245_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn options_reach_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let spec = Spec::tiny("llama").unwrap().vocab(MIN_VOCAB).context(99).blocks(3);
    spec.rope_factors(RopeFactors::Llama3)
        .experts(Experts { n: 4, n_used: 1, n_ff_shared: 0 })
        .write(&path)
        .unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.get("llama.context_length"), Some(Value::U32(99)));
    assert_eq!(gguf.get("llama.expert_count"), Some(Value::U32(4)));
    assert_eq!(gguf.tensor("token_embd.weight").unwrap().dims(), [256, u64::from(MIN_VOCAB)]);
    assert_eq!(gguf.tensor("blk.2.ffn_up_exps.weight").unwrap().dims(), [256, 512, 4]);
    assert!(gguf.tensor("blk.3.attn_q.weight").is_none());
    let factors = gguf.tensor("rope_freqs.weight").unwrap();
    let (quads, _) = factors.data().unwrap().as_chunks::<4>();
    let factors: Vec<f32> = quads.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    // as in the models themselves: 1 while a frequency turns more than four times in 8,192 positions, then up to 8
    assert_eq!((factors.len(), factors[0], factors[31]), (32, 1.0, 8.0));
    assert!(factors.is_sorted());
}

#[test]
fn a_gain_scales_what_feeds_the_stream_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, loud) = (folder.path().join("plain.gguf"), folder.path().join("loud.gguf"));
    let spec = Spec::tiny("qwen3").unwrap().with_type("f32").unwrap();
    spec.write(&plain).unwrap();
    spec.gain(1024.0).write(&loud).unwrap();
    let (plain, loud) = (Gguf::open(&plain).unwrap(), Gguf::open(&loud).unwrap());
    for (a, b) in plain.tensors().zip(loud.tensors()) {
        let louder = ["token_embd", "attn_output", "ffn_down"].iter().any(|part| a.name().contains(part));
        assert_eq!(a.data().unwrap() != b.data().unwrap(), louder, "{}", a.name());
    }
}

#[test]
fn asking_for_what_there_is_not_names_what_there_is() {
    let error = |spec: Result<Spec, Error>| spec.unwrap_err().to_string();
    let shapes = error(Spec::new("qwen9", None));
    assert!(shapes.contains("\"qwen9\"") && shapes.contains("tiny, demo, small, qwen2.5-0.5b"), "{shapes}");
    let families = error(Spec::tiny("gpt9"));
    assert!(families.contains("\"gpt9\"") && families.contains("qwen2, qwen3, llama"), "{families}");
    let types = error(Spec::tiny("llama").unwrap().with_type("q9"));
    assert!(types.contains("\"q9\"") && types.contains("f32, f16, bf16, q8_0"), "{types}");
    let mixed = error(Spec::new("qwen3-0.6b", Some("llama")));
    assert!(mixed.contains("qwen3-0.6b is of architecture qwen3, not llama"), "{mixed}");
    let path = tempfile::tempdir().unwrap().path().join("m.gguf");
    let small = Spec::tiny("llama").unwrap().vocab(MIN_VOCAB - 1).write(&path).unwrap_err();
    assert!(matches!(small, Error::TooSmall { value: 259, least: 260, .. }), "{small}");
}

#[test]
fn the_program_writes_says_and_fails_as_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_dim-synth")).args(args).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let path_text = path.to_str().unwrap();

    let (code, stdout, stderr) =
        run(&[path_text, "--shape", "tiny", "--arch", "qwen3", "--type", "q8_0", "--tied"]);
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    assert!(stderr.contains("tiny-qwen3-q8_0"), "{stderr}");
    let written = sha256(&path);
    let again = folder.path().join("again.gguf");
    Spec::tiny("qwen3").unwrap().with_type("q8_0").unwrap().tied(true).write(&again).unwrap();
    assert_eq!(written, sha256(&again), "program and library differ");

    for (args, says) in [
        (&[path_text, "--shape", "no-such"][..], "known: tiny"),
        (&[path_text, "--arch", "no-such"], "known: qwen2"),
        (&[path_text, "--type", "no-such"], "known: f32"),
        (&[path_text, "--arch", "gemma", "--untied"], "leave --untied out"),
        (&[path_text, "--arch", "stablelm", "--tied"], "leave --tied out"),
        (&[path_text, "--tied", "--untied"], "cannot be used with"),
        (&[path_text, "--vocab", "5"], "the least is 260"),
    ] {
        let (code, _, stderr) = run(args);
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
    }
    assert_eq!(sha256(&path), written, "a refused request must leave the file alone");

    // a model of 900 TB: refused before a byte is written
    let huge = Spec::new("command-r-35b", None).unwrap().blocks(512);
    let huge = huge.experts(Experts { n: 800, n_used: 1, n_ff_shared: 0 }).write(&path).unwrap_err();
    assert!(matches!(huge, Error::Space { .. }) && !huge.is_misuse(), "{huge}");
    assert_eq!(sha256(&path), written);

    let nowhere = folder.path().join("no").join("such.gguf");
    let (code, _, stderr) = run(&[nowhere.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("such.gguf"), "{stderr}");
    let (code, list, _) = run(&["--list"]);
    assert_eq!(code, Some(0));
    assert!(list.contains("qwen2.5-7b") && list.contains("starcoder2"), "{list}");
}

/// Every block type decoded by ggml itself: right layout, right deviation, no offset, no value far out.
#[cfg(feature = "engine")]
#[test]
fn quantised_blocks_decode_to_the_deviation_of_the_float_types() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for weights in type_names() {
        Spec::tiny("qwen2").unwrap().with_type(weights).unwrap().blocks(1).write(&path).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        for (name, deviation) in
            [("blk.0.ffn_up.weight", 1.0 / 16.0), ("blk.0.attn_q.weight", 3f64.sqrt() / 16.0)]
        {
            let tensor = gguf.tensor(name).unwrap();
            let mut values = vec![0f32; tensor.n_elements() as usize];
            llama_sys_patch::dequantize_rows(
                tensor.tensor_type().id(),
                tensor.data().unwrap(),
                tensor.dims()[0] as usize,
                &mut values,
            )
            .unwrap();
            let n = values.len() as f64;
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let measured = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt();
            let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
            let kind = tensor.tensor_type();
            assert!((measured / deviation - 1.0).abs() < 0.02, "{name} {kind}: {measured} for {deviation}");
            // four times what chance gives a mean of so many values
            assert!(mean.abs() < 4.0 * deviation / n.sqrt(), "{name} {kind}: mean {mean}");
            assert!(f64::from(largest) < 4.0 * deviation, "{name} {kind}: {largest}");
            // neighbours and rows are independent
            for lag in [1, 16, 32, tensor.dims()[0] as usize] {
                let pairs = values.iter().zip(&values[lag..]);
                let product = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() / n;
                let correlation = product / deviation.powi(2);
                assert!(correlation.abs() < 5.0 / n.sqrt(), "{name} {kind} lag {lag}: {correlation}");
            }
        }
    }
}
