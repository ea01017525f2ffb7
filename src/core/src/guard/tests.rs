use super::*;
use crate::guard::Guard;

const N_EMBD: usize = 4;

/// What right blocks answer: each row, plus the sum of the session so far in each value, in exact arithmetic.
fn right(input: &[f32], session: &mut Vec<f32>) -> Vec<f32> {
    let mut out = Vec::new();
    for row in input.chunks(N_EMBD) {
        session.push(row.iter().sum::<f32>() + 1.0);
        let sum: f32 = session.iter().sum();
        out.extend(row.iter().enumerate().map(|(i, x)| x + sum * (i as f32 + 1.0)));
    }
    out
}

fn canary() -> Canary {
    let blank = Canary { seed: 7, exponent: -5, steps: vec![3, 1], max_abs: 100, updates: vec![] };
    let answer = right(&blank.input(N_EMBD), &mut Vec::new());
    blank.with_answer(N_EMBD, &answer)
}

fn room() -> Room {
    Room { widths: N_EMBD.into(), dtype: RowType::F32, n_ctx: 100_000, max_rows: 512, sessions: 1 }
}

fn guard(room: Room) -> Guard {
    Guard::new(canary(), room, Some(BlockRange { first: 11, last: 16 }), 1)
}

fn spans(check: &Check) -> Vec<(u32, u32)> {
    (0..check.len()).filter_map(|i| check.piece(i)).map(|(span, _)| (span.position, span.count)).collect()
}

#[test]
fn a_right_answer_passes_and_a_wrong_one_is_told_by_its_blocks_and_figures() {
    let mut guard = guard(room());
    for is_wrong in [false, true] {
        let mut check = guard.begin().unwrap();
        assert_eq!(spans(&check), [(0, 3), (3, 1)]);
        let mut session = Vec::new();
        for i in 0..check.len() {
            let mut answer = right(&floats(check.piece(i).unwrap().1), &mut session);
            if is_wrong {
                answer.reverse();
            }
            assert_eq!(check.answered(&Rows::F32(answer)), i + 1 == check.len());
        }
        match guard.verdict(&check) {
            Ok(cosine) => assert!(!is_wrong && cosine > 0.999_999, "{cosine}"),
            Err(error) => {
                let says = error.to_string();
                assert!(is_wrong && matches!(error, StageError::Wrong { .. }), "{says}");
                assert!(
                    says.contains("blocks 11..16") && says.contains("cosine") && says.contains("0.99"),
                    "{says}"
                );
            }
        }
    }
}

#[test]
fn small_steps_and_short_contexts_are_kept_to() {
    let mut short = guard(Room { n_ctx: 2, max_rows: 1, ..room() });
    assert_eq!(spans(&short.begin().unwrap()), [(0, 1), (1, 1)]);
    // an answer beyond F16 is not asked for in F16
    let mut large =
        Guard::new(Canary { max_abs: 70_000, ..canary() }, Room { dtype: RowType::F16, ..room() }, None, 1);
    assert!(large.begin().is_none());
}

#[test]
fn it_is_due_after_so_many_rows_and_begins_to_count_anew() {
    let mut guard = guard(room());
    guard.count(EVERY_ROWS - 1);
    assert!(!guard.is_due());
    guard.count(1);
    assert!(guard.is_due());
    guard.begin().unwrap();
    assert!(!guard.is_due());
}

#[test]
fn two_answers_to_one_row_have_to_agree() {
    let mut guard = guard(room());
    let rows = |values: [f32; N_EMBD]| Rows::F32(values.to_vec());
    let before = rows([1.0, 2.0, 3.0, 4.0]);
    guard.compare_again(&before, &before, &before).unwrap();
    guard.compare_again(&before, &rows([1.0, 2.0, 4.0, 4.0]), &rows([1.0, 2.0, 4.001, 4.0])).unwrap();
    let error =
        guard.compare_again(&before, &rows([1.0, 2.0, 4.0, 4.0]), &rows([1.0, 3.0, 3.0, 4.0])).unwrap_err();
    assert!(matches!(error, StageError::Wrong { answer: WrongAnswer::Unsteady { .. }, .. }), "{error}");
    assert!(error.to_string().contains("asked the same row again"), "{error}");
}

#[test]
fn a_known_input_that_cannot_be_answered_is_wrong_and_a_lost_worker_is_lost() {
    let guard = guard(room());
    let not_finite = StageError::NotFinite { block: Some(12), count: 3, said: None };
    let error = guard.in_check(not_finite);
    assert!(matches!(error, StageError::Wrong { answer: WrongAnswer::Unanswered(_), .. }), "{error}");
    assert!(matches!(guard.in_check(StageError::lost("gone")), StageError::Lost(_)));
}
