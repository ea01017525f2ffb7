//! A stage behind a connection: a worker, dialled again when it is lost.

use std::time::{Duration, Instant};

use dim_core::rows::{Rows, RowsRef};
use dim_core::stage::{RemoteStage, Span, StageError, Traffic};
use dim_wire::keys::Key;
use dim_wire::message::Farewell;
use dim_wire::terms::Terms;
use dim_wire::transport::{Counters, Event, Link, LinkError, LinkErrorKind, Timing, dial};

/// A worker that serves one stage.
pub struct WorkerStage {
    address: String,
    key: Key,
    terms: Terms,
    timing: Timing,
    step_limit: Duration,
    link: Option<Link>,
    /// the caller's number of each step without an answer, oldest first
    unanswered: std::collections::VecDeque<u64>,
    /// of the connections before this one
    earlier: Counters,
}

impl WorkerStage {
    /// Dials a worker. `terms` say what it has to hold and what this host needs; `step_limit` is the longest a
    /// single step may take (a worker that sends heartbeats but never an answer is given up then).
    ///
    /// # Errors
    /// There is no link; [`LinkError::may_pass`] tells whether trying again makes sense.
    pub fn connect(
        address: &str,
        key: &Key,
        terms: Terms,
        timing: Timing,
        step_limit: Duration,
    ) -> Result<WorkerStage, LinkError> {
        let mut stage = WorkerStage {
            address: address.to_owned(),
            key: key.clone(),
            terms,
            timing,
            step_limit,
            link: None,
            unanswered: std::collections::VecDeque::new(),
            earlier: Counters::default(),
        };
        stage.dial()?;
        Ok(stage)
    }

    /// What was agreed on with the worker.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    fn dial(&mut self) -> Result<(), LinkError> {
        self.hang_up();
        self.link = Some(dial(&self.address, &self.key, &self.terms, &self.timing)?);
        Ok(())
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            let counters = link.sender().counters();
            self.earlier.bytes_sent += counters.bytes_sent;
            self.earlier.bytes_received += counters.bytes_received;
            self.earlier.round_trips += counters.round_trips;
            link.sender().stop();
        }
        self.unanswered.clear();
    }

    fn link_mut(&mut self) -> Result<&mut Link, StageError> {
        self.link.as_mut().ok_or_else(|| StageError::Lost(format!("not connected to {}", self.address)))
    }

    /// A link's error as the pipeline sees it. The link is over unless nothing was sent.
    fn lost(&mut self, error: LinkError) -> StageError {
        if let LinkError { kind: LinkErrorKind::Misuse(_), .. } = error {
            return StageError::Failed(error.to_string());
        }
        self.hang_up();
        sort(error)
    }
}

/// Whether another attempt makes sense.
fn sort(error: LinkError) -> StageError {
    let text = error.to_string();
    match error {
        _ if error.is_pause() => StageError::Paused(text),
        _ if error.may_pass() => StageError::Lost(text),
        LinkError { kind: LinkErrorKind::Fault(_), .. } => StageError::Failed(text),
        _ => StageError::Refused(text),
    }
}

impl RemoteStage for WorkerStage {
    fn name(&self) -> String {
        format!("middle @ {}", self.address)
    }

    fn blocks(&self) -> Option<(u32, u32)> {
        Some((self.terms.blocks.first, self.terms.blocks.last))
    }

    fn submit(&mut self, id: u64, spans: &[Span], rows: &Rows) -> Result<(), StageError> {
        match self.link_mut()?.send_step(spans, rows.as_ref()) {
            Ok(_) => {
                self.unanswered.push_back(id);
                Ok(())
            }
            Err(e) => {
                // a worker that closed has usually said why before
                let e = self.link_mut()?.receiver().explain(e);
                Err(self.lost(e))
            }
        }
    }

    fn collect(&mut self, rows: &mut Rows) -> Result<(u64, Duration), StageError> {
        let deadline = Instant::now() + self.step_limit;
        let id = self.unanswered.front().copied();
        let received = match self.link_mut()?.receive(Some(deadline)) {
            Ok(Event::Done { rows: answer, compute, .. }) => {
                match (rows, answer) {
                    (Rows::F16(to), RowsRef::F16(from)) => {
                        to.clear();
                        to.extend_from_slice(from);
                    }
                    (Rows::F32(to), RowsRef::F32(from)) => {
                        to.clear();
                        to.extend_from_slice(from);
                    }
                    _ => return Err(StageError::Failed("the worker answered in another row format".into())),
                }
                Ok(compute)
            }
            Ok(_) => {
                return Err(StageError::Failed("the worker sent something that only a host sends".into()));
            }
            Err(e) => Err(e),
        };
        match (received, id) {
            (Ok(compute), Some(id)) => {
                self.unanswered.pop_front();
                Ok((id, compute))
            }
            (Ok(_), None) => Err(StageError::Failed("the worker answered a step it was not sent".into())),
            (Err(e), _) => Err(self.lost(e)),
        }
    }

    fn rewind(&mut self, session: u32, position: u32) -> Result<(), StageError> {
        let link = self.link_mut()?;
        if link.sender().session_length(session).is_some_and(|length| length <= position) {
            return Ok(());
        }
        match link.sender().rewind(session, position) {
            Ok(()) => Ok(()),
            Err(e) => Err(self.lost(e)),
        }
    }

    fn reconnect(&mut self) -> Result<(), StageError> {
        self.dial().map_err(sort)
    }

    fn traffic(&self) -> Traffic {
        let now = self.link.as_ref().map(|link| link.sender().counters()).unwrap_or_default();
        Traffic {
            bytes_sent: self.earlier.bytes_sent + now.bytes_sent,
            bytes_received: self.earlier.bytes_received + now.bytes_received,
            round_trips: self.earlier.round_trips + now.round_trips,
        }
    }
}

impl Drop for WorkerStage {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            link.close(Farewell::Finished);
        }
    }
}
