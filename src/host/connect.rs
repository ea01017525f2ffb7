//! From an assignment to stages that are ready: workers dialled and checked, slices loaded.

use std::sync::Arc;

use dim_core::blocks::BlockRange;
use dim_core::guard::{Guarded, Room};
use dim_core::pipeline::{Pipeline, StageSlot};
use dim_core::reserve::OrHere;
use dim_core::stage::RemoteStage;
use dim_wire::transport::Timing;
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;

use crate::error::Error;
use crate::event::{Event, Events, NoCanary, Placement};
use crate::host::Host;
use crate::host::assign::{Assigned, Assignment, Holder, retrying};
use crate::host::builder::HostOptions;
use crate::host::engine::SplitEngine;
use crate::host::prompt::Vocabulary;
use crate::host::saved;
use crate::host::seams::{self, Sides};
use crate::host::split::Split;
use crate::retry::{Retry, retry, wait};
use crate::stage::load::{self, LoadOptions};
use crate::stage::local::LlamaStage;
use crate::stage::remote::WorkerStage;
use crate::stage::reserve::SliceReserve;
use crate::terms;

/// A middle whose worker, if it has one, is dialled.
enum Dialled {
    Here(std::path::PathBuf, Box<SliceInfo>),
    Remote(BlockRange, Box<dyn RemoteStage>, Option<Sides>),
}

impl Assignment {
    /// Dials and checks every worker, then loads what runs here: how many rows go at once is known only then.
    pub(crate) fn connect(
        self,
        split: &Split,
        options: &HostOptions,
        events: &Events,
    ) -> Result<Host, Error> {
        let mut placements = vec![here(&split.head)];
        let mut n_ubatch = options.resources.n_ubatch;
        let mut dialled = Vec::new();
        for Assigned { blocks, holder } in self.0 {
            let (worker, ready) = match holder {
                Holder::Here { path, info } => (None, Dialled::Here(path, info)),
                remote => {
                    let (dialled, address) = dial(split, options, events, blocks, remote, &mut n_ubatch)?;
                    (Some(address), dialled)
                }
            };
            placements.push(Placement { role: Role::Middle, blocks, worker });
            dialled.push(ready);
        }
        placements.push(here(&split.tail));

        let n_ctx = options.resources.n_ctx;
        let load_options = LoadOptions {
            resources: crate::Resources { n_ubatch, ..options.resources },
            mmap: options.mmap,
            max_sessions: options.sessions,
            compute_bytes: None,
        };
        let local = |path: &std::path::Path, info: &SliceInfo| -> Result<LlamaStage, Error> {
            load::stage(path, info, &load_options, events)
        };
        let head = local(&split.files.head, &split.head)?;
        let mut saved = saved::Stages::new(&split.head, options.wire);
        saved.here(&split.head, &head);
        let vocabulary = Arc::new(Vocabulary::new(head.inner().model().clone()));
        let mut sides = vec![Sides::of_stage("the head", &head)];
        let mut stages = vec![StageSlot::Local(Box::new(head))];
        for middle in dialled {
            stages.push(match middle {
                Dialled::Here(path, info) => {
                    let middle = local(&path, &info)?;
                    saved.here(&info, &middle);
                    sides.push(Sides::of_stage(format!("the middle {}", info.blocks), &middle));
                    StageSlot::Local(Box::new(middle))
                }
                Dialled::Remote(blocks, stage, worker) => {
                    let output = worker.as_ref().map(|sides| sides.output().clone());
                    saved.away(blocks, split.files.expected(blocks).slice, output);
                    sides.extend(worker);
                    StageSlot::Remote(match options.falls_back {
                        true => or_here(stage, split, &load_options, events)?,
                        false => stage,
                    })
                }
            });
        }
        let tail = local(&split.files.tail, &split.tail)?;
        saved.here(&split.tail, &tail);
        sides.push(Sides::of_stage("the tail", &tail));
        seams::check(&sides)?;
        stages.push(StageSlot::Local(Box::new(tail)));
        let mut pipeline = Pipeline::new(stages, options.wire, options.patience);
        pipeline.set_batch_rows(options.batch_rows.min(n_ubatch));
        events.tell(Event::Ready { stages: placements, n_blocks: split.head.model_blocks });
        let saving = saved.belongs(split.head.model_blocks, &load_options.resources);
        let saving = saving.filter(|_| pipeline.can_save());
        let engine = SplitEngine::new(pipeline, n_ubatch, options.sessions, events.clone());
        Ok(Host { engine, vocabulary, n_ctx, model_name: split.head.model_name.as_str().into(), saving })
    }
}

