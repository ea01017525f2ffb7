//! `dim-host pair`.

use std::io::{BufRead as _, IsTerminal as _};

use dim::device;
use dim_wire::keys::{KeyStore, PairingCode, Peer};
use dim_wire::transport::{LinkError, Timing, pair};
use gguf_tools::failure::Failure;
use gguf_tools::tell;
use gguf_tools::terminal::steer;

use crate::args::address;
use crate::explain;

/// Arguments of `dim-host pair`.
#[derive(Debug, clap::Args)]
pub struct PairArgs {
    /// The worker
    #[arg(value_name = "ADDR:PORT")]
    address: String,
    /// The code that the worker shows (asked for when it is not given)
    code: Option<String>,
}

/// Runs it.
pub fn run(args: &PairArgs) -> Result<(), Failure> {
    let address = address(&args.address)?;
    let typed = match &args.code {
        Some(code) => code.clone(),
        None => ask()?,
    };
    let code = PairingCode::parse(&typed).map_err(Failure::misuse)?;
    let store = KeyStore::of_user().map_err(Failure::failed)?;
    let keep = |key: &_, name: &str| {
        let paired_at =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let peer = Peer { name: name.to_owned(), address: address.clone(), paired_at };
        store.add(key, &peer).map_err(LinkError::from)
    };
    let software = device::software("dim-host");
    let (_, worker) =
        pair(&address, &code, &device::name(), &software, &Timing::default(), keep).map_err(explain)?;
    tell!("paired with {worker}; the key is in {}", store.directory().display());
    Ok(())
}

fn ask() -> Result<String, Failure> {
    if std::io::stdin().is_terminal() {
        steer(format_args!("the code that the worker shows: "));
    }
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(Failure::failed)?;
    Ok(line)
}
