//! The same with blocks on a GPU. Built only with a GPU backend; `tests/vulkan/setup.sh` makes one that is software, for
//! machines that have none.

#![cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]

mod common;

use std::path::Path;
use std::process::Command;

use common::pipeline::{self, Pipeline};
use common::{Chain, Wire, argmax, assert_exact, context, decode, max_difference, stock, tokens, write};
use gguf_tools::gguf::Gguf;
use gguf_tools::plan::{BlockRange, Plan, Request};
use gguf_tools::synth::Spec;
use half::f16;
use llama_sys_patch::{
    ContextParams, Error, Input, Model, ModelParams, Output, Row, Stage, StageParams, devices, test_support,
};

/// What the logits may differ by from stock's on the same backend, relative to their spread (the root mean square, about
/// 4 in these models). A GPU backend fuses operations, and whether two of them are fused depends, among other things, on
/// where the allocator has put their tensors, which is elsewhere in a slice's graph: a stage's rows then differ by about
/// 1e-6. Without fusion there is no difference at all: `make test-vulkan` runs these tests both ways.
fn tolerance() -> f32 {
    if std::env::var_os("GGML_VK_DISABLE_FUSION").is_some() { 0.0 } else { 2e-3 }
}

/// The largest difference, and whether it is within the tolerance.
fn within(ours: &[f32], stock: &[f32]) -> (f32, bool) {
    let spread = (stock.iter().map(|x| x * x).sum::<f32>() / stock.len() as f32).sqrt();
    let difference = max_difference(ours, stock);
    (difference, difference <= tolerance() * spread)
}

fn on_gpu(path: &Path, no_lm_head: bool) -> Model {
    Model::load(&[path], ModelParams { no_lm_head, ..Default::default() }).expect("the model loads")
}

/// Head, middle and tail of a model as files, loaded with every block on the GPU.
fn slices(model: &Path, middle: BlockRange) -> Vec<(Model, bool, bool)> {
    let directory = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(model).unwrap();
    let request = Request { middles: vec![middle], ..Default::default() };
    let plan = Plan::new(&gguf, &request).unwrap();
    let manifest = gguf_tools::split::split(&plan, directory.path(), "model", |_| {}).unwrap();
    let n = manifest.slices.len();
    let load = |i: usize, file: &str| {
        let (first, last) = (i == 0, i + 1 == n);
        (on_gpu(&directory.path().join(file), !last), first, last)
    };
    manifest.slices.iter().enumerate().map(|(i, slice)| load(i, &slice.file)).collect()
}

/// One after another, F32 between them.
fn evaluate(stages: &mut [Stage], rows: &[Row], tokens: &[i32]) -> Vec<f32> {
    let n_stages = stages.len();
    let n_embd = stages[0].model().n_embd();
    let mut logits =
        vec![0f32; rows.iter().filter(|r| r.want_output).count() * stages[n_stages - 1].model().n_vocab()];
    let mut hidden = vec![0f32; rows.len() * n_embd];
    for (i, stage) in stages.iter_mut().enumerate() {
        let from = hidden.clone();
        let input = if i == 0 { Input::Tokens(tokens) } else { Input::F32(&from) };
        let output = if i + 1 == n_stages { Output::Logits(&mut logits) } else { Output::F32(&mut hidden) };
        stage.evaluate(rows, input, output).expect("rows");
    }
    logits
}

#[test]
fn there_is_a_gpu_and_weights_go_where_they_are_sent() {
    let gpus: Vec<_> = devices().into_iter().filter(|d| d.is_gpu).collect();
    for gpu in &gpus {
        println!("{}: {}, {} MiB", gpu.name, gpu.description, gpu.memory_total_bytes >> 20);
    }
    assert!(!gpus.is_empty(), "no GPU: for software Vulkan set GGML_VK_VISIBLE_DEVICES=0");

    for tied in [true, false] {
        let file = write(&Spec::tiny("qwen2").unwrap().tied(tied));
        let load = |gpu_layers, no_lm_head, device: Option<&str>| {
            let device = device.map(str::to_owned);
            let params = ModelParams { gpu_layers, no_lm_head, device, ..Default::default() };
            Model::load(&[&file.path], params).expect("the model loads")
        };
        let whole = load(None, false, None);
        let offload = whole.offload();
        println!("tied {tied}: all {offload:?}");
        assert_eq!((offload.blocks_on_device, offload.lm_head_on_device), (6, true));

        // never the output layer of a head or middle, and always every one of its blocks
        let head = load(None, true, None).offload();
        println!("tied {tied}: no lm_head {head:?}");
        assert_eq!((head.blocks_on_device, head.lm_head_on_device), (6, false));
        assert_eq!(head.host_bytes + head.device_bytes, whole.weights_bytes(), "every tensor is there once");

        for n in [0, 1, 2, 5] {
            let some = load(Some(n), false, None).offload();
            assert_eq!((some.blocks_on_device, some.lm_head_on_device), (n, n > 0), "{n} blocks asked for");
        }
        let named = load(None, false, Some(&gpus[0].name)).offload();
        assert_eq!(named.blocks_on_device, 6);
    }
}

