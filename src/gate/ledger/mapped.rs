//! The mappings of one domain: every kernel mapping with its exact borders, and every range in progress or in doubt.
//!
//! A page is *live* (mapped, by a kernel mapping whose borders are known), or it lies in a *run* (a range being
//! mapped, being unmapped, or failed, with its state), or nothing is there. A run may contain pages that were not mapped: an
//! unmap removes neighbours of one range by one call, with the gaps between them. A page leaves this table only through
//! [`Mapped::remove`], which is called on proof and nowhere else.
//!
//! A page is two bits in a tree: nothing, inside a live mapping, the first of one, in a run. So a terabyte of mappings of
//! equal size takes almost no memory, and one in 4 KiB pages in the worst order 66 MiB. Only the states of runs lie beside it;
//! after a crash they are lost, and the runs are in doubt.

use std::collections::BTreeMap;
use std::ops::Range;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::exclusions::gaps;
use super::fault::Full;
use super::fill::Fill;
use super::run::{Run, RunState};
use super::store::{Arena, Key, Store};
use super::tree::{PAGES, Tree};
use crate::gate::ids::DomainId;

pub use super::run::mapping_count;

/// The kind of this root in a store.
const KIND: u64 = 2;

/// `ENOSPC`: the store was full.
const NO_SPACE: i32 = 28;

/// The values of a page in the tree.
const NOTHING: u8 = 0;
const INSIDE: u8 = 1;
const BEGINS: u8 = 2;
const IN_RUN: u8 = 3;

/// The mappings of one domain.
#[derive(Debug)]
pub struct Mapped {
    tree: Tree,
    runs: BTreeMap<Iova, Run>,
    /// The number of kernel mappings in the runs.
    mapping_count: u64,
    bytes: u64,
    unsettled: usize,
}

impl Mapped {
    /// Returns an empty table in memory of `arena`, which ends with the process.
    pub fn new(arena: Arena) -> Self {
        Self::over(Tree::own(arena))
    }

    /// Returns the mappings of `domain` in `store`, an empty table if it has none; [`Full`] if there is no room for one. Only one may
    /// exist per domain at a time. Pages that were in a run when the process that wrote it ended are [`RunState::Suspect`].
    pub fn in_store(store: &Store, domain: DomainId) -> Result<Self, Full> {
        let tree = Tree::new(store, Key { kind: KIND, a: domain.0.into(), b: 0 })?;
        let mut mapped = Self::over(tree);
        mapped.adopt(0..PAGES, 0);
        Ok(mapped)
    }

    /// Removes it from the store.
    pub fn discard(self) {
        self.tree.discard();
    }

    /// Returns the maximum of bytes that it takes in the store if only `range` is ever mapped.
    pub fn worst(range: PageRange<Iova>) -> u64 {
        Tree::worst(pages(range))
    }

    fn over(tree: Tree) -> Self {
        Self { tree, runs: BTreeMap::new(), mapping_count: 0, bytes: 0, unsettled: 0 }
    }

    /// Returns the number of kernel mappings in use, or about to be.
    pub fn mapping_count(&self) -> u64 {
        self.tree.total(BEGINS) + self.mapping_count
    }

    /// Returns the bytes that are mapped, or may be.
    pub fn bytes(&self) -> u64 {
        (self.tree.total(INSIDE) + self.tree.total(BEGINS)) * PAGE + self.bytes
    }

    /// Returns the number of runs being unmapped or in doubt.
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Returns the number of runs being mapped.
    pub fn filling(&self) -> usize {
        self.runs.len() - self.unsettled
    }

    /// True if no page of `range` is live or in a run.
    pub fn is_clear(&self, range: PageRange<Iova>) -> bool {
        // A full store may not know of a run.
        self.tree.next_not(pages(range), NOTHING).is_none() && self.runs(range).next().is_none()
    }

