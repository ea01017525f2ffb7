//! What a person says: from a terminal with a line editor, or from a pipe a line at a time.

use std::io::{BufRead as _, IsTerminal as _};
use std::path::PathBuf;

use dim_wire::keys::KeyStore;
use gguf_tools::failure::Failure;
use gguf_tools::tell;
use rustyline::config::Configurer as _;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

use crate::type_ahead::TypeAhead;

/// Where messages come from.
pub(super) struct Input {
    source: Source,
    line: String,
}

enum Source {
    Terminal { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf>, _ahead: TypeAhead },
    Pipe,
}

/// One of them.
pub(super) enum Line<'a> {
    /// Something for the model.
    Said(String),
    /// `/word rest`, without the slash.
    Command(&'a str, &'a str),
    /// Nothing more comes.
    End,
}

impl Input {
    /// Standard input. On a terminal lines can be edited, what was said before is a key away, and a paste of several lines
    /// is one message.
    pub(super) fn new() -> Input {
        let config = Config::builder().bracketed_paste(true);
        let editor = match std::io::stdin().is_terminal() {
            true => Editor::<(), FileHistory>::with_config(config.build()).ok(),
            false => None,
        };
        let source = match editor {
            None => Source::Pipe,
            Some(mut editor) => {
                let history = history_file();
                editor.set_max_history_size(HISTORY_LINES).ok();
                // the first time there is none
                let _ = history.as_ref().map(|file| editor.load_history(file));
                Source::Terminal { editor: Box::new(editor), history, _ahead: TypeAhead::begin() }
            }
        };
        Input { source, line: String::new() }
    }

    /// Somebody sits there.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self.source, Source::Terminal { .. })
    }

    /// The next line that is not empty.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn next(&mut self) -> Result<Line<'_>, Failure> {
        loop {
            if !self.read()? {
                return Ok(Line::End);
            }
            if !self.line.trim().is_empty() {
                break;
            }
        }
        // commands begin at the margin; a path is no command
        let word = self.line.split_whitespace().next().unwrap_or_default();
        match word.strip_prefix('/') {
            Some(name)
                if self.line.starts_with('/') && !name.contains('/') && !self.line.trim().contains('\n') =>
            {
                Ok(Line::Command(name, self.line[word.len()..].trim()))
            }
            _ => Ok(Line::Said(self.line.trim().to_owned())),
        }
    }

    /// Whether there was one more.
    fn read(&mut self) -> Result<bool, Failure> {
        match &mut self.source {
            Source::Pipe => {
                let mut bytes = Vec::new();
                let read = std::io::stdin().lock().read_until(b'\n', &mut bytes);
                let n = read.map_err(|e| Failure::failed(format!("cannot read the next line: {e}")))?;
                self.line = match String::from_utf8(bytes) {
                    Ok(line) => line,
                    // another encoding ends no conversation
                    Err(e) => {
                        tell!("note: this line is not UTF-8; what cannot be read is \u{fffd}");
                        String::from_utf8_lossy(e.as_bytes()).into_owned()
                    }
                };
                Ok(n > 0)
            }
            Source::Terminal { editor, history, .. } => {
                tell!();
                let Some(line) = edited(editor)? else { return Ok(false) };
                self.line = line;
                if editor.add_history_entry(self.line.as_str()).unwrap_or(false)
                    && let Some(file) = history
                {
                    // a history that cannot be kept is none
                    let _ = editor.append_history(file);
                }
                Ok(true)
            }
        }
    }
}

/// A line that was edited; `None`: nothing more comes.
fn edited(editor: &mut Editor<(), FileHistory>) -> Result<Option<String>, Failure> {
    let mut interrupted = false;
    loop {
        match editor.readline("> ") {
            Ok(line) => return Ok(Some(line)),
            // one gives up the line; a second one means more than that
            Err(ReadlineError::Interrupted) if !interrupted => {
                interrupted = true;
                tell!("[Ctrl-D, /exit or Ctrl-C again ends this]");
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(None),
            Err(e) => return Err(Failure::failed(format!("cannot read the next line: {e}"))),
        }
    }
}

const HISTORY_LINES: usize = 1000;

/// Beside the keys, where only this user reads.
fn history_file() -> Option<PathBuf> {
    let store = KeyStore::of_user().ok()?;
    let folder = store.directory().parent()?.to_owned();
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("chat-history"))
}
