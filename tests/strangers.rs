//! Strangers at a worker's door, and its owner behind them: whether the owner still gets in, and whether a reply that
//! runs meanwhile stays the same.
//!
//! ```text
//!     crowd, from 127.0.0.2 or from .2 to .9 --------------------> worker <--- a reply that is compared, over and over
//!     owner ---> relay, 20 ms each way, from 127.0.0.1 -------------^
//! ```
//!
//! `make faults` (DIM_FAULTS=1) runs all of it, against the Swift worker too where DIM_SWIFT_WORKER says how that is
//! started, and writes the table of docs/TESTING.md. Linux only: other systems have one loopback address.
#![cfg(target_os = "linux")]

#[path = "common/mod.rs"]
mod common;
#[path = "crowd/mod.rs"]
mod crowd;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Cut, Worker, report};
use crowd::{Crowd, Swift, SwiftReply};
use dim_ab::link::{Link as Relay, LinkOptions};
use dim_wire::keys::Key;
use dim_wire::transport::{Timing, inquire};

/// How long the owner may take to be let in: as long as a person who waits for nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts of a host.
const PAUSE: Duration = Duration::from_millis(200);

/// What became of the owner's tries in one crowd.
#[derive(Default)]
struct Tally {
    tries: usize,
    within: usize,
    at_first: usize,
    slowest: Duration,
    replies: usize,
    other: usize,
    per_s: f64,
}

/// One try of the owner: how long it took, and in which attempt; `None` if it was not in within [`PATIENCE`].
fn owner(at: &str, key: &Key) -> Option<(Duration, u32)> {
    let begun = Instant::now();
    for attempt in 1.. {
        let left = PATIENCE.checked_sub(begun.elapsed())?;
        if inquire(at, key, &Timing { opening: left, ..Timing::default() }).is_ok() {
            return Some((begun.elapsed(), attempt));
        }
        std::thread::sleep(PAUSE);
    }
    None
}

/// The owner's `tries` in a crowd, while `reply` is asked for over and over: it says whether it was the right one.
fn against(
    address: &str,
    key: &Key,
    crowd: &Crowd,
    tries: usize,
    reply: &mut (dyn FnMut() -> bool + Send),
) -> Tally {
    let relay = Relay::start(address, LinkOptions { rtt_ms: 40.0, ..LinkOptions::default() }).unwrap();
    let at = relay.addr().to_string();
    let over = AtomicBool::new(false);
    let (replies, other) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut tally = Tally { tries, ..Tally::default() };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                replies.fetch_add(1, Ordering::Relaxed);
                if !reply() {
                    other.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let flood = crowd.begin(address);
        // the crowd is at its pace, and the reply has begun
        std::thread::sleep(Duration::from_millis(300));
        for _ in 0..tries {
            let around = crowd.gather(address);
            if let Some((took, attempt)) = owner(&at, key) {
                tally.within += 1;
                tally.at_first += usize::from(attempt == 1);
                tally.slowest = tally.slowest.max(took);
            }
            drop(around);
        }
        tally.per_s = flood.end();
        over.store(true, Ordering::Relaxed);
    });
    (tally.replies, tally.other) = (replies.into_inner(), other.into_inner());
    tally
}

/// What is not as it has to be, where the owner is to get in `least` times.
fn judge(tally: &Tally, least: usize) -> Option<String> {
    let Tally { tries, within, other, replies, .. } = tally;
    let is_right = *within >= least && *other == 0 && *replies > 0;
    let says =
        || format!("the owner was in in {within} of {tries}, {other} of {replies} replies were others");
    (!is_right).then(says)
}

/// What runs besides: a reply of a real model, the same every time.
fn reply_of<'a>(cut: &'a Cut, address: &'a str) -> impl FnMut() -> bool + Send + 'a {
    let options = ["-n", "96", "--temp", "0"];
    let expected = report(&mut cut.generate(&[address], &options)).tokens;
    move || report(&mut cut.generate(&[address], &options)).tokens == expected
}

fn key_of(cut: &Cut) -> Key {
    Key::from_file(&cut.key).unwrap()
}

/// A small part of the table, in every run of the tests.
#[test]
fn the_owner_gets_in_whoever_else_stands_at_the_door() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let mut reply = reply_of(&cut, &worker.address);
    let key = key_of(&cut);
    let crowds = [Crowd::Silent(100), Crowd::Replays(100), Crowd::Rate { per_s: 500, addresses: 8 }];
    for crowd in crowds {
        let tally = against(&worker.address, &key, &crowd, 5, &mut reply);
        let wrong = judge(&tally, 4);
        assert!(wrong.is_none(), "{crowd}: {wrong:?}");
    }
}

/// All of it: `make faults`.
#[test]
fn the_table_of_strangers() {
    if !common::makes_tables() {
        return;
    }
    let cut = Cut::tiny("qwen2");
    let mut table = String::from(
        "Strangers at the door\n| worker | crowd | new a second | owner in within 2 s | at the first attempt | slowest | replies, identical |\n\
         |---|---|---:|---:|---:|---:|---:|\n",
    );
    let mut failed = Vec::new();
    let mut run = |kind: &str, address: &str, key: &Key, reply: &mut (dyn FnMut() -> bool + Send)| {
        for crowd in Crowd::all() {
            let tally = against(address, key, &crowd, 25, reply);
            let Tally { tries, within, at_first, slowest, replies, other, per_s } = &tally;
            let line = format!(
                "| {kind} | {crowd} | {per_s:.0} | {within} of {tries} | {at_first} | {} ms | {} of {replies} |",
                slowest.as_millis(),
                replies - other,
            );
            println!("{line}");
            writeln!(table, "{line}").unwrap();
            failed.extend(judge(&tally, 24).map(|wrong| format!("{kind}: {crowd}: {wrong}")));
        }
    };
    let worker: Worker = cut.worker(1);
    run("dim-worker", &worker.address, &key_of(&cut), &mut reply_of(&cut, &worker.address));
    drop(worker);
    match std::env::var("DIM_SWIFT_WORKER") {
        Err(_) => println!("not run: the Swift worker (DIM_SWIFT_WORKER is not set)"),
        Ok(words) => {
            let key = Key::random().unwrap();
            let worker = Swift::start(&words, &key);
            let mut reply = SwiftReply::new(&worker.address, &key);
            run("Swift", &worker.address, &key, &mut || reply.again());
        }
    }
    common::leave_table("1-strangers", &table);
    assert!(failed.is_empty(), "{failed:?}");
}
