//! The invalidations that have begun and are not over, and how far each has come.

mod waiting;

use std::collections::BTreeMap;
use std::ops::Bound;

use passgate_bindings::{Iova, PageRange};

use super::effect::FilePages;
use super::event::{Caller, Performer};
use super::ids::{ClientId, DeviceId, DomainId, InvalidationId, JobId, RegionId};
use super::ledger::PageState;
use super::ranges::Ranges;
use super::receipt::{Evidence, Receipt};
use super::rung::Rung;
use super::verdict::Refusal;
use waiting::Waiting;

/// The purpose of an invalidation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    /// A client's conversion.
    Convert(Performer),
    /// The region is closed.
    Close(RegionId, CloseCause),
    /// The range is mapped again in this domain, in larger mappings.
    Merge(DomainId),
    /// An earlier process left the range mapped, and its pages are excluded or not shared.
    Resume,
}

/// The cause of a close.
#[derive(Debug, Clone, Copy)]
pub(super) enum CloseCause {
    /// Its owner asked for it and waits.
    Removed(Caller),
    /// It could not be added; its owner waits.
    AddFailed(Caller, Refusal),
    /// Its owner has gone.
    OwnerGone,
}

/// The stage of an invalidation.
#[derive(Debug)]
pub(super) enum Phase {
    /// Waiting for proof.
    Clearing(Progress),
    /// The client may convert; its end is awaited.
    Granted,
    /// passgate converts; its own result is awaited.
    Converting,
}

/// The progress of an invalidation on its way to proof.
#[derive(Debug)]
pub(super) struct Progress {
    /// The strongest step of the ladder that was tried.
    pub(super) rung: Rung,
    /// True while failed mappings are still to be tried again at this rung.
    pub(super) retry: bool,
    /// True while devices are being stopped first.
    pub(super) stopping: bool,
    /// The devices that were asked to pause because mappings are split.
    pub(super) pausing: Vec<DeviceId>,
    /// Set once a part of the deadline is over: no pause is waited for any more.
    pub(super) hurried: bool,
    /// Set once everything live was swept.
    pub(super) swept: bool,
    /// Unmaps that have not returned. While there are any, a sweep would find nothing new.
    pending: u32,
    /// Unmaps that had not returned when a part of the deadline was over. They are not waited for, but while there are any the
    /// invalidation cannot be granted, so their results are not looked at one by one.
    late: u32,
    /// The latest call before that.
    late_until: JobId,
    /// Set by a result that something is gone, until a part of the deadline is over.
    moved: bool,
    /// Set by a late result until the sweep that it would bring has been left out.
    skip_sweep: bool,
}

impl Progress {
    fn new() -> Self {
        Self {
            rung: Rung::Unmap,
            retry: true,
            stopping: false,
            pausing: Vec::new(),
            hurried: false,
            swept: false,
            pending: 0,
            late: 0,
            late_until: JobId(0),
            moved: false,
            skip_sweep: false,
        }
    }

    /// One more unmap has been asked for.
    pub(super) fn call_started(&mut self) {
        self.pending += 1;
    }

    /// An unmap has returned, and nothing of it is in flight.
    pub(super) fn call_ended(&mut self, job: JobId) {
        if job <= self.late_until {
            self.late = self.late.saturating_sub(1);
            self.skip_sweep = self.late > 0;
        } else {
            self.pending = self.pending.saturating_sub(1);
        }
    }

    /// Returns the number of unmaps that have not returned in this part of the deadline.
    pub(super) fn calls_in_time(&self) -> usize {
        self.pending as usize
    }

    /// Returns the number of unmaps that have not returned.
    pub(super) fn calls(&self) -> usize {
        (self.pending + self.late) as usize
    }

    /// Something that stood in its way is gone: what failed may be tried again.
    pub(super) fn moved(&mut self) {
        self.moved = true;
        self.retry = true;
    }

    /// Begins anew at the first rung if anything is gone since this was asked last, and returns true then. What has not returned
    /// by `job` is late.
    pub(super) fn renew(&mut self, job: JobId) -> bool {
        let renews = std::mem::take(&mut self.moved);
        if renews {
            self.rung = Rung::Unmap;
            self.part_over(job);
        }
        renews
    }

