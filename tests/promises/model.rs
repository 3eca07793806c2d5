//! The checker: what every event and every effect means for the promises.
//!
//! It holds the truth ([`Truth`]), what the gate was told ([`Told`]), and who still waits for an answer. It never
//! looks into the gate but for the names of regions and, now and then, to compare a whole snapshot.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use passgate::gate::{
    Caller, Cause, ClientId, Event, FileId, InvalidationId, JobId, MapResult, Outcome, PageState, Policy,
    Ranges, Reason, RegionId, RegionSpec, Snapshot, Step, Verdict,
};
use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;

use crate::told::Told;
use crate::truth::{Held, Kept, Phase, Stage, Truth, broken};

/// The ladder has six rungs, and no timer is shorter than a nanosecond.
const SHORTEST: u64 = 6;

/// What somebody asked.
#[derive(Debug, Clone)]
pub enum Ask {
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
    /// `reached` while a mapping over the pages is not proved gone and they are to be other than shared.
    Release {
        bytes: u64,
        hangs: bool,
        reached: bool,
    },
}

#[derive(Debug, Clone)]
pub struct Asked {
    pub caller: Caller,
    pub ask: Ask,
    /// When the answer must be there.
    pub due: u64,
}

/// A client that is gone and whose memory is not closed yet.
#[derive(Debug)]
pub struct Death {
    pub client: ClientId,
    /// Its regions that were not on their way out already.
    pub regions: Vec<RegionId>,
    /// The fences that must be over before they are unmapped.
    pub fences: HashSet<JobId>,
    /// The invalidations that close them.
    pub closings: Vec<InvalidationId>,
    /// Whether the gate was told that a fence took too long.
    pub overdue: bool,
}

/// What the effects of one event owe each other.
#[derive(Debug, Default)]
pub struct Owed {
    pub noticed: BTreeSet<InvalidationId>,
    /// Refused or unknown: these must be noticed.
    pub notice: Vec<InvalidationId>,
    /// These must be in quarantine as a whole.
    pub quarantine: Vec<(FileId, PageRange<Offset>)>,
    /// A person let go of these: told, one by one.
    pub released: Vec<(FileId, PageRange<Offset>)>,
}

#[derive(Debug)]
pub struct Model {
    pub policy: Policy,
    pub now: u64,
    pub truth: Truth,
    pub told: Told,
    pub asked: BTreeMap<u64, Asked>,
    /// Requests of clients that are gone: an answer may come or not.
    pub orphans: HashSet<u64>,
    pub deaths: Vec<Death>,
    pub owed: Owed,
    /// Whether the event at hand is the death of a client with memory.
    pub dying: bool,
    pub known: HashSet<InvalidationId>,
    pub said: BTreeMap<InvalidationId, Verdict>,
    pub receipts: HashSet<InvalidationId>,
    /// Invalidations of whose time a part was over.
    pub hurried: HashSet<InvalidationId>,
    /// Clients that cannot be told no.
    pub insisting: HashSet<ClientId>,
    /// Invalidations that take a region away (or merge), and when they began, by [`Told::clock`].
    pub closing: BTreeMap<InvalidationId, u64>,
    /// What passgate's own conversion came to, while its answer is awaited.
    pub converted: BTreeMap<InvalidationId, Outcome>,
    /// Its calls that have not returned, also after they were given up.
    pub converting: BTreeSet<InvalidationId>,
    /// Why an expected mapping may be missing.
    pub map_failed: bool,
    /// Whether anything came out of quarantine.
    pub freed: bool,
    /// Nothing fails in this world: then nothing may be refused without a good reason.
    pub clean: bool,
    /// The highest invalidation that an earlier daemon's quarantine dates from.
    earlier: u64,
}

impl Model {
    pub fn new(policy: Policy, clean: bool) -> Self {
        Self {
            policy,
            now: 0,
            truth: Truth::default(),
            told: Told::new(&policy),
            asked: BTreeMap::new(),
            orphans: HashSet::new(),
            deaths: Vec::new(),
            owed: Owed::default(),
            dying: false,
            known: HashSet::new(),
            said: BTreeMap::new(),
            receipts: HashSet::new(),
            hurried: HashSet::new(),
            insisting: HashSet::new(),
            closing: BTreeMap::new(),
            converted: BTreeMap::new(),
            converting: BTreeSet::new(),
            map_failed: false,
            freed: false,
            clean,
            earlier: 0,
        }
    }

