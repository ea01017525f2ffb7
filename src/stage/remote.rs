//! A stage behind a connection: a worker, dialled again when it is lost.
//!
//! Dialling takes as long as it takes (5 s for a machine that is away, up to a minute for one that loads): it has a
//! thread of its own, which rings when it is over. A stage that goes calls it off.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::blocks::BlockRange;
use dim_core::ids::{JobId, SessionId};
use dim_core::rows::{Rows, RowsRef};
use dim_core::stage::{Answer, RemoteStage, Span, StageError, TakeBack, Traffic};
use dim_wire::keys::Key;
use dim_wire::message::{ErrorCode, Farewell, Fault};
use dim_wire::terms::{Reason, Terms};
use dim_wire::transport::{CallOff, Event, Link, LinkError, LinkErrorKind, Timing, dial_unless};

/// A worker that serves one stage.
pub struct WorkerStage {
    target: Target,
    step_limit: Duration,
    link: Option<Link>,
    /// an attempt to connect that is under way
    dialling: Option<Dialling>,
    bell: Option<Bell>,
    /// each step without an answer, oldest first
    unanswered: VecDeque<Unanswered>,
    /// a send failed, then: what the worker said before it closed may still be there to be read
    send_failed: Option<(LinkError, Instant)>,
    /// of the connections before this one
    earlier: Traffic,
}

/// An attempt to connect, in a thread of its own that does not outlive the interest in it.
struct Dialling {
    result: Receiver<Result<Link, LinkError>>,
    off: CallOff,
}

impl Drop for Dialling {
    fn drop(&mut self) {
        self.off.call_off();
    }
}

/// A step without an answer.
struct Unanswered {
    job: JobId,
    /// its number on the wire; `None`: it was not sent, because the link is over
    step: Option<u32>,
    /// since when the worker has had nothing before it to do
    since: Instant,
    /// nobody wants the answer, and the worker has been told
    is_called_off: bool,
}

/// Whom to dial, and how.
#[derive(Clone)]
struct Target {
    address: String,
    key: Key,
    terms: Terms,
    /// a worker that does not have as many sessions as the terms want may have so many
    least_sessions: u32,
    /// rows of the largest step that may have to be sent again as it was
    least_rows: u32,
    timing: Timing,
}

impl Target {
    fn dial(&self, off: &CallOff) -> Result<Link, LinkError> {
        let dial = |terms: &Terms| dial_unless(off, &self.address, &self.key, terms, &self.timing);
        let too_few =
            |error: &LinkError| matches!(error.kind, LinkErrorKind::Refused { reason: Reason::Sessions, .. });
        match dial(&self.terms) {
            Err(error) if too_few(&error) && self.least_sessions < self.terms.max_sessions => {
                dial(&Terms { max_sessions: self.least_sessions, ..self.terms.clone() })
            }
            dialled => dialled,
        }
    }
}

/// A worker with which there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("not connected to {address}")]
struct NotConnected {
    address: String,
}

/// A worker that was started again with smaller chunks. What it has to be told again has to go in the chunks in which it
/// went: others give other last bits.
#[derive(Debug, thiserror::Error)]
#[error(
    "{address} takes {has} rows at once now, and this was begun with {needed}: start it with a micro-batch of {needed}, or \
     begin anew"
)]
struct SmallerChunks {
    address: String,
    has: u32,
    needed: u32,
}

/// A worker that is heard and does not answer.
#[derive(Debug, thiserror::Error)]
#[error("{address} did not answer within {ms} ms")]
struct NoAnswer {
    address: String,
    ms: u128,
}

impl WorkerStage {
    /// Dials a worker. `terms` say what it has to hold and what this host wants; where it has fewer sessions, now or when
    /// it is dialled again, `least_sessions` of them will do. `step_limit` is the longest a single step may take (a
    /// worker that sends heartbeats but never an answer is given up then). `off` ends this dial, and no later one.
    ///
    /// # Errors
    /// There is no link; [`LinkError::may_pass`] tells whether trying again makes sense.
    pub fn connect(
        address: &str,
        key: &Key,
        terms: Terms,
        least_sessions: u32,
        timing: Timing,
        step_limit: Duration,
        off: &CallOff,
    ) -> Result<WorkerStage, LinkError> {
        let mut target = Target {
            address: address.to_owned(),
            key: key.clone(),
            terms,
            least_sessions,
            least_rows: 0,
            timing,
        };
        let link = target.dial(off)?;
        // what this host builds upon every worker that comes after this one has to be able to do
        let agreed = link.agreed();
        target.terms.take_back = agreed.take_back;
        target.least_rows = agreed.max_rows;
        target.terms.shape = agreed.shape.clone();
        let peer = link.peer_terms();
        (target.terms.input, target.terms.output) = (peer.input, peer.output);
        Ok(WorkerStage {
            target,
            step_limit,
            link: Some(link),
            dialling: None,
            bell: None,
            unanswered: VecDeque::new(),
            send_failed: None,
            earlier: Traffic::default(),
        })
    }

