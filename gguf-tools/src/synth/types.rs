//! The types a model's matrices can have, and llama.cpp's mixtures of them.

use crate::gguf::TensorType;

/// The type of a model's matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct WeightType {
    pub(super) name: &'static str,
    /// llama.cpp's number of it, which loaders only show.
    pub(super) file_type: u32,
    most: TensorType,
    /// For the matrices where errors cost most, as llama.cpp's mixtures have it.
    better: Option<TensorType>,
}

impl WeightType {
    pub(super) const F16: WeightType = plain("f16", 1, TensorType::F16);

    /// The type of this name, in any case.
    pub(super) fn find(name: &str) -> Option<WeightType> {
        WEIGHT_TYPES.iter().copied().find(|t| t.name.eq_ignore_ascii_case(name))
    }

    /// What the tensor of this name is stored as.
    pub(super) fn of(&self, name: &str, tied: bool, n_blocks: u32) -> TensorType {
        let Some(better) = self.better else { return self.most };
        let important = match name.split_once('.') {
            Some(("output", _)) => true,
            Some(("token_embd", _)) => tied,
            Some(("blk", rest)) => {
                let (block, name) = rest.split_once('.').unwrap_or_default();
                let block: u32 = block.parse().unwrap_or(0);
                let eighth = n_blocks / 8;
                let chosen = block < eighth || block >= 7 * n_blocks / 8 || (block - eighth) % 3 == 2;
                chosen && (name.starts_with("attn_v.") || name.starts_with("ffn_down"))
            }
            _ => false,
        };
        if important { better } else { self.most }
    }
}

const fn plain(name: &'static str, file_type: u32, most: TensorType) -> WeightType {
    WeightType { name, file_type, most, better: None }
}

const WEIGHT_TYPES: &[WeightType] = &[
    plain("f32", 0, TensorType::F32),
    WeightType::F16,
    plain("bf16", 32, TensorType::BF16),
    plain("q8_0", 7, TensorType::Q8_0),
    plain("q6_k", 18, TensorType::Q6_K),
    plain("q5_k", 16, TensorType::Q5_K),
    WeightType { name: "q5_k_m", file_type: 17, most: TensorType::Q5_K, better: Some(TensorType::Q6_K) },
    plain("q4_k", 14, TensorType::Q4_K),
    WeightType { name: "q4_k_m", file_type: 15, most: TensorType::Q4_K, better: Some(TensorType::Q6_K) },
    plain("q3_k", 11, TensorType::Q3_K),
    plain("q2_k", 10, TensorType::Q2_K),
    plain("q5_1", 9, TensorType::Q5_1),
    plain("q5_0", 8, TensorType::Q5_0),
    plain("q4_1", 3, TensorType::Q4_1),
    plain("q4_0", 2, TensorType::Q4_0),
    plain("iq4_nl", 25, TensorType::IQ4_NL),
];

/// Names [`Spec::with_type`](super::Spec::with_type) knows.
pub fn type_names() -> impl Iterator<Item = &'static str> {
    WEIGHT_TYPES.iter().map(|t| t.name)
}
