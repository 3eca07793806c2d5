use std::os::fd::AsFd;

use super::*;
use crate::gate::{Answer, Caller, ClientId, Door, FileId, InvalidationId, Policy, Rung};
use crate::protocol::verbs::AddMemory;
use crate::session::tickets::Tickets;
use crate::session::{Next, SystemClock, Trust};
use passgate_backends::{DomainCaps, Entered, Segment, Ticket, Window, Windowed};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, identity};
use passgate_sim::iommu::{Memory, Sim};

const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

const ID: DomainId = DomainId(0);

const COUNTING: DomainCaps = DomainCaps { counts_partial: true, tickets: false, ..Sim::CAPABILITIES };

fn request(job: u64, page: u64, pages: u64) -> CoalescedRequest {
    let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
    CoalescedRequest { job: JobId(job), iova, bytes: pages * PAGE }
}

/// Three adjacent requests, in the order in which they were asked for.
fn requests() -> Vec<CoalescedRequest> {
    vec![request(1, 5, 1), request(2, 6, 2), request(3, 4, 1)]
}

/// A domain that reports the bytes that a failed unmap had removed, and leaves nothing in flight.
fn counting() -> Sim {
    Sim::new(COUNTING, Memory::new()).unwrap()
}

fn domain() -> Arc<dyn Domain> {
    Arc::new(counting())
}

/// The results of the requests, of a result that is believed.
fn split(result: UnmapResult) -> Vec<UnmapResult> {
    let Returned::Facts(events) = split_result((ID, domain()), result, requests(), 7) else {
        panic!("each is tried by itself")
    };
    let results = events.into_iter().map(|event| match event {
        Event::Unmapped { result, took_ns: 7, .. } => result,
        other => panic!("{other:?}"),
    });
    results.collect()
}

#[test]
fn coalesced_unmap_is_believed_only_if_it_accounts_for_every_byte() {
    let gone = |bytes| UnmapResult::Gone { bytes };
    assert_eq!(split(gone(4 * PAGE)), [gone(PAGE), gone(2 * PAGE), gone(PAGE)]);
    for wrong in [0, PAGE, 3 * PAGE, 5 * PAGE] {
        assert_eq!(tried(gone(wrong)), [(3, 0), (1, 0), (2, 0)], "{wrong} bytes");
    }
    // A ticket from a domain that has none is not believed, whatever it means.
    assert_eq!(tried(UnmapResult::InFlight { bytes: 4 * PAGE }), [(3, 0), (1, 0), (2, 0)]);
}

/// The calls that try each request by itself, of a result that is not believed: the job, and the pages that are credited to it.
fn tried(result: UnmapResult) -> Vec<(u64, u64)> {
    let Returned::Separate(calls) = split_result((ID, domain()), result, requests(), 7) else {
        panic!("{result:?} is believed")
    };
    let call = |call| match call {
        Call::Unmap { job, already, shares, .. } if shares.is_empty() => (job.0, already / PAGE),
        other => panic!("{other:?}"),
    };
    calls.into_iter().map(call).collect()
}

#[test]
fn bytes_of_a_failed_unmap_are_credited_from_the_lowest_address_on() {
    let failed = |pages| UnmapResult::Failed { errno: 16, bytes: pages * PAGE };
    assert_eq!(tried(failed(0)), [(3, 0), (1, 0), (2, 0)]);
    assert_eq!(tried(failed(1)), [(3, 1), (1, 0), (2, 0)]);
    assert_eq!(tried(failed(3)), [(3, 1), (1, 1), (2, 1)]);
    assert_eq!(tried(failed(4)), [(3, 1), (1, 1), (2, 2)]);
    // A count beyond what was asked for is not believed.
    assert_eq!(tried(failed(5)), [(3, 0), (1, 0), (2, 0)]);
    let gone = UnmapResult::Gone { bytes: PAGE };
    assert_eq!(add_bytes(PAGE, gone), UnmapResult::Gone { bytes: 2 * PAGE });
    assert_eq!(add_bytes(PAGE, failed(1)), failed(2));
}

#[test]
fn only_adjacent_ranges_are_coalesced() {
    let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE).unwrap();
    assert_eq!(adjacent_union(range(4, 2), range(6, 1)), Some(range(4, 3)));
    assert_eq!(adjacent_union(range(4, 2), range(3, 1)), Some(range(3, 3)));
    assert_eq!(adjacent_union(range(4, 2), range(7, 1)), None);
}

fn session() -> Session {
    session_over(&counting())
}

