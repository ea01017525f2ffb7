//! What clients get who are served at once: with `--exact` what each gets alone, to the token, whatever happens to the worker;
//! in batches, which is the default, what `llama_decode` gives for the same batch, to the bit.
//!
//! `make faults` (DIM_FAULTS=1) runs as many of each as the tables of docs/TESTING.md say; every run of the tests a few.

mod common;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use common::served::{BEGINNINGS, N, Server, generated_one, greedy, parallel, tokens};
use common::{Cut, Numbers, PROMPT, Worker};
use dim::stage::load::{LoadOptions, load_stage};
use dim::stage::remote::WorkerStage;
use dim::{BlockRange, CallOff, Host, Key, Patience, Resources, RowType};
use dim_core::bell::Bell;
use dim_core::ids::{JobId, SessionId};
use dim_core::pipeline::{Pipeline, StageSlot, Step};
use dim_core::rows::Rows;
use dim_core::schedule::StepKind;
use dim_core::shared::{Client, SharedPipeline};
use dim_core::stage::{Answer, RemoteStage, Span, StageError, TakeBack, Traffic};
use dim_wire::RowTypes;
use dim_wire::rows::Shape;
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::Timing;
use gguf_tools::slice::SliceInfo;
use llama_sys_patch::{ContextParams, Model, ModelParams, Row, Stock};
use serde_json::Value;

#[test]
fn clients_at_once_get_what_each_gets_alone() {
    let cut = Cut::tiny("qwen2");
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--parallel", "17"]);
    let beginnings: Vec<usize> = (0..16).map(|i| i * 15).collect();
    let expected: Vec<_> =
        beginnings.iter().map(|&begin| generated_one(&cut, &worker.address, begin, N, &[])).collect();
    // as many slots as clients, and fewer: then they wait for each other, too
    for (clients, slots) in [(4, "4"), (16, "16"), (16, "4")] {
        let server = Server::start(&cut, &worker.address, &["--parallel", slots, "--exact"]);
        let barrier = Barrier::new(clients);
        std::thread::scope(|scope| {
            for (&begin, expected) in beginnings.iter().zip(&expected).take(clients) {
                let (server, barrier) = (&server, &barrier);
                scope.spawn(move || {
                    let mut body = greedy(&PROMPT[begin..], N);
                    body["cache_prompt"] = false.into();
                    barrier.wait();
                    assert_eq!(&server.streamed(&body), expected, "{clients} on {slots}, from {begin}");
                });
            }
        });
    }
}

/// The tokens of texts, as the host reads them.
fn tokenized(cut: &Cut, texts: &[&str]) -> Vec<Vec<i32>> {
    let resources = Resources { n_ctx: 64, n_threads: Some(1), ..Resources::default() };
    let host = Host::open(&cut.split).unwrap().resources(resources).connect(|_| {}).unwrap();
    texts.iter().map(|text| host.tokenize(text, true).unwrap()).collect()
}

/// Where what is held ends with a chunk, the rest goes in the chunks in which it would have gone without.
#[test]
fn a_beginning_of_whole_chunks_is_taken_over_to_the_bit() {
    const CHUNK: usize = 16;
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let ubatch = ["--ubatch", "16"];
    let expected = BEGINNINGS.map(|begin| generated_one(&cut, &worker.address, begin, N, &ubatch));
    let server = Server::start(&cut, &worker.address, &ubatch);
    let texts = BEGINNINGS.map(|begin| &PROMPT[begin..]);
    for (i, prompt) in tokenized(&cut, &texts).into_iter().enumerate() {
        assert!(prompt.len() > 2 * CHUNK + 1);
        let mut another = prompt[..2 * CHUNK].to_vec();
        another.push((prompt[2 * CHUNK] + 1) % 256);
        server.tokens(&greedy(another, 3));
        let mut body = greedy(texts[i], N);
        body["logprobs"] = 5.into();
        let with = server.post("/v1/completions", &body).json();
        assert_eq!(with["timings"]["cache_n"], 2 * CHUNK, "{with}");
        body["cache_prompt"] = false.into();
        let without = server.post("/v1/completions", &body).json();
        assert_eq!(without["timings"]["cache_n"], 0, "{without}");
        assert!(with["choices"][0]["logprobs"].is_object(), "{with}");
        assert_eq!(with["choices"], without["choices"], "log probabilities too");
        assert_eq!(tokens(&with["choices"][0]["tokens"]), expected[i]);
    }
}

