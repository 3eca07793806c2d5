//! Neighbouring calls made as one: a burst of conversions of single pages asks for many unmaps (and later maps) side by
//! side, and the kernel does them in one call.
//!
//! The gate knows nothing of it: it asks for each by itself and has an answer for each. An answer is believed to the byte
//! and no further: where one call for all of them did not take away exactly what each of them was to, none of them is told
//! as gone, and the gate tries each again.

use passgate_backends::Ticket;
use passgate_bindings::{Iova, PageRange};

use super::Session;
use super::call::{Call, Returned};
use crate::gate::{DomainId, Effect, Event, FileId, JobId, UnmapResult};

/// Calls that are made as one at most.
const MOST: usize = 4096;

/// `EIO`: one call for several did not take away what they were to.
const SHORT: i32 = 5;

/// An unmap that shares its call with others: its name, and the bytes that have to go.
pub(super) type Share = (JobId, u64);

impl Session {
    /// Takes the effects that may be done by one call with `first`, the one just taken out.
    pub(super) fn join(&mut self, first: Effect) -> Option<Call> {
        self.pass_over();
        match first {
            Effect::Unmap { job, domain, mut iova, bytes } => {
                let mut shares = Vec::new();
                while let Some(Effect::Unmap { job: other, domain: at, iova: next, bytes: more }) =
                    self.effects.get(self.done)
                    && *at == domain
                    && let Some(both) = touching(iova, *next)
                    && shares.len() < MOST
                {
                    if shares.is_empty() {
                        shares.push((job, bytes));
                    }
                    shares.push((*other, *more));
                    iova = both;
                    self.take_joined();
                }
                let domain_of = self.domains.get(usize::from(domain.0))?.clone();
                Some(Call::Unmap { job, id: domain, domain: domain_of, iova, shares })
            }
            Effect::Map { job, domain, mut iova, piece, file, offset, writable } => {
                let mut jobs = Vec::new();
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
                    && jobs.len() < MOST
                {
                    jobs.push(*other);
                    iova = both;
                    self.take_joined();
                }
                let file = self.files.get(file)?;
                let domain = self.domains.get(usize::from(domain.0))?.clone();
                Some(Call::Map { job, domain, iova, piece, file, offset, writable, others: jobs })
            }
            other => Call::of(other, self),
        }
    }

