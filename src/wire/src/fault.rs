//! A fault as one side tells it to the other, and why a side says goodbye: what ends a connection with words.

use crate::codec::{Malformed, Reader, Writer};
use crate::layout::{MAX_TEXT, NONE};

/// Codes of ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ErrorCode {
    /// A message that cannot be read.
    Malformed = 1,
    /// A message that is not allowed.
    Unexpected = 2,
    /// A session or position that does not fit.
    Position = 3,
    /// A step that breaks a rule.
    Step = 4,
    /// Values that are not finite.
    NonFinite = 5,
    /// Values too large for the row format.
    Overflow = 6,
    /// The engine failed.
    Compute = 7,
    /// Out of memory.
    NoMemory = 8,
    /// Too hot.
    TooHot = 9,
    /// The stage failed its own test.
    SelfTest = 10,
    /// Anything else, and every code this software does not know.
    Internal = 11,
    /// The peer took too long.
    Deadline = 12,
    /// The peer's key was taken away.
    Revoked = 13,
}

impl ErrorCode {
    /// It is said of the values of one step: the stage is as good as before for everybody else's.
    pub fn is_of_values(self) -> bool {
        matches!(self, ErrorCode::NonFinite | ErrorCode::Overflow)
    }

    /// The code for a number; unknown ones are [`Internal`](ErrorCode::Internal).
    pub fn from_u16(code: u16) -> ErrorCode {
        use ErrorCode::*;
        [
            Malformed, Unexpected, Position, Step, NonFinite, Overflow, Compute, NoMemory, TooHot, SelfTest,
            Internal, Deadline, Revoked,
        ]
        .into_iter()
        .find(|&c| c as u16 == code)
        .unwrap_or(Internal)
    }
}

/// A fault as one side tells it to the other. It is the last thing that side says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Fault {
    /// What kind of fault.
    pub code: ErrorCode,
    /// The step it is about.
    pub step: Option<u32>,
    /// The session it is about.
    pub session: Option<u32>,
    /// The block in which it was seen.
    pub block: Option<u32>,
    /// How many values were not finite or too large.
    pub count: u32,
    /// A sentence for the user.
    pub text: String,
}

impl Fault {
    /// A fault that is about no step, session or block.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Fault {
        Fault { code, step: None, session: None, block: None, count: 0, text: text.into() }
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self.code {
            ErrorCode::NonFinite | ErrorCode::Overflow => Some("try F32 rows"),
            ErrorCode::NoMemory => {
                Some("it is out of memory: close other apps there, or take a smaller context or fewer blocks")
            }
            ErrorCode::TooHot => Some("take it out of its case and off the charger"),
            ErrorCode::SelfTest => {
                Some("it computes wrong values with this slice: cut it anew with dim-split and push it again")
            }
            ErrorCode::Revoked => Some("pair them again"),
            _ => None,
        }
    }

    fn sentence(&self) -> String {
        let place = self.block.map(|b| format!("block {b}: ")).unwrap_or_default();
        match self.hint() {
            Some(hint) => format!("{place}{}; {hint}", self.text),
            None => format!("{place}{}", self.text),
        }
    }

    /// What stands behind ERROR's header; `code` stands in it.
    pub(crate) fn decode(r: &mut Reader<'_>, code: u16) -> Result<Fault, Malformed> {
        Ok(Fault {
            code: ErrorCode::from_u16(code),
            step: Some(r.u32()?).filter(|&s| s != 0),
            session: Some(r.u32()?).filter(|&s| s != NONE),
            block: Some(r.u32()?).filter(|&b| b != NONE),
            count: r.u32()?,
            text: r.string(MAX_TEXT)?,
        })
    }

    pub(crate) fn encode(&self, w: &mut Writer<'_>) {
        w.u32(self.step.unwrap_or(0)).u32(self.session.unwrap_or(NONE));
        w.u32(self.block.unwrap_or(NONE)).u32(self.count).string(&self.text, MAX_TEXT);
    }
}

/// Why a side says goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Farewell {
    /// It is finished.
    Finished = 0,
    /// It shuts down.
    ShuttingDown = 1,
    /// The phone is locked or the app left the foreground.
    Pausing = 2,
    /// The same host opened a newer connection.
    Replaced = 3,
}

impl Farewell {
    pub(crate) fn from_u16(why: u16) -> Result<Farewell, Malformed> {
        match why {
            0 => Ok(Farewell::Finished),
            1 => Ok(Farewell::ShuttingDown),
            2 => Ok(Farewell::Pausing),
            3 => Ok(Farewell::Replaced),
            _ => Err(Malformed::BadValue { field: "farewell", value: why.into() }),
        }
    }
}

/// As it follows a peer's name.
impl std::fmt::Display for Farewell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Farewell::Finished => "has finished and closed the connection",
            Farewell::ShuttingDown => "is shutting down",
            Farewell::Pausing => "is paused; unlock the phone and bring the app to the front",
            Farewell::Replaced => "has a newer connection with this host",
        })
    }
}
