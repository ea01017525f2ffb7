//! Where a cut model came from.

use serde::{Deserialize, Serialize};

/// Where a model was fetched from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSource {
    /// The hub's repository, `ORG/NAME`.
    pub repo: String,
    /// The commit, 40 hex digits.
    pub revision: String,
    /// The model's files, in order.
    pub files: Vec<SourceFile>,
}

/// A file of a [`ModelSource`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its path in the repository, `/` between folders.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// The SHA-256 of all of them, 64 hex digits.
    pub sha256: String,
}
