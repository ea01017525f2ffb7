//! What a slice says it lacks comes from a file, and goes to ggml, which ends the process on most things that could be wrong
//! with it. Fields are changed one by one, with what they mean in mind: each change is one clear error or a slice that loads,
//! and nothing is a signal.

mod common;

use std::path::{Path, PathBuf};

use common::Rng;
use gguf_tools::{
    failure::Explained,
    gguf::{
        Array, Gguf, Place, TensorType, Value, ValueType, absent,
        write::{GgufWriter, TensorSpec},
    },
    plan::{Plan, Request},
    slice::{SliceInfo, keys},
    split,
    synth::Spec,
};

/// A tiny model, cut: its middle.
fn middle(folder: &Path, arch: &str) -> PathBuf {
    let model = folder.join("model.gguf");
    Spec::tiny(arch).unwrap().write(&model).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let request = Request {
        middles: vec!["1..2".parse().unwrap()],
        stem: "m".into(),
        no_canary: true,
        ..Request::default()
    };
    split::split(&Plan::new(&gguf, &request).unwrap(), folder, "m", |_| {}).unwrap();
    folder.join("m.middle-1..2.gguf")
}

type Keys = Vec<(String, Value<'static>)>;

/// A slice's file, to be changed.
struct File {
    keys: Keys,
    tensors: Vec<(TensorSpec, Vec<u8>)>,
}

impl File {
    fn read(path: &Path) -> File {
        let gguf = Gguf::open(path).unwrap();
        let spec = |t: gguf_tools::gguf::Tensor<'_>| TensorSpec::new(t.name(), t.tensor_type(), t.dims());
        File {
            keys: gguf.metadata().map(|e| (e.key.to_owned(), e.value.into_owned())).collect(),
            tensors: gguf.tensors().map(|t| (spec(t), t.data().unwrap().to_vec())).collect(),
        }
    }

    fn write(&self, path: &Path) {
        let specs: Vec<TensorSpec> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let mut writer = GgufWriter::create(path, &self.keys, &specs).unwrap();
        self.tensors.iter().for_each(|(_, bytes)| writer.write(bytes).unwrap());
        writer.finish().unwrap();
    }

    fn array(&self, key: &str) -> Array<'static> {
        let value = self.keys.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone());
        value.and_then(|value| value.as_array().map(|a| a.clone().into_owned())).unwrap()
    }

    fn set(&mut self, key: &str, value: Value<'static>) {
        self.keys.iter_mut().filter(|(k, _)| k == key).for_each(|(_, v)| *v = value.clone());
    }

    fn names(&self) -> Vec<Vec<u8>> {
        self.array(keys::ABSENT_NAMES).strings().map(<[u8]>::to_vec).collect()
    }

    fn numbers(&self, key: &str) -> Vec<u64> {
        self.array(key).iter().map(|v| v.as_u64().unwrap()).collect()
    }

    fn set_names(&mut self, names: &[Vec<u8>]) {
        self.set(keys::ABSENT_NAMES, Value::Array(Array::of_strings(names)));
    }

    fn set_types(&mut self, types: &[u64]) {
        let types = Array::of_u32(types.iter().map(|&t| t as u32));
        self.set(keys::ABSENT_TYPES, Value::Array(types));
    }

    fn set_shapes(&mut self, shapes: &[u64]) {
        self.set(keys::ABSENT_SHAPES, Value::Array(Array::of_u64(shapes.iter().copied())));
    }
}

