//! THE HEART. Pure: no system call, no clock, no thread, no log. An event in, effects out.
//!
//! Principles that every file here keeps:
//! - *Done is read off the ledger.* An invalidation is granted when no mapping in any state overlaps it, in any
//!   domain, at any alias. There is no second bookkeeping that could disagree.
//! - *A mapping leaves the ledger only by proof*: an unmap that returned its full length with nothing in flight.
//! - *What should be mapped is derived*, never queued: shared pages, of a region, that nothing holds.
//!
//! [`Gate::handle`] is the one way in; the daemon, the property tests and `replay` all go through it.

mod admits;
pub mod adopt;
mod cached;
mod canonical;
mod clearing;
pub mod effect;
mod ending;
pub mod event;
pub mod fence;
pub mod hitless;
mod insists;
mod invalidation;
mod ladder;
pub mod ledger;
mod look;
mod merge;
mod pause;
mod person;
mod plan;
mod ranges;
pub mod receipt;
mod region;
mod results;
pub mod resume;
mod snapshot;
mod stop;
pub mod verdict;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

pub use admits::Admits;
pub use adopt::{ORPHANS, Unended};
pub use effect::{Answer, Effect, Effects, FilePages, Notice};
pub use event::{
    Backing, Caller, ClientId, DeviceId, DomainId, Door, Event, FileId, InvalidationId, JobId, MapResult,
    Outcome, Performer, RegionId, RegionSpec, Said, UnmapResult, Word,
};
pub use fence::{Nature, OnStuckDma, Platform, Step, Steps};
pub use hitless::{Able, Hitless};
pub use ledger::HeldBy;
pub use ledger::PageState;
pub(crate) use plan::{JOB_BYTES, JOB_OBJECTS};
pub use ranges::{Ranges, RangesError};
pub use receipt::{Evidence, Receipt};
pub use resume::{Past, Written};
pub use snapshot::{DeviceStatus, MappingStatus, QuarantineStatus, RegionStatus, Snapshot};
pub use verdict::{Cause, Reason, Refusal, Verdict};

use clearing::Clearing;
use invalidation::Invalidation;
use ledger::{Holds, Mapped, PageMap, Run, Store};
use merge::Frayed;
use region::Region;
use stop::DeviceEntry;

/// What a gate is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// How far to go by itself when DMA does not stop.
    pub on_stuck_dma: OnStuckDma,
    /// What counts as proof.
    pub platform: Platform,
    /// Whether a fence may end a TDI ([`Nature::tdi`]).
    pub end_tdi: bool,
    /// Whether DMA beside a page that goes may miss a moment.
    pub hitless: Hitless,
    /// Regions at most, over all clients.
    pub max_regions: u32,
    /// Invalidations that one client may have open at most.
    pub max_open: u32,
    /// Guest memory at most, in bytes, over all clients.
    pub max_memory: u64,
    /// How long a region may take to close before its stuck parts are quarantined, in nanoseconds.
    pub close_deadline_ns: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            on_stuck_dma: OnStuckDma::Refuse,
            platform: Platform::default(),
            end_tdi: false,
            hitless: Hitless::default(),
            max_regions: 512,
            max_open: 65_536,
            max_memory: 1 << 44,
            close_deadline_ns: 2_000_000_000,
        }
    }
}

/// What is known of one file: the state of its pages, what may not be mapped, and where it shows.
#[derive(Debug)]
struct FileEntry {
    pages: PageMap,
    holds: Holds,
    regions: Vec<RegionId>,
}

impl FileEntry {
    /// Of a file of which nothing is known but what `store` has. Where it has no room, its states end with this process.
    fn of(store: Option<&Store>, file: FileId) -> Self {
        let kept = store.and_then(|store| PageMap::in_store(store, file).ok());
        Self { pages: kept.unwrap_or_default(), holds: Holds::default(), regions: Vec::new() }
    }
}

/// One IOVA domain.
#[derive(Debug)]
struct DomainEntry {
    id: DomainId,
    able: Able,
    mapped: Mapped,
    /// Kernel mappings that open invalidations may yet need.
    reserved: u64,
    frayed: Frayed,
}

