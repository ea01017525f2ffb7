//! The canary of a middle: what right workers differ by from it, and what wrong ones do.
#![cfg(feature = "engine")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use gguf_tools::{
    arch,
    ask::Ask,
    canary::{self, Canary, LEAST_MEAN_COSINE, NoCanary, Wrong},
    gguf::{
        Gguf, Tensor, TensorType,
        write::{GgufWriter, TensorSpec},
    },
    manifest::Manifest,
    plan::{Plan, Request},
    split,
    synth::{FAMILIES, Spec},
};
use half::f16;
use llama_sys_patch::{ContextParams, FlashAttn, Input, Model, ModelParams, Output, Row, Stage, StageParams};

/// A model cut at one middle.
struct Cut {
    folder: tempfile::TempDir,
    n_embd: usize,
    middle: PathBuf,
    canary: Canary,
}

fn cut(spec: &Spec, middle: &str) -> Cut {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    spec.write(&model).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let request = Request { middles: vec![middle.parse().unwrap()], stem: "m".into(), ..Request::default() };
    let plan = Plan::new(&gguf, &request).unwrap();
    let manifest = split::split(&plan, folder.path(), "m", |p| {
        if let split::CutProgress::NoCanary(file, why) = p {
            panic!("{file}: {why}")
        }
    })
    .unwrap();
    assert_eq!(Manifest::read(folder.path().join("m.split.json")).unwrap(), manifest);
    let slice = &manifest.slices[1];
    Cut {
        n_embd: manifest.model.n_embd as usize,
        middle: folder.path().join(&slice.file),
        canary: slice.canary.clone().expect("a canary"),
        folder,
    }
}

/// How a worker computes.
#[derive(Clone, Copy)]
struct Way {
    f16_rows: bool,
    flash_attn: FlashAttn,
    repack: bool,
    /// rows of a step at most
    most: u32,
}

const PLAIN: Way = Way { f16_rows: false, flash_attn: FlashAttn::Auto, repack: true, most: 512 };

/// The answer of a worker with this slice to the canary's rows.
fn answer(slice: &Path, canary: &Canary, n_embd: usize, way: Way) -> Vec<f32> {
    let params = ModelParams {
        gpu_layers: Some(0),
        no_lm_head: true,
        no_repack: !way.repack,
        ..ModelParams::default()
    };
    let model = Model::load(&[slice], params).unwrap();
    // one thread: what runs beside a test costs less
    let context =
        ContextParams { n_ctx: 256, n_threads: 1, flash_attn: way.flash_attn, ..Default::default() };
    let blocks = model.blocks();
    let params = StageParams { blocks, takes_tokens: false, has_lm_head: false, context };
    let mut stage = Stage::new(&model, params).unwrap();
    let input = canary.input(n_embd);
    let mut output = Vec::new();
    let mut at = 0;
    for &n in &canary.steps {
        let mut left = n;
        while left > 0 {
            let n = left.min(way.most);
            left -= n;
            let rows = Row::chunk(0, at as u32, n as usize);
            let values = &input[at * n_embd..(at + n as usize) * n_embd];
            at += n as usize;
            if way.f16_rows {
                let values: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                let mut out = vec![f16::ZERO; values.len()];
                stage.evaluate(&rows, Input::F16(&values), Output::F16(&mut out)).unwrap();
                output.extend(out.iter().map(|x| x.to_f32()));
            } else {
                let mut out = vec![0f32; values.len()];
                stage.evaluate(&rows, Input::F32(values), Output::F32(&mut out)).unwrap();
                output.extend(out);
            }
        }
    }
    output
}

