//! `dim-host chat` in a terminal: a real one, whose other end is this test.
#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use common::{Cut, Worker, signal};

/// A program in a terminal, and what it has shown.
struct Terminal {
    person: File,
    shown: Receiver<Vec<u8>>,
    text: String,
    child: Child,
}

impl Terminal {
    fn start(command: &mut Command) -> Terminal {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap().into_string().unwrap();
        let open = || Stdio::from(File::options().read(true).write(true).open(&name).unwrap());
        let child = command.stdin(open()).stdout(open()).stderr(open()).spawn().unwrap();
        let person = File::from(person);
        let mut reader = person.try_clone().unwrap();
        let (sender, shown) = channel();
        // it ends with the program, whose end of the terminal is then closed
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                let _ = sender.send(bytes[..n].to_vec());
            }
        });
        Terminal { person, shown, text: String::new(), child }
    }

    fn wait_until(&mut self, what: &str, is: impl Fn(&Terminal) -> bool) {
        let begin = Instant::now();
        loop {
            self.text.extend(self.shown.try_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()));
            if is(self) {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{what}: {}", self.text);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The line editor is at work: it shows itself what is typed.
    fn is_at_prompt(&self) -> bool {
        !tcgetattr(&self.person).unwrap().local_modes.contains(LocalModes::ECHO)
    }

    fn type_in(&mut self, text: &str) {
        self.person.write_all(text.as_bytes()).unwrap();
    }

    /// Its exit code, and everything it has shown.
    fn end(&mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        while let Ok(bytes) = self.shown.recv_timeout(Duration::from_millis(200)) {
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        (code, self.text.clone())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// What a person has said and is kept.
fn kept(file: &Path) -> Vec<String> {
    let Ok(text) = std::fs::read(file) else { return Vec::new() };
    let all: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let said = all.iter().filter(|message| message["role"] == "user");
    said.map(|message| message["content"].as_str().unwrap().to_owned()).collect()
}

/// More than a terminal takes that collects lines.
fn long_line(word: &str) -> String {
    format!("{word} {}end", "of the sea and ".repeat(300))
}

#[test]
fn a_long_line_a_paste_and_a_typo_are_what_they_look_like() {
    let cut = Cut::tiny("qwen2");
    let file = cut.folder.path().join("talk.json");
    let mut command = cut.host("chat", &[]);
    command.args(["--threads", "1", "--ctx", "4096", "-n", "2", "--temp", "0", "--save"]).arg(&file);
    let mut terminal = Terminal::start(command.env("TERM", "xterm").env("HOME", cut.folder.path()));
    let long = long_line("Tell");
    terminal.wait_until("a prompt", Terminal::is_at_prompt);
    terminal.type_in(&format!("{long}\r"));
    terminal.wait_until("the first message", |_| kept(&file).len() == 1);
    terminal.type_in("/halp\r");
    terminal.wait_until("a typo", |terminal| terminal.text.contains("there is no /halp"));
    terminal.type_in("\x1b[200~one\rtwo\rthree\x1b[201~\r");
    terminal.wait_until("a paste", |_| kept(&file).len() == 2);
    terminal.wait_until("a prompt", Terminal::is_at_prompt);
    terminal.type_in("half a line\x03");
    terminal.wait_until("a way out", |terminal| terminal.text.contains("Ctrl-C again ends this"));
    terminal.type_in("\x04");
    let (code, text) = terminal.end();
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(kept(&file), [long.as_str(), "one\ntwo\nthree"]);
}

#[test]
fn what_is_typed_while_a_reply_runs_is_the_next_message() {
    let cut = Cut::tiny("qwen2");
    let file = cut.folder.path().join("talk.json");
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "4096"]);
    let mut command = cut.host("chat", &[&worker.address]);
    command.args(["--threads", "1", "--ctx", "4096", "-n", "2", "--temp", "0", "--save"]).arg(&file);
    let mut terminal = Terminal::start(command.env("TERM", "xterm").env("HOME", cut.folder.path()));
    terminal.wait_until("a prompt", Terminal::is_at_prompt);
    // the reply runs until the worker does again
    worker.signal("STOP");
    terminal.type_in("hello\r");
    terminal.wait_until("a reply", |terminal| !terminal.is_at_prompt());
    let long = long_line("And");
    let mut person = terminal.person.try_clone().unwrap();
    let typed = format!("{long}\r");
    // whoever types more than a terminal holds waits
    let typing = std::thread::spawn(move || person.write_all(typed.as_bytes()).unwrap());
    std::thread::sleep(Duration::from_millis(300));
    worker.signal("CONT");
    terminal.wait_until("both", |_| kept(&file).len() == 2);
    typing.join().unwrap();
    assert_eq!(kept(&file), ["hello", long.as_str()]);
    // Ctrl-C ends a reply, and where there is none the program; the terminal is as it was then
    worker.signal("STOP");
    terminal.type_in("more\r");
    terminal.wait_until("a reply", |terminal| !terminal.is_at_prompt());
    signal(terminal.child.id(), "INT");
    terminal.wait_until("a prompt", Terminal::is_at_prompt);
    signal(terminal.child.id(), "INT");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(130));
    let after = tcgetattr(&terminal.person).unwrap().local_modes;
    assert!(after.contains(LocalModes::ICANON | LocalModes::ECHO), "{after:?}");
}
