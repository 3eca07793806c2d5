//! The size of a region's kernel mappings in one domain, and where they are split for a while.

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::{Domain, Mappings};
use crate::gate::event::RegionSpec;
use crate::gate::ids::RegionId;
use crate::gate::policy::{CUT_MAPPING_BYTES, Hitless, MAX_PAGED_BYTES, SPLIT_MAPPING_BYTES};
use crate::gate::verdict::{Refusal, within_budget};

/// The kernel mappings of one region in one domain.
#[derive(Debug)]
pub(super) struct Shape {
    /// Bytes per kernel mapping; their borders are multiples of it.
    pub(super) piece: u64,
    /// The number of kernel mappings that are kept free for its first maps.
    pub(super) promised: u64,
}

/// Returns the start of the place, on a grid of `piece` bytes, at which `at` lies.
pub(in crate::gate) fn piece_start(at: Iova, piece: u64) -> Iova {
    Iova(at.raw() / piece * piece)
}

impl Domain {
    /// Returns the bytes per kernel mapping of a region.
    pub(in crate::gate) fn piece(&self, region: RegionId) -> Option<u64> {
        self.shapes.get(&region).map(|shape| shape.piece)
    }

    /// Returns the bytes per kernel mapping of a region that is to be added, or why it cannot be. `gaps_allowed`: whether
    /// neighbours of a page that leaves may miss DMA for a moment.
    pub(in crate::gate) fn choose_piece(
        &self,
        spec: &RegionSpec,
        gaps_allowed: bool,
        hitless: Hitless,
    ) -> Result<u64, Refusal> {
        let caps = self.caps;
        let longest = 1 << caps.max_mapping_len.max(PAGE).ilog2();
        let splits = !caps.cut && gaps_allowed;
        let used = self.mapped.mapping_count();
        let needed = |piece: u64| used + spec.gpa.len().div_ceil(piece) + 1;
        let piece = match spec.piece {
            0 if caps.cut => CUT_MAPPING_BYTES.max(spec.page).min(longest),
            0 if splits => {
                // Page by page while there is room for it, unless gaps do not matter.
                let least = if hitless == Hitless::Off { SPLIT_MAPPING_BYTES.max(spec.page) } else { PAGE };
                let mut piece = least.min(longest);
                // Half of the room is for what conversions leave.
                while needed(piece) > caps.max_mappings / 2 && piece < longest {
                    piece *= 2;
                }
                piece
            }
            0 => PAGE,
            piece => piece.min(longest),
        };
        if piece > PAGE && !caps.cut && !splits {
            return Err(Refusal::Gap { piece });
        }
        within_budget("mappings", needed(piece) + self.reserved, caps.max_mappings)?;
        Ok(piece)
    }

    /// Returns the end of the place at `at` where it is mapped page by page for now; none where it is not.
    pub(in crate::gate) fn paged_until(&self, at: Iova, piece: u64) -> Option<Iova> {
        let start = piece_start(at, piece);
        let fits = piece <= MAX_PAGED_BYTES && piece / PAGE <= self.free_mappings();
        (fits && self.fragments.splits_often(start)).then_some(Iova(start.raw() + piece))
    }

    /// Returns the start of the first place in `range` that is mapped page by page; the end of `range` where none is.
    pub(in crate::gate) fn paged_from(&self, range: PageRange<Iova>, piece: u64) -> Iova {
        let first = self.fragments.first_split_often(range);
        first.filter(|at| self.paged_until(*at, piece).is_some()).unwrap_or(range.end())
    }

    /// Pages of `range` come or go: records where its ends lie inside a place on the grid of `piece` bytes.
    pub(in crate::gate) fn record_split(&mut self, range: PageRange<Iova>, piece: u64) {
        if piece == PAGE {
            return;
        }
        let split = !self.caps.cut;
        let last = Iova(range.end().raw() - PAGE);
        for (edge, end) in [(range.start(), range.start()), (last, range.end())] {
            if !end.raw().is_multiple_of(piece) {
                self.fragments.record(piece_start(edge, piece), split);
            }
        }
    }
}

impl Mappings {
    /// A region is being added, with these bytes per kernel mapping in each domain.
    pub(in crate::gate) fn add_region(&mut self, id: RegionId, pieces: &[u64]) {
        for (domain, piece) in self.domains.iter_mut().zip(pieces) {
            domain.shapes.insert(id, Shape { piece: *piece, promised: 0 });
        }
    }

    /// A region is forgotten.
    pub(in crate::gate) fn remove_region(&mut self, id: RegionId) {
        self.domains.iter_mut().for_each(|domain| _ = domain.shapes.remove(&id));
    }

    /// Returns the bytes per kernel mapping of a region, in each domain.
    pub(in crate::gate) fn pieces(&self, id: RegionId) -> Vec<u64> {
        self.domains.iter().filter_map(|domain| domain.piece(id)).collect()
    }
}
