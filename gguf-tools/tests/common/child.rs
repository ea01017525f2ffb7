//! A process that loads files: llama.cpp may end it, and the test that started it lives on.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

/// The name under which a process learns that it is the child.
const CHILD: &str = "DIM_TEST_LOADS";

/// The child's side: runs every file it is told, and says what became of it. At once over where nobody is a child.
pub(crate) fn serve<E: std::fmt::Display>(run: impl Fn(&Path) -> Result<(), E>) {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    llama_sys_patch::set_log(llama_sys_patch::LogLevel::Silent);
    for path in std::io::stdin().lines() {
        let verdict = match run(Path::new(&path.unwrap())) {
            Ok(()) => "ran".to_owned(),
            Err(e) => format!("refused: {}", e.to_string().replace('\n', " ")),
        };
        println!("\ndone {verdict}");
        std::io::stdout().flush().unwrap();
    }
}

/// Such a process. One that has ended is to be started again.
pub(crate) struct Child {
    process: std::process::Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Child {
    /// This test program again, with the one test that [`serve`]s.
    pub(crate) fn start(test: &str) -> Child {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap()).lines();
        Child { process, stdin, stdout }
    }

    /// What became of the file: ran, refused, or the signal.
    pub(crate) fn load(&mut self, path: &Path) -> Result<String, i32> {
        writeln!(self.stdin, "{}", path.display()).unwrap();
        loop {
            match self.stdout.next() {
                Some(Ok(line)) => {
                    if let Some(verdict) = line.strip_prefix("done ") {
                        return Ok(verdict.to_owned());
                    }
                }
                _ => return Err(self.process.wait().unwrap().signal().unwrap_or(0)),
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
