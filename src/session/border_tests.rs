//! The border between gate and session: every effect that asks for a call has a result, in time, whatever happened since
//! the gate asked for it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate_backends::iommu::sim::{self, Fault, FaultPlan, Memory, Sim};
use passgate_backends::{Capabilities, StopClass};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use rustix::io::Errno;

use super::fdstore::{FdStore, Name};
use super::*;
use crate::gate::{Cause, ClientId, Door, PageState, Performer, Ranges, Refusal, RegionId};
use crate::observe::keep::tests::WRITTEN;
use crate::observe::records::StateOptions;
use crate::protocol::verbs::State;

const PAGES: u64 = 8;
const DEADLINE: Duration = Duration::from_millis(10);

/// A clock that stands still unless it is told to go on.
#[derive(Debug)]
struct Stopped(Mutex<Instant>);

impl Stopped {
    fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

impl Clock for Stopped {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }
}

struct World {
    session: Session,
    sim: Sim,
    clock: Arc<Stopped>,
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
    /// A domain without a device, and a file that is in no region yet.
    fn new(counts_partial: bool) -> Self {
        Self::with(counts_partial, PAGES, None, None)
    }

    fn with(counts_partial: bool, pages: u64, records: Option<Records>, hold: Option<Hold>) -> Self {
        let capabilities = Capabilities { counts_partial, tickets: !counts_partial, ..Sim::CAPABILITIES };
        let sim = Sim::new(capabilities, Memory::new()).unwrap();
        let clock = Arc::new(Stopped(Mutex::new(Instant::now())));
        let domain = Arc::new(sim.clone());
        let session =
            Session::new(Policy::default(), domain, vec![], Trust::default(), clock.clone(), records, hold);
        let file = GuestFile::memfd("border", pages * PAGE).unwrap();
        Self { session, sim, clock, file, answers: vec![], notices: vec![], refused: vec![] }
    }

    /// A session that outlives its process, and the names that it has the service manager keep no longer.
    fn kept() -> (Self, Receiver<Name>) {
        let (store, removed) = FdStore::detached();
        let hold = Hold { store, lasting: Lasting::new().unwrap(), left: None, quarantine: None };
        (Self::with(false, PAGES, None, Some(hold)), removed)
    }

    /// The same, with the file at address 0 as client 1's.
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

    /// The next call; everything before it is done.
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

