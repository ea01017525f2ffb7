//! The weight file of a package: MIL blob storage, version 2.
//!
//! Layout, all integers little-endian:
//!
//! ```text
//! header, 64 bytes    u32 number of blobs, u32 version = 2, zeros
//! per blob, at the next multiple of 64:
//!   record, 64 bytes  u32 0xDEADBEEF, u32 data type (1 = fp16), u64 bytes of data, u64 offset of data (= end of
//!                     this record), u64 padding bits = 0, 32 zero bytes
//!   data              row-major
//! ```
//!
//! A program names a blob by the offset of its record. Everything here is fp16, so every offset is known before the
//! first byte is read, and the file is written in one pass: a block's tensors are read in pieces of a few MiB,
//! turned into what the program wants, written, and hashed by a second thread. Per piece:
//!
//! - F16 rows as they are: no work per element.
//! - a range of columns (the parts of `ffn_down`): row by row.
//! - llama's q and k: GGUF stores the two halves that rope turns together as neighbouring rows (2i, 2i + 1); here
//!   they go back to i and i + head_dim / 2.
//! - BF16 and F32: rounded to fp16; a value outside its range is an error that names the tensor.
//! - quantised types: through ggml's own dequantiser, then as F32.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;

use dim_core::blocks::BlockRange;
use half::f16;
use half::slice::HalfFloatSliceExt;
use sha2::{Digest, Sha256};

use super::graph::{self, BlockWeights, FfnPart, Projection, Weight};
use super::shape::Shape;
use super::types::{check_type, to_f32};
use super::{Error, IoContext};
use crate::gguf::{Gguf, Tensor, TensorType};
use crate::os;
use crate::text::Shown;

/// Data type code of fp16 in a record.
const FP16: u32 = 1;
/// First word of a record.
const RECORD_MAGIC: u32 = 0xDEAD_BEEF;
/// Version of the storage format.
const STORAGE_VERSION: u32 = 2;
/// Bytes of the header and of a record; what records are aligned to.
const UNIT: u64 = 64;
/// Bytes of one piece, about. With [`PIECES`] of them in flight this bounds the memory of a conversion.
const PIECE_BYTES: u64 = 4 << 20;
/// Pieces between the reading and the hashing thread.
const PIECES: usize = 4;

/// How often the file is flushed while it is written.
const FLUSH_BYTES: u64 = 64 << 20;

/// Order of a projection's rows in the file, against GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// As in GGUF.
    AsIs,
    /// Per head of this width: GGUF's rows 2i and 2i + 1 go to i and i + width / 2.
    PairsToHalves {
        /// Rows of a head.
        head_dim: u64,
    },
}

/// One blob and where it comes from: a rectangle of a tensor of the model.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The tensor's name in the model.
    pub tensor: String,
    /// Rows of the tensor it holds. A vector is one row.
    pub rows: Range<u64>,
    /// Columns of the tensor it holds.
    pub cols: Range<u64>,
    /// Their order.
    pub order: Rows,
    /// What values are multiplied by: a power of two, 1 but for two biases under a residual scale.
    pub scale: f32,
    /// Shape in the program.
    pub dims: Vec<u64>,
    /// Offset of its record in the file.
    pub record: u64,
}

impl Blob {
    /// Offset of its data in the file.
    pub fn data_offset(&self) -> u64 {
        self.record + UNIT
    }

    /// Bytes of its data.
    pub fn n_bytes(&self) -> u64 {
        2 * (self.rows.end - self.rows.start) * (self.cols.end - self.cols.start)
    }
}

