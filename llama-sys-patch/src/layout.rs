//! What crosses a cut, token by token.

use sha2::{Digest as _, Sha256};

use crate::error::check_status;
use crate::{Error, ffi};

/// The type of the values of a [`Part`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ValueType {
    /// May be rounded to F16 on its way.
    F32,
    /// Numbers of things: goes as it is.
    I32,
}

/// One of the tensors that go from one range to the next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// llama.cpp's name of it, for people, as `l_out-11`.
    pub name: String,
    /// What its values are.
    pub value_type: ValueType,
    /// Values of each token; four bytes each, or two where F32 is rounded to F16.
    pub values: u32,
}

/// What a row is made of, part after part: one hidden row for most models, some tensors side by side for others.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Layout {
    /// The parts, in the order in which they stand in a row.
    pub parts: Vec<Part>,
}

impl Layout {
    /// Values of a row where nothing is rounded: an `f32` each; an I32 value is the bits of one.
    pub fn width_f32(&self) -> usize {
        self.parts.iter().map(|p| p.values as usize).sum()
    }

    /// Places of two bytes of a row where F32 is rounded to F16: one for each F32 value, two for each I32 value (its lower
    /// half first).
    pub fn width_f16(&self) -> usize {
        self.parts
            .iter()
            .map(|p| match p.value_type {
                ValueType::F32 => p.values as usize,
                ValueType::I32 => 2 * p.values as usize,
            })
            .sum()
    }

    /// Bytes of a row where nothing is rounded.
    pub fn bytes_f32(&self) -> usize {
        4 * self.width_f32()
    }

    /// Bytes of a row where F32 is rounded to F16.
    pub fn bytes_f16(&self) -> usize {
        2 * self.width_f16()
    }

    /// The row is one tensor of F32 values, and no more.
    pub fn is_one_f32_row(&self) -> bool {
        matches!(self.parts.as_slice(), [part] if part.value_type == ValueType::F32)
    }

    /// SHA-256 of the layout: two stages that agree on it mean the same by a row. Of a line of text for each part: its type,
    /// its values and its name.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"dim row layout 1\n");
        for part in &self.parts {
            let value_type = match part.value_type {
                ValueType::F32 => "f32",
                ValueType::I32 => "i32",
            };
            hash.update(format!("{value_type} {} {}\n", part.values, part.name));
        }
        hash.finalize().into()
    }

    /// Calls a function of the "how many, then again with room" kind.
    pub(crate) fn read(
        mut call: impl FnMut(*mut ffi::dim_crossing, usize, *mut usize) -> ffi::dim_status,
    ) -> Result<Layout, Error> {
        let mut n = 0;
        check_status(call(std::ptr::null_mut(), 0, &raw mut n))?;
        let mut parts = vec![ffi::dim_crossing::default(); n];
        check_status(call(parts.as_mut_ptr(), parts.len(), &raw mut n))?;
        parts.truncate(n);
        Ok(Layout { parts: parts.iter().map(Part::from_c).collect() })
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, part) in self.parts.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            let value_type = match part.value_type {
                ValueType::F32 => "F32",
                ValueType::I32 => "I32",
            };
            write!(f, "{comma}{} x {value_type} {}", part.values, part.name)?;
        }
        Ok(())
    }
}

impl Part {
    fn from_c(part: &ffi::dim_crossing) -> Part {
        let name: Vec<u8> =
            part.name.iter().map(|&c| u8::from_ne_bytes(c.to_ne_bytes())).take_while(|&c| c != 0).collect();
        Part {
            name: String::from_utf8_lossy(&name).into_owned(),
            value_type: if part.type_ == ffi::DIM_VALUE_I32 { ValueType::I32 } else { ValueType::F32 },
            values: part.n_values,
        }
    }
}
