//! From file names and addresses to a pipeline that is ready: slices checked and loaded, workers dialled, every
//! block of the model in exactly one stage.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gguf_tools::canary::Canary;
use gguf_tools::gguf::{Gguf, check};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;
use llama_sys_patch::{ContextParams, FlashAttn, LogLevel, Model, ModelParams, Stage, StageParams};

use crate::device;
use crate::failure::Failure;
use crate::host::auto::{self, AUTO};
use crate::host::machine::MachineArgs;
use crate::progress::Progress;
use crate::stage::local::LlamaStage;
use crate::stage::remote::WorkerStage;
use crate::stage::verified::{Verify, open_slice};
use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::guard::{Guarded, Room};
use dim_core::pipeline::{Patience, Pipeline, StageSlot};
use dim_core::rows::RowType;
use dim_core::stage::RemoteStage;
use dim_wire::keys::{Key, KeyStore};
use dim_wire::rows::RowTypes;
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::discover::MDNS_PORT;
use dim_wire::transport::{LinkError, Timing, inquire};

/// The parts of a split model and where they are.
#[derive(Clone, Debug, clap::Args)]
pub struct SplitArgs {
    /// What dim-split wrote: names the head and the tail, and the middles for stages that are to run here
    #[arg(long, value_name = "STEM.split.json", conflicts_with_all = ["head", "tail", "middle"], required_unless_present = "head")]
    split: Option<PathBuf>,
    /// The head slice
    #[arg(long, value_name = "FILE", requires = "tail")]
    head: Option<PathBuf>,
    /// The tail slice
    #[arg(long, value_name = "FILE", requires = "head")]
    tail: Option<PathBuf>,
    /// A middle slice to run in this process
    #[arg(long, value_name = "FILE")]
    middle: Vec<PathBuf>,
    /// A worker that holds a middle slice (repeat for more; their order does not matter); `auto`: those paired with
    /// this machine that are found on the local network
    #[arg(long, value_name = "ADDR:PORT|auto")]
    worker: Vec<String>,
    /// Number format of the rows that cross the network (default: f16)
    #[arg(long, value_enum, value_name = "TYPE")]
    wire: Option<WireType>,
    /// The key shared with the workers: one line, 64 hex digits (default: the one from pairing)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// When to compare the slices' weights with their digests
    #[arg(long, value_enum, value_name = "WHEN", default_value = "once")]
    verify: Verify,
    /// Map the slices instead of reading them: they must not change while this runs
    #[arg(long)]
    mmap: bool,
    /// Longest time a worker may take for one step
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    step_timeout: u64,
    /// Do not hold the workers' answers to a known input against the right ones
    #[arg(long)]
    no_canary: bool,
    /// How long a lost worker is looked for before the reply ends
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    give_up_after: u64,
    /// How long instead, if it has said that it pauses (a locked phone) or is too hot
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait_paused: u64,
    /// The port of multicast DNS, for tests
    #[arg(long, value_name = "PORT", default_value_t = MDNS_PORT, hide = true)]
    mdns_port: u16,
}

impl SplitArgs {
    fn patience(&self) -> Patience {
        Patience {
            give_up_after: Duration::from_secs(self.give_up_after),
            paused_for: Duration::from_secs(self.wait_paused),
            ..Patience::default()
        }
    }
}

/// Number format of the rows that cross the network.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum WireType {
    /// 2 bytes a value
    #[default]
    F16,
    /// 4 bytes a value: bit-exact
    F32,
}

impl WireType {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            WireType::F16 => "f16",
            WireType::F32 => "f32",
        }
    }
}

impl SplitArgs {
    /// The number format that was asked for, if one was.
    pub fn wire(&self) -> Option<WireType> {
        self.wire
    }

    /// The same with another number format.
    pub fn with_wire(&self, wire: WireType) -> SplitArgs {
        SplitArgs { wire: Some(wire), ..self.clone() }
    }
}

/// A split model, ready.
pub struct Split {
    /// Its stages.
    pub pipeline: Pipeline,
    /// The head, for its vocabulary and chat template.
    pub vocabulary: Model,
    /// Positions of a conversation.
    pub n_ctx: u32,
    /// Rows per chunk.
    pub n_ubatch: u32,
    /// The model's name.
    pub model_name: String,
}

