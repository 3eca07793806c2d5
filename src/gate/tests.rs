//! The gate by itself: each call that it asks for returns when a test says so, and with the result that it says.

mod devices;
mod endings;
mod inconsistencies;
mod regions;
mod room;

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::words;
use passgate_bindings::{Gpa, PAGE, PageRange};

use super::*;

const OWNER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
const FILE: FileId = FileId { device: 1, inode: 1 };
/// A domain with room for everything; a page leaves its mappings by a split.
const SPLITS: DomainCaps = DomainCaps::new(10_000, 1 << 30);
/// A deadline of which time passes only by [`Event::Expired`].
const DEADLINE_NS: u64 = 1 << 40;
/// Calls after which a gate must have come to rest.
const MAX_CALLS: usize = 10_000;

fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

/// First page and number of pages.
fn pages<A: Address>(range: PageRange<A>) -> (u64, u64) {
    (range.start().raw() / PAGE, range.pages())
}

/// The result of a call that succeeds; none of what is no call.
fn success(effect: &Effect) -> Option<Event> {
    Some(match *effect {
        Effect::Map { job, .. } => Event::Mapped { job, result: MapResult::Mapped },
        Effect::Unmap { job, iova, bytes, .. } => {
            let bytes = bytes.unwrap_or(iova.len());
            Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1 }
        }
        Effect::Replace { job, bytes, .. } => {
            Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1 }
        }
        Effect::Fence { job, .. } => Event::Fenced { job, errno: 0, took_ns: 1 },
        Effect::Attach { job, .. } => Event::Attached { job, errno: 0 },
        Effect::Convert { invalidation, .. } => {
            Event::Converted { invalidation, outcome: Outcome::Committed }
        }
        _ => return None,
    })
}

fn is_map(call: &Effect) -> bool {
    matches!(call, Effect::Map { .. })
}

fn is_unmap(call: &Effect) -> bool {
    matches!(call, Effect::Unmap { .. })
}

fn is_fence(call: &Effect) -> bool {
    matches!(call, Effect::Fence { .. })
}

/// A gate with its domains, and its effects so far.
struct World {
    gate: Gate,
    /// Calls that have not returned, in the order in which they were asked for.
    calls: Vec<Effect>,
    /// Answers, notices, and all else that nothing returns from.
    said: Vec<Effect>,
}

impl World {
    fn new(policy: Policy, domains: &[DomainCaps]) -> Self {
        let mut world = Self { gate: Gate::new(policy, words::private), calls: Vec::new(), said: Vec::new() };
        for (index, able) in (0..).zip(domains) {
            world.tell(Event::DomainAdded { domain: DomainId(index), caps: *able });
        }
        world
    }

    fn device(&mut self, device: u16, domain: u16, steps: &[Step], traits: DeviceTraits) {
        let (device, domain, steps) = (DeviceId(device), DomainId(domain), Steps::of(steps));
        self.tell(Event::DeviceAdded { device, domain, steps, traits });
    }

    fn tell(&mut self, event: Event) {
        let mut effects = Effects::new();
        self.gate.handle(event, &mut effects);
        let (calls, said): (Vec<_>, Vec<_>) =
            effects.into_iter().partition(|effect| success(effect).is_some());
        self.calls.extend(calls);
        self.said.extend(said);
    }

    /// Shared memory, whose first page is the page `offset` of the file, in mappings of `piece` pages.
    fn add(&mut self, page: u64, count: u64, offset: u64, piece: u64) -> RegionId {
        let backing = Backing { file: FILE, offset: Offset(offset * PAGE) };
        let (gpa, piece, initial) = (range(page, count), piece * PAGE, PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece, page: PAGE, initial };
        self.tell(Event::AddRegion { caller: OWNER, spec });
        RegionId(self.gate.last().0)
    }

    fn begin(&mut self, ranges: &[(u64, u64)], to: PageState) -> InvalidationId {
        self.begin_by(OWNER, ranges, to)
    }

    fn begin_by(&mut self, caller: Caller, ranges: &[(u64, u64)], to: PageState) -> InvalidationId {
        let ranges: Vec<_> = ranges.iter().map(|(page, count)| range(*page, *count)).collect();
        let (ranges, performer) = (Ranges::try_from(ranges).unwrap(), Performer::Client);
        self.tell(Event::Begin { caller, ranges, to, performer, deadline_ns: DEADLINE_NS });
        InvalidationId(self.gate.last().1)
    }

    fn end(&mut self, invalidation: InvalidationId, outcome: Outcome) {
        self.tell(Event::End { caller: OWNER, invalidation, outcome });
    }

    /// Begin and end of one page, with every call made.
    fn convert(&mut self, page: u64, to: PageState) {
        let id = self.begin(&[(page, 1)], to);
        self.settle();
        self.end(id, Outcome::Committed);
        self.settle();
    }

    /// Takes the first call of this kind that has not returned.
    fn take(&mut self, kind: impl Fn(&Effect) -> bool) -> Option<Effect> {
        let at = self.calls.iter().position(kind)?;
        Some(self.calls.remove(at))
    }

    /// Takes every call of this kind that has not returned.
    fn take_all(&mut self, kind: impl Fn(&Effect) -> bool) -> Vec<Effect> {
        std::iter::from_fn(|| self.take(&kind)).collect()
    }

    /// Every part of the deadline of an invalidation passes, and no call returns meanwhile.
    fn deadline_passes(&mut self, invalidation: InvalidationId) {
        Rung::LADDER.into_iter().for_each(|rung| self.tell(Event::Expired { invalidation, rung }));
    }

    fn succeeds(&mut self, call: &Effect) {
        self.tell(success(call).unwrap());
    }

    /// An unmap that was taken has this result.
    fn unmapped(&mut self, call: &Effect, result: UnmapResult) {
        let Effect::Unmap { job, .. } = *call else { panic!("{call:?}") };
        self.tell(Event::Unmapped { job, result, took_ns: 1 });
    }

    /// Every call succeeds.
    fn settle(&mut self) {
        for _ in 0..MAX_CALLS {
            let Some(call) = self.take(|_| true) else { return };
            self.succeeds(&call);
        }
        panic!("the gate comes to no rest: {:?}", self.calls);
    }

    fn answers(&self) -> impl Iterator<Item = &Answer> {
        self.said.iter().filter_map(|effect| match effect {
            Effect::Answer { answer, .. } => Some(answer),
            _ => None,
        })
    }

    fn verdict(&self, id: InvalidationId) -> Option<Verdict> {
        self.answers().find_map(|answer| match answer {
            Answer::Verdict { invalidation, verdict } if *invalidation == id => Some(*verdict),
            _ => None,
        })
    }

    /// Wanted mappings that could not be made.
    fn map_failures(&self) -> Vec<&Effect> {
        let failure = |effect: &&Effect| matches!(effect, Effect::Notice(Notice::MapFailed { .. }));
        self.said.iter().filter(failure).collect()
    }

    /// Returns the quarantined ranges: first page of the file, number of pages, cause.
    fn quarantine(&self) -> Vec<(u64, u64, Cause)> {
        let told = |status: &QuarantineStatus| {
            let (first, count) = pages(status.range);
            (first, count, status.reason.cause)
        };
        self.gate.snapshot().quarantine.iter().map(told).collect()
    }

    /// Returns the live ranges of a domain: first page, number of pages.
    fn live(&self, domain: u16) -> Vec<(u64, u64)> {
        self.gate.live(DomainId(domain)).into_iter().map(pages).collect()
    }
}
