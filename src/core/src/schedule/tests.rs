use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const HEAD_REMOTE_TAIL: [Placement; 3] =
    [Placement::Local, Placement::Remote { window: 2 }, Placement::Local];
const ALICE: SessionId = SessionId(0);
const BOB: SessionId = SessionId(1);
const CAROL: SessionId = SessionId(2);
const HEAD: StageId = StageId(0);
const MIDDLE: StageId = StageId(1);
const TAIL: StageId = StageId(2);

fn decode(s: &mut Schedule, session: SessionId) -> JobId {
    s.push(session, StepKind::Decode, 1)
}

fn prefill(s: &mut Schedule, session: SessionId) -> JobId {
    s.push(session, StepKind::Prefill, 512)
}

/// Runs whatever runs on stage 0 next to its end.
fn enter(s: &mut Schedule) -> Option<JobId> {
    loop {
        match s.next()? {
            Next::Run(job, HEAD) => {
                s.finished(HEAD, job).unwrap();
                return Some(job);
            }
            Next::Send(..) => {}
            _ => return None,
        }
    }
}

/// What the remote stage has longest comes out of it and of the tail.
fn come_out(s: &mut Schedule) -> JobId {
    let job = s.front(MIDDLE).unwrap();
    s.finished(MIDDLE, job).unwrap();
    come_out_of_tail(s, job);
    job
}

#[test]
fn a_job_passes_every_stage_in_order() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 4);
    let job = decode(&mut s, ALICE);
    assert_eq!(s.next(), Some(Next::Run(job, HEAD)));
    assert_eq!(s.finished(HEAD, job), Ok(AfterStage::Next(MIDDLE)));
    assert_eq!(s.next(), Some(Next::Send(job, MIDDLE)));
    assert_eq!(s.next(), Some(Next::Wait));
    assert_eq!(s.finished(MIDDLE, job), Ok(AfterStage::Next(TAIL)));
    assert_eq!(s.next(), Some(Next::Run(job, TAIL)));
    assert_eq!(s.finished(TAIL, job), Ok(AfterStage::Complete));
    assert_eq!(s.next(), None);
}

#[test]
fn a_lost_worker_gets_its_jobs_again_in_the_same_order_when_it_is_found() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 4);
    let (a, b) = (decode(&mut s, ALICE), decode(&mut s, ALICE));
    for job in [a, b] {
        assert_eq!(s.next(), Some(Next::Run(job, HEAD)));
        s.finished(HEAD, job).unwrap();
        assert_eq!(s.next(), Some(Next::Send(job, MIDDLE)));
    }
    assert_eq!(s.lost(MIDDLE), []);
    assert_eq!(s.next(), Some(Next::Wait));
    s.found(MIDDLE);
    assert_eq!(s.next(), Some(Next::Send(a, MIDDLE)));
    assert_eq!(s.next(), Some(Next::Send(b, MIDDLE)));
}

#[test]
fn refuses_a_job_out_of_turn() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 4);
    let (a, b) = (decode(&mut s, ALICE), decode(&mut s, ALICE));
    s.next();
    assert_eq!(s.finished(HEAD, b), Err(OutOfTurn { stage: HEAD, got: b, expected: Some(a) }));
    assert_eq!(s.finished(TAIL, a), Err(OutOfTurn { stage: TAIL, got: a, expected: None }));
}

#[test]
fn a_rewind_keeps_its_place_and_takes_none_of_the_window() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    let a = decode(&mut s, ALICE);
    let b = decode(&mut s, ALICE);
    let back = s.push_rewind(ALICE);
    let c = decode(&mut s, ALICE);
    let mut seen = Vec::new();
    while let Some(next) = s.next() {
        match next {
            Next::Run(job, stage) => {
                s.finished(stage, job).unwrap();
                seen.push((stage.0, job));
            }
            Next::Send(job, stage) => seen.push((stage.0, job)),
            Next::Wait => {
                // the window of two is full, with the rewind beside them
                let job = s.front(MIDDLE).unwrap();
                assert!(s.n_running(MIDDLE) <= 2);
                s.finished(MIDDLE, job).unwrap();
            }
        }
    }
    for stage in 0..3 {
        let order: Vec<JobId> = seen.iter().filter(|(at, _)| *at == stage).map(|(_, job)| *job).collect();
        assert_eq!(order, [a, b, back, c], "stage {stage}");
    }
    // sent before the first answer came: it did not wait for a place
    let sent = seen.iter().position(|s| *s == (1, back)).unwrap();
    assert!(sent < seen.iter().position(|s| *s == (2, a)).unwrap(), "{seen:?}");
}