/// The weight file of one package, before it is written.
#[derive(Clone, Debug)]
pub struct WeightPlan {
    /// Numbers of the blocks.
    pub blocks: BlockRange,
    /// In file order.
    pub blobs: Vec<Blob>,
    /// Where each block's weights lie.
    pub weights: Vec<BlockWeights>,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl WeightPlan {
    /// Lays out the weights of `blocks`, which [`Shape::check_block`] has accepted.
    pub fn new(gguf: &Gguf, shape: &Shape, blocks: BlockRange, residual_scale: f32) -> WeightPlan {
        let mut plan = Planner { gguf, shape, residual_scale, blobs: Vec::new(), end: UNIT };
        let weights = blocks.as_range().map(|block| plan.block(block)).collect();
        WeightPlan { blocks, blobs: plan.blobs, weights, file_bytes: plan.end }
    }

    /// Writes the file and gives its SHA-256. `progress` is told the bytes written since it was last called.
    ///
    /// # Errors
    /// Reading or writing fails, a value does not fit fp16, a type cannot be read here.
    pub fn write(&self, gguf: &Gguf, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], Error> {
        let file = &OpenOptions::new().read(true).write(true).create_new(true).open(path).at(path)?;
        std::thread::scope(|scope| {
            let (to_hash, pieces) = mpsc::sync_channel::<Piece>(PIECES);
            let (to_reuse, used) = mpsc::channel::<Vec<u8>>();
            let (to_flush, flushes) = mpsc::sync_channel::<()>(1);
            let hasher = scope.spawn(move || -> Result<[u8; 32], Error> {
                let (mut hash, mut copy) = (Sha256::new(), Vec::new());
                for piece in pieces {
                    match piece {
                        Piece::Written(bytes) => {
                            hash.update(&bytes);
                            let _ = to_reuse.send(bytes); // the writer may be gone already
                        }
                        Piece::Copied { at, n } => {
                            copy.resize(n, 0);
                            os::read_exact_at(file, &mut copy, at).at(path)?;
                            hash.update(&copy);
                        }
                    }
                }
                Ok(<[u8; 32]>::from(hash.finalize()))
            });
            // keeps the disk busy from the start, instead of all at once in the end
            let flusher = scope.spawn(move || flushes.iter().try_for_each(|()| file.sync_data()));
            let mut out = Output { file, path, to_hash, used, to_flush, at: 0, progress };
            let written = self.write_all(gguf, &mut out);
            drop(out); // ends both threads' work
            let hash = hasher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let flushed = flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written?;
            flushed.and_then(|()| file.sync_all()).at(path)?;
            hash
        })
    }

    fn write_all(&self, gguf: &Gguf, out: &mut Output<'_>) -> Result<(), Error> {
        let mut header = out.zeros(UNIT);
        header[0..4].copy_from_slice(&(self.blobs.len() as u32).to_le_bytes());
        header[4..8].copy_from_slice(&STORAGE_VERSION.to_le_bytes());
        out.write(header)?;
        for blob in &self.blobs {
            let mut record = out.zeros(blob.data_offset() - out.at); // padding of the blob before, and the record
            let at = record.len() - UNIT as usize;
            record[at..at + 4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
            record[at + 4..at + 8].copy_from_slice(&FP16.to_le_bytes());
            record[at + 8..at + 16].copy_from_slice(&blob.n_bytes().to_le_bytes());
            record[at + 16..at + 24].copy_from_slice(&blob.data_offset().to_le_bytes());
            out.write(record)?;
            let tensor =
                gguf.tensor(&blob.tensor).ok_or_else(|| Error::TensorMissing(blob.tensor.clone()))?;
            Source::new(tensor, blob)?.stream(out)?;
        }
        let padding = out.zeros(self.file_bytes - out.at);
        out.write(padding)
    }
}

/// Lays out blobs one after the other.
struct Planner<'a> {
    gguf: &'a Gguf,
    shape: &'a Shape,
    residual_scale: f32,
    blobs: Vec<Blob>,
    end: u64,
}

impl Planner<'_> {
    fn block(&mut self, block: u32) -> BlockWeights {
        let Shape { n_embd, n_head, n_head_kv, head_dim, n_ff, .. } = *self.shape;
        let name = |suffix: &str| format!("blk.{block}.{suffix}");
        let (q, kv) = (n_head * head_dim, n_head_kv * head_dim);
        let qk_order = if self.shape.paired_rows { Rows::PairsToHalves { head_dim } } else { Rows::AsIs };
        let residual_scale = self.residual_scale;

        let attn_norm = self.vector(name("attn_norm.weight"), 0..n_embd, &[1, 1, n_embd]);
        let q = self.projection(&name("attn_q"), 0..q, 0..n_embd, qk_order, 1.0);
        let k = self.projection(&name("attn_k"), 0..kv, 0..n_embd, qk_order, 1.0);
        let v = self.projection(&name("attn_v"), 0..kv, 0..n_embd, Rows::AsIs, 1.0);
        let qk_norm = self.shape.qk_norm.then(|| {
            let dims = [1, 1, 1, head_dim];
            (
                self.vector(name("attn_q_norm.weight"), 0..head_dim, &dims),
                self.vector(name("attn_k_norm.weight"), 0..head_dim, &dims),
            )
        });
        let o = self.projection(
            &name("attn_output"),
            0..n_embd,
            0..n_head * head_dim,
            Rows::AsIs,
            residual_scale,
        );
        let ffn_norm = self.vector(name("ffn_norm.weight"), 0..n_embd, &[1, 1, n_embd]);
        let parts = graph::ffn_parts(n_ff);
        let ffn = parts
            .into_iter()
            .enumerate()
            .map(|(i, part)| FfnPart {
                gate: self.projection(&name("ffn_gate"), part.clone(), 0..n_embd, Rows::AsIs, 1.0),
                up: self.projection(&name("ffn_up"), part.clone(), 0..n_embd, Rows::AsIs, 1.0),
                down: match i {
                    0 => self.projection(&name("ffn_down"), 0..n_embd, part, Rows::AsIs, residual_scale),
                    _ => Projection {
                        weight: self.matrix(name("ffn_down.weight"), 0..n_embd, part, Rows::AsIs),
                        bias: None,
                    },
                },
            })
            .collect();
        BlockWeights { block, attn_norm, q, k, v, qk_norm, o, ffn_norm, ffn }
    }

