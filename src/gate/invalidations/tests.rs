use std::cell::Cell;

use passgate_bindings::PAGE;
use passgate_bindings::units::Offset;
use passgate_bindings::words;

use passgate_bindings::PageRange;
use passgate_bindings::units::Address;

use super::super::*;
use super::{Invalidation, New, Purpose};

const CALLER: Caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 1 };

thread_local! {
    /// The number of sweeps over all targets of an invalidation.
    pub(in crate::gate) static SWEEPS: Cell<u64> = const { Cell::new(0) };
    /// The number of invalidations that were checked for targets at an address.
    pub(in crate::gate) static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

/// Adds a region of so many pages, in mappings of one page, and maps all of it. Leaves no effects.
fn map_region(gate: &mut Gate, pages: u64, effects: &mut Effects) {
    let backing = Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) };
    let (gpa, initial) = (range(0, pages), PageState::Shared);
    let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
    gate.handle(Event::AddRegion { caller: CALLER, spec }, effects);
    while let Some(at) = effects.iter().position(|effect| matches!(effect, Effect::Map { .. })) {
        let Effect::Map { job, .. } = effects.swap_remove(at) else { unreachable!() };
        gate.handle(Event::Mapped { job, result: MapResult::Mapped }, effects);
    }
    effects.clear();
}

/// A batch of every second page whose first rung is over before a call returns, with a device that was drained
/// meanwhile. Returns how often the results make the gate look at the whole batch.
fn late_results(count: u64, result: impl Fn(u64) -> UnmapResult) -> u64 {
    let (mut gate, mut effects) = (Gate::new(Policy::default(), words::private), Effects::new());
    let caps = DomainCaps::new(65_536, PAGE);
    let (domain, device) = (DomainId(0), DeviceId(0));
    gate.handle(Event::DomainAdded { domain, caps }, &mut effects);
    let (steps, traits) = (Steps::of(&[Step::Drain]), DeviceTraits::default());
    gate.handle(Event::DeviceAdded { device, domain, steps, traits }, &mut effects);
    map_region(&mut gate, 2 * count, &mut effects);
    let ranges: Vec<_> = (0..count).map(|n| range(2 * n, 1)).collect();
    let (ranges, performer) = (Ranges::try_from(ranges).unwrap(), Performer::Client);
    let begin =
        Event::Begin { caller: CALLER, ranges, to: PageState::Private, performer, deadline_ns: 1 << 40 };
    gate.handle(begin, &mut effects);
    let jobs: Vec<_> = effects
        .drain(..)
        .filter_map(|effect| match effect {
            Effect::Unmap { job, bytes, .. } => Some((job, bytes.unwrap())),
            _ => None,
        })
        .collect();
    assert_eq!(jobs.len() as u64, count);
    let invalidation = InvalidationId(gate.last().1);
    gate.handle(Event::Expired { invalidation, rung: Rung::Unmap }, &mut effects);
    let fenced = |effect: &Effect| match effect {
        Effect::Fence { job, .. } => Some(*job),
        _ => None,
    };
    let job = effects.iter().find_map(fenced).expect("a rung is over: the device is drained");
    gate.handle(Event::Fenced { job, errno: 0, took_ns: 1 }, &mut effects);
    let before = SWEEPS.get();
    for (job, bytes) in jobs {
        gate.handle(Event::Unmapped { job, result: result(bytes), took_ns: 1 }, &mut effects);
    }
    SWEEPS.get() - before
}

#[test]
fn late_results_of_a_batch_bring_one_sweep() {
    let looks = [512, 4096].map(|count| late_results(count, |bytes| UnmapResult::Gone { bytes }));
    // The last result is looked at, and what it grants.
    assert!(looks.iter().all(|looks| (1..=2).contains(looks)), "{looks:?}");
}

/// Begins on every second page, whose unmaps return one by one. Returns how many invalidations are asked whether
/// they wait for what has returned.
fn asked(count: u64) -> u64 {
    let (mut gate, mut effects) = (Gate::new(Policy::default(), words::private), Effects::new());
    let caps = DomainCaps::new(65_536, PAGE);
    gate.handle(Event::DomainAdded { domain: DomainId(0), caps }, &mut effects);
    map_region(&mut gate, 2 * count, &mut effects);
    for nth in 0..count {
        let (ranges, to) = (range(2 * nth, 1).into(), PageState::Private);
        let (performer, deadline_ns) = (Performer::Client, 1 << 40);
        gate.handle(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns }, &mut effects);
    }
    let before = ASKED.get();
    for effect in std::mem::take(&mut effects) {
        let Effect::Unmap { job, bytes: Some(bytes), .. } = effect else { continue };
        gate.handle(Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1 }, &mut effects);
    }
    let done = |effect: &&Effect| {
        matches!(effect, Effect::Answer { answer: Answer::Verdict { verdict: Verdict::Done, .. }, .. })
    };
    assert_eq!(effects.iter().filter(done).count() as u64, count);
    ASKED.get() - before
}

#[test]
fn unmap_result_sweeps_only_invalidations_that_wait_there() {
    let [few, many] = [64, 512].map(asked);
    assert!(many < 16 * few, "{few} were asked for 64 results, {many} for 512");
}

#[test]
fn target_is_forgotten_only_where_other_memory_lies() {
    let mut all = Invalidations::default();
    let (ranges, targets) = (range(0, 1).into(), vec![range(2, 2), range(7, 4), range(20, 1)]);
    let (to, purpose, pages) = (PageState::Private, Purpose::Resume, Vec::new());
    let id = all.start(New { caller: CALLER, ranges, to, purpose, pages, targets, deadline_ns: 1 });
    all.forget_targets(range(8, 2));
    let targets = [range(2, 2), range(7, 1), range(10, 1), range(20, 1)];
    assert_eq!(all.get(id).map(Invalidation::targets), Some(&targets[..]));
    for (page, waits) in [(7, true), (8, false), (9, false), (10, true)] {
        assert_eq!(all.is_awaited(range(page, 1)), waits, "page {page}");
    }
}
