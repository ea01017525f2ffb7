//! The whole model by llama.cpp itself, with the sessions of a host: the other arm of every comparison.

use std::path::Path;
use std::sync::Arc;

use llama_sys_patch::{ContextParams, FlashAttn, Model, Stock};

use crate::error::Error;
use crate::event::{Event, Events};
use crate::host::engine::{StockEngine, StockModel};
use crate::host::prompt::Vocabulary;
use crate::host::session::Session;
use crate::resources::Resources;
use crate::stage::load::{load_model, model_name};

/// A whole model in one `llama_context`.
pub struct WholeModel {
    engine: StockModel,
    vocabulary: Arc<Vocabulary>,
    n_ctx: u32,
    model_name: Arc<str>,
}

impl WholeModel {
    /// Loads the model at `path`, mapped or read. It is checked before: llama.cpp aborts on some files that this refuses.
    ///
    /// # Errors
    /// The file cannot be used, or there is no room for it.
    pub fn open(
        path: &Path,
        resources: &Resources,
        mmap: bool,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<WholeModel, Error> {
        let events = Events::new(on_event);
        resources.check()?;
        let model = events.came_to(load_model(path, resources, mmap, &events))?;
        events.came_to(WholeModel::of(model, model_name(path), resources, &events))
    }

    /// The same of a model that was loaded otherwise.
    ///
    /// # Errors
    /// A number is out of range, or there is no room for its cache.
    pub fn of_model(
        model: Model,
        model_name: String,
        resources: &Resources,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<WholeModel, Error> {
        let events = Events::new(on_event);
        events.came_to(WholeModel::of(model, model_name, resources, &events))
    }

    fn of(
        model: Model,
        model_name: String,
        resources: &Resources,
        events: &Events,
    ) -> Result<WholeModel, Error> {
        resources.check()?;
        let n_ctx = resources.n_ctx_for(model.n_ctx_train(), events);
        let params = ContextParams {
            n_ctx,
            n_batch: 2048.max(resources.n_ubatch),
            n_ubatch: resources.n_ubatch,
            n_threads: resources.threads(),
            max_sessions: 1,
            flash_attn: FlashAttn::Auto,
            ..ContextParams::default()
        };
        let context = Stock::new(&model, &params, None)?;
        let n_ubatch = context.info().n_ubatch;
        let engine = StockEngine::new(context, model.n_vocab(), model.n_blocks(), n_ubatch);
        let vocabulary = Arc::new(Vocabulary::new(model));
        Ok(WholeModel { engine: StockModel::new(engine), vocabulary, n_ctx, model_name: model_name.into() })
    }

    /// A conversation that begins now; there is one at a time, until it is dropped.
    ///
    /// # Errors
    /// [`Error::NoSession`]: there is one. Or llama.cpp cannot forget the one before.
    pub fn session(&self) -> Result<Session, Error> {
        Ok(Session::new(self.engine.session()?, &self.vocabulary, self.n_ctx, &self.model_name))
    }

    /// The model itself.
    pub fn model(&self) -> &Model {
        &self.vocabulary.model
    }
}
