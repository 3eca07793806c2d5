//! The checker: it judges every event and every effect against the promises.
//!
//! It consists of the [`Oracle`] (the true state), the [`ShadowLedger`] (what the results reported to the gate prove), and the
//! requests that wait for an answer. It reads the gate's state only for the ids of regions and, every 64 events, to compare a
//! whole snapshot.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use passgate::gate::{
    Caller, Cause, ClientId, Event, FileId, InvalidationId, JobId, MapResult, Outcome, PageState, Policy,
    Ranges, Reason, RegionId, RegionSpec, Rung, Snapshot, Step, Verdict,
};
use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;

use crate::oracle::{CheckResult, Oracle, Phase, QuarantinedRange, Stage, broken};
use crate::shadow_ledger::ShadowLedger;

/// The shortest deadline that the gate can keep: the ladder has six rungs, and no timer is shorter than a nanosecond.
const MIN_DEADLINE_NS: u64 = 6;

/// A request of a client that waits for an answer.
#[derive(Debug, Clone)]
pub enum RequestKind {
    Add {
        spec: RegionSpec,
        region: Option<RegionId>,
    },
    Remove {
        region: RegionId,
    },
    Begin {
        ranges: Ranges,
        id: Option<InvalidationId>,
    },
    End {
        invalidation: InvalidationId,
        outcome: Outcome,
        counts: bool,
    },
    /// An operator's release. `hangs` if passgate's own conversion of the pages has not returned; `reachable` if a mapping over
    /// the pages is not proved gone and they are to be other than shared.
    Release {
        bytes: u64,
        hangs: bool,
        reachable: bool,
    },
}

#[derive(Debug, Clone)]
pub struct Request {
    pub caller: Caller,
    pub kind: RequestKind,
    /// The time at which the answer is due, in nanoseconds.
    pub due: u64,
}

/// A client that is gone, and whose memory is not closed yet.
#[derive(Debug)]
pub struct Death {
    pub client: ClientId,
    /// Its regions that were not being closed already.
    pub regions: Vec<RegionId>,
    /// The fences that must have returned before these are unmapped.
    pub fences: HashSet<JobId>,
    /// The invalidations that close them.
    pub closings: Vec<InvalidationId>,
    /// Set once a timer of one of these invalidations has expired: the unmap need not wait for the fences any longer.
    pub fences_overdue: bool,
}

/// Obligations that one effect of an event creates and a later effect of the same event must meet.
#[derive(Debug, Default)]
pub struct Obligations {
    pub noticed: BTreeSet<InvalidationId>,
    /// Invalidations that were refused or are unknown: each must be in a notice.
    pub must_notice: Vec<InvalidationId>,
    /// Pages that must be in quarantine as a whole.
    pub must_quarantine: Vec<(FileId, PageRange<Offset>)>,
    /// Pages that an operator released: each range must be in a notice.
    pub must_report: Vec<(FileId, PageRange<Offset>)>,
}

#[derive(Debug)]
pub struct Model {
    pub policy: Policy,
    pub now: u64,
    pub oracle: Oracle,
    pub shadow_ledger: ShadowLedger,
    pub requests: BTreeMap<u64, Request>,
    /// The cookies of requests of clients that are gone: they may be answered or not.
    pub abandoned_requests: HashSet<u64>,
    pub deaths: Vec<Death>,
    pub obligations: Obligations,
    /// True while the current event is the end of a client with memory.
    pub dying: bool,
    pub known_invalidations: HashSet<InvalidationId>,
    pub verdicts: BTreeMap<InvalidationId, Verdict>,
    pub receipts: HashSet<InvalidationId>,
    /// Invalidations of which a timer has expired.
    pub rung_expired: HashSet<InvalidationId>,
    /// Clients that cannot be refused.
    pub must_unmap: HashSet<ClientId>,
    /// Invalidations that close a region (or merge mappings), with the [`ShadowLedger::event_count`] at their begin.
    pub closing: BTreeMap<InvalidationId, u64>,
    /// The outcomes of passgate's own conversions that are not answered yet.
    pub converted: BTreeMap<InvalidationId, Outcome>,
    /// passgate's own conversions that have not returned, also after they were given up.
    pub converting: BTreeSet<InvalidationId>,
    /// Set once a map has failed: a mapping that should exist may be missing.
    pub map_failed: bool,
    /// Set once a range has come out of quarantine.
    pub freed: bool,
    /// True if no call fails in this world: then nothing may be refused without a true reason.
    pub clean: bool,
    /// The highest invalidation from which an earlier daemon's quarantine dates.
    last_of_earlier: u64,
}