/// A worker's stage that notes what it is sent: what the schedule has put together.
struct Noted {
    stage: WorkerStage,
    steps: Arc<Mutex<Vec<Vec<Span>>>>,
}

impl RemoteStage for Noted {
    fn name(&self) -> String {
        self.stage.name()
    }
    fn blocks(&self) -> Option<BlockRange> {
        self.stage.blocks()
    }
    fn max_in_flight(&self) -> usize {
        self.stage.max_in_flight()
    }
    fn submit(&mut self, job: JobId, spans: &[Span], tokens: &[i32], rows: &Rows) -> Result<(), StageError> {
        self.steps.lock().unwrap().push(spans.to_vec());
        self.stage.submit(job, spans, tokens, rows)
    }
    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        self.stage.poll(rows)
    }
    fn collect_until(
        &mut self,
        rows: &mut Rows,
        until: Option<Instant>,
    ) -> Result<Option<Answer>, StageError> {
        self.stage.collect_until(rows, until)
    }
    fn notify(&mut self, bell: Option<Bell>) {
        self.stage.notify(bell);
    }
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.stage.rewind(session, position)
    }
    fn begin_reconnect(&mut self, bell: &Bell) {
        self.stage.begin_reconnect(bell);
    }
    fn poll_connected(&mut self) -> Result<bool, StageError> {
        self.stage.poll_connected()
    }
    fn traffic(&self) -> Traffic {
        self.stage.traffic()
    }
}

const SMALL: Resources =
    Resources { n_ctx: 256, n_threads: Some(1), n_ubatch: 16, gpu_layers: None, snapshots: 0 };

/// Head and tail here, the middle at a worker over rows of F32.
fn noted_pipeline(cut: &Cut, worker: &Worker, sessions: u32) -> (Pipeline, Arc<Mutex<Vec<Vec<Span>>>>) {
    let options = LoadOptions { resources: SMALL, mmap: false, max_sessions: sessions, compute_bytes: None };
    let here = |i: usize| {
        let (path, info) = (cut.slice(i), SliceInfo::read(cut.slice(i)).unwrap());
        StageSlot::Local(Box::new(load_stage(&path, &info, &options, |_| {}).unwrap()))
    };
    let slice = SliceInfo::read(cut.slice(1)).unwrap();
    let terms = Terms {
        row_types: RowTypes::F32,
        role: SliceRole::Middle,
        shape: Shape::hidden(slice.hparams.n_embd),
        n_blocks: slice.model_blocks,
        blocks: slice.blocks,
        n_ctx: SMALL.n_ctx,
        max_rows: SMALL.n_ubatch,
        max_sessions: sessions,
        max_in_flight: 4,
        take_back: TakeBack::NOTHING,
        model: Some(slice.model_sha256),
        slice: Some(slice.slice_sha256),
        params: slice.params_sha256,
        arch: slice.hparams.arch.clone(),
        ..Terms::blank(1, "test 0", "test")
    };
    let key = Key::from_file(&cut.key).unwrap();
    let (timing, limit) = (Timing::default(), Duration::from_secs(60));
    let stage =
        WorkerStage::connect(&worker.address, &key, terms, sessions, timing, limit, &CallOff::new()).unwrap();
    let steps = Arc::default();
    let noted = Noted { stage, steps: Arc::clone(&steps) };
    let stages = vec![here(0), StageSlot::Remote(Box::new(noted)), here(2)];
    (Pipeline::new(stages, RowType::F32, Patience::default()), steps)
}

