//! What is mapped in one domain: runs of equal kernel mappings, and how sure we are of each.
//!
//! A *run* stands for one or many kernel mappings of `piece` bytes, laid end to end from its start (the last may
//! be shorter), so that a terabyte mapped page by page is one entry until pages leave it. A run leaves this table
//! only through [`Runs::remove`], which the gate calls on proof and nowhere else.

use std::collections::BTreeMap;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PageRange};

use crate::gate::event::JobId;

/// How sure we are of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// A map call is under way.
    Filling(JobId),
    /// Mapped.
    Live,
    /// An unmap call is under way.
    Removing(JobId),
    /// Out of the translation, but operations issued before are in flight.
    Leaking(JobId),
    /// Out of the translation, but a device that caches translations may have kept a copy of it.
    Cached,
    /// A call failed half-way or came up short: may be mapped, in part or whole. `gone` bytes of it were
    /// reported removed.
    Suspect {
        /// Bytes reported removed so far.
        gone: u64,
        /// The kernel's last answer.
        errno: i32,
    },
}

impl RunState {
    /// Whether the run is neither plainly mapped nor about to be.
    pub fn unsettled(self) -> bool {
        !matches!(self, Self::Live | Self::Filling(_))
    }
}

/// Kernel mappings of equal size, end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub range: PageRange<Iova>,
    /// Bytes per kernel mapping, while it is live.
    pub piece: u64,
    /// Kernel mappings in it.
    pub objects: u64,
    /// How sure we are.
    pub state: RunState,
}

impl Run {
    /// A run of mappings of `piece` bytes.
    pub fn new(range: PageRange<Iova>, piece: u64, state: RunState) -> Self {
        Self { range, piece, objects: range.len().div_ceil(piece), state }
    }
}

/// What is mapped in one domain.
#[derive(Debug, Default)]
pub struct Runs {
    runs: BTreeMap<Iova, Run>,
    objects: u64,
    unsettled: usize,
}

impl Runs {
    /// Kernel mappings in use, or about to be.
    pub fn objects(&self) -> u64 {
        self.objects
    }

    /// Bytes that are mapped, or may be.
    pub fn bytes(&self) -> u64 {
        let left = |run: &Run| match run.state {
            RunState::Suspect { gone, .. } => run.range.len().saturating_sub(gone),
            _ => run.range.len(),
        };
        self.runs.values().map(left).sum()
    }

    /// Runs that are neither plainly mapped nor about to be.
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Whether no run shares a page with `range`.
    pub fn is_clear(&self, range: PageRange<Iova>) -> bool {
        self.runs.range(..range.end()).next_back().is_none_or(|(_, run)| run.range.end() <= range.start())
    }

