//! `--worker auto`: finds workers on the local network, tries those this host is paired with, and takes those whose
//! blocks fit. Tells for each one that it sees why it is or is not usable.
//!
//! ```text
//!     sighting ---> probe, in its turn (asking.rs): reachable? which key? what does it hold?
//!                     | no: told once, asked again         | yes: candidate
//!     candidates ---> do their blocks close the gap? ---> connect: busy? loading? ---> taken
//! ```

use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::pipeline::Patience;
use dim_wire::HandshakeError;
use dim_wire::keys::{Key, KeyError, KeyStore, Peer};
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::discover::{MDNS_PORT, Search, Sighting};
use dim_wire::transport::{CallOff, LinkError, LinkErrorKind, Timing, inquire_unless};

use crate::error::Error;
use crate::event::{Event, Events, Sighted};
use crate::host::asking::Asking;
use crate::host::assign::with_one_of;
use crate::retry::{Absent as _, Retry};
use crate::stage::remote::WorkerStage;
use crate::terms;

/// How long workers are looked for before middles that lie on this machine are taken instead.
const LOCAL_AFTER: Duration = Duration::from_secs(5);
/// How long a worker that could not be had is left alone.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Keys tried at one worker.
const MOST_KEYS: usize = 32;
/// Workers of which it is told why they cannot be used, besides those that are likely this user's.
const MOST_TOLD: usize = 64;
/// How long a look at the network takes.
const POLL: Duration = Duration::from_millis(50);

/// How workers of the local network are looked for.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// Keys that may open a worker, and whom each is shared with.
    pub keys: Vec<(Key, Peer)>,
    /// Where multicast DNS is spoken.
    pub mdns_port: u16,
}

impl Discovery {
    /// With the keys that this user has from pairing.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn of_user() -> Result<Discovery, KeyError> {
        let store = KeyStore::of_user()?;
        let mut keys = Vec::new();
        for (id, peer) in store.list()? {
            if let Some(key) = store.find(id)? {
                keys.push((key, peer));
            }
        }
        Ok(Discovery { keys, mdns_port: MDNS_PORT })
    }

    /// Whether it looks like a worker that this user is paired with: anybody can look like one.
    fn is_likely(&self, sighting: &Sighting) -> bool {
        self.keys.iter().any(|(_, peer)| {
            let is_named = !peer.name.is_empty() && sighting.name.starts_with(&peer.name);
            is_named || sighting.addresses.contains(&peer.address)
        })
    }

    /// With one key for all.
    pub fn with_key(key: Key) -> Discovery {
        Discovery { keys: vec![(key, Peer::default())], mdns_port: MDNS_PORT }
    }
}

/// What is looked for.
pub(crate) struct Need<'a> {
    /// Identity of the model.
    pub model: Sha,
    /// The model's name, for people.
    pub model_name: &'a str,
    /// Blocks of the model.
    pub n_blocks: u32,
    /// Blocks that nobody has yet, in order.
    pub gaps: Vec<BlockRange>,
    /// Middles that lie on this machine.
    pub here: Vec<BlockRange>,
    /// How long to look.
    pub patience: Patience,
}

/// A worker that was found, connected.
pub(crate) struct Found {
    /// Where it is.
    pub address: String,
    /// What it holds.
    pub blocks: BlockRange,
    /// The connection.
    pub stage: WorkerStage,
}

/// Agrees with a worker on its blocks.
type Connect<'a> = dyn FnMut(&str, &Key, BlockRange) -> Result<WorkerStage, LinkError> + 'a;