fn stock_of(cut: &Cut, resources: Resources, sessions: u32) -> Stock {
    let params = ModelParams { gpu_layers: Some(0), ..Default::default() };
    let model = Model::load(&[&cut.model], params).unwrap();
    let context = ContextParams {
        n_ctx: resources.n_ctx,
        n_batch: resources.n_ubatch,
        n_ubatch: resources.n_ubatch,
        n_threads: 1,
        max_sessions: sessions,
        ..Default::default()
    };
    Stock::new(&model, &context, None).unwrap()
}

/// By session and position: the token, and the logits behind it where they were wanted.
type Computed = Mutex<HashMap<(u32, u32), (i32, Option<Vec<f32>>)>>;

/// A prompt in chunks, then a greedy reply of `n` tokens, all noted.
fn reply(client: &mut Client, prompt: &[i32], n: usize, computed: &Computed) {
    let session = client.session();
    let mut position = 0;
    let mut evaluate = |tokens: &[i32], kind, is_last: bool| {
        let mut want_logits = vec![false; tokens.len()];
        want_logits[tokens.len() - 1] = is_last;
        let step = Step { session, position, tokens: tokens.to_vec(), want_logits, kind };
        let mut logits = None;
        client
            .run([step], None, |got| {
                logits = is_last.then_some(got);
                None
            })
            .unwrap();
        let best = logits.as_deref().map_or(0, likeliest);
        let mut computed = computed.lock().unwrap();
        for (i, &token) in (position..).zip(tokens) {
            computed.insert((session.0, i), (token, None));
        }
        position += tokens.len() as u32;
        computed.get_mut(&(session.0, position - 1)).unwrap().1 = logits;
        best
    };
    let chunks: Vec<&[i32]> = prompt.chunks(SMALL.n_ubatch as usize).collect();
    let mut token = 0;
    for (i, chunk) in chunks.iter().enumerate() {
        token = evaluate(chunk, StepKind::Prefill, i + 1 == chunks.len());
    }
    for _ in 0..n {
        token = evaluate(&[token], StepKind::Decode, true);
    }
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> i32 {
    let best = logits.iter().enumerate().reduce(|a, b| if b.1 > a.1 { b } else { a });
    best.map_or(0, |(i, _)| i as i32)
}

/// What is promised of batches, over a worker: whichever the schedule forms while replies come and go, each gives what
/// `llama_decode` gives for the same rows in one batch, by the whole model.
#[test]
fn every_batch_over_a_worker_is_llama_decode_s_on_the_same_rows() {
    for (arch, sessions) in [("qwen2", 4u32), ("llama", 16)] {
        let cut = Cut::tiny(arch);
        let worker =
            Worker::start(&cut.slice(1), &cut.key, &["--parallel", &sessions.to_string(), "--ctx", "256"]);
        let (mut pipeline, steps) = noted_pipeline(&cut, &worker, sessions);
        pipeline.set_batch_rows(sessions);
        let shared = SharedPipeline::new(pipeline, sessions);
        let computed = Computed::default();
        std::thread::scope(|scope| {
            for i in 0..sessions as usize {
                let (mut client, computed) = (shared.client().unwrap(), &computed);
                // of other lengths, so that some still read their prompts while others reply, and some end before others
                let prompt: Vec<i32> = (0..3 + 5 * i).map(|j| ((i * 31 + j * 7) % 250) as i32).collect();
                scope.spawn(move || reply(&mut client, &prompt, 20 + 3 * (i % 5), computed));
            }
        });
        let (steps, computed) = (steps.lock().unwrap(), computed.lock().unwrap());
        let mut stock = stock_of(&cut, SMALL, sessions);
        let n_vocab = stock.model().n_vocab();
        let mut n_compared = 0;
        for spans in steps.iter() {
            let places: Vec<(u32, u32)> = spans
                .iter()
                .flat_map(|span| (0..span.count).map(|i| (span.session, span.position + i)))
                .collect();
            let is_wanted = |at: &(u32, u32)| computed[at].1.is_some();
            let rows: Vec<Row> = places
                .iter()
                .map(|at| Row { session: at.0, position: at.1, want_output: is_wanted(at) })
                .collect();
            let tokens: Vec<i32> = places.iter().map(|at| computed[at].0).collect();
            let got: Vec<f32> =
                places.iter().filter_map(|at| computed[at].1.as_deref()).flatten().copied().collect();
            let mut expected = vec![0.0; got.len()];
            stock.decode(&rows, &tokens, &mut expected).unwrap();
            assert!(got == expected, "{arch}: {spans:?}");
            n_compared += got.len() / n_vocab;
        }
        let n_replied: usize = (0..sessions as usize).map(|i| 1 + 20 + 3 * (i % 5)).sum();
        assert_eq!(n_compared, n_replied, "every one was compared");
        let together: usize = steps.iter().map(Vec::len).filter(|&n| n > 1).sum();
        assert!(together > n_compared / 4, "{arch}: of {n_compared} rows {together} went together");
    }
}

/// What became of the streams while workers were killed under them.
struct Kills {
    kills: usize,
    streams: usize,
    /// with all their tokens
    whole: usize,
    /// with the tokens of the run without kills
    same: usize,
    /// the longest a stream had nothing to say, of each stream
    pauses: Vec<Duration>,
}

/// A stream: its tokens, and the longest wait for one.
fn listened_to(server: &Server, body: &Value) -> (Vec<i32>, Duration) {
    let (mut got, mut longest, mut last) = (Vec::new(), Duration::ZERO, Instant::now());
    for event in server.events(body) {
        longest = longest.max(last.elapsed());
        last = Instant::now();
        got.extend(tokens(&event["choices"][0]["tokens"]));
    }
    (got, longest)
}

/// Four clients stream all the time, while their worker is killed and started again `n` times.
fn killed(cut: &Cut, more: &[&str], n: usize) -> Kills {
    const LONG: usize = 128;
    let mut worker = parallel(cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let server = Server::start(cut, &address, &[&["--parallel", "4"], more].concat());
    let bodies = BEGINNINGS.map(|begin| {
        let mut body = greedy(&PROMPT[begin..], LONG);
        body["cache_prompt"] = false.into();
        body
    });
    let expected = bodies.each_ref().map(|body| server.streamed(body));
    let (is_over, outcomes) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let health = |server: &Server, of: &str| server.get("/health")[of].clone();
    std::thread::scope(|scope| {
        for (body, expected) in bodies.iter().zip(&expected) {
            let (server, is_over, outcomes) = (&server, &is_over, &outcomes);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let (got, pause) = listened_to(server, body);
                    outcomes.lock().unwrap().push((got.len() == LONG, &got == expected, pause));
                }
            });
        }
        let mut numbers = Numbers(common::seed());
        for kill in 1..=n {
            server.comes_true("all four stream", |server| server.get("/props")["slots_busy"] == 4);
            std::thread::sleep(Duration::from_millis(20 + numbers.below(200)));
            worker.kill();
            server.comes_true("it is noticed", |server| health(server, "lost").as_u64() >= Some(kill as u64));
            worker = parallel(cut, &address);
            server.comes_true("it is back", |server| health(server, "status") == "ok");
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let outcomes = outcomes.into_inner().unwrap();
    let mut pauses: Vec<Duration> = outcomes.iter().map(|outcome| outcome.2).collect();
    pauses.sort_unstable();
    Kills {
        kills: n,
        streams: outcomes.len(),
        whole: outcomes.iter().filter(|outcome| outcome.0).count(),
        same: outcomes.iter().filter(|outcome| outcome.1).count(),
        pauses,
    }
}

/// A few in every run.
#[test]
fn workers_killed_under_four_streams_change_no_token_of_any() {
    let cut = Cut::tiny("qwen2");
    let apart = killed(&cut, &["--exact"], 4);
    assert!(apart.streams >= 4);
    assert_eq!((apart.whole, apart.same), (apart.streams, apart.streams));
    // which batches there are depends on who waits when: of those it is the tokens' number that is promised
    let batched = killed(&cut, &[], 2);
    assert_eq!(batched.whole, batched.streams);
}

/// All of them: `make faults`.
#[test]
fn the_table_of_kills_under_streams() {
    if !common::makes_tables() {
        return;
    }
    let cut = Cut::tiny("qwen2");
    let mut table = String::from(
        "Workers that are killed under four streams\n| rows of several replies | kills | streams | whole | as without kills | longest pause, p50 | most |\n\
         |---|---:|---:|---:|---:|---:|---:|\n",
    );
    let mut wrong = 0;
    for (name, more, n) in [("apart (`--exact`)", &["--exact"][..], 100), ("in batches", &[][..], 25)] {
        let Kills { kills, streams, whole, same, pauses } = killed(&cut, more, n);
        let (p50, most) = (pauses[streams / 2].as_millis(), pauses[streams - 1].as_millis());
        let line = format!("| {name} | {kills} | {streams} | {whole} | {same} | {p50} ms | {most} ms |");
        println!("{line}");
        writeln!(table, "{line}").unwrap();
        wrong += streams - whole;
        wrong += if more.is_empty() { 0 } else { streams - same };
    }
    common::leave_table("4-together", &table);
    assert_eq!(wrong, 0);
}

/// Whole answers to `prompts` by the server, `clients` at once.
fn by_server(server: &Server, prompts: &[Vec<i32>], clients: usize, n: usize) -> Vec<Vec<i32>> {
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(vec![Vec::new(); prompts.len()]));
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(prompt) = prompts.get(i) else { return };
                    let mut body = greedy(prompt.clone(), n);
                    body["cache_prompt"] = false.into();
                    let answer = server.tokens(&body);
                    answers.lock().unwrap()[i] = answer;
                }
            });
        }
    });
    answers.into_inner().unwrap()
}

