//! Cutting: lossless, refused where it would be wrong, and never half done.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{Rng, write_with};
use gguf_tools::{
    arch,
    digest::{self, Sha},
    failure::Explained,
    gguf::{
        Array, Entry, Gguf, TensorType, Value, absent,
        write::{GgufWriter, TensorSpec},
    },
    manifest::Manifest,
    plan::{BlockRange, Plan, PlanError, Request, Role},
    slice::{self, SliceError, SliceInfo},
    split::{self, SplitError},
    synth::Spec,
};

fn range(first: u32, last: u32) -> BlockRange {
    BlockRange { first, last }
}

fn request(middles: &[BlockRange]) -> Request {
    Request { middles: middles.to_vec(), stem: "m".into(), ..Request::default() }
}

/// The same for slices that are models of their own.
fn renumber(middles: &[BlockRange]) -> Request {
    Request { renumber: true, ..request(middles) }
}

/// Cuts into `out`, and compares with the model.
fn cut(model: &Path, middles: &[BlockRange], out: &Path) -> Manifest {
    cut_as(model, &request(middles), out)
}

fn cut_as(model: &Path, request: &Request, out: &Path) -> Manifest {
    let gguf = Gguf::open(model).unwrap();
    let plan = Plan::new(&gguf, request).unwrap();
    let manifest = split::split(&plan, out, "m", |_| {}).unwrap();
    split::verify(&plan, out, &manifest, |_| {}).unwrap();
    assert_eq!(Manifest::read(out.join("m.split.json")).unwrap(), manifest);
    manifest
}

fn names(out: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every tensor of the model arrives under its name, byte for byte; every key too, in its order; and every slice says of what
/// it does not hold what it is.
fn assert_kept(model: &Path, out: &Path, manifest: &Manifest) {
    let model = Gguf::open(model).unwrap();
    let mut seen = BTreeMap::new();
    for entry in &manifest.slices {
        let slice = Gguf::open(out.join(&entry.file)).unwrap();
        let info = SliceInfo::of(&slice).unwrap();
        assert_eq!((info.role, info.blocks), (entry.role, range(entry.first, entry.last)));
        assert!(!info.renumbered && info.model_blocks == manifest.model.n_blocks);
        let absent = absent::read(&slice).unwrap();
        for tensor in model.tensors() {
            let name = tensor.name();
            let described = absent.iter().find(|a| a.name == name);
            match (slice.tensor(name), described) {
                (Some(ours), None) => {
                    assert_eq!((ours.tensor_type(), ours.dims()), (tensor.tensor_type(), tensor.dims()));
                    assert_eq!(ours.data().unwrap(), tensor.data().unwrap(), "{name}");
                    *seen.entry(name.to_owned()).or_insert(0) += 1;
                }
                (None, Some(absent)) => {
                    assert_eq!(absent.tensor_type, tensor.tensor_type(), "{name}");
                    let dims = tensor.dims().iter().chain(&[1, 1, 1]).take(4);
                    assert!(absent.dims.iter().eq(dims), "{name}: {:?}", absent.dims);
                }
                both => panic!("{}, {name}: {both:?}", entry.file),
            }
            if let Some(number) = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()) {
                let is_own = info.blocks.contains(number.parse().unwrap());
                assert_eq!(is_own, described.is_none(), "{}, {name}", entry.file);
            }
        }
        assert_eq!(slice.n_tensors() + absent.len(), model.n_tensors());
        let is_kept = |key: &str| {
            entry.role != Role::Middle || !key.starts_with("tokenizer.") && !key.ends_with(".vocab_size")
        };
        let of_slice = slice.metadata().filter(|e| !e.key.starts_with("dim.") && is_kept(e.key));
        let of_model = model.metadata().filter(|e| is_kept(e.key));
        assert!(of_slice.map(|e| (e.key, e.value)).eq(of_model.map(|e| (e.key, e.value))), "{}", entry.file);
    }
    assert_eq!(seen.len(), model.n_tensors(), "every tensor is in a slice");
    let tied = model.tensor("output.weight").is_none();
    let twice = |name: &str| tied && name == "token_embd.weight" || name.starts_with("rope_");
    assert!(seen.iter().all(|(name, &times)| times == 1 || twice(name)), "{seen:?}");
}

