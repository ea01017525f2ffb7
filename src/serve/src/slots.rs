//! Slots: sessions of the library, each in a thread of its own, and the queue before them.
//!
//! ```text
//! submit --> [fair queue] --> the free slot that remembers most of the prompt --> thread: Session::generate --> updates
//! ```
//!
//! One lock, held for moments. A slot keeps its session from request to request, so that a prompt which begins as the one
//! before did is not evaluated anew. Whoever leaves sets a flag that the generation looks at behind every token.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dim::host::template::dialogue::{Answer, Message};
use dim::{Error, Host, Session};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;

use crate::cache::Cache;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::queue::FairQueue;
use crate::watch::Watch;
use crate::work::{Finish, Job, Logprobs, Timings, Update};

/// The slots of a server.
#[derive(Clone)]
pub(crate) struct Slots(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// of each slot: there is work, or the end
    wake: Vec<Condvar>,
    /// of the slots, while there is somebody who may wait for their end
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// what slots have let go of
    cache: Option<Cache>,
    metrics: Arc<Metrics>,
    watch: Watch,
    /// the longest that a slot waits for a client who does not read
    reader_timeout: Duration,
    runtime: Handle,
}

struct State {
    queue: FairQueue<Job>,
    slots: Vec<Slot>,
    is_closed: bool,
    /// of the next request
    next_id: u64,
    clock: u64,
}

impl State {
    fn n_busy(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_busy).count()
    }
}

#[derive(Default)]
struct Slot {
    work: Option<Job>,
    is_busy: bool,
    /// calls off what it is busy with
    running: Option<Arc<AtomicBool>>,
    /// what its caches hold, while nobody uses it
    tokens: Vec<i32>,
    used_at: u64,
}

/// A request that was taken in. Dropping it calls it off.
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    id: u64,
    is_cancelled: Arc<AtomicBool>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
        let mut state = self.shared.lock();
        drop(state.queue.remove(self.id));
        self.shared.count(&state);
    }
}

impl Slots {
    /// One for each session that `host` can have, and a queue of `bound` requests.
    #[allow(clippy::too_many_arguments)] // each of another kind, and given once
    pub(crate) fn open(
        host: &Arc<Host>,
        bound: usize,
        reader_timeout: Duration,
        cache: Option<Cache>,
        metrics: Arc<Metrics>,
        watch: Watch,
        runtime: Handle,
    ) -> Result<Slots, crate::ServeError> {
        let n = host.max_sessions();
        let state = State {
            queue: FairQueue::new(bound),
            slots: (0..n).map(|_| Slot::default()).collect(),
            is_closed: false,
            next_id: 0,
            clock: 0,
        };
        let wake = (0..n).map(|_| Condvar::new()).collect();
        let state = Mutex::new(state);
        let threads = Mutex::default();
        let shared =
            Arc::new(Shared { state, wake, threads, cache, metrics, watch, reader_timeout, runtime });
        for i in 0..n as usize {
            let session = host.session()?;
            let (its, host) = (Arc::clone(&shared), Arc::clone(host));
            let thread = std::thread::Builder::new().name(format!("slot {i}"));
            let thread = thread.spawn(move || its.serve(i, session, &host));
            lock(&shared.threads).push(thread.map_err(crate::ServeError::Threads)?);
        }
        Ok(Slots(shared))
    }

    /// Takes a job in.
    pub(crate) fn submit(&self, job: Job) -> Result<Ticket, ApiError> {
        let shared = &self.0;
        let (client, is_cancelled) = (job.client.clone(), Arc::clone(&job.is_cancelled));
        let mut state = shared.lock();
        if state.is_closed {
            return Err(ApiError::stopped());
        }
        let id = state.next_id;
        state.next_id += 1;
        // where a slot is free nobody waits: the queue's bound is for those who do
        let is_free = state.n_busy() < state.slots.len() && state.queue.len() == 0;
        let taken = match is_free {
            true => {
                shared.hand_out(&mut state, job);
                Ok(())
            }
            false => state.queue.push(&client, id, job).map_err(drop),
        };
        shared.count(&state);
        drop(state);
        match taken {
            Ok(()) => Ok(Ticket { shared: Arc::clone(shared), id, is_cancelled }),
            Err(()) => Err(ApiError::busy("too many requests are waiting", 2)),
        }
    }

    /// How many slots there are, how many of them are busy, and how many requests wait.
    pub(crate) fn load(&self) -> (usize, usize, usize) {
        let state = self.0.lock();
        (state.slots.len(), state.n_busy(), state.queue.len())
    }

