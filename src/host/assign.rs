//! Who holds which blocks: every block of the model in exactly one stage.

use std::path::{Path, PathBuf};

use dim_core::blocks::BlockRange;
use dim_wire::HandshakeError;
use dim_wire::keys::Key;
use dim_wire::terms::SliceRole;
use dim_wire::transport::{LinkError, LinkErrorKind, Timing, inquire_unless};
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;

use crate::error::Error;
use crate::event::{Event, Events};
use crate::host::address;
use crate::host::builder::HostOptions;
use crate::host::discovery;
use crate::host::split::Split;
use crate::retry::retry;
use crate::stage::remote::WorkerStage;
use crate::terms;

/// A middle, and who holds it.
pub(crate) struct Assigned {
    pub blocks: BlockRange,
    pub holder: Holder,
}

/// Who holds a middle.
pub(crate) enum Holder {
    /// This process, from a file.
    Here { path: PathBuf, info: Box<SliceInfo> },
    /// A worker that is to be dialled.
    Worker {
        address: String,
        key: Key,
        /// how many sessions it can be asked for
        max_sessions: u32,
    },
    /// A worker that is connected already.
    Connected { address: String, stage: Box<WorkerStage> },
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Holder::Here { path, .. } => path.display().fmt(f),
            Holder::Worker { address, .. } | Holder::Connected { address, .. } => f.write_str(address),
        }
    }
}

/// What comes of the first key that is not a stranger's to the worker: a key belongs to a worker, wherever that is now.
pub(crate) fn with_one_of<'k, T>(
    keys: impl IntoIterator<Item = &'k Key>,
    mut ask: impl FnMut(&Key) -> Result<T, LinkError>,
) -> Result<(T, &'k Key), LinkError> {
    let mut refused = None;
    for key in keys {
        match ask(key) {
            Err(error) if error.kind == LinkErrorKind::Handshake(HandshakeError::Key) => {
                refused = Some(error)
            }
            answer => return answer.map(|answer| (answer, key)),
        }
    }
    Err(refused.unwrap_or_else(|| LinkErrorKind::Handshake(HandshakeError::Key).with("the worker")))
}

/// The middles of a model, in the order of their blocks: with head and tail they are all its blocks.
pub(crate) struct Assignment(pub Vec<Assigned>);

