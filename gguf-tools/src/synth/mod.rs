//! Models of real architectures and real shapes with random weights, for tests, benchmarks and the demo.
//!
//! A synthesised file is what a converter would have written: every key and tensor its family's loader wants, a
//! tokenizer and a chat template, in any of the usual weight types. It loads in llama.cpp unchanged, its activations
//! stay finite, and its text does not collapse into one word. What it is not: a model that knows anything.
//!
//! The same [`Spec`] gives the same bytes on every machine. Memory is constant whatever the size.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! use gguf_tools::synth::Spec;
//! let path = folder.path().join("tiny.gguf");
//! Spec::tiny("qwen2")?.with_type("q8_0")?.tied(true).seed(7).write(&path)?;
//! # Ok(())
//! # }
//! ```

mod error;
mod families;
mod shapes;
mod tokenizer;
mod types;
mod weights;

use std::{
    path::Path,
    sync::mpsc::{self, Receiver, SyncSender},
    thread,
};

pub use error::Error;
pub use families::{FAMILIES, Family, Head};
pub use shapes::{Experts, RopeFactors, SHAPES, Shape};
pub use tokenizer::MIN_VOCAB;
pub use types::type_names;

use crate::{
    gguf::{
        TensorType, Value,
        write::{GgufWriter, TensorSpec, WriteError, remove_stale},
    },
    os,
};
use families::{Fill, Tensor};
use tokenizer::Tokenizer;
use types::WeightType;
use weights::Filler;

/// A model to be synthesised: a shape, a family, a weight type and a seed.
#[derive(Debug, Clone)]
pub struct Spec {
    shape: Shape,
    family: &'static Family,
    weights: WeightType,
    tied: bool,
    seed: u64,
    gain: f32,
    stop: f32,
}

impl Spec {
    /// The shape of this name (see [`SHAPES`]) in this architecture (see [`FAMILIES`]); None takes the shape's own,
    /// or qwen2 for shapes that every family can have. F16, seed 1, and an lm_head as the real model has it.
    ///
    /// # Errors
    /// An unknown name, or a real model's shape with another model's architecture.
    pub fn new(shape: &str, arch: Option<&str>) -> Result<Self, Error> {
        let shape = Shape::find(shape).ok_or_else(|| Error::UnknownShape { name: shape.to_owned() })?;
        let arch = match (shape.arch, arch) {
            (Some(own), Some(asked)) if own != asked => {
                return Err(Error::ShapeIsOf { shape: shape.name, own, asked: asked.to_owned() });
            }
            (own, asked) => own.or(asked).unwrap_or("qwen2"),
        };
        let family = Family::find(arch).ok_or_else(|| Error::UnknownArch { name: arch.to_owned() })?;
        let mut shape = *shape;
        if shape.arch.is_none() {
            family.adapt(&mut shape);
        }
        let tied = match family.head {
            Head::Either => shape.tied,
            Head::Tied => true,
            Head::Own => false,
        };
        Ok(Self { shape, family, weights: WeightType::F16, tied, seed: 1, gain: 1.0, stop: QUIET })
    }

    /// A model of a few megabytes: 6 blocks of 256 values, 512 tokens.
    ///
    /// # Errors
    /// An unknown architecture.
    pub fn tiny(arch: &str) -> Result<Self, Error> {
        Self::new("tiny", Some(arch))
    }

    /// Changes the type of the matrices, by name: a GGUF type (`f16`, `q8_0`, `q4_k`, ...) or one of the usual
    /// mixtures `q4_k_m` and `q5_k_m`.
    ///
    /// # Errors
    /// An unknown name.
    pub fn with_type(mut self, name: &str) -> Result<Self, Error> {
        self.weights = WeightType::find(name).ok_or_else(|| Error::UnknownType { name: name.to_owned() })?;
        Ok(self)
    }

    /// Whether the lm_head is the token embedding. Refused by [`write`](Self::write) where the family's loader takes
    /// only the other.
    pub fn tied(mut self, tied: bool) -> Self {
        self.tied = tied;
        self
    }

    /// Another model of the same kind.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Another vocabulary size, at least [`MIN_VOCAB`].
    pub fn vocab(mut self, n_vocab: u32) -> Self {
        self.shape.n_vocab = n_vocab;
        if self.shape.first_special.is_some_and(|first| first + 4 > n_vocab) {
            self.shape.first_special = None;
        }
        self
    }

    /// Another context length.
    pub fn context(mut self, n_ctx: u32) -> Self {
        self.shape.n_ctx = n_ctx;
        self
    }

    /// Another number of blocks.
    pub fn blocks(mut self, n_blocks: u32) -> Self {
        self.shape.n_blocks = n_blocks;
        self
    }

    /// A stretched rotation, which comes with tensors that belong to no block.
    pub fn rope_factors(mut self, factors: RopeFactors) -> Self {
        self.shape.rope_factors = factors;
        self
    }

    /// Alternates blocks that see the last `window` positions with blocks that see all, as OLMo 3 does.
    pub fn window(mut self, window: u32) -> Self {
        self.shape.window = Some(window);
        self
    }

