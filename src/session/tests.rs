//! Every effect that asks for a call has a result, in time, whatever happened since the gate asked for it; and files are stored and
//! closed as long as they are needed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate_backends::{DomainCaps, Steps};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_sim::iommu::{self as sim, Fault, FaultPlan, Memory, Sim};
use rustix::io::Errno;

use super::fdstore::{FdStore, Name};
use super::persist::PersistentState;
use super::*;
use crate::gate::{
    CallLimits, Cause, ClientId, Door, FileId, PageState, Performer, Ranges, Refusal, RegionId, Rung, Verdict,
};
use crate::protocol::verbs::AddMemory;
use crate::session::quarantine_file::tests::WRITTEN_BYTES;
use crate::session::records::StateOptions;

const PAGES: u64 = 8;
const DEADLINE: Duration = Duration::from_millis(10);

/// A clock that advances only by [`ManualClock::advance`].
#[derive(Debug)]
struct ManualClock(Mutex<Instant>);

impl ManualClock {
    fn advance(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }
}

struct World {
    session: Session,
    sim: Sim,
    clock: Arc<ManualClock>,
    file: GuestFile,
    answers: Vec<(Caller, Answer)>,
    notices: Vec<Notice>,
    refused: Vec<BorderError>,
}

fn caller(client: u32, cookie: u64) -> Caller {
    Caller { client: ClientId(client), door: Door::Control, cookie }
}

fn pages(first: u64, count: u64) -> PageRange<Gpa> {
    PageRange::new(first * PAGE, count * PAGE).unwrap()
}

impl World {
    /// A session over a domain without a device, and a file that is in no region yet.
    fn new(counts_partial: bool) -> Self {
        Self::with(counts_partial, PAGES, None, None)
    }

    fn with(counts_partial: bool, pages: u64, records: Option<Records>, hold: Option<Persistence>) -> Self {
        let capabilities = DomainCaps { counts_partial, tickets: !counts_partial, ..Sim::CAPABILITIES };
        let sim = Sim::new(capabilities, Memory::new()).unwrap();
        let clock = Arc::new(ManualClock(Mutex::new(Instant::now())));
        let domain = Arc::new(sim.clone());
        let session =
            Session::new(Policy::default(), domain, vec![], Trust::default(), clock.clone(), records, hold);
        let file = GuestFile::memfd("border", pages * PAGE).unwrap();
        Self { session, sim, clock, file, answers: vec![], notices: vec![], refused: vec![] }
    }

    /// A session that outlives its process, and the names that it removes from the descriptor store.
    fn with_fd_store() -> (Self, Receiver<Name>) {
        let (store, removed) = FdStore::detached();
        let hold = Persistence {
            store,
            persistent: PersistentState::new().unwrap(),
            earlier: None,
            quarantine: None,
        };
        (Self::with(false, PAGES, None, Some(hold)), removed)
    }

    /// As [`World::new`], with the file at address 0 as a region of client 1.
    fn with_region(counts_partial: bool) -> Self {
        let mut world = Self::new(counts_partial);
        world.add(1, 0);
        world.settle();
        assert!(matches!(world.take_answers()[..], [(_, Answer::RegionAdded { .. })]));
        world
    }

    fn fd(&self) -> OwnedFd {
        self.file.as_fd().try_clone_to_owned().unwrap()
    }

    fn add(&mut self, client: u32, first_page: u64) {
        let memory = AddMemory::shared(first_page * PAGE, PAGES * PAGE);
        self.session.add_memory(caller(client, 1), memory, vec![self.fd()]);
    }

    fn begin(&mut self, range: PageRange<Gpa>, to: PageState, performer: Performer) {
        let (ranges, deadline_ns) = (range.into(), DEADLINE.as_nanos() as u64);
        let caller = caller(1, 10 + range.start().0 / PAGE);
        self.session.handle(Event::Begin { caller, ranges, to, performer, deadline_ns });
    }

