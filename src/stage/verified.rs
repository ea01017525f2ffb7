//! Whether a slice's weights are the ones that were cut: llama.cpp loads a file with altered weights without a
//! word, so every byte is compared with the digests in the slice before its first use.
//!
//! Reading 12 GB takes seconds to a minute, so a slice that was found whole is remembered (path, size, times
//! and inode of the file, and the digest found) and not read again until one of these differs.

use std::path::Path;

use gguf_tools::digest::{self, Sha};
use gguf_tools::gguf::{Gguf, Value};
use gguf_tools::manifest::ModelEntry;
use gguf_tools::slice::{SliceError, SliceInfo, verify_while};

use crate::error::Error;
use crate::stage::memory::Memory;

/// When the weights are compared with their digests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Every time.
    Always,
    /// Once; then again only when the file has changed.
    #[default]
    Once,
    /// Never: the header alone is checked.
    Never,
}

impl Verify {
    /// Whether they need not be compared now: `memory` is of a comparison.
    fn is_content_with(self, memory: &Memory) -> bool {
        match self {
            Verify::Never => true,
            Verify::Once => memory.holds(),
            Verify::Always => false,
        }
    }
}

/// Reads a slice's header, checks it, and its weights as `when` says; `progress` hears bytes read and bytes in all.
///
/// # Errors
/// The file is no slice, breaks a rule, or its weights are not those that were cut: the tensor is named.
pub fn open_slice(
    path: &Path,
    when: Verify,
    progress: impl FnMut(u64, u64),
) -> Result<SliceInfo, SliceError> {
    open_slice_while(path, when, || true, progress)
}

/// The same for as long as `goes_on`.
pub(crate) fn open_slice_while(
    path: &Path,
    when: Verify,
    goes_on: impl Fn() -> bool,
    progress: impl FnMut(u64, u64),
) -> Result<SliceInfo, SliceError> {
    let gguf = Gguf::open(path)?;
    let info = SliceInfo::of(&gguf)?;
    let memory = Memory::of("verified", [path], &info.slice_sha256.to_string());
    if when.is_content_with(&memory) {
        return Ok(info);
    }
    let info = verify_while(&gguf, goes_on, progress)?;
    memory.keep();
    Ok(info)
}

/// What a cut says of the model that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutFrom {
    /// Its identity.
    pub model_sha256: Sha,
    /// The digest of its parameters that are not weights; older cuts have none.
    pub params_sha256: Option<Sha>,
}

impl From<&SliceInfo> for CutFrom {
    fn from(slice: &SliceInfo) -> CutFrom {
        CutFrom { model_sha256: slice.model_sha256, params_sha256: slice.params_sha256 }
    }
}

impl CutFrom {
    /// Of a manifest; `None`: it holds something else than digests.
    pub fn of(model: &ModelEntry) -> Option<CutFrom> {
        let params_sha256 = match &model.params_sha256 {
            Some(hex) => Some(Sha::parse(hex)?),
            None => None,
        };
        Some(CutFrom { model_sha256: Sha::parse(&model.sha256)?, params_sha256 })
    }
}

/// Whether the whole model at `path` is the one that was cut: its parameters, and, as `when` says, its weights, all of which
/// are read for that; `progress` hears bytes read and bytes in all.
///
/// # Errors
/// It cannot be read, or it is [another](Error::CutFromAnother).
pub fn is_cut_from(
    path: &Path,
    cut: &CutFrom,
    when: Verify,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), Error> {
    let another = |differ| Err(Error::CutFromAnother { path: path.to_owned(), differ });
    let gguf = Gguf::open(path)?;
    let arch = gguf.get("general.architecture");
    let arch = arch.as_ref().and_then(Value::as_str).unwrap_or_default();
    if cut.params_sha256.is_some_and(|params| params != digest::of_params(&gguf, arch)) {
        return another("parameters");
    }
    let memory = Memory::of("identity", gguf.files(), &cut.model_sha256.to_string());
    if when.is_content_with(&memory) {
        return Ok(());
    }
    let mut done = 0;
    let each = |n| {
        done += n;
        progress(done, gguf.tensor_bytes());
    };
    if digest::of_model(&gguf, each)? != cut.model_sha256 {
        return another("weights");
    }
    memory.keep();
    Ok(())
}
