//! The plan of a cut for people, and the result as JSON.

use std::{fmt, path::Path};

use gguf_tools::{
    coreml,
    failure::Failure,
    gguf::check::Hparams,
    manifest::Manifest,
    needs::{Crossing, Cuts, NoCut},
    plan::{LeftOut, Plan, Role},
    terminal,
    text::{Safe, Shown, gib},
};

/// What will be where, and what it takes.
///
/// ```text
/// qwen2.5-7b: qwen2, 28 blocks, width 3584, vocabulary 152064, KV cache
///
///   head       0..10 (11 blocks)      5.9 GiB weights + 176.0 MiB cache   this machine
///   middle    11..16 (6 blocks)       2.6 GiB weights +  96.0 MiB cache   device 1
///   tail      17..27 (11 blocks)      5.9 GiB weights + 176.0 MiB cache   this machine
///
///   tokens >[HHHHHHHHHHH]--[111111]--[TTTTTTTTTTT]> logits
///
///   before 11: 7168 bytes a token as F16 (14336 as F32): l_out-10 3584 x F32
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
            "{}: {}, {} blocks, width {}, vocabulary {}{}{}\n",
            Shown(&plan.model_name),
            Shown(&h.arch),
            plan.n_blocks,
            h.n_embd,
            h.n_vocab,
            if plan.memory.is_some() { ", " } else { "" },
            plan.memory.as_deref().unwrap_or_default(),
        )?;
        let (mut here_weights, mut here_cache) = (0, 0);
        let mut picture = String::from("  tokens >");
        let mut device = 0;
        for slice in &plan.slices {
            let cache = slice.kv_bytes_per_position * u64::from(n_ctx) + slice.state_bytes_per_session;
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
            let n_blocks = plan.n_blocks;
            let width =
                if n_blocks <= PICTURE_WIDTH { count } else { (count * PICTURE_WIDTH / n_blocks).max(1) };
            picture.push_str(&format!("{link}[{}]", mark.to_string().repeat(width as usize)));
        }
        writeln!(out, "\n{picture}> logits\n")?;
        for slice in &plan.slices[1..] {
            let ids = if slice.reads_tokens { " + token ids" } else { "" };
            writeln!(out, "  before block {}: {}{ids}", slice.blocks.first, Row(&slice.input))?;
        }
        write!(out, "{}", Left(&plan.left_out))?;
        writeln!(
            out,
            "\n  this machine holds {} weights + {} cache at {n_ctx} tokens; {} to write",
            gib(here_weights),
            gib(here_cache),
            gib(plan.file_bytes())
        )
    }
}

/// What crosses a cut: bytes first, then what they are where that is more than one hidden row.
struct Row<'a>(&'a Crossing);

impl fmt::Display for Row<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (f16, f32) = (self.0.bytes_f16(), self.0.bytes_f32());
        write!(out, "{f16} bytes a token as F16, {f32} as F32")?;
        if self.0.0.len() > 1 { write!(out, " ({})", self.0) } else { Ok(()) }
    }
}

/// What no slice holds, and why.
struct Left<'a>(&'a LeftOut);

impl fmt::Display for Left<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = self.0;
        if let (Some(first), Some(last)) = (left.predicting.first(), left.predicting.last()) {
            let blocks =
                if first == last { format!("block {first}") } else { format!("blocks {first}..{last}") };
            let bytes = gib(left.predicting_bytes);
            writeln!(out, "  left out: {blocks}, which predict further tokens (MTP): {bytes}")?;
        }
        if let Some(name) = left.unread.first() {
            let more = left.unread.len() - 1;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let bytes = gib(left.unread_bytes);
            writeln!(out, "  left out: {}{more}, which no block reads: {bytes}", Shown(name))?;
        }
        Ok(())
    }
}

