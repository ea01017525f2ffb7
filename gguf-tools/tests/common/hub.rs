//! A hub for tests: it lists repositories, and sends files from another port by ranges, as the real one does; and it breaks
//! whatever a test wants broken. One request per connection.
#![allow(dead_code, missing_docs)]

use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufRead, BufReader, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use gguf_tools::digest::Sha;

/// The commit that everything is of.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const REPO: &str = "org/model";

/// What goes wrong with the next answer of the storage.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// This status instead, with this `Retry-After`.
    Status(u16, Option<&'static str>),
    /// The range, but of a file that is said to be this large.
    Size(u64),
    /// More bytes than were asked for, without an end.
    Endless,
    /// Nothing at all.
    Silence,
    /// A byte now and then.
    Drip,
    /// Other bytes.
    Garbage,
    /// No range: the file from its start.
    Whole,
}

/// A request, as far as tests look at it.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub method: String,
    pub path: String,
    pub token: Option<String>,
    pub range: Option<(u64, u64)>,
}

/// What both servers share.
#[derive(Default)]
pub(crate) struct State {
    pub files: Mutex<BTreeMap<String, Arc<Vec<u8>>>>,
    /// SHA-256 of each
    pub digests: Mutex<BTreeMap<String, String>>,
    /// Names that are listed beside the files.
    pub listed: Mutex<Vec<String>>,
    /// Faults of the storage, in order; then it works.
    pub faults: Mutex<VecDeque<Fault>>,
    /// A status that the hub answers with instead of anything else.
    pub refuses: Mutex<Option<u16>>,
    /// What the hub says a file's digest is, where it lies.
    pub etag: Mutex<Option<String>>,
    pub at_hub: Mutex<Vec<Asked>>,
    pub at_storage: Mutex<Vec<Asked>>,
    /// Bytes of bodies that the storage sent.
    pub sent: Mutex<u64>,
}

pub(crate) struct Hub {
    pub state: Arc<State>,
    pub endpoint: String,
}

impl Hub {
    pub(crate) fn start() -> Hub {
        let state = Arc::new(State::default());
        let of_storage = Arc::clone(&state);
        let storage = serve(move |stream, asked| storage(&of_storage, stream, asked));
        let of_hub = Arc::clone(&state);
        let hub = serve(move |stream, asked| front(&of_hub, storage, stream, asked));
        Hub { state, endpoint: format!("http://{hub}") }
    }

    pub(crate) fn add(&self, name: &str, bytes: Vec<u8>) {
        // at once: of a large file it takes longer than some clients wait for an answer
        self.state.digests.lock().unwrap().insert(name.to_owned(), Sha::of(&bytes).to_string());
        self.state.files.lock().unwrap().insert(name.to_owned(), Arc::new(bytes));
    }

    pub(crate) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.faults.lock().unwrap().extend(faults);
    }

    pub(crate) fn sent(&self) -> u64 {
        *self.state.sent.lock().unwrap()
    }
}

fn serve(answer: impl Fn(TcpStream, Asked) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                if let Some(asked) = read(&stream) {
                    answer(stream, asked);
                }
            });
        }
    });
    address
}

fn read(stream: &TcpStream) -> Option<Asked> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let mut asked =
        Asked { method: words.next()?.into(), path: words.next()?.into(), token: None, range: None };
    loop {
        let line = lines.next()?.ok()?;
        let Some((name, value)) = line.split_once(": ") else { return Some(asked) };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => asked.token = Some(value.to_owned()),
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                asked.range = Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1));
            }
            _ => {}
        }
    }
}

/// A head; `length` is what it says of the body.
fn head(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(&str, String)],
    length: Option<u64>,
) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if let Some(length) = length {
        text += &format!("content-length: {length}\r\n");
    }
    stream.write_all((text + "\r\n").as_bytes())
}

fn front(state: &State, storage: SocketAddr, mut stream: TcpStream, asked: Asked) {
    state.at_hub.lock().unwrap().push(asked.clone());
    if let Some(status) = *state.refuses.lock().unwrap() {
        let _ = head(&mut stream, status, &[], Some(0));
        return;
    }
    if asked.path == format!("/api/models/{REPO}/revision/main") {
        let files = state.files.lock().unwrap();
        let listed = state.listed.lock().unwrap();
        let siblings: Vec<String> =
            files.keys().chain(&*listed).map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
        let body = format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", siblings.join(","));
        let _ = head(&mut stream, 200, &[], Some(body.len() as u64));
        let _ = stream.write_all(body.as_bytes());
        return;
    }
    // a repository that was renamed
    if let Some(rest) = asked.path.strip_prefix("/org/old/") {
        let _ = head(&mut stream, 307, &[("location", format!("/{REPO}/{rest}"))], Some(0));
        return;
    }
    let name = asked.path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/"));
    let file = name.and_then(|name| state.files.lock().unwrap().get(name).cloned());
    let (Some(name), Some(file)) = (name, file) else {
        let _ = head(&mut stream, 404, &[], Some(0));
        return;
    };
    let etag = state.etag.lock().unwrap().clone();
    let etag = etag.unwrap_or_else(|| state.digests.lock().unwrap()[name].clone());
    let headers = [
        ("x-linked-etag", format!("\"{etag}\"")),
        ("x-linked-size", file.len().to_string()),
        ("x-repo-commit", COMMIT.to_owned()),
        ("location", format!("http://{storage}/signed/{name}?key=1")),
    ];
    let _ = head(&mut stream, 302, &headers, Some(0));
}

fn storage(state: &State, mut stream: TcpStream, asked: Asked) {
    state.at_storage.lock().unwrap().push(asked.clone());
    let name = asked.path.trim_start_matches("/signed/").trim_end_matches("?key=1").to_owned();
    let Some(file) = state.files.lock().unwrap().get(&name).cloned() else { return };
    let fault = state.faults.lock().unwrap().pop_front();
    let (first, end) = asked.range.unwrap_or((0, file.len() as u64));
    let end = end.min(file.len() as u64);
    let mut body = &file[first as usize..end as usize];
    let mut size = file.len() as u64;
    let other;
    match fault {
        Some(Fault::Status(status, after)) => {
            let after: Vec<_> = after.map(|after| ("retry-after", after.to_owned())).into_iter().collect();
            let _ = head(&mut stream, status, &after, Some(0));
            return;
        }
        Some(Fault::Silence) => return thread::sleep(Duration::from_secs(60)),
        Some(Fault::Whole) => {
            let _ = head(&mut stream, 200, &[], Some(size));
            let _ = stream.write_all(&file);
            return;
        }
        Some(Fault::Garbage) => {
            other = vec![0x5a; body.len()];
            body = &other;
        }
        Some(Fault::Size(wrong)) => size = wrong,
        _ => {}
    }
    let range = [("content-range", format!("bytes {first}-{}/{size}", end - 1))];
    let endless = matches!(fault, Some(Fault::Endless));
    let length = (!endless).then_some(body.len() as u64);
    if head(&mut stream, 206, &range, length).is_err() {
        return;
    }
    match fault {
        Some(Fault::Drip) => {
            for byte in body.iter().take(600) {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        Some(Fault::Cut(n)) => body = &body[..n.min(body.len())],
        _ => {}
    }
    for piece in body.chunks(64 << 10) {
        if stream.write_all(piece).is_err() {
            return;
        }
        *state.sent.lock().unwrap() += piece.len() as u64;
    }
    while endless && stream.write_all(&[0; 4096]).is_ok() {}
    let _ = stream.shutdown(Shutdown::Both);
}
