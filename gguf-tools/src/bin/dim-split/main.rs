//! `dim-split`: cuts a GGUF into a head, one or more middles and a tail, each a GGUF of its own.
#![forbid(unsafe_code)]

mod fetched;
mod hints;
mod meter;
mod options;
mod show;

use std::{path::Path, process::ExitCode, time::Instant};

use clap::Parser;
use gguf_tools::{
    apart,
    ask::Ask,
    coreml,
    failure::Failure,
    gguf::{Gguf, check},
    manifest::Manifest,
    plan::{Plan, PlanError, Request},
    split::{self, CutProgress},
    tell, terminal,
    text::{Safe, gib},
};
use meter::Meter;
use options::Options;
use show::{CutsView, PackagesView, PlanView, Took, Written, print_cuts, print_json};

fn main() -> ExitCode {
    // this program again, for what a file may end: see gguf_tools::apart
    if std::env::args_os().nth(1).is_some_and(|argument| argument == apart::ARGUMENT) {
        return apart::serve();
    }
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    if options.middle.is_empty() && !options.dry_run {
        return Err(hints::of_plan(PlanError::NoMiddle));
    }
    // what a dry run tells stands in the header; Core ML packages are planned by some of the weights
    let headers = options.dry_run && options.coreml.options().is_none();
    let model = fetched::find(&options.model, headers)?;
    let gguf = Gguf::open(&model.path)?;
    let stem = gguf.stem();
    let ask = std::env::current_exe().map_or(Ask::Here, Ask::Apart);
    if let Some(projector) = projector_beside(&model.path) {
        tell!(
            "{} lies beside the model and is left alone: it is for images and sound, and text goes without it",
            Safe(&projector)
        );
    }
    if options.middle.is_empty() {
        return show_cuts(options, &gguf, &ask);
    }
    let request = Request {
        middles: options.middle.clone(),
        embed_type: options.embed_type,
        output_type: options.output_type,
        stem: stem.clone(),
        no_canary: options.no_canary,
        renumber: options.renumber,
        ask,
        source: model.source,
    };
    let plan = Plan::new(&gguf, &request).map_err(hints::of_plan)?;
    let n_ctx_train = plan.hparams.n_ctx_train;
    let n_ctx = match options.ctx {
        None => n_ctx_train.min(MOST_CTX_SHOWN),
        Some(0) => n_ctx_train,
        Some(n_ctx) => n_ctx,
    };
    let packages = match options.coreml.options() {
        Some(o) => coreml::plan_middles(&gguf, &options.middle, o).map_err(hints::of_coreml)?,
        None => Vec::new(),
    };
    terminal::tell(format_args!("{}", PlanView { plan: &plan, n_ctx }));
    terminal::tell(format_args!("{}", PackagesView { packages: &packages, stem: &stem }));

    if options.dry_run {
        if options.json {
            print_json(&plan, n_ctx, None, &[])?;
        }
        return Ok(());
    }

    let out = options.out.clone().unwrap_or(model.out);
    coreml::check_space(&packages, &out, plan.file_bytes()).map_err(hints::of_coreml)?;
    let (manifest, took) = write_slices(&plan, &out, &stem, options.verify)?;
    let reports = write_packages(&packages, &manifest, &out, &stem)?;
    if options.json {
        print_json(&plan, n_ctx, Some(&Written { manifest: &manifest, out: &out, took }), &reports)?;
    }
    Ok(())
}

/// Where the model can be cut, for whoever has yet to choose.
fn show_cuts(options: &Options, gguf: &Gguf, ask: &Ask) -> Result<(), Failure> {
    let hparams = check::hparams(gguf)?;
    let file = || gguf.path().display().to_string();
    let cuts = ask.cuts(gguf).map_err(|why| PlanError::Needs { file: file(), why, nearest: None })?;
    terminal::tell(format_args!("{}", CutsView { hparams: &hparams, cuts: &cuts }));
    if options.json {
        print_cuts(&hparams, &cuts)?;
    }
    Ok(())
}

/// Context length that memory figures are shown for where none was asked: what people begin with.
const MOST_CTX_SHOWN: u32 = 4096;

