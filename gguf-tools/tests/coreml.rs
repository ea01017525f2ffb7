//! Core ML packages: what is refused, and what stands on the disk whatever happens. What the programs compute is checked
//! by tests/coreml/run.sh, with evaluators that share no code with the writer.
#![cfg(unix)]
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{ARRAY, BOOL, F32, Raw, Rng, STRING, U32, array, string};
use gguf_tools::coreml::manifest::Manifest;
use gguf_tools::coreml::{self, Error, Identity, Options, PackagePlan};
use gguf_tools::gguf::Gguf;
use gguf_tools::plan::{BlockRange, Plan, Request};
use gguf_tools::split::split;
use gguf_tools::synth::{FAMILIES, Spec};
use sha2::{Digest, Sha256};

const OPTIONS: Options = Options { n_ctx: 64, n_prefill: 8, max_bytes: 950_000_000, selftest: false };
const SHA: &str = "00000000000000000000000000000000000000000000000000000000000000aa";

fn range(first: u32, last: u32) -> BlockRange {
    BlockRange { first, last }
}

fn plan(gguf: &Gguf) -> Result<PackagePlan<'_>, Error> {
    PackagePlan::new(gguf, range(1, 1), OPTIONS)
}

fn write(gguf: &Gguf, name: &str, target: &Path) -> Result<coreml::Report, Error> {
    plan(gguf)?.write(target, &identity(name), &mut |_| ())
}

fn identity(model_name: &str) -> Identity<'_> {
    Identity { model_name, model_sha256: SHA, params_sha256: None, slice_sha256: None }
}

fn refusal(change: impl FnOnce(&mut Raw)) -> String {
    let mut raw = Raw::model();
    change(&mut raw);
    let gguf = Gguf::from_bytes(raw.bytes()).expect("a file that llama.cpp would take");
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.coreml");
    let error = write(&gguf, "raw", &target).expect_err("a refusal").to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    assert!(names(dir.path()).is_empty(), "nothing is left: {:?}", names(dir.path()));
    error
}

/// Names in a folder, hidden ones too.
fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// Every file that the manifest names is there with its bytes, and no other.
fn assert_whole(directory: &Path) -> Manifest {
    let manifest: Manifest =
        serde_json::from_slice(&fs::read(directory.join("manifest.json")).unwrap()).unwrap();
    let mut expected = BTreeSet::from([PathBuf::from("manifest.json")]);
    expected.extend(manifest.selftest.iter().map(|s| PathBuf::from(&s.file)));
    for package in &manifest.packages {
        for file in &package.files {
            let path = Path::new(&package.directory).join(&file.path);
            let bytes = fs::read(directory.join(&path)).unwrap();
            let sha: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!((bytes.len() as u64, sha), (file.bytes, file.sha256.clone()), "{}", path.display());
            expected.insert(path);
        }
    }
    assert_eq!(files(directory, directory), expected);
    manifest
}

fn files(root: &Path, folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(root, &path));
        } else {
            found.insert(path.strip_prefix(root).unwrap().to_owned());
        }
    }
    found
}

