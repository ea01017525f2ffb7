//! Whom of the workers that were seen to ask next, and when again. Pure: times are given.
//!
//! Anybody can announce anything, as often as he likes. So what is known of announcements is bounded, a machine gets its
//! share of the questions and no more, and whoever looks like a worker that this user is paired with is asked before all
//! others. Nobody is asked only once: a worker that was slow, or loading, may answer the next time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use dim_wire::transport::discover::Sighting;

/// Questions under way at once; the last of them are kept for workers that are likely ours.
const MOST: usize = 32;
const MOST_UNLIKELY: usize = 24;
/// Of those, to one machine.
const MOST_OF_ONE: usize = 4;
/// Announcements that are known at once.
const KNOWN: usize = 256;
/// Until one that could not be used is asked again; it doubles ...
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// ... up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Everybody who was seen.
#[derive(Default)]
pub(super) struct Asking(Vec<Askee>);

struct Askee {
    sighting: Sighting,
    /// it looks like one that this user is paired with
    is_likely: bool,
    state: State,
    /// how often it was asked
    asked: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Due(Instant),
    Asked,
    /// it holds what is looked for
    Had,
}

impl Askee {
    fn machine(&self) -> &str {
        let first = self.sighting.addresses.first().map_or("", String::as_str);
        first.rsplit_once(':').map_or(first, |(machine, _)| machine)
    }
}

impl Asking {
    /// A worker was seen.
    pub(super) fn saw(&mut self, sighting: Sighting, is_likely: bool, now: Instant) {
        if let Some(known) = self.of(&sighting) {
            known.is_likely |= is_likely;
            return;
        }
        if self.0.len() >= KNOWN && !self.make_room(is_likely) {
            return;
        }
        self.0.push(Askee { sighting, is_likely, state: State::Due(now), asked: 0 });
    }

    /// Whom to ask now; its answer is told by [`answered`](Self::answered).
    pub(super) fn next(&mut self, now: Instant) -> Option<Sighting> {
        let under_way: Vec<&Askee> = self.0.iter().filter(|a| a.state == State::Asked).collect();
        let may = |askee: &Askee| {
            let of_its_machine = under_way.iter().filter(|a| a.machine() == askee.machine()).count();
            match askee.is_likely {
                true => under_way.len() < MOST,
                false => under_way.len() < MOST_UNLIKELY && of_its_machine < MOST_OF_ONE,
            }
        };
        let due = self.0.iter().enumerate().filter_map(|(i, askee)| match askee.state {
            State::Due(at) if at <= now && may(askee) => Some(((!askee.is_likely, askee.asked, at), i)),
            _ => None,
        });
        let (_, chosen) = due.min()?;
        let askee = &mut self.0[chosen];
        askee.state = State::Asked;
        askee.asked += 1;
        Some(askee.sighting.clone())
    }

    /// It has answered, or has not: whether it holds what is looked for.
    pub(super) fn answered(&mut self, sighting: &Sighting, holds: bool, now: Instant) {
        if let Some(askee) = self.of(sighting) {
            let pause = FIRST_PAUSE.saturating_mul(1 << askee.asked.saturating_sub(1).min(8));
            askee.state = if holds { State::Had } else { State::Due(now + pause.min(LONGEST_PAUSE)) };
        }
    }

    /// One that held what is looked for could not be had: it is asked again.
    pub(super) fn lost(&mut self, address: &str, now: Instant) {
        let at_it = |askee: &&mut Askee| askee.sighting.addresses.iter().any(|a| a == address);
        for askee in self.0.iter_mut().filter(at_it).filter(|a| a.state == State::Had) {
            askee.state = State::Due(now + FIRST_PAUSE);
        }
    }

    fn of(&mut self, sighting: &Sighting) -> Option<&mut Askee> {
        self.0.iter_mut().find(|a| a.sighting.addresses == sighting.addresses)
    }