/// A result that the gate waits for.
#[derive(Debug, Clone, Copy)]
enum Job {
    /// A map over `iova` of `region`; `rest` is mapped after it.
    Map { domain: DomainId, region: RegionId, iova: PageRange<Iova>, rest: Option<PageRange<Iova>> },
    /// An unmap over `iova`, of which `already` bytes were reported gone before (none where nobody knows how many were
    /// mapped); `invalidation` asked for it.
    Unmap { domain: DomainId, iova: PageRange<Iova>, already: Option<u64>, invalidation: InvalidationId },
    /// One call over every run that is [`ledger::RunState::Removing`] by it; `invalidation` asked for it.
    Replace { domain: DomainId, invalidation: InvalidationId },
    /// An unmap of whatever an earlier process left at `iova`.
    Settle { domain: DomainId, iova: PageRange<Iova> },
    /// A fence on `device`; `invalidation` asked for it first.
    Fence { device: DeviceId, domain: DomainId, step: Step, invalidation: InvalidationId },
    /// `device` on its way back.
    Attach { device: DeviceId },
}

/// The gate of one VM.
#[derive(Debug)]
pub struct Gate {
    policy: Policy,
    domains: Vec<DomainEntry>,
    devices: BTreeMap<DeviceId, DeviceEntry>,
    files: BTreeMap<FileId, FileEntry>,
    regions: BTreeMap<RegionId, Region>,
    /// Where the guest sees each region.
    layout: BTreeMap<Gpa, RegionId>,
    invalidations: BTreeMap<InvalidationId, Invalidation>,
    /// Those of them that wait for proof.
    clearing: Clearing,
    jobs: BTreeMap<JobId, Job>,
    /// What the replaces under way take out.
    replacing: BTreeMap<JobId, Vec<PageRange<Iova>>>,
    /// Conversions of passgate's own that were given up and have not returned.
    hanging: BTreeSet<InvalidationId>,
    open_by_client: BTreeMap<ClientId, u32>,
    /// Clients that are gone and still have regions to close.
    leaving: Vec<ClientId>,
    /// Clients that cannot be told no.
    insisting: BTreeSet<ClientId>,
    last_region: u32,
    last_invalidation: u64,
    /// The highest invalidation from which an earlier daemon's quarantine dates.
    last_of_earlier: u64,
    /// Conversions that were open when an earlier daemon ended and are not settled, with the client that has adopted
    /// their memory; [`ORPHANS`] while nobody has.
    unended: BTreeMap<InvalidationId, ClientId>,
    last_job: u64,
    /// Where page states outlive this gate; none where they need not.
    store: Option<Store>,
}

