//! Coalescing: unmaps or maps of adjacent ranges are made by one kernel call. A burst of conversions of single pages asks for
//! many of them side by side.
//!
//! The gate is not involved: it asks for each request by itself and gets a result for each. The result of a coalesced call is
//! believed only if it accounts for exactly the bytes of all its requests. Otherwise each request is tried again by a call of its
//! own, so that one that fails does not fail the others. The bytes that a coalesced unmap had removed before it failed are
//! credited to its requests from the lowest address on; so unmaps are coalesced only in domains that report them
//! ([`Capabilities::counts_partial`](passgate_backends::Capabilities::counts_partial)). Unmaps are not coalesced either if one of
//! them would wait for operations in flight, which would delay the others, or if it is not known how much of a range is mapped.

use std::sync::Arc;

use passgate_backends::Domain;
use passgate_bindings::{Iova, PageRange};

use super::Session;
use super::call::{self, Call, Returned};
use crate::gate::{
    CLOSE_PIECE_BYTES, DomainId, Effect, Event, FileId, JobId, MAX_CALL_BYTES, MAX_CALL_MAPPINGS, MapResult,
    UnmapResult,
};

/// The maximum number of unmaps in one call.
const MAX_COALESCED_UNMAPS: usize = 4096;

/// The result of a map whose file or domain the session does not have.
const EBADF: i32 = 9;

/// An unmap or a map that is made by one call together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalescedRequest {
    /// The number of the call that the gate asked for.
    pub(super) job: JobId,
    /// The whole range.
    pub(super) iova: PageRange<Iova>,
    /// Bytes of it that are to be unmapped or mapped.
    pub(super) bytes: u64,
}

impl Session {
    /// Returns the call for `first`, the effect just taken out, and for the effects behind it that can be done by the same call.
    /// If the session does not have the domain, device or file, `Err` has a failed result for each of them.
    pub(super) fn coalesce(&mut self, first: Effect) -> Result<Call, Vec<Event>> {
        self.execute_without_call();
        match first {
            Effect::Unmap { job, domain, mut iova, bytes } => {
                let id = domain;
                let Some(domain) = self.domain_of(id) else { return Err(vec![call::failed_unmap(job)]) };
                let capabilities = domain.capabilities();
                // One ticket would stand for the operations of all requests.
                let coalesces = capabilities.counts_partial && !capabilities.tickets;
                let mut shares = Vec::new();
                while coalesces
                    && let Some(Effect::Unmap { job: other, domain: at, iova: next, bytes: Some(more) }) =
                        self.effects.get(self.executed)
                    && let (at, Some(bytes)) = (*at, bytes)
                    && at == id
                    && let Some(both) = adjacent_union(iova, *next)
                    && both.len() <= CLOSE_PIECE_BYTES
                    && !domain.may_wait(both)
                    && shares.len() < MAX_COALESCED_UNMAPS
                {
                    if shares.is_empty() {
                        shares.push(CoalescedRequest { job, iova, bytes });
                    }
                    shares.push(CoalescedRequest { job: *other, iova: *next, bytes: *more });
                    iova = both;
                    self.take_coalesced();
                }
                Ok(Call::Unmap { job, id, domain, iova, shares, already: 0 })
            }
            Effect::Map { job, domain, mut iova, piece, file, offset, writable } => {
                let mut shares = Vec::new();
                while let Some(Effect::Map {
                    job: other,
                    domain: next_domain,
                    iova: next,
                    piece: next_piece,
                    file: next_file,
                    offset: next_offset,
                    writable: next_writable,
                }) = self.effects.get(self.executed)
                    && (*next_domain, *next_piece, *next_file, *next_writable)
                        == (domain, piece, file, writable)
                    && next_offset.0 == offset.0 + iova.len()
                    && iova.end() == next.start()
                    // Else one mapping would cross the border: the domain would make one less than the gate counts.
                    && iova.end().0.is_multiple_of(piece)
                    && let Some(both) = adjacent_union(iova, *next)
                    && both.len() <= MAX_CALL_BYTES
                    && both.len().div_ceil(piece) <= MAX_CALL_MAPPINGS
                {
                    if shares.is_empty() {
                        shares.push(CoalescedRequest { job, iova, bytes: iova.len() });
                    }
                    shares.push(CoalescedRequest { job: *other, iova: *next, bytes: next.len() });
                    iova = both;
                    self.take_coalesced();
                }
                let (Some(file), Some(domain)) = (self.files.get(file), self.domain_of(domain)) else {
                    let result = MapResult::Refused { errno: EBADF };
                    let others = shares.iter().skip(1).map(|share: &CoalescedRequest| share.job);
                    let all = std::iter::once(job).chain(others);
                    return Err(all.map(|job| Event::Mapped { job, result }).collect());
                };
                Ok(Call::Map { job, domain, iova, piece, file, offset, writable, shares })
            }
            other => Call::of(other, self).map_err(|failed| failed.into_iter().collect()),
        }
    }

