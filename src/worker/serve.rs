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
use dim_wire::transport::{Event, Link, LinkError, LinkErrorKind, Receiver, Sender};

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
        Event::Step { step, spans, rows, arrived } => {
            let wait = arrived.elapsed();
            sender.set_status(Status {
                activity: Activity::Computing,
                step: step.wrapping_sub(1),
                ..Status::default()
            });
            let n_rows = spans.iter().map(|s| s.count).sum();
            let start = Instant::now();
            let input = StageInput::Rows { rows, tokens: &[] };
            if let Err(error) = stage.run(spans, input, StageOutput::Rows(out)) {
                return Err(fail(stage, sender, step, &error));
            }
            let compute = start.elapsed();
            sender.send_done(step, n_rows, out.as_ref(), compute, wait)?;
            sender.set_status(Status { step, ..Status::default() });
            Ok(())
        }
        Event::Rewind { session, position } => rewind(stage, sender, session, position),
        Event::EndSession { session } => rewind(stage, sender, session, 0),
        Event::Done { .. } => unreachable!("a link of a worker takes no answers"),
    }
}

fn rewind(stage: &mut LlamaStage, sender: &Sender, session: u32, position: u32) -> Result<(), LinkError> {
    stage.rewind_session(session, position).map_err(|error| fail(stage, sender, 0, &error))
}

/// Tells the host what this worker could not do, in its own words: block numbers of the model, and how many values.
fn fail(stage: &LlamaStage, sender: &Sender, step: u32, error: &Error) -> LinkError {
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
    let fault = Fault {
        step: (step > 0).then_some(step),
        block,
        count,
        ..Fault::new(code, stage.explain(error).to_string())
    };
    sender.fail(fault.clone());
    LinkErrorKind::Fault(fault).with("this worker")
}