/// Finds workers that close all gaps. `connect` agrees with one on its blocks.
///
/// # Errors
/// None were found in time, or this machine cannot look.
pub(crate) fn find(
    how: &Discovery,
    need: &Need<'_>,
    events: &Events,
    connect: &mut Connect<'_>,
) -> Result<Vec<Found>, Error> {
    if need.gaps.is_empty() {
        return Ok(Vec::new());
    }
    let mut search = Search::start(how.mdns_port)?;
    events.tell(Event::Searching);
    let begun = Instant::now();
    let mut retry = Retry::new(need.patience, begun);
    let (tell, probed) = channel();
    let mut asking = Asking::default();
    // who is still being asked when this is over is asked no more
    let probes = Probes(CallOff::new());
    let mut candidates =
        Candidates { need, events, list: Vec::new(), told: HashMap::new(), lost: Vec::new() };
    loop {
        let look_until = Instant::now() + POLL;
        // announcements without an end do not keep it from asking
        while let Some(sighting) = search.next(look_until) {
            let is_likely = how.is_likely(&sighting);
            asking.saw(sighting, is_likely, Instant::now());
            if Instant::now() >= look_until {
                break;
            }
        }
        while let Some(sighting) = asking.next(Instant::now()) {
            probes.start(sighting, how.keys.clone(), tell.clone());
        }
        while let Ok((sighting, probe)) = probed.try_recv() {
            let holds = candidates.take_in(&sighting, probe, how.is_likely(&sighting));
            asking.answered(&sighting, holds, Instant::now());
        }
        for address in candidates.lost.drain(..) {
            asking.lost(&address, Instant::now());
        }
        let with_local = begun.elapsed() >= LOCAL_AFTER.min(need.patience.give_up_after);
        if candidates.close_the_gaps(with_local, connect, &mut retry) {
            return Ok(candidates.into_found(with_local));
        }
        if retry.is_over(Instant::now()) || !events.goes_on() {
            break;
        }
    }
    Err(Error::NoneFound {
        blocks: need.gaps.clone(),
        model_name: need.model_name.to_owned(),
        within_s: retry.limit().as_secs(),
        any_seen: !candidates.told.is_empty(),
    })
}

/// What a probe came to.
enum Probe {
    Holds { address: String, key: Key, offer: Box<Terms> },
    No(Sighted),
}

/// Probes, each in a thread of its own. They end with this.
struct Probes(CallOff);

impl Probes {
    fn start(&self, sighting: Sighting, keys: Vec<(Key, Peer)>, tell: Sender<(Sighting, Probe)>) {
        let (not_asked, failed, off) = (sighting.clone(), tell.clone(), self.0.clone());
        let run = move || {
            let probe = probe(&sighting, &keys, &off);
            // a search that is over listens no more
            let _ = tell.send((sighting, probe));
        };
        if let Err(e) = std::thread::Builder::new().name("dim-probe".into()).spawn(run) {
            let _ = failed.send((not_asked, Probe::No(Sighted::NotAsked { why: e.to_string() })));
        }
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.0.call_off();
    }
}

/// Asks a worker what it holds, with every key that may be the right one, the likeliest first.
fn probe(sighting: &Sighting, keys: &[(Key, Peer)], off: &CallOff) -> Probe {
    let mut unreachable = None;
    for address in &sighting.addresses {
        let mut sorted: Vec<&(Key, Peer)> = keys.iter().collect();
        sorted.sort_by_key(|(_, peer)| (peer.address != *address, peer.name != sighting.name));
        let likely = sorted.into_iter().take(MOST_KEYS).map(|(key, _)| key);
        match with_one_of(likely, |key| inquire_unless(off, address, key, &Timing::default())) {
            Ok((offer, key)) => {
                let (address, offer) = (address.clone(), Box::new(offer));
                return Probe::Holds { address, key: key.clone(), offer };
            }
            Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. }) => {
                return Probe::No(Sighted::NotPaired { address: address.clone() });
            }
            Err(error @ LinkError { kind: LinkErrorKind::Unreachable { .. }, .. }) => {
                unreachable.get_or_insert(error);
            }
            Err(error) => return Probe::No(Sighted::Failed(error)),
        }
    }
    let nowhere = || LinkErrorKind::Unreachable { text: String::new(), is_refused: false }.with("");
    Probe::No(Sighted::Failed(unreachable.unwrap_or_else(nowhere)))
}