    fn projection(
        &mut self,
        name: &str,
        rows: Range<u64>,
        cols: Range<u64>,
        order: Rows,
        bias_scale: f32,
    ) -> Projection {
        let weight = self.matrix(format!("{name}.weight"), rows.clone(), cols, order);
        let bias = format!("{name}.bias");
        let bias = self.gguf.tensor(&bias).is_some().then(|| {
            let dims = [rows.end - rows.start];
            self.blob(Blob {
                tensor: bias,
                rows: 0..1,
                cols: rows,
                order,
                scale: bias_scale,
                dims: dims.into(),
                record: 0,
            })
        });
        Projection { weight, bias }
    }

    fn matrix(&mut self, tensor: String, rows: Range<u64>, cols: Range<u64>, order: Rows) -> Weight {
        let dims = vec![rows.end - rows.start, cols.end - cols.start, 1, 1];
        self.blob(Blob { tensor, rows, cols, order, scale: 1.0, dims, record: 0 })
    }

    fn vector(&mut self, tensor: String, cols: Range<u64>, dims: &[u64]) -> Weight {
        self.blob(Blob {
            tensor,
            rows: 0..1,
            cols,
            order: Rows::AsIs,
            scale: 1.0,
            dims: dims.into(),
            record: 0,
        })
    }

    fn blob(&mut self, mut blob: Blob) -> Weight {
        blob.record = self.end;
        self.end = (blob.data_offset() + blob.n_bytes()).next_multiple_of(UNIT);
        let weight = Weight { record: blob.record, dims: blob.dims.clone() };
        self.blobs.push(blob);
        weight
    }
}

/// What the hasher takes, in file order.
enum Piece {
    /// Bytes that were written.
    Written(Vec<u8>),
    /// Bytes that the system copied: read back, so that the hash is that of what was written.
    Copied { at: u64, n: usize },
}