/// Where a stage is to run.
enum Place {
    File {
        path: PathBuf,
        info: SliceInfo,
    },
    Worker {
        address: String,
        key: Key,
        first: u32,
        last: u32,
        slice: Option<Sha>,
        /// How many sessions to ask for: one more than the conversation's, where the worker has it.
        sessions: u32,
        found: Option<Box<WorkerStage>>,
    },
}

impl Place {
    fn blocks(&self) -> (u32, u32) {
        match self {
            Place::File { info, .. } => (info.blocks.first, info.blocks.last),
            Place::Worker { first, last, .. } => (*first, *last),
        }
    }
}

/// Opens everything and dials everyone.
pub fn open_split(args: &SplitArgs, machine: &MachineArgs) -> Result<Split, Failure> {
    set_log(machine);
    let files = Files::of(args)?;
    let head = open(&files.head, Role::Head, args.verify)?;
    let tail = open(&files.tail, Role::Tail, args.verify)?;
    same_model(&files.head, &head, &files.tail, &tail)?;
    let n_ctx = machine.n_ctx_for(head.hparams.n_ctx_train);

    // who holds what
    let mut places = vec![Place::File { path: files.head.clone(), info: head.clone() }];
    for address in args.worker.iter().filter(|address| *address != AUTO) {
        let key = key_for(address, args.key_file.as_deref())?;
        let offer = keep_trying(args.patience(), || inquire(address, &key, &Timing::default()))?;
        if offer.role == SliceRole::None {
            return Err(Failure::misuse(format!("the worker at {address} has no slice yet")).hint(
                "packages reach a phone with `dim-host push STEM.middle-A..B.coreml --worker ADDR:PORT`",
            ));
        }
        if offer.model != Some(head.model_sha256) {
            return Err(Failure::misuse(format!(
                "the worker at {address} holds a slice of another model ({}); {} is of {}",
                describe_offer(&offer),
                files.head.display(),
                head.model_name
            ))
            .hint("start it with the middle slice that dim-split wrote beside this head"));
        }
        places.push(Place::Worker {
            address: address.clone(),
            key,
            first: offer.blocks.first,
            last: offer.blocks.last,
            slice: files.slice_of(offer.blocks.first, offer.blocks.last),
            sessions: offer.max_sessions.min(2),
            found: None,
        });
    }
    if args.worker.iter().any(|address| address == AUTO) {
        places.extend(find_workers(args, machine, &head, &tail, n_ctx, &files, &places)?);
    }
    let covered = |first: u32, places: &[Place]| places.iter().any(|p| p.blocks().0 == first);
    for middle in &files.middles {
        // a middle that no worker holds runs here, if its file is at hand
        if covered(middle.first, &places) {
            continue;
        }
        if !middle.path.is_file() {
            return Err(Failure::misuse(format!(
                "nobody has blocks {}..{}: no worker holds them, and {} is not here",
                middle.first,
                middle.last,
                middle.path.display()
            ))
            .hint("name the worker with --worker ADDR:PORT"));
        }
        let info = open(&middle.path, Role::Middle, args.verify)?;
        same_model(&files.head, &head, &middle.path, &info)?;
        places.push(Place::File { path: middle.path.clone(), info });
    }
    places.push(Place::File { path: files.tail.clone(), info: tail });
    places.sort_by_key(|p| p.blocks().0);
    check_chain(&places, head.model_blocks)?;

    // loaded and dialled
    let dtype = match args.wire.unwrap_or_default() {
        WireType::F16 => RowType::F16,
        WireType::F32 => RowType::F32,
    };
    let mut n_ubatch = machine.n_ubatch;
    let mut slots: Vec<Option<StageSlot>> = Vec::new();
    for place in &mut places {
        slots.push(match place {
            Place::File { .. } => None,
            Place::Worker { address, key, first, last, slice, sessions, found } => {
                let canary = files.canary_of(*first, *last).filter(|_| !args.no_canary);
                if canary.is_none() && machine.verbose {
                    eprintln!("note: whether {address} computes right is not checked: {}", no_canary(args));
                }
                let mut terms = worker_terms(args, machine, &head, n_ctx, (*first, *last), *slice);
                if canary.is_some() {
                    terms.max_sessions = *sessions;
                }
                let limit = Duration::from_secs(args.step_timeout);
                let stage = match found.take() {
                    Some(stage) => *stage,
                    None => keep_trying(args.patience(), || {
                        WorkerStage::connect(address, key, terms.clone(), Timing::default(), limit)
                    })?,
                };
                // the last one is nobody else's, if there is more than one
                let session = stage.link().map_or(0, |link| link.agreed().max_sessions.saturating_sub(1));
                if let Some(link) = stage.link() {
                    n_ubatch = n_ubatch.min(link.agreed().max_rows);
                }
                Some(StageSlot::Remote(match canary {
                    None => Box::new(stage),
                    Some(canary) => {
                        let n_embd = head.hparams.n_embd as usize;
                        let room = Room { n_embd, dtype, n_ctx, max_rows: n_ubatch, session };
                        let stage = Guarded::new(stage, canary.clone(), room);
                        Box::new(checked(stage, args.patience(), machine.verbose)?)
                    }
                }))
            }
        });
    }
    let mut vocabulary = None;
    let mut stages = Vec::new();
    for (place, slot) in places.iter().zip(slots) {
        stages.push(match (place, slot) {
            (_, Some(remote)) => remote,
            (Place::File { path, info }, None) => {
                let stage = load_stage(path, info, machine, args.mmap, n_ctx, n_ubatch, 1)?;
                if info.role == Role::Head {
                    vocabulary = Some(stage.inner().model().clone());
                }
                StageSlot::Local(Box::new(stage))
            }
            (Place::Worker { .. }, None) => unreachable!("every worker was dialled above"),
        });
    }
    let vocabulary = vocabulary.expect("the head is a file");
    let pipeline = Pipeline::new(stages, dtype, args.patience());
    eprintln!("{}", picture(&places, head.model_blocks));
    Ok(Split { pipeline, vocabulary, n_ctx, n_ubatch, model_name: head.model_name })
}

