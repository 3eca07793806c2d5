//! The calls on the ledger for a confidential guest that boots and runs. The mix was fixed before anything was measured.
//!
//! - One region of 1 TiB, private. At boot: 1 GiB for swiotlb becomes shared, and 64 rings of 2 MiB.
//! - Then a million flips of one 4 KiB page: 70 % in 64 hot areas of 64 MiB, 30 % anywhere. Until 100 000 of these pages are
//!   shared, three of four flips share a page, then one of two; the others make a random shared page private again. Before each
//!   flip: the runs of the 2 MiB around it, which mapping needs.
//! - Every 1 000 flips: a burst of 2 to 64 MiB, 2 MiB-aligned, becomes shared, or the oldest of 32 private again; and
//!   the runs of the 1 GiB around the last flip.
//! - Every 20 000 flips (once a second for a guest that converts without a pause, at the rate of `passgate demo`): the pages of
//!   the whole region by state, and a burst of 64 MiB to 1 GiB as when a driver is loaded or unloaded.

use passgate::gate::PageState;

use super::Rng;
use super::baselines::PAGES;

pub(crate) const FLIPS: u64 = 1_000_000;
const HOT_AREAS: usize = 64;
/// The number of pages in 64 MiB, the size of a hot area.
const AREA_PAGES: u64 = 1 << 14;
/// The number of pages in 2 MiB, the alignment of bursts.
const CHUNK_PAGES: u64 = 512;
/// The number of pages in 1 GiB.
const GIB_PAGES: u64 = 1 << 18;
/// The number of shared single pages from which on flips go both ways alike.
const TARGET_SHARED_PAGES: usize = 100_000;
const MAX_BURSTS: usize = 32;
const MAX_DRIVER_BURSTS: usize = 4;

/// One call of the ledger.
#[derive(Clone, Copy)]
pub(crate) enum Call {
    /// Sets the state of a number of pages from a page on.
    Set(u32, u32, PageState),
    /// Queries the runs in a number of pages from a page on.
    Runs(u32, u32),
    /// Counts the pages of the region by state.
    Status,
}

struct TraceBuilder {
    rng: Rng,
    calls: Vec<Call>,
    /// The single pages that are shared.
    shared_pages: Vec<u64>,
    hot: Vec<u64>,
}

/// Returns the whole trace.
pub(crate) fn build() -> Vec<Call> {
    let mut rng = Rng(2026);
    let hot = (0..HOT_AREAS).map(|_| rng.below(PAGES / AREA_PAGES) * AREA_PAGES).collect();
    let mut builder = TraceBuilder { rng, calls: Vec::new(), shared_pages: Vec::new(), hot };
    builder.set(3 * GIB_PAGES, GIB_PAGES, PageState::Shared);
    for _ in 0..64 {
        let at = builder.aligned(CHUNK_PAGES);
        builder.set(at, CHUNK_PAGES, PageState::Shared);
    }
    let (mut bursts, mut drivers) = (Vec::new(), Vec::new());
    for flip in 1..=FLIPS {
        let page = builder.flip();
        if flip % 1000 == 0 {
            builder.burst(&mut bursts, MAX_BURSTS, (1, 32));
            builder.runs(page, GIB_PAGES);
        }
        if flip % 20_000 == 0 {
            builder.calls.push(Call::Status);
            builder.burst(&mut drivers, MAX_DRIVER_BURSTS, (32, 512));
        }
    }
    builder.calls
}

impl TraceBuilder {
    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        self.calls.push(Call::Set(page as u32, pages as u32, state));
    }

    /// Queries the runs in the aligned `pages` pages around `page`.
    fn runs(&mut self, page: u64, pages: u64) {
        self.calls.push(Call::Runs((page - page % pages) as u32, pages as u32));
    }

    fn aligned(&mut self, pages: u64) -> u64 {
        self.rng.below((PAGES - pages) / CHUNK_PAGES + 1) * CHUNK_PAGES
    }

    fn flip(&mut self) -> u64 {
        let to_shared = self.rng.below(4) < if self.shared_pages.len() < TARGET_SHARED_PAGES { 3 } else { 2 };
        let (page, state) = if to_shared || self.shared_pages.is_empty() {
            let page = if self.rng.below(10) < 7 {
                self.hot[self.rng.below(HOT_AREAS as u64) as usize] + self.rng.below(AREA_PAGES)
            } else {
                self.rng.below(PAGES)
            };
            self.shared_pages.push(page);
            (page, PageState::Shared)
        } else {
            let at = self.rng.below(self.shared_pages.len() as u64) as usize;
            (self.shared_pages.swap_remove(at), PageState::Private)
        };
        self.runs(page, CHUNK_PAGES);
        self.set(page, 1, state);
        page
    }

    /// Makes a burst of `chunks` (minimum, maximum) chunks shared; if `max` bursts are shared, makes the oldest private instead.
    fn burst(&mut self, shared: &mut Vec<(u64, u64)>, max: usize, chunks: (u64, u64)) {
        if shared.len() == max {
            let (page, pages) = shared.remove(0);
            self.set(page, pages, PageState::Private);
            return;
        }
        let pages = (chunks.0 + self.rng.below(chunks.1 - chunks.0 + 1)) * CHUNK_PAGES;
        let page = self.aligned(pages);
        self.set(page, pages, PageState::Shared);
        shared.push((page, pages));
    }
}
