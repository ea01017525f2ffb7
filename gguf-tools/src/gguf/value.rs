//! Metadata values, lossless: type, order and bytes as in the file.
//!
//! An array keeps its elements as the file's own bytes and decodes them one at a time. A 150,000-token
//! vocabulary therefore costs nothing to hold, and a small file cannot ask for a large allocation.

use std::borrow::Cow;

use super::types::ValueType;

/// One metadata value; borrowed from a file, or owned (`Value<'static>`) when built to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// unsigned, 1 byte
    U8(u8),
    /// signed, 1 byte
    I8(i8),
    /// unsigned, 2 bytes
    U16(u16),
    /// signed, 2 bytes
    I16(i16),
    /// unsigned, 4 bytes
    U32(u32),
    /// signed, 4 bytes
    I32(i32),
    /// single
    F32(f32),
    /// one byte, 0 or 1
    Bool(bool),
    /// any bytes
    String(Cow<'a, [u8]>),
    /// elements of one type
    Array(Array<'a>),
    /// unsigned, 8 bytes
    U64(u64),
    /// signed, 8 bytes
    I64(i64),
    /// double
    F64(f64),
}

impl<'a> Value<'a> {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// A string value of this text.
    pub fn string(text: impl Into<String>) -> Value<'static> {
        Value::String(Cow::Owned(text.into().into_bytes()))
    }

    /// The text, if it is a string and UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// The number, if it is an integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// As [`as_u64`](Self::as_u64), where it fits 32 bits.
    pub fn as_u32(&self) -> Option<u32> {
        self.as_u64()?.try_into().ok()
    }

    /// The number, if it is a single or a double.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }

    /// The flag, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The array, if it is one.
    pub fn as_array(&self) -> Option<&Array<'a>> {
        match self {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }

    /// The same value, owning its bytes.
    pub fn into_owned(self) -> Value<'static> {
        match self {
            Value::String(s) => Value::String(Cow::Owned(s.into_owned())),
            Value::Array(a) => Value::Array(a.into_owned()),
            Value::U8(v) => Value::U8(v),
            Value::I8(v) => Value::I8(v),
            Value::U16(v) => Value::U16(v),
            Value::I16(v) => Value::I16(v),
            Value::U32(v) => Value::U32(v),
            Value::I32(v) => Value::I32(v),
            Value::F32(v) => Value::F32(v),
            Value::Bool(v) => Value::Bool(v),
            Value::U64(v) => Value::U64(v),
            Value::I64(v) => Value::I64(v),
            Value::F64(v) => Value::F64(v),
        }
    }

    /// Bytes of the value on disk, without its type.
    pub fn encoded_len(&self) -> u64 {
        match self {
            Value::String(s) => 8 + s.len() as u64,
            Value::Array(a) => 12 + a.bytes.len() as u64,
            other => other.value_type().min_size(),
        }
    }

    /// Appends the value as it stands on disk, without its type.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => out.extend(v.to_le_bytes()),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_bits().to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_bits().to_le_bytes()),
            Value::String(s) => {
                out.extend((s.len() as u64).to_le_bytes());
                out.extend_from_slice(s);
            }
            Value::Array(a) => {
                out.extend(a.element.id().to_le_bytes());
                out.extend(a.len.to_le_bytes());
                out.extend_from_slice(&a.bytes);
            }
        }
    }

    /// Decodes a value that the parser (or this module) has already walked once.
    pub(super) fn decode(kind: ValueType, bytes: &'a [u8]) -> Option<(Value<'a>, &'a [u8])> {
        fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
            bytes.split_first_chunk::<N>().map(|(head, rest)| (*head, rest))
        }
        Some(match kind {
            ValueType::U8 => take(bytes).map(|(b, r)| (Value::U8(u8::from_le_bytes(b)), r))?,
            ValueType::I8 => take(bytes).map(|(b, r)| (Value::I8(i8::from_le_bytes(b)), r))?,
            ValueType::U16 => take(bytes).map(|(b, r)| (Value::U16(u16::from_le_bytes(b)), r))?,
            ValueType::I16 => take(bytes).map(|(b, r)| (Value::I16(i16::from_le_bytes(b)), r))?,
            ValueType::U32 => take(bytes).map(|(b, r)| (Value::U32(u32::from_le_bytes(b)), r))?,
            ValueType::I32 => take(bytes).map(|(b, r)| (Value::I32(i32::from_le_bytes(b)), r))?,
            ValueType::F32 => {
                take(bytes).map(|(b, r)| (Value::F32(f32::from_bits(u32::from_le_bytes(b))), r))?
            }
            ValueType::Bool => take::<1>(bytes).map(|(b, r)| (Value::Bool(b[0] != 0), r))?,
            ValueType::U64 => take(bytes).map(|(b, r)| (Value::U64(u64::from_le_bytes(b)), r))?,
            ValueType::I64 => take(bytes).map(|(b, r)| (Value::I64(i64::from_le_bytes(b)), r))?,
            ValueType::F64 => {
                take(bytes).map(|(b, r)| (Value::F64(f64::from_bits(u64::from_le_bytes(b))), r))?
            }
            ValueType::String => {
                let (len, rest) = take::<8>(bytes)?;
                let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(len)).ok()?)?;
                (Value::String(Cow::Borrowed(text)), rest)
            }
            ValueType::Array => {
                let (element, rest) = take::<4>(bytes)?;
                let (len, rest) = take::<8>(rest)?;
                let element = ValueType::from_id(u32::from_le_bytes(element))?;
                let len = u64::from_le_bytes(len);
                let n_bytes = elements_bytes(element, len, rest)?;
                let (data, rest) = rest.split_at_checked(n_bytes)?;
                (Value::Array(Array { element, len, bytes: Cow::Borrowed(data) }), rest)
            }
        })
    }
}

