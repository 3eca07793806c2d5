//! Kills at random moments of many conversions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate::client::{Answer, Channel, Client, Outcome, PageState, State};
use passgate_bindings::PAGE;

use super::{Dice, GPA, LONG, PAGES, PATIENT_MS, adopt, join, memory, page, reaches, service, settled};

/// What the client of the storm knows of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Knows {
    Is(PageState),
    /// Asked, and not answered.
    Asked(PageState),
    Granted,
    /// Said that it has become so, and not answered.
    Said(PageState),
}

/// Converts pages at random until the daemon is gone.
fn storm(mut channel: Channel, known: &Mutex<BTreeMap<u64, Knows>>, seed: u64) {
    let mut dice = Dice(seed);
    loop {
        let at = dice.roll(PAGES);
        let Knows::Is(was) = known.lock().unwrap()[&at] else {
            panic!("page {at} is settled before each storm")
        };
        let to = if was == PageState::Shared { PageState::Private } else { PageState::Shared };
        known.lock().unwrap().insert(at, Knows::Asked(to));
        let invalidation = match channel.begin(page(at), to, Some(PATIENT_MS)) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            Ok(other) => panic!("page {at}: {other:?}"),
            Err(_) => return,
        };
        known.lock().unwrap().insert(at, Knows::Granted);
        if dice.roll(4) == 0 {
            // Others convert between begin and end too.
            std::thread::yield_now();
        }
        known.lock().unwrap().insert(at, Knows::Said(to));
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return;
        }
        known.lock().unwrap().insert(at, Knows::Is(to));
    }
}

#[test]
fn killed_at_any_moment_it_knows_or_says_that_it_does_not() {
    const KILLS: u64 = 60;
    let (mut service, memory) = (service(&[]), memory(PAGES));
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    service.start();
    let (mut client, mut channel) = join(&service, &memory);
    let known: BTreeMap<u64, Knows> = (0..PAGES).map(|at| (at, Knows::Is(PageState::Shared))).collect();
    let known = Arc::new(Mutex::new(known));
    let mut unknown = 0;
    // Where the machine is slow some more, until one has met an open conversion.
    for kill in 0..20 * KILLS {
        if kill >= KILLS && unknown > 0 {
            break;
        }
        let (mine, seed) = (Arc::clone(&known), dice.roll(u64::MAX) | 1);
        let (begun, has_begun) = std::sync::mpsc::channel();
        let converting = std::thread::spawn(move || {
            begun.send(()).unwrap();
            storm(channel, &mine, seed);
        });
        has_begun.recv().unwrap();
        std::thread::sleep(Duration::from_micros(dice.roll(8000)));
        service.kill();
        converting.join().unwrap();
        drop(client);
        service.start();
        let adopted;
        (client, channel, adopted) = adopt(&service);
        let unended: BTreeMap<u64, u64> =
            adopted.unended.iter().map(|one| ((one.gpa - GPA) / PAGE, one.invalidation)).collect();
        let mut known = known.lock().unwrap();
        let shared =
            known.iter().filter(|(at, knows)| !unended.contains_key(at) && now(**knows) == PageState::Shared);
        settled_if(&mut client, shared.count() as u64, &known);
        let within_reach = within_reach(&mut client);
        for (at, knows) in known.iter_mut() {
            let lost = unended.contains_key(at);
            let reached = within_reach.contains(at);
            match *knows {
                Knows::Is(state) => {
                    assert!(!lost, "kill {kill}: page {at} was {state:?}, now nobody knows");
                    assert_eq!(reached, state == PageState::Shared, "kill {kill}: page {at} is {state:?}");
                }
                Knows::Granted => assert!(lost && !reached, "kill {kill}: page {at} was given away"),
                Knows::Asked(_) | Knows::Said(_) => assert!(!(lost && reached), "kill {kill}: page {at}"),
            }
            let state = match (*knows, lost) {
                (Knows::Is(state), _) => state,
                (_, true) => {
                    unknown += 1;
                    let to = if dice.roll(2) == 0 { State::Shared } else { State::Private };
                    assert_eq!(client.release(unended[at], to).unwrap(), PAGE);
                    to.into()
                }
                // It has not come to the begin, or the end has: DMA tells which.
                (_, false) if reached => PageState::Shared,
                _ => PageState::Private,
            };
            *knows = Knows::Is(state);
        }
        let shared = known.values().filter(|knows| **knows == Knows::Is(PageState::Shared)).count() as u64;
        drop(known);
        settled(&mut client, shared);
    }
    eprintln!("{unknown} pages of which nobody could know");
    assert!(unknown > 0, "some kill must have met an open conversion");
}

/// What a page is if nothing was lost on the way.
fn now(knows: Knows) -> PageState {
    match knows {
        Knows::Is(state) => state,
        _ => PageState::Unknown,
    }
}

/// The pages that DMA reaches, once the maps that are under way are made: all that are shared.
fn within_reach(client: &mut Client) -> BTreeSet<u64> {
    let until = Instant::now() + LONG;
    loop {
        let shared = client.status().unwrap().regions[0].shared / PAGE;
        let found: BTreeSet<u64> = (0..PAGES).filter(|at| reaches(client, *at)).collect();
        if found.len() as u64 == shared {
            return found;
        }
        assert!(Instant::now() < until, "{shared} pages are shared, DMA reaches {found:?}");
    }
}

/// Waits for the maps that must come: at least so many, at most those whose state is open besides.
fn settled_if(client: &mut Client, least: u64, known: &BTreeMap<u64, Knows>) {
    let open = known.values().filter(|knows| !matches!(knows, Knows::Is(_))).count() as u64;
    let until = Instant::now() + LONG;
    loop {
        let region = client.status().unwrap();
        let (pinned, shared) = (region.pinned / PAGE, region.regions[0].shared / PAGE);
        if pinned == shared && (least..=least + open).contains(&shared) {
            return;
        }
        assert!(Instant::now() < until, "{least} {open} {region:?}");
        std::thread::yield_now();
    }
}
