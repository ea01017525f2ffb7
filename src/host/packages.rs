//! A directory of Core ML packages as `dim-split --coreml` wrote it, read and checked, to be pushed to a worker.
//!
//! The directory's `manifest.json` may have come from anywhere: it is read up to a bound, and it names no file. What
//! each item of a push is called stands in the one table below (PROTOCOL.md, section 9), and a manifest that has other
//! names is refused.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use dim_core::blocks::BlockRange;
use gguf_tools::coreml::manifest::{FORMAT, Manifest, PackageFile, VERSION};
use gguf_tools::coreml::package::{
    MANIFEST, MODEL_FILE, PACKAGE_MANIFEST, SELF_TEST, WEIGHT_FILE, directory_name,
};
use gguf_tools::digest::Sha;
use sha2::{Digest, Sha256};

use dim_wire::message::{Item, ItemKind, MAX_ITEMS, PushOffer};

/// The files of a package, with their kinds.
const PACKAGE_FILES: [(ItemKind, &str); 3] = [
    (ItemKind::PackageManifest, PACKAGE_MANIFEST),
    (ItemKind::PackageModel, MODEL_FILE),
    (ItemKind::PackageWeights, WEIGHT_FILE),
];
/// Three files each, the manifest and the self-test: what fits into one push.
const MOST_PACKAGES: usize = (MAX_ITEMS - 2) / 3;
/// A manifest has some kilobytes a block.
const MOST_MANIFEST_BYTES: u64 = 16 << 20;

/// What is wrong with a directory.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    /// There is no such directory, or it has no manifest.
    #[error("{} is no directory of Core ML packages: {source}", path.display())]
    NoManifest {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest cannot be understood, or says something that cannot be.
    #[error("{}: {what}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file that the manifest promises cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is another one than the manifest promises.
    #[error("{} is not the file that {MANIFEST} promises: {what}", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
}

/// A directory whose files are all there and as its manifest says.
#[derive(Debug)]
pub struct Packages {
    /// What a worker is offered; the host's name is left empty.
    pub offer: PushOffer,
    /// The file of each item of the offer.
    pub files: Vec<PathBuf>,
    /// The model's name, for people.
    pub model_name: String,
    /// All bytes of all files.
    pub bytes: u64,
}

impl Packages {
    /// Reads and checks `directory`; `each` hears bytes read and bytes in all.
    ///
    /// # Errors
    /// [`PackagesError`] for the first thing that is wrong.
    pub fn open(directory: &Path, each: &mut dyn FnMut(u64, u64)) -> Result<Packages, PackagesError> {
        let path = directory.join(MANIFEST);
        let no_manifest = |source| PackagesError::NoManifest { path: directory.into(), source };
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|f| f.take(MOST_MANIFEST_BYTES + 1).read_to_end(&mut text));
        read.map_err(no_manifest)?;
        let wrong = |what: String| PackagesError::Manifest { path: path.clone(), what };
        if text.len() as u64 > MOST_MANIFEST_BYTES {
            return Err(wrong(format!("longer than {} MiB", MOST_MANIFEST_BYTES >> 20)));
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|e| wrong(format!("not a manifest of packages: {e}")))?;
        let listed = listed(&manifest).map_err(wrong)?;

        let mut items = vec![Item {
            kind: ItemKind::Manifest,
            index: 0,
            size: text.len() as u64,
            sha256: Sha::of(&text),
        }];
        let mut files = vec![path.clone()];
        let bytes = listed.iter().fold(items[0].size, |sum, l| sum.saturating_add(l.item.size));
        let mut done = items[0].size;
        for Listed { item, file } in listed {
            let path = directory.join(file);
            check(&path, &item, &mut |n| {
                done += n;
                each(done, bytes);
            })?;
            items.push(item);
            files.push(path);
        }
        let slice = &manifest.slice;
        manifest.model.params_sha256.as_deref().map(digest).transpose().map_err(wrong)?;
        let offer = PushOffer {
            model: digest(&manifest.model.sha256).map_err(wrong)?,
            slice: if slice.sha256.is_empty() {
                Sha([0; 32])
            } else {
                digest(&slice.sha256).map_err(wrong)?
            },
            blocks: BlockRange { first: slice.first_block, last: slice.last_block },
            items,
            name: String::new(),
        };
        debug_assert!(offer.is_valid());
        let model_name = dim_wire::codec::printable(&manifest.model.name);
        Ok(Packages { offer, files, model_name, bytes })
    }
}

