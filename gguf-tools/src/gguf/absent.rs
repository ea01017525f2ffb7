//! What a slice says it lacks: the names, types and shapes of the model's other tensors, as three arrays in its metadata.
//!
//! A slice is loaded as the whole model of which some bytes are missing. llama.cpp's loader then derives from the other
//! blocks whatever it derives from them in the whole model, and allocates nothing for them. What stands in these arrays goes
//! to ggml, which ends the process on most things that could be wrong with it: each entry is checked here first, and once
//! more by llama-sys-patch.

use std::collections::HashSet;

use super::{
    bad_absent::BadAbsent,
    error::{Error, Rule},
    limits::{MAX_BLOCKS, MAX_DIMS, MAX_NAME_BYTES},
    names::block_of,
    reader::{Gguf, Tensor},
    types::{TensorType, ValueType},
    value::{Array, Value},
};

/// The keys of a slice that say what it lacks. Entry after entry, the three belong together.
pub mod keys {
    /// array of strings: the tensors' names.
    pub const NAMES: &str = "dim.absent.names";
    /// array of u32: their types, by ggml's numbers.
    pub const TYPES: &str = "dim.absent.types";
    /// array of u64: their dimensions, four each, the row's length first, 1 where there are fewer.
    pub const SHAPES: &str = "dim.absent.shapes";
}

/// A tensor of the model that a slice does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// Its name.
    pub name: String,
    /// Its type.
    pub tensor_type: TensorType,
    /// Its dimensions as ggml orders them, padded with 1.
    pub dims: [u64; MAX_DIMS],
}

impl From<Tensor<'_>> for Absent {
    fn from(tensor: Tensor<'_>) -> Absent {
        let mut dims = [1; MAX_DIMS];
        dims.iter_mut().zip(tensor.dims()).for_each(|(to, &from)| *to = from);
        Absent { name: tensor.name().to_owned(), tensor_type: tensor.tensor_type(), dims }
    }
}

/// Whether the file says that it lacks tensors.
pub fn is_said(gguf: &Gguf) -> bool {
    [keys::NAMES, keys::TYPES, keys::SHAPES].iter().any(|key| gguf.entry(key).is_some())
}

/// The keys that say that these are lacking.
pub fn entries(absent: &[Absent]) -> [(&'static str, Value<'static>); 3] {
    let names = Array::of_strings(absent.iter().map(|a| a.name.as_bytes()));
    let types = Array::of_u32(absent.iter().map(|a| a.tensor_type.id()));
    let shapes = Array::of_u64(absent.iter().flat_map(|a| a.dims));
    [(keys::NAMES, names), (keys::TYPES, types), (keys::SHAPES, shapes)].map(|(k, a)| (k, Value::Array(a)))
}

/// What the file says that it lacks, each entry checked; nothing where it says nothing of it.
///
/// # Errors
/// The first rule that is broken, with the entry.
pub fn read(gguf: &Gguf) -> Result<Vec<Absent>, Error> {
    if !is_said(gguf) {
        return Ok(Vec::new());
    }
    let names = array(gguf, keys::NAMES, ValueType::String)?;
    let types = array(gguf, keys::TYPES, ValueType::U32)?;
    let shapes = array(gguf, keys::SHAPES, ValueType::U64)?;
    let n = names.len();
    if n > MOST {
        let must = format!("at most {MOST}, more than any model has");
        return Err(gguf.key_error(keys::NAMES, Rule::Hparam { says: format!("{n} tensors"), must }));
    }
    for (key, len, each) in [(keys::TYPES, types.len(), 1), (keys::SHAPES, shapes.len(), MAX_DIMS as u64)] {
        if len != n * each {
            let must = format!("{}, as {} has {n} names", n * each, keys::NAMES);
            return Err(gguf.key_error(key, Rule::Hparam { says: format!("{len} values"), must }));
        }
    }
    let mut absent = Vec::new();
    let mut seen = HashSet::new();
    let mut dims = shapes.iter().map(|value| value.as_u64().unwrap_or(0));
    for (entry, (name, ty)) in names.strings().zip(types.iter()).enumerate() {
        let dims = [(); MAX_DIMS].map(|()| dims.next().unwrap_or(0));
        let checked = check(gguf, name, ty.as_u32(), dims, &mut seen);
        absent.push(checked.map_err(|why| {
            let name = String::from_utf8_lossy(name).into_owned();
            gguf.key_error(key(why), Rule::Absent { entry, name, why })
        })?);
    }
    Ok(absent)
}

fn array<'a>(gguf: &'a Gguf, key: &'static str, element: ValueType) -> Result<Array<'a>, Error> {
    let must = match element {
        ValueType::String => "an array of strings",
        ValueType::U32 => "an array of u32",
        _ => "an array of u64",
    };
    match gguf.get(key) {
        Some(Value::Array(array)) if array.element_type() == element => Ok(array),
        Some(other) => Err(gguf.key_error(key, Rule::KeyType { found: other.value_type(), must })),
        None => Err(gguf.key_error(key, Rule::KeyMissing)),
    }
}

fn check<'a>(
    gguf: &Gguf,
    name: &'a [u8],
    ty: Option<u32>,
    dims: [u64; MAX_DIMS],
    seen: &mut HashSet<&'a str>,
) -> Result<Absent, BadAbsent> {
    let text = std::str::from_utf8(name).ok().filter(|text| !text.contains('\0'));
    let text = text.ok_or(BadAbsent::NameNotText)?;
    if text.is_empty() {
        return Err(BadAbsent::NameEmpty);
    }
    if text.len() as u64 > MAX_NAME_BYTES {
        return Err(BadAbsent::NameTooLong);
    }
    if !seen.insert(text) {
        return Err(BadAbsent::NamedTwice);
    }
    if gguf.tensor(text).is_some() {
        return Err(BadAbsent::Present);
    }
    match block_of(text) {
        None if text.starts_with("blk.") => return Err(BadAbsent::BlockNotNumber),
        Some(block) if block >= MAX_BLOCKS => return Err(BadAbsent::NoSuchBlock),
        _ => {}
    }
    let tensor_type = ty.and_then(TensorType::from_id).ok_or(BadAbsent::TypeUnknown)?;
    if let Some(index) = dims.iter().position(|&d| d == 0 || d > i64::MAX as u64) {
        return Err(BadAbsent::Dim { index, value: dims[index] });
    }
    if !dims[0].is_multiple_of(tensor_type.block_len()) {
        return Err(BadAbsent::RowNotWhole { row: dims[0], ty: tensor_type });
    }
    // ggml counts in signed numbers, and pads what it allocates
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= i64::MAX as u64);
    let bytes = tensor_type.tensor_bytes(&dims).filter(|&n| n <= i64::MAX as u64 / 2);
    if elements.is_none() || bytes.is_none() {
        return Err(BadAbsent::TooLarge);
    }
    Ok(Absent { name: text.to_owned(), tensor_type, dims })
}

/// Which of the keys says what is wrong.
fn key(why: BadAbsent) -> &'static str {
    use BadAbsent::{Dim, RowNotWhole, TooLarge, TypeUnknown};
    match why {
        TypeUnknown => keys::TYPES,
        Dim { .. } | RowNotWhole { .. } | TooLarge => keys::SHAPES,
        _ => keys::NAMES,
    }
}

/// Far above any model's tensors.
const MOST: u64 = 1 << 20;