/// Every tensor of the model arrives, byte for byte, once; every key too, in its order, unless it must differ: of slices that
/// are models of their own. Written without the planner's help, and in one piece: each rule takes what the ones before have
/// left.
fn assert_lossless(model: &Path, out: &Path, manifest: &Manifest) {
    let model = Gguf::open(model).unwrap();
    let arch = manifest.model.arch.as_str();
    let tied = model.tensor("output.weight").is_none();
    let own = arch::find(arch).unwrap().lm_head == arch::LmHead::Own;
    let mut seen = BTreeMap::new();
    for entry in &manifest.slices {
        let slice = Gguf::open(out.join(&entry.file)).unwrap();
        let info = SliceInfo::of(&slice).unwrap();
        assert_eq!((info.role, info.blocks), (entry.role, range(entry.first, entry.last)));
        assert_eq!(info.model_sha256.to_string(), manifest.model.sha256);
        for tensor in slice.tensors() {
            let name = tensor.name();
            let source = match name.strip_prefix("blk.") {
                Some(rest) => {
                    let (number, rest) = rest.split_once('.').unwrap();
                    let number: u32 = number.parse().unwrap();
                    assert!(number <= entry.last - entry.first);
                    format!("blk.{}.{rest}", number + entry.first)
                }
                None if name == "token_embd.weight" && entry.role == Role::Tail && !tied && !own => {
                    "output.weight".into()
                }
                None => name.into(),
            };
            let original = model.tensor(&source).unwrap_or_else(|| panic!("{source} is not in the model"));
            let placeholder = own
                && matches!(
                    (name, entry.role),
                    ("output.weight", Role::Head) | ("token_embd.weight", Role::Tail)
                );
            if placeholder {
                assert_eq!(tensor.dims(), original.dims());
                assert!(tensor.n_bytes() * 4 < original.n_bytes());
                continue;
            }
            assert_eq!(tensor.tensor_type(), original.tensor_type(), "{name}");
            let one_row = entry.role == Role::Middle
                && ["token_embd.weight", "output.weight", "output.bias"].contains(&name);
            let (a, b) = (tensor.data().unwrap(), original.data().unwrap());
            if one_row {
                assert_eq!(a, &b[..a.len()], "{name}");
                assert!(tensor.n_bytes() <= original.row_bytes());
            } else {
                assert_eq!(tensor.dims(), original.dims(), "{name}");
                assert_eq!(a, b, "{name}");
                *seen.entry(source).or_insert(0) += 1;
            }
        }
        // keys: the model's in their order, then ours
        let ours: Vec<_> = slice.metadata().filter(|e| !e.key.starts_with("dim.")).collect();
        let mut rest = ours.iter();
        for entry_of_model in model.metadata() {
            let key = entry_of_model.key;
            if entry.role == Role::Middle && key.starts_with("tokenizer.") && key != "tokenizer.ggml.model" {
                continue;
            }
            let found = rest.next().unwrap_or_else(|| panic!("{key} is missing"));
            assert_eq!(found.key, key);
            let must_differ = key == format!("{arch}.block_count")
                || entry.role == Role::Middle
                    && (key == "tokenizer.ggml.model" || key == format!("{arch}.vocab_size"))
                || entry.role != Role::Head && key == format!("{arch}.embedding_scale");
            if !must_differ {
                assert_eq!(found.value, entry_of_model.value, "{key}");
            }
        }
        let added: Vec<_> = rest.map(|e| e.key.trim_start_matches(arch)).collect();
        assert!(
            added.iter().all(|k| [".vocab_size", ".embedding_scale", ".residual_scale"].contains(k)),
            "{added:?}"
        );
    }
    for tensor in model.tensors() {
        let times = seen.get(tensor.name()).copied().unwrap_or(0);
        let everywhere = tensor.name().starts_with("output_norm") || tensor.name().starts_with("rope_");
        let twice = tied && tensor.name() == "token_embd.weight";
        let expected = match tensor.name() {
            _ if everywhere => manifest.slices.len(),
            "output.bias" if own => 2,
            _ if twice => 2,
            _ => 1,
        };
        assert_eq!(times, expected, "{}", tensor.name());
    }
}

#[test]
fn every_supported_architecture_is_cut_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    for arch in arch::SUPPORTED {
        let model = dir.path().join(format!("{}.gguf", arch.name));
        common::tiny(arch.name, &model);
        let out = dir.path().join(arch.name);
        let manifest = cut(&model, &[range(1, 2), range(3, 3)], &out);
        assert_eq!(manifest.slices.len(), 4);
        assert_kept(&model, &out, &manifest);
        let renumbered = cut_as(&model, &renumber(&[range(1, 2), range(3, 3)]), &out);
        assert_lossless(&model, &out, &renumbered);
        // which weights these are does not depend on how they are cut
        assert_eq!(renumbered.model.sha256, manifest.model.sha256);
    }
}

/// The rule by names gives each range what the graph says that it needs, where one can be asked, for these architectures.
#[cfg(feature = "engine")]
#[test]
fn the_rule_by_names_is_right_for_the_usual_architectures() {
    use gguf_tools::{ask::Ask, plan::SlicePlan};
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for (arch, tied) in
        [("llama", false), ("qwen2", true), ("gemma", true), ("phi3", false), ("falcon", false)]
    {
        Spec::tiny(arch).unwrap().tied(tied).write(&model).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        let planned = |ask: Ask| {
            let plan = Plan::new(&gguf, &Request { ask, ..request(&[range(1, 2)]) }).unwrap();
            let tensors = |slice: &SlicePlan<'_>| -> Vec<String> {
                slice.tensors.iter().map(|(spec, _)| spec.name.clone()).collect()
            };
            let row = |slice: &SlicePlan<'_>| (slice.input.bytes_f32(), slice.output.bytes_f32());
            plan.slices.iter().map(|s| (tensors(s), row(s), s.kv_bytes_per_position)).collect::<Vec<_>>()
        };
        assert_eq!(planned(Ask::ByName), planned(Ask::Here), "{arch}");
    }
}

#[test]
fn odd_cuts_and_types_are_cut_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for (i, ty) in ["f32", "bf16", "q8_0", "q4_k"].into_iter().enumerate() {
        for tied in [true, false] {
            Spec::tiny("qwen2").unwrap().with_type(ty).unwrap().tied(tied).write(&model).unwrap();
            for middles in
                [&[range(1, 4)][..], &[range(1, 1)], &[range(4, 4)], &[range(2, 2), range(3, 3), range(4, 4)]]
            {
                let out = dir.path().join(format!("{i}-{tied}-{}", middles.len()));
                let manifest = cut(&model, middles, &out);
                assert_kept(&model, &out, &manifest);
                let manifest = cut_as(&model, &renumber(middles), &out);
                assert_lossless(&model, &out, &manifest);
                fs::remove_dir_all(&out).unwrap();
            }
        }
    }
}

