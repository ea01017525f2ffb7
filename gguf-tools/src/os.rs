//! The few things that the standard library does not offer: file locks, free space, read-ahead advice.
//!
//! All of them are allowed to do nothing: they make the tools kinder or faster, never more correct.

use std::{fs::File, io, path::Path};

/// Takes the exclusive lock that marks a file as being written. It ends with the process, however that ends.
pub(crate) fn lock(file: &File) {
    #[cfg(unix)]
    {
        let _ = rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    }
    #[cfg(not(unix))]
    let _ = file;
}

/// The folder that a file stands in, or will: the one this process is in where its name is all there is.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two names lead to one file, which is there.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Whether no living process holds that lock.
pub(crate) fn is_unlocked(file: &File) -> bool {
    #[cfg(unix)]
    return rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
    #[cfg(not(unix))]
    {
        let _ = file;
        false
    }
}

/// Lets two names on one disk change places in one step.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "macos", target_os = "ios"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos", target_os = "ios")))]
    {
        let _ = (a, b);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Makes a rename in the folder of `path` survive a power cut.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        File::open(folder_of(path))?.sync_all()
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        Ok(())
    }
}

/// Bytes that may still be written to the file system of `folder`; None where that cannot be known.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        // available to this user, which is less than what is free
        (stat.f_bavail as u64).checked_mul(stat.f_frsize as u64)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Asks the system to forget what it has cached of a file, so that reading it again reads the disk.
pub(crate) fn forget_cached(path: &Path) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Ok(file) = File::open(path) {
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = path;
}

/// Fills `buf` from byte `at` of a file, without moving where it stands.
///
/// # Errors
/// Reading fails, or the file ends before.
pub(crate) fn read_exact_at(file: &File, buf: &mut [u8], at: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buf, at);
    #[cfg(not(unix))]
    {
        let _ = (file, buf, at);
        Err(io::ErrorKind::Unsupported.into()) // only copy_range() leads here
    }
}

/// Copies up to `n` bytes of `from`, from byte `at` on, to where `to` stands, without the detour through this
/// process. Returns how many; where the system cannot do that for these files, none.
///
/// # Errors
/// Reading or writing fails.
pub(crate) fn copy_range(from: &File, at: u64, to: &File, n: u64) -> io::Result<u64> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use rustix::io::Errno;
        let (mut at, mut done) = (at, 0);
        while done < n {
            let piece = usize::try_from(n - done).unwrap_or(1 << 30);
            match rustix::fs::copy_file_range(from, Some(&mut at), to, None, piece) {
                // the file ends: whoever reads the rest says so
                Ok(0) => break,
                Ok(copied) => done += copied as u64,
                Err(Errno::INTR) => {}
                // different file systems, or one that cannot
                Err(Errno::XDEV | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP | Errno::BADF) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = (from, at, to, n);
        Ok(0)
    }
}
