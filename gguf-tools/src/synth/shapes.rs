//! The dimensions of real models, and a few small ones that belong to every family.

/// Dimensions of one model, in the words of its GGUF keys.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// What `--shape` calls it.
    pub name: &'static str,
    /// The family it is of; None for the shapes every family can have.
    pub arch: Option<&'static str>,
    /// Length of a hidden row.
    pub n_embd: u32,
    /// Blocks.
    pub n_blocks: u32,
    /// Inner length of the feed-forward part (of one expert where there are experts).
    pub n_ff: u32,
    /// Query heads.
    pub n_head: u32,
    /// Key and value heads.
    pub n_head_kv: u32,
    /// Length of one head.
    pub head_dim: u32,
    /// Values of a head that are rotated.
    pub n_rot: u32,
    /// Tokens.
    pub n_vocab: u32,
    /// Where the special tokens begin; None: the last four.
    pub first_special: Option<u32>,
    /// Longest context.
    pub n_ctx: u32,
    /// Base of the rotation's frequencies.
    pub rope_base: f32,
    /// Factors on the frequencies, as tensors of their own.
    pub rope_factors: RopeFactors,
    /// Positions a token sees, where blocks with and without this limit take turns.
    pub window: Option<u32>,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Whether the token embedding is the lm_head too, in the real model.
    pub tied: bool,
    /// Experts, those used per token, and the inner length of the shared one (0: none).
    pub experts: Option<Experts>,
}

/// How a rotation is stretched beyond the context it was first trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeFactors {
    /// It is not.
    None,
    /// llama 3's way: one tensor of factors.
    Llama3,
    /// phi 3's way: one tensor of factors up to the original context length, another for longer contexts.
    Long {
        /// The context length that chooses.
        original: u32,
    },
}

/// The mixture part of a shape.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    /// Experts in every block.
    pub n: u32,
    /// Experts a token goes through.
    pub n_used: u32,
    /// Inner length of the expert every token goes through; 0: there is none.
    pub n_ff_shared: u32,
}

impl Shape {
    /// The shape of this name.
    pub fn find(name: &str) -> Option<&'static Shape> {
        SHAPES.iter().find(|shape| shape.name == name)
    }
}

/// A start to be changed field by field below.
const fn shape(name: &'static str, arch: &'static str, n_embd: u32, n_blocks: u32, n_ff: u32) -> Shape {
    Shape {
        name,
        arch: Some(arch),
        n_embd,
        n_blocks,
        n_ff,
        n_head: 0,
        n_head_kv: 0,
        head_dim: 0,
        n_rot: 0,
        n_vocab: 0,
        first_special: None,
        n_ctx: 4096,
        rope_base: 10_000.0,
        rope_factors: RopeFactors::None,
        window: None,
        eps: 1e-5,
        tied: false,
        experts: None,
    }
}

impl Shape {
    const fn heads(mut self, n_head: u32, n_head_kv: u32, head_dim: u32) -> Self {
        (self.n_head, self.n_head_kv, self.head_dim, self.n_rot) = (n_head, n_head_kv, head_dim, head_dim);
        self
    }

    const fn vocab(mut self, n_vocab: u32) -> Self {
        self.n_vocab = n_vocab;
        self
    }

    /// Qwen's vocabulary: 151,643 tokens, then the special ones, then padding to a round number.
    const fn qwen_vocab(mut self, n_vocab: u32) -> Self {
        (self.n_vocab, self.first_special) = (n_vocab, Some(151_643));
        self
    }

    const fn context(mut self, n_ctx: u32, rope_base: f32) -> Self {
        (self.n_ctx, self.rope_base) = (n_ctx, rope_base);
        self
    }

    const fn rotate(mut self, n_rot: u32) -> Self {
        self.n_rot = n_rot;
        self
    }

    const fn llama3(mut self) -> Self {
        (self.n_ctx, self.rope_base, self.rope_factors) = (131_072, 500_000.0, RopeFactors::Llama3);
        (self.n_vocab, self.first_special) = (128_256, Some(128_000));
        self
    }

    const fn long_rope(mut self, n_ctx: u32) -> Self {
        (self.rope_factors, self.n_ctx) = (RopeFactors::Long { original: self.n_ctx }, n_ctx);
        self
    }

