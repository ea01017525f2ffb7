//! What a worker computes with, as it says in its terms: for people, and for who plans. Nothing of it is agreed on.

use crate::codec::Malformed;

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Engine {
    /// It does not say.
    #[default]
    Unknown = 0,
    /// llama.cpp.
    LlamaCpp = 1,
    /// Core ML.
    CoreMl = 2,
}

/// On what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Unit {
    /// It does not say.
    #[default]
    Unknown = 0,
    /// The processor's cores.
    Cpu = 1,
    /// A graphics processor.
    Gpu = 2,
    /// A neural engine.
    Npu = 3,
}

/// How long rows took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Rows of a step; 0: nothing was measured.
    pub rows: u32,
    /// How long that step took on all blocks of the slice, microseconds.
    pub us: u32,
}

/// What a worker computes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// What computes.
    pub engine: Engine,
    /// On what.
    pub unit: Unit,
    /// Memory that it offers for slices and their caches, MiB; what it serves already is in it.
    pub budget_mib: Option<u32>,
    /// How fast it is.
    pub measured: Measured,
}

impl Engine {
    pub(super) fn from_u8(engine: u8) -> Result<Engine, Malformed> {
        match engine {
            0 => Ok(Engine::Unknown),
            1 => Ok(Engine::LlamaCpp),
            2 => Ok(Engine::CoreMl),
            other => Err(Malformed::BadValue { field: "engine", value: other.into() }),
        }
    }
}

impl Unit {
    pub(super) fn from_u8(unit: u8) -> Result<Unit, Malformed> {
        match unit {
            0 => Ok(Unit::Unknown),
            1 => Ok(Unit::Cpu),
            2 => Ok(Unit::Gpu),
            3 => Ok(Unit::Npu),
            other => Err(Malformed::BadValue { field: "unit", value: other.into() }),
        }
    }
}