    /// A mixture of experts in place of the feed-forward part.
    pub fn experts(mut self, experts: Experts) -> Self {
        self.shape.experts = Some(experts);
        self
    }

    /// Makes every hidden row `gain` times as long without changing what the model says. The rows' root mean square
    /// is about 2.5 at the end of a model, so a gain of 100,000 overflows F16.
    pub fn gain(mut self, gain: f32) -> Self {
        self.gain = gain;
        self
    }

    /// How likely the model ends its text: 0.02 (the start value) is never, 1 as likely as any other token, 3 soon.
    pub fn stop(mut self, stop: f32) -> Self {
        self.stop = stop;
        self
    }

    /// The dimensions.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The architecture's name in GGUF.
    pub fn arch(&self) -> &'static str {
        self.family.arch
    }

    /// A name for the model and its file, such as `tiny-qwen2-f16`.
    pub fn name(&self) -> String {
        match self.shape.arch {
            Some(_) => format!("{}-{}", self.shape.name, self.weights.name),
            None => format!("{}-{}-{}", self.shape.name, self.family.arch, self.weights.name),
        }
    }

    /// Weights, as publishers count them: every value of every tensor.
    pub fn n_weights(&self) -> u64 {
        let tensors = self.family.tensors(&self.shape, self.tied, self.gain);
        tensors.iter().map(|tensor| tensor.dims.iter().product::<u64>()).sum()
    }

    /// Bytes of the file, without writing it.
    ///
    /// # Errors
    /// As [`write`](Self::write), apart from those of the file system.
    pub fn bytes(&self) -> Result<u64, Error> {
        let plan = self.plan()?;
        Ok(GgufWriter::planned_bytes(&plan.metadata, &plan.descriptions)?)
    }

    /// Writes the file. It appears under its name when it is whole.
    ///
    /// # Errors
    /// The family cannot have what was asked for, or the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.write_with(path, |_, _| {})
    }

    /// As [`write`](Self::write); `progress` is told the bytes of tensor data written and their total.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_with(
        &self,
        path: impl AsRef<Path>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), Error> {
        let path = path.as_ref();
        let plan = self.plan()?;
        let need = GgufWriter::planned_bytes(&plan.metadata, &plan.descriptions)?;
        let folder = os::folder_of(path);
        // what a killed run left; whether that can be removed is not this run's concern
        let _ = remove_stale(path);
        if let Some(have) = os::free_bytes(folder).filter(|&have| have < need) {
            return Err(Error::Space { need, have, folder: folder.to_owned() });
        }
        let mut writer = GgufWriter::create(path, &plan.metadata, &plan.descriptions)?;
        let mut pieces = Vec::new();
        for (tensor, description) in plan.tensors.iter().zip(&plan.descriptions) {
            self.cut(tensor, description.tensor_type, &plan.tokenizer, &mut pieces);
        }
        let total = pieces.iter().map(|piece| piece.n_bytes as u64).sum();
        let mut done = 0;
        in_parallel(&pieces, |bytes| {
            writer.write(bytes)?;
            done += bytes.len() as u64;
            progress(done, total);
            Ok::<_, WriteError>(())
        })?;
        writer.finish()?;
        Ok(())
    }

    fn plan(&self) -> Result<Blueprint, Error> {
        let shape = &self.shape;
        match (self.family.head, self.tied) {
            (Head::Tied, false) => return Err(Error::OnlyTied { arch: self.family.arch }),
            (Head::Own, true) => return Err(Error::OnlyOwnHead { arch: self.family.arch }),
            _ => {}
        }
        for (what, value, least) in [
            ("vocabulary", shape.n_vocab, MIN_VOCAB),
            ("context", shape.n_ctx, 1),
            ("block count", shape.n_blocks, 1),
        ] {
            if value < least {
                return Err(Error::TooSmall { what, value, least });
            }
        }

        let tokenizer = Tokenizer::new(shape.n_vocab, shape.first_special);
        let mut metadata = vec![
            ("general.architecture".to_owned(), Value::string(self.family.arch)),
            ("general.type".to_owned(), Value::string("model")),
            // llama.cpp looks for "phi3" in this name, and expects of such a model tokens that only a
            // SentencePiece vocabulary has
            ("general.name".to_owned(), Value::string(self.name().replace("phi3", "phi 3"))),
            ("general.description".to_owned(), Value::string("random weights")),
            ("general.file_type".to_owned(), Value::U32(self.weights.file_type)),
            ("general.quantization_version".to_owned(), Value::U32(2)),
        ];
        metadata.extend(self.family.metadata(shape));
        metadata.extend(tokenizer.metadata(self.family.pre_tokenizer, self.family.add_bos));

        let tensors = self.family.tensors(shape, self.tied, self.gain);
        let describe =
            |tensor: &Tensor| TensorSpec::new(&tensor.name, self.type_of(tensor), &tensor.dims[..]);
        let descriptions = tensors.iter().map(describe).collect();
        Ok(Blueprint { tokenizer, metadata, tensors, descriptions })
    }

    fn type_of(&self, tensor: &Tensor) -> TensorType {
        let wanted = match tensor.fill {
            Fill::Vector(..) | Fill::Router(_) | Fill::Values(_) => return TensorType::F32,
            Fill::Matrix(_) | Fill::Vocabulary(_) => {
                self.weights.of(&tensor.name, self.tied, self.shape.n_blocks)
            }
        };
        weights::type_for_row(wanted, tensor.dims[0])
    }

    /// Cuts one tensor into pieces that can be filled on their own.
    fn cut(&self, tensor: &Tensor, tensor_type: TensorType, tokenizer: &Tokenizer, pieces: &mut Vec<Piece>) {
        let n_values: u64 = tensor.dims.iter().product();
        let key = weights::tensor_key(self.seed, &tensor.name);
        // ranges of values with one deviation each
        let ranges = match &tensor.fill {
            Fill::Values(values) => {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
                pieces.push(Piece { n_bytes: bytes.len(), first: 0, content: Content::Bytes(bytes) });
                return;
            }
            Fill::Matrix(deviation) | Fill::Router(deviation) => vec![(0..n_values, 0.0, *deviation)],
            Fill::Vector(mean, deviation) => vec![(0..n_values, *mean, *deviation)],
            Fill::Vocabulary(deviation) => {
                let row = tensor.dims[0];
                let special = u64::from(tokenizer.special.start) * row;
                let stop = u64::from(tokenizer.eos()) * row;
                let quiet = deviation * QUIET;
                vec![
                    (0..special, 0.0, *deviation),
                    (special..stop, 0.0, quiet),
                    (stop..stop + row, 0.0, deviation * self.stop),
                    (stop + row..n_values, 0.0, quiet),
                ]
            }
        };
        for (range, mean, deviation) in ranges {
            let mut first = range.start;
            while first < range.end {
                let n = PIECE_VALUES.min(range.end - first);
                let n_bytes = tensor_type.row_bytes(n).expect("rows and pieces are whole blocks") as usize;
                pieces.push(Piece {
                    n_bytes,
                    first,
                    content: Content::Random { key, tensor_type, mean, deviation },
                });
                first += n;
            }
        }
    }
}

