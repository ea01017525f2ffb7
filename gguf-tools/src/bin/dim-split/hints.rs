//! The ways out of the library's errors that are options here. What it says without one is said as it is.

use gguf_tools::{
    coreml,
    failure::{Explained, Failure},
    plan::PlanError,
    split::SplitError,
};

pub(crate) fn of_plan(error: PlanError) -> Failure {
    let option = match &error {
        PlanError::NoMiddle => Some(
            "--middle A..B names the blocks that leave this machine; --dry-run shows where the model can be cut",
        ),
        _ => None,
    };
    with(error, option)
}

pub(crate) fn of_split(error: SplitError) -> Failure {
    let option = match &error {
        SplitError::Space { .. } => Some("free some space, or name another folder with --out"),
        SplitError::OverModel(_) => Some("name another folder with --out"),
        _ => None,
    };
    with(error, option)
}

pub(crate) fn of_coreml(error: coreml::Error) -> Failure {
    let own = error.hint().unwrap_or_default();
    let option = match &error {
        coreml::Error::Architecture { .. }
        | coreml::Error::Key { .. }
        | coreml::Error::TensorUnknown { .. }
        | coreml::Error::HiddenTooLarge { .. } => Some(format!("{own} (without --coreml)")),
        coreml::Error::Ctx { .. } => Some(format!("{own} to --coreml-ctx")),
        coreml::Error::Prefill { .. } => Some(format!("{own}, to --coreml-prefill")),
        coreml::Error::MaxBytes { bytes, .. } => Some(format!("give at least {bytes} to --coreml-max-bytes")),
        coreml::Error::Space { .. } => Some(format!("{own} with --out")),
        #[cfg(feature = "engine")]
        coreml::Error::Engine(_) => Some("--coreml-no-selftest leaves them out".to_owned()),
        _ => None,
    };
    with(error, option.as_deref())
}

fn with(error: impl Explained, option: Option<&str>) -> Failure {
    let failure = Failure::from(error);
    match option {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
