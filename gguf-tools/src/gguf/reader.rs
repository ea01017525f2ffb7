//! The reader: a file's header, parsed and checked once; its data, found by name.
//!
//! Not trusted: every byte of the file. Each length is checked against the bytes left before anything is
//! allocated, all arithmetic is checked, nesting is bounded, and arrays stay the file's own bytes, so what a
//! file costs is bounded by what it weighs.
//!
//! The header (everything before the tensor data) is read into memory when it is of ordinary size and mapped
//! otherwise. Tensor data is never read here: [`Tensor::data`] maps it for those who want a slice without a
//! copy, [`Tensor::read_at`] reads it through the file and fails with an error, not with a signal, when the
//! file became shorter meanwhile.

use std::{
    borrow::Cow,
    fs::File,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use memmap2::Mmap;

use super::{
    error::{Error, Place, Rule},
    types::{TensorType, ValueType},
    value::Value,
};

/// Most metadata entries a file may have. Real models have about fifty.
pub const MAX_KEYS: u64 = 1 << 16;
/// Deepest nesting of arrays. The format sets no limit; nothing known uses more than two.
pub const MAX_DEPTH: u32 = 4;
/// Largest `general.alignment`. Real files use 32.
pub const MAX_ALIGNMENT: u32 = 1 << 20;

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
        super::parts::open_all(first).and_then(Gguf::from_parts)
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
            let mut of_part = std::mem::take(&mut part.tensors);
            of_part.iter_mut().for_each(|t| t.part = i as u32);
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
            && let Some(name) = super::parts::PartName::parse(self.path())
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
        self.parts[0].version
    }

    /// What tensor data is aligned to, in bytes.
    pub fn alignment(&self) -> u64 {
        self.parts[0].alignment
    }

    /// Byte offset of the tensor data in the first file.
    pub fn data_offset(&self) -> u64 {
        self.parts[0].data_offset
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
        part.entries.iter().map(|e| part.entry(e))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.entry(key).map(|e| e.value)
    }

    /// The entry of a key.
    pub fn entry(&self, key: &str) -> Option<Entry<'_>> {
        let part = &self.parts[0];
        let at =
            part.entries_by_key.binary_search_by(|&i| part.key(&part.entries[i as usize]).cmp(key)).ok()?;
        Some(part.entry(&part.entries[part.entries_by_key[at] as usize]))
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
        let part = &self.parts[0];
        let at =
            part.entries_by_key.binary_search_by(|&i| part.key(&part.entries[i as usize]).cmp(key)).ok()?;
        Some(part.entries[part.entries_by_key[at] as usize].value_start)
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
        self.part().data_offset + self.entry.offset
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
        let start = self.file_offset() as usize;
        part.all()
            .map_err(|e| self.error(e))?
            .get(start..start + self.entry.bytes as usize)
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

/// One file of a model.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    source: Source,
    /// Bytes of the file when it was opened.
    len: u64,
    version: u32,
    alignment: u64,
    data_offset: u64,
    entries: Vec<KeyEntry>,
    /// Indices into `entries`, by key.
    entries_by_key: Vec<u32>,
    pub(super) tensors: Vec<TensorEntry>,
}

/// Where a part's bytes are.
#[derive(Debug)]
enum Source {
    /// All of them in memory.
    Memory(Vec<u8>),
    /// In a file, its header in memory, its data mapped when asked for.
    File { file: File, header: Vec<u8>, map: OnceLock<Mmap> },
    /// In a file whose header is too large for memory.
    Mapped { file: File, map: Mmap },
}

/// A stretch of the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    start: u64,
    len: u32,
}

/// A metadata entry, as places in the header.
#[derive(Clone, Copy, Debug)]
struct KeyEntry {
    key: Span,
    value_start: u64,
    kind: ValueType,
}

/// A tensor, as the header describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorEntry {
    name: Span,
    part: u32,
    ty: TensorType,
    n_dims: u32,
    dims: [u64; 4],
    /// From the start of the data section.
    offset: u64,
    bytes: u64,
    /// Where this entry stands in the header.
    info_offset: u64,
}

