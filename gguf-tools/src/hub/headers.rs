//! The headers of a model and nothing of its weights, for who asks how it could be cut: files of the model's size in a folder
//! of their own, of which only the first bytes were fetched. The rest of them is holes, which take no room on the disk.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process,
};

use super::{
    HubError, HubName, OnBytes, Settings,
    download::{Folder, Found, models_of},
    http::{Client, Remote},
};
use crate::gguf;

/// A model of which the headers are here.
#[derive(Debug)]
pub struct Headers {
    /// Its file, or the first of its files.
    pub path: PathBuf,
    /// Bytes that were fetched: none where the whole model was in the cache.
    pub fetched_bytes: u64,
    /// Bytes of all its files.
    pub model_bytes: u64,
    /// Goes away with this.
    _folder: Option<Temporary>,
}

/// Brings a model's headers. Where all of it is in the cache, nothing but its description is asked for.
///
/// # Errors
/// It is not there, or cannot be had.
pub fn fetch_headers(
    settings: &Settings,
    place: &HubName,
    progress: OnBytes<'_>,
) -> Result<Headers, HubError> {
    let client = Client::new(settings)?;
    let (commit, chosen) = models_of(&client, place)?;
    let cache = Folder::of(settings, &place.repo, &commit);
    let found = chosen.iter().map(|name| cache.look(&client, name)).collect::<Result<Vec<_>, _>>()?;
    let model_bytes = found.iter().map(|file| file.bytes).sum();
    if found.iter().all(Found::is_here) {
        let paths = chosen.iter().zip(&found).map(|(name, file)| cache.link(name, &file.etag));
        let paths = paths.collect::<Result<Vec<_>, _>>()?;
        // a choice is never empty
        let path = paths.into_iter().next().unwrap_or_default();
        return Ok(Headers { path, fetched_bytes: 0, model_bytes, _folder: None });
    }
    let folder = Temporary::new()?;
    let (mut first, mut fetched_bytes) = (None, 0);
    for (name, file) in chosen.iter().zip(&found) {
        let at = folder.0.join(name.rsplit('/').next().unwrap_or(name));
        let remote = Remote { url: file.url.clone(), what: name, bytes: file.bytes, etag: Some(&file.etag) };
        fetched_bytes += header(&client, &remote, &at, progress)?;
        first.get_or_insert(at);
    }
    let path = first.unwrap_or_default();
    Ok(Headers { path, fetched_bytes, model_bytes, _folder: Some(folder) })
}

/// One file: its header, then holes up to its size. Gives how much was fetched.
fn header(
    client: &Client<'_>,
    remote: &Remote<'_>,
    at: &Path,
    progress: OnBytes<'_>,
) -> Result<u64, HubError> {
    let io = |source| HubError::Io { path: at.to_owned(), source };
    let mut bytes = Vec::new();
    let mut wanted = FIRST_BYTES;
    loop {
        let from = bytes.len() as u64;
        client.range(remote, from, wanted.min(remote.bytes), &mut |more| {
            bytes.extend_from_slice(more);
            progress(bytes.len() as u64, remote.bytes, remote.what);
            Ok(())
        })?;
        let is_all = bytes.len() as u64 >= remote.bytes.min(MOST_BYTES);
        // what is wrong with it, who opens it says
        if is_all || !gguf::goes_on(&bytes, remote.bytes) {
            break;
        }
        wanted = wanted.saturating_mul(4);
    }
    let mut file = File::create_new(at).map_err(io)?;
    file.write_all(&bytes).and_then(|()| file.set_len(remote.bytes)).map_err(io)?;
    Ok(bytes.len() as u64)
}

/// A folder that goes away again.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Result<Temporary, HubError> {
        let mut failed = None;
        // a name that is taken is somebody else's
        for number in 0..64 {
            let path = std::env::temp_dir().join(format!("dim-headers-{}-{number}", process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Temporary(path)),
                Err(source) => failed = Some(HubError::Io { path, source }),
            }
        }
        Err(failed.unwrap_or(HubError::NoCache))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What is asked for at first; a tokenizer's texts are some megabytes.
const FIRST_BYTES: u64 = 1 << 20;
/// Larger than any header that is one.
const MOST_BYTES: u64 = 1 << 30;
