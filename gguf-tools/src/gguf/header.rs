//! The parser: bytes in, a description of the header out. No I/O.
//!
//! Not trusted: every byte. Each length is checked against the bytes left before anything is allocated, all arithmetic
//! is checked, nesting is bounded, and arrays stay the file's own bytes, so what a file costs is bounded by what it
//! weighs.

use std::path::Path;

use super::{
    error::{Error, Foreign, Place, Rule},
    index, length,
    limits::{
        DEFAULT_ALIGNMENT, HEADER_BYTES, MAGIC, MAX_ALIGNMENT, MAX_DEPTH, MAX_DIMS, MAX_KEY_BYTES, MAX_KEYS,
        MAX_NAME_BYTES,
    },
    types::{TensorType, ValueType},
    value::Value,
};

/// A stretch of the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) len: u32,
}

/// A metadata entry, as places in the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyEntry {
    pub(super) key: Span,
    pub(super) value_start: u64,
    pub(super) kind: ValueType,
}

/// A tensor, as the header describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorEntry {
    pub(super) name: Span,
    /// Which of a model's files it stands in, from 0.
    pub(super) part: u32,
    pub(super) ty: TensorType,
    pub(super) n_dims: u32,
    pub(super) dims: [u64; MAX_DIMS],
    /// From the start of the data section.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Where this entry stands in the header.
    pub(super) info_offset: u64,
}

/// What the header says, checked.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) alignment: u64,
    /// Byte offset of the tensor data.
    pub(super) data_offset: u64,
    pub(super) entries: Vec<KeyEntry>,
    /// Indices into `entries`, by key.
    pub(super) entries_by_key: Vec<u32>,
    pub(super) tensors: Vec<TensorEntry>,
}

/// Why the parser stopped.
pub(super) enum Stop {
    /// The header goes on past the bytes at hand, inside the file.
    More,
    Refused(Refusal),
}

/// An [`Error`] that does not know its file yet.
pub(super) struct Refusal {
    place: Place,
    offset: u64,
    rule: Rule,
}

impl Stop {
    pub(super) fn refused(self) -> Refusal {
        match self {
            Stop::Refused(refusal) => refusal,
            // all bytes were at hand: cannot be
            Stop::More => Refusal { place: Place::Header, offset: 0, rule: Rule::TooShort(0) },
        }
    }
}

impl Refusal {
    pub(super) fn at(self, path: &Path) -> Error {
        Error {
            file: path.to_owned(),
            place: self.place,
            offset: Some(self.offset),
            rule: Box::new(self.rule),
        }
    }
}

/// A bounded cursor: the bytes at hand, and how many the file has.
struct Cursor<'a> {
    bytes: &'a [u8],
    /// Bytes of the whole file; at least those at hand.
    file_len: u64,
    pos: u64,
    place: Place,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        self.file_len - self.pos
    }

    fn refuse(&self, offset: u64, rule: Rule) -> Stop {
        Stop::Refused(Refusal { place: self.place.clone(), offset, rule })
    }

    fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], Stop> {
        if n > self.left() {
            return Err(self.refuse(self.pos, Rule::PastEnd { what, len: n, left: self.left() }));
        }
        let start = length(self.pos);
        let Some(bytes) = self.bytes.get(start..).and_then(|rest| rest.get(..usize::try_from(n).ok()?))
        else {
            return Err(Stop::More);
        };
        self.pos += n;
        Ok(bytes)
    }

    /// Steps over bytes that need not be at hand yet.
    fn skip(&mut self, n: u64, what: &'static str) -> Result<(), Stop> {
        self.take(n, what).map(drop)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Stop> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| Stop::More)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Stop> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, Stop> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that each take at least `least` bytes.
    fn count(&mut self, what: &'static str, least: u64, left_after: u64) -> Result<u64, Stop> {
        let at = self.pos;
        let count = self.u64(what)?;
        let left = self.left().saturating_sub(left_after);
        if count > left / least {
            return Err(self.refuse(at, Rule::Count { what, count, left, least }));
        }
        Ok(count)
    }
}

