//! The commands of README.md and docs/SETUP.md, as a new user pastes them: line by line, in order, in a folder with a model
//! and the built programs, with a home of its own; what belongs on the other machine in another one.
//!
//! A comment before a block says where it is run, if it is not here: `<!-- on the other machine -->`, or why not at all:
//! `<!-- not run by the tests: it needs a phone -->`. What differs from what a user types is in [`Machine::run`].

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::served::Server;
use common::{Worker, host_program, text};
use gguf_tools::synth::Spec;

/// A block of commands.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    place: Place,
    lines: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here,
    OtherMachine,
    Nowhere(String),
}

/// The `sh` blocks of a document. A comment, a blank line, a line that ends in `\` are what they are to a shell.
fn blocks(document: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut before = "";
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "```sh" {
            let place = match before.trim().strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->")) {
                None => Place::Here,
                Some("on the other machine") => Place::OtherMachine,
                Some(why) => match why.strip_prefix("not run by the tests: ") {
                    Some(why) => Place::Nowhere(why.to_owned()),
                    None => panic!("a comment before a block: {why:?}"),
                },
            };
            let body: Vec<&str> = lines.by_ref().take_while(|line| line.trim() != "```").collect();
            let joined = body.join("\n").replace("\\\n", " ");
            let commands =
                joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            blocks.push(Block { place, lines: commands.map(str::to_owned).collect() });
        } else if line.starts_with("```") {
            lines.by_ref().find(|line| line.trim() == "```");
        }
        if !line.trim().is_empty() {
            before = line;
        }
    }
    blocks
}

/// A home, and a folder in it that a user is in.
struct Machine {
    home: tempfile::TempDir,
    worker: Option<Worker>,
    /// it stays while other lines are pasted into another terminal
    server: Option<Server>,
}

impl Machine {
    /// With the programs where `make demo` puts them.
    fn new() -> Machine {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("dim/target");
        std::fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(host_program().parent().unwrap(), folder.join("release")).unwrap();
        std::fs::write(home.path().join("environment"), "").unwrap();
        Machine { home, worker: None, server: None }
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("dim")
    }

    /// A shell as a user has it, with what the lines before have exported.
    fn shell(&self, line: &str) -> Command {
        let environment = self.home.path().join("environment");
        let environment = environment.display();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!(". '{environment}'\n{line}\ncode=$?; export -p > '{environment}'; exit $code"));
        command.current_dir(self.folder()).env_clear().env("HOME", self.home.path());
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("TERM", "dumb");
        command
    }

    /// Runs a line that has to succeed, and gives what it said. Where README says 192.168.1.20:7878, the worker's address
    /// is taken; a worker and a server listen on a port that is free, on loopback, and stay; replies end after 8 tokens.
    fn run(&mut self, line: &str, other: &Machine) -> String {
        if line.starts_with("dim-worker") {
            let (command, comment) = line.split_once('#').unwrap_or((line, ""));
            let worker =
                Worker::spawn(&mut self.shell(&format!("exec {command} --listen 127.0.0.1:0 # {comment}")));
            self.worker = Some(worker);
            return String::new();
        }
        let worker = other.worker.as_ref();
        let line = worker.map_or(line.to_owned(), |w| line.replace("192.168.1.20:7878", &w.address));
        if line.starts_with("dim-host serve") {
            let server = Server::spawn(&mut self.shell(&format!("exec {line} --listen 127.0.0.1:0")));
            wait_until_well(&server);
            self.server = Some(server);
            return String::new();
        }
        let server = self.server.as_ref().filter(|_| line.starts_with("curl "));
        let line = server.map_or(line.clone(), |s| line.replace("127.0.0.1:8080", &s.address));
        let typed = match (line.starts_with("dim-host pair"), worker) {
            (true, Some(worker)) => code_of(worker),
            _ => "Hello, who are you?\n".to_owned(),
        };
        // random weights end no reply
        let line = match line.split_once('#').map_or(line.as_str(), |(command, _)| command.trim_end()) {
            chat if chat.starts_with("dim-host chat") => format!("{chat} -n 8"),
            curl if curl.starts_with("curl ") => {
                curl.replace("{\"messages", "{\"max_tokens\": 8, \"messages")
            }
            other => other.replace("-n 100", "-n 8"),
        };
        let mut command = self.shell(&line);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // who does not ask does not read
        let _ = child.stdin.take().unwrap().write_all(typed.as_bytes());
        let output = child.wait_with_output().unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && !err.contains("error:"), "$ {line}\n{out}{err}{}", output.status);
        println!("$ {line}");
        out
    }
}