    /// The next call; everything before it is executed.
    fn call(&mut self) -> Option<Call> {
        loop {
            match self.session.next_step() {
                Next::Idle => return None,
                Next::Call(call) => return Some(call),
                Next::Answer(caller, answer) => self.answers.push((caller, answer)),
                Next::Refused(_, error) => self.refused.push(error),
                Next::Notice(notice) => self.notices.push(notice),
            }
        }
    }

    fn settle(&mut self) {
        while let Some(call) = self.call() {
            self.session.returned(call.run());
        }
    }

    fn take_answers(&mut self) -> Vec<(Caller, Answer)> {
        std::mem::take(&mut self.answers)
    }

    fn advance(&mut self, time: Duration) {
        self.clock.advance(time);
        self.session.expire(self.clock.now());
    }

    /// Lets one deadline after another pass until there is an answer.
    fn expire_deadlines(&mut self) {
        while self.answers.is_empty() {
            let next = self.session.next_deadline().expect("a deadline is set");
            self.advance(next.saturating_duration_since(self.clock.now()));
            self.settle();
        }
    }

    fn file_id(&self) -> FileId {
        let stat = rustix::fs::fstat(self.file.as_fd()).unwrap();
        FileId { device: stat.st_dev, inode: stat.st_ino }
    }

    fn verdicts(&mut self) -> Vec<Verdict> {
        let verdict = |(_, answer)| match answer {
            Answer::Verdict { verdict, .. } => verdict,
            other => panic!("{other:?}"),
        };
        self.take_answers().into_iter().map(verdict).collect()
    }
}

/// The last region of a file is removed, and another of the same file is added before the session closes the file.
#[test]
fn file_added_again_before_it_is_closed_is_mapped() {
    let mut world = World::with_region(false);
    world.add(2, 100);
    let examined = world.call().unwrap().run();
    world.session.handle(Event::RemoveRegion { caller: caller(1, 2), region: RegionId(1) });
    let unmapped = world.call().unwrap().run();
    world.session.returned(unmapped);
    world.session.returned(examined);
    world.settle();
    let answers = world.take_answers();
    let removed = (caller(1, 2), Answer::RegionRemoved { region: RegionId(1) });
    let added = (caller(2, 1), Answer::RegionAdded { region: RegionId(2), mapped: PAGES * PAGE });
    assert!(answers.contains(&removed) && answers.contains(&added), "{answers:?}");
    // Pages that passgate converts are in this file, too.
    world.file.store(0, 7).unwrap();
    let (ranges, deadline_ns) = (pages(100, 1).into(), 1 << 40);
    let (to, performer) = (PageState::Hole, Performer::Passgate);
    world.session.handle(Event::Begin { caller: caller(2, 3), ranges, to, performer, deadline_ns });
    world.settle();
    assert_eq!(world.verdicts(), [Verdict::Done]);
    assert_eq!(world.file.load(0).unwrap(), 0);
    // It is closed with its last region.
    world.session.handle(Event::RemoveRegion { caller: caller(2, 4), region: RegionId(2) });
    world.settle();
    assert!(world.session.files.get(world.file_id()).is_none());
}

#[test]
fn convert_without_its_file_is_refused() {
    let mut world = World::with_region(false);
    world.session.files.forget(world.file_id());
    world.begin(pages(0, 1), PageState::Hole, Performer::Passgate);
    world.settle();
    let verdicts = world.verdicts();
    assert!(
        matches!(verdicts[..], [Verdict::Refused { reason, .. }] if reason.cause == Cause::ConvertFailed),
        "{verdicts:?}"
    );
}

