//! STEP_FAILED: the answer to a step of which there are no rows.

use crate::codec::{Malformed, Reader, Writer};
use crate::fault::{ErrorCode, Fault};

/// Why a step was not evaluated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepFailed {
    /// Its number.
    pub step: u32,
    /// What went wrong with it, of which the step is this one; `None`: it was called off, or stands on one that was or
    /// that failed.
    pub fault: Option<Fault>,
}

/// `a`: it failed, it was called off.
const FAILED: u8 = 0;
const VOID: u8 = 1;

impl StepFailed {
    /// What stands behind the header; `a` and `b` stand in it.
    pub(super) fn decode(r: &mut Reader<'_>, a: u8, b: u16) -> Result<StepFailed, Malformed> {
        let fault = Fault::decode(r, b)?;
        let step = fault.step.unwrap_or(0);
        match a {
            FAILED => Ok(StepFailed { step, fault: Some(fault) }),
            // nothing more is said of one that was called off
            VOID if b == 0 && fault == StepFailed::void(step) => Ok(StepFailed { step, fault: None }),
            VOID => Err(Malformed::ReservedNotZero),
            other => Err(Malformed::BadValue { field: "step failed", value: other.into() }),
        }
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        match &self.fault {
            Some(fault) => Fault { step: Some(self.step), ..fault.clone() }.encode(w),
            None => StepFailed::void(self.step).encode(w),
        }
    }

    pub(super) fn header_fields(&self) -> (u8, u16) {
        match &self.fault {
            Some(fault) => (FAILED, fault.code as u16),
            None => (VOID, 0),
        }
    }

    fn void(step: u32) -> Fault {
        Fault { step: Some(step).filter(|&step| step != 0), ..Fault::new(ErrorCode::Internal, "") }
    }
}
