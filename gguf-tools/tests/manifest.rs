//! What a manifest says of the rows that cross its cuts decides how many bytes are read off a socket and what they are taken
//! for. Its layout fields are changed with what they mean in mind: each change is one clear error, or a manifest whose
//! numbers hold together; nothing panics, and nothing is taken for what it is not.

mod common;

use std::path::Path;

use common::Rng;
use gguf_tools::{
    ask::Ask,
    failure::Explained as _,
    manifest::Manifest,
    plan::{Plan, Request},
    split,
    synth::Spec,
};
use serde_json::{Value, json};

const CHANGED: usize = 2000;

/// The manifest of a model cut in four.
fn manifest(folder: &Path) -> Value {
    let model = folder.join("model.gguf");
    Spec::tiny("qwen2").unwrap().write(&model).unwrap();
    let gguf = gguf_tools::gguf::Gguf::open(&model).unwrap();
    let middles = vec!["1..2".parse().unwrap(), "3..3".parse().unwrap()];
    let request =
        Request { middles, stem: "m".into(), no_canary: true, ask: Ask::ByName, ..Request::default() };
    split::split(&Plan::new(&gguf, &request).unwrap(), folder, "m", |_| {}).unwrap();
    serde_json::from_slice(&std::fs::read(folder.join("m.split.json")).unwrap()).unwrap()
}

/// A value that one of a part's fields could be said to be.
fn odd(rng: &mut Rng) -> Value {
    let odd = [
        json!(0),
        json!(1),
        json!(63),
        json!(65),
        json!(1 << 24),
        json!((1 << 24) + 1),
        json!(u32::MAX),
        json!(1u64 << 32),
        json!(u64::MAX),
        json!(-1),
        json!(1.5),
        json!(1e300),
        json!("64"),
        json!("f32"),
        json!("i32"),
        json!("F32"),
        json!("f16"),
        json!(""),
        json!("l_out-0\n\u{1b}[2J"),
        json!("n".repeat(63)),
        json!("n".repeat(64)),
        json!("é".repeat(32)),
        json!(null),
        json!(true),
        json!([]),
        json!({}),
    ];
    odd[rng.below(odd.len() as u64) as usize].clone()
}

/// One to three changes of what crosses.
fn change(manifest: &mut Value, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let slice = rng.below(4) as usize;
        let end = ["input", "output"][rng.below(2) as usize];
        let entry = &mut manifest["slices"][slice];
        let part = json!({ "name": "more-0", "type": "f32", "values": 8 });
        let list = entry[end].as_array().cloned().unwrap_or_default();
        let mut other = list.clone();
        match rng.below(12) {
            0..=4 => {
                let field = ["name", "type", "values"][rng.below(3) as usize];
                if let Some(first) = other.first_mut() {
                    first[field] = odd(rng);
                }
            }
            5 => other.push(part),
            6 => other = vec![part; [2, 511, 512, 513, 5000][rng.below(5) as usize]],
            7 => other.clear(),
            8 => {
                if let Some(fields) = other.first_mut().and_then(Value::as_object_mut) {
                    fields.remove(["name", "type", "values"][rng.below(3) as usize]);
                }
            }
            9 => {
                entry[end] = odd(rng);
                continue;
            }
            10 => {
                entry.as_object_mut().unwrap().remove(end);
                continue;
            }
            _ => {
                let field = ["reads_tokens", "kv_bytes_per_position", "state_bytes_per_session"];
                entry[field[rng.below(3) as usize]] = odd(rng);
                continue;
            }
        }
        entry[end] = json!(other);
        // half of the time both ends of the cut say the same
        if rng.below(2) == 0 {
            let (next, end) =
                if end == "input" { (slice.wrapping_sub(1), "output") } else { (slice + 1, "input") };
            if let Some(neighbour) = manifest["slices"].get_mut(next) {
                neighbour[end] = json!(other);
            }
        }
    }
}

#[test]
fn changed_layouts_are_one_clear_error_or_hold_together() {
    let folder = tempfile::tempdir().unwrap();
    let whole = manifest(folder.path());
    let path = folder.path().join("m.split.json");
    let (mut refused, mut taken) = (0, 0);
    let mut rng = Rng(43);
    while refused + taken < CHANGED {
        let mut changed = whole.clone();
        change(&mut changed, &mut rng);
        if changed == whole {
            continue;
        }
        std::fs::write(&path, changed.to_string()).unwrap();
        match Manifest::read(&path) {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("m.split.json: ") && !text.contains(['\n', '\u{1b}']), "{text}");
                assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{text}");
                refused += 1;
            }
            Ok(manifest) => {
                let last = manifest.slices.len() - 1;
                for (i, slice) in manifest.slices.iter().enumerate() {
                    // tokens go in at one end, logits come out of the other, and rows everywhere else
                    assert_eq!(slice.input.0.is_empty(), i == 0, "{changed}");
                    assert_eq!(slice.output.0.is_empty(), i == last, "{changed}");
                    for crossing in [&slice.input, &slice.output] {
                        assert!(crossing.0.len() <= 512 && crossing.bytes_f32() <= 512 << 26, "{changed}");
                        assert!(crossing.bytes_f16() <= crossing.bytes_f32(), "{changed}");
                        assert!(!crossing.to_string().contains(['\n', '\u{1b}']), "{changed}");
                    }
                }
                for pair in manifest.slices.windows(2) {
                    assert_eq!(pair[0].output, pair[1].input, "{changed}");
                }
                taken += 1;
            }
        }
    }
    println!("{refused} refused, {taken} hold together");
    assert!(refused > CHANGED / 2 && taken > 50, "{refused}, {taken}");
}

/// One that was mistaken for it, a pipe or a device, has no length that would say so.
#[cfg(unix)]
#[test]
fn a_file_without_an_end_is_no_manifest() {
    let error = Manifest::read("/dev/zero").unwrap_err();
    assert!(error.to_string().contains("is no manifest"), "{error}");
}
