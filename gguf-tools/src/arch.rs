//! Which architectures can be cut, and what each needs.
//!
//! A slice is a model of its own with its blocks numbered from 0. That is right where a block computes the same
//! whatever its number and however many there are, and where nothing stands between the embedding (or what is
//! fed instead of it) and the first block. llama.cpp's source decides, architecture by architecture: each line
//! below was read in `src/models/NAME.cpp` of the pinned llama.cpp (`load_arch_hparams`, `load_arch_tensors` and
//! the graph). Switches on the block count that only choose a display name are harmless and not mentioned.
//!
//! Everything else is refused by name, with the reason where one is known.

use std::{borrow::Cow, fmt};

use crate::{failure::Explained, text::Shown};

/// An architecture whose blocks can be renumbered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// Who uses it, for lists shown to people.
    pub models: &'static str,
    /// Where the last block's output becomes logits.
    pub lm_head: LmHead,
    /// Its graph asserts that the rotation takes whole heads.
    pub rope_whole_head: bool,
    /// `<arch>.embedding_scale` multiplies what enters the first block, also when that is a hidden row. In a
    /// slice without the head it is set to this (None: the architecture has no such scale).
    pub neutral_embedding_scale: Option<f32>,
    /// A scale of the residual that the loader derives from the number of blocks unless the file states it.
    pub residual_scale: Option<ResidualScale>,
}

/// How an architecture gets its lm_head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LmHead {
    /// `output.weight`, or `token_embd.weight` where there is none.
    Either,
    /// Always `token_embd.weight`.
    Embedding,
    /// Always `output.weight`, which the loader demands in every file.
    Own,
}

/// `a / sqrt(n_blocks)`, in single precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ResidualScale(pub f32);

impl ResidualScale {
    /// The scale of a model of this many blocks, to the bit as the loader computes it.
    pub fn of(self, n_blocks: u32) -> f32 {
        self.0 / (n_blocks as f32).sqrt()
    }
}

const PLAIN: Arch = Arch {
    name: "",
    models: "",
    lm_head: LmHead::Either,
    rope_whole_head: true,
    neutral_embedding_scale: None,
    residual_scale: None,
};

/// The architectures that can be cut.
pub const SUPPORTED: &[Arch] = &[
    Arch { name: "llama", models: "Llama 2 and 3, Mistral, Mixtral, Yi, SmolLM, TinyLlama", ..PLAIN },
    Arch { name: "mistral3", models: "Mistral 3, Ministral 3", ..PLAIN },
    Arch { name: "qwen2", models: "Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen", ..PLAIN },
    Arch { name: "qwen2moe", models: "Qwen 1.5 and 2 MoE", lm_head: LmHead::Own, ..PLAIN },
    Arch { name: "qwen3", models: "Qwen 3", ..PLAIN },
    Arch { name: "qwen3moe", models: "Qwen 3 MoE", ..PLAIN },
    // with a sliding window (OLMo 3) it is refused, see `refuse_by_keys`
    Arch { name: "olmo2", models: "OLMo 2", lm_head: LmHead::Own, ..PLAIN },
    Arch { name: "olmo", models: "OLMo", ..PLAIN },
    Arch { name: "olmoe", models: "OLMoE", lm_head: LmHead::Own, ..PLAIN },
    Arch { name: "starcoder2", models: "StarCoder 2", ..PLAIN },
    Arch { name: "stablelm", models: "StableLM", lm_head: LmHead::Own, rope_whole_head: false, ..PLAIN },
    Arch { name: "internlm2", models: "InternLM 2", lm_head: LmHead::Own, ..PLAIN },
    Arch { name: "granite", models: "Granite 3", neutral_embedding_scale: Some(1.0), ..PLAIN },
    Arch { name: "granitemoe", models: "Granite 3 MoE", neutral_embedding_scale: Some(1.0), ..PLAIN },
    Arch {
        name: "minicpm",
        models: "MiniCPM",
        neutral_embedding_scale: Some(1.0),
        residual_scale: Some(ResidualScale(1.4)),
        ..PLAIN
    },
    Arch { name: "phi3", models: "Phi 3 and 4", rope_whole_head: false, ..PLAIN },
    Arch { name: "phi2", models: "Phi 2", lm_head: LmHead::Own, rope_whole_head: false, ..PLAIN },
    // from 64 blocks on it is refused, see `refuse_by_keys`
    Arch {
        name: "command-r",
        models: "Command R",
        lm_head: LmHead::Embedding,
        rope_whole_head: false,
        ..PLAIN
    },
    Arch { name: "falcon", models: "Falcon", ..PLAIN },
    Arch {
        name: "gptneox",
        models: "Pythia, GPT-NeoX",
        lm_head: LmHead::Own,
        rope_whole_head: false,
        ..PLAIN
    },
    Arch { name: "exaone", models: "EXAONE 3", ..PLAIN },
    Arch { name: "chatglm", models: "ChatGLM 3, GLM 4 9B", rope_whole_head: false, ..PLAIN },
    Arch { name: "seed_oss", models: "Seed-OSS", ..PLAIN },
    Arch { name: "arcee", models: "Arcee", ..PLAIN },
];

