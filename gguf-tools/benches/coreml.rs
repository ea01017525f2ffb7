//! How fast Core ML packages are written, against `cp` of the same bytes in the same run, and with how much memory.
//!
//! Writing reads every weight once, hashes it and writes it once; `cp` reads and writes. Both end with the data on the
//! disk (`cp` followed by `sync` of the copies). The answer is asserted first: every tensor of the weight files is the
//! model's, byte for byte. The self-test is left out of the time: it is llama.cpp's, not the writer's.
//!
//! Memory is what the process allocates (RssAnon in /proc, its greatest value): of the writer alone, in this process, and
//! of a whole `dim-split --coreml`, slices and self-test included, in one of its own. The model has the vocabulary of the
//! real one, whose tokenizer the self-test loads.
//!
//!     cargo bench -p gguf-tools --bench coreml
//!     BLOCKS=2 VOCAB=512 ROUNDS=5 DIR=/mnt/disk cargo bench -p gguf-tools --bench coreml

#[path = "../../benches/machine/mod.rs"]
mod machine;
#[path = "../tests/common/memory.rs"]
mod memory;

use std::fs;
use std::process::Command;
use std::time::Instant;

use gguf_tools::coreml::{Identity, Options, PackagePlan, Report};
use gguf_tools::gguf::{Gguf, TensorType};
use gguf_tools::plan::BlockRange;
use gguf_tools::synth::Spec;
use machine::{env, median};

fn main() {
    let n_blocks: u32 = env("BLOCKS", "6").parse().expect("BLOCKS is a number");
    let rounds: usize = env("ROUNDS", "3").parse().expect("ROUNDS is a number");
    let n_vocab: u32 = env("VOCAB", "152064").parse().expect("VOCAB is a number");
    let weights = env("TYPE", "f16");
    machine::describe("coreml");
    let folder = match std::env::var_os("DIR") {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let folder = folder.expect("a folder to write to");
    let model = folder.path().join("model.gguf");
    let spec = Spec::new("qwen2.5-7b", None)
        .and_then(|s| s.with_type(&weights))
        .expect("a shape of dim-synth --list");
    spec.blocks(n_blocks + 2).vocab(n_vocab).write(&model).expect("the model");
    let gguf = Gguf::open(&model).expect("the model");

    let out = folder.path().join("out.coreml");
    let options = Options { selftest: false, ..Options::default() };
    let plan = PackagePlan::new(&gguf, BlockRange { first: 1, last: n_blocks }, options).expect("the blocks");
    let identity =
        Identity { model_name: "bench", model_sha256: "", params_sha256: None, slice_sha256: None };
    let (report, writer) = memory::growth(|| plan.write(&out, &identity, &mut |_| ()).expect("the packages"));
    if weights == "f16" {
        assert_weights(&gguf, &report);
    }

    let (mut write_s, mut cp_s, mut cp_unsynced_s) = (vec![], vec![], vec![]);
    for _ in 0..rounds {
        let copy = folder.path().join("copy.coreml");
        settle();
        let start = Instant::now();
        assert!(Command::new("cp").arg("-r").arg(&out).arg(&copy).status().expect("cp").success());
        cp_unsynced_s.push(start.elapsed().as_secs_f64());
        let files = report.manifest.packages.iter().map(|p| copy.join(&p.directory).join(&p.weight_file));
        assert!(Command::new("sync").args(files).status().expect("sync").success());
        cp_s.push(start.elapsed().as_secs_f64());
        fs::remove_dir_all(&copy).expect("the copy");

        fs::remove_dir_all(&out).expect("the packages");
        settle();
        let start = Instant::now();
        plan.write(&out, &identity, &mut |_| ()).expect("the packages");
        write_s.push(start.elapsed().as_secs_f64());
    }
    let gb = report.bytes as f64 / 1e9;
    let ratio = median(cp_s.iter().zip(&write_s).map(|(cp, write)| cp / write).collect());
    println!(
        "{n_blocks} blocks of qwen2.5-7b, {weights}, {gb:.2} GB in {} packages, {rounds} rounds, median",
        report.manifest.packages.len()
    );
    let (write_s, cp_s, cp_unsynced_s) = (median(write_s), median(cp_s), median(cp_unsynced_s));
    println!("  written and on the disk: {:.2} GB/s", gb / write_s);
    println!(
        "  cp + sync: {:.2} GB/s; cp, in the page cache only: {:.2} GB/s",
        gb / cp_s,
        gb / cp_unsynced_s
    );
    println!("  {ratio:.2} x cp + sync (wanted: at least 0.6)");
    show("heap while writing", writer);
    fs::remove_dir_all(&out).expect("the packages");
    let mut run = Command::new(env!("CARGO_BIN_EXE_dim-split"));
    run.arg(&model).args(["--middle", &format!("1..{n_blocks}"), "--coreml", "--out"]).arg(folder.path());
    let (output, whole) = memory::peak_of(&mut run).expect("dim-split");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    show("heap of dim-split --coreml, self-test included", whole);
}

fn show(what: &str, bytes: Option<u64>) {
    match bytes {
        Some(bytes) => println!("  {what}: at most {:.1} MiB (wanted: below 64)", bytes as f64 / 1048576.0),
        None => println!("  {what}: not measured, RssAnon is Linux's"),
    }
}

/// Every stored tensor that is not converted is in the model with the same bytes.
fn assert_weights(gguf: &Gguf, report: &Report) {
    let mut compared = 0;
    for package in &report.manifest.packages {
        let file =
            fs::read(report.directory.join(&package.directory).join(&package.weight_file)).expect("weights");
        for weight in &package.weights {
            let tensor = gguf.tensor(&weight.name).expect("a tensor of the model");
            if tensor.tensor_type() != TensorType::F16 {
                continue;
            }
            let (row_bytes, [first, end]) = (tensor.row_bytes() as usize, weight.cols);
            let model = tensor.data().expect("the model is mapped");
            let stored = &file[weight.offset as usize..][..weight.bytes as usize];
            let n_rows = (weight.rows[1] - weight.rows[0]) as usize;
            for (row, stored) in (weight.rows[0] as usize..).zip(stored.chunks_exact(stored.len() / n_rows)) {
                let row = &model[row * row_bytes..][..row_bytes];
                assert!(row[2 * first as usize..2 * end as usize] == *stored, "{}", weight.name);
            }
            compared += weight.bytes;
        }
    }
    assert!(compared > report.bytes / 100 * 99, "{compared} of {} bytes compared", report.bytes);
}

/// Waits until what was written before is on the disk.
fn settle() {
    assert!(Command::new("sync").status().expect("sync").success());
}