#[test]
fn the_model_the_refusals_start_from_is_accepted() {
    let gguf = Gguf::from_bytes(Raw::model().bytes()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.coreml");
    let report = write(&gguf, "raw", &target).unwrap();
    let manifest = assert_whole(&target);
    assert_eq!(manifest, report.manifest);
    assert_eq!((manifest.slice.first_block, manifest.slice.last_block), (1, 1));
    let total: u64 =
        files(&target, &target).iter().map(|f| fs::metadata(target.join(f)).unwrap().len()).sum();
    assert_eq!(report.bytes, total);
}

#[test]
fn refuses_every_other_architecture_by_name() {
    let mut refused = 0;
    for family in FAMILIES {
        if coreml::shape::ARCHITECTURES.contains(&family.arch) {
            continue;
        }
        let says = refusal(|raw| {
            let old = raw.keys.clone();
            raw.keys.clear();
            for (key, ty, value) in old {
                let key = String::from_utf8(key).unwrap().replace("llama.", &format!("{}.", family.arch));
                raw.key(key, ty, value);
            }
            raw.key("general.architecture", STRING, string(family.arch));
        });
        assert!(says.contains(&format!("\"{}\"", family.arch)) && says.contains("qwen2, llama"), "{says}");
        refused += 1;
    }
    assert!(refused >= 3, "{refused}");
}

#[test]
fn refuses_keys_that_change_the_computation_by_name() {
    let float = |x: f32| x.to_le_bytes().to_vec();
    let int = |x: u32| x.to_le_bytes().to_vec();
    for (key, ty, value) in [
        ("llama.attention.scale", F32, float(0.5)),
        ("llama.attention.clamp_kqv", F32, float(8.0)),
        ("llama.attention.causal", BOOL, vec![0]),
        ("llama.expert_count", U32, int(4)),
        ("llama.attention.value_length", U32, int(16)),
        ("llama.rope.scaling.type", STRING, string("longrope")),
        ("llama.rope.scaling.attn_factor", F32, float(0.5)),
        ("llama.rope.scaling.factor", F32, float(-2.0)),
        ("llama.rope.freq_base", F32, float(f32::NAN)),
        ("llama.attention.layer_norm_rms_epsilon", F32, float(0.0)),
        ("llama.residual_scale", F32, float(0.2)),
    ] {
        // some of these are refused by the reader already, and by the same name
        let mut raw = Raw::model();
        raw.key(key, ty, value);
        let says = match Gguf::from_bytes(raw.bytes()) {
            Err(e) => e.to_string(),
            Ok(gguf) => plan(&gguf).expect_err(key).to_string(),
        };
        assert!(says.contains(key), "{key}: {says}");
    }
    let mut raw = Raw::model();
    let per_block: Vec<u8> = [4u32, 2, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
    raw.key("llama.attention.head_count_kv", ARRAY, array(U32, 3, &per_block));
    let gguf = Gguf::from_bytes(raw.bytes()).unwrap();
    let says = plan(&gguf).unwrap_err().to_string();
    assert!(says.contains("llama.attention.head_count_kv") && says.contains("block to block"), "{says}");
}

#[test]
fn refuses_tensors_that_do_not_fit_by_name() {
    let unknown = refusal(|raw| {
        raw.tensor("blk.1.attn_sinks.weight", 0, &[4]);
    });
    assert!(unknown.contains("\"blk.1.attn_sinks.weight\" has no place"), "{unknown}");
    let missing = refusal(|raw| raw.tensors.retain(|t| t.name != b"blk.1.ffn_up.weight"));
    assert!(missing.contains("no tensor \"blk.1.ffn_up.weight\""), "{missing}");
    let shape = refusal(|raw| raw.tensor_mut("blk.1.attn_k.weight").dims = vec![16, 32]);
    assert!(shape.contains("\"blk.1.attn_k.weight\" has shape [16, 32]"), "{shape}");
    let integers = refusal(|raw| raw.tensor_mut("blk.1.ffn_norm.weight").ty = 26);
    assert!(integers.contains("\"blk.1.ffn_norm.weight\" is of type I32"), "{integers}");
    let hostile = refusal(|raw| {
        raw.tensor("blk.1.\u{1b}[2J\n../../x", 0, &[4]);
    });
    assert!(hostile.contains("\\u{1b}") && !hostile.contains('\u{1b}'), "{hostile}");
    // another block's tensors are nobody's business here
    let mut raw = Raw::model();
    raw.tensor("blk.2.attn_sinks.weight", 0, &[4]);
    assert!(plan(&Gguf::from_bytes(raw.bytes()).unwrap()).is_ok());
}

#[test]
fn refuses_values_that_fp16_does_not_hold_by_tensor() {
    for value in [65520.0f32, -1e9, f32::INFINITY, f32::NAN] {
        for tensor in ["blk.1.attn_norm.weight", "blk.1.ffn_gate.weight"] {
            let says = refusal(|raw| {
                // as F32, at the end of the file
                let dims = raw.tensor_mut(tensor).dims.clone();
                raw.tensors.retain(|t| t.name != tensor.as_bytes());
                raw.tensor(tensor, 0, &dims);
                let at = raw.tensors.last().unwrap().offset as usize;
                let n = dims.iter().product::<u64>() as usize;
                raw.data[at..at + 4 * n].fill(0);
                raw.data[at + 4 * (n - 1)..at + 4 * n].copy_from_slice(&value.to_le_bytes());
            });
            assert!(says.contains(&format!("tensor \"{tensor}\" holds {value}")), "{says}");
        }
    }
}

#[cfg(not(feature = "engine"))]
#[test]
fn quantised_weights_ask_for_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    Spec::tiny("qwen2").unwrap().with_type("q8_0").unwrap().write(&model).unwrap();
    let says = plan(&Gguf::open(&model).unwrap()).unwrap_err().to_string();
    assert!(says.contains("blk.1.") && says.contains("Q8_0") && says.contains("feature `engine`"), "{says}");
}

#[test]
fn refuses_options_out_of_range() {
    let gguf = Gguf::from_bytes(Raw::model().bytes()).unwrap();
    let says = |blocks, options| PackagePlan::new(&gguf, blocks, options).unwrap_err().to_string();
    for n_ctx in [0, 63, 65, 32, 16448, u32::MAX] {
        assert!(says(range(1, 1), Options { n_ctx, ..OPTIONS }).contains(&format!("a context of {n_ctx}:")));
    }
    for n_prefill in [0, 1, 65, 513] {
        assert!(
            says(range(1, 1), Options { n_prefill, ..OPTIONS }).contains(&format!("chunks of {n_prefill}:"))
        );
    }
    assert!(says(range(1, 1), Options { max_bytes: 4096, ..OPTIONS }).contains("block 1 alone takes"));
    for blocks in [range(0, 1), range(1, 2), range(2, 2), range(5, 9), range(1, u32::MAX)] {
        assert!(says(blocks, OPTIONS).contains("within 1..1"), "{blocks:?}");
    }
}

#[test]
fn blocks_are_spread_over_as_few_packages_as_fit() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    Spec::tiny("qwen2").unwrap().blocks(9).write(&model).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let one = PackagePlan::new(&gguf, range(1, 1), OPTIONS).unwrap().weight_bytes();
    for (blocks, room, expected) in
        [(range(1, 7), 3, vec![3, 2, 2]), (range(1, 6), 2, vec![2, 2, 2]), (range(2, 5), 9, vec![4])]
    {
        let options = Options { max_bytes: one * room, ..OPTIONS };
        let plan = PackagePlan::new(&gguf, blocks, options).unwrap();
        let target = dir.path().join("out.coreml");
        plan.write(&target, &identity("m"), &mut |_| ()).unwrap();
        let manifest = assert_whole(&target);
        let counts: Vec<u32> = manifest.packages.iter().map(|p| p.last_block + 1 - p.first_block).collect();
        assert_eq!(counts, expected);
        assert!(manifest.packages.iter().all(|p| p.files.iter().all(|f| f.bytes <= one * room)));
        assert_eq!(
            names(dir.path()),
            ["model.gguf", "out.coreml"].map(String::from).into(),
            "replaced, nothing left"
        );
    }
}

