//! Logits to a token, by llama.cpp's own samplers in the order `llama-cli` chains them.

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;

/// The options of sampling, with llama.cpp's words and defaults.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplerOptions {
    /// Temperature; 0 takes the most likely token each time (greedy)
    #[arg(long = "temp", value_name = "T", default_value_t = 0.8)]
    pub temperature: f32,
    /// Keep only the K most likely tokens (0 = all)
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: i32,
    /// Keep the most likely tokens that together have probability P (1 = all)
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Drop tokens less likely than P times the most likely one (0 = none)
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Seed of the random choice (default: a new one each time)
    #[arg(short = 's', long, value_name = "N")]
    pub seed: Option<u32>,
    /// Penalty on tokens seen lately (1 = none)
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// How many of the last tokens the penalties look at
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub repeat_last_n: i32,
    /// Penalty on tokens by how often they were seen (0 = none)
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub frequency_penalty: f32,
    /// Penalty on tokens that were seen at all (0 = none)
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub presence_penalty: f32,
}

/// An option outside what llama.cpp's samplers take.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("--{option} {value}: must be {rule}")]
pub struct BadOption {
    /// The option's name without its dashes.
    pub option: &'static str,
    /// What was given.
    pub value: String,
    /// What it must be.
    pub rule: &'static str,
}

impl SamplerOptions {
    /// Checks every value before it reaches C code.
    pub fn check(&self) -> Result<(), BadOption> {
        let float = |option, value: f32, ok: bool, rule| {
            if value.is_finite() && ok {
                Ok(())
            } else {
                Err(BadOption { option, value: value.to_string(), rule })
            }
        };
        let int = |option, value: i32, ok: bool, rule| {
            if ok { Ok(()) } else { Err(BadOption { option, value: value.to_string(), rule }) }
        };
        float("temp", self.temperature, self.temperature >= 0.0, "a number >= 0")?;
        float("top-p", self.top_p, (0.0..=1.0).contains(&self.top_p), "between 0 and 1")?;
        float("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1")?;
        float("repeat-penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "a number > 0")?;
        float("frequency-penalty", self.frequency_penalty, true, "a finite number")?;
        float("presence-penalty", self.presence_penalty, true, "a finite number")?;
        int("top-k", self.top_k, self.top_k >= 0, "0 or more")?;
        int("repeat-last-n", self.repeat_last_n, (0..=65_536).contains(&self.repeat_last_n), "0 to 65536")
    }
}

/// A chain of samplers with its history and its random state.
#[derive(Debug)]
pub struct Sampler {
    chain: LlamaSampler,
    candidates: LlamaTokenDataArray,
    seed: u32,
}

impl Sampler {
    /// The chain for a vocabulary of `n_vocab` tokens.
    pub fn new(options: &SamplerOptions, n_vocab: usize) -> Result<Sampler, BadOption> {
        options.check()?;
        let seed = options.seed.unwrap_or_else(random_seed);
        let n_vocab_c = i32::try_from(n_vocab).unwrap_or(i32::MAX);
        let penalties = LlamaSampler::penalties(
            n_vocab_c,
            options.repeat_last_n,
            options.repeat_penalty,
            options.frequency_penalty,
            options.presence_penalty,
        );
        let chain = if options.temperature == 0.0 {
            vec![penalties, LlamaSampler::greedy()]
        } else {
            vec![
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
            seed,
        })
    }

    /// The seed in use: give it to get the same text again.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Counts a token of the prompt as seen, for the penalties.
    pub fn accept(&mut self, token: i32) {
        self.chain.accept(LlamaToken(token));
    }

    /// Chooses the next token from `logits` (n_vocab) and counts it as seen. `None` only when `logits` is
    /// empty.
    pub fn sample(&mut self, logits: &[f32]) -> Option<i32> {
        let candidates = &mut self.candidates;
        candidates.data.clear();
        candidates.sorted = false;
        candidates.selected = None;
        candidates
            .data
            .extend((0i32..).zip(logits).map(|(id, &l)| LlamaTokenData::new(LlamaToken(id), l, 0.0)));
        candidates.apply_sampler(&mut self.chain);
        let token = candidates.selected_token()?;
        self.chain.accept(token);
        Some(token.0)
    }
}

fn random_seed() -> u32 {
    let mut bytes = [0; 4];
    // a seed need not be secret: without the system's source, the clock does
    if getrandom::fill(&mut bytes).is_err() {
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.subsec_nanos());
        return nanos;
    }
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        sampling: SamplerOptions,
    }

    fn options(args: &[&str]) -> SamplerOptions {
        Cli::parse_from([&["test"], args].concat()).sampling
    }

    #[test]
    fn temperature_zero_takes_the_largest_logit() {
        let mut s = Sampler::new(&options(&["--temp", "0"]), 5).unwrap();
        assert_eq!(s.sample(&[0.1, 3.0, -2.0, 2.9, 0.0]), Some(1));
        assert_eq!(s.sample(&[]), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let run = |seed: &str| {
            let mut s = Sampler::new(&options(&["--seed", seed, "--top-k", "0"]), logits.len()).unwrap();
            (0..50).map(|_| s.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run("7"), run("7"));
        assert_ne!(run("7"), run("8"));
    }

    #[test]
    fn a_repeat_penalty_changes_a_greedy_choice() {
        let logits = [1.0, 1.1, 0.0];
        let mut plain = Sampler::new(&options(&["--temp", "0"]), 3).unwrap();
        let mut penalised = Sampler::new(&options(&["--temp", "0", "--repeat-penalty", "2"]), 3).unwrap();
        let first_two = |s: &mut Sampler| (s.sample(&logits), s.sample(&logits));
        assert_eq!(first_two(&mut plain), (Some(1), Some(1)));
        assert_eq!(first_two(&mut penalised), (Some(1), Some(0)));
    }

    #[test]
    fn refuses_values_that_c_code_would_take_and_break_on() {
        for (args, option) in [
            (["--temp=-1"], "temp"),
            (["--temp=nan"], "temp"),
            (["--temp=inf"], "temp"),
            (["--top-p=1.1"], "top-p"),
            (["--min-p=-0.1"], "min-p"),
            (["--repeat-penalty=0"], "repeat-penalty"),
            (["--top-k=-1"], "top-k"),
            (["--repeat-last-n=-1"], "repeat-last-n"),
            (["--repeat-last-n=2147483647"], "repeat-last-n"),
            (["--frequency-penalty=inf"], "frequency-penalty"),
        ] {
            assert_eq!(options(&args).check().unwrap_err().option, option);
        }
    }
}
