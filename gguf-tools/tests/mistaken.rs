//! Files that people take for a model, or that only look like one: what they are is said, and what to do. And nothing of
//! a file's text does anything but stand there.
#![cfg(unix)]
#![allow(missing_docs)]

mod common;

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Stdio},
};

use common::{ARRAY, Raw, STRING, U32, array, string, with_key};
use gguf_tools::{
    gguf::{Gguf, NotAModel, Rule, TensorType, Value, check, write::TensorSpec},
    manifest::Manifest,
    slice::{self, SliceInfo},
    synth::Spec,
};

const MIDDLE: [&str; 2] = ["--middle", "1..1"];

/// Exit code, standard output, standard error of the program.
fn dim_split(model: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_dim-split")).arg(model).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn files_people_take_for_a_model_are_named_with_what_to_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let typed = |kind: &str| {
        let mut raw = Raw::model();
        raw.key("general.type", STRING, string(kind));
        raw.bytes()
    };
    let mut old_projector = Raw::model();
    old_projector.key("general.architecture", STRING, string("clip"));
    let mut vocabulary = Raw::model();
    vocabulary.tensors.clear();
    vocabulary.data.clear();
    let lora = {
        // as llama.cpp's converter writes it: no dimensions of a model at all
        let mut raw = Raw::empty();
        raw.key("general.architecture", STRING, string("llama"));
        raw.key("general.type", STRING, string("adapter"));
        raw.key("adapter.type", STRING, string("lora"));
        raw.tensor("blk.0.attn_q.weight.lora_a", 0, &[32, 8]);
        raw.bytes()
    };
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 1\n", 0);
    let whole = Raw::model().bytes();
    let cut_off = whole[..whole.len() - 1000].to_vec();
    let mut encoder = Raw::model();
    for tensor in &mut encoder.tensors {
        let name = String::from_utf8(tensor.name.clone()).unwrap();
        tensor.name = name.replace("blk.", "dec.blk.").into_bytes();
    }
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (encoder.bytes(), "'blk.0.*': missing", "have an encoder"),
        (pointer.into_bytes(), "git-LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head><title>x</title></head></html>".to_vec(), "web page", "download"),
        (b"\n<HTML lang=\"en\"><body>moved</body></HTML>".to_vec(), "web page", "download"),
        (b"PK\x03\x04 and what else a PyTorch archive holds".to_vec(), "zip archive", "GGUF"),
        (b"\x40\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"}}".to_vec(), "safetensors", "GGUF"),
        (b"tjgg\x03\0\0\0 and twenty bytes of more".to_vec(), "formats before GGUF", "GGUF"),
        (b"anything else that has some bytes".to_vec(), "not a GGUF file", "check the path"),
        (lora, "LoRA adapter", "model that it changes"),
        (typed("mmproj"), "projector", "language model"),
        (old_projector.bytes(), "projector", "language model"),
        (typed("imatrix"), "importance matrix", "model's own"),
        (vocabulary.bytes(), "vocabulary without weights", "model's own"),
        (cut_off, "the download broke off", "download again"),
    ];
    for (bytes, is, fetch) in &cases {
        fs::write(&path, bytes).unwrap();
        let (code, _, stderr) = dim_split(&path, &MIDDLE);
        assert_eq!(code, Some(2), "{is}: {stderr}");
        let lines: Vec<&str> = stderr.lines().collect();
        assert!(
            lines.len() == 2 && lines[0].starts_with("error: ") && lines[0].contains(is),
            "{is}: {stderr}"
        );
        assert!(lines[1].starts_with("hint: ") && lines[1].contains(fetch), "{is}: {stderr}");
    }
    assert_eq!(names(dir.path()), ["m.gguf"]);
    // and the other way of asking says the same
    let gguf = Gguf::from_bytes(typed("adapter")).unwrap();
    let error = check::model(&gguf).unwrap_err();
    assert!(matches!(*error.rule, Rule::NotAModel(NotAModel::Adapter)), "{error}");
    // a model that says it is one is one
    check::model(&Gguf::from_bytes(typed("model")).unwrap()).unwrap();
}