/// A file that a manifest promises: what it must be, and where it lies by our own table.
struct Listed {
    item: Item,
    file: PathBuf,
}

/// Every file but the manifest, in the order of a push.
fn listed(manifest: &Manifest) -> Result<Vec<Listed>, String> {
    if manifest.format != FORMAT || manifest.version != VERSION {
        return Err(format!(
            "format {:?} version {}: this program knows {FORMAT:?} version {VERSION}",
            manifest.format, manifest.version
        ));
    }
    let (first, last) = (manifest.slice.first_block, manifest.slice.last_block);
    if first > last || last >= manifest.model.n_blocks {
        return Err(format!("blocks {first}..{last} of {}", manifest.model.n_blocks));
    }
    let count = manifest.packages.len();
    if !(1..=MOST_PACKAGES).contains(&count) {
        return Err(format!("{count} packages: a push has 1 to {MOST_PACKAGES}"));
    }
    for (index, package) in manifest.packages.iter().enumerate() {
        if package.directory != directory_name(index) {
            return Err(format!(
                "package {index} is called {:?}: it must be {:?}",
                package.directory,
                directory_name(index)
            ));
        }
        let known = |f: &PackageFile| PACKAGE_FILES.iter().any(|(_, path)| *path == f.path);
        if package.files.len() != PACKAGE_FILES.len() || !package.files.iter().all(known) {
            let names: Vec<&str> = package.files.iter().map(|f| f.path.as_str()).take(8).collect();
            return Err(format!(
                "package {index} has the files {names:?}: it must have {:?}",
                PACKAGE_FILES.map(|(_, path)| path)
            ));
        }
    }

    let mut all = Vec::new();
    for (kind, path) in PACKAGE_FILES {
        for (index, package) in manifest.packages.iter().enumerate() {
            let entry = package.files.iter().find(|f| f.path == path);
            let entry = entry.ok_or_else(|| format!("package {index} does not list {path}"))?;
            let item = item(kind, index as u8, entry.bytes, &entry.sha256)
                .map_err(|what| format!("package {index}, {path}: {what}"))?;
            all.push(Listed { item, file: Path::new(&directory_name(index)).join(path) });
        }
    }
    if let Some(test) = &manifest.selftest {
        if test.file != SELF_TEST {
            return Err(format!("the self-test is called {:?}: it must be {SELF_TEST:?}", test.file));
        }
        let item = item(ItemKind::SelfTest, 0, test.bytes, &test.sha256)
            .map_err(|what| format!("{SELF_TEST}: {what}"))?;
        all.push(Listed { item, file: SELF_TEST.into() });
    }
    Ok(all)
}

fn item(kind: ItemKind, index: u8, size: u64, sha256: &str) -> Result<Item, String> {
    if !(1..=1 << 40).contains(&size) {
        return Err(format!("{size} bytes"));
    }
    Ok(Item { kind, index, size, sha256: digest(sha256)? })
}

fn digest(text: &str) -> Result<Sha, String> {
    let cut: String = text.chars().take(80).collect();
    Sha::parse(text).ok_or_else(|| format!("{cut:?} is no SHA-256 in 64 hex digits"))
}

/// Whether a file is the one that the manifest promises. `each` hears how many bytes a piece had.
fn check(path: &Path, item: &Item, each: &mut dyn FnMut(u64)) -> Result<(), PackagesError> {
    let unreadable = |source| PackagesError::File { path: path.into(), source };
    let altered = |what: String| PackagesError::Altered { path: path.into(), what };
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() != item.size {
        return Err(altered(format!("{} bytes instead of {}", metadata.len(), item.size)));
    }
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut piece).map_err(unreadable)?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
        each(n as u64);
    }
    let found = Sha(hash.finalize().into());
    if found != item.sha256 {
        return Err(altered(format!(
            "its SHA-256 is {:.8}..., not {:.8}...",
            found.to_string(),
            item.sha256.to_string()
        )));
    }
    Ok(())
}
