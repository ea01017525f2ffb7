//! Why the library could not do what it was asked, with what to do about it.

use std::borrow::Cow;
use std::path::PathBuf;

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::pipeline::PipelineError;
use dim_core::shared::NoSession;
use dim_core::stage::StageError;
use dim_wire::keys::KeyError;
use dim_wire::transport::discover::DiscoverError;
use dim_wire::transport::{LinkError, LinkErrorKind};
use gguf_tools::failure::Explained as _;
use gguf_tools::manifest::ManifestError;
use gguf_tools::needs::NeedsError;
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceError;

use crate::event::Offered;
use crate::host::address::BadAddress;
use crate::host::constraint::ConstraintError;
use crate::host::template::TemplateError;

/// An option that is out of range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{option} {value}: must be {rule}")]
pub struct BadOption {
    /// Its name here: the field of [`Resources`](crate::Resources) or [`Sampling`](crate::Sampling), or the builder's method.
    pub option: &'static str,
    /// What was given.
    pub value: String,
    /// What it must be.
    pub rule: &'static str,
}

impl BadOption {
    pub(crate) fn new(option: &'static str, value: impl ToString, rule: &'static str) -> BadOption {
        BadOption { option, value: value.to_string(), rule }
    }
}

/// Why something could not be done. [`hint`](Error::hint) says what to do about it; [`is_misuse`](Error::is_misuse) whose
/// doing it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option is out of range.
    #[error(transparent)]
    Option(#[from] BadOption),

    // ---- files
    /// A manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A slice cannot be used.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A whole model cannot be used.
    #[error(transparent)]
    Model(#[from] gguf_tools::gguf::Error),
    /// llama.cpp does not survive a file, or refuses it.
    #[error("{}: {why}", path.display())]
    Unsurvived {
        /// The file.
        path: PathBuf,
        /// What became of the process that tried it.
        #[source]
        why: Box<NeedsError>,
    },
    /// A slice was named as the whole model.
    #[error("{} is a slice of a model, and not the model", .0.display())]
    NotTheModel(PathBuf),
    /// Another model than the one that was cut was named beside it.
    #[error("{} is not the model that was cut: its {differ} are others", path.display())]
    CutFromAnother {
        /// The file.
        path: PathBuf,
        /// `parameters` or `weights`.
        differ: &'static str,
    },
    /// A slice is another part of the model than the one it was named as.
    #[error("{} is a {found} slice, not a {wanted}", path.display())]
    WrongRole {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: Role,
        /// What it had to be.
        wanted: Role,
    },
    /// A worker was given a slice that stays with the host.
    #[error("{} is a {found} slice; a worker serves a middle", path.display())]
    NotAMiddle {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: Role,
    },
    /// Two slices have the same weights and other settings.
    #[error(
        "{} and {} hold the same weights with other settings (rope, norms, ...)", path.display(), other.display()
    )]
    OtherSettings {
        /// One file.
        path: PathBuf,
        /// The other one.
        other: PathBuf,
    },
    /// Two slices are of different models.
    #[error(transparent)]
    OtherModel(Box<DifferentModels>),

    // ---- who has which blocks
    /// No stage has these blocks.
    #[error("nobody has blocks {blocks}: {}", who_has(.held))]
    NobodyHas {
        /// The blocks.
        blocks: BlockRange,
        /// Who has which.
        held: Vec<(String, BlockRange)>,
    },
    /// No worker has these blocks, and the slice is not at hand.
    #[error("nobody has blocks {blocks}: no worker holds them, and {} is not here", path.display())]
    NotHere {
        /// The blocks.
        blocks: BlockRange,
        /// The slice.
        path: PathBuf,
    },
    /// The slices that stay with the host are not beside the manifest that names them.
    #[error("{} is not there, which {} names", path.display(), manifest.display())]
    NotBeside {
        /// The slice.
        path: PathBuf,
        /// The manifest.
        manifest: PathBuf,
    },
    /// Workers' blocks are to run here when they stay away, and a slice for that is not at hand.
    #[error("blocks {blocks} could not run here if their worker stays away: {} is not here", path.display())]
    NoReserve {
        /// The blocks.
        blocks: BlockRange,
        /// The slice.
        path: PathBuf,
    },
    /// The same where no file is named.
    #[error(
        "blocks {blocks} could not run here if their worker stays away: no slice with these blocks is named"
    )]
    NoReserveNamed {
        /// The blocks.
        blocks: BlockRange,
    },
    /// A stage gives other rows than the next one takes.
    #[error(transparent)]
    OtherRows(Box<OtherRows>),
    /// More than one stage has a block.
    #[error("two stages have block {block}: {}", who_has(.held))]
    TwoHave {
        /// The block.
        block: u32,
        /// Who has which.
        held: Vec<(String, BlockRange)>,
    },

    // ---- workers
    /// What is given as a worker is no address.
    #[error("worker {0}")]
    Address(#[from] BadAddress),
    /// There is no key for a worker.
    #[error("{source}")]
    NoKey {
        /// The worker's address.
        address: String,
        /// Why not.
        source: KeyError,
    },
    /// A key or the place of the keys cannot be read.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An address without a port, and nothing listens at the usual one: not waited for, since it may never be right.
    #[error("{given:?} names no port, and nothing listens at {address}")]
    NothingAtAssumedPort {
        /// As it was given.
        given: String,
        /// As it was dialled.
        address: String,
    },
    /// A worker holds nothing.
    #[error("the worker at {address} has no slice yet")]
    NoSliceThere {
        /// The worker.
        address: String,
    },
    /// A worker holds a slice of another model.
    #[error("the worker at {address} holds a slice of another model ({offer}); {} is of {model_name}", head.display())]
    OtherModelThere {
        /// The worker.
        address: String,
        /// What it says that it holds.
        offer: Offered,
        /// The host's head.
        head: PathBuf,
        /// The host's model.
        model_name: String,
    },
    /// A worker says of its blocks what cannot be.
    #[error("the worker at {address} says that it holds {offer}, and there are no such blocks")]
    NoSuchBlocks {
        /// The worker.
        address: String,
        /// What it says that it holds.
        offer: Offered,
    },
    /// The workers of the local network cannot be looked for.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// No worker of the local network could be used.
    #[error("no usable worker for blocks {} of {model_name} within {within_s} s", ranges(blocks))]
    NoneFound {
        /// The blocks that nobody has.
        blocks: Vec<BlockRange>,
        /// The model.
        model_name: String,
        /// How long they were looked for.
        within_s: u64,
        /// Whether any worker was seen at all.
        any_seen: bool,
    },
    /// There is no link to a worker.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A worker failed its check, before the first step.
    #[error("{stage}: {source}")]
    Check {
        /// The stage's name.
        stage: String,
        /// Why.
        source: StageError,
    },
    /// A worker cannot listen where it was told to.
    #[error("{}", cannot_listen(.0))]
    Listen(LinkError),

    /// A worker has caches for fewer conversations than the host is to have.
    #[error("{}", too_few_sessions(.address, *.has, *.needed))]
    TooFewSessions {
        /// The worker.
        address: String,
        /// How many it has.
        has: u32,
        /// How many the host is to have.
        needed: u32,
    },

    /// Connecting was [called off](crate::HostBuilder::unless).
    #[error("connecting was called off")]
    CalledOff,

    // ---- running
    /// Every conversation that there can be is being held.
    #[error(transparent)]
    NoSession(#[from] NoSession),
    /// A step did not come out of the pipeline.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// llama.cpp could not load a file or evaluate it.
    #[error(transparent)]
    Llama(#[from] llama_sys_patch::Error),
    /// There is no room for a slice's cache and buffers, or it cannot be evaluated apart.
    #[error("{}: {source}", path.display())]
    Load {
        /// The slice.
        path: PathBuf,
        /// What llama.cpp says.
        source: llama_sys_patch::Error,
    },
    /// A text cannot be read as tokens.
    #[error("{0}")]
    Text(#[source] llama_sys_patch::Error),
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A text has more tokens than the context positions.
    #[error("the prompt has {n_tokens} tokens, the context {n_ctx}")]
    PromptTooLong {
        /// Tokens of the text.
        n_tokens: usize,
        /// Positions of the context.
        n_ctx: u32,
    },
    /// A token that the vocabulary does not have.
    #[error("token {token} is not in the vocabulary of {n_vocab}")]
    NoSuchToken {
        /// The token.
        token: i32,
        /// How many there are.
        n_vocab: usize,
    },
    /// A conversation cannot be rendered with the model's template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A reply cannot be held to what it has to be.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
}

impl Error {
    /// What to do about it, where there is more to say than the error itself does; in the words of this library. A program
    /// whose options have names of their own says it by the variant, as `dim-host` does.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Unsurvived { why, .. } => return why.hint().map(Cow::into_owned),
            Error::NotTheModel(_) => "give the file that was cut; the slices run as a `Host`",
            Error::CutFromAnother { .. } => "give the file that was cut, or cut this one with dim-split",
            Error::WrongRole { .. } => "`Host::open` with STEM.split.json names all files at once",
            Error::NotAMiddle { .. } => "the head and the tail stay with the host",
            Error::OtherSettings { .. } | Error::OtherModel(_) => "take the slices of one dim-split run",
            Error::NobodyHas { .. } => {
                "name the worker that holds them with `HostBuilder::worker`, or their file with `Host::of_slices`"
            }
            Error::NotHere { .. } | Error::Discover(_) => NAME_THE_WORKER,
            Error::NotBeside { .. } => {
                "dim-split writes a manifest and its slices into one folder: keep them together, or cut the model again"
            }
            Error::NoReserve { .. } | Error::NoReserveNamed { .. } => {
                "copy the slices of the workers beside the split file, or do without `HostBuilder::fall_back`"
            }
            Error::OtherRows(_) => {
                "take the slices of one dim-split run, and one version of DIM on all machines"
            }
            Error::TwoHave { .. } => "take the slices of one dim-split run, and name each worker once",
            Error::Address(e) => e.hint(),
            Error::NoKey { address, .. } => {
                return Some(format!("pair with {address}, with the code that the worker shows"));
            }
            Error::NothingAtAssumedPort { .. } => {
                "start the worker there first, and name the port that it shows"
            }
            Error::NoSliceThere { .. } => "packages reach a phone with `dim-host push`",
            Error::OtherModelThere { .. } | Error::NoSuchBlocks { .. } => {
                "start it with the middle slice that dim-split wrote beside this head"
            }
            Error::NoneFound { any_seen: false, .. } => {
                "none was seen: is it running on this network, the phone's app in the foreground? or name the worker \
                 with `HostBuilder::worker`"
            }
            Error::NoneFound { any_seen: true, .. } => {
                "the events say what is wrong with each that was seen; or name the worker with `HostBuilder::worker`"
            }
            Error::Link(error) => return error.hint().map(str::to_owned),
            Error::Check { source, .. } if source.may_pass() => "start it again, then connect again",
            Error::Check { source, .. } => return source.hint().map(str::to_owned),
            Error::Listen(_) => "listen at an address of this machine and a port, as 0.0.0.0:7878",
            Error::TooFewSessions { needed, .. } => {
                return Some(format!("start it with {needed} sessions, or the host with fewer"));
            }
            Error::NoSession(_) => {
                "drop one of the sessions first, or connect with `HostBuilder::sessions(n)` for more"
            }
            Error::Pipeline(error) => return error.hint().map(str::to_owned),
            Error::Load { .. } | Error::Llama(llama_sys_patch::Error::OutOfMemory(_)) => LESS_MEMORY,
            Error::EmptyPrompt => "push at least one token",
            Error::PromptTooLong { n_tokens, .. } => {
                let enough = n_tokens.next_power_of_two();
                return Some(format!(
                    "take a context of {enough} or more (`Resources::n_ctx`), on the workers too"
                ));
            }
            Error::NoSuchToken { .. } => "take tokens of this model: `tokenize` makes them of a text",
            Error::Manifest(error) => return error.hint().map(Cow::into_owned),
            Error::Slice(error) => return error.hint().map(Cow::into_owned),
            Error::Model(error) => return error.hint().map(Cow::into_owned),
            Error::Template(error) => error.hint(),
            Error::Constraint(error) => return error.hint().map(str::to_owned),
            Error::Key(error) => return error.hint().map(str::to_owned),
            Error::Option(_) | Error::Llama(_) | Error::Text(_) | Error::CalledOff => return None,
        };
        Some(text.to_owned())
    }

    /// Whether what was asked for, or a file, is wrong; otherwise something failed on the way. The programs end with
    /// exit code 2 and 1.
    pub fn is_misuse(&self) -> bool {
        match self {
            Error::Pipeline(PipelineError::FromWithin) => true,
            Error::Discover(_)
            | Error::NoneFound { .. }
            | Error::Check { .. }
            | Error::Pipeline(_)
            | Error::Llama(_)
            | Error::Template(TemplateError::NotStarted(_))
            | Error::CalledOff
            | Error::Load { .. } => false,
            Error::Unsurvived { why, .. } => why.is_misuse(),
            Error::Manifest(error) => error.is_misuse(),
            Error::Slice(error) => error.is_misuse(),
            Error::Model(error) => error.is_misuse(),
            Error::Link(error) => error.is_misuse(),
            Error::Constraint(error) => error.is_misuse(),
            _ => true,
        }
    }
}

/// What two stages that follow each other say of the rows between them.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct OtherRows {
    /// The stage whose rows they are.
    pub gives: String,
    /// What those are made of.
    pub given: String,
    /// The stage behind it.
    pub takes: String,
    /// What its are made of.
    pub taken: String,
}