/// Clears a screen, renames a window, turns text around, in one and two bytes.
const EVIL: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}\u{2066}";

#[test]
fn no_text_of_a_file_moves_the_cursor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let evil = |text: &str| format!("{text}{EVIL}");
    type Change = Box<dyn Fn(&mut Raw)>;
    let texts: Vec<(&str, Change)> = vec![
        (
            "name",
            Box::new(|r| {
                r.key("general.name", STRING, string(EVIL));
            }),
        ),
        (
            "architecture",
            Box::new(|r| {
                r.key("general.architecture", STRING, string(EVIL));
            }),
        ),
        ("tensor", Box::new(move |r| r.tensors[2].name = evil("blk.0.").into_bytes())),
        (
            "tensor of no block",
            Box::new(|r| {
                r.tensor(EVIL, 0, &[32]);
            }),
        ),
        (
            "tensor twice",
            Box::new(|r| {
                r.tensor(EVIL, 0, &[32]).tensor(EVIL, 0, &[32]);
            }),
        ),
        (
            "overlap",
            Box::new(|r| {
                r.tensor(EVIL, 0, &[32]);
                r.tensors[3].offset = r.tensors.last().unwrap().offset;
            }),
        ),
        (
            "key",
            Box::new(|r| {
                r.key(EVIL, 99, vec![0]);
            }),
        ),
        (
            "rope",
            Box::new(|r| {
                r.key("llama.rope.scaling.type", STRING, string(EVIL));
            }),
        ),
        (
            "pooling",
            Box::new(|r| {
                r.key("llama.pooling_type", STRING, string(EVIL));
            }),
        ),
        (
            "tokens",
            Box::new(|r| {
                r.key("tokenizer.ggml.model", STRING, string(EVIL));
            }),
        ),
        (
            "token twice",
            Box::new(|r| {
                let n = common::N_TOKENS;
                let tokens = string(EVIL).repeat(n as usize);
                r.key("tokenizer.ggml.tokens", common::ARRAY, common::array(STRING, n, &tokens));
            }),
        ),
        (
            "array",
            Box::new(|r| {
                let flags = common::array(common::U8, 3, &[0, 0, 0]);
                r.key(format!("llama.{EVIL}"), common::ARRAY, flags);
            }),
        ),
    ];
    let mut shown = 0;
    for (what, change) in &texts {
        let mut raw = Raw::model();
        change(&mut raw);
        fs::write(&path, raw.bytes()).unwrap();
        let (code, stdout, stderr) = dim_split(&path, &["--middle", "1..1", "--dry-run"]);
        assert!(code.is_some() && stdout.is_empty(), "{what}: {stderr}");
        let bad = stderr.chars().find(|&c| {
            c.is_control() && c != '\n' || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        });
        assert_eq!(bad, None, "{what}: {stderr:?}");
        shown += usize::from(stderr.contains("\\u{1b}[2J"));
    }
    assert!(shown >= 7, "{shown} of {} texts are shown at all", texts.len());
}

