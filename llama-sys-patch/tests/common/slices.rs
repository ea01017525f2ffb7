//! Slices as files: the whole model's keys, some of its tensors, and the names, types and shapes of the others.

use std::path::Path;

use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Array, Gguf, Value};

/// What a slice says of the tensors that it lacks.
#[derive(Clone, Default)]
pub(crate) struct Absent {
    pub names: Vec<String>,
    pub types: Vec<u32>,
    pub shapes: Vec<u64>,
}

impl Absent {
    fn push(&mut self, name: &str, tensor_type: u32, dims: &[u64]) {
        self.names.push(name.to_owned());
        self.types.push(tensor_type);
        self.shapes.extend((0..4).map(|d| dims.get(d).copied().unwrap_or(1)));
    }

    pub(crate) fn keys(&self) -> Vec<(String, Value<'static>)> {
        let key = |name: &str, array| (format!("dim.absent.{name}"), Value::Array(array));
        vec![
            key("names", Array::of_strings(&self.names)),
            key("types", Array::of_u32(self.types.iter().copied())),
            key("shapes", Array::of_u64(self.shapes.iter().copied())),
        ]
    }
}

/// Writes the slice of `model` that holds the tensors `keep`.
pub(crate) fn write(model: &Path, keep: &[String], to: &Path) {
    write_with(model, keep, to, |absent| absent.keys());
}

/// The same, with the keys that `describe` makes of what is absent.
pub(crate) fn write_with(
    model: &Path,
    keep: &[String],
    to: &Path,
    describe: impl FnOnce(Absent) -> Vec<(String, Value<'static>)>,
) {
    let model = Gguf::open(model).expect("a model");
    let kept = |name: &str| keep.iter().any(|k| k == name);
    let mut absent = Absent::default();
    for tensor in model.tensors().filter(|t| !kept(t.name())) {
        absent.push(tensor.name(), tensor.tensor_type().id(), tensor.dims());
    }
    let mut metadata: Vec<(String, Value)> = model.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
    metadata.extend(describe(absent));
    let tensors: Vec<_> = model.tensors().filter(|t| kept(t.name())).collect();
    let specs: Vec<_> =
        tensors.iter().map(|t| TensorSpec::new(t.name(), t.tensor_type(), t.dims())).collect();
    let mut writer = GgufWriter::create(to, &metadata, &specs).expect("a slice");
    for tensor in &tensors {
        writer.write(tensor.data().expect("data")).expect("written");
    }
    writer.sync().expect("synced");
    writer.publish().expect("published");
}