/// Fewest bytes of a metadata entry: key length, one letter, type, one byte.
const LEAST_ENTRY: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor's entry: name length, one letter, dimension count, one dimension, type, offset.
const LEAST_TENSOR: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// Reads the header of a file of `file_len` bytes, of which `bytes` are the first.
pub(super) fn parse(bytes: &[u8], file_len: u64) -> Result<Header, Stop> {
    let mut c = Cursor { bytes, file_len, pos: 0, place: Place::Header };
    if file_len < MAGIC.len() as u64 {
        return Err(c.refuse(0, Rule::TooShort(file_len)));
    }
    let magic: [u8; 4] = c.array("magic")?;
    if magic != MAGIC {
        let rule = Foreign::of(bytes).map_or(Rule::NotGguf(magic), Rule::Foreign);
        return Err(c.refuse(0, rule));
    }
    if file_len < HEADER_BYTES {
        return Err(c.refuse(0, Rule::TooShort(file_len)));
    }
    let version = match c.u32("version")? {
        v @ 2..=3 => v,
        1 => return Err(c.refuse(4, Rule::Version1)),
        v if (1..=3).contains(&v.swap_bytes()) => return Err(c.refuse(4, Rule::BigEndian(v.swap_bytes()))),
        v => return Err(c.refuse(4, Rule::Version(v))),
    };
    // the tensor count comes first; the metadata count's own 8 bytes are not room for tensors
    let n_tensors = c.count("tensor", LEAST_TENSOR, 8)?;
    let n_keys = c.count("metadata", LEAST_ENTRY, 0)?;
    if n_keys > MAX_KEYS {
        return Err(c.refuse(16, Rule::TooManyKeys(n_keys)));
    }

    // both counts were checked against the file's length: these reservations are bounded by it
    let mut entries = Vec::with_capacity(length(n_keys));
    for i in 0..n_keys {
        c.place = Place::KeyIndex(i);
        entries.push(parse_entry(&mut c)?);
    }
    let entries_by_key = sorted_by(entries.len(), |i| text(bytes, entries[i].key));
    for pair in entries_by_key.windows(2) {
        // the sort is stable, so the first of two equal ones comes first
        let (a, b) = (entries[pair[0] as usize].key, entries[pair[1] as usize].key);
        if text(bytes, a) == text(bytes, b) {
            c.place = Place::Key(text(bytes, b).to_owned());
            return Err(c.refuse(b.start - 8, Rule::KeyDuplicate { first: a.start - 8 }));
        }
    }
    let alignment = parse_alignment(&mut c, &entries, &entries_by_key)?;

    let mut tensors = Vec::with_capacity(length(n_tensors));
    for i in 0..n_tensors {
        c.place = Place::TensorIndex(i);
        tensors.push(parse_tensor(&mut c, alignment)?);
    }
    let by_name = sorted_by(tensors.len(), |i| text(bytes, tensors[i].name));
    for pair in by_name.windows(2) {
        let (a, b) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        if text(bytes, a.name) == text(bytes, b.name) {
            c.place = Place::Tensor(text(bytes, b.name).to_owned());
            return Err(c.refuse(b.info_offset, Rule::NameDuplicate));
        }
    }

    let data_offset = c.pos.next_multiple_of(alignment);
    check_ranges(&mut c, &tensors, data_offset)?;
    Ok(Header { version, alignment, data_offset, entries, entries_by_key, tensors })
}