/// What this host needs of the worker with these blocks.
fn worker_terms(
    args: &SplitArgs,
    machine: &MachineArgs,
    head: &SliceInfo,
    n_ctx: u32,
    (first_block, last_block): (u32, u32),
    slice: Option<Sha>,
) -> Terms {
    Terms {
        row_types: match args.wire.unwrap_or_default() {
            WireType::F16 => RowTypes::F16,
            WireType::F32 => RowTypes::F32,
        },
        role: SliceRole::Middle,
        instance: random_instance(),
        n_embd: head.hparams.n_embd,
        n_blocks: head.model_blocks,
        blocks: BlockRange { first: first_block, last: last_block },
        n_ctx,
        max_rows: machine.n_ubatch,
        max_sessions: 1,
        max_in_flight: dim_core::pipeline::MAX_IN_FLIGHT,
        model: Some(head.model_sha256),
        slice,
        params: head.params_sha256,
        arch: head.hparams.arch.clone(),
        ..Terms::blank(0, &device::software("dim-host"), &device::name())
    }
}

/// Workers of the local network for the blocks that nobody has yet.
fn find_workers(
    args: &SplitArgs,
    machine: &MachineArgs,
    head: &SliceInfo,
    tail: &SliceInfo,
    n_ctx: u32,
    files: &Files,
    places: &[Place],
) -> Result<Vec<Place>, Failure> {
    let given = args.key_file.as_deref().map(Key::from_file).transpose().map_err(Failure::misuse)?;
    let mut taken: Vec<(u32, u32)> = places.iter().map(Place::blocks).collect();
    taken.push((tail.blocks.first, tail.blocks.last));
    let need = auto::Need {
        model: head.model_sha256,
        model_name: &head.model_name,
        gaps: auto::gaps(&mut taken),
        here: files.middles.iter().filter(|m| m.path.is_file()).map(|m| (m.first, m.last)).collect(),
        keys: auto::keys(given)?,
        mdns_port: args.mdns_port,
        patience: args.patience(),
    };
    let found = auto::find(&need, &mut |address, key, blocks| {
        let slice = files.slice_of(blocks.0, blocks.1);
        let terms = worker_terms(args, machine, head, n_ctx, blocks, slice);
        let limit = Duration::from_secs(args.step_timeout);
        WorkerStage::connect(address, key, terms, Timing::default(), limit)
    })?;
    let place = |found: auto::Found| {
        let auto::Found { address, key, blocks: (first, last), stage } = found;
        let slice = files.slice_of(first, last);
        Place::Worker { address, key, first, last, slice, sessions: 1, found: Some(Box::new(stage)) }
    };
    Ok(found.into_iter().map(place).collect())
}