/// The same by stock llama.cpp, in one context with `n_sequences`: each prompt by itself, then the next token of every
/// sequence in one batch; who is done makes room for the next.
fn by_stock(stock: &mut Stock, prompts: &[Vec<i32>], n_sequences: u32, n: usize) -> Vec<Vec<i32>> {
    let n_vocab = stock.model().n_vocab();
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut waiting = 0..prompts.len();
    let mut running: Vec<(u32, usize)> = Vec::new();
    loop {
        for sequence in 0..n_sequences {
            if running.iter().any(|one| one.0 == sequence) {
                continue;
            }
            let Some(i) = waiting.next() else { break };
            stock.clear(sequence).unwrap();
            let last = prompts[i].len() - 1;
            let row = |j: usize| Row { session: sequence, position: j as u32, want_output: j == last };
            let rows: Vec<Row> = (0..=last).map(row).collect();
            let mut logits = vec![0.0; n_vocab];
            stock.decode(&rows, &prompts[i], &mut logits).unwrap();
            answers[i].push(likeliest(&logits));
            running.push((sequence, i));
        }
        running.retain(|&(_, i)| answers[i].len() < n);
        if running.is_empty() {
            if waiting.is_empty() {
                return answers;
            }
            continue;
        }
        let position = |i: usize| (prompts[i].len() + answers[i].len() - 1) as u32;
        let row = |&(session, i): &(u32, usize)| Row { session, position: position(i), want_output: true };
        let rows: Vec<Row> = running.iter().map(row).collect();
        let tokens: Vec<i32> = running.iter().map(|&(_, i)| *answers[i].last().unwrap()).collect();
        let mut logits = vec![0.0; rows.len() * n_vocab];
        stock.decode(&rows, &tokens, &mut logits).unwrap();
        for (&(_, i), logits) in running.iter().zip(logits.chunks(n_vocab)) {
            answers[i].push(likeliest(logits));
        }
    }
}

