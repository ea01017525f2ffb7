//! What a person sees of what happens: the library's events as lines on stderr, and text as it comes on stdout.

use std::fmt::Write as _;

use dim::Event;
use dim::event::{NoCanary, Placement, Sighted};
use dim_wire::transport::{LinkError, LinkErrorKind};
use gguf_tools::tell;

use crate::progress::{ProgressLine, size};

/// Shows events on stderr; what only `--verbose` is to show, if it is `verbose`.
pub fn events(verbose: bool) -> impl FnMut(Event) + Send + 'static {
    let mut progress: Option<(String, ProgressLine)> = None;
    move |event| {
        let (doing, done, total) = match &event {
            Event::Checking { file, done, total } => (format!("checking {file}"), *done, *total),
            Event::Loading { file, done, total } => (format!("loading {file}"), *done, *total),
            other => {
                // its line is wiped before another is written
                progress = None;
                if let Some(line) = line(other, verbose) {
                    tell!("{line}");
                }
                return;
            }
        };
        let mut shown = match progress.take() {
            Some((what, shown)) if what == doing => shown,
            before => {
                drop(before);
                ProgressLine::new(doing.clone())
            }
        };
        shown.update(done, total);
        progress = Some((doing, shown));
    }
}

/// An event as a line; `None` where there is nothing to say.
fn line(event: &Event, verbose: bool) -> Option<String> {
    Some(match event {
        Event::SlowBuild { unused } => format!(
            "warning: this program was built without {}, which this machine has, and is several times slower for it; \
             build it with RUSTFLAGS=\"-C target-cpu=native\"",
            unused.join(", ")
        ),
        Event::BeyondTraining { n_ctx, n_ctx_train } => {
            format!("note: this model was trained for {n_ctx_train} positions; --ctx {n_ctx} goes beyond it")
        }
        Event::Retrying { reason, give_up_after } => {
            format!("{reason}; trying for up to {} s", give_up_after.as_secs())
        }
        Event::Unchecked { .. } | Event::Checked { .. } if !verbose => return None,
        Event::Unchecked { address, why } => {
            format!("note: whether {address} computes right is not checked: {}", no_canary(*why))
        }
        Event::Checked { stage, cosine } => format!("note: {stage} answers right: a cosine of {cosine:.7}"),
        Event::Snapshots { file, snapshots: 0, .. } => {
            format!(
                "note: {file}: llama.cpp keeps no snapshots of this model's states: a conversation is taken back by \
                     evaluating it anew"
            )
        }
        Event::Snapshots { file, snapshots, cache_bytes } => {
            format!(
                "note: {file}: {snapshots} snapshots of its states; caches and states take {}",
                size(*cache_bytes as f64)
            )
        }
        Event::Searching => "looking for workers on the local network".to_owned(),
        Event::Seen { name, address, found } if name.is_empty() => format!("{address}: {}", sighted(found)),
        Event::Seen { name, address, found } => format!("{name} ({address}): {}", sighted(found)),
        Event::Ready { stages, n_blocks } => picture(stages, *n_blocks),
        Event::Lost { stage, reason, give_up_after } => {
            format!("\n[{stage} lost: {reason}; looking for it for up to {} s]", give_up_after.as_secs())
        }
        Event::Paused { reason, give_up_after, .. } => {
            format!("\n[{reason}; the reply waits for it, up to {} s]", give_up_after.as_secs())
        }
        Event::Replaying { stage, steps } => {
            format!("[{stage} answers again; sending it {steps} steps once more]")
        }
        Event::FellBack { stage, steps, .. } => {
            let again =
                if *steps > 0 { format!("; {steps} steps are evaluated again") } else { String::new() };
            format!(
                "[{stage} stayed away: its blocks run here from now on, until this is started anew{again}]"
            )
        }
        Event::Back { stage, after } => format!("[{stage} is back after {:.1} s]", after.as_secs_f64()),
        Event::Notice(notice) => notice.to_string(),
        Event::NotAnnounced { why } => {
            format!("note: hosts do not find this worker by themselves ({why}); its address works")
        }
        Event::Serving { host } => format!("serving {host}"),
        Event::Finished { host } => format!("{host} has finished"),
        Event::Gone(error) => error.to_string(),
        _ => return None,
    })
}

/// Why a worker has no canary.
fn no_canary(why: NoCanary) -> &'static str {
    match why {
        NoCanary::Off => "--no-canary",
        NoCanary::NoManifest => "only --split STEM.split.json says what it has to answer",
        NoCanary::NotInManifest => "the manifest says nothing of it; cut the model again",
        NoCanary::OtherRows => "what crosses the ends of these blocks is more than rows of singles",
    }
}

/// What became of a worker of the local network, without its name.
fn sighted(found: &Sighted) -> String {
    match found {
        Sighted::Holds(offer) => format!("paired, holds {offer}"),
        Sighted::NoSlice => "has no slice yet: dim-host push gives it one".to_owned(),
        Sighted::OtherModel(offer) => format!("holds another model: {offer}"),
        Sighted::OtherBlocks { offer, needed } => {
            let needed: Vec<String> = needed.iter().map(ToString::to_string).collect();
            format!("holds other blocks: {offer}, needed are {}", needed.join(" and "))
        }
        Sighted::NotPaired { address } => format!("not paired with this host: dim-host pair {address}"),
        Sighted::NotAsked { why } => format!("not asked: {why}"),
        Sighted::Failed(LinkError { kind: LinkErrorKind::Busy { host, since_ms, .. }, .. }) => {
            format!("busy: it has served {host} for {} s", since_ms / 1000)
        }
        Sighted::Failed(LinkError { kind: LinkErrorKind::Unreachable { text, .. }, .. })
            if text.is_empty() =>
        {
            "not reachable".to_owned()
        }
        Sighted::Failed(LinkError { kind: LinkErrorKind::Unreachable { text, .. }, .. }) => {
            format!("not reachable: {text}")
        }
        Sighted::Failed(other) => other.to_string(),
    }
}

/// One line: which blocks run where.
fn picture(stages: &[Placement], n_blocks: u32) -> String {
    let mut line = format!("{n_blocks} blocks: ");
    for (i, Placement { role, blocks, worker }) in stages.iter().enumerate() {
        let arrow = if i == 0 { "" } else { " -> " };
        let count = blocks.count();
        let plural = if count == 1 { "" } else { "s" };
        let _ = match worker {
            None => write!(line, "{arrow}{role} {blocks} here ({count} block{plural})"),
            Some(address) => write!(line, "{arrow}{blocks} on {address} ({count} block{plural})"),
        };
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use dim::BlockRange;
    use gguf_tools::plan::Role;

    #[test]
    fn the_picture_says_which_blocks_run_where() {
        let place = |role, first, last, worker: Option<&str>| Placement {
            role,
            blocks: BlockRange { first, last },
            worker: worker.map(str::to_owned),
        };
        let stages = [
            place(Role::Head, 0, 0, None),
            place(Role::Middle, 1, 2, Some("192.0.2.7:7878")),
            place(Role::Tail, 3, 5, None),
        ];
        assert_eq!(
            picture(&stages, 6),
            "6 blocks: head 0..0 here (1 block) -> 1..2 on 192.0.2.7:7878 (2 blocks) -> tail 3..5 here (3 blocks)"
        );
    }

    #[test]
    fn checks_are_told_to_the_curious_only() {
        let event = Event::Checked { stage: "middle @ here".to_owned(), cosine: 1.0 };
        assert_eq!(line(&event, false), None);
        assert!(line(&event, true).is_some());
    }
}