/// Packages say whose settings they were made with, in the words of the slices' manifest.
#[test]
fn packages_carry_the_digests_of_the_split() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m.gguf");
    Spec::tiny("qwen2").unwrap().blocks(5).write(&model).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let request = Request { middles: vec![range(1, 2)], stem: "m".into(), ..Request::default() };
    let slices = split(&Plan::new(&gguf, &request).unwrap(), dir.path(), "m", |_| {}).unwrap();
    let plans = [PackagePlan::new(&gguf, range(1, 2), OPTIONS).unwrap()];
    let [report] = &coreml::write_middles(&plans, &slices, dir.path(), "m", &mut |_| ()).unwrap()[..] else {
        panic!()
    };
    let manifest = assert_whole(&report.directory);
    assert_eq!(manifest.model.sha256, slices.model.sha256);
    assert!(manifest.model.params_sha256.is_some());
    assert_eq!(manifest.model.params_sha256, slices.model.params_sha256);
}

#[test]
fn a_directory_that_is_something_else_is_not_touched() {
    let gguf = Gguf::from_bytes(Raw::model().bytes()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.coreml");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("diary.txt"), "dear diary").unwrap();
    let says = write(&gguf, "raw", &target).unwrap_err().to_string();
    assert!(says.contains("in the way"), "{says}");
    assert_eq!(fs::read_to_string(target.join("diary.txt")).unwrap(), "dear diary");
    fs::remove_dir_all(&target).unwrap();
    std::os::unix::fs::symlink("/nonexistent", &target).unwrap();
    assert!(write(&gguf, "raw", &target).unwrap_err().to_string().contains("in the way"));
}

/// Whatever a model file says of itself, files appear under the target and nowhere else.
#[test]
fn names_from_the_model_never_become_paths() {
    let pieces = [
        "..",
        "/",
        "\\",
        "\0",
        "etc/passwd",
        "%2e%2e",
        "C:",
        "\u{202e}",
        "~",
        "$(touch x)",
        "\n",
        "a",
        "nul",
        "'",
        "\"",
    ];
    let mut rng = Rng(3);
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    let target = inner.join("out.coreml");
    let mut first: Option<BTreeSet<PathBuf>> = None;
    for _ in 0..200 {
        let name: String =
            (0..1 + rng.below(8)).map(|_| pieces[rng.below(pieces.len() as u64) as usize]).collect();
        let mut raw = Raw::model();
        raw.key("general.name", STRING, string(&name));
        raw.key("general.author", STRING, string(&name));
        let gguf = Gguf::from_bytes(raw.bytes()).unwrap();
        write(&gguf, &name, &target).unwrap();
        let found = files(&target, &target);
        assert_eq!(*first.get_or_insert(found.clone()), found, "the same names for every model");
        assert_eq!(names(&inner), BTreeSet::from(["out.coreml".to_string()]));
        assert_eq!(names(&dir.path().join("a")), BTreeSet::from(["b".to_string()]));
        assert_eq!(names(dir.path()), BTreeSet::from(["a".to_string()]));
        assert_eq!(assert_whole(&target).model.name, name, "the name itself is kept, as a value");
    }
}

/// The model whose writing is interrupted, two of one shape: 4 blocks of 2.6 MB each in 4 packages.
fn two_models(dir: &Path) -> [PathBuf; 2] {
    [1, 2].map(|seed| {
        let folder = dir.join(format!("seed{seed}"));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("model.gguf");
        Spec::new("demo", Some("qwen2")).unwrap().blocks(6).vocab(512).seed(seed).write(&path).unwrap();
        path
    })
}

const FLAGS: [&str; 8] = [
    "--middle",
    "1..4",
    "--coreml",
    "--coreml-no-selftest",
    "--coreml-ctx",
    "64",
    "--coreml-max-bytes",
    "7MB",
];

fn program(model: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dim-split"));
    command.arg(model).args(FLAGS).arg("--out").arg(out);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    command
}

const TARGET: &str = "model.middle-1..4.coreml";

fn part_directories(out: &Path) -> usize {
    if !out.exists() {
        return 0;
    }
    names(out).iter().filter(|n| n.starts_with(&format!(".{TARGET}.part-"))).count()
}

#[test]
fn killed_at_any_point_no_half_directory_has_the_final_name() {
    let dir = tempfile::tempdir().unwrap();
    let models = two_models(dir.path());
    let out = dir.path().join("out");
    // how long writing the packages takes here
    let mut child = program(&models[0], &out).spawn().unwrap();
    while part_directories(&out) == 0 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    let started = Instant::now();
    assert!(child.wait().unwrap().success());
    let writing = started.elapsed();
    let identity = |manifest: Manifest| manifest.model.sha256;
    let mut whole = BTreeSet::from([identity(assert_whole(&out.join(TARGET)))]);
    assert!(program(&models[1], &out).status().unwrap().success());
    whole.insert(identity(assert_whole(&out.join(TARGET))));
    assert_eq!(whole.len(), 2);

    let mut rng = Rng(7);
    let (mut killed, mut left) = (0, 0);
    for round in 0.. {
        let fresh = round % 2 == 0;
        if fresh {
            fs::remove_dir_all(out.join(TARGET)).unwrap();
        }
        let mut child = program(&models[round % 2], &out).spawn().unwrap();
        while part_directories(&out) == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(rng.below(writing.as_micros() as u64)));
        child.kill().unwrap();
        killed += usize::from(child.wait().unwrap().signal() == Some(9));
        left += part_directories(&out);
        match out.join(TARGET).exists() {
            true => {
                assert!(whole.contains(&identity(assert_whole(&out.join(TARGET)))), "old or new, but whole")
            }
            false => assert!(fresh, "the old one is there until the new one is"),
        }
        // the next run starts clean
        assert!(program(&models[round % 2], &out).status().unwrap().success());
        assert_eq!(part_directories(&out), 0);
        assert_whole(&out.join(TARGET));
        if killed >= 20 {
            break;
        }
        assert!(round < 200, "{killed} of {round} runs were killed in time");
    }
    assert!(left > 0, "the kills hit the writing");
}

