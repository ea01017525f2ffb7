//! A worker inside a program that has something else to do: here, to read lines and say them back.
//!
//! ```text
//! cargo run --release --example worker -- STEM.middle-A..B.gguf KEY_FILE [ADDR:PORT]
//! ```
//!
//! It ends with its input, and says then how many hosts it has served.

use std::error::Error;
use std::io::BufRead as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dim::{Event, Key, Resources, Worker};

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
    let (slice, key_file, listen) = match args.as_slice() {
        [slice, key_file] => (slice, key_file, "127.0.0.1:0"),
        [slice, key_file, listen] => (slice, key_file, listen.as_str()),
        _ => return Err("usage: worker STEM.middle-A..B.gguf KEY_FILE [ADDR:PORT]".into()),
    };

    // what happens is told from the worker's threads
    let hosts = Arc::new(AtomicU32::new(0));
    let served = Arc::clone(&hosts);
    let on_event = move |event| match event {
        Event::Serving { host } => {
            served.fetch_add(1, Ordering::SeqCst);
            eprintln!("serving {host}");
        }
        Event::Gone(error) => eprintln!("{error}"),
        _ => {}
    };
    let key = Key::from_file(Path::new(key_file))?;
    let worker = Worker::open(slice).listen(listen).key(key).resources(SMALL);
    let mut worker = worker.bind(on_event)?;
    println!("listening on {}", worker.address());
    let stop = worker.stop_handle();
    let serving = std::thread::spawn(move || worker.serve());

    // the program's own work
    for line in std::io::stdin().lock().lines() {
        println!("you said: {}", line?);
    }

    stop.stop();
    serving.join().expect("the worker's thread does not panic")?;
    println!("hosts served: {}", hosts.load(Ordering::SeqCst));
    Ok(())
}