#[test]
fn a_cancelled_step_vanishes_where_it_waits_and_is_void_where_it_runs() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    let (a, b, c) = (decode(&mut s, ALICE), decode(&mut s, ALICE), decode(&mut s, ALICE));
    let other = decode(&mut s, BOB);
    assert_eq!((enter(&mut s), enter(&mut s)), (Some(a), Some(other)));
    s.next();
    // a and other are at the worker, b and c in their lane
    assert_eq!(s.cancel(ALICE, a), Dropped { first: Some(a), vanished: vec![b, c], voided: vec![a] });
    assert_eq!(s.cancel(ALICE, a), Dropped::default());
    assert_eq!(s.next(), Some(Next::Wait));
    assert_eq!(s.finished(MIDDLE, other), Err(OutOfTurn { stage: MIDDLE, got: other, expected: Some(a) }));
    assert_eq!(s.finished(MIDDLE, a), Ok(AfterStage::Void));
    assert_eq!(s.finished(MIDDLE, other), Ok(AfterStage::Next(TAIL)));
}

#[test]
fn cancelling_ends_at_the_next_rewind_and_a_void_step_is_not_sent_again() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    let a = decode(&mut s, ALICE);
    assert_eq!(enter(&mut s), Some(a));
    s.next();
    let b = decode(&mut s, ALICE);
    let back = s.push_rewind(ALICE);
    let c = decode(&mut s, ALICE);
    assert_eq!(s.cancel(ALICE, a), Dropped { first: Some(a), vanished: vec![b], voided: vec![a] });
    assert_eq!(s.lost(MIDDLE), [a]);
    s.found(MIDDLE);
    assert_eq!(s.next(), Some(Next::Run(back, HEAD)));
    s.finished(HEAD, back).unwrap();
    assert_eq!(s.next(), Some(Next::Send(back, MIDDLE)));
    // behind nothing, it has passed: a worker that has not answered anything has nothing to rewind
    assert_eq!(s.next(), Some(Next::Run(back, TAIL)));
    s.finished(TAIL, back).unwrap();
    assert_eq!(s.next(), Some(Next::Run(c, HEAD)));
}

#[test]
fn an_error_takes_a_session_s_steps_and_nobody_else_s() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    let (a, x) = (decode(&mut s, ALICE), decode(&mut s, BOB));
    let (b, y) = (decode(&mut s, ALICE), decode(&mut s, BOB));
    let back = s.push_rewind(ALICE);
    assert_eq!((enter(&mut s), enter(&mut s)), (Some(a), Some(x)));
    s.next();
    assert_eq!(s.sessions_up_to(MIDDLE), [ALICE, BOB]);
    assert_eq!(s.fail(ALICE), Dropped { first: Some(a), vanished: vec![b], voided: vec![a] });
    assert_eq!(s.sessions_up_to(MIDDLE), [BOB]);
    assert_eq!(s.finished(MIDDLE, a), Ok(AfterStage::Void));
    assert_eq!(s.finished(MIDDLE, x), Ok(AfterStage::Next(TAIL)));
    // its rewind stays: the caches are to be where its caller put them
    let mut rest = Vec::new();
    while let Some(next) = s.next() {
        match next {
            Next::Run(job, stage) => {
                s.finished(stage, job).unwrap();
                rest.extend((stage == TAIL).then_some(job));
            }
            Next::Send(..) => {}
            Next::Wait => {
                let job = s.front(MIDDLE).unwrap();
                s.finished(MIDDLE, job).unwrap();
            }
        }
    }
    rest.sort();
    assert_eq!(rest, [x, y, back]);
}

