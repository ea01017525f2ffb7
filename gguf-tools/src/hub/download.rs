//! Whole files, in the cache that the hub's own tools use:
//!
//! ```text
//! models--ORG--NAME/refs/main                  the commit, 40 hex digits
//! models--ORG--NAME/blobs/ETAG                 a file's bytes, under its digest
//! models--ORG--NAME/snapshots/COMMIT/FILE      a link to it
//! models--ORG--NAME/blobs/ETAG.dim-part        what has arrived of a file: it goes on from its end
//! ```
//!
//! A part is named by the digest that the whole will have, so that a part of another version is never gone on with.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{
    HubError, HubName, OnBytes, Settings,
    http::{Client, Remote},
    place::{is_hex, is_inside, is_repo},
};
use crate::{
    digest::Sha,
    gguf::write::TempFile,
    os,
    recipe::{ModelSource, SourceFile},
};

/// A model in the cache.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Its file, or the first of its files.
    pub path: PathBuf,
    /// Where it came from.
    pub source: ModelSource,
}

/// A repository, as the hub lists it.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Brings a model into the cache, if it is not there, and says where it is.
///
/// # Errors
/// It is not there, or cannot be had; what had arrived is kept.
pub fn fetch(settings: &Settings, place: &HubName, progress: OnBytes<'_>) -> Result<Fetched, HubError> {
    let client = Client::new(settings)?;
    let (commit, chosen) = models_of(&client, place)?;
    let folder = Folder::of(settings, &place.repo, &commit);
    let mut files = Vec::with_capacity(chosen.len());
    let mut path = None;
    for name in chosen {
        let (at, file) = folder.bring(&client, name, progress)?;
        path.get_or_insert(at);
        files.push(file);
    }
    folder.remember_main()?;
    let source = ModelSource { repo: place.repo.clone(), revision: commit, files };
    // there is a file: a choice is never empty
    Ok(Fetched { path: path.unwrap_or_default(), source })
}

/// The commit of a repository, and the files of the model that is meant.
pub(super) fn models_of(client: &Client<'_>, place: &HubName) -> Result<(String, Vec<String>), HubError> {
    if !is_repo(&place.repo) {
        return Err(HubError::Name(place.repo.clone()));
    }
    let listing = list(client, &place.repo)?;
    let all: Vec<String> = listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    Ok((listing.sha, place.choose(&all)?))
}

/// The commit and the files of a repository.
fn list(client: &Client<'_>, repo: &str) -> Result<Listing, HubError> {
    let url = format!("{}/api/models/{repo}/revision/main", client.settings.endpoint);
    let answer = |why| HubError::Answer { what: repo.to_owned(), why };
    let text = client.small(&url, repo, MAX_LISTING_BYTES).map_err(|e| at_repo(e, client.settings, repo))?;
    let listing: Listing = serde_json::from_slice(&text).map_err(|_| answer("lists no files"))?;
    if !is_hex(&listing.sha, COMMIT_DIGITS) {
        return Err(answer("names no commit"));
    }
    Ok(listing)
}

/// The page where terms are accepted is the repository's.
pub(super) fn at_repo(error: HubError, settings: &Settings, repo: &str) -> HubError {
    match error {
        HubError::Forbidden { what, .. } => {
            HubError::Forbidden { what, page: format!("{}/{repo}", settings.endpoint) }
        }
        other => other,
    }
}

/// A file's address.
pub(super) fn address(settings: &Settings, repo: &str, revision: &str, name: &str) -> String {
    let mut url = format!("{}/{repo}/resolve/{revision}/", settings.endpoint);
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                url.push(byte.into())
            }
            _ => url.push_str(&format!("%{byte:02X}")),
        }
    }
    url
}

/// A repository's folder in the cache.
pub(super) struct Folder<'a> {
    path: PathBuf,
    repo: &'a str,
    commit: &'a str,
}

/// What the hub says of a file.
pub(super) struct Found {
    pub(super) url: String,
    pub(super) etag: String,
    pub(super) bytes: u64,
    /// Where it is, or will be, in the cache.
    blob: PathBuf,
}

impl Found {
    /// Whether its version's name is its digest.
    fn is_digest(&self) -> bool {
        is_hex(&self.etag, DIGEST_DIGITS)
    }

    /// Whether all of it is in the cache.
    pub(super) fn is_here(&self) -> bool {
        fs::metadata(&self.blob).is_ok_and(|meta| meta.is_file() && meta.len() == self.bytes)
    }
}

