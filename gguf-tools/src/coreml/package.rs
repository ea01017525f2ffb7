//! A directory of packages on disk: written under a temporary name, renamed when complete.
//!
//! ```text
//! STEM.middle-A..B.coreml/
//!   middle-00.mlpackage/
//!     Manifest.json                                    Apple's: which file is what
//!     Data/com.apple.CoreML/model.mlmodel              the program, protobuf
//!     Data/com.apple.CoreML/weights/weight.bin         its weights
//!   middle-01.mlpackage/ ...
//!   selftest.bin
//!   manifest.json                                      ours
//! ```
//!
//! Every name is a literal of this file. The temporary directory stands beside the final one, so that the rename
//! stays on one disk, and is locked: a later run removes what a killed one left, and nothing that is still written.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use sha2::{Digest, Sha256};

use super::manifest::PackageFile;
use super::weights::WeightPlan;
use super::{Error, IoContext, proto};
use crate::gguf::Gguf;
use crate::os;

/// Name of this project's manifest in a directory of packages.
pub const MANIFEST: &str = "manifest.json";
/// Name of the self-test vectors there.
pub const SELF_TEST: &str = "selftest.bin";
/// The weight file in a package.
pub const WEIGHT_FILE: &str = "Data/com.apple.CoreML/weights/weight.bin";
/// The program in a package.
pub const MODEL_FILE: &str = "Data/com.apple.CoreML/model.mlmodel";
/// Apple's manifest in a package.
pub const PACKAGE_MANIFEST: &str = "Manifest.json";

/// Apple's manifest. The identifiers are any two that differ; fixed ones keep packages reproducible.
const PACKAGE_MANIFEST_TEXT: &str = r#"{
    "fileFormatVersion": "1.0.0",
    "itemInfoEntries": {
        "6b1d7c5e-0d1f-4f0a-9a8e-1f6f2f0c7a01": {
            "author": "com.apple.CoreML",
            "description": "CoreML Model Specification",
            "name": "model.mlmodel",
            "path": "com.apple.CoreML/model.mlmodel"
        },
        "6b1d7c5e-0d1f-4f0a-9a8e-1f6f2f0c7a02": {
            "author": "com.apple.CoreML",
            "description": "CoreML Model Weights",
            "name": "weights",
            "path": "com.apple.CoreML/weights"
        }
    },
    "rootModelIdentifier": "6b1d7c5e-0d1f-4f0a-9a8e-1f6f2f0c7a01"
}
"#;

/// Bytes read and digested at a time.
const BUFFER_BYTES: usize = 1 << 16;

/// Name of the directory of package `index`.
pub fn directory_name(index: usize) -> String {
    format!("middle-{index:02}.mlpackage")
}

/// A directory being written. Removed when dropped, unless published.
pub struct Staging {
    target: PathBuf,
    path: PathBuf,
    published: bool,
    /// Holds the lock that says this directory is being written.
    _lock: File,
}

impl Staging {
    /// Creates one beside `target`, after removing those that killed runs left there.
    ///
    /// # Errors
    /// `target` exists and is not a directory of packages; the folder cannot be written.
    pub fn create(target: &Path) -> Result<Staging, Error> {
        if fs::symlink_metadata(target).is_ok() && !is_ours(target) {
            return Err(Error::InTheWay(target.into()));
        }
        let name = target.file_name().ok_or_else(|| Error::InTheWay(target.into()))?;
        let folder = os::folder_of(target);
        fs::create_dir_all(folder).at(folder)?;
        let prefix = format!(".{}.part-", name.to_string_lossy());
        remove_abandoned(folder, &prefix);
        // the process id tells two runs at once apart; the lock tells the living from the dead
        for attempt in 0..100 {
            let path = folder.join(format!("{prefix}{}-{attempt}", std::process::id()));
            match fs::create_dir(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                created => created.at(&path)?,
            }
            let lock = File::open(&path).at(&path)?;
            os::lock(&lock);
            return Ok(Staging { target: target.into(), path, published: false, _lock: lock });
        }
        Err(Error::InTheWay(target.into()))
    }