#[test]
fn a_check_goes_first_leaves_after_its_stage_and_is_gone_with_its_worker() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    let (a, b) = (decode(&mut s, ALICE), decode(&mut s, ALICE));
    assert_eq!((enter(&mut s), s.next()), (Some(a), Some(Next::Send(a, MIDDLE))));
    let ids = s.push_check(MIDDLE, 2);
    assert_eq!(s.next(), Some(Next::Send(ids[0], MIDDLE)));
    assert_eq!(s.next(), Some(Next::Run(b, HEAD)));
    s.finished(HEAD, b).unwrap();
    // it takes a place in the window like any step
    assert_eq!(s.next(), Some(Next::Wait));
    s.finished(MIDDLE, a).unwrap();
    assert_eq!(s.next(), Some(Next::Send(ids[1], MIDDLE)));
    assert_eq!(s.next(), Some(Next::Send(ids[2], MIDDLE)));
    s.finished(TAIL, a).unwrap_err();
    assert_eq!(s.next(), Some(Next::Run(a, TAIL)));
    s.finished(TAIL, a).unwrap();
    assert_eq!(s.finished(MIDDLE, ids[0]), Ok(AfterStage::Complete));
    assert_eq!(s.lost(MIDDLE), [ids[1], ids[2]]);
    s.found(MIDDLE);
    assert_eq!(s.next(), Some(Next::Send(b, MIDDLE)));
}

#[test]
fn a_reply_goes_before_a_prompt_and_finds_one_chunk_before_it_at_most() {
    let mut s = Schedule::new(&[Placement::Local, Placement::Remote { window: 4 }, Placement::Local], 20);
    let chunks: Vec<JobId> = (0..6).map(|_| prefill(&mut s, BOB)).collect();
    let token = decode(&mut s, ALICE);
    assert_eq!(enter(&mut s), Some(token), "a reply goes first");
    assert_eq!(enter(&mut s), Some(chunks[0]));
    assert_eq!(enter(&mut s), None, "a second chunk would be before the next token");
    assert_eq!(come_out(&mut s), token);
    // the caller samples; the next token is likely to come
    assert_eq!(enter(&mut s), None);
    let token = decode(&mut s, ALICE);
    assert_eq!(enter(&mut s), Some(token));
    assert_eq!(come_out(&mut s), chunks[0]);
    assert_eq!(enter(&mut s), Some(chunks[1]));
    assert_eq!(come_out(&mut s), token);
    // nobody replies any more, so the chunk behind the one that is there fills the window
    assert_eq!(come_out(&mut s), chunks[1]);
    assert_eq!(
        [enter(&mut s), enter(&mut s), enter(&mut s)],
        [Some(chunks[2]), Some(chunks[3]), Some(chunks[4])]
    );
}

#[test]
fn lanes_take_turns_and_a_prompt_has_one_after_each_round_of_replies() {
    let mut s = Schedule::new(&[Placement::Local], 100);
    let mut order = Vec::new();
    let mut next_of: BTreeMap<JobId, SessionId> = BTreeMap::new();
    for session in [ALICE, BOB] {
        next_of.insert(decode(&mut s, session), session);
    }
    for _ in 0..4 {
        next_of.insert(prefill(&mut s, CAROL), CAROL);
    }
    while let Some(Next::Run(job, stage)) = s.next() {
        s.finished(stage, job).unwrap();
        let session = next_of[&job];
        order.push(session.0);
        // whoever replies has its next token ready at once
        if session != CAROL && order.len() < 12 {
            next_of.insert(decode(&mut s, session), session);
        }
    }
    assert_eq!(order[..12], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[test]
fn batches_are_formed_when_stage_0_is_free_up_to_the_limit_of_rows() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    s.set_batch_rows(3);
    let first = decode(&mut s, ALICE);
    assert_eq!(s.next(), Some(Next::Run(first, HEAD)), "alone: nobody else is there");
    // these come while stage 0 is busy
    let (b, c) = (decode(&mut s, BOB), s.push(CAROL, StepKind::Decode, 3));
    let (a, chunk) = (decode(&mut s, ALICE), prefill(&mut s, SessionId(3)));
    s.finished(HEAD, first).unwrap();
    s.next();
    assert_eq!(s.next(), Some(Next::Run(a, HEAD)));
    let members: Vec<JobId> = s.members(HEAD, a).map(|member| member.job).collect();
    assert_eq!(members, [a, b], "in order of the sessions; Carol's three rows do not fit beside");
    // one of a batch is given up: the batch goes on, and is void when all are
    assert_eq!(s.cancel(ALICE, a).voided, [a]);
    assert_eq!(s.finished(HEAD, a), Ok(AfterStage::Next(MIDDLE)));
    assert_eq!(s.next(), Some(Next::Send(a, MIDDLE)));
    assert_eq!(s.cancel(BOB, b).voided, [b]);
    s.finished(MIDDLE, first).unwrap();
    assert_eq!(s.finished(MIDDLE, a), Ok(AfterStage::Void));
    come_out_of_tail(&mut s, first);
    // as many steps of replies as there are replies: the prompt has its turn, and goes alone
    assert_eq!(s.next(), Some(Next::Run(chunk, HEAD)));
    assert_eq!(s.members(HEAD, chunk).count(), 1);
    s.finished(HEAD, chunk).unwrap();
    s.next();
    assert_eq!(s.next(), Some(Next::Run(c, HEAD)));
}

#[test]
fn replies_go_in_as_many_batches_as_there_are_devices_and_no_more_are_under_way() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    s.set_batch_rows(16);
    let all: Vec<JobId> = (0..8).map(|i| decode(&mut s, SessionId(i))).collect();
    assert_eq!((enter(&mut s), enter(&mut s)), (Some(all[0]), Some(all[4])));
    s.next();
    assert_eq!(s.members(MIDDLE, all[0]).count(), 4);
    assert_eq!(s.members(MIDDLE, all[4]).count(), 4);
    // one that is ready early goes with those that it went with
    let early = decode(&mut s, SessionId(0));
    assert_eq!(s.next(), Some(Next::Wait));
    s.finished(MIDDLE, all[0]).unwrap();
    come_out_of_tail(&mut s, all[0]);
    for i in 1..4 {
        decode(&mut s, SessionId(i));
    }
    assert_eq!(s.next(), Some(Next::Run(early, HEAD)));
    assert_eq!(s.members(HEAD, early).count(), 4);
}

