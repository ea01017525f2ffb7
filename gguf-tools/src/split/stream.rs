//! The data: one pass over the model, copied by one thread, digested by two, flushed by another.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use sha2::{Digest as _, Sha256};

use super::{CutProgress, DIGEST_BYTES, SplitError};
use crate::{
    digest::{self, Sha},
    gguf::{
        self, Tensor,
        write::{GgufWriter, TensorSpec},
    },
    plan::{Plan, Source},
    requantise,
};

/// Digests found on the way.
pub(super) struct Digests {
    /// Of the model's tensors, in its order.
    pub(super) of_model: Vec<Sha>,
    /// Of each slice's tensors, in its order.
    pub(super) of_slices: Vec<Vec<Sha>>,
}

/// Bytes copied between two looks at the clock and the other threads.
const PIECE_BYTES: u64 = 4 << 20;
/// Pieces that copying may be ahead of digesting: what was copied is then still cached by the system.
const PIECES_AHEAD: usize = 32;
/// Digesting takes longer than copying: two threads share it, tensor by tensor.
const DIGESTERS: usize = 2;
/// Bytes written between two flushes.
const FLUSH_BYTES: u64 = 128 << 20;

/// Work for a digesting thread.
enum Piece<'a> {
    /// Bytes of a tensor of the model, from a byte on.
    Data(Tensor<'a>, u64, u64),
    Zeros(u64),
    /// The tensor is complete: report its digest under this number.
    End(usize),
}

/// Streams all data into the writers.
pub(super) fn stream(
    plan: &Plan<'_>,
    writers: &mut [GgufWriter],
    progress: &mut impl FnMut(CutProgress<'_>),
) -> Result<Digests, SplitError> {
    thread::scope(|scope| {
        let (report, reports) = channel();
        let lanes: Vec<Lane<'_>> = (0..DIGESTERS)
            .map(|_| {
                let (pieces, work) = sync_channel(PIECES_AHEAD);
                let waiting = Arc::new(AtomicU64::new(0));
                let (report, counter) = (report.clone(), waiting.clone());
                scope.spawn(move || digest_pieces(&work, &counter, &report));
                Lane { pieces, waiting }
            })
            .collect();
        drop(report);
        // another thread keeps the disk busy from the start, so that little is left to flush at the end
        let (to_flush, files) = sync_channel::<File>(0);
        scope.spawn(move || files.iter().for_each(|file| drop(file.sync_data())));

        let written = write_all(plan, writers, &lanes, &to_flush, progress);
        drop(lanes);
        let mut shas = vec![None; plan.gguf.n_tensors()];
        let mut others = Vec::new();
        // a failed read shows here, and is the reason that a lane closed early
        for (number, sha) in reports {
            match shas.get_mut(number) {
                Some(slot) => *slot = Some(sha?),
                None => others.push((number, sha?)),
            }
        }
        let Written { requantised, of_slices } = written?;
        for (index, sha) in requantised {
            shas[index] = Some(sha);
        }
        // what no slice carries whole still belongs to the model's identity
        let mut buf = vec![0; DIGEST_BYTES];
        let of_model = plan
            .gguf
            .tensors()
            .zip(shas)
            .map(|(tensor, sha)| sha.map_or_else(|| digest::of_tensor(&tensor, &mut buf, |_| {}), Ok))
            .collect::<Result<Vec<Sha>, _>>()?;
        let sha_of = |slot: &Slot| match *slot {
            Slot::Known(sha) => Some(sha),
            Slot::Number(n) if n < of_model.len() => Some(of_model[n]),
            Slot::Number(n) => others.iter().find(|(number, _)| *number == n).map(|&(_, sha)| sha),
        };
        let of_slices = of_slices
            .iter()
            .map(|slots| slots.iter().map(|s| sha_of(s).expect("every piece of work is answered")).collect())
            .collect();
        Ok(Digests { of_model, of_slices })
    })
}

/// Where a slice's tensor finds its digest.
enum Slot {
    Known(Sha),
    /// Reported under this number: below the number of tensors, it is that tensor of the model.
    Number(usize),
}

/// What writing left to be answered.
struct Written {
    /// Digests of the model's tensors that were converted on the way.
    requantised: Vec<(usize, Sha)>,
    of_slices: Vec<Vec<Slot>>,
}

/// The main thread: copies, and hands out the digesting.
fn write_all<'a>(
    plan: &Plan<'a>,
    writers: &mut [GgufWriter],
    lanes: &[Lane<'a>],
    to_flush: &SyncSender<File>,
    progress: &mut impl FnMut(CutProgress<'_>),
) -> Result<Written, SplitError> {
    let total = plan.slices.iter().map(|s| s.weight_bytes).sum();
    let (mut done, mut unflushed) = (0, 0);
    let mut given = vec![false; plan.gguf.n_tensors()];
    let mut next_number = plan.gguf.n_tensors();
    let mut written = Written { requantised: Vec::new(), of_slices: Vec::new() };
    for (slice, writer) in plan.slices.iter().zip(writers) {
        let mut slots = Vec::with_capacity(slice.tensors.len());
        for (spec, source) in &slice.tensors {
            let n_bytes = spec.n_bytes().unwrap_or(0);
            let mut advance = |n: u64| {
                done += n;
                unflushed += n;
                progress(CutProgress::Writing(done, total, &slice.file));
                // a rendezvous: while a flush is on its way, the next one waits for its turn
                unflushed >= FLUSH_BYTES
            };
            let number = match source {
                Source::Whole(tensor) => plan.gguf.index_of(tensor),
                _ => {
                    next_number += 1;
                    next_number - 1
                }
            };
            // what a slice before carried as well needs no second digest
            let digest = !given.get_mut(number).is_some_and(|given| std::mem::replace(given, true));
            let lane = lanes.iter().min_by_key(|lane| lane.waiting.load(Ordering::Relaxed));
            let lane = lane.filter(|_| digest);
            let mut flush = false;
            let mut advance = |n| flush |= advance(n);
            slots.push(match source {
                Source::Requantised(tensor) => {
                    let (sha, of_source) = convert(tensor, spec, writer, &mut advance)?;
                    written.requantised.push((plan.gguf.index_of(tensor), of_source));
                    Slot::Known(sha)
                }
                Source::Whole(tensor) | Source::Start(tensor) => {
                    carry(Some(tensor), n_bytes, number, writer, lane, &mut advance)?
                }
                Source::Placeholder => carry(None, n_bytes, number, writer, lane, &mut advance)?,
            });
            if flush
                && let Ok(file) = writer.file()
                && to_flush.try_send(file).is_ok()
            {
                unflushed = 0;
            }
        }
        written.of_slices.push(slots);
    }
    Ok(written)
}

/// Writes the first `n_bytes` of a tensor as they are, or zeros where there is none, and hands out the digesting of them
/// under `number`, unless that was done before (no lane).
fn carry<'a>(
    tensor: Option<&Tensor<'a>>,
    n_bytes: u64,
    number: usize,
    writer: &mut GgufWriter,
    lane: Option<&Lane<'a>>,
    advance: &mut impl FnMut(u64),
) -> Result<Slot, SplitError> {
    let piece_bytes = if tensor.is_some() { PIECE_BYTES } else { DIGEST_BYTES as u64 };
    let mut at = 0;
    while at < n_bytes {
        let n = piece_bytes.min(n_bytes - at);
        let piece = match tensor {
            Some(tensor) => {
                writer.copy(tensor, at, n)?;
                Piece::Data(*tensor, at, n)
            }
            None => {
                writer.write(&[0; DIGEST_BYTES][..n as usize])?;
                Piece::Zeros(n)
            }
        };
        if let Some(lane) = lane {
            lane.give(piece, n);
        }
        advance(n);
        at += n;
    }
    if let Some(lane) = lane {
        lane.give(Piece::End(number), 0);
    }
    Ok(Slot::Number(number))
}

/// A digesting thread, as the main thread sees it.
struct Lane<'a> {
    pieces: SyncSender<Piece<'a>>,
    /// Bytes it was given and has not digested yet.
    waiting: Arc<AtomicU64>,
}

