//! How one page leaves a large mapping: what the domain can do, and what its devices bear.
//!
//! | way | needs | the neighbours' DMA |
//! |---|---|---|
//! | *cut* | a domain that cuts (small IOMMU pages) | goes on |
//! | *page* | nothing: pages are mapped one by one | goes on, at the price of a kernel mapping per page |
//! | *replace* | a domain with a second page table | misses a moment: the devices are paused for it, or bear it |
//! | *split* | nothing: the mapping goes, the rest comes back | misses a moment for each mapping: as with *replace* |
//!
//! A *window* is the moment in which a neighbour that should be mapped is not. [`Hitless`] says what of it is allowed.

use serde::{Deserialize, Serialize};

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::event::{DomainId, InvalidationId, RegionId, RegionSpec};
use super::fence::Step;
use super::invalidation::Invalidation;
use super::ledger::mapped::objects;
use super::region::within_budget;
use super::stop::DeviceEntry;
use super::verdict::Refusal;
use super::{DomainEntry, Gate};

/// What a domain can do, as it was probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Able {
    /// Kernel mappings that it can hold.
    pub max_mappings: u64,
    /// Longest kernel mapping, in bytes.
    pub max_piece: u64,
    /// Whether an unmap may begin and end inside mappings, whose rest stays mapped without a break.
    pub cut: bool,
    /// Whether it can do [`super::Effect::Replace`].
    pub replace: bool,
}

/// Whether the DMA of neighbours may miss a moment when a page leaves a large mapping (`--hitless`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hitless {
    /// Never: what cannot be cut is mapped page by page, and what cannot be done so is refused when memory is added.
    Require,
    /// No DMA is lost, but devices may be paused: drained or stopped while a mapping is split, and let go on.
    #[default]
    Prefer,
    /// DMA beside a page that goes may fault for a moment.
    Off,
}

/// The largest mappings where a page is cut out of them: a conversion that meets one being made does not wait long.
const LARGE: u64 = 64 << 20;
/// The mappings that are split where windows are no matter, unless there is no room for so many: a window is no longer
/// than one takes to map.
const SPLIT: u64 = 2 << 20;

impl Gate {
    /// Whether windows are allowed in a domain: by policy, and by what its devices bear or can do.
    pub(super) fn windows(&self, domain: DomainId) -> bool {
        match self.policy.hitless {
            Hitless::Require => false,
            Hitless::Prefer => self.devices.values().filter(|d| d.domain == domain).all(bears),
            Hitless::Off => true,
        }
    }

    /// Bytes per kernel mapping of a region that is to come, in one domain; or why it cannot.
    pub(super) fn choose(&self, domain: &DomainEntry, spec: &RegionSpec) -> Result<u64, Refusal> {
        let able = domain.able;
        let longest = 1 << able.max_piece.max(PAGE).ilog2();
        let splits = !able.cut && self.windows(domain.id);
        let used = domain.mapped.objects();
        let needed = |piece: u64| used + spec.gpa.len().div_ceil(piece) + 1;
        let piece = match spec.piece {
            0 if able.cut => LARGE.max(spec.page).min(longest),
            0 if splits => {
                // Page by page while there is room for it, unless windows are no matter.
                let least = if self.policy.hitless == Hitless::Off { SPLIT.max(spec.page) } else { PAGE };
                let mut piece = least.min(longest);
                // Half of the room is for what conversions leave.
                while needed(piece) > able.max_mappings / 2 && piece < longest {
                    piece *= 2;
                }
                piece
            }
            0 => PAGE,
            piece => piece.min(longest),
        };
        if piece > PAGE && !able.cut && !splits {
            return Err(Refusal::Window { piece });
        }
        within_budget("mappings", needed(piece) + domain.reserved, able.max_mappings)?;
        Ok(piece)
    }

    /// Kernel mappings that an invalidation of `targets` may leave more than there are, in the domain where it leaves
    /// most; refused where there is no room, before anything is changed.
    pub(super) fn room(&self, targets: &[PageRange<Iova>]) -> Result<u64, Refusal> {
        let mut most = 0;
        for (index, domain) in self.domains.iter().enumerate() {
            // A domain that counts memory and not mappings has room for all.
            if domain.able.max_mappings == u64::MAX {
                continue;
            }
            let more: u64 = targets.iter().map(|target| self.more(index, domain, *target)).sum();
            let needed = domain.mapped.objects().saturating_add(domain.reserved).saturating_add(more);
            within_budget("mappings", needed, domain.able.max_mappings)?;
            most = most.max(more);
        }
        Ok(most)
    }

    /// How many more there are at most, once all of `target` is mapped by itself and its neighbours are cut off; and where it
    /// is cut out, until what is between its ends has gone.
    fn more(&self, index: usize, domain: &DomainEntry, target: PageRange<Iova>) -> u64 {
        let piece = self.region_at(Gpa(target.start().raw())).and_then(|region| region.pieces.get(index));
        let all = objects(target, piece.copied().unwrap_or(PAGE));
        let splits = domain.mapped.whole(target) != target || domain.mapped.fills_around(target);
        let ends = 2 * u64::from(splits);
        let after = (all + ends).saturating_sub(domain.mapped.starts(target));
        if domain.able.cut { after.max(ends) } else { after }
    }

    /// Keeps room for a region that is being added, and for what of it must wait for the end of an invalidation.
    pub(super) fn promise(&mut self, id: RegionId) {
        let Some(region) = self.regions.get_mut(&id) else { return };
        let iova = region.iova();
        region.promised = region.pieces.iter().map(|piece| objects(iova, *piece)).collect();
        for (domain, kept) in self.domains.iter_mut().zip(&region.promised) {
            domain.reserved += kept;
        }
        let Some(region) = self.regions.get(&id) else { return };
        let least = region.pieces.iter().copied().min().unwrap_or(PAGE);
        let pages = region.pages_at(iova);
        let over = |inv: &Invalidation| -> u64 {
            let parts = inv.pages.iter().filter(|part| part.file == pages.file);
            parts.filter_map(|part| region.iova_of(part.range)).map(|iova| objects(iova, least)).sum()
        };
        let wait: Vec<_> = self.invalidations.iter().map(|(id, inv)| (*id, over(inv))).collect();
        wait.into_iter().filter(|(_, more)| *more > 0).for_each(|(id, more)| self.reserve(id, more));
    }

    /// So many mappings of a region are being made: if room was kept for them, it is used now.
    pub(super) fn kept(&mut self, domain: DomainId, region: RegionId, objects: u64) {
        let Some(index) = self.domains.iter().position(|entry| entry.id == domain) else { return };
        let promised = self.regions.get_mut(&region).and_then(|region| region.promised.get_mut(index));
        if let Some(promised) = promised {
            let used = objects.min(*promised);
            *promised -= used;
            self.domains[index].reserved -= used;
        }
    }

    /// Keeps room for `objects` more mappings until the invalidation is over.
    pub(super) fn reserve(&mut self, id: InvalidationId, objects: u64) {
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.reserved += objects;
            self.domains.iter_mut().for_each(|domain| domain.reserved += objects);
        }
    }
}

/// How a device is paused, where it can be.
pub(super) fn pause(device: &DeviceEntry) -> Option<Step> {
    [Step::Drain, Step::Stop].into_iter().find(|step| device.steps.has(*step))
}

/// Whether a window does a device no harm.
fn bears(device: &DeviceEntry) -> bool {
    device.nature.tolerant || pause(device).is_some()
}
