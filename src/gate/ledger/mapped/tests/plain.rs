//! The ledger of mappings as one would write it down first. What [`super::super::Mapped`] answers is what this answers.

use std::collections::BTreeMap;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::gate::ledger::run::{Run, RunState, mapping_count};

/// The mappings of one domain: every mapping by itself, in the order of their addresses.
#[derive(Debug, Default)]
pub(super) struct Plain {
    /// Every kernel mapping that is live: start to end.
    live: BTreeMap<Iova, Iova>,
    runs: BTreeMap<Iova, Run>,
    mapping_count: u64,
    bytes: u64,
    unsettled: usize,
}

impl Plain {
    /// Kernel mappings in use, or about to be.
    pub(super) fn mapping_count(&self) -> u64 {
        self.mapping_count
    }

    /// Bytes that are mapped, or may be.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Runs on their way out or in doubt.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Runs that are being mapped.
    pub(super) fn filling(&self) -> usize {
        self.runs.len() - self.unsettled
    }

    /// True if no page of `range` is live or in a run.
    pub(super) fn is_clear(&self, range: PageRange<Iova>) -> bool {
        self.runs(range).next().is_none() && self.live_over(range).next().is_none()
    }

    /// The runs that share a page with `range`, whole, in order.
    pub(super) fn runs(&self, range: PageRange<Iova>) -> impl Iterator<Item = Run> + '_ {
        let before = self.runs.range(..range.start()).next_back().map(|(_, run)| *run);
        before
            .filter(|run| run.range.overlaps(range))
            .into_iter()
            .chain(self.runs.range(range.start()..range.end()).map(|(_, run)| *run))
    }

    /// The longest stretches of live pages in `range`, cut to it, in order.
    pub(super) fn live(&self, range: PageRange<Iova>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let mut mappings = self.live_over(range).peekable();
        std::iter::from_fn(move || {
            let first = mappings.next()?;
            let mut end = first.end();
            while let Some(next) = mappings.next_if(|next| next.start() == end) {
                end = next.end();
            }
            PageRange::between(first.start().max(range.start()), end.min(range.end()))
        })
    }

    /// Returns the live ranges in `range`, cut to it, and the runs, whole; in order.
    pub(super) fn taken(&self, range: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        let mut taken: Vec<_> = self.live(range).chain(self.runs(range).map(|run| run.range)).collect();
        taken.sort_unstable();
        taken
    }

    /// From the first live page in `range` to the last.
    pub(super) fn extent(&self, range: PageRange<Iova>) -> Option<PageRange<Iova>> {
        let first = self.live_over(range).next()?.start().max(range.start());
        let (_, end) = self.live.range(..range.end()).next_back()?;
        PageRange::between(first, (*end).min(range.end()))
    }

    /// `range`, widened at either end to where no live mapping sticks out of it.
    pub(super) fn whole(&self, range: PageRange<Iova>) -> PageRange<Iova> {
        let first = self.live_over(range).next().map_or(range.start(), |m| m.start().min(range.start()));
        let last = Iova::from_raw(range.end().raw() - PAGE);
        let last = PageRange::between(last, range.end()).and_then(|page| self.live_over(page).next());
        let end = last.map_or(range.end(), |m| m.end().max(range.end()));
        PageRange::between(first, end).unwrap_or(range)
    }

    /// Live kernel mappings that begin in `range`.
    pub(super) fn starts(&self, range: PageRange<Iova>) -> u64 {
        self.live.range(range.start()..range.end()).count() as u64
    }

    /// Puts a run where nothing is.
    pub(super) fn insert(&mut self, run: Run) {
        debug_assert!(self.is_clear(run.range));
        self.mapping_count += run.mapping_count;
        self.bytes += run.bytes;
        self.unsettled += usize::from(run.state.unsettled());
        self.runs.insert(run.range.start(), run);
    }

    /// The run at `start` was being mapped, and is live now.
    pub(super) fn made(&mut self, start: Iova) {
        let Some(Run { range, state: RunState::Filling { piece, .. }, .. }) = self.remove(start) else {
            return;
        };
        self.mapping_count += mapping_count(range, piece);
        self.bytes += range.len();
        let mut at = range.start();
        while at < range.end() {
            let next = Iova((at.raw() / piece + 1) * piece).min(range.end());
            self.live.insert(at, next);
            at = next;
        }
    }

    /// Everything live in `range`, in which no run is, becomes one run over the whole of it. Mappings that stick out
    /// are cut.
    pub(super) fn take(&mut self, range: PageRange<Iova>, state: RunState) -> Run {
        debug_assert!(self.runs(range).next().is_none());
        let over: Vec<_> = self.live_over(range).collect();
        let (mut bytes, mut mapping_count) = (0, 0);
        for mapping in over {
            self.live.remove(&mapping.start());
            self.mapping_count -= 1;
            let [left, right] = mapping.without(range);
            for rest in [left, right].into_iter().flatten() {
                self.live.insert(rest.start(), rest.end());
                self.mapping_count += 1;
            }
            bytes += mapping.intersection(range).map_or(0, PageRange::len);
            mapping_count += 1;
        }
        self.bytes -= bytes;
        let run = Run { range, bytes, mapping_count, state };
        self.insert(run);
        run
    }

    /// Changes the state of the run at `start`; not to [`RunState::Filling`].
    pub(super) fn mark(&mut self, start: Iova, state: RunState) {
        if let Some(run) = self.runs.get_mut(&start) {
            self.unsettled -= usize::from(run.state.unsettled());
            self.unsettled += usize::from(state.unsettled());
            self.bytes -= run.bytes_mapped();
            run.state = state;
            self.bytes += run.bytes_mapped();
        }
    }

    /// Takes the run at `start` out of the ledger: the caller has proof that it is gone.
    pub(super) fn remove(&mut self, start: Iova) -> Option<Run> {
        let run = self.runs.remove(&start)?;
        self.mapping_count -= run.mapping_count;
        self.bytes -= run.bytes_mapped();
        self.unsettled -= usize::from(run.state.unsettled());
        Some(run)
    }

    /// The runs in this state, in order.
    pub(super) fn in_state(&self, state: RunState) -> Vec<Run> {
        self.runs.values().filter(|run| run.state == state).copied().collect()
    }

    /// The run that starts at `start`.
    pub(super) fn at(&self, start: Iova) -> Option<Run> {
        self.runs.get(&start).copied()
    }

    /// The live mappings that share a page with `range`, whole, in order.
    fn live_over(&self, range: PageRange<Iova>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let before = self.live.range(..range.start()).next_back();
        before
            .filter(|(_, end)| **end > range.start())
            .into_iter()
            .chain(self.live.range(range.start()..range.end()))
            .filter_map(|(start, end)| PageRange::between(*start, *end))
    }
}
