//! What a slot is given to do, and what it tells of it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use dim::Constraint;
use dim::host::report::{Report, Stop};
use dim::host::template::dialogue::Message;
use tokio::sync::mpsc;

use crate::error::ApiError;
use crate::queue::Client;
use crate::request::Wanted;

/// A request on its way to a slot.
pub(crate) struct Job {
    pub client: Client,
    /// each at least one token, and no more than the context has positions
    pub prompts: Vec<Vec<i32>>,
    pub wanted: Arc<Wanted>,
    /// what every choice has to be, compiled
    pub constraint: Option<Constraint>,
    /// how what is said is read, where it is more than text
    pub reading: Option<Reading>,
    /// who wanted it hears of it here; nobody waits longer than a bound for room in it
    pub updates: mpsc::Sender<Update>,
    /// nobody wants it any more
    pub is_cancelled: Arc<AtomicBool>,
    pub came_at: Instant,
}

/// How an answer is read that may have parts: reasoning, calls of tools.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// what [`Answer`](dim::host::template::dialogue::Answer) takes
    pub parser: String,
    /// control tokens that it looks for
    pub shown: Vec<i32>,
    /// texts at which an answer ends too
    pub stops: Vec<String>,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Update {
    /// A token was chosen.
    Token { choice: usize, id: i32, said: Message, logprobs: Option<Logprobs>, timings: Option<Timings> },
    /// A choice is complete; `said`: what was known only then.
    Ended { choice: usize, said: Message, finish: Finish, timings: Timings },
    /// Nothing follows.
    Failed(ApiError),
}

/// Why a choice is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    /// at one of the texts that were asked for, by its place in the list
    StopText(usize),
    Length,
    /// it called tools
    ToolCalls,
}

impl Finish {
    /// `stop_text`: which one came, if one did. `None`: it was called off.
    pub(crate) fn of(stop: Stop, stop_text: Option<usize>) -> Option<Finish> {
        match stop {
            Stop::StopText => Some(stop_text.map_or(Finish::Stop, Finish::StopText)),
            Stop::EndOfGeneration => Some(Finish::Stop),
            Stop::Length | Stop::ContextFull => Some(Finish::Length),
            Stop::Interrupted | Stop::Error => None,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Finish::Stop | Finish::StopText(_) => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// A token, and how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Likely {
    pub id: i32,
    pub bytes: Vec<u8>,
    /// natural logarithm of its probability, before anything was done to it
    pub logprob: f32,
}

/// How likely the chosen token was, and the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Logprobs {
    pub chosen: Likely,
    pub top: Vec<Likely>,
}

impl Logprobs {
    /// Of `logits` (n_vocab), the chosen token and the `n_top` likeliest, likeliest first; `bytes` says a token's.
    pub(crate) fn of(logits: &[f32], chosen: i32, n_top: usize, bytes: impl Fn(i32) -> Vec<u8>) -> Logprobs {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
        let log_sum = f64::from(largest) + sum.ln();
        let likely = |id: i32| {
            let logit = usize::try_from(id).ok().and_then(|i| logits.get(i)).copied();
            // JSON knows no infinity: as OpenAI writes a token that could not come
            let logprob = logit.map_or(-9999.0, |l| (f64::from(l) - log_sum).max(-9999.0) as f32);
            Likely { id, bytes: bytes(id), logprob }
        };
        let mut ids: Vec<i32> = (0..).take(logits.len()).collect();
        let n_top = n_top.min(ids.len());
        let descending =
            |a: &i32, b: &i32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if n_top > 0 && n_top < ids.len() {
            ids.select_nth_unstable_by(n_top - 1, descending);
        }
        ids.truncate(n_top);
        ids.sort_unstable_by(descending);
        Logprobs { chosen: likely(chosen), top: ids.into_iter().map(likely).collect() }
    }
}

/// How long a choice took, as llama-server says it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timings {
    /// tokens of the prompt that the caches held
    pub cached: usize,
    /// tokens of the prompt that were evaluated
    pub prompt: usize,
    pub prompt_time: Duration,
    pub predicted: usize,
    pub predicted_time: Duration,
}

impl Timings {
    pub(crate) fn of(report: &Report, cached: usize) -> Timings {
        Timings {
            cached,
            prompt: report.prompt_tokens,
            prompt_time: Duration::from_secs_f64(report.prompt_ms / 1e3),
            predicted: report.tokens.len(),
            predicted_time: Duration::from_secs_f64(report.gen_ms / 1e3),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_likeliest_come_first() {
        let logits = [0.5, 2.0, -1.0, 2.0];
        let all = Logprobs::of(&logits, 2, 9, |id| vec![id as u8]);
        assert_eq!(all.top.iter().map(|likely| likely.id).collect::<Vec<_>>(), [1, 3, 0, 2]);
        let sum: f32 = all.top.iter().map(|likely| likely.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!((all.chosen.id, all.chosen.logprob), (2, all.top[3].logprob));
        assert_eq!(Logprobs::of(&logits, 0, 2, |_| Vec::new()).top.len(), 2);
        assert_eq!(Logprobs::of(&logits, 0, 0, |_| Vec::new()).top.len(), 0);
        let banned = Logprobs::of(&[0.0, f32::NEG_INFINITY], 1, 0, |_| Vec::new());
        assert_eq!(banned.chosen.logprob, -9999.0);
    }
}