    /// Takes the next effect out: it is part of a coalesced call.
    fn take_coalesced(&mut self) {
        if let Some(effect) = self.effects.get_mut(self.executed) {
            self.executed += 1;
            *effect = EXECUTED;
        }
        self.execute_without_call();
    }

    /// Executes the alarms and receipts that come next, which may stand between requests that can be coalesced. It stops at
    /// any other effect: the order of calls, answers and notices must not change.
    fn execute_without_call(&mut self) {
        while let Some(effect) = self.effects.get_mut(self.executed) {
            match effect {
                Effect::Arm { invalidation, rung, after_ns } => {
                    let (invalidation, rung, after_ns) = (*invalidation, *rung, *after_ns);
                    self.arm(invalidation, rung, after_ns);
                }
                Effect::Receipt(_) => {
                    if let Effect::Receipt(receipt) = std::mem::replace(effect, EXECUTED) {
                        self.record_receipt(*receipt);
                    }
                }
                _ => return,
            }
            self.executed += 1;
        }
    }
}

/// The placeholder for an effect that was taken out: the cheapest one. It is never executed.
pub(super) const EXECUTED: Effect = Effect::ForgetFile { file: FileId { device: 0, inode: 0 } };

/// Returns the union of two ranges if they are adjacent.
fn adjacent_union(one: PageRange<Iova>, other: PageRange<Iova>) -> Option<PageRange<Iova>> {
    let adjacent = one.end() == other.start() || other.end() == one.start();
    let start = one.start().min(other.start());
    adjacent.then(|| PageRange::between(start, one.end().max(other.end()))).flatten()
}

/// Splits the result of a coalesced unmap: a result for each request if it accounts for every byte, else a call for each
/// request.
pub(super) fn split_result(
    (id, domain): (DomainId, Arc<dyn Domain>),
    result: UnmapResult,
    mut shares: Vec<CoalescedRequest>,
    took_ns: u64,
) -> Returned {
    let asked: u64 = shares.iter().map(|share| share.bytes).sum();
    let mut removed = match result {
        UnmapResult::Gone { bytes } if bytes == asked => {
            let event = |share: &CoalescedRequest| {
                let result = UnmapResult::Gone { bytes: share.bytes };
                Event::Unmapped { job: share.job, result, took_ns }
            };
            return Returned::Facts(shares.iter().map(event).collect());
        }
        UnmapResult::Failed { bytes, .. } if bytes <= asked => bytes,
        // A success that is short or too long, or a ticket from a domain that has none: the order in which it removed the
        // bytes is unknown, so none are credited.
        _ => 0,
    };
    // A failed unmap removes mappings from the lowest address on.
    shares.sort_unstable_by_key(|share| share.iova.start());
    let call = |share: &CoalescedRequest| {
        let already = share.bytes.min(removed);
        removed -= already;
        let (job, iova, domain) = (share.job, share.iova, Arc::clone(&domain));
        Call::Unmap { job, id, domain, iova, shares: Vec::new(), already }
    };
    Returned::Separate(shares.iter().map(call).collect())
}