/// The format allows every power of two. llama.cpp loads what is aligned to 32 bytes and asserts otherwise: such a file
/// is refused before it is loaded, and cut into slices that are aligned.
#[test]
fn every_alignment_that_the_format_allows_can_be_cut() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m.gguf");
    common::tiny("qwen2", &model);
    let cut = |model: &Path, to: &str| {
        let out = dir.path().join(to);
        let (code, _, stderr) =
            dim_split(model, &["--middle", "1..2", "--out", out.to_str().unwrap(), "--verify"]);
        assert_eq!(code, Some(0), "{to}: {stderr}");
        assert!(!cfg!(feature = "engine") || !stderr.contains("no canary"), "{to}: {stderr}");
        let manifest = Manifest::read(out.join("m.split.json")).unwrap();
        manifest.slices.iter().map(|s| fs::read(out.join(&s.file)).unwrap()).collect::<Vec<_>>()
    };
    let plain = cut(&model, "plain");
    for alignment in [1u32, 2, 4, 8, 16, 64, 4096] {
        let folder = dir.path().join(format!("at-{alignment}"));
        fs::create_dir(&folder).unwrap();
        let other = folder.join("m.gguf");
        // ends where no larger alignment begins
        let mut description = String::from("x");
        loop {
            let padded = folder.join("padded.gguf");
            with_key(&model, &padded, "general.description", Value::string(description.clone()), &[]);
            with_key(&padded, &other, "general.alignment", Value::U32(alignment), &[]);
            let at = Gguf::open(&other).unwrap().data_offset();
            if alignment >= 32 || !at.is_multiple_of(u64::from(2 * alignment)) {
                break;
            }
            description.push('x');
        }
        let gguf = Gguf::open(&other).unwrap();
        assert_eq!(gguf.alignment(), u64::from(alignment));
        for (a, b) in gguf.tensors().zip(Gguf::open(&model).unwrap().tensors()) {
            assert_eq!(a.data().unwrap(), b.data().unwrap(), "{}", a.name());
        }
        match check::model(&gguf) {
            Err(e) if alignment < 32 => {
                assert!(matches!(*e.rule, Rule::AlignmentUnloadable(n) if n == u64::from(alignment)), "{e}");
            }
            checked => assert!(checked.is_ok()),
        }
        let slices = cut(&other, &format!("cut-{alignment}"));
        for (ours, theirs) in slices.iter().zip(&plain) {
            let (ours, theirs) =
                (Gguf::from_bytes(ours.clone()).unwrap(), Gguf::from_bytes(theirs.clone()).unwrap());
            assert_eq!(ours.alignment(), u64::from(alignment.max(32)));
            let digests =
                |gguf: &Gguf| gguf.get("dim.tensor_sha256").unwrap().as_array().unwrap().bytes().to_vec();
            assert_eq!(digests(&ours), digests(&theirs));
            let identity = |gguf: &Gguf| SliceInfo::of(gguf).unwrap().model_sha256;
            assert_eq!(identity(&ours), identity(&theirs));
        }
    }
    // a slice that somebody laid out otherwise is none of ours to load
    let slice = dir.path().join("plain/m.middle-1..2.gguf");
    let unaligned = dir.path().join("unaligned.gguf");
    with_key(&slice, &unaligned, "general.alignment", Value::U32(8), &[]);
    let error = slice::verify(&unaligned, |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("aligned to 8 bytes"), "{error}");
}

/// llama.cpp takes these and ends the process: they are refused before it sees them.
#[test]
fn what_would_end_the_process_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let without = |name: &str| {
        let mut raw = Raw::model();
        raw.tensors.retain(|t| t.name != name.as_bytes());
        raw
    };
    let heads = |numbers: [u32; 3]| {
        let mut raw = Raw::model();
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        raw.key("llama.attention.head_count_kv", ARRAY, array(U32, 3, &bytes));
        raw
    };
    let mut no_heads = Raw::model();
    no_heads.without("llama.attention.head_count").without("llama.attention.head_count_kv");
    let nvfp4 = |beside: &[&str]| {
        let mut raw = Raw::model();
        raw.tensor_mut("blk.1.ffn_down.weight").ty = TensorType::NVFP4.id();
        for part in beside {
            raw.tensor(&format!("blk.1.ffn_down.{part}"), 0, &[32]);
        }
        raw
    };
    for (raw, says) in [
        (heads([2, 2, 1]), "llama.attention.head_count_kv"),
        (no_heads, "llama.attention.head_count"),
        (nvfp4(&["scale", "bias"]), "blk.1.ffn_down.weight"),
        (without("blk.1.attn_q.weight"), "blk.1.attn_q.weight"),
        (without("blk.2.attn_v.weight"), "blk.2.attn_v.weight"),
    ] {
        fs::write(&path, raw.bytes()).unwrap();
        let (code, _, stderr) = dim_split(&path, &["--middle", "1..1", "--dry-run"]);
        assert_eq!(code, Some(2), "{says}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(says), "{says}: {stderr}");
    }
    // and not more than that (llama.cpp would not load this one's layout)
    for raw in [heads([2, 2, 2]), nvfp4(&["scale"]), nvfp4(&["bias"])] {
        fs::write(&path, raw.bytes()).unwrap();
        let (code, _, stderr) = dim_split(&path, &["--middle", "1..1", "--dry-run", "--renumber"]);
        assert_eq!(code, Some(0), "{stderr}");
    }
}