#[test]
fn blocks_with_their_own_numbers_keep_them() {
    // an array with a number for each block, and one that only happens to be as long
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain.gguf");
    let model = dir.path().join("model.gguf");
    common::tiny("qwen3moe", &plain);
    rewrite(&plain, &model, |key, value| match key {
        "qwen3moe.attention.head_count_kv" | "qwen3moe.expert_used_count" => {
            let n = value.as_u32().unwrap();
            Some(Value::Array(Array::of_u32([n, n, n, n, n, n])))
        }
        _ => Some(value),
    });
    let with_sections = dir.path().join("sections.gguf");
    let sections = Value::Array(Array::of_i32([1, 2, 3, 4, 5, 6]));
    add_key(&model, &with_sections, "qwen3moe.rope.dimension_sections", sections.clone());
    let out = dir.path().join("out");
    cut_as(&with_sections, &renumber(&[range(1, 3)]), &out);
    let middle = Gguf::open(out.join("m.middle-1..3.gguf")).unwrap();
    let heads = middle.get("qwen3moe.attention.head_count_kv").unwrap();
    assert_eq!(heads.as_array().unwrap().len(), 3);
    assert_eq!(middle.get("qwen3moe.rope.dimension_sections"), Some(sections));

    // an array nobody knows is not guessed at
    let strange = dir.path().join("strange.gguf");
    add_key(&plain, &strange, "qwen3moe.mystery", Value::Array(Array::of_f32([0.0; 6])));
    let gguf = Gguf::open(&strange).unwrap();
    let error = Plan::new(&gguf, &renumber(&[range(1, 3)])).unwrap_err();
    assert!(matches!(error, PlanError::UnknownArray { .. }), "{error}");
    // where nothing is renumbered there is nothing to guess
    Plan::new(&gguf, &request(&[range(1, 3)])).unwrap();
}

/// A copy of a file with other metadata.
fn rewrite(from: &Path, to: &Path, change: impl Fn(&str, Value<'static>) -> Option<Value<'static>>) {
    let gguf = Gguf::open(from).unwrap();
    let changed = |e: Entry<'_>| change(e.key, e.value.into_owned()).map(|v| (e.key.to_owned(), v));
    write_with(&gguf, to, &gguf.metadata().filter_map(changed).collect::<Vec<_>>());
}

/// A copy of a file with a key more.
fn add_key(from: &Path, to: &Path, key: &str, value: Value<'static>) {
    let gguf = Gguf::open(from).unwrap();
    let mut metadata: Vec<_> =
        gguf.metadata().map(|e| (e.key.to_owned(), e.value)).filter(|(k, _)| k != key).collect();
    metadata.push((key.to_owned(), value));
    write_with(&gguf, to, &metadata);
}

#[test]
fn scales_by_block_count_and_of_the_embedding_are_carried_right() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("minicpm", &model);
    let out = dir.path().join("out");
    cut_as(&model, &renumber(&[range(1, 2)]), &out);
    for (file, scale) in
        [("m.head.gguf", None), ("m.middle-1..2.gguf", Some(1.0)), ("m.tail.gguf", Some(1.0))]
    {
        let gguf = Gguf::open(out.join(file)).unwrap();
        let residual = gguf.get("minicpm.residual_scale").unwrap();
        let of_model = Gguf::open(&model).unwrap().get("minicpm.residual_scale").map(Value::into_owned);
        match of_model {
            Some(value) => assert_eq!(residual, value),
            None => assert_eq!(residual, Value::F32(1.4 / 6f32.sqrt()), "{file}"),
        }
        let embedding = gguf.get("minicpm.embedding_scale");
        match scale {
            Some(scale) => assert_eq!(embedding, Some(Value::F32(scale)), "{file}"),
            None => assert_eq!(embedding, Gguf::open(&model).unwrap().get("minicpm.embedding_scale")),
        }
    }
}

#[test]
fn refusals_name_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let refuse = |path: &Path, middles: &[BlockRange]| {
        let gguf = Gguf::open(path).unwrap();
        Plan::new(&gguf, &request(middles)).unwrap_err()
    };
    let refuse_renumbered =
        |path: &Path| Plan::new(&Gguf::open(path).unwrap(), &renumber(&[range(1, 2)])).unwrap_err();
    common::tiny("gemma", &model);
    let error = refuse_renumbered(&model);
    let (text, hint) = (error.to_string(), error.hint().unwrap_or_default());
    assert!(
        text.contains("'gemma' cannot be models of their own: it scales")
            && hint.starts_with("cut it with its own block numbers; renumbered slices can be of llama"),
        "{text}"
    );

    common::tiny("qwen2", &model);
    let other = dir.path().join("other.gguf");
    for (arch, reason) in
        [("gemma3", "attention windows"), ("deepseek2", "dense"), ("flibber", "not been shown")]
    {
        rewrite(&model, &other, |key, v| {
            Some(if key == "general.architecture" { Value::string(arch) } else { v })
        });
        let text = refuse_renumbered(&other).to_string();
        assert!(text.contains(reason) && text.contains(arch), "{text}");
    }
    add_key(&model, &other, "qwen2.nextn_predict_layers", Value::U32(1));
    assert!(refuse_renumbered(&other).to_string().contains("further tokens"));
    assert!(refuse(&model, &[range(0, 2)]).hint().unwrap().contains("nearest range is 1..2"));
    assert!(refuse(&model, &[range(3, 5)]).hint().unwrap().contains("nearest range is 3..4"));

    // a slice is not cut again
    let out = dir.path().join("out");
    cut(&model, &[range(1, 2)], &out);
    assert!(matches!(refuse(&out.join("m.tail.gguf"), &[range(1, 1)]), PlanError::Slice(_)));
    // and a model is not overwritten by its own slice
    let named = dir.path().join("m.head.gguf");
    fs::copy(&model, &named).unwrap();
    let gguf = Gguf::open(&named).unwrap();
    let plan = Plan::new(&gguf, &request(&[range(1, 2)])).unwrap();
    assert!(matches!(split::split(&plan, dir.path(), "m", |_| {}), Err(SplitError::OverModel(_))));
    assert_eq!(fs::read(&named).unwrap(), fs::read(&model).unwrap());
}