#[test]
fn map_without_its_file_fails_and_is_reported() {
    let mut world = World::with_region(false);
    world.begin(pages(0, 1), PageState::Private, Performer::Client);
    world.settle();
    assert_eq!(world.verdicts(), [Verdict::Done]);
    world.session.files.forget(world.file_id());
    let (invalidation, outcome) = (InvalidationId(1), Outcome::NotCommitted);
    world.session.handle(Event::End { caller: caller(1, 3), invalidation, outcome });
    world.settle();
    assert!(matches!(world.take_answers()[..], [(_, Answer::Ended { .. })]));
    let failed = |notice: &Notice| matches!(notice, Notice::MapFailed { errno: 9, .. });
    assert!(world.notices.iter().any(failed), "{:?}", world.notices);
}

/// The last region of a file is removed after the file was stored again, and before the new region is added: the service manager
/// takes its time.
#[test]
fn file_of_a_region_being_added_stays_stored_when_its_last_region_goes() {
    let (mut world, removed) = World::with_fd_store();
    world.add(1, 0);
    world.settle();
    world.add(2, 100);
    let examined = world.call().unwrap().run();
    world.session.handle(Event::RemoveRegion { caller: caller(1, 2), region: RegionId(1) });
    world.settle();
    assert!(world.session.files.get(world.file_id()).is_none(), "no region has it");
    world.session.returned(examined);
    world.settle();
    assert!(world.session.files.get(world.file_id()).is_some());
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), []);
    // It is removed with the new region.
    world.session.handle(Event::RemoveRegion { caller: caller(2, 3), region: RegionId(2) });
    world.settle();
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), [Name::Memory(world.file_id())]);
}

#[test]
fn file_refused_or_discarded_after_its_last_region_went_is_removed_from_the_store() {
    for unwanted in [false, true] {
        let (mut world, removed) = World::with_fd_store();
        world.add(1, 0);
        world.settle();
        // The file ends before this region does.
        let memory = AddMemory::shared(100 * PAGE, 2 * PAGES * PAGE);
        world.session.add_memory(caller(2, 1), memory, vec![world.fd()]);
        let examined = world.call().unwrap().run();
        world.session.handle(Event::RemoveRegion { caller: caller(1, 2), region: RegionId(1) });
        world.settle();
        assert_eq!(removed.try_iter().collect::<Vec<_>>(), []);
        match examined {
            Returned::Examined { files, .. } if unwanted => world.session.unwanted(files),
            examined => world.session.returned(examined),
        }
        world.settle();
        assert_eq!(world.refused.len(), usize::from(!unwanted));
        assert_eq!(removed.try_iter().collect::<Vec<_>>(), [Name::Memory(world.file_id())]);
    }
}

/// The file was stored, and no region of it will be added.
#[test]
fn file_of_a_client_that_died_during_the_examination_is_removed_from_the_store() {
    let (mut world, removed) = World::with_fd_store();
    world.add(2, 0);
    let Returned::Examined { files, .. } = world.call().unwrap().run() else { panic!("it was examined") };
    world.session.handle(Event::ClientGone { client: ClientId(2) });
    world.settle();
    world.session.unwanted(files);
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), [Name::Memory(world.file_id())]);
    // Not while a region of another client needs it.
    world.add(1, 0);
    world.settle();
    world.add(2, 100);
    let Returned::Examined { files, .. } = world.call().unwrap().run() else { panic!("it was examined") };
    world.session.unwanted(files);
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), []);
}

#[test]
fn file_of_a_refused_region_is_closed_although_its_client_is_gone() {
    let mut world = World::with_region(false);
    let other = GuestFile::memfd("refused", PAGE).unwrap();
    let memory = AddMemory::shared(0, PAGE);
    let id = {
        let stat = rustix::fs::fstat(other.as_fd()).unwrap();
        FileId { device: stat.st_dev, inode: stat.st_ino }
    };
    world.session.add_memory(caller(2, 1), memory, vec![other.as_fd().try_clone_to_owned().unwrap()]);
    let examined = world.call().unwrap().run();
    world.session.returned(examined);
    assert!(world.session.files.get(id).is_some());
    world.session.handle(Event::ClientGone { client: ClientId(2) });
    world.settle();
    assert!(world.session.files.get(id).is_none(), "it is open for no region");
}