struct Candidate {
    name: String,
    address: String,
    key: Key,
    blocks: BlockRange,
    stage: Option<WorkerStage>,
    /// it could not be had then
    failed: Option<Instant>,
}

/// Everybody who was seen.
struct Candidates<'a> {
    need: &'a Need<'a>,
    events: &'a Events,
    list: Vec<Candidate>,
    /// what was last told of whom
    told: HashMap<(String, String), Sighted>,
    /// addresses of those that could not be had after all
    lost: Vec<String>,
}

impl Candidates<'_> {
    fn tell(&mut self, name: &str, address: &str, found: Sighted, is_likely: bool) {
        let who = (name.to_owned(), address.to_owned());
        if self.told.get(&who).is_some_and(|before| is_same_reason(before, &found)) {
            return;
        }
        // a network full of announcements does not fill the screen, nor this machine's memory
        if self.told.len() >= MOST_TOLD && !is_likely && !self.told.contains_key(&who) {
            return;
        }
        let (name, address) = who.clone();
        self.events.tell(Event::Seen { name, address, found: found.clone() });
        self.told.insert(who, found);
    }

    /// What a probe came to: whether it holds what is looked for.
    fn take_in(&mut self, sighting: &Sighting, probe: Probe, is_likely: bool) -> bool {
        let name = &sighting.name;
        let (address, key, offer) = match probe {
            Probe::Holds { address, key, offer } => (address, key, offer),
            Probe::No(why) => {
                self.tell(name, &sighting.addresses[0], why, is_likely);
                return false;
            }
        };
        match fit(self.need, &offer) {
            Err(misfit) => {
                self.tell(name, &address, misfit, true);
                false
            }
            Ok(blocks) => {
                self.tell(name, &address, Sighted::Holds(terms::offered(&offer)), true);
                // seen again, with more addresses
                if !self.list.iter().any(|c| c.address == address) {
                    let name = name.clone();
                    self.list.push(Candidate { name, address, key, blocks, stage: None, failed: None });
                }
                true
            }
        }
    }

    /// Connects to workers whose blocks close the gaps; whether they are closed. A worker that says that it pauses is
    /// looked for longer.
    fn close_the_gaps(&mut self, with_local: bool, connect: &mut Connect<'_>, retry: &mut Retry) -> bool {
        // each failure takes a candidate out, so this ends
        while let Some(chain) = self.chain(with_local) {
            let Some(at) = chain.iter().copied().find(|&i| self.list[i].stage.is_none()) else {
                return true;
            };
            let candidate = &mut self.list[at];
            match connect(&candidate.address, &candidate.key, candidate.blocks) {
                Ok(stage) => candidate.stage = Some(stage),
                Err(error) => {
                    candidate.failed = Some(Instant::now());
                    let (name, address) = (candidate.name.clone(), candidate.address.clone());
                    match error.absence() {
                        Some(absence) => retry.learn(absence),
                        None => {
                            self.list.remove(at);
                            self.lost.push(address.clone());
                        }
                    }
                    self.tell(&name, &address, Sighted::Failed(error), true);
                }
            }
        }
        false
    }

    /// Candidates whose blocks close the gaps, those that are connected already first.
    fn chain(&self, with_local: bool) -> Option<Vec<usize>> {
        let rested = |c: &Candidate| c.failed.is_none_or(|at| at.elapsed() >= AGAIN_AFTER);
        let mut links: Vec<(BlockRange, Option<usize>)> = Vec::new();
        let ready = |c: &Candidate| c.stage.is_some();
        for wanted in [true, false] {
            let some = self.list.iter().enumerate().filter(|(_, c)| ready(c) == wanted && rested(c));
            links.extend(some.map(|(i, c)| (c.blocks, Some(i))));
        }
        if with_local {
            links.extend(self.need.here.iter().map(|&blocks| (blocks, None)));
        }
        let mut chain = Vec::new();
        for &gap in &self.need.gaps {
            let closed = close(gap, &links)?;
            chain.extend(closed.into_iter().filter_map(|at| links[at].1));
        }
        Some(chain)
    }

    fn into_found(mut self, with_local: bool) -> Vec<Found> {
        let chain = self.chain(with_local).unwrap_or_default();
        let taken = chain.into_iter().filter_map(|i| {
            let Candidate { address, blocks, stage, .. } = &mut self.list[i];
            let stage = stage.take()?;
            Some(Found { address: address.clone(), blocks: *blocks, stage })
        });
        taken.collect()
    }
}

