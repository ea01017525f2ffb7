//! The folder of kept prompts: which files there are, how one is written whole, and which go first.
//!
//! A file is `IDENTITY-NAME.prompt`, 16 hexadecimal digits each: whose it is ([`Host::saves_as`]), and a random one, so that
//! several servers can share a folder. It is written under another name, synced and renamed. Prompts are private: the folder
//! is made with mode 0700, files with 0600.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dim::host::saved::{SaveError, Saved};
use dim::{Host, Sha};

use super::Limited;

/// A folder that can be written to.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    disk_bytes: u64,
    /// what the names of its own files begin with
    own: String,
}

/// A file whose index was read.
pub(crate) struct Kept {
    pub path: PathBuf,
    pub saved: Saved,
}

/// A file of a prompt, whoever's.
struct Found {
    path: PathBuf,
    name: String,
    bytes: u64,
    used_at: SystemTime,
}

impl Folder {
    /// Makes it, if it is not there.
    pub(crate) fn create(path: &Path, disk_bytes: u64) -> io::Result<Folder> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(path)?;
        let folder = Folder { path: path.to_owned(), disk_bytes, own: String::new() };
        // whether it can be written to is known before a model is loaded
        let probe = folder.part()?;
        fs::remove_file(probe.0)?;
        Ok(folder)
    }

    /// The same, for hosts that save so.
    pub(crate) fn of(mut self, identity: Sha) -> Folder {
        self.own = identity.to_string()[..NAME_DIGITS].to_owned();
        self
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything of this host that is whole as far as its index says, what was used last behind the others; and a sentence
    /// of each file that is not.
    pub(crate) fn read(&self, host: &Host) -> (Vec<Kept>, Vec<String>) {
        self.remove_parts();
        let (mut kept, mut left_out) = (Vec::new(), Vec::new());
        let own = self.files().into_iter().rev().filter(|file| file.name.starts_with(&self.own));
        for file in own.take(MOST_FILES) {
            let read = File::open(&file.path).map_err(Into::into).and_then(|mut f| Saved::read(&mut f, host));
            match read {
                Ok(saved) => kept.push(Kept { path: file.path, saved }),
                Err(why) => left_out.push(format!("{}: {why}", file.path.display())),
            }
        }
        kept.reverse();
        (kept, left_out)
    }

    /// Writes a file, whole or not at all.
    pub(crate) fn write(
        &self,
        fill: impl FnOnce(&mut dyn Write) -> Result<Saved, SaveError>,
    ) -> Result<(PathBuf, Saved), SaveError> {
        let (part, file) = self.part()?;
        let written = (|| {
            let mut out = Limited { out: BufWriter::with_capacity(1 << 20, file), left: self.disk_bytes };
            let saved = fill(&mut out)?;
            out.flush()?;
            out.out.get_ref().sync_all()?;
            let path = part.with_extension("");
            fs::rename(&part, &path)?;
            // the name, too; where a folder cannot be synced, the system has its own ways
            let _ = File::open(&self.path).and_then(|folder| folder.sync_all());
            Ok((path, saved))
        })();
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written
    }

    /// Removes the files that were used longest ago until the others fit; which those were.
    pub(crate) fn make_room(&self) -> BTreeSet<PathBuf> {
        let files = self.files();
        let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
        let mut gone = BTreeSet::new();
        for file in files {
            if bytes <= self.disk_bytes {
                break;
            }
            if fs::remove_file(&file.path).is_ok() {
                bytes -= file.bytes;
                gone.insert(file.path);
            }
        }
        gone
    }

    /// A new file under a name for the time being, for this user alone.
    fn part(&self) -> io::Result<(PathBuf, File)> {
        let name = getrandom::u64().map_err(|_| io::Error::other("there is no randomness to be had"))?;
        let own = if self.own.is_empty() { "0000000000000000" } else { &self.own };
        let path = self.path.join(format!("{own}-{name:016x}{ENDING}{PART}"));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&path)?;
        Ok((path, file))
    }

    /// Files of prompts, what was used longest ago first.
    fn files(&self) -> Vec<Found> {
        let mut files: Vec<Found> = self.entries().filter_map(|entry| found(&entry, "")).collect();
        files.sort_by_key(|file| file.used_at);
        files
    }

    fn entries(&self) -> impl Iterator<Item = DirEntry> {
        fs::read_dir(&self.path).into_iter().flatten().filter_map(Result::ok)
    }

    /// What servers have left behind that died while they wrote.
    fn remove_parts(&self) {
        let is_old = |file: &Found| file.used_at.elapsed().is_ok_and(|age| age > Duration::from_secs(3600));
        for file in self.entries().filter_map(|entry| found(&entry, PART)).filter(is_old) {
            let _ = fs::remove_file(file.path);
        }
    }
}