/// One to three changes.
fn change(file: &mut File, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let mut names = file.names();
        let mut types = file.numbers(keys::ABSENT_TYPES);
        let mut shapes = file.numbers(keys::ABSENT_SHAPES);
        if names.is_empty() || types.is_empty() || shapes.is_empty() {
            return;
        }
        let at = rng.below(names.len() as u64) as usize;
        match rng.below(20) {
            0 => drop(names.remove(at)),
            1 => drop(types.pop()),
            2 => drop(shapes.pop()),
            3 => names.push(names[at].clone()),
            4 => names[at] = edge_name(rng),
            5 => {
                names[at] = file.tensors[rng.below(file.tensors.len() as u64) as usize].0.name.clone().into()
            }
            6 => {
                let i = rng.below(names[at].len() as u64) as usize;
                names[at][i] = rng.next() as u8;
            }
            7 | 8 => {
                let i = rng.below(types.len() as u64) as usize;
                types[i] = [0, 1, 2, 4, 8, 14, 30, 31, 39, 40, 42, 43, 99, 1 << 31, u64::from(u32::MAX)]
                    [rng.below(15) as usize];
            }
            9..=12 => {
                let i = rng.below(shapes.len() as u64) as usize;
                shapes[i] = edge(rng);
            }
            13 => {
                let i = rng.below(shapes.len() as u64) as usize;
                shapes[i] = shapes[i].wrapping_add(rng.below(65)).wrapping_sub(32);
            }
            14 => {
                // a whole entry less: the model then lacks a tensor
                names.remove(at);
                types.remove(at.min(types.len() - 1));
                let from = (4 * at).min(shapes.len().saturating_sub(4));
                shapes.drain(from..from + 4.min(shapes.len()));
            }
            15 => {
                // one more that no loader asks for
                names.push(b"blk.0.nobody.weight".to_vec());
                types.push(0);
                shapes.extend([32, 1, 1, 1]);
            }
            16 => {
                let key =
                    [keys::ABSENT_NAMES, keys::ABSENT_TYPES, keys::ABSENT_SHAPES][rng.below(3) as usize];
                return file.keys.retain(|(k, _)| k != key);
            }
            17 => {
                let key =
                    [keys::ABSENT_NAMES, keys::ABSENT_TYPES, keys::ABSENT_SHAPES][rng.below(3) as usize];
                let other = [
                    Value::U32(7),
                    Value::string("x"),
                    Value::Array(Array::of_f32([1.0])),
                    Value::Array(Array::of_i32([1])),
                    Value::Array(Array::of_strings([""; 0])),
                ];
                return file.set(key, other[rng.below(5) as usize].clone());
            }
            18 => {
                let key = [keys::FIRST_BLOCK, keys::LAST_BLOCK, keys::MODEL_BLOCKS, keys::VERSION]
                    [rng.below(4) as usize];
                return file.set(key, Value::U32(edge(rng) as u32));
            }
            _ => {
                let i = rng.below(file.tensors.len() as u64) as usize;
                return drop(file.tensors.remove(i));
            }
        }
        file.set_names(&names);
        file.set_types(&types);
        file.set_shapes(&shapes);
    }
}

fn edge(rng: &mut Rng) -> u64 {
    let edges = [0, 1, 2, 31, 33, 256, 1 << 20, 1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX];
    edges[rng.below(edges.len() as u64) as usize]
}

fn edge_name(rng: &mut Rng) -> Vec<u8> {
    let names: [&[u8]; 12] = [
        b"",
        b"blk",
        b"blk.",
        b"blk.x.attn_q.weight",
        b"blk.99.attn_q.weight",
        b"blk.4294967296.attn_q.weight",
        b"blk.18446744073709551616.attn_q.weight",
        b"blk.-1.attn_q.weight",
        b"blk.01.attn_q.weight",
        b"a\0b",
        b"\xff\xfe",
        &[b'n'; 64],
    ];
    names[rng.below(names.len() as u64) as usize].to_vec()
}

/// Each rule by itself: the key, and what it says.
#[test]
fn every_field_has_its_rule() {
    let folder = tempfile::tempdir().unwrap();
    let path = middle(folder.path(), "qwen2");
    let changed = folder.path().join("changed.gguf");
    let says = |what: &dyn Fn(&mut File)| {
        let mut file = File::read(&path);
        what(&mut file);
        file.write(&changed);
        let error = SliceInfo::read(&changed).expect_err("a slice that breaks a rule");
        let key = match error.place() {
            Some(Place::Key(key)) => key.clone(),
            Some(Place::Tensor(name)) => name.clone(),
            _ => String::new(),
        };
        let hint = error.hint().map(|hint| hint.into_owned()).unwrap_or_default();
        (key, error.to_string(), hint)
    };
    let with_name = |name: &'static [u8]| {
        says(&move |file| {
            let mut names = file.names();
            names[3] = name.to_vec();
            file.set_names(&names);
        })
    };
    for (name, why) in [
        (&b""[..], "has no name"),
        (&[b'n'; 64], "more than 63 bytes"),
        (b"a\0b", "not plain text"),
        (b"\xff", "not plain text"),
        (b"blk.x.y", "without a block's number"),
        (b"blk.999.y", "of a block that the model does not have"),
        (b"blk.1.attn_q.weight", "is in the slice as well"),
        (b"blk.0.attn_q.weight", "is named twice"),
    ] {
        let (key, text, hint) = with_name(name);
        assert_eq!(key, keys::ABSENT_NAMES, "{text}");
        assert!(
            text.contains(why) && text.contains("absent tensor") && hint.contains("cut"),
            "{text}, {hint}"
        );
    }
    let with_shape = |at: usize, to: u64| {
        says(&move |file| {
            let mut shapes = file.numbers(keys::ABSENT_SHAPES);
            shapes[at] = to;
            file.set_shapes(&shapes);
        })
    };
    for (at, to, why) in
        [(0, 0, "has 0 as dimension 0"), (5, 1 << 63, "as dimension 1"), (2, 1 << 62, "can be counted")]
    {
        let (key, text, _) = with_shape(at, to);
        assert!(key == keys::ABSENT_SHAPES && text.contains(why), "{text}");
    }
    let with_type = |to: u64| {
        says(&move |file| {
            let mut types = file.numbers(keys::ABSENT_TYPES);
            types[0] = to;
            file.set_types(&types);
        })
    };
    assert!(with_type(31).1.contains("ggml does not know"));
    assert!(with_type(1 << 31).1.contains("ggml does not know"));
    let (_, text, _) = says(&|file| {
        let mut types = file.numbers(keys::ABSENT_TYPES);
        let mut shapes = file.numbers(keys::ABSENT_SHAPES);
        (types[0], shapes[0]) = (TensorType::Q8_0.id().into(), 33);
        file.set_types(&types);
        file.set_shapes(&shapes);
    });
    assert!(text.contains("rows of 33 values, Q8_0 takes multiples of 32"), "{text}");
    // the lists belong together
    assert!(says(&|f| f.set_types(&[1])).1.contains("as dim.absent.names has"));
    assert!(says(&|f| f.set_shapes(&[1, 1, 1, 1])).1.contains("as dim.absent.names has"));
    assert!(says(&|f| f.keys.retain(|(k, _)| k != keys::ABSENT_TYPES)).1.contains("missing"));
    assert!(says(&|f| f.set(keys::ABSENT_SHAPES, Value::U32(4))).1.contains("an array of u64"));
    // a block of the slice without a tensor, and a tensor of another's block
    let (key, ..) = says(&|f| f.tensors.retain(|(spec, _)| !spec.name.starts_with("blk.2.")));
    assert_eq!(key, "blk.2.*");
    let (key, text, _) = says(&|f| f.set(keys::LAST_BLOCK, Value::U32(1)));
    assert!(key.starts_with("blk.2.") && text.contains("one of 1..1"), "{text}");
    assert!(says(&|f| f.set(keys::VERSION, Value::U32(3))).1.contains("version 3"));
    assert!(says(&|f| f.set(keys::VERSION, Value::U32(1))).1.contains("version 1"));
    assert!(says(&|f| f.set(keys::MODEL_BLOCKS, Value::U32(9))).1.contains("block_count"));
    // and a slice that breaks none
    let info = SliceInfo::read(&path).unwrap();
    assert!(!info.renumbered);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.get(keys::ABSENT_NAMES).unwrap().value_type(), ValueType::Array);
    assert!(absent::read(&gguf).unwrap().len() > 30);
}

