//! Slices of a model, one after the other, against stock llama.cpp on the whole model: same tokens, same logits to the
//! last bit.
//!
//! Every family that can be cut, every kind of weight type, tied and untied lm_heads, one middle and two, cuts behind
//! the first block and before the last. The models are synthesised (`gguf_tools::synth`); what makes them a fair
//! oracle is asserted too: their logits are spread as a trained model's, and their text is no repetition. The slices
//! are files cut by `gguf_tools::split`, of both kinds: those that keep the model's numbers, and those that are models of
//! their own and are loaded by the unmodified loader; in one process, hidden rows handed over as F32. Processes, sockets and the wire in between change nothing of the arithmetic; tests/processes.rs has them.

use std::{
    collections::HashSet,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use gguf_tools::{
    arch,
    gguf::Gguf,
    plan::{BlockRange, Plan, Request, Role},
    split::split,
    synth::{Experts, FAMILIES, Head, RopeFactors, Spec},
};
use half::f16;
use llama_sys_patch::{ContextParams, Input, Model, ModelParams, Output, Row, Stage, StageParams, Stock};

/// Tokens of the prompt, and tokens generated after it.
const N_PROMPT: usize = 128;
const N_GENERATED: usize = 64;

/// One middle; two middles; the odd cuts: only the first block on one side, only the last on the other, only both.
const CUTS: [&[&str]; 5] = [&["2..3"], &["1..2", "3..4"], &["1..3"], &["3..4"], &["1..4"]];

#[test]
fn every_family_is_exact_at_every_cut() {
    let mut table = Table::new();
    for spec in families("f16") {
        table.check(&spec, &CUTS);
    }
    table.print("every family, F16");
    assert!(table.families.len() >= 7, "only {:?}", table.families);
}

#[test]
fn every_family_is_exact_in_every_type() {
    let mut table = Table::new();
    for weights in ["f32", "bf16", "q8_0", "q4_k_m"] {
        for spec in families(weights) {
            table.check(&spec, &[&["1..2", "3..4"]]);
        }
    }
    table.print("every family in every type, two middles");
}

#[test]
fn the_other_block_types_are_exact() {
    let mut table = Table::new();
    for weights in ["q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k", "q6_k", "iq4_nl"] {
        table.check(&Spec::tiny("qwen2").unwrap().with_type(weights).unwrap().tied(true), &CUTS[..1]);
    }
    table.print("other block types");
}

/// What belongs to no single block, or to some blocks' tensors only.
#[test]
fn what_is_not_in_a_block_comes_along() {
    let tiny = |arch| Spec::tiny(arch).unwrap();
    let mut table = Table::new();
    table.check(&tiny("llama").rope_factors(RopeFactors::Llama3), &CUTS);
    table.check(&tiny("llama").experts(Experts { n: 4, n_used: 2, n_ff_shared: 0 }), &CUTS);
    // the context is longer than the first value and shorter than the second: one file of factors each
    table.check(&tiny("phi3").rope_factors(RopeFactors::Long { original: 64 }), &CUTS[..2]);
    table.check(&tiny("phi3").rope_factors(RopeFactors::Long { original: 4096 }), &CUTS[..2]);
    table.print("frequency factors, experts");
}

/// Slices that are models of their own: every family for which that is right.
#[test]
fn renumbered_slices_are_exact() {
    let mut table = Table::renumbered();
    for spec in families("f16") {
        table.check(&spec, &[&["1..2", "3..4"]]);
    }
    table.check(&Spec::tiny("phi3").unwrap().rope_factors(RopeFactors::Long { original: 64 }), &CUTS[..1]);
    table.print("renumbered");
}

/// The comparison sees what it is there to see.
#[test]
fn a_wrong_order_or_a_wrong_range_is_noticed() {
    let case = Case::new(&Spec::tiny("qwen2").unwrap());
    let slices = case.cut(&["1..2", "3..4"]);
    let right = case.run(&slices, Precision::F32);
    assert_eq!(compare(&case.stock, &right), Difference { max: 0.0, first_token: None });

    let mut swapped = case.cut(&["1..2", "3..4"]);
    swapped.swap(1, 2);
    let mut short = case.cut(&["1..2", "3..4"]);
    short[2].blocks.start += 1;
    let mut missing = case.cut(&["1..2", "3..4"]);
    missing.remove(1);
    let other = Case::new(&Spec::tiny("qwen2").unwrap().seed(2));
    let mut foreign = case.cut(&["1..2", "3..4"]);
    foreign[2] = other.cut(&["1..2", "3..4"]).remove(2);
    for (what, wrong) in [
        ("swapped", swapped),
        ("one block short", short),
        ("a slice left out", missing),
        ("another model's", foreign),
    ] {
        let difference = compare(&case.stock, &case.run(&wrong, Precision::F32));
        println!(
            "{what}: max |logit difference| {:.2}, first token {:?}",
            difference.max, difference.first_token
        );
        assert!(difference.max > 1.0, "{what}: {difference:?}");
        assert!(difference.first_token.is_some_and(|at| at < 8), "{what}: {difference:?}");
    }
}

/// Families whose blocks cannot be renumbered are refused by name, not cut wrongly; cut as they are, they are exact.
#[test]
fn families_that_cannot_be_renumbered_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut refused = vec![];
    for family in FAMILIES.iter().filter(|family| arch::find(family.arch).is_err()) {
        Spec::tiny(family.arch).unwrap().write(&path).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let request = request(&["2..3"], true);
        let error = Plan::new(&gguf, &request).unwrap_err().to_string();
        assert!(error.contains(family.arch), "{error}");
        refused.push(family.arch);
    }
    assert!(refused.contains(&"gemma"), "{refused:?}");
    let mut table = Table::new();
    refused.iter().for_each(|arch| table.check(&Spec::tiny(arch).unwrap(), &CUTS[..2]));
    table.check(&Spec::tiny("olmo2").unwrap().window(24), &CUTS[..2]);
    table.print("families that cannot be renumbered");

    // OLMo 3: a family that can be cut, with a window in every block but each fourth
    Spec::tiny("olmo2").unwrap().window(24).write(&path).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let error = Plan::new(&gguf, &request(&["2..3"], true)).unwrap_err().to_string();
    assert!(error.contains("olmo2") && error.contains("window"), "{error}");
}

