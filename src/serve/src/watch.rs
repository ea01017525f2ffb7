//! What goes on, for `/health`, `/props` and the page: the host's events and the last reply's report.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dim::event::Placement;
use dim::host::report::Report;
use dim::{Error, Event};
use serde_json::{Value, json};

/// What is known of a server's host; clones are the same.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    stages: Vec<Placement>,
    n_blocks: u32,
    /// by the names of stages
    away: BTreeMap<String, Away>,
    n_lost: u64,
    /// workers whose blocks run here instead
    fallen_back: Vec<String>,
    report: Option<Value>,
    report_at: Option<Instant>,
    /// when tokens came lately
    recent: std::collections::VecDeque<Instant>,
}

impl State {
    /// A worker's blocks run here from now on; in the middle of a reply, once their cache is filled.
    fn fell_back(&mut self, stage: &str, by: &str, steps: usize) {
        let away = self.away.remove(stage);
        if let Some(away) = away.filter(|_| steps > 0) {
            let reason = "its blocks run here, and their cache is filled".to_owned();
            self.away.insert(by.to_owned(), Away { state: "replaying", reason, ..away });
        }
        for placement in &mut self.stages {
            placement.worker.take_if(|address| stage.ends_with(address.as_str()));
        }
        self.fallen_back.push(stage.to_owned());
    }
}

struct Away {
    state: &'static str,
    reason: String,
    since: Instant,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears of what happens to the host: to be called with each of its events.
    pub fn hear(&self, event: &Event) {
        let mut state = self.lock();
        let mut away = |stage: &String, what, reason: &str| {
            let since = state.away.get(stage).map_or_else(Instant::now, |away| away.since);
            state.away.insert(stage.clone(), Away { state: what, reason: reason.to_owned(), since });
        };
        match event {
            Event::Ready { stages, n_blocks } => {
                (state.stages, state.n_blocks) = (stages.clone(), *n_blocks);
            }
            Event::Lost { stage, reason, .. } => {
                away(stage, "lost", reason);
                state.n_lost += 1;
            }
            Event::Paused { stage, reason, .. } => away(stage, "paused", reason),
            Event::Replaying { stage, .. } => {
                away(stage, "replaying", "it answers again, and its cache is filled")
            }
            Event::FellBack { stage, by, steps } => state.fell_back(stage, by, *steps),
            Event::Back { stage, .. } => drop(state.away.remove(stage)),
            _ => {}
        }
    }

    /// A request has ended with an error: whoever was looked for then is given up, until the next one needs it.
    pub(crate) fn failed(&self, error: &Error) {
        if let Error::Pipeline(_) = error {
            self.lock().away.values_mut().for_each(|away| away.state = "given up");
        }
    }

    pub(crate) fn token(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        state.recent.push_back(now);
        while state.recent.front().is_some_and(|at| now - *at > RECENT) {
            state.recent.pop_front();
        }
    }

    /// Whether a report under way would be news.
    pub(crate) fn is_due(&self) -> bool {
        self.lock().report_at.is_none_or(|at| at.elapsed() > Duration::from_secs(1))
    }

    pub(crate) fn hear_report(&self, report: &Report) {
        let steps = report.tokens.len().saturating_sub(1).max(1) as f64;
        let stage = |s: &dim::host::report::StageReport| {
            json!({
                "name": s.name,
                "blocks": s.blocks,
                "compute_ms": s.gen_compute_ms / steps,
                "wait_ms": s.gen_wait_ms / steps,
                "reconnects": s.reconnects,
            })
        };
        let stages: Vec<Value> = report.stages.iter().map(stage).collect();
        let value = json!({
            "stages": stages,
            "wire": {
                "dtype": report.wire.dtype,
                "bytes_sent_per_token": report.wire.gen_bytes_sent as f64 / steps,
                "bytes_received_per_token": report.wire.gen_bytes_received as f64 / steps,
            },
        });
        let mut state = self.lock();
        (state.report, state.report_at) = (Some(value), Some(Instant::now()));
    }

    /// Whether somebody is waited for, and for whom.
    pub(crate) fn waits_for(&self) -> Option<String> {
        self.lock().away.iter().find(|(_, away)| away.state != "given up").map(|(stage, _)| stage.clone())
    }

    /// `/health`.
    pub(crate) fn health(&self, is_loaded: bool) -> Value {
        let state = self.lock();
        let status = match (is_loaded, state.away.is_empty()) {
            (false, _) => "loading model",
            (true, true) => "ok",
            (true, false) => "waiting for a worker",
        };
        let away = |(stage, away): (&String, &Away)| {
            json!({
                "stage": stage,
                "state": away.state,
                "reason": away.reason,
                "since_s": away.since.elapsed().as_secs_f64(),
            })
        };
        json!({
            "status": status,
            "away": state.away.iter().map(away).collect::<Vec<_>>(),
            "lost": state.n_lost,
            "fallen_back": state.fallen_back,
        })
    }

    /// The picture of the split.
    pub(crate) fn picture(&self, is_loaded: bool) -> Value {
        let health = self.health(is_loaded);
        let state = self.lock();
        let stages: Vec<Value> = state
            .stages
            .iter()
            .map(|p| json!({"role": p.role.to_string(), "blocks": p.blocks.to_string(), "worker": p.worker}))
            .collect();
        let now = Instant::now();
        let recent = state.recent.iter().filter(|at| now - **at <= RECENT).count();
        json!({
            "health": health,
            "n_blocks": state.n_blocks,
            "stages": stages,
            "tok_s": recent as f64 / RECENT.as_secs_f64(),
            "last": state.report,
        })
    }
}

/// Over which tokens a second are counted.
const RECENT: Duration = Duration::from_secs(5);
