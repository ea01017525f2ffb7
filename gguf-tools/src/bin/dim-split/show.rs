//! The plan of a cut for people, and the result as JSON.

use std::{
    fmt,
    io::{self, Write as _},
    path::Path,
};

use gguf_tools::{
    coreml,
    failure::Failure,
    manifest::Manifest,
    plan::{Plan, Role},
    text::{Safe, Shown, gib},
};

/// What will be where, and what it takes.
///
/// ```text
/// qwen2.5-7b  qwen2, 28 blocks, width 3584, vocabulary 152064
///
///   head    blocks  0..10  (11 blocks)   5.9 GiB weights + 176.0 MiB cache at 4096 tokens   this machine
///   middle  blocks 11..16   (6 blocks)   2.6 GiB weights +  96.0 MiB cache at 4096 tokens   device 1
///   tail    blocks 17..27  (11 blocks)   5.9 GiB weights + 176.0 MiB cache at 4096 tokens   this machine
///
///   embed >[HHHHHHHHHHH]--[111111]--[TTTTTTTTTTT]> logits
/// ```
pub(crate) struct PlanView<'a> {
    pub(crate) plan: &'a Plan<'a>,
    /// Positions that the figures for the cache are for.
    pub(crate) n_ctx: u32,
}

impl fmt::Display for PlanView<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PlanView { plan, n_ctx } = *self;
        let h = &plan.hparams;
        writeln!(
            out,
            "{}: {}, {} blocks, width {}, vocabulary {}\n",
            Shown(&plan.model_name),
            Shown(&h.arch),
            h.n_blocks,
            h.n_embd,
            h.n_vocab
        )?;
        let (mut here_weights, mut here_cache) = (0, 0);
        let mut picture = String::from("  tokens >");
        let mut device = 0;
        for slice in &plan.slices {
            let cache = slice.kv_bytes_per_position * u64::from(n_ctx);
            let place = if slice.role == Role::Middle {
                device += 1;
                format!("device {device}")
            } else {
                here_weights += slice.weight_bytes;
                here_cache += cache;
                "this machine".to_owned()
            };
            let count = slice.blocks.count();
            let blocks = if count == 1 { "block" } else { "blocks" };
            writeln!(
                out,
                "  {:<6}  {:>8} {:<14} {:>10} weights + {:>9} cache   {place}",
                slice.role.as_str(),
                slice.blocks.to_string(),
                format!("({count} {blocks})"),
                gib(slice.weight_bytes),
                gib(cache),
            )?;
            let mark = match slice.role {
                Role::Head => 'H',
                Role::Tail => 'T',
                Role::Middle => char::from_digit(device % 10, 10).unwrap_or('M'),
            };
            let link = if slice.role == Role::Head { "" } else { "--" };
            let width =
                if h.n_blocks <= PICTURE_WIDTH { count } else { (count * PICTURE_WIDTH / h.n_blocks).max(1) };
            picture.push_str(&format!("{link}[{}]", mark.to_string().repeat(width as usize)));
        }
        writeln!(out, "\n{picture}> logits")?;
        writeln!(
            out,
            "\n  this machine holds {} weights + {} cache at {n_ctx} tokens; {} to write",
            gib(here_weights),
            gib(here_cache),
            gib(plan.file_bytes())
        )
    }
}

/// One line a middle: what the phone will get.
pub(crate) struct PackagesView<'a> {
    pub(crate) packages: &'a [coreml::Plan<'a>],
    pub(crate) stem: &'a str,
}

impl fmt::Display for PackagesView<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for plan in self.packages {
            let (n, directory) = (plan.n_packages(), coreml::directory_name(self.stem, plan.blocks()));
            let (weights, state) = (gib(plan.weight_bytes()), gib(plan.state_bytes()));
            let packages = if n == 1 { "package" } else { "packages" };
            writeln!(
                out,
                "  Core ML: {}: {n} {packages}, {weights} weights + {state} cache",
                Safe(&directory)
            )?;
        }
        Ok(())
    }
}

/// Characters of the picture of a long model.
const PICTURE_WIDTH: u32 = 80;

/// What a cut took.
#[derive(Clone, Copy)]
pub(crate) struct Took {
    /// In all, until the slices are safe on the disk.
    pub(crate) seconds: f64,
    /// Until all data was read, digested and handed to the system.
    pub(crate) copy_seconds: f64,
    /// Whether everything was read again.
    pub(crate) verified: bool,
}

/// What was written.
pub(crate) struct Written<'a> {
    pub(crate) manifest: &'a Manifest,
    /// The folder.
    pub(crate) out: &'a Path,
    pub(crate) took: Took,
}

/// One object: the plan, and what was written if anything was.
pub(crate) fn print_json(
    plan: &Plan<'_>,
    n_ctx: u32,
    written: Option<&Written<'_>>,
    packages: &[coreml::Report],
) -> Result<(), Failure> {
    let slices: Vec<_> = plan
        .slices
        .iter()
        .enumerate()
        .map(|(i, slice)| {
            serde_json::json!({
                "role": slice.role,
                "first": slice.blocks.first,
                "last": slice.blocks.last,
                "n_blocks": slice.blocks.count(),
                "file": slice.file,
                "bytes": slice.file_bytes,
                "weight_bytes": slice.weight_bytes,
                "kv_bytes": slice.kv_bytes_per_position * u64::from(n_ctx),
                "sha256": written.map(|w| &w.manifest.slices[i].sha256),
                "canary": written.is_some_and(|w| w.manifest.slices[i].canary.is_some()),
            })
        })
        .collect();
    let object = serde_json::json!({
        "model": {
            "name": plan.model_name,
            "arch": plan.hparams.arch,
            "n_blocks": plan.hparams.n_blocks,
            "n_embd": plan.hparams.n_embd,
            "n_vocab": plan.hparams.n_vocab,
            "sha256": written.map(|w| &w.manifest.model.sha256),
        },
        "n_ctx": n_ctx,
        "bytes": plan.file_bytes(),
        "slices": slices,
        "out": written.map(|w| w.out.display().to_string()),
        "seconds": written.map(|w| w.took.seconds),
        "copy_seconds": written.map(|w| w.took.copy_seconds),
        "coreml": packages.iter().map(coreml_json).collect::<Vec<_>>(),
        "verified": written.is_some_and(|w| w.took.verified),
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{object}").map_err(|e| Failure::failed(format!("cannot write to standard output: {e}")))
}

fn coreml_json(report: &coreml::Report) -> serde_json::Value {
    serde_json::json!({
        "directory": report.directory.display().to_string(),
        "bytes": report.bytes,
        "packages": report.manifest.packages.len(),
        "residual_scale": report.manifest.residual_scale,
        "max_abs_hidden": report.manifest.selftest.as_ref().map(|t| &t.max_abs_hidden),
        "write_seconds": report.write_time.as_secs_f64(),
    })
}
