//! What a run is told to the person (a short table on stderr) and to a program (one JSON object on stdout).

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model produced an end-of-generation token.
    EndOfGeneration,
    /// One of the texts came at which it was to stop.
    StopText,
    /// `-n` tokens were generated.
    Length,
    /// The context is full.
    ContextFull,
    /// The person stopped it.
    Interrupted,
    /// A stage failed; what came before is kept.
    Error,
}

/// One generation, whole: the same object for `generate` and `stock`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// `split` or `stock`.
    pub mode: String,
    /// The model's name.
    pub model: String,
    /// The generated token ids.
    pub tokens: Vec<i32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub stop: Stop,
    /// What failed, when an error ended it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// The seed of the sampler.
    pub seed: u32,
    /// Whether tokens were chosen at random: the seed then gives the same ones again.
    #[serde(default)]
    pub sampled: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens evaluated per second.
    pub prompt_tok_s: f64,
    /// Tokens generated per second, from the first token to the last.
    pub gen_tok_s: f64,
    /// From the start of the prompt's evaluation to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// From the start of the process to the first token, in milliseconds: loading included.
    pub start_to_first_token_ms: f64,
    /// From the start of the process until every stage was ready, in milliseconds.
    pub load_ms: f64,
    /// Time of the prompt and of the generation, in milliseconds.
    pub prompt_ms: f64,
    /// Time from the first token to the last, in milliseconds.
    pub gen_ms: f64,
    /// Time spent choosing tokens, in milliseconds.
    pub sample_ms: f64,
    /// The stages in pipeline order.
    pub stages: Vec<StageReport>,
    /// What crossed the network.
    pub wire: WireReport,
}

/// What one stage did while the prompt was evaluated and the tokens generated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StageReport {
    /// `head`, `middle`, `tail` or `model`, and where it runs.
    pub name: String,
    /// Its blocks, `first..last` inclusive.
    pub blocks: String,
    /// Time it computed, in milliseconds.
    pub compute_ms: f64,
    /// Time the host stood still for it beyond that (wire, queue), in milliseconds.
    pub wait_ms: f64,
    /// The generation's part of `compute_ms`.
    pub gen_compute_ms: f64,
    /// The generation's part of `wait_ms`.
    pub gen_wait_ms: f64,
    /// How often its worker was lost and found again.
    pub reconnects: u32,
}

/// Bytes on the sockets, of all workers together, handshakes and heartbeats included.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WireReport {
    /// `f16` or `f32`; `none` without a worker.
    pub dtype: String,
    /// Bytes the host sent.
    pub bytes_sent: u64,
    /// Bytes the host received.
    pub bytes_received: u64,
    /// Steps sent and answered.
    pub round_trips: u64,
    /// Bytes the host sent while it generated (the prompt and the handshake left out).
    pub gen_bytes_sent: u64,
    /// Bytes the host received while it generated.
    pub gen_bytes_received: u64,
}

/// Milliseconds with three decimals kept.
pub fn ms(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

/// Per second; 0 where nothing was measured.
pub fn per_second(count: usize, d: Duration) -> f64 {
    if count == 0 || d.is_zero() { 0.0 } else { count as f64 / d.as_secs_f64() }
}

/// `1234567` as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

impl Report {
    /// The steps in which tokens were generated: every token but the first costs one.
    fn gen_steps(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    /// The table for a person. Ends with a newline.
    pub fn table(&self) -> String {
        let mut t = String::new();
        let steps = self.gen_steps().max(1) as f64;
        let _ = writeln!(
            t,
            "prompt     {:>6} tokens  {:>9.2} tok/s   first token after {}",
            self.prompt_tokens,
            self.prompt_tok_s,
            seconds(self.ttft_ms)
        );
        let _ = writeln!(
            t,
            "generation {:>6} tokens  {:>9.2} tok/s   {}{}",
            self.tokens.len(),
            self.gen_tok_s,
            self.stop_text(),
            if self.sampled { format!("   --seed {}", self.seed) } else { String::new() }
        );
        let width = self.stages.iter().map(|s| s.name.chars().count()).max().unwrap_or(5).max(5);
        let _ = writeln!(t, "{:<width$}  {:>7}  {:>12}  {:>12}", "stage", "blocks", "compute", "wait");
        for s in &self.stages {
            let back =
                if s.reconnects > 0 { format!("   reconnected {}x", s.reconnects) } else { String::new() };
            let _ = writeln!(
                t,
                "{:<width$}  {:>7}  {:>9.3} ms  {:>9.3} ms{back}",
                s.name,
                s.blocks,
                s.gen_compute_ms / steps,
                s.gen_wait_ms / steps,
            );
        }
        if self.wire.round_trips > 0 {
            let _ = writeln!(
                t,
                "wire {}: {} bytes up, {} down per token; {} up, {} down in all",
                self.wire.dtype,
                thousands((self.wire.gen_bytes_sent as f64 / steps).round() as u64),
                thousands((self.wire.gen_bytes_received as f64 / steps).round() as u64),
                thousands(self.wire.bytes_sent),
                thousands(self.wire.bytes_received),
            );
        }
        t
    }

    fn stop_text(&self) -> &'static str {
        match self.stop {
            Stop::EndOfGeneration => "ended by the model",
            Stop::StopText => "ended at -r",
            Stop::Length => "ended at -n",
            Stop::ContextFull => "ended: the context is full (a larger one has room for more)",
            Stop::Interrupted => "stopped",
            Stop::Error => "ended by an error",
        }
    }
}

fn seconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_rates_never_divide_by_zero() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(per_second(0, Duration::from_secs(1)), 0.0);
        assert_eq!(per_second(5, Duration::ZERO), 0.0);
        assert_eq!(per_second(5, Duration::from_millis(500)), 10.0);
        assert_eq!(ms(Duration::from_micros(1_234)), 1.234);
    }
}