/// Cuts, and compares where that was asked.
fn write_slices(plan: &Plan<'_>, out: &Path, stem: &str, verify: bool) -> Result<(Manifest, Took), Failure> {
    let started = Instant::now();
    let mut meter = Meter::new();
    let mut copied = None;
    let result = split::split(plan, out, stem, |p| {
        match p {
            CutProgress::Flushing => copied = Some(started.elapsed().as_secs_f64()),
            CutProgress::NoCanary(file, why) => {
                meter.clear();
                let why = why.to_string();
                tell!(
                    "{}: no canary, so a host cannot tell whether a worker computes right: {}",
                    Safe(file),
                    Safe(&why)
                );
            }
            _ => {}
        }
        meter.show(p);
    });
    meter.clear();
    let manifest = result.map_err(hints::of_split)?;
    let seconds = started.elapsed().as_secs_f64();
    tell!(
        "wrote {} in {seconds:.1} s ({:.2} GB/s): {}",
        gib(plan.file_bytes()),
        plan.file_bytes() as f64 / 1e9 / seconds.max(1e-9),
        Safe(&out.join(split::manifest_name(stem)).display().to_string())
    );

    if verify {
        let mut meter = Meter::new();
        let result = split::verify(plan, out, &manifest, |p| meter.show(p));
        meter.clear();
        // whatever it is, it is not what was asked for that is wrong
        result.map_err(Failure::failed)?;
        tell!("verified: every key and tensor of the slices equals the model's");
    }
    Ok((manifest, Took { seconds, copy_seconds: copied.unwrap_or(seconds), verified: verify }))
}

/// Writes what `--coreml` asks for, and says what its user should know.
fn write_packages(
    packages: &[coreml::PackagePlan<'_>],
    manifest: &Manifest,
    out: &Path,
    stem: &str,
) -> Result<Vec<coreml::Report>, Failure> {
    let total: u64 = packages.iter().map(coreml::PackagePlan::weight_bytes).sum();
    let mut meter = Meter::new();
    let (mut done, mut before) = (0, 0);
    let result = coreml::write_middles(packages, manifest, out, stem, &mut |progress| match progress {
        coreml::PackageProgress::Calibrating { n_tokens } => {
            meter.clear();
            tell!("evaluating {n_tokens} tokens of text up to the end of the middle, for the self-test");
            before = done;
        }
        coreml::PackageProgress::Writing { index, bytes } => {
            // an evaluation is not writing's time
            if done == before {
                meter = Meter::new();
            }
            done += bytes;
            let (done, total) = (done - before, total - before);
            meter.show(CutProgress::Writing(done, total, &coreml::package::directory_name(index)));
        }
    });
    meter.clear();
    let reports = result.map_err(hints::of_coreml)?;
    for report in &reports {
        for notice in &report.notices {
            tell!("{}", Safe(&notice.to_string()));
        }
        if let Some(test) = &report.manifest.selftest {
            let max_abs: Vec<_> = test.max_abs_hidden.iter().map(|x| format!("{x:.1}")).collect();
            tell!("greatest |hidden| before the middle and after each of its blocks: {}", max_abs.join(" "));
        }
        let seconds = report.write_time.as_secs_f64();
        let rate = report.bytes as f64 / 1e9 / seconds.max(1e-9);
        tell!(
            "wrote {} in {seconds:.1} s ({rate:.2} GB/s): {}",
            gib(report.bytes),
            Safe(&report.directory.display().to_string())
        );
    }
    Ok(reports)
}

/// The name of a projector (`mmproj-*.gguf`) in the model's folder, as downloads bring one along.
fn projector_beside(model: &Path) -> Option<String> {
    let names = std::fs::read_dir(split::folder_of(model)).ok()?.flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.sort_unstable();
    let own = model.file_name()?.to_str()?;
    let is_projector = |name: &String| {
        let name = name.to_ascii_lowercase();
        name.starts_with("mmproj") && name.ends_with(".gguf")
    };
    names.into_iter().find(|name| is_projector(name) && name != own)
}