#[test]
fn ranges_on_the_gpu_give_stock_s_tokens() {
    for arch in ["qwen2", "llama", "qwen3", "phi3", "olmo2"] {
        let file = write(&Spec::tiny(arch).unwrap());
        let model = on_gpu(&file.path, false);
        let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F32);
        let mut oracle = stock(&model, &context());
        compare(
            arch,
            &model,
            |rows, tokens| chain.evaluate(rows, tokens).unwrap(),
            |rows, tokens| decode(&mut oracle, rows, tokens),
        );
    }
}

#[test]
fn slices_on_the_gpu_give_stock_s_tokens() {
    for (arch, type_name) in [("qwen2", "f16"), ("qwen2", "q8_0"), ("llama", "f16"), ("qwen3", "q4_k")] {
        let file = write(&Spec::tiny(arch).unwrap().with_type(type_name).unwrap());
        let model = on_gpu(&file.path, false);
        let mut stages: Vec<Stage> = slices(&file.path, BlockRange { first: 2, last: 3 })
            .into_iter()
            .map(|(model, takes_tokens, has_lm_head)| {
                let offload = model.offload();
                let blocks = model.blocks();
                assert_eq!(
                    (offload.blocks_on_device, offload.lm_head_on_device),
                    (blocks.end - blocks.start, has_lm_head),
                    "{offload:?}"
                );
                let params = StageParams { blocks, takes_tokens, has_lm_head, context: context() };
                Stage::new(&model, params).expect("a stage")
            })
            .collect();
        let mut oracle = stock(&model, &context());
        compare(
            &format!("{arch} {type_name}"),
            &model,
            |rows, tokens| evaluate(&mut stages, rows, tokens),
            |rows, tokens| decode(&mut oracle, rows, tokens),
        );
    }
}

/// Kinds of models that what is on a GPU concerns most: windows, experts, sinks, compressed keys, recurrent and convolutional
/// states, several positions a token, more than a hidden row that crosses. What a backend has no kernel for runs on the CPU
/// between its neighbours, as in stock.
macro_rules! families {
    ($($test:ident: $arch:literal,)*) => { $(
        #[test]
        fn $test() {
            if stock_survives($arch, stringify!($test)) {
                slices_of($arch);
            }
        }
    )* };
}

