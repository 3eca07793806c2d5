//! The records state what is so, whenever the process ends.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use passgate_bindings::PAGE;
use passgate_bindings::words;

use super::*;
use crate::gate::{
    Answer, Backing, Caller, Cause, ClientId, DeviceId, DeviceTraits, DomainCaps, Door, Effects, OnStuckDma,
    Outcome, PageState, Performer, Policy, Ranges, Reason, RegionSpec, Rung, Step, Steps, UnmapResult,
    Verdict,
};

thread_local! {
    /// The number of times that the records of all conversions without an end were compared with the gate's.
    pub(super) static UNENDED_COMPARISONS: Cell<u64> = const { Cell::new(0) };
}

const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
const FILE: FileId = FileId { device: 1, inode: 1 };
const DEVICE: DeviceId = DeviceId(3);

fn pages<A: passgate_bindings::units::Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

/// A gate and its records.
struct World {
    gate: Gate,
    persistent: PersistentState,
    /// The result of an unmap of this many bytes.
    unmap: fn(u64) -> UnmapResult,
    /// True if no fence returns.
    hangs: bool,
    answers: Vec<Answer>,
}

impl World {
    /// Sixteen pages, mapped one by one, and a device that can be drained.
    fn new() -> Self {
        let persistent = PersistentState::new().unwrap();
        persistent.complete(DomainIds::Type1 { entries: 65_535 }, &[]);
        let policy = Policy { on_stuck_dma: OnStuckDma::Fence, ..Policy::default() };
        let mut gate = Gate::new(policy, words::private);
        gate.use_store(persistent.store().clone());
        let gone = |bytes| UnmapResult::Gone { bytes };
        let mut world = Self { gate, persistent, unmap: gone, hangs: false, answers: Vec::new() };
        let caps = DomainCaps::new(1000, 1 << 30);
        let (steps, traits) = (Steps::of(&[Step::Drain]), DeviceTraits::default());
        world.handle(Event::DomainAdded { domain: DOMAIN, caps });
        world.handle(Event::DeviceAdded { device: DEVICE, domain: DOMAIN, steps, traits });
        let backing = Backing { file: FILE, offset: Offset(0) };
        let (gpa, initial) = (pages(0, 16), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        world.handle(Event::AddRegion { caller: CALLER, spec });
        world
    }

    /// Passes an event to the gate, and then the results of the calls that it asks for.
    fn handle(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let (touched, mut effects) = (PersistentState::touched(&event), Effects::new());
            self.gate.handle(event, &mut effects);
            self.persistent.record_changes(touched, &self.gate, &effects);
            for effect in effects {
                match effect {
                    Effect::Map { job, .. } => {
                        events.push(Event::Mapped { job, result: MapResult::Mapped });
                    }
                    Effect::Unmap { job, iova, bytes, .. } => {
                        let bytes = bytes.unwrap_or(iova.len());
                        events.push(Event::Unmapped { job, result: (self.unmap)(bytes), took_ns: 1 });
                    }
                    Effect::Fence { job, .. } if !self.hangs => {
                        events.push(Event::Fenced { job, errno: 0, took_ns: 1 });
                    }
                    Effect::Attach { job, .. } => events.push(Event::Attached { job, errno: 0 }),
                    Effect::Answer { answer, .. } => self.answers.push(answer),
                    _ => {}
                }
            }
        }
    }

    fn begin(&mut self, ranges: Ranges) -> InvalidationId {
        let (to, performer) = (PageState::Private, Performer::Client);
        self.handle(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 });
        InvalidationId(self.gate.last().1)
    }

    /// Ends the process. Returns the records that the next one finds.
    fn end(self) -> (PersistentState, EarlierState) {
        let fd: OwnedFd = self.persistent.fd().unwrap().try_clone_to_owned().unwrap();
        drop((self.gate, self.persistent));
        PersistentState::open(fd).unwrap()
    }
}

#[test]
fn device_is_recorded_as_stopped_before_its_fence() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    world.hangs = true;
    world.begin(pages(2, 1).into());
    assert_eq!(world.answers.len(), 1, "the fence is in progress, and the begin is not answered");
    assert_eq!(world.end().1.past.stopped, [DEVICE]);
}

#[test]
fn no_exclusion_of_an_ended_batch_is_recorded() {
    let mut world = World::new();
    let ranges = Ranges::try_from(vec![pages(2, 1), pages(5, 2), pages(9, 1)]).unwrap();
    let invalidation = world.begin(ranges);
    let open = PersistentState::open(world.persistent.fd().unwrap().try_clone_to_owned().unwrap()).unwrap().1;
    assert_eq!(open.past.exclusions.len(), 3);
    world.handle(Event::End { caller: CALLER, invalidation, outcome: Outcome::Committed });
    assert_eq!(world.end().1.past.exclusions, []);
}

#[test]
fn quarantine_lifted_by_proof_is_not_recorded() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    world.begin(pages(2, 1).into());
    assert!(matches!(world.answers.last(), Some(Answer::Verdict { verdict: Verdict::Refused { .. }, .. })));
    assert_eq!(world.gate.snapshot().quarantine.len(), 1);
    world.unmap = |bytes| UnmapResult::Gone { bytes };
    let region = RegionId(world.gate.last().0);
    world.handle(Event::RemoveRegion { caller: CALLER, region });
    assert_eq!(world.gate.snapshot().quarantine, []);
    let (_, left) = world.end();
    assert_eq!((left.past.exclusions, left.past.regions), (Vec::new(), Vec::new()));
}