    /// What was agreed on with the worker.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            self.earlier += link.sender().traffic();
            link.sender().stop();
        }
        self.unanswered.clear();
        self.send_failed = None;
    }

    fn not_connected(&self) -> StageError {
        StageError::lost(NotConnected { address: self.target.address.clone() })
    }

    /// The link is over.
    fn over(&mut self, error: LinkError) -> StageError {
        self.hang_up();
        sort(error)
    }

    /// What sending came to. Of a link that is over [`poll`](RemoteStage::poll) tells, after what the worker may have
    /// said before.
    fn sent(&mut self, result: Result<(), LinkError>) -> Result<(), StageError> {
        match result {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind, LinkErrorKind::Misuse(_)) => Err(StageError::failed(error)),
            Err(error) => {
                self.send_failed.get_or_insert((error, Instant::now()));
                if let Some(bell) = &self.bell {
                    bell.ring();
                }
                Ok(())
            }
        }
    }

    /// When the oldest step has taken too long.
    fn step_deadline(&self) -> Option<Instant> {
        // a limit beyond all times is none
        self.unanswered.front().and_then(|step| step.since.checked_add(self.step_limit))
    }

    /// When a link that cannot be written to is given up, whatever may still be read from it.
    fn last_words_until(&self) -> Option<Instant> {
        self.send_failed.as_ref().map(|(_, at)| *at + LAST_WORDS)
    }

    /// An answer from the link: `receive` takes the next event from it, `None` if there is none yet.
    fn answer(
        &mut self,
        rows: &mut Rows,
        receive: impl FnOnce(&mut Link) -> Result<Option<Event<'_>>, LinkError>,
    ) -> Result<Option<Answer>, StageError> {
        let Some(link) = &mut self.link else { return Err(self.not_connected()) };
        let answered = match receive(link) {
            Ok(None) => return self.nothing_yet(),
            Ok(Some(Event::Done { rows: values, compute, wait, .. })) => {
                copy(values, rows).map(|()| (compute, wait, None))
            }
            Ok(Some(Event::Failed { fault, .. })) => {
                let failed = fault.map_or(StageError::Void, |fault| of_step(fault, link.peer()));
                Ok((Duration::ZERO, Duration::ZERO, Some(failed)))
            }
            Ok(Some(_)) => Err(StageError::NoAnswer),
            Err(error) => {
                // a broken link says less than what broke it
                let says_less = matches!(error.kind, LinkErrorKind::Broken { .. } | LinkErrorKind::Closed);
                let error = match self.send_failed.take_if(|_| says_less) {
                    Some((first, _)) => first,
                    None => error,
                };
                return Err(self.over(error));
            }
        };
        let done = answered.and_then(|(compute, wait, failed)| match self.unanswered.pop_front() {
            Some(Unanswered { job, .. }) => Ok(Answer { job, compute, wait, failed }),
            None => Err(StageError::Unasked),
        });
        if let Some(next) = self.unanswered.front_mut() {
            next.since = Instant::now();
        }
        done.map(Some).inspect_err(|_| self.hang_up())
    }

    /// There is no answer: is it too late for one?
    fn nothing_yet(&mut self) -> Result<Option<Answer>, StageError> {
        let now = Instant::now();
        if self.last_words_until().is_some_and(|until| now >= until)
            && let Some((error, _)) = self.send_failed.take()
        {
            return Err(self.over(error));
        }
        if self.step_deadline().is_some_and(|deadline| now >= deadline) {
            let (address, ms) = (self.target.address.clone(), self.step_limit.as_millis());
            self.hang_up();
            return Err(StageError::lost(NoAnswer { address, ms }));
        }
        Ok(None)
    }
}