#[cfg(not(feature = "engine"))]
#[test]
fn requantising_without_the_engine_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("qwen2", &model);
    let gguf = Gguf::open(&model).unwrap();
    let with_type = Request { embed_type: Some(TensorType::Q8_0), ..request(&[range(1, 2)]) };
    let error = Plan::new(&gguf, &with_type).unwrap_err();
    assert!(
        matches!(error, PlanError::Type { why: gguf_tools::requantise::Unconvertible::NeedsEngine, .. }),
        "{error}"
    );
    // the type it has already needs no conversion
    let same = Request { embed_type: Some(TensorType::F16), ..request(&[range(1, 2)]) };
    Plan::new(&gguf, &same).unwrap();
}

#[cfg(feature = "engine")]
#[test]
fn vocabulary_matrices_are_requantised_by_ggml() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for tied in [true, false] {
        Spec::tiny("qwen2").unwrap().tied(tied).write(&model).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        let q8 = Some(TensorType::Q8_0);
        let both = Request { embed_type: q8, output_type: q8, ..request(&[range(1, 2)]) };
        let plan = Plan::new(&gguf, &both).unwrap();
        assert!(plan.requantises());
        let manifest = split::split(&plan, &dir.path().join("out"), "m", |_| {}).unwrap();
        split::verify(&plan, &dir.path().join("out"), &manifest, |_| {}).unwrap();
        // the identity is the model's, not that of what was made of it
        assert_eq!(manifest.model.sha256, digest::of_model(&gguf, |_| {}).unwrap().to_string());
        for (file, source) in [
            ("m.head.gguf", "token_embd.weight"),
            ("m.tail.gguf", if tied { "token_embd.weight" } else { "output.weight" }),
        ] {
            let slice = Gguf::open(dir.path().join("out").join(file)).unwrap();
            let tensor = slice.tensor(source).unwrap();
            let source = gguf.tensor(source).unwrap();
            assert_eq!((tensor.tensor_type(), tensor.dims()), (TensorType::Q8_0, source.dims()));
            let values = |t: &gguf_tools::gguf::Tensor<'_>| {
                let mut out = vec![0f32; t.n_elements() as usize];
                llama_sys_patch::dequantize_rows(
                    t.tensor_type().id(),
                    t.data().unwrap(),
                    t.dims()[0] as usize,
                    &mut out,
                )
                .unwrap();
                out
            };
            let (a, b) = (values(&tensor), values(&source));
            let most = b.iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // half a step of the largest group
            assert!(worst <= most / 127.0 && worst > 0.0, "{worst} of {most}");
        }
    }
}

#[test]
fn identity_is_that_of_the_model_wherever_its_tensors_stand() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("qwen3", &model);
    let manifest = cut(&model, &[range(2, 3)], &dir.path().join("out"));
    let gguf = Gguf::open(&model).unwrap();
    assert_eq!(manifest.model.sha256, digest::of_model(&gguf, |_| {}).unwrap().to_string());
    // the same by hand, from the description in the documentation
    let mut records = Vec::new();
    for tensor in gguf.tensors() {
        records.extend((tensor.name().len() as u64).to_le_bytes());
        records.extend(tensor.name().bytes());
        records.extend(tensor.tensor_type().id().to_le_bytes());
        records.extend((tensor.dims().len() as u32).to_le_bytes());
        tensor.dims().iter().for_each(|d| records.extend(d.to_le_bytes()));
        records.extend(Sha::of(tensor.data().unwrap()).0);
    }
    assert_eq!(manifest.model.sha256, Sha::of(&records).to_string());
}

#[test]
fn a_model_in_parts_is_cut_like_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("llama", &model);
    // as llama-gguf-split --no-tensor-first-split does it: the first part has the keys and no tensor
    let folder = dir.path().join("no-tensor-first");
    fs::create_dir(&folder).unwrap();
    let bare = write_parts(&model, &folder, 3, true);
    let parts = write_parts(&model, dir.path(), 3, false);
    let whole = cut(&model, &[range(2, 3)], &dir.path().join("a"));
    for (i, part) in parts.iter().chain(&bare).enumerate() {
        // any part stands for the model
        let out = dir.path().join(format!("b{i}"));
        let from_parts = cut(part, &[range(2, 3)], &out);
        assert_eq!(from_parts.model.sha256, whole.model.sha256);
        for slice in &whole.slices {
            assert_eq!(
                fs::read(dir.path().join("a").join(&slice.file)).unwrap(),
                fs::read(out.join(&slice.file)).unwrap()
            );
        }
    }
    assert_eq!(Gguf::open(&parts[0]).unwrap().stem(), "part");

    let error = |path: &Path| Gguf::open(path).unwrap_err().to_string();
    fs::rename(&parts[1], dir.path().join("kept")).unwrap();
    assert!(error(&parts[0]).contains("part 2 of 3 is missing"));
    fs::copy(&parts[2], &parts[1]).unwrap();
    assert!(error(&parts[0]).contains("says it is part 3 of 3, its name says 2 of 3"));
    fs::copy(dir.path().join("kept"), dir.path().join("other.gguf")).unwrap();
    assert!(error(&dir.path().join("other.gguf")).contains("one part of 3"));
}