fn session_over(sim: &Sim) -> Session {
    Session::new(
        Policy::default(),
        Arc::new(sim.clone()),
        Vec::new(),
        Trust::default(),
        Arc::new(SystemClock),
        None,
        None,
    )
}

fn unmap(job: u64, page: u64) -> Effect {
    let iova = PageRange::new(page * PAGE, PAGE).unwrap();
    Effect::Unmap { job: JobId(job), domain: DomainId(0), iova, bytes: Some(PAGE) }
}

/// The jobs of the next call, an unmap, and the number of its pages.
fn next(session: &mut Session) -> (Vec<u64>, u64) {
    let Next::Call(Call::Unmap { job, iova, shares, .. }) = session.next_step() else { panic!("no unmap") };
    let jobs = if shares.is_empty() { vec![job] } else { shares.iter().map(|share| share.job).collect() };
    (jobs.into_iter().map(|job| job.0).collect(), iova.pages())
}

#[test]
fn unmaps_are_coalesced_across_alarms_but_not_across_answers() {
    let mut session = session();
    let arm = |id| Effect::Arm { invalidation: InvalidationId(id), rung: Rung::Unmap, after_ns: 1 << 40 };
    let caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 7 };
    let ended = Effect::Answer { caller, answer: Answer::Ended { invalidation: InvalidationId(1) } };
    session.effects =
        vec![arm(1), unmap(1, 4), arm(2), unmap(2, 5), unmap(3, 3), unmap(4, 9), ended, unmap(5, 10)].into();
    assert_eq!(next(&mut session), (vec![1, 2, 3], 3));
    assert_eq!(session.timers.len(), 2, "the alarm between the unmaps is set");
    assert_eq!(next(&mut session), (vec![4], 1));
    assert!(matches!(session.next_step(), Next::Answer(..)));
    assert_eq!(next(&mut session), (vec![5], 1));
    assert!(matches!(session.next_step(), Next::Idle));
}

/// A session with two files of 64 pages, both mapped.
fn session_with_files() -> (Session, [FileId; 2]) {
    let mut session = session();
    let memory = [0, 64].map(|page| AddMemory::shared(page * PAGE, 64 * PAGE));
    let files = memory.map(|memory| add(&mut session, &memory));
    (session, files)
}

/// Adds memory of a new file, and maps it.
fn add(session: &mut Session, memory: &AddMemory) -> FileId {
    let file = GuestFile::memfd("coalesce", memory.length).unwrap();
    let found = identity::identify(&file).unwrap();
    session.add_memory(CALLER, memory.clone(), vec![file.as_fd().try_clone_to_owned().unwrap()]);
    loop {
        match session.next_step() {
            Next::Idle => break,
            Next::Call(call) => session.returned(call.run()),
            Next::Refused(_, error) => panic!("{error}"),
            _ => {}
        }
    }
    FileId { device: found.device, inode: found.inode }
}

/// A map of `pages` pages at page `page`, of the pages of `file` from page `offset` on.
fn map(job: u64, (page, pages): (u64, u64), file: FileId, offset: u64) -> Effect {
    let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
    let (job, domain, offset) = (JobId(job), DomainId(0), Offset(offset * PAGE));
    Effect::Map { job, domain, iova, piece: PAGE, file, offset, writable: true }
}

/// The calls by which these maps are made: the number of maps of each.
fn coalesced(session: &mut Session, maps: &[Effect]) -> Vec<usize> {
    session.effects = maps.to_vec().into();
    let mut calls = Vec::new();
    while let Next::Call(Call::Map { shares, .. }) = session.next_step() {
        calls.push(shares.len().max(1));
    }
    calls
}

#[test]
fn maps_are_coalesced_only_over_consecutive_pages_of_one_file() {
    let (mut session, [one, other]) = session_with_files();
    let first = map(1, (128, 2), one, 4);
    assert_eq!(coalesced(&mut session, &[first.clone(), map(2, (130, 1), one, 6)]), [2]);
    for apart in [
        map(2, (130, 1), one, 7),
        map(2, (130, 1), one, 5),
        map(2, (130, 1), one, 4),
        map(2, (130, 1), other, 6),
        map(2, (131, 1), one, 6),
        map(2, (127, 1), one, 3),
    ] {
        assert_eq!(coalesced(&mut session, &[first.clone(), apart.clone()]), [1, 1], "{apart:?}");
    }
    // Two regions with adjacent addresses, of parts of one file that are not adjacent: the third map follows the second only.
    let (second, third) = (map(2, (130, 1), one, 20), map(3, (131, 1), one, 21));
    assert_eq!(coalesced(&mut session, &[first, second, third]), [1, 2]);
}

