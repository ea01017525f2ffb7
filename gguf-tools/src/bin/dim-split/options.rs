//! What `dim-split` can be told.

use std::path::PathBuf;

use clap::Parser;
use gguf_tools::{coreml, gguf::TensorType, plan::BlockRange};

/// Cut a GGUF into slices that run on different machines.
///
/// Writes STEM.head.gguf, STEM.middle-A..B.gguf, STEM.tail.gguf and STEM.split.json. The head and the tail stay on
/// this machine; each middle goes to another one.
#[derive(Debug, Parser)]
#[command(name = "dim-split", version, max_term_width = 100)]
pub(crate) struct Options {
    /// The model; of a split one (NAME-00001-of-0000N.gguf), any part. Or one on the Hugging Face hub, which is fetched into
    /// the cache of the hub's own tools: hf:ORG/REPO, hf:ORG/REPO/FILE.gguf, hf:ORG/REPO:Q4_K_M.
    pub(crate) model: PathBuf,

    /// Blocks that leave this machine, both inclusive: 11..16 are six blocks. Once per machine. Without it, --dry-run
    /// shows where the model can be cut.
    #[arg(long, value_name = "A..B")]
    pub(crate) middle: Vec<BlockRange>,

    /// Folder for the slices [default: the model's own; of a fetched one, this folder].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// Store the token embedding in this type, such as q8_0.
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    pub(crate) embed_type: Option<TensorType>,

    /// Store the lm_head in this type, such as q8_0.
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    pub(crate) output_type: Option<TensorType>,

    /// Context length that the memory figures are for; 0 is the model's [default: the model's, at most 4096].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) ctx: Option<u32>,

    /// Show the plan and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Afterwards, read everything again and compare it with the model.
    #[arg(long)]
    pub(crate) verify: bool,

    /// Make every slice a model of its own, with its blocks numbered from 0, that unmodified llama.cpp loads. Right for some
    /// architectures only; others are refused.
    #[arg(long)]
    pub(crate) renumber: bool,

    /// Do not find out what the middles have to answer to a known input, nor whether llama.cpp loads them: a host then
    /// cannot tell whether a worker computes right.
    #[arg(long)]
    pub(crate) no_canary: bool,

    /// Print one JSON object on standard output.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) coreml: CoremlArgs,
}

/// Flags that ask for Core ML packages, for a command to flatten into its own.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Core ML")]
pub(crate) struct CoremlArgs {
    /// Also write every middle as Core ML packages for an iPhone (STEM.middle-A..B.coreml/)
    #[arg(long)]
    pub(crate) coreml: bool,

    /// Positions the packages' KV cache has room for; a multiple of 64
    #[arg(long, value_name = "N", default_value_t = 2048, requires = "coreml")]
    pub(crate) coreml_ctx: u32,

    /// Rows of one prefill call
    #[arg(long, value_name = "N", default_value_t = 64, requires = "coreml")]
    pub(crate) coreml_prefill: u32,

    /// Most bytes of one package's weights: as 950MB, 900MiB or 950000000
    #[arg(long, value_name = "BYTES", default_value = "950MB", value_parser = bytes, requires = "coreml")]
    pub(crate) coreml_max_bytes: u64,

    /// Leave out the self-test vectors: no evaluation through llama.cpp, and no check of fp16's range
    #[arg(long, requires = "coreml")]
    pub(crate) coreml_no_selftest: bool,
}

impl CoremlArgs {
    /// What the flags ask for, or None without `--coreml`.
    pub(crate) fn options(&self) -> Option<coreml::Options> {
        self.coreml.then_some(coreml::Options {
            n_ctx: self.coreml_ctx,
            n_prefill: self.coreml_prefill,
            max_bytes: self.coreml_max_bytes,
            selftest: !self.coreml_no_selftest,
        })
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: u64 = match &text[digits..] {
        "" | "B" => 1,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => return Err(format!("\"{other}\" is not B, MB, GB, MiB or GiB")),
    };
    let n: u64 =
        text[..digits].parse().map_err(|_| format!("\"{text}\" does not start with a whole number"))?;
    n.checked_mul(unit).filter(|&n| n > 0).ok_or_else(|| format!("\"{text}\" is out of range"))
}

fn tensor_type(text: &str) -> Result<TensorType, String> {
    TensorType::from_name(text).ok_or_else(|| {
        let names: Vec<_> = TensorType::ALL.iter().map(|t| t.name().to_lowercase()).collect();
        format!("no such type; types are {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(bytes("950MB"), Ok(950_000_000));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("7"), Ok(7));
        for bad in ["", "MB", "1.5GB", "-1", "0", "5 apples", "99999999999GB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