/// A middle that a manifest or an argument names.
struct MiddleFile {
    path: PathBuf,
    first: u32,
    last: u32,
    sha256: Option<Sha>,
    canary: Option<Canary>,
}

/// The files of a split model.
struct Files {
    head: PathBuf,
    tail: PathBuf,
    middles: Vec<MiddleFile>,
}

impl Files {
    /// The identity of the slice with these blocks, if it is known.
    fn slice_of(&self, first: u32, last: u32) -> Option<Sha> {
        self.middles.iter().find(|m| (m.first, m.last) == (first, last))?.sha256
    }

    /// What the middle with these blocks has to answer, if it is known.
    fn canary_of(&self, first: u32, last: u32) -> Option<&Canary> {
        self.middles.iter().find(|m| (m.first, m.last) == (first, last))?.canary.as_ref()
    }

    fn of(args: &SplitArgs) -> Result<Files, Failure> {
        if let Some(path) = &args.split {
            let manifest = Manifest::read(path)?;
            let file = |i: usize| Manifest::slice_path(path, &manifest.slices[i]);
            let last = manifest.slices.len() - 1;
            let middles = (1..last).map(|i| {
                let slice = &manifest.slices[i];
                let sha256 = Sha::parse(&slice.sha256);
                let canary = slice.canary.clone();
                MiddleFile { path: file(i), first: slice.first, last: slice.last, sha256, canary }
            });
            return Ok(Files { head: file(0), tail: file(last), middles: middles.collect() });
        }
        let (Some(head), Some(tail)) = (&args.head, &args.tail) else {
            return Err(Failure::misuse("give --split STEM.split.json, or --head FILE and --tail FILE"));
        };
        let middles = args.middle.iter().map(|path| {
            let info = open(path, Role::Middle, Verify::Never)?;
            let (first, last) = (info.blocks.first, info.blocks.last);
            Ok(MiddleFile { path: path.clone(), first, last, sha256: Some(info.slice_sha256), canary: None })
        });
        Ok(Files {
            head: head.clone(),
            tail: tail.clone(),
            middles: middles.collect::<Result<_, Failure>>()?,
        })
    }
}

/// Reads and checks a slice that has to be a `role`.
fn open(path: &Path, role: Role, verify: Verify) -> Result<SliceInfo, Failure> {
    let info = open_slice(path, verify)?;
    if info.role != role {
        return Err(Failure::misuse(format!("{} is a {} slice, not a {role}", path.display(), info.role))
            .hint("--split STEM.split.json names all files at once"));
    }
    Ok(info)
}

fn same_model(path: &Path, a: &SliceInfo, other: &Path, b: &SliceInfo) -> Result<(), Failure> {
    if a.model_sha256 == b.model_sha256 {
        return match (a.params_sha256, b.params_sha256) {
            (Some(ours), Some(theirs)) if ours != theirs => Err(Failure::misuse(format!(
                "{} and {} hold the same weights with other settings (rope, norms, ...)",
                path.display(),
                other.display()
            ))
            .hint("take the slices of one dim-split run")),
            _ => Ok(()),
        };
    }
    Err(Failure::misuse(format!(
        "{} and {} are slices of different models ({} {:.8}, {} {:.8})",
        path.display(),
        other.display(),
        a.model_name,
        a.model_sha256.to_string(),
        b.model_name,
        b.model_sha256.to_string()
    ))
    .hint("take the slices of one dim-split run"))
}

/// Every block in exactly one stage, in order.
fn check_chain(places: &[Place], n_blocks: u32) -> Result<(), Failure> {
    let mut next = 0;
    for place in places {
        let (first, last) = place.blocks();
        if first > next {
            return Err(Failure::misuse(format!("nobody has blocks {next}..{}", first - 1)).hint(
                "name the worker that holds them with --worker ADDR:PORT, or the file with --middle FILE",
            ));
        }
        if first < next {
            return Err(Failure::misuse(format!("two stages have block {first}")).hint(
                "head, middles and tail must follow each other: take the slices of one dim-split run",
            ));
        }
        next = last + 1;
    }
    if next != n_blocks {
        return Err(Failure::misuse(format!("nobody has blocks {next}..{}", n_blocks - 1)));
    }
    Ok(())
}

