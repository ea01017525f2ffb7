//! Sessions, chunks, rewinding, wanted rows: what the stages keep between calls.

mod common;

use common::{Chain, Wire, argmax, assert_exact, context, decode, load, max_difference, stock, tokens};
use gguf_tools::synth::{RopeFactors, Spec};
use llama_sys_patch::{ContextParams, Input, Output, Row, Stage, StageParams};

fn tiny() -> Spec {
    Spec::tiny("qwen2").unwrap()
}

#[test]
fn sessions_in_one_batch_are_exact() {
    let model = load(&tiny());
    let context = ContextParams { max_sessions: 4, ..context() };
    let mut chain = Chain::new(&model, &[2, 4], &context, Wire::F32);
    let mut oracle = stock(&model, &context);

    // prompts of different lengths, alone and together, then rows of sessions interleaved in changing orders
    let prompts = [tokens(&model, 1, 50), tokens(&model, 2, 9), tokens(&model, 3, 33), tokens(&model, 4, 1)];
    let mut lengths = [0u32; 4];
    let run = |chain: &mut Chain, oracle: &mut _, rows: &[Row], tokens: &[i32], what: &str| {
        let expected = decode(oracle, rows, tokens);
        let ours = chain.evaluate(rows, tokens).expect("rows");
        assert_exact(&ours, &expected, what);
        expected
    };
    run(&mut chain, &mut oracle, &Row::chunk(2, 0, 33), &prompts[2], "session 2 alone");
    lengths[2] = 33;
    let mut rows = Row::chunk(0, 0, 50);
    rows.extend(Row::chunk(1, 0, 9));
    let both: Vec<i32> = prompts[0].iter().chain(&prompts[1]).copied().collect();
    run(&mut chain, &mut oracle, &rows, &both, "sessions 0 and 1 together");
    (lengths[0], lengths[1]) = (50, 9);
    run(&mut chain, &mut oracle, &Row::chunk(3, 0, 1), &prompts[3], "session 3: one token");
    lengths[3] = 1;

    for (step, order) in
        [[0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1], [1, 1, 3, 0], [0, 0, 0, 3]].into_iter().enumerate()
    {
        let mut rows = Vec::new();
        for session in order {
            rows.push(Row { session, position: lengths[session as usize], want_output: true });
            lengths[session as usize] += 1;
        }
        let next = tokens(&model, 100 + step as u64, rows.len());
        let logits = run(&mut chain, &mut oracle, &rows, &next, &format!("interleaved, order {order:?}"));
        // rows come back in the order they were given: different sessions, different logits
        let n_vocab = model.n_vocab();
        assert!(max_difference(&logits[..n_vocab], &logits[3 * n_vocab..]) > 0.0);
    }
}

#[test]
fn a_session_is_not_moved_by_its_neighbours() {
    let model = load(&tiny());
    let context = ContextParams { max_sessions: 2, ..context() };
    let mut together = Chain::new(&model, &[3], &context, Wire::F32);
    let mut alone = Chain::new(&model, &[3], &context, Wire::F32);
    let prompt = tokens(&model, 5, 40);

    let expected = alone.evaluate(&Row::chunk(1, 0, 40), &prompt).unwrap();
    together.evaluate(&Row::chunk(0, 0, 60), &tokens(&model, 6, 60)).unwrap();
    let ours = together.evaluate(&Row::chunk(1, 0, 40), &prompt).unwrap();
    assert_exact(&ours, &expected, "session 1 beside session 0");
}

#[test]
fn prompt_longer_than_a_batch_is_exact_with_the_same_chunks() {
    let model = load(&tiny());
    for n_ubatch in [1, 7, 32, 64] {
        let context = ContextParams { n_batch: 64, n_ubatch, ..context() };
        let mut chain = Chain::new(&model, &[2, 4], &context, Wire::F32);
        let mut oracle = stock(&model, &context);
        let prompt = tokens(&model, 8, 200);
        let mut position = 0;
        for chunk in prompt.chunks(64) {
            let rows = Row::chunk(0, position, chunk.len());
            let expected = decode(&mut oracle, &rows, chunk);
            let ours = chain.evaluate(&rows, chunk).unwrap();
            assert_exact(&ours, &expected, &format!("n_ubatch {n_ubatch}, from position {position}"));
            position += chunk.len() as u32;
        }
    }
}

#[test]
fn chosen_rows_are_exact_and_in_order() {
    let model = load(&tiny());
    let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let mut oracle = stock(&model, &context());
    let prompt = tokens(&model, 9, 70);

    for wanted in [&[0usize, 1, 2, 3][..], &[5, 31, 32, 69], &[69], &[], &(0..70).collect::<Vec<_>>()] {
        chain.rewind(0, 0);
        oracle.rewind(0, 0).unwrap();
        let rows: Vec<Row> = (0..prompt.len())
            .map(|i| Row { session: 0, position: i as u32, want_output: wanted.contains(&i) })
            .collect();
        let expected = decode(&mut oracle, &rows, &prompt);
        let ours = chain.evaluate(&rows, &prompt).unwrap();
        assert_eq!(ours.len(), wanted.len() * model.n_vocab());
        if !wanted.is_empty() {
            assert_exact(&ours, &expected, &format!("rows {wanted:?}"));
        }
    }
}

