//! `kill -9` at random times during many conversions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_client::{Answer, Channel, Client, Outcome, PageState};

use super::{
    GPA, GRANT_DEADLINE_MS, PAGES, Random, TIMEOUT, adopt, client_with_memory, memory, page, reaches,
    service, wait_for_mapped_pages,
};

/// The knowledge of the converting client about a page.
#[derive(Debug, Clone, Copy, PartialEq)]
enum PageKnowledge {
    /// No conversion is open.
    Settled(PageState),
    /// A begin was sent and not answered.
    BeginSent(PageState),
    /// The begin was granted, and no end was sent.
    Granted,
    /// An end with this state was sent and not answered.
    EndSent(PageState),
}

/// Converts random pages until the daemon has died.
fn storm(mut channel: Channel, known: &Mutex<BTreeMap<u64, PageKnowledge>>, seed: u64) {
    let mut random = Random(seed);
    loop {
        let at = random.next_below(PAGES);
        let PageKnowledge::Settled(was) = known.lock().unwrap()[&at] else {
            panic!("page {at} is not settled")
        };
        let to = if was == PageState::Shared { PageState::Private } else { PageState::Shared };
        known.lock().unwrap().insert(at, PageKnowledge::BeginSent(to));
        let invalidation = match channel.begin(page(at), to, Some(GRANT_DEADLINE_MS)) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            Ok(other) => panic!("page {at}: {other:?}"),
            Err(_) => return,
        };
        known.lock().unwrap().insert(at, PageKnowledge::Granted);
        if random.next_below(4) == 0 {
            // Let other threads run between begin and end.
            std::thread::yield_now();
        }
        known.lock().unwrap().insert(at, PageKnowledge::EndSent(to));
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return;
        }
        known.lock().unwrap().insert(at, PageKnowledge::Settled(to));
    }
}

#[test]
fn random_kills_never_misstate_a_page() {
    const KILLS: u64 = 60;
    let (mut service, memory) = (service(&[]), memory(PAGES));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    service.start();
    let (mut client, mut channel) = client_with_memory(&service, &memory);
    let known: BTreeMap<u64, PageKnowledge> =
        (0..PAGES).map(|at| (at, PageKnowledge::Settled(PageState::Shared))).collect();
    let known = Arc::new(Mutex::new(known));
    let mut unknown = 0;
    // On a slow machine more kills, until one has interrupted an open conversion.
    for kill in 0..20 * KILLS {
        if kill >= KILLS && unknown > 0 {
            break;
        }
        let (known_of_thread, seed) = (Arc::clone(&known), random.next_below(u64::MAX) | 1);
        let (started, has_started) = std::sync::mpsc::channel();
        let converting = std::thread::spawn(move || {
            started.send(()).unwrap();
            storm(channel, &known_of_thread, seed);
        });
        has_started.recv().unwrap();
        std::thread::sleep(Duration::from_micros(random.next_below(8000)));
        service.kill();
        converting.join().unwrap();
        drop(client);
        service.start();
        let adopted;
        (client, channel, adopted) = adopt(&service);
        let unended: BTreeMap<u64, u64> =
            adopted.unended.iter().map(|one| ((one.gpa - GPA) / PAGE, one.invalidation)).collect();
        let mut known = known.lock().unwrap();
        let shared = known.iter().filter(|(at, knowledge)| {
            !unended.contains_key(at) && settled_state(**knowledge) == PageState::Shared
        });
        wait_for_mapped_pages_between(&mut client, shared.count() as u64, &known);
        let reachable_pages = reachable_pages(&mut client);
        for (at, knowledge) in known.iter_mut() {
            let is_unended = unended.contains_key(at);
            let is_reachable = reachable_pages.contains(at);
            match *knowledge {
                PageKnowledge::Settled(state) => {
                    assert!(!is_unended, "kill {kill}: page {at} was {state:?}, and is unknown now");
                    assert_eq!(
                        is_reachable,
                        state == PageState::Shared,
                        "kill {kill}: page {at} is {state:?}"
                    );
                }
                PageKnowledge::Granted => {
                    assert!(is_unended && !is_reachable, "kill {kill}: page {at} was granted")
                }
                PageKnowledge::BeginSent(_) | PageKnowledge::EndSent(_) => {
                    assert!(!(is_unended && is_reachable), "kill {kill}: page {at}")
                }
            }
            let state = match (*knowledge, is_unended) {
                (PageKnowledge::Settled(state), _) => state,
                (_, true) => {
                    unknown += 1;
                    let to = if random.next_below(2) == 0 { PageState::Shared } else { PageState::Private };
                    assert_eq!(client.release(unended[at], to).unwrap(), PAGE);
                    to
                }
                // The daemon has not received the begin, or has received the end: DMA shows which.
                (_, false) if is_reachable => PageState::Shared,
                _ => PageState::Private,
            };
            *knowledge = PageKnowledge::Settled(state);
        }
        let shared = known
            .values()
            .filter(|knowledge| **knowledge == PageKnowledge::Settled(PageState::Shared))
            .count() as u64;
        drop(known);
        wait_for_mapped_pages(&mut client, shared);
    }
    eprintln!("{unknown} pages with unknown state");
    assert!(unknown > 0, "no kill has interrupted an open conversion");
}

/// Returns the state of a page without an open conversion, else unknown.
fn settled_state(knowledge: PageKnowledge) -> PageState {
    match knowledge {
        PageKnowledge::Settled(state) => state,
        _ => PageState::Unknown,
    }
}

/// Returns the pages that DMA reaches; waits until the maps in progress are done, so that these are all shared pages.
fn reachable_pages(client: &mut Client) -> BTreeSet<u64> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let shared = client.status().unwrap().regions[0].shared / PAGE;
        let reachable: BTreeSet<u64> = (0..PAGES).filter(|at| reaches(client, *at)).collect();
        if reachable.len() as u64 == shared {
            return reachable;
        }
        assert!(Instant::now() < deadline, "{shared} pages are shared, DMA reaches {reachable:?}");
    }
}

/// Waits until all shared pages are mapped. Their number must be at least `min_pages`, and at most that plus the pages that are
/// not settled.
fn wait_for_mapped_pages_between(client: &mut Client, min_pages: u64, known: &BTreeMap<u64, PageKnowledge>) {
    let open =
        known.values().filter(|knowledge| !matches!(knowledge, PageKnowledge::Settled(_))).count() as u64;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let region = client.status().unwrap();
        let (pinned, shared) = (region.pinned / PAGE, region.regions[0].shared / PAGE);
        if pinned == shared && (min_pages..=min_pages + open).contains(&shared) {
            return;
        }
        assert!(Instant::now() < deadline, "{min_pages} {open} {region:?}");
        std::thread::yield_now();
    }
}