    /// Where files go until then.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file in it, to the disk, and gives its entry for a manifest.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PackageFile, Error> {
        write_file(&self.path, name, bytes)
    }

    /// Makes a file in it, to be written and read over, and closed with [`finish`](Self::finish).
    ///
    /// # Errors
    /// Making it fails.
    pub fn open(&self, name: &str) -> Result<File, Error> {
        let path = self.path.join(name);
        OpenOptions::new().read(true).write(true).create_new(true).open(&path).at(&path)
    }

    /// Reads through the file `name`, brings it to the disk, and gives its entry for a manifest.
    ///
    /// # Errors
    /// Reading or writing fails.
    pub fn finish(&self, name: &str, mut file: File) -> Result<PackageFile, Error> {
        let path = self.path.join(name);
        file.sync_all().at(&path)?;
        file.rewind().at(&path)?;
        let (mut sha, mut bytes, mut piece) = (Sha256::new(), 0, vec![0; BUFFER_BYTES]);
        loop {
            match file.read(&mut piece).at(&path)? {
                0 => break,
                n => {
                    sha.update(&piece[..n]);
                    bytes += n as u64;
                }
            }
        }
        Ok(PackageFile { path: name.into(), bytes, sha256: hex(&sha.finalize()) })
    }

    /// Writes package `index`: its files, in the order in which Apple's tools list them.
    ///
    /// # Errors
    /// As [`WeightPlan::write`].
    pub fn write_package(
        &self,
        index: usize,
        model: &proto::Model,
        weights: &WeightPlan,
        gguf: &Gguf,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<PackageFile>, Error> {
        let package = self.path.join(directory_name(index));
        let weight_file = package.join(WEIGHT_FILE);
        let weight_folder = os::folder_of(&weight_file);
        fs::create_dir_all(weight_folder).at(weight_folder)?;
        let sha256 = weights.write(gguf, &weight_file, progress)?;
        let files = vec![
            write_file(&package, PACKAGE_MANIFEST, PACKAGE_MANIFEST_TEXT.as_bytes())?,
            write_file(&package, MODEL_FILE, &model.encode_to_vec())?,
            PackageFile { path: WEIGHT_FILE.into(), bytes: weights.file_bytes, sha256: hex(&sha256) },
        ];
        // the names of the files, in every directory that has any
        for folder in ["Data/com.apple.CoreML/weights", "Data/com.apple.CoreML", "Data", "."] {
            let folder = package.join(folder);
            File::open(&folder).and_then(|f| f.sync_all()).at(&folder)?;
        }
        Ok(files)
    }

    /// Gives the directory its name. A complete older one of the same name is replaced.
    ///
    /// # Errors
    /// Renaming fails; the older one is then still there.
    pub fn publish(mut self) -> Result<(), Error> {
        File::open(&self.path).and_then(|f| f.sync_all()).at(&self.path)?;
        if fs::symlink_metadata(&self.target).is_ok() {
            // the two change names in one step: at no time is there none
            if os::exchange(&self.path, &self.target).is_err() {
                let old = os::folder_of(&self.target).join(format!("{}.old", self.path.display()));
                fs::rename(&self.target, &old).at(&self.target)?;
                fs::rename(&self.path, &self.target).at(&self.target)?;
                self.path = old;
            }
            fs::remove_dir_all(&self.path).at(&self.path)?;
        } else {
            fs::rename(&self.path, &self.target).at(&self.target)?;
        }
        self.published = true;
        os::sync_folder(&self.target).at(&self.target)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path); // a full disk, or a failing one: nothing more can be done
        }
    }
}

/// A directory that this writer made, so one that it may replace.
fn is_ours(path: &Path) -> bool {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
    let manifest = || fs::read(path.join(MANIFEST)).ok();
    let format =
        |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).ok()?.get("format").cloned();
    is_directory && manifest().and_then(format).is_some_and(|f| f == super::manifest::FORMAT)
}

/// Removes directories of this prefix that no living process has locked.
fn remove_abandoned(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_one = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        if is_one
            && entry.file_type().is_ok_and(|t| t.is_dir())
            && File::open(entry.path()).is_ok_and(|f| os::is_unlocked(&f))
        {
            let _ = fs::remove_dir_all(entry.path()); // left where it is, it only costs space
        }
    }
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<PackageFile, Error> {
    let path = folder.join(name);
    let mut file = File::create_new(&path).at(&path)?;
    file.write_all(bytes).at(&path)?;
    file.sync_all().at(&path)?;
    Ok(PackageFile { path: name.into(), bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) })
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