/// A worker's stage whose blocks run here if it stays away.
fn or_here(
    stage: Box<dyn RemoteStage>,
    split: &Split,
    options: &LoadOptions,
    events: &Events,
) -> Result<Box<dyn RemoteStage>, Error> {
    let Some(blocks) = stage.blocks() else { return Ok(stage) };
    let (path, slice) = split.reserve(blocks, events)?;
    let reserve = SliceReserve::new(path, slice, split.verify(), *options, events);
    Ok(Box::new(OrHere::new(stage, Box::new(reserve))))
}

fn here(info: &SliceInfo) -> Placement {
    Placement { role: info.role, blocks: info.blocks, worker: None }
}

/// A worker's stage, connected and checked, what it takes and gives, and the worker's address. `n_ubatch` becomes what it
/// takes, if that is less.
fn dial(
    split: &Split,
    options: &HostOptions,
    events: &Events,
    blocks: BlockRange,
    holder: Holder,
    n_ubatch: &mut u32,
) -> Result<(Dialled, String), Error> {
    let canary = match options.canary {
        true => split.files.canary_of(blocks),
        false => Err(NoCanary::Off),
    };
    let (stage, address) = match holder {
        Holder::Connected { address, stage } => (*stage, address),
        Holder::Worker { address, key, max_sessions } => {
            let needed = options.sessions;
            if max_sessions < needed {
                return Err(Error::TooFewSessions { address, has: max_sessions, needed });
            }
            let wanted = options.wanted_sessions(canary.is_ok()).min(max_sessions);
            let expected = split.files.expected(blocks);
            let terms = terms::of_host(&options.needs(), &split.head, &expected, wanted);
            let stage = retry(
                options.patience,
                events.off(),
                |error, give_up_after| events.tell(retrying(error, give_up_after)),
                || {
                    let terms = terms.clone();
                    let (timing, limit) = (Timing::default(), options.step_timeout);
                    WorkerStage::connect(&address, &key, terms, needed, timing, limit, events.off())
                },
            )?;
            (stage, address)
        }
        Holder::Here { path, .. } => return Err(Error::NotHere { blocks, path }),
    };
    // what came of the connection; one that was lost since is made again by the first check or step
    let (sides, widths) = match stage.link() {
        Some(link) => {
            *n_ubatch = link.agreed().max_rows.min(*n_ubatch);
            (Some(Sides::of_worker(link)), terms::canary_widths(&link.agreed().shape))
        }
        None => (None, Some((split.head.hparams.n_embd as usize).into())),
    };
    match canary.and_then(|canary| widths.map(|widths| (canary, widths)).ok_or(NoCanary::OtherRows)) {
        Err(why) => {
            events.tell(Event::Unchecked { address: address.clone(), why });
            Ok((Dialled::Remote(blocks, Box::new(stage), sides), address))
        }
        Ok((canary, widths)) => {
            let (dtype, n_ctx, max_rows) = (options.wire, options.resources.n_ctx, *n_ubatch);
            let room = Room { widths, dtype, n_ctx, max_rows, sessions: options.sessions };
            let stage = Guarded::new(stage, canary.clone(), room);
            Ok((Dialled::Remote(blocks, Box::new(checked(stage, options, events)?), sides), address))
        }
    }
}

/// A worker that passed its canary. One that is lost meanwhile is looked for as at any other time.
fn checked(
    mut stage: Guarded<WorkerStage>,
    options: &HostOptions,
    events: &Events,
) -> Result<Guarded<WorkerStage>, Error> {
    let mut state = Retry::new(options.patience, std::time::Instant::now());
    let goes_on = || events.goes_on();
    let mut result = stage.check(&goes_on);
    loop {
        let error = match result {
            Ok(cosine) => {
                if let Some(cosine) = cosine {
                    events.tell(Event::Checked { stage: stage.name(), cosine });
                }
                return Ok(stage);
            }
            Err(error) => error,
        };
        let mut tell = |error: &dim_core::stage::StageError, give_up_after| {
            events.tell(Event::Retrying { reason: error.to_string(), give_up_after });
        };
        wait(&mut state, error, events.off(), &mut tell)
            .map_err(|source| Error::Check { stage: stage.name(), source })?;
        // a check is part of every new connection
        result = stage.reconnect(&goes_on);
    }
}
