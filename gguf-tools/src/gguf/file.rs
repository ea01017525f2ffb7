//! Reading a file at a place, and the one map of this crate.

use std::fs::File;

use memmap2::Mmap;

use super::error::Rule;

/// Reads exactly `buf.len()` bytes from `at` on; a file that ends before is an error, not a signal.
pub(super) fn read_file_at(file: &File, at: u64, buf: &mut [u8]) -> Result<(), Rule> {
    let mut done = 0;
    while done < buf.len() {
        let n = read_some_at(file, &mut buf[done..], at + done as u64);
        match n {
            Ok(0) => return Err(Rule::Truncated { short_by: (buf.len() - done) as u64 }),
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Rule::Io(e)),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_some_at(file: &File, buf: &mut [u8], at: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, at)
}

#[cfg(windows)]
fn read_some_at(file: &File, buf: &mut [u8], at: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, at)
}

/// Maps a whole file, read-only.
#[allow(unsafe_code)]
pub(super) fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process, and its bytes are only ever read as `u8`, for
    // which every value is valid. What remains is another process changing the file: altered bytes are wrong
    // data, found by their hash; a file made shorter is a signal on access, which is why what must survive that
    // (the writer of slices) reads through the file and why slices are written beside and renamed, never in place.
    unsafe { Mmap::map(file) }
}