impl Part {
    pub(super) fn open(path: &Path) -> Result<Part, Error> {
        let io = |e: std::io::Error| Error::file(path, e);
        // asked before opening: opening a pipe would wait for somebody to write to it
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(Error::file(path, Rule::NotAFile));
        }
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        let len = meta.len();
        // Most headers are a few MiB of tokenizer. Each round reads more of the file, until the header fits.
        for size in HEADER_READS {
            let size = size.min(len);
            let mut header = vec![0; size as usize];
            read_file_at(&file, 0, &mut header).map_err(|rule| Error::file(path, rule))?;
            match parse(&header, len) {
                Ok(parsed) => {
                    header.truncate(usize::try_from(parsed.data_offset).unwrap_or(usize::MAX));
                    header.shrink_to_fit();
                    let source = Source::File { file, header, map: OnceLock::new() };
                    return Ok(Part::new(path.to_owned(), source, len, parsed));
                }
                Err(Stop::Refused(refusal)) => return Err(refusal.at(path)),
                Err(Stop::More) => {}
            }
        }
        let map = map_file(&file).map_err(io)?;
        match parse(&map, map.len() as u64) {
            Ok(parsed) => {
                let len = map.len() as u64;
                Ok(Part::new(path.to_owned(), Source::Mapped { file, map }, len, parsed))
            }
            Err(stop) => Err(stop.refused().at(path)),
        }
    }

    fn from_bytes(bytes: Vec<u8>) -> Result<Part, Error> {
        let path = PathBuf::from("<memory>");
        match parse(&bytes, bytes.len() as u64) {
            Ok(parsed) => {
                let len = bytes.len() as u64;
                Ok(Part::new(path, Source::Memory(bytes), len, parsed))
            }
            Err(stop) => Err(stop.refused().at(&path)),
        }
    }

    fn new(path: PathBuf, source: Source, len: u64, parsed: Parsed) -> Part {
        let Parsed { version, alignment, data_offset, entries, entries_by_key, tensors } = parsed;
        Part { path, source, len, version, alignment, data_offset, entries, entries_by_key, tensors }
    }

    /// The value of a key of this part.
    pub(super) fn get(&self, key: &str) -> Option<Value<'_>> {
        let at =
            self.entries_by_key.binary_search_by(|&i| self.key(&self.entries[i as usize]).cmp(key)).ok()?;
        Some(self.entry(&self.entries[self.entries_by_key[at] as usize]).value)
    }

    fn header(&self) -> &[u8] {
        match &self.source {
            Source::Memory(bytes) => bytes,
            Source::File { header, .. } => header,
            Source::Mapped { map, .. } => map,
        }
    }

    fn text(&self, span: Span) -> &str {
        text(self.header(), span)
    }

    fn key(&self, entry: &KeyEntry) -> &str {
        self.text(entry.key)
    }

    fn entry(&self, entry: &KeyEntry) -> Entry<'_> {
        let bytes = self.header().get(entry.value_start as usize..).unwrap_or_default();
        // the parser walked this value; it decodes
        let value = Value::decode(entry.kind, bytes).map_or(Value::String(Cow::Borrowed(b"")), |(v, _)| v);
        Entry { key: self.key(entry), value, offset: entry.key.start.saturating_sub(8) }
    }

    fn all(&self) -> Result<&[u8], Rule> {
        match &self.source {
            Source::Memory(bytes) => Ok(bytes),
            Source::Mapped { map, .. } => Ok(map),
            Source::File { file, map, .. } => {
                if let Some(map) = map.get() {
                    return Ok(map);
                }
                let fresh = map_file(file)?;
                Ok(map.get_or_init(|| fresh))
            }
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<(), Rule> {
        match &self.source {
            Source::File { file, .. } | Source::Mapped { file, .. } => read_file_at(file, at, buf),
            Source::Memory(bytes) => {
                let bytes = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..buf.len()));
                buf.copy_from_slice(bytes.ok_or(Rule::Truncated { short_by: buf.len() as u64 })?);
                Ok(())
            }
        }
    }
}

fn text(header: &[u8], span: Span) -> &str {
    let start = span.start as usize;
    let bytes = header.get(start..start + span.len as usize).unwrap_or_default();
    // the parser refused names and keys that are not UTF-8
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Reads exactly `buf.len()` bytes from `at` on; a file that ends before is an error, not a signal.
fn read_file_at(file: &File, at: u64, buf: &mut [u8]) -> Result<(), Rule> {
    let mut done = 0;
    while done < buf.len() {
        let n = read_some_at(file, &mut buf[done..], at + done as u64);
        match n {
            Ok(0) => return Err(Rule::Truncated { short_by: (buf.len() - done) as u64 }),
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Rule::Io(e)),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_some_at(file: &File, buf: &mut [u8], at: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, at)
}

#[cfg(windows)]
fn read_some_at(file: &File, buf: &mut [u8], at: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, at)
}

/// Maps a whole file, read-only.
#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process, and its bytes are only ever read as `u8`, for
    // which every value is valid. What remains is another process changing the file: altered bytes are wrong
    // data, found by their hash; a file made shorter is a signal on access, which is why what must survive that
    // (the writer of slices) reads through the file and why slices are written beside and renamed, never in place.
    unsafe { Mmap::map(file) }
}

