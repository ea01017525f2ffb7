//! What a slot tells, in the words of whoever asked.
//!
//! ```text
//!            .-> choices: /v1/chat/completions, /v1/completions
//! updates --+
//!            '-> blocks: an answer as what it thinks, says and calls, one after the other --> messages: /v1/messages
//!                                                                                         '-> responses: /v1/responses
//! ```

mod blocks;
mod choices;
mod messages;
mod responses;

use std::time::{SystemTime, UNIX_EPOCH};

use dim::host::template::dialogue::Call;
use serde_json::Value;

use crate::error::ApiError;
use crate::work::Update;

pub(crate) use blocks::{InBlocks, Reply};
pub(crate) use choices::{Kind, Teller};
pub(crate) use messages::Messages;
pub(crate) use responses::Responses;

/// Tells a client of its reply, in the dialect that it speaks.
pub(crate) trait Tell: Send {
    /// Whether every choice is complete.
    fn is_complete(&self) -> bool;

    /// Takes an update in, for the whole reply.
    fn hear(&mut self, update: Update) -> Result<(), ApiError>;

    /// What a stream begins with, before anything is known of the reply.
    fn begin(&mut self, _out: &mut String) {}

    /// What a stream says while it has nothing to say, beside a comment; clients of some dialects wait for events.
    fn quiet(&self) -> &'static str {
        ""
    }

    /// An update as parts of a stream that has begun.
    fn chunks(&mut self, update: Update, out: &mut String);

    /// The whole reply.
    fn whole(&self) -> Value;
}

/// The model's own number of a call, or one that nothing else has, as the dialect begins it.
fn id_of(call: &Call, prefix: &str) -> String {
    match call.id.is_empty() {
        true => format!("{prefix}_{}", random_name()),
        false => call.id.clone(),
    }
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A name that nothing else has.
fn random_name() -> String {
    let mut bytes = [0; 12];
    // it need not be secret, and without the system's source it need not be new either
    let _ = getrandom::fill(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Which program it is.
pub(crate) const FINGERPRINT: &str = concat!("dim-", env!("CARGO_PKG_VERSION"));