/// Until the server says that it is well.
fn wait_until_well(server: &Server) {
    let health = || server.ask(&format!("GET /health HTTP/1.1\r\nHost: {}", server.address), "");
    for _ in 0..600 {
        if health().0 == 200 {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("not ready: {}", health().2)
}

/// The pairing code that a worker shows.
fn code_of(worker: &Worker) -> String {
    let is_code = |l: &&str| l.len() > 20 && l.chars().all(|c| c == '-' || c.is_ascii_alphanumeric());
    for _ in 0..500 {
        let said = worker.stderr.lock().unwrap().clone();
        if let Some(code) = said.lines().map(str::trim).find(is_code) {
            return format!("{code}\n");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no code in {}", worker.stderr.lock().unwrap())
}

/// Runs a document's blocks; how many lines ran here, and on the other machine.
fn paste(document: &str) -> (usize, usize) {
    let (mut here, mut other) = (Machine::new(), Machine::new());
    let model = here.folder().join("qwen2.5-7b-instruct-fp16.gguf");
    // as many blocks as that model has, and small
    Spec::tiny("qwen2").unwrap().blocks(28).write(&model).unwrap();
    let (mut n_here, mut n_there) = (0, 0);
    for Block { place, lines } in blocks(document) {
        match place {
            Place::Nowhere(why) => println!("not run, {why}: {}", lines.join("; ")),
            Place::Here => {
                for line in &lines {
                    let out = here.run(line, &other);
                    let speaks = ["dim-host chat", "dim-host generate", "dim-host stock"];
                    if speaks.iter().any(|command| line.starts_with(command)) {
                        assert!(!out.trim().is_empty(), "$ {line}\nsaid nothing");
                    }
                    if line.starts_with("curl ") {
                        assert!(out.contains("\"finish_reason\":\"length\""), "$ {line}\n{out}");
                    }
                }
                n_here += lines.len();
            }
            Place::OtherMachine => {
                // "copy it to the other machine"
                for file in std::fs::read_dir(here.folder()).unwrap().flatten() {
                    if file.file_name().to_string_lossy().contains(".middle-") && file.path().is_file() {
                        std::fs::copy(file.path(), other.folder().join(file.file_name())).unwrap();
                    }
                }
                for line in &lines {
                    other.run(line, &here);
                }
                n_there += lines.len();
            }
        }
    }
    (n_here, n_there)
}

fn document(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)).unwrap()
}

#[test]
fn what_the_readme_says_works_when_it_is_pasted() {
    let (here, there) = paste(&document("README.md"));
    assert!(here >= 5 && there >= 1, "{here} lines here, {there} on the other machine");
}

#[test]
fn what_the_set_up_says_works_when_it_is_pasted() {
    let (here, there) = paste(&document("docs/SETUP.md"));
    assert!(here >= 6 && there >= 1, "{here} lines here, {there} on the other machine");
}

#[test]
fn blocks_are_found_where_a_reader_finds_them() {
    let document = "```text\n$ no\n```\n```sh\na   # 1\n# c\n\nb \\\n  c\n```\n<!-- on the other machine -->\n```sh\nd\n```\n\
                    <!-- not run by the tests: it is blue -->\n\n  ```sh\n  e\n  ```\n";
    let block = |place, lines: &[&str]| Block { place, lines: lines.iter().map(|&l| l.to_owned()).collect() };
    assert_eq!(
        blocks(document),
        [
            block(Place::Here, &["a   # 1", "b    c"]),
            block(Place::OtherMachine, &["d"]),
            block(Place::Nowhere("it is blue".into()), &["e"]),
        ]
    );
}
