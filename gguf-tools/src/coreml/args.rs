//! The `--coreml` flags of `dim-split`.

use super::Options;

/// Flags that ask for Core ML packages, for a command to flatten into its own.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Core ML")]
pub struct CoremlArgs {
    /// Also write every middle as Core ML packages for an iPhone (STEM.middle-A..B.coreml/)
    #[arg(long)]
    pub coreml: bool,

    /// Positions the packages' KV cache has room for; a multiple of 64
    #[arg(long, value_name = "N", default_value_t = 2048, requires = "coreml")]
    pub coreml_ctx: u32,

    /// Rows of one prefill call
    #[arg(long, value_name = "N", default_value_t = 64, requires = "coreml")]
    pub coreml_prefill: u32,

    /// Most bytes of one package's weights: as 950MB, 900MiB or 950000000
    #[arg(long, value_name = "BYTES", default_value = "950MB", value_parser = bytes, requires = "coreml")]
    pub coreml_max_bytes: u64,

    /// Leave out the self-test vectors: no evaluation through llama.cpp, and no check of fp16's range
    #[arg(long, requires = "coreml")]
    pub coreml_no_selftest: bool,
}

impl CoremlArgs {
    /// What the flags ask for, or None without `--coreml`.
    pub fn options(&self) -> Option<Options> {
        self.coreml.then_some(Options {
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
