//! The state of the gate, for `status`, metrics and the records that outlive the process.

use passgate_backends::{DeviceTraits, Step};
use passgate_bindings::units::{LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::Gate;
use super::effect::FilePages;
use super::event::RegionSpec;
use super::ids::{ClientId, DeviceId, DomainId, FileId, InvalidationId, RegionId};
use super::ledger::ExcludedBy;
use super::memory::Region;
use super::verdict::Reason;

/// The state of a gate at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All regions.
    pub regions: Vec<RegionStatus>,
    /// All devices.
    pub devices: Vec<DeviceStatus>,
    /// All quarantined ranges.
    pub quarantine: Vec<QuarantineStatus>,
    /// The number of conversions that have begun and not ended.
    pub open: u64,
    /// The kernel mappings, by domain.
    pub mappings: Vec<MappingStatus>,
    /// Bytes that devices may reach, over all domains.
    pub pinned: u64,
    /// The number of contradictions that the gate has found in its own records ([`super::Notice::Inconsistent`]).
    pub inconsistencies: u64,
}

/// The kernel mappings of one domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingStatus {
    /// The domain.
    pub domain: DomainId,
    /// The number in use, or about to be.
    pub used: u64,
    /// The number that open invalidations may yet need.
    pub reserved: u64,
    /// The number at the worst that conversions can make of the regions: every other page gone, or each page by itself where pages
    /// are mapped so.
    pub worst: u64,
    /// The maximum; `u64::MAX` where only memory is counted.
    pub limit: u64,
}

/// One region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionStatus {
    /// Its number.
    pub region: RegionId,
    /// Its owner.
    pub owner: ClientId,
    /// As it was described.
    pub spec: RegionSpec,
    /// Bytes per kernel mapping, in each domain.
    pub pieces: Vec<u64>,
    /// Bytes shared, private, hole and unknown.
    pub bytes: [u64; 4],
    /// True while it is being closed.
    pub closing: bool,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its number.
    pub device: DeviceId,
    /// Its domain.
    pub domain: DomainId,
    /// The fence that it is under; none while its DMA works.
    pub fenced: Option<Step>,
    /// True while its attach has failed: it is not known if its DMA works.
    pub lost: bool,
    /// Its ATS and TDI state, as it was last read.
    pub traits: DeviceTraits,
}

/// One quarantined range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuarantineStatus {
    /// The file.
    pub file: FileId,
    /// The pages.
    pub range: PageRange<Offset>,
    /// The reason.
    pub reason: Reason,
    /// The invalidation since which it is in quarantine.
    pub invalidation: InvalidationId,
}

impl Gate {
    /// Returns the state now. Costs by regions and exclusions, not by pages.
    pub fn snapshot(&self) -> Snapshot {
        let devices = self.devices.iter().map(|(id, device)| DeviceStatus {
            device: id,
            domain: device.domain(),
            fenced: device.fence(),
            lost: device.is_lost(),
            traits: device.traits(),
        });
        let mappings = self.mappings.iter();
        Snapshot {
            regions: self.memory.regions().map(|(id, region)| self.region_status(id, region)).collect(),
            devices: devices.collect(),
            quarantine: self.quarantined_ranges().collect(),
            open: self.invalidations.iter().filter(|(_, inv)| inv.is_conversion()).count() as u64,
            mappings: mappings.map(|d| d.status(&self.memory, self.gaps_allowed(d.id()))).collect(),
            pinned: self.mappings.bytes(),
            inconsistencies: self.inconsistencies,
        }
    }

    /// Returns the number of regions, also of those that are being closed.
    pub fn region_count(&self) -> usize {
        self.memory.regions().count()
    }

    /// Returns true while a close waits for proof: each ends in time, or goes on as long as it progresses.
    pub fn is_closing(&self) -> bool {
        self.invalidations.closes() > 0
    }

    pub(super) fn region_status(&self, id: RegionId, region: &Region) -> RegionStatus {
        RegionStatus {
            region: id,
            owner: region.owner(),
            spec: *region.spec(),
            pieces: self.mappings.pieces(id),
            bytes: self.memory.state_counts(region.file_pages()).map(|pages| pages * PAGE),
            closing: region.is_closing(),
        }
    }

    /// Returns where the guest sees the first of these pages, while a region covers it.
    pub fn gpa_of(&self, file: FileId, range: PageRange<Offset>) -> Option<Gpa> {
        self.memory.aliases(file, range).next().map(|iova| Gpa(iova.start().0))
    }

    /// True while anything is known of a file.
    pub fn knows(&self, file: FileId) -> bool {
        self.memory.knows(file)
    }

    /// Returns what is live in a domain, in order, neighbours as one.
    pub fn live(&self, domain: DomainId) -> Vec<PageRange<Iova>> {
        let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return Vec::new() };
        self.mappings.get(domain).map(|domain| domain.mapped().live(everywhere).collect()).unwrap_or_default()
    }

    /// Returns the highest numbers so far: of a region, of an invalidation.
    pub fn last(&self) -> (u32, u64) {
        (self.memory.last_region(), self.invalidations.last().0)
    }

    /// True from an invalidation's begin until it is over.
    pub fn is_open(&self, id: InvalidationId) -> bool {
        self.invalidations.is_open(id)
    }

    /// Returns the bytes of all ranges of an open conversion.
    pub fn length_of(&self, id: InvalidationId) -> Option<u64> {
        let inv = self.invalidations.get(id).filter(|inv| inv.is_conversion())?;
        Some(inv.receipt.ranges.len())
    }

    /// Returns the invalidations that are open and were begun after this one.
    pub fn open_since(&self, last: InvalidationId) -> impl Iterator<Item = InvalidationId> + '_ {
        self.invalidations.since(last)
    }

    /// Returns the pages that an open conversion excludes.
    pub fn held_by(&self, id: InvalidationId) -> &[FilePages] {
        self.invalidations.get(id).filter(|inv| inv.is_conversion()).map_or(&[], |inv| &inv.pages)
    }

    /// Returns what excludes pages of this range of a file; each whole.
    pub fn exclusions_over(
        &self,
        file: FileId,
        range: PageRange<Offset>,
    ) -> Vec<(PageRange<Offset>, ExcludedBy)> {
        self.memory.excluded(file).map(|excluded| excluded.overlapping(range).collect()).unwrap_or_default()
    }

    /// Returns the ATS and TDI state of a device, as it was last read.
    pub fn traits(&self, device: DeviceId) -> Option<DeviceTraits> {
        self.devices.get(device).map(|device| device.traits())
    }

    /// Returns the ATS and TDI state of each device, as it was last read.
    pub fn all_traits(&self) -> impl Iterator<Item = (DeviceId, DeviceTraits)> + '_ {
        self.devices.iter().map(|(id, device)| (id, device.traits()))
    }

    /// Returns the devices that are stopped, or on which a call is in progress or requested.
    pub fn stopped(&self) -> impl Iterator<Item = DeviceId> + '_ {
        self.devices.iter().filter(|(_, device)| !device.runs()).map(|(id, _)| id)
    }
}