impl Gate {
    /// A gate without domains, devices or memory.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            domains: Vec::new(),
            devices: BTreeMap::new(),
            files: BTreeMap::new(),
            regions: BTreeMap::new(),
            layout: BTreeMap::new(),
            invalidations: BTreeMap::new(),
            clearing: Clearing::default(),
            jobs: BTreeMap::new(),
            replacing: BTreeMap::new(),
            hanging: BTreeSet::new(),
            open_by_client: BTreeMap::new(),
            leaving: Vec::new(),
            insisting: BTreeSet::new(),
            last_region: 0,
            last_invalidation: 0,
            last_of_earlier: 0,
            unended: BTreeMap::new(),
            last_job: 0,
            store: None,
        }
    }

    /// Takes one event; appends to `effects` what it wants done, in order.
    pub fn handle(&mut self, event: Event, effects: &mut Effects) {
        match event {
            Event::DomainAdded { domain, able } => {
                if self.domain(domain).is_none() {
                    let kept = self.store.as_ref().and_then(|store| Mapped::in_store(store, domain).ok());
                    let (mapped, frayed) = (kept.unwrap_or_default(), Frayed::default());
                    self.domains.push(DomainEntry { id: domain, able, mapped, reserved: 0, frayed });
                }
            }
            Event::DeviceAdded { device, domain, steps, nature } => {
                self.add_device(device, domain, steps, nature);
            }
            Event::AddRegion { caller, spec } => self.add_region(caller, spec, effects),
            Event::RemoveRegion { caller, region } => self.remove_region(caller, region, effects),
            Event::Begin { caller, ranges, to, performer, deadline_ns } => {
                self.begin(caller, ranges, to, performer, deadline_ns, effects);
            }
            Event::End { caller, invalidation, outcome } => self.end(caller, invalidation, outcome, effects),
            Event::Converted { invalidation, outcome } => self.converted(invalidation, outcome, effects),
            Event::Mapped { job, result } => self.mapped(job, result, effects),
            Event::Unmapped { job, result, took_ns } => self.unmapped(job, result, took_ns, effects),
            Event::Released { job } => self.released(job, effects),
            Event::Fenced { job, errno, took_ns } => self.fenced(job, errno, took_ns, effects),
            Event::Attached { job, errno } => self.attached(job, errno, effects),
            Event::DeviceNature { device, ats, tdi } => self.device_nature(device, ats, tdi, effects),
            Event::Expired { invalidation, rung } => self.expired(invalidation, rung, effects),
            Event::Quiet => self.quiet(effects),
            Event::ClientGone { client } => self.client_gone(client, effects),
            Event::Quarantine { file, range, invalidation, reason } => {
                self.keep_quarantine(file, range, invalidation, reason);
            }
            Event::Release { caller, invalidation, to } => {
                self.let_go(caller, invalidation, to, effects);
            }
            Event::Adopt { caller } => self.adopt(caller, effects),
            Event::Insists { client } => self.insist(client),
        }
        self.bring_back(effects);
    }

    fn domain(&self, domain: DomainId) -> Option<&DomainEntry> {
        self.domains.iter().find(|entry| entry.id == domain)
    }

    /// Every run over any of `ranges`, in every domain; twice where two ranges share it.
    fn runs_over(&self, ranges: &[PageRange<Iova>]) -> Vec<(DomainId, Run)> {
        let mut found = Vec::new();
        for domain in &self.domains {
            for range in ranges {
                found.extend(domain.mapped.runs(*range).map(|run| (domain.id, run)));
            }
        }
        found
    }

    fn entry(&mut self, domain: DomainId) -> Option<&mut DomainEntry> {
        self.domains.iter_mut().find(|entry| entry.id == domain)
    }

    fn mapped_in(&mut self, domain: DomainId) -> Option<&mut Mapped> {
        self.entry(domain).map(|entry| &mut entry.mapped)
    }

    fn next_job(&mut self, job: Job) -> JobId {
        self.last_job += 1;
        let id = JobId(self.last_job);
        self.jobs.insert(id, job);
        id
    }

    /// The region at `gpa`.
    fn region_at(&self, gpa: Gpa) -> Option<&Region> {
        let (_, id) = self.layout.range(..=gpa).next_back()?;
        self.regions.get(id).filter(|region| region.spec.gpa.contains(gpa))
    }

    /// Every IOVA range at which `range` of `file` shows, over all regions.
    fn aliases(&self, file: FileId, range: PageRange<Offset>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let regions = self.files.get(&file).map_or(&[][..], |entry| &entry.regions);
        regions.iter().filter_map(move |id| self.regions.get(id)?.iova_of(range))
    }

    /// The pages of files that an IOVA range stands for; runs never leave their region, ranges may.
    fn files_at(&self, iova: PageRange<Iova>) -> Vec<FilePages> {
        let mut pages = Vec::new();
        let before = self.layout.range(..=Gpa(iova.start().raw())).next_back();
        let from = before.map_or(Gpa(iova.start().raw()), |(gpa, _)| *gpa);
        for (_, id) in self.layout.range(from..Gpa(iova.end().raw())) {
            if let Some(region) = self.regions.get(id)
                && let Some(part) = region.iova().intersection(iova)
            {
                pages.push(region.pages_at(part));
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests;
