//! A conversation: the model's own template, the cache of the common prefix kept from turn to turn.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use llama_sys_patch::Model;

use crate::failure::Failure;
use crate::host::engine::Engine;
use crate::host::generate::{Request, generate};
use crate::host::interrupt::Interrupt;
use crate::host::report::{Report, Stop};
use crate::host::sampler::{Sampler, SamplerOptions};
use crate::host::template::{ChatTemplate, Role, Turn};

/// What a conversation needs besides the engine.
pub struct ChatOptions<'a> {
    /// The vocabulary and the template: the head slice or the whole model.
    pub vocabulary: &'a Model,
    /// How to sample.
    pub sampling: &'a SamplerOptions,
    /// How the assistant is to behave.
    pub system: Option<&'a str>,
    /// Most tokens of one reply.
    pub n_predict: Option<usize>,
    /// Positions there are.
    pub n_ctx: usize,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
    /// When the process started.
    pub process_start: Instant,
    /// The model's name.
    pub model_name: &'a str,
}

/// Reads lines from `input` and answers each on stdout until it ends. The last turn's report is handed to
/// `on_report` each time.
pub fn chat(
    engine: &mut dyn Engine,
    options: &ChatOptions<'_>,
    input: &mut dyn BufRead,
    mut on_report: impl FnMut(&Report),
) -> Result<(), Failure> {
    let model = options.vocabulary;
    let template = ChatTemplate::new(
        &model.chat_template().unwrap_or_default(),
        &special_text(model, model.bos()),
        &special_text(model, model.eos()),
    )
    .map_err(Failure::misuse)?;
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("/clear starts again, /exit or Ctrl-D ends, Ctrl-C stops a reply");
    }

    let start = || -> Vec<Turn> {
        let system = options.system.map(|s| Turn { role: Role::System, content: s.to_owned() });
        system.into_iter().collect()
    };
    let mut turns = start();
    // the tokens whose rows every stage's cache holds
    let mut held: Vec<i32> = Vec::new();
    let mut line = String::new();
    loop {
        if interactive {
            eprint!("\n> ");
            let _ = std::io::stderr().flush();
        }
        line.clear();
        let n = input
            .read_line(&mut line)
            .map_err(|e| Failure::failed(format!("cannot read the next line: {e}")))?;
        if n == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/bye" | "/quit" => return Ok(()),
            "/clear" => {
                turns = start();
                continue;
            }
            said => turns.push(Turn { role: Role::User, content: said.to_owned() }),
        }

        let prompt = tokenize(model, &template.render(&turns).map_err(Failure::misuse)?)?;
        if prompt.len() >= options.n_ctx {
            turns.pop();
            eprintln!(
                "error: this conversation needs {} positions, the context has {}\nhint: /clear, or start with a larger --ctx",
                prompt.len() + 1,
                options.n_ctx
            );
            continue;
        }
        // what both have in common stays in the caches; at least one token is evaluated, for its logits
        let common = held.iter().zip(&prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        engine.rewind(u32::try_from(common).unwrap_or(u32::MAX))?;
        held.truncate(common);

        let mut sampler = Sampler::new(options.sampling, model.n_vocab()).map_err(Failure::misuse)?;
        let request = Request {
            prompt: &prompt,
            cached: common,
            ignore_eos: false,
            n_predict: options.n_predict,
            n_ctx: options.n_ctx,
            stop: options.interrupt.stop_flag(),
            process_start: options.process_start,
            model_name: options.model_name,
        };
        let (report, failure) =
            options.interrupt.during(|| generate(engine, model, &mut sampler, &request, show, |_| {}));
        println!();
        if let Some(failure) = failure {
            return Err(failure);
        }
        if report.stop == Stop::ContextFull {
            eprintln!("[the context is full: /clear, or start with a larger --ctx]");
        }
        held = prompt;
        // the token chosen last was not evaluated
        held.extend(&report.tokens[..report.tokens.len().saturating_sub(1)]);
        turns.push(Turn { role: Role::Assistant, content: report.text.clone() });
        on_report(&report);
    }
}

/// Text to stdout, at once.
pub fn show(piece: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(piece.as_bytes());
    let _ = out.flush();
}

/// A rendered prompt as tokens. A template may begin with the BOS token that the tokenizer would add again.
fn tokenize(model: &Model, text: &str) -> Result<Vec<i32>, Failure> {
    let bos = special_text(model, model.bos());
    let add_special = bos.is_empty() || !text.starts_with(&bos);
    let tokens = model.tokenize(text, add_special, true).map_err(Failure::failed)?;
    if tokens.is_empty() {
        Err(Failure::misuse("the chat template gave an empty prompt"))
    } else {
        Ok(tokens)
    }
}

fn special_text(model: &Model, token: Option<i32>) -> String {
    let text = token.and_then(|t| model.token_name(t).ok());
    text.map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default()
}