    /// Takes down what the gate is about to be told.
    pub fn before(&mut self, event: &Event) {
        if let Event::Mapped { job, result: MapResult::Refused { .. } | MapResult::Unknown { .. } } = *event
            && let Some(iova) = self.told.map_of(job)
            && let Some(region) = self.truth.regions.iter_mut().find(|region| region.iova().overlaps(iova))
        {
            region.doomed |= region.stage == Stage::Adding;
        }
        self.told.event(event);
        if let Event::Converted { invalidation, .. } = event {
            self.converting.remove(invalidation);
        }
        match *event {
            Event::AddRegion { caller, spec } => {
                self.ask(caller, Ask::Add { spec, region: None }, u64::MAX);
            }
            Event::RemoveRegion { caller, region } => {
                let due = self.policy.close_deadline_ns.max(SHORTEST);
                self.ask(caller, Ask::Remove { region }, due);
            }
            Event::Begin { caller, ref ranges, deadline_ns, .. } => {
                let ranges = ranges.clone();
                self.ask(caller, Ask::Begin { ranges, id: None }, deadline_ns.max(SHORTEST));
            }
            Event::End { caller, invalidation, outcome } => {
                let counts = self
                    .truth
                    .open(invalidation)
                    .is_some_and(|open| open.phase == Phase::Granted && open.caller.client == caller.client);
                self.ask(caller, Ask::End { invalidation, outcome, counts }, 5);
                if counts {
                    self.owner_did(invalidation, outcome);
                }
            }
            Event::Converted { invalidation, outcome }
                if self.truth.open(invalidation).is_some_and(|open| open.phase == Phase::Converting) =>
            {
                self.converted.insert(invalidation, outcome);
                self.owner_did(invalidation, outcome);
            }
            Event::Expired { invalidation, rung } => {
                self.hurried.insert(invalidation);
                if let Some(open) = self.truth.open(invalidation) {
                    open.out_of_time |= rung == Step::Reset;
                }
                for death in &mut self.deaths {
                    death.overdue |= death.closings.contains(&invalidation);
                }
            }
            Event::Insists { client } => _ = self.insisting.insert(client),
            Event::ClientGone { client } => self.gone(client),
            Event::Quarantine { file, range, invalidation, reason } => {
                self.earlier = self.earlier.max(invalidation.0);
                // Only a person can end it, whatever its cause was.
                let keeps = reason.cause == Cause::ClientGone;
                let reason =
                    Reason { cause: if keeps { reason.cause } else { Cause::OwnerUnknown }, ..reason };
                let Some(entry) = self.truth.file(file) else { return };
                entry.held = true;
                for range in entry.free_of_quarantine(range) {
                    entry.quarantine.push(Held { range, reason, since: invalidation, lasts: true });
                }
                self.truth.become_state(&[(file, range)], PageState::Unknown);
            }
            Event::Release { caller, invalidation, to } => {
                self.freed = true;
                self.vouch(caller, invalidation, to);
            }
            _ => {}
        }
    }

    /// A person says what the pages are that an invalidation left in quarantine.
    fn vouch(&mut self, caller: Caller, since: InvalidationId, to: PageState) {
        if self.converting.contains(&since) && self.truth.open(since).is_none() {
            return self.ask(caller, Ask::Release { bytes: 0, hangs: true, reached: false }, 0);
        }
        if to != PageState::Shared && self.reached(since) {
            return self.ask(caller, Ask::Release { bytes: 0, hangs: false, reached: true }, 0);
        }
        let mut released = Vec::new();
        for file in &mut self.truth.files {
            let mine = file.quarantine.iter().filter(|held| held.since == since).map(|held| held.range);
            let mine: Vec<_> = mine.collect();
            file.vouched.extend(mine.iter().map(|range| range.start().0..range.end().0));
            released.extend(mine.into_iter().map(|range| (file.id, range)));
        }
        self.truth.become_state(&released, to);
        let bytes = released.iter().map(|(_, range)| range.len()).sum();
        self.owed.released = released;
        self.ask(caller, Ask::Release { bytes, hangs: false, reached: false }, 0);
    }

