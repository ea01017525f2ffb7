//! `dim-host generate`.

use std::io::Write as _;
use std::time::Instant;

use llama_sys_patch::Model;

use crate::commands::PromptArgs;
use dim::failure::Failure;
use dim::host::chat::show;
use dim::host::engine::{Engine, SplitEngine};
use dim::host::generate::{Request, generate};
use dim::host::interrupt::Interrupt;
use dim::host::machine::MachineArgs;
use dim::host::sampler::Sampler;
use dim::host::setup::{SplitArgs, open_split};

/// Arguments of `dim-host generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs it.
pub fn run(args: &Args, process_start: Instant) -> Result<(), Failure> {
    args.machine.check()?;
    args.prompt.sampling.check().map_err(Failure::misuse)?;
    let interrupt = Interrupt::watch();
    let split = open_split(&args.split, &args.machine)?;
    let mut engine = SplitEngine::new(split.pipeline, split.n_ubatch);
    let run = Run { vocabulary: &split.vocabulary, n_ctx: split.n_ctx, model_name: &split.model_name };
    run.run(&mut engine, &args.prompt, &interrupt, process_start)
}

/// What `generate` and `stock` have in common: everything after the engine is ready.
pub(super) struct Run<'a> {
    pub vocabulary: &'a Model,
    pub n_ctx: u32,
    pub model_name: &'a str,
}

impl Run<'_> {
    pub(super) fn run(
        &self,
        engine: &mut dyn Engine,
        args: &PromptArgs,
        interrupt: &Interrupt,
        process_start: Instant,
    ) -> Result<(), Failure> {
        let prompt = args.tokens(self.vocabulary, self.n_ctx)?;
        let mut sampler = Sampler::new(&args.sampling, self.vocabulary.n_vocab()).map_err(Failure::misuse)?;
        let mut logits_out = match &args.logits_out {
            None => None,
            Some(path) => Some(std::io::BufWriter::new(
                std::fs::File::create(path)
                    .map_err(|e| Failure::misuse(format!("cannot write {}: {e}", path.display())))?,
            )),
        };
        let mut written = Ok(());
        if args.warm_up {
            engine.evaluate(0, &prompt)?;
            engine.rewind(0)?;
        }
        let request = Request {
            prompt: &prompt,
            cached: 0,
            n_predict: args.limit()?,
            ignore_eos: args.ignore_eos,
            n_ctx: self.n_ctx as usize,
            stop: interrupt.stop_flag(),
            process_start,
            model_name: self.model_name,
        };
        let (report, failure) = interrupt.during(|| {
            let on_text = |piece: &str| {
                if !args.json {
                    show(piece);
                }
            };
            generate(engine, self.vocabulary, &mut sampler, &request, on_text, |logits| {
                if let (Some(out), Ok(())) = (&mut logits_out, &written) {
                    written = out.write_all(bytemuck::cast_slice(logits));
                }
            })
        });
        let flushed = written.and_then(|()| logits_out.as_mut().map_or(Ok(()), std::io::Write::flush));
        if args.json {
            println!("{}", serde_json::to_string(&report).map_err(Failure::failed)?);
        } else {
            println!();
        }
        eprintln!("\n{}", report.table());
        if let Some(failure) = failure {
            return Err(failure);
        }
        flushed.map_err(|e| Failure::failed(format!("cannot write the logits: {e}")))
    }
}
