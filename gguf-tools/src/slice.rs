//! What a slice's file says about itself, and whether that is true.

use std::{borrow::Cow, fmt, path::Path};

use dim_core::blocks::BlockRange;

use sha2::{Digest as _, Sha256};

use crate::{
    digest::{self, Sha},
    failure::Explained,
    gguf::{
        Error, Gguf, Place, Rule, TensorType, Value, absent,
        check::{self, Hparams},
        limits::MAX_ALIGNMENT,
    },
    text::Shown,
};

/// Keys this project adds to a slice.
pub mod keys {
    /// u32: version of these keys, [`VERSION`](super::VERSION).
    pub const VERSION: &str = "dim.version";
    /// string: head, middle or tail.
    pub const ROLE: &str = "dim.role";
    /// u32: the slice's first block, numbered as in the model.
    pub const FIRST_BLOCK: &str = "dim.first_block";
    /// u32: the slice's last block (inclusive), numbered as in the model.
    pub const LAST_BLOCK: &str = "dim.last_block";
    /// u32: blocks of the model.
    pub const MODEL_BLOCKS: &str = "dim.model.blocks";
    /// string: the model's name.
    pub const MODEL_NAME: &str = "dim.model.name";
    /// string, 64 hex digits: the model's identity.
    pub const MODEL_SHA256: &str = "dim.model.sha256";
    /// string, 64 hex digits: the digest of the model's parameters that are not weights. Slices of older cuts have none.
    pub const PARAMS_SHA256: &str = "dim.params.sha256";
    /// string, 64 hex digits: the slice's own digest.
    pub const SLICE_SHA256: &str = "dim.slice.sha256";
    /// array of strings, 64 hex digits each: the digest of every tensor's data, in file order.
    pub const TENSOR_SHA256: &str = "dim.tensor_sha256";
    pub use crate::gguf::absent::keys::{
        NAMES as ABSENT_NAMES, SHAPES as ABSENT_SHAPES, TYPES as ABSENT_TYPES,
    };
}

/// Version of the keys under `dim.` in a slice whose blocks, names and keys are the model's, and which says what it
/// [lacks](crate::gguf::absent).
pub const VERSION: u32 = 2;
/// The same in a slice whose blocks are renumbered from 0: a model of its own, which unmodified llama.cpp loads.
pub const VERSION_RENUMBERED: u32 = 1;

/// A slice's place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Token embedding and first blocks.
    Head,
    /// Blocks only.
    Middle,
    /// Last blocks, output norm and lm_head.
    Tail,
}