    /// True while a call that covers some of what an invalidation left in quarantine has not said plainly how it went.
    pub fn under_way(&self, since: InvalidationId) -> bool {
        self.truth.files.iter().any(|file| {
            let mut mine = file.quarantine.iter().filter(|held| held.since == since);
            mine.any(|held| {
                let mut shown = self.truth.aliases(file.id, held.range);
                shown.any(|(_, iova)| self.told.unsettled(iova).is_some() || self.told.shaken(iova))
            })
        })
    }

    /// True while nothing proves that no device reaches what an invalidation left in quarantine.
    pub fn reached(&self, since: InvalidationId) -> bool {
        self.truth.files.iter().any(|file| {
            let mut mine = file.quarantine.iter().filter(|held| held.since == since);
            // Also beside a replace that has not come back.
            let seen = |held: PageRange<Offset>| {
                self.truth.aliases(file.id, held).any(|(_, iova)| self.told.unproved(iova).is_some())
            };
            mine.any(|held| !self.doubtful(file.id, held.range).is_empty() || seen(held.range))
        })
    }

    fn ask(&mut self, caller: Caller, ask: Ask, within: u64) {
        let due = self.now.saturating_add(within);
        self.asked.insert(caller.cookie, Asked { caller, ask, due });
    }

    /// The memory is what the owner made of it.
    fn owner_did(&mut self, id: InvalidationId, outcome: Outcome) {
        let Some((pages, to)) = self.truth.open(id).map(|open| (open.pages.clone(), open.to)) else { return };
        match outcome {
            Outcome::Committed => self.truth.become_state(&pages, to),
            Outcome::NotCommitted => {}
            Outcome::Unknown { .. } => self.truth.become_state(&pages, PageState::Unknown),
        }
    }

    fn gone(&mut self, client: ClientId) {
        let own = |asked: &Asked| asked.caller.client == client;
        self.orphans.extend(self.asked.values().filter(|asked| own(asked)).map(|asked| asked.caller.cookie));
        self.asked.retain(|_, asked| !own(asked));
        let (over, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.truth.open)
            .into_iter()
            .partition(|open| open.caller.client == client && open.phase != Phase::Converting);
        self.truth.open = rest;
        for open in over.into_iter().filter(|open| open.phase == Phase::Granted) {
            self.truth.become_state(&open.pages, PageState::Unknown);
            self.truth.grant(&open.pages, false);
            self.owed.quarantine.extend(open.pages);
        }
        let mut regions = Vec::new();
        let mut owned = false;
        for region in self.truth.regions.iter_mut().filter(|region| region.owner == client) {
            if region.stage != Stage::Closing && !region.doomed {
                regions.push(region.id);
            }
            owned = true;
            region.stage = Stage::Closing;
        }
        if owned {
            let (fences, closings) = Default::default();
            self.dying = true;
            self.deaths.push(Death { client, regions, fences, closings, overdue: false });
        }
    }

    /// Judges what the effects of one event owe each other.
    pub fn after(&mut self, event: &Event) -> Kept {
        let owed = std::mem::take(&mut self.owed);
        self.dying = false;
        if let Some(id) = owed.notice.iter().find(|id| !owed.noticed.contains(id)) {
            broken!(6, "{id:?} was not granted, and no notice says so");
        }
        for (id, range) in owed.quarantine {
            let Some(file) = self.truth.file(id) else { continue };
            if !file.quarantined_whole(range) {
                broken!(
                    6,
                    "what became of {range:?} is not known, and it was given up, yet it is not in quarantine"
                );
            }
        }
        if let Some((file, range)) = owed.released.first() {
            broken!(6, "{range:?} of {file:?} was released, and nobody was told");
        }
        if let Event::ClientGone { client } = *event {
            self.devices_stop(client)?;
        }
        Ok(())
    }

    /// What of these pages is in doubt now, in some domain at some alias.
    pub fn doubtful(&self, id: FileId, range: PageRange<Offset>) -> Vec<PageRange<Offset>> {
        let mut parts = Vec::new();
        for (region, iova) in self.truth.aliases(id, range) {
            for told in self.told.domains.values() {
                parts.extend(told.doubtful(&crate::told::span(iova)).into_iter().filter_map(|part| {
                    let start = part.start - region.iova().start().0 + region.spec.backing.offset.0;
                    PageRange::new(start, part.end - part.start).ok()
                }));
            }
        }
        parts
    }

