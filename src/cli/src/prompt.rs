//! What `generate` and `stock` are asked for.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use dim::host::template::{Role, Turn};
use dim::{Error, Generation, Sampling, Session};
use gguf_tools::failure::Failure;

use crate::args::{SamplingArgs, limit};
use crate::constraint::{ConstraintArgs, Given};
use crate::text::{self, NoText};
use crate::{explain, habits, template};

/// What to continue, and how far.
#[derive(Clone, Debug, clap::Args)]
pub struct PromptArgs {
    /// The text to continue
    #[arg(short = 'p', long, value_name = "TEXT", conflicts_with = "file", required_unless_present = "file")]
    prompt: Option<String>,
    /// How the assistant is to behave: the prompt is what a user says then, and the model's chat template is around both
    #[arg(
        long = "system",
        visible_alias = "system-prompt",
        value_name = "TEXT",
        conflicts_with = "prompt_tokens"
    )]
    system: Option<String>,
    /// Another template than the model's: Jinja itself, a file of it, or `chatml`
    #[arg(long, visible_alias = "chat-template-file", value_name = "JINJA|FILE|chatml", requires = "system")]
    chat_template: Option<String>,
    /// Read it from a file (- for standard input)
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Read \n, \t, \", \\ and the like in -p (and in the lines of -f, with --parallel) as the characters they stand for
    #[arg(short = 'e', long)]
    escape: bool,
    /// Take -p as it stands, as is done anyway
    #[arg(long, hide_short_help = true, overrides_with = "escape")]
    no_escape: bool,
    /// End where this text comes (repeat for more)
    #[arg(short = 'r', long = "reverse-prompt", visible_alias = "stop", value_name = "TEXT")]
    stop: Vec<String>,
    /// Repeat or cut the prompt to N tokens, for measurements
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: Option<u32>,
    /// Tokens to generate; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Go on after the model ends its reply, for measurements
    #[arg(long)]
    ignore_eos: bool,
    /// Evaluate the prompt once before, unmeasured, for measurements: weights are read and memory is touched
    #[arg(long)]
    pub warm_up: bool,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// What the reply has to be.
    #[command(flatten)]
    pub constraint: ConstraintArgs,
    /// Print one JSON object on stdout instead of the text
    #[arg(long)]
    pub json: bool,
    /// Write the logits behind every token to FILE: f32, (n_tokens, n_vocab), for comparisons
    #[arg(long, value_name = "FILE")]
    logits_out: Option<PathBuf>,
}

/// What is asked for, with its files read: before a model is, which takes longer.
#[derive(Debug)]
pub struct Wanted {
    text: String,
    /// what the system says, where the text is a user's
    system: Option<String>,
    /// instead of the model's own
    template: Option<String>,
    constraint: Option<Given>,
    sampling: Sampling,
    /// tokens; none: until the model ends its reply
    pub limit: Option<usize>,
}

impl Wanted {
    /// Whether a chat template is needed, and which one, if not the model's own.
    pub fn template(&self) -> Option<Option<&str>> {
        self.system.as_ref().map(|_| self.template.as_deref())
    }

    /// How to sample, held to the schema or the grammar if there is one.
    ///
    /// # Errors
    /// It is no schema and no grammar, or one that is not enforced.
    pub fn sampling(&self, session: &Session) -> Result<Sampling, Failure> {
        let constraint = self.constraint.as_ref().map(|given| given.constraint(session)).transpose()?;
        Ok(Sampling { constraint, ..self.sampling.clone() })
    }

    /// Each line of the text that is not blank, and which one it is.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty())
    }

    fn tokens(&self, text: &str, session: &Session) -> Result<Vec<i32>, Failure> {
        let Some(system) = &self.system else { return session.tokenize(text, true).map_err(explain) };
        let turn = |role, content: &str| Turn { role, content: content.to_owned() };
        let mut turns = vec![turn(Role::User, text)];
        if !system.is_empty() {
            turns.insert(0, turn(Role::System, system));
        }
        session.tokenize_chat(&template::of(session, self.template.as_deref())?, &turns).map_err(explain)
    }
}

impl PromptArgs {
    /// Reads and checks what can be without a model.
    ///
    /// # Errors
    /// A file cannot be read, or a number is out of range.
    pub fn read(&self) -> Result<Wanted, Failure> {
        let (sampling, limit) = (self.sampling.sampling()?, limit(self.n_predict)?);
        let (text, constraint) = (self.text()?, self.constraint.given()?);
        let template = self.chat_template.as_deref().map(template::text).transpose()?;
        Ok(Wanted { text, system: self.system.clone(), template, constraint, sampling, limit })
    }

    fn text(&self) -> Result<String, Failure> {
        if let Some(text) = &self.prompt {
            return Ok(if self.escape { habits::unescaped(text) } else { text.clone() });
        }
        let Some(path) = &self.file else {
            return Err(Failure::misuse("give a prompt with -p TEXT or -f FILE"));
        };
        let from = if path.as_os_str() == "-" { "standard input".into() } else { path.to_string_lossy() };
        let text = match path.as_os_str() == "-" {
            true => text::read_from(std::io::stdin().lock(), MAX_PROMPT_MIB),
            false => text::read(path, MAX_PROMPT_MIB),
        };
        text.map_err(|why| match why {
            NoText::Unreadable(e) => Failure::misuse(format!("cannot read the prompt from {from}: {e}")),
            NoText::Is(what) => Failure::misuse(format!("the prompt in {from} is {what}")),
        })
    }

    /// Gives the session the prompt: at least one token, and no more than the context has positions.
    ///
    /// # Errors
    /// The text has none or too many.
    pub fn push(&self, wanted: &Wanted, session: &mut Session) -> Result<(), Failure> {
        self.push_text(wanted, &wanted.text, session)
    }

    /// The same of a [line](Wanted::lines) alone; with -e, of what it stands for.
    ///
    /// # Errors
    /// As of [`push`](Self::push).
    pub fn push_line(&self, wanted: &Wanted, line: &str, session: &mut Session) -> Result<(), Failure> {
        match self.escape && self.file.is_some() {
            true => self.push_text(wanted, &habits::unescaped(line), session),
            false => self.push_text(wanted, line, session),
        }
    }

    fn push_text(&self, wanted: &Wanted, text: &str, session: &mut Session) -> Result<(), Failure> {
        let mut tokens = wanted.tokens(text, session)?;
        if tokens.is_empty() {
            return Err(explain(Error::EmptyPrompt));
        }
        if let Some(n) = self.prompt_tokens {
            tokens = tokens.into_iter().cycle().take(n as usize).collect();
        }
        session.push_tokens(&tokens).map_err(explain)
    }

    /// A reply to what the session was given, as it is asked for.
    pub fn generation<'s>(
        &self,
        wanted: &Wanted,
        session: &'s mut Session,
        sampling: Sampling,
        stop: &'s AtomicBool,
    ) -> Generation<'s> {
        let generation = session.generate(sampling).limit(wanted.limit).ignore_eos(self.ignore_eos);
        generation.stop_at(self.stop.iter().cloned()).stop_when(stop)
    }

    /// Where the logits are to go, if anywhere.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn logits_file(&self) -> Result<Option<BufWriter<File>>, Failure> {
        let Some(path) = &self.logits_out else { return Ok(None) };
        let cannot = |e| Failure::misuse(format!("cannot write {}: {e}", path.display()));
        Ok(Some(BufWriter::new(File::create(path).map_err(cannot)?)))
    }
}

const MAX_PROMPT_MIB: u64 = 64;