impl Model {
    pub fn new(policy: Policy, clean: bool) -> Self {
        Self {
            policy,
            now: 0,
            oracle: Oracle::default(),
            shadow_ledger: ShadowLedger::new(&policy),
            requests: BTreeMap::new(),
            abandoned_requests: HashSet::new(),
            deaths: Vec::new(),
            obligations: Obligations::default(),
            dying: false,
            known_invalidations: HashSet::new(),
            verdicts: BTreeMap::new(),
            receipts: HashSet::new(),
            rung_expired: HashSet::new(),
            must_unmap: HashSet::new(),
            closing: BTreeMap::new(),
            converted: BTreeMap::new(),
            converting: BTreeSet::new(),
            map_failed: false,
            freed: false,
            clean,
            last_of_earlier: 0,
        }
    }

    /// Records an event before the gate handles it.
    pub fn record_event(&mut self, event: &Event) {
        if let Event::Mapped { job, result: MapResult::Refused { .. } | MapResult::Unknown { .. } } = *event
            && let Some(iova) = self.shadow_ledger.map_of(job)
            && let Some(region) = self.oracle.regions.iter_mut().find(|region| region.iova().overlaps(iova))
        {
            region.map_failed |= region.stage == Stage::Adding;
        }
        let removals = self.removals();
        self.shadow_ledger.event(event);
        self.renew_removals(&removals);
        if let Event::Converted { invalidation, .. } = event {
            self.converting.remove(invalidation);
        }
        match *event {
            Event::AddRegion { caller, spec } => {
                self.add_request(caller, RequestKind::Add { spec, region: None }, u64::MAX);
            }
            Event::RemoveRegion { caller, region } => {
                let due = self.policy.close_deadline_ns.max(MIN_DEADLINE_NS);
                self.add_request(caller, RequestKind::Remove { region }, due);
            }
            Event::Begin { caller, ref ranges, deadline_ns, .. } => {
                let ranges = ranges.clone();
                self.add_request(
                    caller,
                    RequestKind::Begin { ranges, id: None },
                    deadline_ns.max(MIN_DEADLINE_NS),
                );
            }
            Event::End { caller, invalidation, outcome } => {
                let counts = self
                    .oracle
                    .open(invalidation)
                    .is_some_and(|open| open.phase == Phase::Granted && open.caller.client == caller.client);
                self.add_request(caller, RequestKind::End { invalidation, outcome, counts }, 5);
                if counts {
                    self.apply_outcome(invalidation, outcome);
                }
            }
            Event::Converted { invalidation, outcome }
                if self.oracle.open(invalidation).is_some_and(|open| open.phase == Phase::Converting) =>
            {
                self.converted.insert(invalidation, outcome);
                self.apply_outcome(invalidation, outcome);
            }
            Event::Expired { invalidation, rung } => {
                self.rung_expired.insert(invalidation);
                if let Some(open) = self.oracle.open(invalidation) {
                    open.out_of_time |= rung == Rung::Fence(Step::Reset);
                }
                for death in &mut self.deaths {
                    death.fences_overdue |= death.closings.contains(&invalidation);
                }
            }
            Event::MustUnmap { client } => _ = self.must_unmap.insert(client),
            Event::ClientGone { client } => self.client_gone(client),
            Event::Quarantine { file, range, invalidation, reason } => {
                self.last_of_earlier = self.last_of_earlier.max(invalidation.0);
                // Only an operator can end it, whatever its cause was.
                let is_client_gone = reason.cause == Cause::ClientGone;
                let reason = Reason {
                    cause: if is_client_gone { reason.cause } else { Cause::OwnerUnknown },
                    ..reason
                };
                let Some(entry) = self.oracle.file(file) else { return };
                entry.in_use = true;
                for range in entry.free_of_quarantine(range) {
                    entry.quarantine.push(QuarantinedRange {
                        range,
                        reason,
                        since: invalidation,
                        lasts: true,
                    });
                }
                self.oracle.set_state(&[(file, range)], PageState::Unknown);
            }
            Event::Release { caller, invalidation, to } => {
                self.freed = true;
                self.operator_release(caller, invalidation, to);
            }
            _ => {}
        }
    }