    /// Every device that can be stopped is being stopped, now that a client with memory is gone.
    fn devices_stop(&mut self, client: ClientId) -> Kept {
        if !self.deaths.iter().any(|death| death.client == client && !death.regions.is_empty()) {
            return Ok(());
        }
        let resets = self.insisting.contains(&client) || self.policy.on_stuck_dma.allows().has(Step::Reset);
        for (id, device) in &self.told.devices {
            let can = |step: Step| device.steps.has(step);
            let spared = device.nature.tdi && !self.policy.end_tdi;
            let any = can(Step::Drain)
                || can(Step::Stop)
                || can(Step::Detach)
                || (can(Step::Master) && !spared)
                || (can(Step::Reset) && resets && !spared);
            if any && device.busy == 0 && device.fenced.is_none() {
                broken!(8, "{client:?} is gone, and {id:?} of {:?} goes on", device.domain);
            }
        }
        Ok(())
    }

    /// Who waits longer than he was promised.
    pub fn overdue(&self) -> Kept {
        match self.asked.values().find(|asked| asked.due < self.now) {
            Some(asked) => broken!(4, "at {} ns no answer yet to {asked:?}", self.now),
            None => Ok(()),
        }
    }

    /// Everything that was under way is over: nobody may be left waiting, whatever is still open.
    pub fn quiet(&self) -> Kept {
        match self.asked.values().next() {
            None => Ok(()),
            Some(asked) => {
                let promise = if matches!(asked.ask, Ask::Begin { .. }) { 4 } else { 3 };
                broken!(promise, "nothing is under way, and nobody answers {asked:?}")
            }
        }
    }

    /// The gate's own picture must be this one.
    pub fn compare(&self, snapshot: &Snapshot) -> Kept {
        for one in &snapshot.mappings {
            if one.used > one.limit {
                broken!(7, "more mappings than there may be: {one:?}");
            }
        }
        if snapshot.regions.len() > self.policy.max_regions as usize {
            broken!(7, "{} regions, of {} at most", snapshot.regions.len(), self.policy.max_regions);
        }
        let mine =
            self.truth.files.iter().flat_map(|file| file.quarantine.iter().map(|q| (file.id, q.range)));
        let (mut mine, mut its): (Vec<_>, Vec<_>) =
            (mine.collect(), snapshot.quarantine.iter().map(|q| (q.file, q.range)).collect());
        mine.sort_unstable();
        its.sort_unstable();
        if mine != its {
            broken!(6, "announced as quarantined: {mine:?}; kept as quarantined: {its:?}");
        }
        if snapshot.open != self.truth.open.len() as u64 {
            broken!(4, "{} invalidations are open, the gate says {}", self.truth.open.len(), snapshot.open);
        }
        let mut mine: Vec<RegionId> = self.truth.regions.iter().map(|region| region.id).collect();
        mine.sort_unstable();
        if !snapshot.regions.iter().map(|region| region.region).eq(mine.iter().copied()) {
            broken!(8, "regions {mine:?}, the gate has {:?}", snapshot.regions);
        }
        for status in &snapshot.regions {
            let file = self.truth.files.iter().find(|file| file.id == status.spec.backing.file);
            let mine = file.and_then(|file| file.bytes(&self.truth.regions, status.region));
            if let Some(mine) = mine.filter(|mine| *mine != status.bytes) {
                broken!(2, "{status:?}, but by state its pages are {mine:?} bytes");
            }
        }
        for status in &snapshot.devices {
            let told = self.told.devices.get(&status.device);
            let differs = |device: &crate::told::Device| {
                (device.fenced, device.nature) != (status.fenced, status.nature)
                    || (status.lost && !device.lost)
            };
            if told.is_none_or(differs) {
                broken!(2, "{status:?}, but it was told {told:?}");
            }
        }
        Ok(())
    }

    /// Whether a quarantine of this cause outlasts every proof about mappings.
    pub fn lasts(&self, since: InvalidationId, reason: Reason) -> bool {
        matches!(reason.cause, Cause::OwnerUnknown | Cause::ClientGone) || since.0 <= self.earlier
    }
}
