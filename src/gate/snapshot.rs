//! What is known now, for `status`.

use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, PAGE, PageRange};

use super::event::{ClientId, DeviceId, DomainId, FileId, InvalidationId, RegionId, RegionSpec};
use super::fence::{Nature, Step};
use super::ledger::HeldBy;
use super::region::Region;
use super::verdict::Reason;
use super::{FilePages, Gate};

/// The state of a gate at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The regions.
    pub regions: Vec<RegionStatus>,
    /// The devices.
    pub devices: Vec<DeviceStatus>,
    /// What must not be handed out.
    pub quarantine: Vec<QuarantineStatus>,
    /// Invalidations begun and not ended.
    pub open: u64,
    /// Kernel mappings, per domain.
    pub mappings: Vec<MappingStatus>,
    /// Bytes that devices may reach, over all domains.
    pub pinned: u64,
}

/// The kernel mappings of one domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingStatus {
    /// The domain.
    pub domain: DomainId,
    /// In use, or about to be.
    pub used: u64,
    /// That open invalidations may yet need.
    pub reserved: u64,
    /// At the worst that conversions can make of the regions: every other page gone, or each by itself where pages are
    /// mapped so.
    pub worst: u64,
    /// That there can be; `u64::MAX` where only memory is counted.
    pub limit: u64,
}

/// One region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionStatus {
    /// Its name.
    pub region: RegionId,
    /// Its owner.
    pub owner: ClientId,
    /// As it was described.
    pub spec: RegionSpec,
    /// Bytes per kernel mapping, in each domain.
    pub pieces: Vec<u64>,
    /// Bytes shared, private, hole and unknown.
    pub bytes: [u64; 4],
    /// Whether it is being closed.
    pub closing: bool,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its name.
    pub device: DeviceId,
    /// Its domain.
    pub domain: DomainId,
    /// The fence that it is under; none while its DMA works.
    pub fenced: Option<Step>,
    /// True while it could not be brought back: whether its DMA works is not known.
    pub lost: bool,
    /// What bears on its fences, as it was last read.
    pub nature: Nature,
}

/// One quarantined range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuarantineStatus {
    /// The file.
    pub file: FileId,
    /// The pages.
    pub range: PageRange<Offset>,
    /// Why.
    pub reason: Reason,
    /// Since which invalidation.
    pub invalidation: InvalidationId,
}

impl Gate {
    /// What is known now. Costs by regions and holds, not by pages.
    pub fn snapshot(&self) -> Snapshot {
        let regions = self.regions.iter().map(|(id, region)| self.region_status(*id, region));
        let devices = self.devices.iter().map(|(id, device)| DeviceStatus {
            device: *id,
            domain: device.domain,
            fenced: device.fenced,
            lost: device.lost,
            nature: device.nature,
        });
        Snapshot {
            regions: regions.collect(),
            devices: devices.collect(),
            quarantine: self.quarantined_ranges().collect(),
            open: self.invalidations.values().filter(|inv| inv.is_conversion()).count() as u64,
            mappings: (0..self.domains.len()).map(|index| self.mappings(index)).collect(),
            pinned: self.domains.iter().map(|domain| domain.mapped.bytes()).sum(),
        }
    }

    /// All that is in quarantine.
    pub fn quarantined_ranges(&self) -> impl Iterator<Item = QuarantineStatus> + '_ {
        self.files.iter().flat_map(|(file, entry)| {
            entry.holds.iter().filter_map(|(range, by)| match by {
                HeldBy::Open(_) => None,
                HeldBy::Quarantine(invalidation, reason) => {
                    Some(QuarantineStatus { file: *file, range, reason, invalidation })
                }
            })
        })
    }

    /// The number of regions, also of those that are being closed.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    pub(super) fn region_status(&self, id: RegionId, region: &Region) -> RegionStatus {
        let FilePages { file, range, .. } = region.pages_at(region.iova());
        let pages = self.files.get(&file).map_or([0; 4], |entry| entry.pages.counts(range));
        RegionStatus {
            region: id,
            owner: region.owner,
            spec: region.spec,
            pieces: region.pieces.clone(),
            bytes: pages.map(|pages| pages * PAGE),
            closing: region.closing,
        }
    }

    fn mappings(&self, index: usize) -> MappingStatus {
        let domain = &self.domains[index];
        let worst = |region: &Region| {
            let pages = region.spec.gpa.pages();
            let piece = region.pieces.get(index).copied().unwrap_or(PAGE);
            // Where pages are never mapped by themselves, neighbours share a mapping until every other one is gone.
            let singly = piece == PAGE || (!domain.able.cut && self.windows(domain.id));
            if singly { pages } else { pages.div_ceil(2).max(region.spec.gpa.len().div_ceil(piece) + 1) }
        };
        MappingStatus {
            domain: domain.id,
            used: domain.mapped.objects(),
            reserved: domain.reserved,
            worst: self.regions.values().map(worst).sum(),
            limit: domain.able.max_mappings,
        }
    }

    /// Where the guest sees the first of these pages, while a region covers it.
    pub fn gpa_of(&self, file: FileId, range: PageRange<Offset>) -> Option<Gpa> {
        self.aliases(file, range).next().map(|iova| Gpa(iova.start().0))
    }
}
