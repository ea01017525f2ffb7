//! `--worker auto`: finds workers on the local network, tries those this host is paired with, and takes those whose
//! blocks fit. Says for each one that it sees why it is or is not usable.
//!
//! ```text
//!     sighting ---> probe (a thread each): reachable? which key? what does it hold?
//!                     | no: said once                      | yes: candidate
//!     candidates ---> do their blocks close the gap? ---> connect: busy? loading? ---> taken
//! ```

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::stage::remote::WorkerStage;
use dim_core::digest::Sha;
use dim_core::pipeline::Patience;
use dim_wire::HandshakeError;
use dim_wire::keys::{Key, KeyStore, Peer};
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::discover::{Search, Sighting};
use dim_wire::transport::{LinkError, LinkErrorKind, Timing, inquire};

/// What `--worker` says instead of an address.
pub const AUTO: &str = "auto";

/// How long workers are looked for before middles that lie on this machine are taken instead.
const LOCAL_AFTER: Duration = Duration::from_secs(5);
/// How long a worker that could not be had is left alone.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Keys tried at one worker.
const MOST_KEYS: usize = 32;

/// First and last block, inclusive.
pub type Blocks = (u32, u32);

/// What is looked for.
pub struct Need<'a> {
    /// Identity of the model.
    pub model: Sha,
    /// The model's name, for people.
    pub model_name: &'a str,
    /// Blocks that nobody has yet, in order.
    pub gaps: Vec<Blocks>,
    /// Middles that lie on this machine.
    pub here: Vec<Blocks>,
    /// Keys that may open a worker, and whom each is shared with.
    pub keys: Vec<(Key, Peer)>,
    /// Where multicast DNS is spoken.
    pub mdns_port: u16,
    /// How long to look.
    pub patience: Patience,
}

/// A worker that was found, connected.
pub struct Found {
    /// Where it is.
    pub address: String,
    /// The key that it knows.
    pub key: Key,
    /// What it holds.
    pub blocks: Blocks,
    /// The connection.
    pub stage: WorkerStage,
}

/// The keys that this user has for workers; one, if it is given.
pub fn keys(given: Option<Key>) -> Result<Vec<(Key, Peer)>, Failure> {
    if let Some(key) = given {
        return Ok(vec![(key, Peer { name: String::new(), address: String::new(), paired_at: 0 })]);
    }
    let store = KeyStore::of_user().map_err(Failure::misuse)?;
    let mut keys = Vec::new();
    for (id, peer) in store.list().map_err(Failure::misuse)? {
        if let Some(key) = store.find(id).map_err(Failure::misuse)? {
            keys.push((key, peer));
        }
    }
    Ok(keys)
}

/// Finds workers that close all gaps. `connect` agrees with one on its blocks.
///
/// # Errors
/// None were found in time, or this machine cannot look.
pub fn find(
    need: &Need<'_>,
    connect: &mut dyn FnMut(&str, &Key, Blocks) -> Result<WorkerStage, LinkError>,
) -> Result<Vec<Found>, Failure> {
    if need.gaps.is_empty() {
        return Ok(Vec::new());
    }
    let by_hand = "name the worker with --worker ADDR:PORT";
    let mut search = Search::start(need.mdns_port).map_err(|e| Failure::failed(e).hint(by_hand))?;
    eprintln!("looking for workers on the local network");
    let begun = Instant::now();
    let mut limit = need.patience.give_up_after;
    let (tell, probed) = channel();
    let mut crowd = Crowd { need, candidates: Vec::new(), said: HashMap::new() };
    loop {
        while let Some(sighting) = search.next(Instant::now() + POLL) {
            probe_apart(sighting, need.keys.clone(), tell.clone());
        }
        crowd.take_in(&probed);
        let with_local = begun.elapsed() >= LOCAL_AFTER.min(need.patience.give_up_after);
        if crowd.close_the_gaps(with_local, connect, &mut limit) {
            return Ok(crowd.into_found(with_local));
        }
        if begun.elapsed() >= limit {
            break;
        }
    }
    let missing: Vec<String> = need.gaps.iter().map(|(a, b)| format!("{a}..{b}")).collect();
    let what = format!(
        "no usable worker for blocks {} of {} within {} s",
        missing.join(" and "),
        need.model_name,
        limit.as_secs()
    );
    let seen = match crowd.said.is_empty() {
        true => "none was seen: is it running on this network, the phone's app in the foreground?",
        false => "the lines above say what is wrong with each that was seen;",
    };
    Err(Failure::failed(what).hint(format!("{seen} or {by_hand}")))
}

const POLL: Duration = Duration::from_millis(50);

/// What a probe came to.
enum Probe {
    Holds { address: String, key: Key, offer: Box<Terms> },
    No(String),
}

fn probe_apart(sighting: Sighting, keys: Vec<(Key, Peer)>, tell: Sender<(Sighting, Probe)>) {
    let at = sighting.addresses[0].clone();
    let name = sighting.name.clone();
    let run = move || {
        let probe = probe(&sighting, &keys);
        let _ = tell.send((sighting, probe));
    };
    if let Err(e) = std::thread::Builder::new().name("dim-probe".into()).spawn(run) {
        eprintln!("{name} ({at}): not asked: {e}");
    }
}

