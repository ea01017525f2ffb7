//! Whether a slice's weights are the ones that were cut: llama.cpp loads a file with altered weights without a
//! word, so every byte is compared with the digests in the slice before its first use.
//!
//! Reading 12 GB takes seconds to a minute, so a slice that was found whole is remembered (path, size, times
//! and inode of the file, and the digest found) and not read again until one of these differs.

use std::path::Path;

use gguf_tools::gguf::Gguf;
use gguf_tools::slice::{SliceError, SliceInfo, verify_opened};

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

/// Reads a slice's header, checks it, and its weights as `when` says; `progress` hears bytes read and bytes in all.
///
/// # Errors
/// The file is no slice, breaks a rule, or its weights are not those that were cut: the tensor is named.
pub fn open_slice(
    path: &Path,
    when: Verify,
    progress: impl FnMut(u64, u64),
) -> Result<SliceInfo, SliceError> {
    let gguf = Gguf::open(path)?;
    let info = SliceInfo::of(&gguf)?;
    let memory = Memory::of("verified", path, &info.slice_sha256.to_string());
    match when {
        Verify::Never => return Ok(info),
        Verify::Once if memory.as_ref().is_some_and(Memory::holds) => return Ok(info),
        Verify::Once | Verify::Always => {}
    }
    let info = verify_opened(&gguf, progress)?;
    if let Some(memory) = memory {
        memory.keep();
    }
    Ok(info)
}
