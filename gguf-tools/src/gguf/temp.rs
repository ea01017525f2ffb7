//! Files that appear whole or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::os;

/// A file that has no name yet: it stands beside the place where it will appear, and goes away unless published.
#[derive(Debug)]
pub struct TempFile {
    path: Option<PathBuf>,
    /// Held to keep the lock that tells [`remove_stale`] that somebody is still writing.
    _lock: File,
}

impl TempFile {
    /// Creates one beside `target`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(target: &Path) -> io::Result<(TempFile, File)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        loop {
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let mut temp = std::ffi::OsString::from(".");
            temp.push(name);
            temp.push(format!(".{}-{n}{TEMP_SUFFIX}", std::process::id()));
            let path = target.with_file_name(temp);
            let file = match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => file,
                // left by a killed process whose number this one has now
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            let lock = file.try_clone()?;
            os::lock(&lock);
            return Ok((TempFile { path: Some(path), _lock: lock }, file));
        }
    }

    /// Gives it its name, over what may stand there, and makes the name durable.
    ///
    /// # Errors
    /// Renaming fails.
    pub fn publish(mut self, target: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target)?;
        }
        self.path = None;
        os::sync_folder(target)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // nothing can be done about a failure here; the next run removes what is left
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes temporary files that killed processes left beside `target`. Returns how many.
///
/// One that a living process still writes holds a lock and stays.
///
/// # Errors
/// The folder cannot be read.
pub fn remove_stale(target: &Path) -> io::Result<usize> {
    let Some(name) = target.file_name().and_then(|n| n.to_str()) else { return Ok(0) };
    let folder = os::folder_of(target);
    let prefix = format!(".{name}.");
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let temp = entry.file_name();
        let ours = temp
            .to_str()
            .and_then(|t| t.strip_prefix(&prefix)?.strip_suffix(TEMP_SUFFIX))
            .is_some_and(|middle| middle.bytes().all(|b| b.is_ascii_digit() || b == b'-'));
        if ours && File::open(entry.path()).is_ok_and(|file| os::is_unlocked(&file)) {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// How the names of temporary files end.
const TEMP_SUFFIX: &str = ".dim-part";

impl TempFile {
    /// Where it stands until it is published.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}
