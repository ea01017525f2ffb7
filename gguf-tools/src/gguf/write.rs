//! The writer: metadata and tensor descriptions first, then the tensors' data as a stream.
//!
//! A file appears under its name only when it is whole: everything is written to a temporary file in the same
//! folder, flushed to the disk, and renamed. Dropping a writer that did not [`finish`](GgufWriter::finish)
//! removes the temporary file; one that a killed process left behind is removed by [`remove_stale`].
//!
//! Order of calls: [`create`](GgufWriter::create), then [`write`](GgufWriter::write) until every tensor is
//! complete, [`patch`](GgufWriter::patch) for values known only then (hashes), [`finish`](GgufWriter::finish).

use std::{
    borrow::Cow,
    fmt,
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

pub use super::temp::{TempFile, remove_stale};
use super::{
    error::Error,
    index, length,
    limits::{
        DEFAULT_ALIGNMENT, HEADER_BYTES, MAGIC, MAX_ALIGNMENT, MAX_DIMS, MAX_KEY_BYTES, MAX_NAME_BYTES,
    },
    reader::Tensor,
    types::{TensorType, ValueType},
    value::Value,
};
use crate::{failure::Explained, os};

/// What a tensor will be: the description that stands in the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, 1 to 63 bytes.
    pub name: String,
    /// Its type.
    pub tensor_type: TensorType,
    /// Its dimensions, the row's length first; one to four.
    pub dims: Vec<u64>,
}

impl TensorSpec {
    /// A description.
    pub fn new(name: impl Into<String>, tensor_type: TensorType, dims: impl Into<Vec<u64>>) -> TensorSpec {
        TensorSpec { name: name.into(), tensor_type, dims: dims.into() }
    }

    /// Bytes of its data; None where its rows are not whole groups or the size overflows.
    pub fn n_bytes(&self) -> Option<u64> {
        self.tensor_type.tensor_bytes(&self.dims)
    }
}

/// Writes one GGUF file, version 3.
pub struct GgufWriter {
    out: BufWriter<File>,
    temp: TempFile,
    path: PathBuf,
    /// Key, value type, and where the value stands.
    keys: Vec<(String, ValueType, u64, u64)>,
    tensors: Vec<Extent>,
    data_offset: u64,
    /// The tensor that the next byte belongs to.
    current: usize,
    /// Bytes of it already written.
    written: u64,
    alignment: u64,
}

/// Where a tensor's data goes: from the start of the data section.
#[derive(Clone, Copy, Debug)]
struct Extent {
    offset: u64,
    bytes: u64,
}

