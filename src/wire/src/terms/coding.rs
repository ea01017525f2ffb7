//! Terms as bytes: PROTOCOL.md, section 5.1.

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::rows::{Layout, Part, PartType};
use dim_core::stage::TakeBack;

use super::machine::{Engine, Machine, Measured, Unit};
use super::{SliceRole, Terms};
use crate::codec::{Malformed, Reader, Writer};
use crate::layout::{MAX_ARCH, MAX_NAME, MAX_PARTS, NONE};
use crate::rows::{RowTypes, Shape};

impl Terms {
    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Terms, Malformed> {
        let version = r.u16()?;
        let row_types = RowTypes::from_bits(r.u8()?)?;
        let role = SliceRole::from_u8(r.u8()?)?;
        let (features, instance) = (r.u32()?, r.u64()?);
        let n_blocks = r.u32()?;
        let blocks = BlockRange { first: r.u32()?, last: r.u32()? };
        let (n_ctx, max_rows, max_sessions, max_in_flight) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let take_back = TakeBack(r.u32()?);
        let (engine, unit) = (Engine::from_u8(r.u8()?)?, Unit::from_u8(r.u8()?)?);
        // the interval of ticks, to come
        r.zeros(2)?;
        let budget_mib = Some(r.u32()?).filter(|&mib| mib != NONE);
        let measured = Measured { rows: r.u32()?, us: r.u32()? };
        let [model, slice, params, input, output] =
            [digest(r)?, digest(r)?, digest(r)?, digest(r)?, digest(r)?];
        let shape = shape(r)?;
        let arch = r.string(MAX_ARCH)?;
        let (software, name) = (r.string(MAX_NAME)?, r.string(MAX_NAME)?);
        // the next hop, to come: an empty string
        r.zeros(2)?;
        Ok(Terms {
            version,
            row_types,
            role,
            features,
            instance,
            n_blocks,
            blocks,
            shape,
            input,
            output,
            n_ctx,
            max_rows,
            max_sessions,
            max_in_flight,
            take_back,
            machine: Machine { engine, unit, budget_mib, measured },
            model,
            slice,
            params,
            arch,
            software,
            name,
        })
    }

    pub(crate) fn encode(&self, w: &mut Writer<'_>) {
        w.u16(self.version).u8(self.row_types.bits()).u8(self.role as u8);
        w.u32(self.features).u64(self.instance);
        w.u32(self.n_blocks).u32(self.blocks.first).u32(self.blocks.last);
        w.u32(self.n_ctx).u32(self.max_rows).u32(self.max_sessions).u32(self.max_in_flight);
        w.u32(self.take_back.0);
        let Machine { engine, unit, budget_mib, measured } = self.machine;
        w.u8(engine as u8).u8(unit as u8).zeros(2).u32(budget_mib.unwrap_or(NONE));
        w.u32(measured.rows).u32(measured.us);
        for digest in [self.model, self.slice, self.params, self.input, self.output] {
            w.bytes(&digest.map_or(UNKNOWN, |sha| sha.0));
        }
        let (input, output) = (parts_of(&self.shape.input), parts_of(&self.shape.output));
        w.u8(u8::from(self.shape.reads_tokens)).u8(count(input)).u8(count(output)).zeros(5);
        for part in input.iter().chain(output) {
            w.u8(number(part.part_type)).u8(u8::from(part.may_round)).zeros(2).u32(part.values);
        }
        w.string(&self.arch, MAX_ARCH).string(&self.software, MAX_NAME).string(&self.name, MAX_NAME).zeros(2);
    }
}

impl SliceRole {
    fn from_u8(role: u8) -> Result<SliceRole, Malformed> {
        match role {
            0 => Ok(SliceRole::None),
            1 => Ok(SliceRole::Head),
            2 => Ok(SliceRole::Middle),
            3 => Ok(SliceRole::Tail),
            other => Err(Malformed::BadValue { field: "role", value: other.into() }),
        }
    }
}

/// A layout of more parts than can be said is said to be empty, which nobody agrees to.
fn parts_of(layout: &Layout) -> &[Part] {
    if layout.parts.len() > MAX_PARTS { &[] } else { &layout.parts }
}

fn count(parts: &[Part]) -> u8 {
    u8::try_from(parts.len()).unwrap_or(0)
}

fn shape(r: &mut Reader<'_>) -> Result<Shape, Malformed> {
    let reads_tokens = match r.u8()? {
        0 => false,
        1 => true,
        other => return Err(Malformed::BadValue { field: "token ids", value: other.into() }),
    };
    let counts = [r.u8()?, r.u8()?];
    r.zeros(5)?;
    let mut layout = |count: u8| -> Result<Layout, Malformed> {
        if usize::from(count) > MAX_PARTS {
            return Err(Malformed::BadValue { field: "parts of a row", value: count.into() });
        }
        Ok(Layout { parts: (0..count).map(|_| part(r)).collect::<Result<_, _>>()? })
    };
    Ok(Shape { input: layout(counts[0])?, output: layout(counts[1])?, reads_tokens })
}

fn part(r: &mut Reader<'_>) -> Result<Part, Malformed> {
    let (number, flags) = (r.u8()?, r.u8()?);
    r.zeros(2)?;
    let values = r.u32()?;
    let part_type = match number {
        1 => PartType::F16,
        2 => PartType::F32,
        3 => PartType::I32,
        other => return Err(Malformed::BadValue { field: "part type", value: other.into() }),
    };
    let may_round = match flags {
        0 => false,
        1 if part_type == PartType::F32 => true,
        other => return Err(Malformed::BadValue { field: "part flags", value: other.into() }),
    };
    if values == 0 || (part_type == PartType::F16 && values % 2 != 0) {
        return Err(Malformed::BadValue { field: "values of a part", value: values.into() });
    }
    Ok(Part { part_type, may_round, values })
}

fn number(part_type: PartType) -> u8 {
    match part_type {
        PartType::F16 => 1,
        PartType::F32 => 2,
        PartType::I32 => 3,
    }
}

const UNKNOWN: [u8; 32] = [0; 32];

fn digest(r: &mut Reader<'_>) -> Result<Option<Sha>, Malformed> {
    Ok(Some(r.array()?).filter(|&bytes| bytes != UNKNOWN).map(Sha))
}
