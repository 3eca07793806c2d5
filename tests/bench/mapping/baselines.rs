//! The baselines: one mapping for each 4 KiB page, as in today's VMMs, because a mapping cannot be cut.

use std::sync::Arc;

use passgate::gate::PageState;
use passgate_backends::{Domain, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::trace::Step;

/// The result of a trace.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Score {
    pub(crate) calls: u64,
    pub(crate) mappings: u64,
    pub(crate) max_mappings: u64,
}

pub(crate) trait Baseline {
    fn convert(&mut self, step: &Step);
    fn score(&self) -> Score;
}

/// Maps page by page and unmaps by range, as QEMU's listener does: it maps at the granularity of conversions and unmaps sections.
pub(crate) struct Paged {
    domain: Arc<dyn Domain>,
    file: Arc<GuestFile>,
    mapped: Vec<bool>,
    score: Score,
}

impl Paged {
    pub(crate) fn new(domain: Arc<dyn Domain>, file: Arc<GuestFile>, pages: u64) -> Self {
        Self { domain, file, mapped: vec![false; pages as usize], score: Score::default() }
    }

    fn map(&mut self, page: u64) {
        let iova = PageRange::new(page * PAGE, PAGE).unwrap();
        self.domain.map(iova, PAGE, &self.file, Offset(page * PAGE), true).unwrap_or_else(|e| panic!("{e}"));
        self.mapped[page as usize] = true;
        self.score.calls += 1;
        self.score.mappings += 1;
        self.score.max_mappings = self.score.max_mappings.max(self.score.mappings);
    }

    fn unmap(&mut self, iova: PageRange<Iova>) {
        let Unmap::Gone { bytes } = self.domain.unmap(iova) else { panic!("an unmap failed") };
        self.score.calls += 1;
        self.score.mappings -= bytes / PAGE;
        let first = (iova.start().0 / PAGE) as usize;
        self.mapped[first..first + iova.pages() as usize].fill(false);
    }
}

fn iova(range: PageRange<passgate_bindings::Gpa>) -> PageRange<Iova> {
    PageRange::new(range.start().0, range.len()).unwrap()
}

impl Baseline for Paged {
    fn convert(&mut self, step: &Step) {
        for range in &step.ranges {
            match step.to {
                PageState::Shared => {
                    let first = range.start().0 / PAGE;
                    for page in first..first + range.pages() {
                        if !self.mapped[page as usize] {
                            self.map(page);
                        }
                    }
                }
                _ => self.unmap(iova(*range)),
            }
        }
    }

    fn score(&self) -> Score {
        self.score
    }
}

/// Tracks which pages are mapped: pages that become shared are mapped one by one unless they are mapped already; pages that
/// become private are unmapped with one call for each run of mapped pages. This is what Cloud Hypervisor does
/// (`vm-device/src/dma_mapping/tracker.rs` at 1b1153b).
pub(crate) struct Tracker(Paged);

impl Tracker {
    pub(crate) fn new(domain: Arc<dyn Domain>, file: Arc<GuestFile>, pages: u64) -> Self {
        Self(Paged::new(domain, file, pages))
    }
}

impl Baseline for Tracker {
    fn convert(&mut self, step: &Step) {
        for range in &step.ranges {
            if step.to == PageState::Shared {
                self.0.convert(&Step { ranges: vec![*range], to: step.to });
                continue;
            }
            let first = range.start().0 / PAGE;
            let pages: Vec<u64> =
                (first..first + range.pages()).filter(|page| self.0.mapped[*page as usize]).collect();
            for run in pages.chunk_by(|left, right| left + 1 == *right) {
                self.0.unmap(PageRange::new(run[0] * PAGE, run.len() as u64 * PAGE).unwrap());
            }
        }
    }

    fn score(&self) -> Score {
        self.0.score()
    }
}
