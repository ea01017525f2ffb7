//! Arguments that several commands have in common, and what they are in the library.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use dim::stage::verified::CutFrom;
use dim::{Discovery, Error, Host, HostBuilder, Key, Patience, Resources, RowType, Sampling, device};
use dim_wire::keys::KeyStore;
use dim_wire::transport::discover::MDNS_PORT;
use gguf_tools::failure::Failure;
use gguf_tools::manifest::Manifest;
use gguf_tools::slice::SliceInfo;
use llama_sys_patch::LogLevel;

use crate::explain;

/// What `--worker` says instead of an address, and `--wire` instead of a type.
const AUTO: &str = "auto";

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
    /// Number format of the rows that cross the network: f32 is bit-exact, f16 half as much; auto: f16 for models in F16
    /// or BF16, f32 for quantised ones
    #[arg(long, value_name = "TYPE", default_value = AUTO, value_parser = wire_or_auto())]
    wire: Wire,
    /// The key shared with the workers: one line, 64 hex digits (default: the one from pairing)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// When to compare the slices' weights with their digests
    #[arg(long, value_enum, value_name = "WHEN", default_value = "once")]
    verify: Verify,
    /// Map the slices instead of reading them: they must not change while this runs
    #[arg(long)]
    mmap: bool,
    /// Read them, as is done anyway
    #[arg(long, hide_short_help = true, overrides_with = "mmap")]
    no_mmap: bool,
    /// Longest time a worker may take for one step
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    step_timeout: u64,
    /// Do not hold the workers' answers to a known input against the right ones
    #[arg(long)]
    no_canary: bool,
    #[command(flatten)]
    patience: PatienceArgs,
    /// What goes on when a worker stays away for longer than that: `local`: its blocks run here from then on, from the slice
    /// beside the split file, where there is memory for it
    #[arg(long, value_name = "local", value_parser = ["local"])]
    fallback: Option<String>,
    /// The port of multicast DNS, for tests
    #[arg(long, value_name = "PORT", default_value_t = MDNS_PORT, hide = true)]
    mdns_port: u16,
}

impl SplitArgs {
    /// A host with these options; nothing but the manifest and the keys is opened yet.
    ///
    /// # Errors
    /// They do not make a host.
    pub fn host(&self, machine: &MachineArgs) -> Result<HostBuilder, Failure> {
        let resources = machine.resources()?;
        machine.set_log();
        let files = match (&self.split, &self.head, &self.tail) {
            (Some(split), ..) => Host::open(split),
            (None, Some(head), Some(tail)) => Host::of_slices(head, &self.middle, tail),
            _ => return Err(no_slices()),
        };
        let mut host = files
            .map_err(explain)?
            .resources(resources)
            .verify(self.verify.when())
            .mmap(self.mmap)
            .canary(!self.no_canary)
            .patience(self.patience.patience())
            .fall_back(self.fallback.is_some())
            .step_timeout(Duration::from_secs(self.step_timeout))
            .software(device::software("dim-host"));
        if let Some(wire) = self.wire() {
            host = host.wire(wire);
        }
        for address in self.worker.iter().filter(|address| *address != AUTO) {
            let keys = keys_for(&self::address(address)?, self.key_file.as_deref())?;
            host = host.worker_with_one_of(address, keys);
        }
        if self.worker.iter().any(|address| address == AUTO) {
            host = host.find_workers(self.discovery()?);
        }
        Ok(host)
    }

    /// What the cut says of the model that was cut.
    ///
    /// # Errors
    /// The manifest, or the head, cannot be read.
    pub fn cut_from(&self) -> Result<CutFrom, Failure> {
        match (&self.split, &self.head) {
            (Some(split), _) => cut_from(split, &Manifest::read(split)?),
            (None, Some(head)) => Ok((&SliceInfo::read(head).map_err(explain)?).into()),
            (None, None) => Err(no_slices()),
        }
    }

    /// When weights are compared with their digests.
    pub fn verify(&self) -> dim::Verify {
        self.verify.when()
    }

    fn discovery(&self) -> Result<Discovery, Failure> {
        let keys = match &self.key_file {
            Some(path) => Discovery::with_key(key_of_file(path)?),
            None => Discovery::of_user().map_err(explain)?,
        };
        Ok(Discovery { mdns_port: self.mdns_port, ..keys })
    }

    /// The number format that was asked for, if one was.
    pub fn wire(&self) -> Option<RowType> {
        self.wire.0
    }
}

/// How long somebody who is away is looked for.
#[derive(Clone, Debug, clap::Args)]
pub struct PatienceArgs {
    /// How long a lost worker is looked for before this ends
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    give_up_after: u64,
    /// How long instead, if it has said that it pauses (a locked phone) or is too hot
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait_paused: u64,
}

impl PatienceArgs {
    /// The same for the library.
    pub fn patience(&self) -> Patience {
        Patience {
            give_up_after: Duration::from_secs(self.give_up_after),
            paused_for: Duration::from_secs(self.wait_paused),
            ..Patience::default()
        }
    }
}