#[test]
fn convert_is_answered_within_its_deadline_although_its_map_hangs() {
    let mut world = World::with_region(false);
    world.begin(pages(0, 1), PageState::Private, Performer::Client);
    world.settle();
    let end = |invalidation, outcome| Event::End { caller: caller(1, 5), invalidation, outcome };
    world.session.handle(end(InvalidationId(1), Outcome::Committed));
    world.settle();
    world.take_answers();

    let begun = world.clock.now();
    world.begin(pages(0, 1), PageState::Shared, Performer::Passgate);
    let convert = world.call().unwrap();
    assert!(matches!(convert, Call::Convert { .. }), "{convert:?}");
    world.session.returned(convert.run());
    let map = world.call().unwrap();
    assert!(matches!(map, Call::Map { .. }), "{map:?}");
    assert!(world.call().is_none() && world.answers.is_empty(), "it waits for the map");
    let until = world.session.next_deadline().unwrap();
    assert!(until < begun + DEADLINE, "{:?} after the begin", until - begun);
    world.advance(until - begun);
    assert!(world.call().is_none());
    assert_eq!(world.verdicts(), [Verdict::Done]);
    world.session.returned(map.run());
    world.settle();
    assert_eq!(world.verdicts(), []);

    // An end waits no longer than the deadline of its begin.
    world.begin(pages(0, 1), PageState::Private, Performer::Client);
    world.settle();
    world.take_answers();
    world.session.handle(end(InvalidationId(3), Outcome::NotCommitted));
    let map = world.call().unwrap();
    assert!(world.call().is_none() && world.answers.is_empty(), "it waits for the map");
    world.advance(DEADLINE);
    assert!(world.call().is_none());
    assert!(matches!(world.take_answers()[..], [(_, Answer::Ended { .. })]));
    world.session.returned(map.run());
    world.settle();
    assert!(world.session.delayed_answers.is_empty());
}

fn burst(world: &mut World) -> Vec<Verdict> {
    for page in 0..PAGES {
        world.begin(pages(page, 1), PageState::Private, Performer::Client);
    }
    world.settle();
    world.verdicts()
}

#[test]
fn coalesced_unmap_that_fails_half_way_fails_none_of_its_requests() {
    for counts in [true, false] {
        let mut world = World::with_region(counts);
        world.sim.fail_next(sim::Call::Unmap, Fault::HalfUnmapped(Errno::BUSY));
        if !counts {
            // Unmaps that do not report partial bytes are not coalesced: a call for one page fails whole.
            world.sim.fail_next(sim::Call::Unmap, Fault::Errno(Errno::BUSY));
        }
        assert_eq!(burst(&mut world), [Verdict::Done; PAGES as usize], "counts: {counts}");
        assert_eq!((world.sim.mapping_count(), world.session.snapshot().quarantine.len()), (0, 0));
    }
}

#[test]
fn only_the_request_that_fails_by_itself_is_refused_of_a_coalesced_unmap() {
    let mut world = World::with_region(true);
    // The coalesced call removes half; then each is tried by itself, and page 4 fails, and fails again.
    let failed = Fault::Errno(Errno::BUSY);
    let plan = FaultPlan::new().at(sim::Call::Unmap, 1, Fault::HalfUnmapped(Errno::BUSY));
    world.sim.plan(plan.at(sim::Call::Unmap, 6, failed).at(sim::Call::Unmap, 10, failed));
    let verdicts = burst(&mut world);
    let done = verdicts.iter().filter(|verdict| **verdict == Verdict::Done).count();
    assert_eq!((done, verdicts.len()), (7, 8), "{verdicts:?}");
    let quarantine = world.session.snapshot().quarantine;
    assert_eq!((quarantine.len(), quarantine[0].range.start().0), (1, 4 * PAGE));
    assert_eq!(world.sim.mapping_count(), 1);
}