/// How many whole answers are the same, and how many of the tokens stand before the first that is another.
fn agreement(got: &[Vec<i32>], alone: &[Vec<i32>]) -> (usize, f64) {
    let lengths = |all: &[Vec<i32>]| all.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(got), lengths(alone), "an answer is not whole");
    let same = got.iter().zip(alone).filter(|(a, b)| a == b).count();
    let before: usize =
        got.iter().zip(alone).map(|(a, b)| a.iter().zip(b).take_while(|(a, b)| a == b).count()).sum();
    (same, before as f64 / alone.iter().map(Vec::len).sum::<usize>().max(1) as f64)
}

/// Of each number of clients: what agrees with the answers that each gets alone, by the server and by stock.
fn agreements(cut: &Cut, texts: &[&str], clients: &[usize], n: usize) -> Vec<((usize, f64), (usize, f64))> {
    let prompts = tokenized(cut, texts);
    let most = clients.iter().copied().max().unwrap_or(1);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--parallel", &(most + 1).to_string()]);
    let resources = Resources { n_ctx: 512, ..Resources::default() };
    let mut stock = stock_of(cut, resources, most as u32);
    let alone = by_stock(&mut stock, &prompts, 1, n);
    let one = |&clients: &usize| {
        let server = Server::start(cut, &worker.address, &["--parallel", &clients.to_string()]);
        let by_server = by_server(&server, &prompts, clients, n);
        let by_stock = match clients {
            1 => alone.clone(),
            _ => by_stock(&mut stock, &prompts, clients as u32, n),
        };
        (agreement(&by_server, &alone), agreement(&by_stock, &alone))
    };
    clients.iter().map(one).collect()
}

