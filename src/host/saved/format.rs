//! The bytes of a saved session.
//!
//! | what | bytes |
//! |---|---|
//! | magic | `dimkept1` |
//! | steps, one behind the other | ids of rows that do not count, i32 each; for each worker its rows; for each stage of the host what it saved of the rows that count |
//! | index | 32 identity; u32 tokens, i32 each; u32 steps, of each: u32 rows, u32 rows that count, 32 SHA-256 of its bytes |
//! | end | 32 SHA-256 of magic and index; u32 bytes of the index; magic |
//!
//! All little endian. The index stands behind what it is of, so that steps are written as they are read out of the caches. Its
//! digest covers the digests of the steps, so every byte is covered; a file's length is what the index says, or it is not
//! whole. How large a step is follows from its rows and from what the host itself knows of rows and stages.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use dim_core::digest::Sha;
use dim_core::rows::{RowType, Rows};
use dim_core::saved::SavedStep;
use dim_wire::codec::Reader;
use dim_wire::rows::as_bytes;
use half::f16;

use super::{Belongs, SavedError};

const MAGIC: &[u8; 8] = b"dimkept1";
/// Digest of the index, its length, magic.
const END_BYTES: usize = 32 + 4 + MAGIC.len();
/// Of a step in the index.
const STEP_BYTES: usize = 4 + 4 + 32;

/// A step, as the index has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepIndex {
    /// Its rows.
    pub count: u32,
    /// Those that count.
    pub live: u32,
    sha256: Sha,
}

/// The index of a saved session: what is in it, and where.
#[derive(Clone, Debug)]
pub struct Saved {
    belongs: Arc<Belongs>,
    tokens: Vec<i32>,
    steps: Vec<StepIndex>,
}

impl Saved {
    /// Its tokens.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Its steps, which are of all its tokens.
    pub fn steps(&self) -> &[StepIndex] {
        &self.steps
    }

    pub(super) fn belongs(&self) -> &Belongs {
        &self.belongs
    }

    /// Whether it can be put back by a host that saves so.
    pub(crate) fn is_of(&self, belongs: &Belongs) -> bool {
        *self.belongs == *belongs
    }

    /// Reads an index that has to be of a host that saves so.
    pub(crate) fn read_of(
        from: &mut (impl Read + Seek),
        belongs: &Arc<Belongs>,
    ) -> Result<Saved, SavedError> {
        let length = from.seek(SeekFrom::End(0))?;
        from.seek(SeekFrom::Start(0))?;
        let mut magic = [0; MAGIC.len()];
        read(from, &mut magic, SavedError::NotSaved)?;
        if magic != *MAGIC {
            return Err(SavedError::NotSaved);
        }
        let cut = || SavedError::Damaged("its end is missing");
        let end_at = length.checked_sub(END_BYTES as u64).ok_or_else(cut)?;
        from.seek(SeekFrom::Start(end_at))?;
        let mut end = [0; END_BYTES];
        read(from, &mut end, cut())?;
        let mut reader = Reader::new(&end);
        let (sha256, n) = (reader.array().map_err(|_| cut())?, reader.u32().map_err(|_| cut())?);
        if reader.array().ok() != Some(*MAGIC) {
            return Err(cut());
        }
        // no more than the context has positions, and no more than the file
        let most = 32 + 8 + (4 + STEP_BYTES as u64) * u64::from(belongs.n_ctx);
        let index_at = end_at.checked_sub(u64::from(n)).filter(|_| u64::from(n) <= most).ok_or_else(cut)?;
        from.seek(SeekFrom::Start(index_at))?;
        let mut index = MAGIC.to_vec();
        index.resize(MAGIC.len() + n as usize, 0);
        read(from, &mut index[MAGIC.len()..], cut())?;
        if Sha::of(&index) != Sha(sha256) {
            return Err(SavedError::Damaged("its index was changed"));
        }
        let saved = Saved::of_index(&index[MAGIC.len()..], belongs)?;
        let mut steps = saved.steps.iter().map(|step| saved.step_bytes(step));
        let all = steps.try_fold(MAGIC.len() as u64, |sum, step| sum.checked_add(step? as u64));
        match all == Some(index_at) {
            true => Ok(saved),
            false => Err(SavedError::Damaged("its length is another one")),
        }
    }

    /// `index` has the right digest; who has written it may be anybody.
    fn of_index(index: &[u8], belongs: &Arc<Belongs>) -> Result<Saved, SavedError> {
        const WRONG: SavedError = SavedError::Damaged("its index says what cannot be");
        let wrong = |_| WRONG;
        let mut reader = Reader::new(index);
        if Sha(reader.array().map_err(wrong)?) != belongs.identity {
            return Err(SavedError::OtherHost);
        }
        let n_tokens = reader.u32().map_err(wrong)? as usize;
        let tokens = reader.bytes(n_tokens.saturating_mul(4)).map_err(wrong)?;
        let tokens: Vec<i32> = tokens.as_chunks().0.iter().map(|id| i32::from_le_bytes(*id)).collect();
        let n_steps = reader.u32().map_err(wrong)? as usize;
        if n_steps > reader.remaining() / STEP_BYTES {
            return Err(WRONG);
        }
        let (mut steps, mut sum) = (Vec::with_capacity(n_steps), 0u64);
        for _ in 0..n_steps {
            let (count, live) = (reader.u32().map_err(wrong)?, reader.u32().map_err(wrong)?);
            let sha256 = Sha(reader.array().map_err(wrong)?);
            if !(1..=count).contains(&live) || count > belongs.n_ubatch {
                return Err(WRONG);
            }
            sum += u64::from(live);
            steps.push(StepIndex { count, live, sha256 });
        }
        let is_whole = reader.finish().is_ok() && sum == n_tokens as u64 && sum <= u64::from(belongs.n_ctx);
        match is_whole {
            true => Ok(Saved { belongs: Arc::clone(belongs), tokens, steps }),
            false => Err(WRONG),
        }
    }