    const fn window(mut self, window: u32) -> Self {
        self.window = Some(window);
        self
    }

    const fn eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    const fn tied(mut self) -> Self {
        self.tied = true;
        self
    }

    const fn experts(mut self, n: u32, n_used: u32, n_ff_shared: u32) -> Self {
        self.experts = Some(Experts { n, n_used, n_ff_shared });
        self
    }

    const fn any(mut self) -> Self {
        self.arch = None;
        self
    }
}

/// Every shape there is. The first three are of no real model: rows of 256 values, so that K-quants are used as such.
pub const SHAPES: &[Shape] = &[
    shape("tiny", "", 256, 6, 512).heads(4, 2, 64).vocab(512).context(2048, 10_000.0).any(),
    shape("demo", "", 512, 12, 1024).heads(8, 2, 64).vocab(4096).context(4096, 10_000.0).any(),
    shape("small", "", 768, 8, 2048).heads(12, 4, 64).vocab(8192).context(8192, 10_000.0).any(),
    // Qwen
    shape("qwen2.5-0.5b", "qwen2", 896, 24, 4864)
        .heads(14, 2, 64)
        .qwen_vocab(151_936)
        .context(32_768, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen2.5-1.5b", "qwen2", 1536, 28, 8960)
        .heads(12, 2, 128)
        .qwen_vocab(151_936)
        .context(32_768, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen2.5-3b", "qwen2", 2048, 36, 11_008)
        .heads(16, 2, 128)
        .qwen_vocab(151_936)
        .context(32_768, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen2.5-7b", "qwen2", 3584, 28, 18_944)
        .heads(28, 4, 128)
        .qwen_vocab(152_064)
        .context(32_768, 1e6)
        .eps(1e-6),
    shape("qwen2.5-14b", "qwen2", 5120, 48, 13_824)
        .heads(40, 8, 128)
        .qwen_vocab(152_064)
        .context(32_768, 1e6)
        .eps(1e-6),
    shape("qwen2.5-32b", "qwen2", 5120, 64, 27_648)
        .heads(40, 8, 128)
        .qwen_vocab(152_064)
        .context(32_768, 1e6)
        .eps(1e-6),
    shape("qwen3-0.6b", "qwen3", 1024, 28, 3072)
        .heads(16, 8, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen3-1.7b", "qwen3", 2048, 28, 6144)
        .heads(16, 8, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen3-4b", "qwen3", 2560, 36, 9728)
        .heads(32, 8, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6)
        .tied(),
    shape("qwen3-8b", "qwen3", 4096, 36, 12_288)
        .heads(32, 8, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6),
    shape("qwen3-14b", "qwen3", 5120, 40, 17_408)
        .heads(40, 8, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6),
    shape("qwen1.5-moe-a2.7b", "qwen2moe", 2048, 24, 1408)
        .heads(16, 16, 128)
        .qwen_vocab(151_936)
        .context(8192, 1e6)
        .eps(1e-6)
        .experts(60, 4, 5632),
    shape("qwen3-30b-a3b", "qwen3moe", 2048, 48, 768)
        .heads(32, 4, 128)
        .qwen_vocab(151_936)
        .context(40_960, 1e6)
        .eps(1e-6)
        .experts(128, 8, 0),
    // llama and what loads as llama
    shape("llama3.2-1b", "llama", 2048, 16, 8192).heads(32, 8, 64).llama3().tied(),
    shape("llama3.2-3b", "llama", 3072, 28, 8192).heads(24, 8, 128).llama3().tied(),
    shape("llama3.1-8b", "llama", 4096, 32, 14_336).heads(32, 8, 128).llama3(),
    shape("llama2-7b", "llama", 4096, 32, 11_008).heads(32, 32, 128).vocab(32_000),
    shape("mistral-7b", "llama", 4096, 32, 14_336).heads(32, 8, 128).vocab(32_768).context(32_768, 1e6),
    shape("mixtral-8x7b", "llama", 4096, 32, 14_336)
        .heads(32, 8, 128)
        .vocab(32_000)
        .context(32_768, 1e6)
        .experts(8, 2, 0),
    shape("tinyllama-1.1b", "llama", 2048, 22, 5632).heads(32, 4, 64).vocab(32_000).context(2048, 10_000.0),
    shape("smollm2-135m", "llama", 576, 30, 1536).heads(9, 3, 64).vocab(49_152).context(8192, 1e5).tied(),
    shape("smollm2-360m", "llama", 960, 32, 2560).heads(15, 5, 64).vocab(49_152).context(8192, 1e5).tied(),
    // others
    shape("olmo2-1b", "olmo2", 2048, 16, 8192).heads(16, 16, 128).vocab(100_352).context(4096, 5e5).eps(1e-6),
    shape("olmo2-7b", "olmo2", 4096, 32, 11_008)
        .heads(32, 32, 128)
        .vocab(100_352)
        .context(4096, 5e5)
        .eps(1e-6),
    shape("olmo3-7b", "olmo2", 4096, 32, 11_008)
        .heads(32, 32, 128)
        .vocab(100_352)
        .context(65_536, 5e5)
        .eps(1e-6)
        .window(4096),
    shape("olmoe-1b-7b", "olmoe", 2048, 16, 1024)
        .heads(16, 16, 128)
        .vocab(50_304)
        .context(4096, 10_000.0)
        .experts(64, 8, 0),
    shape("starcoder2-3b", "starcoder2", 3072, 30, 12_288)
        .heads(24, 2, 128)
        .vocab(49_152)
        .context(16_384, 999_999.44)
        .tied(),
    shape("stablelm2-1.6b", "stablelm", 2048, 24, 5632).heads(32, 32, 64).rotate(16).vocab(100_352),
    shape("internlm2-1.8b", "internlm2", 2048, 24, 8192).heads(16, 8, 128).vocab(92_544).context(32_768, 1e6),
    shape("granite3.1-2b", "granite", 2048, 40, 8192)
        .heads(32, 8, 64)
        .vocab(49_155)
        .context(131_072, 5e6)
        .tied(),
    shape("gemma-2b", "gemma", 2048, 18, 16_384)
        .heads(8, 1, 256)
        .vocab(256_000)
        .context(8192, 10_000.0)
        .eps(1e-6)
        .tied(),
    shape("phi-2", "phi2", 2560, 32, 10_240)
        .heads(32, 32, 80)
        .rotate(32)
        .vocab(51_200)
        .context(2048, 10_000.0),
    shape("phi3-mini", "phi3", 3072, 32, 8192).heads(32, 32, 96).vocab(32_064),
    shape("phi3-mini-128k", "phi3", 3072, 32, 8192).heads(32, 32, 96).vocab(32_064).long_rope(131_072),
    shape("granite3.1-1b-a400m", "granitemoe", 1024, 24, 512)
        .heads(16, 8, 64)
        .vocab(49_155)
        .context(131_072, 5e6)
        .experts(32, 8, 0)
        .tied(),
    shape("minicpm-2b", "minicpm", 2304, 40, 5760).heads(36, 36, 64).vocab(122_753).tied(),
    shape("exaone3.5-2.4b", "exaone", 2560, 30, 7168)
        .heads(32, 8, 80)
        .vocab(102_400)
        .context(32_768, 1e6)
        .tied(),
    shape("glm4-9b", "chatglm", 4096, 40, 13_696)
        .heads(32, 2, 128)
        .rotate(64)
        .vocab(151_552)
        .context(131_072, 1e4),
    shape("seed-oss-36b", "seed_oss", 5120, 64, 27_648)
        .heads(80, 8, 128)
        .vocab(155_136)
        .context(524_288, 1e7),
    shape("command-r-35b", "command-r", 8192, 40, 22_528)
        .heads(64, 64, 128)
        .vocab(256_000)
        .context(131_072, 8e6)
        .tied(),
    shape("falcon-7b", "falcon", 4544, 32, 18_176).heads(71, 1, 64).vocab(65_024).context(2048, 10_000.0),
    shape("pythia-410m", "gptneox", 1024, 24, 4096)
        .heads(16, 16, 64)
        .rotate(16)
        .vocab(50_304)
        .context(2048, 10_000.0),
    shape("pythia-1.4b", "gptneox", 2048, 24, 8192)
        .heads(16, 16, 128)
        .rotate(32)
        .vocab(50_304)
        .context(2048, 10_000.0),
];