/// Asks a worker what it holds, with every key that may be the right one, the likeliest first.
fn probe(sighting: &Sighting, keys: &[(Key, Peer)]) -> Probe {
    let mut unreachable = None;
    for address in &sighting.addresses {
        let mut sorted: Vec<&(Key, Peer)> = keys.iter().collect();
        sorted.sort_by_key(|(_, peer)| (peer.address != *address, peer.name != sighting.name));
        let mut wrong_key = sorted.is_empty();
        for (key, _) in sorted.into_iter().take(MOST_KEYS) {
            match inquire(address, key, &Timing::default()) {
                Ok(offer) => {
                    return Probe::Holds {
                        address: address.clone(),
                        key: key.clone(),
                        offer: Box::new(offer),
                    };
                }
                Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. }) => {
                    wrong_key = true
                }
                Err(error @ LinkError { kind: LinkErrorKind::Unreachable { .. }, .. }) => {
                    unreachable.get_or_insert(why(&error));
                    break;
                }
                Err(error) => return Probe::No(why(&error)),
            }
        }
        if wrong_key {
            return Probe::No(format!("not paired with this host: dim-host pair {address}"));
        }
    }
    Probe::No(unreachable.unwrap_or_else(|| "not reachable".to_owned()))
}

struct Candidate {
    name: String,
    address: String,
    key: Key,
    blocks: Blocks,
    stage: Option<WorkerStage>,
    /// it could not be had then
    failed: Option<Instant>,
}

/// Everybody who was seen.
struct Crowd<'a> {
    need: &'a Need<'a>,
    candidates: Vec<Candidate>,
    /// what was last said about whom
    said: HashMap<String, String>,
}

impl Crowd<'_> {
    fn say(&mut self, name: &str, address: &str, what: String) {
        let who = if name.is_empty() { address.to_owned() } else { format!("{name} ({address})") };
        // seconds and numbers pass, the reason stays
        let reason = what.replace(|c: char| c.is_ascii_digit(), "");
        if self.said.get(&who) != Some(&reason) {
            eprintln!("{who}: {what}");
            self.said.insert(who, reason);
        }
    }

    fn take_in(&mut self, probed: &Receiver<(Sighting, Probe)>) {
        while let Ok((sighting, probe)) = probed.try_recv() {
            let (address, key, offer) = match probe {
                Probe::Holds { address, key, offer } => (address, key, offer),
                Probe::No(why) => {
                    self.say(&sighting.name, &sighting.addresses[0], why);
                    continue;
                }
            };
            let blocks = (offer.blocks.first, offer.blocks.last);
            match misfit(self.need, &offer) {
                Some(why) => self.say(&sighting.name, &address, why),
                None => {
                    let what = format!("paired, holds {}", describe(&offer));
                    self.say(&sighting.name, &address, what);
                    let name = sighting.name;
                    // seen again, with more addresses
                    if self.candidates.iter().any(|c| c.address == address) {
                        continue;
                    }
                    self.candidates.push(Candidate { name, address, key, blocks, stage: None, failed: None });
                }
            }
        }
    }

    /// Connects to workers whose blocks close the gaps; whether they are closed. A worker that says that it pauses
    /// makes `limit` longer.
    fn close_the_gaps(
        &mut self,
        with_local: bool,
        connect: &mut dyn FnMut(&str, &Key, Blocks) -> Result<WorkerStage, LinkError>,
        limit: &mut Duration,
    ) -> bool {
        // each failure takes a candidate out, so this ends
        while let Some(chain) = self.chain(with_local) {
            let Some(at) = chain.iter().copied().find(|&i| self.candidates[i].stage.is_none()) else {
                return true;
            };
            let candidate = &mut self.candidates[at];
            match connect(&candidate.address, &candidate.key, candidate.blocks) {
                Ok(stage) => candidate.stage = Some(stage),
                Err(error) => {
                    candidate.failed = Some(Instant::now());
                    if error.is_pause() {
                        *limit = self.need.patience.paused_for.max(*limit);
                    }
                    let (name, address) = (candidate.name.clone(), candidate.address.clone());
                    if !error.may_pass() {
                        self.candidates.remove(at);
                    }
                    self.say(&name, &address, why(&error));
                }
            }
        }
        false
    }

    /// Candidates whose blocks close the gaps, those that are connected already first.
    fn chain(&self, with_local: bool) -> Option<Vec<usize>> {
        let rested = |c: &Candidate| c.failed.is_none_or(|at| at.elapsed() >= AGAIN_AFTER);
        let mut links: Vec<(Blocks, Option<usize>)> = Vec::new();
        let ready = |c: &Candidate| c.stage.is_some();
        for wanted in [true, false] {
            let some = self.candidates.iter().enumerate().filter(|(_, c)| ready(c) == wanted && rested(c));
            links.extend(some.map(|(i, c)| (c.blocks, Some(i))));
        }
        if with_local {
            links.extend(self.need.here.iter().map(|&blocks| (blocks, None)));
        }
        let mut chain = Vec::new();
        for &(first, last) in &self.need.gaps {
            let closed = close(first, last, &links)?;
            chain.extend(closed.into_iter().filter_map(|at| links[at].1));
        }
        Some(chain)
    }

    fn into_found(mut self, with_local: bool) -> Vec<Found> {
        let chain = self.chain(with_local).unwrap_or_default();
        let taken = chain.into_iter().filter_map(|i| {
            let Candidate { address, key, blocks, stage, .. } = &mut self.candidates[i];
            let stage = stage.take()?;
            Some(Found { address: address.clone(), key: key.clone(), blocks: *blocks, stage })
        });
        taken.collect()
    }
}

