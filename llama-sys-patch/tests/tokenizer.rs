//! Texts that are made to end the tokenizer: a run of one kind of character, as long as one likes, under every
//! pre-tokenizer there is. A stack that overflows ends this whole test program with SIGABRT; the last line on stderr
//! names the pre-tokenizer.

use std::path::Path;

use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Entry, Gguf, Value};
use gguf_tools::synth::Spec;
use llama_sys_patch::{Error, Model, ModelParams, ModelPart};

mod common;

/// Characters of a run. Room for what is not the recursion (1 MiB) is 5 % of what this many may take.
const RUN: usize = 20_000;

/// All that llama.cpp names but two that want a vocabulary of another kind: gemma4 is split without `std::regex`,
/// whitespace (an embedder's) is refused.
const PRE_TOKENIZERS: [&str; 90] = [
    "a.x-4.0",
    "afmoe",
    "bailingmoe",
    "bailingmoe2",
    "bloom",
    "chameleon",
    "chatglm-bpe",
    "codeshell",
    "cohere2moe",
    "command-r",
    "dbrx",
    "deepseek-coder",
    "deepseek-llm",
    "deepseek-r1-qwen",
    "deepseek-v3",
    "default",
    "exaone",
    "exaone-moe",
    "exaone4",
    "f2llmv2",
    "falcon",
    "falcon-h1",
    "falcon3",
    "gigachat",
    "glm4",
    "glm5",
    "gpt-2",
    "gpt-4o",
    "gpt3-finnish",
    "granite-docling",
    "granite-embed-multi-311m",
    "granite-embed-multi-97m",
    "grok-2",
    "hunyuan",
    "hunyuan-dense",
    "hy_v4",
    "jais",
    "jais-2",
    "jina-de",
    "jina-es",
    "jina-v1-en",
    "jina-v2-code",
    "jina-v2-de",
    "jina-v2-es",
    "jina-v5-nano",
    "joyai-llm",
    "kanana2",
    "kimi-k2",
    "kormo",
    "laguna",
    "lfm2",
    "llada-moe",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "llama4",
    "megrez",
    "mellum",
    "mellum2",
    "midm-2.0",
    "minerva-7b",
    "minicpm5",
    "minimax-m2",
    "mmbert",
    "modern-bert",
    "mpt",
    "olmo",
    "phi-2",
    "pixtral",
    "poro-chat",
    "qwen2",
    "qwen35",
    "refact",
    "roberta-bpe",
    "sarvam-moe",
    "seed-coder",
    "smaug-bpe",
    "smollm",
    "solar-open",
    "spark2_5",
    "stablelm2",
    "starcoder",
    "superbpe",
    "talkie",
    "tekken",
    "tiny_aya",
    "trillion",
    "ufakzeka",
    "viking",
    "youtu",
];

/// One of each class that the expressions tell apart, and two that alternate.
const RUNS: [&str; 12] = ["A", "a", "1", " ", "\n", "\t", "!", "é", "中", "。", "😀", "aA"];

/// The file's metadata with another pre-tokenizer, and no tensors: enough for its vocabulary.
fn with_pre(model: &Gguf, path: &Path, pre: &str) -> Model {
    let key = "tokenizer.ggml.pre";
    let value =
        |e: Entry<'_>| if e.key == key { Value::String(pre.as_bytes().into()) } else { e.value.into_owned() };
    let metadata: Vec<_> = model.metadata().map(|e| (e.key.to_owned(), value(e))).collect();
    assert!(metadata.iter().any(|(k, _)| k == key), "the synthetic model names its pre-tokenizer");
    let specs: Vec<TensorSpec> = Vec::new();
    GgufWriter::create(path, &metadata, &specs).unwrap().finish().unwrap();
    let params = ModelParams { part: ModelPart::Tokenizer, gpu_layers: Some(0), ..Default::default() };
    Model::load(&[path], params).unwrap_or_else(|e| panic!("{pre}: {e}"))
}

#[test]
fn a_run_of_one_kind_of_character_ends_no_tokenizer() {
    let file = common::write(&Spec::tiny("qwen2").unwrap());
    let gguf = Gguf::open(&file.path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for pre in PRE_TOKENIZERS {
        eprintln!("{pre}");
        let model = with_pre(&gguf, &folder.path().join("pre.gguf"), pre);
        for run in RUNS {
            // superbpe looks ahead over the whole run at every character: 20,000 take it 50 s
            let text = run.repeat(if pre == "superbpe" { RUN / 10 } else { RUN });
            let tokens =
                model.tokenize(&text, false, false).unwrap_or_else(|e| panic!("{pre}: {run:?}: {e}"));
            let mut bytes = Vec::new();
            tokens.iter().for_each(|&t| bytes.extend(model.token_bytes(t).unwrap()));
            // two do not write characters as bytes, and this vocabulary has no tokens for what they look up
            let dropped = bytes.is_empty();
            assert!(bytes == text.as_bytes() || dropped, "{pre}: {run:?}: the text came back otherwise");
        }
    }
}

/// llama.cpp's merges assert that there is no space in a word, and the words of this one are made of them.
#[test]
fn a_tokenizer_that_would_end_the_process_at_two_spaces_is_refused() {
    let file = common::write(&Spec::tiny("qwen2").unwrap());
    let folder = tempfile::tempdir().unwrap();
    let model = with_pre(&Gguf::open(&file.path).unwrap(), &folder.path().join("pre.gguf"), "whitespace");
    for text in ["a  b", "a"] {
        let error = model.tokenize(text, false, false).unwrap_err();
        assert!(error.to_string().contains("split at white space"), "{error}");
    }
}

#[test]
fn a_line_that_is_too_long_for_any_stack_is_a_sentence() {
    let model = common::load(&Spec::tiny("qwen2").unwrap());
    let text = format!("first\n{}", "A".repeat((1 << 20) + 1));
    let error = model.tokenize(&text, false, false).unwrap_err();
    assert!(
        matches!(&error, Error::InvalidArgument(why) if why.contains("1048577 characters at byte 6")),
        "{error}"
    );
    // the same in lines is no trouble
    let lines = ["A".repeat(1000), "A".repeat(1000)].join("\n").repeat(20);
    assert!(!model.tokenize(&lines, false, false).unwrap().is_empty());
}