impl Role {
    /// As `dim.role` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Head => "head",
            Role::Middle => "middle",
            Role::Tail => "tail",
        }
    }

    /// The role of this name.
    pub fn from_name(name: &str) -> Option<Role> {
        [Role::Head, Role::Middle, Role::Tail].into_iter().find(|role| role.as_str() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A slice, as its `dim.` keys describe it.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceInfo {
    /// Its place.
    pub role: Role,
    /// Its blocks, numbered as in the model.
    pub blocks: BlockRange,
    /// Blocks of the model.
    pub model_blocks: u32,
    /// The model's name.
    pub model_name: String,
    /// The model's identity.
    pub model_sha256: Sha,
    /// The digest of the model's parameters that are not weights; `None` in slices of older cuts.
    pub params_sha256: Option<Sha>,
    /// The slice's own digest.
    pub slice_sha256: Sha,
    /// Whether its blocks count from 0, and its numbers are those of a model of its own.
    pub renumbered: bool,
    /// The numbers in its file, checked: the model's, or, renumbered, its own.
    pub hparams: Hparams,
    /// Whether its blocks compute in 16 bits: most of their weights are F16 or BF16, and none is quantised.
    pub is_half: bool,
    /// Bytes of its file.
    pub file_bytes: u64,
}

impl SliceInfo {
    /// Reads and checks a slice's header. The tensor data is not read; that is [`verify`].
    ///
    /// # Errors
    /// The file breaks a rule, or is no slice.
    pub fn read(path: impl AsRef<Path>) -> Result<SliceInfo, SliceError> {
        SliceInfo::of(&Gguf::open(path)?)
    }

    /// The same for an opened file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn of(gguf: &Gguf) -> Result<SliceInfo, SliceError> {
        let Some(version) = gguf.get(keys::VERSION) else {
            return Err(SliceError::NotASlice(gguf.path().display().to_string()));
        };
        let renumbered = match version.as_u32() {
            Some(VERSION) => false,
            Some(VERSION_RENUMBERED) => true,
            found => {
                let file = gguf.path().display().to_string();
                return Err(SliceError::Version { file, found });
            }
        };
        let role = text(gguf, keys::ROLE)?;
        let role = Role::from_name(&role)
            .ok_or_else(|| refuse(gguf, keys::ROLE, Shown(&role).to_string(), "head, middle or tail"))?;
        let blocks =
            BlockRange { first: number(gguf, keys::FIRST_BLOCK)?, last: number(gguf, keys::LAST_BLOCK)? };
        let model_blocks = number(gguf, keys::MODEL_BLOCKS)?;
        let hparams = check::model(gguf)?;
        is_in_its_place(gguf, role, blocks, model_blocks)?;
        counts_right(gguf, if renumbered { blocks.count() } else { model_blocks }, renumbered, &hparams)?;
        if !renumbered {
            holds(gguf, blocks)?;
        }
        let params_sha256 = gguf.entry(keys::PARAMS_SHA256).map(|_| sha(gguf, keys::PARAMS_SHA256));
        Ok(SliceInfo {
            role,
            blocks,
            renumbered,
            model_blocks,
            model_name: text(gguf, keys::MODEL_NAME)?,
            model_sha256: sha(gguf, keys::MODEL_SHA256)?,
            params_sha256: params_sha256.transpose()?,
            slice_sha256: sha(gguf, keys::SLICE_SHA256)?,
            hparams,
            is_half: is_half(gguf),
            file_bytes: gguf.file_bytes(),
        })
    }
}

/// What a key of a slice says is not what it must.
fn refuse(gguf: &Gguf, key: &str, says: String, must: &str) -> SliceError {
    SliceError::File(gguf.key_error(key, Rule::Hparam { says, must: must.to_owned() }))
}

fn text(gguf: &Gguf, key: &str) -> Result<String, SliceError> {
    match gguf.get(key) {
        Some(value) => match value.as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(refuse(gguf, key, format!("a {}", value.value_type()), "text")),
        },
        None => Err(SliceError::File(gguf.key_error(key, Rule::KeyMissing))),
    }
}

fn number(gguf: &Gguf, key: &str) -> Result<u32, SliceError> {
    match gguf.get(key) {
        Some(Value::U32(n)) => Ok(n),
        Some(other) => Err(refuse(gguf, key, format!("a {}", other.value_type()), "a u32")),
        None => Err(SliceError::File(gguf.key_error(key, Rule::KeyMissing))),
    }
}

fn sha(gguf: &Gguf, key: &str) -> Result<Sha, SliceError> {
    let digits = text(gguf, key)?;
    Sha::parse(&digits).ok_or_else(|| refuse(gguf, key, Shown(&digits).to_string(), "64 hex digits"))
}

/// A slice's blocks lie where its role says.
fn is_in_its_place(gguf: &Gguf, role: Role, blocks: BlockRange, model_blocks: u32) -> Result<(), SliceError> {
    let BlockRange { first, last } = blocks;
    let right = match role {
        Role::Head => first == 0 && last < model_blocks.saturating_sub(1),
        Role::Middle => first > 0 && last < model_blocks.saturating_sub(1),
        Role::Tail => first > 0 && last == model_blocks.wrapping_sub(1),
    };
    if first > last || !right {
        let says = format!("blocks {first} to {last} of {model_blocks} for the {role}");
        return Err(refuse(gguf, keys::LAST_BLOCK, says, "blocks of its place"));
    }
    Ok(())
}

/// A slice of version 2 says what it lacks, and one of version 1 does not; and it has as many blocks as its own keys say.
fn counts_right(gguf: &Gguf, least: u32, renumbered: bool, hparams: &Hparams) -> Result<(), SliceError> {
    if renumbered == absent::is_said(gguf) {
        let (says, must) = match renumbered {
            true => ("some tensors", "nothing, in a slice of version 1"),
            false => ("nothing", "what the slice lacks"),
        };
        return Err(refuse(gguf, keys::ABSENT_NAMES, says.to_owned(), must));
    }
    // blocks that predict further tokens are behind the model's
    let most = if renumbered { least } else { least.saturating_add(hparams.n_nextn) };
    if !(least..=most).contains(&hparams.n_blocks) {
        let says = format!("{} blocks", hparams.n_blocks);
        let key = format!("{}.block_count", hparams.arch);
        return Err(refuse(gguf, &key, says, &format!("{least}, as its dim. keys have it")));
    }
    Ok(())
}