/// How much of a file is read to find its header, round by round; a larger one is mapped.
const HEADER_READS: [u64; 3] = [1 << 18, 1 << 22, 1 << 24];

// ---------------------------------------------------------------------------------------------------------------
// The parser: bytes in, a description out. No I/O.

/// What the header says, checked.
struct Parsed {
    version: u32,
    alignment: u64,
    data_offset: u64,
    entries: Vec<KeyEntry>,
    entries_by_key: Vec<u32>,
    tensors: Vec<TensorEntry>,
}

/// Why the parser stopped.
enum Stop {
    /// The header goes on past the bytes at hand, inside the file.
    More,
    Refused(Refusal),
}

/// An [`Error`] that does not know its file yet.
struct Refusal {
    place: Place,
    offset: u64,
    rule: Rule,
}

impl Stop {
    fn refused(self) -> Refusal {
        match self {
            Stop::Refused(refusal) => refusal,
            // all bytes were at hand: cannot be
            Stop::More => Refusal { place: Place::Header, offset: 0, rule: Rule::TooShort(0) },
        }
    }
}

impl Refusal {
    fn at(self, path: &Path) -> Error {
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
        let start = self.pos as usize;
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

fn parse(bytes: &[u8], file_len: u64) -> Result<Parsed, Stop> {
    let mut c = Cursor { bytes, file_len, pos: 0, place: Place::Header };
    let magic: [u8; 4] = if file_len < 4 {
        return Err(c.refuse(0, Rule::TooShort(file_len)));
    } else {
        c.array("magic")?
    };
    if &magic != b"GGUF" {
        return Err(c.refuse(0, Rule::NotGguf(magic)));
    }
    if file_len < 24 {
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
    let mut entries = Vec::with_capacity(n_keys as usize);
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

    let mut tensors = Vec::with_capacity(n_tensors as usize);
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
    Ok(Parsed { version, alignment, data_offset, entries, entries_by_key, tensors })
}

fn parse_entry(c: &mut Cursor<'_>) -> Result<KeyEntry, Stop> {
    let at = c.pos;
    let key_len = c.u64("key length")?;
    if key_len == 0 {
        return Err(c.refuse(at, Rule::KeyEmpty));
    }
    if key_len > 0xffff {
        return Err(c.refuse(at, Rule::KeyTooLong(key_len)));
    }
    let key = Span { start: c.pos, len: key_len as u32 };
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
    let rest = c.bytes.get(entry.value_start as usize..).unwrap_or_default();
    match Value::decode(entry.kind, rest) {
        Some((Value::U32(n), _)) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n.into()),
        Some((Value::U32(n), _)) => Err(c.refuse(offset, Rule::Alignment(n))),
        _ => Err(c.refuse(offset, Rule::AlignmentType(entry.kind))),
    }
}

/// What tensor data is aligned to where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;

fn parse_tensor(c: &mut Cursor<'_>, alignment: u64) -> Result<TensorEntry, Stop> {
    let info_offset = c.pos;
    let name_len = c.u64("tensor name length")?;
    if name_len == 0 {
        return Err(c.refuse(info_offset, Rule::NameEmpty));
    }
    if name_len > 63 {
        return Err(c.refuse(info_offset, Rule::NameTooLong(name_len)));
    }
    let name = Span { start: c.pos, len: name_len as u32 };
    match std::str::from_utf8(c.take(name_len, "tensor name")?) {
        Ok(text) if !text.contains('\0') => c.place = Place::Tensor(text.to_owned()),
        _ => return Err(c.refuse(info_offset, Rule::NameNotText)),
    }

    let at = c.pos;
    let n_dims = c.u32("dimension count")?;
    if !(1..=4).contains(&n_dims) {
        return Err(c.refuse(at, Rule::DimCount(n_dims)));
    }
    let mut dims = [1u64; 4];
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

/// Indices of `n` things in the order of their keys; equal ones stay in order.
fn sorted_by<K: Ord>(n: usize, key: impl Fn(usize) -> K) -> Vec<u32> {
    // fewer than 2^32 things: each takes more than one byte of a file
    let mut order: Vec<u32> = (0..n as u32).collect();
    // by (key, index), in place: a stable sort would allocate
    order.sort_unstable_by(|&a, &b| key(a as usize).cmp(&key(b as usize)).then(a.cmp(&b)));
    order
}
