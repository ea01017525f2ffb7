//! Whole models in another type, by llama.cpp's own quantiser.

use std::ffi::{CStr, CString};
use std::path::Path;

use crate::error::check_status;
use crate::{Error, ffi};

/// What a model can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantised {
    /// 8.5 bits a weight.
    Q8_0,
    /// 4.8 bits a weight, some matrices with more: what most people run.
    Q4KM,
}

impl Quantised {
    fn name(self) -> &'static CStr {
        match self {
            Quantised::Q8_0 => c"q8_0",
            Quantised::Q4KM => c"q4_k_m",
        }
    }
}

/// Writes the model at `from` to `to`. On failure `to` may hold a part of it.
///
/// The file should have been through gguf-tools' reader before: llama.cpp aborts on some malformed ones.
///
/// # Errors
/// [`Error::LoadFailed`] with llama.cpp's own last error line; [`Error::InvalidArgument`] for paths with a NUL byte and
/// numbers of threads that llama.cpp does not take.
pub fn quantise_model(from: &Path, to: &Path, what: Quantised, n_threads: u32) -> Result<(), Error> {
    let (from, to) = (c_path(from)?, c_path(to)?);
    // SAFETY: three NUL-terminated strings, valid for the call.
    check_status(unsafe {
        ffi::dim_model_quantise(from.as_ptr(), to.as_ptr(), what.name().as_ptr(), n_threads)
    })
}

fn c_path(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::InvalidArgument(format!("{}: a path with a NUL byte", path.display())))
}
