//! A tensor of a type that an operation on it does not take is refused by name, before ggml meets it in a kernel and ends
//! the process: every tensor of every architecture that `dim-synth` makes, in types that it is not of. So is a number that
//! it does not take.
#![cfg(feature = "engine")]

mod common;

use std::path::Path;

use common::child::{self, Child};
use common::with_key;
use gguf_tools::gguf::{
    Gguf, TensorType, Value, check,
    write::{GgufWriter, TensorSpec},
};
use gguf_tools::synth::{FAMILIES, Spec};
use llama_sys_patch::{ContextParams, GraphPlan, Model, ModelParams, Row, Stock};

/// Integers end llama.cpp while it builds a graph, which is only tried in a process of its own (apart.rs).
const TYPES: [TensorType; 3] = [TensorType::F16, TensorType::BF16, TensorType::Q8_0];

/// The child: plans and runs every file it is told, and says so.
#[test]
fn runs_what_it_is_told() {
    child::serve(plan_and_run);
}

fn plan_and_run(path: &Path) -> Result<(), llama_sys_patch::Error> {
    let mut plan = GraphPlan::open(&[path])?;
    let planned = plan.blocks();
    let planned = plan.range(planned).map(drop);
    let model = Model::load(&[path], ModelParams { gpu_layers: Some(0), ..Default::default() })?;
    let context = ContextParams { n_ctx: 64, n_batch: 32, n_ubatch: 32, n_threads: 1, ..Default::default() };
    let mut stock = Stock::new(&model, &context, Some(1))?;
    // what is refused before it is loaded and what is refused with the context are the same
    planned?;
    let mut logits = vec![0.0; model.n_vocab()];
    let row = |position| Row { session: 0, position, want_output: position == 3 };
    stock.decode(&[0, 1, 2, 3].map(row), &[3, 5, 7, 9], &mut logits)?;
    Ok(())
}

/// The model with the tensor at `at` of another type, its bytes over and over; `false`: the format has no such file.
fn retyped(model: &Gguf, at: usize, tensor_type: TensorType, to: &Path) -> bool {
    let metadata: Vec<(String, Value<'_>)> = model.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
    let specs: Vec<TensorSpec> = model
        .tensors()
        .enumerate()
        .map(|(i, t)| {
            TensorSpec::new(t.name(), if i == at { tensor_type } else { t.tensor_type() }, t.dims())
        })
        .collect();
    let Ok(mut writer) = GgufWriter::create(to, &metadata, &specs) else { return false };
    for (tensor, spec) in model.tensors().zip(&specs) {
        let data = tensor.data().unwrap();
        let n = spec.n_bytes().unwrap() as usize;
        let bytes: Vec<u8> = data.iter().copied().cycle().take(n).collect();
        writer.write(&bytes).unwrap();
    }
    writer.finish().unwrap();
    true
}

/// Files that are tried in a child, and what came of them.
struct Tried {
    child: Child,
    ran: usize,
    /// refused by a sentence that names what is wrong
    by_name: usize,
    ended: Vec<String>,
}

impl Tried {
    fn new() -> Tried {
        Tried { child: Child::start("runs_what_it_is_told"), ran: 0, by_name: 0, ended: Vec::new() }
    }

    /// Tries `file`, if it passes the check that needs no graph. `name`: what a refusal has to say.
    fn file(&mut self, file: &Path, what: &str, name: &str) {
        if Gguf::open(file).and_then(|g| check::model(&g)).is_err() {
            return;
        }
        match self.child.load(file) {
            Ok(verdict) if verdict == "ran" => self.ran += 1,
            Ok(verdict) => self.by_name += usize::from(verdict.contains(name)),
            Err(signal) => {
                self.ended.push(format!("{what}: signal {signal}"));
                self.child = Child::start("runs_what_it_is_told");
            }
        }
    }
}

#[test]
fn no_type_of_any_tensor_ends_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let (source, changed) = (dir.path().join("model.gguf"), dir.path().join("changed.gguf"));
    let mut tried = Tried::new();
    for family in FAMILIES {
        Spec::tiny(family.arch).unwrap().blocks(2).write(&source).unwrap();
        let model = Gguf::open(&source).unwrap();
        assert_eq!(tried.child.load(&source), Ok("ran".into()), "{}", family.arch);
        // blocks are alike
        let of_interest = model.tensors().enumerate().filter(|(_, t)| !t.name().starts_with("blk.1."));
        for (at, tensor) in of_interest {
            for tensor_type in TYPES.into_iter().filter(|&other| other != tensor.tensor_type()) {
                if retyped(&model, at, tensor_type, &changed) {
                    let what = format!("{}, {} as {tensor_type:?}", family.arch, tensor.name());
                    tried.file(&changed, &what, tensor.name());
                }
            }
        }
    }
    let Tried { ran, by_name, ended, .. } = tried;
    assert!(ended.is_empty(), "{}", ended.join("\n"));
    // most norms of another type are refused before there is a graph: `check::model`
    assert!(ran > 100 && by_name > 5, "{ran} ran, {by_name} were refused by the tensor's name");
}

#[test]
fn no_number_of_a_rotation_ends_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let (source, changed) = (dir.path().join("model.gguf"), dir.path().join("changed.gguf"));
    let mut tried = Tried::new();
    for family in FAMILIES {
        Spec::tiny(family.arch).unwrap().blocks(2).write(&source).unwrap();
        for value in [0, 1, 2, 7, 8, 31, 32, 62, 63, 64, 65, 66, 127, 128, 1 << 16, 1 << 31] {
            let key = format!("{}.rope.dimension_count", family.arch);
            with_key(&source, &changed, &key, Value::U32(value), &[]);
            tried.file(&changed, &format!("{}, {value} values", family.arch), "cannot rotate");
        }
    }
    let Tried { ran, by_name, ended, .. } = tried;
    assert!(ended.is_empty(), "{}", ended.join("\n"));
    assert!(ran > 20 && by_name > 5, "{ran} ran, {by_name} were refused by the number");
}
