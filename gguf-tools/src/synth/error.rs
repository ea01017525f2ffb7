//! Why a model could not be synthesised.

use std::{borrow::Cow, path::PathBuf};

use super::{FAMILIES, SHAPES, type_names};
use crate::{failure::Explained, gguf::write::WriteError, text::gib};

/// Why a model could not be synthesised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No shape of this name.
    #[error("unknown shape {name:?}; known: {}", list(SHAPES.iter().map(|s| s.name)))]
    UnknownShape {
        /// As asked.
        name: String,
    },
    /// No family of this name.
    #[error("unknown architecture {name:?}; known: {}", list(FAMILIES.iter().map(|f| f.arch)))]
    UnknownArch {
        /// As asked.
        name: String,
    },
    /// No weight type of this name.
    #[error("unknown weight type {name:?}; known: {}", list(type_names()))]
    UnknownType {
        /// As asked.
        name: String,
    },
    /// A real model's shape in another model's architecture.
    #[error("shape {shape} is of architecture {own}, not {asked}")]
    ShapeIsOf {
        /// The shape.
        shape: &'static str,
        /// Its architecture.
        own: &'static str,
        /// As asked.
        asked: String,
    },
    /// An lm_head of its own in a family that has none.
    #[error("llama.cpp's {arch} takes its lm_head from the token embedding only")]
    OnlyTied {
        /// The family.
        arch: &'static str,
    },
    /// A tied lm_head in a family whose loader wants `output.weight`.
    #[error("llama.cpp's {arch} has an lm_head of its own")]
    OnlyOwnHead {
        /// The family.
        arch: &'static str,
    },
    /// A number below what a model needs.
    #[error("{what} {value} is too small, the least is {least}")]
    TooSmall {
        /// Which number.
        what: &'static str,
        /// As asked.
        value: u32,
        /// What would do.
        least: u32,
    },
    /// Not enough room on the disk.
    #[error("need {}, have {} in {}", gib(*.need), gib(*.have), folder.display())]
    Space {
        /// Bytes of the file.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        folder: PathBuf,
    },
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Explained for Error {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Error::ShapeIsOf { .. } => "leave the architecture out, or take tiny, demo or small".into(),
            Error::OnlyTied { .. } => "leave it tied".into(),
            Error::OnlyOwnHead { .. } => "leave it untied".into(),
            Error::Space { .. } => "name another folder".into(),
            Error::Write(e) => return e.hint(),
            _ => return None,
        })
    }

    fn is_misuse(&self) -> bool {
        !matches!(self, Self::Write(_) | Self::Space { .. })
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
