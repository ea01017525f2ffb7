//! The host: drives the pipeline from tokens to tokens.
//!
//! ```text
//! prompt -> tokens -> [schedule] -> head stage -> hidden -> remote stage(s) -> hidden -> tail stage -> logits
//!                                                                                            -> sampler -> token
//! ```
//!
//! [`Host::open`] reads what dim-split wrote, a [`HostBuilder`] takes the options, and a [`Session`] is a conversation.
//! [`WholeModel`] is the same without a split, by stock llama.cpp: what a split is compared with.

pub mod address;
mod asking;
mod assign;
mod builder;
mod connect;
pub mod constraint;
pub mod discovery;
mod engine;
pub mod packages;
mod prompt;
pub mod report;
pub mod sampler;
pub mod saved;
mod seams;
mod session;
mod split;
pub mod template;
pub mod text;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dim_core::digest::Sha;
use llama_sys_patch::Model;

pub use builder::HostBuilder;
pub use prompt::Prompted;
pub use session::{Generation, Session, Token};
pub use whole::WholeModel;

use crate::error::Error;
use constraint::Constraint;
use engine::SplitEngine;
use prompt::Vocabulary;
use template::dialogue::Dialogue;
use template::{ChatTemplate, TemplateError, Turn};

/// A split model, ready: every block in one stage, here or on a worker. Threads may share it.
pub struct Host {
    engine: SplitEngine,
    vocabulary: Arc<Vocabulary>,
    n_ctx: u32,
    model_name: Arc<str>,
    /// whose sessions are that are saved, where they can be
    saving: Option<Arc<saved::Belongs>>,
}

impl Host {
    /// A host for what dim-split wrote, named by its manifest `STEM.split.json`.
    ///
    /// # Errors
    /// The manifest cannot be read, or the slices that it names are not there.
    pub fn open(split: impl AsRef<Path>) -> Result<HostBuilder, Error> {
        HostBuilder::of_manifest(split.as_ref())
    }

    /// A host for slices that are named one by one; what a worker has to answer to a known input is not known then.
    ///
    /// # Errors
    /// A middle cannot be read, or is none.
    pub fn of_slices(
        head: impl AsRef<Path>,
        middles: &[PathBuf],
        tail: impl AsRef<Path>,
    ) -> Result<HostBuilder, Error> {
        HostBuilder::of_slices(head.as_ref(), middles, tail.as_ref())
    }

    /// A conversation that begins now. There can be [so many](HostBuilder::sessions) at once, each in a thread of its own;
    /// one ends when it is dropped.
    ///
    /// # Errors
    /// [`Error::NoSession`]: all of them are in use.
    pub fn session(&self) -> Result<Session, Error> {
        let engine = self.engine.session()?;
        let session = Session::new(engine, &self.vocabulary, self.n_ctx, &self.model_name);
        Ok(session.saving(self.saving.clone()))
    }

    /// What is the same for all hosts that can [restore](Session::restore) what a session of this one [saves](Session::save):
    /// those of the same model and cut, the same wire, context and chunks, and the same llama.cpp. `None`: sessions of this
    /// model cannot be saved, because its memory is more than keys and values.
    pub fn saves_as(&self) -> Option<Sha> {
        self.saving.as_ref().map(|saving| saving.identity)
    }

    pub(crate) fn saving(&self) -> Option<&Arc<saved::Belongs>> {
        self.saving.as_ref()
    }

    /// How many conversations there can be at once.
    pub fn max_sessions(&self) -> u32 {
        self.engine.sessions()
    }

    /// The model's name.
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Positions of a conversation.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// The vocabulary and everything else that llama.cpp knows of the model without its middle.
    pub fn vocabulary(&self) -> &Model {
        &self.vocabulary.model
    }

    /// A text as tokens, as [`Session::tokenize`] reads it.
    ///
    /// # Errors
    /// [`Error::Text`]: the model has no vocabulary, or the text is too long.
    pub fn tokenize(&self, text: &str, begins: bool) -> Result<Vec<i32>, Error> {
        self.vocabulary.text(text, begins)
    }

    /// A conversation as tokens, as [`Session::tokenize_chat`] renders it: for whoever has to know them before a session
    /// is free.
    ///
    /// # Errors
    /// The template fails, or as [`tokenize`](Self::tokenize).
    pub fn tokenize_chat(&self, template: &ChatTemplate, turns: &[Turn]) -> Result<Vec<i32>, Error> {
        self.vocabulary.chat(template, turns)
    }

    /// A JSON schema that a reply is to be valid by, as [`Session::json_schema`] makes it: for whoever has to know whether it
    /// can be enforced before a session is free.
    ///
    /// # Errors
    /// As of [`Session::json_schema`].
    pub fn json_schema(&self, schema: &str) -> Result<Constraint, Error> {
        self.vocabulary.json_schema(schema)
    }

    /// A grammar in GBNF that a reply is to follow, as [`Session::grammar`] makes it.
    ///
    /// # Errors
    /// As of [`Session::grammar`].
    pub fn grammar(&self, gbnf: &str) -> Result<Constraint, Error> {
        self.vocabulary.grammar(gbnf)
    }

    /// A conversation with tools as tokens, with what its answer is read with and held to. Nothing that was said makes a
    /// control token, nor do the tools.
    ///
    /// # Errors
    /// The template does not take it; [`Error::Constraint`]: there is no grammar for the tools' parameters.
    pub fn prepare(&self, template: &ChatTemplate, dialogue: &Dialogue) -> Result<Prompted, Error> {
        self.vocabulary.dialogue(template, dialogue)
    }

    /// The model's own chat template.
    ///
    /// # Errors
    /// It has none, or one that cannot be used.
    pub fn chat_template(&self) -> Result<ChatTemplate, TemplateError> {
        self.vocabulary.own_template()
    }

    /// Another chat template for this model: Jinja, as a GGUF has it.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn chat_template_of(&self, source: &str) -> Result<ChatTemplate, TemplateError> {
        self.vocabulary.template(source)
    }
}
