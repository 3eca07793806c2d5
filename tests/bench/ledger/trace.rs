//! What the ledger sees of a confidential guest that boots and lives. The mix was fixed before anything was measured.
//!
//! - One region of 1 TiB, private. At boot: 1 GiB for swiotlb becomes shared, and 64 rings of 2 MiB.
//! - Then a million flips of one 4 KiB page: 70 % in 64 hot areas of 64 MiB, 30 % anywhere. Until 100 000 of these pages
//!   are shared three of four flips share one, then one of two; the others take a shared one back, at random. Before
//!   each flip: the runs of the 2 MiB around it, which is what mapping asks for.
//! - Every 1 000 flips: a burst of 2 to 64 MiB, 2 MiB-aligned, becomes shared, or the oldest of 32 private again; and
//!   the runs of the 1 GiB around the last flip.
//! - Every 20 000 flips (a guest that converts without a pause is asked once a second, at the rate of `passgate demo`):
//!   the pages of the whole region by state, and a burst of 64 MiB to 1 GiB as a driver comes or goes.

use passgate::gate::PageState;

use super::Rng;
use super::rivals::PAGES;

pub(crate) const FLIPS: u64 = 1_000_000;
const HOT_AREAS: usize = 64;
/// Pages of 64 MiB.
const AREA: u64 = 1 << 14;
/// Pages of 2 MiB, the alignment of bursts.
const CHUNK: u64 = 512;
/// Pages of 1 GiB.
const GIANT: u64 = 1 << 18;
const OUT: usize = 100_000;
const BURSTS: usize = 32;
const DRIVERS: usize = 4;

/// One call of the ledger.
#[derive(Clone, Copy)]
pub(crate) enum Call {
    /// Pages from a page on get a state.
    Set(u32, u32, PageState),
    /// The runs of pages from a page on.
    Runs(u32, u32),
    /// Pages by state.
    Status,
}

struct Maker {
    rng: Rng,
    calls: Vec<Call>,
    /// Single pages that are shared.
    out: Vec<u64>,
    hot: Vec<u64>,
}

/// The whole trace.
pub(crate) fn make() -> Vec<Call> {
    let mut rng = Rng(2026);
    let hot = (0..HOT_AREAS).map(|_| rng.below(PAGES / AREA) * AREA).collect();
    let mut maker = Maker { rng, calls: Vec::new(), out: Vec::new(), hot };
    maker.set(3 * GIANT, GIANT, PageState::Shared);
    for _ in 0..64 {
        let at = maker.aligned(CHUNK);
        maker.set(at, CHUNK, PageState::Shared);
    }
    let (mut bursts, mut drivers) = (Vec::new(), Vec::new());
    for flip in 1..=FLIPS {
        let page = maker.flip();
        if flip % 1000 == 0 {
            maker.burst(&mut bursts, BURSTS, (1, 32));
            maker.runs(page, GIANT);
        }
        if flip % 20_000 == 0 {
            maker.calls.push(Call::Status);
            maker.burst(&mut drivers, DRIVERS, (32, 512));
        }
    }
    maker.calls
}

impl Maker {
    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        self.calls.push(Call::Set(page as u32, pages as u32, state));
    }

    /// The runs of the `pages` (aligned) around `page`.
    fn runs(&mut self, page: u64, pages: u64) {
        self.calls.push(Call::Runs((page - page % pages) as u32, pages as u32));
    }

    fn aligned(&mut self, pages: u64) -> u64 {
        self.rng.below((PAGES - pages) / CHUNK + 1) * CHUNK
    }

    fn flip(&mut self) -> u64 {
        let share = self.rng.below(4) < if self.out.len() < OUT { 3 } else { 2 };
        let (page, state) = if share || self.out.is_empty() {
            let page = if self.rng.below(10) < 7 {
                self.hot[self.rng.below(HOT_AREAS as u64) as usize] + self.rng.below(AREA)
            } else {
                self.rng.below(PAGES)
            };
            self.out.push(page);
            (page, PageState::Shared)
        } else {
            let at = self.rng.below(self.out.len() as u64) as usize;
            (self.out.swap_remove(at), PageState::Private)
        };
        self.runs(page, CHUNK);
        self.set(page, 1, state);
        page
    }

    /// A burst of `chunks` (from, to) becomes shared; the oldest goes back where `most` are shared.
    fn burst(&mut self, shared: &mut Vec<(u64, u64)>, most: usize, chunks: (u64, u64)) {
        if shared.len() == most {
            let (page, pages) = shared.remove(0);
            self.set(page, pages, PageState::Private);
            return;
        }
        let pages = (chunks.0 + self.rng.below(chunks.1 - chunks.0 + 1)) * CHUNK;
        let page = self.aligned(pages);
        self.set(page, pages, PageState::Shared);
        shared.push((page, pages));
    }
}