/// A short success does not say which pages were removed. Each is tried by itself, and those that were removed before come up short.
#[test]
fn short_coalesced_unmap_grants_only_pages_accounted_for() {
    let mut world = World::with_region(true);
    world.sim.fail_next(sim::Call::Unmap, Fault::Short);
    let verdicts = burst(&mut world);
    let done = verdicts.iter().filter(|verdict| **verdict == Verdict::Done).count();
    assert_eq!((done, verdicts.len()), (4, 8), "{verdicts:?}");
}

/// It is not known how much is mapped; an unmap that succeeds proves that nothing remains.
#[test]
fn half_made_map_is_gone_after_the_next_successful_unmap() {
    // The map fails half-way, and so may the unmap that closes the region.
    for failures in 0..2 {
        let mut world = World::new(true);
        let plan = FaultPlan::new().at(sim::Call::Map, 1, Fault::HalfMapped(Errno::BUSY));
        let fails = |plan: FaultPlan, nth| plan.at(sim::Call::Unmap, nth, Fault::Errno(Errno::BUSY));
        world.sim.plan((1..=failures).fold(plan, fails));
        world.add(1, 0);
        world.settle();
        while world.answers.is_empty() {
            let next = world.session.next_deadline().expect("a deadline is set");
            world.advance(next - world.clock.now());
            world.settle();
        }
        let answers = world.take_answers();
        let [(_, Answer::Refused(Refusal::HalfMapped { errno } | Refusal::MapFailed { errno }))] =
            answers[..]
        else {
            panic!("{failures} failures: {answers:?}")
        };
        assert_eq!(errno, Errno::BUSY.raw_os_error());
        let remaining = |world: &World| {
            let snapshot = world.session.snapshot();
            (snapshot.quarantine.len(), snapshot.regions.len(), world.sim.mapping_count() > 0)
        };
        let stuck = failures == 1;
        assert_eq!(remaining(&world), (usize::from(stuck), usize::from(stuck), stuck), "{failures} failures");
        world.session.handle(Event::ClientGone { client: ClientId(1) });
        world.settle();
        assert_eq!(remaining(&world), (0, 0, false), "{failures} failures");
    }
}

#[test]
fn region_waits_for_an_overlapping_one_to_be_closed() {
    let mut world = World::with_region(false);
    world.session.handle(Event::ClientGone { client: ClientId(1) });
    let unmap = world.call().unwrap();
    assert!(matches!(unmap, Call::Unmap { .. }), "{unmap:?}");
    world.add(2, 0);
    world.settle();
    assert!(world.answers.is_empty(), "{:?}", world.answers);
    world.session.returned(unmap.run());
    world.settle();
    let answers = world.take_answers();
    assert!(matches!(answers[..], [(_, Answer::RegionAdded { mapped, .. })] if mapped == PAGES * PAGE));
    // A region that is not being closed is not waited for.
    world.add(3, 0);
    world.settle();
    assert!(matches!(world.take_answers()[..], [(_, Answer::Refused(Refusal::Overlaps { .. }))]));
}

/// The next owner of the file describes the states of its pages, which must not be mixed with those of a region being closed.
#[test]
fn region_waits_for_aliases_of_the_last_owner_to_be_closed() {
    for hangs in [false, true] {
        let mut world = World::with_region(false);
        world.session.handle(Event::ClientGone { client: ClientId(1) });
        let unmap = world.call().unwrap();
        let memory = AddMemory { initial: PageState::Private, ..AddMemory::shared(64 * PAGE, PAGES * PAGE) };
        world.session.add_memory(caller(2, 1), memory, vec![world.fd()]);
        world.settle();
        assert!(world.answers.is_empty(), "{:?}", world.answers);
        if hangs {
            world.expire_deadlines();
        } else {
            world.session.returned(unmap.run());
        }
        world.settle();
        let answers = world.take_answers();
        let added = matches!(answers[..], [(_, Answer::RegionAdded { mapped: 0, .. })]);
        assert!(added || hangs && !answers.is_empty(), "{answers:?}");
    }
}