/// Spreads a file over parts as llama.cpp does: metadata in the first, tensors in all, or in all but the first.
fn write_parts(model: &Path, dir: &Path, n: usize, bare_first: bool) -> Vec<PathBuf> {
    let gguf = Gguf::open(model).unwrap();
    let tensors: Vec<_> = gguf.tensors().collect();
    let skipped = usize::from(bare_first);
    let per_part = tensors.len().div_ceil(n - skipped);
    let mut paths = Vec::new();
    for no in 0..n {
        let path = dir.join(format!("part-{:05}-of-{n:05}.gguf", no + 1));
        let mut metadata: Vec<(String, Value<'_>)> = vec![
            ("split.no".into(), Value::U16(no as u16)),
            ("split.count".into(), Value::U16(n as u16)),
            ("split.tensors.count".into(), Value::I32(tensors.len() as i32)),
        ];
        if no == 0 {
            metadata.splice(0..0, gguf.metadata().map(|e| (e.key.to_owned(), e.value)));
        }
        let of = |no: usize| (no.saturating_sub(skipped) * per_part).min(tensors.len());
        let mine = if bare_first && no == 0 { &[][..] } else { &tensors[of(no)..of(no + 1)] };
        let specs: Vec<_> =
            mine.iter().map(|t| TensorSpec::new(t.name(), t.tensor_type(), t.dims())).collect();
        let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
        mine.iter().for_each(|t| writer.write(t.data().unwrap()).unwrap());
        writer.finish().unwrap();
        paths.push(path);
    }
    paths
}

/// Another reader, where it is right: it sizes BF16 and several quantised types wrongly, F16 and Q8_0 not.
#[test]
fn slices_read_the_same_in_gguf_rs() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for ty in ["f16", "q8_0"] {
        Spec::tiny("qwen3").unwrap().with_type(ty).unwrap().write(&model).unwrap();
        let out = dir.path().join(ty);
        for slice in cut(&model, &[range(1, 2)], &out).slices {
            let path = out.join(&slice.file);
            let ours = Gguf::open(&path).unwrap();
            let mut theirs =
                gguf_rs::get_gguf_container_array_size(path.to_str().unwrap(), u64::MAX).unwrap();
            let theirs = theirs.decode().unwrap();
            assert_eq!(theirs.num_kv(), ours.metadata().len() as u64);
            assert_eq!(theirs.tensors().len(), ours.n_tensors());
            for (a, b) in ours.tensors().zip(theirs.tensors()) {
                assert_eq!((a.name(), a.dims(), a.offset()), (&b.name[..], &b.shape[..], b.offset));
                assert_eq!((a.tensor_type().id(), a.n_bytes()), (b.kind, b.size), "{}", a.name());
            }
            for entry in ours.metadata() {
                let other = &theirs.metadata()[entry.key];
                match &entry.value {
                    Value::U32(n) => assert_eq!(other.as_u64(), Some(u64::from(*n)), "{}", entry.key),
                    Value::F32(v) => assert_eq!(other.as_f64().map(|o| o as f32), Some(*v), "{}", entry.key),
                    Value::Array(a) => assert_eq!(other.as_array().map(Vec::len), Some(a.len() as usize)),
                    text => assert_eq!(other.as_str(), text.as_str(), "{}", entry.key),
                }
            }
        }
    }
}

#[test]
fn one_flipped_bit_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("qwen2", &model);
    let out = dir.path().join("out");
    cut(&model, &[range(1, 2)], &out);
    let path = out.join("m.middle-1..2.gguf");
    let whole = fs::read(&path).unwrap();
    let gguf = Gguf::from_bytes(whole.clone()).unwrap();
    let places: Vec<_> =
        gguf.tensors().map(|t| (t.name().to_owned(), t.file_offset(), t.n_bytes())).collect();
    slice::verify(&path, |_, _| {}).unwrap();
    let mut rng = Rng(3);
    let damaged = dir.path().join("damaged.gguf");
    for _ in 0..1000 {
        let (name, start, len) = &places[rng.below(places.len() as u64) as usize];
        let mut bytes = whole.clone();
        bytes[(start + rng.below(*len)) as usize] ^= 1 << rng.below(8);
        fs::write(&damaged, &bytes).unwrap();
        match slice::verify(&damaged, |_, _| {}) {
            Err(SliceError::Tensor { tensor, .. }) => assert_eq!(tensor, *name),
            other => panic!("{name}: {other:?}"),
        }
    }
    // before the data: refused as a file, or by the digest of the header
    for _ in 0..1000 {
        let mut bytes = whole.clone();
        let at = rng.below(gguf.data_offset()) as usize;
        bytes[at] ^= 1 << rng.below(8);
        fs::write(&damaged, &bytes).unwrap();
        assert!(slice::verify(&damaged, |_, _| {}).is_err(), "byte {at}");
    }
    // between the tensors and behind them
    let mut bytes = whole.clone();
    bytes.push(1);
    fs::write(&damaged, &bytes).unwrap();
    assert!(slice::verify(&damaged, |_, _| {}).is_err(), "a byte more");
}

