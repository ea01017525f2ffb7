//! `dim-host chat`: the model's own template, the cache of the common prefix kept from turn to turn.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Instant;

use dim::host::report::Stop;
use dim::host::template::{ChatTemplate, Role, Turn};
use dim::{Sampling, Session};
use gguf_tools::failure::Failure;

use crate::args::{MachineArgs, SamplingArgs, SplitArgs, limit};
use crate::interrupt::Interrupt;
use crate::{explain, shown};

/// Arguments of `dim-host chat`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How the assistant is to behave
    #[arg(long = "system", visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of a reply; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Print the speeds after each reply
    #[arg(long)]
    timings: bool,
}

/// Runs it.
pub fn run(args: &Args, process_start: Instant) -> Result<(), Failure> {
    let sampling = args.sampling.sampling()?;
    let n_predict = limit(args.n_predict)?;
    let interrupt = Interrupt::watch();
    let host = args.split.host(&args.machine)?;
    let mut host = host.connect(shown::events(args.machine.verbose)).map_err(explain)?;
    let template = host.chat_template().map_err(explain)?;
    let session = host.session().map_err(explain)?;
    Chat { args, sampling, n_predict, interrupt, process_start, template, session }.run()
}

struct Chat<'a> {
    args: &'a Args,
    sampling: Sampling,
    n_predict: Option<usize>,
    interrupt: Interrupt,
    process_start: Instant,
    template: ChatTemplate,
    session: Session<'a>,
}

impl Chat<'_> {
    /// Reads lines from stdin and answers each on stdout until it ends.
    fn run(mut self) -> Result<(), Failure> {
        let mut input = std::io::stdin().lock();
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            eprintln!("/clear starts again, /exit or Ctrl-D ends, Ctrl-C stops a reply");
        }
        let mut turns = self.first_turns();
        let mut line = String::new();
        loop {
            if interactive {
                eprint!("\n> ");
                let _ = std::io::stderr().flush();
            }
            line.clear();
            let read = input.read_line(&mut line);
            if read.map_err(|e| Failure::failed(format!("cannot read the next line: {e}")))? == 0 {
                return Ok(());
            }
            match line.trim() {
                "" => {}
                "/exit" | "/bye" | "/quit" => return Ok(()),
                "/clear" => turns = self.first_turns(),
                said => {
                    turns.push(Turn { role: Role::User, content: said.to_owned() });
                    match self.answer(&turns)? {
                        Some(content) => turns.push(Turn { role: Role::Assistant, content }),
                        None => drop(turns.pop()),
                    }
                }
            }
        }
    }

    fn first_turns(&self) -> Vec<Turn> {
        let system = self.args.system.iter();
        system.map(|s| Turn { role: Role::System, content: s.clone() }).collect()
    }

    /// The reply to the last of `turns`; `None` where there is no room for one.
    fn answer(&mut self, turns: &[Turn]) -> Result<Option<String>, Failure> {
        let rendered = self.template.render(turns).map_err(explain)?;
        // a template may begin with the token that the tokenizer would add again
        let begins = !self.template.adds_bos(&rendered);
        let prompt = self.session.tokenize(&rendered, begins).map_err(explain)?;
        if prompt.is_empty() {
            return Err(Failure::misuse("the chat template gave an empty prompt"));
        }
        let n_ctx = self.session.n_ctx();
        if prompt.len() >= n_ctx as usize {
            eprintln!(
                "error: this conversation needs {} positions, the context has {n_ctx}\nhint: /clear, or start with a \
                 larger --ctx",
                prompt.len() + 1,
            );
            return Ok(None);
        }
        self.session.set_tokens(&prompt).map_err(explain)?;

        let generation = self.session.generate(self.sampling.clone()).limit(self.n_predict);
        let mut generation = generation.stop_when(self.interrupt.stop_flag());
        let ended = self
            .interrupt
            .during(|| generation.by_ref().try_for_each(|token| token.map(|token| shown::text(&token.text))));
        println!();
        ended.map_err(explain)?;
        let report = generation.report(self.process_start);
        if report.stop == Stop::ContextFull {
            eprintln!("[the context is full: /clear, or start with a larger --ctx]");
        }
        if self.args.timings {
            eprintln!("\n{}", report.table());
        }
        Ok(Some(report.text))
    }
}
