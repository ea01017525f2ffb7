//! The reader: a file's header, parsed and checked once; its data, found by name.
//!
//! The header (everything before the tensor data) is read into memory when it is of ordinary size and mapped
//! otherwise. Tensor data is never read here: [`Tensor::data`] maps it for those who want a slice without a
//! copy, [`Tensor::read_at`] reads it through the file and fails with an error, not with a signal, when the
//! file became shorter meanwhile.

use std::{fs::File, path::Path};

use super::{
    error::{Error, Place, Rule},
    header::{KeyEntry, TensorEntry, sorted_by},
    index, length,
    limits::DEFAULT_ALIGNMENT,
    part::{Part, Source},
    parts::{PartName, open_all},
    types::TensorType,
    value::Value,
};

/// An opened GGUF model, in one file or several.
#[derive(Debug)]
pub struct Gguf {
    /// At least one; metadata comes from the first.
    parts: Vec<Part>,
    /// In file order, part after part.
    tensors: Vec<TensorEntry>,
    /// Indices into `tensors`, by name.
    tensors_by_name: Vec<u32>,
}

/// One metadata entry: a key and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<'a> {
    /// The key.
    pub key: &'a str,
    /// The value.
    pub value: Value<'a>,
    /// Byte offset of the entry in the file.
    pub offset: u64,
}

/// One tensor of an opened model.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    gguf: &'a Gguf,
    entry: &'a TensorEntry,
}

