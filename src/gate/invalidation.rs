//! One invalidation: begin → proof → verdict → end.
//!
//! While it clears, [`Gate::advance`] looks at the ledger (`look`) and does the next thing: unmap what is mapped, wait for
//! what is under way, climb the ladder for what failed. It is granted when the ledger shows nothing over the
//! range. Time only ever pushes (`ladder`).

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages};
use super::event::{Caller, ClientId, DeviceId, DomainId, InvalidationId, JobId, Performer, RegionId};
use super::fence::Step;
use super::ledger::{HeldBy, PageState, RunState};
use super::ranges::Ranges;
use super::receipt::Receipt;
use super::region::within_budget;
use super::verdict::{Refusal, Verdict};

/// Ranges that may be held at once, by open invalidations of all clients and in quarantine: with them the ledger of a
/// tebibyte stays within 144 MiB at worst.
const MOST_HELD: u64 = 65_536;

/// Where an invalidation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waiting for proof.
    Clearing,
    /// The client may convert; its end is awaited.
    Granted,
    /// passgate converts; its own result is awaited.
    Converting,
}

/// What comes of it once the range is clear.
#[derive(Debug, Clone, Copy)]
pub(super) enum After {
    /// A client's conversion.
    Grant(Performer),
    /// The region goes; its owner waits for it.
    Removed(Caller),
    /// The region goes because it could not be added.
    AddFailed(Caller, Refusal),
    /// The region goes because its owner has gone.
    Gone,
    /// Nothing: it is mapped again in this domain, in larger pieces.
    Merged(DomainId),
    /// Nothing: an earlier process left it mapped, and its pages are held or not shared.
    Resumed,
}

/// One invalidation.
#[derive(Debug)]
pub(super) struct Invalidation {
    pub(super) receipt: Box<Receipt>,
    pub(super) phase: Phase,
    pub(super) after: After,
    /// The region that goes, where one does.
    region: Option<RegionId>,
    /// The pages held.
    pub(super) pages: Vec<FilePages>,
    /// Every IOVA range that must be clear: ascending, none overlapping another.
    pub(super) targets: Vec<PageRange<Iova>>,
    pub(super) rung: Step,
    /// Whether suspect mappings are still to be tried at this rung.
    pub(super) retry: bool,
    /// Whether devices are being stopped first.
    pub(super) stopping: bool,
    /// Devices that were asked to pause, because mappings are split.
    pub(super) pausing: Vec<DeviceId>,
    /// Whether a part of its time is over: it waits for no pause any more.
    pub(super) hurried: bool,
    /// Whether it has looked for what is plainly mapped.
    pub(super) swept: bool,
    /// Unmaps of it that have not come back: while there are any, a look would tell nothing.
    pub(super) under_way: u32,
    /// Unmaps that had not come back when a part of the deadline was over. They are waited for no more, but while there are
    /// any the invalidation cannot be granted: their results are not looked at one by one.
    late: u32,
    /// The last job before that.
    late_until: JobId,
    /// Set by a late result until the look that it would bring has been left out.
    pub(super) skips_look: bool,
    /// Kernel mappings that are kept free for its end, in each domain.
    pub(super) reserved: u64,
    pub(super) deadline_ns: u64,
}

impl Invalidation {
    /// Whether it stands between begin and end (and is not a region on its way out).
    pub(super) fn is_conversion(&self) -> bool {
        matches!(self.after, After::Grant(_))
    }

    /// A call of it has come back for good.
    pub(super) fn came_back(&mut self, job: JobId) {
        if job <= self.late_until {
            self.late = self.late.saturating_sub(1);
            self.skips_look = self.late > 0;
        } else {
            self.under_way = self.under_way.saturating_sub(1);
        }
    }

    /// The number of its calls that have not come back.
    pub(super) fn not_back(&self) -> usize {
        (self.under_way + self.late) as usize
    }

    /// What has not come back by `job` is late.
    pub(super) fn give_up(&mut self, job: JobId) {
        self.late += std::mem::take(&mut self.under_way);
        self.late_until = job;
    }