#[test]
fn only_the_failed_part_of_a_conversion_is_recorded_as_quarantine() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    let first = world.begin(pages(3, 1).into());
    // The mapping stays in doubt, so that the next begin unmaps this page by a call of its own.
    world.handle(Event::Release { caller: CALLER, invalidation: first, to: PageState::Shared });
    assert_eq!(world.gate.snapshot().quarantine, []);
    world.unmap = |bytes| match bytes {
        PAGE => UnmapResult::Failed { errno: 16, bytes: 0 },
        bytes => UnmapResult::Gone { bytes },
    };
    let second = world.begin(pages(1, 5).into());
    assert!(matches!(world.answers.last(), Some(Answer::Verdict { verdict: Verdict::Refused { .. }, .. })));
    let (_, left) = world.end();
    let [(FILE, excluded, ExcludedBy::Quarantine(since, _))] = left.past.exclusions[..] else {
        panic!("{:?}", left.past.exclusions)
    };
    assert_eq!((excluded, since), (pages(3, 1), second));
}

#[test]
fn overflowed_ledger_is_not_resumed_from() {
    let world = World::new();
    let fd = world.persistent.fd().unwrap().try_clone_to_owned().unwrap();
    world.persistent.mark_overflowed();
    assert!(matches!(PersistentState::open(fd), Err(LoadError::Overflowed)));
}

#[test]
fn open_conversion_is_read_before_a_quarantine_of_the_same_range() {
    let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 16 };
    let (open, lifted) =
        (ExcludedBy::Open(InvalidationId(1)), ExcludedBy::Quarantine(InvalidationId(1), reason));
    for order in [[open, lifted], [lifted, open]] {
        let mut world = World::new();
        world.begin(pages(9, 1).into());
        for by in order {
            world.persistent.exclusion_slots.put(record::encode_exclusion(FILE, pages(2, 1), by)).unwrap();
        }
        let (_, left) = world.end();
        let over = left.past.exclusions.iter().filter(|(_, range, _)| *range == pages(2, 1));
        assert_eq!(over.map(|(.., by)| *by).collect::<Vec<_>>(), [open, lifted]);
    }
}

#[test]
fn region_with_two_records_is_closing_if_either_says_so() {
    for order in [[true, false], [false, true]] {
        let mut world = World::new();
        let written = world.gate.written().next().unwrap();
        let (slot, _) = world.persistent.region_records[&written.region];
        world.persistent.region_slots.clear(slot);
        for closing in order {
            let record = record::encode_region(&RegionRecord { closing, ..written });
            world.persistent.region_slots.put(record).unwrap();
        }
        let (persistent, left) = world.end();
        assert_eq!(left.past.regions, [RegionRecord { closing: true, ..written }]);
        let (_, found) = Slots::open(persistent.store(), REGIONS_KIND);
        assert_eq!(found.len(), 1, "the other record is cleared");
    }
}

#[test]
fn restart_leaves_one_record_for_each_exclusion() {
    let mut world = World::new();
    let invalidation = world.begin(pages(2, 1).into());
    world.handle(Event::End {
        caller: CALLER,
        invalidation,
        outcome: Outcome::Unknown { errno: 5, offset: 0 },
    });
    world.begin(pages(4, 2).into());
    let (mut persistent, mut left) = world.end();
    for _ in 0..3 {
        assert_eq!(left.past.exclusions.len(), 2);
        let mut gate = Gate::new(Policy::default(), words::private);
        gate.use_store(persistent.store().clone());
        let (mut effects, domain) = (Effects::new(), DOMAIN);
        let caps = DomainCaps::new(1000, 1 << 30);
        gate.handle(Event::DomainAdded { domain, caps }, &mut effects);
        gate.resume(left.past, &mut effects);
        persistent.record_all(&gate, &effects);
        let fd: OwnedFd = persistent.fd().unwrap().try_clone_to_owned().unwrap();
        drop((gate, persistent));
        (persistent, left) = PersistentState::open(fd).unwrap();
    }
}

#[test]
fn records_of_unended_conversions_are_compared_only_if_one_may_be_settled() {
    let mut world = World::new();
    let unended = world.begin(pages(2, 1).into());
    let unmap = world.unmap;
    let (mut persistent, left) = world.end();
    let mut gate = Gate::new(Policy::default(), words::private);
    gate.use_store(persistent.store().clone());
    let (mut effects, domain) = (Effects::new(), DOMAIN);
    let caps = DomainCaps::new(1000, 1 << 30);
    gate.handle(Event::DomainAdded { domain, caps }, &mut effects);
    gate.resume(left.past, &mut effects);
    persistent.record_all(&gate, &effects);
    let mut world = World { gate, persistent, unmap, hangs: false, answers: Vec::new() };
    let before = UNENDED_COMPARISONS.get();
    let invalidation = world.begin(pages(4, 1).into());
    world.handle(Event::End { caller: CALLER, invalidation, outcome: Outcome::Committed });
    assert_eq!(UNENDED_COMPARISONS.get(), before);
    world.handle(Event::Release { caller: CALLER, invalidation: unended, to: PageState::Shared });
    let (_, left) = world.end();
    assert_eq!((left.past.unended, left.past.exclusions), (Vec::new(), Vec::new()));
}