    /// An operator states what the pages are that an invalidation left in quarantine.
    fn operator_release(&mut self, caller: Caller, since: InvalidationId, to: PageState) {
        if self.converting.contains(&since) && self.oracle.open(since).is_none() {
            return self.add_request(
                caller,
                RequestKind::Release { bytes: 0, hangs: true, reachable: false },
                0,
            );
        }
        if to != PageState::Shared && self.is_reachable(since) {
            return self.add_request(
                caller,
                RequestKind::Release { bytes: 0, hangs: false, reachable: true },
                0,
            );
        }
        let mut released = Vec::new();
        for file in &mut self.oracle.files {
            let mine = file
                .quarantine
                .iter()
                .filter(|quarantined| quarantined.since == since)
                .map(|quarantined| quarantined.range);
            let mine: Vec<_> = mine.collect();
            file.operator_released.extend(mine.iter().map(|range| range.start().0..range.end().0));
            released.extend(mine.into_iter().map(|range| (file.id, range)));
        }
        self.oracle.set_state(&released, to);
        let bytes = released.iter().map(|(_, range)| range.len()).sum();
        self.obligations.must_report = released;
        self.add_request(caller, RequestKind::Release { bytes, hangs: false, reachable: false }, 0);
    }

    /// True while a call over some of what an invalidation left in quarantine has not returned with a plain result.
    pub fn is_call_in_progress(&self, since: InvalidationId) -> bool {
        self.oracle.files.iter().any(|file| {
            let mut mine = file.quarantine.iter().filter(|quarantined| quarantined.since == since);
            mine.any(|quarantined| {
                let mut shown = self.oracle.aliases(file.id, quarantined.range);
                shown.any(|(_, iova)| {
                    self.shadow_ledger.unsettled(iova).is_some() || self.shadow_ledger.is_uncertain(iova)
                })
            })
        })
    }

    /// True while nothing proves that no device reaches what an invalidation left in quarantine.
    pub fn is_reachable(&self, since: InvalidationId) -> bool {
        self.oracle.files.iter().any(|file| {
            let mut mine = file.quarantine.iter().filter(|quarantined| quarantined.since == since);
            // Also what lies beside a replace that has not returned.
            let seen = |quarantined: PageRange<Offset>| {
                self.oracle
                    .aliases(file.id, quarantined)
                    .any(|(_, iova)| self.shadow_ledger.unproved(iova).is_some())
            };
            mine.any(|quarantined| {
                !self.pages_in_doubt(file.id, quarantined.range).is_empty() || seen(quarantined.range)
            })
        })
    }

    fn add_request(&mut self, caller: Caller, kind: RequestKind, within: u64) {
        let due = self.now.saturating_add(within);
        self.requests.insert(caller.cookie, Request { caller, kind, due });
    }

    /// Returns the cookies of removals that wait, and the bytes of their regions that are still in the way.
    fn removals(&self) -> Vec<(u64, u64)> {
        let removals = self.requests.iter().filter_map(|(cookie, request)| {
            let RequestKind::Remove { region } = request.kind else { return None };
            let region = self.oracle.regions.iter().find(|known| known.id == region)?;
            Some((*cookie, self.shadow_ledger.bytes_in_the_way(region.iova())))
        });
        removals.collect()
    }

