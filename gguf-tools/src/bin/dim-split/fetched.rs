//! The model that is meant: a file, or one on the hub that is fetched first.

use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
use gguf_tools::hub;
use gguf_tools::{failure::Failure, recipe::ModelSource, split};

/// A model that is here.
pub(crate) struct Model {
    /// Its file, or one of its files.
    pub(crate) path: PathBuf,
    /// Where its slices go if nobody says.
    pub(crate) out: PathBuf,
    /// Where it came from.
    pub(crate) source: Option<ModelSource>,
    /// Its headers, where no more than those was fetched: they go away with this.
    #[cfg(feature = "hub")]
    _headers: Option<hub::Headers>,
}

/// Finds it, wherever it is. `headers`: what it is like is all that is asked.
pub(crate) fn find(model: &Path, headers: bool) -> Result<Model, Failure> {
    match model.to_str() {
        Some(text) if text.starts_with(PREFIX) => fetch(text, headers),
        _ => Ok(Model {
            path: model.to_owned(),
            out: split::folder_of(model).to_owned(),
            source: None,
            #[cfg(feature = "hub")]
            _headers: None,
        }),
    }
}

#[cfg(feature = "hub")]
fn fetch(text: &str, headers: bool) -> Result<Model, Failure> {
    use crate::meter::Meter;
    use gguf_tools::{
        hub::Settings,
        tell,
        text::{Safe, gib},
    };

    let place = hub::HubName::parse(text)?;
    let settings = Settings::from_env()?;
    let mut meter = Meter::new();
    let mut show = |done, total, file: &str| meter.fetching(done, total, file);
    // the cache is no place for slices
    let out = PathBuf::from(".");
    if headers {
        let found = hub::fetch_headers(&settings, &place, &mut show);
        meter.clear();
        let found = found?;
        if found.fetched_bytes > 0 {
            let (some, all) = (gib(found.fetched_bytes), gib(found.model_bytes));
            tell!("{}: its header was fetched, {some} of {all}", Safe(text));
        }
        return Ok(Model { path: found.path.clone(), out, source: None, _headers: Some(found) });
    }
    let fetched = hub::fetch(&settings, &place, &mut show);
    meter.clear();
    let fetched = fetched?;
    tell!("{} is {}", Safe(text), Safe(&fetched.path.display().to_string()));
    Ok(Model { path: fetched.path, out, source: Some(fetched.source), _headers: None })
}

#[cfg(not(feature = "hub"))]
fn fetch(text: &str, _headers: bool) -> Result<Model, Failure> {
    let failure = Failure::misuse(format_args!("{text}: this dim-split is built without the hub"));
    Err(failure.hint("build it with --features hub"))
}

/// What a model on the hub begins with.
const PREFIX: &str = "hf:";
