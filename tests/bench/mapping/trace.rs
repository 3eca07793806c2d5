//! The conversions of a confidential guest that boots: synthetic, and the same in every run.
//!
//! All memory is private at first. Then, in proportion to the memory's size:
//! 1. a tenth is shared in 2 MiB-aligned bursts (the kernel's early shared ranges), four to a batch;
//! 2. swiotlb: an eighth (at most 64 MiB) in one range;
//! 3. virtio rings and DMA buffers: clusters of 1 to 16 pages, four clusters side by side, two hundred times;
//! 4. single pages, anywhere, both ways, eight hundred times: a shared page that is hit again becomes private;
//! 5. a driver that probes: batches of sixteen single pages, two pages apart, forty times;
//! 6. a third of the clusters and half of the 2 MiB bursts go back to private.

use passgate::gate::PageState;
use passgate_bindings::{Gpa, PAGE, PageRange};

const PAGES_PER_2MIB: u64 = 512;

/// One conversion: its ranges, ascending and disjoint, and the state that they get.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) ranges: Vec<PageRange<Gpa>>,
    pub(crate) to: PageState,
}

/// A reproducible random number generator (SplitMix64).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n.max(1)
    }
}

fn range(page: u64, pages: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

/// Returns the trace of a guest with `pages` pages, at least 4096.
pub(crate) fn boot(pages: u64) -> Vec<Step> {
    let (mut rng, mut steps) = (Rng(1), Vec::new());
    let mut step = |ranges: Vec<PageRange<Gpa>>, to| steps.push(Step { ranges, to });
    let (shared, private) = (PageState::Shared, PageState::Private);
    let blocks = pages / PAGES_PER_2MIB;
    let bursts: Vec<u64> = (0..blocks).filter(|_| rng.below(10) == 0).collect();
    for blocks_of_batch in bursts.chunks(4) {
        step(
            blocks_of_batch.iter().map(|block| range(block * PAGES_PER_2MIB, PAGES_PER_2MIB)).collect(),
            shared,
        );
    }
    let swiotlb = (pages / 8).min(16_384);
    step(vec![range(pages / 2 / PAGES_PER_2MIB * PAGES_PER_2MIB, swiotlb)], shared);
    let clusters: Vec<(u64, u64)> = (0..200).map(|_| (rng.below(pages - 256), 1 + rng.below(16))).collect();
    for (page, len) in &clusters {
        step((0..4).map(|n| range(page + n * (len + 1), *len)).collect(), shared);
    }
    let mut single = std::collections::BTreeSet::new();
    for _ in 0..800 {
        let page = rng.below(pages);
        let to = if single.remove(&page) || rng.below(3) == 0 { private } else { shared };
        if to == shared {
            single.insert(page);
        }
        step(vec![range(page, 1)], to);
    }
    for _ in 0..40 {
        let page = rng.below(pages - 64);
        let to = if rng.below(2) == 0 { shared } else { private };
        step((0..16).map(|n| range(page + 2 * n, 1)).collect(), to);
    }
    for (page, len) in clusters.iter().step_by(3) {
        step((0..4).map(|n| range(page + n * (len + 1), *len)).collect(), private);
    }
    for block in bursts.iter().step_by(2) {
        step(vec![range(block * PAGES_PER_2MIB, PAGES_PER_2MIB)], private);
    }
    steps
}