/// What the manifest at `split` says of the model that was cut.
///
/// # Errors
/// It holds something else than digests.
pub fn cut_from(split: &Path, manifest: &Manifest) -> Result<CutFrom, Failure> {
    CutFrom::of(&manifest.model)
        .ok_or_else(|| Failure::misuse(format!("{}: its digests are none", split.display())))
}

fn no_slices() -> Failure {
    Failure::misuse("give --split STEM.split.json, or --head FILE and --tail FILE")
}

/// The keys one of which is a worker's, the likeliest first: from a file, or from pairing.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn keys_for(address: &str, file: Option<&Path>) -> Result<Vec<Key>, Failure> {
    let keys = match file {
        Some(path) => return key_of_file(path).map(|key| vec![key]),
        None => KeyStore::of_user()
            .and_then(|store| store.for_address(address))
            .map_err(|source| Error::NoKey { address: address.to_owned(), source }),
    };
    keys.map_err(explain)
}

/// A `--key-file`. Where others can read it that is said: one in the store would not be used.
///
/// # Errors
/// It cannot be read, or holds no key.
pub fn key_of_file(path: &Path) -> Result<Key, Failure> {
    let key = Key::from_file(path).map_err(explain)?;
    #[cfg(unix)]
    if std::fs::metadata(path).is_ok_and(|file| std::os::unix::fs::MetadataExt::mode(&file) & 0o077 != 0) {
        let path = path.display();
        gguf_tools::tell!(
            "note: {path}: other users can read this key; if it is still good, run: chmod 600 {path}"
        );
    }
    Ok(key)
}

/// A worker's address, completed.
///
/// # Errors
/// It is none.
pub fn address(given: &str) -> Result<String, Failure> {
    dim::host::address::complete(given).map_err(explain)
}

/// `--wire`: `None` is `auto`. A type of its own, because clap reads an option as an argument that may be missing.
#[derive(Clone, Copy, Debug)]
struct Wire(Option<RowType>);

const ROW_TYPES: [(RowType, &str); 2] =
    [(RowType::F16, "2 bytes a value"), (RowType::F32, "4 bytes a value: bit-exact")];

/// Reads a number format of the rows that cross the network.
pub fn row_type() -> impl TypedValueParser<Value = RowType> {
    PossibleValuesParser::new(ROW_TYPES.map(possible))
        .map(|name| if name == RowType::F32.name() { RowType::F32 } else { RowType::F16 })
}

/// The same, or `auto`.
fn wire_or_auto() -> impl TypedValueParser<Value = Wire> {
    let auto = PossibleValue::new(AUTO).help("As the model's own weights are");
    let values = [auto].into_iter().chain(ROW_TYPES.map(possible));
    PossibleValuesParser::new(values)
        .map(|name| Wire(ROW_TYPES.map(|(of, _)| of).into_iter().find(|of| of.name() == name)))
}

fn possible((row_type, help): (RowType, &'static str)) -> PossibleValue {
    PossibleValue::new(row_type.name()).help(help)
}

/// When the weights are compared with their digests.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Verify {
    /// Every time.
    Always,
    /// Once; then again only when the file has changed.
    #[default]
    Once,
    /// Never: the header alone is checked.
    Never,
}

impl Verify {
    /// The same for the library.
    pub fn when(self) -> dim::Verify {
        match self {
            Verify::Always => dim::Verify::Always,
            Verify::Once => dim::Verify::Once,
            Verify::Never => dim::Verify::Never,
        }
    }
}

/// How much of this machine to use; the same for `generate`, `chat` and `stock`.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Context: positions of a conversation (0: all the model was trained for)
    #[arg(short = 'c', long = "ctx", visible_alias = "ctx-size", value_name = "N", default_value_t = 4096)]
    pub n_ctx: u32,
    /// Compute threads (default: one per core)
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<u32>,
    /// Most prompt tokens evaluated at once
    #[arg(long = "ubatch", visible_alias = "ubatch-size", value_name = "N", default_value_t = 512)]
    n_ubatch: u32,
    /// Blocks to put on the GPU (default: all, where this build has a GPU backend); also -ngl
    #[arg(long = "gpu-layers", visible_alias = "n-gpu-layers", value_name = "N")]
    gpu_layers: Option<GpuLayers>,
    /// Of models with recurrent states: tokens of the last chunk that can be taken back without evaluating the conversation
    /// anew, where llama.cpp keeps snapshots; each takes as much memory as the states. The same at host and worker
    #[arg(long, value_name = "N", default_value_t = 0, hide_short_help = true)]
    snapshots: u32,
    #[command(flatten)]
    llama: LlamaArgs,
    /// Show llama.cpp's own log
    #[arg(short = 'v', long)]
    pub verbose: bool,
}

impl MachineArgs {
    /// The same for the library, checked.
    ///
    /// # Errors
    /// A number is out of range.
    pub fn resources(&self) -> Result<Resources, Failure> {
        let MachineArgs { n_ctx, threads, n_ubatch, gpu_layers, snapshots, .. } = *self;
        let gpu_layers = gpu_layers.and_then(|GpuLayers(n)| n);
        let resources = Resources { n_ctx, n_threads: threads, n_ubatch, gpu_layers, snapshots };
        resources.check().map_err(explain)?;
        Ok(resources)
    }