/// Of the settings, whatever order they stand in; not of names and tokenizers, nor of the weights.
#[test]
fn parameters_have_a_digest_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let model = out.join("model.gguf");
    common::tiny("llama", &model);
    let manifest = cut(&model, &[range(1, 1), range(2, 3)], out);
    let digest = manifest.model.params_sha256.clone().unwrap();
    for entry in &manifest.slices {
        let info = SliceInfo::read(out.join(&entry.file)).unwrap();
        assert_eq!(info.params_sha256.unwrap().to_string(), digest, "{}", entry.file);
    }

    // as docs/ARCHITECTURE.md has it, written without the library's help
    let gguf = Gguf::open(&model).unwrap();
    let mut records = BTreeMap::new();
    for entry in gguf.metadata().filter(|e| e.key.starts_with("llama.") || e.key == "general.architecture") {
        let mut record = (entry.key.len() as u64).to_le_bytes().to_vec();
        record.extend(entry.key.as_bytes());
        record.extend(entry.value.value_type().id().to_le_bytes());
        entry.value.encode(&mut record);
        records.insert(entry.key.as_bytes().to_vec(), record);
    }
    let all: Vec<u8> = b"dim params v1".iter().copied().chain(records.into_values().flatten()).collect();
    assert_eq!(Sha::of(&all).to_string(), digest);

    type Keys = Vec<(String, Value<'static>)>;
    let with = |change: &dyn Fn(&mut Keys)| {
        let mut keys: Vec<_> = gguf.metadata().map(|e| (e.key.to_owned(), e.value.into_owned())).collect();
        change(&mut keys);
        let path = out.join("changed.gguf");
        write_with(&gguf, &path, &keys);
        digest::of_params(&Gguf::open(&path).unwrap(), "llama").to_string()
    };
    let set = |key: &'static str, value: Value<'static>| {
        with(&move |keys| keys.iter_mut().filter(|(k, _)| k == key).for_each(|(_, v)| *v = value.clone()))
    };
    assert_eq!(with(&|_| {}), digest);
    assert_eq!(with(&|keys| keys.reverse()), digest, "the order of keys");
    assert_eq!(set("general.name", Value::string("another name")), digest, "a name");
    assert_eq!(with(&|keys| keys.retain(|(k, _)| !k.starts_with("tokenizer."))), digest, "the tokenizer");
    assert_ne!(set("llama.rope.freq_base", Value::F32(5e5)), digest);
    assert_ne!(set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-3)), digest);
    assert_ne!(with(&|keys| keys.retain(|(k, _)| k != "llama.rope.freq_base")), digest, "a key less");
    assert_ne!(with(&|keys| keys.push(("llama.rope.scaling.factor".into(), Value::F32(2.0)))), digest);
    // what a slice without the key says is that it is not known
    let slice = Gguf::open(out.join(&manifest.slices[1].file)).unwrap();
    let keys: Vec<_> = slice
        .metadata()
        .filter(|e| e.key != "dim.params.sha256")
        .map(|e| (e.key.to_owned(), e.value.into_owned()))
        .collect();
    write_with(&slice, &out.join("older.gguf"), &keys);
    assert_eq!(SliceInfo::read(out.join("older.gguf")).unwrap().params_sha256, None);
}

#[test]
fn slices_of_different_models_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let infos: Vec<_> = [1, 2]
        .into_iter()
        .map(|seed| {
            let model = dir.path().join("model.gguf");
            Spec::tiny("qwen2").unwrap().seed(seed).write(&model).unwrap();
            let out = dir.path().join(seed.to_string());
            cut(&model, &[range(1, 2)], &out);
            SliceInfo::read(out.join("m.head.gguf")).unwrap()
        })
        .collect();
    assert_ne!(infos[0].model_sha256, infos[1].model_sha256);
    assert_eq!((infos[0].role, infos[0].blocks, infos[0].model_blocks), (Role::Head, range(0, 0), 6));
    let error = SliceInfo::read(dir.path().join("model.gguf")).unwrap_err();
    assert!(matches!(error, SliceError::NotASlice(_)), "{error}");
}

#[test]
fn a_manifest_that_does_not_hold_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("qwen2", &model);
    let manifest = cut(&model, &[range(1, 2)], dir.path());
    let path = dir.path().join("m.split.json");
    let refused = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = manifest.clone();
        change(&mut changed);
        changed.write(&path).unwrap();
        Manifest::read(&path).unwrap_err().to_string()
    };
    assert!(refused(&|m| m.version = 2).contains("version 2"));
    assert!(refused(&|m| m.slices.truncate(2)).contains("is the middle"));
    assert!(refused(&|m| m.slices[1].first = 2).contains("do not follow"));
    assert!(refused(&|m| m.model.n_blocks = 7).contains("7 blocks"));
    for name in ["../x.gguf", "/etc/x", "..", "", "a\\b"] {
        assert!(refused(&|m| m.slices[1].file = name.into()).contains("beside the manifest"), "{name}");
    }
    fs::write(&path, b"[1, 2").unwrap();
    assert!(Manifest::read(&path).unwrap_err().to_string().contains("not a manifest"));
}