/// With F16 rows between the stages nothing is exact any more; this says how far off it is.
#[test]
fn f16_rows_cost_little() {
    println!("{:<10} {:>9} {:>12} {:>12} {:>8}", "model", "positions", "mean KL", "largest KL", "top-1");
    for arch in ["qwen2", "llama", "qwen3"] {
        let case = Case::new(&Spec::new("demo", Some(arch)).unwrap());
        let slices = case.cut(&["4..7"]);
        let tokens = &case.long_text[..384];
        let exact = case.logits_of_all(&slices, tokens, Precision::F32);
        let rounded = case.logits_of_all(&slices, tokens, Precision::F16);
        let rows = exact.chunks(case.model.n_vocab()).zip(rounded.chunks(case.model.n_vocab()));
        let divergences: Vec<f64> = rows.clone().map(|(p, q)| kl_divergence(p, q)).collect();
        let agree = rows.filter(|(p, q)| argmax(p) == argmax(q)).count() as f64 / tokens.len() as f64;
        let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
        let largest = divergences.iter().fold(0.0, |max: f64, d| max.max(*d));
        println!("{arch:<10} {:>9} {mean:>12.2e} {largest:>12.2e} {:>7.2}%", tokens.len(), agree * 100.0);
        assert!(mean > 0.0, "{arch}: F16 rows that differ in nothing were not F16");
        // seen: mean KL 4e-6 to 1.1e-5, top-1 99.0 to 99.7 %, by CPU; random models have near ties that trained ones have not
        assert!(mean < 5e-5 && agree >= 0.98, "{arch}: mean KL {mean:.2e}, top-1 {agree}");
    }
}

fn request(middles: &[&str], renumber: bool) -> Request {
    let middles: Vec<BlockRange> = middles.iter().map(|range| range.parse().unwrap()).collect();
    Request { middles, renumber, stem: "cut".into(), ..Request::default() }
}

/// Every family that can be renumbered, as a tiny model, with each lm_head its loader takes.
fn families(weights: &str) -> Vec<Spec> {
    let supported = FAMILIES.iter().filter(|family| arch::find(family.arch).is_ok());
    supported
        .flat_map(|family| {
            let heads: &[bool] = match family.head {
                Head::Either => &[false, true],
                Head::Tied => &[true],
                Head::Own => &[false],
            };
            heads.iter().map(|&tied| Spec::tiny(family.arch).unwrap().with_type(weights).unwrap().tied(tied))
        })
        .collect()
}

/// A model, and what stock llama.cpp says.
struct Case {
    folder: tempfile::TempDir,
    path: PathBuf,
    model: Model,
    prompt: Vec<i32>,
    long_text: Vec<i32>,
    stock: Run,
}

/// Tokens generated, and the logits each was chosen from.
struct Run {
    tokens: Vec<i32>,
    /// (n_generated, n_vocab)
    logits: Vec<f32>,
}

