//! llama.cpp's own RPC backend: what people use today to spread a model over machines, and so what a comparison has to
//! run. It aborts the process on most faults; both ends belong into processes of their own.

use std::ffi::{CString, c_char};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::error::check_status;
use crate::{Error, Model, ffi};

/// Serves this machine's CPU at `address`, without a cache, to one client after the other. Returns only when it cannot.
///
/// # Errors
/// [`Error::ComputeFailed`] when the address cannot be had; [`Error::InvalidArgument`] for a number of threads that
/// llama.cpp does not take.
pub fn serve(address: SocketAddr, n_threads: u32) -> Result<(), Error> {
    let endpoint = endpoint(address)?;
    // SAFETY: a NUL-terminated string, valid for the call.
    check_status(unsafe { ffi::dim_rpc_serve(endpoint.as_ptr(), n_threads) })
}

/// Loads a model with its last `n_blocks` blocks, and their KV cache, on the server at `address`: their weights are sent
/// there. Embedding, output norm and lm_head stay here. More than one path: the parts of a split GGUF in order.
///
/// # Errors
/// [`Error::LoadFailed`] when the server is not there, or as [`Model::load`]. A server that goes away later aborts this
/// process.
pub fn load<P: AsRef<Path>>(
    paths: &[P],
    address: SocketAddr,
    n_blocks: u32,
    use_mmap: bool,
) -> Result<Model, Error> {
    // llama.cpp aborts on a server that is not there: it is dialled first
    TcpStream::connect_timeout(&address, Duration::from_secs(10))
        .map_err(|e| Error::LoadFailed(format!("no RPC server at {address}: {e}")))?;
    let endpoint = endpoint(address)?;
    let nul = |_| Error::InvalidArgument("a path with a NUL byte".to_owned());
    let names = paths.iter().map(|p| CString::new(p.as_ref().as_os_str().as_encoded_bytes()));
    let names = names.collect::<Result<Vec<_>, _>>().map_err(nul)?;
    let pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
    let mut model = std::ptr::null_mut();
    // SAFETY: `pointers` and `endpoint` are valid for the call, which copies what it keeps; `model` is written.
    let status = unsafe {
        ffi::dim_rpc_model_load(
            pointers.as_ptr(),
            pointers.len(),
            endpoint.as_ptr(),
            n_blocks,
            use_mmap,
            &raw mut model,
        )
    };
    check_status(status)?;
    // SAFETY: dim_rpc_model_load() gave us the model to own.
    unsafe { Model::of(model) }
}

fn endpoint(address: SocketAddr) -> Result<CString, Error> {
    match address {
        SocketAddr::V4(v4) => Ok(CString::new(v4.to_string()).expect("digits, dots and a colon")),
        SocketAddr::V6(v6) => {
            Err(Error::InvalidArgument(format!("{v6}: llama.cpp's RPC backend knows IPv4 only")))
        }
    }
}