#[test]
fn rewound_session_goes_on_as_if_the_tail_had_never_been() {
    let model = load(&tiny());
    let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let mut fresh = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let prompt = tokens(&model, 10, 40);
    let wrong = tokens(&model, 11, 17);
    let right = tokens(&model, 12, 5);

    chain.evaluate(&Row::chunk(0, 0, 40), &prompt).unwrap();
    fresh.evaluate(&Row::chunk(0, 0, 40), &prompt).unwrap();
    let astray = chain.evaluate(&Row::chunk(0, 40, 17), &wrong).unwrap();
    chain.rewind(0, 40);
    let ours = chain.evaluate(&Row::chunk(0, 40, 5), &right).unwrap();
    let expected = fresh.evaluate(&Row::chunk(0, 40, 5), &right).unwrap();
    assert_exact(&ours, &expected, "after a rewind");
    assert!(max_difference(&astray, &ours) > 0.0);

    // to the middle of the prompt, and to nothing
    for position in [13, 0] {
        chain.rewind(0, position);
        fresh.rewind(0, position);
        for stage in &chain.stages {
            assert_eq!(stage.length(0).unwrap(), position);
        }
        let ours = chain.evaluate(&Row::chunk(0, position, 17), &wrong).unwrap();
        let expected = fresh.evaluate(&Row::chunk(0, position, 17), &wrong).unwrap();
        assert_exact(&ours, &expected, &format!("after a rewind to {position}"));
    }
}

#[test]
fn replay_with_the_same_chunks_is_bit_identical() {
    let model = load(&tiny());
    let mut lived = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let mut replayed = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let mut history: Vec<Vec<i32>> = vec![tokens(&model, 13, 45)];
    let mut logits = lived.evaluate(&Row::chunk(0, 0, 45), &history[0]).unwrap();
    for step in 0..20 {
        let token = vec![argmax(&logits)];
        logits = lived.evaluate(&Row::chunk(0, 45 + step, 1), &token).unwrap();
        history.push(token);
    }
    let mut position = 0;
    let mut again = Vec::new();
    for chunk in &history {
        again = replayed.evaluate(&Row::chunk(0, position, chunk.len()), chunk).unwrap();
        position += chunk.len() as u32;
    }
    assert_exact(&again, &logits, "the last step of a replay");
}

#[test]
fn windowed_attention_can_be_rewound() {
    // a cache of the window's size would have forgotten what stands before the rewind
    let spec = Spec::tiny("olmo2").unwrap().window(16).context(2048);
    let model = load(&spec);
    let context = ContextParams { n_ctx: 2048, ..context() };
    let mut chain = Chain::new(&model, &[2, 4], &context, Wire::F32);
    let mut fresh = Chain::new(&model, &[2, 4], &context, Wire::F32);
    let mut oracle = stock(&model, &context);
    let prompt = tokens(&model, 14, 1024);
    for (i, chunk) in prompt.chunks(128).enumerate() {
        let rows = Row::chunk(0, 128 * i as u32, 128);
        let ours = chain.evaluate(&rows, chunk).unwrap();
        assert_exact(&ours, &decode(&mut oracle, &rows, chunk), "windowed prompt");
    }
    chain.rewind(0, 32);
    fresh.evaluate(&Row::chunk(0, 0, 32), &prompt[..32]).unwrap();
    let more = tokens(&model, 15, 30);
    let rows = Row::chunk(0, 32, 30);
    assert_exact(
        &chain.evaluate(&rows, &more).unwrap(),
        &fresh.evaluate(&rows, &more).unwrap(),
        "after a rewind",
    );
}

#[test]
fn stretched_rotation_is_exact() {
    for (arch, factors) in [("llama", RopeFactors::Llama3), ("phi3", RopeFactors::Long { original: 64 })] {
        let model = load(&Spec::tiny(arch).unwrap().rope_factors(factors));
        let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F32);
        let mut oracle = stock(&model, &context());
        let prompt = tokens(&model, 16, 100);
        let rows = Row::chunk(0, 0, 100);
        assert_exact(&chain.evaluate(&rows, &prompt).unwrap(), &decode(&mut oracle, &rows, &prompt), arch);
    }
}

#[test]
fn hidden_rows_of_a_range_are_those_of_shorter_ranges() {
    // blocks 0..4 in one stage, or 0..2 and 2..4: also what self-test vectors are made from
    let model = load(&tiny());
    let prompt = tokens(&model, 17, 40);
    let rows = Row::chunk(0, 0, 40);
    let n = 40 * model.n_embd();
    let stage = |first, last| {
        Stage::new(&model, StageParams::of_whole_model(&model, first..last, context())).expect("a stage")
    };
    let (mut whole, mut a, mut b) = (vec![0f32; n], vec![0f32; n], vec![0f32; n]);
    stage(0, 4).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut whole)).unwrap();
    stage(0, 2).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut a)).unwrap();
    stage(2, 4).evaluate(&rows, Input::F32(&a), Output::F32(&mut b)).unwrap();
    assert_exact(&b, &whole, "blocks 0..4");
}

#[test]
fn one_decode_step_reuses_the_graph_of_the_one_before() {
    let model = load(&tiny());
    let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F16);
    chain.evaluate(&Row::chunk(0, 0, 10), &tokens(&model, 18, 10)).unwrap();
    for step in 0..100 {
        chain.evaluate(&Row::chunk(0, 10 + step, 1), &[3]).unwrap();
    }
    for stage in &chain.stages {
        let (reused, built) = stage.graphs();
        assert_eq!((reused, built), (99, 2), "one graph for the prompt, one for all tokens");
    }
}