/// A limit on file size stands for a disk that fills up: it needs no privilege, and strikes at an exact byte.
#[test]
fn writing_that_fails_at_any_point_leaves_the_old_directory_and_no_rest() {
    let dir = tempfile::tempdir().unwrap();
    let gguf_bytes = |path: &Path| Gguf::open(path).unwrap().file_bytes();
    let models = two_models(dir.path());
    let out = dir.path().join("out");
    assert!(program(&models[0], &out).status().unwrap().success());
    let before = assert_whole(&out.join(TARGET));
    let weight_file = before.packages[0].files.iter().map(|f| f.bytes).max().unwrap();
    // the slices are written first, and must not be what fails: they are a run of their own here
    assert!(gguf_bytes(&models[1]) > weight_file);
    let mut rng = Rng(5);
    for _ in 0..20 {
        let blocks = rng.below(weight_file / 512 - 1);
        for kept in [&out, &dir.path().join("empty")] {
            fs::create_dir_all(kept).unwrap();
            let output = limited(&models[1], &kept.join(TARGET), blocks);
            let says = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && says.contains("File too large"), "{blocks}: {says}");
        }
        assert_eq!(assert_whole(&out.join(TARGET)), before);
        assert_eq!(part_directories(&out), 0);
        assert!(names(&dir.path().join("empty")).is_empty());
    }
}

