//! `--json-schema` and `--grammar`, as llama-cli has them.

use std::path::{Path, PathBuf};

use dim::Session;
use gguf_tools::failure::Failure;

use crate::{ended_by, text};

/// What a reply has to be.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
#[group(multiple = false)]
pub struct ConstraintArgs {
    /// Hold the reply to this JSON schema: every keyword in it is enforced, or it is refused; {} is any JSON
    #[arg(short = 'j', long, value_name = "SCHEMA|@FILE")]
    json_schema: Option<String>,
    /// The same, read from a file
    #[arg(long, value_name = "FILE")]
    json_schema_file: Option<PathBuf>,
    /// Hold the reply to this grammar in GBNF, as: root ::= "yes" | "no"
    #[arg(long, value_name = "GRAMMAR")]
    grammar: Option<String>,
    /// The same, read from a file
    #[arg(long, value_name = "FILE")]
    grammar_file: Option<PathBuf>,
}

/// What was given, and by which option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    /// A JSON schema.
    Schema(String),
    /// A grammar.
    Grammar(String),
}

impl ConstraintArgs {
    /// The text, from wherever it was given, if it was.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn given(&self) -> Result<Option<Given>, Failure> {
        if let Some(given) = &self.json_schema {
            let text = match given.strip_prefix('@') {
                Some(file) => read("--json-schema @", Path::new(file))?,
                None => given.clone(),
            };
            return Ok(Some(Given::Schema(text)));
        }
        if let Some(text) = &self.grammar {
            return Ok(Some(Given::Grammar(text.clone())));
        }
        let schema = self.json_schema_file.as_deref().map(|file| read("--json-schema-file ", file));
        let grammar = self.grammar_file.as_deref().map(|file| read("--grammar-file ", file));
        Ok(schema.transpose()?.map(Given::Schema).or(grammar.transpose()?.map(Given::Grammar)))
    }
}

fn read(option: &str, file: &Path) -> Result<String, Failure> {
    text::read(file, MAX_MIB).map_err(|why| Failure::misuse(format!("{option}{}: {why}", file.display())))
}

impl Given {
    /// As the constraint of `session`'s replies.
    ///
    /// # Errors
    /// It is no schema and no grammar, or one that is not enforced.
    pub fn constraint(&self, session: &Session) -> Result<dim::Constraint, Failure> {
        let (option, compiled) = match self {
            Given::Schema(text) => ("--json-schema", session.json_schema(text)),
            Given::Grammar(text) => ("--grammar", session.grammar(text)),
        };
        compiled.map_err(|e| ended_by(format!("{option}: {e}"), e.is_misuse(), e.hint()))
    }
}

const MAX_MIB: u64 = 1;