    /// A part of the deadline is over: what has not returned by `job` is late.
    pub(super) fn part_over(&mut self, job: JobId) {
        self.hurried = true;
        self.late += std::mem::take(&mut self.pending);
        self.late_until = job;
    }
}

/// One invalidation.
#[derive(Debug)]
pub(super) struct Invalidation {
    pub(super) receipt: Box<Receipt>,
    pub(super) phase: Phase,
    purpose: Purpose,
    /// The pages that it excludes from mapping.
    pub(super) pages: Vec<FilePages>,
    /// Every IOVA range that must be clear: ascending, none overlapping another.
    targets: Vec<PageRange<Iova>>,
    /// The number of kernel mappings that are kept free for its end, in each domain.
    reserved: u64,
    deadline_ns: u64,
}

impl Invalidation {
    pub(super) fn purpose(&self) -> Purpose {
        self.purpose
    }

    pub(super) fn targets(&self) -> &[PageRange<Iova>] {
        &self.targets
    }

    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    pub(super) fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// True if it is a close for which no device has to be stopped now.
    pub(super) fn is_close_without_fence(&self) -> bool {
        let without = |progress: &Progress| progress.rung == Rung::Unmap && !progress.stopping;
        self.is_close() && self.progress().is_some_and(without)
    }

    /// True if a client or passgate converts its pages (and no region is closed, or merged).
    pub(super) fn is_conversion(&self) -> bool {
        matches!(self.purpose, Purpose::Convert(_))
    }

    /// True if it closes a region.
    pub(super) fn is_close(&self) -> bool {
        matches!(self.purpose, Purpose::Close(..))
    }

    pub(super) fn progress(&self) -> Option<&Progress> {
        match &self.phase {
            Phase::Clearing(progress) => Some(progress),
            Phase::Granted | Phase::Converting => None,
        }
    }

    pub(super) fn progress_mut(&mut self) -> Option<&mut Progress> {
        match &mut self.phase {
            Phase::Clearing(progress) => Some(progress),
            Phase::Granted | Phase::Converting => None,
        }
    }

    pub(super) fn is_granted(&self) -> bool {
        matches!(self.phase, Phase::Granted)
    }

    pub(super) fn is_converting(&self) -> bool {
        matches!(self.phase, Phase::Converting)
    }

    /// True if it waits for something over `iova`.
    pub(super) fn waits_over(&self, iova: PageRange<Iova>) -> bool {
        let first = self.targets.partition_point(|target| target.end() <= iova.start());
        self.targets.get(first).is_some_and(|target| target.overlaps(iova))
    }

    /// True if it takes what is live out of a domain. A merge does so once, in one domain: what is mapped after that
    /// is its own doing. So does what takes away an earlier process's mappings, because it excludes no page: what is
    /// mapped after that may be.
    pub(super) fn sweeps(&self, domain: DomainId) -> bool {
        let swept = || self.progress().is_some_and(|progress| progress.swept);
        match self.purpose {
            Purpose::Merge(only) => domain == only && !swept(),
            Purpose::Resume => !swept(),
            Purpose::Convert(_) | Purpose::Close(..) => true,
        }
    }

    /// True if `iova` lies wholly in one of its targets, and it is a conversion.
    pub(super) fn encloses(&self, iova: PageRange<Iova>) -> bool {
        let behind = self.targets.partition_point(|target| target.start() <= iova.start());
        let target = behind.checked_sub(1).and_then(|index| self.targets.get(index));
        self.is_conversion() && target.is_some_and(|target| target.covers(iova))
    }
}

/// The parts of an invalidation that is to begin.
pub(super) struct New {
    pub(super) caller: Caller,
    pub(super) ranges: Ranges,
    pub(super) to: PageState,
    pub(super) purpose: Purpose,
    pub(super) pages: Vec<FilePages>,
    pub(super) targets: Vec<PageRange<Iova>>,
    pub(super) deadline_ns: u64,
}

