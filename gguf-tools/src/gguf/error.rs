//! What can be wrong with a file: one variant per rule, with the place and the way out.

use std::{borrow::Cow, fmt, io, path::PathBuf};

use super::{
    bad_absent::BadAbsent,
    limits,
    types::{TensorType, ValueType},
};
use crate::{failure::Explained, text::Shown};

/// A file that was refused: where, and which rule it broke.
#[derive(Debug)]
pub struct Error {
    /// The file (for a split model, the part).
    pub file: PathBuf,
    /// The key, tensor or other place in it.
    pub place: Place,
    /// Byte offset in the file where the offending bytes start, where there is one.
    pub offset: Option<u64>,
    /// The rule that was broken. Boxed, so that a `Result` stays small.
    pub rule: Box<Rule>,
}

/// The part of a file that an [`Error`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The file as a whole.
    File,
    /// The 24 bytes before the metadata.
    Header,
    /// The metadata entry with this index, before its key was read.
    KeyIndex(u64),
    /// The metadata entry with this key.
    Key(String),
    /// The tensor with this index, before its name was read.
    TensorIndex(u64),
    /// The tensor with this name.
    Tensor(String),
}

/// The rules of the format, and those of llama.cpp that it enforces by ending the process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Rule {
    /// The operating system said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A folder, a pipe, a device.
    #[error("not a file")]
    NotAFile,

    // -- header
    /// The first four bytes are something else.
    #[error("not a GGUF file: it starts with {0:02x?}, not with \"GGUF\"")]
    NotGguf([u8; 4]),
    /// Another kind of file.
    #[error("not a GGUF file but {0}")]
    Foreign(Foreign),
    /// Too short to be anything.
    #[error("not a GGUF file: it holds {0} bytes and a header takes {bytes}", bytes = limits::HEADER_BYTES)]
    TooShort(u64),
    /// Version 0 or above 3.
    #[error("unsupported GGUF version {0}: this program reads versions 2 and 3")]
    Version(u32),
    /// Version 1, with 32-bit counts.
    #[error("GGUF version 1 has not been readable since 2023")]
    Version1,
    /// The version's bytes are swapped.
    #[error("big-endian GGUF (version {0})")]
    BigEndian(u32),
    /// More entries than the file has room for.
    #[error("{what} count {count} cannot be: {left} bytes are left and each takes at least {least}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// What the file says.
        count: u64,
        /// Bytes left.
        left: u64,
        /// The fewest bytes one entry takes.
        least: u64,
    },
    /// More metadata entries than any model has.
    #[error("{0} metadata entries, more than the {max} this program reads", max = limits::MAX_KEYS)]
    TooManyKeys(u64),

    // -- metadata
    /// A key without letters.
    #[error("empty key")]
    KeyEmpty,
    /// The format allows 65,535 bytes.
    #[error("key of {0} bytes, the format allows {max}", max = limits::MAX_KEY_BYTES)]
    KeyTooLong(u64),
    /// Not UTF-8, or with a NUL in it.
    #[error("key is not plain text")]
    KeyNotText,
    /// The key came before.
    #[error("duplicate key, the first stands at byte {first}; which of the two holds cannot be known")]
    KeyDuplicate {
        /// Byte offset of the first one.
        first: u64,
    },
    /// A value type the format does not have.
    #[error("unknown value type {0}")]
    ValueType(u32),
    /// A length or count larger than what is left of the file.
    #[error("{what} of {len} bytes, but the file ends after {left}")]
    PastEnd {
        /// What is too long.
        what: &'static str,
        /// How long it says it is. Saturates.
        len: u64,
        /// Bytes left.
        left: u64,
    },
    /// Arrays in arrays in arrays.
    #[error("arrays nested more than {max} deep", max = limits::MAX_DEPTH)]
    TooDeep,
    /// Neither 0 nor 1.
    #[error("a flag is stored as {0}, it must be 0 or 1")]
    Flag(u8),
    /// `general.alignment` of another type than u32.
    #[error("must be a u32, the file has a {0}")]
    AlignmentType(ValueType),
    /// `general.alignment` that is no power of two from 1 byte to 1 MiB.
    #[error("alignment {0}, must be a power of two up to {max}", max = limits::MAX_ALIGNMENT)]
    Alignment(u32),

    // -- tensors
    /// A name without letters.
    #[error("empty tensor name")]
    NameEmpty,
    /// ggml keeps names in 64 bytes, with a NUL.
    #[error("tensor name of {0} bytes, ggml allows {max}", max = limits::MAX_NAME_BYTES)]
    NameTooLong(u64),
    /// Not UTF-8, or with a NUL in it.
    #[error("tensor name is not plain text")]
    NameNotText,
    /// The name came before.
    #[error("duplicate tensor name")]
    NameDuplicate,
    /// ggml has one to four.
    #[error("{0} dimensions, must be 1 to {max}", max = limits::MAX_DIMS)]
    DimCount(u32),
    /// Zero, or negative when read as ggml does.
    #[error("dimension {index} is {value}, must be at least 1 and below 2^63")]
    Dim {
        /// Which, from 0.
        index: u32,
        /// Its value as signed.
        value: i64,
    },
    /// More elements or bytes than can be counted.
    #[error("dimensions {0:?} overflow the count of elements or bytes")]
    SizeOverflow(Vec<u64>),
    /// A type that ggml dropped.
    #[error("type {name} ({id}) was removed from ggml")]
    TypeRemoved {
        /// Its number.
        id: u32,
        /// What it was called.
        name: &'static str,
    },
    /// A type this program does not know.
    #[error("unknown tensor type {0}: the model may be newer than this program")]
    TypeUnknown(u32),
    /// A row that ends inside a group of values.
    #[error("rows of {row} values, {ty} takes multiples of {multiple}", multiple = ty.block_len())]
    RowNotWhole {
        /// Values per row.
        row: u64,
        /// The tensor's type.
        ty: TensorType,
    },
    /// A data offset that is no multiple of the alignment.
    #[error("data offset {offset} is not a multiple of the alignment {alignment}")]
    OffsetUnaligned {
        /// The offset.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// Offset plus size passes 2^64.
    #[error("data offset {offset} plus {bytes} bytes overflows")]
    OffsetOverflow {
        /// The offset.
        offset: u64,
        /// The tensor's size.
        bytes: u64,
    },
    /// Two tensors on the same bytes.
    #[error("its data overlaps tensor '{}'", Shown(.0))]
    Overlap(String),
    /// The file ends before the tensor does.
    #[error("the file is {short_by} bytes short here: the download broke off")]
    Truncated {
        /// Bytes missing for this tensor to end.
        short_by: u64,
    },

    // -- split models
    /// A part is not where its name says it is.
    #[error("part {no} of {count} is missing")]
    PartMissing {
        /// Which, from 1.
        no: u32,
        /// How many there are.
        count: u32,
    },
    /// A part that says it is another one, or of another number of parts.
    #[error("says it is part {} of {}, its name says {want_no} of {want_count}", Said(no), Said(count))]
    PartMismatch {
        /// What the metadata says, from 1, if it says anything.
        no: Option<u64>,
        /// What the metadata says, if it says anything.
        count: Option<u64>,
        /// What the name says, from 1.
        want_no: u32,
        /// What the name says.
        want_count: u32,
    },
    /// One part of several, under a name that does not say where the others are.
    #[error("is one part of {0}, and its name does not say which")]
    PartName(u64),
    /// The parts together have another number of tensors than the first announces.
    #[error("{found} tensors in all parts, the first part announces {announced}")]
    PartTensors {
        /// Tensors found.
        found: u64,
        /// Tensors announced.
        announced: u64,
    },

    // -- model
    /// A GGUF file that holds something else than a model.
    #[error("this is {0}, not a model")]
    NotAModel(NotAModel),
    /// An alignment that the format allows and that llama.cpp answers by ending the process.
    #[error("tensor data aligned to {0} bytes, which llama.cpp does not load: it takes {least} or more", least = limits::DEFAULT_ALIGNMENT)]
    AlignmentUnloadable(u64),
    /// A key that llama.cpp cannot do without.
    #[error("missing: the model is incomplete")]
    KeyMissing,
    /// A value of another type than llama.cpp reads.
    #[error("is a {found}, must be {must}")]
    KeyType {
        /// The file's type.
        found: ValueType,
        /// What it must be.
        must: &'static str,
    },
    /// A number that cannot be.
    #[error("the model says {says}, must be {must}")]
    Hparam {
        /// What the file says.
        says: String,
        /// What it must be.
        must: String,
    },
    /// llama.cpp has no arrays of arrays, and loads no file that holds one.
    #[error("an array of arrays, which llama.cpp does not load")]
    NestedArray,
    /// A tensor that the model's block count needs.
    #[error("missing, but the model has {blocks} blocks")]
    TensorMissing {
        /// `block_count`.
        blocks: u64,
    },
    /// What a slice says of a tensor that it lacks.
    #[error("absent tensor {entry} ('{}') {why}", Shown(name))]
    Absent {
        /// Which, from 0.
        entry: usize,
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: BadAbsent,
    },
    /// A tensor of a type that ggml's operations on it do not take.
    #[error("stored as {found}, must be {must}")]
    TensorTypeForbidden {
        /// The file's type.
        found: TensorType,
        /// What it must be.
        must: &'static str,
    },
    /// A tensor of another shape than the metadata says.
    #[error("has dimensions {found:?}, must be {must}")]
    TensorShape {
        /// The file's.
        found: Vec<u64>,
        /// What they must be.
        must: String,
    },
    /// The same token twice.
    #[error("tokens {first} and {second} are both {text:?}, and llama.cpp needs each text once")]
    TokenDuplicate {
        /// The token's text.
        text: String,
        /// Index of the first.
        first: u64,
        /// Index of the second.
        second: u64,
    },
}

