//! Logits to a token, by llama.cpp's own samplers in the order `llama-cli` chains them.

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llama_cpp_2::token::logit_bias::LlamaLogitBias;

use crate::error::BadOption;
use crate::host::constraint::{Constraint, ConstraintError, Follower};

/// How a token is chosen, with llama.cpp's words and defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Temperature; 0 takes the most likely token each time (greedy), and so does everything below a millionth.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens (0 or -1 = all).
    pub top_k: i32,
    /// Keep the most likely tokens that together have this probability (1 = all).
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one (0 = none).
    pub min_p: f32,
    /// Seed of the random choice, below 4294967295; `None`: a new one each time.
    pub seed: Option<u32>,
    /// Penalty on tokens seen lately (1 = none).
    pub repeat_penalty: f32,
    /// How many of the last tokens the penalties look at (-1: all of them).
    pub repeat_last_n: i32,
    /// Penalty on tokens by how often they were seen (0 = none).
    pub frequency_penalty: f32,
    /// Penalty on tokens that were seen at all (0 = none).
    pub presence_penalty: f32,
    /// Added to tokens' logits before everything else; minus infinity: never that one.
    pub logit_bias: Vec<(i32, f32)>,
    /// What the reply has to be: tokens that may not follow are not chosen from, whatever else is said here, and the reply
    /// ends where it is complete.
    pub constraint: Option<Constraint>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            seed: None,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            constraint: None,
        }
    }
}

impl Sampling {
    /// The most likely token each time.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Checks every value before it reaches C code.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn check(&self) -> Result<(), BadOption> {
        let float = |option, value: f32, ok: bool, rule| match value.is_finite() && ok {
            true => Ok(()),
            false => Err(BadOption::new(option, value, rule)),
        };
        let int = |option, value: i32, ok: bool, rule| match ok {
            true => Ok(()),
            false => Err(BadOption::new(option, value, rule)),
        };
        // llama.cpp takes its largest number for "any": the same seed would not give the same text
        if self.seed == Some(u32::MAX) {
            return Err(BadOption::new("seed", u32::MAX, "0 to 4294967294, or -1 for a new one each time"));
        }
        float("temperature", self.temperature, self.temperature >= 0.0, "a number >= 0")?;
        float("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "between 0 and 1")?;
        float("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1")?;
        float("repeat_penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "a number > 0")?;
        float("frequency_penalty", self.frequency_penalty, true, "a finite number")?;
        float("presence_penalty", self.presence_penalty, true, "a finite number")?;
        let is_bias =
            |&(token, bias): &(i32, f32)| token >= 0 && (bias.is_finite() || bias == f32::NEG_INFINITY);
        if let Some((token, bias)) = self.logit_bias.iter().find(|bias| !is_bias(bias)) {
            return Err(BadOption::new("logit_bias", format!("{token}: {bias}"), "a token and a number"));
        }
        int("top_k", self.top_k, self.top_k >= -1, "-1 or more")?;
        let last_n = -1..=65_536;
        int("repeat_last_n", self.repeat_last_n, last_n.contains(&self.repeat_last_n), "-1 to 65536")
    }
}

/// A chain of samplers with its history and its random state.
#[derive(Debug)]
pub struct Sampler {
    chain: LlamaSampler,
    candidates: LlamaTokenDataArray,
    constraint: Option<Follower>,
    seed: u32,
    random: bool,
}

impl Sampler {
    /// The chain for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// An option is out of range, or the constraint is of another vocabulary.
    pub fn new(options: &Sampling, n_vocab: usize) -> Result<Sampler, BadOption> {
        options.check()?;
        let foreign = || BadOption::new("constraint", "of another model", "made by the host that follows it");
        let constraint = options.constraint.as_ref().map(|c| c.follow(n_vocab).ok_or_else(foreign));
        let seed = options.seed.unwrap_or_else(random_seed);
        let n_vocab_c = i32::try_from(n_vocab).unwrap_or(i32::MAX);
        let penalties = LlamaSampler::penalties(
            n_vocab_c,
            if options.repeat_last_n < 0 { ALL_TOKENS } else { options.repeat_last_n },
            options.repeat_penalty,
            options.frequency_penalty,
            options.presence_penalty,
        );
        let biases = options.logit_bias.iter().filter(|(token, _)| *token < n_vocab_c);
        let biases: Vec<_> =
            biases.map(|&(token, bias)| LlamaLogitBias::new(LlamaToken(token), bias)).collect();
        let bias = LlamaSampler::logit_bias(n_vocab_c, &biases);
        let random = options.temperature >= LEAST_TEMPERATURE;
        let chain = if !random {
            vec![bias, penalties, LlamaSampler::greedy()]
        } else {
            vec![
                bias,
                penalties,
                LlamaSampler::top_k(options.top_k),
                LlamaSampler::top_p(options.top_p, 1),
                LlamaSampler::min_p(options.min_p, 1),
                LlamaSampler::temp(options.temperature),
                LlamaSampler::dist(seed),
            ]
        };
        Ok(Sampler {
            chain: LlamaSampler::chain_simple(chain),
            candidates: LlamaTokenDataArray::new(Vec::with_capacity(n_vocab), false),
            constraint: constraint.transpose()?,
            seed,
            random,
        })
    }

    /// The seed in use: give it to get the same text again.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Whether the seed matters.
    pub fn is_random(&self) -> bool {
        self.random
    }

    /// Counts a token of the prompt as seen, for the penalties.
    pub fn accept(&mut self, token: i32) {
        self.chain.accept(LlamaToken(token));
    }