/// Loads a slice as a stage.
pub fn load_stage(
    path: &Path,
    info: &SliceInfo,
    machine: &MachineArgs,
    mmap: bool,
    n_ctx: u32,
    n_ubatch: u32,
    max_sessions: u32,
) -> Result<LlamaStage, Failure> {
    let model = load(&[path.to_owned()], machine, mmap, info.role == Role::Tail)?;
    stage_of(&model, path, info, machine, n_ctx, n_ubatch, max_sessions)
}

/// The same with as many rows at once as the buffers for computing have room for in `compute_bytes`: at most
/// `--ubatch`, and at least 32.
pub fn load_stage_within(
    path: &Path,
    info: &SliceInfo,
    machine: &MachineArgs,
    mmap: bool,
    n_ctx: u32,
    max_sessions: u32,
    compute_bytes: u64,
) -> Result<LlamaStage, Failure> {
    let model = load(&[path.to_owned()], machine, mmap, info.role == Role::Tail)?;
    let mut n_ubatch = machine.n_ubatch;
    loop {
        let stage = stage_of(&model, path, info, machine, n_ctx, n_ubatch, max_sessions)?;
        let bytes = stage.inner().info().compute_bytes;
        let least = LEAST_ROWS.max(max_sessions);
        if bytes <= compute_bytes || n_ubatch <= least {
            return Ok(stage);
        }
        // what grows with the rows is most of it; if something else does, the next round goes on
        let fit = u64::from(n_ubatch) * compute_bytes / bytes;
        let fit = u32::try_from(fit).unwrap_or(n_ubatch).min(n_ubatch - 1).max(least);
        n_ubatch = if fit.is_power_of_two() { fit } else { (fit.next_power_of_two() / 2).max(least) };
    }
}

/// Rows that a stage can always compute at once, whatever they take.
const LEAST_ROWS: u32 = 32;

fn stage_of(
    model: &Model,
    path: &Path,
    info: &SliceInfo,
    machine: &MachineArgs,
    n_ctx: u32,
    n_ubatch: u32,
    max_sessions: u32,
) -> Result<LlamaStage, Failure> {
    let is_tail = info.role == Role::Tail;
    let context = ContextParams {
        n_ctx,
        n_batch: n_ubatch,
        n_ubatch,
        n_threads: machine.n_threads(),
        max_sessions,
        flash_attn: FlashAttn::Auto,
        ..ContextParams::default()
    };
    let params = StageParams {
        blocks: 0..model.n_blocks(),
        takes_tokens: info.role == Role::Head,
        has_lm_head: is_tail,
        context,
    };
    let stage = Stage::new(model, params).map_err(|e| {
        Failure::failed(format!("{}: {e}", path.display())).hint("a smaller --ctx needs less memory")
    })?;
    Ok(LlamaStage::new(stage, info.role.as_str(), info.blocks.first))
}

/// Loads a whole model, after this project's own checks: llama.cpp aborts on some files that these refuse.
pub fn load_model(path: &Path, machine: &MachineArgs, mmap: bool) -> Result<Model, Failure> {
    let gguf = Gguf::open(path)?;
    check::model(&gguf)?;
    let files: Vec<PathBuf> = gguf.files().map(Path::to_owned).collect();
    drop(gguf);
    load(&files, machine, mmap, true)
}

fn load(files: &[PathBuf], machine: &MachineArgs, mmap: bool, lm_head: bool) -> Result<Model, Failure> {
    let name = files[0].file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes: u64 = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let mut progress = Progress::new(format!("loading {name}"));
    let mut on_progress = |fraction: f32| {
        progress.update((f64::from(fraction) * bytes as f64) as u64, bytes);
        true
    };
    let params = ModelParams {
        gpu_layers: machine.gpu_layers,
        use_mmap: mmap,
        no_lm_head: !lm_head,
        progress: Some(&mut on_progress),
        ..Default::default()
    };
    Model::load(files, params).map_err(Failure::failed)
}

/// Settings of a stock context.
pub fn stock_params(machine: &MachineArgs, n_ctx: u32) -> ContextParams {
    ContextParams {
        n_ctx,
        n_batch: 2048.max(machine.n_ubatch),
        n_ubatch: machine.n_ubatch,
        n_threads: machine.n_threads(),
        max_sessions: 1,
        flash_attn: FlashAttn::Auto,
        ..ContextParams::default()
    }
}