/// Whether the driver survives stock llama.cpp with this model, tried in a process of its own. (Mesa 22.3's software driver
/// does not where experts are chosen by row.) What it does not survive is said, and not compared.
fn stock_survives(arch: &str, test: &str) -> bool {
    const ALONE: &str = "DIM_TEST_STOCK_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let whole = on_gpu(&test_support::write(arch, &[], folder.path()).unwrap(), false);
        let mut stock = stock(&whole, &context());
        decode(&mut stock, &Row::chunk(0, 0, 77), &tokens(&whole, 31, 77));
        decode(&mut stock, &Row::chunk(0, 77, 1), &[1]);
        std::process::exit(0);
    }
    let program = std::env::current_exe().unwrap();
    let alone =
        Command::new(program).args(["--exact", test, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let is_ended = alone.status.code().is_none();
    assert!(is_ended || alone.status.success(), "{arch}: {}", String::from_utf8_lossy(&alone.stderr));
    if is_ended {
        println!(
            "{arch}: NOT COMPARED: this driver ends the process with stock llama.cpp ({})",
            alone.status
        );
    }
    !is_ended
}

families! {
    gemma2_in_slices_gives_stock_s_tokens: "gemma2",
    gemma3_in_slices_gives_stock_s_tokens: "gemma3",
    gemma4_in_slices_gives_stock_s_tokens: "gemma4",
    gpt_oss_in_slices_gives_stock_s_tokens: "gpt-oss",
    deepseek2_in_slices_gives_stock_s_tokens: "deepseek2",
    glm4moe_in_slices_gives_stock_s_tokens: "glm4moe",
    llama4_in_slices_gives_stock_s_tokens: "llama4",
    minimax_m2_in_slices_gives_stock_s_tokens: "minimax-m2",
    qwen3vl_in_slices_gives_stock_s_tokens: "qwen3vl",
    qwen35_in_slices_gives_stock_s_tokens: "qwen35",
    qwen35moe_in_slices_gives_stock_s_tokens: "qwen35moe",
    nemotron_h_moe_in_slices_gives_stock_s_tokens: "nemotron_h_moe",
    lfm2_in_slices_gives_stock_s_tokens: "lfm2",
    granitehybrid_in_slices_gives_stock_s_tokens: "granitehybrid",
    falcon_h1_in_slices_gives_stock_s_tokens: "falcon-h1",
    mamba2_in_slices_gives_stock_s_tokens: "mamba2",
    rwkv7_in_slices_gives_stock_s_tokens: "rwkv7",
}

fn slices_of(arch: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = test_support::write(arch, &[], folder.path()).unwrap();
    let ranges = pipeline::plan(&path, &[3, 6]).unwrap_or_else(|e| panic!("{arch}: {e}"));
    let models: Vec<Model> = pipeline::cut(&path, &ranges)
        .iter()
        .zip(&ranges)
        .map(|(file, range)| on_gpu(file, range.blocks.end < 8))
        .collect();
    let whole = on_gpu(&path, false);
    // what the backend has no kernel for stays on the host, in the slices as in the whole
    let (offload, parts) = (whole.offload(), models.iter().map(Model::offload).collect::<Vec<_>>());
    let on_device: u32 = parts.iter().map(|part| part.blocks_on_device).sum();
    assert!(
        offload.device_bytes > 0 && on_device == offload.blocks_on_device,
        "{arch}: {offload:?}, {parts:?}"
    );
    assert!(!parts[0].lm_head_on_device && !parts[1].lm_head_on_device && parts[2].lm_head_on_device);
    let mut ours = Pipeline::of(&models, &context()).unwrap_or_else(|e| panic!("{arch}: {e}"));
    let mut oracle = stock(&whole, &context());
    compare(
        arch,
        &whole,
        |rows, tokens| ours.evaluate(rows, tokens).unwrap_or_else(|e| panic!("{arch}: {e}")),
        |rows, tokens| decode(&mut oracle, rows, tokens),
    );
}

/// A prompt of several chunks and 24 greedy tokens: the same tokens, logits within the tolerance.
fn compare(
    what: &str,
    model: &Model,
    mut ours: impl FnMut(&[Row], &[i32]) -> Vec<f32>,
    mut stock: impl FnMut(&[Row], &[i32]) -> Vec<f32>,
) {
    let mut text = tokens(model, 31, 77);
    let mut rows = Row::chunk(0, 0, text.len());
    let mut position = 0;
    let mut largest = [0f32; 2]; // of the prompt, of the tokens after it
    for step in 0..25 {
        let (a, b) = (ours(&rows, &text), stock(&rows, &text));
        let (difference, is_within) = within(&a, &b);
        largest[usize::from(step > 0)] = largest[usize::from(step > 0)].max(difference);
        assert!(is_within, "{what}, step {step}: logits differ by {difference}");
        assert_eq!(argmax(&a), argmax(&b), "{what}, step {step}");
        position += text.len() as u32;
        text = vec![argmax(&b)];
        rows = Row::chunk(0, position, 1);
    }
    println!(
        "{what}: max |logit difference| {:.2e} for the prompt, {:.2e} for 24 tokens",
        largest[0], largest[1]
    );
}

#[test]
fn part_of_the_blocks_on_the_gpu_gives_stock_s_tokens() {
    let file = write(&Spec::tiny("qwen2").unwrap());
    let params = ModelParams { gpu_layers: Some(3), ..Default::default() };
    let model = Model::load(&[&file.path], params).unwrap();
    let mut chain = Chain::new(&model, &[2, 4], &context(), Wire::F32);
    let mut oracle = stock(&model, &context());
    compare("3 of 6 blocks", &model, |r, t| chain.evaluate(r, t).unwrap(), |r, t| decode(&mut oracle, r, t));
}

#[test]
fn the_gpu_converts_to_the_nearest_f16_and_back() {
    let file = write(&Spec::tiny("qwen2").unwrap());
    let model = on_gpu(&file.path, false);
    let stage = |first, last| {
        Stage::new(&model, StageParams::of_whole_model(&model, first..last, context())).expect("a stage")
    };
    let prompt = tokens(&model, 32, 40);
    let rows = Row::chunk(0, 0, 40);
    let n = 40 * model.n_embd();
    let (mut exact, mut nearest) = (vec![0f32; n], vec![f16::ZERO; n]);
    stage(0, 2).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut exact)).unwrap();
    stage(0, 2).evaluate(&rows, Input::Tokens(&prompt), Output::F16(&mut nearest)).unwrap();
    let wrong = exact.iter().zip(&nearest).filter(|(x, y)| f16::from_f32(**x) != **y).count();
    assert_eq!(wrong, 0, "of {n} values");

    let widened: Vec<f32> = nearest.iter().map(|x| x.to_f32()).collect();
    let (mut from16, mut from32) = (vec![0f32; n], vec![0f32; n]);
    stage(2, 4).evaluate(&rows, Input::F16(&nearest), Output::F32(&mut from16)).unwrap();
    stage(2, 4).evaluate(&rows, Input::F32(&widened), Output::F32(&mut from32)).unwrap();
    assert_exact(&from16, &from32, "F16 in");
}