#[test]
fn region_is_refused_in_time_if_the_one_in_its_way_cannot_be_closed() {
    let mut world = World::with_region(false);
    world.session.handle(Event::ClientGone { client: ClientId(1) });
    let _hangs = world.call().unwrap();
    world.add(2, 0);
    world.add(3, 0);
    world.settle();
    // The deferred region of a client that is gone is forgotten.
    world.session.handle(Event::ClientGone { client: ClientId(3) });
    let start = world.clock.now();
    world.expire_deadlines();
    assert!(world.clock.now() - start <= Duration::from_nanos(Policy::default().close_deadline_ns));
    let answers = world.take_answers();
    assert!(matches!(answers[..], [(_, Answer::Refused(Refusal::Overlaps { .. }))]), "{answers:?}");
    assert!(world.session.deferred_regions.is_empty());
}

#[test]
fn region_being_added_outlives_another_client_that_goes() {
    let mut world = World::with_region(false);
    world.session.handle(Event::ClientGone { client: ClientId(1) });
    let unmap = world.call().unwrap();
    let own = GuestFile::memfd("own", PAGES * PAGE).unwrap();
    let memory = AddMemory { sole_mapper: true, ..AddMemory::shared(0, PAGES * PAGE) };
    world.session.add_memory(caller(2, 1), memory, vec![own.as_fd().try_clone_to_owned().unwrap()]);
    world.settle();
    assert!(world.answers.is_empty(), "it waits: {:?}", world.answers);
    world.session.handle(Event::ClientGone { client: ClientId(3) });
    world.session.returned(unmap.run());
    world.settle();
    let added = (caller(2, 1), Answer::RegionAdded { region: RegionId(2), mapped: PAGES * PAGE });
    assert_eq!(world.take_answers(), [added]);
    assert!(world.session.may_convert(pages(0, PAGES)).is_ok(), "it is the only one who maps it");
}

#[test]
fn end_is_answered_once_all_of_its_maps_are_made() {
    let mut world = World::with_region(false);
    let ranges = Ranges::try_from(vec![pages(0, 1), pages(3, 1), pages(6, 1)]).unwrap();
    let (to, performer, deadline_ns) = (PageState::Private, Performer::Client, DEADLINE.as_nanos() as u64);
    world.session.handle(Event::Begin { caller: caller(1, 2), ranges, to, performer, deadline_ns });
    world.settle();
    assert_eq!(world.verdicts(), [Verdict::Done]);
    let (invalidation, outcome) = (InvalidationId(1), Outcome::NotCommitted);
    world.session.handle(Event::End { caller: caller(1, 3), invalidation, outcome });
    let maps: Vec<Call> = std::iter::from_fn(|| world.call()).collect();
    assert_eq!(maps.len(), 3, "{maps:?}");
    for map in maps {
        assert!(world.answers.is_empty(), "something of it is not mapped yet");
        world.session.returned(map.run());
        assert!(world.call().is_none());
    }
    assert_eq!(world.take_answers(), [(caller(1, 3), Answer::Ended { invalidation })]);
    assert_eq!(world.sim.mapping_count(), PAGES);
}

#[test]
fn end_of_a_long_range_is_answered_once_its_last_part_is_mapped() {
    let mut world = World::with_region(false);
    world.session.set_call_limits(CallLimits { call_bytes: 2 * PAGE, close_calls: 1 });
    world.begin(pages(0, PAGES), PageState::Private, Performer::Client);
    world.settle();
    assert_eq!(world.verdicts(), [Verdict::Done]);
    let (invalidation, outcome) = (InvalidationId(1), Outcome::NotCommitted);
    world.session.handle(Event::End { caller: caller(1, 3), invalidation, outcome });
    let mut calls = 0;
    while let Some(map) = world.call() {
        assert!(world.answers.is_empty(), "something of it is not mapped yet");
        world.session.returned(map.run());
        calls += 1;
    }
    assert_eq!(calls, PAGES / 2);
    assert_eq!(world.take_answers(), [(caller(1, 3), Answer::Ended { invalidation })]);
    assert_eq!(world.sim.mapping_count(), PAGES);
}

