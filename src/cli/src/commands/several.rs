//! `dim-host generate --parallel N`: a prompt a line, so many of them at once, a line of JSON for each result.
//!
//! ```text
//! lines -> the next one, for whichever thread is free -> Session::generate -> {"index": ..., "text": ...}
//! ```
//!
//! Each thread has a session of its own; the stages overlap, and replies that wait for the head go in one step
//! ([`dim_core::groups`]).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use dim::host::report::{Report, Stop};
use dim::{Host, HostBuilder, Sampling, Session};
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};
use serde::Serialize;

use crate::args::at_once;
use crate::explain;
use crate::interrupt::Interrupt;
use crate::prompt::{PromptArgs, Wanted};

/// Several prompts at once.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Several prompts")]
pub(super) struct SeveralArgs {
    /// Each line of the prompt is one of its own, N of them at once; a line of JSON on stdout for each result, as they come.
    /// The workers need as many sessions (dim-worker --parallel)
    #[arg(long, visible_alias = "np", value_name = "N", value_parser = clap::value_parser!(u32).range(1..),
          conflicts_with_all = ["logits_out", "warm_up"])]
    parallel: Option<u32>,
    /// Never evaluate rows of two replies together: each is, token for token, what it is alone, and all take longer
    #[arg(long, requires = "parallel")]
    exact: bool,
}

impl SeveralArgs {
    pub(super) fn is_wanted(&self) -> bool {
        self.parallel.is_some()
    }

    /// A host with as many sessions.
    pub(super) fn at_once(&self, host: HostBuilder) -> HostBuilder {
        match self.parallel {
            Some(n) => at_once(host, n, self.exact),
            None => host,
        }
    }
}

/// What became of a prompt.
#[derive(Serialize)]
struct Line<'a> {
    /// which line it was, from 0; blank ones count
    index: usize,
    prompt: &'a str,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Reply {
        text: String,
        tokens: Vec<i32>,
        stop: Stop,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        seed: u32,
        prompt_tokens: usize,
        prompt_ms: f64,
        gen_ms: f64,
    },
    Failed {
        error: String,
    },
}

impl Outcome {
    fn of(report: Report) -> Outcome {
        let Report { text, tokens, stop, error, seed, prompt_tokens, prompt_ms, gen_ms, .. } = report;
        Outcome::Reply { text, tokens, stop, error, seed, prompt_tokens, prompt_ms, gen_ms }
    }

    fn has_failed(&self) -> bool {
        matches!(self, Outcome::Failed { .. } | Outcome::Reply { error: Some(_), .. })
    }

    fn n_tokens(&self) -> usize {
        match self {
            Outcome::Reply { tokens, .. } => tokens.len(),
            Outcome::Failed { .. } => 0,
        }
    }
}

/// What the threads have in common.
struct Work<'a> {
    args: &'a PromptArgs,
    wanted: &'a Wanted,
    /// each with the line that it was
    prompts: Vec<(usize, &'a str)>,
    stop: &'a AtomicBool,
    next: AtomicUsize,
    n_tokens: AtomicUsize,
    n_failed: AtomicUsize,
    process_start: Instant,
}

/// Continues every line of the prompt, as many at once as `host` has sessions.
pub(super) fn replies(
    host: &Host,
    args: &PromptArgs,
    wanted: &Wanted,
    interrupt: &Interrupt,
    process_start: Instant,
) -> Result<(), Failure> {
    let prompts: Vec<_> = wanted.lines().collect();
    if prompts.is_empty() {
        return Err(explain(dim::Error::EmptyPrompt));
    }
    let n_sessions = (host.max_sessions() as usize).min(prompts.len());
    let sessions = (0..n_sessions).map(|_| host.session().map_err(explain)).collect::<Result<Vec<_>, _>>()?;
    // one for all: it is compiled once, and the same seed gives each what it gives alone
    let sampling = match sessions.first() {
        Some(session) => wanted.sampling(session)?,
        None => return Ok(()),
    };
    let work = Work {
        args,
        wanted,
        prompts,
        stop: interrupt.stop_flag(),
        next: AtomicUsize::new(0),
        n_tokens: AtomicUsize::new(0),
        n_failed: AtomicUsize::new(0),
        process_start,
    };
    let began = Instant::now();
    let ended: Result<(), Failure> = interrupt.during(|| {
        std::thread::scope(|scope| {
            let (work, sampling) = (&work, &sampling);
            let threads: Vec<_> =
                sessions.into_iter().map(|session| scope.spawn(|| work.serve(session, sampling))).collect();
            let mut ended = threads.into_iter().map(|thread| thread.join());
            // a panic of one is that of all
            ended.try_for_each(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    });
    ended.and_then(|()| work.told(began))
}

impl Work<'_> {
    /// One prompt after the other, until there is none, nobody wants them or nobody reads.
    fn serve(&self, mut session: Session, sampling: &Sampling) -> Result<(), Failure> {
        while !self.stop.load(Ordering::SeqCst) {
            let Some(&(index, prompt)) = self.prompts.get(self.next.fetch_add(1, Ordering::SeqCst)) else {
                return Ok(());
            };
            let outcome = self.reply(&mut session, prompt, sampling.clone());
            self.n_tokens.fetch_add(outcome.n_tokens(), Ordering::SeqCst);
            self.n_failed.fetch_add(usize::from(outcome.has_failed()), Ordering::SeqCst);
            let line = serde_json::to_string(&Line { index, prompt, outcome });
            let line = line.map_err(Failure::failed)?;
            // who has left is not computed for
            terminal::print(&format!("{line}\n")).inspect_err(|_| self.stop.store(true, Ordering::SeqCst))?;
        }
        Ok(())
    }

    fn reply(&self, session: &mut Session, prompt: &str, sampling: Sampling) -> Outcome {
        let failed = |error: &dyn std::fmt::Display| Outcome::Failed { error: error.to_string() };
        // what the session holds of the prompt before is another conversation's
        if let Err(error) = session.set_tokens(&[]) {
            return failed(&error);
        }
        if let Err(error) = self.args.push_line(self.wanted, prompt, session) {
            return failed(&error);
        }
        let mut generation = self.args.generation(self.wanted, session, sampling, self.stop);
        // an error is in the report
        while let Some(Ok(_)) = generation.next() {}
        Outcome::of(generation.report(self.process_start))
    }

    /// What it came to, for the person.
    fn told(&self, began: Instant) -> Result<(), Failure> {
        let (n_tokens, n_failed) =
            (self.n_tokens.load(Ordering::SeqCst), self.n_failed.load(Ordering::SeqCst));
        let (n, seconds) = (self.prompts.len(), began.elapsed().as_secs_f64());
        let n_begun = self.next.load(Ordering::SeqCst).min(n);
        let of = if n_begun < n { format!("{n_begun} of {n} prompts") } else { format!("{n} prompts") };
        tell!("\n{of}, {n_tokens} tokens in {seconds:.1} s: {:.2} tok/s", n_tokens as f64 / seconds);
        match n_failed {
            0 => Ok(()),
            _ => Err(Failure::failed(format!("{n_failed} of {n} prompts failed: \"error\" says why"))),
        }
    }
}