    /// The runs that share a page with `range`, in order.
    pub fn overlapping(&self, range: PageRange<Iova>) -> impl Iterator<Item = Run> + '_ {
        let before = self.runs.range(..range.start()).next_back().map(|(_, run)| *run);
        before
            .filter(|run| run.range.overlaps(range))
            .into_iter()
            .chain(self.runs.range(range.start()..range.end()).map(|(_, run)| *run))
    }

    /// Puts a run where none is.
    pub fn insert(&mut self, run: Run) {
        debug_assert!(self.is_clear(run.range));
        self.objects += run.objects;
        self.unsettled += usize::from(run.state.unsettled());
        self.runs.insert(run.range.start(), run);
    }

    /// Changes the state of the run at `start`.
    pub fn mark(&mut self, start: Iova, state: RunState) {
        if let Some(run) = self.runs.get_mut(&start) {
            self.unsettled -= usize::from(run.state.unsettled());
            self.unsettled += usize::from(state.unsettled());
            run.state = state;
        }
    }

    /// Takes the run at `start` out of the ledger: the caller has proof that it is gone.
    pub fn remove(&mut self, start: Iova) {
        if let Some(run) = self.runs.remove(&start) {
            self.objects -= run.objects;
            self.unsettled -= usize::from(run.state.unsettled());
        }
    }

    /// Where runs are in this state, in order.
    pub fn in_state(&self, state: RunState) -> Vec<PageRange<Iova>> {
        if self.unsettled == 0 {
            return Vec::new();
        }
        self.runs.values().filter(|run| run.state == state).map(|run| run.range).collect()
    }

    /// The run that starts at `start`.
    pub fn at(&self, start: Iova) -> Option<Run> {
        self.runs.get(&start).copied()
    }

    /// The common case of one live run over the whole of `range`: cuts the pieces over it out, puts them into
    /// `state`, and says where they are. Nothing happens in every other case.
    pub fn carve(&mut self, range: PageRange<Iova>, state: RunState) -> Option<PageRange<Iova>> {
        let (_, entry) = self.runs.range_mut(..=range.start()).next_back()?;
        let run = *entry;
        if run.state != RunState::Live || !run.range.covers(range) {
            return None;
        }
        let base = run.range.start().raw();
        let from = base + (range.start().raw() - base) / run.piece * run.piece;
        let to = base + (range.end().raw() - base).div_ceil(run.piece) * run.piece;
        let cut = PageRange::between(Iova(from), Iova(to).min(run.range.end()))?;
        let [left, right] = run.range.without(cut);
        let middle = Run::new(cut, run.piece, state);
        match left {
            Some(left) => {
                *entry = Run::new(left, run.piece, run.state);
                self.runs.insert(cut.start(), middle);
            }
            None => *entry = middle,
        }
        if let Some(right) = right {
            self.runs.insert(right.start(), Run::new(right, run.piece, run.state));
        }
        self.unsettled += usize::from(state.unsettled());
        Some(cut)
    }

    /// Cuts live runs at the borders of their pieces, so that the pieces over `range` are runs of their own.
    pub fn isolate(&mut self, range: PageRange<Iova>) {
        let first = self.overlapping(range).next();
        if let Some(run) = first {
            self.cut(run, range.start());
        }
        let last = self.overlapping(range).last();
        if let Some(run) = last {
            // The border of the piece that holds the last byte, not the one before it.
            let into = range.end().raw().saturating_sub(run.range.start().raw());
            let up = into.div_ceil(run.piece) * run.piece;
            self.cut(run, Iova(run.range.start().raw() + up));
        }
    }

    /// Cuts a live run at the border of the piece that holds `at`.
    fn cut(&mut self, run: Run, at: Iova) {
        if run.state != RunState::Live || at <= run.range.start() {
            return;
        }
        let into = (at.raw() - run.range.start().raw()) / run.piece * run.piece;
        let border = Iova(run.range.start().raw() + into);
        let (Some(left), Some(right)) =
            (PageRange::between(run.range.start(), border), PageRange::between(border, run.range.end()))
        else {
            return;
        };
        self.runs.insert(left.start(), Run::new(left, run.piece, run.state));
        self.runs.insert(right.start(), Run::new(right, run.piece, run.state));
    }

    /// Makes one run, in `state`, of the live runs that fill `range` exactly: one call will remove them.
    pub fn fuse(&mut self, range: PageRange<Iova>, state: RunState) {
        if let Some(run) = self.runs.get_mut(&range.start())
            && run.range == range
        {
            self.unsettled -= usize::from(run.state.unsettled());
            self.unsettled += usize::from(state.unsettled());
            run.state = state;
            return;
        }
        let parts: Vec<_> = self.overlapping(range).collect();
        let objects = parts.iter().map(|run| run.objects).sum();
        for run in &parts {
            self.remove(run.range.start());
        }
        self.insert(Run { range, piece: range.len(), objects, state });
    }

    /// Makes one run of the live run at `start` and its live neighbours of the same piece, where no piece
    /// would straddle the seam.
    pub fn merge_around(&mut self, start: Iova) {
        let Some(mut run) = self.runs.get(&start).copied() else { return };
        if let Some((_, before)) = self.runs.range(..start).next_back()
            && joins(before, &run)
        {
            run = self.join(*before, run);
        }
        if let Some(after) = self.runs.get(&run.range.end())
            && joins(&run, after)
        {
            self.join(run, *after);
        }
    }

    fn join(&mut self, left: Run, right: Run) -> Run {
        self.runs.remove(&right.range.start());
        let whole = PageRange::between(left.range.start(), right.range.end());
        let joined = Run::new(whole.unwrap_or(left.range), left.piece, left.state);
        if let Some(run) = self.runs.get_mut(&joined.range.start()) {
            *run = joined;
        }
        joined
    }
}

fn joins(left: &Run, right: &Run) -> bool {
    left.state == RunState::Live
        && right.state == RunState::Live
        && left.piece == right.piece
        && left.range.end() == right.range.start()
        && left.range.len().is_multiple_of(left.piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_bindings::PAGE;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn live(page: u64, pages: u64, piece: u64) -> Run {
        Run::new(range(page, pages), piece * PAGE, RunState::Live)
    }

    #[test]
    fn isolates_whole_pieces_and_merges_back() {
        let mut runs = Runs::default();
        runs.insert(live(0, 64, 8));
        assert_eq!(runs.objects(), 8);
        runs.isolate(range(9, 1));
        let all: Vec<_> = runs.overlapping(range(0, 64)).map(|r| r.range).collect();
        assert_eq!(all, [range(0, 8), range(8, 8), range(16, 48)]);
        assert_eq!(runs.objects(), 8);
        runs.remove(Iova(8 * PAGE));
        assert_eq!(runs.objects(), 7);
        runs.insert(live(8, 8, 8));
        runs.merge_around(Iova(8 * PAGE));
        assert_eq!(runs.overlapping(range(0, 64)).count(), 1);
        assert_eq!(runs.objects(), 8);
    }

    #[test]
    fn a_short_piece_joins_nothing_on_its_right() {
        let mut runs = Runs::default();
        runs.insert(live(0, 3, 8));
        runs.insert(live(3, 8, 8));
        runs.merge_around(Iova(0));
        assert_eq!(runs.overlapping(range(0, 64)).count(), 2);
    }
}
