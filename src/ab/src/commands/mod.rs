//! The subcommands of `dim-ab`.

#[cfg(unix)]
pub mod ab;
pub mod arms;
pub mod eval;
pub mod report;

use std::path::Path;

use dim::Verify;
use dim::stage::load::model_name;
use dim::stage::verified::{CutFrom, is_cut_from};
use dim_cli::explain;
use dim_cli::progress::ProgressLine;
use gguf_tools::failure::Failure;

/// Refuses a model that is not the one that was cut; shows how far it has been read.
fn same_model(model: &Path, cut: &CutFrom, when: Verify) -> Result<(), Failure> {
    let mut checking = ProgressLine::new(format!("checking {}", model_name(model)));
    is_cut_from(model, cut, when, |done, all| checking.update(done, all)).map_err(explain)
}
