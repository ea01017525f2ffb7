//! How a process that looked at a file for us ended without an answer.

use std::path::PathBuf;

use crate::text::Shown;

/// How the other process ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Died {
    /// By a signal or with an exit code of its own: what it said last, if anything.
    #[error("{}", ended(.how, .said))]
    Ended {
        /// As `signal 6`.
        how: String,
        /// ggml's last line.
        said: Option<String>,
    },
    /// By a signal or with an exit code of its own, because the system gave it no memory.
    #[error("there is no memory to look at it ({0})")]
    NoMemory(String),
    /// It did not end.
    #[error("no answer within {0} s")]
    Silent(u64),
    /// It answered something else.
    #[error("its answer is none")]
    Nonsense,
    /// It cannot be started.
    #[error("{program} cannot be started: {why}", program = .0.display(), why = .1)]
    NotStarted(PathBuf, String),
}

impl Died {
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Died::Ended { .. } | Died::Silent(_) => {
                "the file is damaged, or newer than the llama.cpp in this program: download it again, or convert it again \
                 with a current converter"
            }
            Died::NoMemory(_) => LESS_MEMORY,
            Died::Nonsense | Died::NotStarted(..) => {
                "has the system processes and files left for this one (ulimit -u, ulimit -n)? if the program was replaced \
                 while it runs, start it again"
            }
        }
    }
}

fn ended(how: &str, said: &Option<String>) -> String {
    match said {
        Some(said) => format!("{} ({how})", Shown(said)),
        None => format!("it ends the process ({how})"),
    }
}

/// What to do where a process gets no memory.
pub const LESS_MEMORY: &str =
    "close other programs, or allow this one more (ulimit -v, the limit of its container)";

/// Of what it said last.
pub(crate) fn died(how: String, said: Option<String>) -> Died {
    // what ggml, C++ and Rust say where the system gives nothing
    const OF_MEMORY: [&str; 4] =
        ["mem_buffer != NULL", "bad_alloc", "memory allocation of", "failed to allocate"];
    match said {
        Some(said) if OF_MEMORY.iter().any(|words| said.contains(words)) => Died::NoMemory(how),
        said => Died::Ended { how, said },
    }
}