    fn pass(&mut self, time: Duration) {
        self.clock.pass(time);
        self.session.expire(self.clock.now());
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

/// The same file in one inbox: its last region is gone, and a new one of it comes before the session has let go of it.
#[test]
fn a_file_that_is_added_again_before_it_is_let_go_of_is_mapped_and_answered() {
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
    // Nor is a page passed over that passgate converts.
    world.file.store(0, 7).unwrap();
    let (ranges, deadline_ns) = (pages(100, 1).into(), 1 << 40);
    let (to, performer) = (PageState::Hole, Performer::Passgate);
    world.session.handle(Event::Begin { caller: caller(2, 3), ranges, to, performer, deadline_ns });
    world.settle();
    assert_eq!(world.verdicts(), [Verdict::Done]);
    assert_eq!(world.file.load(0).unwrap(), 0);
    // And it goes with its last region.
    world.session.handle(Event::RemoveRegion { caller: caller(2, 4), region: RegionId(2) });
    world.settle();
    assert!(world.session.files.get(world.file_id()).is_none());
}

#[test]
fn a_convert_whose_file_is_not_held_is_refused_and_not_done() {
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
fn a_map_whose_file_is_not_held_fails_and_is_told() {
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

/// A service manager that takes its time: the file's last region goes after the file was put, and before its new one is added.
#[test]
fn file_that_is_being_added_stays_with_the_service_manager_when_its_last_region_goes() {
    let (mut world, removed) = World::kept();
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
    // Not for ever.
    world.session.handle(Event::RemoveRegion { caller: caller(2, 3), region: RegionId(2) });
    world.settle();
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), [Name::Memory(world.file_id())]);
}

#[test]
fn file_that_is_refused_or_unwanted_after_its_last_region_went_is_kept_no_longer() {
    for unwanted in [false, true] {
        let (mut world, removed) = World::kept();
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

/// Its file was put, and nobody adds it any more.
#[test]
fn file_of_a_client_that_died_while_it_was_examined_is_kept_no_longer() {
    let (mut world, removed) = World::kept();
    world.add(2, 0);
    let Returned::Examined { files, .. } = world.call().unwrap().run() else { panic!("it was examined") };
    world.session.handle(Event::ClientGone { client: ClientId(2) });
    world.settle();
    world.session.unwanted(files);
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), [Name::Memory(world.file_id())]);
    // Another's region of the same file needs it.
    world.add(1, 0);
    world.settle();
    world.add(2, 100);
    let Returned::Examined { files, .. } = world.call().unwrap().run() else { panic!("it was examined") };
    world.session.unwanted(files);
    assert_eq!(removed.try_iter().collect::<Vec<_>>(), []);
}

/// Whoever asked for it and went away leaves nothing open.
#[test]
fn a_file_of_a_refused_region_is_let_go_of_although_its_client_is_gone() {
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
    assert!(world.session.files.get(id).is_none(), "it is held for nobody");
}

#[test]
fn a_convert_is_answered_within_its_deadline_although_its_map_hangs() {
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
    world.pass(until - begun);
    assert!(world.call().is_none());
    assert_eq!(world.verdicts(), [Verdict::Done]);
    world.session.returned(map.run());
    world.settle();
    assert_eq!(world.verdicts(), []);

    // An end waits no longer than its begin would have.
    world.begin(pages(0, 1), PageState::Private, Performer::Client);
    world.settle();
    world.take_answers();
    world.session.handle(end(InvalidationId(3), Outcome::NotCommitted));
    let map = world.call().unwrap();
    assert!(world.call().is_none() && world.answers.is_empty(), "it waits for the map");
    world.pass(DEADLINE);
    assert!(world.call().is_none());
    assert!(matches!(world.take_answers()[..], [(_, Answer::Ended { .. })]));
    world.session.returned(map.run());
    world.settle();
    assert!(world.session.held.is_empty());
}

fn burst(world: &mut World) -> Vec<Verdict> {
    for page in 0..PAGES {
        world.begin(pages(page, 1), PageState::Private, Performer::Client);
    }
    world.settle();
    world.verdicts()
}

#[test]
fn a_joined_unmap_that_fails_half_way_spoils_none_of_its_requests() {
    for counts in [true, false] {
        let mut world = World::with_region(counts);
        world.sim.fail_next(sim::Call::Unmap, Fault::HalfUnmapped(Errno::BUSY));
        if !counts {
            // What does not count is not joined: a call for one page fails whole.
            world.sim.fail_next(sim::Call::Unmap, Fault::Errno(Errno::BUSY));
        }
        assert_eq!(burst(&mut world), [Verdict::Done; PAGES as usize], "counts: {counts}");
        assert_eq!((world.sim.mapping_count(), world.session.snapshot().quarantine.len()), (0, 0));
    }
}

#[test]
fn of_a_joined_unmap_only_the_request_that_fails_by_itself_is_refused() {
    let mut world = World::with_region(true);
    // The joined call takes away half; then each is tried by itself, and page 4 fails, and fails again.
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

/// A short success says nothing of the order: what is not accounted for stays in doubt.
#[test]
fn of_a_joined_unmap_that_falls_short_only_what_is_accounted_for_is_done() {
    let mut world = World::with_region(true);
    world.sim.fail_next(sim::Call::Unmap, Fault::Short);
    let verdicts = burst(&mut world);
    let done = verdicts.iter().filter(|verdict| **verdict == Verdict::Done).count();
    assert_eq!((done, verdicts.len()), (4, 8), "{verdicts:?}");
}

/// Nobody knows how much of it was mapped: an unmap that succeeds says that nothing is.
#[test]
fn a_map_that_is_left_half_made_is_gone_by_the_next_unmap_that_succeeds() {
    // The map fails half-way, and so may the unmap that closes the region.
    for failures in 0..2 {
        let mut world = World::new(true);
        let plan = FaultPlan::new().at(sim::Call::Map, 1, Fault::HalfMapped(Errno::BUSY));
        let fails = |plan: FaultPlan, nth| plan.at(sim::Call::Unmap, nth, Fault::Errno(Errno::BUSY));
        world.sim.plan((1..=failures).fold(plan, fails));
        world.add(1, 0);
        world.settle();
        while world.answers.is_empty() {
            let next = world.session.next_deadline().expect("somebody waits");
            world.pass(next - world.clock.now());
            world.settle();
        }
        let answers = world.take_answers();
        let [(_, Answer::Refused(Refusal::HalfMapped { errno } | Refusal::MapFailed { errno }))] =
            answers[..]
        else {
            panic!("{failures} failures: {answers:?}")
        };
        assert_eq!(errno, Errno::BUSY.raw_os_error());
        let left = |world: &World| {
            let snapshot = world.session.snapshot();
            (snapshot.quarantine.len(), snapshot.regions.len(), world.sim.mapping_count() > 0)
        };
        let stuck = failures == 1;
        assert_eq!(left(&world), (usize::from(stuck), usize::from(stuck), stuck), "{failures} failures");
        world.session.handle(Event::ClientGone { client: ClientId(1) });
        world.settle();
        assert_eq!(left(&world), (0, 0, false), "{failures} failures");
    }
}

#[test]
fn a_region_waits_for_the_one_in_its_way_to_be_closed() {
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
    // One that is there is waited for in no case.
    world.add(3, 0);
    world.settle();
    assert!(matches!(world.take_answers()[..], [(_, Answer::Refused(Refusal::Overlaps { .. }))]));
}

/// Whoever has the file next says what the states of its pages are, and not what is being closed.
#[test]
fn region_waits_for_those_of_the_last_owner_that_show_its_pages_elsewhere() {
    for hangs in [false, true] {
        let mut world = World::with_region(false);
        world.session.handle(Event::ClientGone { client: ClientId(1) });
        let unmap = world.call().unwrap();
        let memory = AddMemory { initial: State::Private, ..AddMemory::shared(64 * PAGE, PAGES * PAGE) };
        world.session.add_memory(caller(2, 1), memory, vec![world.fd()]);
        world.settle();
        assert!(world.answers.is_empty(), "{:?}", world.answers);
        if hangs {
            world.pass(CLOSE_WAIT);
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
fn a_region_is_refused_in_time_where_the_one_in_its_way_cannot_be_closed() {
    let mut world = World::with_region(false);
    world.session.handle(Event::ClientGone { client: ClientId(1) });
    let _hangs = world.call().unwrap();
    world.add(2, 0);
    world.add(3, 0);
    world.settle();
    // Who gives up waits no more, and leaves nothing.
    world.session.handle(Event::ClientGone { client: ClientId(3) });
    let start = world.clock.now();
    while world.answers.is_empty() {
        let next = world.session.next_deadline().expect("somebody waits");
        world.pass(next - world.clock.now());
        world.settle();
    }
    assert!(world.clock.now() - start <= CLOSE_WAIT);
    let answers = world.take_answers();
    assert!(matches!(answers[..], [(_, Answer::Refused(Refusal::Overlaps { .. }))]), "{answers:?}");
    assert!(world.session.waiting.is_empty());
}

#[test]
fn what_a_client_is_adding_outlives_another_that_goes() {
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
fn an_end_is_answered_once_all_of_its_maps_are_made() {
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
fn what_was_split_is_one_mapping_again_each_time_it_has_been_quiet() {
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
        // The first moment is cut short, and after the second it is quiet.
        for _ in 0..3 {
            world.pass(MOMENT);
            world.settle();
        }
    }
    assert_eq!(world.sim.mapping_count(), 1);
}

#[test]
fn files_of_refused_memory_are_kept_no_longer_and_those_of_a_region_are() {
    let mut world = World::with_region(false);
    let (store, removed) = FdStore::detached();
    world.session.store = Some(store);
    let other = GuestFile::memfd("refused", PAGES * PAGE).unwrap();
    let found = passgate_bindings::identity::identify(&other).unwrap();
    let id = FileId { device: found.device, inode: found.inode };
    let fd = || other.as_fd().try_clone_to_owned().unwrap();
    let beyond = AddMemory { offset: PAGES * PAGE, ..AddMemory::shared(1 << 30, PAGE) };
    // Its second file is no guest_memfd.
    let twofold = AddMemory { private: true, ..AddMemory::shared(1 << 30, PAGE) };
    let of_region = world.fd();
    for (memory, fds, names) in [
        (&beyond, vec![fd()], vec![Name::Memory(id)]),
        (&twofold, vec![fd(), fd()], vec![Name::Memory(id), Name::Private(id)]),
        (&beyond, vec![of_region], vec![]),
    ] {
        world.session.add_memory(caller(2, 1), memory.clone(), fds);
        world.settle();
        assert_eq!(world.refused.drain(..).count(), 1, "{memory:?}");
        assert_eq!(removed.try_iter().collect::<Vec<_>>(), names, "{memory:?}");
    }
}

/// Puts `count` pages apart into quarantine because their unmaps do not return, by one begin or by one for each page,
/// and lets these return one by one. Returns the bytes written to `quarantine.json` until all are there, and after.
fn bytes_written(count: u64, by_one_begin: bool) -> [u64; 2] {
    let dir = tempfile::tempdir().unwrap();
    let options = StateOptions { audit_segment: 1 << 20, ..StateOptions::at(dir.path()) };
    let records = Records::open(&options, Policy::default(), "sim", Vec::new(), false).unwrap();
    let mut world = World::with(false, 2 * count, Some(records), None);
    let memory = AddMemory { piece: PAGE, ..AddMemory::shared(0, 2 * count * PAGE) };
    world.session.add_memory(caller(1, 1), memory, vec![world.fd()]);
    world.settle();
    assert!(matches!(world.take_answers()[..], [(_, Answer::RegionAdded { .. })]), "{:?}", world.refused);
    let apart: Vec<_> = (0..count).map(|nth| pages(2 * nth, 1)).collect();
    if by_one_begin {
        let (ranges, deadline_ns) = (Ranges::try_from(apart).unwrap(), DEADLINE.as_nanos() as u64);
        let (to, performer) = (PageState::Private, Performer::Client);
        world.session.handle(Event::Begin { caller: caller(1, 2), ranges, to, performer, deadline_ns });
    } else {
        apart.into_iter().for_each(|page| world.begin(page, PageState::Private, Performer::Client));
    }
    let hanging: Vec<_> = std::iter::from_fn(|| world.call()).collect();
    assert_eq!(hanging.len() as u64, count, "{:?}", world.answers);
    let before = WRITTEN.get();
    for _ in 0..Step::LADDER.len() {
        world.pass(DEADLINE / 7 + Duration::from_nanos(1));
        assert!(world.call().is_none());
    }
    assert!(world.verdicts().iter().all(|verdict| matches!(verdict, Verdict::Unknown { .. })));
    assert_eq!(world.session.snapshot().quarantine.len() as u64, count);
    let between = WRITTEN.get();
    for call in hanging {
        world.session.returned(call.run());
        world.settle();
    }
    assert_eq!(world.session.snapshot().quarantine, []);
    [between - before, WRITTEN.get() - between]
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
fn operations_that_end_before_their_unmap_has_returned_end_after_it() {
    for ends_first in [false, true] {
        let mut world = World::with_region(false);
        let _device = world.sim.device("sim:0", StopClass::all(), passgate_backends::Nature::default());
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