/// Converters left one unknown tensor in every block: llama.cpp loads neither the model nor a slice of it.
#[cfg(feature = "engine")]
#[test]
fn what_cannot_be_loaded_again_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    let (model, extra) = (dir.path().join("m.gguf"), dir.path().join("x.gguf"));
    common::tiny("qwen2", &model);
    let more: Vec<TensorSpec> = (0..6)
        .map(|block| TensorSpec::new(format!("blk.{block}.attn_rot_embd"), TensorType::F32, [32]))
        .collect();
    with_key(&model, &extra, "general.description", Value::string("x"), &more);
    let out = dir.path().join("out");
    let args = ["--middle", "1..2", "--out", out.to_str().unwrap()];
    // the graph is asked before anything is written
    let (code, _, stderr) = dim_split(&extra, &args);
    assert_eq!(code, Some(2), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    let says =
        format!("error: {}: llama.cpp: done_getting_tensors: wrong number of tensors", extra.display());
    assert!(lines[0].starts_with(&says), "{stderr}");
    assert!(lines[1].starts_with("hint: ") && lines[1].contains("convert it again"), "{stderr}");
    assert!(!out.exists());
    // where it is not asked, it is when a slice is loaded again
    let (code, _, stderr) = dim_split(&extra, &[&args[..], &["--renumber"]].concat());
    assert_eq!(code, Some(1), "{stderr}");
    let lines: Vec<&str> = stderr.lines().rev().take(2).collect();
    assert!(lines[0].starts_with("hint: ") && lines[0].contains("convert it again"), "{stderr}");
    assert!(lines[1].starts_with("error: x.middle-1..2.gguf cannot be loaded again: "), "{stderr}");
    assert!(lines[1].ends_with("wrong number of tensors; expected 28, got 26"), "{stderr}");
    assert!(names(&out).is_empty(), "{:?}", names(&out));
}

/// llama.cpp counts the tokens of a tokenizer and looks at no number beside them. A middle has none: what its file says has
/// to be right.
#[test]
fn a_wrong_number_of_tokens_beside_a_tokenizer_is_nobody_s() {
    let dir = tempfile::tempdir().unwrap();
    let (model, wrong) = (dir.path().join("m.gguf"), dir.path().join("w.gguf"));
    common::tiny("llama", &model);
    for says in [0, 1, 511, 513, 1 << 31, u32::MAX] {
        with_key(&model, &wrong, "llama.vocab_size", Value::U32(says), &[]);
        let out = dir.path().join(says.to_string());
        let (code, _, stderr) = dim_split(&wrong, &["--middle", "1..2", "--out", out.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{says}: {stderr}");
        let middle = Gguf::open(out.join("w.middle-1..2.gguf")).unwrap();
        assert_eq!(middle.get("llama.vocab_size").unwrap(), Value::U32(512), "{says}");
    }
}

#[test]
fn each_program_says_its_own_name() {
    for (program, path) in
        [("dim-split", env!("CARGO_BIN_EXE_dim-split")), ("dim-synth", env!("CARGO_BIN_EXE_dim-synth"))]
    {
        let out = Command::new(path).arg("-V").output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text, format!("{program} {}\n", env!("CARGO_PKG_VERSION")));
        let help = Command::new(path).arg("--help").output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(help.contains(&format!("Usage: {program}")), "{help}");
    }
}

/// Somebody stopped listening, or the disk is full: an error where it matters, never a panic.
#[test]
fn nobody_listening_is_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m.gguf");
    Spec::tiny("qwen2").unwrap().write(&model).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_dim-split"))
        .arg(&model)
        .args(["--middle", "1..2", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let mut json = String::new();
    child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    serde_json::from_str::<serde_json::Value>(&json).unwrap();

    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let out = Command::new(env!("CARGO_BIN_EXE_dim-split"))
            .arg(&model)
            .args(["--middle", "1..2", "--json", "--dry-run"])
            .stdout(full)
            .output()
            .unwrap();
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("error: cannot write to standard output: No space left"), "{stderr}");
    }
}