// ---------------------------------------------------------------------------------------------------------------
// Interrupted

/// Every slice under `out` is whole and right, or not there. Returns how many are there.
fn assert_whole_or_absent(out: &Path, slices: &[&str], identities: &[String]) -> usize {
    let mut there = 0;
    for name in slices {
        let path = out.join(name);
        if path.exists() {
            let info = slice::verify(&path, |_, _| {}).unwrap_or_else(|e| panic!("a half slice: {e}"));
            assert!(identities.contains(&info.model_sha256.to_string()), "{name} is of another model");
            there += 1;
        }
    }
    there
}

const SLICES: [&str; 3] = ["model.head.gguf", "model.middle-1..2.gguf", "model.tail.gguf"];

fn program(model: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dim-split"));
    command.arg(model).args(["--middle", "1..2", "--out"]).arg(out);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn assert_clean(out: &Path) {
    let mut expected: Vec<String> = SLICES.iter().map(|s| s.to_string()).collect();
    expected.push("model.split.json".into());
    expected.sort();
    assert_eq!(names(out), expected, "only the slices and the manifest");
}

/// Two models of one shape, so that slices of an older run are in the way.
fn two_models(dir: &Path) -> ([PathBuf; 2], Vec<String>) {
    let mut identities = Vec::new();
    let models = [1, 2].map(|seed| {
        let folder = dir.join(seed.to_string());
        fs::create_dir(&folder).unwrap();
        let path = folder.join("model.gguf");
        Spec::new("demo", Some("qwen2")).unwrap().blocks(6).seed(seed).write(&path).unwrap();
        identities.push(digest::of_model(&Gguf::open(&path).unwrap(), |_| {}).unwrap().to_string());
        path
    });
    (models, identities)
}

#[test]
fn killed_at_any_point_no_half_slice_remains() {
    let dir = tempfile::tempdir().unwrap();
    let (models, identities) = two_models(dir.path());
    let out = dir.path().join("out");
    let started = Instant::now();
    assert!(program(&models[0], &out).status().unwrap().success());
    let whole = started.elapsed();
    let mut rng = Rng(11);
    let (mut killed, mut left_temp) = (0, 0);
    for round in 0.. {
        let mut child = program(&models[round % 2], &out).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(rng.below(whole.as_micros() as u64)));
        child.kill().unwrap();
        if child.wait().unwrap().signal() == Some(9) {
            killed += 1;
        }
        left_temp += usize::from(names(&out).iter().any(|n| n.ends_with(".dim-part")));
        // old or new, but whole: the run before was complete
        assert_eq!(assert_whole_or_absent(&out, &SLICES, &identities), 3);
        // the next run starts clean
        assert!(program(&models[round % 2], &out).status().unwrap().success());
        assert_clean(&out);
        let one = &identities[round % 2..][..1];
        assert_eq!(assert_whole_or_absent(&out, &SLICES, one), 3);
        if killed == 20 {
            break;
        }
        assert!(round < 200, "{killed} of {round} runs were killed in time");
    }
    assert!(left_temp > 0, "the kills hit the writing");
    // into an empty folder: absent or whole
    fs::remove_dir_all(&out).unwrap();
    let mut child = program(&models[0], &out).spawn().unwrap();
    std::thread::sleep(whole / 2);
    child.kill().unwrap();
    child.wait().unwrap();
    if out.exists() {
        assert_whole_or_absent(&out, &SLICES, &identities);
    }
}

/// A limit on file size stands for a disk that fills up: it needs no privilege, and strikes at an exact byte.
#[test]
fn writing_that_fails_at_any_point_leaves_the_old_slices_and_no_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (models, identities) = two_models(dir.path());
    let out = dir.path().join("out");
    assert!(program(&models[0], &out).status().unwrap().success());
    let largest = SLICES.iter().map(|s| fs::metadata(out.join(s)).unwrap().len()).max().unwrap();
    let mut rng = Rng(5);
    for _ in 0..20 {
        let blocks = rng.below(largest / 512 - 1);
        let script = r#"trap '' XFSZ; ulimit -f "$1"; shift; exec "$@""#;
        let out_of = |kept: &Path| -> Output {
            Command::new("sh")
                .args(["-c", script, "sh", &blocks.to_string(), env!("CARGO_BIN_EXE_dim-split")])
                .arg(&models[1])
                .args(["--middle", "1..2", "--out"])
                .arg(kept)
                .output()
                .unwrap()
        };
        let output = out_of(&out);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{blocks} blocks: {text}");
        assert!(text.contains("cannot write") && text.contains(".gguf"), "{text}");
        assert_clean(&out);
        assert_eq!(assert_whole_or_absent(&out, &SLICES, &identities[..1]), 3);

        let empty = dir.path().join("empty");
        assert_eq!(out_of(&empty).status.code(), Some(1));
        assert_eq!(names(&empty), [""; 0], "nothing under any name");
    }
}

/// A real disk that fills up, where the system lets a test mount one; the test above does not depend on it.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_leaves_the_old_slices_and_no_rest() {
    match common::small_disk() {
        Some(disk) => fill_up(&disk),
        None => common::on_a_small_disk("160m", "a_disk_that_fills_up_leaves_the_old_slices_and_no_rest"),
    }
}