impl Split {
    /// Finds a holder for every block between head and tail: the workers that are named, then those that are found, then
    /// the files that are at hand.
    pub(crate) fn assign(&self, options: &HostOptions, events: &Events) -> Result<Assignment, Error> {
        let mut middles = Vec::new();
        for (address, keys) in &options.workers {
            match self.ask(address, keys, options, events) {
                Ok(middle) => middles.push(middle),
                // its file is here, and taken below
                Err(Error::Link(error)) if options.falls_back && error.may_pass() => {
                    let (stage, by) = (format!("middle @ {address}"), Role::Middle.to_string());
                    events.tell(Event::FellBack { stage, by, steps: 0 });
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(search) = &options.search {
            middles.extend(self.find(search, &middles, options, events)?);
        }
        for middle in &self.files.middles {
            // a middle that no worker holds runs here, if its file is at hand
            if middles.iter().any(|m| m.blocks.first == middle.blocks.first) {
                continue;
            }
            // where a worker has others of these blocks, that is what is wrong
            let others =
                |m: &Assigned| m.blocks.first <= middle.blocks.last && middle.blocks.first <= m.blocks.last;
            if !middle.path.is_file() && middles.iter().any(others) {
                continue;
            }
            let info = Box::new(self.open_middle(middle, events)?);
            let holder = Holder::Here { path: middle.path.clone(), info };
            middles.push(Assigned { blocks: middle.blocks, holder });
        }
        middles.sort_by_key(|m| m.blocks.first);
        let file = |path: &Path| path.display().to_string();
        let mut held = vec![(file(&self.files.head), self.head.blocks)];
        held.extend(middles.iter().map(|m| (m.holder.to_string(), m.blocks)));
        held.push((file(&self.files.tail), self.tail.blocks));
        check_chain(&held, self.head.model_blocks)?;
        Ok(Assignment(middles))
    }

    /// What the worker at an address, as it was given, holds.
    fn ask(
        &self,
        given: &str,
        keys: &[Key],
        options: &HostOptions,
        events: &Events,
    ) -> Result<Assigned, Error> {
        let address = address::complete(given)?;
        let inquire =
            || with_one_of(keys, |key| inquire_unless(events.off(), &address, key, &Timing::default()));
        let first = inquire();
        if let Err(LinkError { kind: LinkErrorKind::Unreachable { is_refused: true, .. }, .. }) = first
            && !address::names_its_port(given)
        {
            return Err(Error::NothingAtAssumedPort { given: given.to_owned(), address });
        }
        let mut first = Some(first);
        let (offer, key) = retry(
            options.patience,
            events.off(),
            |error, give_up_after| events.tell(retrying(error, give_up_after)),
            || first.take().unwrap_or_else(inquire),
        )?;
        if offer.role == SliceRole::None {
            return Err(Error::NoSliceThere { address });
        }
        let described = terms::offered(&offer);
        if offer.model != Some(self.head.model_sha256) {
            let (head, model_name) = (self.files.head.clone(), self.head.model_name.clone());
            return Err(Error::OtherModelThere { address, offer: described, head, model_name });
        }
        let Some(blocks) = terms::blocks_of(&offer, self.head.model_blocks) else {
            return Err(Error::NoSuchBlocks { address, offer: described });
        };
        let holder = Holder::Worker { address, key: key.clone(), max_sessions: offer.max_sessions };
        Ok(Assigned { blocks, holder })
    }

    /// Workers of the local network for the blocks that nobody has yet.
    fn find(
        &self,
        search: &discovery::Discovery,
        taken: &[Assigned],
        options: &HostOptions,
        events: &Events,
    ) -> Result<Vec<Assigned>, Error> {
        let mut blocks: Vec<BlockRange> = taken.iter().map(|m| m.blocks).collect();
        blocks.extend([self.head.blocks, self.tail.blocks]);
        let need = discovery::Need {
            model: self.head.model_sha256,
            model_name: &self.head.model_name,
            n_blocks: self.head.model_blocks,
            gaps: discovery::gaps(&mut blocks),
            here: self.files.middles.iter().filter(|m| m.path.is_file()).map(|m| m.blocks).collect(),
            patience: options.patience,
        };
        let needs = options.needs();
        let found = discovery::find(search, &need, events, &mut |address, key, blocks| {
            let wanted = options.wanted_sessions(self.files.canary_of(blocks).is_ok());
            let terms = terms::of_host(&needs, &self.head, &self.files.expected(blocks), wanted);
            let (timing, limit) = (Timing::default(), options.step_timeout);
            WorkerStage::connect(address, key, terms, options.sessions, timing, limit, events.off())
        })?;
        let assigned = |discovery::Found { address, blocks, stage }| Assigned {
            blocks,
            holder: Holder::Connected { address, stage: Box::new(stage) },
        };
        Ok(found.into_iter().map(assigned).collect())
    }
}

/// What is told of a worker that is tried again.
pub(crate) fn retrying(error: &LinkError, give_up_after: std::time::Duration) -> Event {
    Event::Retrying { reason: error.to_string(), give_up_after }
}

/// Every block in exactly one stage, in order.
fn check_chain(held: &[(String, BlockRange)], n_blocks: u32) -> Result<(), Error> {
    let nobody =
        |first, last| Err(Error::NobodyHas { blocks: BlockRange { first, last }, held: held.to_vec() });
    let mut next = 0;
    for (_, blocks) in held {
        if blocks.first > next {
            return nobody(next, blocks.first - 1);
        }
        if blocks.first < next {
            return Err(Error::TwoHave { block: blocks.first, held: held.to_vec() });
        }
        next = blocks.last + 1;
    }
    match next < n_blocks {
        true => nobody(next, n_blocks - 1),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(blocks: &[(u32, u32)], n_blocks: u32) -> String {
        let held: Vec<_> = "abc"
            .chars()
            .zip(blocks)
            .map(|(who, &(first, last))| (who.into(), BlockRange { first, last }))
            .collect();
        check_chain(&held, n_blocks).map_or_else(|e| e.to_string(), |()| "whole".to_owned())
    }

    #[test]
    fn every_block_has_to_be_in_exactly_one_stage() {
        assert_eq!(check(&[(0, 0), (1, 2), (3, 5)], 6), "whole");
        assert_eq!(check(&[(0, 0), (3, 5)], 6), "nobody has blocks 1..2: a has 0..0, b has 3..5");
        assert_eq!(
            check(&[(0, 0), (1, 3), (3, 5)], 6),
            "two stages have block 3: a has 0..0, b has 1..3, c has 3..5"
        );
        assert_eq!(check(&[(0, 0), (1, 2)], 6), "nobody has blocks 3..5: a has 0..0, b has 1..2");
        assert_eq!(check(&[(1, 5)], 6), "nobody has blocks 0..0: a has 1..5");
    }
}