/// One at a time the server's answers are those of stock llama.cpp; four at a time they are whole.
#[test]
fn answers_in_batches_are_whole_and_alone_they_are_stock_s() {
    let cut = Cut::tiny("llama");
    let texts = BEGINNINGS.map(|begin| &PROMPT[begin..]);
    let found = agreements(&cut, &texts, &[1, 4], 24);
    assert_eq!(found[0], ((4, 1.0), (4, 1.0)));
}

/// The trained model as it was fetched and in F16, whose rows llama.cpp multiplies by other kernels; without it a tiny one.
fn kinds_of_weights() -> Vec<(&'static str, Cut)> {
    let Some(model) = common::real_model() else { return vec![("tiny, random, F16", Cut::tiny("llama"))] };
    let folder = tempfile::tempdir().unwrap();
    let half = folder.path().join("half.gguf");
    let mut command = std::process::Command::new(common::host_program().with_file_name("dim-dequantise"));
    let output = common::run(command.arg(&model).arg(&half));
    assert!(output.status.success(), "{}", common::text(&output.stderr));
    let of = |file: &std::path::Path| Cut::of_file(file, &["10..19"]);
    vec![("SmolLM2-135M-Instruct, Q4_1", of(&model)), ("the same as F16", of(&half))]
}

/// How often answers in batches are what they are alone, with trained weights where they are here: `make faults`.
#[test]
fn the_table_of_answers_in_batches() {
    if !common::makes_tables() {
        return;
    }
    const TOKENS: usize = 32;
    let texts: Vec<&str> = (0..16).map(|i| &PROMPT[i * 12..120 + i * 12]).collect();
    let (clients, n) = ([1, 4, 16], texts.len());
    let mut table = format!(
        "Answers in batches, and alone\nGreedy answers of {TOKENS} tokens to {n} prompts, over the f32 wire: how many are, whole, those \
         that each gets alone, and how many of the tokens stand before the first that is another.\n\n\
         | weights | at once | server | tokens | stock | tokens |\n|---|---:|---:|---:|---:|---:|\n"
    );
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    for (name, cut) in kinds_of_weights() {
        let found = agreements(&cut, &texts, &clients, TOKENS);
        for (clients, (server, stock)) in clients.iter().zip(found) {
            let (a, b) = (percent(server.1), percent(stock.1));
            let line =
                format!("| {name} | {clients} | {} of {n} | {a} | {} of {n} | {b} |", server.0, stock.0);
            println!("{line}");
            writeln!(table, "{line}").unwrap();
        }
    }
    common::leave_table("5-together", &table);
}