/// A file that has the name of one of ours: no link, no pipe, no folder.
fn found(entry: &DirEntry, ending: &str) -> Option<Found> {
    let name = entry.file_name().into_string().ok()?;
    let stem = name.strip_suffix(ending)?.strip_suffix(ENDING)?;
    let is_digits = |part: &str| part.len() == NAME_DIGITS && part.bytes().all(|b| b.is_ascii_hexdigit());
    let (own, random) = stem.split_once('-')?;
    // of the entry itself, not of what a link leads to
    let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
    let used_at = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    (is_digits(own) && is_digits(random)).then(|| Found {
        path: entry.path(),
        name,
        bytes: metadata.len(),
        used_at,
    })
}

const NAME_DIGITS: usize = 16;
const ENDING: &str = ".prompt";
const PART: &str = ".part";
/// Files whose index is read, of those that were used last.
const MOST_FILES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(folder: &Folder, bytes: usize) -> Result<PathBuf, SaveError> {
        let mut written = Err(SaveError::Nothing);
        let result = folder.write(|out| {
            written = out.write_all(&vec![7; bytes]).map_err(SaveError::from);
            Err(SaveError::Nothing)
        });
        assert!(result.is_err());
        written.map(|()| folder.path.clone())
    }

    /// A file as a server has written it, used so many seconds ago.
    fn put(folder: &Folder, name: &str, bytes: usize, age_s: u64) -> PathBuf {
        let path = folder.path.join(name);
        fs::write(&path, vec![1; bytes]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age_s)).unwrap();
        path
    }

    #[test]
    fn what_was_not_written_whole_is_not_there() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::create(&place.path().join("a/b"), 100).unwrap();
        fill(&folder, 100).unwrap();
        assert!(fill(&folder, 101).is_err(), "more than all that may be kept");
        assert_eq!(folder.entries().count(), 0);
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Folder::create(&file, 100).is_err());
        assert!(Folder::create(&file.join("in"), 100).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn only_its_user_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::create(&place.path().join("kept"), 100).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder.path), 0o700);
        assert_eq!(mode(&folder.part().unwrap().0), 0o600);
    }

    #[test]
    fn the_oldest_go_first_and_nobody_else_s_files() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::create(place.path(), 100).unwrap().of(Sha([0xab; 32]));
        let name = |own: &str, n: u64| format!("{own}-{n:016x}.prompt");
        let (ours, theirs) = ("ab".repeat(8), "cd".repeat(8));
        let old = put(&folder, &name(&theirs, 1), 40, 500);
        let newer = put(&folder, &name(&ours, 2), 40, 400);
        let newest = put(&folder, &name(&ours, 3), 40, 10);
        let others = ["notes.txt", "x.prompt", &name(&ours[1..], 4), &format!("{}.part", name(&ours, 5))];
        let others = others.map(|name| put(&folder, name, 400, 3000));
        assert_eq!(folder.make_room(), BTreeSet::from([old.clone()]));
        assert!(!old.exists() && newer.exists() && newest.exists());
        assert!(others.iter().all(|path| path.exists()));
        assert_eq!(folder.make_room(), BTreeSet::new());
        // what somebody else is writing stays; what is an hour old was left behind
        let dead = put(&folder, &format!("{}.part", name(&ours, 6)), 4, 4000);
        folder.remove_parts();
        assert!(!dead.exists() && others[3].exists());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::create(&place.path().join("kept"), 10).unwrap();
        let secret = place.path().join("secret");
        fs::write(&secret, [1; 400]).unwrap();
        let link = folder.path.join(format!("{}-{}.prompt", "a".repeat(16), "b".repeat(16)));
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        assert!(folder.files().is_empty() && folder.make_room().is_empty());
        assert!(secret.exists());
    }
}
