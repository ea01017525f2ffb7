//! Slices read again, against the model read again.

use std::path::Path;

use super::{CutProgress, DIGEST_BYTES, SplitError};
use crate::{
    digest::{self, Identity, Sha},
    gguf::{self, Value},
    manifest::{Manifest, SliceEntry},
    os,
    plan::{Plan, SlicePlan, Source},
    slice::{self, SliceInfo, keys},
};

/// Re-reads the slices and the model from the disk, and compares everything: every digest, every key, every
/// tensor.
///
/// # Errors
/// The first difference, by the name of its key or tensor.
pub fn verify(
    plan: &Plan<'_>,
    out: &Path,
    manifest: &Manifest,
    mut progress: impl FnMut(CutProgress<'_>),
) -> Result<(), SplitError> {
    let total = plan.slices.iter().map(|s| s.weight_bytes).sum::<u64>() + plan.gguf.tensor_bytes();
    let mut before = 0;
    let mut buf = vec![0; DIGEST_BYTES];

    // the model once more, so that a bad read of the first pass does not become the truth
    let model_file = plan.gguf.path().display().to_string();
    plan.gguf.files().for_each(os::forget_cached);
    let mut of_model = Vec::with_capacity(plan.gguf.n_tensors());
    let mut identity = Identity::default();
    for tensor in plan.gguf.tensors() {
        let sha = digest::of_tensor(&tensor, &mut buf, |n| {
            before += n;
            progress(CutProgress::Verifying(before, total, &model_file));
        })?;
        identity.add(tensor.name(), tensor.tensor_type(), tensor.dims(), sha);
        of_model.push(sha);
    }
    if identity.finish().to_string() != manifest.model.sha256 {
        let what = "its identity, read again,".to_owned();
        return Err(SplitError::Differs { file: model_file, what });
    }

    for (slice, entry) in plan.slices.iter().zip(&manifest.slices) {
        let path = out.join(&slice.file);
        os::forget_cached(&path);
        let gguf = gguf::Gguf::open(&path)?;
        let info = slice::verify_opened(&gguf, |done, _| {
            progress(CutProgress::Verifying(before + done, total, &slice.file));
        })?;
        before += slice.weight_bytes;
        compare(slice, &gguf, &info, entry, manifest, &of_model, plan)?;
    }
    Ok(())
}

/// A slice that agrees with itself, against the plan and the model.
fn compare(
    slice: &SlicePlan<'_>,
    gguf: &gguf::Gguf,
    info: &SliceInfo,
    entry: &SliceEntry,
    manifest: &Manifest,
    of_model: &[Sha],
    plan: &Plan<'_>,
) -> Result<(), SplitError> {
    let differs = |what: &str| Err(SplitError::Differs { file: slice.file.clone(), what: what.to_owned() });
    if info.model_sha256.to_string() != manifest.model.sha256 || info.slice_sha256.to_string() != entry.sha256
    {
        return differs("its identity");
    }
    if gguf.metadata().len() != slice.metadata.len() || gguf.n_tensors() != slice.tensors.len() {
        return differs("the number of keys or tensors");
    }
    let patched = [keys::MODEL_SHA256, keys::SLICE_SHA256, keys::TENSOR_SHA256];
    for (found, (key, value)) in gguf.metadata().zip(&slice.metadata) {
        if found.key != key || !patched.contains(&found.key) && !same_value(&found.value, value) {
            return differs(found.key);
        }
    }
    let digests = slice::tensor_digests(gguf);
    for (i, (found, (spec, source))) in gguf.tensors().zip(&slice.tensors).enumerate() {
        let described =
            found.name() == spec.name && found.tensor_type() == spec.tensor_type && found.dims() == spec.dims;
        let carried = match source {
            // equal digests of what was just read from both
            Source::Whole(tensor) => digests.get(i) == Some(&Some(of_model[plan.gguf.index_of(tensor)])),
            Source::Start(tensor) => {
                let (mut a, mut b) = (vec![0; found.n_bytes() as usize], vec![0; found.n_bytes() as usize]);
                found.read_at(0, &mut a)?;
                tensor.read_at(0, &mut b)?;
                a == b
            }
            // has no counterpart; its own digest was compared
            Source::Requantised(_) | Source::Placeholder => true,
        };
        if !described || !carried {
            return differs(&spec.name);
        }
    }
    Ok(())
}

/// Equal to the bit: a NaN equals itself.
fn same_value(a: &Value<'_>, b: &Value<'_>) -> bool {
    let bytes = |v: &Value<'_>| {
        let mut out = Vec::new();
        v.encode(&mut out);
        out
    };
    a == b || a.value_type() == b.value_type() && bytes(a) == bytes(b)
}