    /// Forgets the one that is least missed: asked in vain most often, of the machine with the most. Whether there was one.
    fn make_room(&mut self, for_likely: bool) -> bool {
        // counted once: whoever announces much makes this happen often
        let mut of_machine = HashMap::<&str, usize>::new();
        for askee in &self.0 {
            *of_machine.entry(askee.machine()).or_default() += 1;
        }
        let idle = |a: &Askee| matches!(a.state, State::Due(_)) && (!a.is_likely || for_likely);
        let worth = self.0.iter().enumerate().filter(|(_, a)| idle(a));
        let least = worth.max_by_key(|(_, a)| (!a.is_likely, a.asked, of_machine[a.machine()]));
        let Some((least, _)) = least else { return false };
        self.0.swap_remove(least);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Sighting {
        Sighting { name: address.to_owned(), addresses: vec![address.to_owned()] }
    }

    /// Asks everybody who is due; nobody answers for `silence`. How long `whom` had to wait until it was asked.
    fn wait_of(asking: &mut Asking, whom: &Sighting, silence: Duration, begin: Instant) -> Option<Duration> {
        let (mut now, mut open) = (begin, Vec::<(Instant, Sighting)>::new());
        while now < begin + Duration::from_secs(60) {
            while let Some(next) = asking.next(now) {
                if next == *whom {
                    return Some(now - begin);
                }
                open.push((now + silence, next));
            }
            assert!(open.len() <= MOST);
            for (_, over) in open.extract_if(.., |(until, _)| *until <= now) {
                asking.answered(&over, false, now);
            }
            now += Duration::from_millis(50);
        }
        None
    }

    #[test]
    fn who_was_slow_is_asked_again_and_again_and_who_holds_is_not() {
        let (begin, mut asking) = (Instant::now(), Asking::default());
        let slow = at("10.0.0.7:7878");
        asking.saw(slow.clone(), false, begin);
        let mut asked_at = Vec::new();
        let mut now = begin;
        while now < begin + Duration::from_secs(30) {
            if asking.next(now).is_some() {
                asked_at.push((now - begin).as_secs());
                // the deadline of a question
                now += Duration::from_secs(5);
                asking.answered(&slow, false, now);
            }
            // seen once more: nothing new
            asking.saw(slow.clone(), false, now);
            now += Duration::from_millis(100);
        }
        assert_eq!(asked_at, [0, 6, 13, 22]);
        now += LONGEST_PAUSE;
        assert!(asking.next(now).is_some());
        asking.answered(&slow, true, now);
        assert!(asking.next(now + Duration::from_secs(60)).is_none());
        asking.lost("10.0.0.7:7878", now);
        assert!(asking.next(now).is_none() && asking.next(now + FIRST_PAUSE).is_some());
    }

    #[test]
    fn eighty_false_announcements_hold_nobody_up_for_long() {
        let begin = Instant::now();
        let ours = at("10.0.0.7:7878");
        let before = |one_machine: bool, is_likely: bool| {
            let mut asking = Asking::default();
            for n in 0..80 {
                let machine = if one_machine { 1 } else { n };
                asking.saw(at(&format!("10.0.1.{machine}:{}", 1000 + n)), false, begin);
            }
            asking.saw(ours.clone(), is_likely, begin);
            wait_of(&mut asking, &ours, Duration::from_secs(5), begin).unwrap().as_secs()
        };
        assert_eq!(before(true, false), 0, "one machine has its share");
        assert_eq!(before(true, true), 0);
        assert_eq!(before(false, true), 0, "who is likely ours is asked first");
        assert_eq!(before(false, false), 15, "and everybody gets a turn");
    }

    #[test]
    fn what_is_known_is_bounded_and_who_is_likely_is_never_forgotten_for_who_is_not() {
        let (begin, mut asking) = (Instant::now(), Asking::default());
        let ours = at("10.0.0.7:7878");
        asking.saw(ours.clone(), true, begin);
        for n in 0..10_000u32 {
            asking.saw(at(&format!("10.1.{}.{}:7878", n / 250, n % 250)), false, begin);
        }
        assert_eq!(asking.0.len(), KNOWN);
        assert_eq!(wait_of(&mut asking, &ours, Duration::from_secs(5), begin), Some(Duration::ZERO));
        // and one that comes late finds room
        let mut late = Asking::default();
        for n in 0..10_000u32 {
            late.saw(at(&format!("10.1.{}.{}:7878", n / 250, n % 250)), false, begin);
        }
        late.saw(ours.clone(), true, begin);
        assert_eq!(wait_of(&mut late, &ours, Duration::from_secs(5), begin), Some(Duration::ZERO));
    }
}
