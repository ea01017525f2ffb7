use super::*;
use crate::usage::Usage;
use dim::host::report::{StageReport, WireReport};

fn plan() -> Experiment {
    Experiment {
        arms: vec![Arm::Split],
        rounds: 1,
        scenario: Scenario {
            model: "m".into(),
            middle: "1..2".into(),
            remote_blocks: 2,
            prompt_tokens: 4,
            n_predict: 3,
            n_ctx: 64,
            threads: 1,
            wire: "f16".into(),
            memory_limit_bytes: None,
            worker_memory_limit_bytes: None,
            link: None,
            host_cpus: vec![],
            worker_cpus: vec![],
            local_workers: true,
        },
        model: "m.gguf".into(),
        model_parts: vec!["m.gguf".into()],
        split: "m.split.json".into(),
        host_slices: vec![],
        quantised: vec![],
        workers: Workers::Running(vec![]),
        rpc: None,
        key_file: None,
        prompt: vec![],
        machine: vec![],
        time_limit: Duration::from_secs(9),
        out: PathBuf::new(),
    }
}

fn report(n_tokens: usize, reconnects: u32) -> Report {
    let stage = StageReport {
        name: "middle".into(),
        blocks: "1..2".into(),
        compute_ms: 1.0,
        wait_ms: 1.0,
        gen_compute_ms: 1.0,
        gen_wait_ms: 1.0,
        reconnects,
    };
    Report {
        mode: "split".into(),
        model: "m".into(),
        tokens: vec![1; n_tokens],
        text: String::new(),
        sampled: false,
        stop: Stop::Length,
        error: None,
        seed: 0,
        prompt_tokens: 4,
        prompt_tok_s: 1.0,
        gen_tok_s: 1.0,
        ttft_ms: 1.0,
        start_to_first_token_ms: 1.0,
        load_ms: 1.0,
        prompt_ms: 1.0,
        gen_ms: 1.0,
        sample_ms: 0.0,
        stages: vec![stage],
        wire: WireReport::default(),
    }
}

fn ended(raw: Option<i32>) -> Ended {
    Ended { status: raw.map(ExitStatus::from_raw), stdout: String::new(), usage: Usage::default() }
}

#[test]
fn a_round_counts_only_when_nothing_went_wrong() {
    let plan = plan();
    let why = |raw, report: Option<&Report>, died| why_not(&ended(raw), report, &plan, None, died);
    let good = report(3, 0);
    assert_eq!(why(Some(0), Some(&good), false), None);
    assert!(why(Some(0), Some(&good), true).unwrap().contains("ended in the middle"));
    assert!(why(Some(0), Some(&report(3, 2)), false).unwrap().contains("2x"));
    assert!(why(Some(0), Some(&report(2, 0)), false).unwrap().contains("2 of 3 tokens"));
    assert!(why(Some(1 << 8), Some(&good), false).unwrap().contains("exit code 1"));
    assert!(why(Some(9), None, false).unwrap().contains("signal 9"));
    assert!(why(None, None, false).unwrap().contains("9 s"));
    assert!(why(Some(0), None, false).unwrap().contains("nothing"));
    let failed = Report { error: Some("middle is gone".into()), ..report(1, 0) };
    assert!(why(Some(1 << 8), Some(&failed), false).unwrap().contains("middle is gone"));
}

#[test]
fn the_report_is_found_among_other_lines() {
    let text = format!("noise\n{}\ntrailing", serde_json::to_string(&report(3, 0)).unwrap());
    assert_eq!(last_object(&text).unwrap().tokens.len(), 3);
    assert!(last_object("{}\n").is_none());
}