const CHILD: &str = "DIM_TEST_WRITE_PACKAGES";

/// This test program, writing the packages of a model under a limit of `blocks` * 512 bytes a file.
fn limited(model: &Path, target: &Path, blocks: u64) -> Output {
    let script = r#"trap '' XFSZ; ulimit -f "$1"; shift; exec "$@""#;
    Command::new("sh")
        .args(["-c", script, "sh", &blocks.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "write_packages_as_a_child", "--nocapture"])
        .env(CHILD, format!("{}\n{}", model.display(), target.display()))
        .output()
        .unwrap()
}

/// Does nothing unless another test of this file started it.
#[test]
fn write_packages_as_a_child() {
    let Ok(paths) = std::env::var(CHILD) else { return };
    let (model, target) = paths.split_once('\n').unwrap();
    let gguf = Gguf::open(model).unwrap();
    let plan = PackagePlan::new(&gguf, range(1, 4), Options { max_bytes: 7_000_000, ..OPTIONS }).unwrap();
    if let Err(e) = plan.write(Path::new(target), &identity("m"), &mut |_| ()) {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

/// A real disk that fills up, where the system lets a test mount one; the test above does not depend on it.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_leaves_the_old_directory_and_no_rest() {
    match common::small_disk() {
        Some(disk) => fill_up(&disk),
        None => common::on_a_small_disk("200m", "a_disk_that_fills_up_leaves_the_old_directory_and_no_rest"),
    }
}

#[cfg(target_os = "linux")]
fn fill_up(disk: &Path) {
    let models = two_models(disk);
    let ggufs = models.map(|m| Gguf::open(m).unwrap());
    let options = Options { max_bytes: 7_000_000, ..OPTIONS };
    let plans = ggufs.each_ref().map(|g| PackagePlan::new(g, range(1, 4), options).unwrap());
    let target = disk.join("out.coreml");
    plans[0].write(&target, &identity("first"), &mut |_| ()).unwrap();
    let before = assert_whole(&target);
    let mut rng = Rng(9);
    let filler = disk.join("filler");
    for _ in 0..20 {
        // somebody else takes what is left, in the middle of the run
        let at = rng.below(plans[1].weight_bytes());
        let (mut written, mut filled) = (0, false);
        let result = plans[1].write(&target, &identity("second"), &mut |progress| {
            let coreml::PackageProgress::Writing { bytes, .. } = progress else { return };
            written += bytes;
            if written >= at && !filled {
                filled = true;
                common::fill(&filler);
            }
        });
        fs::remove_file(&filler).unwrap();
        match result {
            Err(Error::Io { source, .. }) => {
                assert!(source.to_string().contains("No space left"), "{source}")
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(assert_whole(&target), before);
        assert_eq!(names(disk).iter().filter(|n| n.starts_with('.')).count(), 0);
    }
    // known beforehand: said so
    common::fill(&filler);
    let says = coreml::check_space(&plans, disk, 0).unwrap_err().to_string();
    assert!(says.starts_with("need ") && says.contains(", have 0.0 MiB in "), "{says}");
    println!("20 of 20 runs");
}

/// A broken file gets the same answer with `--coreml` as without.
#[test]
fn a_hostile_file_gets_the_same_error_with_coreml() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let good = Raw::model();
    let (bytes, header) = (good.bytes(), good.header().len());
    let mut rng = Rng(21);
    let mut errors = BTreeSet::new();
    for round in 0..300 {
        let mut broken = bytes.clone();
        if round % 5 == 0 {
            broken.truncate(rng.below(bytes.len() as u64) as usize);
        } else {
            rng.mutate(&mut broken, header);
        }
        fs::write(&model, &broken).unwrap();
        let run = |flags: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_dim-split"));
            command.arg(&model).args(["--middle", "1..1", "--dry-run"]).args(flags);
            let output = command.output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let (plain, coreml) = (run(&[]), run(&["--coreml", "--coreml-ctx", "64"]));
        assert!(coreml.0 == Some(0) || coreml.0 == Some(2), "{coreml:?}");
        if plain.0 == Some(2) {
            assert_eq!(plain, coreml);
            errors.insert(plain.1);
        }
    }
    assert!(errors.len() > 50, "{} different errors", errors.len());
}

/// The whole run, llama.cpp's evaluation of the self-test included, takes the same little memory for any model: weights
/// are read where they are mapped, whatever their type.
#[cfg(all(feature = "engine", target_os = "linux"))]
#[test]
fn the_run_with_its_selftest_takes_less_than_64_mib_of_heap() {
    let dir = tempfile::tempdir().unwrap();
    for (weights, at_least) in [("f16", 450 << 20), ("q4_0", 120 << 20)] {
        // the vocabulary is the real one's, in number: its tokenizer is what takes most
        let model = dir.path().join(format!("{weights}.gguf"));
        let spec = Spec::new("qwen2.5-0.5b", None).unwrap().with_type(weights).unwrap();
        spec.blocks(8).write(&model).unwrap();
        assert!(fs::metadata(&model).unwrap().len() > at_least);
        let mut command = Command::new(env!("CARGO_BIN_EXE_dim-split"));
        command.arg(&model).args(["--middle", "1..3", "--coreml", "--json", "--out"]).arg(dir.path());
        let (output, peak) = common::memory::peak_of(&mut command).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["coreml"][0]["max_abs_hidden"].as_array().map(Vec::len), Some(4), "{json}");
        let peak = peak.expect("RssAnon of the program");
        println!("{weights}: {:.1} MiB", peak as f64 / f64::from(1 << 20));
        assert!(peak > 8 << 20, "{peak}: nothing was measured");
        assert!(peak < 64 << 20, "{weights}: {peak} bytes");
    }
}
