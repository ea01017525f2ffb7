//! `dim-host serve --cache-dir` as a process: a restart of the server and of the worker changes no answer, and nothing that lies
//! in the folder can do harm.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Cut, PROMPT, Worker, failure, served, signal};
use serde_json::{Value, json};

/// Where each of three conversations begins.
const BEGINNINGS: [usize; 3] = [0, 60, 120];
const N: usize = 16;

fn worker(cut: &Cut, listen: &str) -> Worker {
    Worker::start_at(listen, &cut.slice(1), &cut.key, &["--parallel", "3"])
}

fn command(cut: &Cut, worker: &str, cache: &[&str]) -> Command {
    served::command(cut, worker, &[&["--ubatch", "32"], cache].concat())
}

/// A server whose last words are read.
struct Server {
    server: served::Server,
    folder: PathBuf,
}

impl Server {
    fn start(cut: &Cut, worker: &str, folder: &Path, more: &[&str]) -> Server {
        let folder_name = folder.display().to_string();
        let mut command = command(cut, worker, &["--cache-dir", &folder_name]);
        Server::spawn(command.args(more), folder)
    }

    fn spawn(command: &mut Command, folder: &Path) -> Server {
        let told = folder.with_extension("told");
        let told = fs::OpenOptions::new().create(true).append(true).open(told).unwrap();
        Server { server: served::Server::spawn(command.stderr(told)), folder: folder.to_owned() }
    }

    /// What all servers of this folder have said of prompts so far.
    fn told(&self) -> String {
        let all = fs::read_to_string(self.folder.with_extension("told")).unwrap();
        all.lines().filter(|line| line.contains(" kept")).map(|line| format!("{line}\n")).collect()
    }

    fn ask(&self, body: &Value) -> Value {
        let answer = self.server.post("/v1/completions", body);
        assert_eq!(answer.0, 200, "{}", answer.2);
        answer.json()
    }

    fn tokens(&self, begin: usize) -> (Vec<i32>, u64) {
        let answer = self.ask(&greedy(begin));
        (served::tokens(&answer["choices"][0]["tokens"]), answer["timings"]["cache_n"].as_u64().unwrap())
    }

    /// Of the metrics, this one.
    fn count(&self, name: &str) -> u64 {
        let text = self.server.ask("GET /metrics HTTP/1.1\r\nHost: localhost", "").2;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
        line.parse().unwrap()
    }

    /// SIGTERM, and the end in order.
    fn end(self) {
        signal(self.server.pid(), "TERM");
        assert_eq!(self.server.wait(), Some(0));
    }
}

fn greedy(begin: usize) -> Value {
    served::greedy(&PROMPT[begin..], N)
}

/// What each conversation gives by `dim-host generate`.
fn generated(cut: &Cut, worker: &str) -> Vec<Vec<i32>> {
    let one = |begin| served::generated_one(cut, worker, begin, N, &["--ubatch", "32"]);
    BEGINNINGS.into_iter().map(one).collect()
}

/// The files of prompts, and nothing else.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.iter().all(|path| path.extension().is_some_and(|e| e == "prompt")), "{files:?}");
    files
}

#[test]
fn answers_are_the_same_after_a_restart_of_server_and_worker() {
    let cut = Cut::tiny("qwen2");
    let mut worker = worker(&cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let expected = generated(&cut, &address);
    let folder = cut.folder.path().join("kept");

    let server = Server::start(&cut, &address, &folder, &[]);
    let probabilities = |server: &Server| {
        let mut body = greedy(BEGINNINGS[2]);
        body["logprobs"] = 5.into();
        server.ask(&body)["choices"][0]["logprobs"].clone()
    };
    for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
        assert_eq!(&server.tokens(begin).0, expected);
    }
    // with the slot's own cache, to the last bit that is shown
    let held = probabilities(&server);
    server.end();
    assert_eq!(files(&folder).len(), 3, "two that were let go of, and one that the slot held");

    for round in 0..2 {
        worker.kill();
        worker = Worker::start_at(&address, &cut.slice(1), &cut.key, &["--parallel", "3"]);
        let server = Server::start(&cut, &address, &folder, &[]);
        assert_eq!(probabilities(&server), held, "round {round}");
        for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
            let (tokens, cached) = server.tokens(begin);
            assert_eq!(&tokens, expected);
            let n = server.ask(&greedy(begin))["usage"]["prompt_tokens"].as_u64().unwrap();
            assert_eq!(cached, n - 1, "all but the last token was put back, or held");
        }
        assert!(server.count("dim_prompt_tokens_restored_total") > 100);
        assert!(server.count("dim_prompt_tokens_cached_total") > 100);
        assert_eq!(server.told(), "", "nothing to complain of");
        server.end();
        assert_eq!(files(&folder).len(), 3, "what is kept already is not kept again");
    }
    // of another way of computing: left alone
    let other = Server::start(&cut, &address, &folder, &["--ctx", "384"]);
    assert_eq!(other.tokens(0), (expected[0].clone(), 0));
    other.end();
    assert_eq!(files(&folder).len(), 4);
}