/// Files that people take for a model, by how they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// The text that git keeps instead of a large file.
    GitLfsPointer,
    /// A web page.
    Html,
    /// Weights as PyTorch keeps them, or another archive.
    Zip,
    /// Weights as Hugging Face keeps them.
    Safetensors,
    /// llama.cpp's formats before GGUF.
    Ggml,
}

impl Foreign {
    /// What a file that begins with these bytes is.
    pub(super) fn of(bytes: &[u8]) -> Option<Foreign> {
        let text = bytes.trim_ascii_start();
        let begins =
            |with: &str| text.get(..with.len()).is_some_and(|b| b.eq_ignore_ascii_case(with.as_bytes()));
        let after_length = bytes.get(8..10); // safetensors: the length of its JSON, then the JSON
        match bytes {
            _ if begins("version https://git-lfs") => Some(Foreign::GitLfsPointer),
            _ if begins("<!doctype html") || begins("<html") => Some(Foreign::Html),
            [b'P', b'K', 3, 4, ..] => Some(Foreign::Zip),
            [b't' | b'l', b'j' | b'm', b'g', b'g', ..] => Some(Foreign::Ggml),
            [b'f', b'm', b'g', b'g', ..] => Some(Foreign::Ggml),
            _ if after_length == Some(b"{\"") => Some(Foreign::Safetensors),
            _ => None,
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Foreign::GitLfsPointer => {
                "fetch the file it stands for: `git lfs pull`, or download it from the model's page"
            }
            Foreign::Html => "download the file itself: on a model's page, the link behind \"download\"",
            Foreign::Zip | Foreign::Safetensors => {
                "download the model's GGUF file, or convert it with llama.cpp's convert_hf_to_gguf.py"
            }
            Foreign::Ggml => "download the model's GGUF file: this format has not been readable since 2023",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Foreign::GitLfsPointer => {
                "a git-LFS pointer: the few lines that git keeps instead of a large file"
            }
            Foreign::Html => "a web page",
            Foreign::Zip => "a zip archive, as PyTorch keeps weights",
            Foreign::Safetensors => "a safetensors file",
            Foreign::Ggml => "one of llama.cpp's formats before GGUF",
        })
    }
}