/// The file being written, and the thread that hashes it.
struct Output<'a> {
    file: &'a File,
    path: &'a Path,
    to_hash: mpsc::SyncSender<Piece>,
    used: mpsc::Receiver<Vec<u8>>,
    to_flush: mpsc::SyncSender<()>,
    at: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Output<'_> {
    /// A buffer of this length, holding anything: the memory of a piece that is done with, if there is one.
    fn buffer(&mut self, len: u64) -> Vec<u8> {
        let mut buffer = self.used.try_recv().unwrap_or_default();
        buffer.resize(len as usize, 0);
        buffer
    }

    fn zeros(&mut self, len: u64) -> Vec<u8> {
        let mut buffer = self.buffer(len);
        buffer.fill(0);
        buffer
    }

    fn write(&mut self, piece: Vec<u8>) -> Result<(), Error> {
        self.file.write_all(&piece).at(self.path)?;
        self.advance(piece.len(), Piece::Written(piece));
        Ok(())
    }

    /// Copies up to `n` bytes of `from`, from byte `at` on, without a detour through this process. Gives how many: none
    /// where the system does not do that.
    fn copy(&mut self, from: &File, at: u64, n: u64) -> Result<u64, Error> {
        let copied = os::copy_range(from, at, self.file, n).at(self.path)?;
        if copied > 0 {
            self.advance(copied as usize, Piece::Copied { at: self.at, n: copied as usize });
        }
        Ok(copied)
    }

    /// `n` bytes more are in the file: `piece`.
    fn advance(&mut self, n: usize, piece: Piece) {
        let before = self.at / FLUSH_BYTES;
        self.at += n as u64;
        if self.at / FLUSH_BYTES != before {
            let _ = self.to_flush.try_send(()); // the one before may not be done yet
        }
        (self.progress)(n as u64);
        let _ = self.to_hash.send(piece); // a hasher that failed says so when it is waited for
    }
}

/// A blob's data on its way from the model.
struct Source<'a> {
    tensor: Tensor<'a>,
    blob: &'a Blob,
    row_len: u64, // values
    row_bytes: u64,
}

