//! `dim-host chat`: the model's own template, the cache of the common prefix kept from turn to turn.

mod input;
mod transcript;

use std::path::{Path, PathBuf};
use std::time::Instant;

use dim::host::report::Stop;
use dim::host::template::{ChatTemplate, Role, Turn};
use dim::{Error, Sampling, Session};
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};

use crate::args::{MachineArgs, SamplingArgs, SplitArgs, limit};
use crate::constraint::ConstraintArgs;
use crate::interrupt::Interrupt;
use crate::{explain, shown, template};
use input::{Input, Line};

/// Arguments of `dim-host chat`.
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    constraint: ConstraintArgs,
    /// How the assistant is to behave
    #[arg(long = "system", visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// Another template than the model's: Jinja itself, a file of it, or `chatml`
    #[arg(long, visible_alias = "chat-template-file", value_name = "JINJA|FILE|chatml")]
    chat_template: Option<String>,
    /// Most tokens of a reply; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// End a reply where this text comes (repeat for more)
    #[arg(short = 'r', long = "reverse-prompt", visible_alias = "stop", value_name = "TEXT")]
    stop: Vec<String>,
    /// Keep the conversation in FILE, as JSON, after every reply: all of it, what the context has no room for too
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Go on with the conversation in FILE
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Print the speeds after each reply
    #[arg(long)]
    timings: bool,
}

/// Runs it.
pub fn run(args: &ChatArgs, process_start: Instant) -> Result<(), Failure> {
    // first: a line editor takes Ctrl-C for itself, and whoever comes behind it has it, too
    let input = Input::new();
    let interrupt = Interrupt::watch();
    let mut sampling = args.sampling.sampling()?;
    let n_predict = limit(args.n_predict)?;
    // what is wrong with a file is known before a model is loaded
    let turns = args.first_turns()?;
    let constraint = args.constraint.given()?;
    let template = args.chat_template.as_deref().map(template::text).transpose()?;
    let host = args.split.host(&args.machine)?;
    host.check_chat_template(template.as_deref()).map_err(explain)?;
    let host = host.connect(shown::events(args.machine.verbose)).map_err(explain)?;
    let session = host.session().map_err(explain)?;
    let template = template::of(&session, template.as_deref())?;
    sampling.constraint = constraint.map(|given| given.constraint(&session)).transpose()?;
    Chat {
        args,
        sampling,
        n_predict,
        interrupt,
        process_start,
        template,
        session,
        turns,
        forgotten: 0,
        refused: 0,
    }
    .run(input)
}

impl ChatArgs {
    /// The conversation as it begins.
    fn first_turns(&self) -> Result<Vec<Turn>, Failure> {
        let mut turns = self.resume.as_deref().map_or(Ok(Vec::new()), transcript::read)?;
        if let Some(system) = &self.system {
            turns.retain(|turn| turn.role != Role::System);
            turns.insert(0, Turn { role: Role::System, content: system.clone() });
        }
        Ok(turns)
    }
}

struct Chat<'a> {
    args: &'a ChatArgs,
    sampling: Sampling,
    n_predict: Option<usize>,
    interrupt: Interrupt,
    process_start: Instant,
    template: ChatTemplate,
    session: Session,
    /// all of them
    turns: Vec<Turn>,
    /// how many of them, from the oldest that is not the system's, the context has no room for
    forgotten: usize,
    /// messages that the template did not take
    refused: usize,
}

const COMMANDS: &str = "\
/clear        start again
/save FILE    keep the conversation in FILE; --resume FILE goes on with it
/help         this
/exit         end; so does Ctrl-D. Ctrl-C stops a reply";

