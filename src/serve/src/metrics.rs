//! `/metrics`, in Prometheus' text format.

use std::time::Duration;

use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// What is counted.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Counter,
    refused: Counter,
    left: Counter,
    tokens: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    restored_tokens: Counter,
    waiting: Gauge,
    busy: Gauge,
    connections: Gauge,
    wait_s: Histogram,
    first_token_s: Histogram,
}

/// In seconds: from a token's time to what patience allows.
const BUCKETS: [f64; 10] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let mut registry = Registry::with_prefix("dim");
        let r = &mut registry;
        Metrics {
            requests: counter(r, "requests", "Requests for tokens that were taken in"),
            refused: counter(r, "requests_refused", "Requests that ended with an error"),
            left: counter(r, "clients_left", "Replies whose client left or did not read"),
            tokens: counter(r, "generated_tokens", "Tokens generated"),
            prompt_tokens: counter(r, "prompt_tokens", "Tokens of prompts that were evaluated"),
            cached_tokens: counter(r, "prompt_tokens_cached", "Tokens of prompts that the caches held"),
            restored_tokens: counter(r, "prompt_tokens_restored", "Tokens put back from kept prompts"),
            waiting: gauge(r, "requests_waiting", "Requests that wait for a slot"),
            busy: gauge(r, "slots_busy", "Slots that generate"),
            connections: gauge(r, "connections", "Open connections"),
            wait_s: seconds(r, "slot_wait_seconds", "Time from a request to its slot"),
            first_token_s: seconds(r, "first_token_seconds", "Time from a request to its first token"),
            registry,
        }
    }

    pub(crate) fn request(&self) {
        self.requests.inc();
    }

    pub(crate) fn refused(&self) {
        self.refused.inc();
    }

    pub(crate) fn left(&self) {
        self.left.inc();
    }

    pub(crate) fn token(&self) {
        self.tokens.inc();
    }

    pub(crate) fn prompt(&self, evaluated: usize, cached: usize) {
        self.prompt_tokens.inc_by(evaluated as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    pub(crate) fn restored(&self, tokens: usize) {
        self.restored_tokens.inc_by(tokens as u64);
    }

    pub(crate) fn load(&self, waiting: usize, busy: usize) {
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.busy.set(i64::try_from(busy).unwrap_or(i64::MAX));
    }

    pub(crate) fn connections(&self, n: usize) {
        self.connections.set(i64::try_from(n).unwrap_or(i64::MAX));
    }

    pub(crate) fn waited(&self, time: Duration) {
        self.wait_s.observe(time.as_secs_f64());
    }

    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token_s.observe(time.as_secs_f64());
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // writing into a String does not fail
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    registered(registry, name, help, Counter::default())
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    registered(registry, name, help, Gauge::default())
}

fn seconds(registry: &mut Registry, name: &str, help: &str) -> Histogram {
    registered(registry, name, help, Histogram::new(BUCKETS))
}

/// `metric`, of which the registry keeps a clone: both are the same.
fn registered<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}