    /// Ends every request, and takes no more.
    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        state.is_closed = true;
        while let Some(job) = state.queue.pop() {
            job.is_cancelled.store(true, Ordering::Relaxed);
        }
        state
            .slots
            .iter()
            .filter_map(|slot| slot.running.as_ref())
            .for_each(|r| r.store(true, Ordering::Relaxed));
        self.0.wake.iter().for_each(Condvar::notify_all);
    }

    /// After [`close`](Self::close): waits until what the slots hold is kept, where it is to be.
    pub(crate) fn finish(&self) {
        let Some(cache) = &self.0.cache else { return };
        for thread in std::mem::take(&mut *lock(&self.0.threads)) {
            let _ = thread.join();
        }
        cache.close();
    }
}

/// Of the free slots that were used longest ago, half of them all, the oldest; one beside a busy slot is before them: replies of
/// slots side by side go through llama.cpp in one pass.
fn oldest(slots: &[Slot]) -> Option<usize> {
    let mut free: Vec<usize> = (0..slots.len()).filter(|&i| !slots[i].is_busy).collect();
    free.sort_by_key(|&i| slots[i].used_at);
    let half = &free[..free.len().div_ceil(2)];
    let is_busy = |i: usize| slots.get(i).is_some_and(|slot| slot.is_busy);
    let is_beside = |i: &&usize| is_busy(**i + 1) || **i > 0 && is_busy(**i - 1);
    half.iter().find(is_beside).or(half.first()).copied()
}

