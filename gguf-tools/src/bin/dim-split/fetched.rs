//! The model that is meant: a file, or one on the hub that is fetched first.

use std::path::{Path, PathBuf};

use gguf_tools::{failure::Failure, recipe::ModelSource};

use crate::parent;

/// A model that is here.
pub(crate) struct Model {
    /// Its file, or one of its files.
    pub(crate) path: PathBuf,
    /// Where its slices go if nobody says.
    pub(crate) out: PathBuf,
    /// Where it came from.
    pub(crate) source: Option<ModelSource>,
}

/// Finds it, wherever it is.
pub(crate) fn find(model: &Path) -> Result<Model, Failure> {
    match model.to_str() {
        Some(text) if text.starts_with("hf:") => fetch(text),
        _ => Ok(Model { path: model.to_owned(), out: parent(model), source: None }),
    }
}

#[cfg(feature = "hub")]
fn fetch(text: &str) -> Result<Model, Failure> {
    use crate::meter::{Meter, say};
    use gguf_tools::hub::{self, HubName, Settings};

    let place = HubName::parse(text)?;
    let settings = Settings::from_env()?;
    let mut meter = Meter::new();
    let fetched = hub::fetch(&settings, &place, &mut |done, total, file| meter.fetching(done, total, file));
    meter.clear();
    let fetched = fetched?;
    say(format_args!("{text} is {}", fetched.path.display()));
    // the cache is no place for slices
    Ok(Model { path: fetched.path, out: PathBuf::from("."), source: Some(fetched.source) })
}

#[cfg(not(feature = "hub"))]
fn fetch(text: &str) -> Result<Model, Failure> {
    let failure = Failure::misuse(format_args!("{text}: this dim-split is built without the hub"));
    Err(failure.hint("build it with --features hub"))
}
