//! One line of JSON per arm and round: all that is needed to judge a figure, and to make every table and plot again.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::energy::Energy;
use crate::link::{LinkOptions, LinkTraffic};
use crate::machine::{Machine, SystemActivity, Versions};
use crate::usage::Usage;
use dim::host::report::Report;

/// The version of this format. A reader refuses a newer one.
pub const SCHEMA: u32 = 1;

/// One arm in one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// When it ended, in UTC.
    pub date: String,
    /// Which arm.
    pub arm: Arm,
    /// 0 is the first load.
    pub round: u32,
    /// What was measured.
    pub phase: Phase,
    /// Why it does not count; `None`: it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_counted: Option<String>,
    /// What all arms of this run had in common.
    pub scenario: Scenario,
    /// The model file of this arm and its size.
    pub model: ModelFile,
    /// The command of the host process, files by their names alone.
    pub command: Vec<String>,
    /// What the host process said; `None` when it said nothing that could be read.
    pub report: Option<Report>,
    /// What the host process used.
    pub host: Usage,
    /// Most memory of the host's group, page cache included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_group_peak_bytes: Option<u64>,
    /// What each worker of this machine used meanwhile; peaks since its start.
    pub workers: Vec<Usage>,
    /// What went over the emulated link, handshakes and weights included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_traffic: Option<LinkTraffic>,
    /// What the system did meanwhile.
    pub system: SystemActivity,
    /// Energy of the whole machine meanwhile, where it tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<Energy>,
    /// Whether the page cache was emptied of this arm's files before.
    pub cold_cache: bool,
    /// The machine.
    pub machine: Machine,
    /// What was run.
    pub versions: Versions,
}

/// The arms there are.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The model cut over the host and the workers.
    Split,
    /// Stock llama.cpp alone with the same file and the same limits, mapped as people run it.
    Solo,
    /// The same without the memory limit: the ceiling.
    SoloUnlimited,
    /// Stock llama.cpp with its RPC backend: as many blocks on the worker, the last ones, which suits it best.
    Rpc,
    /// Stock llama.cpp alone on the model as Q8_0.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Stock llama.cpp alone on the model as Q4_K_M.
    #[value(name = "q4_k_m")]
    #[serde(rename = "q4_k_m")]
    Q4KM,
}

/// What was measured in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The first load, with a cold cache: time from the start of the process to the first token.
    First,
    /// After the process has evaluated the prompt once, unmeasured: speeds.
    Steady,
}

/// What all arms of a run have in common. Two runs with the same scenario are one table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// The model's name.
    pub model: String,
    /// Blocks of the middles, inclusive: `11..16`, or `8..11 12..15`.
    pub middle: String,
    /// How many blocks are not on the host.
    pub remote_blocks: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate.
    pub n_predict: usize,
    /// Positions of the context.
    pub n_ctx: u32,
    /// Threads of each process.
    pub threads: u32,
    /// Number format between the stages.
    pub wire: String,
    /// The host's memory limit.
    pub memory_limit_bytes: Option<u64>,
    /// Each worker's memory limit.
    pub worker_memory_limit_bytes: Option<u64>,
    /// The emulated link; `None`: whatever is there.
    pub link: Option<LinkOptions>,
    /// The host's cores; empty: all.
    pub host_cpus: Vec<usize>,
    /// The workers' cores; empty: all.
    pub worker_cpus: Vec<usize>,
    /// Whether the workers run on this machine.
    pub local_workers: bool,
}

/// A model file by its name and size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// The file's name.
    pub name: String,
    /// Bytes of all files that the host process of this arm reads.
    pub bytes: u64,
}

impl Arm {
    /// As it is written on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Arm::Split => "split",
            Arm::Solo => "solo",
            Arm::SoloUnlimited => "solo-unlimited",
            Arm::Rpc => "rpc",
            Arm::Q8_0 => "q8_0",
            Arm::Q4KM => "q4_k_m",
        }
    }

    /// As a table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Arm::Split => "split",
            Arm::Solo => "solo",
            Arm::SoloUnlimited => "solo, no limit",
            Arm::Rpc => "llama.cpp RPC",
            Arm::Q8_0 => "solo Q8_0",
            Arm::Q4KM => "solo Q4_K_M",
        }
    }

    /// Whether it computes the very model that was given, so that its tokens can be compared with stock's.
    pub fn computes_the_model(self) -> bool {
        !matches!(self, Arm::Q8_0 | Arm::Q4KM)
    }
}

impl Record {
    /// Whether its figures count.
    pub fn counts(&self) -> bool {
        self.not_counted.is_none() && self.report.is_some()
    }
}

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file could not be read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// Which.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A line is no record.
    #[error("{file}, line {line}: {source}")]
    NotARecord {
        /// Which file.
        file: String,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line of a later version.
    #[error("{file}, line {line}: format {schema}, this program reads up to {SCHEMA}")]
    Newer {
        /// Which file.
        file: String,
        /// Which line, from 1.
        line: usize,
        /// Its format.
        schema: u32,
    },
}

/// Adds a record to a file, whole or not at all, and waits until it is on the disk: a run of hours may be cut short.
pub fn append(file: &Path, record: &Record) -> io::Result<()> {
    let mut line = serde_json::to_string(record)?;
    line.push('\n');
    let mut file = OpenOptions::new().create(true).append(true).open(file)?;
    file.write_all(line.as_bytes())?;
    file.sync_data()
}

/// The records of a file in their order. A last line without an end (a run that was cut short) is left out.
pub fn read(file: &Path) -> Result<Vec<Record>, RecordError> {
    let name = || file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|source| RecordError::Io { file: name(), source })?;
    let mut records = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        if !line.ends_with('\n') || line.trim().is_empty() {
            continue;
        }
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        let not_a_record = |source| RecordError::NotARecord { file: name(), line: i + 1, source };
        let head: Head = serde_json::from_str(line).map_err(not_a_record)?;
        if head.schema > SCHEMA {
            return Err(RecordError::Newer { file: name(), line: i + 1, schema: head.schema });
        }
        records.push(serde_json::from_str(line).map_err(not_a_record)?);
    }
    Ok(records)
}
