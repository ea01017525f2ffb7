//! `dim-host serve`.

use std::path::PathBuf;
use std::time::Duration;

use dim_serve::{ApiKeys, CacheOptions, Defaults, Notices, Options, ServeError, Server};
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};

use crate::args::{MachineArgs, SamplingArgs, SplitArgs, at_once, limit};
use crate::interrupt::Interrupt;
use crate::{ended_by, explain, shown, template};

/// Arguments of `dim-host serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    door: DoorArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What clients are told that the model is called
    #[arg(long, visible_alias = "alias", value_name = "NAME")]
    model_alias: Option<String>,
    /// Replies at once; the workers need as many sessions (dim-worker --parallel)
    #[arg(long, visible_alias = "np", value_name = "N", default_value_t = 1)]
    parallel: u32,
    /// Never evaluate rows of two replies together: each is, token for token, what it is alone, and all take longer
    #[arg(long)]
    exact: bool,
    /// Another template than the model's: Jinja itself, a file of it, or `chatml`
    #[arg(long, visible_alias = "chat-template-file", value_name = "JINJA|FILE|chatml")]
    chat_template: Option<String>,
    /// Most tokens of a reply, for requests that do not say it; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
}

/// Who may come in.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Door")]
struct DoorArgs {
    /// Where to listen; an address that others reach needs --api-key-file
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    listen: String,
    /// Keys of which a client has to send one, a line each
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let everybody in who can reach the address
    #[arg(long, conflicts_with = "api_key_file")]
    no_api_key: bool,
    /// A name beside localhost and addresses by which it is asked for (repeat for more)
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// A web page elsewhere that may use it, as https://chat.example; * for all (repeat for more)
    #[arg(long, value_name = "ORIGIN")]
    allow_origin: Vec<String>,
    /// Follow grammars (GBNF) that clients send as `grammar`; a client can make one with which llama.cpp is never done
    #[arg(long)]
    client_grammars: bool,
    /// Requests that may wait for a slot
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    queue: u32,
    /// How long a reply waits for a client that does not read
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    reader_timeout: u64,
}

/// Prompts that no slot has any more.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Prompt cache")]
struct CacheArgs {
    /// Keep prompts in this folder across restarts; a worker's part is filled again by its rows
    #[arg(long, value_name = "DIR", visible_alias = "slot-save-path")]
    cache_dir: Option<PathBuf>,
    /// The most MiB of all files there; the oldest go first
    #[arg(long, value_name = "MiB", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..), requires = "cache_dir")]
    cache_disk: u32,
    /// Keep prompts in so many MiB of memory; -1: without limit, 0: not
    #[arg(long, value_name = "MiB", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1..))]
    cache_ram: i32,
}

impl CacheArgs {
    fn options(&self) -> CacheOptions {
        CacheOptions {
            dir: self.cache_dir.clone(),
            disk_bytes: u64::from(self.cache_disk) << 20,
            ram_bytes: u64::try_from(self.cache_ram).map_or(u64::MAX, |mib| mib << 20),
        }
    }
}

impl ServeArgs {
    fn options(&self) -> Result<Options, Failure> {
        let door = self.door.clone();
        let keys = door.api_key_file.map(ApiKeys::from_file).transpose().map_err(cannot)?;
        Ok(Options {
            listen: door.listen,
            model_alias: self.model_alias.clone(),
            chat_template: self.chat_template.as_deref().map(template::text).transpose()?,
            keys,
            is_open: door.no_api_key,
            hosts: door.allow_host,
            origins: door.allow_origin,
            queue: door.queue as usize,
            reader_timeout: Duration::from_secs(door.reader_timeout),
            defaults: Defaults {
                sampling: self.sampling.sampling()?,
                limit: limit(self.n_predict)?,
                takes_grammars: door.client_grammars,
            },
            cache: self.cache.options(),
            notices: Notices::new(|text| tell!("{text}")),
        })
    }
}

/// Runs it until Ctrl-C or SIGTERM.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let options = args.options()?;
    let interrupt = Interrupt::watch().and_terminate();
    let host = at_once(args.split.host(&args.machine)?, args.parallel, args.exact);
    if let Some(template) = &options.chat_template {
        host.check_chat_template(Some(template)).map_err(explain)?;
    }
    // what is wrong with the address is known before a model is loaded
    let server = Server::bind(options).map_err(cannot)?;
    let (watch, mut show) = (server.watch(), shown::events(args.machine.verbose));
    let host = host.connect(move |event| {
        watch.hear(&event);
        show(event);
    });
    server.open(host.map_err(explain)?).map_err(cannot)?;
    // for people and for programs that wait for it
    terminal::print(&format!("listening on http://{}\n", server.address()))?;
    let stop = interrupt.stop_flag();
    interrupt.during(|| {
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    tell!("stopping; Ctrl-C again ends it at once");
    interrupt.during(|| drop(server));
    // a slot may be anywhere in C++: its objects must not be taken down under it
    llama_sys_patch::end_process(0);
}

fn cannot(error: ServeError) -> Failure {
    let error = match error {
        ServeError::Library(error) => return explain(error),
        other => other,
    };
    // what the server says of its fields is said of options here
    let (message, hint) = match &error {
        ServeError::Allowed { field, value, rule } => {
            let option = if *field == "hosts" { "--allow-host" } else { "--allow-origin" };
            (format!("{option} {value}: {rule}"), None)
        }
        ServeError::Listen { .. } => (error.to_string(), Some(LISTEN.to_owned())),
        ServeError::Open { .. } => (error.to_string(), Some(KEY_OR_OPEN.to_owned())),
        _ => (error.to_string(), error.hint()),
    };
    ended_by(message, error.is_misuse(), hint)
}

const LISTEN: &str = "--listen takes an address of this machine and a free port, as 127.0.0.1:8080";
const KEY_OR_OPEN: &str =
    "give --api-key-file FILE with a key in it, or say --no-api-key if everybody there may use it";
