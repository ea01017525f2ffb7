//! All tensors of a model: those that a file holds, and those that a slice says it lacks.

use crate::gguf::{
    absent::Absent,
    error::{Error, Place, Rule},
    reader::{Gguf, Tensor},
    types::TensorType,
};

/// The tensors of the model that a file is, or is a slice of.
pub(super) struct Whole<'a> {
    pub(super) gguf: &'a Gguf,
    absent: &'a [Absent],
    /// Indices into `absent`, by name.
    by_name: Vec<usize>,
}

/// What is known of a tensor wherever its data is.
#[derive(Clone, Copy)]
pub(super) struct Described<'a> {
    pub(super) name: &'a str,
    pub(super) tensor_type: TensorType,
    pub(super) dims: &'a [u64],
    gguf: &'a Gguf,
    present: Option<Tensor<'a>>,
}

impl<'a> Whole<'a> {
    pub(super) fn new(gguf: &'a Gguf, absent: &'a [Absent]) -> Whole<'a> {
        let mut by_name: Vec<usize> = (0..absent.len()).collect();
        by_name.sort_unstable_by_key(|&i| absent[i].name.as_str());
        Whole { gguf, absent, by_name }
    }

    /// All of them.
    pub(super) fn tensors(&self) -> impl Iterator<Item = Described<'a>> + '_ {
        let present = self.gguf.tensors().map(|t| self.present(t));
        present.chain(self.absent.iter().map(|a| self.absent(a)))
    }

    /// The one of this name.
    pub(super) fn tensor(&self, name: &str) -> Option<Described<'a>> {
        if let Some(tensor) = self.gguf.tensor(name) {
            return Some(self.present(tensor));
        }
        let at = self.by_name.binary_search_by(|&i| self.absent[i].name.as_str().cmp(name)).ok()?;
        Some(self.absent(&self.absent[self.by_name[at]]))
    }

    fn present(&self, tensor: Tensor<'a>) -> Described<'a> {
        let (name, tensor_type, dims) = (tensor.name(), tensor.tensor_type(), tensor.dims());
        Described { name, tensor_type, dims, gguf: self.gguf, present: Some(tensor) }
    }

    fn absent(&self, absent: &'a Absent) -> Described<'a> {
        // as a file has them: without the ones behind the last dimension that says something
        let n_dims = absent.dims.iter().rposition(|&d| d > 1).map_or(1, |last| last + 1);
        let (name, dims) = (absent.name.as_str(), &absent.dims[..n_dims]);
        Described { name, tensor_type: absent.tensor_type, dims, gguf: self.gguf, present: None }
    }
}

impl Described<'_> {
    /// An error about this tensor.
    pub(super) fn error(&self, rule: Rule) -> Error {
        match &self.present {
            Some(tensor) => tensor.error(rule),
            None => {
                Error { place: Place::Tensor(self.name.to_owned()), ..Error::file(self.gguf.path(), rule) }
            }
        }
    }
}
