//! What a process with one slice takes: its own weights, its own caches and states, and little besides, however large the whole
//! model is. Each slice is loaded, and evaluated at its longest, by a process of its own, whose greatest resident size is
//! what Linux says of it at its end.
#![cfg(target_os = "linux")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::pipeline;
use llama_sys_patch::{
    ContextParams, Input, Model, ModelParams, Output, Row, Stage, StageParams, test_support,
};

/// What a process may take besides: the program, llama.cpp, and the buffers of a graph.
const BESIDE: u64 = 150 << 20;
const SLICE: &str = "DIM_TEST_SLICE";
const SESSIONS: u32 = 8;

/// The child: one slice, every session of it filled.
fn run(path: &Path) {
    let params = ModelParams { gpu_layers: Some(0), no_lm_head: true, ..Default::default() };
    let model = Model::load(&[path], params).unwrap();
    let context = ContextParams {
        n_ctx: 128,
        n_batch: 64,
        n_ubatch: 64,
        n_threads: 1,
        max_sessions: SESSIONS,
        ..ContextParams::default()
    };
    let params = StageParams::of_whole_model(&model, model.blocks(), context);
    let mut stage = Stage::new(&model, params).unwrap();
    let (n_in, n_out) = (stage.input_layout().width_f32(), stage.output_layout().width_f32());
    let input: Vec<f32> = (0..64 * n_in).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut output = vec![0f32; 64 * n_out];
    for session in 0..SESSIONS {
        for position in [0, 64] {
            let rows = Row::chunk(session, position, 64);
            stage.evaluate(&rows, Input::F32(&input), Output::F32(&mut output)).unwrap();
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().strip_suffix("kB").unwrap().trim().parse().unwrap();
    println!("taken {} {} {}", kib << 10, model.weights_bytes(), stage.kv_bytes());
    std::process::exit(0);
}

/// Bytes that a process with this slice takes, of its weights, and of its caches and states.
fn taken(path: &Path) -> [u64; 3] {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_slice_s_process_holds_its_own_share", "--nocapture"])
        .env(SLICE, path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let numbers = said.lines().find_map(|line| line.split_once("taken ")).map(|(_, numbers)| numbers);
    let numbers = numbers.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&child.stderr)));
    let numbers: Vec<u64> = numbers.split(' ').map(|n| n.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

#[test]
fn a_slice_s_process_holds_its_own_share() {
    if let Some(path) = std::env::var_os(SLICE) {
        run(&PathBuf::from(path));
    }
    // half a gigabyte each: a cache with windows; recurrent states beside keys and values; states alone
    let wide = [".embedding_length=1024", ".feed_forward_length=5120"];
    for (arch, more) in [
        ("gemma3", &[][..]),
        ("falcon-h1", &[".ssm.inner_size=2048", ".ssm.state_size=128"]),
        ("qwen35", &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = test_support::write(arch, &[&wide[..], more].concat(), folder.path()).unwrap();
        let whole = std::fs::metadata(&model).unwrap().len();
        let ranges = pipeline::plan(&model, &[3, 4]).unwrap();
        let files = pipeline::cut(&model, &ranges);
        let [taken, weights, caches] = taken(&files[1]);
        let mib = |bytes: u64| bytes >> 20;
        println!(
            "{arch}, 1 block of 8, {SESSIONS} sessions: {} MiB of weights, {} MiB of caches and states, {} MiB taken; the \
             model has {} MiB",
            mib(weights),
            mib(caches),
            mib(taken),
            mib(whole)
        );
        assert!(taken <= weights + caches + BESIDE, "{arch}: {taken} for {weights} + {caches}");
        // and the comparison would find the weights of the others
        assert!(weights + caches + BESIDE < whole, "{arch}: {whole} bytes are too few to tell");
    }
}
