//! Neighbouring calls made as one: a burst of conversions of single pages asks for many unmaps (and later maps) side by
//! side, and the kernel does them in one call.
//!
//! The gate knows nothing of it: it asks for each by itself and has an answer for each. An answer is believed to the byte
//! and no further: where one call for all of them did not do exactly what each of them was to, each is tried again by a
//! call of its own, so that one that fails spoils none of the others. What a joined unmap had removed before it failed counts
//! for those it removed, from the lowest address on; so unmaps are joined only where the domain reports that
//! ([`Capabilities::counts_partial`](passgate_backends::Capabilities::counts_partial)). Nor are they where operations in
//! flight over one range would hold up its neighbours, or where nobody knows how much of a range is mapped.

use std::sync::Arc;

use passgate_backends::Domain;
use passgate_bindings::{Iova, PageRange};

use super::Session;
use super::call::{self, Call, Returned};
use crate::gate::{DomainId, Effect, Event, FileId, JOB_BYTES, JOB_OBJECTS, JobId, MapResult, UnmapResult};

/// Calls that are made as one at most.
const MOST: usize = 4096;

/// `EBADF`: the session does not hold the file that is to be mapped.
const NO_FILE: i32 = 9;

/// An unmap or a map that shares its call with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub(super) job: JobId,
    /// The whole range.
    pub(super) iova: PageRange<Iova>,
    /// Bytes of it that are to be unmapped or mapped.
    pub(super) bytes: u64,
}

impl Session {
    /// Takes the effects that may be done by one call with `first`, the one just taken out. Where there can be no call,
    /// `Err` has the results of all that it was for: each has failed.
    pub(super) fn join(&mut self, first: Effect) -> Result<Call, Vec<Event>> {
        self.pass_over();
        match first {
            Effect::Unmap { job, domain, mut iova, bytes } => {
                let id = domain;
                let Some(domain) = self.domain_of(id) else { return Err(vec![call::failed_unmap(job)]) };
                let capabilities = domain.capabilities();
                let joins = capabilities.counts_partial && !capabilities.tickets;
                let mut shares = Vec::new();
                while joins
                    && let Some(Effect::Unmap { job: other, domain: at, iova: next, bytes: Some(more) }) =
                        self.effects.get(self.done)
                    && let (at, Some(bytes)) = (*at, bytes)
                    && at == id
                    && let Some(both) = touching(iova, *next)
                    && !domain.may_wait(both)
                    && shares.len() < MOST
                {
                    if shares.is_empty() {
                        shares.push(Share { job, iova, bytes });
                    }
                    shares.push(Share { job: *other, iova: *next, bytes: *more });
                    iova = both;
                    self.take_joined();
                }
                Ok(Call::Unmap { job, id, domain, iova, shares, already: 0 })
            }
            Effect::Map { job, domain, mut iova, piece, file, offset, writable } => {
                let mut shares = Vec::new();
                while let Some(Effect::Map {
                    job: other,
                    domain: at,
                    iova: next,
                    piece: its,
                    file: of,
                    offset: from,
                    writable: way,
                }) = self.effects.get(self.done)
                    && (*at, *its, *of, *way) == (domain, piece, file, writable)
                    && from.0 == offset.0 + iova.len()
                    && iova.end() == next.start()
                    // A mapping over the seam would be one more than the gate knows of.
                    && iova.end().0.is_multiple_of(piece)
                    && let Some(both) = touching(iova, *next)
                    && both.len() <= JOB_BYTES
                    && both.len().div_ceil(piece) <= JOB_OBJECTS
                {
                    if shares.is_empty() {
                        shares.push(Share { job, iova, bytes: iova.len() });
                    }
                    shares.push(Share { job: *other, iova: *next, bytes: next.len() });
                    iova = both;
                    self.take_joined();
                }
                let (Some(file), Some(domain)) = (self.files.get(file), self.domain_of(domain)) else {
                    let result = MapResult::Refused { errno: NO_FILE };
                    let others = shares.iter().skip(1).map(|share: &Share| share.job);
                    let all = std::iter::once(job).chain(others);
                    return Err(all.map(|job| Event::Mapped { job, result }).collect());
                };
                Ok(Call::Map { job, domain, iova, piece, file, offset, writable, shares })
            }
            other => Call::of(other, self).map_err(|failed| failed.into_iter().collect()),
        }
    }

