//! `dim-host generate`.

use std::io::Write as _;
use std::time::Instant;

use dim::Session;
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};

use super::several;
use crate::args::{MachineArgs, SplitArgs};
use crate::interrupt::Interrupt;
use crate::prompt::{PromptArgs, Wanted};
use crate::{explain, shown};

/// Arguments of `dim-host generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    several: several::SeveralArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs it.
pub fn run(args: &GenerateArgs, process_start: Instant) -> Result<(), Failure> {
    let interrupt = Interrupt::watch();
    let wanted = args.prompt.read()?;
    let host = args.split.host(&args.machine)?;
    if let Some(template) = wanted.template() {
        host.check_chat_template(template).map_err(explain)?;
    }
    let host = args.several.at_once(host).connect(shown::events(args.machine.verbose)).map_err(explain)?;
    match args.several.is_wanted() {
        true => several::replies(&host, &args.prompt, &wanted, &interrupt, process_start),
        false => reply(host.session().map_err(explain)?, &args.prompt, &wanted, &interrupt, process_start),
    }
}

/// Continues the prompt and reports: the same for `generate` and `stock`.
pub(super) fn reply(
    mut session: Session,
    args: &PromptArgs,
    wanted: &Wanted,
    interrupt: &Interrupt,
    process_start: Instant,
) -> Result<(), Failure> {
    args.push(wanted, &mut session)?;
    let sampling = wanted.sampling(&session)?;
    let mut logits_file = args.logits_file()?;
    if args.warm_up {
        session.warm_up().map_err(explain)?;
    }
    let mut generation = args.generation(wanted, &mut session, sampling, interrupt.stop_flag());
    // a Ctrl-C in the prompt ends the program: there is no text yet that it could keep
    let mut first = generation.next();
    let (mut written, mut unread) = (Ok(()), false);
    let ended = interrupt.during(|| {
        while let Some(token) = first.take().or_else(|| generation.next()) {
            let token = token.map_err(explain)?;
            if !args.json {
                // who has left is not computed for
                terminal::print(&token.text).inspect_err(|_| unread = true)?;
            }
            if let (Some(file), Ok(())) = (&mut logits_file, &written) {
                written = file.write_all(bytemuck::cast_slice(generation.logits()));
            }
        }
        Ok(())
    });
    let written = written.and_then(|()| logits_file.as_mut().map_or(Ok(()), |file| file.flush()));
    if unread {
        return ended;
    }
    let report = generation.report(process_start);
    if args.json {
        terminal::print(&format!("{}\n", serde_json::to_string(&report).map_err(Failure::failed)?))?;
    } else {
        terminal::print("\n")?;
    }
    tell!("\n{}", report.table());
    ended?;
    written.map_err(|e| Failure::failed(format!("cannot write the logits: {e}")))
}