/// A slice, loaded, and its part in the pipeline.
#[derive(Clone)]
struct Slice {
    model: Model,
    role: Role,
    blocks: std::ops::Range<u32>,
}

#[derive(Clone, Copy, PartialEq)]
enum Precision {
    F32,
    F16,
}

#[derive(Debug, PartialEq)]
struct Difference {
    max: f32,
    first_token: Option<usize>,
}

impl Case {
    fn new(spec: &Spec) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whole.gguf");
        spec.write(&path).unwrap();
        let model = load(&path, Role::Tail);
        let long_text = model.tokenize(&TEXT.repeat(8), true, false).unwrap();
        let prompt = long_text[..N_PROMPT].to_vec();

        let mut stock = Stock::new(&model, &settings(), Some(1)).unwrap();
        let n_vocab = model.n_vocab();
        let stock = generate(&prompt, n_vocab, |rows, tokens, logits| {
            assert_eq!(stock.decode(rows, tokens, logits).unwrap(), 1);
        });
        Case { folder, path, model, prompt, long_text, stock }
    }

    /// Cuts the model into files, and loads them.
    fn cut(&self, middles: &[&str]) -> Vec<Slice> {
        self.cut_as(&request(middles, false))
    }

    fn cut_as(&self, request: &Request) -> Vec<Slice> {
        let gguf = Gguf::open(&self.path).unwrap();
        let plan = Plan::new(&gguf, request).unwrap();
        let out = self.folder.path().join("slices");
        let manifest = split(&plan, &out, "cut", |_| {}).unwrap();
        let slices = manifest.slices.iter().map(|slice| {
            let model = load(&out.join(&slice.file), slice.role);
            assert_eq!(model.is_slice(), !request.renumber);
            // the model's numbers, or those of a model of its own
            Slice { role: slice.role, blocks: model.blocks(), model }
        });
        slices.collect()
    }

    fn run(&self, slices: &[Slice], precision: Precision) -> Run {
        let mut pipeline = Pipeline::new(slices, precision);
        generate(&self.prompt, self.model.n_vocab(), |rows, tokens, logits| {
            pipeline.step(rows, tokens, logits)
        })
    }

    /// (n_tokens, n_vocab): what the pipeline says after every token of a text.
    fn logits_of_all(&self, slices: &[Slice], tokens: &[i32], precision: Precision) -> Vec<f32> {
        let mut pipeline = Pipeline::new(slices, precision);
        let mut logits = vec![0.0; tokens.len() * self.model.n_vocab()];
        let rows = (0..tokens.len()).map(|i| Row { session: 0, position: i as u32, want_output: true });
        pipeline.step(&rows.collect::<Vec<_>>(), tokens, &mut logits);
        logits
    }
}

/// Stages in order, the output of one the input of the next.
struct Pipeline {
    stages: Vec<Stage>,
    precision: Precision,
    n_embd: usize,
}

impl Pipeline {
    fn new(slices: &[Slice], precision: Precision) -> Pipeline {
        let stages = slices.iter().map(|slice| {
            let params = StageParams {
                blocks: slice.blocks.clone(),
                takes_tokens: slice.role == Role::Head,
                has_lm_head: slice.role == Role::Tail,
                context: settings(),
            };
            Stage::new(&slice.model, params).unwrap()
        });
        Pipeline { stages: stages.collect(), precision, n_embd: slices[0].model.n_embd() }
    }

    fn step(&mut self, rows: &[Row], tokens: &[i32], logits: &mut [f32]) {
        let n = rows.len() * self.n_embd;
        let last = self.stages.len() - 1;
        if self.precision == Precision::F32 {
            let mut hidden = vec![0f32; n]; // (n_rows, n_embd)
            for (i, stage) in self.stages.iter_mut().enumerate() {
                let before = hidden.clone();
                let input = if i == 0 { Input::Tokens(tokens) } else { Input::F32(&before) };
                let output = if i == last { Output::Logits(logits) } else { Output::F32(&mut hidden) };
                stage.evaluate(rows, input, output).unwrap();
            }
        } else {
            let mut hidden = vec![f16::ZERO; n]; // (n_rows, n_embd)
            for (i, stage) in self.stages.iter_mut().enumerate() {
                let before = hidden.clone();
                let input = if i == 0 { Input::Tokens(tokens) } else { Input::F16(&before) };
                let output = if i == last { Output::Logits(logits) } else { Output::F16(&mut hidden) };
                stage.evaluate(rows, input, output).unwrap();
            }
        }
    }
}