#[test]
fn overflow_of_f16_on_the_gpu_is_an_error_that_names_the_block() {
    let file = write(&Spec::tiny("qwen2").unwrap().with_type("f32").unwrap().gain(100_000.0));
    let model = on_gpu(&file.path, false);
    let mut head = Stage::new(&model, StageParams::of_whole_model(&model, 0..4, context())).unwrap();
    let prompt = tokens(&model, 33, 40);
    let mut narrow = vec![f16::ZERO; 40 * model.n_embd()];
    let error =
        head.evaluate(&Row::chunk(0, 0, 40), Input::Tokens(&prompt), Output::F16(&mut narrow)).unwrap_err();
    assert!(
        matches!(error, Error::OutputOverflows { block: 3, max_abs, .. } if max_abs > 65504.0),
        "{error:?}"
    );
}

#[test]
fn sessions_and_rewinding_work_on_the_gpu() {
    let file = write(&Spec::tiny("qwen2").unwrap());
    let model = on_gpu(&file.path, false);
    let context = ContextParams { max_sessions: 2, ..context() };
    let mut chain = Chain::new(&model, &[2, 4], &context, Wire::F32);
    let mut oracle = stock(&model, &context);
    let mut run = |chain: &mut Chain, rows: &[Row], tokens: &[i32]| {
        let (difference, is_within) =
            within(&chain.evaluate(rows, tokens).unwrap(), &decode(&mut oracle, rows, tokens));
        assert!(is_within, "{difference}");
    };
    run(&mut chain, &Row::chunk(0, 0, 40), &tokens(&model, 34, 40));
    run(&mut chain, &Row::chunk(1, 0, 20), &tokens(&model, 35, 20));
    let both = |a, b| {
        [
            Row { session: 1, position: b, want_output: true },
            Row { session: 0, position: a, want_output: true },
        ]
    };
    run(&mut chain, &both(40, 20), &[5, 6]);

    // Session 0 back to its 10th token, and stock's too. (A cache filled with 10 rows at once instead of 40 would be
    // another one: the GPU's matrix kernels differ by the number of rows.)
    chain.rewind(0, 10);
    oracle.rewind(0, 10).unwrap();
    let text = tokens(&model, 34, 40);
    let rows = Row::chunk(0, 10, 5);
    let (difference, is_within) =
        within(&chain.evaluate(&rows, &text[10..15]).unwrap(), &decode(&mut oracle, &rows, &text[10..15]));
    assert!(is_within, "{difference}");
}