fn parse_entry(c: &mut Cursor<'_>) -> Result<KeyEntry, Stop> {
    let at = c.pos;
    let key_len = c.u64("key length")?;
    if key_len == 0 {
        return Err(c.refuse(at, Rule::KeyEmpty));
    }
    if key_len > MAX_KEY_BYTES {
        return Err(c.refuse(at, Rule::KeyTooLong(key_len)));
    }
    let key = Span { start: c.pos, len: short(key_len) };
    let name = c.take(key_len, "key")?;
    match std::str::from_utf8(name) {
        Ok(name) if !name.contains('\0') => c.place = Place::Key(name.to_owned()),
        _ => return Err(c.refuse(at, Rule::KeyNotText)),
    }
    let kind = parse_value_type(c)?;
    let value_start = c.pos;
    skip_value(c, kind, 0)?;
    Ok(KeyEntry { key, value_start, kind })
}

fn parse_value_type(c: &mut Cursor<'_>) -> Result<ValueType, Stop> {
    let at = c.pos;
    let id = c.u32("value type")?;
    ValueType::from_id(id).ok_or_else(|| c.refuse(at, Rule::ValueType(id)))
}

/// Walks one value, checking every length in it.
fn skip_value(c: &mut Cursor<'_>, kind: ValueType, depth: u32) -> Result<(), Stop> {
    match kind {
        ValueType::Bool => {
            let at = c.pos;
            let [byte] = c.array("flag")?;
            if byte > 1 {
                return Err(c.refuse(at, Rule::Flag(byte)));
            }
            Ok(())
        }
        ValueType::String => {
            let len = c.u64("string length")?;
            c.skip(len, "string")
        }
        ValueType::Array => {
            let at = c.pos;
            if depth == MAX_DEPTH {
                return Err(c.refuse(at, Rule::TooDeep));
            }
            let element = parse_value_type(c)?;
            let count = c.count("array element", element.min_size(), 0)?;
            match element {
                ValueType::Bool => {
                    let start = c.pos;
                    let flags = c.take(count, "flags")?;
                    match flags.iter().position(|&b| b > 1) {
                        Some(i) => Err(c.refuse(start + i as u64, Rule::Flag(flags[i]))),
                        None => Ok(()),
                    }
                }
                ValueType::String | ValueType::Array => {
                    (0..count).try_for_each(|_| skip_value(c, element, depth + 1))
                }
                // the count was checked against the bytes left, so the product cannot overflow
                fixed => c.skip(count * fixed.min_size(), "array"),
            }
        }
        fixed => c.skip(fixed.min_size(), "value"),
    }
}

fn parse_alignment(c: &mut Cursor<'_>, entries: &[KeyEntry], by_key: &[u32]) -> Result<u64, Stop> {
    let key = "general.alignment";
    let Ok(at) = by_key.binary_search_by(|&i| text(c.bytes, entries[i as usize].key).cmp(key)) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let entry = entries[by_key[at] as usize];
    c.place = Place::Key(key.to_owned());
    let offset = entry.key.start - 8;
    let rest = c.bytes.get(length(entry.value_start)..).unwrap_or_default();
    match Value::decode(entry.kind, rest) {
        Some((Value::U32(n), _)) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n.into()),
        Some((Value::U32(n), _)) => Err(c.refuse(offset, Rule::Alignment(n))),
        _ => Err(c.refuse(offset, Rule::AlignmentType(entry.kind))),
    }
}