fn load(path: &Path, role: Role) -> Model {
    let params =
        ModelParams { gpu_layers: Some(0), no_lm_head: role != Role::Tail, ..ModelParams::default() };
    Model::load(&[path], params).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One thread, and prompts in two chunks.
fn settings() -> ContextParams {
    ContextParams { n_ctx: 512, n_batch: 512, n_ubatch: 64, n_threads: 1, ..ContextParams::default() }
}

/// Greedy: the prompt at once, then token by token.
fn generate(prompt: &[i32], n_vocab: usize, mut step: impl FnMut(&[Row], &[i32], &mut [f32])) -> Run {
    let mut run = Run { tokens: vec![], logits: vec![] };
    let mut logits = vec![0.0; n_vocab];
    step(&Row::chunk(0, 0, prompt.len()), prompt, &mut logits);
    for i in 0..N_GENERATED {
        if i > 0 {
            let position = prompt.len() + i - 1;
            step(&Row::chunk(0, position as u32, 1), &run.tokens[i - 1..], &mut logits);
        }
        run.tokens.push(argmax(&logits) as i32);
        run.logits.extend(&logits);
    }
    run
}

fn compare(a: &Run, b: &Run) -> Difference {
    // a NaN must not pass for no difference
    let max = a.logits.iter().zip(&b.logits).fold(0f32, |max, (a, b)| {
        let difference = (a - b).abs();
        if difference > max || difference.is_nan() { difference } else { max }
    });
    Difference { max, first_token: a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b) }
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

/// How much a reader of `q` is surprised by `p`, in nats; both are logits.
fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let max = f64::from(logits[argmax(logits)]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        logits.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
    };
    log_softmax(p).iter().zip(log_softmax(q)).map(|(&p, q)| p.exp() * (p - q)).sum()
}

/// One line per model and cut.
struct Table {
    /// of slices that are models of their own
    renumber: bool,
    text: String,
    families: HashSet<&'static str>,
    failures: Vec<String>,
}

impl Table {
    fn new() -> Table {
        let text = format!(
            "{:<26} {:<6} {:<12} {:>6} {:>8} {:>13} {:>10}\n",
            "model", "tied", "middles", "slices", "tokens", "max |diff|", "distinct"
        );
        Table { renumber: false, text, families: HashSet::new(), failures: vec![] }
    }

    fn renumbered() -> Table {
        Table { renumber: true, ..Table::new() }
    }

    fn check(&mut self, spec: &Spec, cuts: &[&[&str]]) {
        let case = Case::new(spec);
        let name = spec.name();
        assert_is_a_fair_oracle(&name, &case.stock, case.model.n_vocab());
        let distinct = case.stock.tokens.iter().collect::<HashSet<_>>().len();
        let tied = Gguf::open(&case.path).unwrap().tensor("output.weight").is_none();
        for middles in cuts {
            let slices = case.cut_as(&request(middles, self.renumber));
            let difference = compare(&case.stock, &case.run(&slices, Precision::F32));
            let same = difference.first_token.unwrap_or(N_GENERATED);
            let line = format!(
                "{name:<26} {tied:<6} {:<12} {:>6} {:>8} {:>13e} {distinct:>10}",
                middles.join(" "),
                slices.len(),
                format!("{same}/{N_GENERATED}"),
                difference.max,
            );
            writeln!(self.text, "{line}").unwrap();
            if difference != (Difference { max: 0.0, first_token: None }) {
                self.failures.push(line);
            }
        }
        self.families.insert(spec.arch());
    }

    fn print(&self, title: &str) {
        println!("{title}: {} prompt tokens, {} generated\n{}", N_PROMPT, N_GENERATED, self.text);
        assert!(self.failures.is_empty(), "not exact:\n{}", self.failures.join("\n"));
    }
}

/// A model whose logits are flat, or that repeats itself, would agree with anything.
fn assert_is_a_fair_oracle(name: &str, run: &Run, n_vocab: usize) {
    assert!(run.logits.iter().all(|x| x.is_finite()), "{name}: logits that are not finite");
    for logits in run.logits.chunks(n_vocab) {
        let mean = logits.iter().sum::<f32>() / n_vocab as f32;
        let deviation = (logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n_vocab as f32).sqrt();
        assert!((2.5..6.0).contains(&deviation), "{name}: logits with a deviation of {deviation}");
    }
    let distinct = run.tokens.iter().collect::<HashSet<_>>().len();
    assert!(distinct >= 16, "{name}: {distinct} different tokens of {N_GENERATED}");
}

const TEXT: &str = "The river was wide and slow where the town began, and in the morning the boats lay still on it. \
    Nobody in the house had slept. There were letters to be written, and a clock that was never right, and the dog \
    went from room to room as if it were counting them. ";