/// Whether nothing new is said: seconds pass, the reason stays.
fn is_same_reason(before: &Sighted, now: &Sighted) -> bool {
    use LinkErrorKind::{Busy, Deadline, Silent};
    let (Sighted::Failed(a), Sighted::Failed(b)) = (before, now) else { return before == now };
    match (&a.kind, &b.kind) {
        (Busy { host: a, .. }, Busy { host: b, .. }) => a == b,
        (Silent { .. }, Silent { .. }) => true,
        (Deadline { awaited: a, .. }, Deadline { awaited: b, .. }) => a == b,
        _ => before == now,
    }
}

/// What lies between `taken` blocks, which it sorts.
pub(crate) fn gaps(taken: &mut [BlockRange]) -> Vec<BlockRange> {
    taken.sort();
    let between = |pair: &[BlockRange]| {
        let (first, last) = (pair[0].last.saturating_add(1), pair[1].first.saturating_sub(1));
        (first <= last).then_some(BlockRange { first, last })
    };
    taken.windows(2).filter_map(between).collect()
}

/// Links that follow each other through all blocks of `gap`, by their places in `links`; earlier ones are preferred.
fn close(gap: BlockRange, links: &[(BlockRange, Option<usize>)]) -> Option<Vec<usize>> {
    for (at, &(blocks, _)) in links.iter().enumerate() {
        if blocks.first != gap.first || blocks.last > gap.last {
            continue;
        }
        if blocks.last == gap.last {
            return Some(vec![at]);
        }
        if let Some(mut rest) = close(BlockRange { first: blocks.last + 1, ..gap }, links) {
            rest.insert(0, at);
            return Some(rest);
        }
    }
    None
}