#[test]
fn removal_that_takes_longer_than_its_deadline_succeeds_if_it_progresses() {
    let mut world = World::new(false);
    world.session.set_call_limits(CallLimits { call_bytes: PAGE, close_calls: 1 });
    let memory = AddMemory { piece: PAGE, ..AddMemory::shared(0, PAGES * PAGE) };
    world.session.add_memory(caller(1, 1), memory, vec![world.fd()]);
    world.settle();
    let [(_, Answer::RegionAdded { region, .. })] = world.take_answers()[..] else {
        panic!("{:?}", world.refused)
    };
    world.session.handle(Event::RemoveRegion { caller: caller(1, 2), region });
    let deadline = Duration::from_nanos(Policy::default().close_deadline_ns);
    let started = world.clock.now();
    let mut calls = std::collections::VecDeque::from_iter(world.call());
    while let Some(call) = calls.pop_front() {
        world.advance(deadline / 2);
        // The loop looks at the alarms after every step, and some are set for a time that has passed.
        for _ in Rung::LADDER {
            calls.extend(world.call());
            world.advance(Duration::ZERO);
        }
        assert!(calls.len() <= 1, "the rest is asked for: the close is given up");
        world.session.returned(call.run());
        calls.extend(world.call());
    }
    assert!(world.clock.now() - started > deadline * 2);
    assert!(matches!(world.take_answers()[..], [(_, Answer::RegionRemoved { .. })]));
    assert!(world.session.snapshot().quarantine.is_empty());
}

#[test]
fn split_mapping_is_merged_each_time_it_has_been_quiet() {
    let mut world = World::new(false);
    let memory = AddMemory { piece: PAGES * PAGE, ..AddMemory::shared(0, PAGES * PAGE) };
    world.session.add_memory(caller(1, 1), memory, vec![world.fd()]);
    world.settle();
    for round in 1..=3 {
        assert_eq!(world.sim.mapping_count(), 1, "round {round}");
        world.take_answers();
        world.begin(pages(2, 1), PageState::Private, Performer::Client);
        world.settle();
        let invalidation = match world.take_answers()[..] {
            [(_, Answer::Verdict { invalidation, verdict: Verdict::Done })] => invalidation,
            ref other => panic!("round {round}: {other:?}"),
        };
        let outcome = Outcome::NotCommitted;
        world.session.handle(Event::End { caller: caller(1, 3), invalidation, outcome });
        world.settle();
        assert_eq!(world.sim.mapping_count(), 3, "round {round}");
        // The first interval counts only in part, so the mapping is merged after the second.
        for _ in 0..3 {
            world.advance(QUIET_INTERVAL);
            world.settle();
        }
    }
    assert_eq!(world.sim.mapping_count(), 1);
}

#[test]
fn files_of_refused_memory_are_removed_from_the_store_unless_a_region_needs_them() {
    let mut world = World::with_region(false);
    let (store, removed) = FdStore::detached();
    world.session.storage.set_fd_store(store);
    let other = GuestFile::memfd("refused", PAGES * PAGE).unwrap();
    let found = passgate_bindings::identity::identify(&other).unwrap();
    let id = FileId { device: found.device, inode: found.inode };
    let fd = || other.as_fd().try_clone_to_owned().unwrap();
    let beyond = AddMemory { offset: PAGES * PAGE, ..AddMemory::shared(1 << 30, PAGE) };
    // The private side is no guest_memfd.
    let with_private = AddMemory { private: true, ..AddMemory::shared(1 << 30, PAGE) };
    let of_region = world.fd();
    for (memory, fds, names) in [
        (&beyond, vec![fd()], vec![Name::Memory(id)]),
        (&with_private, vec![fd(), fd()], vec![Name::Memory(id), Name::Private(id)]),
        (&beyond, vec![of_region], vec![]),
    ] {
        world.session.add_memory(caller(2, 1), memory.clone(), fds);
        world.settle();
        assert_eq!(world.refused.drain(..).count(), 1, "{memory:?}");
        assert_eq!(removed.try_iter().collect::<Vec<_>>(), names, "{memory:?}");
    }
}