/// The middle again under another name, with the same keys and the data that `data` gives for each tensor.
fn rewrite(cut: &Cut, name: &str, data: impl Fn(&Tensor<'_>) -> (TensorType, Vec<u8>)) -> PathBuf {
    let gguf = Gguf::open(&cut.middle).unwrap();
    let metadata: Vec<_> = gguf.metadata().map(|e| (e.key.to_owned(), e.value.into_owned())).collect();
    let contents: Vec<_> = gguf.tensors().map(|t| data(&t)).collect();
    let specs: Vec<_> =
        gguf.tensors().zip(&contents).map(|(t, (ty, _))| TensorSpec::new(t.name(), *ty, t.dims())).collect();
    let path = cut.folder.path().join(name);
    let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
    contents.iter().for_each(|(_, bytes)| writer.write(bytes).unwrap());
    writer.finish().unwrap();
    path
}

/// The same with the same weights in F32: what a device computes that does not round activations to 8 bits.
fn dequantise(t: &Tensor<'_>) -> (TensorType, Vec<u8>) {
    let bytes = t.data().unwrap().to_vec();
    if t.dims().len() < 2 {
        return (t.tensor_type(), bytes);
    }
    let mut values = vec![0f32; t.n_elements() as usize];
    let per_row = t.dims()[0] as usize;
    llama_sys_patch::dequantize_rows(t.tensor_type().id(), &bytes, per_row, &mut values).unwrap();
    (TensorType::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// A name with two blocks exchanged.
fn exchange(name: &str, a: u32, b: u32) -> String {
    for (from, to) in [(a, b), (b, a)] {
        if let Some(rest) = name.strip_prefix(&format!("blk.{from}.")) {
            return format!("blk.{to}.{rest}");
        }
    }
    name.to_owned()
}

/// 1 - cosine, in the mean of the rows.
fn distance(cut: &Cut, output: &[f32]) -> f64 {
    match cut.canary.compare(cut.n_embd, output) {
        Ok(mean) => 1.0 - mean,
        Err(Wrong::Mean { mean }) => 1.0 - mean,
        Err(Wrong::Row { likeness, .. }) => 1.0 - likeness.cosine,
    }
}

/// Runs right and wrong workers; gives the greatest distance of a right one and the least of a wrong one.
fn both_sides(spec: &Spec, middle: &str) -> (f64, f64) {
    let this = cut(spec, middle);
    let own = Gguf::open(&this.middle).unwrap();
    let right = |path: &Path, way: Way| {
        let output = answer(path, &this.canary, this.n_embd, way);
        if let Err(wrong) = this.canary.compare(this.n_embd, &output) {
            panic!("{}: a right worker: {wrong}", spec.name());
        }
        distance(&this, &output)
    };
    let f16_rows = Way { f16_rows: true, ..PLAIN };
    let as_device = rewrite(&this, "device.gguf", dequantise);
    let mut noise: f64 = 0.0;
    for way in [
        PLAIN,
        f16_rows,
        Way { repack: false, ..PLAIN },
        Way { flash_attn: FlashAttn::Off, ..f16_rows },
        Way { most: 1, ..f16_rows },
        Way { most: 3, ..f16_rows },
    ] {
        noise = noise.max(right(&this.middle, way)).max(right(&as_device, way));
    }

    let mut least = f64::INFINITY;
    let mut wrong = |what: &str, data: &dyn Fn(&Tensor<'_>) -> (TensorType, Vec<u8>)| {
        let path = rewrite(&this, "wrong.gguf", data);
        let output = answer(&path, &this.canary, this.n_embd, f16_rows);
        assert!(this.canary.compare(this.n_embd, &output).is_err(), "{}: {what} passed", spec.name());
        least = least.min(distance(&this, &output));
    };
    let from = |gguf: &Gguf, name: &str| {
        let tensor = gguf.tensor(name).unwrap();
        (tensor.tensor_type(), tensor.data().unwrap().to_vec())
    };
    // one matrix at a time, of another seed
    let other = cut(&spec.clone().seed(2), middle);
    let other = Gguf::open(&other.middle).unwrap();
    let is_matrix = |t: &Tensor<'_>| t.name().starts_with("blk.") && t.dims().len() > 1;
    for altered in own.tensors().filter(is_matrix).map(|t| t.name().to_owned()).collect::<Vec<_>>() {
        wrong(&altered, &|t| from(if t.name() == altered { &other } else { &own }, t.name()));
    }
    wrong("all weights of another seed", &|t| from(&other, t.name()));
    // blocks in another order
    let key = |name: &str| own.get(name).unwrap().as_u32().unwrap();
    let (first, last) = (key("dim.first_block"), key("dim.last_block"));
    if first == last {
        return (noise, least);
    }
    for (a, b) in (first + 1..=last).map(|b| (b - 1, b)).chain([(first, last)]) {
        wrong(&format!("blocks {a} and {b} exchanged"), &|t| from(&own, &exchange(t.name(), a, b)));
    }
    wrong("every block the first", &|t| match t.name().split_once('.') {
        Some(("blk", rest)) => from(&own, &format!("blk.{first}.{}", rest.split_once('.').unwrap().1)),
        _ => from(&own, t.name()),
    });
    (noise, least)
}

#[test]
fn right_workers_pass_and_wrong_ones_do_not() {
    let tiny = |arch: &str, weights: &str| Spec::tiny(arch).unwrap().with_type(weights).unwrap();
    let demo = |weights: &str| Spec::new("demo", Some("qwen2")).unwrap().with_type(weights).unwrap();
    let mut cases = vec![(demo("f16"), "1..10"), (demo("q4_k_m"), "1..10"), (tiny("qwen2", "f16"), "2..2")];
    for arch in ["qwen2", "llama", "qwen3", "olmo2"] {
        cases.extend(["f16", "q8_0", "q4_k_m"].map(|weights| (tiny(arch, weights), "1..4")));
    }
    cases.extend(["bf16", "q4_0", "q2_k"].map(|weights| (tiny("qwen3", weights), "1..4")));
    println!("| model | middle | right: 1 - cosine up to | wrong: from |\n|---|---|---:|---:|");
    for (spec, middle) in cases {
        let (noise, least) = both_sides(&spec, middle);
        println!("| {} | {middle} | {noise:.1e} | {least:.1e} |", spec.name());
        // well apart on both sides of the bound
        let bound = 1.0 - LEAST_MEAN_COSINE;
        assert!(noise < bound / 2.0 && least > bound * 4.0, "{}: {noise:.1e}, {least:.1e}", spec.name());
    }
}

/// Every architecture that can be cut gets a canary that its own worker passes.
#[test]
fn every_architecture_has_a_canary() {
    for family in FAMILIES.iter().filter(|family| arch::find(family.arch).is_ok()) {
        let this = cut(&Spec::tiny(family.arch).unwrap(), "1..2");
        let output = answer(&this.middle, &this.canary, this.n_embd, Way { f16_rows: true, ..PLAIN });
        this.canary.compare(this.n_embd, &output).unwrap_or_else(|wrong| panic!("{}: {wrong}", family.arch));
    }
}

/// An answer that is off in one step only, too long, not finite, or nothing at all.
#[test]
fn what_is_wrong_in_one_row_does_not_hide() {
    let this = cut(&Spec::tiny("qwen2").unwrap(), "1..2");
    let (n, rows) = (this.n_embd, this.canary.n_rows());
    let output = answer(&this.middle, &this.canary, n, PLAIN);
    let input = this.canary.input(n);
    let compare = |change: &dyn Fn(usize, f32, f32) -> f32| {
        let changed: Vec<f32> = (0..output.len()).map(|i| change(i, input[i], output[i])).collect();
        this.canary.compare(n, &changed)
    };
    assert!(compare(&|_, _, after| after).is_ok());
    let last = (rows - 1) * n;
    // the step of one row gives the row before it
    assert!(
        matches!(compare(&|i, _, after| if i >= last { output[i - n] } else { after }), Err(Wrong::Row { row, .. }) if row == rows - 1)
    );
    assert!(compare(&|_, before, after| before + 1.2 * (after - before)).is_err());
    assert!(compare(&|_, before, _| before).is_err());
    assert!(compare(&|_, _, _| 0.0).is_err());
    assert!(compare(&|i, _, after| if i == 7 { f32::NAN } else { after }).is_err());
    assert!(compare(&|i, _, after| if i == 7 { f32::INFINITY } else { after }).is_err());
    assert!(this.canary.compare(n, &[]).is_err(), "no answer is no right answer");
    // a short context has fewer rows
    assert!(this.canary.compare(n, &output[..2 * n]).is_ok());
}

#[test]
fn the_same_cut_has_the_same_canary_and_it_can_be_left_out() {
    let spec = Spec::tiny("llama").unwrap();
    let (a, b) = (cut(&spec, "1..2"), cut(&spec, "1..2"));
    assert_eq!(a.canary, b.canary);
    assert_ne!(a.canary.updates, cut(&spec.clone().seed(2), "1..2").canary.updates);

    let gguf = Gguf::open(a.folder.path().join("model.gguf")).unwrap();
    let middles = vec!["1..2".parse().unwrap()];
    let request = Request { middles, stem: "m".into(), no_canary: true, ..Request::default() };
    let without = split::split(&Plan::new(&gguf, &request).unwrap(), b.folder.path(), "m", |_| {}).unwrap();
    assert!(without.slices.iter().all(|s| s.canary.is_none()));
    assert!(!fs::read_to_string(b.folder.path().join("m.split.json")).unwrap().contains("canary"));
    assert_eq!(Manifest::read(b.folder.path().join("m.split.json")).unwrap(), without);
}

/// What is wrong with the process that looks at a slice says nothing of the slice.
#[cfg(unix)]
#[test]
fn a_process_that_cannot_be_asked_costs_the_canary_and_not_the_slices() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    Spec::tiny("qwen2").unwrap().write(&model).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let request = Request { middles: vec!["1..2".parse().unwrap()], stem: "m".into(), ..Request::default() };
    // one that is not there, and one that answers nothing
    for program in ["/nowhere/at/all", "/bin/true"] {
        let mut plan = Plan::new(&gguf, &request).unwrap();
        plan.canary = Some(Ask::Apart(program.into()));
        let mut told = Vec::new();
        let manifest = split::split(&plan, folder.path(), "m", |p| {
            if let split::CutProgress::NoCanary(file, why) = p {
                told.push((file.to_owned(), why.clone()));
            }
        });
        let manifest = manifest.unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(manifest.slices.iter().all(|slice| slice.canary.is_none()));
        assert!(matches!(&told[..], [(_, NoCanary::NotEvaluated(_))]), "{program}: {told:?}");
    }
}

/// A manifest is a file like any other: what it says of a canary is checked before it is believed.
#[test]
fn a_canary_that_does_not_hold_together_is_refused() {
    let this = cut(&Spec::tiny("qwen2").unwrap(), "1..2");
    let path = this.folder.path().join("m.split.json");
    let text = fs::read_to_string(&path).unwrap();
    let whole: serde_json::Value = serde_json::from_str(&text).unwrap();
    let refused = |what: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = whole.clone();
        change(&mut changed["slices"][1]["canary"]);
        fs::write(&path, changed.to_string()).unwrap();
        let error = Manifest::read(&path).expect_err(what).to_string();
        assert!(error.contains("m.split.json"), "{what}: {error}");
    };
    let long = "0".repeat(canary::FOLD * 8 + 8);
    let not_finite = "0000c07f".repeat(canary::FOLD);
    refused("no steps", &|c| c["steps"] = serde_json::json!([]));
    refused("an empty step", &|c| c["steps"] = serde_json::json!([9, 0]));
    refused("more rows than answers", &|c| c["steps"] = serde_json::json!([8, 2]));
    refused("rows without end", &|c| c["steps"] = serde_json::json!(vec![u32::MAX; 64]));
    refused("a scale without end", &|c| c["exponent"] = serde_json::json!(i32::MAX));
    refused("a scale of nothing", &|c| c["exponent"] = serde_json::json!(-25));
    refused("an answer too short", &|c| c["updates"][0] = serde_json::json!("00"));
    refused("an answer too long", &|c| c["updates"][0] = serde_json::json!(long));
    refused("an answer of letters", &|c| c["updates"][0] = serde_json::json!("z".repeat(canary::FOLD * 8)));
    refused("an answer of umlauts", &|c| c["updates"][0] = serde_json::json!("ü".repeat(canary::FOLD * 4)));
    refused("an answer that is no number", &|c| c["updates"][0] = serde_json::json!(not_finite));
    refused("a negative seed", &|c| c["seed"] = serde_json::json!(-1));
    refused("a canary that is a text", &|c| *c = serde_json::json!("canary"));
    // without one it is a manifest of an older cut
    let mut older = whole.clone();
    older["slices"][1].as_object_mut().unwrap().remove("canary");
    older["model"].as_object_mut().unwrap().remove("params_sha256");
    fs::write(&path, older.to_string()).unwrap();
    let older = Manifest::read(&path).unwrap();
    assert_eq!((older.slices[1].canary.clone(), older.model.params_sha256), (None, None));
}
