//! What is done with any bytes at all: the body of the fuzz target `gguf-tools/fuzz`, also run as a unit test.

use crate::{
    gguf::{Gguf, check},
    plan::{BlockRange, Plan, Request},
    slice,
};

/// Reads these bytes as a file, and everything that follows from it. Returns whether they are one.
///
/// # Panics
/// If the reader accepts what it must not: this is what a fuzzer looks for.
pub fn exercise(bytes: &[u8]) -> bool {
    let Ok(gguf) = Gguf::from_bytes(bytes.to_vec()) else { return false };

    // in bounds, apart, and as large as the type says, in arithmetic that cannot overflow
    let mut ranges = Vec::new();
    for tensor in gguf.tensors() {
        let elements: u128 = tensor.dims().iter().map(|&d| u128::from(d)).product();
        let ty = tensor.tensor_type();
        let n_bytes = elements / u128::from(ty.block_len()) * u128::from(ty.block_bytes());
        assert_eq!(n_bytes, u128::from(tensor.n_bytes()));
        let start = u128::from(tensor.file_offset());
        ranges.push(start..start + n_bytes);
        assert_eq!(tensor.data().map(<[u8]>::len).ok(), usize::try_from(n_bytes).ok());
        assert!(gguf.tensor(tensor.name()).is_some_and(|t| t.file_offset() == tensor.file_offset()));
    }
    ranges.sort_unstable_by_key(|r| (r.start, r.end));
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    assert!(ranges.last().is_none_or(|r| r.end <= bytes.len() as u128));

    // every value decodes to its end, and back to the same bytes
    for entry in gguf.metadata() {
        assert_eq!(gguf.entry(entry.key).map(|e| e.offset), Some(entry.offset));
        let mut encoded = Vec::new();
        entry.value.encode(&mut encoded);
        let at = gguf.value_offset(entry.key).and_then(|at| usize::try_from(at).ok()).unwrap_or(usize::MAX);
        assert_eq!(bytes.get(at..).and_then(|rest| rest.get(..encoded.len())), Some(&encoded[..]));
        if let Some(array) = entry.value.as_array() {
            assert_eq!(array.iter().count() as u64, array.len());
        }
    }

    // what stands on the reader: the model's numbers, a slice's, the plan of a cut
    if let Ok(hparams) = check::model(&gguf) {
        assert!(hparams.n_blocks >= 1 && hparams.n_head.len() == hparams.n_blocks as usize);
        let _ = hparams.kv_bytes_per_position(0..hparams.n_blocks);
    }
    let _ = slice::verify_opened(&gguf, |_, _| {});
    let request = Request { middles: vec![BlockRange { first: 1, last: 1 }], ..Request::default() };
    if let Ok(plan) = Plan::new(&gguf, &request) {
        // every tensor that a slice does not hold is described in it
        for slice in &plan.slices {
            let names = slice.metadata.iter().find(|(key, _)| key == slice::keys::ABSENT_NAMES);
            let n_absent = names.and_then(|(_, names)| names.as_array()).map_or(0, |names| names.len());
            assert_eq!(slice.tensors.len() as u64 + n_absent, gguf.n_tensors() as u64);
        }
    }
    if let Ok(plan) = Plan::new(&gguf, &Request { renumber: true, ..request }) {
        // a middle has what its loader wants: an embedding of one row
        let (spec, _) =
            &plan.slices[1].tensors.iter().find(|(s, _)| s.name == "token_embd.weight").expect("one row");
        assert_eq!(spec.dims[1..], [1]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds themselves, cut short, and with each byte changed in three ways.
    #[test]
    fn seeds_and_their_neighbours_are_handled() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds");
        let mut seeds = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let seed = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(exercise(&seed), "a seed is a file");
            seeds += 1;
            let mut changed = seed.clone();
            for at in 0..seed.len() {
                exercise(&seed[..at]);
                for value in [seed[at] ^ 1, !seed[at], seed[at] ^ 0x80] {
                    changed[at] = value;
                    exercise(&changed);
                }
                changed[at] = seed[at];
            }
        }
        assert!(seeds >= 3);
    }
}