/// Puts `count` separate pages into quarantine because their unmaps do not return, by one begin or by one for each page, and
/// then has the unmaps return one by one. Returns the bytes that are written to `quarantine.json` in each of the two phases.
fn bytes_written(count: u64, by_one_begin: bool) -> [u64; 2] {
    let dir = tempfile::tempdir().unwrap();
    let options = StateOptions { audit_segment: 1 << 20, ..StateOptions::at(dir.path()) };
    let records = Records::open(&options, Policy::default(), "sim", Vec::new(), false).unwrap();
    let mut world = World::with(false, 2 * count, Some(records), None);
    let memory = AddMemory { piece: PAGE, ..AddMemory::shared(0, 2 * count * PAGE) };
    world.session.add_memory(caller(1, 1), memory, vec![world.fd()]);
    world.settle();
    assert!(matches!(world.take_answers()[..], [(_, Answer::RegionAdded { .. })]), "{:?}", world.refused);
    let separate: Vec<_> = (0..count).map(|nth| pages(2 * nth, 1)).collect();
    if by_one_begin {
        let (ranges, deadline_ns) = (Ranges::try_from(separate).unwrap(), DEADLINE.as_nanos() as u64);
        let (to, performer) = (PageState::Private, Performer::Client);
        world.session.handle(Event::Begin { caller: caller(1, 2), ranges, to, performer, deadline_ns });
    } else {
        separate.into_iter().for_each(|page| world.begin(page, PageState::Private, Performer::Client));
    }
    let hanging: Vec<_> = std::iter::from_fn(|| world.call()).collect();
    assert_eq!(hanging.len() as u64, count, "{:?}", world.answers);
    let before = WRITTEN_BYTES.get();
    for _ in 0..Rung::LADDER.len() {
        world.advance(DEADLINE / 7 + Duration::from_nanos(1));
        assert!(world.call().is_none());
    }
    assert!(world.verdicts().iter().all(|verdict| matches!(verdict, Verdict::Unknown { .. })));
    assert_eq!(world.session.snapshot().quarantine.len() as u64, count);
    let between = WRITTEN_BYTES.get();
    for call in hanging {
        world.session.returned(call.run());
        world.settle();
    }
    assert_eq!(world.session.snapshot().quarantine, []);
    [between - before, WRITTEN_BYTES.get() - between]
}

#[test]
fn quarantine_file_is_written_in_proportion_to_what_changes() {
    for by_one_begin in [true, false] {
        let [few, many] = [64, 512].map(|count| bytes_written(count, by_one_begin));
        for (few, many) in few.into_iter().zip(many) {
            assert!(many < 16 * few, "one begin: {by_one_begin}: {few} bytes for 64 ranges, {many} for 512");
        }
    }
}

#[test]
fn operations_that_end_before_their_unmap_returns_are_reported_after_it() {
    for ends_first in [false, true] {
        let mut world = World::with_region(false);
        let _device = world.sim.device("sim:0", Steps::all(), passgate_backends::DeviceTraits::default());
        world.begin(pages(4, 1), PageState::Private, Performer::Client);
        world.sim.fail_next(sim::Call::Unmap, Fault::Late);
        let returned = world.call().unwrap().run();
        if ends_first {
            world.sim.flush();
            world.session.poll_domains();
        }
        world.session.returned(returned);
        world.sim.flush();
        world.session.poll_domains();
        world.settle();
        assert_eq!(world.verdicts(), [Verdict::Done], "the operation ends first: {ends_first}");
    }
}