#[test]
fn replies_of_sessions_side_by_side_go_together_whichever_are_ready_first() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    s.set_batch_rows(16);
    let of: BTreeMap<JobId, u32> =
        [5, 0, 3, 6, 1, 4, 2, 7].into_iter().map(|i| (decode(&mut s, SessionId(i)), i)).collect();
    let mut batch = || {
        let job = enter(&mut s).unwrap();
        s.next();
        s.members(MIDDLE, job).map(|member| of[&member.job]).collect::<Vec<u32>>()
    };
    assert_eq!([batch(), batch()], [[4, 5, 6, 7], [0, 1, 2, 3]]);
}

#[test]
fn replies_that_have_ended_are_no_reason_for_larger_batches() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    s.set_batch_rows(16);
    let mut round = |n: u32| {
        let jobs: Vec<JobId> = (0..n).map(|i| decode(&mut s, SessionId(i))).collect();
        let mut sizes = Vec::new();
        while let Some(job) = enter(&mut s) {
            sizes.push(s.members(MIDDLE, job).count().max(1));
            s.next();
        }
        while s.front(MIDDLE).is_some() {
            come_out(&mut s);
        }
        (jobs.len(), sizes.len())
    };
    assert_eq!(round(4), (4, 2));
    // two of them have had their last token; for two rounds they might go on
    (0..4).for_each(|_| assert_eq!(round(2), (2, 1)));
    assert_eq!(round(2), (2, 2));
}

#[test]
fn a_stage_that_a_worker_waits_for_goes_before_one_nearer_to_a_token_but_for_a_prompt() {
    let at_tail = |next: StepKind| {
        let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
        let first = decode(&mut s, ALICE);
        assert_eq!(enter(&mut s), Some(first));
        s.next();
        s.finished(MIDDLE, first).unwrap();
        let other = s.push(BOB, next, 4);
        (s.next(), first, other)
    };
    let (next, _, other) = at_tail(StepKind::Decode);
    assert_eq!(next, Some(Next::Run(other, HEAD)));
    let (next, first, _) = at_tail(StepKind::Prefill);
    assert_eq!(next, Some(Next::Run(first, TAIL)));
}

/// After whatever else can be sent.
fn come_out_of_tail(s: &mut Schedule, job: JobId) {
    let mut next = s.next();
    while let Some(Next::Send(..)) = next {
        next = s.next();
    }
    assert_eq!(next, Some(Next::Run(job, TAIL)));
    s.finished(TAIL, job).unwrap();
}