    /// Progress begins the deadline of a removal anew, at the end of the part that was running.
    fn renew_removals(&mut self, before: &[(u64, u64)]) {
        if before.is_empty() {
            return;
        }
        let (now, after): (_, BTreeMap<_, _>) = (self.now, self.removals().into_iter().collect());
        let whole = self.policy.close_deadline_ns.max(MIN_DEADLINE_NS);
        for (cookie, bytes) in before {
            if after.get(cookie).is_some_and(|left| left < bytes)
                && let Some(request) = self.requests.get_mut(cookie)
            {
                let part = whole / Rung::LADDER.len() as u64;
                request.due = now.saturating_add(whole).saturating_add(part);
            }
        }
    }

    /// The pages have the state that the outcome of their conversion gives them.
    fn apply_outcome(&mut self, id: InvalidationId, outcome: Outcome) {
        let Some((pages, to)) = self.oracle.open(id).map(|open| (open.pages.clone(), open.to)) else {
            return;
        };
        match outcome {
            Outcome::Committed => self.oracle.set_state(&pages, to),
            Outcome::NotCommitted => {}
            Outcome::Unknown { .. } => self.oracle.set_state(&pages, PageState::Unknown),
        }
    }

    fn client_gone(&mut self, client: ClientId) {
        let own = |request: &Request| request.caller.client == client;
        self.abandoned_requests.extend(
            self.requests.values().filter(|request| own(request)).map(|request| request.caller.cookie),
        );
        self.requests.retain(|_, request| !own(request));
        let (over, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.oracle.open)
            .into_iter()
            .partition(|open| open.caller.client == client && open.phase != Phase::Converting);
        self.oracle.open = rest;
        for open in over.into_iter().filter(|open| open.phase == Phase::Granted) {
            self.oracle.set_state(&open.pages, PageState::Unknown);
            self.oracle.grant(&open.pages, false);
            self.obligations.must_quarantine.extend(open.pages);
        }
        let mut regions = Vec::new();
        let mut owned = false;
        for region in self.oracle.regions.iter_mut().filter(|region| region.owner == client) {
            if region.stage != Stage::Closing && !region.map_failed {
                regions.push(region.id);
            }
            owned = true;
            region.stage = Stage::Closing;
        }
        if owned {
            let (fences, closings) = Default::default();
            self.dying = true;
            self.deaths.push(Death { client, regions, fences, closings, fences_overdue: false });
        }
    }

    /// Judges, after the last effect of an event, whether all obligations are met.
    pub fn judge_obligations(&mut self, event: &Event) -> CheckResult {
        let obligations = std::mem::take(&mut self.obligations);
        self.dying = false;
        if let Some(id) = obligations.must_notice.iter().find(|id| !obligations.noticed.contains(id)) {
            broken!(6, "{id:?} was not granted, and no notice says so");
        }
        for (id, range) in obligations.must_quarantine {
            let Some(file) = self.oracle.file(id) else { continue };
            if !file.is_fully_quarantined(range) {
                broken!(6, "the state of {range:?} is unknown, but it is not in quarantine");
            }
        }
        if let Some((file, range)) = obligations.must_report.first() {
            broken!(6, "{range:?} of {file:?} was released, and no notice reports it");
        }
        if let Event::ClientGone { client } = *event {
            self.check_devices_stop(client)?;
        }
        Ok(())
    }

    /// Returns which of these pages are in doubt, in any domain at any alias.
    pub fn pages_in_doubt(&self, id: FileId, range: PageRange<Offset>) -> Vec<PageRange<Offset>> {
        let mut parts = Vec::new();
        for (region, iova) in self.oracle.aliases(id, range) {
            for mappings in self.shadow_ledger.domains.values() {
                parts.extend(
                    mappings.parts_in_doubt(&crate::shadow_ledger::span(iova)).into_iter().filter_map(
                        |part| {
                            let start = part.start - region.iova().start().0 + region.spec.backing.offset.0;
                            PageRange::new(start, part.end - part.start).ok()
                        },
                    ),
                );
            }
        }
        parts
    }

