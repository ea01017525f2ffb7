//! Why nothing was fetched, and what to do about it.

use std::{borrow::Cow, io, path::PathBuf};

use crate::{
    failure::Explained,
    gguf,
    manifest::ManifestError,
    slice::SliceError,
    text::{Safe, Shown, gib},
};

/// Why a fetch failed. What had arrived is kept, but for what turned out to be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not `hf:ORG/REPO[/FILE|:QUANT]`.
    #[error("{}: {why}", Shown(text))]
    Spelling {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An address that nothing can be asked of.
    #[error("{} is no address of a server", Shown(.0))]
    Address(String),
    /// Nothing says where the cache is.
    #[error("there is no folder for the hub's cache")]
    NoCache,
    /// The token is none.
    #[error("the hub's token is not a line of letters and digits")]
    Token,
    /// 401.
    #[error("{}: {}", Safe(what), if *.has_token { "the hub does not take this token" } else { "not there, or not for everybody" })]
    Unauthorized {
        /// What was asked for.
        what: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// 403.
    #[error("{}: the hub does not let this account have it", Safe(what))]
    Forbidden {
        /// What was asked for.
        what: String,
        /// The page on which it may be asked for.
        page: String,
    },
    /// 404.
    #[error("{}: the hub has no such thing", Safe(what))]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// 429, with a wait that is longer than anybody's patience.
    #[error("{}: the server wants to be left alone for {seconds} s", Safe(what))]
    Busy {
        /// What was asked for.
        what: String,
        /// Seconds it asks for.
        seconds: u64,
    },
    /// A status that means nothing here.
    #[error("{}: the server answered with status {status}", Safe(what))]
    Status {
        /// What was asked for.
        what: String,
        /// The status.
        status: u16,
    },
    /// An answer that breaks a rule.
    #[error("{}: the server's answer {why}", Safe(what))]
    Answer {
        /// What was asked for.
        what: String,
        /// The rule, as the rest of the sentence.
        why: &'static str,
    },
    /// Tried until patience ended.
    #[error("{}: failed {tries} times in a row, at last: {}", Safe(what), Safe(why))]
    Network {
        /// What was asked for.
        what: String,
        /// How often.
        tries: u32,
        /// What happened the last time.
        why: String,
    },
    /// A name that leads out of the cache.
    #[error("\"{}\" is no name of a file in a repository", Shown(.0))]
    Name(String),
    /// No file or more than one is what was asked for.
    #[error("{}: {}; {}", Safe(repo), Safe(why), list(names))]
    Choice {
        /// The repository.
        repo: String,
        /// What was asked for, and how many there are of it.
        why: String,
        /// What there is.
        names: Vec<String>,
    },
    /// The file is not the one that it was when the fetch began.
    #[error("{}: changed on the server meanwhile", Safe(.0))]
    Changed(String),
    /// What arrived is something else.
    #[error("{}: what arrived has the SHA-256 {found}, not {expected}", Safe(what))]
    Hash {
        /// What was fetched.
        what: String,
        /// What it should have.
        expected: String,
        /// What it has.
        found: String,
    },
    /// Not enough room on the disk.
    #[error("need {}, have {} in {}", gib(*.need), gib(*.have), folder.display())]
    Space {
        /// Bytes still to come.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        folder: PathBuf,
    },
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Somebody else is at it.
    #[error("{}: another program is fetching this", .0.display())]
    Locked(PathBuf),
    /// The manifest is none.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The manifest does not say where the model came from.
    #[error("{}: does not say where the model came from, so that its slices cannot be fetched", Safe(.0))]
    NoSource(String),
    /// The slice has no recipe, or one that makes no slice.
    #[error("{}: {why}", Safe(slice))]
    Recipe {
        /// The slice.
        slice: String,
        /// What is wrong.
        why: &'static str,
    },
    /// No middle, or more than one, is what was asked for.
    #[error("{}: {why}: it has {}", Safe(manifest), middles.join(", "))]
    Middle {
        /// The manifest.
        manifest: String,
        /// What is wrong.
        why: &'static str,
        /// The blocks of its middles.
        middles: Vec<String>,
    },
    /// The header of a fetched slice breaks a rule.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// What was fetched is not what its header says.
    #[error(transparent)]
    Slice(#[from] SliceError),
}

impl Explained for HubError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            HubError::Spelling { .. } => {
                "write hf:ORG/REPO, hf:ORG/REPO/FILE.gguf or hf:ORG/REPO:Q4_K_M".into()
            }
            HubError::Address(_) => "an address begins with http:// or https://; see HF_ENDPOINT".into(),
            HubError::NoCache => "set HF_HOME to a folder".into(),
            HubError::Token => "look at HF_TOKEN, or at the file that HF_TOKEN_PATH names".into(),
            HubError::Unauthorized { has_token: true, .. } => {
                "renew the token in HF_TOKEN or in its file".into()
            }
            HubError::Unauthorized { .. } => "look at its spelling; if it is private, set HF_TOKEN".into(),
            HubError::Forbidden { page, .. } => {
                format!("accept its terms at {page}, and set HF_TOKEN").into()
            }
            HubError::NotFound { .. } => "look at its spelling".into(),
            HubError::Busy { .. } => "try again then; what has arrived is kept".into(),
            HubError::Network { .. } => "try again: it goes on where it stopped".into(),
            HubError::Choice { .. } => "name one: hf:ORG/REPO/FILE.gguf".into(),
            HubError::Changed(_) => "try again: the new one is fetched from its start".into(),
            HubError::Hash { .. } => {
                "try again; if it is the same again, the file on the server is broken".into()
            }
            HubError::Space { .. } => "free some space and try again: it goes on where it stopped".into(),
            HubError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "free some space and try again: it goes on where it stopped".into()
            }
            HubError::Locked(_) => "wait for it, or end it".into(),
            HubError::NoSource(_) => "cut it with dim-split hf:ORG/REPO, or copy the slice itself".into(),
            HubError::Recipe { .. } => "cut the model again, or copy the slice itself".into(),
            HubError::Middle { .. } => "name one of them".into(),
            HubError::Manifest(e) => return e.hint(),
            HubError::Gguf(e) => return e.hint(),
            HubError::Slice(e) => return e.hint(),
            _ => return None,
        })
    }

    fn is_misuse(&self) -> bool {
        match self {
            HubError::Spelling { .. }
            | HubError::Address(_)
            | HubError::NoCache
            | HubError::Token
            | HubError::Unauthorized { .. }
            | HubError::Forbidden { .. }
            | HubError::NotFound { .. }
            | HubError::Choice { .. }
            | HubError::Space { .. }
            | HubError::NoSource(_)
            | HubError::Recipe { .. }
            | HubError::Middle { .. } => true,
            HubError::Manifest(e) => e.is_misuse(),
            _ => false,
        }
    }
}

/// Names for a person to choose from.
fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "it has no GGUF file".to_owned();
    }
    let shown: Vec<String> = names.iter().take(MAX_LISTED).map(|name| Shown(name).to_string()).collect();
    let more = names.len().saturating_sub(MAX_LISTED);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("there is {}{rest}", shown.join(", "))
}

/// Names that an error lists.
const MAX_LISTED: usize = 24;