/// How many bytes `len` elements take at the start of `bytes`.
fn elements_bytes(element: ValueType, len: u64, bytes: &[u8]) -> Option<usize> {
    if let Some(size) = element.size() {
        return usize::try_from(len.checked_mul(size)?).ok();
    }
    let mut rest = bytes;
    for _ in 0..len {
        rest = match element {
            // a string is skipped without building anything
            ValueType::String => {
                let (n, after) = rest.split_first_chunk::<8>()?;
                after.get(usize::try_from(u64::from_le_bytes(*n)).ok()?..)?
            }
            _ => Value::decode(element, rest)?.1,
        };
    }
    Some(bytes.len() - rest.len())
}

/// An array: its element type, count, and elements as they stand on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array<'a> {
    pub(super) element: ValueType,
    pub(super) len: u64,
    pub(super) bytes: Cow<'a, [u8]>,
}

impl<'a> Array<'a> {
    /// The elements' type.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// How many elements there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as they stand on disk (strings with their lengths).
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The elements, decoded one at a time.
    pub fn iter(&self) -> Elements<'_> {
        Elements { element: self.element, left: self.len, bytes: &self.bytes }
    }

    /// The elements as byte strings; empty if they are not strings.
    pub fn strings(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest: &[u8] = if self.element == ValueType::String { &self.bytes } else { &[] };
        std::iter::from_fn(move || {
            let (n, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*n)).ok()?)?;
            rest = after;
            Some(text)
        })
    }

    /// Elements `range` only. None if the range ends past the last element.
    pub fn slice(&self, range: std::ops::Range<u64>) -> Option<Array<'static>> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        let mut bytes = Vec::new();
        let count = range.end - range.start;
        if let Some(size) = self.element.size() {
            let start = usize::try_from(range.start * size).ok()?;
            let end = usize::try_from(range.end * size).ok()?;
            bytes.extend_from_slice(self.bytes.get(start..end)?);
        } else {
            for value in
                self.iter().skip(usize::try_from(range.start).ok()?).take(usize::try_from(count).ok()?)
            {
                value.encode(&mut bytes);
            }
        }
        Some(Array { element: self.element, len: count, bytes: Cow::Owned(bytes) })
    }

    /// The same array, owning its bytes.
    pub fn into_owned(self) -> Array<'static> {
        Array { element: self.element, len: self.len, bytes: Cow::Owned(self.bytes.into_owned()) }
    }

    /// An array of byte strings.
    pub fn of_strings<S: AsRef<[u8]>>(items: impl IntoIterator<Item = S>) -> Array<'static> {
        let mut bytes = Vec::new();
        let mut len = 0;
        for item in items {
            let item = item.as_ref();
            bytes.extend((item.len() as u64).to_le_bytes());
            bytes.extend_from_slice(item);
            len += 1;
        }
        Array { element: ValueType::String, len, bytes: Cow::Owned(bytes) }
    }

    /// An array of singles.
    pub fn of_f32(items: impl IntoIterator<Item = f32>) -> Array<'static> {
        Self::of_fixed(ValueType::F32, items.into_iter().map(|v| v.to_bits().to_le_bytes()))
    }

    /// An array of signed 32-bit integers.
    pub fn of_i32(items: impl IntoIterator<Item = i32>) -> Array<'static> {
        Self::of_fixed(ValueType::I32, items.into_iter().map(i32::to_le_bytes))
    }

    /// An array of unsigned 32-bit integers.
    pub fn of_u32(items: impl IntoIterator<Item = u32>) -> Array<'static> {
        Self::of_fixed(ValueType::U32, items.into_iter().map(u32::to_le_bytes))
    }

    /// An array of unsigned 64-bit integers.
    pub fn of_u64(items: impl IntoIterator<Item = u64>) -> Array<'static> {
        Self::of_fixed(ValueType::U64, items.into_iter().map(u64::to_le_bytes))
    }

    /// An array of flags.
    pub fn of_bool(items: impl IntoIterator<Item = bool>) -> Array<'static> {
        Self::of_fixed(ValueType::Bool, items.into_iter().map(|v| [u8::from(v)]))
    }

    fn of_fixed<const N: usize>(element: ValueType, items: impl Iterator<Item = [u8; N]>) -> Array<'static> {
        let bytes: Vec<u8> = items.flatten().collect();
        Array { element, len: (bytes.len() / N) as u64, bytes: Cow::Owned(bytes) }
    }
}

/// The elements of an [`Array`], decoded one at a time.
#[derive(Clone, Debug)]
pub struct Elements<'b> {
    element: ValueType,
    left: u64,
    bytes: &'b [u8],
}

impl<'b> Iterator for Elements<'b> {
    type Item = Value<'b>;

    fn next(&mut self) -> Option<Value<'b>> {
        self.left = self.left.checked_sub(1)?;
        let (value, rest) = Value::decode(self.element, self.bytes)?;
        self.bytes = rest;
        Some(value)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // an upper bound only: a file's count must never become a reservation
        (0, usize::try_from(self.left).ok())
    }
}