    /// Facts of one call; of operations in flight `ticket` says when they are over.
    pub(super) fn facts(&mut self, events: Vec<Event>, ticket: Option<(DomainId, Ticket, Vec<JobId>)>) {
        let mut over = Vec::new();
        if let Some((domain, ticket, jobs)) = ticket {
            if self.early.remove(&(domain, ticket)) {
                over = jobs;
            } else {
                self.tickets.insert((domain, ticket), jobs);
            }
        }
        events.into_iter().for_each(|event| self.handle(event));
        over.into_iter().for_each(|job| self.handle(Event::Released { job }));
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

/// What one unmap says to each that shared it.
pub(super) fn shared(
    result: UnmapResult,
    ticket: Option<(DomainId, Ticket)>,
    shares: Vec<Share>,
    took_ns: u64,
) -> Returned {
    let asked: u64 = shares.iter().map(|(_, bytes)| bytes).sum();
    let each = |bytes: u64| match result {
        UnmapResult::Gone { bytes: gone } if gone == asked => UnmapResult::Gone { bytes },
        UnmapResult::InFlight { bytes: gone } if gone == asked => UnmapResult::InFlight { bytes },
        // What is in flight ends before anything is told as over; how much of whose it is nobody knows.
        UnmapResult::InFlight { .. } => UnmapResult::InFlight { bytes: 0 },
        UnmapResult::Gone { .. } => UnmapResult::Failed { errno: SHORT, bytes: 0 },
        UnmapResult::Failed { errno, .. } => UnmapResult::Failed { errno, bytes: 0 },
    };
    let event = |(job, bytes): &Share| Event::Unmapped { job: *job, result: each(*bytes), took_ns };
    let events = shares.iter().map(event).collect();
    let jobs = shares.into_iter().map(|(job, _)| job).collect();
    Returned::Facts { events, ticket: ticket.map(|(domain, ticket)| (domain, ticket, jobs)) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use crate::gate::{
        Answer, Caller, ClientId, Door, InvalidationId, PageState, Performer, Policy, Step, Verdict,
    };
    use crate::protocol::verbs::AddMemory;
    use crate::session::{Next, SystemClock, Trust};
    use passgate_backends::iommu::sim::{self, Fault, Memory, Sim};
    use passgate_backends::{Nature, StopClass};
    use passgate_bindings::memory::GuestFile;
    use passgate_bindings::units::Offset;
    use passgate_bindings::{PAGE, identity};

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    fn shares() -> Vec<Share> {
        vec![(JobId(1), PAGE), (JobId(2), 2 * PAGE), (JobId(3), PAGE)]
    }

    fn told(result: UnmapResult, ticket: Option<(DomainId, Ticket)>) -> (Vec<UnmapResult>, usize) {
        let Returned::Facts { events, ticket } = shared(result, ticket, shares(), 7) else { unreachable!() };
        let results = events.into_iter().map(|event| match event {
            Event::Unmapped { result, took_ns: 7, .. } => result,
            other => panic!("{other:?}"),
        });
        (results.collect(), ticket.map_or(0, |(.., jobs)| jobs.len()))
    }

    #[test]
    fn one_answer_is_believed_to_the_byte_and_no_further() {
        let gone = |bytes| UnmapResult::Gone { bytes };
        assert_eq!(told(gone(4 * PAGE), None), (vec![gone(PAGE), gone(2 * PAGE), gone(PAGE)], 0));
        for wrong in [0, PAGE, 3 * PAGE, 5 * PAGE] {
            let (each, _) = told(gone(wrong), None);
            assert_eq!(each, vec![UnmapResult::Failed { errno: SHORT, bytes: 0 }; 3], "{wrong} bytes");
        }
        let failed = UnmapResult::Failed { errno: 16, bytes: 2 * PAGE };
        assert_eq!(told(failed, None).0, vec![UnmapResult::Failed { errno: 16, bytes: 0 }; 3]);
        let ticket = Some((DomainId(0), Ticket(9)));
        let flying = |bytes| UnmapResult::InFlight { bytes };
        assert_eq!(told(flying(4 * PAGE), ticket), (vec![flying(PAGE), flying(2 * PAGE), flying(PAGE)], 3));
        assert_eq!(told(flying(PAGE), ticket), (vec![flying(0); 3], 3));
    }

    #[test]
    fn only_neighbours_are_joined() {
        let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE).unwrap();
        assert_eq!(touching(range(4, 2), range(6, 1)), Some(range(4, 3)));
        assert_eq!(touching(range(4, 2), range(3, 1)), Some(range(3, 3)));
        assert_eq!(touching(range(4, 2), range(7, 1)), None);
    }

    fn session() -> Session {
        session_over(&Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap())
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
        Effect::Unmap { job: JobId(job), domain: DomainId(0), iova, bytes: PAGE }
    }

    /// The jobs of the next call, and how many pages it is over.
    fn next(session: &mut Session) -> (Vec<u64>, u64) {
        let Next::Call(Call::Unmap { job, iova, shares, .. }) = session.next_step() else {
            panic!("no unmap")
        };
        let jobs = if shares.is_empty() { vec![job] } else { shares.iter().map(|(job, _)| *job).collect() };
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
        while let Next::Call(Call::Map { others, .. }) = session.next_step() {
            calls.push(1 + others.len());
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
    fn the_ticket_of_a_joined_unmap_ends_every_invalidation_that_shared_it() {
        for ends_first in [false, true] {
            let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
            let _device = sim.device("sim:0", StopClass::all(), Nature { ats: false, tdi: false });
            let mut session = session_over(&sim);
            add(&mut session, &AddMemory { piece: PAGE, ..AddMemory::shared(0, 64 * PAGE) });
            for page in [4, 5, 6] {
                let ranges = PageRange::new(page * PAGE, PAGE).unwrap().into();
                let (to, performer) = (PageState::Private, Performer::Client);
                session.handle(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 });
            }
            sim.fail_next(sim::Call::Unmap, Fault::Late);
            let Next::Call(call) = session.next_step() else { panic!("no unmap") };
            let returned = call.run();
            if ends_first {
                sim.flush();
                session.poll_domains();
            }
            session.returned(returned);
            assert!(ends_first || matches!(session.next_step(), Next::Idle));
            sim.flush();
            session.poll_domains();
            let mut done = 0;
            loop {
                match session.next_step() {
                    Next::Idle => break,
                    Next::Answer(_, Answer::Verdict { verdict: Verdict::Done, .. }) => done += 1,
                    Next::Call(call) => session.returned(call.run()),
                    _ => {}
                }
            }
            assert_eq!((done, sim.calls(sim::Call::Unmap)), (3, 1), "the ticket ends first: {ends_first}");
        }
    }

    #[test]
    fn a_ticket_that_ends_before_its_call_has_returned_releases_all_that_shared_it() {
        let mut session = session();
        session.early.insert((DomainId(0), Ticket(3)));
        let flying = UnmapResult::InFlight { bytes: 4 * PAGE };
        let returned = shared(flying, Some((DomainId(0), Ticket(3))), shares(), 1);
        session.returned(returned);
        assert!(session.early.is_empty() && session.tickets.is_empty());
        session.returned(shared(flying, Some((DomainId(0), Ticket(4))), shares(), 1));
        assert_eq!(session.tickets.values().map(Vec::len).collect::<Vec<_>>(), [3]);
    }
}