/// [`SliceInfo::is_half`] of a file.
fn is_half(gguf: &Gguf) -> bool {
    let (mut half, mut all) = (0, 0);
    for tensor in gguf.tensors().filter(|tensor| check::block_of(tensor.name()).is_some()) {
        match tensor.tensor_type() {
            ty if ty.is_quantized() => return false,
            TensorType::F16 | TensorType::BF16 => half += tensor.n_bytes(),
            _ => {}
        }
        all += tensor.n_bytes();
    }
    2 * half > all
}

/// Every block of a slice that keeps the model's numbers has tensors in its file, and no other block has.
fn holds(gguf: &Gguf, blocks: BlockRange) -> Result<(), SliceError> {
    let mut seen = vec![false; blocks.count() as usize];
    for tensor in gguf.tensors() {
        let Some(block) = check::block_of(tensor.name()) else { continue };
        if !blocks.contains(block) {
            let rule = Rule::Hparam { says: format!("block {block}"), must: format!("one of {blocks}") };
            return Err(SliceError::File(tensor.error(rule)));
        }
        seen[(block - blocks.first) as usize] = true;
    }
    match seen.iter().position(|&seen| !seen) {
        Some(at) => {
            let place = Place::Tensor(format!("blk.{}.*", blocks.first as usize + at));
            let rule = Rule::TensorMissing { blocks: blocks.count().into() };
            Err(SliceError::File(Error { place, ..Error::file(gguf.path(), rule) }))
        }
        None => Ok(()),
    }
}

/// Reads a whole slice and compares every digest. `progress` hears bytes done and bytes in all.
///
/// # Errors
/// The file is no slice, or something in it changed since it was cut: the tensor is named.
pub fn verify(path: impl AsRef<Path>, progress: impl FnMut(u64, u64)) -> Result<SliceInfo, SliceError> {
    let gguf = Gguf::open(path)?;
    verify_opened(&gguf, progress)
}

/// The same for an opened file.
///
/// # Errors
/// As [`verify`].
pub fn verify_opened(gguf: &Gguf, mut progress: impl FnMut(u64, u64)) -> Result<SliceInfo, SliceError> {
    verify_while(gguf, || true, &mut progress)
}

/// The same for as long as `goes_on`, which is asked before each tensor.
///
/// # Errors
/// As [`verify`], and [`SliceError::Stopped`].
pub fn verify_while(
    gguf: &Gguf,
    goes_on: impl Fn() -> bool,
    mut progress: impl FnMut(u64, u64),
) -> Result<SliceInfo, SliceError> {
    let info = SliceInfo::of(gguf)?;
    let file = || gguf.path().display().to_string();
    let mut buf = vec![0; BUFFER_BYTES];

    // the header first: it is what the digests of the tensors stand in
    let found = header_digest(gguf, &mut buf)?;
    if found != info.slice_sha256 {
        return Err(SliceError::Header { file: file() });
    }
    let recorded = tensor_digests(gguf);
    if recorded.len() != gguf.n_tensors() {
        return Err(SliceError::Header { file: file() });
    }
    let (mut done, total) = (0, gguf.tensor_bytes());
    for (tensor, recorded) in gguf.tensors().zip(recorded) {
        if !goes_on() {
            return Err(SliceError::Stopped { file: file() });
        }
        let found = digest::of_tensor(&tensor, &mut buf, |n| {
            done += n;
            progress(done, total);
        })?;
        if Some(found) != recorded {
            return Err(SliceError::Tensor { file: file(), tensor: Shown(tensor.name()).to_string() });
        }
    }
    padding(gguf, &mut buf)?;
    Ok(info)
}

