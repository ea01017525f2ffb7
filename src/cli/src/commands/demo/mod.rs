//! `dim-host demo`: the whole way on this machine. A model is cut in three, a worker process takes the middle, a short
//! conversation is held over both processes, and then again by stock llama.cpp, token for token the same.
//!
//! What is cut and served is cut and served by the programs a user would call, in the order in which a user would call
//! them; their commands are shown.

mod conversation;
mod page;
mod programs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use dim::host::template::ChatTemplate;
use dim::{Event, Host, Key, Patience, Resources, RowType, Verify, WholeModel};
use gguf_tools::failure::Failure;
use gguf_tools::gguf::{Gguf, check};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::Role;

use crate::interrupt::Interrupt;
use crate::progress::size;
use crate::{explain, shown};
use conversation::{Arm, Script, agreeing};
use page::{Page, picture, table, token_under_token};
use programs::{Scratch, Worker, program, run_to_end, typed, write_key};

/// Arguments of `dim-host demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// A model of yours [default: SmolLM2-135M-Instruct where `make demo` has fetched it, else random weights]
    #[arg(short = 'm', long, value_name = "MODEL.gguf")]
    model: Option<PathBuf>,
    /// Random weights in this shape, as of `dim-synth`
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Blocks of the middle, inclusive [default: the middle third]
    #[arg(long, value_name = "A..B")]
    middle: Option<String>,
    /// What to say to the model, once per turn [default: three questions]
    #[arg(short = 'p', long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// Most tokens of a reply
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    n_predict: u32,
    /// Compute threads of each process
    #[arg(short = 't', long, default_value_t = 1)]
    threads: u32,
    /// Where to put the slices; they are removed afterwards unless this is given
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    // Ctrl-C stops the reply and the programs that were started, and this one then cleans up
    let interrupt = Interrupt::watch();
    interrupt.during(|| Demo::new(args)?.run(interrupt.stop_flag()))
}

struct Demo<'a> {
    args: &'a DemoArgs,
    scratch: Scratch,
    page: Page,
    resources: Resources,
}

/// Where the weights come from.
enum Weights {
    /// SmolLM2, as `.ci/model` fetches it.
    Fetched(PathBuf),
    /// Named by the person.
    Given(PathBuf),
    /// Random, in a shape of dim-synth's.
    Random(String),
}

impl Weights {
    fn of(args: &DemoArgs) -> Weights {
        if let Some(model) = &args.model {
            return Weights::Given(model.clone());
        }
        match (&args.shape, fetched()) {
            (Some(shape), _) => Weights::Random(shape.clone()),
            (None, Some(model)) => Weights::Fetched(model),
            (None, None) => Weights::Random("demo".to_owned()),
        }
    }
}