    /// Whether it waits for something over `iova`.
    pub(super) fn targets(&self, iova: PageRange<Iova>) -> bool {
        let first = self.targets.partition_point(|target| target.end() <= iova.start());
        self.targets.get(first).is_some_and(|target| target.overlaps(iova))
    }

    /// What it takes out of a domain that is plainly mapped there. A merge does so once, in one domain: what is mapped
    /// after that is its own doing. So does what takes away an earlier process's mappings, because it holds no page:
    /// what is mapped after that may be.
    pub(super) fn sweeps(&self, domain: DomainId) -> bool {
        match self.after {
            After::Merged(only) => domain == only && !self.swept,
            After::Resumed => !self.swept,
            _ => true,
        }
    }

    /// Whether `iova` lies wholly in what it holds, as far as one look tells.
    pub(super) fn encloses(&self, iova: PageRange<Iova>) -> bool {
        let behind = self.targets.partition_point(|target| target.start() <= iova.start());
        let target = behind.checked_sub(1).and_then(|index| self.targets.get(index));
        self.is_conversion() && target.is_some_and(|target| target.covers(iova))
    }
}

impl Gate {
    pub(super) fn begin(
        &mut self,
        caller: Caller,
        ranges: Ranges,
        to: PageState,
        performer: Performer,
        deadline_ns: u64,
        effects: &mut Effects,
    ) {
        let resolved = self.resolve(caller.client, &ranges).and_then(|pages| {
            let mut targets = Vec::with_capacity(pages.len());
            for part in &pages {
                targets.extend(self.aliases(part.file, part.range));
            }
            targets.sort_unstable();
            // A page that a batch names twice, by two of its addresses, is one target.
            targets.dedup_by(|next, last| {
                let overlap = next.start() < last.end();
                if overlap && let Some(both) = PageRange::between(last.start(), last.end().max(next.end())) {
                    *last = both;
                }
                overlap
            });
            Ok((self.room(&targets)?, pages, targets))
        });
        let (reserved, pages, targets) = match resolved {
            Ok(resolved) => resolved,
            Err(refusal) => {
                effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) });
                return;
            }
        };
        *self.open_by_client.entry(caller.client).or_default() += 1;
        let id = self.start(caller, ranges, to, After::Grant(performer), targets, deadline_ns);
        self.reserve(id, reserved);
        for part in &pages {
            if let Some(file) = self.files.get_mut(&part.file) {
                file.holds.hold(part.range, HeldBy::Open(id));
            }
        }
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.pages = pages;
        }
        self.clear(id, effects);
    }

    /// Begins to take a region out of every domain. `stop` stops its devices first.
    pub(super) fn close(&mut self, region: RegionId, stop: bool, after: After, effects: &mut Effects) {
        let Some(entry) = self.regions.get_mut(&region) else { return };
        entry.closing = true;
        let (gpa, iova, owner) = (entry.spec.gpa, entry.iova(), entry.owner);
        let caller = match after {
            After::Removed(caller) | After::AddFailed(caller, _) => caller,
            _ => Caller { client: owner, door: super::Door::Control, cookie: 0 },
        };
        let deadline = self.policy.close_deadline_ns;
        let id = self.start(caller, gpa.into(), PageState::Hole, after, vec![iova], deadline);
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.region = Some(region);
        }
        if stop {
            self.stop_all(id, effects);
            if let Some(inv) = self.invalidations.get_mut(&id) {
                inv.stopping = true;
            }
        }
        self.clear(id, effects);
    }

    /// Whether the region is being closed by an invalidation that still clears.
    pub(super) fn closes(&self, region: RegionId) -> bool {
        let closes = |id| self.invalidations.get(&id).is_some_and(|inv| inv.region == Some(region));
        self.clearing.others().any(closes)
    }

    pub(super) fn start(
        &mut self,
        caller: Caller,
        ranges: Ranges,
        to: PageState,
        after: After,
        targets: Vec<PageRange<Iova>>,
        deadline_ns: u64,
    ) -> InvalidationId {
        self.last_invalidation += 1;
        let id = InvalidationId(self.last_invalidation);
        let receipt = Receipt {
            invalidation: id,
            caller,
            ranges,
            to,
            steps: Vec::with_capacity(1),
            more_steps: 0,
            verdict: None,
            outcome: None,
        };
        let inv = Invalidation {
            receipt: Box::new(receipt),
            phase: Phase::Clearing,
            after,
            region: None,
            pages: Vec::new(),
            targets,
            rung: Step::Unmap,
            retry: true,
            stopping: false,
            pausing: Vec::new(),
            hurried: false,
            swept: false,
            under_way: 0,
            late: 0,
            late_until: JobId(0),
            skips_look: false,
            reserved: 0,
            deadline_ns,
        };
        self.clearing.insert(id, inv.is_conversion(), &inv.targets);
        self.invalidations.insert(id, inv);
        id
    }

    /// The first look, with the clock set before any call can hang; it stands still if the answer came at once.
    pub(super) fn clear(&mut self, id: InvalidationId, effects: &mut Effects) {
        let at = effects.len();
        self.arm(id, Step::Unmap, effects);
        self.detach_caches(id, effects);
        self.advance(id, effects);
        if self.invalidations.get(&id).is_none_or(|inv| inv.phase == Phase::Granted) && at < effects.len() {
            effects.remove(at);
        }
    }

    /// The pages behind a guest-physical range, or why it cannot be begun.
    fn resolve(&self, client: ClientId, ranges: &Ranges) -> Result<Vec<FilePages>, Refusal> {
        let open = self.open_by_client.get(&client).copied().unwrap_or(0);
        if open >= self.policy.max_open {
            let (needed, limit) = (u64::from(open) + 1, self.policy.max_open.into());
            return Err(Refusal::Budget { what: "open invalidations", needed, limit });
        }
        let held: usize = self.files.values().map(|file| file.holds.len()).sum();
        let asked = ranges.as_slice().len();
        within_budget("held ranges", (held + asked) as u64, MOST_HELD)?;
        let mut pages = Vec::with_capacity(asked);
        for range in ranges.iter() {
            let mut at = range.start();
            while at < range.end() {
                let region = self.region_at(at).filter(|region| !region.closing);
                let region = region.ok_or(Refusal::NoMemory { gpa: at })?;
                let stop = region.spec.gpa.end().min(range.end());
                let part = PageRange::between(Iova(at.raw()), Iova(stop.raw()));
                let part = region.pages_at(part.ok_or(Refusal::NoMemory { gpa: at })?);
                self.free(part)?;
                pages.push(part);
                at = stop;
            }
        }
        Ok(pages)
    }

    /// Whether nothing holds these pages.
    fn free(&self, part: FilePages) -> Result<(), Refusal> {
        let Some(file) = self.files.get(&part.file).filter(|file| !file.holds.is_clear(part.range)) else {
            return Ok(());
        };
        let Some((held, by)) = file.holds.overlapping(part.range).next() else { return Ok(()) };
        let into = held.start().raw().saturating_sub(part.range.start().raw());
        let gpa = Gpa(part.gpa.raw() + into);
        Err(match by {
            HeldBy::Open(invalidation) => Refusal::Busy { invalidation, gpa },
            HeldBy::Quarantine(_, reason) => Refusal::Quarantined { gpa, cause: reason.cause },
        })
    }

    /// Everybody who waits looks again: a fence or an attach is over.
    pub(super) fn advance_all(&mut self, effects: &mut Effects) {
        for id in self.clearing.iter().collect::<Vec<_>>() {
            self.advance(id, effects);
        }
    }

    /// Whether somebody waits for something over `iova`.
    pub(super) fn awaited(&self, iova: PageRange<Iova>) -> bool {
        let waits = |inv: &Invalidation| inv.encloses(iova) || inv.targets(iova);
        self.clearing.over(iova).iter().any(|id| self.invalidations.get(id).is_some_and(waits))
    }

    /// Whoever waits for something over `iova` looks again.
    pub(super) fn advance_over(&mut self, iova: PageRange<Iova>, effects: &mut Effects) {
        let last = InvalidationId(self.last_invalidation);
        for id in self.clearing.over(iova) {
            self.advance_one(id, iova, effects);
        }
        for id in self.clearing.since(last) {
            self.advance_one(id, iova, effects);
        }
    }

    /// It looks again where it waits for something over `iova`.
    fn advance_one(&mut self, id: InvalidationId, iova: PageRange<Iova>, effects: &mut Effects) {
        if !self.clearing.contains(id) {
            return;
        }
        let looks = self.invalidations.get_mut(&id).is_some_and(|inv| {
            inv.under_way == 0 && inv.targets(iova) && !std::mem::take(&mut inv.skips_look)
        });
        if looks {
            self.advance(id, effects);
        }
    }

    /// Looks at what stands in the way, and does the next thing about it.
    pub(super) fn advance(&mut self, id: InvalidationId, effects: &mut Effects) {
        loop {
            let Some(inv) = self.invalidations.get(&id) else { return };
            if inv.phase != Phase::Clearing || self.waits_for_fences(inv) {
                return;
            }
            #[cfg(test)]
            tests::LOOKS.set(tests::LOOKS.get() + 1);
            // A conversion can be refused with nothing changed; a region that goes is at least unmapped.
            if inv.is_conversion() && self.copies_over(&inv.targets) {
                self.fail(id, effects);
                return;
            }
            if self.pauses(id, effects) {
                return;
            }
            let Some(inv) = self.invalidations.get_mut(&id) else { return };
            inv.stopping = false;
            let targets = std::mem::take(&mut inv.targets);
            let sight = self.look(id, &targets, effects);
            let Some(inv) = self.invalidations.get_mut(&id) else { return };
            inv.targets = targets;
            if sight.suspects.is_empty() {
                if !sight.waiting {
                    self.grant(id, effects);
                }
                return;
            }
            let retry = std::mem::take(&mut inv.retry);
            if sight.suspects.iter().any(|(domain, _)| self.busy(*domain)) {
                if let Some(inv) = self.invalidations.get_mut(&id) {
                    inv.retry = retry;
                }
                return;
            }
            let again = sight.suspects.into_iter().filter(|(_, run)| retry && run.state != RunState::Cached);
            let before = effects.len();
            for (domain, run) in again {
                self.unmap(id, domain, run.range, effects);
            }
            if effects.len() > before {
                return;
            }
            if !self.climb(id, effects) {
                self.fail(id, effects);
                return;
            }
        }
    }

    /// Nothing is in the way any more.
    fn grant(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
        self.clearing.remove(id, &inv.targets);
        inv.receipt.verdict = Some(Verdict::Done);
        let caller = inv.receipt.caller;
        match inv.after {
            After::Grant(Performer::Client) => {
                inv.phase = Phase::Granted;
                let answer = Answer::Verdict { invalidation: id, verdict: Verdict::Done };
                effects.push(Effect::Answer { caller, answer });
            }
            After::Grant(Performer::Passgate) => {
                inv.phase = Phase::Converting;
                let (pages, to) = (inv.pages.clone(), inv.receipt.to);
                effects.push(Effect::Convert { invalidation: id, pages, to });
            }
            After::Removed(_) | After::AddFailed(..) | After::Gone | After::Merged(_) | After::Resumed => {
                let (region, after) = (inv.region, inv.after);
                self.finish(id, effects);
                if let Some(region) = region {
                    self.forget_region(region, effects);
                    let answer = match after {
                        After::Removed(_) => Some(Answer::RegionRemoved { region }),
                        After::AddFailed(_, refusal) => Some(Answer::Refused(refusal)),
                        _ => None,
                    };
                    effects.extend(answer.map(|answer| Effect::Answer { caller, answer }));
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use passgate_bindings::PAGE;
    use passgate_bindings::units::Offset;

    use super::super::*;

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 1 };

    thread_local! {
        /// How often an invalidation has looked at all of its targets.
        pub(super) static LOOKS: Cell<u64> = const { Cell::new(0) };
        /// How many invalidations were asked whether they wait for something at an address.
        pub(in crate::gate) static ASKED: Cell<u64> = const { Cell::new(0) };
    }

    fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    /// A batch of every second page whose first rung is over before a call returns, with a device that was drained
    /// meanwhile. Returns how often the results make the gate look at the whole batch.
    fn late_results(count: u64, result: impl Fn(u64) -> UnmapResult) -> u64 {
        let (mut gate, mut effects) = (Gate::new(Policy::default()), Effects::new());
        let able = Able { max_mappings: 65_536, max_piece: PAGE, cut: false, replace: false };
        let (domain, device) = (DomainId(0), DeviceId(0));
        gate.handle(Event::DomainAdded { domain, able }, &mut effects);
        let (steps, nature) = (Steps::of(&[Step::Drain]), Nature::default());
        gate.handle(Event::DeviceAdded { device, domain, steps, nature }, &mut effects);
        let backing = Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) };
        let (gpa, initial) = (range(0, 2 * count), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        gate.handle(Event::AddRegion { caller: CALLER, spec }, &mut effects);
        while let Some(at) = effects.iter().position(|effect| matches!(effect, Effect::Map { .. })) {
            let Effect::Map { job, .. } = effects.swap_remove(at) else { unreachable!() };
            gate.handle(Event::Mapped { job, result: MapResult::Mapped }, &mut effects);
        }
        effects.clear();
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
        gate.handle(Event::Expired { invalidation, rung: Step::Unmap }, &mut effects);
        let fenced = |effect: &Effect| match effect {
            Effect::Fence { job, .. } => Some(*job),
            _ => None,
        };
        let job = effects.iter().find_map(fenced).expect("a rung is over: the device is drained");
        gate.handle(Event::Fenced { job, errno: 0, took_ns: 1 }, &mut effects);
        let before = LOOKS.get();
        for (job, bytes) in jobs {
            gate.handle(Event::Unmapped { job, result: result(bytes), took_ns: 1 }, &mut effects);
        }
        LOOKS.get() - before
    }

    #[test]
    fn late_results_make_a_batch_looked_at_once_however_many_there_are() {
        let looks = [512, 4096].map(|count| late_results(count, |bytes| UnmapResult::Gone { bytes }));
        // The last result is looked at, and what it grants.
        assert!(looks.iter().all(|looks| (1..=2).contains(looks)), "{looks:?}");
    }

    /// Begins on every second page, whose unmaps return one by one. Returns how many invalidations are asked whether
    /// they wait for what has returned.
    fn asked(count: u64) -> u64 {
        let (mut gate, mut effects) = (Gate::new(Policy::default()), Effects::new());
        let able = Able { max_mappings: 65_536, max_piece: PAGE, cut: false, replace: false };
        gate.handle(Event::DomainAdded { domain: DomainId(0), able }, &mut effects);
        let backing = Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) };
        let (gpa, initial) = (range(0, 2 * count), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        gate.handle(Event::AddRegion { caller: CALLER, spec }, &mut effects);
        while let Some(at) = effects.iter().position(|effect| matches!(effect, Effect::Map { .. })) {
            let Effect::Map { job, .. } = effects.swap_remove(at) else { unreachable!() };
            gate.handle(Event::Mapped { job, result: MapResult::Mapped }, &mut effects);
        }
        effects.clear();
        for nth in 0..count {
            let (ranges, to) = (range(2 * nth, 1).into(), PageState::Private);
            let (performer, deadline_ns) = (Performer::Client, 1 << 40);
            gate.handle(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns }, &mut effects);
        }
        let before = ASKED.get();
        for effect in std::mem::take(&mut effects) {
            let Effect::Unmap { job, bytes: Some(bytes), .. } = effect else { continue };
            gate.handle(
                Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1 },
                &mut effects,
            );
        }
        let done = |effect: &&Effect| {
            matches!(effect, Effect::Answer { answer: Answer::Verdict { verdict: Verdict::Done, .. }, .. })
        };
        assert_eq!(effects.iter().filter(done).count() as u64, count);
        ASKED.get() - before
    }

    #[test]
    fn result_is_looked_at_only_by_the_invalidations_that_wait_for_it() {
        let [few, many] = [64, 512].map(asked);
        assert!(many < 16 * few, "{few} were asked for 64 results, {many} for 512");
    }
}