    /// Checks that every device that can be stopped is being stopped, once a client with memory is gone.
    fn check_devices_stop(&mut self, client: ClientId) -> CheckResult {
        if !self.deaths.iter().any(|death| death.client == client) {
            return Ok(());
        }
        let resets = self.must_unmap.contains(&client) || self.policy.on_stuck_dma.allows().has(Step::Reset);
        for (id, device) in &self.shadow_ledger.devices {
            let can = |step: Step| device.steps.has(step);
            let spared = device.traits.tdi && !self.policy.end_tdi;
            let any = can(Step::Drain)
                || can(Step::Stop)
                || can(Step::Detach)
                || (can(Step::Master) && !spared)
                || (can(Step::Reset) && resets && !spared);
            if any && device.busy == 0 && device.fenced.is_none() {
                broken!(8, "{client:?} is gone, but {id:?} of {:?} is not being stopped", device.domain);
            }
        }
        Ok(())
    }

    /// Checks that no request waits beyond its deadline.
    pub fn check_deadlines(&self) -> CheckResult {
        match self.requests.values().find(|request| request.due < self.now) {
            Some(request) => broken!(4, "no answer at {} ns to {request:?}", self.now),
            None => Ok(()),
        }
    }

    /// Checks that no request waits. Nothing is in progress when this is called, although invalidations may be open.
    pub fn check_all_answered(&self) -> CheckResult {
        match self.requests.values().next() {
            None => Ok(()),
            Some(request) => {
                let promise = if matches!(request.kind, RequestKind::Begin { .. }) { 4 } else { 3 };
                broken!(promise, "nothing is in progress, and no answer came to {request:?}")
            }
        }
    }

    /// Checks that the gate's snapshot agrees with this model.
    pub fn compare_snapshot(&self, snapshot: &Snapshot) -> CheckResult {
        for one in &snapshot.mappings {
            if one.used > one.limit {
                broken!(7, "more mappings than the limit: {one:?}");
            }
        }
        if snapshot.regions.len() > self.policy.max_regions as usize {
            broken!(7, "{} regions, the limit is {}", snapshot.regions.len(), self.policy.max_regions);
        }
        let mine =
            self.oracle.files.iter().flat_map(|file| file.quarantine.iter().map(|q| (file.id, q.range)));
        let (mut mine, mut its): (Vec<_>, Vec<_>) =
            (mine.collect(), snapshot.quarantine.iter().map(|q| (q.file, q.range)).collect());
        mine.sort_unstable();
        its.sort_unstable();
        if mine != its {
            broken!(6, "announced as quarantined: {mine:?}; in the snapshot: {its:?}");
        }
        if snapshot.open != self.oracle.open.len() as u64 {
            broken!(
                4,
                "{} invalidations are open, the snapshot has {}",
                self.oracle.open.len(),
                snapshot.open
            );
        }
        let mut mine: Vec<RegionId> = self.oracle.regions.iter().map(|region| region.id).collect();
        mine.sort_unstable();
        if !snapshot.regions.iter().map(|region| region.region).eq(mine.iter().copied()) {
            broken!(8, "regions {mine:?}, the snapshot has {:?}", snapshot.regions);
        }
        for status in &snapshot.regions {
            let file = self.oracle.files.iter().find(|file| file.id == status.spec.backing.file);
            let mine = file.and_then(|file| file.bytes(&self.oracle.regions, status.region));
            if let Some(mine) = mine.filter(|mine| *mine != status.bytes) {
                broken!(2, "{status:?}, but its pages by state are {mine:?} bytes");
            }
        }
        for status in &snapshot.devices {
            let expected = self.shadow_ledger.devices.get(&status.device);
            let differs = |device: &crate::shadow_ledger::Device| {
                (device.fenced, device.traits) != (status.fenced, status.traits)
                    || (status.lost && !device.lost)
            };
            if expected.is_none_or(differs) {
                broken!(2, "{status:?}, but its results give {expected:?}");
            }
        }
        Ok(())
    }

    /// True if a quarantine of this cause outlasts every proof about mappings.
    pub fn lasts(&self, since: InvalidationId, reason: Reason) -> bool {
        matches!(reason.cause, Cause::OwnerUnknown | Cause::ClientGone) || since.0 <= self.last_of_earlier
    }
}