/// All open invalidations.
#[derive(Debug, Default)]
pub(super) struct Invalidations {
    open: BTreeMap<InvalidationId, Invalidation>,
    waiting: Waiting,
    /// The number of open conversions of each client that has any.
    conversions: BTreeMap<ClientId, u32>,
    last: u64,
}

impl Invalidations {
    /// Returns a number that was never used: of an invalidation, or of what is in quarantine since no invalidation.
    pub(super) fn number(&mut self) -> InvalidationId {
        self.last += 1;
        InvalidationId(self.last)
    }

    /// Returns the latest number.
    pub(super) fn last(&self) -> InvalidationId {
        InvalidationId(self.last)
    }

    /// Numbers count on from `last`, or from where they are if that is more.
    pub(super) fn count_from(&mut self, last: u64) {
        self.last = self.last.max(last);
    }

    /// Begins an invalidation that waits for proof.
    pub(super) fn start(&mut self, new: New) -> InvalidationId {
        let id = self.number();
        let New { caller, ranges, to, purpose, pages, targets, deadline_ns } = new;
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
        let (receipt, phase) = (Box::new(receipt), Phase::Clearing(Progress::new()));
        let inv = Invalidation { receipt, phase, purpose, pages, targets, reserved: 0, deadline_ns };
        if inv.is_conversion() {
            *self.conversions.entry(caller.client).or_default() += 1;
        }
        self.waiting.insert(id, inv.is_conversion(), &inv.targets);
        self.open.insert(id, inv);
        id
    }

    pub(super) fn get(&self, id: InvalidationId) -> Option<&Invalidation> {
        self.open.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: InvalidationId) -> Option<&mut Invalidation> {
        self.open.get_mut(&id)
    }

    pub(super) fn progress_mut(&mut self, id: InvalidationId) -> Option<&mut Progress> {
        self.open.get_mut(&id)?.progress_mut()
    }

    /// True if it is open and closes a region.
    pub(super) fn is_close(&self, id: InvalidationId) -> bool {
        self.open.get(&id).is_some_and(Invalidation::is_close)
    }

    /// Adds evidence to the receipt of an invalidation, if it is open.
    pub(super) fn record(&mut self, id: InvalidationId, evidence: Evidence) {
        if let Some(inv) = self.open.get_mut(&id) {
            inv.receipt.record(evidence);
        }
    }

    pub(super) fn is_open(&self, id: InvalidationId) -> bool {
        self.open.contains_key(&id)
    }

