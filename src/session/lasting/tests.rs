//! What the records say at every moment in which the process may end.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use passgate_bindings::PAGE;

use super::*;
use crate::gate::{
    Able, Answer, Backing, Caller, Cause, ClientId, DeviceId, Door, Effects, Nature, OnStuckDma, Outcome,
    PageState, Performer, Policy, Ranges, Reason, RegionSpec, Step, Steps, UnmapResult, Verdict,
};

thread_local! {
    /// How often all conversions without an end were gone through.
    pub(super) static REBUILT: Cell<u64> = const { Cell::new(0) };
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
    lasting: Lasting,
    /// The results of unmaps.
    unmap: fn(u64) -> UnmapResult,
    /// True where no fence returns.
    hangs: bool,
    answers: Vec<Answer>,
}

impl World {
    /// Sixteen pages, mapped one by one, and a device that can be drained.
    fn new() -> Self {
        let lasting = Lasting::new().unwrap();
        lasting.complete(Ids::Type1 { entries: 65_535 }, &[]);
        let policy = Policy { on_stuck_dma: OnStuckDma::Fence, ..Policy::default() };
        let mut gate = Gate::new(policy);
        gate.keep_in(lasting.store().clone());
        let gone = |bytes| UnmapResult::Gone { bytes };
        let mut world = Self { gate, lasting, unmap: gone, hangs: false, answers: Vec::new() };
        let able = Able { max_mappings: 1000, max_piece: 1 << 30, cut: false, replace: false };
        let (steps, nature) = (Steps::of(&[Step::Drain]), Nature::default());
        world.tell(Event::DomainAdded { domain: DOMAIN, able });
        world.tell(Event::DeviceAdded { device: DEVICE, domain: DOMAIN, steps, nature });
        let backing = Backing { file: FILE, offset: Offset(0) };
        let (gpa, initial) = (pages(0, 16), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        world.tell(Event::AddRegion { caller: CALLER, spec });
        world
    }

    /// Tells the gate of an event, and of the results of the calls that follow.
    fn tell(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let (touched, mut effects) = (Lasting::touched(&event), Effects::new());
            self.gate.handle(event, &mut effects);
            self.lasting.follow(touched, &self.gate, &effects);
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
        self.tell(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 });
        InvalidationId(self.gate.last().1)
    }

    /// What the next process finds.
    fn end(self) -> (Lasting, Left) {
        let fd: OwnedFd = self.lasting.fd().unwrap().try_clone_to_owned().unwrap();
        drop((self.gate, self.lasting));
        Lasting::open(fd).unwrap()
    }
}

#[test]
fn a_device_is_written_down_as_stopped_before_it_is() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    world.hangs = true;
    world.begin(pages(2, 1).into());
    assert_eq!(world.answers.len(), 1, "the fence is under way, and the begin is not answered");
    assert_eq!(world.end().1.past.stopped, [DEVICE]);
}

#[test]
fn of_a_batch_that_has_ended_no_range_is_held() {
    let mut world = World::new();
    let ranges = Ranges::try_from(vec![pages(2, 1), pages(5, 2), pages(9, 1)]).unwrap();
    let invalidation = world.begin(ranges);
    let open = Lasting::open(world.lasting.fd().unwrap().try_clone_to_owned().unwrap()).unwrap().1;
    assert_eq!(open.past.holds.len(), 3);
    world.tell(Event::End { caller: CALLER, invalidation, outcome: Outcome::Committed });
    assert_eq!(world.end().1.past.holds, []);
}

#[test]
fn a_quarantine_that_a_proof_has_lifted_is_in_no_record() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    world.begin(pages(2, 1).into());
    assert!(matches!(world.answers.last(), Some(Answer::Verdict { verdict: Verdict::Refused { .. }, .. })));
    assert_eq!(world.gate.snapshot().quarantine.len(), 1);
    world.unmap = |bytes| UnmapResult::Gone { bytes };
    let region = RegionId(world.gate.last().0);
    world.tell(Event::RemoveRegion { caller: CALLER, region });
    assert_eq!(world.gate.snapshot().quarantine, []);
    let (_, left) = world.end();
    assert_eq!((left.past.holds, left.past.regions), (Vec::new(), Vec::new()));
}