    /// Sets how much of llama.cpp's log this process shows.
    pub fn set_log(&self) {
        llama_sys_patch::set_log(if self.verbose { LogLevel::Everything } else { LogLevel::Silent });
    }
}

/// A number of blocks, or as llama.cpp says it: `all` and `auto` are all there is room for, and so is -1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GpuLayers(Option<u32>);

impl std::str::FromStr for GpuLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<GpuLayers, String> {
        match text {
            "all" | "auto" | "-1" => Ok(GpuLayers(None)),
            n => n.parse().map(|n| GpuLayers(Some(n))).map_err(|_| "a number of blocks, or `all`".to_owned()),
        }
    }
}

/// Options of llama.cpp that have one answer here. They are taken, so that a command line that works there works here,
/// where they ask for what is done anyway.
#[derive(Clone, Debug, clap::Args)]
struct LlamaArgs {
    /// Taken for llama.cpp's sake: --ubatch alone says how many tokens go at once
    #[arg(short = 'b', long, value_name = "N", hide_short_help = true)]
    batch_size: Option<u32>,
    /// Fused attention is used where llama.cpp can: `on` and `auto` are the same here
    #[arg(long, value_name = "on|auto", hide_short_help = true, num_args = 0..=1, default_missing_value = "on", value_parser = ["on", "auto", "1"])]
    flash_attn: Option<String>,
    /// The cache of keys is F16
    #[arg(long, value_name = "f16", hide_short_help = true, value_parser = ["f16"])]
    cache_type_k: Option<String>,
    /// The cache of values is F16
    #[arg(long, value_name = "f16", hide_short_help = true, value_parser = ["f16"])]
    cache_type_v: Option<String>,
}

/// The options of sampling, with llama.cpp's words and defaults.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0 takes the most likely token each time (greedy)
    #[arg(long = "temp", value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Keep only the K most likely tokens (0 or -1 = all)
    #[arg(long, value_name = "K", default_value_t = 40, allow_negative_numbers = true)]
    top_k: i32,
    /// Keep the most likely tokens that together have probability P (1 = all)
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Drop tokens less likely than P times the most likely one (0 = none)
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Seed of the random choice; -1: a new one each time, which is shown
    #[arg(short = 's', long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    seed: i64,
    /// Penalty on tokens seen lately (1 = none)
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// How many of the last tokens the penalties look at (-1 = all)
    #[arg(long, value_name = "N", default_value_t = 64, allow_negative_numbers = true)]
    repeat_last_n: i32,
    /// Penalty on tokens by how often they were seen (0 = none)
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Penalty on tokens that were seen at all (0 = none)
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    presence_penalty: f32,
}

impl SamplingArgs {
    /// The same for the library, checked.
    ///
    /// # Errors
    /// A number is out of range.
    pub fn sampling(&self) -> Result<Sampling, Failure> {
        let sampling = self.unchecked();
        if self.seed < -1 || self.seed > u32::MAX.into() {
            return Err(Failure::misuse(format!("--seed {}: must be -1 to 4294967294", self.seed)));
        }
        sampling.check().map_err(explain)?;
        Ok(sampling)
    }

    fn unchecked(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: u32::try_from(self.seed).ok(),
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: Vec::new(),
            // needs the model
            constraint: None,
        }
    }
}

/// A host that gives `n` replies at once; unless they are to be exact, their rows are evaluated together.
pub fn at_once(host: HostBuilder, n: u32, exact: bool) -> HostBuilder {
    host.sessions(n).batch_rows(if exact { 1 } else { n })
}

/// The number after `-n` as a limit: none for -1.
///
/// # Errors
/// It is less than -1.
pub fn limit(n_predict: i64) -> Result<Option<usize>, Failure> {
    match n_predict {
        -1 => Ok(None),
        n => usize::try_from(n).map(Some).map_err(|_| Failure::misuse(format!("-n {n}: must be -1 or more"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        sampling: SamplingArgs,
        #[command(flatten)]
        machine: MachineArgs,
    }

    /// The defaults stand twice: for who writes nothing on the command line, and for who writes Rust.
    #[test]
    fn the_command_line_s_defaults_are_the_library_s() {
        let cli = Cli::parse_from(["test"]);
        assert_eq!(cli.sampling.unchecked(), Sampling::default());
        assert_eq!(cli.machine.resources().unwrap(), Resources::default());
    }

    #[test]
    fn an_option_out_of_range_is_named_as_it_was_written() {
        let cli = |args: &[&str]| Cli::parse_from([&["test"], args].concat());
        let says = |failure: Failure| failure.message().to_owned();
        assert_eq!(
            says(cli(&["--top-p=1.1"]).sampling.sampling().unwrap_err()),
            "--top-p 1.1: must be between 0 and 1"
        );
        assert_eq!(
            says(cli(&["--ubatch", "0"]).machine.resources().unwrap_err()),
            "--ubatch 0: must be 1 to 65536"
        );
    }
}
