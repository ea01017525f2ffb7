//! Tiny random models of any architecture that llama.cpp has, for this crate's tests. Not a part of its interface.

use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};

use crate::error::check_status;
use crate::model::c_paths;
use crate::{Error, ffi};

/// Every architecture that llama.cpp has a name for.
pub fn architectures() -> Vec<String> {
    // SAFETY: no pointers.
    let count = unsafe { ffi::dim_test_architectures() };
    (0..count)
        .map(|index| {
            // SAFETY: a NUL-terminated text that lives as long as the process.
            let name = unsafe { CStr::from_ptr(ffi::dim_test_architecture(index)) };
            name.to_string_lossy().into_owned()
        })
        .collect()
}

/// Writes a tiny random model. `options`: see `dim_test_write_model` in `cpp/layer_eval.h`.
///
/// # Errors
/// llama.cpp makes no model of such keys. Some it aborts on.
pub fn write_model(arch: &str, n_blocks: u32, options: &[&str], path: &Path) -> Result<(), Error> {
    let nul = |_| Error::InvalidArgument("a NUL byte in an option".into());
    let c_arch = CString::new(arch).map_err(nul)?;
    let c_options = options.iter().map(|&o| CString::new(o)).collect::<Result<Vec<_>, _>>().map_err(nul)?;
    let pointers: Vec<*const c_char> = c_options.iter().map(|o| o.as_ptr()).collect();
    let c_path = c_paths(&[path])?;
    // SAFETY: all texts are NUL-terminated and valid for the call.
    check_status(unsafe {
        ffi::dim_test_write_model(
            c_arch.as_ptr(),
            n_blocks,
            pointers.as_ptr(),
            pointers.len(),
            c_path[0].as_ptr(),
        )
    })
}

/// Blocks of a tiny model; gemma3n has more.
pub const N_BLOCKS: u32 = 8;

/// What an architecture wants beyond the tiny models' usual keys (cpp/tiny_keys.cpp).
pub fn options(arch: &str) -> Vec<&'static str> {
    let Ok(arch) = CString::new(arch) else { return Vec::new() };
    let option = |index| {
        // SAFETY: `arch` is NUL-terminated and valid for the call; so is what is given, as long as the process lives.
        let option = unsafe { CStr::from_ptr(ffi::dim_test_option(arch.as_ptr(), index)) };
        option.to_str().ok().filter(|option| !option.is_empty())
    };
    (0..).map_while(option).collect()
}

/// Writes a tiny model of an architecture, with what it wants and `more` (`options` of [`write_model`]), into a folder.
///
/// # Errors
/// As [`write_model`].
pub fn write(arch: &str, more: &[&str], folder: &Path) -> Result<PathBuf, Error> {
    let path = folder.join("model.gguf");
    let options = [&options(arch)[..], more].concat();
    write_model(arch, N_BLOCKS, &options, &path)?;
    Ok(path)
}
