//! A host served by a stage.
//!
//! ```text
//! socket -> frame -> message -> stage -> hidden -> message -> frame -> socket
//! ```
//!
//! A connection begins with empty sessions and its end ends them: nothing of a worker's memory outlives it, so a
//! host that comes back replays what it kept.

use std::time::Instant;

use llama_sys_patch::Error;

use crate::stage::local::LlamaStage;
use dim_core::rows::Rows;
use dim_core::stage::{StageInput, StageOutput};
use dim_wire::message::{Activity, ErrorCode, Fault, Status};
use dim_wire::transport::{ComputeTime, Event, Link, LinkError, LinkErrorKind, Receiver, Sender};

/// Serves a host until it leaves, is lost, breaks a rule or asks for something that fails. Says why it ended.
pub fn serve(stage: &mut LlamaStage, link: Link) -> LinkError {
    let agreed = link.agreed().clone();
    for session in 0..agreed.max_sessions {
        if let Err(error) = stage.rewind_session(session, 0) {
            let fault = Fault::new(ErrorCode::Compute, error.to_string());
            link.sender().fail(fault.clone());
            return LinkErrorKind::Fault(fault).with("this worker");
        }
    }
    let (sender, mut receiver) = link.split();
    let mut out = Rows::empty(agreed.row_type);
    loop {
        if let Err(end) = next(stage, &sender, &mut receiver, &mut out) {
            return end;
        }
    }
}

/// One event of the host.
fn next(
    stage: &mut LlamaStage,
    sender: &Sender,
    receiver: &mut Receiver,
    out: &mut Rows,
) -> Result<(), LinkError> {
    match receiver.receive(None)? {
        Event::Step { step, spans, tokens, rows, arrived } => {
            let wait = arrived.elapsed();
            sender.set_status(Status {
                activity: Activity::Computing,
                step: step.wrapping_sub(1),
                ..Status::default()
            });
            let n_rows = spans.iter().map(|s| s.count).sum();
            let start = Instant::now();
            let result = stage.run(spans, StageInput::Rows { rows, tokens }, StageOutput::Rows(out));
            let time = ComputeTime { began: start, compute: start.elapsed(), wait };
            match result {
                Ok(_) => sender.send_done(step, n_rows, out.as_ref(), time)?,
                // of its sessions only: the others go on
                Err(error) if is_of_step(&error) => receiver.step_failed(fault(stage, Some(step), &error))?,
                Err(error) => return Err(fail(stage, sender, Some(step), &error)),
            }
            sender.set_status(Status { step, ..Status::default() });
            Ok(())
        }
        Event::Rewind { session, position } => rewind(stage, sender, session, position),
        Event::EndSession { session } => rewind(stage, sender, session, 0),
        Event::Done { .. } | Event::Failed { .. } => unreachable!("a link of a worker takes no answers"),
    }
}

fn rewind(stage: &mut LlamaStage, sender: &Sender, session: u32, position: u32) -> Result<(), LinkError> {
    stage.rewind_session(session, position).map_err(|error| fail(stage, sender, None, &error))
}

/// Whether the stage is as good as before for everybody else's steps.
fn is_of_step(error: &Error) -> bool {
    use Error::{InputNotFinite, OutputNotFinite, OutputOverflows};
    matches!(error, InputNotFinite { .. } | OutputNotFinite { .. } | OutputOverflows { .. })
}

/// Tells the host what this worker could not do, and leaves.
fn fail(stage: &LlamaStage, sender: &Sender, step: Option<u32>, error: &Error) -> LinkError {
    let fault = fault(stage, step, error);
    sender.fail(fault.clone());
    LinkErrorKind::Fault(fault).with("this worker")
}

/// What this worker could not do, in the host's words: block numbers of the model, and how many values.
fn fault(stage: &LlamaStage, step: Option<u32>, error: &Error) -> Fault {
    let code = match error {
        Error::OutputNotFinite { .. } | Error::InputNotFinite { .. } => ErrorCode::NonFinite,
        Error::OutputOverflows { .. } => ErrorCode::Overflow,
        Error::OutOfMemory(_) => ErrorCode::NoMemory,
        _ => ErrorCode::Compute,
    };
    let (block, count) = match error {
        Error::OutputNotFinite { block, count, .. } | Error::OutputOverflows { block, count, .. } => {
            (Some(stage.first_block() + block), u32::try_from(*count).unwrap_or(u32::MAX))
        }
        Error::InputNotFinite { count, .. } => (None, u32::try_from(*count).unwrap_or(u32::MAX)),
        _ => (None, 0),
    };
    Fault { step, block, count, ..Fault::new(code, stage.explain(error).to_string()) }
}
