//! Digests: of tensors, of a model, of a slice. All SHA-256, all computable in one pass over the data.
//!
//! - A tensor's digest is over its data.
//! - A model's identity is over one record per tensor, in file order: length of the name (u64), the name, type
//!   (u32), number of dimensions (u32), dimensions (u64 each), the tensor's digest (32 bytes); numbers little
//!   endian. It says which weights these are, wherever they stand.
//! - A slice's digest is over the bytes of its file before the tensor data, with the digits of that digest
//!   itself taken as `0`. Among those bytes are the digests of all its tensors, so that every byte of metadata
//!   and data is covered.
//! - A model's parameters digest is over what changes its computation and is no weight: the text `dim params v1`,
//!   then one record per key, `general.architecture` and every key below the architecture's name, in the order of
//!   their bytes: length of the key (u64), the key, type (u32) and value as GGUF writes them. It is taken from the
//!   whole model before it is cut, so every slice of a cut carries the same one.

use sha2::{Digest as _, Sha256};

pub use dim_core::digest::Sha;

use crate::gguf::{Error, Gguf, Tensor, TensorType};

/// A model's identity, from its tensors in file order.
#[derive(Default)]
pub struct Identity(Sha256);

impl Identity {
    /// Adds the next tensor.
    pub fn add(&mut self, name: &str, ty: TensorType, dims: &[u64], data: Sha) {
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update(ty.id().to_le_bytes());
        self.0.update((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| self.0.update(d.to_le_bytes()));
        self.0.update(data.0);
    }

    /// The identity of all that was added.
    pub fn finish(self) -> Sha {
        Sha(self.0.finalize().into())
    }
}

/// Reads a tensor and digests it, a piece at a time. `each` hears how many bytes a piece had.
///
/// # Errors
/// Reading fails.
pub fn of_tensor(tensor: &Tensor<'_>, buf: &mut [u8], mut each: impl FnMut(u64)) -> Result<Sha, Error> {
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < tensor.n_bytes() {
        let n = (tensor.n_bytes() - at).min(buf.len() as u64) as usize;
        tensor.read_at(at, &mut buf[..n])?;
        hash.update(&buf[..n]);
        at += n as u64;
        each(n as u64);
    }
    Ok(Sha(hash.finalize().into()))
}

/// The identity of a whole model: reads all of it. `each` hears how many bytes were read.
///
/// # Errors
/// Reading fails.
pub fn of_model(gguf: &Gguf, mut each: impl FnMut(u64)) -> Result<Sha, Error> {
    let mut identity = Identity::default();
    let mut buf = vec![0; BUFFER_BYTES];
    for tensor in gguf.tensors() {
        let data = of_tensor(&tensor, &mut buf, &mut each)?;
        identity.add(tensor.name(), tensor.tensor_type(), tensor.dims(), data);
    }
    Ok(identity.finish())
}

/// The parameters digest of a whole model of this architecture.
///
/// What stands under `general.` (names, licences) and `tokenizer.` (which stays with the host) is not in it.
pub fn of_params(gguf: &Gguf, arch: &str) -> Sha {
    let below_arch = |key: &str| key.strip_prefix(arch).is_some_and(|rest| rest.starts_with('.'));
    let mut entries: Vec<_> =
        gguf.metadata().filter(|e| e.key == "general.architecture" || below_arch(e.key)).collect();
    entries.sort_by(|a, b| a.key.as_bytes().cmp(b.key.as_bytes()));
    let mut hash = Sha256::new();
    hash.update(PARAMS_DOMAIN);
    let mut value = Vec::new();
    for entry in entries {
        hash.update((entry.key.len() as u64).to_le_bytes());
        hash.update(entry.key);
        hash.update(entry.value.value_type().id().to_le_bytes());
        value.clear();
        entry.value.encode(&mut value);
        hash.update(&value);
    }
    Sha(hash.finalize().into())
}

/// Bytes read and digested at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// What a parameters digest begins with.
const PARAMS_DOMAIN: &[u8] = b"dim params v1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_back_and_nothing_else_is() {
        let sha = Sha::of(b"abc");
        assert_eq!(sha.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(Sha::parse(&sha.to_string()), Some(sha));
        assert_eq!(Sha::parse(&sha.to_string().to_uppercase()), None);
        assert_eq!(Sha::parse(&sha.to_string()[1..]), None);
    }

    #[test]
    fn identity_depends_on_every_part_of_a_record() {
        let id = |name, ty, dims: &[u64], data: &[u8]| {
            let mut identity = Identity::default();
            identity.add(name, ty, dims, Sha::of(data));
            identity.finish()
        };
        let base = id("a", TensorType::F16, &[2, 3], b"x");
        assert_ne!(base, id("b", TensorType::F16, &[2, 3], b"x"));
        assert_ne!(base, id("a", TensorType::BF16, &[2, 3], b"x"));
        assert_ne!(base, id("a", TensorType::F16, &[3, 2], b"x"));
        assert_ne!(base, id("a", TensorType::F16, &[2, 3], b"y"));
    }
}
