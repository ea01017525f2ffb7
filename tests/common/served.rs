//! The server as a process, and what its clients ask it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Cut, PROMPT, Worker, report};

/// A `dim-host serve` process; ended when it is dropped.
pub(crate) struct Server {
    child: Child,
    pub address: String,
}

/// An answer of a server: status, head in lower case, body.
pub(crate) struct Answer(pub u16, pub String, pub String);

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.2).unwrap_or_else(|e| panic!("{e}: {}", self.2))
    }

    /// Of an error, the field or the word.
    pub(crate) fn word(&self) -> String {
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{}", self.2);
        error["code"].as_str().or(error["param"].as_str()).unwrap_or_default().to_owned()
    }
}

/// `dim-host serve` over this worker, with the options every run here has in common.
pub(crate) fn command(cut: &Cut, worker: &str, more: &[&str]) -> Command {
    let mut command = cut.host("serve", &[worker]);
    command.args(["--listen", "127.0.0.1:0", "--threads", "1", "--wire", "f32"]).args(more);
    if !more.contains(&"--ctx") {
        command.args(["--ctx", "512"]);
    }
    command
}

impl Server {
    /// Starts [`command`].
    pub(crate) fn start(cut: &Cut, worker: &str, more: &[&str]) -> Server {
        Server::spawn(command(cut, worker, more).stderr(Stdio::null()))
    }

    /// Starts what `command` says and waits until it listens.
    pub(crate) fn spawn(command: &mut Command) -> Server {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").expect(&line).to_owned();
        Server { child, address }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit code, once it has one.
    pub(crate) fn wait(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Sends a request, after which the server closes; `head`: its lines, without the last line break.
    pub(crate) fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(stream, "{head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
            .unwrap();
        stream
    }

    pub(crate) fn ask(&self, head: &str, body: &str) -> Answer {
        let mut text = String::new();
        self.send(head, body).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text}"));
        Answer(head[9..12].parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost"), "").json()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask(&format!("POST {path} HTTP/1.1\r\nHost: localhost"), &body.to_string())
    }

    /// The tokens of a whole answer.
    pub(crate) fn tokens(&self, body: &Value) -> Vec<i32> {
        let answer = self.post("/v1/completions", body);
        assert_eq!(answer.0, 200, "{}", answer.2);
        tokens(&answer.json()["choices"][0]["tokens"])
    }

    /// Events of a stream, without the last.
    pub(crate) fn events(&self, body: &Value) -> impl Iterator<Item = Value> + use<> {
        self.events_at("/v1/completions", body)
    }

    pub(crate) fn events_at(&self, path: &str, body: &Value) -> impl Iterator<Item = Value> + use<> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let stream = self.send(&format!("POST {path} HTTP/1.1\r\nHost: localhost"), &body.to_string());
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        let data = lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned));
        data.take_while(|data| data != "[DONE]").map(|data| serde_json::from_str(&data).unwrap())
    }

    /// The tokens of an answer that is streamed.
    pub(crate) fn streamed(&self, body: &Value) -> Vec<i32> {
        self.events(body).flat_map(|event| tokens(&event["choices"][0]["tokens"])).collect()
    }

    pub(crate) fn comes_true(&self, what: &str, is_true: impl Fn(&Server) -> bool) {
        let start = Instant::now();
        while !is_true(self) {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}: {}", self.get("/health"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tokens as a reply has them.
pub(crate) fn tokens(list: &Value) -> Vec<i32> {
    list.as_array().into_iter().flatten().map(|token| token.as_i64().unwrap() as i32).collect()
}

/// A request for `n` tokens of a greedy answer to `prompt`: a text or tokens.
pub(crate) fn greedy(prompt: impl Into<Value>, n: usize) -> Value {
    let prompt: Value = prompt.into();
    json!({"prompt": prompt, "temperature": 0, "max_tokens": n, "return_tokens": true, "ignore_eos": true})
}

/// A worker for four replies at once and its check.
pub(crate) fn parallel(cut: &Cut, listen: &str) -> Worker {
    Worker::start_at(listen, &cut.slice(1), &cut.key, &["--parallel", "5"])
}

/// Where each of four conversations begins.
pub(crate) const BEGINNINGS: [usize; 4] = [0, 60, 120, 200];
/// Tokens of an answer.
pub(crate) const N: usize = 48;

/// What a conversation gives by `dim-host generate`.
pub(crate) fn generated_one(cut: &Cut, worker: &str, begin: usize, n: usize, more: &[&str]) -> Vec<i32> {
    let n = n.to_string();
    let options = ["--wire", "f32", "--temp", "0", "-n", &n, "--ignore-eos", "-p", &PROMPT[begin..]];
    report(cut.generate(&[worker], &options).args(more)).tokens
}

/// What each of the four gives.
pub(crate) fn generated(cut: &Cut, worker: &str) -> Vec<Vec<i32>> {
    BEGINNINGS.into_iter().map(|begin| generated_one(cut, worker, begin, N, &[])).collect()
}