/// How much of llama.cpp's log is shown.
pub fn set_log(machine: &MachineArgs) {
    llama_sys_patch::set_log(if machine.verbose { LogLevel::Everything } else { LogLevel::Silent });
}

/// The key for a worker: from a file, or from pairing.
pub fn key_for(address: &str, file: Option<&Path>) -> Result<Key, Failure> {
    match file {
        Some(path) => Key::from_file(path).map_err(Failure::misuse),
        None => KeyStore::of_user().and_then(|store| store.for_address(address)).map_err(|e| {
            Failure::misuse(e).hint(format!("dim-host pair {address}, with the code that the worker shows"))
        }),
    }
}

/// Dials until it works, for as long as a lost worker is looked for: the two sides may be started in any order.
fn keep_trying<T>(
    patience: Patience,
    mut attempt: impl FnMut() -> Result<T, LinkError>,
) -> Result<T, Failure> {
    let start = Instant::now();
    let mut pause = patience.first_pause;
    let mut told = false;
    let mut limit = patience.give_up_after;
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(e) => e,
        };
        let waited = start.elapsed();
        if error.is_pause() && patience.paused_for > limit {
            limit = patience.paused_for;
            told = false;
        }
        if !error.may_pass() || waited >= limit {
            return Err(refused(&error));
        }
        if !told {
            eprintln!("{error}; trying for up to {} s", limit.as_secs());
            told = true;
        }
        std::thread::sleep(pause.min(limit - waited));
        pause = (pause * 2).min(patience.longest_pause);
    }
}

/// A worker that passed its canary. One that is lost meanwhile is looked for as at any other time.
fn checked(
    mut stage: Guarded<WorkerStage>,
    patience: Patience,
    verbose: bool,
) -> Result<Guarded<WorkerStage>, Failure> {
    let start = Instant::now();
    let mut result = stage.check();
    loop {
        match result {
            Ok(cosine) => {
                if let Some(cosine) = cosine.filter(|_| verbose) {
                    eprintln!("note: {} answers right: a cosine of {cosine:.7}", stage.name());
                }
                return Ok(stage);
            }
            Err(lost) if lost.may_pass() && start.elapsed() < patience.limit(&lost) => {
                eprintln!("{lost}; trying again");
                std::thread::sleep(patience.first_pause);
                result = stage.reconnect();
            }
            Err(error) => {
                let failure = Failure::failed(format!("{}: {error}", stage.name()));
                return Err(match error.hint() {
                    Some(hint) => failure.hint(hint),
                    None => failure,
                });
            }
        }
    }
}

/// Why a worker has no canary.
fn no_canary(args: &SplitArgs) -> &'static str {
    if args.no_canary {
        "--no-canary"
    } else if args.split.is_none() {
        "only --split STEM.split.json says what it has to answer"
    } else {
        "the manifest says nothing of it; cut the model again"
    }
}

/// A link's error with the way out.
pub fn refused(error: &LinkError) -> Failure {
    let failure = if error.is_misuse() { Failure::misuse(error) } else { Failure::failed(error) };
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn describe_offer(offer: &Terms) -> String {
    format!("{} blocks {} of {}", offer.arch, offer.blocks, offer.n_blocks)
}

/// One line: which blocks run where.
fn picture(places: &[Place], n_blocks: u32) -> String {
    let mut line = format!("{n_blocks} blocks: ");
    for (i, place) in places.iter().enumerate() {
        let (first, last) = place.blocks();
        let count = last - first + 1;
        let plural = if count == 1 { "" } else { "s" };
        let _ = match place {
            Place::File { info, .. } => {
                write!(line, "{} {first}..{last} here ({count} block{plural})", info.role)
            }
            Place::Worker { address, .. } => {
                write!(line, "{first}..{last} on {address} ({count} block{plural})")
            }
        };
        if i + 1 < places.len() {
            line.push_str(" -> ");
        }
    }
    line
}

/// The file's name without its folder and `.gguf`.
pub fn model_name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn random_instance() -> u64 {
    let mut bytes = [0; 8];
    // zero is allowed: it only keeps the worker from recognising a ghost of this process
    let _ = getrandom::fill(&mut bytes);
    u64::from_le_bytes(bytes)
}