impl<'a> Source<'a> {
    fn new(tensor: Tensor<'a>, blob: &'a Blob) -> Result<Source<'a>, Error> {
        check_type(&tensor)?;
        Ok(Source { tensor, blob, row_len: tensor.dims()[0], row_bytes: tensor.row_bytes() })
    }

    fn stream(&self, out: &mut Output<'_>) -> Result<(), Error> {
        let blob = self.blob;
        let is_vector = self.tensor.dims().len() == 1;
        let straight = self.tensor.tensor_type() == TensorType::F16
            && blob.order == Rows::AsIs
            && !is_vector
            && blob.cols == (0..self.row_len);
        if straight {
            let mut at = blob.rows.start * self.row_bytes;
            let end = blob.rows.end * self.row_bytes;
            while at < end {
                if let Some(file) = self.tensor.source() {
                    let n = (end - at).min(PIECE_BYTES);
                    match out.copy(file, self.tensor.file_offset() + at, n)? {
                        0 => {} // this part then goes through memory
                        n => {
                            at += n;
                            continue;
                        }
                    }
                }
                let mut piece = out.buffer((end - at).min(PIECE_BYTES));
                self.tensor.read_at(at, &mut piece)?;
                at += piece.len() as u64;
                out.write(piece)?;
            }
            return Ok(());
        }
        // whole heads at a time where rows change places inside a head
        let unit = match blob.order {
            Rows::PairsToHalves { head_dim } if !is_vector => head_dim,
            _ => 1,
        };
        let out_row_bytes = 2 * (blob.cols.end - blob.cols.start);
        let rows_a_piece = (PIECE_BYTES / out_row_bytes / unit).max(1) * unit;
        let mut scratch = Scratch::default();
        let mut row = blob.rows.start;
        while row < blob.rows.end {
            let rows = row..(row + rows_a_piece).min(blob.rows.end);
            row = rows.end;
            let mut piece = out.buffer(out_row_bytes * (rows.end - rows.start));
            self.read_rows(rows, &mut piece, &mut scratch)?;
            if let Rows::PairsToHalves { head_dim } = blob.order {
                let element_bytes = if is_vector { 2 } else { out_row_bytes };
                pairs_to_halves(&mut piece, head_dim as usize, element_bytes as usize, &mut scratch.raw);
            }
            if is_vector {
                self.check_finite(&piece)?;
            }
            out.write(piece)?;
        }
        Ok(())
    }

    /// `rows`, the blob's columns of them, as fp16 in GGUF's order.
    fn read_rows(&self, rows: Range<u64>, piece: &mut [u8], scratch: &mut Scratch) -> Result<(), Error> {
        let cols = &self.blob.cols;
        let n_cols = cols.end - cols.start;
        let out_row_bytes = 2 * n_cols as usize;
        if self.tensor.tensor_type() == TensorType::F16 && self.blob.scale == 1.0 {
            if n_cols == self.row_len {
                return Ok(self.tensor.read_at(rows.start * self.row_bytes, piece)?);
            }
            for (row, out) in rows.zip(piece.chunks_exact_mut(out_row_bytes)) {
                self.tensor.read_at(row * self.row_bytes + 2 * cols.start, out)?;
            }
            return Ok(());
        }
        for (row, out) in rows.zip(piece.chunks_exact_mut(out_row_bytes)) {
            scratch.raw.resize(self.row_bytes as usize, 0);
            self.tensor.read_at(row * self.row_bytes, &mut scratch.raw)?;
            scratch.values.resize(self.row_len as usize, 0.0);
            to_f32(&self.tensor, &scratch.raw, &mut scratch.values)?;
            let values = &mut scratch.values[cols.start as usize..cols.end as usize];
            if self.blob.scale != 1.0 {
                values.iter_mut().for_each(|v| *v *= self.blob.scale);
            }
            self.check_range(values)?;
            scratch.halves.resize(values.len(), f16::ZERO);
            scratch.halves.convert_from_f32_slice(values);
            for (out, half) in out.chunks_exact_mut(2).zip(&scratch.halves) {
                out.copy_from_slice(&half.to_le_bytes());
            }
        }
        Ok(())
    }

    /// No value may be more than fp16 holds, or not a number.
    fn check_range(&self, values: &[f32]) -> Result<(), Error> {
        // the largest that still rounds to a finite fp16 is just below 65520
        let fits = |v: f32| v.abs() < 65520.0;
        let all = values.iter().fold(true, |all, &v| all & fits(v)); // no branch: vectorises
        match all {
            true => Ok(()),
            false => {
                let value = *values.iter().find(|&&v| !fits(v)).expect("one does not fit");
                Err(Error::TensorValue { tensor: Shown(self.tensor.name()).to_string(), value })
            }
        }
    }

    fn check_finite(&self, halves: &[u8]) -> Result<(), Error> {
        match halves.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).find(|v| !v.is_finite()) {
            Some(value) => {
                Err(Error::TensorValue { tensor: Shown(self.tensor.name()).to_string(), value: value.into() })
            }
            None => Ok(()),
        }
    }
}

/// Memory that one row after the other uses.
#[derive(Default)]
struct Scratch {
    raw: Vec<u8>,
    values: Vec<f32>,
    halves: Vec<f16>,
}

/// Per head of `head_dim` elements of `size` bytes: element 2i goes to i, element 2i + 1 to i + head_dim / 2.
fn pairs_to_halves(data: &mut [u8], head_dim: usize, size: usize, scratch: &mut Vec<u8>) {
    for head in data.chunks_exact_mut(head_dim * size) {
        scratch.clear();
        scratch.extend_from_slice(head);
        for (from, element) in scratch.chunks_exact(size).enumerate() {
            let to = from / 2 + (from % 2) * (head_dim / 2);
            head[to * size..(to + 1) * size].copy_from_slice(element);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::pairs_to_halves;

    #[test]
    fn pairs_go_to_halves_head_by_head() {
        // two heads of 6 rows of 2 bytes, numbered
        let mut rows: Vec<u8> = (0..12).flat_map(|row| [row, row + 100]).collect();
        pairs_to_halves(&mut rows, 6, 2, &mut Vec::new());
        let order: Vec<u8> = rows.chunks_exact(2).map(|row| row[0]).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert!(rows.chunks_exact(2).all(|row| row[1] == row[0] + 100));
    }
}
