//! What there are programs for.

/// The architectures, by GGUF's names. Mistral's models are `llama` in GGUF; newer ones are `mistral3`.
pub const ARCHITECTURES: &[&str] = &["qwen2", "llama", "qwen3", "mistral3"];

/// Contexts are multiples of this.
pub const CTX_STEP: u32 = 64;
/// The longest context of a program.
pub const MAX_CTX: u32 = 16384;
/// Fewest rows of a prefill call.
pub const MIN_PREFILL: u32 = 2;
/// Most rows of a prefill call.
pub const MAX_PREFILL: u32 = 512;