impl OtherRows {
    fn sentence(&self) -> String {
        let OtherRows { gives, given, takes, taken } = self;
        match given == taken {
            true => format!("{gives} and {takes} mean other tensors by the same rows ({given})"),
            false => format!("{gives} gives rows of {given}, {takes} takes rows of {taken}"),
        }
    }
}

/// Slices that cannot be of one split.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} and {} are slices of different models ({}, {})",
    path.display(), other.display(), named(.model), named(.other_model)
)]
pub struct DifferentModels {
    /// One file.
    pub path: PathBuf,
    /// Its model's name and identity.
    pub model: (String, Sha),
    /// The other one.
    pub other: PathBuf,
    /// Its model's name and identity.
    pub other_model: (String, Sha),
}

const LESS_MEMORY: &str = "a smaller context needs less memory, and so do fewer blocks here; or close other programs, or allow \
                           this one more (ulimit -v, the limit of its container)";
const NAME_THE_WORKER: &str = "name the worker with `HostBuilder::worker`";

fn named((name, sha256): &(String, Sha)) -> String {
    format!("{name} {:.8}", sha256.to_string())
}

fn too_few_sessions(address: &str, has: u32, needed: u32) -> String {
    let sessions = if has == 1 { "session" } else { "sessions" };
    format!("the worker at {address} serves {has} {sessions} at once, this host is to have {needed}")
}

fn who_has(held: &[(String, BlockRange)]) -> String {
    let each = held.iter().map(|(who, blocks)| format!("{who} has {blocks}"));
    each.collect::<Vec<_>>().join(", ")
}

fn ranges(blocks: &[BlockRange]) -> String {
    blocks.iter().map(BlockRange::to_string).collect::<Vec<_>>().join(" and ")
}

fn cannot_listen(error: &LinkError) -> String {
    match &error.kind {
        LinkErrorKind::Unreachable { text, .. } => format!("cannot listen on {}: {text}", error.peer),
        _ => error.to_string(),
    }
}