    /// The effect that `done` points at is part of another call now.
    fn take_joined(&mut self) {
        if let Some(effect) = self.effects.get_mut(self.done) {
            self.done += 1;
            *effect = NOTHING;
        }
        self.pass_over();
    }

    /// Does what needs no call, up to the next effect that does.
    fn pass_over(&mut self) {
        while let Some(effect) = self.effects.get_mut(self.done) {
            match effect {
                Effect::Arm { invalidation, rung, after_ns } => {
                    let (invalidation, rung, after_ns) = (*invalidation, *rung, *after_ns);
                    self.arm(invalidation, rung, after_ns);
                }
                Effect::Receipt(_) => {
                    if let Effect::Receipt(receipt) = std::mem::replace(effect, NOTHING) {
                        self.remember(*receipt);
                    }
                }
                _ => return,
            }
            self.done += 1;
        }
    }
}

/// What takes the place of an effect that is done: the cheapest one.
pub(super) const NOTHING: Effect = Effect::ForgetFile { file: FileId { device: 0, inode: 0 } };

/// Both together, where they lie side by side.
fn touching(one: PageRange<Iova>, other: PageRange<Iova>) -> Option<PageRange<Iova>> {
    let beside = one.end() == other.start() || other.end() == one.start();
    let start = one.start().min(other.start());
    beside.then(|| PageRange::between(start, one.end().max(other.end()))).flatten()
}

/// What one unmap says to each that shared it; or the calls that try each by itself.
pub(super) fn shared(
    (id, domain): (DomainId, Arc<dyn Domain>),
    result: UnmapResult,
    mut shares: Vec<Share>,
    took_ns: u64,
) -> Returned {
    let asked: u64 = shares.iter().map(|share| share.bytes).sum();
    let mut left = match result {
        UnmapResult::Gone { bytes } if bytes == asked => {
            let event = |share: &Share| {
                let result = UnmapResult::Gone { bytes: share.bytes };
                Event::Unmapped { job: share.job, result, took_ns }
            };
            return Returned::Facts(shares.iter().map(event).collect());
        }
        UnmapResult::Failed { bytes, .. } if bytes <= asked => bytes,
        // It is not as it should be: in what order it took away what it did nobody knows.
        _ => 0,
    };
    shares.sort_unstable_by_key(|share| share.iova.start());
    let call = |share: &Share| {
        let already = share.bytes.min(left);
        left -= already;
        let (job, iova, domain) = (share.job, share.iova, Arc::clone(&domain));
        Call::Unmap { job, id, domain, iova, shares: Vec::new(), already }
    };
    Returned::Apart(shares.iter().map(call).collect())
}

