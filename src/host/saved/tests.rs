use std::io::Cursor;
use std::sync::Arc;

use dim_core::digest::Sha;
use dim_core::rows::{RowType, Rows};
use dim_core::saved::SavedStep;
use proptest::prelude::*;

use super::format::StepWriter;
use super::*;

fn belongs(away: f64) -> Arc<Belongs> {
    Arc::new(Belongs {
        identity: Sha([7; 32]),
        row_type: RowType::F32,
        row_bytes: vec![8, 4],
        state_bytes: vec![3, 5],
        away,
        n_ctx: 64,
        n_ubatch: 16,
    })
}

/// A step of `count` rows of which `live` count, with numbers that name it.
fn step(position: u32, count: u32, live: u32) -> SavedStep {
    let n = count as usize;
    SavedStep {
        position,
        tokens: (0..count).map(|i| (position + i) as i32).collect(),
        live,
        rows: vec![Rows::F32(vec![position as f32; 2 * n]), Rows::F32(vec![-(count as f32); n])],
        states: vec![vec![position as u8; 3 * live as usize], vec![live as u8; 5 * live as usize]],
    }
}

fn steps(shapes: &[(u32, u32)]) -> Vec<SavedStep> {
    let mut position = 0;
    let of = |&(count, live): &(u32, u32)| {
        position += live;
        step(position - live, count, live)
    };
    shapes.iter().map(of).collect()
}

fn written(steps: &[SavedStep], belongs: &Arc<Belongs>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = StepWriter::new(&mut bytes, belongs).unwrap();
    steps.iter().for_each(|step| writer.step(step).unwrap());
    writer.finish().unwrap();
    bytes
}

/// Everything in it, or the first thing that is wrong.
fn read_all(bytes: &[u8], belongs: &Arc<Belongs>) -> Result<Vec<SavedStep>, SavedError> {
    let mut from = Cursor::new(bytes);
    let saved = Saved::read_of(&mut from, belongs)?;
    let n = saved.steps().len();
    saved.read_steps(&mut from, n)?.collect()
}

const SHAPES: [(u32, u32); 5] = [(16, 16), (16, 3), (5, 5), (1, 1), (2, 1)];

#[test]
fn what_was_written_is_read_step_by_step() {
    let belongs = belongs(0.5);
    let steps = steps(&SHAPES);
    let bytes = written(&steps, &belongs);
    assert_eq!(read_all(&bytes, &belongs).unwrap(), steps);
    let mut from = Cursor::new(&bytes);
    let saved = Saved::read_of(&mut from, &belongs).unwrap();
    assert_eq!(saved.tokens().len(), 26);
    let two: Vec<SavedStep> = saved.read_steps(&mut from, 2).unwrap().map(Result::unwrap).collect();
    assert_eq!(two, steps[..2]);
    let none = written(&[], &belongs);
    assert_eq!(read_all(&none, &belongs).unwrap(), []);
}

#[test]
fn no_byte_can_be_changed_cut_off_or_added() {
    let belongs = belongs(0.5);
    let bytes = written(&steps(&SHAPES), &belongs);
    for i in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[i] ^= 1 << (i % 8);
        assert!(read_all(&changed, &belongs).is_err(), "byte {i} of {}", bytes.len());
        assert!(read_all(&bytes[..i], &belongs).is_err(), "{i} of {} bytes", bytes.len());
    }
    for at in [0, 8, bytes.len() / 2, bytes.len()] {
        let mut longer = bytes.clone();
        longer.splice(at..at, [0; 3]);
        assert!(read_all(&longer, &belongs).is_err(), "three bytes more at {at}");
    }
}

#[test]
fn another_host_s_is_told_apart() {
    let ours = belongs(0.5);
    let bytes = written(&steps(&SHAPES), &ours);
    let theirs = Arc::new(Belongs { identity: Sha([8; 32]), ..(*ours).clone() });
    assert!(matches!(read_all(&bytes, &theirs), Err(SavedError::OtherHost)));
    assert!(matches!(read_all(b"GGUF, and no saved session", &ours), Err(SavedError::NotSaved)));
    assert!(matches!(read_all(&[], &ours), Err(SavedError::NotSaved)));
    // digests that fit, and another cut: nothing of it has the size that it says
    let wider = Arc::new(Belongs { row_bytes: vec![8], ..(*ours).clone() });
    assert!(matches!(read_all(&bytes, &wider), Err(SavedError::Damaged(_))));
}

proptest! {
    /// Whoever writes a file with digests that fit: nothing panics, and nothing is allocated that the file has not.
    #[test]
    fn an_index_that_lies_is_refused(index in proptest::collection::vec(any::<u8>(), 0..200), keeps_identity: bool) {
        let belongs = belongs(0.5);
        let mut index = index;
        if keeps_identity {
            index.splice(0..0, belongs.identity.0);
        }
        let mut bytes = b"dimkept1".to_vec();
        bytes.extend_from_slice(&index);
        let sha256 = Sha::of(&bytes);
        bytes.extend_from_slice(&sha256.0);
        bytes.extend_from_slice(&(index.len() as u32).to_le_bytes());
        bytes.extend_from_slice(b"dimkept1");
        let read = read_all(&bytes, &belongs);
        prop_assert!(read.is_err() || read.unwrap().is_empty());
    }
}

#[test]
fn what_costs_the_workers_more_than_a_prompt_is_not_restored() {
    let read = |away: f64, shapes: &[(u32, u32)]| {
        let belongs = belongs(away);
        Saved::read_of(&mut Cursor::new(written(&steps(shapes), &belongs)), &belongs).unwrap()
    };
    // a prompt of 40 tokens and a reply of 12
    let mut shapes = vec![(16, 16), (16, 16), (8, 8)];
    shapes.extend([(1, 1); 12]);
    let third = read(1.0 / 3.0, &shapes);
    let worth = third.worth(52);
    assert_eq!((worth.steps, worth.tokens), (3, 40), "the reply is evaluated with what follows it");
    let worth = third.worth(20);
    assert_eq!((worth.steps, worth.tokens), (2, 20), "a step that is cut is restored whole");
    assert!(worth.rows < third.worth_held(20) && worth.rows > 0.0);
    assert_eq!(third.worth(0), Worth::default());
    let tenth = read(0.1, &shapes);
    assert_eq!((tenth.worth(52).steps, tenth.worth(52).tokens), (15, 52));
    let here = read(0.0, &shapes);
    assert_eq!(here.worth(52).rows, here.worth_held(52), "where nobody else computes all is spared");
    // of a long chunk two rows are left: evaluating those is cheaper
    assert_eq!(read(0.9, &[(16, 2)]).worth(2), Worth::default());
}