/// Why an architecture is refused, where a person looked.
const REFUSED: &[(&str, &str)] = &[
    ("gemma", "it scales its embedding inside the graph, and would scale hidden rows again"),
    ("gemma2", "it alternates attention windows by block number and scales its embedding inside the graph"),
    ("gemma3", "it chooses attention windows by block number and scales its embedding inside the graph"),
    ("gemma3n", "its blocks share keys and values and take per-layer inputs"),
    ("gemma4", "its blocks share keys and values and take per-layer inputs"),
    ("cohere2", "it chooses attention windows by block number"),
    ("gpt-oss", "it alternates attention windows by block number"),
    ("exaone4", "it chooses attention windows by the number of blocks"),
    ("smollm3", "every fourth block has no rotation, by block number"),
    ("smallthinker", "it chooses attention windows by block number"),
    ("baichuan", "the number of blocks decides how it encodes positions"),
    ("glm4", "its graph ends the process when hidden rows enter it"),
    ("glm4moe", "its graph ends the process when hidden rows enter it, and its first blocks are dense"),
    ("deepseek", "its first blocks are dense and the others are not, by block number"),
    ("deepseek2", "the number of blocks decides its variant, and its first blocks are dense"),
    ("dots1", "its first blocks are dense and the others are not, by block number"),
    ("bailingmoe2", "its first blocks are dense and the others are not, by block number"),
    ("ernie4_5-moe", "its first blocks are dense and the others are not, by block number"),
    ("minicpm3", "it scales its embedding inside the graph and its residual by the number of blocks"),
    ("grok", "it scales its embedding inside the graph"),
    ("bloom", "it normalises its embedding before the first block"),
    ("gpt2", "it adds position embeddings before the first block"),
    ("starcoder", "it adds position embeddings before the first block"),
    ("mpt", "it may add position embeddings before the first block"),
    ("qwen2vl", "its positions have four parts, which hidden rows do not carry"),
    ("qwen3vl", "its first blocks take image features, by block number"),
    ("qwen3vlmoe", "its first blocks take image features, by block number"),
    ("qwen3next", "it is a hybrid: its blocks differ by number and some keep a recurrent state"),
    ("qwen35", "it is a hybrid: its blocks differ by number and some keep a recurrent state"),
    ("jamba", "it is a hybrid: some blocks keep a recurrent state"),
    ("lfm2", "it is a hybrid: some blocks keep a recurrent state"),
    ("falcon-h1", "it is a hybrid: some blocks keep a recurrent state"),
    ("granitehybrid", "it is a hybrid: some blocks keep a recurrent state"),
    ("nemotron_h", "it is a hybrid: some blocks keep a recurrent state"),
    ("mamba", "its blocks keep a recurrent state"),
    ("mamba2", "its blocks keep a recurrent state"),
    ("rwkv6", "its blocks keep a recurrent state"),
    ("rwkv7", "its blocks keep a recurrent state"),
    ("llama4", "it chooses attention and rotation by block number"),
    ("phimoe", "it does not name its blocks' outputs"),
    ("dream", "it generates by diffusion, not token by token"),
    ("llada", "it generates by diffusion, not token by token"),
    ("bert", "it does not generate"),
    ("t5", "it has an encoder beside the decoder"),
    ("deci", "its blocks differ, and some have no attention"),
];

/// The architecture's slices cannot be models of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// Its name, as the file says it.
    pub arch: String,
    /// Why not, where that is known.
    pub why: Option<&'static str>,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arch = Shown(&self.arch);
        match self.why {
            Some(why) => write!(f, "slices of architecture '{arch}' cannot be models of their own: {why}"),
            None => {
                write!(f, "slices of architecture '{arch}' have not been shown to be models of their own")
            }
        }
    }
}

impl std::error::Error for Unsupported {}

impl Explained for Unsupported {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let names: Vec<&str> = SUPPORTED.iter().map(|arch| arch.name).collect();
        Some(
            format!("cut it with its own block numbers; renumbered slices can be of {}", names.join(", "))
                .into(),
        )
    }

    fn is_misuse(&self) -> bool {
        true
    }
}

/// The architecture of this name.
///
/// # Errors
/// It cannot be cut, with the reason.
pub fn find(name: &str) -> Result<&'static Arch, Unsupported> {
    SUPPORTED.iter().find(|arch| arch.name == name).ok_or_else(|| Unsupported {
        arch: name.to_owned(),
        why: REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, why)| *why),
    })
}

/// Whether the architecture of this name can be cut.
pub fn is_supported(name: &str) -> bool {
    find(name).is_ok()
}

/// Refuses a model of a supported architecture that uses what its blocks cannot be cut with.
///
/// `number` answers with the value of a key below the architecture's name, `has` whether a key (whole name) is
/// there.
///
/// # Errors
/// The reason.
pub fn refuse_by_keys(
    arch: &Arch,
    n_blocks: u32,
    number: impl Fn(&str) -> Option<u64>,
    has: impl Fn(&str) -> bool,
) -> Result<(), Unsupported> {
    let refuse = |why| Err(Unsupported { arch: arch.name.to_owned(), why: Some(why) });
    if number("nextn_predict_layers").is_some_and(|n| n > 0) {
        return refuse("its last blocks predict further tokens and do not belong to the chain");
    }
    if has("general.tensor_extra.name") {
        return refuse("it keeps settings by tensor name, which cutting changes");
    }
    if has(&format!("{}.deepstack_mapping", arch.name)) {
        return refuse("it feeds image features into blocks by their number");
    }
    match arch.name {
        "olmo2" if number("attention.sliding_window").is_some_and(|n| n > 0) => {
            refuse("with a sliding window it chooses attention windows by block number")
        }
        "command-r" if n_blocks >= COMMAND_R_PLUS_BLOCKS => {
            refuse("from 64 blocks on the loader expects other tensors")
        }
        _ => Ok(()),
    }
}

/// Blocks from which on llama.cpp takes a Command R for a Command R+.
const COMMAND_R_PLUS_BLOCKS: u32 = 64;