/// Whether another attempt makes sense, and whose fault it is.
fn sort(error: LinkError) -> StageError {
    match &error.kind {
        LinkErrorKind::Fault(fault) if fault.code.is_of_values() => of_step(fault.clone(), &error.peer),
        _ if error.is_pause() => StageError::paused(error),
        _ if error.may_pass() => StageError::lost(error),
        LinkErrorKind::Fault(_) => StageError::failed(error),
        _ => StageError::refused(error),
    }
}

/// The same of a worker that was connected before. What was said before its key was proven, anybody can have said: who
/// took its address, a page of a hotel's network, a worker that is only starting. It counts as a worker that is away.
fn sort_unproven(error: LinkError) -> StageError {
    match error.kind {
        LinkErrorKind::Handshake(_) => StageError::lost(error),
        _ => sort(error),
    }
}

/// What a worker said of one step.
fn of_step(fault: Fault, peer: &str) -> StageError {
    let (code, block, count) = (fault.code, fault.block, fault.count.into());
    let error = LinkErrorKind::Fault(fault).with(peer);
    match code {
        ErrorCode::NonFinite => StageError::NotFinite { block, count, said: Some(Arc::new(error)) },
        ErrorCode::Overflow => {
            StageError::TooLargeForF16 { block, count, max_abs: None, said: Some(Arc::new(error)) }
        }
        _ => StageError::failed(error),
    }
}

fn copy(from: RowsRef<'_>, to: &mut Rows) -> Result<(), StageError> {
    match (to, from) {
        (Rows::F16(to), RowsRef::F16(from)) => {
            to.clear();
            to.extend_from_slice(from);
        }
        (Rows::F32(to), RowsRef::F32(from)) => {
            to.clear();
            to.extend_from_slice(from);
        }
        (to, _) => return Err(StageError::OtherRowType { expected: to.row_type() }),
    }
    Ok(())
}

impl RemoteStage for WorkerStage {
    fn name(&self) -> String {
        format!("middle @ {}", self.target.address)
    }

    fn blocks(&self) -> Option<BlockRange> {
        Some(self.target.terms.blocks)
    }

    fn max_in_flight(&self) -> usize {
        self.link.as_ref().map_or(1, |link| link.agreed().max_in_flight as usize)
    }

    fn reads_tokens(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.agreed().shape.reads_tokens)
    }

    fn take_back(&self) -> TakeBack {
        self.target.terms.take_back
    }

    fn n_sessions(&self) -> u32 {
        self.link.as_ref().map_or(self.target.least_sessions, |link| link.agreed().max_sessions)
    }

    fn submit(&mut self, job: JobId, spans: &[Span], tokens: &[i32], rows: &Rows) -> Result<(), StageError> {
        let Some(link) = &self.link else { return Err(self.not_connected()) };
        let result = link.send_step(spans, tokens, rows.as_ref());
        let step = result.as_ref().ok().copied();
        self.sent(result.map(drop))?;
        self.unanswered.push_back(Unanswered { job, step, since: Instant::now(), is_called_off: false });
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        let unanswered = self.unanswered.iter_mut().find(|step| step.job == job && !step.is_called_off);
        let Some((link, unanswered)) = self.link.as_ref().zip(unanswered) else { return };
        let Some(step) = unanswered.step else { return };
        unanswered.is_called_off = true;
        let result = link.sender().cancel(step);
        // of a link that is over the next poll tells
        let _ = self.sent(result);
    }

    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        self.answer(rows, |link| link.receiver().try_receive())
    }

    fn collect_until(
        &mut self,
        rows: &mut Rows,
        deadline: Option<Instant>,
    ) -> Result<Option<Answer>, StageError> {
        let limits = self.step_deadline().into_iter().chain(self.last_words_until());
        let until = deadline.into_iter().chain(limits).min();
        self.answer(rows, |link| match link.receive(until) {
            Ok(event) => Ok(Some(event)),
            Err(error) if matches!(error.kind, LinkErrorKind::Deadline { .. }) => Ok(None),
            Err(error) => Err(error),
        })
    }

    fn notify(&mut self, bell: Option<Bell>) {
        if let Some(link) = &mut self.link {
            link.receiver().notify(bell.clone());
        }
        self.bell = bell;
    }

    fn poll_at(&self) -> Option<Instant> {
        self.step_deadline().into_iter().chain(self.last_words_until()).min()
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        let Some(link) = &self.link else { return Err(self.not_connected()) };
        if link.sender().session_length(session.0).is_some_and(|length| length <= position) {
            return Ok(());
        }
        let result = link.sender().rewind(session.0, position);
        self.sent(result)
    }

    fn begin_reconnect(&mut self, bell: &Bell) {
        self.hang_up();
        let ((sender, result), off) = (channel(), CallOff::new());
        let (target, bell, called) = (self.target.clone(), bell.clone(), off.clone());
        self.dialling = Some(Dialling { result, off });
        let dialler = std::thread::Builder::new().name("dim-dial".into()).spawn(move || {
            // a stage that is gone meanwhile drops the link, which closes it
            let _ = sender.send(target.dial(&called));
            bell.ring();
        });
        // without a thread the channel is closed, and `poll_connected` says so
        drop(dialler);
    }

    fn poll_connected(&mut self) -> Result<bool, StageError> {
        let Some(dialling) = &self.dialling else {
            return if self.link.is_some() { Ok(true) } else { Err(self.not_connected()) };
        };
        let result = match dialling.result.try_recv() {
            Ok(result) => result,
            Err(TryRecvError::Empty) => return Ok(false),
            Err(TryRecvError::Disconnected) => {
                self.dialling = None;
                return Err(self.not_connected());
            }
        };
        self.dialling = None;
        let link = result.map_err(sort_unproven)?;
        let (has, needed) = (link.agreed().max_rows, self.target.least_rows);
        if has < needed {
            let address = self.target.address.clone();
            return Err(StageError::refused(SmallerChunks { address, has, needed }));
        }
        let link = self.link.insert(link);
        link.receiver().notify(self.bell.clone());
        Ok(true)
    }

    fn traffic(&self) -> Traffic {
        let now = self.link.as_ref().map(|link| link.sender().traffic()).unwrap_or_default();
        self.earlier + now
    }
}