impl<'a> Folder<'a> {
    pub(super) fn of(settings: &Settings, repo: &'a str, commit: &'a str) -> Folder<'a> {
        let path = settings.cache.join(format!("models--{}", repo.replace('/', "--")));
        Folder { path, repo, commit }
    }

    /// What the hub says of a file.
    pub(super) fn look(&self, client: &Client<'_>, name: &str) -> Result<Found, HubError> {
        if !is_inside(name) {
            return Err(HubError::Name(name.to_owned()));
        }
        let url = address(client.settings, self.repo, self.commit, name);
        let described = client.describe(&url, name).map_err(|e| at_repo(e, client.settings, self.repo))?;
        let answer = |why| HubError::Answer { what: name.to_owned(), why };
        let etag = described.etag.ok_or_else(|| answer("does not say which version it is"))?;
        let bytes = described.bytes.ok_or_else(|| answer("does not say how large it is"))?;
        if !is_hex(&etag, DIGEST_DIGITS) && !is_hex(&etag, COMMIT_DIGITS) {
            return Err(answer("names its version by no digest"));
        }
        let blob = self.path.join("blobs").join(&etag);
        Ok(Found { url, etag, bytes, blob })
    }

    /// One file: where it is, and what it is.
    fn bring(
        &self,
        client: &Client<'_>,
        name: String,
        progress: OnBytes<'_>,
    ) -> Result<(PathBuf, SourceFile), HubError> {
        let found = self.look(client, &name)?;
        let Found { url, etag, bytes, blob } = &found;
        let sha256 = match (found.is_here(), found.is_digest()) {
            (true, true) => etag.clone(),
            (true, false) => digest_of(blob)?,
            (false, is_digest) => {
                let file = Remote { url: url.clone(), what: &name, bytes: *bytes, etag: Some(etag) };
                download(client, &file, blob, is_digest.then_some(etag), progress)?
            }
        };
        let at = self.link(&name, etag)?;
        Ok((at, SourceFile { name, bytes: *bytes, sha256 }))
    }

    /// Gives a blob its name in the snapshot.
    pub(super) fn link(&self, name: &str, etag: &str) -> Result<PathBuf, HubError> {
        let at = self.path.join("snapshots").join(self.commit).join(name);
        let blob = self.path.join("blobs").join(etag);
        let io = |source| HubError::Io { path: at.clone(), source };
        if os::same_file(&at, &blob) {
            return Ok(at);
        }
        fs::create_dir_all(at.parent().unwrap_or(&at)).map_err(io)?;
        if fs::symlink_metadata(&at).is_ok() {
            fs::remove_file(&at).map_err(io)?;
        }
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + name.matches('/').count());
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &at).map_err(io)?;
        }
        // links take rights that few have there
        #[cfg(not(unix))]
        fs::hard_link(&blob, &at).map_err(io)?;
        Ok(at)
    }

    fn remember_main(&self) -> Result<(), HubError> {
        let path = self.path.join("refs").join("main");
        let io = |source| HubError::Io { path: path.clone(), source };
        fs::create_dir_all(path.parent().unwrap_or(&path)).map_err(io)?;
        let (temp, mut file) = TempFile::create(&path).map_err(io)?;
        file.write_all(self.commit.as_bytes()).map_err(io)?;
        temp.publish(&path).map_err(io)
    }
}

/// Brings one file to `blob`, going on where another run stopped. Gives its SHA-256.
fn download(
    client: &Client<'_>,
    remote: &Remote<'_>,
    blob: &Path,
    expected: Option<&String>,
    progress: OnBytes<'_>,
) -> Result<String, HubError> {
    let mut part = blob.as_os_str().to_owned();
    part.push(".dim-part");
    let part = PathBuf::from(part);
    let io = |source| HubError::Io { path: part.clone(), source };
    let folder = blob.parent().unwrap_or(blob);
    fs::create_dir_all(folder).map_err(io)?;
    let mut file = open_part(&part)?;
    let mut len = file.metadata().map_err(io)?.len();
    if len > remote.bytes {
        file.set_len(0).map_err(io)?;
        len = 0;
    }
    check_space(folder, remote.bytes - len)?;
    // what is there counts for the digest, and may be wrong: then it is found at the end, and thrown away
    let mut hash = Sha256::new();
    hash_into(&mut hash, &mut file).map_err(io)?;
    file.seek(SeekFrom::Start(len)).map_err(io)?;
    let mut done = len;
    client.range(remote, len, remote.bytes, &mut |bytes| {
        file.write_all(bytes).map_err(io)?;
        hash.update(bytes);
        done += bytes.len() as u64;
        progress(done, remote.bytes, remote.what);
        Ok(())
    })?;
    let found = Sha(hash.finalize().into()).to_string();
    if let Some(expected) = expected.filter(|expected| **expected != found) {
        fs::remove_file(&part).map_err(io)?;
        return Err(HubError::Hash { what: remote.what.to_owned(), expected: expected.clone(), found });
    }
    file.sync_all().map_err(io)?;
    fs::rename(&part, blob).and_then(|()| os::sync_folder(blob)).map_err(io)?;
    Ok(found)
}

/// Opens what has arrived of a file, for this process alone.
pub(super) fn open_part(path: &Path) -> Result<File, HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
    // asking takes the lock, where there are locks
    if cfg!(unix) && !os::is_unlocked(&file) {
        return Err(HubError::Locked(path.to_owned()));
    }
    Ok(file)
}

/// Whether this much fits.
pub(super) fn check_space(folder: &Path, need: u64) -> Result<(), HubError> {
    match os::free_bytes(folder) {
        Some(have) if have < need => Err(HubError::Space { need, have, folder: folder.to_owned() }),
        _ => Ok(()),
    }
}

fn digest_of(path: &Path) -> Result<String, HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let mut hash = Sha256::new();
    hash_into(&mut hash, &mut File::open(path).map_err(io)?).map_err(io)?;
    Ok(Sha(hash.finalize().into()).to_string())
}

fn hash_into(hash: &mut Sha256, file: &mut File) -> std::io::Result<()> {
    let mut buf = vec![0; 256 << 10];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut buf)? {
            0 => return Ok(()),
            n => hash.update(&buf[..n]),
        }
    }
}

/// A repository of 100,000 files lists them in less.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// Digits of a commit, and of the version of a small file.
pub(super) const COMMIT_DIGITS: usize = 40;
/// Digits of a SHA-256.
const DIGEST_DIGITS: usize = 64;