    /// Returns all that are open, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (InvalidationId, &Invalidation)> {
        self.open.iter().map(|(id, inv)| (*id, inv))
    }

    /// Returns those that were begun after `last`, in order.
    pub(super) fn since(&self, last: InvalidationId) -> impl Iterator<Item = InvalidationId> + '_ {
        self.open.range((Bound::Excluded(last), Bound::Unbounded)).map(|(id, _)| *id)
    }

    pub(super) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Returns those that wait for proof, in order.
    pub(super) fn waiting_ones(&self) -> impl Iterator<Item = (InvalidationId, &Invalidation)> {
        self.waiting.iter().filter_map(|id| Some((id, self.open.get(&id)?)))
    }

    /// True if one waits for something over `iova`.
    pub(super) fn is_awaited(&self, iova: PageRange<Iova>) -> bool {
        let waits = |inv: &Invalidation| inv.encloses(iova) || inv.waits_over(iova);
        self.waiting.over(iova).iter().any(|id| self.open.get(id).is_some_and(waits))
    }

    /// True if something over `iova` has changed for an invalidation that waits there and has no other unmap in progress, so
    /// that it has to sweep again.
    pub(super) fn takes_notice(&mut self, id: InvalidationId, iova: PageRange<Iova>) -> bool {
        if !self.waiting.contains(id) {
            return false;
        }
        let Some(inv) = self.open.get_mut(&id) else { return false };
        let waits = inv.waits_over(iova);
        let Some(progress) = inv.progress_mut() else { return false };
        let skip = std::mem::take(&mut progress.skip_sweep);
        progress.pending == 0 && waits && !skip
    }

    /// Returns the invalidation that closes the region and waits for proof.
    pub(super) fn close_of(&self, region: RegionId) -> Option<InvalidationId> {
        let closes = |inv: &Invalidation| matches!(inv.purpose, Purpose::Close(other, _) if other == region);
        self.waiting.others().find(|id| self.open.get(id).is_some_and(closes))
    }

    /// Returns the number of regions that are being closed.
    pub(super) fn closes(&self) -> usize {
        self.waiting.others().filter(|id| self.is_close(*id)).count()
    }

    /// Nobody waits for the answer to a close any more: its owner is gone.
    pub(super) fn owner_gone(&mut self, close: InvalidationId) {
        if let Some(inv) = self.open.get_mut(&close)
            && let Purpose::Close(_, cause) = &mut inv.purpose
        {
            *cause = CloseCause::OwnerGone;
        }
    }

    /// Something over `iova` is gone: every close that waits there has progressed.
    pub(super) fn closes_moved(&mut self, iova: PageRange<Iova>) {
        for id in self.waiting.over(iova) {
            if let Some(inv) = self.open.get_mut(&id).filter(|inv| inv.is_close() && inv.waits_over(iova))
                && let Some(progress) = inv.progress_mut()
            {
                progress.moved();
            }
        }
    }

    /// Returns the number of open conversions of a client.
    pub(super) fn conversions_of(&self, client: ClientId) -> u32 {
        self.conversions.get(&client).copied().unwrap_or(0)
    }

    /// Returns the conversions that a client has begun.
    pub(super) fn begun_by(&self, client: ClientId) -> Vec<InvalidationId> {
        let own = |inv: &Invalidation| inv.is_conversion() && inv.receipt.caller.client == client;
        self.open.iter().filter(|(_, inv)| own(inv)).map(|(id, _)| *id).collect()
    }

    /// Other memory lies at `iova` now: nobody waits there for what was before.
    pub(super) fn forget_targets(&mut self, iova: PageRange<Iova>) {
        for inv in self.open.values_mut() {
            // One target may lie in two regions.
            inv.targets = inv.targets.iter().flat_map(|target| target.without(iova)).flatten().collect();
        }
        self.waiting.forget(iova);
    }

    /// Keeps a number of kernel mappings for the end of an invalidation. Returns true if it is open.
    pub(super) fn reserve(&mut self, id: InvalidationId, count: u64) -> bool {
        let Some(inv) = self.open.get_mut(&id) else { return false };
        inv.reserved += count;
        true
    }

    /// Proof has come: it waits no more.
    pub(super) fn proved(&mut self, id: InvalidationId) -> Option<&mut Invalidation> {
        let inv = self.open.get_mut(&id)?;
        self.waiting.remove(id, &inv.targets);
        Some(inv)
    }

    /// It waits no more, for proof has not come. Returns its targets.
    pub(super) fn stop_waiting(&mut self, id: InvalidationId) -> Vec<PageRange<Iova>> {
        let Some(inv) = self.open.get_mut(&id) else { return Vec::new() };
        let targets = std::mem::take(&mut inv.targets);
        self.waiting.remove(id, &targets);
        targets
    }

    /// It is over.
    pub(super) fn end(&mut self, id: InvalidationId) -> Option<Invalidation> {
        let inv = self.open.remove(&id)?;
        let client = inv.receipt.caller.client;
        if inv.is_conversion()
            && let Some(open) = self.conversions.get_mut(&client)
        {
            *open -= 1;
            if *open == 0 {
                self.conversions.remove(&client);
            }
        }
        Some(inv)
    }

    /// Returns its state as text ([`super::Gate::canonical`]).
    pub(super) fn canonical(&self) -> String {
        let Self { open, waiting, conversions, last } = self;
        format!("{open:?}\n{waiting:?} {conversions:?} {:?}\n", InvalidationId(*last))
    }
}

#[cfg(test)]
pub(in crate::gate) mod tests;