#[test]
fn of_a_conversion_that_failed_in_part_only_that_part_is_held() {
    let mut world = World::new();
    world.unmap = |_| UnmapResult::Failed { errno: 16, bytes: 0 };
    let first = world.begin(pages(3, 1).into());
    // Its mapping stays in doubt, and is tried again by itself.
    world.tell(Event::Release { caller: CALLER, invalidation: first, to: PageState::Shared });
    assert_eq!(world.gate.snapshot().quarantine, []);
    world.unmap = |bytes| match bytes {
        PAGE => UnmapResult::Failed { errno: 16, bytes: 0 },
        bytes => UnmapResult::Gone { bytes },
    };
    let second = world.begin(pages(1, 5).into());
    assert!(matches!(world.answers.last(), Some(Answer::Verdict { verdict: Verdict::Refused { .. }, .. })));
    let (_, left) = world.end();
    let [(FILE, held, HeldBy::Quarantine(since, _))] = left.past.holds[..] else {
        panic!("{:?}", left.past.holds)
    };
    assert_eq!((held, since), (pages(3, 1), second));
}

#[test]
fn a_ledger_that_was_full_is_not_gone_on_with() {
    let world = World::new();
    let fd = world.lasting.fd().unwrap().try_clone_to_owned().unwrap();
    world.lasting.lose();
    assert!(matches!(Lasting::open(fd), Err(LoadError::Lost)));
}

#[test]
fn of_two_records_over_one_range_the_one_that_only_an_operator_ends_comes_first() {
    let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
    let (open, lifted) = (HeldBy::Open(InvalidationId(1)), HeldBy::Quarantine(InvalidationId(1), reason));
    for order in [[open, lifted], [lifted, open]] {
        let mut world = World::new();
        world.begin(pages(9, 1).into());
        for by in order {
            world.lasting.holds.put(line::of_hold(FILE, pages(2, 1), by)).unwrap();
        }
        let (_, left) = world.end();
        let over = left.past.holds.iter().filter(|(_, range, _)| *range == pages(2, 1));
        assert_eq!(over.map(|(.., by)| *by).collect::<Vec<_>>(), [open, lifted]);
    }
}

#[test]
fn a_region_that_was_being_written_anew_is_closing_where_either_record_says_so() {
    for order in [[true, false], [false, true]] {
        let mut world = World::new();
        let written = world.gate.written().next().unwrap();
        let (slot, _) = world.lasting.known[&written.region];
        world.lasting.regions.clear(slot);
        for closing in order {
            world.lasting.regions.put(line::of_region(&Written { closing, ..written })).unwrap();
        }
        let (lasting, left) = world.end();
        assert_eq!(left.past.regions, [Written { closing: true, ..written }]);
        let (_, found) = Slots::open(lasting.store(), REGIONS);
        assert_eq!(found.len(), 1, "the other record is gone");
    }
}

#[test]
fn a_restart_leaves_one_record_for_each_hold() {
    let mut world = World::new();
    let invalidation = world.begin(pages(2, 1).into());
    world.tell(Event::End {
        caller: CALLER,
        invalidation,
        outcome: Outcome::Unknown { errno: 5, offset: 0 },
    });
    world.begin(pages(4, 2).into());
    let (mut lasting, mut left) = world.end();
    for _ in 0..3 {
        assert_eq!(left.past.holds.len(), 2);
        let mut gate = Gate::new(Policy::default());
        gate.keep_in(lasting.store().clone());
        let (mut effects, domain) = (Effects::new(), DOMAIN);
        let able = Able { max_mappings: 1000, max_piece: 1 << 30, cut: false, replace: false };
        gate.handle(Event::DomainAdded { domain, able }, &mut effects);
        gate.resume(left.past, &mut effects);
        lasting.resumed(&gate, &effects);
        let fd: OwnedFd = lasting.fd().unwrap().try_clone_to_owned().unwrap();
        drop((gate, lasting));
        (lasting, left) = Lasting::open(fd).unwrap();
    }
}

#[test]
fn conversions_without_an_end_are_gone_through_only_where_one_may_be_settled() {
    let mut world = World::new();
    let unended = world.begin(pages(2, 1).into());
    let unmap = world.unmap;
    let (mut lasting, left) = world.end();
    let mut gate = Gate::new(Policy::default());
    gate.keep_in(lasting.store().clone());
    let (mut effects, domain) = (Effects::new(), DOMAIN);
    let able = Able { max_mappings: 1000, max_piece: 1 << 30, cut: false, replace: false };
    gate.handle(Event::DomainAdded { domain, able }, &mut effects);
    gate.resume(left.past, &mut effects);
    lasting.resumed(&gate, &effects);
    let mut world = World { gate, lasting, unmap, hangs: false, answers: Vec::new() };
    let before = REBUILT.get();
    let invalidation = world.begin(pages(4, 1).into());
    world.tell(Event::End { caller: CALLER, invalidation, outcome: Outcome::Committed });
    assert_eq!(REBUILT.get(), before);
    world.tell(Event::Release { caller: CALLER, invalidation: unended, to: PageState::Shared });
    let (_, left) = world.end();
    assert_eq!((left.past.unended, left.past.holds), (Vec::new(), Vec::new()));
}
