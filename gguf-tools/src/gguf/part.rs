//! One file of a model: its header in memory, its data where it is.

use std::{
    borrow::Cow,
    fs::File,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use memmap2::Mmap;

use super::{
    error::{Error, Rule},
    file::{map_file, read_file_at},
    header::{self, Header, KeyEntry, Span, Stop},
    length,
    value::Value,
};

/// One file of a model.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) source: Source,
    /// Bytes of the file when it was opened.
    pub(super) len: u64,
    pub(super) header: Header,
}

/// Where a part's bytes are.
#[derive(Debug)]
pub(super) enum Source {
    /// All of them in memory.
    Memory(Vec<u8>),
    /// In a file, its header in memory, its data mapped when asked for.
    File { file: File, header: Vec<u8>, map: OnceLock<Mmap> },
    /// In a file whose header is too large for memory.
    Mapped { file: File, map: Mmap },
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
            let mut header = vec![0; length(size)];
            read_file_at(&file, 0, &mut header).map_err(|rule| Error::file(path, rule))?;
            match header::parse(&header, len) {
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
        match header::parse(&map, map.len() as u64) {
            Ok(parsed) => {
                let len = map.len() as u64;
                Ok(Part::new(path.to_owned(), Source::Mapped { file, map }, len, parsed))
            }
            Err(stop) => Err(stop.refused().at(path)),
        }
    }

    pub(super) fn from_bytes(bytes: Vec<u8>) -> Result<Part, Error> {
        let path = PathBuf::from("<memory>");
        match header::parse(&bytes, bytes.len() as u64) {
            Ok(parsed) => {
                let len = bytes.len() as u64;
                Ok(Part::new(path, Source::Memory(bytes), len, parsed))
            }
            Err(stop) => Err(stop.refused().at(&path)),
        }
    }

    fn new(path: PathBuf, source: Source, len: u64, header: Header) -> Part {
        Part { path, source, len, header }
    }

    /// The entry of a key of this part.
    pub(super) fn find(&self, key: &str) -> Option<&KeyEntry> {
        let Header { entries, entries_by_key, .. } = &self.header;
        let at = entries_by_key.binary_search_by(|&i| self.text(entries[i as usize].key).cmp(key)).ok()?;
        Some(&entries[entries_by_key[at] as usize])
    }

    /// The value of a key of this part.
    pub(super) fn get(&self, key: &str) -> Option<Value<'_>> {
        self.find(key).map(|entry| self.value(entry))
    }

    fn header_bytes(&self) -> &[u8] {
        match &self.source {
            Source::Memory(bytes) => bytes,
            Source::File { header, .. } => header,
            Source::Mapped { map, .. } => map,
        }
    }

    /// A key or a tensor's name.
    pub(super) fn text(&self, span: Span) -> &str {
        header::text(self.header_bytes(), span)
    }

    /// The value of an entry of this part.
    pub(super) fn value(&self, entry: &KeyEntry) -> Value<'_> {
        let bytes = self.header_bytes().get(length(entry.value_start)..).unwrap_or_default();
        // the parser walked this value; it decodes
        Value::decode(entry.kind, bytes).map_or(Value::String(Cow::Borrowed(b"")), |(value, _)| value)
    }

    /// All bytes of the file, mapped where they are not in memory.
    pub(super) fn all(&self) -> Result<&[u8], Rule> {
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

    /// Fills `buf` from byte `at` of the file on.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<(), Rule> {
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

/// How much of a file is read to find its header, round by round; a larger one is mapped.
const HEADER_READS: [u64; 3] = [1 << 18, 1 << 22, 1 << 24];