/// Thousands of changed slices, each loaded by llama.cpp in a process of its own if our reader takes it.
#[cfg(all(unix, feature = "engine"))]
mod loaded {
    use common::{child, child::Child};
    use llama_sys_patch::{ContextParams, Input, Model, ModelParams, Output, Row, Stage, StageParams};

    use super::*;

    const CHANGED: usize = 2000;

    /// The child: loads and runs every slice it is told, and says so.
    #[test]
    fn loads_what_it_is_told() {
        child::serve(run);
    }

    fn run(path: &Path) -> Result<(), llama_sys_patch::Error> {
        let params = ModelParams { gpu_layers: Some(0), no_lm_head: true, ..Default::default() };
        let model = Model::load(&[path], params)?;
        let context =
            ContextParams { n_ctx: 32, n_batch: 8, n_ubatch: 8, n_threads: 1, ..Default::default() };
        let mut stage = Stage::new(&model, StageParams::of_whole_model(&model, model.blocks(), context))?;
        let n = stage.input_layout().width_f32();
        let input: Vec<f32> = (0..2 * n).map(|i| (i as f32).sin()).collect();
        let mut output = vec![0f32; 2 * stage.output_layout().width_f32()];
        stage.evaluate(&Row::chunk(0, 0, 2), Input::F32(&input), Output::F32(&mut output))?;
        Ok(())
    }

    #[test]
    fn changed_slices_are_refused_or_load_and_nothing_is_a_signal() {
        let folder = tempfile::tempdir().unwrap();
        let (mut by_us, mut by_llama, mut ran) = (0, 0, 0);
        let mut child = Child::start("loaded::loads_what_it_is_told");
        let mut rng = Rng(41);
        for arch in ["qwen2", "gemma"] {
            let path = middle(folder.path(), arch);
            let changed = folder.path().join("changed.gguf");
            for round in 0..CHANGED / 2 {
                let mut file = File::read(&path);
                change(&mut file, &mut rng);
                if file.tensors.is_empty() {
                    continue;
                }
                file.write(&changed);
                if let Err(error) = SliceInfo::read(&changed) {
                    let text = error.to_string();
                    assert!(!text.contains('\n') && text.contains("changed.gguf"), "{text}");
                    by_us += 1;
                    continue;
                }
                match child.load(&changed) {
                    Ok(verdict) if verdict == "ran" => ran += 1,
                    Ok(_) => by_llama += 1,
                    Err(signal) => panic!("{arch}, round {round}: signal {signal}: {}", changed.display()),
                }
            }
        }
        println!("{by_us} refused by the reader, {by_llama} by llama.cpp, {ran} ran");
        assert!(by_us > 1000 && by_llama > 20 && ran > 20, "{by_us}, {by_llama}, {ran}");
    }
}
