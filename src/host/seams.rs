//! Whether what one stage gives is what the next one takes: rows of the same parts, which mean the same tensors.
//!
//! A worker and its host have compared what each of them knows; the slices that run here say what they give and take only
//! when they are loaded.

use dim_core::digest::Sha;
use dim_core::rows::Layout;
use dim_wire::terms::same_if_known;
use dim_wire::transport::Link;

use crate::error::{Error, OtherRows};
use crate::stage::local::LlamaStage;

/// What a stage takes and gives.
pub(crate) struct Sides {
    name: String,
    input: (Layout, Option<Sha>),
    output: (Layout, Option<Sha>),
}

impl Sides {
    /// Of a stage of this process.
    pub(crate) fn of_stage(name: impl Into<String>, stage: &LlamaStage) -> Sides {
        let ((input, output), digests) = (stage.layouts(), stage.layout_digests());
        Sides { name: name.into(), input: (input, digests.0), output: (output, digests.1) }
    }

    /// What it gives.
    pub(crate) fn output(&self) -> &Layout {
        &self.output.0
    }

    /// Of a worker, as it was agreed on.
    pub(crate) fn of_worker(link: &Link) -> Sides {
        let (shape, terms) = (&link.agreed().shape, link.peer_terms());
        Sides {
            name: link.peer().to_owned(),
            input: (shape.input.clone(), terms.input),
            output: (shape.output.clone(), terms.output),
        }
    }
}

/// Checks stages that follow each other.
///
/// # Errors
/// [`Error::OtherRows`], of the first two that do not fit.
pub(crate) fn check(stages: &[Sides]) -> Result<(), Error> {
    for (gives, takes) in stages.iter().zip(stages.iter().skip(1)) {
        let (given, taken) = (&gives.output, &takes.input);
        if given.0 != taken.0 || !same_if_known(given.1, taken.1) {
            return Err(Error::OtherRows(Box::new(OtherRows {
                gives: gives.name.clone(),
                given: given.0.to_string(),
                takes: takes.name.clone(),
                taken: taken.0.to_string(),
            })));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(input: (u32, Option<u8>), output: (u32, Option<u8>)) -> Sides {
        let side = |(n, digest): (u32, Option<u8>)| (Layout::hidden(n), digest.map(|d| Sha([d; 32])));
        Sides { name: n_name(input.0, output.0), input: side(input), output: side(output) }
    }

    fn n_name(input: u32, output: u32) -> String {
        format!("{input} to {output}")
    }

    #[test]
    fn neighbours_have_to_mean_the_same_rows() {
        let head = || sides((1, None), (4, Some(7)));
        check(&[head(), sides((4, Some(7)), (8, None)), sides((8, Some(9)), (1, None))]).unwrap();
        let error = check(&[head(), sides((8, Some(7)), (8, None))]).unwrap_err();
        assert_eq!(error.to_string(), "1 to 4 gives rows of 4 F32, 8 to 8 takes rows of 8 F32");
        let error = check(&[head(), sides((4, Some(8)), (4, None))]).unwrap_err();
        assert_eq!(error.to_string(), "1 to 4 and 4 to 4 mean other tensors by the same rows (4 F32)");
        assert!(error.hint().is_some_and(|hint| hint.contains("one dim-split run")));
    }
}
