//! How a device is: what HEARTBEAT carries.

use crate::codec::{Malformed, Reader, Writer};
use crate::layout::NONE;

/// How a device is, sent with every heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it is doing.
    pub activity: Activity,
    /// How hot it is.
    pub temperature: Temperature,
    /// Battery in per cent.
    pub battery_percent: Option<u8>,
    /// Memory it may still take, in MiB.
    pub free_mib: Option<u32>,
    /// The last step it finished, 0: none.
    pub step: u32,
    /// In how many seconds it expects to pause, if it knows: it grows hot, or is about to be locked.
    pub pause_in_s: Option<u16>,
}

impl Default for Status {
    fn default() -> Status {
        Status {
            activity: Activity::Idle,
            temperature: Temperature::Unknown,
            battery_percent: None,
            free_mib: None,
            step: 0,
            pause_in_s: None,
        }
    }
}

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Activity {
    Idle = 0,
    Computing = 1,
    Loading = 2,
    AboutToPause = 3,
}

/// How hot a device is, in the words of Apple's `ProcessInfo.ThermalState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Temperature {
    Unknown = 0,
    Nominal = 1,
    Fair = 2,
    Serious = 3,
    Critical = 4,
}

impl Status {
    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Status, Malformed> {
        let bad = |field, value: u8| Malformed::BadValue { field, value: value.into() };
        let activity = match r.u8()? {
            0 => Activity::Idle,
            1 => Activity::Computing,
            2 => Activity::Loading,
            3 => Activity::AboutToPause,
            other => return Err(bad("state", other)),
        };
        let temperature = match r.u8()? {
            0 => Temperature::Unknown,
            1 => Temperature::Nominal,
            2 => Temperature::Fair,
            3 => Temperature::Serious,
            4 => Temperature::Critical,
            other => return Err(bad("temperature", other)),
        };
        let battery_percent = match r.u8()? {
            255 => None,
            percent @ 0..=100 => Some(percent),
            other => return Err(bad("battery", other)),
        };
        r.zeros(1)?;
        let free_mib = Some(r.u32()?).filter(|&m| m != NONE);
        let step = r.u32()?;
        let pause_in_s = Some(r.u16()?).filter(|&s| s != u16::MAX);
        r.zeros(2)?;
        Ok(Status { activity, temperature, battery_percent, free_mib, step, pause_in_s })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u8(self.activity as u8).u8(self.temperature as u8);
        w.u8(self.battery_percent.unwrap_or(255)).zeros(1);
        w.u32(self.free_mib.unwrap_or(NONE)).u32(self.step);
        w.u16(self.pause_in_s.unwrap_or(u16::MAX)).zeros(2);
    }
}
