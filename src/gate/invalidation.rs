//! One invalidation: begin → proof → verdict → end.
//!
//! While it clears, [`Gate::advance`] looks at the ledger (`look`) and does the next thing: unmap what is mapped, wait for
//! what is under way, climb the ladder for what failed. It is granted when the ledger shows nothing over the
//! range. Time only ever pushes (`ladder`).

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages};
use super::event::{Caller, ClientId, DeviceId, DomainId, InvalidationId, Performer, RegionId};
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
    /// Every IOVA range that must be clear, ascending.
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
    /// Kernel mappings that are kept free for its end, in each domain.
    pub(super) reserved: u64,
    pub(super) deadline_ns: u64,
}

impl Invalidation {
    /// Whether it stands between begin and end (and is not a region on its way out).
    pub(super) fn is_conversion(&self) -> bool {
        matches!(self.after, After::Grant(_))
    }

    /// Whether it waits for something over `iova`.
    pub(super) fn targets(&self, iova: PageRange<Iova>) -> bool {
        self.targets.iter().any(|target| target.overlaps(iova))
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
        self.clearing
            .iter()
            .any(|id| self.invalidations.get(id).is_some_and(|inv| inv.region == Some(region)))
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
            reserved: 0,
            deadline_ns,
        };
        self.invalidations.insert(id, inv);
        self.clearing.push(id);
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
        for id in self.clearing.clone() {
            self.advance(id, effects);
        }
    }

    /// Whether somebody waits for something over `iova`.
    pub(super) fn awaited(&self, iova: PageRange<Iova>) -> bool {
        let waits = |inv: &Invalidation| inv.encloses(iova) || inv.targets(iova);
        self.clearing.iter().any(|id| self.invalidations.get(id).is_some_and(waits))
    }

    /// Whoever waits for something over `iova` looks again.
    pub(super) fn advance_over(&mut self, iova: PageRange<Iova>, effects: &mut Effects) {
        let mut index = 0;
        while let Some(id) = self.clearing.get(index).copied() {
            if self.invalidations.get(&id).is_some_and(|inv| inv.under_way == 0 && inv.targets(iova)) {
                self.advance(id, effects);
            }
            if self.clearing.get(index) == Some(&id) {
                index += 1;
            }
        }
    }

    /// Looks at what stands in the way, and does the next thing about it.
    pub(super) fn advance(&mut self, id: InvalidationId, effects: &mut Effects) {
        loop {
            let Some(inv) = self.invalidations.get(&id) else { return };
            if inv.phase != Phase::Clearing || self.waits_for_fences(inv) {
                return;
            }
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
        self.clearing.retain(|other| *other != id);
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
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
