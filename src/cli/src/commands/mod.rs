//! The subcommands of `dim-host`: arguments in, exit out. What they do stands in the modules beside.

pub mod chat;
pub mod demo;
pub mod generate;
pub mod laboratory;
pub mod pair;
pub mod push;
pub mod stock;

use std::io::Read as _;
use std::path::PathBuf;

use llama_sys_patch::Model;

use dim::failure::Failure;
use dim::host::sampler::SamplerOptions;

/// What to continue, and how far.
#[derive(Clone, Debug, clap::Args)]
pub struct PromptArgs {
    /// The text to continue
    #[arg(short = 'p', long, value_name = "TEXT", conflicts_with = "file", required_unless_present = "file")]
    pub prompt: Option<String>,
    /// Read it from a file (- for standard input)
    #[arg(short = 'f', long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Repeat or cut the prompt to N tokens, for measurements
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Option<u32>,
    /// Tokens to generate; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_predict: i64,
    /// Go on after the model ends its reply, for measurements
    #[arg(long)]
    pub ignore_eos: bool,
    /// Evaluate the prompt once before, unmeasured, for measurements: weights are read and memory is touched
    #[arg(long)]
    pub warm_up: bool,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplerOptions,
    /// Print one JSON object on stdout instead of the text
    #[arg(long)]
    pub json: bool,
    /// Write the logits behind every token to FILE: f32, (n_tokens, n_vocab), for comparisons
    #[arg(long, value_name = "FILE")]
    pub logits_out: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt's text, from wherever it was given.
    pub fn text(&self) -> Result<String, Failure> {
        if let Some(text) = &self.prompt {
            return Ok(text.clone());
        }
        let Some(path) = &self.file else {
            return Err(Failure::misuse("give a prompt with -p TEXT or -f FILE"));
        };
        let mut bytes = Vec::new();
        let read = if path.as_os_str() == "-" {
            std::io::stdin().lock().take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes)
        } else {
            std::fs::File::open(path).and_then(|f| f.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes))
        };
        read.map_err(|e| Failure::misuse(format!("cannot read the prompt from {}: {e}", path.display())))?;
        if bytes.len() as u64 > MAX_PROMPT_BYTES {
            return Err(Failure::misuse(format!("the prompt in {} is longer than 64 MiB", path.display())));
        }
        String::from_utf8(bytes).map_err(|e| {
            Failure::misuse(format!(
                "the prompt in {} is not UTF-8 at byte {}",
                path.display(),
                e.utf8_error().valid_up_to()
            ))
        })
    }

    /// `-n` as a limit.
    pub fn limit(&self) -> Result<Option<usize>, Failure> {
        limit(self.n_predict)
    }

    /// The prompt's tokens, at least one, and fewer than the context has positions.
    pub fn tokens(&self, vocabulary: &Model, n_ctx: u32) -> Result<Vec<i32>, Failure> {
        let mut tokens = vocabulary.tokenize(&self.text()?, true, true).map_err(Failure::misuse)?;
        if tokens.is_empty() {
            return Err(
                Failure::misuse("the prompt is empty").hint("give at least one character with -p or -f")
            );
        }
        if let Some(n) = self.prompt_tokens {
            tokens = tokens.into_iter().cycle().take(n as usize).collect();
        }
        if tokens.len() > n_ctx as usize {
            return Err(Failure::misuse(format!(
                "the prompt has {} tokens, the context {n_ctx}",
                tokens.len()
            ))
            .hint(format!(
                "start with --ctx {} or more, on the workers too",
                tokens.len().next_power_of_two()
            )));
        }
        Ok(tokens)
    }
}

/// The number after `-n` as a limit: none for -1.
pub fn limit(n_predict: i64) -> Result<Option<usize>, Failure> {
    match n_predict {
        -1 => Ok(None),
        n => usize::try_from(n).map(Some).map_err(|_| Failure::misuse(format!("-n {n}: must be -1 or more"))),
    }
}

const MAX_PROMPT_BYTES: u64 = 64 << 20;