/// The result of an unmap of which `already` bytes had gone before.
pub(super) fn with(already: u64, result: UnmapResult) -> UnmapResult {
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

    fn share(job: u64, page: u64, pages: u64) -> Share {
        let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
        Share { job: JobId(job), iova, bytes: pages * PAGE }
    }

    /// In the order in which they were asked for.
    fn shares() -> Vec<Share> {
        vec![share(1, 5, 1), share(2, 6, 2), share(3, 4, 1)]
    }

    /// A domain that reports what a failed unmap had removed, and leaves nothing in flight.
    fn counting() -> Sim {
        Sim::new(COUNTING, Memory::new()).unwrap()
    }

    fn domain() -> Arc<dyn Domain> {
        Arc::new(counting())
    }

    fn told(result: UnmapResult) -> Vec<UnmapResult> {
        let Returned::Facts(events) = shared((ID, domain()), result, shares(), 7) else {
            panic!("each is tried by itself")
        };
        let results = events.into_iter().map(|event| match event {
            Event::Unmapped { result, took_ns: 7, .. } => result,
            other => panic!("{other:?}"),
        });
        results.collect()
    }

    #[test]
    fn one_answer_is_believed_to_the_byte_and_no_further() {
        let gone = |bytes| UnmapResult::Gone { bytes };
        assert_eq!(told(gone(4 * PAGE)), [gone(PAGE), gone(2 * PAGE), gone(PAGE)]);
        for wrong in [0, PAGE, 3 * PAGE, 5 * PAGE] {
            assert_eq!(tried(gone(wrong)), [(3, 0), (1, 0), (2, 0)], "{wrong} bytes");
        }
        // A domain that has no tickets gave one: whatever it means, nothing is believed.
        assert_eq!(tried(UnmapResult::InFlight { bytes: 4 * PAGE }), [(3, 0), (1, 0), (2, 0)]);
    }

    /// The calls that try each by itself: its job, and the pages that are gone by then.
    fn tried(result: UnmapResult) -> Vec<(u64, u64)> {
        let Returned::Apart(calls) = shared((ID, domain()), result, shares(), 7) else {
            panic!("{result:?} is believed")
        };
        let call = |call| match call {
            Call::Unmap { job, already, shares, .. } if shares.is_empty() => (job.0, already / PAGE),
            other => panic!("{other:?}"),
        };
        calls.into_iter().map(call).collect()
    }

    #[test]
    fn what_a_failed_call_removed_is_counted_from_the_lowest_address_on() {
        let failed = |pages| UnmapResult::Failed { errno: 16, bytes: pages * PAGE };
        assert_eq!(tried(failed(0)), [(3, 0), (1, 0), (2, 0)]);
        assert_eq!(tried(failed(1)), [(3, 1), (1, 0), (2, 0)]);
        assert_eq!(tried(failed(3)), [(3, 1), (1, 1), (2, 1)]);
        assert_eq!(tried(failed(4)), [(3, 1), (1, 1), (2, 2)]);
        // More than there was is no count at all.
        assert_eq!(tried(failed(5)), [(3, 0), (1, 0), (2, 0)]);
        let gone = UnmapResult::Gone { bytes: PAGE };
        assert_eq!(with(PAGE, gone), UnmapResult::Gone { bytes: 2 * PAGE });
        assert_eq!(with(PAGE, failed(1)), failed(2));
    }

    #[test]
    fn only_neighbours_are_joined() {
        let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE).unwrap();
        assert_eq!(touching(range(4, 2), range(6, 1)), Some(range(4, 3)));
        assert_eq!(touching(range(4, 2), range(3, 1)), Some(range(3, 3)));
        assert_eq!(touching(range(4, 2), range(7, 1)), None);
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

    /// The jobs of the next call, and how many pages it is over.
    fn next(session: &mut Session) -> (Vec<u64>, u64) {
        let Next::Call(Call::Unmap { job, iova, shares, .. }) = session.next_step() else {
            panic!("no unmap")
        };
        let jobs = if shares.is_empty() { vec![job] } else { shares.iter().map(|share| share.job).collect() };
        (jobs.into_iter().map(|job| job.0).collect(), iova.pages())
    }

    #[test]
    fn what_lies_between_neighbours_is_done_and_what_must_stay_in_order_parts_them() {
        let mut session = session();
        let arm = |id| Effect::Arm { invalidation: InvalidationId(id), rung: Step::Unmap, after_ns: 1 << 40 };
        let caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 7 };
        let ended = Effect::Answer { caller, answer: Answer::Ended { invalidation: InvalidationId(1) } };
        session.effects =
            vec![arm(1), unmap(1, 4), arm(2), unmap(2, 5), unmap(3, 3), unmap(4, 9), ended, unmap(5, 10)];
        assert_eq!(next(&mut session), (vec![1, 2, 3], 3));
        assert_eq!(session.timers.len(), 2, "the second alarm is set although its effect was passed over");
        assert_eq!(next(&mut session), (vec![4], 1));
        assert!(matches!(session.next_step(), Next::Answer(..)));
        assert_eq!(next(&mut session), (vec![5], 1));
        assert!(matches!(session.next_step(), Next::Idle));
    }

    /// A session that holds two files of 64 pages, which it has mapped.
    fn session_with_files() -> (Session, [FileId; 2]) {
        let mut session = session();
        let memory = [0, 64].map(|page| AddMemory::shared(page * PAGE, 64 * PAGE));
        let files = memory.map(|memory| add(&mut session, &memory));
        (session, files)
    }

    /// Adds memory of a new file, which is mapped.
    fn add(session: &mut Session, memory: &AddMemory) -> FileId {
        let file = GuestFile::memfd("joined", memory.length).unwrap();
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

    /// A map of `pages` pages at `page`, of the pages of `file` from `offset` on.
    fn map(job: u64, (page, pages): (u64, u64), file: FileId, offset: u64) -> Effect {
        let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
        let (job, domain, offset) = (JobId(job), DomainId(0), Offset(offset * PAGE));
        Effect::Map { job, domain, iova, piece: PAGE, file, offset, writable: true }
    }

    /// How many jobs each of the calls is for that these maps are made by.
    fn joined(session: &mut Session, maps: &[Effect]) -> Vec<usize> {
        session.effects = maps.to_vec();
        let mut calls = Vec::new();
        while let Next::Call(Call::Map { shares, .. }) = session.next_step() {
            calls.push(shares.len().max(1));
        }
        calls
    }

    #[test]
    fn maps_join_only_over_pages_that_follow_each_other_in_one_file() {
        let (mut session, [one, other]) = session_with_files();
        let first = map(1, (128, 2), one, 4);
        assert_eq!(joined(&mut session, &[first.clone(), map(2, (130, 1), one, 6)]), [2]);
        for apart in [
            map(2, (130, 1), one, 7),
            map(2, (130, 1), one, 5),
            map(2, (130, 1), one, 4),
            map(2, (130, 1), other, 6),
            map(2, (131, 1), one, 6),
            map(2, (127, 1), one, 3),
        ] {
            assert_eq!(joined(&mut session, &[first.clone(), apart.clone()]), [1, 1], "{apart:?}");
        }
        // Two regions that touch, of parts of one file that do not: the third is a neighbour of the second only.
        let (second, third) = (map(2, (130, 1), one, 20), map(3, (131, 1), one, 21));
        assert_eq!(joined(&mut session, &[first, second, third]), [1, 2]);
    }

    #[test]
    fn maps_join_only_with_the_same_access_and_at_the_border_of_a_mapping() {
        let (mut session, [one, _]) = session_with_files();
        let read_only = match map(2, (130, 1), one, 6) {
            Effect::Map { job, domain, iova, piece, file, offset, .. } => {
                Effect::Map { job, domain, iova, piece, file, offset, writable: false }
            }
            other => other,
        };
        assert_eq!(joined(&mut session, &[map(1, (128, 2), one, 4), read_only]), [1, 1]);
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
        assert_eq!(joined(&mut session, &maps(132)), [2]);
        assert_eq!(joined(&mut session, &maps(130)), [1, 1]);
    }

    #[test]
    fn unmaps_are_joined_only_where_each_can_be_told_apart() {
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
            "a failure does not say what it removed",
        );
        apart(Capabilities { tickets: true, ..COUNTING }, both.clone(), "one ticket would be for both");
        let [first, second] = both;
        apart(COUNTING, [uncounted(&first), second.clone()], "how much of the first is mapped is unknown");
        apart(COUNTING, [first.clone(), uncounted(&second)], "how much of the second is mapped is unknown");
    }

    #[test]
    fn an_unmap_that_waits_for_an_operation_is_not_joined() {
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
        session.done = 0;
        assert_eq!(next(&mut session), (vec![3, 4], 2));
        assert_eq!(next(&mut session), (vec![5], 1));
        assert_eq!(next(&mut session), (vec![6, 7], 2));
        window.leave(0);
    }

    #[test]
    fn joined_maps_are_no_longer_than_a_single_one_may_be() {
        let (mut session, [one, _]) = session_with_files();
        let maps = |pages: u64| {
            (0..4).map(|nth| map(nth, (4096 + nth * pages, pages), one, nth * pages)).collect::<Vec<_>>()
        };
        assert_eq!(joined(&mut session, &maps(JOB_OBJECTS / 4)), [4]);
        assert_eq!(joined(&mut session, &maps(JOB_OBJECTS / 2)), [2, 2]);
    }

    #[test]
    fn a_ticket_that_ends_before_its_call_has_returned_releases_what_it_is_of() {
        let mut session = session();
        session.early.insert((DomainId(0), Ticket(3)));
        let returned = |ticket| {
            let result = UnmapResult::InFlight { bytes: PAGE };
            let event = Event::Unmapped { job: JobId(1), result, took_ns: 1 };
            Returned::Fact { event, ticket: Some((DomainId(0), Ticket(ticket), JobId(1))) }
        };
        session.returned(returned(3));
        assert!(session.early.is_empty() && session.tickets.is_empty());
        session.returned(returned(4));
        assert_eq!(session.tickets.values().collect::<Vec<_>>(), [&JobId(1)]);
    }
}