/// The blocks of a worker that answers, or why it cannot be used here.
fn fit(need: &Need<'_>, offer: &Terms) -> Result<BlockRange, Sighted> {
    if offer.role == SliceRole::None {
        return Err(Sighted::NoSlice);
    }
    let described = terms::offered(offer);
    if offer.model != Some(need.model) {
        return Err(Sighted::OtherModel(described));
    }
    let fits = |blocks: &BlockRange| {
        need.gaps.iter().any(|gap| gap.first <= blocks.first && blocks.last <= gap.last)
    };
    match terms::blocks_of(offer, need.n_blocks).filter(fits) {
        Some(blocks) if offer.role == SliceRole::Middle => Ok(blocks),
        _ => Err(Sighted::OtherBlocks { offer: described, needed: need.gaps.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range((first, last): (u32, u32)) -> BlockRange {
        BlockRange { first, last }
    }

    #[test]
    fn gaps_are_closed_by_the_earlier_links_and_never_with_an_overlap() {
        let close = |gap, blocks: &[(u32, u32)]| {
            let links: Vec<_> = blocks.iter().map(|&b| (range(b), Some(0))).collect();
            close(range(gap), &links)
        };
        assert_eq!(close((1, 2), &[(1, 2)]), Some(vec![0]));
        assert_eq!(close((1, 4), &[(3, 4), (1, 3), (1, 2)]), Some(vec![2, 0]));
        assert_eq!(close((1, 4), &[(1, 2), (2, 4)]), None);
        assert_eq!(close((1, 4), &[(1, 5), (0, 4)]), None);
        assert_eq!(close((1, 1), &[(1, 1), (1, 1)]), Some(vec![0]));
        assert_eq!(close((1, u32::MAX), &[(1, 1)]), None);
    }

    #[test]
    fn gaps_lie_between_what_is_taken() {
        let gaps = |taken: &[(u32, u32)]| {
            let mut taken: Vec<_> = taken.iter().copied().map(range).collect();
            gaps(&mut taken).iter().map(|g| (g.first, g.last)).collect::<Vec<_>>()
        };
        assert_eq!(gaps(&[(5, 9), (0, 0)]), [(1, 4)]);
        assert_eq!(gaps(&[(5, 9), (0, 0), (2, 3)]), [(1, 1), (4, 4)]);
        assert_eq!(gaps(&[(0, 3), (4, 9)]), []);
    }

    /// What a hostile worker may claim.
    #[test]
    fn blocks_that_there_are_not_are_no_fit() {
        let need = Need {
            model: Sha([7; 32]),
            model_name: "m",
            n_blocks: 10,
            gaps: vec![range((1, 8))],
            here: Vec::new(),
            patience: Patience::default(),
        };
        let offer = |first_block, last_block| {
            let (model, role) = (Some(Sha([7; 32])), SliceRole::Middle);
            let blocks = BlockRange { first: first_block, last: last_block };
            Terms { model, role, blocks, n_blocks: 10, ..Terms::blank(1, "test", "") }
        };
        assert_eq!(fit(&need, &offer(2, 8)), Ok(range((2, 8))));
        for (first, last) in [(3, 2), (0, 8), (2, 9), (2, 10), (u32::MAX, u32::MAX), (1, u32::MAX)] {
            let misfit = fit(&need, &offer(first, last));
            assert!(matches!(misfit, Err(Sighted::OtherBlocks { .. })), "{first}..{last}: {misfit:?}");
        }
    }

    #[test]
    fn seconds_that_pass_are_no_news() {
        let busy = |host: &str, since_ms| {
            Sighted::Failed(LinkErrorKind::Busy { host: host.into(), since_ms }.with("p"))
        };
        assert!(is_same_reason(&busy("a", 1000), &busy("a", 9000)));
        assert!(!is_same_reason(&busy("a", 1000), &busy("b", 1000)));
        assert!(!is_same_reason(&Sighted::NoSlice, &busy("a", 1000)));
    }

    /// Somebody who says nothing holds a probe for five seconds; a search that is over does not leave it behind.
    #[test]
    fn a_search_that_is_over_asks_nobody_any_more() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = vec![silent.local_addr().unwrap().to_string(); 2];
        let (tell, probed) = channel();
        let probes = Probes(CallOff::new());
        let keys = vec![(Key::from_bytes([7; 32]), Peer::default())];
        probes.start(Sighting { name: "silent".into(), addresses }, keys, tell);
        let _peer = silent.accept().unwrap();
        drop(probes);
        let (_, probe) = probed.recv().unwrap();
        let Probe::No(Sighted::Failed(error)) = probe else { panic!("nobody has answered") };
        assert_eq!(error.kind, LinkErrorKind::Stopped);
        silent.set_nonblocking(true).unwrap();
        assert!(silent.accept().is_err(), "its other address was asked too");
    }

    proptest! {
        #[test]
        fn what_closes_a_gap_covers_every_block_once(
            blocks in proptest::collection::vec((0u32..8, 0u32..8), 0..10), first in 0u32..8, length in 0u32..6,
        ) {
            let blocks: Vec<_> = blocks.into_iter().filter(|(first, last)| first <= last).map(range).collect();
            let links: Vec<_> = blocks.iter().map(|&b| (b, None)).collect();
            let gap = range((first, first + length));
            if let Some(chain) = close(gap, &links) {
                let covered: Vec<u32> = chain.iter().flat_map(|&at| blocks[at].as_range()).collect();
                prop_assert_eq!(covered, gap.as_range().collect::<Vec<_>>());
            }
        }
    }
}