impl<'a> Lane<'a> {
    fn give(&self, piece: Piece<'a>, n_bytes: u64) {
        self.waiting.fetch_add(n_bytes, Ordering::Relaxed);
        // a closed lane has reported why
        let _ = self.pieces.send(piece);
    }
}

/// Digests what comes until there is no more, or until reading fails.
fn digest_pieces(
    pieces: &Receiver<Piece<'_>>,
    waiting: &AtomicU64,
    report: &Sender<(usize, Result<Sha, gguf::Error>)>,
) {
    let mut hash = Sha256::new();
    let mut buf = vec![0; DIGEST_BYTES];
    let mut failed = None;
    for piece in pieces {
        let n_bytes = match piece {
            Piece::Data(tensor, at, n) => {
                let mut done = 0;
                while done < n && failed.is_none() {
                    let step = (n - done).min(DIGEST_BYTES as u64) as usize;
                    match tensor.read_at(at + done, &mut buf[..step]) {
                        Ok(()) => hash.update(&buf[..step]),
                        Err(e) => failed = Some(e),
                    }
                    done += step as u64;
                }
                n
            }
            Piece::Zeros(n) => {
                hash.update(&[0; DIGEST_BYTES][..n as usize]);
                n
            }
            Piece::End(number) => {
                let sha = Sha(hash.finalize_reset().into());
                // the main thread listens until all work is answered
                let _ = report.send((number, failed.take().map_or(Ok(sha), Err)));
                0
            }
        };
        waiting.fetch_sub(n_bytes, Ordering::Relaxed);
    }
}

/// Writes a tensor in another type. Returns the digests of what was written and of what was read.
fn convert(
    tensor: &Tensor<'_>,
    spec: &TensorSpec,
    writer: &mut GgufWriter,
    advance: &mut impl FnMut(u64),
) -> Result<(Sha, Sha), SplitError> {
    let (mut written, mut read) = (Sha256::new(), Sha256::new());
    requantise::rows::<SplitError>(tensor, spec.tensor_type, |from, to| {
        read.update(from);
        written.update(to);
        writer.write(to)?;
        advance(to.len() as u64);
        Ok(())
    })?;
    Ok((Sha(written.finalize().into()), Sha(read.finalize().into())))
}
