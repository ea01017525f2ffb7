//! What was found out about files at some expense, and holds until one of them changes: kept in the user's cache.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// A finding about a model's files. Losing it costs finding it again, nothing else, so whatever goes wrong with it is passed
/// over.
pub(crate) struct Memory(Option<Vec<Note>>);

impl Memory {
    /// Of the finding `what` about these files, as they are now; `detail` is what else has to be the same.
    pub(crate) fn of<'f>(what: &str, files: impl IntoIterator<Item = &'f Path>, detail: &str) -> Memory {
        Memory(files.into_iter().map(|file| Note::of(what, file, detail)).collect())
    }

    /// Whether it was found before, and the files are as they were then.
    pub(crate) fn holds(&self) -> bool {
        self.0.as_ref().is_some_and(|notes| notes.iter().all(Note::holds))
    }

    /// It was found.
    pub(crate) fn keep(&self) {
        self.0.iter().flatten().for_each(Note::keep);
    }
}

/// What is remembered of one of the files: a file whose name and content say what was found.
struct Note {
    file: PathBuf,
    content: String,
}

impl Note {
    fn of(what: &str, path: &Path, detail: &str) -> Option<Note> {
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
            "dim {what} 1\n{}\n{} bytes\nmodified {} ns\nstatus changed {status_changed:?}\ninode {inode:?}\n{detail}\n",
            path.display(),
            metadata.len(),
            changed(metadata.modified()),
        );
        let name: String = Sha256::digest(path.as_os_str().as_encoded_bytes())
            .iter()
            .take(16)
            .map(|b| format!("{b:02x}"))
            .collect();
        Some(Note { file: folder()?.join(what).join(name), content })
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
    Some(cache.join("dim"))
}