/// The digests that a slice says its tensors have, in their order: `None` for a text that is no digest. Empty where it says
/// none.
pub(crate) fn tensor_digests(gguf: &Gguf) -> Vec<Option<Sha>> {
    let digests = gguf.get(keys::TENSOR_SHA256);
    let digests = digests.as_ref().and_then(Value::as_array);
    let parse = |text| std::str::from_utf8(text).ok().and_then(Sha::parse);
    digests.map(|array| array.strings().map(parse).collect()).unwrap_or_default()
}

/// What stands between the tensors and behind the last one: zeros up to the alignment, as they were written.
fn padding(gguf: &Gguf, buf: &mut [u8]) -> Result<(), SliceError> {
    let changed = || SliceError::Padding { file: gguf.path().display().to_string() };
    let mut end = gguf.data_offset();
    for tensor in gguf.tensors() {
        if tensor.file_offset() != end {
            return Err(changed());
        }
        let data_end = end + tensor.n_bytes();
        end += tensor.n_bytes().next_multiple_of(gguf.alignment());
        // an alignment is at most as large as the buffer
        let pad = &mut buf[..(end.min(gguf.file_bytes()) - data_end) as usize];
        gguf.read_file_at(data_end, pad)?;
        if pad.iter().any(|&b| b != 0) {
            return Err(changed());
        }
    }
    if end == gguf.file_bytes() { Ok(()) } else { Err(changed()) }
}

/// The digest of everything before the tensor data.
fn header_digest(gguf: &Gguf, buf: &mut [u8]) -> Result<Sha, Error> {
    let end = gguf.data_offset();
    // the digest's own digits count as zeros
    let own =
        gguf.value_offset(keys::SLICE_SHA256).map(|at| at + LENGTH_BYTES..at + LENGTH_BYTES + SHA_DIGITS);
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < end {
        let n = (end - at).min(buf.len() as u64) as usize;
        gguf.read_file_at(at, &mut buf[..n])?;
        if let Some(own) = &own {
            let from = own.start.clamp(at, at + n as u64) - at;
            let to = own.end.clamp(at, at + n as u64) - at;
            buf[from as usize..to as usize].fill(b'0');
        }
        hash.update(&buf[..n]);
        at += n as u64;
    }
    Ok(Sha(hash.finalize().into()))
}

/// Bytes read and digested at a time: as many as the longest padding has.
const BUFFER_BYTES: usize = MAX_ALIGNMENT as usize;
/// Bytes before a text: its length.
const LENGTH_BYTES: u64 = 8;
/// Hex digits of a digest.
const SHA_DIGITS: u64 = 64;

/// Why a slice was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// The file breaks a rule of the format or of llama.cpp.
    #[error(transparent)]
    File(#[from] Error),
    /// A whole model, or something else.
    #[error("{0}: not a slice")]
    NotASlice(String),
    /// Cut by a later version of this program.
    #[error(
        "{file}: a slice of version {}, this program reads {VERSION_RENUMBERED} and {VERSION}",
        found.map_or("?".into(), |n| n.to_string())
    )]
    Version {
        /// The file.
        file: String,
        /// Its version, if it is a number.
        found: Option<u32>,
    },
    /// Metadata or tensor descriptions were changed.
    #[error("{file}: hash mismatch in its metadata: the file was changed or damaged")]
    Header {
        /// The file.
        file: String,
    },
    /// Bytes between or behind the tensors were changed.
    #[error("{file}: bytes between its tensors or behind them were changed")]
    Padding {
        /// The file.
        file: String,
    },
    /// A tensor's data was changed.
    #[error("{file}: hash mismatch in {tensor}: the file was changed or damaged")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// Whoever asked for it wants it no more.
    #[error("{file}: its digests were not all compared: that was stopped")]
    Stopped {
        /// The file.
        file: String,
    },
}

impl SliceError {
    /// The key or tensor it is about, where it is about one.
    pub fn place(&self) -> Option<&Place> {
        match self {
            SliceError::File(e) => Some(&e.place),
            _ => None,
        }
    }
}

impl Explained for SliceError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            SliceError::File(e) => return e.hint(),
            SliceError::NotASlice(_) => "cut the model with dim-split".into(),
            SliceError::Version { .. } => "cut the model again".into(),
            SliceError::Stopped { .. } => return None,
            SliceError::Header { .. } | SliceError::Padding { .. } | SliceError::Tensor { .. } => {
                "copy it again".into()
            }
        })
    }

    fn is_misuse(&self) -> bool {
        true
    }
}