/// Returns the result of an unmap after `already` bytes of the range were removed by an earlier call.
pub(super) fn add_bytes(already: u64, result: UnmapResult) -> UnmapResult {
    match result {
        UnmapResult::Gone { bytes } => UnmapResult::Gone { bytes: bytes.saturating_add(already) },
        UnmapResult::InFlight { bytes } => UnmapResult::InFlight { bytes: bytes.saturating_add(already) },
        UnmapResult::Failed { errno, bytes } => {
            UnmapResult::Failed { errno, bytes: bytes.saturating_add(already) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::gate::{Answer, Caller, ClientId, Door, InvalidationId, Policy, Step};
    use crate::protocol::verbs::AddMemory;
    use crate::session::{Next, SystemClock, Trust};
    use passgate_backends::iommu::sim::{Memory, Sim};
    use passgate_backends::{Capabilities, Entered, Segment, Ticket, Window, Windowed};
    use passgate_bindings::memory::GuestFile;
    use passgate_bindings::units::Offset;
    use passgate_bindings::{PAGE, identity};

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    const ID: DomainId = DomainId(0);

    const COUNTING: Capabilities = Capabilities { counts_partial: true, tickets: false, ..Sim::CAPABILITIES };

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
        let Next::Call(Call::Unmap { job, iova, shares, .. }) = session.next_step() else {
            panic!("no unmap")
        };
        let jobs = if shares.is_empty() { vec![job] } else { shares.iter().map(|share| share.job).collect() };
        (jobs.into_iter().map(|job| job.0).collect(), iova.pages())
    }

    #[test]
    fn unmaps_are_coalesced_across_alarms_but_not_across_answers() {
        let mut session = session();
        let arm = |id| Effect::Arm { invalidation: InvalidationId(id), rung: Step::Unmap, after_ns: 1 << 40 };
        let caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 7 };
        let ended = Effect::Answer { caller, answer: Answer::Ended { invalidation: InvalidationId(1) } };
        session.effects =
            vec![arm(1), unmap(1, 4), arm(2), unmap(2, 5), unmap(3, 3), unmap(4, 9), ended, unmap(5, 10)];
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
        session.effects = maps.to_vec();
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
        let apart = |capabilities: Capabilities, unmaps: [Effect; 2], why: &str| {
            let mut session = session_over(&Sim::new(capabilities, Memory::new()).unwrap());
            session.effects = unmaps.to_vec();
            assert_eq!(next(&mut session), (vec![1], 1), "{why}");
            assert_eq!(next(&mut session), (vec![2], 1), "{why}");
        };
        let both = [unmap(1, 4), unmap(2, 5)];
        let uncounted = |effect: &Effect| match effect.clone() {
            Effect::Unmap { job, domain, iova, .. } => Effect::Unmap { job, domain, iova, bytes: None },
            other => other,
        };
        apart(
            Capabilities { counts_partial: false, ..COUNTING },
            both.clone(),
            "a failure does not report what it removed",
        );
        apart(Capabilities { tickets: true, ..COUNTING }, both.clone(), "one ticket would be for both");
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
        session.effects = (3..8).map(|page| unmap(page, page)).collect();
        session.executed = 0;
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
        session.early_tickets.insert((DomainId(0), Ticket(3)));
        let returned = |ticket| {
            let result = UnmapResult::InFlight { bytes: PAGE };
            let event = Event::Unmapped { job: JobId(1), result, took_ns: 1 };
            Returned::Fact { event, ticket: Some((DomainId(0), Ticket(ticket), JobId(1))) }
        };
        session.returned(returned(3));
        assert!(session.early_tickets.is_empty() && session.tickets.is_empty());
        session.returned(returned(4));
        assert_eq!(session.tickets.values().collect::<Vec<_>>(), [&JobId(1)]);
    }
}
