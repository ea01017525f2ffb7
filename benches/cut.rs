//! How fast a model is cut, against `cp` of the same bytes in the same run.
//!
//! Cutting reads every byte once, hashes it and writes it once; `cp` reads and writes. Both end with the data on the disk
//! (`cp` followed by `sync` of the copies). The answer is asserted first: the slices hold the model, tensor for tensor
//! (`--verify`).
//!
//!     cargo bench --bench cut
//!     SHAPE=qwen2.5-1.5b ROUNDS=5 DIR=/mnt/disk cargo bench --bench cut

#[path = "machine/mod.rs"]
mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use gguf_tools::synth::Spec;
use machine::{env, median};

fn main() {
    let shape = env("SHAPE", "qwen2.5-0.5b");
    let middle = env("MIDDLE", "8..15");
    let rounds: usize = env("ROUNDS", "5").parse().expect("ROUNDS is a number");
    machine::describe("cut");
    let folder = match std::env::var_os("DIR") {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let folder = folder.expect("a folder to write to");
    let model = folder.path().join("model.gguf");
    Spec::new(&shape, None).expect("a shape of dim-synth --list").write(&model).expect("the model");

    let out = folder.path().join("out");
    let split = |verify: bool| {
        let mut command = Command::new(dim_split());
        command.arg(&model).args(["--middle", &middle]).arg("--out").arg(&out);
        if verify {
            command.arg("--verify");
        }
        let output = command.output().expect("dim-split");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    split(true);
    let bytes: u64 = slices(&out).iter().map(|p| p.metadata().expect("a slice").len()).sum();

    for (name, cold) in [("warm cache", false), ("cold cache", true)] {
        if cold && !drop_caches() {
            println!("cold cache: not measured, because dropping the page cache needs root on Linux");
            continue;
        }
        let (mut ratios, mut split_s, mut cp_s) = (vec![], vec![], vec![]);
        for _ in 0..rounds {
            let copies = folder.path().join("copies");
            std::fs::create_dir_all(&copies).expect("a folder");
            let sources = slices(&out);
            prepare(cold);
            let start = Instant::now();
            let mut cp = Command::new("cp");
            cp.args(&sources).arg(&copies);
            assert!(cp.status().expect("cp").success());
            let copied: Vec<PathBuf> =
                sources.iter().map(|s| copies.join(s.file_name().expect("a name"))).collect();
            assert!(Command::new("sync").args(&copied).status().expect("sync").success());
            let t_cp = start.elapsed().as_secs_f64();
            std::fs::remove_dir_all(&copies).expect("removed");

            std::fs::remove_dir_all(&out).expect("removed");
            prepare(cold);
            let start = Instant::now();
            split(false);
            let t_split = start.elapsed().as_secs_f64();
            ratios.push(t_cp / t_split);
            split_s.push(t_split);
            cp_s.push(t_cp);
        }
        let gb = bytes as f64 / 1e9;
        let (s, c) = (median(split_s), median(cp_s));
        println!(
            "{name}: dim-split {s:.2} s ({:.2} GB/s), cp + sync {c:.2} s ({:.2} GB/s), dim-split at {:.2} of cp (median of {rounds}), {gb:.2} GB",
            gb / s,
            gb / c,
            median(ratios)
        );
    }
}

fn slices(out: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(out)
        .expect("the slices")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    assert!(files.len() >= 3, "{files:?}");
    files
}

fn prepare(cold: bool) {
    assert!(Command::new("sync").status().expect("sync").success());
    if cold {
        assert!(drop_caches());
    }
}

fn drop_caches() -> bool {
    Command::new("sync").status().is_ok_and(|s| s.success())
        && std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// dim-split belongs to another package: it lies where this bench's own programs do.
fn dim_split() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_dim-host")).with_file_name("dim-split");
    assert!(path.is_file(), "build it first: cargo build --release --workspace");
    path
}