impl Chat<'_> {
    /// Reads messages and answers each on stdout until they end.
    fn run(mut self, mut input: Input) -> Result<(), Failure> {
        if input.is_terminal() {
            tell!("{COMMANDS}");
        }
        loop {
            match input.next()? {
                Line::End | Line::Command("exit" | "bye" | "quit", _) => {
                    return self.end(input.is_terminal());
                }
                Line::Command("clear", _) => {
                    self.turns.retain(|turn| turn.role == Role::System);
                    self.forgotten = 0;
                }
                Line::Command("help" | "?", _) => tell!("{COMMANDS}"),
                Line::Command("save", "") => tell!("error: /save FILE: name the file"),
                Line::Command("save", file) => match transcript::write(Path::new(file), &self.turns) {
                    Ok(()) => tell!("[kept in {file}]"),
                    Err(failure) => tell!("error: {failure}"),
                },
                Line::Command(unknown, _) => {
                    tell!(
                        "error: there is no /{unknown}: /help lists what there is; a space before it says it to the model"
                    );
                }
                Line::Said(text) => {
                    let is_terminal = input.is_terminal();
                    self.turns.push(Turn { role: Role::User, content: text });
                    match self.answer() {
                        Ok(Some(content)) => self.turns.push(Turn { role: Role::Assistant, content }),
                        Ok(None) => drop(self.turns.pop()),
                        // the conversation is here, whoever was lost: it can be said again
                        Err(failure) if is_terminal && !failure.is_unread() => {
                            self.turns.pop();
                            let _ = failure.report();
                            tell!("[the conversation is kept: say it again, or /save FILE]");
                        }
                        Err(failure) => return Err(failure),
                    }
                    if let Some(file) = &self.args.save {
                        transcript::write(file, &self.turns)?;
                    }
                }
            }
        }
    }

    /// A script is told of what it may not have read.
    fn end(&self, is_terminal: bool) -> Result<(), Failure> {
        match self.refused {
            n if n > 0 && !is_terminal => Err(Failure::misuse(format!(
                "the chat template did not take {n} message{}",
                if n == 1 { "" } else { "s" }
            ))),
            _ => Ok(()),
        }
    }

    /// The reply to the last turn; `None` where there is no room for one.
    fn answer(&mut self) -> Result<Option<String>, Failure> {
        let Some(prompt) = self.prompt()? else { return Ok(None) };
        self.session.set_tokens(&prompt).map_err(explain)?;

        let generation = self.session.generate(self.sampling.clone()).limit(self.n_predict);
        let generation = generation.stop_at(self.args.stop.iter().cloned());
        let mut generation = generation.stop_when(self.interrupt.stop_flag());
        let ended = self.interrupt.during(|| {
            generation.by_ref().try_for_each(|token| terminal::print(&token.map_err(explain)?.text))
        });
        terminal::print("\n")?;
        ended?;
        let report = generation.report(self.process_start);
        if report.stop == Stop::Interrupted && report.tokens.is_empty() {
            tell!("[stopped before the reply began: this message is not kept]");
            return Ok(None);
        }
        if report.stop == Stop::ContextFull {
            tell!("[the context is full: the reply ends here; a larger --ctx has room for more]");
        }
        if self.args.timings {
            tell!("\n{}", report.table());
        }
        Ok(Some(report.text))
    }

    /// The conversation as tokens, with room for a reply: the oldest turns go where there is none, and it is said.
    fn prompt(&mut self) -> Result<Option<Vec<i32>>, Failure> {
        let n_ctx = self.session.n_ctx() as usize;
        let room = self.n_predict.unwrap_or(usize::MAX).clamp(1, (n_ctx / 4).max(1));
        let mut forgotten = self.forgotten;
        loop {
            let turns = self.remembered(forgotten);
            let prompt = match self.session.tokenize_chat(&self.template, &turns) {
                // a program that came with a download ends no conversation
                Err(error @ Error::Template(_)) => {
                    self.refused += 1;
                    let _ = explain(error).report();
                    return Ok(None);
                }
                prompt => prompt.map_err(explain)?,
            };
            if prompt.is_empty() {
                return Err(Failure::misuse("the chat template gave an empty prompt"));
            }
            let oldest = turns.iter().position(|turn| turn.role != Role::System).unwrap_or(0);
            // what was said last stays: it is to be answered
            let is_last = oldest + 1 >= turns.len();
            if prompt.len() + room <= n_ctx || is_last && prompt.len() < n_ctx {
                // only a message that has room afterwards is worth the others
                if forgotten > self.forgotten {
                    tell!("[the context is full: the {forgotten} oldest messages are forgotten]");
                    self.forgotten = forgotten;
                }
                return Ok(Some(prompt));
            }
            if is_last {
                tell!(
                    "error: this message needs {} positions, the context has {n_ctx}\nhint: say it shorter, or start \
                     with a larger --ctx",
                    prompt.len() + 1,
                );
                return Ok(None);
            }
            // a question goes with its answer: templates want them by turns
            let with_answer = turns.get(oldest + 1).is_some_and(|turn| turn.role == Role::Assistant);
            forgotten += 1 + usize::from(with_answer);
        }
    }

    /// What is left of the conversation without its `forgotten` oldest turns; the system's stay.
    fn remembered(&self, forgotten: usize) -> Vec<Turn> {
        let mut to_skip = forgotten;
        let stays = |turn: &&Turn| {
            let goes = turn.role != Role::System && to_skip > 0;
            to_skip -= usize::from(goes);
            !goes
        };
        self.turns.iter().filter(stays).cloned().collect()
    }
}
