//! The hidden commands that `dim-host ab` starts its arms with.

#[cfg(unix)]
use std::ffi::OsString;
use std::path::PathBuf;

use gguf_tools::gguf::{Gguf, check};
use llama_sys_patch::{Quantised, quantise_model};

#[cfg(unix)]
use crate::launch::enter;
use gguf_tools::failure::Failure;

/// Arguments of `dim-host launch`: enter a group, pin to cores, become a program.
#[cfg(unix)]
#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// The cgroup.procs to be in
    #[arg(long, value_name = "FILE")]
    group: Option<PathBuf>,
    /// The cores to run on
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Becomes the program, or says why not.
#[cfg(unix)]
pub fn launch(args: &LaunchArgs) -> Result<(), Failure> {
    let (program, rest) = args.program.split_first().ok_or_else(|| Failure::misuse("launch: no program"))?;
    Err(Failure::failed(enter(args.group.as_deref(), &args.cpus, program, rest)))
}

/// Arguments of `dim-host quantise`.
#[derive(Debug, clap::Args)]
pub struct QuantiseArgs {
    /// The model
    from: PathBuf,
    /// The file to write
    to: PathBuf,
    /// What to make it
    #[arg(value_enum)]
    what: QuantisedType,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum QuantisedType {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k_m")]
    Q4KM,
}

/// Quantises a whole model with llama.cpp's own quantiser.
pub fn quantise(args: &QuantiseArgs) -> Result<(), Failure> {
    check::model(&Gguf::open(&args.from)?)?;
    llama_sys_patch::set_log(llama_sys_patch::LogLevel::Everything);
    let what = match args.what {
        QuantisedType::Q8_0 => Quantised::Q8_0,
        QuantisedType::Q4KM => Quantised::Q4KM,
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    quantise_model(&args.from, &args.to, what, threads.min(512)).map_err(Failure::failed)
}

/// Arguments of `dim-host rpc-server`.
#[cfg(feature = "rpc")]
#[derive(Debug, clap::Args)]
pub struct RpcServerArgs {
    /// Where to listen; port 0 takes any that is free
    #[arg(long, value_name = "ADDR:PORT")]
    listen: std::net::SocketAddr,
    /// Compute threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: u32,
}

/// Serves this machine's CPU with llama.cpp's RPC backend; says `listening on ADDR:PORT` when it answers.
#[cfg(feature = "rpc")]
pub fn rpc_server(args: &RpcServerArgs) -> Result<(), Failure> {
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    // llama.cpp does not say which port it got: a free one is looked for before
    let address = TcpListener::bind(args.listen)
        .and_then(|l| l.local_addr())
        .map_err(|e| Failure::misuse(format!("cannot listen on {}: {e}", args.listen)))?;
    std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(address).is_err() {
            if Instant::now() > deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // who does not read it should not end the server
        let _ = terminal::print(&format!("listening on {address}\n"));
    });
    llama_sys_patch::rpc::serve(address, args.threads).map_err(Failure::failed)
}