    fn step_bytes(&self, step: &StepIndex) -> Option<usize> {
        let (count, live) = (step.count as usize, step.live as usize);
        let rows = self.belongs.row_bytes.iter().try_fold(0usize, |sum, row| sum.checked_add(*row))?;
        let state = self.belongs.state_bytes.iter().try_fold(0usize, |sum, row| sum.checked_add(*row))?;
        let dead = (count - live) * 4;
        dead.checked_add(rows.checked_mul(count)?)?.checked_add(state.checked_mul(live)?)
    }

    /// The first `n` steps, as they are read and found to be whole.
    pub(crate) fn read_steps<'a>(
        &'a self,
        from: &'a mut (impl Read + Seek),
        n: usize,
    ) -> Result<impl Iterator<Item = Result<SavedStep, SavedError>>, SavedError> {
        from.seek(SeekFrom::Start(MAGIC.len() as u64))?;
        let mut position = 0usize;
        Ok(self.steps.iter().take(n).map(move |step| {
            let read = self.read_step(from, step, position);
            position += step.live as usize;
            read
        }))
    }

    fn read_step(
        &self,
        from: &mut impl Read,
        step: &StepIndex,
        position: usize,
    ) -> Result<SavedStep, SavedError> {
        let cut = || SavedError::Damaged("a step of it is missing");
        let mut bytes = vec![0; self.step_bytes(step).ok_or_else(cut)?];
        read(from, &mut bytes, cut())?;
        if Sha::of(&bytes) != step.sha256 {
            return Err(SavedError::Damaged("a step of it was changed"));
        }
        let (count, live) = (step.count as usize, step.live as usize);
        let mut reader = Reader::new(&bytes);
        let dead = reader.bytes((count - live) * 4).map_err(|_| cut())?;
        let mut tokens = self.tokens[position..position + live].to_vec();
        tokens.extend(dead.as_chunks().0.iter().map(|id| i32::from_le_bytes(*id)));
        let (mut rows, mut states) = (Vec::new(), Vec::new());
        for row in &self.belongs.row_bytes {
            rows.push(rows_of(self.belongs.row_type, reader.bytes(row * count).map_err(|_| cut())?));
        }
        for state in &self.belongs.state_bytes {
            states.push(reader.bytes(state * live).map_err(|_| cut())?.to_vec());
        }
        let position = u32::try_from(position).map_err(|_| cut())?;
        Ok(SavedStep { position, tokens, live: step.live, rows, states })
    }
}

/// Fills `bytes`; where there are not as many, that is `cut`.
fn read(from: &mut impl Read, bytes: &mut [u8], cut: SavedError) -> Result<(), SavedError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => cut,
        _ => error.into(),
    })
}

fn rows_of(row_type: RowType, bytes: &[u8]) -> Rows {
    match row_type {
        RowType::F16 => Rows::F16(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect()),
        RowType::F32 => Rows::F32(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
    }
}

/// Writes a session's steps, and then their index.
pub(crate) struct StepWriter<W> {
    out: W,
    saved: Saved,
}

impl<W: Write> StepWriter<W> {
    pub(crate) fn new(mut out: W, belongs: &Arc<Belongs>) -> io::Result<StepWriter<W>> {
        out.write_all(MAGIC)?;
        let saved = Saved { belongs: Arc::clone(belongs), tokens: Vec::new(), steps: Vec::new() };
        Ok(StepWriter { out, saved })
    }

    /// The next one; what it is made of has the sizes that the host saves.
    pub(crate) fn step(&mut self, step: &SavedStep) -> io::Result<()> {
        let (live, dead) = step.tokens.split_at(step.live as usize);
        let mut bytes: Vec<u8> = dead.iter().flat_map(|id| id.to_le_bytes()).collect();
        step.rows.iter().for_each(|rows| bytes.extend_from_slice(as_bytes(rows.as_ref())));
        step.states.iter().for_each(|state| bytes.extend_from_slice(state));
        let index = StepIndex { count: step.count(), live: step.live, sha256: Sha::of(&bytes) };
        if self.saved.step_bytes(&index) != Some(bytes.len()) {
            return Err(io::Error::other("a stage saves another number of bytes than it says"));
        }
        self.saved.tokens.extend_from_slice(live);
        self.saved.steps.push(index);
        self.out.write_all(&bytes)
    }

    /// Behind the last one.
    pub(crate) fn finish(mut self) -> io::Result<Saved> {
        let u32_of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let Saved { belongs, tokens, steps } = &self.saved;
        let mut index = MAGIC.to_vec();
        index.extend_from_slice(&belongs.identity.0);
        index.extend_from_slice(&u32_of(tokens.len()));
        index.extend(tokens.iter().flat_map(|id| id.to_le_bytes()));
        index.extend_from_slice(&u32_of(steps.len()));
        for step in steps {
            index.extend_from_slice(&step.count.to_le_bytes());
            index.extend_from_slice(&step.live.to_le_bytes());
            index.extend_from_slice(&step.sha256.0);
        }
        let sha256 = Sha::of(&index);
        let index = &index[MAGIC.len()..];
        self.out.write_all(index)?;
        self.out.write_all(&sha256.0)?;
        self.out.write_all(&u32_of(index.len()))?;
        self.out.write_all(MAGIC)?;
        self.out.flush()?;
        Ok(self.saved)
    }
}