/// The lock is left whole by whoever panics with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn count(&self, state: &State) {
        self.metrics.load(state.queue.len(), state.n_busy());
    }

    /// Gives a job to the free slot whose caches hold most of its first prompt; where none holds a tenth of it, to one of those
    /// that were used longest ago.
    fn hand_out(&self, state: &mut State, job: Job) {
        let prompt = job.prompts.first().map_or(&[][..], Vec::as_slice);
        let common = |held: &[i32]| held.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let free = || state.slots.iter().enumerate().filter(|(_, slot)| !slot.is_busy);
        let held = free().map(|(i, slot)| (common(&slot.tokens), std::cmp::Reverse(slot.used_at), i));
        let best = held.max().filter(|(n, ..)| n * 10 >= prompt.len());
        let Some(i) = best.map(|(_, _, i)| i).or_else(|| oldest(&state.slots)) else { return };
        let slot = &mut state.slots[i];
        slot.is_busy = true;
        slot.running = Some(Arc::clone(&job.is_cancelled));
        slot.work = Some(job);
        self.wake[i].notify_one();
    }

    /// A slot's thread.
    fn serve(&self, i: usize, session: Session, host: &Host) {
        let mut session = Some(session);
        while let Some(job) = self.next_job(i) {
            self.metrics.waited(job.came_at.elapsed());
            // a bug in one reply is not the end of the slot
            let done = catch_unwind(AssertUnwindSafe(|| {
                if let Some(session) = &mut session {
                    self.run(&job, session, host);
                }
            }));
            if done.is_err() {
                let _ = job.updates.try_send(Update::Failed(ApiError::new(
                    axum::http::StatusCode::INTERNAL_SERVER_ERROR,
                    "this is a bug: what the panic said stands in the server's log",
                )));
                // its place is free again before it is asked for
                drop(session.take());
                session = host.session().ok();
            }
            drop(job);
            let mut state = self.lock();
            state.clock += 1;
            let used_at = state.clock;
            let tokens = session.as_ref().map_or_else(Vec::new, |session| session.tokens().to_vec());
            state.slots[i] = Slot { is_busy: session.is_none(), tokens, used_at, ..Slot::default() };
            if session.is_some()
                && let Some(job) = state.queue.pop()
            {
                self.hand_out(&mut state, job);
            }
            self.count(&state);
        }
        if let (Some(cache), Some(session)) = (&self.cache, &mut session) {
            cache.keep(session);
        }
    }

    /// Waits for work; `None`: there will be none.
    fn next_job(&self, i: usize) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(job) = state.slots[i].work.take() {
                return Some(job);
            }
            state = self.wake[i].wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// All choices of a request, one after the other.
    fn run(&self, job: &Job, session: &mut Session, host: &Host) {
        let n = job.wanted.n as usize;
        for choice in 0..job.prompts.len() * n {
            if self.is_over(job) {
                return;
            }
            match self.choice(job, choice, &job.prompts[choice / n], session, host) {
                Ok(Some(ended)) => {
                    if !self.tell(job, ended) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    self.watch.failed(&error);
                    self.tell(job, Update::Failed(ApiError::from(&error)));
                    return;
                }
            }
        }
    }

    /// prompt -> tokens, each told as it comes; `None`: nobody wants it any more.
    fn choice(
        &self,
        job: &Job,
        choice: usize,
        prompt: &[i32],
        session: &mut Session,
        host: &Host,
    ) -> Result<Option<Update>, Error> {
        let wanted = &job.wanted;
        let began = Instant::now();
        self.take_prompt(job, prompt, session)?;
        let before = began.elapsed();
        let mut sampling = wanted.sampling.clone();
        let nth = u32::try_from(choice).unwrap_or(u32::MAX);
        // the last number means "any"
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(nth).min(u32::MAX - 1));
        sampling.constraint = job.constraint.clone();
        let generation = session.generate(sampling).limit(wanted.limit).ignore_eos(wanted.ignore_eos);
        let reading = job.reading.as_ref();
        let more_stops = reading.iter().flat_map(|reading| &reading.stops);
        let generation = generation.stop_at(wanted.stop.iter().chain(more_stops).cloned());
        let generation = generation.show(reading.iter().flat_map(|reading| reading.shown.iter().copied()));
        let mut generation = generation.stop_when(&job.is_cancelled);
        let mut answer = reading.map(|reading| Answer::new(&reading.parser)).transpose()?;
        let (mut so_far, mut first_at) = (Timings { prompt: prompt.len(), ..Timings::default() }, None);
        while let Some(token) = generation.next() {
            let token = token?;
            let first_at = *first_at.get_or_insert_with(|| {
                so_far.prompt_time = began.elapsed();
                self.metrics.first_token(job.came_at.elapsed());
                Instant::now()
            });
            so_far.predicted += 1;
            so_far.predicted_time = first_at.elapsed();
            self.metrics.token();
            self.watch.token();
            let bytes = |id| host.vocabulary().token_bytes(id).unwrap_or_default();
            let logprobs = wanted.top_logprobs.filter(|_| !token.is_end || wanted.ignore_eos);
            let logprobs = logprobs.map(|n| Logprobs::of(generation.logits(), token.id, n, bytes));
            let timings = wanted.timings_per_token.then_some(so_far);
            let said = match &mut answer {
                Some(answer) => answer.push(&token.text),
                None => Message { content: token.text, ..Message::default() },
            };
            if !self.tell(job, Update::Token { choice, id: token.id, said, logprobs, timings }) {
                return Ok(None);
            }
            if self.watch.is_due() {
                self.watch.hear_report(&generation.report(began));
            }
        }
        let report = generation.report(began);
        let mut timings = Timings::of(&report, prompt.len().saturating_sub(report.prompt_tokens));
        timings.prompt_time += before;
        self.metrics.prompt(timings.prompt, timings.cached);
        self.watch.hear_report(&report);
        let stop_text = generation.stop_text().and_then(|text| wanted.stop.iter().position(|s| s == text));
        let finish = Finish::of(report.stop, stop_text).filter(|_| !self.is_over(job));
        let Some(mut finish) = finish else { return Ok(None) };
        let said = answer.as_mut().map(Answer::finish).unwrap_or_default();
        let has_called = answer.is_some_and(|answer| !answer.message().calls.is_empty());
        if has_called && finish == Finish::Stop {
            finish = Finish::ToolCalls;
        }
        Ok(Some(Update::Ended { choice, said, finish, timings }))
    }

    /// Makes a session's tokens those of a prompt, with as much of it in the caches as is held or kept anywhere.
    fn take_prompt(&self, job: &Job, prompt: &[i32], session: &mut Session) -> Result<(), Error> {
        let may_reuse = job.wanted.cache_prompt;
        if let Some(cache) = &self.cache {
            cache.exchange(session, prompt, may_reuse, &job.is_cancelled)?;
        }
        if !may_reuse {
            session.set_tokens(&[])?;
        }
        session.set_tokens(prompt)
    }

    fn is_over(&self, job: &Job) -> bool {
        job.is_cancelled.load(Ordering::Relaxed) || self.lock().is_closed
    }

    /// Whether there is somebody who hears it. Who does not read for too long is as good as gone.
    fn tell(&self, job: &Job, update: Update) -> bool {
        let is_heard = match job.updates.try_send(update) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(update)) => {
                let sent = self.runtime.block_on(async {
                    tokio::time::timeout(self.reader_timeout, job.updates.send(update)).await
                });
                matches!(sent, Ok(Ok(())))
            }
        };
        if !is_heard {
            job.is_cancelled.store(true, Ordering::Relaxed);
            self.metrics.left();
        }
        is_heard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_beside_a_busy_one_goes_before_an_older_one_but_not_before_what_was_used_just_now() {
        let slots = |busy: &[usize], used_at: &[u64]| -> Vec<Slot> {
            let slot = |(i, &used_at)| Slot { is_busy: busy.contains(&i), used_at, ..Slot::default() };
            used_at.iter().enumerate().map(slot).collect()
        };
        assert_eq!(oldest(&slots(&[], &[0, 0, 0, 0])), Some(0));
        assert_eq!(oldest(&slots(&[2], &[1, 3, 9, 2, 8])), Some(3), "0 is older, 1 was used just now");
        assert_eq!(oldest(&slots(&[4], &[1, 3, 2, 8, 9])), Some(0), "3 was used just now");
        assert_eq!(oldest(&slots(&[0], &[9, 5])), Some(1));
        assert_eq!(oldest(&slots(&[0, 1], &[9, 5])), None);
    }
}