/// The rows that the worker would be told again are told the slice that runs here in its place.
#[test]
fn what_is_kept_is_put_back_where_the_blocks_run_here() {
    let cut = Cut::tiny("qwen2");
    let mut worker = worker(&cut, "127.0.0.1:0");
    let expected = generated(&cut, &worker.address);
    let folder = cut.folder.path().join("kept");
    let server = Server::start(&cut, &worker.address, &folder, &[]);
    BEGINNINGS.into_iter().for_each(|begin| drop(server.tokens(begin)));
    server.end();
    let alone = ["--fallback", "local", "--give-up-after", "1"];
    let server = Server::start(&cut, &worker.address, &folder, &alone);
    worker.kill();
    for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
        let (tokens, cached) = server.tokens(begin);
        assert_eq!(&tokens, expected);
        assert!(cached > 30, "{cached} of the prompt were put back");
    }
    assert!(server.count("dim_prompt_tokens_restored_total") > 100);
    assert_eq!(server.server.get("/health")["fallen_back"].as_array().map(Vec::len), Some(1));
    server.end();
}

#[test]
fn a_worker_that_is_killed_while_its_cache_is_filled_again_changes_no_token() {
    let cut = Cut::tiny("qwen2");
    let mut worker = worker(&cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let expected = generated(&cut, &address);
    let folder = cut.folder.path().join("kept");
    let more = ["--cache-ram", "64"];
    let server = Server::start(&cut, &address, &folder, &more);
    BEGINNINGS.into_iter().for_each(|begin| drop(server.tokens(begin)));
    assert_eq!(files(&folder), [] as [PathBuf; 0], "memory has room for them");
    server.end();
    assert_eq!(files(&folder).len(), 3);
    let server = Server::start(&cut, &address, &folder, &more);
    for round in 0..6 {
        for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
            std::thread::scope(|scope| {
                let asked = scope.spawn(|| server.tokens(begin));
                std::thread::sleep(Duration::from_millis(2 * round));
                worker.kill();
                worker = Worker::start_at(&address, &cut.slice(1), &cut.key, &["--parallel", "3"]);
                let (tokens, cached) = asked.join().unwrap();
                assert_eq!(&tokens, expected);
                assert!(cached > 20, "{cached}");
            });
        }
    }
}

#[test]
fn what_lies_in_the_folder_is_whole_or_left_out() {
    let cut = Cut::tiny("qwen2");
    let worker = worker(&cut, "127.0.0.1:0");
    let address = worker.address.as_str();
    let expected = generated(&cut, address);
    let folder = cut.folder.path().join("kept");
    let server = Server::start(&cut, address, &folder, &[]);
    BEGINNINGS.into_iter().for_each(|begin| drop(server.tokens(begin)));
    server.end();
    let whole: Vec<(PathBuf, Vec<u8>)> =
        files(&folder).into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect();

    let spoil = |how: &dyn Fn(&[u8]) -> Vec<u8>| {
        whole.iter().for_each(|(path, bytes)| fs::write(path, how(bytes)).unwrap());
    };
    let flipped_at = |at: fn(usize) -> usize| {
        move |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            let at = at(bytes.len());
            bytes[at] ^= 4;
            bytes
        }
    };
    type Way<'a> = (&'a str, &'a dyn Fn(&[u8]) -> Vec<u8>);
    let ways: [Way; 6] = [
        ("cut off", &|bytes| bytes[..bytes.len() - 100].to_vec()),
        ("half of it", &|bytes| bytes[..bytes.len() / 2].to_vec()),
        ("empty", &|_| Vec::new()),
        ("a bit of its index", &flipped_at(|n| n - 60)),
        ("a bit of a step", &flipped_at(|_| 100)),
        ("something else", &|_| b"GGUF".repeat(300)),
    ];
    for (way, how) in ways {
        spoil(how);
        let server = Server::start(&cut, address, &folder, &[]);
        let before = server.told().len();
        for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
            assert_eq!(server.tokens(begin), (expected.clone(), 0), "{way}");
        }
        let told = server.told();
        let n = told.matches("is left out").count();
        assert!(n >= 1 && told.contains(&folder.display().to_string()), "{way}: {told}");
        if way != "a bit of a step" {
            // one notice for all of them, before the first request
            assert_eq!(told[before..].lines().count(), 0, "{way}: {told}");
            assert!(told.contains("and so are 2 more"), "{way}: {told}");
        }
        drop(server);
        fs::remove_file(folder.with_extension("told")).unwrap();
        for path in files(&folder) {
            fs::remove_file(path).unwrap();
        }
    }

    // what is there and is no file; what is huge; what nobody may read
    let name = |i: usize| whole[i].0.clone();
    fs::create_dir(name(0)).unwrap();
    let huge = fs::File::create(name(1)).unwrap();
    huge.set_len(1 << 40).unwrap();
    std::os::unix::fs::symlink("/dev/zero", name(2)).unwrap();
    let server = Server::start(&cut, address, &folder, &[]);
    assert_eq!(server.tokens(0), (expected[0].clone(), 0));
    assert_eq!(server.told().matches("is left out").count(), 1, "{}", server.told());
    assert!(server.told().contains("no saved session"), "{}", server.told());
}