/// Everything that is known before the first byte is written.
struct Blueprint {
    tokenizer: Tokenizer,
    metadata: Vec<(String, Value<'static>)>,
    tensors: Vec<Tensor>,
    /// one per tensor
    descriptions: Vec<TensorSpec>,
}

/// Part of one tensor's data.
struct Piece {
    n_bytes: usize,
    /// Position of its first value in the tensor.
    first: u64,
    content: Content,
}

#[derive(Clone, PartialEq)]
enum Content {
    Bytes(Vec<u8>),
    Random { key: u64, tensor_type: TensorType, mean: f32, deviation: f32 },
}

/// Fills all pieces on all cores and hands them over in order. A few pieces are in memory at a time, whatever their
/// number: each thread is at most two ahead.
fn in_parallel<E>(pieces: &[Piece], mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(pieces.len()).max(1);
    thread::scope(|scope| {
        let lanes: Vec<Lane> = (0..n_threads)
            .map(|lane| {
                let (full_in, full) = mpsc::sync_channel::<Vec<u8>>(1);
                let (empty, empty_out) = mpsc::sync_channel::<Vec<u8>>(3);
                scope.spawn(move || {
                    let mut filler: Option<(&Content, Filler)> = None;
                    for piece in pieces.iter().skip(lane).step_by(n_threads) {
                        let mut buffer = empty_out.try_recv().unwrap_or_default();
                        piece.fill(&mut filler, &mut buffer);
                        if full_in.send(buffer).is_err() {
                            return; // writing failed
                        }
                    }
                });
                Lane { full, empty }
            })
            .collect();
        for lane in (0..n_threads).cycle().take(pieces.len()) {
            let Lane { full, empty } = &lanes[lane];
            let buffer = full.recv().expect("a lane fills every piece of its own");
            take(&buffer)?;
            // a lane that has filled its last piece wants no more buffers
            let _ = empty.try_send(buffer);
        }
        Ok(())
    })
}

/// A filling thread, as the writing one sees it: filled buffers come, empty ones go back.
struct Lane {
    full: Receiver<Vec<u8>>,
    empty: SyncSender<Vec<u8>>,
}

impl Piece {
    /// `filler` is the one of the piece before, which most often serves this one too.
    fn fill<'a>(&'a self, filler: &mut Option<(&'a Content, Filler)>, buffer: &mut Vec<u8>) {
        buffer.resize(self.n_bytes, 0);
        match &self.content {
            Content::Bytes(bytes) => buffer.copy_from_slice(bytes),
            content @ Content::Random { key, tensor_type, mean, deviation } => {
                if filler.as_ref().is_none_or(|(of, _)| *of != content) {
                    *filler = Some((content, Filler::new(*tensor_type, *key, *mean, *deviation)));
                }
                let (_, filler) = filler.as_ref().expect("set just now");
                filler.fill(self.first, buffer);
            }
        }
    }
}

/// What rows of tokens that a model should never say are multiplied with.
const QUIET: f32 = 0.02;

/// Values of one piece: whole blocks of every type, and long enough for threads and disk.
const PIECE_VALUES: u64 = 1 << 19;