/// What a GGUF file holds that is no model, by its `general.type` or architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAModel {
    /// A LoRA: changes to the weights of a model.
    Adapter,
    /// What turns an image or sound into rows for a model.
    Projector,
    /// Statistics for quantising.
    ImportanceMatrix,
    /// A tokenizer without weights.
    Vocabulary,
}

impl NotAModel {
    fn hint(self) -> &'static str {
        match self {
            NotAModel::Adapter => {
                "give the model that it changes, or that model with the adapter merged into it (llama-export-lora)"
            }
            NotAModel::Projector => {
                "give the language model that it belongs to: the other GGUF file on the same page"
            }
            NotAModel::ImportanceMatrix | NotAModel::Vocabulary => "give the model's own GGUF file",
        }
    }
}

impl fmt::Display for NotAModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NotAModel::Adapter => "a LoRA adapter: changes to a model's weights",
            NotAModel::Projector => "a projector (mmproj): what turns images or sound into a model's input",
            NotAModel::ImportanceMatrix => "an importance matrix: statistics for quantising a model",
            NotAModel::Vocabulary => "a vocabulary without weights",
        })
    }
}

/// A number that may not stand in the file.
struct Said<'a>(&'a Option<u64>);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(f),
            None => f.write_str("?"),
        }
    }
}