impl GgufWriter {
    /// Starts a file: creates it beside `path`, and writes everything that comes before the data.
    ///
    /// `general.alignment` is obeyed if it is among the metadata.
    ///
    /// # Errors
    /// The description breaks a rule of the format, or the file cannot be written.
    pub fn create<K: AsRef<str>>(
        path: impl AsRef<Path>,
        metadata: &[(K, Value<'_>)],
        tensors: &[TensorSpec],
    ) -> Result<GgufWriter, WriteError> {
        let path = path.as_ref();
        let at = |e| WriteError::Io { path: path.to_owned(), source: e };
        let layout = Layout::new(metadata, tensors)?;
        let (temp, file) = TempFile::create(path).map_err(at)?;
        let mut writer = GgufWriter {
            out: BufWriter::with_capacity(BUFFER_BYTES, file),
            temp,
            path: path.to_owned(),
            keys: Vec::with_capacity(metadata.len()),
            tensors: layout.places,
            data_offset: layout.data_offset,
            current: 0,
            written: 0,
            alignment: layout.alignment,
        };
        writer.write_header(metadata, tensors).map_err(at)?;
        writer.step();
        Ok(writer)
    }

    /// Bytes the file will have, without writing it.
    ///
    /// # Errors
    /// The description breaks a rule of the format.
    pub fn planned_bytes<K: AsRef<str>>(
        metadata: &[(K, Value<'_>)],
        tensors: &[TensorSpec],
    ) -> Result<u64, WriteError> {
        Layout::new(metadata, tensors).map(|layout| layout.file_bytes())
    }

    /// Bytes the file will have.
    pub fn file_bytes(&self) -> u64 {
        file_bytes(self.data_offset, &self.tensors, self.alignment)
    }

    /// Byte offset of the tensor data.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Appends to the current tensor's data. A tensor's data comes in as many pieces as is convenient; when it
    /// is complete, the next byte belongs to the next tensor.
    ///
    /// # Errors
    /// The piece passes the end of the current tensor, or writing fails.
    pub fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        if data.is_empty() {
            return Ok(());
        }
        let left = self.tensors.get(self.current).map_or(0, |t| t.bytes - self.written);
        if data.len() as u64 > left {
            return Err(WriteError::TooMuchData { tensor: self.current, left, given: data.len() as u64 });
        }
        self.out.write_all(data).map_err(|e| self.io(e))?;
        self.written += data.len() as u64;
        if self.written == self.tensors[self.current].bytes {
            let pad = self.written.next_multiple_of(self.alignment) - self.written;
            pad_with_zeros(&mut self.out, pad).map_err(|e| self.io(e))?;
            self.current += 1;
            self.written = 0;
            self.step();
        }
        Ok(())
    }

    /// Appends `n_bytes` of a tensor's data from byte `at` on to the current tensor's data, as [`write`](Self::write)
    /// does. Large pieces are copied inside the system where it can do that.
    ///
    /// # Errors
    /// The piece passes the end of the current tensor, or reading or writing fails.
    ///
    /// # Panics
    /// If the range passes the end of `from`.
    pub fn copy(&mut self, from: &Tensor<'_>, at: u64, n_bytes: u64) -> Result<(), WriteError> {
        let left = self.tensors.get(self.current).map_or(0, |t| t.bytes - self.written);
        assert!(at.checked_add(n_bytes).is_some_and(|end| end <= from.n_bytes()), "range past the tensor");
        let mut done = 0;
        // a piece that ends the tensor goes through `write` in the end, which steps to the next
        if n_bytes >= SYSTEM_COPY_BYTES
            && n_bytes <= left
            && let Some(source) = from.source()
        {
            self.out.flush().map_err(|e| self.io(e))?;
            let (start, most) = (from.file_offset() + at, n_bytes - 1);
            done = os::copy_range(source, start, self.out.get_ref(), most).map_err(|e| self.io(e))?;
            self.written += done;
        }
        let mut buf = vec![0; BUFFER_BYTES.min(length(n_bytes - done))];
        while done < n_bytes {
            let n = length(n_bytes - done).min(buf.len());
            from.read_at(at + done, &mut buf[..n])?;
            self.write(&buf[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// Replaces a value by one of the same type and length.
    ///
    /// # Errors
    /// There is no such key, the new value has another type or length, or writing fails.
    pub fn patch(&mut self, key: &str, value: &Value<'_>) -> Result<(), WriteError> {
        let known = self.keys.iter().find(|(k, ..)| k == key);
        let Some(&(_, kind, at, len)) = known.filter(|(_, kind, _, len)| {
            // a different kind or length would shift everything behind it
            *kind == value.value_type() && *len == value.encoded_len()
        }) else {
            return Err(WriteError::Patch { key: key.to_owned() });
        };
        debug_assert_eq!(kind, value.value_type());
        let mut bytes = Vec::with_capacity(length(len));
        value.encode(&mut bytes);
        self.write_at(at, &bytes).map_err(|e| self.io(e))
    }

    /// Reads back what stands before the tensor data, in pieces, as it is now: what a hash of it needs.
    ///
    /// # Errors
    /// Reading fails.
    pub fn read_header(&mut self, mut each: impl FnMut(&[u8])) -> Result<(), WriteError> {
        let data_offset = self.data_offset;
        let mut read = || -> io::Result<()> {
            self.out.flush()?;
            let mut file = self.out.get_ref();
            let end = file.stream_position()?;
            file.seek(SeekFrom::Start(0))?;
            let mut left = data_offset;
            let mut buf = vec![0; HEADER_PIECE_BYTES];
            while left > 0 {
                let n = length(left).min(buf.len());
                file.read_exact(&mut buf[..n])?;
                each(&buf[..n]);
                left -= n as u64;
            }
            file.seek(SeekFrom::Start(end))?;
            Ok(())
        };
        read().map_err(|e| self.io(e))
    }

    /// Byte offset of a key's value in the file.
    pub fn value_offset(&self, key: &str) -> Option<u64> {
        self.keys.iter().find(|(k, ..)| k == key).map(|&(_, _, at, _)| at)
    }

    /// The file, for flushing in the background what was written so far. What is still gathered in memory is not
    /// in it.
    ///
    /// # Errors
    /// The system has no more handles.
    pub fn file(&self) -> io::Result<File> {
        self.out.get_ref().try_clone()
    }

    /// Where the file stands before [`publish`](Self::publish), for reading it. What is still gathered in memory is not
    /// in it: [`read_header`](Self::read_header) hands that to the system.
    pub fn temp_path(&self) -> Option<&Path> {
        self.temp.path()
    }

    /// Flushes everything to the disk; what remains is [`publish`](Self::publish).
    ///
    /// # Errors
    /// A tensor is incomplete, or writing fails.
    pub fn sync(&mut self) -> Result<(), WriteError> {
        if self.current < self.tensors.len() {
            return Err(WriteError::Incomplete {
                tensor: self.current,
                missing: self.tensors[self.current].bytes - self.written,
            });
        }
        self.out.flush().and_then(|()| self.out.get_ref().sync_all()).map_err(|e| self.io(e))
    }

    /// Gives the file its name. [`sync`](Self::sync) comes before.
    ///
    /// # Errors
    /// Renaming fails.
    pub fn publish(self) -> Result<(), WriteError> {
        let GgufWriter { temp, path, .. } = self;
        temp.publish(&path).map_err(|e| WriteError::Io { path, source: e })
    }

    /// [`sync`](Self::sync), then [`publish`](Self::publish).
    ///
    /// # Errors
    /// As those.
    pub fn finish(mut self) -> Result<(), WriteError> {
        self.sync()?;
        self.publish()
    }

    fn write_header<K: AsRef<str>>(
        &mut self,
        metadata: &[(K, Value<'_>)],
        tensors: &[TensorSpec],
    ) -> io::Result<()> {
        let out = &mut self.out;
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(tensors.len() as u64).to_le_bytes())?;
        out.write_all(&(metadata.len() as u64).to_le_bytes())?;
        let mut pos = HEADER_BYTES;
        for (key, value) in metadata {
            let key = key.as_ref();
            out.write_all(&(key.len() as u64).to_le_bytes())?;
            out.write_all(key.as_bytes())?;
            out.write_all(&value.value_type().id().to_le_bytes())?;
            pos += 8 + key.len() as u64 + 4;
            let len = value.encoded_len();
            self.keys.push((key.to_owned(), value.value_type(), pos, len));
            match value {
                // the large ones go straight through
                Value::String(text) => {
                    out.write_all(&(text.len() as u64).to_le_bytes())?;
                    out.write_all(text)?;
                }
                Value::Array(array) => {
                    out.write_all(&array.element_type().id().to_le_bytes())?;
                    out.write_all(&array.len().to_le_bytes())?;
                    out.write_all(array.bytes())?;
                }
                small => {
                    let mut bytes = Vec::with_capacity(8);
                    small.encode(&mut bytes);
                    out.write_all(&bytes)?;
                }
            }
            pos += len;
        }
        for (tensor, place) in tensors.iter().zip(&self.tensors) {
            out.write_all(&(tensor.name.len() as u64).to_le_bytes())?;
            out.write_all(tensor.name.as_bytes())?;
            out.write_all(&index(tensor.dims.len()).to_le_bytes())?;
            for d in &tensor.dims {
                out.write_all(&d.to_le_bytes())?;
            }
            out.write_all(&tensor.tensor_type.id().to_le_bytes())?;
            out.write_all(&place.offset.to_le_bytes())?;
            pos += info_bytes(tensor);
        }
        pad_with_zeros(out, self.data_offset - pos)
    }

    /// Passes over tensors without data, of which the format allows none.
    fn step(&mut self) {
        while self.tensors.get(self.current).is_some_and(|t| t.bytes == 0) {
            self.current += 1;
        }
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.out.flush()?;
        let mut file = self.out.get_ref();
        let end = file.stream_position()?;
        file.seek(SeekFrom::Start(at))?;
        file.write_all(bytes)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(())
    }

    fn io(&self, source: io::Error) -> WriteError {
        WriteError::Io { path: self.path.clone(), source }
    }
}

impl fmt::Debug for GgufWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufWriter")
            .field("path", &self.path)
            .field("tensor", &self.current)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The operating system said no.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file it was about.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Reading what was to be copied failed.
    #[error(transparent)]
    Read(#[from] Error),
    /// A key that a reader would refuse.
    #[error("key {0:?} must be 1 to 65535 bytes without NUL, and stand once")]
    Key(String),
    /// A tensor description that a reader would refuse.
    #[error("tensor {name:?}: {why}")]
    Tensor {
        /// Its name.
        name: String,
        /// The rule.
        why: &'static str,
    },
    /// `general.alignment` is not a u32 power of two up to 1 MiB.
    #[error("general.alignment must be a u32, a power of two up to {MAX_ALIGNMENT}")]
    Alignment,
    /// More data than the current tensor has left.
    #[error("tensor {tensor} takes {left} bytes more, {given} were given")]
    TooMuchData {
        /// Index of the tensor.
        tensor: usize,
        /// Bytes it still takes.
        left: u64,
        /// Bytes given.
        given: u64,
    },
    /// Finished before all data was written.
    #[error("tensor {tensor} is {missing} bytes short")]
    Incomplete {
        /// Index of the tensor.
        tensor: usize,
        /// Bytes missing.
        missing: u64,
    },
    /// No such key, or a value of another type or length.
    #[error("cannot patch {key:?}: no such key, or another type or length")]
    Patch {
        /// The key.
        key: String,
    },
}

/// The version of the format that is written.
const VERSION: u32 = 3;

struct Layout {
    alignment: u64,
    data_offset: u64,
    places: Vec<Extent>,
}

impl Layout {
    fn new<K: AsRef<str>>(metadata: &[(K, Value<'_>)], tensors: &[TensorSpec]) -> Result<Layout, WriteError> {
        let mut alignment = DEFAULT_ALIGNMENT;
        let mut header = HEADER_BYTES;
        let mut keys: Vec<&str> = Vec::with_capacity(metadata.len());
        for (key, value) in metadata {
            let key = key.as_ref();
            if key.is_empty() || key.len() as u64 > MAX_KEY_BYTES || key.contains('\0') {
                return Err(WriteError::Key(key.to_owned()));
            }
            if key == "general.alignment" {
                alignment = match value {
                    Value::U32(n) if n.is_power_of_two() && *n <= MAX_ALIGNMENT => (*n).into(),
                    _ => return Err(WriteError::Alignment),
                };
            }
            keys.push(key);
            header += 8 + key.len() as u64 + 4 + value.encoded_len();
        }
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(WriteError::Key(pair[0].to_owned()));
        }

        let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(WriteError::Tensor { name: pair[0].to_owned(), why: "the name stands twice" });
        }
        let mut places = Vec::with_capacity(tensors.len());
        let mut offset = 0u64;
        for tensor in tensors {
            let refuse = |why| WriteError::Tensor { name: tensor.name.clone(), why };
            if tensor.name.is_empty()
                || tensor.name.len() as u64 > MAX_NAME_BYTES
                || tensor.name.contains('\0')
            {
                return Err(refuse("a name has 1 to 63 bytes without NUL"));
            }
            if !(1..=MAX_DIMS).contains(&tensor.dims.len()) || tensor.dims.contains(&0) {
                return Err(refuse("a tensor has 1 to 4 dimensions, none of them 0"));
            }
            let bytes = tensor.n_bytes().ok_or_else(|| refuse("a row must be whole groups of its type"))?;
            places.push(Extent { offset, bytes });
            offset = bytes
                .checked_next_multiple_of(alignment)
                .and_then(|padded| offset.checked_add(padded))
                .filter(|&end| i64::try_from(end).is_ok())
                .ok_or_else(|| refuse("the file would be larger than files can be"))?;
            header += info_bytes(tensor);
        }
        Ok(Layout { alignment, data_offset: header.next_multiple_of(alignment), places })
    }

    fn file_bytes(&self) -> u64 {
        file_bytes(self.data_offset, &self.places, self.alignment)
    }
}

fn file_bytes(data_offset: u64, places: &[Extent], alignment: u64) -> u64 {
    data_offset + places.last().map_or(0, |t| (t.offset + t.bytes).next_multiple_of(alignment))
}

fn info_bytes(tensor: &TensorSpec) -> u64 {
    8 + tensor.name.len() as u64 + 4 + 8 * tensor.dims.len() as u64 + 4 + 8
}

fn pad_with_zeros(out: &mut impl Write, n: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(n), out).map(drop)
}

impl Explained for WriteError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            WriteError::Read(e) => e.hint(),
            _ => None,
        }
    }

    fn is_misuse(&self) -> bool {
        false
    }
}

/// A piece of this size or more is copied by the system.
const SYSTEM_COPY_BYTES: u64 = 1 << 18;

/// Bytes of the header that are read back at a time.
const HEADER_PIECE_BYTES: usize = 64 << 10;

/// Small pieces are gathered; a piece of this size or more goes straight to the file.
const BUFFER_BYTES: usize = 1 << 20;