    /// Whether the constraint, if there is one, has all of the reply.
    pub fn is_complete(&self) -> bool {
        self.constraint.as_ref().is_some_and(Follower::is_complete)
    }

    /// Chooses the next token from `logits` (n_vocab) and counts it as seen. `None` only when `logits` is
    /// empty.
    ///
    /// # Errors
    /// The constraint cannot be followed any further.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Option<i32>, ConstraintError> {
        let candidates = &mut self.candidates;
        candidates.data.clear();
        candidates.sorted = false;
        candidates.selected = None;
        candidates
            .data
            .extend((0i32..).zip(logits).map(|(id, &l)| LlamaTokenData::new(LlamaToken(id), l, 0.0)));
        if let Some(constraint) = &mut self.constraint {
            constraint.retain_allowed(candidates)?;
        }
        candidates.apply_sampler(&mut self.chain);
        let Some(token) = candidates.selected_token() else { return Ok(None) };
        self.chain.accept(token);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token.0)?;
        }
        Ok(Some(token.0))
    }
}

/// Logits divided by much less are infinite, all of them alike; by this, no two that differ are both likely.
const LEAST_TEMPERATURE: f32 = 1e-6;

/// More than any context has; a ring of as many is 4 MiB.
const ALL_TOKENS: i32 = 1 << 20;

fn random_seed() -> u32 {
    let mut bytes = [0; 4];
    // a seed need not be secret: without the system's source, the clock does
    if getrandom::fill(&mut bytes).is_err() {
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.subsec_nanos());
        return nanos;
    }
    u32::from_le_bytes(bytes).min(u32::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperature_zero_takes_the_largest_logit() {
        let mut s = Sampler::new(&Sampling::greedy(), 5).unwrap();
        assert_eq!(s.sample(&[0.1, 3.0, -2.0, 2.9, 0.0]), Ok(Some(1)));
        assert_eq!(s.sample(&[]), Ok(None));
    }

    #[test]
    fn a_temperature_that_is_nearly_zero_takes_the_largest_logit_too() {
        for temperature in [f32::from_bits(1), 1e-40, f32::MIN_POSITIVE, 1e-37, 1e-30, 1e-7, 1e-6] {
            let sampling = Sampling { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, ..Sampling::default() };
            let mut s = Sampler::new(&sampling, 5).unwrap();
            for _ in 0..20 {
                assert_eq!(s.sample(&[20.1, 23.0, -22.0, 22.9, 0.0]), Ok(Some(1)), "{temperature}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let run = |seed| {
            let sampling = Sampling { seed: Some(seed), top_k: 0, ..Sampling::default() };
            let mut s = Sampler::new(&sampling, logits.len()).unwrap();
            (0..50).map(|_| s.sample(&logits).unwrap().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn a_repeat_penalty_changes_a_greedy_choice() {
        let logits = [1.0, 1.1, 0.0];
        let mut plain = Sampler::new(&Sampling::greedy(), 3).unwrap();
        let mut penalised = Sampler::new(&Sampling { repeat_penalty: 2.0, ..Sampling::greedy() }, 3).unwrap();
        let first_two = |s: &mut Sampler| (s.sample(&logits), s.sample(&logits));
        assert_eq!(first_two(&mut plain), (Ok(Some(1)), Ok(Some(1))));
        assert_eq!(first_two(&mut penalised), (Ok(Some(1)), Ok(Some(0))));
    }

    #[test]
    fn a_bias_counts_before_everything_else_and_a_token_that_there_is_not_is_left_out() {
        let logits = [1.0, 3.0, 2.0];
        let greedy = |logit_bias| Sampling { logit_bias, ..Sampling::greedy() };
        let first = |sampling: Sampling| Sampler::new(&sampling, 3).unwrap().sample(&logits).unwrap();
        assert_eq!(first(greedy(vec![(0, 2.5)])), Some(0));
        assert_eq!(first(greedy(vec![(1, f32::NEG_INFINITY), (7, 100.0)])), Some(2));
        let random = Sampling { logit_bias: vec![(0, 100.0)], ..Sampling::default() };
        let mut s = Sampler::new(&random, 3).unwrap();
        assert!((0..20).all(|_| s.sample(&logits) == Ok(Some(0))));
    }

    #[test]
    fn refuses_values_that_c_code_would_take_and_break_on() {
        type Change = fn(&mut Sampling);
        let changes: [(Change, &str); 14] = [
            (|s| s.temperature = -1.0, "temperature"),
            (|s| s.temperature = f32::NAN, "temperature"),
            (|s| s.temperature = f32::INFINITY, "temperature"),
            (|s| s.top_p = 1.1, "top_p"),
            (|s| s.min_p = -0.1, "min_p"),
            (|s| s.repeat_penalty = 0.0, "repeat_penalty"),
            (|s| s.top_k = -2, "top_k"),
            (|s| s.top_k = i32::MIN, "top_k"),
            (|s| s.seed = Some(u32::MAX), "seed"),
            (|s| s.repeat_last_n = -2, "repeat_last_n"),
            (|s| s.repeat_last_n = i32::MAX, "repeat_last_n"),
            (|s| s.frequency_penalty = f32::INFINITY, "frequency_penalty"),
            (|s| s.logit_bias = vec![(0, f32::NAN)], "logit_bias"),
            (|s| s.logit_bias = vec![(-1, 1.0)], "logit_bias"),
        ];
        assert_eq!(Sampling::default().check(), Ok(()));
        for (change, option) in changes {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            assert_eq!(sampling.check().unwrap_err().option, option);
        }
    }
}