/// Where `.ci/model` puts the model it fetches, if it has.
fn fetched() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    let model = set("DIM_REAL_MODEL").or_else(|| Some(cache()?.join("dim").join(FETCHED)))?;
    model.is_file().then_some(model)
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs) -> Result<Demo<'a>, Failure> {
        let resources = Resources { n_ctx: N_CTX, n_threads: Some(args.threads), ..Resources::default() };
        resources.check().map_err(explain)?;
        let scratch = Scratch::new(args.keep.clone())?;
        Ok(Demo { args, scratch, page: Page::new(), resources })
    }

    fn run(&self, stop: &AtomicBool) -> Result<(), Failure> {
        let page = &self.page;
        page.heading("DIM: one model over two processes\n")?;
        let model = self.model()?;
        let (manifest_path, manifest) = self.cut(&model)?;
        let key_file = self.scratch.dir.join("demo.key");
        let key = write_key(&key_file)?;
        let worker = self.worker(&manifest_path, &manifest, &key_file)?;
        page.line(&format!("\n{}", picture(&manifest, worker.pid(), &worker.address)))?;

        let middle = middle_file(&manifest)?.to_owned();
        let parts = Parts { manifest: manifest_path, worker, key };
        let arms = self.converse(&model, &parts, stop)?;
        let Parts { manifest, .. } = parts;
        self.compare(&arms)?;
        self.what_next(&manifest, &middle)
    }

    /// The model that is cut: of SmolLM2 its F16 form.
    fn model(&self) -> Result<PathBuf, Failure> {
        let page = &self.page;
        let in_scratch = |name: &str| self.scratch.dir.join(name);
        match Weights::of(self.args) {
            Weights::Given(model) => {
                page.outcome(&format!("the model: {}", model.display()))?;
                Ok(model)
            }
            Weights::Fetched(quantised) => {
                page.outcome(&format!(
                    "the model: SmolLM2-135M-Instruct by Hugging Face, small but trained, Apache-2.0; {} in Q4_1",
                    size(std::fs::metadata(&quantised).map_or(0, |file| file.len()) as f64)
                ))?;
                let model = in_scratch("SmolLM2-135M-Instruct.F16.gguf");
                let mut command = program("dim-dequantise")?;
                self.make(
                    command.arg(&quantised).arg(&model),
                    "as F16, so that there is something to carry",
                )?;
                Ok(model)
            }
            Weights::Random(shape) => {
                let why = match self.args.shape {
                    Some(_) => "as you asked",
                    None => {
                        "because SmolLM2-135M-Instruct is not here (`sh .ci/model` fetches it, or says why not)"
                    }
                };
                page.outcome(&format!("the model: random weights, {why}: it will talk nonsense"))?;
                let model = in_scratch("demo.gguf");
                self.make(program("dim-synth")?.arg(&model).args(["--shape", &shape]), "synthesised")?;
                Ok(model)
            }
        }
    }

    /// Shows and runs a program that writes into the scratch folder.
    fn make(&self, command: &mut Command, outcome: &str) -> Result<(), Failure> {
        let seconds = self.timed(command)?;
        self.page.outcome(&format!("{outcome}; {seconds:.1} s"))
    }

    /// Shows and runs such a program; how many seconds it took.
    fn timed(&self, command: &mut Command) -> Result<f64, Failure> {
        self.page.command(&typed(command))?;
        let start = Instant::now();
        run_to_end(command, &self.scratch.dir)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn cut(&self, model: &Path) -> Result<(PathBuf, Manifest), Failure> {
        let gguf = Gguf::open(model)?;
        let middle = match &self.args.middle {
            Some(middle) => middle.clone(),
            None => {
                let n_blocks = check::model(&gguf)?.n_blocks;
                let third = (n_blocks / 3).max(1);
                format!("{third}..{}", (2 * third - 1).max(third))
            }
        };
        let mut command = program("dim-split")?;
        command.arg(model).args(["--middle", &middle, "--verify"]).arg("--out").arg(&self.scratch.dir);
        let seconds = self.timed(&mut command)?;
        let path = self.scratch.dir.join(format!("{}.split.json", gguf.stem()));
        let manifest = Manifest::read(&path)?;
        let bytes: u64 = manifest.slices.iter().map(|slice| slice.bytes).sum();
        self.page.outcome(&format!(
            "{} blocks in {} files, {}, every byte compared with the model's; {seconds:.1} s",
            manifest.model.n_blocks,
            manifest.slices.len(),
            size(bytes as f64),
        ))?;
        Ok((path, manifest))
    }

    fn worker(&self, split: &Path, manifest: &Manifest, key: &Path) -> Result<Worker, Failure> {
        let middle = middle_file(manifest)?;
        let mut command = program("dim-worker")?;
        command.arg(split.with_file_name(middle)).args(["--listen", "127.0.0.1:0"]);
        command.args(["--ctx", &N_CTX.to_string(), "--threads", &self.args.threads.to_string()]);
        command.args(["--announce", "never", "--verify", "never", "--mmap"]).arg("--key-file").arg(key);
        self.page.command(&format!("dim-worker {middle} &"))?;
        Worker::start(&mut command)
    }

    /// A host over the worker's process and this one.
    fn host(&self, parts: &Parts, wire: RowType) -> Result<Host, Failure> {
        let host = Host::open(&parts.manifest).map_err(explain)?;
        let host = host.worker(&parts.worker.address, parts.key.clone());
        // the worker is a process of ours: if it is lost, it has ended
        let patience = Patience { give_up_after: Duration::from_secs(3), ..Patience::default() };
        let host = host.wire(wire).resources(self.resources).verify(Verify::Never).patience(patience);
        // mapped, as stock does it: nobody else writes to these files
        let host = host.mmap(true);
        host.connect(events()).map_err(explain)
    }

    fn script<'s>(&'s self, template: Option<&'s ChatTemplate>) -> Script<'s> {
        let prompts = &self.args.prompts;
        Script {
            questions: match prompts.is_empty() {
                true => QUESTIONS.iter().map(|q| (*q).to_owned()).collect(),
                false => prompts.clone(),
            },
            text: prompts.first().map_or(TEXT, String::as_str),
            template,
            n_predict: self.args.n_predict as usize,
        }
    }

    /// The conversation three times; the first one is shown as it goes.
    fn converse(&self, model: &Path, parts: &Parts, stop: &AtomicBool) -> Result<[Arm; 3], Failure> {
        let host = self.host(parts, RowType::F32)?;
        // a model without one goes on with a text
        let template = host.chat_template().ok();
        let script = self.script(template.as_ref());
        // a session keeps what it is of: the worker serves one host, and two models need not fit
        let mut session = host.session().map_err(explain)?;
        let exact = script.play("split, f32 rows", &mut session, Some(&self.page), stop)?;
        drop((session, host));

        self.page.line("The same again by stock llama.cpp, the whole model in one process ...")?;
        let whole = WholeModel::open(model, &self.resources, true, events()).map_err(explain)?;
        let mut session = whole.session().map_err(explain)?;
        let stock = script.play("stock llama.cpp", &mut session, None, stop)?;
        drop((session, whole));

        self.page.line("... and over both processes with rows of half the size, which is the default.\n")?;
        let host = self.host(parts, RowType::F16)?;
        let rounded = script.play("split, f16 rows", &mut host.session().map_err(explain)?, None, stop)?;
        Ok([stock, exact, rounded])
    }

    /// The comparison: an error where the split is not what it says it is.
    fn compare(&self, [stock, exact, rounded]: &[Arm; 3]) -> Result<(), Failure> {
        if let (Some(split), Some(stock)) = (exact.replies.first(), stock.replies.first()) {
            self.page.line(&token_under_token(split, stock))?;
        }
        self.page.line(&table(&[stock, exact, rounded]))?;
        let (tokens, expected) = (exact.tokens(), stock.tokens());
        if tokens != expected {
            let at = agreeing(&tokens, &expected);
            return Err(Failure::failed(format!(
                "the split model's tokens differ from stock llama.cpp's from token {at} on"
            ))
            .hint("this should never happen: please report it with the output above"));
        }
        self.page.good(&format!("All {} tokens are those of stock llama.cpp.", expected.len()))?;
        if rounded.tokens() != expected {
            self.page
                .line("With f16 rows a reply goes another way where two tokens are nearly as likely.")?;
        }
        Ok(())
    }

    fn what_next(&self, manifest: &Path, middle: &str) -> Result<(), Failure> {
        let here = std::env::args().next().unwrap_or_else(|| "dim-host".to_owned());
        let page = &self.page;
        page.heading("\nWhat next")?;
        match &self.args.keep {
            Some(dir) => {
                let dir = dir.display();
                let split = manifest.file_name().unwrap_or_default().to_string_lossy();
                page.line(&format!("  talk with it, from {dir}, in two terminals:"))?;
                page.line(&format!("    dim-worker {middle} --key-file demo.key"))?;
                page.line(&format!(
                    "    dim-host chat --split {split} --key-file demo.key --worker 127.0.0.1:7878"
                ))?;
            }
            None => {
                page.line(&format!("  ask it yourself        {here} demo -p \"Why is the sky blue?\""))?;
                page.line(&format!(
                    "  talk with it           {here} demo --keep DIR    (keeps the files, and says how)"
                ))?;
            }
        }
        page.line(&format!("  a model of yours       {here} demo --model MODEL.gguf"))?;
        page.line("  on two machines        README.md, \"With your model\"; with a phone: docs/SETUP.md")
    }
}

/// The file that goes to the worker.
fn middle_file(manifest: &Manifest) -> Result<&str, Failure> {
    let middle = manifest.slices.iter().find(|slice| slice.role == Role::Middle);
    middle.map(|slice| slice.file.as_str()).ok_or_else(|| Failure::failed("dim-split wrote no middle"))
}

/// What a conversation over two processes takes.
struct Parts {
    manifest: PathBuf,
    worker: Worker,
    key: Key,
}

/// What happens, less the picture: that has been drawn.
fn events() -> impl FnMut(Event) + Send + 'static {
    let mut show = shown::events(false);
    move |event| {
        if !matches!(event, Event::Ready { .. }) {
            show(event);
        }
    }
}

/// Positions of the conversation.
const N_CTX: u32 = 1024;

/// The model that `.ci/model` fetches.
const FETCHED: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

const QUESTIONS: [&str; 3] = [
    "What is the capital of France?",
    "Tell me one thing to see there.",
    "Why is the sky blue? Answer in one sentence.",
];

/// For a model without a chat template.
const TEXT: &str = "A model that does not fit one machine can be cut in three. The first blocks and the last ones stay here, \
the ones in the middle go to the phone that lies beside it, and only one row of numbers per token crosses the room.";