#[cfg(target_os = "linux")]
fn fill_up(disk: &Path) {
    let (models, identities) = two_models(disk);
    let out = disk.join("out");
    fs::create_dir(&out).unwrap();
    let plans: Vec<Gguf> = models.iter().map(|m| Gguf::open(m).unwrap()).collect();
    let request = Request { stem: "model".into(), ..request(&[range(1, 2)]) };
    let plan = Plan::new(&plans[0], &request).unwrap();
    split::split(&plan, &out, "model", |_| {}).unwrap();
    let plan = Plan::new(&plans[1], &request).unwrap();
    let mut rng = Rng(9);
    let filler = disk.join("filler");
    for _ in 0..20 {
        // somebody else takes what is left, in the middle of the run
        // (what is told of the last pieces comes when they are written)
        let at = rng.below(plan.slices.iter().map(|s| s.weight_bytes).sum::<u64>() - (10 << 20));
        let mut filled = false;
        let result = split::split(&plan, &out, "model", |progress| {
            if let split::CutProgress::Writing(done, ..) = progress
                && done >= at
                && !filled
            {
                filled = true;
                common::fill(&filler);
            }
        });
        fs::remove_file(&filler).unwrap();
        match result {
            Err(SplitError::Write(e)) => assert!(e.to_string().contains("No space left"), "{e}"),
            other => panic!("{other:?}"),
        }
        assert_clean(&out);
        assert_eq!(assert_whole_or_absent(&out, &SLICES, &identities[..1]), 3);
    }
    // known beforehand: nothing is begun
    common::fill(&filler);
    let error = split::split(&plan, &out, "model", |_| panic!("written without room")).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, SplitError::Space { .. })
            && text.starts_with("need ")
            && text.contains(", have 0.0 MiB in "),
        "{text}"
    );
    assert_clean(&out);
    println!("20 of 20 runs");
}

/// Heap, whatever the model's size: slices are streamed, and mapped for their canary. The middles here are larger than
/// what is allowed, the second one of a type that llama.cpp would rather keep a second time in another order.
#[cfg(target_os = "linux")]
#[test]
fn cutting_takes_less_than_64_mib_of_heap() {
    let dir = tempfile::tempdir().unwrap();
    for weights in ["f16", "q4_k"] {
        let model = dir.path().join("model.gguf");
        let spec = Spec::new("qwen2.5-7b", None).unwrap().blocks(3).vocab(512);
        spec.with_type(weights).unwrap().write(&model).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dim-split"));
        let (output, peak) = common::memory::peak_of(command.arg(&model).args(["--middle", "1..1"])).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let manifest = Manifest::read(dir.path().join("model.split.json")).unwrap();
        let middle = &manifest.slices[1];
        assert_eq!(middle.canary.is_some(), cfg!(feature = "engine"));
        let peak = peak.expect("Linux says how much");
        println!("{weights}: heap at most {} MiB for a middle of {} MiB", peak >> 20, middle.bytes >> 20);
        assert!(middle.bytes > 100 << 20 && peak > 1 << 20, "{peak} bytes");
        assert!(peak < 64 << 20, "{weights}: {} MiB of heap", peak >> 20);
    }
}

#[test]
fn the_program_reports_its_plan_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    common::tiny("qwen2", &model);
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_dim-split")).arg(&model).args(args).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, stdout, stderr) = run(&["--middle", "1..=2", "--dry-run", "--json", "--ctx", "100"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("1..2 (2 blocks)") && stderr.contains("[H]--[11]--[TTT]"), "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(json["slices"][1]["n_blocks"], 2);
    // 2 blocks, 2 heads of 64 in keys and values each, F16, 100 tokens: by hand
    let gguf = Gguf::open(&model).unwrap();
    let heads = gguf.get("qwen2.attention.head_count_kv").unwrap().as_u64().unwrap();
    let width = gguf.get("qwen2.embedding_length").unwrap().as_u64().unwrap();
    let head = width / gguf.get("qwen2.attention.head_count").unwrap().as_u64().unwrap();
    assert_eq!(json["slices"][1]["kv_bytes"], 2 * heads * 2 * head * 2 * 100);
    assert_eq!(names(dir.path()), ["model.gguf"], "a dry run writes nothing");

    // where it can be cut, and what crosses there
    let (code, stdout, stderr) = run(&["--dry-run", "--json"]);
    if cfg!(feature = "engine") {
        assert_eq!(code, Some(0), "{stderr}");
        let line = format!("before blocks 1..5: {} bytes a token as F16, {} as F32", 2 * width, 4 * width);
        assert!(stderr.contains(&line) && stderr.contains("KV cache"), "{stderr}");
        let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(json["cuts"].as_array().unwrap().len(), 5);
        assert_eq!(json["cuts"][2]["before"], 3);
        assert_eq!(json["cuts"][2]["parts"][0]["values"], width);
    } else {
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("built without llama.cpp"), "{stderr}");
    }
    // and without either of the two there is nothing to do
    let (code, _, stderr) = run(&[]);
    assert!(code == Some(2) && stderr.contains("--middle A..B"), "{stderr}");
    // a projector beside it is named, and left alone
    fs::write(dir.path().join("mmproj-model-f16.gguf"), b"GGUF").unwrap();
    let (code, _, stderr) = run(&["--middle", "1..2", "--dry-run"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("mmproj-model-f16.gguf") && stderr.contains("left alone"), "{stderr}");

    let (code, _, stderr) = run(&["--middle", "1-2"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("A..B"), "{stderr}");
    let (code, _, stderr) = run(&["--middle", "0..2"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("nearest range is 1..2"), "{stderr}");
}
