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
use dim_core::stage::{StageError, StageInput, StageOutput, n_rows};
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
            let n_rows = n_rows(spans);
            let start = Instant::now();
            let result = stage.run(spans, StageInput::Rows { rows, tokens }, StageOutput::Rows(out));
            match result {
                Ok(compute) => {
                    let time = ComputeTime { began: start, compute, wait };
                    sender.send_done(step, n_rows, out.as_ref(), time)?;
                }
                Err(error) => {
                    let fault = fault(stage, Some(step), &error);
                    match fault.code.is_of_values() {
                        // of its sessions only: the others go on
                        true => receiver.step_failed(fault)?,
                        false => return Err(leave(sender, fault)),
                    }
                }
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
    stage.rewind_session(session, position).map_err(|error| leave(sender, fault(stage, None, &error)))
}

/// Tells the host what this worker could not do, and leaves.
fn leave(sender: &Sender, fault: Fault) -> LinkError {
    sender.fail(fault.clone());
    LinkErrorKind::Fault(fault).with("this worker")
}

/// What this worker could not do, in the host's words: block numbers of the model, and how many values.
fn fault(stage: &LlamaStage, step: Option<u32>, error: &Error) -> Fault {
    let explained = stage.explain(error);
    let (code, block, count) = match explained {
        StageError::NotFinite { block, count, .. } => (ErrorCode::NonFinite, block, count),
        StageError::TooLargeForF16 { block, count, .. } => (ErrorCode::Overflow, block, count),
        _ if matches!(error, Error::OutOfMemory(_)) => (ErrorCode::NoMemory, None, 0),
        _ => (ErrorCode::Compute, None, 0),
    };
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    Fault { step, block, count, ..Fault::new(code, explained.to_string()) }
}