#[test]
fn two_servers_share_a_folder_and_the_oldest_make_room() {
    let cut = Cut::tiny("qwen2");
    let workers = [worker(&cut, "127.0.0.1:0"), worker(&cut, "127.0.0.1:0")];
    let expected = generated(&cut, &workers[0].address);
    let folder = cut.folder.path().join("kept");
    let servers = workers.each_ref().map(|worker| Server::start(&cut, &worker.address, &folder, &[]));
    std::thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| {
                for (begin, expected) in
                    BEGINNINGS.into_iter().zip(&expected).chain(BEGINNINGS.into_iter().zip(&expected))
                {
                    assert_eq!(&server.tokens(begin).0, expected);
                }
            });
        }
    });
    // what one has removed the other does without
    files(&folder).into_iter().for_each(|path| fs::remove_file(path).unwrap());
    assert_eq!(servers[0].tokens(0), (expected[0].clone(), 0));
    assert_eq!(servers[0].told(), "");
    servers.into_iter().for_each(Server::end);
    let n = files(&folder).len();
    assert!((2..=6).contains(&n), "{n}");

    // room for one MiB of them
    let bytes = || files(&folder).iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    for i in 0..4 {
        let like = &files(&folder)[0];
        fs::write(folder.join(format!("{:016x}-{i:016x}.prompt", 7)), vec![0; 300_000]).unwrap();
        assert!(like.exists());
    }
    assert!(bytes() > 1 << 20);
    let server = Server::start(&cut, &workers[0].address, &folder, &["--cache-disk", "1"]);
    BEGINNINGS.into_iter().for_each(|begin| drop(server.tokens(begin)));
    let mut other = greedy(200);
    other["prompt"] = json!(&PROMPT[200..]);
    server.ask(&other);
    server.end();
    assert!(bytes() <= 1 << 20, "{}", bytes());
}

#[test]
fn a_folder_that_takes_nothing_is_told_once_and_harms_no_answer() {
    let cut = Cut::tiny("qwen2");
    let worker = worker(&cut, "127.0.0.1:0");
    let expected = generated(&cut, &worker.address);
    let folder = cut.folder.path().join("kept");
    // no file of more than 8 KiB, as where the disk is full: the write fails, and no signal says so
    let inner = command(&cut, &worker.address, &["--cache-dir", &folder.display().to_string()]);
    let mut full = Command::new("sh");
    full.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"]).arg(inner.get_program());
    let server = Server::spawn(full.args(inner.get_args()), &folder);
    for _ in 0..2 {
        for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
            assert_eq!(&server.tokens(begin).0, expected);
        }
    }
    let told = server.told();
    assert_eq!(told.matches("could not be kept").count(), 1, "{told}");
    signal(server.server.pid(), "TERM");
    assert_eq!(server.server.wait(), Some(0));
    assert_eq!(files(&folder), [] as [PathBuf; 0], "nothing half-written");

    // what cannot be a folder is known before a model is loaded
    let file = cut.folder.path().join("file");
    fs::write(&file, "").unwrap();
    let said = failure(&mut command(&cut, &worker.address, &["--cache-dir", &file.display().to_string()]), 2);
    assert!(
        said.contains("cannot keep prompts in")
            && said.contains("hint: name a folder that this user can write to"),
        "{said}"
    );
}

#[test]
fn a_model_with_states_keeps_nothing_and_says_so_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    llama_sys_patch::test_support::write_model("mamba", 4, &[], &path).unwrap();
    let cut = Cut::of_file(&path, &["1..2"]);
    let worker = Worker::start_at("127.0.0.1:0", &cut.slice(1), &cut.key, &["--parallel", "3"]);
    let kept = cut.folder.path().join("kept");
    let server = Server::start(&cut, &worker.address, &kept, &[]);
    let body = json!({"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], "max_tokens": 4, "temperature": 0, "return_tokens": true});
    server.ask(&body);
    assert_eq!(server.told().matches("prompts are not kept").count(), 1, "{}", server.told());
    server.end();
    assert!(files(&kept).is_empty());
}