    /// Returns the runs that share a page with `range`, whole, in order.
    pub fn runs(&self, range: PageRange<Iova>) -> impl Iterator<Item = Run> + '_ {
        let before = self.runs.range(..range.start()).next_back().map(|(_, run)| *run);
        before
            .filter(|run| run.range.overlaps(range))
            .into_iter()
            .chain(self.runs.range(range.start()..range.end()).map(|(_, run)| *run))
    }

    /// Returns the longest ranges of live pages in `range`, cut to it, in order.
    pub fn live(&self, range: PageRange<Iova>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let spans = self.tree.merged_spans(pages(range));
        spans.filter(|(_, value)| *value == INSIDE).filter_map(|(span, _)| bytes(span))
    }

    /// Returns the live ranges in `range`, cut to it, and the runs, whole; in order.
    pub fn taken(&self, range: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        if self.is_clear(range) {
            return Vec::new();
        }
        let mut taken: Vec<_> = self.live(range).collect();
        let live = taken.len();
        taken.extend(self.runs(range).map(|run| run.range));
        if taken.len() > live {
            taken.sort_unstable();
        }
        taken
    }

    /// Returns the range from the first live page in `range` to the last.
    pub fn extent(&self, range: PageRange<Iova>) -> Option<PageRange<Iova>> {
        if range.pages() == 1 {
            let value = self.tree.get(pages(range).start);
            return matches!(value, INSIDE | BEGINS).then_some(range);
        }
        let first = self.live(range).next()?.start();
        let mut rest = pages(range);
        loop {
            let last = self.tree.last_not(rest.clone(), NOTHING)?;
            if self.tree.get(last) != IN_RUN {
                return PageRange::between(first, Iova((last + 1) * PAGE));
            }
            rest.end = self.runs(bytes(last..last + 1)?).next()?.range.start().raw() / PAGE;
        }
    }

    /// Returns `range`, widened at either end to the borders of the live mappings there.
    pub fn whole(&self, range: PageRange<Iova>) -> PageRange<Iova> {
        let mut whole = pages(range);
        if self.tree.get(whole.start) == INSIDE {
            whole.start = self.tree.last_not(0..whole.start, INSIDE).unwrap_or(whole.start);
        }
        if self.sticks_out(whole.end) {
            whole.end = self.tree.next_not(whole.end..PAGES, INSIDE).unwrap_or(whole.end);
        }
        bytes(whole).unwrap_or(range)
    }

    /// True if a mapping that is being made will extend beyond `range`.
    pub fn fills_around(&self, range: PageRange<Iova>) -> bool {
        self.runs(range).any(|run| {
            let RunState::Filling { piece, .. } = run.state else { return false };
            let (start, end) = (run.range.start().raw(), run.range.end().raw());
            let inside = |at: u64| start < at && at < end && !at.is_multiple_of(piece);
            inside(range.start().raw()) || inside(range.end().raw())
        })
    }

    /// True if a live mapping crosses the border before `page`.
    fn sticks_out(&self, page: u64) -> bool {
        self.tree.get(page) == INSIDE
    }

    /// Returns the number of live kernel mappings that begin in `range`.
    pub fn starts(&self, range: PageRange<Iova>) -> u64 {
        self.tree.count(pages(range), BEGINS)
    }

    /// Inserts a run where nothing is.
    pub fn insert(&mut self, run: Run) {
        debug_assert!(self.is_clear(run.range));
        self.put(run);
    }

    fn put(&mut self, run: Run) {
        self.record(run);
        self.change(pages(run.range), Fill::all(IN_RUN));
    }

    /// Makes the run at `start`, which was being mapped, live.
    pub fn made(&mut self, start: Iova) {
        let Some(Run { range, state: RunState::Filling { piece, .. }, .. }) = self.runs.get(&start).copied()
        else {
            return;
        };
        self.unrecord(start);
        let Range { start, end } = pages(range);
        let width = Fill::grid((piece / PAGE).trailing_zeros());
        // Its beginning first: it must never be taken for a part of the mapping before it.
        let fits = self.change(start..start + 1, Fill::all(BEGINS));
        if !(fits && (start + 1 == end || self.change(start + 1..end, width))) {
            let taken = self.taken(range);
            gaps(range, taken.into_iter()).for_each(|range| self.doubt(range, NO_SPACE));
        }
    }

    /// Makes everything live in `range`, in which no run is, one run over the whole of it. Mappings that extend beyond it are
    /// cut.
    pub fn take(&mut self, range: PageRange<Iova>, state: RunState) -> Run {
        debug_assert!(self.runs(range).next().is_none());
        let within = pages(range);
        let [_, inside, begins, _] = self.tree.tally(within.clone());
        let mapping_count = begins + u64::from(self.sticks_out(within.start));
        let run = Run { range, bytes: (inside + begins) * PAGE, mapping_count, state };
        let rest = self.sticks_out(within.end);
        self.put(run);
        // The rest behind it is a mapping of its own. After a kill before this, `adopt` finds it by the run.
        if rest {
            self.change(within.end..within.end + 1, Fill::all(BEGINS));
        }
        run
    }

    /// Changes the state of the run at `start`; not to [`RunState::Filling`].
    pub fn mark(&mut self, start: Iova, state: RunState) {
        if let Some(run) = self.unrecord(start) {
            self.record(Run { state, ..run });
        }
    }

    /// Removes the run at `start`. The caller has proof that it is gone.
    pub fn remove(&mut self, start: Iova) -> Option<Run> {
        let run = self.unrecord(start)?;
        self.change(pages(run.range), Fill::all(NOTHING));
        Some(run)
    }

    /// Returns the runs in this state, in order.
    pub fn in_state(&self, state: RunState) -> Vec<Run> {
        self.runs.values().filter(|run| run.state == state).copied().collect()
    }

    /// Returns the run that starts at `start`.
    pub fn at(&self, start: Iova) -> Option<Run> {
        self.runs.get(&start).copied()
    }

    fn record(&mut self, run: Run) {
        self.mapping_count += run.mapping_count;
        self.bytes += run.bytes_mapped();
        self.unsettled += usize::from(run.state.unsettled());
        self.runs.insert(run.range.start(), run);
    }

    fn unrecord(&mut self, start: Iova) -> Option<Run> {
        let run = self.runs.remove(&start)?;
        self.mapping_count -= run.mapping_count;
        self.bytes -= run.bytes_mapped();
        self.unsettled -= usize::from(run.state.unsettled());
        Some(run)
    }

    /// Changes the pages of `range`. Returns true if there was room. In a full store their neighbours become part of a run as
    /// well: then it is only known that they may be mapped.
    fn change(&mut self, pages: Range<u64>, fill: Fill) -> bool {
        let fits = self.tree.force_fill(pages.clone(), fill, IN_RUN);
        if !fits {
            let start = self.tree.last_not(0..pages.start, IN_RUN).map_or(0, |page| page + 1);
            let end = self.tree.next_not(pages.end..PAGES, IN_RUN).unwrap_or(PAGES);
            self.adopt(start..end, NO_SPACE);
        }
        fits
    }

    /// Records that `range` may be mapped.
    fn doubt(&mut self, range: PageRange<Iova>, errno: i32) {
        let state = RunState::Suspect { gone: None, errno };
        self.record(Run { range, bytes: range.len(), mapping_count: 1, state });
    }

    /// Makes suspect runs of the pages in a run whose state is not known.
    fn adopt(&mut self, within: Range<u64>, errno: i32) {
        let mut at = within.start;
        while self.tree.total(IN_RUN) > 0
            && let Some(first) = self.tree.next(at..within.end, IN_RUN)
        {
            at = self.tree.next_not(first..within.end, IN_RUN).unwrap_or(within.end);
            let Some(span) = bytes(first..at) else { return };
            let known: Vec<_> = self.runs(span).map(|run| run.range).collect();
            gaps(span, known.into_iter()).for_each(|range| self.doubt(range, errno));
            // The part behind it is a mapping of its own.
            if self.sticks_out(at) {
                self.change(at..at + 1, Fill::all(BEGINS));
            }
        }
    }
}

fn pages(range: PageRange<Iova>) -> Range<u64> {
    range.start().raw() / PAGE..range.end().raw() / PAGE
}

fn bytes(pages: Range<u64>) -> Option<PageRange<Iova>> {
    PageRange::between(Iova(pages.start * PAGE), Iova(pages.end * PAGE))
}

#[cfg(test)]
mod tests;