fn parse_tensor(c: &mut Cursor<'_>, alignment: u64) -> Result<TensorEntry, Stop> {
    let info_offset = c.pos;
    let name_len = c.u64("tensor name length")?;
    if name_len == 0 {
        return Err(c.refuse(info_offset, Rule::NameEmpty));
    }
    if name_len > MAX_NAME_BYTES {
        return Err(c.refuse(info_offset, Rule::NameTooLong(name_len)));
    }
    let name = Span { start: c.pos, len: short(name_len) };
    match std::str::from_utf8(c.take(name_len, "tensor name")?) {
        Ok(text) if !text.contains('\0') => c.place = Place::Tensor(text.to_owned()),
        _ => return Err(c.refuse(info_offset, Rule::NameNotText)),
    }

    let at = c.pos;
    let n_dims = c.u32("dimension count")?;
    if !(1..=index(MAX_DIMS)).contains(&n_dims) {
        return Err(c.refuse(at, Rule::DimCount(n_dims)));
    }
    let mut dims = [1u64; MAX_DIMS];
    for index in 0..n_dims {
        let at = c.pos;
        let d = c.u64("dimension")?;
        if d == 0 || i64::try_from(d).is_err() {
            return Err(c.refuse(at, Rule::Dim { index, value: d as i64 }));
        }
        dims[index as usize] = d;
    }
    let shape = &dims[..n_dims as usize];
    let elements = shape.iter().try_fold(1i64, |n, &d| n.checked_mul(i64::try_from(d).ok()?));

    let type_at = c.pos;
    let id = c.u32("tensor type")?;
    let Some(ty) = TensorType::from_id(id) else {
        return Err(c.refuse(
            type_at,
            match TensorType::removed_name(id) {
                Some(name) => Rule::TypeRemoved { id, name },
                None => Rule::TypeUnknown(id),
            },
        ));
    };
    if !dims[0].is_multiple_of(ty.block_len()) {
        return Err(c.refuse(at, Rule::RowNotWhole { row: dims[0], ty }));
    }
    // sizes stay below 2^63, as ggml and every file system count them
    let bytes = ty.tensor_bytes(shape).filter(|&n| i64::try_from(n).is_ok());
    let (Some(_), Some(bytes)) = (elements, bytes) else {
        return Err(c.refuse(at, Rule::SizeOverflow(shape.to_vec())));
    };

    let at = c.pos;
    let offset = c.u64("data offset")?;
    if !offset.is_multiple_of(alignment) {
        return Err(c.refuse(at, Rule::OffsetUnaligned { offset, alignment }));
    }
    if offset.checked_add(bytes).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(c.refuse(at, Rule::OffsetOverflow { offset, bytes }));
    }
    Ok(TensorEntry { name, part: 0, ty, n_dims, dims, offset, bytes, info_offset })
}

/// Every tensor's data inside the file, and no two on the same bytes.
fn check_ranges(c: &mut Cursor<'_>, tensors: &[TensorEntry], data_offset: u64) -> Result<(), Stop> {
    let refuse = |c: &mut Cursor<'_>, t: &TensorEntry, rule| {
        c.place = Place::Tensor(text(c.bytes, t.name).to_owned());
        Err(c.refuse(t.info_offset, rule))
    };
    let by_offset = sorted_by(tensors.len(), |i| tensors[i].offset);
    for pair in by_offset.windows(2) {
        let (a, b) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        if a.offset + a.bytes > b.offset {
            return refuse(c, b, Rule::Overlap(text(c.bytes, a.name).to_owned()));
        }
    }
    // in file order, so that the first one that is cut off is named
    for &i in &by_offset {
        let t = &tensors[i as usize];
        let end = data_offset.checked_add(t.offset + t.bytes);
        match end {
            Some(end) if end <= c.file_len => {}
            Some(end) => return refuse(c, t, Rule::Truncated { short_by: end - c.file_len }),
            None => return refuse(c, t, Rule::OffsetOverflow { offset: t.offset, bytes: t.bytes }),
        }
    }
    Ok(())
}

/// The length of a text that was found to be short.
fn short(len: u64) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Indices of `n` things in the order of their keys; equal ones stay in order.
pub(super) fn sorted_by<K: Ord>(n: usize, key: impl Fn(usize) -> K) -> Vec<u32> {
    let mut order: Vec<u32> = (0..index(n)).collect();
    // by (key, index), in place: a stable sort would allocate
    order.sort_unstable_by(|&a, &b| key(a as usize).cmp(&key(b as usize)).then(a.cmp(&b)));
    order
}

/// A stretch of the header that the parser found to be text.
pub(super) fn text(header: &[u8], span: Span) -> &str {
    let start = length(span.start);
    let bytes = header.get(start..start + span.len as usize).unwrap_or_default();
    // the parser refused names and keys that are not UTF-8
    std::str::from_utf8(bytes).unwrap_or_default()
}