/// What lies between `taken` blocks, which it sorts.
pub fn gaps(taken: &mut [Blocks]) -> Vec<Blocks> {
    taken.sort();
    let between = |pair: &[Blocks]| (pair[0].1.saturating_add(1), pair[1].0.saturating_sub(1));
    taken.windows(2).map(between).filter(|(first, last)| first <= last).collect()
}

/// Links that follow each other from block `first` to block `last`, by their places in `links`; earlier ones are
/// preferred.
fn close(first: u32, last: u32, links: &[(Blocks, Option<usize>)]) -> Option<Vec<usize>> {
    for (at, &((from, to), _)) in links.iter().enumerate() {
        if from != first || to < from || to > last {
            continue;
        }
        if to == last {
            return Some(vec![at]);
        }
        if let Some(mut rest) = close(to + 1, last, links) {
            rest.insert(0, at);
            return Some(rest);
        }
    }
    None
}

/// Why a worker could not be had, without its name.
fn why(error: &LinkError) -> String {
    match error {
        LinkError { kind: LinkErrorKind::Busy { host, since_ms, .. }, .. } => {
            format!("busy: it has served {host} for {} s", since_ms / 1000)
        }
        LinkError { kind: LinkErrorKind::Unreachable { text, .. }, .. } => format!("not reachable: {text}"),
        other => other.to_string(),
    }
}

/// Why a worker that answers cannot be used here.
fn misfit(need: &Need<'_>, offer: &Terms) -> Option<String> {
    if offer.role == SliceRole::None {
        return Some("has no slice yet: dim-host push gives it one".to_owned());
    }
    if offer.model != Some(need.model) {
        return Some(format!("holds another model: {}", describe(offer)));
    }
    let fits = |&(first, last): &Blocks| offer.blocks.first >= first && offer.blocks.last <= last;
    if offer.role != SliceRole::Middle || !need.gaps.iter().any(fits) {
        let gaps: Vec<String> = need.gaps.iter().map(|(a, b)| format!("{a}..{b}")).collect();
        return Some(format!("holds other blocks: {}, needed are {}", describe(offer), gaps.join(" and ")));
    }
    None
}

fn describe(offer: &Terms) -> String {
    format!("{} blocks {} of {}", offer.arch, offer.blocks, offer.n_blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gaps_are_closed_by_the_earlier_links_and_never_with_an_overlap() {
        let links = |blocks: &[Blocks]| blocks.iter().map(|&b| (b, Some(0))).collect::<Vec<_>>();
        assert_eq!(close(1, 2, &links(&[(1, 2)])), Some(vec![0]));
        assert_eq!(close(1, 4, &links(&[(3, 4), (1, 3), (1, 2)])), Some(vec![2, 0]));
        assert_eq!(close(1, 4, &links(&[(1, 2), (2, 4)])), None);
        assert_eq!(close(1, 4, &links(&[(1, 5), (0, 4)])), None);
        assert_eq!(close(1, 1, &links(&[(1, 1), (1, 1)])), Some(vec![0]));
        // what a hostile worker may claim
        assert_eq!(close(1, u32::MAX, &links(&[(1, 0), (1, 1)])), None);
    }

    #[test]
    fn gaps_lie_between_what_is_taken() {
        assert_eq!(gaps(&mut [(5, 9), (0, 0)]), [(1, 4)]);
        assert_eq!(gaps(&mut [(5, 9), (0, 0), (2, 3)]), [(1, 1), (4, 4)]);
        assert_eq!(gaps(&mut [(0, 3), (4, 9)]), []);
    }

    proptest! {
        #[test]
        fn what_closes_a_gap_covers_every_block_once(
            blocks in proptest::collection::vec((0u32..8, 0u32..8), 0..10), first in 0u32..8, length in 0u32..6,
        ) {
            let links: Vec<_> = blocks.iter().map(|&b| (b, None)).collect();
            if let Some(chain) = close(first, first + length, &links) {
                let covered: Vec<u32> = chain.iter().flat_map(|&at| blocks[at].0..=blocks[at].1).collect();
                prop_assert_eq!(covered, (first..=first + length).collect::<Vec<_>>());
            }
        }
    }
}
