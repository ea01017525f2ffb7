//! Where a cut model came from, and how a slice is made from there again: by whoever has the manifest, from a few byte
//! ranges of the source, without the rest of the model.
//!
//! A slice is what stands before its tensor data, which a recipe holds as it is, and tensors that are stretches of the
//! source's files. The header names the digest of every tensor, and the slice's digest covers the header: a slice that
//! was made by its recipe is the same to the bit, or it is found out.

use serde::{Deserialize, Serialize};

use crate::{
    gguf::write::{GgufWriter, WriteError},
    plan::{SlicePlan, Source},
};

pub use crate::source::{ModelSource, SourceFile};

/// How a slice is made from its model's source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// All bytes before the tensor data, as hex digits.
    pub header: String,
    /// Its tensors' data, in the slice's order.
    pub pieces: Vec<Piece>,
}

/// A tensor of a slice as a stretch of a file of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The tensor's name in the slice.
    pub tensor: String,
    /// Which of [`ModelSource::files`], from 0.
    pub file: u32,
    /// Byte offset of its data in that file.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

impl Recipe {
    /// The recipe of a slice whose header is complete. `None` where a tensor is no stretch of the source, and where the
    /// header is too large for a manifest (a middle's takes some 100 bytes per tensor of the model).
    ///
    /// # Errors
    /// The header cannot be read back.
    pub(crate) fn of(slice: &SlicePlan<'_>, writer: &mut GgufWriter) -> Result<Option<Recipe>, WriteError> {
        let mut pieces = Vec::with_capacity(slice.tensors.len());
        for (spec, source) in &slice.tensors {
            let (Source::Whole(tensor) | Source::Start(tensor)) = source else { return Ok(None) };
            let Some(bytes) = spec.n_bytes() else { return Ok(None) };
            let file = tensor.part_index() as u32;
            pieces.push(Piece { tensor: spec.name.clone(), file, offset: tensor.file_offset(), bytes });
        }
        if writer.data_offset() > MAX_HEADER_BYTES {
            return Ok(None);
        }
        let mut header = String::with_capacity(2 * writer.data_offset() as usize);
        writer.read_header(|bytes| push_hex(&mut header, bytes))?;
        Ok(Some(Recipe { header, pieces }))
    }

    /// The bytes before the tensor data; `None` where the text is no hex.
    pub fn header_bytes(&self) -> Option<Vec<u8>> {
        let digit = |c: u8| char::from(c).to_digit(16);
        let (pairs, rest) = self.header.as_bytes().as_chunks::<2>();
        let byte = |pair: &[u8; 2]| Some((digit(pair[0])? << 4 | digit(pair[1])?) as u8);
        rest.is_empty().then(|| pairs.iter().map(byte).collect()).flatten()
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    let digit = |n: u8| char::from_digit(n.into(), 16).unwrap_or('0');
    for byte in bytes {
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
}

/// Most bytes of a header that a manifest carries.
const MAX_HEADER_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_back_and_nothing_else_is() {
        let mut header = String::new();
        push_hex(&mut header, b"GGUF\x00\xff\x1a");
        assert_eq!(header, "4747554600ff1a");
        let recipe = |header: &str| Recipe { header: header.to_owned(), pieces: Vec::new() };
        assert_eq!(recipe(&header).header_bytes().as_deref(), Some(&b"GGUF\x00\xff\x1a"[..]));
        for bad in ["4", "4g", "474", "é"] {
            assert_eq!(recipe(bad).header_bytes(), None, "{bad}");
        }
    }
}