impl Gguf {
    /// Opens a model. `NAME-00001-of-0000N.gguf` opens all its parts as one.
    ///
    /// # Errors
    /// Every rule of the format, see [`Rule`]: the file, the key or tensor, and the byte offset.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, Error> {
        let path = path.as_ref();
        let first = Part::open(path)?;
        open_all(first).and_then(Gguf::from_parts)
    }

    /// Reads a model held in memory.
    ///
    /// # Errors
    /// As [`open`](Self::open); the file is called `<memory>`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::from_parts(vec![Part::from_bytes(bytes)?])
    }

    fn from_parts(parts: Vec<Part>) -> Result<Gguf, Error> {
        let mut parts = parts;
        let mut tensors = Vec::new();
        for (i, part) in parts.iter_mut().enumerate() {
            let mut of_part = std::mem::take(&mut part.header.tensors);
            of_part.iter_mut().for_each(|t| t.part = index(i));
            if tensors.is_empty() {
                tensors = of_part;
            } else {
                tensors.extend(of_part);
            }
        }
        let mut gguf = Gguf { parts, tensors, tensors_by_name: Vec::new() };
        gguf.tensors_by_name = sorted_by(gguf.tensors.len(), |i| gguf.tensor_at(i).name());
        // inside a part the names are known to differ; this finds a name that two parts share
        for pair in gguf.tensors_by_name.windows(2) {
            let (a, b) = (gguf.tensor_at(pair[0] as usize), gguf.tensor_at(pair[1] as usize));
            if a.name() == b.name() {
                return Err(b.error(Rule::NameDuplicate));
            }
        }
        Ok(gguf)
    }

    /// The path it was opened from (the first part), or `<memory>`.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// The file's name without `.gguf`, and without `-00001-of-0000N` for a model in parts.
    pub fn stem(&self) -> String {
        if self.parts.len() > 1
            && let Some(name) = PartName::parse(self.path())
        {
            return name.stem;
        }
        let name = self.path().file_name().unwrap_or_default().to_string_lossy();
        name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
    }

    /// The files it stands in, in order.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].header.version
    }

    /// What tensor data is aligned to, in bytes.
    pub fn alignment(&self) -> u64 {
        self.parts[0].header.alignment
    }

    /// Byte offset of the tensor data in the first file.
    pub fn data_offset(&self) -> u64 {
        self.parts[0].header.data_offset
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.len).sum()
    }

    /// Bytes of all tensors' data.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The metadata in file order. Of a split model, the first part's.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = Entry<'_>> {
        let part = &self.parts[0];
        part.header.entries.iter().map(|e| entry(part, e))
    }

    /// What of the metadata a file that is written anew from this one carries on: all but how this one was spread over files,
    /// and how it laid its data out where llama.cpp could not map that (ggml asserts).
    pub fn carried(&self) -> impl Iterator<Item = Entry<'_>> {
        let cannot_be_mapped = self.alignment() < DEFAULT_ALIGNMENT;
        self.metadata().filter(move |entry| {
            !(entry.key.starts_with("split.") || entry.key == "general.alignment" && cannot_be_mapped)
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.entry(key).map(|e| e.value)
    }

    /// The entry of a key.
    pub fn entry(&self, key: &str) -> Option<Entry<'_>> {
        let part = &self.parts[0];
        part.find(key).map(|e| entry(part, e))
    }

    /// The tensors in file order, part after part.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> + Clone {
        self.tensors.iter().map(|entry| Tensor { gguf: self, entry })
    }

    /// How many tensors there are.
    pub fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// A tensor's place among [`tensors`](Self::tensors).
    ///
    /// # Panics
    /// If the tensor is another model's.
    pub fn index_of(&self, tensor: &Tensor<'_>) -> usize {
        assert!(std::ptr::eq(self, tensor.gguf), "a tensor of another model");
        // the entry is one of this slice's
        (std::ptr::from_ref(tensor.entry).addr() - self.tensors.as_ptr().addr()) / size_of::<TensorEntry>()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let at =
            self.tensors_by_name.binary_search_by(|&i| self.tensor_at(i as usize).name().cmp(name)).ok()?;
        Some(self.tensor_at(self.tensors_by_name[at] as usize))
    }

    fn tensor_at(&self, i: usize) -> Tensor<'_> {
        Tensor { gguf: self, entry: &self.tensors[i] }
    }

    /// Byte offset of a key's value in the first file.
    pub fn value_offset(&self, key: &str) -> Option<u64> {
        self.parts[0].find(key).map(|e| e.value_start)
    }

    /// Fills `buf` from byte `at` of the first file on.
    ///
    /// # Errors
    /// Reading fails, or the file ends before.
    pub fn read_file_at(&self, at: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.parts[0].read_at(at, buf).map_err(|rule| Error::file(self.path(), rule))
    }

    /// An error about a key of this model, with the place where it stands if it does.
    pub fn key_error(&self, key: &str, rule: impl Into<Rule>) -> Error {
        Error {
            file: self.path().to_owned(),
            place: Place::Key(key.to_owned()),
            offset: self.entry(key).map(|e| e.offset),
            rule: Box::new(rule.into()),
        }
    }
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.part().text(self.entry.name)
    }

    /// Its type. (`type` is a word of the language.)
    pub fn tensor_type(&self) -> TensorType {
        self.entry.ty
    }

    /// Its dimensions as ggml orders them: the row's length first. One to four.
    pub fn dims(&self) -> &'a [u64] {
        &self.entry.dims[..self.entry.n_dims as usize]
    }

    /// Bytes of its data.
    pub fn n_bytes(&self) -> u64 {
        self.entry.bytes
    }

    /// Values in it.
    pub fn n_elements(&self) -> u64 {
        self.dims().iter().product()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> u64 {
        self.entry.ty.row_bytes(self.entry.dims[0]).unwrap_or(self.entry.bytes)
    }

    /// Data offset as the file states it: from the start of its file's data section.
    pub fn offset(&self) -> u64 {
        self.entry.offset
    }

    /// Byte offset of the data in its file.
    pub fn file_offset(&self) -> u64 {
        self.part().header.data_offset + self.entry.offset
    }

    /// The file it stands in.
    pub fn file(&self) -> &'a Path {
        &self.part().path
    }

    /// Index of that file among [`Gguf::files`].
    pub fn part_index(&self) -> usize {
        self.entry.part as usize
    }

    /// The data, mapped.
    ///
    /// A file that is made shorter while it is mapped ends the process with a signal on the next access. Where
    /// that can happen, use [`read_at`](Self::read_at).
    ///
    /// # Errors
    /// The file cannot be mapped, or became shorter since it was opened.
    pub fn data(&self) -> Result<&'a [u8], Error> {
        let part = self.part();
        let start = length(self.file_offset());
        part.all()
            .map_err(|e| self.error(e))?
            .get(start..start + length(self.entry.bytes))
            .ok_or_else(|| self.error(Rule::Truncated { short_by: self.entry.bytes }))
    }

    /// Fills `buf` from byte `at` of the data on, reading through the file.
    ///
    /// # Errors
    /// Reading fails, or the file became shorter since it was opened.
    ///
    /// # Panics
    /// If the range passes the tensor's end.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<(), Error> {
        assert!(
            at.checked_add(buf.len() as u64).is_some_and(|end| end <= self.entry.bytes),
            "range past the tensor"
        );
        self.part().read_at(self.file_offset() + at, buf).map_err(|rule| self.error(rule))
    }

    /// The open file the data stands in, unless the model is held in memory.
    pub(crate) fn source(&self) -> Option<&'a File> {
        match &self.part().source {
            Source::File { file, .. } | Source::Mapped { file, .. } => Some(file),
            Source::Memory(_) => None,
        }
    }

    /// An error about this tensor.
    pub fn error(&self, rule: impl Into<Rule>) -> Error {
        Error {
            file: self.part().path.clone(),
            place: Place::Tensor(self.name().to_owned()),
            offset: Some(self.entry.info_offset),
            rule: Box::new(rule.into()),
        }
    }

    fn part(&self) -> &'a Part {
        &self.gguf.parts[self.entry.part as usize]
    }
}

impl std::fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.name(), self.tensor_type(), self.dims())
    }
}

/// An entry of a part, with its value.
fn entry<'a>(part: &'a Part, entry: &KeyEntry) -> Entry<'a> {
    // the key's length stands before it
    let offset = entry.key.start.saturating_sub(8);
    Entry { key: part.text(entry.key), value: part.value(entry), offset }
}