proptest! {
    /// Any stages and windows, several sessions whose steps and rewinds are pushed at any time, replies that go on for
    /// ever: every stage sees every session's jobs once and in order, and every prompt gets through.
    #[test]
    fn every_stage_sees_every_session_s_jobs_once_and_in_order_and_nobody_starves(
        kinds in proptest::collection::vec(0usize..4, 1..6),
        items in proptest::collection::vec((0u32..4, 0u32..6), 1..30),
        limit in 1usize..6,
        batch_rows in 1u32..5,
        picks in proptest::collection::vec(0usize..6, 400),
    ) {
        let placements: Vec<Placement> = kinds
            .iter()
            .map(|&k| if k == 0 { Placement::Local } else { Placement::Remote { window: k } })
            .collect();
        let n = placements.len();
        let mut s = Schedule::new(&placements, limit);
        s.set_batch_rows(batch_rows);
        let mut sessions: BTreeMap<JobId, u32> = BTreeMap::new();
        let mut expected: BTreeMap<u32, Vec<JobId>> = BTreeMap::new();
        let push = |s: &mut Schedule, session: u32, what: u32| {
            let id = SessionId(session);
            let job = match what {
                0 => s.push_rewind(id),
                1 | 2 => s.push(id, StepKind::Decode, what),
                _ => s.push(id, StepKind::Prefill, what),
            };
            (job, session)
        };
        for (session, what) in items {
            let (job, session) = push(&mut s, session, what);
            sessions.insert(job, session);
            expected.entry(session).or_default().push(job);
        }
        // two sessions that always have a next token, for as long as others wait
        let endless = [SessionId(8), SessionId(9)];
        for session in endless {
            decode(&mut s, session);
        }
        let mut seen: Vec<BTreeMap<u32, Vec<JobId>>> = vec![BTreeMap::new(); n];
        let mut picks = picks.into_iter().cycle();
        for _ in 0..20_000 {
            let Some(next) = s.next() else { break };
            let (Next::Run(job, at) | Next::Send(job, at)) = next else {
                // any remote stage that has something answers
                let busy: Vec<usize> = (0..n).filter(|&i| s.n_running(StageId(i)) > 0).collect();
                let at = StageId(busy[picks.next().unwrap() % busy.len()]);
                let job = s.front(at).unwrap();
                let members: Vec<Member> = s.members(at, job).collect();
                let progress = s.finished(at, job).unwrap();
                if progress == AfterStage::Complete {
                    refill(&mut s, &members, endless);
                }
                continue;
            };
            let members: Vec<Member> = s.members(at, job).collect();
            // a rewind that was sent may have passed already
            let named: Vec<JobId> = if members.is_empty() { vec![job] } else { members.iter().map(|m| m.job).collect() };
            for job in named {
                if let Some(session) = sessions.get(&job) {
                    seen[at.0].entry(*session).or_default().push(job);
                }
            }
            if matches!(next, Next::Run(..)) && s.finished(at, job).unwrap() == AfterStage::Complete {
                refill(&mut s, &members, endless);
            }
        }
        prop_assert_eq!(s.next(), None, "somebody starves");
        for (stage, seen) in seen.iter().enumerate() {
            prop_assert_eq!(seen, &expected, "stage {}", stage);
        }
    }
}

/// An endless reply goes on while there are others.
fn refill(s: &mut Schedule, members: &[Member], endless: [SessionId; 2]) {
    for session in members.iter().filter_map(|member| member.session) {
        if endless.contains(&session) && s.sessions_waiting(endless) > 0 {
            decode(s, session);
        }
    }
}

impl Schedule {
    /// How many others have something in the pipeline or before it.
    fn sessions_waiting(&self, but: [SessionId; 2]) -> usize {
        let last = StageId(self.stages.len() - 1);
        self.sessions_up_to(last).iter().filter(|session| !but.contains(session)).count()
    }
}

#[test]
fn sessions_that_came_and_went_leave_no_lanes() {
    let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 9);
    for session in 0..1_000 {
        decode(&mut s, SessionId(session));
        while let Some(next) = s.next() {
            let (Next::Run(job, stage) | Next::Send(job, stage)) = next else {
                panic!("nobody is waited for")
            };
            s.finished(stage, job).unwrap();
        }
    }
    assert!(s.lanes.len() <= lanes::MANY_LANES, "{} lanes", s.lanes.len());
}
