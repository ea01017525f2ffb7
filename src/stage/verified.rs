//! Whether a slice's weights are the ones that were cut: llama.cpp loads a file with altered weights without a
//! word, so every byte is compared with the digests in the slice before its first use.
//!
//! Reading 12 GB takes seconds to a minute, so a slice that was found whole is remembered (path, size, times
//! and inode of the file, and the digest found) and not read again until one of these differs.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use gguf_tools::gguf::Gguf;
use gguf_tools::slice::{SliceError, SliceInfo, verify_opened};
use sha2::{Digest as _, Sha256};

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
    let memory = Memory::of(path, &info);
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

/// A file whose name and content say what was found whole. Losing it costs one more reading, nothing else, so
/// whatever goes wrong with it is passed over.
struct Memory {
    file: PathBuf,
    content: String,
}

impl Memory {
    fn of(path: &Path, info: &SliceInfo) -> Option<Memory> {
        let path = path.canonicalize().ok()?;
        let metadata = fs::metadata(&path).ok()?;
        let changed = |time: std::io::Result<std::time::SystemTime>| {
            time.ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos())
        };
        #[cfg(unix)]
        let (inode, status_changed) = {
            use std::os::unix::fs::MetadataExt as _;
            ((metadata.dev(), metadata.ino()), (metadata.ctime(), metadata.ctime_nsec()))
        };
        #[cfg(not(unix))]
        let (inode, status_changed) = ((0u64, 0u64), (0i64, 0i64));
        let content = format!(
            "dim verified 1\n{}\n{} bytes\nmodified {} ns\nstatus changed {status_changed:?}\ninode {inode:?}\nslice {}\n",
            path.display(),
            metadata.len(),
            changed(metadata.modified()),
            info.slice_sha256,
        );
        let name: String = Sha256::digest(path.as_os_str().as_encoded_bytes())
            .iter()
            .take(16)
            .map(|b| format!("{b:02x}"))
            .collect();
        Some(Memory { file: folder()?.join(name), content })
    }

    fn holds(&self) -> bool {
        fs::read_to_string(&self.file).is_ok_and(|found| found == self.content)
    }

    fn keep(&self) {
        let Some(folder) = self.file.parent() else { return };
        if fs::create_dir_all(folder).is_err() {
            return;
        }
        let temp = self.file.with_extension(format!("{}.tmp", std::process::id()));
        let written = fs::File::create(&temp).and_then(|mut f| f.write_all(self.content.as_bytes()));
        if written.and_then(|()| fs::rename(&temp, &self.file)).is_err() {
            let _ = fs::remove_file(&temp);
        }
    }
}

fn folder() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("dim").join("verified"))
}