#[test]
fn maps_are_coalesced_only_with_equal_access_and_at_a_mapping_border() {
    let (mut session, [one, _]) = session_with_files();
    let read_only = match map(2, (130, 1), one, 6) {
        Effect::Map { job, domain, iova, piece, file, offset, .. } => {
            Effect::Map { job, domain, iova, piece, file, offset, writable: false }
        }
        other => other,
    };
    assert_eq!(coalesced(&mut session, &[map(1, (128, 2), one, 4), read_only]), [1, 1]);
    let large = |effect| match effect {
        Effect::Map { job, domain, iova, file, offset, writable, .. } => {
            Effect::Map { job, domain, iova, piece: 4 * PAGE, file, offset, writable }
        }
        other => other,
    };
    // Page 132 begins a mapping of four pages, page 130 does not.
    let maps = |border: u64| {
        [map(1, (128, border - 128), one, 4), map(2, (border, 1), one, 4 + border - 128)].map(large)
    };
    assert_eq!(coalesced(&mut session, &maps(132)), [2]);
    assert_eq!(coalesced(&mut session, &maps(130)), [1, 1]);
}

#[test]
fn unmaps_are_coalesced_only_if_the_result_can_be_split() {
    let apart = |capabilities: DomainCaps, unmaps: [Effect; 2], why: &str| {
        let mut session = session_over(&Sim::new(capabilities, Memory::new()).unwrap());
        session.effects = unmaps.to_vec().into();
        assert_eq!(next(&mut session), (vec![1], 1), "{why}");
        assert_eq!(next(&mut session), (vec![2], 1), "{why}");
    };
    let both = [unmap(1, 4), unmap(2, 5)];
    let uncounted = |effect: &Effect| match effect.clone() {
        Effect::Unmap { job, domain, iova, .. } => Effect::Unmap { job, domain, iova, bytes: None },
        other => other,
    };
    apart(
        DomainCaps { counts_partial: false, ..COUNTING },
        both.clone(),
        "a failure does not report what it removed",
    );
    apart(DomainCaps { tickets: true, ..COUNTING }, both.clone(), "one ticket would be for both");
    let [first, second] = both;
    apart(COUNTING, [uncounted(&first), second.clone()], "how much of the first is mapped is unknown");
    apart(COUNTING, [first.clone(), uncounted(&second)], "how much of the second is mapped is unknown");
}

#[test]
fn unmap_that_waits_for_an_operation_is_not_coalesced() {
    let sim = counting();
    let window = Window::new(1, 1);
    let mut session = Session::new(
        Policy::default(),
        Arc::new(Windowed::new(Arc::new(sim), Arc::clone(&window))),
        Vec::new(),
        Trust::default(),
        Arc::new(SystemClock),
        None,
        None,
    );
    add(&mut session, &AddMemory { piece: PAGE, ..AddMemory::shared(0, 64 * PAGE) });
    assert_eq!(window.enter(0, &[Segment { iova: Iova(5 * PAGE), len: 1 }]), Entered::In);
    session.effects = (3..8).map(|page| unmap(page, page)).collect::<Vec<_>>().into();
    assert_eq!(next(&mut session), (vec![3, 4], 2));
    assert_eq!(next(&mut session), (vec![5], 1));
    assert_eq!(next(&mut session), (vec![6, 7], 2));
    window.leave(0);
}

#[test]
fn coalesced_map_is_within_the_limits_of_one_call() {
    let (mut session, [one, _]) = session_with_files();
    let maps = |pages: u64| {
        (0..4).map(|nth| map(nth, (4096 + nth * pages, pages), one, nth * pages)).collect::<Vec<_>>()
    };
    assert_eq!(coalesced(&mut session, &maps(MAX_CALL_MAPPINGS / 4)), [4]);
    assert_eq!(coalesced(&mut session, &maps(MAX_CALL_MAPPINGS / 2)), [2, 2]);
}

#[test]
fn ticket_that_ends_before_its_call_returns_is_not_lost() {
    let mut session = session();
    assert_eq!(session.tickets.ended(DomainId(0), Ticket(3)), None);
    let returned = |ticket| {
        let result = UnmapResult::InFlight { bytes: PAGE };
        let event = Event::Unmapped { job: JobId(1), result, took_ns: 1 };
        Returned::Fact { event, ticket: Some((DomainId(0), Ticket(ticket), JobId(1))) }
    };
    session.returned(returned(3));
    assert_eq!(session.tickets, Tickets::default());
    session.returned(returned(4));
    assert_eq!(session.tickets.ended(DomainId(0), Ticket(4)), Some(JobId(1)));
}