/// Where a model can be cut, and why not elsewhere: cuts that are alike in one line.
///
/// ```text
/// gemma-4-e4b: gemma4, 42 blocks, width 2560, KV cache with sliding windows
///
///   before blocks 1..22: 2560 x F32 ...
///   not before blocks 23..41: blocks 23..41 ... read the keys of block 21, which they do not write
/// ```
pub(crate) struct CutsView<'a> {
    pub(crate) hparams: &'a Hparams,
    pub(crate) cuts: &'a Cuts,
}

impl fmt::Display for CutsView<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (h, cuts) = (self.hparams, self.cuts);
        writeln!(
            out,
            "{}: {}, {} blocks, width {}, {}\n",
            Shown(h.name.as_deref().unwrap_or("model")),
            Shown(&h.arch),
            cuts.n_blocks,
            h.n_embd,
            cuts.memory
        )?;
        let told: Vec<(bool, String)> = cuts.cuts.iter().map(tell).collect();
        let mut first = 0;
        while first < told.len() {
            let alike = told[first..].iter().take_while(|line| **line == told[first]).count();
            let (from, to) = (first + 1, first + alike);
            let blocks = if from == to { format!("block {from}") } else { format!("blocks {from}..{to}") };
            let (is_possible, what) = &told[first];
            writeln!(out, "  {}before {blocks}: {what}", if *is_possible { "" } else { "not " })?;
            first += alike;
        }
        let possible = cuts.cuts.iter().filter(|cut| cut.is_ok()).count();
        match possible {
            0 | 1 => writeln!(out, "\n  this model cannot be cut in three"),
            _ => writeln!(out, "\n  --middle A..B takes a cut before A and one before B + 1"),
        }
    }
}

/// A cut in a line that is the same for cuts that are alike: the numbers of blocks stand elsewhere.
fn tell(cut: &Result<Crossing, NoCut>) -> (bool, String) {
    match cut {
        Ok(crossing) => {
            let mut alike = crossing.clone();
            for part in &mut alike.0 {
                let name = part.name.trim_end_matches(|c: char| c.is_ascii_digit());
                part.name = name.trim_end_matches('-').to_owned();
            }
            (true, Row(&alike).to_string())
        }
        Err(why) => (false, Safe(&why.short).to_string()),
    }
}

/// The same as one object.
pub(crate) fn print_cuts(hparams: &Hparams, cuts: &Cuts) -> Result<(), Failure> {
    let cut = |(i, cut): (usize, &Result<Crossing, NoCut>)| match cut {
        Ok(crossing) => serde_json::json!({
            "before": i + 1,
            "bytes_f16": crossing.bytes_f16(),
            "bytes_f32": crossing.bytes_f32(),
            "parts": crossing,
        }),
        Err(why) => serde_json::json!({ "before": i + 1, "why_not": why.sentence }),
    };
    let object = serde_json::json!({
        "model": {
            "name": hparams.name,
            "arch": hparams.arch,
            "n_blocks": cuts.n_blocks,
            "n_embd": hparams.n_embd,
            "memory": cuts.memory,
        },
        "cuts": cuts.cuts.iter().enumerate().map(cut).collect::<Vec<_>>(),
    });
    print(&object)
}

/// One line a middle: what the phone will get.
pub(crate) struct PackagesView<'a> {
    pub(crate) packages: &'a [coreml::PackagePlan<'a>],
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
                "state_bytes": slice.state_bytes_per_session,
                "input": slice.input,
                "output": slice.output,
                "reads_tokens": slice.reads_tokens,
                "sha256": written.map(|w| &w.manifest.slices[i].sha256),
                "canary": written.is_some_and(|w| w.manifest.slices[i].canary.is_some()),
            })
        })
        .collect();
    let object = serde_json::json!({
        "model": {
            "name": plan.model_name,
            "arch": plan.hparams.arch,
            "n_blocks": plan.n_blocks,
            "memory": plan.memory,
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
    print(&object)
}

fn print(object: &serde_json::Value) -> Result<(), Failure> {
    terminal::print(&format!("{object}\n"))
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
