//! Texts that options name by their files.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// The text in `file`, which may be a pipe, or why there is none. More than `most_mib` is read of nothing.
///
/// # Errors
/// It cannot be read, is longer, or is no UTF-8.
pub fn read(file: &Path, most_mib: u64) -> Result<String, String> {
    let mut bytes = Vec::new();
    let most = most_mib << 20;
    let read = File::open(file).and_then(|f| f.take(most + 1).read_to_end(&mut bytes));
    read.map_err(|e| e.to_string())?;
    if bytes.len() as u64 > most {
        return Err(format!("longer than {most_mib} MiB"));
    }
    String::from_utf8(bytes).map_err(|e| format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
}