impl Drop for WorkerStage {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            link.close(Farewell::Finished);
        }
    }
}

/// How long a link that cannot be written to any more is read, for what its worker said before it closed.
const LAST_WORDS: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use std::io::sink;
    use std::net::TcpListener;

    use dim_core::digest::Sha;
    use dim_wire::RowTypes;
    use dim_wire::rows::Shape;
    use dim_wire::terms::SliceRole;
    use dim_wire::transport::{Listener, ListenerConfig, Readiness};

    use super::*;

    /// A worker was lost, and somebody who says nothing has its address: the host that dials it is gone before he speaks.
    #[test]
    fn a_stage_that_goes_while_it_dials_leaves_neither_a_thread_nor_a_connection() {
        let terms = Terms {
            row_types: RowTypes::F32,
            role: SliceRole::Middle,
            shape: Shape::hidden(64),
            n_blocks: 4,
            blocks: BlockRange { first: 1, last: 2 },
            n_ctx: 64,
            max_rows: 64,
            max_sessions: 1,
            max_in_flight: 4,
            model: Some(Sha([1; 32])),
            slice: Some(Sha([2; 32])),
            params: Some(Sha([3; 32])),
            arch: "qwen2".into(),
            ..Terms::blank(0, "test 0", "test")
        };
        let key = Key::from_bytes([7; 32]);
        let readiness = Readiness::Ready(terms.clone());
        let config = ListenerConfig {
            keys: Arc::new(key.clone()),
            readiness,
            timing: Timing::default(),
            notice: Box::new(|_| {}),
        };
        let listener = Listener::bind("127.0.0.1:0", config).unwrap();
        let address = listener.address().to_string();
        // nothing else ends it
        let timing = Timing { opening: Duration::from_secs(3600), ..Timing::default() };
        let mut stage =
            WorkerStage::connect(&address, &key, terms, 1, timing, Duration::from_secs(60), &CallOff::new())
                .unwrap();
        drop(listener);
        let silent = TcpListener::bind(&address).unwrap();

        let bell = Bell::new();
        stage.begin_reconnect(&bell);
        let mut peer = silent.accept().unwrap().0;
        assert!(!stage.poll_connected().unwrap());
        drop(stage);
        std::io::copy(&mut peer, &mut sink()).expect("the connection is closed");
        assert!(bell.wait(Some(Instant::now() + Duration::from_secs(60))), "the thread goes on");
    }
}
