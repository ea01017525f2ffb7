//! Continues a text with a split model.
//!
//! ```text
//! cargo run --release --example generate -- STEM.split.json "The capital of France is" [ADDR:PORT KEY_FILE]
//! ```
//!
//! Without a worker the middle runs here too, from the file that dim-split wrote beside the others.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use dim::{Event, Host, Key, Resources, Sampling};

/// What a small model needs; without it, 4096 positions and a thread per core.
const SMALL: Resources =
    Resources { n_ctx: 512, n_threads: Some(1), n_ubatch: 512, gpu_layers: None, snapshots: 0 };

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("error: {error}");
    if let Some(hint) = error.downcast_ref::<dim::Error>().and_then(dim::Error::hint) {
        eprintln!("hint: {hint}");
    }
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (split, prompt, worker) = match args.as_slice() {
        [split, prompt] => (split, prompt, None),
        [split, prompt, address, key_file] => (split, prompt, Some((address, key_file))),
        _ => return Err("usage: generate STEM.split.json PROMPT [ADDR:PORT KEY_FILE]".into()),
    };

    let mut host = Host::open(split)?.resources(SMALL);
    if let Some((address, key_file)) = worker {
        host = host.worker(address, Key::from_file(Path::new(key_file))?);
    }
    let host = host.connect(tell)?;

    let mut session = host.session()?;
    session.push_text(prompt)?;
    let mut out = std::io::stdout().lock();
    for token in session.generate(Sampling::greedy()).limit(Some(32)) {
        write!(out, "{}", token?.text)?;
        out.flush()?;
    }
    writeln!(out)?;
    Ok(())
}

/// The library prints nothing; what is worth a line is up to the program.
fn tell(event: Event) {
    match event {
        Event::Ready { stages, .. } => {
            for stage in stages {
                let place = stage.worker.unwrap_or_else(|| "here".to_owned());
                eprintln!("blocks {} {place}", stage.blocks);
            }
        }
        Event::Lost { stage, reason, .. } => eprintln!("{stage} is lost ({reason})"),
        Event::Back { stage, after } => eprintln!("{stage} is back after {} ms", after.as_millis()),
        _ => {}
    }
}