const DOWNLOAD: &str = "download again";
const CONVERT: &str = "convert the model again with a current converter";

impl Rule {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Rule::NotAFile => "give the path of a .gguf file",
            Rule::NotGguf(_) => "check the path, or download again",
            Rule::Foreign(kind) => kind.hint(),
            Rule::NotAModel(kind) => kind.hint(),
            Rule::TooShort(_) | Rule::Count { .. } | Rule::PastEnd { .. } => DOWNLOAD,
            Rule::Truncated { .. } | Rule::PartTensors { .. } => DOWNLOAD,
            Rule::TensorMissing { .. } => {
                "convert or download it again; models that have an encoder, or fewer blocks than they run, are not cut"
            }
            Rule::PartMismatch { .. } => "download this part again",
            Rule::PartMissing { .. } => "put all parts into one folder",
            Rule::PartName(_) => "give the parts their names back (NAME-00001-of-0000N.gguf)",
            Rule::Version(_) | Rule::Version1 | Rule::TypeRemoved { .. } => CONVERT,
            Rule::KeyMissing | Rule::TensorTypeForbidden { .. } => CONVERT,
            Rule::Absent { .. } => "cut the model again with dim-split",
            Rule::BigEndian(_) => "convert the model again for a little-endian machine",
            Rule::AlignmentUnloadable(_) => {
                "cut it with dim-split, whose slices can be loaded, or convert the model again"
            }
            _ => return None,
        })
    }
}

impl Error {
    /// An error about a file as a whole.
    pub fn file(file: impl Into<PathBuf>, rule: impl Into<Rule>) -> Error {
        Error { file: file.into(), place: Place::File, offset: None, rule: Box::new(rule.into()) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File => Ok(()),
            Place::Header => f.write_str("header"),
            Place::KeyIndex(i) => write!(f, "metadata entry {i}"),
            Place::Key(key) => write!(f, "key '{}'", Shown(key)),
            Place::TensorIndex(i) => write!(f, "tensor {i}"),
            Place::Tensor(name) => write!(f, "tensor '{}'", Shown(name)),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        match (&self.place, self.offset) {
            (Place::File, None) => {}
            (Place::File, Some(at)) => write!(f, "byte {at}: ")?,
            (place, None) => write!(f, "{place}: ")?,
            (place, Some(at)) => write!(f, "{place} at byte {at}: ")?,
        }
        write!(f, "{}", self.rule)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.rule {
            Rule::Io(e) => Some(e),
            _ => None,
        }
    }
}

impl Explained for Error {
    fn hint(&self) -> Option<Cow<'static, str>> {
        self.rule.hint().map(Cow::Borrowed)
    }

    fn is_misuse(&self) -> bool {
        true
    }
}
